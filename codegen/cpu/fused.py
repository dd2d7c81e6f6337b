"""Fused loops: elementwise ops, reductions along rows, loop states and stores in one pass over rows.

In: a list of `Member`s whose leading dims agree. Out: C++ loops over those dims; inside, one vector
loop along the last dim for all members that can share it, values between them in registers. What
does not vary along a row is a scalar, computed once per row before the vector loop.

Invariant: a vector loop reads and writes exactly the elements inside the tensor: what is left
over at the end is masked, and lanes past the end count as the identity in reductions.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal, final

from superopt.codegen.cpu.context import Context, Extent, View, element_type
from superopt.codegen.cpu.expressions import LOWER, literal, scalar_type, vector_type
from superopt.codegen.cpu.inline import Plan, is_move
from superopt.codegen.errors import CodegenError
from superopt.ir.node import Node
from superopt.ir.ops import contraction, elementwise, leaf, structural, tile
from superopt.ir.ops.registry import OpKind
from superopt.ir.types import DType

MemberKind = Literal[
    "write", "reduce", "scan", "place", "accumulate", "prefix", "rescale", "finish", "store"
]
Coordinate = tuple[int | None, int, int | str]
"""(dim of the loop nest or None, scale, offset): the element index scale * variable + offset.

An offset that an index tensor gives is the name of a variable.
"""

_CONTRACTED = (DType.F32, DType.F64)
_IDENTITY = {"sum": 0.0, "prod": 1.0, "max": float("-inf"), "min": float("inf")}
_COMBINE = {
    contraction.REDUCE_SUM: "sum",
    contraction.REDUCE_PROD: "prod",
    contraction.REDUCE_MAX: "max",
    contraction.REDUCE_MIN: "min",
    contraction.ARGMAX: "max",
    contraction.ARGMIN: "min",
    tile.ACCUM_SUM: "sum",
    tile.ACCUM_RESCALED: "sum",
    tile.ACCUM_PROD: "prod",
    tile.ACCUM_MAX: "max",
    tile.ACCUM_MIN: "min",
    tile.PREFIX_MAX: "max",
}


def combine_kind(node: Node) -> str:
    """Return how a reduction, scan or accumulator combines values: sum, prod, max or min."""
    if node.op is contraction.SCAN:
        kind: str = node.attrs.kind
        return kind
    return _COMBINE[node.op]


def carried(node: Node) -> DType:
    """Return the type of what a scan carries from element to element; PyTorch adds in double."""
    dtype = node.inputs[0].tensor.dtype
    sums = node.op is contraction.SCAN and combine_kind(node) in ("sum", "prod")
    return DType.F64 if sums and dtype.is_float else dtype


def identity(kind: str, dtype: DType) -> str:
    """Return the neutral element of a combination as a C++ literal."""
    value = _IDENTITY[kind]
    if dtype is DType.BOOL:
        return "true" if value == 1.0 or value == float("inf") else "false"
    if not dtype.is_float and abs(value) == float("inf"):
        bits = dtype.size_bytes * 8
        unsigned = dtype is DType.U8
        top = 2**bits - 1 if unsigned else 2 ** (bits - 1) - 1
        value = top if value > 0 else (0 if unsigned else -(2 ** (bits - 1)))
    return literal(value, dtype)


def combine(kind: str, a: str, b: str, dtype: DType, *, vector: bool) -> str:
    """Return the combination of two values as text."""
    if dtype is DType.BOOL:
        return f"so::mask_{'or' if kind in ('max', 'sum') else 'and'}({a}, {b})"
    if kind in ("sum", "prod"):
        return f"{a} {'+' if kind == 'sum' else '*'} {b}"
    if dtype.is_float or not vector:
        return f"so::{kind}({a}, {b})"
    return f"so::{kind}_integers({a}, {b})"


@final
@dataclass(frozen=True, slots=True)
class Member:
    """One statement of a fused loop over `extents`.

    `source` is what it reads, `view` where it writes; for `reduce`, `axes` are reduced dims. `scan` and
    `place` (of an extreme) go along the one dim in `axes`; over rows they keep what they have in `carry`.
    """

    kind: MemberKind
    node: Node
    source: Node | None
    view: View
    extents: tuple[Extent, ...]
    axes: tuple[int, ...] = ()
    factors: tuple[tuple[int, View], ...] = ()
    """prefix: for each power in use, where exp(power * (old - new)) goes; rescale: whence."""
    old_shape: tuple[int, ...] = ()
    carry: View | None = None

    @property
    def rank(self) -> int:
        """Rank of the loop nest."""
        return len(self.extents)


@final
@dataclass(slots=True)
class _Env:
    """Expressions of one place in the text: a row (scalars) or a step of its vector loop."""

    context: Context
    plan: Plan
    extents: tuple[Extent, ...]
    lane: int | None
    lane_text: str = ""
    count: str | None = None
    vector: bool = False
    row: "_Env | None" = None
    target: Node | None = None
    lines: list[str] = field(default_factory=list)
    cache: dict[tuple[Node, tuple[Coordinate, ...]], str] = field(default_factory=dict)
    read: set[str] = field(default_factory=set)

    # -- places --------------------------------------------------------------------------------

    def variable(self, dim: int) -> str:
        """Return the loop variable of a dim; dims of one element need none."""
        if dim == self.lane:
            return self.lane_text
        return "0" if self.extents[dim].full == 1 else f"r{dim}"

    def index(self, coordinate: Coordinate) -> str:
        """Return an element index as text."""
        dim, scale, offset = coordinate
        parts = []
        if dim is not None and scale and self.variable(dim) != "0":
            name = self.variable(dim)
            parts.append(name if scale == 1 else f"({name}) * {scale}")
        if offset:
            parts.append(str(offset))
        return " + ".join(parts) or "0"

    def address(self, view: View, coords: tuple[Coordinate, ...]) -> tuple[str, int]:
        """Return the address of an element and the distance to the next lane's."""
        parts = [view.pointer]
        step = 0
        for coordinate, stride in zip(coords, view.strides, strict=True):
            text = self.index(coordinate)
            if stride and text != "0":
                parts.append(text if stride == 1 else f"({text}) * {stride}L")
            if coordinate[0] is not None and coordinate[0] == self.lane:
                step += stride * coordinate[1]
        return " + ".join(parts), step

    # -- values --------------------------------------------------------------------------------

    def value(self, node: Node, coords: tuple[Coordinate, ...]) -> str:
        """Return the name of `node`'s element at `coords`, computed once per place."""
        key = (node, coords)
        if key not in self.cache:
            self.cache[key] = self._value(node, coords)
        return self.cache[key]

    def define(self, text: str, dtype: DType) -> str:
        """Give `text` a name."""
        name = self.context.fresh("v")
        type_ = vector_type(dtype) if self.vector else scalar_type(dtype)
        self.lines.append(f"const {type_} {name} = {text};")
        return name

    def splat(self, scalar: str, dtype: DType) -> str:
        """Return a scalar in every lane."""
        if not self.vector:
            return scalar
        if dtype.is_float:
            return f"splat<vf>({scalar})"
        return f"splat_mask({scalar})" if dtype is DType.BOOL else f"splat_integer({scalar})"

    def _value(self, node: Node, coords: tuple[Coordinate, ...]) -> str:
        dtype = node.tensor.dtype
        if node.op is leaf.CONSTANT:
            return self.splat(literal(node.attrs.value, dtype), dtype)
        varies = self.lane is not None and any(d == self.lane for d, _, _ in coords)
        if not varies and self.row is not None and node is not self.target:
            return self.define(self.splat(self.row.value(node, coords), dtype), dtype)
        view = None if node is self.target else self.context.views.get(node)
        if view is not None:
            return self.define(self.load(view, coords), dtype)
        if node.op in (tile.TILE_INDEX, leaf.IOTA):
            return self.define(self._position(node, coords), dtype)
        if is_move(node):
            return self.value(node.inputs[0], self.moved(node, coords))
        if node.op is structural.GATHER:
            place, inside = self._place(node, coords)
            found = self.value(node.inputs[0], gathered(node, coords, place))
            if not dtype.is_float:
                return found
            # PyTorch refuses an index beyond its tensor; a kernel cannot, and lets nobody miss it
            missing = self.splat(literal(math.nan, dtype), dtype)
            return self.define(f"{inside} ? {found} : {missing}", dtype)
        if node.op.kind is not OpKind.ELEMENTWISE:
            raise CodegenError(f"{node.op.name} is read before it is computed")
        rule = LOWER[node.op]
        if isinstance(rule, str):
            raise CodegenError(f"{node.op.name} has no expression: {rule}")
        operands = [self.value(i, broadcast_coords(i, coords)) for i in node.inputs]
        text = rule(operands, node, self.vector)
        if node.op is elementwise.MUL and dtype in _CONTRACTED and self._is_added(node):
            text = f"rounded({text})"
        return self.define(text, dtype)

    def _is_added(self, node: Node) -> bool:
        """Say whether a compiler could merge the product with an addition that reads it."""
        users = self.plan.users.get(node, ())
        return any(u.op in (elementwise.ADD, elementwise.SUB) or is_move(u) for u in users)

    def load(self, view: View, coords: tuple[Coordinate, ...]) -> str:
        """Return the text that loads an element, or a vector of them along the lane dim."""
        address, step = self.address(view, coords)
        if not self.vector:
            if view.element in ("so::bf16", "so::f16"):
                return f"load_scalar<float>({address})"
            return f"*({address})"
        if view.dtype.is_integer:
            if step == 1 and self.count is None:
                return f"load_integers({address})"
            count = f", {self.count}" if self.count else ""
            return f"load_integers({address}, {step}L{count})"
        if step != 1:
            count = f", {self.count}" if self.count else ""
            text = f"load_strided({address}, {step}L{count})"
        elif self.count:
            text = f"load_n<vf>({address}, {self.count})"
        else:
            text = f"load<vf>({address})"
            self._fetch(view, address)
        return f"({text} != 0.0f)" if view.dtype is DType.BOOL else text

    def _fetch(self, view: View, address: str) -> None:
        """Fetch what is read next while a loop reads anew what the caches hold.

        The first loop over a row waits for memory, the others compute: memory works through both.
        """
        self.read.add(view.pointer)
        if view.ahead and view.pointer in self.context.read - self.context.fetched:
            self.lines.append(f"__builtin_prefetch({address} + {view.ahead}L, 0, 2);")

    def store(self, view: View, coords: tuple[Coordinate, ...], value: str) -> None:
        """Write an element, or a vector of them along the lane dim."""
        address, step = self.address(view, coords)
        count = f", {self.count}" if self.count else ""
        if not self.vector:
            self.lines.append(f"store({address}, {value});")
            return
        if view.dtype.is_integer:
            self.lines.append(f"store_integers({address}, {value}, {step}L{count});")
            return
        if view.dtype is DType.BOOL:
            value = f"mask_value({value})"
        if step != 1:
            self.lines.append(f"store_strided({address}, {step}L, {value}{count});")
        elif self.count:
            self.lines.append(f"store_n({address}, {value}{count});")
        elif self.context.config.store_past and not view.in_scratch:
            self.lines.append(f"store_past({address}, {value});")
        else:
            self.lines.append(f"store({address}, {value});")

    def _position(self, node: Node, coords: tuple[Coordinate, ...]) -> str:
        if node.op is leaf.IOTA:
            axis = node.attrs.axis + len(node.shape)
            base, coordinate = "0", coords[axis]
        else:
            base, coordinate = self.context.offset_text(node.attrs.dim), coords[0]
        text = f"{base} + {self.index(coordinate)}"
        if not self.vector:
            return f"static_cast<{element_type(node.tensor.dtype)}>({text})"
        step = coordinate[1] if coordinate[0] == self.lane else 0
        return f"splat_integer({text}) + iota() * {step}"

    def _place(self, node: Node, coords: tuple[Coordinate, ...]) -> tuple[Coordinate, str]:
        """Compute the position along a gather's axis, once per row where the row has but one.

        Also whether it is inside; where it is not, the position is the nearest that is.
        """
        data, index = node.inputs
        extent = data.shape[node.attrs.axis]
        own = self.row is None or (not self.vector and self.varies(index, coords))
        env = self if own or self.row is None else self.row
        wanted = env.value(index, coords)
        place = env.define(f"so::within({wanted}, {extent}L)", DType.I64)
        inside = env.define(f"{place} == {wanted}", DType.BOOL)
        # scale 0: the element changes with the lane, though not by its number
        return (self.lane if own else None, 0, place), inside

    def reads(
        self, node: Node, coords: tuple[Coordinate, ...], own: Node | None
    ) -> Iterator[tuple[Node, tuple[Coordinate, ...]]]:
        """Yield what the value of `node` depends on, down to memory, except that of `own`."""
        stack = [(node, coords)]
        while stack:
            node, coords = stack.pop()
            yield node, coords
            if (node in self.context.views and node is not own) or not node.inputs:
                continue
            if is_move(node):
                stack.append((node.inputs[0], self.moved(node, coords)))
            elif node.op is structural.GATHER:
                stack.append((node.inputs[0], gathered(node, coords, (None, 0, "place"))))
                stack.append((node.inputs[1], coords))
            else:
                stack += [(i, broadcast_coords(i, coords)) for i in node.inputs]

    def varies(self, node: Node, coords: tuple[Coordinate, ...]) -> bool:
        """Say whether a value changes along the row."""
        return any(
            (found in self.context.views or not found.inputs)
            and any(dim == self.lane for dim, _, _ in at)
            for found, at in self.reads(node, coords, None)
        )

    def moved(self, node: Node, coords: tuple[Coordinate, ...]) -> tuple[Coordinate, ...]:
        """Return where a move reads the element at `coords`."""
        source = node.inputs[0]
        if node.op is structural.PERMUTE:
            at: list[Coordinate] = [(None, 0, 0)] * len(coords)
            for i, p in enumerate(node.attrs.perm):
                at[p] = coords[i]
            return tuple(at)
        if node.op is structural.BROADCAST:
            return tuple(
                (None, 0, 0) if d == 1 else c for d, c in zip(source.shape, coords, strict=True)
            )
        if node.op is structural.RESHAPE:
            kept = iter([c for d, c in zip(node.shape, coords, strict=True) if d != 1])
            return tuple((None, 0, 0) if d == 1 else next(kept) for d in source.shape)
        moved = list(coords)
        if node.op is structural.SLICE:
            axis = node.attrs.axis + len(coords)
            dim, scale, offset = moved[axis]
            step = node.attrs.step
            moved[axis] = (dim, scale * step, _affine(offset, step, node.attrs.start))
        else:
            for axis in (a + len(coords) for a in node.attrs.axes):
                dim, scale, offset = moved[axis]
                moved[axis] = (dim, -scale, _affine(offset, -1, source.shape[axis] - 1))
        return tuple(moved)


def _affine(offset: int | str, scale: int, start: int) -> int | str:
    if isinstance(offset, int):
        return offset * scale + start
    return offset if (scale, start) == (1, 0) else f"({offset} * {scale}L + {start}L)"


def broadcast_coords(operand: Node, coords: tuple[Coordinate, ...]) -> tuple[Coordinate, ...]:
    """Return where an elementwise op reads an operand."""
    if not operand.shape:
        return ()
    return tuple((None, 0, 0) if d == 1 else c for d, c in zip(operand.shape, coords, strict=True))


def gathered(
    node: Node, coords: tuple[Coordinate, ...], place: Coordinate
) -> tuple[Coordinate, ...]:
    """Return where a gather reads its data: at `place` along its axis."""
    axis = node.attrs.axis + len(coords)
    return (*coords[:axis], place, *coords[axis + 1 :])


def identity_coords(shape: tuple[int, ...]) -> tuple[Coordinate, ...]:
    """Coordinates of a tile of `shape` in a loop nest of the same rank."""
    return tuple((None, 0, 0) if d == 1 else (i, 1, 0) for i, d in enumerate(shape))


@final
@dataclass(slots=True)
class FusedLoop:
    """Members that run in one pass over rows, and the text of that pass."""

    context: Context
    plan: Plan
    members: list[Member] = field(default_factory=list)

    def accepts(self, member: Member) -> bool:
        """Say whether `member` can join: same leading dims, and no reading across rows."""
        if not self.members:
            return True
        first = self.members[0]
        if member.rank != first.rank or member.rank == 0:
            return False
        if member.extents[:-1] != first.extents[:-1]:
            return False
        if self._crosses_rows(self.members[-1]) or self._crosses_rows(member):
            return False
        written = {m.node for m in self.members}
        return self._reads_rows(member, written)

    def _crosses_rows(self, member: Member) -> bool:
        return any(a != member.rank - 1 for a in member.axes)

    def _reads_rows(self, member: Member, written: set[Node]) -> bool:
        """Check that values written in this pass are read at the row that is being computed."""
        if member.kind in ("rescale", "finish"):
            return True
        lane = member.rank - 1
        wanted = identity_coords(tuple(e.full for e in member.extents[:-1]))
        assert member.source is not None
        env = _Env(self.context, self.plan, member.extents, None)
        start = identity_coords(member.source.shape)
        for node, coords in env.reads(member.source, start, member.node):
            if node in written and node is not member.node:
                here = len(coords) == member.rank and coords[:-1] == wanted
                if not here or coords[-1] not in ((None, 0, 0), (lane, 1, 0)):
                    return False
        return True

    # -- text ----------------------------------------------------------------------------------

    def flush(self) -> None:
        """Write the loops of all members and forget them."""
        if not self.members:
            return
        members, self.members = self.members, []
        rank = members[0].rank
        lane = rank - 1
        if all(m.extents[-1].full == 1 for m in members if m.rank) and rank:
            wide = [d for d in range(rank) if members[0].extents[d].full != 1]
            lane = wide[-1] if wide else lane
        for member in members:
            self._before(member, lane)
        self._open(members, 0, lane)

    def _before(self, member: Member, lane: int) -> None:
        """Start reductions that collect over rows at their neutral element."""
        if member.kind == "reduce" and any(a != lane for a in member.axes):
            kind = combine_kind(member.node)
            dtype = member.view.dtype
            count = member.view.strides[0] * member.node.shape[0] if member.view.strides else 1
            self.context.write(
                f"fill<{member.view.element}>({member.view.pointer}, {max(count, 1)}L, "
                f"{identity(kind, dtype)});"
            )

        if member.carry is not None:
            views = [(member.carry, identity(combine_kind(member.node), carried(member.node)))]
            if member.kind == "place":
                views.append((member.view, "0"))
            rows = 1 if 0 in member.axes else member.extents[0].full
            for view, value in views:
                size = max(view.strides[0] * rows, 1)
                self.context.write(f"fill<{view.element}>({view.pointer}, {size}L, {value});")

    def _open(self, members: list[Member], dim: int, lane: int) -> None:
        extents = members[0].extents
        if dim == len(extents):
            self._row(members, lane)
        elif dim == lane or extents[dim].full == 1 == extents[dim].known:
            self._open(members, dim + 1, lane)
        elif extents[dim].full == 1:
            with self.context.block(f"if ({extents[dim].text} > 0)"):
                self._open(members, dim + 1, lane)
        else:
            head = f"for (long r{dim} = 0; r{dim} < {extents[dim].text}; ++r{dim})"
            with self.context.block(head):
                self._open(members, dim + 1, lane)

    def _row(self, members: list[Member], lane: int) -> None:
        row = _Row(self.context, self.plan, members[0].rank, lane)
        for member in members:
            row.add(member)
        row.flush()


@final
@dataclass(slots=True)
class _Row:
    """One row: vector loops along the lane dim, scalars between them."""

    context: Context
    plan: Plan
    rank: int
    lane: int
    pending: list[Member] = field(default_factory=list)
    scalars: dict[tuple[Node, tuple[Coordinate, ...]], str] = field(default_factory=dict)

    def add(self, member: Member) -> None:
        """Take a member into the current vector loop, or start another."""
        wide = self.rank > 0 and member.extents[self.lane].full != 1
        if not wide:
            if self._depends(member):
                self.flush()
            self._scalar(member)
            return
        if self.pending:
            same = self.pending[0].extents[self.lane] == member.extents[self.lane]
            mode = self._vector(self.pending[0]) == self._vector(member)
            if not (same and mode) or self._depends_on_total(member):
                self.flush()
        self.pending.append(member)

    def _vector(self, member: Member) -> bool:
        if member.kind in ("scan", "place"):
            return False
        dtype = member.view.dtype
        if dtype is DType.F64 or member.node.tensor.dtype is DType.F64:
            return False
        source = member.source
        if source is None:
            return True
        moved = member.kind in ("write", "store") and self.plan.fits(source)
        if source.tensor.dtype.is_integer and not moved:
            return False
        if source in self.context.views and source is not member.node:
            return True
        return self.plan.vector[source] and not self._scattered(member)

    def _scattered(self, member: Member) -> bool:
        """Say whether lanes read at places of their own: an index varies along the row."""
        assert member.source is not None
        env = _Env(self.context, self.plan, member.extents, self.lane)
        start = identity_coords(member.source.shape)
        return any(
            node.op is structural.GATHER and env.varies(node.inputs[1], coords)
            for node, coords in env.reads(member.source, start, member.node)
        )

    def _leaves(self, member: Member) -> set[Node]:
        if member.source is None:
            return set(member.node.inputs)
        found: set[Node] = set()
        stack = [member.source]
        if member.kind == "accumulate":
            stack += list(member.node.inputs)
        while stack:
            node = stack.pop()
            if node in found:
                continue
            found.add(node)
            if node not in self.context.views or node is member.node:
                stack += node.inputs
        return found

    def _depends(self, member: Member) -> bool:
        leaves = self._leaves(member)
        return any(p.node in leaves or p.node is member.node for p in self.pending)

    def _depends_on_total(self, member: Member) -> bool:
        """Say whether the member reads what the current vector loop has only at its end."""
        leaves = self._leaves(member)
        return any(
            (p.kind in ("reduce", "place") and p.node in leaves)
            or (p.node is member.node)
            or (p.node in leaves and p.kind in ("prefix", "accumulate", "rescale"))
            for p in self.pending
        )

    def _row_env(self, member: Member) -> _Env:
        return _Env(self.context, self.plan, member.extents, self.lane, "0", cache=self.scalars)

    def _emit(self, lines: list[str]) -> None:
        for line in lines:
            self.context.write(line)

    def _scalar(self, member: Member) -> None:
        env = self._row_env(member)
        env.lane = None
        self._statement(member, env, None)
        self._emit(env.lines)

    def flush(self) -> None:
        """Write the current vector loop."""
        members, self.pending = self.pending, []
        if not members:
            return
        extent = members[0].extents[self.lane]
        vector = self._vector(members[0])
        row = self._row_env(members[0])
        row.lane = None
        totals: dict[Node, list[str]] = {}
        loops: list[str] = []
        if vector:
            read = self._vector_loops(members, extent, row, totals, loops)
            self.context.fetched |= read & self.context.read
            self.context.read |= read
        else:
            self._plain_loop(members, extent, row, totals, loops)
        self._emit(row.lines)
        for node, names in totals.items():
            for name in names:
                self._emit([self._start(node, name, vector)])
        self._emit(loops)
        for member in members:
            if member.kind == "reduce":
                self._total(member, totals[member.node], vector)

    def _start(self, node: Node, name: str, vector: bool) -> str:
        dtype = node.inputs[0].tensor.dtype
        neutral = identity(combine_kind(node), dtype)
        if not vector:
            return f"{scalar_type(dtype)} {name} = {neutral};"
        if dtype is DType.BOOL:
            return f"vi {name} = splat_mask({neutral});"
        return f"vf {name} = splat<vf>({neutral});"

    def _vector_loops(
        self,
        members: list[Member],
        extent: Extent,
        row: _Env,
        totals: dict[Node, list[str]],
        loops: list[str],
    ) -> set[str]:
        """Write the loops into `loops`; return the pointers that they read vectors from."""
        reduces = [m for m in members if m.kind == "reduce"]
        read: set[str] = set()
        unroll = self.context.config.unroll
        lane = f"j{self.lane}"
        for member in reduces:
            totals[member.node] = [self.context.fresh("t") for _ in range(unroll)]
        # The text does not know the vector width: the compiler folds what an extent rules out.
        steps = unroll if extent.full >= 64 * unroll and (reduces or len(members) < 3) else 1
        loops.append(f"long {lane} = 0;")
        if steps > 1:
            head = f"for (; {lane} + {steps} * VL <= {extent.text}; {lane} += {steps} * VL) {{"
            loops.append(head)
            for u in range(steps):
                text = f"{lane} + {u} * VL" if u else lane
                loops += self._step(members, row, totals, u, text, None, read)
            loops.append("}")
        loops.append(f"for (; {lane} + VL <= {extent.text}; {lane} += VL) {{")
        loops += self._step(members, row, totals, 0, lane, None, read)
        loops.append("}")
        loops.append(f"if ({lane} < {extent.text}) {{")
        loops.append(f"  const long rest = {extent.text} - {lane};")
        loops += self._step(members, row, totals, 0, lane, "rest", read)
        loops.append("}")
        if steps == 1:
            for member in reduces:
                del totals[member.node][1:]
        loops[:] = ["{", *loops, "}"]
        return read

    def _plain_loop(
        self,
        members: list[Member],
        extent: Extent,
        row: _Env,
        totals: dict[Node, list[str]],
        loops: list[str],
    ) -> None:
        lane = f"j{self.lane}"
        for member in members:
            if member.kind == "reduce":
                totals[member.node] = [self.context.fresh("t")]
        loops.append(f"for (long {lane} = 0; {lane} < {extent.text}; ++{lane}) {{")
        env = _Env(self.context, self.plan, members[0].extents, self.lane, lane, row=row)
        for member in members:
            self._statement(member, env, totals[member.node][0] if member.node in totals else None)
        loops += ["  " + line for line in env.lines] + ["}"]

    def _step(
        self,
        members: list[Member],
        row: _Env,
        totals: dict[Node, list[str]],
        copy: int,
        lane_text: str,
        count: str | None,
        read: set[str],
    ) -> list[str]:
        env = _Env(
            self.context,
            self.plan,
            members[0].extents,
            self.lane,
            lane_text,
            count,
            vector=True,
            row=row,
            read=read,
        )
        for member in members:
            names = totals.get(member.node)
            self._statement(member, env, names[copy] if names else None)
        return ["  {", *("    " + line for line in env.lines), "  }"]

    def _statement(self, member: Member, env: _Env, total: str | None) -> None:
        env.extents = member.extents
        shape = tuple(e.full for e in member.extents)
        at = identity_coords(shape)
        if member.kind == "rescale":
            self._rescale(member, env, at)
            return
        if member.kind == "finish":
            self._finish(member, env, at)
            return
        assert member.source is not None
        env.target = member.node if member.source is member.node else None
        value = env.value(member.source, identity_coords(member.source.shape))
        env.target = None
        if member.kind in ("write", "store"):
            env.store(member.view, at[: len(member.view.strides)], value)
            if member.kind == "write":
                env.cache[(member.node, at)] = value
        elif member.kind == "reduce":
            self._reduce(member, env, value, total)
        elif member.kind == "scan":
            self._scan(member, env, value, at)
        elif member.kind == "place":
            self._place(member, env, value)
        elif member.kind == "prefix":
            self._prefix(member, env, value, at)
        else:
            self._accumulate(member, env, value, at)

    def _reduce(self, member: Member, env: _Env, value: str, total: str | None) -> None:
        kind = combine_kind(member.node)
        dtype = member.node.inputs[0].tensor.dtype
        if total is None:
            # a scalar in this row: rows are collected in memory
            self._collect(member, env, value)
            return
        if self.lane not in member.axes:
            self._collect(member, env, value)
            return
        if env.count and env.vector:
            value = f"select(first_lanes({env.count}), {value}, {_neutral(kind, dtype)})"
        env.lines.append(f"{total} = {combine(kind, total, value, dtype, vector=env.vector)};")

    def _collect(self, member: Member, env: _Env, value: str) -> None:
        kind = combine_kind(member.node)
        dtype = member.node.tensor.dtype
        shape = tuple(1 if i in member.axes else e.full for i, e in enumerate(member.extents))
        at = identity_coords(shape)
        if all(a == self.lane for a in member.axes) and not env.vector:
            env.store(member.view, at, value)
            env.cache[(member.node, at)] = value
            return
        before = env.define(env.load(member.view, at), dtype)
        text = combine(kind, before, value, dtype, vector=env.vector)
        env.store(member.view, at, env.define(text, dtype))

    def _total(self, member: Member, names: list[str], vector: bool) -> None:
        """Close a reduction along the row."""
        if self.lane not in member.axes:
            return
        kind = combine_kind(member.node)
        dtype = member.node.inputs[0].tensor.dtype
        text = names[0]
        for name in names[1:]:
            text = f"({combine(kind, text, name, dtype, vector=vector)})"
        if vector:
            if dtype is DType.BOOL:
                text = f"any({text})" if kind in ("max", "sum") else f"all({text})"
            else:
                text = f"h{kind}({text})"
        env = self._row_env(member)
        env.lane = None
        name = env.define(text, member.node.tensor.dtype)
        self._collect(member, env, name)
        self._emit(env.lines)

    def _carried_at(self, member: Member) -> tuple[Coordinate, ...]:
        return identity_coords(
            tuple(1 if i in member.axes else e.full for i, e in enumerate(member.extents))
        )

    def _scan(self, member: Member, env: _Env, value: str, at: tuple[Coordinate, ...]) -> None:
        assert member.carry is not None
        kind, wide = combine_kind(member.node), carried(member.node)
        here = self._carried_at(member)
        before = env.define(env.load(member.carry, here), wide)
        total = env.define(combine(kind, before, value, wide, vector=False), wide)
        env.store(member.carry, here, total)
        dtype = member.node.tensor.dtype
        text = f"static_cast<{scalar_type(dtype)}>({total})"
        if dtype in (DType.F16, DType.BF16):
            text = f"so::round_to<{element_type(dtype)}>({text})"
        name = env.define(text, dtype)
        env.store(member.view, at, name)
        env.cache[(member.node, at)] = name

    def _place(self, member: Member, env: _Env, value: str) -> None:
        """Keep the first place of the largest or smallest value so far; NaN is either."""
        assert member.carry is not None
        here = self._carried_at(member)
        best, _ = env.address(member.carry, here)
        place, _ = env.address(member.view, here)
        (axis,) = member.axes
        position = env.index((axis, 1, 0))
        test = "above" if member.node.op is contraction.ARGMAX else "below"
        env.lines.append(
            f"if (so::{test}({value}, *({best}))) "
            f"{{ *({best}) = {value}; *({place}) = {position}; }}"
        )

    def _accumulate(
        self, member: Member, env: _Env, value: str, at: tuple[Coordinate, ...]
    ) -> None:
        dtype = member.node.tensor.dtype
        if member.node.op is tile.ACCUM_LAST:
            env.store(member.view, at, value)
            return
        before = env.load(member.view, at)
        if member.factors:
            factor = self._factor(member, env, at)
            before = f"{before} * {factor}"
        before = env.define(before, dtype)
        kind = combine_kind(member.node)
        text = combine(kind, before, value, dtype, vector=env.vector)
        env.store(member.view, at, env.define(text, dtype))

    def _factor(self, member: Member, env: _Env, at: tuple[Coordinate, ...]) -> str:
        _, view = member.factors[0]
        where = tuple(
            (None, 0, 0) if d == 1 else c for d, c in zip(member.old_shape, at, strict=True)
        )
        return self._read(view, where, env)

    def _read(self, view: View, where: tuple[Coordinate, ...], env: _Env) -> str:
        varies = any(d == self.lane for d, _, _ in where)
        if env.vector and not varies:
            assert env.row is not None
            scalar = env.row.define(env.row.load(view, where), view.dtype)
            return env.define(env.splat(scalar, view.dtype), view.dtype)
        return env.define(env.load(view, where), view.dtype)

    def _prefix(self, member: Member, env: _Env, value: str, at: tuple[Coordinate, ...]) -> None:
        dtype = member.node.tensor.dtype
        old = env.define(env.load(member.view, at), dtype)
        new = env.define(combine("max", old, value, dtype, vector=env.vector), dtype)
        env.store(member.view, at, new)
        env.cache[(member.node, at)] = new
        suffix = "" if env.vector else "_one"
        for power, view in member.factors:
            shift = f"({old} - finite_or_zero({new}))"
            scaled = shift if power == 1 else f"({shift} * {float(power)!r}f)"
            env.store(view, at, env.define(f"so::exp{suffix}{scaled}", dtype))

    def _rescale(self, member: Member, env: _Env, at: tuple[Coordinate, ...]) -> None:
        factor = self._factor(member, env, at)
        dtype = member.node.tensor.dtype
        env.store(member.view, at, env.define(f"{env.load(member.view, at)} * {factor}", dtype))

    def _finish(self, member: Member, env: _Env, at: tuple[Coordinate, ...]) -> None:
        """Scale by exp(-inf) where the maximum stayed -inf: what was added counts nothing."""
        dtype = member.node.tensor.dtype
        shift = self._factor(member, env, at)
        value = env.define(env.load(member.view, at), dtype)
        low = f"{shift} == -__builtin_inff()"
        scaled = f"{value} * {env.splat(literal(0.0, dtype), dtype)}"
        env.store(member.view, at, env.define(f"select({low}, {scaled}, {value})", dtype))


def _neutral(kind: str, dtype: DType) -> str:
    text = identity(kind, dtype)
    return f"splat_mask({text})" if dtype is DType.BOOL else f"splat<vf>({text})"
