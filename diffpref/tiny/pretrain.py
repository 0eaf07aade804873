"""Trains the small Stable Diffusion from scratch and writes the base pipeline.

`python -m diffpref.tiny.pretrain --work DIR --out DIR` runs all stages: tokenizer, autoencoder, UNet with
text encoder. Each stage is resumable: run the same command again after a stop.
"""

from __future__ import annotations

import argparse
import shutil
import time
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline
from transformers import CLIPTokenizer

from diffpref.tiny.denoiser import load_snapshot, noise_schedule, train_denoiser
from diffpref.tiny.tokenizer import build_tokenizer
from diffpref.tiny.vae import train_vae

BASE_STEP = 3_000
"""The checkpoint that is shipped as the base: imperfect on purpose."""
STRONGER_STEPS = (4_500, 6_000)
"""Later checkpoints of the same run; the preference pairs hold their images too."""

_started = time.monotonic()


def say(message: str) -> None:
    print(f"{time.monotonic() - _started:7.0f} s  {message}", flush=True)


def load_stages(work: Path) -> tuple[AutoencoderKL, CLIPTokenizer]:
    """The finished autoencoder and tokenizer of a pretraining run."""
    vae = AutoencoderKL.from_pretrained(work / "stages" / "vae")
    vae.eval().requires_grad_(False)
    return vae, CLIPTokenizer.from_pretrained(work / "stages" / "tokenizer")


def train_stages(work: Path) -> None:
    """Runs what is missing of the three stages."""
    stages = work / "stages"
    if not (stages / "tokenizer").exists():
        build_tokenizer(stages / "tokenizer.staged")
        (stages / "tokenizer.staged").rename(stages / "tokenizer")
    if not (stages / "vae").exists():
        shutil.rmtree(stages / "vae.staged", ignore_errors=True)
        train_vae(work, say).save_pretrained(stages / "vae.staged")
        (stages / "vae.staged").rename(stages / "vae")
    vae, tokenizer = load_stages(work)
    train_denoiser(work, vae, tokenizer, say)


def assemble(work: Path, step: int, vae: AutoencoderKL, tokenizer: CLIPTokenizer) -> StableDiffusionPipeline:
    """The pipeline with the averaged weights of one checkpoint, rounded to fp16 as it is shipped."""
    unet, text_encoder = load_snapshot(work, step, tokenizer)
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet.half().float(),
        scheduler=DDIMScheduler.from_config(noise_schedule().config, set_alpha_to_one=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def export(work: Path, out: Path) -> None:
    """Writes the base pipeline to `out`: UNet and VAE in half precision to keep the package small.

    The text encoder stays fp32: transformers would otherwise load it as fp16 beside an fp32 UNet.
    """
    vae, tokenizer = load_stages(work)
    pipeline = assemble(work, BASE_STEP, vae, tokenizer)
    pipeline.unet.half()
    pipeline.vae.half()
    pipeline.save_pretrained(out, safe_serialization=True)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m diffpref.tiny.pretrain", description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="folder for everything between start and end")
    parser.add_argument("--out", type=Path, help="where the base pipeline goes when training is done")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads; results differ in the last bits")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    (options.work / "stages").mkdir(parents=True, exist_ok=True)
    train_stages(options.work)
    if options.out:
        export(options.work, options.out)


if __name__ == "__main__":
    main()
