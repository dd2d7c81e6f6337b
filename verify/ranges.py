"""Which integers a program may be given: those that are valid where they are used as indices."""

import numpy as np
import numpy.typing as npt

from superopt.ir.graph import Graph
from superopt.ir.node import Node, topological
from superopt.ir.ops import elementwise, leaf, structural
from superopt.ir.ops.registry import OpKind
from superopt.ir.semantics import expand

DEFAULT_LIMIT = 64


def draw_integers(
    source: np.random.Generator, shape: tuple[int, ...], limit: int
) -> "npt.NDArray[np.int64]":
    """Draw 0 <= i < limit, the ends of the range (where mistakes are made) in one of four."""
    top = max(limit, 1)
    drawn = source.integers(0, top, size=shape, dtype=np.int64)
    ends = source.integers(0, 2, size=shape, dtype=np.int64) * (top - 1)
    return np.where(source.integers(0, 4, size=shape) == 0, ends, drawn)


def integer_limits(graph: Graph) -> dict[str, int]:
    """Map the name of each integer input to a limit: values 0 <= i < limit are valid indices."""
    expanded = expand(graph)
    limits: dict[Node, int] = {}
    for node in topological(expanded.outputs):
        if node.op in (structural.TAKE, structural.GATHER):
            _limit(node.inputs[1], node.inputs[0].shape[node.attrs.axis], limits)
        elif node.op.kind is OpKind.LIBRARY:
            for operand in node.inputs:
                _limit(operand, _smallest_dim(node), limits)
    return {i.attrs.name: limits.get(i, DEFAULT_LIMIT) for i in expanded.inputs}


def _smallest_dim(node: Node) -> int:
    # an unknown operator may index any of its tensors
    dims = [d for i in node.inputs for d in i.shape if d > 1]
    return min([*dims, DEFAULT_LIMIT])


def _limit(index: Node, extent: int, limits: dict[Node, int]) -> None:
    """Record the limit on every integer input from which `index` is taken or cast."""
    pending, seen = [index], set()
    while pending:
        node = pending.pop()
        if id(node) in seen or not node.tensor.dtype.is_integer:
            continue
        seen.add(id(node))
        if node.op is leaf.INPUT:
            limits[node] = min(limits.get(node, extent), extent)
        elif node.op.kind is OpKind.STRUCTURAL or node.op in (elementwise.CAST, elementwise.WHERE):
            pending += node.inputs
