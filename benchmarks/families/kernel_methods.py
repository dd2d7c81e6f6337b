"""Kernel methods and distances. Shapes: points B, centres K, width D."""

import math
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.workloads import Workload


def _squared_distances(x: Tensor, y: Tensor) -> Tensor:
    """Return [B, K] squared distances through the product of x: [B, D] and y: [K, D]."""
    return x.square().sum(-1)[:, None] - 2 * x @ y.T + y.square().sum(-1)[None, :]


def rbf_regression(x: Tensor, centres: Tensor, weights: Tensor) -> Tensor:
    """Evaluate a radial basis network; weights: [K, outputs]."""
    return torch.exp(-0.5 * _squared_distances(x, centres).clamp(min=0)) @ weights


def laplacian_kernel(x: Tensor, y: Tensor) -> Tensor:
    """Kernel matrix of the L1 distance; [B, D], [K, D]."""
    return torch.exp(-0.1 * (x[:, None, :] - y[None, :, :]).abs().sum(dim=-1))


def cosine_neighbourhood(x: Tensor, y: Tensor) -> Tensor:
    """Mean similarity, of each point, to what is closer than a threshold; [B, D], [K, D]."""
    similarity = F.normalize(x, dim=1) @ F.normalize(y, dim=1).T
    close = similarity > 0.1
    return (similarity * close).sum(1) / close.sum(1).clamp(min=1)


def nadaraya_watson(x: Tensor, points: Tensor, values: Tensor) -> Tensor:
    """Regress by a Gaussian-weighted mean; points: [K, D], values: [K, outputs]."""
    return torch.softmax(-_squared_distances(x, points) / (2 * 0.7**2), dim=1) @ values


def soft_k_means(x: Tensor, centres: Tensor) -> tuple[Tensor, Tensor]:
    """Assign points to centres softly, and move the centres to the means of theirs."""
    assigned = torch.softmax(-torch.cdist(x, centres).square(), dim=-1)
    return assigned, (assigned.T @ x) / assigned.sum(0)[:, None]


def mean_discrepancy(x: Tensor, y: Tensor) -> Tensor:
    """Maximum mean discrepancy under a Gaussian kernel; [B, D], [K, D]."""

    def mean_kernel(a: Tensor, b: Tensor) -> Tensor:
        return torch.exp(-_squared_distances(a, b) / a.shape[1]).mean()

    return mean_kernel(x, x) + mean_kernel(y, y) - 2 * mean_kernel(x, y)


def pairwise_distances(x: Tensor, y: Tensor) -> Tensor:
    """Euclidean distances; [B, D], [K, D]."""
    return _squared_distances(x, y).clamp(min=1e-12).sqrt()


def sinkhorn(cost: Tensor, log_a: Tensor, log_b: Tensor) -> Tensor:
    """Three steps of entropic optimal transport in the log domain; cost: [B, K]."""
    scaled = -cost / 0.05
    u, v = torch.zeros_like(log_a), torch.zeros_like(log_b)
    for _ in range(3):
        u = log_a - torch.logsumexp(scaled + v[None, :], dim=1)
        v = log_b - torch.logsumexp(scaled + u[:, None], dim=0)
    return torch.exp(scaled + u[:, None] + v[None, :])


def random_features(x: Tensor, frequencies: Tensor, phase: Tensor, weights: Tensor) -> Tensor:
    """Regress on random Fourier features; frequencies: [D, F], phase: [F], weights: [F, outputs]."""
    features = math.sqrt(2 / phase.shape[0]) * torch.cos(x @ frequencies + phase)
    return features @ weights


WORKLOADS: Final = (
    Workload(
        "rbf-regression",
        rbf_regression,
        lambda d: (
            d.normal(1003, 37, scale=0.3),
            d.normal(2053, 37, scale=0.3),
            d.normal(2053, 10, scale=0.1),
        ),
    ),
    Workload(
        "laplacian-kernel",
        laplacian_kernel,
        lambda d: (d.normal(389, 37), d.normal(517, 37)),
    ),
    Workload(
        "cosine-neighbourhood",
        cosine_neighbourhood,
        lambda d: (d.normal(1003, 128), d.normal(1531, 128)),
    ),
    Workload(
        "nadaraya-watson",
        nadaraya_watson,
        lambda d: (d.normal(1003, 16), d.normal(2053, 16), d.normal(2053, 8)),
    ),
    Workload(
        "soft-k-means",
        soft_k_means,
        lambda d: (d.normal(8209, 37, scale=0.5), d.normal(129, 37, scale=0.5)),
    ),
    Workload(
        "mean-discrepancy",
        mean_discrepancy,
        lambda d: (d.normal(1003, 64), d.normal(1019, 64, mean=0.1)),
    ),
    Workload(
        "pairwise-distances",
        pairwise_distances,
        lambda d: (d.normal(1531, 37), d.normal(1003, 37)),
    ),
    Workload(
        "sinkhorn",
        sinkhorn,
        lambda d: (
            d.normal(517, 1003).abs(),
            torch.log_softmax(d.normal(517), 0),
            torch.log_softmax(d.normal(1003), 0),
        ),
    ),
    Workload(
        "random-features",
        random_features,
        lambda d: (
            d.normal(1003, 64),
            d.normal(64, 1031),
            d.normal(1031),
            d.normal(1031, 10, scale=0.1),
        ),
    ),
)
