"""What a press of a button starts: work in a thread that reports, a line that tells how it goes, and Stop."""

from __future__ import annotations

import html
import logging
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any

import gradio as gr

from csdiff.errors import CSDiffError

logger = logging.getLogger(__name__)

PRIVATE = {"api_visibility": "private"}
ASIDE = {"queue": False, "show_progress": "hidden", **PRIVATE}
"""Options of events that need no models, and no place in the line."""
Report = Callable[[Any], None]


@dataclass(frozen=True)
class Progress:
    """A few words on how far the work is, and done of total."""

    text: str
    done: int = 0
    total: int = 0


@dataclass(frozen=True)
class Note:
    """Something to know about the result."""

    text: str


class Stopped(Exception):
    """Raised inside the work when its listener has gone or wants no more."""


def stream(work: Callable[[Report], None]) -> Iterator[Any]:
    """Runs `work(report)` in a thread and yields what it reports; raises what it raises.

    Closing the iterator (someone pressed Stop, or closed the page) makes the next `report` raise `Stopped`.
    """
    messages: SimpleQueue = SimpleQueue()
    closed = threading.Event()

    def report(message: Any) -> None:
        if closed.is_set():
            raise Stopped
        messages.put(message)

    def run() -> None:
        try:
            work(report)
            messages.put(None)
        except BaseException as error:
            messages.put(error)

    threading.Thread(target=run, daemon=True).start()
    try:
        while (message := messages.get()) is not None:
            if isinstance(message, BaseException):
                raise message
            yield message
    finally:
        closed.set()


def press(
    triggers: list, stop: gr.Button, line: gr.HTML, work: Callable[..., None], inputs: list, outputs: list
) -> None:
    """Runs `work(report, request, *values)` when a button is pressed, till it ends or Stop.

    Args:
        triggers: The button, which cannot be pressed again meanwhile, and fields where Enter does the same.
        stop: The button that ends it, also while it waits.
        line: The component that tells how it goes.
        work: Reports `Progress`, `Note`, the last words as a string, and updates of `outputs` as dicts.
        inputs: Components whose values `work` gets.
        outputs: Components that it updates.
    """
    button, *typed = triggers

    def run(request: gr.Request, *values) -> Iterator[dict]:
        notes: list[str] = []
        try:
            yield {line: status(Progress("Starting")), button: gr.Button(interactive=False)}
            for message in stream(lambda report: work(report, request, *values)):
                if isinstance(message, Note):
                    notes.append(message.text)
                else:
                    yield {line: status(message, notes)} if isinstance(message, (Progress, str)) else message
        except (CSDiffError, OSError) as error:
            yield {line: status(" ".join(str(error).split()), notes, error=True)}
        except Exception:
            logger.exception("The page met a defect")
            words = "Something went wrong that should not; the terminal of csdiff app says what."
            yield {line: status(words, notes, error=True)}
        yield {button: gr.Button(interactive=True)}

    # Who comes first is served first, by `Models.turn`: Gradio's own line tells places in no words.
    started = gr.on(
        [button.click, *(field.submit for field in typed)], run, inputs, [line, button, *outputs],
        concurrency_limit=None, trigger_mode="once", show_progress="hidden", **PRIVATE,
    )  # fmt: skip
    stop.click(None, cancels=started, **ASIDE)
    # The work itself fails in words: what Gradio calls a failure is a press that was cancelled.
    started.failure(lambda: (status("Stopped."), gr.Button(interactive=True)), None, [line, button], **ASIDE)


def status(said: Progress | str = "", notes: Sequence[str] = (), error: bool = False) -> str:
    """The line under a button as HTML: progress with a bar, what was done, or an error in a sentence."""
    # Errors that the command line shares name its options; here they are fields.
    text = said.text if isinstance(said, Progress) else said
    text = re.sub(r"--(\w+)", r"“\1”", text) if error else text
    parts = [f"<p{' class=error role=alert' if error else ''}>{html.escape(text)}</p>"] if text else []
    if isinstance(said, Progress):
        # without a value it moves to and fro
        parts.append(f"<progress {f'value={said.done} max={said.total}' if said.total else ''}></progress>")
    parts += [f"<p class='note'>{html.escape(note)}</p>" for note in notes]
    return f"<div class='status' aria-live='polite'>{''.join(parts)}</div>"
