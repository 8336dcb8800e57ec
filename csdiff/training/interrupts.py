"""SIGTERM and SIGINT as a wish to stop after the step at hand."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress


class Stopped(BaseException):
    """A signal came while something was done that may be left undone; not an `Exception`, which libraries catch."""


class Interrupt:
    """Remembers the first signal; a second one acts at once."""

    def __init__(self):
        self.signal: int | None = None
        self._previous: dict[int, object] = {}
        self._level = 0

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

    @contextmanager
    def may_leave(self, anywhere: bool = False) -> Iterator[None]:
        """A block that a signal may end: at `pause`, or anywhere in a block that changes nothing of the run."""
        before, self._level = self._level, 2 if anywhere else 1
        try:
            self.pause()
            yield
        finally:
            self._level = before

    def pause(self) -> None:
        """Leaves a block of `may_leave` by `Stopped` if a signal has come."""
        if self._level and self.signal is not None:
            raise Stopped

    def _receive(self, number, frame) -> None:
        self.signal = number
        self._restore()
        if self._level == 2:
            raise Stopped

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}
