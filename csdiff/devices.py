"""The one choice of a device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from csdiff.errors import CSDiffError


def choose_device(name: str = "auto") -> torch.device:
    """The device of a name; "auto" is the accelerator torch finds (CUDA, MPS, XPU, ...), else the CPU.

    Raises:
        CSDiffError: no such device, or this machine has none of it.
    """
    if name == "auto":
        return torch.accelerator.current_accelerator() or torch.device("cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        if reason.startswith("Expected one of"):  # and the twenty kinds that torch has names for
            reason = "there is no such kind"
        raise CSDiffError(
            f"device {name!r}: expected auto, cpu, or an accelerator of this machine such as cuda or mps, found one "
            f"that torch cannot use ({reason})."
        ) from error
    return device


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Compute on so many processor threads within a block, or a function that it decorates.

    Linear algebra on matrices of a few hundred rows wants one: its threads wait longer for each other than they work.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
