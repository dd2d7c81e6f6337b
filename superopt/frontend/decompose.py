"""Which operators PyTorch breaks up before lifting, and which stay whole.

In: an exported program. Out: the same program in functional operators, mutation turned into further
outputs. What has a composite or a direct rule is kept whole: attention, norms, linear, silu and
softmax (broken-up attention also yields strides that a later view refuses on the CPU).
"""

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
    aten.masked_fill.Scalar,
    aten.masked_fill.Tensor,
    aten.lstm.input,
    aten.gru.input,
)


def decompose(program: ExportedProgram) -> ExportedProgram:
    """Return the program in functional core operators and those kept whole."""
    table = torch.export.default_decompositions()
    for target in KEPT_WHOLE:
        if target in table:
            del table[target]
    result: ExportedProgram = program.run_decompositions(table)
    return result
