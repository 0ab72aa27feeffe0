"""MANO hand layer: both hands at once, differentiable, reading the official files or a stand-in hand made by code."""

from manopth.assets import HandModel, HandPair, load_hand_pair
from manopth.errors import ManoError
from manopth.mano_layer import Hands, ManoLayer, TwoHandLayer

__all__ = ['HandModel', 'HandPair', 'Hands', 'ManoError', 'ManoLayer', 'TwoHandLayer', 'load_hand_pair']
