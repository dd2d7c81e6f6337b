"""Losses, forward only. Shapes: batch B, classes C, width D."""

from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.workloads import Workload


def smoothed_cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy with label smoothing; logits: [B, C], target: [B]."""
    loss: Tensor = F.cross_entropy(logits, target, label_smoothing=0.1)
    return loss


def focal_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Sigmoid focal loss of a detector; both [B, anchors, C]."""
    p = torch.sigmoid(logits)
    cross_entropy = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    hit = p * target + (1 - p) * (1 - target)
    weight = 0.25 * target + 0.75 * (1 - target)
    return (weight * cross_entropy * (1 - hit) ** 2).sum() / logits.shape[0]


def clip_loss(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    """Symmetric contrastive loss of image and text features; [B, D], scale: []."""
    image = image / image.norm(dim=1, keepdim=True)
    text = text / text.norm(dim=1, keepdim=True)
    logits = scale.exp() * image @ text.t()
    labels = torch.arange(logits.shape[0], device=logits.device)
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.t(), labels)) / 2


def queue_contrast(query: Tensor, key: Tensor, queue: Tensor) -> Tensor:
    """Contrast with a queue of negatives, as MoCo does; query, key: [B, D], queue: [K, D]."""
    query, key = F.normalize(query, dim=-1), F.normalize(key, dim=-1)
    positive = (query * key).sum(dim=-1, keepdim=True)
    logits = torch.cat([positive, query @ queue.T], dim=1) / 0.07
    return (torch.logsumexp(logits, dim=1) - logits[:, 0]).mean()


def triplet_loss(anchor: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
    """Keep the negative further away than the positive by a margin; all [B, D]."""
    loss: Tensor = F.triplet_margin_loss(anchor, positive, negative, margin=0.3)
    return loss


def distillation_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Divergence from a teacher at temperature 4; both [B, C]."""
    loss: Tensor = F.kl_div(
        F.log_softmax(student / 4.0, dim=-1),
        F.log_softmax(teacher / 4.0, dim=-1),
        reduction="batchmean",
        log_target=True,
    )
    return loss * 16.0


def weighted_huber_loss(prediction: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """Huber loss per row, weighted; prediction, target: [B, D], weight: [B]."""
    rows = F.huber_loss(prediction, target, reduction="none", delta=0.7).mean(dim=1)
    return (rows * weight).sum() / weight.sum()


def dice_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Soft Dice plus cross-entropy of a segmentation; both [B, C, H, W]."""
    p = logits.sigmoid()
    overlap = (p * target).sum(dim=(2, 3))
    total = p.sum(dim=(2, 3)) + target.sum(dim=(2, 3))
    dice = 1 - (2 * overlap + 1.0) / (total + 1.0)
    return dice.mean() + F.binary_cross_entropy_with_logits(logits, target)


WORKLOADS: Final = (
    Workload(
        "smoothed-cross-entropy",
        smoothed_cross_entropy,
        lambda d: (d.normal(517, 10007, scale=2.0), d.classes(517, 10007)),
    ),
    Workload(
        "focal-loss",
        focal_loss,
        lambda d: (
            d.normal(4, 8732, 21, scale=2.0),
            (d.normal(4, 8732, 21) > 2.0).to(d.dtype),
        ),
    ),
    Workload(
        "clip-loss",
        clip_loss,
        lambda d: (d.normal(517, 512), d.normal(517, 512), d.normal(scale=0.1, mean=2.6)),
    ),
    Workload(
        "queue-contrast",
        queue_contrast,
        lambda d: (d.normal(129, 128), d.normal(129, 128), d.normal(16381, 128, scale=128**-0.5)),
    ),
    Workload(
        "triplet-loss",
        triplet_loss,
        lambda d: tuple(d.normal(4099, 509) for _ in range(3)),
    ),
    Workload(
        "distillation-loss",
        distillation_loss,
        lambda d: (d.normal(129, 32003, scale=2.0), d.normal(129, 32003, scale=2.0)),
    ),
    Workload(
        "weighted-huber-loss",
        weighted_huber_loss,
        lambda d: (d.normal(1003, 2053), d.normal(1003, 2053), d.normal(1003).abs()),
    ),
    Workload(
        "dice-loss",
        dice_loss,
        lambda d: (
            d.normal(4, 3, 389, 389, scale=2.0),
            (d.normal(4, 3, 389, 389) > 0.5).to(d.dtype),
        ),
    ),
)
