"""Finding a model and reading its parts, with a clear message for everything that can be wrong with a
folder."""

from __future__ import annotations

import hashlib
import importlib
import json
import logging
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

import torch
from diffusers import AutoencoderKL, DiffusionPipeline, UNet2DConditionModel
from torch import nn

from diffpref.config import ModelConfig
from diffpref.errors import UserError
from diffpref.paths import resolve_or_hub_id

INDEX = "model_index.json"
POINTER, POINTER_BYTES = b"version https://git-lfs", 1024
_WEIGHTS = re.compile(
    r"(?:diffusion_pytorch_model|model|pytorch_model)(?:-\d+-of-\d+)?(?:\.(?P<variant>[\w-]+?))?(?:-\d+-of-\d+)?"
    r"\.(?:safetensors|bin)"
)
log = logging.getLogger("diffpref")
T = TypeVar("T")


def model_folder(config: ModelConfig, without: Iterable[str] = ()) -> Path:
    """The local folder of `config.base`; a hub id is fetched (weights of the wanted variant only).

    without: parts that need not be fetched.
    """
    place = resolve_or_hub_id(config.base, "model folder")
    return place if isinstance(place, Path) else _download(place, config, without)


def _download(hub_id: str, config: ModelConfig, without: Iterable[str]) -> Path:
    try:
        return Path(
            DiffusionPipeline.download(
                hub_id,
                revision=config.revision or None,
                variant=config.variant or None,
                **dict.fromkeys(without),
            )
        )
    except Exception as error:  # dozens of types; all mean that the model is not to be had
        raise UserError(
            f"model not found: {hub_id!r}",
            why=f"there is no such folder here, and the hub could not give it: {one_line(error)}",
            fix="check the spelling, the network and your access to it, or give a local diffusers folder",
        ) from error


def read_index(folder: Path) -> dict[str, Any]:
    """model_index.json of a pipeline folder. Raises UserError when the folder is no pipeline."""
    path = folder / INDEX
    if not path.is_file():
        holds = ", ".join(sorted(p.name for p in folder.iterdir())[:8]) if folder.is_dir() else "it is a file"
        raise UserError(
            f"{folder} is not a diffusers pipeline folder",
            why=f"{INDEX} is missing; there is: {holds or 'nothing'}",
            fix="give a folder that save_pretrained wrote; convert single files with diffusers first",
        )
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        known = isinstance(index, dict) and isinstance(index.get("_class_name"), str)
        why = "" if known else "it names no pipeline class"
    except (OSError, ValueError, RecursionError) as error:
        why = one_line(error)
    if why:
        raise UserError(f"{path} cannot be read", why=why, fix="fetch the model again")
    return dict(index)


def check_parts(folder: Path, parts: Iterable[str]) -> None:
    """Raise UserError when a part of the pipeline has no folder (before anything large is loaded)."""
    missing = [part for part in parts if not (folder / part).is_dir() or not any((folder / part).iterdir())]
    if missing:
        raise UserError(
            f"the model {folder} is incomplete",
            why=f"missing or empty: {', '.join(missing)}",
            fix="fetch the model again",
        )
    for part in parts:
        for path in (folder / part).iterdir():
            if path.is_file() and path.stat().st_size < POINTER_BYTES and _is_pointer(path):
                raise UserError(
                    f"{path} stands for a file that was not fetched",
                    why="it is a pointer of Git LFS",
                    fix="run git lfs pull in the model's repository",
                )


def _is_pointer(path: Path) -> bool:
    with open(path, "rb") as stream:
        return stream.read(len(POINTER)) == POINTER


def load_part(load: Callable[[], T], what: str) -> T:
    """Run a loader; whatever a damaged or missing file makes it raise becomes a UserError."""
    try:
        return load()
    except UserError:
        raise
    except Exception as error:  # safetensors, json, transformers and diffusers each have types of their own
        raise UserError(
            f"cannot load {what}",
            why=f"{type(error).__name__}: {one_line(error)}",
            fix="check the model folder (and model.variant), or fetch the model again",
        ) from error


def part_variant(folder: Path, wanted: str) -> str | None:
    """The variant of the weights to read in a part's folder; None for those without one.

    wanted: applies to the parts that have it. A part that has weights of a single variant alone is read as it
    is.
    """
    found = [_WEIGHTS.fullmatch(path.name) for path in folder.iterdir()]
    variants = {match["variant"] for match in found if match}
    if wanted in variants:
        return wanted
    return next(iter(variants)) if len(variants) == 1 else None


def load_network(
    kind: Any, folder: Path | str, part: str, dtype: torch.dtype = torch.float32, variant: str = ""
) -> Any:
    """A network of a pipeline folder or hub id, all of whose weights are there. part "": the folder itself.

    Raises UserError: weights that are missing (the libraries would draw random numbers), damaged, of another
    shape.
    """
    what = f"the {part} of {folder}" if part else f"the {kind.__name__} of {folder}"
    options: dict[str, Any] = {"subfolder": part} if part else {}
    if isinstance(folder, Path):
        check_parts(folder, [part])
        options["variant"] = part_variant(folder / part, variant)
    network, found = load_part(
        lambda: kind.from_pretrained(folder, dtype=dtype, output_loading_info=True, **options), what
    )
    missing, left = sorted(found["missing_keys"]), sorted(found["unexpected_keys"])
    if missing:
        raise UserError(
            f"cannot load {what}",
            why=f"{len(missing)} of its weights are missing: {', '.join(missing[:3])}",
            fix="fetch the model again",
        )
    if left:
        log.warning("%s has %d weights that it does not use: %s", what, len(left), ", ".join(left[:3]))
    return network


class PartLoader:
    """Loads the parts of one pipeline folder: networks as fp32, of the wanted variant."""

    def __init__(self, folder: Path, variant: str) -> None:
        self.folder, self._variant = folder, variant

    def __call__(self, kind: Any, part: str) -> Any:
        return load_network(kind, self.folder, part, torch.float32, self._variant)

    def vae(self) -> AutoencoderKL:
        return self(AutoencoderKL, "vae")

    def pipeline(self, **given: Any) -> Any:
        """The whole pipeline, with the parts given."""
        return load_pipeline_folder(self.folder, torch.float32, self._variant, **given)

    def tokenizer(self, kind: Any, part: str) -> Any:
        return load_part(
            lambda: kind.from_pretrained(self.folder, subfolder=part), f"the {part} of {self.folder}"
        )


def load_pipeline_folder(folder: Path, dtype: torch.dtype, variant: str = "", **given: Any) -> Any:
    """The pipeline of a folder, whatever its class; its networks by `load_network`, but for those given.

    Raises UserError when a part is damaged or missing.
    """
    index = read_index(folder)
    for name, entry in index.items():
        if name not in given and isinstance(entry, list) and entry[:1] in (["diffusers"], ["transformers"]):
            kind = getattr(importlib.import_module(entry[0]), str(entry[1]), None)
            if isinstance(kind, type) and issubclass(kind, nn.Module):
                given[name] = load_network(kind, folder, name, dtype, variant)
    rest = [
        name for name, entry in index.items() if isinstance(entry, list) and any(entry) and name not in given
    ]
    check_parts(folder, rest)
    variants = [part_variant(folder / name, variant) for name in rest]
    return load_part(
        lambda: DiffusionPipeline.from_pretrained(
            folder, dtype=dtype, variant=next(filter(None, variants), None), **given
        ),
        f"the model {folder}",
    )


def unet_skeleton(folder: Path) -> UNet2DConditionModel:
    """The UNet of a pipeline folder without its weights, on torch's meta device: names and shapes only."""

    def build() -> UNet2DConditionModel:
        config = UNet2DConditionModel.load_config(folder, subfolder="unet")
        with torch.device("meta"):
            return UNet2DConditionModel.from_config(config)

    return load_part(build, f"the config of the unet of {folder}")


def check_unet(folder: Path, unet: UNet2DConditionModel, channels: int, text_width: int) -> None:
    """The parts must fit together: an inpainting UNet or another model's text encoder would fail much
    later."""
    if unet.config.in_channels != channels:
        raise UserError(
            f"the UNet of {folder} takes {unet.config.in_channels} channels, its VAE makes {channels}",
            why="inpainting, depth and editing models have further inputs, which pairs do not give",
            fix="align a plain text-to-image model",
        )
    if unet.config.cross_attention_dim != text_width:
        raise UserError(
            f"the UNet of {folder} reads text of width {unet.config.cross_attention_dim}, "
            f"its text encoder writes {text_width}",
            fix="the folder mixes parts of two models; fetch it again",
        )


def side_multiple(unet_config: Any, vae_factor: int) -> int:
    """What sides of images must be a multiple of: VAE and UNet halve them until one cell is left of so
    many."""
    return int(vae_factor * 2 ** (len(unet_config.block_out_channels) - 1))


def tokenizer_rules(tokenizer: Any) -> str:
    """Everything that decides how a tokenizer cuts text, as one string."""
    rules = json.loads(tokenizer.backend_tokenizer.to_str())
    for state_of_last_call in ("truncation", "padding"):
        del rules[state_of_last_call]
    return json.dumps(rules, sort_keys=True)


def weights_hash(modules: Iterable[nn.Module], extra: str = "") -> str:
    """sha256 over names, shapes and values of all weights, the same for every file format and location.

    Values are hashed as loaded (fp32), so an fp16 file and its fp32 copy are the same model.
    """
    digest = hashlib.sha256(extra.encode())
    for module in modules:
        for name, tensor in sorted(module.state_dict().items()):
            digest.update(f"{name}:{tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= 300 else text[:297] + "..."
