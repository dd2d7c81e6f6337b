"""Gated and unusual feed-forward layers. Shapes: rows B, width N, inner width M."""

from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.workloads import Module, Workload


class GeGLU(nn.Module):
    """Feed-forward layer of a diffusion transformer: one projection to values and gates."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.project = nn.Linear(width, 2 * inner)
        self.out = nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer; x: [B, N]."""
        value, gate = self.project(x).chunk(2, dim=-1)
        out: Tensor = self.out(value * F.gelu(gate))
        return out


def reglu(x: Tensor, gate: Tensor, value: Tensor, down: Tensor) -> Tensor:
    """ReGLU block; x: [B, N], gate, value: [M, N], down: [N, M]."""
    return (torch.relu(x @ gate.T) * (x @ value.T)) @ down.T


def squared_relu_mlp(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """Primer's feed-forward layer with its residual; x: [B, N], up: [M, N], down: [N, M]."""
    return x + F.linear(F.relu(F.linear(x, up)).square(), down)


class GatedResidual(nn.Module):
    """Choose, per feature, between the stream and its update."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gate = nn.Linear(2 * width, width)
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor, update: Tensor) -> Tensor:
        """Mix; x, update: [B, N]."""
        gate = torch.sigmoid(self.gate(torch.cat([x, update], dim=-1)))
        mixed: Tensor = self.norm(gate * x + (1 - gate) * update)
        return mixed


def soft_mixture(x: Tensor, router: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """Every expert on every row, mixed by a softmax; router: [E, N], up: [E, N, M], down: [E, M, N]."""
    gates = F.softmax(x @ router.T, dim=-1)
    hidden = F.silu(torch.einsum("bn,enm->ebm", x, up))
    return torch.einsum("ebm,emn,be->bn", hidden, down, gates)


def recurrent_gate(
    x: Tensor, h: Tensor, w_x: Tensor, w_h: Tensor, b_x: Tensor, b_h: Tensor
) -> Tensor:
    """One step of a GRU written out; x, h: [B, N], w_x, w_h: [3N, N]."""
    x_reset, x_update, x_new = (x @ w_x.T + b_x).chunk(3, dim=-1)
    h_reset, h_update, h_new = (h @ w_h.T + b_h).chunk(3, dim=-1)
    reset, update = torch.sigmoid(x_reset + h_reset), torch.sigmoid(x_update + h_update)
    return (1 - update) * torch.tanh(x_new + reset * h_new) + update * h


class SpatialGate(nn.Module):
    """gMLP's spatial gating: one half of the features, mixed along positions, gates the other."""

    def __init__(self, length: int, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.mix = nn.Linear(length, length)

    def forward(self, x: Tensor) -> Tensor:
        """Gate; x: [B, S, 2N]."""
        value, gate = x.chunk(2, dim=-1)
        mixed: Tensor = self.mix(self.norm(gate).transpose(1, 2)).transpose(1, 2)
        return value * mixed


def squeeze_excite(x: Tensor, down: Tensor, up: Tensor) -> Tensor:
    """Scale channels by a gate made of their means; x: [B, C, H, W], down: [R, C], up: [C, R]."""
    squeezed = x.mean(dim=(2, 3))
    gate = torch.sigmoid(F.silu(squeezed @ down.T) @ up.T)
    return x * gate[:, :, None, None]


WORKLOADS: Final = (
    Workload("geglu", Module(lambda: GeGLU(768, 3072)), lambda d: (d.normal(77, 768),)),
    Workload(
        "reglu-ragged",
        reglu,
        lambda d: (
            d.normal(37, 1003),
            d.weight(2731, 1003),
            d.weight(2731, 1003),
            d.weight(1003, 2731),
        ),
    ),
    Workload(
        "squared-relu-mlp",
        squared_relu_mlp,
        lambda d: (d.normal(16, 1024), d.weight(4096, 1024), d.weight(1024, 4096)),
    ),
    Workload(
        "gated-residual",
        Module(lambda: GatedResidual(1024)),
        lambda d: (d.normal(129, 1024), d.normal(129, 1024)),
    ),
    Workload(
        "soft-mixture",
        soft_mixture,
        lambda d: (
            d.normal(32, 512),
            d.weight(8, 512),
            d.normal(8, 512, 1024, scale=512**-0.5),
            d.normal(8, 1024, 512, scale=1024**-0.5),
        ),
    ),
    Workload(
        "recurrent-gate",
        recurrent_gate,
        lambda d: (
            d.normal(64, 1003),
            d.normal(64, 1003),
            d.weight(3009, 1003),
            d.weight(3009, 1003),
            d.normal(3009, scale=0.1),
            d.normal(3009, scale=0.1),
        ),
    ),
    Workload(
        "spatial-gate",
        Module(lambda: SpatialGate(197, 768)),
        lambda d: (d.normal(8, 197, 1536),),
    ),
    Workload(
        "squeeze-excite",
        squeeze_excite,
        lambda d: (d.normal(16, 256, 28, 28), d.weight(16, 256), d.weight(256, 16)),
    ),
)
