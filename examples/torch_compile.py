"""Use superopt as a torch.compile backend."""

import sys

import torch

budget_s = float(sys.argv[1]) if len(sys.argv) > 1 else 60.0


def kernel_regression(x: torch.Tensor, points: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Nadaraya-Watson regression with a Gaussian kernel."""
    distance = x.square().sum(-1, keepdim=True) - 2 * x @ points.T + points.square().sum(-1)
    return torch.softmax(-distance, -1) @ values


compiled = torch.compile(kernel_regression, backend="superopt", options={"budget_s": budget_s})
with torch.no_grad():
    inputs = torch.randn(256, 32), torch.randn(512, 32), torch.randn(512, 16)
    result = compiled(*inputs)
    torch.testing.assert_close(result, kernel_regression(*inputs), rtol=1e-3, atol=1e-4)
print("equal to eager:", tuple(result.shape))
