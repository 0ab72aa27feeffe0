"""Clutter around synthetic hands: shapes, faces, arms and lines of text behind them, objects held or in front of them.

Images are display values (H, W, 3) float32 in [0, 1], BGR, and are changed in place.
"""

from collections.abc import Callable

import cv2
import numpy as np

from dataset.synthetic.appearance import SKIN_TONES_BGR

CLUTTERED, CLUTTERED_WITHOUT_HANDS = 0.5, 0.85  # shares of the backgrounds; an image without hands needs distractors
HELD, IN_FRONT = 0.22, 0.2  # shares of the images that are not plain

Colour = tuple[float, float, float]


def _colour(rng: np.random.Generator) -> Colour:
    """Any colour; greys are as frequent as strong tints."""
    grey, tint = rng.uniform(0.03, 0.95), rng.uniform(0, 1, 3)
    blue, green, red = grey + rng.beta(1, 1.5) * (tint - grey)
    return blue, green, red


def _skin(rng: np.random.Generator) -> Colour:
    blue, green, red = SKIN_TONES_BGR[rng.integers(len(SKIN_TONES_BGR))] * rng.uniform(0.5, 1.1)
    return blue, green, red


def _point(size: tuple[int, ...], rng: np.random.Generator) -> tuple[int, int]:
    return int(rng.integers(size[1])), int(rng.integers(size[0]))


def _ovals(image: np.ndarray, rng: np.random.Generator) -> None:
    """Skin-coloured ovals, the size of a hand or of a fist."""
    for _ in range(rng.integers(1, 5)):
        axes = (int(rng.integers(10, 60)), int(rng.integers(10, 60)))
        turn = float(rng.uniform(0, 180))
        cv2.ellipse(image, _point(image.shape, rng), axes, turn, 0, 360, _skin(rng), -1, cv2.LINE_AA)


def _arms(image: np.ndarray, rng: np.random.Generator) -> None:
    """Bars in skin colour with rounded ends: arms, legs and fingers of other people."""
    for _ in range(rng.integers(1, 4)):
        width = int(rng.integers(6, 50))
        cv2.line(image, _point(image.shape, rng), _point(image.shape, rng), _skin(rng), width, cv2.LINE_AA)


def _face(image: np.ndarray, rng: np.random.Generator) -> None:
    """An oval with hair, eyes, nose and mouth."""
    x, y = _point(image.shape, rng)
    wide = int(rng.integers(24, 80))
    high, skin = int(1.3 * wide), _skin(rng)
    blue, green, red = (0.7 * value for value in skin)
    dark, lips = (blue, green, red), (0.8 * blue, 0.8 * green, min(1.25 * red, 1.0))
    hair = _colour(rng) if rng.random() < 0.3 else tuple(rng.uniform(0.02, 0.25) * np.array([0.5, 0.7, 1.0]))
    cv2.ellipse(image, (x, y - high // 4), (int(1.12 * wide), high), 0, 0, 360, hair, -1, cv2.LINE_AA)
    cv2.ellipse(image, (x, y), (wide, high), 0, 0, 360, skin, -1, cv2.LINE_AA)
    for side in (-1, 1):
        eye = (x + side * int(0.4 * wide), y - high // 5)
        cv2.ellipse(image, eye, (max(wide // 6, 2), max(wide // 12, 1)), 0, 0, 360, (0.8, 0.8, 0.8), -1, cv2.LINE_AA)
        cv2.circle(image, eye, max(wide // 12, 1), (0.05, 0.05, 0.05), -1, cv2.LINE_AA)
    cv2.line(image, (x, y - high // 8), (x, y + high // 5), dark, max(wide // 10, 1), cv2.LINE_AA)
    cv2.ellipse(image, (x, y + high // 2), (wide // 3, max(wide // 10, 1)), 0, 0, 360, lips, -1, cv2.LINE_AA)


def _text(image: np.ndarray, rng: np.random.Generator) -> None:
    """A sheet with rows of short dashes, like a page, a label or a keyboard."""
    left, top = _point(image.shape, rng)
    wide, high, pitch = int(rng.integers(50, 220)), int(rng.integers(40, 220)), int(rng.integers(6, 16))
    ink = _colour(rng)
    cv2.rectangle(image, (left, top), (left + wide, top + high), _colour(rng), -1)
    for row in range(top + pitch, top + high - 2, pitch):
        start = left + 5
        while start < left + wide - 8:
            end = min(start + int(rng.integers(3, 24)), left + wide - 5)
            cv2.line(image, (start, row), (end, row), ink, max(pitch // 3, 1))
            start = end + int(rng.integers(3, 7))


def _checks(image: np.ndarray, rng: np.random.Generator) -> None:
    """A patch of checks, like a shirt, tiles or a chessboard."""
    left, top = _point(image.shape, rng)
    cell = int(rng.integers(6, 28))
    box = image[top : top + int(rng.integers(60, 260)), left : left + int(rng.integers(60, 260))]
    rows, columns = np.ogrid[: box.shape[0], : box.shape[1]]
    odd = ((rows // cell + columns // cell) % 2).astype(bool)
    box[:] = np.where(odd[..., None], np.array(_colour(rng), np.float32), np.array(_colour(rng), np.float32))


def _shapes(image: np.ndarray, rng: np.random.Generator) -> None:
    """Sharp triangles, boxes and bars in any colour: furniture, windows and cables."""
    for _ in range(rng.integers(2, 8)):
        if rng.random() < 0.5:
            spread = rng.uniform(-110, 110, (int(rng.integers(3, 5)), 2))
            corners = (np.array(_point(image.shape, rng)) + spread).astype(np.int32)
            cv2.fillConvexPoly(image, cv2.convexHull(corners), _colour(rng), cv2.LINE_AA)
        else:
            start, end, width = _point(image.shape, rng), _point(image.shape, rng), int(rng.integers(1, 14))
            cv2.line(image, start, end, _colour(rng), width, cv2.LINE_AA)


KINDS: tuple[Callable[[np.ndarray, np.random.Generator], None], ...] = (_ovals, _arms, _face, _text, _checks, _shapes)


def clutter_background(image: np.ndarray, rng: np.random.Generator) -> None:
    """Draw one to three kinds of clutter over a background, sharp or out of focus."""
    for number in rng.permutation(len(KINDS))[: rng.integers(1, 4)]:
        KINDS[number](image, rng)
    if rng.random() < 0.5:
        image[:] = cv2.GaussianBlur(image, (0, 0), rng.uniform(0.7, 4))


def draw_objects(image: np.ndarray, pixels: np.ndarray, rng: np.random.Generator) -> None:
    """Draw one or two shaded rods, balls or boxes at the hands, whose vertices lie at ``pixels`` (N, 2).

    Drawn over the hands they cover a part of them; drawn before the hands they are held or lie behind.
    """
    low, high = pixels.min(0), pixels.max(0)
    size = float((high - low).max())
    for _ in range(int(rng.integers(1, 3))):
        x, y = (int(value) for value in rng.uniform(low, high))
        angle, mask = rng.uniform(0, np.pi), np.zeros(image.shape[:2], np.uint8)
        direction = np.array([np.cos(angle), np.sin(angle)])
        kind = rng.integers(3)
        if kind == 0:
            width = max(2, int(rng.uniform(0.02, 0.10) * size))
            start, end = (np.array([x, y]) + rng.uniform(0.2, 1.2, (2, 1)) * size * [-direction, direction]).astype(int)
            cv2.line(mask, start.tolist(), end.tolist(), 255, width, cv2.LINE_AA)
            reach = width / 2
        elif kind == 1:
            axes = [max(2, int(value)) for value in rng.uniform(0.05, 0.17, 2) * size]
            cv2.ellipse(mask, (x, y), axes, float(np.degrees(angle)), 0, 360, 255, -1, cv2.LINE_AA)
            reach = max(axes)
        else:
            sides = rng.uniform(0.08, 0.38, 2) * size
            corners = cv2.boxPoints(((x, y), sides.tolist(), float(np.degrees(angle))))
            cv2.fillPoly(mask, [corners.astype(np.int32)], 255, cv2.LINE_AA)
            reach = sides.max()
        # Light falls from one side: brightness changes across the object, which rounds a rod or a ball.
        rows, columns = np.ogrid[: image.shape[0], : image.shape[1]]
        across = (-direction[1] * (columns - x) + direction[0] * (rows - y)) / max(reach, 1.0)
        shade = (1 - 0.45 * np.square(np.clip(across - 0.4, -1.2, 1.2))).astype(np.float32)[..., None]
        share = mask[..., None].astype(np.float32) / 255
        image += share * (shade * np.array(_colour(rng), np.float32) - image)
