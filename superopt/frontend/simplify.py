"""Remove what decompositions leave behind: identities that hold exactly, NaN and infinity included.

In: a node over simplified operands. Out: an equal node of the same type, simpler or the same. Masks
come out as plain comparisons of positions (`where` on `lt`), the form in which composites state
them too, so that search sees one form of a causal mask and not one per way of writing it.
"""

import operator
from collections.abc import Callable
from typing import Any

import torch

from superopt.ir import build as b
from superopt.ir.node import Node, make, rebuild
from superopt.ir.ops import elementwise as e
from superopt.ir.ops import leaf, structural
from superopt.ir.ops.registry import Op, OpKind
from superopt.ir.types import DType

_COMPARE: dict[Op, Callable[[Any, Any], bool]] = {
    e.EQ: operator.eq,
    e.NE: operator.ne,
    e.LT: operator.lt,
    e.LE: operator.le,
    e.GT: operator.gt,
    e.GE: operator.ge,
}
_ARITHMETIC: dict[Op, Callable[[float, float], float]] = {
    e.ADD: operator.add,
    e.SUB: operator.sub,
    e.MUL: operator.mul,
    e.DIV: operator.truediv,
}
_INVERSE = {e.EQ: e.NE, e.NE: e.EQ, e.LT: e.GE, e.GE: e.LT, e.GT: e.LE, e.LE: e.GT}


def simplified(node: Node, inputs: tuple[Node, ...]) -> Node:
    """Return `node` over `inputs` in its simplest equal form."""
    rebuilt = rebuild(node, inputs)
    found = _number(rebuilt) or _simpler(_with_scalars(rebuilt))
    return found if found is not None and found.type == node.type else rebuilt


def _uniform(node: Node) -> Node | None:
    """Return the scalar constant that a tensor is filled with."""
    while node.op in (structural.RESHAPE, structural.BROADCAST):
        node = node.inputs[0]
    return node if node.op is leaf.CONSTANT else None


def _number(node: Node) -> Node | None:
    """Compute with filled tensors as with numbers; rounding the result of twice the digits is exact."""
    rule = _ARITHMETIC.get(node.op)
    if rule is None or node.tensor.dtype is not DType.F32:
        return None
    left, right = (_uniform(i) for i in node.inputs)
    if left is None or right is None:
        return None
    numbers = _single(left.attrs.value), _single(right.attrs.value)
    if node.op is e.DIV and not numbers[1]:
        return None
    return b.full(node.shape, _single(rule(*numbers)), DType.F32)


def _single(value: float) -> float:
    return float(torch.tensor(value, dtype=torch.float32))


def _with_scalars(node: Node) -> Node:
    """Let scalars stand for filled operands where the result stays the same."""
    if node.op.kind is not OpKind.ELEMENTWISE:
        return node
    inputs = list(node.inputs)
    for position, operand in enumerate(inputs):
        scalar = _uniform(operand)
        if scalar is None or scalar is operand:
            continue
        trial = (*inputs[:position], scalar, *inputs[position + 1 :])
        if make(node.op, trial, node.attrs).type == node.type:
            inputs[position] = scalar
    return rebuild(node, tuple(inputs))


def _simpler(node: Node) -> Node:
    op = node.op
    if op in (structural.RESHAPE, structural.PERMUTE):
        return _view(node)
    if op in (e.AND, e.OR):
        return _logical(node)
    if op is e.NOT:
        return _not(node)
    if op is e.WHERE:
        return _where(node)
    if op is e.CAST:
        return _cast(node)
    if op in _COMPARE:
        return _comparison(node)
    if op in (e.MUL, e.DIV):
        left, right = node.inputs
        if _is_number(right, 1):
            return left
        return right if op is e.MUL and _is_number(left, 1) else node
    return node


def _cast(node: Node) -> Node:
    """Cast from the type before a cast that loses nothing; a choice between numbers to the choice itself."""
    (x,) = node.inputs
    if x.op is e.CAST and x.tensor.dtype is DType.F32 and x.inputs[0].tensor.dtype.is_half:
        (x,) = x.inputs
        node = b.cast(x, node.tensor.dtype, rounds=node.attrs.rounds)
    return (_chosen(x, bool) or node) if node.tensor.dtype is DType.BOOL else node


def _view(node: Node) -> Node:
    """Replace views that together leave the elements in their order by one reshape, or none."""
    order = _long(node.shape)
    base, current = node, node
    while current.op in (structural.RESHAPE, structural.PERMUTE):
        source = current.inputs[0]
        if current.op is structural.PERMUTE:
            order = [current.attrs.perm[dim] for dim in order]
        else:
            before, after = _long(source.shape), _long(current.shape)
            if [source.shape[i] for i in before] != [current.shape[i] for i in after]:
                break
            moved = dict(zip(after, before, strict=True))
            order = [moved[dim] for dim in order]
        current = source
        if order == sorted(order):
            base = current
    if base is node:
        return _reshape(node) if node.op is structural.RESHAPE else node
    found = b.reshape(base, node.shape)
    return _reshape(found) if found.op is structural.RESHAPE else found


def _long(shape: tuple[int, ...]) -> list[int]:
    """Return the dims of more than one element."""
    return [i for i, d in enumerate(shape) if d != 1]


def _reshape(node: Node) -> Node:
    x = node.inputs[0]
    if x.op is structural.RESHAPE:
        return b.reshape(x.inputs[0], node.shape)
    if x.op is leaf.IOTA:
        long = [i for i, d in enumerate(node.shape) if d != 1]
        count = x.shape[x.attrs.axis]
        if len(long) == 1 and node.shape[long[0]] == count == x.tensor.elements:
            return b.iota(node.shape, long[0] - len(node.shape), x.tensor.dtype)
    return node


def _is_number(node: Node, value: float) -> bool:
    return node.op is leaf.CONSTANT and bool(node.attrs.value == value)


def _logical(node: Node) -> Node:
    neutral = node.op is e.AND
    if node.tensor.dtype is not DType.BOOL:
        return node
    left, right = node.inputs
    for one, rest in ((left, right), (right, left)):
        if one.op is leaf.CONSTANT and one.attrs.value is neutral:
            return rest
    return left if left is right else node


def _not(node: Node) -> Node:
    x = node.inputs[0]
    if x.op is e.NOT:
        return x.inputs[0]
    # a comparison with NaN is false either way, so only integers have an inverse
    if x.op in _INVERSE and not x.inputs[0].tensor.dtype.is_float:
        return make(_INVERSE[x.op], x.inputs)
    return node


def _where(node: Node) -> Node:
    condition, yes, no = node.inputs
    if yes is no:
        return yes
    if condition.op is e.NOT:
        return make(e.WHERE, (condition.inputs[0], no, yes))
    return node


def _comparison(node: Node) -> Node:
    left, right = node.inputs
    holds = _COMPARE[node.op]
    if right.op is leaf.CONSTANT:
        return _chosen(left, lambda v: holds(v, right.attrs.value)) or node
    if left.op is leaf.CONSTANT:
        return _chosen(right, lambda v: holds(left.attrs.value, v)) or node
    return node


def _chosen(node: Node, test: Callable[[Any], bool]) -> Node | None:
    """Return what a test of `where(c, constant, constant)` says about c."""
    if node.op is not e.WHERE:
        return None
    condition, yes, no = node.inputs
    if yes.op is not leaf.CONSTANT or no.op is not leaf.CONSTANT:
        return None
    match bool(test(yes.attrs.value)), bool(test(no.attrs.value)):
        case True, False:
            return condition
        case False, True:
            return _not(make(e.NOT, (condition,)))
    return None
