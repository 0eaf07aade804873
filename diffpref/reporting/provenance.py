"""Where a report comes from: models, settings, versions, commands, and what a reader should know of them."""

from __future__ import annotations

import shlex
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from diffpref import __version__
from diffpref.errors import UserError
from diffpref.reporting.loading import ScoredFolder
from diffpref.scoring import ERROR
from diffpref.suites import load_suite

FEW_PROMPTS = 50


def setup(folders: list[ScoredFolder], out: Path) -> dict[str, Any]:
    """How images, scores and report were made. out: path of the report."""
    base = folders[0]
    return {
        "suite": base.manifest.get("suite", {}),
        "suite_description": base.manifest.get("suite_description", ""),
        "suite_fingerprint": base.manifest.get("suite_fingerprint", ""),
        "evaluators": base.evaluators,
        "models": {folder.name: _model(folder, base) for folder in folders},
        "training": {folder.name: _last_values(folder) for folder in folders if folder.training},
        "commands": _commands(folders, out),
        "versions": {"diffpref": __version__, **base.manifest.get("versions", {})},
        "created": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }


def notes(folders: list[ScoredFolder], missing: dict[str, Any]) -> list[str]:
    """What a careful reader should be told before trusting the numbers. missing: as ``compare`` gives it."""
    base = folders[0]
    found = _missing_notes(missing)
    for folder in folders[1:]:
        found += _difference_notes(base, folder)
    truncated = base.manifest.get("truncated_prompts", 0)
    if truncated:
        found.append(f"{truncated} prompts are longer than the text encoder reads: it sees their beginning.")
    if len({row["prompt_id"] for row in base.rows}) < FEW_PROMPTS:
        found.append(
            f"Fewer than {FEW_PROMPTS} prompts: the intervals are wide; most real differences stay unseen."
        )
    return found


def _missing_notes(missing: dict[str, Any]) -> list[str]:
    if not missing["left_out_images"]:
        return []
    counts = ", ".join(f"{len(rows)} of {name}" for name, rows in missing["images"].items() if rows)
    dropped = missing["left_out_prompts"]
    prompts = f" and {dropped} prompt{'s' * (dropped != 1)} with them" if dropped else ""
    left_out = missing["left_out_images"]
    noun = "image is" if left_out == 1 else "images are"
    return [
        f"Scores are missing for images: {counts}. So that all models are compared on the same prompts, "
        f"{left_out} {noun} left out of every model{prompts}. If images are missing because they failed, the "
        "means are too good."
    ]


def _difference_notes(base: ScoredFolder, folder: ScoredFolder) -> list[str]:
    found = []
    if folder.manifest.get("model_fingerprint") == base.manifest.get("model_fingerprint"):
        found.append(f"{folder.name} has exactly the weights of {base.name}: nothing was trained.")
    differing = [
        f"{key} {value} and {folder.manifest.get('versions', {}).get(key)}"
        for key, value in base.manifest.get("versions", {}).items()
        if folder.manifest.get("versions", {}).get(key) != value
    ]
    if differing:
        found.append(
            f"{base.name} and {folder.name} were drawn with different versions: {'; '.join(differing)}."
        )
    if folder.manifest.get("device") != base.manifest.get("device"):
        devices = f"{base.manifest.get('device')} and {folder.manifest.get('device')}"
        found.append(f"{base.name} and {folder.name} were drawn on different devices ({devices}).")
    return found


def _model(folder: ScoredFolder, base: ScoredFolder) -> dict[str, Any]:
    manifest = folder.manifest
    kept = ("model", "lora", "model_fingerprint", "dtype", "device", "versions")
    return {
        "role": "baseline" if folder is base else "candidate",
        "folder": str(folder.path),
        **{key: manifest.get(key) for key in kept},
        "run": str(folder.training.path) if folder.training else None,
        "config": folder.training.config if folder.training else None,
    }


def _last_values(folder: ScoredFolder) -> dict[str, Any]:
    assert folder.training is not None
    series = folder.training.series
    return {
        "steps": max((steps[-1] for steps, _ in series.values()), default=0),
        "last": {key: values[-1] for key, (_, values) in series.items()},
    }


def _commands(folders: list[ScoredFolder], out: Path) -> list[str]:
    commands = [
        ["diffpref", "train", str(folder.training.path / "config.toml")]
        for folder in folders
        if folder.training and folder.training.config
    ]
    commands += [_generate_command(folder) for folder in folders]
    commands += [command for folder in folders for command in _score_commands(folder)]
    compared = [part for folder in folders[1:] for part in ("--candidate", str(folder.path))]
    forced = ["--force"] if any(folder.differences for folder in folders) else []
    compared += [*forced, "--out", str(out)]
    commands.append(["diffpref", "report", "--baseline", str(folders[0].path), *compared])
    return [shlex.join(command) for command in commands]


def _generate_command(folder: ScoredFolder) -> list[str]:
    manifest = folder.manifest
    command = ["diffpref", "generate", "--model", str(manifest.get("model"))]
    if manifest.get("lora"):
        command += ["--lora", str(manifest["lora"])]
    command += ["--suite", str(manifest.get("suite_source", ""))]
    command += map(str, manifest.get("suite_options", []))
    command += _limit(folder)
    command += ["--device", str(manifest["device"])] if manifest.get("device") else []
    if manifest.get("dtype", "fp32") != "fp32":
        command += ["--dtype", str(manifest["dtype"])]
    return [*command, "--out", str(folder.path)]


def _score_commands(folder: ScoredFolder) -> list[list[str]]:
    """A command for all evaluators that ran on one device in one precision."""
    runs: dict[tuple[str, str], list[str]] = {}
    for name, about in folder.evaluators.items():
        runs.setdefault((about.get("device") or "", about.get("dtype") or "fp32"), []).append(name)
    missing = ["--allow-missing"] if any(row.get(ERROR) for row in folder.rows) else []
    commands = []
    for (device, dtype), names in runs.items():
        command = ["diffpref", "score", str(folder.path), "--evaluators", ",".join(names), *missing]
        for name in names:
            weights = folder.evaluators[name].get("weights")
            command += ["--weights", f"{name}={weights}"] if weights else []
        command += ["--device", device] if device else []
        command += ["--dtype", dtype] if dtype != "fp32" else []
        commands.append(command)
    return commands


def _limit(folder: ScoredFolder) -> list[str]:
    """``--limit N`` where only the first prompts of the suite were drawn, if the suite can still be read."""
    source, settings = str(folder.manifest.get("suite_source", "")), folder.manifest.get("suite") or {}
    place = source.partition(":")[2]
    if place and not Path(place).exists():
        return []  # a hub id: a report asks nothing of a network
    try:
        suite = load_suite(source, {key: value for key, value in settings.items() if key != "name"})
    except UserError:
        return []
    drawn = len({row["prompt_id"] for row in folder.rows})
    same = suite.fingerprint() == folder.manifest.get("suite_fingerprint")
    return ["--limit", str(drawn)] if same and drawn < len(suite.prompts) else []
