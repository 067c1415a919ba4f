"""Weights in memory that processes share: one copies them in, the others read them. Or they are sent."""

from __future__ import annotations

import mmap
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import torch

ALIGNMENT = 64


@dataclass(frozen=True)
class Place:
    """Where a tensor lies in memory."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int

    @property
    def count(self) -> int:
        """How many numbers it has."""
        return torch.Size(self.shape).numel()


class SharedWeights:
    """Room for all weights of a model, several times over: a version that is still needed stays while another comes.

    The memory has no name in any file system. It is there as long as a process has it open: who dies leaves nothing
    behind.

    Args:
        places: where each tensor lies in one copy, see `layout`.
        size: of one copy, in bytes.
        copies: how many there is room for.
        handle: of memory that another process has made, inherited from it; None makes it.

    Attributes:
        handle: for processes to inherit (`pass_fds`).

    Examples:
        >>> weights = {"weight": torch.ones(2, 3), "bias": torch.zeros(2, dtype=torch.bfloat16)}
        >>> shared = SharedWeights(*layout(weights), copies=2)
        >>> shared.store(weights, copy=1)
        >>> shared.view(1)["weight"].sum(), shared.view(1)["bias"].dtype
        (tensor(6.), torch.bfloat16)
        >>> other = SharedWeights(shared.places, shared.size, copies=2, handle=os.dup(shared.handle))
        >>> torch.equal(other.view(1)["weight"], weights["weight"])
        True
        >>> other.close(), shared.close()
        (None, None)
    """

    def __init__(self, places: Mapping[str, Place], size: int, *, copies: int, handle: int | None = None) -> None:
        self.places = dict(places)
        self.size = size
        self.copies = copies
        self.handle = _nameless() if handle is None else handle
        if handle is None:
            os.ftruncate(self.handle, size * copies)
        self._memory: mmap.mmap | None = mmap.mmap(self.handle, size * copies)
        self._views: list[dict[str, torch.Tensor]] = [self._views_of(copy) for copy in range(copies)]

    def store(self, weights: Mapping[str, torch.Tensor], copy: int) -> None:
        """Copy all weights in."""
        views = self._views[copy]
        if weights.keys() != views.keys():
            odd = sorted(weights.keys() ^ views.keys())
            raise ValueError(f"expected weights of the same names as before, but these are new or missing: {odd[:5]}")
        for name, weight in weights.items():
            views[name].copy_(weight.detach())

    def view(self, copy: int) -> dict[str, torch.Tensor]:
        """The weights where they lie: read them, and let them be."""
        return dict(self._views[copy])

    def bytes_of(self, copy: int) -> memoryview:
        """One copy as it lies in memory, for one who has no part in it: see `receive`."""
        memory: Any = self._memory
        return memoryview(memory)[copy * self.size : (copy + 1) * self.size]

    def receive(self, connection: Connection) -> None:
        """Take what another has sent of its own into the first copy."""
        connection.recv_bytes_into(self.bytes_of(0))

    def close(self) -> None:
        """Let go of the memory."""
        self._views = []
        if self._memory is not None:
            # A tensor that somebody still has keeps it mapped; then it goes with that.
            self._memory = None
            os.close(self.handle)

    def _views_of(self, copy: int) -> dict[str, torch.Tensor]:
        memory: Any = self._memory
        begin = copy * self.size
        return {
            name: torch.frombuffer(memory, dtype=place.dtype, count=place.count, offset=begin + place.offset).reshape(
                place.shape
            )
            for name, place in self.places.items()
        }


def _nameless() -> int:
    if hasattr(os, "memfd_create"):
        return os.memfd_create("weights")
    with tempfile.TemporaryFile() as file:  # it has no name any more
        return os.dup(file.fileno())


def layout(weights: Mapping[str, torch.Tensor]) -> tuple[dict[str, Place], int]:
    """Where each of these lies in a copy of them all, and how many bytes that takes.

    Examples:
        >>> places, size = layout({"weight": torch.ones(2, 3), "bias": torch.ones(2)})
        >>> places["bias"].offset, size
        (64, 128)
    """
    places: dict[str, Place] = {}
    size = 0
    for name, weight in weights.items():
        places[name] = Place(weight.dtype, tuple(weight.shape), size)
        size += -(-weight.numel() * weight.element_size() // ALIGNMENT) * ALIGNMENT
    return places, max(size, ALIGNMENT)
