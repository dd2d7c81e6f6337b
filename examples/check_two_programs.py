"""Use the verifier alone: are two programs the same function?"""

import torch

import superopt
from superopt.verify.equivalence import verify_field


def softmax_then_weigh(x: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return torch.softmax(x, -1) @ v


def weigh_then_divide(x: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    e = torch.exp(x)
    return (e @ v) / e.sum(-1, keepdim=True)


def forgot_to_divide(x: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return torch.exp(x) @ v


inputs = torch.randn(16, 64), torch.randn(64, 8)
first = superopt.lift(softmax_then_weigh, inputs).graph
for other in (weigh_then_divide, forgot_to_divide):
    print(f"{other.__name__}: {verify_field(first, superopt.lift(other, inputs).graph, seed=0)}")
