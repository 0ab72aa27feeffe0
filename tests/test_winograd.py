import pytest
import torch
import torch.nn.functional as F
from torch import nn

from inference.winograd import WinogradConv2d, use_winograd


@torch.no_grad()
@pytest.mark.parametrize('bias', [True, False])
@pytest.mark.parametrize('size', [(1, 2, 2), (3, 8, 8), (2, 6, 4), (2, 7, 7), (1, 5, 8), (0, 8, 8)], ids=str)
def test_it_is_a_convolution(size, bias):
    torch.manual_seed(0)
    layer = nn.Conv2d(5, 7, 3, padding=1, bias=bias).double()
    batch, height, width = size
    x = torch.randn(batch, 5, height, width, dtype=torch.float64)
    torch.testing.assert_close(WinogradConv2d(layer)(x), layer(x), rtol=1e-12, atol=1e-12)


@torch.no_grad()
def test_float32_is_as_near_to_the_truth_as_the_library():
    torch.manual_seed(0)
    layer, x = nn.Conv2d(256, 64, 3, padding=1), torch.randn(4, 256, 8, 8)
    true = F.conv2d(x.double(), layer.weight.double(), layer.bias.double(), padding=1)
    error = (WinogradConv2d(layer)(x) - true).abs().max()
    assert error < 3 * (layer(x) - true).abs().max() + 1e-6


@pytest.mark.parametrize(
    'convolution',
    [
        nn.Conv2d(4, 4, 1),
        nn.Conv2d(4, 4, 3),
        nn.Conv2d(4, 4, 3, padding=1, stride=2),
        nn.Conv2d(4, 4, 3, padding=1, groups=4),
        nn.Conv2d(4, 4, 3, padding=2, dilation=2),
        nn.Conv2d(4, 4, 3, padding=1, padding_mode='reflect'),
    ],
    ids=str,
)
def test_other_convolutions_are_refused_and_left_alone(convolution):
    with pytest.raises(ValueError, match='3 x 3'):
        WinogradConv2d(convolution)
    network = nn.Sequential(convolution)
    use_winograd(network, min_channels=1)
    assert network[0] is convolution


@torch.no_grad()
def test_wide_convolutions_of_a_network_are_replaced():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Sequential(nn.ReLU(), nn.Conv2d(8, 9, 3, padding=1)))
    x = torch.randn(2, 3, 8, 8)
    expected, narrow = network(x), network[0]
    use_winograd(network, min_channels=8)
    assert network[0] is narrow and isinstance(network[1][1], WinogradConv2d)
    assert not list(network[1].parameters())
    torch.testing.assert_close(network(x), expected, rtol=1e-4, atol=1e-5)
