"""The pipeline: the only place that knows every stage, from a lifted program to a proven plan.

In: a kernel graph, the tensors of one call, the original to compare with, `Options`. Out: a `Plan`, from the
cache where it holds one for the same program, machine, versions and options. A plan's program is None
where nothing faster was proven: the original runs then.
"""

import hashlib
import json
import logging
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, replace
from functools import cache
from math import inf
from pathlib import Path
from typing import Any, Final, Literal, final

import torch
from torch.utils import _pytree as pytree

import superopt
from superopt.backends import NAMES, Backend, backend_named, current
from superopt.cache import Cache, default_folder, key_of
from superopt.calibrate import machine, target_name
from superopt.codegen.cpu.compile import runtime_digest
from superopt.codegen.errors import CodegenError, NoCompiler
from superopt.errors import PlanError, Unsupported, unknown
from superopt.ir.graph import Graph
from superopt.ir.text import print_graph
from superopt.measure import Clock, agreeing, blocks, close, interleaved
from superopt.plan import KernelSource, OutputSpec, Plan
from superopt.runtime import Program, build_program, store_tensor, with_layouts, with_result_layouts
from superopt.search.driver import LAST_S, Event, SearchResult, search
from superopt.verify.certificate import certify
from superopt.verify.draws import draws, generators
from superopt.verify.equivalence import Verdict, verify_field
from superopt.verify.floating import FloatTest, FloatVerdict
from superopt.verify.reference import run_reference

logger = logging.getLogger("superopt")

OnEvent = Callable[[Event], None]
_CONFIGURATIONS: Final = 6
_TUNING_S: Final = 3.0
"""What it takes to compile and time them, before that is known."""
_GAIN: Final = 0.99
_STRICT_BOUND: Final = 2.0**-120
_SMALL_BYTES: Final = 1 << 12
_DIFFERENCE: Final = 2e-2
"""How far original and plan may differ, and in how many elements: rounding decides about steps and places of
maxima. Another program differs in more."""
_MOST_ROUNDING: Final = 1e-1
_SAMPLE: Final = 1 << 20
_NO_COMPILER: Final = "no compiler"
_SHORT: Final = "give a larger budget_s; this is not kept for other processes"


@final
@dataclass(frozen=True, slots=True)
class Options:
    """How to optimize; see `superopt.optimize`."""

    budget_s: float = 120.0
    backend: str = "auto"
    verify: bool | Literal["strict"] = True
    seed: int = 0
    cache: bool | str | Path = True

    def folder(self) -> Path:
        """Return the cache folder; with `cache=False` only compiled kernels are kept there."""
        return default_folder() if isinstance(self.cache, bool) else Path(self.cache)


def make_options(given: Mapping[str, Any]) -> Options:
    """Check keyword options.

    Raises:
        TypeError: there is no option of that name.
        ValueError: an option has no such value.
    """
    known = [f.name for f in fields(Options)]
    for name in given:
        if name not in known:
            raise TypeError(f"superopt.optimize: {unknown('option', name, known)}")
    options = Options(**given)
    if options.backend not in NAMES:
        raise ValueError(unknown("backend", str(options.backend), NAMES))
    if options.verify not in (True, "strict"):
        raise ValueError(
            f'verify is True or "strict", got {options.verify!r}: what is not proven never runs'
        )
    if not _is_number(options.budget_s) or not options.budget_s > 0:
        raise ValueError(f"budget_s is a number of seconds above 0, got {options.budget_s!r}")
    if not isinstance(options.seed, int):
        raise ValueError(f"seed is a whole number, got {options.seed!r}")
    if not isinstance(options.cache, bool | str | Path):
        raise ValueError(f"cache is True, False or a folder, got {options.cache!r}")
    # 6 and 6.0 are the same budget, and find the same plan again
    return replace(options, budget_s=float(options.budget_s))


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


@final
@dataclass(frozen=True, slots=True)
class Request:
    """One program at one set of input types, with the tensors of one call.

    `tensors` are the graph's inputs: the user's first, then the parameters. `writes` maps graph outputs to
    the inputs that they are new values of. `original` runs the program as it was; where that changes
    buffers, whoever makes the request restores them (`preserved`).
    """

    graph: Graph
    tensors: tuple[torch.Tensor, ...]
    user_inputs: tuple[str, ...]
    parameters: tuple[str, ...]
    constants: Mapping[str, torch.Tensor]
    outputs: tuple[OutputSpec, ...]
    structure: str
    writes: Mapping[int, int]
    original: Callable[[], object]


@final
@dataclass(frozen=True, slots=True)
class Planned:
    """A plan, where it is better than the original its program, and its key in the cache."""

    plan: Plan
    program: Program | None
    key: str = ""


def silent(event: Event) -> None:
    """Ignore an event."""


def make_plan(
    request: Request,
    options: Options,
    on_event: OnEvent = silent,
    *,
    started: float | None = None,
) -> Planned:
    """Return a proven plan for the request, from the cache where it is there.

    The budget counts from `started` (of `time.monotonic`; None: now).
    """
    started = time.monotonic() if started is None else started
    graph = with_layouts(request.graph, request.tensors)
    graph = with_result_layouts(graph, request.outputs, request.writes)
    request = replace(request, graph=graph)
    store = Cache(options.folder())
    key = plan_key(request, options)
    if options.cache is not False:
        found = store.load_plan(key)
        if found is not None:
            try:
                planned = restore(found, options, request.tensors)
            except (PlanError, CodegenError) as error:
                logger.warning("a cached plan is made again: %s", error)
            else:
                on_event(Event("cached", "the plan was found in the cache", {"key": key}))
                return replace(planned, key=key)
    with current(device_of(request.tensors)):
        planned = _search(request, options, store, on_event, started)
    if options.cache is not False and lasting(planned.plan):
        store.save_plan(key, planned.plan)
    return replace(planned, key=key)


def lasting(plan: Plan) -> bool:
    """Say whether another run would find the same: it was not cut short, the tools were there."""
    report = plan.report
    if report.get("stopped") in ("interrupted", _NO_COMPILER):
        return False
    return plan.program is not None or not report.get("hurried")


def plan_key(request: Request, options: Options) -> str:
    """Return the cache key: program, layouts, machine, versions and options."""
    return key_of(
        print_graph(request.graph),
        [asdict(o) for o in request.outputs],
        sorted(request.writes.items()),
        environment(options, device_of(request.tensors)),
    )


def environment(options: Options, device: torch.device) -> dict[str, Any]:
    """Return what a plan depends on beside the program: options, versions, machine."""
    chosen = {k: v for k, v in asdict(options).items() if k != "cache"}
    return {"options": chosen, "versions": versions(), "target": target_name(device)}


@cache
def versions() -> dict[str, str]:
    """Return the versions that decide what a plan is and means."""
    return {
        "superopt": superopt.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "code": code_digest(),
    }


@cache
def code_digest() -> str:
    """Return a digest of all code that makes plans: a changed generator makes them anew."""
    digest = hashlib.sha256(runtime_digest().encode())
    root = Path(superopt.__file__).parent
    for folder in (root, *(root / name for name in ("ir", "verify", "search", "codegen"))):
        for path in sorted(folder.resolve().rglob("*.py")):
            digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def _backend_of(plan: Plan, options: Options, device: torch.device) -> Backend:
    """Return the backend that a plan's kernels were made for."""
    folder = Cache(options.folder()).kernels
    names = list(dict.fromkeys(kernel.backend for kernel in plan.kernels.values()))
    wanted = names[0] if names and options.backend == "auto" else options.backend
    if wanted in NAMES:
        with suppress(Unsupported):  # it may be for another device
            backend = backend_named(wanted, folder, device)
            if all(name == backend.name for name in names):
                return backend
    raise PlanError(f"the plan was made for the {' and '.join(names)} backend: optimize again")


def restore(
    plan: Plan, options: Options, tensors: Sequence[torch.Tensor], *, as_graph: bool = False
) -> Planned:
    """Compile a stored plan (from the kernel cache where it is there) for tensors laid out so.

    With `as_graph` the program returns what its graph does, new values first, and changes nothing.

    Raises:
        PlanError: a kernel is missing or does not compile here.
    """
    if plan.program is None:
        return Planned(plan, None)
    backend = _backend_of(plan, options, device_of(tensors))
    entries = backend.load(list(plan.kernels.values()))
    loaded: dict[str, Callable[..., None]] = {}
    for (digest, source), entry in zip(plan.kernels.items(), entries, strict=True):
        if isinstance(entry, CodegenError):
            raise PlanError(f"kernel {source.name} cannot be built here: {entry}")
        loaded[digest] = entry
    strides = [tuple(t.stride()) for t in tensors]
    program = build_program(
        plan.program,
        loaded,
        strides=strides,
        outputs=None if as_graph else plan.outputs,
        writes=None if as_graph else plan.writes,
        device=backend.device,
    )
    return Planned(plan, program)


def device_of(tensors: Sequence[torch.Tensor]) -> torch.device:
    """Return the device that all tensors are on.

    Raises:
        Unsupported: there are several, or one that no backend is for.
    """
    devices = list(dict.fromkeys(t.device for t in tensors))
    if len(devices) > 1:
        raise Unsupported(f"its tensors are on several devices: {', '.join(map(str, devices))}")
    if devices and devices[0].type not in ("cpu", "cuda"):
        raise Unsupported(
            f"its tensors are on {devices[0]}: plans are for the CPU and CUDA devices"
        )
    return devices[0] if devices else torch.device("cpu")


def _search(
    request: Request, options: Options, store: Cache, on_event: OnEvent, started: float
) -> Planned:
    device = device_of(request.tensors)
    backend = backend_named(options.backend, store.kernels, device)
    if not backend.usable() and backend.name != "cpu":
        return _unchanged(request, {}, f"the {backend.name} backend needs Triton and a GPU")
    if not backend.usable():
        _warn_once(str(NoCompiler()))
        report = {"stopped": _NO_COMPILER}
        return _unchanged(request, report, "no C++ compiler was found")
    deadline = started + options.budget_s
    graph = request.graph
    target = machine(store.folder, device)
    inputs = dict(zip(graph.inputs, request.tensors, strict=True))
    clock = Clock(backend, inputs, options.seed, target, deadline)
    floats = FloatTest(graph, seed=options.seed, device=device)
    on_event(Event("start", f"searching for about {options.budget_s:.0f} s at most", {}))
    floating: dict[Graph, FloatVerdict] = {}

    def tested(program: Graph) -> str:
        """Say what is wrong with the results of a program as it will run, if anything is."""
        plain = clock.program(program)
        floating[program] = floats.check(lambda tensors: list(plain.run(*tensors)))
        return floating[program].reason

    def accept(program: Graph) -> str:
        """Tune the kernels and test them as they will run."""
        _tune(program, clock, deadline - floats.predicted_s() - LAST_S, on_event)
        reason = tested(program)
        # the smallest numbers decide some rows, as weights that are divided by their sum
        if reason and (replaced := clock.keep_denormals(program)):
            reason = tested(program)
            if reason:
                clock.compiled |= replaced
        return f"rejected by the floating-point test: {reason}" if reason else ""

    with torch.no_grad():
        found = search(
            graph,
            target,
            clock,
            budget_s=max(0.0, deadline - time.monotonic()),
            seed=options.seed,
            on_event=on_event,
            accept=accept,
            floats=floats,
        )
        report = _facts(found, clock)
        if clock.refused and not clock.compiled:
            _warn_once(
                "the C++ compiler fails on every kernel (the plan's report says how): repair it or "
                "point the CXX environment variable at another one"
            )
            report["stopped"] = _NO_COMPILER
            return _unchanged(request, report, "the C++ compiler fails on every kernel")
        if clock.late and not clock.compiled:
            return _unchanged(request, report, "no kernel was compiled before the budget was over")
        if found.verdict is None:
            why = [v.reason for v in floating.values()]
            failed = f"; in floating point, {why[-1]}" if why else ""
            return _unchanged(request, report, f"nothing faster was found and proven{failed}")
        evidence = (found.verdict, floating[found.graph])
        planned = _finish(request, options, found.graph, evidence, clock, report, on_event)
    planned.plan.report["search_s"] = time.monotonic() - started
    return planned


def _tune(graph: Graph, clock: Clock, deadline: float, on_event: OnEvent) -> None:
    """Try the register tiles and the like of every kernel of the chosen program."""
    taken_s = _TUNING_S
    clock.ensure(graph)
    # there may be time for some: first those that take longest
    for block in sorted(
        dict.fromkeys(blocks(graph)), key=lambda b: -clock.compiled[b.digest()].seconds
    ):
        started = time.monotonic()
        if started + taken_s < deadline:
            best = clock.tune(block, _CONFIGURATIONS)
            taken_s = max(taken_s, time.monotonic() - started)
            if best is not None:
                text = f"{block.name}: {best.seconds * 1e3:.3f} ms"
                on_event(Event("tuned", text, {"config": best.source.config}))


def _finish(
    request: Request,
    options: Options,
    found: Graph,
    evidence: tuple[Verdict, FloatVerdict],
    clock: Clock,
    report: dict[str, Any],
    on_event: OnEvent,
) -> Planned:
    """Compare the compiled program with the original, and make the plan."""
    graph = request.graph
    verdict, floating = evidence
    if options.verify == "strict":
        verdict = verify_field(
            graph,
            found,
            seed=options.seed + 1,
            error_bound=_STRICT_BOUND,
            device=clock.device,
        )
        if not verdict.equivalent:
            return _unchanged(request, report, f"rejected by the strict test: {verdict}")
    entries = {d: c.entry for d, c in clock.compiled.items()}
    program = build_program(
        found,
        entries,
        strides=[tuple(t.stride()) for t in request.tensors],
        outputs=request.outputs,
        writes=request.writes,
        device=clock.backend.device,
    )
    if not _agrees(request, program, options.seed, clock.device):
        what = "random numbers" if draws(graph) else "results on these inputs"
        return _unchanged(request, report, f"its {what} would be others")
    original_s, planned_s = _compare(request, program, clock.backend)
    report |= {"original_s": original_s, "planned_s": planned_s}
    on_event(Event("compared", f"{original_s * 1e3:.3f} ms -> {planned_s * 1e3:.3f} ms", {}))
    if planned_s > original_s * _GAIN:
        return _unchanged(request, report, "the original is as fast")
    certificate = json.loads(certify(graph, found, verdict, floating).to_json())
    report["improved"] = True
    plan = replace(
        _plan(request, report),
        program=found,
        kernels=_sources(found, clock),
        certificate=certificate,
    )
    return Planned(plan, program)


def _compare(request: Request, program: Program, backend: Backend) -> tuple[float, float]:
    """Time the original and the plan in turn, the plan on copies of what it changes."""
    tensors = _with_copies(request)
    restore_ = restorer([tensors[t] for t in request.writes.values()])

    def planned() -> object:
        restore_()
        return program.run(*tensors)

    calls = [request.original, planned]
    original_s, planned_s = interleaved(calls, limit_s=2.0, rounds=15, timed=backend.timed)
    return original_s, planned_s


def _agrees(request: Request, program: Program, seed: int, device: torch.device) -> bool:
    """Say whether original and plan give the same for the caller's tensors, and leave generators alike.

    The proof is about the graph; this sees a program that the graph is not. (It takes a draw of
    random numbers for a function of its operands' values, say, and that is one of their layout too.)
    Where the plan alone differs it is by rounding, of which the floating-point test is the judge.
    """
    given, kept = _with_copies(request), _with_copies(request)
    with generators(device, seed):
        expected = pytree.tree_leaves(request.original())
        state = torch.rand(1, device=device)
    with generators(device, seed):
        found = program.run(*given)
        same = torch.equal(torch.rand(1, device=device), state)
    results = [t for t in expected if isinstance(t, torch.Tensor)]
    if any(a.dtype is not b.dtype for a, b in zip(found, results, strict=True)):
        return False
    if draws(request.graph):
        return same and all(close(a, b) for a, b in zip(found, results, strict=True))
    if _resemble(found, results):
        return True
    own = run_reference(request.graph, kept, device=device)
    own = [o for i, o in enumerate(own) if i not in request.writes]
    if _resemble(own, results):
        return True
    # many layers in 16 bits round by more: as much as the graph itself does on these tensors
    given = _with_copies(request)
    exact = run_reference(request.graph, given, dtype_override=torch.float64, device=device)
    exact = [e for i, e in enumerate(exact) if i not in request.writes]
    triples = zip(results, exact, own, strict=True)
    return all(_resemble([r], [e], _rounding(o, e)) for r, e, o in triples)


def _resemble(
    found: Sequence[torch.Tensor], expected: Sequence[torch.Tensor], tolerance: float = _DIFFERENCE
) -> bool:
    pairs = zip(found, expected, strict=True)
    return all(agreeing(_sample(a), _sample(b), tolerance) >= 1 - _DIFFERENCE for a, b in pairs)


def _sample(result: torch.Tensor) -> torch.Tensor:
    """Return elements of a large result from all over it: as many tell how many differ."""
    step = result.numel() // _SAMPLE
    return result.reshape(-1)[:: step | 1] if step > 1 and result.is_contiguous() else result


def _rounding(own: torch.Tensor, exact: torch.Tensor) -> float:
    """Return what rounding may do to a result, beside its mean magnitude, as far as that is believed."""
    if not exact.is_floating_point():
        return _DIFFERENCE
    error = own.double() - exact
    known = error.isfinite()
    size = float(exact[known].abs().mean())
    noise = float(error[known].square().mean().sqrt()) / size if size > 0 else 0.0
    return min(max(_DIFFERENCE, 4 * noise), _MOST_ROUNDING)


def _with_copies(request: Request) -> list[torch.Tensor]:
    """Return the request's tensors, copies in the place of those that the program changes."""
    written = set(request.writes.values())
    return [t.clone() if i in written else t for i, t in enumerate(request.tensors)]


def restorer(changed: Sequence[torch.Tensor]) -> Callable[[], None]:
    """Return what gives small tensors the values that they have now.

    Programs are timed by many calls in a row; what they count with must not run out of its range.
    """
    kept = [(t, t.detach().clone()) for t in changed if t.nbytes <= _SMALL_BYTES]

    def restore_() -> None:
        for tensor, value in kept:
            tensor.detach().copy_(value)

    return restore_


def _sources(graph: Graph, clock: Clock) -> dict[str, KernelSource]:
    return {b.digest(): clock.compiled[b.digest()].source for b in blocks(graph)}


def _facts(found: SearchResult, clock: Clock) -> dict[str, Any]:
    statistics = found.statistics
    return {
        "improved": False,
        "original_s": found.original_s if found.original_s < inf else 0.0,
        "planned_s": found.best_s if found.best_s < inf else 0.0,
        "search_s": statistics.seconds,
        "proposed": statistics.proposed,
        "measured": statistics.measured,
        "rejected": statistics.rejected,
        "proven": statistics.proven,
        "hurried": statistics.hurried + clock.late,
        "stopped": statistics.stopped,
        "notes": list(found.notes),
        "failures": clock.failures[:8],
    }


def _plan(request: Request, report: dict[str, Any]) -> Plan:
    return Plan(
        original=request.graph,
        program=None,
        kernels={},
        user_inputs=request.user_inputs,
        parameters=request.parameters,
        constants={n: store_tensor(t) for n, t in request.constants.items()},
        outputs=request.outputs,
        structure=request.structure,
        target=target_name(device_of(request.tensors)),
        writes=dict(request.writes),
        report=report,
    )


def _unchanged(request: Request, report: dict[str, Any], why: str) -> Planned:
    base = {"improved": False, "proposed": 0, "rejected": 0, "proven": 0, "search_s": 0.0}
    if report.get("hurried"):
        why = f"{why}, but time was over before all was tried: {_SHORT}"
    return Planned(_plan(request, {**base, **report, "why": why}), None)


@cache
def _warn_once(message: str) -> None:
    logger.warning("%s; programs run as they were until then", message)
