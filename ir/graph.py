"""Graphs: named inputs and outputs over interned nodes, at kernel, block or thread level."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, final

from superopt.ir.node import Node, topological

if TYPE_CHECKING:
    from collections.abc import Sequence


@final
class Level(Enum):
    """Where a graph runs: on the device, in one block, in one thread."""

    KERNEL = "kernel"
    BLOCK = "block"
    THREAD = "thread"


@final
@dataclass(frozen=True, slots=True)
class Bound:
    """An affine condition on axes: sum(coefficient * index) + constant >= 0.

    A loop iteration in which a bound of its axis fails is not run: accumulators get nothing
    from it. That is how causal and windowed structure skips whole tiles.
    """

    terms: tuple[tuple[str, int], ...]
    constant: int


@final
@dataclass(frozen=True, slots=True)
class Axis:
    """A grid or loop axis of a block graph: its number of points and, for loops, its bounds."""

    name: str
    count: int
    bounds: tuple[Bound, ...] = ()


@final
@dataclass(frozen=True, slots=True)
class Graph:
    """An immutable μGraph; equal graphs have the same nodes, names and axes.

    `grid` and `loops` are empty except at block level. Loops run one after the other unless a
    value depends on two of them, which nests them.
    """

    level: Level
    name: str
    inputs: tuple[Node, ...]
    outputs: tuple[Node, ...]
    grid: tuple[Axis, ...] = ()
    loops: tuple[Axis, ...] = ()

    def nodes(self) -> Iterator[Node]:
        """Yield all nodes, operands first; inputs that no output needs come last."""
        yield from topological((*self.outputs, *self.inputs))

    def input_name(self, index: int) -> str:
        """Name of input `index`."""
        name: str = self.inputs[index].attrs.name
        return name

    def axis(self, name: str) -> Axis:
        """Return the grid or loop axis called `name`."""
        for axis in (*self.grid, *self.loops):
            if axis.name == name:
                return axis
        raise KeyError(name)

    def digest(self) -> str:
        """Structural hash (hex): names of graphs and inputs do not count, everything else does."""
        return _digest(self)

    def with_outputs(self, outputs: "Sequence[Node]") -> "Graph":
        """Return the graph with other outputs."""
        return Graph(self.level, self.name, self.inputs, tuple(outputs), self.grid, self.loops)

    def __str__(self) -> str:
        from superopt.ir.text import print_graph

        return print_graph(self)

    def __repr__(self) -> str:
        return f"<{self.level.value} graph {self.name}: {len(self.outputs)} outputs>"


def _digest(graph: Graph) -> str:
    numbers = {node: f"i{position}" for position, node in enumerate(graph.inputs)}
    lines = [graph.level.value, repr((graph.grid, graph.loops))]
    lines += [str(i.type) for i in graph.inputs]
    for node in topological(graph.outputs):
        if node in numbers:
            continue
        inner = getattr(node.attrs, "graph", None)
        attrs = inner.digest() if isinstance(inner, Graph) else repr(node.attrs)
        operands = ",".join(numbers[i] for i in node.inputs)
        numbers[node] = str(len(lines))
        lines.append(f"{node.op.name}({operands}){attrs}:{node.type}")
    lines.append(",".join(numbers[o] for o in graph.outputs))
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
