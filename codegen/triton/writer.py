"""The text of one kernel while it is written: scopes, names, indices along dims and their masks.

Blocks are powers of two in Triton: a tile dim of `n` elements stands in a block dim of `padded(n)`.
Index vectors are one-dimensional and written once, in the outermost scope that knows their axes.
"""

import keyword
import re
from dataclasses import dataclass, field
from typing import Final, final

from superopt.ir.ops import tile
from superopt.ir.tiles import DimSource

_TAKEN: Final = frozenset(
    (*keyword.kwlist, "tl", "triton", "torch", "libdevice", "range", "float", "run")
)


def word(name: str) -> str:
    """Return a name as Python reads it."""
    plain = re.sub(r"\W", "_", name, flags=re.ASCII) or "_"
    return f"x_{plain}" if plain[0] in "0123456789_" or plain in _TAKEN else plain


def padded(size: int) -> int:
    """Return the block dim that holds a tile dim of `size` elements."""
    return 1 << max(0, size - 1).bit_length()


def along(vector: str, position: int, rank: int) -> str:
    """Return a one-dimensional vector laid along one dim of a block."""
    if rank == 1:
        return vector
    return f"{vector}[{', '.join(':' if i == position else 'None' for i in range(rank))}]"


@final
@dataclass(slots=True)
class _Scope:
    loop: str | None
    head: list[str] = field(default_factory=list)
    body: list[str] = field(default_factory=list)
    known: dict[object, str] = field(default_factory=dict)


@final
class Writer:
    """Lines of a kernel, and what has a name in them."""

    def __init__(self, taken: list[str]) -> None:
        self.scopes = [_Scope(None)]
        self.axes: dict[str, str] = {}
        self._taken = dict.fromkeys(taken, 1)

    # -- lines ---------------------------------------------------------------------------------

    def put(self, line: str) -> None:
        """Add a line to the innermost scope."""
        self.scopes[-1].body.append(line)

    def name(self, stem: str) -> str:
        """Return a fresh name."""
        stem = word(stem)
        count = self._taken.get(stem, 0)
        self._taken[stem] = count + 1
        return self.name(f"{stem}_{count}") if count else stem

    def let(self, stem: str, text: str) -> str:
        """Give a value a name."""
        name = self.name(stem)
        self.put(f"{name} = {text}")
        return name

    def axis(self, name: str) -> str:
        """Return a name for the index of a grid or loop axis."""
        self.axes[name] = self.name(f"i_{name}")
        return self.axes[name]

    def open(self, loop: str) -> None:
        """Begin the body of a loop."""
        self.scopes.append(_Scope(loop))

    def close(self, head: str) -> None:
        """End the body of a loop and write it under `head`."""
        inner = self.scopes.pop()
        self.put(head)
        self.scopes[-1].body += ["    " + line for line in (*inner.head, *inner.body)]

    def lines(self) -> list[str]:
        """Return all lines."""
        (scope,) = self.scopes
        return [*scope.head, *scope.body]

    def known(self, key: object, text: str) -> str | None:
        """Return the name under `key` where one is in scope; `text` is kept for later uses."""
        for scope in self.scopes:
            if key in scope.known:
                return scope.known[key]
        self.scopes[-1].known[key] = text
        return None

    def _once(self, key: object, loops: set[str], stem: str, text: str) -> str:
        """Return the name of a value that is written once, as far out as its loops allow."""
        for scope in self.scopes:
            if key in scope.known:
                return scope.known[key]
        depth = max((i for i, s in enumerate(self.scopes) if s.loop in loops), default=0)
        scope = self.scopes[depth]
        name = self.name(stem)
        scope.head.append(f"{name} = {text}")
        scope.known[key] = name
        return name

    # -- indices -------------------------------------------------------------------------------

    def local(self, size: int) -> str:
        """Return positions inside a tile dim of `size` elements."""
        wide = padded(size)
        return self._once(("local", wide), set(), f"r{wide}", f"tl.arange(0, {wide})")

    def offset(self, dim: tile.DimMap) -> str:
        """Return the index of a tile's first element."""
        terms, stride = [], dim.tile
        for name, count in reversed(dim.axes):
            terms.append(self.axes[name] + (f" * {stride}" if stride != 1 else ""))
            stride *= count
        return " + ".join(reversed(terms)) or "0"

    def index(self, dim: tile.DimMap) -> str:
        """Return the indices that a tile covers: a vector, or a number for tiles of one element."""
        loops = {name for name, _ in dim.axes}
        stem = "_".join(name for name, _ in dim.axes)
        if dim.tile == 1:
            text = self.offset(dim)
            return f"({text})" if " + " in text else text
        if not dim.axes:
            return self.local(dim.tile)
        text = f"{self.offset(dim)} + {self.local(dim.tile)}"
        return self._once(("index", dim), loops, stem, text)

    def inside(self, size: int, source: DimSource | None) -> list[str]:
        """Return conditions (vectors or numbers) under which positions of a tile dim exist."""
        found = []
        if padded(size) != size:
            text = f"{self.local(size)} < {size}"
            found.append(self._once(("tile", size), set(), f"in_{size}", text))
        if source is not None and source.ragged and source.map.tile == size:
            loops = {name for name, _ in source.map.axes}
            index = self.index(source.map)
            if source.map.tile == 1:
                return [*found, f"({index} < {source.extent})"]
            text = f"{index} < {source.extent}"
            found.append(self._once(("inside", source), loops, f"{index}_in", text))
        return found

    def mask(self, dims: list[tuple[int, int, DimSource | None]], rank: int) -> str:
        """Return the condition under which positions exist along (position, size, source) dims."""
        terms: dict[str, None] = {}
        for position, size, source in dims:
            for condition in self.inside(size, source):
                plain = condition.startswith("(")
                terms[condition if plain else along(condition, position, rank)] = None
        return " & ".join(terms)
