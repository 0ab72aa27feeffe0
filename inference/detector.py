"""Locate the hands in an image with MediaPipe's hand landmarker (optional dependency: requirements-demo.txt)."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np

from inference.reconstruct import Box
from utils.config import CHECKOUT
from utils.errors import UserError, printable

MODEL = str(CHECKOUT / 'misc/hand_landmarker.task')
HOW_TO_GET = 'Assemble it with apps/assemble_detector.py (misc/README.md), or pass another with --detector.'
MARGIN = 0.1  # of the box's longer side, on each side: landmarks lie inside the outline of a hand
SMALLEST = 16  # pixels: side of a box; smaller ones are refused when they are cropped
AROUND_ONE = 2.0  # side of the box that both hands are looked for in, in sides of the one found
TILE = 2, 3  # share of an image's sides that each of four overlapping tiles has


class Detection(NamedTuple):
    """The hands that a detector finds in an image."""

    hands: int  # 0, 1 or 2
    box: Box | None  # around two hands, or twice as large as the one found; None without hands


class HandDetector:
    """Callable: image (H, W, 3) uint8 BGR -> Detection.

    Where it finds no hand in the image, it searches four overlapping tiles of it, in which hands are larger. Raises
    UserError if MediaPipe or its model file is missing or unusable.
    """

    found: Counter[int]  # images by the number of hands found, since the counter was last cleared

    def __init__(self, model: str | Path = MODEL):
        try:
            import mediapipe
            from mediapipe.tasks.python import BaseOptions, vision
        except ModuleNotFoundError:
            raise UserError(
                '--detect needs MediaPipe, which cannot be imported. Run pip install -r requirements-demo.txt, or '
                'give the box of the hands with --box or --boxes.'
            ) from None
        except (ImportError, OSError) as error:
            raise UserError(missing_library(error)) from None
        if not Path(model).is_file():
            raise UserError(f'The hand detector {printable(model)} does not exist. {HOW_TO_GET}')
        self.mediapipe, self.found = mediapipe, Counter()
        options = vision.HandLandmarkerOptions(
            base_options=BaseOptions(model_asset_path=str(model)), num_hands=2, min_hand_detection_confidence=0.3
        )
        try:
            self.landmarker = vision.HandLandmarker.create_from_options(options)
        except OSError as error:  # MediaPipe loads its libraries here
            raise UserError(missing_library(error)) from None
        except (RuntimeError, ValueError) as error:
            reason = str(error).splitlines()[0][:120]
            raise UserError(
                f'MediaPipe cannot load the hand detector {printable(model)} ({reason}). {HOW_TO_GET}'
            ) from None

    def __call__(self, image: np.ndarray) -> Detection:
        hands = self.hands(image)
        self.found[len(hands)] += 1
        return detection(hands)

    def hands(self, image: np.ndarray) -> list[np.ndarray]:
        """Landmarks of the hands, at most two: those in the image, or else in the tile that shows the most."""
        hands = self.landmarks(image)
        if hands:
            return hands
        in_tiles = []
        for left, top, width, height in tiles(*image.shape[1::-1]):
            found = self.landmarks(image[top : top + height, left : left + width])
            in_tiles.append([marks + (left, top) for marks in found])
        return max(in_tiles, key=len)

    def landmarks(self, image: np.ndarray) -> list[np.ndarray]:
        """(21, 2) pixels of each hand found, at most two. Those of which the image shows nothing are left out."""
        rgb = self.mediapipe.Image(
            image_format=self.mediapipe.ImageFormat.SRGB, data=cv2.cvtColor(image, cv2.COLOR_BGR2RGB)
        )
        height, width = image.shape[:2]
        hands = self.landmarker.detect(rgb).hand_landmarks
        found = [np.array([(mark.x * width, mark.y * height) for mark in hand]) for hand in hands]
        return [marks for marks in found if ((marks >= 0) & (marks < (width, height))).all(1).any()]

    def close(self) -> None:
        self.landmarker.close()


def missing_library(error: Exception) -> str:
    return (
        f'MediaPipe cannot load a system library ({str(error).splitlines()[0][:120]}). Install it, on Debian with apt '
        'install libegl1 libgles2 libgl1, or give the box of the hands with --box or --boxes.'
    )


def tiles(width: int, height: int) -> list[tuple[int, int, int, int]]:
    """Left, top, width and height of four tiles that cover an image and overlap by half their sides."""
    across, down = (-(-side * TILE[0] // TILE[1]) for side in (width, height))
    return [(left, top, across, down) for top in (0, height - down) for left in (0, width - across)]


def detection(hands: Sequence[np.ndarray]) -> Detection:
    """Where both hands are, from the landmarks (N, 2) of none, one or two of them."""
    if not hands:
        return Detection(0, None)
    left, top, width, height = box_around(np.concatenate(hands))
    if len(hands) > 1:
        return Detection(len(hands), (left, top, width, height))
    side = AROUND_ONE * max(width, height)
    return Detection(1, (left + (width - side) / 2, top + (height - side) / 2, side, side))


def box_around(pixels: np.ndarray) -> Box:
    """Bounding box (x, y, width, height) of pixels (N, 2), enlarged by the margin, and to the smallest side."""
    low, high = pixels.min(0), pixels.max(0)
    margin = np.maximum(MARGIN * (high - low).max(), (SMALLEST - (high - low)) / 2)
    (left, top), (width, height) = (low - margin).tolist(), (high - low + 2 * margin).tolist()
    return left, top, width, height
