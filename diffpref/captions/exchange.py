"""One request to a chat endpoint and what its answer means. The key goes into a header and nowhere else."""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from http.cookiejar import DefaultCookiePolicy
from typing import Any, NamedTuple

import requests
from urllib3.exceptions import HTTPError, ReadTimeoutError

from diffpref.captions.answers import cut_short
from diffpref.captions.refusals import refused_fields

_LARGEST = 4 << 20
"""Bytes of an answer: a caption has a few hundred."""


_PATIENCE = 20.0
"""Seconds for a list of models."""


class Reply(NamedTuple):
    """The text of an answer, or why there is none for this question: exactly one of the two is empty."""

    text: str
    failure: str = ""


class Transient(Exception):
    """May succeed when tried again.

    retry_after: seconds that the server asks to wait. of_request: whether this request may be the cause,
    where another would succeed.
    """

    def __init__(self, message: str, retry_after: float = 0.0, of_request: bool = False) -> None:
        super().__init__(message)
        self.retry_after, self.of_request = retry_after, of_request


class Fatal(Exception):
    """Concerns every request. fields: those of the request that the server does not take."""

    def __init__(self, what: str, why: str, fix: str = "", fields: Sequence[str] = ()) -> None:
        super().__init__(what)
        self.what, self.why, self.fix, self.fields = what, why, fix, fields


def open_session(connections: int) -> requests.Session:
    """A session that threads may share: it keeps no cookies."""
    session = requests.Session()
    session.cookies.set_policy(DefaultCookiePolicy(allowed_domains=[]))
    for scheme in ("http://", "https://"):
        session.mount(scheme, requests.adapters.HTTPAdapter(pool_maxsize=connections))
    return session


def exchange(
    session: requests.Session, address: str, body: dict[str, Any], key: str, timeout: float
) -> Reply:
    """Send one request and read its answer within `timeout` seconds. Raises Transient or Fatal."""
    hidden = _without(key)
    response, answer = _answered(session, address, body, key, timeout)
    return _judge(response, answer, hidden, address, body)


def reach(session: requests.Session, address: str, key: str, timeout: float) -> None:
    """Raise Transient unless a server is there, whatever it answers, Fatal where it does not know the key.

    It is asked for its models, which costs nothing. A key may be good for answers and not for that list.
    """
    models = f"{address.removesuffix('/chat/completions')}/models"
    try:
        response, answer = _answered(session, models, None, key, min(timeout, _PATIENCE))
    except Transient as trouble:
        if trouble.of_request:  # it took the connection: there may be no such list
            return
        raise
    message = _message(answer)
    if response.status_code == 401 and not re.search("scope|permission", message, re.IGNORECASE):
        raise _no_access(address, _short(_without(key)(f"HTTP 401: {message or response.reason}")))


def _without(key: str) -> Callable[[str], str]:
    """What hides the key in a text, before anything is cut off, which could leave half of it."""
    return lambda text: text.replace(key, "[key]") if key else text


def _answered(
    session: requests.Session, address: str, body: dict[str, Any] | None, key: str, timeout: float
) -> tuple[requests.Response, Any]:
    """The response to a request and its JSON, None where it is none. Raises Transient or Fatal."""
    hidden = _without(key)
    try:
        response, content = _send(session, address, body, key, timeout)
    except requests.exceptions.SSLError as error:
        raise Fatal(
            f"no safe connection to {address}", _short(hidden(str(error))), "check the address"
        ) from None
    except (requests.Timeout, ReadTimeoutError, TimeoutError) as error:
        connected = not isinstance(error, requests.ConnectTimeout)
        raise Transient(f"no answer within {timeout:g} s", of_request=connected) from None
    except (requests.RequestException, HTTPError) as error:
        cause = _short(hidden(_cause(error)))
        raise Transient(f"the connection failed ({type(error).__name__}: {cause})") from None
    try:
        answer = json.loads(content)
    except (ValueError, RecursionError):
        answer = None
    if isinstance(answer, list) and len(answer) == 1:  # as Google sends errors
        answer = answer[0]
    return response, answer


def _send(
    session: requests.Session, address: str, body: dict[str, Any] | None, key: str, timeout: float
) -> tuple[requests.Response, bytes]:
    """The response and its content; a body is posted. Raises TimeoutError past the deadline, and what
    requests does."""
    deadline = time.monotonic() + timeout

    def authorize(request: requests.PreparedRequest) -> requests.PreparedRequest:
        # given as `auth`, so that requests does not put what a .netrc holds in its place
        if key:
            request.headers["Authorization"] = f"Bearer {key}"
        return request

    with session.request(
        "GET" if body is None else "POST",
        address,
        data=None if body is None else json.dumps(body).encode(),
        headers={"Content-Type": "application/json", "Accept-Encoding": "identity"},
        auth=authorize,
        timeout=timeout,
        allow_redirects=False,
        stream=True,
    ) as response:
        content = b""
        while part := response.raw.read1(1 << 16, decode_content=True):  # what has come, however little
            content += part
            if time.monotonic() > deadline:  # a server that sends a blank now and then
                raise TimeoutError
            if len(content) > _LARGEST:
                raise Transient("the answer has no end", of_request=True)
        return response, content


def _judge(
    response: requests.Response,
    answer: Any,
    hidden: Callable[[str], str],
    address: str,
    body: dict[str, Any],
) -> Reply:
    """The reply in an answer. Raises Transient or Fatal."""
    status = response.status_code
    if status == 200 and isinstance(answer, dict) and answer.get("error") and not answer.get("choices"):
        status = _inner_status(answer)  # gateways wrap errors of the model's host
    if status == 200:
        return _read(answer, hidden)
    why = _short(hidden(f"HTTP {status}: {_message(answer) or response.reason}"))
    fields = [name for name in body if name not in ("model", "messages")]
    if status in (400, 404, 422, 500, 501) and (refused := refused_fields(answer, fields)):
        raise Fatal(f"{address} does not take {' and '.join(refused)}", why, fields=refused)
    if status in (400, 413, 422):
        return Reply("", why)
    if status == 429 and "insufficient_quota" in json.dumps(answer):
        raise Fatal(f"{address} wants to be paid", why, "check the account")
    if status in (408, 409, 425, 429, 500) or 502 <= status <= 504 or status > 505:
        asked = _seconds(response.headers.get("Retry-After", ""))
        raise Transient(why, retry_after=asked, of_request=status in (408, 500, 504))
    if status in (401, 402, 403):
        raise _no_access(address, why)
    if 300 <= status < 400:
        target = _short(hidden(response.headers.get("Location", "another address")))
        raise Fatal(f"{address} has moved", f"HTTP {status} to {target}", "give the new address as url")
    raise Fatal(
        f"{address} does not take the request",
        why,
        f"check url, which mostly ends in /v1, and model, which is {str(body.get('model'))!r}",
    )


def _no_access(address: str, why: str) -> Fatal:
    return Fatal(f"{address} refuses the request", why, "check api_key_env, the key in it and the account")


def _read(answer: Any, hidden: Callable[[str], str]) -> Reply:
    """The reply in a whole answer. Raises Transient for one that is not in the form of the API."""
    try:
        choice = answer["choices"][0]
        message, reason = choice["message"], choice.get("finish_reason")
        content = message.get("content")
        if isinstance(content, list):
            content = "".join(part.get("text", "") for part in content)
        if not isinstance(content, str | None):
            raise TypeError
        refusal = message.get("refusal")
    except (TypeError, KeyError, IndexError, AttributeError):
        raise Transient("the answer is not in the form of the API", of_request=True) from None
    if reason == "content_filter" or refusal:
        return Reply("", f"refused: {_short(hidden(str(refusal or 'content filter')))}")
    text = hidden(content or "").encode(errors="replace").decode()
    if reason == "length":
        text = cut_short(text)
    return (
        Reply(text)
        if text.strip()
        else Reply("", f"the answer is empty (finish_reason {hidden(repr(reason)):.40})")
    )


def _inner_status(answer: dict[str, Any]) -> int:
    error = answer["error"]
    code = error.get("code") if isinstance(error, dict) else None
    return code if isinstance(code, int) and 400 <= code < 600 else 500


def _message(answer: Any) -> str:
    """What the server says about an error."""
    error = answer.get("error", answer) if isinstance(answer, dict) else ""
    if isinstance(error, dict):
        error = error.get("message") or error.get("detail") or error
    return str(error or "")


def _seconds(header: str) -> float:
    """Seconds that a Retry-After asks for, a number or a date; 0 where it makes no sense."""
    try:
        value = float(header)
    except ValueError:
        try:
            value = (parsedate_to_datetime(header) - datetime.now(UTC)).total_seconds()
        except (ValueError, TypeError):
            return 0.0
    return max(0.0, value) if math.isfinite(value) else 0.0


def _cause(error: BaseException) -> str:
    """The innermost message: requests wraps what happened several times."""
    while (inner := error.__cause__ or error.__context__) is not None:
        error = inner
    return str(error).strip() or type(error).__name__


def _short(text: str) -> str:
    """One line of at most 300 characters, without what would control a terminal."""
    text = " ".join("".join(sign if sign.isprintable() else " " for sign in text).split())
    return text if len(text) <= 300 else f"{text[:297]}..."
