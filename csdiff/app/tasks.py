"""From work that reports to updates of the page: progress, pictures as they come, errors in a sentence."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

from csdiff.app.drawing import Note, Progress
from csdiff.app.streaming import Report, Stopped, stream
from csdiff.app.theme import status
from csdiff.errors import CSDiffError

logger = logging.getLogger(__name__)


def updates(
    work: Callable[[Report], None],
    line: Any,
    show: Callable[[Any], dict],
    done: Callable[[], str],
    stopped: Callable[[], bool] = lambda: False,
) -> Iterator[dict]:
    """Runs `work` and yields updates for the page.

    Args:
        work: called with `report`.
        line: the component that tells how it goes.
        show: what the page shows of anything reported that is neither progress nor a note: component to value.
        done: what the line says at the end.
        stopped: whether the work shall end at its next report.
    """
    notes: list[str] = []
    try:
        yield {line: status(Progress("Starting"))}
        for message in stream(work, stopped):
            if isinstance(message, Note):
                if message.text not in notes:
                    notes.append(message.text)
            elif isinstance(message, Progress):
                yield {line: status(message, notes=tuple(notes))}
            else:
                yield show(message)
        yield {line: status(done=done(), notes=tuple(notes))}
    except Stopped:
        yield {line: status(done="Stopped.", notes=tuple(notes))}
    except (CSDiffError, OSError) as error:
        yield {line: status(error=" ".join(str(error).split()), notes=tuple(notes))}
    except Exception:
        logger.exception("The page met a defect")
        yield {line: status(error="Something went wrong that should not; the terminal of csdiff app says what.")}
