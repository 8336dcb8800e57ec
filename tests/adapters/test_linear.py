"""Closed-form maps against dense textbook solutions, and the norms they predict."""

import numpy as np
import pytest
import torch
from sklearn.covariance import OAS
from sklearn.linear_model import Ridge

from csdiff import CSDiffError
from csdiff.adapters import LinearAdapter, MLPAdapter, PairedMoments, TransformerAdapter, linear


def pairs(count=400, text_dim=10, image_dim=10, noise=0.3, seed=0):
    """Text and image rows related by a random linear map, far from the origin, with a gap between their centres."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, text_dim, generator=generator) * torch.linspace(0.2, 2, text_dim) + 3
    weight = torch.randn(text_dim, image_dim, generator=generator) / text_dim**0.5
    return x, x @ weight - 5 + noise * torch.randn(count, image_dim, generator=generator)


def in_batches(x, y, size=64):
    return [(x[i : i + size], y[i : i + size]) for i in range(0, len(x), size)]


def centred(x):
    return (x - x.mean(0)).double()


def raw_map(adapter):
    """Weight (D, Dt) and bias of the map, from what it makes of the unit vectors."""
    units = torch.eye(adapter.config.text_dim)
    bias = adapter.embed(torch.zeros(1, len(units)))[0].detach()
    return (adapter.embed(units).detach() - bias).T.double(), bias.double()


def fit(x, y, method="ridge", **options):
    return LinearAdapter.fit(in_batches(x, y), method, calibrate=False, **options)


def test_mean_shift_and_whiten_give_the_image_mean_and_deviations():
    x, y = pairs()
    shifted, whitened = (fit(x, y, method).embed(x) for method in ("mean_shift", "whiten"))
    torch.testing.assert_close(shifted - x, (y.mean(0) - x.mean(0)).expand_as(x), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close((whitened - y.mean(0)) / y.std(0), (x - x.mean(0)) / x.std(0), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("text_dim", "image_dim"), [(10, 10), (12, 7), (6, 11)])
def test_ridge_is_the_textbook_solution(text_dim, image_dim):
    x, y = pairs(text_dim=text_dim, image_dim=image_dim)
    penalty = 0.3
    adapter = fit(x, y, penalties=[penalty])
    alpha = penalty * centred(x).pow(2).mean().item() * len(x)
    expected = Ridge(alpha=alpha).fit(x.double().numpy(), y.double().numpy())
    weight, bias = raw_map(adapter)
    np.testing.assert_allclose(weight, expected.coef_, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(bias, expected.intercept_, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(adapter.embed(x).detach(), expected.predict(x.numpy()), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("noise", [0.01, 1.0, 10.0])
def test_penalty_is_the_best_on_held_out_rows(noise):
    x, y = pairs(count=60, text_dim=30, noise=noise)
    penalties = [1e-4, 1e-2, 1.0, 100.0]
    out = torch.arange(len(x)) % 10 == 9
    errors = {}
    for penalty in penalties:
        alpha = penalty * centred(x[~out]).pow(2).mean().item() * int((~out).sum())
        model = Ridge(alpha=alpha).fit(x[~out].double().numpy(), y[~out].double().numpy())
        errors[penalty] = float(((model.predict(x[out].double().numpy()) - y[out].double().numpy()) ** 2).mean())
    chosen = fit(x, y, penalties=penalties).metadata["objective"]["penalty"]
    assert chosen == min(errors, key=errors.get)


def test_procrustes_recovers_a_rotation_and_is_orthogonal():
    x, _ = pairs()
    rotation = torch.linalg.qr(torch.randn(10, 10, generator=torch.Generator().manual_seed(3)))[0]
    weight, _ = raw_map(fit(x, x @ rotation.T + 2, "procrustes"))
    torch.testing.assert_close(weight, rotation.double(), rtol=1e-4, atol=1e-4)
    x, y = pairs(text_dim=6, image_dim=9)
    weight, _ = raw_map(fit(x, y, "procrustes"))
    torch.testing.assert_close(weight.T @ weight, torch.eye(6).double(), rtol=1e-4, atol=1e-4)


def test_coral_gives_the_image_covariance_whatever_the_pairing():
    x, y = pairs(count=20000)
    adapter = fit(x, y, "coral")
    assert (adapter.embed(x).T.cov() - y.T.cov()).norm() < 0.01 * y.T.cov().norm()
    shuffled = fit(x, y[torch.randperm(len(y), generator=torch.Generator().manual_seed(0))], "coral")
    torch.testing.assert_close(shuffled.embed(x), adapter.embed(x), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("method", linear.METHODS)
def test_batching_and_source_do_not_matter(method):
    x, y = pairs()

    class Store(list):
        """The part of an embedding store that a fit reads."""

        def read(self, indices):
            return {"text_embeds": x[indices], "image_embeds": y[indices]}

    expected = fit(x, y, method).embed(x)
    sources = (
        [(x, y)],
        in_batches(x.numpy(), y.numpy(), 7),
        [{"text_embeds": a, "image_embeds": b} for a, b in in_batches(x, y, 129)],
        Store(range(len(x))),
    )
    for source in sources:
        adapter = LinearAdapter.fit(source, method, calibrate=False, batch_size=33)
        torch.testing.assert_close(adapter.embed(x), expected, rtol=1e-4, atol=1e-4)


def test_coral_shrinks_as_scikit_learn_does_and_stays_sane_with_few_rows():
    x, y = pairs(count=12, text_dim=20, image_dim=20, noise=1.0)
    for rows in (x, y):
        rows = centred(rows)
        ours = linear._shrunk(rows.T @ rows / len(rows), len(rows))
        np.testing.assert_allclose(ours, OAS(assume_centered=True).fit(rows.numpy()).covariance_, rtol=1e-6)
    fresh_x, fresh_y = pairs(count=500, text_dim=20, image_dim=20, noise=1.0)
    spread = (fit(x, y, "coral").embed(fresh_x) - y.mean(0)).norm(dim=1).mean()
    assert spread < 2 * (fresh_y - fresh_y.mean(0)).norm(dim=1).mean()


def test_moments_survive_a_large_offset():
    x, y = pairs(count=1000)
    x, y = x.double() + 1e6, y.double() - 1e6
    moments = PairedMoments(x[:10].mean(0), y[:10].mean(0))
    for a, b in in_batches(x, y):
        moments.add(a, b)
    torch.testing.assert_close(moments.cov_xy, centred(x).T @ centred(y) / len(x), rtol=1e-8, atol=1e-8)
    weight, bias = torch.randn(10, 10).double(), torch.randn(10).double()
    direct = float((y - x @ weight.T - bias).square().sum(1).mean())
    assert moments.squared_error(weight, bias) == pytest.approx(direct, rel=1e-6)


@pytest.mark.parametrize("method", linear.METHODS)
def test_calibrated_norms_on_held_out_rows(method):
    x, y = pairs(count=3000, noise=2.0)
    adapter = LinearAdapter.fit(in_batches(x[:2000], y[:2000]), method)
    norms, real = adapter.embed(x[2000:]).norm(dim=1), y[2000:].norm(dim=1)
    assert norms.mean().item() == pytest.approx(real.mean().item(), rel=0.02)
    assert norms.std().item() == pytest.approx(real.std().item(), rel=0.25)
    plain = LinearAdapter.fit(in_batches(x[:2000], y[:2000]), method, calibrate=False)
    cosine = torch.cosine_similarity(adapter.embed(x), plain.embed(x))
    torch.testing.assert_close(cosine, torch.ones_like(cosine), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("text_dim", "image_dim"), [(16, 16), (12, 16)])
def test_trained_adapters_start_at_a_linear_map(text_dim, image_dim, tmp_path):
    x, y = pairs(text_dim=text_dim, image_dim=image_dim)
    linear_map = LinearAdapter.fit(in_batches(x, y))
    mlp = MLPAdapter(embedding_dim=image_dim, text_dim=text_dim)
    transformer = TransformerAdapter.from_preset("tiny", embedding_dim=image_dim, text_dim=text_dim, num_embeddings=4)
    states = torch.randn(len(x), 4, text_dim)
    for adapter, inputs in ((mlp, (x,)), (transformer, (x, states))):
        assert not torch.allclose(adapter.embed(*inputs), linear_map.embed(x), rtol=1e-3, atol=1e-3)
        adapter.init_from(linear_map)
        torch.testing.assert_close(adapter.embed(*inputs), linear_map.embed(x), rtol=1e-5, atol=1e-5)
        adapter.save_pretrained(tmp_path / type(adapter).__name__)
        loaded = type(adapter).from_pretrained(tmp_path / type(adapter).__name__)
        assert torch.equal(loaded.embed(*inputs), adapter.embed(*inputs))
        type(adapter).from_config(adapter.config).load_state_dict(adapter.state_dict())
        adapter.embed(*inputs).square().mean().backward()
        assert adapter.skip.weight.grad.abs().sum() > 0


X, Y = pairs(count=20)
BAD = Y.where(torch.arange(20)[:, None] != 7, torch.nan)


@pytest.mark.parametrize(
    ("data", "options", "message"),
    [
        ([(X[:3], Y[:3])], {}, "at least 4 pairs, found 3"),
        ([], {}, "at least 4 pairs, found 0"),
        ([(X, Y[:-1])], {}, r"found \(20, 10\) and \(19, 10\)"),
        ([{"text_embeds": X}], {}, "'image_embeds' is missing"),
        ([(X[:10], Y[:10]), (X, BAD)], {}, "Row 17 holds a value that is NaN"),
        ([(X, Y), (X[:, :4], Y)], {}, "same widths in all; found .* after 20 rows"),
        ([(X, Y)], {"penalties": [0.0]}, "`penalties`"),
    ],
)
def test_bad_data_is_one_sentence(data, options, message):
    with pytest.raises(CSDiffError, match=message):
        LinearAdapter.fit(data, **options)


def test_init_from_another_shape_or_kind_is_refused():
    linear_map = LinearAdapter.fit([(X, Y)])
    for adapter, message in ((MLPAdapter(embedding_dim=8), "from 10 to 10, .* 8 to 8"), (linear_map, "cannot start")):
        with pytest.raises(CSDiffError, match=message):
            adapter.init_from(linear_map)
