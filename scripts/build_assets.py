"""Rebuild everything in ``assets/`` from its public sources and report its figures: what ``make assets`` runs.

data -> tiny CLIP and autoencoder -> decoder -> adapter -> figures. Every training script keeps a checkpoint in the
build folder and continues from it, so an interrupted build goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from diffusers import KandinskyV22Pipeline

from csdiff.embeddings import load_image_encoder

ROOT = Path(__file__).resolve().parent.parent
ASSETS = ROOT / "assets"
GUIDANCE = 3.5
STEPS = 25


def run(*command: str | Path) -> None:
    print("+", *command, flush=True)
    subprocess.run([str(part) for part in command], cwd=ROOT, check=True)


def replace_folder(source: Path, target: Path) -> None:
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target)


def install_decoder(source: Path) -> None:
    """The pipeline folder in half precision, with the fingerprint of the encoder whose embeddings it decodes."""
    pipeline = KandinskyV22Pipeline.from_pretrained(source)
    shutil.rmtree(ASSETS / "decoder", ignore_errors=True)
    pipeline.to(torch.float16).save_pretrained(ASSETS / "decoder")
    encoder = load_image_encoder("tiny-clip")
    fingerprint = {
        "format": 1,
        "kind": "decoder",
        "image_encoder": encoder.describe(),
        "preprocessing": encoder.describe_preprocessing(),
        "sampling": {"steps": STEPS, "guidance": GUIDANCE},
    }
    (ASSETS / "decoder/csdiff.json").write_text(json.dumps(fingerprint, indent=2) + "\n")
    forget_source(ASSETS / "decoder")


def forget_source(folder: Path) -> None:
    """Take out of its configurations the folder that a pipeline was loaded from, which diffusers writes down."""
    for path in (folder / "model_index.json", *folder.glob("*/config.json")):
        config = json.loads(path.read_text())
        config.pop("_name_or_path", None)
        path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def install_adapter(run_folder: Path) -> None:
    """The finished adapter without the checkpoints and logs of its run."""
    shutil.rmtree(ASSETS / "adapter", ignore_errors=True)
    (ASSETS / "adapter").mkdir()
    for name in ("README.md", "config.json", "csdiff.json"):
        shutil.copy(run_folder / name, ASSETS / "adapter" / name)
    for weights in run_folder.glob("*.safetensors"):
        shutil.copy(weights, ASSETS / "adapter" / weights.name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--build", type=Path, default=ROOT / "build/assets", help="where checkpoints go")
    parser.add_argument(
        "--only",
        choices=("data", "clip", "autoencoder", "decoder", "adapter", "figures"),
        nargs="*",
        help="the parts to rebuild; all by default",
    )
    arguments = parser.parse_args()
    build = arguments.build.resolve()

    def wanted(part: str) -> bool:
        return not arguments.only or part in arguments.only

    scripts = ROOT / "scripts"
    if wanted("data"):
        run("npm", "ci", "--ignore-scripts", "--prefix", scripts)
        run(sys.executable, scripts / "build_dataset.py")
    if wanted("clip"):
        run(sys.executable, scripts / "train_clip.py", "--output", build / "clip")
        replace_folder(build / "clip/model", ASSETS / "clip")
    if wanted("autoencoder"):
        run(sys.executable, scripts / "train_autoencoder.py", "--output", build / "autoencoder")
        models = ("--clip", ASSETS / "clip", "--movq", build / "autoencoder/movq")
        run(sys.executable, scripts / "refine_autoencoder.py", *models, "--output", build / "autoencoder-refined")
    if wanted("decoder"):
        models = ("--clip", ASSETS / "clip", "--movq", build / "autoencoder-refined/movq")
        run(sys.executable, scripts / "train_decoder.py", *models, "--output", build / "decoder")
        finish = ("--initial", build / "decoder/pipeline", "--perceptual", "0.1", "--learning-rate", "3e-4")
        finish += ("--steps", "6000", "--output", build / "decoder-sharper")
        run(sys.executable, scripts / "train_decoder.py", *models, *finish)
        install_decoder(build / "decoder-sharper/pipeline")
    if wanted("adapter"):
        options = ("--config", "configs/tiny.yaml", "--output_dir", build / "adapter", "--resume", "never")
        run(sys.executable, "train_adapter.py", *options)
        install_adapter(build / "adapter")
    if wanted("figures"):
        run(sys.executable, scripts / "report_assets.py")


if __name__ == "__main__":
    main()
