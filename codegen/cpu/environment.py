"""Expressions of one place in a fused loop: where elements lie, and the text of their values.

In: nodes and coordinates in the loop nest around the place. Out: lines of C++ that define each value
once, as a scalar or as a vector along the lane dim.

Invariant: a value that does not vary along the row is computed in the row's scalars.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import final

from superopt.codegen.cpu.context import Context, Extent, View, element_type
from superopt.codegen.cpu.expressions import LOWER, literal, over_range, scalar_type, vector_type
from superopt.codegen.cpu.inline import JOINS, Plan, joined_parts
from superopt.codegen.cpu.ranges import unscaled
from superopt.codegen.errors import CodegenError
from superopt.ir.coordinates import (
    Coordinate,
    Coordinates,
    broadcast_coords,
    gathered,
    is_move,
    moved_coords,
    shifted,
)
from superopt.ir.node import Node
from superopt.ir.ops import elementwise, leaf, structural, tile
from superopt.ir.ops.registry import OpKind
from superopt.ir.types import DType

_CONTRACTED = (DType.F32, DType.F64)
_USUAL = 2.0**60
"""Factors up to which, and down to its inverse, another one can be multiplied with."""


@final
@dataclass(slots=True)
class Touched:
    """What the steps of a vector loop read and write along the lane dim."""

    pointers: set[str] = field(default_factory=set)
    """What vectors are read from."""
    gain: float = 0
    """Accesses that are cheaper in pairs of vectors less those that are dearer; -inf where one is impossible."""


@final
@dataclass(slots=True)
class Pair:
    """Two environments of one step over twice the lanes: even elements first, then the odd ones."""

    odd: bool = False
    even: list[str] = field(default_factory=list)
    """Even elements that wait for the odd ones of their store."""


@final
@dataclass(slots=True)
class Environment:
    """Expressions of one place in the text: a row (scalars) or a step of its vector loop."""

    context: Context
    plan: Plan
    extents: tuple[Extent, ...]
    lane: int | None
    lane_text: str = ""
    count: str | None = None
    vector: bool = False
    row: "Environment | None" = None
    target: Node | None = None
    lines: list[str] = field(default_factory=list)
    cache: dict[tuple[Node, Coordinates], str] = field(default_factory=dict)
    touched: Touched = field(default_factory=Touched)
    pair: Pair | None = None

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

    def address(self, view: View, coords: Coordinates) -> tuple[str, int]:
        """Return the address of an element and the distance to the next lane's, but for `_per_lane`."""
        parts = [view.pointer]
        step = 0
        for coordinate, stride in zip(coords, view.strides, strict=True):
            if self._per_lane(coordinate):
                continue
            text = self.index(coordinate)
            if stride and text != "0":
                parts.append(text if stride == 1 else f"({text}) * {stride}L")
            if coordinate[0] is not None and coordinate[0] == self.lane:
                step += stride * coordinate[1]
        return " + ".join(parts), step

    def _per_lane(self, coordinate: Coordinate) -> bool:
        """Recognize a vector of places, one per lane."""
        dim, scale, _ = coordinate
        return self.vector and dim is not None and dim == self.lane and scale == 0

    # -- values --------------------------------------------------------------------------------

    def value(self, node: Node, coords: Coordinates) -> str:
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

    def _value(self, node: Node, coords: Coordinates) -> str:
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
            return self.value(node.inputs[0], moved_coords(node, coords))
        if node.op is structural.GATHER:
            place, inside = self._place(node, coords)
            found = self.value(node.inputs[0], gathered(node, coords, place))
            if not dtype.is_float:
                return found
            # PyTorch refuses an index beyond its tensor; a kernel cannot, and lets nobody miss it
            missing = self.splat(literal(math.nan, dtype), dtype)
            if place[0] is not None and self.vector:
                return self.define(f"so::select({inside}, {found}, {missing})", dtype)
            return self.define(f"{inside} ? {found} : {missing}", dtype)
        if node.op in JOINS:
            return self._joined(node, coords)
        if node.op.kind is not OpKind.ELEMENTWISE:
            raise CodegenError(f"{node.op.name} is read before it is computed")
        rule = LOWER[node.op]
        if isinstance(rule, str):
            raise CodegenError(f"{node.op.name} has no expression: {rule}")
        operands = [self.value(i, broadcast_coords(i, coords)) for i in node.inputs]
        special = self._in_vectors(node, operands, coords) if self.vector else None
        text = special or rule(operands, node, self.vector)
        if node.op is elementwise.MUL and dtype in _CONTRACTED and self._is_added(node):
            text = f"rounded({text})"
        return self.define(text, dtype)

    def _in_vectors(self, node: Node, operands: list[str], coords: Coordinates) -> str | None:
        """Return the text of a value for which vectors have a form of their own; None for most."""
        if node in self.plan.seen.rough:
            return self._rough(node, operands[0], coords)
        if node.op is elementwise.ADD and node.tensor.dtype is DType.I64:
            fits = self.plan.fits(node)
            return None if fits else f"so::add_saturated({', '.join(operands)})"
        return over_range(operands, node, self.plan.bounds)

    def _rough(self, node: Node, operand: str, coords: Coordinates) -> str:
        """Return a function of 16 bits; a constant factor of its operand becomes one with that of its exponential."""
        suffix = "_rough8" if self.plan.seen.bits == 8 else "_rough"
        x, factor = unscaled(node.inputs[0])
        usual = 1 / _USUAL < factor < _USUAL and x.tensor.dtype is DType.F32
        if factor == 1.0 or not usual:
            return f"so::{node.op.name}{suffix}({operand})"
        base = self.value(x, broadcast_coords(x, broadcast_coords(node.inputs[0], coords)))
        number = self.splat(literal(factor / math.log(2), DType.F32), DType.F32)
        return f"so::{node.op.name}2{suffix}({base} * {number})"

    def _joined(self, node: Node, coords: Coordinates) -> str:
        """Read an element of what is put together from the part in which it lies."""
        axis = node.attrs.axis + len(coords)
        dim, scale, offset = coords[axis]
        parts = joined_parts(node)
        type_ = vector_type(node.tensor.dtype) if self.vector else scalar_type(node.tensor.dtype)
        name = self.context.fresh("v")
        first = last = self.context.fresh("p")
        along = dim is not None and dim == self.lane
        # what does not vary along the row is computed before it, whichever part it is of
        place = self if along or self.row is None else self.row
        place.lines.append(f"const long {first} = {self.index(coords[axis])};")
        if self.vector and along:
            self.touched.gain = -math.inf
            last = self.context.fresh("p")
            self.lines.append(
                f"const long {last} = {first} + ({self.count or 'VL'} - 1) * {scale}L;"
            )
        self.lines.append(f"{type_} {name};")
        for number, (part, start, end) in enumerate(parts):
            at: Coordinate = (dim, scale, shifted(offset, -start))
            if not along:
                inside = place.context.fresh("p")
                size = end - start
                text = f"max_of(0L, min_of({first} - {start}L, {size}L))"
                place.lines.append(f"const long {inside} = {text};")
                at = (None, 0, inside)
            inner = replace(self, lines=[], cache=dict(self.cache))
            if part is None:
                value = self.splat(literal(node.attrs.value, node.tensor.dtype), node.tensor.dtype)
            else:
                value = inner.value(part, (*coords[:axis], at, *coords[axis + 1 :]))
            low, high = (first, last) if scale >= 0 else (last, first)
            test = f"if ({low} >= {start}L && {high} <= {end}L) "
            if number == len(parts) - 1 and first == last:
                test = ""
            self.lines += [f"{'else ' if number else ''}{test}{{"]
            self.lines += [*("  " + line for line in inner.lines), f"  {name} = {value};", "}"]
        if first != last:
            self._lane_by_lane(node, coords, name)
        return name

    def _lane_by_lane(self, node: Node, coords: Coordinates, name: str) -> None:
        """Bring a vector together whose lanes are of several parts."""
        lane, room = self.context.fresh("l"), self.context.fresh("b")
        inner = Environment(
            self.context,
            self.plan,
            self.extents,
            self.lane,
            f"({self.lane_text} + {lane})",
            row=self.row,
        )
        value = inner.value(node, coords)
        self.lines += [
            "else {",
            f"  float {room}[VL] = {{}};",
            f"  for (long {lane} = 0; {lane} < {self.count or 'VL'}; ++{lane}) {{",
            *("    " + line for line in inner.lines),
            f"    {room}[{lane}] = {value};",
            "  }",
            f"  {name} = load<vf>({room});",
            "}",
        ]

    def _is_added(self, node: Node) -> bool:
        """Say whether a compiler could merge the product with an addition that reads it."""
        users = self.plan.users.get(node, ())
        return any(u.op in (elementwise.ADD, elementwise.SUB) or is_move(u) for u in users)

    def load(self, view: View, coords: Coordinates) -> str:
        """Return the text that loads an element, or a vector of them along the lane dim."""
        address, step = self.address(view, coords)
        if not self.vector:
            if view.element in ("so::bf16", "so::f16"):
                return f"load_scalar<float>({address})"
            return f"*({address})"
        for coordinate, stride in zip(coords, view.strides, strict=True):
            if self._per_lane(coordinate):
                self.touched.gain = -math.inf
                count = f", {self.count}" if self.count else ""
                return f"load_scattered({address}, {coordinate[2]}, {stride}L, {step}L{count})"
        self._touch(view, step)
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
        elif self.pair:
            text = f"load_half<{str(self.pair.odd).lower()}>({address})"
            if not self.pair.odd:
                self._fetch(view, address)
        else:
            text = f"load<vf>({address})"
            self._fetch(view, address)
        return f"({text} != 0.0f)" if view.dtype is DType.BOOL else text

    def _touch(self, view: View, step: int) -> None:
        """Count an access: as a pair, 16 bits need no conversion, and floats are sorted into lanes."""
        if step != 1 or not view.dtype.is_float:
            self.touched.gain = -math.inf
        else:
            self.touched.gain += 1 if view.element == "so::bf16" else -1

    def _fetch(self, view: View, address: str) -> None:
        """Fetch what is read next while a loop reads anew what the caches hold.

        The first loop over a row waits for memory, the others compute: memory works through both.
        """
        self.touched.pointers.add(view.pointer)
        if view.ahead and view.pointer in self.context.read - self.context.fetched:
            self.lines.append(f"__builtin_prefetch({address} + {view.ahead}L, 0, 2);")

    def store(self, view: View, coords: Coordinates, value: str) -> None:
        """Write an element, or a vector of them along the lane dim."""
        address, step = self.address(view, coords)
        count = f", {self.count}" if self.count else ""
        if not self.vector:
            self.lines.append(f"store({address}, {value});")
            return
        self._touch(view, step)
        if view.element == "so::bf16" and view.in_scratch:
            self.touched.gain -= 2  # an instruction of its own rounds operands of products
        if view.dtype.is_integer:
            self.lines.append(f"store_integers({address}, {value}, {step}L{count});")
            return
        if view.dtype is DType.BOOL:
            value = f"mask_value({value})"
        if step != 1:
            self.lines.append(f"store_strided({address}, {step}L, {value}{count});")
        elif self.count:
            self.lines.append(f"store_n({address}, {value}{count});")
        elif view.element == "so::bf16" and view.in_scratch and not self.pair:
            self.lines.append(f"store_operand({address}, {value});")
        elif self.pair and not self.pair.odd:
            self.pair.even.append(value)
        else:
            past = self.context.config.store_past and not view.in_scratch
            if view.ahead and not past:
                self.lines.append(f"__builtin_prefetch({address} + {view.ahead}L, 1, 3);")
            name = f"store{'_pair' if self.pair else ''}{'_past' if past else ''}"
            values = f"{self.pair.even.pop(0)}, {value}" if self.pair else value
            self.lines.append(f"{name}({address}, {values});")

    def _position(self, node: Node, coords: Coordinates) -> str:
        if node.op is leaf.IOTA:
            axis = node.attrs.axis + len(node.shape)
            base, coordinate = "0", coords[axis]
        else:
            base, coordinate = self.context.offset_text(node.attrs.dim), coords[0]
        text = f"{base} + {self.index(coordinate)}"
        if not self.vector:
            return f"static_cast<{element_type(node.tensor.dtype)}>({text})"
        self.touched.gain = -math.inf
        step = coordinate[1] if coordinate[0] == self.lane else 0
        return f"splat_integer({text}) + iota() * {step}"

    def _place(self, node: Node, coords: Coordinates) -> tuple[Coordinate, str]:
        """Compute the position along a gather's axis, once per row where the row has but one.

        Also whether it is inside; where it is not, the position is the nearest that is.
        """
        data, index = node.inputs
        extent = data.shape[node.attrs.axis]
        own = self.row is None or self.varies(index, coords)
        env = self if own or self.row is None else self.row
        wanted = env.value(index, coords)
        lanes = env.vector
        text = f"so::within{'_lanes' if lanes else ''}({wanted}, {extent}L)"
        place = env.define(text, DType.I32 if lanes else DType.I64)
        inside = env.define(f"{place} == {wanted}", DType.BOOL)
        # scale 0: the element changes with the lane, though not by its number
        return (self.lane if own else None, 0, place), inside

    def reads(
        self, node: Node, coords: Coordinates, own: Node | None
    ) -> Iterator[tuple[Node, Coordinates]]:
        """Yield what the value of `node` depends on, down to memory, except that of `own`."""
        stack = [(node, coords)]
        while stack:
            node, coords = stack.pop()
            yield node, coords
            if (node in self.context.views and node is not own) or not node.inputs:
                continue
            if is_move(node):
                stack.append((node.inputs[0], moved_coords(node, coords)))
            elif node.op is structural.GATHER:
                stack.append((node.inputs[0], gathered(node, coords, (None, 0, "place"))))
                stack.append((node.inputs[1], coords))
            elif node.op in JOINS:
                stack += [(i, gathered(node, coords, (None, 0, "place"))) for i in node.inputs]
            else:
                stack += [(i, broadcast_coords(i, coords)) for i in node.inputs]

    def varies(self, node: Node, coords: Coordinates) -> bool:
        """Say whether a value changes along the row."""
        for found, at in self.reads(node, coords, None):
            view = self.context.views.get(found)
            if view is not None:
                steps = view.strides  # a tensor repeated along a dim has stride 0 there
            elif not found.inputs or found.op in JOINS:
                steps = (1,) * len(at)
            else:
                continue
            if any(dim == self.lane and step for (dim, _, _), step in zip(at, steps, strict=True)):
                return True
        return False
