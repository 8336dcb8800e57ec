"""A button that starts long work and one that stops it.

Gradio can cancel an event of its queue, but what the cancelled work had already sent may arrive after the page said
"Stopped", and the page takes the next press for a repeated one for a while. Here the work ends itself: it asks between
two reports whether its page pressed stop after the press that began it, and says so as the last thing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import gradio as gr

from csdiff.app.drawing import Progress
from csdiff.app.theme import status

# The last value of every press is the browser's clock, so that a press that still waits in the queue can be stopped.
_WITH_TIME = "(...values) => [...values.slice(0, -1), Date.now()]"


def on_press(
    triggers: list,
    stop: gr.Button,
    run: Callable[..., Iterator[dict]],
    inputs: list,
    outputs: list,
    *,
    line: gr.HTML,
    queue: str,
) -> None:
    """Runs `run(stopped, *values of inputs)` when one of `triggers` happens; presses that share `queue` wait.

    Args:
        triggers: events, such as `button.click`.
        stop: the button that makes `stopped()` true for the work of its own page.
        run: yields updates of `outputs`.
        inputs: components whose values `run` gets.
        outputs: components that `run` updates.
        line: the component that tells how it goes.
        queue: name of the queue.
    """
    stops: dict[str | None, float] = {}
    running: set[str | None] = set()
    time = gr.Number(0, visible=False)

    def press(request: gr.Request, *values) -> Iterator[dict]:
        *values, pressed = values
        page = request.session_hash
        running.add(page)
        try:
            yield from run(lambda: stops.get(page, 0) > pressed, *values)
        finally:
            running.discard(page)
            stops.pop(page, None)

    def press_stop(request: gr.Request, pressed: float) -> str:
        stops[request.session_hash] = pressed
        return status(Progress("Stopping")) if request.session_hash in running else status(done="Stopped.")

    gr.on(
        triggers,
        press,
        [*inputs, time],
        outputs,
        js=_WITH_TIME,
        concurrency_limit=1,
        concurrency_id=queue,
        show_progress="minimal",
        show_progress_on=[line],
        api_visibility="private",
    )
    stop.click(press_stop, time, line, js=_WITH_TIME, queue=False, api_visibility="private")
