"""HPSv3: Qwen2-VL reads an image and its prompt, and a head gives mean and deviation of the preference.

Source: Y. Ma et al., *HPSv3: Towards Wide-Spectrum Human Preference Score* (ICCV 2025, arXiv:2508.03789), and
the published package `hpsv3` 1.0.0. The published weights are mapped by name onto transformers' Qwen2-VL.
Unlike Qwen2-VL itself, the package numbers all tokens in a row, those of the image as well.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from diffpref.errors import UserError
from diffpref.evaluators.agreement import with_dtype
from diffpref.evaluators.base import Column, Runtime
from diffpref.evaluators.checkpoints import check_keys, find_file, one_line, read_state, weights_hash
from diffpref.evaluators.clip import DTYPES, placed
from diffpref.evaluators.hps_v3_text import IMAGE, REWARD, conversation
from diffpref.evaluators.pixels import OPENAI_MEAN, OPENAI_STD
from diffpref.evaluators.unpadded import unpadded_outputs
from diffpref.language_models.loading import quiet, user_errors, without_special_tokens
from diffpref.paths import fingerprint
from diffpref.transfer import to_device

PUBLISHED = "MizzenAI/HPSv3"
WEIGHTS = ("HPSv3.safetensors",)
BASE = "Qwen/Qwen2-VL-7B-Instruct"
"""Whose settings and vocabulary the published weights go with."""
VERSION = "1"
PIXELS = 256 * 28 * 28
"""Of every image, about, after resizing."""
PATCH, MERGED, FRAMES = 14, 2, 2
"""Pixels of a patch's edge; patches of a token's edge; frames of a patch, equal in a still image."""
LONGEST = 200
"""Times its shorter edge: the package takes no longer image."""

Floats = NDArray[np.float32]
_Pair = tuple[Image.Image, list[int]]  # an image, and the tokens of the conversation about it


class Network(nn.Module):
    """Qwen2-VL without its language head, and the reward head. There are no dropouts: they only train."""

    def __init__(self, core: Any) -> None:
        super().__init__()
        self.core = core
        width = core.config.text_config.hidden_size
        self.rm_head = nn.ModuleDict(
            {"0": nn.Linear(width, 1024), "3": nn.Linear(1024, 16), "5": nn.Linear(16, 2)}
        )

    def forward(self, tokens: Tensor, reward: int, patches: Tensor, grid: Tensor) -> Tensor:
        """Mean and logarithm of the deviation [B, 2], float32.

        tokens: int64 [B, T], each row with one token `reward`. patches: [B * P, C * FRAMES * PATCH**2].
        grid: int64 [B, 3], frames, rows and columns of patches.
        """
        language = self.core.language_model
        embedded = language.embed_tokens(tokens)
        seen = self.core.visual(patches, grid_thw=grid).pooler_output.to(embedded.dtype)
        of_image = (tokens == self.core.config.image_token_id)[..., None]
        places = torch.arange(tokens.shape[1], device=tokens.device).expand(3, *tokens.shape)
        hidden = language(
            inputs_embeds=embedded.masked_scatter(of_image, seen), position_ids=places, use_cache=False
        ).last_hidden_state
        # by place: a mask as an index makes the host wait for the count of its true values
        place = (tokens == reward).int().argmax(dim=1)
        state = hidden[torch.arange(len(tokens), device=tokens.device), place].float()
        state = self.rm_head["0"](state).relu()
        return self.rm_head["5"](self.rm_head["3"](state).relu())


class HpsV3:
    """Mean of the preference for an image and its prompt."""

    name = "hps-v3"
    higher_is_better = True
    needs_prompt = True
    scale = "mean (mu) of the predicted preference, a number without unit or fixed range"

    def __init__(self, network: Network, tokenizer: Any, runtime: Runtime) -> None:
        self.device, self.dtype = placed(runtime), DTYPES[runtime.dtype]
        # one by one on the CPU, where more are no faster and a score so has the same bits in any company
        self.rows = 1 if self.device.type == "cpu" else runtime.batch
        self.version = with_dtype(VERSION, runtime.dtype)
        self.tokenizer, self.reward = tokenizer, tokenizer.convert_tokens_to_ids(REWARD)
        self.fingerprint = fingerprint(
            {
                "evaluator": self.name,
                "version": self.version,
                "weights": weights_hash(network),
                "vocabulary": tokenizer.get_vocab(),
                "conversation": conversation("{}", 1),
                "pixels": PIXELS,
            }
        )
        self.network = network.to(self.device).eval()
        network.core.to(self.dtype)  # the head stays in fp32, as in the package

    def columns(self) -> dict[str, Column]:
        return {
            self.name: Column("HPSv3", f"human preference learned from HPDv3: {self.scale}"),
            f"{self.name}.sigma": Column(
                "HPSv3 sigma",
                "deviation (sigma) of the predicted preference: how unsure the network is",
                higher_is_better=False,
            ),
        }

    def score(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> Floats:
        """Means [N] for RGB images and their prompts; nothing of a prompt is cut."""
        return self.explain(images, prompts)[0]

    def explain(
        self, images: Sequence[Image.Image], prompts: Sequence[str]
    ) -> tuple[Floats, dict[str, Floats | list[str]]]:
        found = unpadded_outputs(images, prompts, self._prepare, self._outputs, self.rows)
        return found[:, 0], {"sigma": np.exp(found[:, 1])}

    def _prepare(self, image: Image.Image, prompt: str) -> tuple[tuple[int, ...], _Pair]:
        size = resized(image.size)
        tokens = self.tokens(prompt, size)
        return (*size, len(tokens)), (image, tokens)

    def tokens(self, prompt: str, size: tuple[int, int]) -> list[int]:
        """Of the conversation about an image of this size (width, height) after resizing."""
        parts = (size[0] // (PATCH * MERGED)) * (size[1] // (PATCH * MERGED))
        plain = without_special_tokens(prompt, self.tokenizer)
        return list(self.tokenizer(conversation(plain, parts), verbose=False)["input_ids"])

    def _outputs(self, pairs: list[_Pair]) -> Tensor:
        """[B, 2] for pairs of one shape."""
        tokens = [ids for _, ids in pairs]
        pixels = np.concatenate([patches(image) for image, _ in pairs])
        wide, high = resized(pairs[0][0].size)
        grid = torch.tensor([[1, high // PATCH, wide // PATCH]] * len(pairs))
        exact = torch.backends.cudnn.flags(enabled=True, allow_tf32=False)
        try:
            with torch.inference_mode(), exact:
                rows = to_device(torch.tensor(tokens), self.device)
                seen = to_device(torch.from_numpy(pixels), self.device, self.dtype)
                return self.network(rows, self.reward, seen, to_device(grid, self.device))
        except torch.OutOfMemoryError as error:
            raise UserError(
                f"hps-v3 has no memory for {len(tokens)} images at a time",
                why=one_line(error),
                fix="lower --batch, or take bf16",
            ) from error


def resized(size: tuple[int, int]) -> tuple[int, int]:
    """Width and height that an image of `size` is brought to: multiples of 28, about PIXELS together.

    Raises:
        UserError: one edge is more than LONGEST times the other.
    """
    width, height = size
    if max(size) > LONGEST * min(size):
        raise UserError(
            f"hps-v3 takes no image of {width}x{height} pixels",
            why=f"one edge may be at most {LONGEST} times the other",
        )
    edge = PATCH * MERGED
    wide, high = (max(edge, round(length / edge) * edge) for length in size)
    factor = math.sqrt(width * height / PIXELS)
    if wide * high > PIXELS:
        wide, high = (math.floor(length / factor / edge) * edge for length in size)
    elif wide * high < PIXELS:
        factor = math.sqrt(PIXELS / (width * height))
        wide, high = (math.ceil(length * factor / edge) * edge for length in size)
    return wide, high


def patches(image: Image.Image) -> Floats:
    """An RGB image as Qwen2-VL reads it, [patches, 3 * FRAMES * PATCH**2], those of a token side by side."""
    wide, high = resized(image.size)
    levels = (np.arange(256) * (1 / 255)).astype(np.float32)
    pixels = levels[np.asarray(image.resize((wide, high), Image.Resampling.BICUBIC))]
    pixels = (pixels - np.array(OPENAI_MEAN, np.float32)) / np.array(OPENAI_STD, np.float32)
    rows, columns = high // (PATCH * MERGED), wide // (PATCH * MERGED)
    split = pixels.reshape(rows, MERGED, PATCH, columns, MERGED, PATCH, 3).transpose(0, 3, 1, 4, 6, 2, 5)
    frames = np.repeat(split[:, :, :, :, :, None], FRAMES, axis=5)
    return frames.reshape(rows * columns * MERGED**2, -1)


def load(runtime: Runtime) -> HpsV3:
    """HPSv3 with the weights of a file, a folder or a hub id.

    Beside the weights may stand ``config.json`` and ``tokenizer.json`` of the Qwen2-VL that they belong to,
    which otherwise come from the hub. 8 billion weights are 32 GB in fp32, 16 in bf16.

    Raises:
        UserError: weights, settings or vocabulary are missing, damaged or of something else.
    """
    placed(runtime)  # before anything large is read
    path = find_file(runtime.weights, WEIGHTS, PUBLISHED, "weights of hps-v3")
    config, tokenizer = _settings(path.parent), _tokenizer(path.parent)
    network = build(read_state(path), config, DTYPES[runtime.dtype], str(path))
    vocabulary = network.core.config.text_config.vocab_size
    if len(tokenizer) != vocabulary:
        raise UserError(
            f"the vocabulary does not fit the weights in {path}",
            why=f"it has {len(tokenizer)} tokens with {REWARD}, the weights know {vocabulary}",
            fix=f"put tokenizer.json of {BASE} beside the weights",
        )
    return HpsV3(network, tokenizer, runtime)


def build(state: Mapping[str, Tensor], config: Any, dtype: torch.dtype, source: str) -> Network:
    """The network that published weights belong to, its core in `dtype`.

    config: of Qwen2-VL; its number of tokens follows from the weights.

    Raises:
        UserError: names or shapes do not fit; it lists them.
    """
    from transformers import Qwen2VLModel

    embedding = state.get("model.embed_tokens.weight")
    if embedding is not None:
        config.text_config.vocab_size = len(embedding)
    with torch.device("meta"):
        wanted = Network(Qwen2VLModel(config)).state_dict()
    names = {_published(own): own for own in wanted}
    check_keys(
        source,
        "the weights of HPSv3",
        missing=[name for name in names if name not in state],
        unexpected=[name for name in state if name not in names and name != "lm_head.weight"],
        shapes=[
            f"{name}: {list(state[name].shape)}, expected {list(wanted[own].shape)}"
            for name, own in names.items()
            if name in state and state[name].shape != wanted[own].shape
        ],
    )
    core = {own.removeprefix("core."): state[name] for name, own in names.items() if own.startswith("core.")}
    read: Any = Qwen2VLModel.from_pretrained
    with quiet():
        network = Network(read(None, config=config, state_dict=core, dtype=dtype))
    head = {own.removeprefix("rm_head."): state[name] for name, own in names.items() if "rm_head" in own}
    network.rm_head.load_state_dict(head)
    return network.requires_grad_(False)


def _published(name: str) -> str:
    """What the published file calls a weight of Network."""
    return name.removeprefix("core.").replace("language_model.", "model.")


def _settings(folder: Path) -> Any:
    from transformers import AutoConfig

    place = str(folder) if (folder / "config.json").is_file() else BASE
    with user_errors(place):
        config = AutoConfig.from_pretrained(place)
    if config.model_type != "qwen2_vl":
        raise UserError(
            f"{place} does not describe the network of HPSv3", why=f"its type is {config.model_type!r}"
        )
    return config


def _tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    place = str(folder) if (folder / "tokenizer.json").is_file() else BASE
    with user_errors(place):
        tokenizer = AutoTokenizer.from_pretrained(place)
    tokenizer.add_special_tokens({"additional_special_tokens": [REWARD]})
    if tokenizer.convert_tokens_to_ids(IMAGE) in (None, tokenizer.unk_token_id):
        raise UserError(f"the vocabulary in {place} is not Qwen2-VL's", why=f"it has no {IMAGE}")
    return tokenizer
