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
from tiny import make_lora
from tiny_pipelines import DIM, prior_transformer, random_adapter, random_transformer, save_decoder

from csdiff import CSDiffError
from csdiff.cli import parse
from csdiff.pipelines import GenerateConfig, generate, read_settings


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
    assert (record["height"], record["width"]) == (32, 32)
    assert "--seed 5" in record["command"]
    assert "--guidance 2.0" in record["command"]
    assert read_settings(path) == read_settings(Image.open(path)) == record
    assert b"tEXtcsdiff\0{" in path.read_bytes()


def test_an_image_of_another_program_holds_no_settings(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "image.png")
    (tmp_path / "text.png").write_text("no image")
    for file in tmp_path.iterdir():
        with pytest.raises(CSDiffError, match=f"no settings in {file}"):
            read_settings(file)


def test_special_tokens_and_half_characters_of_a_prompt_are_text(config):
    whole, cut, half = generate(config(prompt=["a cat<|endoftext|> dog", "a cat", "a cat\ud83d"], grid=False))
    assert len({path.read_bytes() for path in (whole, cut, half)}) == 3
    assert read_settings(half)["prompt"] == "a cat\ufffd"


@pytest.mark.filterwarnings("error")
def test_encoders_that_moved_are_named(config, adapter, tiny_clip, tmp_path, monkeypatch):
    image = {**adapter.metadata["image_encoder"], "id": "gone/image"}
    text = {**adapter.metadata["text_encoder"], "id": "gone/text"}
    adapter.metadata |= {"text_encoder": text, "image_encoder": image}
    adapter.save_pretrained(tmp_path / "adapter")
    options = {"adapter": tmp_path / "adapter", "guidance": 2.0}
    with pytest.raises(CSDiffError, match=r"gone/text.*--text_encoder"):
        generate(config(**options))
    monkeypatch.chdir(tiny_clip.parent)
    (moved,) = generate(config(**options, text_encoder=tiny_clip.name, image_encoder=tiny_clip.name))
    (before,) = generate(config(guidance=2.0, output=tmp_path / "before"))
    assert Image.open(moved).tobytes() == Image.open(before).tobytes()


def test_spread_varies_the_image_and_keeps_the_decoders_noise(config, adapter_folder, tmp_path):
    (plain,), (spread,) = (
        generate(config(spread=value, output=tmp_path / str(value), seed=3)) for value in (0.0, 0.5)
    )
    (again,) = generate(
        config(prompt=["a cat", "a red apple"], spread=0.5, seed=3, output=tmp_path / "n", grid=False)
    )[1:]
    assert Image.open(spread).tobytes() == Image.open(again).tobytes() != Image.open(plain).tobytes()
    assert read_settings(spread)["spread"] == 0.5


def test_each_step_is_told_with_a_preview(config):
    seen = []

    def on_step(step, total, preview):
        image = preview()
        seen.append((step, total, image.size, image.tobytes()))

    (path,) = generate(config(steps=3), on_step)
    assert [entry[:3] for entry in seen] == [(step, 3, (32, 32)) for step in (1, 2, 3)]
    assert seen[-1][3] == Image.open(path).tobytes()
    assert seen[0][3] != seen[-1][3]

    def stop(step, total, preview):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate(config(prompt=["another"]), stop)
    assert not list(path.parent.glob("another*"))


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


def test_a_rerun_replaces_and_another_run_does_not(config, tmp_path):
    first = generate(config())
    assert generate(config()) == first
    (other,) = generate(config(steps=3))
    assert other.name == "a-red-apple-0-2.png"
    assert len(list((tmp_path / "pictures").iterdir())) == 4


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


def test_adapter_guidance_and_negative_prompt_matter(config, tmp_path):
    changes = [
        {"guidance": 1.0},
        {"guidance": 4.0},
        {"guidance": 4.0, "negative_prompt": "blurry"},
        {"adapter": "none"},
    ]
    paths = [generate(config(**change, output=tmp_path / str(index)))[0] for index, change in enumerate(changes)]
    assert len({path.read_bytes() for path in paths}) == 4
    assert read_settings(paths[3])["adapter"] == "none"


def test_overlong_prompts_warn_with_what_is_cut(config, caplog):
    with caplog.at_level(logging.WARNING):
        generate(config(prompt=["a very " + "long " * 20 + "prompt"]))
    assert "the text encoder reads 16; this end is cut off" in caplog.text
    assert "prompt" in caplog.records[-1].getMessage()[-10:]


DECODERS = [
    "StableUnCLIPPipeline", "StableUnCLIPImg2ImgPipeline", "UnCLIPPipeline", "StableDiffusionPipeline",
    "StableDiffusionXLPipeline", "FluxPipeline",
]  # fmt: skip


@pytest.mark.parametrize("name", DECODERS)
def test_every_kind_of_decoder_folder_is_recognised(name, config, tiny_clip, tmp_path):
    torch.manual_seed(0)
    size = dict.fromkeys(("height", "width"), None if name == "UnCLIPPipeline" else 32)
    changes = {**save_decoder(name, tiny_clip, tmp_path / "decoder"), **size, "grid": False}
    steps = []
    paths = generate(
        config(**changes, prompt=["a cat", "a dog"], batch_size=2), lambda *args: steps.append((*args[:2], args[2]()))
    )
    calls = 2 if "ip_adapter" in changes else 1
    assert [step[:2] for step in steps] == [(step, 2 * calls) for step in range(1, 2 * calls + 1)]
    assert (steps[-1][2] is None) == (name == "UnCLIPPipeline")
    assert len({path.read_bytes() for path in paths}) == 2
    (again,) = generate(config(**changes, prompt=["a dog"], output=str(tmp_path / "again"), batch_size=1))
    left, right = (torch.tensor(list(Image.open(path).tobytes()), dtype=torch.int) for path in (paths[1], again))
    assert (left - right).abs().max() <= 1


def test_flux_guides_by_a_negative_only_when_asked(config, tiny_clip, tmp_path):
    torch.manual_seed(0)
    options = save_decoder("FluxPipeline", tiny_clip, tmp_path / "decoder")
    with pytest.raises(CSDiffError, match="--true_cfg"):
        generate(config(**options, negative_prompt="blurry"))
    changes = [{}, {"true_cfg": 3.0}, {"true_cfg": 3.0, "negative_prompt": "blurry"}]
    drawn = [generate(config(**options, **c, output=tmp_path / str(i)))[0] for i, c in enumerate(changes)]
    assert len({Image.open(path).tobytes() for path in drawn}) == 3


def test_adapters_that_sample_draw_another_embedding_for_each_seed(config, metadata, encoders, tmp_path):
    random_transformer(encoders["text"], metadata, noise_token=True).save_pretrained(tmp_path / "adapter")
    options = {"adapter": str(tmp_path / "adapter"), "grid": False}
    first, second = generate(config(**options, num_images=2))
    assert first.read_bytes() != second.read_bytes()
    (again,) = generate(config(**options, seed=1, output=str(tmp_path / "again")))
    assert again.read_bytes() == second.read_bytes()


def test_lora_adapters_encode_with_their_own_text_encoder(config, metadata, tiny_clip, tmp_path):
    make_lora(tiny_clip, metadata).save_pretrained(tmp_path / "lora")
    (path,) = generate(config(adapter=str(tmp_path / "lora")))
    (raw,) = generate(config(adapter="none", output=str(tmp_path / "raw")))
    assert path.read_bytes() != raw.read_bytes()


def other(tower, **changes):
    """Metadata that name another encoder."""
    return lambda metadata: {**metadata, tower: {**metadata[tower], "weights_sha256": "0" * 64, **changes}}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"gone": "."}, "does not exist"),
        ({"gone": "config.json"}, "config.json is missing"),
        ({"gone": "*.safetensors"}, "safetensors is missing"),
        ({"dim": 24}, "of 24 dimensions, but the decoder .* takes 16"),
        (
            {"metadata": other("image_encoder", id="elsewhere/clip")},
            "image encoder of the decoder .* adapter .elsewhere/clip.: their weights differ",
        ),
        ({"metadata": other("text_encoder")}, "text encoder of the folder .*: their weights differ"),
        ({"norm_scale": 400.0}, "image embedding of 'a red apple' is not finite"),
        ({"metadata": lambda known: {**known, "normalized": True}}, "unit-norm embeddings, for retrieval"),
    ],
)
def test_adapters_that_do_not_fit(change, words, config, metadata, tmp_path):
    adapter = random_adapter(change.get("metadata", dict)(metadata), change.get("dim", DIM))
    adapter.norm_scale.fill_(change.get("norm_scale", 1.0))
    folder = tmp_path / "bad"
    adapter.save_pretrained(folder)
    if change.get("gone") == ".":
        shutil.rmtree(folder)
    elif "gone" in change:
        next(folder.glob(change["gone"])).unlink()
    with pytest.raises(CSDiffError, match=words) as caught:
        generate(config(adapter=str(folder)))
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
        ({"num_images": 0}, "num_images"),
        ({"batch_size": 0}, "batch_size"),
        ({"steps": 1001}, "steps.*1001"),
        ({"seed": -1}, "seed.*-1"),
        ({"guidance": float("nan")}, "guidance.*nan"),
        ({"spread": 1.5}, "spread.*1.5"),
        ({"spread": 0.5, "adapter": "none"}, "--spread"),
        ({"height": 30}, "height: expected a multiple of 8 pixels, found 30"),
        ({"dtype": "int8"}, "dtype.*int8"),
        ({"device": "warp"}, "warp"),
        ({"ip_adapter": "h94/IP-Adapter"}, "leave --ip_adapter out"),
        ({"offload": True, "device": "cpu"}, "offload needs a GPU"),
        ({"output": "/proc/pictures"}, "cannot be written"),
        ({"output": __file__}, "cannot be written"),
    ],
)
def test_bad_options(changes, words, config, tmp_path):
    with pytest.raises(CSDiffError, match=words) as caught:
        generate(config(**changes))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "pictures").exists()


def test_karlo_says_what_it_cannot_do(config, tiny_clip, tmp_path):
    changes = {**save_decoder("UnCLIPPipeline", tiny_clip, tmp_path / "decoder"), "height": None, "width": None}
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
    with pytest.raises(CSDiffError, match=r"image of 'a red apple' is not finite.* are finite in torch.float32"):
        generate(config(guidance=3e38))
    assert not (tmp_path / "pictures").exists()


@pytest.mark.parametrize("name", ["UnCLIPPipeline", "StableUnCLIPImg2ImgPipeline"])
def test_pickled_decoders_say_how_to_convert_them(name, config, tiny_clip, tmp_path):
    changes = {**save_decoder(name, tiny_clip, tmp_path / "decoder"), "height": None, "width": None}
    prior_transformer(tiny_clip).save_pretrained(tmp_path / "decoder" / "prior")
    for file in (tmp_path / "decoder").glob("*/*.safetensors"):
        name = "pytorch_model.bin" if file.name == "model.safetensors" else file.with_suffix(".bin").name
        torch.save(load_file(file), file.with_name(name))
        file.unlink()
    with pytest.raises(
        CSDiffError, match=r"expected safetensors .*pickles and not read.* and give --decoder DIR"
    ) as caught:
        generate(config(**changes))
    assert "\n" not in str(caught.value)
    # the command that the sentence names
    code = re.search(r'python -c "(.*)" and', str(caught.value))[1]
    exec(code.replace("'DIR'", repr(str(tmp_path / "converted"))), {})
    assert not list((tmp_path / "converted").rglob("*.bin"))
    (path,) = generate(config(**{**changes, "decoder": str(tmp_path / "converted")}))
    assert path.exists()
