"""Comparisons, and max and min as sums of secretly permuted residues.

In: nodes and `FieldValue`s. Out: `FieldValue`s, or booleans and indices by the test's random order.
"""

from collections.abc import Sequence
from math import isinf
from typing import Any

import numpy as np
import torch

from superopt.ir.node import Node
from superopt.ir.ops import contraction, elementwise
from superopt.verify.field.domain import (
    FIELD,
    NAN,
    FieldDomain,
    FieldValue,
    Value,
    marked_value,
    marks_of,
    no_marks,
    without_marked,
)


@FIELD.register(*elementwise.COMPARISONS)
def _compare(node: Node, args: Sequence[Value], domain: FieldDomain) -> Value:
    x, y = args
    a, b = _comparison_keys(x, y, domain)
    result: torch.Tensor = {
        elementwise.EQ: torch.eq,
        elementwise.NE: torch.ne,
        elementwise.LT: torch.lt,
        elementwise.LE: torch.le,
        elementwise.GT: torch.gt,
        elementwise.GE: torch.ge,
    }[node.op](a, b)
    nan = (marks_of(x) == NAN) | (marks_of(y) == NAN)
    if bool(nan.any()):
        result = torch.where(nan, node.op is elementwise.NE, result)
    return result


def _comparison_keys(
    x: FieldValue, y: FieldValue, domain: FieldDomain
) -> tuple[torch.Tensor, torch.Tensor]:
    if (x.real is not None and isinf(x.real)) or (y.real is not None and isinf(y.real)):
        # only infinities can equal one: finite values lie between them
        parts = [marks_of(v).to(torch.float64).expand(v.shape) for v in (x, y)]
        return parts[0], parts[1]
    return domain.order_key(x), domain.order_key(y)


@FIELD.register(elementwise.MAXIMUM, elementwise.MINIMUM)
def _extremum(node: Node, args: Sequence[Value], domain: FieldDomain) -> Value:
    x, y = args
    largest = node.op is elementwise.MAXIMUM
    needed = domain.needed(node)
    shape = np.broadcast_shapes(x.shape, y.shape)
    if domain.by_order:
        first = domain.order_key(x) >= domain.order_key(y)
        first = first if largest else ~first
        residues = {f: torch.where(first, x.residues[f], y.residues[f]) for f in sorted(needed)}
        kind = None if no_marks(x, y) else torch.where(first, marks_of(x), marks_of(y))
        if kind is not None:
            nan = (marks_of(x) == NAN) | (marks_of(y) == NAN)
            kind = torch.where(nan, torch.full_like(kind, NAN), kind)
        return marked_value(residues, kind)
    stacked = [
        FieldValue(
            {f: r.expand(shape) for f, r in v.residues.items()},
            None if v.kind is None else v.kind.expand(shape),
        )
        for v in (x, y)
    ]
    return _extreme_of(stacked, largest, needed, domain)


def atoms(x: FieldValue, name: str, kind: str, domain: FieldDomain) -> torch.Tensor:
    """Return the permuted residues whose sum stands for the `kind` ("max" or "min") of a value."""
    atoms = domain.permutation(kind, name).forward(x.residues[name])
    return atoms if x.kind is None else without_marked(atoms, x.kind != 0)


def _extreme_of(
    parts: list[FieldValue], largest: bool, needed: frozenset[str], domain: FieldDomain
) -> FieldValue:
    name = "max" if largest else "min"
    residues = {}
    for f in sorted(needed):
        total = atoms(parts[0], f, name, domain)
        for part in parts[1:]:
            total = domain.fields[f].add(total, atoms(part, f, name, domain))
        residues[f] = domain.permutation(name, f).backward(total)
    if no_marks(*parts):
        return FieldValue(residues)
    marks = torch.stack([marks_of(p).expand(p.shape) for p in parts])
    return marked_value(residues, extreme_marks(marks, (0,), largest)[0])


def extreme_marks(marks: torch.Tensor, axes: tuple[int, ...], largest: bool) -> torch.Tensor:
    """Return the marks of an extremum: NaN first, then the infinity that wins, then any finite element."""
    # the marks are in the order of the values that they stand for, and NaN above all
    highest = torch.amax(marks, axes, keepdim=True)
    if largest:
        return highest
    return torch.where(highest == NAN, highest, torch.amin(marks, axes, keepdim=True))


@FIELD.register(contraction.ARGMAX, contraction.ARGMIN)
def _arg(node: Node, args: Sequence[Value], domain: FieldDomain) -> Value:
    function: Any = torch.argmax if node.op is contraction.ARGMAX else torch.argmin
    return function(domain.order_key(args[0]), node.attrs.axis, keepdim=True)
