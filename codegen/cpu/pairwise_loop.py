"""Loops of reductions of what pairs of rows make (pairwise.py).

Vectors lie along the second of both rows' numbers: nothing is left to be summed across lanes, and rows of short length
waste none. Its tile is transposed, and the totals of a few rows by a few vectors stay in registers while the reduced
dim is walked, as in a product of matrices (runtime/gemm.h).
"""

from contextlib import ExitStack
from dataclasses import dataclass
from math import prod
from typing import Final, final

from superopt.codegen.cpu.context import Context, View
from superopt.codegen.cpu.environment import Environment
from superopt.codegen.cpu.inline import Plan
from superopt.codegen.cpu.members import Member, combine, combine_kind, identity
from superopt.codegen.cpu.pairwise import ROWS, Pairwise
from superopt.codegen.cpu.transposed import rows_along
from superopt.ir.coordinates import identity_coords
from superopt.ir.node import Node
from superopt.ir.types import DType

_VECTORS: Final = 2
_STRETCH: Final = 32
"""Elements whose sum is made on its own and then added: errors grow with the additions in turn."""


@final
@dataclass(slots=True)
class PairwiseLoop:
    """The loops of one reduction."""

    context: Context
    plan: Plan
    member: Member
    pairs: Pairwise

    def write(self) -> None:
        """Write them."""
        context, member, pairs = self.context, self.member, self.pairs
        lying = {n: self._lying(n, dim) for n, dim in pairs.along}
        before = {n: context.views[n] for n in lying}
        context.views.update(lying)
        inner = (pairs.lane, pairs.rows, *member.axes)
        with ExitStack() as nest:
            nest.enter_context(context.block(""))
            for dim, extent in enumerate(member.extents):
                if dim not in inner and not extent.full == 1 == extent.known:
                    nest.enter_context(context.block(self._along(dim, "0", extent.text)))
            self._tiles()
        context.views.update(before)

    def _lying(self, node: Node, dim: int) -> View:
        """Return a view of a value whose elements along a dim are side by side, of a copy if need be."""
        view = self.context.views[node]
        return view if view.strides[dim] == 1 else rows_along(self.context, node, view, dim)

    def _tiles(self) -> None:
        """Write the register tiles over rows and vectors: whole ones, then what is left of both."""
        context = self.context
        wide, whole, rest = context.fresh("tile"), context.fresh("whole"), context.fresh("rest")
        rows, columns = self._extent(self.pairs.rows), self._extent(self.pairs.lane)
        many = 1 if self.pairs.dear else ROWS
        with context.block(
            f"const auto {whole} = [&](const auto rows, const long top, const long left)"
        ):
            self._tile(_VECTORS, None)
        context.lines[-1] += ";"
        with context.block(
            f"const auto {rest} = [&](const auto rows, const long top, const long left, const long count)"
        ):
            self._tile(1, "count")
        context.lines[-1] += ";"
        with context.block(f"const auto {wide} = [&](const auto rows, const long top)"):
            context.write("long left = 0;")
            step = f"{_VECTORS} * VL"
            with context.block(f"for (; left + {step} <= {columns}; left += {step})"):
                context.write(f"{whole}(rows, top, left);")
            with context.block(f"for (; left < {columns}; left += VL)"):
                context.write(f"{rest}(rows, top, left, min_of(VL, {columns} - left));")
        context.lines[-1] += ";"
        context.write("long top = 0;")
        if many > 1:
            with context.block(f"for (; top + {many} <= {rows}; top += {many})"):
                context.write(f"{wide}(number<{many}>(), top);")
        with context.block(f"for (; top < {rows}; ++top)"):
            context.write(f"{wide}(number<1>(), top);")

    def _along(self, dim: int, first: str, end: str) -> str:
        return f"for (long r{dim} = {first}; r{dim} < {end}; ++r{dim})"

    def _extent(self, dim: int) -> str:
        return self.member.extents[dim].text

    def _tile(self, vectors: int, count: str | None) -> None:
        """Write one register tile of `rows` rows and some vectors, or one of `count` lanes."""
        context, member = self.context, self.member
        kind = combine_kind(member.node)
        size = f"decltype(rows)::value * {vectors}"
        neutral = f"splat<vf>({identity(kind, DType.F32)})"
        length = prod(member.extents[a].full for a in member.axes)
        stretched = kind == "sum" and length > 2 * _STRETCH
        whole = "sum" if stretched else "part"
        context.write(f"vf {whole}[{size}];")
        each = f"for (int e = 0; e < {size}; ++e)"
        self._unrolled(f"{each} {whole}[e] = {neutral};")
        *outer, inner = member.axes
        with ExitStack() as nest:
            for dim in outer:
                nest.enter_context(context.block(self._along(dim, "0", self._extent(dim))))
            first, end = "0", self._extent(inner)
            if stretched:
                step = f"for (long from = 0; from < {end}; from += {_STRETCH})"
                nest.enter_context(context.block(step))
                context.write(f"const long to = min_of(from + {_STRETCH}, {end});")
                context.write(f"vf part[{size}];")
                self._unrolled(f"{each} part[e] = {neutral};")
                first, end = "from", "to"
            with context.block(self._along(inner, first, end)):
                self._each(vectors, count, kind)
            if stretched:
                self._unrolled(f"{each} sum[e] = sum[e] + part[e];")
        self._each_total(vectors, count, whole)

    def _unrolled(self, head: str) -> None:
        self.context.write("#pragma GCC unroll 32")
        self.context.write(head)

    def _each(self, vectors: int, count: str | None, kind: str) -> None:
        """Write what each k does for all rows and vectors of a register tile."""
        source = self.member.source
        assert source is not None
        row = self._row()
        env = self._vector(row, count)
        value = env.value(source, identity_coords(source.shape))
        total = f"part[row * {vectors} + at]"
        env.lines.append(f"{total} = {combine(kind, total, value, DType.F32, vector=True)};")
        self._over(vectors, row.lines, env.lines)

    def _each_total(self, vectors: int, count: str | None, whole: str) -> None:
        env = self._vector(self._row(), count)
        extents = enumerate(self.member.extents)
        shape = tuple(1 if i in self.member.axes else e.full for i, e in extents)
        env.store(self.member.view, identity_coords(shape), f"{whole}[row * {vectors} + at]")
        self._over(vectors, [], env.lines)

    def _row(self) -> Environment:
        return Environment(self.context, self.plan, self.member.extents, None)

    def _vector(self, row: Environment, count: str | None) -> Environment:
        lane = self.pairs.lane
        return Environment(
            self.context,
            self.plan,
            self.member.extents,
            lane,
            f"j{lane}",
            count,
            vector=True,
            row=row,
        )

    def _over(self, vectors: int, scalars: list[str], lines: list[str]) -> None:
        """Write lines for all rows and vectors of a register tile: what is read twice, the compiler reads once."""
        context, rows, lane = self.context, self.pairs.rows, self.pairs.lane
        self._unrolled("for (int row = 0; row < decltype(rows)::value; ++row) {")
        context.depth += 1
        context.write(f"const long r{rows} = top + row;")
        for line in scalars:
            context.write(line)
        self._unrolled(f"for (int at = 0; at < {vectors}; ++at) {{")
        context.depth += 1
        context.write(f"const long j{lane} = left + at * VL;")
        for line in lines:
            context.write(line)
        for _ in range(2):
            context.depth -= 1
            context.write("}")
