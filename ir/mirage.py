"""Importer of the μGraphs that Mirage writes (JSON, `mirage-project/mirage`, saved_mugraphs).

In: the text of a file: a list of graphs, each a topologically ordered list of operators linked by
the `guid` of their tensors. Out: one kernel graph per entry, custom kernels as `custom` nodes with
block graphs. Format facts: mirage `src/kernel/graph.cc` (to_json) as of commit e8980e19; older
files say `tb_accum_…` for `tb_forloop_accum_…`. Data types are not read: every tensor becomes f16.

Anything that is not such a file raises `ParseError`.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any, final

from superopt.ir import build as b
from superopt.ir.errors import GraphError, ParseError
from superopt.ir.graph import Axis, Graph, Level
from superopt.ir.node import Node, make
from superopt.ir.ops import contraction, tile
from superopt.ir.types import DType

LOOP = "loop"
_GRID = ("x", "y", "z")


def read_mirage(text: str) -> list[Graph]:
    """Read every graph of a file.

    Raises:
        ParseError: the text is not JSON, or not graphs of this format; the message names the operator.
    """
    try:
        entries = json.loads(text)
    except json.JSONDecodeError as error:
        line = text.splitlines()[error.lineno - 1] if text else ""
        shown = line[max(0, error.colno - 40) : error.colno + 40]
        raise ParseError(f"not JSON: {error.msg}", error.lineno, error.colno, shown) from None
    if not isinstance(entries, list):
        raise _damaged("a list of graphs", entries)
    return [_read_graph(entry, f"mirage_{index}") for index, entry in enumerate(entries)]


def _damaged(expected: str, found: object) -> ParseError:
    return ParseError(f"expected {expected}", 1, 1, json.dumps(found)[:160])


def _get(operator: Any, key: str, wanted: type) -> Any:
    if not isinstance(operator, dict) or key not in operator:
        raise _damaged(f"a field {key!r}", operator)
    value = operator[key]
    if not isinstance(value, wanted) or (wanted is int and isinstance(value, bool)):
        raise _damaged(f"{key!r} to be of type {wanted.__name__}", operator)
    return value


def _shape(tensor: Any) -> tuple[int, ...]:
    dims, rank = _get(tensor, "dim", list), _get(tensor, "num_dims", int)
    if not 1 <= rank <= len(dims) or not all(isinstance(d, int) and d > 0 for d in dims[:rank]):
        raise _damaged("positive dims", tensor)
    return tuple(dims[:rank])


@final
@dataclass(slots=True)
class _Scope:
    """Tensors defined so far, by guid."""

    values: dict[int, Node] = field(default_factory=dict)

    def operands(self, operator: Any) -> list[Node]:
        found = []
        for tensor in _get(operator, "input_tensors", list):
            guid = _get(tensor, "guid", int)
            if guid not in self.values:
                raise _damaged(f"tensor {guid} to be defined before its use", operator)
            found.append(self.values[guid])
            if found[-1].shape != _shape(tensor):
                raise _damaged(f"tensor {guid} to have shape {found[-1].shape}", operator)
        return found

    def define(self, operator: Any, results: Sequence[Node]) -> None:
        tensors = _get(operator, "output_tensors", list)
        if len(tensors) != len(results):
            raise _damaged(f"{len(results)} output tensors", operator)
        for tensor, node in zip(tensors, results, strict=True):
            if _shape(tensor) != node.shape:
                raise _damaged(f"the result to have shape {node.shape}", operator)
            self.values[_get(tensor, "guid", int)] = node


def _read_graph(entry: Any, name: str) -> Graph:
    if not isinstance(entry, list):
        raise _damaged("a list of operators", entry)
    scope = _Scope()
    inputs: list[Node] = []
    outputs: list[Node] = []
    for operator in entry:
        kind = _get(operator, "op_type", str)
        try:
            if kind == "kn_input_op":
                node = _input(operator, len(inputs))
                inputs.append(node)
                scope.define(operator, [node])
            elif kind == "kn_output_op":
                outputs += scope.operands(operator)
            elif kind == "kn_customized_op":
                scope.define(operator, _customized(operator, scope, f"{name}_kernel"))
            else:
                scope.define(operator, [_apply(kind, "kn_", operator, scope.operands(operator))])
        except GraphError as error:
            raise _damaged(f"a legal {kind} ({error})", operator) from None
    if not outputs:
        raise _damaged("at least one kn_output_op", entry)
    return b.kernel_graph(name, inputs, outputs)


def _input(operator: Any, index: int) -> Node:
    tensors = _get(operator, "output_tensors", list)
    if len(tensors) != 1:
        raise _damaged("one output tensor", operator)
    strides = _get(operator, "input_strides", list)
    shape = _shape(tensors[0])
    if len(strides) != len(shape) or not all(isinstance(s, int) for s in strides):
        raise _damaged("a stride per dim", operator)
    return b.input_(f"input{index}", shape, DType.F16, strides=tuple(strides))


# -- operators that exist at both levels -----------------------------------------------------------


def _silu(x: Node) -> Node:
    return b.mul(x, b.sigmoid(x))


def _gelu(x: Node) -> Node:
    return b.mul(b.mul(x, 0.5), b.add(b.erf(b.mul(x, 0.7071067811865476)), 1.0))


def _rms(x: Node) -> Node:
    return b.sqrt(b.mean(b.mul(x, x), -1))


_COMMON: dict[str, Callable[..., Node]] = {
    "matmul": b.matmul,
    "exp": b.exp,
    "square": lambda x: b.mul(x, x),
    "sqrt": b.sqrt,
    "silu": _silu,
    "gelu": _gelu,
    "relu": lambda x: b.maximum(x, 0.0),
    "add": b.add,
    "sub": b.sub,
    "mul": b.mul,
    "div": b.div,
    "pow": b.pow_,
    "rms_norm": lambda x: b.div(x, _rms(x)),
    "concat_0": lambda *parts: b.concat(parts, 0),
    "concat_1": lambda *parts: b.concat(parts, 1),
    "concat_2": lambda *parts: b.concat(parts, 2),
    "reduction_0": lambda x: b.reduce_sum(x, 0),
    "reduction_1": lambda x: b.reduce_sum(x, 1),
    "reduction_2": lambda x: b.reduce_sum(x, 2),
}


def _apply(kind: str, prefix: str, operator: Any, operands: list[Node]) -> Node:
    name = kind.removeprefix(prefix).removesuffix("_op")
    rule = _COMMON.get(name) if kind == f"{prefix}{name}_op" else None
    if rule is None:
        raise _damaged(f"a known operator instead of {kind!r}", operator)
    try:
        return rule(*operands)
    except TypeError:
        raise _damaged(f"another number of operands for {kind}", operator) from None


# -- custom kernels --------------------------------------------------------------------------------


@final
@dataclass(slots=True)
class _Block:
    """The axes of one custom kernel and what accumulators need to know."""

    grid: dict[str, int]
    iterations: int
    reduction: int

    def maps(self, shape: tuple[int, ...], split: dict[str, int], looped: int) -> list[Any]:
        """Return the index map of every dim: grid axes first, then the loop inside the part."""
        maps = []
        for axis, extent in enumerate(shape):
            axes = [(n, c) for n, c in self.grid.items() if split.get(n, -1) == axis and c > 1]
            if looped == axis:
                axes.append((LOOP, self.iterations))
            parts = prod(count for _, count in axes)
            if extent % parts:
                raise GraphError(f"dim {axis} of {extent} elements does not split into {parts}")
            maps.append(tile.DimMap(tuple(axes), extent // parts))
        return maps


def _customized(operator: Any, scope: _Scope, name: str) -> tuple[Node, ...]:
    operands = scope.operands(operator)
    described = _get(operator, "bgraph", dict)
    sizes = _get(described, "grid_dim", dict)
    block = _Block(
        {n: _get(sizes, n, int) for n in _GRID},
        _get(described, "forloop_range", int),
        described.get("reduction_dimx", 64),
    )
    if min(*block.grid.values(), block.iterations) < 1:
        raise _damaged("positive grid and loop counts", sizes)
    inputs: list[Node] = []
    outputs: list[Node] = []
    inner = _Scope()
    for step in _get(described, "operators", list):
        kind = _get(step, "op_type", str)
        if kind == "tb_input_op":
            if len(inputs) == len(operands):
                raise _damaged(f"at most {len(operands)} tb_input_op", step)
            inputs.append(b.input_(f"input{len(inputs)}", operands[len(inputs)].shape, DType.F16))
            inner.define(step, [_load(step, inputs[-1], block)])
        elif kind == "tb_output_op":
            outputs.append(_store(step, inner, block))
        else:
            inner.define(step, [_body(kind, step, inner.operands(step), block)])
    if len(inputs) != len(operands) or not outputs:
        raise _damaged("a tb_input_op per input and a tb_output_op", operator)
    grid = tuple(Axis(n, c) for n, c in block.grid.items() if c > 1)
    loops = (Axis(LOOP, block.iterations),)
    graph = Graph(Level.BLOCK, name, tuple(inputs), tuple(outputs), grid, loops)
    return b.apply_graph(graph, operands)


def _axis_map(step: Any, key: str) -> dict[str, int]:
    found = _get(step, key, dict)
    return {name: _get(found, name, int) for name in _GRID}


def _load(step: Any, source: Node, block: _Block) -> Node:
    if _shape(_get(step, "dtensor", dict)) != source.shape:
        raise _damaged(f"an input of shape {source.shape}", step)
    maps = block.maps(source.shape, _axis_map(step, "input_map"), _get(step, "forloop_dim", int))
    return make(tile.LOAD, (source,), tile.LoadAttrs(tuple(maps)))


def _store(step: Any, inner: _Scope, block: _Block) -> Node:
    (value,) = inner.operands(step)
    shape = _shape(_get(step, "dtensor", dict))
    maps = block.maps(shape, _axis_map(step, "output_map"), -1)
    return make(tile.STORE, (value,), tile.StoreAttrs(tuple(maps), shape))


def _body(kind: str, step: Any, operands: list[Node], block: _Block) -> Node:
    for prefix in ("tb_forloop_accum_", "tb_accum_"):
        if kind.startswith(prefix):
            if len(operands) != 1:
                raise _damaged(f"one operand for {kind}", step)
            return _accumulate(
                kind.removeprefix(prefix).removesuffix("_op"), step, operands[0], block
            )
    return _apply(kind, "tb_", step, operands)


def _accumulate(kind: str, step: Any, x: Node, block: _Block) -> Node:
    count = float(x.shape[-1] * block.iterations)
    if kind == "nored":
        return b.accum_sum(x, LOOP)
    if kind == "red_ld_sum":
        return b.accum_sum(b.reduce_sum(x, -1), LOOP)
    if kind == "red_ld_mean":
        return b.div(b.accum_sum(b.reduce_sum(x, -1), LOOP), count)
    if kind == "red_ld_rms":
        squares = b.accum_sum(b.reduce_sum(b.mul(x, x), -1), LOOP)
        return b.sqrt(b.div(squares, count))
    if kind == "redtox_ld_sum":
        kept = block.reduction
        if not isinstance(kept, int) or kept < 1 or x.shape[-1] % kept:
            raise _damaged(f"a reduction_dimx that divides {x.shape[-1]}", step)
        parts = b.reshape(x, (*x.shape[:-1], x.shape[-1] // kept, kept))
        total = b.reduce(contraction.REDUCE_SUM, parts, -2)
        return b.accum_sum(b.reshape(total, (*x.shape[:-1], kept)), LOOP)
    if kind == "max":
        return b.accumulate(tile.ACCUM_MAX, x, LOOP)
    raise _damaged(f"a known accumulator instead of {kind!r}", step)
