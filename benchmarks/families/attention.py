"""Attention variants. Shapes: batch B, heads H, queries Q, keys K, head width D."""

import math
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.workloads import Module, Workload


def sigmoid_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attend with independent gates in place of softmax; q: [H, Q, D], k and v: [H, K, D]."""
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    return torch.sigmoid(scores - math.log(k.shape[-2])) @ v


def alibi_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attend causally with a penalty linear in distance; q, k, v: [H, S, D]."""
    heads, length, width = q.shape
    slopes = 2.0 ** (-8.0 * torch.arange(1, heads + 1, device=q.device) / heads)
    position = torch.arange(length, device=q.device)
    distance = position[None, :] - position[:, None]
    bias = (slopes[:, None, None] * distance).to(q.dtype)
    scores = q @ k.transpose(-1, -2) / math.sqrt(width) + bias
    scores = scores.masked_fill(distance > 0, float("-inf"))
    return torch.softmax(scores, dim=-1) @ v


def sliding_window_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attend to the last 256 positions and the first 4 (sinks); q, k, v: [H, S, D]."""
    position = torch.arange(q.shape[-2], device=q.device)
    distance = position[:, None] - position[None, :]
    visible = (distance >= 0) & ((distance < 256) | (position[None, :] < 4))
    scores = torch.einsum("hqd,hkd->hqk", q, k) * q.shape[-1] ** -0.5
    weights = torch.where(visible, scores, float("-inf")).softmax(dim=-1)
    return torch.einsum("hqk,hkd->hqd", weights, v)


def differential_attention(
    q1: Tensor, k1: Tensor, q2: Tensor, k2: Tensor, v: Tensor, mix: Tensor, gain: Tensor
) -> Tensor:
    """Subtract one attention map from another; q: [H, Q, D], k: [H, K, D], v: [H, K, 2D], mix: [H, 1, 1]."""
    scale = q1.shape[-1] ** -0.5
    first = torch.softmax(q1 @ k1.transpose(-1, -2) * scale, dim=-1)
    second = torch.softmax(q2 @ k2.transpose(-1, -2) * scale, dim=-1)
    out = (first - mix * second) @ v
    return F.rms_norm(out, (out.shape[-1],), gain, 1e-5) * 0.2


class PaddedCrossAttention(nn.Module):
    """Cross-attention of a decoder to a padded memory."""

    def __init__(self, size: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(size, size)
        self.out = nn.Linear(size, size)

    def forward(self, x: Tensor, k: Tensor, v: Tensor, padding: Tensor) -> Tensor:
        """Attend; x: [B, Q, N], k and v: [B, H, K, D], padding: [B, K], true where there is none."""
        batch, queries, size = x.shape
        q = self.query(x).view(batch, queries, self.heads, -1).transpose(1, 2)
        scores = torch.matmul(q, k.transpose(2, 3)) / math.sqrt(q.shape[-1])
        scores = scores.masked_fill(padding[:, None, None, :], torch.finfo(scores.dtype).min)
        mixed = torch.matmul(F.softmax(scores, dim=-1), v)
        projected: Tensor = self.out(mixed.transpose(1, 2).reshape(batch, queries, size))
        return x + projected


def cosine_attention(q: Tensor, k: Tensor, v: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """Swin-v2 window attention; q, k, v: [W, H, S, D], scale: [H, 1, 1], bias: [H, S, S]."""
    cosine = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1)
    logits = cosine * torch.clamp(scale, max=math.log(100.0)).exp() + bias
    return logits.softmax(dim=-1) @ v


def linear_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attend with the feature map elu + 1, linear in length; q, k, v: [B, H, S, D]."""
    q, k = F.elu(q) + 1, F.elu(k) + 1
    state = torch.einsum("bhnd,bhne->bhde", k, v)
    norm = torch.einsum("bhnd,bhd->bhn", q, k.sum(dim=2))
    return torch.einsum("bhnd,bhde->bhne", q, state) / (norm[..., None] + 1e-6)


def retention(q: Tensor, k: Tensor, v: Tensor, gate: Tensor) -> Tensor:
    """Parallel retention with per-head decay and a gated, normalized output; all [H, S, D]."""
    heads, length, width = q.shape
    decay = torch.log(1 - 2.0 ** (-5.0 - torch.arange(heads, device=q.device, dtype=torch.float32)))
    position = torch.arange(length, device=q.device)
    distance = position[:, None] - position[None, :]
    kept = torch.exp(distance.clamp(min=0) * decay[:, None, None]) * (distance >= 0)
    mixed = (q @ k.transpose(-1, -2) * width**-0.5 * kept.to(q.dtype)) @ v
    return F.layer_norm(mixed, (width,)) * F.silu(gate)


def ragged_cache_decode(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> Tensor:
    """Decode with one key head and caches of different lengths; q: [B, H, D], k, v: [B, K, D], lengths: [B]."""
    visible = torch.arange(k.shape[1], device=k.device)[None, :] < lengths[:, None]
    scores = torch.einsum("bhd,bkd->bhk", q, k) * q.shape[-1] ** -0.5
    scores = scores.masked_fill(~visible[:, None, :], float("-inf"))
    return torch.einsum("bhk,bkd->bhd", torch.softmax(scores, -1), v)


def softmax_one_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attend with a softmax that may attend to nothing (one more in its denominator); [H, S, D]."""
    scores = q @ k.mT / math.sqrt(q.shape[-1])
    top = scores.amax(dim=-1, keepdim=True).clamp(min=0)
    weights = torch.exp(scores - top)
    return (weights @ v) / (torch.exp(-top) + weights.sum(dim=-1, keepdim=True))


WORKLOADS: Final = (
    Workload(
        "sigmoid-attention",
        sigmoid_attention,
        lambda d: (d.normal(8, 389, 64), d.normal(8, 1003, 64), d.normal(8, 1003, 64)),
    ),
    Workload(
        "alibi-attention",
        alibi_attention,
        lambda d: (d.normal(8, 512, 64), d.normal(8, 512, 64), d.normal(8, 512, 64)),
        4 * 8 * 64 * (512 * 513 // 2),
    ),
    Workload(
        "sliding-window-attention",
        sliding_window_attention,
        lambda d: (d.normal(4, 1003, 64), d.normal(4, 1003, 64), d.normal(4, 1003, 64)),
        4 * 4 * 64 * (256 * 257 // 2 + (1003 - 256) * 260),
    ),
    Workload(
        "differential-attention",
        differential_attention,
        lambda d: (
            *(d.normal(4, 517, 64) for _ in range(4)),
            d.normal(4, 517, 128),
            d.normal(4, 1, 1, scale=0.1, mean=0.5),
            d.gain(128),
        ),
    ),
    Workload(
        "padded-cross-attention",
        Module(lambda: PaddedCrossAttention(512, 8)),
        lambda d: (
            d.normal(4, 129, 512),
            d.normal(4, 8, 517, 64),
            d.normal(4, 8, 517, 64),
            d.lengths(4, 100, 517)[:, None] <= torch.arange(517),
        ),
    ),
    Workload(
        "cosine-window-attention",
        cosine_attention,
        lambda d: (
            *(d.normal(64, 6, 49, 32) for _ in range(3)),
            d.normal(6, 1, 1, scale=0.1, mean=2.3),
            d.normal(6, 49, 49),
        ),
    ),
    Workload(
        "linear-attention",
        linear_attention,
        lambda d: (d.normal(2, 8, 2053, 64), d.normal(2, 8, 2053, 64), d.normal(2, 8, 2053, 64)),
    ),
    Workload(
        "retention",
        retention,
        lambda d: tuple(d.normal(8, 517, 64) for _ in range(4)),
        4 * 8 * 64 * (517 * 518 // 2),
    ),
    Workload(
        "ragged-cache-decode",
        ragged_cache_decode,
        lambda d: (
            d.normal(16, 32, 128),
            d.normal(16, 1531, 128),
            d.normal(16, 1531, 128),
            d.lengths(16, 200, 1531),
        ),
    ),
    Workload(
        "softmax-one-attention",
        softmax_one_attention,
        lambda d: (d.normal(8, 512, 64), d.normal(8, 512, 64), d.normal(8, 512, 64)),
    ),
)
