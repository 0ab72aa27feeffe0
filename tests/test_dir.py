from contextlib import nullcontext

import pytest
import torch
import torchvision
from tiny import images, made_target, tiny_config, tiny_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from models import build_criterion, build_model, hand_head, refinement
from models.bone_projection import ProjectedConvolution
from models.joint_interaction import CrossHandTransformer, SkeletonGraphLayer
from models.layers import PerHandLinear
from models.predictions import CAMERA, POSE, ROOT_ROTATION, SHAPE
from utils.config import load_config
from utils.errors import UserError
from utils.hand import NUM_FACES, NUM_JOINTS, NUM_VERTICES


def check_shapes(output, *, batch: int, stages: int, map_size: int) -> None:
    assert len(output.stages) == stages + 1
    for hands in output.stages:
        assert [tuple(x.shape[1:]) for x in hands] == [
            (2, 64),
            (3,),
            (2, NUM_VERTICES, 3),
            (2, NUM_JOINTS, 3),
            (2, NUM_VERTICES, 2),
            (2, NUM_JOINTS, 2),
        ]
        assert all(len(x) == batch and x.isfinite().all() for x in hands)
    assert output.segmentation.shape == output.dense.shape == (batch, 3, map_size, map_size)


@pytest.mark.parametrize('stages, map_size', [(0, 2), (1, 4), (2, 8), (3, 16)])
@torch.no_grad()
def test_every_number_of_stages_gives_an_estimate_each(standin, stages, map_size):
    model = tiny_model(standin, STAGES=stages).eval()
    check_shapes(model(images(1)), batch=1, stages=stages, map_size=map_size)
    check_shapes(model(images(2, 96)), batch=2, stages=stages, map_size=map_size * 3 // 2)


VARIANTS = [
    {},
    {'STAGES': 0},
    {'STAGES': 3, 'DETACH': 'false'},
    {'INTERACTION': 'graph'},
    {'STAGES': 1, 'INTERACTION': 'transformer'},
    {'STAGES': 1, 'INTERACTION': 'none'},
    {'STAGES': 1, 'PROJECTION': 'joints'},
    {'PROJECTION': 'none'},
    {'STAGES': 1, 'INIT': 'published'},
    {'STAGES': 0, 'FIRST_STRIDE': 8},
    {'STAGES': 1, 'FIRST_STRIDE': 4},
    {'FIRST_STRIDE': 8, 'ENHANCE_LAST': 'false', 'GRAPH_LAYERS': 3, 'GRAPH_SKIP': 'true'},
    {'STAGES': 1, 'TOKEN_CHANNELS': 32, 'JOINT_FEATURES': 16, 'ATTENTION_CHANNELS': 8, 'DENSE_CHANNELS': 8},
]
LEVELS_BEFORE = {16: 0, 8: 1, 4: 2}  # FIRST_STRIDE -> levels of the neck


@pytest.mark.parametrize('changes', VARIANTS, ids=lambda c: ' '.join(f'{k}={v}' for k, v in c.items()) or 'default')
def test_one_training_step_reaches_every_parameter(standin, changes):
    model = tiny_model(standin, **changes).train()
    output = model(images(3))
    stages = changes.get('STAGES', 2)
    levels = stages + LEVELS_BEFORE[changes.get('FIRST_STRIDE', 16)]
    check_shapes(output, batch=3, stages=stages, map_size=2 * 2**levels)
    sum(build_criterion(tiny_config(**changes), standin)(output, made_target(3)).values()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    reached = [bool(parameter.grad.any()) for parameter in model.parameters()]
    assert sum(reached) > 0.9 * len(reached)  # all but biases in front of a norm


def test_without_dense_heads_the_hands_alone_are_trained(standin):
    model = tiny_model(standin, STAGES=1, DENSE_HEADS='false').train()
    output = model(images(2))
    assert output.segmentation is None and output.dense is None
    assert not [name for name, _ in model.named_parameters() if name.startswith('dense_heads')]
    criterion = build_criterion(tiny_config(STAGES=1), standin)
    terms = criterion(output, made_target(2))
    with_dense = criterion(tiny_model(standin, STAGES=1).train()(images(2)), made_target(2))
    assert with_dense.keys() - terms.keys() == {'segmentation', 'lovasz', 'dense'}
    sum(terms.values()).backward()
    # The last map served the dense heads only: nothing but its making goes without gradient.
    idle = {name.split('.')[2] for name, parameter in model.named_parameters() if parameter.grad is None}
    assert idle == {'projection', 'projected', 'fuse', 'enhance_map'}


@pytest.mark.parametrize('detach', [True, False])
def test_detach_stops_the_last_stages_loss_at_its_own_input(standin, detach):
    model = tiny_model(standin, DETACH=detach).train()
    hands = model(images(2)).stages[-1]
    (hands.vertices.square().sum() + hands.offset.square().sum()).backward()
    heads = [
        model.initial_regressor.parameters_head,
        model.initial_regressor.offset_head,
        model.stages[0].parameters_head,
        model.stages[0].offset_head,
    ]
    moved = [head.weight.grad is not None and bool(head.weight.grad.any()) for head in heads]
    # The first stage's parameters stay reachable when detached: its map is drawn along its own new estimate.
    assert moved == ([False, False, True, False] if detach else [True] * 4)
    assert model.backbone.conv1.weight.grad.any()


@torch.no_grad()
def test_estimates_of_a_sample_do_not_depend_on_its_batch(standin):
    model = tiny_model(standin).eval()
    both, alone = model(images(2)), model(images(2)[1:])
    for a, b in zip(both.stages[-1], alone.stages[-1]):
        torch.testing.assert_close(a[1:], b, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_default_sizes(standin):
    cfg = load_config(None, ['MODEL.BACKBONE', 'resnet18', 'MANO.SOURCE', 'standin'])
    model = build_model(cfg, standin, pretrained=False).eval()
    check_shapes(model(images(1, 256)), batch=1, stages=2, map_size=32)
    assert model.stages[1].projection.weight.shape == (2, 20, 64, 256, 3, 3)
    assert [stage.projection.radius for stage in model.stages] == [1.0, 2.0]


@torch.no_grad()
def test_root_joint_lies_at_the_origin_of_every_estimate(standin):
    cfg = tiny_config()
    cfg.defrost()
    cfg.ROOT_JOINT = 9
    for hands in build_model(cfg, standin).eval()(images(1)).stages:
        assert hands.joints[:, :, 9].abs().max() == 0 and hands.joints[:, :, 0].abs().max() > 0.05


@torch.no_grad()
def test_hands_are_made_in_full_precision_under_autocast(standin):
    model = tiny_model(standin, STAGES=1).eval()
    with torch.autocast('cpu', torch.bfloat16):
        output = model(images(2))
    assert output.segmentation.dtype == torch.bfloat16  # the rest is not
    refined = output.stages[1].parameters
    assert not torch.equal(refined, refined.bfloat16().float())  # nor is what is regressed
    for hands in output.stages:
        alone = model.hand_head(hands.parameters, hands.offset)
        assert all(torch.equal(a, b) for a, b in zip(hands, alone)) and hands.vertices.dtype == torch.float32


def test_uv_is_the_weak_perspective_of_the_joints(standin):
    hands = tiny_model(standin, STAGES=0).eval()(images(1)).stages[0]
    camera = hands.parameters[0, 1, CAMERA]
    torch.testing.assert_close(hands.joints_uv[0, 1], camera[0] * hands.joints[0, 1, :, :2] + camera[1:])
    torch.testing.assert_close(hands.vertices_uv[0, 1], camera[0] * hands.vertices[0, 1, :, :2] + camera[1:])


@torch.no_grad()
def test_identity_starts_at_an_upright_mean_hand_and_every_stage_at_the_one_before(standin):
    output = tiny_model(standin, STAGES=3, INIT='identity').eval()(images(2))
    first = output.stages[0].parameters
    expected = torch.zeros(64)
    expected[ROOT_ROTATION] = torch.tensor([1.0, 0, 0, 0, 1, 0])
    expected[CAMERA.start] = 5
    # Centred, small: N(0, 0.001) weights on features of the backbone.
    assert (first - expected).abs().max() < 0.15
    assert output.stages[0].offset.abs().max() < 0.15
    for before, after in zip(output.stages, output.stages[1:]):
        assert (after.parameters - before.parameters).abs().max() < 0.15
        assert (after.offset - before.offset).abs().max() < 0.15
        assert (after.joints - before.joints).abs().max() < 0.02  # m
    assert first[..., POSE].abs().max() < 0.15 and first[..., SHAPE].abs().max() < 0.15


def test_identity_is_exact_when_the_small_weights_are_zero(standin):
    model = tiny_model(standin, INIT='identity').eval()
    with torch.no_grad():
        for stage in model.stages:
            for head, outputs in ((stage.parameters_head, 64), (stage.offset_head, 3)):
                head.weight[..., :-outputs] = 0
                head.weight[..., -outputs:] = head.weight[..., -outputs:].round()
        output = model(images(1))
    for hands in output.stages[1:]:
        assert torch.equal(hands.parameters, output.stages[0].parameters)
        assert torch.equal(hands.offset, output.stages[0].offset)


def test_published_initialisation_has_the_stated_spread(standin):
    wide = {'MAP_CHANNELS': 64, 'TOKEN_CHANNELS': 128, 'JOINT_FEATURES': 64, 'ATTENTION_CHANNELS': 0}
    model = tiny_model(standin, INIT='published', STAGES=1, **wide)
    heads = [m for part in (model.initial_regressor, model.stages) for m in part.modules()]
    linear = [m for m in heads if isinstance(m, (torch.nn.Linear, PerHandLinear))]
    assert len(linear) == 2 + 2 + 1 + 3 * 4  # regressors, token head, transformer
    for module in linear:
        assert module.weight.std().item() == pytest.approx(0.001, rel=0.15)
    convolutions = [m for m in [*heads, *model.dense_heads.modules()] if isinstance(m, torch.nn.Conv2d)]
    assert len(convolutions) > 10
    for module in convolutions:
        stated = (2 / (module.kernel_size[0] ** 2 * module.out_channels)) ** 0.5
        assert module.weight.std().item() == pytest.approx(stated, rel=0.25)
    for module in heads:
        if isinstance(module, ProjectedConvolution):
            assert module.weight.std().item() == pytest.approx((2 / (9 * 64)) ** 0.5, rel=0.02)
        elif isinstance(module, SkeletonGraphLayer):
            bound = 1.414 * (6 / 256) ** 0.5
            assert 0.99 * bound < module.weight.abs().max() <= bound and bool((module.neighbour_logits == 1).all())
        elif isinstance(module, CrossHandTransformer):
            assert not module.position.any()


def test_identity_leaves_the_transformer_switched_on(standin):
    spread = {}
    for scheme in ('published', 'identity'):
        transformer = tiny_model(standin, STAGES=1, INIT=scheme).stages[0].interaction.transformer
        spread[scheme] = transformer.blocks[0].qkv.weight.std()
    assert spread['published'] < 0.0012 and spread['identity'] > 0.03


def test_no_checkpoint_would_hold_a_hand_model(standin):
    for changes in ({}, {'STAGES': 1, 'PROJECTION': 'joints'}):
        state = tiny_model(standin, **changes).state_dict()
        assert state
        for key, value in state.items():
            assert not {NUM_VERTICES, NUM_FACES} & set(value.shape), key


def test_left_middle_tip_moves_only_that_joint(standin):
    parameters, offset = torch.zeros(1, 2, 64), torch.zeros(1, 3)
    parameters[..., [0, 4]] = 1
    usual, moved = (
        tiny_model(standin, STAGES=0, LEFT_MIDDLE_TIP=tip).hand_head(parameters, offset) for tip in (444, 445)
    )
    changed = (usual.joints != moved.joints).any(-1)[0]
    assert changed.nonzero().tolist() == [[0, 12]]
    torch.testing.assert_close(moved.joints[0, 0, 12], moved.vertices[0, 0, 445])


@torch.no_grad()
def test_features_are_read_where_the_joints_are(standin):
    model = tiny_model(standin, STAGES=1).eval()
    stage, size = model.stages[0], 8
    hand, joint, row, column = 1, 7, 2, 5
    x = torch.zeros(1, 16, size, size)
    x[0, :, row, column] = torch.randn(16)
    # Every joint in one corner, except one in the middle of the hot cell.
    uv = torch.full((1, 2, NUM_JOINTS, 2), -1 + 1 / size)
    uv[0, hand, joint] = (torch.tensor([column, row]) + 0.5) / size * 2 - 1
    hands = model.hand_head(torch.zeros(1, 2, 64), torch.zeros(1, 3))._replace(joints_uv=uv)
    seen = stage.tokens(x, hands) - stage.position(hands.joints / 0.15)
    cold = torch.zeros(1, 2, NUM_JOINTS, 16)
    hot = cold.clone()
    hot[0, hand, joint] = x[0, :, row, column]
    torch.testing.assert_close(seen, stage.sampled(hot), rtol=1e-4, atol=1e-5)
    assert (stage.sampled(hot) - stage.sampled(cold)).abs().max() > 1e-3


# Backbone weights


@pytest.fixture(scope='module')
def torchvision_state():
    torch.manual_seed(5)
    return torchvision.models.resnet18(weights=None).state_dict()


def test_a_local_file_of_torchvision_weights_is_loaded(standin, torchvision_state, tmp_path):
    torch.save(torchvision_state, tmp_path / 'resnet18.pth')
    model = tiny_model(standin, STAGES=0, PRETRAINED='true', BACKBONE_WEIGHTS=tmp_path / 'resnet18.pth').eval()
    reference = torchvision.models.resnet18(weights=None).eval()
    reference.load_state_dict(torchvision_state)
    x = images(2)
    c1 = reference.layer1(reference.maxpool(reference.relu(reference.bn1(reference.conv1(x)))))
    c4 = reference.layer4(reference.layer3(reference.layer2(c1)))
    ours = model.backbone(x)
    assert torch.equal(ours[0], c1) and torch.equal(ours[3], c4)
    assert model.backbone.channels == (64, 128, 256, 512)


def test_weights_are_not_looked_for_when_a_checkpoint_is_about_to_be_loaded(standin, tmp_path):
    cfg = tiny_config(STAGES=0, PRETRAINED='true', BACKBONE_WEIGHTS=tmp_path / 'missing.pth')
    assert build_model(cfg, standin, pretrained=False).backbone.conv1.weight.isfinite().all()


def write_other_network(path, state):
    torch.save({key: value for key, value in state.items() if not key.startswith('layer4')}, path)


def write_checkpoint(path, state):
    torch.save({'model': state}, path)


def write_list(path, state):
    torch.save(list(state.values()), path)


def write_cut_short(path, state):
    torch.save(state, path)
    path.write_bytes(path.read_bytes()[:100_000])


def write_text(path, state):
    path.write_text('<html>not found</html>')


def write_nothing(path, state):
    assert not path.exists()


@pytest.mark.parametrize(
    'write', [write_other_network, write_checkpoint, write_list, write_cut_short, write_text, write_nothing]
)
def test_other_weights_are_refused_by_name(standin, torchvision_state, tmp_path, write):
    path = tmp_path / 'weights.pth'
    write(path, torchvision_state)
    with pytest.raises(UserError, match='weights.pth') as refused:
        tiny_model(standin, STAGES=0, PRETRAINED='true', BACKBONE_WEIGHTS=path)
    assert 'MODEL.BACKBONE_WEIGHTS' in str(refused.value) and '\n' not in str(refused.value)


def test_weights_of_a_deeper_network_do_not_fit(standin, torchvision_state, tmp_path):
    torch.save(torchvision_state, tmp_path / 'resnet18.pth')
    with pytest.raises(UserError, match='do not fit resnet34'):
        tiny_model(
            standin, STAGES=0, BACKBONE='resnet34', PRETRAINED='true', BACKBONE_WEIGHTS=tmp_path / 'resnet18.pth'
        )


def test_weights_that_cannot_be_downloaded_are_a_sentence(standin, monkeypatch):
    def offline(*args, **kwargs):
        raise OSError('Temporary failure in name resolution')

    monkeypatch.setattr(torchvision.models.ResNet18_Weights.DEFAULT.__class__, 'get_state_dict', offline)
    with pytest.raises(UserError, match='ImageNet weights for resnet18 .*MODEL.PRETRAINED false'):
        tiny_model(standin, STAGES=0, PRETRAINED='true')


class NothingFromTheHost(TorchDispatchMode):
    """Refuses operations that mix the device's tensors with ones on the CPU, and lists as indices, which are copied to
    the device each time: an index has to be (a part of) one of ``known``."""

    def __init__(self, known):
        super().__init__()
        self.known = {id(tensor) for tensor in known}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        tensors = [value for value in tree_leaves((args, kwargs)) if isinstance(value, torch.Tensor)]
        devices = {tensor.device.type for tensor in tensors if tensor.ndim}
        assert devices <= {'meta'}, f'{func} takes a tensor from the host'
        if func in (torch.ops.aten.index.Tensor, torch.ops.aten.index_put_.default):
            for index in (index for index in args[1] if index is not None):
                whole = index if index._base is None else index._base
                assert id(whole) in self.known, f'{func} takes an index from the host'
        return func(*args, **kwargs or {})


@pytest.mark.parametrize('changes', [{}, {'FIRST_STRIDE': 8, 'GRAPH_SKIP': 'true', 'ENHANCE_LAST': 'false'}], ids=str)
def test_forward_and_losses_never_wait_for_the_device(standin, monkeypatch, changes):
    """On a device without values, whatever asks for one (item, bool, nonzero) fails."""
    for module in (hand_head, refinement):
        monkeypatch.setattr(module, 'full_precision', lambda device: nullcontext())  # that device has no autocast
    model = tiny_model(standin, **changes).to('meta')
    criterion = build_criterion(tiny_config(), standin).to('meta')
    target = made_target(2).map(lambda values: values.to('meta'))
    image = images(2).to('meta')
    mode = NothingFromTheHost([*model.buffers(), *criterion.buffers()])
    with mode:
        terms = criterion(model(image), target)
        sum(terms.values()).backward()
    assert len(terms) > 20
    for host in (torch.tensor([0, 1]), [0, 1]):
        with mode, pytest.raises(AssertionError, match='from the host'):
            _ = image[host]
    with pytest.raises(RuntimeError):
        bool(image.sum())


def test_a_stage_variant_is_selected_by_name(standin, monkeypatch):
    class Silent(refinement.RefinementStage):
        """Returns the previous estimate."""

        def forward(self, x, skip, previous, hand_head):
            return self.merge(x, skip), previous

    monkeypatch.setitem(refinement.STAGE_VARIANTS, 'silent', Silent)
    stages = tiny_model(standin, STAGE_VARIANT='silent').eval()(torch.zeros(1, 3, 64, 64)).stages
    assert len(stages) > 1 and all(torch.equal(hands.vertices, stages[0].vertices) for hands in stages)


def test_an_unknown_stage_variant_lists_the_known_ones(standin):
    with pytest.raises(UserError, match=r"MODEL.STAGE_VARIANT is 'raft'; it must be one of dir\."):
        tiny_model(standin, STAGE_VARIANT='raft')


def test_the_order_of_a_stages_parts_is_that_of_earlier_versions(standin):
    """Initial weights are drawn in this order: another one is another run with the same seed."""
    parts = [name for name, _ in tiny_model(standin).stages[0].named_children()]
    regression = ['skip', 'fuse_skip', 'sampled', 'position', 'interaction', 'parameters_head', 'offset_head']
    assert parts == [*regression, 'projection', 'projected', 'fuse', 'enhance_map']
