"""Samples that lack a hand: placeholders instead of labels, losses that pass over them, presence, and confidence."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from prepared_tree import write_prepared
from tiny import TINY, images, made_target, tiny_config, tiny_model

from dataset.batch import BatchMaker, build_batch_maker
from dataset.damage import DamageError
from dataset.prepared import InterHandDataset, check_finite
from dataset.targets import JointVisibility, TargetRenderer
from dataset.vertex_colours import canonical_colours
from inference.folding import for_inference
from manopth import Hands, TwoHandLayer
from models import build_criterion, losses
from models.confidence import LARGEST_DEVIATION, SMALLEST_DEVIATION, PresenceHead
from models.predictions import JointConfidence
from models.trainer import Trainer
from utils.config import load_config
from utils.hand import HAND_SCALE, LEFT, RIGHT

ABSENT = {1: ('left',), 2: ('right',), 3: ('left', 'right')}
PRESENT = torch.tensor([[True, True], [False, True], [True, False], [False, False]])


@pytest.fixture(scope='module')
def some_absent(tmp_path_factory):
    root = tmp_path_factory.mktemp('absent')
    write_prepared(root, 'train', 4, absent=ABSENT)
    return root


@pytest.fixture(scope='module')
def samples(some_absent):
    return InterHandDataset(some_absent, 'train').__getitems__(range(4))


# Reading


def test_an_absent_hand_is_the_mean_hand_one_metre_ahead(samples):
    assert torch.equal(samples.present, PRESENT)
    for sample, hand in (~PRESENT).nonzero().tolist():
        assert torch.equal(samples.root[sample, hand], torch.eye(3))
        assert not samples.pose[sample, hand].any() and not samples.shape[sample, hand].any()
        ahead = samples.camera_rotation[sample] @ samples.translation[sample, hand] + samples.camera_translation[sample]
        torch.testing.assert_close(ahead, torch.tensor([0.0, 0.0, 1.0]))
    assert all(x.isfinite().all() for x in (samples.root, samples.pose, samples.shape, samples.translation))


def test_a_hand_without_numbers_is_damage_unless_it_is_absent():
    labels = [np.zeros((2, 3, 3)), np.zeros((2, 45)), np.zeros((2, 10)), np.zeros((2, 3)), np.eye(3)]
    for array in labels[:4]:
        array[LEFT] = np.nan
    check_finite(labels, 'x', advice='y', absent=np.array([True, False]))
    for absent in (None, np.array([False, False]), np.array([False, True])):
        with pytest.raises(DamageError, match='x holds NaN'):
            check_finite(labels, 'x', advice='y', absent=absent)
    labels[4][0, 0] = np.inf
    with pytest.raises(DamageError):
        check_finite(labels, 'x', advice='y', absent=np.array([True, False]))


# Batches


@pytest.mark.parametrize('flip', [False, True])
def test_presence_is_mirrored_with_the_image(samples, standin, flip):
    plan = samples.augmentation._replace(flip=torch.full((4,), flip))
    batch = BatchMaker(standin)(samples._replace(augmentation=plan))
    assert torch.equal(batch.target.present, PRESENT.flip(1) if flip else PRESENT)
    assert all(x is None or x.isfinite().all() for x in batch.target)


def test_all_parts_of_a_batch_tell_presence_if_one_does(samples, standin):
    many = samples.map_tensors(lambda x: torch.cat([x[:1].expand(8, *x.shape[1:]), x]))
    rows = [0] * 8 + [0, 1, 2, 3]
    many = many._replace(augmentation=type(many.augmentation)(*(x[rows] for x in samples.augmentation)))
    target = BatchMaker(standin)(many).target
    assert torch.equal(target.present, torch.cat([torch.ones(8, 2, dtype=torch.bool), PRESENT]))
    first = many.map_tensors(lambda x: x[:8])
    first = first._replace(augmentation=type(first.augmentation)(*(x[:8] for x in first.augmentation)))
    assert BatchMaker(standin)(first).target.present is None


def test_an_absent_hand_is_not_rendered(samples, standin):
    maker = BatchMaker(standin, renderer=TargetRenderer(standin, canonical_colours(standin)))
    classes = maker(samples).target.segmentation
    seen = torch.stack([(classes == hand + 1).flatten(1).any(1) for hand in (LEFT, RIGHT)], 1)
    assert torch.equal(seen, PRESENT)


# Losses


def judged(standin, present, **changes):
    """Terms of a batch of four with these hands present, its output and target."""
    model = tiny_model(standin, **{'PRESENCE': True, **changes})
    output = model.eval()(images(4))
    target = made_target(4)._replace(present=present)
    return build_criterion(tiny_config(), standin)(output, target), output, target


def test_the_labels_of_an_absent_hand_do_not_matter(standin):
    terms, output, target = judged(standin, PRESENT)
    off = ~PRESENT[:, :, None, None]
    for name in ('vertices', 'joints', 'vertices_uv', 'joints_uv'):
        other = target._replace(**{name: torch.where(off, 7.0, getattr(target, name))})
        for key, value in build_criterion(tiny_config(), standin)(output, other).items():
            assert torch.equal(value, terms[key]), (name, key)


def test_an_absent_hand_gets_no_gradient_even_where_its_error_has_none(standin):
    values = torch.ones(4, 2, 5, requires_grad=True)
    root = torch.where(PRESENT[:, :, None], values, values - 1.0).sqrt()  # infinite slope at zero
    losses.mean_per_hand(root, PRESENT).sum().backward()
    expected = PRESENT[:, :, None].expand(4, 2, 5) * 0.5 / 20
    assert torch.equal(values.grad.nan_to_num(0), expected) or torch.equal(values.grad, expected)


def test_the_mean_over_a_batch_is_the_mean_over_its_parts(standin):
    terms, output, target = judged(standin, PRESENT)
    criterion = build_criterion(tiny_config(), standin)

    def part(rows):
        hands = [type(hands)(*(x[rows] for x in hands)) for hands in output.stages]
        maps = {name: getattr(output, name)[rows] for name in ('segmentation', 'dense', 'presence')}
        return output._replace(stages=hands, **maps)

    halves = [criterion(part(rows), target.map(lambda x, rows=rows: x[rows])) for rows in (slice(0, 2), slice(2, 4))]
    for name, value in terms.items():
        if name not in ('segmentation', 'lovasz'):
            torch.testing.assert_close(value, (halves[0][name] + halves[1][name]) / 2)


def test_terms_of_whole_batches_are_the_same_to_the_bit_with_and_without_presence(standin):
    everyone, _, _ = judged(standin, torch.ones(4, 2, dtype=torch.bool))
    unknown, _, _ = judged(standin, None)
    assert everyone.keys() == unknown.keys() and 'presence' in everyone
    for name, value in everyone.items():
        torch.testing.assert_close(value, unknown[name], rtol=1e-6, atol=0)


def test_presence_is_learned_from_logits(standin):
    _, output, target = judged(standin, PRESENT)
    output = output._replace(presence=torch.randn(4, 2))
    terms = build_criterion(tiny_config(), standin)(output, target)
    expected = F.binary_cross_entropy(output.presence.sigmoid(), PRESENT.float())
    torch.testing.assert_close(terms['presence'], 0.1 * expected)


# Heads


def test_optional_heads_leave_every_other_weight_and_estimate_as_it_was(standin):
    plain, more = tiny_model(standin).eval(), tiny_model(standin, PRESENCE=True, CONFIDENCE=True).eval()
    added = {name for name in more.state_dict() if name not in plain.state_dict()}
    assert {name.split('.')[0] for name in added} == {'presence_head', 'confidence_head'}
    for name, value in plain.state_dict().items():
        assert torch.equal(value, more.state_dict()[name]), name
    ours, theirs = plain(images(2)), more(images(2))
    assert ours.presence is None and ours.confidence is None
    for a, b in zip(ours.stages[-1], theirs.stages[-1], strict=True):
        assert torch.equal(a, b)
    assert theirs.presence.shape == (2, 2)
    assert theirs.confidence.visible.shape == theirs.confidence.deviation.shape == (2, 2, 21)


@pytest.mark.parametrize('changes', [{}, {'STAGES': 0}, {'ENHANCE_LAST': False}, {'DENSE_HEADS': False}])
def test_inference_keeps_presence_and_confidence(standin, changes):
    model = tiny_model(standin, PRESENCE=True, CONFIDENCE=True, **changes).eval()
    slim = for_inference(model)
    whole, folded = model(images(2)), slim(images(2))
    assert slim.dense_heads is None
    torch.testing.assert_close(folded.presence, whole.presence, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(folded.confidence.visible, whole.confidence.visible, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(folded.confidence.deviation, whole.confidence.deviation, rtol=1e-4, atol=1e-6)


def test_one_cell_is_enough_for_presence():
    head = PresenceHead(4).eval()
    for parameter in head.parameters():
        torch.nn.init.zeros_(parameter)
    assert not head(torch.randn(1, 4, 8, 8)).any()
    cells = torch.zeros(1, 2, 8, 8)
    cells[0, RIGHT, 3, 5] = 20.0
    head.evidence = torch.nn.Identity()
    left, right = head(cells)[0].tolist()
    assert left == pytest.approx(0, abs=1e-5) and right == pytest.approx(20 - math.log(64), abs=1e-3)


def test_confidence_sends_no_gradient_into_the_estimate(standin):
    model = tiny_model(standin, CONFIDENCE=True, ENHANCE_LAST=False)
    output = model(images(2))
    (output.confidence.visible.sum() + output.confidence.deviation.sum()).backward()
    assert all(p.grad is None or not p.grad.any() for p in model.stages[-1].parameters_head.parameters())
    assert any(p.grad is not None and p.grad.any() for p in model.backbone.parameters())


def test_the_best_deviation_is_the_rms_error_of_a_coordinate():
    errors = 0.03 * torch.randn(20_000, 3, generator=torch.Generator().manual_seed(0))
    candidates = torch.linspace(0.01, 0.09, 81)
    cost = torch.stack([losses.deviation_loss(each.expand(len(errors)), errors).mean() for each in candidates])
    assert candidates[cost.argmin()].item() == pytest.approx(errors.square().mean().sqrt().item(), abs=1.1e-3)


def test_deviations_stay_within_their_limits_and_the_root_has_no_say(standin):
    terms, output, target = judged(standin, PRESENT, CONFIDENCE=False)
    zeros = torch.zeros(4, 2, 21)
    criterion = build_criterion(tiny_config(), standin)
    target = target._replace(visible=torch.ones(4, 2, 21, dtype=torch.bool))
    confidence = JointConfidence(zeros, zeros + 0.02)
    with_root = JointConfidence(zeros, torch.cat([zeros[:, :, :1] + 0.4, zeros[:, :, 1:] + 0.02], -1))
    a, b = (criterion(output._replace(confidence=each), target) for each in (confidence, with_root))
    assert torch.equal(a['deviation_left'], b['deviation_left']) and 'deviation_left' not in terms
    errors = output.stages[-1].joints - (target.joints - target.joints[:, :, :1])
    cost = losses.deviation_loss(torch.tensor(0.02 / HAND_SCALE), errors / HAND_SCALE)[..., 1:]
    torch.testing.assert_close(a['deviation_left'], 0.02 * cost[:, LEFT][PRESENT[:, LEFT]].sum() / (4 * 21))
    head = tiny_model(standin, CONFIDENCE=True).confidence_head.eval()
    for bias, limit in ((-50.0, SMALLEST_DEVIATION), (50.0, LARGEST_DEVIATION)):
        torch.nn.init.constant_(head.judge[-1].bias, bias)
        deviation = head(torch.randn(4, 16, 8, 8), output.stages[-1]).deviation
        assert torch.equal(deviation, torch.full_like(deviation, limit))


def test_confidence_without_visible_joints_is_refused(standin):
    with pytest.raises(ValueError, match='visibility=True'):
        judged(standin, None, CONFIDENCE=True)


# Visibility


def hands_before_a_camera(standin, depths):
    """Both hands at rest, flat before the camera at these depths (m), one above the other."""
    layer = TwoHandLayer(standin)
    turn = torch.tensor([[1.0, 0, 0], [0, 0, -1], [0, 1, 0]]).expand(1, 2, 3, 3)
    hands = layer(turn, torch.zeros(1, 2, 45), torch.zeros(1, 2, 10))
    extent = hands.vertices[0].amax(1) - hands.vertices[0].amin(1)
    flat = int(extent[0].argmin())
    assert flat == 2, extent  # the palm faces the camera
    middle = (hands.vertices.amax(2) + hands.vertices.amin(2)) / 2
    place = torch.tensor([[0.0, 0.0, depth] for depth in depths])[None] - middle
    return Hands(*(points + place[:, :, None] for points in hands))


CAMERA = torch.tensor([[[600.0, 0, 128], [0, 600.0, 128], [0, 0, 1]]])


def test_all_joints_of_a_flat_hand_are_visible_and_those_behind_it_are_not(standin):
    visibility = JointVisibility(standin)
    for nearer in (LEFT, RIGHT):
        depths = [0.6, 0.6]
        depths[1 - nearer] = 0.7
        visible = visibility(hands_before_a_camera(standin, depths), CAMERA)
        assert visible[0, nearer].all()
        assert visible[0, 1 - nearer].float().mean() < 0.8
        alone = torch.tensor([[nearer == RIGHT, nearer == LEFT]])
        visible = visibility(hands_before_a_camera(standin, depths), CAMERA, alone)
        assert visible[0, 1 - nearer].all() and not visible[0, nearer].any()


def test_joints_outside_the_crop_or_behind_the_camera_are_not_visible(standin):
    visibility = JointVisibility(standin)
    hands = hands_before_a_camera(standin, [0.6, 0.6])
    left = Hands(*(points - torch.tensor([0.6, 0.0, 0.0]) for points in hands))
    behind = Hands(*(points - torch.tensor([0.0, 0.0, 3.0]) for points in hands))
    assert not visibility(left, CAMERA).any()
    assert visibility(behind, CAMERA).shape == (1, 2, 21)


def test_a_network_with_everything_trains(some_absent, standin):
    changes = ['DATASET.PATH', str(some_absent), 'MODEL.PRESENCE', 'true', 'MODEL.CONFIDENCE', 'true']
    cfg = load_config(None, [*TINY, *changes])
    trainer = Trainer(cfg, standin, torch.device('cpu'))
    trainer.train()
    batch = build_batch_maker(cfg, standin)(InterHandDataset(some_absent, 'train').__getitems__(range(4)))
    first = trainer.step([(batch.image, batch.target)], number=0, count=1, rate=5e-3).terms
    for _ in range(40):
        last = trainer.step([(batch.image, batch.target)], number=0, count=1, rate=5e-3).terms
    assert {'presence', 'visibility_left', 'deviation_right'} <= set(first)
    assert last['presence'] < 0.8 * first['presence'] and last['visibility_left'] < first['visibility_left']
