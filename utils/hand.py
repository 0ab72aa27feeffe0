"""Index tables of the hand: the one home of every joint order, bone list and vertex number.

The project's 21 joints: wrist 0; thumb 1-4, index 5-8, middle 9-12, ring 13-16, little 17-20, each finger from its base
to its tip. The hand axis of every tensor is 0 = left, 1 = right.
"""

LEFT, RIGHT = 0, 1
SIDES = ('left', 'right')

NUM_JOINTS = 21
NUM_VERTICES = 778
NUM_FACES = 1538
HAND_SCALE = 0.15  # m: the unit of everything in 3D that a layer or a loss sees

WRIST, MIDDLE_MCP = 0, 9
FINGERS = ('thumb', 'index', 'middle', 'ring', 'little')
JOINT_NAMES = ('wrist', *(f'{finger}_{part}' for finger in FINGERS for part in (1, 2, 3, 'tip')))

# (parent, child) of the 20 bones, finger by finger from the wrist outwards.
BONES = tuple(
    (0 if part == 0 else 4 * finger + part, 4 * finger + part + 1) for finger in range(5) for part in range(4)
)
LENGTH_BONE = (WRIST, MIDDLE_MCP)  # the bone that the field's scale alignment measures

# MANO's kinematic chain: wrist, then index, middle, little, ring, thumb with three joints each.
CHAIN_PARENTS = (-1, 0, 1, 2, 0, 4, 5, 0, 7, 8, 0, 10, 11, 0, 13, 14)
NUM_CHAIN_JOINTS = 16
TIP_VERTICES = (745, 317, 444, 556, 673)  # thumb, index, middle, ring, little
PUBLISHED_LEFT_MIDDLE_TIP = 445  # the published network's own left hand layer takes this neighbour instead
# cat[16 chain joints, 5 tips] -> the project's 21 joints.
MANO_TO_JOINTS = (0, 13, 14, 15, 16, 1, 2, 3, 17, 4, 5, 6, 18, 10, 11, 12, 19, 7, 8, 9, 20)

# InterHand2.6M lists each finger tip -> base, thumb first, wrist last; 0-20 is the right hand, 21-41 the left.
INTERHAND_TO_JOINTS = (20, 3, 2, 1, 0, 7, 6, 5, 4, 11, 10, 9, 8, 15, 14, 13, 12, 19, 18, 17, 16)

MASK_THRESHOLD = 50  # of 255: prepared masks are JPEGs, a hand is where its channel exceeds this
