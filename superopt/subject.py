"""Subjects: a user's function or module seen as a program over tensors.

In: the callable and the arguments of one call. Out: a `Request` for the pipeline, and `Binding`s that say
where each graph input comes from at every later call. Parameters are looked up anew each time, so
that weights changed in place, or replaced by others of the same type, are seen.
"""

import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final, final

import torch
from torch.utils import _pytree as pytree

from superopt.errors import PlanError, Unsupported
from superopt.frontend import Lifted
from superopt.pipeline import Request, restorer
from superopt.plan import OutputSpec, Plan
from superopt.runtime import load_tensor
from superopt.signature import is_as_it_lies, tensor_check
from superopt.verify.draws import generators
from superopt.verify.opaque import duplicate

Function = Callable[..., Any]
Modules = Sequence[torch.nn.Module]

_NAMED: Final = "named tuple"
"""The key under which a named tuple (what `torch.max` returns is one) is described in a stored plan."""

Build = Callable[[Sequence[torch.Tensor]], Any]
"""Makes the caller's result of a program's tensors."""


@final
@dataclass(frozen=True, slots=True)
class Fetch:
    """Where one parameter is found: `table[name]`, with the type that the plan was made for."""

    table: Mapping[str, Any]
    name: str
    shape: torch.Size
    strides: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    def get(self) -> torch.Tensor | None:
        """Return the tensor, or None when there is none of that type any more."""
        tensor = self.table.get(self.name)
        if (
            not isinstance(tensor, torch.Tensor)
            or not is_as_it_lies(tensor)
            or tensor.shape != self.shape
            or tensor.dtype is not self.dtype
            or tensor.stride() != self.strides
            or tensor.device != self.device
        ):
            return None
        return tensor


@final
@dataclass(frozen=True, slots=True)
class Binding:
    """Where the inputs of a program come from, and what its results make up.

    `leaves` are positions among the flattened arguments; `build` is None where the result is one
    tensor; `writes` are the inputs that are changed.
    """

    leaves: tuple[int, ...]
    rest: tuple[Fetch | torch.Tensor, ...]
    build: Build | None
    writes: tuple[int, ...] = ()

    def parameters(self) -> list[torch.Tensor] | None:
        """Return the inputs after the user's, None when one has another type than planned."""
        found = []
        for source in self.rest:
            tensor = source if isinstance(source, torch.Tensor) else source.get()
            if tensor is None:
                return None
            found.append(tensor)
        return found

    def fetcher(self) -> Callable[[], list[torch.Tensor] | None]:
        """Return what gives the `parameters` at every call, all types checked at once.

        None comes where one has another type, or takes part in autograd.
        """

        def looked_up() -> list[torch.Tensor] | None:
            return None if torch.is_grad_enabled() and self.needs_grad() else self.parameters()

        found = self.parameters()
        check = None if found is None else tensor_check(found)
        if check is None:
            return looked_up
        trained = self.needs_grad()
        sources = [
            (s.table.get, s.name) if isinstance(s, Fetch) else ({"": s}.get, "") for s in self.rest
        ]

        def fetch() -> list[torch.Tensor] | None:
            now: list[Any] = [get(name) for get, name in sources]
            if not check(*now):  # it sees whether they want gradients, and not the mode
                return looked_up()
            return None if trained and torch.is_grad_enabled() else now

        return fetch

    def needs_grad(self) -> bool:
        """Say whether a parameter takes part in autograd."""
        found = (f.table.get(f.name) for f in self.rest if isinstance(f, Fetch))
        return any(t.requires_grad for t in found if t is not None)


def flatten(args: Sequence[Any], kwargs: Mapping[str, Any] | None) -> list[Any]:
    """Return the leaves of a call's arguments."""
    return pytree.tree_leaves((tuple(args), dict(kwargs or {})))


def separated(
    args: Sequence[Any], kwargs: Mapping[str, Any], held: Iterable[torch.Tensor]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments with no two tensors in one storage, nor in that of a `held` one.

    A plan is for all calls of its signature. Arguments that happen to be one tensor at the first call
    are others at the next.
    """
    seen = {t.untyped_storage().data_ptr() for t in held if is_as_it_lies(t)}

    def own(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.layout is not torch.strided or tensor.numel() == 0:
            return tensor
        place = tensor.untyped_storage().data_ptr()
        if place in seen:
            return duplicate(tensor)
        seen.add(place)
        return tensor

    found: tuple[tuple[Any, ...], dict[str, Any]] = pytree.tree_map_only(
        torch.Tensor, own, (tuple(args), dict(kwargs))
    )
    return found


def _is_named(value: Any) -> bool:
    return isinstance(value, tuple) and (hasattr(value, "_fields") or _is_pytorchs(type(value)))


def _is_pytorchs(kind: type) -> bool:
    return kind.__module__ == "torch.return_types"


def _name(kind: type) -> str:
    return f"{kind.__module__}:{kind.__qualname__}"


def _fields(value: Any, kinds: list[type]) -> Any:
    """Replace named tuples by dicts: pytree keeps them under no name that another process knows."""
    if not _is_named(value):
        return value
    kinds.append(type(value))
    fields = [pytree.tree_map(lambda v: _fields(v, kinds), f, is_leaf=_is_named) for f in value]
    return {_NAMED: _name(type(value)), "fields": fields}


def _is_fields(value: Any) -> bool:
    return isinstance(value, dict) and _NAMED in value


def _named(value: Any) -> Any:
    if not _is_fields(value):
        return value
    kind = _type_named(value[_NAMED])
    fields = [pytree.tree_map(_named, field, is_leaf=_is_fields) for field in value["fields"]]
    return kind(fields) if _is_pytorchs(kind) else kind(*fields)


def _type_named(name: str) -> Any:
    """Return the class `module:qualified.name` of a module that is loaded, or None."""
    module, _, path = name.partition(":")
    found: Any = sys.modules.get(module)
    for part in path.split("."):
        found = getattr(found, part, None)
    return found


def _described(result: Any) -> str:
    """Return the structure of a result as text, "" where no other process could read it."""
    kinds: list[type] = []
    plain = pytree.tree_map(lambda v: _fields(v, kinds), result, is_leaf=_is_named)
    leaves, spec = pytree.tree_flatten(plain)
    known = [None if isinstance(v, torch.Tensor) else {"value": v} for v in leaves]
    if any(_type_named(_name(kind)) is not kind for kind in kinds):
        return ""
    try:
        text = pytree.treespec_dumps(spec)
    except (NotImplementedError, TypeError):
        return ""
    return json.dumps({"spec": text, "leaves": known, "named": [_name(k) for k in kinds]})


def builder(structure: str) -> Build | None:
    """Return what makes the caller's result of the program's tensors, None for a single one.

    Raises:
        PlanError: the result is of a class that is not known here.
    """
    if not structure:
        raise PlanError("the plan returns objects of a class that has no lasting name")
    described = json.loads(structure)
    if described["spec"] is None:
        return None
    missing = [name for name in described["named"] if _type_named(name) is None]
    if missing:
        raise PlanError(f"the plan returns a {missing[0]}, which is not there")
    try:
        spec = pytree.treespec_loads(described["spec"])
    except (KeyError, ValueError, NotImplementedError) as error:
        raise PlanError(f"the plan returns what is not known here: {error}") from error
    constants = described["leaves"]

    def build(tensors: Sequence[torch.Tensor]) -> Any:
        plain = pytree.tree_unflatten(_filled(constants, tensors), spec)
        return pytree.tree_map(_named, plain, is_leaf=_is_fields) if described["named"] else plain

    return build


def _filled(constants: Sequence[Any], tensors: Sequence[torch.Tensor]) -> list[Any]:
    rest = iter(tensors)
    return [next(rest) if c is None else c["value"] for c in constants]


def make_request(
    function: Function,
    modules: Modules,
    lifted: Lifted,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
) -> tuple[Request, Binding]:
    """Run the original once to see how its results lie, and put the request together.

    `modules` are all that the program reads, in an order that another process has too.

    Raises:
        Unsupported: the program changes what no module holds or what is shared, or its results are no
            tensors or plain data.
    """
    leaves = flatten(args, kwargs)
    user = lifted.flatten(args, kwargs)
    positions = _positions(user, leaves)
    parameters = list(lifted.parameters.values())
    names, rest, constants = _sources(modules, lifted.parameters)
    tensors = (*user, *parameters)
    writes = _writes(lifted, len(user), rest)
    if shares_written(tensors, tuple(writes.values())):
        raise Unsupported("the program changes memory that it also reads by another name")
    with preserved(lifted):
        outputs, structure, build = _observe(function, args, kwargs, tensors, writes)
    returned = len(lifted.graph.outputs) - len(writes) - lifted.draws
    if len(outputs) != returned:
        raise Unsupported(f"the program returns {len(outputs)} tensors, its graph {returned}")
    request = Request(
        graph=lifted.graph,
        tensors=tensors,
        user_inputs=tuple(f"arg:{p}" for p in positions),
        parameters=names,
        constants=constants,
        outputs=outputs,
        structure=structure,
        writes=writes,
        original=_original(function, args, kwargs, [tensors[t] for t in writes.values()]),
    )
    return request, Binding(tuple(positions), rest, build, tuple(writes.values()))


@contextmanager
def preserved(lifted: Lifted) -> Iterator[None]:
    """Give the buffers that a program changes, and random generators, their state back in the end."""
    changed = [lifted.parameters[m.target] for m in lifted.mutations if m.kind == "buffer"]
    kept = [(tensor.detach(), tensor.detach().clone()) for tensor in changed]
    try:
        with generators(lifted.device):
            yield
    finally:
        for tensor, value in kept:
            tensor.copy_(value)


def shares_written(tensors: Sequence[torch.Tensor], written: Sequence[int]) -> bool:
    """Say whether another of the tensors lies in the storage of one that is changed."""
    storages = [t.untyped_storage().data_ptr() for t in tensors]
    return any(storages.count(storages[i]) > 1 for i in written)


def bind_plan(plan: Plan, modules: Modules, device: torch.device) -> Binding:
    """Return the binding of a stored plan to modules like those that it was made for, on `device`.

    Raises:
        PlanError: a parameter is not there, or the class of a result.
    """
    rest: list[Fetch | torch.Tensor] = []
    inputs = plan.original.inputs[len(plan.user_inputs) :]
    for text, node in zip(plan.parameters, inputs, strict=True):
        kind, _, name = text.partition(":")
        if kind == "constant":
            rest.append(load_tensor(plan.constants[name]).to(device))
            continue
        number, _, path = name.partition(":")
        fetch = _fetch(modules[int(number)], path) if int(number) < len(modules) else None
        if fetch is None or tuple(fetch.shape) != node.shape:
            raise PlanError(f"the plan needs the parameter {path}, which is not there")
        rest.append(fetch)
    leaves = tuple(int(u.partition(":")[2]) for u in plan.user_inputs)
    return Binding(leaves, tuple(rest), builder(plan.structure), tuple(plan.writes.values()))


def _fetch(module: torch.nn.Module, name: str) -> Fetch | None:
    """Return how to find a module's own parameter or buffer."""
    for table in (module._parameters, module._buffers):
        tensor = table.get(name)
        if tensor is not None:
            kind = (tensor.shape, tensor.stride(), tensor.dtype, tensor.device)
            return Fetch(table, name, *kind)
    return None


def _positions(user: Sequence[torch.Tensor], leaves: Sequence[Any]) -> list[int]:
    taken: set[int] = set()
    for tensor in user:
        for i, leaf in enumerate(leaves):
            if leaf is tensor and i not in taken:
                taken.add(i)
                break
        else:
            raise Unsupported("an input of the graph is no argument of the call")
    order = []
    left = sorted(taken)
    for tensor in user:
        chosen = next(i for i in left if leaves[i] is tensor)
        left.remove(chosen)
        order.append(chosen)
    return order


def _sources(
    modules: Modules, parameters: Mapping[str, torch.Tensor]
) -> tuple[tuple[str, ...], tuple[Fetch | torch.Tensor, ...], dict[str, torch.Tensor]]:
    """Say where each parameter comes from; what no module holds is a constant."""
    places: dict[int, tuple[int, str]] = {}
    for number, module in enumerate(modules):
        for table in (module._parameters, module._buffers):
            for name, found in table.items():
                if found is not None:
                    places.setdefault(id(found), (number, name))
    names: list[str] = []
    rest: list[Fetch | torch.Tensor] = []
    constants: dict[str, torch.Tensor] = {}
    for name, tensor in parameters.items():
        if not is_as_it_lies(tensor):
            raise Unsupported(f"{name} is no plain tensor ({type(tensor).__name__})")
        place = places.get(id(tensor))
        fetch = None if place is None else _fetch(modules[place[0]], place[1])
        if place is None or fetch is None:
            names.append(f"constant:{name}")
            rest.append(tensor.detach())
            constants[name] = tensor
        else:
            names.append(f"param:{place[0]}:{place[1]}")
            rest.append(fetch)
    return tuple(names), tuple(rest), constants


def _writes(
    lifted: Lifted, user_inputs: int, rest: Sequence[Fetch | torch.Tensor]
) -> dict[int, int]:
    order = {node.attrs.name: i for i, node in enumerate(lifted.graph.inputs)}
    writes: dict[int, int] = {}
    for mutation in lifted.mutations:
        target = order[mutation.target]
        if target >= user_inputs and not isinstance(rest[target - user_inputs], Fetch):
            raise Unsupported(f"the program changes {mutation.target}, which no module holds")
        writes[mutation.output] = target
    return writes


def _original(
    function: Function,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    changed: Sequence[torch.Tensor],
) -> Callable[[], object]:
    """Return what runs the original on copies of the arguments that it changes."""
    copies = {id(t): t.detach().clone() for t in changed}
    args, kwargs = pytree.tree_map_only(
        torch.Tensor, lambda t: copies.get(id(t), t), (tuple(args), dict(kwargs))
    )
    # a changed tensor is an argument, of which there is a copy, or a buffer
    given = {id(t) for t in pytree.tree_leaves((args, kwargs))}
    restore = restorer([copies[id(t)] if id(copies[id(t)]) in given else t for t in changed])

    def original() -> object:
        restore()
        with torch.no_grad():
            return function(*args, **kwargs)

    return original


def _observe(
    function: Function,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    tensors: Sequence[torch.Tensor],
    writes: Mapping[int, int],
) -> tuple[tuple[OutputSpec, ...], str, Build | None]:
    """Run the original once (on copies where it mutates): its results, how they lie, what makes them up."""
    if writes:
        copies: dict[int, torch.Tensor] = {}

        def copied(tensor: torch.Tensor) -> torch.Tensor:
            return copies.setdefault(id(tensor), _clone(tensor))

        args, kwargs = pytree.tree_map_only(torch.Tensor, copied, (tuple(args), dict(kwargs)))
        tensors = [copies.get(id(t), t) for t in tensors]
    given, form = pytree.tree_flatten((tuple(args), dict(kwargs)))
    args, kwargs = pytree.tree_unflatten(given, form)
    try:
        with torch.no_grad():
            result = function(*args, **kwargs)
    except Exception as error:  # the caller's own: lifting, which sees no values, did not meet it
        raise Unsupported(f"the program fails: {type(error).__name__}: {error}") from error
    left, left_form = pytree.tree_flatten((args, kwargs))
    if left_form != form or any(a is not b for a, b in zip(given, left, strict=True)):
        raise Unsupported("the program changes a list or a dict among its arguments")
    leaves, spec = pytree.tree_flatten(result)
    outputs: list[torch.Tensor] = []
    specs: list[OutputSpec] = []
    constants: list[Any] = []
    for leaf in leaves:
        if isinstance(leaf, torch.Tensor):
            specs.append(_spec(leaf, tensors, outputs))
            outputs.append(leaf)
            constants.append(None)
        elif isinstance(leaf, bool | int | float | str | None):
            constants.append({"value": leaf})
        else:
            raise Unsupported(f"the program returns a {type(leaf).__name__}")
    if not outputs:
        raise Unsupported("the program returns no tensor")
    whole = pytree.tree_leaves(result, is_leaf=lambda v: isinstance(v, torch.Size))
    if any(isinstance(v, torch.Size) for v in whole):
        raise Unsupported("the program returns a torch.Size")
    if isinstance(result, torch.Tensor):
        return tuple(specs), json.dumps({"spec": None}), None

    def build(tensors: Sequence[torch.Tensor]) -> Any:
        return pytree.tree_unflatten(_filled(constants, tensors), spec)

    return tuple(specs), _described(result), build


def _clone(tensor: torch.Tensor) -> torch.Tensor:
    made = torch.empty_strided(
        tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device
    )
    return made.copy_(tensor.detach())


def _spec(
    result: torch.Tensor, tensors: Sequence[torch.Tensor], earlier: Sequence[torch.Tensor]
) -> OutputSpec:
    shape, strides = tuple(result.shape), tuple(result.stride())
    if result.layout is not torch.strided or type(result) not in (torch.Tensor, torch.nn.Parameter):
        raise Unsupported(f"the program returns a {type(result).__name__} of {result.layout}")
    for kind, bases in (("input", tensors), ("output", earlier)):
        for i, base in enumerate(bases):
            if _shares(result, base):
                offset = int(result.storage_offset()) - int(base.storage_offset())
                same = result is base
                if type(result) is torch.nn.Parameter and not same:
                    break
                return OutputSpec(shape, strides, f"{kind}:{i}", offset, same)
    if type(result) is torch.nn.Parameter:
        raise Unsupported("the program makes a new parameter")
    return OutputSpec(shape, strides)


def _shares(a: torch.Tensor, b: torch.Tensor) -> bool:
    first, second = a.untyped_storage().data_ptr(), b.untyped_storage().data_ptr()
    return first == second != 0 and a.numel() > 0
