"""Leaves: graph inputs, constants and index sequences; and projection of tuple results."""

from dataclasses import dataclass
from typing import Any, final

from superopt.ir.errors import GraphError
from superopt.ir.ops.registry import Op, OpKind, declare
from superopt.ir.types import Dim, DType, TensorType, TupleType, Type


@final
@dataclass(frozen=True, slots=True)
class InputAttrs:
    """A graph input: its name and type; inputs of one name and type are one node."""

    name: str
    type: TensorType


@final
@dataclass(frozen=True, slots=True)
class ConstantAttrs:
    """A scalar constant (rank 0)."""

    value: float | int | bool
    dtype: DType

    def __post_init__(self) -> None:
        if self.dtype.is_float:
            object.__setattr__(self, "value", float(self.value))
        elif self.dtype is DType.BOOL:
            object.__setattr__(self, "value", bool(self.value))
        else:
            object.__setattr__(self, "value", int(self.value))


@final
@dataclass(frozen=True, slots=True)
class IotaAttrs:
    """Indices along one axis (from the end) of a tensor of `shape`."""

    shape: tuple[Dim, ...]
    axis: int
    dtype: DType


@final
@dataclass(frozen=True, slots=True)
class ItemAttrs:
    """Which result of a node with several results."""

    index: int


def _input(types: tuple[Type, ...], attrs: InputAttrs) -> Type:
    return attrs.type


def _constant(types: tuple[Type, ...], attrs: ConstantAttrs) -> Type:
    return TensorType((), attrs.dtype)


def _iota(types: tuple[Type, ...], attrs: IotaAttrs) -> Type:
    if not -len(attrs.shape) <= attrs.axis < 0:
        raise GraphError(f"axis {attrs.axis} is outside the shape {attrs.shape}")
    return TensorType(attrs.shape, attrs.dtype)


def _item(types: tuple[Type, ...], attrs: ItemAttrs) -> Type:
    if not isinstance(types[0], TupleType):
        raise GraphError("item projects a node with several results")
    if not 0 <= attrs.index < len(types[0].items):
        raise GraphError(f"item {attrs.index} of {len(types[0].items)} results")
    return types[0].items[attrs.index]


def _iota_batched(attrs: IotaAttrs, batch: tuple[int, ...]) -> Any:
    return IotaAttrs((1,) * len(batch) + attrs.shape, attrs.axis, attrs.dtype)


INPUT = declare(Op("input", OpKind.LEAF, 0, InputAttrs, _input, "a tensor argument"))
CONSTANT = declare(
    Op("constant", OpKind.LEAF, 0, ConstantAttrs, _constant, "a scalar; torch.tensor(value)")
)
IOTA = declare(
    Op(
        "iota",
        OpKind.LEAF,
        0,
        IotaAttrs,
        _iota,
        "torch.arange along one axis, expanded to shape",
        batched=_iota_batched,
    )
)
ITEM = declare(Op("item", OpKind.LEAF, 1, ItemAttrs, _item, "result i of several"))
