"""Faults of a camera: exposure, colour cast, contrast, vignette, blur, low resolution, noise and poor compression.

Images are display values (H, W, 3) float32 in [0, 1], BGR.
"""

import cv2
import numpy as np

# Shares of the images that are not plain.
CAST, DARK, BRIGHT, CONTRAST, VIGNETTE = 0.4, 0.12, 0.08, 0.3, 0.1
MOTION, DEFOCUS, COARSE, NOISE, POOR_JPEG = 0.12, 0.12, 0.15, 0.25, 0.5
STUDIO_CAST = np.array([0.78, 1.05, 0.98], np.float32)  # BGR: the yellow-green of a studio's lamps
JPEG_QUALITY = 93


def expose(values: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Colour cast, exposure, tone curve and vignette of a camera with wrong settings."""
    if rng.random() < CAST:
        studio = 1 + rng.uniform(0.3, 1.2) * (STUDIO_CAST - 1)
        values = values * (studio if rng.random() < 0.5 else rng.uniform(0.75, 1.2, 3).astype(np.float32))
    chance = rng.random()
    if chance < DARK:
        values = values * np.float32(rng.uniform(0.08, 0.5))
    elif chance < DARK + BRIGHT:
        values = values * np.float32(rng.uniform(1.3, 2.0))
    if rng.random() < CONTRAST:
        values = values.clip(0, 1)
        if rng.random() < 0.5:
            values = values * values * (3 - 2 * values) if rng.random() < 0.5 else 0.12 + 0.76 * values
        else:
            values = cv2.pow(values, np.exp(rng.uniform(-0.45, 0.45)))
    if rng.random() < VIGNETTE:
        rows, columns = (np.square(np.linspace(-1, 1, length, dtype=np.float32)) for length in values.shape[:2])
        values = values * (1 - np.float32(rng.uniform(0.15, 0.4)) * (rows[:, None] + columns))[..., None]
    return values


def blur(values: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Motion blur, defocus, or a lower resolution."""
    if rng.random() < MOTION:
        length, angle = int(rng.integers(3, 12)), rng.uniform(0, np.pi)
        kernel = np.zeros((length, length), np.float32)
        middle, reach = (length - 1) / 2, length / 2 * np.array([np.cos(angle), np.sin(angle)])
        start, end = ((round(x), round(y)) for x, y in (middle - reach, middle + reach))
        cv2.line(kernel, start, end, 1.0, 1, cv2.LINE_AA)
        values = cv2.filter2D(values, -1, kernel / kernel.sum(), borderType=cv2.BORDER_REPLICATE)
    if rng.random() < DEFOCUS:
        values = cv2.GaussianBlur(values, (0, 0), rng.uniform(0.6, 2.2))
    if rng.random() < COARSE:
        height, width = values.shape[:2]
        factor = rng.uniform(1.5, 3.5)
        small = cv2.resize(values, (int(width / factor), int(height / factor)), interpolation=cv2.INTER_AREA)
        values = cv2.resize(small, (width, height), interpolation=cv2.INTER_LINEAR)
    return values


def noise_level(rng: np.random.Generator) -> float:
    """Standard deviation of the sensor noise, in steps of 8-bit values; 0 for most images."""
    return rng.uniform(2, 12) if rng.random() < NOISE else 0.0


def jpeg_quality(rng: np.random.Generator) -> int:
    """JPEG quality of one image; half of the images are compressed strongly."""
    return int(rng.integers(30, 96)) if rng.random() < POOR_JPEG else JPEG_QUALITY
