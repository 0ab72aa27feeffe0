import pytest
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from inference.folding import fold_batch_norms
from models import build_model
from models.backbone import Backbone
from utils.config import load_config


def with_statistics(model: nn.Module, image: torch.Tensor) -> nn.Module:
    """In evaluation mode, with norms that are not the identity."""
    model(image)  # in training mode: running statistics
    for norm in (module for module in model.modules() if isinstance(module, _BatchNorm)):
        norm.weight.uniform_(0.5, 2)
        norm.bias.normal_()
    return model.eval()


def norms(model: nn.Module) -> int:
    return sum(isinstance(module, _BatchNorm) for module in model.modules())


@torch.no_grad()
def test_folded_network_computes_the_same_with_fewer_norms(standin):
    torch.manual_seed(0)
    cfg = load_config(
        None,
        [
            'MODEL.BACKBONE',
            'resnet18',
            'MODEL.IMAGE_SIZE',
            '64',
            'MODEL.MAP_CHANNELS',
            '16',
            'MODEL.PRETRAINED',
            'false',
            'MODEL.INIT',
            'identity',
        ],
    )
    image = torch.randn(4, 3, 64, 64, dtype=torch.float64)
    model = with_statistics(build_model(cfg, standin).double(), image)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    folded = fold_batch_norms(model)
    expected, got = model(image), folded(image)
    for ours, theirs in zip(got.stages, expected.stages):
        for a, b in zip(ours, theirs):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(got.segmentation, expected.segmentation, rtol=1e-6, atol=1e-6)
    assert norms(folded) < norms(model) / 2
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())  # it is a copy


@torch.no_grad()
def test_every_norm_of_a_bottleneck_backbone_is_folded():
    torch.manual_seed(0)
    image = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    model = with_statistics(Backbone('resnet50').double(), image)
    folded = fold_batch_norms(model)
    assert norms(folded) == 0 < norms(model)
    for a, b in zip(folded(image), model(image)):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6 * b.abs().max().item())


def test_training_mode_is_refused():
    with pytest.raises(ValueError, match='evaluation mode'):
        fold_batch_norms(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)))
