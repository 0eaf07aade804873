"""Images of a suite from a diffusers model: resumable, and equal to what plain diffusers draws."""

from __future__ import annotations

import json
import platform
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
import transformers
from tqdm import tqdm

from diffpref import pipelines
from diffpref.config import ModelConfig
from diffpref.errors import UserError
from diffpref.files import parse_json
from diffpref.paths import atomic_write_bytes, atomic_write_text, remove_abandoned
from diffpref.processes import ALONE, Processes, choose_device
from diffpref.suites import PlannedImage, Suite, load_suite, sampling_arguments

MANIFEST = "manifest.json"
ROWS = "manifest.jsonl"


@dataclass
class _Folder:
    """A folder of generated images: settings in manifest.json, a line per image in manifest.jsonl."""

    path: Path

    def open(self, settings: dict[str, Any]) -> None:
        """Start the folder, or check that the images in it were made with these very settings."""
        remove_abandoned(self.path / "images")
        manifest = self.path / MANIFEST
        if not manifest.exists():
            if (self.path / ROWS).exists():
                raise UserError(
                    f"{self.path} holds {ROWS} but no {MANIFEST}", fix="choose another --out folder"
                )
            atomic_write_text(manifest, json.dumps(settings, indent=2) + "\n")
            return
        differences = settings_difference(_compared(read_manifest(self.path)), _compared(settings))
        if differences:
            raise UserError(
                f"{self.path} holds images made with other settings",
                why="; ".join(differences),
                fix="choose another --out folder, or remove this one to start over",
            )

    def finished(self, plan: list[PlannedImage]) -> list[dict[str, Any]]:
        """Rows of finished images. A line torn by a kill, and rows whose file is gone, count as not made."""
        found = {row["id"]: row for path in self._all_rows() for row in _parse_lines(path)}
        rows = [row for row in found.values() if (self.path / row["file"]).is_file()]
        planned = {image.id: image for image in plan}
        for row in rows:
            image = planned.get(row["id"])
            if image is not None and (row["prompt"], row["seed"]) != (image.prompt.text, image.seed):
                raise UserError(
                    f"{self.path / ROWS}: {row['id']} is an image of another prompt or seed",
                    fix="choose another --out folder",
                )
        return rows

    def rows_of(self, rank: int) -> Path:
        """Where a process writes the rows of what it draws: several must not write into one file."""
        return self.path / (f".{rank}.{ROWS}" if rank else ROWS)

    def _all_rows(self) -> list[Path]:
        return [self.path / ROWS, *sorted(self.path.glob(f".*.{ROWS}"))]

    def write_rows(self, rows: list[dict[str, Any]]) -> None:
        """Write all rows, and drop those that other processes kept apart."""
        atomic_write_text(self.path / ROWS, "".join(_line(row) for row in rows))
        for path in self._all_rows()[1:]:
            path.unlink()


def generate(
    model: str | ModelConfig,
    suite: str,
    out: str | Path,
    lora: str | None = None,
    limit: int = 0,
    batch: int = 16,
    device: str | None = None,
    dtype: str = "fp32",
    sampling: Mapping[str, Any] | None = None,
    processes: Processes = ALONE,
) -> Path:
    """Draw every image of a suite into a folder.

    Leaves ``OUT/images/*.png``, ``OUT/manifest.jsonl`` (a row per image, with the seed that gives the same
    image in plain diffusers) and ``OUT/manifest.json`` (settings, fingerprint of the weights, versions). A
    stopped run goes on where it was.

    Args:
        model: diffusers folder, run folder, LoRA folder written by diffpref, ``tiny:model``, or a hub id;
            with a revision or variant as ``ModelConfig``.
        suite: name of a shipped suite, path of a TOML file, or a list of prompts (see `load_suite`).
        lora: LoRA file or folder to load on top.
        limit: draw so many prompts only (0: all), each kind in proportion to its share.
        batch: images drawn at once. Rounding inside the network can differ with the size of the batch, by
            one of 255 levels in a few pixels.
        device: "cuda", "mps", "cpu"; by default the first of these that is there.
        dtype: precision of the network: "fp32", "fp16" or "bf16".
        sampling: settings that win over those of the suite, such as ``{"steps": 20}``.
        processes: those that share the work. They draw the very batches that one process draws.

    Raises:
        UserError: model or suite that cannot be read, or a folder with images of other settings.
    """
    plan_of = load_suite(suite, sampling)
    out = Path(out)
    if limit < 0 or batch < 1:
        raise UserError(
            "--limit must be at least 0 and --batch at least 1", why=f"limit {limit}, batch {batch}"
        )
    loaded = pipelines.load_pipeline(
        model,
        lora=lora,
        device=choose_device(device, processes.local_rank),
        dtype=dtype,
        scheduler=plan_of.scheduler,
    )
    folder = _Folder(out)
    plan = plan_of.images(limit)
    try:
        if processes.main:
            folder.open(_settings(plan_of, loaded, suite, sampling or {}))
            folder.write_rows(folder.finished(plan))
        processes.wait()
        done = {row["id"] for row in folder.finished(plan)}
        processes.wait()  # until all know what is done: nobody may draw before
        _draw(folder, plan_of, [image for image in plan if image.id not in done], loaded, batch, processes)
        processes.wait()
        if processes.main:
            order = {image.id: position for position, image in enumerate(plan_of.images())}
            rows = folder.finished(plan)
            folder.write_rows(sorted(rows, key=lambda row: order.get(row["id"], len(order))))
        processes.wait()
    except OSError as error:
        raise UserError(f"cannot write to {out}", why=str(error.strerror or error)) from error
    return out


def read_manifest(folder: Path) -> dict[str, Any]:
    """Settings of a generated folder. Raises UserError when they are missing or damaged."""
    try:
        found = parse_json((folder / MANIFEST).read_text(encoding="utf-8"))
        if not isinstance(found, dict) or not isinstance(found.get("suite", {}), dict):
            raise ValueError("it is no object with the settings of a suite")
    except (OSError, ValueError) as error:
        raise UserError(
            f"{folder / MANIFEST} cannot be read",
            why=str(error),
            fix="make the folder with diffpref generate",
        ) from error
    return found


def read_rows(folder: Path) -> list[dict[str, Any]]:
    """Rows of a generated folder, one per image, in the order of the suite."""
    return _parse_lines(folder / ROWS)


def settings_difference(a: dict[str, Any], b: dict[str, Any], prefix: str = "") -> list[str]:
    """What differs between two nested settings: ``"suite.steps: 20 -> 10"``."""
    lines: list[str] = []
    for key in [*a, *(key for key in b if key not in a)]:
        left, right = a.get(key), b.get(key)
        if isinstance(left, dict) and isinstance(right, dict):
            lines += settings_difference(left, right, f"{prefix}{key}.")
        elif left != right:
            lines.append(f"{prefix}{key}: {_short(left)} -> {_short(right)}")
    return lines


def _draw(
    folder: _Folder,
    suite: Suite,
    missing: list[PlannedImage],
    loaded: pipelines.LoadedPipeline,
    batch: int,
    processes: Processes,
) -> None:
    """Draw this process's share of what is missing: whole batches, so that all rounds as in one process."""
    mine = list(_batches(missing, batch))[processes.rank :: processes.world]
    progress = tqdm(
        total=sum(map(len, mine)), unit="image", desc=f"generate {folder.path.name}",
        disable=not processes.main,
    )  # fmt: skip
    with progress, open(folder.rows_of(processes.rank), "a", encoding="utf-8") as stream:
        for images in mine:
            for image, pixels in zip(images, _sample(loaded, suite, images), strict=True):
                atomic_write_bytes(folder.path / image.file, _png(pixels))
            stream.write("".join(_line(_row(image)) for image in images))
            pipelines.flush_to_disk(stream)
            progress.update(len(images))


def _sample(loaded: pipelines.LoadedPipeline, suite: Suite, images: list[PlannedImage]) -> np.ndarray:
    """Images [B, H, W, 3] in 0..1, each from a CPU generator of its own."""
    arrays = loaded.pipeline(
        prompt=[image.prompt.text for image in images],
        negative_prompt=[suite.negative_prompt] * len(images) if suite.negative_prompt else None,
        num_inference_steps=suite.steps,
        guidance_scale=suite.guidance,
        width=suite.width,
        height=suite.height,
        generator=[torch.Generator("cpu").manual_seed(image.seed) for image in images],
        output_type="np",
    ).images
    for image, array in zip(images, arrays, strict=True):
        if not np.isfinite(array).all():
            raise UserError(
                f"the model draws pixels that are not numbers for {image.prompt.text!r} (seed {image.seed})",
                why="its weights are damaged, or its values do not fit the precision",
                fix="try --dtype fp32 or an earlier checkpoint",
            )
    return arrays


def _png(array: np.ndarray) -> bytes:
    stream = BytesIO()
    diffusers.image_processor.VaeImageProcessor.numpy_to_pil(array)[0].save(stream, format="PNG")
    return stream.getvalue()


def _batches(images: list[PlannedImage], size: int) -> Iterator[list[PlannedImage]]:
    for start in range(0, len(images), size):
        yield images[start : start + size]


def _settings(
    suite: Suite, loaded: pipelines.LoadedPipeline, source: str, sampling: Mapping[str, Any]
) -> dict[str, Any]:
    texts = [prompt.text for prompt in suite.prompts]
    return {
        "model": loaded.model,
        "lora": loaded.lora,
        "run": loaded.run,
        "model_fingerprint": loaded.fingerprint,
        "suite": suite.settings(),
        "suite_source": source,
        "suite_options": sampling_arguments(sampling),
        "suite_description": suite.description,
        "suite_fingerprint": suite.fingerprint(),
        "truncated_prompts": loaded.count_truncated([*texts, suite.negative_prompt]),
        "dtype": loaded.dtype,
        "device": loaded.device,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "diffusers": diffusers.__version__,
            "transformers": transformers.__version__,
        },
    }


def _compared(settings: dict[str, Any]) -> dict[str, Any]:
    """What must agree for a folder to be continued: the model's name and versions may change, images not."""
    kept = ("model_fingerprint", "suite", "suite_fingerprint", "dtype", "device")
    return {key: settings.get(key) for key in kept}


def _row(image: PlannedImage) -> dict[str, Any]:
    return {
        "id": image.id,
        "file": image.file,
        "prompt_id": image.prompt.id,
        "prompt": image.prompt.text,
        "kind": image.prompt.kind,
        "sample": image.sample,
        "seed": image.seed,
    }


def _line(row: dict[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"


def _parse_lines(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = parse_json(line)
        except ValueError:
            continue
        if isinstance(row, dict) and {"id", "file", "prompt", "seed"} <= row.keys():
            rows.append(row)
    return rows


def _short(value: Any) -> str:
    text = "nothing" if value is None else str(value)
    return text if len(text) <= 24 else f"{text[:12]}..."
