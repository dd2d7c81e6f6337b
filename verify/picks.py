"""Outputs that are places: of extremes, of the largest few, of all in order.

In: a graph. Out: which of its outputs are places of floating-point scores, and a `Pick` for each: rounding decides
between scores that are nearly equal, so that results are compared by the scores at their places.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch

from superopt.ir.build import item
from superopt.ir.graph import Graph
from superopt.ir.node import Node
from superopt.ir.ops import contraction, leaf, library, structural
from superopt.ir.types import DType
from superopt.verify.reference import DTYPES


@final
@dataclass(frozen=True, slots=True)
class Pick:
    """An output that says where scores of a type were picked, along which axis, and they in float64.

    `shape`: that of the places, which may be reshaped in the output, the axis among its dims.
    """

    scores: torch.Tensor
    dtype: torch.dtype
    axis: int
    shape: tuple[int, ...]

    def at(self, places: torch.Tensor) -> torch.Tensor:
        """Return the score at each of `places`, beside the scale of all that were to choose from."""
        zero = self.scores.new_zeros(())
        scale = torch.where(self.scores.isfinite(), self.scores.abs(), zero)
        picked = torch.gather(self.scores, self.axis, self._index(places))
        scale = scale.amax(self.axis, keepdim=True).expand(picked.shape)
        return torch.stack([picked.reshape(-1), scale.reshape(-1)], dim=-1)

    def differs(self, own: torch.Tensor, found: torch.Tensor) -> bool:
        """Say whether rounding cannot explain `found`: no place at all or one twice, or a number for NaN or infinity."""
        if bool(((found < 0) | (found >= self.scores.shape[self.axis])).any()):
            return True
        if self._repeats(found) and not self._repeats(own):
            return True
        before, after = (self.scores.gather(self.axis, self._index(i)) for i in (own, found))
        wrong = (before.isinf() & (before != after)) | (before.isnan() != after.isnan())
        return bool(wrong.any())

    def _repeats(self, places: torch.Tensor) -> bool:
        return bool((self._index(places).sort(self.axis).values.diff(dim=self.axis) == 0).any())

    def _index(self, places: torch.Tensor) -> torch.Tensor:
        return places.reshape(self.shape).to(torch.int64)


@final
@dataclass(frozen=True, slots=True)
class Picked:
    """Nodes of the original: places that an output holds, and the scores that they are places of.

    `values` are the scores at these places, where an operator returns them too.
    """

    places: Node
    scores: Node
    values: Node | None = None

    def nodes(self) -> list[Node]:
        """Return what a pick is made of, beside the output."""
        return [self.scores] if self.values is None else [self.scores, self.values]

    def pick(self, places: torch.Tensor, found: Sequence[torch.Tensor]) -> Pick | None:
        """Return the pick, given places and `nodes()` in float64; None where values are no scores."""
        scores, shape = found[0], self.places.shape
        dtype = DTYPES[self.scores.tensor.dtype]
        if self.values is None:
            return Pick(scores, dtype, self.places.attrs.axis, shape)
        index = places.reshape(shape).to(torch.int64)
        for axis, count in enumerate(scores.shape):
            others = [n for i, n in enumerate(shape) if i != axis]
            if others != [n for i, n in enumerate(scores.shape) if i != axis]:
                continue
            inside = bool(((index >= 0) & (index < count)).all())
            # operators that stay whole see numbers of the types that the program gave them
            if not inside:
                continue
            picked, values = scores.gather(axis, index).to(dtype), found[1].to(dtype)
            if torch.allclose(picked, values, rtol=0.0, atol=0.0, equal_nan=True):
                return Pick(scores, dtype, axis, shape)
        return None


def picks(graph: Graph) -> dict[int, Picked]:
    """Return the outputs that are places of floating-point numbers: of extremes, of the largest few, of all in order.

    Rounding decides between scores that are nearly equal, so that no two correct programs need agree.
    """
    found: dict[int, Picked] = {}
    for index, node in enumerate(graph.outputs):
        while node.op is structural.RESHAPE:
            node = node.inputs[0]
        if node.op in (contraction.ARGMAX, contraction.ARGMIN):
            picked = Picked(node, node.inputs[0])
        elif node.op is leaf.ITEM and node.inputs[0].op is library.OPAQUE and node.attrs.index:
            operator = node.inputs[0]
            values = item(operator, 0)
            if len(operator.inputs) != 1 or node.tensor.dtype is not DType.I64:
                continue
            picked = Picked(node, operator.inputs[0], values)
            if values.shape != node.shape or node.tensor.rank != picked.scores.tensor.rank:
                continue
        else:
            continue
        if picked.scores.tensor.dtype.is_float:
            found[index] = picked
    return found
