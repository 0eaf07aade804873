"""`python -m diffpref` and `accelerate launch -m diffpref` enter here."""

import sys

from diffpref.cli import main

if __name__ == "__main__":
    sys.exit(main())
