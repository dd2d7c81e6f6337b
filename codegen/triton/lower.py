"""Block graphs to Triton: one program per block, tiles padded to powers of two.

In: a block graph and a `TritonConfig`. Out: `Source`: the text of a Python module with the kernel
and a launcher `run(*inputs) -> outputs`. Meaning: `superopt.ir.semantics`. Positions that do not
exist (padding, ragged edges) hold anything and are masked where tiles are reduced, contracted,
accumulated or stored.
"""

import re
from dataclasses import dataclass
from math import prod
from typing import final

from superopt.codegen.errors import CodegenError
from superopt.codegen.tile_program import Compute, Item, Loop, TileProgram, tile_program
from superopt.codegen.triton.expressions import LOWER, TYPES, literal
from superopt.ir.graph import Axis, Graph
from superopt.ir.node import Node
from superopt.ir.ops import contraction, elementwise, leaf, structural, tile
from superopt.ir.ops.registry import OpKind
from superopt.ir.types import DType, contiguous_strides

_HALF = (DType.F16, DType.BF16)
_MOST_ELEMENTS = 1 << 20
_SUMS = (contraction.REDUCE_SUM, tile.ACCUM_SUM, tile.ACCUM_RESCALED)
_PRODUCTS = (contraction.REDUCE_PROD, tile.ACCUM_PROD)
_MAXIMA = (contraction.REDUCE_MAX, tile.ACCUM_MAX, tile.PREFIX_MAX)
_MINIMA = (contraction.REDUCE_MIN, tile.ACCUM_MIN)
_HELPERS = """
@triton.jit
def _max(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _min(a, b):
    return tl.minimum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _mul(a, b):
    return a * b
"""


@final
@dataclass(frozen=True, slots=True)
class TritonConfig:
    """Launch parameters: warps per block and software pipelining depth of loops."""

    warps: int = 4
    stages: int = 2


@final
@dataclass(frozen=True, slots=True)
class Source:
    """Text of a module that defines `symbol` (the kernel) and `run(*inputs)`."""

    text: str
    symbol: str
    pointers: tuple[str, ...]
    config: TritonConfig


def configs(graph: Graph, target: object = None) -> list[TritonConfig]:
    """List launch parameters to try, the most promising first."""
    stages = (2, 3, 4) if graph.loops else (1,)
    return [TritonConfig(w, s) for s in stages for w in (4, 8, 2)]


def lower(graph: Graph, config: TritonConfig, name: str) -> Source:
    """Lower a block graph.

    Raises:
        CodegenError: an op or a combination of loops has no Triton form here; the caller keeps
            the library's kernel.
    """
    return _Kernel(tile_program(graph), config, re.sub(r"\W", "_", name)).source()


def _word(name: str) -> str:
    return re.sub(r"\W", "_", name)


@final
class _Kernel:
    def __init__(self, program: TileProgram, config: TritonConfig, name: str) -> None:
        self.program = program
        self.graph = program.graph
        self.config = config
        self.name = name
        self.lines: list[str] = []
        self.indent = "    "
        self.names: dict[Node, str] = {}
        # tl.dot wants at least 16 along every dim
        nodes = list(self.graph.nodes())
        self.least = 16 if any(n.op is contraction.MATMUL for n in nodes) else 1
        self.axes = {a.name: f"i_{_word(a.name)}" for a in (*self.graph.grid, *self.graph.loops)}
        self.pointers = {n: f"{_word(n.attrs.name)}_ptr" for n in self.graph.inputs}

    # -- the frame -----------------------------------------------------------------------------

    def source(self) -> Source:
        graph = self.graph
        divisor = 1
        for axis in reversed(graph.grid):
            self.put(f"{self.axes[axis.name]} = tl.program_id(0) // {divisor} % {axis.count}")
            divisor *= axis.count
        self.items(self.program.items)
        outputs = [f"out{i}_ptr" for i in range(len(graph.outputs))]
        parameters = [*self.pointers.values(), *outputs]
        header = [f"{self.name}: generated from the block graph {graph.digest()[:16]}", ""]
        header += ["    " + line for line in str(graph).splitlines()]
        header.append("    regenerate: superopt.codegen.triton.lower(parse_graph(text), config)")
        text = ['r"""' + "\n".join(header), '"""', "", "import torch", "import triton"]
        text += ["import triton.language as tl", "", _HELPERS, "", "@triton.jit"]
        text += [f"def {self.name}({', '.join(parameters)}):", *self.lines, "", ""]
        text += self.launcher(parameters)
        types = tuple(n.tensor.dtype.value for n in (*graph.inputs, *graph.outputs))
        return Source("\n".join(text) + "\n", self.name, types, self.config)

    def launcher(self, parameters: list[str]) -> list[str]:
        inputs = [p.removesuffix("_ptr") for p in parameters[: len(self.graph.inputs)]]
        lines = [f"def run({', '.join(inputs)}):", f'    """Launch {self.name}."""']
        device = f"{inputs[0]}.device" if inputs else '"cuda"'
        made = []
        for i, node in enumerate(self.graph.outputs):
            dtype = TYPES[node.tensor.dtype].removeprefix("tl.")
            dtype = {"int1": "bool"}.get(dtype, dtype)
            made.append(f"out{i}")
            shape = f"{node.shape!r}, dtype=torch.{dtype}, device={device}"
            lines.append(f"    out{i} = torch.empty({shape})")
        blocks = prod(a.count for a in self.graph.grid)
        options = f"num_warps={self.config.warps}, num_stages={self.config.stages}"
        lines.append(f"    {self.name}[({blocks},)]({', '.join([*inputs, *made])}, {options})")
        return [*lines, f"    return [{', '.join(made)}]"]

    def put(self, line: str) -> None:
        self.lines.append(self.indent + line)

    def define(self, node: Node, text: str, stem: str = "v") -> None:
        self.names[node] = f"{stem}{len(self.names)}"
        self.put(f"{self.names[node]} = {text}")

    def items(self, items: tuple[Item, ...]) -> None:
        for item in items:
            if isinstance(item, Loop):
                self.loop(item)
            else:
                self.compute(item)

    # -- loops ---------------------------------------------------------------------------------

    def loop(self, loop: Loop) -> None:
        for state in loop.states:
            start = self.identity(state)
            shape = self.shape(state.shape)
            self.define(state, f"tl.full({shape}, {start}, {self.dtype(state)})", "acc")
        low, high = self.limits(loop.axis)
        self.put(f"for {self.axes[loop.axis.name]} in range({low}, {high}):")
        self.indent += "    "
        self.items(loop.body)
        self.indent = self.indent[:-4]

    def limits(self, axis: Axis) -> tuple[str, str]:
        low, high = "0", str(axis.count)
        for bound in axis.bounds:
            factor = sum(c for n, c in bound.terms if n == axis.name)
            rest = [f"{self.axes[n]} * {c}" for n, c in bound.terms if n != axis.name]
            total = " + ".join([*rest, str(bound.constant)])
            if not rest:
                total = f"(i_zero + {total})"
                self.put("i_zero = tl.program_id(0) * 0")
            if factor < 0:
                high = f"tl.minimum({high}, tl.maximum({total} + {-factor}, 0) // {-factor})"
            elif factor > 0:
                low = f"tl.maximum({low}, tl.maximum({factor - 1} - ({total}), 0) // {factor})"
            else:
                high = f"tl.where({total} >= 0, {high}, 0)"
        return low, high

    def identity(self, node: Node) -> str:
        op, dtype = node.op, node.tensor.dtype
        if op in _SUMS or (op is tile.ACCUM_LAST and node.inputs[0].op is not tile.PREFIX_MAX):
            return "0"
        if op in _PRODUCTS:
            return "1"
        low = op not in _MINIMA
        if dtype.is_float:
            return literal(float("-inf") if low else float("inf"))
        if dtype is DType.BOOL:
            return "0" if low else "1"
        if dtype is DType.U8:
            return "0" if low else "255"
        bits = dtype.size_bytes * 8 - 1
        return str(-(2**bits) if low else 2**bits - 1)

    def accumulate(self, node: Node) -> None:
        op, state, loop = node.op, self.names[node], node.attrs.loop
        value = self.names[node.inputs[0]]
        if node.tensor.dtype is DType.BOOL:
            raise CodegenError(f"{op.name} of bool tiles has no Triton form; cast first")
        if op is tile.ACCUM_LAST:
            if self.graph.axis(loop).bounds and node.inputs[0].op is not tile.PREFIX_MAX:
                raise CodegenError("accum_last of a bounded loop: its last iteration may not run")
            self.put(f"{state} = {value}")
            return
        if op is not tile.PREFIX_MAX:
            for i, source in enumerate(self.program.sources[node.inputs[0]]):
                if source is not None and any(a == loop for a, _ in source.map.axes):
                    value = self.masked(node.inputs[0], value, [i], self.identity(node))
        if op is tile.ACCUM_RESCALED:
            self.rescale(node, state, value)
        elif op is tile.PREFIX_MAX:
            self.put(f"{state}_before = {state}")
            self.put(f"{state} = _max({state}, {value})")
        elif op in _MAXIMA or op in _MINIMA:
            self.put(f"{state} = {'_max' if op in _MAXIMA else '_min'}({state}, {value})")
        else:
            self.put(f"{state} = {state} {'*' if op in _PRODUCTS else '+'} {value}")

    def rescale(self, node: Node, state: str, value: str) -> None:
        shift = node.inputs[1]
        if shift.op is not tile.PREFIX_MAX or shift.attrs.loop != node.attrs.loop:
            raise CodegenError("accum_rescaled needs the prefix_max of its own loop as shift")
        now = self.names[shift]
        finite = f'tl.where({now} > float("-inf"), {now}, 0.0)'
        power = f"{float(node.attrs.power)} * "
        # the value so far is relative to the maximum before this iteration
        self.put(f"{state}_scale = tl.exp({power}({now}_before - {finite}))")
        self.put(f"{state}_now = tl.exp({power}({now} - {finite}))")
        self.put(f"{state} = {state} * {state}_scale + {value} * {state}_now")

    # -- values --------------------------------------------------------------------------------

    def compute(self, item: Compute) -> None:
        node, op = item.node, item.node.op
        if op is leaf.CONSTANT:
            self.names[node] = literal(node.attrs.value)
        elif op is tile.LOAD:
            pointer, mask = self.address(node.inputs[0], node.attrs.dims, node.inputs[0].shape)
            text = f"{self.pointers[node.inputs[0]]} + {pointer}"
            other = f", mask={mask}, other=0" if mask else ""
            self.define(node, f"tl.load({text}{other})", f"{_word(node.inputs[0].attrs.name)}_")
        elif op is tile.STORE:
            self.store(node)
        elif op is tile.TILE_INDEX:
            dim = node.attrs.dim
            index = f"{self.offset(dim)} + {self.range(dim.tile, 0, 1)}"
            self.define(node, f"({index}).to({self.dtype(node)})", "index")
        elif op.kind is OpKind.TILE:
            self.accumulate(node)
        elif op is contraction.MATMUL:
            self.define(node, self.matmul(node))
        elif op.kind is OpKind.REDUCTION:
            self.define(node, self.reduction(node))
        elif op.kind is OpKind.ELEMENTWISE:
            if all(i.op is leaf.CONSTANT for i in node.inputs):
                raise CodegenError(f"{op.name} of constants: fold it first")
            self.define(node, LOWER[op](node, [self.names[i] for i in node.inputs]))
        else:
            self.define(node, self.structural(node))

    def structural(self, node: Node) -> str:
        shape = self.shape(node.shape)
        if node.op is structural.PERMUTE:
            return f"tl.permute({self.names[node.inputs[0]]}, {node.attrs.perm})"
        if node.op is structural.BROADCAST:
            return f"tl.broadcast_to({self.names[node.inputs[0]]}, {shape})"
        if node.op is structural.RESHAPE:
            (x,) = node.inputs
            if not x.shape:
                return f"tl.full({shape}, {self.names[x]}, {self.dtype(node)})"
            squeezed = [d for d in x.shape if d != 1] == [d for d in node.shape if d != 1]
            if not squeezed and (self.shape(x.shape) != list(x.shape) or shape != [*node.shape]):
                raise CodegenError(f"reshape of a padded tile {x.shape} to {node.shape}")
            return f"tl.reshape({self.names[x]}, {shape})"
        raise CodegenError(f"{node.op.name} has no Triton form inside a kernel")

    def matmul(self, node: Node) -> str:
        a, b = node.inputs
        dtype = node.tensor.dtype
        rows, depth = a.shape[-2:]
        columns = b.shape[-1]
        left, right = self.half(a), self.half(b)
        if left is None or right is None or left[1] is not right[1]:
            left, right = (self.names[a], a.tensor.dtype), (self.names[b], b.tensor.dtype)
        rank = len(node.shape)
        x = self.masked(a, left[0], [rank - 1], "0")
        y = self.masked(b, right[0], [rank - 2], "0")
        single = prod(a.shape[:-2]) == prod(b.shape[:-2]) == 1
        if dtype.is_float and dtype is not DType.F64 and single and min(rows, depth, columns) > 1:
            m, k, n = self.shape((rows, depth, columns))
            if rank > 2:
                x, y = f"tl.reshape({x}, [{m}, {k}])", f"tl.reshape({y}, [{k}, {n}])"
            text = f'tl.dot({x}, {y}, input_precision="ieee")'
            if rank > 2:
                text = f"tl.reshape({text}, {self.shape(node.shape)})"
            return text if dtype is DType.F32 else f"{text}.to({self.dtype(node)})"
        if prod(self.shape((*node.shape, depth))) > _MOST_ELEMENTS:
            raise CodegenError(f"a product of tiles {a.shape} and {b.shape} is too large")
        wide = ".to(tl.float32)" if dtype in _HALF or left[1] in _HALF else ""
        text = f"tl.expand_dims({x}, {rank}){wide} * tl.expand_dims({y}, {rank - 2}){wide}"
        text = f"tl.sum({text}, axis={rank - 1})"
        return f"{text}.to({self.dtype(node)})"

    def half(self, node: Node) -> tuple[str, DType] | None:
        """Return the 16-bit tile that `node` is an exact float32 copy of, for tensor cores."""
        if node.op is elementwise.CAST and node.inputs[0].tensor.dtype in _HALF:
            return self.names[node.inputs[0]], node.inputs[0].tensor.dtype
        if node.op is structural.PERMUTE:
            below = self.half(node.inputs[0])
            if below is not None:
                return f"tl.permute({below[0]}, {node.attrs.perm})", below[1]
        return None

    def reduction(self, node: Node) -> str:
        (x,) = node.inputs
        if node.op in (contraction.ARGMAX, contraction.ARGMIN):
            raise CodegenError(f"{node.op.name}: Triton's does not put NaN first as PyTorch does")
        axes = sorted(len(x.shape) + a for a in node.attrs.axes)
        logical = x.tensor.dtype is DType.BOOL
        value = self.masked(x, self.names[x], axes, self.identity(node))
        if logical:
            value = f"({value}).to(tl.int32)"
        elif x.tensor.dtype in _HALF:
            value = f"({value}).to(tl.float32)"
        for axis in axes:
            if node.op in _SUMS:
                value = f"tl.sum({value}, axis={axis}, keep_dims=True)"
            else:
                combine = {True: "_max", False: "_min"}[node.op not in _MINIMA]
                combine = "_mul" if node.op in _PRODUCTS else combine
                value = f"tl.reduce({value}, {axis}, {combine}, keep_dims=True)"
        if logical:
            return f"({value} != 0)"
        return f"{value}.to({self.dtype(node)})"

    def store(self, node: Node) -> None:
        attrs = node.attrs
        pointer, mask = self.address(node, attrs.dims, attrs.shape)
        value = self.names[node.inputs[0]]
        for i, output in enumerate(self.graph.outputs):
            if output is node:
                tail = f", mask={mask}" if mask else ""
                self.put(f"tl.store(out{i}_ptr + {pointer}, {value}{tail})")

    # -- indices and masks ---------------------------------------------------------------------

    def dtype(self, node: Node) -> str:
        if node.tensor.dtype not in TYPES:
            raise CodegenError(f"{node.tensor.dtype} tiles have no Triton form")
        return TYPES[node.tensor.dtype]

    def padded(self, size: int) -> int:
        return 1 if size == 1 else max(self.least, 1 << (size - 1).bit_length())

    def shape(self, shape: tuple[int, ...]) -> list[int]:
        return [self.padded(d) for d in shape]

    def range(self, size: int, position: int, rank: int) -> str:
        text = f"tl.arange(0, {self.padded(size)})"
        if rank == 1:
            return text
        return f"{text}[{', '.join(':' if i == position else 'None' for i in range(rank))}]"

    def offset(self, dim: tile.DimMap) -> str:
        terms, stride = [], dim.tile
        for name, count in reversed(dim.axes):
            terms.append(f"{self.axes[name]} * {stride}")
            stride *= count
        return " + ".join(reversed(terms)) or "0"

    def address(
        self, node: Node, dims: tuple[tile.DimMap, ...], shape: tuple[int, ...]
    ) -> tuple[str, str]:
        type_ = node.tensor
        strides = contiguous_strides(shape) if node.op is tile.STORE else type_.element_strides
        wide = sum(max(d - 1, 0) * s for d, s in zip(shape, strides, strict=True)) >= 1 << 31
        terms, masks = [], []
        for i, (dim, extent) in enumerate(zip(dims, shape, strict=True)):
            local = self.range(dim.tile, i, len(dims))
            index = f"({self.offset(dim)} + {local})"
            terms.append(f"{index}{'.to(tl.int64)' if wide else ''} * {strides[i]}")
            masks += self.conditions(dim.tile, local, index, extent, dim.padded > extent)
        return " + ".join(terms) or "0", " & ".join(masks)

    def conditions(self, size: int, local: str, index: str, extent: int, ragged: bool) -> list[str]:
        found = [f"({local} < {size})"] if self.padded(size) != size else []
        return [*found, f"({index} < {extent})"] if ragged else found

    def masked(self, node: Node, value: str, dims: list[int], otherwise: str) -> str:
        masks: list[str] = []
        rank = len(node.shape)
        for i in dims:
            source = self.program.sources[node][i]
            local = self.range(node.shape[i], i, rank)
            index, extent, ragged = local, 0, False
            if source is not None and source.ragged:
                index, extent, ragged = (
                    f"({self.offset(source.map)} + {local})",
                    source.extent,
                    True,
                )
            masks += self.conditions(node.shape[i], local, index, extent, ragged)
        if not masks:
            return value
        # a full mask keeps the tile's type: a literal 0 would be widened otherwise
        return (
            f"tl.where({' & '.join(masks)}, {value}, tl.full([1] * {rank}, {otherwise}, "
            f"{value}.dtype))"
        )
