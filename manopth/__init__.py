"""MANO hand layers for PyTorch: differentiable, without chumpy, for the official files or a licence-free stand-in hand.

``ManoLayer`` poses one hand in millimetres and replaces the published layer; ``TwoHandLayer`` poses both hands in one
call, in metres.
"""

from manopth.assets import HandModel, HandPair, load_hand_pair
from manopth.errors import ManoError
from manopth.manolayer import ManoLayer
from manopth.two_hand_layer import Hands, TwoHandLayer

__all__ = ['HandModel', 'HandPair', 'Hands', 'ManoError', 'ManoLayer', 'TwoHandLayer', 'load_hand_pair']
