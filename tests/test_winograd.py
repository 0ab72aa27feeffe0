import pytest
import torch
import torch.nn.functional as F
from torch import nn

from inference.winograd import Conv2dFewProducts, _Winograd


@pytest.mark.parametrize(('batch', 'height', 'width'), [(1, 2, 2), (3, 8, 8), (2, 6, 4)])
def test_it_is_a_convolution(batch, height, width):
    torch.manual_seed(0)
    layer = nn.Conv2d(5, 7, 3, padding=1).double()
    x = torch.randn(batch, 5, height, width, dtype=torch.float64, requires_grad=True)
    expected, got = layer(x), _Winograd.apply(x, layer.weight, layer.bias)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    direction = torch.randn_like(expected)
    for a, b in zip(
        *(torch.autograd.grad((out * direction).sum(), (x, layer.weight, layer.bias)) for out in (got, expected))
    ):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


def test_float32_is_as_near_to_the_truth_as_the_library():
    torch.manual_seed(0)
    layer, x = Conv2dFewProducts(256, 64), torch.randn(4, 256, 8, 8)
    with torch.no_grad():
        true = F.conv2d(x.double(), layer.weight.double(), layer.bias.double(), padding=1)
        ours = (layer(x) - true).abs().max()
        assert ours < 3 * (F.conv2d(x, layer.weight, layer.bias, padding=1) - true).abs().max() + 1e-6


def test_elsewhere_it_is_the_library_s_convolution(monkeypatch):
    layer = Conv2dFewProducts(4, 6)

    def refuse(*args):
        raise AssertionError('not this way')

    monkeypatch.setattr(_Winograd, 'apply', refuse)
    assert layer(torch.randn(64, 4, 3, 4)).shape == (64, 6, 3, 4)  # an odd map
    assert layer(torch.randn(1, 4, 4, 4)).shape == (1, 6, 4, 4)  # too few positions
    assert layer(torch.randn(0, 4, 8, 8)).shape == (0, 6, 8, 8)
    images = torch.randn(4, 4, 8, 8)
    with torch.autocast('cpu', torch.bfloat16):
        assert layer(images).dtype == torch.bfloat16
    program = torch.export.export(layer, (images,))
    assert any('conv2d' in str(node.target) for node in program.graph.nodes)
    with pytest.raises(AssertionError, match='not this way'):
        layer(images)


@torch.no_grad()
def test_kept_kernels_serve_any_batch_without_gradients():
    torch.manual_seed(0)
    layer, x = Conv2dFewProducts(4, 6), torch.randn(1, 4, 4, 4)
    expected = layer(x)
    layer.keep_kernels()
    layer.weight.zero_()  # from now on for training only
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(layer(torch.cat([x, -x]))[:1], expected, rtol=1e-4, atol=1e-5)
    with torch.enable_grad():
        assert torch.equal(layer(x), layer.bias[:, None, None].expand_as(expected))


def test_frozen_weights_get_no_gradient():
    layer = Conv2dFewProducts(4, 6).requires_grad_(False)
    x = torch.randn(4, 4, 8, 8, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad is not None and layer.weight.grad is None and layer.bias.grad is None
