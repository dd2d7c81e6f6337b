"""Write what kernels compute of tiles over values of the program, which computes it as a whole.

In: the outputs of a program and of a candidate for it, as primitives over the same inputs. Out: the candidate's,
with values of the program in place of what is the same computation on moved operands.
"""

from collections.abc import Container, Sequence

from superopt.ir.build import input_, reshape
from superopt.ir.node import Node, make, rebuild, rewrite, topological
from superopt.ir.ops import contraction, structural
from superopt.ir.ops.registry import OpKind
from superopt.ir.types import DType


def like(original: Sequence[Node], candidate: Sequence[Node]) -> tuple[Node, ...]:
    """Write the candidate over values of the original where it computes these, element by element, of moved operands.

    A kernel reads tiles, or another shape, of what the program computes as it is. What comes of that is then moved
    instead: both are one computation, and claims begin behind it.
    """
    own = frozenset(topological(original))

    def rule(node: Node, inputs: tuple[Node, ...]) -> Node:
        rows = _reduces_rows(node)
        if node.op.kind is not OpKind.ELEMENTWISE and not rows:
            return rebuild(node, inputs)
        return _moved(node, inputs, own, rows=rows) or rebuild(node, inputs)

    return rewrite(candidate, rule)


def _reduces_rows(node: Node) -> bool:
    reduces = node.op.kind is OpKind.REDUCTION and isinstance(node.attrs, contraction.ReduceAttrs)
    return reduces and node.attrs.axes == (-1,)


def _moved(
    node: Node, inputs: tuple[Node, ...], own: Container[Node], *, rows: bool
) -> Node | None:
    """Return an operator on `inputs` as moves of one of `own`, of which its operands are the same moves."""
    result = make(node.op, inputs, node.attrs)
    if result in own:
        return result
    given = [i for i in inputs if i.shape]
    if not given or not _move_alike(given, rows=rows):
        return None
    before = _moved(node, tuple(i.inputs[0] if i.shape else i for i in inputs), own, rows=rows)
    if before is None:
        return None
    if given[0].op is structural.RESHAPE:
        return reshape(before, result.shape)
    return _again(given[0], before)


def _move_alike(given: Sequence[Node], *, rows: bool) -> bool:
    """Say whether all are moved by the same step from values of the same shape (or of rows, and a number for each)."""
    first = given[0]
    if any(i.op is not first.op for i in given):
        return False
    if first.op is structural.RESHAPE:
        shapes = [(i.inputs[0].shape, i.shape) for i in given]
        of_rows = all(s and s[-1] == t[-1] for s, t in shapes)
        if of_rows:
            shapes = [(s[:-1], t[:-1]) for s, t in shapes]
        return len(set(shapes)) == 1 and (of_rows or not rows)
    if first.op is structural.PERMUTE:
        kept = first.attrs.perm[-1] == len(first.shape) - 1
        return len({i.attrs for i in given}) == 1 and (kept or not rows)
    if first.op is structural.CONCAT and not rows and all(map(_is_padded, given)):
        if len({i.inputs[0].shape for i in given}) > 1:
            return False
        blank = input_("padded", first.inputs[0].shape, DType.F32)
        return len({_again(i, blank) for i in given}) == 1
    return False


def _is_padded(node: Node) -> bool:
    """Say whether a concatenation is of a value and repeated parts of it."""
    first, *others = node.inputs
    return all(_repeats_part(i, first) for i in others)


def _repeats_part(node: Node, of: Node) -> bool:
    while node.op in (structural.BROADCAST, structural.SLICE):
        (node,) = node.inputs
        if node is of:
            return True
    return False


def _again(move: Node, source: Node) -> Node:
    """Move another value of the same shape as `move` moves its first operand."""
    new = {move.inputs[0]: source}
    for node in topological([move], stop=new):
        if node not in new:
            new[node] = make(node.op, tuple(new[i] for i in node.inputs), node.attrs)
    return new[move]
