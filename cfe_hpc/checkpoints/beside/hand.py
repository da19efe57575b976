"""A thread that does one thing after the other, and is there already when it is asked to."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from typing import TypeVar

__all__ = ["Hand"]

Result = TypeVar("Result")


class Hand:
    """The thread. It starts with the first thing to do: to start one takes milliseconds when cores are busy, for who
    starts it waits until it runs, and then for the interpreter. It ends with its process, whatever it does."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._asked: SimpleQueue[tuple[Callable[[], None], threading.Event] | None] = SimpleQueue()
        self._thread: threading.Thread | None = None

    def do(self, act: Callable[[], None]) -> threading.Event:
        """Have `act` done; what is returned is set when it is, or has raised."""
        if self._thread is None or not self._thread.is_alive():
            self._thread = threading.Thread(target=self._work, name=self._name, daemon=True)
            self._thread.start()
        done = threading.Event()
        self._asked.put((act, done))
        return done

    def submit(self, act: Callable[[], Result]) -> Future[Result]:
        """Have `act` done; what it returns, or raises, as a future."""
        future: Future[Result] = Future()

        def acting() -> None:
            try:
                future.set_result(act())
            except Exception as error:
                future.set_exception(error)

        self.do(acting)
        return future

    def _work(self) -> None:
        while (asked := self._asked.get()) is not None:
            act, done = asked
            try:
                act()
            finally:
                done.set()
            del asked, act, done  # and with them what was saved

    def close(self) -> None:
        """End the thread when it has done what it was asked to."""
        if self._thread is not None:
            self._asked.put(None)
            self._thread.join()
            self._thread = None
