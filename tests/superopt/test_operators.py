"""Many operators in one compiled kernel, by values at which they go wrong, equal eager PyTorch."""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import superopt
from superopt.codegen import cpu
from superopt.codegen.errors import CodegenError
from superopt.frontend import lift
from superopt.ir.node import topological
from superopt.ir.semantics import expand
from superopt.ir.target import Target
from superopt.runtime import build_program
from superopt.search.emit import block_graph, place
from superopt.search.errors import NotFusible
from superopt.search.partition import is_compute
from superopt.search.region import make_region, substitute
from superopt.search.schedule import derive
from superopt.search.tiling import best_tiles

pytestmark = pytest.mark.skipif(cpu.find_compiler() is None, reason="no C++ compiler")

Operators = Mapping[str, Callable[..., torch.Tensor]]
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
NUMBERS = (0.1, 0.3, -0.7)


def in_one_kernel(
    operators: Operators, inputs: Sequence[torch.Tensor], folder: Path
) -> list[torch.Tensor]:
    """Return the results of operators on the same operands, of one kernel that computes all of them."""

    def program(*operands: torch.Tensor) -> list[torch.Tensor]:
        return [operator(*operands) for operator in operators.values()]

    graph = expand(lift(program, inputs).graph)
    machine = Target()
    region = make_region(graph, [n for n in topological(graph.outputs) if is_compute(n)])
    schedule = derive(region)[0]
    block = block_graph(schedule, best_tiles(schedule, machine, 1)[0][1], "operators")
    (kernel,) = cpu.compile_many([cpu.lower(block, cpu.CpuConfig(), block.name)], folder)
    assert not isinstance(kernel, CodegenError), kernel
    placed = zip(region.outputs, place(schedule, block, region.inputs), strict=True)
    found = build_program(substitute(graph, dict(placed)), {block.digest(): kernel}).run(*inputs)
    return list(found)


def check(
    operators: Operators, inputs: Sequence[torch.Tensor], folder: Path, *, near: float = 0.0
) -> None:
    found = in_one_kernel(operators, inputs, folder)
    for (name, operator), got in zip(operators.items(), found, strict=True):
        want = operator(*inputs)
        exact = not want.is_floating_point()
        torch.testing.assert_close(
            got,
            want,
            rtol=0 if exact else 2 * torch.finfo(want.dtype).eps,
            atol=0 if exact else near,
            equal_nan=True,
            msg=lambda text, name=name: f"{name}: {text}",
        )


def special(dtype: torch.dtype) -> torch.Tensor:
    """Return the values of a type that operators go wrong at, and some between them."""
    if not dtype.is_floating_point:
        held = torch.iinfo(dtype)
        near = [0, 1, -1, 2, -2, 3, 7, -7, 31, 32, 100, held.max, held.min, held.max - 1]
        return torch.tensor([v for v in near if held.min <= v <= held.max], dtype=dtype)
    held = torch.finfo(dtype)
    tiny = held.smallest_normal
    ends = [math.nan, math.inf, 0.0, tiny, tiny / 4, held.max, held.max / 3, 1 + held.eps]
    middle = [*(n / 8 for n in range(30)), 0.1, 0.3, 0.7, 20.0, 88.8, 100.0, 1e4]
    values = torch.tensor([*ends, *middle], dtype=torch.float64)
    return torch.cat([values, -values]).to(dtype)


@pytest.mark.parametrize("dtype", FLOATS[1:])
def test_numbers_are_rounded_where_they_become_tensors(dtype: torch.dtype, tmp_path: Path) -> None:
    operators = {}
    named = (
        torch.remainder,
        torch.fmod,
        torch.eq,
        torch.ne,
        torch.lt,
        torch.le,
        torch.gt,
        torch.ge,
    )
    for n in NUMBERS:
        operators |= {f"{f.__name__} {n}": lambda x, f=f, n=n: f(x, n) for f in named}
        operators |= {
            f"divided by {n}": lambda x, n=n: x / n,
            f"floor {n}": lambda x, n=n: torch.div(x, n, rounding_mode="floor"),
            f"threshold {n}": lambda x, n=n: F.threshold(x, n, 5.0),
            f"hardshrink {n}": lambda x, n=n: F.hardshrink(x, abs(n)),
            f"where {n}": lambda x, n=n: torch.where(x > n, n, x) == x,
            f"masked {n}": lambda x, n=n: x.masked_fill(x > 0, n) >= n,
            f"full {n}": lambda x, n=n: torch.where(x > 0, torch.full_like(x, n), x) == x,
            f"clamp {n}": lambda x, n=n: torch.clamp(x, n) == n,
        }
    check(operators, [special(dtype).nan_to_num(0, 0, 0).clamp(-100, 100)], tmp_path)


@pytest.mark.parametrize("dtype", FLOATS[1:])
def test_powers_are_of_rounded_numbers(dtype: torch.dtype, tmp_path: Path) -> None:
    x = torch.tensor([-2.0, 0.5, 3.0, 4000.0, 6e4], dtype=dtype)
    operators = {
        "to a number near 1": lambda x: x**1.0002,
        "to one that becomes 0": lambda x: x**1e-8 if dtype is torch.float16 else x**0.0,
        "of a number near 1": lambda x: torch.pow(1.0002, x),
    }
    check(operators, [x], tmp_path)


@pytest.mark.parametrize("dtype", FLOATS)
def test_activations_at_the_ends(dtype: torch.dtype, tmp_path: Path) -> None:
    """What is left of 1 + erf(x) or 1 + tanh(x) where they are -1 would be multiplied by x."""
    names = "relu relu6 elu selu celu leaky_relu gelu silu mish softplus softsign hardswish sigmoid tanh"
    operators = {n: getattr(F, n) for n in (*names.split(), "hardsigmoid", "logsigmoid")}
    operators["gelu by tanh"] = lambda x: F.gelu(x, approximate="tanh")
    ends = torch.tensor([-8.0, -20.0, -104.0, -1e4, 9.0, 30.0, 1e4], dtype=dtype)
    x = torch.cat([special(dtype).nan_to_num(0, 1, -1).clamp(-4, 4), ends])
    check(operators, [x], tmp_path, near=1e-6)


def test_numbers_that_were_integers_meanwhile(tmp_path: Path) -> None:
    x = torch.tensor([1e18, -1e18, math.nan, math.inf, 2.7, -2.7, -0.3] * 9)
    operators = {
        "half": lambda x: x.int() / 2,
        "narrow": lambda x: x.int().bfloat16(),
        "sign": lambda x: torch.copysign(x, x.int().float()),
    }
    check(operators, [x], tmp_path)


@pytest.mark.parametrize("dtype", INTEGERS)
def test_integers(dtype: torch.dtype, tmp_path: Path) -> None:
    operators = {
        "isnan": torch.isnan,
        "isinf": torch.isinf,
        "isfinite": torch.isfinite,
        "threshold": lambda x: F.threshold(x, 3, 20),
        "threshold of a fraction": lambda x: F.threshold(x, 2.0, 5.0),
        "half": lambda x: x > 0.5,
        "remainder": lambda x: x % 3,
        "floor": lambda x: x // 7,
        "shift": lambda x: x >> 3,
        "clamp": lambda x: x.clamp(2, 5),
        "square": lambda x: x * x,
        "float": lambda x: x.float(),
    }
    check(operators, [special(dtype)], tmp_path)


def test_roundings_that_a_program_asks_for_are_kept(tmp_path: Path) -> None:
    """Without them a kernel would compute the error of a rounding from what was not rounded: nothing."""
    operators = {
        "widened": lambda x, _: x - x.bfloat16().float(),
        "promoted": lambda x, _: x * 2 - (x * 2).bfloat16(),
        "a view": lambda x, _: x.view(-1) - x.half().view(-1).float(),
        "arithmetic between": lambda x, _: x - (x.bfloat16() * 1).float(),
        "a product between": lambda x, eye: x - (x.bfloat16() @ eye.bfloat16()).float(),
        "another type of 16 bits": lambda x, _: x.half() - x.half().bfloat16().half(),
        "a factor": lambda x, _: ((x * 3).bfloat16().float() / 3).sum(-1) - x.sum(-1),
        "stored": lambda x, _: x.bfloat16(),
    }
    x = torch.randn(16, 24, generator=torch.Generator().manual_seed(0))
    check(operators, [x, torch.eye(24)], tmp_path, near=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_steps_are_where_16_bits_have_them(dtype: torch.dtype, tmp_path: Path) -> None:
    """A comparison or a conversion to integers of what was not rounded goes the other way now and then."""
    operators = {
        "greater": lambda x: x * 3 > 1.1 * x,
        "equal": lambda x: x * 1.01 == x,
        "floor": lambda x: (x * x).floor(),
        "round": lambda x: (x * 3.3).round(),
        "whole": lambda x: (x * x).to(torch.int32),
        "remainder": lambda x: (x * 5.1) % 1 < 0.5,
        "infinite": lambda x: (x * 3e4).isinf(),
        "largest": lambda x: (x * 0.01 + 1).argmax(-1),
    }
    x = torch.randn(8, 98, generator=torch.Generator().manual_seed(0)).to(dtype)
    check(operators, [x], tmp_path)
    check({"a widened view": lambda x: (x * x).float().view(16, -1).floor()}, [x], tmp_path)


def test_what_does_not_fit_an_integer(tmp_path: Path) -> None:
    """As eager PyTorch has it on x86, where it matters: markers of missing values are made of NaN."""
    values = [math.nan, math.inf, -math.inf, 3e9, -3e9, 1e20, 300.7, -1.5]
    types = (torch.int64, torch.int32, torch.int16, torch.int8)
    operators = {str(t): lambda x, t=t: (x + 0).to(t) for t in types}
    operators |= {f"{t} and back": lambda x, t=t: (x + 0).to(t).float() for t in types}
    operators |= {
        "half of it": lambda x: x.long() / 2,
        "a view between": lambda x: x.int().view(8, 9).float().view(-1),
        "wider": lambda x: x.int().long().float(),
    }
    check(operators, [torch.tensor(values).repeat(9)], tmp_path)


def test_results_that_kernels_cannot_tell_apart(tmp_path: Path) -> None:
    """Roundings that a kernel leaves out are all that is between two results: each is still written."""
    x = torch.arange(99.0).bfloat16() + 0.5
    casts = {
        "wide": lambda x: x.float().to(torch.int32),
        "short": lambda x: x.to(torch.int32),
    }
    check(casts, [x], tmp_path)
    sums = {"short": lambda x: (x + x).float(), "wide": lambda x: x.float() + x.float()}
    check(sums, [x], tmp_path)
    sums = {
        "short": lambda x: (x + x).float().exp(),
        "wide": lambda x: (x.float() + x.float()).exp(),
    }
    with pytest.raises(NotFusible, match="two results"):
        in_one_kernel(sums, [x], tmp_path)


def test_differences_of_means_are_of_rounded_means(tmp_path: Path) -> None:
    """Rounding what is small costs nothing, and a program may return hardly anything else."""

    def distance(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return x.sigmoid().mean(-1) - y.sigmoid().mean(-1)

    x, y = torch.randn(2, 32, 512, generator=torch.Generator().manual_seed(0)).bfloat16()
    (found,) = in_one_kernel({"distance": distance}, [x, y], tmp_path)
    assert float((found == distance(x, y)).float().mean()) > 0.8


def test_numbers_do_not_exceed_their_maximum(tmp_path: Path) -> None:
    """It is not rounded where they are not: exponentials that it shifts would overflow."""

    def shifted(x: torch.Tensor) -> torch.Tensor:
        scores = x * 3
        top = scores.amax(-1, keepdim=True).clamp(min=0)
        return torch.exp(scores - top)

    x = (torch.randn(64, 512, generator=torch.Generator().manual_seed(0)) * 1e18).bfloat16()
    (found,) = in_one_kernel({"shifted": shifted}, [x], tmp_path)
    assert bool((found <= 1).all())


def test_compensated_sums_in_16_bits_are_not_optimized_away(tmp_path: Path) -> None:
    """What a sum in bfloat16 lost is nothing in float32; a kernel must not return that."""

    def step(total: torch.Tensor, lost: torch.Tensor, x: torch.Tensor) -> list[torch.Tensor]:
        added = x - lost
        after = total + added
        return [after, (after - total) - added]

    inputs = [
        t.bfloat16() for t in torch.randn(3, 64, 64, generator=torch.Generator().manual_seed(0))
    ]
    inputs[1] *= 0.01
    optimized = superopt.optimize(step, budget_s=5, cache=tmp_path)
    for found, expected in zip(optimized(*inputs), step(*inputs), strict=True):
        torch.testing.assert_close(found, expected, rtol=0.02, atol=1e-3)
