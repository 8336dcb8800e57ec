"""From prompts to pictures on disk: what `generate.py` and `csdiff generate` do."""

import math
import platform
import shlex
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from csdiff.errors import CSDiffError
from csdiff.pipelines.config import GenerateConfig
from csdiff.pipelines.decoders import PRESETS, DecoderSource, check_pairing, resolve_decoder
from csdiff.pipelines.pairing import AdapterCard, read_adapter_card
from csdiff.pipelines.pictures import check_output_folder, picture_name, write_grid, write_picture
from csdiff.resources import assets_dir

DTYPES = ("auto", "float32", "float16", "bfloat16")


def generate(config: GenerateConfig) -> list[Path]:
    """Draws every prompt and writes PNG and JSON files.

    Everything that can be wrong with the options, the adapter and the decoder is looked at before weights are read,
    and nothing is written before the first picture is drawn.

    Args:
        config: the options.

    Returns:
        Paths of the PNGs: prompt by prompt, seed by seed, and the grid last when there is one.

    Raises:
        CSDiffError: bad input, in one sentence.
        OSError: files of a model are missing, or a picture cannot be written.
    """
    prompts = read_prompts(config)
    check_numbers(config)
    folder = check_output_folder(config.output)
    decoder = resolve_decoder(config.decoder, config.ip_adapter)
    card = None if config.adapter == "none" else read_adapter_card(config.adapter or assets_dir() / "adapter")
    if card is not None:
        check_pairing(card, decoder)
    steps, guidance = sampling(config, decoder)

    import torch

    from csdiff.pipelines.decoding import DrawingOptions, load_decoder
    from csdiff.pipelines.embedding import PromptEmbedder

    device, dtype = device_and_dtype(config)
    embedder = PromptEmbedder(card, decoder, device, dtype)
    text_encoder = embedder.text_encoder
    seeds = [config.seed + index for index in range(config.num_images)]
    # one generator a picture, so that its noise does not depend on what else is drawn
    jobs = [(prompt, seed, torch.Generator("cpu").manual_seed(seed)) for prompt in prompts for seed in seeds]
    if embedder.samples:
        image_embeds = embedder.embed([prompt for prompt, *_ in jobs], [generator for *_, generator in jobs])
    else:
        image_embeds = embedder.embed(prompts).repeat_interleave(len(seeds), dim=0)
    negative_image_embeds = embedder.negative(config.negative_prompt) if guidance > 1 else None
    del embedder

    drawing = load_decoder(decoder, device, dtype, config.offload, config.progress)
    options = DrawingOptions(steps, guidance, config.negative_prompt, config.height, config.width)
    record = {
        "adapter": _adapter_record(card),
        "text_encoder": text_encoder,
        "decoder": {"source": decoder.source, "class": decoder.class_name, "ip_adapter": decoder.ip_adapter},
        "negative_prompt": config.negative_prompt,
        "steps": steps,
        "guidance": guidance,
        "height": config.height,
        "width": config.width,
        "batch_size": config.batch_size,
        "device": str(device),
        "dtype": str(dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "versions": _versions(),
    }
    paths, images = [], []
    for start in range(0, len(jobs), config.batch_size):
        batch = jobs[start : start + config.batch_size]
        negatives = None if negative_image_embeds is None else negative_image_embeds.expand(len(batch), -1)
        drawn = drawing.draw(
            [prompt for prompt, *_ in batch],
            image_embeds[start : start + config.batch_size],
            negatives,
            [generator for *_, generator in batch],
            options,
        )
        command = redraw_command(config, prompts, [(prompt, seed) for prompt, seed, _ in batch])
        for (prompt, seed, _), image in zip(batch, drawn, strict=True):
            own = {"prompt": prompt, "seed": seed, "command": command}
            paths.append(write_picture(folder, picture_name(prompt, seed), image, {**own, **record}))
            images.append(image)
    if config.grid and len(images) > 1:
        columns = config.num_images if len(prompts) > 1 and config.num_images > 1 else None
        paths.append(write_grid(folder, images, columns))
    return paths


def read_prompts(config: GenerateConfig) -> list[str]:
    """The prompts of the command line, then those of the file.

    Raises:
        CSDiffError: none at all, an empty one, or a file that cannot be read.
    """
    prompts = [config.prompt] if isinstance(config.prompt, str) else list(config.prompt)
    if config.prompts_file is not None:
        try:
            lines = Path(config.prompts_file).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
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


def check_numbers(config: GenerateConfig):
    """Refuses numbers that make no picture.

    Raises:
        CSDiffError: naming the option, what it may be, and what was found.
    """
    for name in ("num_images", "batch_size", "steps", "height", "width"):
        value = getattr(config, name)
        if value is not None and value < 1:
            raise CSDiffError(f"{name}: expected a whole number of 1 or more, found {value}.")
    # Every decoder here was trained with 1000 noise levels.
    if config.steps is not None and config.steps > 1000:
        raise CSDiffError(f"steps: expected at most 1000, found {config.steps}.")
    if not config.output:
        raise CSDiffError("output: expected a folder for the pictures, found an empty name.")
    for name in ("height", "width"):
        value = getattr(config, name)
        if value is not None and value % 8:
            raise CSDiffError(f"{name}: expected a multiple of 8 pixels, found {value}.")
    if not 0 <= config.seed <= 2**63 - config.num_images:
        raise CSDiffError(f"seed: expected a whole number from 0 to 2**63 - num_images, found {config.seed}.")
    if config.guidance is not None and not (math.isfinite(config.guidance) and config.guidance >= 0):
        raise CSDiffError(f"guidance: expected a finite number of 0 or more, found {config.guidance}.")
    if config.dtype not in DTYPES:
        raise CSDiffError(f"dtype: expected one of {', '.join(DTYPES)}, found {config.dtype!r}.")


def sampling(config: GenerateConfig, decoder: DecoderSource) -> tuple[int, float]:
    """Steps and guidance: those asked for, else those in the decoder's `csdiff.json`, else its preset's."""
    preset = decoder.preset or next(preset for preset in PRESETS.values() if preset.hand_over == decoder.hand_over)
    stated = (decoder.fingerprint or {}).get("sampling") or {}
    steps = stated.get("steps", preset.steps) if config.steps is None else config.steps
    guidance = stated.get("guidance", preset.guidance) if config.guidance is None else config.guidance
    return steps, float(guidance)


def open_device(name: str):
    """The torch device of a name; CSDiffError for one that is not there."""
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise CSDiffError(f"device: expected a device of this machine, found {name!r}; try --device cpu.") from error
    return device


def device_and_dtype(config: GenerateConfig):
    """Torch device and number format that the options mean; CSDiffError for a device that is not there."""
    import torch

    device = open_device(config.device)
    if config.dtype == "auto":
        return device, torch.float16 if device.type == "cuda" else torch.float32
    return device, getattr(torch, config.dtype)


def _adapter_record(card: AdapterCard | None) -> dict | str:
    if card is None:
        return "none"
    return {"folder": str(card.path), "class": card.kind, "sha256": card.sha256}


def _versions() -> dict[str, str | None]:
    versions = {"python": platform.python_version()}
    for package in ("csdiff", "torch", "diffusers", "transformers"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    return versions


def redraw_command(config: GenerateConfig, prompts: list[str], batch: list[tuple[str, int]]) -> str:
    """The command that draws these pictures again, as one batch: neighbours in a batch may change the last bits."""
    ours = list(dict.fromkeys(prompt for prompt, _ in batch))
    seed, count = batch[0][1], len(batch) // len(ours)
    if batch != [(prompt, seed + index) for prompt in ours for index in range(count)]:
        # a batch from the middle of one prompt to the middle of another is drawn by the whole run alone
        ours, seed, count = prompts, config.seed, config.num_images
    words = [word for prompt in ours for word in ("--prompt", prompt)]
    options = {"seed": seed, "num_images": count, "adapter": config.adapter, "decoder": config.decoder}
    names = ("ip_adapter", "steps", "guidance", "negative_prompt", "height", "width", "batch_size", "device", "dtype")
    options |= {name: getattr(config, name) for name in names}
    defaults = GenerateConfig()
    for name, value in options.items():
        if name in ("seed", "decoder") or value != getattr(defaults, name):
            words += [f"--{name}", str(value)]
    return shlex.join(["csdiff", "generate", *words])
