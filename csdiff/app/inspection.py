"""The tab *Look inside*: facts on an adapter or a store, metrics beside the baselines, plots of the modality gap."""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import gradio as gr
import matplotlib
import torch

from csdiff.app.drawing import adapter_name
from csdiff.app.models import Models, fitted_maps
from csdiff.app.press import Progress, Report, buttons, press
from csdiff.cli.info import InfoConfig, as_text, inspect_path
from csdiff.embeddings import EmbeddingStore
from csdiff.errors import CSDiffError
from csdiff.evaluation.baselines import cross_fitted_predictions
from csdiff.evaluation.data import HeldOutPairs, check_fits, open_store, predict, read_pairs
from csdiff.evaluation.embedding_metrics import embedding_metrics
from csdiff.evaluation.metrics import BASELINES, metric_rows
from csdiff.evaluation.plots import plot_projection, plot_retrieval, plot_similarities
from csdiff.pipelines.decoders import AdapterCard, read_adapter_card
from csdiff.resources import assets_dir

MOST_ROWS = 4000
PLOTS = ("gap", "projection", "similarities", "retrieval")
# What adapters and stores are made of; nothing else is of use here, and pickles are not even kept.
SUFFIXES = frozenset((".json", ".safetensors", ".npy", ".parquet", ".md"))
SHARD = re.compile(r"(?P<folder>img_emb|text_emb|text_states|text_mask|image_tokens|metadata)_\d+\.(npy|parquet)$")
# Plots on the page, whose colours are turned round on a dark ground (page.css): no one grey can be read on both.
GREY = "#475569"
STYLE = dict.fromkeys(
    ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), GREY
) | dict.fromkeys(("figure.facecolor", "axes.facecolor"), "none")


@dataclass
class Look:
    """What the page shows of a folder; `table` and `figures` stay empty where there is nothing to measure on."""

    title: str
    facts: str
    card: str = ""
    note: str = ""
    table: str = ""
    figures: dict = field(default_factory=dict)


class Inspector:
    """Looks at folders one at a time; keeps the embedded held-out images of the shipped data.

    Args:
        models: The device, and the turn of whoever uses it.
        held_out: Captioned images that adapters for the shipped encoders are measured on; by default the shipped ones.
    """

    def __init__(self, models: Models, held_out: Path | None = None):
        self.models, self.device = models, str(models.device)
        self.held_out = held_out or assets_dir() / "data" / "combination.parquet"
        self.resources = ExitStack()
        self._pairs: dict[str, HeldOutPairs] = {}

    def look(self, path: str, files: Sequence[str] | None, store: str, report: Report) -> Look:
        """Looks at a folder, or at uploaded files.

        Args:
            path: A folder; empty takes the files, and without any the shipped adapter.
            files: Uploaded files of an adapter or a store.
            store: A store to measure an adapter on; empty takes the shipped held-out images where they fit.
            report: Is told of progress.

        Raises:
            CSDiffError: Nothing there, damaged, or data that does not fit.
        """
        path, store = path.strip(), store.strip()
        with tempfile.TemporaryDirectory(prefix="csdiff-upload-") as uploaded, self.models.turn(report):
            folder = Path(path).expanduser() if path else assets_dir() / "adapter"
            if files and not path:
                folder = gather(files, Path(uploaded))
            report(Progress("Reading"))
            facts = inspect_path(InfoConfig(path=str(folder)))
            seen = Look(facts["kind"].capitalize(), as_text(facts).replace(uploaded, "uploaded files"))
            try:
                if facts["problems"] or facts["kind"] not in ("adapter", "run", "checkpoint", "store"):
                    raise CSDiffError("Plots and metrics are made of adapters and stores.")
                self._measure(seen, folder, facts["kind"] == "store", store, report)
            except CSDiffError as error:
                seen.note = str(error)
            return seen

    @torch.no_grad()
    def _measure(self, seen: Look, folder: Path, is_store: bool, store: str, report: Report) -> None:
        if is_store:
            seen.title, predictions, maps = "Embedding store", {}, {}
            pairs = read_pairs("the store", EmbeddingStore.open(folder), MOST_ROWS)
            report(Progress("Measuring", 1, 2))
            note = (
                f"Measured on {len(pairs.rows):,} of {len(pairs.store):,} rows. No adapter is involved: the "
                "predictions are those of a ridge map, fitted to four fifths of the images and applied to the rest."
            )
        else:
            card, readme = read_adapter_card(folder), folder / "README.md"
            seen.title += f": {card.kind}, {adapter_name(card)}"
            seen.card = plain_markdown(readme.read_text("utf-8", errors="replace")) if readme.is_file() else ""
            pairs = self._held_out(card, store, report)
            report(Progress("Measuring", 1, 2))
            predictions = {adapter_name(card): predict(card, pairs, self.device)}
            note = f"Measured on {len(pairs.rows):,} captions of {pairs.pictures:,} images: {pairs.source}."
            maps, fitted_to = fitted_maps(card, card.metadata)
            on = dict.fromkeys(("mean_shift", "ridge"), "these images, across folds") | dict.fromkeys(maps, fitted_to)
            note += f" Fitted: mean shift to {on['mean_shift']}; ridge to {on['ridge']}."
        fitted = cross_fitted_predictions(pairs.text, pairs.image, pairs.image_ids)
        fitted |= {name: fitted_map.embed(pairs.text.float()) for name, fitted_map in maps.items()}
        baselines = {BASELINES[name]: prediction for name, prediction in fitted.items()}
        columns = {
            name: embedding_metrics(prediction, pairs.image, pairs.text, pairs.image_ids)
            for name, prediction in {**predictions, **baselines}.items()
        }
        rows = [["metric (better)", *columns], ["---", *["--:"] * len(columns)]]
        for label, better, *cells in metric_rows(columns):
            rows.append([f"{label} ({better})" if better else label, *cells])
        seen.table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
        report(Progress("Plotting", 3, 4))
        shown = next(iter(predictions.values()), baselines["ridge"])
        with matplotlib.rc_context(STYLE):
            seen.figures = {
                "gap": plot_projection(pairs.text, pairs.image, shown, "gap"),
                "projection": plot_projection(pairs.text, pairs.image, shown),
                "similarities": plot_similarities(pairs.text, pairs.image, shown, pairs.image_ids),
                "retrieval": plot_retrieval({**baselines, **predictions}, pairs.image, pairs.image_ids),
            }
        for figure in seen.figures.values():
            # letters that can be read at the page's width
            figure.set_size_inches(figure.get_size_inches() * 0.75)
            figure.set_dpi(200)
        seen.note = note

    def _held_out(self, card: AdapterCard, store: str, report: Report) -> HeldOutPairs:
        if store:
            opened = EmbeddingStore.open(Path(store).expanduser())
            check_fits(card, opened, store)
            return read_pairs(store, opened, MOST_ROWS)
        if (card.metadata.get("image_encoder") or {}).get("id") != "tiny-clip":
            raise CSDiffError(
                "No plots and metrics: this adapter belongs to other encoders than the shipped images; give a store."
            )
        key = str(card.metadata.get("text_encoder"))
        if key not in self._pairs:
            report(Progress("Embedding the shipped held-out images, once"))
            opened, _ = self.resources.enter_context(open_store(str(self.held_out), card, self.device, "train"))
            self._pairs[key] = read_pairs("the shipped held-out images", opened, MOST_ROWS)
        pairs = self._pairs[key]
        check_fits(card, pairs.store, pairs.source)
        return pairs


def gather(files: Sequence[str], target: Path) -> Path:
    """Copies uploaded files into a folder, shards of a store into the folders of their names.

    Raises:
        CSDiffError: none that an adapter or a store is made of.
    """
    kept = [Path(file) for file in files if Path(file).suffix.lower() in SUFFIXES]
    if not kept:
        raise CSDiffError(
            "Expected the files of an adapter or a store (*.json, *.safetensors, *.npy, *.parquet), found "
            f"{', '.join(Path(file).name for file in files[:4])}."
        )
    for file in kept:
        shard = SHARD.match(file.name)
        folder = target / shard["folder"] if shard else target
        folder.mkdir(exist_ok=True)
        shutil.copyfile(file, folder / file.name)
    return target


def plain_markdown(card: str) -> str:
    """A model card without its front matter, pictures and HTML: it may come from anywhere."""
    card = re.sub(r"\A---\n.*?\n---\n", "", card, flags=re.DOTALL)
    return card.replace("![", "[").replace("<", "&lt;")


def inside_tab(inspector: Inspector) -> None:
    """Fields, and an adapter or a store in numbers and plots."""
    with gr.Row(equal_height=False):
        with gr.Column(scale=3, min_width=320):
            hint = "runs/mine; empty: the shipped adapter"
            path = gr.Textbox(label="Folder of an adapter or a store", placeholder=hint, elem_id="path")
            hint = "empty: the shipped held-out images"
            store = gr.Textbox(label="Store to measure an adapter on", placeholder=hint)
            row = buttons("Look", "look")
        with gr.Column(scale=2, min_width=320):
            files = gr.File(label="... or drop its files here", file_count="multiple", height=180, elem_id="files")
    with gr.Column(visible=False, elem_id="inside") as inside:
        title = gr.Markdown()
        with gr.Row():
            look_of = {"show_label": False, "format": "png", "elem_classes": "plot", "min_width": 400}
            plots = {name: gr.Plot(elem_id=f"plot-{name}", **look_of) for name in PLOTS}
        table = gr.Markdown(elem_id="metrics", buttons=["copy"])
        with gr.Accordion("Model card", open=False) as about:
            card = gr.Markdown()
        with gr.Accordion("What is in the folder", open=False):
            facts = gr.Textbox(show_label=False, lines=12, max_lines=40, elem_id="facts", buttons=["copy"])

    def work(report: Report, request: gr.Request, path: str, files: list[str] | None, store: str) -> None:
        seen = inspector.look(path, files, store, report)
        place = f"`{path.strip()}`" if path.strip() else "uploaded files" if files else "shipped with csdiff"
        report(
            {
                inside: gr.Column(visible=True),
                title: f"### {seen.title} ({place})\n\n{seen.note}",
                **{plot: gr.Plot(seen.figures.get(name), visible=bool(seen.figures)) for name, plot in plots.items()},
                table: seen.table,
                about: gr.Accordion(visible=bool(seen.card)),
                card: seen.card,
                facts: seen.facts,
            }
        )
        report("")

    outputs = [inside, title, *plots.values(), table, about, card, facts]
    press(row, [path], work, [path, files, store], outputs)
