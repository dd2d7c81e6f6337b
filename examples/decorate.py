"""Decorate a function; the first call per input shape searches, later ones run the plan."""

import sys

import torch

import superopt


@superopt.optimize(budget_s=float(sys.argv[1]) if len(sys.argv) > 1 else 60.0)
def scaled_residual_norm(
    x: torch.Tensor, residual: torch.Tensor, gain: torch.Tensor
) -> torch.Tensor:
    total = x + residual
    return total * torch.rsqrt(total.square().mean(-1, keepdim=True) + 1e-6) * gain


with torch.no_grad():
    x, residual, gain = torch.randn(256, 1024), torch.randn(256, 1024), torch.randn(1024)
    y = scaled_residual_norm(x, residual, gain)
print(y.shape)
print(scaled_residual_norm.report())
