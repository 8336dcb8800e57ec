"""Folders that must not load: one clear sentence each, and nothing in them is executed."""

import io
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

NAN, INF = float("nan"), float("inf")


@pytest.fixture(scope="module")
def saved(tmp_path_factory, text_encoder):
    folder = tmp_path_factory.mktemp("adapters")
    for name in ("mlp", "lora"):
        make_adapter(name, text_encoder).save_pretrained(folder / name)
    return folder


@pytest.fixture
def kind():
    """What `folder` holds; tables name others."""
    return "mlp"


@pytest.fixture
def folder(saved, kind, tmp_path):
    return shutil.copytree(saved / kind, tmp_path / "adapter")


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


def filled(value, count):
    """A change of a tensor: so many of its numbers have this value."""
    return lambda tensor: tensor.flatten().index_fill(0, torch.arange(count), value).view(tensor.shape)


def test_what_is_no_adapter_folder(tmp_path, tiny_decoder, monkeypatch):
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
    # Called like a repository, below a folder that is there, it is not looked up.
    monkeypatch.chdir(tmp_path)
    refused("runs/adapter", "runs/adapter does not exist")
    refused(tmp_path / "store", "is an embedding store")


@pytest.mark.parametrize(
    ("kind", "file"),
    [
        *(("mlp", f) for f in ("config.json", "csdiff.json", WEIGHTS)),
        *(("lora", f) for f in (PEFT_CONFIG, PEFT_WEIGHTS, WEIGHTS)),
    ],
)
def test_incomplete_folder_names_the_file(kind, file, folder):
    (folder / file).unlink()
    refused(folder, f"{file} is missing")


@pytest.mark.parametrize("file", ["config.json", "csdiff.json"])
@pytest.mark.parametrize("content", [b"", b"{", b"[" * 100_000, b"[1]", b"\xff\xfe{}", b"{}"], ids=range(6))
def test_damaged_json_is_named(folder, file, content):
    (folder / file).write_bytes(content)
    refused(folder, file)


@pytest.mark.parametrize(
    ("kind", "changes", "facts"),
    [
        *(
            ("mlp", {"csdiff.json": {name: value}}, ["csdiff.json", name])
            for name, value in (
                ("kind", "store"),
                ("text_encoder", "tiny-clip"),
                ("text_encoder", {"id": 5}),
                ("training", [1]),
                ("tokenizer", {"max_length": "77"}),
                ("normalized", "no"),
            )
        ),
        ("mlp", {"config.json": {"_class_name": "LinearAdapter"}}, ["['dropout', 'expansion'", "method"]),
        (
            "mlp",
            {"config.json": {"_class_name": "UNet2DConditionModel"}},
            ["UNet2DConditionModel", "MLPAdapter, TransformerAdapter"],
        ),
        ("mlp", {"config.json": {"depth": 3}}, ["depth", "num_layers"]),
        ("mlp", {"config.json": {"num_layers": 3}}, ["blocks.2"]),
        ("mlp", {"config.json": {"num_layers": "two"}}, ["num_layers", "'two'"]),
        ("mlp", {"config.json": {"embedding_dim": None}}, ["embedding_dim"]),
        ("mlp", {"config.json": {"width": 10**30}}, ["config.json"]),
        ("mlp", {"config.json": {"dropout": "much"}}, ["dropout", "'much'"]),
        ("lora", {"config.json": {"text_encoder": "/gone/clip"}}, ["/gone/clip", "text_encoder"]),
        ("lora", {"config.json": {"text_encoder": [1]}}, ["config.json"]),
        ("lora", {"config.json": {"rank": 33}}, [PEFT_CONFIG, "33"]),
        ("lora", {"config.json": {"alpha": "much"}}, ["config.json", "LoRAAdapter"]),
        ("lora", {"config.json": {"target_modules": 5}}, [PEFT_CONFIG, "5"]),
        ("lora", {PEFT_CONFIG: {"target_modules": {"q_proj": 1}}}, [PEFT_CONFIG, "{'q_proj': 1}"]),
        (
            "lora",
            {"config.json": {"target_modules": [["q_proj"]]}} | {PEFT_CONFIG: {"target_modules": [["q_proj"]]}},
            ["config.json", "LoRAAdapter"],
        ),
    ],
)
def test_entries_that_are_unknown_or_do_not_fit(kind, changes, facts, folder):
    for file, entries in changes.items():
        edit(folder / file, **entries)
    refused(folder, *facts)


@pytest.mark.parametrize(
    ("kind", "changes", "fact"),
    [
        ("mlp", {"config.json": {"num_layers": 10**9}}, "config.json"),
        ("mlp", {"config.json": {"embedding_dim": 10**9}}, "[16]"),
        ("lora", {"config.json": {"rank": 10**9}}, PEFT_CONFIG),
        ("lora", {"config.json": {"rank": 10**9}} | {PEFT_CONFIG: {"r": 10**9}}, "[2]"),
        ("lora", {"config.json": {"embedding_dim": 10**9, "text_dim": 10**9}}, "[16]"),
    ],
)
def test_sizes_that_the_weights_do_not_have_are_never_built(kind, changes, fact, folder, monkeypatch):
    for file, entries in changes.items():
        edit(folder / file, **entries)
    monkeypatch.setattr(torch.nn.Module, "__init__", lambda *_, **__: pytest.fail("a module was built"))
    refused(folder, str(10**9), fact)


@pytest.mark.parametrize(
    ("kind", "file", "name", "change", "facts"),
    [
        ("mlp", WEIGHTS, "extra", lambda _: torch.zeros(2), ["['extra']"]),
        ("mlp", WEIGHTS, "skip.bias", lambda _: None, ["['skip.bias']"]),
        ("mlp", WEIGHTS, "skip.bias", lambda _: torch.zeros(3), [WEIGHTS, "[16]", "[3]"]),
        ("mlp", WEIGHTS, "skip.bias", torch.Tensor.long, [WEIGHTS, "I64"]),
        *(("mlp", WEIGHTS, "skip.bias", filled(value, 2), [WEIGHTS, " 2 values"]) for value in (NAN, INF)),
        *(("lora", PEFT_WEIGHTS, "lora_A", filled(value, 2), [PEFT_WEIGHTS, " 2 values"]) for value in (NAN, INF)),
        *(
            (kind, WEIGHTS, name, filled(value, 3), [WEIGHTS, " 3 "])
            for kind in ("mlp", "lora")
            for name in ("text_std", "clip_std")
            for value in (0.0, -1.0)
        ),
    ],
)
def test_tensors_that_do_not_fit(kind, file, name, change, facts, folder):
    tensors = load_file(folder / file)
    name = next((one for one in tensors if name in one), name)
    tensors[name] = change(tensors.get(name))
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, folder / file)
    refused(folder, name, *facts)


@pytest.mark.parametrize("kind", ["mlp", "lora"])
def test_truncated_weights(kind, folder):
    file = folder / (PEFT_WEIGHTS if kind == "lora" else WEIGHTS)
    content = file.read_bytes()
    for kept in (0, 8, 200, -1):
        file.write_bytes(content[:kept])
        refused(folder, file.name)


def test_damaged_shard_index(folder, tmp_path):
    MLPAdapter.from_pretrained(folder).save_pretrained(folder, max_shard_size=2000)
    index = folder / f"{WEIGHTS}.index.json"
    content = json.loads(index.read_text())
    (tmp_path / "outside.safetensors").write_bytes(b"")
    first = sorted(set(content["weight_map"].values()))[0]
    for wrong in ("gone.safetensors", "../outside.safetensors", "config.json"):
        index.write_text(json.dumps({**content, "weight_map": {**content["weight_map"], "skip.bias": wrong}}))
        refused(folder, index.name, wrong.rpartition("/")[2])
    index.write_text(json.dumps({"weight_map": []}))
    refused(folder, index.name, "weight_map")
    index.write_text(json.dumps(content))
    (folder / first).unlink()
    refused(folder, first)


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
        file = io.BytesIO()
        torch.save({"skip.bias": trap}, file, _use_new_zipfile_serialization=zipped)
        yield file.getvalue()


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
def test_a_malicious_pickle_is_refused_and_never_run(kind, name, folder, tmp_path):
    trap = Trap(tmp_path / "sprung")
    pickle.loads(next(pickles(trap)))
    assert trap.file.exists(), "the trap works"
    trap.file.unlink()
    if name.endswith("index.json") or not name.endswith((".json", ".safetensors")):
        (folder / {"mlp": WEIGHTS, "lora": PEFT_WEIGHTS}[kind]).unlink()
    for content in pickles(trap):
        (folder / name).write_bytes(content)
        refused(folder, name)
    assert not trap.file.exists()


def test_a_pickle_beside_good_weights_is_ignored(folder, tmp_path, text_encoder):
    trap = Trap(tmp_path / "sprung")
    for name in NAMES:
        if not (folder / name).exists() and not name.endswith("index.json"):
            (folder / name).write_bytes(pickle.dumps(trap))
    loaded = AutoAdapter.from_pretrained(folder)
    expected = embed(make_adapter("mlp", text_encoder), text_inputs("mlp"))
    assert torch.equal(embed(loaded, text_inputs("mlp")), expected)
    assert not trap.file.exists()
