"""Train the shipped autoencoder (a diffusers ``VQModel``, factor 8) on the train pictures.

The codebook is not used: Kandinsky 2.2 decodes with ``force_not_quantize=True``, so the latents stay continuous.
They are kept at unit variance by a batch normalisation that is folded into the two 1x1 convolutions around it at
the end, because the pipeline applies no scaling factor of its own. Noise on the latents makes the decoder forgive
the small errors of a diffusion model. Most steps see 64x64 crops (a quarter of the cost, all of the texture); the
last fifth sees whole pictures.

    python scripts/train_autoencoder.py --output build/autoencoder
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from checkpoint import load, save
from diffusers import VQModel
from pictures import load_pictures
from torch import nn

LATENT_NOISE = 0.1


def build_autoencoder() -> VQModel:
    return VQModel(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        # The full-resolution level decides the cost, so it is narrow.
        block_out_channels=(16, 32, 64, 128),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        vq_embed_dim=4,
        num_vq_embeddings=16,
        mid_block_add_attention=False,
    )


def reconstruct(model: VQModel, whitening: nn.BatchNorm2d, pixels: torch.Tensor, noise: float) -> torch.Tensor:
    latents = whitening(model.quant_conv(model.encoder(pixels)))
    if noise:
        latents = latents + noise * torch.randn_like(latents)
    return model.decoder(model.post_quant_conv(latents))


def reconstruction_loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """L1 + 4 MSE, half the L1 between the image gradients, which keeps outlines sharp, and the L1 between 4x4 means,
    which keeps flat colours true (without it saturated greens fade to grey).
    """
    difference = output - target
    edges = difference.diff(dim=-1).abs().mean() + difference.diff(dim=-2).abs().mean()
    colours = F.avg_pool2d(difference, 4).abs().mean()
    return difference.abs().mean() + 4 * difference.square().mean() + 0.5 * edges + colours


def fold_whitening(model: VQModel, whitening: nn.BatchNorm2d) -> None:
    """Make `quant_conv` emit unit-variance latents, as the model itself without the batch normalisation."""
    scale = (whitening.running_var + whitening.eps).rsqrt()
    with torch.no_grad():
        model.quant_conv.weight.mul_(scale[:, None, None, None])
        model.quant_conv.bias.sub_(whitening.running_mean).mul_(scale)


def sample_batch(pixels: torch.Tensor, batch: int, crop: int, generator: torch.Generator) -> torch.Tensor:
    index = torch.randint(len(pixels), (batch,), generator=generator)
    top, left = torch.randint(0, 128 - crop + 1, (2, batch), generator=generator).tolist()
    crops = [pixels[i, :, t : t + crop, x : x + crop] for i, t, x in zip(index, top, left, strict=True)]
    views = torch.stack(crops).float().div(127.5).sub(1)
    flip = torch.rand(batch, generator=generator) < 0.5
    return torch.where(flip[:, None, None, None], views.flip(-1), views)


@torch.no_grad()
def psnr(model: VQModel, pixels: torch.Tensor) -> float:
    """Mean over pictures of 10 log10(1 / MSE), pixels in [0, 1], by the public encode / decode calls."""
    values = []
    for chunk in pixels.split(32):
        target = chunk.float().div(255)
        latents = model.encode(target * 2 - 1).latents
        output = model.decode(latents, force_not_quantize=True).sample.add(1).div(2).clamp(0, 1)
        values.append(-10 * (output - target).square().mean(dim=(1, 2, 3)).clamp_min(1e-10).log10())
    return torch.cat(values).mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("build/autoencoder"))
    parser.add_argument("--steps", type=int, default=6200)
    parser.add_argument("--batch", type=int, default=12)
    parser.add_argument("--learning-rate", type=float, default=1.5e-3)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()

    torch.manual_seed(arguments.seed)
    model = build_autoencoder()
    whitening = nn.BatchNorm2d(4, affine=False, momentum=0.02)
    # The codebook takes no part in the reconstruction.
    parameters = [p for name, p in model.named_parameters() if not name.startswith("quantize.")]
    optimizer = torch.optim.AdamW(parameters, lr=arguments.learning_rate, betas=(0.9, 0.98), weight_decay=1e-4)
    modules = {"model": model, "whitening": whitening}
    step = load(arguments.output / "checkpoint", modules, optimizer)
    pixels = load_pictures("train").pixels
    warm_up, whole_from = 100, int(0.85 * arguments.steps)
    started, running = time.time(), 0.0
    while step < arguments.steps:
        generator = torch.Generator().manual_seed(arguments.seed * 1_000_003 + step)
        torch.manual_seed(arguments.seed * 1_000_003 + step)
        progress = step / arguments.steps
        rate = min(1, (step + 1) / warm_up) * (0.02 + 0.49 * (1 + math.cos(math.pi * progress)))
        for group in optimizer.param_groups:
            group["lr"] = arguments.learning_rate * rate
        crop, batch = (64, arguments.batch) if step < whole_from else (128, max(1, arguments.batch // 4))
        target = sample_batch(pixels, batch, crop, generator)
        loss = reconstruction_loss(reconstruct(model, whitening, target, LATENT_NOISE), target)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        running = 0.98 * running + 0.02 * loss.item() if running else loss.item()
        step += 1
        if step % 100 == 0:
            print(f"step {step} loss {running:.4f} lr {group['lr']:.2e} {time.time() - started:.0f} s", flush=True)
        if step % 500 == 0 or step == arguments.steps:
            save(arguments.output / "checkpoint", step, modules, optimizer)
    fold_whitening(model, whitening)
    model.eval().save_pretrained(arguments.output / "movq")
    figures = {f"psnr_{split}": psnr(model, load_pictures(split).pixels[:540]) for split in ("combination", "concept")}
    figures["parameters"] = sum(p.numel() for p in model.parameters())
    (arguments.output / "figures.json").write_text(json.dumps(figures, indent=2) + "\n")
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
