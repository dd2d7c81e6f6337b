"""Tile products: a matmul node to calls of the register-tiled kernels in runtime/gemm.h.

In: a product whose operands are in memory (tensors or scratch), and where its result goes. Out: loops
over batch dims around one call, after the copies that the call needs: an operand that is contiguous
along the contracted dim is transposed tile by tile, or multiplied along it; one whose rows share
cache sets or which is stored in 16 bits is copied as floats.
"""

from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from math import prod
from typing import final

from superopt.codegen.cpu.bands import Band, unseen_outside, zero_outside
from superopt.codegen.cpu.config import widens
from superopt.codegen.cpu.context import Context, Extent, View
from superopt.codegen.cpu.inline import CONVERTED, Plan
from superopt.codegen.cpu.sharing import shared_over
from superopt.codegen.errors import CodegenError
from superopt.ir.coordinates import is_move
from superopt.ir.node import Node
from superopt.ir.ops import contraction, structural
from superopt.ir.tiles import varying_axes
from superopt.ir.types import DType, Run, reshape_runs

_FLUSHED = (DType.F32, DType.F16, DType.BF16)
_SHARED_SETS_BYTES = 4096
_MANY_COLUMNS = 64
_STREAM_ROWS = 32
# what is fetched ahead must come from memory meanwhile, with vectors of 64 bytes and less: values of 128 numbers for 4
# heads 2.20 -> 1.93 ms by 8 KiB in place of 16 (Zen 3, two threads, 2026-11-23)
_STREAM_BYTES = (16384, 8192)
_LONG_DOT = 512
_SHORT_DOT = 64
_FEW_ROWS = 4
_PANEL_DEPTH = 512
_SHORTEST_RUN = 16
_MOST_LANES = 16
# rows up to which a product waits for what it transposes next, if its panels outgrow the first cache: 1.26 of the
# speed at 37, 1.04 at 128, 0.95 at 517; 0.97 where k is 64 (AMX processor, two threads, float32, 2026-11-22)
_FETCHED_ROWS, _FETCHED_DEPTH = 192, 128
# in place of the usual register tile there: more rows read the panel less often, while its successor is fetched
# (1 to 14 % at 37 to 77 rows), but a panel of one vector that is left costs as much as it gains
_USUAL_TILE, _TALL_TILE, _ONE_LEFT = (6, 4), (8, 3), range(49, 65)
# rows from which parts of them take turns with groups of panels, so that both are read from the second cache
_TALL_ROWS, _GROUP_COLUMNS = 256, 128  # the latter as SHARED in runtime/gemm.h
# rows of a register tile of one vector: six sums do not hide how long a multiplication takes (64 rows by 10 columns, k
# 1031: 150 -> 122 us; AMX processor, two threads, float32, 2026-11-23)
_THIN_ROWS = 12
_STRETCH, _LINE, _CACHE_WAY = 256, 16, 1024  # floats: a quarter of the sets, a line, all sets
_LINE_BYTES, _PAGE_BYTES = 64, 4096
_ELEMENT_BYTES = {"so::bf16": 2, "so::f16": 2}
_DOT_PARTS = 8  # groups of rows that gemm_dot has under way
_HALF_CACHE_BYTES = 1 << 20  # the second one
_STRIP = 240  # see gemm_swapped
_SWAPPED_TILES = {2: 12, 3: 8, 4: 6}  # vectors and rows of its register tiles
# how full their lanes must be; four vectors: 64 rows 0.87 to 0.93 of the time of packing, 61 0.96 to 1.01, 56 1.03
_FILLED = {2: 0.8, 3: 0.8, 4: 0.97}
# panels made at a time of a matrix that lies by rows, and how many elements: a part of the second cache (4 x 512 x 1024
# and 4 x 1024 x 512 by 32 rows per thread: 1.93 ms one by one, 0.72 to 0.82 with groups and what follows fetched)
_MOST_PANELS, _GROUP_ELEMENTS = 8, 1 << 17
_DEPTH, _PANEL = 32, 32  # of a tile, and columns in pairs: see runtime/gemm_bf16.h


@final
@dataclass(frozen=True, slots=True)
class _Matrix:
    """A 2-d operand: address, element type, strides."""

    text: str
    element: str
    row: int
    column: int
    in_scratch: bool
    origin: Node | None = None
    """The operand that it is as a whole, no part of a batch."""


def view_of(context: Context, plan: Plan, node: Node) -> View:
    """Return the memory that `node` is, or looks at through moves and widening casts."""
    chain = []
    while node not in context.views:
        if not node.inputs:
            raise CodegenError(f"{node.op.name} is not in memory")
        chain.append(node)
        node = node.inputs[0]
    view = context.views[node]
    for step in reversed(chain):
        if not widens(step):
            view = _moved(view, step)
    return view


def _moved(view: View, node: Node) -> View:
    source, strides = node.inputs[0].shape, view.strides
    if node.op is structural.PERMUTE:
        return replace(view, strides=tuple(strides[p] for p in node.attrs.perm))
    if node.op is structural.BROADCAST:
        kept = zip(source, node.shape, strides, strict=True)
        return replace(view, strides=tuple(s if d == e else 0 for d, e, s in kept))
    if node.op is structural.RESHAPE:
        rest = iter([s for d, s in zip(source, strides, strict=True) if d != 1])
        return replace(view, strides=tuple(0 if d == 1 else next(rest) for d in node.shape))
    new = list(strides)
    offset = 0
    if node.op is structural.SLICE:
        axis = node.attrs.axis + len(source)
        offset = node.attrs.start * strides[axis]
        new[axis] *= node.attrs.step
    else:
        for axis in (a + len(source) for a in node.attrs.axes):
            offset += (source[axis] - 1) * strides[axis]
            new[axis] = -strides[axis]
    return replace(view, pointer=f"({view.pointer} + {offset})", strides=tuple(new))


def merged_runs(context: Context, plan: Plan, node: Node) -> tuple[View, list[list[Run]]] | None:
    """Return the memory that a reshape reads, and of which runs in it each of its dims consists.

    None: what it reads is not in memory, is ragged, or lies in pieces of other sizes.
    """
    source = node.inputs[0]
    if plan.operand_base(source) not in context.views:
        return None
    if not all(e.known for e in context.extents(source)):
        return None
    view = view_of(context, plan, source)
    runs = reshape_runs(source.shape, view.strides, node.shape)
    return None if runs is None else (view, runs)


def splits(node: Node, dims: list[list[Run]], users: list[Node]) -> bool:
    """Say whether products alone read `node`, and can do it run by run.

    Rows of the left operand and columns of the right one may consist of runs, long enough each.
    """
    for user in users:
        if user.op is not contraction.MATMUL or user.tensor.dtype is not DType.F32:
            return False
        left, right = (operand is node for operand in user.inputs)
        free = -1 if right else -2
        if left == right or dims[free][-1][0] < _SHORTEST_RUN:
            return False
        if any(len(d) > 1 for i, d in enumerate(dims) if i != len(dims) + free):
            return False
    return True


@final
@dataclass(slots=True)
class Product:
    """Emits one matmul node."""

    context: Context
    plan: Plan
    node: Node
    target: View
    accumulate: bool
    right: list[str] = field(default_factory=list)
    """The text before the product that computes what nothing else needs of its right operand."""
    bands: tuple[Band | None, Band | None] = (None, None)
    """Where the left operand and the result count."""

    def emit(self) -> None:
        """Write the product: target (+)= operands."""
        start = len(self.context.lines)
        left, rows = self._operand(self.node.inputs[0], -2)
        right, columns = self._operand(self.node.inputs[1], -1)
        extents = self.context.extents(self.node)
        offsets = ["", "", ""]
        with self.context.block(""), ExitStack() as loops:
            if self.node.tensor.dtype in _FLUSHED and not self._in_pairs(left, right):
                self.context.write("const Flush flush;")
            for free, parts, own in ((-2, rows, 0), (-1, columns, 1)):
                inner = parts[-1][0] if parts else 1
                for count, stride in reversed(parts[:-1]):
                    name = self.context.fresh("p")
                    head = f"for (long {name} = 0; {name} < {count}; ++{name})"
                    loops.enter_context(self.context.block(head))
                    offsets[own] += f" + {name} * {stride}L"
                    offsets[2] += f" + {name} * {inner * self.target.strides[free]}L"
                    inner *= count
                if len(parts) > 1:
                    length = parts[-1][0]
                    extents[free] = Extent(length, str(length), str(length))
            row_dim = self._row_dim(right, extents)
            if row_dim == len(extents) - 2 and len(rows) < 2 > len(columns):
                result = self.plan.merged.get(self.node, self.node)
                unseen = unseen_outside(self.context, self.plan, result)
                self.bands = (zero_outside(self.context, self.node.inputs[0]), unseen)
            self._batch(left, right, extents, 0, row_dim, offsets)
        self.context.lines[start:start] = self.right

    def _operand(self, node: Node, free: int) -> tuple[View, list[Run]]:
        """Return an operand's memory, and the runs of its rows or columns where they are several."""
        if node in self.context.views or is_move(node) or widens(node):
            return view_of(self.context, self.plan, node), []
        found = merged_runs(self.context, self.plan, node)
        if found is None:
            raise CodegenError(f"{node.op.name} is not in memory")
        view, dims = found
        return replace(view, strides=tuple(parts[-1][1] for parts in dims)), dims[free]

    def _row_dim(self, right: View, extents: list[Extent]) -> int:
        """Return the dim of the rows: of one row each, a batch dim over which the right operand repeats.

        Heads that share keys are then one product, which reads them once.
        """
        last = len(extents) - 2
        if extents[last].full == 1 and extents[last].known:
            shape = self.node.inputs[1].shape
            for dim in reversed(range(last)):
                if extents[dim].full > 1 and (shape[dim] == 1 or right.strides[dim] == 0):
                    return dim
        return last

    def _batch(
        self,
        left: View,
        right: View,
        extents: list[Extent],
        dim: int,
        rows: int,
        offsets: list[str],
    ) -> None:
        if dim == len(extents) - 2:
            operands = self.node.inputs
            a, b, c = (
                _Matrix(v.pointer + o, v.element, v.strides[r], v.strides[-1], v.in_scratch, n)
                for v, o, r, n in zip(
                    (left, right, self.target),
                    offsets,
                    (rows, dim, rows),
                    (*(None if o else i for o, i in zip(offsets, operands, strict=False)), None),
                    strict=True,
                )
            )
            self._matrix(a, b, c, extents[rows], extents[-1])
            return
        if dim == rows or (extents[dim].full == 1 and extents[dim].known):
            self._batch(left, right, extents, dim + 1, rows, offsets)
            return
        name = self.context.fresh("b")
        grown = []
        shapes = (self.node.inputs[0].shape, self.node.inputs[1].shape, self.node.shape)
        for view, shape, offset in zip((left, right, self.target), shapes, offsets, strict=True):
            stride = view.strides[dim] if shape[dim] != 1 else 0
            grown.append(offset + (f" + {name} * {stride}L" if stride else ""))
        text = extents[dim].text
        with self.context.block(f"for (long {name} = 0; {name} < {text}; ++{name})"):
            self._batch(left, right, extents, dim + 1, rows, grown)

    def _contracted(self) -> Extent:
        left, right = (self.context.extents(i) for i in self.node.inputs)
        return right[-2] if left[-1].known else left[-1]

    def _matrix(self, a: _Matrix, b: _Matrix, c: _Matrix, m: Extent, n: Extent) -> None:
        k = self._contracted()
        if self.node.tensor.dtype not in _FLUSHED:
            self._plain(a, b, c, m, n, k)
            return
        if n.full == 1 and m.full > 1:
            # a column: its transpose is a row, contiguous along what was m
            a, b, m, n = _swapped(b), _swapped(a), n, m
            self.bands = (None, None)
            c = replace(c, row=c.column, column=c.row)
        if c.column != 1 and n.full > 1:
            raise CodegenError("the result of a product must be contiguous along its columns")
        if self._in_pairs(a, b):
            self._pairs(a, b, c, m, n, k)
            return
        if b.column == 1 and self._lies_scattered(b, m, n):
            self._packed(self._prepared(a, m, n, k), b, c, m, n, k)
        elif b.column == 1 or n.full == 1 != b.row:
            self._broadcast(a, b, c, m, n, k)
        elif b.row == 1 and self._runs_along(a, m, k):
            self._dot(a, b, c, m, n, k)
        else:
            self._packed(a, b, c, m, n, k)

    def _in_pairs(self, a: View | _Matrix, b: View | _Matrix) -> bool:
        """Say whether the product is one of 16 bits, which takes denormals for 0 by itself."""
        return self.context.config.pairs and a.element == b.element == "so::bf16"

    def _pairs(self, a: _Matrix, b: _Matrix, c: _Matrix, m: Extent, n: Extent, k: Extent) -> None:
        """Multiply bfloat16: the rows of one operand as they lie, the other one in pairs."""
        flag = _flag(self.accumulate)
        whole = k.known and k.full % _DEPTH == 0
        # what is transposed: all columns and, in pairs, rows; or all of the matrix
        few = m.full * (n.full + k.full // 2) < n.full * k.full // 2
        if few and b.row == 1 and whole:
            packed = self._pairs_of(m, k)
            self.context.write(
                f"pack_pairs({a.text}, {a.row}L, {a.column}L, {m.text}, {k.text}, {packed});"
            )
            fetch = int(self.context.config.prefetch and not b.in_scratch)
            self.context.write(
                f"gemm_pairs_transposed<{flag}, {fetch}>(tiles, {n.text}, {m.text}, {k.text}, {b.text}, "
                f"{b.column}L, {packed}, {c.text}, {c.row}L);"
            )
            return
        if a.column != 1 or not whole:
            a = self._rows_of(a, m, k)
        head = f"tiles, {m.text}, {n.text}, {k.text}, {a.text}, {a.row}L"
        tail = f"{c.text}, {c.row}L{self._bands()}"
        if (shared := self._shared_pairs(b, n, k)) is not None:
            self.context.write(f"gemm_pairs_made<{flag}>({head}, {shared}, {tail});")
            return
        most = _GROUP_ELEMENTS // (_DEPTH * -(-k.full // _DEPTH) * _PANEL) if b.column == 1 else 1
        group = max(1, min(most, _MOST_PANELS, -(-n.full // _PANEL)))
        panels = self._pairs_of(Extent(group * _PANEL, "", ""), k)
        self.context.write(
            f"gemm_pairs<{flag}, {group}>({head}, {b.text}, {b.column}L, {b.row}L, {panels}, {tail});"
        )

    def _rows_of(self, a: _Matrix, m: Extent, k: Extent) -> _Matrix:
        """Copy a matrix into rows that tiles can read; a tensor's once for all blocks in turn that read it."""
        depth = -(-k.full // _DEPTH) * _DEPTH
        source = f"{a.text}, {a.row}L, {a.column}L, {k.text}, {m.text}"
        kept = None if a.in_scratch else self._kept("rows", a, m.full * depth)
        if kept is None:
            view = self.context.allocate((m.full, depth), DType.BF16, "rows", half=True)
            self.context.write(f"pack_rows_bf16({source}, {view.pointer}, {view.strides[0]}L);")
            return _Matrix(view.pointer, view.element, view.strides[0], 1, True)
        rows, made, wanted = kept
        with self.context.block(f"if ({made} != {wanted})"):
            self.context.write(f"{made} = {wanted};")
            self.context.write(f"pack_rows_bf16({source}, {rows}, {depth}L);")
        return _Matrix(rows, a.element, depth, 1, True)

    def _shared_pairs(self, b: _Matrix, n: Extent, k: Extent) -> str | None:
        """Make all of an operand's tile into pairs that the blocks after this one find, where they need it too.

        A block may then have few rows, whose results stay in the first caches. What the block computes of the
        operand is computed then only.
        """
        size = -(-k.full // _DEPTH) * _DEPTH * -(-n.full // _PANEL) * _PANEL
        computed = self.right if b.origin is self.node.inputs[1] else []
        kept = None if b.in_scratch and not computed else self._kept("pairs", b, size)
        if kept is None:
            return None
        pairs, made, wanted = kept
        if computed:
            # before the product, whose denormals count as 0; the number changes when the pairs are made
            step = "  " * (self.context.depth - 1)
            head = f"{step}if ({made} != {wanted}) {{"
            self.right = [head, *(f"  {line}" for line in computed), f"{step}}}"]
        with self.context.block(f"if ({made} != {wanted})"):
            self.context.write(f"{made} = {wanted};")
            self.context.write(
                f"pack_pairs({b.text}, {b.column}L, {b.row}L, {n.text}, {k.text}, {pairs});"
            )
        return pairs

    def _kept(self, name: str, matrix: _Matrix, size: int) -> tuple[str, str, str] | None:
        """Return room for elements that last from block to block, whose tile they are, and whose are wanted.

        None where the next block wants another tile, or caches do not hold them.
        """
        context, graph = self.context, self.context.program.graph
        if matrix.origin is None:
            return None
        if (place := shared_over(graph, varying_axes(graph)[matrix.origin])) is None:
            return None
        slots = prod(a.count for a in place[0])
        if 2 * size * slots > _HALF_CACHE_BYTES:
            return None
        key = (self.node, name)
        if key not in context.shared:
            room = context.allocate((slots, size), DType.BF16, name, dense=True, half=True)
            context.shared[key] = (room.pointer, context.remember(slots))
        pointer, made = context.shared[key]
        slot, block = map(context.position, place)
        return f"{pointer} + ({slot}) * {size}L", f"{made}[{slot}]", block

    def _pairs_of(self, n: Extent, k: Extent) -> str:
        """Return room for a matrix [k, n] as pairs of rows."""
        size = (-(-k.full // _DEPTH) * _DEPTH, -(-n.full // _PANEL) * _PANEL)
        return self.context.allocate(size, DType.BF16, "pairs", dense=True, half=True).pointer

    def _runs_along(self, a: _Matrix, m: Extent, k: Extent) -> bool:
        if a.column != 1 and k.full != 1:
            return False
        wanted = self.context.config.contraction
        if wanted != "auto":
            return wanted == "dot"
        if m.full <= _FEW_ROWS:
            return k.full >= _SHORT_DOT
        return m.full <= _STREAM_ROWS and k.full >= _LONG_DOT

    def _lies_scattered(self, b: _Matrix, m: Extent, n: Extent) -> bool:
        """Say whether each row of the right operand starts another page, and all are read for many rows.

        A panel of its columns is as many pages as it has rows, and in as few cache sets.
        """
        many = m.full > _STREAM_ROWS and n.full >= _MANY_COLUMNS
        size = _ELEMENT_BYTES.get(b.element, 4)
        return many and not b.in_scratch and abs(b.row) * size >= _PAGE_BYTES

    def _plain(self, a: _Matrix, b: _Matrix, c: _Matrix, m: Extent, n: Extent, k: Extent) -> None:
        flag = "true" if self.accumulate else "false"
        self.context.write(
            f"gemm_plain<{flag}>({m.text}, {n.text}, {k.text}, {a.text}, {a.row}L, {a.column}L, "
            f"{b.text}, {b.row}L, {b.column}L, {c.text}, {c.row}L, {c.column}L);"
        )

    def _pack(self, b: _Matrix, k: Extent, n: Extent) -> _Matrix:
        view = self.context.allocate((k.full, n.full), DType.F32, "packed")
        self.context.write(
            f"pack({b.text}, {b.column}L, {b.row}L, {n.text}, {k.text}, {view.pointer}, "
            f"{view.strides[0]}L);"
        )
        return _Matrix(view.pointer, "float", view.strides[0], 1, True)

    def _prepared(self, a: _Matrix, m: Extent, n: Extent, k: Extent) -> _Matrix:
        """Copy the broadcast operand where reading it in place is slow."""
        if n.full < _MANY_COLUMNS or not self._slow_in_place(a, m):
            return a
        packed = self._pack(_swapped(a), k, m)
        return _swapped(packed)

    def _slow_in_place(self, a: _Matrix, m: Extent) -> bool:
        """Say whether rows need a conversion at each use, or start in the same cache sets."""
        shared = m.full > _FEW_ROWS and abs(a.row) * 4 % _SHARED_SETS_BYTES == 0 and a.row != 0
        return a.element != "float" or (shared and not a.in_scratch)

    def _swapped_lanes(self, m: Extent, n: Extent, k: Extent) -> tuple[int, int] | None:
        """Return the vectors of a register tile, and their lanes, that hold the rows as columns, where that pays.

        It does where they fill vectors, and are few beside what else would be transposed.
        """
        config = self.context.config
        if config.contraction != "auto" or config.vectors < 4 or any(self.bands):
            return None
        if 3 * m.full * (k.full + n.full) > k.full * n.full:
            return None
        vectors = -(-m.full // _MOST_LANES)
        lanes = vectors * _MOST_LANES
        if vectors not in _SWAPPED_TILES or m.full < _FILLED[vectors] * lanes:
            return None
        return None if 4 * lanes * k.full > _HALF_CACHE_BYTES else (vectors, lanes)

    def _swap(
        self, a: _Matrix, b: _Matrix, c: _Matrix, extents: list[Extent], vectors: int, lanes: int
    ) -> None:
        """Multiply with the few rows of `a` as columns, and transpose the result."""
        m, n, k = extents
        turned, strip = (
            self.context.allocate((count, lanes), DType.F32, name, dense=True).pointer
            for count, name in ((k.full, "turned"), (_STRIP, "strip"))
        )
        self.context.write(
            f"gemm_swapped<{_SWAPPED_TILES[vectors]}, {vectors}, {_flag(self.accumulate)}, {_stretch(k)}>"
            f"({m.text}, {n.text}, {k.text}, {a.text}, {a.row}L, {a.column}L, {b.text}, "
            f"{b.column}L, {turned}, {strip}, {c.text}, {c.row}L);"
        )

    def _packed(self, a: _Matrix, b: _Matrix, c: _Matrix, m: Extent, n: Extent, k: Extent) -> None:
        config = self.context.config
        swapped = self._swapped_lanes(m, n, k)
        if swapped is not None and b.row == 1 and b.element == "float":
            self._swap(a, b, c, [m, n, k], *swapped)
            return
        if a.element != "float":
            along = a.column == 1
            a = self._copied_rows(a, m, k) if along else _swapped(self._pack(_swapped(a), k, m))
        waits = m.full <= _FETCHED_ROWS and k.full >= _FETCHED_DEPTH
        fetched = waits and not b.in_scratch and b.row == 1
        rows, vectors = self._register_tile(m, n, tall=fetched and n.full not in _ONE_LEFT)
        # stretches of about one length: a short last one costs a pass over the result like any other
        depth = _stretch(k)
        if m.full >= _TALL_ROWS and not any(self.bands):
            columns = max(_GROUP_COLUMNS, config.vectors * _MOST_LANES)
            size = (depth, columns)
            panels = self.context.allocate(size, DType.F32, "panels", dense=True)
            self.context.write(
                f"gemm_tall<{rows}, {vectors}, {_flag(self.accumulate)}, {depth}>({m.text}, {n.text}, "
                f"{k.text}, {a.text}, {a.row}L, {a.column}L, {b.text}, {b.column}L, {b.row}L, "
                f"{panels.pointer}, {c.text}, {c.row}L);"
            )
            return
        panel = self.context.allocate(
            (depth, config.vectors * _MOST_LANES), DType.F32, "panel", dense=True
        )
        self.context.write(
            f"gemm_packed<{rows}, {vectors}, {_flag(self.accumulate)}, {m.static}, {n.static}, {depth}, {_flag(fetched)}>"
            f"({m.text}, {n.text}, {k.text}, {a.text}, {a.row}L, {a.column}L, {b.text}, "
            f"{b.column}L, {b.row}L, {panel.pointer}, {c.text}, {c.row}L{self._bands()});"
        )

    def _register_tile(self, m: Extent, n: Extent, *, tall: bool = False) -> tuple[str, str]:
        """Return rows and vectors: as even a division of the rows as the configuration allows."""
        tile = (self.context.config.rows, self.context.config.vectors)
        rows, vectors = _TALL_TILE if tall and tile == _USUAL_TILE else tile
        even = str(_even(m.full, rows))
        if n.full <= _MOST_LANES and (thin := str(_even(m.full, max(rows, _THIN_ROWS)))) != even:
            even = f"({n.full} <= VL ? {thin} : {even})"
        return even, f"(int)min_of({vectors}, ({n.full} + VL - 1) / VL)"

    def _broadcast(
        self, a: _Matrix, b: _Matrix, c: _Matrix, m: Extent, n: Extent, k: Extent
    ) -> None:
        config = self.context.config
        a = self._prepared(a, m, n, k)
        if b.element != "float" and m.full > _STREAM_ROWS and k.full * n.full <= CONVERTED:
            b = self._pack(b, k, n)  # once, and not for every few rows
        rows, vectors = self._register_tile(m, n)
        head = f"{rows}, {vectors}, {_flag(self.accumulate)}, {m.static}, {n.static}"
        tail = (
            f"({m.text}, {n.text}, {k.text}, {a.text}, {a.row}L, {a.column}L, {b.text}, "
            f"{b.row}L, {c.text}, {c.row}L"
        )
        if self._streams(b, m, n):
            row_bytes = n.full * _ELEMENT_BYTES.get(b.element, 4)
            wide, narrow = (max(config.stream_rows, size // row_bytes) for size in _STREAM_BYTES)
            depth = wide if wide == narrow else f"(VL > 8 ? {wide} : {narrow})"
            call = f"gemm_stream<{head}, {depth}, {_flag(config.prefetch)}>"
        else:
            call = f"gemm_nn<{head}>"
            tail += f", 0{self._bands()}" if any(self.bands) else ""
        self.context.write(f"{call}{tail});")

    def _bands(self) -> str:
        """Return the arguments that say where operand and result count, if not everywhere."""
        if not any(self.bands):
            return ""
        inner, outer = (band.text if band else "Whole{}" for band in self.bands)
        return f", {inner}, {outer}"

    def _streams(self, b: _Matrix, m: Extent, n: Extent) -> bool:
        few = m.full <= _STREAM_ROWS
        return few and not b.in_scratch and n.full >= 2 * _MANY_COLUMNS

    def _dot(self, a: _Matrix, b: _Matrix, c: _Matrix, m: Extent, n: Extent, k: Extent) -> None:
        config = self.context.config
        size = _ELEMENT_BYTES.get(b.element, 4)
        short, few = k.full * size <= _PAGE_BYTES, m.full <= _FEW_ROWS
        rows, columns = config.dot_rows, config.dot_columns
        if short and few and not b.in_scratch and rows < m.full:
            # each of these rows is another stretch of memory, which is to be met once: keys of 128 numbers for 4 heads
            # 2.45 -> 1.83 ms, a plain read takes 1.51; rows of 4096 numbers 2.5 -> 2.9 (Zen 3, two threads, 2026-11-23)
            rows, columns = m.full, max(1, rows * columns // m.full)
        parts = -(-m.full // rows)
        columns = min(columns, n.full)
        many = n.full >= _MANY_COLUMNS
        # even and odd columns of bfloat16 apart: cheap to convert
        pairs = many and m.full > 1 and b.element == "so::bf16"
        if pairs or (many and parts > 1 and self._slow_in_place(a, m)):
            a = self._copied_rows(a, m, k, pairs=pairs)
        fetch = 0
        # the processor itself runs ahead in a few long rows
        if not b.in_scratch and (parts > 1 or short):
            # as many lines of the next columns per two vectors (of 16) as all together have to fetch
            bytes_ = 2 * columns * _MOST_LANES * size
            fetch = -(-bytes_ // (_LINE_BYTES * min(parts, _DOT_PARTS)))
        self.context.write(
            f"gemm_dot<{-(-m.full // parts)}, {columns}, {_flag(self.accumulate)}, "
            f"{fetch if config.prefetch else 0}, {n.static}, {_flag(pairs)}>"
            f"({m.text}, {n.text}, {k.text}, {a.text}, {a.row}L, {b.text}, {b.column}L, "
            f"{c.text}, {c.row}L);"
        )

    def _copied_rows(self, a: _Matrix, m: Extent, k: Extent, *, pairs: bool = False) -> _Matrix:
        # rows start a quarter of the sets and a line apart: over a stretch of k few share sets
        length = k.full + (_STRETCH + _LINE - k.full) % _CACHE_WAY
        view = self.context.allocate((m.full, length), DType.F32, "rows")
        self.context.write(
            f"pack_rows<{_flag(pairs)}>({a.text}, {a.row}L, {k.text}, {m.text}, {view.pointer}, {view.strides[0]}L);"
        )
        return _Matrix(view.pointer, "float", view.strides[0], 1, True)


def _swapped(matrix: _Matrix) -> _Matrix:
    return replace(matrix, row=matrix.column, column=matrix.row)


def _even(count: int, most: int) -> int:
    """Return the size of the largest of as few even parts as there are of at most `most`."""
    return -(-count // -(-count // most))


def _stretch(k: Extent) -> int:
    """Return in how long pieces k is walked: even ones of about `_PANEL_DEPTH`."""
    return -(-k.full // max(1, round(k.full / _PANEL_DEPTH)))


def _flag(value: bool) -> str:
    return "true" if value else "false"
