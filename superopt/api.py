"""`superopt.optimize`: the decorator, and the callables that it returns.

In: a function or module, options. Out: a callable that behaves like the original. A plan is made per input
signature (shapes, layouts, element types) at the first call, or ahead by `warmup`. Whatever cannot be
planned runs as it was: gradients, autocast, tracing, several devices, tensor subclasses, programs
that do not lift; and so does what no proven plan makes faster.

Invariant: a call is served by a plan only if its signature matches and every guard (code, globals,
closures, configuration, parameters' types) still holds.
"""

import copy
import functools
import logging
import threading
import time
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, TypeVar, final, overload

import torch

from superopt.cache import Cache, key_of
from superopt.errors import PlanError, Unsupported
from superopt.frontend import lift
from superopt.guards import Guards, take_guards
from superopt.ir.errors import SuperoptError
from superopt.pipeline import (
    OnEvent,
    Options,
    Planned,
    Request,
    device_of,
    environment,
    lasting,
    make_options,
    make_plan,
    restore,
    silent,
)
from superopt.plan import Plan, StoredTensor, binding_digest
from superopt.report import Report, plan_report
from superopt.runtime import store_tensor
from superopt.signature import altered, refusal, signature, tensor_check
from superopt.subject import (
    Binding,
    bind_plan,
    flatten,
    make_request,
    preserved,
    separated,
    shares_written,
)
from superopt.watch import BOUND

logger = logging.getLogger("superopt")

Function = Callable[..., Any]
F = TypeVar("F", bound=Function)
_Run = Callable[[Sequence[Any], Mapping[str, Any]], Any]
_REPLANS: Final = 8
_DIRECT: Final = 4
_REFUSALS: Final = 16
_OF_ITEMS: Final = ("__contains__", "__setitem__")
"""Special methods whose operands are parts of a container, and stay what they are."""
_is_compiling = torch.compiler.is_compiling


@overload
def optimize(function: torch.nn.Module, **options: Any) -> "OptimizedModule": ...
@overload
def optimize(function: Function, **options: Any) -> "Optimized": ...
@overload
def optimize(function: None = None, **options: Any) -> "Callable[[Function], Optimized]": ...
def optimize(function: Any = None, **options: Any) -> Any:
    """Return a faster function or module that is proven to compute the same thing.

    Use it bare (`@superopt.optimize`), with options (`@superopt.optimize(budget_s=30)`), or as a call
    (`fast = superopt.optimize(module)`).

    Args:
        function: a function over tensors, or a `torch.nn.Module`.
        **options: `budget_s`: seconds per input signature for all of it, lifting to proof (default 120);
            what has begun by then is finished, the first kernel or a proof. Nothing is tried where the
            proof would end much later. `backend`: "auto", "cpu" or "triton". `verify`: True, or "strict" for
            a second, independent proof with an error
            bound of 2**-120. `seed`: the same seed proposes the same candidates. `cache`: True (the
            user's cache folder), False, or a folder.

    Raises:
        TypeError: there is no such option, or `function` cannot be called.
        ValueError: an option has no such value.
    """
    checked = make_options(options)
    if function is None:
        return lambda f: optimize(f, **options)
    if isinstance(function, torch.nn.Module):
        return OptimizedModule(function, checked)
    if not callable(function):
        raise TypeError(f"optimize takes a function or a module, got {type(function).__name__}")
    return Optimized(function, checked)


@final
@dataclass(frozen=True, slots=True)
class _Entry:
    """What is known for one signature: how to run it, or why the original runs."""

    run: _Run | None
    plan: Plan | None
    why: str = ""


@final
@dataclass(frozen=True, slots=True)
class _Direct:
    """An entry for calls with tensors alone, found by one check; without `run` the original runs."""

    check: Callable[..., bool]
    count: int
    run: _Run | None


@final
@dataclass(slots=True)
class _Dispatcher:
    """The plans of one callable, by signature."""

    original: Function
    options: Options
    on_event: OnEvent = silent
    entries: dict[Any, _Entry] = field(default_factory=dict)
    direct: tuple[_Direct, ...] = ()
    guards: Guards | None = None
    replans: int = 0
    refused: int = 0
    refusals: dict[str, None] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Serve one call."""
        if _is_compiling():  # a compiler around this one takes the original into its graph
            return self.original(*args, **kwargs)
        if not kwargs:
            for direct in self.direct:
                if direct.count == len(args) and direct.check(*args) and not altered():
                    if direct.run is None:
                        return self.original(*args)
                    if self.current():
                        return direct.run(args, kwargs)
                    break
        key = signature(args, kwargs)
        if key is None:
            self.refuse(args, kwargs)
            return self.original(*args, **kwargs)
        entry = self.entries.get(key)
        if entry is None:
            entry = self.prepare(key, args, kwargs, wait=False)
        if entry is None or entry.run is None or not self.current():
            return self.original(*args, **kwargs)
        return entry.run(args, kwargs)

    def refuse(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Note for the report why a call cannot have a plan; the first calls tell."""
        if self.refused < _REFUSALS:
            self.refused += 1
            self.refusals.setdefault(refusal(args, kwargs))

    def current(self) -> bool:
        """Say whether the guards hold; where they do not, plans are forgotten."""
        guards = self.guards
        if guards is None or guards.hold():
            return True
        with self.lock:
            if self.guards is guards:
                logger.info("%s: what its plans depend on has changed", _name(self.original))
                self.guards = None
                self.entries = {}
                self.direct = ()
                self.replans += 1
        return False

    def prepare(
        self, key: Any, args: tuple[Any, ...], kwargs: dict[str, Any], *, wait: bool
    ) -> _Entry | None:
        """Make the plan for a signature; None when another thread is at it and `wait` is False."""
        if not self.lock.acquire(blocking=wait):
            return None
        try:
            entry = self.entries.get(key)
            if entry is None:
                if self.replans > _REPLANS:
                    entry = _Entry(None, None, f"its surroundings changed {self.replans} times")
                else:
                    entry = self._plan(key, args, kwargs)
                self.entries[key] = entry
                if not kwargs:
                    self._add_direct(args, entry.run)
            return entry
        finally:
            self.lock.release()

    def _add_direct(self, args: tuple[Any, ...], run: _Run | None) -> None:
        """Let calls like this one be found by one check; it does not see the gradient mode."""
        check = tensor_check(args)
        if check is not None and not any(a.requires_grad for a in args):
            self.direct = (_Direct(check, len(args), run), *self.direct[: _DIRECT - 1])

    # -- making a plan -------------------------------------------------------------------------

    def _plan(self, key: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Entry:
        try:
            if self.guards is None:
                self.guards = take_guards(self.original)
            planned, binding = self._planned(key, args, kwargs)
        except SuperoptError as error:
            logger.info("%s runs as it was: %s", _name(self.original), error)
            return _Entry(None, None, f"{type(error).__name__}: {error}")
        except (
            Exception
        ) as error:  # a defect of ours must not become the user's: it is logged whole
            logger.warning("%s runs as it was after an internal error", _name(self.original))
            logger.warning("please report this", exc_info=True)
            return _Entry(None, None, f"internal error: {type(error).__name__}: {error}")
        if planned.program is None:
            return _Entry(None, planned.plan)
        flat = not kwargs and all(isinstance(a, torch.Tensor) or _is_scalar(a) for a in args)
        self.guards.compile(Cache(self.options.folder()).kernels)
        run = _runner(self.original, planned, binding, flat=flat)
        return _Entry(run, planned.plan)

    def _planned(
        self, key: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Planned, Binding]:
        assert self.guards is not None, "guards are taken before a plan is made"
        started = time.monotonic()
        modules = self.guards.modules
        device = device_of(_tensors(args, kwargs))
        alias = self._alias(key, device)
        store = Cache(self.options.folder())
        target = None if alias is None else store.load_alias(alias)
        plan = None if target is None else store.load_plan(target[0])
        if plan is not None and target is not None and target[1] == _bound(plan, plan.constants):
            try:
                binding = bind_plan(plan, modules, device)
                tensors = _gather(binding, flatten(args, kwargs))
                if not shares_written(tensors, binding.writes):
                    return restore(plan, self.options, tensors), binding
            except (PlanError, IndexError) as error:
                logger.info("a cached plan does not fit: %s", error)
        args, kwargs = separated(args, kwargs, _state(modules))
        try:
            lifted = lift(self.original, args, kwargs)
        finally:
            self.guards.put_back()
        self.guards.fold(lifted.folded_sources)
        try:
            with preserved(lifted):
                request, binding = make_request(self.original, modules, lifted, args, kwargs)
                changed = self.guards.put_back()
                if changed:
                    raise Unsupported(f"the program changes {changed}, which a plan does not")
                planned = make_plan(request, self.options, self.on_event, started=started)
        finally:
            self.guards.put_back()
        if alias is not None and not lifted.folded_sources and lasting(planned.plan):
            constants = {name: store_tensor(t) for name, t in request.constants.items()}
            store.save_alias(alias, planned.key, _bound(request, constants))
        return planned, binding

    def _alias(self, key: Any, device: torch.device) -> str | None:
        """Return the key by which a plan is found without lifting, if there is one."""
        if self.options.cache is False or self.guards is None or self.guards.fingerprint is None:
            return None
        surroundings = environment(self.options, device)
        return key_of("alias", self.guards.fingerprint, repr(key), surroundings)


def _bound(source: Plan | Request, constants: Mapping[str, StoredTensor]) -> str:
    return binding_digest(source.user_inputs, source.parameters, constants, source.structure)


def _gather(binding: Binding, leaves: Sequence[Any]) -> list[torch.Tensor]:
    rest = binding.parameters()
    if rest is None:
        raise PlanError("a parameter has another type than planned")
    return [*(leaves[i] for i in binding.leaves), *rest]


def _runner(original: Function, planned: Planned, binding: Binding, *, flat: bool) -> _Run:
    """Return what runs a plan on a call's arguments; it is on the path of every call."""
    assert planned.program is not None
    program = planned.program.run
    build = binding.build
    positions = binding.leaves
    count = len(positions)
    leading = flat and positions == tuple(range(count))
    if leading and build is None and not binding.rest and not binding.writes:

        def run_plain(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
            return program(*args[:count])[0]

        return run_plain
    fetch = binding.fetcher()
    writes = binding.writes

    def run(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        leaves = args if flat else flatten(args, kwargs)
        parameters = fetch()
        if parameters is None:
            return original(*args, **kwargs)
        inputs = leaves[:count] if leading else [leaves[i] for i in positions]
        if writes and shares_written([*inputs, *parameters], writes):
            return original(*args, **kwargs)
        results = program(*inputs, *parameters)
        return results[0] if build is None else build(results)

    return run


def _state(modules: Sequence[torch.nn.Module]) -> list[torch.Tensor]:
    tables = [t for m in modules for t in (m._parameters, m._buffers)]
    return [t for table in tables for t in table.values() if t is not None]


def _is_scalar(value: Any) -> bool:
    return isinstance(value, bool | int | float | str)


def _tensors(args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[torch.Tensor]:
    return [leaf for leaf in flatten(args, kwargs) if isinstance(leaf, torch.Tensor)]


def _name(function: Any) -> str:
    return str(getattr(function, "__qualname__", type(function).__name__))


class _Planning:
    """What functions and modules share: plans made ahead, reports."""

    _superopt: _Dispatcher
    _superopt_wraps = True

    def warmup(self, *args: Any, **kwargs: Any) -> Any:
        """Make the plan for these inputs now (outside autograd); return self."""
        dispatcher = self._superopt
        with torch.no_grad():
            key = signature(args, kwargs)
            if key is None:
                dispatcher.refuse(args, kwargs)
            else:
                dispatcher.prepare(key, args, kwargs, wait=True)
        return self

    @property
    def plans(self) -> list[Plan]:
        """Plans made so far, those that keep the original included."""
        return [e.plan for e in list(self._superopt.entries.values()) if e.plan is not None]

    def report(self) -> Report:
        """Return what was found, proven and measured for each input signature."""
        reasons = [e.why for e in list(self._superopt.entries.values()) if e.why]
        unplanned = dict.fromkeys((*reasons, *self._superopt.refusals))
        return Report(tuple(plan_report(p) for p in self.plans), tuple(unplanned))


@final
class _Methods(dict[int, "Optimized"]):
    """The optimized methods of one instance; copies of the instance make their own."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _Methods, ()

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Methods":
        return _Methods()

    def __copy__(self) -> "_Methods":
        return _Methods()


class Optimized(_Planning):
    """A function with a plan per input signature; call it like the original."""

    def __init__(self, function: Function, options: Options, on_event: OnEvent = silent) -> None:
        functools.update_wrapper(self, function)
        self._superopt = _Dispatcher(function, options, on_event)
        self._call = self._superopt.call

    @property
    def original(self) -> Function:
        """The function as it was."""
        return self._superopt.original

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the plan for these inputs; make it first where there is none yet."""
        return self._call(args, kwargs)

    def __get__(self, instance: Any, owner: Any = None) -> Any:
        """Return the method of an instance, which has plans of its own."""
        if instance is None:
            return self
        inside = getattr(instance, "__dict__", None)
        if inside is None:
            return types.MethodType(self.original, instance)
        methods = inside.setdefault(BOUND, _Methods())
        bound = methods.get(id(self))
        if bound is None:
            dispatcher = self._superopt
            method = types.MethodType(dispatcher.original, instance)
            bound = Optimized(method, dispatcher.options, dispatcher.on_event)
            bound = methods.setdefault(id(self), bound)
        return bound

    def __reduce__(self) -> tuple[Any, ...]:
        return Optimized, (self._superopt.original, self._superopt.options)

    def __repr__(self) -> str:
        return f"<superopt.optimize({_name(self._superopt.original)}), {len(self.plans)} plans>"


class OptimizedModule(torch.nn.Module, _Planning):
    """A module with a plan per input signature.

    It shares the state of the original (parameters, buffers, children, attributes, hooks), so that
    `state_dict`, `to`, `train` and assignments act on both. Where the original has a length, items or other
    operators, so has this.
    """

    __slots__ = ("_superopt",)

    def __new__(cls, module: torch.nn.Module, *args: Any) -> "OptimizedModule":
        """Make an instance of a class with the operators of the module's."""
        found = {n: _delegated(n) for n in _operators(type(module))}
        made = type(cls.__name__, (cls,), {"__slots__": (), **found}) if found else cls
        return object.__new__(made)

    def __init__(
        self, module: torch.nn.Module, options: Options, on_event: OnEvent = silent
    ) -> None:
        object.__setattr__(self, "__dict__", module.__dict__)
        object.__setattr__(self, "_superopt", _Dispatcher(module, options, on_event))

    @property
    def original(self) -> torch.nn.Module:
        """The module as it was."""
        module: torch.nn.Module = self._superopt.original  # type: ignore[assignment]
        return module

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the plan for these inputs; make it first where there is none yet."""
        return self._superopt.call(args, kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run as a call does."""
        return self._superopt.call(args, kwargs)

    def __getattr__(self, name: str) -> Any:
        if name == "_superopt":
            raise AttributeError(name)
        found = getattr(self._superopt.original, name)
        if isinstance(found, types.MethodType) and not name.startswith("_"):
            why = f"the method {name} calls the original: plans serve calls of the module itself"
            self._superopt.refusals.setdefault(why)
        return found

    def __deepcopy__(self, memo: dict[int, Any]) -> "OptimizedModule":
        module = copy.deepcopy(self._superopt.original, memo)
        return OptimizedModule(module, self._superopt.options)  # type: ignore[arg-type]

    def __reduce__(self) -> tuple[Any, ...]:
        return OptimizedModule, (self._superopt.original, self._superopt.options)

    def extra_repr(self) -> str:
        """Say what this is."""
        return f"superopt: {len(self.plans)} plans"


def _operators(kind: type[torch.nn.Module]) -> list[str]:
    """Return the special methods of a class of modules: Python looks them up past `__getattr__`."""
    return [
        name
        for name in dir(kind)
        if name.startswith("__") and name.endswith("__") and callable(getattr(kind, name))
        if not hasattr(OptimizedModule, name)
    ]


def _delegated(name: str) -> Function:
    def operate(self: OptimizedModule, *args: Any) -> Any:
        if name not in _OF_ITEMS:  # a container takes no other class for one
            args = tuple(a.original if isinstance(a, OptimizedModule) else a for a in args)
        found = getattr(self.original, name)(*args)
        return self if found is self.original else found

    return operate
