"""Folders that must not load: one clear sentence each, and nothing in them is executed."""

import json
import pickle
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from csdiff import AutoAdapter, CSDiffError
from csdiff.adapters import LinearAdapter, MLPAdapter
from csdiff.adapters.folder import WEIGHTS
from csdiff.adapters.lora import PEFT_CONFIG, PEFT_WEIGHTS
from tests.adapters.adapter_tester import embed, make_adapter, text_inputs


@pytest.fixture(scope="module")
def saved(tmp_path_factory, text_encoder):
    folder = tmp_path_factory.mktemp("adapters")
    for name in ("mlp", "lora"):
        make_adapter(name, text_encoder).save_pretrained(folder / name)
    return folder


@pytest.fixture
def mlp(saved, tmp_path):
    return shutil.copytree(saved / "mlp", tmp_path / "mlp")


@pytest.fixture
def lora(saved, tmp_path):
    return shutil.copytree(saved / "lora", tmp_path / "lora")


def refused(folder, match, loader=AutoAdapter):
    with pytest.raises(CSDiffError, match=match) as error:
        loader.from_pretrained(folder)
    assert "\n" not in str(error.value)
    return str(error.value)


def edit(file, **changes):
    content = json.loads(file.read_text())
    file.write_text(json.dumps({k: v for k, v in {**content, **changes}.items() if v is not None}))


def edit_weights(file, change):
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


def test_missing_folder_and_file_in_its_place(tmp_path):
    refused(tmp_path / "nowhere", "nowhere does not exist")
    refused(str(tmp_path / "nowhere"), "nowhere does not exist")
    (tmp_path / "file").write_text("")
    refused(tmp_path / "file", "is a file; give the adapter folder")
    refused(tmp_path, "incomplete: config.json is missing")


def test_decoder_folder_is_told_from_an_adapter(tiny_decoder):
    refused(tiny_decoder, "is a diffusers pipeline, not an adapter")


@pytest.mark.parametrize("file", ["config.json", "csdiff.json", WEIGHTS])
def test_incomplete_folder_names_the_file(mlp, file):
    (mlp / file).unlink()
    refused(mlp, f"{file} is missing")
    refused(mlp, f"{file} is missing", MLPAdapter)


@pytest.mark.parametrize("file", [PEFT_CONFIG, PEFT_WEIGHTS, WEIGHTS])
def test_incomplete_lora_folder_names_the_file(lora, file):
    (lora / file).unlink()
    refused(lora, f"{file} is missing")


@pytest.mark.parametrize("file", ["config.json", "csdiff.json"])
@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff\xfe{}", b"{}"])
def test_damaged_json_is_named(mlp, file, content):
    (mlp / file).write_bytes(content)
    refused(mlp, file)


def test_config_of_another_class(mlp):
    refused(mlp, "is the config of MLPAdapter, expected LinearAdapter", LinearAdapter)
    edit(mlp / "config.json", _class_name="UNet2DConditionModel")
    refused(mlp, "is the config of UNet2DConditionModel, expected one of MLPAdapter, TransformerAdapter")


def test_config_with_unknown_key_or_bad_value(mlp):
    edit(mlp / "config.json", depth=3)
    refused(mlp, r"has keys \['depth'\] that MLPAdapter does not know")
    edit(mlp / "config.json", depth=None, num_layers="two")
    refused(mlp, "does not describe a MLPAdapter: `num_layers` must be a positive whole number, found 'two'")
    edit(mlp / "config.json", num_layers=2, embedding_dim=None)
    refused(mlp, "does not describe a MLPAdapter: .*embedding_dim")


def test_metadata_of_another_kind(mlp):
    edit(mlp / "csdiff.json", kind="store")
    refused(mlp, """must say "format": 1 and "kind": "adapter"; found 1 and 'store'""")


def test_tensors_missing_left_over_or_of_another_shape(mlp):
    file = mlp / WEIGHTS
    edit_weights(file, lambda tensors: tensors.update(extra=torch.zeros(2)))
    refused(mlp, r"has 1 tensors that its config does not ask for, among them \['extra'\]")
    edit_weights(file, lambda tensors: (tensors.pop("extra"), tensors.pop("skip.bias")))
    refused(mlp, r"lacks 1 of \d+ tensors, among them \['skip.bias'\]")
    edit_weights(file, lambda tensors: tensors.update({"skip.bias": torch.zeros(3)}))
    refused(mlp, r"tensor skip.bias must have shape \(16,\), found \(3,\)")
    edit_weights(file, lambda tensors: tensors.update({"skip.bias": torch.zeros(16, dtype=torch.int64)}))
    refused(mlp, "tensor skip.bias must hold floats .* found I64")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(mlp, lora, value):
    edit_weights(mlp / WEIGHTS, lambda tensors: tensors["skip.bias"][:2].fill_(value))
    refused(mlp, "tensor skip.bias holds 2 values that are NaN or infinite")
    edit_weights(lora / PEFT_WEIGHTS, lambda tensors: next(iter(tensors.values())).fill_(value))
    refused(lora, "values that are NaN or infinite")


@pytest.mark.parametrize("kept", [0, 4, 8, 9, 200, -1])
def test_truncated_weights(mlp, lora, kept):
    for file in (mlp / WEIGHTS, lora / PEFT_WEIGHTS):
        file.write_bytes(file.read_bytes()[:kept])
        refused(file.parent, f"{file.name} is (truncated|not a safetensors file)")


def test_damaged_weights_header(mlp):
    file = mlp / WEIGHTS
    content = bytearray(file.read_bytes())
    content[20] = 0xFF
    file.write_bytes(content)
    refused(mlp, "damaged safetensors header")
    file.write_bytes((10**15).to_bytes(8, "little") + b"{}")
    refused(mlp, "is not a safetensors file")


def test_damaged_shard_index(mlp, tmp_path):
    MLPAdapter.from_pretrained(mlp).save_pretrained(mlp, max_shard_size=2000)
    index = mlp / f"{WEIGHTS}.index.json"
    content = json.loads(index.read_text())
    (tmp_path / "outside.safetensors").write_bytes(b"")
    first = sorted(set(content["weight_map"].values()))[0]
    for wrong in ("gone.safetensors", "../outside.safetensors", "config.json"):
        index.write_text(json.dumps({**content, "weight_map": {**content["weight_map"], "skip.bias": wrong}}))
        refused(mlp, f"lists '{wrong.rpartition('/')[2]}', which is not a safetensors file")
    index.write_text(json.dumps({"weight_map": []}))
    refused(mlp, "has no `weight_map`")
    index.write_text(json.dumps(content))
    (mlp / first).unlink()
    refused(mlp, f"lists '{first}'")


def test_lora_targets_that_do_not_exist(lora):
    targets = ["q_proj", "to_q"]
    edit(lora / "config.json", target_modules=targets)
    refused(lora, f"{PEFT_CONFIG} must be a LORA config")
    edit(lora / PEFT_CONFIG, target_modules=targets)
    message = refused(lora, r"LoRA targets \['to_q'\] do not exist in text encoder")
    assert "out_proj" in message


def test_lora_of_another_rank(lora):
    edit(lora / "config.json", rank=4)
    edit(lora / PEFT_CONFIG, r=4)
    refused(lora, "must have shape .*4.* found .*2")


def test_lora_without_its_text_encoder(lora, tmp_path):
    edit(lora / "config.json", text_encoder=str(tmp_path / "gone"))
    refused(lora, "Text encoder '.*gone' of the LoRA adapter could not be loaded")


class Trap:
    """Creates a file when unpickled."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return open, (str(self.file), "w")


def pickles(trap):
    for protocol in (0, 2, pickle.HIGHEST_PROTOCOL):
        yield pickle.dumps(trap, protocol)
    for zipped in (True, False):
        file = trap.file.parent / "saved"
        torch.save({"skip.bias": trap}, file, _use_new_zipfile_serialization=zipped)
        yield file.read_bytes()
        file.unlink()


NAMES = [
    WEIGHTS,
    "diffusion_pytorch_model.bin",
    "pytorch_model.bin",
    "adapter.pt",
    "adapter.pth",
    "adapter.ckpt",
    "adapter.pkl",
    "config.json",
    "csdiff.json",
    f"{WEIGHTS}.index.json",
]


@pytest.mark.parametrize("name", NAMES)
def test_a_malicious_pickle_is_refused_and_never_run(mlp, tmp_path, name):
    trap = Trap(tmp_path / "sprung")
    if name not in ("config.json", "csdiff.json"):
        (mlp / WEIGHTS).unlink()
    for content in pickles(trap):
        (mlp / name).write_bytes(content)
        for loader in (AutoAdapter, MLPAdapter):
            message = refused(mlp, r"pickle|not a safetensors file|cannot be read as JSON", loader)
            assert name in message
    assert not trap.file.exists()


@pytest.mark.parametrize("name", [WEIGHTS, PEFT_WEIGHTS, "adapter_model.bin", PEFT_CONFIG])
def test_a_malicious_pickle_among_lora_files_is_refused(lora, tmp_path, name):
    trap = Trap(tmp_path / "sprung")
    if name == "adapter_model.bin":
        (lora / PEFT_WEIGHTS).unlink()
    for content in pickles(trap):
        (lora / name).write_bytes(content)
        refused(lora, r"pickle|not a safetensors file|cannot be read as JSON")
    assert not trap.file.exists()


def test_a_pickle_in_a_shard_is_refused(mlp, tmp_path):
    MLPAdapter.from_pretrained(mlp).save_pretrained(mlp, max_shard_size=2000)
    shard = sorted(mlp.glob("*.safetensors"))[-1]
    trap = Trap(tmp_path / "sprung")
    for content in pickles(trap):
        shard.write_bytes(content)
        refused(mlp, f"{shard.name} is")
    assert not trap.file.exists()


def test_a_pickle_beside_good_weights_is_ignored(mlp, tmp_path, text_encoder):
    trap = Trap(tmp_path / "sprung")
    for name in NAMES:
        if not (mlp / name).exists() and not name.endswith("index.json"):
            (mlp / name).write_bytes(pickle.dumps(trap))
    loaded = AutoAdapter.from_pretrained(mlp)
    expected = embed(make_adapter("mlp", text_encoder), text_inputs("mlp"))
    assert torch.equal(embed(loaded, text_inputs("mlp")), expected)
    assert not trap.file.exists()


def test_the_trap_springs_when_unpickled(tmp_path):
    trap = Trap(tmp_path / "sprung")
    pickle.loads(next(pickles(trap)))
    assert trap.file.exists()
