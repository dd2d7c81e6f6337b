"""Inputs of the floating-point test: several distributions that make kernels fail.

In: a graph, the name of a distribution and a seed. Out: a tensor per input, floats of the distribution and integers
valid as indices: constant rows (cancellation), mixed scales, large and tiny magnitudes, values at the edge of
overflow, infinities. Large tensors repeat fewer numbers.
"""

from collections.abc import Sequence
from math import prod
from typing import Final, final

import numpy as np
import torch

from superopt.ir import composite
from superopt.ir.graph import Graph
from superopt.ir.node import Node
from superopt.ir.ops import contraction, elementwise, leaf, library
from superopt.ir.ops.registry import OpKind
from superopt.ir.semantics import expand
from superopt.ir.types import DType, TensorType
from superopt.verify.memory import empty
from superopt.verify.opaque import spread
from superopt.verify.ranges import Integers, draw_integers, integer_ranges
from superopt.verify.reference import DTYPES

PERIOD: Final = 1_048_573
"""How many random numbers or signs there are; a prime, so that the rows of no tensor get the same ones."""

DISTRIBUTIONS = (
    "normal",
    "uniform",
    "large",
    "tiny",
    "constant-rows",
    "mixed",
    "overflow-edge",
    "infinite",
)

HARDEST: Final = ("constant-rows", "overflow-edge")
"""Where algebra that is right in a field first fails: enough to choose between variants."""

INFINITE: Final = "infinite"
"""Rows with infinities or NaN, whole ones of -inf among them, and more rows without."""
_CYCLE: Final = 16
"""After how many rows they come again."""

_PRODUCTS: Final = (
    contraction.MATMUL,
    library.CONV,
    library.OPAQUE,
    composite.DEPTHWISE_CONV,  # libraries differ where infinite weights meet padding
)
_KEEP_INFINITIES: Final = (
    elementwise.ADD,
    elementwise.SUB,
    elementwise.MUL,
    elementwise.DIV,
    elementwise.NEG,
    elementwise.CAST,
)


@final
class Source:
    """Seeded random numbers, drawn where they are used: a GPU draws faster than it is sent them.

    On the CPU too PyTorch draws in half of NumPy's time, and into memory that was used before.
    """

    def __init__(self, seed: Sequence[int], device: torch.device | str = "cpu") -> None:
        self.host = np.random.default_rng(seed)
        self.device = torch.device(device)
        self._there = torch.Generator(self.device).manual_seed(int(self.host.integers(1 << 62)))

    def normal(self, count: int) -> torch.Tensor:
        """Draw float32 numbers from the standard normal distribution."""
        return empty((count,), torch.float32, self.device).normal_(generator=self._there)

    def whole(self, low: int, high: int, count: int) -> torch.Tensor:
        """Draw small integers, low <= i < high."""
        drawn = empty((count,), torch.int8, self.device)
        return drawn.random_(low, high, generator=self._there)


def repeated(values: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """Return a tensor of a shape in which values come again and again."""
    count = prod(shape)
    if count == len(values):
        return values.reshape(shape)
    whole = empty((count,), values.dtype, values.device)
    whole[: len(values)] = values
    done = len(values)
    while done < count:
        more = min(done, count - done)
        whole[done : done + more] = whole[:more]
        done += more
    return whole.reshape(shape)


def draw_inputs(
    graph: Graph, distribution: str, seed: int, device: torch.device | str = "cpu"
) -> list[torch.Tensor]:
    """Draw one tensor per input: floats of the distribution, integers valid as indices."""
    return drawn_as(graph, graph, distribution, seed, device)


def drawn_as(
    graph: Graph, left: Graph, distribution: str, seed: int, device: torch.device | str
) -> list[torch.Tensor]:
    """Draw inputs for what is left of a graph."""
    source = Source([seed, DISTRIBUTIONS.index(distribution)], device)
    ranges = integer_ranges(graph)
    drawn = [
        _draw(i.tensor, distribution, ranges[i.attrs.name], source, position)
        for position, i in enumerate(left.inputs)
    ]
    if distribution == INFINITE:
        for number, position in enumerate(_telling(graph)):
            drawn[position] = _with_infinities(drawn[position], number)
    return drawn


def _telling(graph: Graph) -> list[int]:
    """Return the inputs whose infinities tell something: others make all results NaN, as a factor of a product does.

    That is the first one, and all of several rows that are added to something or shift it.
    """
    factors = set[Node]()
    for node in (*reversed(list(graph.nodes())), *reversed(list(expand(graph).nodes()))):
        keeps = node.op in _KEEP_INFINITIES or node.op.kind is OpKind.STRUCTURAL
        if node.op in _PRODUCTS or (keeps and node in factors):
            factors.update(node.inputs)
    names = {n.attrs.name for n in factors if n.op is leaf.INPUT}
    floats = [k for k, i in enumerate(graph.inputs) if i.tensor.dtype.is_float and i.shape]
    return [
        k
        for k in floats
        if k == floats[0]
        or (rows_of(graph.inputs[k]) > 1 and graph.inputs[k].attrs.name not in names)
    ]


def _with_infinities(x: torch.Tensor, number: int) -> torch.Tensor:
    """Return floats with infinities in some rows, other ones for each `number` of an input."""
    if not x.numel():
        return x
    columns = x.shape[-1]
    rows = x.reshape(-1, columns).clone()
    kinds = (
        (-torch.inf, slice(None)),
        (-torch.inf, slice(columns // 2)),
        (-torch.inf, slice(columns // 3, columns // 3 + 1)),
        (torch.inf, slice(columns // 2, columns // 2 + 1)),
        (torch.nan, slice(columns - 1, columns)),
    )
    for k, (value, where) in enumerate(kinds):
        rows[(k + number * len(kinds)) % _CYCLE :: _CYCLE, where] = value
    filled = rows.reshape(x.shape)
    return filled if filled.stride() == x.stride() else spread(filled, x.stride())


def _draw(
    type_: TensorType, distribution: str, integers: Integers, source: Source, position: int
) -> torch.Tensor:
    shape = type_.shape
    if type_.dtype is DType.BOOL:
        drawn = source.whole(0, 2, min(type_.elements, PERIOD)) != 0
        return strided(repeated(drawn, shape), type_)
    if not type_.dtype.is_float:
        drawn = torch.from_numpy(draw_integers(source.host, shape, integers)).to(source.device)
        return strided(drawn.to(DTYPES[type_.dtype]), type_)
    values = _floats(distribution, type_, source, position)
    return strided(values, type_)


def strided(x: torch.Tensor, type_: TensorType) -> torch.Tensor:
    """Return a tensor laid out as a type says."""
    return x if type_.strides is None else spread(x, type_.strides)


def _floats(distribution: str, type_: TensorType, source: Source, position: int) -> torch.Tensor:
    shape, dtype = type_.shape, type_.dtype
    count = min(type_.elements, PERIOD)
    x = source.normal(count)
    match distribution:
        case "uniform":
            x.abs_().remainder_(1.0)
        case "large":
            x.mul_(30.0)
        case "tiny":
            x.mul_(1e-4)
        case "constant-rows" if shape:
            x = repeated(x, shape)
            means = x[..., :1] * 10.0
            return x.mul_(1e-3).add_(means).to(DTYPES[dtype])
        case "mixed":
            x.mul_(torch.exp2(source.whole(-6, 7, count)))
        case "overflow-edge" if position == 0:
            # squares of float32 stay finite, sums of squares may not; float16 is less wide
            x.mul_(60.0 if dtype is DType.F16 else 1e18)
    return repeated(x.to(DTYPES[dtype]), shape)


def rows_of(node: Node) -> int:
    """Return how many rows a tensor has."""
    return prod(node.shape[:-1])
