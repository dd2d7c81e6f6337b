"""What can be tuned in a C++ kernel beside its block graph's tile sizes.

In: a block graph and a target's vector width. Out: `CpuConfig`s in order of promise: the first is
what to run untuned.
"""

from dataclasses import dataclass, replace
from typing import Literal, Protocol, final

from superopt.ir.coordinates import is_move
from superopt.ir.graph import Graph
from superopt.ir.node import Node, topological
from superopt.ir.ops import contraction, elementwise, structural, tile
from superopt.ir.types import DType

Contraction = Literal["auto", "pack", "dot"]
_AVX512_BYTES = 64
_SKINNY = 16
_STREAMED = 32
_TINY = 4
_UNROLLS = (2, 8)
_LARGE_BYTES = 4 << 20


class VectorTarget(Protocol):
    """What tuning asks of a target."""

    @property
    def vector_bytes(self) -> int:
        """Width of a vector register."""
        ...

    @property
    def bf16(self) -> str:
        """How the processor multiplies bfloat16 as it is: "tiles", "dots", or "" if it does not."""
        ...


@final
@dataclass(frozen=True, slots=True)
class CpuConfig:
    """Register tiles of the products and how their operands are brought into shape.

    `rows` x `vectors` is the register tile of products that broadcast one operand, `dot_rows` x
    `dot_columns` of those that run along the contracted dim. `contraction` decides for operands
    that are contiguous along the contracted dim: transpose them tile by tile ("pack"), run along
    them ("dot"), or go by the shape ("auto"). Weights that few rows use are read `stream_rows` rows
    at a time (more where they are short), the next ones being fetched meanwhile (`prefetch`). `unroll` is the number of partial sums of a reduction along a row. `store_past` writes outputs
    past the caches. `pairs` multiplies bfloat16 as it is (runtime/gemm_bf16.h) and not as floats. `denormals`
    keeps denormal numbers in products of floats, at a hundred cycles each.
    """

    rows: int = 6
    vectors: int = 4
    dot_rows: int = 4
    dot_columns: int = 4
    contraction: Contraction = "auto"
    prefetch: bool = True
    stream_rows: int = 8
    unroll: int = 4
    store_past: bool = False
    pairs: bool = False
    denormals: bool = False


def configs(graph: Graph, target: VectorTarget | None = None) -> list[CpuConfig]:
    """Return the configurations worth timing for `graph`, the most promising first."""
    products = [n for n in topological(graph.outputs) if n.op is contraction.MATMUL]
    if not products:
        large = sum(o.tensor.size_bytes for o in graph.outputs) >= _LARGE_BYTES
        past = [CpuConfig(store_past=True)] if large else []
        # what lies in the second cache already gains nothing by being fetched
        return [
            CpuConfig(),
            *past,
            CpuConfig(prefetch=False),
            *(CpuConfig(unroll=u) for u in _UNROLLS),
        ]
    wide = target is None or target.vector_bytes >= _AVX512_BYTES
    rows = max(_rows(p) for p in products)
    found = [_tile(r, v, wide=wide) for r, v in _register_tiles(rows, wide=wide)]
    if not wide:
        # sums that wait in the second cache are fetched from there for fewer terms at a time: with 32 rows 93 GFLOP/s
        # for 69 (Zen 3), with 16 rows 81 for 68; with 8 rows a longer walk gains nothing
        deep = max(found[0].stream_rows, min(rows, _STREAMED))
        found = [replace(c, stream_rows=deep) for c in found]
    if any(_runs_along(p.inputs[1]) for p in products):
        first = found[0]
        found[1:1] = [replace(first, contraction="dot"), replace(first, contraction="pack")]
        if wide:
            found.append(replace(first, contraction="dot", dot_columns=4))
    if rows <= _SKINNY:
        found += [replace(found[0], stream_rows=16), replace(found[0], prefetch=False)]
    elif wide and rows <= _STREAMED:
        found.append(replace(found[0], stream_rows=_STREAMED))
    if target is not None and target.bf16 and any(of_bfloat16(p) for p in products):
        paired = [replace(c, pairs=True) for c in found]
        if all(of_bfloat16(p) for p in products):
            del paired[1:]  # register tiles are for products in floats
        # dot products are no faster than floats on all processors
        tiles = target.bf16 == "tiles"
        found = [*paired, found[0]] if tiles else [found[0], paired[0], *found[1:]]
    return list(dict.fromkeys(found))


def of_bfloat16(product: Node) -> bool:
    """Say whether both operands of a product are bfloat16, widened."""
    sources = [source(i) for i in product.inputs]
    return all(widens(s) and s.inputs[0].tensor.dtype is DType.BF16 for s in sources)


def source(operand: Node) -> Node:
    """Return what an operand of a product is a rearrangement of."""
    while is_move(operand) or operand.op is structural.RESHAPE:
        operand = operand.inputs[0]
    return operand


def widens(node: Node) -> bool:
    """Recognize a cast of 16-bit floats to float: loads do it on the way."""
    return (
        node.op is elementwise.CAST
        and node.tensor.dtype is DType.F32
        and node.inputs[0].tensor.dtype.is_half
    )


def _tile(rows: int, vectors: int, *, wide: bool) -> CpuConfig:
    return CpuConfig(rows, vectors, dot_rows=4 if wide else 2, dot_columns=6 if wide else 4)


def _register_tiles(rows: int, *, wide: bool) -> list[tuple[int, int]]:
    """Tiles whose accumulators, one row of vectors and a broadcast fit the registers."""
    if not wide and rows <= _TINY:
        return [(rows, 3), (rows, 2), (2, 4)] if rows > 2 else [(rows, 4), (rows, 2)]
    if not wide:
        return [(6, 2), (4, 2), (2, 4)]
    if rows <= _TINY:
        return [(rows, 4), (rows, 6)]
    if rows <= _SKINNY:
        return [(8, 2), (4, 4), (6, 4)]
    return [(6, 4), (4, 4), (5, 4), (8, 2)]


def _rows(product: Node) -> int:
    """Return the rows of a product, or those that batches of one row are together."""
    for dim in reversed(range(len(product.shape) - 2)):
        if product.shape[-2] == 1 < product.shape[dim] and _repeats(product.inputs[1], dim):
            return product.shape[dim]
    return product.shape[-2]


def _repeats(node: Node, dim: int) -> bool:
    """Say whether an operand, moved but not computed, is the same at all places of `dim`."""
    while node.op is structural.PERMUTE or node.op is elementwise.CAST:
        dim = node.attrs.perm[dim] if node.op is structural.PERMUTE else dim
        node = node.inputs[0]
    repeated = node.op is tile.LOAD and node.inputs[0].tensor.element_strides[dim] == 0
    return repeated or node.shape[dim] == 1


def _runs_along(node: Node) -> bool:
    """Say whether an operand, a transposed view, is contiguous along the contracted dim."""
    swaps = 0
    while node.inputs:
        if node.op is structural.PERMUTE and node.attrs.perm[-1] != len(node.shape) - 1:
            swaps += 1
        node = node.inputs[0]
    strides = node.tensor.element_strides
    return bool(strides) and (strides[-1] == 1) == (swaps % 2 == 1)
