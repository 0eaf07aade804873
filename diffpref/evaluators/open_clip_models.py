"""CLIP networks of open_clip. The package is imported on use only: the core does without it."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from diffpref.errors import UserError, nearest
from diffpref.evaluators.base import Runtime
from diffpref.evaluators.checkpoints import load_state, one_line, read_state, weights_hash
from diffpref.evaluators.clip import DTYPES, Network, Tokens
from diffpref.evaluators.pixels import Fit, Pixels
from diffpref.evaluators.texts import EVAL_EXTRA
from diffpref.paths import resolve
from diffpref.suites import name_hint
from diffpref.torchvision_ops import mend_torchvision

CONFIG = "open_clip_config.json"
_FITS: dict[str, Fit] = {"shortest": "crop, round", "squash": "squash"}


def import_open_clip() -> Any:
    """The module open_clip.

    Raises:
        UserError: it, or torchvision that it needs, is missing or broken.
    """
    try:
        mend_torchvision()
        import open_clip
    except (
        Exception
    ) as error:  # ImportError; RuntimeError and AttributeError of a torchvision that does not fit
        missing = isinstance(error, ModuleNotFoundError)
        raise UserError(
            "this evaluator needs open_clip",
            why=one_line(error) if missing else f"it cannot be imported: {one_line(error)}",
            fix=EVAL_EXTRA if missing else f"{EVAL_EXTRA}, with a torchvision made for your torch",
        ) from error
    return open_clip


@dataclass(frozen=True)
class OpenClipText:
    """Tokens of open_clip's tokenizer: always at full length, the end token kept when a text is cut."""

    tokenizer: Any
    context: int

    def __call__(self, text: str) -> Tokens:
        ids = self.tokenizer([text], context_length=self.context)[0].tolist()
        return Tokens(tuple(ids), max(0, self._uncut(text) - self.context))

    def describe(self) -> dict[str, Any]:
        return {"tokenizer": f"open_clip {type(self.tokenizer).__name__}", "limit": self.context}

    def _uncut(self, text: str) -> int:
        if not hasattr(self.tokenizer, "encode"):  # a wrapper around one of transformers
            return len(self.tokenizer.tokenizer(self.tokenizer.clean_fn(text))["input_ids"])
        return len(self.tokenizer.encode(text)) + 2


def load_open_clip_network(spec: str, device: torch.device, runtime: Runtime) -> Network:
    """A network of open_clip.

    Args:
        spec: ``ARCHITECTURE/TAG`` of its list (``ViT-H-14/laion2b_s32b_b79k``; fetched, or from the cache),
            ``ARCHITECTURE/FILE`` with the path of a checkpoint, ``hf-hub:ORG/NAME``, or a folder that holds
            ``open_clip_config.json``.

    Raises:
        UserError: open_clip is missing; there is no such architecture, tag or file; weights do not fit.
    """
    place = resolve(spec)
    if isinstance(place, Path) and (place / CONFIG).is_file():
        return load_open_clip_file(_weights_in(place), "", device, runtime)
    open_clip = import_open_clip()
    if spec.startswith("hf-hub:"):
        return open_clip_network(_create(spec), open_clip.get_tokenizer(spec), device, runtime)
    architecture, _, weights = spec.partition("/")
    _check_architecture(architecture)
    tags = open_clip.list_pretrained_tags_by_model(architecture)
    if weights in tags:
        # Networks trained with the quick form of GELU are silently wrong with the exact one.
        quick = bool(open_clip.get_pretrained_cfg(architecture, weights).get("quick_gelu"))
        model = _create(architecture, pretrained=weights, force_quick_gelu=quick)
        return open_clip_network(model, open_clip.get_tokenizer(architecture), device, runtime)
    if not Path(weights).expanduser().is_file():
        raise UserError(
            f"open_clip has no weights {weights!r} for {architecture}",
            why="it is neither one of its tags nor a file",
            fix=name_hint(weights, tags),
        )
    return load_open_clip_file(Path(weights).expanduser(), architecture, device, runtime)


def load_open_clip_file(path: Path, architecture: str, device: torch.device, runtime: Runtime) -> Network:
    """A network from a checkpoint file, its names and shapes checked.

    The architecture is the one that ``open_clip_config.json`` beside the file describes, if it is there.
    """
    open_clip = import_open_clip()
    described = (path.parent / CONFIG).is_file()
    name = f"local-dir:{path.parent}" if described else architecture
    if not described:
        _check_architecture(architecture)
    model = _create(name, load_weights=False, pretrained_text=False)
    expected = f"the weights of open_clip's {architecture}"
    if described:
        expected = f"the weights of the network in {path.parent / CONFIG}"
    load_state(model, read_state(path), str(path), expected)
    return open_clip_network(model, open_clip.get_tokenizer(name), device, runtime)


def open_clip_network(
    model: Any, tokenizer: Any, device: torch.device, runtime: Runtime, weights: str = ""
) -> Network:
    """The network of an open_clip model in memory, which is moved and cast in place.

    weights: what fingerprints say of its values; "" for their hash.
    """
    pixels = _pixels(import_open_clip().get_model_preprocess_cfg(model))
    model.eval().requires_grad_(False)
    digest, logit_scale = weights or weights_hash(model), float(model.logit_scale.detach().float().exp())
    model.to(device, DTYPES[runtime.dtype])
    context = int(model.context_length)
    with torch.inference_mode():
        probe = model.encode_text(torch.zeros(1, context, dtype=torch.long, device=device))
    return Network(
        weights=digest,
        device=device,
        dtype=runtime.dtype,
        pixels=pixels,
        text=OpenClipText(tokenizer, context),
        encode_images=model.encode_image,
        encode_texts=model.encode_text,
        context=context,
        pad=None,
        width=int(probe.shape[-1]),
        logit_scale=logit_scale,
    )


def _create(name: str, **options: Any) -> Any:
    open_clip = import_open_clip()
    earlier = logging.root.manager.disable
    logging.disable(logging.WARNING)  # it warns about weights that are loaded a moment later
    try:
        return open_clip.create_model(name, **options)
    except Exception as error:  # RuntimeError, ValueError, errors of the hub and the file system
        raise UserError(
            f"open_clip cannot load {name}",
            why=f"{type(error).__name__}: {one_line(error)}",
            fix="check the spelling and the network, or give a local folder or file",
        ) from error
    finally:
        logging.disable(earlier)


def _check_architecture(name: str) -> None:
    known = import_open_clip().list_models()
    if name not in known:
        close = nearest(name, known)
        raise UserError(
            f"open_clip has no architecture {name!r}",
            fix=f"did you mean {close!r}?"
            if close
            else "weights are named open_clip:ARCHITECTURE/TAG, such as open_clip:ViT-H-14/laion2b_s32b_b79k",
        )


def _weights_in(folder: Path) -> Path:
    for name in ("open_clip_model.safetensors", "open_clip_pytorch_model.bin"):
        if (folder / name).is_file():
            return folder / name
    raise UserError(
        f"{folder} holds no weights",
        why="there is neither open_clip_model.safetensors nor open_clip_pytorch_model.bin",
        fix="fetch the model again",
    )


def _pixels(settings: Mapping[str, Any]) -> Pixels:
    side, mode, resample = settings["size"], settings["resize_mode"], settings["interpolation"]
    sides = {side} if isinstance(side, int) else set(side)
    if len(sides) != 1 or mode not in _FITS or resample not in ("bicubic", "bilinear"):
        raise UserError(
            "this model prepares images in a way that is not supported",
            why=f"size {side}, resize mode {mode!r}, interpolation {resample!r}",
            fix=f"supported are squares, {' and '.join(_FITS)}, bicubic and bilinear",
        )
    mean, std = tuple(settings["mean"]), tuple(settings["std"])
    return Pixels(sides.pop(), _FITS[mode], mean, std, resample, rgb="last")
