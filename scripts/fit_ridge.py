"""Fits `assets/ridge`, the linear map that the page in the browser shows beside an adapter.

Closed form, on the embeddings of the shipped train pictures and all their captions:
`python scripts/fit_ridge.py` embeds them first (a few minutes); `--store FOLDER` takes a store of them.
"""

import argparse
import tempfile
from pathlib import Path

from csdiff.adapters.linear import LinearAdapter
from csdiff.embeddings import EmbedConfig, EmbeddingStore, embed
from csdiff.resources import assets_dir

ENCODERS = ("text_encoder", "image_encoder", "tokenizer", "preprocessing")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", type=Path, help="store of assets/data/train.parquet with all captions")
    parser.add_argument("--output", type=Path, default=assets_dir() / "ridge")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = options.store
        if path is None:
            path = Path(folder) / "store"
            source = str(assets_dir() / "data" / "train.parquet")
            embed(EmbedConfig(source=source, output=str(path), captions_per_image="all"))
        store = EmbeddingStore.open(path)
        ridge = LinearAdapter.fit(store, "ridge")
        ridge.metadata |= {key: store.fingerprint.get(key) for key in ENCODERS}
        ridge.metadata |= {
            "license": "apache-2.0",
            "normalized": store.normalized,
            "data": {"train": "assets/data/train.parquet"},
        }
        ridge.save_pretrained(options.output)
    print(options.output)


if __name__ == "__main__":
    main()
