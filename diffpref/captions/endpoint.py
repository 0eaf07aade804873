"""A client of OpenAI-compatible chat endpoints: many requests at a time, and none is paid for twice."""

from __future__ import annotations

import logging
import os
import random
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from diffpref.captions.exchange import Fatal, Reply, Transient, exchange, open_session, reach
from diffpref.captions.journal import Journal, request_key
from diffpref.errors import UserError

log = logging.getLogger("diffpref")
_FIRST_WAIT = 0.5
_LONGEST_WAIT = 60.0
_LONGEST_PAUSE = 600.0
_QUIET = 30.0
"""Seconds between two messages about trouble."""


@dataclass(frozen=True)
class Access:
    """Where and how to ask.

    url: of the API, with or without /chat/completions. key_env: environment variable of the key, "" for
    none. concurrency: requests under way at a time. timeout: seconds for a whole answer. retries: further
    tries of a request. journal: folder of answers, "" for none. asker: "captioner" or "perturber"; that the
    server answers one shows nothing of the other.
    """

    url: str
    key_env: str
    concurrency: int
    timeout: float
    retries: int
    journal: str
    asker: str

    @property
    def address(self) -> str:
        """Where requests go. Raises UserError for an address that cannot be one."""
        try:
            parts = urlsplit(self.url)
            fits = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        except ValueError:
            fits = False
        if not fits:
            raise UserError(
                f"{self.url!r} is no address of an API", fix="write it like http://localhost:8000/v1"
            )
        if parts.username or parts.password or parts.query or parts.fragment:
            raise UserError(
                "the address of the API holds more than host and path",
                why="user names, keys and queries in it would be stored with the captions",
                fix="put the key into an environment variable and name it in api_key_env",
            )
        path = self.url.rstrip("/")
        return path if path.endswith("/chat/completions") else f"{path}/chat/completions"

    def key(self) -> str:
        """The key from the environment. Raises UserError, which never shows it."""
        if not self.key_env:
            return ""
        key = os.environ.get(self.key_env, "").strip()
        if not key:
            raise UserError(
                f"the environment variable {self.key_env} is empty",
                why="api_key_env names it as the holder of the key",
                fix=f"export {self.key_env}=...",
            )
        if not key.isascii() or not key.isprintable() or " " in key:
            raise UserError(
                f"the environment variable {self.key_env} holds no key",
                why="there are blanks, line ends or letters in it that no key has",
                fix="check how it was set",
            )
        return key


@lru_cache(maxsize=4)
def endpoint(access: Access) -> Endpoint:
    """The client for `access`, one a process."""
    return Endpoint(access)


class Endpoint:
    """Asks the questions of a batch, each distinct one once, and not at all where the journal has the answer.

    A reply that fails for one question alone is a failure; what fails for all is a UserError once the
    requests under way have ended, and their answers are in the journal by then.
    """

    def __init__(self, access: Access) -> None:
        self.access = access
        self.address = access.address
        self.journal = Journal(Path(access.journal).expanduser()) if access.journal else None
        self._session = open_session(access.concurrency)
        self._lock = threading.Lock()
        self._pool = ThreadPoolExecutor(access.concurrency, thread_name_prefix="endpoint")
        self._not_before = self._next_message = 0.0
        self._answers = self._failures = 0  # failures in a row
        self._check: Callable[[], None] | None = None

    def before_first_request(self, check: Callable[[], None] | None) -> None:
        """Reach the server and call `check`, once, before anything is asked that costs something: whether the
        rest that the work needs is there."""
        self._check = check

    def reach(self) -> None:
        """Raise UserError unless the server answers, after as many tries as a request gets; costs nothing."""
        stop = threading.Event()
        try:
            for attempt in range(self.access.retries + 1):
                try:
                    reach(self._session, self.address, self.access.key(), self.access.timeout)
                    return
                except Transient as problem:
                    trouble = problem
                    if attempt < self.access.retries:
                        self._back_off(attempt, trouble, stop)
            raise self._silence(trouble)
        except Fatal as error:
            raise UserError(error.what, why=error.why, fix=error.fix) from None

    def ask(self, bodies: Iterable[dict[str, Any]], without: Callable[[Sequence[str]], str]) -> list[Reply]:
        """The reply to each request body, which is sent while the next is being made. Raises UserError.

        without: how to ask without fields that the server does not take, for its message.
        """
        key = self.access.key()
        keys: list[str] = []
        replies: dict[str, Reply] = {}
        futures: dict[str, Future[Reply]] = {}
        stop = threading.Event()
        try:
            for body in bodies:
                name = request_key(body)
                keys.append(name)
                kept = self.journal.get(name) if self.journal and name not in futures else None
                if kept is not None:
                    replies[name] = Reply(kept)
                    self._answers += 1
                elif name not in futures:
                    self._run_check()
                    futures[name] = self._pool.submit(self._settle, name, body, key, stop)
                if stop.is_set():
                    break
            wait(futures.values(), return_when=FIRST_EXCEPTION)
        finally:  # an interrupt from the keyboard, too, waits for what has been paid for
            stop.set()
            for future in futures.values():
                future.cancel()
            wait(futures.values())
            if self.journal:
                self.journal.flush()
        self._raise_first(futures.values(), without)
        replies |= {name: future.result() for name, future in futures.items()}
        return [replies[name] for name in keys]

    def _run_check(self) -> None:
        check, self._check = self._check, None
        if check is not None:
            self.reach()  # first, since a check may load a large model
            check()

    def _raise_first(self, futures: Iterable[Future[Reply]], without: Callable[[Sequence[str]], str]) -> None:
        """Raise what ended the run, with a word on what is kept."""
        errors = [found for future in futures if not future.cancelled() and (found := future.exception())]
        for error in errors:
            if isinstance(error, Fatal):
                kept = "there is no journal: the answers of this batch are lost"
                if self.journal:
                    count, folder = self.journal.count(), self.journal.folder
                    kept = f"then run it again: {count} answers are kept in {folder}"
                remedy = without(error.fields) if error.fields else error.fix
                fix = f"{remedy}; {kept}" if remedy else kept
                raise UserError(error.what, why=error.why, fix=fix) from None
        for error in errors:
            if not isinstance(error, _Stopped):
                raise error

    def _settle(self, name: str, body: dict[str, Any], key: str, stop: threading.Event) -> Reply:
        """The reply to one request, after as many tries as it takes."""
        try:
            return self._tried(name, body, key, stop)
        except BaseException:
            stop.set()
            raise

    def _tried(self, name: str, body: dict[str, Any], key: str, stop: threading.Event) -> Reply:
        before = self._answers
        for attempt in range(self.access.retries + 1):
            _pause(self._not_before - time.monotonic(), stop)
            try:
                reply = exchange(self._session, self.address, body, key, self.access.timeout)
            except Transient as problem:
                trouble = problem
                if attempt < self.access.retries:
                    self._back_off(attempt, trouble, stop)
                continue
            if reply.failure:
                return self._failed(reply, always=self._answers == 0)
            if self.journal:
                self.journal.add(name, reply.text)
            with self._lock:
                self._answers += 1
                self._failures = 0
            return reply
        reply = Reply("", f"no usable answer after {self.access.retries + 1} tries: {trouble}")
        if self._answers == before and not trouble.of_request:
            raise self._silence(trouble)
        return self._failed(reply, always=self._answers == before)

    def _silence(self, trouble: Transient) -> Fatal:
        return Fatal(
            f"the server at {self.address} does not answer",
            f"{trouble} ({self.access.retries + 1} tries)",
            "check that it runs and is reached from here",
        )

    def _failed(self, reply: Reply, always: bool) -> Reply:
        """Count a failure. always: there has been no answer that shows that others succeed."""
        with self._lock:
            self._failures += 1
            failures = self._failures
        if always and failures >= max(8, 2 * self.access.concurrency):
            raise Fatal(
                f"the server at {self.address} answers no request",
                f"{failures} in a row failed, the last: {reply.failure}",
                "check model, template and extra",
            )
        return reply

    def _back_off(self, attempt: int, trouble: Transient, stop: threading.Event) -> None:
        """Wait before the next try: twice as long each time, or as long as the server asks of all."""
        delay = min(_LONGEST_WAIT, _FIRST_WAIT * 2**attempt) * (0.5 + random.random())
        asked = min(_LONGEST_PAUSE, trouble.retry_after)
        with self._lock:
            self._not_before = max(self._not_before, time.monotonic() + asked if asked else 0.0)
            speak = time.monotonic() >= self._next_message
            if speak:
                self._next_message = time.monotonic() + _QUIET
        if speak:
            log.warning("%s: %s; trying again in %.1f s", self.address, trouble, max(delay, asked))
        _pause(max(delay, asked), stop)


def _pause(seconds: float, stop: threading.Event) -> None:
    """Wait, unless the batch is ending: then raise _Stopped."""
    if stop.wait(max(0.0, seconds)):
        raise _Stopped


class _Stopped(Exception):
    """Another request has ended the run."""
