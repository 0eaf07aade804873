"""Before anything else: transformers and diffusers import torchvision when they find it."""

from diffpref.evaluators.torchvision_ops import mend_torchvision

mend_torchvision()
