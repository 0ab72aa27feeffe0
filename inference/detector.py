"""Where both hands are in a picture, by MediaPipe's hand landmarker: optional, for apps/demo.py --detect."""

from pathlib import Path

import cv2
import numpy as np

from utils.errors import UserError

MODEL = 'misc/hand_landmarker.task'
WHERE_TO_GET = (
    'download hand_landmarker.task from https://ai.google.dev/edge/mediapipe/solutions/vision/'
    f'hand_landmarker#models and put it at {MODEL}, or name it with --detector'
)
MARGIN = 0.1  # of the box's longer side, each way: landmarks lie inside of the hands


class HandDetector:
    """Picture (H, W, 3) uint8 BGR -> the box (x, y, width, height) of all hands in it, at most two, or None.

    Raises UserError where MediaPipe or its model file is missing.
    """

    def __init__(self, model: str | Path = MODEL):
        try:
            import mediapipe
            from mediapipe.tasks.python import BaseOptions, vision
        except (ImportError, OSError):  # OSError: a shared library that it needs is missing
            raise UserError(
                '--detect needs MediaPipe: pip install -r requirements-demo.txt, or give the box of the '
                'hands with --box or --boxes.'
            ) from None
        if not Path(model).is_file():
            raise UserError(f'{model} is missing: {WHERE_TO_GET}.')
        self.mediapipe = mediapipe
        options = vision.HandLandmarkerOptions(
            base_options=BaseOptions(model_asset_path=str(model)), num_hands=2, min_hand_detection_confidence=0.3
        )
        try:
            self.landmarker = vision.HandLandmarker.create_from_options(options)
        except (RuntimeError, ValueError) as error:
            raise UserError(
                f'{model} is not a model that MediaPipe reads ({str(error).splitlines()[0][:120]}): {WHERE_TO_GET}.'
            ) from None

    def __call__(self, picture: np.ndarray) -> tuple[float, float, float, float] | None:
        image = self.mediapipe.Image(
            image_format=self.mediapipe.ImageFormat.SRGB, data=cv2.cvtColor(picture, cv2.COLOR_BGR2RGB)
        )
        hands = self.landmarker.detect(image).hand_landmarks
        if not hands:
            return None
        height, width = picture.shape[:2]
        return box_around(np.array([[mark.x * width, mark.y * height] for hand in hands for mark in hand]))

    def close(self) -> None:
        self.landmarker.close()


def box_around(pixels: np.ndarray) -> tuple[float, float, float, float]:
    """(N, 2) pixels -> x, y, width, height of their box with a margin."""
    low, high = pixels.min(0), pixels.max(0)
    margin = MARGIN * (high - low).max()
    return *(low - margin).tolist(), *(high - low + 2 * margin).tolist()
