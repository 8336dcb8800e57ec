"""The battery that every adapter in the registry passes: calling convention, training, casts, copies."""

import inspect
import sys

import diffusers
import pytest
import torch
from diffusers import PriorTransformer
from diffusers.utils import logging

from csdiff import CSDiffError
from csdiff.adapters import build_adapter
from tests.adapters.adapter_tester import CASES, DIM, call, embed, make_adapter, text_inputs, training_loss


def same(a, b, tolerance=0.0):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def test_forward_has_the_stock_priors_signature(adapter):
    stock = list(inspect.signature(PriorTransformer.forward).parameters)
    assert list(inspect.signature(type(adapter).forward).parameters) == stock


def test_forward_gives_whitened_embeddings_row_by_row(adapter, name):
    inputs = text_inputs(name)
    output = call(adapter, inputs)
    whitened = output.predicted_image_embedding
    assert whitened.shape == (3, DIM)
    same(call(adapter, inputs, return_dict=False)[0], whitened)
    first = embed(adapter, inputs)
    assert first.isfinite().all()
    same(embed(adapter, inputs), first)
    if adapter.one_shot:
        same(adapter.post_process_latents(whitened), first)
        same(adapter(None, None, *inputs)[0], whitened)
        alone = tuple(None if part is None else part[1:2] for part in inputs)
        same(embed(adapter, alone), first[1:2], 1e-5)


def test_training_step_reaches_every_weight(adapter, name):
    adapter.train()
    training_loss(adapter, name).backward()
    trained = {n: p for n, p in adapter.named_parameters() if p.requires_grad}
    without = [n for n, p in trained.items() if p.grad is None or not p.grad.abs().sum() > 0]
    assert trained
    assert not trained.keys() & {"clip_mean", "clip_std"}
    assert not without


def test_gradient_checkpointing_changes_nothing(adapter, name):
    if not CASES[name].checkpoints_gradients:
        with pytest.raises(ValueError, match="gradient checkpointing"):
            adapter.enable_gradient_checkpointing()
        return
    adapter.train()
    calls = []
    for module in adapter.modules():
        if isinstance(module, torch.nn.LayerNorm):
            module.register_forward_hook(lambda *_: calls.append(1))
    found = []
    for recompute in (False, True):
        adapter.zero_grad()
        (adapter.enable_gradient_checkpointing if recompute else adapter.disable_gradient_checkpointing)()
        calls.clear()
        loss = training_loss(adapter, name)
        loss.backward()
        gradients = {n: p.grad.clone() for n, p in adapter.named_parameters() if p.grad is not None}
        found.append((loss, gradients, len(calls)))
    assert found[1][2] > found[0][2]  # layers ran again in the backward pass
    same(found[1][0], found[0][0])
    for n, gradient in found[0][1].items():
        same(found[1][1][n], gradient, 1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_statistics_and_answers(adapter, name, dtype, caplog):
    logging.enable_propagation()
    inputs = text_inputs(name)
    full, statistics = embed(adapter, inputs), adapter.clip_mean.clone()
    half = adapter.to("cpu", dtype)
    logging.disable_propagation()
    assert not caplog.records
    assert half.dtype == dtype
    assert half.clip_mean.dtype == half.text_std.dtype == torch.float32
    same(half.clip_mean, statistics)
    inputs = tuple(part.to(dtype) if part is not None and part.is_floating_point() else part for part in inputs)
    output = embed(half, inputs)
    assert output.dtype == dtype
    # Samplers amplify rounding; one pass must stay within a few percent.
    if adapter.one_shot:
        assert (output.float() - full).norm() < 0.05 * full.norm()


def test_reloading_names_are_in_place(adapter):
    module = sys.modules[type(adapter).__module__]
    assert module.ModelMixin is diffusers.ModelMixin
    assert not any(hasattr(diffusers.pipelines, part) for part in module.__name__.split("."))


def test_wrong_width_is_one_sentence(adapter, name):
    with pytest.raises(CSDiffError, match=rf"\(batch, {CASES[name].text_dim}\), found \(2, 3\)"):
        adapter.embed(torch.zeros(2, 3))


def test_compiled_transformer_gives_the_same(text_encoder):
    adapter = make_adapter("transformer", text_encoder)
    inputs = text_inputs("transformer")
    expected = call(adapter, inputs, return_dict=False)[0]
    compiled = torch.compile(adapter, backend="aot_eager", fullgraph=True)
    same(call(compiled, inputs, return_dict=False)[0], expected, 1e-5)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("mpl", {"embedding_dim": 8}, "'mpl'; known: mlp, transformer"),
        ("mlp", {"embedding_dim": 8, "depth": 2}, "'depth'; known: .*num_layers"),
        ("mlp", {"embedding_dim": 0}, "`embedding_dim` must be a positive whole number, found 0"),
        ("mlp", {"embedding_dim": 8, "width": 2.5}, "`width`"),
        ("mlp", {"embedding_dim": 8, "dropout": 1.0}, r"`dropout` must lie in \[0, 1\)"),
        ("transformer", {"embedding_dim": 8, "preset": "huge"}, "known: eclipse-768, eclipse-1280, tiny"),
        ("transformer", {"embedding_dim": 8, "preset": "eclipse-768"}, "width 768, the data or decoder has 8"),
        ("linear", {"embedding_dim": 8, "method": "lasso"}, "`method` must be one of"),
        ("linear", {"embedding_dim": 8, "text_dim": 4, "method": "coral"}, "found 4 and 8; use ridge"),
        ("diffusion", {"embedding_dim": 8, "condition_dropout": 2}, "`condition_dropout`"),
        ("diffusion", {"embedding_dim": 8, "clip_embed_dim": 4}, "`clip_embed_dim` follow"),
    ],
)
def test_bad_options_are_refused(name, options, message):
    with pytest.raises(CSDiffError, match=message):
        build_adapter(name, **options)
