"""From prompts to files: `generate`."""

import json
import logging
import os
import re
import shlex
import shutil
import tempfile

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
            "adapter": adapter_folder,
            "decoder": decoder,
            "steps": 2,
            "height": 32,
            "width": 32,
            "output": tmp_path / "pictures",
            "progress": False,
        }
        return GenerateConfig(**{**options, **changes})

    return make


@pytest.fixture
def refused(config, tmp_path):
    """`refused(words, **changes)`: options that are refused in one sentence, which it returns; nothing is drawn."""

    def check(words, **changes) -> str:
        with pytest.raises(CSDiffError, match=words) as caught:
            generate(config(**changes))
        assert "\n" not in str(caught.value)
        assert not (tmp_path / "pictures").exists()
        return str(caught.value)

    return check


@pytest.fixture
def pixels(config, tmp_path):
    """`pixels(**changes)`: those of the only picture that a run into a folder of its own draws."""

    def draw(**changes) -> bytes:
        (path,) = generate(config(grid=False, **{"output": tempfile.mkdtemp(dir=tmp_path), **changes}))
        return Image.open(path).tobytes()

    return draw


def test_a_picture_and_its_record(config, tmp_path, adapter_folder, decoder, encoders):
    (path,) = generate(config(seed=5, guidance=2.0))
    assert path == tmp_path / "pictures" / "a-red-apple-5.png"
    assert Image.open(path).size == (32, 32)
    record = json.loads(path.with_suffix(".json").read_text())
    expected = {"prompt": "a red apple", "seed": 5, "steps": 2, "guidance": 2.0, "height": 32, "width": 32}
    assert record.items() >= expected.items()
    assert record["adapter"]["folder"] == str(adapter_folder)
    assert len(record["adapter"]["sha256"]) == 64
    assert record["decoder"]["source"] == str(decoder)
    assert record["text_encoder"]["weights_sha256"] == encoders["text"].describe()["weights_sha256"]
    assert record["versions"]["diffusers"]
    assert all(option in record["command"] for option in ("--seed 5", "--guidance 2.0"))
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
def test_encoders_that_moved_are_named(refused, pixels, adapter, tiny_clip, tmp_path, monkeypatch):
    image = {**adapter.metadata["image_encoder"], "id": "gone/image"}
    text = {**adapter.metadata["text_encoder"], "id": "gone/text"}
    adapter.metadata |= {"text_encoder": text, "image_encoder": image}
    adapter.save_pretrained(tmp_path / "adapter")
    options = {"adapter": tmp_path / "adapter", "guidance": 2.0}
    refused(r"gone/text.*--text_encoder", **options)
    monkeypatch.chdir(tiny_clip.parent)
    moved = {"text_encoder": tiny_clip.name, "image_encoder": tiny_clip.name}
    assert pixels(**options, **moved) == pixels(guidance=2.0)


def test_spread_varies_the_image_and_keeps_the_decoders_noise(config, pixels):
    _, spread = generate(config(prompt=["a cat", "a red apple"], spread=0.5, seed=3, grid=False))
    assert Image.open(spread).tobytes() == pixels(spread=0.5, seed=3) != pixels(seed=3)
    assert pixels(spread=1e-12, seed=3) == pixels(seed=3)
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


def test_same_seed_same_bytes_whatever_else_is_drawn_and_the_grid_of_all(config, tmp_path):
    prompts = ["a cat", "a red apple", "a dog"]
    *paths, grid = generate(config(prompt=prompts, num_images=2, output=tmp_path / "many"))
    names = [f"{prompt.replace(' ', '-')}-{seed}.png" for prompt in prompts for seed in range(2)]
    assert [path.name for path in (*paths, grid)] == [*names, "grid.png"]
    (alone,) = generate(config(seed=1))
    assert alone.read_bytes() == paths[3].read_bytes()
    assert len({path.read_bytes() for path in paths}) == 6
    assert Image.open(grid).size == (64, 96)
    assert Image.open(grid).crop((32, 64, 64, 96)).tobytes() == Image.open(paths[5]).convert("RGB").tobytes()
    assert Image.open(generate(config(prompt=["a", "b", "c"]))[-1]).size == (64, 64)


def test_a_rerun_replaces_and_another_run_does_not(config, tmp_path):
    first = generate(config())
    assert generate(config()) == first
    (other,) = generate(config(steps=3))
    assert other.name == "a-red-apple-0-2.png"
    assert len(list((tmp_path / "pictures").iterdir())) == 4


def test_prompts_file(config, tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("a blue boat\n\n  ein grüner Frosch  \n", encoding="utf-8")
    paths = generate(config(prompts_file=file, grid=False))
    assert [path.name for path in paths] == ["a-red-apple-0.png", "a-blue-boat-0.png", "ein-grüner-frosch-0.png"]


def test_adapter_guidance_and_negative_prompt_matter(config, pixels):
    changes = [{}, {"guidance": 4.0}, {"guidance": 4.0, "negative_prompt": "blurry"}, {"adapter": "none"}]
    assert len({pixels(**{"guidance": 1.0, **change}) for change in changes}) == 4
    assert read_settings(generate(config(adapter="none"))[0])["adapter"] == "none"


def test_overlong_prompts_warn_with_what_is_cut(config, caplog):
    with caplog.at_level(logging.WARNING):
        generate(config(prompt=["a very long long long prompt", "a very " + "long " * 20 + "prompt"], grid=False))
    short, long = (record.getMessage() for record in caplog.records[-2:])
    assert "the text encoder reads 16; this end is cut off" in short
    assert "prompt" in short[-10:]
    assert long.endswith("...'")


DECODERS = ["StableUnCLIP", "StableUnCLIPImg2Img", "UnCLIP", "StableDiffusion", "StableDiffusionXL", "Flux"]


@pytest.mark.parametrize("name", [f"{name}Pipeline" for name in DECODERS])
def test_every_kind_of_decoder_folder_is_recognised(name, config, pixels, tiny_clip, tmp_path):
    torch.manual_seed(0)
    size = dict.fromkeys(("height", "width"), None if name == "UnCLIPPipeline" else 32)
    changes, steps = {**save_decoder(name, tiny_clip, tmp_path / "decoder"), **size}, []
    options = config(**changes, prompt=["a cat", "a dog"], batch_size=2, grid=False)
    paths = generate(options, lambda *args: steps.append((*args[:2], args[2]())))
    calls = 2 if "ip_adapter" in changes else 1
    assert [step[:2] for step in steps] == [(step, 2 * calls) for step in range(1, 2 * calls + 1)]
    assert (steps[-1][2] is None) == (name == "UnCLIPPipeline")
    assert len({path.read_bytes() for path in paths}) == 2
    both = Image.open(paths[1]).tobytes(), pixels(**changes, prompt=["a dog"], batch_size=1)
    left, right = (torch.tensor(list(values), dtype=torch.int) for values in both)
    assert (left - right).abs().max() <= 1


def test_flux_guides_by_a_negative_only_when_asked(pixels, refused, tiny_clip, tmp_path):
    torch.manual_seed(0)
    options = save_decoder("FluxPipeline", tiny_clip, tmp_path / "decoder")
    refused("--true_cfg", **options, negative_prompt="blurry")
    changes = [{}, {"true_cfg": 3.0}, {"true_cfg": 3.0, "negative_prompt": "blurry"}]
    assert len({pixels(**options, **change) for change in changes}) == 3


def test_adapters_that_sample_draw_another_embedding_for_each_seed(config, pixels, metadata, encoders, tmp_path):
    random_transformer(encoders["text"], metadata, noise_token=True).save_pretrained(tmp_path / "adapter")
    first, second, _ = generate(config(adapter=tmp_path / "adapter", num_images=2))
    assert first.read_bytes() != second.read_bytes()
    assert pixels(adapter=tmp_path / "adapter", seed=1) == Image.open(second).tobytes()


def test_lora_adapters_encode_with_their_own_text_encoder(pixels, metadata, tiny_clip, tmp_path):
    make_lora(tiny_clip, metadata).save_pretrained(tmp_path / "lora")
    assert pixels(adapter=tmp_path / "lora") != pixels(adapter="none")


def other(tower, **changes):
    """Metadata that name another encoder."""
    return lambda metadata: {**metadata, tower: {**metadata[tower], "weights_sha256": "0" * 64, **changes}}


@pytest.mark.parametrize(
    ("change", "words"),
    [
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
def test_adapters_that_do_not_fit(change, words, refused, metadata, tmp_path):
    adapter = random_adapter(change.get("metadata", dict)(metadata), change.get("dim", DIM))
    adapter.norm_scale.fill_(change.get("norm_scale", 1.0))
    folder = tmp_path / "bad"
    adapter.save_pretrained(folder)
    refused(words, adapter=folder)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"prompt": []}, "No prompt"),
        ({"prompt": ["a cat", "  "]}, "Prompt 2 of 2 is empty"),
        ({"prompts_file": "missing.txt"}, "cannot read missing.txt"),
        ({"prompt": [], "prompts_file": os.devnull}, f"found no line of it in {os.devnull}"),
        ({"adapter": "nowhere/at/all"}, "nowhere/at/all does not exist"),
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
def test_bad_options(changes, words, refused):
    refused(words, **changes)


def test_karlo_says_what_it_cannot_do(refused, tiny_clip, tmp_path):
    changes = {**save_decoder("UnCLIPPipeline", tiny_clip, tmp_path / "decoder"), "height": None, "width": None}
    refused("Karlo takes no negative prompt", **changes, negative_prompt="blurry")


def test_text_and_image_of_other_widths_need_an_adapter(refused, decoder, tmp_path):
    shutil.copytree(decoder, tmp_path / "decoder")
    unet = json.loads((decoder / "unet" / "config.json").read_text())
    (tmp_path / "decoder" / "unet" / "config.json").write_text(json.dumps({**unet, "encoder_hid_dim": 24}))
    refused("have 16 dimensions, but the decoder takes 24", adapter="none", decoder=tmp_path / "decoder")


@pytest.mark.parametrize(("component", "name"), [("unet", "conv_out.bias"), ("movq", "decoder.conv_out.bias")])
def test_a_decoder_with_weights_that_are_not_finite_draws_nothing(component, name, refused, decoder, tmp_path):
    shutil.copytree(decoder, tmp_path / "decoder")
    (file,) = (tmp_path / "decoder" / component).glob("*.safetensors")
    tensors = load_file(file)
    tensors[name][:2] = float("nan")
    save_file(tensors, file, metadata={"format": "pt"})
    words = f"numbers in {component} of .*decoder, found 2 values that are NaN or infinite in its tensor {name}"
    refused(words, decoder=tmp_path / "decoder")


def test_a_picture_that_overflows_names_the_number_format(refused):
    refused(r"image of 'a red apple' is not finite.* are finite in torch.float32", guidance=3e38)


@pytest.mark.parametrize("name", ["UnCLIPPipeline", "StableUnCLIPImg2ImgPipeline"])
def test_pickled_decoders_say_how_to_convert_them(name, refused, pixels, tiny_clip, tmp_path):
    changes = {**save_decoder(name, tiny_clip, tmp_path / "decoder"), "height": None, "width": None}
    prior_transformer(tiny_clip).save_pretrained(tmp_path / "decoder" / "prior")
    for file in (tmp_path / "decoder").glob("*/*.safetensors"):
        name = "pytorch_model.bin" if file.name == "model.safetensors" else file.with_suffix(".bin").name
        torch.save(load_file(file), file.with_name(name))
        file.unlink()
    said = refused(r"expected safetensors .*pickles and not read.* and give --decoder DIR", **changes)
    code = re.search(r'python -c "(.*)" and', said)[1]
    exec(code.replace("'DIR'", repr(str(tmp_path / "converted"))), {})
    assert not list((tmp_path / "converted").rglob("*.bin"))
    assert pixels(**{**changes, "decoder": tmp_path / "converted"})
