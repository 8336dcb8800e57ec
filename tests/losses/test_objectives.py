"""The objectives: one interface, weights, pooling, the registry, and what each computes."""

import json
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch
import torch.nn.functional as F

from csdiff.losses import (
    OBJECTIVES,
    CSAlignerLoss,
    build_objective,
    cauchy_schwarz_divergence,
    info_nce,
    log_mean_kernel,
    objective_options,
    token_cauchy_schwarz_divergence,
)

NEEDS_GEOMLOSS = pytest.mark.skipif(find_spec("geomloss") is None, reason="needs geomloss")
NAMES = [pytest.param(name, marks=NEEDS_GEOMLOSS if name == "sinkhorn" else ()) for name in OBJECTIVES]


def batch(count=12, dim=8, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    image = 3 * draw(count, dim)
    return {
        "prediction": (0.5 * image + draw(count, dim)).requires_grad_(),
        "image": image,
        "source_text": draw(count, dim),
        "unpaired_text": draw(5, dim).requires_grad_(),
        "unpaired_image": draw(7, dim),
        "text_tokens": draw(count, 4, dim).requires_grad_(),
        "image_tokens": draw(count, 6, dim),
        "text_mask": torch.ones(count, 4, dtype=torch.bool),
        "image_mask": None,
    }


def call(objective, inputs):
    inputs = dict(inputs)
    return objective(inputs.pop("prediction"), inputs.pop("image"), **inputs)


@pytest.mark.parametrize("name", NAMES)
def test_what_an_objective_says_it_uses_is_what_it_uses(name):
    objective, inputs = build_objective(name), batch()
    loss = call(objective, inputs).loss
    for said, keys in (
        (objective.uses_unpaired, ("unpaired_text", "unpaired_image")),
        (objective.uses_tokens, ("text_tokens",)),
        (objective.uses_source_text, ("source_text",)),
    ):
        for key in keys:
            changed = {**inputs, key: inputs[key].detach().flip(-1) * 1.5 + 0.1}
            assert (call(objective, changed).loss != loss) == said


@pytest.mark.parametrize("name", NAMES)
def test_options_are_keywords_with_defaults_fit_for_json(name):
    options = objective_options(name)
    assert json.loads(json.dumps(options)) == options
    build_objective(name, **options)
    shown = repr(build_objective(name, **options))
    assert all(f"{key}={value!r}" in shown for key, value in options.items())


@pytest.mark.parametrize("name", NAMES)
def test_every_objective_takes_the_same_inputs_also_in_float32_under_autocast(name):
    def solve(inputs):
        output = call(build_objective(name), inputs)
        assert output.terms
        assert output.loss.dim() == 0
        assert all(term.dim() == 0 and not term.requires_grad for term in output.terms.values())
        return output.loss, *torch.autograd.grad(output.loss, inputs["prediction"])

    inputs = batch()
    expected, right = solve(inputs)
    assert right.norm() > 0
    for key in inputs.keys() - {"text_mask", "image_mask"}:
        inputs[key] = inputs[key].detach().float().requires_grad_(inputs[key].requires_grad)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, gradient = solve(inputs)
    torch.testing.assert_close(found, expected.float(), rtol=1e-5, atol=1e-7)
    assert (gradient - right).norm() <= 1e-4 * right.norm()


def test_cs_aligner_is_the_weighted_sum_of_its_terms():
    inputs = batch()
    objective = CSAlignerLoss(
        info_nce_weight=0.7,
        cs_weight=1.3,
        token_weight=0.4,
        source_weight=0.2,
        regression_weight=0.1,
        bandwidth=(0.4, 0.8),
        token_bandwidth=0.6,
        temperature=0.1,
        diagonal=False,
    )
    output = call(objective, inputs)
    text, image = inputs["prediction"], inputs["image"]
    expected = {
        "info_nce": info_nce(text, image, temperature=0.1, normalize=True),
        "cs": cauchy_schwarz_divergence(
            torch.cat([text, inputs["unpaired_text"]]),
            torch.cat([image, inputs["unpaired_image"]]),
            bandwidth=(0.4, 0.8),
            diagonal=False,
            normalize=True,
        ),
        "tokens": token_cauchy_schwarz_divergence(
            inputs["text_tokens"], inputs["image_tokens"], bandwidth=0.6, diagonal=False, normalize=True
        ),
        "source": info_nce(text, inputs["source_text"], temperature=0.1, normalize=True, two_sided=False),
        "regression": (2 - 2 * F.cosine_similarity(text, image)).mean(),
    }
    assert set(output.terms) == set(expected)
    for name, term in expected.items():
        torch.testing.assert_close(output.terms[name], term.detach())
        assert getattr(output, name) is output.terms[name]
    weights = {"info_nce": 0.7, "cs": 1.3, "tokens": 0.4, "source": 0.2, "regression": 0.1}
    torch.testing.assert_close(output.loss, sum(weights[name] * term for name, term in expected.items()))
    with pytest.raises(AttributeError, match="no term 'mmd' in this output; it has loss and info_nce, cs"):
        output.mmd  # noqa: B018


def test_terms_of_weight_zero_are_not_computed():
    # Inputs the term would refuse show that it never looks at them.
    spoilt = {name: torch.full_like(batch()[name], float("nan")) for name in ("text_tokens", "unpaired_image")}
    output = call(CSAlignerLoss(cs_weight=0, token_weight=0), {**batch(), **spoilt})
    assert list(output.terms) == ["info_nce"]


@pytest.mark.parametrize(
    ("options", "inputs", "message"),
    [
        ({"info_nce_weight": 0, "cs_weight": 0, "token_weight": 0}, {}, "at least one weight must be > 0"),
        ({"cs_weight": -1}, {}, "cs_weight must be a finite number >= 0; found -1"),
        ({"regression_rows": "white"}, {}, "regression_rows must be one of raw, unit, standardized; found 'white'"),
        ({}, {"image_tokens": None}, "found no image_tokens"),
        ({"source_weight": 1}, {"source_text": None}, "needs source_text"),
        ({}, {"unpaired_text": torch.ones(5, 3)}, r"unpaired_text and image .*\(5, 3\) and \(12, 8\)"),
        ({}, {"image": torch.ones(5, 8)}, r"prediction and image must be pairs .*found \(12, 8\) and \(5, 8\)"),
        ({"info_nce_weight": 0, "cs_weight": 0}, {"text_tokens": None, "image_tokens": None}, "no tokens were given"),
        ({"sigma": 1.0}, {}, r"unknown options \['sigma'\] of the objective 'cs_aligner'; its options are"),
    ],
)
def test_cs_aligner_refuses_what_it_cannot_do(options, inputs, message):
    with pytest.raises(ValueError, match=message):
        call(build_objective("cs_aligner", **options), {**batch(), **inputs})


def test_misspelt_names_are_not_ignored():
    with pytest.raises(ValueError, match=r"unknown objective 'l2'; the objectives are cs_aligner, cs"):
        build_objective("l2")
    with pytest.raises(TypeError, match="unpaired_texts"):
        call(build_objective("mse"), {**batch(), "unpaired_texts": torch.ones(2, 8)})


@pytest.mark.parametrize("name", ["cs_aligner", "info_nce"])
def test_learnable_temperature_is_a_parameter_that_stays_above_its_floor(name):
    inputs = batch()
    objective = build_objective(name, temperature=0.02, learnable_temperature=True)
    assert float(objective.current_temperature().detach()) == pytest.approx(0.02)
    call(objective, inputs).backward()
    assert objective.log_temperature.grad.abs() > 0
    with torch.no_grad():
        objective.log_temperature.fill_(-20.0)
    # Wrong partners ask for a higher temperature: a parameter that fell below the floor must find its way back.
    objective.log_temperature.grad = None
    call(objective, {**inputs, "prediction": inputs["image"].roll(1, dims=0)}).backward()
    assert float(objective.current_temperature().detach()) == pytest.approx(0.01)
    assert objective.log_temperature.grad < 0
    assert not list(build_objective(name).parameters())
    with pytest.raises(ValueError, match=r"temperature must be at least 0.01 with learnable_temperature=True.*0.005"):
        build_objective(name, temperature=0.005, learnable_temperature=True)


@pytest.mark.parametrize("name", NAMES)
def test_a_batch_of_one_pair_has_a_value_or_a_plain_refusal(name):
    inputs = {key: None if rows is None else rows[:1].detach() for key, rows in batch().items()}
    if name in ("coral", "kl"):
        inputs["unpaired_text"] = inputs["unpaired_image"] = None
    if name in ("coral", "kl", "uniform_align", "modgap"):
        with pytest.raises(ValueError, match="at least two rows"):
            call(build_objective(name), inputs)
    else:
        assert torch.isfinite(call(build_objective(name), inputs).loss)


def test_the_default_is_the_recipe_of_the_documentation():
    inputs = {**batch(), "text_tokens": None, "image_tokens": None, "unpaired_text": None, "unpaired_image": None}
    text, image = inputs["prediction"], inputs["image"]
    contrast = info_nce(text, image, temperature=0.07, normalize=True)
    expected = contrast + 8 * cauchy_schwarz_divergence(text, image, bandwidth=(0.35, 0.5, 1.0), normalize=True)
    torch.testing.assert_close(call(build_objective("cs_aligner"), inputs).loss, expected)


def test_mse_and_eclipse_by_hand():
    inputs = batch()
    prediction, image = inputs["prediction"], inputs["image"]
    mse = F.mse_loss(prediction, image)
    logits = F.normalize(prediction, dim=1) @ F.normalize(inputs["source_text"], dim=1).T / 0.07
    contrast = F.cross_entropy(logits, torch.arange(len(logits)))
    for name, options, expected in (
        ("mse", {}, mse),
        ("mse", {"rows": "standardized"}, mse / image.var(dim=0, correction=0).mean()),
        ("eclipse", {}, mse + 0.2 * contrast),
    ):
        torch.testing.assert_close(call(build_objective(name, **options), inputs).loss, expected)


def density_ratio(x, y):
    parts = []
    for i, point in enumerate(y):
        density = [torch.exp(-2 * (point - s).square().sum(1)).mean().log() for s in (y[torch.arange(len(y)) != i], x)]
        parts.append(density[0] - density[1])
    return torch.stack(parts).mean()


def discrepancy(x, y, diagonal):
    within = [log_mean_kernel(one, bandwidth=0.5, diagonal=diagonal).exp() for one in (x, y)]
    return within[0] + within[1] - 2 * log_mean_kernel(x, y, bandwidth=0.5).exp()


def spread(x):
    return torch.pdist(x).square().mul(-2).exp().mean().log()


def covariance_gap(x, y):
    return (torch.cov(x.T) - torch.cov(y.T)).square().sum() / (4 * 8**2)


@pytest.mark.parametrize(
    ("name", "options", "terms"),
    [
        ("mmd", {}, {"mmd": lambda x, y: discrepancy(x, y, True)}),
        ("mmd", {"diagonal": False}, {"mmd": lambda x, y: discrepancy(x, y, False)}),
        ("kl", {}, {"kl": density_ratio}),
        ("kl", {"reverse": True}, {"kl": lambda x, y: density_ratio(y, x)}),
        ("coral", {}, {"coral": covariance_gap}),
        (
            "coral",
            {"mean_weight": 2.0},
            {"coral": lambda x, y: covariance_gap(x, y) + 2 * (x.mean(0) - y.mean(0)).square().sum()},
        ),
        (
            "uniform_align",
            {"alpha": 1.0},
            {"align": lambda x, y: (x - y).norm(dim=1).mean(), "uniform": lambda x, y: (spread(x) + spread(y)) / 2},
        ),
        (
            "modgap",
            {},
            {
                "align": lambda x, y: (x - y).square().sum(dim=1).mean(),
                "uniform": lambda x, y: spread(F.normalize((x + y) / 2, dim=1)),
                "info_nce": lambda x, y: info_nce(x, y, temperature=0.07),
            },
        ),
    ],
)
def test_terms_by_hand(name, options, terms):
    inputs = {**batch(), "unpaired_text": None, "unpaired_image": None}
    x, y = F.normalize(inputs["prediction"].detach(), dim=1), F.normalize(inputs["image"], dim=1)
    output = call(build_objective(name, **options), inputs)
    expected = {term: formula(x, y) for term, formula in terms.items()}
    torch.testing.assert_close(output.terms, expected)
    torch.testing.assert_close(output.loss.detach(), sum(expected.values()))


@pytest.mark.parametrize("name", ["cs", "mmd", pytest.param("sinkhorn", marks=NEEDS_GEOMLOSS), "coral", "kl"])
def test_a_distribution_objective_is_small_for_equal_sets_and_joins_info_nce(name):
    inputs = {**batch(), "unpaired_text": None, "unpaired_image": None}
    far = call(build_objective(name), {**inputs, "prediction": inputs["image"].flip(1)})
    # The same set in another order: no pair matches, the distributions are equal.
    same = call(build_objective(name), {**inputs, "prediction": inputs["image"].roll(1, dims=0)})
    if name != "kl":
        assert abs(same.loss) < 1e-6
    assert same.loss < far.loss
    joined = call(build_objective(name, info_nce_weight=0.5, weight=2.0), inputs)
    torch.testing.assert_close(joined.loss.detach(), 2 * joined.terms[name] + 0.5 * joined.info_nce)


def test_importing_losses_is_light():
    code = (
        "import sys, csdiff.losses; assert 'torch' not in sys.modules and 'CSAlignerLoss' in dir(csdiff.losses)\n"
        "from csdiff.losses import OBJECTIVES, info_nce\n"
        "heavy = {'transformers', 'diffusers', 'geomloss', 'accelerate', 'sklearn'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
