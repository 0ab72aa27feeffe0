"""Pictures of predictions: skeletons, meshes, masks and maps, side by side with the truth. Everything is BGR uint8.

Left hand blue, right hand orange, in every picture; fingers have a colour each.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import torch
from torch import Tensor

from manopth import HandPair
from utils import rasterizer as render
from utils.errors import UserError
from utils.files import write_atomically
from utils.geometry import CROP_SIZE
from utils.hand import BONES, LEFT, RIGHT

FINGER_COLOURS_BGR = ((90, 90, 250), (70, 210, 250), (110, 220, 90), (250, 215, 90), (235, 110, 215))  # thumb .. little
BACKGROUND_BGR = (30, 30, 30)
TEXT_BGR = (240, 240, 240)
CAPTIONS = (
    'input',
    'predicted skeleton',
    'true skeleton',
    'predicted meshes',
    'true meshes',
    'predicted mask',
    'true mask',
)
PANEL = CROP_SIZE  # pixels, the side of each picture in a row
CAPTION_HEIGHT, GAP = 22, 4  # pixels
_SUBPIXEL_BITS = 4  # OpenCV draws at fractions of 1 / 16 pixel
_FAR = 1e5  # pixels: farther off nothing is drawn, and OpenCV's integers would overflow


class RowInputs(NamedTuple):
    """One sample's prediction and truth; NumPy arrays or tensors on any device."""

    image: np.ndarray  # (H, W, 3) uint8 BGR
    predicted_pixels: Tensor | np.ndarray  # (2, 21, 2) pixels of this image
    true_pixels: Tensor | np.ndarray  # (2, 21, 2)
    predicted_meshes: np.ndarray  # (H, W, 3) uint8 BGR the image under the predicted meshes, ``mesh_overlay``
    true_meshes: np.ndarray  # (H, W, 3)
    predicted_labels: Tensor | np.ndarray  # (h, w) 0 background, 1 left, 2 right; any size
    true_labels: Tensor | np.ndarray  # (h, w)


def draw_skeletons(image_bgr: np.ndarray, pixels: Tensor | np.ndarray, *, scale: float | None = None) -> np.ndarray:
    """Both skeletons over a picture: fingers in their colours, edged in the colour of their hand. A new picture.

    image_bgr (H, W, 3) uint8, pixels (2, 21, 2). ``scale`` multiplies the line widths; by default they follow the
    picture's size. Joints that are not finite, and their bones, are left out.
    """
    picture = np.ascontiguousarray(image_bgr).copy()
    pixels = _array(pixels)
    scale = max(picture.shape[:2]) / CROP_SIZE if scale is None else scale
    edge, line, dot = (max(1, round(width * scale)) for width in (4, 2, 3))
    drawable = (np.isfinite(pixels) & (np.abs(pixels) < _FAR)).all(-1)  # (2, 21)
    fixed = np.where(drawable[..., None], pixels, 0) * (1 << _SUBPIXEL_BITS)
    points = fixed.round().astype(int).tolist()
    for hand in (LEFT, RIGHT):
        bones = [
            (a, b, FINGER_COLOURS_BGR[number // 4])
            for number, (a, b) in enumerate(BONES)
            if drawable[hand, a] and drawable[hand, b]
        ]
        edges = [(a, b, render.HAND_COLOURS_BGR[hand]) for a, b, _ in bones]
        for strokes, width in ((edges, edge), (bones, line)):
            for a, b, colour in strokes:
                cv2.line(picture, points[hand][a], points[hand][b], colour, width, cv2.LINE_AA, _SUBPIXEL_BITS)
        for joint in np.flatnonzero(drawable[hand]):
            cv2.circle(
                picture,
                points[hand][joint],
                dot << _SUBPIXEL_BITS,
                render.HAND_COLOURS_BGR[hand],
                cv2.FILLED,
                cv2.LINE_AA,
                _SUBPIXEL_BITS,
            )
    return picture


def mesh_overlay(
    image_bgr: np.ndarray,
    vertices: Tensor | np.ndarray,
    intrinsics: Tensor | np.ndarray,
    models: HandPair,
    *,
    alpha: float = 0.8,
    smooth_edges: int = 2,
) -> np.ndarray:
    """Both meshes, shaded, over a picture; the nearer surface hides the farther one. Returns a new picture.

    image_bgr (H, W, 3) uint8, vertices (2, 778, 3) m in camera axes, intrinsics (3, 3) of this picture.
    ``smooth_edges`` is the number of samples across a pixel; the time grows with its square.
    """
    vertices, intrinsics = (torch.as_tensor(value).detach().float().cpu() for value in (vertices, intrinsics))
    return render.overlay(
        image_bgr, vertices, intrinsics, render.two_hand_faces(models), alpha=alpha, smooth_edges=smooth_edges
    )


def segmentation_picture(labels: Tensor | np.ndarray) -> np.ndarray:
    """labels (H, W) of 0 background, 1 left, 2 right -> (H, W, 3) uint8. Raises ValueError for any other label."""
    labels = _array(labels)
    if labels.ndim != 2 or not np.isin(labels, (0, 1, 2)).all():
        raise ValueError(f'labels must be (H, W) of 0, 1 and 2, got {labels.shape} with {np.unique(labels)[:8]}')
    return np.array([BACKGROUND_BGR, *render.HAND_COLOURS_BGR], dtype=np.uint8)[labels.astype(np.int64)]


def heat_map(image_bgr: np.ndarray, values: Tensor | np.ndarray, *, alpha: float = 0.7) -> np.ndarray:
    """A map (h, w) of any size over a picture (H, W, 3), its cells as they are -> (256, 256, 3) uint8.

    Dark is the map's least value, bright its greatest: ``range_text`` says which. The picture itself is grey.
    """
    values = _array(values)
    level = (values - values.min()) / max(values.max() - values.min(), np.finfo(np.float32).tiny)
    heat = cv2.applyColorMap(_panel((255 * level).round().astype(np.uint8)), cv2.COLORMAP_INFERNO)
    grey = cv2.cvtColor(cv2.cvtColor(_panel(image_bgr), cv2.COLOR_BGR2GRAY), cv2.COLOR_GRAY2BGR)
    return cv2.addWeighted(heat, alpha, grey, 1 - alpha, 0)


def range_text(values: Tensor | np.ndarray) -> str:
    """'least to greatest', to three digits."""
    values = _array(values)
    return f'{values.min():.3g} to {values.max():.3g}'


def prediction_row(inputs: RowInputs) -> np.ndarray:
    """The seven pictures of ``CAPTIONS`` side by side, each 256 x 256 under its caption -> (H, W, 3) uint8."""
    image = _array(inputs.image)
    pictures = (
        image,
        draw_skeletons(image, inputs.predicted_pixels),
        draw_skeletons(image, inputs.true_pixels),
        inputs.predicted_meshes,
        inputs.true_meshes,
        segmentation_picture(inputs.predicted_labels),
        segmentation_picture(inputs.true_labels),
    )
    return captioned_row(pictures, CAPTIONS)


def captioned_row(pictures: Sequence[np.ndarray], captions: Sequence[str]) -> np.ndarray:
    """Pictures of any size side by side, each 256 x 256 under its caption -> (H, W, 3) uint8."""
    panels = [
        np.concatenate([_text_strip(caption, PANEL), _panel(picture)])
        for caption, picture in zip(captions, pictures, strict=True)
    ]
    gap = np.full((len(panels[0]), GAP, 3), BACKGROUND_BGR, np.uint8)
    return np.concatenate([part for panel in panels for part in (panel, gap)][:-1], 1)


def picture_sheet(rows: list[np.ndarray], headers: list[str]) -> np.ndarray:
    """Rows of one width under each other, each below its line of text -> (H, W, 3) uint8.

    Raises ValueError without rows, or where rows and headers differ in number.
    """
    if not rows or len(rows) != len(headers):
        raise ValueError(f'a sheet needs rows and a header for each, got {len(rows)} and {len(headers)}')
    width = rows[0].shape[1]
    return np.concatenate([part for row, header in zip(rows, headers) for part in (_text_strip(header, width), row)])


def write_image(path: str | Path, image: np.ndarray, *, durable: bool = True) -> None:
    """Encode by the file's ending (.png, .jpg ...) and put it in place in one step; folders are made.

    Raises UserError for an ending that names no picture format.
    """
    path = Path(path)
    try:
        encoded = cv2.imencode(path.suffix, image)[1]
    except cv2.error:
        raise UserError(f"{path}: '{path.suffix}' is no picture format; use .png or .jpg.") from None
    write_atomically(path, encoded.tobytes(), durable=durable)


def _array(values: Tensor | np.ndarray) -> np.ndarray:
    return values.detach().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)


def _panel(picture: np.ndarray) -> np.ndarray:
    """The picture in 256 x 256; smaller ones (32 x 32 masks) show their cells as they are."""
    if picture.shape[:2] == (PANEL, PANEL):
        return picture
    larger = max(picture.shape[:2]) > PANEL
    return cv2.resize(picture, (PANEL, PANEL), interpolation=cv2.INTER_AREA if larger else cv2.INTER_NEAREST)


def _text_strip(text: str, width: int) -> np.ndarray:
    """One line of text (ASCII), shortened to the strip's width, -> (22, width, 3)."""
    strip = np.full((CAPTION_HEIGHT, width, 3), BACKGROUND_BGR, np.uint8)
    font, size = cv2.FONT_HERSHEY_SIMPLEX, 0.48
    while len(text) > 3 and cv2.getTextSize(text, font, size, 1)[0][0] > width - 12:
        text = text.removesuffix('...')[:-1] + '...'
    cv2.putText(strip, text, (6, 15), font, size, TEXT_BGR, 1, cv2.LINE_AA)
    return strip
