"""Train the shipped autoencoder: a diffusers ``VQModel``, factor 8, eight latent channels.

The codebook is not used: Kandinsky 2.2 decodes with ``force_not_quantize=True``, so the latents stay continuous. They
are kept at unit variance by a batch normalisation that is folded into the two 1x1 convolutions around it at the end,
because the pipeline applies no scaling factor of its own. Noise on the latents makes the decoder forgive the small
errors of a diffusion model. Mirrored images are no mistake here: an autoencoder names nothing.

    python scripts/train_autoencoder.py    # after build_dataset.py; writes build/assets/autoencoder/movq
"""

from __future__ import annotations

import json

import torch
import torch.nn.functional as F
from diffusers import VQModel
from efficientnet import PerceptualLoss
from images import SPLITS, load_split, load_training
from loop import DEVICE, Loop, indices, parse_arguments
from torch import Tensor, nn

LATENT_CHANNELS = 8
LATENT_NOISE = 0.1
PERCEPTUAL_WEIGHT = 0.15


def build_autoencoder() -> VQModel:
    return VQModel(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        # The full-resolution level decides the cost, so it is narrow.
        block_out_channels=(32, 64, 128, 128),
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=8,
        vq_embed_dim=LATENT_CHANNELS,
        num_vq_embeddings=16,
        mid_block_add_attention=False,
    )


def reconstruction_loss(output: Tensor, target: Tensor) -> Tensor:
    """L1 + 4 MSE, half the L1 between the image gradients, which keeps outlines sharp, and the L1 between 4x4 means,
    which keeps flat colours true (without it saturated greens fade to grey).
    """
    difference = output - target
    edges = difference.diff(dim=-1).abs().mean() + difference.diff(dim=-2).abs().mean()
    colours = F.avg_pool2d(difference, 4).abs().mean()
    return difference.abs().mean() + 4 * difference.square().mean() + 0.5 * edges + colours


@torch.no_grad()
def fold_whitening(model: VQModel, whitening: nn.BatchNorm2d, pixels: Tensor) -> None:
    """Make `quant_conv` emit unit-variance latents: statistics of `pixels` under the final weights, folded in."""
    whitening.reset_running_stats()
    whitening.momentum = None
    whitening.train()
    for chunk in pixels.split(128):
        whitening(model.quant_conv(model.encoder(chunk.float() / 127.5 - 1)))
    whitening.eval()
    scale = (whitening.running_var + whitening.eps).rsqrt()
    model.quant_conv.weight.mul_(scale[:, None, None, None])
    model.quant_conv.bias.sub_(whitening.running_mean).mul_(scale)


@torch.no_grad()
def psnr(model: VQModel, pixels: Tensor) -> dict[str, float]:
    """Mean over images of 10 log10(1 / MSE), pixels in [0, 1], by the public encode / decode calls; its error."""
    values = []
    for chunk in pixels.split(32):
        target = chunk.to(model.device).float().div(255)
        latents = model.encode(target * 2 - 1).latents
        output = model.decode(latents, force_not_quantize=True).sample.add(1).div(2).clamp(0, 1)
        values.append(-10 * (output - target).square().mean(dim=(1, 2, 3)).clamp_min(1e-10).log10())
    found = torch.cat(values)
    return {"mean": found.mean().item(), "error": found.std().item() / len(found) ** 0.5}


def main() -> None:
    options = parse_arguments(__doc__, "autoencoder", steps=1650, batch=64)
    pixels = load_training(options.further, options.every, DEVICE).pixels
    torch.manual_seed(options.seed)
    model = build_autoencoder().to(DEVICE, memory_format=torch.channels_last)
    model.quantize.requires_grad_(False)
    whitening = nn.BatchNorm2d(LATENT_CHANNELS, affine=False, momentum=0.02).to(DEVICE)
    perceptual = PerceptualLoss()

    def losses() -> dict[str, Tensor]:
        target = pixels[indices(len(pixels), options.batch)].float() / 127.5 - 1
        mirrored = torch.rand(options.batch, device=DEVICE) < 0.5
        target = torch.where(mirrored[:, None, None, None], target.flip(-1), target)
        target = target.contiguous(memory_format=torch.channels_last)
        latents = whitening(model.quant_conv(model.encoder(target)).float())
        latents = latents + LATENT_NOISE * torch.randn_like(latents)
        output = model.decoder(model.post_quant_conv(latents)).float()
        return {"pixels": reconstruction_loss(output, target), "perceptual": perceptual(output, target)}

    Loop(
        {"model": model, "whitening": whitening},
        losses,
        options.output,
        steps=options.steps,
        learning_rate=1e-3,
        decay=0.9,
        weight_decay=1e-4,
        betas=(0.9, 0.98),
        ema=0.998,
        weights={"perceptual": PERCEPTUAL_WEIGHT},
        seed=options.seed,
    ).run()
    fold_whitening(model, whitening, pixels[torch.randperm(len(pixels))[:2048].to(DEVICE)])
    model.half().save_pretrained(options.output / "movq")
    print(json.dumps({s: psnr(model.float(), load_split(s, options.every).pixels) for s in SPLITS[1:]}))


if __name__ == "__main__":
    main()
