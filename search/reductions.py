"""Algebraic moves of reductions: in stages, over joined tensors, and with shifts that hold more than a maximum.

- `reduce-in-stages`: a reduction that leaves too few elements to occupy the cores => one over the inner axes
  and another over the outer ones, which are few by then. Where the inner axes are short, and operands lie in
  memory as one axis, it is that axis that is cut, into pieces of equal length.
- `reduce-in-parts`: the same along one long axis, cut into pieces of equal length (and a rest, reduced alone).
- `reduce-of-concat`: a reduction over f(concat(a, b)) => the reductions over f(a) and f(b), combined: what
  is joined in memory only to be reduced is never joined.
- `product-of-concat`: a product of f(concat(a, b)) => the products of f(a) and f(b), added up or joined, where
  most of it lies in memory, as a cache of keys does: few rows read it there, and nothing is copied.
- `slice-of-concat`: a slice of f(concat(a, b)) within a => a slice of f(a).
- `maximum-out-of-shift`: exp(x - max(m, c)) with m the maximum of x => exp(x - m) * exp(m - max(m, c)), so
  that the shift in the loop is a maximum over it and nothing else (not one of a term from outside).

Each is a function from a node to its replacement, None where it does not fit; `superopt.search.algebra`
names them as rules.
"""

import math
from collections.abc import Iterable
from functools import lru_cache
from itertools import accumulate
from math import prod
from typing import Final

from superopt.ir import build as b
from superopt.ir.node import Node, rebuild
from superopt.ir.ops import contraction, elementwise, leaf, structural
from superopt.ir.ops.registry import OpKind
from superopt.ir.types import DType
from superopt.search.indices import SHORT_ROW
from superopt.search.region import is_view, view_base

_ENOUGH: Final = 64
"""Results that occupy the cores of a machine, and blocks enough that none of them waits for long."""
_FEW_ROWS: Final = 64
"""Rows of a product for which a copy of the other operand is not worth while."""
_LONG: Final = 1 << 15
"""Elements along an axis that take longer to reduce than it takes to call one kernel more."""
_COMBINE: Final = {
    contraction.REDUCE_SUM: elementwise.ADD,
    contraction.REDUCE_MAX: elementwise.MAXIMUM,
    contraction.REDUCE_MIN: elementwise.MINIMUM,
    contraction.REDUCE_PROD: elementwise.MUL,
}


def reduce_in_stages(node: Node) -> Node | None:
    """Reduce the inner axes first where the result has few elements."""
    if node.op not in _COMBINE:
        return None
    x = node.inputs[0]
    axes = sorted(a for a in node.attrs.axes if x.shape[a] > 1)
    present = prod(node.shape)
    outer = 0
    while present < _ENOUGH and outer < len(axes) - 1:
        present *= x.shape[axes[outer]]
        outer += 1
    if outer == 0:
        return None
    if prod(x.shape[a] for a in axes[outer:]) < SHORT_ROW:
        pieces = _pieces(node, axes[0], axes[-1])
        if pieces is not None:
            return pieces
    inner = [a for a in node.attrs.axes if a not in axes[:outer]]
    return b.reduce(node.op, b.reduce(node.op, x, inner), axes[:outer])


def reduce_in_parts(node: Node) -> Node | None:
    """Reduce the pieces of a long axis first where the result has few elements."""
    if node.op not in _COMBINE:
        return None
    x = node.inputs[0]
    axes = [a for a in node.attrs.axes if x.shape[a] > 1]
    present = prod(node.shape)
    if len(axes) != 1 or present >= _ENOUGH or x.shape[axes[0]] < _LONG:
        return None
    axis = axes[0] + len(x.shape)
    extent = x.shape[axis]
    least = -(-_ENOUGH // present)
    parts = next((p for p in range(least, 4 * least) if extent % p == 0), least)
    whole = extent // parts * parts
    cut = (*x.shape[:axis], parts, whole // parts, *x.shape[axis + 1 :])
    pieces = b.reduce(node.op, b.reshape(_sliced(x, axes[0], 0, whole), cut), axis + 1)
    result = b.reshape(b.reduce(node.op, pieces, axis), node.shape)
    if whole == extent:
        return result
    rest = b.reduce(node.op, _sliced(x, axes[0], whole, extent), axis)
    return b.elementwise_op(_COMBINE[node.op], result, rest)


def _pieces(node: Node, first: int, last: int) -> Node | None:
    """Reduce equal pieces of the axes from `first` to `last` (from the end), and what that leaves.

    None where not all of them are reduced, operands do not lie as one axis, or no pieces are equal.
    """
    x = node.inputs[0]
    rank, full = len(x.shape), x.shape
    within = slice(rank + first, rank + last + 1)
    if any(full[a] > 1 and a not in node.attrs.axes for a in range(first, last + 1)):
        return None
    elements, least = prod(full[within]), -(-_ENOUGH // prod(node.shape))
    parts = next((p for p in range(least, 4 * least) if elements % p == 0), None)
    if parts is None:
        return None
    known: dict[Node, Node | None] = {}

    def cut(of: Node) -> Node | None:
        if of not in known:
            known[of] = of if not of.shape else made(of)
        return known[of]

    def made(of: Node) -> Node | None:
        same = prod(of.shape[within]) == 1
        if not same and of.shape[within] != full[within]:
            return None
        both = (1, 1) if same else (parts, elements // parts)
        shaped = b.reshape(of, (*of.shape[: within.start], *both, *of.shape[within.stop :]))
        if same or (is_view(shaped) and view_base(of).op is leaf.INPUT):
            return shaped
        if of.op.kind is not OpKind.ELEMENTWISE:
            return None
        operands = [o for o in map(cut, of.inputs) if o is not None]
        return rebuild(of, tuple(operands)) if len(operands) == len(of.inputs) else None

    flat = cut(x)
    if flat is None:
        return None
    inside = within.start + 1 - len(flat.shape)
    return b.reshape(b.reduce(node.op, b.reduce(node.op, flat, inside), inside - 1), node.shape)


def _sliced(node: Node, axis: int, start: int, stop: int) -> Node:
    """Return a slice along an axis counted from the end, taken of what elementwise ops read."""
    known: dict[Node, Node] = {}

    def sliced(of: Node) -> Node:
        if of not in known:
            if len(of.shape) < -axis or of.shape[axis] == 1:
                known[of] = of
            elif of.op.kind is OpKind.ELEMENTWISE:
                known[of] = rebuild(of, tuple(map(sliced, of.inputs)))
            else:
                known[of] = b.slice_(of, axis, start, stop)
        return known[of]

    return sliced(node)


def reduce_of_concat(node: Node) -> Node | None:
    """Reduce the parts of a joined tensor, and combine the results."""
    if node.op not in _COMBINE:
        return None
    for axis in node.attrs.axes:
        parts = _parts(node.inputs[0], axis)
        if parts is not None:
            alone = node.attrs.axes == (axis,)
            reduced = [
                p if alone and p.shape[axis] == 1 else b.reduce(node.op, p, node.attrs.axes)
                for p in parts
            ]
            result = reduced[0]
            for other in reduced[1:]:
                result = b.elementwise_op(_COMBINE[node.op], result, other)
            return result
    return None


def _parts(node: Node, axis: int) -> tuple[Node, ...] | None:
    """Return what `node` is along the parts of a concat under it; None where there is none."""
    return _found_parts(node, axis) if _has_concat(node) else None


def _has_concat(node: Node) -> bool:
    """Say whether there is a concat under elementwise ops and views."""
    stack, seen = [node], set[Node]()
    while stack:
        current = stack.pop()
        if current.op is structural.CONCAT:
            return True
        if current in seen or not _passes(current):
            continue
        seen.add(current)
        stack += current.inputs
    return False


def _passes(node: Node) -> bool:
    return node.op in structural.VIEWS or node.op.kind is OpKind.ELEMENTWISE


@lru_cache(maxsize=1024)
def _found_parts(node: Node, axis: int) -> tuple[Node, ...] | None:
    if node.op is structural.CONCAT:
        return node.inputs if node.attrs.axis == axis else None
    if node.op in structural.VIEWS:
        return _viewed_parts(node, axis)
    if not _passes(node):
        return None
    found = [_found_parts(i, axis) if len(i.shape) >= -axis else None for i in node.inputs]
    joined = [f for f in found if f is not None]
    sizes = [[p.shape[axis] for p in parts] for parts in joined]
    if not sizes or any(s != sizes[0] for s in sizes):
        return None
    result = []
    start = 0
    for number, size in enumerate(sizes[0]):
        operands = [
            f[number]
            if f is not None
            else i
            if not i.shape or i.shape[axis] == 1
            else b.slice_(i, axis, start, start + size)
            for i, f in zip(node.inputs, found, strict=True)
        ]
        result.append(rebuild(node, tuple(operands)))
        start += size
    return tuple(result)


def _viewed_parts(view: Node, axis: int) -> tuple[Node, ...] | None:
    """Return a view of each part of what it looks at, where it keeps the axis."""
    (x,) = view.inputs
    if view.op is structural.PERMUTE:
        parts = _found_parts(x, view.attrs.perm[axis] - len(view.shape))
        return parts and tuple(b.permute(part, view.attrs.perm) for part in parts)
    if view.op is structural.BROADCAST:
        shaped, places = b.broadcast, [axis]
    elif view.op is structural.RESHAPE:
        inside = prod(view.shape[axis:])
        shaped = b.reshape
        places = [a for a in range(-len(x.shape), 0) if prod(x.shape[a:]) == inside]
    else:
        return None
    same = next((a for a in places if x.shape[a] == view.shape[axis] > 1), None)
    parts = None if same is None else _found_parts(x, same)
    if parts is None or same is None:
        return None
    at = len(view.shape) + axis
    before, after = view.shape[:at], view.shape[at + 1 :]
    return tuple(shaped(part, (*before, part.shape[same], *after)) for part in parts)


def product_of_concat(node: Node) -> Node | None:
    """Multiply the parts of an operand that is joined of what lies in memory, and is read by few rows."""
    if node.op is not contraction.MATMUL:
        return None
    left, right = node.inputs
    rows, columns = node.shape[-2:]
    if rows <= _FEW_ROWS and (parts := _stored_parts(right, -1)):
        return b.concat([b.matmul(left, part) for part in parts], -1)
    for few, joined, axis, other in ((rows, right, -2, left), (columns, left, -1, right)):
        parts = _stored_parts(joined, axis) if few <= _FEW_ROWS else ()
        factors = _cut(other, -3 - axis, [part.shape[axis] for part in parts])
        if parts and factors:
            pairs = zip(factors, parts, strict=True)
            return _sum_of_products(pairs if joined is right else ((y, x) for x, y in pairs))
    return None


def _sum_of_products(pairs: Iterable[tuple[Node, Node]]) -> Node:
    """Add up products; those of float16, of which one alone may be beyond its range, in float32.

    (Those of bfloat16 are, too, within a kernel; as conversions they would keep factors of the operands inside.)
    """
    result: Node | None = None
    for x, y in pairs:
        dtype = x.tensor.dtype
        wide = dtype.wide if dtype is DType.F16 else dtype
        term = b.matmul(b.cast(x, wide), b.cast(y, wide))
        result = term if result is None else b.elementwise_op(elementwise.ADD, result, term)
    assert result is not None, "nothing is joined of no parts"
    return b.cast(result, dtype)


def _stored_parts(node: Node, axis: int) -> tuple[Node, ...]:
    """Return the parts of a joined tensor if most of it lies in memory, and nothing otherwise."""
    parts = _parts(node, axis) or ()
    stored = sum(part.shape[axis] for part in parts if _is_stored(part))
    return parts if 2 * stored > node.shape[axis] else ()


def _is_stored(node: Node) -> bool:
    while node.op is elementwise.CAST or node.op in structural.VIEWS:
        node = node.inputs[0]
    return node.op is leaf.INPUT


def _cut(node: Node, axis: int, sizes: list[int]) -> tuple[Node, ...]:
    """Return parts of the given sizes along an axis: those that are there, or slices of what lies in memory."""
    parts = _parts(node, axis)
    if parts is not None and [part.shape[axis] for part in parts] == sizes:
        return parts
    if not _is_stored(node):
        return ()
    ends = accumulate(sizes)
    return tuple(b.slice_(node, axis, end - n, end) for end, n in zip(ends, sizes, strict=True))


def slice_of_concat(node: Node) -> Node | None:
    """Slice the part that a slice lies in."""
    if node.op is not structural.SLICE:
        return None
    axis, start, stop = node.attrs.axis, node.attrs.start, node.attrs.stop
    for part in _parts(node.inputs[0], axis) or ():
        size = part.shape[axis]
        if start >= 0 and stop <= size:
            return b.slice_(part, axis, start, stop, node.attrs.step)
        start, stop = start - size, stop - size
    return None


def maximum_out_of_shift(node: Node) -> Node | None:
    """Take the maximum of x out of a shift that is the larger of it and something else."""
    if node.op is not elementwise.EXP or node.inputs[0].op is not elementwise.SUB:
        return None
    x, shift = node.inputs[0].inputs
    leaves = _maxima(_unguarded(shift))
    if len(leaves) < 2:
        return None
    for own in leaves:
        if own.op is contraction.REDUCE_MAX and own.inputs[0] is x:
            top = b.finite_or_zero(own)
            # a row of -inf alone has factors exp(-inf) and 1, or less: exp(0 - shift) may be too large
            left = b.where(b.gt(own, -math.inf), own, b.minimum(shift, 0.0))
            return b.mul(b.exp(b.sub(x, top)), b.exp(b.sub(left, shift)))
    return None


def _unguarded(shift: Node) -> Node:
    """Return m of "m, and 0 where it is -inf"."""
    if shift.op is elementwise.WHERE:
        condition, yes, no = shift.inputs
        guards = condition.op is elementwise.GT and condition.inputs[0] is yes
        if guards and no.op is leaf.CONSTANT and no.attrs.value == 0:
            return yes
    return shift


def _maxima(node: Node) -> list[Node]:
    if node.op is not elementwise.MAXIMUM:
        return [node]
    return [leaf_ for operand in node.inputs for leaf_ in _maxima(operand)]
