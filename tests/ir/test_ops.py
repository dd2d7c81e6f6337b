"""Type rules: every op accepts a right application, with the right type, and refuses a wrong one."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from superopt.ir import build as b
from superopt.ir import composite
from superopt.ir.errors import GraphError
from superopt.ir.node import Node, make
from superopt.ir.ops import contraction, elementwise, leaf, library, structural, tile
from superopt.ir.ops.registry import Op, OpKind, all_ops
from superopt.ir.types import DType, TupleType

F32, F16, I64, BOOL = DType.F32, DType.F16, DType.I64, DType.BOOL
Case = tuple[Op, Sequence[Node], Any]


def t(*shape: int, dtype: DType = F32) -> Node:
    return b.input_("x", shape, dtype)


X, HALF, WHOLE, TRUTH = t(3, 4), t(3, 4, dtype=F16), t(3, 4, dtype=I64), t(3, 4, dtype=BOOL)
AXIS = contraction.AxisAttrs
CONV = library.ConvAttrs((1,), (0,), (1,), False, (0,), 1)
POOL = library.PoolAttrs("max", (2,), (2,), (0,), (1,), False, True)
PAIR = library.OpaqueAttrs("aten.topk.default", "[]", TupleType((X.tensor, WHOLE.tensor)))
TOPK = make(library.OPAQUE, (X,), PAIR)
DIM = tile.DimMap((("m", 2),), 2)
WIDE, NARROW = tile.LoadAttrs((DIM, tile.DimMap((), 4))), tile.LoadAttrs((DIM,))
NORM = composite.NormAttrs((-1,), 1e-5)
CUBE = t(2, 3, 4)
SDPA = composite.AttentionAttrs(1.0, False)


def scalar_graph(*outputs: int) -> library.GraphAttrs:
    s = b.input_("s", ())
    return library.GraphAttrs(b.thread_graph("t", [s], [b.exp(s) for _ in outputs]))


def block_graph() -> library.GraphAttrs:
    g = b.BlockBuilder("g")
    g.store(b.exp(g.load(X, 3, 4)), (3, 4), 3, 4)
    return library.GraphAttrs(g.graph())


def cases() -> dict[Op, tuple[Case, str, list[Case]]]:
    """For each op: an application, its type, and applications that the op refuses."""
    found: dict[Op, tuple[Case, str, list[Case]]] = {}

    def case(op: Op, good: Sequence[Node], attrs: Any, type_: str, *bad: Any) -> None:
        refused = [(op, *x) if isinstance(x[0], list) else (op, x, attrs) for x in bad]
        found[op] = ((op, good, attrs), type_, refused)

    for op in all_ops():
        if op.kind is OpKind.ELEMENTWISE and op not in (elementwise.WHERE, elementwise.CAST):
            _elementwise(op, case)
    case(elementwise.WHERE, [TRUTH, X, X], None, "f32[3,4]", [X, X, X], [TRUTH, X, HALF])
    case(elementwise.CAST, [X], elementwise.CastAttrs(F16), "f16[3,4]", [TOPK])
    found[elementwise.CAST][2].append((elementwise.CAST, [X], elementwise.CastAttrs(I64, True)))

    case(leaf.INPUT, [], leaf.InputAttrs("x", X.tensor), "f32[3,4]", [X])
    case(leaf.CONSTANT, [], leaf.ConstantAttrs(1.0, F32), "f32[]", [X])
    case(
        leaf.IOTA,
        [],
        leaf.IotaAttrs((3, 4), -2, I64),
        "i64[3,4]",
        [[], leaf.IotaAttrs((3,), 0, I64)],
    )
    case(leaf.ITEM, [TOPK], leaf.ItemAttrs(1), "i64[3,4]", [[TOPK], leaf.ItemAttrs(2)], [X])

    case(
        contraction.MATMUL,
        [X, t(4, 5)],
        None,
        "f32[3,5]",
        [X, X],
        [t(4), t(4)],
        [X, t(4, 5, dtype=F16)],
    )
    over = contraction.ReduceAttrs((-1,))
    outside = contraction.ReduceAttrs((0,))
    for op in (contraction.REDUCE_SUM, contraction.REDUCE_PROD):
        case(op, [X], over, "f32[3,1]", [[X], outside], [TOPK])
    for op in (contraction.REDUCE_MAX, contraction.REDUCE_MIN):
        case(op, [TRUTH], over, "bool[3,1]", [[X], outside])
    for op in (contraction.ARGMAX, contraction.ARGMIN):
        case(op, [X], AXIS(-2), "i64[1,4]", [[X], AXIS(0)])
    scans = contraction.ScanAttrs
    wrong_kind = scans(-1, "mean")  # type: ignore[arg-type]
    case(
        contraction.SCAN,
        [X],
        scans(-1, "sum"),
        "f32[3,4]",
        [[X], scans(1, "sum")],
        [[X], wrong_kind],
    )

    shape = structural.ShapeAttrs
    case(structural.RESHAPE, [X], shape((2, 6)), "f32[2,6]", [[X], shape((5, 2))])
    case(structural.BROADCAST, [t(3, 1)], shape((3, 4)), "f32[3,4]", [t(2, 1)], [t(4)])
    permute = structural.PermuteAttrs
    case(structural.PERMUTE, [X], permute((1, 0)), "f32[4,3]", [[X], permute((0, 0))])
    cut = structural.SliceAttrs
    case(
        structural.SLICE,
        [X],
        cut(-1, 1, 4, 2),
        "f32[3,2]",
        [[X], cut(-1, 1, 5)],
        [[X], cut(-1, 0, 4, 0)],
    )
    case(structural.CONCAT, [X, X], AXIS(-1), "f32[3,8]", [X, t(2, 4)], [X, HALF], [[], AXIS(-1)])
    pad = structural.PadAttrs
    case(structural.PAD, [X], pad(-1, 1, 2, 0.0), "f32[3,7]", [[X], pad(-1, -1, 0, 0.0)])
    case(structural.FLIP, [X], over, "f32[3,4]", [[X], outside])
    case(structural.TAKE, [X, t(5, dtype=I64)], AXIS(-1), "f32[3,5]", [X, t(5)])
    case(
        structural.GATHER,
        [X, t(3, 9, dtype=I64)],
        AXIS(-1),
        "f32[3,9]",
        [X, X],
        [X, t(2, 9, dtype=I64)],
    )

    case(
        library.CONV, [t(1, 2, 8), t(5, 2, 3)], CONV, "f32[1,5,6]", [t(1, 3, 8), t(5, 2, 3)], [X, X]
    )
    case(library.POOL, [t(1, 2, 8)], POOL, "f32[1,2,4]", [t(8)])
    case(library.OPAQUE, [X], PAIR, "(f32[3,4], i64[3,4])", [[X], None])
    case(library.CUSTOM, [X], block_graph(), "f32[3,4]", [t(4, 3)], [X, X])
    case(
        library.THREAD, [X], scalar_graph(1), "f32[3,4]", [HALF], [X, X], [[X], scalar_graph(1, 2)]
    )

    case(composite.SOFTMAX, [X], AXIS(-1), "f32[3,4]", [[X], AXIS(2)], [WHOLE])
    case(composite.LOG_SOFTMAX, [X], AXIS(-1), "f32[3,4]", [[X], AXIS(2)])
    case(composite.LOGSUMEXP, [X], AXIS(-1), "f32[3,1]", [[X], AXIS(2)])
    case(composite.SILU, [X], None, "f32[3,4]", [WHOLE])
    wrong_gelu = composite.GeluAttrs("exact")  # type: ignore[arg-type]
    case(composite.GELU, [X], composite.GeluAttrs("tanh"), "f32[3,4]", [WHOLE], [[X], wrong_gelu])
    case(
        composite.LAYER_NORM, [X, t(4), t(4)], NORM, "f32[3,4]", [X, t(3)], [X, X, X, X], [[], NORM]
    )
    case(composite.RMS_NORM, [X, t(4)], NORM, "f32[3,4]", [X, t(3)], [X, t(4), t(4)])
    case(
        composite.ATTENTION,
        [CUBE, CUBE, CUBE],
        SDPA,
        "f32[2,3,4]",
        [CUBE],
        [CUBE, CUBE, t(2, 4, 4)],
    )

    case(
        composite.DEPTHWISE_CONV,
        [t(1, 2, 8), t(4, 1, 3)],
        replace(CONV, groups=2),
        "f32[1,4,6]",
        [t(1, 3, 8), t(6, 1, 3)],
        [t(1, 2, 8), t(4, 2, 3)],
        [X, X],
    )

    case(tile.LOAD, [X], WIDE, "f32[2,4]", [[X], NARROW], [t(5, 4)])
    case(tile.STORE, [t(2, 4)], tile.StoreAttrs(WIDE.dims, (3, 4)), "f32[3,4]", [t(3, 4)])
    index = tile.TileIndexAttrs
    case(
        tile.TILE_INDEX,
        [],
        index(DIM, 3, I64),
        "i64[2]",
        [[], index(DIM, 5, I64)],
        [[], index(DIM, 3, F32)],
    )
    for op in (tile.ACCUM_SUM, tile.ACCUM_PROD):
        case(op, [X], tile.LoopAttrs("n"), "f32[3,4]", [TOPK])
    for op in (tile.ACCUM_MAX, tile.ACCUM_MIN, tile.ACCUM_LAST, tile.PREFIX_MAX):
        case(op, [TRUTH], tile.LoopAttrs("n"), "bool[3,4]", [TOPK])
    rescale = tile.RescaleAttrs("n")
    case(
        tile.ACCUM_RESCALED,
        [X, t(3, 1)],
        rescale,
        "f32[3,4]",
        [X, HALF],
        [X, t(4, 4)],
        [WHOLE, WHOLE],
    )
    return found


def _elementwise(op: Op, case: Any) -> None:
    logical = op in (elementwise.ISNAN, elementwise.ISINF)
    bits = "bitwise" in op.meaning
    compares = op.name in ("eq", "ne", "lt", "le", "gt", "ge")
    x = WHOLE if bits else X
    wanted = "bool[3,4]" if logical or compares else str(x.type)
    if op.arity == 1:
        plain = op in (elementwise.NEG, elementwise.ABS, elementwise.SIGN) or logical
        case(op, [x], None, wanted, [TOPK], *([] if plain else [[X] if bits else [WHOLE]]))
    else:
        other = t(1, 4, dtype=x.tensor.dtype)
        case(op, [x, other], None, wanted, [x, HALF], [x, t(2, 4, dtype=x.tensor.dtype)], [x, t(4)])


CASES = cases()


def test_every_op_has_its_cases() -> None:
    assert [op.name for op in all_ops() if op not in CASES or not CASES[op][2]] == []


@pytest.mark.parametrize("op", CASES, ids=lambda op: op.name)
def test_type_rule(op: Op) -> None:
    (_, good, attrs), wanted, refused = CASES[op]
    assert str(make(op, good, attrs).type) == wanted
    for _, operands, bad in refused:
        with pytest.raises(GraphError):
            make(op, operands, bad)
