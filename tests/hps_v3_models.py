"""A small HPSv3 as a folder that users have the published one in."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file
from tokenizers import AddedToken, Regex, Tokenizer, models, pre_tokenizers

from diffpref.evaluators.hps_v3_text import conversation
from tests.clips import LONG
from tests.parity.hps_v3_cases import SPECIAL, TEXT, VISION
from tests.parity.image_reward_cases import weights

GOLDEN = json.loads((Path(__file__).parent / "parity" / "golden" / "hps_v3.json").read_text(encoding="utf-8"))


def write_hps_v3(folder: Path, seed: int = 0, tokenizer: Tokenizer | None = None) -> Path:
    """HPSv3.safetensors under the published names, and settings. seed: other than 0, other weights."""
    inner = tokenizer or word_tokenizer()
    wrapped = transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    wrapped.save_pretrained(folder)
    ids = dict(zip(SPECIAL, wrapped.convert_tokens_to_ids(list(SPECIAL)), strict=True))
    transformers.Qwen2VLConfig(
        text_config=TEXT | {"vocab_size": len(wrapped), "pad_token_id": ids["<|endoftext|>"]},
        vision_config=VISION, image_token_id=ids["<|image_pad|>"], video_token_id=ids["<|video_pad|>"],
    ).save_pretrained(folder)  # fmt: skip
    shapes = {name: tuple(shape) for name, shape in GOLDEN["shapes"].items()}
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        shapes[name] = (len(wrapped) + 1, shapes[name][1])
    state = {name: torch.from_numpy(value) * (1 + seed / 10) for name, value in weights(shapes).items()}
    save_file(state, folder / "HPSv3.safetensors")
    return folder


def word_tokenizer() -> Tokenizer:
    """A vocabulary of the words that the network reads, which keeps texts as short as real ones."""
    cut = pre_tokenizers.Split(Regex(r" ?\w+|\s+|[^\w\s]"), "isolated")
    text = f"{conversation('', 0)} {LONG} a red circle"
    words = {word for word, _ in cut.pre_tokenize_str(text)}
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(["<unk>", *sorted(words)])}, "<unk>"))
    tokenizer.pre_tokenizer = cut
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in SPECIAL])
    return tokenizer
