"""Place predicted hands in front of the camera, in metres.

The network predicts each hand relative to its root joint, a weak-perspective camera for it (uv = scale * xy + shift),
and the vector from the left root to the right one. Together with the intrinsics of the image, these determine the one
unknown: the position of the left root.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from utils.geometry import CROP_SIZE, project, to_uv
from utils.hand import HAND_SCALE

NEAREST, FARTHEST = 0.1, 20.0  # m: bounds of the left root's depth, for untrained networks
STEPS = 12


class Placement(NamedTuple):
    """Positions of both hands in front of the camera."""

    roots: Tensor  # (B, 2, 3) m, camera axes: the hands' root joints
    residual_px: Tensor  # (B,) pixels of the 256 crop, RMS distance of the placed joints from the predicted ones


def relative_roots(offset: Tensor) -> Tensor:
    """Predicted offset (B, 3), right root - left root in HAND_SCALE -> roots (B, 2, 3) m, the left one at 0."""
    return torch.stack([torch.zeros_like(offset), offset * HAND_SCALE], 1)


def counted_hands(present: Tensor) -> Tensor:
    """The hands that place, box and size are taken of: (..., 2) bool, those present, or both where none is."""
    return present | ~present.any(-1, keepdim=True)


@torch.no_grad()
def place_hands(
    joints: Tensor, camera: Tensor, offset: Tensor, intrinsics: Tensor, *, counted: Tensor | None = None
) -> Placement:
    """Find the root positions whose perspective projection fits the predicted weak-perspective cameras best.

    joints (B, 2, 21, 3) m, root-relative; camera (B, 2, 3) scale and shift (right, down), uv = scale * xy + shift in
    [-1, 1] of the crop; offset (B, 3) in HAND_SCALE; intrinsics (B, 3, 3) of the crop, pixels. counted: (B, 2) bool,
    at least one of each sample; the other hand has no influence, and its root is put where the counted one's is.
    None: all.

    A trained camera approximates the weak-perspective camera nearest to the true projection. So the fit minimises only
    that part of the difference between the two projections which some weak-perspective camera could explain. For true
    hands and their nearest cameras it is zero at the true position, however strong the perspective. Gauss-Newton over
    three unknowns, in float64.
    """
    joints, camera, offset, intrinsics = (x.double() for x in (joints, camera, offset, intrinsics))
    weight = joints.new_ones(joints.shape[:2])
    if counted is not None:
        weight = counted.to(joints)
        offset = torch.where(counted.all(1, keepdim=True), offset, 0.0)
    seen = camera[..., None, :1] * joints[..., :2] + camera[..., None, 1:]  # (B, 2, 21, 2)
    explained, _ = torch.linalg.qr(_camera_space(joints))  # (B, 2, 42, 3)
    points = joints + relative_roots(offset)[:, :, None]
    rows = to_uv_rows(intrinsics)
    place = _first_guess(camera, offset, rows, weight)
    for _ in range(STEPS):
        uv, slopes = _project_with_slopes(points + place[:, None, None], rows)
        error = weight[..., None, None] * (explained.transpose(-1, -2) @ (uv - seen).flatten(2)[..., None])
        jacobian = weight[..., None, None] * (explained.transpose(-1, -2) @ slopes.flatten(2, 3))  # (B, 2, 3, 3)
        place = place + _bounded_step(jacobian.flatten(1, 2), -error.flatten(1, 2), place[:, 2:])
    roots = relative_roots(offset) + place[:, None]
    pixels = project(_before_the_camera(points + place[:, None, None]), intrinsics[:, None])
    squared = (to_uv(pixels) - seen).square().sum(-1).mean(2)  # (B, 2)
    apart = _weighted_mean(squared, weight).sqrt() * CROP_SIZE / 2
    return Placement(roots.float(), apart.float())


def nearest_camera(points: Tensor, uv: Tensor) -> Tensor:
    """Least-squares weak-perspective camera: points (..., N, 3), uv (..., N, 2) -> (..., 3) scale, shift."""
    columns = _camera_space(points)
    return torch.linalg.lstsq(columns, uv.flatten(-2)[..., None]).solution.squeeze(-1)


def _camera_space(points: Tensor) -> Tensor:
    """(..., N, 3) -> (..., 2 N, 3): derivatives of uv by a weak-perspective camera's scale and shifts."""
    ones, zeros = torch.ones_like(points[..., 0]), torch.zeros_like(points[..., 0])
    return torch.stack([points[..., :2], torch.stack([ones, zeros], -1), torch.stack([zeros, ones], -1)], -1).flatten(
        -3, -2
    )


def to_uv_rows(intrinsics: Tensor) -> Tensor:
    """Intrinsics (B, 3, 3) of the crop in pixels -> those that project to uv in [-1, 1]."""
    change = intrinsics.new_tensor([[2 / CROP_SIZE, 0, -1], [0, 2 / CROP_SIZE, -1], [0, 0, 1]])
    return change @ intrinsics


def _weighted_mean(values: Tensor, weight: Tensor) -> Tensor:
    """Mean over the hands: (B, 2) twice -> (B,)."""
    return (values * weight).sum(1) / weight.sum(1)


def _first_guess(camera: Tensor, offset: Tensor, rows: Tensor, weight: Tensor) -> Tensor:
    """Left root (B, 3): each hand placed alone by its scale (depth) and shift (direction), then averaged."""
    focal = torch.linalg.det(rows[:, :2, :2]).abs().sqrt()[:, None]
    depth = (focal / camera[..., 0].clamp_min(1e-6)).clamp(NEAREST, FARTHEST)  # (B, 2)
    ray = torch.cat([camera[..., 1:], torch.ones_like(camera[..., :1])], -1)
    ray = torch.linalg.solve(rows[:, None], ray[..., None]).squeeze(-1)
    each = ray / ray[..., 2:] * depth[..., None] - relative_roots(offset)
    place = torch.stack([_weighted_mean(each[..., axis], weight) for axis in range(3)], -1)
    return torch.cat([place[:, :2], place[:, 2:].clamp(NEAREST, FARTHEST)], -1)


def _before_the_camera(points: Tensor) -> Tensor:
    """Move points at or behind the camera just in front of it: an untrained offset can put a hand there."""
    return torch.cat([points[..., :2], points[..., 2:].clamp_min(NEAREST / 4)], -1)


def _project_with_slopes(points: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Project points (B, 2, N, 3) -> uv (B, 2, N, 2), its derivatives by the points (B, 2, N, 2, 3)."""
    image = _before_the_camera(points) @ rows[:, None].transpose(-1, -2)
    uv = image[..., :2] / image[..., 2:]
    rows = rows[:, None, None]
    return uv, (rows[..., :2, :] - uv[..., None] * rows[..., 2:, :]) / image[..., 2:, None]


def _bounded_step(jacobian: Tensor, wanted: Tensor, depth: Tensor) -> Tensor:
    """Least-squares step (B, 3) for jacobian (B, 6, 3), wanted change (B, 6, 1), at depth (B, 1).

    Bounded: it at most halves or doubles the depth, since the linear model is poor far from the solution, and stays
    within NEAREST and FARTHEST; right and down are then solved for at that depth.
    """
    transposed = jacobian.transpose(-1, -2)
    matrix, right_side = transposed @ jacobian, transposed @ wanted
    damping = 1e-9 * matrix.diagonal(dim1=-2, dim2=-1).sum(-1)[:, None, None]
    matrix = matrix + damping * torch.eye(3, device=matrix.device, dtype=matrix.dtype)
    free = torch.linalg.solve_ex(matrix, right_side)[0].squeeze(-1).nan_to_num(0)
    new = torch.minimum(torch.maximum(depth + free[:, 2:], depth / 2), depth * 2).clamp(NEAREST, FARTHEST)
    forward = new - depth
    beside = torch.linalg.solve_ex(matrix[:, :2, :2], right_side[:, :2] - matrix[:, :2, 2:] * forward[..., None])[0]
    return torch.cat([beside.squeeze(-1).nan_to_num(0), forward], -1)
