"""Draw predictions: skeletons, meshes, masks and heat maps, side by side with the ground truth. Images are uint8 BGR.

The left hand is blue and the right hand orange everywhere; each finger has its own colour.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from utils.errors import UserError
from utils.files import write_atomically
from utils.geometry import CROP_SIZE, project
from utils.hand import BONES, LEFT, NUM_VERTICES, RIGHT
from utils.rasterizer import rasterize, shade

HAND_COLOURS_BGR = ((214, 150, 80), (86, 133, 235))  # left blue, right orange
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
PANEL = CROP_SIZE  # pixels, side of each panel in a row
CAPTION_HEIGHT, GAP = 22, 4  # pixels
_SUBPIXEL_BITS = 4  # OpenCV draws at multiples of 1 / 16 pixel
_FAR = 1e5  # pixels: joints farther away are not drawn, since OpenCV's integers would overflow


class RowInputs(NamedTuple):
    """Prediction and ground truth of one sample; NumPy arrays or tensors on any device."""

    image: np.ndarray  # (H, W, 3) uint8 BGR
    predicted_pixels: Tensor | np.ndarray  # (2, 21, 2) pixels of this image
    true_pixels: Tensor | np.ndarray  # (2, 21, 2)
    predicted_meshes: np.ndarray  # (H, W, 3) uint8 BGR, from ``mesh_overlay``
    true_meshes: np.ndarray  # (H, W, 3)
    predicted_labels: Tensor | np.ndarray  # (h, w) 0 background, 1 left, 2 right; any size
    true_labels: Tensor | np.ndarray  # (h, w)


def draw_skeletons(image: np.ndarray, pixels: Tensor | np.ndarray, *, scale: float | None = None) -> np.ndarray:
    """Draw both skeletons over an image, fingers in their colours, outlined in the colour of the hand. Returns a copy.

    image (H, W, 3) uint8 BGR, pixels (2, 21, 2). ``scale`` multiplies the line widths; by default they follow the image
    size. Joints that are not finite are left out with their bones.
    """
    drawn = np.ascontiguousarray(image).copy()
    pixels = _array(pixels)
    scale = max(drawn.shape[:2]) / CROP_SIZE if scale is None else scale
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
        edges = [(a, b, HAND_COLOURS_BGR[hand]) for a, b, _ in bones]
        for strokes, width in ((edges, edge), (bones, line)):
            for a, b, colour in strokes:
                cv2.line(drawn, points[hand][a], points[hand][b], colour, width, cv2.LINE_AA, _SUBPIXEL_BITS)
        for joint in np.flatnonzero(drawable[hand]):
            cv2.circle(
                drawn,
                points[hand][joint],
                dot << _SUBPIXEL_BITS,
                HAND_COLOURS_BGR[hand],
                cv2.FILLED,
                cv2.LINE_AA,
                _SUBPIXEL_BITS,
            )
    return drawn


def draw_joints(
    image: np.ndarray, pixels: Tensor | np.ndarray, *, filled: Tensor | np.ndarray, scale: float
) -> np.ndarray:
    """Draw joints over an image as dots, or as rings where they are not ``filled``. Returns a copy.

    image (H, W, 3) uint8 BGR, pixels (2, 21, 2), filled (2, 21) bool; scale: factor of the dots' size. Joints that are
    not finite are left out.
    """
    drawn, pixels, filled = np.ascontiguousarray(image).copy(), _array(pixels), _array(filled)
    radius, line = max(2, round(2.5 * scale)), max(1, round(scale))
    drawable = (np.isfinite(pixels) & (np.abs(pixels) < _FAR)).all(-1)
    for hand, joint in np.argwhere(drawable).tolist():
        colour = FINGER_COLOURS_BGR[(joint - 1) // 4] if joint else HAND_COLOURS_BGR[hand]
        point = (pixels[hand, joint] * (1 << _SUBPIXEL_BITS)).round().astype(int).tolist()
        for ink, width in ((BACKGROUND_BGR, line + 2), (colour, cv2.FILLED if filled[hand, joint] else line)):
            cv2.circle(drawn, point, radius << _SUBPIXEL_BITS, ink, width, cv2.LINE_AA, _SUBPIXEL_BITS)
    return drawn


def mesh_overlay(
    image: np.ndarray,
    vertices: Tensor | np.ndarray,
    intrinsics: Tensor | np.ndarray,
    faces: Tensor | np.ndarray,
    *,
    alpha: float = 0.8,
    colours_bgr: Sequence[Sequence[int]] = HAND_COLOURS_BGR,
    smooth_edges: int = 2,
) -> np.ndarray:
    """Draw the hands, shaded and each in its colour, over an image. Returns a new image.

    image (H, W, 3) uint8 BGR, vertices (2, 778, 3) m in camera axes, intrinsics (3, 3) of this image, faces (F, 3) of
    both hands as one mesh (``HandPair.mesh_faces``), or those of one hand to draw it alone. alpha: opacity of the
    meshes. smooth_edges: samples across a pixel; the time grows with its square.
    """
    mesh = torch.as_tensor(vertices).detach().float().cpu().reshape(1, -1, 3)
    faces, intrinsics = torch.as_tensor(faces).cpu(), torch.as_tensor(intrinsics).detach().float().cpu()
    drawn = image.copy()
    if not len(faces):
        return drawn
    left, top, right, bottom = _window(mesh[0, faces.unique()], intrinsics, image.shape[:2])
    if right <= left or bottom <= top:
        return drawn
    window, (height, width) = drawn[top:bottom, left:right], (bottom - top, right - left)
    shift = torch.tensor([[1.0, 0.0, 0.5 - left], [0.0, 1.0, 0.5 - top], [0.0, 0.0, 1.0]])  # centres lie at 0.5 there
    finer = torch.diag(torch.tensor([smooth_edges, smooth_edges, 1.0])) @ shift @ intrinsics
    fragments = rasterize(mesh, faces, finer[None], (height * smooth_edges, width * smooth_edges))
    colours = torch.tensor(colours_bgr, dtype=mesh.dtype).repeat_interleave(NUM_VERTICES, 0)
    covered = (fragments.face >= 0)[..., None].to(mesh)
    layers = torch.cat([shade(fragments, mesh, faces, colours), covered], -1).permute(0, 3, 1, 2)
    pooled = F.avg_pool2d(layers, smooth_edges)[0].permute(1, 2, 0).numpy()
    shaded, coverage = pooled[..., :3], pooled[..., 3:]  # the colours are already multiplied by the coverage
    window[...] = (window * (1 - alpha * coverage) + alpha * shaded).round().clip(0, 255)
    return drawn


def _window(vertices: Tensor, intrinsics: Tensor, size: tuple[int, ...]) -> tuple[int, int, int, int]:
    """Left, top, right, bottom of the part of a (height, width) image in which vertices (V, 3) m can be visible.

    Hands are small in most images; time and memory grow with the part that is rasterized.
    """
    height, width = size
    if bool((vertices[:, 2] <= 0).any()):
        return 0, 0, width, height
    pixels = project(vertices, intrinsics)
    low, high = pixels.amin(0).floor().clamp(-1, 1e6).long() - 1, pixels.amax(0).ceil().clamp(-1, 1e6).long() + 1
    left, top, right, bottom = *low.clamp_min(0).tolist(), *high.tolist()
    return left, top, min(right, width), min(bottom, height)


def segmentation_picture(labels: Tensor | np.ndarray) -> np.ndarray:
    """Colour labels (H, W) of 0 background, 1 left, 2 right -> (H, W, 3) uint8. Raises ValueError for other labels."""
    labels = _array(labels)
    if labels.ndim != 2 or not np.isin(labels, (0, 1, 2)).all():
        raise ValueError(f'Labels must be (H, W) of 0, 1 and 2, got {labels.shape} with {np.unique(labels)[:8]}.')
    return np.array([BACKGROUND_BGR, *HAND_COLOURS_BGR], dtype=np.uint8)[labels.astype(np.int64)]


def heat_map(image: np.ndarray, values: Tensor | np.ndarray, *, alpha: float = 0.7) -> np.ndarray:
    """Overlay a map (h, w) of any size, without interpolation, on an image (H, W, 3) in grey -> (256, 256, 3) uint8.

    The minimum of the map is dark and its maximum bright; ``range_text`` formats the two.
    """
    values = _array(values)
    level = (values - values.min()) / max(values.max() - values.min(), np.finfo(np.float32).tiny)
    heat = cv2.applyColorMap(_panel((255 * level).round().astype(np.uint8)), cv2.COLORMAP_INFERNO)
    grey = cv2.cvtColor(cv2.cvtColor(_panel(image), cv2.COLOR_BGR2GRAY), cv2.COLOR_GRAY2BGR)
    return cv2.addWeighted(heat, alpha, grey, 1 - alpha, 0)


def range_text(values: Tensor | np.ndarray) -> str:
    """Format the range of values as 'minimum to maximum', to three digits."""
    values = _array(values)
    return f'{values.min():.3g} to {values.max():.3g}'


def prediction_row(inputs: RowInputs) -> np.ndarray:
    """Draw the seven panels of ``CAPTIONS`` side by side, each 256 x 256 under its caption -> (H, W, 3) uint8."""
    image = _array(inputs.image)
    panels = (
        image,
        draw_skeletons(image, inputs.predicted_pixels),
        draw_skeletons(image, inputs.true_pixels),
        inputs.predicted_meshes,
        inputs.true_meshes,
        segmentation_picture(inputs.predicted_labels),
        segmentation_picture(inputs.true_labels),
    )
    return captioned_row(panels, CAPTIONS)


def captioned_row(images: Sequence[np.ndarray], captions: Sequence[str]) -> np.ndarray:
    """Place images of any size side by side, each 256 x 256 under its caption -> (H, W, 3) uint8."""
    panels = [
        np.concatenate([_text_strip(caption, PANEL), _panel(image)])
        for caption, image in zip(captions, images, strict=True)
    ]
    gap = np.full((len(panels[0]), GAP, 3), BACKGROUND_BGR, np.uint8)
    return np.concatenate([part for panel in panels for part in (panel, gap)][:-1], 1)


def picture_sheet(rows: list[np.ndarray], headers: list[str]) -> np.ndarray:
    """Stack rows of equal width, each below its header -> (H, W, 3) uint8.

    Raises ValueError if there are no rows, or if rows and headers differ in number.
    """
    if not rows or len(rows) != len(headers):
        raise ValueError(f'A sheet needs rows and a header for each, got {len(rows)} rows and {len(headers)} headers.')
    width = rows[0].shape[1]
    return np.concatenate([part for row, header in zip(rows, headers) for part in (_text_strip(header, width), row)])


def write_image(path: str | Path, image: np.ndarray, *, durable: bool = True) -> None:
    """Write an image atomically, in the format of the file's extension (.png, .jpg ...); creates missing folders.

    Raises UserError for an extension that names no image format.
    """
    path = Path(path)
    try:
        encoded = cv2.imencode(path.suffix, image)[1]
    except cv2.error:
        raise UserError(f"{path}: '{path.suffix}' is not an image format; use .png or .jpg.") from None
    write_atomically(path, encoded.tobytes(), durable=durable)


def _array(values: Tensor | np.ndarray) -> np.ndarray:
    return values.detach().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)


def _panel(image: np.ndarray) -> np.ndarray:
    """Resize an image to 256 x 256; the cells of smaller ones (32 x 32 masks) stay sharp."""
    if image.shape[:2] == (PANEL, PANEL):
        return image
    larger = max(image.shape[:2]) > PANEL
    return cv2.resize(image, (PANEL, PANEL), interpolation=cv2.INTER_AREA if larger else cv2.INTER_NEAREST)


def _text_strip(text: str, width: int) -> np.ndarray:
    """Render one line of ASCII text, truncated to the width -> (22, width, 3)."""
    strip = np.full((CAPTION_HEIGHT, width, 3), BACKGROUND_BGR, np.uint8)
    font, size = cv2.FONT_HERSHEY_SIMPLEX, 0.48
    while len(text) > 3 and cv2.getTextSize(text, font, size, 1)[0][0] > width - 12:
        text = text.removesuffix('...')[:-1] + '...'
    cv2.putText(strip, text, (6, 15), font, size, TEXT_BGR, 1, cv2.LINE_AA)
    return strip
