"""Optimize a module: its state stays shared with the original, so that weights may change."""

import sys

import torch
from torch import nn

import superopt


class GatedBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.gate = nn.Linear(width, width)
        self.value = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.norm(x)
        return x + torch.sigmoid(self.gate(h)) * self.value(h)


budget_s = float(sys.argv[1]) if len(sys.argv) > 1 else 60.0
block = GatedBlock(512).eval()
fast = superopt.optimize(block, budget_s=budget_s)
with torch.no_grad():
    x = torch.randn(8, 512)
    fast.warmup(x)
    torch.testing.assert_close(fast(x), block(x), rtol=1e-4, atol=1e-5)
    block.gate.weight.mul_(0.5)
    torch.testing.assert_close(fast(x), block(x), rtol=1e-4, atol=1e-5)
print(fast.report())
