"""The gradient of micro-batches is the gradient of the whole batch."""

import pytest
import torch

from csdiff.adapters.registry import build_adapter
from csdiff.losses.objectives import build_objective
from csdiff.training.model import DenoisingObjective, Embedder
from csdiff.training.task import AlignmentTask, split

ROWS, TEXT, IMAGE, LENGTH, STATES = 37, 12, 16, 6, 10
TOKENS, UNPAIRED = "with tokens", "with unpaired rows and an image adapter"


def batch(unpaired=False):
    draw = torch.Generator().manual_seed(0)
    mask = torch.arange(LENGTH) < torch.randint(1, LENGTH + 1, (ROWS, 1), generator=draw)
    rows = {
        "pairs": {
            "text_embeds": torch.randn(ROWS, TEXT, generator=draw),
            "image_embeds": torch.randn(ROWS, IMAGE, generator=draw),
            "text_states": torch.randn(ROWS, LENGTH, STATES, generator=draw),
            "text_mask": mask,
            "image_tokens": torch.randn(ROWS, 5, IMAGE, generator=draw),
        }
    }
    if unpaired:
        rows["unpaired_text"] = {"text_embeds": torch.randn(23, TEXT, generator=draw)}
        rows["unpaired_image"] = {"image_embeds": torch.randn(29, IMAGE, generator=draw)}
    return rows


def adapter(kind, dropout, text_dim=TEXT):
    torch.manual_seed(1)
    sizes = {"num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 8, "num_embeddings": LENGTH}
    sizes |= {"states_dim": STATES, "dropout": dropout}
    options = {"mlp": {"width": 24, "num_layers": 1, "dropout": dropout}, "linear": {}}.get(kind, sizes)
    built = build_adapter(kind, embedding_dim=IMAGE, text_dim=text_dim, **options)
    for parameter in built.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return built.train()


def make_task(name, dropout=0.0):
    """With the token-level term, or with an image adapter, where the name says so."""
    kind = name.removesuffix(TOKENS).removesuffix(UNPAIRED).strip()
    embedder = Embedder(adapter(kind, dropout), adapter("mlp", 0, IMAGE) if name.endswith(UNPAIRED) else None)
    if name.endswith(TOKENS):
        embedder.project_text = torch.nn.Linear(STATES, TEXT).requires_grad_(False).forward
    return AlignmentTask(embedder, DenoisingObjective() if name == "diffusion" else build_objective("cs_aligner"))


def gradients(task):
    found = {name: p.grad.clone() for name, p in task.parameters.items()}
    for parameter in task.parameters.values():
        parameter.grad = None
    return found


def assert_same(one, other, tolerance=1e-6):
    assert one
    assert one.keys() == other.keys()
    scale = max(value.abs().max() for value in one.values())
    for name, value in one.items():
        assert (value - other[name]).abs().max() <= tolerance * scale, name


@pytest.mark.parametrize("micro", [1, 10, 36])
@pytest.mark.parametrize(
    "name", ["mlp", "transformer", "linear", f"mlp {TOKENS}", f"transformer {TOKENS}", f"mlp {UNPAIRED}"]
)
def test_is_the_gradient_of_one_big_batch(name, micro):
    task, rows = make_task(name), batch(unpaired=name.endswith(UNPAIRED))
    whole = task.backward(rows).loss
    expected = gradients(task)
    cached = task.backward(rows, micro).loss
    torch.testing.assert_close(cached, whole, rtol=1e-6, atol=1e-7)
    assert_same(expected, gradients(task))


@pytest.mark.parametrize("name", ["mlp", "transformer", f"mlp {TOKENS}", f"transformer {TOKENS}", "diffusion"])
def test_replays_dropout_and_noise(name):
    """Against one graph over the same micro-batches, drawn with the same random numbers."""
    task, rows, pieces = make_task(name, dropout=0.3), batch(), []
    for index, part in enumerate(split(rows, 10)):
        task.reseed(index)
        pieces.append(task.embed(part))
    whole = {key: torch.cat([piece[key] for piece in pieces]) for key in pieces[0]}
    task.loss(whole, rows).loss.backward()
    expected = gradients(task)
    task.backward(rows, 10)
    assert_same(expected, gradients(task))


def test_keeps_the_graph_of_one_micro_batch_only():
    task, alive = make_task("mlp"), []
    embed = task.embed

    class Watched(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            alive.remove("graph")
            return grad

    def watched(rows):
        embedded = embed(rows)
        if torch.is_grad_enabled():
            alive.append("graph")
            assert len(alive) == 1
            embedded["prediction"] = Watched.apply(embedded["prediction"])
        return embedded

    task.embed = watched
    task.backward(batch(), 10)
    assert gradients(task)
    assert not alive
