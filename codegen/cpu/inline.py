"""Which values are computed where they are read, and which of those have a vector form.

In: a tile program. Out: `Plan`: the set of values that need memory, users, ranges. A value
needs memory when it is a product, a reduction or a loop's state, when a product or a reshape reads
it, or when computing it again would cost more than keeping it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, final

from superopt.codegen.cpu.config import of_bfloat16, source, widens
from superopt.codegen.cpu.expressions import can_be_vector
from superopt.codegen.cpu.ranges import Range, range_of
from superopt.codegen.cpu.shifts import Shifts
from superopt.codegen.tile_program import TileProgram
from superopt.ir.coordinates import adds_ones, is_move
from superopt.ir.graph import Graph
from superopt.ir.node import Node, topological, users_of
from superopt.ir.ops import contraction, elementwise, leaf, structural, tile
from superopt.ir.ops.registry import OpKind
from superopt.ir.types import DType

_CHEAP = 4
"""Operations that are computed again rather than kept."""
_DEAR = 10
CONVERTED = 1 << 16
"""Elements of an operand that fit the second cache as floats."""
DEAR_OPS = frozenset(
    {
        elementwise.EXP,
        elementwise.EXPM1,
        elementwise.LOG,
        elementwise.LOG1P,
        elementwise.LOG2,
        elementwise.LOG10,
        elementwise.TANH,
        elementwise.SIGMOID,
        elementwise.ERF,
        elementwise.POW,
        elementwise.DIV,
        elementwise.SQRT,
        elementwise.SIN,
        elementwise.COS,
    }
)
JOINS = (structural.CONCAT, structural.PAD)
ROUGH = (elementwise.EXP, elementwise.SIGMOID)
"""What has a cheaper form of 16 bits. It is nowhere below 0."""
_MOST_PARTS = 4
_LANES = 16
_ROW_OF_SEAM = 64
"""Elements of a row that pay one vector whose lanes are of two parts, and are brought together one by one."""
_INT32 = (-(2**31), 2**31 - 1)
_RANGES = {
    DType.BOOL: (0, 1),
    DType.U8: (0, 255),
    DType.I8: (-128, 127),
    DType.I16: (-(2**15), 2**15 - 1),
    DType.I32: _INT32,
    DType.I64: (-(2**63), 2**63 - 1),
}
_CHOICES = frozenset({elementwise.WHERE, elementwise.MAXIMUM, elementwise.MINIMUM})
"""A choice among saturated integers is the saturated choice."""
_LITTLE: Final = 2**24
"""A number so small may be added to saturated ones many times before the sum looks small."""
_SUMS = (contraction.REDUCE_SUM, tile.ACCUM_SUM, tile.ACCUM_RESCALED)


@final
@dataclass(frozen=True, slots=True)
class Seen:
    """What of a program's values its results show."""

    rough: frozenset[Node] = frozenset()
    """Exponentials and sigmoids of which 16 bits count."""
    bits: int = 11
    """How many of these bits are significant, in the finest of the program's formats."""
    shifts: Shifts = field(default_factory=Shifts)


@final
@dataclass(slots=True)
class Plan:
    """Decisions on every value of one tile program."""

    program: TileProgram
    pairs: bool = False
    """Whether products of bfloat16 take it as it is."""
    seen: Seen = field(default_factory=Seen)
    memory: set[Node] = field(default_factory=set)
    halves: set[Node] = field(default_factory=set)
    """Values in memory that stay in 16 bits: only such products read them."""
    users: dict[Node, list[Node]] = field(default_factory=dict)
    cost: dict[Node, int] = field(default_factory=dict)
    ranges: dict[Node, tuple[int, int]] = field(default_factory=dict)
    bounds: dict[Node, Range] = field(default_factory=dict)
    vector: dict[Node, bool] = field(default_factory=dict)
    merged: dict[Node, Node] = field(default_factory=dict)
    """A product that goes straight into an accumulator, and that accumulator."""

    def __post_init__(self) -> None:
        outputs = self.program.graph.outputs
        self.users = users_of(outputs)
        for node in topological(outputs):
            self._operands(node)
        for node in topological(outputs):
            self._decide(node)
            self.ranges[node] = self._range(node)
            self.bounds[node] = range_of(node, self.bounds)
            self.vector[node] = self._has_vector_form(node)

    def operand_base(self, node: Node) -> Node:
        """Return the value in memory that a view `node` looks at."""
        while is_move(node) or (widens(node) and node not in self.memory):
            node = node.inputs[0]
        return node

    def only_shifts(self, node: Node) -> Node | None:
        """Return the loose running maximum that alone reads the value."""
        (user, *others) = self.users[node] or (node,)
        return user if not others and user in self.seen.shifts.loose else None

    def only_multiplied(self, node: Node) -> bool:
        """Say whether nothing but products reads the value, through moves, reshapes and conversions."""
        users = self.users[node]
        return all(
            u.op is contraction.MATMUL
            or ((is_move(u) or u.op is structural.RESHAPE or widens(u)) and self.only_multiplied(u))
            for u in users
        )

    def _operands(self, node: Node) -> None:
        if node.op is contraction.MATMUL:
            paired = self.pairs and of_bfloat16(node)
            for operand in node.inputs:
                if paired:
                    self._keep_half(operand)
                else:
                    self._convert_before(operand, node)
                base = self.operand_base(operand)
                if base.op is not tile.LOAD:
                    self.memory.add(base)
            users = self.users[node]
            sums = users[0].op in (tile.ACCUM_SUM, tile.ACCUM_RESCALED) and len(users) == 1
            wide = node.tensor.dtype in (DType.F32, DType.F64)
            if sums and wide and node is users[0].inputs[0]:
                self.merged[node] = users[0]
        elif node.op is structural.GATHER:
            base = self.operand_base(node.inputs[0])
            if base.op is not tile.LOAD:
                self.memory.add(base)

    def _keep_half(self, operand: Node) -> None:
        """Keep an operand that is computed as the halves that it is rounded to."""
        half = source(operand).inputs[0]
        if half.op is elementwise.CAST:
            self.halves.add(half)
            self.memory.add(half)

    def _convert_before(self, operand: Node, product: Node) -> None:
        """Keep halves as floats where a loop around the product would convert them anew."""
        operand = source(operand)
        stays = self.program.loops_of[operand] < self.program.loops_of[product]
        if widens(operand) and stays and operand.tensor.elements <= CONVERTED:
            self.memory.add(operand)

    def _decide(self, node: Node) -> None:
        kind = node.op.kind
        if kind is OpKind.TILE:
            if node.op not in (tile.LOAD, tile.STORE, tile.TILE_INDEX):
                self.memory.add(node)
        elif kind in (OpKind.CONTRACTION, OpKind.REDUCTION):
            if node not in self.merged:
                self.memory.add(node)
        elif node.op in JOINS:
            self.cost[node] = 1 + sum(self._inline_cost(i) for i in dict.fromkeys(node.inputs))
            if not self._joins_in_place(node) or self._worth_keeping(node):
                self.memory.add(node)
            return
        elif node.op is contraction.SCAN or (node.op is structural.RESHAPE and not adds_ones(node)):
            self.memory.add(node)
        elif kind is OpKind.ELEMENTWISE and node.shape:
            total = sum(self._inline_cost(i) for i in dict.fromkeys(node.inputs))
            self.cost[node] = total + (_DEAR if node.op in DEAR_OPS else 1)
            if self._worth_keeping(node):
                self.memory.add(node)
            return
        if node.op in (contraction.SCAN, contraction.ARGMAX, contraction.ARGMIN):
            # read one by one: what costs something is computed in vectors before
            base = self.operand_base(node.inputs[0])
            if self._inline_cost(base) > 1:
                self.memory.add(base)
        inputs = dict.fromkeys(node.inputs)
        self.cost[node] = sum(self._inline_cost(i) for i in inputs) if is_move(node) else 0

    def _joins_in_place(self, node: Node) -> bool:
        """Say whether loops can read the parts where they lie: few vectors have lanes of several parts."""
        readers = _readers(self.users, node)
        kinds = (OpKind.ELEMENTWISE, OpKind.REDUCTION)
        simple = all(r.op in (*JOINS, tile.STORE) or r.op.kind in kinds for r in readers)
        along = any(r.op in (contraction.ARGMAX, contraction.ARGMIN) for r in readers)
        dtype = node.tensor.dtype
        if not simple or along or not dtype.is_float or dtype is DType.F64:
            return False
        parts = joined_parts(node)
        inside = [start for _, start, _ in parts[1:] if start % _LANES]
        last = node.attrs.axis == -1
        return len(parts) <= _MOST_PARTS and not (
            last and node.shape[-1] < _ROW_OF_SEAM * len(inside)
        )

    def _inline_cost(self, node: Node) -> int:
        return 0 if node in self.memory else self.cost.get(node, 0)

    def _worth_keeping(self, node: Node) -> bool:
        if widens(node) and self.operand_base(node).op is tile.LOAD:
            return False
        # a maximum that is told is looked for seldom
        users = [u for u in _readers(self.users, node) if u not in self.seen.shifts.told]
        loops = self.program.loops_of
        cost = self.cost[node]
        if any(not self._scope(u) <= loops[node] for u in users) and cost > 1:
            return True
        size = node.tensor.elements
        wider = any(u.tensor.elements > size for u in users if u.op is not tile.STORE)
        return (len(users) > 1 and cost > _CHEAP) or (wider and cost > _CHEAP)

    def _scope(self, node: Node) -> frozenset[str]:
        found = self.program.loops_of[node]
        loop = getattr(node.attrs, "loop", None)
        return found | {loop} if loop else found

    # -- integers ------------------------------------------------------------------------------

    def _range(self, node: Node) -> tuple[int, int]:
        dtype = node.tensor.dtype
        whole = _RANGES.get(dtype, (0, 0))
        if node.op is leaf.CONSTANT and not dtype.is_float:
            return int(node.attrs.value), int(node.attrs.value)
        if node.op is tile.TILE_INDEX:
            return 0, node.attrs.dim.padded - 1
        if node.op is leaf.IOTA:
            return 0, max(node.shape[node.attrs.axis] - 1, 0)
        inputs = [self.ranges[i] for i in node.inputs if i in self.ranges]
        if is_move(node):
            return inputs[0]
        if dtype.is_float or node.op is tile.LOAD or not inputs:
            return whole
        found = _arithmetic_range(node, inputs)
        inside = found is not None and whole[0] <= found[0] and found[1] <= whole[1]
        return found if inside and found is not None else whole

    def _has_vector_form(self, node: Node) -> bool:
        """Say whether `node` can be computed in lanes where it stands, its inputs included."""
        if node.op.kind is OpKind.ELEMENTWISE:
            small = all(self._small(i, node) for i in node.inputs) and self._small(node, node)
            if not can_be_vector(node, small=small):
                return False
        elif node.tensor.dtype is DType.F64:
            return False
        elif node.op is structural.GATHER:
            # its index is read once per row, or see `places_in_lanes`
            return self.vector[node.inputs[0]] or node.inputs[0] in self.memory
        elif node.tensor.dtype.is_integer and node.op.kind in (OpKind.REDUCTION, OpKind.TILE):
            return node.op in (tile.LOAD, tile.TILE_INDEX, tile.STORE)
        return all(self.vector[i] or i in self.memory for i in node.inputs if i in self.vector)

    def places_in_lanes(self, gather: Node) -> bool:
        """Say whether a gather can read an element per lane: places of 64 bits are saturated."""
        data, index = gather.inputs
        known = self.vector[index] or index in self.memory
        floats = gather.tensor.dtype.is_float and gather.tensor.dtype is not DType.F64
        return known and floats and data.shape[gather.attrs.axis] < _INT32[1]

    def fits(self, node: Node) -> bool:
        """Say whether an integer value can be moved through 32-bit lanes unchanged."""
        low, high = self.ranges[node]
        return _INT32[0] <= low and high <= _INT32[1]

    def _small(self, node: Node, user: Node) -> bool:
        dtype = node.tensor.dtype
        if not dtype.is_integer:
            return True
        low, high = self.ranges[node]
        if dtype is DType.I32:
            return True
        if _INT32[0] < low and high < _INT32[1]:
            computed = node is user and node.op.kind is OpKind.ELEMENTWISE
            return not computed or dtype is DType.I64 or self.ranges[node] != _RANGES[dtype]
        base = self.operand_base(node)
        saturated = base.op is tile.LOAD or base in self.memory or base.op in _CHOICES
        saturated |= base.op is elementwise.ADD and self._adds_little(base)
        if user.op is elementwise.WHERE:
            return saturated
        if user is not node and user.op is not elementwise.ADD and self._may_wrap(node):
            return False
        if user.op in _CHOICES:
            return saturated
        if user.op is elementwise.ADD:
            return saturated and self._adds_little(user)
        # a saturated operand compares right with numbers well inside the range
        others = [self.ranges[i] for i in user.inputs if i is not node]
        inside = all(_INT32[0] // 2 < a and b < _INT32[1] // 2 for a, b in others)
        return user.op in elementwise.COMPARISONS and saturated and inside

    def _may_wrap(self, node: Node) -> bool:
        """Say whether a sum that leaves 64 bits may be in a value: only where it is a place does nobody see it."""
        base = self.operand_base(node)
        if base in self.memory or self.fits(base):
            return False
        if base.op in _CHOICES:
            return any(self._may_wrap(i) for i in base.inputs)
        return base.op is elementwise.ADD

    def _adds_little(self, node: Node) -> bool:
        """Say whether a sum of 64 bits has one small operand: of a saturated one it is saturated, or nearly."""
        given = (self.ranges[i] for i in node.inputs)
        return node.tensor.dtype is DType.I64 and any(
            a > -_LITTLE and b < _LITTLE for a, b in given
        )


def joined_parts(node: Node) -> list[tuple[Node | None, int, int]]:
    """Return the parts of a join, each with its first and last place; None is the value around a padded one."""
    parts: list[tuple[Node | None, int]] = [(i, i.shape[node.attrs.axis]) for i in node.inputs]
    if node.op is structural.PAD:
        parts = [(None, node.attrs.before), *parts, (None, node.attrs.after)]
    found, start = [], 0
    for part, size in parts:
        if size:
            found.append((part, start, start + size - 1))
            start += size
    return found


def rough_functions(graph: Graph) -> frozenset[Node]:
    """Return the `ROUGH` values of which nobody sees more than 16 bits: they are rounded, or scaled or chosen before.

    Or added up before that: terms of one sign err together no more than each. Neither what is taken
    off a sum nor its logarithm keeps its relative error.
    """
    users = users_of(graph.outputs)
    scaled: set[Node] = set()
    summed: set[Node] = set()
    for node in reversed(list(topological(graph.outputs))):
        readers = _readers(users, node)
        others = [
            r
            for r in readers
            if not (r.op is elementwise.CAST and r.tensor.dtype.is_half)
            and not (r.op in (elementwise.MUL, elementwise.DIV) and r in scaled)
            and not (r.op is elementwise.WHERE and r in scaled and node is not r.inputs[0])
        ]
        if not readers or any(r.op not in _SUMS or r not in summed for r in others):
            continue
        summed.add(node)
        if not others:
            scaled.add(node)
    return frozenset(n for n in summed if n.op in ROUGH)


def _readers(users: Mapping[Node, Sequence[Node]], node: Node) -> list[Node]:
    """Return the users of a value, looking through moves, which are read in place."""
    found: list[Node] = []
    stack = list(users[node])
    while stack:
        user = stack.pop()
        if is_move(user):
            stack += users[user]
        else:
            found.append(user)
    return list(dict.fromkeys(found))


def _arithmetic_range(node: Node, inputs: list[tuple[int, int]]) -> tuple[int, int] | None:
    if node.op is elementwise.CAST and not node.inputs[0].tensor.dtype.is_float:
        return inputs[0]
    if node.op is elementwise.WHERE:
        return min(inputs[1][0], inputs[2][0]), max(inputs[1][1], inputs[2][1])
    if len(inputs) != 2:
        return None
    (a, b), (c, d) = inputs
    if node.op is elementwise.ADD:
        return a + c, b + d
    if node.op is elementwise.SUB:
        return a - d, b - c
    if node.op is elementwise.MUL:
        corners = (a * c, a * d, b * c, b * d)
        return min(corners), max(corners)
    if node.op is elementwise.MAXIMUM:
        return max(a, c), max(b, d)
    if node.op is elementwise.MINIMUM:
        return min(a, c), min(b, d)
    return None
