"""Backends: what turns block graphs into kernels that the runtime can call, on one kind of device.

In: a block graph. Out: `KernelSource`s (text) and from them `Callable[..., None]`s that take the
addresses of inputs, then of outputs. A backend is found by name and device; what it cannot do it says
with a `CodegenError`, and the caller keeps what it had.
"""

import logging
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from importlib.util import find_spec
from math import inf, prod
from pathlib import Path
from typing import Protocol, final

import torch

from superopt.codegen import cpu, triton
from superopt.codegen.errors import CodegenError
from superopt.errors import Unsupported, unknown
from superopt.ir.graph import Graph
from superopt.ir.ops import contraction
from superopt.ir.text import parse_graph, print_graph
from superopt.plan import KernelSource

logger = logging.getLogger("superopt")

NAMES = ("auto", "cpu", "triton")

Entry = Callable[..., None]
"""Takes integer addresses: inputs, then outputs."""

Timer = Callable[[Callable[[], object], int], float]
"""Returns the mean seconds of one of so many calls."""


def wall(call: Callable[[], object], repeats: int) -> float:
    """Return the mean seconds of one of `repeats` calls made back to back."""
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats


class Backend(Protocol):
    """Generates, loads and times kernels for one device."""

    @property
    def name(self) -> str:
        """Name by which plans refer to it."""
        ...

    @property
    def device(self) -> torch.device:
        """Where its kernels run."""
        ...

    def usable(self) -> bool:
        """Say whether kernels can be built and run here."""
        ...

    def variants(self, graph: Graph, count: int) -> list[KernelSource | CodegenError]:
        """Return sources of up to `count` configurations, the most promising first."""
        ...

    def with_denormals(self, graph: Graph, source: KernelSource) -> KernelSource | None:
        """Return the source of a kernel that keeps denormal numbers where this one takes them for 0, if it does."""
        ...

    def load(
        self, sources: Sequence[KernelSource], limit_s: float = inf
    ) -> list[Entry | CodegenError]:
        """Compile and load, for about `limit_s` at most; failures are returned in their place."""
        ...

    def timed(self, call: Callable[[], object], repeats: int) -> float:
        """Return the mean seconds of one of `repeats` calls made back to back."""
        ...


def current(device: torch.device) -> AbstractContextManager[object]:
    """Return what makes kernels launch on `device`."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def timer(device: torch.device) -> Timer:
    """Return what times calls on a device: wall time, or the time between two events on the stream."""
    if device.type == "cpu":
        return wall

    def between_events(call: Callable[[], object], repeats: int) -> float:
        with torch.cuda.device(device):
            start = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            stop = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            torch.cuda.synchronize()
            start.record()
            for _ in range(repeats):
                call()
            stop.record()
            stop.synchronize()
            return float(start.elapsed_time(stop)) / 1e3 / repeats

    return between_events


def vector_bytes() -> int:
    """Return the width of this processor's vector registers."""
    return {"AVX512": 64, "AVX2": 32}.get(torch.backends.cpu.get_cpu_capability(), 16)


def bf16_products() -> str:
    """Say how kernels for this processor can multiply bfloat16 as it is: "tiles", "dots" or ""."""
    compiler = cpu.find_compiler()
    return "" if compiler is None else compiler.bf16


@final
@dataclass(frozen=True, slots=True)
class CpuBackend:
    """C++ through the system's compiler; shared objects are kept in `folder`."""

    folder: Path
    vector_bytes: int = field(default_factory=vector_bytes)
    bf16: str = field(default_factory=bf16_products)

    @property
    def name(self) -> str:
        """Name by which plans refer to it."""
        return "cpu"

    @property
    def device(self) -> torch.device:
        """Where its kernels run."""
        return torch.device("cpu")

    def usable(self) -> bool:
        """Say whether there is a C++ compiler."""
        return cpu.find_compiler() is not None

    def variants(self, graph: Graph, count: int) -> list[KernelSource | CodegenError]:
        """Return sources of up to `count` configurations, the most promising first."""
        found: list[KernelSource | CodegenError] = []
        for config in cpu.configs(graph, self)[:count]:
            try:
                source = cpu.lower(graph, config, graph.name)
            except CodegenError as error:
                found.append(error)
                continue
            found.append(
                KernelSource(
                    "cpu",
                    graph.name,
                    print_graph(graph),
                    source.text,
                    source.symbol,
                    source.pointers,
                    asdict(config),
                )
            )
        return found

    def with_denormals(self, graph: Graph, source: KernelSource) -> KernelSource | None:
        """Return the source of a kernel whose products keep denormal numbers, if these do not."""
        config = cpu.CpuConfig(**source.config)
        if config.denormals or all(n.op is not contraction.MATMUL for n in graph.nodes()):
            return None
        config = replace(config, denormals=True)
        text = cpu.lower(graph, config, graph.name).text
        return replace(source, text=text, config=asdict(config))

    def load(
        self, sources: Sequence[KernelSource], limit_s: float = inf
    ) -> list[Entry | CodegenError]:
        """Compile and load, for `limit_s` at most; failures are returned in their place."""
        plain = [cpu.Source(s.text, s.symbol, s.pointers) for s in sources]
        kernels = cpu.compile_many(plain, self.folder, limit_s=limit_s)
        return [k if isinstance(k, CodegenError) else k.function for k in kernels]

    def timed(self, call: Callable[[], object], repeats: int) -> float:
        """Return the mean seconds of one of `repeats` calls made back to back."""
        return wall(call, repeats)


@final
@dataclass(frozen=True, slots=True)
class TritonBackend:
    """Triton on one GPU; generated modules are kept in `folder`, binaries where Triton keeps them."""

    folder: Path
    device: torch.device

    @property
    def name(self) -> str:
        """Name by which plans refer to it."""
        return "triton"

    def usable(self) -> bool:
        """Say whether there are Triton and a GPU."""
        return find_spec("triton") is not None and torch.cuda.is_available()

    def variants(self, graph: Graph, count: int) -> list[KernelSource | CodegenError]:
        """Return sources of up to `count` configurations, the most promising first."""
        return triton_variants(graph, count)

    def with_denormals(self, graph: Graph, source: KernelSource) -> KernelSource | None:
        """Return None: kernels keep them."""
        return None

    def load(
        self, sources: Sequence[KernelSource], limit_s: float = inf
    ) -> list[Entry | CodegenError]:
        """Compile and load, however long that takes: Triton's compiler works in this process."""
        with torch.cuda.device(self.device):
            return triton.load_entries([triton_source(s) for s in sources], self.folder)

    def timed(self, call: Callable[[], object], repeats: int) -> float:
        """Return the mean seconds of one of `repeats` calls made back to back."""
        return timer(self.device)(call, repeats)


def triton_variants(graph: Graph, count: int) -> list[KernelSource | CodegenError]:
    """Return Triton sources of up to `count` configurations, the most promising first."""
    found: list[KernelSource | CodegenError] = []
    for config in triton.configs(graph)[:count]:
        try:
            source = triton.lower(graph, config, graph.name)
        except CodegenError as error:
            return [error]  # configurations differ in numbers only
        block, pointers = print_graph(graph), len(source.types)
        found.append(
            KernelSource(
                "triton", graph.name, block, source.text, source.symbol, pointers, asdict(config)
            )
        )
    return found


def triton_source(kernel: KernelSource) -> triton.Source:
    """Return what a stored kernel was generated as."""
    graph = parse_graph(kernel.block)
    types = tuple(n.tensor.dtype.value for n in (*graph.inputs, *graph.outputs))
    blocks = prod(a.count for a in graph.grid)
    config = triton.TritonConfig(**kernel.config)
    return triton.Source(kernel.text, kernel.symbol, types, blocks, config)


def backend_named(name: str, folder: Path, device: torch.device) -> Backend:
    """Return the backend called `name` for tensors on `device` ("auto": what that device has).

    Raises:
        Unsupported: there is no such backend, or not for this device.
    """
    if name not in NAMES:
        raise Unsupported(unknown("backend", name, NAMES))
    if device.type == "cpu" and name in ("auto", "cpu"):
        return CpuBackend(folder)
    if device.type == "cuda" and name in ("auto", "triton"):
        return TritonBackend(folder, device)
    if device.type in ("cpu", "cuda"):
        wanted = "tensors on a GPU" if name == "triton" else "tensors on the CPU"
        raise Unsupported(f'backend="{name}" takes {wanted}, these are on {device}: use "auto"')
    raise Unsupported(f"there is no backend for tensors on {device}")
