"""Seeing, within nanoseconds for each of thousands of places, that nothing has changed.

In: dicts and what their names stood for, containers, cells, attributes, tensors. Out: checks without
arguments. A namespace, the attributes of an object, a class and a table of a module are all dicts: they are
looked through in one loop, of C where there is a compiler.

Invariant: numbers and texts may be replaced by the same ones, of the same type, lists, dicts and sets by equal
ones, which are watched from then on; all else by nothing.
"""

import ctypes
import gc
from array import array
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from inspect import isfunction
from itertools import chain, repeat
from operator import attrgetter, call, is_
from pathlib import Path
from typing import Any, Final, final

import torch

from superopt.codegen.cpu.compile import compile_source
from superopt.codegen.errors import CodegenError

Check = Callable[[], bool]
MISSING: Final = object()
CONTAINERS: Final = (list, dict, set)
BOUND: Final = "_superopt_methods"
"""Where an instance keeps its optimized methods; nothing that a program reads."""
_PLAIN: Final = (bool, int, float, complex, str, bytes, type(None), type(Ellipsis))
_TORCH_PLAIN: Final = (torch.dtype, torch.device, torch.layout, torch.memory_format)
_WRITTEN_OUT: Final = 64
_cell_contents: Final = attrgetter("cell_contents")
_version: Final = attrgetter("_version")


def is_plain(value: Any) -> bool:
    """Say whether a value is a number, a text, a type of elements, or a tuple of such."""
    if isinstance(value, tuple):
        return all(is_plain(v) for v in value)
    return type(value) in _PLAIN or isinstance(value, _TORCH_PLAIN)


def same(now: Any, then: Any) -> bool:
    """Say whether a value is the object that it was, or the same number or text."""
    if now is then:
        return True
    # by their text: 1 is not 1.0 inside tuples either, and 0.0 not -0.0
    return type(now) is type(then) and is_plain(then) and repr(now) == repr(then)


def alike(now: Any, then: Any) -> bool:
    """Say whether a list, dict or set holds what its copy `then` does, in the same order."""
    if len(now) != len(then):
        return False
    if isinstance(then, dict):
        return all(map(same, chain(now, now.values()), chain(then, then.values())))
    if isinstance(then, set):
        return {(type(v), v) for v in now} == {(type(v), v) for v in then}
    return all(map(same, now, then))


def dict_of(kind: type) -> dict[str, Any]:
    """Return the attributes of a class, of which `__dict__` is only a view."""
    (found,) = (d for d in gc.get_referents(vars(kind)) if type(d) is dict)
    return found


@final
@dataclass(slots=True, eq=False)
class Space:
    """A dict, and what some of its names stood for; where it is closed, how many names it had.

    `copies` are of the lists, dicts and sets among them. An equal one is as good: tracing makes such.
    """

    inside: dict[Any, Any]
    entries: dict[Any, Any] = field(default_factory=dict)
    copies: dict[Any, Any] = field(default_factory=dict)
    count: int | None = None

    def add(self, name: Any) -> None:
        """Watch one name."""
        value = self.entries.setdefault(name, self.inside[name])
        if type(value) in CONTAINERS:
            self.copies.setdefault(name, value.copy())

    def close(self) -> None:
        """Let no name come or go from now on."""
        if self.count is None:
            self.count = _count(self.inside)

    def accepts(self, name: Any, now: Any) -> bool:
        """Say whether a name may stand for another object."""
        copy = self.copies.get(name)
        return same(now, self.entries[name]) or (type(now) is type(copy) and alike(now, copy))


_SOURCE: Final = """#include <cstddef>
#include <cstdint>
extern "C" __attribute__((visibility("default"))) int64_t first_change(
    void* (*get)(void*, void*), ptrdiff_t (*size)(void*), int64_t start,
    int64_t places, void** dicts, void** names, void** values,
    int64_t closed, void** sized, int64_t* sizes) {
  for (int64_t i = start; i < places; i++)
    if (get(dicts[i], names[i]) != values[i]) return i;
  for (int64_t i = start > places ? start - places : 0; i < closed; i++)
    if (size(sized[i]) != sizes[i]) return places + i;
  return -1;
}
"""
_WORTH_C: Final = 32
"""Places from which on a call into C is faster (32 layers of a Llama: 4x, x86-64, Python 3.11)."""


@final
class Places:
    """All that is watched in dicts.

    A place has a number: first come the names of `spaces`, then the sizes of the dicts that are closed.
    """

    def __init__(
        self, spaces: Sequence[Space], empty: Sequence[dict[Any, Any]], watch: Callable[[Any], None]
    ) -> None:
        self.watch = watch
        self.where = [(space, name) for space in spaces for name in space.entries]
        self.values = [space.entries[name] for space, name in self.where]
        closed = [(space.inside, space.count) for space in spaces if space.count is not None]
        closed += [(inside, 0) for inside in empty]
        self.sized = [inside for inside, _ in closed]
        self.counts = [count for _, count in closed]
        self.sizes = self.counts.copy()
        self.gets: list[Callable[..., Any]] = [space.inside.get for space, _ in self.where]
        self.names = [name for _, name in self.where]
        self.first: Callable[[int], int] = self._first
        self.pointers: tuple[array[int], ...] = ()
        self.quick = self._quick()

    def unchanged(self) -> bool:
        """Say whether all is as it was, or as good."""
        if self.quick is not None and self.quick():
            return True
        at = self.first(0)
        while at >= 0:
            if not self._accept(at):
                return False
            at = self.first(at + 1)
        return True

    def _quick(self) -> Check | None:
        """Return a check of few places that is written out: this is on the path of every call."""
        if not 0 < len(self.where) + len(self.sized) < _WORTH_C:
            return None
        scope = {"missing": MISSING, "values": self.values, "sizes": self.sizes}
        scope |= {f"get{i}": get for i, get in enumerate(self.gets)}
        scope |= {f"name{i}": name for i, name in enumerate(self.names)}
        scope |= {f"inside{i}": inside for i, inside in enumerate(self.sized)}
        tests = [f"get{i}(name{i}, missing) is values[{i}]" for i in range(len(self.where))]
        tests += [f"len(inside{i}) == sizes[{i}]" for i in range(len(self.sized))]
        return written(" and ".join(tests), scope)

    def compile(self, folder: Path) -> None:
        """Let C look through the dicts from now on, where that is worth it and there is a compiler."""
        if len(self.where) + len(self.sized) < _WORTH_C:
            return
        try:
            library = ctypes.PyDLL(str(compile_source(_SOURCE, folder)))
        except (CodegenError, OSError):
            return  # it is slower, and right
        dicts = [space.inside for space, _ in self.where]
        columns = [_ids(c) for c in (dicts, self.names, self.values, self.sized)]
        self.pointers = (*columns, array("q", self.sizes))
        addresses = [ctypes.c_void_p(column.buffer_info()[0]) for column in self.pointers]
        places, closed = map(ctypes.c_int64, (len(self.where), len(self.sized)))
        function = library.first_change
        function.restype = ctypes.c_int64
        api = (ctypes.pythonapi.PyDict_GetItemWithError, ctypes.pythonapi.PyDict_Size)
        search = partial(function, *(ctypes.cast(f, ctypes.c_void_p) for f in api))
        rest = (places, *addresses[:3], closed, *addresses[3:])
        from_start = partial(search, ctypes.c_int64(0), *rest)
        self.first = lambda start: (
            from_start() if not start else search(ctypes.c_int64(start), *rest)
        )

    def _first(self, start: int) -> int:
        """Return the number of the first place from `start` on where another object is, or -1."""
        now = map(call, self.gets, self.names, repeat(MISSING))
        if (
            start == 0
            and all(map(is_, now, self.values))
            and list(map(len, self.sized)) == self.sizes
        ):
            return -1
        for at in range(start, len(self.where)):
            if self.gets[at](self.names[at], MISSING) is not self.values[at]:
                return at
        for at in range(max(0, start - len(self.where)), len(self.sized)):
            if len(self.sized[at]) != self.sizes[at]:
                return len(self.where) + at
        return -1

    def _accept(self, at: int) -> bool:
        """Say whether what is in a place now is as good as what was; expect it there from now on."""
        number = at - len(self.where)
        if number >= 0:
            inside = self.sized[number]
            if _count(inside) != self.counts[number]:
                return False
            self.sizes[number] = len(inside)
            if self.pointers:
                self.pointers[-1][number] = len(inside)
            return True
        space, name = self.where[at]
        now = space.inside.get(name, MISSING)
        if not space.accepts(name, now):
            return False
        if name in space.copies:
            self.watch(now)
        space.entries[name] = self.values[at] = now
        if self.pointers:
            self.pointers[2][at] = id(now)
        return True


def _count(inside: dict[Any, Any]) -> int:
    return len(inside) - (BOUND in inside)


def _ids(objects: Iterable[object]) -> "array[int]":
    return array("Q", map(id, objects))


def written(condition: str, scope: dict[str, Any]) -> Check:
    """Return the check of a condition, whose text is made here, of names of our own."""
    made: Check = eval(f"lambda: {condition}", scope)
    return made


def values_check(read: Callable[[], Iterable[Any]], then: Sequence[Any]) -> Check:
    """Return a check that what is read, always so many values, is the same."""

    def check() -> bool:
        return all(map(is_, read(), then)) or all(map(same, read(), then))

    return check


def slots_check(slots: Sequence[tuple[Any, str, Any]]) -> Check:
    """Return a check of attributes of objects."""
    holders, names, then = zip(*slots, strict=True)
    check = values_check(lambda: map(getattr, holders, names, repeat(MISSING)), then)
    if not all(map(isfunction, holders)) or len(names) > _WRITTEN_OUT:
        return check
    # parts of functions are always there: written out, since this is on the path of every call
    scope: dict[str, Any] = {"check": check}
    for i, (holder, value) in enumerate(zip(holders, then, strict=True)):
        scope |= {f"f{i}": holder, f"v{i}": value}
    alike = " and ".join(f"f{i}.{name} is v{i}" for i, name in enumerate(names))
    return written(f"{alike} or check()", scope)


def cells_check(cells: Sequence[tuple[Any, Any]]) -> Check:
    """Return a check of the variables of closures; ValueError where one is empty that was not."""
    full = [(cell, value) for cell, value in cells if value is not MISSING]
    empty = [cell for cell, value in cells if value is MISSING]
    places, then = [c for c, _ in full], [v for _, v in full]
    check = values_check(lambda: map(_cell_contents, places), then)
    if not empty:
        return check
    return lambda: all(contents(c) is MISSING for c in empty) and check()


def contents(cell: Any) -> Any:
    """Return what a cell holds, or `MISSING`."""
    try:
        return cell.cell_contents
    except ValueError:
        return MISSING


def tensors_check(tensors: Sequence[tuple[torch.Tensor, int]]) -> Check:
    """Return a check that tensors were not written to."""
    watched, versions = [t for t, _ in tensors], [v for _, v in tensors]
    return lambda: list(map(_version, watched)) == versions


def containers_check(snapshots: Sequence[tuple[Any, Any]]) -> Check:
    """Return a check of lists, sets, and dicts of other classes, given with copies."""
    lists = [(now, then) for now, then in snapshots if type(now) is list]
    rest = [(now, then) for now, then in snapshots if type(now) is not list]
    live = [now for now, _ in lists]
    sizes = [len(then) for _, then in lists]
    items = [item for _, then in lists for item in then]
    listed = values_check(lambda: chain.from_iterable(live), items)

    def check() -> bool:
        return list(map(len, live)) == sizes and listed() and all(alike(a, b) for a, b in rest)

    return check
