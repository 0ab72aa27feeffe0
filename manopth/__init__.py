"""MANO hand layer: both hands at once, differentiable, reading the official files or a stand-in hand made by code."""

from manopth.assets import HandModel, load_hand_models
from manopth.mano_layer import Hands, ManoLayer, TwoHandLayer

__all__ = ['HandModel', 'Hands', 'ManoLayer', 'TwoHandLayer', 'load_hand_models']
