"""The table of PyTorch meanings: complete, and equal to the definitions of composites."""

import json
import math

import pytest
import torch
import torch.nn.functional as F

from superopt.ir import build as b
from superopt.ir import composite
from superopt.ir.composite import AttentionAttrs, GeluAttrs, NormAttrs
from superopt.ir.errors import GraphError
from superopt.ir.graph import Graph
from superopt.ir.node import Node, make
from superopt.ir.ops import contraction, elementwise, library, structural
from superopt.ir.ops.contraction import AxisAttrs
from superopt.ir.ops.library import OpaqueAttrs
from superopt.ir.semantics import expand
from superopt.ir.types import DType, TensorType, TupleType
from superopt.verify.opaque import encode_call, operator, run_opaque
from superopt.verify.reference import DTYPES, TORCH, run_reference


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def graph_of(inputs: list[Node], *outputs: Node) -> Graph:
    return b.kernel_graph("test", inputs, outputs)


def test_every_op_has_a_rule_or_a_reason() -> None:
    assert TORCH.missing() == []


def _composites() -> list[tuple[str, list[Node], Node]]:
    x = b.input_("x", (2, 3, 8))
    w, bias = b.input_("w", (8,)), b.input_("b", (8,))
    w3 = b.input_("w3", (3, 8))
    q = b.input_("q", (2, 4, 5, 8))
    k, v = b.input_("k", (2, 2, 7, 8)), b.input_("v", (2, 2, 7, 6))
    mask = b.input_("mask", (1, 4, 5, 7))
    attention = AttentionAttrs(0.3, False)
    signal, taps = b.input_("signal", (2, 3, 11)), b.input_("taps", (3, 1, 4))
    image, windows = b.input_("image", (2, 4, 9, 7)), b.input_("windows", (8, 1, 3, 2))
    along = library.ConvAttrs((1,), (3,), (1,), False, (0,), 3)
    spread = library.ConvAttrs((2, 3), (2, 1), (1, 2), False, (0, 0), 4)
    return [
        (
            "depthwise",
            [signal, taps],
            make(composite.DEPTHWISE_CONV, [signal, taps], along),
        ),
        (
            "depthwise strided",
            [image, windows],
            make(composite.DEPTHWISE_CONV, [image, windows], spread),
        ),
        ("softmax", [x], make(composite.SOFTMAX, [x], AxisAttrs(-2))),
        ("log_softmax", [x], make(composite.LOG_SOFTMAX, [x], AxisAttrs(-1))),
        ("logsumexp", [x], make(composite.LOGSUMEXP, [x], AxisAttrs(-1))),
        ("silu", [x], make(composite.SILU, [x])),
        ("gelu", [x], make(composite.GELU, [x], GeluAttrs("none"))),
        ("gelu tanh", [x], make(composite.GELU, [x], GeluAttrs("tanh"))),
        ("layer_norm", [x], make(composite.LAYER_NORM, [x], NormAttrs((-1,), 1e-5))),
        (
            "layer_norm affine",
            [x, w, bias],
            make(composite.LAYER_NORM, [x, w, bias], NormAttrs((-1,), 1e-5)),
        ),
        (
            "layer_norm two axes",
            [x, w3],
            make(composite.LAYER_NORM, [x, w3], NormAttrs((-2, -1), 1e-5)),
        ),
        # no library function normalizes over an inner axis only
        ("layer_norm inner", [x], make(composite.LAYER_NORM, [x], NormAttrs((-2,), 1e-5))),
        ("rms_norm", [x, w], make(composite.RMS_NORM, [x, w], NormAttrs((-1,), 1e-6))),
        ("rms_norm inner", [x], make(composite.RMS_NORM, [x], NormAttrs((-2,), 1e-6))),
        ("attention gqa", [q, k, v], make(composite.ATTENTION, [q, k, v], attention)),
        (
            "attention causal",
            [q, k, v],
            make(composite.ATTENTION, [q, k, v], AttentionAttrs(0.3, True)),
        ),
        (
            "attention mask",
            [q, k, v, mask],
            make(composite.ATTENTION, [q, k, v, mask], attention),
        ),
        (
            "attention mask causal",
            [q, k, v, mask],
            make(composite.ATTENTION, [q, k, v, mask], AttentionAttrs(0.3, True)),
        ),
    ]


@pytest.mark.parametrize(("name", "inputs", "output"), _composites(), ids=lambda v: str(v)[:30])
def test_library_function_equals_definition(name: str, inputs: list[Node], output: Node) -> None:
    graph = graph_of(inputs, output)
    tensors = [randn(*n.shape, seed=i) for i, n in enumerate(inputs)]
    (got,) = run_reference(graph, tensors)
    (defined,) = run_reference(expand(graph), tensors)
    assert got.shape == defined.shape == output.shape
    torch.testing.assert_close(got, defined)
    (wide,) = run_reference(graph, tensors, dtype_override=torch.float64)
    assert wide.dtype is torch.float64
    torch.testing.assert_close(got, wide.float())


@pytest.mark.parametrize("dtype", [DType.BF16, DType.F16])
def test_scores_of_16_bit_attention_are_not_rounded(dtype: DType) -> None:
    inputs = [b.input_(name, (2, 4, 7, 16), dtype) for name in "qkv"]
    graph = graph_of(inputs, make(composite.ATTENTION, inputs, AttentionAttrs(0.25, False)))
    tensors = [8 * randn(*n.shape, seed=i).to(DTYPES[dtype]) for i, n in enumerate(inputs)]
    (exact,) = run_reference(graph, tensors, dtype_override=torch.float64)
    library, defined = (run_reference(g, tensors)[0].double() for g in (graph, expand(graph)))
    assert (defined - exact).norm() <= 2 * (library - exact).norm()


@pytest.mark.parametrize("convolves", [False, True])
@pytest.mark.parametrize("dtype", [DType.F16, DType.BF16])
def test_products_that_are_slow_in_16_bits_are_rounded_alike(
    dtype: DType, convolves: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if convolves:
        x, w = b.input_("x", (2, 12, 9, 7), dtype), b.input_("w", (5, 12, 3, 3), dtype)
        attrs = library.ConvAttrs((1, 1), (1, 1), (1, 1), False, (0, 0), 1)
        graph = graph_of([x, w], make(library.CONV, (x, w), attrs))
    else:
        x, w = b.input_("x", (3, 8, 96), dtype), b.input_("w", (3, 96, 5), dtype)
        graph = graph_of([x, w], b.matmul(x, w))
    tensors = [randn(*i.shape, seed=n).to(DTYPES[dtype]) for n, i in enumerate(graph.inputs)]
    results = []
    for slow in (False, True):
        monkeypatch.setattr(
            "superopt.verify.reference.slow", lambda t, slow=slow: slow and t.itemsize == 2
        )
        (result,) = run_reference(graph, tensors)
        assert result.dtype is DTYPES[dtype]
        results.append(result.float())
    # sums in another order may be rounded to the neighbour
    ulp = torch.finfo(DTYPES[dtype]).eps
    torch.testing.assert_close(*results, rtol=ulp, atol=ulp / 8)
    (exact,) = run_reference(graph, tensors, dtype_override=torch.float64)
    torch.testing.assert_close(results[1].double(), exact, rtol=0.51 * ulp, atol=1e-5)


def test_float64_keeps_constants_and_casts_exact() -> None:
    x = b.input_("x", (4,), DType.BF16)
    y = b.cast(b.mul(b.cast(x, DType.F16), b.constant(0.1, DType.F16)), DType.F32)
    tensor = randn(4).to(torch.bfloat16)
    (got,) = run_reference(graph_of([x], y), [tensor], dtype_override=torch.float64)
    torch.testing.assert_close(got, tensor.double() * 0.1, rtol=0, atol=0)


def test_constants_beside_16_bit_tensors_are_not_rounded_first() -> None:
    x = b.input_("x", (64,), DType.BF16)
    tensor = randn(64).to(torch.bfloat16)
    (got,) = run_reference(graph_of([x], b.mul(x, 0.1)), [tensor])
    assert torch.equal(got, tensor * 0.1)


def test_operands_of_integer_division() -> None:
    x, y = b.input_("x", (4,), DType.I32), b.input_("y", (4,), DType.I32)
    dividend = torch.tensor([7, -7, 7, -7], dtype=torch.int32)
    divisor = torch.tensor([2, 2, -2, -2], dtype=torch.int32)
    ops = (
        elementwise.FLOORDIV,
        elementwise.TRUNCDIV,
        elementwise.REMAINDER,
        elementwise.FMOD,
    )
    outputs = [make(op, (x, y)) for op in ops]
    got = [t.tolist() for t in run_reference(graph_of([x, y], *outputs), [dividend, divisor])]
    assert got == [[3, -4, -4, 3], [3, -3, -3, 3], [1, 1, -1, -1], [1, -1, 1, -1]]


def test_number_on_the_left() -> None:
    x = b.input_("x", (4,))
    i = b.input_("i", (4,), DType.I64)
    tensor, number = randn(4).abs() + 0.5, torch.tensor([1, 2, 3, 4])
    two, seven = b.constant(2.0), b.constant(7, DType.I64)
    outputs = [
        b.sub(two, x),
        b.div(two, x),
        b.pow_(two, x),
        b.lt(two, x),
        make(elementwise.REMAINDER, (seven, i)),
        make(elementwise.FMOD, (seven, i)),
        make(elementwise.FLOORDIV, (seven, i)),
        make(elementwise.SHL, (seven, i)),
    ]
    got = run_reference(graph_of([x, i], *outputs), [tensor, number])
    want = [2 - tensor, 2 / tensor, 2**tensor, tensor > 2, 7 % number, 7 % number, 7 // number]
    for g, w in zip(got, [*want, 7 << number], strict=True):
        torch.testing.assert_close(g, w)


def test_structure() -> None:
    x = b.input_("x", (3, 4))
    index = b.input_("i", (2, 2), DType.I32)
    outputs = [
        b.slice_(x, 1, 1, 4, 2),
        b.pad(x, 0, 1, 2, 5.0),
        b.flip(x, (0, 1)),
        b.take(x, index, 1),
        b.iota((2, 3), -1),
        b.scan(x, 0, "max"),
        b.scan(x, 1, "min"),
        make(contraction.REDUCE_PROD, (x,), contraction.ReduceAttrs((-1, -2))),
        b.arg_reduce(contraction.ARGMIN, x, 0),
        make(structural.BROADCAST, (b.slice_(x, 0, 0, 1),), structural.ShapeAttrs((5, 4))),
    ]
    t, i = randn(3, 4), torch.tensor([[0, 1], [2, 0]], dtype=torch.int32)
    want = [
        t[:, 1:4:2],
        F.pad(t, (0, 0, 1, 2), value=5.0),
        t.flip(0, 1),
        t[:, i],
        torch.arange(3).expand(2, 3),
        t.cummax(0).values,
        t.cummin(1).values,
        t.prod().reshape(1, 1),
        t.argmin(0, keepdim=True),
        t[:1].expand(5, 4),
    ]
    for got, expected in zip(
        run_reference(graph_of([x, index], *outputs), [t, i]), want, strict=True
    ):
        torch.testing.assert_close(got, expected)


def test_block_graph_runs_through_its_meaning() -> None:
    builder = b.BlockBuilder("rows", grid={"m": 3}, loops={"k": 2})
    tile = builder.load(b.input_("x", (5, 7)), ("m", 2), ("k", 4))
    total = b.accum_sum(b.reduce_sum(b.exp(tile), -1), "k")
    builder.store(total, (5, 1), ("m", 2), 1)
    x = b.input_("x", (5, 7))
    graph = graph_of([x], *b.apply_graph(builder.graph(), [x]))
    tensor = randn(5, 7)
    (got,) = run_reference(graph, [tensor])
    torch.testing.assert_close(got, tensor.exp().sum(1, keepdim=True))


def test_opaque_arguments_survive_json() -> None:
    x = randn(3, 4)
    arguments = ([x, x], -1)
    attrs = encode_call(
        "aten.cat.default",
        arguments,
        {},
        TensorType((3, 8), DType.F32),
        lambda v: {"t": 0} if isinstance(v, torch.Tensor) else None,
    )
    assert json.loads(attrs.arguments) == {"args": [[{"t": 0}, {"t": 0}], -1], "kwargs": {}}
    torch.testing.assert_close(run_opaque(attrs, [x]), torch.cat([x, x], -1))
    full = encode_call(
        "aten.full.default",
        ([2], math.inf),
        {"dtype": torch.bfloat16, "device": torch.device("cpu"), "layout": torch.strided},
        TensorType((2,), DType.BF16),
        lambda v: None,
    )
    assert run_opaque(full, []).tolist() == [math.inf, math.inf]
    turn = encode_call(
        "aten.full.default", ([1], 1 - 2j), {}, TensorType((1,), DType.C64), lambda v: None
    )
    assert run_opaque(turn, []).tolist() == [1 - 2j]


def test_opaque_refuses_what_json_lacks() -> None:
    type_ = TensorType((2,), DType.F32)
    with pytest.raises(GraphError, match="no JSON form"):
        encode_call("aten.rand.generator", (torch.Generator(),), {}, type_, lambda v: None)


@pytest.mark.parametrize("target", ["aten.no_such_operator.default", "nobody.op.default", "x"])
def test_unknown_operator_is_named(target: str) -> None:
    with pytest.raises(GraphError, match="not registered"):
        operator(target)


def test_opaque_in_float64_sees_the_types_of_the_program() -> None:
    x = b.input_("x", (6,), DType.F32)
    result = TupleType((TensorType((6,), DType.F32), TensorType((6,), DType.I64)))
    arguments = '{"args":[{"t":0}],"kwargs":{}}'
    node = make(library.OPAQUE, (x,), OpaqueAttrs("aten.sort.default", arguments, result))
    tensor = randn(6)
    outputs = (b.item(node, 0), b.item(node, 1))
    values, places = run_reference(graph_of([x], *outputs), [tensor], dtype_override=torch.float64)
    assert values.dtype is torch.float64
    assert torch.equal(values.float(), tensor.sort().values)
    assert torch.equal(places, tensor.sort().indices)


def test_wrong_shape_is_named() -> None:
    x = b.input_("x", (3,))
    with pytest.raises(GraphError, match=r"input x is f32\[3\]"):
        run_reference(graph_of([x], b.exp(x)), [randn(4)])
    with pytest.raises(GraphError, match="takes 1 tensors"):
        run_reference(graph_of([x], b.exp(x)), [])


def test_every_element_type_has_a_torch_type() -> None:
    assert set(DTYPES) == set(DType)


def test_logsumexp_of_infinities_is_that_of_pytorch() -> None:
    inf, nan = float("inf"), float("nan")
    rows = [[inf, 1.0], [-inf, -inf], [inf, inf], [inf, -inf], [nan, inf], [0.0, -inf]]
    values = torch.tensor(rows)
    x = b.input_("x", (6, 2))
    graph = b.kernel_graph("g", [x], [make(composite.LOGSUMEXP, [x], AxisAttrs(-1))])
    (found,) = run_reference(expand(graph), [values])
    torch.testing.assert_close(found, torch.logsumexp(values, -1, keepdim=True), equal_nan=True)
