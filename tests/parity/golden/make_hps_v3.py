"""Makes hps_v3.json: the outputs of the published package `hpsv3` 1.0.0 on a small Qwen2-VL.

It needs an environment of its own, since that package wants an old transformers. From the repository's root::

    python3.11 -m venv /tmp/hpsv3
    /tmp/hpsv3/bin/pip install --no-deps hpsv3==1.0.0
    /tmp/hpsv3/bin/pip install torch==2.13.0 transformers==4.45.2 "numpy>=2" pillow==13.0.0
    PYTHONPATH=. /tmp/hpsv3/bin/python tests/parity/golden/make_hps_v3.py

Images go to the package in RGB, as diffpref's evaluators get them. The model is of the package's own class in
a small size, with weights from a formula (tests/parity/image_reward_cases.py): only the JSON passes to the
test.
"""

from __future__ import annotations

import json
import sys
import types
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import torch

from tests.parity import hps_v3_cases as given
from tests.parity.image_reward_cases import weights

OUT = Path(__file__).with_name("hps_v3.json")
TOGETHER = 4
"""Pairs in one call of the package, which pads them."""
TEMPLATE = (
    "{% for turn in messages %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "<|im_start|>{{ turn.role }}\n{% for part in turn.content %}{% if part.type == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part.text }}{% endif %}{% endfor %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""What Qwen2-VL's template makes of one turn with one image."""


class Anything(types.ModuleType):
    """Stands for a module that only training uses."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


class TrainingModules(MetaPathFinder, Loader):
    """Found for training's packages, and for names that this transformers or torch lacks."""

    names = (
        "matplotlib", "pandas", "datasets", "peft", "trl", "fire", "deepspeed", "torchvision", "safetensors",
        "torch.utils.tensorboard", "transformers.trainer", "transformers.training_args",
        "transformers.trainer_pt_utils", "transformers.trainer_callback", "hpsv3.utils", "omegaconf",
        "huggingface_hub", "requests", "tensorboard",
    )  # fmt: skip

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if any(name == known or name.startswith(f"{known}.") for known in self.names):
            return ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec: ModuleSpec) -> types.ModuleType:
        return Anything(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        pass


def small_inferencer() -> Any:
    """The package's own inferencer around a small model."""
    from transformers import (
        Qwen2TokenizerFast,
        Qwen2VLConfig,
        Qwen2VLForConditionalGeneration,  # noqa: F401  imported before training's modules are replaced
        Qwen2VLImageProcessor,
        Qwen2VLProcessor,
    )

    sys.meta_path.insert(0, TrainingModules())
    from hpsv3.inference import HPSv3RewardInferencer
    from hpsv3.model.qwen2vl_trainer import Qwen2VLRewardModelBT

    tokenizer = Qwen2TokenizerFast(tokenizer_object=given.byte_tokenizer(), padding_side="right")
    tokenizer.add_special_tokens({"additional_special_tokens": [given.REWARD]})
    ids = dict(zip(given.SPECIAL, tokenizer.convert_tokens_to_ids(list(given.SPECIAL)), strict=True))
    config = Qwen2VLConfig(
        **given.TEXT, vision_config=given.VISION, vocab_size=len(tokenizer),
        image_token_id=ids["<|image_pad|>"], video_token_id=ids["<|video_pad|>"],
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    reward = tokenizer.convert_tokens_to_ids([given.REWARD])
    model = Qwen2VLRewardModelBT(
        config, output_dim=2, reward_token="special", special_token_ids=reward, rm_head_type="ranknet"
    )
    made = weights({name: tuple(value.shape) for name, value in model.state_dict().items()})
    model.load_state_dict({name: torch.from_numpy(value) for name, value in made.items()}, strict=True)
    inferencer = HPSv3RewardInferencer.__new__(HPSv3RewardInferencer)
    inferencer.device, inferencer.use_special_tokens = "cpu", True
    inferencer.model = model.eval()
    inferencer.processor = Qwen2VLProcessor(Qwen2VLImageProcessor(), tokenizer, chat_template=TEMPLATE)
    return inferencer


def main() -> None:
    torch.set_num_threads(1)
    inferencer = small_inferencer()
    cases = given.cases()
    names = list(cases)
    found: dict[str, Any] = {}
    for start in range(0, len(names), TOGETHER):
        part = names[start : start + TOGETHER]
        images, prompts = zip(*(cases[name] for name in part), strict=True)
        with torch.no_grad():
            outputs = inferencer.reward(list(images), list(prompts)).tolist()
            batch = inferencer.prepare_batch(list(images), list(prompts))
        for row, name in enumerate(part):
            pixels = batch["pixel_values"].split(batch["image_grid_thw"].prod(dim=1).tolist())[row]
            found[name] = {
                "output": outputs[row],
                "tokens": int(batch["attention_mask"][row].sum()),
                "grid": batch["image_grid_thw"][row].tolist(),
                "pixels": pixels[::97, ::101].double().sum(dim=1).tolist()[:4],
            }
    versions = {"hpsv3": "1.0.0", "torch": torch.__version__}
    versions["transformers"] = __import__("transformers").__version__
    shapes = {name: list(value.shape) for name, value in inferencer.model.state_dict().items()}
    sections = [
        f"{json.dumps(title)}: {{\n"
        + ",\n".join(f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in section.items())
        + "\n}"
        for title, section in {"versions": versions, "cases": found, "shapes": shapes}.items()
    ]
    OUT.write_text("{\n" + ",\n".join(sections) + "\n}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
