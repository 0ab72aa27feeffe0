"""Intermediate maps of the network, for pictures in a report."""

from contextlib import ExitStack
from typing import NamedTuple

from torch import Tensor

from models import DIR
from models.predictions import DIROutput


class NetworkMaps(NamedTuple):
    """Intermediate maps of one forward pass."""

    attention: Tensor  # (B, 2, S, S) in [0, 1]: weights of the coarsest map in each hand's first estimate
    bone_features: list[Tensor]  # (B, S, S) for each stage with projection: norm of the drawn joint features


def forward_with_maps(model: DIR, image: Tensor) -> tuple[DIROutput, NetworkMaps]:
    """``model(image)`` and the intermediate maps of that pass."""
    attention: list[Tensor] = []
    bone_features: list[Tensor] = []
    with ExitStack() as watching:
        watching.enter_context(model.initial_regressor.watch_attention(attention.append))
        for stage in model.stages:
            watching.enter_context(stage.watch_bone_features(bone_features.append))
        output = model(image)
    return output, NetworkMaps(attention[0], bone_features)
