"""Rotation conversions as pure functions: axis-angle, matrices, quaternions, 6D.

Leading axes are arbitrary; values and gradients are finite at the singular points. Matrices rotate column vectors.
The derivatives of axis-angle and unit vectors are written out: autograd's call two to three times as many operators,
which on a GPU cost more than the arithmetic. Where a further derivative or a transform of torch.func is asked for,
autograd's serve.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

_SHORTEST = 1e-8
_HALF = (torch.float16, torch.bfloat16)  # LAPACK computes in float32 at least


def axis_angle_to_matrix(axis_angle: Tensor) -> Tensor:
    """Axis-angle (..., 3) rad -> rotation matrix (..., 3, 3).

    R = I + 2 (w I + U) U with the unit quaternion of the rotation: real part w, cross product matrix U of its vector
    part. Half angles, because 1 - cos t loses half its digits in float32.
    """
    if torch._C._are_functorch_transforms_active():
        return _matrix_and_parts(axis_angle)[0]
    return _AxisAngleToMatrix.apply(axis_angle)


def _matrix_and_parts(axis_angle: Tensor) -> tuple[Tensor, ...]:
    half = axis_angle / 2
    # The smallest positive number turns 0 / 0 into 1 and changes no other angle.
    angle = torch.linalg.vector_norm(half, dim=-1, keepdim=True) + torch.finfo(half.dtype).tiny
    ratio, real = angle.sin() / angle, angle.cos()
    imaginary = half * ratio
    identity = torch.eye(3, dtype=half.dtype, device=half.device)
    cross = _cross_products(identity, imaginary)
    matrix = torch.add(identity, torch.addcmul(cross, real[..., None], identity) @ cross, alpha=2)
    return matrix, half, angle, ratio, real, imaginary


class _AxisAngleToMatrix(torch.autograd.Function):
    @staticmethod
    def forward(ctx, axis_angle: Tensor) -> Tensor:
        computed = _matrix_and_parts(axis_angle)
        ctx.save_for_backward(axis_angle, *computed)
        return computed[0]

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        """A change dr of the rotation vector r turns R by J(r)^T dr, in the frame that R leads from, with

        J(r) v = s v + (1 - s) u (u . v) + (1 - cos t) / t^2 r x v, t = |r|, u = r / t, s = sin t / t (Sola et al., "A
        micro Lie theory for state estimation in robotics", 2018, eqs. 143 and 145).
        """
        axis_angle, matrix, half, angle, ratio, real, imaginary = ctx.saved_tensors
        if torch.is_grad_enabled():
            return _differentiable(_matrix_and_parts, axis_angle, gradient)
        local = matrix.mT @ gradient
        turn = _vee(local - local.mT).to(half.dtype)  # autocast may have changed it
        straight, axis = ratio * real, half / angle
        along = (1 - straight) * (axis * turn).sum(-1, keepdim=True)
        across = torch.linalg.cross(ratio * imaginary, turn)
        return torch.addcmul(torch.addcmul(across, straight, turn), along, axis)


def cross_product_matrix(vector: Tensor) -> Tensor:
    """Vector v (..., 3) -> skew-symmetric matrix K (..., 3, 3) with K x = v x x."""
    return _cross_products(torch.eye(3, dtype=vector.dtype, device=vector.device), vector)


def _cross_products(identity: Tensor, vector: Tensor) -> Tensor:
    return torch.linalg.cross(identity.expand(*vector.shape[:-1], 3, 3), vector[..., None, :])  # row i: e_i x v


def _vee(skew: Tensor) -> Tensor:
    """Inverse of ``cross_product_matrix``."""
    return torch.stack([skew[..., 2, 1], skew[..., 0, 2], skew[..., 1, 0]], -1)


def matrix_to_axis_angle(matrix: Tensor) -> Tensor:
    """Rotation matrix (..., 3, 3) -> axis-angle (..., 3) rad, angle in [0, pi], via a quaternion (Shepperd 1978)."""
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
    """Rotation matrix (..., 3, 3) -> unit quaternion (..., 4), real part first."""
    m = matrix.flatten(-2).unbind(-1)
    diagonal = torch.stack(
        [1 + m[0] + m[4] + m[8], 1 + m[0] - m[4] - m[8], 1 - m[0] + m[4] - m[8], 1 - m[0] - m[4] + m[8]], -1
    )  # 4 * q_i^2
    # Row i is 4 * q_i * q: each is correct, the one with the largest q_i is well-conditioned.
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
    """6D representation (..., 6) -> rotation matrix (..., 3, 3), sharing the error between both vectors a and b.

    m = norm(a + b), o = norm(a - b) after normalising a and b; columns are x = norm(m + o), y = norm(m - o),
    z = norm(x x y). For zero or parallel vectors, some columns are zero: see ``unit_vectors``.
    """
    a, b = unit_vectors(six.unflatten(-1, (2, 3))).unbind(-2)
    middle, outer = unit_vectors(torch.stack([a + b, a - b], -2)).unbind(-2)
    x, y = middle + outer, middle - outer
    return unit_vectors(torch.stack([x, y, torch.linalg.cross(x, y)], -2)).mT


def gram_schmidt_6d_to_matrix(six: Tensor) -> Tensor:
    """6D representation (..., 6) -> rotation matrix (..., 3, 3) by Gram-Schmidt (Zhou et al., CVPR 2019).

    Columns are x = norm(a), z = norm(x x b), y = z x x. For zero or parallel vectors, some are zero.
    """
    a, b = six.unflatten(-1, (2, 3)).unbind(-2)
    x = unit_vectors(a)
    z = unit_vectors(torch.linalg.cross(x, b))
    return torch.stack([x, torch.linalg.cross(z, x), z], -1)


def nearest_rotation(matrix: Tensor) -> Tensor:
    """Project matrices (..., 3, 3) onto the nearest rotations in the Frobenius norm (Kabsch 1976).

    The gradient is computed in closed form, because that of the SVD is undefined where singular values coincide, as
    they do for every rotation. There is no second derivative. Matrices that are not finite yield NaN.
    """
    if matrix.dtype in _HALF:
        return nearest_rotation(matrix.float()).to(matrix.dtype)
    rotation, scale, right = polar_decomposition(matrix.detach())
    finite = matrix.isfinite().all(-1).all(-1)[..., None, None]
    if not matrix.requires_grad:
        return torch.where(finite, rotation, math.nan)
    # With M = R S, a change dM turns R by the vector w = (tr(S) I - S)^-1 vee(R^T dM - dM^T R).
    symmetric = right.mT @ (scale[..., None] * right)
    identity = torch.eye(3, dtype=matrix.dtype, device=matrix.device)
    inertia = scale.sum(-1)[..., None, None] * identity - symmetric
    local = rotation.mT @ (matrix - matrix.detach())  # zero; carries the gradient
    vee = _vee(local - local.mT)
    # Directions in which a change turns nothing but rounding errors have no gradient.
    inverse = torch.linalg.pinv(inertia, atol=_SHORTEST, rtol=3 * torch.finfo(matrix.dtype).eps, hermitian=True)
    turn = (inverse @ vee[..., None]).squeeze(-1)
    return rotation + rotation @ cross_product_matrix(turn)


def polar_decomposition(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Decompose matrices M (..., 3, 3) as R V^T diag(s) V with a rotation R.

    -> R (..., 3, 3), s (..., 3), V (..., 3, 3). s are the singular values, the last one negative if det M < 0. Matrices
    that are not finite, which the SVD refuses, are decomposed as 0.
    """
    finite = matrix.isfinite().all(-1).all(-1)[..., None, None]
    left, singular, right = torch.linalg.svd(torch.where(finite, matrix, 0))
    sign = torch.ones_like(singular)
    sign[..., 2] = torch.linalg.det(left @ right).sign()
    return (left * sign[..., None, :]) @ right, singular * sign, right


def unit_vectors(vectors: Tensor) -> Tensor:
    """Scale vectors (..., N) to length 1; those shorter than 1e-8 become 0.

    Their direction means nothing, so they have no gradient. A bound on the length, as in ``F.normalize``, would
    multiply it by 1e8, from which the moments of Adam recover only after thousands of steps.
    """
    if torch._C._are_functorch_transforms_active():
        return _units_and_lengths(vectors)[0]
    return _UnitVectors.apply(vectors)


def _units_and_lengths(vectors: Tensor) -> tuple[Tensor, Tensor]:
    length = F.threshold(torch.linalg.vector_norm(vectors, dim=-1, keepdim=True), _SHORTEST, math.inf)
    return vectors / length, length


class _UnitVectors(torch.autograd.Function):
    @staticmethod
    def forward(ctx, vectors: Tensor) -> Tensor:
        unit, length = _units_and_lengths(vectors)
        ctx.save_for_backward(vectors, unit, length)
        return unit

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        vectors, unit, length = ctx.saved_tensors
        if torch.is_grad_enabled():
            return _differentiable(_units_and_lengths, vectors, gradient)
        along = (gradient * unit).sum(-1, keepdim=True)
        return torch.addcmul(gradient, along, unit, value=-1) / length


def _differentiable(function: Callable[[Tensor], tuple[Tensor, ...]], values: Tensor, gradient: Tensor) -> Tensor:
    """The gradient through the first result of ``function``, by autograd: it will be differentiated, too."""
    return torch.autograd.grad(function(values)[0], values, gradient, create_graph=True)[0]
