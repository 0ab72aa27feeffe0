"""Diagram of an open hand with the mean error at each of its 21 joints."""

from collections.abc import Sequence
from typing import NamedTuple

from utils.hand import JOINT_NAMES, LEFT, SIDES

WIDTH, HEIGHT = 360, 350
# Joints of a right hand seen from the back, fingers up: wrist, then thumb to little finger, base to tip.
# fmt: off
PLACES = (
    (190, 320),
    (134, 284), (94, 250), (60, 216), (30, 180),
    (128, 184), (116, 136), (108, 91), (101, 46),
    (176, 172), (174, 121), (172, 74), (171, 28),
    (222, 180), (230, 133), (236, 88), (241, 44),
    (264, 204), (285, 163), (302, 124), (317, 86),
)
# fmt: on
PALM = (0, 1, 5, 9, 13, 17)
RADII = (14.0, 18.0)  # at the smallest and largest error
RAMP = (
    (255, 243, 196),
    (253, 200, 112),
    (240, 142, 62),
    (204, 74, 34),
    (122, 28, 20),
)  # luminance falls, for greyscale prints
Colour = tuple[int, int, int]  # RGB


class Joint(NamedTuple):
    name: str
    x: int
    y: int
    error: float | None  # mm
    share: float  # of the error within the span, 0 to 1


class HandDiagram(NamedTuple):
    title: str
    side: int
    joints: Sequence[Joint]
    span: tuple[float, float]  # smallest and largest error, mm


def hand_diagram(
    title: str, per_joint: dict[str, dict[str, float | None]], side: int, span: tuple[float, float]
) -> HandDiagram:
    """Diagram of one side of ``metrics['per_joint_mm']``; colour and size map errors over ``span``, in mm."""
    joints = []
    for name, (x, y) in zip(JOINT_NAMES, PLACES):
        error = per_joint[name][SIDES[side]]
        share = min(max(((error or 0.0) - span[0]) / max(span[1] - span[0], 1e-9), 0.0), 1.0)
        joints.append(Joint(spoken(name), WIDTH - x if side == LEFT else x, y, error, share))
    return HandDiagram(title, side, joints, span)


def spoken(joint: str) -> str:
    """Joint name in words: 'index_2' -> 'index 2'."""
    return joint.replace('_', ' ')


def ramp(share: float) -> Colour:
    """Interpolate ``RAMP`` at ``share`` in [0, 1]."""
    low = min(int(share * (len(RAMP) - 1)), len(RAMP) - 2)
    part = share * (len(RAMP) - 1) - low
    red, green, blue = (round(a + part * (b - a)) for a, b in zip(RAMP[low], RAMP[low + 1]))
    return red, green, blue


def ink(colour: Colour) -> str:
    """Black or white, whichever has the higher WCAG contrast (always at least 4.5)."""
    linear = [(c / 255 / 12.92 if c <= 10 else ((c / 255 + 0.055) / 1.055) ** 2.4) for c in colour]
    luminance = sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear))
    return '#000' if (luminance + 0.05) ** 2 > 0.05 * 1.05 else '#fff'
