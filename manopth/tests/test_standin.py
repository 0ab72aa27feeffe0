"""The stand-in hand: MANO's sizes and conventions, a valid mesh, plausible shapes and poses."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from manopth import ManoError, standin
from manopth.assets import HandModel
from manopth.lbs import HandArrays, linear_blend_skinning
from manopth.rotations import axis_angle_to_matrix
from manopth.standin import FLEXION_LIMITS, SPREAD_LIMITS, TWIST_LIMITS, pose_from_angles, standin_hand, standin_pair
from manopth.tables import CHAIN_PARENTS, FINGERS, PUBLISHED_LEFT_MIDDLE_TIP, SIDES, TIP_VERTICES

CHAINS = {'index': (1, 2, 3), 'middle': (4, 5, 6), 'little': (7, 8, 9), 'ring': (10, 11, 12), 'thumb': (13, 14, 15)}
TIP_OF = dict(zip(FINGERS, TIP_VERTICES, strict=True))
FLAT = np.zeros(45)
FIST = np.radians([[20, 30, 30], [80, 97, 60], [82, 97, 60], [82, 97, 60], [82, 92, 60]])
PINCH = np.radians([[22, 22, 18], [48, 50, 25], [35, 40, 20], [28, 35, 18], [25, 32, 15]])
PINCH_SPREAD, PINCH_TWIST = np.radians([4, 0, 0, 0, 0]), np.radians([16, 0, 0, 0, 0])


@pytest.fixture(params=SIDES)
def hand(request) -> HandModel:
    return standin_hand(request.param)


@pytest.fixture
def right() -> HandModel:
    return standin_hand('right')


def posed(hand: HandModel, pose: np.ndarray, betas: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """pose (N, 45), betas (N, 10) -> vertices (N, 778, 3), chain joints (N, 16, 3)."""
    pose = np.atleast_2d(pose)
    betas = np.zeros((len(pose), 10)) if betas is None else np.atleast_2d(betas)
    rotations = axis_angle_to_matrix(torch.from_numpy(np.pad(pose, ((0, 0), (3, 0))).reshape(-1, 1, 16, 3)))
    vertices, joints = linear_blend_skinning(
        HandArrays.from_models((hand,), torch.float64), rotations, torch.from_numpy(betas)[:, None]
    )
    return vertices[:, 0].numpy(), joints[:, 0].numpy()


def right_pose(flexion, spread=None, twist=None) -> np.ndarray:
    spread = np.zeros(np.shape(flexion)[:-1]) if spread is None else spread
    return pose_from_angles(flexion, spread, twist=twist, side='right')


def directed_edges(faces: np.ndarray) -> np.ndarray:
    return np.stack([faces, np.roll(faces, -1, 1)], -1).reshape(-1, 2)


def boundary_loop(faces: np.ndarray) -> list[int]:
    edges = set(map(tuple, directed_edges(faces).tolist()))
    following = {a: b for a, b in edges if (b, a) not in edges}
    loop = [min(following)]
    while following[loop[-1]] != loop[0]:
        loop.append(following[loop[-1]])
    assert len(loop) == len(following), 'more than one boundary loop'
    return loop


def capped(hand: HandModel) -> np.ndarray:
    loop = boundary_loop(hand.faces)
    cap = [(loop[0], loop[i + 1], loop[i]) for i in range(1, len(loop) - 1)]
    return np.concatenate([hand.faces, cap])


def winding_number(points: np.ndarray, vertices: np.ndarray, faces: np.ndarray) -> np.ndarray:
    """Winding number (N,): 1 inside a closed mesh, 0 outside (van Oosterom and Strackee 1983)."""
    corners = vertices[faces][None] - points[:, None, None]
    a, b, c = corners[:, :, 0], corners[:, :, 1], corners[:, :, 2]
    la, lb, lc = (np.linalg.norm(x, axis=-1) for x in (a, b, c))
    triple = (a * np.cross(b, c)).sum(-1)
    real = la * lb * lc + (a * b).sum(-1) * lc + (b * c).sum(-1) * la + (c * a).sum(-1) * lb
    return np.arctan2(triple, real).sum(1) / (2 * np.pi)


def face_normals(vertices: np.ndarray, faces: np.ndarray) -> np.ndarray:
    a, b, c = (vertices[..., faces[:, k], :] for k in range(3))
    return np.cross(b - a, c - a)


def vertex_normals(vertices: np.ndarray, faces: np.ndarray) -> np.ndarray:
    normals = np.zeros_like(vertices)
    for k in range(3):
        np.add.at(normals, faces[:, k], face_normals(vertices, faces))
    return normals / np.linalg.norm(normals, axis=1, keepdims=True)


def self_intersections(vertices: np.ndarray, faces: np.ndarray) -> int:
    """Count the intersecting (edge, face) pairs that share no vertex."""
    edges = np.unique(np.sort(directed_edges(faces), 1), axis=0)
    p, q = vertices[edges[:, 0]], vertices[edges[:, 1]]
    triangles = vertices[faces]
    e, f = np.nonzero(
        (np.minimum(p, q)[:, None] <= triangles.max(1)).all(-1)
        & (np.maximum(p, q)[:, None] >= triangles.min(1)).all(-1)
    )
    apart = (edges[e][:, :, None] != faces[f][:, None]).all((1, 2))
    e, f = e[apart], f[apart]
    (a, b, c), p, q = triangles[f].transpose(1, 0, 2), p[e], q[e]

    def volume(w, x, y, z):
        return ((x - w) * np.cross(y - w, z - w)).sum(-1)

    through = volume(p, a, b, c) * volume(q, a, b, c) < 0
    s = np.sign([volume(p, q, a, b), volume(p, q, b, c), volume(p, q, c, a)])
    return int((through & (abs(s.sum(0)) == 3)).sum())


def test_arrays_have_the_shapes_of_mano(hand):
    for name, shape in HandModel.SHAPES.items():
        array = getattr(hand, name)
        assert array.shape == shape
        assert array.dtype == (np.int64 if name == 'faces' else np.float64)
        assert np.isfinite(array).all()
    assert standin_pair()[SIDES.index(hand.side)] is hand


def test_mesh_is_a_disc_bounded_by_the_wrist(hand):
    edges = directed_edges(hand.faces)
    assert len(np.unique(edges, axis=0)) == len(edges), 'faces disagree in orientation'
    undirected, counts = np.unique(np.sort(edges, 1), axis=0, return_counts=True)
    assert counts.max() == 2
    assert 778 - len(undirected) + len(hand.faces) == 1
    reached = {0}
    neighbours = {}
    for a, b in edges.tolist():
        neighbours.setdefault(a, set()).add(b)
        neighbours.setdefault(b, set()).add(a)
    frontier = [0]
    while frontier:
        frontier = list(set().union(*(neighbours[i] for i in frontier)) - reached)
        reached.update(frontier)
    assert len(reached) == 778
    loop = boundary_loop(hand.faces)
    assert len(loop) == 16
    sign = 1 if hand.side == 'right' else -1
    rest_wrist = (hand.joint_regressor @ hand.template)[0]
    assert (sign * (hand.template[loop, 0] - rest_wrist[0]) > 0.01).all()
    assert (hand.skinning_weights[loop, 0] == 1).all()
    # The faces around every vertex form a single fan.
    for vertex in range(778):
        around = hand.faces[(hand.faces == vertex).any(1)]
        corners = [np.roll(face, -int(np.flatnonzero(face == vertex)[0])) for face in around]
        following = {int(face[1]): int(face[2]) for face in corners}
        start = next(iter(set(following) - set(following.values())), next(iter(following)))
        steps, place = 0, start
        while place in following and steps < len(following):
            place, steps = following[place], steps + 1
        assert steps == len(following)


def test_normals_point_outwards_at_rest_and_for_all_betas(hand):
    rng = np.random.default_rng(0)
    betas = np.concatenate([np.zeros((1, 10)), rng.normal(size=(20, 10)), 2.5 * np.eye(10), -2.5 * np.eye(10)])
    shapes = hand.template + np.einsum('vck,nk->nvc', hand.shape_dirs, betas)
    closed = capped(hand)
    volumes = (shapes[:, closed[:, 0]] * face_normals(shapes, closed)).sum((1, 2)) / 6
    assert (volumes > 1.5e-4).all() and (volumes < 8e-4).all()
    normals = face_normals(shapes, hand.faces)
    areas = np.linalg.norm(normals, axis=-1) / 2
    edges = directed_edges(hand.faces)
    squared = ((shapes[:, edges[:, 0]] - shapes[:, edges[:, 1]]) ** 2).sum(-1).reshape(len(shapes), -1, 3).sum(-1)
    quality = 4 * np.sqrt(3) * areas / squared  # 1 for an equilateral triangle
    assert quality[0].min() > 0.5
    assert quality.min() > 0.35
    assert areas.min() > 2e-6
    # The mesh is not folded: every dihedral angle is open.
    owner = {tuple(edge): i // 3 for i, edge in enumerate(edges.tolist())}
    pairs = np.array([(i, owner[b, a]) for (a, b), i in owner.items() if (b, a) in owner])
    unit = normals / np.linalg.norm(normals, axis=-1, keepdims=True)
    assert (unit[:, pairs[:, 0]] * unit[:, pairs[:, 1]]).sum(-1).min() > -0.5


def test_mesh_does_not_cross_itself_at_rest(right):
    assert self_intersections(right.template, right.faces) == 0
    folded = right.template.copy()
    folded[TIP_OF['index']] = folded[TIP_OF['ring']]  # the check itself detects a crossing
    assert self_intersections(folded, right.faces) > 0


def test_rest_pose_follows_the_axes_of_mano(right):
    joints = right.joint_regressor @ right.template
    np.testing.assert_allclose(joints[0], [0.096, 0.006, 0.006], atol=2e-4)
    np.testing.assert_allclose(joints[4], [0.001, 0.005, 0.003], atol=2e-4)
    assert 0.090 < np.linalg.norm(joints[4] - joints[0]) < 0.098
    assert 0.18 < np.linalg.norm(right.template[444] - joints[0]) < 0.20
    bases = joints[[1, 4, 10, 7], 2]
    assert (np.diff(bases) < 0).all(), 'the thumb side is not +z'
    assert joints[13:16, 2].min() > joints[1, 2] - 0.005
    assert right.template[TIP_OF['thumb'], 1] < joints[1, 1] - 0.015, 'the thumb does not stand out of the palm'
    for name, chain in CHAINS.items():
        tip = right.template[TIP_OF[name]]
        path = np.array([*joints[list(chain)], tip])
        assert (np.diff(path[:, 0]) < 0).all(), 'a finger does not point to -x'


def test_tips_are_the_farthest_points_of_their_fingers(hand):
    joints = hand.joint_regressor @ hand.template
    for name, chain in CHAINS.items():
        tip = hand.template[TIP_OF[name]]
        direction = tip - joints[chain[2]]
        on_finger = hand.skinning_weights[:, chain[2]] > 0.5
        assert on_finger[TIP_OF[name]]
        assert (hand.template[on_finger] @ direction).argmax() == np.flatnonzero(on_finger).searchsorted(TIP_OF[name])
    beside = np.linalg.norm(hand.template[PUBLISHED_LEFT_MIDDLE_TIP] - hand.template[TIP_OF['middle']])
    assert 0.001 < beside < 0.010


def test_proportions_are_those_of_a_hand(hand):
    joints = hand.joint_regressor @ hand.template
    length, bones = {}, {}
    for name, chain in CHAINS.items():
        path = np.array([*joints[list(chain)], hand.template[TIP_OF[name]]])
        bones[name] = np.linalg.norm(np.diff(path, axis=0), axis=1)
        length[name] = bones[name].sum()
    assert length['middle'] > length['ring'] > length['little']
    assert length['middle'] > length['index'] > length['little']
    assert abs(length['index'] - length['ring']) < 0.006
    for name in FINGERS[1:]:
        assert bones[name][0] > bones[name][1] and bones[name].min() > 0.016 and bones[name].max() < 0.05
    for name, chain in CHAINS.items():  # widths half-way along the middle bone
        ahead = (hand.template - joints[list(chain[1:])].mean(0)) @ (joints[chain[2]] - joints[chain[1]])
        near = abs(ahead) < 0.006 * bones[name][1]
        near &= hand.skinning_weights[:, list(chain)].sum(1) > 0.99
        spread = np.ptp(hand.template[near], axis=0)
        assert 0.012 < spread[1] < 0.030 and 0.012 < spread[2] < 0.030
    palm = hand.template[(hand.skinning_weights[:, 0] > 0.5) & (abs(hand.template[:, 0]) < 0.055)]
    assert 0.075 < np.ptp(palm[:, 2]) < 0.095
    assert 0.020 < np.ptp(palm[:, 1]) < 0.040


def test_weights_and_regressor(hand):
    for rows in (hand.skinning_weights, hand.joint_regressor):
        np.testing.assert_allclose(rows.sum(1), 1, atol=1e-12)
    assert hand.skinning_weights.min() >= 0
    assert (hand.skinning_weights > 0).sum(1).max() <= 5
    assert hand.joint_regressor.min() > -0.01
    # Smooth: neighbouring vertices have similar weights.
    edges = directed_edges(hand.faces)
    assert abs(np.diff(hand.skinning_weights[edges], axis=1)).max() < 0.8
    joints = hand.joint_regressor @ hand.template
    for joint in range(16):
        used = abs(hand.joint_regressor[joint]) > 0
        assert np.linalg.norm(hand.template[used] - joints[joint], axis=1).max() < (0.06 if joint == 0 else 0.04)
    # A vertex follows its own and neighbouring fingers, never a distant one.
    thumb = hand.skinning_weights[:, 13:].sum(1)
    assert hand.skinning_weights[thumb > 0.01][:, [7, 8, 9]].max() == 0


def test_joints_stay_inside_the_flesh(right):
    rng = np.random.default_rng(1)
    closed = capped(right)
    for betas in (np.zeros(10), *rng.normal(size=(4, 10)), *(2.5 * rng.choice([-1, 1], size=(3, 10)))):
        shape = right.template + right.shape_dirs @ betas
        joints = right.joint_regressor @ shape
        np.testing.assert_allclose(winding_number(joints, shape, closed), 1, atol=1e-6)
        gaps = np.linalg.norm(shape[:, None] - joints, axis=-1).min(0)
        assert gaps.min() > 0.0035
    np.testing.assert_allclose(winding_number(np.array([[0.0, 0.1, 0.0]]), right.template, closed), 0, atol=1e-6)


def test_betas_yield_plausible_hand_sizes(hand):
    def length(betas: np.ndarray) -> float:
        shape = hand.template + hand.shape_dirs @ betas
        return np.linalg.norm(shape[444] - (hand.joint_regressor @ shape)[0])

    assert 0.04 < length(np.eye(10)[0]) / length(np.zeros(10)) - 1 < 0.05
    lengths = [length(b) for b in np.random.default_rng(2).normal(size=(500, 10))]
    assert 0.04 < np.std(lengths) / np.mean(lengths) < 0.08
    moves = np.linalg.norm(hand.shape_dirs, axis=1)
    assert (moves.max(0) > 5e-4).all() and moves.max() < 0.008
    assert np.linalg.matrix_rank(hand.shape_dirs.reshape(-1, 10) / moves.max(0), tol=0.5) == 10
    edges = directed_edges(hand.faces)
    assert np.linalg.norm(np.diff(hand.shape_dirs[edges], axis=1)[:, 0], axis=1).max() < 0.0025


def test_pose_directions_are_small_and_vanish_at_rest(hand):
    rng = np.random.default_rng(3)
    for joint in range(1, 16):
        axis = rng.normal(size=3)
        rotation = axis_angle_to_matrix(torch.from_numpy(axis / np.linalg.norm(axis) * np.pi / 2)).numpy()
        entries = np.zeros((15, 9))
        entries[joint - 1] = (rotation - np.eye(3)).ravel()
        move = np.linalg.norm(hand.pose_dirs @ entries.ravel(), axis=1)
        assert move.max() < 0.004
        own = hand.pose_dirs.reshape(778, 3, 15, 9)[:, :, joint - 1]
        assert abs(own).max() > 1e-4
        assert (own[hand.skinning_weights[:, joint] == 1] == 0).all()


def test_pose_directions_keep_the_knuckles_volume(right):
    """At a right angle, the back of the middle joint stays closer to its rest distance than with plain blending."""
    flexion = np.zeros((5, 3))
    flexion[2, 1] = np.pi / 2
    plain = replace(right, pose_dirs=np.zeros_like(right.pose_dirs))
    weights = right.skinning_weights
    rest = right.joint_regressor @ right.template
    back = (weights[:, 4] > 0.3) & (weights[:, 5] > 0.3) & (right.template[:, 1] > rest[5, 1] + 0.004)
    assert back.sum() >= 3

    def mean_distance(hand: HandModel, pose: np.ndarray) -> float:
        vertices, joints = posed(hand, pose)
        return np.linalg.norm(vertices[0, back] - joints[0, 5], axis=1).mean()

    flat, blended, corrected = (
        mean_distance(right, FLAT),
        mean_distance(plain, right_pose(flexion)),
        mean_distance(right, right_pose(flexion)),
    )
    assert blended < 0.95 * flat
    assert abs(corrected - flat) < 0.6 * abs(blended - flat)


def test_pose_space(hand):
    np.testing.assert_allclose(hand.pose_components @ hand.pose_components.T, np.eye(45), atol=1e-10)
    flexion_axis = hand.pose_mean.reshape(15, 3)[:, 2]  # of the long fingers: z, on either side by mirroring
    sign = 1 if hand.side == 'right' else -1
    assert (sign * flexion_axis[:12] > 0.15).all(), 'the mean pose is not half curled'
    vertices, joints = posed(hand, hand.pose_mean + np.stack([FLAT, hand.pose_components[0], -hand.pose_components[0]]))
    tips = np.linalg.norm(vertices[:, list(TIP_VERTICES[1:])] - joints[:, :1], axis=-1)
    assert (tips[1] < tips[0]).all() and (tips[0] < tips[2]).all(), 'the first component does not curl all fingers'


def test_left_hand_mirrors_the_right():
    left, right = standin_hand('left'), standin_hand('right')
    mirror = np.array([-1.0, 1.0, 1.0])
    np.testing.assert_array_equal(left.template, right.template * mirror)
    assert set(map(frozenset, left.faces.tolist())) == set(map(frozenset, right.faces.tolist()))
    rng = np.random.default_rng(4)
    pose, betas = 0.5 * rng.normal(size=(6, 15, 3)), rng.normal(size=(6, 10))
    turned = pose * (1, -1, -1)
    (left_vertices, left_joints), (vertices, joints) = (
        posed(left, turned.reshape(6, 45), betas),
        posed(right, pose.reshape(6, 45), betas),
    )
    np.testing.assert_allclose(left_vertices, vertices * mirror, atol=1e-12)
    np.testing.assert_allclose(left_joints, joints * mirror, atol=1e-12)
    coefficients = rng.normal(size=45)
    np.testing.assert_allclose(
        (left.pose_mean + coefficients @ left.pose_components).reshape(15, 3),
        (right.pose_mean + coefficients @ right.pose_components).reshape(15, 3) * (1, -1, -1),
    )
    angles = rng.uniform(FLEXION_LIMITS[..., 0], FLEXION_LIMITS[..., 1]), rng.uniform(*SPREAD_LIMITS.T)
    np.testing.assert_allclose(
        pose_from_angles(*angles, side='left').reshape(15, 3),
        pose_from_angles(*angles, side='right').reshape(15, 3) * (1, -1, -1),
    )


def test_pose_from_angles_is_zero_for_the_flat_hand_and_broadcasts_leading_axes():
    np.testing.assert_array_equal(pose_from_angles(np.zeros((5, 3)), np.zeros(5), side='right'), 0)
    rng = np.random.default_rng(5)
    flexion, spread, twist = (0.3 * rng.normal(size=size) for size in ((2, 3, 5, 3), (3, 5), (2, 1, 5)))
    pose = pose_from_angles(flexion, spread, twist=twist, side='left')
    assert pose.shape == (2, 3, 45)
    np.testing.assert_allclose(pose[1, 2], pose_from_angles(flexion[1, 2], spread[2], twist=twist[1, 0], side='left'))
    assert pose_from_angles(np.zeros((0, 5, 3)), np.zeros((0, 5)), side='right').shape == (0, 45)


def test_joints_turn_by_the_angles_given(right):
    """Each joint turns by exactly its angle; the base joint composes rotations instead of adding vectors."""
    flexion, spread = np.zeros((5, 3)), np.zeros(5)
    flexion[1] = 0.4, 0.7, 0.3
    pose = pose_from_angles(flexion, spread, side='right').reshape(15, 3)
    np.testing.assert_allclose(np.linalg.norm(pose[:3], axis=1), [0.4, 0.7, 0.3])
    np.testing.assert_array_equal(pose[3:], 0)
    spread[1] = 0.3
    both = axis_angle_to_matrix(torch.from_numpy(pose_from_angles(flexion, spread, side='right')[:3])).numpy()
    alone = [
        axis_angle_to_matrix(torch.from_numpy(pose_from_angles(f, s, side='right')[:3])).numpy()
        for f, s in ((flexion, 0 * spread), (0 * flexion, spread))
    ]
    np.testing.assert_allclose(both, alone[0] @ alone[1], atol=1e-12)

    rest = right.template
    for number, name in enumerate(FINGERS):
        tip = TIP_OF[name]
        flexion, spread = np.zeros((5, 3)), np.zeros(5)
        flexion[number], spread[number] = 0.3, 0.15
        curled = posed(right, right_pose(flexion))[0][0, tip] - rest[tip]
        apart = posed(right, right_pose(0 * flexion, spread))[0][0, tip] - rest[tip]
        if name == 'thumb':
            assert curled[2] < -0.01, 'the thumb does not curl across the palm'
            assert apart[1] < -0.005, 'the thumb does not spread out of the palm'
        else:
            assert curled[1] < -0.01, 'the finger does not curl towards the palm'
            assert np.sign(apart[2]) == (1 if name in ('index', 'middle') else -1)
            assert abs(apart[1]) < 0.002


def test_fist_brings_the_tips_to_the_palm_without_penetration(right):
    twist = np.radians([16, 0, 0, 0, 0])
    vertices, joints = posed(right, right_pose(FIST, twist=twist))
    vertices, joints = vertices[0], joints[0]
    rest = right.template
    normals = vertex_normals(vertices, right.faces)
    palm = np.flatnonzero(right.skinning_weights[:, 0] > 0.9)
    for name in FINGERS[1:]:
        tip = vertices[TIP_OF[name]]
        assert np.linalg.norm(tip - joints[0]) < 0.55 * np.linalg.norm(rest[TIP_OF[name]] - joints[0])
        last = np.flatnonzero(right.skinning_weights[:, CHAINS[name][2]] > 0.7)
        offset = vertices[last][:, None] - vertices[palm]
        nearest = np.linalg.norm(offset, axis=-1).argmin(1)
        height = (offset[np.arange(len(last)), nearest] * normals[palm[nearest]]).sum(-1)
        assert height.min() > -0.005, 'the finger penetrates the palm'
        assert np.linalg.norm(offset, axis=-1).min() < 0.02, 'the finger does not reach the palm'


def test_pinch_joins_thumb_and_index(right):
    vertices, _ = posed(right, right_pose(PINCH, PINCH_SPREAD, PINCH_TWIST))
    last = {name: right.skinning_weights[:, CHAINS[name][2]] > 0.7 for name in ('thumb', 'index', 'middle')}
    gap = np.linalg.norm(vertices[0][last['thumb']][:, None] - vertices[0][last['index']], axis=-1).min()
    assert gap < 0.004
    just_outside = vertices[0] + 0.0005 * vertex_normals(vertices[0], right.faces)
    inside = winding_number(just_outside[last['thumb']], vertices[0], capped(right)) > 0.5
    assert inside.mean() < 0.1, 'the thumb penetrates the index finger'


def test_poses_within_the_limits_keep_edges_and_volume(right):
    rng = np.random.default_rng(6)
    flexion = rng.uniform(FLEXION_LIMITS[..., 0], FLEXION_LIMITS[..., 1], size=(40, 5, 3))
    spread, twist = (rng.uniform(limits[:, 0], limits[:, 1], size=(40, 5)) for limits in (SPREAD_LIMITS, TWIST_LIMITS))
    vertices, joints = posed(right, right_pose(flexion, spread, twist))
    bones = np.linalg.norm(joints[:, 1:] - joints[:, list(CHAIN_PARENTS[1:])], axis=-1)
    np.testing.assert_allclose(bones, np.broadcast_to(bones[:1], bones.shape), atol=1e-9)
    edges = directed_edges(right.faces)
    rest = np.linalg.norm(np.diff(right.template[edges], axis=1)[:, 0], axis=-1)
    length = np.linalg.norm(np.diff(vertices[:, edges], axis=2)[:, :, 0], axis=-1)
    assert np.quantile(length / rest, 0.001) > 0.2 and np.quantile(length / rest, 0.999) < 2.5
    assert length.max() < 0.03
    volume = (vertices[:, capped(right)[:, 0]] * face_normals(vertices, capped(right))).sum((1, 2))
    assert (abs(volume / volume.mean() - 1) < 0.1).all()


def test_generation_is_deterministic():
    again = standin.right_hand_arrays.__wrapped__()
    for name, array in again.items():
        np.testing.assert_array_equal(array, getattr(standin_hand('right'), name))
    assert standin_hand('right') is standin_hand('right')
    assert standin_hand('right').digest != standin_hand('left').digest


def test_arrays_are_read_only_and_unknown_sides_are_refused(right):
    with pytest.raises(ValueError, match='read-only'):
        right.template[0] = 0
    for call in (lambda: standin_hand('both'), lambda: pose_from_angles(np.zeros((5, 3)), np.zeros(5), side='Right')):
        with pytest.raises(ManoError, match="'left' or 'right'"):
            call()
