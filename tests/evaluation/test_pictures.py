"""Metrics of pictures against cases whose value is known, and pictures drawn, kept and measured."""

import json
import math

import pytest
import torch
import torch.nn.functional as F

from csdiff.cli import run_command
from csdiff.evaluation.distances import feature_frechet_distance
from csdiff.evaluation.drawing import jobs
from csdiff.evaluation.picture_metrics import clip_score, cmmd, diversity, fid, kid


def cloud(n, d, seed=0, shift=0.0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed)) + shift


def test_fid_by_two_roads():
    """The eigenvalues of torchmetrics and the singular values used for extrapolation give one distance."""
    x, y = cloud(300, 8), 2 * cloud(200, 8, 1, shift=1.0)
    assert fid(x, y) == pytest.approx(feature_frechet_distance(x, y), rel=1e-3)


def test_kid_is_unbiased_and_sees_a_shift():
    values = [kid(cloud(40, 6, seed), cloud(40, 6, seed + 100), subsets=1)[0] for seed in range(40)]
    mean, error = torch.tensor(values).mean(), torch.tensor(values).std() / 40**0.5
    assert abs(mean) < 4 * error
    assert kid(cloud(40, 6), cloud(40, 6, 1, shift=1.0))[0] > 10 * error


def test_cmmd_against_sums_over_pairs():
    x, y = cloud(6, 4), cloud(5, 4, 1)
    u, v = F.normalize(x.double(), dim=1), F.normalize(y.double(), dim=1)

    def mean(a, b, skip):
        pairs = [
            math.exp(-(a[i] - b[j]).square().sum() / 200)
            for i in range(len(a))
            for j in range(len(b))
            if not (skip and i == j)
        ]
        return sum(pairs) / len(pairs)

    expected = 1000 * (mean(u, u, True) + mean(v, v, True) - 2 * mean(u, v, False))
    assert cmmd(x, y) == pytest.approx(expected, rel=1e-6)


def test_clip_score_of_equal_orthogonal_and_opposite_vectors():
    x = torch.eye(3)
    assert clip_score(x, 5 * x) == pytest.approx(100)
    assert clip_score(x, x.roll(1, 0)) == 0
    assert clip_score(x, -x) == 0


def test_diversity_counts_pairs_of_one_prompt_only():
    x = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [2.0, 0.0], [0.0, 3.0]])
    assert diversity(x, torch.tensor([0, 0, 1, 1, 2])) == pytest.approx(0.5)
    assert diversity(x, torch.arange(5)) is None


def test_noise_differs_between_prompts_and_not_between_lists():
    first = jobs(["a cat", "a dog", "a cat"], 2, seed=3)
    assert len({job.noise_seed for job in first}) == 6
    assert [job.key for job in jobs(["a cat", "a dog"], 2, seed=3)] == [job.key for job in first[:4]]


def test_pictures_are_drawn_once_and_measured(
    picture_adapter, captioned_pictures, tiny_clip, tiny_decoder, tmp_path, monkeypatch, capsys
):
    """A second run keeps what is there and redraws what is missing, to the bit; scores repeat."""
    monkeypatch.chdir(tmp_path)

    def run(*more):
        options = ["--adapter", picture_adapter, "--decoder", tiny_decoder, "--pictures", captioned_pictures]
        options += ["--extractors", tiny_clip, "--clip", tiny_clip, "--num_prompts", 3, "--num_images", 2]
        options += [
            "--steps",
            1,
            "--guidance",
            1,
            "--size",
            32,
            "--batch_size",
            4,
            "--output",
            tmp_path / "drawn",
            *more,
        ]
        return run_command("evaluate", [str(option) for option in options], "csdiff evaluate")

    assert run("--json", "first.json", "--report", "report.html") == 0
    scores = json.loads((tmp_path / "first.json").read_text())
    pictures, manifest = scores["pictures"], scores["manifest"]["pictures"]
    assert set(pictures["adapters"]) == {"identity", "raw_text", "mean_shift", "ridge", "image"}
    for found in pictures["adapters"].values():
        assert found["count"] == 6
        assert {"fid", "kid"} <= found["spaces"][str(tiny_clip)].keys()
        assert 0 <= found["picture_to_prompt"]["r@1"] <= 1
        assert found["diversity"] > 0
    # This adapter changes nothing.
    assert pictures["adapters"]["identity"] == pictures["adapters"]["raw_text"]
    assert len(set(manifest["folders"].values())) == 5
    assert manifest["prompts"]["count"] == 3
    assert manifest["seeds"] == [0, 1]
    assert manifest["decoder"]["sha256"]
    assert manifest["extractors"][str(tiny_clip)]["resize"] == "bicubic (Pillow)"
    report = (tmp_path / "report.html").read_text()
    assert report.count('src="data:image/png;base64,') == 3 * 6
    assert 'src="http' not in report
    assert "real vs real" in capsys.readouterr().out

    files = sorted((tmp_path / "drawn").glob("identity-*/*.png"))
    assert len(files) == 6
    before = {file: (file.read_bytes(), file.stat().st_mtime_ns) for file in files}
    files[2].unlink()
    assert run("--json", "second.json") == 0
    for file, (content, time) in before.items():
        assert file.read_bytes() == content
        assert (file.stat().st_mtime_ns == time) == (file != files[2])
    assert json.loads((tmp_path / "second.json").read_text())["pictures"] == pictures


def test_pictures_of_own_prompts_have_no_true_image(
    picture_adapter, captioned_pictures, tiny_clip, tiny_decoder, tmp_path
):
    (tmp_path / "prompts.txt").write_text("a red apple\n\nan apple, apple\n")
    options = ["--adapter", picture_adapter, "--decoder", tiny_decoder, "--pictures", captioned_pictures]
    options += ["--extractors", tiny_clip, "--clip", tiny_clip, "--prompts", tmp_path / "prompts.txt", "--steps", 1]
    options += ["--guidance", 1, "--size", 32, "--output", tmp_path / "drawn", "--json", tmp_path / "scores.json"]
    assert run_command("evaluate", [str(option) for option in options], "csdiff evaluate") == 0
    pictures = json.loads((tmp_path / "scores.json").read_text())["pictures"]
    assert "image" not in pictures["adapters"]
    assert pictures["real"]["clip_score"] is None
    assert pictures["adapters"]["identity"]["diversity"] is None


def test_refuses_a_store_as_reference(picture_adapter, plain_store, tiny_decoder, capsys):
    options = ["--adapter", str(picture_adapter), "--decoder", str(tiny_decoder), "--data", str(plain_store)]
    assert run_command("evaluate", options, "csdiff evaluate") == 2
    assert "expected captioned reference pictures, found the embedding store" in capsys.readouterr().err
