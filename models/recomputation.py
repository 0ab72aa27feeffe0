"""Activation checkpointing: keep a block's inputs only, and compute again what its backward pass needs.

Chen et al., "Training Deep Nets with Sublinear Memory Cost", 2016. Results and gradients are the same to the bit. With
``keep_products``, the results of convolutions and matrix products are kept, too, so that only cheap operations, such as
batch norms and activations, are repeated.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import wraps
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

_aten = torch.ops.aten
PRODUCTS = [_aten.convolution.default, _aten.mm.default, _aten.addmm.default, _aten.bmm.default, _aten.baddbmm.default]


def recomputed(module: nn.Module, function: Callable, *args: Any, keep_products: bool = False) -> Any:
    """``function(*args)``, part of ``module``, with its intermediate results recomputed in the backward pass."""
    if not (module.training and torch.is_grad_enabled()):
        return function(*args)

    def contexts() -> tuple[AbstractContextManager, AbstractContextManager]:
        first, again = nullcontext(), nullcontext()
        if keep_products:
            first, again = create_selective_checkpoint_contexts(PRODUCTS)
        return first, _fixed_statistics(module, again)

    return checkpoint(function, *args, use_reentrant=False, context_fn=contexts)


def recomputable(forward: Callable) -> Callable:
    """Decorate a module's ``forward``: it is recomputed where the module's attribute ``recomputes`` is True."""

    @wraps(forward)
    def run(self: nn.Module, *args: Any) -> Any:
        return recomputed(self, forward, self, *args) if self.recomputes else forward(self, *args)

    return run


@contextmanager
def _fixed_statistics(module: nn.Module, inner: AbstractContextManager) -> Iterator[None]:
    """Within the block, batch norms normalise by the batch as before but do not count it a second time."""
    norms = [each for each in module.modules() if isinstance(each, _BatchNorm)]
    before = [(norm, norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm, _, count in before:
        # Without statistics altogether, other tensors would be kept than the first time, which autograd refuses.
        norm.momentum, norm.num_batches_tracked = 0.0, None if count is None else count.clone()
    try:
        with inner:
            yield
    finally:
        for norm, momentum, count in before:
            norm.momentum, norm.num_batches_tracked = momentum, count
