"""Where masks leave a diagonal band of a matrix, or nothing of a tile: kernels need not look at the rest.

In: operands and results of products. Out: `Band`s: the texts of bounds between which row - column lies
for every element that counts. What is outside is 0 in an operand, and not looked at in a result.

In: the states of a loop. Out: the text of a test for iterations that give them nothing. A block graph's own
bounds are single comparisons; a window beside a visible prefix hides a tile by two at once.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import final

from superopt.codegen.cpu.context import Context
from superopt.codegen.cpu.inline import Plan
from superopt.ir.coordinates import broadcast_coords, identity_coords
from superopt.ir.masks import Cases, Linear, Masks, excess, forced, nothing_new
from superopt.ir.node import Node
from superopt.ir.ops import elementwise
from superopt.ir.ops.registry import OpKind


@final
@dataclass(frozen=True, slots=True)
class Band:
    """Elements count where first <= row - column <= last; None: there is no such bound."""

    first: str | None
    last: str | None

    @property
    def text(self) -> str:
        """The band as a C++ argument."""
        return f"Band{{{self.first or '-Whole::FAR'}, {self.last or 'Whole::FAR'}}}"


def zero_outside(context: Context, node: Node) -> Band | None:
    """Return the band outside of which a matrix is 0."""
    return _band(context, node, Masks().vanishing(node, identity_coords(node.shape), 0.0))


def unseen_outside(context: Context, plan: Plan, node: Node) -> Band | None:
    """Return the band outside of which nobody looks at a matrix."""
    return _band(context, node, _unseen(plan, node))


def hidden(context: Context, states: Iterable[Node]) -> str | None:
    """Return the text of a test for iterations that give the states nothing, by several conditions at once."""
    cases = []
    for case in nothing_new(states):
        if len(case) > 1:
            cases.append(" && ".join(sorted(f"{_base(context, n, 1)} > 0" for n in case)))
    return " || ".join(f"({case})" for case in sorted(cases)) or None


def _base(context: Context, number: Linear, sign: int) -> str:
    """Return the text of sign * (what does not depend on the dims)."""
    terms = [f"{sign * w}L * ({context.offset_text(m)})" for m, w in number.offsets]
    return " + ".join([*terms, f"{sign * number.constant}L"])


def _band(context: Context, node: Node, cases: Cases) -> Band | None:
    """Turn what elements outside may fulfil into bounds of row - column."""
    row, column = len(node.shape) - 2, len(node.shape) - 1
    loops = {axis.name for axis in context.program.graph.loops}
    firsts: set[str] = set()
    lasts: set[str] = set()
    for compare, coords, value in (c for case in cases if len(case) == 1 for c in case):
        assert coords is not None
        number = excess(compare, coords, value)
        if number is None or not number.axes() & loops <= context.program.loops_of[node]:
            continue  # what is made once must serve every iteration of a later loop
        # outside where the number is positive
        if number.dims == ((row, -1), (column, 1)):
            firsts.add(_base(context, number, 1))
        elif number.dims == ((row, 1), (column, -1)):
            lasts.add(_base(context, number, -1))
    if not firsts and not lasts:
        return None
    return Band(_nested("max_of", firsts), _nested("min_of", lasts))


def _nested(function: str, texts: Iterable[str]) -> str | None:
    found: str | None = None
    for text in sorted(texts):
        found = text if found is None else f"{function}({found}, {text})"
    return found


def _unseen(plan: Plan, node: Node) -> Cases:
    """Return under what nobody reads an element, by those who read it in place."""
    found: Cases | None = None
    coords = identity_coords(node.shape)
    for user in plan.users.get(node, ()):
        if user.op.kind is not OpKind.ELEMENTWISE or user.shape != node.shape:
            return set()
        unread = _unseen(plan, user)
        if user.op is elementwise.WHERE and node is not user.inputs[0]:
            condition, yes, no = user.inputs
            if yes is not no:
                at = broadcast_coords(condition, coords)
                unread = unread | forced(condition, at, node is no)
        found = unread if found is None else found & unread
    return found or set()
