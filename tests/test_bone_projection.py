import math

import pytest
import torch
import torch.nn.functional as F

from models.bone_projection import ProjectedConvolution, bone_weights, cell_centres, draw, drawn_norm, joint_weights
from utils.hand import BONES, NUM_JOINTS


def made_uv(batch: int = 2, *, seed: int = 0, reach: float = 0.9) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return reach * (2 * torch.rand(batch, 2, NUM_JOINTS, 2, generator=generator, dtype=torch.float64) - 1)


def naive_bone_weights(uv: torch.Tensor, *, size: int, radius: float) -> torch.Tensor:
    """Cell by cell, from the definition in words."""
    weights = torch.zeros(len(uv), 2, len(BONES), 2, size, size, dtype=torch.float64)
    for sample in range(len(uv)):
        for hand in range(2):
            for bone, (parent, child) in enumerate(BONES):
                px, py = ((uv[sample, hand, parent] + 1) / 2 * size).tolist()
                cx, cy = ((uv[sample, hand, child] + 1) / 2 * size).tolist()
                length = math.hypot(cx - px, cy - py)
                if length == 0:
                    continue
                for row in range(size):
                    for column in range(size):
                        x, y = column + 0.5, row + 0.5
                        t = ((x - px) * (cx - px) + (y - py) * (cy - py)) / length**2
                        t = min(max(t, 0.0), 1.0)
                        if math.hypot(x - px - t * (cx - px), y - py - t * (cy - py)) < radius:
                            to_parent, to_child = math.hypot(x - px, y - py), math.hypot(x - cx, y - cy)
                            weights[sample, hand, bone, 0, row, column] = 1 - to_parent / (to_parent + to_child)
                            weights[sample, hand, bone, 1, row, column] = 1 - to_child / (to_parent + to_child)
    return weights


def test_cell_centres_are_right_then_down():
    centres = cell_centres(4, torch.zeros(()))
    assert centres[1, 3].tolist() == [3.5, 1.5]


@pytest.mark.parametrize('size, radius', [(5, 1.0), (8, 2.0)])
def test_bone_weights_equal_a_loop_over_cells(size, radius):
    uv = made_uv(reach=1.3)  # some joints outside the map
    expected = naive_bone_weights(uv, size=size, radius=radius)
    assert 0.02 < (expected > 0).double().mean() < 0.9
    torch.testing.assert_close(bone_weights(uv, size=size, radius=radius), expected, rtol=0, atol=1e-12)


def test_the_two_ends_share_a_cell_completely():
    total = bone_weights(made_uv(), size=12, radius=1.5).sum(3)
    inside = total > 0
    assert inside.any() and not inside.all()
    torch.testing.assert_close(total[inside], torch.ones_like(total[inside]))


def test_a_cell_on_a_joint_takes_that_joint_alone():
    uv = made_uv(1)
    uv[0, 0, 0] = (cell_centres(8, uv)[2, 5] / 8) * 2 - 1
    bone = BONES.index((0, 9))
    assert bone_weights(uv, size=8, radius=1.0)[0, 0, bone, :, 2, 5].tolist() == [1.0, 0.0]


def test_zero_length_bones_contribute_nothing_and_gradients_stay_finite():
    uv = made_uv()
    uv[0, 0] = 0.125  # a whole hand in one point, which is a cell's centre at size 8
    uv[0, 1, 2] = uv[0, 1, 1]
    uv.requires_grad_()
    weights = bone_weights(uv, size=8, radius=1.0)
    assert weights[0, 0].abs().sum() == 0 and weights[0, 1, BONES.index((1, 2))].abs().sum() == 0
    assert weights[0, 1].sum() > 0
    (gradient,) = torch.autograd.grad((weights * torch.randn_like(weights)).sum(), uv)
    assert gradient.isfinite().all() and gradient[1].abs().sum() > 0 and gradient[0, 0].abs().sum() == 0


def test_hands_far_outside_the_map_draw_nothing():
    weights = bone_weights(made_uv() + 10, size=8, radius=2.0)
    assert weights.isfinite().all() and weights.abs().sum() == 0
    assert joint_weights(made_uv() + 10, size=8, radius=2.0).abs().sum() == 0


def test_bone_weights_gradient_is_the_numerical_one():
    uv = made_uv(1, seed=3)[..., :1, :].expand(1, 2, NUM_JOINTS, 2).clone()
    uv[0, :, 9] += torch.tensor([0.5, 0.2], dtype=torch.float64)  # one bone per hand that is not a point: 0-9

    def drawn(joints):
        return bone_weights(joints, size=4, radius=50.0)[:, :, BONES.index((0, 9))]  # no mask border to step over

    assert torch.autograd.gradcheck(drawn, uv.requires_grad_())


def test_joint_weights_fall_from_one_at_the_joint_to_zero():
    uv, radius = made_uv(), 1.5
    weights = joint_weights(uv, size=6, radius=radius)
    assert weights.shape == (2, 2, NUM_JOINTS, 1, 6, 6)
    for hand, joint, row, column in ((0, 0, 2, 3), (1, 9, 0, 5), (1, 20, 4, 4)):
        x, y = ((uv[1, hand, joint] + 1) / 2 * 6).tolist()
        expected = max(0.0, 1 - math.hypot(column + 0.5 - x, row + 0.5 - y) / (radius + 1))
        assert weights[1, hand, joint, 0, row, column].item() == pytest.approx(expected, abs=1e-12)
    uv[0, 0, 3] = (cell_centres(6, uv)[1, 4] / 6) * 2 - 1
    assert joint_weights(uv, size=6, radius=radius)[0, 0, 3, 0, 1, 4] == 1


def test_draw_puts_hand_bone_and_feature_in_that_order_and_never_mixes_hands():
    weights = bone_weights(made_uv(), size=8, radius=2.0)
    features = torch.randn(2, 2, len(BONES), 2, 3, dtype=torch.float64)
    drawn = draw(weights, features)
    assert drawn.shape == (2, 2 * 20 * 3, 8, 8)
    hand, bone, channel = 1, 7, 2
    expected = sum(weights[:, hand, bone, end] * features[:, hand, bone, end, channel, None, None] for end in (0, 1))
    torch.testing.assert_close(drawn[:, hand * 60 + bone * 3 + channel], expected)

    other = features.clone()
    other[:, 0] += 1
    changed = (draw(weights, other) != drawn).flatten(2).any(-1)
    assert changed[:, :60].any() and not changed[:, 60:].any()


@pytest.mark.parametrize('weigh, ends', [(bone_weights, 2), (joint_weights, 1)])
def test_drawn_norm_is_that_of_the_drawn_map(weigh, ends):
    weights = weigh(made_uv(), size=8, radius=1.5)
    features = torch.randn(2, 2, weights.shape[2], ends, 5, dtype=torch.float64)
    features[:, 0, :, -1] = -features[:, 0, :, 0]  # half-way along its bones the left hand's features vanish
    expected = draw(weights, features).norm(dim=1)
    assert (expected < 0.3).any() and (expected > 1).any()
    # The root of a rounded square: half the digits where nearly nothing is drawn.
    torch.testing.assert_close(drawn_norm(weights, features), expected, rtol=1e-9, atol=1e-7)


@pytest.mark.parametrize('along', ['bones', 'joints'])
def test_projected_convolution_equals_a_convolution_over_the_drawn_map(along):
    torch.manual_seed(0)
    size, radius, channels, out = 8, 2.0, 5, 4
    layer = ProjectedConvolution(channels, out, radius=radius, along=along).double()
    torch.nn.init.normal_(layer.bias)
    uv = made_uv(reach=1.1).requires_grad_()
    tokens = torch.randn(2, 2, NUM_JOINTS, channels, dtype=torch.float64, requires_grad=True)
    weigh = bone_weights if along == 'bones' else joint_weights
    ends = torch.tensor(BONES) if along == 'bones' else torch.arange(NUM_JOINTS)[:, None]

    fast = layer(uv, tokens, size=size)
    drawn = draw(weigh(uv, size=size, radius=radius), tokens[:, :, ends])
    slow = F.conv2d(drawn, layer.as_conv_weight(layer.weight), layer.bias, padding=1)
    torch.testing.assert_close(fast, slow, rtol=0, atol=1e-12)

    direction = torch.randn_like(fast)
    inputs = (uv, tokens, layer.weight, layer.bias)
    for ours, theirs in zip(*(torch.autograd.grad((y * direction).sum(), inputs) for y in (fast, slow))):
        assert theirs.abs().max() > 1e-3
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-11)


def test_conv_weight_conversion_goes_both_ways():
    weight = torch.randn(2, 20, 6, 4, 3, 3)
    as_conv = ProjectedConvolution.as_conv_weight(weight)
    assert as_conv.shape == (4, 2 * 20 * 6, 3, 3)
    assert torch.equal(as_conv[3, 1 * 120 + 7 * 6 + 5], weight[1, 7, 5, 3])
    assert torch.equal(ProjectedConvolution.from_conv_weight(as_conv, 6), weight)
