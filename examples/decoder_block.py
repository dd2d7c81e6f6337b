"""A whole Llama-style decoder block, by superopt.optimize and by torch.compile: equal to eager, and timed.

python examples/decoder_block.py [SECONDS] [--small]
"""

import argparse

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import superopt
from superopt.measure import interleaved


class DecoderBlock(nn.Module):
    """RMSNorm, rotary grouped-query attention, RMSNorm, gated MLP; both with a residual."""

    def __init__(self, length: int, size: int, heads: int, kv_heads: int, hidden: int) -> None:
        super().__init__()
        self.width = size // heads
        self.groups = heads // kv_heads
        self.norms = nn.ModuleList(nn.RMSNorm(size, eps=1e-6) for _ in range(2))
        self.query = nn.Linear(size, size, bias=False)
        self.key, self.value = (
            nn.Linear(size, kv_heads * self.width, bias=False) for _ in range(2)
        )
        self.out = nn.Linear(size, size, bias=False)
        self.gate, self.up = (nn.Linear(size, hidden, bias=False) for _ in range(2))
        self.down = nn.Linear(hidden, size, bias=False)
        frequency = 10000.0 ** (-torch.arange(0, self.width, 2) / self.width)
        angle = torch.outer(torch.arange(length).float(), frequency).repeat(1, 2)
        self.register_buffer("cos", angle.cos())
        self.register_buffer("sin", angle.sin())

    def rotated(self, x: Tensor) -> Tensor:
        first, second = x.chunk(2, dim=-1)
        return x * self.cos + torch.cat((-second, first), dim=-1) * self.sin

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        h = self.norms[0](x)
        q, k, v = (
            f(h).view(batch, length, -1, self.width).transpose(1, 2)
            for f in (self.query, self.key, self.value)
        )
        q, k = self.rotated(q), self.rotated(k)
        k, v = (t.repeat_interleave(self.groups, dim=1) for t in (k, v))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, length, -1))
        h = self.norms[1](x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("seconds", nargs="?", type=float, default=90.0, help="of search, each way")
parser.add_argument("--small", action="store_true", help="a small block, for a quick look")
options = parser.parse_args()
length, size, heads, kv_heads, hidden = (
    (8, 32, 4, 2, 48) if options.small else (16, 1024, 16, 4, 2816)
)

torch.manual_seed(0)
with torch.no_grad():
    block = DecoderBlock(length, size, heads, kv_heads, hidden).eval()
    x = torch.randn(1, length, size)
    fast = superopt.optimize(block, budget_s=options.seconds).warmup(x)
    print(fast.report())
    compiled = torch.compile(block, backend="superopt", options={"budget_s": options.seconds})
    inductor = torch.compile(block)
    for call in (fast, compiled, inductor):  # which compiles what is compiled at the first call
        torch.testing.assert_close(call(x), block(x), rtol=1e-3, atol=1e-5)
    calls = [lambda f=f: f(x) for f in (block, inductor, compiled, fast)]
    names = ("eager", "torch.compile", 'torch.compile(backend="superopt")', "superopt.optimize")
    for name, seconds in zip(names, interleaved(calls), strict=True):
        print(f"{seconds * 1e3:8.3f} ms  {name}")
    print("equal to eager")
