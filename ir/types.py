"""Types of values: element types, tensor types and tuples of them."""

from dataclasses import dataclass
from enum import Enum
from math import prod
from typing import final

Dim = int
"""A dimension's extent; integers today, symbols once dynamic shapes are built."""


@final
class DType(Enum):
    """Element type; the value is its name in the text form."""

    F64 = "f64"
    F32 = "f32"
    F16 = "f16"
    BF16 = "bf16"
    I64 = "i64"
    I32 = "i32"
    I16 = "i16"
    I8 = "i8"
    U8 = "u8"
    BOOL = "bool"
    C64 = "c64"
    C128 = "c128"

    @property
    def size_bytes(self) -> int:
        """Bytes per element in memory."""
        return _SIZES[self]

    @property
    def is_float(self) -> bool:
        """True for the real floating-point types."""
        return self in (DType.F64, DType.F32, DType.F16, DType.BF16)

    @property
    def is_half(self) -> bool:
        """True for the floating-point types of 16 bits."""
        return self in (DType.F16, DType.BF16)

    @property
    def wide(self) -> "DType":
        """The type in which PyTorch computes inside one operator: float32 for floats of 16 bits."""
        return DType.F32 if self.is_half else self

    @property
    def is_integer(self) -> bool:
        """True for the integer types (bool excluded)."""
        return self in (DType.I64, DType.I32, DType.I16, DType.I8, DType.U8)

    @property
    def is_complex(self) -> bool:
        """True for the complex types, which only opaque nodes may carry."""
        return self in (DType.C64, DType.C128)

    def __repr__(self) -> str:
        return self.value


_SIZES = {
    DType.F64: 8,
    DType.F32: 4,
    DType.F16: 2,
    DType.BF16: 2,
    DType.I64: 8,
    DType.I32: 4,
    DType.I16: 2,
    DType.I8: 1,
    DType.U8: 1,
    DType.BOOL: 1,
    DType.C64: 8,
    DType.C128: 16,
}


def contiguous_strides(shape: tuple[Dim, ...]) -> tuple[int, ...]:
    """Row-major strides of a dense tensor, in elements."""
    strides = [1] * len(shape)
    for axis in range(len(shape) - 2, -1, -1):
        strides[axis] = strides[axis + 1] * max(shape[axis + 1], 1)
    return tuple(strides)


Run = tuple[int, int]
"""Elements a fixed distance apart: how many, and the distance."""


def reshape_runs(
    shape: tuple[Dim, ...], strides: tuple[int, ...], new: tuple[Dim, ...]
) -> list[list[Run]] | None:
    """Return of which runs, outermost first, each dim of a reshape consists.

    Where every dim is one run the reshape needs no copy. None: a dim ends inside a run that its neighbours
    do not divide.
    """
    if 0 in new:
        return [[(n, s)] for n, s in zip(new, contiguous_strides(new), strict=True)]
    runs: list[Run] = []
    for extent, stride in zip(shape, strides, strict=True):
        if extent == 1:
            continue
        if runs and runs[-1][1] == extent * stride:
            runs[-1] = (runs[-1][0] * extent, stride)
        else:
            runs.append((extent, stride))
    found: list[list[Run]] = []
    rest, step = 1, 1
    for missing in reversed(new):
        parts: list[Run] = []
        while missing > 1 or not parts:
            if rest == 1 and runs:
                rest, step = runs.pop()
            taken = min(missing, rest)
            if missing % taken or rest % taken:
                return None
            parts.insert(0, (taken, step))
            rest, step, missing = rest // taken, step * taken, missing // taken
        found.insert(0, parts)
    return found


def reshape_strides(
    shape: tuple[Dim, ...], strides: tuple[int, ...], new: tuple[Dim, ...]
) -> tuple[int, ...] | None:
    """Strides of a reshape that needs no copy (the rule of torch's `view`), else None."""
    runs = reshape_runs(shape, strides, new)
    if runs is None or any(len(parts) > 1 for parts in runs):
        return None
    return tuple(stride for ((_, stride),) in runs)


@final
@dataclass(frozen=True, slots=True)
class TensorType:
    """Shape, element type and layout of a tensor or tile.

    `strides` (elements) is None for dense row-major; only graph inputs carry other layouts.
    """

    shape: tuple[Dim, ...]
    dtype: DType
    strides: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.strides is not None and self.strides == contiguous_strides(self.shape):
            object.__setattr__(self, "strides", None)

    @property
    def rank(self) -> int:
        """Number of dimensions."""
        return len(self.shape)

    @property
    def elements(self) -> int:
        """Number of elements."""
        return prod(self.shape)

    @property
    def size_bytes(self) -> int:
        """Bytes of all elements (without holes from strides)."""
        return self.elements * self.dtype.size_bytes

    @property
    def element_strides(self) -> tuple[int, ...]:
        """Strides in elements, the dense ones where none are recorded."""
        return contiguous_strides(self.shape) if self.strides is None else self.strides

    def with_shape(self, shape: tuple[Dim, ...]) -> "TensorType":
        """Return the dense type of the same element type with another shape."""
        return TensorType(shape, self.dtype)

    def __str__(self) -> str:
        dims = ",".join(str(d) for d in self.shape)
        layout = "" if self.strides is None else f"<{','.join(str(s) for s in self.strides)}>"
        return f"{self.dtype.value}[{dims}]{layout}"

    __repr__ = __str__


@final
@dataclass(frozen=True, slots=True)
class TupleType:
    """Type of a node with several results; `item` projects one."""

    items: tuple[TensorType, ...]

    def __str__(self) -> str:
        return f"({', '.join(str(t) for t in self.items)})"

    __repr__ = __str__


Type = TensorType | TupleType
