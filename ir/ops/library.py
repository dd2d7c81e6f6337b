"""Library operators (run as one library kernel), opaque PyTorch nodes, and graph-valued nodes."""

from dataclasses import dataclass
from typing import Literal, final

from superopt.ir.errors import GraphError
from superopt.ir.graph import Graph
from superopt.ir.ops.registry import Op, OpKind, declare
from superopt.ir.ops.shapes import broadcast_shapes, elements, same_dtype, tensor
from superopt.ir.types import TensorType, TupleType, Type


@final
@dataclass(frozen=True, slots=True)
class ConvAttrs:
    """Convolution over the last `len(stride)` dims; x: [N, C, …], weight as in torch."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    transposed: bool
    output_padding: tuple[int, ...]
    groups: int


@final
@dataclass(frozen=True, slots=True)
class PoolAttrs:
    """Pooling over the last `len(kernel)` dims; average counts padding if `include_pad`."""

    kind: Literal["max", "avg"]
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    ceil_mode: bool
    include_pad: bool
    divisor: int | None = None


@final
@dataclass(frozen=True, slots=True)
class OpaqueAttrs:
    """A PyTorch operator kept as it is.

    `target` is its qualified name (`aten.topk.default`); `arguments` is JSON with `{"t": i}` where
    operand i goes; `result` is the type it returns.
    """

    target: str
    arguments: str
    result: TensorType | TupleType


@final
@dataclass(frozen=True, slots=True)
class GraphAttrs:
    """The graph that a node applies: a block graph (`custom`) or a thread graph (`thread`)."""

    graph: Graph


def conv_type(types: tuple[Type, ...], attrs: ConvAttrs) -> Type:
    """Return the type of a convolution's result."""
    x, weight = (tensor(t) for t in types)
    spatial = len(attrs.stride)
    if x.rank != spatial + 2 or weight.rank != spatial + 2:
        raise GraphError(f"operands need rank {spatial + 2}, got {x.rank} and {weight.rank}")
    channels = weight.shape[1] * attrs.groups if attrs.transposed else weight.shape[0]
    inner = weight.shape[0] if attrs.transposed else weight.shape[1] * attrs.groups
    if inner != x.shape[1]:
        raise GraphError(f"the weight takes {inner} channels, the operand has {x.shape[1]}")
    dims = []
    for i in range(spatial):
        reach = attrs.dilation[i] * (weight.shape[2 + i] - 1)
        size = x.shape[2 + i]
        if attrs.transposed:
            grown = (size - 1) * attrs.stride[i] - 2 * attrs.padding[i] + reach
            dims.append(grown + attrs.output_padding[i] + 1)
        else:
            dims.append((size + 2 * attrs.padding[i] - reach - 1) // attrs.stride[i] + 1)
    return TensorType((x.shape[0], channels, *dims), same_dtype([x, weight]))


def conv_flops(types: tuple[Type, ...], result: Type) -> int:
    """Return how many multiplications and additions a convolution takes."""
    weight = tensor(types[1])
    return 2 * elements(result) * weight.elements // max(1, weight.shape[0])


def _pool(types: tuple[Type, ...], attrs: PoolAttrs) -> Type:
    x = tensor(types[0])
    n = len(attrs.kernel)
    if x.rank < n + 1:
        raise GraphError(f"needs rank of at least {n + 1}, got {x.rank}")
    dims = []
    for i, size in enumerate(x.shape[-n:]):
        span = size + 2 * attrs.padding[i] - attrs.dilation[i] * (attrs.kernel[i] - 1) - 1
        stride = attrs.stride[i]
        count = (-(-span // stride) if attrs.ceil_mode else span // stride) + 1
        if attrs.ceil_mode and (count - 1) * stride >= size + attrs.padding[i]:
            count -= 1
        dims.append(count)
    return x.with_shape((*x.shape[:-n], *dims))


def _opaque(types: tuple[Type, ...], attrs: OpaqueAttrs) -> Type:
    return attrs.result


def _graph(types: tuple[Type, ...], attrs: GraphAttrs) -> Type:
    graph = attrs.graph
    if len(types) != len(graph.inputs):
        raise GraphError(f"graph {graph.name} takes {len(graph.inputs)} operands, got {len(types)}")
    for given, node in zip(types, graph.inputs, strict=True):
        operand, wanted = tensor(given), node.tensor
        if operand.dtype != wanted.dtype or operand.shape != wanted.shape:
            raise GraphError(f"graph {graph.name} wants {wanted}, got {operand}")
    results = tuple(o.tensor for o in graph.outputs)
    return results[0] if len(results) == 1 else TupleType(results)


CONV = declare(
    Op(
        "conv",
        OpKind.LIBRARY,
        2,
        ConvAttrs,
        conv_type,
        "torch.convolution without bias",
        linear_in=frozenset({0, 1}),
        flops=conv_flops,
    )
)
POOL = declare(Op("pool", OpKind.LIBRARY, 1, PoolAttrs, _pool, "max_pool / avg_pool 1d-3d"))
OPAQUE = declare(
    Op("opaque", OpKind.LIBRARY, None, OpaqueAttrs, _opaque, "a PyTorch operator kept as it is")
)
CUSTOM = declare(
    Op("custom", OpKind.GRAPH, None, GraphAttrs, _graph, "one kernel, given by a block graph")
)


def _thread(types: tuple[Type, ...], attrs: GraphAttrs) -> Type:
    if len(types) != len(attrs.graph.inputs) or len(attrs.graph.outputs) != 1:
        raise GraphError("a thread graph takes one operand per input and gives one result")
    for given, node in zip(types, attrs.graph.inputs, strict=True):
        operand, wanted = tensor(given).dtype, node.tensor.dtype
        if operand is not wanted:
            raise GraphError(f"graph {attrs.graph.name} wants {wanted}, got {operand}; cast first")
    shape = broadcast_shapes([tensor(t).shape for t in types])
    return TensorType(shape, attrs.graph.outputs[0].tensor.dtype)


THREAD = declare(
    Op(
        "thread",
        OpKind.GRAPH,
        None,
        GraphAttrs,
        _thread,
        "a chain of elementwise ops in registers, applied to every element",
    )
)
