"""Train the decoder of a finished autoencoder further, and leave its latents as they are.

A diffusion model of the latents stays valid, so both can be trained at the same time. The pairs of latents and whole
pictures are encoded once. The loss is the autoencoder's own and, as pictures that are near in pixels may still have
lost what makes them recognisable, the perceptual loss of the tiny CLIP. What is written is the average of the weights.

    python scripts/refine_autoencoder.py --clip build/clip/model --movq build/autoencoder/movq
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

import torch
from checkpoint import EMAState, load, save
from diffusers import VQModel
from diffusers.training_utils import EMAModel
from perception import PerceptualLoss
from pictures import load_pictures
from torch import nn
from train_autoencoder import psnr, reconstruction_loss
from train_decoder import cached, encode_conditions, encode_latents, train_pixels

LATENT_NOISE = 0.05
PERCEPTUAL_WEIGHT = 0.3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clip", type=Path, default=Path("build/clip/model"))
    parser.add_argument("--movq", type=Path, default=Path("build/autoencoder/movq"))
    parser.add_argument("--output", type=Path, default=Path("build/autoencoder-refined"))
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()

    torch.manual_seed(arguments.seed)
    model = VQModel.from_pretrained(arguments.movq, dtype=torch.float32)
    latents = cached(lambda: encode_latents(arguments.movq), arguments.output / "latents.safetensors")["latents"]
    conditions = cached(lambda: encode_conditions(arguments.clip), arguments.output / "conditions.safetensors")
    perceptual_loss = PerceptualLoss(arguments.clip, conditions["embeds"][0].mean(dim=0))
    pixels = train_pixels()
    refined = nn.ModuleList([model.post_quant_conv, model.decoder])
    ema = EMAModel(refined.parameters(), decay=0.999, use_ema_warmup=True, power=0.75)
    optimizer = torch.optim.AdamW(
        refined.parameters(), lr=arguments.learning_rate, betas=(0.9, 0.98), weight_decay=1e-4
    )
    modules = {"refined": refined, "ema": EMAState(ema)}
    step = load(arguments.output / "checkpoint", modules, optimizer)
    ema.optimization_step = step
    started, losses = time.time(), []
    while step < arguments.steps:
        generator = torch.Generator().manual_seed(arguments.seed * 1_000_003 + step)
        rate = min(1, (step + 1) / 100) * 0.5 * (1 + math.cos(math.pi * step / arguments.steps))
        for group in optimizer.param_groups:
            group["lr"] = arguments.learning_rate * rate
        index = torch.randint(len(pixels), (arguments.batch,), generator=generator)
        chosen = latents[index]
        noisy = chosen + LATENT_NOISE * torch.randn(chosen.shape, generator=generator)
        output = model.decoder(model.post_quant_conv(noisy))
        target = pixels[index].float() / 127.5 - 1
        parts = torch.stack([reconstruction_loss(output, target), perceptual_loss(output, target)])
        optimizer.zero_grad()
        (parts[0] + PERCEPTUAL_WEIGHT * parts[1]).backward()
        nn.utils.clip_grad_norm_(refined.parameters(), 1.0)
        optimizer.step()
        ema.step(refined.parameters())
        losses.append(parts.detach())
        step += 1
        if step % 100 == 0:
            pixel, perceptual = torch.stack(losses).mean(dim=0).tolist()
            spent = time.time() - started
            print(f"step {step} pixels {pixel:.4f} perceptual {perceptual:.4f} {spent:.0f} s", flush=True)
            losses = []
        if step % 500 == 0 or step == arguments.steps:
            save(arguments.output / "checkpoint", step, modules, optimizer)
    ema.copy_to(refined.parameters())
    model.eval().save_pretrained(arguments.output / "movq")
    figures = {f"psnr_{split}": psnr(model, load_pictures(split).pixels[:540]) for split in ("combination", "concept")}
    (arguments.output / "figures.json").write_text(json.dumps(figures, indent=2) + "\n")
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
