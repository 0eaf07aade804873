"""An evaluator at work: what identifies its scores, and the files that its finished blocks wait in."""

from __future__ import annotations

import contextlib
import io
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from diffpref.data.images import as_rgb
from diffpref.errors import UserError
from diffpref.evaluators import DetailedEvaluator, Evaluator, Runtime
from diffpref.paths import atomic_write_bytes, fingerprint

SAME_SCORES = ("version", "fingerprint", "scale", "dtype", "device")
"""What must be equal for two scores of an image to come from the same evaluator, as scores.json has it."""


def owner(column: str, evaluators: Iterable[str]) -> str:
    """The evaluator that a column of scores belongs to, "" for none: "hps-v2.1" is no detail of "hps-v2"."""
    names = [name for name in evaluators if column == name or column.startswith(f"{name}.")]
    return max(names, key=len, default="")


@dataclass(frozen=True)
class Judge:
    """One evaluator, the runtime it was loaded with, and the number of images it judges together."""

    evaluator: Evaluator
    runtime: Runtime
    batch: int

    @property
    def name(self) -> str:
        return self.evaluator.name

    @cached_property
    def about(self) -> dict[str, Any]:
        """What must be known about an evaluator to read, and to compare, its scores."""
        return {
            "version": self.evaluator.version,
            "fingerprint": self.evaluator.fingerprint,
            "scale": self.evaluator.scale,
            "dtype": self.runtime.dtype,
            "device": self.runtime.chosen_device.partition(":")[0],
            "weights": self.runtime.weights,
            "higher_is_better": self.evaluator.higher_is_better,
            "needs_prompt": self.evaluator.needs_prompt,
            "columns": {name: asdict(column) for name, column in self.evaluator.columns().items()},
        }

    @cached_property
    def identity(self) -> dict[str, Any]:
        return {key: self.about[key] for key in SAME_SCORES}

    def evaluate(
        self, images: Sequence[Image.Image], prompts: Sequence[str], names: Sequence[str]
    ) -> dict[str, list[Any]]:
        """Score and details by column. images: as `decode_for_scoring` gives them. names: of the images, for
        messages. Raises UserError for a score that is not finite."""
        if not getattr(self.evaluator, "any_mode", False):
            images = [as_rgb(image) for image in images]
        details: dict[str, Any] = {}
        if isinstance(self.evaluator, DetailedEvaluator):
            scores, details = self.evaluator.explain(images, prompts)
        else:
            scores = self.evaluator.score(images, prompts)
        bad = np.flatnonzero(~np.isfinite(scores))
        if len(bad):
            raise UserError(f"{self.name} gives no finite score for {names[bad[0]]}", why=f"{scores[bad[0]]}")
        columns = {self.name: scores, **{f"{self.name}.{name}": values for name, values in details.items()}}
        return {name: list(values) for name, values in columns.items()}

    def part(self, folder: Path, block: int) -> Path:
        """The file of a block. Batches of another size round differently, so they have files of their own."""
        key = fingerprint({**self.identity, "batch": self.batch})[:16]
        return folder / f"{self.name}-{key}" / f"{block:06d}.parquet"

    def read_part(self, folder: Path, block: int) -> pa.Table | None:
        """None when there is none that can be read."""
        try:
            return pq.read_table(self.part(folder, block))
        except (OSError, pa.ArrowException):
            return None

    def write_part(self, folder: Path, block: int, table: pa.Table) -> None:
        buffer = io.BytesIO()
        pq.write_table(table, buffer)
        atomic_write_bytes(self.part(folder, block), buffer.getvalue())

    def remove_parts(self, folder: Path) -> None:
        shutil.rmtree(self.part(folder, 0).parent, ignore_errors=True)
        with contextlib.suppress(OSError):
            folder.rmdir()  # unless another evaluator's parts wait in it
