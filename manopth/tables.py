"""Index tables of the MANO hand: sizes, kinematic chain, fingertip vertices and the order of the 21 joints.

The 21 joints: wrist 0; thumb 1-4, index 5-8, middle 9-12, ring 13-16, little 17-20, each finger from base to tip. The
hand axis of every two-hand tensor is 0 = left, 1 = right.
"""

LEFT, RIGHT = 0, 1
SIDES = ('left', 'right')

NUM_JOINTS = 21
NUM_VERTICES = 778
NUM_FACES = 1538
NUM_CHAIN_JOINTS = 16

FINGERS = ('thumb', 'index', 'middle', 'ring', 'little')

# MANO's kinematic chain: wrist, then index, middle, little, ring, thumb with three joints each.
CHAIN_PARENTS = (-1, 0, 1, 2, 0, 4, 5, 0, 7, 8, 0, 10, 11, 0, 13, 14)
TIP_VERTICES = (745, 317, 444, 556, 673)  # thumb, index, middle, ring, little
PUBLISHED_LEFT_MIDDLE_TIP = 445  # the published layers take this neighbour of 444 on the left hand
# cat[16 chain joints, 5 tips] -> the 21 joints.
MANO_TO_JOINTS = (0, 13, 14, 15, 16, 1, 2, 3, 17, 4, 5, 6, 18, 10, 11, 12, 19, 7, 8, 9, 20)
