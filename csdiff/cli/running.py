"""Running a command: exit codes, signals, and what goes to stdout and stderr."""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Callable
from contextlib import contextmanager

from csdiff.errors import CSDiffError

DONE, DEFECT, BAD_INPUT, INTERRUPTED, TERMINATED = 0, 1, 2, 130, 143


def run(action: Callable[[], object], prog: str) -> int:
    """Run `action` and return the exit code.

    0: done. 2: bad input, one sentence on stderr. 130: Ctrl-C, 143: SIGTERM, one line on stderr; what was being
    written is removed. 1: a defect, with its traceback.
    """
    try:
        with _terminable():
            action()
    except CSDiffError as error:
        return _complain(prog, error, BAD_INPUT)
    except BrokenPipeError:
        # The reader of our output has gone; stop without a second complaint at interpreter exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return DEFECT
    except OSError as error:
        # A file that is missing, damaged or not ours to write: the message of whoever met it.
        return _complain(prog, error, BAD_INPUT)
    except _Terminated:
        return _complain(prog, "terminated", TERMINATED)
    except KeyboardInterrupt:
        return _complain(prog, "interrupted", INTERRUPTED)
    except Exception:
        traceback.print_exc()
        return _complain(prog, "stopped by a defect; please report it with the lines above", DEFECT)
    return DONE


class _Terminated(BaseException):
    """SIGTERM, as an exception: files that are being written are cleaned up on the way out."""


@contextmanager
def _terminable():
    def receive(number, frame):
        raise _Terminated

    try:
        before = signal.signal(signal.SIGTERM, receive)
    except ValueError:
        # Signals belong to the main thread; elsewhere they keep their meaning.
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _complain(prog: str, message: object, code: int) -> int:
    # One line above whatever a progress bar has left on the terminal.
    start = "\n" if code in (INTERRUPTED, TERMINATED) and sys.stderr.isatty() else ""
    print(f"{start}{prog}: {' '.join(str(message).split())}", file=sys.stderr)
    return code
