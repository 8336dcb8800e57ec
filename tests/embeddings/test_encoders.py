"""Encoders: raw embeddings as transformers gives them, one description, clear refusals."""

import json
import shutil

import pytest
import torch
from PIL import Image
from tiny import build_tiny_tokenizer

from csdiff.embeddings import load_image_encoder, load_text_encoder, weights_sha256
from csdiff.embeddings.encoders import find_encoder, nearby
from csdiff.errors import CSDiffError

CAPTIONS = ["a red apple", "something else entirely", "x"]


def test_clip_text_is_what_the_diffusers_priors_compute(tiny_clip):
    from transformers import CLIPTextModelWithProjection, CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(tiny_clip)
    tokens = tokenizer(CAPTIONS, padding="max_length", truncation=True, return_tensors="pt")
    with torch.no_grad():
        expected = CLIPTextModelWithProjection.from_pretrained(tiny_clip)(tokens.input_ids)
    encoder = load_text_encoder(tiny_clip)
    found = encoder.encode(CAPTIONS)
    torch.testing.assert_close(found.embeds, expected.text_embeds)
    torch.testing.assert_close(found.states, expected.last_hidden_state)
    assert torch.equal(found.mask, tokens.attention_mask.bool())
    torch.testing.assert_close(encoder.embed(CAPTIONS), expected.text_embeds)
    assert (encoder.dim, encoder.max_length) == (16, 16)


def test_clip_images_are_raw_projected_embeddings(tiny_clip):
    encoder = load_image_encoder(tiny_clip)
    found = encoder.encode([Image.new("RGB", (40, 30), color) for color in ("red", "blue")])
    assert found.embeds.shape == (2, 16)
    assert found.tokens.shape == (2, 17, 32)
    assert ((found.embeds.norm(dim=1) - 1).abs() > 0.05).all()
    torch.testing.assert_close(encoder.project(found.tokens)[:, 0], found.embeds)


def test_palette_and_grey_images_are_encoded_as_rgb(tiny_clip):
    encoder = load_image_encoder(tiny_clip)
    grey = Image.new("L", (40, 30), 90)
    torch.testing.assert_close(encoder.encode([grey]).embeds, encoder.encode([grey.convert("RGB")]).embeds)


def test_a_folder_in_half_precision_is_computed_in_single_on_the_cpu(tiny_clip, tmp_path):
    from transformers import CLIPModel

    half = shutil.copytree(tiny_clip, tmp_path / "half")
    CLIPModel.from_pretrained(tiny_clip).half().save_pretrained(half)
    image = [Image.new("RGB", (40, 30), "red")]
    for load, call in (
        (load_text_encoder, lambda e: e.embed(CAPTIONS)),
        (load_image_encoder, lambda e: e.encode(image).embeds),
    ):
        encoder = load(half)
        assert encoder.model.dtype == torch.float32
        # Weights of eleven bits.
        torch.testing.assert_close(call(encoder), call(load(tiny_clip)), rtol=1e-2, atol=1e-2)


def test_a_saved_pipeline_is_an_encoder_by_its_folders(tiny_clip, tmp_path):
    encoder = load_text_encoder(tiny_clip)
    (tmp_path / "model_index.json").write_text("{}")
    encoder.model.save_pretrained(tmp_path / "text_encoder")
    encoder.tokenizer.save_pretrained(tmp_path / "tokenizer")
    torch.testing.assert_close(load_text_encoder(tmp_path).embed(CAPTIONS), encoder.embed(CAPTIONS))
    with pytest.raises(CSDiffError, match="expected a pipeline with image_encoder/"):
        load_image_encoder(tmp_path)


@pytest.fixture(scope="module")
def language_model(tmp_path_factory):
    """A random Llama: no padding token, no limit, a causal head."""
    from transformers import LlamaConfig, LlamaForCausalLM

    path = tmp_path_factory.mktemp("llama")
    tokenizer = build_tiny_tokenizer()
    torch.manual_seed(0)
    sizes = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def sentence_encoder(tmp_path_factory):
    """A random BERT with the pooling file of a sentence encoder."""
    from transformers import BertConfig, BertModel

    path = tmp_path_factory.mktemp("bert")
    tokenizer = build_tiny_tokenizer()
    torch.manual_seed(0)
    sizes = {"hidden_size": 20, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    BertModel(BertConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def test_a_language_model_gives_its_last_token(language_model):
    encoder = load_text_encoder(language_model)
    assert encoder.describe()["pooling"] == "last"
    assert encoder.dim == 24
    found = encoder.encode(CAPTIONS)
    last = torch.stack([states[mask][-1] for states, mask in zip(found.states, found.mask, strict=True)])
    assert torch.equal(found.embeds, last)
    alone = torch.cat([encoder.embed([caption]) for caption in CAPTIONS])
    torch.testing.assert_close(alone, found.embeds, atol=1e-5, rtol=1e-4)


def test_a_sentence_encoder_pools_as_it_says(sentence_encoder, tmp_path):
    encoder = load_text_encoder(sentence_encoder)
    assert encoder.describe()["pooling"] == "mean"
    found = encoder.encode(CAPTIONS)
    mean = torch.stack([states[mask].mean(0) for states, mask in zip(found.states, found.mask, strict=True)])
    torch.testing.assert_close(found.embeds, mean)
    folder = shutil.copytree(sentence_encoder, tmp_path / "bert")
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling/config.json").write_text(json.dumps({"pooling_mode_cls_token": True}))
    cls = load_text_encoder(folder)
    torch.testing.assert_close(cls.encode(CAPTIONS).embeds, found.states[:, 0])
    torch.testing.assert_close(load_text_encoder(folder, pooling="mean").encode(CAPTIONS).embeds, mean)


def test_captions_are_cut_to_the_length_asked_for(tiny_clip):
    encoder = load_text_encoder(tiny_clip, max_length=6)
    assert encoder.encode(["a very long caption indeed"]).states.shape == (1, 6, 32)
    with pytest.raises(CSDiffError, match="max_length: expected at most 16, the tokenizer's limit, found 17"):
        load_text_encoder(tiny_clip, max_length=17)


def without(folder, target, *names):
    return shutil.copytree(folder, target, ignore=shutil.ignore_patterns(*names))


def test_what_is_no_encoder_is_refused_in_one_sentence(tiny_clip, sentence_encoder, tmp_path):
    pickled = without(tiny_clip, tmp_path / "pickled", "*.safetensors")
    (pickled / "pytorch_model.bin").write_bytes(b"")
    truncated = shutil.copytree(tiny_clip, tmp_path / "truncated")
    weights = truncated / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    plain = tmp_path / "plain"
    load_text_encoder(tiny_clip).model.text_model.save_pretrained(plain)
    (plain / "config.json").write_bytes((tiny_clip / "config.json").read_bytes())
    cases = [
        (load_text_encoder, tmp_path / "none", "expected a folder with a text encoder, found none"),
        (load_text_encoder, "nobody/nothing", r"expected a text encoder, .* nor the hub \(HF_HUB_OFFLINE is set\)"),
        (load_image_encoder, without(tiny_clip, tmp_path / "c", "config.json"), "with config.json for the image"),
        (load_text_encoder, pickled, "the weights cannot be loaded"),
        (load_image_encoder, truncated, "the weights cannot be loaded"),
        (
            load_text_encoder,
            without(tiny_clip, tmp_path / "t", "*token*", "vocab*", "merges*"),
            "expected a tokenizer",
        ),
        (load_image_encoder, without(tiny_clip, tmp_path / "p", "pre*"), "expected an image processor"),
        (load_image_encoder, sentence_encoder, "expected an image"),
    ]
    for load, id, message in cases:
        with pytest.raises(CSDiffError, match=message) as error:
            load(id)
        assert "\n" not in str(error.value)
    with pytest.raises(CSDiffError, match="expected safetensors weights, found"):
        weights_sha256(pickled)
    with pytest.raises(CSDiffError, match="expected pooling projection for a clip"):
        load_text_encoder(tiny_clip, pooling="mean")


def test_an_encoder_that_moved_is_found_beside_the_store_or_named(tiny_clip, tmp_path):
    here, record = tmp_path / "new/models/clip", load_text_encoder(tiny_clip).describe()
    shutil.copytree(tiny_clip, here)
    (tmp_path / "new/runs/r1").mkdir(parents=True)
    for old in (str(tmp_path / "old/models/clip"), "models/clip", "../clip"):
        known = {**record, "id": old}
        found = find_encoder(known, "text", beside=[tmp_path / "new/models", tmp_path / "new/runs/r1"])
        assert found == {**known, "id": str(here)}
        with pytest.raises(CSDiffError, match=r"clip.*--text_encoder"):
            find_encoder(known, "text", beside=[tmp_path / "elsewhere"])
    known = {**record, "id": "/old/models/clip"}
    # Another encoder under the same name is not the one.
    with pytest.raises(CSDiffError, match="--text_encoder"):
        find_encoder({**known, "weights_sha256": "0" * 64}, "text", beside=[tmp_path / "new"])
    stranger = {"id": "stranger/clip"}
    assert nearby(stranger, "text", tmp_path / "new/models") == stranger
    assert find_encoder(known, "text", given=here)["id"] == str(here)
    assert find_encoder({**record, "id": str(tiny_clip)}, "text", beside=[tmp_path / "new"])["id"] == str(tiny_clip)
    with pytest.raises(CSDiffError, match="not that of the adapter"):
        find_encoder({**known, "weights_sha256": "0" * 64}, "text", given=here)
