"""Draw the figures of docs/how-it-works.md with the shipped models and data: python scripts/how_it_works_figures.py

The two clouds before and after the adapter, the similarities within and between them, and the road of one caption to
its picture. Prints the numbers that the page quotes. Under a minute on one core.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib
import torch
import torch.nn.functional as F
from diffusers import KandinskyV22Pipeline
from images import ASSETS, ROOT, load_split, to_pil
from PIL import Image
from torch import Tensor

from csdiff import AutoAdapter, CSDiffPriorPipeline
from csdiff.embeddings import load_image_encoder, load_text_encoder

matplotlib.use("Agg")
from matplotlib import pyplot as plt

COLOURS = {"image": "#8a949e", "text": "#c8442b", "adapted": "#1f6fb4", "ink": "#22272e"}
PROMPT = "a red apple, 3d style"


@torch.inference_mode()
def embed(captions: list[str], pictures: list[Image.Image]) -> dict[str, Tensor]:
    """Unit embeddings `(N, D)` of the pictures, of the captions, and of the captions through the adapter."""
    adapter = AutoAdapter.from_pretrained(ASSETS / "adapter")
    texts, images = load_text_encoder("tiny-clip"), load_image_encoder("tiny-clip")
    parts = {"image": [], "text": [], "adapted": []}
    for start in range(0, len(captions), 64):
        text = texts.encode(captions[start : start + 64])
        parts["text"].append(text.embeds)
        parts["adapted"].append(adapter.embed(text.embeds, text.states, text.mask))
        parts["image"].append(images.encode(pictures[start : start + 64]).embeds)
    return {name: F.normalize(torch.cat(rows).float(), dim=1) for name, rows in parts.items()}


def gap(x: Tensor, y: Tensor) -> float:
    return float((x.mean(0) - y.mean(0)).norm())


def draw_clouds(clouds: dict[str, Tensor], path: Path) -> None:
    """Across: from the texts' centroid to the images'. Upwards: the first principal component of what is left."""
    across = F.normalize(clouds["image"].mean(0) - clouds["text"].mean(0), dim=0)
    both = torch.cat([clouds["image"], clouds["text"]])
    rest = both - both.mean(0)
    rest = rest - torch.outer(rest @ across, across)
    up = torch.linalg.svd(rest, full_matrices=False)[2][0]
    axes = torch.stack([across, up], dim=1)
    flat = {name: (rows @ axes).numpy() for name, rows in clouds.items()}
    figure, panels = plt.subplots(1, 2, figsize=(9.6, 4.2), sharex=True, sharey=True, layout="constrained")
    for panel, name, label in (
        (panels[0], "text", "text embeddings, as they are"),
        (panels[1], "adapted", "the same through the adapter"),
    ):
        for start, end in zip(flat["image"][::40], flat[name][::40], strict=True):
            panel.plot(*zip(start, end, strict=True), color=COLOURS["ink"], linewidth=0.6, alpha=0.7, zorder=3)
        panel.scatter(*flat["image"].T, s=9, color=COLOURS["image"], label="image embeddings", linewidths=0)
        panel.scatter(*flat[name].T, s=9, color=COLOURS[name], label=label, linewidths=0, alpha=0.75)
        panel.set_title(f"centroid gap {gap(clouds['image'], clouds[name]):.2f}", fontsize=10)
        panel.legend(loc="upper center", bbox_to_anchor=(0.5, -0.02), ncols=2, frameon=False, fontsize=9)
        panel.set(xticks=[], yticks=[])
        panel.set_aspect("equal")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def similarities(x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """Cosines of different rows within x, within y, and between x and y, and of the pairs."""
    off = ~torch.eye(len(x), dtype=torch.bool)
    return {"x": (x @ x.T)[off], "y": (y @ y.T)[off], "others": (x @ y.T)[off], "pairs": (x * y).sum(1)}


def draw_similarities(clouds: dict[str, Tensor], path: Path) -> None:
    figure, panels = plt.subplots(1, 2, figsize=(9.6, 3.4), sharex=True, sharey=True, layout="constrained")
    for panel, name, title in ((panels[0], "text", "before"), (panels[1], "adapted", "after the adapter")):
        found = similarities(clouds[name], clouds["image"])
        lines = (
            ("y", "two images", COLOURS["image"], "-"),
            ("x", "two captions", COLOURS[name], "-"),
            ("others", "a caption and another's image", COLOURS["ink"], ":"),
            ("pairs", "a caption and its image", COLOURS["ink"], "-"),
        )
        for key, label, colour, style in lines:
            height, edges = torch.histogram(found[key], bins=80, range=(-0.7, 1.0), density=True)
            panel.plot((edges[1:] + edges[:-1]) / 2, height, style, color=colour, label=label, linewidth=1.6)
            print(f"{title}: {label}: mean cosine {found[key].mean():.2f}")
        panel.set_title(title, fontsize=10)
        panel.set_xlabel("cosine")
        panel.set_yticks([])
        panel.legend(frameon=False, fontsize=8, loc="upper left")
        panel.spines[["top", "right", "left"]].set_visible(False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def denoise(embeds: dict[str, Tensor], show: tuple[int, ...], steps: int = 25) -> list[Image.Image]:
    """The picture after some of the decoder's steps, the last of them the finished one."""
    decoder = KandinskyV22Pipeline.from_pretrained(ASSETS / "decoder", dtype=torch.float32)
    decoder.set_progress_bar_config(disable=True)
    latents: list[Tensor] = []

    def keep(pipe, step, timestep, inputs):
        if step + 1 in show:
            latents.append(inputs["latents"])
        return inputs

    decoder(
        **embeds, height=128, width=128, num_inference_steps=steps, guidance_scale=3.0,
        generator=torch.Generator().manual_seed(0), output_type="latent", callback_on_step_end=keep,
    )  # fmt: skip
    with torch.inference_mode():
        pixels = decoder.movq.decode(torch.cat(latents), force_not_quantize=True).sample
    pixels = (pixels.clamp(-1, 1) + 1).mul(127.5).round().byte().permute(0, 2, 3, 1).numpy()
    return [Image.fromarray(picture) for picture in pixels]


def draw_road(path: Path) -> None:
    """One caption: its text embedding, the embedding that the adapter makes of it, and the decoder at work."""
    prior = CSDiffPriorPipeline.from_pretrained(ASSETS / "adapter")
    prior.set_progress_bar_config(disable=True)
    text = load_text_encoder("tiny-clip").encode([PROMPT])
    output = prior(PROMPT)
    embeds = {"image_embeds": output.image_embeds, "negative_image_embeds": output.negative_image_embeds}
    show = (5, 10, 15, 25)
    squares = [(text.embeds, "text embedding"), (output.image_embeds, "image embedding")]
    figure, panels = plt.subplots(1, 7, figsize=(12, 2.3), layout="constrained", width_ratios=[1.3, *[1] * 6])
    panels[0].text(0.5, 0.5, PROMPT.replace(", ", ",\n"), ha="center", va="center", fontsize=12, style="italic")
    panels[0].set_title("caption", fontsize=10)
    for panel, (rows, title) in zip(panels[1:3], squares, strict=True):
        square = rows[0].float().reshape(16, -1)
        limit = float(square.abs().quantile(0.98))
        panel.imshow(square, cmap="RdBu", vmin=-limit, vmax=limit)
        panel.set_title(title, fontsize=10)
    for panel, picture, step in zip(panels[3:], denoise(embeds, show), show, strict=True):
        panel.imshow(picture)
        panel.set_title(f"step {step}" if step != show[-1] else "picture", fontsize=10)
    for panel in panels:
        panel.set(xticks=[], yticks=[])
        panel.set_box_aspect(1)
        panel.spines[:].set_visible(False)
    names = ("text encoder", "adapter", "decoder", "", "", "")
    for panel, name in zip(panels[1:], names, strict=True):
        panel.annotate(
            "", xy=(-0.02, 0.5), xytext=(-0.14, 0.5), xycoords="axes fraction",
            arrowprops={"arrowstyle": "-|>", "color": COLOURS["ink"]}, annotation_clip=False,
        )  # fmt: skip
        panel.text(-0.08, -0.12, name, transform=panel.transAxes, ha="center", fontsize=9, color=COLOURS["adapted"])
    figure.savefig(path, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    figures = ROOT / "docs/figures"
    held_out = load_split("combination")
    clouds = embed([captions[0] for captions in held_out.captions], to_pil(held_out.pixels))
    draw_clouds(clouds, figures / "how_clouds.png")
    draw_similarities(clouds, figures / "how_similarities.png")
    draw_road(figures / "how_road.png")
