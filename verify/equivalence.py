"""Are two programs the same? The finite-field test, repeated until its error bound is met.

Where the degree of the whole is too high for that, the programs are proven equal in pieces
(`superopt.verify.sweep`).

In: two graphs of any level with inputs of the same types. Out: a `Verdict`, a value: equal with a bound
on the chance of a mistake, or different with a counterexample that anyone can run again.
"""

import hashlib
import time
from collections.abc import Container, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import lru_cache
from math import ceil, inf, log2
from typing import Any, final

import torch

from superopt.ir.errors import GraphError
from superopt.ir.graph import Graph, Level
from superopt.ir.interpret import interpret
from superopt.ir.node import Node, make, rebuild, rewrite, topological, users_of
from superopt.ir.ops import contraction, elementwise, leaf
from superopt.ir.ops.registry import Op
from superopt.ir.semantics import to_primitives
from superopt.ir.types import TensorType, Type
from superopt.verify.arithmetic import PRIME_LIMIT
from superopt.verify.degree import error_per_test
from superopt.verify.draws import draws
from superopt.verify.field import FieldDomain, FieldValue, ZeroDivision
from superopt.verify.moves import like
from superopt.verify.needs import (
    EXPONENTIAL,
    infinite_constant,
    needed_residues,
    real_valued,
)
from superopt.verify.ranges import Integers, integer_ranges
from superopt.verify.signs import finite_everywhere
from superopt.verify.slices import SUMMED, Alike, alike, seconds, work
from superopt.verify.sweep import OUTPUT_SKIPS, SKIPS, Claim, Sweep, computes, partners
from superopt.verify.threads import suitable
from superopt.verify.views import MOST_ELEMENTS, occurring, view

DEFAULT_ERROR_BOUND = 2.0**-60
MAX_TESTS = 64
MAX_REDRAWS = 4
MIN_DECISIONS = 256
"""How many random outcomes each comparison is to see over all tests."""
MIN_INTEGERS = 32
"""How often each end of a range, and each special value, would be tried over all tests if all values drawn were such.

One of four is (`draw_integers`): each comes up eight times, and not at all once in 3000 searches.
"""
_MOST_ERROR = 0.5
"""Tests that say less than this are not worth repeating."""
_SAMPLE = 1 << 15
"""How many elements of a value tell which others may be equal to it."""
_LOOKED_FOR_S = 1.0
"""How long a test of all may take that looks for views."""
DIRECT_ERROR = 2.0**-10
"""Programs are tested whole while one test says so much; else in pieces, which then costs less."""


@final
@dataclass(frozen=True)
class Counterexample:
    """Where two programs differ: output `output` at `position`, in the test drawn from `seed`.

    `expected` and `found` are (mod p, mark) of the original and the candidate; a mark is 0 for a
    residue, 1 and -1 for the infinities, 2 for NaN. Concrete outputs (integers) have the value first.
    """

    seed: int
    output: int
    position: tuple[int, ...]
    expected: tuple[int, int]
    found: tuple[int, int]

    def __str__(self) -> str:
        place = ",".join(str(i) for i in self.position)
        return (
            f"output {self.output} at [{place}] is {_shown(self.found)}, "
            f"not {_shown(self.expected)} (test seed {self.seed})"
        )


def _shown(value: tuple[int, int]) -> str:
    return {0: str(value[0]), 1: "inf", -1: "-inf", 2: "nan"}[value[1]]


@final
@dataclass(frozen=True)
class Piece:
    """A claim about a part of the programs that was proven: the digest of its two sides, and its tests.

    `alike`: see `Verdict`.
    """

    digest: str
    alike: tuple[tuple[int, int], ...]
    primes: tuple[tuple[int, int], ...]
    seeds: tuple[int, ...]
    error_per_test: float
    by_order: bool


@final
@dataclass(frozen=True)
class Verdict:
    """The answer of the field test; true in a condition when the programs are equivalent.

    `bound` is the computed chance that different programs passed. `decisions` is true when comparisons
    of values, integers or booleans took part: the bound then speaks about the branches that the tests took.
    `pieces` is empty where the programs were tested whole; else `tests`, `primes` and `seeds` are those of
    the one test of the whole, and `error_per_test` is the largest of a piece. `alike` lists axes along which
    both programs compute alike: how many of how many steps were left to be tested (`slices.alike`). A
    counterexample is one of what was left.
    """

    equivalent: bool
    reason: str
    seed: int
    tests: int
    primes: tuple[tuple[int, int], ...]
    seeds: tuple[int, ...]
    error_per_test: float
    bound: float
    decisions: bool
    by_order: bool
    seconds: float
    counterexample: Counterexample | None = None
    pieces: tuple[Piece, ...] = ()
    alike: tuple[tuple[int, int], ...] = ()

    def __bool__(self) -> bool:
        return self.equivalent

    def __str__(self) -> str:
        if not self.equivalent:
            return f"not equivalent: {self.reason}"
        exponent = log2(self.bound) if self.bound > 0 else float("-inf")
        how = f"in {len(self.pieces)} pieces" if self.pieces else f"after {self.tests} tests"
        return f"equivalent up to 2^{exponent:.0f} {how}"


def verify_field(
    original: Graph,
    candidate: Graph,
    *,
    seed: int,
    error_bound: float = DEFAULT_ERROR_BOUND,
    device: torch.device | None = None,
    glance: bool = False,
) -> Verdict:
    """Test `candidate` against `original` on random field elements.

    With `glance` it is not asked whether values that are finite at a few steps are so at others, which masks may
    hide, so that the verdict is no proof.

    It computes on `device` (None: PyTorch's default one); arithmetic is exact, so that the verdict is
    the same everywhere.

    Raises:
        GraphError: the graphs do not take inputs of the same types.
    """
    context = nullcontext() if device in (None, torch.get_default_device()) else device
    with context, suitable():
        return _verified(original, candidate, seed, error_bound, glance)


def _verified(
    original: Graph, candidate: Graph, seed: int, error_bound: float, glance: bool
) -> Verdict:
    started = time.perf_counter()
    mismatch = _signature_mismatch(original, candidate) or _draw_mismatch(original, candidate)
    if mismatch:
        return _refused(mismatch, seed, started)
    half = len(original.outputs)
    both = _joint(original, candidate)
    ranges = integer_ranges(original, both)
    left = _few_steps(both, half, SUMMED)
    joint = left.graph
    if _error(joint, half) <= DIRECT_ERROR:
        verdict = _direct(joint, half, ranges, seed, error_bound, started)
        if verdict.equivalent or not nests_exponentials(joint):
            return replace(verdict, alike=left.kept)
    boundaries = tuple(
        left.values[n]
        for n in _boundaries(original, both.outputs[:half], candidate)
        if n in left.values
    )
    trusted = glance or _pickable(both)
    for picked in (True, False):
        verdict, all_steps = _swept(
            joint, half, boundaries, ranges, seed, error_bound, started, picked, trusted
        )
        if verdict.equivalent or verdict.counterexample or all_steps:
            break
    return replace(verdict, alike=left.kept)


def _pickable(joint: Graph) -> bool:
    """Say whether a few steps tell which values are finite: no position is known, and nothing infinite given.

    What is compared with infinity alone (a running maximum, whether it has met a number) gets nothing of it.
    """
    users, results = users_of(joint.outputs), frozenset(joint.outputs)
    infinite = set[Node]()
    for node in topological(joint.outputs):
        if node.op is leaf.IOTA:
            return False
        if infinite_constant(node):
            infinite.add(node)
    return infinite.isdisjoint(results) and all(
        user in infinite or user.op in elementwise.COMPARISONS
        for node in infinite
        for user in users[node]
    )


def _few_steps(joint: Graph, half: int, summed: float, picked: bool = False) -> Alike:
    """Return a few steps of two programs; all of both where their results would be steps along different axes.

    Where they are `picked`, others may be anything.
    """
    left = alike(joint, summed=summed, rows=int(picked), picked=picked)
    pairs = zip(left.graph.outputs[:half], left.graph.outputs[half : 2 * half], strict=True)
    if all(one.shape == other.shape for one, other in pairs):
        return left
    return Alike(joint, (), {node: node for node in topological(joint.outputs)})


def least_s(graph: Graph, candidate: Graph | None = None, *, glance: bool = False) -> float:
    """Return about how many seconds a test of a program takes at least: against a candidate, if there is one.

    Its kernels are claims, in which no rows are picked.
    """
    whole = _joint(graph, candidate or graph)
    left = alike(whole, summed=SUMMED).graph
    if _error(left, len(graph.outputs)) > DIRECT_ERROR:
        left = alike(left, summed=inf, rows=1, picked=glance or candidate is None).graph
    return seconds(work(list(topological(left.outputs))))


def provable(graph: Graph) -> bool:
    """Say whether the degree of a graph allows a proof of a kernel that computes all of it, in a test or a few.

    Of what is large all rows would be computed to look for views in blocks, for a claim that asks for more.
    """
    whole = _joint(graph, graph)
    large = seconds(work(list(topological(whole.outputs)))) > _LOOKED_FOR_S
    return _error(whole, len(graph.outputs)) <= (DIRECT_ERROR if large else _MOST_ERROR)


def nests_exponentials(graph: Graph) -> bool:
    """Say whether exponents of exponents are exponentials: of those the test knows no law."""
    needs = needed_residues(graph)
    return any(n.op in EXPONENTIAL and "r" in needs[n] for n in topological(graph.outputs))


def _signature_mismatch(original: Graph, candidate: Graph) -> str | None:
    if len(original.inputs) != len(candidate.inputs):
        raise GraphError(
            f"{original.name} takes {len(original.inputs)} inputs, "
            f"{candidate.name} takes {len(candidate.inputs)}"
        )
    for a, b in zip(original.inputs, candidate.inputs, strict=True):
        if a.shape != b.shape or a.tensor.dtype is not b.tensor.dtype:
            raise GraphError(f"input {a.attrs.name} is {a.type}, the candidate takes {b.type}")
    if len(original.outputs) != len(candidate.outputs):
        return f"{len(candidate.outputs)} outputs, not {len(original.outputs)}"
    for i, (a, b) in enumerate(zip(original.outputs, candidate.outputs, strict=True)):
        if a.shape != b.shape or a.tensor.dtype is not b.tensor.dtype:
            return f"output {i} is {b.type}, not {a.type}"
    return None


def _draw_mismatch(original: Graph, candidate: Graph) -> str | None:
    """Say where the draws of random numbers differ: their operators, arguments, number or order.

    From what they are drawn is for the field to tell: the last one is an output.
    """
    wanted, found = ([n.attrs for n in draws(g)] for g in (original, candidate))
    if len(found) != len(wanted):
        return f"{len(found)} draws of random numbers, not {len(wanted)}"
    for number, (a, b) in enumerate(zip(wanted, found, strict=True)):
        if a != b:
            return f"draw {number} of random numbers is {b.target}, not {a.target} as it was"
    return None


def _joint(original: Graph, candidate: Graph) -> Graph:
    """Both programs as primitives over the same inputs: what they share is computed once."""
    outputs = _primitives(original, original)
    outputs += like(outputs, _primitives(original, candidate))
    return Graph(Level.KERNEL, original.name, original.inputs, outputs)


def _boundaries(original: Graph, own: Sequence[Node], candidate: Graph) -> tuple[Node, ...]:
    """List what the candidate's kernels write, as `_joint` writes it beside the original, `own` as primitives."""
    if candidate.level is not Level.KERNEL:
        return ()
    written = [n for n in candidate.nodes() if isinstance(n.type, TensorType)]
    return like(own, _primitives(original, candidate.with_outputs(written)))


def _primitives(original: Graph, program: Graph) -> tuple[Node, ...]:
    """Return what a program gives, as primitives over the original's inputs."""
    return rewrite(to_primitives(program, original.inputs), _by_axis)


def _by_axis(node: Node, inputs: tuple[Node, ...]) -> Node:
    """Sum along one axis after the other, the last first: kernels write sums of rows, which are claims then.

    The degree of a sum over quotients grows with their number.
    """
    if node.op is not contraction.REDUCE_SUM:
        return rebuild(node, inputs)
    (x,) = inputs
    for axis in reversed(node.attrs.axes):
        x = make(node.op, (x,), replace(node.attrs, axes=(axis,)))
    return x


def _order_helps(joint: Graph) -> bool:
    """Say whether a second look with max by random order is worth having, and sound enough.

    A maximum over many elements hides a wrong one too often under a random order; of two
    elements each wins every second time.
    """
    ops = {n.op for n in topological(joint.outputs)}
    over_many = {contraction.REDUCE_MAX, contraction.REDUCE_MIN, contraction.SCAN}
    return bool(ops & {elementwise.MAXIMUM, elementwise.MINIMUM}) and not ops & over_many


def _direct(
    joint: Graph,
    half: int,
    ranges: Mapping[str, Integers],
    seed: int,
    error_bound: float,
    started: float,
) -> Verdict:
    """Test the whole of both programs."""
    verdict = _run(joint, half, ranges, seed, error_bound, False, started)
    if not verdict.equivalent and verdict.counterexample and _order_helps(joint):
        verdict = _run(joint, half, ranges, seed, error_bound, True, started)
    return verdict


def _swept(
    joint: Graph,
    half: int,
    boundaries: tuple[Node, ...],
    ranges: Mapping[str, Integers],
    seed: int,
    error_bound: float,
    started: float,
    picked: bool,
    trusted: bool,
) -> tuple[Verdict, bool]:
    """Test the whole once, or `picked` steps of it, then prove piece by piece what that test found equal.

    What is finite at these steps is so at all where they are `trusted`; else its signs have to tell. Says also whether
    no steps were picked after all.
    """
    original, candidate = joint.outputs[:half], joint.outputs[half:]
    types = {n.type for n in boundaries}
    watched = joint
    if nests_exponentials(joint):
        # equal exponents are told by their residues modulo p
        like = [n for n in topological(joint.outputs) if n.type in types and real_valued(n)]
        watched = joint.with_outputs([*joint.outputs, *like])
    # what the claims are is all that this test tells: a few steps do, also of what is summed
    few = _few_steps(watched, half, inf, picked)
    for by_order in (False, True) if _order_helps(joint) else (False,):
        needs = needed_residues(few.graph, by_order=by_order)
        seen = _Observed({few.values[n].type for n in boundaries if n in few.values})
        tested = few.graph.with_outputs(few.graph.outputs[: 2 * half])
        outcome = _one_test(tested, half, ranges, needs, _test_seed(seed, 0), by_order, seen)
        difference, primes, used = outcome
        if difference is None:
            break
    finite = frozenset(n for n, v in few.values.items() if v in seen.finite)
    if few.picked and not trusted and difference is None:
        finite &= finite_everywhere(joint)
    # each of two sweeps has half of the error, and every claim that it may make a share of that
    proofs: list[tuple[Verdict, float]] = []
    pieces: list[Piece] = []
    known: dict[Claim, bool] = {}

    def swept(pairs: Mapping[Node, Node], most_error: float) -> bool:
        share = error_bound / 2 / (len(pairs) * len(SKIPS) + half * len(OUTPUT_SKIPS))

        def prove(claim: Claim) -> bool:
            # the whole test has chosen the claims: their tests draw afresh
            left = _few_steps(claim.graph, 1, SUMMED)
            if _error(left.graph, 1) > most_error:
                raise _TooLarge
            verdict = _direct(
                left.graph, 1, dict(claim.ranges), _test_seed(seed, -1), share, time.perf_counter()
            )
            proofs.append((verdict, share))
            if verdict.equivalent:
                piece = Piece(
                    claim.graph.digest(),
                    left.kept,
                    verdict.primes,
                    verdict.seeds,
                    verdict.error_per_test,
                    verdict.by_order,
                )
                pieces.append(piece)
            return verdict.equivalent

        return Sweep(original, pairs, finite, ranges, prove, known).equal(candidate)

    equivalent = False
    if difference is None:
        signatures = {n: seen.signatures[v] for n, v in few.values.items() if v in seen.signatures}
        pairs = partners(original, boundaries, signatures)
        try:
            equivalent = swept(pairs, DIRECT_ERROR)
        except _TooLarge:
            # what kernels hold and do not write is in blocks: views of the original's values
            inside = _Observed(types, frozenset(topological(original)))
            needs = needed_residues(watched, by_order=by_order)
            _one_test(joint, half, ranges, needs, _test_seed(seed, 0), by_order, inside)
            equivalent = swept({**inside.views, **pairs}, inf)
    if equivalent:
        reason = ""
    elif difference is not None:
        reason = str(difference)
    else:
        reason = f"a piece could not be proven: {proofs[-1][0].reason}"
    verdict = Verdict(
        equivalent=equivalent,
        reason=reason,
        seed=seed,
        tests=1,
        primes=(primes,),
        seeds=(used,),
        error_per_test=max((p.error_per_test for p in pieces), default=1.0),
        bound=sum(p.bound if p.equivalent else share for p, share in proofs) if equivalent else 1.0,
        decisions=any(p.decisions for p, _ in proofs),
        by_order=by_order,
        seconds=time.perf_counter() - started,
        counterexample=difference,
        pieces=tuple(pieces) if equivalent else (),
    )
    return verdict, not few.picked


class _TooLarge(Exception):
    """A claim whose degree asks for many tests: smaller ones may do."""


@final
class _Observed:
    """Notes, while both programs are interpreted, which nodes are finite and what their values are.

    Values are digested where the type of the node is one of `types`. Of two such values that are equal
    modulo p, the second gets the first one's other residues: behind exponentials they may be others,
    of equal values too. That is for the choice of claims alone, which are tested on their own.

    Given `own`, the nodes of the original, it looks for what other nodes compute as views of these.
    """

    def __init__(self, types: Container[Type], own: Container[Node] = frozenset()) -> None:
        self.types = types
        self.own = own
        self.views: dict[Node, Node] = {}
        self.elements: dict[bytes, tuple[Node, torch.Tensor]] = {}
        self.signatures: dict[Node, dict[str, bytes]] = {}
        self.finite: set[Node] = set()
        self.exponents: dict[tuple[Type, bytes], dict[str, torch.Tensor]] = {}
        self.domain: FieldDomain | None = None

    def over(self, domain: FieldDomain) -> "_Observed":
        """Interpret over `domain`, from the beginning."""
        self.domain = domain
        self.signatures.clear()
        self.finite.clear()
        self.exponents.clear()
        self.views.clear()
        self.elements.clear()
        return self

    def has_rule(self, op: Op) -> bool:
        """See `FieldDomain`."""
        return False

    def apply(self, node: Node, args: Sequence[Any]) -> Any:
        """Return the value of one node."""
        assert self.domain is not None, "over() comes first"
        value = self.domain.apply(node, args)
        if isinstance(value, FieldValue):
            if value.kind is None:
                self.finite.add(node)
            if node.type in self.types:
                self.signatures[node] = digests = _signature(value, self.domain)
                if "p" in digests and len(value.residues) > 1:
                    known = self.exponents.setdefault((node.type, digests["p"]), {})
                    first = known.setdefault("p", value.residues["p"])
                    canonical = self.domain.fields["p"].canonical
                    if torch.equal(canonical(first), canonical(value.residues["p"])):
                        for name, residue in value.residues.items():
                            known.setdefault(name, residue)
                        residues = {name: known[name] for name in value.residues}
                        value = FieldValue(residues, value.kind, value.real)
            if self.own and value.kind is None and computes(node):
                self._look_for_views(node, value)
        return value

    def _look_for_views(self, node: Node, value: FieldValue) -> None:
        assert self.domain is not None, "over() comes first"
        residue = value.residues.get("p")
        if residue is None or not 1 < node.tensor.elements <= MOST_ELEMENTS:
            return
        numbers = self.domain.fields["p"].canonical(residue).expand(node.shape)
        digest = occurring(numbers)
        if node in self.own:
            self.elements.setdefault(digest, (node, numbers))
        elif digest in self.elements:
            found = view(*self.elements[digest], node, numbers)
            if found is not None:
                self.views[node] = found


def _signature(value: FieldValue, domain: FieldDomain) -> dict[str, bytes]:
    """Digest a value, a large one by elements drawn for its size: a mistake makes a claim that fails."""
    marks = b"" if value.kind is None else _drawn(value.kind).cpu().numpy().tobytes()
    result = {}
    for name, residue in value.residues.items():
        seen = domain.fields[name].canonical(_drawn(residue)).to(torch.int32)
        result[name] = hashlib.blake2b(seen.cpu().numpy().tobytes() + marks).digest()
    return result


def _drawn(x: torch.Tensor) -> torch.Tensor:
    flat = x.reshape(-1)
    if flat.numel() <= _SAMPLE:
        return flat
    return flat[_places(flat.numel(), _SAMPLE).to(flat.device)]


@lru_cache(maxsize=64)
def _places(elements: int, count: int) -> torch.Tensor:
    return torch.randint(elements, (count,), generator=torch.Generator().manual_seed(elements))


def _error(joint: Graph, half: int) -> float:
    smallest = int(0.9 * PRIME_LIMIT)
    return error_per_test(joint, half, smallest, smallest // 2)


def _run(
    joint: Graph,
    half: int,
    ranges: Mapping[str, Integers],
    seed: int,
    error_bound: float,
    by_order: bool,
    started: float,
) -> Verdict:
    error = _error(joint, half)
    if error > _MOST_ERROR:
        return _refused(f"degree too high for a bound: {error:.2g} per test", seed, started)
    tests = max(1, ceil(log2(error_bound) / log2(error)))
    compared = _compared(joint, half)
    sites = _decision_sites(compared, by_order)
    read = frozenset(topological(compared))
    integers = [i for i in joint.inputs if i in read and not i.tensor.dtype.is_float]
    wanted = [(MIN_DECISIONS, elements) for elements in sites]
    for i in integers:
        rare = 2 + len(ranges[i.attrs.name].special)
        wanted.append((MIN_INTEGERS * rare, max(1, i.tensor.elements)))
    # a first look, which asks for less, sees fewer outcomes too
    part = min(1.0, log2(error_bound) / log2(DEFAULT_ERROR_BOUND))
    for outcomes, elements in wanted:
        tests = max(tests, ceil(part * min(MAX_TESTS, outcomes / elements)))
    needs = needed_residues(joint, by_order=by_order)
    primes: list[tuple[int, int]] = []
    seeds: list[int] = []
    difference: Counterexample | None = None
    while len(seeds) < tests and difference is None:
        outcome = _one_test(joint, half, ranges, needs, _test_seed(seed, len(seeds)), by_order)
        difference, domain_primes, used = outcome
        primes.append(domain_primes)
        seeds.append(used)
    return Verdict(
        equivalent=difference is None,
        reason="" if difference is None else str(difference),
        seed=seed,
        tests=len(seeds),
        primes=tuple(primes),
        seeds=tuple(seeds),
        error_per_test=error,
        bound=1.0 if difference is not None else error ** len(seeds),
        decisions=bool(wanted),
        by_order=by_order,
        seconds=time.perf_counter() - started,
        counterexample=difference,
    )


def _compared(joint: Graph, half: int) -> list[Node]:
    """List the outputs that are not one and the same computation in both programs."""
    pairs = zip(joint.outputs[:half], joint.outputs[half:], strict=True)
    return [node for pair in pairs if pair[0] is not pair[1] for node in pair]


def _refused(reason: str, seed: int, started: float) -> Verdict:
    seconds = time.perf_counter() - started
    return Verdict(False, reason, seed, 0, (), (), 1.0, 1.0, False, False, seconds)


def _test_seed(seed: int, index: int) -> int:
    digest = hashlib.blake2b(f"{seed}:{index}".encode(), digest_size=7).digest()
    return int.from_bytes(digest, "little")


def _decision_sites(outputs: Sequence[Node], by_order: bool) -> list[int]:
    """List the number of elements of every comparison of values that `outputs` read."""
    extrema = (elementwise.MAXIMUM, elementwise.MINIMUM) if by_order else ()
    return [
        max(1, node.tensor.elements)
        for node in topological(outputs)
        if node.op in extrema or _compares_values(node)
    ]


def _compares_values(node: Node) -> bool:
    if node.op not in elementwise.COMPARISONS or not node.inputs[0].tensor.dtype.is_float:
        return False
    return not any(infinite_constant(i) for i in node.inputs)


def _one_test(
    joint: Graph,
    half: int,
    ranges: Mapping[str, Integers],
    needs: dict[Node, frozenset[str]],
    seed: int,
    by_order: bool,
    observed: _Observed | None = None,
) -> tuple[Counterexample | None, tuple[int, int], int]:
    for attempt in range(MAX_REDRAWS + 1):
        # a divisor that is zero under every draw is zero in the program too: then x / 0 is NaN
        domain = FieldDomain(seed + attempt, needs, by_order, attempt == MAX_REDRAWS)
        args = [
            domain.draw(
                i.tensor, needs.get(i, frozenset()) or frozenset({"p"}), ranges[i.attrs.name]
            )
            for i in joint.inputs
        ]
        try:
            with torch.no_grad():
                over = domain if observed is None else observed.over(domain)
                values = interpret(joint, args, over)
        except ZeroDivision:
            continue
        primes = (domain.p.prime, domain.q.prime)
        return compare(values[:half], values[half:], domain), primes, domain.seed
    raise AssertionError("the last attempt redraws nothing")


def compare(
    expected: Sequence[Any], found: Sequence[Any], domain: FieldDomain
) -> Counterexample | None:
    """Return the first place where two lists of values differ."""
    for index, (a, b) in enumerate(zip(expected, found, strict=True)):
        if a is b:
            continue
        left, left_marks = _parts(a, domain)
        right, right_marks = _parts(b, domain)
        differs = (left != right) | (left_marks != right_marks)
        if not bool(differs.any()):
            continue
        position = tuple(int(i) for i in torch.nonzero(differs)[0])
        return Counterexample(
            domain.seed,
            index,
            position,
            (int(left[position]), int(left_marks.expand(left.shape)[position])),
            (int(right[position]), int(right_marks.expand(right.shape)[position])),
        )
    return None


def _parts(value: Any, domain: FieldDomain) -> tuple[torch.Tensor, torch.Tensor]:
    nothing = torch.zeros((), dtype=torch.int8)
    if not isinstance(value, FieldValue):
        return value, nothing
    residue = domain.p.canonical(value.residues["p"])
    return residue, nothing if value.kind is None else value.kind
