"""The training recipes of the decoder presets, started on tiny stand-ins for their encoders."""

import pytest
import yaml

from csdiff.cli import parse
from csdiff.pipelines import PRESETS, GenerateConfig, generate
from csdiff.training import train
from csdiff.training.config import TrainConfig

# That of Karlo is run by the test of the decoders' page.
RECIPES = sorted({preset.recipe for preset in PRESETS.values()} - {"tiny", "karlo"})


@pytest.mark.parametrize("name", [name for name in PRESETS if name != "tiny"])
def test_the_recipe_trains_on_the_encoders_of_its_preset(name, root):
    recipe = yaml.safe_load((root / "configs" / f"{PRESETS[name].recipe}.yaml").read_text())
    assert recipe["data"]["text_encoder"] == PRESETS[name].text_encoder["id"]
    assert recipe["data"]["image_encoder"] == PRESETS[name].image_encoder["id"]


@pytest.mark.parametrize("name", RECIPES)
def test_the_recipe_starts_and_its_adapter_draws(name, root, pictures, tiny_clip, tiny_decoder, tmp_path):
    output = tmp_path / "run"
    options = {
        "config": root / "configs" / f"{name}.yaml",
        "output_dir": output,
        "data.train": pictures,
        "data.text_encoder": tiny_clip,
        "data.image_encoder": tiny_clip,
        "max_steps": 2,
        # these few numbers gain nothing from bf16, and the processors of most machines are slow at it
        "mixed_precision": "no",
        "batch_size": 8,
        "adapter_options.num_layers": 1,
        "adapter_options.num_attention_heads": 2,
        "adapter_options.attention_head_dim": 8,
        "logging.progress": "false",
    }
    config = parse(TrainConfig, [f"--{option}={value}" for option, value in options.items()], "train_adapter.py")
    config.logging.trackers = []
    folder = str(train(config).adapter_dir)
    options = {"adapter": folder, "decoder": str(tiny_decoder), "output": str(tmp_path), "progress": False}
    assert generate(GenerateConfig(["a square"], steps=1, guidance=1.0, **options))[0].is_file()
