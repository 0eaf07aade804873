"""diffpref: align text-to-image diffusion models with human preferences."""

from diffpref.threads import shorten_waits
from diffpref.torchvision_ops import mend_mismatch

__version__ = "0.1.0"

shorten_waits()  # before anything here imports torch, which reads it once
mend_mismatch()  # before anything here imports diffusers or transformers, which would fail
