"""Convolutions with packed weights equal PyTorch's."""

import pytest
import torch
from tiny import TINY, images
from torch import nn

from inference.folding import for_inference
from inference.packed_convolutions import PackedConv2d, pack_convolutions, packable
from models import build_model
from utils.config import load_config

pytestmark = pytest.mark.skipif(not packable(nn.Conv2d(1, 1, 1)), reason='convolutions are not packed on this platform')


@torch.inference_mode()
@pytest.mark.parametrize(
    'convolution',
    [
        nn.Conv2d(12, 20, 1),
        nn.Conv2d(12, 20, 3, padding=1, bias=False),
        nn.Conv2d(12, 20, 7, padding=3, stride=2),
        nn.Conv2d(12, 12, 5, padding=2, groups=12, bias=False),
        nn.Conv2d(12, 2, 1, groups=2),
        nn.Conv2d(12, 20, 3, padding=(2, 1), dilation=(2, 1)),
    ],
    ids=str,
)
def test_it_is_a_convolution_at_every_shape(convolution):
    packed = PackedConv2d(convolution, torch.Size([1, 12, 16, 16]))
    for shape in ((1, 12, 16, 16), (5, 12, 16, 16), (2, 12, 9, 14), (1, 12, 7, 7), (0, 12, 16, 16)):
        x = torch.randn(shape)
        for given in (x, x.contiguous(memory_format=torch.channels_last), x.transpose(2, 3)):
            torch.testing.assert_close(packed(given), convolution(given), atol=2e-6, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize('backbone', ['resnet18', 'efficientnet_lite0', 'convnext_tiny'])
def test_a_network_keeps_its_estimates(standin, backbone):
    torch.manual_seed(0)
    words = ['MODEL.BACKBONE', backbone, 'MODEL.PRESENCE', 'true', 'MODEL.CONFIDENCE', 'true']
    model = build_model(load_config(None, [*TINY, *words]), standin).eval()
    plain, packed, x = for_inference(model), for_inference(model), images(3)
    convolutions = sum(isinstance(module, nn.Conv2d) for module in plain.modules())
    pack_convolutions(packed, x[:1])
    assert sum(isinstance(module, PackedConv2d) for module in packed.modules()) == convolutions
    expected, got = plain(x), packed(x)
    torch.testing.assert_close(got.stages[-1].vertices, expected.stages[-1].vertices, atol=1e-6, rtol=0)
    torch.testing.assert_close(got.presence, expected.presence, atol=1e-5, rtol=0)
    assert not any(isinstance(module, PackedConv2d) for module in model.modules())


def test_only_convolutions_that_it_can_compute_are_replaced():
    refused = [
        nn.Conv2d(4, 4, 3, padding='same'),
        nn.Conv2d(4, 4, 3, padding=1, padding_mode='reflect'),
        nn.Conv2d(4, 4, 3).double(),
        nn.Conv2d(4, 4, 3, device='meta'),
    ]
    for convolution in refused:
        assert not packable(convolution)
        with pytest.raises(ValueError, match='Expected a float32 convolution'):
            PackedConv2d(convolution, torch.Size([1, 4, 8, 8]))
    network = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), refused[1], nn.Identity())
    network[2].unused = nn.Conv2d(4, 4, 1)
    x = torch.randn(1, 4, 8, 8)
    expected = network(x)
    pack_convolutions(network, x)
    assert [type(module) for module in network] == [PackedConv2d, nn.Conv2d, nn.Identity]
    assert type(network[2].unused) is nn.Conv2d
    torch.testing.assert_close(network(x), expected, atol=1e-6, rtol=0)
