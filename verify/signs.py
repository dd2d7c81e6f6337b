"""Say which values of a program are finite at all positions, whatever its inputs are.

A test of a few steps sees no infinity that a mask makes at others. Here the program is interpreted over sets of signs: a
value is what each of its elements may be (negative, zero, positive, an infinity, NaN), an abstract interpretation
(Cousot and Cousot, 1977). Positions, and masks made of them, are computed as they are. What does not depend on positions
is one element, so that this costs what the masks do.

In: a graph of primitives. Out: its nodes that are finite for all finite inputs. Of what may be zero nothing is a
divisor, and of what the rules do not know all is possible: that only makes the answer smaller.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import product
from math import isnan
from typing import Any, Final, final

import torch

from superopt.ir.graph import Graph
from superopt.ir.interpret import interpret
from superopt.ir.node import Node
from superopt.ir.ops import contraction, elementwise, leaf, structural
from superopt.ir.ops.registry import Op, OpKind
from superopt.verify.needs import constant_power, real_valued
from superopt.verify.reference import TORCH, TorchDomain

# in the order of the numbers that they stand for
_MINUS, _NEGATIVE, _ZERO, _POSITIVE, _PLUS, _NAN = (1 << i for i in range(6))
_FINITE: Final = _NEGATIVE | _ZERO | _POSITIVE
_ANY: Final = _FINITE | _MINUS | _PLUS | _NAN
_SETS: Final = _ANY + 1
_NUMBERS: Final = {
    _MINUS: (float("-inf"),),
    _NEGATIVE: (-2.0, -0.5),
    _ZERO: (0.0,),
    _POSITIVE: (0.5, 2.0),
    _PLUS: (float("inf"),),
    _NAN: (float("nan"),),
}
_MOST: Final = 1 << 26
"""Elements of a mask up to which it is worth to look."""

_Value = Any
"""Sets of signs (reals), what they are (integers and booleans); None: integers that depend on the inputs."""


def finite_everywhere(graph: Graph) -> frozenset[Node]:
    """Return the nodes whose elements are finite for all finite inputs, as the field test has it."""
    signs = _Signs()
    given = [_free(node) for node in graph.inputs]
    try:
        with torch.no_grad(), torch.device("cpu"):
            interpret(graph, given, signs)
    except _TooLarge:
        return frozenset()
    return frozenset(signs.finite)


class _TooLarge(Exception):
    """A mask of too many elements."""


@final
class _Signs:
    """The domain of sets of signs. Values have the shapes of their nodes; what repeats is a view."""

    def __init__(self) -> None:
        self.finite: set[Node] = set()

    def has_rule(self, op: Op) -> bool:
        """Composites go through their definition."""
        return False

    def apply(self, node: Node, args: Sequence[_Value]) -> _Value:
        """Return what the elements of a node may be."""
        if not hasattr(node.type, "shape"):
            return None
        if not real_valued(node):
            known = all(a is not None for a in args) and not any(map(real_valued, node.inputs))
            known = known and node.op.kind is not OpKind.LIBRARY and node.op is not leaf.ITEM
            return TORCH[node.op](node, args, TorchDomain()) if known else None
        value = _RULES.get(node.op, _unknown)(node, args)
        if not bool((_narrow(value) & ~_FINITE).any()):
            self.finite.add(node)
        return value


def _free(node: Node) -> _Value:
    return _all(node, _FINITE) if real_valued(node) else None


def _all(node: Node, signs: int) -> torch.Tensor:
    return torch.tensor(signs, dtype=torch.uint8).expand(node.shape)


def _narrow(value: torch.Tensor) -> torch.Tensor:
    """Return a value once along the dims where it repeats."""
    for dim, stride in enumerate(value.stride()):
        if stride == 0 and value.shape[dim] > 1:
            value = value.narrow(dim, 0, 1)
    if value.numel() > _MOST:
        raise _TooLarge
    return value


def _over_narrow(node: Node, args: Sequence[torch.Tensor], function: Any) -> torch.Tensor:
    result: torch.Tensor = function(*map(_narrow, args))
    return result.expand(node.shape)


def _may(value: torch.Tensor, signs: int) -> torch.Tensor:
    return (value & signs) != 0


def _unknown(node: Node, args: Sequence[_Value]) -> torch.Tensor:
    """Return what a function of which nothing is known gives: the field's are finite for what is."""
    reals = [a for a, i in zip(args, node.inputs, strict=True) if real_valued(i) and a is not None]
    infinite = any(bool(_may(_narrow(a), ~_FINITE & _ANY).any()) for a in reals)
    return _all(node, _ANY if infinite else _FINITE)


# -- leaves and what moves elements --------------------------------------------------------------


def _sign(x: float) -> int:
    if isnan(x):
        return _NAN
    if x in (float("inf"), float("-inf")):
        return _PLUS if x > 0 else _MINUS
    return _ZERO if x == 0 else _POSITIVE if x > 0 else _NEGATIVE


def _of_integers(x: torch.Tensor) -> torch.Tensor:
    return (_ZERO + (x > 0) * (_POSITIVE - _ZERO) + (x < 0) * (_NEGATIVE - _ZERO)).to(torch.uint8)


def _constant(node: Node, args: Sequence[_Value]) -> torch.Tensor:
    return _all(node, _sign(node.attrs.value))


def _iota(node: Node, args: Sequence[_Value]) -> torch.Tensor:
    return _of_integers(TORCH[node.op](node, args, TorchDomain()))


def _cast(node: Node, args: Sequence[_Value]) -> torch.Tensor:
    x: torch.Tensor | None = args[0]
    if x is None:
        return _all(node, _FINITE)
    return x if real_valued(node.inputs[0]) else _over_narrow(node, [x], _of_integers)


def _moved(node: Node, args: Sequence[_Value]) -> torch.Tensor:
    (x,) = args
    if x.numel() and _narrow(x).numel() == 1:
        return _all(node, int(_narrow(x)))
    moved: torch.Tensor = TORCH[node.op](node, [x], TorchDomain())
    return moved


def _concat(node: Node, args: Sequence[_Value]) -> torch.Tensor:
    parts = [a for a in args if a is not None and a.numel()]
    first = [_narrow(a) for a in parts]
    if first and all(f.numel() == 1 and int(f) == int(first[0]) for f in first):
        return _all(node, int(first[0]))
    return torch.cat(parts, node.attrs.axis)


def _pad(node: Node, args: Sequence[_Value]) -> torch.Tensor:
    (x,) = args
    attrs, filler = node.attrs, _sign(node.attrs.value)
    if x.numel() and _narrow(x).numel() == 1 and int(_narrow(x)) == filler:
        return _all(node, filler)
    widths = (0, 0) * (-1 - attrs.axis) + (attrs.before, attrs.after)
    return torch.nn.functional.pad(x, widths, value=filler)


def _taken(node: Node, args: Sequence[_Value]) -> torch.Tensor:
    x, index = args
    if index is None or _narrow(x).numel() == 1:
        return _unknown(node, args)
    index = torch.remainder(index.to(torch.int64), x.shape[node.attrs.axis])
    taken: torch.Tensor = TORCH[node.op](node, [x, index], TorchDomain())
    return taken


# -- elementwise ---------------------------------------------------------------------------------


@lru_cache(maxsize=16)
def _table(function: Callable[..., torch.Tensor], operands: int) -> torch.Tensor:
    """Return a function of sets of signs: of one, or of two in a row of 64 * first + second."""
    sets = torch.arange(_SETS)
    found = torch.zeros((_SETS,) * operands, dtype=torch.uint8)
    for signs in product(_NUMBERS, repeat=operands):
        numbers = torch.tensor(list(product(*(_NUMBERS[s] for s in signs))))
        possible = sum({_sign(float(x)) for x in function(*numbers.T)})
        chosen = torch.ones((), dtype=torch.bool)
        for sign in signs:
            chosen = chosen[..., None] & _may(sets, sign)
        found |= torch.where(chosen, possible, 0).to(torch.uint8)
    return found.reshape(-1)


def _by_table(function: Callable[..., torch.Tensor]) -> "_Rule":
    def rule(node: Node, args: Sequence[_Value]) -> torch.Tensor:
        table = _table(function, len(args))

        def looked_up(*narrow: torch.Tensor) -> torch.Tensor:
            place = narrow[0].to(torch.int64)
            for other in narrow[1:]:
                place = place * _SETS + other.to(torch.int64)
            return table.take(place)

        return _over_narrow(node, [a for a in args if a is not None], looked_up)

    return rule


def _times(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Multiply; what is infinite meets numbers of unknown sign."""
    return torch.where(a.isfinite() & b.isfinite(), a * b, float("nan"))


def _mul(node: Node, args: Sequence[_Value]) -> torch.Tensor:
    square = node.inputs[0] is node.inputs[1]
    return _by_table(_square)(node, args[:1]) if square else _by_table(_times)(node, args)


def _square(x: torch.Tensor) -> torch.Tensor:
    return _times(x, x)


def _div(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    known = a.isfinite() & (b != 0) & ~b.isnan()
    return torch.where(known, a / b, float("nan"))


def _exp(x: torch.Tensor) -> torch.Tensor:
    """Return exp(x), which in the field is finite, and not 0, wherever x is finite."""
    return torch.where(x.isfinite(), torch.ones_like(x), torch.exp(x))


def _root(x: torch.Tensor) -> torch.Tensor:
    return torch.where(x.isfinite(), x.clamp(min=0).sqrt(), float("nan"))


def _pow(node: Node, args: Sequence[_Value]) -> torch.Tensor:
    """Return a power: only of squares, roots and their reciprocals something is known."""
    base, exponent = args[0], node.inputs[1]
    number = float(exponent.attrs.value) if exponent.op is leaf.CONSTANT else None
    power = {2.0: _square, 0.5: _root}.get(abs(number or 0.0))
    if power is not None:
        result = _by_table(power)(node, [base])
    else:
        result = _unknown(node, args)
        if number is not None and number >= 0 and constant_power(node) is not None:
            return result
    below = number is None or number < 0
    return _by_table(_reciprocal)(node, [result]) if below else result


def _reciprocal(x: torch.Tensor) -> torch.Tensor:
    return _div(torch.ones_like(x), x)


def _where(node: Node, args: Sequence[_Value]) -> torch.Tensor:
    condition, x, y = args
    if condition is None:
        return _over_narrow(node, [x, y], torch.bitwise_or)
    return _over_narrow(node, [condition, x, y], torch.where)


# -- reductions ----------------------------------------------------------------------------------


def _reduced(node: Node, x: torch.Tensor, function: Any) -> torch.Tensor:
    """Reduce what repeats once: the functions below do not count."""
    return torch.as_tensor(function(_narrow(x), node.attrs.axes)).expand(node.shape)


def _any_of(x: torch.Tensor, axes: tuple[int, ...]) -> torch.Tensor:
    found = torch.zeros((), dtype=torch.uint8)
    for i in range(6):
        found = found | (torch.any(_may(x, 1 << i), axes, keepdim=True).to(torch.uint8) << i)
    return found


def _reduce_sum(node: Node, args: Sequence[_Value]) -> torch.Tensor:
    (x,) = args

    def total(x: torch.Tensor, axes: tuple[int, ...]) -> torch.Tensor:
        some = _any_of(x, axes)
        zero = torch.full_like(some, _ZERO)
        for sign, other in ((_POSITIVE, _NEGATIVE), (_NEGATIVE, _POSITIVE)):
            surely = torch.any(x == sign, axes, keepdim=True) & ~_may(some, other)
            zero = torch.where(surely, torch.zeros_like(zero), zero)
        finite = (some & (_POSITIVE | _NEGATIVE)) | zero
        return torch.where(_may(some, ~_FINITE & _ANY), torch.full_like(some, _ANY), finite)

    return _reduced(node, x, total) if node.attrs.axes else x


def _reduce_extremum(node: Node, args: Sequence[_Value]) -> torch.Tensor:
    (x,) = args
    largest = node.op is contraction.REDUCE_MAX
    ordered = [1 << i for i in range(5)]

    def extreme(x: torch.Tensor, axes: tuple[int, ...]) -> torch.Tensor:
        some = _any_of(x, axes)
        kept = some & _NAN
        for sign in ordered:
            # possible where some element may be it, and none is surely beyond
            beyond = sum(s for s in ordered if (s > sign if largest else s < sign))
            hidden = torch.any((x != 0) & ((x & ~beyond) == 0), axes, keepdim=True)
            kept = kept | torch.where(hidden, torch.zeros_like(some), some & sign)
        return kept

    return _reduced(node, x, extreme) if node.attrs.axes else x


def _matmul(node: Node, args: Sequence[_Value]) -> torch.Tensor:
    a, b = args
    wrong = torch.zeros((), dtype=torch.bool)
    for x, axis in ((a, -1), (b, -2)):
        wrong = wrong | torch.any(_may(_narrow(x), ~_FINITE & _ANY), axis, keepdim=True)
    return torch.where(wrong, _ANY, _FINITE).to(torch.uint8).expand(node.shape)


_Rule = Callable[[Node, Sequence[_Value]], torch.Tensor]
_RULES: Final[dict[Op, _Rule]] = {
    leaf.CONSTANT: _constant,
    leaf.IOTA: _iota,
    structural.RESHAPE: _moved,
    structural.BROADCAST: _moved,
    structural.PERMUTE: _moved,
    structural.SLICE: _moved,
    structural.FLIP: _moved,
    structural.CONCAT: _concat,
    structural.PAD: _pad,
    structural.TAKE: _taken,
    structural.GATHER: _taken,
    elementwise.CAST: _cast,
    elementwise.WHERE: _where,
    elementwise.NEG: _by_table(torch.neg),
    elementwise.ADD: _by_table(torch.add),
    elementwise.SUB: _by_table(torch.sub),
    elementwise.MUL: _mul,
    elementwise.DIV: _by_table(_div),
    elementwise.MAXIMUM: _by_table(torch.maximum),
    elementwise.MINIMUM: _by_table(torch.minimum),
    elementwise.EXP: _by_table(_exp),
    elementwise.SQRT: _by_table(_root),
    elementwise.POW: _pow,
    contraction.REDUCE_SUM: _reduce_sum,
    contraction.REDUCE_MAX: _reduce_extremum,
    contraction.REDUCE_MIN: _reduce_extremum,
    contraction.MATMUL: _matmul,
}
