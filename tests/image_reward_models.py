"""The small ImageReward of the golden numbers as a folder that users have the published one in."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from tests.parity import image_reward_cases as small

GOLDEN = json.loads((Path(__file__).parent / "parity" / "golden" / "image_reward.json").read_text())


def shapes(section: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the package's state dict ("small" or "full_size"), every layer written out."""
    return {
        name.replace(".N.", f".{layer}."): tuple(shape)
        for name, (shape, layers) in GOLDEN[section].items()
        for layer in range(layers)
    }


def write_image_reward(folder: Path, seed: int = 0) -> Path:
    """ImageReward.pt, med_config.json, and the vocabulary beside. seed: other than 0, other weights."""
    folder.mkdir(parents=True, exist_ok=True)
    wanted = {name: shape for name, shape in shapes("small").items() if not name.endswith("position_ids")}
    state = {name: torch.from_numpy(value) * (1 + seed / 10) for name, value in small.weights(wanted).items()}
    state["blip.text_encoder.embeddings.position_ids"] = torch.arange(64)[None]
    torch.save(state, folder / "ImageReward.pt")
    (folder / "med_config.json").write_text(json.dumps(small.TEXT))
    (folder / "vocab.txt").write_text("\n".join(small.VOCABULARY) + "\n", encoding="utf-8")
    return folder
