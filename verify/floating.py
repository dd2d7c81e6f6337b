"""Is a candidate as accurate as the original? Both against the original in float64.

In: the original graph and a function that runs the candidate. Out: a `FloatVerdict`, over the distributions of
`verify/inputs.py`. A candidate may err a small multiple of what the original itself errs at working precision, and
may give inf or NaN only where the original does.
"""

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from math import inf, prod
from typing import Any, Final, final

import torch

from superopt.ir.graph import Graph
from superopt.ir.interpret import Domain
from superopt.ir.node import topological
from superopt.ir.ops import leaf, library
from superopt.ir.semantics import expand
from superopt.ir.types import TensorType
from superopt.verify.draws import generators
from superopt.verify.inputs import (
    DISTRIBUTIONS,
    INFINITE,
    draw_inputs,
    drawn_as,
    rows_of,
    strided,
)
from superopt.verify.memory import empty
from superopt.verify.opaque import duplicate
from superopt.verify.picks import Pick, picks
from superopt.verify.reference import DTYPES, TorchDomain, run_reference
from superopt.verify.rounding import SLACK_ULPS, Edges, Rounding
from superopt.verify.slices import TERMS_OF_FLOATS, Alike, alike, evaluate, seconds, slices, work
from superopt.verify.threads import now, suitable, worked_s

RunCandidate = Callable[[list[torch.Tensor]], Sequence[torch.Tensor]]

ERROR_MULTIPLE = 4.0
"""How much larger than the original's own error a candidate's may be."""

_BIAS_ULPS: Final = 1 / 16
"""What the errors of an output may have in common, in units in the last place."""

_NOT_FINITE: Final = "is inf or NaN where the original is not"
_FINITE: Final = "is a number where the original is rightly inf or NaN"
_MADE_OF_NOISE: Final = 0.5
"""The share of an output's numbers that are rounding errors from which they are what it is for."""
_OTHER_NOISE: Final = 0.01
"""The share of these that may be other ones: each is a correction, and wrong alone."""

_USUAL: Final = "normal"
"""Where no output is a rounding error but those that the program makes of one."""

_PIECE: Final = 1 << 17

_WHOLE: Final = (_USUAL, "constant-rows")
"""Tests on inputs that do not repeat: in the latter one half of the rows is not like the other on the whole."""

_MORE_DRAWS: Final = 3
"""Further draws of rounding errors for a few numbers, whose first ones may have cancelled."""

_MUCH_MORE: Final = 4
"""How much more work a test in float64 may be for the original to run on a few rows only."""

_MOST_SLICES: Final = 0.5
"""What share of the original may be run in float64 to look at rows that stray."""

_ENOUGH_ROWS: Final = 16
"""How many rows tell how far others may err."""


@final
@dataclass(frozen=True)
class FloatError:
    """Errors on one distribution, relative to the scale of the output."""

    distribution: str
    original: float
    candidate: float


@final
@dataclass(frozen=True)
class FloatVerdict:
    """The answer of the floating-point test; true in a condition when the candidate is accurate."""

    accurate: bool
    reason: str
    seed: int
    errors: tuple[FloatError, ...]
    seconds: float

    def __bool__(self) -> bool:
        return self.accurate


def _in_double(x: torch.Tensor) -> torch.Tensor:
    """Return a tensor in float64, laid out the same."""
    if x.dtype is torch.float64 or not x.is_contiguous():
        return x.to(torch.float64)
    return empty(x.shape, torch.float64, x.device).copy_(x)


@final
class FloatTest:
    """The test of one original for several candidates: what does not depend on these is kept.

    Where the original's results are alike along some axes, it runs for a few positions only (`slices.alike`), and the
    candidate on inputs in which these come again and again. Tests on inputs that do not
    repeat then hold all the candidate's results against the original's. Where results of a few positions read
    all others, the original runs as a whole, but for these positions only in float64.
    Errors are held against it there; everywhere the candidate is held against the original at its own
    precision, from which it may be as far as errors of these positions foretell. Otherwise the whole decides.

    Programs run on `device`.
    """

    def __init__(self, original: Graph, *, seed: int, device: torch.device | str = "cpu") -> None:
        self.original = original
        self.seed = seed
        self.device = device
        self._picks = picks(original)
        self._halves = any(
            isinstance(n.type, TensorType) and n.type.dtype.is_half for n in original.nodes()
        )
        self._few_rows = any(rows_of(o) < _ENOUGH_ROWS for o in original.outputs)
        self._refuses = any(n.op is library.OPAQUE for n in original.nodes())
        scores = [node for picked in self._picks.values() for node in picked.nodes()]
        self._scored = original.with_outputs([*original.outputs, *scores])
        whole = expand(self._scored)
        # behind positions there may be masks, and what a mask hides counts as finite
        self._masks = any(n.op is leaf.IOTA for n in whole.nodes())
        self._all = Alike(whole, (), {})
        count = len(whole.outputs)
        both = whole if self._picks else whole.with_outputs([*whole.outputs, *original.outputs])
        part = self._all if self._picks else sampled(both, repeated=True)
        self._own = part.graph.with_outputs(part.graph.outputs[count:])
        self._part = part.first(count)
        self._repeats = bool(part.few) and not part.picked
        self._slices = {whole: slices(whole, device)}
        self._slices[self._part.graph] = slices(self._part.graph, device)
        steps = work(list(topological(self._part.graph.outputs)), TERMS_OF_FLOATS)
        self._least_s = seconds(steps) if torch.device(device).type == "cpu" else 0.0
        self._references: dict[str, _Reference | str] = {}
        # how much more the whole is than what the original runs on
        every = work(list(topological(whole.outputs)), TERMS_OF_FLOATS)
        self._share = every / max(1, steps) if self._repeats else 1.0
        self._own_s = 0.0
        self._wholes: dict[str, tuple[list[torch.Tensor], list[torch.Tensor]]] = {}
        self._reference_s: dict[str, float] = {}
        self._candidate_s: dict[str, float] = {}

    def predicted_s(self) -> float:
        """Return how long a check on every distribution may take, going by the checks so far."""
        missing = len(DISTRIBUTIONS) - len(self._reference_s)
        # the first one of a process waits for memory; before it only what is left to compute tells
        made_s = min(self._reference_s.values(), default=self._least_s)
        checked_s = min(self._candidate_s.values(), default=self._own_s or made_s / 2)
        return made_s * missing + checked_s * (len(DISTRIBUTIONS) + self._repeats * len(_WHOLE))

    def begin(self) -> None:
        """Make one reference, if there is none yet, so that `predicted_s` knows."""
        if not self._references:
            with suitable():
                drawn = self._drawn(_USUAL)
                del drawn  # memory that is new takes longer than what those to come are drawn into
                begun = now()
                drawn = self._drawn(_USUAL)
            self._reference(_USUAL, drawn)
            self._reference_s[_USUAL] = worked_s(begun)

    def check(
        self, run_candidate: RunCandidate, distributions: Sequence[str] = DISTRIBUTIONS
    ) -> FloatVerdict:
        """Compare the candidate's error with the original's own on every distribution."""
        started = time.perf_counter()
        errors: list[FloatError] = []
        reason = refused = ""
        for distribution in distributions:
            begun = now()
            with suitable():
                drawn = self._drawn(distribution)
                inputs = drawn.inputs()
            drawn_s, begun = worked_s(begun), now()
            reference = self._reference(distribution, drawn)
            self._reference_s.setdefault(distribution, worked_s(begun))
            begun = now()
            if isinstance(reference, str):
                refused = reference
                continue
            found, reason = self._found(run_candidate, inputs)
            del inputs
            if not reason:
                pair, reason = self._judged(distribution, reference, found)
                errors.append(FloatError(distribution, *pair))
            self._candidate_s[distribution] = drawn_s + worked_s(begun)
            if reason:
                reason = f"{distribution} inputs: {reason}"
                break
        if self._repeats and set(distributions) == set(DISTRIBUTIONS):
            for distribution in _WHOLE:
                reason = reason or self._checked_whole(run_candidate, distribution)
        if not errors and not reason:
            reason = f"the original fails on all test inputs: {refused}"
        seconds = time.perf_counter() - started
        return FloatVerdict(not reason, reason, self.seed, tuple(errors), seconds)

    def near_few(self, part: Alike, run_few: RunCandidate, distributions: Sequence[str]) -> bool:
        """Say whether a candidate for a `part` of the original, the one that this test looks at, errs as little.

        That it is not said may have other reasons: `check` tells.
        """
        if part.few != self._part.few or self._picks:
            return False
        for distribution in distributions:
            drawn = self._drawn(distribution)
            begun = now()
            reference = self._reference(distribution, drawn)
            self._reference_s.setdefault(distribution, worked_s(begun))
            if isinstance(reference, str):
                return False
            found = list(run_few(drawn.left))
            with suitable():
                if _worst(reference, found)[1]:
                    return False
                noise = self._halves and distribution == _USUAL
                if noise and (_other_noise(reference, found) or _off_together(reference, found)):
                    return False
        return True

    def _found(
        self, run_candidate: RunCandidate, inputs: list[torch.Tensor]
    ) -> tuple[list[torch.Tensor], str]:
        """Run the candidate, and say whether its results are of the right shapes."""
        # large inputs are drawn again where they are read again: who knows what it wrote there
        given = inputs if self._part.few else [on(i, self.device) for i in inputs]
        with self._drawing():
            found = list(run_candidate(given))
        return found, _shape_mismatch(self.original, found)

    def _judged(
        self, distribution: str, reference: "_Reference", found: list[torch.Tensor]
    ) -> tuple[tuple[float, float], str]:
        """Return the errors of the original and the candidate, and what is wrong after all."""
        noise = self._halves and distribution == _USUAL
        pair, reason = self._compared(distribution, reference, found, noise)
        if reason and reference.part.few:
            # a few positions foretell little where the program is ill-conditioned
            reference = self._whole(reference, distribution)
            self._references[distribution] = reference
            pair, reason = self._compared(distribution, reference, found, noise)
        if reason and self._few_rows:
            reference = self._moved_again(reference, self._drawn(distribution))
            self._references[distribution] = reference
            pair, reason = self._compared(distribution, reference, found, noise)
        return pair, reason

    def _whole_own(self, distribution: str) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Return what the original gives for inputs that do not repeat; of 16 bits, in float32 too."""
        if distribution not in self._wholes:
            inputs = self._whole_inputs(distribution)
            with self._drawing():
                own = run_reference(self.original, inputs)
            wide: list[torch.Tensor] = []
            if self._halves and distribution == _USUAL:
                with self._drawing():
                    wide = run_reference(self.original, inputs, dtype_override=torch.float32)
            self._wholes[distribution] = (own, wide)
        return self._wholes[distribution]

    def _whole_inputs(self, distribution: str) -> list[torch.Tensor]:
        with suitable():
            return draw_inputs(self.original, distribution, self.seed + 1, self.device)

    def _checked_whole(self, run_candidate: RunCandidate, distribution: str) -> str:
        """Hold results for inputs that do not repeat against the original's: no position stands for others."""
        few = self._references[distribution]
        if isinstance(few, str):
            return ""
        try:
            own, wide = self._whole_own(distribution)
        except (RuntimeError, ValueError, IndexError):
            if not self._refuses:
                raise
            return ""  # an operator refuses these operands, if not those of the few rows
        found, reason = self._found(run_candidate, self._whole_inputs(distribution))
        if reason:
            return reason
        with suitable():
            if wide:
                near = _Reference(wide, own, own, {}, self._all, own)
                reason = _other_noise(near, found) or _off_together(near, found)
            rows = [] if reason else _strays(few, own, found)
            if rows is None or any(len(r) for r in rows):
                inputs = self._whole_inputs(distribution)
                exact, moved = self._twice(self._all, inputs)
                count = len(own)
                reference = _Reference(exact[:count], moved[:count], own, {}, self._all, own)
                _, reason = _worst(reference, found)
                if reason and self._few_rows:
                    reference = self._moved_again(reference, _Drawn(inputs, lambda: inputs))
                    _, reason = _worst(reference, found)
        return reason and f"{distribution} inputs, all of them: {reason}"

    def _compared(
        self, distribution: str, reference: "_Reference", found: list[torch.Tensor], noise: bool
    ) -> tuple[tuple[float, float], str]:
        """Return the errors of the original and the candidate, and what is wrong."""
        with suitable():
            part = reference.part.outputs(found)
            pair, reason = _worst(reference, part)
            if reason.endswith(_NOT_FINITE) and not reference.part.few:
                drawn = self._drawn(distribution)
                pair, reason = _worst(self._by_chance(reference, drawn.inputs()), part)
            if not reason and noise:
                reason = _other_noise(reference, part) or _off_together(reference, part)
            if not reason and reference.part.few:
                own = reference.part.all_outputs(reference.own) if self._repeats else reference.all
                rows = _strays(reference, own, found)
                if rows is None or not self._right_there(distribution, own, found, rows):
                    reason = "is far from the original"
            return pair, reason

    def _right_there(
        self,
        distribution: str,
        own: list[torch.Tensor],
        found: list[torch.Tensor],
        rows: list[torch.Tensor],
    ) -> bool:
        """Say whether a candidate errs as little as the original in some rows, as far as these can be had alone."""
        if not any(len(r) for r in rows):
            return True
        sliced = self._slices[self._all.graph]
        if self._repeats or self._picks or sliced is None or not sliced.whole_rows:
            return False
        wanted = sliced.steps_of(rows)
        if len(wanted) > _MOST_SLICES * len(sliced.starts):
            return False
        exact, moved = self._twice(self._all, self._drawn(distribution).inputs(), wanted)
        there, apart = sliced.of(own, wanted), sliced.of(found, wanted)
        return not _worst(_Reference(exact, moved, there, {}, self._all, own), apart)[1]

    def _drawing(self) -> AbstractContextManager[None]:
        """Let programs that draw random numbers all draw the same ones."""
        return generators(self.device, self.seed)

    def _drawn(self, distribution: str) -> "_Drawn":
        """Draw the inputs of a test, and those of what is left of the original."""
        if not self._repeats:
            inputs = draw_inputs(self.original, distribution, self.seed, self.device)
            return _Drawn(self._part.inputs(inputs), lambda: inputs)
        left = drawn_as(self.original, self._part.graph, distribution, self.seed, self.device)

        def again() -> list[torch.Tensor]:
            pairs = zip(self._part.all_inputs(left), self.original.inputs, strict=True)
            return [strided(x, node.tensor) for x, node in pairs]

        return _Drawn(left, again)

    def _reference(self, distribution: str, drawn: "_Drawn") -> "_Reference | str":
        """Return what the original gives, or why it gives nothing.

        An operator may refuse operands: a Cholesky factor exists of few matrices.
        """
        if distribution not in self._references:
            try:
                exact, moved = self._twice(self._part, drawn.left)
                begun = now()
                with self._drawing():
                    if self._repeats:
                        whole = []
                        own = run_reference(self._own, drawn.left)
                    else:
                        whole = run_reference(self.original, drawn.inputs())
                        own = self._part.outputs(whole)
                # a candidate takes no longer than the original
                self._own_s = min(self._own_s or inf, self._share * worked_s(begun))
            except (RuntimeError, ValueError, IndexError) as error:
                if not self._refuses and distribution != INFINITE:
                    raise
                self._references[distribution] = f"{type(error).__name__}: {error}"
            else:
                count = len(own)
                beside = iter(exact[count:])
                found: dict[int, Pick] = {}
                for index, picked in self._picks.items():
                    pick = picked.pick(exact[index], [next(beside) for _ in picked.nodes()])
                    if pick is not None:
                        found[index] = pick
                self._references[distribution] = _Reference(
                    exact[:count],
                    moved[:count],
                    own,
                    found,
                    self._part,
                    whole,
                    distribution == INFINITE and not self._masks,
                )
        return self._references[distribution]

    def _twice(
        self, part: Alike, given: list[torch.Tensor], wanted: list[list[int]] | None = None
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Run what is left of the original in float64, without rounding errors and with them; or `wanted` slices."""
        rounding = Rounding(self.device, self.seed)
        double = TorchDomain(torch.float64, self.device)
        with suitable():
            exact = self._in_float64(part.graph, given, double, wanted)
            moved = rounding.all_moved(part.graph, given)
            return exact, self._in_float64(part.graph, moved, rounding, wanted)

    def _whole(self, reference: "_Reference", distribution: str) -> "_Reference":
        inputs = self._drawn(distribution).inputs()
        exact, moved = self._twice(self._all, inputs)
        own = reference.all or run_reference(self.original, inputs)
        return replace(reference, exact=exact, moved=moved, own=own, part=self._all)

    def _moved_again(self, reference: "_Reference", drawn: "_Drawn") -> "_Reference":
        """Return the reference with outputs of a few rows as far off as rounding takes them in several draws.

        Many rows tell together how far rounding goes; the errors of one number may cancel.
        """
        graph, moved = reference.part.graph, list(reference.moved)
        given = drawn.left if reference.part.few else drawn.inputs()
        for draw in range(_MORE_DRAWS):
            rounding = Rounding(self.device, self.seed + 1 + draw)
            found = self._in_float64(graph, rounding.all_moved(graph, given), rounding)
            for i, (e, m, f) in enumerate(zip(reference.exact, moved, found, strict=False)):
                if e.is_floating_point() and rows_of(self.original.outputs[i]) < _ENOUGH_ROWS:
                    moved[i] = torch.where((f - e).abs() > (m - e).abs(), f, m)
        return replace(reference, moved=moved)

    def _by_chance(self, reference: "_Reference", inputs: list[torch.Tensor]) -> "_Reference":
        """Return the reference with NaN where the original is finite by luck only.

        There another order of sums overflows, other roundings do (equal ones may cancel before an
        exponential), or the quotient of two numbers that are too small for their type is none.
        """
        back = Rounding(self.device, self.seed, -1.0)
        graph = reference.part.graph
        exact = self._in_float64(graph, inputs, Edges(self.device))[: len(reference.own)]
        other = self._in_float64(graph, back.all_moved(graph, inputs), back)
        for i, (e, m, o) in enumerate(zip(exact, reference.moved, other, strict=False)):
            if e.is_floating_point():
                exact[i] = e.masked_fill(~(m.isfinite() & o.isfinite()), float("nan"))
        return replace(reference, exact=exact)

    def _in_float64(
        self,
        graph: Graph,
        inputs: Sequence[torch.Tensor],
        domain: Domain[Any],
        wanted: list[list[int]] | None = None,
    ) -> list[torch.Tensor]:
        """Run the original, and what it picks from, or what is left of it, in a domain of float64."""
        wide = [_in_double(x) if x.is_floating_point() else x for x in inputs]
        with self._drawing():
            return evaluate(graph, self._slices[graph], wide, domain, wanted)


@final
@dataclass(frozen=True, slots=True)
class _Reference:
    """What the original gives: in float64, there with rounding errors, and at its own precision.

    All for a `part` of it; `all` its results as a whole, where they were computed. `telling`: what is rightly
    infinite or NaN may be no number.
    """

    exact: list[torch.Tensor]
    moved: list[torch.Tensor]
    own: list[torch.Tensor]
    picks: "dict[int, Pick]"
    part: Alike
    all: list[torch.Tensor]
    telling: bool = False


@final
@dataclass(frozen=True, slots=True)
class _Drawn:
    """Inputs of what is left of the original, and a function that returns those of the programs."""

    left: list[torch.Tensor]
    inputs: Callable[[], list[torch.Tensor]]


def verify_float(
    original: Graph,
    run_candidate: RunCandidate,
    *,
    seed: int,
    device: torch.device | str = "cpu",
) -> FloatVerdict:
    """Compare one candidate's error with the original's own on every distribution."""
    return FloatTest(original, seed=seed, device=device).check(run_candidate)


def on(x: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    """Return a copy of a tensor on `device`, laid out the same."""
    return duplicate(x, device)


def _shape_mismatch(original: Graph, found: list[torch.Tensor]) -> str:
    if len(original.outputs) != len(found):
        return f"{len(found)} outputs, not {len(original.outputs)}"
    for index, (node, x) in enumerate(zip(original.outputs, found, strict=True)):
        shape, dtype = node.shape, DTYPES[node.tensor.dtype]
        if x.shape != shape or x.dtype != dtype:
            return f"output {index} is {x.dtype}{tuple(x.shape)}, not {dtype}{shape}"
    return ""


def _worst(reference: _Reference, found: list[torch.Tensor]) -> tuple[tuple[float, float], str]:
    worst_own = worst_found = 0.0
    own = reference.own
    rows = zip(reference.exact, reference.moved, own, found, strict=True)
    for index, (e, m, o, f) in enumerate(rows):
        if o.is_complex():
            e, m, o, f = (torch.view_as_real(t).flatten(-2) for t in (e, m, o, f))
        if not o.is_floating_point():
            if torch.equal(o, f):
                continue
            pick = reference.picks.get(index)
            if pick is None or pick.differs(o, f):
                return (worst_own, float("inf")), f"output {index} differs"
            e, m, o, f = (pick.at(places) for places in (e, m, o, f))
            o = o.to(pick.dtype)
        own_error, found_error, reason = _output_errors(e, m, o, f, reference.telling)
        worst_own, worst_found = max(worst_own, own_error), max(worst_found, found_error)
        if reason:
            return (worst_own, worst_found), f"output {index} {reason}"
    return (worst_own, worst_found), ""


def _output_errors(
    exact: torch.Tensor,
    moved: torch.Tensor,
    own: torch.Tensor,
    found: torch.Tensor,
    telling: bool,
) -> tuple[float, float, str]:
    """Return the errors relative to the output's scale, and what is wrong, row by row."""
    if exact.numel() == 0:
        return 0.0, 0.0, ""
    columns = exact.shape[-1] if exact.dim() else 1
    rows = [t.reshape(-1, columns) for t in (exact, moved, own, found)]
    # a few rows at a time stay in the caches through all the steps
    pieces = [torch.split(t, max(1, _PIECE // columns)) for t in rows]
    largest = torch.finfo(own.dtype).max
    sizes = []
    for piece in zip(*pieces, strict=True):
        wide = [t.to(torch.float64) for t in piece]
        if telling and bool(
            (~(wide[0].isfinite() | wide[2].isfinite()) & wide[3].isfinite()).any()
        ):
            return 0.0, float("inf"), _FINITE
        found_sizes, reason = _row_errors(largest, *wide)
        if reason:
            return 0.0, float("inf"), reason
        sizes.append(found_sizes)
    scale, own_row, found_row, moved_row = torch.cat(sizes, dim=1)
    unit = torch.finfo(own.dtype).eps
    smallest = torch.finfo(own.dtype).tiny
    slack = SLACK_ULPS * unit * scale + smallest
    expected = own_row + moved_row
    reason = ""
    excess = found_row > ERROR_MULTIPLE * expected + slack
    if bool(excess.any()) and not _dominated(found_row, expected, scale, slack, excess):
        row = int(torch.nonzero(excess)[0])
        reason = (
            f"errs by {float(found_row[row]):.3g} in row {row} of scale {float(scale[row]):.3g}, "
            f"the original by {float(own_row[row]):.3g}"
        )
    whole = float(scale.max()) or 1.0
    return float(own_row.max()) / whole, float(found_row.max()) / whole, reason


def _row_errors(
    largest: float, e: torch.Tensor, m: torch.Tensor, o: torch.Tensor, f: torch.Tensor
) -> tuple[torch.Tensor, str]:
    """Return each row's scale and the errors of `o`, `f` and `m`, 4 x rows; or what is wrong.

    `largest`: the largest number of the output's type.
    """
    finite = torch.isfinite(o) & torch.isfinite(e)
    if bool((finite & ~torch.isfinite(f)).any()):
        return e, _NOT_FINITE
    if not bool(finite.all()):
        wrong = torch.isnan(o) & torch.isinf(f) & (e.abs() <= largest)
        if bool(wrong.any()):
            return e, "is infinite where it should be a number"
        if bool((torch.isinf(o) & (o == e) & (torch.isnan(f) | (f == -o))).any()):
            return e, "is not infinite, or has the other sign, where the original rightly is"
    zero = torch.zeros((), dtype=torch.float64, device=e.device)
    steady = finite & torch.isfinite(m)
    pairs = ((e, finite), (o - e, finite), (f - e, finite), (m - e, steady))
    return torch.stack([torch.where(kept, x.abs(), zero).amax(-1) for x, kept in pairs]), ""


def _other_noise(reference: _Reference, found: list[torch.Tensor]) -> str:
    """Say which output is rounding errors of 16 bits in the original, and other ones in the candidate.

    Compensated sums compute what a rounding took away. In float64 that is nothing, so that a candidate
    that does not round looks more accurate than the original, and is wrong.
    """
    own = reference.own
    for index, (e, o, f) in enumerate(zip(reference.exact, own, found, strict=True)):
        if not o.is_floating_point():
            continue
        e, o, f = (t.to(torch.float64) for t in (e, o, f))
        known = e.isfinite() & f.isfinite() & o.isfinite()
        # counted, since a few quotients of what nearly cancelled may be larger than all the rest together
        noisy = known & ((o - e).abs() > o.abs() / 2)
        seen = noisy & (o != 0)
        other = (noisy | (known & (o == 0))) & ((f - o).abs() > (o - e).abs() / 2)
        count, differ = int(seen.sum()), int(other.sum())
        if count > _MADE_OF_NOISE * int((known & (o != 0)).sum()) and differ > _OTHER_NOISE * count:
            return f"output {index} is made of rounding errors, and the candidate makes other ones"
    return ""


def _off_together(reference: _Reference, found: list[torch.Tensor]) -> str:
    """Say which output is off as a whole, though no number by more than 16 bits leave open.

    Rounding goes up as often as down: what its errors have in common with the results cancels, while a variance
    of n - 1 for n moves all of them the same way. And chance hardly changes their mean square: that of kernels is a
    seventh of what `moved` has, or less, in twelve searched for programs of the benchmarks.
    """
    own = reference.own
    rows = zip(reference.exact, reference.moved, own, found, strict=True)
    for index, (e, m, o, f) in enumerate(rows):
        if not o.is_floating_point() or not e.numel():
            continue
        unit = torch.finfo(o.dtype).eps
        columns = e.shape[-1] if prod(e.shape[:-1]) >= _ENOUGH_ROWS else 1
        e, m, o, f = (t.to(torch.float64).reshape(-1, columns) for t in (e, m, o, f))
        known = e.isfinite() & m.isfinite() & o.isfinite() & f.isfinite()
        e = torch.where(known, e, 0.0)
        weights = (e * e).sum(-1)
        total = weights.sum()
        # of few numbers the rest are too small to tell anything
        if not total**2 >= _ENOUGH_ROWS * (weights * weights).sum() > 0:
            continue
        sizes, biases, chances = [], [], []
        for t in (m, o, f):
            error = torch.where(known, t - e, 0.0)
            along = (error * e).sum(-1)
            bias = along.sum() / total
            sizes.append(float((error * error).sum() / total) ** 0.5)
            biases.append(abs(float(bias)))
            chances.append(float((along - bias * weights).norm() / total))
        if sizes[-1] > max(sizes[:-1]) + unit / 2:
            return f"output {index} errs by {sizes[-1]:.3g} on the whole, the original by {sizes[1]:.3g}"
        allowed = ERROR_MULTIPLE * (max(biases[:-1]) + max(chances)) + _BIAS_ULPS * unit
        if biases[-1] > allowed:
            return f"output {index} is too large or too small by {biases[-1]:.3g} on the whole"
    return ""


def sampled(whole: Graph, *, repeated: bool = False) -> Alike:
    """Leave the steps of a program whose errors foretell those of all: no fewer than tell.

    Those that may be `repeated` in its inputs, if they are few enough.
    """
    picked = alike(whole, rows=_ENOUGH_ROWS, picked=True)
    if not repeated:
        return picked
    part = alike(whole, rows=_ENOUGH_ROWS, repeated=True)
    left, least = (work(list(topological(p.graph.outputs))) for p in (part, picked))
    return part if part.few and left <= _MUCH_MORE * least else picked


def _strays(
    reference: _Reference, own: list[torch.Tensor], found: list[torch.Tensor]
) -> list[torch.Tensor] | None:
    """Return in which rows of each output a candidate is further from the original than errors at a few foretell.

    Rows are ranked by how far they are, beside their scale: as errors of all are by errors of the few. None: it is
    different, or infinite, where errors are no reason for it.
    """
    strays = []
    rows = zip(reference.exact, reference.moved, reference.own, own, found, strict=True)
    for e, m, few, o, f in rows:
        if o.is_complex():
            e, m, few, o, f = (torch.view_as_real(t).flatten(-2) for t in (e, m, few, o, f))
        if not o.is_floating_point() and not torch.equal(o, f):
            return None
        if not o.is_floating_point() or not o.numel():
            strays.append(torch.empty(0, dtype=torch.int64))
            continue
        columns = o.shape[-1] if o.dim() else 1
        known = few.isfinite() & e.isfinite() & m.isfinite()
        zero = torch.zeros((), dtype=torch.float64, device=e.device)
        values = (e, (few - e).abs() + (m - e).abs())
        size, err = (
            torch.where(known, x.abs(), zero).reshape(-1, columns).amax(-1) for x in values
        )
        expected = (err / torch.where(size > 0, size, 1.0)).sort(descending=True).values
        pieces = [torch.split(t.reshape(-1, columns), max(1, _PIECE // columns)) for t in (o, f)]
        found_sizes = []
        for wanted, given in zip(*pieces, strict=True):
            sizes = _apart(wanted, given, reference.telling)
            if sizes is None:
                return None
            found_sizes.append(sizes)
        info = torch.finfo(o.dtype)
        scale, apart = torch.cat(found_sizes, dim=1).double()
        ranked, order = (apart / torch.where(scale > 0, scale, 1.0)).sort(descending=True)
        # the k-th of all beside the (k/2)-th of as many as these are of the few
        places = (
            torch.arange(len(ranked), device=ranked.device) * len(expected) // (2 * len(ranked))
        )
        allowed = (ERROR_MULTIPLE + 1.0) * expected[places] + SLACK_ULPS * info.eps
        beyond = torch.nonzero(ranked > allowed)
        # and those that are further away, so that the ranks of all others are as they were
        strays.append(order[: int(beyond[-1]) + 1 if len(beyond) else 0].cpu())
    return strays


def _apart(own: torch.Tensor, found: torch.Tensor, telling: bool) -> torch.Tensor | None:
    """Return each row's scale and how far `found` is from it, 2 x rows; None where only one is finite."""
    if own.dtype.itemsize < 4:
        own, found = own.float(), found.float()
    sizes = torch.stack([own.abs().amax(-1), (found - own).abs_().amax(-1)])
    if bool(sizes.isfinite().all()):
        return sizes
    finite = own.isfinite()
    if bool((finite & ~found.isfinite()).any() | (own.isnan() & found.isinf()).any()):
        return None
    if bool((own.isinf() & (found.isnan() | (found == -own))).any()):
        return None
    if telling and bool((~finite & found.isfinite()).any()):
        return None
    zero = own.new_zeros(())
    values = (own, found - own)
    return torch.stack([torch.where(finite, x.abs(), zero).amax(-1) for x in values])


def _dominated(
    found: torch.Tensor,
    expected: torch.Tensor,
    scale: torch.Tensor,
    slack: torch.Tensor,
    excess: torch.Tensor,
) -> bool:
    """Say whether no more rows err much than the original has, though it may be other ones.

    Where a program is ill-conditioned in a few rows (a softmax between two nearly equal large
    scores), chance decides in which of them an error shows. The errors relative to the rows' scales are
    ranked: the candidate's k-th largest may be a multiple of the (k/2)-th largest expected one.
    """
    size = torch.where(scale > 0, scale, torch.ones_like(scale))
    expected_sizes = (expected / size).sort(descending=True).values
    order = (found / size).argsort(descending=True)
    half = expected_sizes[torch.arange(len(found)) // 2]
    allowed = torch.empty_like(found)
    allowed[order] = ERROR_MULTIPLE * half * size[order]
    return not bool((found > allowed + slack)[excess].any())
