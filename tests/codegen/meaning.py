"""What block graphs mean, as a test of kernels: inputs whose neighbours show, and the comparison."""

from collections.abc import Callable
from math import prod

import torch

from superopt.ir.graph import Graph
from superopt.ir.node import Node
from superopt.ir.types import DType
from superopt.verify.reference import DTYPES, run_reference

_NEAR = {torch.float16: 1e-2, torch.bfloat16: 4e-2, torch.float64: 1e-10}
_MARGIN = 64


def tensor(node: Node, generator: torch.Generator, device: str = "cpu") -> torch.Tensor:
    """Draw an input; the neighbours of every element that is read are NaN or another number that shows."""
    type_ = node.tensor
    dtype = DTYPES[type_.dtype]
    if type_.dtype is DType.BOOL:
        dense = torch.rand(type_.shape, generator=generator) < 0.5
    elif type_.dtype.is_integer:
        limit = 2 if node.attrs.name in ("at", "rows", "label") else 20
        low = 0 if limit == 2 or dtype is torch.uint8 else -5
        dense = torch.randint(low, limit, type_.shape, generator=generator).to(dtype)
    else:
        dense = torch.randn(type_.shape, generator=generator).to(dtype)
    span = 1 + sum((d - 1) * s for d, s in zip(type_.shape, type_.element_strides, strict=True))
    fill = float("nan") if type_.dtype.is_float else 77 if dtype is not torch.bool else 1
    held = torch.full((span + 16,), fill, dtype=dtype, device=device)
    return held.as_strided(type_.shape, type_.element_strides, 8).copy_(dense)


def launched(
    entry: Callable[..., None], graph: Graph, inputs: list[torch.Tensor]
) -> list[torch.Tensor]:
    """Run a kernel by addresses; it must leave alone what lies beside its results."""
    held = []
    for output in graph.outputs:
        dtype, size = DTYPES[output.tensor.dtype], prod(output.shape) + 2 * _MARGIN
        fill = float("nan") if dtype.is_floating_point else 1
        held.append(torch.full((size,), fill, dtype=dtype, device=inputs[0].device))
    before = [h.clone() for h in held]
    inner = [h[_MARGIN:-_MARGIN].view(o.shape) for h, o in zip(held, graph.outputs, strict=True)]
    entry(*(t.data_ptr() for t in (*inputs, *inner)))
    for old, new in zip(before, held, strict=True):
        for part in (slice(0, _MARGIN), slice(-_MARGIN, None)):
            torch.testing.assert_close(new[part], old[part], rtol=0, atol=0, equal_nan=True)
    return inner


def check(graph: Graph, inputs: list[torch.Tensor], found: list[torch.Tensor]) -> None:
    """Raise unless a kernel's results are what the graph means."""
    half = any(i.tensor.dtype in (DType.F16, DType.BF16) for i in graph.inputs)
    # what PyTorch rounds at every step of a 16-bit sum is no reason to do so
    exact = run_reference(graph, inputs, dtype_override=torch.float64 if half else None)
    for got, want, fine in zip(found, run_reference(graph, inputs), exact, strict=True):
        near = max(_NEAR.get(want.dtype, 5e-5), 1e-2 if half else 0.0)
        assert got.dtype == want.dtype
        if not torch.allclose(got.double(), fine.double(), near, near, equal_nan=True):
            torch.testing.assert_close(got, want, rtol=near, atol=near, equal_nan=True)
