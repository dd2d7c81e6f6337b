"""Contractions, reductions and scans modulo a prime.

In: nodes and `FieldValue`s. Out: `FieldValue`s. Invariant: an infinity or NaN that is reduced marks the result.
"""

from collections.abc import Sequence

import torch

from superopt.ir.node import Node
from superopt.ir.ops import contraction
from superopt.verify.arithmetic import Modulus
from superopt.verify.field.domain import (
    FIELD,
    MINUS,
    NAN,
    PLUS,
    FieldDomain,
    FieldValue,
    Value,
    each_residue,
    marked_value,
    no_marks,
)
from superopt.verify.field.order import atoms, extreme_marks


@FIELD.register(contraction.MATMUL)
def _matmul(node: Node, args: Sequence[Value], domain: FieldDomain) -> Value:
    a, b = args
    residues = each_residue(node, domain, lambda m, f: m.matmul(a.residues[f], b.residues[f]))
    if no_marks(a, b):
        return FieldValue(residues)
    # an infinity in a contraction meets numbers of unknown sign: the result is not a number
    shape = node.shape
    kind = torch.zeros((), dtype=torch.bool)
    if a.kind is not None:
        kind = kind | torch.any(a.kind != 0, -1, keepdim=True)
    if b.kind is not None:
        kind = kind | torch.any(b.kind != 0, -2, keepdim=True)
    return marked_value(residues, (kind.to(torch.int8) * NAN).expand(shape))


@FIELD.register(contraction.REDUCE_SUM)
def _reduce_sum(node: Node, args: Sequence[Value], domain: FieldDomain) -> Value:
    (x,) = args
    axes = node.attrs.axes
    if not axes:
        return x
    residues = each_residue(node, domain, lambda m, f: m.sum(x.residues[f], axes))
    if x.kind is None:
        return FieldValue(residues)
    plus = torch.any(x.kind == PLUS, axes, keepdim=True)
    minus = torch.any(x.kind == MINUS, axes, keepdim=True)
    nan = torch.any(x.kind == NAN, axes, keepdim=True) | (plus & minus)
    kind = torch.where(plus, PLUS, torch.where(minus, MINUS, 0))
    return marked_value(residues, torch.where(nan, NAN, kind).to(torch.int8))


@FIELD.register(contraction.REDUCE_PROD)
def _reduce_prod(node: Node, args: Sequence[Value], domain: FieldDomain) -> Value:
    (x,) = args

    def product(m: Modulus, f: str) -> torch.Tensor:
        result: torch.Tensor = x.residues[f]
        for axis in node.attrs.axes:
            result = m.product(result, axis)
        return result

    residues = each_residue(node, domain, product)
    if x.kind is None or not node.attrs.axes:
        return FieldValue(residues, x.kind)
    kind = torch.any(x.kind != 0, node.attrs.axes, keepdim=True).to(torch.int8) * NAN
    return marked_value(residues, kind)


@FIELD.register(contraction.REDUCE_MAX, contraction.REDUCE_MIN)
def _reduce_extremum(node: Node, args: Sequence[Value], domain: FieldDomain) -> Value:
    (x,) = args
    axes = node.attrs.axes
    if not axes or all(x.shape[a] == 1 for a in axes):
        return x.only(domain.needed(node))
    largest = node.op is contraction.REDUCE_MAX
    name = "max" if largest else "min"
    residues = each_residue(
        node,
        domain,
        lambda m, f: domain.permutation(name, f).backward(m.sum(atoms(x, f, name, domain), axes)),
    )
    kind = None if x.kind is None else extreme_marks(x.kind, axes, largest)
    return marked_value(residues, kind)


@FIELD.register(contraction.SCAN)
def _scan(node: Node, args: Sequence[Value], domain: FieldDomain) -> Value:
    (x,) = args
    axis, kind = node.attrs.axis, node.attrs.kind
    if kind in ("max", "min"):
        residues = each_residue(
            node,
            domain,
            lambda m, f: domain.permutation(kind, f).backward(
                m.cumulative_sum(atoms(x, f, kind, domain), axis)
            ),
        )
        marks = None if x.kind is None else _scanned_extreme_marks(x.kind, axis, kind == "max")
        return marked_value(residues, marks)
    if kind == "sum":
        residues = each_residue(node, domain, lambda m, f: m.cumulative_sum(x.residues[f], axis))
    else:
        residues = each_residue(
            node, domain, lambda m, f: m.cumulative_product(x.residues[f], axis)
        )
    if x.kind is None:
        return FieldValue(residues)
    return marked_value(residues, _scanned_marks(x.kind, axis, kind))


def _seen(condition: torch.Tensor, axis: int) -> torch.Tensor:
    return torch.cumsum(condition.to(torch.int32), axis) > 0


def _scanned_extreme_marks(marks: torch.Tensor, axis: int, largest: bool) -> torch.Tensor:
    wins, loses = (PLUS, MINUS) if largest else (MINUS, PLUS)
    kind = torch.where(_seen(marks != loses, axis), 0, loses)
    kind = torch.where(_seen(marks == wins, axis), wins, kind)
    return torch.where(_seen(marks == NAN, axis), NAN, kind).to(torch.int8)


def _scanned_marks(marks: torch.Tensor, axis: int, kind: str) -> torch.Tensor:
    plus, minus = _seen(marks == PLUS, axis), _seen(marks == MINUS, axis)
    nan = _seen(marks == NAN, axis) | (plus & minus)
    if kind == "prod":
        nan = nan | plus | minus
    result = torch.where(plus, PLUS, torch.where(minus, MINUS, 0))
    return torch.where(nan, NAN, result).to(torch.int8)
