import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from models.joint_interaction import (
    CrossHandTransformer,
    JointInteraction,
    SkeletonGraphLayer,
    TransformerBlock,
    common_frame_joints,
)
from models.layers import PerHandLinear, PerHandMLP, Residual, SharedMLP, fold_hands, unfold_hands
from models.predictions import HandPrediction
from utils.hand import BONES, HAND_SCALE, NUM_JOINTS


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def made_hands(batch: int = 3) -> HandPrediction:
    empty = torch.zeros(batch, 2, 0)
    return HandPrediction(empty, torch.randn(batch, 3), empty, 0.1 * torch.randn(batch, 2, NUM_JOINTS, 3), empty, empty)


def randomise(module: nn.Module) -> nn.Module:
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)
    for name, buffer in module.named_buffers():
        if name.endswith('running_mean'):
            buffer.normal_()
        elif name.endswith('running_var'):
            buffer.uniform_(0.5, 2)
    return module


def test_graph_layer_equals_a_loop_over_hands_and_joints():
    layer = randomise(SkeletonGraphLayer(4, 5)).double().eval()
    tokens = torch.randn(2, 2, NUM_JOINTS, 4, dtype=torch.float64)
    expected = torch.zeros(2, 2, NUM_JOINTS, 5, dtype=torch.float64)
    for hand in range(2):
        logits = dict(zip(sorted([*BONES, *(bone[::-1] for bone in BONES)]), layer.neighbour_logits[hand]))
        for i in range(NUM_JOINTS):
            own, _ = layer.weight[hand, i].split(5, -1)
            mixed = tokens[:, hand, i] @ own
            neighbours = [j for j in range(NUM_JOINTS) if (i, j) in logits]
            share = torch.stack([logits[i, j] for j in neighbours]).softmax(0)
            for j, part in zip(neighbours, share):
                mixed = mixed + part * (tokens[:, hand, j] @ layer.weight[hand, j].split(5, -1)[1])
            expected[:, hand, i] = mixed + layer.bias[hand]
        norm, channels = layer.norm, slice(5 * hand, 5 * hand + 5)
        expected[:, hand] = (
            (expected[:, hand] - norm.running_mean[channels])
            / (norm.running_var[channels] + norm.eps).sqrt()
            * norm.weight[channels]
            + norm.bias[channels]
        ).relu()
    torch.testing.assert_close(layer(tokens), expected, rtol=0, atol=1e-12)
    assert (expected > 0).double().mean() > 0.2


def test_neighbour_weights_sum_to_one_and_stay_on_the_skeleton():
    weights = randomise(SkeletonGraphLayer(2, 2)).neighbour_weights()
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, NUM_JOINTS))
    linked = torch.zeros(NUM_JOINTS, NUM_JOINTS, dtype=torch.bool)
    for parent, child in BONES:
        linked[parent, child] = linked[child, parent] = True
    assert weights[:, ~linked].abs().sum() == 0 and (weights[:, linked] > 0).all()


def test_both_matrices_and_the_logits_of_the_graph_learn():
    layer = SkeletonGraphLayer(3, 4)
    nn.init.normal_(layer.weight)
    (layer(torch.randn(4, 2, NUM_JOINTS, 3)) * torch.randn(4, 2, NUM_JOINTS, 4)).sum().backward()
    for parameter in (layer.weight, layer.neighbour_logits, layer.norm.weight):
        assert parameter.grad.isfinite().all() and parameter.grad.abs().sum() > 0


def which_outputs_change(module, tokens: torch.Tensor, *, hand: int) -> torch.Tensor:
    """(2,) bool: which hands' outputs move when ``hand``'s tokens do."""
    moved = tokens.clone()
    moved[:, hand] += torch.randn_like(moved[:, hand])
    return (module(moved) - module(tokens)).abs().amax((0, 2, 3)) > 1e-6


@pytest.mark.parametrize('hand', [0, 1])
def test_hands_are_alone_in_the_graph_and_meet_in_the_transformer(hand):
    tokens = torch.randn(2, 2, NUM_JOINTS, 128)
    graph = randomise(SkeletonGraphLayer(128, 8)).eval()
    assert which_outputs_change(graph, tokens, hand=hand).tolist() == [hand == 0, hand == 1]
    transformer = CrossHandTransformer(128)
    assert which_outputs_change(transformer, tokens, hand=hand).tolist() == [True, True]


@pytest.mark.parametrize('graph', [True, False])
@pytest.mark.parametrize('transformer', [True, False])
def test_joint_interaction_crosses_hands_only_with_the_transformer(graph, transformer):
    module = JointInteraction(16, 6, graph=graph, transformer=transformer).eval()
    for layer in module.graph:
        nn.init.normal_(layer.weight, std=0.3)
    hands, tokens = made_hands(2), torch.randn(2, 2, NUM_JOINTS, 16)
    assert module(tokens, hands).shape == (2, 2, NUM_JOINTS, 6)
    changed = which_outputs_change(lambda x: module(x, hands), tokens, hand=0)
    assert changed.tolist() == [True, transformer]
    assert len(module.graph) == (4 if graph else 0)


def test_transformer_block_is_attention_written_out():
    block = randomise(TransformerBlock(8, heads=2)).double()
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    q, k, v = block.qkv(F.layer_norm(x, (8,), block.norm1.weight, block.norm1.bias, 1e-6)).chunk(3, -1)
    heads = []
    for head in (slice(0, 4), slice(4, 8)):
        share = (q[..., head] @ k[..., head].transpose(1, 2) / 4**0.5).softmax(-1)
        heads.append(share @ v[..., head])
    y = x + block.out(torch.cat(heads, -1))
    hidden = block.mlp[0](F.layer_norm(y, (8,), block.norm2.weight, block.norm2.bias, 1e-6))
    gelu = hidden * 0.5 * (1 + torch.erf(hidden / 2**0.5))
    torch.testing.assert_close(block(x), y + block.mlp[2](gelu), rtol=0, atol=1e-12)


def test_transformer_knows_positions_and_norms_after_every_block():
    transformer = CrossHandTransformer(16, blocks=2)
    tokens = torch.randn(2, 2, NUM_JOINTS, 16)
    out = transformer(tokens)
    assert out.shape == tokens.shape
    torch.testing.assert_close(out.mean(-1), torch.zeros(2, 2, NUM_JOINTS), rtol=0, atol=1e-5)
    # Without positions, attention does not know the order of its tokens; with them it does.
    order = torch.randperm(NUM_JOINTS)
    torch.testing.assert_close(transformer(tokens[:, :, order]), out[:, :, order], rtol=1e-4, atol=1e-5)
    nn.init.normal_(transformer.position)
    assert (transformer(tokens[:, :, order]) - transformer(tokens)[:, :, order]).abs().max() > 0.1


def test_shared_mlp_moves_its_running_statistics_once_per_hand():
    mlp = SharedMLP(3, 4, 5)
    single = copy.deepcopy(mlp)
    tokens = torch.randn(6, 2, NUM_JOINTS, 3) + torch.tensor([0.0, 2.0]).view(2, 1, 1)
    out = mlp(tokens)
    for hand in range(2):  # left, then right, through the plain layers
        expected = nn.Sequential.forward(single, tokens[:, hand].transpose(1, 2)).transpose(1, 2)
        torch.testing.assert_close(out[:, hand], expected)
    assert mlp[1].num_batches_tracked == 2
    torch.testing.assert_close(mlp[1].running_mean, single[1].running_mean)
    torch.testing.assert_close(mlp[1].running_var, single[1].running_var)


@pytest.mark.parametrize('training', [True, False])
def test_per_hand_mlp_equals_two_networks(training):
    mlp = randomise(PerHandMLP(3, 4, 5)).train(training)
    tokens = torch.randn(6, 2, NUM_JOINTS, 3)
    singles = []
    for hand in range(2):
        single = nn.Sequential(nn.Conv1d(3, 4, 1), nn.BatchNorm1d(4), nn.ReLU(), nn.Conv1d(4, 5, 1)).train(training)
        single.load_state_dict(
            {key: value if value.ndim == 0 else value.chunk(2)[hand] for key, value in mlp.state_dict().items()}
        )
        singles.append(single)
    out = mlp(tokens)
    for hand, single in enumerate(singles):
        torch.testing.assert_close(out[:, hand], single(tokens[:, hand].transpose(1, 2)).transpose(1, 2))
        torch.testing.assert_close(mlp[1].running_mean.chunk(2)[hand], single[1].running_mean)
    assert (singles[0][1].num_batches_tracked == 1) == training


def test_per_hand_linear_equals_two_linear_layers():
    layer, x = PerHandLinear(7, 4), torch.randn(3, 2, 7)
    expected = torch.stack([F.linear(x[:, hand], layer.weight[hand], layer.bias[hand]) for hand in range(2)], 1)
    torch.testing.assert_close(layer(x), expected)
    assert layer.weight.abs().max() <= 7**-0.5


def test_residual_keeps_its_input_where_the_branch_is_silent():
    same, wider = Residual(6, 6), Residual(4, 6)
    x = torch.randn(2, 6, 5, 5)
    for block in (same, wider):
        nn.init.zeros_(block[8].weight)
        nn.init.zeros_(block[8].bias)
    assert torch.equal(same(x), x)
    torch.testing.assert_close(wider(x[:, :4]), F.conv2d(x[:, :4], wider.skip.weight, wider.skip.bias))


def test_folding_hands_into_channels_and_back():
    tokens = torch.randn(2, 2, NUM_JOINTS, 3)
    folded = fold_hands(tokens)
    assert folded.shape == (2, 6, NUM_JOINTS) and torch.equal(folded[:, 3:].transpose(1, 2), tokens[:, 1])
    assert torch.equal(unfold_hands(folded), tokens)


def test_common_frame_is_centred_between_the_roots():
    hands = made_hands()
    joints = common_frame_joints(hands)
    local = hands.joints / HAND_SCALE
    torch.testing.assert_close(
        joints - local, torch.stack([-hands.offset, hands.offset], 1)[:, :, None].expand_as(joints) / 2
    )
    # The right root minus the left root is the offset.
    torch.testing.assert_close((joints - local)[:, 1, 0] - (joints - local)[:, 0, 0], hands.offset)
