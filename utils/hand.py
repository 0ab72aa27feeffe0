"""Index tables of the hand: joint orders, bones and the constants that the network and the data share.

The tables of the hand model itself live in ``manopth.tables`` and are re-exported here.
"""

from manopth.tables import (
    CHAIN_PARENTS,
    FINGERS,
    LEFT,
    MANO_TO_JOINTS,
    NUM_CHAIN_JOINTS,
    NUM_FACES,
    NUM_JOINTS,
    NUM_VERTICES,
    PUBLISHED_LEFT_MIDDLE_TIP,
    RIGHT,
    SIDES,
    TIP_VERTICES,
)

__all__ = [
    'BONES',
    'CHAIN_PARENTS',
    'FINGERS',
    'HAND_SCALE',
    'INTERHAND_TO_JOINTS',
    'JOINT_NAMES',
    'LEFT',
    'LENGTH_BONE',
    'MANO_TO_JOINTS',
    'MASK_THRESHOLD',
    'MIDDLE_MCP',
    'NUM_CHAIN_JOINTS',
    'NUM_FACES',
    'NUM_JOINTS',
    'NUM_VERTICES',
    'PUBLISHED_LEFT_MIDDLE_TIP',
    'RIGHT',
    'SIDES',
    'TIP_VERTICES',
    'WRIST',
]

HAND_SCALE = 0.15  # m: the unit of every 3D coordinate that a layer or a loss sees

WRIST, MIDDLE_MCP = 0, 9
JOINT_NAMES = ('wrist', *(f'{finger}_{part}' for finger in FINGERS for part in (1, 2, 3, 'tip')))

# (parent, child) of the 20 bones, finger by finger from the wrist outwards.
BONES = tuple(
    (0 if part == 0 else 4 * finger + part, 4 * finger + part + 1) for finger in range(5) for part in range(4)
)
LENGTH_BONE = (WRIST, MIDDLE_MCP)  # the bone that the field's scale alignment measures

# InterHand2.6M lists each finger tip -> base, thumb first, wrist last; 0-20 is the right hand, 21-41 the left.
INTERHAND_TO_JOINTS = (20, 3, 2, 1, 0, 7, 6, 5, 4, 11, 10, 9, 8, 15, 14, 13, 12, 19, 18, 17, 16)

MASK_THRESHOLD = 50  # of 255: prepared masks are JPEGs; a hand is where its channel exceeds this
