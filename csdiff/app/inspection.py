"""A look inside an adapter or a store: facts, metrics beside the baselines, and plots of the modality gap."""

from __future__ import annotations

import html
import re
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from csdiff.app.drawing import adapter_name
from csdiff.app.work import Line, Progress, Report
from csdiff.cli.info import InfoConfig, as_text, inspect_path
from csdiff.errors import CSDiffError
from csdiff.evaluation.baselines import cross_fitted_predictions
from csdiff.evaluation.data import HeldOutPairs, check_fits, open_store, read_pairs
from csdiff.evaluation.embedding_metrics import embedding_metrics
from csdiff.evaluation.metrics import BASELINES, metric_rows
from csdiff.evaluation.plots import plot_projection, plot_retrieval, plot_similarities
from csdiff.evaluation.predictions import predict
from csdiff.pipelines.decoders import AdapterCard, read_adapter_card
from csdiff.resources import assets_dir

MOST_ROWS = 4000
ADAPTERS = ("adapter", "run", "checkpoint")
# What adapters and stores are made of; nothing else is of use here, and pickles are not even kept.
SUFFIXES = frozenset((".json", ".safetensors", ".npy", ".parquet", ".md"))
SHARD = re.compile(r"(?P<folder>img_emb|text_emb|text_states|text_mask|image_tokens|metadata)_\d+\.(npy|parquet)$")
MOST_FILES = 200


@dataclass(frozen=True)
class Look:
    """What the page shows.

    Attributes:
        title: What it is.
        facts: As `csdiff info` prints them.
        card: The model card, in Markdown; empty for a store.
        table: Metrics as an HTML table; empty where there is nothing to measure on.
        note: What the metrics and the plots were computed from, or why there are none.
        figures: matplotlib figures: gap, projection, similarities, retrieval.
    """

    title: str
    facts: str
    card: str = ""
    table: str = ""
    note: str = ""
    figures: dict = field(default_factory=dict)


class Inspector:
    """Looks at folders one at a time; keeps the embedded held-out pictures of the shipped data.

    Args:
        device: Where adapters run.
        held_out: Captioned pictures that adapters for the shipped encoders are measured on; by default the shipped
            ones.
        line: Where to wait for a turn: loading models is not safe in two threads at once.
    """

    def __init__(self, device: str = "cpu", line: Line | None = None, held_out: Path | None = None):
        self.device = device
        self.held_out = held_out or assets_dir() / "data" / "combination.parquet"
        self._resources = ExitStack()
        self._held_out: dict[str, HeldOutPairs] = {}
        self._line = line or Line()

    def close(self) -> None:
        """Removes the files of embedded pictures."""
        self._resources.close()

    def look(self, path: str, files: Sequence[str] | None, store: str, report: Report) -> Look:
        """Looks at a folder, or at uploaded files.

        Args:
            path: A folder; empty takes the files, and without any the shipped adapter.
            files: Uploaded files of an adapter or a store.
            store: A store to measure an adapter on; empty takes the shipped held-out pictures where they fit.
            report: Is told of progress.

        Raises:
            CSDiffError: Nothing there, damaged, or data that does not fit.
        """
        path = path.strip()
        folder, uploaded = None, False
        try:
            if path:
                folder = Path(path).expanduser()
            elif files:
                folder, uploaded = gather(files), True
            else:
                folder = assets_dir() / "adapter"
            report(Progress("Reading"))
            facts = inspect_path(InfoConfig(path=str(folder)))
            kind = facts["kind"]
            text = as_text(facts).replace(str(folder), "uploaded files" if uploaded else str(folder))
            with self._line.turn(report):
                if kind in ADAPTERS and not facts["problems"]:
                    return self._adapter(folder, kind, text, store.strip(), report)
                if kind == "store" and not facts["problems"]:
                    return self._store(folder, text, report)
            return Look(kind.capitalize(), text, note="Plots and metrics are made of adapters and stores.")
        finally:
            if uploaded and folder:
                shutil.rmtree(folder, ignore_errors=True)

    def _adapter(self, folder: Path, kind: str, facts: str, store: str, report: Report) -> Look:
        card = read_adapter_card(folder)
        readme = folder / "README.md"
        text = plain_markdown(readme.read_text("utf-8", errors="replace")) if readme.is_file() else ""
        title = f"{kind.capitalize()}: {card.kind}, {adapter_name(card)}"
        try:
            pairs = self._pairs(card, store, report)
        except CSDiffError as error:
            return Look(title, facts, text, note=str(error))
        report(Progress("Measuring", 1, 2))
        name = adapter_name(card)
        prediction = predict(card, pairs, self.device)
        table, baselines = _measure(pairs, {name: prediction})
        report(Progress("Plotting", 3, 4))
        note = f"Measured on {len(pairs.rows):,} captions of {pairs.pictures:,} pictures: {pairs.source}."
        return Look(title, facts, text, table, note, _figures(pairs, prediction, {**baselines, name: prediction}))

    def _store(self, folder: Path, facts: str, report: Report) -> Look:
        from csdiff.embeddings import EmbeddingStore

        try:
            pairs = read_pairs("the store", EmbeddingStore.open(folder), "store", MOST_ROWS)
        except CSDiffError as error:
            return Look("Embedding store", facts, note=str(error))
        report(Progress("Measuring", 1, 2))
        table, baselines = _measure(pairs, {})
        report(Progress("Plotting", 3, 4))
        note = (
            f"Measured on {len(pairs.rows):,} of {len(pairs.store):,} rows. No adapter is involved: the predictions "
            "are those of a ridge map, fitted to four fifths of the pictures and applied to the rest."
        )
        return Look("Embedding store", facts, "", table, note, _figures(pairs, baselines["ridge"], baselines))

    def _pairs(self, card: AdapterCard, store: str, report: Report) -> HeldOutPairs:
        if store:
            from csdiff.embeddings import EmbeddingStore

            opened = EmbeddingStore.open(Path(store).expanduser())
            check_fits(card, opened, store, "store")
            return read_pairs(store, opened, "store", MOST_ROWS)
        if (card.metadata.get("image_encoder") or {}).get("id") != "tiny-clip":
            raise CSDiffError(
                "No plots and metrics: this adapter belongs to other encoders than the shipped pictures; give a store."
            )
        key = str(card.metadata.get("text_encoder"))
        if key not in self._held_out:
            report(Progress("Embedding the shipped held-out pictures, once"))
            opened = open_store(str(self.held_out), "data", card, self.device, progress=False, split="train")
            opened = self._resources.enter_context(opened)
            self._held_out[key] = read_pairs("the shipped held-out pictures", opened, "data", MOST_ROWS)
        pairs = self._held_out[key]
        check_fits(card, pairs.store, pairs.source, "store")
        return pairs


def _measure(pairs: HeldOutPairs, predictions: Mapping) -> tuple[str, dict]:
    """The table, and the baselines' predictions by the names that plots know."""
    fitted = cross_fitted_predictions(pairs.text, pairs.image, pairs.image_ids)
    baselines = {BASELINES[name]: prediction for name, prediction in fitted.items()}
    columns = {
        name: embedding_metrics(prediction, pairs.image, pairs.text, pairs.image_ids)
        for name, prediction in {**predictions, **baselines}.items()
    }
    return metrics_table(columns), baselines


def _figures(pairs: HeldOutPairs, prediction, curves: Mapping) -> dict:
    figures = {
        "gap": plot_projection(pairs.text, pairs.image, prediction, "gap"),
        "projection": plot_projection(pairs.text, pairs.image, prediction),
        "similarities": plot_similarities(pairs.text, pairs.image, prediction, pairs.image_ids),
        "retrieval": plot_retrieval(curves, pairs.image, pairs.image_ids),
    }
    for figure in figures.values():
        _for_page(figure)
    return figures


def _for_page(figure) -> None:
    """Letters that can be read at the page's width, and a grey that can be read on white and on black."""
    from matplotlib.patches import Patch
    from matplotlib.text import Text

    figure.set_size_inches(figure.get_size_inches() * 0.75)
    figure.set_dpi(200)
    figure.patch.set_alpha(0)
    for axis in figure.axes:
        axis.patch.set_alpha(0)
        axis.tick_params(colors=_GREY)
        for spine in axis.spines.values():
            spine.set_edgecolor(_GREY)
    for text in figure.findobj(Text):
        text.set_color(_GREY)
    for legend in figure.findobj(lambda artist: type(artist).__name__ == "Legend"):
        next(iter(legend.findobj(Patch))).set_alpha(0)


_GREY = "#7d8594"


def metrics_table(columns: Mapping[str, Mapping]) -> str:
    """Metrics by column as an HTML table."""
    head = "".join(f"<th>{html.escape(name)}</th>" for name in columns)
    lines = [f"<thead><tr><th>metric</th><th>better</th>{head}</tr></thead>"]
    for label, better, *values in metric_rows(columns):
        cells = "".join(f"<td>{html.escape(value)}</td>" for value in values)
        lines.append(f"<tr><th>{html.escape(label)}</th><td>{better}</td>{cells}</tr>")
    return f"<div class='metrics'><table>{''.join(lines)}</table></div>"


def gather(files: Sequence[str]) -> Path:
    """Copies uploaded files into a new folder, shards of a store into the folders of their names.

    Raises:
        CSDiffError: too many files, or none that an adapter or a store is made of.
    """
    if len(files) > MOST_FILES:
        raise CSDiffError(
            f"Expected the files of an adapter or a store, at most {MOST_FILES}, found {len(files)}; type the path of "
            "a larger one."
        )
    kept = [Path(file) for file in files if Path(file).suffix.lower() in SUFFIXES]
    if not kept:
        names = ", ".join(Path(file).name for file in files[:4])
        raise CSDiffError(
            f"Expected the files of an adapter or a store (*.json, *.safetensors, *.npy, *.parquet), found {names}."
        )
    target = Path(tempfile.mkdtemp(prefix="csdiff-upload-"))
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
