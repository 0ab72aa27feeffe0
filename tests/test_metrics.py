import numpy as np
import pytest
import torch

from utils.hand import HAND_SCALE, MANO_TO_JOINTS, TIP_VERTICES
from utils.metrics import (
    JointRegressor,
    Protocol,
    SampleErrors,
    concatenate,
    format_summary,
    predicted_root_vector,
    sample_errors,
    summarise,
)

FIGURES = ('joint_mm', 'vert_mm', 'joint_px', 'vert_px')
PROTOCOLS = [Protocol(root, scale) for root in (0, 9) for scale in (True, False)]


@pytest.fixture(scope='module')
def made(standin):
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


def errors_of(made, protocol, *, network_root: int = 0, **changes) -> SampleErrors:
    regressor, predicted, offset, true, intrinsics = made
    inputs = {'vertices': predicted, 'offset': offset, 'true_vertices': true, 'intrinsics': intrinsics} | changes
    return sample_errors(regressor, inputs.pop('vertices'), inputs.pop('offset'), **inputs, network_root=network_root,
                         protocol=protocol)


def naive_joints(vertices: np.ndarray, model) -> np.ndarray:
    chain = model.joint_regressor @ vertices
    return np.concatenate([chain, vertices[list(TIP_VERTICES)]])[list(MANO_TO_JOINTS)]


def naive_pixels(points, camera):
    return np.array([[(camera[0] @ p) / (camera[2] @ p), (camera[1] @ p) / (camera[2] @ p)] for p in points])


def naive_errors(made, standin, protocol: Protocol, sample: int) -> dict[str, list[float]]:
    """One sample, one hand at a time, in NumPy."""
    _, predicted, offset, true, intrinsics = (x if i == 0 else x[sample].numpy() for i, x in enumerate(made))
    root, result, roots, own = protocol.root_joint, {name: [] for name in FIGURES}, [], []
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
            a, b = naive_pixels(points + true_joints[root], intrinsics), naive_pixels(truth, intrinsics)
            result[f'{name}_px'].append(np.mean(np.linalg.norm(a - b, axis=1)))
    vector = offset * HAND_SCALE + (0 if root == 0 else own[1] - own[0])
    result['root_mm'] = 1000 * np.linalg.norm(vector - (roots[1] - roots[0]))
    return result


@pytest.mark.parametrize('protocol', PROTOCOLS)
def test_all_figures_equal_a_loop_in_numpy(made, standin, protocol):
    errors = errors_of(made, protocol)
    for sample in range(5):
        expected = naive_errors(made, standin, protocol, sample)
        for name in SampleErrors._fields:
            np.testing.assert_allclose(getattr(errors, name)[sample].numpy(), expected[name], rtol=1e-5, err_msg=name)
            assert np.min(expected[name]) > 0.1


@pytest.mark.parametrize('protocol', PROTOCOLS)
@pytest.mark.parametrize('network_root', [0, 9])
def test_the_truth_has_no_error(made, protocol, network_root):
    regressor, _, _, true, _ = made
    joints = regressor(true)
    roots = joints[:, :, network_root:network_root + 1]
    offset = (roots[:, 1, 0] - roots[:, 0, 0]) / HAND_SCALE
    errors = errors_of(made, protocol, vertices=true - roots, offset=offset, network_root=network_root)
    for name, values in errors._asdict().items():
        assert values.abs().max() < 1e-6, name


@pytest.mark.parametrize('protocol', PROTOCOLS)
def test_a_prediction_may_lie_anywhere(made, protocol):
    moved = made[1] + torch.randn(5, 2, 1, 3, dtype=torch.float64)
    for name in FIGURES:
        torch.testing.assert_close(getattr(errors_of(made, protocol, vertices=moved), name),
                                   getattr(errors_of(made, protocol), name))


@pytest.mark.parametrize('root', [0, 9])
def test_size_is_forgiven_with_scale_alignment_only(made, root):
    grown = 1.7 * made[1]
    on, off = Protocol(root, True), Protocol(root, False)
    usual, forgiven = errors_of(made, on), errors_of(made, on, vertices=grown)
    smaller, larger = errors_of(made, off), errors_of(made, off, vertices=grown)
    for name in FIGURES:
        torch.testing.assert_close(getattr(forgiven, name), getattr(usual, name))
        assert (getattr(larger, name) > getattr(smaller, name)).all()


def test_scale_alignment_does_not_change_the_root_error(made):
    for root in (0, 9):
        on, off = (errors_of(made, Protocol(root, scale)).root_mm for scale in (True, False))
        assert torch.equal(on, off)


def test_each_hand_has_its_own_error(made):
    protocol = Protocol(0, True)
    worse = made[1].clone()
    worse[:, 1] += 0.05 * torch.randn(5, 778, 3, dtype=torch.float64)
    before, after = errors_of(made, protocol), errors_of(made, protocol, vertices=worse)
    for name in FIGURES:
        assert torch.equal(getattr(before, name)[:, 0], getattr(after, name)[:, 0])
        assert (getattr(before, name)[:, 1] < getattr(after, name)[:, 1]).all()


def test_root_vector_goes_along_the_networks_own_joints_to_another_root():
    joints, offset = torch.randn(3, 2, 21, 3), torch.randn(3, 3)
    joints = joints - joints[:, :, :1]
    same = predicted_root_vector(joints, offset, network_root=0, root_joint=0)
    assert torch.equal(same, offset * HAND_SCALE)
    # Hands put where the offset says, then measured.
    left, right = joints[:, 0], joints[:, 1] + (offset * HAND_SCALE)[:, None]
    torch.testing.assert_close(predicted_root_vector(joints, offset, network_root=0, root_joint=9),
                               right[:, 9] - left[:, 9])


def test_joint_regressor_is_the_models_regressor_and_tips(made, standin):
    regressor, predicted, *_ = made
    for hand, model in enumerate(standin):
        expected = naive_joints(predicted[2, hand].numpy(), model)
        np.testing.assert_allclose(regressor(predicted)[2, hand].numpy(), expected, atol=1e-7)
    assert not regressor.state_dict()


@pytest.mark.parametrize('split', [[5], [1, 4], [2, 2, 1], [1] * 5])
def test_batches_of_any_size_merge_to_the_same_figures(made, split):
    _, predicted, offset, true, intrinsics = made
    protocol = Protocol(9, True)
    parts = [errors_of(made, protocol, vertices=p, offset=o, true_vertices=t, intrinsics=k)
             for p, o, t, k in zip(*(x.split(split) for x in (predicted, offset, true, intrinsics)))]
    merged, whole = concatenate(parts), concatenate([errors_of(made, protocol)])
    for a, b in zip(merged, whole):
        assert a.dtype == torch.float64
        torch.testing.assert_close(a, b, rtol=1e-12, atol=0)
    ours, theirs = summarise(merged, protocol), summarise(whole, protocol)
    assert ours['frames'] == 5 and ours['joint_mm'] == pytest.approx(theirs['joint_mm'], rel=1e-12)


def test_summary_is_means_over_samples_and_all_is_the_mean_of_the_hands():
    errors = SampleErrors(*(torch.tensor([[1.0, 2.0], [3.0, 8.0]]) * k for k in (1, 10, 100, 1000)),
                          torch.tensor([7.0, 9.0]))
    summary = summarise(errors, Protocol(9, False))
    assert summary['joint_mm'] == {'left': 2, 'right': 5, 'all': 3.5}
    assert summary['vert_px'] == {'left': 2000, 'right': 5000, 'all': 3500}
    assert summary['root_mm'] == 8 and summary['frames'] == 2
    assert summary['protocol'] == {
        'root_joint': 9, 'scale': False,
        'description': 'root joint 9 (middle MCP), scale alignment off, joints regressed from vertices'}


def test_summary_prints_the_fields_lines_in_their_order():
    errors = SampleErrors(torch.DoubleTensor([[10.732769, 9.722339]]), torch.DoubleTensor([[10.47924, 9.521340]]),
                          torch.DoubleTensor([[6.329594, 5.843324]]), torch.DoubleTensor([[6.235760, 5.768412]]),
                          torch.DoubleTensor([29.26052]))
    summary = summarise(concatenate([errors]), Protocol())
    assert format_summary(summary) == '''\
joint mean error:
    left: 10.732769 mm, right: 9.722339 mm
    all: 10.227554 mm
vert mean error:
    left: 10.479240 mm, right: 9.521340 mm
    all: 10.000290 mm
pixel joint mean error:
    left: 6.329594 px, right: 5.843324 px
    all: 6.086459 px
pixel vert mean error:
    left: 6.235760 px, right: 5.768412 px
    all: 6.002086 px
root error: 29.260520 mm'''
