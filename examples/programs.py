"""Programs that the demo optimizes: as a user would write them, nothing about them is known."""

import torch
from torch import Tensor


def norm_linear(x: Tensor, gain: Tensor, weight: Tensor) -> Tensor:
    """RMSNorm, then a linear layer. x: [16, 4096], weight: [4096, 4096]."""
    scale = torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)
    return torch.nn.functional.linear(x * scale * gain, weight)


def gated_mlp(x: Tensor, gate: Tensor, up: Tensor) -> Tensor:
    """Two projections, one gated by the other. x: [8, 4096]."""
    return torch.nn.functional.silu(x @ gate) * (x @ up)


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention written out. q, k, v: [4, 1024, 64]."""
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    length = torch.arange(q.shape[-2])
    scores = scores.masked_fill(length[:, None] < length[None, :], float("-inf"))
    return torch.softmax(scores, -1) @ v


def squared_decay_retrieval(q: Tensor, k: Tensor, v: Tensor, decay: Tensor) -> Tensor:
    """A variant that no library has: soft-capped scores, a decay per key, and squared weights."""
    scores = 20.0 * torch.tanh(q @ k.transpose(-1, -2) / 20.0) - decay
    weights = torch.exp(scores - scores.amax(-1, keepdim=True))
    mass = weights.sum(-1, keepdim=True)
    return ((weights / mass).square()) @ v
