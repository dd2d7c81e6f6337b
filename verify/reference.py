"""What every op means in PyTorch: the reference executor, at working precision or in float64.

In: a graph of any level and one tensor per input. Out: one tensor per output. This is the oracle for
everything that computes: lifted graphs equal eager PyTorch when run here, and generated kernels
are compared with it. A 16-bit op means PyTorch's op on 16-bit tensors (computed wider, rounded
once). Constants go to PyTorch as Python numbers, as they came from the user's program.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from math import prod
from typing import Any, final

import torch
import torch.nn.functional as F

from superopt.ir import composite
from superopt.ir.build import input_
from superopt.ir.errors import GraphError
from superopt.ir.graph import Graph, Level
from superopt.ir.interpret import interpret
from superopt.ir.node import Node
from superopt.ir.ops import contraction, elementwise, leaf, library, structural
from superopt.ir.ops.registry import Op, OpKind, RuleTable, all_ops
from superopt.ir.types import DType
from superopt.verify.opaque import run_opaque

Value = Any
"""A tensor, or the tuple of tensors of an opaque node with several results."""

TorchRule = Callable[[Node, Sequence[Value], "TorchDomain"], Value]

DTYPES: dict[DType, torch.dtype] = {
    DType.F64: torch.float64,
    DType.F32: torch.float32,
    DType.F16: torch.float16,
    DType.BF16: torch.bfloat16,
    DType.I64: torch.int64,
    DType.I32: torch.int32,
    DType.I16: torch.int16,
    DType.I8: torch.int8,
    DType.U8: torch.uint8,
    DType.BOOL: torch.bool,
    DType.C64: torch.complex64,
    DType.C128: torch.complex128,
}
IR_DTYPES: dict[torch.dtype, DType] = {v: k for k, v in DTYPES.items()}

TORCH: RuleTable[TorchRule] = RuleTable("torch", "add one in verify/reference.py")


@final
@dataclass(frozen=True)
class TorchDomain:
    """Values are tensors; `dtype_override` makes everything floating-point run in that type."""

    dtype_override: torch.dtype | None = None
    device: torch.device | str = "cpu"

    def dtype(self, dtype: DType) -> torch.dtype:
        """Return the type that values of `dtype` have in this domain."""
        if self.dtype_override is not None and dtype.is_float:
            return self.dtype_override
        return DTYPES[dtype]

    def has_rule(self, op: Op) -> bool:
        """Say whether a library function computes `op`."""
        return op in TORCH

    def apply(self, node: Node, args: Sequence[Value]) -> Value:
        """Return the value of one node."""
        return TORCH[node.op](node, args, self)


def run_reference(
    graph: Graph,
    tensors: Sequence[torch.Tensor],
    *,
    dtype_override: torch.dtype | None = None,
    device: torch.device | None = None,
) -> list[torch.Tensor]:
    """Run `graph` on `tensors` in PyTorch (in `dtype_override` where values are floating-point).

    What depends on no tensor is computed on `device`, or where the first tensor is.
    """
    device = device or (tensors[0].device if tensors else torch.device("cpu"))
    domain = TorchDomain(dtype_override, device)
    if len(tensors) != len(graph.inputs):
        raise GraphError(f"{graph.name} takes {len(graph.inputs)} tensors, got {len(tensors)}")
    for node, given in zip(graph.inputs, tensors, strict=True):
        if tuple(given.shape) != node.shape:
            raise GraphError(
                f"input {node.attrs.name} is {node.type}, got a tensor of {tuple(given.shape)}"
            )
    given_values = [
        t.to(domain.dtype(n.tensor.dtype)) for n, t in zip(graph.inputs, tensors, strict=True)
    ]
    with torch.no_grad():
        return interpret(graph, given_values, domain)


# -- leaves --------------------------------------------------------------------------------------


@TORCH.register(leaf.CONSTANT)
def _constant(node: Node, args: Sequence[Value], domain: TorchDomain) -> Value:
    dtype = domain.dtype(node.attrs.dtype)
    return torch.tensor(node.attrs.value, dtype=dtype, device=domain.device)


@TORCH.register(leaf.IOTA)
def _iota(node: Node, args: Sequence[Value], domain: TorchDomain) -> Value:
    attrs = node.attrs
    count = attrs.shape[attrs.axis]
    index = torch.arange(count, dtype=domain.dtype(attrs.dtype), device=domain.device)
    return index.reshape((count,) + (1,) * (-1 - attrs.axis)).expand(attrs.shape)


@TORCH.register(leaf.ITEM)
def _item(node: Node, args: Sequence[Value], domain: TorchDomain) -> Value:
    return args[0][node.attrs.index]


# -- elementwise ---------------------------------------------------------------------------------


def _numbers(node: Node, args: Sequence[Value]) -> list[Value]:
    """Give constants as Python numbers beside tensors: PyTorch does not round those first."""
    if all(i.op is leaf.CONSTANT for i in node.inputs):
        return list(args)
    return [
        i.attrs.value if i.op is leaf.CONSTANT else a
        for i, a in zip(node.inputs, args, strict=True)
    ]


def _plain(function: Callable[..., Any], op: Op) -> None:
    def rule(node: Node, args: Sequence[Value], domain: TorchDomain) -> Value:
        return function(*args)

    TORCH.register(op)(rule)


def _with_numbers(function: Callable[..., Any], op: Op) -> None:
    def rule(node: Node, args: Sequence[Value], domain: TorchDomain) -> Value:
        return function(*_numbers(node, args))

    TORCH.register(op)(rule)


def _sub(x: Value, y: Value) -> Value:
    return torch.sub(x, y) if isinstance(x, torch.Tensor) else torch.rsub(y, x)


def _reciprocal_or_div(x: Value, y: Value) -> Value:
    if isinstance(x, torch.Tensor) or x != 1:
        return torch.div(x, y) if isinstance(x, torch.Tensor) else x / y
    return torch.reciprocal(y)


_PLAIN: dict[Op, Callable[..., Any]] = {
    elementwise.NEG: torch.neg,
    elementwise.ABS: torch.abs,
    elementwise.SIGN: torch.sign,
    elementwise.FLOOR: torch.floor,
    elementwise.CEIL: torch.ceil,
    elementwise.ROUND: torch.round,
    elementwise.TRUNC: torch.trunc,
    elementwise.EXP: torch.exp,
    elementwise.EXPM1: torch.expm1,
    elementwise.LOG: torch.log,
    elementwise.LOG1P: torch.log1p,
    elementwise.LOG2: torch.log2,
    elementwise.LOG10: torch.log10,
    elementwise.SQRT: torch.sqrt,
    elementwise.SIN: torch.sin,
    elementwise.COS: torch.cos,
    elementwise.TAN: torch.tan,
    elementwise.ASIN: torch.asin,
    elementwise.ACOS: torch.acos,
    elementwise.ATAN: torch.atan,
    elementwise.SINH: torch.sinh,
    elementwise.COSH: torch.cosh,
    elementwise.ASINH: torch.asinh,
    elementwise.ACOSH: torch.acosh,
    elementwise.ATANH: torch.atanh,
    elementwise.TANH: torch.tanh,
    elementwise.SIGMOID: torch.sigmoid,
    elementwise.ERF: torch.erf,
    elementwise.ERFINV: torch.erfinv,
    elementwise.LGAMMA: torch.lgamma,
    elementwise.ISNAN: torch.isnan,
    elementwise.ISINF: torch.isinf,
    elementwise.NOT: torch.bitwise_not,
    elementwise.ATAN2: torch.atan2,
    elementwise.COPYSIGN: torch.copysign,
    elementwise.MAXIMUM: torch.maximum,
    elementwise.MINIMUM: torch.minimum,
    elementwise.WHERE: torch.where,
}
_WITH_NUMBERS: dict[Op, Callable[..., Any]] = {
    elementwise.ADD: lambda x, y: x + y,
    elementwise.SUB: _sub,
    elementwise.MUL: lambda x, y: x * y,
    elementwise.DIV: _reciprocal_or_div,
    elementwise.FLOORDIV: lambda x, y: _tensors_div(x, y, "floor"),
    elementwise.TRUNCDIV: lambda x, y: _tensors_div(x, y, "trunc"),
    elementwise.REMAINDER: torch.remainder,
    elementwise.FMOD: lambda x, y: torch.fmod(_like(x, y), y),
    elementwise.POW: torch.pow,
    elementwise.EQ: lambda x, y: x == y,
    elementwise.NE: lambda x, y: x != y,
    elementwise.LT: lambda x, y: x < y,
    elementwise.LE: lambda x, y: x <= y,
    elementwise.GT: lambda x, y: x > y,
    elementwise.GE: lambda x, y: x >= y,
    elementwise.AND: lambda x, y: x & y,
    elementwise.OR: lambda x, y: x | y,
    elementwise.XOR: lambda x, y: x ^ y,
    elementwise.SHL: lambda x, y: x << y,
    elementwise.SHR: lambda x, y: x >> y,
}


def _like(x: Value, y: Value) -> torch.Tensor:
    if isinstance(x, torch.Tensor):
        return x
    return torch.tensor(x, dtype=y.dtype, device=y.device)


def _tensors_div(x: Value, y: Value, mode: str) -> torch.Tensor:
    return torch.div(_like(x, y), y, rounding_mode=mode)


for _op, _function in _PLAIN.items():
    _plain(_function, _op)
for _op, _function in _WITH_NUMBERS.items():
    _with_numbers(_function, _op)


@TORCH.register(elementwise.CAST)
def _cast(node: Node, args: Sequence[Value], domain: TorchDomain) -> Value:
    return args[0].to(domain.dtype(node.attrs.dtype))


# -- contractions and reductions -----------------------------------------------------------------


@cache
def slow(dtype: torch.dtype) -> bool:
    """Say whether PyTorch multiplies matrices, and convolves, element by element in a 16-bit type on this processor's cores.

    Without AVX-512 (float16: its own extension) it takes up to sixty times as long as in float32.
    """
    if dtype not in (torch.bfloat16, torch.float16):
        return False
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return True
    if dtype is torch.bfloat16:
        return not torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return not torch.ops.mkldnn._is_mkldnn_fp16_supported()


@TORCH.register(contraction.MATMUL)
def _matmul(node: Node, args: Sequence[Value], domain: TorchDomain) -> Value:
    a, b = args
    if a.dtype is torch.bool:
        return torch.matmul(a.to(torch.int32), b.to(torch.int32)).to(torch.bool)
    if a.device.type == "cpu" and slow(a.dtype):
        # what the library computes there, element by element: sums in float32 that are rounded once
        return _matmul(node, (a.float(), b.float()), domain).to(a.dtype)
    if prod(b.shape[:-2]) == 1:
        # one matrix for the whole batch: a single product of two matrices, as in linear
        return torch.matmul(a, b.reshape(b.shape[-2:]))
    return torch.matmul(a, b)


def _reduction(op: Op, function: Callable[..., Any]) -> None:
    def rule(node: Node, args: Sequence[Value], domain: TorchDomain) -> Value:
        # PyTorch reads an empty list of axes as all axes
        return function(args[0], node.attrs.axes) if node.attrs.axes else args[0]

    TORCH.register(op)(rule)


def _prod(x: torch.Tensor, axes: tuple[int, ...]) -> torch.Tensor:
    for axis in axes:
        x = torch.prod(x, axis, keepdim=True, dtype=x.dtype)
    return x


_reduction(contraction.REDUCE_SUM, lambda x, a: torch.sum(x, a, keepdim=True, dtype=x.dtype))
_reduction(contraction.REDUCE_MAX, lambda x, a: torch.amax(x, a, keepdim=True))
_reduction(contraction.REDUCE_MIN, lambda x, a: torch.amin(x, a, keepdim=True))
_reduction(contraction.REDUCE_PROD, _prod)


@TORCH.register(contraction.ARGMAX, contraction.ARGMIN)
def _arg(node: Node, args: Sequence[Value], domain: TorchDomain) -> Value:
    x = args[0].to(torch.uint8) if args[0].dtype is torch.bool else args[0]
    function = torch.argmax if node.op is contraction.ARGMAX else torch.argmin
    return function(x, node.attrs.axis, keepdim=True)


@TORCH.register(contraction.SCAN)
def _scan(node: Node, args: Sequence[Value], domain: TorchDomain) -> Value:
    x, axis = args[0], node.attrs.axis
    match node.attrs.kind:
        case "sum":
            return torch.cumsum(x, axis, dtype=x.dtype)
        case "prod":
            return torch.cumprod(x, axis, dtype=x.dtype)
        case "max":
            return torch.cummax(x, axis).values
        case "min":
            return torch.cummin(x, axis).values
    raise GraphError(f"scan kind {node.attrs.kind!r} is unknown")


# -- structure -----------------------------------------------------------------------------------


@TORCH.register(structural.RESHAPE)
def _reshape(node: Node, args: Sequence[Value], domain: TorchDomain) -> Value:
    return args[0].reshape(node.attrs.shape)


@TORCH.register(structural.BROADCAST)
def _broadcast(node: Node, args: Sequence[Value], domain: TorchDomain) -> Value:
    return args[0].expand(node.attrs.shape)


@TORCH.register(structural.PERMUTE)
def _permute(node: Node, args: Sequence[Value], domain: TorchDomain) -> Value:
    return args[0].permute(node.attrs.perm)


@TORCH.register(structural.SLICE)
def _slice(node: Node, args: Sequence[Value], domain: TorchDomain) -> Value:
    attrs = node.attrs
    index = (..., slice(attrs.start, attrs.stop, attrs.step), *(slice(None),) * (-1 - attrs.axis))
    return args[0][index]


@TORCH.register(structural.CONCAT)
def _concat(node: Node, args: Sequence[Value], domain: TorchDomain) -> Value:
    return torch.cat(list(args), node.attrs.axis)


@TORCH.register(structural.PAD)
def _pad(node: Node, args: Sequence[Value], domain: TorchDomain) -> Value:
    attrs = node.attrs
    widths = (0, 0) * (-1 - attrs.axis) + (attrs.before, attrs.after)
    return F.pad(args[0], widths, value=attrs.value)


@TORCH.register(structural.FLIP)
def _flip(node: Node, args: Sequence[Value], domain: TorchDomain) -> Value:
    return torch.flip(args[0], node.attrs.axes)


@TORCH.register(structural.TAKE)
def _take(node: Node, args: Sequence[Value], domain: TorchDomain) -> Value:
    x, index = args
    taken = torch.index_select(x, node.attrs.axis, index.reshape(-1).to(torch.int64))
    return taken.reshape(node.shape)


@TORCH.register(structural.GATHER)
def _gather(node: Node, args: Sequence[Value], domain: TorchDomain) -> Value:
    return torch.gather(args[0], node.attrs.axis, args[1].to(torch.int64))


# -- library operators ---------------------------------------------------------------------------


@TORCH.register(library.CONV, composite.DEPTHWISE_CONV)
def _conv(node: Node, args: Sequence[Value], domain: TorchDomain) -> Value:
    a = node.attrs
    x, weight = args
    if x.device.type == "cpu" and slow(x.dtype):
        return _conv(node, (x.float(), weight.float()), domain).to(x.dtype)
    return torch.convolution(
        x,
        weight,
        None,
        a.stride,
        a.padding,
        a.dilation,
        a.transposed,
        a.output_padding,
        a.groups,
    )


@TORCH.register(library.POOL)
def _pool(node: Node, args: Sequence[Value], domain: TorchDomain) -> Value:
    a, x = node.attrs, args[0]
    n = len(a.kernel)
    lead = x.shape[: x.ndim - n]
    x = x.reshape(1, prod(lead), *x.shape[x.ndim - n :])
    if a.kind == "max":
        pool = (F.max_pool1d, F.max_pool2d, F.max_pool3d)[n - 1]
        y = pool(x, a.kernel, a.stride, a.padding, a.dilation, a.ceil_mode)
    elif n == 1:
        if a.divisor is not None:
            raise GraphError("average pooling over one dim takes no divisor")
        y = F.avg_pool1d(x, a.kernel, a.stride, a.padding, a.ceil_mode, a.include_pad)
    else:
        average = F.avg_pool2d if n == 2 else F.avg_pool3d
        y = average(x, a.kernel, a.stride, a.padding, a.ceil_mode, a.include_pad, a.divisor)
    return y.reshape(*lead, *y.shape[2:])


@TORCH.register(library.OPAQUE)
def _opaque(node: Node, args: Sequence[Value], domain: TorchDomain) -> Value:
    if domain.dtype_override is None:
        return run_opaque(node.attrs, args)
    # the operator may not exist in the wider type: it sees the types that the program gave it
    narrow = [
        a.to(DTYPES[i.tensor.dtype]) if a.is_floating_point() else a
        for i, a in zip(node.inputs, args, strict=True)
    ]
    result = run_opaque(node.attrs, narrow)
    if isinstance(result, torch.Tensor):
        return _widen(result, domain)
    return tuple(_widen(r, domain) for r in result)


def _widen(x: torch.Tensor, domain: TorchDomain) -> torch.Tensor:
    return x.to(domain.dtype_override) if x.is_floating_point() else x


# -- composites ----------------------------------------------------------------------------------


def _by_definition(node: Node, args: Sequence[Value], domain: TorchDomain) -> Value:
    """Run a composite through its definition, for operands that the library function refuses."""
    assert node.op.expand is not None, node
    inputs = tuple(
        input_(f"operand{k}", i.shape, i.tensor.dtype) for k, i in enumerate(node.inputs)
    )
    graph = Graph(Level.KERNEL, node.op.name, inputs, (node.op.expand(inputs, node.attrs),))
    return interpret(graph, list(args), domain)[0]


@TORCH.register(composite.SOFTMAX)
def _softmax(node: Node, args: Sequence[Value], domain: TorchDomain) -> Value:
    return torch.softmax(args[0], node.attrs.axis)


@TORCH.register(composite.LOG_SOFTMAX)
def _log_softmax(node: Node, args: Sequence[Value], domain: TorchDomain) -> Value:
    return torch.log_softmax(args[0], node.attrs.axis)


@TORCH.register(composite.LOGSUMEXP)
def _logsumexp(node: Node, args: Sequence[Value], domain: TorchDomain) -> Value:
    return torch.logsumexp(args[0], node.attrs.axis, keepdim=True)


@TORCH.register(composite.SILU)
def _silu(node: Node, args: Sequence[Value], domain: TorchDomain) -> Value:
    return F.silu(args[0])


@TORCH.register(composite.GELU)
def _gelu(node: Node, args: Sequence[Value], domain: TorchDomain) -> Value:
    return F.gelu(args[0], approximate=node.attrs.approximate)


def _normalized_shape(node: Node) -> tuple[int, ...] | None:
    """Return the trailing shape that is normalized if a library function can do it."""
    axes = sorted(node.attrs.axes)
    shape = node.shape[axes[0] :] if axes else ()
    if axes != list(range(-len(axes), 0)):
        return None
    trailing = all(
        prod(i.shape) == prod(shape) == prod(i.shape[-len(axes) :]) for i in node.inputs[1:]
    )
    return shape if trailing else None


@TORCH.register(composite.LAYER_NORM)
def _layer_norm(node: Node, args: Sequence[Value], domain: TorchDomain) -> Value:
    shape = _normalized_shape(node)
    if shape is None:
        return _by_definition(node, args, domain)
    weight, bias = ([a.reshape(shape) for a in args[1:]] + [None, None])[:2]
    return F.layer_norm(args[0], shape, weight, bias, node.attrs.epsilon)


@TORCH.register(composite.RMS_NORM)
def _rms_norm(node: Node, args: Sequence[Value], domain: TorchDomain) -> Value:
    shape = _normalized_shape(node)
    if shape is None:
        return _by_definition(node, args, domain)
    weight = args[1].reshape(shape) if len(args) > 1 else None
    return F.rms_norm(args[0], shape, weight, node.attrs.epsilon)


@TORCH.register(composite.ATTENTION)
def _attention(node: Node, args: Sequence[Value], domain: TorchDomain) -> Value:
    q, k, v, *mask = args
    if (mask and node.attrs.causal) or q.ndim > 4:
        return _by_definition(node, args, domain)
    if mask and mask[0].dtype is not torch.bool:
        mask = [mask[0].to(q.dtype)]
    return F.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=mask[0] if mask else None,
        is_causal=node.attrs.causal,
        scale=node.attrs.scale,
        enable_gqa=q.shape[-3] != k.shape[-3],
    )


TORCH.refuse("an input's value is given, not computed", leaf.INPUT)
TORCH.refuse(
    "nested graphs and tiles are run through their meaning in superopt.ir.semantics",
    *(op for op in all_ops() if op.kind in (OpKind.TILE, OpKind.GRAPH)),
)
