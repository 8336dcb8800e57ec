"""What identifies an encoder and the files of a store: hashes, names, and the one rule that compares two encoders."""

from __future__ import annotations

import hashlib
import json
import re
import warnings
from pathlib import Path
from typing import Literal, NamedTuple

from csdiff.errors import CSDiffError
from csdiff.files import read_json

Tower = Literal["text", "image"]

# Which tensors of a folder belong to which tower: a whole model and a tower saved alone get one hash.
TOWER_PREFIXES = {"text": ("text_model.", "text_projection."), "image": ("vision_model.", "visual_projection.")}

_VIT_L = (
    "openai/clip-vit-large-patch14",
    "kakaobrain/karlo-v1-alpha",
    "kakaobrain/karlo-v1-alpha-image-variations",
)
_BIGG = (
    "laion/CLIP-ViT-bigG-14-laion2B-39B-b160k",
    "kandinsky-community/kandinsky-2-2-prior",
    "kandinsky-community/kandinsky-2-2-decoder",
)
# One encoder is published under several names. Karlo's model card: "we use ViT-L/14 provided by OpenAI's CLIP
# repository", for its prior and, as text encoder, for its decoder. Stable unCLIP was trained on the image embeddings
# of ViT-L/14 (small) and ViT-H/14, beside text states of another tower: its names stand for image towers only.
PUBLISHED: dict[str, dict[Tower, tuple[str, ...]]] = {
    "OpenAI CLIP ViT-L/14": {"text": _VIT_L, "image": (*_VIT_L, "stabilityai/stable-diffusion-2-1-unclip-small")},
    "OpenCLIP ViT-H/14": {
        "text": ("laion/CLIP-ViT-H-14-laion2B-s32B-b79K",),
        "image": ("laion/CLIP-ViT-H-14-laion2B-s32B-b79K", "stabilityai/stable-diffusion-2-1-unclip"),
    },
    "OpenCLIP ViT-bigG/14": dict.fromkeys(("text", "image"), _BIGG),
}
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
HUB_CACHE = re.compile(r"models--([^/\\]+?)--([^/\\]+)")


class EncoderComparison(NamedTuple):
    """Whether two records are of one encoder, and what decided, as a part of a sentence."""

    verdict: Literal["same", "different", "unknown"]
    reason: str


def compare_encoders(expected: dict | None, found: dict | None, tower: Tower) -> EncoderComparison:
    """The one rule for "the same encoder".

    The hashes of the weights decide where both are known: a copy under another name is the same encoder. Otherwise
    names do: equal names, or two names of one published encoder, are the same; two other published names are
    different; the name of a folder tells nothing of its weights. Another width or another pooling is another encoder
    whatever the weights.

    Args:
        expected: An encoder's part of a `csdiff.json`: `{"id", "weights_sha256", "dim", "pooling", ...}`, any of it.
        found: The other one.
        tower: Which tower of a model the records are about.
    """

    def both(key: str) -> tuple | None:
        values = (expected or {}).get(key), (found or {}).get(key)
        return None if None in values else values

    for key, word in (("dim", "width"), ("pooling", "pooling")):
        if (values := both(key)) and values[0] != values[1]:
            return EncoderComparison("different", f"{word} expected {values[0]}, found {values[1]}")
    if hashes := both("weights_sha256"):
        if hashes[0] == hashes[1]:
            return EncoderComparison("same", "their weights are equal")
        first, second = (str(value)[:12] for value in hashes)
        return EncoderComparison("different", f"their weights differ: sha256 expected {first}, found {second}")
    ids = both("id")
    if ids is None:
        return EncoderComparison("unknown", "no name or hash is known of one of them")
    if ids[0] == ids[1]:
        return EncoderComparison("same", "their names are equal")
    families = [encoder_family(str(id), tower) for id in ids]
    if not all(families):
        reason = "without the hashes of both nothing tells whether they are copies of one model"
        return EncoderComparison("unknown", reason)
    if families[0] == families[1]:
        return EncoderComparison("same", f"both are published copies of {families[0]}")
    return EncoderComparison("different", f"expected {ids[0]}, found {ids[1]}")


def check_same_encoder(
    expected: dict | None, found: dict | None, tower: Tower, expected_in: str, found_in: str
) -> None:
    """Refuse two records of different encoders, see `compare_encoders`; warn where two names do not tell.

    `expected_in` and `found_in` say where the records come from.

    Raises:
        CSDiffError: They are different: the sentence names both and what differs.
    """
    result = compare_encoders(expected, found, tower)
    names = [str((record or {}).get("id")) for record in (expected, found)]
    sentence = (
        f"The {tower} encoder of {found_in} ({names[1]}) {{}} that of {expected_in} ({names[0]}): {result.reason}"
    )
    if result.verdict == "different":
        raise CSDiffError(sentence.format("is not") + "; use one encoder for both.")
    if result.verdict == "unknown" and "None" not in names:
        warnings.warn(sentence.format("may not be") + "; it is on you that they fit.", stacklevel=2)


def encoder_family(id: str, tower: Tower) -> str | None:
    """The one name of a published encoder, also for a folder called like it; None for any other folder."""
    cached = HUB_CACHE.search(id)
    if cached:
        id = f"{cached[1]}/{cached[2]}"
    is_name = id == "tiny-clip" or (HUB_ID.fullmatch(id) is not None and not Path(id).exists())
    for family, ids in PUBLISHED.items():
        if id in ids[tower] or (not is_name and {name.split("/")[1] for name in ids[tower]} & set(Path(id).parts)):
            return family
    return id if is_name else None


def file_sha256(path: str | Path) -> str:
    """SHA-256 of a file's bytes."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def weights_sha256(folder: str | Path, tower: Tower | None = None) -> str:
    """SHA-256 of the tensors in a folder's safetensors files.

    Taken over name, dtype, shape and bytes of every tensor in the order of the names, so that neither the split into
    files nor their headers matter. Of a model of two towers only the tensors of one count: the text tower of a whole
    `CLIPModel` and the same tower saved as `CLIPTextModelWithProjection` have the same hash.

    Args:
        folder: Holds `model.safetensors`, or several files of it.
        tower: None for all tensors.

    Raises:
        CSDiffError: No safetensors there, or a file that is not one.
    """
    import torch
    from safetensors import SafetensorError, safe_open

    folder = Path(folder)
    files = sorted(folder.glob("model*.safetensors")) or sorted(folder.glob("*.safetensors"))
    if not files:
        found = sorted(path.name for path in folder.glob("*.bin")) or "no weights"
        raise CSDiffError(
            f"{folder}: expected safetensors weights, found {found}; pickled weights are never read, save the model "
            "with save_pretrained."
        )
    # `model.safetensors` beside `model.fp16.safetensors`: the plain name is the one that transformers loads.
    files = [path for path in files if path.name == "model.safetensors"] or files
    opened = {}
    for file in files:
        try:
            reader = safe_open(file, "pt")
        except (SafetensorError, OSError) as error:
            raise CSDiffError(
                f"{file} is not a whole safetensors file ({error}); download or save it again."
            ) from error
        opened |= dict.fromkeys(reader.keys(), reader)
    # Not a weight: older checkpoints carry this index buffer, newer ones do not.
    names = sorted(name for name in opened if not name.endswith(".position_ids"))
    own = [name for name in names if name.startswith(TOWER_PREFIXES.get(tower, ()))]
    lost = ""
    if tower and not own and (folder / "config.json").is_file():
        # A SigLIP tower saved alone has lost the prefix of its names.
        siglip = str(read_json(folder / "config.json").get("model_type")).startswith("siglip")
        lost = TOWER_PREFIXES[tower][0] if siglip else ""
    digest = hashlib.sha256()
    for name in own or names:
        entry = opened[name].get_slice(name)
        digest.update(json.dumps([lost + name, entry.get_dtype(), entry.get_shape()]).encode())
        tensor = opened[name].get_tensor(name).contiguous()
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
