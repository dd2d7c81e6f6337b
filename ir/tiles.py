"""What each tile of a block graph covers: the axes it varies over and where its dims come from."""

from dataclasses import dataclass
from typing import final

from superopt.ir.graph import Graph
from superopt.ir.node import Node
from superopt.ir.ops import contraction, leaf, structural, tile
from superopt.ir.ops.registry import OpKind
from superopt.ir.types import Dim

_ACCUMULATORS = (
    tile.ACCUM_SUM,
    tile.ACCUM_MAX,
    tile.ACCUM_MIN,
    tile.ACCUM_PROD,
    tile.ACCUM_LAST,
    tile.ACCUM_RESCALED,
)


@final
@dataclass(frozen=True, slots=True)
class DimSource:
    """The tensor dim that a tile dim runs over: its index map and true extent."""

    map: tile.DimMap
    extent: Dim

    @property
    def ragged(self) -> bool:
        """True when some tile reaches past the extent."""
        return self.map.padded > self.extent


def is_accumulator(node: Node) -> bool:
    """Say whether this op is one that closes a loop (prefix_max stays inside it)."""
    return node.op in _ACCUMULATORS


def varying_axes(graph: Graph) -> dict[Node, frozenset[str]]:
    """Map each node of a block graph to the grid and loop axes over which its value varies.

    What a bounded loop gives varies over the grid axes that its bounds name.
    """
    axes: dict[Node, frozenset[str]] = {}
    for node in graph.nodes():
        found = frozenset[str]().union(*(axes[i] for i in node.inputs))
        if node.op is tile.LOAD:
            found |= {a for d in node.attrs.dims for a, _ in d.axes}
        elif node.op is tile.TILE_INDEX:
            found |= {a for a, _ in node.attrs.dim.axes}
        elif is_accumulator(node) or node.op is tile.PREFIX_MAX:
            loop = node.attrs.loop
            found |= {a for bound in graph.axis(loop).bounds for a, _ in bound.terms if a != loop}
            if node.op is not tile.PREFIX_MAX:
                found -= {loop}
        elif node.op is tile.STORE:
            found = frozenset()
        axes[node] = found
    return axes


def dim_sources(graph: Graph) -> dict[Node, tuple[DimSource | None, ...]]:
    """Map each tile to the source of each of its dims; None where there is none (or no longer).

    A dim has a source from its load on through elementwise ops, contractions and permutations; a
    ragged source tells where positions must be masked. Reshapes keep the sources of the dims that
    they leave alone.
    """
    sources: dict[Node, tuple[DimSource | None, ...]] = {}
    for node in graph.nodes():
        sources[node] = _sources(node, [sources[i] for i in node.inputs])
    return sources


def _sources(
    node: Node, operands: list[tuple[DimSource | None, ...]]
) -> tuple[DimSource | None, ...]:
    op = node.op
    if op is tile.LOAD:
        extents = node.inputs[0].shape
        return tuple(DimSource(m, e) for m, e in zip(node.attrs.dims, extents, strict=True))
    if op is tile.TILE_INDEX:
        return (DimSource(node.attrs.dim, node.attrs.extent),)
    if op is leaf.INPUT or op is leaf.ITEM or op is tile.STORE:
        return ()
    if op is contraction.MATMUL:
        batch = _merge(node.shape[:-2], [s[:-2] for s in operands])
        return (*batch, operands[0][-2], operands[1][-1])
    if op.kind is OpKind.REDUCTION:
        axes = getattr(node.attrs, "axes", None) or (node.attrs.axis,)
        rank = len(node.shape)
        return tuple(None if i - rank in axes else s for i, s in enumerate(operands[0]))
    if op is structural.PERMUTE:
        return tuple(operands[0][p] for p in node.attrs.perm)
    if op is structural.RESHAPE:
        return _through_reshape(node.inputs[0].shape, node.shape, operands[0])
    if op in (structural.SLICE, structural.PAD, structural.CONCAT):
        axis = len(node.shape) + node.attrs.axis
        merged = _merge(node.shape, operands)
        return tuple(None if i == axis else s for i, s in enumerate(merged))
    if op is structural.GATHER:
        axis = len(node.shape) + node.attrs.axis
        data = tuple(None if i == axis else s for i, s in enumerate(operands[0]))
        return _merge(node.shape, [data, operands[1]])
    if is_accumulator(node) or op is tile.PREFIX_MAX:
        return tuple(_closed(s, node.attrs.loop) for s in operands[0])
    if not operands:
        return (None,) * len(node.shape)
    return _merge(node.shape, operands)


def _closed(source: DimSource | None, loop: str) -> DimSource | None:
    # tiles of different iterations were put together: the dim no longer runs over one tensor dim
    if source is None or all(a != loop for a, _ in source.map.axes):
        return source
    return None


def _merge(
    shape: tuple[Dim, ...], operands: list[tuple[DimSource | None, ...]]
) -> tuple[DimSource | None, ...]:
    result: list[DimSource | None] = [None] * len(shape)
    for sources in operands:
        if len(sources) != len(shape):
            continue
        for i, source in enumerate(sources):
            if source is not None and source.map.tile == shape[i] and shape[i] != 1:
                known = result[i]
                result[i] = source if known is None or source.ragged else known
            elif source is not None and shape[i] == 1:
                result[i] = result[i] or source
    return tuple(result)


def _through_reshape(
    before: tuple[Dim, ...], after: tuple[Dim, ...], sources: tuple[DimSource | None, ...]
) -> tuple[DimSource | None, ...]:
    result: list[DimSource | None] = [None] * len(after)
    i = j = 0
    while i < len(before) and j < len(after):
        if before[i] == after[j]:
            result[j] = sources[i]
            i, j = i + 1, j + 1
        elif before[i] == 1:
            i += 1
        elif after[j] == 1:
            j += 1
        else:
            left, right = before[i], after[j]
            i, j = i + 1, j + 1
            while left != right:
                if left < right:
                    left, i = left * before[i], i + 1
                else:
                    right, j = right * after[j], j + 1
    return tuple(result)
