"""The workloads count their operations, repeat their inputs, and agree with the library's kernels."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import workloads
from benchmarks.arithmetic import count_arithmetic
from benchmarks.workloads import CPU, CUDA, Workload

TINY = (
    workloads.attention("attention", 2, 5, 7, 4),
    workloads.causal_attention("causal", 2, 6, 4),
    workloads.gqa_decode("gqa", 2, 4, 2, 5, 4),
    workloads.qk_norm_attention("qk-norm", 2, 5, 7, 4),
    workloads.kv_norm_attention("kv-norm", 2, 5, 7, 4),
    workloads.soft_capped_attention("soft-cap", 2, 5, 7, 4),
    workloads.biased_attention("bias", 2, 5, 7, 4),
    workloads.rms_norm_linear("rms-norm-linear", 3, 8, 5),
    workloads.gated_mlp("gated-mlp", 3, 8, 5),
    workloads.lora_linear("lora", 3, 8, 5, 2),
    workloads.n_transformer_update("n-trans", 3, 8),
    workloads.layer_norm_gelu_mlp("mlp", 3, 8, 5),
    workloads.residual_rms_norm("residual", 3, 8),
    workloads.softmax_cross_entropy("loss", 3, 8),
    workloads.rope_scale("rope", 2, 5, 4),
    workloads.decoder_block("decoder", 6, 32, 4, 2, 24),
)
BY_NAME = pytest.mark.parametrize("workload", TINY, ids=lambda w: w.name)


@BY_NAME
def test_flops_are_those_of_the_contractions(workload: Workload) -> None:
    inputs = workload.inputs("cpu", torch.float32, seed=0)
    with FlopCounterMode(display=False) as counter:
        workload.program(*inputs)
    counted = counter.get_total_flops()
    if workload.name == "causal":  # of 6 x 6 scores, 21 are visible
        counted = counted * 21 // 36
    if workload.name == "decoder":  # the counter does not know the CPU's fused attention
        counted += 4 * 32 * 21
    assert workload.flops == counted


@pytest.mark.parametrize(
    ("program", "count"),
    [
        (lambda x: x @ x.T / (x * x).sum().sqrt(), 0),
        (lambda x: torch.softmax(x @ x.T, -1), 9),
        (lambda x: torch.logsumexp(x, -1) + F.softplus(x).sum(), 3 * 5 * 3),
        (lambda x: torch.logaddexp(x[:, None], x), 2 * 3 * 3 * 5),
        (lambda x: F.gelu(x.exp_()), 2 * 3 * 5),
        (lambda x: F.scaled_dot_product_attention(*[x[None, None]] * 3), 9),
        (lambda x: F.scaled_dot_product_attention(*[x[None, None]] * 3, is_causal=True), 6),
        (
            lambda x: F.scaled_dot_product_attention(
                x[None, None, :2], *[x[None, None]] * 2, is_causal=True
            ),
            3,
        ),
    ],
)
def test_functions_are_counted_per_element(program: Callable[..., Any], count: int) -> None:
    assert count_arithmetic(program, (torch.ones(3, 5),))[1] == count


def test_functions_of_hidden_scores_do_not_count() -> None:
    for workload, count in ((TINY[0], 2 * 5 * 7), (TINY[1], 2 * 21)):
        inputs = workload.inputs("cpu", torch.float32, seed=0)
        assert workload.arithmetic(inputs) == (workload.flops, count)


@pytest.mark.parametrize("workload", [w for w in TINY if w.library], ids=lambda w: w.name)
def test_library_variant_computes_the_same(workload: Workload) -> None:
    assert workload.library is not None
    inputs = workload.inputs("cpu", torch.float64, seed=3)
    torch.testing.assert_close(workload.library(*inputs), workload.program(*inputs))


@BY_NAME
def test_seed_decides_the_inputs(workload: Workload) -> None:
    first = workload.inputs("cpu", torch.float32, seed=1)
    again = workload.inputs("cpu", torch.float32, seed=1)
    other = workload.inputs("cpu", torch.float32, seed=2)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("suite", [CPU, CUDA], ids=["cpu", "cuda"])
def test_suite_runs_every_program_under_its_own_name(suite: tuple[Workload, ...]) -> None:
    assert {w.program for w in suite} == {w.program for w in TINY}
    assert len({w.name for w in suite}) == len(suite)
    assert any(w.quick for w in suite)
    assert not all(w.quick for w in suite)
