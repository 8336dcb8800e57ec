"""From prompts to files: `generate`."""

import json
import logging
import os
import re
import shlex
import shutil

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_pipelines import (
    DIM,
    ip_adapter_weights,
    karlo_folder,
    prior_transformer,
    random_adapter,
    stable_diffusion,
    stable_diffusion_xl,
    stable_unclip,
    stable_unclip_img2img,
)

from csdiff import CSDiffError
from csdiff.adapters import LoRAAdapter, TransformerAdapter
from csdiff.cli import parse
from csdiff.pipelines import GenerateConfig, generate


@pytest.fixture(scope="module")
def decoder(tiny_decoder, metadata, tmp_path_factory):
    """The tiny Kandinsky decoder with its fingerprint."""
    folder = tmp_path_factory.mktemp("decoder") / "decoder"
    shutil.copytree(tiny_decoder, folder)
    (folder / "csdiff.json").write_text(json.dumps({"format": 1, "kind": "decoder", **metadata}))
    return folder


@pytest.fixture
def config(decoder, adapter_folder, tmp_path):
    """`config(**changes)`: options of a quick run into a fresh folder."""

    def make(**changes) -> GenerateConfig:
        options = {
            "prompt": ["a red apple"],
            "adapter": str(adapter_folder),
            "decoder": str(decoder),
            "steps": 2,
            "height": 32,
            "width": 32,
            "output": str(tmp_path / "pictures"),
            "progress": False,
        }
        return GenerateConfig(**{**options, **changes})

    return make


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()} if folder.exists() else {}


def test_a_picture_and_its_record(config, tmp_path, adapter_folder, decoder, encoders):
    (path,) = generate(config(seed=5, guidance=2.0))
    assert path == tmp_path / "pictures" / "a-red-apple-5.png"
    assert Image.open(path).size == (32, 32)
    record = json.loads(path.with_suffix(".json").read_text())
    assert record["prompt"] == "a red apple"
    assert (record["seed"], record["steps"], record["guidance"]) == (5, 2, 2.0)
    assert record["adapter"]["folder"] == str(adapter_folder)
    assert len(record["adapter"]["sha256"]) == 64
    assert record["decoder"]["source"] == str(decoder)
    assert record["text_encoder"]["weights_sha256"] == encoders["text"].describe()["weights_sha256"]
    assert record["versions"]["diffusers"]
    assert "--seed 5" in record["command"]
    assert "--guidance 2.0" in record["command"]


@pytest.mark.parametrize(("batch_size", "num_images", "drawn"), [(1, 2, 1), (2, 1, 2), (2, 2, 2), (3, 2, 4)])
def test_the_recorded_command_draws_the_same_bytes(batch_size, num_images, drawn, config, tmp_path):
    options = {"num_images": num_images, "batch_size": batch_size, "guidance": 2.0, "negative_prompt": "blurry"}
    paths = generate(config(prompt=["a cat", "it's a dog"], grid=False, **options))
    words = shlex.split(json.loads(paths[1].with_suffix(".json").read_text())["command"])
    assert words[:2] == ["csdiff", "generate"]
    again = parse(GenerateConfig, words[2:], "csdiff generate")
    # the picture alone, its batch, or, where that begins in the middle of a prompt, the run
    assert len(again.prompt) * again.num_images == drawn
    assert again.batch_size == batch_size
    again.output, again.progress, again.grid = str(tmp_path / "again"), False, False
    pictures = {path.name: path.read_bytes() for path in generate(again)}
    assert pictures[paths[1].name] == paths[1].read_bytes()


def test_same_seed_same_bytes_whatever_else_is_drawn(config, tmp_path):
    together = generate(config(prompt=["a cat", "a red apple"], num_images=2, output=str(tmp_path / "many")))
    names = ["a-cat-0.png", "a-cat-1.png", "a-red-apple-0.png", "a-red-apple-1.png", "grid.png"]
    assert [path.name for path in together] == names
    (alone,) = generate(config(seed=1))
    assert alone.read_bytes() == together[3].read_bytes()
    assert len({path.read_bytes() for path in together[:4]}) == 4


def test_a_batch_draws_the_same_pictures(config, tmp_path):
    one_by_one = generate(config(num_images=3, grid=False))
    in_batches = generate(config(num_images=3, grid=False, batch_size=2, output=str(tmp_path / "batched")))
    for left, right in zip(one_by_one, in_batches, strict=True):
        pixels = [torch.tensor(list(Image.open(path).tobytes()), dtype=torch.int) for path in (left, right)]
        # a batch may round differently in the last bit
        assert (pixels[0] - pixels[1]).abs().max() <= 1


def test_a_rerun_replaces_and_another_run_does_not(config, tmp_path):
    first = generate(config())
    assert generate(config()) == first
    (other,) = generate(config(steps=3))
    assert other.name == "a-red-apple-0-2.png"
    assert len(contents(tmp_path / "pictures")) == 4


def test_the_grid(config):
    *pictures, grid = generate(config(prompt=["a cat", "a dog"], num_images=3))
    assert Image.open(grid).size == (96, 64)
    corner = Image.open(grid).crop((64, 32, 96, 64))
    assert corner.tobytes() == Image.open(pictures[5]).convert("RGB").tobytes()
    assert Image.open(generate(config(prompt=["a", "b", "c"]))[-1]).size == (64, 64)


def test_prompts_file(config, tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("a blue boat\n\n  ein grüner Frosch  \n", encoding="utf-8")
    paths = generate(config(prompts_file=str(file), grid=False))
    assert [path.name for path in paths] == ["a-red-apple-0.png", "a-blue-boat-0.png", "ein-grüner-frosch-0.png"]


def test_without_an_adapter_the_raw_text_embedding_is_drawn(config, tmp_path):
    (raw,) = generate(config(adapter="none", output=str(tmp_path / "raw")))
    (adapted,) = generate(config())
    assert json.loads(raw.with_suffix(".json").read_text())["adapter"] == "none"
    assert raw.read_bytes() != adapted.read_bytes()


def test_negative_prompt_and_guidance_matter(config, tmp_path):
    changes = [{"guidance": 1.0}, {"guidance": 4.0}, {"guidance": 4.0, "negative_prompt": "blurry"}]
    pictures = {
        generate(config(**change, output=str(tmp_path / str(index))))[0].read_bytes()
        for index, change in enumerate(changes)
    }
    assert len(pictures) == 3


def test_overlong_prompts_warn_with_what_is_cut(config, caplog):
    with caplog.at_level(logging.WARNING):
        generate(config(prompt=["a very " + "long " * 20 + "prompt"]))
    assert "the text encoder reads 16; this end is cut off" in caplog.text
    assert "prompt" in caplog.records[-1].getMessage()[-10:]


def stable_unclip_with_prior(folder, clip):
    stable_unclip(clip, DIM).save_pretrained(folder)
    return {}


def stable_unclip_with_image_embeds(folder, clip):
    stable_unclip_img2img(clip, DIM).save_pretrained(folder)
    return {}


def karlo(folder, clip):
    karlo_folder(folder, clip, DIM)
    return {"height": None, "width": None}


def sd15(folder, clip):
    pipe = stable_diffusion(clip)
    pipe.save_pretrained(folder)
    return {"ip_adapter": str(ip_adapter_weights(folder.with_name("weights"), pipe.unet, DIM))}


def sdxl(folder, clip):
    pipe = stable_diffusion_xl(clip)
    pipe.save_pretrained(folder)
    return {"ip_adapter": str(ip_adapter_weights(folder.with_name("weights"), pipe.unet, DIM))}


@pytest.mark.parametrize("make", [stable_unclip_with_prior, stable_unclip_with_image_embeds, karlo, sd15, sdxl])
def test_every_kind_of_decoder_folder_is_recognised(make, config, tiny_clip, tmp_path):
    torch.manual_seed(0)
    options = make(tmp_path / "decoder", tiny_clip)
    changes = {"decoder": str(tmp_path / "decoder"), "prompt": ["a cat", "a dog"], "grid": False, **options}
    paths = generate(config(**changes, batch_size=2))
    assert len({path.read_bytes() for path in paths}) == 2
    (again,) = generate(config(**{**changes, "prompt": ["a dog"]}, output=str(tmp_path / "again"), batch_size=1))
    left, right = (torch.tensor(list(Image.open(path).tobytes()), dtype=torch.int) for path in (paths[1], again))
    assert (left - right).abs().max() <= 1


def test_adapters_that_sample_draw_another_embedding_for_each_seed(config, metadata, encoders, tmp_path):
    text = encoders["text"]
    adapter = TransformerAdapter.from_preset(
        "tiny", embedding_dim=DIM, states_dim=text.states_dim, num_embeddings=text.max_length, noise_token=True
    )
    torch.nn.init.normal_(adapter.proj_to_clip_embeddings.weight)
    adapter.metadata = dict(metadata)
    adapter.save_pretrained(tmp_path / "adapter")
    options = {"adapter": str(tmp_path / "adapter"), "grid": False}
    first, second = generate(config(**options, num_images=2))
    assert first.read_bytes() != second.read_bytes()
    (again,) = generate(config(**options, seed=1, output=str(tmp_path / "again")))
    assert again.read_bytes() == second.read_bytes()


def test_lora_adapters_encode_with_their_own_text_encoder(config, metadata, tiny_clip, tmp_path):
    adapter = LoRAAdapter(embedding_dim=DIM, text_encoder=str(tiny_clip), rank=2)
    torch.manual_seed(0)
    for name, parameter in adapter.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    adapter.metadata = dict(metadata)
    adapter.save_pretrained(tmp_path / "lora")
    (path,) = generate(config(adapter=str(tmp_path / "lora")))
    (raw,) = generate(config(adapter="none", output=str(tmp_path / "raw")))
    assert path.read_bytes() != raw.read_bytes()


def other_width(tmp_path, metadata):
    adapter = random_adapter(dim=24)
    adapter.metadata = dict(metadata)
    adapter.save_pretrained(tmp_path / "bad")


def other_encoder(tmp_path, metadata):
    adapter = random_adapter()
    image = {**metadata["image_encoder"], "id": "elsewhere/clip", "weights_sha256": "0" * 64}
    adapter.metadata = {**metadata, "image_encoder": image}
    adapter.save_pretrained(tmp_path / "bad")


def other_text_weights(tmp_path, metadata):
    adapter = random_adapter()
    adapter.metadata = {**metadata, "text_encoder": {**metadata["text_encoder"], "weights_sha256": "0" * 64}}
    adapter.save_pretrained(tmp_path / "bad")


def unit_norm(tmp_path, metadata):
    adapter = random_adapter()
    adapter.metadata = {**metadata, "normalized": True}
    adapter.save_pretrained(tmp_path / "bad")


def no_config(tmp_path, metadata):
    random_adapter().save_pretrained(tmp_path / "bad")
    (tmp_path / "bad" / "config.json").unlink()


def no_weights(tmp_path, metadata):
    adapter = random_adapter()
    adapter.metadata = dict(metadata)
    adapter.save_pretrained(tmp_path / "bad")
    next((tmp_path / "bad").glob("*.safetensors")).unlink()


def not_finite_off_its_data(tmp_path, metadata):
    adapter = random_adapter()
    adapter.norm_scale.fill_(400.0)
    adapter.metadata = dict(metadata)
    adapter.save_pretrained(tmp_path / "bad")


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda *_: None, "does not exist"),
        (no_config, "config.json is missing"),
        (no_weights, "safetensors is missing"),
        (other_width, "of 24 dimensions, but the decoder .* takes 16"),
        (other_encoder, "image encoder of the decoder .* adapter .elsewhere/clip.: their weights differ"),
        (other_text_weights, "text encoder of the folder .*: their weights differ"),
        (not_finite_off_its_data, "image embedding of 'a red apple' is not finite"),
        (unit_norm, "unit-norm embeddings, for retrieval"),
    ],
)
def test_adapters_that_do_not_fit(make, words, config, metadata, tmp_path):
    make(tmp_path, metadata)
    with pytest.raises(CSDiffError, match=words) as caught:
        generate(config(adapter=str(tmp_path / "bad")))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "pictures").exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"prompt": []}, "No prompt"),
        ({"prompt": ["a cat", "  "]}, "Prompt 2 of 2 is empty"),
        ({"prompts_file": "missing.txt"}, "cannot read missing.txt"),
        ({"prompt": [], "prompts_file": os.devnull}, f"found no line of it in {os.devnull}"),
        ({"decoder": "kandinsky3"}, "expected a preset .*found 'kandinsky3'"),
        ({"decoder": "no/such-decoder"}, "neither a local copy nor the hub"),
        ({"num_images": 0}, "num_images: expected a whole number of 1 or more, found 0"),
        ({"batch_size": 0}, "batch_size"),
        ({"steps": 0}, "steps"),
        ({"seed": -1}, "seed: expected .* found -1"),
        ({"guidance": float("nan")}, "guidance: expected a finite number"),
        ({"height": 30}, "height: expected a multiple of 8 pixels, found 30"),
        ({"dtype": "int8"}, "dtype: expected one of auto"),
        ({"device": "warp"}, "found 'warp'"),
        ({"offload": True, "device": "cpu"}, "offload needs a GPU"),
        ({"output": "/proc/pictures"}, "cannot be written"),
    ],
)
def test_bad_options(changes, words, config, tmp_path):
    with pytest.raises(CSDiffError, match=words) as caught:
        generate(config(**changes))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "pictures").exists()


def test_the_output_may_not_be_a_file(config, tmp_path):
    (tmp_path / "pictures").write_text("mine")
    with pytest.raises(CSDiffError, match="found the file"):
        generate(config())
    assert (tmp_path / "pictures").read_text() == "mine"


def test_karlo_says_what_it_cannot_do(config, tiny_clip, tmp_path):
    karlo(tmp_path / "decoder", tiny_clip)
    changes = {"decoder": str(tmp_path / "decoder"), "height": None, "width": None}
    with pytest.raises(CSDiffError, match="Karlo takes no negative prompt"):
        generate(config(**changes, negative_prompt="blurry"))
    assert not (tmp_path / "pictures").exists()


def test_text_and_image_of_other_widths_need_an_adapter(config, metadata, tiny_decoder, tmp_path):
    shutil.copytree(tiny_decoder, tmp_path / "decoder")
    unet = json.loads((tmp_path / "decoder" / "unet" / "config.json").read_text())
    (tmp_path / "decoder" / "unet" / "config.json").write_text(json.dumps({**unet, "encoder_hid_dim": 24}))
    (tmp_path / "decoder" / "csdiff.json").write_text(json.dumps({"format": 1, "kind": "decoder", **metadata}))
    with pytest.raises(CSDiffError, match="have 16 dimensions, but the decoder takes 24"):
        generate(config(adapter="none", decoder=str(tmp_path / "decoder")))


@pytest.mark.parametrize("component", ["unet", "movq"])
def test_a_decoder_with_weights_that_are_not_finite_draws_nothing(component, config, decoder, tmp_path):
    shutil.copytree(decoder, tmp_path / "decoder")
    (file,) = (tmp_path / "decoder" / component).glob("*.safetensors")
    tensors = load_file(file)
    name = "conv_out.bias" if component == "unet" else "decoder.conv_out.bias"
    tensors[name][:2] = float("nan")
    save_file(tensors, file, metadata={"format": "pt"})
    words = f"numbers in {component} of .*decoder, found 2 values that are NaN or infinite in its tensor {name}"
    with pytest.raises(CSDiffError, match=words) as caught:
        generate(config(decoder=str(tmp_path / "decoder")))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "pictures").exists()


def test_a_picture_that_overflows_names_the_number_format(config, tmp_path):
    with pytest.raises(CSDiffError, match=r"picture of 'a red apple' is not finite.* are finite in float32"):
        generate(config(guidance=3e38))
    assert not (tmp_path / "pictures").exists()


@pytest.mark.parametrize("make", [karlo, stable_unclip_with_image_embeds])
def test_pickled_decoders_say_how_to_convert_them(make, config, tiny_clip, tmp_path):
    options = make(tmp_path / "decoder", tiny_clip)
    prior_transformer(tiny_clip, DIM).save_pretrained(tmp_path / "decoder" / "prior")
    changes = {**options, "decoder": str(tmp_path / "decoder")}
    for file in (tmp_path / "decoder").glob("*/*.safetensors"):
        name = "pytorch_model.bin" if file.name == "model.safetensors" else file.with_suffix(".bin").name
        torch.save(load_file(file), file.with_name(name))
        file.unlink()
    with pytest.raises(CSDiffError, match=r"PyTorch's own format alone.* and give --decoder DIR") as caught:
        generate(config(**changes))
    assert "\n" not in str(caught.value)
    # the command that the sentence names
    code = re.search(r'python -c "(.*)" and', str(caught.value))[1]
    exec(code.replace("'DIR'", repr(str(tmp_path / "converted"))), {})
    assert not list((tmp_path / "converted").rglob("*.bin"))
    (path,) = generate(config(**{**changes, "decoder": str(tmp_path / "converted")}))
    assert path.exists()


def test_an_interrupted_write_leaves_no_half_file(config, tmp_path, monkeypatch):
    def fail(self, file, **options):
        file.write(b"half a picture")
        raise OSError("No space left on device")

    monkeypatch.setattr(Image.Image, "save", fail)
    with pytest.raises(OSError, match="No space left"):
        generate(config())
    assert not list((tmp_path / "pictures").glob("*.png"))
    assert not list((tmp_path / "pictures").glob(".*"))
