"""An iterator run ahead in a thread."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")
_POLL = 0.1  # seconds after which a thread that waits for room looks whether anyone still wants its items


def ahead(items: Iterable[T], depth: int = 1) -> Iterator[T]:
    """The items in order, each made in a thread while the one before is used; `depth` finished ones wait.

    With the one in use and the one being made, depth + 2 are in memory. An exception of `items` is raised
    where its item would have come. Closing the result ends the thread, and closes `items`.
    """
    finished: queue.Queue[tuple[bool, T | BaseException | None]] = queue.Queue(depth)
    stopped = threading.Event()

    def put(more: bool, value: T | BaseException | None) -> bool:
        while not stopped.is_set():
            try:
                finished.put((more, value), timeout=_POLL)
                return True
            except queue.Full:
                continue
        return False

    def produce() -> None:
        source = iter(items)
        try:
            if all(put(True, item) for item in source):
                put(False, None)
        except BaseException as error:
            put(False, error)
        finally:
            close = getattr(source, "close", None)
            if close is not None:
                close()

    thread = threading.Thread(target=produce, name="ahead", daemon=True)
    thread.start()
    try:
        while True:
            more, value = finished.get()
            if isinstance(value, BaseException) and not more:
                raise value
            if not more:
                return
            yield value  # type: ignore[misc]  # an item, since there is more
    finally:
        stopped.set()
        thread.join()
