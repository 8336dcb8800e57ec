"""Rebuild everything in ``assets/`` from its public sources and measure it: what ``make assets`` runs.

data -> phrases -> tiny CLIP and autoencoder -> decoder -> adapter and ridge map -> figures. Every training script
keeps a checkpoint in the build folder and continues from it, so an interrupted build goes on where it stopped.

    python scripts/build_assets.py --quick /tmp/try    # a few steps of everything, in a copy of this checkout
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from images import ASSETS, BUILD, ROOT
from loop import DEVICE

from csdiff import AutoAdapter
from csdiff.adapters.card import model_card
from csdiff.embeddings import load_image_encoder

SCRIPTS = ROOT / "scripts"
PARTS = ("data", "clip", "autoencoder", "decoder", "adapter", "figures")
STEPS, GUIDANCE = 25, 3.0
LEFT_OUT = shutil.ignore_patterns(".*", "build", "runs", "outputs", "site", "node_modules")


def run(*command: str | Path) -> None:
    print("+", *command, flush=True)
    subprocess.run([str(part) for part in command], cwd=ROOT, check=True)


def install(source: Path, target: Path) -> None:
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target)


def install_decoder(source: Path, steps: int) -> None:
    """The pipeline folder, with the fingerprint of the encoder whose embeddings it decodes."""
    install(source, ASSETS / "decoder")
    encoder = load_image_encoder("tiny-clip")
    fingerprint = {
        "format": 1,
        "kind": "decoder",
        "image_encoder": encoder.describe(),
        "preprocessing": encoder.describe_preprocessing(),
        "sampling": {"steps": steps, "guidance": GUIDANCE},
    }
    (ASSETS / "decoder/csdiff.json").write_text(json.dumps(fingerprint, indent=2) + "\n")
    # diffusers writes down the folder that a model was loaded from, which is of this machine.
    for path in (ASSETS / "decoder").glob("*/config.json"):
        config = json.loads(path.read_text())
        config.pop("_name_or_path", None)
        path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def install_adapter(folder: Path) -> None:
    """The finished adapter without the checkpoints and logs of its run."""
    shutil.rmtree(ASSETS / "adapter", ignore_errors=True)
    (ASSETS / "adapter").mkdir()
    for path in (folder / "config.json", folder / "csdiff.json", *folder.glob("*.safetensors")):
        # A run writes down where its data and its store lie on this machine.
        if path.suffix == ".json":
            text = path.read_text().replace(f"{ROOT}/", "")
            if path.name == "csdiff.json":
                record = json.loads(text)
                record["data"].pop("store", None)
                record["license"] = "apache-2.0"
                text = json.dumps(record, indent=2) + "\n"
            (ASSETS / "adapter" / path.name).write_text(text)
        else:
            shutil.copy(path, ASSETS / "adapter")
    adapter = AutoAdapter.from_pretrained(ASSETS / "adapter")
    (ASSETS / "adapter" / "README.md").write_text(model_card(adapter, adapter.metadata))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--build", type=Path, default=BUILD, help="where checkpoints go")
    parser.add_argument("--only", choices=PARTS, nargs="*", default=PARTS, help="the parts to rebuild")
    parser.add_argument("--quick", type=Path, help="copy this checkout there and try everything in a few steps")
    arguments = parser.parse_args()
    quick = arguments.quick is not None
    if quick and arguments.quick.resolve() != ROOT:
        copy = shutil.copytree(ROOT, arguments.quick.resolve(), ignore=LEFT_OUT)
        os.environ["PYTHONPATH"] = str(copy)
        run(sys.executable, copy / "scripts/build_assets.py", "--quick", copy, "--only", *arguments.only)
        return
    few = ("--steps", "4", "--batch", "16", "--every", "100") if quick else ()
    build = arguments.build.resolve()
    print(f"On {DEVICE.type}. Expect about a quarter of an hour on a GPU, and two to three days on two CPU cores.")
    further = ("--further", build / "further.parquet")

    def script(name: str, *options: str | Path) -> None:
        run(sys.executable, SCRIPTS / f"{name}.py", *options)

    if "data" in arguments.only:
        run("npm", "ci", "--ignore-scripts", "--prefix", SCRIPTS)
        script("build_dataset", *further)
        script("phrases", "--output", build)
    if "clip" in arguments.only:
        script("train_clip", "--output", build / "clip", "--phrases", build, *further, *few)
        install(build / "clip/model", ASSETS / "clip")
    if "autoencoder" in arguments.only:
        script("train_autoencoder", "--output", build / "autoencoder", *further, *few)
    if "decoder" in arguments.only:
        models = ("--clip", ASSETS / "clip", "--movq", build / "autoencoder/movq")
        script("train_decoder", "--output", build / "decoder", *models, *further, *few)
        install_decoder(build / "decoder/pipeline", 2 if quick else STEPS)
    if "adapter" in arguments.only:
        folder = build / "adapter"
        options = ["--config=configs/tiny.yaml", f"--output_dir={folder}", "--resume=never"]
        run(sys.executable, "train_adapter.py", *options, *(["--max_steps=4"] if quick else []))
        install_adapter(folder)
        script("fit_ridge", "--store", folder / "store/train")
    if "figures" in arguments.only:
        script("measure_assets", *(["--images", "4", "--judges", "outlines"] if quick else []))
        script("draw_prompts")


if __name__ == "__main__":
    main()
