"""Encoders: raw embeddings as transformers gives them, captions are text, and one rule for "the same encoder"."""

import json
import shutil
import warnings

import pytest
import torch
import transformers
from PIL import Image
from tiny import build_tiny_tokenizer

from csdiff.embeddings import CaptionTokenizer, compare_encoders, load_image_encoder, load_text_encoder, weights_sha256
from csdiff.embeddings.encoders import find_encoder, nearby
from csdiff.embeddings.fingerprint import check_same_encoder
from csdiff.errors import CSDiffError

CAPTIONS = ["a red apple", "something else entirely", "x"]


def test_clip_text_is_what_the_diffusers_priors_compute(tiny_clip):
    tokenizer = transformers.CLIPTokenizer.from_pretrained(tiny_clip)
    tokens = tokenizer(CAPTIONS, padding="max_length", truncation=True, return_tensors="pt")
    with torch.no_grad():
        expected = transformers.CLIPTextModelWithProjection.from_pretrained(tiny_clip)(tokens.input_ids)
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
    half = shutil.copytree(tiny_clip, tmp_path / "half")
    transformers.CLIPModel.from_pretrained(tiny_clip).half().save_pretrained(half)
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


def save_random(path, model, config):
    """A random text encoder of transformers with the tiny tokenizer."""
    tokenizer = build_tiny_tokenizer()
    torch.manual_seed(0)
    sizes = {"intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    model(config(vocab_size=len(tokenizer), **sizes, hidden_size=24)).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture
def language_model(tmp_path):
    """A random Llama: no padding token, no limit, a causal head."""
    return save_random(tmp_path / "llama", transformers.LlamaForCausalLM, transformers.LlamaConfig)


@pytest.fixture
def sentence_encoder(tmp_path):
    """A random BERT, of a sentence encoder without a pooling file."""
    return save_random(tmp_path / "bert", transformers.BertModel, transformers.BertConfig)


def test_a_language_model_gives_its_last_token(language_model):
    encoder = load_text_encoder(language_model)
    assert encoder.describe()["pooling"] == "last"
    assert encoder.dim == 24
    found = encoder.encode(CAPTIONS)
    last = torch.stack([states[mask][-1] for states, mask in zip(found.states, found.mask, strict=True)])
    assert torch.equal(found.embeds, last)
    alone = torch.cat([encoder.embed([caption]) for caption in CAPTIONS])
    torch.testing.assert_close(alone, found.embeds, atol=1e-5, rtol=1e-4)


def test_a_sentence_encoder_pools_as_it_says(sentence_encoder):
    encoder = load_text_encoder(sentence_encoder)
    assert encoder.describe()["pooling"] == "mean"
    found = encoder.encode(CAPTIONS)
    mean = torch.stack([states[mask].mean(0) for states, mask in zip(found.states, found.mask, strict=True)])
    torch.testing.assert_close(found.embeds, mean)
    (sentence_encoder / "1_Pooling").mkdir()
    (sentence_encoder / "1_Pooling/config.json").write_text(json.dumps({"pooling_mode_cls_token": True}))
    cls = load_text_encoder(sentence_encoder)
    torch.testing.assert_close(cls.encode(CAPTIONS).embeds, found.states[:, 0])
    torch.testing.assert_close(load_text_encoder(sentence_encoder, pooling="mean").encode(CAPTIONS).embeds, mean)


def test_captions_are_cut_to_the_length_asked_for(tiny_clip):
    encoder = load_text_encoder(tiny_clip, max_length=6)
    assert encoder.encode(["a very long caption indeed"]).states.shape == (1, 6, 32)


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


def unigram():
    """A SentencePiece-like tokenizer, in whose vocabulary the end of the text is a piece like any other."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    letters = [(letter, -3.0) for letter in "▁abcdefghijklmnopqrstuvwxyz/<>"]
    tokenizer = Tokenizer(models.Unigram([("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *letters], unk_id=2))
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    special = {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=64, **special)


@pytest.mark.parametrize("make", [lambda: build_tiny_tokenizer(max_length=64), unigram], ids=["bpe", "unigram"])
def test_a_special_token_in_a_caption_is_text(make):
    tokenizer = make()
    own = len(tokenizer("").input_ids)
    tokenize = CaptionTokenizer(tokenizer)
    special = torch.tensor(tokenizer.all_special_ids)
    for token in [*tokenizer.all_special_tokens, "＜/s＞"]:
        captions = [f"a cat{token} and a dog", f"{token}", "a cat"]
        ids, mask = tokenize(captions)
        found = [row[kept] for row, kept in zip(ids, mask, strict=True)]
        unknown = tokenizer.unk_token_id if token != tokenizer.unk_token else -1
        counts = [int((torch.isin(row, special) & (row != unknown)).sum()) for row in found]
        assert max(counts) <= own, token
        # Nothing behind it is lost.
        text = tokenizer.decode(found[0], skip_special_tokens=True).replace(" ", "")
        assert text.startswith("acat")
        assert text.endswith("andadog")
        assert tokenize.lengths(captions)[2] == len(found[2])


def test_half_a_surrogate_pair_becomes_the_replacement_character(tiny_clip):
    encoder = load_text_encoder(tiny_clip)
    assert torch.equal(encoder.embed(["a\ud83d"]), encoder.embed(["a\ufffd"]))


VIT_L, KARLO = "openai/clip-vit-large-patch14", "kakaobrain/karlo-v1-alpha"
UNCLIP = "stabilityai/stable-diffusion-2-1-unclip-small"
ONE = {"id": "a/b", "weights_sha256": "1" * 64, "dim": 4}


@pytest.mark.parametrize(
    ("expected", "found", "verdict"),
    [
        (ONE, {**ONE, "id": "/moved/elsewhere"}, "same"),
        (ONE, {**ONE, "weights_sha256": "2" * 64}, "different"),
        (ONE, {**ONE, "dim": 5}, "different"),
        ({**ONE, "pooling": "mean"}, {**ONE, "pooling": "cls"}, "different"),
        (ONE, None, "unknown"),
        (ONE, {"id": None, "dim": 4}, "unknown"),
        # Without both hashes: by name.
        (ONE, {"id": "a/b"}, "same"),
        (ONE, {"id": "c/d"}, "different"),
        (ONE, {"id": "/models/clip"}, "unknown"),
        ({"id": "/models/b"}, {"id": "/models/b"}, "same"),
        ({"id": VIT_L}, {"id": KARLO}, "same"),
        ({"id": VIT_L}, {"id": "/hub/models--kakaobrain--karlo-v1-alpha/snapshots/1/text_encoder"}, "same"),
        ({"id": VIT_L}, {"id": "/models/karlo-v1-alpha/text_encoder"}, "same"),
        ({"id": VIT_L}, {"id": "tiny-clip"}, "different"),
        # The hashes go before the names: a folder called like it may hold anything.
        ({"id": VIT_L, "weights_sha256": "1"}, {"id": "/models/karlo-v1-alpha", "weights_sha256": "2"}, "different"),
    ],
)
def test_one_rule_says_whether_two_records_are_of_one_encoder(expected, found, verdict):
    assert compare_encoders(expected, found, "text").verdict == verdict
    assert compare_encoders(found, expected, "text").verdict == verdict


def test_a_published_pipeline_has_the_encoder_for_one_tower_only():
    """Stable unCLIP decodes image embeddings of ViT-L/14, and reads its prompts with another text tower."""
    assert compare_encoders({"id": VIT_L}, {"id": UNCLIP}, "image").verdict == "same"
    assert compare_encoders({"id": VIT_L}, {"id": UNCLIP}, "text").verdict == "different"


def test_different_encoders_are_refused_and_unknown_ones_warned_of():
    with pytest.raises(CSDiffError, match=r"text encoder of the store \(c/d\) .* the adapter \(a/b\)") as error:
        check_same_encoder(ONE, {"id": "c/d"}, "text", "the adapter", "the store")
    assert "\n" not in str(error.value)
    with pytest.warns(UserWarning, match=r"text encoder of the store \(/mine\) may not be that of the adapter"):
        check_same_encoder(ONE, {"id": "/mine"}, "text", "the adapter", "the store")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_same_encoder(ONE, None, "text", "the adapter", "a foreign store")


def test_a_tower_has_one_hash_whole_or_alone(tiny_clip, tmp_path):
    text, image = load_text_encoder(tiny_clip), load_image_encoder(tiny_clip)
    text.model.save_pretrained(tmp_path / "text", max_shard_size="20KB")
    image.model.save_pretrained(tmp_path / "image")
    assert len(list((tmp_path / "text").glob("*.safetensors"))) > 1
    assert weights_sha256(tmp_path / "text", "text") == text.describe()["weights_sha256"]
    assert weights_sha256(tmp_path / "image", "image") == image.describe()["weights_sha256"]
    assert text.describe()["weights_sha256"] != image.describe()["weights_sha256"]
    with torch.no_grad():
        text.model.text_projection.weight[0, 0] += 1
    text.model.save_pretrained(tmp_path / "changed")
    assert weights_sha256(tmp_path / "changed", "text") != text.describe()["weights_sha256"]
    file = tmp_path / "changed/model.safetensors"
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(CSDiffError, match=r"model\.safetensors"):
        weights_sha256(tmp_path / "changed", "text")
