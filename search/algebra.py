"""Algebraic moves that fusion needs; each is a rule with a name, proven by `superopt.verify`.

- `scale-out-of-contraction`: matmul(a * r, b) => matmul(a, b) * r where r does not vary along the
  contracted dim; the same for division, for the right operand, and for several factors at once.
- `scale-out-of-sum`: reduce_sum(a * r) => reduce_sum(a) * r where r does not vary along the axes.
- `view-below-leaf`: a view of index arithmetic => index arithmetic of that shape, so that rows
  and columns of a mask that come from one arange are two indices.
- `broadcast-into-elementwise`: f(x, broadcast(y)) => f(x, y) where x has the shape of the result.
- `gather-below-elementwise`: gather(f(x), i) => f(gather(x, i)).
- `gather-to-select`: gather(x, i) of one element per row => reduce_sum(where(iota == i, x, 0)),
  which lets a loss read its logits once; only for computed x where kernels read at given places.
- `take-to-gather`: take(x, i) => gather(x, i) with both repeated along each other's dims,
  which costs nothing for an x in memory; only where kernels read at given places.
- those of `superopt.search.reductions`.

Only factors that come out of a reduction of as many elements are moved: those are what would force
a second pass over the loop. (Moving others would square magnitudes for nothing: a norm's divisor out of a
gated product and the projection after it.) Rules are a convenience: every candidate is verified as a whole.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Final, final

from superopt.ir import build as b
from superopt.ir.graph import Graph
from superopt.ir.node import Node, rebuild, rewrite
from superopt.ir.ops import contraction, elementwise, leaf, structural
from superopt.ir.ops.registry import OpKind
from superopt.ir.types import contiguous_strides, reshape_strides
from superopt.search.reductions import (
    maximum_out_of_shift,
    product_of_concat,
    reduce_in_parts,
    reduce_in_stages,
    reduce_of_concat,
    slice_of_concat,
)
from superopt.search.region import is_leaf, view_base, view_type

_SHORT_ROW: Final = 256
"""Elements of an operand's row that every tile has all of."""
_WIDER: Final = 4
"""How many times as many elements a product must have as its operand to be worth more than a copy of that."""


@final
@dataclass(frozen=True, slots=True)
class Rule:
    """A named rewrite of one node; `apply` returns the replacement or None where it does not fit.

    An `exact` one gives the same floating-point numbers; the others round elsewhere.
    """

    name: str
    apply: Callable[[Node], Node | None]
    exact: bool = True


def apply_rules(graph: Graph, rules: tuple[Rule, ...]) -> Graph:
    """Rewrite bottom-up, each rule wherever it fits, until nothing changes."""
    while True:
        outputs = rewrite(graph.outputs, lambda node, inputs: _step(rebuild(node, inputs), rules))
        if outputs == graph.outputs:
            return graph
        graph = graph.with_outputs(outputs)


def apply_accepted(graph: Graph, rules: tuple[Rule, ...], accept: Callable[[Graph], bool]) -> Graph:
    """Rewrite bottom-up one node at a time, without the steps whose result `accept` refuses.

    It is asked after steps that are not exact.
    """
    refused: set[tuple[Node, str]] = set()
    while True:
        step = _next_step(graph, rules, refused)
        if step is None:
            return graph
        node, rule, replaced = step
        changed = _with_node(graph, node, replaced)
        if rule.exact or accept(changed):
            graph = changed
        else:
            refused.add((node, rule.name))


def _with_node(graph: Graph, old: Node, new: Node) -> Graph:
    outputs = rewrite(
        graph.outputs, lambda node, inputs: new if node is old else rebuild(node, inputs)
    )
    return graph.with_outputs(outputs)


def _next_step(
    graph: Graph, rules: tuple[Rule, ...], refused: set[tuple[Node, str]]
) -> tuple[Node, Rule, Node] | None:
    for node in graph.nodes():
        for rule in rules:
            if (node, rule.name) not in refused:
                replaced = rule.apply(node)
                if replaced is not None:
                    return node, rule, replaced
    return None


def _step(node: Node, rules: tuple[Rule, ...]) -> Node:
    for rule in rules:
        replaced = rule.apply(node)
        if replaced is not None:
            return replaced
    return node


@final
@dataclass(slots=True)
class _Product:
    """A product of factors; `below` divide."""

    above: list[Node]
    below: list[Node]


def _after_reduction(node: Node, count: int) -> bool:
    """Say whether the last reductions and contractions before a value include one of `count` elements."""
    stack, seen = [node], set()
    while stack:
        current = stack.pop()
        if current in seen:
            continue
        seen.add(current)
        if current.op is contraction.MATMUL:
            reduced = current.inputs[0].shape[-1]
        elif current.op.kind is OpKind.REDUCTION:
            axes = getattr(current.attrs, "axes", None) or (current.attrs.axis,)
            reduced = prod(current.inputs[0].shape[a] for a in axes)
        else:
            if current.op.kind in (OpKind.ELEMENTWISE, OpKind.STRUCTURAL):
                stack += current.inputs
            continue
        if reduced == count:
            return True
    return False


def _factors(node: Node, *, widened: bool = False) -> _Product:
    """Flatten a product through mul, div, float casts and views that keep the last dims apart.

    `widened`: more than 16 bits are read of it, so that its roundings stay where the program has them.
    """
    if node.op is elementwise.MUL:
        left, right = (_factors(i, widened=widened) for i in node.inputs)
        return _Product(left.above + right.above, left.below + right.below)
    if node.op is elementwise.DIV:
        left, right = (_factors(i, widened=widened) for i in node.inputs)
        return _Product(left.above + right.below, left.below + right.above)
    if node.op is elementwise.CAST and node.inputs[0].tensor.dtype.is_float:
        dtype = node.tensor.dtype
        if widened and node.attrs.rounds:
            return _Product([node], [])
        inner = _factors(node.inputs[0], widened=widened or not dtype.is_half)
        return _Product(
            [b.cast(n, dtype) for n in inner.above], [b.cast(n, dtype) for n in inner.below]
        )
    if node.op in (structural.PERMUTE, structural.RESHAPE):
        inner = _factors(node.inputs[0], widened=widened)
        if len(inner.above) + len(inner.below) > 1:
            above = [_through_view(node, n) for n in inner.above]
            below = [_through_view(node, n) for n in inner.below]
            if None not in above and None not in below:
                return _Product(
                    [n for n in above if n is not None], [n for n in below if n is not None]
                )
    return _Product([node], [])


def _through_view(view: Node, factor: Node) -> Node | None:
    """Apply a view of a product to one factor, which may have dims of size 1, or fewer."""
    before, after = view.inputs[0].shape, view.shape
    if not factor.shape:
        return factor
    if factor.tensor.rank < len(before):
        factor = b.reshape(factor, (1,) * (len(before) - factor.tensor.rank) + factor.shape)
    if view.op is structural.PERMUTE:
        return b.permute(factor, view.attrs.perm)
    # where a view of the factor, repeated along the others' dims, needs no copy, it varies over whole dims
    steps = zip(factor.shape, contiguous_strides(factor.shape), strict=True)
    strides = reshape_strides(before, tuple(0 if n == 1 else s for n, s in steps), after)
    if strides is None:
        return None
    return b.reshape(factor, [n if s else 1 for n, s in zip(after, strides, strict=True)])


def _split(node: Node, axes: tuple[int, ...]) -> tuple[Node, _Product] | None:
    """Split a product into the part that varies along `axes` and factors that do not."""
    product = _factors(node)
    count = prod(node.shape[a] for a in axes)

    def flat(n: Node) -> bool:
        return not n.shape or all(n.shape[a] == 1 for a in axes)

    factors = (*product.above, *product.below)
    moved = {n for n in factors if flat(n) and _after_reduction(n, count)}
    if not moved:
        return None
    # the result is scaled anyway
    moved.update(n for n in factors if flat(n) and n.shape)
    out = _Product(
        [n for n in product.above if n in moved], [n for n in product.below if n in moved]
    )
    rest = [n for n in product.above if n not in moved and not _is_one(n)]
    under = [n for n in product.below if n not in moved]
    if not rest or all(not n.shape for n in rest):
        return None
    kept = rest[0]
    for n in rest[1:]:
        kept = b.mul(kept, n)
    for n in under:
        kept = b.div(kept, n)
    if any(kept.shape[a] != node.shape[a] for a in axes):
        return None
    return kept, out


def _is_one(node: Node) -> bool:
    return node.op is leaf.CONSTANT and node.attrs.value == 1


def _scaled(value: Node, product: _Product) -> Node:
    for n in product.above:
        value = b.mul(value, n)
    for n in product.below:
        value = b.div(value, n)
    return value


def _scales_little(operand: Node, axis: int, result: Node) -> bool:
    """Say whether scaling a product's operand is less work than scaling its result, and takes no pass of its own.

    Tiles have all of a short row, so that what it is scaled by is known when the product begins.
    """
    wide = result.tensor.elements > _WIDER * operand.tensor.elements
    return wide and operand.shape[axis] <= _SHORT_ROW


def _scale_out_of_contraction(node: Node) -> Node | None:
    if node.op is not contraction.MATMUL:
        return None
    left, right = (
        None if _scales_little(operand, axis, node) else _split(operand, (axis,))
        for operand, axis in zip(node.inputs, (-1, -2), strict=True)
    )
    if left is None and right is None:
        return None
    a = node.inputs[0] if left is None else left[0]
    c = node.inputs[1] if right is None else right[0]
    result = b.matmul(a, c)
    if result.tensor.rank != node.tensor.rank:
        return None
    for part in (left, right):
        if part is not None:
            result = _scaled(result, part[1])
    return result if result.shape == node.shape else None


def _scale_out_of_sum(node: Node) -> Node | None:
    if node.op is not contraction.REDUCE_SUM or not node.tensor.dtype.is_float:
        return None
    found = _split(node.inputs[0], node.attrs.axes)
    if found is None:
        return None
    kept, out = found
    result = _scaled(b.reduce_sum(kept, node.attrs.axes), out)
    return result if result.shape == node.shape else None


def _gather_to_select(node: Node) -> Node | None:
    if node.op is not structural.GATHER:
        return None
    x, index = node.inputs
    axis = node.attrs.axis
    if index.shape[axis] != 1 or not x.tensor.dtype.is_float:
        return None
    shape = [1] * x.tensor.rank
    shape[axis] = x.shape[axis]
    chosen = b.eq(b.iota(shape, axis, index.tensor.dtype), index)
    return b.reduce_sum(b.where(chosen, x, b.constant(0.0, x.tensor.dtype)), axis)


def _lies_in_memory(node: Node) -> bool:
    return view_base(node).op is leaf.INPUT and view_type(node) is not None


def _computed_gather_to_select(node: Node) -> Node | None:
    if node.op is not structural.GATHER or view_base(node.inputs[0]).op is leaf.INPUT:
        return None
    return _gather_to_select(node)


def _gather_below_elementwise(node: Node) -> Node | None:
    if node.op is not structural.GATHER:
        return None
    x, index = node.inputs
    axis = node.attrs.axis
    if x.op.kind is not OpKind.ELEMENTWISE or index.shape[axis] != 1:
        return None
    parts = []
    for i in x.inputs:
        if i.shape and i.shape[axis] != 1:
            # the index is as long as the result along the other dims, where the operand may be one
            across = [
                d if n == axis % len(x.shape) else w
                for n, (d, w) in enumerate(zip(i.shape, x.shape, strict=True))
            ]
            i = b.gather(b.broadcast(i, across), index, axis)
        parts.append(i)
    if any(p.shape and p.shape != node.shape for p in parts):
        return None
    return rebuild(x, tuple(parts))


def _take_to_gather(node: Node) -> Node | None:
    if node.op is not structural.TAKE or not _lies_in_memory(node.inputs[0]):
        return None
    x, index = node.inputs
    axis = x.tensor.rank + node.attrs.axis
    before, after = x.shape[:axis], x.shape[axis + 1 :]
    places = index.shape or (1,)
    rows, ones = places[:-1], (1,) * (len(places) - 1)
    x = b.reshape(x, (*before, *ones, x.shape[axis], *after))
    x = b.broadcast(x, (*before, *rows, x.shape[-1 - len(after)], *after))
    index = b.reshape(index, (*(1,) * len(before), *places, *(1,) * len(after)))
    index = b.broadcast(index, (*before, *places, *after))
    return b.reshape(b.gather(x, index, -1 - len(after)), node.shape)


def _broadcast_into_elementwise(node: Node) -> Node | None:
    if node.op.kind is not OpKind.ELEMENTWISE:
        return None
    parts = [i.inputs[0] if i.op is structural.BROADCAST else i for i in node.inputs]
    if parts == list(node.inputs) or not any(p.shape == node.shape for p in parts):
        return None
    return rebuild(node, tuple(parts))


def _view_below_leaf(node: Node) -> Node | None:
    if node.op not in (structural.RESHAPE, structural.PERMUTE) or not is_leaf(node):
        return None
    inner = node.inputs[0]
    kept = _kept_dims(node)
    if kept is None:
        return None
    if inner.op is leaf.IOTA:
        axis = len(inner.shape) + inner.attrs.axis
        if axis not in kept:
            return None
        return b.iota(node.shape, kept.index(axis) - len(kept), inner.attrs.dtype)
    if inner.op.kind is not OpKind.ELEMENTWISE:
        return None
    parts = tuple(
        b.constant(i.attrs.value, i.attrs.dtype)
        if i.op is leaf.CONSTANT
        else _moved(i, kept, node.op is structural.PERMUTE)
        for i in inner.inputs
    )
    return rebuild(inner, parts)


def _moved(x: Node, kept: list[int | None], permuted: bool) -> Node:
    if not x.shape:
        return x
    if permuted:
        return b.permute(x, [k for k in kept if k is not None])
    return b.reshape(x, [1 if k is None else x.shape[k] for k in kept])


def _kept_dims(view: Node) -> list[int | None] | None:
    """Map each dim of a view to the operand's, None for a new dim of size 1; None if it regroups."""
    before, after = view.inputs[0].shape, view.shape
    if view.op is structural.PERMUTE:
        return list(view.attrs.perm)
    wide = [i for i, d in enumerate(before) if d != 1]
    if [before[i] for i in wide] != [d for d in after if d != 1]:
        return None
    queue = iter(wide)
    return [None if d == 1 else next(queue) for d in after]


SCALE_OUT_OF_CONTRACTION: Final = Rule(
    "scale-out-of-contraction", _scale_out_of_contraction, exact=False
)
SCALE_OUT_OF_SUM: Final = Rule("scale-out-of-sum", _scale_out_of_sum, exact=False)
GATHER_TO_SELECT: Final = Rule("gather-to-select", _gather_to_select)
COMPUTED_GATHER_TO_SELECT: Final = Rule("computed-gather-to-select", _computed_gather_to_select)


def _one_above_expm1(node: Node) -> Node | None:
    """exp(y) for expm1(y) + 1, which takes longer and is less exact; also where elu chooses it."""
    if node.op is not elementwise.ADD:
        return None
    for x, one in (node.inputs, node.inputs[::-1]):
        if not _is_one(one):
            continue
        narrows = x.op is elementwise.CAST and x.tensor.dtype.is_half and not x.attrs.rounds
        wide = x.inputs[0] if narrows else x
        if wide.op is elementwise.EXPM1:
            return b.cast(b.exp(wide.inputs[0]), node.tensor.dtype)
        if wide.op is elementwise.WHERE and any(i.op is elementwise.EXPM1 for i in wide.inputs[1:]):
            condition, *values = wide.inputs
            chosen = (b.add(v, 1.0) for v in values)
            found = b.where(condition, *(_one_above_expm1(v) or v for v in chosen))
            return b.cast(found, node.tensor.dtype)
    return None


def _dots_to_sums(node: Node) -> Node | None:
    """sum(x * y) for products of one row and one column each: no register tile has more than one number of them."""
    if node.op is not contraction.MATMUL or node.shape[-2:] != (1, 1):
        return None
    if prod(node.shape) == 1 or not node.tensor.dtype.is_float:
        return None
    wide = node.tensor.dtype.wide
    left, right = (b.cast(i, wide) for i in (node.inputs[0], b.transpose(node.inputs[1])))
    return b.cast(b.reduce_sum(b.mul(left, right), -1), node.tensor.dtype)


GATHER_BELOW_ELEMENTWISE: Final = Rule("gather-below-elementwise", _gather_below_elementwise)
TAKE_TO_GATHER: Final = Rule("take-to-gather", _take_to_gather)
VIEW_BELOW_LEAF: Final = Rule("view-below-leaf", _view_below_leaf)
BROADCAST_INTO_ELEMENTWISE: Final = Rule("broadcast-into-elementwise", _broadcast_into_elementwise)
REDUCE_IN_STAGES: Final = Rule("reduce-in-stages", reduce_in_stages, exact=False)
REDUCE_IN_PARTS: Final = Rule("reduce-in-parts", reduce_in_parts, exact=False)
REDUCE_OF_CONCAT: Final = Rule("reduce-of-concat", reduce_of_concat, exact=False)
PRODUCT_OF_CONCAT: Final = Rule("product-of-concat", product_of_concat, exact=False)
SLICE_OF_CONCAT: Final = Rule("slice-of-concat", slice_of_concat)
MAXIMUM_OUT_OF_SHIFT: Final = Rule("maximum-out-of-shift", maximum_out_of_shift, exact=False)
ONE_ABOVE_EXPM1: Final = Rule("one-above-expm1", _one_above_expm1, exact=False)
DOTS_TO_SUMS: Final = Rule("dots-to-sums", _dots_to_sums, exact=False)
FUSION_RULES: Final = (
    VIEW_BELOW_LEAF,
    BROADCAST_INTO_ELEMENTWISE,
    SLICE_OF_CONCAT,
    REDUCE_OF_CONCAT,
    PRODUCT_OF_CONCAT,
    MAXIMUM_OUT_OF_SHIFT,
    ONE_ABOVE_EXPM1,
    DOTS_TO_SUMS,
    SCALE_OUT_OF_CONTRACTION,
    SCALE_OUT_OF_SUM,
    GATHER_BELOW_ELEMENTWISE,
    GATHER_TO_SELECT,
    REDUCE_IN_STAGES,
)


def with_gathers(rules: tuple[Rule, ...]) -> tuple[Rule, ...]:
    """Return `rules` for a backend whose kernels read memory at places that a tensor gives."""
    instead = {GATHER_TO_SELECT: COMPUTED_GATHER_TO_SELECT}
    return (*(instead.get(rule, rule) for rule in rules), TAKE_TO_GATHER)
