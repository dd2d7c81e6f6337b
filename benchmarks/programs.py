"""The programs, as a user would write them: plain PyTorch functions with no library kernel named.

`*_library` is the same function with `scaled_dot_product_attention` where that applies: the
baseline of a user who knows the library. Shapes: heads H, queries Q, keys K, head width D, rows B.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

_EPS = 1e-6


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attend; q: [..., Q, D], k and v: [..., K, D]."""
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    return torch.softmax(scores, dim=-1) @ v


def attention_library(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """`attention` by the library kernel."""
    return F.scaled_dot_product_attention(q, k, v)


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attend to earlier keys only; q, k, v: [H, S, D]."""
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    visible = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device).tril()
    return torch.softmax(scores.masked_fill(~visible, float("-inf")), dim=-1) @ v


def causal_attention_library(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """`causal_attention` by the library kernel."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def gqa_decode(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attend from one new token; q: [B, H, 1, D], k and v: [B, H/groups, K, D]."""
    groups = q.shape[1] // k.shape[1]
    k = k.repeat_interleave(groups, dim=1)
    v = v.repeat_interleave(groups, dim=1)
    return torch.softmax(q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5, dim=-1) @ v


def gqa_decode_library(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """`gqa_decode` by the library kernel."""
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)


def qk_norm_attention(q: Tensor, k: Tensor, v: Tensor, q_gain: Tensor, k_gain: Tensor) -> Tensor:
    """Attend with RMS-normalized queries and keys; gains: [D]."""
    q = F.rms_norm(q, (q.shape[-1],), q_gain, _EPS)
    k = F.rms_norm(k, (k.shape[-1],), k_gain, _EPS)
    return attention(q, k, v)


def qk_norm_attention_library(
    q: Tensor, k: Tensor, v: Tensor, q_gain: Tensor, k_gain: Tensor
) -> Tensor:
    """`qk_norm_attention` with attention by the library kernel."""
    q = F.rms_norm(q, (q.shape[-1],), q_gain, _EPS)
    k = F.rms_norm(k, (k.shape[-1],), k_gain, _EPS)
    return F.scaled_dot_product_attention(q, k, v)


def kv_norm_attention(q: Tensor, k: Tensor, v: Tensor, k_gain: Tensor, v_gain: Tensor) -> Tensor:
    """Attend with RMS-normalized keys and values; gains: [D]."""
    k = F.rms_norm(k, (k.shape[-1],), k_gain, _EPS)
    v = F.rms_norm(v, (v.shape[-1],), v_gain, _EPS)
    return attention(q, k, v)


def kv_norm_attention_library(
    q: Tensor, k: Tensor, v: Tensor, k_gain: Tensor, v_gain: Tensor
) -> Tensor:
    """`kv_norm_attention` with attention by the library kernel."""
    k = F.rms_norm(k, (k.shape[-1],), k_gain, _EPS)
    v = F.rms_norm(v, (v.shape[-1],), v_gain, _EPS)
    return F.scaled_dot_product_attention(q, k, v)


def soft_capped_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attend with scores squeezed into (-30, 30) by tanh; no library kernel on a CPU has it."""
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    scores = 30.0 * torch.tanh(scores / 30.0)
    return torch.softmax(scores, dim=-1) @ v


def biased_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """Attend with a bias on the scores; bias: [H, Q, K]."""
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5 + bias
    return torch.softmax(scores, dim=-1) @ v


def biased_attention_library(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """`biased_attention` by the library kernel."""
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)


def rms_norm_linear(x: Tensor, gain: Tensor, weight: Tensor) -> Tensor:
    """Normalize, then project; x: [B, N], weight: [M, N]."""
    return F.linear(F.rms_norm(x, (x.shape[-1],), gain, _EPS), weight)


def gated_mlp(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """SwiGLU block; x: [B, N], gate and up: [M, N], down: [N, M]."""
    return F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)


def lora_linear(x: Tensor, weight: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Project with a low-rank update; x: [B, N], weight: [M, N], a: [R, N], b: [M, R]."""
    return F.linear(x, weight) + 2.0 * F.linear(F.linear(x, a), b)


def n_transformer_update(x: Tensor, h: Tensor, alpha: Tensor) -> Tensor:
    """Move x towards h on the unit sphere, as nGPT does; x, h: [B, N], alpha: [N]."""
    return F.normalize(x + alpha * (F.normalize(h, dim=-1) - x), dim=-1)


def layer_norm_gelu_mlp(
    x: Tensor, gain: Tensor, shift: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor
) -> Tensor:
    """Apply a transformer MLP with its norm and residual; x: [B, N], w1: [M, N], w2: [N, M]."""
    h = F.layer_norm(x, (x.shape[-1],), gain, shift)
    return x + F.linear(F.gelu(F.linear(h, w1, b1)), w2, b2)


def residual_rms_norm(x: Tensor, update: Tensor, gain: Tensor) -> tuple[Tensor, Tensor]:
    """Add to the residual stream, and normalize it for the next block; x, update: [B, N]."""
    stream = x + update
    return stream, F.rms_norm(stream, (stream.shape[-1],), gain, _EPS)


def softmax_cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """Mean negative log-likelihood; logits: [B, C], target: [B] int64."""
    loss: Tensor = F.cross_entropy(logits, target)
    return loss


def rope_scale(q: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding (half-split), then the attention scale; q: [H, S, D], cos and sin: [S, D]."""
    first, second = q.chunk(2, dim=-1)
    rotated = torch.cat((-second, first), dim=-1)
    return (q * cos + rotated * sin) / math.sqrt(q.shape[-1])


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding (half-split); x: [..., S, D], cos and sin: [S, D]."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def decoder_block(
    x: Tensor,
    attention_gain: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    mlp_gain: Tensor,
    gate: Tensor,
    up: Tensor,
    down: Tensor,
    cos: Tensor,
    sin: Tensor,
) -> Tensor:
    """Run a Llama-style block on a prompt; x: [S, N], query: [H*D, N], key, value: [G*D, N]."""
    length, width = cos.shape
    normed = F.rms_norm(x, (x.shape[-1],), attention_gain, _EPS)
    q, k, v = (
        F.linear(normed, w).view(1, length, -1, width).transpose(1, 2) for w in (query, key, value)
    )
    q, k = rotate(q, cos, sin), rotate(k, cos, sin)
    mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    x = x + F.linear(mixed.transpose(1, 2).reshape(length, -1), out)
    return x + gated_mlp(F.rms_norm(x, (x.shape[-1],), mlp_gain, _EPS), gate, up, down)
