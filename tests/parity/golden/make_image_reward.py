"""Makes image_reward.json: scores and pixels of the published package `image-reward` 1.5.

It needs an environment of its own, since that package wants an old transformers. From the repository's root::

    python3.11 -m venv /tmp/image-reward
    /tmp/image-reward/bin/pip install --no-deps image-reward==1.5 timm==0.6.13 fairscale==0.4.13
    /tmp/image-reward/bin/pip install torch==2.13.0 "transformers==4.46.3" "numpy>=2" pillow==13.0.0
    /tmp/image-reward/bin/pip install --no-deps torchvision==0.28.0
    PYTHONPATH=. /tmp/image-reward/bin/python tests/parity/golden/make_image_reward.py

Images go to the package in RGB, as diffpref's evaluators get them. The model is made of the package's own
classes in a small size, with weights from a formula (tests/parity/image_reward_cases.py): only the JSON
passes to the test.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import re
import sys
import tempfile
import types
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.parity import image_reward_cases as given

OUT = Path(__file__).with_name("image_reward.json")
FULL_SIZE_TEXT = given.TEXT | {
    "hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "num_hidden_layers": 12,
    "max_position_embeddings": 512, "vocab_size": 30524, "encoder_width": 1024,
}  # fmt: skip


def let_torchvision_load() -> torch.library.Library | None:
    """torchvision's wheel is built for CUDA: beside a CPU build of torch two operators are missing."""
    if torch.version.cuda is not None:
        return None
    operators = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        operators.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return operators


def bare_package(name: str) -> None:
    """Make the package's modules importable without its __init__, which imports its trainer and two CLIPs."""
    found = importlib.util.find_spec("ImageReward") if "." not in name else None
    folder = Path(found.origin).parent if found and found.origin else None
    module = types.ModuleType(name)
    parent = sys.modules.get(name.rpartition(".")[0])
    module.__path__ = [str(folder or Path(parent.__path__[0]) / name.rpartition(".")[2])]  # type: ignore[union-attr]
    sys.modules[name] = module


def small_model(published: Any, blip: Any, tokenizer: Any, config: dict[str, Any]) -> Any:
    def small_vit(_: str, image_size: int, *__: Any) -> tuple[Any, int]:
        from ImageReward.models.BLIP.vit import VisionTransformer

        return VisionTransformer(img_size=image_size, **given.VISION), given.VISION["embed_dim"]

    blip.create_vit, blip.init_tokenizer = small_vit, lambda: tokenizer
    model = published.ImageReward(write_config(config))
    model.mlp = published.MLP(config["hidden_size"])
    made = given.weights({k: tuple(v.shape) for k, v in model.state_dict().items() if v.is_floating_point()})
    model.load_state_dict({k: torch.from_numpy(v) for k, v in made.items()}, strict=False)
    return model.eval()


def write_config(config: dict[str, Any]) -> str:
    path = Path(tempfile.mkdtemp()) / "med_config.json"
    path.write_text(json.dumps(config))
    return str(path)


def small_tokenizer() -> Any:
    """As the package's init_tokenizer, on our vocabulary."""
    from transformers import BertTokenizer

    path = Path(tempfile.mkdtemp()) / "vocab.txt"
    path.write_text("\n".join(given.VOCABULARY) + "\n", encoding="utf-8")
    tokenizer = BertTokenizer(str(path))
    tokenizer.add_special_tokens({"bos_token": "[DEC]"})
    tokenizer.add_special_tokens({"additional_special_tokens": ["[ENC]"]})
    return tokenizer


def shapes_by_layer(state: dict[str, Any]) -> dict[str, list[Any]]:
    """Names with N for the number of a layer -> [shape, number of layers], which keeps the file short."""
    found: dict[str, list[Any]] = {}
    for name, value in state.items():
        pattern = re.sub(r"(blocks|layer)\.\d+\.", r"\1.N.", name)
        found.setdefault(pattern, [list(value.shape), 0])[1] += 1
    return found


def pixels(model: Any, image: Any) -> np.ndarray[Any, Any]:
    """The 8-bit pixels before the package turns them into a normalised tensor."""
    for step in model.preprocess.transforms[:3]:
        image = step(image)
    return np.asarray(image)


def one_line_each(golden: dict[str, dict[str, Any]]) -> str:
    """JSON with a line for each case and each weight, so that a difference is seen in a review."""
    sections = []
    for title, section in golden.items():
        lines = ",\n".join(f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in section.items())
        sections.append(f"{json.dumps(title)}: {{\n{lines}\n}}")
    return "{\n" + ",\n".join(sections) + "\n}\n"


def main() -> None:
    operators = let_torchvision_load()  # must stay alive
    torch.set_num_threads(1)
    for name in ("ImageReward", "ImageReward.models"):
        bare_package(name)
    from ImageReward import ImageReward as published
    from ImageReward.models.BLIP import blip_pretrain as blip

    create_vit = blip.create_vit
    tokenizer = small_tokenizer()
    model = small_model(published, blip, tokenizer, given.TEXT)
    results = {}
    with torch.no_grad():
        for name, (image, prompt) in given.cases().items():
            results[name] = {
                "score": model.score(prompt, image),
                "pixels": hashlib.sha256(pixels(model, image).tobytes()).hexdigest(),
                "tokens": tokenizer(prompt, padding="max_length", truncation=True, max_length=35).input_ids,
            }
    blip.create_vit = create_vit
    full = published.ImageReward(write_config(FULL_SIZE_TEXT))
    versions = {"image-reward": "1.5", "torch": torch.__version__}
    versions["transformers"] = __import__("transformers").__version__
    golden = {"versions": versions, "cases": results, "full_size": shapes_by_layer(full.state_dict())}
    golden["small"] = shapes_by_layer(model.state_dict())
    OUT.write_text(one_line_each(golden), encoding="utf-8")
    print(f"{OUT}: {[round(case['score'], 4) for case in results.values()]}", operators is not None)


if __name__ == "__main__":
    main()
