"""Fused loops: elementwise ops, reductions along rows, loop states and stores in one pass over rows.

In: a list of `Member`s whose leading dims agree. Out: C++ loops over those dims; inside, one vector
loop along the last dim for all members that can share it (`Row`).
"""

from dataclasses import dataclass, field
from typing import final

from superopt.codegen.cpu.context import Context
from superopt.codegen.cpu.environment import Environment, identity_coords
from superopt.codegen.cpu.inline import Plan
from superopt.codegen.cpu.members import Member, carried, combine_kind, identity
from superopt.codegen.cpu.row import Row
from superopt.ir.node import Node


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
        if member.kind in ("rescale", "finish"):
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
        rank = members[0].rank
        lane = rank - 1
        if members[0].dense is not None:
            lane = members[0].dense
        elif all(m.extents[-1].full == 1 for m in members if m.rank) and rank:
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
        row = Row(self.context, self.plan, members[0].rank, lane)
        for member in members:
            row.add(member)
        row.flush()
