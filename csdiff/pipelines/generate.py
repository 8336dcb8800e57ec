"""From prompts to images on disk: what `generate.py` and `csdiff generate` do.

The way of a prompt: `generate` here, the adapter and the decoder that it needs (`decoders`), its image embedding
(`embedding`), its image (`decoding`), and the files (`pictures`).
"""

from __future__ import annotations

import os
import platform
import shlex
from dataclasses import fields, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from csdiff.errors import CSDiffError
from csdiff.options import check_options
from csdiff.pipelines.config import GenerateConfig
from csdiff.pipelines.decoders import PRESETS, DecoderSource, check_pairing, resolve_decoder
from csdiff.pipelines.pairing import read_adapter_card
from csdiff.pipelines.pictures import check_output_folder, picture_name, write_grid, write_picture
from csdiff.resources import assets_dir

if TYPE_CHECKING:
    import torch

    from csdiff.pipelines.decoding import OnStep


def generate(config: GenerateConfig, on_step: OnStep | None = None) -> list[Path]:
    """Draws every prompt and writes PNG and JSON files.

    Everything that can be wrong with the options, the adapter and the decoder is looked at before weights are read,
    and nothing is written before the first image is drawn.

    Args:
        config: The options.
        on_step: Called after each denoising step of each batch, see `decoding.OnStep`.

    Returns:
        Paths of the PNGs: prompt by prompt, seed by seed, and the grid last when there is one.

    Raises:
        CSDiffError: bad input, in one sentence.
        OSError: files of a model are missing, or an image cannot be written.
    """
    config = check_config(config)
    prompts = read_prompts(config)
    folder = check_output_folder(config.output)
    decoder = resolve_decoder(config.decoder, config.ip_adapter)
    card = None if config.adapter == "none" else read_adapter_card(config.adapter or assets_dir() / "adapter")
    if card is not None:
        check_pairing(card, decoder)
    steps, guidance = sampling(config, decoder)
    is_flux = decoder.hand_over == "flux-ip-adapter"
    guided = (config.true_cfg if is_flux else guidance) > 1
    if is_flux and config.negative_prompt is not None and not guided:
        raise CSDiffError(
            "negative_prompt: FLUX.1 reads one only with --true_cfg above 1, at twice the time; give both."
        )

    import torch

    from csdiff.data.items import well_formed
    from csdiff.pipelines.decoding import DrawingOptions, load_decoder
    from csdiff.pipelines.embedding import PromptEmbedder

    prompts = [well_formed(prompt) for prompt in prompts]
    if config.negative_prompt is not None:
        config.negative_prompt = well_formed(config.negative_prompt)
    device, dtype = device_and_dtype(config, decoder)
    embedder = PromptEmbedder(
        card, decoder, device, dtype, text_encoder=config.text_encoder, image_encoder=config.image_encoder
    )
    seeds = [config.seed + index for index in range(config.num_images)]
    jobs = [(prompt, seed) for prompt in prompts for seed in seeds]
    # One generator an image, so that its noise does not depend on what else is drawn.
    generators = [torch.Generator("cpu").manual_seed(seed) for _, seed in jobs]
    if embedder.samples or config.spread:
        # The noise of the decoder stays what it is without spread.
        own = [torch.Generator("cpu").manual_seed(2**63 - 1 - seed) for _, seed in jobs]
        noise = generators if embedder.samples else own
        image_embeds = embedder.embed([prompt for prompt, _ in jobs], noise, config.spread)
    else:
        image_embeds = embedder.embed(prompts).repeat_interleave(len(seeds), dim=0)
    negative = embedder.negative(config.negative_prompt, config.true_cfg) if guided else None
    text_encoder = embedder.text_encoder
    del embedder

    drawing = load_decoder(decoder, device, dtype, config.offload, config.progress)
    options = DrawingOptions(steps, guidance, config.negative_prompt, config.height, config.width, config.true_cfg)
    settings = {
        "adapter": {"folder": str(card.path), "class": card.kind, "sha256": card.sha256} if card else "none",
        "text_encoder": text_encoder,
        "decoder": {"source": decoder.source, "class": decoder.class_name, "ip_adapter": decoder.ip_adapter},
        "negative_prompt": config.negative_prompt,
        "spread": config.spread,
        "steps": steps,
        "guidance": guidance,
        "true_cfg": config.true_cfg,
        "batch_size": config.batch_size,
        "device": str(device),
        "dtype": str(dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "versions": _versions(),
    }
    paths, images = [], []
    for start in range(0, len(jobs), config.batch_size):
        rows = slice(start, start + config.batch_size)
        batch = jobs[rows]
        drawn = drawing.draw(
            [prompt for prompt, _ in batch],
            image_embeds[rows],
            None if negative is None else negative.expand(len(batch), -1),
            generators[rows],
            options,
            on_step,
        )
        command = redraw_command(config, prompts, batch)
        for (prompt, seed), image in zip(batch, drawn, strict=True):
            own = {"prompt": prompt, "seed": seed, "command": command, "height": image.height, "width": image.width}
            paths.append(write_picture(folder, picture_name(prompt, seed), image, {**own, **settings}))
            images.append(image)
    if config.grid and len(images) > 1:
        columns = config.num_images if len(prompts) > 1 and config.num_images > 1 else None
        paths.append(write_grid(folder, images, columns))
    return paths


def check_config(config: GenerateConfig) -> GenerateConfig:
    """The options with a single prompt as a list and places as text, checked.

    Raises:
        CSDiffError: naming the option, what it may be, and what was found.
    """
    prompt = [config.prompt] if isinstance(config.prompt, str) else list(config.prompt)
    places = {
        field.name: os.fspath(value)
        for field in fields(config)
        if isinstance(value := getattr(config, field.name), os.PathLike)
    }
    config = replace(config, prompt=prompt, **places)
    check_options(config)
    for name in ("height", "width"):
        value = getattr(config, name)
        if value is not None and value % 8:
            raise CSDiffError(f"{name}: expected a multiple of 8 pixels, found {value}.")
    if config.seed > 2**63 - config.num_images:
        raise CSDiffError(f"seed: expected at most 2**63 - num_images, found {config.seed}.")
    return config


def read_prompts(config: GenerateConfig) -> list[str]:
    """The prompts of the command line, then those of the file.

    Raises:
        CSDiffError: none at all, an empty one, or a file that cannot be read.
    """
    prompts = list(config.prompt)
    if config.prompts_file is not None:
        try:
            lines = Path(config.prompts_file).read_text(encoding="utf-8-sig").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text: save it as UTF-8"
            raise CSDiffError(
                f"prompts_file: expected a text file with one prompt a line, cannot read {config.prompts_file} "
                f"({reason})."
            ) from error
        prompts += [line.strip() for line in lines if line.strip()]
    if not prompts:
        found = "none" if config.prompts_file is None else f"no line of it in {config.prompts_file}"
        raise CSDiffError(
            f'No prompt: expected text to draw, found {found}; give --prompt "a red apple" or --prompts_file.'
        )
    for index, prompt in enumerate(prompts, start=1):
        if not prompt.strip():
            raise CSDiffError(f"Prompt {index} of {len(prompts)} is empty: expected text to draw, found {prompt!r}.")
    return prompts


def sampling(config: GenerateConfig, decoder: DecoderSource) -> tuple[int, float]:
    """Steps and guidance: those asked for, else those in the decoder's `csdiff.json`, else its preset's."""
    preset = decoder.preset or next(preset for preset in PRESETS.values() if preset.hand_over == decoder.hand_over)
    stated = (decoder.fingerprint or {}).get("sampling") or {}
    steps = stated.get("steps", preset.steps) if config.steps is None else config.steps
    guidance = stated.get("guidance", preset.guidance) if config.guidance is None else config.guidance
    return steps, float(guidance)


def device_and_dtype(config: GenerateConfig, decoder: DecoderSource | None = None) -> tuple[torch.device, torch.dtype]:
    """Torch device and number format that the options mean; CSDiffError for a device that is not there."""
    import torch

    from csdiff.devices import choose_device

    device = choose_device(config.device)
    if config.dtype != "auto":
        return device, getattr(torch, config.dtype)
    if device.type != "cuda":
        return device, torch.float32
    # FLUX.1 was trained in bfloat16 and overflows float16.
    return device, torch.bfloat16 if decoder and decoder.hand_over == "flux-ip-adapter" else torch.float16


def redraw_command(config: GenerateConfig, prompts: list[str], batch: list[tuple[str, int]]) -> str:
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


def _versions() -> dict[str, Any]:
    versions: dict[str, Any] = {"python": platform.python_version()}
    for package in ("csdiff", "torch", "diffusers", "transformers"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    return versions
