"""Statistics and norm calibration, of small problems and at the end of training."""

import pytest
import torch
from training_runs import config

from csdiff import AutoAdapter, CSDiffError
from csdiff.adapters import MLPAdapter, build_adapter
from csdiff.embeddings import EmbeddingStore, load_text_encoder, write_store
from csdiff.embeddings.fingerprint import weights_sha256
from csdiff.training import train
from tests.adapters.adapter_tester import DIM, embed, make_adapter, text_inputs


def lognormal(count, mean, spread, seed):
    return torch.exp(mean + spread * torch.randn(count, generator=torch.Generator().manual_seed(seed)))


def with_norms(norms, seed=0):
    rows = torch.randn(len(norms), DIM, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(rows) * norms[:, None]


def test_identity_calibration_changes_no_bit(adapter, name):
    before = embed(adapter, text_inputs(name))
    adapter.calibrate_norm(torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0]))
    assert not torch.equal(embed(adapter, text_inputs(name)), before)
    adapter.reset_norm_calibration()
    assert torch.equal(embed(adapter, text_inputs(name)), before)


@pytest.mark.parametrize("statistics", [False, True])
@pytest.mark.parametrize(
    ("predicted", "real"),
    [((1.0, 0.05), (2.3, 0.2)), ((3.0, 0.3), (2.0, 0.05)), ((0.0, 0.01), (0.0, 0.05)), ((-9.0, 0.2), (9.0, 0.2))],
)
def test_norms_get_mean_and_spread_on_new_rows(predicted, real, statistics):
    adapter = MLPAdapter(embedding_dim=DIM)
    if statistics:
        adapter.set_statistics(torch.randn(DIM), torch.rand(DIM) + 0.5, torch.randn(DIM), torch.rand(DIM) + 0.5)
        adapter.skip.weight.data = torch.diag(adapter.text_std[0] / adapter.clip_std[0])
        adapter.skip.bias.data = (adapter.text_mean[0] - adapter.clip_mean[0]) / adapter.clip_std[0]
    fitted, held_out = (with_norms(lognormal(2000, *predicted, seed), seed) for seed in (0, 1))
    with torch.no_grad():
        before = adapter.embed(held_out)
        adapter.calibrate_norm(adapter.embed(fitted).norm(dim=1), lognormal(2000, *real, 2))
        after = adapter.embed(held_out)
    norms, expected = after.norm(dim=1), lognormal(2000, *real, 3)
    assert norms.mean().item() == pytest.approx(expected.mean().item(), rel=0.02)
    assert norms.std().item() == pytest.approx(expected.std().item(), rel=0.25)
    cosine = torch.cosine_similarity(after.double(), before.double())
    assert cosine.min() > 1 - 1e-5


def test_calibrating_twice_composes():
    adapter = MLPAdapter(embedding_dim=DIM)
    rows = with_norms(lognormal(500, 1.0, 0.3, 0))
    for real in (lognormal(500, 2.0, 0.1, 4), lognormal(500, 0.5, 0.2, 4), torch.ones(50)):
        adapter.calibrate_norm(adapter.embed(rows).norm(dim=1), real)
        norms = adapter.embed(rows).norm(dim=1)
        assert norms.mean().item() == pytest.approx(real.mean().item(), rel=1e-3)
        assert norms.std().item() == pytest.approx(real.std().item(), rel=1e-3, abs=1e-4)


@pytest.mark.parametrize(("name", "options"), [("mlp", {}), ("transformer", {"preset": "tiny"})])
def test_a_fresh_adapter_gives_text_the_image_statistics(name, options):
    adapter = build_adapter(name, embedding_dim=DIM, **options)
    mean, std = torch.randn(DIM), torch.rand(DIM) + 0.1
    adapter.set_statistics(mean, std, text_mean=mean * 2, text_std=std * 3)
    rows, states = torch.randn(500, DIM) * 3 * std + 2 * mean, torch.randn(500, 5, DIM)
    torch.testing.assert_close(adapter.embed(rows, states), (rows - 2 * mean) / 3 + mean, rtol=1e-5, atol=1e-5)


def test_a_constant_dimension_stays_finite():
    adapter = MLPAdapter(embedding_dim=3)
    std = torch.tensor([1.0, 0.0, 2.0])
    adapter.set_statistics(torch.ones(3), std, torch.ones(3), std)
    assert adapter.embed(torch.ones(2, 3)).isfinite().all()


@pytest.mark.parametrize(
    ("mean", "std", "message"),
    [
        (torch.ones(3), torch.ones(4), "`clip_mean` must have 4 entries, found 3"),
        (torch.full((4,), float("nan")), torch.ones(4), "`clip_mean` must be finite"),
        (torch.ones(4), torch.tensor([1, 1, -1, 1.0]), "`clip_std` must be finite, a deviation not negative; 1 "),
    ],
)
def test_bad_statistics_are_refused(mean, std, message):
    with pytest.raises(CSDiffError, match=message):
        MLPAdapter(embedding_dim=4).set_statistics(mean, std)


@pytest.mark.parametrize("norms", [[1.0], [1.0, 0.0], [1.0, float("inf")], []])
def test_bad_norms_are_refused(norms):
    adapter = MLPAdapter(embedding_dim=4)
    for arguments in ((norms, [1.0, 2.0]), ([1.0, 2.0], norms)):
        with pytest.raises(CSDiffError, match="at least two positive finite norms"):
            adapter.calibrate_norm(*(torch.tensor(a) for a in arguments))


def test_spread_is_off_by_default_and_bounded(adapter, name):
    whitened = torch.ones(2, DIM)
    assert torch.equal(adapter.spread(whitened, 0.0), whitened)
    for amount in (-0.1, 1.1, float("nan")):
        with pytest.raises(CSDiffError, match="spread"):
            adapter.spread(whitened, amount)
    if name == "diffusion":
        with pytest.raises(CSDiffError, match="draws its own"):
            adapter.spread(whitened, 0.5)
    else:
        assert not torch.equal(adapter.spread(whitened, 0.5), whitened)


def test_an_adapter_with_a_noise_token_has_its_own_spread(text_encoder):
    adapter = make_adapter("transformer", text_encoder, noise_token=True)
    with pytest.raises(CSDiffError, match="draws its own"):
        adapter.embed(*text_inputs("transformer"), spread=0.5)


# What is asserted holds for a badly trained adapter as for a good one.
RUNS = {
    "mlp": {"adapter_options": {"num_layers": 1, "dropout": 0.1}},
    "transformer": {"adapter_options": {"num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 8}},
    "lora": {"adapter_options": {"rank": 4}},
    "diffusion": {
        "objective": "diffusion",
        # without token states: sampling takes 25 passes over every row
        "adapter_options": {"num_layers": 1, "num_attention_heads": 2, "encoder_hid_proj_type": None},
    },
}


@pytest.fixture(scope="module")
def stores(tiny_clip, tmp_path_factory):
    """Two stores of different captions and their images, a gap apart and noisy: to train on, and to look at."""
    folder = tmp_path_factory.mktemp("pairs")
    encoder = load_text_encoder(tiny_clip)
    generator = torch.Generator().manual_seed(0)
    captions = ["".join(chr(97 + i) for i in torch.randint(26, (6,), generator=generator)) for _ in range(1800)]
    text = encoder.encode(captions)
    noise = text.embeds.std(0) * torch.randn(text.embeds.shape, generator=generator)
    image = 2 * text.embeds + torch.randn(1, 16, generator=generator) + 0.5 * noise
    known = {"text_encoder": {"id": str(tiny_clip), "weights_sha256": weights_sha256(tiny_clip, "text")}}
    columns = {"text_embeds": text.embeds, "text_states": text.states, "text_mask": text.mask}
    columns |= {"image_embeds": image, "captions": captions}
    for name, rows in (("train", slice(0, 1200)), ("held_out", slice(1200, None))):
        part = {key: values[rows] for key, values in columns.items()}
        write_store(folder / name, **part, fingerprint=known, dtype="float32")
    return folder


@torch.no_grad()
def test_trained_adapters_of_every_kind_give_unseen_rows_the_norms_of_real_ones(name, stores, tiny_clip, tmp_path):
    options = {"max_steps": 20, "batch_size": 64, "learning_rate": 1e-3, "ema.decay": 0.9, "adapter_options": {}}
    options |= {"data.validation_fraction": 0.5, "validation.limit": 64, "validation.every": 0, "checkpoint.every": 0}
    with torch.enable_grad():
        train(config(stores / "train", tmp_path, adapter=name, **{**options, **RUNS.get(name, {})}))
    adapter = AutoAdapter.from_pretrained(tmp_path)
    store = EmbeddingStore.open(stores / "held_out")
    rows = store.read(range(len(store)))
    if adapter.uses_input_ids:
        tokens = load_text_encoder(tiny_clip).caption_tokenizer(store.captions(range(len(store))), "max_length")
        predicted = adapter.embed_input_ids(*tokens)
    elif adapter.uses_text_states:
        predicted = adapter.embed(rows["text_embeds"], rows["text_states"], rows["text_mask"])
    else:
        predicted = adapter.embed(rows["text_embeds"])
    norms, real = predicted.norm(dim=1), rows["image_embeds"].norm(dim=1)
    assert norms.mean().item() == pytest.approx(real.mean().item(), rel=0.02)
    assert norms.std().item() == pytest.approx(real.std().item(), rel=0.25)
