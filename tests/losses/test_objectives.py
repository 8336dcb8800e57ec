"""The objectives: one interface, weights, pooling, the registry, and what each computes."""

import inspect
import json
import subprocess
import sys

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

NAMES = list(OBJECTIVES)


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


def needs_geomloss(name):
    if name == "sinkhorn":
        pytest.importorskip("geomloss")


@pytest.mark.parametrize("name", NAMES)
def test_every_objective_takes_the_same_inputs_and_sends_a_gradient(name):
    needs_geomloss(name)
    inputs = batch()
    output = call(build_objective(name), inputs)
    assert output.loss.dim() == 0
    assert output.terms
    assert all(term.dim() == 0 and not term.requires_grad for term in output.terms.values())
    (gradient,) = torch.autograd.grad(output.loss, inputs["prediction"])
    assert torch.isfinite(gradient).all()
    assert gradient.norm() > 0


@pytest.mark.parametrize("name", NAMES)
def test_what_an_objective_says_it_uses_is_what_it_uses(name):
    needs_geomloss(name)
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
    needs_geomloss(name)
    options = objective_options(name)
    assert json.loads(json.dumps(options)) == options
    build_objective(name, **options)
    parameters = list(inspect.signature(OBJECTIVES[name]).parameters.values())
    assert all(p.kind is p.KEYWORD_ONLY for p in parameters)
    shown = repr(build_objective(name, **options))
    assert all(f"{key}={value!r}" in shown for key, value in options.items())


@pytest.mark.parametrize("name", NAMES)
def test_float32_and_autocast_give_the_float64_result(name):
    needs_geomloss(name)
    inputs = batch()
    expected = call(build_objective(name), inputs)
    (right,) = torch.autograd.grad(expected.loss, inputs["prediction"])
    floats = {
        key: value.detach().float().requires_grad_(value.requires_grad)
        if isinstance(value, torch.Tensor) and value.is_floating_point()
        else value
        for key, value in inputs.items()
    }
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = call(build_objective(name), floats)
        (gradient,) = torch.autograd.grad(found.loss, floats["prediction"])
    assert found.loss.dtype == torch.float32
    torch.testing.assert_close(found.loss.double(), expected.loss, rtol=1e-5, atol=1e-7)
    assert (gradient - right).norm() <= 1e-4 * right.norm()


def test_registry_names_what_it_knows():
    with pytest.raises(ValueError, match=r"unknown objective 'l2'; the objectives are cs_aligner, cs, info_nce, mse"):
        build_objective("l2")
    with pytest.raises(
        ValueError, match=r"unknown options \['sigma'\] of the objective 'cs'; its options are weight,"
    ):
        build_objective("cs", sigma=1.0)


def test_a_misspelt_input_is_not_ignored():
    inputs = batch()
    with pytest.raises(TypeError, match="unpaired_texts"):
        build_objective("mse")(inputs["prediction"], inputs["image"], unpaired_texts=inputs["image"])


@pytest.mark.parametrize("name", NAMES)
def test_pairs_of_different_shape_are_refused(name):
    needs_geomloss(name)
    inputs = batch()
    with pytest.raises(ValueError, match=r"prediction and image must be pairs of one shape; found \(12, 8\)"):
        build_objective(name)(inputs["prediction"], inputs["image"][:5], source_text=inputs["source_text"])


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
    inputs = batch()
    # Inputs the term would refuse show that it never looks at them.
    inputs["text_tokens"] = torch.full_like(inputs["text_tokens"], float("nan"))
    inputs["unpaired_image"] = torch.full_like(inputs["unpaired_image"], float("nan"))
    output = call(CSAlignerLoss(cs_weight=0, token_weight=0), inputs)
    assert list(output.terms) == ["info_nce"]
    alone = call(CSAlignerLoss(info_nce_weight=0, token_weight=0), batch())
    assert list(alone.terms) == ["cs"]


def test_unpaired_embeddings_reach_the_divergence_and_not_info_nce():
    inputs = batch()
    without = {**inputs, "unpaired_text": None, "unpaired_image": None}
    one, other = call(CSAlignerLoss(), inputs), call(CSAlignerLoss(), without)
    assert one.cs != other.cs
    assert one.info_nce == other.info_nce
    assert torch.autograd.grad(one.loss, inputs["unpaired_text"])[0].norm() > 0


def test_cs_aligner_refuses_what_it_cannot_do():
    inputs = batch()
    with pytest.raises(ValueError, match="at least one weight must be > 0"):
        CSAlignerLoss(info_nce_weight=0, cs_weight=0, token_weight=0)
    with pytest.raises(ValueError, match="cs_weight must be a finite number >= 0; found -1"):
        CSAlignerLoss(cs_weight=-1)
    with pytest.raises(ValueError, match="found no image_tokens"):
        call(CSAlignerLoss(), {**inputs, "image_tokens": None})
    with pytest.raises(ValueError, match="needs source_text"):
        call(CSAlignerLoss(source_weight=1), {**inputs, "source_text": None})
    with pytest.raises(ValueError, match=r"unpaired_text must have D = 8 as the pairs do; found shape \(5, 3\)"):
        call(CSAlignerLoss(), {**inputs, "unpaired_text": inputs["unpaired_text"][:, :3]})
    with pytest.raises(ValueError, match="no tokens were given"):
        CSAlignerLoss(info_nce_weight=0, cs_weight=0)(inputs["prediction"], inputs["image"])


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
    needs_geomloss(name)
    inputs = {key: None if rows is None else rows[:1].detach() for key, rows in batch().items()}
    if name in ("coral", "kl"):
        inputs["unpaired_text"] = inputs["unpaired_image"] = None
    if name in ("coral", "kl", "uniform_align", "modgap"):
        with pytest.raises(ValueError, match="at least two rows"):
            call(build_objective(name), inputs)
    else:
        assert torch.isfinite(call(build_objective(name), inputs).loss)


def test_one_pair_has_no_contrast_and_the_distance_of_two_points():
    text, image = torch.tensor([[3.0, 0.0]]), torch.tensor([[0.0, 2.0]])
    output = CSAlignerLoss()(text, image)
    assert output.info_nce == 0
    torch.testing.assert_close(output.cs, torch.tensor(2 / 0.5**2))


def test_the_default_is_the_recipe_of_the_documentation():
    inputs = {**batch(), "text_tokens": None, "image_tokens": None, "unpaired_text": None, "unpaired_image": None}
    text, image = inputs["prediction"], inputs["image"]
    contrast = info_nce(text, image, temperature=0.07, normalize=True)
    expected = contrast + 2 * cauchy_schwarz_divergence(text, image, bandwidth=0.5, normalize=True)
    for objective in (CSAlignerLoss(), build_objective("cs_aligner")):
        torch.testing.assert_close(call(objective, inputs).loss, expected)


def test_mse_and_eclipse_by_hand():
    inputs = batch()
    prediction, image, text = inputs["prediction"], inputs["image"], inputs["source_text"]
    mse = F.mse_loss(prediction, image)
    torch.testing.assert_close(call(build_objective("mse"), inputs).loss, mse)
    logits = F.normalize(prediction, dim=1) @ F.normalize(text, dim=1).T / 0.07
    contrast = F.cross_entropy(logits, torch.arange(len(logits)))
    torch.testing.assert_close(call(build_objective("eclipse"), inputs).loss, mse + 0.2 * contrast)
    standard = mse / image.var(dim=0, correction=0).mean()
    torch.testing.assert_close(call(build_objective("mse", rows="standardized"), inputs).loss, standard)
    with pytest.raises(ValueError, match="rows must be one of raw, unit, standardized; found 'white'"):
        build_objective("mse", rows="white")
    with pytest.raises(ValueError, match="needs source_text"):
        build_objective("eclipse")(prediction, image)


def test_mmd_by_hand_and_its_unbiased_form():
    inputs = {**batch(), "unpaired_text": None, "unpaired_image": None}
    x, y = F.normalize(inputs["prediction"].detach(), dim=1), F.normalize(inputs["image"], dim=1)
    for diagonal in (True, False):
        within = [log_mean_kernel(one, bandwidth=0.5, diagonal=diagonal).exp() for one in (x, y)]
        expected = within[0] + within[1] - 2 * log_mean_kernel(x, y, bandwidth=0.5).exp()
        torch.testing.assert_close(call(build_objective("mmd", diagonal=diagonal), inputs).mmd, expected)


def test_kl_by_hand():
    inputs = {**batch(), "unpaired_text": None, "unpaired_image": None}
    x, y = F.normalize(inputs["prediction"].detach(), dim=1), F.normalize(inputs["image"], dim=1)
    for reverse, (at, other) in ((False, (y, x)), (True, (x, y))):
        parts = []
        for i, point in enumerate(at):
            rest = torch.cat([at[:i], at[i + 1 :]])
            density = [torch.exp(-2 * (point - s).square().sum(1)).mean().log() for s in (rest, other)]
            parts.append(density[0] - density[1])
        torch.testing.assert_close(call(build_objective("kl", reverse=reverse), inputs).kl, torch.stack(parts).mean())


def test_coral_by_hand():
    inputs = {**batch(), "unpaired_text": None, "unpaired_image": None}
    x, y = F.normalize(inputs["prediction"].detach(), dim=1), F.normalize(inputs["image"], dim=1)
    expected = (torch.cov(x.T) - torch.cov(y.T)).square().sum() / (4 * 8**2)
    torch.testing.assert_close(call(build_objective("coral"), inputs).coral, expected)
    means = (x.mean(0) - y.mean(0)).square().sum()
    torch.testing.assert_close(call(build_objective("coral", mean_weight=2.0), inputs).coral, expected + 2 * means)


def test_uniform_align_by_hand():
    inputs = batch()
    x, y = F.normalize(inputs["prediction"].detach(), dim=1), F.normalize(inputs["image"], dim=1)
    uniform = [torch.pdist(one).square().mul(-2).exp().mean().log() for one in (x, y)]
    output = call(build_objective("uniform_align", alpha=1.0), inputs)
    torch.testing.assert_close(output.align, (x - y).norm(dim=1).mean())
    torch.testing.assert_close(output.uniform, (uniform[0] + uniform[1]) / 2)


def test_modgap_by_hand():
    inputs = batch()
    x, y = F.normalize(inputs["prediction"].detach(), dim=1), F.normalize(inputs["image"], dim=1)
    output = call(build_objective("modgap", align_weight=0.5, uniformity_weight=0.25), inputs)
    align = (x - y).square().sum(dim=1).mean()
    uniform = torch.pdist(F.normalize((x + y) / 2, dim=1)).square().mul(-2).exp().mean().log()
    torch.testing.assert_close(output.align, align)
    torch.testing.assert_close(output.uniform, uniform)
    expected = info_nce(x, y, temperature=0.07) + 0.5 * align + 0.25 * uniform
    torch.testing.assert_close(output.loss.detach(), expected)


@pytest.mark.parametrize("name", ["cs", "mmd", "sinkhorn", "coral", "kl"])
def test_a_distribution_objective_is_small_for_equal_sets_and_joins_info_nce(name):
    needs_geomloss(name)
    inputs = {**batch(), "unpaired_text": None, "unpaired_image": None}
    far = call(build_objective(name), {**inputs, "prediction": inputs["image"].flip(1)})
    # The same set in another order: no pair matches, the distributions are equal.
    same = call(build_objective(name), {**inputs, "prediction": inputs["image"].roll(1, dims=0)})
    if name != "kl":
        assert abs(same.loss) < 1e-6
    assert same.loss < far.loss
    joined = call(build_objective(name, info_nce_weight=0.5, weight=2.0), inputs)
    torch.testing.assert_close(joined.loss.detach(), 2 * joined.terms[name] + 0.5 * joined.info_nce)


def test_importing_the_package_loads_nothing_heavy():
    code = "import sys, csdiff.losses; assert 'torch' not in sys.modules; print('CSAlignerLoss' in dir(csdiff.losses))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "True"


def test_importing_every_loss_loads_torch_alone():
    code = (
        "import sys; from csdiff.losses import OBJECTIVES, info_nce\n"
        "heavy = {'transformers', 'diffusers', 'geomloss', 'accelerate', 'sklearn'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
