import pytest
import torch
from tiny import images, tiny_model
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from inference.folding import fold_batch_norms, for_inference
from models.backbone import Backbone


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
    image = torch.randn(4, 3, 64, 64, dtype=torch.float64)
    model = with_statistics(tiny_model(standin).double(), image)
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


@torch.no_grad()
@pytest.mark.parametrize('changes', [{}, {'STAGES': 0}, {'STAGES': 1, 'PROJECTION': 'none'}], ids=str)
def test_the_inference_form_keeps_the_last_estimate_and_drops_the_rest(standin, changes):
    model = tiny_model(standin, **changes).double().eval()
    slim, image = for_inference(model), images(2).double()
    expected, got = model(image), slim(image)
    for a, b in zip(got.stages[-1], expected.stages[-1]):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
    assert got.segmentation is None and got.dense is None
    unused = ('dense_heads', f'stages.{len(model.stages) - 1}.enhance_map', f'stages.{len(model.stages) - 1}.proj')
    assert not [name for name, _ in slim.named_parameters() if name.startswith(unused)]


def test_training_mode_is_refused():
    with pytest.raises(ValueError, match='evaluation mode'):
        fold_batch_norms(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)))
