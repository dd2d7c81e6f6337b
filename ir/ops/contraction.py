"""Contractions, reductions and scans. Reductions keep the reduced dimension as 1."""

from dataclasses import dataclass
from typing import Any, Literal, final, get_args

from superopt.ir.errors import GraphError
from superopt.ir.ops.registry import Op, OpKind, declare
from superopt.ir.ops.shapes import broadcast_shapes, check_axis, elements, same_dtype, tensor
from superopt.ir.types import DType, TensorType, Type

ScanKind = Literal["sum", "prod", "max", "min"]


@final
@dataclass(frozen=True, slots=True)
class ReduceAttrs:
    """Axes (from the end) that are reduced to size 1, in increasing order."""

    axes: tuple[int, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "axes", tuple(sorted(set(self.axes))))


@final
@dataclass(frozen=True, slots=True)
class AxisAttrs:
    """One axis, counted from the end."""

    axis: int


@final
@dataclass(frozen=True, slots=True)
class ScanAttrs:
    """Inclusive scan along `axis` (from the end)."""

    axis: int
    kind: ScanKind


def _matmul(types: tuple[Type, ...], attrs: Any) -> Type:
    a, b = (tensor(t) for t in types)
    if a.rank < 2 or a.rank != b.rank:
        raise GraphError("operands need equal rank of at least 2; reshape first")
    if a.shape[-1] != b.shape[-2]:
        raise GraphError(f"contracted dims differ: {a.shape[-1]} and {b.shape[-2]}")
    batch = broadcast_shapes([a.shape[:-2], b.shape[:-2]])
    return TensorType((*batch, a.shape[-2], b.shape[-1]), same_dtype([a, b]))


def _matmul_flops(types: tuple[Type, ...], result: Type) -> int:
    return 2 * elements(result) * tensor(types[0]).shape[-1]


def _reduce(types: tuple[Type, ...], attrs: ReduceAttrs) -> Type:
    x = tensor(types[0])
    axes = {check_axis(a, x.rank) for a in attrs.axes}
    return x.with_shape(tuple(1 if i in axes else d for i, d in enumerate(x.shape)))


def _index_reduce(types: tuple[Type, ...], attrs: AxisAttrs) -> Type:
    x = tensor(types[0])
    axis = check_axis(attrs.axis, x.rank)
    return TensorType(tuple(1 if i == axis else d for i, d in enumerate(x.shape)), DType.I64)


def _scan(types: tuple[Type, ...], attrs: ScanAttrs) -> Type:
    x = tensor(types[0])
    check_axis(attrs.axis, x.rank)
    if attrs.kind not in get_args(ScanKind):
        raise GraphError(f"a scan is one of {get_args(ScanKind)}, not {attrs.kind!r}")
    return x.with_shape(x.shape)


def _operand_elements(types: tuple[Type, ...], result: Type) -> int:
    return elements(types[0])


MATMUL = declare(
    Op(
        "matmul",
        OpKind.CONTRACTION,
        2,
        None,
        _matmul,
        "torch.matmul over the last two dims, batch dims broadcast; accumulates in >= float32",
        associative=True,
        linear_in=frozenset({0, 1}),
        flops=_matmul_flops,
    )
)


def _reduction(name: str, meaning: str, *, linear: bool = False) -> Op:
    op = Op(
        name,
        OpKind.REDUCTION,
        1,
        ReduceAttrs,
        _reduce,
        meaning,
        linear_in=frozenset({0}) if linear else frozenset(),
        flops=_operand_elements,
    )
    return declare(op)


REDUCE_SUM = _reduction("reduce_sum", "torch.sum(axes, keepdim=True); any on bool", linear=True)
REDUCE_MAX = _reduction("reduce_max", "torch.amax(axes, keepdim=True); any on bool")
REDUCE_MIN = _reduction("reduce_min", "torch.amin(axes, keepdim=True); all on bool")
REDUCE_PROD = _reduction("reduce_prod", "torch.prod(axes, keepdim=True); all on bool")


def _index_reduction(name: str, meaning: str) -> Op:
    return declare(
        Op(
            name,
            OpKind.REDUCTION,
            1,
            AxisAttrs,
            _index_reduce,
            meaning,
            flops=_operand_elements,
        )
    )


ARGMAX = _index_reduction("argmax", "torch.argmax(axis, keepdim=True)")
ARGMIN = _index_reduction("argmin", "torch.argmin(axis, keepdim=True)")
SCAN = declare(
    Op(
        "scan",
        OpKind.STRUCTURAL,
        1,
        ScanAttrs,
        _scan,
        "torch.cumsum / cumprod / cummax(axis)",
        flops=_operand_elements,
    )
)
