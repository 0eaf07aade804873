"""What the parity test of HPSv3 and the script that made its golden numbers share. Needs no diffpref."""

from __future__ import annotations

from typing import Any

from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from tests.parity.image_reward_cases import MODES, picture

SPECIAL = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>",
    "<|video_pad|>",
)  # fmt: skip
"""Those of Qwen2-VL's vocabulary that matter here."""
REWARD = "<|Reward|>"

TEXT: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "rms_norm_eps": 1e-6, "rope_theta": 1e6, "max_position_embeddings": 32768,
    "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]}, "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip
VISION: dict[str, Any] = {"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2}
"""The settings of a small Qwen2-VL of the published one's form."""

PROMPTS = {
    "plain": "a photo of a red circle and a blue square",
    "long": "a photo of " + ", ".join(f"a red circle over the sunset mountain number {n}" for n in range(9)),
    "emoji": "a cat \U0001f431 and a dog \U0001f436\U0001f3fd, caf\u00e9 \u5c71",
    "escaped": "cats &amp; dogs &lt;painting&gt; {text_prompt}",
    "space": "  A  PHOTO\tof\na   Cat!  ",
    "empty": "",
}
SIZES = {
    "square": (224, 224),
    "exact": (448, 448),
    "portrait": (96, 410),
    "landscape": (832, 97),
    "odd": (1000, 768),
    "one pixel": (1, 1),
    "thin": (4, 800),
    "rounded up": (434, 462),
}
"""(width, height)"""


def cases() -> dict[str, tuple[Image.Image, str]]:
    """Every size and mode (of the file, opened in RGB) with the plain prompt, every prompt with one image."""
    found = {f"size: {name}": (picture(size), PROMPTS["plain"]) for name, size in SIZES.items()}
    found |= {f"mode: {mode}": (picture((300, 231), mode).convert("RGB"), PROMPTS["plain"]) for mode in MODES}
    found |= {f"prompt: {name}": (picture((320, 240)), prompt) for name, prompt in PROMPTS.items()}
    return found


def byte_tokenizer() -> Tokenizer:
    """A vocabulary of the 256 bytes and the special tokens: every sign of a text counts."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={sign: i for i, sign in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in SPECIAL])
    return tokenizer
