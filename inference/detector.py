"""Locate both hands in an image with MediaPipe's hand landmarker (optional dependency: requirements-demo.txt)."""

from pathlib import Path

import cv2
import numpy as np

from utils.config import CHECKOUT
from utils.errors import UserError

MODEL = str(CHECKOUT / 'misc/hand_landmarker.task')
DOWNLOAD = (
    'Download hand_landmarker.task from https://ai.google.dev/edge/mediapipe/solutions/vision/'
    f'hand_landmarker#models and save it as {MODEL}, or pass its path with --detector.'
)
MARGIN = 0.1  # of the box's longer side, on each side: landmarks lie inside the outline of a hand


class HandDetector:
    """Callable: image (H, W, 3) uint8 BGR -> box (x, y, width, height) around all hands, at most two; None if none.

    Raises UserError if MediaPipe or its model file is missing or unusable.
    """

    def __init__(self, model: str | Path = MODEL):
        try:
            import mediapipe
            from mediapipe.tasks.python import BaseOptions, vision
        except (ImportError, OSError):  # OSError: a shared library that MediaPipe loads is missing
            raise UserError(
                '--detect needs MediaPipe, which cannot be imported. Run pip install -r requirements-demo.txt, or '
                'give the box of the hands with --box or --boxes.'
            ) from None
        if not Path(model).is_file():
            raise UserError(f'The hand detector {model} does not exist. {DOWNLOAD}')
        self.mediapipe = mediapipe
        options = vision.HandLandmarkerOptions(
            base_options=BaseOptions(model_asset_path=str(model)), num_hands=2, min_hand_detection_confidence=0.3
        )
        try:
            self.landmarker = vision.HandLandmarker.create_from_options(options)
        except (RuntimeError, ValueError) as error:
            raise UserError(
                f'MediaPipe cannot load the hand detector {model} ({str(error).splitlines()[0][:120]}). {DOWNLOAD}'
            ) from None

    def __call__(self, image: np.ndarray) -> tuple[float, float, float, float] | None:
        rgb = cv2.cvtColor(image, cv2.COLOR_BGR2RGB)
        hands = self.landmarker.detect(
            self.mediapipe.Image(image_format=self.mediapipe.ImageFormat.SRGB, data=rgb)
        ).hand_landmarks
        if not hands:
            return None
        height, width = image.shape[:2]
        return box_around(np.array([[mark.x * width, mark.y * height] for hand in hands for mark in hand]))

    def close(self) -> None:
        self.landmarker.close()


def box_around(pixels: np.ndarray) -> tuple[float, float, float, float]:
    """Bounding box (x, y, width, height) of pixels (N, 2), enlarged by the margin."""
    low, high = pixels.min(0), pixels.max(0)
    margin = MARGIN * (high - low).max()
    (left, top), (width, height) = (low - margin).tolist(), (high - low + 2 * margin).tolist()
    return left, top, width, height
