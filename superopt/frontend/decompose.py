"""Which operators PyTorch breaks up before lifting, and which stay whole.

In: an exported program. Out: the same program in functional operators, mutation turned into further
outputs. What has a composite or a direct rule is kept whole: attention, norms, linear, silu and
softmax (broken-up attention also yields strides that a later view refuses on the CPU).

What draws random numbers is kept whole too, as other operators would draw other numbers. Dropout is the
exception, on the CPU, where it is a draw and two products.
"""

import math
from typing import Any

import torch
from torch.export import ExportedProgram

aten = torch.ops.aten

KEPT_WHOLE = (
    aten.scaled_dot_product_attention.default,
    aten.layer_norm.default,
    aten.rms_norm.default,
    aten.group_norm.default,
    aten.instance_norm.default,
    aten.silu.default,
    aten.softmax.int,
    aten.log_softmax.int,
    aten.logsumexp.default,
    aten.linear.default,
    aten.matmul.default,
    aten.mv.default,
    aten.dot.default,
    aten.baddbmm.default,
    aten.roll.default,
    aten.linalg_cross.default,
    aten.im2col.default,
    aten.eye.default,
    aten.eye.m,
    aten.masked_fill.Scalar,
    aten.masked_fill.Tensor,
    aten.lstm.input,
    aten.gru.input,
    # sums and copies by row: as index_put they go element by element
    aten.index_add.default,
    aten.index_add_.default,
    aten.index_copy.default,
    aten.index_copy_.default,
    # PyTorch breaks them up into others that give other results: behind the -1 that ends a row's labels,
    # and for NaN
    aten.multilabel_margin_loss_forward.default,
    aten.multi_margin_loss.default,
    # and through float32 where it is of integers
    aten.threshold.default,
    # they raise where there is no result, which no other operator does
    aten.linalg_solve.default,
    aten.linalg_inv.default,
    aten.inverse.default,
    aten.linalg_cholesky.default,
    aten.linalg_lu_factor.default,
    aten.linalg_ldl_factor.default,
    aten.linalg_tensorsolve.default,
    aten.linalg_tensorinv.default,
    aten.linalg_matrix_power.default,
)


def decompose(program: ExportedProgram) -> ExportedProgram:
    """Return the program in functional core operators and those kept whole."""
    table = torch.export.default_decompositions()
    for target in list(table):
        tags = target.tags if isinstance(target, torch._ops.OpOverload) else ()
        if target in KEPT_WHOLE or torch.Tag.nondeterministic_seeded in tags:
            del table[target]
    table[aten.native_dropout.default] = _dropout
    table[aten._cdist_forward.default] = _distances
    result: ExportedProgram = program.run_decompositions(table)
    return result


def _dropout(x: torch.Tensor, rate: float, train: bool | None) -> Any:
    """Drop out as `torch.dropout` does on the CPU, with the same numbers.

    `bernoulli` fills a row-major tensor, `dropout` one that lies as its operand does.
    """
    whole = x.device.type != "cpu" or not x.is_contiguous()
    if whole or train is False or not 0 < rate < 1:
        return NotImplemented
    kept = aten.bernoulli.p(x, 1 - rate)
    return x * (kept / (1 - rate)), kept != 0


def _distances(x: torch.Tensor, y: torch.Tensor, p: float, mode: int | None) -> Any:
    """Compute distances as they are defined; Euclidean ones of many points have come as a product before."""
    if x.dtype not in (torch.float32, torch.float64) or x.shape[-1] == 0:
        return NotImplemented
    apart = (x.unsqueeze(-2) - y.unsqueeze(-3)).abs()
    if p == 0:
        return (apart != 0).to(x.dtype).sum(-1)
    if p == 1:
        return apart.sum(-1)
    if p == 2:
        return apart.square().sum(-1).sqrt()
    return apart.amax(-1) if p == math.inf else apart.pow(p).sum(-1).pow(1 / p)
