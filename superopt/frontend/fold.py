"""Compute once what does not depend on the arguments or on parameters: masks, rotary tables.

In: outputs of a lifted program and the tensors that may be read now (constants and buffers that no
run changes). Out: the same outputs, with the computed parts replaced by new inputs. Index patterns
(a causal mask made of comparisons of positions) stay as they are: kernels compute them in registers
and see their structure. So do views of a tensor, which cost nothing. A table that is masked by such a
pattern is computed without the mask, and one that is such a mask becomes a comparison of positions.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

import torch

from superopt.frontend.convert import tensor_type
from superopt.ir import build as b
from superopt.ir.graph import Graph, Level
from superopt.ir.node import Node, rebuild, rewrite, topological
from superopt.ir.ops import elementwise, leaf, structural
from superopt.ir.ops.registry import OpKind
from superopt.verify.draws import is_draw
from superopt.verify.reference import run_reference

_CHEAP = (
    elementwise.ADD,
    elementwise.SUB,
    elementwise.MUL,
    elementwise.NEG,
    elementwise.MAXIMUM,
    elementwise.MINIMUM,
    *elementwise.COMPARISONS,
    elementwise.AND,
    elementwise.OR,
    elementwise.XOR,
    elementwise.NOT,
    elementwise.WHERE,
    elementwise.CAST,
)
_MASKED = (elementwise.MUL, elementwise.ADD, elementwise.WHERE)
_BOUNDS = (elementwise.GT, elementwise.GE, elementwise.LT, elementwise.LE)
# Longer index patterns cost more in registers than reading a table does.
_MAX_PATTERN_NODES = 24


@final
@dataclass(frozen=True, slots=True)
class Folded:
    """Outputs after folding, the new inputs with their values, and the inputs they came from."""

    outputs: tuple[Node, ...]
    values: dict[Node, torch.Tensor]
    sources: tuple[Node, ...]


def fold(
    outputs: tuple[Node, ...], known: Mapping[Node, torch.Tensor], device: torch.device
) -> Folded:
    """Replace what depends on `known` tensors only by its value, a tensor on `device`."""
    constant = _constant_nodes(outputs, known)
    roots = _roots(outputs, constant)
    if not roots:
        return Folded(outputs, {}, ())
    inputs = tuple(n for n in topological(roots) if n.op is leaf.INPUT)
    graph = Graph(Level.KERNEL, "constants", inputs, tuple(roots))
    results = run_reference(graph, [known[i] for i in inputs], device=device)
    replaced: dict[Node, Node] = {}
    values: dict[Node, torch.Tensor] = {}
    for index, (root, value) in enumerate(zip(roots, results, strict=True)):
        dense = value.contiguous().clone()
        band = as_band(dense)
        if band is not None:
            replaced[root] = band
            continue
        node = b.input_(f"folded_{index}", root.shape, tensor_type(dense).dtype)
        replaced[root], values[node] = node, dense
    new = rewrite(outputs, lambda n, operands: replaced.get(n) or rebuild(n, operands))
    return Folded(new, values, inputs)


def _constant_nodes(outputs: tuple[Node, ...], known: Mapping[Node, torch.Tensor]) -> set[Node]:
    constant: set[Node] = set()
    for node in topological(outputs):
        if node.op is leaf.INPUT:
            fixed = node in known
        else:
            fixed = all(i in constant for i in node.inputs) and not is_draw(node)
        if fixed:
            constant.add(node)
    return constant


def _roots(outputs: tuple[Node, ...], constant: set[Node]) -> list[Node]:
    """Return the nodes to compute now: constant, read by the rest, and worth a table."""
    found: dict[Node, None] = {}
    edges = [i for n in topological(outputs) if n not in constant for i in n.inputs]
    stack = [n for n in (*edges, *outputs) if n in constant]
    seen = set[Node]()
    while stack:
        node = _viewed(stack.pop())
        if node in seen or node.op is leaf.INPUT or _is_pattern(node):
            continue
        seen.add(node)
        if _is_masked(node):
            stack += node.inputs
        else:
            found.setdefault(node)
    return list(found)


def _viewed(node: Node) -> Node:
    while node.op in structural.VIEWS:
        node = node.inputs[0]
    return node


def _is_masked(node: Node) -> bool:
    """Say whether bounds of positions decide where a value is 0, or another."""
    if node.op is elementwise.CAST:
        return _is_masked(_viewed(node.inputs[0]))
    return node.op in _MASKED and any(
        _is_pattern(i) and any(n.op in _BOUNDS for n in topological((i,))) for i in node.inputs
    )


def as_band(table: torch.Tensor) -> Node | None:
    """Return a table [..., R, C] of two values as a choice by bounds of column - row, if it is one, bit for bit."""
    rows, columns = (*(1, 1), *table.shape)[-2:]
    if min(rows, columns) < 2 or table.numel() == 0 or table.is_complex() or table.is_meta:
        return None
    first = table[(0,) * (table.ndim - 2)]
    # the values along the left edge, from the bottom, and the upper one: of column - row from 1 - R to C - 1
    along = torch.cat([first[:, 0].flip(0), first[0, 1:]])
    changes = (along[1:] != along[:-1]).nonzero().flatten() + 1
    if changes.numel() not in (1, 2):
        return None
    inside, outside = (along[at].item() for at in (int(changes[0]), 0))
    bounds = [int(at) + 1 - rows for at in changes]
    distance = torch.arange(columns, device=table.device) - torch.arange(
        rows, device=table.device
    ).unsqueeze(1)
    chosen = distance >= bounds[0]
    position = b.sub(b.iota((1, columns), -1), b.iota((rows, 1), -2))
    within = b.ge(position, bounds[0])
    if len(bounds) == 2:
        chosen &= distance < bounds[1]
        within = b.and_(within, b.lt(position, bounds[1]))
    one, other = (
        torch.tensor(v, dtype=table.dtype, device=table.device) for v in (inside, outside)
    )
    expected = torch.where(chosen, one, other).expand(table.shape).contiguous()
    if not torch.equal(expected.view(torch.uint8), table.contiguous().view(torch.uint8)):
        return None
    if table.dtype is torch.bool:
        return b.broadcast(within if inside else b.not_(within), table.shape)
    dtype = tensor_type(table).dtype
    values = (b.constant(v, dtype) for v in (inside, outside))
    return b.broadcast(b.where(within, *values), table.shape)


def _is_pattern(root: Node) -> bool:
    """Say whether a constant is cheaper to compute where it is used than to read."""
    nodes = list(topological((root,)))
    if len(nodes) > _MAX_PATTERN_NODES:
        return False
    return all(
        n.op in _CHEAP
        or n.op in structural.VIEWS
        or (n.op.kind is OpKind.LEAF and n.op is not leaf.INPUT and n.op is not leaf.ITEM)
        for n in nodes
    )
