"""The rows of `cuda_speed.py`: what is measured, most important first, and how the table is laid out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

TITLES = {"sd15": "SD1.5", "sd21-base": "SD2.1", "sdxl": "SDXL"}
BATCH = {"sd15": 128, "sd21-base": 128, "sdxl": 16}
SHARE_GOALS = {"sd15": 0.36, "sd21-base": 0.41, "sdxl": 0.45}
RATIO_GOALS = {"sd15": (6.0, 1.8)}  # over the usual order as launched, and at its best micro-batch

BF16 = {"train.mixed_precision": "bf16"}
LAST = BF16 | {"train.channels_last": True}
COMPILED = LAST | {"train.compile": True}
MAPO = {"objective.name": "mapo"}
CACHED = {"reference.kind": "cached", "reference.draws": 1}
LORA = {"adapter.type": "lora"}
CHECKPOINTING = {"model.gradient_checkpointing": True}
PARTS: dict[str, dict[str, Any]] = {
    "bf16": BF16,
    "tf32": {"train.tf32": True},
    "channels_last": {"train.channels_last": True},
    "compile": {"train.compile": True},
    "checkpointing": CHECKPOINTING,
    "mapo": MAPO,
    "cached": CACHED,
    "lora": LORA,
}
"""What a row's name is made of, after its model and micro-batch: sdxl-8-bf16-checkpointing, sd15-1-usual."""


@dataclass(frozen=True)
class Row:
    """One measurement. switches: of diffpref's training config, None for the usual order of operations.
    micro: pairs at once."""

    model: str
    micro: int
    switches: Mapping[str, Any] | None = field(default=None, hash=False)

    @classmethod
    def named(cls, name: str) -> Row:
        """The row of a name. Raises ValueError, with what is wrong, for what is none."""
        model = next((one for one in TITLES if name.startswith(f"{one}-")), "")
        micro, *parts = name.removeprefix(f"{model}-").split("-")
        if not model or not micro.isdigit() or BATCH[model] % max(1, int(micro)) or micro.startswith("0"):
            sizes = ", ".join(f"{one} (of {batch} pairs a step)" for one, batch in BATCH.items())
            raise ValueError(
                f"{name}: it begins with a model and a micro-batch that divides its step: {sizes}"
            )
        if parts == ["usual"]:
            return cls(model, int(micro))
        unknown = [part for part in parts if part not in PARTS and part != "fp32"]
        if unknown or not parts:
            known = ", ".join(["usual", "fp32", *PARTS])
            raise ValueError(
                f"{name}: {unknown[0] if unknown else 'nothing'} after the micro-batch, not {known}"
            )
        switches: dict[str, Any] = {}
        for part in parts:
            switches |= PARTS.get(part, {})
        return cls(model, int(micro), switches)

    @property
    def name(self) -> str:
        if self.switches is None:
            return f"{self.model}-{self.micro}-usual"
        parts = [name for name, given in PARTS.items() if given.items() <= self.switches.items()]
        return "-".join([self.model, str(self.micro), *(parts if "bf16" in parts else ["fp32", *parts])])

    @property
    def usual(self) -> bool:
        return self.switches is None

    @property
    def for_cuda(self) -> str:
        """A setting of the row that does nothing on a CPU."""
        return next((name for name in ("compile", "tf32") if self._has(f"train.{name}")), "")

    @property
    def what(self) -> str:
        if self.usual:
            return "usual order, DPO"
        objective = "MaPO" if self._has("objective.name") == "mapo" else "DPO"
        adapter = "LoRA" if self._has("adapter.type") else "full"
        cached = ", cached reference" if self._has("reference.kind") else ""
        return f"diffpref, {objective} {adapter}{cached}"

    @property
    def how(self) -> str:
        if self.usual:
            return "bf16, gradient_checkpointing" if self.model == "sdxl" else "bf16"
        assert self.switches is not None
        names = [self.switches.get("train.mixed_precision", "fp32")]
        names += [key.split(".")[1] for key, value in self.switches.items() if value is True]
        return ", ".join(names)

    @property
    def flops(self) -> str:
        """The attribute of `counting.Flops` that a pair costs."""
        if self.usual:
            return "usual"
        if self._has("adapter.type"):
            return "lora"
        without = self._has("objective.name") == "mapo" or self._has("reference.kind")
        return "without_reference" if without else "dpo"

    @property
    def needs(self) -> int:
        """Seconds that a GPU should have left for it at full size, by guess."""
        return 120 if self._has("train.compile") else 75 if self.usual and self.micro == 1 else 25

    def _has(self, key: str) -> Any:
        return self.switches is not None and self.switches.get(key)


ROWS = (
    # the goals; BF16 first, since group norm clones channels_last to the usual order and back on CUDA
    Row("sd15", 1),
    Row("sd15", 16, BF16),
    Row("sd15", 8),
    Row("sd15", 16, LAST),
    Row("sd15", 16, COMPILED),
    Row("sdxl", 1, BF16),  # an H100 holds it
    Row("sdxl", 2, BF16),  # an H200 does
    Row("sdxl", 8, BF16 | CHECKPOINTING),
    Row("sdxl", 1, COMPILED),
    Row("sd21-base", 16, BF16),
    Row("sd21-base", 16, COMPILED),
    # the usual order's best micro-batch
    Row("sd15", 16),
    Row("sd15", 4),
    Row("sd15", 32),
    # other kinds of training
    Row("sd15", 16, BF16 | MAPO),
    Row("sd15", 16, BF16 | CACHED),
    Row("sd15", 16, BF16 | LORA),
    Row("sdxl", 2, BF16 | LORA),
    Row("sdxl", 1, BF16 | MAPO),
    Row("sdxl", 1, BF16 | CACHED),
    # one switch a row
    Row("sd15", 4, BF16),
    Row("sd15", 1, BF16),
    Row("sd15", 32, BF16),
    Row("sd15", 16, BF16 | {"train.compile": True}),
    Row("sd15", 16, BF16 | CHECKPOINTING),
    Row("sdxl", 1, LAST),
    Row("sdxl", 2, COMPILED),
    Row("sd21-base", 16, LAST),
    Row("sd21-base", 16, BF16 | MAPO),
    Row("sd21-base", 16, BF16 | CACHED),
    Row("sd21-base", 16, BF16 | LORA),
    Row("sd21-base", 1),
    Row("sd21-base", 8),
    Row("sdxl", 1),
    Row("sdxl", 2),
    # the same, compiled
    Row("sd15", 16, COMPILED | MAPO),
    Row("sd15", 16, COMPILED | LORA),
    Row("sdxl", 1, COMPILED | MAPO),
    Row("sdxl", 2, COMPILED | LORA),
    Row("sd21-base", 16, COMPILED | MAPO),
    # without half precision
    Row("sd15", 8, {"train.tf32": True}),
    Row("sd15", 8, {}),
)

Result = dict[str, Any]
"""Of a row: model, what, how, micro_batch, estimated_gb; note, where it was not measured; else
pairs_per_second (median and quartiles), peak_memory_gb, flops_per_pair and further numbers for the JSON
file."""


def markdown(results: Sequence[Result], rate: float, goals: bool, about: str) -> str:
    """A table in reading order, and the goals beside what was measured."""
    lines = [
        "| model | training | with | micro-batch | pairs/s | of the matmul rate | GB | over the usual | "
        "over its best |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    done = [one for one in results if "pairs_per_second" in one]
    for model in TITLES:
        own = sorted((one for one in results if one["model"] == model), key=_reading_order)
        lines += [_line(one, done, rate) for one in own]
    notes = list(_goals(done, rate)) if goals else []
    for one in done:
        head = f"{TITLES[one['model']]}, {one['what']}, {one['how']}"
        if reasons := one.get("graph_breaks"):
            notes.append(f"{head}: graphs break ({'; '.join(reasons)})")
        if limits := one.get("limits_reached"):
            notes.append(f"{head}: the compiler gave up, and parts ran uncompiled ({'; '.join(limits)})")
    if len(done) < len(results):
        notes.append(f"{len(results) - len(done)} of {len(results)} rows have no numbers: the table says why")
    return "\n".join([*lines, "", *(f"- {note}" for note in [*notes, about])])


def _reading_order(one: Result) -> tuple[bool, str, str, int]:
    return not one["what"].startswith("usual"), one["what"], one["how"], one["micro_batch"]


def _line(one: Result, done: Sequence[Result], rate: float) -> str:
    head = f"| {TITLES[one['model']]} | {one['what']} | {one['how']} | {one['micro_batch']} | "
    if "note" in one:
        return f"{head}{one['note']} | | | | |"
    speed, low, high = one["pairs_per_second"]
    memory = f"{one['peak_memory_gb']:.1f}" if one["peak_memory_gb"] else ""
    ratios = [f"{speed / other:.2f}" if other else "" for other in _usual(one["model"], done)]
    share = speed * one["flops_per_pair"] / rate
    return f"{head}{speed:.2f} ({low:.2f} to {high:.2f}) | {share:.3f} | {memory} | {' | '.join(ratios)} |"


def _usual(model: str, done: Sequence[Result]) -> tuple[float, float]:
    """Pairs per second of the usual order with one pair at once, and at its best; 0 where not measured."""
    own = [one for one in done if one["model"] == model and one["what"].startswith("usual")]
    speeds = {one["micro_batch"]: one["pairs_per_second"][0] for one in own}
    return speeds.get(1, 0.0), max(speeds.values(), default=0.0) if len(speeds) > 1 else 0.0


def _goals(done: Sequence[Result], rate: float) -> Iterator[str]:
    for model, goal in SHARE_GOALS.items():
        own = [one for one in done if one["model"] == model and one["what"] == "diffpref, DPO full"]
        if not own:
            continue
        best = max(own, key=lambda one: one["pairs_per_second"][0])
        speed = best["pairs_per_second"][0]
        share = speed * best["flops_per_pair"] / rate
        yield f"{TITLES[model]}, DPO: **{share:.3f}** of the matmul rate (goal: at least {goal})"
        if model in RATIO_GOALS:
            names = "the usual order as launched", "it at its best micro-batch"
            for name, other, factor in zip(names, _usual(model, done), RATIO_GOALS[model], strict=True):
                if other:
                    ratio = f"**{speed / other:.2f}** (goal: at least {factor:g})"
                    yield f"{TITLES[model]}, DPO over {name}: {ratio}"
