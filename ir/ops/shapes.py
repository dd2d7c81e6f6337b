"""Type-rule helpers shared by the op declarations."""

from collections.abc import Sequence

from superopt.ir.errors import GraphError
from superopt.ir.types import Dim, DType, TensorType, Type


def tensor(type_: Type) -> TensorType:
    """Return the operand's tensor type; a tuple operand is an error."""
    if not isinstance(type_, TensorType):
        raise GraphError(f"an operand has several results {type_}; take item i of it")
    return type_


def broadcast_shapes(shapes: Sequence[tuple[Dim, ...]]) -> tuple[Dim, ...]:
    """Return the common shape of elementwise operands: rank 0, or equal rank with dims equal or 1."""
    ranks = {len(s) for s in shapes if s}
    if not ranks:
        return ()
    if len(ranks) > 1:
        raise GraphError(f"elementwise operands differ in rank: {list(shapes)}; reshape first")
    result = []
    for dims in zip(*(s for s in shapes if s), strict=True):
        wide = {d for d in dims if d != 1}
        if len(wide) > 1:
            raise GraphError(f"elementwise operands do not broadcast: {list(shapes)}")
        result.append(wide.pop() if wide else 1)
    return tuple(result)


def same_dtype(types: Sequence[TensorType]) -> DType:
    """Return the one element type of all operands; casts are explicit in the IR."""
    dtypes = {t.dtype for t in types}
    if len(dtypes) > 1:
        raise GraphError(f"operands differ in element type: {[t.dtype for t in types]}; cast first")
    return types[0].dtype


def check_axis(axis: int, rank: int) -> int:
    """Check an axis counted from the end (-rank <= axis < 0) and return it from the front."""
    if not -rank <= axis < 0:
        raise GraphError(f"axis {axis} is outside -{rank}..-1 (axes count from the end)")
    return rank + axis


def elements(type_: Type) -> int:
    """Element count of a result."""
    return tensor(type_).elements
