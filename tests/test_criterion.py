import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from models import build_criterion, losses
from models.criterion import DIRCriterion
from models.mesh_losses import MeshLosses
from models.predictions import DIROutput, HandPrediction, Target
from utils.config import load_config
from utils.geometry import bone_length
from utils.hand import HAND_SCALE, NUM_JOINTS, NUM_VERTICES

HAND_TERMS = ('joint_uv', 'vertex_uv', 'joint_xyz', 'vertex_xyz', 'edge', 'normal')
IMAGE_TERMS = ('segmentation', 'lovasz', 'dense')
ALL_TERMS = (*HAND_TERMS, 'offset', *IMAGE_TERMS)
ONES = dict.fromkeys(ALL_TERMS, 1.0)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


# Losses


def test_huber_is_quadratic_then_linear():
    a, b = torch.randn(3, 2, 5, 3) * 0.02, torch.randn(3, 2, 5, 3) * 0.02
    z = (a - b).abs().double().numpy()
    expected = np.where(z < 0.01, 0.5 * z**2, 0.01 * (z - 0.005))
    assert (z < 0.01).any() and (z > 0.01).any()
    assert losses.huber(a, b).item() == pytest.approx(expected.mean(), rel=1e-5)
    np.testing.assert_allclose(losses.huber_per_hand(a, b), expected.mean((0, 2, 3)), rtol=1e-5)


@pytest.fixture
def meshes():
    """Two batches of vertices (2, 2, 9, 3) and faces (2, 6, 3) that differ between the hands."""
    faces = torch.stack([torch.randperm(9)[:3] for _ in range(12)]).view(2, 6, 3).numpy()
    return torch.randn(2, 2, 9, 3), torch.randn(2, 2, 9, 3), faces


def naive_edges(vertices, faces):
    """[(sample, hand) -> list over faces of three edge vectors]."""
    vertices = vertices.double().numpy()
    return {
        (b, h): [[vertices[b, h, face[(i + 1) % 3]] - vertices[b, h, face[i]] for i in range(3)] for face in faces[h]]
        for b in range(len(vertices))
        for h in range(2)
    }


def test_edge_length_loss_equals_a_loop(meshes):
    prediction, truth, faces = meshes
    ours, _ = MeshLosses(faces)(prediction, truth)
    a, b = naive_edges(prediction, faces), naive_edges(truth, faces)
    for hand in range(2):
        differences = [
            abs(np.linalg.norm(e) - np.linalg.norm(t))
            for sample in range(2)
            for edges, true in zip(a[sample, hand], b[sample, hand])
            for e, t in zip(edges, true)
        ]
        assert ours[hand].item() == pytest.approx(np.mean(differences), rel=1e-5)


def test_normal_loss_equals_a_loop(meshes):
    prediction, truth, faces = meshes
    _, ours = MeshLosses(faces)(prediction, truth)
    a, b = naive_edges(prediction, faces), naive_edges(truth, faces)
    for hand in range(2):
        cosines = []
        for sample in range(2):
            for edges, true in zip(a[sample, hand], b[sample, hand]):
                normal = np.cross(true[0], true[1])
                cosines += [abs(e @ normal) / np.linalg.norm(e) / np.linalg.norm(normal) for e in edges]
        assert ours[hand].item() == pytest.approx(np.mean(cosines), rel=1e-5)


def test_mesh_losses_vanish_on_the_truth_and_see_only_shape(meshes):
    _, truth, faces = meshes
    mesh_losses = MeshLosses(faces)
    assert mesh_losses(truth, truth)[0].abs().max() == 0
    moved = mesh_losses(truth + torch.randn(2, 2, 1, 3), truth)
    turned = mesh_losses(truth @ torch.linalg.qr(torch.randn(3, 3))[0], truth)
    for cost in (*moved, turned[0]):
        assert cost.abs().max() < 1e-6


def test_mesh_losses_of_a_collapsed_face_have_finite_gradients(meshes):
    prediction, truth, faces = meshes
    prediction, truth = torch.zeros_like(prediction).requires_grad_(), truth.clone()
    truth[0, 0] = 0
    sum(cost.sum() for cost in MeshLosses(faces)(prediction, truth)).backward()
    assert prediction.grad.abs().max() < 1


def naive_lovasz(scores: np.ndarray, labels: np.ndarray) -> float:
    """Berman et al.: for each present class, errors sorted downwards, each times the Jaccard loss it adds."""
    per_class = []
    for c in range(scores.shape[1]):
        truth = (labels == c).ravel().tolist()
        if not any(truth):
            continue
        errors = [abs(t - s) for t, s in zip(truth, scores[:, c].ravel().tolist())]
        order = sorted(range(len(errors)), key=lambda i: -errors[i])

        def jaccard_loss(wrong, truth=truth):
            """1 - |truth minus wrong| / |truth or wrong| if exactly the pixels in ``wrong`` were misclassified."""
            kept = sum(t for i, t in enumerate(truth) if i not in wrong)
            union = sum(1 for i, t in enumerate(truth) if t or i in wrong)
            return 1 - kept / union

        value, wrong, before = 0.0, set(), 0.0
        for i in order:
            wrong.add(i)
            after = jaccard_loss(wrong)
            value += errors[i] * (after - before)
            before = after
        per_class.append(value)
    return sum(per_class) / len(per_class)


@pytest.mark.parametrize('present', [(0, 1, 2), (0, 2), (1,)])
@pytest.mark.parametrize('probabilities', [True, False])
def test_lovasz_equals_its_definition(present, probabilities):
    scores = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    scores = scores.softmax(1) if probabilities else scores
    labels = torch.tensor(present)[torch.randint(len(present), (2, 4, 5))]
    expected = naive_lovasz(scores.numpy(), labels.numpy())
    assert losses.lovasz_softmax(scores, labels).item() == pytest.approx(expected, abs=1e-12)


def test_lovasz_of_hard_predictions_is_one_minus_the_mean_iou():
    labels, guess = torch.randint(3, (2, 6, 6)), torch.randint(3, (2, 6, 6))
    expected = np.mean(
        [
            1 - ((labels == c) & (guess == c)).sum().item() / ((labels == c) | (guess == c)).sum().item()
            for c in range(3)
        ]
    )
    assert losses.lovasz_softmax(F.one_hot(guess, 3).permute(0, 3, 1, 2).float(), labels).item() == pytest.approx(
        expected, abs=1e-6
    )
    assert losses.lovasz_softmax(F.one_hot(labels, 3).permute(0, 3, 1, 2).float(), labels) == 0


# Criterion


def made_target(standin, batch: int = 2) -> Target:
    """Plausible shapes: the rest meshes, jittered and somewhere in front of the camera."""
    template = torch.from_numpy(np.stack([m.template for m in standin])).float()
    place = torch.randn(batch, 2, 1, 3) * 0.1 + torch.tensor([0, 0, 0.6])
    vertices = template + 0.002 * torch.randn(batch, 2, NUM_VERTICES, 3) + place
    joints = vertices[:, :, ::37][:, :, :NUM_JOINTS].clone()
    return Target(
        vertices,
        joints,
        torch.randn(batch, 2, NUM_VERTICES, 2),
        torch.randn(batch, 2, NUM_JOINTS, 2),
        torch.randint(3, (batch, 32, 32)),
        torch.rand(batch, 3, 32, 32),
    )


def perfect_hands(target: Target, root: int) -> HandPrediction:
    roots = target.joints[:, :, root : root + 1]
    return HandPrediction(
        torch.zeros(len(roots), 2, 64),
        (roots[:, 1, 0] - roots[:, 0, 0]) / HAND_SCALE,
        target.vertices - roots,
        target.joints - roots,
        target.vertices_uv,
        target.joints_uv,
    )


def noisy(hands: HandPrediction) -> HandPrediction:
    return HandPrediction(*(x + 0.01 * torch.randn_like(x) for x in hands))


def make_output(stages: list[HandPrediction], size: int = 8) -> DIROutput:
    batch = len(stages[0].offset)
    return DIROutput(stages, torch.randn(batch, 3, size, size), torch.rand(batch, 3, size, size))


def make_criterion(standin, root: int = 0, weights=None, **options) -> DIRCriterion:
    return DIRCriterion(standin, weights=ONES | (weights or {}), root_joint=root, **options)


def test_term_names_and_number(standin):
    target = made_target(standin)
    terms = make_criterion(standin)(make_output([perfect_hands(target, 0)] * 3), target)
    expected = {f'{name}_{side}_{stage}' for name in HAND_TERMS for side in ('left', 'right') for stage in range(3)}
    expected |= {f'offset_{stage}' for stage in range(3)} | set(IMAGE_TERMS)
    assert set(terms) == expected and len(terms) == 42
    assert all(value.ndim == 0 for value in terms.values())


@pytest.mark.parametrize('root', [0, 9])
def test_the_truth_costs_nothing(standin, root):
    target = made_target(standin)
    terms = make_criterion(standin, root)(make_output([perfect_hands(target, root)]), target)
    for name, value in terms.items():
        if name not in IMAGE_TERMS:
            assert value.item() == pytest.approx(0, abs=1e-5), name


def test_centring_on_another_joint_is_seen(standin):
    target = made_target(standin)
    terms = make_criterion(standin, 9)(make_output([perfect_hands(target, 0)]), target)
    assert min(terms[f'{name}_{side}_0'] for name in ('joint_xyz', 'vertex_xyz') for side in ('left', 'right')) > 1e-4
    assert terms['offset_0'] > 1e-5 and terms['edge_left_0'] < 1e-5 and terms['joint_uv_left_0'] == 0


def test_terms_do_not_depend_on_where_the_hands_are(standin):
    target = made_target(standin)
    output = make_output([noisy(perfect_hands(target, 0))])
    criterion, moved = make_criterion(standin), torch.tensor([0.1, -0.2, 0.3])
    here = criterion(output, target)
    there = criterion(output, target._replace(vertices=target.vertices + moved, joints=target.joints + moved))
    for name in here:
        torch.testing.assert_close(here[name], there[name], rtol=1e-3, atol=1e-6)


def test_offset_is_right_minus_left_in_hand_scale(standin):
    target = made_target(standin)
    vector = torch.tensor([0.3, 0.0, -0.15])
    joints, vertices = target.joints.clone(), target.vertices.clone()
    moved = joints[:, 0, 0] + vector - joints[:, 1, 0]
    joints[:, 1] += moved[:, None]
    vertices[:, 1] += moved[:, None]
    target = target._replace(joints=joints, vertices=vertices)
    hands = perfect_hands(target, 0)._replace(offset=torch.tensor([2.0, 0.0, -1.0]).expand(2, 3))
    criterion = make_criterion(standin)
    assert criterion(make_output([hands]), target)['offset_0'] < 1e-8
    opposite = hands._replace(offset=-hands.offset)
    # |z| = 4, 0, 2 in the linear part.
    cost = criterion(make_output([opposite]), target)['offset_0'].item()
    assert cost == pytest.approx(0.01 * (6 - 0.01) / 3, rel=1e-4)


def test_every_geometric_term_equals_its_formula(standin):
    target = made_target(standin)
    hands = noisy(perfect_hands(target, 0))
    terms = make_criterion(standin)(make_output([hands]), target)
    for side, hand in (('left', 0), ('right', 1)):
        root = target.joints[:, hand, :1]
        for name, points, truth in (
            ('joint', hands.joints, target.joints),
            ('vertex', hands.vertices, target.vertices),
        ):
            true = (truth[:, hand] - root) / HAND_SCALE
            expected = F.huber_loss(points[:, hand] / HAND_SCALE, true, delta=0.01)
            torch.testing.assert_close(terms[f'{name}_xyz_{side}_0'], expected)
        for name, uv, truth in (
            ('joint', hands.joints_uv, target.joints_uv),
            ('vertex', hands.vertices_uv, target.vertices_uv),
        ):
            expected = F.huber_loss(uv[:, hand], truth[:, hand], delta=0.01)
            torch.testing.assert_close(terms[f'{name}_uv_{side}_0'], expected)
        meshes = (v[:, hand : hand + 1] / HAND_SCALE for v in (hands.vertices, target.vertices))
        edge, normal = MeshLosses(standin[hand].faces[None])(*meshes)
        torch.testing.assert_close(terms[f'edge_{side}_0'], edge[0], rtol=1e-4, atol=0)
        torch.testing.assert_close(terms[f'normal_{side}_0'], normal[0], rtol=1e-4, atol=0)


def test_image_terms_equal_their_formulas(standin):
    target = made_target(standin)
    output = make_output([perfect_hands(target, 0)])
    terms = make_criterion(standin)(output, target)
    # 32 -> 8: nearest takes the first of four cells, bilinear the mean of the middle two by two.
    labels = target.segmentation[:, ::4, ::4].numpy()
    colour = target.dense.numpy()
    colour = torch.from_numpy(sum(colour[:, :, 1 + i :: 4, 1 + j :: 4] for i in (0, 1) for j in (0, 1)) / 4)
    torch.testing.assert_close(terms['dense'], F.huber_loss(output.dense, colour, delta=0.01), rtol=1e-5, atol=0)
    logits, weights = output.segmentation.double().numpy(), (0.1, 0.45, 0.45)
    cost = share = 0.0
    for b, i, j in np.ndindex(labels.shape):
        c = labels[b, i, j]
        cost += weights[c] * (math.log(np.exp(logits[b, :, i, j]).sum()) - logits[b, c, i, j])
        share += weights[c]
    assert terms['segmentation'].item() == pytest.approx(cost / share, rel=1e-5)
    assert terms['lovasz'].item() == pytest.approx(naive_lovasz(logits, labels), rel=1e-5)
    on_probabilities = make_criterion(standin, lovasz_on_probabilities=True)(output, target)['lovasz']
    probabilities = output.segmentation.double().softmax(1).numpy()
    assert on_probabilities.item() == pytest.approx(naive_lovasz(probabilities, labels), rel=1e-5)


def test_weights_multiply_and_zero_drops_the_term(standin):
    target = made_target(standin)
    output = make_output([noisy(perfect_hands(target, 0))] * 2)
    plain = make_criterion(standin)(output, target)
    weights = {name: float(k + 2) for k, name in enumerate(ALL_TERMS)} | {'edge': 0.0, 'lovasz': 0.0}
    weighted = make_criterion(standin, weights=weights)(output, target)
    assert {name for name in plain if name not in weighted} == {
        'lovasz',
        *(f'edge_{side}_{stage}' for side in ('left', 'right') for stage in (0, 1)),
    }
    for name, value in weighted.items():
        key = next(k for k in ALL_TERMS if name == k or name.startswith(f'{k}_'))
        torch.testing.assert_close(value, weights[key] * plain[name])


def test_left_and_right_are_added_not_averaged(standin):
    target = made_target(standin)
    right = perfect_hands(target, 0)
    wrong = right._replace(joints=right.joints + torch.tensor([0.3, 0.0]).view(2, 1, 1))  # the left hand alone is off
    criterion = make_criterion(standin)
    terms = criterion(make_output([wrong]), target)
    assert terms['joint_xyz_left_0'].item() == pytest.approx(0.01 * (2 - 0.005), rel=1e-4)
    assert terms['joint_xyz_right_0'].item() == pytest.approx(0, abs=1e-8)


def test_scale_to_truth_forgives_size_and_only_size(standin):
    target = made_target(standin)
    true = perfect_hands(target, 9)
    factor = torch.tensor([0.7, 1.4]).view(2, 1, 1)
    scaled = true._replace(joints=true.joints * factor, vertices=true.vertices * factor)
    forgiving = make_criterion(standin, 9, scale_to_truth=True)(make_output([scaled]), target)
    strict = make_criterion(standin, 9)(make_output([scaled]), target)
    for name in ('joint_xyz', 'vertex_xyz', 'edge'):
        for side in ('left', 'right'):
            assert forgiving[f'{name}_{side}_0'] < 1e-5 and strict[f'{name}_{side}_0'] > 1e-4
    shifted = scaled._replace(joints_uv=scaled.joints_uv + 0.1)
    assert make_criterion(standin, 9, scale_to_truth=True)(make_output([shifted]), target)['joint_uv_left_0'] > 1e-4


def test_scale_to_truth_lets_the_gradient_through_the_scale(standin):
    target = made_target(standin)
    hands = noisy(perfect_hands(target, 0))
    size = torch.ones((), requires_grad=True)
    grown = hands._replace(joints=hands.joints * size, vertices=hands.vertices * size)
    for option, reached in ((True, False), (False, True)):
        terms = make_criterion(standin, 0, scale_to_truth=option)(make_output([grown]), target)
        geometric = sum(value for name, value in terms.items() if name not in IMAGE_TERMS)
        (gradient,) = torch.autograd.grad(geometric, size, retain_graph=True)
        # A hand that is scaled to the truth cannot change its cost by growing.
        assert (gradient.abs() > 1e-3) == reached


def test_bone_length_is_wrist_to_middle_mcp():
    joints = torch.randn(3, 2, NUM_JOINTS, 3)
    expected = (joints[:, :, 9] - joints[:, :, 0]).norm(dim=-1)
    torch.testing.assert_close(bone_length(joints)[..., 0, 0], expected)


def test_build_criterion_reads_every_weight_and_switch(standin):
    cfg = load_config(
        None,
        [
            'ROOT_JOINT',
            '9',
            'LOSS.WEIGHT.EDGE',
            '0.25',
            'LOSS.LOVASZ_INPUT',
            'probabilities',
            'LOSS.SCALE_TO_TRUTH',
            'true',
        ],
    )
    criterion = build_criterion(cfg, standin)
    assert criterion.weights == {
        'joint_uv': 10,
        'vertex_uv': 10,
        'joint_xyz': 10,
        'vertex_xyz': 10,
        'edge': 0.25,
        'normal': 0.1,
        'offset': 10,
        'segmentation': 0.1,
        'lovasz': 0.1,
        'dense': 1,
        'presence': 0.1,
        'visibility': 0.1,
        'deviation': 0.02,
    }
    assert criterion.root_joint == 9 and criterion.lovasz_on_probabilities and criterion.scale_to_truth
    assert not criterion.state_dict()
    default = build_criterion(load_config(), standin)
    assert not default.lovasz_on_probabilities and not default.scale_to_truth and default.root_joint == 0
