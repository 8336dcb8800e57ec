"""Presets and their recipes, recognition of decoders, and which adapter fits which."""

import json
from dataclasses import replace

import pytest
import torch
import yaml
from safetensors.torch import save_file
from tiny_pipelines import DIM, random_adapter

from csdiff import CSDiffError
from csdiff.pipelines import PRESETS, resolve_decoder
from csdiff.pipelines.decoders import check_pairing, read_adapter_card

BIGG = "laion/CLIP-ViT-bigG-14-laion2B-39B-b160k"
VIT_L = "openai/clip-vit-large-patch14"


def write_folder(folder, class_name, **files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in {"model_index.json": {"_class_name": class_name}, **files}.items():
        path = folder / name.replace("__", "/")
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(content))
    return folder


def kandinsky(folder, dim=1280, **extra):
    return write_folder(folder, "KandinskyV22Pipeline", **{"unet__config.json": {"encoder_hid_dim": dim}}, **extra)


def adapter_folder(folder, dim, image_encoder):
    random_adapter({"image_encoder": {"id": image_encoder}}, dim, width=8).save_pretrained(folder)
    return read_adapter_card(folder)


@pytest.mark.parametrize("name", [name for name in PRESETS if name != "tiny"])
def test_presets_take_adapters_of_their_encoder_only(name, tmp_path):
    preset = PRESETS[name]
    encoder = preset.image_encoder["id"]
    check_pairing(adapter_folder(tmp_path / "fits", preset.embedding_dim, encoder), preset)
    other = VIT_L if encoder != VIT_L else BIGG
    with pytest.raises(CSDiffError, match=rf"image encoder .* is not that of the adapter \({other}\)"):
        check_pairing(adapter_folder(tmp_path / "other", preset.embedding_dim, other), preset)
    with pytest.raises(CSDiffError, match=f"of 8 dimensions, but the decoder .* takes {preset.embedding_dim}"):
        check_pairing(adapter_folder(tmp_path / "narrow", 8, encoder), preset)


@pytest.mark.parametrize(
    ("class_name", "files", "preset"),
    [
        ("KandinskyV22Pipeline", {"unet__config.json": {"encoder_hid_dim": 1280}}, "kandinsky22"),
        ("KandinskyV22CombinedPipeline", {"unet__config.json": {"encoder_hid_dim": 1280}}, "kandinsky22"),
        ("UnCLIPPipeline", {"text_proj__config.json": {"clip_embeddings_dim": 768}}, "karlo"),
        ("StableUnCLIPImg2ImgPipeline", {"image_normalizer__config.json": {"embedding_dim": 768}}, "sd-unclip-s"),
        ("StableUnCLIPPipeline", {"image_normalizer__config.json": {"embedding_dim": 1024}}, "sd-unclip-h"),
        ("StableDiffusionPipeline", {}, "ip-adapter-sd15"),
        ("StableDiffusionXLPipeline", {}, "ip-adapter-sdxl"),
        ("FluxPipeline", {}, "flux-ip-adapter-v2"),
        ("FluxKontextPipeline", {}, "flux-ip-adapter-v2"),
    ],
)
def test_folders_are_recognised_by_their_index(class_name, files, preset, tmp_path):
    decoder = resolve_decoder(write_folder(tmp_path, class_name, **files))
    assert decoder == replace(PRESETS[preset], source=str(tmp_path), class_name=class_name)


def test_a_fingerprint_goes_before_the_preset_and_an_unknown_width_is_none(tmp_path):
    decoder = resolve_decoder(kandinsky(tmp_path, dim=DIM))
    assert (decoder.name, decoder.image_encoder, decoder.embedding_dim) == ("", None, DIM)
    mine = {"format": 1, "kind": "decoder", "image_encoder": {"id": "mine/clip"}}
    decoder = resolve_decoder(kandinsky(tmp_path, **{"csdiff.json": mine}))
    assert (decoder.name, decoder.image_encoder, decoder.text_encoder) == ("", {"id": "mine/clip"}, None)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda folder: write_folder(folder, "Flux2Pipeline"), "holds a Flux2Pipeline; expected one of Kand"),
        (lambda folder: write_folder(folder, "KandinskyV22ControlnetPipeline"), "holds a KandinskyV22Controlnet"),
        (lambda folder: write_folder(folder, "KandinskyV22Pipeline"), "unet/config.json"),
        (lambda folder: kandinsky(folder, dim=None), "states no encoder_hid_dim"),
        (lambda folder: (folder / "model_index.json").write_text("{"), "expected JSON"),
        (lambda folder: (folder / "model_index.json").write_text("[]"), "expected a JSON object, found a list"),
        (lambda folder: None, "model_index.json"),
    ],
)
def test_folders_that_are_no_decoder(make, words, tmp_path):
    make(tmp_path)
    with pytest.raises(CSDiffError, match=words):
        resolve_decoder(tmp_path)


@pytest.mark.parametrize(
    ("class_name", "projection", "other"),
    [
        ("StableDiffusionPipeline", "image_proj", "ip_adapter_proj_model"),
        ("FluxPipeline", "ip_adapter_proj_model", "image_proj"),
    ],
)
def test_ip_adapter_files(class_name, projection, other, tmp_path):
    base, weights = write_folder(tmp_path / "base", class_name), tmp_path / "weights"
    weights.mkdir()
    names = {"pooled": f"{projection}.proj.weight", "other": f"{other}.proj.weight", "plus": "image_proj.latents"}
    for name, tensor in names.items():
        save_file({tensor: torch.zeros(64, DIM)}, tmp_path / f"{name}.safetensors")
    (tmp_path / "pooled.safetensors").rename(weights / "pooled.safetensors")
    for place in (weights, weights / "pooled.safetensors"):
        decoder = resolve_decoder(base, place)
        assert (decoder.embedding_dim, decoder.ip_adapter) == (DIM, (str(weights), "", "pooled.safetensors"))
    (tmp_path / "broken.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{")
    for name, words in (
        ("other.safetensors", "made for this decoder"),
        ("plus.safetensors", "found none .*not the plus"),
        ("broken.safetensors", "safetensors"),
        ("ip-adapter.bin", "pickled weights are not read"),
        ("missing.safetensors", "found nothing of the kind"),
        (".", "a folder with 3 of them"),
    ):
        with pytest.raises(CSDiffError, match=words):
            resolve_decoder(base, tmp_path / name)


@pytest.mark.parametrize(
    ("class_name", "place", "preset"),
    [
        ("StableDiffusionXLPipeline", "h94/IP-Adapter/sdxl_models/ip-adapter_sdxl_vit-h.safetensors", "sdxl-vit-h"),
        ("StableDiffusionPipeline", "h94/IP-Adapter", "ip-adapter-sd15"),
        ("StableDiffusionXLPipeline", "h94/IP-Adapter", "ip-adapter-sdxl"),
        ("FluxPipeline", "XLabs-AI/flux-ip-adapter", "flux-ip-adapter"),
        ("FluxPipeline", "XLabs-AI/flux-ip-adapter-v2/ip_adapter.safetensors", "flux-ip-adapter-v2"),
    ],
)
def test_ip_adapters_of_the_hub_by_name(class_name, place, preset, tmp_path):
    assert resolve_decoder(write_folder(tmp_path, class_name), place).name == preset


def test_a_hub_that_does_not_answer_is_asked_once(monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    # nothing listens on the discard port
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    words = "neither a local copy nor the hub .http://127.0.0.1:9 does not answer.*; with HF_HUB_OFFLINE=1"
    with pytest.raises(CSDiffError, match=words) as caught:
        resolve_decoder("someone/decoder")
    assert "\n" not in str(caught.value)
    with pytest.raises(CSDiffError, match=r"someone/adapter: expected an adapter, .* does not answer"):
        read_adapter_card("someone/adapter")


def test_a_renamed_copy_is_the_same_encoder(metadata, tmp_path):
    renamed = {**metadata, "image_encoder": {**metadata["image_encoder"], "id": "elsewhere/renamed"}}
    random_adapter(renamed).save_pretrained(tmp_path / "adapter")
    card = read_adapter_card(tmp_path / "adapter")
    folder = kandinsky(tmp_path / "decoder", dim=DIM, **{"csdiff.json": {"kind": "decoder", **metadata}})
    check_pairing(card, resolve_decoder(folder))
    (folder / "csdiff.json").write_text(json.dumps({"kind": "decoder", "image_encoder": {"id": "/models/mine"}}))
    with pytest.warns(UserWarning, match=r"nothing tells"):
        check_pairing(card, resolve_decoder(folder))


@pytest.mark.parametrize("name", [name for name in PRESETS if name != "tiny"])
def test_the_recipe_trains_on_the_encoders_of_its_preset(name, root):
    recipe = yaml.safe_load((root / "configs" / f"{PRESETS[name].recipe}.yaml").read_text())
    assert recipe["data"]["text_encoder"] == PRESETS[name].text_encoder["id"]
    assert recipe["data"]["image_encoder"] == PRESETS[name].image_encoder["id"]
