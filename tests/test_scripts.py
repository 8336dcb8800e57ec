"""The scripts that build `assets/`: each training script runs, and an interrupted run ends where a whole one does."""

import json
import sys

import pytest
import torch
from diffusers import KandinskyV22Pipeline
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import CLIPModel, CLIPTokenizer

from csdiff.resources import assets_dir

pytest.importorskip("efficientnet_lite_pytorch")


@pytest.fixture(autouse=True)
def scripts(monkeypatch):
    monkeypatch.syspath_prepend(str(assets_dir().parent / "scripts"))


def run(monkeypatch, name, *options):
    module = __import__(name)
    few = ("--every", 800, "--steps", 2, "--batch", 2, "--further", "none")
    monkeypatch.setattr(sys, "argv", [name, *(str(option) for option in (*options, *few))])
    module.main()


def test_training_scripts_end_in_a_pipeline_that_draws(monkeypatch, tmp_path):
    phrases = [f"a thing with {i} parts" for i in range(1600)]
    (tmp_path / "phrases.json").write_text(json.dumps(phrases))
    save_file({"targets": torch.randn(len(phrases), 8)}, tmp_path / "phrases.safetensors")
    clip, movq = tmp_path / "clip/model", tmp_path / "autoencoder/movq"
    run(monkeypatch, "train_clip", "--output", tmp_path / "clip", "--phrases", tmp_path)
    run(monkeypatch, "train_autoencoder", "--output", tmp_path / "autoencoder")
    run(monkeypatch, "train_decoder", "--output", tmp_path / "decoder", "--clip", clip, "--movq", movq)

    assert {value.dtype for value in load_file(clip / "model.safetensors").values()} == {torch.float16}
    assert CLIPModel.from_pretrained(clip).dtype == torch.float32
    tokenizer = CLIPTokenizer.from_pretrained(clip)
    assert tokenizer.decode(tokenizer("A Red Apple")["input_ids"], skip_special_tokens=True) == "a red apple"
    decoder = KandinskyV22Pipeline.from_pretrained(tmp_path / "decoder/pipeline", dtype=torch.float32)
    embeds = torch.randn(1, decoder.unet.config.encoder_hid_dim)
    options = {"height": 128, "width": 128, "num_inference_steps": 2}
    image = decoder(image_embeds=embeds, negative_image_embeds=embeds, **options).images[0]
    assert image.size == (128, 128)


def test_an_interrupted_run_ends_where_a_whole_one_does(tmp_path):
    from loop import Loop

    def train(folder, stop):
        torch.manual_seed(0)
        model, calls = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)), []

        def losses(scale):
            calls.append(scale)
            if stop is not None and len(calls) > stop:
                raise KeyboardInterrupt
            x = torch.randn(8, 4)
            return {"error": scale * (model(x) - x).square().mean()}

        options = {"steps": 12, "learning_rate": 0.1, "decay": 0.5, "weight_decay": 0.1, "betas": (0.9, 0.99)}
        options |= {"last_losses": lambda: losses(2.0), "save_every": 4}
        Loop({"model": model}, lambda: losses(1.0), folder, **options).run()
        return model

    whole = train(tmp_path / "whole", None)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "parts", 11)
    resumed = train(tmp_path / "parts", None)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
