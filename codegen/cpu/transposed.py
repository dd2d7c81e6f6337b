"""Tiles that do not lie in memory as loops read them are copied into rows first.

Loops run along the last dim of what they compute. Where an operand is not contiguous along it, because its
tensor is not or because it is permuted on the way, a vector is gathered from as many places as it has lanes:
ten times the cost of a load. A tile with another dim that is contiguous is transposed, square by square, when
it is loaded or multiplied, and a row without that is copied where it is read again for every row of
something larger.

In: a value in memory, and where its tile lies. Out: where it lies as rows. Products read either.
"""

from contextlib import ExitStack
from dataclasses import replace
from typing import Final

from superopt.codegen.cpu.context import Context, View
from superopt.codegen.cpu.inline import Plan
from superopt.codegen.cpu.pairwise import pairwise
from superopt.ir.coordinates import adds_ones
from superopt.ir.node import Node
from superopt.ir.ops import contraction, structural, tile
from superopt.ir.ops.registry import OpKind
from superopt.ir.types import DType

LEAST: Final = 8
"""Elements of a row that pay the copy, and of a column that fill half a square."""


def rows_of(context: Context, plan: Plan, node: Node, view: View) -> View | None:
    """Write the copy of a tile into rows, and return where it is; None where it stays as it lies."""
    shape, dtype = node.shape, node.tensor.dtype
    lanes, largest = _read_along(plan, node)
    if len(lanes) != 1 or dtype is DType.F64 or not dtype.is_float:
        return None
    (lane,) = lanes
    if shape[lane] < LEAST or view.strides[lane] in (0, 1):
        return None
    others = [d for d in range(len(shape)) if d != lane]
    across = [d for d in others if view.strides[d] == 1 and shape[d] >= LEAST]
    if not across and largest <= node.tensor.elements:
        return None
    return rows_along(context, node, view, lane)


def rows_along(context: Context, node: Node, view: View, lane: int) -> View:
    """Write a copy of a tile whose elements along a dim lie side by side, and return where it is."""
    shape = node.shape
    others = [d for d in range(len(shape)) if d != lane]
    across = [d for d in others if view.strides[d] == 1 and shape[d] >= LEAST]
    column = across[0] if across else max(others, key=lambda d: shape[d], default=None)
    order = [*others, lane]
    rows = context.allocate(tuple(shape[d] for d in order), node.tensor.dtype, "rows")
    strides = {d: rows.strides[order.index(d)] for d in order}
    extents = context.extents(node)
    source, target = view.pointer, rows.pointer
    with ExitStack() as nest:
        for dim in others:
            if dim == column or shape[dim] == 1:
                continue
            index = f"r{dim}"
            head = f"for (long {index} = 0; {index} < {extents[dim].text}; ++{index})"
            nest.enter_context(context.block(head))
            source += f" + {index} * {view.strides[dim]}L"
            target += f" + {index} * {strides[dim]}L"
        step, count, apart = 1, "1", 0
        if column is not None:
            step, count, apart = view.strides[column], extents[column].text, strides[column]
        context.write(
            f"pack({source}, {view.strides[lane]}L, {step}L, {extents[lane].text}, {count}, "
            f"{target}, {apart}L);"
        )
    return replace(rows, strides=tuple(strides[d] for d in range(len(shape))))


def _read_along(plan: Plan, node: Node) -> tuple[set[int], int]:
    """Return along which dims loops read a value, and how many elements the largest of them computes.

    There are none where a product, a gather, a reduction over pairs of rows, or a reshape that is another view may read it.
    """
    lanes: set[int] = set()
    largest = 0
    for user in plan.users[node]:
        viewed = user.op is structural.RESHAPE and not adds_ones(user)
        if viewed or user.op in (contraction.MATMUL, structural.GATHER) or pairwise(plan, user):
            return set(), 0
        if user.op is not tile.STORE and user not in plan.memory:
            found, elements = _read_along(plan, user)
        else:
            over_operand = user.op is tile.STORE or user.op.kind is OpKind.REDUCTION
            user = node if over_operand else user
            wide = [d for d, n in enumerate(user.shape) if n > 1]
            found, elements = set(wide[-1:]), user.tensor.elements
        if not found:
            return set(), 0
        lanes |= {d for d in (_moved(node, user, lane) for lane in found) if d is not None}
        largest = max(largest, elements)
    return lanes, largest


def _moved(node: Node, user: Node, dim: int) -> int | None:
    """Return which dim of an operand a dim of its user is; None where it is none, or repeated."""
    if user is node:
        return dim
    if user.op is structural.PERMUTE:
        perm: tuple[int, ...] = user.attrs.perm
        return perm[dim]
    if user.op is structural.RESHAPE:
        wide = [d for d, n in enumerate(user.shape) if n > 1]
        return [d for d, n in enumerate(node.shape) if n > 1][wide.index(dim)]
    at = dim - len(user.shape) + len(node.shape)
    return at if at >= 0 and node.shape[at] > 1 else None
