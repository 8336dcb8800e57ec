"""Metrics of pictures against known cases, pictures drawn, kept and measured, and what extracts their features."""

import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_image
from tiny import cloud, directions

from csdiff.adapters import LinearAdapter
from csdiff.errors import CSDiffError
from csdiff.evaluation.config import EvaluateConfig
from csdiff.evaluation.distances import feature_frechet_distance
from csdiff.evaluation.extractors import load_extractor
from csdiff.evaluation.picture_metrics import clip_score, concept_rate, diversity, fid, kid
from csdiff.evaluation.picture_run import PictureRun, picture_files, read_picture
from csdiff.pipelines.decoders import read_adapter_card
from csdiff.pipelines.embedding import PromptEmbedder


def test_fid_by_two_roads():
    """The eigenvalues of torchmetrics and the singular values used for extrapolation give one distance."""
    x, y = cloud(300, 8), 2 * cloud(200, 8, 1, shift=1.0)
    assert fid(x, y) == pytest.approx(feature_frechet_distance(x, y), rel=1e-3)


def test_kid_is_unbiased_and_sees_a_shift():
    values = torch.tensor([kid(cloud(40, 6, seed), cloud(40, 6, seed + 100), subsets=1)[0] for seed in range(40)])
    error = values.std() / 40**0.5
    assert abs(values.mean()) < 4 * error
    assert kid(cloud(40, 6), cloud(40, 6, 1, shift=1.0))[0] > 10 * error


def test_clip_score_of_equal_orthogonal_and_opposite_vectors():
    x = torch.eye(3)
    assert clip_score(x, 5 * x) == pytest.approx(100)
    assert clip_score(x, x.roll(1, 0)) == clip_score(x, -x) == 0


def test_diversity_counts_pairs_of_one_prompt_only():
    x = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [2.0, 0.0], [0.0, 3.0]])
    assert diversity(x, torch.tensor([0, 0, 1, 1, 2])) == pytest.approx(0.5)
    assert diversity(x, torch.arange(5)) is None


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


def test_noise_differs_between_prompts_and_not_between_lists():
    first = picture_files(["a cat", "a dog", "a cat"], 2, seed=3)
    assert len({file[:12] for file in first}) == 6
    assert picture_files(["a cat", "a dog"], 2, seed=3) == first[:4]


def test_a_damaged_picture_is_named(tmp_path):
    file = tmp_path / "a-cat.png"
    Image.new("RGB", (32, 32), "red").save(file)
    assert read_picture(file).getpixel((0, 0)) == (255, 0, 0)
    file.write_bytes(file.read_bytes()[:40])
    with pytest.raises(CSDiffError, match=r"a-cat\.png: expected a drawn picture"):
        read_picture(file)


@pytest.fixture
def options(captioned_pictures, tiny_clip, tiny_decoder, tmp_path):
    """Everything but the adapter: one step, small pictures."""
    return {
        "decoder": str(tiny_decoder),
        "pictures": str(captioned_pictures),
        "extractors": [str(tiny_clip)],
        "clip": str(tiny_clip),
        "num_prompts": 3,
        "steps": 1,
        "guidance": 1.0,
        "size": 32,
        "output": str(tmp_path / "drawn"),
    }


def test_pictures_are_drawn_once_and_measured(picture_adapter, tiny_clip, options, scores, run, tmp_path):
    """A second run keeps what is there and redraws what is missing, to the bit; scores repeat."""
    whole = {**options, "adapter": picture_adapter, "num_images": 2, "batch_size": 4}
    found = scores(**whole, report=tmp_path / "report.html")
    pictures, manifest = found["pictures"], found["manifest"]["pictures"]
    assert set(pictures["adapters"]) == {"identity", "raw_text", "mean_shift", "ridge", "image"}
    for column in pictures["adapters"].values():
        assert column["count"] == 6
        assert {"fid", "kid"} <= column["spaces"][str(tiny_clip)].keys()
        assert 0 <= column["picture_to_prompt"]["r@1"] <= 1
        assert column["diversity"] > 0
    # This adapter changes nothing; embeddings may differ by a rounding, which moves a few values by one grey level.
    unchanged, raw_text = (pictures["adapters"][name] for name in ("identity", "raw_text"))
    for name in ("clip_score", "cmmd", "diversity"):
        assert unchanged[name] == pytest.approx(raw_text[name], rel=1e-3)
    assert unchanged["spaces"][str(tiny_clip)] == pytest.approx(raw_text["spaces"][str(tiny_clip)], rel=1e-3)
    assert unchanged["picture_to_prompt"] == raw_text["picture_to_prompt"]
    assert len(set(manifest["folders"].values())) == 5
    assert (manifest["prompts"]["count"], manifest["seeds"]) == (3, [0, 1])
    assert manifest["decoder"]["sha256"]
    assert manifest["extractors"][str(tiny_clip)]["resize"] == "bicubic (Pillow)"
    report = (tmp_path / "report.html").read_text()
    assert report.count('src="data:image/png;base64,') == 3 * 6
    assert "with fewer than 50 images FID is no estimate" in report
    assert "<details>" in report
    assert "leaves 0 out" not in report
    assert "<th>raw text</th>" in report
    assert 'src="http' not in report
    assert "real vs real" in run.table

    files = sorted((tmp_path / "drawn").glob("identity-*/*.png"))
    assert len(files) == 6
    before = {file: (file.read_bytes(), file.stat().st_mtime_ns) for file in files}
    files[2].unlink()
    assert scores(**whole)["pictures"] == pictures
    for file, (content, time) in before.items():
        assert file.read_bytes() == content
        assert (file.stat().st_mtime_ns == time) == (file != files[2])


def test_pictures_of_own_prompts_have_no_true_image(picture_adapter, options, scores, tmp_path):
    (tmp_path / "prompts.txt").write_text("a red apple\n\nan apple, apple\n")
    pictures = scores(adapter=picture_adapter, prompts=tmp_path / "prompts.txt", **options)["pictures"]
    assert "image" not in pictures["adapters"]
    assert pictures["real"]["clip_score"] is None
    assert pictures["adapters"]["identity"]["diversity"] is None


def test_refuses_a_store_as_reference(picture_adapter, plain_store, tiny_decoder, refused):
    expected = "expected captioned reference pictures, found the embedding store"
    refused(expected, adapter=picture_adapter, decoder=tiny_decoder, data=plain_store)


@pytest.fixture
def folders(picture_adapter, options):
    """Folders of the pictures, by name, for changed options; nothing is drawn."""

    def make(device="cpu", **changes):
        cards = {"identity": read_adapter_card(picture_adapter)}
        return PictureRun(EvaluateConfig(**{**options, **changes}), cards, device).folders()

    return make


@pytest.mark.parametrize("changes", [{"steps": 2}, {"guidance": 2.0}, {"size": 64}, {"device": "cuda"}])
def test_settings_change_every_folder(changes, folders):
    """Another device has another number format."""
    before, after = folders(), folders(**changes)
    assert before == folders()
    assert not set(before.values()) & set(after.values())


def test_baselines_that_are_cross_fitted_have_other_folders(folders, tmp_path):
    (tmp_path / "prompts.txt").write_text("\n".join(f"apple number {index}" for index in range(12)))
    own = folders(num_prompts=None)
    given = folders(num_prompts=None, prompts=str(tmp_path / "prompts.txt"))
    assert own["identity"] == given["identity"]
    assert own["ridge"] != given["ridge"]


def test_a_negative_does_not_depend_on_what_is_missing(picture_adapter, options, run, tmp_path, monkeypatch):
    """The first adapter gives the negative, once, though its own pictures are there."""
    second = LinearAdapter.from_pretrained(picture_adapter)
    second.linear.bias.data += 3
    second.save_pretrained(tmp_path / "second")
    asked, negative = [], PromptEmbedder.negative

    def noted(self, prompt):
        asked.append(self.adapter.linear.bias.sum().item())
        return negative(self, prompt)

    monkeypatch.setattr(PromptEmbedder, "negative", noted)
    options |= {"guidance": 2, "picture_baselines": "[]", "compare": [picture_adapter, tmp_path / "second"]}
    for _ in range(2):
        assert run(**options)[0] == 0
        for file in (tmp_path / "drawn").glob("second-*/*.png"):
            file.unlink()
    assert asked == [0, 0]


PALACE, DAISY = 698, 985  # classes of ImageNet


@pytest.fixture(scope="module")
def efficientnet():
    return load_extractor("efficientnet-lite0")


def test_efficientnet_recognises_photographs(efficientnet):
    """The weights, the layers and the preprocessing belong together: otherwise the classes come out at random."""
    photographs = [Image.fromarray(load_sample_image(name)) for name in ("china.jpg", "flower.jpg")]
    features = efficientnet(photographs)
    assert features.shape == (2, 1280)
    assert features.dtype == torch.float32
    assert efficientnet.model._fc(features).argmax(1).tolist() == [PALACE, DAISY]


def test_any_clip_folder_is_an_extractor(tiny_clip):
    extractor = load_extractor(str(tiny_clip))
    pictures = [Image.new("RGB", (50, 40), colour) for colour in ("red", "blue")]
    features = extractor(pictures)
    assert features.shape == (2, extractor.dim)
    torch.testing.assert_close(features, extractor.encoder.encode(pictures).embeds)
    description = extractor.describe()
    assert len(description["sha256"]) == 64
    assert description["resize"] == "bicubic (Pillow)"
