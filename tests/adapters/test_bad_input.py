"""Folders that must not load: one clear sentence each, and nothing in them is executed."""

import json
import pickle
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from csdiff import AutoAdapter, CSDiffError
from csdiff.adapters import MLPAdapter
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


def refused(folder, *facts):
    """The folder is refused in one sentence that holds the facts."""
    with pytest.raises(CSDiffError) as error:
        AutoAdapter.from_pretrained(folder)
    message = str(error.value)
    assert "\n" not in message
    assert [fact for fact in facts if fact not in message] == [], message


def edit(file, **changes):
    content = json.loads(file.read_text())
    file.write_text(json.dumps({k: v for k, v in {**content, **changes}.items() if v is not None}))


def edit_weights(file, change):
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


def test_what_is_no_adapter_folder(tmp_path, tiny_decoder):
    refused(tiny_decoder, "is a diffusers pipeline", "--decoder")
    refused(tmp_path / "nowhere", "nowhere", "does not exist")
    (tmp_path / "file").write_text("")
    refused(tmp_path / "file", "is a file")
    refused(tmp_path, "holds file", "config.json")
    for name in ("wait", "mine"):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "training.yaml").write_text("")
    (tmp_path / "store" / "img_emb").mkdir(parents=True)
    refused(tmp_path / "runs", "holds mine (a training run), wait (a training run): name one of them")
    refused(tmp_path / "runs" / "mine", "unfinished training run", "csdiff export")
    refused(tmp_path / "store", "is an embedding store")


@pytest.mark.parametrize(
    ("kind", "file"),
    [
        *(("mlp", f) for f in ("config.json", "csdiff.json", WEIGHTS)),
        *(("lora", f) for f in (PEFT_CONFIG, PEFT_WEIGHTS, WEIGHTS)),
    ],
)
def test_incomplete_folder_names_the_file(kind, file, mlp, lora):
    folder = {"mlp": mlp, "lora": lora}[kind]
    (folder / file).unlink()
    refused(folder, f"{file} is missing")


DEEP = b'{"a":' * 5000 + b"1" + b"}" * 5000


@pytest.mark.parametrize("file", ["config.json", "csdiff.json"])
@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff\xfe{}", b"{}", DEEP])
def test_damaged_json_is_named(mlp, file, content):
    (mlp / file).write_bytes(content)
    refused(mlp, file)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("kind", "store"),
        ("text_encoder", "tiny-clip"),
        ("text_encoder", {"id": 5}),
        ("training", [1]),
        ("tokenizer", {"max_length": "77"}),
        ("normalized", "no"),
    ],
)
def test_entries_of_another_type_are_named(mlp, name, value):
    edit(mlp / "csdiff.json", **{name: value})
    refused(mlp, "csdiff.json", name)


def test_lora_files_of_another_adapter(lora, tmp_path):
    edit(lora / "config.json", text_encoder=str(tmp_path / "gone"))
    refused(lora, str(tmp_path / "gone"), "text_encoder")
    edit(lora / "config.json", rank=33)
    refused(lora, PEFT_CONFIG, "33")


@pytest.mark.parametrize(
    ("changes", "facts"),
    [
        ({"_class_name": "LinearAdapter"}, ["['dropout', 'expansion'", "method"]),
        ({"_class_name": "UNet2DConditionModel"}, ["UNet2DConditionModel", "MLPAdapter, TransformerAdapter"]),
        ({"depth": 3}, ["depth", "num_layers"]),
        ({"num_layers": 3}, ["blocks.2"]),
        ({"num_layers": "two"}, ["num_layers", "'two'"]),
        ({"embedding_dim": None}, ["embedding_dim"]),
        ({"width": 10**30}, ["config.json"]),
        ({"dropout": "much"}, ["dropout", "'much'"]),
    ],
)
def test_config_with_unknown_key_or_bad_value(mlp, changes, facts):
    edit(mlp / "config.json", **changes)
    refused(mlp, *facts)


@pytest.mark.parametrize(
    ("file", "changes", "facts"),
    [
        ("config.json", {"target_modules": 5}, [PEFT_CONFIG, "5"]),
        (PEFT_CONFIG, {"target_modules": {"q_proj": 1}}, [PEFT_CONFIG, "{'q_proj': 1}"]),
        ("both", {"target_modules": [["q_proj"]]}, ["config.json", "LoRAAdapter"]),
        ("config.json", {"text_encoder": [1]}, ["config.json"]),
        ("config.json", {"alpha": "much"}, ["config.json", "LoRAAdapter"]),
    ],
)
def test_lora_config_of_another_type_or_nesting(lora, file, changes, facts):
    for name in ("config.json", PEFT_CONFIG) if file == "both" else (file,):
        edit(lora / name, **changes)
    refused(lora, *facts)


@pytest.mark.parametrize(
    ("kind", "changes", "fact"),
    [
        ("mlp", {"num_layers": 10**9}, "config.json"),
        ("mlp", {"embedding_dim": 10**9}, "[16]"),
        ("lora", {"rank": 10**9}, PEFT_CONFIG),
        ("lora", {"rank": 10**9, "r": 10**9}, "[2]"),
        ("lora", {"embedding_dim": 10**9, "text_dim": 10**9}, "[16]"),
    ],
)
def test_sizes_that_the_weights_do_not_have_are_never_built(kind, changes, fact, mlp, lora, monkeypatch):
    folder = {"mlp": mlp, "lora": lora}[kind]
    if "r" in changes:
        edit(folder / PEFT_CONFIG, r=changes.pop("r"))
    edit(folder / "config.json", **changes)
    monkeypatch.setattr(torch.nn.Module, "__init__", lambda *_, **__: pytest.fail("a module was built"))
    refused(folder, str(10**9), fact)


def test_tensors_missing_left_over_or_of_another_shape(mlp):
    file = mlp / WEIGHTS
    edit_weights(file, lambda tensors: tensors.update(extra=torch.zeros(2)))
    refused(mlp, "['extra']")
    edit_weights(file, lambda tensors: (tensors.pop("extra"), tensors.pop("skip.bias")))
    refused(mlp, "['skip.bias']")
    edit_weights(file, lambda tensors: tensors.update({"skip.bias": torch.zeros(3)}))
    refused(mlp, "skip.bias", "[16]", "[3]")
    edit_weights(file, lambda tensors: tensors.update({"skip.bias": torch.zeros(16, dtype=torch.int64)}))
    refused(mlp, "skip.bias", "I64")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(mlp, lora, value):
    edit_weights(mlp / WEIGHTS, lambda tensors: tensors["skip.bias"][:2].fill_(value))
    refused(mlp, WEIGHTS, "skip.bias", " 2 values")
    edit_weights(lora / PEFT_WEIGHTS, lambda tensors: next(iter(tensors.values())).fill_(value))
    refused(lora, PEFT_WEIGHTS, "lora_A")


@pytest.mark.parametrize("kind", ["mlp", "lora"])
@pytest.mark.parametrize("name", ["text_std", "clip_std"])
@pytest.mark.parametrize("value", [0.0, -1.0])
def test_deviations_that_are_not_positive(kind, name, value, mlp, lora):
    folder = {"mlp": mlp, "lora": lora}[kind]
    edit_weights(folder / WEIGHTS, lambda tensors: tensors[name][:, :3].fill_(value))
    refused(folder, WEIGHTS, name, " 3 ")


@pytest.mark.parametrize("kept", [0, 8, 200, -1])
def test_truncated_or_damaged_weights(mlp, lora, kept):
    for file in (mlp / WEIGHTS, lora / PEFT_WEIGHTS):
        content = file.read_bytes()
        for wrong in (content[:kept], content[:8] + DEEP + content[8:], (10**15).to_bytes(8, "little") + b"{}"):
            file.write_bytes(wrong)
            refused(file.parent, file.name)


def test_damaged_shard_index(mlp, tmp_path):
    MLPAdapter.from_pretrained(mlp).save_pretrained(mlp, max_shard_size=2000)
    index = mlp / f"{WEIGHTS}.index.json"
    content = json.loads(index.read_text())
    (tmp_path / "outside.safetensors").write_bytes(b"")
    first = sorted(set(content["weight_map"].values()))[0]
    for wrong in ("gone.safetensors", "../outside.safetensors", "config.json"):
        index.write_text(json.dumps({**content, "weight_map": {**content["weight_map"], "skip.bias": wrong}}))
        refused(mlp, index.name, wrong.rpartition("/")[2])
    index.write_text(json.dumps({"weight_map": []}))
    refused(mlp, index.name, "weight_map")
    index.write_text(json.dumps(content))
    (mlp / first).unlink()
    refused(mlp, first)


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
    WEIGHTS, "diffusion_pytorch_model.bin", "pytorch_model.bin", "adapter.pt", "adapter.pth", "adapter.ckpt",
    "adapter.pkl", "config.json", "csdiff.json", f"{WEIGHTS}.index.json",
]  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        *(("mlp", name) for name in NAMES),
        *(("lora", n) for n in (WEIGHTS, PEFT_WEIGHTS, "adapter_model.bin", PEFT_CONFIG)),
    ],
)
def test_a_malicious_pickle_is_refused_and_never_run(kind, name, mlp, lora, tmp_path):
    trap, folder = Trap(tmp_path / "sprung"), {"mlp": mlp, "lora": lora}[kind]
    pickle.loads(next(pickles(trap)))
    assert trap.file.exists(), "the trap works"
    trap.file.unlink()
    if name.endswith("index.json") or not name.endswith((".json", ".safetensors")):
        (folder / {"mlp": WEIGHTS, "lora": PEFT_WEIGHTS}[kind]).unlink()
    for content in pickles(trap):
        (folder / name).write_bytes(content)
        refused(folder, name)
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
