"""Whole blocks of models, as their libraries write them. Shapes: batch B, sequence S, width N, heads H."""

from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.programs import rotate
from benchmarks.workloads import Draw, Module, Workload, decoder_block

_EPS = 1e-12


class BertLayer(nn.Module):
    """An encoder layer that normalizes after each residual (Devlin et al., 2018)."""

    def __init__(self, width: int, heads: int, inner: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.attention_norm = nn.LayerNorm(width, eps=_EPS)
        self.up, self.down = nn.Linear(width, inner), nn.Linear(inner, width)
        self.output_norm = nn.LayerNorm(width, eps=_EPS)

    def forward(self, x: Tensor, padding: Tensor) -> Tensor:
        """Encode; x: [B, S, N], padding: [B, 1, 1, S], added to the scores."""
        q, k, v = (
            layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=padding)
        x = self.attention_norm(x + self.out(mixed.transpose(1, 2).flatten(-2)))
        out: Tensor = self.output_norm(x + self.down(F.gelu(self.up(x))))
        return out


class LlamaStep(nn.Module):
    """A Llama layer that takes one new token per sequence and returns its key and value too."""

    def __init__(self, width: int, heads: int, kv_heads: int, inner: int) -> None:
        super().__init__()
        self.width = width // heads
        self.attention_norm, self.mlp_norm = (nn.RMSNorm(width, eps=1e-6) for _ in range(2))
        self.query, self.out = (nn.Linear(width, width, bias=False) for _ in range(2))
        self.key, self.value = (
            nn.Linear(width, kv_heads * self.width, bias=False) for _ in range(2)
        )
        self.gate, self.up = (nn.Linear(width, inner, bias=False) for _ in range(2))
        self.down = nn.Linear(inner, width, bias=False)

    def forward(
        self, x: Tensor, keys: Tensor, values: Tensor, cos: Tensor, sin: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Take a step; x: [B, 1, N], keys and values: [B, G, S, D], cos and sin: [1, D]."""
        normed = self.attention_norm(x)
        q, k, v = (
            layer(normed).unflatten(-1, (-1, self.width)).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        keys, values = torch.cat([keys, k], dim=2), torch.cat([values, v], dim=2)
        mixed = F.scaled_dot_product_attention(q, keys, values, enable_gqa=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(-2))
        normed = self.mlp_norm(x)
        return x + self.down(F.silu(self.gate(normed)) * self.up(normed)), k, v


def _padding(d: Draw, batch: int, length: int) -> Tensor:
    lengths = d.lengths(batch, length // 2, length)
    missing = torch.arange(length, device=lengths.device) >= lengths[:, None, None, None]
    return (missing * -1e4).to(d.dtype)


def _bert(name: str, batch: int, length: int) -> Workload:
    return Workload(
        name,
        Module(lambda: BertLayer(768, 12, 3072)),
        lambda d: (d.normal(batch, length, 768), _padding(d, batch, length)),
        batch * length * (24 * 768**2 + 4 * 768 * length),
        kernels=4,
    )


def _llama_step(name: str, batch: int, length: int) -> Workload:
    return Workload(
        name,
        Module(lambda: LlamaStep(1024, 16, 4, 2816)),
        lambda d: (
            d.normal(batch, 1, 1024),
            d.normal(batch, 4, length, 64),
            d.normal(batch, 4, length, 64),
            *d.rotary(1, 64),
        ),
        batch * (2 * 1024 * (2 * 1024 + 2 * 256 + 3 * 2816) + 4 * 1024 * (length + 1)),
        kernels=4,
    )


WORKLOADS: Final = (
    _bert("bert-layer-1", 1, 61),
    _bert("bert-layer-8", 8, 128),
    _llama_step("llama-step-1", 1, 777),
    _llama_step("llama-step-8", 8, 777),
    decoder_block("decoder-block-509", 509, 512, 8, 2, 1408),
    decoder_block("decoder-block-5", 5, 1024, 16, 4, 2816),
)
