"""Metrics of pictures against cases whose value is known, and pictures drawn, kept and measured."""

import json
import math
import shutil
from importlib import import_module

import pytest
import torch
import torch.nn.functional as F

from csdiff.cli import run_command
from csdiff.evaluation.config import EvaluateConfig
from csdiff.evaluation.distances import feature_frechet_distance
from csdiff.evaluation.drawing import jobs
from csdiff.evaluation.picture_metrics import clip_score, cmmd, diversity, fid, kid
from csdiff.evaluation.picture_run import PictureRun
from csdiff.pipelines.decoders import AdapterCard, read_adapter_card
from csdiff.pipelines.embedding import PromptEmbedder


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
    # This adapter changes nothing; embeddings may differ by a rounding, which moves a few values by one grey level.
    unchanged, raw_text = pictures["adapters"]["identity"], pictures["adapters"]["raw_text"]
    for name in ("clip_score", "cmmd", "diversity"):
        assert unchanged[name] == pytest.approx(raw_text[name], rel=1e-3)
    spaces = str(tiny_clip)
    assert unchanged["spaces"][spaces] == pytest.approx(raw_text["spaces"][spaces], rel=1e-3)
    assert unchanged["picture_to_prompt"] == raw_text["picture_to_prompt"]
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


@pytest.fixture
def folders(picture_adapter, captioned_pictures, tiny_clip, tiny_decoder, tmp_path, monkeypatch):
    """Folders of the pictures, by name, for changed options; nothing is drawn."""
    monkeypatch.setattr("csdiff.evaluation.drawing.PictureFolder.missing", lambda *_: [])

    def make(device="cpu", **changes):
        config = EvaluateConfig(
            **{
                "decoder": str(tiny_decoder),
                "pictures": str(captioned_pictures),
                "clip": str(tiny_clip),
                "num_prompts": 3,
                "steps": 1,
                "guidance": 1.0,
                "output": str(tmp_path / "drawn"),
                **changes,
            }
        )
        drawn = PictureRun(config, {"identity": read_adapter_card(picture_adapter)})._draw(device)
        return {name: folder.path for name, folder in drawn.items()}

    return make


@pytest.mark.parametrize("changes", [{"steps": 2}, {"guidance": 2.0}, {"size": 64}, {"device": "cuda"}])
def test_settings_change_every_folder(changes, folders):
    """Another device has another number format."""
    before, after = folders(), folders(**changes)
    assert before == folders()
    assert not set(before.values()) & set(after.values())


def test_baselines_that_are_cross_fitted_have_other_folders(folders, captioned_pictures, tmp_path):
    own = folders(num_prompts=None)
    captions = [f"apple number {index}" for index in range(12)]
    (tmp_path / "prompts.txt").write_text("\n".join(captions))
    given = folders(num_prompts=None, prompts=str(tmp_path / "prompts.txt"))
    assert own["identity"] == given["identity"]
    assert own["ridge"] != given["ridge"]


def test_a_negative_does_not_depend_on_what_is_missing(
    picture_adapter, captioned_pictures, tiny_clip, tiny_decoder, tmp_path, monkeypatch
):
    """Everything a run computes once is computed once, and the first adapter gives the negative though it is drawn."""
    monkeypatch.chdir(tmp_path)
    second = shutil.copytree(picture_adapter, tmp_path / "second")
    (second / "config.json").write_text((second / "config.json").read_text() + " ")
    asked, cards, hashed = [], [], []
    negative, init = PromptEmbedder.negative, PromptEmbedder.__init__

    def noted(self, prompt):
        asked.append(cards[-1])
        return negative(self, prompt)

    def seen(self, card, *more):
        cards.append(str(card.path))
        init(self, card, *more)

    def record(decoder):
        hashed.append(decoder)
        return {"sha256": "0"}

    monkeypatch.setattr(PromptEmbedder, "negative", noted)
    monkeypatch.setattr(PromptEmbedder, "__init__", seen)
    monkeypatch.setattr("csdiff.evaluation.picture_run.decoder_record", record)
    options = ["--compare", picture_adapter, second, "--decoder", tiny_decoder, "--pictures", captioned_pictures]
    options += ["--extractors", tiny_clip, "--clip", tiny_clip, "--num_prompts", 2, "--steps", 1, "--guidance", 2]
    options += ["--size", 32, "--output", tmp_path / "drawn", "--picture_baselines", "[]"]
    command = [str(option) for option in options]
    assert run_command("evaluate", command, "csdiff evaluate") == 0
    assert len(hashed) == 1
    assert cards == [str(picture_adapter), str(second)]
    for file in (tmp_path / "drawn").glob("second-*/*.png"):
        file.unlink()
    cards.clear()
    asked.clear()
    assert run_command("evaluate", command, "csdiff evaluate") == 0
    assert cards == [str(picture_adapter), str(second)]
    assert asked == [str(picture_adapter)]


def test_an_adapter_is_hashed_once(picture_adapter, monkeypatch):
    card = read_adapter_card(picture_adapter)
    first = card.sha256
    monkeypatch.setattr("csdiff.pipelines.decoders.hashlib", None)
    assert isinstance(card, AdapterCard)
    assert card.sha256 == first


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--extractors", "nowhere/at/all"), "nowhere/at/all"),
        (("--extractors", "inception:nowhere.pth"), "inception"),
        (("--clip", "nowhere/at/all"), "nowhere/at/all"),
    ],
)
def test_what_measures_pictures_is_loaded_before_anything_is_measured(
    options, said, picture_adapter, captioned_pictures, tiny_decoder, tiny_clip, tmp_path, monkeypatch, capsys
):
    def measured(*_):
        raise AssertionError("measured before everything was loaded")

    monkeypatch.setattr(import_module("csdiff.evaluation.evaluate"), "_predictions", measured)
    whole = ["--adapter", picture_adapter, "--decoder", tiny_decoder, "--data", captioned_pictures]
    whole += ["--output", tmp_path / "drawn", "--clip", tiny_clip, "--extractors", tiny_clip, *options]
    assert run_command("evaluate", [str(option) for option in whole], "csdiff evaluate") == 2
    assert said in capsys.readouterr().err
