"""Block graphs to C++: one function per kernel, blocks over OpenMP threads, tiles in scratch.

In: a block graph and a `CpuConfig`. Out: `Source`: the text of a translation unit, the symbol to call
and its arguments (inputs, then outputs, as plain pointers).

A kernel is a loop over the grid around `block`, which is written twice where tiles are ragged along
the grid: FULL knows that all of its tiles are whole. The same is done inside loops. Meaning:
`superopt.ir.semantics`; positions past an extent are simply never computed.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from math import prod
from typing import Literal, final

from superopt.codegen.cpu.bands import hidden
from superopt.codegen.cpu.config import CpuConfig, widens
from superopt.codegen.cpu.context import Context, Extent, View, element_type
from superopt.codegen.cpu.contraction import Product, merged_runs, splits
from superopt.codegen.cpu.divide import shared_divisions
from superopt.codegen.cpu.environment import Environment
from superopt.codegen.cpu.expressions import LOWER, literal
from superopt.codegen.cpu.fused import FusedLoop
from superopt.codegen.cpu.inline import ROUGH, Plan, Seen, rough_functions
from superopt.codegen.cpu.members import Member, MemberKind, carried, combine_kind, identity
from superopt.codegen.cpu.pairwise import pairwise
from superopt.codegen.cpu.scales import scales_behind_maxima
from superopt.codegen.cpu.sharing import is_kept, left_to_others, only_right_of, shared_over
from superopt.codegen.cpu.shifts import FAR, Shifts, find_shifts
from superopt.codegen.cpu.transposed import rows_of
from superopt.codegen.errors import CodegenError
from superopt.codegen.tile_program import Compute, Item, Loop, TileProgram, tile_program
from superopt.ir.coordinates import identity_coords
from superopt.ir.graph import Graph
from superopt.ir.homogeneity import may_lag
from superopt.ir.node import Node, rebuild, rewrite, topological
from superopt.ir.ops import contraction, elementwise, structural, tile
from superopt.ir.ops.registry import OpKind
from superopt.ir.threads import inline_threads
from superopt.ir.tiles import DimSource, is_accumulator, varying_axes
from superopt.ir.types import DType, contiguous_strides

_SCRATCH_LIMIT_BYTES = 64 << 20
_LARGE_OUTPUT_BYTES = 1 << 20
_WRITE_AHEAD_BYTES = 2048


@final
@dataclass(frozen=True, slots=True)
class Source:
    """C++ text of one kernel: `symbol(inputs…, outputs…)` with `pointers` arguments."""

    text: str
    symbol: str
    pointers: int


def lower(graph: Graph, config: CpuConfig, name: str) -> Source:
    """Lower a block graph.

    Raises:
        CodegenError: an op or a combination of loops has no C++ form here; the caller keeps the
            library's kernel.
    """
    inlined = inline_threads(graph)
    block = inlined if config.pairs else unrounded(inlined)
    functions = [n for n in block.nodes() if n.op in ROUGH]
    scaled = scales_behind_maxima((*block.outputs, *functions))
    results = len(block.outputs)
    nodes = list(topological(scaled[:results]))
    rough = rough_functions(block)
    images = zip(functions, scaled[results:], strict=True)
    shifts = find_shifts(nodes, {image for n, image in images if n in rough})
    maxima = [n for n in nodes if n.op in (tile.PREFIX_MAX, contraction.REDUCE_MAX)]
    roots = iter(shared_divisions((*scaled, *maxima, *shifts.told.values())))
    program = tile_program(block.with_outputs(tuple(islice(roots, results))))
    is_rough = _alone(dict.fromkeys(functions, False) | dict.fromkeys(rough, True), roots)
    image = dict(zip((*maxima, *shifts.told.values()), roots, strict=True))
    loose, told = (
        _alone({n: n in chosen for n in maxima}, map(image.__getitem__, maxima))
        for chosen in (shifts.loose, shifts.told)
    )
    tells = {image[n]: image[total] for n, total in shifts.told.items() if image[n] in told}
    bits = 11 if any(n.tensor.dtype is DType.F16 for n in nodes) else 8
    seen = Seen(is_rough, bits, Shifts(loose, tells))
    for node in program.graph.nodes():
        if node.op in LOWER.unsupported:
            raise CodegenError(f"{node.op.name}: {LOWER.unsupported[node.op]}")
        if node.tensor.dtype.is_complex:
            raise CodegenError("complex tiles have no C++ form")
    return _Kernel(program, config, name, seen).source()


def _alone(chosen: Mapping[Node, bool], images: Iterator[Node]) -> frozenset[Node]:
    """Return what nodes that were chosen have become, unless others have become the same."""
    found = dict(zip(chosen, images, strict=False))
    others = {image for node, image in found.items() if not chosen[node]}
    return frozenset(found.values()) - others


@final
class _Kernel:
    def __init__(self, program: TileProgram, config: CpuConfig, name: str, seen: Seen) -> None:
        self.graph = graph = program.graph
        self.name = name
        self.context = Context(program, config)
        self.plan = Plan(program, config.pairs, seen)
        self.fused = FusedLoop(self.context, self.plan)
        self.inputs = {n: f"in{i}_{_word(n.attrs.name)}" for i, n in enumerate(graph.inputs)}
        self.outputs = [f"out{i}" for i in range(len(graph.outputs))]
        self.factors: dict[Node, dict[float, View]] = {}
        self.lags: dict[Node, float] = {}
        self.peaks: dict[Node, View] = {}
        self.in_loops: list[str] = []
        self.aliases: set[Node] = set()
        self.operands: dict[Node, list[Node]] = {}
        self.kept: dict[tuple[Node, ...], tuple[str, dict[Node, View]]] = {}

    def source(self) -> Source:
        self._find_ragged()
        self._states()
        context = self.context
        self._declare_extents(())
        self._items(context.program.items)
        self._drop_dead_stores()
        if context.scratch_bytes > _SCRATCH_LIMIT_BYTES:
            size = context.scratch_bytes >> 20
            raise CodegenError(f"the tiles of {self.name} take {size} MiB per thread")
        text = self._text()
        return Source(text, "superopt_kernel", len(self.inputs) + len(self.outputs))

    def _drop_dead_stores(self) -> None:
        """Leave out stores to scratch that nobody reads: values that one pass over rows makes and uses."""
        read: set[str] = set()
        stores = [re.match(r" *store\w*\((\w+) ", line) for line in self.context.lines]
        for line, store in zip(self.context.lines, stores, strict=True):
            read.update(re.findall(r"\w+", line[store.end() if store else 0 :]))
        names = {d.partition("const ")[2].partition(" ")[0]: d for d in self.context.declarations}
        dead = names.keys() - read
        self.context.declarations[:] = [d for name, d in names.items() if name not in dead]
        kept = zip(self.context.lines, stores, strict=True)
        self.context.lines[:] = [line for line, s in kept if s is None or s[1] not in dead]

    # -- the frame -----------------------------------------------------------------------------

    def _text(self) -> str:
        graph, context = self.graph, self.context
        parameters = ["char* const memory"]
        for node, name in self.inputs.items():
            parameters.append(f"const {element_type(node.tensor.dtype)}* const {name}")
        for node, name in zip(graph.outputs, self.outputs, strict=True):
            parameters.append(f"{element_type(node.tensor.dtype)}* const {name}")
        parameters += [f"const long {context.axis_text(a.name)}" for a in graph.grid]
        lines = [
            f"// {self.name}: generated from the block graph {graph.digest()[:16]}",
            *(f"//   {line}" for line in str(graph).splitlines()),
            *(["#define SO_DENORMALS"] if context.config.denormals else []),
            '#include "tile.h"',
            *(['#include "gemm_bf16.h"'] if context.config.pairs else []),
            "",
            "using namespace so;",
            "",
            "template <bool FULL>",
            f"SO_NOINLINE void block({', '.join(parameters)}) {{",
            *("  " + d for d in context.declarations),
            *(["  Tiles tiles;"] if context.config.pairs else []),
            *context.lines,
            *(["  finish_stores();"] if context.config.store_past else []),
            "}",
            "",
            *self._entry(),
            "",
        ]
        return "\n".join(lines)

    def _entry(self) -> list[str]:
        graph, context = self.graph, self.context
        names = [*self.inputs.values(), *self.outputs]
        types = [f"const {element_type(n.tensor.dtype)}*" for n in graph.inputs]
        types += [f"{element_type(n.tensor.dtype)}*" for n in graph.outputs]
        parameters = [
            f"{'const ' if t.startswith('const') else ''}void* a{i}" for i, t in enumerate(types)
        ]
        lines = [f"SO_KERNEL superopt_kernel({', '.join(parameters)}) {{"]
        for i, (name, type_) in enumerate(zip(names, types, strict=True)):
            lines.append(f"  {type_} const {name} = static_cast<{type_}>(a{i});")
        blocks = prod(a.count for a in graph.grid)
        schedule = "dynamic, 1" if any(a.bounds for a in graph.loops) else "static"
        if blocks > 1:
            lines.append("#pragma omp parallel")
        lines += ["  {", f"    char* const memory = scratch({max(context.scratch_bytes, 64)});"]
        for offset, count in context.remembered:
            made = f"reinterpret_cast<int64_t*>(memory + {offset})"
            lines.append(f"    fill<int64_t>({made}, {count}L, -1);")
        if blocks > 1:
            lines.append(f"#pragma omp for schedule({schedule}) nowait")
        head = f"long block_index = 0; block_index < {blocks}L; ++block_index"
        if self._grows():
            head = f"long block_index = {blocks - 1}L; block_index >= 0; --block_index"
        lines += [f"    for ({head}) {{"]
        divisor = 1
        for axis in reversed(graph.grid):
            position = f"block_index / {divisor}" if divisor > 1 else "block_index"
            index = context.axis_text(axis.name)
            lines.append(f"      const long {index} = {position} % {axis.count};")
            divisor *= axis.count
        arguments = ", ".join(["memory", *names, *(context.axis_text(a.name) for a in graph.grid)])
        ragged = [s for s in context.ragged if not self._loops_in(s)]
        if ragged:
            whole = " && ".join(
                f"{context.offset_text(s.map)} + {s.map.tile} <= {s.extent}" for s in ragged
            )
            lines.append(f"      if ({whole}) block<true>({arguments});")
            lines.append(f"      else block<false>({arguments});")
        else:
            lines.append(f"      block<true>({arguments});")
        return [*lines, "    }", "  }", "}"]

    def _grows(self) -> bool:
        """Say whether later blocks have longer loops: they come first, so that cores end together."""
        grid = {a.name for a in self.graph.grid}
        bounds = [bound for axis in self.graph.loops for bound in axis.bounds]
        return sum(c for bound in bounds for name, c in bound.terms if name in grid) > 0

    # -- ragged dims ---------------------------------------------------------------------------

    def _find_ragged(self) -> None:
        found: dict[DimSource, None] = {}
        for node in self.graph.nodes():
            for source in self.context.program.sources[node]:
                if source is not None and source.ragged:
                    found.setdefault(source)
            if node.op is tile.STORE:
                for dim, extent in zip(node.attrs.dims, node.attrs.shape, strict=True):
                    if dim.padded > extent:
                        found.setdefault(DimSource(dim, extent))
        if any(source.map.tile == 1 for source in found):
            # a dim of size 1 is one element everywhere below, never none
            raise CodegenError("tiles of one element that lie outside their tensor")
        for i, source in enumerate(found):
            self.context.ragged[source] = f"n{i}"

    def _loops_in(self, source: DimSource) -> set[str]:
        loops = {a.name for a in self.graph.loops}
        return {n for n, _ in source.map.axes} & loops

    def _declare_extents(self, opened: tuple[str, ...]) -> list[DimSource]:
        """Declare the extents of dims whose last axis has just been opened."""
        declared = []
        for source, name in self.context.ragged.items():
            loops = self._loops_in(source)
            if loops <= set(opened) and (not opened or opened[-1] in loops):
                rest = f"{source.extent} - ({self.context.offset_text(source.map)})"
                text = f"max_of(0, min_of({source.map.tile}, {rest}))"
                if not loops:
                    text = f"FULL ? {source.map.tile} : {text}"
                self.context.write(f"const long {name} = {text};")
                declared.append(source)
        return declared

    # -- states of loops -----------------------------------------------------------------------

    def _states(self) -> None:
        for node in self.graph.nodes():
            if node.op is tile.ACCUM_RESCALED:
                shift = node.inputs[1]
                if shift.op is not tile.PREFIX_MAX or shift.attrs.loop != node.attrs.loop:
                    raise CodegenError("accum_rescaled needs the prefix_max of its own loop")
                self.factors.setdefault(shift, {})
                if node.attrs.power not in self.factors[shift]:
                    view = self.context.allocate(shift.shape, shift.tensor.dtype, "factor")
                    self.factors[shift][node.attrs.power] = view
        for shift in self.factors:
            far = (FAR,) if shift in self.plan.seen.shifts.told else ()
            self.lags[shift] = may_lag(shift, self.graph.nodes(), *far)
            if self.lags[shift] and shift not in self.plan.seen.shifts.loose:
                self.peaks[shift] = self.context.allocate(shift.shape, shift.tensor.dtype, "peak")

    def _view(self, node: Node, stem: str, *, dense: bool = False) -> View:
        view = self.context.views.get(node)
        if view is None:
            half = node in self.plan.halves
            view = self.context.allocate(
                node.shape, node.tensor.dtype, stem, dense=dense, half=half
            )
            self.context.views[node] = view
        return view

    # -- items ---------------------------------------------------------------------------------

    def _items(self, items: Sequence[Item]) -> None:
        # loads only name addresses: first, so that they do not part what can be fused
        loads = [i for i in items if isinstance(i, Compute) and i.node.op is tile.LOAD]
        for load in loads:
            self._load(load.node)
        straight: list[Node] = []
        for item in items:
            if isinstance(item, Loop):
                self._straight(straight)
                straight = []
                self._loop(item)
            elif item.node.op is not tile.LOAD:
                straight.append(item.node)
        self._straight(straight)

    def _straight(self, nodes: list[Node]) -> None:
        """Compute values between two loops, products as late as they can be: more is fused."""
        later: set[Node] = set()
        for node in nodes:
            if self.context.config.pairs and node.op is contraction.MATMUL:
                operand = only_right_of(self.plan, node, nodes)
                self.operands[node] = [n for n in operand if n not in later]
                later.update(operand)
        nodes = [n for n in nodes if n not in later]
        left = dict.fromkeys(nodes)
        for group in left_to_others(self.plan, nodes):
            self._once(group)
            for node in group:
                del left[node]
        while left:
            ready = [n for n in left if not any(i in left for i in self._needs(n))]
            chosen = [n for n in ready if not self._is_product(n)] or ready[:1]
            for node in chosen:
                del left[node]
                self._compute(node)
        self.fused.flush()

    def _needs(self, node: Node) -> Iterator[Node]:
        yield from node.inputs
        for operand in self.operands.get(node, ()):
            yield from operand.inputs

    def _once(self, group: list[Node]) -> None:
        """Compute values that the blocks after this one find, where they need them too."""
        context = self.context
        place = shared_over(self.graph, varying_axes(self.graph)[group[0]])
        assert place is not None
        slot, block = map(context.position, place)
        count = prod(a.count for a in place[0])
        if tuple(group) not in self.kept:
            views = {}
            for node in (n for n in group if is_kept(n, count)):
                shape, half = (count, node.tensor.elements), node in self.plan.halves
                room = context.allocate(shape, node.tensor.dtype, "kept", half=half)
                pointer = f"({room.pointer} + ({slot}) * {room.strides[0]}L)"
                strides = contiguous_strides(node.shape)
                views[node] = replace(room, pointer=pointer, strides=strides)
            self.kept[tuple(group)] = context.remember(count), views
        made, views = self.kept[tuple(group)]
        context.views.update(views)
        with context.block(f"if ({made}[{slot}] != {block})"):
            context.write(f"{made}[{slot}] = {block};")
            for node in group:
                self._compute(node)
            self.fused.flush()

    def _product(self, node: Node, target: View, *, accumulate: bool) -> None:
        """Write a product, and before it or where it needs it what nothing else needs."""
        self.fused.flush()
        before, self.context.lines = self.context.lines, []
        for operand in self.operands.pop(node, ()):
            self._compute(operand)
        self.fused.flush()
        right, self.context.lines = self.context.lines, before
        Product(self.context, self.plan, node, target, accumulate, right).emit()

    def _is_product(self, node: Node) -> bool:
        if node.op is contraction.MATMUL:
            return node not in self.plan.merged
        return is_accumulator(node) and node.inputs[0] in self.plan.merged

    def _loop(self, loop: Loop) -> None:
        context = self.context
        for state in loop.states:
            self._start(state)
        index = context.axis_text(loop.axis.name)
        head = f"for (long {index} = 0; {index} < {loop.axis.count}; ++{index})"
        self.in_loops.append(loop.axis.name)
        kept = dict(context.views)
        with context.block(head):
            for bound in loop.axis.bounds:
                terms = " + ".join(f"{c}L * {context.axis_text(n)}" for n, c in bound.terms)
                context.write(f"if (!({terms} + {bound.constant}L >= 0)) continue;")
            if (nothing := hidden(context, loop.states)) is not None:
                context.write(f"if ({nothing}) continue;")
            declared = self._declare_extents(tuple(self.in_loops))
            if declared:
                whole = " && ".join(f"{context.ragged[s]} == {s.map.tile}" for s in declared)
                with context.block(f"if (FULL && {whole})"):
                    context.full_sources |= set(declared)
                    self._items(loop.body)
                    context.full_sources -= set(declared)
                inside = set(context.views) - set(kept)
                for node in inside:
                    if node.op is tile.LOAD or node in self.aliases:
                        del context.views[node]
                with context.block("else"):
                    self._items(loop.body)
            else:
                self._items(loop.body)
        self.in_loops.pop()
        # values of the loop's body are computed anew should another loop want them
        for node in [n for n in context.views if n not in kept and n not in loop.states]:
            if loop.axis.name in context.program.loops_of[node]:
                del context.views[node]
        self._finish(loop)

    def _start(self, state: Node) -> None:
        if state.op is tile.ACCUM_LAST:
            if state.inputs[0].op is not tile.PREFIX_MAX and self._bounded(state.attrs.loop):
                raise CodegenError("accum_last of a loop with bounds is not lowered")
            self._view(state, "last")
            return
        view = self._view(state, "state")
        views = [view, self.peaks[state]] if state in self.peaks else [view]
        for started in views:
            self._fill(started, state.shape, identity(combine_kind(state), state.tensor.dtype))

    def _bounded(self, loop: str) -> bool:
        return bool(self.graph.axis(loop).bounds)

    def _fill(self, view: View, shape: tuple[int, ...], value: str) -> None:
        count = max(view.strides[0] * shape[0], 1) if shape else 1
        self.context.write(f"fill<{view.element}>({view.pointer}, {count}L, {value});")

    def _finish(self, loop: Loop) -> None:
        loose = self.plan.seen.shifts.loose
        for shift in loop.states:
            if shift in self.factors and shift not in loose:
                self._add(self._shift("settle", shift, None, self._full(shift.shape)))
        for state in loop.states:
            extents = self._full(state.shape)
            if state.op is tile.ACCUM_RESCALED:
                if state.inputs[1] not in loose:
                    self._add(self._rescale(state, extents))
            elif state.op is tile.ACCUM_LAST and state.inputs[0].op is tile.PREFIX_MAX:
                shift = state.inputs[0]
                self._add(Member("write", state, shift, self.context.views[state], extents))
        self.fused.flush()

    def _full(self, shape: tuple[int, ...]) -> tuple[Extent, ...]:
        return tuple(Extent(d, str(d), str(d)) for d in shape)

    def _add(self, member: Member) -> None:
        if not self.fused.accepts(member):
            self.fused.flush()
        self.fused.members.append(member)

    def _compute(self, node: Node) -> None:
        if node.op is tile.STORE:
            self._store(node)
        elif node in self.plan.merged or node not in self.plan.memory:
            return
        elif node.op is contraction.MATMUL:
            view = self._view(node, "product")
            self._product(node, view, accumulate=False)
            if (rows := rows_of(self.context, self.plan, node, view)) is not None:
                self.context.views[node] = rows
                self.aliases.add(node)
        elif node.op is tile.PREFIX_MAX:
            self._prefix(node)
        elif is_accumulator(node):
            self._accumulate(node)
        elif node.op is contraction.SCAN or node.op in (contraction.ARGMAX, contraction.ARGMIN):
            self._along(node)
        elif node.op.kind is OpKind.REDUCTION:
            extents = tuple(self.context.extents(node.inputs[0]))
            axes = tuple(a + len(extents) for a in node.attrs.axes)
            view = self._view(node, "total")
            pairs = pairwise(self.plan, node)
            dense = pairs.lane if pairs else None
            self._add(Member("reduce", node, node.inputs[0], view, extents, axes=axes, dense=dense))
        elif node.op in (structural.CONCAT, structural.PAD, structural.RESHAPE):
            self._copy(node)
        else:
            self._write(node)

    def _write(self, node: Node) -> None:
        extents = tuple(self.context.extents(node))
        dense = self._dense_dim(node, extents)
        if dense is not None and node not in self.context.views:
            order = [i for i in range(len(node.shape)) if i != dense] + [dense]
            shape = tuple(node.shape[i] for i in order)
            half = node in self.plan.halves
            view = self.context.allocate(shape, node.tensor.dtype, "tile", half=half)
            strides = tuple(view.strides[order.index(i)] for i in range(len(order)))
            self.context.views[node] = replace(view, strides=strides)
        view = self._view(node, "tile")
        self._add(Member("write", node, node, view, extents, dense=dense))

    def _dense_dim(self, node: Node, extents: tuple[Extent, ...]) -> int | None:
        """Return the dim along which an operand of products is to lie, where it is not the last.

        A tile that is made of transposed ones lies as they do: products take it either way, and vectors
        of it are read whole.
        """
        if not node.shape or not self.plan.only_multiplied(node):
            return None
        env = Environment(self.context, self.plan, extents, None)
        last = len(node.shape) - 1
        gains = dict.fromkeys(range(last + 1), 0)
        for found, coords in env.reads(node, identity_coords(node.shape), node):
            view = self.context.views.get(found)
            if view is None or found is node:
                continue
            for (dim, scale, _), stride in zip(coords, view.strides, strict=True):
                if dim is not None and stride * scale == 1:
                    gains[dim] += found.tensor.elements
        best = max(gains, key=lambda dim: (gains[dim], dim))
        return None if best == last else best

    def _along(self, node: Node) -> None:
        """Compute what goes from element to element of one dim: scans and places of extremes."""
        source = node.inputs[0]
        dtype = source.tensor.dtype
        if dtype is DType.BOOL:
            raise CodegenError(f"{node.op.name} of truth values is not lowered")
        extents = tuple(self.context.extents(source))
        axis = node.attrs.axis + len(extents)
        scan = node.op is contraction.SCAN
        one = tuple(1 if i == axis else d for i, d in enumerate(source.shape))
        carry = self.context.allocate(one, carried(node), "carry")
        kind: MemberKind = "scan" if scan else "place"
        view = self._view(node, "tile")
        self._add(Member(kind, node, source, view, extents, axes=(axis,), carry=carry))

    def _load(self, node: Node) -> None:
        source = node.inputs[0]
        strides = source.tensor.element_strides
        offsets = []
        for dim, stride in zip(node.attrs.dims, strides, strict=True):
            offset = self.context.offset_text(dim)
            if offset != "0" and stride:
                offsets.append(f"{offset} * {stride}L")
        name = self.context.fresh("x")
        element = element_type(node.tensor.dtype)
        start = " + ".join([self.inputs[source], *offsets])
        self.context.write(f"const {element}* const {name} = {start};")
        ahead = self._ahead(node, strides) if self.context.config.prefetch else 0
        view = View(name, element, node.tensor.dtype, strides, False, ahead)
        self.context.views[node] = rows_of(self.context, self.plan, node, view) or view

    def _ahead(self, load: Node, strides: Sequence[int]) -> int:
        """Distance to the tile of the innermost loop's next iteration, else to the next row."""
        for loop in reversed(self.in_loops):
            for dim, stride in zip(load.attrs.dims, strides, strict=True):
                names = [name for name, _ in dim.axes]
                if loop in names:
                    inner = dim.axes[names.index(loop) + 1 :]
                    step: int = stride * dim.tile * prod(count for _, count in inner)
                    return step
        shape = load.inputs[0].shape
        rows = [s for s, d in zip(strides, shape, strict=True) if s > 1 < d]
        return min(rows, default=0)

    def _store(self, node: Node) -> None:
        dims, shape = node.attrs.dims, node.attrs.shape
        strides = contiguous_strides(shape)
        number = self.graph.outputs.index(node)
        offsets = []
        extents = []
        for dim, extent, stride in zip(dims, shape, strides, strict=True):
            offset = self.context.offset_text(dim)
            if offset != "0":
                offsets.append(f"{offset} * {stride}L")
            extents.append(self.context.extent_of(DimSource(dim, extent), dim.tile))
        element = element_type(node.tensor.dtype)
        pointer = " + ".join([self.outputs[number], *offsets])
        ahead = self._written_ahead(node) if self.context.config.prefetch else 0
        view = View(f"({pointer})", element, node.tensor.dtype, strides, False, ahead)
        self._add(Member("store", node, node.inputs[0], view, tuple(extents)))

    def _written_ahead(self, store: Node) -> int:
        """Distance to fetch lines for writing, where the rows of a large output follow one another."""
        dims, shape = store.attrs.dims, store.attrs.shape
        whole = bool(shape) and dims[-1].tile >= shape[-1]
        large = store.tensor.size_bytes >= _LARGE_OUTPUT_BYTES
        return _WRITE_AHEAD_BYTES // store.tensor.dtype.size_bytes if whole and large else 0

    def _prefix(self, node: Node) -> None:
        sources = self.context.program.sources[node.inputs[0]]
        if any(s is not None and s.ragged and _runs_over(s, node.attrs.loop) for s in sources):
            raise CodegenError("prefix_max of a dim that is ragged along its own loop")
        extents = tuple(self.context.extents(node.inputs[0]))
        self._add(self._shift("prefix", node, node.inputs[0], extents))

    def _shift(
        self,
        kind: Literal["prefix", "settle"],
        node: Node,
        source: Node | None,
        extents: tuple[Extent, ...],
    ) -> Member:
        factors = tuple(self.factors.get(node, {}).items())
        peak, lag = self.peaks.get(node), self.lags.get(node, 0.0)
        view = self.context.views[node]
        return Member(kind, node, source, view, extents, factors=factors, peak=peak, lag=lag)

    def _rescale(self, node: Node, extents: tuple[Extent, ...]) -> Member:
        shift = node.inputs[1]
        factors = ((node.attrs.power, self.factors[shift][node.attrs.power]),)
        view = self.context.views[node]
        return Member("rescale", node, None, view, extents, (), factors, old_shape=shift.shape)

    def _accumulate(self, node: Node) -> None:
        if node.op is tile.ACCUM_LAST and node.inputs[0].op is tile.PREFIX_MAX:
            return
        operand = node.inputs[0]
        view = self.context.views[node]
        extents = tuple(self.context.extents(operand))
        sources = self.context.program.sources[operand]
        # what has no operand in this iteration is rescaled all the same
        whole = tuple(
            full if source is not None and _runs_over(source, node.attrs.loop) else extent
            for full, extent, source in zip(self._full(node.shape), extents, sources, strict=True)
        )
        merged = operand in self.plan.merged
        member = Member("accumulate", node, operand, view, extents)
        if node.op is tile.ACCUM_RESCALED:
            rescale = self._rescale(node, whole)
            if merged or whole != extents:
                self._add(rescale)
            else:
                member = replace(member, factors=rescale.factors, old_shape=rescale.old_shape)
        if not merged:
            self._add(member)
            return
        self._product(operand, view, accumulate=True)

    def _in_place(self, node: Node) -> bool:
        """Let a reshape be another view of what is in memory, or leave it to the products that read it."""
        runs = merged_runs(self.context, self.plan, node)
        if runs is None:
            return False
        view, dims = runs
        if all(len(parts) == 1 for parts in dims):
            if self.plan.operand_base(node.inputs[0]).op is not tile.LOAD:
                self.fused.flush()  # what is still to be written there is read through another name
            self.context.views[node] = replace(view, strides=tuple(s for ((_, s),) in dims))
            self.aliases.add(node)
            return True
        return splits(node, dims, self.plan.users[node])

    def _copy(self, node: Node) -> None:
        """Materialize an op that moves elements in a way no view can express."""
        if node.op is structural.RESHAPE and self._in_place(node):
            return
        self.fused.flush()
        view = self._view(node, "tile", dense=node.op is structural.RESHAPE)
        if node.op is structural.RESHAPE:
            source = node.inputs[0]
            strides = contiguous_strides(source.shape)
            shaped = View(view.pointer, view.element, view.dtype, strides, True)
            self._add(Member("write", node, source, shaped, self._full(source.shape)))
        else:
            axis = node.attrs.axis + len(node.shape)
            start = 0
            if node.op is structural.PAD:
                start = node.attrs.before
                self._fill(view, node.shape, literal(node.attrs.value, node.tensor.dtype))
            for part in node.inputs:
                pointer = f"({view.pointer} + {start * view.strides[axis]})"
                place = View(pointer, view.element, view.dtype, view.strides, True)
                extents = tuple(self.context.extents(part))
                self._add(Member("write", node, part, place, extents))
                self.fused.flush()
                start += part.shape[axis]
        self.fused.flush()


def unrounded(graph: Graph) -> Graph:
    """Return the block graph without the roundings of operands that products in floats do not need."""

    def step(node: Node, inputs: tuple[Node, ...]) -> Node:
        if node.op is contraction.MATMUL:
            inputs = tuple(map(_unrounded, inputs))
        return rebuild(node, inputs)

    return graph.with_outputs(rewrite(graph.outputs, step))


def _unrounded(operand: Node) -> Node:
    if operand.op in (structural.PERMUTE, structural.RESHAPE, structural.BROADCAST):
        return rebuild(operand, (_unrounded(operand.inputs[0]),))
    if widens(operand) and operand.inputs[0].op is elementwise.CAST:
        (half,) = operand.inputs
        (value,) = half.inputs
        kept = half.attrs.rounds or value.tensor.dtype is not DType.F32
        return operand if kept else value
    return operand


def _runs_over(source: DimSource, loop: str) -> bool:
    return any(name == loop for name, _ in source.map.axes)


def _word(name: str) -> str:
    return re.sub(r"\W", "_", name, flags=re.ASCII)
