"""Metrics of meaning on points whose groups are known."""

import pytest
import torch

from csdiff.errors import CSDiffError
from csdiff.evaluation import concept_rate, group_agreement


def directions(count, each, spread=0.05, seed=0):
    """Points about `count` axes, `each` of one, with their names."""
    noise = torch.randn(count * each, 2 * count, generator=torch.Generator().manual_seed(seed))
    axes = torch.eye(2 * count)[torch.arange(count).repeat_interleave(each)]
    return 5 * (axes + spread * noise), [f"thing {i // each}" for i in range(count * each)]


def test_a_gap_between_the_modalities_splits_every_group():
    image, names = directions(6, 10)
    together = group_agreement(image * 2, image, names, names)
    assert together == pytest.approx({"v_measure": 1, "ari": 1}, abs=0.05)
    gap = torch.zeros(12)
    gap[-1] = 40
    apart = group_agreement(image + gap, image, names, names)
    assert apart["v_measure"] < 0.8
    assert apart["ari"] < 0.8
    shuffled = group_agreement(image, image, names, names[::-1])
    assert shuffled["v_measure"] < together["v_measure"]
    with pytest.raises(CSDiffError, match="2 different concepts, found 1"):
        group_agreement(image, image, ["a"] * 60, ["a"] * 60)


def test_concepts_are_found_and_chance_is_k_of_all():
    reference, names = directions(20, 4)
    shown, wanted = directions(20, 2, seed=1)
    found = concept_rate(shown, wanted, reference, names, originals=3 * shown, k=1)
    assert (found.rate, found.error, found.ratio, found.ratio_error) == (1, 0, 1, 0)
    assert (found.concepts, found.count) == (20, 40)
    noise = torch.randn(2000, 40, generator=torch.Generator().manual_seed(2))
    chance = concept_rate(noise, [f"thing {i % 20}" for i in range(2000)], reference, names, k=5)
    assert chance.error == pytest.approx((0.25 * 0.75 / 2000) ** 0.5, rel=0.15)
    assert abs(chance.rate - 0.25) < 4 * chance.error
    assert chance.ratio is None


def test_the_ratio_is_to_originals_that_are_not_all_recognised():
    reference, names = directions(10, 3)
    wrong = reference.roll(3, 0)
    drawn, real = reference.clone(), reference.clone()
    drawn[:15], real[:6] = wrong[:15], wrong[:6]
    found = concept_rate(drawn, names, reference, names, real, k=1)
    assert found.rate == pytest.approx(0.5)
    assert found.ratio == pytest.approx(0.5 / 0.8)
    assert 0.02 < found.ratio_error < 0.2


def test_a_concept_without_a_reference_image_is_named():
    reference, names = directions(3, 2)
    with pytest.raises(CSDiffError, match="'comet'"):
        concept_rate(reference[:1], ["comet"], reference, names)
