"""Captions and perturbed captions by a model behind an OpenAI-compatible HTTP endpoint: vLLM, hosted ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from diffpref.captions import options
from diffpref.captions.base import Captioned, Level, Perturbed, Provenance
from diffpref.config.schema import option

if TYPE_CHECKING:
    from PIL.Image import Image


def _url() -> Any:
    return option(help="address of the API, such as http://localhost:8000/v1 or https://api.openai.com/v1")


def _model() -> Any:
    return option(help="name of the model at the server")


def _api_key_env() -> Any:
    return option("", help="name of the environment variable that holds the key; empty: none is sent")


def _concurrency() -> Any:
    return option(8, bounds="[1, 1024]", help="requests under way at a time, in each process")


def _timeout() -> Any:
    return option(120.0, bounds="(0, inf)", help="seconds that an answer may take")


def _retries() -> Any:
    return option(
        10,
        bounds="[0, inf)",
        help="further tries after an overload, an error of the server or of the connection, each after twice the wait",
    )


def _extra() -> Any:
    return option(
        "",
        help="further fields of the request as a JSON object, such as "
        """'{"chat_template_kwargs": {"enable_thinking": false}}'; null takes a field out""",
    )


def _journal() -> Any:
    return option("", help="folder that keeps every answer, so that none is paid for twice; empty: none")


@dataclass(frozen=True, kw_only=True)
class HttpCaptioner:
    """A vision-language model behind an HTTP endpoint."""

    url: str = _url()
    model: str = _model()
    api_key_env: str = _api_key_env()
    template: str = option(
        "", help="file with the instruction ({prompt}, {tokens}); empty: the one that ships with diffpref"
    )
    max_tokens: int = option(
        60,
        bounds="[1, inf)",
        help="length asked for, in tokens of the text encoder that will read the caption",
    )
    max_new_tokens: int = options.new_tokens_option(256)
    temperature: float = options.temperature_option(0.0)
    image_format: str = option("jpeg", choices=("jpeg", "png"), help="how images are sent")
    max_side: int = option(
        1024, bounds="[16, inf)", help="images are made smaller until no side has more pixels than this"
    )
    concurrency: int = _concurrency()
    timeout: float = _timeout()
    retries: int = _retries()
    extra: str = _extra()
    journal: str = _journal()
    seed: int = options.seed_option()

    def __post_init__(self) -> None:
        options.require_valid(self, "captioner")

    def __call__(
        self, images: Sequence[Image], prompts: Sequence[str], rows: Sequence[int]
    ) -> list[Captioned]:
        raise NotImplementedError

    def provenance(self) -> Provenance:
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class HttpPerturber:
    """A language model behind an HTTP endpoint, told to rewrite the caption."""

    level: Level = options.level_option()
    url: str = _url()
    model: str = _model()
    api_key_env: str = _api_key_env()
    template: str = option(
        "",
        help="file with the instruction ({caption}, {level}); {level} in its name picks a file for each level; "
        "empty: the ones that ship with diffpref",
    )
    max_new_tokens: int = options.new_tokens_option(256)
    temperature: float = options.temperature_option(0.7)
    concurrency: int = _concurrency()
    timeout: float = _timeout()
    retries: int = _retries()
    extra: str = _extra()
    journal: str = _journal()
    seed: int = options.seed_option()

    def __post_init__(self) -> None:
        options.require_valid(self, "perturber")

    def __call__(self, captions: Sequence[str], rows: Sequence[int]) -> list[Perturbed]:
        raise NotImplementedError

    def provenance(self) -> Provenance:
        raise NotImplementedError
