"""Presets, recognition of decoders, and which adapter fits which."""

import json

import pytest
from safetensors.torch import save_file
from tiny_pipelines import DIM, random_adapter

from csdiff import CSDiffError
from csdiff.pipelines import PRESETS, resolve_decoder
from csdiff.pipelines.decoders import DecoderSource, check_pairing
from csdiff.pipelines.pairing import read_adapter_card

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


def source_of(preset) -> DecoderSource:
    dim = preset.embedding_dim or DIM
    return DecoderSource(preset.repo, "", preset.hand_over, dim, preset, None, preset.ip_adapter)


def adapter_folder(folder, dim, image_encoder):
    adapter = random_adapter(dim, width=8)
    adapter.metadata = {"image_encoder": {"id": image_encoder}}
    adapter.save_pretrained(folder)
    return read_adapter_card(folder)


def test_every_preset_of_the_toolkit():
    names = ["tiny", "kandinsky22", "karlo", "sd-unclip-s", "sd-unclip-h", "ip-adapter-sd15", "ip-adapter-sdxl"]
    assert list(PRESETS) == names
    widths = {"kandinsky22": 1280, "karlo": 768, "sd-unclip-s": 768, "sd-unclip-h": 1024}
    widths |= {"ip-adapter-sd15": 1024, "ip-adapter-sdxl": 1280}
    assert {name: PRESETS[name].embedding_dim for name in widths} == widths


@pytest.mark.parametrize("name", [name for name in PRESETS if name != "tiny"])
def test_presets_take_adapters_of_their_encoder_only(name, tmp_path):
    preset = PRESETS[name]
    check_pairing(adapter_folder(tmp_path / "fits", preset.embedding_dim, preset.image_encoder), source_of(preset))
    other = VIT_L if preset.image_encoder != VIT_L else BIGG
    with pytest.raises(CSDiffError, match=rf"image encoder .* is not that of the adapter \({other}\)"):
        check_pairing(adapter_folder(tmp_path / "other", preset.embedding_dim, other), source_of(preset))
    with pytest.raises(CSDiffError, match=f"of 8 dimensions, but the decoder .* takes {preset.embedding_dim}"):
        check_pairing(adapter_folder(tmp_path / "narrow", 8, preset.image_encoder), source_of(preset))


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
    ],
)
def test_folders_are_recognised_by_their_index(class_name, files, preset, tmp_path):
    decoder = resolve_decoder(write_folder(tmp_path, class_name, **files))
    assert decoder.preset is PRESETS[preset]
    assert decoder.embedding_dim == PRESETS[preset].embedding_dim
    assert decoder.hand_over == PRESETS[preset].hand_over
    assert decoder.encoder("image")["id"] == PRESETS[preset].image_encoder


def test_a_fingerprint_goes_before_the_preset(tmp_path):
    mine = {"format": 1, "kind": "decoder", "image_encoder": {"id": "mine/clip"}}
    decoder = resolve_decoder(kandinsky(tmp_path, **{"csdiff.json": mine}))
    assert decoder.preset is None
    assert decoder.encoder("image") == {"id": "mine/clip"}
    assert decoder.encoder("text") is None


def test_an_unknown_width_is_no_preset(tmp_path):
    decoder = resolve_decoder(kandinsky(tmp_path, dim=DIM))
    assert decoder.preset is None
    assert decoder.embedding_dim == DIM


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda folder: write_folder(folder, "FluxPipeline"), "holds a FluxPipeline; expected one of Kand"),
        (lambda folder: write_folder(folder, "KandinskyV22ControlnetPipeline"), "holds a KandinskyV22Controlnet"),
        (lambda folder: write_folder(folder, "KandinskyV22Pipeline"), "Expected the file .*unet/config.json"),
        (lambda folder: kandinsky(folder, dim=None), "states no encoder_hid_dim"),
        (lambda folder: (folder / "model_index.json").write_text("{"), "expected JSON"),
        (lambda folder: (folder / "model_index.json").write_text("[]"), "expected a JSON object, found list"),
        (lambda folder: None, "Expected the file .*model_index.json, found nothing"),
    ],
)
def test_folders_that_are_no_decoder(make, words, tmp_path):
    make(tmp_path)
    with pytest.raises(CSDiffError, match=words):
        resolve_decoder(tmp_path)


def test_ip_adapter_files(tmp_path):
    import torch

    base = write_folder(tmp_path / "base", "StableDiffusionPipeline")
    save_file({"image_proj.proj.weight": torch.zeros(64, DIM)}, tmp_path / "pooled.safetensors")
    assert resolve_decoder(base, tmp_path / "pooled.safetensors").embedding_dim == DIM
    save_file({"image_proj.latents": torch.zeros(1, 4, DIM)}, tmp_path / "plus.safetensors")
    with pytest.raises(CSDiffError, match="not the plus"):
        resolve_decoder(base, tmp_path / "plus.safetensors")
    (tmp_path / "broken.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{")
    with pytest.raises(CSDiffError, match="not a safetensors file"):
        resolve_decoder(base, tmp_path / "broken.safetensors")
    with pytest.raises(CSDiffError, match="pickled weights are not read"):
        resolve_decoder(base, tmp_path / "ip-adapter.bin")
    with pytest.raises(CSDiffError, match="found nothing at"):
        resolve_decoder(base, tmp_path / "missing.safetensors")


def test_a_hub_that_does_not_answer_is_asked_once(monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    # nothing listens on the discard port
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    words = "neither a local copy nor the hub .http://127.0.0.1:9 does not answer.*; with HF_HUB_OFFLINE=1"
    with pytest.raises(CSDiffError, match=words) as caught:
        resolve_decoder("someone/decoder")
    assert "\n" not in str(caught.value)
    with pytest.raises(CSDiffError, match=r"'someone/adapter' is no folder here, .* does not answer"):
        read_adapter_card("someone/adapter")


def test_a_renamed_copy_is_the_same_encoder(metadata, tmp_path):
    adapter = random_adapter()
    adapter.metadata = {**metadata, "image_encoder": {**metadata["image_encoder"], "id": "elsewhere/renamed"}}
    adapter.save_pretrained(tmp_path / "adapter")
    card = read_adapter_card(tmp_path / "adapter")
    folder = kandinsky(tmp_path / "decoder", dim=DIM, **{"csdiff.json": {"kind": "decoder", **metadata}})
    check_pairing(card, resolve_decoder(folder))
    (folder / "csdiff.json").write_text(json.dumps({"kind": "decoder", "image_encoder": {"id": "/models/mine"}}))
    with pytest.warns(UserWarning, match=r"nothing tells"):
        check_pairing(card, resolve_decoder(folder))
