"""Count the batches of all batch norms in one operation instead of one each: on a GPU, each is a launch.

The counters, ``num_batches_tracked``, stay in the state_dict. Momenta are fixed here, so nothing else reads them.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.layers import SharedMLP


class _Uncounted:
    """Mixin: a batch norm that leaves its counter alone."""

    def forward(self: Any, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)  # type: ignore[misc]  # the batch norm's
        self._check_input_dim(x)
        parameters = self.running_mean, self.running_var, self.weight, self.bias
        return F.batch_norm(x, *parameters, training=True, momentum=self.momentum, eps=self.eps)


class _BatchNorm1d(_Uncounted, nn.BatchNorm1d):
    pass


class _BatchNorm2d(_Uncounted, nn.BatchNorm2d):
    pass


_UNCOUNTED: dict[type, type] = {nn.BatchNorm1d: _BatchNorm1d, nn.BatchNorm2d: _BatchNorm2d}


class BatchCounters:
    """The counters of the batch norms of ``network``, which no longer count by themselves."""

    def __init__(self, network: nn.Module):
        twice = {id(module[1]) for module in network.modules() if isinstance(module, SharedMLP)}
        self.norms: list[tuple[nn.Module, int]] = []
        for norm in network.modules():
            if type(norm) in _UNCOUNTED:
                norm.__class__ = _UNCOUNTED[type(norm)]
            if isinstance(norm, _Uncounted):
                self.norms.append((norm, 2 if id(norm) in twice else 1))

    def count(self) -> None:
        """Count a batch in every norm in training mode."""
        training = [(norm.num_batches_tracked, batches) for norm, batches in self.norms if norm.training]
        if training:
            counters, batches = zip(*training)
            torch._foreach_add_(counters, batches)
