"""Poses of interacting hands: natural finger poses, relative placements and smooth paths between them.

A placement is told in the person's frame, which shares the axes of the world: x towards the person's left (the right of
a camera in front), y down, z from that camera towards the body. A hand's own rest axes have the fingers along -x (right
hand) or +x (left), the palm along -y and the thumb along +z.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from manopth import HandModel, HandPair, TwoHandLayer
from manopth.rotations import axis_angle_to_matrix, matrix_to_axis_angle
from manopth.standin import FLEXION_LIMITS, SPREAD_LIMITS, TWIST_LIMITS, pose_from_angles
from utils.hand import LEFT, NUM_JOINTS, RIGHT, SIDES
from utils.rasterizer import smooth_normals

# ---------------------------------------------------------------------------------------------------------------------
# Fingers
# ---------------------------------------------------------------------------------------------------------------------

NUM_ANGLES = 25  # 15 flexions (thumb to little, base to tip), 5 spreads, 5 twists: what pose_from_angles takes
STRAIGHT, CURLED = (3, 4, 2), (82, 95, 55)
# Degrees: flexion of thumb, index, middle, ring, little; spread; the thumb's twist.
FINGER_POSES: dict[str, tuple] = {
    'flat': ((2, 2, 5), STRAIGHT, STRAIGHT, STRAIGHT, STRAIGHT, (-12, -3, 0, -3, -4), 0),
    'open': ((0, -2, 0), STRAIGHT, STRAIGHT, STRAIGHT, STRAIGHT, (15, 12, 0, 9, 17), 0),
    'relaxed': ((6, 14, 20), (22, 30, 14), (28, 34, 16), (32, 36, 17), (34, 34, 17), (-2, 0, 0, 0, 2), 10),
    'cup': ((15, 12, 15), (42, 22, 10), (45, 24, 10), (46, 26, 12), (48, 26, 12), (8, -2, 0, -2, -2), 18),
    'grasp': ((18, 18, 30), (52, 45, 25), (55, 48, 26), (57, 48, 26), (58, 45, 26), (15, 2, 0, 2, 4), 22),
    'claw': ((5, 15, 35), (5, 60, 40), (5, 62, 40), (5, 60, 40), (6, 56, 38), (8, 9, 0, 7, 12), 10),
    'fist': ((24, 35, 50), CURLED, CURLED, CURLED, CURLED, (5, 0, 0, 0, 0), 25),
    'thumb up': ((-12, -3, -8), CURLED, CURLED, CURLED, CURLED, (-15, 0, 0, 0, 0), -5),
    'point': ((22, 35, 45), STRAIGHT, CURLED, CURLED, CURLED, (5, 0, 0, 0, 0), 25),
    'victory': ((26, 38, 50), STRAIGHT, STRAIGHT, CURLED, CURLED, (8, 14, -8, 0, 0), 28),
    'three': ((28, 40, 55), STRAIGHT, STRAIGHT, STRAIGHT, (70, 85, 45), (10, 12, 0, 10, 0), 30),
    'gun': ((-12, -3, -5), STRAIGHT, (10, 6, 4), CURLED, CURLED, (-5, 0, 0, 0, 0), 0),
    'pinch': ((20, 24, 34), (54, 46, 26), (38, 40, 20), (34, 38, 20), (30, 34, 18), (20, 0, 0, 0, 4), 28),
    'ring': ((20, 24, 34), (56, 48, 28), (14, 12, 6), (6, 8, 4), (4, 6, 4), (20, 0, 0, 6, 14), 28),
    'horns': ((26, 40, 55), STRAIGHT, CURLED, CURLED, STRAIGHT, (8, 4, 0, 0, 10), 28),
    'interlaced': (
        (-8.7, 40.9, -9.6),
        (18.6, 82.3, 49.5),
        (16.3, 83.6, 49.5),
        (12.0, 82.1, 49.5),
        (11.7, 43.3, 49.5),
        (-3.6, 8.1, -2.2, 10.6, 13.3),
        18.9,
    ),
}
# Of the clasp: degrees between hand and mirror plane; m along the knuckles and between them.
INTERLACED_LEAN, INTERLACED_SHIFT, INTERLACED_DISTANCE = 9.3, 0.0178, 0.0350
OPEN_AIR_POSES = tuple(name for name in FINGER_POSES if name != 'interlaced')
ANGLE_NOISE = np.radians([7.0] * 15 + [3.0] * 5 + [4.0] + [0.0] * 4)
# Share of the hands with continuously sampled fingers; the exponent of how far those leave the named pose.
OWN_FINGERS, OWN_SHARE = 0.4, 0.5
PCA_KEPT, PCA_LIMIT = 10, 1.5  # coefficients of official hands: the first ones, clipped


def finger_angles(name: str) -> np.ndarray:
    """A named pose -> (25,) rad: flexion, spread, twist."""
    *flexion, spread, thumb_twist = FINGER_POSES[name]
    return np.radians(np.concatenate([np.ravel(flexion), spread, [thumb_twist, 0, 0, 0, 0]]))


def sample_finger_angles(
    names: tuple[str, ...], rng: np.random.Generator, *, freedom: float = 1.0, varied: bool = True
) -> np.ndarray:
    """Sample a finger pose: a blend of two named poses with noise on every joint -> (25,) rad.

    ``freedom`` scales the noise. If ``varied``, a share OWN_FINGERS of the hands moves from the named pose towards
    angles that are sampled continuously within the limits of the joints.
    """
    first, second = (finger_angles(names[i]) for i in rng.integers(len(names), size=2))
    angles = first + rng.uniform(0, 0.5) * (second - first) + freedom * rng.normal(size=NUM_ANGLES) * ANGLE_NOISE
    if varied and rng.random() < OWN_FINGERS * freedom:
        angles += rng.uniform(0, 1) ** OWN_SHARE * (_any_finger_angles(rng) - angles)
    flexion = angles[:15].reshape(5, 3)
    # Tendons couple both end joints.
    flexion[1:, 2] = np.minimum(flexion[1:, 2], 0.75 * flexion[1:, 1].clip(0) + 0.1)
    flexion[1:, 1:] = flexion[1:, 1:].clip(0)
    return angles


def _any_finger_angles(rng: np.random.Generator) -> np.ndarray:
    """Continuous finger angles (25,) rad: neighbours bend alike, and so do the joints of one finger."""
    angles = np.zeros(NUM_ANGLES)
    flexion = angles[:15].reshape(5, 3)
    # Each finger has its own curl; what it shares with its neighbours grows where the whole hand opens or closes.
    hand, finger = rng.beta(0.9, 1.2, 2), rng.beta(0.8, 1.1, (5, 2))
    alike = rng.uniform(0.1, 0.9)
    curl = alike * hand + (1 - alike) * finger
    # The ring finger follows the middle and the little one.
    curl[3] = 0.5 * curl[3] + 0.25 * (curl[2] + curl[4])
    low, high = FLEXION_LIMITS[..., 0], FLEXION_LIMITS[..., 1]
    flexion[:] = 0.6 * low + curl[:, [0, 1, 1]] * (0.95 * high - 0.6 * low)
    # Fists cannot spread.
    loose = (1 - curl[:, 0]).clip(0.1, 1)
    low, high = SPREAD_LIMITS[:, 0], SPREAD_LIMITS[:, 1]
    wide = 0.3 * rng.random() + 0.7 * rng.random(5)
    angles[15:20] = loose * (low + wide * (high - low))
    angles[15] = SPREAD_LIMITS[0, 0] + rng.random() * (SPREAD_LIMITS[0, 1] - SPREAD_LIMITS[0, 0])
    angles[20] = 0.5 * (TWIST_LIMITS[0, 0] + TWIST_LIMITS[0, 1]) + rng.uniform(-0.25, 0.25)
    return angles


def pose_vector(angles: np.ndarray, model: HandModel) -> np.ndarray:
    """Finger controls, (T, 25) angles or (T, 45) PCA coefficients -> axis-angle (T, 45), flat hand = 0.

    The stand-in hand has anatomical axes; official files do not say where theirs lie, so there the poses come from the
    mean pose and a limited share of the leading components.
    """
    if angles.shape[-1] == NUM_ANGLES:
        flexion = angles[:, :15].reshape(-1, 5, 3)
        return pose_from_angles(flexion, angles[:, 15:20], side=model.side, twist=angles[:, 20:])
    return model.pose_mean + angles @ model.pose_components


# ---------------------------------------------------------------------------------------------------------------------
# Placements
# ---------------------------------------------------------------------------------------------------------------------

UP, DOWN = np.array([0.0, -1, 0]), np.array([0.0, 1, 0])
FRONT, BODY = np.array([0.0, 0, -1]), np.array([0.0, 0, 1])  # away from the person, towards the person
TO_LEFT, TO_RIGHT = np.array([1.0, 0, 0]), np.array([-1.0, 0, 0])  # the person's
MIRROR = np.array([-1.0, 1, 1])
HALF_PALM = 0.013  # m from the middle of the palm's bones to its skin

PALM = {0: 0.45, 5: 0.15, 9: 0.2, 13: 0.1, 17: 0.1}  # anchors: weights of the 21 joints
KNUCKLES = {5: 0.25, 9: 0.25, 13: 0.25, 17: 0.25}
MIDDLE_OF_FINGERS = {6: 0.25, 10: 0.25, 14: 0.25, 18: 0.25}
FINGERTIPS = {8: 0.25, 12: 0.25, 16: 0.25, 20: 0.25}
FINGER_ROOTS = {5: 0.15, 9: 0.15, 13: 0.15, 17: 0.15, 6: 0.1, 10: 0.1, 14: 0.1, 18: 0.1}
INDEX_TIP, THUMB_TIP, HAND_WRIST = {8: 1.0}, {4: 1.0}, {0: 1.0}


class HandPlacement(NamedTuple):
    """One hand of a pair."""

    fingers: np.ndarray  # (3,) direction in which a straight middle finger points
    palm: np.ndarray  # (3,) direction in which the palm looks
    anchor: dict[int, float]  # weights of the 21 joints: the point that is put at ``position``
    position: np.ndarray  # (3,) m
    poses: tuple[str, ...]  # names in FINGER_POSES that suit


class PairPlacement(NamedTuple):
    """Described for a right hand that approaches the left one; ``mirrored`` swaps the roles."""

    left: HandPlacement
    right: HandPlacement
    retreat: np.ndarray  # (3,) unit: where the right hand goes to get clear of the left
    gap: float  # m of air beyond first contact
    freedom: float = 1.0  # scale of the noise on fingers and on the direction of each hand


def _turn(vector: np.ndarray, axis: np.ndarray, degrees: float) -> np.ndarray:
    cosine, sine = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    return vector * cosine + np.cross(axis, vector) * sine + axis * (axis @ vector) * (1 - cosine)


def _between(first: np.ndarray, second: np.ndarray, share: float) -> np.ndarray:
    mixed = (1 - share) * first + share * second
    return mixed / np.linalg.norm(mixed)


def _gap(rng: np.random.Generator, largest: float) -> float:
    return 0.0 if rng.random() < 0.55 else rng.uniform(0.002, largest)


def pray(rng):
    """Palm on palm, from flat contact to the air of a clap, opened like a book at the wrists or at the tips."""
    fingers, tilt, gap = _between(UP, FRONT, rng.uniform(0, 0.65)), rng.uniform(-16, 16), _gap(rng, 0.05)
    axis = np.cross(fingers, TO_LEFT)
    poses = ('flat', 'flat', 'open', 'relaxed') if gap else ('flat', 'open')
    slide = rng.uniform(-0.012, 0.012) * fingers
    return PairPlacement(
        HandPlacement(_turn(fingers, axis, tilt), _turn(TO_RIGHT, axis, tilt), PALM, 0.8 * HALF_PALM * TO_LEFT, poses),
        HandPlacement(
            _turn(fingers, axis, -tilt), _turn(TO_LEFT, axis, -tilt), PALM, 0.8 * HALF_PALM * TO_RIGHT + slide, poses
        ),
        TO_RIGHT,
        gap,
    )


def steeple(rng):
    """Fingertips touch, palms stay apart."""
    fingers, tilt = _between(UP, FRONT, rng.uniform(0, 0.6)), rng.uniform(18, 36)
    axis = np.cross(fingers, TO_LEFT)
    poses = ('open', 'open', 'relaxed', 'cup')
    return PairPlacement(
        HandPlacement(_turn(fingers, axis, -tilt), _turn(TO_RIGHT, axis, -tilt), FINGERTIPS, 0.003 * TO_LEFT, poses),
        HandPlacement(_turn(fingers, axis, tilt), _turn(TO_LEFT, axis, tilt), FINGERTIPS, 0.003 * TO_RIGHT, poses),
        TO_RIGHT,
        _gap(rng, 0.02),
    )


def clasp(rng):
    """Palms together, the fingers of each hand round the edge of the other."""
    fingers = _between(UP, FRONT, rng.uniform(0.2, 0.8))
    cross = rng.uniform(25, 50)
    return PairPlacement(
        HandPlacement(_turn(fingers, TO_LEFT, cross), TO_RIGHT, PALM, HALF_PALM * TO_LEFT, ('grasp', 'cup')),
        HandPlacement(_turn(fingers, TO_LEFT, -cross), TO_LEFT, PALM, HALF_PALM * TO_RIGHT, ('grasp', 'cup')),
        TO_RIGHT,
        _gap(rng, 0.02),
    )


def crossed_fingers(rng):
    """Spread fingers meet between each other like two combs, crossing at an angle."""
    fingers, lean = _between(UP, FRONT, rng.uniform(0.1, 0.7)), rng.uniform(22, 42)
    axis = np.cross(fingers, TO_LEFT)
    shift = 0.011 * axis
    return PairPlacement(
        HandPlacement(
            _turn(fingers, axis, -lean), _turn(TO_RIGHT, axis, -lean), MIDDLE_OF_FINGERS, -shift / 2, ('open',)
        ),
        HandPlacement(_turn(fingers, axis, lean), _turn(TO_LEFT, axis, lean), MIDDLE_OF_FINGERS, shift / 2, ('open',)),
        TO_RIGHT,
        0.0,
    )


def hold_fist(rng):
    """One palm holds the knuckles of the other hand's fist."""
    fist = _between(TO_LEFT, _between(FRONT, UP, 0.4), rng.uniform(0.1, 0.5))
    palm = _between(BODY, DOWN, rng.uniform(0, 1))
    palm = palm - (palm @ fist) * fist
    wrap = _between(UP, FRONT, rng.uniform(0.2, 1.0))
    wrap = wrap - (wrap @ fist) * fist
    return PairPlacement(
        HandPlacement(wrap, -fist, PALM, 0.030 * fist, ('cup', 'grasp', 'relaxed')),
        HandPlacement(fist, palm, KNUCKLES, 0.010 * fist, ('fist',)),
        -fist,
        _gap(rng, 0.03),
    )


def hold_wrist(rng):
    """One hand around the wrist of the other."""
    fingers = _between(UP, _between(FRONT, TO_LEFT, rng.uniform(0, 0.6)), rng.uniform(0.1, 0.6))
    side = _between(TO_LEFT, FRONT, rng.uniform(0, 0.6))
    side = side - (side @ fingers) * fingers
    side /= np.linalg.norm(side)
    back = -side if rng.random() < 0.5 else side
    across = _turn(np.cross(fingers, side), side, rng.uniform(-30, 30))
    if across @ (UP + FRONT) < 0:
        across = -across
    return PairPlacement(
        HandPlacement(across, -side, PALM, 0.034 * side, ('grasp', 'cup')),
        HandPlacement(fingers, back, HAND_WRIST, 0.01 * fingers, ('relaxed', 'open', 'fist', 'point', 'thumb up')),
        -side,
        _gap(rng, 0.02),
    )


def side_by_side(rng):
    """Edge to edge like a book, palms to the person or away."""
    fingers = _between(UP, FRONT, rng.uniform(-0.1, 0.6))
    look = BODY if rng.random() < 0.6 else FRONT
    look = look - (look @ fingers) * fingers
    lean, fold = rng.uniform(-15, 20), rng.uniform(-5, 35)
    axis = np.cross(fingers, TO_LEFT)
    poses = ('flat', 'open', 'relaxed', 'cup', 'victory', 'three')
    sign = np.sign(look @ BODY)
    left = [_turn(_turn(v, axis, lean), fingers, sign * fold) for v in (fingers, look)]
    right = [_turn(_turn(v, axis, -lean), fingers, -sign * fold) for v in (fingers, look)]
    return PairPlacement(
        HandPlacement(*left, PALM, 0.034 * TO_LEFT, poses),
        HandPlacement(*right, PALM, 0.034 * TO_RIGHT, poses),
        TO_RIGHT,
        _gap(rng, 0.05),
    )


def point_to_palm(rng):
    """The index of one hand points at the palm of the other."""
    palm = _between(TO_RIGHT, _between(UP, FRONT, rng.random()), rng.uniform(0.1, 0.5))
    fingers = _between(UP, FRONT, rng.uniform(0.1, 0.9))
    fingers = fingers - (fingers @ palm) * palm
    pointing = _turn(-palm, BODY, rng.uniform(-20, 20))
    look = _between(DOWN, BODY, rng.uniform(0, 0.8))
    return PairPlacement(
        HandPlacement(fingers, palm, PALM, np.zeros(3), ('flat', 'open', 'relaxed', 'cup')),
        HandPlacement(
            pointing,
            look - (look @ pointing) * pointing,
            INDEX_TIP,
            (HALF_PALM - 0.002) * palm,
            ('point', 'point', 'gun'),
        ),
        palm,
        _gap(rng, 0.04),
    )


def stacked(rng):
    """One palm over the back, or the palm, of the other hand."""
    spread = rng.uniform(0.25, 0.75)
    level = _turn(UP, TO_LEFT, rng.uniform(-25, 40))
    left, right = _between(FRONT, TO_RIGHT, spread), _between(FRONT, TO_LEFT, spread)
    left, right = (v - (v @ level) * level for v in (left, right))
    below = -level if rng.random() < 0.6 else level
    return PairPlacement(
        HandPlacement(left, below, PALM, -HALF_PALM * level, ('flat', 'relaxed', 'open')),
        HandPlacement(right, -level, PALM, HALF_PALM * level, ('flat', 'relaxed', 'cup', 'open')),
        level,
        _gap(rng, 0.04),
    )


def fists_meet(rng):
    """Knuckles on knuckles."""
    look = _between(DOWN, BODY, rng.random())
    lift = rng.uniform(0, 0.35)
    left, right = _between(TO_RIGHT, UP + FRONT, lift), _between(TO_LEFT, UP + FRONT, lift)
    poses = ('fist', 'fist', 'thumb up')
    return PairPlacement(
        HandPlacement(left, look - (look @ left) * left, KNUCKLES, 0.008 * TO_LEFT, poses),
        HandPlacement(right, look - (look @ right) * right, KNUCKLES, 0.008 * TO_RIGHT, poses),
        TO_RIGHT,
        _gap(rng, 0.03),
    )


def fist_on_palm(rng):
    """The side of one fist on the other, open hand."""
    palm = _turn(UP, TO_LEFT, rng.uniform(-10, 40))
    left, right = _between(FRONT, TO_RIGHT, rng.uniform(0.2, 0.7)), _between(FRONT, TO_LEFT, rng.uniform(0.2, 0.7))
    left, right = (v - (v @ palm) * palm for v in (left, right))
    look = np.cross(palm, right)
    return PairPlacement(
        HandPlacement(left, palm, PALM, np.zeros(3), ('flat', 'relaxed', 'cup')),
        HandPlacement(right, look, KNUCKLES, 0.050 * palm, ('fist', 'fist', 'thumb up', 'point')),
        palm,
        _gap(rng, 0.03),
    )


def tips_meet(rng):
    """Two index fingers, or two thumbs, touch at their tips."""
    lift, anchor = rng.uniform(0.1, 0.7), INDEX_TIP
    look = _between(DOWN, BODY, rng.random())
    left, right = _between(TO_RIGHT, _between(UP, FRONT, 0.4), lift), _between(TO_LEFT, _between(UP, FRONT, 0.4), lift)
    poses = (('point', 'gun'), ('pinch', 'ring'), ('relaxed', 'open'))[rng.integers(3)]
    return PairPlacement(
        HandPlacement(left, look - (look @ left) * left, anchor, 0.002 * TO_LEFT, poses),
        HandPlacement(right, look - (look @ right) * right, anchor, 0.002 * TO_RIGHT, poses),
        TO_RIGHT,
        _gap(rng, 0.02),
    )


def gesture(rng):
    """Both hands gesture, slightly apart."""
    hands, distance = [], rng.uniform(0.04, 0.065)
    for inward, outward in ((TO_RIGHT, TO_LEFT), (TO_LEFT, TO_RIGHT)):
        fingers = _between(_between(UP, FRONT, rng.uniform(0, 0.7)), inward, rng.uniform(-0.1, 0.4))
        palm = _between(_between(inward, FRONT, rng.uniform(0, 1.0)), BODY, 0.9 if rng.random() < 0.25 else 0.0)
        place = distance * outward + rng.uniform(-0.02, 0.02, 3)
        hands.append(HandPlacement(fingers, palm - (palm @ fingers) * fingers, PALM, place, OPEN_AIR_POSES))
    return PairPlacement(*hands, TO_RIGHT, 0.0)


def interlocked(rng):
    """Fingers of both hands interlaced, bent over the back of the other hand.

    The hands mirror each other, shifted along their knuckles by half the distance of two fingers. Angles and distances
    are those of INTERLACED, the result of a search for the tightest grip without penetration.
    """
    fingers = _between(UP, _between(FRONT, TO_RIGHT, rng.uniform(-0.15, 0.15)), rng.uniform(0.2, 0.7))
    axis = np.cross(fingers, TO_LEFT)
    axis /= np.linalg.norm(axis)
    out = np.cross(axis, fingers)
    lean, shift, distance = INTERLACED_LEAN, INTERLACED_SHIFT * axis, INTERLACED_DISTANCE * out
    return PairPlacement(
        HandPlacement(
            _turn(fingers, axis, -lean), _turn(-out, axis, -lean), KNUCKLES, (distance - shift) / 2, ('interlaced',)
        ),
        HandPlacement(
            _turn(fingers, axis, lean), _turn(out, axis, lean), KNUCKLES, (shift - distance) / 2, ('interlaced',)
        ),
        -out,
        0.0,
        freedom=0.08,
    )


def wrapped(rng):
    """One open hand laid round the closed other: palm on its back, fingers over its knuckles or its edge."""
    level = _between(_between(UP, BODY, rng.uniform(0, 0.8)), TO_LEFT, rng.uniform(0, 0.5))
    inner = _between(FRONT, TO_RIGHT, rng.uniform(0.2, 0.7))
    inner = inner - (inner @ level) * level
    inner /= np.linalg.norm(inner)
    outer = _turn(inner, level, rng.choice([-1, 1]) * rng.uniform(30, 90))
    return PairPlacement(
        HandPlacement(inner, -level, KNUCKLES, -0.012 * level, ('fist', 'fist', 'grasp', 'cup')),
        HandPlacement(outer, -level, PALM, 0.018 * level, ('cup', 'grasp', 'cup', 'relaxed')),
        level,
        _gap(rng, 0.02),
        freedom=0.6,
    )


def behind(rng):
    """One hand in front of the other without contact, so that it hides part of it from a frontal camera."""
    hands, depth = [], rng.uniform(0.05, 0.16)
    for number in range(2):
        fingers = _between(_between(UP, FRONT, rng.uniform(0, 0.7)), (TO_RIGHT, TO_LEFT)[number], rng.uniform(0, 0.6))
        palm = _between(FRONT if rng.random() < 0.5 else BODY, (TO_RIGHT, TO_LEFT)[number], rng.uniform(0, 0.7))
        place = (BODY, FRONT)[number] * depth / 2 + (TO_LEFT, TO_RIGHT)[number] * rng.uniform(-0.02, 0.05)
        place = place + rng.uniform(-0.03, 0.03, 3)
        hands.append(HandPlacement(fingers, palm - (palm @ fingers) * fingers, PALM, place, OPEN_AIR_POSES))
    return PairPlacement(*hands, FRONT, 0.0)


def apart(rng):
    """Both hands gesture, far apart."""
    pair = gesture(rng)
    away = rng.uniform(0.02, 0.09)
    left = pair.left._replace(position=pair.left.position + away * TO_LEFT + rng.uniform(-0.04, 0.04, 3))
    right = pair.right._replace(position=pair.right.position + away * TO_RIGHT + rng.uniform(-0.04, 0.04, 3))
    return pair._replace(left=left, right=right)


# Names as the folders of sequences carry them, with how often each is drawn.
PLACEMENTS: dict[str, tuple[Callable[[np.random.Generator], PairPlacement], float]] = {
    'pray': (pray, 1.6),
    'steeple': (steeple, 1.0),
    'clasp': (clasp, 1.0),
    'crossedfingers': (crossed_fingers, 0.7),
    'holdfist': (hold_fist, 1.0),
    'holdwrist': (hold_wrist, 0.8),
    'sidebyside': (side_by_side, 1.3),
    'pointtopalm': (point_to_palm, 1.0),
    'stacked': (stacked, 1.2),
    'fistsmeet': (fists_meet, 1.0),
    'fistonpalm': (fist_on_palm, 0.9),
    'tipsmeet': (tips_meet, 0.8),
    'gesture': (gesture, 1.6),
    'interlocked': (interlocked, 2.2),
    'behind': (behind, 0.9),
    'apart': (apart, 0.9),
    'wrapped': (wrapped, 1.0),
}
GRIPS = ('interlocked',)  # hands that hook into each other
GRIP_OPENINGS, GRIP_RETREAT = (0.2, 0.4, 0.6, 0.8), 0.014  # shares of flexion; m
VARIED_PLACEMENTS = ('interlocked', 'behind', 'apart', 'wrapped')  # only where poses are ``varied``


def sample_placement_name(rng: np.random.Generator, *, varied: bool = True) -> str:
    """Draw the name of a placement."""
    names = [name for name in PLACEMENTS if varied or name not in VARIED_PLACEMENTS]
    weights = np.array([PLACEMENTS[name][1] for name in names])
    return names[rng.choice(len(names), p=weights / weights.sum())]


# ---------------------------------------------------------------------------------------------------------------------
# Paths
# ---------------------------------------------------------------------------------------------------------------------

STEADY = 0.1  # s: how slowly the distance of the hands changes in a path of more than RATE time steps per second
HAND_TILT, PAIR_TURN = 8.0, (22.0, 30.0, 18.0)  # degrees, standard deviations: each hand; the pair about x, y, z


ELBOWS = np.array([[0.30, 0.13, 0.20], [-0.30, 0.13, 0.20]])  # m from the hands, person's frame: left, right
EASY_BEND, TRIES = np.radians(35), 4  # how far a wrist bends without effort; instances from which the easiest is taken


class KeyPose(NamedTuple):
    """A pair of hands in quantities that can be interpolated; index 0 is the left hand."""

    rotation: np.ndarray  # (2, 3, 3) rest axes -> world
    fingers: np.ndarray  # (2, 25) rad, or (2, 45) PCA coefficients
    anchor: np.ndarray  # (2, 21) weights
    position: np.ndarray  # (2, 3) m
    retreat: np.ndarray  # (3,)
    gap: float


class HandPath(NamedTuple):
    """T time steps of both hands, without intersection, around the world's origin."""

    root: Tensor  # (T, 2, 3) axis-angle about the wrist
    pose: Tensor  # (T, 2, 45) axis-angle, flat hand = 0
    vertices: Tensor  # (T, 2, 778, 3) m
    joints: Tensor  # (T, 2, 21, 3) m
    penetration: Tensor  # (T,) m, depth that is left


def key_pose(name: str, mirrored: bool, rng: np.random.Generator, *, anatomical: bool, varied: bool = True) -> KeyPose:
    """One random instance of a placement; ``mirrored`` swaps the roles of the hands."""
    pair = PLACEMENTS[name][0](rng)
    # Between key poses that are turned far, interpolation would bring tightly placed hands too near.
    turn = _rotation(rng.normal(size=3) * PAIR_TURN * max(pair.freedom, 0.4))
    rotation, fingers, anchor, position = [], [], [], []
    for side in (LEFT, RIGHT):
        hand = pair.right if (side == RIGHT) != mirrored else pair.left
        flip = MIRROR if mirrored else np.ones(3)
        rotation.append(
            turn
            @ _rotation(pair.freedom * rng.normal(size=3) * HAND_TILT)
            @ hand_axes(hand.fingers * flip, hand.palm * flip, SIDES[side])
        )
        if anatomical:
            fingers.append(sample_finger_angles(hand.poses, rng, freedom=pair.freedom, varied=varied))
        else:
            fingers.append(np.zeros(45))
            fingers[-1][:PCA_KEPT] = (0.8 * rng.normal(size=PCA_KEPT)).clip(-PCA_LIMIT, PCA_LIMIT)
        anchor.append([hand.anchor.get(joint, 0.0) for joint in range(NUM_JOINTS)])
        position.append(turn @ (hand.position * flip))
    retreat = pair.retreat * (-MIRROR if mirrored else 1)  # mirrored, it is the left hand that would retreat
    return KeyPose(
        np.stack(rotation), np.stack(fingers), np.array(anchor), np.stack(position), turn @ retreat, pair.gap
    )


def easy_key_pose(
    name: str, mirrored: bool, rng: np.random.Generator, *, anatomical: bool, varied: bool = True
) -> KeyPose:
    """Of TRIES instances, the one that bends the wrists least for elbows at ELBOWS."""
    tries = [key_pose(name, mirrored, rng, anatomical=anatomical, varied=varied) for _ in range(TRIES)]
    return min(tries, key=_wrist_effort)


def _wrist_effort(key: KeyPose) -> float:
    forearm = key.position - ELBOWS
    forearm /= np.linalg.norm(forearm, axis=1, keepdims=True)
    fingers = key.rotation[:, :, 0] * np.array([[1.0], [-1.0]])  # rest axes: left fingers along +x, right along -x
    bend = np.arccos((fingers * forearm).sum(1).clip(-1, 1))
    return float(np.square((bend - EASY_BEND).clip(0)).sum())


def hand_axes(fingers: np.ndarray, palm: np.ndarray, side: str) -> np.ndarray:
    """Directions (3,) of fingers and palm -> rotation (3, 3) from the hand's rest axes to them."""
    x = fingers / np.linalg.norm(fingers) * (1 if side == 'left' else -1)
    y = -(palm - (palm @ x) * x)
    y /= np.linalg.norm(y)
    return np.stack([x, y, np.cross(x, y)], 1)


def _rotation(degrees: np.ndarray) -> np.ndarray:
    return axis_angle_to_matrix(torch.from_numpy(np.radians(degrees))).numpy()


RATE = 5.0  # time steps per second of the real data set
LATEST_START = 0.3  # of the way from the first key pose to the second


def ease(share: np.ndarray) -> np.ndarray:
    """Share of the way in [0, 1] -> the same with zero velocity at both ends."""
    return share * share * (3 - 2 * share)


def steadied(values: Tensor, radius: int) -> Tensor:
    """A smooth curve (T,) that is nowhere below ``values`` (T,): running maximum, then two moving averages."""
    padded = F.pad(values[None, None], (2 * radius, 2 * radius), mode='replicate')
    highest = F.max_pool1d(padded, 4 * radius + 1, stride=1, padding=2 * radius)
    for _ in range(2):
        highest = F.avg_pool1d(highest, 2 * radius + 1, stride=1)
    return highest[0, 0]


def sample_path(
    steps: int,
    name: str,
    rng: np.random.Generator,
    models: HandPair,
    betas: Tensor,
    *,
    varied: bool = True,
    rate: float = RATE,
) -> HandPath:
    """Sample a smooth path of ``steps`` time steps through random instances of one placement, hands pushed apart.

    ``betas`` (2, 10) is the shape of both hands; ``varied`` adds continuously sampled fingers to the named poses;
    ``rate`` is in time steps per second. Above RATE the distance of the hands is smooth over time too, except in GRIPS.
    """
    anatomical, mirrored = models.left.name != 'mano', bool(rng.random() < 0.5)
    every = rng.uniform(1.3, 2.3) * rate / RATE  # time steps from key pose to key pose: about a third of a second
    count = int(max(steps / every, (steps - 1) / every + LATEST_START)) + 2
    keys = [easy_key_pose(name, mirrored, rng, anatomical=anatomical, varied=varied) for _ in range(count)]
    at = np.arange(steps) / every + rng.uniform(0, LATEST_START)
    first = at.astype(int)
    share = ease(at - first)

    def along(values) -> np.ndarray:
        values = np.array(values)
        weight = share.reshape(-1, *[1] * (values.ndim - 1))
        return (1 - weight) * values[first] + weight * values[first + 1]

    turns = torch.from_numpy(np.array([key.rotation for key in keys]))
    change = matrix_to_axis_angle(turns[first].transpose(-1, -2) @ turns[first + 1])
    root = matrix_to_axis_angle(turns[first] @ axis_angle_to_matrix(change * torch.from_numpy(share)[:, None, None]))
    fingers = along([key.fingers for key in keys])
    layer = TwoHandLayer(models)
    weights = torch.from_numpy(along([key.anchor for key in keys])).float()
    target = torch.from_numpy(along([key.position for key in keys])).float()
    retreat = torch.from_numpy(along([key.retreat for key in keys])).float()
    retreat = retreat / retreat.norm(dim=1, keepdim=True)
    gap = torch.from_numpy(along([key.gap for key in keys])).float()

    def pose_apart(rows: Tensor, opening: float, most: float) -> HandPath:
        """The time steps ``rows`` with opened fingers, the hands pushed ``most`` m apart at most."""
        opened = _open_fingers(fingers[rows.numpy()], opening)
        poses = np.stack([pose_vector(opened[:, side], models[side]) for side in (LEFT, RIGHT)], 1)
        turn, pose = root[rows].float(), torch.from_numpy(poses).float()
        hands = layer(turn, pose, betas.expand(len(rows), 2, 10), use_pca=False)
        shift = (target[rows] - (weights[rows, ..., None] * hands.joints).sum(2))[:, :, None]
        vertices, joints = hands.vertices + shift, hands.joints + shift
        away, penetration = push_apart(vertices, layer.faces, retreat[rows], most=most)
        if rate > RATE and name not in GRIPS:
            away = steadied(away, round(rate * STEADY))
        apart = torch.stack([-retreat[rows], retreat[rows]], 1) * ((away + gap[rows]) / 2)[:, None, None]
        return HandPath(turn, pose, vertices + apart[:, :, None], joints + apart[:, :, None], penetration)

    every_step = torch.arange(steps)
    if not (anatomical and name in GRIPS):
        return pose_apart(every_step, 0.0, torch.inf)
    # Pulling hooked fingers apart drives them into the other hand: they open as far as contact needs, and no further.
    path, rows = pose_apart(every_step, 0.0, GRIP_RETREAT), every_step
    for opening in GRIP_OPENINGS:
        rows = every_step[path.penetration > TOLERATED]
        if len(rows):
            most = torch.inf if opening == GRIP_OPENINGS[-1] else GRIP_RETREAT
            opened = pose_apart(rows, opening, most)
            path = HandPath(*(whole.index_copy(0, rows, part) for whole, part in zip(path, opened)))
    return path


def _open_fingers(angles: np.ndarray, opening: float) -> np.ndarray:
    """Straighten the outer joints of the fingers by a share ``opening``; (..., 25) rad, or PCA unchanged at 0."""
    if opening == 0:
        return angles
    scale = np.ones(NUM_ANGLES)
    scale[:15].reshape(5, 3)[:, 1:] = 1 - opening
    return angles * scale


# ---------------------------------------------------------------------------------------------------------------------
# Contact
# ---------------------------------------------------------------------------------------------------------------------

TOLERATED = 0.002  # m: soft skin gives way by about this much
PUSHES, LEAST_PUSH, LARGEST_PUSH = 60, 0.0015, 0.012  # m
NEIGHBOURHOOD = 0.02  # m: a vertex inside a hand has skin of that hand at least this near


def penetration_depth(vertices: Tensor, normals: Tensor) -> float:
    """Penetration depth of two hands, m; 0 if they do not intersect. vertices (2, V, 3) m and their unit normals.

    A vertex is inside the other hand where it lies behind the tangent plane of the other's nearest vertex; its depth is
    its distance from that plane. Cheap, and exact enough on a surface of 5 mm triangles.
    """
    low, high = vertices.amin(1), vertices.amax(1)
    low, high = low.amax(0), high.amin(0)  # the box that both hands' boxes share
    inside = [((hand > low) & (hand < high)).all(1) for hand in vertices]
    near = [((hand > low - NEIGHBOURHOOD) & (hand < high + NEIGHBOURHOOD)).all(1) for hand in vertices]
    deepest = 0.0
    for own, other in ((LEFT, RIGHT), (RIGHT, LEFT)):
        points, skin = vertices[own][inside[own]], vertices[other][near[other]]
        if len(points) and len(skin):
            nearest = torch.cdist(points, skin).argmin(1)
            depth = ((skin[nearest] - points) * normals[other][near[other]][nearest]).sum(1)
            deepest = max(deepest, float(depth.amax()))
    return deepest


def push_apart(vertices: Tensor, faces: Tensor, retreat: Tensor, *, most: float = torch.inf) -> tuple[Tensor, Tensor]:
    """Distance (T,) m that the right hand must retreat along ``retreat`` (T, 3), and the remaining depth (T,).

    vertices (T, 2, V, 3), faces (2, F, 3). Each push is as long as the current depth, so the hands stop at contact.
    They are pushed ``most`` m at most, which may leave a depth above TOLERATED.
    """
    normals = torch.stack([smooth_normals(vertices[:, side], faces[side]) for side in (LEFT, RIGHT)], 1)
    away, depth = vertices.new_zeros(len(vertices)), vertices.new_zeros(len(vertices))
    for step, hands in enumerate(vertices):
        for _ in range(PUSHES):
            moved = torch.stack([hands[LEFT], hands[RIGHT] + away[step] * retreat[step]])
            depth[step] = penetration_depth(moved, normals[step])
            if depth[step] <= TOLERATED or away[step] >= most:
                break
            away[step] += (1.25 * depth[step]).clamp(LEAST_PUSH, LARGEST_PUSH)
    return away, depth
