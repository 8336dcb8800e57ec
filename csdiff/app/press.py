"""What a press of a button starts: work in a thread that reports, a line that tells how it goes, and Stop."""

from __future__ import annotations

import html
import logging
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
UNFINISHED = "still being drawn"
"""Caption of an image till it is finished; the page replaces it when a press has ended before."""
Report = Callable[[Any], None]
# Errors that the command line shares name its options; on the page these are fields.
FIELDS = {
    "num_images": "Images", "negative_prompt": "Negative prompt", "seed": "Seed", "steps": "Steps",
    "guidance": "Guidance", "adapter": "Adapter", "decoder": "Decoder",
}  # fmt: skip


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


def buttons(label: str, name: str) -> tuple[gr.Button, gr.Button, gr.HTML]:
    """A button, one that stops what it began, and the line that tells how it goes."""
    with gr.Row():
        begin = gr.Button(label, variant="primary", elem_id=name, min_width=120)
        stop = gr.Button("Stop", elem_id=f"stop-{name}", min_width=80)
    return begin, stop, gr.HTML(status(), elem_id=f"{name}-status", padding=False)


def press(row: tuple, typed: list, work: Callable[..., None], inputs: list, outputs: list) -> None:
    """Runs `work(report, request, *values)` when a button is pressed, till it ends or Stop, also while it waits.

    Args:
        row: What `buttons` returned; the first cannot be pressed again meanwhile.
        typed: Fields where Enter does the same.
        work: Reports `Progress`, `Note`, the last words as a string, and updates of `outputs` as dicts.
        inputs: Components whose values `work` gets.
        outputs: Components that it updates.
    """
    button, stop, line = row

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
            yield {line: failure(error, notes)}
        except Exception:
            logger.exception("The page met a defect")
            words = "Something went wrong that should not; the terminal of csdiff app says what."
            yield {line: failure(words, notes)}

    # Who comes first is served first, by `Models.turn`: Gradio's own line tells places in no words.
    started = gr.on(
        [button.click, *(field.submit for field in typed)], run, inputs, [line, button, *outputs],
        concurrency_limit=None, show_progress="hidden", **PRIVATE,
    )  # fmt: skip
    stop.click(None, cancels=started, **ASIDE)
    # The work itself fails in words: what Gradio calls a failure is a press that was cancelled.
    started.failure(lambda: status("Stopped."), None, line, **ASIDE)
    # Not by `run` itself: till it has ended, Gradio drops another press.
    started.then(lambda: gr.Button(interactive=True), None, button, **ASIDE)
    shown = [part for part in outputs if isinstance(part, gr.Gallery)]
    ended = f"image => image.caption === '{UNFINISHED}' ? {{...image, caption: 'stopped'}} : image"
    started.then(None, shown, shown, js=f"(...shown) => shown.map(images => images?.map({ended}))", **ASIDE)


def status(said: Progress | str = "", notes: Sequence[str] = (), error: bool = False) -> str:
    """The line under a button as HTML: progress with a bar, what was done, or an error."""
    text = said.text if isinstance(said, Progress) else said
    parts = [f"<p{' class=error role=alert' if error else ''}>{html.escape(text)}</p>"] if text else []
    if isinstance(said, Progress):
        # without a value it moves to and fro
        parts.append(f"<progress {f'value={said.done} max={said.total}' if said.total else ''}></progress>")
    parts += [f"<p class='note'>{html.escape(note)}</p>" for note in notes]
    return f"<div class='status' aria-live='polite'>{''.join(parts)}</div>"


def failure(error: Exception | str, notes: Sequence[str] = ()) -> str:
    """The line for an error, in one sentence and the words of the page."""
    said = " ".join(str(error).split())
    for option, label in FIELDS.items():
        said = said.replace(f"--{option}", f"“{label}”")
    return status(said, notes, error=True)
