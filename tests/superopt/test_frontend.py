"""Whole programs: modules, buffers, opaque operators, arguments, folding, and what is refused."""

import functools
import logging
import sys
import threading
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings

from superopt import SuperoptError
from superopt.frontend import LiftError, lift, lift_exported, lift_fx
from superopt.frontend.fold import as_band
from superopt.frontend.rules import common_dtype
from superopt.ir import build as b
from superopt.ir import composite
from superopt.ir.node import Node
from superopt.ir.ops import contraction, elementwise, library, structural
from superopt.ir.ops.registry import Op
from superopt.verify.draws import is_draw
from superopt.verify.reference import DTYPES, run_reference


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def nodes_of(lifted: Any, op: Op) -> list[Node]:
    return [n for n in lifted.graph.nodes() if n.op is op]


# -- products ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("function", "shape"),
    [
        (lambda x, w: F.linear(x, w), (6, 8)),
        (lambda x, w: F.linear(x.transpose(0, 1), w), (6, 8)),
        (lambda x, w: torch.matmul(x, w.t()), (6, 8)),
        (lambda x, w: torch.matmul(x, w.t()[None]), (6, 8)),
        (lambda x, w: torch.matmul(w, x.transpose(1, 2)), None),
    ],
)
def test_rows_that_one_matrix_multiplies_are_one_dim(function: Any, shape: Any) -> None:
    x, w = randn(2, 3, 5), randn(8, 5, seed=1)
    lifted = lift(function, (x, w))
    (product,) = nodes_of(lifted, contraction.MATMUL)
    assert product.shape == (shape or (2, 8, 3))
    (result,) = run_reference(lifted.graph, [x, w])
    torch.testing.assert_close(result, function(x, w))


# -- models --------------------------------------------------------------------------------------


class RMSNorm(torch.nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.linspace(0.5, 1.5, size))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.weight


class LlamaBlock(torch.nn.Module):
    """Grouped-query attention with rotary embedding and a gated MLP, in plain torch."""

    def __init__(self, size: int = 32, heads: int = 4, kv_heads: int = 2) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head = heads, kv_heads, size // heads
        self.q = torch.nn.Linear(size, size, bias=False)
        self.k = torch.nn.Linear(size, kv_heads * self.head, bias=False)
        self.v = torch.nn.Linear(size, kv_heads * self.head, bias=False)
        self.o = torch.nn.Linear(size, size, bias=False)
        self.gate = torch.nn.Linear(size, 2 * size, bias=False)
        self.up = torch.nn.Linear(size, 2 * size, bias=False)
        self.down = torch.nn.Linear(2 * size, size, bias=False)
        self.norm1, self.norm2 = RMSNorm(size), RMSNorm(size)
        frequency = 1.0 / 10000 ** (torch.arange(0, self.head, 2) / self.head)
        self.register_buffer("frequency", frequency, persistent=False)

    def rotate(self, x: torch.Tensor) -> torch.Tensor:
        angle = torch.outer(torch.arange(x.shape[-2]).float(), self.frequency)
        angle = torch.cat([angle, angle], -1)
        left, right = x.chunk(2, -1)
        cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
        return x * cos + torch.cat([-right, left], -1) * sin

    def split(self, x: torch.Tensor, heads: int) -> torch.Tensor:
        return x.view(*x.shape[:2], heads, self.head).transpose(1, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm1(x)
        q = self.rotate(self.split(self.q(y), self.heads))
        k = self.rotate(self.split(self.k(y), self.kv_heads))
        v = self.split(self.v(y), self.kv_heads)
        a = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = x + self.o(a.transpose(1, 2).reshape(x.shape))
        y = self.norm2(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class BertLayer(torch.nn.Module):
    """Attention by hand with a padding mask, LayerNorm and GELU."""

    def __init__(self, size: int = 32, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = torch.nn.Linear(size, 3 * size)
        self.out = torch.nn.Linear(size, size)
        self.mlp = torch.nn.Sequential(
            torch.nn.Linear(size, 4 * size), torch.nn.GELU(), torch.nn.Linear(4 * size, size)
        )
        self.norm1, self.norm2 = torch.nn.LayerNorm(size), torch.nn.LayerNorm(size)
        self.dropout = torch.nn.Dropout(0.1)

    def forward(self, x: torch.Tensor, *, mask: torch.Tensor) -> torch.Tensor:
        n, s, size = x.shape
        q, k, v = (t.view(n, s, self.heads, -1).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        scores = q @ k.transpose(-1, -2) / (size // self.heads) ** 0.5
        scores = scores.masked_fill(~mask[:, None, None], torch.finfo(x.dtype).min)
        a = (self.dropout(scores.softmax(-1)) @ v).transpose(1, 2).reshape(n, s, size)
        x = self.norm1(x + self.out(a))
        return self.norm2(x + self.dropout(self.mlp(x)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_llama_block(dtype: torch.dtype, runner: Any) -> None:
    torch.manual_seed(0)
    block = LlamaBlock().to(dtype)
    x = randn(2, 7, 32).to(dtype)
    lifted = lift(block, (x,))
    assert not nodes_of(lifted, library.OPAQUE)
    assert len(nodes_of(lifted, composite.ATTENTION)) == 1
    # the rotary tables are computed once
    assert not nodes_of(lifted, elementwise.COS)
    assert len(lifted.folded_sources) == 1
    tolerance = {} if dtype is torch.float32 else {"rtol": 5e-2, "atol": 5e-2}
    with torch.no_grad():
        runner.check(lifted, block(x), x, **tolerance)


def test_bert_layer(runner: Any) -> None:
    torch.manual_seed(0)
    layer = BertLayer().eval()
    x = randn(2, 5, 32)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]], dtype=torch.bool)
    lifted = lift(layer, (x,), {"mask": mask})
    assert not nodes_of(lifted, library.OPAQUE)
    with torch.no_grad():
        torch.testing.assert_close(runner(lifted, x, mask=mask), layer(x, mask=mask))


@pytest.mark.parametrize(
    ("options", "product"), [({}, True), ({"padding": 1}, False), ({"stride": 2}, False)]
)
def test_windows_of_one_element_are_a_product(options: dict[str, int], product: bool) -> None:
    def convolved(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return F.conv2d(x, w, **options)

    lifted = lift(convolved, (randn(2, 3, 5, 4), randn(6, 3, 1, 1)))
    assert bool(nodes_of(lifted, contraction.MATMUL)) is product
    assert bool(nodes_of(lifted, library.CONV)) is not product


@pytest.mark.parametrize(
    ("taps", "channels", "known"), [(4, 1, True), (16, 1, True), (17, 1, False), (4, 2, False)]
)
def test_convolutions_of_each_channel_alone_are_sums(
    taps: int, channels: int, known: bool, runner: Any
) -> None:
    x, w = randn(2, 20, 6).transpose(1, 2), randn(12, channels, taps)
    bias = randn(12)

    def convolved(x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return F.conv1d(F.pad(x, (taps - 1, 0)), w, bias, groups=6 // channels)

    lifted = lift(convolved, (x, w, bias))
    assert bool(nodes_of(lifted, composite.DEPTHWISE_CONV)) is known
    assert bool(nodes_of(lifted, library.CONV)) is not known
    torch.testing.assert_close(runner(lifted, x, w, bias), convolved(x, w, bias))


def test_lifted_at_float64_is_close_to_eager_float64(runner: Any) -> None:
    torch.manual_seed(0)
    block = LlamaBlock()
    x = randn(1, 6, 32)
    lifted = lift(block, (x,))
    tensors = [x, *lifted.parameters.values()]
    (got,) = run_reference(lifted.graph, tensors, dtype_override=torch.float64)
    assert got.dtype is torch.float64
    with torch.no_grad():
        torch.testing.assert_close(got.float(), block(x))


# -- opaque operators, randomness ----------------------------------------------------------------


def test_opaque_in_the_middle(runner: Any) -> None:
    def program(x: torch.Tensor) -> torch.Tensor:
        values, places = torch.topk(x.exp(), 3)
        return values.log() + places

    x = randn(4, 8)
    lifted = lift(program, (x,))
    (node,) = nodes_of(lifted, library.OPAQUE)
    assert node.attrs.target == "aten.topk.default"
    runner.check(lifted, program(x), x)


DRAWS = {
    "in order": lambda x: torch.rand_like(x) * 2 - torch.rand_like(x),
    "last one alone": lambda x: (x * 2, torch.randperm(5), torch.randn(3)),
    "dropout": lambda x: F.dropout(x, 0.3, training=True) + 1,
    "dropout of columns": lambda x: F.dropout(x.t() * 2, 0.3, training=True),
    "dropout of a repeated row": lambda x: F.dropout(x[:1].expand(6, -1), 0.3, training=True),
    "dropout of nothing": lambda x: F.dropout(x, 0.0, training=True) + torch.rand_like(x),
    "dropout in place": lambda x: F.dropout(x * 2, 0.3, training=True, inplace=True),
    "channels": lambda x: F.dropout2d(x.view(2, 3, 4, 5), 0.5, training=True),
    "alpha": lambda x: F.alpha_dropout(x, 0.2, training=True),
    "rrelu": lambda x: F.rrelu(x, training=True),
    "probabilities": lambda x: torch.bernoulli(x.t().sigmoid()),
    "choices": lambda x: torch.multinomial(x.softmax(-1), 3),
    "fill": lambda x: x.clone().normal_() + torch.empty(6, 20).uniform_(1, 2),
    "fill columns": lambda x: x.t().clone().normal_() + x.t(),
    "gumbel": lambda x: F.gumbel_softmax(x),
    "rates": lambda x: torch.poisson(x.exp()) + torch.normal(x, x.abs()),
    "integers": lambda x: x + torch.randint_like(x, 3, 9) + torch.randint(0, 5, (20,)),
}


@pytest.mark.parametrize("name", DRAWS)
def test_random_numbers_are_those_of_eager(runner: Any, name: str) -> None:
    program, x = DRAWS[name], randn(6, 20)
    lifted = lift(program, (x,))
    assert lifted.draws
    states = []
    for run in (program, lambda x: runner(lifted, x)):
        torch.manual_seed(3)
        states.append((run(x), torch.get_rng_state()))
    torch.testing.assert_close(states[1][0], states[0][0], check_stride=False)
    assert torch.equal(states[1][1], states[0][1])


def test_a_draw_that_nothing_uses_is_not_lost() -> None:
    with pytest.raises(LiftError, match="draws random numbers that it does not use"):
        lift(lambda x: (torch.rand(3), x + torch.rand_like(x))[1], (randn(3),))


@pytest.mark.parametrize(
    ("dropout", "training", "random"), [(0.0, True, False), (0.5, False, False), (0.5, True, True)]
)
def test_an_operator_is_random_unless_an_argument_turns_it_off(
    dropout: float, training: bool, random: bool
) -> None:
    module = torch.nn.LSTM(4, 4, 2, dropout=dropout).train(training)
    (node,) = nodes_of(lift(module, (randn(3, 2, 4),)), library.OPAQUE)
    assert is_draw(node) is random


@pytest.mark.parametrize(
    ("dtype", "affine", "tracked"),
    [
        (torch.float32, True, True),
        (torch.float32, False, True),
        (torch.bfloat16, True, True),
        (torch.float32, True, False),
    ],
)
def test_batch_norm_in_training_updates_its_buffers(
    runner: Any, dtype: torch.dtype, affine: bool, tracked: bool
) -> None:
    eager, ours = (
        torch.nn.BatchNorm2d(4, affine=affine, track_running_stats=tracked).to(dtype)
        for _ in range(2)
    )
    x = (randn(3, 4, 5, 5) * 2 + 1).to(dtype)
    lifted = lift(ours, (x,))
    assert not nodes_of(lifted, library.OPAQUE)
    assert len(lifted.mutations) == 3 * tracked
    tolerance = {} if dtype is torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    for _ in range(2):
        with torch.no_grad():
            torch.testing.assert_close(runner(lifted, x), eager(x), **tolerance)
    for mine, theirs in zip(ours.buffers(), eager.buffers(), strict=True):
        torch.testing.assert_close(mine, theirs, **tolerance)


def test_mutated_argument_and_buffer(runner: Any) -> None:
    class Cache(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("total", torch.zeros(4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.total.add_(x.sum(0))
            x[0] = 1.0
            return x * self.total

    eager, ours = Cache(), Cache()
    x, y = randn(3, 4), randn(3, 4)
    lifted = lift(ours, (x.clone(),))
    for _ in range(2):
        torch.testing.assert_close(runner(lifted, x), eager(y))
    torch.testing.assert_close(x, y)
    torch.testing.assert_close(ours.total, eager.total)


# -- arguments and results -----------------------------------------------------------------------


def test_structures_of_arguments_and_results(runner: Any) -> None:
    def program(pair: dict[str, Any], scale: float, *, flag: bool = True) -> dict[str, Any]:
        left, right = pair["both"]
        total = left + right * scale
        return {"sum": [total, None, 3], "left": left if flag else right}

    args = ({"both": (randn(2, 3), randn(3, seed=1))}, 0.5)
    lifted = lift(program, args, {"flag": True})
    got, want = runner(lifted, *args, flag=True), program(*args, flag=True)
    assert got["sum"][1:] == [None, 3]
    torch.testing.assert_close(got["sum"][0], want["sum"][0])
    torch.testing.assert_close(got["left"], want["left"])
    with pytest.raises(LiftError, match=r"lifted for 0\.5, got 0\.25"):
        lifted.flatten((args[0], 0.25), {"flag": True})
    with pytest.raises(LiftError, match=r"f32\[3\], got f32\[4\]"):
        lifted.flatten(({"both": (randn(2, 3), randn(4))}, 0.5), {"flag": True})
    with pytest.raises(LiftError, match="arguments"):
        lifted.flatten(args)


def test_arguments_keep_their_names() -> None:
    def named(q: Any, k: Any, *rest: Any, scale: float = 2.0, mask: Any = None) -> Any:
        return (q @ k + sum(rest)) * scale + mask

    @functools.wraps(named)
    def supplied(*args: Any, **kwargs: Any) -> Any:
        return named(args[0], *args, **kwargs)

    x = torch.randn(3, 3)
    assert lift(named, (x, x, x), {"mask": x}).user_inputs == ["q", "k", "rest_0", "mask"]
    assert lift(torch.add, (x, x)).user_inputs == ["args_0", "args_1"]
    lifted = lift(supplied, (x,), {"mask": x})  # a wrapper that takes fewer arguments than it says
    assert lifted.user_inputs == ["args_0", "mask"]


def test_strides_of_inputs_are_recorded(runner: Any) -> None:
    x = randn(4, 6).T
    lifted = lift(lambda t: t * 2, (x,))
    assert lifted.graph.inputs[0].tensor.strides == (1, 6)
    runner.check(lifted, x * 2, x)


def test_parameters_are_inputs_and_follow_training(runner: Any) -> None:
    linear = torch.nn.Linear(3, 2)
    x = randn(5, 3)
    lifted = lift(lambda t: linear(t).relu(), (x,))
    assert len(lifted.parameters) == 2
    with torch.no_grad():
        linear.weight.mul_(2)
        runner.check(lifted, linear(x).relu(), x)


def test_unused_arguments_stay_inputs(runner: Any) -> None:
    args = (randn(2), randn(3))
    lifted = lift(lambda x, unused: x + 1, args)
    assert len(lifted.graph.inputs) == 2
    runner.check(lifted, args[0] + 1, *args)


def test_index_patterns_stay_and_tables_fold(runner: Any) -> None:
    table = torch.linspace(0, 1, 16).reshape(4, 4)

    def program(x: torch.Tensor) -> torch.Tensor:
        causal = torch.triu(torch.ones(4, 4), 1).bool()
        return (x + (table * 3).exp()).masked_fill(causal, float("-inf"))

    x = randn(4, 4)
    lifted = lift(program, (x,))
    assert list(lifted.parameters) == ["folded_0"]
    torch.testing.assert_close(lifted.parameters["folded_0"], (table * 3).exp())
    runner.check(lifted, program(x), x)


def test_a_table_is_computed_without_its_mask() -> None:
    def decayed(scores):
        place = torch.arange(6)
        distance = place[:, None] - place
        return scores * (torch.exp(distance.clamp(min=0) * -0.5) * (distance >= 0)).to(scores.dtype)

    lifted = lift(decayed, (randn(2, 6, 6),))
    (table,) = lifted.parameters.values()
    distance = torch.arange(6)[:, None] - torch.arange(6)
    torch.testing.assert_close(table, torch.exp(distance.clamp(min=0) * -0.5))
    assert [n.shape for n in nodes_of(lifted, elementwise.GE)] == [(6, 6)]


def test_a_mask_in_a_buffer_becomes_a_comparison(runner: Any) -> None:
    class Masked(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("seen", torch.tril(torch.ones(9, 9)).view(1, 1, 9, 9))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.masked_fill(self.seen[:, :, :5, :7] == 0, float("-inf"))

    module, x = Masked(), randn(2, 3, 5, 7)
    lifted = lift(module, (x,))
    runner.check(lifted, module(x), x)
    assert lifted.parameters == {}
    assert len(lifted.folded_sources) == 1
    assert nodes_of(lifted, elementwise.GE)


_TABLES: Any = st.tuples(
    st.integers(1, 6),
    st.integers(1, 6),
    st.integers(-6, 6),
    st.integers(-6, 6),
    st.sampled_from(["float32", "bfloat16", "bool", "int64"]),
    st.sampled_from(
        [(0.0, 1.0), (1.0, 0.0), (0.0, -0.0), (float("-inf"), 0.0), (3.0, float("nan"))]
    ),
    st.sampled_from([(), (1,), (2, 1)]),
    st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), max_size=1),
)


@given(_TABLES)
@settings(max_examples=200, deadline=None)
def test_bands_are_what_they_stand_for_bit_by_bit(drawn: Any) -> None:
    rows, columns, low, high, dtype, (inside, outside), lead, turned = drawn
    distance = torch.arange(columns) - torch.arange(rows)[:, None]
    within = (distance >= low) & (distance <= high)
    for i, j in turned:
        within[i % rows, j % columns] ^= True
    integer = dtype in ("bool", "int64")
    values = [torch.tensor(v if v == v else 7.0) for v in (inside, outside)]
    if integer:
        values = [v.clamp(min=-5).to(getattr(torch, dtype)) for v in values]
    else:
        values = [torch.tensor(v, dtype=getattr(torch, dtype)) for v in (inside, outside)]
    table = torch.where(within, *values).expand(*lead, rows, columns).contiguous()
    band = as_band(table)
    differ = values[0] != values[1] and inside == inside and outside == outside
    plain = not turned and bool(within.any()) and not bool(within.all())
    if differ and plain and rows > 1 and columns > 1:
        assert band is not None
    if band is not None:
        (found,) = run_reference(b.kernel_graph("g", [], [band]), [])
        assert found.dtype == table.dtype
        assert found.shape == table.shape
        assert torch.equal(found.contiguous().view(torch.uint8), table.view(torch.uint8))


def test_bool_mask_without_keys_gives_zero_by_definition() -> None:
    q = randn(1, 2, 3, 4)
    mask = torch.tensor([[True, False, True], [False, False, False], [True, True, True]])

    def program(q: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(q, q, q, attn_mask=mask)

    lifted = lift(program, (q, mask))
    from superopt.ir.semantics import expand

    (got,) = run_reference(expand(lifted.graph), [q, mask])
    torch.testing.assert_close(got, program(q, mask))


# -- other ways in -------------------------------------------------------------------------------


def test_exported_program_from_a_file(tmp_path: Path, runner: Any) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.GELU(), torch.nn.Linear(8, 2))
    x = randn(3, 4)
    torch.export.save(torch.export.export(model, (x,)), tmp_path / "model.pt2")
    lifted = lift_exported(torch.export.load(tmp_path / "model.pt2"))
    with torch.no_grad():
        runner.check(lifted, model(x), x)


def compiled_by_reference(subject: Any) -> tuple[Any, list[Any]]:
    """Return what torch.compile makes with the reference executor, and the graphs that it lifts."""
    lifted_graphs = []

    def backend(module: torch.fx.GraphModule, example_inputs: list[Any]) -> Any:
        lifted = lift_fx(module, example_inputs)
        lifted_graphs.append(lifted)

        def call(*args: Any) -> Any:
            outputs = run_reference(
                lifted.graph, [*lifted.flatten(args), *lifted.parameters.values()]
            )
            return lifted.unflatten(outputs)

        return call

    torch._dynamo.reset()
    return torch.compile(subject, backend=backend, dynamic=False), lifted_graphs


def test_fx_graph_from_torch_compile() -> None:
    torch.manual_seed(0)
    block = LlamaBlock()
    x = randn(2, 7, 32)
    with torch.no_grad():
        compiled, lifted_graphs = compiled_by_reference(block)
        torch.testing.assert_close(compiled(x), block(x))
    assert len(lifted_graphs) == 1
    assert nodes_of(lifted_graphs[0], composite.ATTENTION)


def test_autocast_in_an_fx_graph_is_a_part_of_the_program() -> None:
    linear = torch.nn.Linear(8, 8)

    def program(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.autocast("cpu", torch.bfloat16):
            y = linear(x)
        return y.float().exp(), y

    x = randn(4, 8)
    with torch.no_grad():
        compiled, lifted_graphs = compiled_by_reference(program)
        torch.testing.assert_close(compiled(x), program(x), rtol=2e-2, atol=2e-2)
    assert len(lifted_graphs) == 1


# -- what cannot be lifted -----------------------------------------------------------------------


def test_inference_tensors_are_not_folded(runner) -> None:
    with torch.inference_mode():
        table = torch.ones(3)

    def program(x: torch.Tensor) -> torch.Tensor:
        return x + torch.exp(table)

    x = torch.randn(3)
    lifted = lift(program, (x,))
    assert lifted.folded_sources == []
    with torch.inference_mode():
        table.add_(1)
    runner.check(lifted, program(x), x)


def test_control_flow_on_data_is_refused() -> None:
    def program(x: torch.Tensor) -> torch.Tensor:
        return x + 1 if x.sum() > 0 else x - 1

    with pytest.raises(LiftError, match="cannot export program"):
        lift(program, (randn(3),))


def helper(x: torch.Tensor) -> torch.Tensor:
    print("sum", x.sum().item())  # prints
    return x + 1


def writes(x: torch.Tensor) -> torch.Tensor:
    sys.stderr.write("here")  # writes
    return x + 1


def lists(x: torch.Tensor) -> torch.Tensor:
    sys.stdout.writelines(["here"])  # lists
    return x + 1


def reads(x: torch.Tensor) -> torch.Tensor:
    return x * x.sum().item()  # reads


def branches(x: torch.Tensor) -> torch.Tensor:
    return x + 1 if x.sum() > 0 else x - 1  # branches


@pytest.mark.parametrize(
    ("program", "why", "line"),
    [
        (lambda x: helper(x) * 2, "prints, which a plan would not do", "# prints"),
        (writes, "prints, which a plan would not do", "# writes"),
        (lists, "prints, which a plan would not do", "# lists"),
        (reads, "makes a number of data", "# reads"),
        (branches, "data-dependent", "# branches"),
    ],
)
def test_a_refusal_names_the_line_and_what_to_do(
    program: Any, why: str, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    streams = sys.stdout, sys.stderr
    with pytest.raises(LiftError) as refusal:
        lift(program, (randn(3),))
    assert why in str(refusal.value)
    assert 'torch.compile(backend="superopt")' in str(refusal.value)
    assert line in refusal.value.location
    assert (sys.stdout, sys.stderr) == streams
    assert capsys.readouterr().out == ""  # of tensors without values


def test_logs_warnings_and_what_other_threads_print_are_no_output_of_a_program(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def program(x: torch.Tensor) -> torch.Tensor:
        logging.StreamHandler().emit(logging.makeLogRecord({"msg": "logged"}))
        thread = threading.Thread(target=print, args=("printed elsewhere",))
        thread.start()
        thread.join()
        return x + 1

    lift(program, (randn(3),))
    written = capsys.readouterr()
    assert (written.out, written.err) == ("printed elsewhere\n", "logged\n")


def test_results_of_unknown_size_are_refused() -> None:
    with pytest.raises(LiftError, match=r"the shape \(u0, 1\) of its result depends on data"):
        lift(torch.nonzero, (randn(3),))


@pytest.mark.skipif(torch.__version__ < "2.13", reason="older PyTorch drops the check itself")
def test_what_acts_beside_its_results_is_refused() -> None:
    def checked(x: torch.Tensor) -> torch.Tensor:
        torch.ops.aten._linalg_check_errors(x.sum().int(), "checked", is_matrix=True)
        return x + 1

    with pytest.raises(LiftError, match="does something beside computing results"):
        lift(checked, (torch.zeros(3),))


@pytest.mark.parametrize("function", [torch.linalg.solve, lambda a, y: torch.linalg.inv(a) @ y])
def test_operators_that_raise_on_data_do_so_still(runner: Any, function: Any) -> None:
    matrix, right = torch.eye(4) * 2 + randn(4, 4) / 9, randn(4, 2)
    lifted = lift(lambda a, y: function(a * 2, y) + 1, (matrix, right))
    runner.check(lifted, function(matrix * 2, right) + 1, matrix, right)
    with pytest.raises(torch.linalg.LinAlgError, match="singular"):
        runner(lifted, torch.zeros(4, 4), right)


def test_complex_numbers_as_arguments(runner: Any) -> None:
    x = randn(4, 6)
    runner.check(lift(lambda x: (x * (1 - 2j)).abs(), (x,)), (x * (1 - 2j)).abs(), x)


def test_no_tensor_result_is_refused() -> None:
    with pytest.raises(SuperoptError, match="returns no tensor"):
        lift(lambda x: 3, (randn(3),))


def test_dynamic_export_is_refused() -> None:
    class Double(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * 2

    shapes = {"x": {0: torch.export.Dim.DYNAMIC}}
    program = torch.export.export(Double(), (randn(3, 4),), dynamic_shapes=shapes)
    with pytest.raises(LiftError, match="dynamic shape"):
        lift_exported(program)


# -- promotion and broadcasting ------------------------------------------------------------------

_DTYPES = [d for d in DTYPES if not d.is_complex]
_SHAPES = [(), (1,), (3,), (2, 1), (2, 3), (4, 1, 3)]
_NUMBERS = st.sampled_from([True, 2, 0.5])


@given(st.sampled_from(_DTYPES), st.sampled_from(_SHAPES), st.sampled_from(_DTYPES), st.data())
@settings(max_examples=200)
def test_promotion_is_torchs(left: Any, shape: Any, right: Any, data: st.DataObject) -> None:
    x = b.input_("x", shape, left)
    number = data.draw(st.booleans())
    y: Any = (
        data.draw(_NUMBERS) if number else b.input_("y", data.draw(st.sampled_from(_SHAPES)), right)
    )
    tensors = [
        torch.empty(o.shape, dtype=DTYPES[o.tensor.dtype]) if isinstance(o, Node) else o
        for o in (x, y)
    ]
    assert DTYPES[common_dtype(x, y)] is torch.result_type(*tensors)


_OPERATORS = st.sampled_from([torch.add, torch.mul, torch.div, torch.maximum, torch.lt, torch.eq])


@given(
    st.lists(st.tuples(st.sampled_from(_SHAPES), st.sampled_from(_DTYPES)), min_size=4, max_size=4),
    st.lists(_OPERATORS, min_size=3, max_size=3),
)
@settings(max_examples=10)
def test_broadcast_chains_equal_eager(operands: Any, operators: Any) -> None:
    values = [
        (randn(*shape, seed=i).abs() * 3 + 1).to(DTYPES[dtype])
        for i, (shape, dtype) in enumerate(operands)
    ]

    def program(*tensors: torch.Tensor) -> torch.Tensor:
        result = tensors[0]
        for operator, tensor in zip(operators, tensors[1:], strict=True):
            result = operator(result, tensor)
        return result

    try:
        expected = program(*values)
    except RuntimeError:
        return  # the shapes do not broadcast
    lifted = lift(program, values)
    assert not nodes_of(lifted, library.OPAQUE)
    (got,) = run_reference(lifted.graph, lifted.flatten(values))
    torch.testing.assert_close(got, expected, rtol=2e-2, atol=1e-2)
    assert got.dtype is expected.dtype


# -- simplification ------------------------------------------------------------------------------


def _causal_masks() -> list[Any]:
    infinity = float("-inf")
    ones = torch.ones
    return [
        lambda x: x.masked_fill(~ones(6, 6, dtype=torch.bool).tril(), infinity),
        lambda x: x.masked_fill(ones(6, 6).triu(1).bool(), infinity),
        lambda x: x.masked_fill(ones(6, 6).tril() == 0, infinity),
        lambda x: torch.where(ones(6, 6).tril() > 0, x, infinity),
    ]


@pytest.mark.parametrize("program", _causal_masks())
def test_causal_masks_become_one_comparison(program: Any, runner: Any) -> None:
    x = randn(6, 6)
    lifted = lift(program, (x,))
    names = [n.op.name for n in lifted.graph.nodes() if n.tensor.dtype.value == "bool"]
    assert len(names) == 1
    assert names[0] in ("lt", "le", "gt", "ge")
    assert not lifted.parameters
    runner.check(lifted, program(x), x, rtol=0, atol=0)


def test_comparison_with_nan_is_not_inverted(runner: Any) -> None:
    x = torch.tensor([1.0, float("nan"), -1.0])
    lifted = lift(lambda t: torch.where(~(t > 0), 1.0, t), (x,))
    runner.check(lifted, torch.where(~(x > 0), 1.0, x), x)


def test_filled_operands_keep_the_shape_of_the_result(runner: Any) -> None:
    x = randn(3)
    lifted = lift(lambda t: (t * torch.ones(2, 3), torch.zeros(4) + 1, t * 1), (x,))
    runner.check(lifted, (x * torch.ones(2, 3), torch.ones(4), x), x)


def test_numbers_in_tensors_are_computed(runner: Any) -> None:
    def program(x: torch.Tensor) -> torch.Tensor:
        return x @ (torch.eye(7) - torch.ones(7, 7) / 7)

    x = randn(3, 7)
    lifted = lift(program, (x,))
    assert not lifted.parameters
    runner.check(lifted, program(x), x)
    tiny = lift(lambda x: x + torch.ones(7) / torch.full((7,), 1e-60), (x,))
    runner.check(tiny, x + torch.inf, x)


def test_a_place_outside_of_its_row_is_seen(runner: Any) -> None:
    x, index = randn(3, 7), torch.tensor([[2], [7], [-1]])
    lifted = lift(lambda x, i: x.scatter(1, i, 0.5), (x, index))
    inside = x.scatter(1, torch.tensor([[2], [0], [0]]), 0.5)
    inside[1:] = float("nan")
    runner.check(lifted, inside, x, index)


@pytest.mark.parametrize(
    ("function", "views"),
    [
        (lambda t: t.unsqueeze(2).permute(0, 2, 1).squeeze(1), 0),
        (lambda t: t.unsqueeze(0).permute(1, 0, 2), 1),
        (lambda t: t.unsqueeze(-1).permute(2, 1, 0).transpose(1, 2).squeeze(0), 0),
        (lambda t: t.unsqueeze(-1).permute(1, 2, 0).squeeze(1), 3),
        (lambda t: t.reshape(9).reshape(3, 1, 3).transpose(0, 1), 1),
        (lambda t: torch.einsum("ij,jk->ik", torch.einsum("ij,kj->ik", t, t).exp(), t), 3),
    ],
)
def test_views_that_leave_the_order_are_one_reshape_at_most(
    function: Any, views: int, runner: Any
) -> None:
    x = randn(3, 3)
    lifted = lift(lambda t: function(t * 2) + 0, (x,))
    found = nodes_of(lifted, structural.RESHAPE) + nodes_of(lifted, structural.PERMUTE)
    assert len(found) == views
    runner.check(lifted, function(x * 2) + 0, x)


@pytest.mark.parametrize(
    ("program", "joined"),
    [
        (lambda x: F.unfold(x, 3, padding=1), 2),
        (lambda x: F.unfold(x, 2, stride=2), 0),
        (lambda x: x.unfold(-1, 3, 1), 1),
        (lambda x: x.unfold(-1, 4, 4), 0),
    ],
)
def test_small_windows_are_parts_that_lie_somewhere(program: Any, joined: int) -> None:
    ops = [n.op for n in lift(program, (torch.randn(2, 3, 12, 12),)).graph.nodes()]
    assert structural.TAKE not in ops
    assert structural.GATHER not in ops
    assert ops.count(structural.CONCAT) == joined


@pytest.mark.parametrize("name", ["index_add", "index_copy", "index_add_"])
def test_rows_that_are_added_or_copied_are_one_operator(name: str) -> None:
    lifted = lift(
        lambda x, i, y: getattr(x * 2, name)(0, i, y), (randn(4, 3), torch.arange(2), randn(2, 3))
    )
    (row,) = nodes_of(lifted, library.OPAQUE)
    assert row.attrs.target == f"aten.{name.rstrip('_')}.default"


def test_nodes_know_the_users_line() -> None:
    lifted = lift(BertLayer().eval(), (randn(1, 3, 32),), {"mask": torch.ones(1, 3).bool()})
    (node,) = nodes_of(lifted, composite.SOFTMAX)
    assert "test_frontend.py" in lifted.locations[node]
    assert "scores.softmax(-1)" in lifted.locations[node]


def test_errors_name_the_users_line() -> None:
    class Unsupported(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.to(torch.float8_e5m2).to(torch.float32)

    with pytest.raises(LiftError, match=r"float8_e5m2(.|\n)*test_frontend\.py"):
        lift(Unsupported(), (randn(3),))


def test_what_is_folded_lies_where_the_inputs_are() -> None:
    device = torch.device("meta")
    lifted = lift(
        lambda x: x * torch.cos(torch.arange(100, device=x.device) ** 1.5),
        (torch.ones(100, device=device),),
    )
    assert [t.device for t in lifted.parameters.values()] == [device]


def test_a_program_that_moves_tensors_between_devices_is_refused() -> None:
    with pytest.raises(LiftError, match=r"several devices \(cpu, meta\)"):
        lift(lambda x: (x + 1).to("meta"), (torch.ones(2),))
