"""Pictures of a dataset by their identity, for an image encoder in the loop."""

from pathlib import Path

from PIL.Image import Image

from csdiff.data.images import UnreadableImage, decode_image
from csdiff.data.items import Item
from csdiff.data.opening import open_source
from csdiff.errors import CSDiffError


class Pictures:
    """The encoded pictures of a dataset in memory, decoded when they are asked for.

    Files stay on the disk; pictures inside archives and tables are held as they are (about 4 KB each for small icons,
    100 KB for photographs): for data larger than memory, cache image tokens in the store instead.

    Args:
        path: Dataset in any form that `csdiff embed` reads.
    """

    def __init__(self, path: str):
        self.path = path
        source = open_source(path)
        if not source.has_images:
            raise CSDiffError(f"{path} has no pictures, and an image encoder is to see them at every step.")
        self._images: dict[str, bytes | Path] = {
            item.id: item.image
            for unit in range(source.units(10_000))
            for item in source.read(unit, 10_000)
            if isinstance(item, Item) and item.image is not None
        }

    def __call__(self, identities: list[str]) -> list[Image]:
        """Pictures by `image_id`.

        Raises:
            CSDiffError: a picture of the store is not in the dataset, or cannot be decoded any more.
        """
        try:
            return [decode_image(self._images[name]) for name in identities]
        except (KeyError, UnreadableImage) as error:
            raise CSDiffError(
                f"{self.path}: a picture of the store cannot be read here ({error}): give the dataset that the store "
                "was made from, unchanged."
            ) from error
