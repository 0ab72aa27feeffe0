"""Cameras, crops and exact geometry of image augmentation. Camera axes: x right, y down, z forward, in metres.

Pixel centres lie at integers, as in OpenCV; a 3 x 3 affine map A acts on homogeneous pixel coordinates.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from utils.hand import LENGTH_BONE

CROP_SIZE = 256  # pixels, side of a prepared crop; every pixel coordinate refers to it
NEAREST_DEPTH = 1e-6  # m: a point nearer to the camera plane is projected as if it lay that far in front of it
SHORTEST_BONE = 1e-6  # m or HAND_SCALE: a bone that is shorter says nothing about a hand's size
HANDS_IN_CROP = 0.8  # larger extent of the two hands, as a share of the side of the crop


def crop_matrix(points: np.ndarray, share: float = HANDS_IN_CROP) -> np.ndarray:
    """Affine map A (3, 3) from image to crop that centres the bounding box of the pixels (N, 2).

    The longer side of the box, at least one pixel, is ``share`` of the side of the crop.
    """
    low, high = points.min(0), points.max(0)
    corner_x, corner_y = (low + high) / 2 - (half := max((high - low).max(), 1.0) / 2 / share)
    scale = CROP_SIZE / (2 * half)
    return np.array([[scale, 0, -scale * corner_x], [0, scale, -scale * corner_y], [0, 0, 1]])


def project(points: Tensor, intrinsics: Tensor) -> Tensor:
    """Pinhole projection: points (..., N, 3) m, intrinsics (..., 3, 3), any full matrix -> pixels (..., N, 2).

    Finite for points on the camera plane too; those behind it are mirrored through the pinhole.
    """
    image = points @ intrinsics.transpose(-1, -2)
    depth = image[..., 2:]
    return image[..., :2] / depth.masked_fill(depth.abs() < NEAREST_DEPTH, NEAREST_DEPTH)


def to_uv(pixels: Tensor, size: int = CROP_SIZE) -> Tensor:
    """Pixels of a ``size`` crop -> normalised uv in [-1, 1]: 2 u / size - 1."""
    return 2 * pixels / size - 1


def from_uv(uv: Tensor, size: int = CROP_SIZE) -> Tensor:
    """Inverse of ``to_uv``."""
    return (uv + 1) * size / 2


def world_to_camera(points: Tensor, rotation: Tensor, translation: Tensor) -> Tensor:
    """Transform points (B, ..., 3) to camera axes: R x + t with R (B, 3, 3), t (B, 3), all in the same unit."""
    extra = (1,) * (points.ndim - 2)
    turned = (rotation.view(len(rotation), *extra, 3, 3) @ points[..., None]).squeeze(-1)
    return turned + translation.view(len(translation), *extra, 3)


def rotation_z(angle: Tensor) -> Tensor:
    """Rotation about z by an angle (...,) rad -> (..., 3, 3). Positive rotates x (right) to y (down), clockwise."""
    cos, sin, zero, one = angle.cos(), angle.sin(), torch.zeros_like(angle), torch.ones_like(angle)
    return torch.stack([cos, -sin, zero, sin, cos, zero, zero, zero, one], -1).unflatten(-1, (3, 3))


def similarity_about_centre(scale: Tensor, angle: Tensor, shift: Tensor, size: int = CROP_SIZE) -> Tensor:
    """The image map u' = scale R(angle) (u - c) + c + shift, about c = size / 2.

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
    """The image map of a horizontal flip, u -> size - 1 - u, as A (3, 3)."""
    return torch.tensor([[-1.0, 0.0, size - 1.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]])


def warp(images: Tensor, image_map: Tensor, *, size: int = CROP_SIZE, pixels: Tensor | None = None) -> Tensor:
    """Warp crops by an affine map, bilinear, black outside: (B, C, 256, 256), A (B, 3, 3) -> (B, C, size, size).

    A maps pixels of the 256 crop to pixels of the 256 crop; a smaller ``size`` shows the same crop in fewer pixels.
    pixels (n,): compute only these rows and columns of the result -> (B, C, n, n), the same values as in the whole.
    """
    cell = CROP_SIZE / size
    if pixels is None:
        pixels = torch.arange(size, device=images.device)
    steps = (pixels.to(images.dtype) + 0.5) * cell - 0.5
    # The source of an output pixel, in grid_sample's units, is the sum of a term of its column and one of its row.
    by_right, by_down, constant = torch.linalg.inv(image_map)[:, None, :2].mul(2 / CROP_SIZE).unbind(-1)
    columns = by_right * steps[:, None]
    rows = by_down * steps[:, None] + (constant + 1 / CROP_SIZE - 1)
    # As complex numbers, x and y are added at once, four times as fast.
    grid = torch.view_as_real(torch.view_as_complex(columns)[:, None] + torch.view_as_complex(rows)[:, :, None])
    return F.grid_sample(images, grid, mode='bilinear', padding_mode='zeros', align_corners=False)


def bone_ends(joints: Tensor) -> Tensor:
    """Joints (..., 21, C) -> parent and child of every bone (..., 20, 2, C), in the order of BONES.

    Slicing avoids an index tensor, whose copy to the device would synchronise.
    """
    wrist, children = joints.split((1, 20), -2)
    fingers = children.unflatten(-2, (5, 4))
    wrist = wrist[..., None, :, :].expand(*fingers.shape[:-2], 1, -1)
    parents = torch.cat([wrist, fingers[..., :3, :]], -2).flatten(-3, -2)
    return torch.stack([parents, children], -2)


def bone_length(joints: Tensor) -> Tensor:
    """Joints (..., 21, 3) -> length (..., 1, 1) of the bone for scale alignment, wrist to middle MCP."""
    start, end = LENGTH_BONE
    return torch.linalg.vector_norm(joints[..., end, :] - joints[..., start, :], dim=-1)[..., None, None]


def scale_to_truth(joints: Tensor, true_joints: Tensor) -> Tensor:
    """Factor (..., 1, 1) of scale alignment, true / predicted bone length; joints (..., 21, 3), differentiable.

    1 where the predicted bone has no length: no factor could then restore the true one.
    """
    length = bone_length(joints)
    none = length < SHORTEST_BONE
    return (bone_length(true_joints) / length.masked_fill(none, 1)).masked_fill(none, 1)
