"""The clock: compiles candidates and times them against each other.

In: block graphs and kernel graphs that the search proposes. Out: seconds, infinity for what does not
compile, run, or agree with its own meaning. Compilation is parallel; timing is alone, interleaved,
and by medians, so that a slow moment of the machine meets every candidate alike.
Times while other programs kept our threads waiting do not count, if there are others.
"""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import cycle
from math import inf, prod
from statistics import median
from typing import Final, final

import numpy as np
import torch

from superopt.backends import Backend, Entry, Timer, wall
from superopt.codegen.errors import CodegenError, CompileError
from superopt.ir.check import verify_graph
from superopt.ir.errors import GraphError, SuperoptError
from superopt.ir.graph import Graph, Level
from superopt.ir.node import Node, topological
from superopt.ir.ops import contraction, elementwise, tile
from superopt.ir.ops.registry import OpKind
from superopt.ir.semantics import expand
from superopt.ir.target import Target
from superopt.ir.tiles import dim_sources
from superopt.ir.types import TensorType
from superopt.plan import KernelSource
from superopt.runtime import Program, build_program
from superopt.verify.inputs import PERIOD, repeated, strided
from superopt.verify.opaque import span, spread
from superopt.verify.ranges import draw_integers, integer_ranges
from superopt.verify.reference import DTYPES, run_reference
from superopt.verify.slices import alike
from superopt.verify.threads import suitable, waited_s

logger = logging.getLogger("superopt")

_SAMPLE_S: Final = 1e-3
"""For how long a call is timed at once: longer than it takes to ask how long threads have waited."""
_ROUNDS: Final = 9
_FEW: Final = 3
"""How many rounds at least, however late it is, if there is something to choose between."""
_VERY_LONG_S: Final = 0.2
"""Of calls that take so long one more round is enough: little disturbs them by much."""
_MORE: Final = 8
"""How many times as many rounds there may be where other programs disturb, while there is time."""
_LONG_S: Final = 0.02
_STEADY: Final = 1.03
"""By how much times of calls that take long differ where some tell as much as many."""
_DISTURBED: Final = 0.1
"""The share of a call's time for which our threads waited for a processor that makes it a disturbed one."""
_HOPELESS: Final = 1.6
_CLEARLY: Final = 1.25
"""The same of calls that take long: chance moves them less, and one time more of them costs more."""
_LOST: Final = 3.0
"""How much slower than another a call that takes long must be for one time to be enough."""
_ERRS_ALIKE: Final = 2.0
_TOLERANCE: Final = 2e-2
_ROWS_SEEN: Final = 16
"""Rows at which a kernel's results are looked at, at least."""
_PIECE: Final = 1 << 17
_PATIENCE_S: Final = 15.0
_KERNEL_S: Final = 0.2
"""For how long a kernel is timed: one of 50 ms six times, one of 10 ms as often as any."""

_SAME: Final = (elementwise.CAST, tile.LOAD)
"""What gives the elements of its operand; so does all that moves them."""
_Operand = tuple[int, TensorType, int]
"""Random operands: of which input, of which type, and over how many of its elements products sum."""


@final
@dataclass(frozen=True, slots=True)
class Compiled:
    """One kernel that runs here, with the source that it came from and its time."""

    source: KernelSource
    entry: Entry
    seconds: float


def interleaved(
    calls: Sequence[Callable[[], object]],
    *,
    limit_s: float = 1.0,
    rounds: int = _ROUNDS,
    timed: Timer = wall,
) -> list[float]:
    """Return the seconds of each call, all called in turn; hopeless ones are dropped early.

    Other programs come and go: for what they disturb there are more rounds, for up to `limit_s`.
    """
    if not calls:
        return []
    end = time.perf_counter() + limit_s
    repeats: list[int] = []
    samples = [_Samples() for _ in calls]
    lost: set[int] = set()
    for number, (call, own) in enumerate(zip(calls, samples, strict=True)):
        waited = waited_s()
        once = timed(call, 1)
        if once >= _LONG_S and waited_s() - waited <= _DISTURBED * once:
            lost.add(number)  # if another takes that much less
        if once < _LONG_S:  # what takes long does not wait for caches
            once = timed(call, 1)
        repeats.append(max(1, int(_SAMPLE_S / max(once, 1e-7))))
        own.first = once
    best = min(own.first for own in samples)
    alive = [i for i in range(len(calls)) if i not in lost or samples[i].first <= _LOST * best]
    for number in range(_MORE * rounds):
        over = time.perf_counter() > end
        best = min(own.seconds() for own in samples)
        if over or number >= (1 if best >= _LONG_S else 2):
            alive = [i for i in alive if not samples[i].hopeless(best, over)]
        few = _FEW if min(own.seconds() for own in samples) < _VERY_LONG_S else 1
        if over and (number >= few or len(alive) < 2):
            break
        if all(len(samples[i].calm) >= rounds or samples[i].settled() for i in alive):
            break
        for i in alive:
            waited = waited_s()
            taken = timed(calls[i], repeats[i])
            samples[i].add(taken, waited_s() - waited > _DISTURBED * taken * repeats[i])
    return [own.seconds() for own in samples]


@final
@dataclass(slots=True)
class _Samples:
    """Times of a call: the first, those while no other program had our processors, and the rest."""

    first: float = inf
    calm: list[float] = field(default_factory=list)
    disturbed: list[float] = field(default_factory=list)

    def add(self, seconds: float, disturbed: bool) -> None:
        (self.disturbed if disturbed else self.calm).append(seconds)

    def seconds(self) -> float:
        """Return the median of calm times; of others a low one, since these are too long and none too short."""
        if self.calm:
            return median(self.calm)
        return sorted([self.first, *self.disturbed])[len(self.disturbed) // 4]

    def settled(self) -> bool:
        """Say whether a call that takes long took as long every time."""
        long = min(self.calm, default=0.0)
        enough = _FEW if long < _VERY_LONG_S else _FEW - 1
        return len(self.calm) >= enough and _LONG_S < max(self.calm) < _STEADY * long

    def hopeless(self, best: float, over: bool) -> bool:
        """Say whether another round would not help; in a disturbed moment that is not known."""
        most = _CLEARLY if best >= _LONG_S else _HOPELESS
        return bool(self.calm or over) and self.seconds() > most * best


@final
@dataclass(slots=True)
class Clock:
    """The search's measurer: compiles with one backend, times on this machine.

    `inputs` are the caller's own tensors for programs over the original graph's inputs; other graphs
    get random ones, for which every kernel's result is compared with the reference executor.
    A graph that the graph checker refuses is not compiled; its violations are among the failures.
    `refused` is the last kernel that the compiler did not take. Compilers are not waited for past
    `deadline` (of `time.monotonic`) but for `patience_s` in all, so that a short budget finds something;
    `late` kernels were not ready by then.

    A program that reads more than the `target`'s caches hold finds its weights in memory at every
    call. Timed over and over, a part of it would find its own in a cache: large operands are
    then taken from several copies in turn.
    """

    backend: Backend
    inputs: Mapping[Node, torch.Tensor]
    seed: int = 0
    target: Target = field(default_factory=Target)
    deadline: float = inf
    patience_s: float = field(default_factory=lambda: _PATIENCE_S)
    compiled: dict[str, Compiled] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    refused: CompileError | None = None
    late: int = 0
    _random: dict[_Operand, torch.Tensor] = field(default_factory=dict)
    _copies: dict[_Operand, list[torch.Tensor]] = field(default_factory=dict)

    @property
    def device(self) -> torch.device:
        """Where programs run and are tested."""
        return self.backend.device

    # -- kernels -------------------------------------------------------------------------------

    def prepare(self, graphs: Sequence[Graph]) -> None:
        """Compile block graphs that will be timed, together; the backend keeps what it compiled."""
        sources = [s for g in graphs if self._legal(g) for s in self.backend.variants(g, 1)]
        self._load([s for s in sources if isinstance(s, KernelSource)])

    def kernels(self, graphs: Sequence[Graph]) -> list[float]:
        """Return seconds per block graph, all timed in turn; inf for one that does not compile, run or agree.

        One that was timed before is timed again: times of two calls are of two moments of the machine.
        """
        legal = [g for g in graphs if self._legal(g)]
        fresh = [g for g in legal if g.digest() not in self.compiled]
        wanted: list[tuple[Graph, KernelSource]] = []
        for graph in fresh:
            for source in self.backend.variants(graph, 1):
                if isinstance(source, CodegenError):
                    self._failed(graph, source)
                else:
                    wanted.append((graph, source))
        known = [(g, self.compiled[g.digest()]) for g in legal if g not in fresh]
        ready = [(g, c.source, c.entry) for g, c in known]
        entries = self._load([s for _, s in wanted])
        for (graph, source), entry in zip(wanted, entries, strict=True):
            if isinstance(entry, CodegenError):
                self._failed(graph, entry)
            else:
                ready.append((graph, source, entry))
        times = interleaved(
            [self._call(g, e) for g, _, e in ready],
            limit_s=_KERNEL_S * len(ready),
            timed=self.backend.timed,
        )
        ranked = sorted(zip(times, ready, strict=True), key=lambda pair: pair[0])
        for position, (_, (graph, _, entry)) in enumerate(ranked):
            if graph not in fresh or self._agrees(graph, entry):
                for late_s, (late, late_source, late_entry) in ranked[position:]:
                    self.compiled[late.digest()] = Compiled(late_source, late_entry, late_s)
                break
        found = (self.compiled.get(g.digest()) for g in graphs)
        return [inf if c is None else c.seconds for c in found]

    def _load(self, sources: Sequence[KernelSource]) -> list[Entry | CodegenError]:
        started = time.monotonic()
        entries = self.backend.load(sources, max(self.patience_s, self.deadline - started))
        late_s = time.monotonic() - max(started, self.deadline)
        self.patience_s = max(0.0, self.patience_s - max(0.0, late_s))
        return entries

    def _legal(self, graph: Graph) -> bool:
        try:
            verify_graph(graph)
        except GraphError as error:
            self._failed(graph, error)
            return False
        return True

    def _failed(self, graph: Graph, error: SuperoptError) -> None:
        self.failures.append(f"{graph.name} {graph.digest()[:12]}: {error}")
        if isinstance(error, CompileError) and error.in_time:
            self.refused = error
        elif isinstance(error, CompileError):
            self.late += 1
        logger.debug("kernel %s dropped: %s\n%s", graph.name, error, graph)

    def tune(self, graph: Graph, count: int) -> Compiled | None:
        """Time up to `count` configurations of one kernel, keep the fastest that agrees."""
        known = self.compiled.get(graph.digest())
        sources = [s for s in self.backend.variants(graph, count) if isinstance(s, KernelSource)]
        entries = self._load(sources)
        loaded = [
            (s, e) for s, e in zip(sources, entries, strict=True) if not isinstance(e, CodegenError)
        ]
        if not loaded:
            return known
        calls = [self._call(graph, e) for _, e in loaded]
        times = interleaved(calls, limit_s=_KERNEL_S * len(calls), timed=self.backend.timed)
        for seconds, (source, entry) in sorted(
            zip(times, loaded, strict=True), key=lambda pair: pair[0]
        ):
            if self._agrees(graph, entry):
                best = Compiled(source, entry, seconds)
                self.compiled[graph.digest()] = best
                return best
        return known

    def keep_denormals(self, graph: Graph) -> dict[str, Compiled]:
        """Compile the kernels of a program anew that take denormal numbers for 0; return what they were."""
        wanted: list[tuple[str, KernelSource]] = []
        for block in blocks(graph):
            source = self.compiled[block.digest()].source
            kept = self.backend.with_denormals(block, source)
            if kept is not None:
                wanted.append((block.digest(), kept))
        replaced: dict[str, Compiled] = {}
        entries = self._load([source for _, source in wanted])
        for (digest, source), entry in zip(wanted, entries, strict=True):
            if not isinstance(entry, CodegenError):
                replaced[digest] = self.compiled[digest]
                self.compiled[digest] = replace(replaced[digest], source=source, entry=entry)
        return replaced

    def _call(self, graph: Graph, entry: Entry) -> Callable[[], object]:
        operands = self._in_turn(_operands(graph))
        results = [_poisoned(o.tensor, self.device) for o in graph.outputs]
        addresses = cycle([[t.data_ptr() for t in (*each, *results)] for each in operands])
        held = (operands, results)

        def call() -> object:
            entry(*next(addresses))
            return held

        return call

    def _in_turn(self, wanted: Sequence[_Operand]) -> list[list[torch.Tensor]]:
        """Return operands for one call after the other: large ones are not in a cache again yet."""
        first = [self._operand(w) for w in wanted]
        large = [t.nbytes >= self.target.inner_cache_bytes for t in first]
        read = sum(t.nbytes for t in self.inputs.values())
        if read <= self.target.outer_cache_bytes or not any(large):
            return [first]
        size = sum(t.nbytes for t, is_large in zip(first, large, strict=True) if is_large)
        # kept while one kernel is timed: those of a program of many weights would fill the memory
        self._copies = {w: c for w, c in self._copies.items() if w in wanted}
        turns = [first]
        for number in range(2 * self.target.outer_cache_bytes // size):
            copies = [
                self._copy(w, number) if is_large else tensor
                for w, tensor, is_large in zip(wanted, first, large, strict=True)
            ]
            turns.append(copies)
        return turns

    def _copy(self, wanted: _Operand, number: int) -> torch.Tensor:
        copies = self._copies.setdefault(wanted, [])
        while len(copies) <= number:
            source = self._operand(wanted)
            storage = source.untyped_storage().clone()  # type: ignore[no-untyped-call]
            layout = (source.storage_offset(), source.shape, source.stride())
            copies.append(
                torch.empty(0, dtype=source.dtype, device=self.device).set_(storage, *layout)
            )
        return copies[number]

    def _operand(self, wanted: _Operand) -> torch.Tensor:
        if wanted not in self._random:
            position, kind, length = wanted
            seed = self.seed + position
            self._random[wanted] = random_tensor(kind, seed, self.device, length=length)
        return self._random[wanted]

    def _agrees(self, graph: Graph, entry: Entry) -> bool:
        operands = [self._operand(w) for w in _operands(graph)]
        results = [_poisoned(o.tensor, self.device) for o in graph.outputs]
        try:
            with suitable():
                # what a kernel writes elsewhere the test of the whole program sees
                part = alike(expand(graph), rows=_ROWS_SEEN, picked=True)
                few = part.graph if part.few else graph
                placed = self._placed(graph, operands)
                try:
                    expected = run_reference(few, part.inputs(placed))
                except (RuntimeError, IndexError):  # what is made of a place may be none
                    placed = operands
                    expected = run_reference(few, part.inputs(placed))
            entry(*(t.data_ptr() for t in (*placed, *results)))
            with suitable():
                found = part.outputs(results)
                agree = all(close(r, e) for r, e in zip(found, expected, strict=True))
                if not agree:
                    inputs = part.inputs(placed)
                    exact = run_reference(few, inputs, dtype_override=torch.float64)
                    agree = all(map(errs_alike, found, expected, exact))
        except SuperoptError as error:
            self._failed(graph, error)
            return False
        if agree:
            return True
        self._failed(graph, CodegenError("its result differs from its meaning"))
        return False

    def _placed(self, graph: Graph, operands: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Return operands whose indices are of places all over: zeros do not tell which was read."""
        placed = list(operands)
        # a GPU does not go on behind a place that is none
        if self.device.type != "cpu" or all(i.tensor.dtype.is_float for i in graph.inputs):
            return placed
        ranges = integer_ranges(graph)
        source = np.random.default_rng(self.seed)
        for position, node in enumerate(graph.inputs):
            kind, drawn = node.tensor, ranges[node.attrs.name]
            if kind.dtype.is_integer and drawn.low >= 0:
                places = draw_integers(source, (min(kind.elements, PERIOD),), drawn)
                values = torch.from_numpy(places).to(self.device, DTYPES[kind.dtype])
                placed[position] = strided(repeated(values, kind.shape), kind)
        return placed

    # -- programs ------------------------------------------------------------------------------

    def programs(self, graphs: Sequence[Graph]) -> list[float]:
        """Return seconds per kernel graph, timed against each other in turn."""
        seconds = [inf] * len(graphs)
        calls: list[tuple[int, Callable[[], object]]] = []
        for i, graph in enumerate(graphs):
            if not self._legal(graph):
                continue
            try:
                call = self._program_call(graph)
                call()
            except SuperoptError as error:
                self._failed(graph, error)
                continue
            calls.append((i, call))
        with torch.no_grad():
            times = interleaved(
                [c for _, c in calls], limit_s=0.8 * len(calls), timed=self.backend.timed
            )
        for (i, _), taken in zip(calls, times, strict=True):
            seconds[i] = taken
        return seconds

    def program(self, graph: Graph) -> Program:
        """Build the program of a kernel graph whose kernels are compiled already."""
        return self._program(graph, self._inputs(graph))

    def run(self, graph: Graph, tensors: list[torch.Tensor]) -> Sequence[torch.Tensor]:
        """Return the results of a kernel graph for these tensors."""
        return self._program(graph, tensors).run(*tensors)

    def _program(self, graph: Graph, tensors: Sequence[torch.Tensor]) -> Program:
        self.ensure(graph)
        entries = {d: c.entry for d, c in self.compiled.items()}
        strides = [t.stride() for t in tensors]
        return build_program(graph, entries, strides=strides, device=self.device)

    def ensure(self, graph: Graph) -> None:
        """Compile the kernels of `graph` that are not compiled yet."""
        missing = [b for b in blocks(graph) if b.digest() not in self.compiled]
        if missing:
            self.kernels(missing)

    def _program_call(self, graph: Graph) -> Callable[[], object]:
        program = self.program(graph)
        if any(node in self.inputs for node in graph.inputs):
            tensors = self._inputs(graph)
            return lambda: program.run(*tensors)
        turns = cycle(self._in_turn(_operands(graph)))
        return lambda: program.run(*next(turns))

    def _inputs(self, graph: Graph) -> list[torch.Tensor]:
        pairs = zip(graph.inputs, _operands(graph), strict=True)
        return [self.inputs[n] if n in self.inputs else self._operand(w) for n, w in pairs]


def blocks(graph: Graph) -> list[Graph]:
    """Return the block graphs of a program's kernels."""
    return [n.attrs.graph for n in topological(graph.outputs) if n.op.kind is OpKind.GRAPH]


def _operands(graph: Graph) -> list[_Operand]:
    lengths = contracted(graph)
    return [(i, n.tensor, lengths.get(i, 1)) for i, n in enumerate(graph.inputs)]


def contracted(graph: Graph) -> dict[int, int]:
    """Return over how many elements products sum, for the inputs that are their right operands."""
    sources = dim_sources(graph) if graph.level is Level.BLOCK else {}
    positions = {node: i for i, node in enumerate(graph.inputs)}
    found: dict[int, int] = {}

    def meet(node: Node, length: int) -> None:
        while node.inputs and (node.op.kind is OpKind.STRUCTURAL or node.op in _SAME):
            node = node.inputs[0]
        if node in positions:
            position = positions[node]
            found[position] = max(length, found.get(position, 1))

    for node in graph.nodes():
        if node.op is contraction.MATMUL:
            right = node.inputs[1]
            along = sources[right][-2] if right in sources else None
            axes = {name for name, _ in along.map.axes} if along else set()
            loops = (a.count for a in graph.loops if a.name in axes)
            meet(right, right.shape[-2] * prod(loops))
        elif node.op.kind is OpKind.GRAPH:
            for position, length in contracted(node.attrs.graph).items():
                meet(node.inputs[position], length)
    return found


def random_tensor(
    wanted: TensorType, seed: int, device: torch.device | str = "cpu", *, length: int = 1
) -> torch.Tensor:
    """Return a random tensor of a type, strides included; integers are zero, so that they can index.

    Sizes lie between 1/2 and 3/2: what is small by chance, and divided by, would make large numbers, whose
    exponentials are denormal, and those take a processor a hundred cycles. For the same reason they are less where
    products sum over a `length`: gates of large numbers are 0, their quotients anything.
    """
    generator = torch.Generator(device).manual_seed(seed)
    dtype = DTYPES[wanted.dtype]
    shape, strides = wanted.shape, wanted.strides
    # elements may share memory: all of a table for each of many rows
    shares = strides is not None and 0 < span(shape, strides) < wanted.elements
    if shares and strides is not None:
        shape = (span(shape, strides),)
    if wanted.dtype.is_float:
        values = torch.rand(min(prod(shape), PERIOD), generator=generator, device=device) * 2 - 1
        values = ((values + values.sign() * 0.5) * length**-0.5).to(dtype)
        values = repeated(values, shape)
    elif dtype is torch.bool:
        values = torch.rand(shape, generator=generator, device=device) < 0.8
    else:
        values = torch.zeros(shape, dtype=dtype, device=device)
    if strides is None:
        return values
    return values.as_strided(wanted.shape, strides) if shares else spread(values, strides)


def _poisoned(wanted: TensorType, device: torch.device) -> torch.Tensor:
    """Return memory for a result in which nothing right stands yet."""
    dtype = DTYPES[wanted.dtype]
    if wanted.dtype.is_float:
        return torch.full(wanted.shape, float("nan"), dtype=dtype, device=device)
    return torch.full(wanted.shape, 1, dtype=dtype, device=device)


def close(result: torch.Tensor, expected: torch.Tensor) -> bool:
    """Say whether a result is what it should be up to rounding."""
    # where a row's products cancel, one rounding in the result's type on the way shows whole
    step = torch.finfo(expected.dtype).eps if expected.is_floating_point() else 0.0
    share = agreeing(result, expected, _TOLERANCE, step)
    rounded = expected.is_floating_point() or expected.is_complex()
    return share == 1.0 if rounded else share > 1 - _TOLERANCE


def errs_alike(result: torch.Tensor, expected: torch.Tensor, exact: torch.Tensor) -> bool:
    """Say whether a result is not much farther from the exact one than what rounding at every step gives.

    A square root of what cancels may be far from both.
    """
    if not expected.is_floating_point():
        return close(result, expected)
    errs, may = ((t.double() - exact.double()).abs().max() for t in (result, expected))
    return bool(errs <= _ERRS_ALIKE * may)


def agreeing(
    result: torch.Tensor, expected: torch.Tensor, tolerance: float, step: float = 0.0
) -> float:
    """Return the share of elements that are as expected, within a tolerance beside the mean magnitude.

    Or within a `step` of the largest magnitude in their row.
    """
    if not expected.numel():
        return 1.0
    if expected.is_complex():
        return agreeing(torch.view_as_real(result), torch.view_as_real(expected), tolerance)
    if not expected.is_floating_point():
        return float((result == expected).double().mean())
    # a piece at a time stays in a cache through all the steps
    width = expected.shape[-1] if expected.dim() and expected.shape[-1] <= _PIECE else 1
    pieces = [
        torch.split(t.reshape(-1, width), max(1, _PIECE // width)) for t in (result, expected)
    ]
    sums = [_magnitudes(e) for e in pieces[1]]
    count = sum(n for _, n in sums)
    scale = sum(s for s, _ in sums) / count if count else 1.0
    near = 0
    for found, exact in zip(*pieces, strict=True):
        wide = (found.double(), exact.double())
        near += int(_near(*wide, tolerance, tolerance * scale, step).sum())
    return near / expected.numel()


def _near(
    found: torch.Tensor, exact: torch.Tensor, tolerance: float, least: float, step: float
) -> torch.Tensor:
    known = exact.isfinite()
    own = torch.where(known, exact.abs(), 0.0)
    allowed = torch.maximum(tolerance * own + least, step * own.amax(-1, keepdim=True))
    within = known & ((found - exact).abs() <= allowed)
    return within | (found == exact) | (found.isnan() & exact.isnan())


def _magnitudes(values: torch.Tensor) -> tuple[float, int]:
    """Return the sum of the magnitudes of what is finite, and how many these are."""
    magnitudes = values.double().abs()
    known = magnitudes.isfinite()
    if not bool(known.all()):
        magnitudes = magnitudes[known]
    return float(magnitudes.sum()), magnitudes.numel()
