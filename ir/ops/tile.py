"""Block-level ops: loads and stores through index maps, tile indices, loop accumulators.

A block graph runs once per point of its grid; values that depend on a loop axis exist once per
iteration. `DimMap` merges Mirage's imap, fmap and omap: it says for one tensor dim how grid and
loop axes, outermost first, split it into tiles. Tiles need not divide the dim; positions beyond
its extent are masked (see `superopt.ir.semantics`).
"""

from dataclasses import dataclass
from math import prod
from typing import final

from superopt.ir.errors import GraphError
from superopt.ir.ops.registry import Op, OpKind, declare
from superopt.ir.ops.shapes import broadcast_shapes, same_dtype, tensor
from superopt.ir.types import Dim, DType, TensorType, Type


@final
@dataclass(frozen=True, slots=True)
class DimMap:
    """One tensor dim split by axes, outermost first, down to tiles of `tile` elements.

    `axes` holds (axis name, count). Block (i_1, …, i_n) touches the elements from
    ((i_1 * c_2 + i_2) * c_3 + …) * tile on.
    """

    axes: tuple[tuple[str, int], ...]
    tile: Dim

    @property
    def padded(self) -> int:
        """Extent that the tiles cover, at least the dim's."""
        return self.tile * prod(count for _, count in self.axes)


@final
@dataclass(frozen=True, slots=True)
class LoadAttrs:
    """Index map per tensor dim; replicated over every axis that no dim names."""

    dims: tuple[DimMap, ...]


@final
@dataclass(frozen=True, slots=True)
class StoreAttrs:
    """Index map per dim of the result, and the result's shape and element type."""

    dims: tuple[DimMap, ...]
    shape: tuple[Dim, ...]


@final
@dataclass(frozen=True, slots=True)
class TileIndexAttrs:
    """Element indices of a tile of a dim of `extent`, as a tile of one dim."""

    dim: DimMap
    extent: Dim
    dtype: DType


@final
@dataclass(frozen=True, slots=True)
class LoopAttrs:
    """The loop axis that an accumulator closes."""

    loop: str


@final
@dataclass(frozen=True, slots=True)
class RescaleAttrs:
    """The loop axis, and the power of exp(shift) by which the operand scales."""

    loop: str
    power: float = 1


def _check_cover(dims: tuple[DimMap, ...], shape: tuple[Dim, ...]) -> None:
    if len(dims) != len(shape):
        raise GraphError(f"{len(dims)} index maps for a tensor of rank {len(shape)}")
    for i, (dim, extent) in enumerate(zip(dims, shape, strict=True)):
        if dim.padded < extent:
            raise GraphError(f"dim {i}: tiles cover {dim.padded} of {extent} elements")


def _load(types: tuple[Type, ...], attrs: LoadAttrs) -> Type:
    x = tensor(types[0])
    _check_cover(attrs.dims, x.shape)
    return x.with_shape(tuple(d.tile for d in attrs.dims))


def _store(types: tuple[Type, ...], attrs: StoreAttrs) -> Type:
    tile = tensor(types[0])
    _check_cover(attrs.dims, attrs.shape)
    if tile.shape != tuple(d.tile for d in attrs.dims):
        raise GraphError(f"the tile {tile.shape} does not match the maps {attrs.dims}")
    return tile.with_shape(attrs.shape)


def _tile_index(types: tuple[Type, ...], attrs: TileIndexAttrs) -> Type:
    _check_cover((attrs.dim,), (attrs.extent,))
    if not attrs.dtype.is_integer:
        raise GraphError(f"indices are integers, not {attrs.dtype}")
    return TensorType((attrs.dim.tile,), attrs.dtype)


def _accumulate(types: tuple[Type, ...], attrs: LoopAttrs) -> Type:
    x = tensor(types[0])
    return x.with_shape(x.shape)


def _rescaled(types: tuple[Type, ...], attrs: RescaleAttrs) -> Type:
    x, shift = (tensor(t) for t in types)
    if broadcast_shapes([x.shape, shift.shape]) != x.shape:
        raise GraphError(f"the shift {shift.shape} does not broadcast to {x.shape}")
    if not same_dtype([x, shift]).is_float:
        raise GraphError(f"needs floating-point operands, got {x.dtype}")
    return x.with_shape(x.shape)


_TILE = OpKind.TILE
LOAD = declare(Op("load", _TILE, 1, LoadAttrs, _load, "a tile of a device tensor"))
STORE = declare(Op("store", _TILE, 1, StoreAttrs, _store, "tiles put together to a device tensor"))
TILE_INDEX = declare(
    Op("tile_index", _TILE, 0, TileIndexAttrs, _tile_index, "element indices of a tile")
)


def _accumulator(name: str, meaning: str, *, linear: bool = False) -> Op:
    linear_in = frozenset({0}) if linear else frozenset()
    return declare(Op(name, _TILE, 1, LoopAttrs, _accumulate, meaning, linear_in=linear_in))


ACCUM_SUM = _accumulator("accum_sum", "sum of the tile over the loop's iterations", linear=True)
ACCUM_MAX = _accumulator("accum_max", "maximum over the loop's iterations")
ACCUM_MIN = _accumulator("accum_min", "minimum over the loop's iterations")
ACCUM_PROD = _accumulator("accum_prod", "product over the loop's iterations")
PREFIX_MAX = _accumulator("prefix_max", "running maximum, this iteration included")
ACCUM_LAST = _accumulator("accum_last", "the value of the last iteration")
ACCUM_RESCALED = declare(
    Op(
        "accum_rescaled",
        _TILE,
        2,
        RescaleAttrs,
        _rescaled,
        "sum over iterations l of x_l * exp(power * (m_l - m_last)); m is a prefix_max",
        linear_in=frozenset({0}),
    )
)
