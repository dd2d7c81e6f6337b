"""Block graphs to Triton: one program per block, tiles padded to powers of two.

In: a block graph and a `TritonConfig`. Out: `Source`: the text of a Python module with the kernel
and a launcher `run(*inputs) -> outputs`. Meaning: `superopt.ir.semantics`. Positions that do not
exist (padding, ragged edges) hold anything and are masked where tiles are reduced, contracted,
accumulated or stored; loads put zeros there where a product of what they load asks for it.
"""

from dataclasses import dataclass, replace
from math import prod
from typing import Final, Literal, final

from superopt.codegen.errors import CodegenError
from superopt.codegen.tile_program import Compute, Item, Loop, TileProgram, tile_program
from superopt.codegen.triton.expressions import LOWER, TYPES, functions_of, literal
from superopt.codegen.triton.moves import MOVES, block, is_view, move
from superopt.codegen.triton.writer import Writer, along, padded, word
from superopt.ir.graph import Axis, Graph
from superopt.ir.node import Node
from superopt.ir.ops import contraction, elementwise, leaf, structural, tile
from superopt.ir.ops.registry import OpKind
from superopt.ir.tiles import DimSource
from superopt.ir.types import DType, contiguous_strides

Precision = Literal["ieee", "tf32x3"]
_Dims = list[tuple[int, int, DimSource | None]]

_MOST_ELEMENTS: Final = 1 << 16
"""A multiprocessor has this many registers of 32 bits; what exceeds them is not worth compiling."""
_MOST_BLOCKS: Final = (1 << 31) - 1
_LEAST_DEPTH: Final = 16
"""Tensor cores contract at least this many 16-bit elements."""
_SUMS: Final = (contraction.REDUCE_SUM, tile.ACCUM_SUM, tile.ACCUM_RESCALED)
_PRODUCTS: Final = (contraction.REDUCE_PROD, tile.ACCUM_PROD)
_MINIMA: Final = (contraction.REDUCE_MIN, contraction.ARGMIN, tile.ACCUM_MIN)
_SMALL: Final = (DType.I8, DType.I16, DType.U8, DType.BOOL)
_REARRANGING: Final = (structural.PERMUTE, structural.RESHAPE, structural.BROADCAST)


@final
@dataclass(frozen=True, slots=True)
class TritonConfig:
    """What can be tuned in a kernel beside its tile sizes.

    `warps` per block and `stages` of the software pipeline are Triton's; `precision` is that of
    float32 products (see `tl.dot`).
    """

    warps: int = 4
    stages: int = 2
    precision: Precision = "ieee"


@final
@dataclass(frozen=True, slots=True)
class Source:
    """Text of a module that defines `symbol` (the kernel) and `run(*inputs)`.

    `types` are the element types of the kernel's pointers, inputs before outputs; `blocks` is the
    size of the launch.
    """

    text: str
    symbol: str
    types: tuple[str, ...]
    blocks: int
    config: TritonConfig


@final
@dataclass(frozen=True, slots=True)
class _Operand:
    """An operand of a product: a tile, or an `exact` copy of one of 16 bits, which is read in its place.

    `text` is what stands for it once it is masked.
    """

    node: Node
    exact: bool = False
    text: str = ""


def configs(graph: Graph) -> list[TritonConfig]:
    """List configurations to try, the most promising first."""
    nodes = list(graph.nodes())
    products = [n for n in nodes if n.op is contraction.MATMUL]
    tiles = [n for n in nodes if n.op not in (leaf.INPUT, tile.STORE)]
    largest = max((prod(block(n.shape)) for n in tiles), default=1)
    # Hopper's tensor cores multiply 64 rows at a time by four warps together
    least = 4 if any(p.shape[-2] >= 64 for p in products) else 2
    warps = next((w for w in (2, 4, 8) if w >= least and largest <= w << 11), 16)
    others = [w for w in (4, 8, 16, 2) if w != warps]
    stages = (3, 2, 4) if graph.loops else (1,)
    found = [TritonConfig(warps, stages[0]), *(TritonConfig(w, stages[0]) for w in others[:2])]
    found += [TritonConfig(warps, s) for s in stages[1:]]
    found += [TritonConfig(others[0], s) for s in stages[1:2]]
    wide = [p for p in products if p.tensor.dtype is DType.F32 and not any(map(_half, p.inputs))]
    if any(min(p.shape[-2:]) > 1 for p in wide):
        found.insert(1, TritonConfig(warps, stages[0], precision="tf32x3"))
    return found


def _half(node: Node) -> str | None:
    """Return the 16-bit type that `node` is an exact float32 copy of a tile of."""
    while node.op in _REARRANGING:
        node = node.inputs[0]
    if node.op is not elementwise.CAST or node.tensor.dtype is not DType.F32:
        return None
    kind = node.inputs[0].tensor.dtype
    return TYPES[kind] if kind.is_half else None


def launch_options(config: TritonConfig) -> dict[str, int | bool]:
    """Return what Triton is told about a launch.

    No product is merged into its reader: scaled values and their scaled maximum cancel exactly.
    """
    return {"num_warps": config.warps, "num_stages": config.stages, "enable_fp_fusion": False}


def lower(graph: Graph, config: TritonConfig, name: str) -> Source:
    """Lower a block graph.

    Raises:
        CodegenError: an op or a combination of loops has no Triton form here; the caller keeps
            the library's kernel.
    """
    return _Kernel(tile_program(graph), config, word(name)).source()


@final
class _Kernel:
    def __init__(self, program: TileProgram, config: TritonConfig, name: str) -> None:
        self.program = program
        self.graph = program.graph
        self.config = config
        self.name = name
        self.names: dict[Node, str] = {}
        self.pointers = {n: f"{word(n.attrs.name)}_ptr" for n in self.graph.inputs}
        if len(set(self.pointers.values())) < len(self.pointers):
            self.pointers = {n: f"in{i}_ptr" for i, n in enumerate(self.graph.inputs)}
        self.results = [f"out{i}_ptr" for i in range(len(self.graph.outputs))]
        self.writer = Writer([name, *self.pointers.values(), *self.results])
        self.matrices: dict[Node, str] = {}
        self.filled: set[Node] = set()
        for node in self.graph.nodes():
            if node.op is contraction.MATMUL:
                for operand, axis in zip(node.inputs, (-1, -2), strict=True):
                    origin = self.origin(operand, len(operand.shape) + axis)
                    self.filled |= {origin[0]} if origin is not None else set()

    # -- the frame -----------------------------------------------------------------------------

    def source(self) -> Source:
        graph, writer = self.graph, self.writer
        divisor = 1
        for axis in reversed(graph.grid):
            index = f"tl.program_id(0) // {divisor} % {axis.count}"
            writer.scopes[0].head.append(f"{writer.axis(axis.name)} = {index}")
            divisor *= axis.count
        self.items(self.program.items)
        parameters = [*self.pointers.values(), *self.results]
        body = "\n".join("    " + line for line in writer.lines())
        imports = ["import torch", "import triton", "import triton.language as tl"]
        functions = functions_of(body)
        if "libdevice." in body + functions:
            imports.append("from triton.language.extra import libdevice")
        kernel = f"@triton.jit\ndef {self.name}({', '.join(parameters)}):\n{body}"
        parts = [self.header(), "\n".join(imports), functions.strip(), kernel, self.launcher()]
        types = tuple(n.tensor.dtype.value for n in (*graph.inputs, *graph.outputs))
        text = "\n\n\n".join(p for p in parts if p) + "\n"
        return Source(text, self.name, types, self.blocks(), self.config)

    def blocks(self) -> int:
        count = prod(a.count for a in self.graph.grid)
        if count > _MOST_BLOCKS:
            raise CodegenError(f"{count} blocks are more than one launch has")
        return count

    def header(self) -> str:
        graph = self.graph
        grid = " x ".join(f"{a.count} {a.name}" for a in graph.grid) or "1"
        loops = ", ".join(f"{a.name} ({a.count} times)" for a in graph.loops)
        lines = [
            f"{self.name}: {', '.join(i.attrs.name for i in graph.inputs)} -> "
            f"{', '.join(str(o.type) for o in graph.outputs)}",
            "",
            f"{grid} blocks{f'; each loops over {loops}' if loops else ''}. Computes:",
            "",
            *("    " + line for line in str(graph).splitlines()),
            "",
            "Generated by superopt.codegen.triton.lower from this text; block graph "
            f"{graph.digest()[:16]}.",
        ]
        return 'r"""' + "\n".join(lines) + '\n"""'

    def launcher(self) -> str:
        inputs = [p.removesuffix("_ptr") for p in self.pointers.values()]
        lines = [f"def run({', '.join(inputs)}):", f'    """Launch {self.name}."""']
        device = f"{inputs[0]}.device" if inputs else '"cuda"'
        made = [p.removesuffix("_ptr") for p in self.results]
        for name, node in zip(made, self.graph.outputs, strict=True):
            dtype = TYPES[node.tensor.dtype].removeprefix("tl.").replace("int1", "bool")
            dtype = "int16" if node.tensor.dtype is DType.I16 else dtype
            shape = f"{node.shape!r}, dtype=torch.{dtype}, device={device}"
            lines.append(f"    {name} = torch.empty({shape})")
        options = ", ".join(f"{k}={v}" for k, v in launch_options(self.config).items())
        call = f"{self.name}[({self.blocks()},)]({', '.join([*inputs, *made])}, {options})"
        return "\n".join([*lines, f"    {call}", f"    return [{', '.join(made)}]"])

    def items(self, items: tuple[Item, ...]) -> None:
        for item in items:
            if isinstance(item, Loop):
                self.loop(item)
            else:
                self.compute(item)

    def define(self, node: Node, text: str, stem: str = "") -> None:
        if prod(block(node.shape)) > _MOST_ELEMENTS:
            raise CodegenError(f"a tile of {node.shape} exceeds the registers of a block")
        self.names[node] = self.writer.let(stem or node.op.name, text)

    # -- loops ---------------------------------------------------------------------------------

    def loop(self, loop: Loop) -> None:
        narrow = []
        for state in loop.states:
            dtype = self.dtype(state)
            if state.tensor.dtype.is_half and state.op in (*_SUMS, *_PRODUCTS):
                narrow.append(state)
                dtype = "tl.float32"
            start = f"tl.full({block(state.shape)}, {self.identity(state)}, {dtype})"
            self.define(state, start, "running_max" if state.op is tile.PREFIX_MAX else "acc")
        low, high = self.limits(loop.axis)
        self.writer.open(loop.axis.name)
        index = self.writer.axis(loop.axis.name)
        self.items(loop.body)
        self.writer.close(f"for {index} in range({low}, {high}):")
        for state in narrow:
            self.define(state, f"{self.names[state]}.to({self.dtype(state)})", "acc")

    def limits(self, axis: Axis) -> tuple[str, str]:
        low, high = "0", str(axis.count)
        for bound in axis.bounds:
            factor = sum(c for n, c in bound.terms if n == axis.name)
            rest = [f"{self.writer.axes[n]} * {c}" for n, c in bound.terms if n != axis.name]
            # a number of Triton's, also where the bound names no other axis
            total = " + ".join([*(rest or ["tl.program_id(0) * 0"]), str(bound.constant)])
            if factor < 0:
                high = f"tl.minimum({high}, tl.maximum({total} + {-factor}, 0) // {-factor})"
            elif factor > 0:
                low = f"tl.maximum({low}, tl.maximum({factor - 1} - ({total}), 0) // {factor})"
            else:
                high = f"tl.where({total} >= 0, {high}, 0)"
        return low, high

    def identity(self, node: Node) -> str:
        op, dtype = node.op, node.tensor.dtype
        if op in (contraction.ARGMAX, contraction.ARGMIN):
            dtype = node.inputs[0].tensor.dtype
        if op in _SUMS or (op is tile.ACCUM_LAST and node.inputs[0].op is not tile.PREFIX_MAX):
            return "0"
        if op in _PRODUCTS:
            return "1"
        low = op not in _MINIMA
        if dtype.is_float:
            return f'float("{"-" if low else ""}inf")'
        if dtype in (DType.BOOL, DType.U8):
            return "0" if low else "1" if dtype is DType.BOOL else "255"
        bits = dtype.size_bytes * 8 - 1
        return str(-(2**bits) if low else 2**bits - 1)

    def accumulate(self, node: Node) -> None:
        op, state, loop = node.op, self.names[node], node.attrs.loop
        value = self.names[node.inputs[0]]
        if op is tile.ACCUM_LAST:
            if self.graph.axis(loop).bounds and node.inputs[0].op is not tile.PREFIX_MAX:
                raise CodegenError("accum_last of a bounded loop: its last iteration may not run")
            self.writer.put(f"{state} = {value}")
            return
        edges: _Dims = []
        for i, source in enumerate(self.program.sources[node.inputs[0]]):
            if source is not None and any(a == loop for a, _ in source.map.axes):
                edges.append((i, node.inputs[0].shape[i], source))
        value = self.masked(node.inputs[0], value, edges, self.identity(node))
        if node.tensor.dtype.is_half:
            value = f"{value}.to(tl.float32)"
        if op is tile.ACCUM_RESCALED:
            before, now = self.scales(node)
            self.writer.put(f"{state} = {state} * {before} + {value} * {now}")
        elif op is tile.PREFIX_MAX:
            self.writer.put(f"{state}_before = {state}")
            self.writer.put(f"{state} = {self.combined(node, state, value)}")
        else:
            self.writer.put(f"{state} = {self.combined(node, state, value)}")

    def combined(self, node: Node, state: str, value: str) -> str:
        op = node.op
        if node.tensor.dtype is DType.BOOL:
            return f"{state} {'&' if op in _MINIMA or op in _PRODUCTS else '|'} {value}"
        if op in _SUMS:
            return f"{state} + {value}"
        if op in _PRODUCTS:
            return f"{state} * {value}"
        function = "_min" if op in _MINIMA else "_max"
        if node.tensor.dtype.is_half:
            return f"{function}({state}.to(tl.float32), {value}).to({self.dtype(node)})"
        return f"{function}({state}, {value})"

    def scales(self, node: Node) -> tuple[str, str]:
        """Return by what the sum so far and this iteration's part are multiplied."""
        shift = node.inputs[1]
        if shift.op is not tile.PREFIX_MAX or shift.attrs.loop != node.attrs.loop:
            raise CodegenError("accum_rescaled needs the prefix_max of its own loop as shift")
        top, key = self.names[shift], ("scales", shift, node.attrs.power)
        before, now = f"{top}_decay", f"{top}_weight"
        if node.attrs.power != 1:
            before, now = f"{before}_{node.attrs.power}", f"{now}_{node.attrs.power}"
        if self.writer.known(key, before) is None:
            power = "" if node.attrs.power == 1 else f"{float(node.attrs.power)} * "
            wide = ".to(tl.float32)" if shift.tensor.dtype.is_half else ""
            # a maximum of nothing yet is -inf: shifts are relative to 0 then
            finite = f'tl.where({top}{wide} > float("-inf"), {top}{wide}, 0.0)'
            self.writer.put(f"{before} = tl.exp({power}({top}_before{wide} - {finite}))")
            self.writer.put(f"{now} = tl.exp({power}({top}{wide} - {finite}))")
        return before, now

    # -- values --------------------------------------------------------------------------------

    def compute(self, item: Compute) -> None:
        node, op = item.node, item.node.op
        if op is leaf.CONSTANT:
            self.dtype(node)
            self.names[node] = literal(node.attrs.value, node.attrs.dtype)
        elif op is tile.LOAD:
            self.load(node)
        elif op is tile.STORE:
            self.store(node)
        elif op is tile.TILE_INDEX:
            dim = node.attrs.dim
            index = self.writer.index(dim)
            vector = index if dim.tile > 1 else f"{index} + {self.writer.local(1)}"
            self.define(node, f"({vector}).to({self.dtype(node)})", "index")
        elif op is leaf.IOTA:
            axis = len(node.shape) + node.attrs.axis
            index = along(self.writer.local(node.shape[axis]), axis, len(node.shape))
            text = f"tl.broadcast_to({index}, {block(node.shape)}).to({self.dtype(node)})"
            self.define(node, text)
        elif op.kind is OpKind.TILE:
            self.accumulate(node)
        elif op is contraction.MATMUL:
            self.define(node, self.matmul(node))
        elif op in (contraction.ARGMAX, contraction.ARGMIN):
            self.define(node, self.position(node))
        elif op is contraction.SCAN:
            self.define(node, self.scan(node))
        elif op.kind is OpKind.REDUCTION:
            self.define(node, self.reduction(node))
        elif op.kind is OpKind.ELEMENTWISE:
            self.define(node, self.elementwise(node, [self.names[i] for i in node.inputs]))
        elif op in MOVES:
            operands = [self.names[i] for i in node.inputs]
            self.dtype(node)
            self.define(node, move(node, operands, self.writer))
        else:
            raise CodegenError(f"{op.name} has no Triton form inside a kernel")

    def elementwise(self, node: Node, operands: list[str]) -> str:
        self.dtype(node)
        if all(i.op is leaf.CONSTANT for i in node.inputs):
            operands = [
                f"tl.full([], {literal(i.attrs.value, DType.F32)}, {self.dtype(i)})"
                for i in node.inputs
            ]
        rule = LOWER[node.op]
        assert not isinstance(rule, str), node.op
        return rule(node, operands)

    def matmul(self, node: Node) -> str:
        a, b = node.inputs
        dtype, rank = node.tensor.dtype, len(node.shape)
        rows, depth = a.shape[-2:]
        columns = b.shape[-1]
        left, right = self.operands(a, b)
        # what one operand's edge hides must vanish in both: 0 * inf is no zero
        edges = [(depth, self.program.sources[n][i]) for n, i in ((a, rank - 1), (b, rank - 2))]
        x = self.zeroed(a, left, [(rank - 1, *e) for e in edges])
        y = self.zeroed(b, right, [(rank - 2, *e) for e in edges])
        if (
            dtype.is_float
            and dtype is not DType.F64
            and min(rows, columns) > 1
            and padded(depth) >= _LEAST_DEPTH
        ):
            return self.dot(node, x, y)
        if prod(block((*node.shape, depth))) > _MOST_ELEMENTS:
            raise CodegenError(f"a product of tiles {a.shape} and {b.shape} is too large")
        wide = {DType.F64: "", DType.I64: "", DType.I32: ""}.get(dtype, ".to(tl.int32)")
        wide = ".to(tl.float32)" if dtype.is_float and dtype is not DType.F64 else wide
        rows_of, columns_of = self.whole(x), self.whole(y)
        text = f"tl.expand_dims({rows_of}, {rank}){wide} * "
        text += f"tl.expand_dims({columns_of}, {rank - 2}){wide}"
        text = f"tl.sum({text}, axis={rank - 1})"
        return f"({text} != 0)" if dtype is DType.BOOL else f"{text}.to({self.dtype(node)})"

    def dot(self, node: Node, x: "_Operand", y: "_Operand") -> str:
        a, b = node.inputs
        m, k, n = block((*a.shape[-2:], b.shape[-1]))
        batch = block(node.shape[:-2])
        count = prod(batch)
        if count == 1:
            left, right = self.matrix(x), self.matrix(y)
        else:
            left = f"tl.broadcast_to({self.whole(x)}, {[*batch, m, k]})"
            right = f"tl.broadcast_to({self.whole(y)}, {[*batch, k, n]})"
            if len(batch) > 1:
                left = f"tl.reshape({left}, {[count, m, k]})"
                right = f"tl.reshape({right}, {[count, k, n]})"
        text = f'tl.dot({left}, {right}, input_precision="{self.config.precision}")'
        if len(batch) > (count > 1):
            text = f"tl.reshape({text}, {block(node.shape)})"
        dtype = node.tensor.dtype
        return text if dtype is DType.F32 else f"{text}.to({self.dtype(node)})"

    def operands(self, a: Node, b: Node) -> "tuple[_Operand, _Operand]":
        """Return the operands of a product, in 16 bits where memory holds no more."""
        left, right = _half(a), _half(b)
        if left is not None and right is not None and left == right:
            return _Operand(a, exact=True), _Operand(b, exact=True)
        return _Operand(a), _Operand(b)

    def whole(self, operand: "_Operand") -> str:
        """Return an operand in its own shape."""
        if operand.text or not operand.exact:
            return operand.text or self.names[operand.node]
        views, node = [], operand.node
        while node.op is not elementwise.CAST:
            views.append(node)
            node = node.inputs[0]
        text = self.names[node.inputs[0]]
        for view in reversed(views):
            text = move(view, [text], self.writer)
        return text

    def matrix(self, operand: "_Operand") -> str:
        """Return an operand whose batch dims are all 1 as a matrix.

        Views of what was loaded are applied to the matrix, so that Triton reads it from shared memory.
        """
        node, swapped, shape = operand.node, False, block(operand.node.shape[-2:])
        if operand.text:
            flat = len(operand.node.shape) == 2
            return operand.text if flat else f"tl.reshape({operand.text}, {shape})"
        while node.op is structural.PERMUTE or (node.op is structural.RESHAPE and is_view(node)):
            if node.op is structural.PERMUTE:
                swapped ^= [p for p in node.attrs.perm if node.inputs[0].shape[p] != 1] != sorted(
                    p for p in node.attrs.perm if node.inputs[0].shape[p] != 1
                )
            node = node.inputs[0]
        if operand.exact and node.op is not elementwise.CAST:
            return f"tl.reshape({self.whole(operand)}, {shape})"
        node = node.inputs[0] if operand.exact else node
        shape = shape[::-1] if swapped else shape
        text = self.names[node]
        if node in self.matrices:
            text = self.matrices[node]
        elif len(node.shape) > 2:
            text = f"tl.reshape({text}, {shape})"
        return f"tl.trans({text})" if swapped else text

    def zeroed(self, node: Node, operand: "_Operand", edges: _Dims) -> "_Operand":
        """Return an operand of a product with zeros where one of the operands does not exist."""
        origin = self.origin(node, edges[0][0])
        if origin is not None:
            load, position = origin
            own = (load.shape[position], self.program.sources[load][position])
            edges = [e for e in edges if e[1:] != own and e[2] is not None]
        if not self.writer.mask(edges, len(node.shape)):
            return operand
        return replace(operand, text=self.masked(node, self.whole(operand), edges, "0"))

    def origin(self, node: Node, position: int) -> tuple[Node, int] | None:
        """Return the load that a tile is a view or copy of, and which of its dims one dim is."""
        while node.op in (elementwise.CAST, structural.PERMUTE):
            if node.op is structural.PERMUTE:
                position = node.attrs.perm[position]
            node = node.inputs[0]
        return (node, position) if node.op is tile.LOAD else None

    def reduced(self, node: Node, axes: list[int]) -> str:
        """Return the operand of a reduction, neutral where it does not exist, in a wide type."""
        (x,) = node.inputs
        sources = self.program.sources[x]
        edges: _Dims = [(i, x.shape[i], sources[i]) for i in axes]
        value = self.masked(x, self.names[x], edges, self.identity(node))
        if x.tensor.dtype in _SMALL:
            return f"({value}).to(tl.int32)"
        return f"({value}).to(tl.float32)" if x.tensor.dtype.is_half else value

    def reduction(self, node: Node) -> str:
        axes = [len(node.shape) + a for a in node.attrs.axes]
        value = self.reduced(node, axes)
        function = "_mul" if node.op in _PRODUCTS else "_min" if node.op in _MINIMA else "_max"
        for axis in axes:
            if node.op in _SUMS:
                value = f"tl.sum({value}, axis={axis}, keep_dims=True)"
            else:
                value = f"tl.reduce({value}, {axis}, {function}, keep_dims=True)"
        if node.tensor.dtype is DType.BOOL:
            return f"({value} != 0)"
        return value if node.tensor.dtype in (DType.F32, DType.F64) else self.cast(value, node)

    def cast(self, text: str, node: Node) -> str:
        return f"({text}).to({self.dtype(node)})"

    def position(self, node: Node) -> str:
        """Return where the extreme stands; PyTorch's finds NaN first, Triton's does not."""
        (x,) = node.inputs
        axis, rank = len(x.shape) + node.attrs.axis, len(x.shape)
        value = self.writer.let("values", self.reduced(node, [axis]))
        index = along(self.writer.local(x.shape[axis]), axis, rank)
        pair = f"({value}, tl.broadcast_to({index}, {block(x.shape)}))"
        function = "_argmin" if node.op is contraction.ARGMIN else "_argmax"
        best, at = self.writer.name("best"), self.writer.name("at")
        reduced = f"tl.reduce({pair}, {axis}, {function}, keep_dims=True)"
        self.writer.put(f"{best}, {at} = {reduced}")
        return f"{at}.to({self.dtype(node)})"

    def scan(self, node: Node) -> str:
        (x,) = node.inputs
        axis, kind = len(x.shape) + node.attrs.axis, node.attrs.kind
        value = self.names[x]
        if x.tensor.dtype in _SMALL or x.tensor.dtype.is_half:
            value = f"{value}.to({'tl.float32' if x.tensor.dtype.is_half else 'tl.int32'})"
        if kind in ("sum", "prod"):
            text = f"tl.cum{kind}({value}, {axis})"
        else:
            text = f"tl.associative_scan({value}, {axis}, _{kind})"
        return f"({text} != 0)" if node.tensor.dtype is DType.BOOL else self.cast(text, node)

    # -- memory --------------------------------------------------------------------------------

    def load(self, node: Node) -> None:
        (x,) = node.inputs
        self.dtype(node)
        strides = x.tensor.element_strides
        wide = [i for i, dim in enumerate(node.attrs.dims) if dim.tile > 1]
        is_matrix = len(wide) == 2 < len(node.shape)
        kept = wide if is_matrix else list(range(len(node.shape)))
        pointer, mask = self.address(node.attrs.dims, x.shape, strides, kept)
        other = f", mask={mask}{', other=0' if node in self.filled else ''}" if mask else ""
        self.define(node, f"tl.load({self.pointers[x]} + {pointer}{other})", x.attrs.name)
        if is_matrix:
            # products read it as it is; a dim of 1 would keep Triton from that
            self.matrices[node] = self.names[node]
            self.names[node] = f"tl.reshape({self.names[node]}, {block(node.shape)})"

    def store(self, node: Node) -> None:
        attrs, (x,) = node.attrs, node.inputs
        strides, kept = contiguous_strides(attrs.shape), list(range(len(attrs.dims)))
        pointer, mask = self.address(attrs.dims, attrs.shape, strides, kept)
        value = self.names[x]
        if x.op is leaf.CONSTANT:
            value = f"tl.full({block(node.inputs[0].shape)}, {value}, {self.dtype(x)})"
        for i, output in enumerate(self.graph.outputs):
            if output is node:
                tail = f", mask={mask}" if mask else ""
                self.writer.put(f"tl.store({self.results[i]} + {pointer}, {value}{tail})")

    def address(
        self,
        dims: tuple[tile.DimMap, ...],
        shape: tuple[int, ...],
        strides: tuple[int, ...],
        kept: list[int],
    ) -> tuple[str, str]:
        """Return offsets of a tile's elements, and which of them exist, in a block of the `kept` dims."""
        rank = len(kept)
        far = sum(max(d.padded - 1, 0) * s for d, s in zip(dims, strides, strict=True)) >= 1 << 31
        terms = []
        for i, (dim, stride) in enumerate(zip(dims, strides, strict=True)):
            index = self.writer.index(dim)
            if dim.tile > 1:
                index = along(index, kept.index(i), rank)
            elif index == "0":
                continue
            wide = f"tl.cast({index}, tl.int64)" if far else index
            terms.append(wide if stride == 1 else f"{wide} * {stride}")
        if rank and all(d.tile == 1 for d in dims):
            terms.append(along(self.writer.local(1), 0, rank))
        edges: _Dims = [
            (kept.index(i) if i in kept else 0, dim.tile, DimSource(dim, extent))
            for i, (dim, extent) in enumerate(zip(dims, shape, strict=True))
        ]
        return " + ".join(terms) or "0", self.writer.mask(edges, rank)

    def masked(self, node: Node, value: str, edges: _Dims, otherwise: str) -> str:
        """Return a tile with `otherwise` at positions that do not exist along some dims."""
        rank = len(node.shape)
        mask = self.writer.mask(edges, rank)
        if not mask:
            return value
        if not value.isidentifier():
            value = self.writer.let("value", value)
        # a full block keeps the tile's type: a literal 0 would be widened otherwise
        fill = f"tl.full({[1] * rank}, {otherwise}, {value}.dtype)"
        return f"tl.where({mask}, {value}, {fill})"

    def dtype(self, node: Node) -> str:
        if node.tensor.dtype not in TYPES:
            raise CodegenError(f"{node.tensor.dtype} tiles have no Triton form")
        return TYPES[node.tensor.dtype]
