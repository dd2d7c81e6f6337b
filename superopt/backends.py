"""Backends: what turns block graphs into kernels that the runtime can call.

In: a block graph. Out: `KernelSource`s (text) and from them `Callable[..., None]`s that take the
addresses of inputs, then of outputs. A backend is found by name; what it cannot do it says with a
`CodegenError`, and the caller keeps what it had.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol, final

from superopt.codegen import cpu
from superopt.codegen.errors import CodegenError
from superopt.errors import Unsupported, unknown
from superopt.ir.graph import Graph
from superopt.ir.text import print_graph
from superopt.plan import KernelSource

logger = logging.getLogger("superopt")

Entry = Callable[..., None]
"""Takes integer addresses: inputs, then outputs."""


class Backend(Protocol):
    """Generates and loads kernels for one kind of device."""

    @property
    def name(self) -> str:
        """Name by which plans refer to it."""
        ...

    def usable(self) -> bool:
        """Say whether kernels can be built and run here."""
        ...

    def variants(self, graph: Graph, count: int) -> list[KernelSource | CodegenError]:
        """Return sources of up to `count` configurations, the most promising first."""
        ...

    def load(self, sources: Sequence[KernelSource]) -> list[Entry | CodegenError]:
        """Compile and load; failures are returned in their place."""
        ...


@final
@dataclass(frozen=True, slots=True)
class CpuBackend:
    """C++ through the system's compiler; shared objects are kept in `folder`."""

    folder: Path
    vector_bytes: int = 64

    @property
    def name(self) -> str:
        """Name by which plans refer to it."""
        return "cpu"

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

    def load(self, sources: Sequence[KernelSource]) -> list[Entry | CodegenError]:
        """Compile and load; failures are returned in their place."""
        plain = [cpu.Source(s.text, s.symbol, s.pointers) for s in sources]
        kernels = cpu.compile_many(plain, self.folder)
        return [k if isinstance(k, CodegenError) else k.function for k in kernels]


def backend_named(name: str, folder: Path) -> Backend:
    """Return the backend called `name` ("auto": what this machine has).

    Raises:
        Unsupported: there is no such backend, or not on this machine.
    """
    if name in ("auto", "cpu"):
        return CpuBackend(folder)
    if name == "triton":
        raise Unsupported(
            "the triton backend needs a CUDA or ROCm device, and none is driven from here: "
            'use backend="cpu" or "auto"'
        )
    raise Unsupported(unknown("backend", name, ("auto", "cpu", "triton")))
