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
        self._may_leave = self._at_once = False

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
    def may_leave(self) -> Iterator[None]:
        """A block that `pause` may end."""
        self._may_leave = True
        try:
            yield
        finally:
            self._may_leave = False

    def pause(self) -> None:
        """Leaves a block of `may_leave` by `Stopped` if a signal has come."""
        if self._may_leave and self.signal is not None:
            raise Stopped

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Within a block of `may_leave`, a block that changes nothing of the run: a signal ends it wherever it is."""
        self.pause()
        self._at_once = self._may_leave
        try:
            yield
        finally:
            self._at_once = False

    def _receive(self, number, frame) -> None:
        self.signal = number
        self._restore()
        if self._at_once:
            raise Stopped

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}
