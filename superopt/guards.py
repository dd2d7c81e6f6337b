"""What a plan silently depends on besides its inputs: code, globals, closures, configuration.

In: a function or module. Out: `Guards`, which say in a few microseconds whether all of it is as it was
when the plan was made, and, where everything that was met is code or plain data, a fingerprint
that is the same in another process, so that a stored plan is found without lifting the program again.

Invariant: what is not understood makes the fingerprint None; it never makes a guard pass.
"""

import builtins
import hashlib
import sys
import types
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final, final

import torch

_PLAIN: Final = (bool, int, float, complex, str, bytes, type(None), type(Ellipsis))
_TORCH_PLAIN: Final = (torch.dtype, torch.device, torch.layout, torch.memory_format)
# Packages whose code is told by its version; everything else is told by its own code.
_TRUSTED: Final = ("torch", "numpy", "math", "typing", "collections", "functools", "operator")
_PRIVATE: Final = frozenset(torch.nn.Module().__dict__)
BOUND: Final = "_superopt_methods"
"""Where an instance keeps its optimized methods; nothing that a program reads."""
WRAPS: Final = "_superopt_wraps"
"""What classes have whose instances compute the same as their `original`."""
_HOOKS: Final = ("_forward_hooks", "_forward_pre_hooks")
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


@final
@dataclass(slots=True)
class Guards:
    """Conditions under which plans stay right; `hold` checks them all.

    `contents` are the attributes, lists, dicts and sets that were met, with copies of what they held.
    """

    identities: list[tuple[dict[str, Any], str, Any]] = field(default_factory=list)
    values: list[tuple[dict[str, Any], str, Any]] = field(default_factory=list)
    attributes: list[tuple[type, str, Any]] = field(default_factory=list)
    cells: list[tuple[Any, Any]] = field(default_factory=list)
    tensors: list[tuple[torch.Tensor, int]] = field(default_factory=list)
    snapshots: list[tuple[Any, Any]] = field(default_factory=list)
    sizes: list[tuple[dict[str, Any], int]] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)
    modules: list[torch.nn.Module] = field(default_factory=list)
    contents: list[tuple[str, Any, Any]] = field(default_factory=list)
    digest: str = ""

    def hold(self) -> bool:
        """Say whether nothing has changed since the guards were taken."""
        try:
            return self._unchanged()
        except (RuntimeError, TypeError, ValueError):  # tensors that are not the same ones
            return False

    def _unchanged(self) -> bool:
        for place, name, value in self.identities:
            if place.get(name, _MISSING) is not value:
                return False
        for place, name, value in self.values:
            now = place.get(name, _MISSING)
            if now is not value and (type(now) is not type(value) or now != value):
                return False
        for kind, name, value in self.attributes:
            now = kind.__dict__.get(name, _MISSING)
            if now is not value and (type(now) is not type(value) or now != value):
                return False
        for cell, value in self.cells:
            now = _cell(cell)
            if now is not value and (type(now) is not type(value) or now != value):
                return False
        for tensor, version in self.tensors:
            if tensor._version != version:
                return False
        # an attribute that is new may hide one of the class
        for inside, size in self.sizes:
            if _size(inside) != size:
                return False
        return all(now == then for now, then in self.snapshots)

    def put_back(self) -> str:
        """Undo what running the program did to what was met; return the name of one such thing or "".

        Tensors are not looked into, and other tensors in the place of buffers are not named: lifting knows them.
        """
        changed = ""
        for name, now, then in self.contents:
            if not _same_items(now, then):
                changed = changed if name == "_buffers" else name
                _refill(now, then)
        for place, name, value in (*self.identities, *self.values):
            if place.get(name, _MISSING) is not value and type(value) not in _CONTAINERS:
                changed = changed if place.get(name, _MISSING) == value else name
                place[name] = value
        for cell, value in self.cells:
            if _cell(cell) is not value:
                changed, cell.cell_contents = "a variable of an enclosing function", value
        return changed

    @property
    def fingerprint(self) -> str | None:
        """Digest of all that was met, or None where something has no form that lasts."""
        return None if self.unknown else self.digest


_MISSING: Final = object()
_CONTAINERS: Final = (list, dict, set)


def _same_items(now: Any, then: Any) -> bool:
    """Compare what containers hold by identity; our own entry among attributes does not count."""
    if isinstance(now, set):
        return bool(now == then)
    pairs = [list(c.items()) if isinstance(c, dict) else list(enumerate(c)) for c in (now, then)]
    left, right = ([(k, v) for k, v in items if k != BOUND] for items in pairs)
    return len(left) == len(right) and all(
        a == b and v is w for (a, v), (b, w) in zip(left, right, strict=True)
    )


def _refill(now: Any, then: Any) -> None:
    if isinstance(now, list):
        now[:] = then
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
    walk.guards.digest = walk.digest.hexdigest()
    return walk.guards


@final
class _Walk:
    def __init__(self) -> None:
        self.guards = Guards()
        self.digest = hashlib.sha256()
        self.seen: set[int] = set()
        self.kept: list[Any] = []
        self.held: dict[int, tuple[int, str]] = {}
        self.tables: dict[int, tuple[dict[str, Any], str]] = {}

    def note(self, *parts: Any) -> None:
        self.digest.update(repr(parts).encode())

    # -- values --------------------------------------------------------------------------------

    def place(self, where: dict[str, Any], name: str, depth: int) -> None:
        """Guard one entry of a namespace."""
        value = where[name]
        if _is_plain(value):
            self.guards.values.append((where, name, value))
        elif type(value) in (list, dict, set):  # an equal one is as good: export makes copies
            self.guards.values.append((where, name, value.copy()))
        else:
            self.guards.identities.append((where, name, value))
        self.value(name, value, depth)

    def value(self, name: str, value: Any, depth: int) -> None:
        value = _unwrapped(value)
        if _is_plain(value):
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
            self.note(name, value.__name__, _version_of(value.__name__))
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
        elif isinstance(value, list | tuple | dict | set | frozenset):
            self.container(name, value, depth + 1)
        elif isinstance(value, type) and not _trusted(value):
            self.class_(value, depth + 1)
        elif _trusted(value):
            self.note(name, _name_of(value), _version_of(_package(value)))
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
            self.guards.snapshots.append((value, value.copy()))
            self.guards.contents.append((name, value, value.copy()))

    def other(self, name: str, value: Any, depth: int) -> None:
        """Guard the attributes of an object of a user's class, whose code is not known."""
        self.guards.unknown.append(f"{name} is a {type(value).__name__}")
        if not isinstance(value, type) and not _trusted(type(value)):
            self.class_(type(value), depth + 1)
        inside = getattr(value, "__dict__", None)
        if isinstance(inside, dict) and not isinstance(value, type):
            self.guards.sizes.append((inside, _size(inside)))
            self.guards.contents.append((f"attributes of {name}", inside, inside.copy()))
            for key in list(inside):
                if key != BOUND:
                    self.place(inside, key, depth + 1)

    # -- code ----------------------------------------------------------------------------------

    def function(self, name: str, function: types.FunctionType, depth: int) -> None:
        if _trusted(function):
            self.note(name, _name_of(function), _version_of(_package(function)))
            return
        self.code(function.__code__)
        self.value(f"{name}.__defaults__", function.__defaults__, depth)
        self.value(f"{name}.__kwdefaults__", function.__kwdefaults__, depth)
        for cell_name, cell in zip(
            function.__code__.co_freevars, function.__closure__ or (), strict=True
        ):
            inside = _cell(cell)
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
        for name in sorted(names):
            if name in namespace:
                self.place(namespace, name, depth)
                value = namespace[name]
                if isinstance(value, types.ModuleType) and not _trusted(value):
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
        for base in kind.__mro__:
            if base in (torch.nn.Module, object):
                break
            if _trusted(base):
                self.note(base.__qualname__, _version_of(_package(base)))
                continue
            for name, member in sorted(vars(base).items(), key=lambda pair: pair[0]):
                if name not in _CLASS_NAMES:
                    self.member(base, name, member, depth)

    def member(self, base: type, name: str, member: Any, depth: int) -> None:
        self.guards.attributes.append((base, name, member))
        member = _unwrapped(member)
        if isinstance(member, staticmethod | classmethod):
            member = member.__func__
        if isinstance(member, property):
            member = member.fget
        if isinstance(member, types.FunctionType):
            self.function(name, member, depth + 1)
        elif _is_plain(member):
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
        self.guards.identities += [(first, first_name, tensor), (table, name, tensor)]

    def module(self, module: torch.nn.Module, depth: int) -> None:
        if any(module is m for m in self.guards.modules):
            self.note("a module again")
            return
        self.guards.modules.append(module)
        # parameters and buffers are found by their place at every call, wherever else they are kept
        for members in (module._parameters, module._buffers):
            for name, tensor in members.items():
                if tensor is not None:
                    self.tensor(members, name, tensor)
        self.class_(type(module), depth)
        inside = module.__dict__
        self.guards.sizes.append((inside, _size(inside)))
        self.guards.contents.append(
            (f"attributes of {type(module).__name__}", inside, inside.copy())
        )
        for table in ("_parameters", "_buffers", "_modules"):
            self.guards.contents.append((table, inside[table], inside[table].copy()))
        for name in sorted(inside):
            if (name not in _PRIVATE and name != BOUND) or name == "training":
                self.place(inside, name, depth)
        if any(inside.get(hooks) for hooks in _HOOKS):
            self.guards.unknown.append("a module has hooks")
        for hooks in _HOOKS:
            if isinstance(inside.get(hooks), dict):
                self.guards.snapshots.append((inside[hooks], inside[hooks].copy()))
        for table in ("_parameters", "_buffers"):
            for name, tensor in inside[table].items():
                self.note(table, name, None if tensor is None else (tensor.shape, tensor.dtype))
        for name, child in inside["_modules"].items():
            self.guards.identities.append((inside["_modules"], name, child))
            self.note("child", name)
            if child is not None:
                self.module(child, depth + 1)


def _size(inside: dict[str, Any]) -> int:
    return len(inside) - (BOUND in inside)


def _cell(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:
        return _MISSING


def _unwrapped(value: Any) -> Any:
    """Return what superopt was asked to optimize: it computes the same."""
    return value.original if getattr(type(value), WRAPS, False) else value


def _is_plain(value: Any) -> bool:
    if isinstance(value, tuple):
        return all(_is_plain(v) for v in value)
    return type(value) in _PLAIN or isinstance(value, _TORCH_PLAIN)


def _package(value: Any) -> str:
    name = getattr(value, "__module__", None) or getattr(value, "__name__", "")
    if isinstance(value, types.ModuleType):
        name = value.__name__
    if isinstance(value, types.BuiltinFunctionType) and not isinstance(name, str):
        name = "builtins"
    return name if isinstance(name, str) else ""


def _trusted(value: Any) -> bool:
    if isinstance(value, types.BuiltinFunctionType | types.BuiltinMethodType):
        return True
    if isinstance(value, type) and value.__module__ == "builtins":
        return True
    root = _package(value).partition(".")[0].lstrip("_")
    return (root in _TRUSTED and not hasattr(value, "__dict__")) or (
        root in _TRUSTED and isinstance(value, types.ModuleType | types.FunctionType | type)
    )


def _name_of(value: Any) -> str:
    return str(getattr(value, "__qualname__", None) or getattr(value, "__name__", type(value)))


def _version_of(package: str) -> str:
    root = sys.modules.get(package.partition(".")[0])
    return str(getattr(root, "__version__", sys.version_info[:3]))
