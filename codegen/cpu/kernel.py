"""Compiled kernels: from sources to something to call with addresses.

In: `Source`s from the lowering and a cache folder. Out: `Kernel`s, or the error in its place.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import final

from superopt.codegen.cpu import compile as driver
from superopt.codegen.cpu.lower import Source
from superopt.codegen.errors import CodegenError


@final
@dataclass(frozen=True, slots=True)
class Kernel:
    """A loaded kernel; call it with the addresses of its inputs, then of its outputs."""

    source: Source
    path: Path
    function: Callable[..., None]

    def __call__(self, *pointers: int) -> None:
        """Run the kernel."""
        self.function(*pointers)


def load(source: Source, path: Path) -> Kernel:
    """Load the compiled form of `source` from `path`."""
    return Kernel(source, path, driver.load_kernel(path, source.pointers, source.symbol))


def compile_many(
    sources: Sequence[Source],
    cache_dir: Path,
    *,
    workers: int | None = None,
    limit_s: float = inf,
) -> list[Kernel | CodegenError]:
    """Compile and load every source, several compilers at a time, for `limit_s` in all."""
    texts = [s.text for s in sources]
    paths = driver.compile_many(texts, cache_dir, workers=workers, limit_s=limit_s)
    kernels: list[Kernel | CodegenError] = []
    for source, path in zip(sources, paths, strict=True):
        if isinstance(path, CodegenError):
            kernels.append(path)
            continue
        try:
            kernels.append(load(source, path))
        except CodegenError as error:
            kernels.append(error)
    return kernels
