"""Vectorized exact arithmetic modulo a prime below 2^26, in float64.

Residues are balanced, |r| <= modulus / 2 (plus a little slack that `canonical` removes), so that a
product of two is below 2^51 and every step is exact. Reduction is one multiplication by the
inverse, one rounding (by adding and subtracting 1.5 * 2^52) and one subtraction, done in pieces that stay in the second-level cache.
Matrix products run in the float64 BLAS: the smaller operand is split into two limbs of 13 bits,
which keeps every partial sum below 2^53 for 2^15 terms at a time, whatever the order of summation.

In and out: float64 tensors of residues. Nothing here is approximate.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import final

import numpy as np
import torch

from superopt.verify.memory import empty

PRIME_LIMIT = 1 << 26
_SHARE = 1 << 15
"""Elements that torch gives to one thread, at least; three such arrays stay in a second-level cache."""
_LIMB = 1 << 13
_BLOCK = 1 << 22
_GPU_BLOCK = 1 << 26
_TERMS = 1 << 15
# adding this rounds to an integer; torch.round would start all threads for 2^11 elements
_ROUNDS = torch.tensor(1.5 * 2.0**52, dtype=torch.float64)


def here() -> torch.device:
    """Return the device that tests run on: PyTorch's default one."""
    return torch.get_default_device()


def _whole() -> bool:
    """Say whether tensors are computed as a whole, as a GPU wants it, and not in pieces that fit a cache."""
    return here().type != "cpu"


def _piece() -> int:
    """Return how many elements are computed at a time: as many as occupy all threads, each in its cache.

    A thread gets the same part in every step. Threads of our own would each wait for the interpreter.
    """
    return _SHARE * torch.get_num_threads()


def _empty(shape: Sequence[int], dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return empty(shape, dtype, here())


def in_pieces(count: int, work: Callable[[slice, torch.Tensor], None]) -> None:
    """Call `work` on slices that cover `count` elements and fit in cache, and a scratch of that size."""
    size = count if _whole() else min(_piece(), count)
    scratch = torch.empty(size, dtype=torch.float64)
    for start in range(0, count, max(1, size)):
        work(slice(start, start + size), scratch)


def is_prime(n: int) -> bool:
    """Decide primality (deterministic Miller-Rabin, valid below 3.3e24)."""
    small = (2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37, 41)
    if n < 2 or any(n % s == 0 for s in small):
        return n in small
    d, r = n - 1, 0
    while d % 2 == 0:
        d, r = d // 2, r + 1
    for base in small:
        x = pow(base, d, n)
        if x in (1, n - 1):
            continue
        for _ in range(r - 1):
            x = x * x % n
            if x == n - 1:
                break
        else:
            return False
    return True


def draw_primes(source: random.Random, *, three: bool = False) -> tuple[int, int]:
    """Draw primes p = 2 q + 1 with p just below 2^26, such that (q - 1) / 2 is one too if there are to be `three`.

    They are 2 modulo 3, so that cubing is a bijection modulo each (see `Permutation`).
    """
    low, high = int(0.9 * PRIME_LIMIT) // 2, PRIME_LIMIT // 2
    while True:
        q = source.randrange(low, high) | 1
        if is_prime(q) and is_prime(2 * q + 1) and (not three or is_prime(q // 2)):
            return 2 * q + 1, q


@final
@dataclass(frozen=True)
class Modulus:
    """Arithmetic modulo one prime."""

    prime: int
    inverse: float = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "inverse", 1.0 / self.prime)

    def reduce_(self, x: torch.Tensor) -> torch.Tensor:
        """Bring integers below 2^53 into the balanced range, in place where `x` is dense."""
        if not x.is_contiguous():
            x = x.contiguous()
        flat = x.view(-1)

        def work(where: slice, scratch: torch.Tensor) -> None:
            piece = flat[where]
            self.reduce_piece(piece, scratch[: piece.numel()])

        in_pieces(flat.numel(), work)
        return x

    def reduce_piece(self, x: torch.Tensor, scratch: torch.Tensor) -> None:
        """Reduce `x` in place; `scratch` is of its shape."""
        quotient = torch.add(_ROUNDS, x, alpha=self.inverse, out=scratch).sub_(_ROUNDS)
        x.sub_(quotient, alpha=self.prime)

    def canonical(self, x: torch.Tensor) -> torch.Tensor:
        """Return the representative in 0 <= r < prime of balanced residues."""
        return torch.where(x < 0, x + self.prime, x)

    def embed(self, numerator: int, denominator: int = 1) -> float:
        """Return the balanced residue of a rational; its denominator must not be 0 here."""
        value = numerator % self.prime * pow(denominator, -1, self.prime) % self.prime
        return float(value - self.prime if value > self.prime // 2 else value)

    def draw(self, shape: tuple[int, ...], source: np.random.Generator) -> torch.Tensor:
        """Draw uniform residues."""
        half = self.prime // 2
        drawn = source.integers(-half, half + 1, size=shape, dtype=np.int32)
        return torch.from_numpy(drawn).to(here(), torch.float64)

    def add(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """Return a + b."""
        return self._combine(torch.add, a, b)

    def sub(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """Return a - b."""
        return self._combine(torch.sub, a, b)

    def mul(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """Return a * b."""
        return self._combine(torch.mul, a, b)

    def _combine(
        self, function: Callable[..., torch.Tensor], a: torch.Tensor, b: torch.Tensor
    ) -> torch.Tensor:
        """Apply an elementwise function and reduce, piece by piece: large tensors pass once."""
        shape = np.broadcast_shapes(a.shape, b.shape)
        if prod(shape) <= _piece() or _whole():
            return self.reduce_(function(a, b))
        result = _empty(shape)
        scratch = torch.empty(_piece(), dtype=torch.float64)
        for out, x, y in _pieces(result, a.expand(shape), b.expand(shape)):
            function(x, y, out=out)
            self.reduce_piece(out, scratch[: out.numel()].view(out.shape))
        return result

    def power(self, x: torch.Tensor, exponent: int) -> torch.Tensor:
        """Return x to a non-negative power."""
        if exponent == 0:
            return torch.ones_like(x)
        result: torch.Tensor | None = None
        while True:
            if exponent & 1:
                result = x if result is None else self.mul(result, x)
            exponent >>= 1
            if not exponent:
                assert result is not None
                return result
            x = self.mul(x, x)

    def invert(self, x: torch.Tensor) -> torch.Tensor:
        """Return 1 / x where no element is zero: a tree of products, one power at its root."""
        levels = [x.reshape(-1)]
        while levels[-1].numel() > 1024:
            top = levels[-1]
            if top.numel() % 2:
                levels[-1] = top = torch.cat([top, top.new_ones(1)])
            levels.append(self.mul(top[0::2], top[1::2]))
        inverse = self.power(levels.pop(), self.prime - 2)
        while levels:
            below = levels.pop()
            both = torch.empty_like(below)
            up = inverse[: below.numel() // 2]
            both[0::2] = self.mul(up, below[1::2])
            both[1::2] = self.mul(up, below[0::2])
            inverse = both
        return inverse[: x.numel()].reshape(x.shape)

    def sum(self, x: torch.Tensor, axes: tuple[int, ...]) -> torch.Tensor:
        """Sum over axes kept as 1 (exact: fewer than 2^27 terms)."""
        return self.reduce_(torch.sum(x, axes, keepdim=True))

    def cumulative_sum(self, x: torch.Tensor, axis: int) -> torch.Tensor:
        """Inclusive prefix sums along one axis."""
        return self.reduce_(torch.cumsum(x, axis))

    def product(self, x: torch.Tensor, axis: int) -> torch.Tensor:
        """Product along one axis, kept as 1."""
        x = x.movedim(axis, 0)
        while x.shape[0] > 1:
            half = x.shape[0] // 2
            odd = x[2 * half :]
            x = torch.cat([self.mul(x[:half], x[half : 2 * half]), odd])
        if x.shape[0] == 0:
            return x.new_ones((1, *x.shape[1:])).movedim(0, axis)
        return x.movedim(0, axis)

    def cumulative_product(self, x: torch.Tensor, axis: int) -> torch.Tensor:
        """Inclusive prefix products along one axis, by doubling."""
        x = x.movedim(axis, 0).clone()
        step = 1
        while step < x.shape[0]:
            x = torch.cat([x[:step], self.mul(x[step:], x[:-step])])
            step *= 2
        return x.movedim(0, axis)

    def matmul(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """Contract [..., M, K] with [..., K, N]; batch dims broadcast without being copied."""
        batch = np.broadcast_shapes(a.shape[:-2], b.shape[:-2])
        left, right = _fold(a, b)
        terms = left.shape[-1]
        result = self._product(left[..., :_TERMS], right[:, :_TERMS])
        for start in range(_TERMS, terms, _TERMS):
            part = self._product(
                left[..., start : start + _TERMS], right[:, start : start + _TERMS]
            )
            result = self.add(result, part)
        return _unfold(result, a, b, tuple(batch))

    def _product(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """Multiply in blocks of rows (or of small matrices) whose products stay in cache."""
        count, rows, columns = a.shape[0], a.shape[1], b.shape[2]
        result = _empty((count, rows, columns))
        split_a = a.numel() <= b.numel()
        parts = _limbs(a if split_a else b)
        elements = _GPU_BLOCK if _whole() else _BLOCK
        batch_step = max(1, elements // max(1, rows * columns))
        row_step = max(32, elements // max(1, columns)) if batch_step == 1 else rows
        upper = _empty((min(batch_step, count) * min(row_step, rows) * columns,))
        for first in range(0, count, batch_step):
            batch = slice(first, first + batch_step)
            for top in range(0, rows, max(row_step, 1)):
                block = slice(top, top + row_step)
                # dense: whole matrices, or rows of one
                target = result[batch, block]
                high = upper[: target.numel()].view(target.shape)
                for part, out in zip(parts, (high, target), strict=True):
                    if split_a:
                        torch.bmm(part[batch, block], b[batch], out=out)
                    else:
                        torch.bmm(a[batch, block], part[batch], out=out)
                target.add_(self.reduce_(high), alpha=_LIMB)
                self.reduce_(target)
        return result


def _pieces(
    out: torch.Tensor, x: torch.Tensor, y: torch.Tensor
) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Cut three tensors of one shape into pieces that fit in cache, along their leading dims."""
    size = _piece()
    done, pending = [], [(out, x, y)]
    while pending:
        o, a, b = pending.pop()
        if o.numel() <= size:
            done.append((o, a, b))
        elif o.shape[0] == 1:
            pending.append((o[0], a[0], b[0]))
        else:
            step = max(1, size * o.shape[0] // o.numel())
            cuts = [slice(i, i + step) for i in range(0, o.shape[0], step)]
            pending += [(o[c], a[c], b[c]) for c in cuts]
    return done


def _limbs(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    high = torch.add(_ROUNDS, x, alpha=1.0 / _LIMB, out=_empty(x.shape)).sub_(_ROUNDS)
    return high, torch.sub(x, high, alpha=_LIMB, out=_empty(x.shape))


def _kinds(a: torch.Tensor, b: torch.Tensor) -> tuple[list[int], list[int], list[int]]:
    shared, only_a, only_b = [], [], []
    for i, (m, n) in enumerate(zip(a.shape[:-2], b.shape[:-2], strict=True)):
        if m == n:
            shared.append(i)
        elif n == 1:
            only_a.append(i)
        else:
            only_b.append(i)
    return shared, only_a, only_b


def _fold(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Give both operands one batch dim; what only one of them has joins its rows or columns."""
    shared, only_a, only_b = _kinds(a, b)
    rank = a.dim()
    m, k, n = a.shape[-2], a.shape[-1], b.shape[-1]
    left = a.permute(*shared, *only_b, *only_a, rank - 2, rank - 1)
    right = b.permute(*shared, *only_a, rank - 2, *only_b, rank - 1)
    count = prod(a.shape[i] for i in shared)
    return (
        left.reshape(count, prod(a.shape[i] for i in only_a) * m, k),
        right.reshape(count, k, prod(b.shape[i] for i in only_b) * n),
    )


def _unfold(
    c: torch.Tensor, a: torch.Tensor, b: torch.Tensor, batch: tuple[int, ...]
) -> torch.Tensor:
    shared, only_a, only_b = _kinds(a, b)
    sizes = [a.shape[i] for i in shared] + [a.shape[i] for i in only_a]
    c = c.reshape(*sizes, a.shape[-2], *(b.shape[i] for i in only_b), b.shape[-1])
    position = {axis: i for i, axis in enumerate(shared + only_a)}
    rows = len(position)
    position.update({axis: rows + 1 + i for i, axis in enumerate(only_b)})
    order = [position[i] for i in range(len(batch))]
    return c.permute(*order, rows, c.dim() - 1)


@final
class Permutation:
    """A random-looking permutation of the residues: three rounds of key addition and cubing.

    This is the MiMC construction (Albrecht et al. 2016). Cubing is a bijection because
    neither p - 1 nor q - 1 is divisible by 3.
    """

    def __init__(self, modulus: Modulus, source: random.Random, rounds: int = 3) -> None:
        self.modulus = modulus
        half = modulus.prime // 2
        self._keys = [float(source.randrange(-half, half)) for _ in range(rounds + 1)]
        self._root = pow(3, -1, modulus.prime - 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Apply the permutation."""
        flat = x.reshape(-1)
        result = _empty(flat.shape)
        reduce_ = self.modulus.reduce_piece

        def work(where: slice, scratch: torch.Tensor) -> None:
            piece = flat[where]
            out, spare = result[where], scratch[: piece.numel()]
            keyed = torch.empty_like(spare)
            for key in self._keys[:-1]:
                # at most p in size: its square is still below 2^52
                torch.add(piece, key, out=keyed)
                torch.mul(keyed, keyed, out=out)
                reduce_(out, spare)
                reduce_(out.mul_(keyed), spare)
                piece = out
            reduce_(out.add_(self._keys[-1]), spare)

        # all rounds of a piece while it is in cache
        in_pieces(flat.numel(), work)
        return result.reshape(x.shape)

    def backward(self, y: torch.Tensor) -> torch.Tensor:
        """Apply the inverse."""
        flat = y.reshape(-1)
        result = _empty(flat.shape)
        reduce_ = self.modulus.reduce_piece

        def work(where: slice, scratch: torch.Tensor) -> None:
            out, spare = result[where], scratch[: flat[where].numel()]
            base = torch.empty_like(spare)
            torch.sub(flat[where], self._keys[-1], out=out)
            for key in reversed(self._keys[:-1]):
                reduce_(out, spare)
                base.copy_(out)
                for bit in bin(self._root)[3:]:
                    reduce_(out.mul_(out), spare)
                    if bit == "1":
                        reduce_(out.mul_(base), spare)
                out.sub_(key)
            reduce_(out, spare)

        in_pieces(flat.numel(), work)
        return result.reshape(y.shape)


@final
class Exponential:
    """x modulo q -> g^x modulo p for a generator g of the subgroup of order q, p = 2 q + 1."""

    def __init__(self, p: Modulus, q: Modulus, source: random.Random) -> None:
        self._p, self._q = p, q
        root = 1
        while root == 1:
            base = source.randrange(2, p.prime)
            root = pow(base, (p.prime - 1) // q.prime, p.prime)
        self.root = root
        self._low = self._table(root, _LIMB)
        self._high = self._table(pow(root, _LIMB, p.prime), q.prime // _LIMB + 1)

    def _table(self, base: int, count: int) -> torch.Tensor:
        table = torch.ones(1, dtype=torch.float64)
        factor = base
        while table.numel() < count:
            scaled = self._p.mul(table, torch.tensor(self._p.embed(factor), dtype=torch.float64))
            table = torch.cat([table, scaled])
            factor = factor * factor % self._p.prime
        return table[:count].contiguous()

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Return g^x."""
        flat = x.reshape(-1)
        result = _empty(flat.shape)

        def work(where: slice, scratch: torch.Tensor) -> None:
            whole = flat[where].to(torch.int32)
            # negative exponents: add q where the sign bits are set
            whole.add_((whole >> 31).bitwise_and_(self._q.prime))
            out, spare = result[where], scratch[: whole.numel()]
            torch.index_select(self._low, 0, whole & (_LIMB - 1), out=out)
            torch.index_select(self._high, 0, whole.bitwise_right_shift_(13), out=spare)
            self._p.reduce_piece(out.mul_(spare), spare)

        in_pieces(flat.numel(), work)
        return result.reshape(x.shape)


def mix(x: torch.Tensor, key: int) -> torch.Tensor:
    """Hash 64-bit integers under a key (the finalizer of splitmix64, key added first)."""
    flat = x.reshape(-1)
    result = _empty(flat.shape, torch.int64)

    def work(where: slice, scratch: torch.Tensor) -> None:
        piece = flat[where] + _signed(key)
        piece = (piece ^ ((piece >> 30) & ((1 << 34) - 1))).mul_(_signed(0xBF58476D1CE4E5B9))
        piece = (piece ^ ((piece >> 27) & ((1 << 37) - 1))).mul_(_signed(0x94D049BB133111EB))
        torch.bitwise_xor(piece, (piece >> 31) & ((1 << 33) - 1), out=result[where])

    in_pieces(flat.numel(), work)
    return result.reshape(x.shape)


def _signed(value: int) -> int:
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >> 63 else value


def to_residues(hashed: torch.Tensor, modulus: Modulus) -> torch.Tensor:
    """Turn 64-bit hashes into residues (bias below 2^-25)."""
    return modulus.reduce_((hashed & ((1 << 52) - 1)).to(torch.float64) - float(1 << 51))
