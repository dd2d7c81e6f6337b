"""What a fused loop does for each node: its members, and how values are combined.

In: nodes that reduce, scan or accumulate. Out: their combination and its neutral element as C++ text,
and `Member`s, the statements that a fused loop is made of.
"""

from dataclasses import dataclass
from typing import Literal, final

from superopt.codegen.cpu.context import Extent, View
from superopt.codegen.cpu.expressions import literal
from superopt.ir.node import Node
from superopt.ir.ops import contraction, tile
from superopt.ir.types import DType

MemberKind = Literal[
    "write", "reduce", "scan", "place", "accumulate", "prefix", "rescale", "settle", "store"
]
_IDENTITY = {"sum": 0.0, "prod": 1.0, "max": float("-inf"), "min": float("inf")}
_COMBINE = {
    contraction.REDUCE_SUM: "sum",
    contraction.REDUCE_PROD: "prod",
    contraction.REDUCE_MAX: "max",
    contraction.REDUCE_MIN: "min",
    contraction.ARGMAX: "max",
    contraction.ARGMIN: "min",
    tile.ACCUM_SUM: "sum",
    tile.ACCUM_RESCALED: "sum",
    tile.ACCUM_PROD: "prod",
    tile.ACCUM_MAX: "max",
    tile.ACCUM_MIN: "min",
    tile.PREFIX_MAX: "max",
}


def combine_kind(node: Node) -> str:
    """Return how a reduction, scan or accumulator combines values: sum, prod, max or min."""
    if node.op is contraction.SCAN:
        kind: str = node.attrs.kind
        return kind
    return _COMBINE[node.op]


def carried(node: Node) -> DType:
    """Return the type of what a scan carries from element to element; PyTorch adds in double."""
    dtype = node.inputs[0].tensor.dtype
    sums = node.op is contraction.SCAN and combine_kind(node) in ("sum", "prod")
    return DType.F64 if sums and dtype.is_float else dtype


def identity(kind: str, dtype: DType) -> str:
    """Return the neutral element of a combination as a C++ literal."""
    value = _IDENTITY[kind]
    if dtype is DType.BOOL:
        return "true" if value == 1.0 or value == float("inf") else "false"
    if not dtype.is_float and abs(value) == float("inf"):
        bits = dtype.size_bytes * 8
        unsigned = dtype is DType.U8
        top = 2**bits - 1 if unsigned else 2 ** (bits - 1) - 1
        value = top if value > 0 else (0 if unsigned else -(2 ** (bits - 1)))
    return literal(value, dtype)


def combine(kind: str, a: str, b: str, dtype: DType, *, vector: bool) -> str:
    """Return the combination of two values as text."""
    if dtype is DType.BOOL:
        return f"so::mask_{'or' if kind in ('max', 'sum') else 'and'}({a}, {b})"
    if kind in ("sum", "prod"):
        return f"{a} {'+' if kind == 'sum' else '*'} {b}"
    if dtype.is_float or not vector:
        return f"so::{kind}({a}, {b})"
    return f"so::{kind}_integers({a}, {b})"


@final
@dataclass(frozen=True, slots=True)
class Member:
    """One statement of a fused loop over `extents`.

    `source` is what it reads, `view` where it writes; for `reduce`, `axes` are reduced dims. `scan` and
    `place` (of an extreme) go along the one dim in `axes`; over rows they keep what they have in `carry`.
    """

    kind: MemberKind
    node: Node
    source: Node | None
    view: View
    extents: tuple[Extent, ...]
    axes: tuple[int, ...] = ()
    factors: tuple[tuple[float, View], ...] = ()
    """prefix, settle: for each power in use, where exp(power * (old - new)) goes; rescale: whence."""
    lag: float = 0.0
    """prefix: how far the shift in force may lag behind the maximum."""
    peak: View | None = None
    """prefix, settle: where the maximum is kept if it does, and somebody sees it."""
    old_shape: tuple[int, ...] = ()
    carry: View | None = None
    dense: int | None = None
    """The dim along which vectors lie, where it is not the last."""

    @property
    def rank(self) -> int:
        """Rank of the loop nest."""
        return len(self.extents)
