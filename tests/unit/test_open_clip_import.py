"""open_clip beside a torch that torchvision was not built for: it imports, and breaks nothing around it."""

from __future__ import annotations

import importlib.util
import subprocess
import sys

import pytest

from diffpref.errors import UserError
from diffpref.evaluators import EVALUATORS, Runtime
from diffpref.evaluators.open_clip_models import import_open_clip
from tests.parity.inside import needs_torchvision, run_with_torchvision

USES = """
import numpy as np, torch
from PIL import Image
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from transformers import AutoImageProcessor, CLIPModel, CLIPTokenizer
from diffpref.families.miniature import build_stable_diffusion
pipeline = build_stable_diffusion()
image = pipeline("a red circle", num_inference_steps=1, height=32, width=32).images[0]
assert image.size == (32, 32)
"""
LOADS = """
from diffpref.evaluators.open_clip_models import import_open_clip
open_clip = import_open_clip()
assert open_clip.tokenize(["a"]).shape == (1, 77)
import torchvision
assert torchvision.transforms.Resize(8)(image_of(20)).size == (8, 8)
"""
IMAGE = "from PIL import Image\nimage_of = lambda side: Image.new('RGB', (side, side))\n"


@needs_torchvision
def test_before_diffusers_and_transformers() -> None:
    run_with_torchvision("-c", IMAGE + LOADS + USES)


@needs_torchvision
def test_importing_diffpref_is_enough_for_diffusers() -> None:
    """With torchvision beside a CPU torch training and drawing work, although nothing asks for open_clip."""
    run_with_torchvision("-c", "import diffpref\n" + USES)


@needs_torchvision
def test_after_diffusers_and_transformers() -> None:
    """Which found no torchvision when they were imported."""
    late = "import os, sys\nsys.path.append(os.environ['DIFFPREF_TEST_TORCHVISION'])\n"
    run_with_torchvision("-c", IMAGE + USES + late + LOADS + USES, importable=False)


@pytest.mark.skipif(importlib.util.find_spec("torchvision") is not None, reason="torchvision is installed")
def test_without_torchvision_the_message_names_the_extra() -> None:
    with pytest.raises(UserError) as error:
        import_open_clip()
    assert "torchvision" in str(error.value)
    assert "pip install 'diffpref[eval]'" in str(error.value)


def test_listing_evaluators_imports_no_network_library() -> None:
    """Help, reports and the oracle start without waiting for torch."""
    code = "import sys, diffpref.evaluators as e; e.load_evaluators(['oracle']); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "transformers", "open_clip"} & set(done.stdout.split())


def test_transformers_networks_need_neither(tmp_path) -> None:
    from tests.clips import write_hf_clip

    EVALUATORS["pickscore"](Runtime(str(write_hf_clip(tmp_path))))
    assert "open_clip" not in sys.modules
