"""Is a candidate as accurate as the original? Both against the original in float64.

In: the original graph and a function that runs the candidate. Out: a `FloatVerdict`. Inputs come
from several distributions that make kernels fail: constant rows (cancellation), mixed scales, large
and tiny magnitudes, and values at the edge of overflow. A candidate may err a small multiple of what the
original itself errs at working precision, and may give inf or NaN only where the original does.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod, sqrt
from typing import final

import numpy as np
import torch

from superopt.ir.graph import Graph
from superopt.ir.ops import contraction
from superopt.ir.semantics import expand
from superopt.ir.types import DType, TensorType
from superopt.verify.ranges import draw_integers, integer_limits
from superopt.verify.reference import DTYPES, run_reference

RunCandidate = Callable[[list[torch.Tensor]], Sequence[torch.Tensor]]

ERROR_MULTIPLE = 4.0
"""How much larger than the original's own error a candidate's may be."""

SLACK_ULPS = 16.0
"""Errors below this many units in the last place of the output's scale are never held against it."""

DISTRIBUTIONS = ("normal", "uniform", "large", "tiny", "constant-rows", "mixed", "overflow-edge")


@final
@dataclass(frozen=True)
class FloatError:
    """Errors on one distribution, relative to the scale of the output."""

    distribution: str
    original: float
    candidate: float


@final
@dataclass(frozen=True)
class FloatVerdict:
    """The answer of the floating-point test; true in a condition when the candidate is accurate."""

    accurate: bool
    reason: str
    seed: int
    errors: tuple[FloatError, ...]
    seconds: float

    def __bool__(self) -> bool:
        return self.accurate


def draw_inputs(graph: Graph, distribution: str, seed: int) -> list[torch.Tensor]:
    """Draw one tensor per input: floats of the distribution, integers valid as indices."""
    source = np.random.default_rng([seed, DISTRIBUTIONS.index(distribution)])
    limits = integer_limits(graph)
    return [
        _draw(i.tensor, distribution, limits[i.attrs.name], source, position)
        for position, i in enumerate(graph.inputs)
    ]


def _draw(
    type_: TensorType, distribution: str, limit: int, source: np.random.Generator, position: int
) -> torch.Tensor:
    shape = type_.shape
    if type_.dtype is DType.BOOL:
        return _strided(torch.from_numpy(source.integers(0, 2, size=shape) != 0), type_)
    if not type_.dtype.is_float:
        drawn = torch.from_numpy(draw_integers(source, shape, limit))
        return _strided(drawn.to(DTYPES[type_.dtype]), type_)
    values = _floats(distribution, shape, source, position, type_.dtype)
    return _strided(values.to(DTYPES[type_.dtype]), type_)


def _strided(x: torch.Tensor, type_: TensorType) -> torch.Tensor:
    if type_.strides is None:
        return x
    size = 1 + sum((d - 1) * s for d, s in zip(type_.shape, type_.strides, strict=True) if d > 0)
    memory = torch.zeros(size, dtype=x.dtype).as_strided(type_.shape, type_.strides)
    memory.copy_(x)
    return memory


def _floats(
    distribution: str,
    shape: tuple[int, ...],
    source: np.random.Generator,
    position: int,
    dtype: DType,
) -> torch.Tensor:
    x = torch.from_numpy(source.standard_normal(shape, dtype=np.float32).reshape(shape))
    match distribution:
        case "uniform":
            return x.abs() % 1.0
        case "large":
            return x * 30.0
        case "tiny":
            return x * 1e-4
        case "constant-rows":
            return (x[..., :1] * 10.0 + x * 1e-3) if shape else x
        case "mixed":
            exponents = torch.from_numpy(source.integers(-6, 7, size=shape).reshape(shape))
            return x * torch.exp2(exponents.to(torch.float32))
        case "overflow-edge":
            # squares of float32 stay finite, sums of squares may not; float16 is less wide
            return x * (60.0 if dtype is DType.F16 else 1e18) if position == 0 else x
    return x


def verify_float(original: Graph, run_candidate: RunCandidate, *, seed: int) -> FloatVerdict:
    """Compare the candidate's error with the original's own on every distribution."""
    started = time.perf_counter()
    errors: list[FloatError] = []
    slack = SLACK_ULPS + 2.0 * sqrt(_longest_sum(original))
    for distribution in DISTRIBUTIONS:
        inputs = draw_inputs(original, distribution, seed)
        exact = run_reference(original, inputs, dtype_override=torch.float64)
        moved = run_reference(original, _perturbed(inputs, seed), dtype_override=torch.float64)
        own = run_reference(original, inputs)
        found = list(run_candidate([_copy(i) for i in inputs]))
        reason = _shape_mismatch(own, found)
        if not reason:
            pair, reason = _worst(exact, moved, own, found, slack)
            errors.append(FloatError(distribution, *pair))
        if reason:
            seconds = time.perf_counter() - started
            return FloatVerdict(
                False, f"{distribution} inputs: {reason}", seed, tuple(errors), seconds
            )
    return FloatVerdict(True, "", seed, tuple(errors), time.perf_counter() - started)


def _perturbed(inputs: list[torch.Tensor], seed: int) -> list[torch.Tensor]:
    """Move every number by one rounding error: how far that moves the result, no kernel can help.

    Without it a candidate would be held against the luck of the original on ill-conditioned inputs
    (exponentials of large scores).
    """
    source = torch.Generator().manual_seed(seed)
    moved = []
    for x in inputs:
        if not x.is_floating_point():
            moved.append(x)
            continue
        sign = torch.randint(0, 2, x.shape, generator=source, dtype=torch.int8) * 2 - 1
        moved.append(x.to(torch.float64) * (1.0 + torch.finfo(x.dtype).eps * sign))
    return moved


def _longest_sum(graph: Graph) -> int:
    """Return the most terms that one reduction or contraction of the program adds up.

    The order of a sum is not part of a program's meaning, and rounding n terms in another order
    moves the result by about sqrt(n) units in the last place (Higham, Accuracy and Stability of
    Numerical Algorithms, 4.2).
    """
    longest = 1
    for node in expand(graph).nodes():
        if node.op is contraction.MATMUL:
            longest = max(longest, node.inputs[0].shape[-1])
        elif node.op is contraction.REDUCE_SUM:
            longest = max(longest, prod(node.inputs[0].shape[a] for a in node.attrs.axes))
    return longest


def _copy(x: torch.Tensor) -> torch.Tensor:
    copied = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype)
    return copied.copy_(x)


def _shape_mismatch(own: list[torch.Tensor], found: list[torch.Tensor]) -> str:
    if len(own) != len(found):
        return f"{len(found)} outputs, not {len(own)}"
    for index, (a, b) in enumerate(zip(own, found, strict=True)):
        if a.shape != b.shape or a.dtype != b.dtype:
            return f"output {index} is {b.dtype}{tuple(b.shape)}, not {a.dtype}{tuple(a.shape)}"
    return ""


def _worst(
    exact: list[torch.Tensor],
    moved: list[torch.Tensor],
    own: list[torch.Tensor],
    found: list[torch.Tensor],
    slack: float,
) -> tuple[tuple[float, float], str]:
    worst_own = worst_found = 0.0
    for index, (e, m, o, f) in enumerate(zip(exact, moved, own, found, strict=True)):
        if not o.is_floating_point():
            if not torch.equal(o, f):
                return (worst_own, float("inf")), f"output {index} differs"
            continue
        own_error, found_error, reason = _output_errors(e, m, o, f, slack)
        worst_own, worst_found = max(worst_own, own_error), max(worst_found, found_error)
        if reason:
            return (worst_own, worst_found), f"output {index} {reason}"
    return (worst_own, worst_found), ""


def _output_errors(
    exact: torch.Tensor,
    moved: torch.Tensor,
    own: torch.Tensor,
    found: torch.Tensor,
    slack: float,
) -> tuple[float, float, str]:
    """Return the errors relative to the output's scale, and what is wrong, row by row."""
    if exact.numel() == 0:
        return 0.0, 0.0, ""
    columns = exact.shape[-1] if exact.dim() else 1
    e, m, o, f = (t.to(torch.float64).reshape(-1, columns) for t in (exact, moved, own, found))
    finite = torch.isfinite(o) & torch.isfinite(e)
    if bool((finite & ~torch.isfinite(f)).any()):
        return 0.0, float("inf"), "is inf or NaN where the original is not"
    wrong = ~torch.isfinite(o) & torch.isnan(o) & ~torch.isnan(e) & torch.isinf(f) & ~torch.isinf(e)
    if bool(wrong.any()):
        return 0.0, float("inf"), "is infinite where it should be a number"
    zero = torch.zeros((), dtype=torch.float64)
    own_row = torch.where(finite, (o - e).abs(), zero).amax(-1)
    found_row = torch.where(finite, (f - e).abs(), zero).amax(-1)
    scale_row = torch.where(finite, e.abs(), zero).amax(-1)
    scale = float(scale_row.max())
    if scale == 0.0:
        scale = 1.0
    own_worst, found_worst = float(own_row.max()), float(found_row.max())
    # a row may borrow from the typical error of all rows, in proportion to its scale
    borrowed = own_worst * (scale_row / scale)
    unit = torch.finfo(own.dtype).eps
    steady = finite & torch.isfinite(m)
    sensitive = torch.where(steady, (m - e).abs(), zero).amax(-1)
    allowed = ERROR_MULTIPLE * (own_row + borrowed + sensitive) + slack * unit * scale_row
    smallest = torch.finfo(own.dtype).tiny
    excess = found_row > allowed + smallest
    reason = ""
    if bool(excess.any()):
        row = int(torch.nonzero(excess)[0])
        reason = (
            f"errs by {float(found_row[row]):.3g} in row {row}, "
            f"the original by {float(own_row[row]):.3g}"
        )
    return own_worst / scale, found_worst / scale, reason
