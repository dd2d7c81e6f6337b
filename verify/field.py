"""The finite-field domain: what a program computes modulo random primes, on random inputs.

A real value is a pair of residues (mod p, mod q), p = 2 q + 1, so that exp can map an exponent
mod q to a power of an element of order q mod p (as in Mirage, OSDI 2025; theory: arXiv 2506.04529).
After exp the residue mod q is a keyed hash of the one mod p. Integers and booleans are themselves:
masks and indices are computed, not modelled. Infinities and NaN are marked beside the residues, so
that masked softmax means what it means in floating point.

Functions without a meaning in a field are unknown functions: a keyed hash of their arguments, the
same for both programs. max and min are conjugate to addition under a secret permutation of the
field: max(a, b) = h^-1(h(a) + h(b)). That is commutative and associative, has -inf as its identity
and obeys no other law (not even idempotence), so what is proven of it holds for max. What a softmax
subtracts need not be a maximum at all for the division to cancel it: with any element in its place the
two programs agree, and no special case for the shift is needed. See docs/verification.md.

In: nodes of primitives and the residues needed of each (`superopt.verify.needs`). Out: `FieldValue`s.
"""

import hashlib
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from math import isinf, isnan
from typing import Any, final

import numpy as np
import torch

from superopt.ir.node import Node
from superopt.ir.ops import contraction, elementwise, leaf, library, structural
from superopt.ir.ops.registry import Op, OpKind, RuleTable, all_ops
from superopt.ir.types import DType, TensorType, TupleType
from superopt.verify.arithmetic import (
    Exponential,
    Modulus,
    Permutation,
    draw_primes,
    here,
    mix,
    to_residues,
)
from superopt.verify.needs import EXPONENTIAL, UNKNOWN, Needs, constant_power, real_valued
from superopt.verify.ranges import draw_integers
from superopt.verify.reference import TORCH, TorchDomain

PLUS, MINUS, NAN = 1, -1, 2
"""Marks of values that are not finite; 0 marks a residue."""

LARGEST_DENOMINATOR = 10_000
SHORT_NUMERATOR_BITS = 12
"""A binary fraction with so short a numerator was meant as it stands (2^-20, 3 * 2^-30)."""


class ZeroDivision(Exception):
    """A random draw made a divisor zero: the test is drawn again."""


@final
@dataclass(slots=True)
class FieldValue:
    """Residues of a tensor of reals; what is not needed is None.

    `kind` marks infinities and NaN (their residues are 0); None where all are finite. `real` is the
    number of a constant, which tells its sign.
    """

    residues: dict[str, torch.Tensor]
    kind: torch.Tensor | None = None
    real: float | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the tensor."""
        return tuple(next(iter(self.residues.values())).shape)

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> "FieldValue":
        """Apply a rearrangement of elements to every part."""
        kind = None if self.kind is None else function(self.kind)
        return FieldValue({f: function(r) for f, r in self.residues.items()}, kind, self.real)

    def only(self, fields: frozenset[str]) -> "FieldValue":
        """Return the value with no other residues than these."""
        if fields.issuperset(self.residues):
            return self
        kept = {f: r for f, r in self.residues.items() if f in fields}
        return FieldValue(kept, self.kind, self.real)


Value = Any
"""A FieldValue (reals), a tensor (integers, booleans), or a tuple of those."""

FieldRule = Callable[[Node, Sequence[Value], "FieldDomain"], Value]
FIELD: RuleTable[FieldRule] = RuleTable("finite-field", "add one in verify/field.py")


def _key(seed: int, *parts: object) -> int:
    text = repr((seed, *parts)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


@final
@dataclass
class FieldDomain:
    """One test: its primes, its secret functions, and how max is modelled.

    `needs` says per node which residues to compute. With `by_order`, max and min pick by a random
    total order of the residues mod p instead (idempotent, but it tests one order per draw).
    """

    seed: int
    needs: Needs
    by_order: bool = False
    zero_is_nan: bool = False
    fields: dict[str, Modulus] = field(init=False)

    def __post_init__(self) -> None:
        source = random.Random(self.seed)
        p, q = draw_primes(source)
        self.p, self.q = Modulus(p), Modulus(q)
        self.fields = {"p": self.p, "q": self.q}
        self.exponential = Exponential(self.p, self.q, source)
        self._permutations = {
            (kind, f): Permutation(m, source)
            for kind in ("max", "min")
            for f, m in self.fields.items()
        }
        self._inputs = np.random.default_rng(self.seed)
        self._torch = TorchDomain(device=here())

    # -- values --------------------------------------------------------------------------------

    def draw(self, type_: TensorType, needed: frozenset[str], limit: int) -> Value:
        """Draw an input: uniform residues, integers in 0 <= i < limit, random booleans."""
        if type_.dtype.is_float:
            fields = [f for f in ("p", "q") if f in needed]
            return FieldValue({f: self.fields[f].draw(type_.shape, self._inputs) for f in fields})
        if type_.dtype is DType.BOOL:
            drawn = self._inputs.integers(0, 2, size=type_.shape, dtype=np.int8)
            return torch.from_numpy(drawn).to(here(), torch.bool)
        drawn64 = draw_integers(self._inputs, type_.shape, limit)
        wanted = {
            DType.I32: torch.int32,
            DType.I16: torch.int16,
            DType.I8: torch.int8,
            DType.U8: torch.uint8,
        }
        return torch.from_numpy(drawn64).to(here(), wanted.get(type_.dtype, torch.int64))

    def embed(self, value: float, dtype: DType) -> FieldValue:
        """Return a constant: a rational's quotient, else an element drawn for this number."""
        if isnan(value) or isinf(value):
            code = NAN if isnan(value) else PLUS if value > 0 else MINUS
            zero = torch.zeros((), dtype=torch.float64)
            kind = torch.tensor(code, dtype=torch.int8)
            return FieldValue({"p": zero, "q": zero.clone()}, kind, value)
        rational = as_rational(value, dtype)
        residues = {}
        for name, modulus in self.fields.items():
            if rational is not None:
                residue = modulus.embed(rational.numerator, rational.denominator)
            else:
                number = float(np.float32(value)) if dtype is not DType.F64 else value
                drawn = random.Random(_key(self.seed, "constant", number, name))
                residue = modulus.embed(drawn.randrange(modulus.prime))
            residues[name] = torch.tensor(residue, dtype=torch.float64)
        return FieldValue(residues, None, value)

    def hashed(self, value: Value, key: int) -> torch.Tensor:
        """Hash a value (its residue mod p) to 64 bits."""
        if isinstance(value, torch.Tensor):
            return mix(value.to(torch.int64), key)
        return mix(self.p.canonical(value.residues["p"]).to(torch.int64), key)

    def unknown(self, name: str, args: Sequence[Value], needed: frozenset[str]) -> FieldValue:
        """Apply the unknown function `name` element by element."""
        total: torch.Tensor | None = None
        for position, arg in enumerate(args):
            part = self.hashed(arg, _key(self.seed, name, position))
            total = part if total is None else mix(total + part, _key(self.seed, name))
        assert total is not None
        residues = {
            f: to_residues(mix(total, _key(self.seed, name, f)), self.fields[f]) for f in needed
        }
        kinds = [a.kind for a in args if isinstance(a, FieldValue) and a.kind is not None]
        kind: torch.Tensor | None = None
        for k in kinds:
            marked = torch.where(k != 0, NAN, 0).to(torch.int8)
            kind = marked if kind is None else torch.maximum(kind, marked)
        return marked_value(residues, None if kind is None else kind.expand(total.shape))

    def invert(self, x: FieldValue) -> tuple[FieldValue, torch.Tensor | None]:
        """Return 1 / x on its finite elements, and where x is zero.

        Raises:
            ZeroDivision: an element is zero, and zeros are to be drawn again.
        """
        residues = {}
        zeros: torch.Tensor | None = None
        for name, residue in x.residues.items():
            zero = residue == 0
            if bool(zero.any()):
                finite = zero if x.kind is None else zero & (x.kind == 0)
                if bool(finite.any()) and not self.zero_is_nan:
                    raise ZeroDivision
                zeros = finite if zeros is None else zeros | finite
                residue = torch.where(zero, 1.0, residue)
            residues[name] = self.fields[name].invert(residue)
        return FieldValue(residues, x.kind, x.real), zeros

    def order_key(self, x: FieldValue) -> torch.Tensor:
        """Return numbers whose order is a random total order of the residues mod p."""
        key = (self.hashed(x, _key(self.seed, "order")) & ((1 << 52) - 1)).to(torch.float64)
        if x.kind is None:
            return key
        key = torch.where(x.kind == PLUS, float("inf"), key)
        return torch.where(x.kind == MINUS, float("-inf"), key)

    # -- the domain ----------------------------------------------------------------------------

    def has_rule(self, op: Op) -> bool:
        """Composites go through their definition."""
        return False

    def apply(self, node: Node, args: Sequence[Value]) -> Value:
        """Return the value of one node."""
        if node.op.kind is OpKind.LIBRARY or node.op is leaf.ITEM:
            return FIELD[node.op](node, args, self)
        concrete = all(isinstance(a, torch.Tensor) for a in args)
        if concrete and not real_valued(node) and node.op in FIELD:
            return TORCH[node.op](node, args, self._torch)
        return FIELD[node.op](node, args, self)

    def needed(self, node: Node) -> frozenset[str]:
        """Return the residues to compute of a node."""
        return self.needs[node]

    def permutation(self, kind: str, name: str) -> Permutation:
        """Return the secret permutation under which max or min is addition."""
        return self._permutations[kind, name]


def as_rational(value: float, dtype: DType) -> Fraction | None:
    """Return the simple rational that a constant of this element type stands for, if any.

    Integers and dyadic fractions are themselves; others are the fraction of denominator at most
    10^4 that rounds to the constant (in float32 for narrower types, so that a number and its
    rounded copy agree).
    """
    exact = Fraction(value)
    if exact.denominator <= LARGEST_DENOMINATOR:
        return exact
    simple = exact.limit_denominator(LARGEST_DENOMINATOR)
    if dtype is DType.F64:
        matches = float(simple) == value
    else:
        matches = bool(np.float32(float(simple)) == np.float32(value))
    if matches:
        return simple
    return exact if exact.numerator.bit_length() <= SHORT_NUMERATOR_BITS else None


def marked_value(
    residues: dict[str, torch.Tensor], kind: torch.Tensor | None, real: float | None = None
) -> FieldValue:
    """Return a value whose marked elements have residue 0; drops marks that mark nothing.

    `residues` are written to.
    """
    if kind is None:
        return FieldValue(residues, None, real)
    shape = np.broadcast_shapes(kind.shape, *(r.shape for r in residues.values()))
    kind = kind.expand(shape)
    if not bool(kind.any()):
        return FieldValue(residues, None, real)
    marked = kind != 0
    return FieldValue({f: _without(r, marked) for f, r in residues.items()}, kind, real)


def _without(residue: torch.Tensor, marked: torch.Tensor) -> torch.Tensor:
    """Make the residues of marked elements 0: in place, `residue` must be nobody else's."""
    if residue.shape != marked.shape:
        residue = residue.expand(marked.shape)
    if any(s == 0 and d > 1 for s, d in zip(residue.stride(), residue.shape, strict=True)):
        residue = residue.clone()
    return residue.masked_fill_(marked, 0.0)


def _marks(x: FieldValue) -> torch.Tensor:
    return x.kind if x.kind is not None else torch.zeros((), dtype=torch.int8)


def _no_marks(*values: FieldValue) -> bool:
    return all(v.kind is None for v in values)


# -- leaves --------------------------------------------------------------------------------------


@FIELD.register(leaf.CONSTANT)
def _constant(node: Node, args: Sequence[Value], domain: FieldDomain) -> Value:
    if not real_valued(node):
        return TORCH[node.op](node, args, TorchDomain())
    return domain.embed(node.attrs.value, node.attrs.dtype).only(domain.needed(node))


@FIELD.register(leaf.IOTA)
def _iota(node: Node, args: Sequence[Value], domain: FieldDomain) -> Value:
    index = TORCH[node.op](node, args, TorchDomain())
    if not real_valued(node):
        return index
    return FieldValue({f: index.to(torch.float64) for f in domain.needed(node)})


@FIELD.register(leaf.ITEM)
def _item(node: Node, args: Sequence[Value], domain: FieldDomain) -> Value:
    return args[0][node.attrs.index]


FIELD.refuse("inputs are given by the test", leaf.INPUT)
for _op in list(all_ops()):
    if _op.kind is OpKind.TILE:
        FIELD.refuse("block graphs go through their meaning in primitives (ir.semantics)", _op)
    elif _op.kind is OpKind.GRAPH:
        FIELD.refuse("nested graphs are walked by the interpreter", _op)
    elif _op.kind is OpKind.COMPOSITE:
        FIELD.refuse("composites go through their definition", _op)


# -- arithmetic ----------------------------------------------------------------------------------


def _each(
    node: Node, domain: FieldDomain, function: Callable[[Modulus, str], torch.Tensor]
) -> dict[str, torch.Tensor]:
    return {f: function(domain.fields[f], f) for f in sorted(domain.needed(node))}


@FIELD.register(elementwise.NEG)
def _neg(node: Node, args: Sequence[Value], domain: FieldDomain) -> Value:
    (x,) = args
    kind = None if x.kind is None else torch.where(x.kind == NAN, x.kind, -x.kind)
    real = None if x.real is None else -x.real
    return FieldValue({f: -r for f, r in x.residues.items()}, kind, real)


def _added_marks(x: FieldValue, y: FieldValue, *, negative: bool = False) -> torch.Tensor:
    """Return the marks of x + y, or of x - y."""
    if y.kind is None:
        return _marks(x)
    a, b = _marks(x), y.kind
    if negative:
        b = torch.where(b == NAN, b, -b)
    if x.kind is None:
        return b
    both = torch.where(a == b, a, torch.full_like(a, NAN))
    return torch.where(a == 0, b, torch.where(b == 0, a, both))


@FIELD.register(elementwise.ADD)
def _add(node: Node, args: Sequence[Value], domain: FieldDomain) -> Value:
    x, y = args
    residues = _each(node, domain, lambda m, f: m.add(x.residues[f], y.residues[f]))
    return marked_value(residues, None if _no_marks(x, y) else _added_marks(x, y))


@FIELD.register(elementwise.SUB)
def _sub(node: Node, args: Sequence[Value], domain: FieldDomain) -> Value:
    x, y = args
    residues = _each(node, domain, lambda m, f: m.sub(x.residues[f], y.residues[f]))
    kind = None if _no_marks(x, y) else _added_marks(x, y, negative=True)
    return marked_value(residues, kind)


def _sign(x: FieldValue) -> int:
    if x.real is None or isnan(x.real) or x.real == 0:
        return 0
    return 1 if x.real > 0 else -1


def _scaled_marks(infinite: FieldValue, factor: FieldValue) -> torch.Tensor:
    # an infinity times a finite number is known where the number's sign is: for constants
    kind = _marks(infinite)
    sign = _sign(factor)
    known = torch.where(kind.abs() == 1, kind * sign if sign else torch.full_like(kind, NAN), kind)
    other = _marks(factor)
    both = torch.where(
        (kind.abs() == 1) & (other.abs() == 1), kind * other, torch.full_like(kind, NAN)
    )
    return torch.where(other == 0, known, both)


@FIELD.register(elementwise.MUL)
def _mul(node: Node, args: Sequence[Value], domain: FieldDomain) -> Value:
    x, y = args
    residues = _each(node, domain, lambda m, f: m.mul(x.residues[f], y.residues[f]))
    if _no_marks(x, y):
        return FieldValue(residues)
    kind = torch.where(_marks(x) != 0, _scaled_marks(x, y), _scaled_marks(y, x))
    kind = torch.where((_marks(x) == 0) & (_marks(y) == 0), torch.zeros_like(kind), kind)
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
    if _no_marks(x, y) and zeros is None:
        return FieldValue(residues)
    kx, ky = _marks(x), _marks(y)
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
    residues = _each(node, domain, lambda m, f: m.power(x.residues[f], abs(exponent)))
    kind = None if x.kind is None else torch.where(x.kind != 0, NAN, 0).to(torch.int8)
    result = marked_value(residues, kind)
    if exponent >= 0:
        return result
    one = domain.embed(1.0, DType.F64).only(needed)
    return _divide(one, result, needed, domain)


# -- exponentials --------------------------------------------------------------------------------


def exponential(x: FieldValue, needed: frozenset[str], domain: FieldDomain) -> FieldValue:
    """Return exp(x): a power of a root of unity."""
    power = domain.exponential(x.residues["q"])
    if x.kind is None:
        return FieldValue({"p": power})
    # exp(-inf) is 0, which is what a marked residue is too
    marked = x.kind != 0
    power = _without(power, marked)
    if bool((x.kind > 0).any()):
        return FieldValue({"p": power}, x.kind.clamp(min=0))
    return FieldValue({"p": power})


def _number(value: float, needed: frozenset[str], domain: FieldDomain) -> FieldValue:
    return domain.embed(value, DType.F64).only(needed)


def _plus(
    a: FieldValue, b: FieldValue, needed: frozenset[str], domain: FieldDomain, sign: int = 1
) -> FieldValue:
    residues = {
        f: domain.fields[f].reduce_(torch.add(a.residues[f], b.residues[f], alpha=sign))
        for f in sorted(needed)
    }
    kind = None if _no_marks(a, b) else _added_marks(a, b, negative=sign < 0)
    return marked_value(residues, kind)


def _negative(x: FieldValue) -> FieldValue:
    kind = None if x.kind is None else torch.where(x.kind == NAN, x.kind, -x.kind)
    return FieldValue({f: -r for f, r in x.residues.items()}, kind)


def _twice(x: FieldValue, domain: FieldDomain) -> FieldValue:
    doubled = {f: domain.fields[f].reduce_(r * 2.0) for f, r in x.residues.items()}
    return FieldValue(doubled, x.kind)


@FIELD.register(*EXPONENTIAL)
def _exponential(node: Node, args: Sequence[Value], domain: FieldDomain) -> Value:
    result = _exponential_mod_p(node, args[0], domain)
    if "q" not in domain.needed(node):
        return result
    # as an exponent the result is a number about which nothing is known but that it is the same
    # wherever its residue mod p is: a keyed hash of that, linear from here on like any exponent
    hashed = domain.hashed(result, _key(domain.seed, "exponent"))
    residues = {**result.residues, "q": to_residues(hashed, domain.fields["q"])}
    return marked_value(residues, result.kind).only(domain.needed(node))


def _exponential_mod_p(node: Node, x: FieldValue, domain: FieldDomain) -> FieldValue:
    needed = frozenset({"p"})
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
    bit = domain.hashed(x, _key(domain.seed, node.op.name)) & 15
    if x.kind is None:
        return bit == 0
    marked = x.kind == NAN if node.op is elementwise.ISNAN else x.kind.abs() == 1
    return torch.where(x.kind == 0, bit == 0, marked)


# -- order ---------------------------------------------------------------------------------------


@FIELD.register(
    elementwise.EQ, elementwise.NE, elementwise.LT, elementwise.LE, elementwise.GT, elementwise.GE
)
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
    nan = (_marks(x) == NAN) | (_marks(y) == NAN)
    if bool(nan.any()):
        result = torch.where(nan, node.op is elementwise.NE, result)
    return result


def _comparison_keys(
    x: FieldValue, y: FieldValue, domain: FieldDomain
) -> tuple[torch.Tensor, torch.Tensor]:
    if (x.real is not None and isinf(x.real)) or (y.real is not None and isinf(y.real)):
        # only infinities can equal one: finite values lie between them
        parts = [_marks(v).to(torch.float64).expand(v.shape) for v in (x, y)]
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
        kind = None if _no_marks(x, y) else torch.where(first, _marks(x), _marks(y))
        if kind is not None:
            nan = (_marks(x) == NAN) | (_marks(y) == NAN)
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


def _atoms(x: FieldValue, name: str, kind: str, domain: FieldDomain) -> torch.Tensor:
    atoms = domain.permutation(kind, name).forward(x.residues[name])
    return atoms if x.kind is None else _without(atoms, x.kind != 0)


def _extreme_of(
    parts: list[FieldValue], largest: bool, needed: frozenset[str], domain: FieldDomain
) -> FieldValue:
    name = "max" if largest else "min"
    residues = {}
    for f in sorted(needed):
        total = _atoms(parts[0], f, name, domain)
        for part in parts[1:]:
            total = domain.fields[f].add(total, _atoms(part, f, name, domain))
        residues[f] = domain.permutation(name, f).backward(total)
    if _no_marks(*parts):
        return FieldValue(residues)
    marks = torch.stack([_marks(p).expand(p.shape) for p in parts])
    return marked_value(residues, _extreme_marks(marks, (0,), largest)[0])


def _extreme_marks(marks: torch.Tensor, axes: tuple[int, ...], largest: bool) -> torch.Tensor:
    """Return the marks of an extremum: NaN first, then the infinity that wins, then any finite element."""
    # the marks are in the order of the values that they stand for, and NaN above all
    highest = torch.amax(marks, axes, keepdim=True)
    if largest:
        return highest
    return torch.where(highest == NAN, highest, torch.amin(marks, axes, keepdim=True))


@FIELD.register(contraction.REDUCE_MAX, contraction.REDUCE_MIN)
def _reduce_extremum(node: Node, args: Sequence[Value], domain: FieldDomain) -> Value:
    (x,) = args
    axes = node.attrs.axes
    if not axes or all(x.shape[a] == 1 for a in axes):
        return x.only(domain.needed(node))
    largest = node.op is contraction.REDUCE_MAX
    name = "max" if largest else "min"
    residues = _each(
        node,
        domain,
        lambda m, f: domain.permutation(name, f).backward(m.sum(_atoms(x, f, name, domain), axes)),
    )
    kind = None if x.kind is None else _extreme_marks(x.kind, axes, largest)
    return marked_value(residues, kind)


@FIELD.register(contraction.ARGMAX, contraction.ARGMIN)
def _arg(node: Node, args: Sequence[Value], domain: FieldDomain) -> Value:
    function: Any = torch.argmax if node.op is contraction.ARGMAX else torch.argmin
    return function(domain.order_key(args[0]), node.attrs.axis, keepdim=True)


@FIELD.register(contraction.SCAN)
def _scan(node: Node, args: Sequence[Value], domain: FieldDomain) -> Value:
    (x,) = args
    axis, kind = node.attrs.axis, node.attrs.kind
    if kind in ("max", "min"):
        residues = _each(
            node,
            domain,
            lambda m, f: domain.permutation(kind, f).backward(
                m.cumulative_sum(_atoms(x, f, kind, domain), axis)
            ),
        )
        marks = None if x.kind is None else _scanned_extreme_marks(x.kind, axis, kind == "max")
        return marked_value(residues, marks)
    if kind == "sum":
        residues = _each(node, domain, lambda m, f: m.cumulative_sum(x.residues[f], axis))
    else:
        residues = _each(node, domain, lambda m, f: m.cumulative_product(x.residues[f], axis))
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


# -- contractions and sums -----------------------------------------------------------------------


@FIELD.register(contraction.MATMUL)
def _matmul(node: Node, args: Sequence[Value], domain: FieldDomain) -> Value:
    a, b = args
    residues = _each(node, domain, lambda m, f: m.matmul(a.residues[f], b.residues[f]))
    if _no_marks(a, b):
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
    residues = _each(node, domain, lambda m, f: m.sum(x.residues[f], axes))
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

    residues = _each(node, domain, product)
    if x.kind is None or not node.attrs.axes:
        return FieldValue(residues, x.kind)
    kind = torch.any(x.kind != 0, node.attrs.axes, keepdim=True).to(torch.int8) * NAN
    return marked_value(residues, kind)


# -- selection, casts, structure -----------------------------------------------------------------


@FIELD.register(elementwise.WHERE)
def _where(node: Node, args: Sequence[Value], domain: FieldDomain) -> Value:
    condition, x, y = args
    residues = _each(
        node, domain, lambda m, f: torch.where(condition, x.residues[f], y.residues[f])
    )
    if _no_marks(x, y):
        return FieldValue(residues)
    # marked residues of both are 0 already
    kind = torch.where(condition, _marks(x), _marks(y))
    return (
        FieldValue(residues, kind.expand(node.shape)) if bool(kind.any()) else FieldValue(residues)
    )


@FIELD.register(elementwise.CAST)
def _cast(node: Node, args: Sequence[Value], domain: FieldDomain) -> Value:
    (x,) = args
    if real_valued(node):
        if isinstance(x, FieldValue):
            return x.only(domain.needed(node))
        whole = x.to(torch.int64)
        return FieldValue(
            _each(
                node,
                domain,
                lambda m, f: m.reduce_(torch.remainder(whole, m.prime).to(torch.float64)),
            )
        )
    assert isinstance(x, FieldValue), node
    if node.attrs.dtype is DType.BOOL:
        return (x.residues["p"] != 0) if x.kind is None else (x.residues["p"] != 0) | (x.kind != 0)
    hashed = domain.hashed(x, _key(domain.seed, "cast")) & 0x7F
    return TORCH[node.op](node, [hashed], TorchDomain())


@FIELD.register(
    structural.RESHAPE,
    structural.BROADCAST,
    structural.PERMUTE,
    structural.SLICE,
    structural.FLIP,
)
def _moved(node: Node, args: Sequence[Value], domain: FieldDomain) -> Value:
    rule = TORCH[node.op]
    return args[0].only(domain.needed(node)).map(lambda t: rule(node, [t], domain._torch))


@FIELD.register(structural.CONCAT)
def _concat(node: Node, args: Sequence[Value], domain: FieldDomain) -> Value:
    axis = node.attrs.axis
    residues = _each(node, domain, lambda m, f: torch.cat([a.residues[f] for a in args], axis))
    if _no_marks(*args):
        return FieldValue(residues)
    return FieldValue(residues, torch.cat([_marks(a).expand(a.shape) for a in args], axis))


@FIELD.register(structural.PAD)
def _pad(node: Node, args: Sequence[Value], domain: FieldDomain) -> Value:
    (x,) = args
    attrs = node.attrs
    filler = domain.embed(attrs.value, node.tensor.dtype)
    widths = (0, 0) * (-1 - attrs.axis) + (attrs.before, attrs.after)
    pad = torch.nn.functional.pad
    residues = _each(
        node, domain, lambda m, f: pad(x.residues[f], widths, value=float(filler.residues[f]))
    )
    if _no_marks(x, filler):
        return FieldValue(residues)
    marks = _marks(x).expand(x.shape)
    return FieldValue(residues, pad(marks, widths, value=int(_marks(filler))))


@FIELD.register(structural.TAKE, structural.GATHER)
def _taken(node: Node, args: Sequence[Value], domain: FieldDomain) -> Value:
    x, index = args
    # indices that the program computes from hashed values may fall outside: wrap them
    index = torch.remainder(index.to(torch.int64), x.shape[node.attrs.axis])
    rule = TORCH[node.op]
    return x.only(domain.needed(node)).map(lambda t: rule(node, [t, index], domain._torch))


@FIELD.register(
    elementwise.NOT,
    elementwise.AND,
    elementwise.OR,
    elementwise.XOR,
    elementwise.SHL,
    elementwise.SHR,
)
def _integers(node: Node, args: Sequence[Value], domain: FieldDomain) -> Value:
    return TORCH[node.op](node, args, domain._torch)


# -- whole-tensor unknown functions ---------------------------------------------------------------


@FIELD.register(library.CONV, library.POOL, library.OPAQUE)
def _opaque(node: Node, args: Sequence[Value], domain: FieldDomain) -> Value:
    """Apply an unknown function of whole tensors: results drawn from a digest of all operands."""
    name = node.attrs.target + node.attrs.arguments if node.op is library.OPAQUE else node.attrs
    digest = _key(domain.seed, node.op.name, name, *(_digest(a, domain) for a in args))
    if isinstance(node.type, TupleType):
        return tuple(
            _drawn(t, _key(digest, i), frozenset({"p", "q"}), domain)
            for i, t in enumerate(node.type.items)
        )
    return _drawn(node.tensor, digest, domain.needed(node), domain)


def _digest(value: Value, domain: FieldDomain) -> int:
    hashed = domain.hashed(value, 1).reshape(-1)
    total = mix(hashed + torch.arange(hashed.numel()) * 0x9E3779B1, 2).sum().item()
    if isinstance(value, FieldValue) and value.kind is not None:
        total = _key(int(total), value.kind.cpu().numpy().tobytes())
    return int(total)


def _drawn(type_: TensorType, key: int, needed: frozenset[str], domain: FieldDomain) -> Value:
    source = np.random.default_rng(key)
    if type_.dtype.is_float:
        return FieldValue({f: domain.fields[f].draw(type_.shape, source) for f in sorted(needed)})
    if type_.dtype is DType.BOOL:
        drawn = torch.from_numpy(source.integers(0, 2, size=type_.shape, dtype=np.int8) != 0)
    else:
        drawn = torch.from_numpy(source.integers(0, 128, size=type_.shape, dtype=np.int64))
    return drawn.to(here())
