"""From prompts to images on disk: what `generate.py` and `csdiff generate` do.

The way of a prompt: `generate` here, the adapter and the decoder that it needs (`decoders`), its image embedding
(`embedding`), its image (`decoding`), and back here the files: a PNG that holds its settings, a JSON of them, a grid.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shlex
import tempfile
from collections.abc import Sequence
from dataclasses import fields, replace
from math import ceil, sqrt
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

import csdiff
from csdiff.data.items import well_formed
from csdiff.errors import CSDiffError
from csdiff.files import write_json, writing
from csdiff.options import check_options
from csdiff.pipelines.config import GenerateConfig
from csdiff.pipelines.decoders import find_models

if TYPE_CHECKING:
    from csdiff.pipelines.decoding import OnStep

SETTINGS = "csdiff"
"""Keyword of the PNG's text chunk."""
_RECORDED = ("negative_prompt", "spread", "steps", "guidance", "true_cfg", "batch_size")


def generate(config: GenerateConfig, on_step: OnStep | None = None) -> list[Path]:
    """Draws every prompt and writes PNG and JSON files.

    Everything that can be wrong with the options, the adapter and the decoder is looked at before weights are read,
    and nothing is written before the first image is drawn.

    Args:
        config: The options.
        on_step: Called after each denoising step, see `decoding.OnStep`.

    Returns:
        Paths of the PNGs: prompt by prompt, seed by seed, and the grid last when there is one.

    Raises:
        CSDiffError: bad input, in one sentence.
        OSError: files of a model are missing, or an image cannot be written.
    """
    config = check_config(config)
    prompts = read_prompts(config)
    folder = check_output_folder(config.output)
    card, source = find_models(config)
    options = source.sampling(config)

    import diffusers
    import torch
    import transformers

    from csdiff.devices import choose_device
    from csdiff.pipelines.decoding import load_decoder
    from csdiff.pipelines.embedding import PromptEmbedder

    device = choose_device(config.device)
    jobs = [(prompt, config.seed + index) for prompt in prompts for index in range(config.num_images)]
    embedder = PromptEmbedder(card, source, options, device)
    prepared = embedder.prepare(jobs, options)
    text_encoder = embedder.text_encoder
    # There is room for one of the two on a small GPU.
    del embedder
    decoder = load_decoder(source, options, device)

    versions = {module.__name__: str(module.__version__) for module in (csdiff, torch, diffusers, transformers)}
    settings = {
        # As they were asked for: of the shipped ones no place on this machine.
        "adapter": {"folder": config.adapter, "class": card.kind, "sha256": card.sha256} if card else "none",
        "text_encoder": text_encoder,
        "decoder": {"source": config.decoder, "class": source.class_name, "ip_adapter": source.ip_adapter},
        **{name: getattr(options, name) for name in _RECORDED},
        "device": str(device),
        "dtype": str(decoder.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version(), **versions},
    }
    paths, images = [], []
    for index, image in enumerate(decoder.draw(*prepared, options, on_step)):
        prompt, seed = jobs[index]
        start = index - index % config.batch_size
        command = redraw_command(config, prompts, jobs[start : start + config.batch_size])
        own = {"prompt": prompt, "seed": seed, "command": command, "height": image.height, "width": image.width}
        paths.append(write_picture(folder, picture_name(prompt, seed), image, {**own, **settings}))
        images.append(image)
    if config.grid and len(images) > 1:
        columns = config.num_images if len(prompts) > 1 and config.num_images > 1 else ceil(sqrt(len(images)))
        paths.append(write_grid(folder, images, columns))
    return paths


def check_config(config: GenerateConfig) -> GenerateConfig:
    """A checked copy of the options, with a single prompt as a list, whole characters and places as text."""
    config = replace(config, prompt=[config.prompt] if isinstance(config.prompt, str) else list(config.prompt))
    check_options(config)
    config.prompt = [well_formed(prompt) for prompt in config.prompt]
    if config.negative_prompt is not None:
        config.negative_prompt = well_formed(config.negative_prompt)
    for name in ("height", "width"):
        if (getattr(config, name) or 0) % 8:
            raise CSDiffError(f"{name}: expected a multiple of 8 pixels, found {getattr(config, name)}.")
    return config


def read_prompts(config: GenerateConfig) -> list[str]:
    """The prompts of the command line, then those of the file; there must be some, and none is empty."""
    prompts, found = list(config.prompt), "none"
    if config.prompts_file is not None:
        try:
            lines = Path(config.prompts_file).read_text(encoding="utf-8-sig").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise CSDiffError(
                f"prompts_file: expected a UTF-8 text file with one prompt a line, cannot read {config.prompts_file} "
                f"({getattr(error, 'strerror', None) or 'not UTF-8: save it as UTF-8'})."
            ) from error
        prompts += [line.strip() for line in lines if line.strip()]
        found = f"no line of it in {config.prompts_file}"
    if not prompts:
        raise CSDiffError(
            f'No prompt: expected text to draw, found {found}; give --prompt "a red apple" or --prompts_file.'
        )
    for index, prompt in enumerate(prompts, start=1):
        if not prompt.strip():
            raise CSDiffError(f"Prompt {index} of {len(prompts)} is empty: expected text to draw, found {prompt!r}.")
    return prompts


def check_output_folder(output: str | os.PathLike) -> Path:
    """Refuses a folder that could not be written, without making it."""
    folder = Path(output)
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    try:
        # Permission bits do not tell of read-only disks and special folders.
        tempfile.TemporaryFile(dir=existing).close()
    except OSError as error:
        raise CSDiffError(
            f"output: {folder} cannot be written ({error.strerror} in {existing}); give another --output."
        ) from error
    return folder


def redraw_command(config: GenerateConfig, prompts: list[str], batch: Sequence[tuple[str, int]]) -> str:
    """The command that draws these images again, as one batch: neighbours in a batch may change the last bits."""
    ours = list(dict.fromkeys(prompt for prompt, _ in batch))
    seed, count = batch[0][1], len(batch) // len(ours)
    if batch != [(prompt, seed + index) for prompt in ours for index in range(count)]:
        # A batch from the middle of one prompt to the middle of another is drawn by the whole run alone.
        ours, seed, count = prompts, config.seed, config.num_images
    words = [word for prompt in ours for word in ("--prompt", prompt)]
    own = {"seed": seed, "num_images": count}
    defaults = GenerateConfig()
    for field in fields(config):
        if field.name in ("prompt", "prompts_file", "output", "offload", "grid", "progress"):
            continue
        value = own.get(field.name, getattr(config, field.name))
        if field.name in ("seed", "decoder") or value != getattr(defaults, field.name):
            words += [f"--{field.name}", str(value)]
    return shlex.join(["csdiff", "generate", *words])


def picture_name(prompt: str, seed: int) -> str:
    """A file name that says what is in it: `a-red-apple-3d-style-0`."""
    words = re.sub(r"[^\w]+", "-", prompt.lower()).strip("-_")
    return f"{words[:60].strip('-_') or 'image'}-{seed}"


def write_picture(folder: Path, name: str, image: Image.Image, settings: dict[str, Any]) -> Path:
    """Writes `name.png`, which holds its settings as text, and the same settings as `name.json`; returns the PNG.

    An image of the same name is replaced only if it was made with the same settings; otherwise the new one is called
    `name-2`, `name-3`, ...
    """
    folder.mkdir(parents=True, exist_ok=True)
    # In ASCII, so that it becomes a tEXt chunk, which every program shows.
    text, inside = json.dumps(settings), PngInfo()
    inside.add_text(SETTINGS, text)
    path, count = folder / f"{name}.png", 1
    while path.exists() and _text_of(path) != text:
        count += 1
        path = folder / f"{name}-{count}.png"
    # First the image: a JSON alone would say that there is one.
    with writing(path, "wb") as file:
        image.save(file, format="PNG", pnginfo=inside)
    write_json(path.with_suffix(".json"), settings)
    return path


def write_grid(folder: Path, images: list[Image.Image], columns: int) -> Path:
    """Writes `grid.png`, the images of one size row by row, and returns its path."""
    from diffusers.utils import make_image_grid

    rows = ceil(len(images) / columns)
    blank = [Image.new("RGB", images[0].size, "white")] * (rows * columns - len(images))
    path = folder / "grid.png"
    with writing(path, "wb") as file:
        make_image_grid(images + blank, rows, columns).save(file, format="PNG")
    return path


def read_settings(png: str | os.PathLike | Image.Image) -> dict[str, Any]:
    """The settings with which an image was drawn, from the PNG itself.

    Raises:
        CSDiffError: no image there, or one that was not drawn by csdiff.
    """
    text = png.info.get(SETTINGS) if isinstance(png, Image.Image) else _text_of(Path(png))
    try:
        settings = json.loads(text or "null")
    except (ValueError, RecursionError):
        settings = None
    if not isinstance(settings, dict):
        raise CSDiffError(f"Expected a PNG that csdiff drew, with its text kept, found no settings in {png}.")
    return settings


def _text_of(path: Path) -> str | None:
    try:
        with Image.open(path) as image:
            return image.info.get(SETTINGS)
    except (OSError, ValueError, SyntaxError):
        return None
