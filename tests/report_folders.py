"""Generated and scored folders without a model: rendered scenes stand for what models draw."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from diffpref.scoring import score
from diffpref.suites import image_seed
from diffpref.tiny.grammar import kind_caption
from diffpref.tiny.render import render
from diffpref.tiny.scenes import KINDS, sample_scene

SETTINGS = {
    "name": "scenes", "scheduler": "ddim", "steps": 20, "guidance": 5.0, "width": 64, "height": 64,
    "negative_prompt": "", "seeds": [0, 1],
}  # fmt: skip


def scored_folder(
    folder: Path, skill: float, prompts: int = 24, seeds: int = 2, run: Path | None = None
) -> Path:
    """A folder in which a share ``skill`` of the images shows what its prompt asks for."""
    rng = np.random.default_rng(7)  # the same prompts, and the same luck, for every skill
    rows = []
    (folder / "images").mkdir(parents=True)
    for prompt_id in range(prompts):
        kind = KINDS[prompt_id % len(KINDS)]
        asked = sample_scene(rng, kind)
        prompt = kind_caption(asked, rng)
        for sample in range(seeds):
            luck, other = rng.random(), sample_scene(rng, kind)
            name = f"{prompt_id:05d}-s{sample}"
            render(asked if luck < skill else other).save(folder / "images" / f"{name}.png")
            rows.append(
                {"id": name, "file": f"images/{name}.png", "prompt_id": prompt_id, "prompt": prompt,
                 "kind": kind, "sample": sample, "seed": image_seed(sample, prompt_id)}
            )  # fmt: skip
    (folder / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    manifest = {
        "model": str(run / "model") if run else "base",
        "lora": None,
        "run": str(run) if run else None,
        "model_fingerprint": f"{skill:.3f}",
        "suite": {**SETTINGS, "seeds": list(range(seeds))},
        "suite_source": "scenes.toml",
        "suite_description": "Rendered scenes.",
        "suite_fingerprint": "f",
        "truncated_prompts": 0,
        "dtype": "fp32",
        "device": "cpu",
        "versions": {"torch": "2", "diffusers": "0"},
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    score(folder, ["oracle"])
    return folder


def training_run(folder: Path, steps: int = 60, reference: bool = True) -> Path:
    """A run folder with metrics as the trainer writes them."""
    rng = np.random.default_rng(3)
    folder.mkdir(parents=True)
    lines = []
    for step in range(1, steps + 1):
        done = step / steps
        row = {"step": step, "loss": 0.7 - 0.1 * done + 0.03 * rng.normal(), "learning_rate": 1e-5}
        if reference:
            row |= {
                "implicit_accuracy": 0.5 + 0.2 * done + 0.05 * rng.normal(),
                "margin": 1e-3 * done + 2e-4 * rng.normal(),
                "winner_gain": -4e-4 * done + 1e-4 * rng.normal(),
                "loser_gain": -1.4e-3 * done + 1e-4 * rng.normal(),
            }
        lines.append(json.dumps(row))
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "config.toml").write_text('seed = 0\n[objective]\nname = "dpo"\nbeta = 2000.0\n')
    return folder


PREFERENCE = {
    "pickscore": ("PickScore", 21.0, 0.8, "in-domain for models trained on Pick-a-Pic"),
    "hps-v2.1": ("HPS v2.1", 0.27, 0.012, "cosine"),
    "badness": ("Badness", 3.0, 1.0, "lower is better"),
}
"""Columns as evaluators of preference write them: label, mean, deviation, meaning."""


def add_scores(folder: Path, seed: int, missing: tuple[str, ...] = ()) -> Path:
    """Add columns of drawn numbers; the images ``missing`` lose their files and all scores."""
    table = pq.read_table(folder / "scores.parquet")
    about = json.loads((folder / "scores.json").read_text())
    lost = [name in missing for name in table["id"].to_pylist()]
    rng = np.random.default_rng(seed)
    for name, (label, mean, deviation, meaning) in PREFERENCE.items():
        values = mean + deviation * rng.normal(size=len(table))
        table = table.append_column(name, pa.array(values.astype(np.float32), pa.float32()))
        better = name != "badness"
        column = {
            "label": label,
            "meaning": meaning,
            "higher_is_better": better,
            "share": False,
            "per_image": False,
        }
        about["evaluators"][name] = {
            "version": "1", "fingerprint": name, "scale": meaning, "dtype": "fp32", "device": "cpu",
            "weights": "", "higher_is_better": better, "needs_prompt": True, "columns": {name: column},
        }  # fmt: skip
    columns = {}
    for name in table.column_names:
        values = table[name].to_pylist()
        if name == "image_sha256" or name in PREFERENCE or name.startswith("oracle"):
            values = [None if gone else value for gone, value in zip(lost, values, strict=True)]
        columns[name] = pa.array(values, table.schema.field(name).type)
    columns["error"] = pa.array(["the file is missing" if gone else None for gone in lost], pa.string())
    pq.write_table(pa.table(columns), folder / "scores.parquet")
    (folder / "scores.json").write_text(json.dumps(about))
    for name in missing:
        (folder / "images" / f"{name}.png").unlink()
    return folder
