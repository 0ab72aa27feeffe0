import numpy as np
import pytest
import torch

from evaluation.aggregation import concatenate
from evaluation.metrics import (
    GRID,
    JointRegressor,
    Protocol,
    box_iou,
    hand_distance,
    in_one_frame,
    predicted_root_vector,
    procrustes_errors,
    sample_errors,
    segmentation_overlap,
    visible_shares,
)
from evaluation.summary import summarise
from manopth import TwoHandLayer
from manopth.alignment import align
from utils.hand import HAND_SCALE, MANO_TO_JOINTS, TIP_VERTICES

FIGURES = ('joint_mm', 'vert_mm', 'joint_px', 'vert_px')


@pytest.fixture(scope='module')
def predictions(standin):
    """Regressor and a batch of five noisy predictions, centred on the network's wrist."""
    g = torch.Generator().manual_seed(0)
    regressor = JointRegressor(standin).double()
    template = torch.from_numpy(np.stack([m.template for m in standin]))
    true = template + 0.003 * torch.randn(5, 2, 778, 3, generator=g, dtype=torch.float64)
    true = true + torch.tensor([0, 0, 0.7]) + 0.1 * torch.randn(5, 2, 1, 3, generator=g, dtype=torch.float64)
    predicted = 1.1 * template + 0.01 * torch.randn(5, 2, 778, 3, generator=g, dtype=torch.float64)
    predicted = predicted - regressor(predicted)[:, :, :1]
    intrinsics = torch.tensor([[600.0, 0, 128], [0, 600, 128], [0, 0, 1]]).double().repeat(5, 1, 1)
    intrinsics[:, 1, 0] = 4  # not upper-triangular, as after a rotation
    offset = torch.randn(5, 3, generator=g, dtype=torch.float64)
    return regressor, predicted, offset, true, intrinsics


def errors_of(predictions, protocol, *, network_root: int = 0, **changes) -> dict[str, torch.Tensor]:
    regressor, predicted, offset, true, intrinsics = predictions
    inputs = {'vertices': predicted, 'offset': offset, 'true_vertices': true, 'intrinsics': intrinsics} | changes
    return sample_errors(
        regressor, inputs.pop('vertices'), inputs.pop('offset'), **inputs, network_root=network_root, protocol=protocol
    )


def naive_joints(vertices: np.ndarray, model) -> np.ndarray:
    chain = model.joint_regressor @ vertices
    return np.concatenate([chain, vertices[list(TIP_VERTICES)]])[list(MANO_TO_JOINTS)]


def naive_pixels(points, camera):
    return np.array([[(camera[0] @ p) / (camera[2] @ p), (camera[1] @ p) / (camera[2] @ p)] for p in points])


def naive_errors(predictions, standin, protocol: Protocol, sample: int) -> dict[str, list[float]]:
    """One sample, one hand at a time, in NumPy."""
    _, predicted, offset, true, intrinsics = (x if i == 0 else x[sample].numpy() for i, x in enumerate(predictions))
    root, result, roots, own = protocol.root_joint, {name: [] for name in (*FIGURES, 'joints_mm')}, [], []
    for hand, model in enumerate(standin):
        joints, true_joints = naive_joints(predicted[hand], model), naive_joints(true[hand], model)
        roots.append(true_joints[root])
        own.append(joints[root])
        vertices, joints = predicted[hand] - joints[root], joints - joints[root]
        if protocol.scale:
            factor = np.linalg.norm(true_joints[9] - true_joints[0]) / np.linalg.norm(joints[9] - joints[0])
            vertices, joints = factor * vertices, factor * joints
        for name, points, truth in (('joint', joints, true_joints), ('vert', vertices, true[hand])):
            aligned = truth - true_joints[root]
            result[f'{name}_mm'].append(1000 * np.mean([np.linalg.norm(a - b) for a, b in zip(points, aligned)]))
            if name == 'joint':
                result['joints_mm'].append([1000 * np.linalg.norm(a - b) for a, b in zip(points, aligned)])
            a, b = naive_pixels(points + true_joints[root], intrinsics), naive_pixels(truth, intrinsics)
            result[f'{name}_px'].append(np.mean(np.linalg.norm(a - b, axis=1)))
    vector = offset * HAND_SCALE + (0 if root == 0 else own[1] - own[0])
    result['root_mm'] = 1000 * np.linalg.norm(vector - (roots[1] - roots[0]))
    return result


@pytest.mark.parametrize('protocol', GRID)
def test_all_figures_equal_a_loop_in_numpy(predictions, standin, protocol):
    errors = errors_of(predictions, protocol)
    for sample in range(5):
        expected = naive_errors(predictions, standin, protocol, sample)
        for name in errors:
            np.testing.assert_allclose(errors[name][sample].numpy(), expected[name], rtol=1e-5, atol=1e-9, err_msg=name)
            assert name == 'joints_mm' or np.min(expected[name]) > 0.1  # a root's error is 0


@pytest.mark.parametrize('protocol', GRID)
@pytest.mark.parametrize('network_root', [0, 9])
def test_the_truth_has_no_error(predictions, protocol, network_root):
    regressor, _, _, true, _ = predictions
    joints = regressor(true)
    roots = joints[:, :, network_root : network_root + 1]
    offset = (roots[:, 1, 0] - roots[:, 0, 0]) / HAND_SCALE
    errors = errors_of(predictions, protocol, vertices=true - roots, offset=offset, network_root=network_root)
    for name, values in errors.items():
        assert values.abs().max() < 1e-6, name


@pytest.mark.parametrize('protocol', GRID)
def test_errors_ignore_the_position_of_a_prediction(predictions, protocol):
    moved = predictions[1] + torch.randn(5, 2, 1, 3, dtype=torch.float64)
    for name in FIGURES:
        torch.testing.assert_close(
            errors_of(predictions, protocol, vertices=moved)[name], errors_of(predictions, protocol)[name]
        )


@pytest.mark.parametrize('root', [0, 9])
def test_only_scale_alignment_ignores_hand_size(predictions, root):
    grown = 1.7 * predictions[1]
    on, off = Protocol(root, True), Protocol(root, False)
    usual, forgiven = errors_of(predictions, on), errors_of(predictions, on, vertices=grown)
    smaller, larger = errors_of(predictions, off), errors_of(predictions, off, vertices=grown)
    for name in FIGURES:
        torch.testing.assert_close(forgiven[name], usual[name])
        assert (larger[name] > smaller[name]).all()


def test_scale_alignment_does_not_change_the_root_error(predictions):
    for root in (0, 9):
        on, off = (errors_of(predictions, Protocol(root, scale))['root_mm'] for scale in (True, False))
        assert torch.equal(on, off)


def test_each_hand_has_its_own_error(predictions):
    protocol = Protocol(0, True)
    worse = predictions[1].clone()
    worse[:, 1] += 0.05 * torch.randn(5, 778, 3, dtype=torch.float64)
    before, after = errors_of(predictions, protocol), errors_of(predictions, protocol, vertices=worse)
    for name in FIGURES:
        assert torch.equal(before[name][:, 0], after[name][:, 0])
        assert (before[name][:, 1] < after[name][:, 1]).all()


def test_root_vector_at_another_root_joint_follows_the_predicted_joints():
    joints, offset = torch.randn(3, 2, 21, 3), torch.randn(3, 3)
    joints = joints - joints[:, :, :1]
    same = predicted_root_vector(joints, offset, network_root=0, root_joint=0)
    assert torch.equal(same, offset * HAND_SCALE)
    # Hands placed by the offset, then measured.
    left, right = joints[:, 0], joints[:, 1] + (offset * HAND_SCALE)[:, None]
    torch.testing.assert_close(
        predicted_root_vector(joints, offset, network_root=0, root_joint=9), right[:, 9] - left[:, 9]
    )


def test_joint_regressor_is_the_models_regressor_and_tips(predictions, standin):
    regressor, predicted, *_ = predictions
    for hand, model in enumerate(standin):
        expected = naive_joints(predicted[2, hand].numpy(), model)
        np.testing.assert_allclose(regressor(predicted)[2, hand].numpy(), expected, atol=1e-7)
    assert not regressor.state_dict()


@pytest.mark.parametrize('split', [[5], [1, 4], [2, 2, 1], [1] * 5])
def test_batches_of_any_size_merge_to_the_same_figures(predictions, split):
    _, predicted, offset, true, intrinsics = predictions
    protocol = Protocol(9, True)
    parts = [
        errors_of(predictions, protocol, vertices=p, offset=o, true_vertices=t, intrinsics=k)
        for p, o, t, k in zip(*(x.split(split) for x in (predicted, offset, true, intrinsics)))
    ]
    merged, whole = concatenate(parts), concatenate([errors_of(predictions, protocol)])
    assert merged.keys() == whole.keys()
    for a, b in zip(merged.values(), whole.values()):
        assert a.dtype == torch.float64
        torch.testing.assert_close(a, b, rtol=1e-12, atol=0)
    ours, theirs = summarise(merged, protocol), summarise(whole, protocol)
    assert ours['frames'] == 5 and ours['joint_mm'] == pytest.approx(theirs['joint_mm'], rel=1e-12)


# Annotated joints


def test_annotated_joints_affect_joint_metrics_only(predictions):
    regressor, _, _, true, _ = predictions
    marked = regressor(true) + 0.002 * torch.randn(5, 2, 21, 3, dtype=torch.float64)
    fits = errors_of(predictions, Protocol(0, False))
    people = errors_of(predictions, Protocol(0, False, 'annotated'), annotated=marked)
    for name in ('vert_mm', 'vert_px'):
        torch.testing.assert_close(people[name], fits[name])
    centred = marked - marked[:, :, :1]
    predicted = regressor(predictions[1]) - regressor(predictions[1])[:, :, :1]
    torch.testing.assert_close(people['joints_mm'], 1000 * (predicted - centred).norm(dim=-1))
    vector = marked[:, 1, 0] - marked[:, 0, 0]
    torch.testing.assert_close(people['root_mm'], 1000 * (predictions[2] * HAND_SCALE - vector).norm(dim=-1))


def test_joints_without_annotation_are_left_out(predictions):
    regressor, _, _, true, _ = predictions
    protocol, whole = Protocol(0, False, 'annotated'), regressor(true)
    marked = whole.clone()
    marked[0, 0, 5] = marked[1, 1, 0] = torch.nan  # a joint; a root: that hand cannot be placed
    errors, complete = (
        errors_of(predictions, protocol, annotated=marked),
        errors_of(predictions, protocol, annotated=whole),
    )
    assert errors['joints_mm'][0, 0, 5].isnan() and errors['joints_mm'][1, 1].isnan().all()
    assert errors['root_mm'].isnan().tolist() == [False, True, False, False, False]
    others = [joint for joint in range(21) if joint != 5]
    torch.testing.assert_close(errors['joint_mm'][0, 0], complete['joints_mm'][0, 0, others].mean())
    # The mean over joints of each joint's mean, as InterNet's.
    figures = summarise(errors, protocol)
    left = complete['joints_mm'][:, 0].clone()
    left[0, 5] = torch.nan
    assert figures['joint_mm']['left'] == pytest.approx(left.nanmean(0).mean().item())
    assert figures['joint_mm']['right'] == pytest.approx(complete['joints_mm'][[0, 2, 3, 4], 1].mean().item())
    assert figures['root_mm'] == pytest.approx(complete['root_mm'][[0, 2, 3, 4]].mean().item())


# Alignment


def procrustes(points: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return align(points, target, scale=True).apply(points)


def similarity(seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    rotation = torch.linalg.qr(torch.randn(3, 3, generator=g, dtype=torch.float64))[0]
    return (
        rotation * torch.det(rotation),
        0.5 + torch.rand(1, generator=g).double(),
        torch.randn(3, generator=g, dtype=torch.float64),
    )


def test_procrustes_removes_any_similarity_but_no_reflection():
    points = torch.randn(4, 2, 21, 3, dtype=torch.float64)
    rotation, scale, shift = similarity(0)
    torch.testing.assert_close(procrustes(scale * points @ rotation.T + shift, points), points)
    mirrored = points * torch.tensor([-1.0, 1, 1]).double()
    assert (procrustes(mirrored, points) - points).norm(dim=-1).mean() > 0.1


def test_procrustes_is_the_best_similarity():
    points, target = torch.randn(2, 21, 3, dtype=torch.float64).unbind(0)
    best = (procrustes(points, target) - target).square().sum()
    aligned = procrustes(points, target)
    for seed in range(50):
        rotation, scale, shift = similarity(seed)
        near = torch.matrix_exp(0.05 * (rotation - rotation.T))
        moved = (0.9 + 0.2 * scale / 1.5) * (aligned - aligned.mean(0)) @ near.T + aligned.mean(0) + 0.02 * shift
        assert (moved - target).square().sum() >= best - 1e-12


def test_procrustes_ignores_points_without_a_target():
    points, target = torch.randn(2, 3, 21, 3, dtype=torch.float64).unbind(0)
    partly = target.clone()
    partly[:, 4] = torch.nan
    others = [joint for joint in range(21) if joint != 4]
    torch.testing.assert_close(procrustes(points, partly)[:, others], procrustes(points[:, others], target[:, others]))
    assert procrustes(points, partly).isfinite().all()


def test_procrustes_errors_ignore_similarities(predictions):
    regressor, predicted, _, true, _ = predictions
    joint, vert = procrustes_errors(regressor, predicted, true_vertices=true)
    rotation, scale, shift = similarity(3)
    again = procrustes_errors(regressor, scale * predicted @ rotation.T + shift, true_vertices=true)
    torch.testing.assert_close((joint, vert), again)
    usual = errors_of(predictions, Protocol(0, True))
    assert (vert < usual['vert_mm']).all() and (vert > 1).all()
    for values in procrustes_errors(regressor, predicted, true_vertices=predicted):
        assert values.max() < 1e-6


# Interaction, segmentation


def test_box_iou_of_known_boxes():
    square = torch.tensor([[0.0, 0], [2, 0], [2, 2], [0, 2]])
    for shift, expected in ((0.0, 1.0), (1.0, 1 / 3), (2.0, 0.0), (5.0, 0.0)):
        boxes = torch.stack([square, square + torch.tensor([shift, 0])])[None]
        assert box_iou(boxes).item() == pytest.approx(expected)
    inside = torch.stack([square, 0.5 + square / 2])[None]
    assert box_iou(inside).item() == pytest.approx(0.25)


def test_hand_distance_is_the_smallest_of_all_pairs(predictions):
    true = predictions[3]
    expected = [min(np.linalg.norm(sample[1].numpy() - a.numpy(), axis=1).min() for a in sample[0]) for sample in true]
    np.testing.assert_allclose(hand_distance(true).numpy(), expected, atol=1e-6)
    np.testing.assert_allclose(hand_distance(true.float()).numpy(), expected, atol=1e-6)  # of hands 0.7 m away


def test_the_offset_places_the_right_hand(predictions):
    _, predicted, offset, *_ = predictions
    placed = in_one_frame(predicted, offset)
    assert torch.equal(placed[:, 0], predicted[:, 0])
    torch.testing.assert_close(placed[:, 1] - predicted[:, 1], (offset * HAND_SCALE)[:, None].expand(-1, 778, -1))


def test_segmentation_overlap_counts_pixels():
    labels = torch.zeros(2, 8, 8, dtype=torch.long)
    labels[0, :, :4], labels[0, :, 4:] = 1, 2
    logits = 10 * torch.nn.functional.one_hot(labels, 3).permute(0, 3, 1, 2).float()
    both, either = segmentation_overlap(logits, labels)
    assert both.tolist() == either.tolist() == [[0, 32, 32], [64, 0, 0]]
    both, either = segmentation_overlap(logits.flip(0), labels)
    assert both.tolist() == [[0, 0, 0], [0, 0, 0]]
    assert either.tolist() == [[64, 32, 32], [64, 32, 32]]
    both, either = segmentation_overlap(None, labels)
    assert both.tolist() == either.tolist() == [[0] * 3] * 2


# Visibility


def test_a_hand_is_visible_where_nothing_occludes_it(standin):
    hands = TwoHandLayer(standin)(torch.zeros(4, 2, 3), torch.zeros(4, 2, 45), torch.zeros(4, 2, 10), root_joint=9)
    place = torch.tensor(
        [
            [[-0.15, 0, 0.8], [0.15, 0, 0.8]],  # beside each other
            [[0, 0, 0.8], [0, 0, 0.6]],  # the right hand in front of the left
            [[0, 0, 0.6], [0, 0, 0.8]],
            [[0, 0, 0.8], [5.0, 0, 0.8]],
        ]
    )  # the right hand outside the image
    intrinsics = torch.tensor([[400.0, 0, 128], [0, 400, 128], [0, 0, 1]]).expand(4, 3, 3)
    visible = visible_shares(hands.vertices + place[:, :, None], intrinsics, torch.from_numpy(standin.mesh_faces))
    assert visible[0].tolist() == [1, 1]
    assert visible[1, 1] == 1 and 0 < visible[1, 0] < 0.6
    assert visible[2, 0] == 1 and 0 < visible[2, 1] < 0.6
    assert visible[3, 0] == 1 and visible[3, 1].isnan()
