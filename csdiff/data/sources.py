"""What every source of captions and images offers."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator

from csdiff.data.items import Item, Problem


class Source(ABC):
    """A data set in units that can be read apart, each by one process, always in the same order.

    Attributes:
        has_images: Its items have images.
        has_captions: Its items have captions.
        count: Number of items, or None if only reading them all would tell.
        not_read: Files of its folder that are neither images nor captions, by ending: `{"count", "first"}`.
    """

    has_images: bool
    has_captions: bool
    count: int | None
    not_read: dict[str, dict] = {}

    @abstractmethod
    def units(self, size: int) -> int:
        """Number of units, of `size` items each where the source can be cut anywhere."""

    @abstractmethod
    def read(self, unit: int, size: int) -> Iterator[Item | Problem]:
        """Items of one unit, in order."""

    @abstractmethod
    def identity(self) -> dict:
        """JSON-able description that changes when the data changes."""


class IndexedSource(Source):
    """A source whose items can be read in any order."""

    count: int

    def __len__(self) -> int:
        return self.count

    @abstractmethod
    def __getitem__(self, index: int) -> Item | Problem:
        """Item at a place."""

    def units(self, size: int) -> int:
        return math.ceil(self.count / size)

    def read(self, unit: int, size: int) -> Iterator[Item | Problem]:
        for index in range(unit * size, min((unit + 1) * size, self.count)):
            yield self[index]
