"""Look at what was found: the block graph, its proof, and the C++ that runs."""

import sys

import torch

import superopt
from superopt.ir.text import print_graph

budget_s = float(sys.argv[1]) if len(sys.argv) > 1 else 60.0


@superopt.optimize(budget_s=budget_s)
def focal_loss(logits: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    p = torch.softmax(logits, -1)
    return -(weight * (1 - p).square() * torch.log_softmax(logits, -1)).sum(-1)


with torch.no_grad():
    focal_loss(torch.randn(512, 2048), torch.rand(512, 2048))
for plan in focal_loss.plans:
    print(print_graph(plan.original))
    if plan.program is not None:
        print(print_graph(plan.program))
        for kernel in plan.kernels.values():
            print(kernel.text)
print(focal_loss.report())
