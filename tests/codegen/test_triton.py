"""Generated Triton against the meaning of block graphs, and compiled for GPUs that are not here.

Triton chooses its interpreter when it is imported, so this file runs itself in a second process.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

from superopt.codegen.triton.compile import compile_ahead, load
from superopt.codegen.triton.expressions import LOWER
from superopt.codegen.triton.lower import TritonConfig, lower
from superopt.ir import build as b
from superopt.ir.build import BlockBuilder, accum_rescaled, accum_sum, accumulate, finite_or_zero
from superopt.ir.ops import contraction, elementwise, tile
from superopt.ir.types import DType
from superopt.verify.reference import run_reference

TORCH = {DType.F32: torch.float32, DType.F16: torch.float16, DType.I64: torch.int64}


def attention(queries, keys, q_tile, k_tile, *, causal=False, dtype=DType.F32):
    heads, width = 2, 24
    shapes = {"q": queries, "k": keys, "v": keys}
    q, k, v = (b.input_(n, (heads, s, width), dtype) for n, s in shapes.items())
    grid = {"h": heads, "m": -(-queries // q_tile)}
    build = BlockBuilder("attention", grid=grid, loops={"n": -(-keys // k_tile)})
    if causal:
        build.bound("n", {"m": q_tile, "n": -k_tile}, q_tile - 1)
    q, k, v = (
        b.cast(build.load(t, ("h", 1), split, width), DType.F32)
        for t, split in ((q, ("m", q_tile)), (k, ("n", k_tile)), (v, ("n", k_tile)))
    )
    s = b.mul(b.matmul(q, b.transpose(k)), width**-0.5)
    if causal:
        i = b.reshape(build.index(queries, ("m", q_tile)), (1, q_tile, 1))
        j = b.reshape(build.index(keys, ("n", k_tile)), (1, 1, k_tile))
        s = b.where(b.le(j, i), s, float("-inf"))
    m = accumulate(tile.PREFIX_MAX, b.reduce_max(s, -1), "n")
    p = b.exp(b.sub(s, finite_or_zero(m)))
    o = accum_rescaled(b.matmul(p, v), m, "n")
    y = b.cast(b.div(o, accum_rescaled(b.reduce_sum(p, -1), m, "n")), dtype)
    build.store(y, (heads, queries, width), ("h", 1), ("m", q_tile), width)
    return build.graph()


def norm_linear():
    x, w = b.input_("x", (7, 100)), b.input_("w", (100, 50))
    build = BlockBuilder("norm_linear", grid={"m": 2, "n": 3}, loops={"k": 4})
    t = build.load(x, ("m", 4), ("k", 32))
    y = accum_sum(b.matmul(t, build.load(w, ("k", 32), ("n", 20))), "k")
    squares = accum_sum(b.reduce_sum(b.mul(t, t), -1), "k")
    y = b.div(y, b.sqrt(b.add(b.div(squares, 100.0), 1e-6)))
    build.store(y, (7, 50), ("m", 4), ("n", 20))
    return build.graph()


def two_loops():
    x = b.input_("x", (6, 50), strides=(1, 6))
    build = BlockBuilder("normalize", grid={"m": 3}, loops={"k": 4, "j": 4})
    mean = b.div(accum_sum(b.reduce_sum(build.load(x, ("m", 2), ("k", 13)), -1), "k"), 50.0)
    build.store(b.sub(build.load(x, ("m", 2), ("j", 13)), mean), (6, 50), ("m", 2), ("j", 13))
    return build.graph()


def reductions():
    x = b.input_("x", (4, 6, 37))
    build = BlockBuilder("reduce", grid={"a": 2})
    t = b.add(b.mul(build.load(x, ("a", 2), 6, 37), 0.02), 1.0)
    for name in ("SUM", "MAX", "MIN", "PROD"):
        y = b.reduce(getattr(contraction, f"REDUCE_{name}"), t, (-1, -2))
        build.store(y, (4, 1, 1), ("a", 2), 1, 1)
    return build.graph()


def accumulators():
    x = b.input_("x", (5, 22))
    build = BlockBuilder("accumulate", grid={"m": 1}, loops={"k": 3})
    t = build.load(x, 5, ("k", 8))
    for op in (tile.ACCUM_SUM, tile.ACCUM_MAX, tile.ACCUM_MIN, tile.ACCUM_PROD):
        build.store(accumulate(op, t, "k"), (5, 8), 5, 8)
    m = accumulate(tile.PREFIX_MAX, b.reduce_max(t, -1), "k")
    build.store(accumulate(tile.ACCUM_LAST, m, "k"), (5, 1), 5, 1)
    return build.graph()


def elementwise_ops():
    x, y = b.input_("x", (3, 37)), b.input_("y", (3, 37))
    build = BlockBuilder("elementwise", grid={"m": 3})
    s, t = build.load(x, ("m", 1), 37), build.load(y, ("m", 1), 37)
    for op in LOWER.rules:
        if op.attrs_class is None and op.infer is elementwise.EXP.infer and op.arity == 1:
            build.store(b.elementwise_op(op, s), (3, 37), ("m", 1), 37)
    for op in (elementwise.NEG, elementwise.ABS, elementwise.ISNAN, elementwise.ISINF):
        build.store(b.elementwise_op(op, s), (3, 37), ("m", 1), 37)
    for name in ("ADD", "SUB", "MUL", "DIV", "MAXIMUM", "MINIMUM", "LT", "GE", "EQ", "NE"):
        build.store(b.elementwise_op(getattr(elementwise, name), s, t), (3, 37), ("m", 1), 37)
    build.store(b.pow_(s, 3.0), (3, 37), ("m", 1), 37)
    return build.graph()


def integers():
    x, y = b.input_("x", (3, 37), DType.I64), b.input_("y", (3, 37), DType.I64)
    build = BlockBuilder("integers", grid={"m": 3})
    s, t = build.load(x, ("m", 1), 37), build.load(y, ("m", 1), 37)
    for name in ("ADD", "SUB", "MUL", "AND", "OR", "XOR", "MAXIMUM", "MINIMUM", "GT"):
        build.store(b.elementwise_op(getattr(elementwise, name), s, t), (3, 37), ("m", 1), 37)
    build.store(b.not_(s), (3, 37), ("m", 1), 37)
    build.store(b.reduce_sum(s, -1), (3, 1), ("m", 1), 1)
    build.store(b.reduce_max(b.sub(s, 50), -1), (3, 1), ("m", 1), 1)
    build.store(b.cast(s, DType.F32), (3, 37), ("m", 1), 37)
    return build.graph()


def split_k():
    x, w = b.input_("x", (9, 70)), b.input_("w", (70, 17))
    build = BlockBuilder("split", grid={"s": 3})
    y = b.matmul(build.load(x, 9, ("s", 24)), build.load(w, ("s", 24), 17))
    build.store(b.reshape(y, (1, 9, 17)), (3, 9, 17), ("s", 1), 9, 17)
    return build.graph()


CASES = {
    "attention": lambda: attention(37, 53, 16, 20),
    "attention-causal": lambda: attention(40, 40, 16, 9, causal=True),
    "attention-row": lambda: attention(5, 70, 1, 33),
    "attention-half": lambda: attention(37, 70, 16, 32, dtype=DType.F16),
    "norm-linear": norm_linear,
    "two-loops": two_loops,
    "reductions": reductions,
    "accumulators": accumulators,
    "elementwise": elementwise_ops,
    "integers": integers,
    "split-k": split_k,
}


def tensor(node, generator):
    type_ = node.tensor
    if type_.dtype.is_integer:
        dense = torch.randint(-5, 20, type_.shape, generator=generator, dtype=TORCH[type_.dtype])
    else:
        dense = torch.randn(type_.shape, generator=generator).to(TORCH[type_.dtype])
    if type_.strides is None:
        return dense
    return torch.empty_strided(type_.shape, type_.strides).copy_(dense)


def difference(name, folder):
    graph = CASES[name]()
    generator = torch.Generator().manual_seed(3)
    inputs = [tensor(i, generator) for i in graph.inputs]
    try:
        found = load(lower(graph, TritonConfig(), graph.name), folder)(*inputs)
        for got, want in zip(found, run_reference(graph, inputs), strict=True):
            near = 1e-2 if want.dtype is torch.float16 else 5e-5
            torch.testing.assert_close(got, want, rtol=near, atol=near, equal_nan=True)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


@pytest.fixture(scope="module")
def differences():
    done = subprocess.run(
        [sys.executable, "-W", "ignore", __file__],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", CASES)
def test_interpreted_kernels_compute_the_meaning(differences, name):
    assert differences[name] == ""


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("name", ["attention-causal", "attention-half", "norm-linear", "integers"])
def test_compiles_without_a_gpu(tmp_path, name, arch):
    graph = CASES[name]()
    assert compile_ahead(lower(graph, TritonConfig(), graph.name), arch, tmp_path)[:4] == b"\x7fELF"


def test_every_elementwise_op_has_a_rule_or_a_reason():
    kinds = {o.name for o in vars(elementwise).values() if getattr(o, "infer", None)}
    assert not kinds & set(LOWER.missing())


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place:
        print(json.dumps({name: difference(name, Path(place)) for name in CASES}))
