"""What the parts of the C++ lowering share: where values stand, extents of ragged dims, the text.

In: a tile program. Out: `View`s (a pointer and strides per value in memory), `Extent`s (full, at run
time, as a template argument) and the lines written so far. Invariant: a value is in memory exactly if
it has a view; all others are computed where they are read.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import final

from superopt.codegen.cpu.config import CpuConfig
from superopt.codegen.cpu.expressions import ELEMENT, scalar_type
from superopt.codegen.tile_program import TileProgram
from superopt.ir.graph import Axis
from superopt.ir.node import Node
from superopt.ir.ops import tile
from superopt.ir.tiles import DimSource
from superopt.ir.types import DType, contiguous_strides

_LINE_BYTES = 64
_ALIAS_BYTES = 4096


@final
@dataclass(frozen=True, slots=True)
class View:
    """A value in memory: element i stands at pointer + sum(i * stride).

    `ahead` is the distance to what is read after it, or of an output to what is fetched for writing, in
    elements; 0 where nothing is known to be.
    """

    pointer: str
    element: str
    dtype: DType
    strides: tuple[int, ...]
    in_scratch: bool
    ahead: int = 0


@final
@dataclass(frozen=True, slots=True)
class Extent:
    """Extent of a tile dim: of a full tile, in this iteration, and as a template argument."""

    full: int
    text: str
    static: str

    @property
    def known(self) -> bool:
        """True when it is a number in the text."""
        return self.text == str(self.full)


@final
@dataclass(slots=True)
class Context:
    """State of one lowering."""

    program: TileProgram
    config: CpuConfig
    views: dict[Node, View] = field(default_factory=dict)
    lines: list[str] = field(default_factory=list)
    depth: int = 1
    scratch_bytes: int = 0
    declarations: list[str] = field(default_factory=list)
    ragged: dict[DimSource, str] = field(default_factory=dict)
    full_sources: set[DimSource] = field(default_factory=set)
    read: set[str] = field(default_factory=set)
    """Pointers that some vector loop has read."""
    fetched: set[str] = field(default_factory=set)
    """Pointers of which a vector loop has fetched what comes next."""
    shared: dict[tuple[Node, str], tuple[str, str]] = field(default_factory=dict)
    """Operands of products, in rows or pairs, that blocks leave each other: where they are, and of which block each is."""
    remembered: list[tuple[int, int]] = field(default_factory=list)
    """Where in scratch memory, and how many, numbers of blocks stand: -1 before the first block."""
    counter: int = 0

    def write(self, text: str) -> None:
        """Add one line at the current depth."""
        self.lines.append("  " * self.depth + text)

    @contextmanager
    def block(self, head: str) -> Iterator[None]:
        """Open a brace after `head`, close it at the end."""
        self.write(f"{head} {{")
        self.depth += 1
        yield
        self.depth -= 1
        self.write("}")

    def fresh(self, stem: str) -> str:
        """Return a name that no other value has."""
        self.counter += 1
        return f"{stem}{self.counter}"

    def allocate(
        self,
        shape: tuple[int, ...],
        dtype: DType,
        stem: str,
        *,
        dense: bool = False,
        half: bool = False,
    ) -> View:
        """Reserve scratch memory; rows whose starts would share cache sets get a line more.

        16-bit floats are kept as floats, but for `half`.
        """
        kept = dtype if half else dtype.wide
        row = shape[-1] if shape else 1
        rows = 1
        for extent in shape[:-1]:
            rows *= extent
        if not dense and rows > 1 and row * kept.size_bytes % _ALIAS_BYTES == 0:
            row += _LINE_BYTES // kept.size_bytes
        strides = contiguous_strides((*shape[:-1], row)) if shape else ()
        name = self.fresh(stem)
        element = element_type(dtype) if half else scalar_type(dtype)
        self.declarations.append(
            f"{element}* const {name} = reinterpret_cast<{element}*>(memory + {self.scratch_bytes});"
        )
        size = rows * row * kept.size_bytes
        # one vector more: a full-width access at the last elements stays inside
        self.scratch_bytes += (size + 64 + 63) // 64 * 64
        return View(name, element, kept, strides, True)

    def remember(self, count: int) -> str:
        """Reserve numbers of blocks in scratch memory."""
        self.remembered.append((self.scratch_bytes, count))
        return self.allocate((count,), DType.I64, "made").pointer

    # -- axes and extents ----------------------------------------------------------------------

    def axis_text(self, name: str) -> str:
        """Return the C++ variable that holds the index of a grid or loop axis."""
        return f"i_{name}"

    def position(self, axes: Sequence[Axis]) -> str:
        """Return the number of the point at which axes stand, among all of their points."""
        total = ""
        for axis in axes:
            index = self.axis_text(axis.name)
            total = f"({total} * {axis.count} + {index})" if total else index
        return total or "0"

    def offset_text(self, dim: tile.DimMap) -> str:
        """First element of the tensor dim that the current tile covers."""
        total = ""
        for name, count in dim.axes:
            index = self.axis_text(name)
            total = f"({total} * {count} + {index})" if total else index
        if not total:
            return "0"
        return total if dim.tile == 1 else f"{total} * {dim.tile}"

    def extent_of(self, source: DimSource | None, full: int) -> Extent:
        """Extent of a tile dim whose positions come from `source`."""
        if source is None or not source.ragged or full == 1 != source.map.tile:
            return Extent(full, str(full), str(full))
        if source in self.full_sources:
            return Extent(full, str(full), str(full))
        looped = any(self._is_loop(n) for n, _ in source.map.axes)
        return Extent(full, self.ragged[source], "-1" if looped else f"(FULL ? {full} : -1)")

    def extents(self, node: Node) -> list[Extent]:
        """Extents of all dims of a tile."""
        sources = self.program.sources[node]
        if len(sources) != len(node.shape):
            sources = (None,) * len(node.shape)
        return [self.extent_of(s, d) for s, d in zip(sources, node.shape, strict=True)]

    def _is_loop(self, name: str) -> bool:
        return any(a.name == name for a in self.program.graph.loops)


def element_type(dtype: DType) -> str:
    """Return the C++ type of `dtype` in tensors."""
    return ELEMENT[dtype]
