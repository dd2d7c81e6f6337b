"""The cost model: seconds that a region takes as one kernel, or in a library.

Roofline per kernel: operations over the rate of the unit that does them, bytes over the bandwidth
of the level of memory they come from, shared between cores, plus what a block and a launch cost. It
counts what a schedule recomputes (a value that does not vary over a grid axis is computed by
every block) and orders candidates; the clock decides.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil, gcd, inf, prod
from typing import Final, final

from superopt.ir.node import Node, users_of
from superopt.ir.ops import contraction, elementwise, leaf, structural
from superopt.ir.ops.registry import OpKind
from superopt.ir.ops.shapes import tensor
from superopt.ir.target import KEPT_BYTES, Target
from superopt.ir.types import DType
from superopt.search.indices import Atom, IndexSpace
from superopt.search.region import view_base, view_type
from superopt.search.schedule import Role, Schedule
from superopt.search.visible import visible

_ALONE: Final = 0.25
"""The share of a launch that one block takes, for which no other thread is woken (Zen 3: 0.4 us, two threads 1.8)."""
_UNHIDDEN: Final = 0.5
_STAGES: Final = 2
_GPU_TILE_BYTES: Final = 128 << 10
"""Half of a multiprocessor's registers: what is in flight takes the other half."""
_GPU_PRODUCT: Final = (64, 64)
"""Rows and columns of a product that runs at full rate on tensor cores."""
_STREAMED: Final = ((4, 64), (32, 512))
"""Up to how many rows, with how many numbers at least, a CPU's product reads a transposed operand as it lies; else it copies it."""
_STRETCH: Final = 512
"""A CPU's product goes over its whole result once for so many steps along what is contracted."""
_TRANSPOSITION: Final = 3.0
"""Vector operations per element copied: 0.22 ns on Cascade Lake."""
_RESCALING: Final = 0.5
"""Vector operations per element that is accumulated under a running maximum, and iteration, most of which leave the
shift as it is: without them 32 queries by 64 keys take 3.63 ms and not 3.98 (4 x 2048 x 64, two Xeon cores with AMX)."""
_FIRST_CACHE_BYTES: Final = 48 << 10
_OUTGROWN: Final = 3.0
"""Vector operations per element of a product that leaves the first cache before it is read: of bfloat16, 4 x 2048 x 64,
32 queries by 64 keys 3.3 ms, 64 by 64 and 32 by 128 4.0 (two Xeon cores with AMX); in float32 all take the same."""
_ROW: Final = 16
_PICKED: Final = 24.0
"""Vector operations per element that an index chooses alone or with fewer than `_ROW`, the index brought into lanes among them."""
_MATRIX_TILE: Final = 16
"""Rows and columns of a matrix tile."""
_WRITTEN: Final = {"cpu": 2.0, "cuda": 1.0}
"""Bytes moved per byte written: a CPU reads what it writes first."""
_LINE_BYTES: Final = 64
_PAGE_BYTES: Final = 4096
"""Where in a cache lines may lie depends on where they lie in their pages."""
_SLOW: Final = {
    elementwise.EXP: 8.0,
    elementwise.LOG: 10.0,
    elementwise.LOG2: 10.0,
    elementwise.LOG10: 10.0,
    elementwise.TANH: 12.0,
    elementwise.SIGMOID: 14.0,
    elementwise.ERF: 12.0,
    elementwise.SIN: 16.0,
    elementwise.COS: 16.0,
    elementwise.POW: 80.0,
    elementwise.DIV: 6.0,
    elementwise.SQRT: 8.0,
}


def library_cost(node: Node, machine: Target) -> float:
    """Return the predicted seconds of one op as a library kernel."""
    size = node.tensor.size_bytes
    gathers = node.op in (structural.GATHER, structural.TAKE)
    read = size if gathers else 0
    read += sum(tensor(i.type).size_bytes for i in (node.inputs[1:] if gathers else node.inputs))
    moved = read + _WRITTEN[machine.kind] * size
    types = tuple(i.type for i in node.inputs)
    flops: float = node.op.flops(types, node.type) if node.op.flops else 0
    if _picks(node):
        flops = _PICKED * node.tensor.elements
    rate = _product_flops(node, machine) * machine.library_efficiency
    if node.op.kind not in (OpKind.CONTRACTION, OpKind.LIBRARY):
        rate = machine.vector_ops * machine.cores / _SLOW.get(node.op, 1.0)
    busy, waiting = flops / rate, moved / machine.memory_bandwidth
    if node.op is contraction.MATMUL and machine.kind == "cpu" and _runs_along(node.inputs[1]):
        busy += _transposition_s(node.inputs[1].tensor.elements / machine.cores, machine)
    return machine.library_call_s + max(busy, waiting) + _UNHIDDEN * min(busy, waiting)


def _picks(node: Node) -> bool:
    """Say whether an index chooses elements one by one, or rows that fill no vector."""
    if node.op not in (structural.GATHER, structural.TAKE):
        return False
    axis = len(node.shape) + node.attrs.axis
    return prod(node.shape[axis + 1 :]) < _ROW and node.shape[axis : axis + 1] != (1,)


def _product_flops(node: Node, machine: Target) -> float:
    """Return the rate of large products of the type of `node`."""
    dtype = node.tensor.dtype
    # CPUs have products of bfloat16 alone
    half = dtype is DType.BF16 or (dtype is DType.F16 and machine.kind == "cuda")
    return machine.half_flops if half else machine.peak_flops


def _transposition_s(elements: float, machine: Target) -> float:
    """Seconds on one core of copying so many elements of a transposed operand, as a library does too, or reading them so."""
    return _TRANSPOSITION * elements / machine.vector_ops


def _lies_across(strides: Sequence[int], shape: Sequence[int], users: Sequence[Node]) -> bool:
    """Say whether elementwise ops read what lies in memory along another dim than their last."""
    wide = [s for s, n in zip(strides, shape, strict=True) if n > 1]
    return wide[-1:] > [1] and any(u.op.kind is OpKind.ELEMENTWISE for u in users)


def _runs_along(right: Node) -> bool:
    """Say whether the right operand of a product lies in memory contiguous along its rows' dim."""
    lies = view_type(right)
    return lies is not None and lies.element_strides[-2] == 1 != lies.element_strides[-1]


@final
@dataclass(frozen=True, slots=True)
class _Product:
    """A contraction: index sets of what is contracted, rows, columns, both operands; its rate."""

    inner: int
    rows: int
    columns: int
    operands: tuple[int, int]
    element_bytes: int
    flops: float
    transposed: bool
    """Whether the right operand is contiguous along what is contracted."""
    kept: frozenset[Atom] | None
    """Over what the right operand varies, where blocks can leave it to each other as they need it."""


@final
@dataclass(frozen=True, slots=True)
class _Op:
    """What a node costs, in terms of the numbers of points of index sets (positions in a list)."""

    elements: int
    row: int
    passes: int
    closes: bool
    seconds_per_element: float
    product: _Product | None
    masked: bool
    """Whether a product has rows of the grid that masks compare with the loop's steps."""
    tile: int
    spills: bool
    kept: frozenset[Atom] | None
    """Over what it varies, where blocks leave it to each other."""
    room: float
    """How many bytes it may take then, for all iterations."""


@final
@dataclass(frozen=True, slots=True)
class _Read:
    """A tensor that is read: bytes per element, bytes of its own, the tensor that it is a view of.

    `run` is the index set along which it is contiguous in memory. `spread` are the bytes of a cache that a
    row of a tile takes at least where the loop's next tile is fetched ahead; 0 where it is not.
    """

    elements: int
    run: int
    spread: int
    passes: int
    element_bytes: int
    unique: float
    base: Node
    varies: frozenset[Atom]
    across: bool
    """Whether vectors of it are put together of elements that lie apart."""


def _split(schedule: Schedule) -> set[Atom]:
    return {a for a, role in schedule.roles.items() if role is not Role.WHOLE}


@final
class KernelModel:
    """Predicts the seconds of one schedule for any tile sizes; made once, asked often."""

    def __init__(self, schedule: Schedule, machine: Target) -> None:
        self._schedule = schedule
        self._grid = schedule.grid
        self._machine = machine
        self._space: IndexSpace = schedule.space
        self._passes = self._count_passes()
        self._sets: dict[frozenset[Atom], int] = {}
        self._present: dict[Node, frozenset[Atom]] = {}
        for node in schedule.region.inputs:
            self._present[node] = frozenset(self._space.atoms(node))
        for node in schedule.region.body:
            self._present[node] = self._varies_over(node)
        self._extents = {a: self._space.extent(a) for a in schedule.roles}
        self._left = self._left_to_others()
        self._lanes = self._pairwise() if machine.kind == "cpu" else {}
        self._visible = visible(schedule)
        self._visible_elements = self._visible.share({})
        self._ops = [self._op(n) for n in schedule.region.body]
        self._reads = [self._read(n) for n in schedule.region.inputs]
        self._whole = [prod([self._extents[a] for a in atoms]) for atoms in self._sets]
        written = sum(n.tensor.size_bytes for n in schedule.region.outputs)
        self._written = _WRITTEN[machine.kind] * written

    # -- what does not depend on the tiles -----------------------------------------------------

    def _varies_over(self, node: Node) -> frozenset[Atom]:
        if node.op is leaf.IOTA:
            return frozenset(self._space.layout(node)[node.attrs.axis])
        found = frozenset[Atom]().union(*(self._present[i] for i in node.inputs))
        present = found & set(self._space.atoms(node))
        if node.op in (structural.SLICE, structural.PAD, structural.CONCAT):
            return present | set(self._space.layout(node)[node.attrs.axis])
        return present

    def _count_passes(self) -> dict[Node, int]:
        """Return in how many passes over the loop a block computes each node."""
        passes = self._schedule.passes
        region = self._schedule.region
        found: dict[Node, int] = {}
        for number in range(max(1, passes.count)):
            needed: set[Node] = set()
            for node in reversed(region.body):
                closes = node not in passes.varies and any(i in passes.varies for i in node.inputs)
                wanted = closes and max(passes.number[node], 0) == number
                stored = node in region.outputs and passes.number[node] == number
                if node in needed or wanted or (stored and node in passes.varies):
                    needed.update(i for i in node.inputs if i in passes.varies)
                    if node in passes.varies:
                        needed.add(node)
            for node in needed:
                found[node] = found.get(node, 0) + 1
        return found

    def _set(self, atoms: frozenset[Atom]) -> int:
        return self._sets.setdefault(atoms, len(self._sets))

    def _op(self, node: Node) -> _Op:
        present, schedule = self._present[node], self._schedule
        closes = any(i in self._schedule.passes.varies for i in node.inputs)
        kind = node.op.kind
        product = None
        rate = 0.0
        counted = present
        if node.op is contraction.MATMUL:
            left, right = (self._present[i] for i in node.inputs)
            inner = self._space.reduced_by(node)
            product = _Product(
                self._set(inner),
                self._set((left - right) & present),
                self._set((right - left) & present),
                (self._set(left), self._set(right)),
                node.tensor.dtype.size_bytes,
                _product_flops(node, self._machine),
                _runs_along(node.inputs[1]),
                right if self._keeps_right(node) else None,
            )
        elif node.op not in structural.VIEWS and kind is not OpKind.LEAF:
            rate = self._operations(node, present) / self._machine.vector_ops
            if kind is OpKind.REDUCTION:
                counted = self._present[node.inputs[0]]
        shaped = node.inputs[0] if kind is OpKind.REDUCTION else node
        spills = kind not in (OpKind.LEAF, OpKind.STRUCTURAL)
        if counted is not present:
            # the result is smaller than what is read: it does not spill
            spills = False
        row = self._along(shaped, -1)
        if node in self._lanes:
            row, spills = self._lanes[node], False
        passes, tile = self._passes.get(node, 0), self._set(present)
        kept = present if node in self._left else None
        room = KEPT_BYTES if schedule.loop in present <= _split(schedule) else inf
        within = present | (self._space.reduced_by(node) if product else frozenset())
        masked = {a for a in (schedule.loop, self._visible.grid) if a is not None} <= within
        return _Op(
            self._set(counted),
            self._set(row),
            passes,
            closes,
            rate,
            product,
            masked,
            tile,
            spills,
            kept,
            room,
        )

    def _left_to_others(self) -> set[Node]:
        """Return what kernels compute once for all blocks in turn that need it, if it is the same for them.

        That are numbers of rows or columns, what is read for such alone, and right operands of products alone
        that matrix tiles multiply.
        """
        schedule = self._schedule
        if self._machine.kind != "cpu":
            return set()
        found: set[Node] = set()
        users = users_of(schedule.region.outputs)
        split = _split(schedule)
        for node in reversed(schedule.region.body):
            needed = all(
                u in found or (self._keeps_right(u) and u.inputs[0] is not node)
                for u in users[node]
            )
            small = schedule.loop in self._present[node] <= split
            if node not in schedule.region.outputs and (needed or small):
                found.add(node)
        return found

    def _pairwise(self) -> dict[Node, frozenset[Atom]]:
        """Return the reductions of what pairs of rows make, with what is computed for them alone (codegen/cpu/pairwise.py).

        It stays in registers. With each the atoms along which its vectors lie.
        """
        region = self._schedule.region
        users = users_of(region.outputs)
        found: dict[Node, frozenset[Atom]] = {}
        for total in (n for n in region.body if n.op.kind is OpKind.REDUCTION):
            whole, kept = self._present[total.inputs[0]], self._present[total]
            along = (frozenset(dim) & kept for dim in reversed(self._space.layout(total)))
            lane = next((atoms for atoms in along if atoms), frozenset[Atom]())
            chain = {total}
            for node in reversed(region.body):
                made = node.op.kind is OpKind.ELEMENTWISE or node.op in structural.VIEWS
                wanted = self._present[node] == whole and chain.issuperset(users[node])
                if made and wanted and node not in region.outputs:
                    chain.add(node)
            leaves = {i for n in chain for i in n.inputs} - chain
            again = {
                a
                for i in leaves
                if lane & (near := self._present.get(i, frozenset()))
                for a in near - lane
            }
            if lane < kept and len(chain) > 1 and not kept - lane <= again:
                found.update(dict.fromkeys(chain, lane))
        return found

    def _keeps_right(self, node: Node) -> bool:
        """Say whether kernels keep the right operand of a product, as matrix tiles of bfloat16 need it."""
        machine = self._machine
        tiles = machine.kind == "cpu" and machine.half_flops > machine.peak_flops
        return tiles and node.op is contraction.MATMUL and node.tensor.dtype is DType.BF16

    def _along(self, node: Node, axis: int) -> frozenset[Atom]:
        """Return what a node varies over along one of its dims."""
        layout = self._space.layout(node)
        return frozenset(layout[axis]) & self._present[node] if layout else frozenset()

    def _operations(self, node: Node, present: frozenset[Atom]) -> float:
        """Return what an element costs, in simple operations."""
        if node.op is elementwise.DIV and self._machine.kind == "cpu":
            shared = present - self._present.get(node.inputs[1], frozenset())
            if shared:  # the divisor is inverted once
                return 2.0
        if _picks(node):
            return _PICKED
        return _SLOW.get(node.op, 1.0)

    def _read(self, node: Node) -> _Read:
        lies = view_type(node)
        unique = float(node.tensor.size_bytes)
        if lies is not None:
            pairs = zip(lies.shape, lies.element_strides, strict=True)
            unique /= prod(n for n, s in pairs if s == 0)
        users = [n for n in self._schedule.region.body if node in n.inputs]
        gather = next((n for n in users if n.op is structural.GATHER and n.inputs[0] is node), None)
        if gather is not None:
            unique = min(unique, float(gather.tensor.size_bytes))
        varies = self._present[gather or node]
        passes = self._passes.get(node, 0)
        strides = (lies or node.tensor).element_strides
        along = self._along(node, strides.index(1)) if 1 in strides else frozenset[Atom]()
        size = node.tensor.dtype.size_bytes
        spread = 0
        ahead = self._machine.kind == "cpu" and self._schedule.loop in along
        if ahead and any(n.op is not contraction.MATMUL for n in users):
            # rows at a multiple of a page share few places: only what lies there competes for them
            spread = gcd(_PAGE_BYTES, *(s * size for s in strides if s > 1))
        return _Read(
            self._set(varies),
            self._set(along),
            spread,
            passes,
            size,
            unique,
            view_base(node),
            varies,
            self._machine.kind == "cpu" and _lies_across(strides, node.shape, users),
        )

    # -- what does -----------------------------------------------------------------------------

    def seconds(self, tiles: Mapping[Atom, int]) -> float:
        """Return the predicted seconds with these tile sizes of the grid and loop atoms.

        It is infinite where a block's tiles do not fit a GPU's multiprocessor.
        """
        machine, schedule = self._machine, self._schedule
        tile = {
            a: e if schedule.roles[a] is Role.WHOLE else min(tiles[a], e)
            for a, e in self._extents.items()
        }
        sizes = [prod([tile[a] for a in atoms]) for atoms in self._sets]
        if machine.kind != "cpu" and not self._fits(sizes):
            return inf
        counts = {a: -(-e // tile[a]) for a, e in self._extents.items()}
        blocks = prod([counts[a] for a in self._grid])
        loop = schedule.loop
        # iterations that masks leave; within them, a CPU's products compute little more than that
        share = self._visible.share(tile)
        kept = self._visible_elements / share if machine.kind == "cpu" and share else 1.0
        trips = 1.0 if loop is None else share * counts[loop]
        compute = cached = 0.0
        for op in self._ops:
            times = op.passes * trips if op.passes else trips if op.closes else 1
            elements = sizes[op.elements]
            if op.kept is not None and 4.0 * elements * trips <= op.room:
                times /= self._sharing(op.kept, counts)
            if op.product is not None:
                left = kept if op.masked else 1.0
                compute += times * self._product_s(op.product, elements, sizes, left)
                compute += times * self._transposed_s(op.product, sizes, counts)
            else:
                wasted = self._rounded(op.row, sizes, machine.vector_lanes)
                compute += times * elements * wasted * op.seconds_per_element
            outgrown = 4.0 * elements > _FIRST_CACHE_BYTES / 4
            if outgrown and op.product is not None and self._in_matrix_tiles(op.product):
                compute += times * elements * _OUTGROWN / machine.vector_ops
            # a tile that outgrows the inner cache goes through the outer ones
            large = 4.0 * elements > machine.inner_cache_bytes / 4
            if op.spills and machine.kind == "cpu" and large:
                product = op.product
                stretches = 1 if product is None else ceil(sizes[product.inner] / _STRETCH)
                cached += times * stretches * 4.0 * elements
            if op.closes and not op.passes and schedule.passes.shifts:  # it is rescaled every time
                rescaled = trips * sizes[op.tile] * _RESCALING
                compute += rescaled / machine.vector_ops
        for read in self._reads:
            if read.across:
                times = read.passes * trips or 1.0
                compute += _transposition_s(times * sizes[read.elements], machine)
        moved, touched = self._traffic(sizes, counts, blocks, trips)
        waves = ceil(blocks / machine.cores) * machine.cores
        compute_s = compute * waves / machine.cores
        cache_s = (touched + cached * blocks) / machine.cache_bandwidth / machine.cores
        memory_s = moved / machine.memory_bandwidth
        if blocks < machine.cores:
            memory_s *= machine.cores / blocks * 0.7
            cache_s *= machine.cores / blocks
        steps = blocks * trips * max(1, schedule.passes.count)
        launch_s = machine.launch_s
        if blocks == 1 and machine.kind == "cpu":
            launch_s *= _ALONE
        overhead = launch_s + steps * machine.block_s / machine.cores
        # prefetching hides part of the traffic behind arithmetic, or of the arithmetic behind traffic
        busy, waiting = compute_s + cache_s, memory_s
        return overhead + max(busy, waiting) + _UNHIDDEN * min(busy, waiting)

    def _rounded(self, cut: int, sizes: list[int], unit: int) -> float:
        """Return by how much it costs more that tiles cut rows of an index set into less than units.

        Lanes of vectors stay idle, and lines of the cache are read in part.
        """
        size = sizes[cut]
        if self._machine.kind != "cpu" or size == self._whole[cut]:
            return 1.0
        return ceil(size / unit) * unit / size

    def _fits(self, sizes: list[int]) -> bool:
        """Say whether a block's tiles fit its registers, and operands of products its shared memory."""
        if any(4 * sizes[op.tile] > _GPU_TILE_BYTES for op in self._ops):
            return False
        staged = [
            _STAGES * op.product.element_bytes * sizes[operand]
            for op in self._ops
            if op.product is not None
            for operand in op.product.operands
        ]
        return sum(staged) <= self._machine.inner_cache_bytes

    def _product_s(self, product: _Product, elements: int, sizes: list[int], kept: float) -> float:
        """Seconds on one core of one tile product, of which a share is computed."""
        machine = self._machine
        # loads per multiply-add of the best register tile bound the rate of small products
        narrow, wide = sorted((sizes[product.rows], sizes[product.columns]))
        least, most = (6, 2 * machine.vector_lanes) if machine.kind == "cpu" else _GPU_PRODUCT
        reuse = min(1.0, narrow / least) * min(1.0, wide / most)
        rate = product.flops / machine.cores * max(reuse, 0.05) * 0.9
        if self._in_matrix_tiles(product):
            kept *= prod(ceil(n / _MATRIX_TILE) * _MATRIX_TILE / n for n in (narrow, wide))
        return kept * 2.0 * elements * sizes[product.inner] / rate

    def _in_matrix_tiles(self, product: _Product) -> bool:
        """Say whether a product goes through a CPU's matrix tiles, whose rows and columns stay idle at edges."""
        machine = self._machine
        return machine.kind == "cpu" and product.flops == machine.half_flops > machine.peak_flops

    def _transposed_s(
        self, product: _Product, sizes: list[int], counts: Mapping[Atom, int]
    ) -> float:
        """Seconds on one core of bringing the right operand of one tile product into shape."""
        machine, loop = self._machine, self._schedule.loop
        if machine.kind != "cpu" or not product.transposed:
            return 0.0
        rows, inner = sizes[product.rows], sizes[product.inner]
        streamed = any(rows <= most and inner >= least for most, least in _STREAMED)
        if streamed and product.kept is None:
            return 0.0
        seconds = _transposition_s(inner * sizes[product.columns], machine)
        if product.kept is None:
            return seconds
        trips = counts[loop] if loop in product.kept else 1
        bytes_ = product.element_bytes * sizes[product.operands[1]] * trips
        if bytes_ > machine.inner_cache_bytes / 2:
            return seconds
        return seconds / self._sharing(product.kept, counts)

    def _sharing(self, kept: frozenset[Atom], counts: Mapping[Atom, int]) -> int:
        """Return how many blocks in turn differ in nothing that a value varies over: they find what the first made.

        `counts`: the tiles along each grid atom.
        """
        grid = [a for a in self._grid if counts[a] > 1]
        if not grid or grid[-1] in kept:
            return 1
        in_turn = ceil(prod(counts[a] for a in grid) / self._machine.cores)
        return min(in_turn, prod(counts[a] for a in grid if a not in kept))

    def _cores_that_read(self, varies: frozenset[Atom], counts: Mapping[Atom, int]) -> float:
        """Return how many cores read an element of what varies over these.

        A core takes blocks in turn. Two that read the same at the same time wait for memory both: on a CPU the outer
        cache gives neither what it has not fetched for the other yet.
        """
        blocks = span = prod(counts[a] for a in self._grid)
        cores = self._machine.cores if self._machine.kind == "cpu" else 1
        for atom in self._grid:
            if counts[atom] > 1 and atom not in varies:
                return max(1.0, min(cores, blocks) * span / blocks)
            span //= counts[atom]
        return 1.0

    def _traffic(
        self, sizes: list[int], counts: Mapping[Atom, int], blocks: int, trips: float
    ) -> tuple[float, float]:
        """Bytes from memory, and bytes from the caches, of the whole kernel."""
        moved = touched = 0.0
        first: dict[Node, float] = {}
        cores: dict[Node, float] = {}
        for read in self._reads:
            times = (read.passes * trips or 1) * blocks
            total = float(read.element_bytes * sizes[read.elements] * times)
            total *= self._rounded(read.run, sizes, _LINE_BYTES // read.element_bytes)
            touched += total
            run = sizes[read.run]
            taken = sizes[read.elements] / run * max(read.spread, run * read.element_bytes)
            if read.spread and taken > self._machine.inner_cache_bytes / 2:
                moved += total  # what was fetched ahead is gone when it is wanted
            if read.unique >= self._machine.outer_cache_bytes:
                moved += max(0.0, total - read.unique)
            # several views of one tensor are read together: memory gives it once
            whole = float(tensor(read.base.type).size_bytes)
            first[read.base] = min(first.get(read.base, 0.0) + read.unique, whole)
            readers = self._cores_that_read(read.varies, counts)
            cores[read.base] = max(cores.get(read.base, 1.0), readers)
        moved += sum(bytes_ * cores[base] for base, bytes_ in first.items())
        return moved + self._written, touched
