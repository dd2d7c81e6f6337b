"""Ops that move elements of tiles: views, splits and joins where blocks allow them, else gathers.

In: a structural node and the names of its operands. Out: the text of its value. Positions that do not
exist may hold anything, so every gathered position is clamped to one that does.
"""

from collections.abc import Callable
from math import prod
from typing import Final

from superopt.codegen.triton.expressions import TYPES
from superopt.codegen.triton.writer import Writer, along, padded
from superopt.ir.node import Node
from superopt.ir.ops import structural
from superopt.ir.ops.registry import Op
from superopt.ir.types import DType, contiguous_strides

_CARRIER: Final = {
    DType.BOOL: "tl.int32",
    DType.F16: "tl.float32",
    DType.BF16: "tl.float32",
}
Move = Callable[[Node, list[str], Writer], str]


def block(shape: tuple[int, ...]) -> list[int]:
    """Return the block shape that holds a tile of `shape`."""
    return [padded(d) for d in shape]


def move(node: Node, operands: list[str], writer: Writer) -> str:
    """Return the text of a structural node."""
    return MOVES[node.op](node, operands, writer)


def _gathered(text: str, dtype: DType, index: str, axis: int) -> str:
    if dtype is DType.BOOL:
        return f"(tl.gather(({text}).to(tl.int8), {index}, {axis}) != 0)"
    return f"tl.gather({text}, {index}, {axis})"


def _picked(
    text: str, node: Node, out: tuple[int, ...], axis: int, index: str, writer: Writer
) -> str:
    """Return elements of `node` at `index` (a vector of positions along `axis`)."""
    last = padded(node.shape[axis]) - 1
    clamped = f"tl.minimum(tl.maximum({index}, 0), {last})"
    name = writer.let("at", clamped)
    spread = f"tl.broadcast_to({along(name, axis, len(out))}, {block(out)})"
    return _gathered(text, node.tensor.dtype, spread, axis)


def _permute(node: Node, operands: list[str], writer: Writer) -> str:
    return f"tl.permute({operands[0]}, {node.attrs.perm})"


def _broadcast(node: Node, operands: list[str], writer: Writer) -> str:
    return f"tl.broadcast_to({operands[0]}, {block(node.shape)})"


def _reshape(node: Node, operands: list[str], writer: Writer) -> str:
    (x,) = node.inputs
    return reshaped(operands[0], x.shape, node.shape, x.tensor.dtype, writer)


def reshaped(
    text: str, before: tuple[int, ...], after: tuple[int, ...], dtype: DType, writer: Writer
) -> str:
    """Return a tile in another shape of as many elements."""
    if not before:
        return f"tl.full({block(after)}, {text}, {TYPES[dtype]})"
    if not after:
        scalar = f"tl.max(tl.reshape({text}, [1]).to({_CARRIER.get(dtype, TYPES[dtype])}), 0)"
        return f"({scalar} != 0)" if dtype is DType.BOOL else f"{scalar}.to({TYPES[dtype]})"
    if _squeezed(before, after) or (block(before) == [*before] and block(after) == [*after]):
        return f"tl.reshape({text}, {block(after)})"
    # the padding lies elsewhere in the new shape: look up where each element stood
    rank = len(after)
    terms = [
        f"{along(writer.local(d), i, rank)} * {stride}"
        for i, (d, stride) in enumerate(zip(after, contiguous_strides(after), strict=True))
        if d != 1
    ]
    number = writer.let("number", " + ".join(terms))
    where = []
    logical, physical = contiguous_strides(before), contiguous_strides(tuple(block(before)))
    for d, mine, theirs in zip(before, logical, physical, strict=True):
        if d != 1:
            where.append(f"{number} // {mine} % {d} * {theirs}")
    at = writer.let("at", f"tl.reshape({' + '.join(where)}, [{prod(block(after))}])")
    flat = f"tl.reshape({text}, [{prod(block(before))}])"
    return f"tl.reshape({_gathered(flat, dtype, at, 0)}, {block(after)})"


def is_view(node: Node) -> bool:
    """Say whether a reshape only adds or drops dims of size 1."""
    return _squeezed(node.inputs[0].shape, node.shape)


def _squeezed(before: tuple[int, ...], after: tuple[int, ...]) -> bool:
    return [d for d in before if d != 1] == [d for d in after if d != 1]


def _slice(node: Node, operands: list[str], writer: Writer) -> str:
    axis, attrs = len(node.shape) + node.attrs.axis, node.attrs
    (x,), half = node.inputs, node.shape[axis]
    if _halved(x.shape[axis], half) and attrs.step == 1 and attrs.start % half == 0:
        # not a gather: these move values between threads, and Triton 3.6 refuses many
        parts = block(x.shape)
        parts[axis : axis + 1] = [2, half]
        order = [d for d in range(len(parts)) if d != axis]
        apart = f"tl.permute(tl.reshape({operands[0]}, {parts}), {[*order, axis]})"
        return f"tl.split({apart})[{attrs.start // half}]"
    index = f"{writer.local(node.shape[axis])} * {attrs.step} + {attrs.start}"
    return _picked(operands[0], node.inputs[0], node.shape, axis, index, writer)


def _flip(node: Node, operands: list[str], writer: Writer) -> str:
    text = operands[0]
    for axis in node.attrs.axes:
        size = node.shape[axis]
        index = f"{size - 1} - {writer.local(size)}"
        text = _picked(text, node.inputs[0], node.shape, len(node.shape) + axis, index, writer)
        text = writer.let("flip", text)
    return text


def _pad(node: Node, operands: list[str], writer: Writer) -> str:
    axis, before = len(node.shape) + node.attrs.axis, node.attrs.before
    (x,) = node.inputs
    local = writer.local(node.shape[axis])
    text = _picked(operands[0], x, node.shape, axis, f"{local} - {before}", writer)
    inside = f"({local} >= {before}) & ({local} < {before + x.shape[axis]})"
    real = along(writer.let("real", inside), axis, len(node.shape))
    fill = f"tl.full({[1] * len(node.shape)}, {node.attrs.value!r}, {operands[0]}.dtype)"
    return f"tl.where({real}, {text}, {fill})"


def _halved(size: int, half: int) -> bool:
    """Say whether a dim of `size` elements is a block dim of two equal ones."""
    return size == 2 * half == padded(size)


def _concat(node: Node, operands: list[str], writer: Writer) -> str:
    axis, rank = len(node.shape) + node.attrs.axis, len(node.shape)
    if _halved(node.shape[axis], node.inputs[0].shape[axis]) and len(node.inputs) == 2:
        order = [*range(axis), rank, *range(axis, rank)]
        both = f"tl.permute(tl.join({operands[0]}, {operands[1]}), {order})"
        return f"tl.reshape({both}, {block(node.shape)})"
    local = writer.local(node.shape[axis])
    start, parts = 0, []
    for part, name in zip(node.inputs, operands, strict=True):
        parts.append((start, _picked(name, part, node.shape, axis, f"{local} - {start}", writer)))
        start += part.shape[axis]
    result = parts[-1][1]
    for (end, _), (_, text) in reversed(list(zip(parts[1:], parts[:-1], strict=True))):
        earlier = along(writer.let("before", f"{local} < {end}"), axis, len(node.shape))
        result = f"tl.where({earlier}, {text}, {result})"
    return result


def _gather(node: Node, operands: list[str], writer: Writer) -> str:
    axis, (x, _) = len(node.shape) + node.attrs.axis, node.inputs
    last = x.shape[axis] - 1
    at = writer.let("at", f"tl.minimum(tl.maximum({operands[1]}.to(tl.int32), 0), {last})")
    return _gathered(operands[0], node.tensor.dtype, at, axis)


MOVES: Final[dict[Op, Move]] = {
    structural.PERMUTE: _permute,
    structural.BROADCAST: _broadcast,
    structural.RESHAPE: _reshape,
    structural.SLICE: _slice,
    structural.FLIP: _flip,
    structural.PAD: _pad,
    structural.CONCAT: _concat,
    structural.GATHER: _gather,
}
