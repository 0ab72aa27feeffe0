"""Cameras, crops and the exact geometry of image augmentation. Camera axes: x right, y down, z forward, metres.

Pixel centres lie at integers (OpenCV's sense); a 3 x 3 affine map A acts on homogeneous pixel coordinates.
"""

import numpy as np
import torch
from torch import Tensor

from utils.hand import LENGTH_BONE

CROP_SIZE = 256  # side in pixels of a prepared crop; the unit of every pixel figure
HANDS_IN_CROP = 0.8  # share of the crop's side that the larger extent of the two hands takes


def crop_matrix(points: np.ndarray, share: float = HANDS_IN_CROP) -> np.ndarray:
    """Pixels (N, 2) of what is to be seen -> A (3, 3), picture to crop: a square about the middle of the points' box,
    whose longer side takes ``share`` of the square's."""
    low, high = points.min(0), points.max(0)
    corner_x, corner_y = (low + high) / 2 - (half := (high - low).max() / 2 / share)
    scale = CROP_SIZE / (2 * half)
    return np.array([[scale, 0, -scale * corner_x], [0, scale, -scale * corner_y], [0, 0, 1]])


def project(points: Tensor, intrinsics: Tensor) -> Tensor:
    """Pinhole projection: points (..., N, 3) m, intrinsics (..., 3, 3), any full matrix -> pixels (..., N, 2)."""
    image = points @ intrinsics.transpose(-1, -2)
    return image[..., :2] / image[..., 2:]


def to_uv(pixels: Tensor, size: int = CROP_SIZE) -> Tensor:
    """Pixels of a ``size`` crop -> normalised uv in [-1, 1]: 2 u / size - 1."""
    return 2 * pixels / size - 1


def from_uv(uv: Tensor, size: int = CROP_SIZE) -> Tensor:
    """Inverse of ``to_uv``."""
    return (uv + 1) * size / 2


def world_to_camera(points: Tensor, rotation: Tensor, translation: Tensor) -> Tensor:
    """(B, ..., 3) world -> camera axes: R x + t with R (B, 3, 3), t (B, 3), all in one unit."""
    extra = (1,) * (points.ndim - 2)
    turned = (rotation.view(len(rotation), *extra, 3, 3) @ points[..., None]).squeeze(-1)
    return turned + translation.view(len(translation), *extra, 3)


def rotation_z(angle: Tensor) -> Tensor:
    """(...,) rad -> (..., 3, 3): turns x (right) towards y (down), clockwise on screen."""
    cos, sin, zero, one = angle.cos(), angle.sin(), torch.zeros_like(angle), torch.ones_like(angle)
    return torch.stack([cos, -sin, zero, sin, cos, zero, zero, zero, one], -1).unflatten(-1, (3, 3))


def similarity_about_centre(scale: Tensor, angle: Tensor, shift: Tensor, size: int = CROP_SIZE) -> Tensor:
    """The image map u' = s R(angle) (u - c) + c + shift about c = size / 2.

    scale (...,), angle (...,) rad, shift (..., 2) pixels -> A (..., 3, 3).
    """
    cos, sin = scale * angle.cos(), scale * angle.sin()
    centre = size / 2
    row_u = torch.stack([cos, -sin, centre - centre * (cos - sin) + shift[..., 0]], -1)
    row_v = torch.stack([sin, cos, centre - centre * (sin + cos) + shift[..., 1]], -1)
    row_w = torch.zeros_like(row_u)
    row_w[..., 2] = 1
    return torch.stack([row_u, row_v, row_w], -2)


def mirror_image_matrix(size: int = CROP_SIZE) -> Tensor:
    """The image map of a left-right flip between pixel centres, u -> size - 1 - u, as A (3, 3)."""
    return torch.tensor([[-1.0, 0.0, size - 1.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]])


def bone_ends(joints: Tensor) -> Tensor:
    """(..., 21, C) -> (..., 20, 2, C): parent and child of every bone, in the order of BONES.

    By slices: an index would have to be copied to the device, which waits for it.
    """
    fingers = joints[..., 1:, :].unflatten(-2, (5, 4))
    wrist = joints[..., None, :1, :].expand(*fingers.shape[:-2], 1, -1)
    parents = torch.cat([wrist, fingers[..., :3, :]], -2).flatten(-3, -2)
    return torch.stack([parents, joints[..., 1:, :]], -2)


def bone_length(joints: Tensor) -> Tensor:
    """(..., 21, 3) -> (..., 1, 1): length of the bone that scale alignment measures, wrist to middle MCP."""
    start, end = LENGTH_BONE
    return torch.linalg.vector_norm(joints[..., end, :] - joints[..., start, :], dim=-1)[..., None, None]
