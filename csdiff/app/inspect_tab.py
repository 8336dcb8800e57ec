"""The tab *Look inside*: an adapter or a store, in numbers and plots."""

from __future__ import annotations

import gradio as gr

from csdiff.app.inspection import Inspector
from csdiff.app.presses import on_press
from csdiff.app.tasks import updates
from csdiff.app.theme import status

PLOTS = {
    "projection": "Modality gap",
    "similarities": "Cosine similarities",
    "retrieval": "Retrieval",
}


def inspect_tab(inspector: Inspector) -> None:
    """Builds the tab."""
    with gr.Row(equal_height=False):
        with gr.Column(scale=3, min_width=320):
            path = gr.Textbox(
                label="Folder of an adapter or a store",
                placeholder="runs/mine; empty: the shipped adapter",
                elem_id="path",
                max_length=1000,
            )
            store = gr.Textbox(
                label="Store to measure an adapter on",
                placeholder="empty: the shipped held-out pictures",
                max_length=1000,
            )
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
        plots = {}
        with gr.Row():
            for name in ("projection", "similarities"):
                plots[name] = gr.Plot(
                    label=PLOTS[name], show_label=False, format="png", min_width=320, elem_id=f"plot-{name}"
                )
        plots["retrieval"] = gr.Plot(label=PLOTS["retrieval"], show_label=False, format="png", min_width=320)
        table = gr.HTML(label="Metrics", elem_id="metrics", padding=False)
        with gr.Accordion("Model card", open=False):
            card = gr.Markdown()
        with gr.Accordion("What is in the folder", open=False):
            facts = gr.Textbox(show_label=False, lines=12, max_lines=40, elem_id="facts", buttons=["copy"])

    def run(stopped, path, files, store):
        def show(seen):
            return {
                inside: gr.Column(visible=True),
                title: f"### {seen.title}\n\n{seen.note}",
                **{plot: gr.Plot(seen.figures.get(name), visible=bool(seen.figures)) for name, plot in plots.items()},
                table: gr.HTML(seen.table, visible=bool(seen.table)),
                card: seen.card or "It has none.",
                facts: seen.facts,
            }

        def work(report):
            report(inspector.look(path or "", files, store or "", report))

        yield from updates(work, line, show, lambda: "", stopped)

    outputs = [line, inside, title, *plots.values(), table, card, facts]
    on_press([look.click, path.submit], stop, run, [path, files, store], outputs, line=line, queue="inspection")
