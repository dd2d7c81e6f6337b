"""The finite-field domain: what a program computes modulo random primes, on random inputs.

A real value is a pair of residues (mod p, mod q), p = 2 q + 1, so that exp can map an exponent
mod q to a power of an element of order q mod p (as in Mirage, OSDI 2025; theory: arXiv 2506.04529).
Where exponentials become exponents there is a third residue, mod r, q = 2 r + 1, and exp maps it to a power
mod q in the same way. After exp the residue mod r is a keyed hash of the one mod p. Integers and booleans are themselves:
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
from superopt.ir.ops import leaf
from superopt.ir.ops.registry import Op, OpKind, RuleTable
from superopt.ir.types import DType, TensorType
from superopt.verify.arithmetic import (
    Exponential,
    Modulus,
    Permutation,
    draw_primes,
    here,
    mix,
    to_residues,
)
from superopt.verify.needs import Needs, real_valued
from superopt.verify.ranges import Integers, draw_integers
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
FIELD: RuleTable[FieldRule] = RuleTable("finite-field", "add one in verify/field/")


def keyed(seed: int, *parts: object) -> int:
    """Return 64 bits that depend on the seed and on what `parts` print."""
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
        nested = any("r" in needed for needed in self.needs.values())
        p, q = draw_primes(source, three=nested)
        self.p, self.q = Modulus(p), Modulus(q)
        self.fields = {"p": self.p, "q": self.q}
        self.exponentials = {"p": Exponential(self.p, self.q, source)}
        if nested:
            self.fields["r"] = Modulus(q // 2)
            self.exponentials["q"] = Exponential(self.q, self.fields["r"], source)
        self._permutations = {
            (kind, f): Permutation(m, source)
            for kind in ("max", "min")
            for f, m in self.fields.items()
        }
        self._inputs = np.random.default_rng(self.seed)
        self.torch = TorchDomain(device=here())

    # -- values --------------------------------------------------------------------------------

    def draw(self, type_: TensorType, needed: frozenset[str], integers: Integers) -> Value:
        """Draw an input: uniform residues, integers as they are to be, random booleans."""
        if type_.dtype.is_float:
            fields = [f for f in self.fields if f in needed]
            return FieldValue({f: self.fields[f].draw(type_.shape, self._inputs) for f in fields})
        if type_.dtype is DType.BOOL:
            drawn = self._inputs.integers(0, 2, size=type_.shape, dtype=np.int8)
            return torch.from_numpy(drawn).to(here(), torch.bool)
        drawn64 = draw_integers(self._inputs, type_.shape, integers)
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
            zeros = {f: torch.zeros((), dtype=torch.float64) for f in self.fields}
            return FieldValue(zeros, torch.tensor(code, dtype=torch.int8), value)
        rational = as_rational(value, dtype)
        residues = {}
        for name, modulus in self.fields.items():
            if rational is not None:
                residue = modulus.embed(rational.numerator, rational.denominator)
            else:
                number = float(np.float32(value)) if dtype is not DType.F64 else value
                drawn = random.Random(keyed(self.seed, "constant", number, name))
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
            part = self.hashed(arg, keyed(self.seed, name, position))
            total = part if total is None else mix(total + part, keyed(self.seed, name))
        assert total is not None
        residues = {
            f: to_residues(mix(total, keyed(self.seed, name, f)), self.fields[f]) for f in needed
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
        key = (self.hashed(x, keyed(self.seed, "order")) & ((1 << 52) - 1)).to(torch.float64)
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
            return TORCH[node.op](node, args, self.torch)
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
    return FieldValue({f: without_marked(r, marked) for f, r in residues.items()}, kind, real)


def without_marked(residue: torch.Tensor, marked: torch.Tensor) -> torch.Tensor:
    """Make the residues of marked elements 0: in place, `residue` must be nobody else's."""
    if residue.shape != marked.shape:
        residue = residue.expand(marked.shape)
    if any(s == 0 and d > 1 for s, d in zip(residue.stride(), residue.shape, strict=True)):
        residue = residue.clone()
    return residue.masked_fill_(marked, 0.0)


def marks_of(x: FieldValue) -> torch.Tensor:
    """Return the marks of a value, 0 where it has none."""
    return x.kind if x.kind is not None else torch.zeros((), dtype=torch.int8)


def no_marks(*values: FieldValue) -> bool:
    """Say whether all elements of all values are finite."""
    return all(v.kind is None for v in values)


def each_residue(
    node: Node, domain: FieldDomain, function: Callable[[Modulus, str], torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Return what `function` makes for each residue that is needed of a node."""
    return {f: function(domain.fields[f], f) for f in sorted(domain.needed(node))}
