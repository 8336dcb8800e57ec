"""SIGTERM and SIGINT as a wish to stop after the step at hand."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any


class _Stopped(BaseException):
    """Ends work that may be left undone; not an `Exception`, which libraries catch."""


class Interrupt:
    """Remembers the first signal; a second one acts at once."""

    def __init__(self):
        self.signal: int | None = None
        self._previous: dict[int, object] = {}
        self._attempting = False

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Listen within a block. Outside the main thread signals cannot be handled and keep their meaning."""
        with suppress(ValueError):
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._receive)
        try:
            yield
        finally:
            self._restore()

    def attempt(self, work: Callable[[], Any]) -> Any:
        """What `work` gives; None when a signal came before, or ended it anywhere: `work` must not change the run."""
        try:
            self._attempting = True
            try:
                return work() if self.signal is None else None
            finally:
                self._attempting = False
        except _Stopped:
            return None

    def _receive(self, number, frame) -> None:
        self.signal = number
        self._restore()
        if self._attempting:
            raise _Stopped

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}
