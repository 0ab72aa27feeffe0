"""Maps that the network makes on its way and does not return, to look at."""

from contextlib import ExitStack
from typing import NamedTuple

from torch import Tensor

from models import DIR
from models.bone_projection import ProjectedConvolution, drawn_norm
from models.predictions import DIROutput


class NetworkMaps(NamedTuple):
    """Of one forward pass."""

    attention: Tensor  # (B, 2, S, S) in [0, 1]: what each hand's first estimate weighs the coarsest map with
    bone_features: list[Tensor]  # of each stage that projects, (B, S, S): norm of the joint features drawn


def forward_with_maps(model: DIR, image: Tensor) -> tuple[DIROutput, NetworkMaps]:
    """``model(image)`` and the maps of that very pass; no hook is left on the model."""
    attention, bone_features = [], []

    def keep_attention(module, args, output: Tensor) -> None:
        attention.append(output)

    def keep_bone_features(module: ProjectedConvolution, args: tuple, kwargs: dict, output: Tensor) -> None:
        bone_features.append(drawn_norm(*module.factors(*args, **kwargs)))

    with ExitStack() as hooks:
        hooks.enter_context(model.initial_regressor.attention.register_forward_hook(keep_attention))
        for stage in model.stages:
            if stage.projection is not None:
                hooks.enter_context(stage.projection.register_forward_hook(keep_bone_features, with_kwargs=True))
        output = model(image)
    return output, NetworkMaps(attention[0], bone_features)
