"""Every configuration of the tuning space computes the same thing, on derived schedules too."""

import pytest

from superopt.codegen.cpu import CpuConfig, configs
from superopt.codegen.cpu.compile import find_compiler
from superopt.ir import build as b
from superopt.ir.build import BlockBuilder, accum_sum
from superopt.ir.node import topological
from superopt.ir.semantics import expand
from superopt.ir.types import DType
from superopt.search.emit import block_graph
from superopt.search.partition import is_compute
from superopt.search.region import make_region
from superopt.search.schedule import derive
from tests.codegen.test_cpu_lower import attention, check, linear

pytestmark = pytest.mark.skipif(find_compiler() is None, reason="no C++ compiler")


class Narrow:
    vector_bytes = 32
    bf16 = ""


@pytest.mark.parametrize(
    "graph",
    [
        attention(1, 37, 53, 24, 16, 20),
        linear(9, 70, 200, (9, 70, 200), transposed=True),
        linear(9, 70, 200, (9, 32, 200), transposed=False),
    ],
    ids=["attention", "linear", "matmul"],
)
def test_all_configs_agree(tmp_path, graph):
    found = configs(graph)
    assert len(found) == len(set(found)) > 2
    for config in found:
        check(graph, tmp_path, config=config, tolerance=1e-4)


def test_configs_know_the_registers():
    graph = attention(1, 64, 64, 64, 64, 64)
    for config in configs(graph, Narrow()):
        assert config.rows * config.vectors + config.vectors + 1 <= 16
    for config in configs(graph):
        assert config.rows * config.vectors + config.vectors + 1 <= 32


def test_large_outputs_may_pass_the_caches(tmp_path):
    x = b.input_("x", (600, 2050))
    build = BlockBuilder("copy", grid={"m": 100})
    build.store(b.mul(build.load(x, ("m", 6), 2050), 2.0), (600, 2050), ("m", 6), 2050)
    graph = build.graph()
    found = configs(graph)
    assert CpuConfig(store_past=True) in found
    source = check(graph, tmp_path, config=CpuConfig(store_past=True))
    assert "store_past" in source.text


def _softmax(x):
    e = b.exp(b.sub(x, b.reduce_max(x, -1)))
    return b.div(e, b.reduce_sum(e, -1))


def _grouped_attention():
    q = b.input_("q", (2, 3, 5, 16))
    k, v = b.input_("k", (2, 1, 70, 16)), b.input_("v", (2, 1, 70, 16))
    s = b.mul(b.matmul(q, b.transpose(k)), 0.25)
    return b.kernel_graph("grouped", [q, k, v], [b.matmul(_softmax(s), v)])


def _norm_linear():
    x, w = b.input_("x", (9, 70)), b.input_("w", (40, 70))
    scale = b.sqrt(b.add(b.mean(b.mul(x, x), -1), 1e-5))
    return b.kernel_graph("norm", [x, w], [b.div(b.matmul(x, b.transpose(w)), scale)])


def _layer_norm():
    x = b.input_("x", (9, 70))
    d = b.sub(x, b.mean(x, -1))
    y = b.div(d, b.sqrt(b.add(b.mean(b.mul(d, d), -1), 1e-5)))
    return b.kernel_graph("layer_norm", [x], [y])


def _label_loss():
    x, label = b.input_("x", (9, 70)), b.input_("label", (9, 1), DType.I64)
    place = b.minimum(b.maximum(label, 0), 69)
    total = b.reduce_sum(b.exp(b.sub(x, b.reduce_max(x, -1))), -1)
    loss = b.sub(b.add(b.log(total), b.reduce_max(x, -1)), b.gather(x, place, -1))
    return b.kernel_graph("label_loss", [x, label], [loss])


def _rows_of_a_table():
    x, label = b.input_("x", (20, 70)), b.input_("label", (9, 1), DType.I64)
    place = b.minimum(b.maximum(label, 0), 19)
    row = b.gather(x, b.broadcast(place, (9, 70)), -2)
    scale = b.sqrt(b.add(b.mean(b.mul(row, row), -1), 1e-5))
    return b.kernel_graph("rows", [x, label], [b.div(row, scale)])


@pytest.mark.parametrize(
    "make", [_grouped_attention, _norm_linear, _layer_norm, _label_loss, _rows_of_a_table]
)
def test_every_derived_schedule(tmp_path, make):
    graph = expand(make())
    region = make_region(graph, [n for n in topological(graph.outputs) if is_compute(n)])
    schedules = derive(region)
    assert schedules
    for schedule in schedules:
        for size in (7, 16):
            tiles = {a: min(size, schedule.space.extent(a)) for a in schedule.roles}
            check(block_graph(schedule, tiles, graph.name), tmp_path, tolerance=1e-4)


def test_accumulated_elementwise_products(tmp_path):
    x = b.input_("x", (5, 33))
    build = BlockBuilder("squares", grid={"m": 1}, loops={"k": 3})
    t = build.load(x, 5, ("k", 11))
    build.store(accum_sum(b.mul(t, t), "k"), (5, 11), 5, 11)
    check(build.graph(), tmp_path)
