"""Choose values by a mask over their leading axes: of samples, or of the hands that an image shows."""

import torch
from torch import Tensor


def where_leading(mask: Tensor, values: Tensor, otherwise: float) -> Tensor:
    """``values`` (B, ...) where ``mask``, (B,) or (B, 2) bool, is True; ``otherwise``, without gradient, elsewhere."""
    return torch.where(mask.view(*mask.shape, *[1] * (values.ndim - mask.ndim)), values, otherwise)
