"""From a schedule and tile sizes to a block graph, and to its place in the kernel graph.

Tiles keep the order of the tensors' dims, one tile dim per atom (and one of size 1 for a dim
without atoms). Broadcasts stay lazy: a tile has size 1 along an atom that its value does not
vary over. 16-bit floats are computed in float32 between load and store. Rounded in between, as in the
program, are operands of products (processors multiply 16-bit floats faster), operands of comparisons and
other steps, conversions that the program writes, and results that are small beside the largest tensor.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import inf, nan, prod
from typing import final

from superopt.ir import build as b
from superopt.ir.graph import Axis, Graph, Level
from superopt.ir.homogeneity import Homogeneity
from superopt.ir.node import Node, make
from superopt.ir.ops import contraction, elementwise, leaf, structural, tile
from superopt.ir.ops.registry import OpKind
from superopt.ir.types import DType, TensorType, contiguous_strides
from superopt.search.bounds import with_bounds
from superopt.search.errors import NotFusible
from superopt.search.indices import Atom, Layout, reduction_axes
from superopt.search.region import view_type
from superopt.search.schedule import Role, Schedule

_CLOSES = {
    contraction.REDUCE_SUM: tile.ACCUM_SUM,
    contraction.MATMUL: tile.ACCUM_SUM,
    contraction.REDUCE_MAX: tile.ACCUM_MAX,
    contraction.REDUCE_MIN: tile.ACCUM_MIN,
    contraction.REDUCE_PROD: tile.ACCUM_PROD,
}
_STEPS = (
    *elementwise.COMPARISONS,
    elementwise.SIGN,
    elementwise.FLOOR,
    elementwise.CEIL,
    elementwise.ROUND,
    elementwise.TRUNC,
    elementwise.FLOORDIV,
    elementwise.TRUNCDIV,
    elementwise.REMAINDER,
    elementwise.FMOD,
    elementwise.ISNAN,
    elementwise.ISINF,
    contraction.ARGMAX,
    contraction.ARGMIN,
)
_EXTREMES = (contraction.REDUCE_MAX, contraction.REDUCE_MIN)
_FEW = 16
"""How many times fewer elements than the largest tensor's cost nothing."""
_LETTERS = "ijklmnopqrstuvwxyzabcdefgh"


def block_graph(schedule: Schedule, tiles: Mapping[Atom, int], name: str) -> Graph:
    """Return the block graph of `schedule` with these tile sizes (grid and loop atoms).

    Raises:
        NotFusible: the tile sizes would merge or reduce ragged tiles.
    """
    graph = _Emitter(schedule, dict(tiles)).run(name)
    return with_bounds(graph)


def axis_names(schedule: Schedule) -> dict[Atom, str]:
    """Return the names of a schedule's axes; where there are several passes, a loop's end in their number."""
    return {a: _LETTERS[i % 26] + "_" * (i // 26) for i, a in enumerate(schedule.roles)}


def place(schedule: Schedule, graph: Graph, operands: Sequence[Node]) -> list[Node]:
    """Apply a block graph in a kernel graph: `operands` stand for the inputs of its region.

    Returns one node per region output, in its own shape.
    """
    region = schedule.region
    shaped = [
        b.reshape(operands[r], _atom_shape(schedule, i))
        for r, i in zip(schedule.reads, region.inputs, strict=True)
    ]
    results = b.apply_graph(graph, shaped)
    return [b.reshape(r, o.shape) for r, o in zip(results, region.outputs, strict=True)]


def _slots(layout: Layout) -> list[Atom | None]:
    return [a for dim in layout for a in (dim or (None,))]


def _atom_shape(schedule: Schedule, node: Node) -> tuple[int, ...]:
    slots = _slots(schedule.space.layout(node))
    return tuple(1 if a is None else schedule.space.extent(a) for a in slots)


def _atom_strides(schedule: Schedule, node: Node) -> TensorType:
    lies = view_type(node) or TensorType(node.shape, node.tensor.dtype)
    strides: list[int] = []
    layout = schedule.space.layout(node)
    for dim, stride in zip(layout, lies.element_strides, strict=True):
        extents = tuple(schedule.space.extent(a) for a in dim) or (1,)
        strides += [s * stride for s in contiguous_strides(extents)]
    return TensorType(_atom_shape(schedule, node), node.tensor.dtype, tuple(strides))


def _steps(node: Node) -> bool:
    """Say whether a rounding of an operand may change the result by a whole step."""
    to_whole = node.op is elementwise.CAST and not node.tensor.dtype.is_float
    return to_whole or node.op in _STEPS


def _behind_views(node: Node) -> Node:
    while node.op.kind is OpKind.STRUCTURAL and len(node.inputs) == 1:
        (node,) = node.inputs
    return node


def _rounded(value: Node, operand: Node) -> Node:
    """Return the wide tile of a 16-bit operand, rounded where it is not what memory holds."""
    operand, source = _behind_views(operand), _behind_views(value)
    if operand.op is elementwise.CAST and operand.tensor.dtype is DType.F32:
        (operand,) = operand.inputs
    dtype = operand.tensor.dtype
    stored = source.op is elementwise.CAST and source.inputs[0].tensor.dtype is dtype
    if stored or not dtype.is_half or source.op is leaf.CONSTANT:
        return value
    return b.cast(b.cast(value, dtype), DType.F32)


@final
@dataclass(slots=True)
class _Emitter:
    schedule: Schedule
    tiles: dict[Atom, int]
    names: dict[Atom, str] = field(default_factory=dict)
    values: dict[tuple[Node, int | None], Node] = field(default_factory=dict)
    inputs: dict[Node, Node] = field(default_factory=dict)
    elements: int = 0
    """Of the largest tensor."""
    bounds: set[Node] = field(default_factory=set)
    """What depends on a maximum or minimum."""

    def run(self, name: str) -> Graph:
        s = self.schedule
        self.elements = max(n.tensor.elements for n in (*s.region.inputs, *s.region.body))
        for node in s.region.body:
            if node.op in _EXTREMES or not self.bounds.isdisjoint(node.inputs):
                self.bounds.add(node)
        self.names = axis_names(s)
        for atom in s.roles:
            if s.roles[atom] is Role.WHOLE:
                self.tiles[atom] = s.space.extent(atom)
            self.tiles[atom] = min(self.tiles[atom], s.space.extent(atom))
        taken: set[str] = set()
        for node in s.region.inputs:
            self.inputs[node] = self._input(node, taken)
        outputs = tuple(self._store(o) for o in s.region.outputs)
        if len(set(outputs)) < len(outputs):
            raise NotFusible(
                "two results are one tile, maybe but for roundings that a kernel leaves out"
            )
        grid = tuple(Axis(self.names[a], self._count(a)) for a in s.grid)
        loops: tuple[Axis, ...] = ()
        if s.loop is not None:
            count = self._count(s.loop)
            loops = tuple(Axis(self._loop_name(p), count) for p in range(s.passes.count))
        return Graph(Level.BLOCK, name, tuple(self.inputs.values()), outputs, grid, loops)

    def _input(self, node: Node, taken: set[str]) -> Node:
        base = node
        while base.op is not leaf.INPUT and base.op.kind is OpKind.STRUCTURAL:
            base = base.inputs[0]
        name = base.attrs.name if base.op is leaf.INPUT else "t"
        unique = name
        while unique in taken:
            unique = f"{name}_{len(taken)}"
        taken.add(unique)
        type_ = _atom_strides(self.schedule, node)
        return make(leaf.INPUT, (), leaf.InputAttrs(unique, type_))

    def _count(self, atom: Atom) -> int:
        return -(-self.schedule.space.extent(atom) // self.tiles[atom])

    def _loop_name(self, number: int) -> str:
        assert self.schedule.loop is not None
        suffix = str(number) if self.schedule.passes.count > 1 else ""
        return self.names[self.schedule.loop] + suffix

    def _map(self, atom: Atom | None, number: int | None) -> tile.DimMap:
        if atom is None:
            return tile.DimMap((), 1)
        role = self.schedule.roles[atom]
        if role is Role.WHOLE:
            return tile.DimMap((), self.tiles[atom])
        name = self.names[atom]
        if role is Role.LOOP:
            assert number is not None, "a looped dim outside its loop"
            name = self._loop_name(number)
        return tile.DimMap(((name, self._count(atom)),), self.tiles[atom])

    # -- values --------------------------------------------------------------------------------

    def _layout(self, node: Node) -> Layout:
        return self.schedule.space.layout(node)

    def _value(self, node: Node, number: int | None) -> Node:
        """Return the tile of `node` as pass `number` of the loop sees it (None: outside)."""
        varies = node in self.schedule.passes.varies
        if not varies and not self._running(node, number):
            number = None
        key = (node, number)
        if key not in self.values:
            self.values[key] = self._make(node, number)
        return self.values[key]

    def _running(self, node: Node, number: int | None) -> bool:
        """Say whether pass `number` sees a running maximum in place of the final value."""
        if number is None:
            return False
        stack = [node]
        while stack:
            current = stack.pop()
            if current in self.schedule.passes.shifts:
                if self.schedule.passes.number[current] == number:
                    return True
                continue
            if current in self.inputs or current in self.schedule.passes.varies:
                continue
            if self.schedule.loop not in self.schedule.space.reduced_by(current):
                stack += current.inputs
        return False

    def _make(self, node: Node, number: int | None) -> Node:
        s = self.schedule
        if node in self.inputs:
            slots = _slots(self._layout(node))
            maps = tuple(self._map(a, number) for a in slots)
            loaded = make(tile.LOAD, (self.inputs[node],), tile.LoadAttrs(maps))
            return b.cast(loaded, node.tensor.dtype.wide)
        if s.loop is not None and s.loop in s.space.reduced_by(node):
            operand_varies = any(i in s.passes.varies for i in node.inputs)
            if operand_varies:
                return self._close(node, number)
        return self._apply(node, [self._value(i, number) for i in node.inputs], number)

    def _close(self, node: Node, number: int | None) -> Node:
        """Accumulate a reduction over the loop; `number` asks for a running maximum."""
        s = self.schedule
        own = s.passes.number[node]
        loop = self._loop_name(own)
        part = self._apply(node, [self._value(i, own) for i in node.inputs], own)
        if node in s.passes.shifts:
            running = b.accumulate(tile.PREFIX_MAX, part, loop)
            if number == own:
                return b.finite_or_zero(running)
            return b.accumulate(tile.ACCUM_LAST, running, loop)
        for shift, found in s.passes.shifts.items():
            if node in found.rescale:
                return self._rescaled(node, part, shift, found)
        if node.op not in _CLOSES:
            raise NotFusible(f"{node.op.name} has no accumulator")
        return b.accumulate(_CLOSES[node.op], part, loop)

    def _rescaled(self, node: Node, part: Node, shift: Node, found: Homogeneity) -> Node:
        number = self.schedule.passes.number[shift]
        if self.schedule.passes.number[node] != number:
            return b.accumulate(
                tile.ACCUM_SUM, part, self._loop_name(self.schedule.passes.number[node])
            )
        loop = self._loop_name(number)
        running = self._value(shift, number).inputs[1]
        top = self._conform(running.inputs[0], self._layout(shift), self._layout(node))
        prefix = b.accumulate(tile.PREFIX_MAX, top, loop)
        total = b.accum_rescaled(part, prefix, loop, found.rescale[node])
        if node not in found.lost:
            return total
        last = b.accumulate(tile.ACCUM_LAST, prefix, loop)
        dtype = total.tensor.dtype
        return b.where(
            b.gt(last, b.constant(-inf, top.tensor.dtype)), total, b.constant(nan, dtype)
        )

    def _conform(self, value: Node, have: Layout, want: Layout) -> Node:
        """Reorder the tile dims of `value` to those of another layout, 1 where it has no atom."""
        source = _slots(have)
        target = _slots(want)
        present = [a for a in source if a is not None and value.shape[source.index(a)] != 1]
        if any(a not in target for a in present):
            raise NotFusible("the running maximum has an index that the accumulator lacks")
        order = [a for a in target if a in present]
        shape = [value.shape[source.index(a)] if a in order else 1 for a in target]
        if order == present and tuple(shape) == value.shape:
            return value
        flat = b.reshape(value, [value.shape[source.index(a)] for a in present])
        flat = b.permute(flat, [present.index(a) for a in order]) if order else flat
        return b.reshape(flat, shape)

    # -- ops on tiles --------------------------------------------------------------------------

    def _apply(self, node: Node, operands: list[Node], number: int | None) -> Node:
        op = node.op
        layout = self._layout(node)
        if op is leaf.CONSTANT:
            return b.constant(node.attrs.value, node.attrs.dtype.wide)
        if op is leaf.IOTA:
            return self._iota(node, number)
        layouts = [self._layout(i) for i in node.inputs]
        if op is contraction.MATMUL or _steps(node):
            operands = [_rounded(v, i) for v, i in zip(operands, node.inputs, strict=True)]
        if op.kind is OpKind.ELEMENTWISE:
            aligned = [
                self._align(v, have, layout) for v, have in zip(operands, layouts, strict=True)
            ]
            if op is elementwise.CAST:
                value = b.cast(aligned[0], node.attrs.dtype.wide)
            else:
                value = make(op, aligned, node.attrs)
            asked = op is elementwise.CAST and node.attrs.rounds
            if asked or self._rounds_small(node):
                value = b.cast(b.cast(value, node.tensor.dtype, rounds=True), DType.F32)
            return value
        if op is contraction.MATMUL:
            return self._matmul(operands, layouts, layout)
        if op.kind is OpKind.REDUCTION:
            return self._reduce(node, operands[0], layouts[0], layout)
        return self._structural(node, operands, layouts, layout)

    def _rounds_small(self, node: Node) -> bool:
        """Say whether a result of 16 bits costs nothing to round, as programs do: differences of means show it.

        What comes of a maximum stays: numbers that were not rounded must not exceed it.
        """
        small = node.tensor.elements * _FEW <= self.elements
        return small and node.tensor.dtype.is_half and node not in self.bounds

    def _align(self, value: Node, have: Layout, want: Layout) -> Node:
        if not value.shape and not have:
            return value
        shape: list[int] = []
        position = 0
        for mine, theirs in zip(have, want, strict=True):
            width = max(1, len(mine))
            sizes = value.shape[position : position + width]
            position += width
            shape += sizes if len(mine) == len(theirs) or mine else (1,) * max(1, len(theirs))
        return b.reshape(value, shape)

    def _materialize(self, value: Node, layout: Layout, atoms: set[Atom]) -> Node:
        """Give the tile its full size along `atoms`."""
        shape = [
            self.tiles[a] if a in atoms and a is not None else n
            for a, n in zip(_slots(layout), value.shape, strict=True)
        ]
        if tuple(shape) == value.shape:
            return value
        if any(self._ragged(a) for a in atoms):
            raise NotFusible("a broadcast dim with a ragged tile is reduced")
        return b.broadcast(value, shape)

    def _ragged(self, atom: Atom | None) -> bool:
        return atom is not None and self.schedule.space.extent(atom) % self.tiles[atom] != 0

    def _merge(self, value: Node, groups: Sequence[Sequence[Atom | None]]) -> Node:
        """Merge runs of tile dims into one dim each."""
        shape = []
        position = 0
        for group in groups:
            sizes = value.shape[position : position + len(group)]
            position += len(group)
            if not self._mergeable(sizes, group):
                raise NotFusible("ragged tiles are merged")
            shape.append(prod(sizes))
        return b.reshape(value, shape)

    def _mergeable(self, sizes: Sequence[int], group: Sequence[Atom | None]) -> bool:
        return sum(n > 1 for n in sizes) < 2 or not any(self._ragged(a) for a in group)

    def _matmul(self, operands: list[Node], layouts: list[Layout], layout: Layout) -> Node:
        rank = len(layout)
        batch = layout[: rank - 2]
        a = self._align(operands[0], layouts[0], (*batch, *layouts[0][-2:]))
        c = self._align(operands[1], layouts[1], (*batch, *layouts[1][-2:]))
        inner = {*layouts[0][-1]}
        a = self._materialize(a, (*batch, *layouts[0][-2:]), inner)
        c = self._materialize(c, (*batch, *layouts[1][-2:]), inner)
        slots: list[tuple[Atom | None, ...]] = [(s,) for s in _slots(batch)]
        rows, columns = layouts[0][-2] or (None,), layouts[1][-1] or (None,)
        contracted = layouts[0][-1] or (None,)
        full = (*_slots(batch), *rows, *columns)
        if not self._mergeable(a.shape[len(slots) : len(slots) + len(rows)], rows):
            # one product for each of the outer rows
            outer, rows = [(r,) for r in rows[:-1]], rows[-1:]
            at = len(slots)
            c = b.reshape(c, (*c.shape[:at], *(1 for _ in outer), *c.shape[at:]))
            slots += outer
        a = self._merge(a, [*slots, rows, contracted])
        c = self._merge(c, [*slots, contracted, columns])
        count = len(slots)
        folded = 0
        while folded < count and c.shape[count - 1 - folded] == 1:
            folded += 1
        extra = slots[: count - folded]
        row_sizes = a.shape[count - folded : count + 1]
        inner_slots = [s for (s,) in slots[count - folded :]]
        if prod(row_sizes[:-1]) > 1 and self._mergeable(row_sizes, [*inner_slots, *rows]):
            # batch dims that only one operand has are further rows of one product
            a = self._merge(a, [*extra, (*inner_slots, None), (None,)])
            c = self._merge(c, [*extra, (*inner_slots, None), (None,)])
            product = b.matmul(a, c)
            shape = (*product.shape[: count - folded], *row_sizes, product.shape[-1])
            product = b.reshape(product, shape)
        else:
            product = b.matmul(a, c)
        sizes = product.shape[:count]
        row_tiles = [1 if r is None else self.tiles[r] for r in rows]
        column_tiles = [1 if r is None else self.tiles[r] for r in columns]
        if prod(row_tiles) != product.shape[count]:
            row_tiles = self._present(operands[0], rows, layouts[0])
        if prod(column_tiles) != product.shape[-1]:
            column_tiles = self._present(operands[1], layouts[1][-1], layouts[1])
        assert len(full) == len(sizes) + len(row_tiles) + len(column_tiles)
        return b.reshape(product, (*sizes, *row_tiles, *column_tiles))

    def _present(self, value: Node, dim: Sequence[Atom | None], layout: Layout) -> list[int]:
        slots = _slots(layout)
        return [value.shape[slots.index(a)] for a in dim] or [1]

    def _reduce(self, node: Node, value: Node, have: Layout, want: Layout) -> Node:
        rank = len(have)
        axes = {rank + axis for axis in reduction_axes(node)}
        value = self._materialize(value, have, {a for axis in axes for a in have[axis]})
        positions: list[int] = []
        position = 0
        for i, dim in enumerate(have):
            width = max(1, len(dim))
            if i in axes:
                positions += range(position, position + width)
            position += width
        total = len(value.shape)
        if node.op in (contraction.ARGMAX, contraction.ARGMIN):
            result = make(node.op, (value,), contraction.AxisAttrs(positions[0] - total))
        else:
            result = b.reduce(node.op, value, [p - total for p in positions])
        kept = [n for i, n in enumerate(result.shape) if i not in positions]
        shape: list[int] = []
        for i, dim in enumerate(have):
            shape += [1] if i in axes else [kept.pop(0) for _ in range(max(1, len(dim)))]
        return b.reshape(result, shape)

    def _iota(self, node: Node, number: int | None) -> Node:
        layout = self._layout(node)
        dtype = node.attrs.dtype
        slots = _slots(layout)
        total: Node = b.constant(0, dtype)
        stride = 1
        for atom in reversed(layout[node.attrs.axis]):
            extent = self.schedule.space.extent(atom)
            attrs = tile.TileIndexAttrs(self._map(atom, number), extent, dtype)
            index = make(tile.TILE_INDEX, (), attrs)
            index = b.reshape(index, [self.tiles[atom] if a == atom else 1 for a in slots])
            if stride != 1:
                index = b.mul(index, stride)
            total = index if total.op is leaf.CONSTANT else b.add(total, index)
            stride *= extent
        return b.reshape(total, (1,) * len(slots)) if total.op is leaf.CONSTANT else total

    def _structural(
        self, node: Node, operands: list[Node], layouts: list[Layout], layout: Layout
    ) -> Node:
        op = node.op
        value, have = operands[0], layouts[0]
        if op is structural.PERMUTE:
            starts = []
            position = 0
            for dim in have:
                starts.append(range(position, position + max(1, len(dim))))
                position += max(1, len(dim))
            return b.permute(value, [p for i in node.attrs.perm for p in starts[i]])
        if op is structural.RESHAPE:
            sizes = [n for a, n in zip(_slots(have), value.shape, strict=True) if a is not None]
            return b.reshape(value, [1 if a is None else sizes.pop(0) for a in _slots(layout)])
        if op is structural.BROADCAST:
            return self._align(value, have, layout)
        axes = getattr(node.attrs, "axes", None) or (node.attrs.axis,)
        touched = [len(layout) + a for a in axes]
        if any(len(x[t]) > 1 for x in (*layouts, layout) for t in touched):
            raise NotFusible("a merged dim is cut, joined or scanned")
        ready = [
            self._materialize(v, h, {a for t in touched for a in h[t]})
            for v, h in zip(operands, layouts, strict=True)
        ]
        slot = [sum(max(1, len(d)) for d in layout[:t]) for t in touched]
        rank = len(_slots(layout))
        if op is structural.CONCAT:
            return b.concat(self._same_but(ready, slot[0]), slot[0] - rank)
        if op is structural.GATHER:
            data, index = self._same_but(ready, slot[0])
            return b.gather(data, index, slot[0] - rank)
        if op is structural.FLIP:
            return b.flip(ready[0], [p - rank for p in slot])
        if op is structural.SLICE:
            a = node.attrs
            return b.slice_(ready[0], slot[0] - rank, a.start, a.stop, a.step)
        if op is structural.PAD:
            a = node.attrs
            return b.pad(ready[0], slot[0] - rank, a.before, a.after, a.value)
        if op is contraction.SCAN:
            return b.scan(ready[0], slot[0] - rank, node.attrs.kind)
        raise NotFusible(f"{op.name} runs as a kernel of its own")

    def _same_but(self, parts: list[Node], slot: int) -> list[Node]:
        """Give tiles equal sizes in all dims but one."""
        shape = [max(sizes) for sizes in zip(*(p.shape for p in parts), strict=True)]
        return [
            b.broadcast(p, [n if i != slot else p.shape[i] for i, n in enumerate(shape)])
            for p in parts
        ]

    def _store(self, node: Node) -> Node:
        s = self.schedule
        number = s.passes.number[node] if node in s.passes.varies else None
        value = self._value(node, number)
        if value.op is elementwise.CAST and value.inputs[0].tensor.dtype is node.tensor.dtype:
            value = value.inputs[0]
        elif node.tensor.dtype is DType.F32:
            # a number of 16 bits that was widened is one for all who read it: what compares rounds it
            value = _rounded(value, node)
        slots = _slots(self._layout(node))
        shape = tuple(1 if a is None else self.tiles[a] for a in slots)
        value = b.cast(b.broadcast(value, shape), node.tensor.dtype)
        maps = tuple(self._map(a, number) for a in slots)
        return make(tile.STORE, (value,), tile.StoreAttrs(maps, _atom_shape(s, node)))
