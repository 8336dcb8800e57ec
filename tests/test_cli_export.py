"""`csdiff export`: from a run to a folder of its own, whole and loadable by those it is for."""

import json
import re
import shutil

import pytest
import torch
from diffusers import KandinskyV22PriorPipeline
from safetensors.torch import load_file
from tiny import make_lora
from tiny_pipelines import random_adapter
from training_runs import config as run_config
from training_runs import log

import csdiff
from csdiff import AutoAdapter, CSDiffError, CSDiffPriorPipeline
from csdiff.adapters import LoRAAdapter
from csdiff.cli.export import ExportConfig, export
from csdiff.embeddings import load_text_encoder
from csdiff.embeddings.fingerprint import weights_sha256
from csdiff.training import train

DIM, WEIGHTS = 16, "diffusion_pytorch_model.safetensors"


TEXTS = ["red apple", "apple"]


@pytest.fixture(scope="module")
def run(plain_store, tmp_path_factory):
    """Twelve steps with checkpoints at 4, 8 and 12."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    return train(run_config(plain_store, folder, **{"checkpoint.keep": 0, "validation.every": 4})).adapter_dir


@pytest.fixture
def text():
    return torch.randn(8, DIM, generator=torch.Generator().manual_seed(0))


def encoders(clip):
    """What training on the encoders of `clip` records."""
    return {f"{tower}_encoder": {"id": str(clip)} for tower in ("text", "image")}


def random_mlp(clip):
    return random_adapter(encoders(clip))


def random_lora(clip):
    return make_lora(clip, encoders(clip))


def exported(adapter, folder, **options):
    """The folder that an adapter, saved in `folder`, is exported to."""
    adapter.save_pretrained(folder / "adapter")
    export(ExportConfig(source=str(folder / "adapter"), output=str(folder / "out"), **options))
    return folder / "out"


def tokenize(tokenizer):
    return tokenizer(TEXTS, padding="max_length", max_length=tokenizer.model_max_length, return_tensors="pt")


def embed(folder, text):
    with torch.no_grad():
        return AutoAdapter.from_pretrained(folder).embed(text)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, "."),
        ({"weights": "online"}, "online"),
        ({"checkpoint": "latest"}, "checkpoints/step-00000012"),
        ({"checkpoint": "8"}, "checkpoints/step-00000008"),
    ],
)
def test_the_adapter_of_a_run_is_exported_as_it_is(run, tmp_path, text, options, expected):
    result = export(ExportConfig(source=str(run), output=str(tmp_path / "out"), **options))
    assert torch.equal(embed(tmp_path / "out", text), embed(run / expected, text))
    assert result.step == int(expected[-2:] if "step" in expected else 12)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"config.json", "csdiff.json", "README.md", WEIGHTS}


def test_online_weights_of_a_checkpoint(run, tmp_path):
    export(ExportConfig(source=str(run), output=str(tmp_path / "out"), checkpoint="8", weights="online"))
    found, checkpoint = load_file(tmp_path / "out" / WEIGHTS), run / "checkpoints" / "step-00000008"
    for name, tensor in load_file(checkpoint / "state" / "weights.safetensors").items():
        if name.startswith("online.embedder.adapter."):
            assert torch.equal(found[name.removeprefix("online.embedder.adapter.")], tensor)
    assert not torch.equal(found["proj_out.weight"], load_file(checkpoint / WEIGHTS)["proj_out.weight"])
    metadata = json.loads((tmp_path / "out" / "csdiff.json").read_text())
    assert metadata["training"]["weights"] == "online"
    assert metadata["metrics"] == next(line["online"] for line in log(run, "validation") if line["step"] == 8)


@pytest.mark.parametrize(("dtype", "kind"), [("fp16", torch.float16), ("bfloat16", torch.bfloat16)])
def test_the_number_format_is_that_of_the_weights_alone(run, tmp_path, text, dtype, kind):
    result = export(ExportConfig(source=str(run), output=str(tmp_path / "out"), dtype=dtype))
    found = load_file(tmp_path / "out" / WEIGHTS)
    assert (found["proj_out.weight"].dtype, found["clip_mean"].dtype) == (kind, torch.float32)
    assert result.dtype == str(kind).removeprefix("torch.")
    cosine = torch.cosine_similarity(embed(tmp_path / "out", text), embed(run, text))
    assert cosine.min() > 0.99


def test_weights_beyond_the_range_are_refused(tiny_clip, tmp_path):
    adapter = random_mlp(tiny_clip)
    adapter.proj_out.bias.data[0] = 1e6
    with pytest.raises(CSDiffError, match="float16"):
        exported(adapter, tmp_path, dtype="float16")
    assert not (tmp_path / "out").exists()


def test_a_folder_in_the_way_stays_unless_told(run, tmp_path, text):
    out = tmp_path / "out"
    options = {"source": str(run), "output": str(out)}
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(CSDiffError, match="output"):
            export(ExportConfig(**options, overwrite=overwrite))
    assert (out / "notes.txt").read_text() == "mine"
    (out / "notes.txt").unlink()
    export(ExportConfig(**options, checkpoint="4"))
    with pytest.raises(CSDiffError, match="overwrite"):
        export(ExportConfig(**options))
    export(ExportConfig(**options, overwrite=True))
    assert torch.equal(embed(out, text), embed(run, text))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    store = tmp_path / "store"
    store.mkdir()
    (store / "csdiff.json").write_text('{"kind": "store"}')
    for folder in (run, run / "checkpoints" / "step-00000004", store):
        before = sorted(folder.rglob("*"))
        for overwrite in (False, True):
            with pytest.raises(CSDiffError, match="not replaced"):
                export(ExportConfig(source=str(out), output=str(folder), overwrite=overwrite))
        assert sorted(folder.rglob("*")) == before


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"source": ""}, ["source"]),
        ({"output": ""}, ["--output", "--push_to_hub"]),
        ({"checkpoint": "6"}, ["6", "4, 8, 12"]),
        ({"checkpoint": "worst"}, ["best", "worst"]),
        ({"merge_lora": True}, ["LoRA", "MLPAdapter"]),
        ({"format": "prior"}, ["text encoder", "--text_encoder"]),
        ({"dtype": "float8"}, ["dtype", "float8"]),
    ],
)
def test_bad_input_is_one_sentence_and_nothing_is_written(run, tmp_path, options, words):
    with pytest.raises(CSDiffError) as error:
        export(ExportConfig(**{"source": str(run), "output": str(tmp_path / "out"), **options}))
    assert all(word in str(error.value) for word in words)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("make", [random_mlp, random_lora])
def test_a_prior_loads_in_stock_diffusers(make, tiny_clip, tmp_path):
    adapter = make(tiny_clip)
    pipe = KandinskyV22PriorPipeline.from_pretrained(exported(adapter, tmp_path, format="prior"))
    assert type(pipe) is KandinskyV22PriorPipeline
    found = pipe(TEXTS, guidance_scale=1.0, num_inference_steps=1).image_embeds
    tokens = tokenize(pipe.tokenizer)
    with torch.no_grad():
        if isinstance(adapter, LoRAAdapter):
            expected = adapter.embed_input_ids(tokens.input_ids, tokens.attention_mask)
        else:
            expected = adapter.embed(pipe.text_encoder(**tokens).text_embeds)
    assert torch.allclose(found, expected, atol=1e-4)


def test_a_half_precision_prior_takes_the_adapter_it_came_from(tiny_clip, tmp_path):
    """The encoders in the folder keep their identity in another number format; other weights in it do not pass."""
    adapter = random_mlp(tiny_clip)
    for tower in ("text", "image"):
        adapter.metadata[f"{tower}_encoder"]["weights_sha256"] = weights_sha256(tiny_clip, tower)
    pipe = CSDiffPriorPipeline.from_pretrained(exported(adapter, tmp_path, format="prior", dtype="float16"))
    loaded = csdiff.load_adapter(pipe, tmp_path / "adapter")
    assert torch.equal(loaded.prior.skip.weight, adapter.skip.weight.to(loaded.prior.dtype))
    adapter.metadata["text_encoder"]["weights_sha256"] = "0" * 64
    with pytest.raises(CSDiffError, match="text encoder"):
        csdiff.load_adapter(pipe, adapter)


@pytest.mark.parametrize("make", [random_mlp, random_lora])
def test_encoders_with_other_weights_are_refused(make, tiny_clip, tmp_path):
    adapter = make(tiny_clip)
    adapter.metadata["text_encoder"]["weights_sha256"] = "0" * 64
    with pytest.raises(CSDiffError, match=r"text encoder .* weights differ"):
        exported(adapter, tmp_path, format="prior")
    assert not (tmp_path / "out").exists()


def test_encoders_that_moved_are_named(tiny_clip, tmp_path):
    moved = shutil.copytree(tiny_clip, tmp_path / "moved")
    adapter, options = random_mlp(tmp_path / "gone"), {"format": "prior"}
    with pytest.raises(CSDiffError, match=r"gone.*--text_encoder"):
        exported(adapter, tmp_path, **options)
    prior = exported(adapter, tmp_path, **options, text_encoder=str(moved), image_encoder=str(moved))
    assert (prior / "text_encoder").is_dir()


def test_a_pipeline_draws_as_its_readme_says(tiny_clip, tiny_decoder, tmp_path, monkeypatch):
    whole = exported(random_mlp(tiny_clip), tmp_path, format="pipeline", decoder=str(tiny_decoder))
    (code,) = re.findall(r"```python\n(.*?)```", (whole / "README.md").read_text(), flags=re.DOTALL)
    monkeypatch.chdir(whole)
    found: dict = {}
    # One step in place of fifty.
    exec(compile(re.sub(r"steps=\d+", "steps=1", code), "README.md", "exec"), found)
    unet, factor = found["pipe"].unet, found["pipe"].decoder_pipe.movq_scale_factor
    assert found["image"].size == (unet.config.sample_size * factor,) * 2


def test_a_merged_adapter_gives_what_the_lora_adapter_gives(tiny_clip, tmp_path):
    adapter = random_lora(tiny_clip)
    merged = AutoAdapter.from_pretrained(exported(adapter, tmp_path, merge_lora=True))
    assert not merged.uses_input_ids
    text = load_text_encoder(merged.metadata["text_encoder"]["id"])
    tokens = tokenize(text.tokenizer)
    with torch.no_grad():
        expected = adapter.embed_input_ids(tokens.input_ids, tokens.attention_mask)
        found = merged.embed(text.encode(TEXTS).embeds)
    assert torch.allclose(found, expected, atol=1e-4)
