"""Train the shipped unCLIP decoder: a ``KandinskyV22Pipeline`` folder conditioned on tiny-CLIP image embeddings.

Latents of every train picture and of its mirror image are encoded once. The condition is the raw image embedding of
the same picture or of a slightly moved one, plus noise, so that the decoder does not memorise a few thousand points
and forgives a prior's errors. One condition in ten is the embedding of an all-zero image, Kandinsky 2.2's convention
for the unconditional branch of classifier-free guidance. Velocity prediction on a cosine schedule with zero terminal
signal, so that pictures start from pure noise and white stays white. The learning rate is flat and falls to zero in
the last quarter: a run can be prolonged from its checkpoint. A second run can add a perceptual loss: squared errors of
latents forgive the small things by which a picture is recognised, the tiny CLIP's features do not.

    python scripts/train_decoder.py --clip build/clip/model --movq build/autoencoder/movq --output build/decoder
    python scripts/train_decoder.py ... --initial build/decoder/pipeline --output build/sharper --perceptual 0.1
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from checkpoint import EMAState, load, save
from diffusers import DDIMScheduler, KandinskyV22Pipeline, UNet2DConditionModel, VQModel
from diffusers.training_utils import EMAModel
from perception import PerceptualLoss
from pictures import load_pictures
from safetensors.torch import load_file, save_file
from torch import nn
from train_clip import IMAGE_SIZE, augment
from transformers import CLIPVisionModelWithProjection

CONDITION_NOISE = 0.25
UNCONDITIONAL_SHARE = 0.1
PERCEPTUAL_PICTURES = 6
PERCEPTUAL_FROM = 300
"""Timestep up to which the noisy picture shows what it is, whatever the embedding says: nothing is left to learn."""


def build_unet(embedding_dim: int) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        # Kandinsky 2.2's pipeline splits a predicted variance off the output; it stays unused here.
        out_channels=8,
        addition_embed_type="image",
        encoder_hid_dim=embedding_dim,
        encoder_hid_dim_type="image_proj",
        cross_attention_dim=128,
        attention_head_dim=32,
        block_out_channels=(64, 128, 192),
        layers_per_block=1,
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D", "SimpleCrossAttnDownBlock2D"),
        up_block_types=("SimpleCrossAttnUpBlock2D", "SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        resnet_time_scale_shift="scale_shift",
    )


def build_scheduler() -> DDIMScheduler:
    return DDIMScheduler(
        beta_schedule="squaredcos_cap_v2",
        rescale_betas_zero_snr=True,
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        clip_sample=False,
    )


def cached(encode: Callable[[], dict[str, torch.Tensor]], path: Path) -> dict[str, torch.Tensor]:
    """What `encode` returns, kept in `path`."""
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(encode(), path)
    return load_file(path)


def train_pixels() -> torch.Tensor:
    """Every train picture and its mirror image, (2N, 3, 128, 128) uint8."""
    pixels = load_pictures("train").pixels
    return torch.cat([pixels, pixels.flip(-1)])


@torch.no_grad()
def encode_latents(movq: Path) -> dict[str, torch.Tensor]:
    """`latents` (2N, 4, 16, 16)."""
    autoencoder = VQModel.from_pretrained(movq).eval()
    chunks = [autoencoder.encode(chunk.float() / 127.5 - 1).latents for chunk in train_pixels().split(64)]
    return {"latents": torch.cat(chunks)}


@torch.no_grad()
def encode_conditions(clip: Path) -> dict[str, torch.Tensor]:
    """`embeds` (2, 2N, D), of the picture itself and of a moved view, and `zero_embed` (D), of an all-zero image."""
    encoder = CLIPVisionModelWithProjection.from_pretrained(clip).eval()
    exact, moved = [], []
    generator = torch.Generator().manual_seed(0)
    for chunk in train_pixels().split(128):
        view = F.interpolate(chunk.float(), size=IMAGE_SIZE, mode="bicubic", antialias=True).clamp(0, 255)
        exact.append(encoder(view / 127.5 - 1).image_embeds)
        moved.append(encoder(augment(chunk, generator)).image_embeds)
    zero = encoder(torch.zeros(1, 3, IMAGE_SIZE, IMAGE_SIZE)).image_embeds[0]
    return {"embeds": torch.stack([torch.cat(exact), torch.cat(moved)]), "zero_embed": zero}


class PictureLoss(nn.Module):
    """Perceptual loss of predicted clean latents, decoded by the autoencoder, against the pictures they come from."""

    def __init__(self, clip: Path, movq: Path, centre: torch.Tensor) -> None:
        super().__init__()
        self.movq = VQModel.from_pretrained(movq).eval().requires_grad_(False)
        self.perceptual_loss = PerceptualLoss(clip, centre)
        self.pixels = train_pixels()

    def forward(self, latents: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        output = self.movq.decode(latents, force_not_quantize=True).sample
        return self.perceptual_loss(output, self.pixels[index].float() / 127.5 - 1)


class Trainer:
    """Velocity-prediction loss on cached latents and embeddings, and the perceptual loss where `pictures` is given."""

    def __init__(
        self,
        unet: UNet2DConditionModel,
        scheduler: DDIMScheduler,
        data: dict[str, torch.Tensor],
        pictures: PictureLoss | None = None,
    ) -> None:
        self.unet, self.scheduler, self.data, self.pictures = unet, scheduler, data, pictures
        self.spread = data["embeds"][0].std(dim=0)

    def losses(self, batch: int, generator: torch.Generator) -> torch.Tensor:
        """Velocity loss and perceptual loss, (2,)."""
        data = self.data
        index = torch.randint(data["latents"].shape[0], (batch,), generator=generator)
        view = torch.randint(2, (batch,), generator=generator)
        embeds = data["embeds"][view, index]
        amount = CONDITION_NOISE * torch.rand(batch, 1, generator=generator)
        embeds = embeds + amount * self.spread * torch.randn(embeds.shape, generator=generator)
        drop = torch.rand(batch, generator=generator) < UNCONDITIONAL_SHARE
        embeds = torch.where(drop[:, None], data["zero_embed"], embeds)
        latents = data["latents"][index]
        noise = torch.randn(latents.shape, generator=generator)
        # One timestep from each of `batch` equal slices of the schedule: the same mean with less variance.
        slices = (torch.arange(batch) + torch.rand(batch, generator=generator)) / batch
        timesteps = (slices * self.scheduler.config.num_train_timesteps).long()
        noisy = self.scheduler.add_noise(latents, noise, timesteps)
        velocity = self.scheduler.get_velocity(latents, noise, timesteps)
        output = self.unet(
            noisy, timesteps, encoder_hidden_states=None, added_cond_kwargs={"image_embeds": embeds}
        ).sample[:, :4]
        perceptual = torch.zeros(())
        if self.pictures is not None:
            candidates = torch.nonzero(~drop & (timesteps >= PERCEPTUAL_FROM)).flatten()
            order = torch.randperm(len(candidates), generator=generator)[:PERCEPTUAL_PICTURES]
            chosen = candidates[order]
            signal = self.scheduler.alphas_cumprod[timesteps[chosen]].view(-1, 1, 1, 1)
            clean = signal.sqrt() * noisy[chosen] - (1 - signal).sqrt() * output[chosen]
            perceptual = self.pictures(clean, index[chosen])
        return torch.stack([F.mse_loss(output, velocity), perceptual])


def export(unet: UNet2DConditionModel, ema: EMAModel, movq: Path, output: Path) -> None:
    ema.store(unet.parameters())
    ema.copy_to(unet.parameters())
    pipeline = KandinskyV22Pipeline(unet=unet, scheduler=build_scheduler(), movq=VQModel.from_pretrained(movq).eval())
    pipeline.save_pretrained(output / "pipeline")
    ema.restore(unet.parameters())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clip", type=Path, default=Path("build/clip/model"))
    parser.add_argument("--movq", type=Path, default=Path("build/autoencoder/movq"))
    parser.add_argument("--output", type=Path, default=Path("build/decoder"))
    parser.add_argument("--initial", type=Path, help="pipeline folder to start from, such as assets/decoder")
    parser.add_argument("--steps", type=int, default=20000)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--perceptual", type=float, default=0.0, help="weight of the perceptual loss")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()

    torch.manual_seed(arguments.seed)
    data = {
        **cached(lambda: encode_latents(arguments.movq), arguments.output / "latents.safetensors"),
        **cached(lambda: encode_conditions(arguments.clip), arguments.output / "conditions.safetensors"),
    }
    unet = build_unet(data["embeds"].shape[-1])
    if arguments.initial is not None:
        unet = UNet2DConditionModel.from_pretrained(arguments.initial, subfolder="unet")
    unet = unet.to(memory_format=torch.channels_last)
    ema = EMAModel(unet.parameters(), decay=0.999, use_ema_warmup=True, power=0.75)
    modules = {"unet": unet, "ema": EMAState(ema)}
    optimizer = torch.optim.AdamW(unet.parameters(), lr=arguments.learning_rate, betas=(0.9, 0.99), weight_decay=0.01)
    step = load(arguments.output / "checkpoint", modules, optimizer)
    ema.optimization_step = step
    pictures = None
    if arguments.perceptual:
        pictures = PictureLoss(arguments.clip, arguments.movq, data["embeds"][0].mean(dim=0))
    trainer = Trainer(unet, build_scheduler(), data, pictures)
    weights = torch.tensor([1.0, arguments.perceptual])
    decay_from = int(0.75 * arguments.steps)
    started, losses = time.time(), []
    while step < arguments.steps:
        rate = min(1, (step + 1) / 200, (arguments.steps - step) / (arguments.steps - decay_from))
        for group in optimizer.param_groups:
            group["lr"] = arguments.learning_rate * rate
        generator = torch.Generator().manual_seed(arguments.seed * 1_000_003 + step)
        parts = trainer.losses(arguments.batch, generator)
        optimizer.zero_grad()
        (weights @ parts).backward()
        nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        ema.step(unet.parameters())
        losses.append(parts.detach())
        step += 1
        if step % 50 == 0:
            velocity, perceptual = torch.stack(losses).mean(dim=0).tolist()
            spent = time.time() - started
            print(f"step {step} velocity {velocity:.4f} perceptual {perceptual:.4f} {spent:.0f} s", flush=True)
            losses = []
        if step % 250 == 0 or step == arguments.steps:
            save(arguments.output / "checkpoint", step, modules, optimizer)
            export(unet, ema, arguments.movq, arguments.output)
    (arguments.output / "figures.json").write_text(
        json.dumps({"parameters_unet": sum(p.numel() for p in unet.parameters()), "steps": step}, indent=2) + "\n"
    )


if __name__ == "__main__":
    main()
