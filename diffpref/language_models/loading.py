"""Loading transformers models: once a process, and with a clear message for whatever can be wrong."""

from __future__ import annotations

import contextlib
import hashlib
import logging
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from diffpref.errors import UserError
from diffpref.paths import resolve_or_hub_id, sha256_file
from diffpref.processes import choose_device

if TYPE_CHECKING:
    import torch

log = logging.getLogger("diffpref")
_DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
_CONTENT = (".safetensors", ".bin", ".json", ".txt", ".model", ".jinja")


class Source(NamedTuple):
    """Where a model lies. place: folder or hub id. revision: commit of the hub, or a hash of the folder."""

    place: str
    revision: str
    config: Any

    @property
    def commit(self) -> str | None:
        """What to ask the hub for, so that all parts are of one commit."""
        return None if self.revision.startswith("sha256:") else self.revision or None


@lru_cache(maxsize=8)
def find_source(spec: str, revision: str) -> Source:
    """The config and revision of a folder or hub id. Raises UserError where there is none."""
    from transformers import AutoConfig

    place = resolve_or_hub_id(spec, "model")
    if isinstance(place, Path) and revision:
        raise UserError(f"revision {revision!r} has no effect", why=f"{spec} is a folder", fix="leave it out")
    with user_errors(spec):
        config = AutoConfig.from_pretrained(place, revision=revision or None, trust_remote_code=False)
    if isinstance(place, Path):
        return Source(str(place), folder_hash(place), config)
    return Source(place, getattr(config, "_commit_hash", None) or revision, config)


def folder_hash(folder: Path) -> str:
    """ "sha256:" and 16 hex digits over the names and contents of a model folder's files."""
    digest = hashlib.sha256()
    for file in sorted(folder.iterdir()):
        if file.suffix in _CONTENT and file.is_file():
            digest.update(f"{file.name}:{sha256_file(file)}\n".encode())
    return f"sha256:{digest.hexdigest()[:16]}"


def load_network(kind: str, place: str, commit: str | None, device: str, dtype: str) -> Any:
    """The network for inference. kind: an Auto class of transformers. Raises UserError."""
    import torch
    import transformers

    target = choose_device(None if device == "auto" else device)
    precision = _precision(dtype, target)
    log.info("loading %s on %s in %s", place, target, str(precision).removeprefix("torch."))
    with user_errors(place), quiet():
        network, report = getattr(transformers, kind).from_pretrained(
            place, revision=commit, trust_remote_code=False, dtype=precision,
            output_loading_info=True,
        )  # fmt: skip
    if report["missing_keys"]:
        names = sorted(report["missing_keys"])
        raise UserError(
            f"the model {place} lacks {len(names)} of its weights",
            why=f"{names[0]} and others would be random numbers" if names[1:] else f"{names[0]} is missing",
            fix="fetch the model again, or give one that is meant for this task",
        )
    try:
        return network.eval().to(target)
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"the model {place} does not fit on {target}",
            why=str(error).splitlines()[0],
            fix="take a smaller model or precision, or serve it with vLLM and use the http backend",
        ) from error


@lru_cache(maxsize=4)
def load_processor(kind: str, place: str, commit: str | None) -> Any:
    """The processor or tokenizer. kind: an Auto class of transformers. Raises UserError."""
    import transformers

    with user_errors(place), quiet():
        return getattr(transformers, kind).from_pretrained(place, revision=commit, trust_remote_code=False)


def end_tokens(network: Any, tokenizer: Any) -> frozenset[int]:
    """The tokens that end an answer; where the model has no padding token, the first of them becomes it."""
    settings = network.generation_config
    ends: set[int] = set()
    for found in (settings.eos_token_id, tokenizer.eos_token_id, getattr(tokenizer, "sep_token_id", None)):
        ends.update(found if isinstance(found, list) else [] if found is None else [found])
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if settings.pad_token_id is None:
        settings.pad_token_id = tokenizer.pad_token_id
    return frozenset(ends)


def positions(config: Any) -> int:
    """The tokens that the table of positions of the text model reaches, 0 where it has no such table.

    Past its end a network fails, on a GPU for good.
    """
    text = config.get_text_config()
    if getattr(text, "rope_parameters", None) or getattr(text, "rope_theta", None):
        return 0
    return int(getattr(text, "max_position_embeddings", None) or 0)


def without_special_tokens(text: str, tokenizer: Any) -> str:
    """The text with a space for whatever the model reads as a command: "<image>", "</s>", "<|im_end|>"."""
    for token in sorted(special_tokens(tokenizer), key=len, reverse=True):
        text = text.replace(token, " ")
    return text


def special_tokens(tokenizer: Any) -> set[str]:
    """Texts that the tokenizer reads as control tokens."""
    added = getattr(tokenizer, "added_tokens_decoder", {}).values()
    return {str(token) for token in (*tokenizer.all_special_tokens, *added) if str(token).strip()}


def _precision(name: str, device: str) -> torch.dtype:
    """auto: bf16 where the GPU computes in it, else fp32."""
    import torch

    if name == "auto":
        modern = device.startswith("cuda") and torch.cuda.get_device_capability(device)[0] >= 8
        name = "bf16" if modern else "fp32"
    precision: torch.dtype = getattr(torch, _DTYPES[name])
    return precision


shared_network = lru_cache(maxsize=2)(load_network)
"""`load_network`, once for the same model in one place and precision."""


@contextlib.contextmanager
def user_errors(model: str) -> Iterator[None]:
    """Turn whatever loading raises into a UserError: each library has types of its own."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        text = " ".join(str(error).split())
        raise UserError(
            f"cannot load the model {model}",
            why=f"{type(error).__name__}: {text[:300]}",
            fix=_remedy(text, model),
        ) from error


def _remedy(text: str, model: str) -> str:
    if "trust_remote_code" in text:
        return "diffpref runs no code from model repositories: take a version that transformers itself knows"
    for library in ("sentencepiece", "torchvision", "tiktoken", "protobuf"):
        if library in text.lower():
            return f"pip install {library}" + (" in the build of torch" if library == "torchvision" else "")
    if Path(model).exists():
        return "check the folder, or fetch the model again"
    return f"check the hub id, the network and your access to it, or fetch it before: hf download {model}"


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers' bars and remarks off the screen."""
    from transformers.utils import logging as theirs

    level = theirs.get_verbosity()
    theirs.set_verbosity_error()
    theirs.disable_progress_bar()
    try:
        yield
    finally:
        theirs.set_verbosity(level)
        theirs.enable_progress_bar()


def chunks(order: Sequence[int], sizes: Sequence[object], most: int, equal: bool) -> Iterator[list[int]]:
    """Cut `order` into runs of at most `most` items; equal: of one size each, so that none is padded."""
    run: list[int] = []
    for item in order:
        if run and (len(run) == most or (equal and sizes[item] != sizes[run[0]])):
            yield run
            run = []
        run.append(item)
    if run:
        yield run
