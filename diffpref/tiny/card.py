"""The small model's card: `python -m diffpref.tiny.card --work DIR` measures and prints it.

Draws the suite `tiny` (600 held-out prompts) with the shipped base into DIR, judges it, and prints
sizes, training steps and the score of each kind with its interval; `--write` keeps it beside the model.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import pyarrow.parquet as pq
import torch
from diffusers import StableDiffusionPipeline

from diffpref.evaluators.stats import wilson_interval
from diffpref.generation import generate
from diffpref.paths import atomic_write_text, resolve_existing
from diffpref.scoring import score
from diffpref.tiny import denoiser, vae
from diffpref.tiny.bank import example
from diffpref.tiny.oracle import reads_all
from diffpref.tiny.pretrain import BASE_STEP, STRONGER_STEP, WEAKER_STEP
from diffpref.tiny.scenes import KINDS

MODEL = "tiny:model"
JUDGED, JUDGED_SEED = 5_000, 71


def _sizes(pipeline: StableDiffusionPipeline) -> list[str]:
    parts = {"UNet": pipeline.unet, "VAE": pipeline.vae, "text encoder": pipeline.text_encoder}
    lines = [
        f"| {name} | {sum(p.numel() for p in part.parameters()) / 1e6:.2f} M |"
        for name, part in parts.items()
    ]
    return ["| part | parameters |", "| --- | --- |", *lines, f"| vocabulary | {len(pipeline.tokenizer)} |"]


def _scores(folder: Path) -> list[str]:
    table = pq.read_table(folder / "scores.parquet", columns=["kind", "oracle.all_correct", "oracle.facts"])
    rows = table.to_pylist()
    lines = [
        "| kind | prompts | all correct | 95 % interval | facts that hold |",
        "| --- | --- | --- | --- | --- |",
    ]
    for kind in (*KINDS, "all"):
        chosen = [row for row in rows if kind in (row["kind"], "all")]
        right = sum(row["oracle.all_correct"] for row in chosen)
        low, high = wilson_interval(right / len(chosen), len(chosen))
        facts = sum(row["oracle.facts"] for row in chosen) / len(chosen)
        lines.append(
            f"| {kind} | {len(chosen)} | {right / len(chosen):.1%} | {low:.1%} to {high:.1%} | {facts:.1%} |"
        )
    return lines


def _oracle_accuracy(pipeline: StableDiffusionPipeline) -> str:
    """How often the judge itself is right: on scenes whose content is known."""
    scenes = [example(JUDGED_SEED, index) for index in range(JUDGED)]
    clean = sum(reads_all(one.image, one.scene.things) for one in scenes) / JUDGED
    with torch.no_grad():
        kept = vae.reconstruction_accuracy(pipeline.vae, JUDGED, JUDGED_SEED)
    return (
        f"The oracle reads every shape, colour and relation in {clean:.2%} of {JUDGED} clean renders and in "
        f"{kept:.2%} of their reconstructions by the autoencoder."
    )


def card(work: Path) -> str:
    """The card as Markdown; images and scores stay in `work`."""
    pipeline = StableDiffusionPipeline.from_pretrained(resolve_existing(MODEL, "small model"))
    folder = generate(MODEL, "tiny", work, batch=40)
    score(folder, ["oracle"])
    return "\n".join(
        [
            "---",
            "license: apache-2.0",
            "library_name: diffusers",
            "pipeline_tag: text-to-image",
            "---",
            "",
            "# The small model of diffpref",
            "",
            "A Stable Diffusion of coloured shapes, 64 x 64 pixels, trained from scratch by",
            "`python -m diffpref.tiny.pretrain` on rendered scenes. Loads with",
            "`diffusers.StableDiffusionPipeline.from_pretrained`. It is imperfect on purpose.",
            "",
            *_sizes(pipeline),
            "",
            f"Autoencoder: {vae.STEPS} steps of {vae.BATCH} images, then {vae.SHARPEN_STEPS} and "
            f"{vae.REFINE_STEPS} with a term for edges. UNet and text encoder: {BASE_STEP} steps of "
            f"{denoiser.BATCH} images, moving average of the weights. The preference pairs also hold images "
            f"of steps {WEAKER_STEP} and {STRONGER_STEP} of the same run.",
            "",
            "Oracle on the suite `tiny` (held-out prompts, DDIM, one seed; Wilson intervals):",
            "",
            *_scores(folder),
            "",
            _oracle_accuracy(pipeline),
            "",
        ]
    )


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m diffpref.tiny.card", description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="folder for the images and their scores")
    parser.add_argument("--write", action="store_true", help="keep the card as README.md beside the model")
    options = parser.parse_args(arguments)
    text = card(options.work)
    print(text)
    if options.write:
        atomic_write_text(Path(resolve_existing(MODEL, "small model")) / "README.md", text)


if __name__ == "__main__":
    main()
