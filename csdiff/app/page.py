"""The page: three tabs over one choice of models, a history, and settings that survive a reload."""

from __future__ import annotations

from collections.abc import Iterator
from urllib.parse import urlencode

import gradio as gr

from csdiff.app.drawing import KEPT, Drawn, blend, check, create, from_record, read_upload, settings, to_record
from csdiff.app.fields import LONGEST_PROMPT, MOST, Fields, ModelChoice, gallery
from csdiff.app.inspection import Inspector, inside_tab
from csdiff.app.models import Models
from csdiff.app.press import ASIDE, PRIVATE, Progress, press, status, stream
from csdiff.errors import CSDiffError
from csdiff.pipelines.generate import read_settings, redraw_command

# Of the sixteen of docs/pictures.md, four where the raw text visibly fails.
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
WAY = (0.0, 0.25, 0.5, 0.75, 1.0)
# Uploads and images are kept so long, in seconds.
SECONDS_KEPT = 6 * 3600
WORKPLACE = {"equal_height": False, "elem_classes": "workplace"}
ASKED = {"scale": 2, "min_width": 320, "elem_classes": "asked"}
ANSWERED = {"scale": 3, "min_width": 320, "elem_classes": "answered"}


def build_page(models: Models, inspector: Inspector) -> gr.Blocks:
    """The Gradio blocks; everything that someone does stays in their own session."""
    with gr.Blocks(title="csdiff", analytics_enabled=False, delete_cache=(SECONDS_KEPT // 6, SECONDS_KEPT)) as page:
        words = "A prompt becomes an image embedding in one step; an unCLIP decoder draws it."
        gr.HTML(f"<h1>csdiff</h1><p>{words}</p>", elem_id="head")
        choice = ModelChoice(models)
        with gr.Tabs(selected="create") as tabs:
            with gr.Tab("Create", id="create"):
                fields, chosen, to_blend = _create_tab(page, models, choice)
            with gr.Tab("Blend", id="blend"):
                upload, blend_fields = _blend_tab(models, choice)
            with gr.Tab("Look inside", id="inside"):
                inside_tab(inspector)
        choice.follow(models, [fields, blend_fields])
        to_blend.click(lambda path: (path, gr.Tabs(selected="blend")), chosen, [upload, tabs], **ASIDE)
    return page


def _create_tab(page: gr.Blocks, models: Models, choice: ModelChoice) -> tuple[Fields, gr.State, gr.Button]:
    """A prompt to images, beside what the same prompt gives without the adapter."""
    history, chosen = gr.State([]), gr.State(None)
    with gr.Row(**WORKPLACE):
        with gr.Column(**ASKED):
            # With one line, Enter draws and Shift+Enter makes a new line.
            prompt = gr.Textbox(
                label="Prompt", placeholder=EXAMPLES[0], max_lines=6, max_length=LONGEST_PROMPT, elem_id="prompt",
                autofocus=True,
            )  # fmt: skip
            gr.Examples([[text] for text in EXAMPLES], [prompt], label="For example", **PRIVATE)
            with gr.Row():
                draw_it = gr.Button("Draw", variant="primary", elem_id="draw", min_width=120)
                stop = gr.Button("Stop", elem_id="stop", min_width=80)
            line = gr.HTML(status(), elem_id="create-status", padding=False)
            with gr.Column(elem_classes="settings"):
                words = "Compare with raw text and a ridge map (draws two more images)"
                compare = gr.Checkbox(False, label=words, container=False, elem_id="compare")
                count = gr.Slider(1, models.config.max_images, value=1, step=1, label="Images", elem_id="count")
                fields = Fields(models)
                with gr.Accordion("Settings of an image, and a link", open=False):
                    words = "Drop a PNG that csdiff drew: its settings come back"
                    dropped = gr.File(label=words, file_types=[".png"], height=110, elem_id="dropped")
                    words = "A link with these settings"
                    link = gr.Textbox(label=words, interactive=False, buttons=["copy"], elem_id="link")
        with gr.Column(**ANSWERED):
            images = gallery("images", 2)
            strip, captions = {}, {}
            with gr.Row(elem_classes="strip", elem_id="strip", visible=False) as row:
                for place, (name, text) in STRIP.items():
                    look = {"elem_id": f"strip-{place}", "interactive": False, "height": 190, "buttons": []}
                    with gr.Column(min_width=96):
                        strip[place] = gr.Image(label=name, format="png", **look)
                        captions[place] = gr.Markdown(text)
            look = {"elem_id": "command", "interactive": False, "lines": 2, "buttons": ["copy"]}
            command = gr.Textbox(label="The same on the command line", visible=False, **look)
            with gr.Column(visible=False) as past:
                gr.Markdown("### Drawn on this page\nClick an image, then choose what to do with it.")
                earlier = gallery("history", 6)
                with gr.Row():
                    use_seed = gr.Button("Use this seed", size="sm", elem_id="use-seed")
                    use_all = gr.Button("Use its settings", size="sm", elem_id="use-settings")
                    to_blend = gr.Button("Send to Blend", size="sm", elem_id="to-blend")
    asked = [prompt, count, *fields.all(), choice.adapter, choice.decoder]
    # without the checkbox for a new seed each time
    own = [part for part in asked if part is not fields.random]

    def draw(request: gr.Request, compares: bool, so_far: list, *values) -> Iterator:
        config, drawn = check(settings(models, *values)), []
        seeds = range(config.seed, config.seed + config.num_images)
        yield {
            images: [],
            row: gr.Row(visible=compares),
            **dict.fromkeys(strip.values()),
            **{captions[place]: text for place, (_, text) in STRIP.items()},
            command: gr.Textbox(
                redraw_command(config, config.prompt, [(config.prompt[0], seed) for seed in seeds]), visible=True
            ),
            fields.seed: config.seed,
            link: _link(request, to_record(config)),
        }
        for message in stream(lambda report: create(models, config, compares, report)):
            if not isinstance(message, Drawn):
                yield message
                # What is drawn to compare has places of its own.
                if getattr(message, "preview", None) and len(drawn) < config.num_images:
                    yield {images: [*drawn, (message.preview, "still being drawn")]}
            elif message.path is None:
                yield {captions[message.place]: message.caption}
            elif message.place in strip:
                yield {strip[message.place]: gr.Image(message.path, label=message.caption)}
            else:
                drawn.append((message.path, message.caption))
                so_far = [drawn[-1], *so_far]
                yield {images: drawn, history: so_far, earlier: so_far, past: gr.Column(visible=True)}
        yield _done(drawn)

    def shown(record: dict) -> list:
        """Settings as values of the fields; what they leave open stays as it is."""
        given, most = from_record(record), MOST | {"num_images": models.config.max_images}
        given |= {name: min(given[name], bound) for name, bound in most.items() if name in given}
        return [given.get(name, gr.skip()) for name in KEPT]

    def take(path: str | None) -> list:
        """The fields as the settings in a PNG say."""
        try:
            if path is None:
                raise CSDiffError("Click one of the images above first.")
            return [status("These are the settings of that image."), *shown(read_settings(path))]
        except CSDiffError as error:
            return [status(str(error), error=True), *[gr.skip()] * len(own)]

    def restore(request: gr.Request, remembered: dict) -> list:
        given = dict(request.query_params) or remembered
        return shown(given) if isinstance(given, dict) and given else [gr.skip()] * len(own)

    def choose(so_far: list, event: gr.SelectData) -> str:
        return so_far[event.index][0]

    outputs = [images, row, *strip.values(), *captions.values(), command, fields.seed, link, history, earlier, past]
    press([draw_it.click, prompt.submit], stop, line, draw, [compare, history, *asked], outputs)
    earlier.select(choose, history, chosen, **ASIDE)
    gr.on([use_all.click], take, chosen, [line, *own], **ASIDE)
    gr.on([dropped.upload], take, dropped, [line, *own], **ASIDE)
    use_seed.click(lambda path: read_settings(path)["seed"] if path else gr.skip(), chosen, fields.seed, **ASIDE)
    # Settings survive a reload in the browser's own memory; those in a link come first.
    kept = gr.BrowserState({}, storage_key="csdiff-settings", secret="csdiff")
    page.load(restore, kept, own, **ASIDE)
    changed = [part.change for part in asked]
    keep = lambda *values: to_record(settings(models, *values))  # noqa: E731
    gr.on(changed, keep, asked, kept, trigger_mode="always_last", **ASIDE)
    return fields, chosen, to_blend


def _done(drawn: list) -> str:
    return f"Done: {len(drawn)} image{'s' * (len(drawn) != 1)}."


def _link(request: gr.Request, record: dict) -> str:
    """The page's address with the settings, as this browser names it."""
    place = (request.headers.get("referer") or "/").partition("?")[0]
    return f"{place}?{urlencode({name: value for name, value in record.items() if value not in (None, '')})}"


def _blend_tab(models: Models, choice: ModelChoice) -> tuple[gr.File, Fields]:
    """Between two prompts, or between a prompt and an image."""
    with gr.Row(**WORKPLACE):
        with gr.Column(**ASKED):
            text = {"max_length": LONGEST_PROMPT}
            first = gr.Textbox("a red apple, 3d style", label="First prompt", elem_id="first", **text)
            second = gr.Textbox("a yellow duck", label="Second prompt", elem_id="second", **text)
            # A file, not an image field: it is looked at before anything decodes it.
            words = "... or drop an image in its place"
            upload = gr.File(label=words, file_types=["image"], height=110, elem_id="upload")
            look = {"interactive": False, "height": 180, "buttons": [], "elem_id": "uploaded"}
            preview = gr.Image(show_label=False, visible=False, **look)
            share = gr.Slider(0, 1, value=0.5, step=0.05, label="Share of the second")
            words = "The whole way: five images from the first to the second"
            whole = gr.Checkbox(False, label=words, container=False)
            with gr.Row():
                draw_it = gr.Button("Blend", variant="primary", elem_id="blend", min_width=120)
                stop = gr.Button("Stop", elem_id="stop-blend", min_width=80)
            line = gr.HTML(status(), elem_id="blend-status", padding=False)
            with gr.Column(elem_classes="settings"):
                fields = Fields(models, "blend-")
        with gr.Column(**ANSWERED):
            images = gallery("blended", 3)
            gr.Markdown(
                "A blend is `(1 - s) a + s b` of two image embeddings, all images from one seed. Prompts become image "
                "embeddings through the adapter, images through the image encoder."
            )

    def draw(request: gr.Request, prompt: str, other: str, path: str | None, share: float, whole: bool, *values):
        other, drawn = (other or "").strip() if path is None else read_upload(path), []
        if other == "":
            raise CSDiffError("A blend needs two prompts, or a prompt and an image: the second prompt is empty.")
        config = check(settings(models, prompt, 1, *values))
        yield {fields.seed: config.seed}
        for message in stream(lambda report: blend(models, config, other, WAY if whole else (share,), report)):
            if isinstance(message, Drawn):
                drawn.append((message.path, message.caption))
                yield {images: drawn}
                continue
            yield message
            if isinstance(message, Progress) and message.preview:
                yield {images: [*drawn, (message.preview, "still being drawn")]}
        yield _done(drawn)

    def show(path: str | None):
        try:
            image = None if path is None else read_upload(path)
            return status(), gr.Image(image, visible=path is not None)
        except CSDiffError as error:
            return status(str(error), error=True), gr.Image(visible=False)

    upload.change(show, upload, [line, preview], **ASIDE)
    inputs = [first, second, upload, share, whole, *fields.all(), choice.adapter, choice.decoder]
    press([draw_it.click, first.submit, second.submit], stop, line, draw, inputs, [images, fields.seed])
    return upload, fields
