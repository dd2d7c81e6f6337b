"""Normalizations around linear layers. Shapes: batch B, positions S, width N, outputs M."""

from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.workloads import Module, Workload


class LayerNormLinear(nn.Module):
    """Pre-norm projection to queries, keys and values."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.project = nn.Linear(width, out)

    def forward(self, x: Tensor) -> Tensor:
        """Project; x: [B, S, N]."""
        projected: Tensor = self.project(self.norm(x))
        return projected


class GroupNormLinear(nn.Module):
    """GroupNorm, linear, SiLU, as in embeddings of diffusion models."""

    def __init__(self, width: int, out: int, groups: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(groups, width)
        self.project = nn.Linear(width, out)

    def forward(self, x: Tensor) -> Tensor:
        """Apply; x: [B, N]."""
        return F.silu(self.project(self.norm(x)))


def residual_rms_norm_linear(
    x: Tensor, update: Tensor, gain: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor]:
    """Add, normalize, project, with no library norm; x, update: [B, N], weight: [M, N]."""
    stream = x + update
    scale = torch.rsqrt(stream.pow(2).mean(dim=-1, keepdim=True) + 1e-6)
    return stream, (stream * scale * gain) @ weight.T


def weight_norm_linear(x: Tensor, direction: Tensor, length: Tensor, bias: Tensor) -> Tensor:
    """Project by weights of given lengths; x: [B, N], direction: [M, N], length: [M, 1], bias: [M]."""
    weight = length * direction / direction.norm(dim=1, keepdim=True)
    return F.relu(F.linear(x, weight, bias))


class AdaptiveNorm(nn.Module):
    """adaLN of a diffusion transformer: shift, scale and gate come from the condition."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.modulation = nn.Linear(width, 3 * width)
        self.project = nn.Linear(width, width)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """Update the stream; x: [B, S, N], condition: [B, N]."""
        shift, scale, gate = self.modulation(F.silu(condition)).chunk(3, dim=1)
        modulated = self.norm(x) * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)
        updated: Tensor = x + gate.unsqueeze(1) * self.project(modulated)
        return updated


class BertOutput(nn.Module):
    """The second half of a BERT layer: feed-forward, residual, post-norm."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.intermediate = nn.Linear(width, inner)
        self.output = nn.Linear(inner, width)
        self.norm = nn.LayerNorm(width, eps=1e-12)
        self.dropout = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        """Apply; x: [B, S, N]."""
        hidden = F.gelu(self.intermediate(x))
        normed: Tensor = self.norm(self.dropout(self.output(hidden)) + x)
        return normed


def head_norm_projection(x: Tensor, weight: Tensor, gain: Tensor) -> Tensor:
    """Project, split into heads, normalize each; x: [S, N], weight: [H*D, N], gain: [D]."""
    heads = F.linear(x, weight).view(x.shape[0], -1, gain.shape[0]).transpose(0, 1)
    return heads * torch.rsqrt(heads.square().mean(-1, keepdim=True) + 1e-6) * gain


class BatchNormLinear(nn.Module):
    """Linear, BatchNorm in evaluation, ReLU."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.project = nn.Linear(width, out)
        self.norm = nn.BatchNorm1d(out)

    def forward(self, x: Tensor) -> Tensor:
        """Apply; x: [B, N]."""
        return F.relu(self.norm(self.project(x)))


WORKLOADS: Final = (
    Workload(
        "layer-norm-linear",
        Module(lambda: LayerNormLinear(768, 2304)),
        lambda d: (d.normal(1, 197, 768),),
    ),
    Workload(
        "group-norm-linear",
        Module(lambda: GroupNormLinear(1024, 1024, 32)),
        lambda d: (d.normal(517, 1024),),
    ),
    Workload(
        "residual-rms-norm-linear",
        residual_rms_norm_linear,
        lambda d: (d.normal(37, 2053), d.normal(37, 2053), d.gain(2053), d.weight(1003, 2053)),
    ),
    Workload(
        "weight-norm-linear",
        weight_norm_linear,
        lambda d: (d.normal(64, 1024), d.normal(2048, 1024), d.gain(2048)[:, None], d.normal(2048)),
    ),
    Workload(
        "adaptive-norm",
        Module(lambda: AdaptiveNorm(512)),
        lambda d: (d.normal(4, 257, 512), d.normal(4, 512)),
    ),
    Workload(
        "bert-output",
        Module(lambda: BertOutput(768, 3072)),
        lambda d: (d.normal(1, 129, 768),),
    ),
    Workload(
        "head-norm-projection",
        head_norm_projection,
        lambda d: (d.normal(129, 1024), d.weight(1024, 1024), d.gain(64)),
    ),
    Workload(
        "batch-norm-linear",
        Module(lambda: BatchNormLinear(1003, 517)),
        lambda d: (d.normal(1031, 1003),),
    ),
)
