import ctypes
import threading

import pytest
import torch

from superopt.backends import CpuBackend
from superopt.codegen.errors import CodegenError
from superopt.errors import PlanError
from superopt.ir import build as b
from superopt.ir.composite import SOFTMAX
from superopt.ir.node import make
from superopt.ir.ops.contraction import AxisAttrs
from superopt.plan import OutputSpec
from superopt.runtime import (
    _same_strides,
    build_program,
    load_tensor,
    store_tensor,
    with_layouts,
    with_result_layouts,
)
from superopt.verify.opaque import duplicate, restride, spread
from superopt.verify.reference import run_reference


def scale_block(rows: int, columns: int, strides=None):
    builder = b.BlockBuilder("scale", grid={"m": rows})
    x = builder.load(b.input_("x", (rows, columns), strides=strides), ("m", 1), columns)
    builder.store(b.mul(x, 2.0), (rows, columns), ("m", 1), columns)
    return builder.graph()


def python_scale(rows: int, columns: int, strides: tuple[int, int]):
    """Stand in for a compiled kernel: reads and writes through addresses alone."""

    def entry(source: int, target: int) -> None:
        row, column = strides
        span = (rows - 1) * row + (columns - 1) * column + 1
        read = (ctypes.c_float * span).from_address(source)
        write = (ctypes.c_float * (rows * columns)).from_address(target)
        for i in range(rows):
            for j in range(columns):
                write[i * columns + j] = 2 * read[i * row + j * column]

    return entry


def test_library_nodes_views_and_constants_match_the_reference():
    x, y = b.input_("x", (4, 6)), b.input_("y", (6, 8))
    product = b.matmul(b.mul(x, 0.5), y)
    moved = b.transpose(b.slice_(product, -1, 1, 7, 2))
    soft = make(SOFTMAX, (moved,), AxisAttrs(-1))
    shaped = b.reshape(b.add(soft, b.iota((3, 4), -1, b.DType.F32)), (12,))
    graph = b.kernel_graph("g", [x, y], [shaped, b.broadcast(b.reduce_sum(product, -1), (4, 5))])
    given = [torch.randn(4, 6), torch.randn(6, 8)]
    results = build_program(graph, {}).run(*given)
    for result, expected in zip(results, run_reference(graph, given), strict=True):
        torch.testing.assert_close(result, expected)


def test_kernels_get_addresses_of_views_without_a_copy():
    x = b.input_("x", (4, 10))
    part = b.slice_(x, -1, 2, 7)
    inner = scale_block(4, 5, strides=(10, 1))
    (result,) = b.apply_graph(inner, [part])
    graph = b.kernel_graph("g", [x], [b.transpose(result)])
    program = build_program(graph, {inner.digest(): python_scale(4, 5, (10, 1))})
    given = torch.randn(4, 10)
    torch.testing.assert_close(program.run(given)[0], given[:, 2:7].t() * 2)
    assert "+ 8" in program.source
    assert "restride" not in program.source


def test_a_layout_that_a_kernel_does_not_expect_is_copied():
    x = b.input_("x", (4, 5))
    inner = scale_block(4, 5)
    (result,) = b.apply_graph(inner, [x])
    graph = b.kernel_graph("g", [x], [result])
    entries = {inner.digest(): python_scale(4, 5, (5, 1))}
    given = torch.randn(5, 4).t()
    program = build_program(graph, entries, strides=[given.stride()])
    torch.testing.assert_close(program.run(given)[0], given * 2)
    assert "restride" in program.source


def test_an_input_with_an_offset_is_read_where_it_lies():
    x = b.input_("x", (4, 5))
    inner = scale_block(4, 5)
    (result,) = b.apply_graph(inner, [x])
    shifted = b.add(b.reshape(x, (5, 4)), 1.0)
    graph = b.kernel_graph("g", [x], [result, shifted])
    program = build_program(graph, {inner.digest(): python_scale(4, 5, (5, 1))})
    given = torch.randn(40)[7:27].view(4, 5)
    first, second = program.run(given)
    torch.testing.assert_close(first, given * 2)
    torch.testing.assert_close(second, given.reshape(5, 4) + 1)


def test_a_reshaped_result_is_allocated_in_its_shape():
    x = b.input_("x", (4, 5))
    inner = scale_block(4, 5)
    (result,) = b.apply_graph(inner, [x])
    graph = b.kernel_graph("g", [x], [b.reshape(result, (20,))])
    entries = {inner.digest(): python_scale(4, 5, (5, 1))}
    given = torch.randn(4, 5)
    program = build_program(graph, entries)
    torch.testing.assert_close(program.run(given)[0], given.reshape(20) * 2)
    assert "as_strided" not in program.source


def test_a_result_returned_in_several_shapes_and_read_by_a_library():
    x = b.input_("x", (4, 5))
    inner = scale_block(4, 5)
    (result,) = b.apply_graph(inner, [x])
    flat, across = b.reshape(result, (20,)), b.reshape(result, (2, 10))
    part = b.slice_(result, 0, 1, 3)
    outputs = [flat, across, result, part, b.matmul(result, b.transpose(result))]
    graph = b.kernel_graph("g", [x], outputs)
    given = torch.randn(4, 5)
    program = build_program(graph, {inner.digest(): python_scale(4, 5, (5, 1))})
    twice = given * 2
    wanted = [twice.reshape(20), twice.reshape(2, 10), twice, twice[1:3], twice @ twice.t()]
    for result, expected in zip(program.run(given), wanted, strict=True):
        torch.testing.assert_close(result, expected)


def chain(count: int):
    x = b.input_("x", (4, 5))
    inner = scale_block(4, 5)
    value = x
    for _ in range(count):
        (value,) = b.apply_graph(inner, [value])
    graph = b.kernel_graph("g", [x], [value])
    return graph, {inner.digest(): python_scale(4, 5, (5, 1))}


def test_results_between_kernels_live_in_scratch_memory():
    program = build_program(*chain(3))
    given = torch.randn(4, 5)
    torch.testing.assert_close(program.run(given)[0], given * 8)
    assert program.source.count("empty(") == 1  # the result
    assert "work = pool.pop()" in program.source  # the scratch memory


def test_a_program_may_run_in_several_threads_at_once():
    program = build_program(*chain(4))
    wrong: list[int] = []

    def work(seed: int) -> None:
        given = torch.randn(4, 5, generator=torch.Generator().manual_seed(seed))
        for _ in range(20):
            if not torch.equal(program.run(given)[0], given * 16):
                wrong.append(seed)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_missing_kernel_is_an_error_that_says_what_to_do():
    graph, _ = chain(1)
    with pytest.raises(PlanError, match="optimize again"):
        build_program(graph, {})


def test_results_alias_what_eager_results_alias():
    x = b.input_("x", (4, 6))
    graph = b.kernel_graph("g", [x], [x, b.transpose(x), b.add(x, 1.0), x])
    specs = [
        OutputSpec((4, 6), (6, 1), "input:0", 0, same=True),
        OutputSpec((6, 4), (1, 6), "input:0", 0),
        OutputSpec((4, 6), (1, 4)),
        OutputSpec((4, 6), (6, 1)),
    ]
    given = torch.randn(4, 6)
    same, view, fresh, copy = build_program(graph, {}, outputs=specs).run(given)
    assert same is given
    assert view.data_ptr() == given.data_ptr()
    assert view.stride() == (1, 6)
    assert fresh.stride() == (1, 4)
    torch.testing.assert_close(fresh, given + 1)
    assert copy.data_ptr() != given.data_ptr()
    assert torch.equal(copy, given)


def test_two_results_never_share_memory_unless_eager_ones_do():
    x = b.input_("x", (4, 6))
    y = b.add(x, 1.0)
    graph = b.kernel_graph("g", [x], [y, y, y])
    specs = [
        OutputSpec((4, 6), (6, 1)),
        OutputSpec((4, 6), (6, 1)),
        OutputSpec((4, 6), (6, 1), "output:0", 0, same=True),
    ]
    first, second, third = build_program(graph, {}, outputs=specs).run(torch.randn(4, 6))
    assert first.data_ptr() != second.data_ptr()
    assert third is first
    assert torch.equal(first, second)


def test_changed_inputs_are_written_after_all_is_computed():
    x, y = b.input_("x", (3,)), b.input_("y", (3,))
    graph = b.kernel_graph("g", [x, y], [y, x, b.add(x, y)])
    specs = [OutputSpec((3,), (1,))]
    program = build_program(graph, {}, outputs=specs, writes={0: 0, 1: 1})
    first, second = torch.tensor([1.0, 2, 3]), torch.tensor([10.0, 20, 30])
    (total,) = program.run(first, second)
    assert total.tolist() == [11, 22, 33]
    assert first.tolist() == [10, 20, 30]
    assert second.tolist() == [1, 2, 3]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool])
def test_stored_tensors_come_back(dtype):
    tensor = (torch.randn(3, 4) * 10).to(dtype).t()
    assert torch.equal(load_tensor(store_tensor(tensor)), tensor)
    assert load_tensor(store_tensor(torch.empty(0, 3))).shape == (0, 3)


def test_restride_keeps_values_for_any_strides():
    given = torch.randn(3, 1, 4)
    assert torch.equal(restride(given, (1, 7, 3)), given)
    spread = given.expand(3, 5, 4)
    made = restride(spread, (4, 0, 1))
    assert made.stride() == (4, 0, 1)
    assert torch.equal(made, spread)


def test_graphs_take_the_layout_of_tensors():
    x = b.input_("x", (4, 6))
    graph = b.kernel_graph("g", [x], [b.add(x, 1.0)])
    moved = with_layouts(graph, [torch.randn(6, 4).t()])
    assert moved.inputs[0].tensor.strides == (1, 4)
    assert with_layouts(graph, [torch.randn(4, 6)]).digest() == graph.digest()


@pytest.mark.parametrize(
    ("strides", "copied"),
    [((1, 99, 4), True), ((6, 99, 1), False), ((7, 7, 1), False)],  # the last with gaps
)
def test_results_that_do_not_lie_row_major_are_copied(strides, copied):
    x = b.input_("x", (4, 1, 6))
    graph = b.kernel_graph("g", [x], [b.exp(x), b.neg(x)])  # the second is not returned
    specs = [OutputSpec((4, 1, 6), strides)]
    made = with_result_layouts(graph, specs, {})
    assert (made != graph) is copied
    given = torch.randn(4, 1, 6)
    program = build_program(made, {}, outputs=specs)
    (result,) = program.run(given)
    torch.testing.assert_close(result, given.exp())
    assert _same_strides(result, strides)
    assert ("restride" in program.source) is (strides == (7, 7, 1))


def test_what_is_written_to_inputs_or_is_one_lies_as_it_does():
    x = b.input_("x", (4, 6))
    graph = b.kernel_graph("g", [x], [b.exp(x), x])
    assert (
        with_result_layouts(graph, [OutputSpec((4, 6), (1, 4), "input:0", 0, True)], {0: 0})
        == graph
    )


def test_the_cpu_backend_compiles_what_the_program_calls(tmp_path):
    backend = CpuBackend(tmp_path)
    if not backend.usable():
        pytest.skip("needs a C++ compiler")
    inner = scale_block(8, 33)
    (source,) = backend.variants(inner, 1)
    assert not isinstance(source, CodegenError)
    (entry,) = backend.load([source])
    assert not isinstance(entry, CodegenError)
    x = b.input_("x", (8, 33))
    (result,) = b.apply_graph(inner, [x])
    program = build_program(b.kernel_graph("g", [x], [result]), {inner.digest(): entry})
    given = torch.randn(8, 33)
    assert torch.equal(program.run(given)[0], given * 2)


@pytest.mark.parametrize("before", [0, 1])
def test_scratch_memory_that_no_view_describes_is_copied(before):
    x = b.input_("x", (4, 5))
    inner, other = scale_block(4, 5), scale_block(5, 4)
    first = x
    for _ in range(before + 1):  # what came before lies where scratch memory begins
        (first,) = b.apply_graph(inner, [first])
    # a transposed result of a kernel, flattened and cut anew: no strides say that
    copied = b.reshape(b.transpose(first), (5, 4))
    mixed = b.reshape(b.permute(b.reshape(copied, (5, 2, 2)), (1, 0, 2)), (5, 4))
    (second,) = b.apply_graph(other, [mixed])
    # and one in a layout that the kernel does not take
    (third,) = b.apply_graph(other, [b.transpose(first)])
    graph = b.kernel_graph("g", [x], [second, third])
    entries = {
        inner.digest(): python_scale(4, 5, (5, 1)),
        other.digest(): python_scale(5, 4, (4, 1)),
    }
    given = torch.randn(4, 5)
    for result, expected in zip(
        build_program(graph, entries).run(given), run_reference(graph, [given]), strict=True
    ):
        torch.testing.assert_close(result, expected)


@pytest.mark.parametrize("strides", [(6, 1), (0, 1), (1, 1), (1, 4), (13, 2)])
def test_copies_lie_alike_whatever_shares_memory(strides):
    values = torch.randn(4, 6)
    made = spread(values, strides)
    copied = duplicate(made)
    for tensor in (made, copied):
        assert tuple(tensor.stride()) == strides
        assert set(tensor.flatten().tolist()) <= set(values.flatten().tolist())
    assert torch.equal(copied, made)
    assert copied.data_ptr() != made.data_ptr()
    if strides not in ((0, 1), (1, 1)):
        assert torch.equal(made, values)
