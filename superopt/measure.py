"""Compile and time candidates on this machine: the `Measurer` that the search is given.

Kernels compile in parallel and are timed alone, on random data with poisoned outputs; a kernel that
leaves an element unwritten is rejected. Programs are timed in turn, round by round, so that a
drift of the machine's speed hits all of them.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import inf
from pathlib import Path
from statistics import median
from typing import Any, final

import torch

from superopt.codegen.cpu.config import CpuConfig
from superopt.codegen.cpu.kernel import Kernel, compile_many
from superopt.codegen.cpu.lower import Source, lower
from superopt.codegen.errors import CodegenError
from superopt.ir.graph import Graph
from superopt.ir.ops import contraction, library
from superopt.ir.types import DType, TensorType
from superopt.runtime import build
from superopt.verify.reference import DTYPES

_TUNED = (
    CpuConfig(contraction="dot"),
    CpuConfig(contraction="pack"),
    CpuConfig(rows=8, vectors=3),
    CpuConfig(rows=12, vectors=2),
    CpuConfig(rows=4, vectors=6),
)


def example(type_: TensorType, generator: torch.Generator) -> torch.Tensor:
    """Return random data of a type, lying as it says; integers are small (valid as indices)."""
    dtype = DTYPES[type_.dtype]
    span = 1 + sum(
        (n - 1) * s for n, s in zip(type_.shape, type_.element_strides, strict=True) if n > 0
    )
    if type_.dtype is DType.BOOL:
        storage = torch.rand(span, generator=generator) < 0.5
    elif type_.dtype.is_float:
        storage = torch.randn(span, generator=generator).to(dtype)
    else:
        storage = torch.randint(0, 2, (span,), generator=generator).to(dtype)
    return storage.as_strided(type_.shape, type_.element_strides)


@final
@dataclass(frozen=True, slots=True)
class Compiled:
    """A block graph's chosen kernel."""

    graph: Graph
    config: CpuConfig
    kernel: Kernel
    seconds: float


@final
@dataclass(slots=True)
class CpuMeasurer:
    """Times block graphs and programs through the C++ backend."""

    cache_dir: Path
    seed: int = 0
    compiled: dict[str, Compiled] = field(default_factory=dict)
    data: dict[TensorType, torch.Tensor] = field(default_factory=dict)
    errors: list[str] = field(default_factory=list)

    def kernels(self, graphs: Sequence[Graph]) -> list[float]:
        """Return seconds per block graph; the best one's register tiles are tuned too."""
        found = self._run([(g, CpuConfig()) for g in graphs])
        if graphs:
            best = min(range(len(graphs)), key=lambda i: found[i])
            graph = graphs[best]
            has_product = any(n.op is contraction.MATMUL for n in graph.nodes())
            if found[best] < inf and has_product and self._is_record(graph):
                tuned = self._run([(graph, c) for c in _TUNED], found[best])
                found[best] = min(found[best], *tuned)
        return found

    def _is_record(self, graph: Graph) -> bool:
        """True when no kernel with the same inputs and outputs was faster."""
        mine = self.compiled[graph.digest()]
        key = _signature(graph)
        rivals = [c.seconds for c in self.compiled.values() if _signature(c.graph) == key]
        return mine.seconds <= min(rivals)

    def _run(
        self, candidates: Sequence[tuple[Graph, CpuConfig]], limit: float = inf
    ) -> list[float]:
        sources: list[Source | CodegenError] = []
        for graph, config in candidates:
            try:
                sources.append(lower(graph, config, graph.name))
            except CodegenError as error:
                sources.append(error)
        texts = [s for s in sources if isinstance(s, Source)]
        built = iter(compile_many(texts, self.cache_dir))
        result = []
        for (graph, config), source in zip(candidates, sources, strict=True):
            kernel = next(built) if isinstance(source, Source) else source
            if isinstance(kernel, CodegenError):
                self.errors.append(str(kernel))
                result.append(inf)
                continue
            seconds = self._time(graph, kernel, limit)
            limit = min(limit, seconds)
            known = self.compiled.get(graph.digest())
            if seconds < inf and (known is None or seconds < known.seconds):
                self.compiled[graph.digest()] = Compiled(graph, config, kernel, seconds)
            result.append(seconds)
        return result

    def _example(self, type_: TensorType) -> torch.Tensor:
        if type_ not in self.data:
            generator = torch.Generator().manual_seed(self.seed)
            self.data[type_] = example(type_, generator)
        return self.data[type_]

    def _time(self, graph: Graph, kernel: Kernel, limit: float) -> float:
        inputs = [self._example(i.tensor) for i in graph.inputs]
        outputs = [_poisoned(o.tensor) for o in graph.outputs]
        pointers = [t.data_ptr() for t in (*inputs, *outputs)]
        kernel(*pointers)
        if any(_is_poisoned(o) for o in outputs):
            self.errors.append(f"{graph.name} leaves elements unwritten")
            return inf
        return _clock(lambda: kernel(*pointers), limit)

    def programs(self, graphs: Sequence[Graph]) -> list[float]:
        """Return seconds per kernel graph, timed in turn."""
        calls: list[tuple[Callable[..., Any], list[torch.Tensor]]] = []
        for graph in graphs:
            inputs = [self._example(i.tensor) for i in graph.inputs]
            calls.append((self.program(graph), inputs))
        return interleaved([lambda c=c, i=i: c(*i) for c, i in calls])

    def program(self, graph: Graph) -> Callable[..., tuple[Any, ...]]:
        """Return the runnable form of a kernel graph whose kernels were measured before."""
        kernels = {}
        for node in graph.nodes():
            if node.op is library.CUSTOM:
                digest = node.attrs.graph.digest()
                kernels[digest] = self.compiled[digest].kernel.function
        return build(graph, kernels)


def _signature(graph: Graph) -> tuple[Any, ...]:
    inputs = tuple(i.tensor for i in graph.inputs)
    return inputs, tuple(o.tensor for o in graph.outputs)


def _poisoned(type_: TensorType) -> torch.Tensor:
    if type_.dtype.is_float:
        return torch.full(type_.shape, float("nan"), dtype=DTYPES[type_.dtype])
    return torch.zeros(type_.shape, dtype=DTYPES[type_.dtype])


def _is_poisoned(output: torch.Tensor) -> bool:
    return output.is_floating_point() and bool(output.isnan().any())


def _clock(call: Callable[[], Any], limit: float) -> float:
    """Median seconds of a call; few repetitions for one that is clearly slower than `limit`."""
    started = time.perf_counter()
    call()
    once = time.perf_counter() - started
    if once > 3 * limit:
        return once
    inner = max(1, min(200, int(0.002 / max(once, 1e-7))))
    samples = []
    for _ in range(7):
        started = time.perf_counter()
        for _ in range(inner):
            call()
        samples.append((time.perf_counter() - started) / inner)
    return median(samples)


def interleaved(
    calls: Sequence[Callable[[], Any]], rounds: int = 9, sample_s: float = 0.004
) -> list[float]:
    """Median seconds of several calls, timed in turn."""
    inner = []
    for call in calls:
        call()
        started = time.perf_counter()
        call()
        once = time.perf_counter() - started
        inner.append(max(1, min(500, int(sample_s / max(once, 1e-7)))))
    samples: list[list[float]] = [[] for _ in calls]
    for _ in range(rounds):
        for position, call in enumerate(calls):
            started = time.perf_counter()
            for _ in range(inner[position]):
                call()
            samples[position].append((time.perf_counter() - started) / inner[position])
    return [median(s) for s in samples]
