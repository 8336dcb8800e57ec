"""Train the shipped unCLIP decoder: a ``KandinskyV22Pipeline`` folder conditioned on tiny-CLIP image embeddings.

The condition is the raw image embedding of the image itself or of one of several moved views, plus noise, so that the
decoder does not memorise a few thousand points and forgives a prior's errors. One condition in ten is the embedding of
an all-zero image, Kandinsky 2.2's convention for the unconditional branch of classifier-free guidance. Velocity
prediction on a cosine schedule with zero terminal signal, so that images start from pure noise and white stays white.
The last third adds a perceptual loss on decoded predictions of the clean latents: squared errors of latents forgive
the small things by which an image is recognised.

    python scripts/train_decoder.py                              # after train_clip.py and train_autoencoder.py
    python scripts/train_decoder.py --initial assets/decoder     # goes on from a finished decoder
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, KandinskyV22Pipeline, UNet2DConditionModel, VQModel
from efficientnet import PerceptualLoss
from images import BUILD, load_training, moved_view, sharp_view
from loop import DEVICE, Loop, indices, parse_arguments
from torch import Tensor
from train_clip import IMAGE_SIZE
from transformers import CLIPVisionModelWithProjection

VIEWS = 8
CONDITION_NOISE = 0.25
UNCONDITIONAL_SHARE = 0.1
PERCEPTUAL_SHARE, PERCEPTUAL_WEIGHT = 0.35, 0.05
TIMESTEPS = 1000


def build_unet(embedding_dim: int, latent_channels: int) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=latent_channels,
        # Kandinsky 2.2's pipeline splits a predicted variance off the output; it stays unused here.
        out_channels=2 * latent_channels,
        addition_embed_type="image",
        encoder_hid_dim=embedding_dim,
        encoder_hid_dim_type="image_proj",
        cross_attention_dim=128,
        attention_head_dim=32,
        block_out_channels=(96, 192, 256),
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


@torch.no_grad()
def encode_conditions(clip: Path, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Raw embeddings (1 + VIEWS, N, D), of the images themselves first, and of an all-zero image, (D)."""
    encoder = CLIPVisionModelWithProjection.from_pretrained(clip).to(DEVICE).eval()

    def embed(view) -> Tensor:
        return torch.cat([encoder(view(chunk, IMAGE_SIZE)).image_embeds for chunk in pixels.split(256)])

    zero = encoder(torch.zeros(1, 3, IMAGE_SIZE, IMAGE_SIZE, device=DEVICE)).image_embeds[0]
    return torch.stack([embed(sharp_view), *(embed(moved_view) for _ in range(VIEWS))]), zero


def main() -> None:
    options = parse_arguments(
        __doc__,
        "decoder",
        steps=5750,
        batch=512,
        learning_rate=6e-4,
        clip=str(BUILD / "clip/model"),
        movq=str(BUILD / "autoencoder/movq"),
        initial="",
    )
    torch.manual_seed(options.seed)
    pixels = load_training(options.further, options.every, DEVICE).pixels
    movq = VQModel.from_pretrained(options.movq, dtype=torch.float32).to(DEVICE).eval().requires_grad_(False)
    with torch.no_grad():
        latents = torch.cat([movq.encode(chunk.float() / 127.5 - 1).latents for chunk in pixels.split(64)])
    embeds, zero = encode_conditions(Path(options.clip), pixels)
    spread = embeds[0].std(0)
    unet = build_unet(embeds.shape[-1], latents.shape[1])
    if options.initial:
        unet = UNet2DConditionModel.from_pretrained(options.initial, subfolder="unet", dtype=torch.float32)
    unet = unet.to(DEVICE, memory_format=torch.channels_last)
    scheduler, perceptual = build_scheduler(), PerceptualLoss()
    signal = scheduler.alphas_cumprod.to(DEVICE)
    # Decoded are the middle timesteps: late ones show nothing yet, early ones need no embedding.
    shown = torch.linspace(0.2 * options.batch, 0.85 * options.batch, max(1, options.batch // 8), device=DEVICE).long()

    def losses(with_images: bool) -> dict[str, Tensor]:
        row = indices(len(latents), options.batch)
        condition = embeds[indices(1 + VIEWS, options.batch), row]
        amount = CONDITION_NOISE * torch.rand(options.batch, 1, device=DEVICE)
        condition = condition + amount * spread * torch.randn_like(condition)
        dropped = torch.rand(options.batch, 1, device=DEVICE) < UNCONDITIONAL_SHARE
        condition = torch.where(dropped, zero, condition)
        clean, noise = latents[row], torch.randn_like(latents[row])
        # One timestep from each of `batch` equal slices of the schedule: the same mean with less variance.
        slices = torch.arange(options.batch, device=DEVICE) + torch.rand(options.batch, device=DEVICE)
        timesteps = (slices / options.batch * TIMESTEPS).long().clamp(max=TIMESTEPS - 1)
        kept, lost = (x.sqrt().view(-1, 1, 1, 1) for x in (signal[timesteps], 1 - signal[timesteps]))
        noisy, velocity = kept * clean + lost * noise, kept * noise - lost * clean
        added = {"image_embeds": condition}
        output = unet(noisy, timesteps, encoder_hidden_states=None, added_cond_kwargs=added).sample
        output = output[:, : latents.shape[1]].float()
        found = {"velocity": F.mse_loss(output, velocity)}
        if with_images:
            guess = kept[shown] * noisy[shown] - lost[shown] * output[shown]
            decoded = movq.decode(guess, force_not_quantize=True).sample.float()
            found["perceptual"] = perceptual(decoded, pixels[row[shown]].float() / 127.5 - 1)
        return found

    Loop(
        {"unet": unet},
        lambda: losses(with_images=False),
        options.output,
        steps=options.steps,
        learning_rate=options.learning_rate,
        decay=PERCEPTUAL_SHARE,
        weight_decay=0.01,
        betas=(0.9, 0.99),
        ema=0.9995,
        weights={"perceptual": PERCEPTUAL_WEIGHT},
        seed=options.seed,
        last_losses=lambda: losses(with_images=True),
    ).run()
    pipeline = KandinskyV22Pipeline(unet=unet.half(), scheduler=build_scheduler(), movq=movq.half())
    pipeline.save_pretrained(options.output / "pipeline")


if __name__ == "__main__":
    main()
