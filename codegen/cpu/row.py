"""One row of a fused loop: vector loops along the lane dim, scalars between them.

In: `Member`s whose leading dims are fixed by the loops around. Out: the C++ text of the row; members
that can share a vector loop do, with the values between them in registers.

Invariant: a vector loop reads and writes exactly the elements inside the tensor: what is left
over at the end is masked, and lanes past the end count as the identity in reductions.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final, final

from superopt.codegen.cpu.context import Context, Extent, View, element_type
from superopt.codegen.cpu.environment import Environment, Pair, Touched
from superopt.codegen.cpu.expressions import scalar_type
from superopt.codegen.cpu.inline import Plan
from superopt.codegen.cpu.members import Member, carried, combine, combine_kind, identity
from superopt.ir.coordinates import Coordinates, identity_coords
from superopt.ir.node import Node
from superopt.ir.ops import contraction, elementwise, structural, tile
from superopt.ir.types import DType

_CHAIN: Final = 32
"""Additions in turn to one partial sum of a long row."""
_SHORTEST_PAIRS: Final = 64
_MOST_LANES: Final = 16
_SHORT: Final = 128
"""Elements of a row whose loop the compiler unrolls."""

_Totals = dict[Node, list[str]]
"""The partial results of each reduction: one variable per unrolled step."""


def read_by(context: Context, member: Member) -> set[Node]:
    """Return what the value of a member is made of, down to what is in memory."""
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
        if node not in context.views or node is member.node:
            stack += node.inputs
    return found


@final
@dataclass(slots=True)
class _Loop:
    """What one loop along the lane dim works on."""

    members: list[Member]
    extent: Extent
    row: Environment
    """Values that do not vary along the loop."""
    totals: _Totals = field(default_factory=dict)
    touched: Touched = field(default_factory=Touched)
    pairs: bool = False
    """Whether unrolled steps come in pairs of vectors, even and odd elements."""


@final
@dataclass(slots=True)
class RowGroup:
    """As many rows of dim `dim` as a vector has lanes, from `first` on: their totals are folded together."""

    dim: int
    first: str
    partials: list[tuple[Member, View]] = field(default_factory=list)
    """Reductions along the rows, and where a vector of partial results of each row is."""


@final
@dataclass(slots=True)
class Row:
    """One row: vector loops along the lane dim, scalars between them.

    The lane dim begins at `start`. Rows of a `group` leave it the horizontal part of reductions.
    """

    context: Context
    plan: Plan
    rank: int
    lane: int
    start: str = "0"
    group: RowGroup | None = None
    pending: list[Member] = field(default_factory=list)
    scalars: dict[tuple[Node, Coordinates], str] = field(default_factory=dict)

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

    def write(self, members: Sequence[Member]) -> None:
        """Write members in turn."""
        for member in members:
            self.add(member)
        self.flush()

    def total(self, member: Member) -> str:
        """Return the value of a reduction along this row, which has been written."""
        return self.scalars[(member.node, self._carried_at(member))]

    def take(self, member: Member, value: str) -> None:
        """Let the value of a reduction along this row be another."""
        env = self._row_env(member)
        env.lane = None
        self._collect(member, env, value)
        self._emit(env.lines)

    def first(self, member: Member) -> str:
        """Return the first elements of what a member reads, as many as a vector has."""
        assert member.source is not None
        row = self._row_env(member)
        row.lane = None
        env = Environment(
            self.context, self.plan, member.extents, self.lane, "0", vector=True, row=row
        )
        value = env.value(member.source, identity_coords(member.source.shape))
        self._emit(row.lines)
        self._emit(env.lines)
        return value

    def highest(self, member: Member) -> str:
        """Return a variable that holds the largest of the first elements of what a member reads."""
        name = self.context.fresh("guess")
        self._emit([f"float {name} = hmax({self.first(member)});"])
        return name

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
        """Say whether lanes read at places of their own, and these are no vector."""
        assert member.source is not None
        env = Environment(self.context, self.plan, member.extents, self.lane)
        start = identity_coords(member.source.shape)
        return any(
            node.op is structural.GATHER
            and env.varies(node.inputs[1], coords)
            and not self.plan.places_in_lanes(node)
            for node, coords in env.reads(member.source, start, member.node)
        )

    def _depends(self, member: Member) -> bool:
        leaves = read_by(self.context, member)
        return any(p.node in leaves or p.node is member.node for p in self.pending)

    def _depends_on_total(self, member: Member) -> bool:
        """Say whether the member reads what the current vector loop has only at its end."""
        leaves = read_by(self.context, member)
        return any(
            (p.kind in ("reduce", "place") and p.node in leaves)
            or (p.node is member.node)
            or (p.node in leaves and p.kind in ("prefix", "accumulate", "rescale"))
            for p in self.pending
        )

    def _row_env(self, member: Member) -> Environment:
        return Environment(
            self.context, self.plan, member.extents, self.lane, "0", cache=self.scalars
        )

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
        vector = self._vector(members[0])
        row = self._row_env(members[0])
        row.lane = None
        loop = _Loop(members, members[0].extents[self.lane], row)
        if vector:
            lines = self._vector_loops(loop)
            self.context.fetched |= loop.touched.pointers & self.context.read
            self.context.read |= loop.touched.pointers
        else:
            lines = self._plain_loop(loop)
        self._emit(row.lines)
        for node, names in loop.totals.items():
            for name in names:
                self._emit([self._start(node, name, vector)])
        self._emit(lines)
        for member in members:
            if member.kind == "reduce":
                self._total(member, loop.totals[member.node], vector)

    def _start(self, node: Node, name: str, vector: bool) -> str:
        dtype = node.inputs[0].tensor.dtype
        neutral = identity(combine_kind(node), dtype)
        if not vector:
            return f"{scalar_type(dtype)} {name} = {neutral};"
        if dtype is DType.BOOL:
            return f"vi {name} = splat_mask({neutral});"
        return f"vf {name} = splat<vf>({neutral});"

    def _vector_loops(self, loop: _Loop) -> list[str]:
        reduces = [m for m in loop.members if m.kind == "reduce"]
        extent, totals = loop.extent, loop.totals
        unroll = self.context.config.unroll
        lane = f"j{self.lane}"
        for member in reduces:
            totals[member.node] = [self.context.fresh("t") for _ in range(unroll)]
        # written first: it tells whether pairs of vectors pay
        # a few vectors at every turn of the loop around: their latencies overlap
        short = extent.known and extent.full <= _SHORT
        single = [f"#pragma GCC unroll {_SHORT // _MOST_LANES}"] if short else []
        single += [f"for (; {lane} + VL <= {extent.text}; {lane} += VL) {{"]
        single += [*self._step(loop, totals, 0, lane), "}"]
        # The text does not know the vector width: the compiler folds what an extent rules out.
        long_and_light = extent.full >= 64 * unroll and (reduces or len(loop.members) < 3)
        steps = unroll if long_and_light else 1
        loop.pairs = loop.touched.gain > 0 and extent.full >= _SHORTEST_PAIRS
        if loop.pairs:
            steps = max(2, steps)
        lines = ["{", f"long {lane} = {self.start};"]
        if steps > 1:
            if any(self._sums(m) for m in reduces):
                for level in (2, 1):
                    part = f"{_CHAIN**level * steps} * VL"
                    if extent.full > 2 * 16 * _CHAIN**level * steps:
                        lines.append(f"while ({lane} + {part} <= {extent.text}) {{")
                        lines += self._part(loop, totals, steps, level)
                        lines.append("}")
            lines.append(
                f"for (; {lane} + {steps} * VL <= {extent.text}; {lane} += {steps} * VL) {{"
            )
            lines += self._steps(loop, totals, steps)
            lines.append("}")
        lines += single
        lines.append(f"if ({lane} < {extent.text}) {{")
        lines.append(f"  const long rest = {extent.text} - {lane};")
        lines += self._step(loop, totals, 0, lane, "rest")
        lines += ["}", "}"]
        for member in reduces:
            del totals[member.node][steps:]
        return lines

    def _sums(self, member: Member) -> bool:
        along = member.kind == "reduce" and self.lane in member.axes
        return along and combine_kind(member.node) == "sum"

    def _part(self, loop: _Loop, totals: _Totals, steps: int, level: int) -> list[str]:
        """Return loops over _CHAIN**level steps of a long row, summed on their own and then added.

        The error of a sum grows with the number of additions in turn.
        """
        if level == 0:
            return self._steps(loop, totals, steps)
        sums = [m.node for m in loop.members if self._sums(m)]
        parts = {node: [self.context.fresh("t") for _ in range(steps)] for node in sums}
        lane, stop = f"j{self.lane}", self.context.fresh("stop")
        step = f" {lane} += {steps} * VL" if level == 1 else ""
        lines = [self._start(node, name, True) for node, names in parts.items() for name in names]
        lines.append(
            f"for (const long {stop} = {lane} + {_CHAIN**level * steps} * VL; {lane} < {stop};{step}) {{"
        )
        lines += self._part(loop, {**totals, **parts}, steps, level - 1)
        lines.append("}")
        for node, names in parts.items():
            dtype = node.inputs[0].tensor.dtype
            for total, name in zip(totals[node], names, strict=True):
                lines.append(f"{total} = {combine('sum', total, name, dtype, vector=True)};")
        return lines

    def _steps(self, loop: _Loop, totals: _Totals, steps: int) -> list[str]:
        lane = f"j{self.lane}"
        texts = [f"{lane} + {u} * VL" if u else lane for u in range(steps)]
        if loop.pairs:
            made = (self._pair(loop, totals, u, texts[u]) for u in range(0, steps, 2))
        else:
            made = (self._step(loop, totals, u, text) for u, text in enumerate(texts))
        return [line for lines in made for line in lines]

    def _step(
        self, loop: _Loop, totals: _Totals, copy: int, lane: str, count: str | None = None
    ) -> list[str]:
        return _block(self._computed(loop, totals, copy, lane, count))

    def _pair(self, loop: _Loop, totals: _Totals, copy: int, lane: str) -> list[str]:
        """Return a step over twice the lanes: even elements, then the odd ones and the stores."""
        waiting: list[str] = []
        even = self._computed(loop, totals, copy, lane, pair=Pair(odd=False, even=waiting))
        odd = self._computed(loop, totals, copy + 1, lane, pair=Pair(odd=True, even=waiting))
        return _block(even + odd)

    def _computed(
        self,
        loop: _Loop,
        totals: _Totals,
        copy: int,
        lane: str,
        count: str | None = None,
        pair: Pair | None = None,
    ) -> list[str]:
        env = Environment(
            self.context,
            self.plan,
            loop.members[0].extents,
            self.lane,
            lane,
            count,
            vector=True,
            row=loop.row,
            touched=loop.touched,
            pair=pair,
        )
        for member in loop.members:
            names = totals.get(member.node)
            self._statement(member, env, names[copy] if names else None)
        return env.lines

    def _plain_loop(self, loop: _Loop) -> list[str]:
        lane = f"j{self.lane}"
        env = Environment(
            self.context, self.plan, loop.members[0].extents, self.lane, lane, row=loop.row
        )
        for member in loop.members:
            total = self.context.fresh("t") if member.kind == "reduce" else None
            if total is not None:
                loop.totals[member.node] = [total]
            self._statement(member, env, total)
        head = f"for (long {lane} = {self.start}; {lane} < {loop.extent.text}; ++{lane}) {{"
        return [head, *("  " + line for line in env.lines), "}"]

    def _statement(self, member: Member, env: Environment, total: str | None) -> None:
        env.extents = member.extents
        shape = tuple(e.full for e in member.extents)
        at = identity_coords(shape)
        if member.kind == "rescale":
            self._rescale(member, env, at)
            return
        if member.kind == "settle":
            self._settle(member, env, at)
            return
        assert member.source is not None
        env.target = member.node if member.source is member.node else None
        source = self._unrounded(member)
        value = env.value(source, identity_coords(source.shape))
        env.target = None
        if member.kind in ("write", "store"):
            env.store(member.view, at[: len(member.view.strides)], value)
            if member.kind == "write":
                exact = source is member.source
                kept = value if exact else f"so::round_to<{member.view.element}>({value})"
                env.cache[(member.node, at)] = kept
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

    def _unrounded(self, member: Member) -> Node:
        """Return what a member reads, before a rounding to 16 bits that its store does anyway."""
        assert member.source is not None
        source = member.source
        stores = member.kind in ("store", "write")
        stored = stores and member.view.element == element_type(source.tensor.dtype)
        narrows = source.op is elementwise.CAST and source.inputs[0].tensor.dtype is DType.F32
        if stored and narrows and source.tensor.dtype.is_half:
            kept = source in self.context.views and source is not member.node
            return source if kept else source.inputs[0]
        return source

    def _reduce(self, member: Member, env: Environment, value: str, total: str | None) -> None:
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
        text = combine(kind, total, value, dtype, vector=env.vector)
        if env.vector and self.plan.only_shifts(member.node) is not None:
            text = f"so::max_fast({total}, {value})"
        env.lines.append(f"{total} = {text};")

    def _collect(self, member: Member, env: Environment, value: str) -> None:
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
        if vector and self._joins(member):
            self._leave(member, text)
            return
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

    def _joins(self, member: Member) -> bool:
        """Say whether the totals of a group's rows lie side by side, to be written as one vector."""
        floats = member.node.tensor.dtype.is_float and member.view.element == "float"
        return self.group is not None and floats and member.view.strides[self.group.dim] == 1

    def _leave(self, member: Member, text: str) -> None:
        assert self.group is not None
        partial = self.context.allocate((_MOST_LANES, _MOST_LANES), DType.F32, "partial")
        row = f"(r{self.group.dim} - {self.group.first})"
        self._emit([f"store({partial.pointer} + {row} * VL, {text});"])
        self.group.partials.append((member, partial))

    def _carried_at(self, member: Member) -> Coordinates:
        return identity_coords(
            tuple(1 if i in member.axes else e.full for i, e in enumerate(member.extents))
        )

    def _scan(self, member: Member, env: Environment, value: str, at: Coordinates) -> None:
        assert member.carry is not None
        kind, wide = combine_kind(member.node), carried(member.node)
        here = self._carried_at(member)
        before = env.define(env.load(member.carry, here), wide)
        total = env.define(combine(kind, before, value, wide, vector=False), wide)
        env.store(member.carry, here, total)
        dtype = member.node.tensor.dtype
        text = f"static_cast<{scalar_type(dtype)}>({total})"
        if dtype.is_half:
            text = f"so::round_to<{element_type(dtype)}>({text})"
        name = env.define(text, dtype)
        env.store(member.view, at, name)
        env.cache[(member.node, at)] = name

    def _place(self, member: Member, env: Environment, value: str) -> None:
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

    def _accumulate(self, member: Member, env: Environment, value: str, at: Coordinates) -> None:
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

    def _factor(self, member: Member, env: Environment, at: Coordinates) -> str:
        _, view = member.factors[0]
        where = tuple(
            (None, 0, 0) if d == 1 else c for d, c in zip(member.old_shape, at, strict=True)
        )
        return self._read(view, where, env)

    def _read(self, view: View, where: Coordinates, env: Environment) -> str:
        varies = any(d == self.lane for d, _, _ in where)
        if env.vector and not varies:
            assert env.row is not None
            scalar = env.row.define(env.row.load(view, where), view.dtype)
            return env.define(env.splat(scalar, view.dtype), view.dtype)
        return env.define(env.load(view, where), view.dtype)

    def _prefix(self, member: Member, env: Environment, value: str, at: Coordinates) -> None:
        dtype = member.node.tensor.dtype
        old = env.define(env.load(member.view, at), dtype)
        if member.peak is not None:
            before = env.define(env.load(member.peak, at), dtype)
            value = env.define(combine("max", before, value, dtype, vector=env.vector), dtype)
            env.store(member.peak, at, value)
        larger = f"so::lagging({old}, {value}, {member.lag!r}f)"
        if not member.lag:
            larger = combine("max", old, value, dtype, vector=env.vector)
        new = env.define(larger, dtype)
        env.store(member.view, at, new)
        env.cache[(member.node, at)] = new
        suffix = "" if env.vector else "_one"
        for power, view in member.factors:
            shift = f"({old} - finite_or_zero({new}))"
            scaled = shift if power == 1 else f"({shift} * {float(power)!r}f)"
            env.store(view, at, env.define(f"so::exp{suffix}{scaled}", dtype))

    def _rescale(self, member: Member, env: Environment, at: Coordinates) -> None:
        factor = self._factor(member, env, at)
        dtype = member.node.tensor.dtype
        env.store(member.view, at, env.define(f"{env.load(member.view, at)} * {factor}", dtype))

    def _settle(self, member: Member, env: Environment, at: Coordinates) -> None:
        """Let the maximum be the shift after the loop."""
        dtype = member.node.tensor.dtype
        old = env.define(env.load(member.view, at), dtype)
        peak = old if member.peak is None else env.define(env.load(member.peak, at), dtype)
        env.store(member.view, at, peak)
        env.cache[(member.node, at)] = peak
        for power, view in member.factors:
            env.store(view, at, env.define(f"so::settled({old}, {peak}, {float(power)!r}f)", dtype))


def _neutral(kind: str, dtype: DType) -> str:
    text = identity(kind, dtype)
    return f"splat_mask({text})" if dtype is DType.BOOL else f"splat<vf>({text})"


def _block(lines: list[str]) -> list[str]:
    return ["  {", *("    " + line for line in lines), "  }"]
