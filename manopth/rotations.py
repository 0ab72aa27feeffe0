"""Rotations as pure functions; leading axes are free, everything is differentiable and safe at the singular points."""

import torch
import torch.nn.functional as F
from torch import Tensor

_SMALL = 1e-3  # rad^2: below it the series is exact to float64 rounding and the closed form is 0 / 0


def axis_angle_to_matrix(axis_angle: Tensor) -> Tensor:
    """(..., 3) rad -> (..., 3, 3). Rodrigues' formula, R = I + sin(t)/t K + (1 - cos t)/t^2 K^2, finite at t = 0."""
    squared = (axis_angle * axis_angle).sum(-1)[..., None, None]
    small = squared < _SMALL
    safe = torch.where(small, torch.ones_like(squared), squared)
    angle = safe.sqrt()
    sinc = torch.where(small, 1 - squared / 6 * (1 - squared / 20 * (1 - squared / 42)), angle.sin() / angle)
    # (1 - cos t) / t^2 loses half its digits in float32; 2 sin^2(t / 2) / t^2 does not.
    versine = torch.where(
        small, 0.5 - squared / 24 * (1 - squared / 30 * (1 - squared / 56)), 2 * (angle / 2).sin() ** 2 / safe
    )
    cross = cross_product_matrix(axis_angle)
    return torch.eye(3, dtype=axis_angle.dtype, device=axis_angle.device) + sinc * cross + versine * (cross @ cross)


def cross_product_matrix(vector: Tensor) -> Tensor:
    """(..., 3) -> (..., 3, 3) with ``K @ x = vector x x``."""
    x, y, z = vector.unbind(-1)
    zero = torch.zeros_like(x)
    return torch.stack([zero, -z, y, z, zero, -x, -y, x, zero], -1).unflatten(-1, (3, 3))


def matrix_to_axis_angle(matrix: Tensor) -> Tensor:
    """(..., 3, 3) -> (..., 3) rad, angle in [0, pi], by way of a quaternion (Shepperd 1978)."""
    quaternion = matrix_to_quaternion(matrix)
    quaternion = torch.where(quaternion[..., :1] < 0, -quaternion, quaternion)
    real, vector = quaternion[..., :1], quaternion[..., 1:]
    length = vector.norm(dim=-1, keepdim=True)
    small = length < 1e-6
    factor = torch.where(
        small,
        2 / real.clamp_min(0.5),
        2 * torch.atan2(length, real) / torch.where(small, torch.ones_like(length), length),
    )
    return vector * factor


def matrix_to_quaternion(matrix: Tensor) -> Tensor:
    """(..., 3, 3) -> (..., 4) unit quaternion, real part first."""
    m = matrix.flatten(-2).unbind(-1)
    diagonal = torch.stack(
        [1 + m[0] + m[4] + m[8], 1 + m[0] - m[4] - m[8], 1 - m[0] + m[4] - m[8], 1 - m[0] - m[4] + m[8]], -1
    )  # 4 * q_i^2
    # Row i is q * 4 * q_i: each is right, the one with the largest q_i is well-conditioned.
    rows = torch.stack(
        [
            diagonal[..., 0],
            m[7] - m[5],
            m[2] - m[6],
            m[3] - m[1],
            m[7] - m[5],
            diagonal[..., 1],
            m[3] + m[1],
            m[2] + m[6],
            m[2] - m[6],
            m[3] + m[1],
            diagonal[..., 2],
            m[7] + m[5],
            m[3] - m[1],
            m[2] + m[6],
            m[7] + m[5],
            diagonal[..., 3],
        ],
        -1,
    ).unflatten(-1, (4, 4))
    best = diagonal.argmax(-1)[..., None, None].expand(*diagonal.shape[:-1], 1, 4)
    return F.normalize(rows.gather(-2, best).squeeze(-2), dim=-1)


def symmetric_6d_to_matrix(six: Tensor) -> Tensor:
    """(..., 6) -> (..., 3, 3): two vectors a, b placed symmetrically about the first two axes' bisector.

    m = norm(a + b), o = norm(a - b) after normalising a and b; columns are x = norm(m + o), y = norm(m - o),
    z = norm(x x y). Lengths are clamped at 1e-8, which keeps zero and parallel inputs finite, their gradients too.
    """
    a, b = (_unit(part) for part in six.unflatten(-1, (2, 3)).unbind(-2))
    middle, outer = _unit(a + b), _unit(a - b)
    x, y = _unit(middle + outer), _unit(middle - outer)
    return torch.stack([x, y, _unit(torch.linalg.cross(x, y))], -1)


def gram_schmidt_6d_to_matrix(six: Tensor) -> Tensor:
    """(..., 6) -> (..., 3, 3): columns x = norm(a), z = norm(x x b), y = z x x (Zhou et al., CVPR 2019)."""
    a, b = six.unflatten(-1, (2, 3)).unbind(-2)
    x = _unit(a)
    z = _unit(torch.linalg.cross(x, b))
    return torch.stack([x, torch.linalg.cross(z, x), z], -1)


def _unit(vector: Tensor) -> Tensor:
    return F.normalize(vector, dim=-1, eps=1e-8)
