"""Arithmetic on residues, and the functions that are algebraic in exp or unknown.

In: nodes and `FieldValue`s. Out: `FieldValue`s, with infinities and NaN marked as floating point has them.
"""

from collections.abc import Sequence
from math import isnan

import numpy as np
import torch

from superopt.ir.node import Node
from superopt.ir.ops import elementwise
from superopt.ir.types import DType
from superopt.verify.arithmetic import to_residues
from superopt.verify.field.domain import (
    FIELD,
    NAN,
    FieldDomain,
    FieldValue,
    Value,
    each_residue,
    keyed,
    marked_value,
    marks_of,
    no_marks,
    without_marked,
)
from superopt.verify.needs import EXPONENTIAL, UNKNOWN, constant_power


@FIELD.register(elementwise.NEG)
def _neg(node: Node, args: Sequence[Value], domain: FieldDomain) -> Value:
    (x,) = args
    kind = None if x.kind is None else torch.where(x.kind == NAN, x.kind, -x.kind)
    real = None if x.real is None else -x.real
    return FieldValue({f: -r for f, r in x.residues.items()}, kind, real)


def _added_marks(x: FieldValue, y: FieldValue, *, negative: bool = False) -> torch.Tensor:
    """Return the marks of x + y, or of x - y."""
    if y.kind is None:
        return marks_of(x)
    a, b = marks_of(x), y.kind
    if negative:
        b = torch.where(b == NAN, b, -b)
    if x.kind is None:
        return b
    both = torch.where(a == b, a, torch.full_like(a, NAN))
    return torch.where(a == 0, b, torch.where(b == 0, a, both))


@FIELD.register(elementwise.ADD)
def _add(node: Node, args: Sequence[Value], domain: FieldDomain) -> Value:
    x, y = args
    residues = each_residue(node, domain, lambda m, f: m.add(x.residues[f], y.residues[f]))
    return marked_value(residues, None if no_marks(x, y) else _added_marks(x, y))


@FIELD.register(elementwise.SUB)
def _sub(node: Node, args: Sequence[Value], domain: FieldDomain) -> Value:
    x, y = args
    residues = each_residue(node, domain, lambda m, f: m.sub(x.residues[f], y.residues[f]))
    kind = None if no_marks(x, y) else _added_marks(x, y, negative=True)
    return marked_value(residues, kind)


def _sign(x: FieldValue) -> int:
    if x.real is None or isnan(x.real) or x.real == 0:
        return 0
    return 1 if x.real > 0 else -1


def _scaled_marks(infinite: FieldValue, factor: FieldValue) -> torch.Tensor:
    # an infinity times a finite number is known where the number's sign is: for constants
    kind = marks_of(infinite)
    sign = _sign(factor)
    known = torch.where(kind.abs() == 1, kind * sign if sign else torch.full_like(kind, NAN), kind)
    other = marks_of(factor)
    both = torch.where(
        (kind.abs() == 1) & (other.abs() == 1), kind * other, torch.full_like(kind, NAN)
    )
    return torch.where(other == 0, known, both)


@FIELD.register(elementwise.MUL)
def _mul(node: Node, args: Sequence[Value], domain: FieldDomain) -> Value:
    x, y = args
    residues = each_residue(node, domain, lambda m, f: m.mul(x.residues[f], y.residues[f]))
    if no_marks(x, y):
        return FieldValue(residues)
    kind = torch.where(marks_of(x) != 0, _scaled_marks(x, y), _scaled_marks(y, x))
    kind = torch.where((marks_of(x) == 0) & (marks_of(y) == 0), torch.zeros_like(kind), kind)
    return marked_value(residues, kind)


@FIELD.register(elementwise.DIV)
def _div(node: Node, args: Sequence[Value], domain: FieldDomain) -> Value:
    x, y = args
    return _divide(x, y, domain.needed(node), domain)


def _divide(
    x: FieldValue, y: FieldValue, needed: frozenset[str], domain: FieldDomain
) -> FieldValue:
    inverse, zeros = domain.invert(y.only(needed))
    residues = {f: domain.fields[f].mul(x.residues[f], inverse.residues[f]) for f in sorted(needed)}
    if no_marks(x, y) and zeros is None:
        return FieldValue(residues)
    kx, ky = marks_of(x), marks_of(y)
    nan = torch.full((), NAN, dtype=torch.int8)
    scaled = _scaled_marks(x, FieldValue(y.residues, None, y.real))
    kind = torch.where(kx == 0, torch.zeros_like(scaled), scaled)
    kind = torch.where((ky.abs() == 1) & (kx != 0), nan, kind)
    kind = torch.where(ky == NAN, nan, kind)
    if zeros is not None:
        kind = torch.where(zeros, nan, kind)
    shape = np.broadcast_shapes(x.shape, y.shape)
    vanishes = (ky.abs() == 1).expand(shape)
    residues = {f: torch.where(vanishes, 0.0, r) for f, r in residues.items()}
    return marked_value(residues, kind.expand(shape))


@FIELD.register(elementwise.POW)
def _pow(node: Node, args: Sequence[Value], domain: FieldDomain) -> Value:
    x, y = args
    exponent = constant_power(node)
    needed = domain.needed(node)
    if exponent is None:
        if isinstance(y, FieldValue) and y.real == 0.5:
            return domain.unknown("sqrt", [x], needed)
        if isinstance(y, FieldValue) and y.real == -0.5:
            root = domain.unknown("sqrt", [x], needed)
            one = domain.embed(1.0, DType.F64).only(needed)
            return _divide(one, root, needed, domain)
        return domain.unknown("pow", [x, y], needed)
    residues = each_residue(node, domain, lambda m, f: m.power(x.residues[f], abs(exponent)))
    kind = None if x.kind is None else torch.where(x.kind != 0, NAN, 0).to(torch.int8)
    result = marked_value(residues, kind)
    if exponent >= 0:
        return result
    one = domain.embed(1.0, DType.F64).only(needed)
    return _divide(one, result, needed, domain)


# -- exponentials --------------------------------------------------------------------------------


_EXPONENTS = {"p": "q", "q": "r"}
"""Of which residue of the exponent each residue of an exponential is a power."""


def exponential(x: FieldValue, needed: frozenset[str], domain: FieldDomain) -> FieldValue:
    """Return exp(x): powers of roots of unity."""
    powers = {f: domain.exponentials[f](x.residues[_EXPONENTS[f]]) for f in sorted(needed)}
    if x.kind is None:
        return FieldValue(powers)
    # exp(-inf) is 0, which is what a marked residue is too
    marked = x.kind != 0
    powers = {f: without_marked(power, marked) for f, power in powers.items()}
    if bool((x.kind > 0).any()):
        return FieldValue(powers, x.kind.clamp(min=0))
    return FieldValue(powers)


def _number(value: float, needed: frozenset[str], domain: FieldDomain) -> FieldValue:
    return domain.embed(value, DType.F64).only(needed)


def _plus(
    a: FieldValue, b: FieldValue, needed: frozenset[str], domain: FieldDomain, sign: int = 1
) -> FieldValue:
    residues = {
        f: domain.fields[f].reduce_(torch.add(a.residues[f], b.residues[f], alpha=sign))
        for f in sorted(needed)
    }
    kind = None if no_marks(a, b) else _added_marks(a, b, negative=sign < 0)
    return marked_value(residues, kind)


def _negative(x: FieldValue) -> FieldValue:
    kind = None if x.kind is None else torch.where(x.kind == NAN, x.kind, -x.kind)
    return FieldValue({f: -r for f, r in x.residues.items()}, kind)


def _twice(x: FieldValue, domain: FieldDomain) -> FieldValue:
    doubled = {f: domain.fields[f].reduce_(r * 2.0) for f, r in x.residues.items()}
    return FieldValue(doubled, x.kind)


@FIELD.register(*EXPONENTIAL)
def _exponential(node: Node, args: Sequence[Value], domain: FieldDomain) -> Value:
    needed = domain.needed(node)
    powers = needed & _EXPONENTS.keys() | ({"p"} if "r" in needed else frozenset())
    result = _exponential_of(node, args[0], powers, domain)
    if "r" not in needed:
        return result
    # an exponent of exponents of exponents is a number about which nothing is known but that it is the
    # same wherever its residue mod p is: a keyed hash of that, linear from here on like any exponent
    hashed = domain.hashed(result, keyed(domain.seed, "exponent"))
    residues = {**result.residues, "r": to_residues(hashed, domain.fields["r"])}
    return marked_value(residues, result.kind).only(needed)


def _exponential_of(
    node: Node, x: FieldValue, needed: frozenset[str], domain: FieldDomain
) -> FieldValue:
    one = _number(1.0, needed, domain)
    if node.op is elementwise.EXP:
        return exponential(x, needed, domain)
    if node.op is elementwise.EXPM1:
        return _plus(exponential(x, needed, domain), one, needed, domain, -1)
    if node.op is elementwise.SIGMOID:
        below = _plus(one, exponential(_negative(x), needed, domain), needed, domain)
        return _divide(one, below, needed, domain)
    if node.op is elementwise.TANH:
        # tanh(x) = 1 - 2 / (exp(2 x) + 1), which is right at the infinities too
        below = _plus(exponential(_twice(x, domain), needed, domain), one, needed, domain)
        ratio = _divide(_number(2.0, needed, domain), below, needed, domain)
        return _plus(one, ratio, needed, domain, -1)
    sign = 1 if node.op is elementwise.COSH else -1
    e = exponential(x, needed, domain)
    total = _plus(e, exponential(_negative(x), needed, domain), needed, domain, sign)
    half = _number(0.5, needed, domain)
    residues = {
        f: domain.fields[f].mul(total.residues[f], half.residues[f]) for f in sorted(needed)
    }
    return marked_value(residues, total.kind)


@FIELD.register(*UNKNOWN)
def _unknown(node: Node, args: Sequence[Value], domain: FieldDomain) -> Value:
    needed = domain.needed(node)
    if node.op is elementwise.LOG1P:
        (x,) = args
        only_p = frozenset({"p"})
        return domain.unknown(
            "log", [_plus(x.only(only_p), _number(1.0, only_p, domain), only_p, domain)], needed
        )
    if node.op is elementwise.TAN:
        sine = domain.unknown("sin", args, needed)
        return _divide(sine, domain.unknown("cos", args, needed), needed, domain)
    return domain.unknown(node.op.name, args, needed)


@FIELD.register(elementwise.ISNAN, elementwise.ISINF)
def _predicate(node: Node, args: Sequence[Value], domain: FieldDomain) -> Value:
    (x,) = args
    # whether an input is NaN is not known of a residue: an unknown predicate, true now and then
    bit = domain.hashed(x, keyed(domain.seed, node.op.name)) & 15
    if x.kind is None:
        return bit == 0
    marked = x.kind == NAN if node.op is elementwise.ISNAN else x.kind.abs() == 1
    return torch.where(x.kind == 0, bit == 0, marked)
