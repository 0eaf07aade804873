"""Captions and perturbed captions by a model behind an OpenAI-compatible HTTP endpoint: vLLM, hosted ones."""

from __future__ import annotations

import base64
import io
import json
import shlex
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from diffpref.captions import answers, options
from diffpref.captions.base import Captioned, Level, Perturbed, Provenance, require_rows
from diffpref.captions.templates import Template, instruction, read_template, shipped_template
from diffpref.config.schema import option
from diffpref.errors import UserError
from diffpref.seeds import pair_seed

if TYPE_CHECKING:
    from PIL.Image import Image

    from diffpref.captions.endpoint import Endpoint
    from diffpref.captions.exchange import Reply

_JPEG_QUALITY = 90
_OURS = ("messages", "model", "n", "stream")
_DEFAULTS = ("temperature", "max_tokens", "seed")


def _url() -> Any:
    return option(help="address of the API, such as http://localhost:8000/v1")


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
        help="further tries after an overload or an error of server or connection, after growing waits",
    )


def _extra() -> Any:
    return option(
        "",
        help="further fields of each request as a JSON object, such as "
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
    max_tokens: int = options.max_tokens_option()
    max_new_tokens: int = options.new_tokens_option(256)
    temperature: float = options.temperature_option(0.0)
    image_format: str = option("jpeg", choices=("jpeg", "png"), help="how images are sent")
    detail: str = option(
        "",
        choices=("", "auto", "low", "high"),
        help="how closely the server looks at an image, which decides what it costs; empty: its own default",
    )
    max_side: int = option(
        1024,
        bounds="[16, inf)",
        help="larger images are sent smaller, with this many pixels on the longer side",
    )
    concurrency: int = _concurrency()
    timeout: float = _timeout()
    retries: int = _retries()
    extra: str = _extra()
    journal: str = _journal()
    seed: int = options.seed_option()

    def __post_init__(self) -> None:
        options.require_valid(self, "captioner")
        _check(self)
        options.require_asked(self.max_tokens, self._template)

    def __call__(
        self, images: Sequence[Image], prompts: Sequence[str], rows: Sequence[int]
    ) -> list[Captioned]:
        """A caption of each image. Raises UserError where the server answers nothing at all."""
        if not len(images) == len(prompts) == len(rows):
            raise ValueError(f"{len(images)} images, {len(prompts)} prompts and {len(rows)} rows")
        results = [Captioned("", options.too_long(prompt)) for prompt in prompts]
        asked = [i for i, result in enumerate(results) if not result.failure]
        bodies = (_body(self, self._content(images[i], prompts[i]), "caption", rows[i]) for i in asked)
        for i, reply in zip(asked, _replies(self, "captioner", bodies) if asked else (), strict=True):
            results[i] = Captioned("", reply.failure) if reply.failure else answers.captioned(reply.text)
        return results

    def provenance(self) -> Provenance:
        """The model as the server calls it; a server tells no revision."""
        return Provenance("http", self.model, template=self._template.digest, seed=self.seed)

    def before_first_request(self, check: Callable[[], None] | None) -> None:
        """Call `check` before anything is asked that costs something; it raises UserError."""
        _endpoint(self, "captioner").before_first_request(check)

    def _content(self, image: Image, prompt: str) -> list[dict[str, Any]]:
        text = self._template.fill(prompt=prompt, tokens=self.max_tokens)
        picture = {"url": _data_url(image, self.image_format, self.max_side)}
        if self.detail:
            picture["detail"] = self.detail
        return [{"type": "image_url", "image_url": picture}, {"type": "text", "text": text}]

    @cached_property
    def _template(self) -> Template:
        names = ("prompt", "tokens")
        return read_template(self.template, names) if self.template else shipped_template("caption", names)


@dataclass(frozen=True, kw_only=True)
class HttpPerturber:
    """A language model behind an HTTP endpoint, told to rewrite the caption."""

    level: Level = options.level_option()
    url: str = _url()
    model: str = _model()
    api_key_env: str = _api_key_env()
    template: str = options.instruction_option()
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
        _check(self)
        _ = self._template

    def __call__(self, captions: Sequence[str], rows: Sequence[int]) -> list[Perturbed]:
        """A rewritten version of each caption. Raises UserError where the server answers nothing at all."""
        require_rows(captions, rows)
        results = [Perturbed(caption, False, failure=options.too_long(caption)) for caption in captions]
        asked = [
            i for i, caption in enumerate(captions) if options.has_words(caption) and not results[i].failure
        ]
        bodies = (
            _body(self, self._template.fill(caption=captions[i], level=self.level), "perturb", rows[i])
            for i in asked
        )
        for i, reply in zip(asked, _replies(self, "perturber", bodies) if asked else (), strict=True):
            results[i] = (
                Perturbed(captions[i], False, failure=reply.failure)
                if reply.failure
                else answers.perturbed(reply.text, captions[i])
            )
        return results

    def provenance(self) -> Provenance:
        """The model as the server calls it; a server tells no revision."""
        return Provenance(
            "http", self.model, template=self._template.digest, seed=self.seed, level=self.level
        )

    def reach(self) -> None:
        """Raise UserError unless the server answers; asks for nothing that costs something."""
        _endpoint(self, "perturber").reach()

    @cached_property
    def _template(self) -> Template:
        return instruction(self.template, self.level)


def _endpoint(settings: HttpCaptioner | HttpPerturber, kind: str) -> Endpoint:
    from diffpref.captions.endpoint import Access, endpoint

    return endpoint(
        Access(
            settings.url,
            settings.api_key_env,
            settings.concurrency,
            settings.timeout,
            settings.retries,
            settings.journal,
            kind,
        )
    )


def _replies(
    settings: HttpCaptioner | HttpPerturber, kind: str, bodies: Iterable[dict[str, Any]]
) -> list[Reply]:
    """The server's replies. kind: "captioner" or "perturber", for its message on fields that it refuses."""

    def without(refused: Sequence[str]) -> str:
        fields = {name: value for name, value in _extra_fields(settings.extra).items() if name not in refused}
        fields |= {name: None for name in _DEFAULTS if name in refused}
        if "max_tokens" in refused and "max_completion_tokens" not in refused:
            fields = {**fields, "max_completion_tokens": settings.max_new_tokens}
        text = shlex.quote(json.dumps(fields))
        return f"give --{kind}.extra {text}" if fields else f"leave out --{kind}.extra"

    return _endpoint(settings, kind).ask(bodies, without)


def _check(settings: HttpCaptioner | HttpPerturber) -> None:
    """Raise UserError for an address, key or extra fields that cannot be right."""
    from diffpref.captions.endpoint import Access

    access = Access(settings.url, settings.api_key_env, 1, 1.0, 0, "", "")
    _ = access.address
    access.key()
    _extra_fields(settings.extra)
    if not settings.model.strip():
        raise UserError("the model has no name", fix="give the name that the server lists under /v1/models")


def _body(
    settings: HttpCaptioner | HttpPerturber, content: str | list[dict[str, Any]], purpose: str, row: int
) -> dict[str, Any]:
    """The request. Where tokens are drawn the row is part of its seed; equal requests are sent once."""
    seed = settings.seed
    if settings.temperature > 0:
        seed = pair_seed(settings.seed, purpose, 0, row) >> 33
    body = {
        "model": settings.model,
        "messages": [{"role": "user", "content": content}],
        "temperature": settings.temperature,
        "max_tokens": settings.max_new_tokens,
        "seed": seed,
        **_extra_fields(settings.extra),
    }
    return {name: value for name, value in body.items() if value is not None}


def _extra_fields(text: str) -> dict[str, Any]:
    if not text:
        return {}
    try:
        fields = json.loads(text)
    except ValueError as error:
        raise UserError(
            f"extra = {text!r} is no JSON", why=str(error), fix="""write it as '{"a": 1}'"""
        ) from None
    if not isinstance(fields, dict):
        raise UserError(f"extra = {text!r} is no JSON object", fix="""write it as '{"a": 1}'""")
    for name in _OURS:
        if name in fields:
            raise UserError(f"extra cannot set {name!r}", why="diffpref sets it itself", fix="leave it out")
    return fields


def _data_url(image: Image, form: str, max_side: int) -> str:
    from PIL.Image import Resampling

    picture = image.convert("RGB")
    picture.thumbnail((max_side, max_side), Resampling.LANCZOS)
    stream = io.BytesIO()
    picture.save(stream, form.upper(), **({"quality": _JPEG_QUALITY} if form == "jpeg" else {}))
    return f"data:image/{form};base64,{base64.b64encode(stream.getvalue()).decode()}"
