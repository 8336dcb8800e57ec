"""The page: three tabs over one choice of models, a history, and settings that survive a reload."""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import gradio as gr

from csdiff.app.drawing import (
    LONGEST_PROMPT,
    MOST_STEPS,
    WAY,
    Drawn,
    Missing,
    Note,
    Settings,
    Started,
    blend,
    create,
    from_mapping,
    read_upload,
    settings_of,
)
from csdiff.app.inspection import Inspector
from csdiff.app.models import RAW_TEXT, SHIPPED, Models
from csdiff.app.theme import status
from csdiff.app.work import Progress, Report, Stopped, stream
from csdiff.errors import CSDiffError
from csdiff.pipelines.config import GenerateConfig
from csdiff.pipelines.decoders import resolve_decoder
from csdiff.pipelines.generate import sampling
from csdiff.pipelines.presets import PRESETS

logger = logging.getLogger(__name__)

# Of the sixteen of docs/pictures.md, four where raw text, ridge and adapter visibly differ.
EXAMPLES = (
    "a sunflower in a pot, 3d style",
    "a snowman with a hat, flat style",
    "one shiny purple heart, 3d style",
    "a sailing boat on the sea, flat style",
)
STRIP = {
    "raw": ("Raw text", "The text embedding as it is"),
    "ridge": ("Ridge", "A linear map fitted to the same pairs"),
    "adapter": ("Adapter", "The chosen adapter, in one step"),
}
LARGEST_SEED = 2**31 - 1
MOST_GUIDANCE = 30.0
# Uploads and images are kept so long, in seconds.
KEPT = 6 * 3600
_PRIVATE = {"api_visibility": "private"}


def build_page(models: Models, inspector: Inspector) -> gr.Blocks:
    """The Gradio blocks; everything that someone does stays in their own session."""
    with gr.Blocks(title="csdiff", analytics_enabled=False, delete_cache=(KEPT // 6, KEPT)) as page:
        gr.HTML(
            "<h1>csdiff</h1><p>A prompt becomes an image embedding in one step; an unCLIP decoder draws it.</p>",
            elem_id="head",
        )
        choice = _ModelChoice(models)
        with gr.Tabs(selected="create") as tabs:
            with gr.Tab("Create", id="create"):
                tab = _Create(models, choice)
            with gr.Tab("Blend", id="blend"):
                upload, blend_fields = _blend_tab(models, choice)
            with gr.Tab("Look inside", id="inside"):
                _inspect_tab(inspector)
        choice.follow(models, [tab.fields, blend_fields])
        tab.to_blend.click(
            lambda chosen: (chosen, gr.Tabs(selected="blend")), tab.chosen, [upload, tabs], queue=False, **_PRIVATE
        )
        tab.remember(page)
    return page


def _press(triggers: list, stop: gr.Button, line: gr.HTML, work: Callable[..., Any], inputs: list, outputs: list):
    """Runs `work(report, show, *values)` when a button is pressed, and ends it when its page presses stop.

    Gradio can cancel an event itself (`cancels=`), but what the cancelled work had sent may arrive after the page said
    that it has stopped. Here the work ends between two reports, and says so as the last thing. Whoever must wait for
    the models does so inside the work, where the place in line can be told.

    Args:
        triggers: Events, such as `button.click`.
        stop: The button.
        line: The component that tells how it goes.
        work: Returns `(job, show, done)`: what runs with a `report`, updates for what it reports, the last words.
        inputs: Components whose values `work` gets.
        outputs: Components that `show` updates.
    """
    running: dict[str | None, bool] = {}

    def press(request: gr.Request, *values) -> Iterator[dict]:
        session, notes = request.session_hash, []
        running[session] = True
        try:
            yield {line: status(Progress("Starting"))}
            job, show, done = work(request, *values)
            for message in stream(job, lambda: not running.get(session)):
                if isinstance(message, Note):
                    notes.append(message.text)
                    continue
                updates = show(message) or {}
                if isinstance(message, Progress):
                    updates[line] = status(message, notes=tuple(notes))
                yield updates
            yield {line: status(done=done(), notes=tuple(notes))}
        except Stopped:
            yield {line: status(done="Stopped.", notes=tuple(notes))}
        except (CSDiffError, OSError) as error:
            yield {line: status(error=" ".join(str(error).split()), notes=tuple(notes))}
        except Exception:
            logger.exception("The page met a defect")
            yield {line: status(error="Something went wrong that should not; the terminal of csdiff app says what.")}
        finally:
            running.pop(session, None)

    def press_stop(request: gr.Request) -> str | dict:
        if request.session_hash not in running:
            return gr.skip()
        running[request.session_hash] = False
        return status(Progress("Stopping"))

    gr.on(
        triggers,
        press,
        inputs,
        outputs,
        concurrency_limit=None,
        show_progress="hidden",
        trigger_mode="once",
        **_PRIVATE,
    )
    stop.click(press_stop, None, line, queue=False, **_PRIVATE)


class _ModelChoice:
    """The adapter and the decoder that the whole page uses; both take a folder or a hub repository typed in."""

    def __init__(self, models: Models):
        start = models.config.adapter or SHIPPED
        runs = [str(path.parent) for path in sorted(Path("runs").glob("*/csdiff.json"))][:50]
        labels = {SHIPPED: "shipped with csdiff", RAW_TEXT: "none: the raw text embedding"}
        with gr.Accordion("Models", open=False), gr.Row():
            self.adapter = gr.Dropdown(
                [(labels.get(name, name), name) for name in dict.fromkeys([start, SHIPPED, RAW_TEXT, *runs])],
                value=start,
                label="Adapter",
                info="Choose one, or type a folder or a hub repository",
                allow_custom_value=True,
                elem_id="adapter",
            )
            self.decoder = gr.Dropdown(
                list(dict.fromkeys([models.config.decoder, *PRESETS])),
                value=models.config.decoder,
                label="Decoder",
                info="A preset, a folder saved by diffusers, or a hub repository",
                allow_custom_value=True,
            )
        self.line = gr.HTML("", elem_id="models-status", visible=False)

    def follow(self, models: Models, fields: list[Fields]) -> None:
        """Checks what was chosen, and sets steps and guidance to what the decoder is made for."""

        def check(adapter: str, decoder: str):
            try:
                models.find(adapter, decoder)
                steps, guidance = sampling_of(models, decoder)
            except (CSDiffError, OSError) as error:
                return [gr.HTML(status(error=str(error)), visible=True), *([gr.skip()] * 2 * len(fields))]
            return [gr.HTML("", visible=False), *([steps, guidance] * len(fields))]

        targets = [component for field in fields for component in (field.steps, field.guidance)]
        for changed in (self.adapter, self.decoder):
            changed.input(
                check, [self.adapter, self.decoder], [self.line, *targets], show_progress="hidden", **_PRIVATE
            )


def sampling_of(models: Models, decoder: str | None) -> tuple[int, float]:
    """Steps and guidance that a decoder is made for, as far as the sliders go."""
    steps, guidance = sampling(GenerateConfig(), resolve_decoder(models.decoder_option(decoder)))
    return min(max(steps, 1), MOST_STEPS), min(max(guidance, 1.0), MOST_GUIDANCE)


class Fields:
    """Negative prompt, seed, steps and guidance of one tab."""

    def __init__(self, models: Models, name: str = ""):
        steps, guidance = sampling_of(models, None)
        self.negative = gr.Textbox(
            label="Negative prompt", placeholder="what the images should not show", max_length=LONGEST_PROMPT
        )
        with gr.Row():
            self.seed = gr.Number(
                0, label="Seed", precision=0, minimum=0, maximum=LARGEST_SEED, min_width=120, elem_id=f"{name}seed"
            )
            self.random = gr.Checkbox(False, label="New each time", min_width=160)
        with gr.Row():
            self.steps = gr.Slider(
                1, MOST_STEPS, value=steps, step=1, label="Steps", min_width=150, elem_id=f"{name}steps"
            )
            self.guidance = gr.Slider(1, MOST_GUIDANCE, value=guidance, step=0.5, label="Guidance", min_width=150)

    def all(self) -> list:
        return [self.negative, self.seed, self.random, self.steps, self.guidance]


def _settings(prompt, count, negative, seed, random, steps, guidance, adapter, decoder) -> Settings:
    """The values of the fields; a field that was emptied means its default."""
    return Settings(
        prompt=prompt or "",
        negative=negative or "",
        seed=secrets.randbelow(LARGEST_SEED) if random else int(seed or 0),
        count=int(count or 1),
        steps=int(steps) if steps else None,
        guidance=float(guidance) if guidance else None,
        adapter=adapter,
        decoder=decoder,
    )


def _gallery(name: str, columns: int, **options) -> gr.Gallery:
    return gr.Gallery(
        show_label=False,
        elem_id=name,
        columns=columns,
        fit_columns=False,
        height="auto",
        object_fit="contain",
        format="png",
        buttons=["download", "fullscreen"],
        interactive=False,
        **options,
    )


class _Create:
    """The tab *Create*: a prompt to images, beside what the same prompt gives without the adapter."""

    def __init__(self, models: Models, choice: _ModelChoice):
        self.models, self.choice = models, choice
        self.history = gr.State([])
        self.chosen = gr.State(None)
        with gr.Row(equal_height=False, elem_classes="workplace"):
            with gr.Column(scale=2, min_width=320, elem_classes="asked"):
                # With one line, Enter draws and Shift+Enter makes a new line.
                self.prompt = gr.Textbox(
                    label="Prompt", placeholder=EXAMPLES[0], lines=1, max_lines=6, max_length=LONGEST_PROMPT,
                    elem_id="prompt", autofocus=True,
                )  # fmt: skip
                gr.Examples([[text] for text in EXAMPLES], [self.prompt], label="For example", **_PRIVATE)
                with gr.Row():
                    draw = gr.Button("Draw", variant="primary", elem_id="draw", min_width=120)
                    stop = gr.Button("Stop", elem_id="stop", min_width=80)
                self.line = gr.HTML(status(), elem_id="create-status", padding=False)
                with gr.Column(elem_classes="settings"):
                    self.compare = gr.Checkbox(
                        False, label="Compare with raw text and a ridge map (draws two more images)", container=False,
                        elem_id="compare",
                    )  # fmt: skip
                    self.count = gr.Slider(
                        1, models.config.max_images, value=1, step=1, label="Images", elem_id="count"
                    )
                    self.fields = Fields(models)
                    with gr.Accordion("Settings of an image, and a link", open=False):
                        dropped = gr.File(
                            label="Drop a PNG that csdiff drew: its settings come back",
                            file_types=[".png"],
                            height=110,
                            elem_id="dropped",
                        )
                        self.link = gr.Textbox(
                            label="A link with these settings", interactive=False, buttons=["copy"], elem_id="link"
                        )
            with gr.Column(scale=3, min_width=320, elem_classes="answered"):
                self.images = _gallery("images", 2)
                self.strip, self.words = {}, {}
                with gr.Row(elem_classes="strip", elem_id="strip", visible=False) as self.row:
                    for place, (name, text) in STRIP.items():
                        with gr.Column(min_width=96):
                            self.strip[place] = gr.Image(
                                label=name, elem_id=f"strip-{place}", interactive=False, height=190, format="png",
                                buttons=[],
                            )  # fmt: skip
                            self.words[place] = gr.Markdown(text)
                self.command = gr.Textbox(
                    label="The same on the command line", elem_id="command", interactive=False, lines=2,
                    buttons=["copy"], visible=False,
                )  # fmt: skip
                with gr.Column(visible=False) as self.past:
                    gr.Markdown("### Drawn on this page\nClick an image, then choose what to do with it.")
                    earlier = _gallery("history", 6)
                    with gr.Row():
                        use_seed = gr.Button("Use this seed", size="sm", elem_id="use-seed")
                        use_all = gr.Button("Use its settings", size="sm", elem_id="use-settings")
                        self.to_blend = gr.Button("Send to Blend", size="sm", elem_id="to-blend")
        self.earlier = earlier
        inputs = [self.compare, self.history, *self._asked()]
        outputs = [
            self.line, self.images, self.row, *self.strip.values(), *self.words.values(), self.command,
            self.fields.seed, self.link, self.history, earlier, self.past,
        ]  # fmt: skip
        _press([draw.click, self.prompt.submit], stop, self.line, self._draw, inputs, outputs)

        def choose(past, event: gr.SelectData):
            return past[event.index][0]

        earlier.select(choose, self.history, self.chosen, queue=False, **_PRIVATE)
        own = [self.prompt, self.count, *self.fields.all()[:2], *self.fields.all()[3:], choice.adapter, choice.decoder]
        for trigger, source in ((use_all.click, self.chosen), (dropped.upload, dropped)):
            trigger(self._take, source, [self.line, *own], queue=False, show_progress="hidden", **_PRIVATE)
        use_seed.click(
            lambda path: gr.skip() if path is None else settings_of(path).seed,
            self.chosen, self.fields.seed, queue=False, **_PRIVATE,
        )  # fmt: skip
        self._own = own

    def _asked(self) -> list:
        return [self.prompt, self.count, *self.fields.all(), self.choice.adapter, self.choice.decoder]

    def _take(self, path: str | None) -> list:
        """The fields as the settings in a PNG say."""
        try:
            if path is None:
                raise CSDiffError("Click one of the images above first.")
            return [status(done="These are the settings of that image."), *self._shown(settings_of(path))]
        except CSDiffError as error:
            return [status(error=str(error)), *([gr.skip()] * len(self._own))]

    def _shown(self, given: Settings) -> list:
        """Settings as values of the fields; what they leave open stays as it is."""
        steps = gr.skip() if given.steps is None else min(given.steps, MOST_STEPS)
        guidance = gr.skip() if given.guidance is None else min(given.guidance, MOST_GUIDANCE)
        count = min(given.count, self.models.config.max_images)
        seed = min(given.seed, LARGEST_SEED)
        adapter, decoder = given.adapter or gr.skip(), given.decoder or gr.skip()
        return [given.prompt, count, given.negative, seed, steps, guidance, adapter, decoder]

    def _draw(self, request: gr.Request, compare, past, *values):
        asked = _settings(*values)
        drawn: list[tuple[Any, str]] = []

        def show(message) -> dict | None:
            # What is drawn to compare has places of its own.
            if isinstance(message, Progress) and message.preview is not None and len(drawn) < asked.count:
                return {self.images: [*drawn, (message.preview, "still being drawn")]}
            if isinstance(message, Started):
                return {
                    self.images: [],
                    self.row: gr.Row(visible=bool(compare)),
                    **dict.fromkeys(self.strip.values()),
                    **{self.words[place]: text for place, (_, text) in STRIP.items()},
                    self.command: gr.Textbox(message.command, visible=True),
                    self.fields.seed: asked.seed,
                    self.link: _link(request, asked),
                }
            if isinstance(message, Missing):
                return {self.words[message.place]: message.reason}
            if isinstance(message, Drawn) and message.place == "adapter":
                return {self.strip["adapter"]: gr.Image(message.path, label=message.caption)}
            if isinstance(message, Drawn) and message.place in self.strip:
                return {self.strip[message.place]: message.path}
            if isinstance(message, Drawn):
                drawn.append((message.path, message.caption))
                past.insert(0, (message.path, message.caption))
                return {
                    self.images: list(drawn),
                    self.history: past,
                    self.earlier: list(past),
                    self.past: gr.Column(visible=True),
                }
            return None

        def done() -> str:
            return f"Done: {len(drawn)} image{'s' * (len(drawn) != 1)}."

        return (lambda report: create(self.models, asked, compare, report)), show, done

    def remember(self, page: gr.Blocks) -> None:
        """Settings survive a reload in the browser's own memory; those in a link come first."""
        kept = gr.BrowserState({}, storage_key="csdiff-settings", secret="csdiff")

        def keep(*values):
            return asdict(_settings(*values))

        def restore(request: gr.Request, remembered):
            given = dict(request.query_params) or remembered
            if not isinstance(given, dict) or not given:
                return [gr.skip()] * len(self._own)
            return self._shown(from_mapping(given))

        page.load(restore, kept, self._own, queue=False, show_progress="hidden", **_PRIVATE)
        gr.on(
            [component.change for component in self._asked()],
            keep, self._asked(), kept, queue=False, show_progress="hidden", trigger_mode="always_last", **_PRIVATE,
        )  # fmt: skip


def _link(request: gr.Request, asked: Settings) -> str:
    """The page's address with the settings, as this browser names it."""
    place = (request.headers.get("referer") or "/").partition("?")[0]
    given = {name: value for name, value in asdict(asked).items() if value not in (None, "")}
    return f"{place}?{urlencode(given)}"


def _blend_tab(models: Models, choice: _ModelChoice) -> tuple[gr.File, Fields]:
    """The tab *Blend*: between two prompts, or between a prompt and an image."""
    with gr.Row(equal_height=False, elem_classes="workplace"):
        with gr.Column(scale=2, min_width=320, elem_classes="asked"):
            first = gr.Textbox(
                label="First prompt", value="a red apple, 3d style", max_length=LONGEST_PROMPT, elem_id="first"
            )
            second = gr.Textbox(
                label="Second prompt", value="a yellow duck", max_length=LONGEST_PROMPT, elem_id="second"
            )
            # A file, not an image field: it is looked at before anything decodes it.
            upload = gr.File(
                label="... or drop an image in its place", file_types=["image"], height=110, elem_id="upload"
            )
            preview = gr.Image(
                show_label=False, interactive=False, height=180, buttons=[], visible=False, elem_id="uploaded"
            )
            share = gr.Slider(0, 1, value=0.5, step=0.05, label="Share of the second")
            whole = gr.Checkbox(
                False, label="The whole way: five images from the first to the second", container=False
            )
            with gr.Row():
                draw = gr.Button("Blend", variant="primary", elem_id="blend", min_width=120)
                stop = gr.Button("Stop", elem_id="stop-blend", min_width=80)
            line = gr.HTML(status(), elem_id="blend-status", padding=False)
            with gr.Column(elem_classes="settings"):
                fields = Fields(models, "blend-")
        with gr.Column(scale=3, min_width=320, elem_classes="answered"):
            gallery = _gallery("blended", 3)
            gr.Markdown(
                "A blend is `(1 - s) a + s b` of two image embeddings, all images from one seed. Prompts become image "
                "embeddings through the adapter, images through the image encoder."
            )

    def work(request, first, second, image, share, whole, *values):
        asked = _settings(first, 1, *values)
        other = (second or "") if image is None else read_upload(image)
        drawn: list[tuple[Any, str]] = []

        def show(message) -> dict | None:
            if isinstance(message, Progress) and message.preview is not None:
                return {gallery: [*drawn, (message.preview, "still being drawn")]}
            if isinstance(message, Drawn):
                drawn.append((message.path, message.caption))
                return {gallery: list(drawn), fields.seed: asked.seed}
            return None

        def job(report: Report) -> None:
            blend(models, asked, other, WAY if whole else (share,), report)

        return job, show, lambda: f"Done: {len(drawn)} image{'s' * (len(drawn) != 1)}."

    def check(image):
        if image is None:
            return status(), gr.Image(visible=False)
        try:
            return status(), gr.Image(read_upload(image), visible=True)
        except CSDiffError as error:
            return status(error=str(error)), gr.Image(visible=False)

    upload.change(check, upload, [line, preview], queue=False, show_progress="hidden", **_PRIVATE)
    inputs = [first, second, upload, share, whole, *fields.all(), choice.adapter, choice.decoder]
    _press([draw.click, first.submit, second.submit], stop, line, work, inputs, [line, gallery, fields.seed])
    return upload, fields


def _inspect_tab(inspector: Inspector) -> None:
    """The tab *Look inside*: an adapter or a store, in numbers and plots."""
    with gr.Row(equal_height=False):
        with gr.Column(scale=3, min_width=320):
            path = gr.Textbox(
                label="Folder of an adapter or a store", placeholder="runs/mine; empty: the shipped adapter",
                elem_id="path", max_length=1000,
            )  # fmt: skip
            store = gr.Textbox(
                label="Store to measure an adapter on", placeholder="empty: the shipped held-out images",
                max_length=1000,
            )  # fmt: skip
            with gr.Row():
                look = gr.Button("Look", variant="primary", elem_id="look", min_width=120)
                stop = gr.Button("Stop", min_width=80)
            line = gr.HTML(status(), elem_id="look-status", padding=False)
        with gr.Column(scale=2, min_width=320):
            files = gr.File(
                label="... or drop its files here", file_count="multiple", height=180, elem_id="files", type="filepath"
            )
    with gr.Column(visible=False, elem_id="inside") as inside:
        title = gr.Markdown()
        plots = {
            name: gr.Plot(label=name, show_label=False, format="png", elem_id=f"plot-{name}")
            for name in ("gap", "projection", "similarities", "retrieval")
        }
        table = gr.HTML(label="Metrics", elem_id="metrics", padding=False)
        with gr.Accordion("Model card", open=False):
            card = gr.Markdown()
        with gr.Accordion("What is in the folder", open=False):
            facts = gr.Textbox(show_label=False, lines=12, max_lines=40, elem_id="facts", buttons=["copy"])

    def work(request, path, files, store):
        def show(seen) -> dict | None:
            if isinstance(seen, Progress):
                return None
            return {
                inside: gr.Column(visible=True),
                title: f"### {seen.title}\n\n{seen.note}",
                **{plot: gr.Plot(seen.figures.get(name), visible=bool(seen.figures)) for name, plot in plots.items()},
                table: gr.HTML(seen.table, visible=bool(seen.table)),
                card: seen.card or "It has none.",
                facts: seen.facts,
            }

        return (lambda report: report(inspector.look(path or "", files, store or "", report))), show, lambda: ""

    outputs = [line, inside, title, *plots.values(), table, card, facts]
    _press([look.click, path.submit], stop, line, work, [path, files, store], outputs)
