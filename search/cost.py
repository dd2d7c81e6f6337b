"""The cost model: seconds that a region takes as one kernel, or in a library.

Roofline per kernel: operations over the rate of the unit that does them, bytes over the bandwidth
of the level of memory they come from, shared between cores, plus what a block and a launch cost. It
counts what a schedule recomputes (a value that does not vary over a grid axis is computed by
every block) and orders candidates; the clock decides.
"""

from collections.abc import Mapping
from math import ceil, prod
from typing import Final, final

from superopt.ir.node import Node
from superopt.ir.ops import contraction, elementwise, leaf, structural
from superopt.ir.ops.registry import OpKind
from superopt.ir.ops.shapes import tensor
from superopt.ir.target import Target
from superopt.search.indices import Atom, IndexSpace
from superopt.search.region import VIEWS, view_base, view_type
from superopt.search.schedule import Role, Schedule

_UNHIDDEN: Final = 0.5
_SLOW: Final = {
    elementwise.EXP: 8.0,
    elementwise.LOG: 10.0,
    elementwise.TANH: 12.0,
    elementwise.SIGMOID: 14.0,
    elementwise.ERF: 12.0,
    elementwise.SIN: 16.0,
    elementwise.COS: 16.0,
    elementwise.POW: 80.0,
    elementwise.DIV: 6.0,
    elementwise.SQRT: 8.0,
}


def kernel_cost(schedule: Schedule, tiles: Mapping[Atom, int], machine: Target) -> float:
    """Return the predicted seconds of a schedule with these tile sizes."""
    return _Estimate(schedule, tiles, machine).seconds()


def library_cost(node: Node, machine: Target) -> float:
    """Return the predicted seconds of one op as a library kernel."""
    moved = sum(tensor(i.type).size_bytes for i in node.inputs) + node.tensor.size_bytes
    flops = node.op.flops(tuple(i.type for i in node.inputs), node.type) if node.op.flops else 0
    rate = machine.peak_flops * machine.library_efficiency
    if node.op.kind not in (OpKind.CONTRACTION, OpKind.LIBRARY):
        rate = machine.vector_ops * machine.cores
    busy, waiting = flops / rate, moved / machine.memory_bandwidth
    return machine.library_call_s + max(busy, waiting) + _UNHIDDEN * min(busy, waiting)


@final
class _Estimate:
    def __init__(self, schedule: Schedule, tiles: Mapping[Atom, int], machine: Target) -> None:
        self.schedule = schedule
        self.space: IndexSpace = schedule.space
        self.machine = machine
        self.tile = {
            a: self.space.extent(a) if r is Role.WHOLE else min(tiles[a], self.space.extent(a))
            for a, r in schedule.roles.items()
        }
        self.blocks = prod(self._count(a) for a in schedule.grid)
        self.trips = 1 if schedule.loop is None else self._count(schedule.loop)
        self.present: dict[Node, frozenset[Atom]] = {}
        for node in schedule.region.inputs:
            self.present[node] = frozenset(self.space.atoms(node))
        for node in schedule.region.body:
            self.present[node] = self._present(node)

    def _count(self, atom: Atom) -> int:
        return ceil(self.space.extent(atom) / self.tile[atom])

    def _present(self, node: Node) -> frozenset[Atom]:
        if node.op is leaf.IOTA:
            return frozenset(self.space.layout(node)[node.attrs.axis])
        found = frozenset[Atom]().union(*(self.present[i] for i in node.inputs))
        present = found & set(self.space.atoms(node))
        if node.op in (structural.SLICE, structural.PAD, structural.CONCAT):
            return present | set(self.space.layout(node)[node.attrs.axis])
        return present

    def _elements(self, atoms: frozenset[Atom]) -> int:
        return prod(self.tile[a] for a in atoms)

    def _runs(self) -> dict[Node, int]:
        """How often a block computes each node: iterations times the passes that need it."""
        passes = self.schedule.passes
        runs: dict[Node, int] = {}
        for number in range(max(1, passes.count)):
            needed: set[Node] = set()
            for node in reversed(self.schedule.region.body):
                closes = node not in passes.varies and any(i in passes.varies for i in node.inputs)
                wanted = closes and max(passes.number[node], 0) == number
                stored = node in self.schedule.region.outputs and passes.number[node] == number
                if node in needed or wanted or (stored and node in passes.varies):
                    needed.update(i for i in node.inputs if i in passes.varies)
                    if node in passes.varies:
                        needed.add(node)
            for node in needed:
                runs[node] = runs.get(node, 0) + self.trips
        return runs

    def seconds(self) -> float:
        machine = self.machine
        runs = self._runs()
        compute = 0.0
        cached = 0.0
        closing = self.trips if self.schedule.loop is not None else 1
        for node in self.schedule.region.body:
            times = runs.get(node, 1)
            if any(i in self.schedule.passes.varies for i in node.inputs):
                times = max(times, closing)
            compute += times * self._work(node)
            cached += times * self._spill(node)
        waves = ceil(self.blocks / machine.cores) * machine.cores
        moved, touched = self._traffic(runs)
        compute_s = compute * waves / machine.cores
        cache_s = (touched + cached * self.blocks) / machine.cache_bandwidth / machine.cores
        memory_s = moved / machine.memory_bandwidth
        if self.blocks < machine.cores:
            memory_s *= machine.cores / self.blocks * 0.7
            cache_s *= machine.cores / self.blocks
        steps = self.blocks * self.trips * max(1, self.schedule.passes.count)
        overhead = machine.launch_s + steps * machine.block_s / machine.cores
        # prefetching hides part of the traffic behind arithmetic, or of the arithmetic behind traffic
        busy, waiting = compute_s + cache_s, memory_s
        return overhead + max(busy, waiting) + _UNHIDDEN * min(busy, waiting)

    def _work(self, node: Node) -> float:
        """Seconds on one core for one execution of a node."""
        machine = self.machine
        elements = self._elements(self.present[node])
        if node.op is contraction.MATMUL:
            inner = prod(self.tile[a] for a in self.space.reduced_by(node))
            rows = prod(self.tile[a] for a in self._only(node, 0))
            columns = prod(self.tile[a] for a in self._only(node, 1))
            # loads per multiply-add of the best register tile bound the rate of small products
            narrow, wide = sorted((rows, columns))
            reuse = min(1.0, narrow / 6) * min(1.0, wide / (2 * machine.vector_lanes))
            rate = machine.peak_flops / machine.cores * max(reuse, 0.05) * 0.9
            return 2.0 * elements * inner / rate
        if node.op in VIEWS or node.op.kind is OpKind.LEAF:
            return 0.0
        if node.op.kind is OpKind.REDUCTION:
            elements = self._elements(self.present[node.inputs[0]])
        return elements * _SLOW.get(node.op, 1.0) / machine.vector_ops

    def _only(self, node: Node, operand: int) -> frozenset[Atom]:
        mine = self.present[node.inputs[operand]]
        other = self.present[node.inputs[1 - operand]]
        return (mine - other) & self.present[node]

    def _spill(self, node: Node) -> float:
        """Bytes that go through the outer caches because a tile outgrows the inner one."""
        if node.op.kind in (OpKind.LEAF, OpKind.STRUCTURAL):
            return 0.0
        size = 4.0 * self._elements(self.present[node])
        return 0.0 if size < self.machine.inner_cache_bytes / 4 else 2.0 * size

    def _traffic(self, runs: Mapping[Node, int]) -> tuple[float, float]:
        """Bytes from memory, and bytes from the caches, of the whole kernel."""
        moved = touched = 0.0
        first: dict[Node, float] = {}
        for node in self.schedule.region.inputs:
            size = node.tensor.dtype.size_bytes
            lies = view_type(node)
            unique = float(node.tensor.size_bytes)
            if lies is not None:
                repeats = [
                    n for n, s in zip(lies.shape, lies.element_strides, strict=True) if s == 0
                ]
                unique /= prod(repeats)
            times = runs.get(node, 1) * self.blocks
            total = float(size * self._elements(self.present[node]) * times)
            touched += total
            if unique >= self.machine.outer_cache_bytes:
                moved += max(0.0, total - unique)
            # several views of one tensor are read together: memory gives it once
            base = view_base(node)
            first[base] = min(first.get(base, 0.0) + unique, float(tensor(base.type).size_bytes))
        moved += sum(first.values())
        for node in self.schedule.region.outputs:
            moved += 2.0 * node.tensor.size_bytes
        return moved, touched
