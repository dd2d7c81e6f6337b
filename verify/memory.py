"""Memory for large tensors, kept for the next: results of programs, and values in tests.

A large block that is freed goes back to the operating system, and the next one comes as untouched pages:
each costs a fault at its first write, all of them more time than it takes to fill the block. Blocks
from here lie in huge pages where the system has them, and serve again once nothing refers to them
(as those of PyTorch's caching allocator do on a GPU).

Invariant: a block is on a free list, or exactly one storage refers to it. Lists change by single
operations, so that threads need no lock. What is kept is bounded.
"""

import mmap
import os
import weakref
from collections.abc import Callable, Sequence
from contextlib import suppress
from math import prod
from typing import Final, final

import torch

LARGE_BYTES: Final = 1 << 20
"""Results of at least this size are worth it; smaller ones come from PyTorch's allocator."""

_GRAIN_BYTES: Final = 64 << 10


@final
class Blocks:
    """Free blocks by size, at most about `keep_bytes` of them."""

    def __init__(self, keep_bytes: int) -> None:
        self._keep_bytes = keep_bytes
        self._free: dict[int, list[mmap.mmap]] = {}
        self._lent: dict[int, weakref.ref[memoryview]] = {}

    @property
    def kept_bytes(self) -> int:
        """Bytes that are kept and that no tensor uses now."""
        return sum(size * len(blocks) for size, blocks in list(self._free.items()))

    def take(self, size: int) -> memoryview:
        """Return a block of `size` bytes, a multiple of the grain; it is free when the view is gone."""
        try:
            block = self._free[size].pop()
        except (KeyError, IndexError):
            block = _map(size)
        view = memoryview(block)
        key = id(view)
        self._lent[key] = weakref.ref(view, lambda _: self._back(key, block))
        return view

    def _back(self, key: int, block: mmap.mmap) -> None:
        del self._lent[key]
        size = len(block)
        if self.kept_bytes + size > self._keep_bytes:
            self._free.clear()
        self._free.setdefault(size, []).append(block)


def _map(size: int) -> mmap.mmap:
    block = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a kernel without huge pages
            block.madvise(mmap.MADV_HUGEPAGE)
    return block


BLOCKS: Final = Blocks(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 8)
"""Shared by all programs of a process; keeps at most an eighth of the machine's memory."""


def allocator(shape: tuple[int, ...], dtype: torch.dtype) -> Callable[[], torch.Tensor]:
    """Return a function that makes an uninitialized dense CPU tensor, from `BLOCKS` if it is large."""
    count = prod(shape)
    if count * dtype.itemsize < LARGE_BYTES:
        return lambda: torch.empty(shape, dtype=dtype)
    size = -(-count * dtype.itemsize // _GRAIN_BYTES) * _GRAIN_BYTES
    return lambda: torch.frombuffer(BLOCKS.take(size), dtype=dtype, count=count).view(shape)


def empty(
    shape: Sequence[int], dtype: torch.dtype, device: torch.device | str = "cpu"
) -> torch.Tensor:
    """Make an uninitialized dense tensor, on the CPU from `BLOCKS` if it is large."""
    if torch.device(device).type != "cpu":
        return torch.empty(tuple(shape), dtype=dtype, device=device)
    return allocator(tuple(shape), dtype)()
