"""Degrees of programs as rational functions, and the chance that one field test misses a difference.

A value is numerator / denominator; its degree counts inputs, exponentials (as much as their exponent's
degree), unknown functions and drawn constants as variables. Denominators are kept as factors, each
with the dims over which it varies, so that a sum over terms with one common divisor (the rows of a
softmax) does not multiply it. Every rule overestimates.

In: a kernel graph of primitives with the outputs of both programs. Out: per output a `Degree`, and
`error_per_test`. The model and its proof obligations stand in docs/verification.md.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import isfinite, prod
from typing import final

from superopt.ir.graph import Graph
from superopt.ir.node import Node
from superopt.ir.ops import contraction, elementwise, leaf, structural
from superopt.ir.ops.registry import OpKind
from superopt.verify.arithmetic import PRIME_LIMIT
from superopt.verify.field import as_rational
from superopt.verify.needs import (
    EXPONENTIAL,
    UNKNOWN,
    constant_power,
    infinite_constant,
    needed_residues,
    real_valued,
)


@final
@dataclass(frozen=True, slots=True)
class Factor:
    """A divisor: what it is, its degree, and the dims (from the end) over which it varies."""

    key: tuple[int, ...]
    degree: int
    varies: frozenset[int]


@final
@dataclass(frozen=True, slots=True)
class Degree:
    """Degree of the numerator, and the factors of the denominator."""

    numerator: int
    factors: tuple[Factor, ...] = ()

    @property
    def denominator(self) -> int:
        """Degree of the denominator."""
        return sum(f.degree for f in self.factors)


_VARIABLE = Degree(1)
_NUMBER = Degree(0)


def degrees(graph: Graph) -> dict[Node, Degree]:
    """Map every node to its degree."""
    found: dict[Node, Degree] = {}
    for node in graph.nodes():
        if not real_valued(node):
            found[node] = _NUMBER
        else:
            found[node] = _merged(node, _degree(node, [found[i] for i in node.inputs]))
    return found


def _merged(node: Node, x: Degree) -> Degree:
    """Take all divisors as one where the degree is past any bound: each layer may double their number."""
    if len(x.factors) < 2 or max(x.numerator, x.denominator) < PRIME_LIMIT:
        return x
    varies = frozenset[int]().union(*(f.varies for f in x.factors))
    return Degree(x.numerator, (Factor((id(node), -1), x.denominator, varies),))


def error_per_test(graph: Graph, half: int, p: int, q: int) -> float:
    """Bound the chance that a test passes although the programs differ.

    `graph` has the outputs of one program and then, from position `half` on, those of the
    other; p and q are lower bounds of the primes.
    """
    found = degrees(graph)
    needs = needed_residues(graph)
    exponentials = any(n.op in EXPONENTIAL for n in graph.nodes())
    nested = any("r" in needed for needed in needs.values())
    pairs = zip(graph.outputs[:half], graph.outputs[half:], strict=True)
    worst = max((_difference(found[a], found[b]) for a, b in pairs), default=0)
    # two unknown functions of different arguments look alike where the residues collide
    collisions = sum(_hashed_degree(node, found) for node in graph.nodes())
    for node in graph.nodes():
        if node.op in EXPONENTIAL and "r" in needs.get(node, ()):
            collisions += 2 * max(found[node].numerator + found[node].denominator, 1)
    missed = worst / (q if exponentials else p) + collisions / p
    # it may vanish modulo q, or modulo r, which is half as large
    return 3 * missed if nested else missed


def _difference(a: Degree, b: Degree) -> int:
    return max(a.numerator + b.denominator, b.numerator + a.denominator, 1)


def _hashed_degree(node: Node, found: dict[Node, Degree]) -> int:
    hashed = node.op in UNKNOWN or node.op.kind is OpKind.LIBRARY
    if node.op in elementwise.COMPARISONS and not any(infinite_constant(i) for i in node.inputs):
        hashed = True
    if node.op is elementwise.POW and constant_power(node) is None:
        hashed = True
    if not hashed:
        return 0
    return sum(2 * max(found[i].numerator + found[i].denominator, 1) for i in node.inputs)


def _degree(node: Node, args: list[Degree]) -> Degree:
    op = node.op
    if op is leaf.CONSTANT:
        value = node.attrs.value
        known = not isfinite(value) or as_rational(value, node.attrs.dtype) is not None
        return _NUMBER if known else _VARIABLE
    if op is leaf.IOTA:
        return _NUMBER
    if op in EXPONENTIAL:
        return _exponential(node, args[0])
    rule = _RULES.get(op.name)
    if rule is not None:
        return rule(node, args)
    if op.kind is OpKind.STRUCTURAL:
        return _rearranged(node, args)
    return _VARIABLE


def _exponential(node: Node, x: Degree) -> Degree:
    weight = max(1, x.numerator + x.denominator)
    own = Factor((id(node),), weight, _varying(node))
    if node.op is elementwise.SIGMOID or node.op is elementwise.TANH:
        return Degree(weight, (own,))
    if node.op is elementwise.SINH or node.op is elementwise.COSH:
        return Degree(2 * weight, (own,))
    return Degree(weight)


def _varying(node: Node) -> frozenset[int]:
    rank = len(node.shape)
    return frozenset(i - rank for i, d in enumerate(node.shape) if d != 1)


def _common(args: Sequence[Degree]) -> Degree:
    """Degree of a sum: over the least common denominator that the factors show."""
    counts: dict[tuple[tuple[int, ...], frozenset[int]], tuple[int, Factor]] = {}
    for arg in args:
        own: dict[tuple[tuple[int, ...], frozenset[int]], int] = {}
        for factor in arg.factors:
            place = (factor.key, factor.varies)
            own[place] = own.get(place, 0) + 1
            if own[place] > counts.get(place, (0, factor))[0]:
                counts[place] = (own[place], factor)
    factors = tuple(f for n, f in counts.values() for _ in range(n))
    whole = sum(f.degree for f in factors)
    return Degree(max(a.numerator + whole - a.denominator for a in args), factors)


def _sum_rule(node: Node, args: list[Degree]) -> Degree:
    return _common(args)


def _where(node: Node, args: list[Degree]) -> Degree:
    return _common(args[1:])


def _extremum(node: Node, args: list[Degree]) -> Degree:
    # picked by order it is one of them; as an unknown function, a variable
    common = _common(args)
    return replace(common, numerator=max(common.numerator, 1))


def _mul(node: Node, args: list[Degree]) -> Degree:
    a, b = args
    return Degree(a.numerator + b.numerator, a.factors + b.factors)


def _div(node: Node, args: list[Degree]) -> Degree:
    a, b = args
    numerator = a.numerator + b.denominator
    if b.numerator == 0:
        return Degree(numerator, a.factors)
    divisor = node.inputs[1]
    own = Factor((id(divisor),), b.numerator, _varying(divisor))
    return Degree(numerator, (*a.factors, own))


def _pow(node: Node, args: list[Degree]) -> Degree:
    exponent = constant_power(node)
    if exponent is None:
        return Degree(1, (Factor((id(node),), 1, _varying(node)),))
    x, count = args[0], abs(exponent)
    if exponent >= 0:
        return Degree(x.numerator * count, x.factors * count)
    own = Factor((id(node),), x.numerator * count, _varying(node))
    return Degree(x.denominator * count, (own,))


def _summed(x: Degree, sizes: dict[int, int], key: int) -> Degree:
    """Degree of a sum over dims: factors that vary over them are multiplied."""
    numerator, factors = x.numerator, []
    for factor in x.factors:
        count = prod(n for axis, n in sizes.items() if axis in factor.varies)
        if count == 1:
            factors.append(replace(factor, varies=factor.varies - frozenset(sizes)))
            continue
        numerator += (count - 1) * factor.degree
        rest = factor.varies - frozenset(sizes)
        factors.append(Factor((key, *factor.key), factor.degree * count, rest))
    return Degree(numerator, tuple(factors))


def _reduce_sum(node: Node, args: list[Degree]) -> Degree:
    shape = node.inputs[0].shape
    return _summed(args[0], {a: shape[a] for a in node.attrs.axes}, id(node))


def _reduce_prod(node: Node, args: list[Degree]) -> Degree:
    count = prod(node.inputs[0].shape[a] for a in node.attrs.axes)
    own = Factor((id(node),), args[0].denominator * count, _varying(node))
    factors = (own,) if own.degree else ()
    return Degree(args[0].numerator * count, factors)


def _scan(node: Node, args: list[Degree]) -> Degree:
    count = node.shape[node.attrs.axis]
    if node.attrs.kind in ("max", "min"):
        return _VARIABLE
    if node.attrs.kind == "prod":
        own = Factor((id(node),), args[0].denominator * count, _varying(node))
        return Degree(args[0].numerator * count, (own,) if own.degree else ())
    summed = _summed(args[0], {node.attrs.axis: count}, id(node))
    # the prefixes have different denominators
    factors = tuple(replace(f, varies=_varying(node)) for f in summed.factors)
    return Degree(summed.numerator, factors)


def _matmul(node: Node, args: list[Degree]) -> Degree:
    count = node.inputs[0].shape[-1]
    a = _summed(args[0], {-1: count}, id(node))
    b = _summed(args[1], {-2: count}, id(node))
    return Degree(a.numerator + b.numerator, a.factors + b.factors)


def _keep(node: Node, args: list[Degree]) -> Degree:
    return args[0]


def _rearranged(node: Node, args: list[Degree]) -> Degree:
    if node.op is structural.BROADCAST:
        return args[0]
    moved = [_moved(node, k, a) for k, a in enumerate(a for a in args)]
    floats = [m for m, i in zip(moved, node.inputs, strict=True) if real_valued(i)]
    return _common(floats)


def _moved(node: Node, operand: int, x: Degree) -> Degree:
    # a factor that varies is another one after its elements have moved
    factors = tuple(
        Factor((id(node), operand, *f.key), f.degree, _moved_axes(node, operand, f.varies))
        if f.varies
        else f
        for f in x.factors
    )
    return Degree(x.numerator, factors)


def _moved_axes(node: Node, operand: int, varies: frozenset[int]) -> frozenset[int]:
    rank = len(node.shape)
    if node.op is structural.PERMUTE:
        perm = node.attrs.perm
        return frozenset(i - rank for i, p in enumerate(perm) if p - rank in varies)
    if node.op is structural.RESHAPE:
        return _reshaped_axes(node.inputs[operand].shape, node.shape, varies)
    if node.op in (structural.TAKE, structural.GATHER):
        return _varying(node)
    return varies


def _reshaped_axes(
    before: tuple[int, ...], after: tuple[int, ...], varies: frozenset[int]
) -> frozenset[int]:
    """Dims of the result that hold elements of varying dims, group by group of equal product."""
    result: set[int] = set()
    i = j = 0
    while i < len(before) or j < len(after):
        first, start = i, j
        left = right = 1
        while True:
            if left <= right and i < len(before):
                left, i = left * before[i], i + 1
            elif j < len(after):
                right, j = right * after[j], j + 1
            else:
                left, i = left * before[i], i + 1
            if left == right and (i > first or i == len(before)) and (j > start or j == len(after)):
                break
        if any(k - len(before) in varies for k in range(first, i)):
            result |= {k - len(after) for k in range(start, j) if after[k] != 1}
    return frozenset(result)


_RULES: dict[str, Callable[[Node, list[Degree]], Degree]] = {
    op.name: rule
    for op, rule in (
        (elementwise.NEG, _keep),
        (elementwise.ADD, _sum_rule),
        (elementwise.SUB, _sum_rule),
        (elementwise.MUL, _mul),
        (elementwise.DIV, _div),
        (elementwise.POW, _pow),
        (elementwise.WHERE, _where),
        (elementwise.MAXIMUM, _extremum),
        (elementwise.MINIMUM, _extremum),
        (elementwise.CAST, _keep),
        (contraction.MATMUL, _matmul),
        (contraction.REDUCE_SUM, _reduce_sum),
        (contraction.REDUCE_PROD, _reduce_prod),
        (contraction.SCAN, _scan),
    )
}
