"""What a plan silently depends on besides its inputs: code, globals, closures, configuration.

In: a function or module. Out: `Guards`, which say in a few microseconds whether all of it is as it was
when the plan was made, and, where everything that was met is code or plain data, a fingerprint
that is the same in another process, so that a stored plan is found without lifting the program again.

Invariant: what is not understood makes the fingerprint None; it never makes a guard pass.
"""

import builtins
import collections
import functools
import hashlib
import logging
import types
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, final

import numpy as np
import torch

from superopt.errors import Unsupported
from superopt.provenance import (
    is_installed,
    is_trusted,
    lasting_text,
    name_of,
    package_of,
    version_of,
)
from superopt.watch import (
    BOUND,
    CONTAINERS,
    MISSING,
    Check,
    Places,
    Space,
    cells_check,
    containers_check,
    contents,
    dict_of,
    is_plain,
    same,
    slots_check,
    tensors_check,
    written,
)

# The last is left in a module by `torch.compile`: nothing is computed from it, and the next process,
# which compiles nothing, is to find the same plan.
_PRIVATE: Final = frozenset({*torch.nn.Module().__dict__, BOUND, "_is_torch_compile"})
WRAPS: Final = "_superopt_wraps"
"""What classes have whose instances compute the same as their `original`."""
_COMPILED: Final = "_torchdynamo_orig_callable"
"""Under which name a function that `torch.compile` made keeps the one that it was given."""
_HOOKS: Final = ("_forward_hooks", "_forward_pre_hooks")
_TABLES: Final = ("_parameters", "_buffers", "_modules")
_GLOBAL_HOOKS: Final = ("_global_forward_hooks", "_global_forward_pre_hooks")
_TABLE_TYPES: Final = (dict, collections.OrderedDict)
_DEPTH: Final = 12
# What a class always has, and what only making an instance needs.
_CLASS_NAMES: Final = frozenset(
    [
        "__init__",
        "__module__",
        "__qualname__",
        "__doc__",
        "__dict__",
        "__weakref__",
        "__annotations__",
        "__firstlineno__",
        "__static_attributes__",
        "__annotate_func__",
        "__annotations_cache__",
        "__annotate__",
        "__classdictcell__",
    ]
)
_PARTS: Final = ("__code__", "__defaults__", "__kwdefaults__")
"""What reloading an edited file in a notebook puts into the functions that there are."""
_WALKED: Final = (list, tuple, dict, set, frozenset, collections.deque)


@final
@dataclass(slots=True)
class Guards:
    """Conditions under which plans stay right; `hold` checks them all.

    `spaces` are the namespaces, attributes, tables and dicts that were met, `classes` those of classes, by
    their ids; `empty` the tables with nothing in them; `contents` what was met that programs may
    write to, with copies of what it held.
    """

    spaces: dict[int, Space] = field(default_factory=dict)
    classes: dict[int, Space] = field(default_factory=dict)
    empty: list[dict[str, Any]] = field(default_factory=list)
    cells: list[tuple[Any, Any]] = field(default_factory=list)
    tensors: list[tuple[torch.Tensor, int]] = field(default_factory=list)
    snapshots: list[tuple[Any, Any]] = field(default_factory=list)
    slots: list[tuple[Any, str, Any]] = field(default_factory=list)
    arrays: list[tuple[np.ndarray[Any, Any], bytes]] = field(default_factory=list)
    contents: list[tuple[str, Any, Any]] = field(default_factory=list)
    modules: list[torch.nn.Module] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)
    digest: str = ""
    check: Check = field(init=False)
    places: Places | None = None
    folder: Path | None = None

    def hold(self) -> bool:
        """Say whether nothing has changed since the guards were taken."""
        try:
            return self.check()
        except ValueError:  # a variable of an enclosing function was deleted
            return False

    def seal(self) -> None:
        """Prepare the checks: this is on the path of every call, and a model has thousands of places."""
        spaces = [*self.spaces.values(), *self.classes.values()]
        checks: list[Check] = []
        if spaces or self.empty:
            self.places = Places(spaces, self.empty, self._also)
            checks.append(self.places.unchanged)
        if self.cells:
            checks.append(cells_check(self.cells))
        if self.tensors:
            checks.append(tensors_check(self.tensors))
        if self.slots:
            checks.append(slots_check(self.slots))
        if self.snapshots:
            checks.append(containers_check(self.snapshots))
        if self.arrays:
            arrays = tuple(self.arrays)
            checks.append(lambda: all(array.tobytes() == then for array, then in arrays))
        names = [f"check{i}" for i in range(len(checks))]
        condition = " and ".join(f"{name}()" for name in names) or "True"
        self.check = written(condition, dict(zip(names, checks, strict=True)))
        if self.folder is not None:
            self.compile(self.folder)

    def compile(self, folder: Path) -> None:
        """Let compiled code, kept in `folder`, do the checking."""
        self.folder = folder
        if self.places is not None:
            self.places.compile(folder)

    def _also(self, value: Any) -> None:
        """Watch a container that took the place of an equal one."""
        self.watch(value)
        self.seal()

    def watch(self, value: Any) -> None:
        """Watch what a list, dict or set holds."""
        if type(value) in _TABLE_TYPES and not value:
            self.empty.append(value)
        elif type(value) is dict:
            space = self.space(value)
            for name in value:
                space.add(name)
            space.close()
        elif all(value is not known for known, _ in self.snapshots):
            self.snapshots.append((value, value.copy()))

    def space(self, inside: dict[Any, Any]) -> Space:
        """Return what is watched of a dict."""
        return self.spaces.setdefault(id(inside), Space(inside))

    def fold(self, tensors: Sequence[torch.Tensor]) -> None:
        """Watch tensors whose values became a part of plans, and the places where modules keep them."""
        self.tensors += [(t, t._version) for t in tensors]
        folded = {id(t) for t in tensors}
        for module in self.modules:
            for name, tensor in module._buffers.items():
                if id(tensor) in folded:
                    self.space(module._buffers).add(name)
        self.seal()

    def put_back(self) -> str:
        """Undo what running the program did to what was met; return the name of one such thing or "".

        Tensors are not looked into, and other tensors in the place of buffers are not named: lifting knows them.
        """
        changed = ""
        for name, now, then in self.contents:
            if not _same_items(now, then):
                changed = changed if name == "_buffers" else name
                _refill(now, then)
        for space in self.spaces.values():
            for name, value in space.entries.items():
                now = space.inside.get(name, MISSING)
                if now is not value and type(value) not in CONTAINERS:
                    changed = changed if same(now, value) else str(name)
                    space.inside[name] = value
        for holder, name, value in self.slots:
            now = getattr(holder, name, MISSING)
            if now is not value:
                changed = name
                _put(holder, name, value)
        for cell, value in self.cells:
            if contents(cell) is not value:
                changed, cell.cell_contents = "a variable of an enclosing function", value
        return changed

    @property
    def fingerprint(self) -> str | None:
        """Digest of all that was met, or None where something has no form that lasts."""
        return None if self.unknown else self.digest


def _same_items(now: Any, then: Any) -> bool:
    """Compare what containers hold by identity; our own entry among attributes does not count."""
    if isinstance(now, set):
        return bool(now == then)
    pairs = [list(c.items()) if isinstance(c, dict) else list(enumerate(c)) for c in (now, then)]
    left, right = ([(k, v) for k, v in items if k != BOUND] for items in pairs)
    return len(left) == len(right) and all(
        a == b and v is w for (a, v), (b, w) in zip(left, right, strict=True)
    )


def _put(holder: Any, name: str, value: Any) -> None:
    if value is MISSING:
        delattr(holder, name)
    else:
        object.__setattr__(holder, name, value)  # classes may be frozen


def _refill(now: Any, then: Any) -> None:
    if isinstance(now, list | collections.deque):
        now.clear()
        now.extend(then)
        return
    ours = {BOUND: now[BOUND]} if isinstance(now, dict) and BOUND in now else {}
    now.clear()
    now.update(then)
    if ours:
        now.update(ours)


def take_guards(subject: Callable[..., Any]) -> Guards:
    """Walk over everything that `subject` reads apart from its arguments."""
    walk = _Walk()
    if isinstance(subject, torch.nn.Module):
        walk.module(subject, 0)
    else:
        walk.value("subject", subject, 0)
    return walk.finish()


@final
class _Walk:
    def __init__(self) -> None:
        self.guards = Guards()
        self.digest = hashlib.sha256()
        self.seen: set[int] = set()
        self.kept: list[Any] = []
        self.held: dict[int, tuple[int, str]] = {}
        self.tables: dict[int, tuple[dict[str, Any], str]] = {}
        self.placed: set[tuple[int, str]] = set()
        self.named: set[str] = set()
        self.met: set[type] = set()
        self.installed: dict[type, set[tuple[type, str]]] = {}

    def finish(self) -> Guards:
        """Follow installed classes as far as their members are named; return the guards."""
        while any(self.named_members(kind, done) for kind, done in list(self.installed.items())):
            pass
        self.guards.digest = self.digest.hexdigest()
        self.guards.seal()
        return self.guards

    def note(self, *parts: Any) -> None:
        self.digest.update(repr(parts).encode())

    # -- values --------------------------------------------------------------------------------

    def place(self, where: dict[str, Any], name: str, depth: int) -> None:
        """Guard one entry of a namespace."""
        if (id(where), name) in self.placed:
            return
        self.placed.add((id(where), name))
        self.guards.space(where).add(name)
        self.value(name, where[name], depth)

    def value(self, name: str, value: Any, depth: int) -> None:
        value = _unwrapped(value)
        if is_plain(value):
            self.note(name, type(value).__name__, value)
            return
        if id(value) in self.seen:
            self.note(name, "again")
            return
        self.seen.add(id(value))
        self.kept.append(value)
        if depth > _DEPTH:
            self.guards.unknown.append(f"{name} lies too deep")
        elif isinstance(value, weakref.ref):
            self.value(name, value(), depth + 1)
        elif isinstance(value, types.ModuleType):
            self.note(name, value.__name__, version_of(value.__name__))
        elif id(value) in self.held:
            self.note(name, self.held[id(value)])
        elif isinstance(value, torch.Tensor):
            if not value.is_inference():  # those have no version, and are not folded into plans
                self.guards.tensors.append((value, value._version))
            self.guards.unknown.append(f"{name} is a tensor")
        elif isinstance(value, torch.nn.Module):
            self.module(value, depth + 1)
        elif isinstance(value, types.FunctionType):
            self.function(name, value, depth + 1)
        elif isinstance(value, types.MethodType):
            self.value(name, value.__func__, depth + 1)
            self.value(f"{name}.__self__", value.__self__, depth + 1)
        elif isinstance(value, logging.Logger):
            self.note(name, "a logger")  # nothing that is computed depends on it
        elif isinstance(value, _WALKED) and not is_installed(type(value)):
            self.container(name, value, depth + 1)
        elif isinstance(value, type) and not is_trusted(value):
            self.class_(value, depth + 1)
        elif is_trusted(value):
            self.note(name, name_of(value), version_of(package_of(value)))
        elif isinstance(value, functools.partial):
            self.container(name, [value.func, value.args, value.keywords], depth + 1)
        elif isinstance(value, np.ndarray):
            self.guards.unknown.append(f"{name} is an array")
            self.guards.arrays.append((value, value.tobytes()))
        elif lasting_text(value):
            self.note(name, lasting_text(value), version_of(package_of(value)))
        else:
            self.other(name, value, depth)

    def container(self, name: str, value: Any, depth: int) -> None:
        self.note(name, type(value).__name__, len(value))
        if isinstance(value, dict):
            items = list(value.items())
        elif isinstance(value, set | frozenset):
            items = sorted(((repr(v), v) for v in value), key=lambda pair: pair[0])
        else:
            items = list(enumerate(value))
        for key, item in items:
            self.note(key)
            self.value(f"{name}[{key!r}]", item, depth)
        if not isinstance(value, tuple | frozenset):
            self.guards.watch(value)
            self.guards.contents.append((name, value, value.copy()))

    def other(self, name: str, value: Any, depth: int) -> None:
        """Guard the attributes of an object of a user's class, whose code is not known."""
        self.guards.unknown.append(f"{name} is a {type(value).__name__}")
        if not isinstance(value, type) and not is_trusted(type(value)):
            self.class_(type(value), depth + 1)
        if isinstance(value, type):
            return
        for slot in sorted({s for base in type(value).__mro__ for s in _slots(base)}):
            held = getattr(value, slot, MISSING)
            self.guards.slots.append((value, slot, held))
            if held is not MISSING:
                self.value(f"{name}.{slot}", held, depth + 1)
        inside = getattr(value, "__dict__", None)
        if isinstance(inside, dict):
            self.guards.space(inside).close()
            self.guards.contents.append((f"attributes of {name}", inside, inside.copy()))
            for key in list(inside):
                if key != BOUND:
                    self.place(inside, key, depth + 1)

    # -- code ----------------------------------------------------------------------------------

    def function(self, name: str, function: types.FunctionType, depth: int) -> None:
        if is_trusted(function):
            self.note(name, name_of(function), version_of(package_of(function)))
            return
        self.code(function.__code__)
        for part in _PARTS:
            held = getattr(function, part)
            self.guards.slots.append((function, part, held))
            if part != "__code__":
                self.value(f"{name}.{part}", held, depth)
        for cell_name, cell in zip(
            function.__code__.co_freevars, function.__closure__ or (), strict=True
        ):
            inside = contents(cell)
            self.guards.cells.append((cell, inside))
            self.value(cell_name, inside, depth)
        wrapped = getattr(function, "__wrapped__", None)
        if wrapped is not None:
            self.value(f"{name}.__wrapped__", wrapped, depth)
        self.names(function.__code__, function.__globals__, depth)

    def code(self, code: types.CodeType) -> None:
        self.note(code.co_code, code.co_names, code.co_varnames, code.co_freevars, code.co_flags)
        for constant in code.co_consts:
            if isinstance(constant, types.CodeType):
                self.code(constant)
            else:
                self.note(repr(constant))

    def names(self, code: types.CodeType, namespace: dict[str, Any], depth: int) -> None:
        """Guard the globals that code may read, and what it may read through user modules."""
        names = set(code.co_names)
        self.named |= names
        for name in sorted(names):
            if name in namespace:
                self.place(namespace, name, depth)
                value = namespace[name]
                if isinstance(value, types.ModuleType) and not is_trusted(value):
                    self.module_names(value, names, depth)
            elif not hasattr(builtins, name):
                self.note("attribute", name)
        for constant in code.co_consts:
            if isinstance(constant, types.CodeType):
                self.names(constant, namespace, depth)

    def module_names(self, module: types.ModuleType, names: set[str], depth: int) -> None:
        for name in sorted(names & set(vars(module))):
            self.place(vars(module), name, depth + 1)

    def class_(self, kind: type, depth: int) -> None:
        """Take in the code and the attributes of a class and its bases."""
        self.note(kind.__module__, kind.__qualname__)
        if kind in self.met:
            return
        self.met.add(kind)
        for base in kind.__mro__:
            if base in (torch.nn.Module, object):
                break
            if is_trusted(base):
                self.note(base.__qualname__, version_of(package_of(base)))
                continue
            if is_installed(base):
                self.note(base.__qualname__, version_of(package_of(base)))
                self.installed.setdefault(kind, set())
                continue
            for name, member in sorted(vars(base).items(), key=lambda pair: pair[0]):
                if name not in _CLASS_NAMES:
                    self.member(base, name, member, depth)

    def named_members(self, kind: type, done: set[tuple[type, str]]) -> bool:
        """Take in those members of the installed bases of a class that code names, and `forward`."""
        found = [
            (base, name)
            for base in kind.__mro__
            if base not in (torch.nn.Module, object) and is_installed(base)
            for name in sorted(vars(base))
            if (name == "forward" or name in self.named) and name not in _CLASS_NAMES
        ]
        new = [place for place in found if place not in done]
        done.update(new)
        for base, name in new:
            self.member(base, name, vars(base)[name], 0)
        return bool(new)

    def member(self, base: type, name: str, member: Any, depth: int) -> None:
        inside = dict_of(base)
        self.guards.classes.setdefault(id(inside), Space(inside)).add(name)
        member = _unwrapped(member)
        if isinstance(member, staticmethod | classmethod):
            member = member.__func__
        if isinstance(member, property):
            member = member.fget
        if isinstance(member, types.FunctionType):
            self.function(name, member, depth + 1)
        elif is_plain(member):
            self.note(name, type(member).__name__, member)
        else:
            self.value(f"{base.__qualname__}.{name}", member, depth + 1)

    # -- torch modules -------------------------------------------------------------------------

    def tensor(self, table: dict[str, Any], name: str, tensor: torch.Tensor) -> None:
        """Note where a module keeps a tensor; that two places share it is part of the program."""
        number = len(self.guards.modules)
        if id(tensor) not in self.held:
            self.held[id(tensor)] = (number, name)
            self.tables[id(tensor)] = (table, name)
            return
        self.note("tied", name, self.held[id(tensor)])
        first, first_name = self.tables[id(tensor)]
        self.guards.space(first).add(first_name)
        self.guards.space(table).add(name)

    def module(self, module: torch.nn.Module, depth: int) -> None:
        if any(module is m for m in self.guards.modules):
            self.note("a module again")
            return
        if not {"training", *_TABLES} <= module.__dict__.keys():
            # torch.compile and TorchScript put something in a module's place that only looks like one
            kind = f"{type(module).__module__}.{type(module).__qualname__}"
            raise Unsupported(f"a module is compiled already ({kind}): give it as it was before")
        if not self.guards.modules:
            for hooks in _GLOBAL_HOOKS:
                self.hooks(getattr(torch.nn.modules.module, hooks, None), depth)
        self.guards.modules.append(module)
        # parameters and buffers are found by their place at every call, wherever else they are kept
        for members in (module._parameters, module._buffers):
            for name, tensor in members.items():
                if tensor is not None:
                    self.tensor(members, name, tensor)
        self.class_(type(module), depth)
        inside = module.__dict__
        self.guards.space(inside).close()
        self.guards.contents.append(
            (f"attributes of {type(module).__name__}", inside, inside.copy())
        )
        for table in _TABLES:
            self.guards.contents.append((table, inside[table], inside[table].copy()))
            self.table(inside[table])
        for name in sorted(inside):
            if name not in _PRIVATE:
                self.place(inside, name, depth)
        self.guards.space(inside).add("training")
        self.note("training", module.training)
        for hooks in _HOOKS:
            self.hooks(inside.get(hooks), depth)
        for table in ("_parameters", "_buffers"):
            for name, tensor in inside[table].items():
                self.note(table, name, None if tensor is None else (tensor.shape, tensor.dtype))
        for name, child in inside["_modules"].items():
            self.note("child", name)
            if child is not None:
                self.module(child, depth + 1)

    def table(self, table: dict[str, Any]) -> None:
        """Guard what is in a table of a module: its tensors are looked up at every call."""
        if not table:
            self.guards.empty.append(table)
            return
        space = self.guards.space(table)
        space.close()
        for name, value in table.items():
            if not isinstance(value, torch.Tensor):
                space.add(name)

    def hooks(self, table: Any, depth: int) -> None:
        """Take in hooks: their code is a part of the program."""
        if isinstance(table, dict):
            self.guards.watch(table)
            for hook in table.values():
                self.guards.unknown.append("a module has hooks")
                self.value("hook", hook, depth + 1)


def _slots(kind: type) -> list[str]:
    """Return the slots of a class that Python code defined, by the names that they are read by.

    Members of C code look alike, and may not be set, nor be the same object when read again.
    """
    found = vars(kind).items() if "__slots__" in vars(kind) else ()
    return [n for n, member in found if isinstance(member, types.MemberDescriptorType)]


def _unwrapped(value: Any) -> Any:
    """Return what superopt or `torch.compile` was asked to make faster: it computes the same."""
    while True:
        compiled = vars(value).get(_COMPILED) if isinstance(value, types.FunctionType) else None
        # what wraps a compiled function carries its attributes too, but for this one
        if compiled is not None and vars(value).get("__wrapped__") is compiled:
            value = compiled
        elif getattr(type(value), WRAPS, False):
            value = value.original
        else:
            return value
