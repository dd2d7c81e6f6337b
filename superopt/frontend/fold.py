"""Compute once what does not depend on the arguments or on parameters: masks, rotary tables.

In: outputs of a lifted program and the tensors that may be read now (constants and buffers that no
run changes). Out: the same outputs, with the computed parts replaced by new inputs. Index patterns
(a causal mask made of comparisons of positions) stay as they are: kernels compute them in registers
and see their structure. So do views of a tensor, which cost nothing.
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
    for node in (*edges, *outputs):
        if node not in constant:
            continue
        while node.op in structural.VIEWS:
            node = node.inputs[0]
        if node.op is not leaf.INPUT and not _is_pattern(node):
            found.setdefault(node)
    return list(found)


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
