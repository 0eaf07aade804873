"""Before anything else: transformers and diffusers import torchvision when they find it."""

from diffpref.torchvision_ops import mend_torchvision

mend_torchvision()
