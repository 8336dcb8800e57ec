"""The page: three tabs over one choice of models, a history, and settings that survive a reload."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import urlencode

import gradio as gr

from csdiff.app.drawing import (
    KEPT,
    LARGEST_SEED,
    Drawn,
    blend,
    check,
    create,
    from_record,
    read_upload,
    settings,
    to_record,
)
from csdiff.app.inspection import Inspector, inside_tab
from csdiff.app.models import RAW_TEXT, SHIPPED, Models
from csdiff.app.press import ASIDE, PRIVATE, Report, buttons, failure, press, status
from csdiff.errors import CSDiffError
from csdiff.pipelines.decoders import PRESETS, find_models, resolve_decoder
from csdiff.pipelines.generate import read_settings, redraw_command

MOST = {"seed": LARGEST_SEED, "steps": 200, "guidance": 30.0}
LONGEST_PROMPT = 2000

# Of the forty of docs/pictures.md, four that the adapter draws and the raw text does not.
EXAMPLES = (
    "a laughing face with tears, noto style",
    "a ringing alarm clock, noto style",
    "a blue butterfly, flat style",
    "a glass of red wine, 3d style",
)
WAY = (0.0, 0.25, 0.5, 0.75, 1.0)
# Uploads and images are kept so long, in seconds.
SECONDS_KEPT = 6 * 3600
WORKPLACE = {"equal_height": False, "elem_classes": "workplace"}
ASKED = {"scale": 2, "min_width": 320, "elem_classes": "asked"}
ANSWERED = {"scale": 3, "min_width": 320, "elem_classes": "answered"}


def build_page(models: Models, inspector: Inspector) -> gr.Blocks:
    """The Gradio blocks; everything that someone does stays in their own session."""
    with gr.Blocks(title="csdiff", delete_cache=(SECONDS_KEPT // 6, SECONDS_KEPT)) as page:
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
        page.load(lambda: gr.Dropdown(choices=choice.adapters()), None, choice.adapter, **ASIDE)
        to_blend.click(lambda path: (path, gr.Tabs(selected="blend")), chosen, [upload, tabs], **ASIDE)
    return page


def theme() -> gr.themes.Base:
    """System fonts and one accent; nothing is fetched from elsewhere."""
    return gr.themes.Base(
        primary_hue="indigo",
        secondary_hue="indigo",
        neutral_hue="slate",
        radius_size="md",
        font=("system-ui", "sans-serif"),
        font_mono=("ui-monospace", "monospace"),
    ).set(
        body_text_color_subdued="*neutral_500",
        block_label_text_color="*neutral_600",
        block_title_text_color="*neutral_700",
        body_background_fill="*neutral_50",
        block_label_background_fill="transparent",
        block_label_border_width="0px",
        checkbox_border_color_dark="*neutral_400",
        checkbox_border_color_hover_dark="*neutral_200",
        button_primary_background_fill="*primary_600",
        button_primary_background_fill_hover="*primary_700",
    )


class ModelChoice:
    """The adapter and the decoder that the whole page uses; both take a folder or a hub repository typed in."""

    def __init__(self, models: Models):
        self.start = models.config.adapter or SHIPPED
        decoders = list(dict.fromkeys([models.config.decoder, *PRESETS]))
        typed = {"allow_custom_value": True}
        with gr.Accordion("Models", open=False), gr.Row():
            hint = "Choose one, or type a folder or a hub repository"
            look = {"value": self.start, "label": "Adapter", "elem_id": "adapter"}
            self.adapter = gr.Dropdown(self.adapters(), info=hint, **look, **typed)
            hint = "A preset, a folder saved by diffusers, or a hub repository"
            self.decoder = gr.Dropdown(decoders, value=decoders[0], label="Decoder", info=hint, **typed)
        self.line = gr.HTML("", elem_id="models-status", visible=False)

    def adapters(self) -> list[tuple[str, str]]:
        """Labels and names of the adapters to choose from, those in `runs/` as they are now."""
        runs = [str(path.parent) for path in sorted(Path("runs").glob("*/csdiff.json"))][:50]
        labels = {SHIPPED: "shipped with csdiff", RAW_TEXT: "none: the raw text embedding"}
        return [(labels.get(name, name), name) for name in dict.fromkeys([self.start, SHIPPED, RAW_TEXT, *runs])]

    def follow(self, models: Models, tabs: list[Fields]) -> None:
        """Checks what was chosen, and sets steps and guidance to what the decoder is made for."""

        def check(adapter: str, decoder: str) -> dict:
            try:
                find_models(models.options(adapter, decoder))
                steps, guidance = sampling_of(models, decoder)
            except (CSDiffError, OSError) as error:
                return {self.line: gr.HTML(failure(error), visible=True)}
            numbers = {tab.steps: steps for tab in tabs} | {tab.guidance: guidance for tab in tabs}
            return {self.line: gr.HTML(visible=False), **numbers}

        chosen, targets = [self.adapter, self.decoder], [part for tab in tabs for part in (tab.steps, tab.guidance)]
        # A hub can be slow to answer: what is chosen meanwhile is looked at after it.
        gr.on(
            [part.input for part in chosen], check, chosen, [self.line, *targets], trigger_mode="always_last",
            **ASIDE | {"queue": True},
        )  # fmt: skip


def sampling_of(models: Models, decoder: str | None) -> tuple[int, float]:
    """Steps and guidance that a decoder is made for, as far as the sliders go."""
    options = models.options(decoder=decoder)
    options = resolve_decoder(options.decoder).sampling(options)
    return min(options.steps, MOST["steps"]), min(max(options.guidance, 1.0), MOST["guidance"])


class Fields:
    """Negative prompt, seed, steps and guidance of one tab."""

    def __init__(self, models: Models, name: str = ""):
        steps, guidance = sampling_of(models, None)
        hint = "what the images should not show"
        self.negative = gr.Textbox("", label="Negative prompt", placeholder=hint, max_length=LONGEST_PROMPT)
        with gr.Row():
            self.seed = gr.Number(0, label="Seed", min_width=120, elem_id=f"{name}seed", precision=0)
            self.random = gr.Checkbox(False, label="New each time", min_width=160)
        with gr.Row():
            place = {"min_width": 150, "elem_id": f"{name}steps"}
            self.steps = gr.Slider(1, MOST["steps"], value=steps, step=1, label="Steps", **place)
            self.guidance = gr.Slider(1, MOST["guidance"], value=guidance, step=0.5, label="Guidance", min_width=150)

    def asked(self, choice: ModelChoice) -> list:
        """What `settings` takes after the prompt and the number of images."""
        numbers = [self.negative, self.seed, self.steps, self.guidance]
        return [*numbers, choice.adapter, choice.decoder, self.random]


def gallery(name: str, columns: int, **more) -> gr.Gallery:
    """Images at their own size, to download."""
    return gr.Gallery(
        show_label=False, elem_id=name, elem_classes="pictures", columns=columns, fit_columns=False, height="auto",
        object_fit="contain", format="png", buttons=["download", "fullscreen"], interactive=False, **more,
    )  # fmt: skip


def _create_tab(page: gr.Blocks, models: Models, choice: ModelChoice) -> tuple[Fields, gr.State, gr.Button]:
    """A prompt to images, beside what the same prompt gives without the adapter."""
    history, chosen = gr.State([]), gr.State(None)
    with gr.Row(**WORKPLACE):
        with gr.Column(**ASKED):
            # With one line, Enter draws and Shift+Enter makes a new line.
            prompt = gr.Textbox(
                "", label="Prompt", placeholder=EXAMPLES[0], max_lines=6, max_length=LONGEST_PROMPT, elem_id="prompt",
                autofocus=True,
            )  # fmt: skip
            gr.Examples([[text] for text in EXAMPLES], [prompt], label="For example", **PRIVATE)
            row = *_, line = buttons("Draw", "draw")
            with gr.Column(elem_classes="settings"):
                words = "Compare with raw text and a ridge map (draws two more images)"
                compare = gr.Checkbox(False, label=words, container=False, elem_id="compare")
                count = gr.Slider(1, models.config.max_images, value=1, step=1, label="Images", elem_id="count")
                fields = Fields(models)
                with gr.Accordion("Settings of an image, and a link", open=False):
                    words = "Drop a PNG that csdiff drew: its settings come back"
                    dropped = gr.File(label=words, file_types=[".png"], height=150, elem_id="dropped")
                    words = "A link with the settings of the last drawing"
                    link = gr.Textbox(label=words, interactive=False, buttons=["copy"], elem_id="link")
        with gr.Column(**ANSWERED):
            images = gallery("images", 2)
            with gr.Column(elem_id="beside"):
                strip = gallery("strip", 3)
                gr.Markdown("One seed; only the map from text to image embedding differs.")
            look = {"elem_id": "command", "interactive": False, "lines": 2, "buttons": ["copy"]}
            command = gr.Textbox(label="The same on the command line", visible=False, **look)
            with gr.Column(visible=False) as past:
                gr.Markdown("### Drawn on this page\nClick an image, then choose what to do with it.")
                earlier = gallery("history", 6, allow_preview=False)
                with gr.Row():
                    small = {"size": "sm", "interactive": False}
                    use_seed = gr.Button("Use this seed", elem_id="use-seed", **small)
                    use_all = gr.Button("Use its settings", elem_id="use-settings", **small)
                    to_blend = gr.Button("Send to Blend", elem_id="to-blend", **small)
    asked = [prompt, count, *fields.asked(choice)]
    own = dict(zip(KEPT, asked, strict=False))
    at_first = tuple(part.value for part in own.values())

    def draw(report: Report, request: gr.Request, compares: bool, so_far: list, *values) -> None:
        config, drawn, compared = check(settings(models, *values)), [], []
        seeds = range(config.seed, config.seed + config.num_images)
        again = redraw_command(config, config.prompt, [(config.prompt[0], seed) for seed in seeds])
        report(
            {
                images: [],
                strip: [],
                command: gr.Textbox(again, visible=True),
                fields.seed: config.seed,
                link: _link(request, to_record(config)),
            }
        )

        def show(message) -> None:
            if not isinstance(message, Drawn):
                report(message)
            elif message.place != "images":
                report({strip: _with(compared, message)})
            else:
                report({images: _with(drawn, message)})
                if isinstance(message.image, str):
                    every = [*reversed(drawn), *so_far]
                    report({history: every, earlier: every, past: gr.Column(visible=True)})

        create(models, config, compares, show)
        report(_done(drawn))

    def shown(record: dict) -> dict:
        """Settings as values of the fields; what they leave open stays as it is."""
        given, most = from_record(record), MOST | {"num_images": models.config.max_images}
        return {own[name]: min(value, most[name]) if name in most else value for name, value in given.items()}

    def take(path: str | None) -> dict:
        """The fields as the settings in a PNG say; without one, what was said of the one before goes."""
        if path is None:
            return {line: status()}
        try:
            record = read_settings(path)
        except CSDiffError as error:
            return {line: failure(str(error).replace(path, Path(path).name))}
        given = shown(record)
        more = [
            f"{own[name].label} {value}" for name, value in from_record(record).items() if value != given[own[name]]
        ]
        notes = [f"{', '.join(more)}: more than this page takes, its most stands there instead."] if more else []
        return {line: status("These are the settings of that image.", notes), **given}

    def restore(request: gr.Request, remembered: dict, *now) -> dict:
        """The settings of a link or of the last visit, unless someone has begun to type."""
        given = dict(request.query_params) or remembered
        return shown(given) if given and now == at_first else {prompt: gr.skip()}

    def choose(so_far: list, event: gr.SelectData) -> list:
        return [so_far[event.index][0], *[gr.Button(interactive=True)] * 3]

    outputs = [images, strip, command, fields.seed, link, history, earlier, past]
    press(row, [prompt], draw, [compare, history, *asked], outputs)
    # Every click counts, also while the one before is looked at.
    earlier.select(choose, history, [chosen, use_seed, use_all, to_blend], trigger_mode="multiple", **ASIDE)
    use_all.click(take, chosen, [line, *own.values()], **ASIDE)
    dropped.change(take, dropped, [line, *own.values()], **ASIDE)
    use_seed.click(lambda path: read_settings(path)["seed"], chosen, fields.seed, **ASIDE)
    # Settings survive a reload in the browser's own memory, without a word to the server; those in a link come first.
    kept = gr.BrowserState({}, storage_key="csdiff-settings", secret="csdiff")
    page.load(restore, [kept, *own.values()], [*own.values()], **ASIDE)
    keep = f"(...values) => Object.fromEntries({list(own)}.map((name, place) => [name, values[place]]))"
    gr.on([part.change for part in own.values()], None, [*own.values()], kept, js=keep, **ASIDE)
    return fields, chosen, to_blend


def _with(drawn: list, message: Drawn) -> list:
    """What a gallery shows with one more image; those that are finished stay in `drawn`."""
    shown = [*drawn, (message.image, message.caption)]
    if isinstance(message.image, str):
        drawn[:] = shown
    return shown


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
            words = "An image in place of the second prompt"
            upload = gr.File(label=words, file_types=["image"], height=150, elem_id="upload")
            look = {"interactive": False, "height": 180, "buttons": [], "elem_id": "uploaded"}
            preview = gr.Image(show_label=False, visible=False, **look)
            share = gr.Slider(0, 1, value=0.5, step=0.05, label="Share of the second")
            words = "The whole way: five images from the first to the second"
            whole = gr.Checkbox(False, label=words, container=False)
            row = *_, line = buttons("Blend", "blend")
            with gr.Column(elem_classes="settings"):
                fields = Fields(models, "blend-")
        with gr.Column(**ANSWERED):
            images = gallery("blended", 3)
            gr.Markdown(
                "A blend is `(1 - s) a + s b` of two image embeddings, all images from one seed. Prompts become image "
                "embeddings through the adapter, images through the image encoder."
            )

    def draw(report: Report, request, prompt: str, other: str, path: str | None, share: float, whole: bool, *values):
        other, drawn = (other or "").strip() if path is None else read_upload(path), []
        if other == "":
            raise CSDiffError("A blend needs two prompts, or a prompt and an image: the second prompt is empty.")
        config = check(settings(models, prompt, 1, *values))
        report({fields.seed: config.seed})

        def show(message) -> None:
            report({images: _with(drawn, message)} if isinstance(message, Drawn) else message)

        blend(models, config, other, WAY if whole else (share,), show)
        report(_done(drawn))

    def show(path: str | None):
        try:
            image = None if path is None else read_upload(path)
            return status(), gr.Image(image, visible=path is not None), gr.Textbox(visible=path is None)
        except CSDiffError as error:
            return failure(error), gr.Image(visible=False), gr.skip()

    # Changes are answered one after the other, the last one last.
    upload.change(show, upload, [line, preview, second], **ASIDE)
    inputs = [first, second, upload, share, whole, *fields.asked(choice)]
    press(row, [first, second], draw, inputs, [images, fields.seed])
    return upload, fields
