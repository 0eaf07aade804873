"""The card (README.md) of a trained model: what it is, what it was made from, how to load it."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

from diffpref import __version__
from diffpref.config import TrainConfig, to_toml
from diffpref.objectives import OBJECTIVES
from diffpref.paths import atomic_write_text, resolve
from diffpref.texts import code, markdown, one_line

LABELS = {"lora": "LoRA", "dora": "DoRA"}
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_ARXIV = re.compile(r"arXiv (\d{4}\.\d{4,5})")
_DUAL_CAPTIONS = "Each image was paired with its own caption (dual captions, as in DCPO, arXiv 2502.06023)."


def write_model_card(folder: Path, config: TrainConfig, summary: dict[str, Any]) -> Path:
    """Write ``folder/README.md`` with front matter that the Hugging Face hub reads.

    Args:
        folder: saved pipeline or LoRA.
        config: the run's resolved config.
        summary: what the run came to, as ``{name: value}``; nested dicts are listed with dotted names.

    No licence is stated: a fine-tuned model has its base's terms to keep, which only its author can look up.
    """
    path = folder / "README.md"
    atomic_write_text(path, _front_matter(config) + _body(folder, config, summary))
    return path


def _front_matter(config: TrainConfig) -> str:
    tags = ["diffpref", "text-to-image", "preference-alignment", config.objective.name]
    if config.data.captions == "dual":
        tags.append("dual-captions")
    if config.adapter.type != "none":
        tags.append(config.adapter.type)
    fields: dict[str, Any] = {"library_name": "diffusers", "pipeline_tag": "text-to-image", "tags": tags}
    if _on_hub(config.model.base):
        fields["base_model"] = config.model.base
        fields["base_model_relation"] = "adapter" if config.adapter.type != "none" else "finetune"
    # JSON values are YAML values, quoted where they must be.
    lines = [f"{key}: {json.dumps(value)}" for key, value in fields.items()]
    return "\n".join(["---", *lines, "---", ""])


def _body(folder: Path, config: TrainConfig, summary: dict[str, Any]) -> str:
    lora = config.adapter.type != "none"
    what = (
        f"A {LABELS[config.adapter.type]} for {code(config.model.base)}"
        if lora
        else f"{code(config.model.base)}, all of its UNet's weights trained"
    )
    text = to_toml(config)
    fence = "`" * (1 + max([2, *map(len, re.findall("`+", text))]))
    sections = [
        f"\n# {config.objective.name} on {markdown(Path(config.model.base).name.removeprefix('tiny:'))}\n",
        f"{what}, aligned with preference pairs by diffpref {__version__}.\n",
        f"## Objective\n\n{_objective(config)}\n",
        f"## Data\n\n{_data(config)}\n",
        f"## Training\n\n{_table(_hyperparameters(config))}\n",
    ]
    if summary:
        sections.append(f"## Result of the run\n\n{_table(_flat(summary))}\n")
    sections += [
        f"## Use\n\n```python\n{_snippet(folder, config)}```\n",
        "## Licence\n\nThe terms of the base model and of the training data apply; state them here and in "
        "the front matter (`license:`) before you publish this model.\n",
        "## Config\n\n<details><summary>Every setting of the run</summary>\n\n"
        f"{fence}toml\n{text}{fence}\n\n</details>\n",
    ]
    return "\n".join(sections)


def _objective(config: TrainConfig) -> str:
    """The objective in the words of its own module, with links to the papers."""
    objective = OBJECTIVES[config.objective.name]
    title = (sys.modules[objective.__module__].__doc__ or config.objective.name).strip().splitlines()[0]
    text = [title, "", *_quoted(objective.__doc__ or "")]
    if config.objective.params:
        text += ["", _table(dict(config.objective.params))]
    if config.data.captions == "dual":
        text += ["", _DUAL_CAPTIONS]
    return _ARXIV.sub(r"[arXiv \1](https://arxiv.org/abs/\1)", "\n".join(text))


def _quoted(docstring: str) -> list[str]:
    first_paragraph = docstring.strip().split("\n\n")[0]
    return [f"> {line.strip()}" for line in first_paragraph.splitlines()]


def _data(config: TrainConfig) -> str:
    data = config.data
    lines = [
        f"Preference pairs: {code(data.pairs)}, {data.resolution} pixels, {data.captions} captions, no ties."
    ]
    if data.validation:
        lines.append(f"Held out: {code(data.validation)}.")
    return " ".join(lines)


def _hyperparameters(config: TrainConfig) -> dict[str, Any]:
    loop = config.train
    values: dict[str, Any] = {
        "steps": loop.steps,
        "pairs per step": loop.batch_size,
        "learning rate": f"{loop.learning_rate:g}, {loop.schedule}, {loop.warmup_steps} warm-up steps",
        "optimizer": _optimizer(config),
        "gradient clipping": f"{loop.max_grad_norm:g}" if loop.max_grad_norm else "off",
        "timesteps": f"{loop.min_timestep} to {loop.max_timestep}",
        "mixed precision": loop.mixed_precision,
        "EMA decay": f"{loop.ema_decay:g}" if loop.ema_decay else "off",
        "seed": config.seed,
    }
    if config.adapter.type != "none":
        modules = ", ".join(config.adapter.target_modules)
        values[LABELS[config.adapter.type]] = (
            f"rank {config.adapter.rank}, alpha {config.adapter.alpha:g}, on {modules}"
        )
    return values


def _optimizer(config: TrainConfig) -> str:
    loop = config.train
    betas = "" if loop.optimizer == "adafactor" else f"betas {loop.adam_beta1:g} and {loop.adam_beta2:g}, "
    return f"{loop.optimizer}, {betas}weight decay {loop.weight_decay:g}"


def _snippet(folder: Path, config: TrainConfig) -> str:
    name = folder.name if not folder.name.startswith(".") else "model"
    if config.adapter.type != "none":
        base = config.model.base if _on_hub(config.model.base) else "BASE_MODEL"
        return (
            "from diffusers import DiffusionPipeline\n\n"
            f"pipeline = DiffusionPipeline.from_pretrained({json.dumps(base)}{_version(config)})"
            f"{'' if base != 'BASE_MODEL' else f'  # the folder of {one_line(config.model.base)}'}\n"
            f'pipeline.load_lora_weights("{name}")  # the folder of this card\n'
            'pipeline("a prompt").images[0].save("image.png")\n'
        )
    return (
        "from diffusers import DiffusionPipeline\n\n"
        f'pipeline = DiffusionPipeline.from_pretrained("{name}")  # the folder of this card\n'
        'pipeline("a prompt").images[0].save("image.png")\n'
    )


def _version(config: TrainConfig) -> str:
    chosen = (("revision", config.model.revision), ("variant", config.model.variant))
    return "".join(f", {name}={json.dumps(value)}" for name, value in chosen if value)


def _table(values: dict[str, Any]) -> str:
    lines = ["| | |", "|---|---|"]
    for key, value in values.items():
        text = f"{value:.6g}" if isinstance(value, float) else str(value)
        lines.append(f"| {markdown(key)} | {markdown(text)} |")
    return "\n".join(lines)


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def _on_hub(base: str) -> bool:
    return isinstance(resolve(base), str) and _HUB_ID.fullmatch(base) is not None
