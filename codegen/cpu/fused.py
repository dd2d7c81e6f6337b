"""Fused loops: elementwise ops, reductions along rows, loop states and stores in one pass over rows.

In: a list of `Member`s whose leading dims agree. Out: C++ loops over those dims; inside, one vector
loop along the last dim for all members that can share it (`Row`).
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from math import prod
from typing import Final, final

from superopt.codegen.cpu.context import Context, Extent, View
from superopt.codegen.cpu.environment import Environment
from superopt.codegen.cpu.expressions import literal
from superopt.codegen.cpu.inline import Plan
from superopt.codegen.cpu.members import Member, carried, combine_kind, identity
from superopt.codegen.cpu.pairwise import pairwise
from superopt.codegen.cpu.pairwise_loop import PairwiseLoop
from superopt.codegen.cpu.row import Row, RowGroup, read_by
from superopt.codegen.cpu.shifts import FAR
from superopt.ir.coordinates import identity_coords
from superopt.ir.node import Node
from superopt.ir.types import DType

_GROUP: Final = 16
"""Rows from which it pays to take as many together as a vector has lanes."""
_GROUP_COLUMNS: Final = 512
"""Elements of a row up to which those of a group stay in the first caches from pass to pass."""
_SHORT: Final = 7
"""Elements of a row up to which vectors lie across rows, where these are reduced."""
_LONG: Final = 64
"""Elements of a row from which its maximum is guessed from the first ones."""
_STRETCH: Final = 128
"""Rows whose sum is made on its own and then added: errors grow with the additions in turn."""
_AGAIN: Final = ("write", "reduce", "store")
"""Kinds of members that change nothing if they are run again."""
_FOLD: Final = {
    "sum": "combine_sum",
    "prod": "combine_product",
    "max": "combine_max",
    "min": "combine_min",
}


@final
@dataclass(slots=True)
class FusedLoop:
    """Members that run in one pass over rows, and the text of that pass."""

    context: Context
    plan: Plan
    members: list[Member] = field(default_factory=list)
    missed: str = ""
    """The variable that says whether a maximum was guessed in vain in this pass."""

    def accepts(self, member: Member) -> bool:
        """Say whether `member` can join: same leading dims, and no reading across rows."""
        if not self.members:
            return True
        first = self.members[0]
        if member.dense is not None or first.dense is not None:
            return False
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
        if member.kind in ("rescale", "settle"):
            return True
        lane = member.rank - 1
        wanted = identity_coords(tuple(e.full for e in member.extents[:-1]))
        assert member.source is not None
        env = Environment(self.context, self.plan, member.extents, None)
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
        (first, *_) = members
        rank = first.rank
        lane = rank - 1
        if first.dense is not None and (pairs := pairwise(self.plan, first.node)) is not None:
            PairwiseLoop(self.context, self.plan, first, pairs).write()
            return
        if members[0].dense is not None:
            lane = members[0].dense
        elif all(m.extents[-1].full == 1 for m in members if m.rank) and rank:
            wide = [d for d in range(rank) if members[0].extents[d].full != 1]
            lane = wide[-1] if wide else lane
        if rank > 0:
            members = self._in_passes(members, lane)
        rows = self._across(members, lane)
        if rows is not None:
            for phase in self._phases([self._lying(m, rows) for m in members], lane):
                for member in phase:
                    self._before(member, rows)
                self._nest(phase[0].extents, 0, rows, None, phase)
            return
        for member in members:
            self._before(member, lane)
        stretched = self._stretched(members[0], lane)
        if stretched is not None:
            self._stretches(members[0], *stretched, lane)
            return
        self.missed = ""
        if self._guessed(members, lane) is not None:
            self.missed = self.context.fresh("missed")
            self.context.write(f"bool {self.missed} = false;")
        self._nest(members[0].extents, 0, lane, self._grouped(members, lane), members)

    def _in_passes(self, members: list[Member], lane: int) -> list[Member]:
        """Put members in an order that takes as few passes over a row as their reductions allow.

        A reduction or a store joins the first pass that has what it reads, a value that is kept the last one before
        it is read. Members of loops with states stay as they are: these change where they lie.
        """
        if any(
            m.kind not in ("write", "reduce", "store") or self._crosses_rows(m) for m in members
        ):
            return members
        wide = [m.extents[lane].full != 1 for m in members]
        made: dict[Node, int] = {}
        reads: list[list[int]] = []
        first: list[int] = []
        for at, member in enumerate(members):
            reads.append([made[n] for n in read_by(self.context, member) if n in made])
            after = [
                first[i] + (wide[at] and (not wide[i] or members[i].kind == "reduce"))
                for i in reads[at]
            ]
            first.append(max(after, default=0 if wide[at] else -1))
            made[member.node] = at
        passes = list(first)
        for at in range(len(members) - 1, -1, -1):
            readers = [passes[i] for i in range(at + 1, len(members)) if at in reads[i]]
            if wide[at] and members[at].kind == "write" and readers:
                passes[at] = min(readers)
        order = sorted(range(len(members)), key=lambda i: (passes[i], not wide[i], i))
        return [members[i] for i in order]

    def _across(self, members: list[Member], lane: int) -> int | None:
        """Return the dim along which vectors should lie where rows are too short for them: many rows at a time."""
        extents = members[0].extents
        rows = [d for d in range(lane) if extents[d].full != 1]
        if lane != len(extents) - 1 or members[0].dense is not None or not rows:
            return None
        columns = max(m.extents[lane].full for m in members)
        short = 1 < columns <= _SHORT and all(m.extents[lane].known for m in members)
        if not short or extents[rows[-1]].full < _GROUP:
            return None
        if any(m.kind not in _AGAIN or self._crosses_rows(m) for m in members):
            return None
        return rows[-1] if any(m.kind == "reduce" for m in members) else None

    def _lying(self, member: Member, rows: int) -> Member:
        """Let what is kept between passes over short rows lie the way vectors do."""
        view, strides = member.view, member.view.strides
        kept = member.kind == "write" and member.source is member.node and view.in_scratch
        if not kept or member.extents[-1].full == 1 or strides[-1] != 1 or rows != member.rank - 2:
            return member
        lying = replace(view, strides=(*strides[:rows], 1, member.extents[rows].full))
        self.context.views[member.node] = lying
        return replace(member, view=lying)

    def _before(self, member: Member, lane: int) -> None:
        """Start reductions that collect over rows at their neutral element."""
        if member.kind == "reduce" and any(a != lane for a in member.axes):
            self._clear(member)
        if member.carry is not None:
            views = [(member.carry, identity(combine_kind(member.node), carried(member.node)))]
            if member.kind == "place":
                views.append((member.view, "0"))
            rows = 1 if 0 in member.axes else member.extents[0].full
            for view, value in views:
                size = max(view.strides[0] * rows, 1)
                self.context.write(f"fill<{view.element}>({view.pointer}, {size}L, {value});")

    def _clear(self, member: Member) -> None:
        kind, view = combine_kind(member.node), member.view
        self.context.write(
            f"fill<{view.element}>({view.pointer}, {_elements(member)}L, {identity(kind, view.dtype)});"
        )

    def _nest(
        self,
        extents: tuple[Extent, ...],
        dim: int,
        lane: int,
        rows: int | None,
        members: list[Member],
        stretched: int | None = None,
    ) -> None:
        """Write the loops around a row; those over `rows` go by groups, over `stretched` to an end."""
        if dim == len(extents):
            self._row(members, lane)
        elif dim == lane or extents[dim].full == 1 == extents[dim].known:
            self._nest(extents, dim + 1, lane, rows, members, stretched)
        elif extents[dim].full == 1:
            with self.context.block(f"if ({extents[dim].text} > 0)"):
                self._nest(extents, dim + 1, lane, rows, members, stretched)
        elif dim == rows:
            self._groups(extents[dim], dim, lane, members)
        else:
            first, stop = ("0", extents[dim].text) if dim != stretched else (f"c{dim}", f"s{dim}")
            head = f"for (long r{dim} = {first}; r{dim} < {stop}; ++r{dim})"
            with self.context.block(head):
                self._nest(extents, dim + 1, lane, rows, members, stretched)

    def _row(self, members: list[Member], lane: int) -> None:
        row = Row(self.context, self.plan, members[0].rank, lane)
        guessed = self._guessed(members, lane)
        if guessed is None:
            row.write(members)
            return
        top, total = guessed
        at, end = members.index(top), members.index(total) + 1
        row.write(members[:at])
        guess = row.highest(top)
        with self._guessing(guess) as exact:
            with self.context.block(f"if ({exact})"):
                inner = replace(row, scalars=dict(row.scalars), pending=[])
                inner.write([top])
                self.context.write(f"{guess} = {inner.total(top)};")
            row.take(top, guess)
            row.write(members[at + 1 : end])
            least, most = _bounds(total, lane)
            told = f"{row.total(total)} >= {least} && {row.total(total)} <= {most}"
            self.context.write(f"if (!{exact} && !({told})) continue;")
            row.write(members[end:])
            self.context.write("break;")

    # -- maxima that are guessed ---------------------------------------------------------------

    def _guessed(self, members: list[Member], lane: int) -> tuple[Member, Member] | None:
        """Return a maximum in whose place another number may do, and the sum that tells whether it does.

        Between them nothing happens that cannot be done again.
        """
        reduced = {m.node: m for m in members if m.kind == "reduce"}
        for node, top in reduced.items():
            total = reduced.get(self.plan.seen.shifts.told.get(node, node), top)
            if members.index(total) <= members.index(top) or top.extents[lane].full < _LONG:
                continue
            between = members[members.index(top) : members.index(total)]
            again = all(m.kind in _AGAIN for m in between)
            known = top.extents[lane].known and lane == top.rank - 1
            floats = {top.view.element, total.view.element} == {"float"}
            if again and known and floats and top.axes == total.axes == (lane,):
                return top, total
        return None

    @contextmanager
    def _guessing(self, guess: str) -> Iterator[str]:
        """Write a loop that ends if a guess does for the maximum; else the maximum is looked for, here and from now on.

        What is in the loop says where to end, and to `continue`. Yields the variable that says that there is no guess.
        """
        exact = self.context.fresh("exact")
        none = f"{self.missed} || !({guess} > -__builtin_inff())"
        head = f"for (bool {exact} = {none};; {exact} = {self.missed} = true)"
        with self.context.block(head):
            yield exact

    # -- long sums over rows -------------------------------------------------------------------

    def _stretched(self, member: Member, lane: int) -> tuple[int, int] | None:
        """Return the dim whose rows are summed in stretches, and how long these are, if that is due."""
        full = {a: member.extents[a].full for a in member.axes if a != lane}
        rows = prod(full.values())
        if member.kind != "reduce" or combine_kind(member.node) != "sum" or rows <= 2 * _STRETCH:
            return None
        longest = max(full, key=lambda a: full[a])
        length = max(1, _STRETCH * full[longest] // rows)
        return (longest, length) if member.view.dtype.is_float else None

    def _stretches(self, member: Member, dim: int, length: int, lane: int) -> None:
        view, count = member.view, _elements(member)
        part = self.context.allocate((count,), view.dtype, "part").pointer
        inner = replace(member, view=replace(view, pointer=part))
        end = member.extents[dim].text
        with self.context.block(f"for (long c{dim} = 0; c{dim} < {end}; c{dim} += {length})"):
            self.context.write(f"const long s{dim} = min_of(c{dim} + {length}, {end});")
            self._clear(inner)
            self._nest(member.extents, 0, lane, None, [inner], dim)
            self.context.write(f"add<{view.element}>({view.pointer}, {part}, {count}L);")

    # -- groups of rows ------------------------------------------------------------------------

    def _grouped(self, members: list[Member], lane: int) -> int | None:
        """Return the dim whose rows are best taken in groups, if any.

        What has one value per row is then computed for all rows of a group as a vector, and the
        horizontal part of their reductions is shared.
        """
        extents = members[0].extents
        rows = [d for d in range(lane) if extents[d].full != 1]
        if lane != len(extents) - 1 or members[0].dense is not None or not rows:
            return None
        columns = max(m.extents[lane].full for m in members)
        if extents[rows[-1]].full < _GROUP or not 1 < columns <= _GROUP_COLUMNS:
            return None
        if any(self._crosses_rows(m) for m in members):
            return None
        narrow = any(m.extents[lane].full == 1 for m in members)
        return rows[-1] if narrow or any(m.kind == "reduce" for m in members) else None

    def _groups(self, extent: Extent, dim: int, lane: int, members: list[Member]) -> None:
        first, stop = f"g{dim}", f"s{dim}"
        head = f"for (long {first} = 0; {first} < {extent.text}; {first} += VL)"
        with self.context.block(head):
            self.context.write(f"const long {stop} = min_of({first} + VL, {extent.text});")
            self._pass(self._phases(members, lane), dim, lane, first)

    def _pass(self, phases: list[list[Member]], dim: int, lane: int, first: str) -> None:
        """Write the passes over a group."""
        while phases:
            phase = phases.pop(0)
            if phase[0].extents[lane].full == 1:
                self._column(phase, dim, first)
                continue
            members = [m for later in (phase, *phases) for m in later]
            guessed = self._guessed(members, lane) if self.missed else None
            if guessed is not None and guessed[0] in phase:
                end = next(i for i, later in enumerate(phases) if guessed[1] in later) + 1
                again = all(m.kind in _AGAIN for later in phases[:end] for m in later)
                if again and all(m.view.strides[dim] == 1 for m in guessed):
                    others = [m for m in phase if m is not guessed[0]]
                    self._pass([others] if others else [], dim, lane, first)
                    self._guessed_group(guessed, phases, end, dim, lane, first)
                    return
            if (total := self._far(phase, phases, dim)) is not None:
                self._far_shift(phase, phases.pop(0), phases.pop(0), total, dim, lane, first)
                continue
            for member, partial in self._rows(phase, dim, lane, first):
                if phases and self._lags(member, phases[0]):
                    self._shift(member, partial, phases.pop(0), dim, lane, first)
                else:
                    self._fold(member, partial, dim, lane, first)

    def _guessed_group(
        self,
        guessed: tuple[Member, Member],
        phases: list[list[Member]],
        end: int,
        dim: int,
        lane: int,
        first: str,
    ) -> None:
        """Write the passes over a group from that on for which one number is guessed for all maxima.

        At `end` the sums are known that tell whether that did.
        """
        top, total = guessed
        rows = f"s{dim} - {first}"
        guess = self.context.fresh("guess")
        self.context.write(f"vf {guess} = splat<vf>(-__builtin_inff());")
        with self.context.block(f"for (long r{dim} = {first}; r{dim} < s{dim}; ++r{dim})"):
            row = Row(self.context, self.plan, top.rank, lane)
            self.context.write(f"{guess} = so::max_fast({guess}, {row.first(top)});")
        with self._guessing(f"hmax({guess})") as exact:
            with self.context.block(f"if ({exact})"):
                for member, partial in self._rows([top], dim, lane, first):
                    self._fold(member, partial, dim, lane, first)
            with self.context.block("else"):
                address = self._at(top.view, top, dim, lane, first)
                self.context.write(f"store_n({address}, splat<vf>(hmax({guess})), {rows});")
            self._pass(phases[:end], dim, lane, first)
            sums = self._at(total.view, total, dim, lane, first)
            least, most = _bounds(total, lane)
            self.context.write(
                f"if (!{exact} && !between({sums}, {least}, {most}, {rows})) continue;"
            )
            self._pass(phases[end:], dim, lane, first)
            self.context.write("break;")

    def _far(self, phase: list[Member], phases: list[list[Member]], dim: int) -> Member | None:
        """Return the sum that tells whether a running shift is too far from the new maximum, if there is one.

        The maximum need not be looked for before that is known: the next pass can be done again.
        """
        if len(phases) < 2 or len(phase) > 1 or not self._lags(phase[0], phases[0]):
            return None
        wanted = self.plan.seen.shifts.told.get(phases[0][0].node)
        again = all(m.kind in _AGAIN for m in phases[1])
        for member in phases[1] if again else ():
            joins = member.view.element == "float" and member.view.strides[dim] == 1
            if member.kind == "reduce" and member.node is wanted and joins:
                return member
        return None

    def _far_shift(
        self,
        maxima: list[Member],
        column: list[Member],
        values: list[Member],
        total: Member,
        dim: int,
        lane: int,
        first: str,
    ) -> None:
        """Write the pass that makes values with a running shift, and again if that was too far from the maximum."""
        (shift,) = column
        rows = f"s{dim} - {first}"
        for _, factor in shift.factors:
            address = self._at(factor, shift, dim, lane, first)
            self.context.write(f"store_n({address}, splat<vf>(1.0f), {rows});")
        exact = self.context.fresh("exact")
        missing = f"without({self._at(shift.view, shift, dim, lane, first)}, {rows})"
        with self.context.block(f"for (bool {exact} = {missing};; {exact} = true)"):
            with self.context.block(f"if ({exact})"):
                ((top, partial),) = self._rows(maxima, dim, lane, first)
                self._shift(top, partial, column, dim, lane, first)
            partials = self._rows(values, dim, lane, first)
            (sums,) = (view for member, view in partials if member is total)
            over = f"over({sums.pointer}, {literal(math.exp(FAR), DType.F32)}, {rows})"
            self.context.write(f"if ({exact} || !{over}) break;")
        for member, partial in partials:
            self._fold(member, partial, dim, lane, first)

    def _phases(self, members: list[Member], lane: int) -> list[list[Member]]:
        """Part members where totals of all rows are needed, and those of a row from those of a column."""
        phases: list[list[Member]] = []
        for member in members:
            wide = member.extents[lane].full != 1
            reads = read_by(self.context, member)
            at = len(phases) - 1
            if not wide and at >= 0 and not reads & {m.node for m in phases[at]}:
                at -= 1  # what it needs was there before the last pass over rows
            fits = at >= 0 and wide == (phases[at][0].extents[lane].full != 1)
            totals = (
                {m.node for m in phases[at] if m.kind in ("reduce", "place")} if fits else set()
            )
            if fits and not (wide and totals & reads):
                phases[at].append(member)
            else:
                phases.insert(at + 1, [member])
        return phases

    def _rows(
        self, members: list[Member], dim: int, lane: int, first: str
    ) -> list[tuple[Member, View]]:
        """Write the pass over a group's rows; return the reductions that are still to be folded."""
        if all(m.kind == "rescale" for m in members):
            tests = dict.fromkeys(self._scales(m, dim, first) for m in members)
            with self.context.block(f"if ({' || '.join(tests)})"):
                return self._each_row(members, dim, lane, first)
        return self._each_row(members, dim, lane, first)

    def _lags(self, member: Member, column: list[Member]) -> bool:
        """Say whether a column is made of one shift, which alone reads this maximum and may lag behind it."""
        (shift, *others) = column
        lags = shift.kind == "prefix" and shift.lag and shift.peak is None
        alone = self.plan.only_shifts(member.node) is shift.node
        return bool(lags and alone and not others and member.view.dtype is DType.F32)

    def _shift(
        self, member: Member, partial: View, column: list[Member], dim: int, lane: int, first: str
    ) -> None:
        """Look for the new maxima of a group's rows only where one is above the shift in force by more than the lag."""
        (shift,) = column
        limit = f"{self._at(shift.view, shift, dim, lane, first)}, {shift.lag!r}f, s{dim} - {first}"
        with self.context.block(f"if (above({partial.pointer}, {limit}))"):
            self._fold(member, partial, dim, lane, first)
            self._column(column, dim, first)
        with self.context.block("else"):
            for _, factor in shift.factors:
                address = self._at(factor, shift, dim, lane, first)
                self.context.write(f"store_n({address}, splat<vf>(1.0f), s{dim} - {first});")

    def _fold(self, member: Member, partial: View, dim: int, lane: int, first: str) -> None:
        address = self._at(member.view, member, dim, lane, first)
        fold = f"fold_rows<{_FOLD[combine_kind(member.node)]}>"
        self.context.write(f"{fold}({partial.pointer}, {address}, s{dim} - {first});")

    def _at(self, view: View, member: Member, dim: int, lane: int, first: str) -> str:
        """Return the address of what a group's first row has one of."""
        shape = tuple(1 if i == lane else e.full for i, e in enumerate(member.extents))
        env = Environment(self.context, self.plan, member.extents, dim, first)
        return env.address(view, identity_coords(shape))[0]

    def _scales(self, member: Member, dim: int, first: str) -> str:
        """Return the test whether a group's rows are not all left as they are."""
        _, view = member.factors[0]
        shape = (*member.old_shape[:-1], 1)
        env = Environment(self.context, self.plan, member.extents, dim, first)
        address, _ = env.address(view, identity_coords(shape))
        return f"scales({address}, s{dim} - {first})"

    def _each_row(
        self, members: list[Member], dim: int, lane: int, first: str
    ) -> list[tuple[Member, View]]:
        group = RowGroup(dim, first)
        with self.context.block(f"for (long r{dim} = {first}; r{dim} < s{dim}; ++r{dim})"):
            row = Row(self.context, self.plan, members[0].rank, lane, group=group)
            row.write(members)
        return group.partials

    def _column(self, members: list[Member], dim: int, first: str) -> None:
        """Compute what has one value per row, for a group of rows as a vector."""
        row = Row(self.context, self.plan, members[0].rank, dim, first)
        placed = []
        for member in members:
            extents = list(member.extents)
            extents[dim] = Extent(_GROUP, f"s{dim}", "-1")
            placed.append(replace(member, extents=tuple(extents)))
        row.write(placed)


def _bounds(total: Member, lane: int) -> tuple[str, str]:
    """Return between what a sum of exponentials is whose shift is not far from the maximum."""
    most = total.extents[lane].full * math.exp(FAR)
    return literal(math.exp(-FAR), DType.F32), literal(most, DType.F32)


def _elements(member: Member) -> int:
    """Return how many elements in memory the result of a reduction takes."""
    strides = member.view.strides
    return max(strides[0] * member.node.shape[0], 1) if strides else 1
