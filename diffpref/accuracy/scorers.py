"""Scores of labelled pairs in blocks: by an evaluator, or by a model's implicit reward."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from diffpref.accuracy.pairs import LabelledPairs, PairImages
from diffpref.accuracy.reward import ImplicitReward
from diffpref.paths import atomic_write_text, fingerprint
from diffpref.processes import Processes
from diffpref.scoring.judges import Judge
from diffpref.scoring.passes import block_size, gather, score_blocks
from diffpref.scoring.tables import ERROR

Scored = tuple[np.ndarray[Any, Any], dict[int, str]]


@dataclass(frozen=True)
class Scorer:
    """What is measured. about: for the JSON. scale: of the scores before the softmax.

    score(pairs, folder): float64 [pairs, 2], higher is better, NaN for pairs with a bad image, and what is
    wrong by pair; None on all but the main process. Finished blocks are kept in `folder`.
    """

    about: dict[str, Any]
    scale: float
    score: Callable[[LabelledPairs, Path], Scored | None]


def evaluator_scorer(judge: Judge, batch: int, processes: Processes) -> Scorer:
    """An evaluator, its images scored as `diffpref score` does."""
    sign = 1.0 if judge.evaluator.higher_is_better else -1.0

    def score(pairs: LabelledPairs, folder: Path) -> Scored | None:
        images = PairImages(pairs)
        score_blocks(images, [judge], folder, None, batch, processes, f"accuracy {judge.name}")
        processes.wait()
        if not processes.main:
            return None
        table = gather(images, [judge], folder, batch)
        values = table[judge.name].to_numpy().astype(np.float64).reshape(-1, 2) * sign
        errors = [(i, e) for i, e in enumerate(table[ERROR].to_pylist()) if e is not None]
        bad: dict[int, str] = {}
        for i, e in errors:
            bad.setdefault(i // 2, f"image {i % 2}: {e}")
        return values, bad

    about = {key: value for key, value in judge.about.items() if key != "columns"}
    return Scorer({"evaluator": judge.name, **about}, 1.0, score)


def reward_scorer(
    reward: ImplicitReward, names: dict[str, str], batch: int, scale: float, processes: Processes
) -> Scorer:
    """The implicit reward of a model, in blocks that the processes share. names: of model and reference."""
    size = block_size(batch)

    def score(pairs: LabelledPairs, folder: Path) -> Scored | None:
        stats = [(file.path.name, file.path.stat()) for file in pairs.files]
        files = [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]
        texts = fingerprint([pairs.rows.tolist(), pairs.texts])
        place = folder / fingerprint([reward.fingerprint, files, texts, batch])[:16]
        blocks = [range(start, min(start + size, len(pairs))) for start in range(0, len(pairs), size)]
        mine = range(processes.rank, len(blocks), processes.world)
        total = sum(len(blocks[number]) for number in mine)
        with tqdm(
            total=total, unit="pair", desc="accuracy", disable=not processes.main, file=sys.stderr
        ) as bar:
            for number in mine:
                path = place / f"{number:06d}.json"
                if not path.exists():
                    block = list(blocks[number])
                    parts = [block[start : start + batch] for start in range(0, len(block), batch)]
                    atomic_write_text(
                        path, json.dumps([row for part in parts for row in reward.rewards(pairs, part)])
                    )
                bar.update(len(blocks[number]))
        processes.wait()
        if not processes.main:
            return None
        rows = [
            row
            for number in range(len(blocks))
            for row in json.loads((place / f"{number:06d}.json").read_text(encoding="utf-8"))
        ]
        bad = {pair: row for pair, row in enumerate(rows) if isinstance(row, str)}
        values = [(np.nan, np.nan) if isinstance(row, str) else row for row in rows]
        return np.array(values, np.float64), bad

    return Scorer({"implicit_reward": names, **reward.fingerprint}, scale, score)
