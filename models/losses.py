"""Loss functions. Those on (..., B, H, ...) return one value per hand, (..., H): leading axes are the stages."""

import torch
import torch.nn.functional as F
from torch import Tensor

HUBER_DELTA = 0.01


def mean_per_hand(values: Tensor, present: Tensor | None = None) -> Tensor:
    """Mean over batch and coordinates, (..., B, H, N) -> (..., H).

    present: (B, H) bool. An absent hand counts as zero and gets no gradient; the others weigh as much as in a batch
    without absent ones, so that the mean over a batch is that over its parts.
    """
    if present is not None:
        values = torch.where(present[..., None], values, 0.0)
    return values.mean((-3, -1))


def huber_per_hand(prediction: Tensor, target: Tensor, present: Tensor | None = None) -> Tensor:
    """Huber loss per hand, (..., B, H, N, C) and target (B, H, N, C) -> (..., H): mean of 0.5 z^2 if |z| < d else
    d (|z| - d / 2) with d = 0.01."""
    values = F.huber_loss(prediction, target.expand_as(prediction), reduction='none', delta=HUBER_DELTA)
    return mean_per_hand(values.flatten(-2), present)


def huber(prediction: Tensor, target: Tensor) -> Tensor:
    """Huber loss over all elements -> ()."""
    return F.huber_loss(prediction, target, delta=HUBER_DELTA)


def deviation_loss(deviation: Tensor, errors: Tensor) -> Tensor:
    """Negative log-likelihood of errors (..., 3) under N(0, deviation^2) per coordinate, deviation (...) -> (...).

    The constant is left out. No gradient flows into the errors: the deviations learn from the estimate, not the other
    way round.
    """
    squared = (errors.detach() ** 2).sum(-1)
    return 3 * deviation.log() + squared / (2 * deviation**2)


def lovasz_softmax(scores: Tensor, labels: Tensor) -> Tensor:
    """Lovasz extension of the Jaccard loss, mean over the classes present (Berman et al., CVPR 2018, algorithm 1).

    scores (B, C, H, W): probabilities in the authors' definition, raw logits in the published DIR code; labels
    (B, H, W).
    """
    classes = scores.shape[1]
    scores = scores.permute(1, 0, 2, 3).flatten(1)  # (C, N)
    truth = (labels.flatten()[None] == torch.arange(classes, device=labels.device)[:, None]).to(scores.dtype)
    errors, order = (truth - scores).abs().sort(dim=1, descending=True)
    truth = truth.gather(1, order)
    total = truth.sum(1, keepdim=True)
    intersection = total - truth.cumsum(1)
    union = total + (1 - truth).cumsum(1)
    jaccard = 1 - intersection / union
    steps = torch.cat([jaccard[:, :1], jaccard.diff(dim=1)], 1)
    present = (total[:, 0] > 0).to(scores.dtype)
    return ((errors * steps).sum(1) * present).sum() / present.sum().clamp_min(1)
