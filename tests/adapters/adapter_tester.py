"""One small instance, and its inputs, for every adapter in the registry; the shared tests run over them."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from csdiff.adapters import Adapter, build_adapter

DIM, STATES_DIM, TOKENS = 16, 24, 12
# Of the tokenizer of tests/tiny.py.
END_TOKEN = 520
SMALL = {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 8}


@dataclass
class Case:
    """How to build a small adapter of one kind."""

    options: dict[str, Any] = field(default_factory=dict)
    text_dim: int = DIM
    checkpoints_gradients: bool = True


CASES = {
    "mlp": Case({"width": 8, "num_layers": 2}, text_dim=20),
    "transformer": Case({"preset": "tiny", "states_dim": STATES_DIM, "num_embeddings": TOKENS}),
    "linear": Case(text_dim=20, checkpoints_gradients=False),
    "lora": Case({"rank": 2}),
    "diffusion": Case({**SMALL, "num_embeddings": TOKENS, "states_dim": STATES_DIM}, text_dim=20),
}


def make_adapter(name: str, text_encoder: str, seed: int = 0, **options: Any) -> Adapter:
    """The small adapter `name` with random weights everywhere, statistics set, in evaluation mode."""
    text_dim, options = CASES[name].text_dim, {**CASES[name].options, **options}
    if name == "lora":
        options["text_encoder"] = text_encoder
    adapter = build_adapter(name, embedding_dim=DIM, text_dim=text_dim, **options)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapter.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
        adapter.set_statistics(*(torch.rand(dim, generator=generator) + 0.5 for dim in (DIM, DIM, text_dim, text_dim)))
    return adapter.eval()


def text_inputs(name: str, batch: int = 3, seed: int = 1) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Text embeddings, states and mask for the adapter `name` (`None` where it takes none)."""
    generator = torch.Generator().manual_seed(seed)
    embeds = torch.randn(batch, CASES[name].text_dim, generator=generator)
    if name not in ("transformer", "diffusion"):
        return embeds, None, None
    states = torch.randn(batch, TOKENS, STATES_DIM, generator=generator)
    mask = torch.arange(TOKENS)[None] < torch.arange(4, 4 + batch)[:, None]
    return embeds, states, mask


def call(adapter: Adapter, inputs: tuple[Tensor, Tensor | None, Tensor | None], **options: Any):
    """`forward` as `KandinskyV22PriorPipeline` calls it."""
    embeds, states, mask = inputs
    latents = torch.randn(len(embeds), DIM, generator=torch.Generator().manual_seed(5)).to(embeds)
    return adapter(
        latents,
        timestep=torch.tensor(500),
        proj_embedding=embeds,
        encoder_hidden_states=states,
        attention_mask=mask,
        **options,
    )


def embed(adapter: Adapter, inputs: tuple[Tensor, Tensor | None, Tensor | None]) -> Tensor:
    """`embed`, seeded where the adapter samples."""
    options = {} if adapter.one_shot else {"generator": torch.Generator().manual_seed(3), "num_inference_steps": 3}
    return adapter.embed(*inputs, **options)


def training_loss(adapter: Adapter, name: str) -> Tensor:
    """A loss that reaches every trainable weight, through the road that training takes."""
    inputs = text_inputs(name)
    target = torch.linspace(-1, 1, len(inputs[0]) * DIM).view(-1, DIM)
    if adapter.uses_input_ids:
        return nn.functional.mse_loss(adapter.embed_input_ids(token_ids()), target)
    if not adapter.one_shot:
        return adapter.training_loss(inputs[0], target, *inputs[1:], generator=torch.Generator().manual_seed(0))
    return nn.functional.mse_loss(adapter.embed(*inputs), target)


def token_ids(batch: int = 3, seed: int = 2) -> Tensor:
    """Token ids (batch, TOKENS), each row ended and padded by the end token."""
    ids = torch.randint(0, END_TOKEN - 1, (batch, TOKENS), generator=torch.Generator().manual_seed(seed))
    ids[:, 6:] = END_TOKEN
    return ids
