"""Fit hand parameters to measured 3D joints by batched Levenberg-Marquardt with analytic derivatives.

Only 21 points of the hand are evaluated (16 chain joints, 5 fingertips), so the surface is never skinned. The Jacobian
is kinematic: turning joint j by a small vector w moves each of its descendant points by w x (point - joint).
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from manopth.alignment import align
from manopth.assets import HandModel
from manopth.errors import ManoError
from manopth.lbs import forward_kinematics
from manopth.rotations import axis_angle_to_matrix, cross_product_matrix, matrix_to_axis_angle
from manopth.tables import CHAIN_PARENTS, MANO_TO_JOINTS, RIGHT, SIDES, TIP_VERTICES

# Standard deviation of each residual; the fit minimises the sum of (residual / sigma)^2.
JOINT_SIGMA = 0.003  # m, annotation noise plus model error
HUBER_SIGMAS = 3.0  # larger errors cost linearly, so that one outlier cannot bend the whole hand
SHAPE_SIGMA = 1.0  # betas are in standard deviations
# Degrees of (flexion, spread, twist) about the mean pose, for the three joints of a finger from base to tip. The twist
# of a straight finger does not move any joint, so only this prior determines it; the outer two joints are hinges.
FINGER_SIGMAS = ((70.0, 14.0, 8.0), (70.0, 4.0, 5.0), (70.0, 4.0, 5.0))
THUMB_SIGMAS = ((35.0, 35.0, 15.0), (45.0, 15.0, 10.0), (60.0, 5.0, 6.0))
# Soft limits of flexion from the flat hand, degrees.
FINGER_LIMITS = ((-40.0, 110.0), (-10.0, 125.0), (-15.0, 100.0))
THUMB_LIMITS = ((-90.0, 90.0), (-60.0, 90.0), (-45.0, 100.0))
LIMIT_SIGMA = 4.0

PALM_JOINTS = (0, 1, 5, 9, 13, 17)  # nearly rigid, so they determine the wrist pose
MIN_VALID_JOINTS = 10
MIN_VALID_PALM_JOINTS = 3
MAX_ITERATIONS = 60
TOLERANCE = (
    1e-4  # relative change of the objective at which a subject (or, with known betas, a time step) has converged
)
INITIAL_DAMPING = 1e-2

_THUMB_JOINTS = (13, 14, 15)
# For chain joints 1..15: the point at the far end of the bone, in chain order (16 joints, then 5 tips).
_FAR_END = (2, 3, 17, 5, 6, 18, 8, 9, 20, 11, 12, 19, 14, 15, 16)
_BELOW = np.eye(16, dtype=bool)  # [j, k]: chain joint k is j or a descendant of j
for _joint in range(15, 0, -1):
    _BELOW[CHAIN_PARENTS[_joint]] |= _BELOW[_joint]
for _joint in range(1, 16):
    _BELOW[:, _joint] |= _BELOW[:, CHAIN_PARENTS[_joint]]
_CHAIN_ORDER = np.argsort(MANO_TO_JOINTS)  # the 21 joints -> chain order


class HandParameters(NamedTuple):
    """Pose, shape and placement of both hands at B time steps; axis 1 is the hand, 0 left and 1 right."""

    root: Tensor  # (B, 2, 3, 3) rotation about the wrist
    pose: Tensor  # (B, 2, 15, 3) axis-angle relative to the flat hand
    betas: Tensor  # (B, 2, 10)
    trans: Tensor  # (B, 2, 3) m, added after the rotation


class PointModel(NamedTuple):
    """The hand model reduced to 21 points, with a pose prior; axis 0 is the hand. float64, metres and radians."""

    joints: Tensor  # (2, 16, 3) at rest
    joint_shape: Tensor  # (2, 16, 3, 10)
    tips: Tensor  # (2, 5, 3)
    tip_shape: Tensor  # (2, 5, 3, 10)
    tip_pose: Tensor  # (2, 5, 3, 135)
    tip_weights: Tensor  # (2, 5, 16)
    pose_mean: Tensor  # (2, 15, 3)
    pose_precision: Tensor  # (2, 15, 3, 3)
    flexion_axis: Tensor  # (2, 15, 3)
    flexion_limits: Tensor  # (15, 2)
    below: Tensor  # (16, 16) 1 where the second chain joint is the first or a descendant of it

    @classmethod
    def from_models(cls, models: tuple[HandModel, HandModel], device: torch.device | str = 'cpu') -> 'PointModel':
        """Reduce the (left, right) hand models."""
        tip_ids = list(TIP_VERTICES)

        def stack(array_of: Callable[[HandModel], np.ndarray]) -> Tensor:
            return torch.from_numpy(np.stack([array_of(model) for model in models])).double().to(device)

        frames = stack(finger_frames)
        sigmas = torch.tensor([THUMB_SIGMAS if base >= 13 else FINGER_SIGMAS for base in (1, 4, 7, 10, 13)])
        precision = sigmas.double().deg2rad().pow(-2).flatten(0, 1).to(device)
        limits = torch.tensor([THUMB_LIMITS if base >= 13 else FINGER_LIMITS for base in (1, 4, 7, 10, 13)])
        return cls(
            joints=stack(lambda m: m.joint_regressor @ m.template),
            joint_shape=stack(lambda m: np.einsum('jv,vck->jck', m.joint_regressor, m.shape_dirs)),
            tips=stack(lambda m: m.template[tip_ids]),
            tip_shape=stack(lambda m: m.shape_dirs[tip_ids]),
            tip_pose=stack(lambda m: m.pose_dirs[tip_ids]),
            tip_weights=stack(lambda m: m.skinning_weights[tip_ids]),
            pose_mean=stack(lambda m: m.pose_mean.reshape(15, 3)),
            pose_precision=frames.mT @ (precision[..., None] * frames),
            flexion_axis=frames[..., 0, :],
            flexion_limits=limits.double().deg2rad().flatten(0, 1).to(device),
            below=torch.from_numpy(_BELOW).double().to(device),
        )


def finger_frames(model: HandModel) -> np.ndarray:
    """Anatomical axes of chain joints 1..15: (15, 3, 3), rows flexion (positive towards the palm), spread and twist.

    Derived from the geometry of the rest pose, so it works for any hand in MANO's format.
    """
    joints = model.joint_regressor @ model.template
    points = np.concatenate([joints, model.template[list(TIP_VERTICES)]])
    wrist, index, little = joints[0], joints[1], joints[7]
    palm = _unit(np.cross(index - wrist, little - wrist) * (1 if model.side == SIDES[RIGHT] else -1))
    across = _unit(little - index)
    frames = []
    for joint, far in zip(range(1, 16), _FAR_END):
        twist = _unit(points[far] - joints[joint])
        # The thumb flexes equally across the palm and towards it.
        towards = _unit(palm + across) if joint in _THUMB_JOINTS else palm
        flexion = _unit(np.cross(twist, towards))
        frames.append(np.stack([flexion, np.cross(twist, flexion), twist]))
    return np.array(frames)


def _unit(vector: np.ndarray) -> np.ndarray:
    return vector / np.linalg.norm(vector)


def fittable(valid: Tensor) -> Tensor:
    """Test whether a hand has enough valid joints, overall and on the palm, to be fitted: (..., 21) -> (...,) bool."""
    return (valid.sum(-1) >= MIN_VALID_JOINTS) & (valid[..., list(PALM_JOINTS)].sum(-1) >= MIN_VALID_PALM_JOINTS)


def place_points(model: PointModel, hands: HandParameters) -> Tensor:
    """The 21 joints (B, 2, 21, 3) m of posed hands, in the order of ``tables``."""
    return LinearisedPoints(model, hands).points[:, :, MANO_TO_JOINTS]


class LinearisedPoints:
    """The 21 points in chain order at given parameters and, on demand, their derivatives."""

    def __init__(self, model: PointModel, hands: HandParameters):
        self.model, self.pose = model, hands.pose
        self.rotations = torch.cat([hands.root[:, :, None], axis_angle_to_matrix(hands.pose)], 2)  # (B, 2, 16, 3, 3)
        betas = hands.betas
        self.rest = model.joints + torch.einsum('hjck,bhk->bhjc', model.joint_shape, betas)
        self.world, chain = forward_kinematics(self.rotations, self.rest)
        corrective = (self.rotations[:, :, 1:] - torch.eye(3).to(betas)).flatten(2)
        tips = (
            model.tips
            + torch.einsum('htck,bhk->bhtc', model.tip_shape, betas)
            + torch.einsum('htck,bhk->bhtc', model.tip_pose, corrective)
        )
        # Each tip as moved by each bone alone: (B, 2, 5 tips, 16 bones, 3).
        carried = torch.einsum('bhjcd,bhtjd->bhtjc', self.world, tips[:, :, :, None] - self.rest[:, :, None])
        self.carried = (carried + chain[:, :, None]) * model.tip_weights[..., None]
        self.chain = chain
        self.points = torch.cat([chain, self.carried.sum(3)], 2) + hands.trans[:, :, None]  # (B, 2, 21, 3)

    def by_pose(self) -> Tensor:
        """Jacobian (B, 2, 21, 3, 51): a rotation of the root in its own frame (3), axis-angle pose (45), trans (3)."""
        model, chain = self.model, self.chain
        batch = len(chain)
        # Weight of each point that descends from joint j, times its lever arm about j.
        descends = model.below.T - torch.eye(16).to(chain)  # [point, j]; a joint does not rotate about itself
        chain_lever = descends[..., None] * (chain[:, :, :, None] - chain[:, :, None])
        tip_lever = (
            torch.einsum('bhtkc,jk->bhtjc', self.carried, model.below)
            - torch.einsum('htk,jk->htj', model.tip_weights, model.below)[..., None] * chain[:, :, None]
        )
        lever = torch.cat([chain_lever, tip_lever], 2)  # (B, 2, 21, 16, 3)
        # A small change da of an axis-angle a rotates the joint by right_jacobian(a) da in its own frame.
        inner = torch.cat([torch.eye(3).to(chain).expand(batch, 2, 1, 3, 3), right_jacobian(self.pose)], 2)
        jacobian = -cross_product_matrix(lever) @ (self.world @ inner)[:, :, None]  # (B, 2, 21, 16, 3, 3)

        # The pose blend shapes of the fingertips depend on the pose, too.
        change = torch.einsum(
            'nhjab,nhjebc->nhjace', self.rotations[:, :, 1:], cross_product_matrix(inner[:, :, 1:].mT)
        )  # dR_j / da_e
        corrective = torch.einsum('htcjk,bhjke->bhtcje', model.tip_pose.unflatten(-1, (15, 9)), change.flatten(3, 4))
        skin = torch.einsum('htj,bhjcd->bhtcd', model.tip_weights, self.world)
        jacobian[:, :, 16:, 1:] += torch.einsum('bhtcd,bhtdje->bhtjce', skin, corrective)
        by_trans = torch.eye(3).to(chain).expand(batch, 2, 21, 3, 3)
        return torch.cat([jacobian.transpose(3, 4).flatten(4), by_trans], -1)

    def by_shape(self) -> Tensor:
        """Jacobian (B, 2, 21, 3, 10): betas."""
        model, batch = self.model, len(self.chain)
        joints = [model.joint_shape[:, 0].expand(batch, -1, -1, -1)]
        for joint in range(1, 16):
            parent = CHAIN_PARENTS[joint]
            bone = model.joint_shape[:, joint] - model.joint_shape[:, parent]
            joints.append(joints[parent] + self.world[:, :, parent] @ bone)
        chain = torch.stack(joints, 2)
        own = model.tip_shape[:, :, None] - model.joint_shape[:, None]  # (2, 5, 16, 3, 10)
        tips = torch.einsum('htj,bhjcd,htjdk->bhtck', model.tip_weights, self.world, own)
        return torch.cat([chain, tips + torch.einsum('htj,bhjck->bhtck', model.tip_weights, chain)], 2)


def right_jacobian(axis_angle: Tensor) -> Tensor:
    """Right Jacobian of SO(3): axis-angle a (..., 3) -> J (..., 3, 3) with exp(a + da) = exp(a) exp(J da).

    To first order in da; J = I - (1 - cos t) / t^2 K + (t - sin t) / t^3 K^2 with K the cross-product matrix of a and t
    its length.
    """
    squared = (axis_angle * axis_angle).sum(-1)[..., None, None]
    small = squared < 1e-4
    safe = torch.where(small, torch.ones_like(squared), squared)
    angle = safe.sqrt()
    versine = torch.where(small, 0.5 - squared / 24, (1 - angle.cos()) / safe)
    third = torch.where(small, 1 / 6 - squared / 120, (angle - angle.sin()) / (safe * angle))
    cross = cross_product_matrix(axis_angle)
    return torch.eye(3).to(axis_angle) - versine * cross + third * (cross @ cross)


def initial_hands(model: PointModel, joints: Tensor, valid: Tensor, betas: Tensor) -> HandParameters:
    """Initial guess: align the palm rigidly, then swing each bone onto the measured one, from base to tip.

    joints (B, 2, 21, 3) m, valid (B, 2, 21) bool, betas (B, 2, 10). Bones without two valid ends keep the mean pose.
    """
    target, seen = joints[:, :, _CHAIN_ORDER], valid[:, :, _CHAIN_ORDER]
    eye = torch.eye(3).to(joints).expand(len(joints), 2, 3, 3)
    pose = model.pose_mean.expand(len(joints), -1, -1, -1).clone()
    flat = HandParameters(eye, pose, betas, torch.zeros_like(joints[:, :, 0]))
    points = LinearisedPoints(model, flat).points
    palm = joints.new_full((21,), 0.02)  # resolves the ambiguity if the valid palm joints are collinear
    palm[list(PALM_JOINTS)] = 1
    palm_alignment = align(points, target, weight=seen * palm[_CHAIN_ORDER])
    root, trans = palm_alignment.rotation, palm_alignment.translation
    # The model rotates about the wrist, so trans is relative to its rest position, not to the origin.
    wrist = points[:, :, 0]
    trans = trans + (root @ wrist[..., None]).squeeze(-1) - wrist

    far = torch.tensor(_FAR_END, device=joints.device)
    both = seen[:, :, 1:16] & seen[:, :, far]
    goal = target[:, :, far] - target[:, :, 1:16]  # (B, 2, 15, 3)
    rest = model.joints + torch.einsum('hjck,bhk->bhjc', model.joint_shape, betas)
    ends = torch.cat([rest, model.tips + torch.einsum('htck,bhk->bhtc', model.tip_shape, betas)], 2)
    bones = ends[:, :, far] - rest[:, :, 1:]
    for level in range(3):
        here = torch.arange(level, 15, 3, device=joints.device)
        start = HandParameters(root, pose, betas, trans)
        parents = LinearisedPoints(model, start).world[:, :, [CHAIN_PARENTS[int(j) + 1] for j in here]]
        mean = axis_angle_to_matrix(model.pose_mean[:, here])
        swing = shortest_rotation(
            (mean @ bones[:, :, here, :, None]).squeeze(-1), (parents.mT @ goal[:, :, here, :, None]).squeeze(-1)
        )
        pose[:, :, here] = torch.where(both[:, :, here, None], matrix_to_axis_angle(swing @ mean), pose[:, :, here])
    return HandParameters(root, pose, betas, trans)


def shortest_rotation(source: Tensor, target: Tensor) -> Tensor:
    """Smallest rotation from the direction of source to that of target: (..., 3), (..., 3) -> (..., 3, 3)."""
    source, target = (torch.nn.functional.normalize(vector, dim=-1) for vector in (source, target))
    cross, cosine = torch.linalg.cross(source, target), (source * target).sum(-1, keepdim=True)
    sine = cross.norm(dim=-1, keepdim=True)
    return axis_angle_to_matrix(cross / sine.clamp_min(1e-9) * torch.atan2(sine, cosine))


def _objective(model: PointModel, hands: HandParameters, error: Tensor, valid: Tensor) -> Tensor:
    """Cost (B, 2): robust joint error, pose prior and flexion limits; the shape prior is added once per group."""
    scaled = error.norm(dim=-1) / JOINT_SIGMA
    huber = torch.where(scaled < HUBER_SIGMAS, scaled * scaled, HUBER_SIGMAS * (2 * scaled - HUBER_SIGMAS))
    away = hands.pose - model.pose_mean
    prior = torch.einsum('bhjc,hjcd,bhjd->bh', away, model.pose_precision, away)
    beyond = _beyond_limits(model, hands.pose) / np.radians(LIMIT_SIGMA)
    return (huber * valid).sum(-1) + prior + (beyond * beyond).sum(-1)


def _beyond_limits(model: PointModel, pose: Tensor) -> Tensor:
    """Signed violation of the flexion limits (B, 2, 15) rad."""
    flexion = (pose * model.flexion_axis).sum(-1)
    low, high = model.flexion_limits.unbind(-1)
    return (flexion - high).clamp_min(0) + (flexion - low).clamp_max(0)


def _normal_equations(
    model: PointModel, hands: HandParameters, state: LinearisedPoints, error: Tensor, valid: Tensor, *, with_shape: bool
) -> tuple[Tensor, Tensor]:
    """Gauss-Newton matrix (B, 2, P, P) and gradient (B, 2, P) of half the objective; P = 51, or 61 with the shape."""
    jacobian = state.by_pose()
    if with_shape:
        jacobian = torch.cat([jacobian, state.by_shape()], -1)
    jacobian = jacobian.flatten(2, 3)  # (B, 2, 63, P)
    scaled = error.norm(dim=-1) / JOINT_SIGMA
    weight = valid / scaled.clamp_min(HUBER_SIGMAS) * HUBER_SIGMAS / JOINT_SIGMA**2
    weight = weight.repeat_interleave(3, -1)[..., None]  # (B, 2, 63, 1)
    weighted = weight * jacobian
    matrix, gradient = jacobian.mT @ weighted, (weighted * error.flatten(2)[..., None]).sum(2)

    beyond = _beyond_limits(model, hands.pose)
    stiffness = 1 / np.radians(LIMIT_SIGMA) ** 2
    axis = model.flexion_axis
    outer = (beyond != 0)[..., None, None] * stiffness * (axis[..., None] * axis[..., None, :])
    prior = model.pose_precision + outer  # (B, 2, 15, 3, 3)
    slope = (
        torch.einsum('hjcd,bhjd->bhjc', model.pose_precision, hands.pose - model.pose_mean)
        + stiffness * beyond[..., None] * axis
    )
    for joint in range(15):
        at = slice(3 + 3 * joint, 6 + 3 * joint)
        matrix[..., at, at] += prior[:, :, joint]
    gradient[..., 3:48] += slope.flatten(2)
    return matrix, gradient


def fit_hands(
    model: PointModel, joints: Tensor, valid: Tensor, *, subject: Tensor | None = None, betas: Tensor | None = None
) -> HandParameters:
    """Fit root, pose and translation of both hands and, unless ``betas`` is given, one shape per subject.

    joints (B, 2, 21, 3) m, valid (B, 2, 21) bool, in the order of ``tables``. subject (B,) int64, counted from 0: all
    time steps and both hands of a subject share their betas (the hands of a person are taken as mirror images). betas
    (B, 2, 10) fixes the shape instead. A hand without valid joints is returned in the mean pose; ignore it.

    Raises ManoError unless exactly one of ``subject`` and ``betas`` is given.
    """
    batch, with_shape = len(joints), betas is None
    if subject is not None and betas is None:
        group, betas = subject, joints.new_zeros(batch, 2, 10)
    elif subject is None and betas is not None:
        group = torch.arange(batch, device=joints.device)
    else:
        raise ManoError(
            'fit_hands: pass either subject, to fit a shape per subject, or betas, to keep the shape fixed.'
        )
    groups = int(group.max()) + 1 if batch else 0
    hands = initial_hands(model, joints, valid, betas)
    order = torch.as_tensor(_CHAIN_ORDER, device=joints.device)
    valid = valid[:, :, order].to(joints.dtype)
    target = torch.where(valid[..., None] > 0, joints[:, :, order], 0)

    def evaluate(hands: HandParameters) -> tuple[LinearisedPoints, Tensor, Tensor]:
        state = LinearisedPoints(model, hands)
        error = torch.where(valid[..., None] > 0, state.points - target, 0)
        objective = _objective(model, hands, error, valid).sum(1)
        cost = objective.new_zeros(groups).index_add(0, group, objective)
        if with_shape:  # all rows of a group have the same betas
            shape = hands.betas.new_zeros(groups, 10).index_copy(0, group, hands.betas[:, 0])
            cost = cost + (shape / SHAPE_SIGMA).pow(2).sum(1)
        return state, error, cost

    rows = torch.arange(batch, device=joints.device)  # time steps that have not converged
    finished = HandParameters(*(value.clone() for value in hands))
    converged = torch.zeros(groups, dtype=torch.bool, device=joints.device)
    damping = joints.new_full((groups,), INITIAL_DAMPING)
    state, error, cost = evaluate(hands)
    for _ in range(MAX_ITERATIONS):
        matrix, gradient = _normal_equations(model, hands, state, error, valid, with_shape=with_shape)
        diagonal = torch.diagonal(matrix, dim1=-2, dim2=-1)
        diagonal += damping[group, None, None] * diagonal + 1e-9
        step = _solve_grouped(matrix, gradient, group, groups, hands.betas) if with_shape else _solve(matrix, gradient)
        candidate = HandParameters(
            hands.root @ axis_angle_to_matrix(step[..., :3]),
            hands.pose + step[..., 3:48].unflatten(-1, (15, 3)),
            hands.betas + step[..., 51:] if with_shape else hands.betas,
            hands.trans + step[..., 48:51],
        )
        new_state, new_error, new_cost = evaluate(candidate)
        better = (new_cost < cost) & ~converged
        converged |= (cost - new_cost).abs() <= TOLERANCE * cost
        damping = torch.where(better, damping * 0.2, damping * 5).clamp(1e-7, 1e7)
        keep = better[group]
        hands = HandParameters(
            *(torch.where(keep.view(-1, *[1] * (old.ndim - 1)), new, old) for new, old in zip(candidate, hands))
        )
        cost = torch.where(better, new_cost, cost)

        active = ~converged[group]
        if not active.any():
            break
        if active.sum() < 0.8 * len(rows):  # drop converged rows, so that a few slow hands do not hold up the rest
            for all_rows, values in zip(finished, hands):
                all_rows[rows] = values
            rows, group, valid, target = rows[active], group[active], valid[active], target[active]
            hands = HandParameters(*(values[active] for values in hands))
            state, error, _ = evaluate(hands)
        else:
            state, error = (new_state, new_error) if keep.all() else evaluate(hands)[:2]
    for all_rows, values in zip(finished, hands):
        all_rows[rows] = values
    return finished


def _solve(matrix: Tensor, gradient: Tensor) -> Tensor:
    return -torch.cholesky_solve(gradient[..., None], torch.linalg.cholesky(matrix)).squeeze(-1)


def _solve_grouped(matrix: Tensor, gradient: Tensor, group: Tensor, groups: int, betas: Tensor) -> Tensor:
    """Step (B, 2, 61) whose last 10 parameters are shared within a group, by the Schur complement onto the shape."""
    factor = torch.linalg.cholesky(matrix[..., :51, :51])
    mixed = torch.cat([matrix[..., :51, 51:], gradient[..., :51, None]], -1)
    solved = torch.cholesky_solve(mixed, factor)  # (B, 2, 51, 11)
    shape = torch.cat([matrix[..., 51:, 51:], gradient[..., 51:, None]], -1) - matrix[..., 51:, :51] @ solved
    total = shape.new_zeros(groups, 10, 11).index_add(0, group, shape.sum(1))
    prior = 1 / SHAPE_SIGMA**2
    total[:, :, :10] += prior * torch.eye(10).to(total)
    total[:, :, 10].index_copy_(0, group, total[group, :, 10] + prior * betas[:, 0])
    by_shape = -torch.linalg.solve(total[..., :10], total[..., 10:])[group][:, None]  # (B, 1, 10, 1)
    by_pose = -(solved[..., 10:] + solved[..., :10] @ by_shape)
    return torch.cat([by_pose, by_shape.expand(-1, 2, -1, -1)], -2).squeeze(-1)
