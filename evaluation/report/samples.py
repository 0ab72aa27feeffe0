"""Encode images and meshes of samples compactly for embedding in the page."""

import base64
from typing import Any

import cv2
import numpy as np

from utils.drawing import mesh_overlay
from utils.hand import LEFT, NUM_VERTICES, RIGHT

JPEG_QUALITY = 88
INT16 = 32767


def draw(samples: dict[str, np.ndarray]) -> list[dict[str, str]]:
    """data: URLs of each sample's input, and its overlays of prediction and ground truth.

    As in the pixel errors, the prediction is that of the last stage, placed at the ground-truth roots.
    """
    placed = samples['vertices'][:, -1] + samples['true_roots'][:, :, None]
    left, right = samples['faces'].astype(np.int64)
    faces = np.concatenate([left, right + NUM_VERTICES])
    result = []
    for image, camera, *meshes in zip(samples['image'], samples['intrinsics'], placed, samples['true_vertices']):
        drawn = [mesh_overlay(image, mesh, camera, faces) for mesh in meshes]
        result.append(dict(zip(('input', 'prediction', 'ground truth'), map(_address, (image, *drawn)))))
    return result


def _address(image: np.ndarray) -> str:
    encoded = cv2.imencode('.jpg', image, [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])[1]
    return f'data:image/jpeg;base64,{_base64(encoded)}'


def meshes(samples: dict[str, np.ndarray]) -> dict[str, Any]:
    """Meshes for viewer.js, each centred on its own root.

    Vertices are int16 multiples of a per-sample step, about 0.006 mm for a hand. Offsets are in mm from the left root.
    """
    centred = samples['true_vertices'] - samples['true_roots'][:, :, None]
    vector = samples['true_roots'][:, RIGHT] - samples['true_roots'][:, LEFT]
    return {
        'faces': [_base64(faces.astype('<u2')) for faces in samples['faces']],
        'samples': [
            {
                'step': (step := max(1e3 * float(max(np.abs(stages).max(), np.abs(truth).max())) / INT16, 1e-6)),
                'stages': [_quantised(mesh, step) for mesh in stages],
                'truth': _quantised(truth, step),
                'offsets': _millimetres(offsets),
                'true_offset': _millimetres(true_offset),
            }
            for stages, truth, offsets, true_offset in zip(samples['vertices'], centred, samples['offset'], vector)
        ],
    }


def _quantised(vertices: np.ndarray, step_mm: float) -> str:
    """(2, 778, 3) in m -> base64 of little-endian int16."""
    return _base64((1e3 * vertices / step_mm).round().clip(-INT16, INT16).astype('<i2'))


def _millimetres(metres: np.ndarray) -> list:
    return (1e3 * metres.astype(float)).round(3).tolist()


def _base64(values: np.ndarray) -> str:
    return base64.b64encode(values.tobytes()).decode()
