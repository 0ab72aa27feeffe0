import pytest
import torch
import torchvision
from tiny import images, made_target, tiny_config, tiny_model

from inference.folding import fold_batch_norms
from models import build_criterion
from models.backbone import BACKBONES, Backbone
from models.checkpoint import load_model, read_checkpoint, save_checkpoint
from utils.errors import UserError

ONE_OF_EACH_KIND = ['resnet18', 'convnext_tiny', 'swin_t', 'efficientnet_b0']


@torch.no_grad()
@pytest.mark.parametrize('name', ONE_OF_EACH_KIND)
def test_maps_have_their_strides_and_channels_and_keys_are_torchvisions(name):
    backbone = Backbone(name)
    state = torchvision.models.get_model(name, weights=None).state_dict()
    own = backbone.state_dict()
    assert list(own) == [key for key in state if key not in backbone.unused_keys]
    backbone.load_torchvision(state)
    assert all(torch.equal(value, state[key]) for key, value in own.items())
    backbone.eval()
    for size in (64, 96):
        maps = backbone(images(2, size))
        assert [x.shape for x in maps] == [
            (2, channels, size // stride, size // stride) for channels, stride in zip(backbone.channels, (4, 8, 16, 32))
        ]
    folded = fold_batch_norms(backbone)(images(2, 96))
    for a, b in zip(folded, maps):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4 * b.abs().max().item())
    converted = backbone.to(memory_format=torch.channels_last)(images(2, 96).to(memory_format=torch.channels_last))
    for a, b in zip(converted, maps):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4 * b.abs().max().item())


@torch.no_grad()
@pytest.mark.slow
@pytest.mark.parametrize('name', ['convnext_tiny', 'swin_t', 'efficientnet_b0'])
def test_the_last_map_is_the_one_that_torchvision_classifies(name):
    """With the rest of the network behind it, the backbone's last map gives torchvision's logits."""
    torch.manual_seed(0)
    network, backbone, x = torchvision.models.get_model(name, weights=None).eval(), Backbone(name).eval(), images(1)
    backbone.load_torchvision(network.state_dict())
    last = backbone(x)[-1]
    expected = network(x)
    if name == 'swin_t':
        got = network.head(network.norm(last.permute(0, 2, 3, 1)).mean((1, 2)))
    else:
        rest = network.features[8:](last)
        got = network.classifier(network.avgpool(rest) if name == 'convnext_tiny' else network.avgpool(rest).flatten(1))
    torch.testing.assert_close(got, expected)


def test_a_name_outside_the_table_is_refused_with_the_choices(standin):
    for name in ('vgg16', 'resnet'):
        with pytest.raises(UserError, match=f"MODEL.BACKBONE is '{name}'; .*resnet18, .*{list(BACKBONES)[-1]}"):
            tiny_model(standin, BACKBONE=name)


@pytest.mark.slow
@pytest.mark.parametrize('name', ['convnext_tiny', 'swin_t', 'efficientnet_b0'])
def test_a_network_on_any_backbone_learns(standin, name):
    model = tiny_model(standin, BACKBONE=name, STAGES=1).train()
    criterion, target, image = build_criterion(tiny_config(), standin), made_target(2), images(2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    values = []
    for _ in range(4):
        value = torch.stack(list(criterion(model(image), target).values())).sum()
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        values.append(value.item())
    assert values[-1] < values[0]
    for key, parameter in model.backbone.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), key


# Checkpoints of earlier versions


def earlier_name(key: str) -> str:
    names = {'backbone.conv1.': 'backbone.stem.0.', 'backbone.bn1.': 'backbone.stem.1.'}
    names |= {f'backbone.layer{index + 1}.': f'backbone.layers.{index}.' for index in range(4)}
    for new, old in names.items():
        key = key.replace(new, old)
    return key


def test_checkpoints_with_earlier_names_are_read(standin, tmp_path):
    """Weights, their moving average, and optimizer state, which torch stores by the order of the parameters."""
    cfg = tiny_config(STAGES=1)
    model = tiny_model(standin, STAGES=1).eval()
    average = torch.optim.swa_utils.AveragedModel(model)
    path = tmp_path / 'latest.pth'
    save_checkpoint(path, model=model, cfg=cfg, hand_model=standin.identity, average=average.state_dict())
    content = torch.load(path, weights_only=True)
    for part in ('model', 'average'):
        content[part] = {earlier_name(key): value for key, value in content[part].items()}
    assert 'backbone.stem.0.weight' in content['model'] and 'module.backbone.layers.3.0.bn1.bias' in content['average']
    torch.save(content, path)
    read = read_checkpoint(path)
    assert list(read['model']) == list(model.state_dict())
    assert list(read['average']) == list(average.state_dict())
    average.load_state_dict(read['average'])
    with torch.no_grad():
        ours, theirs = load_model(path).model(images(1)), model(images(1))
    assert torch.equal(ours.stages[-1].vertices, theirs.stages[-1].vertices)


@pytest.mark.parametrize('name', ['resnet18', 'resnet50'])
def test_the_order_of_parameters_is_torchvisions(name):
    """Resuming depends on it: an optimizer's state has no names."""
    network = torchvision.models.get_model(name, weights=None)
    expected = [key for key, _ in network.named_parameters() if not key.startswith('fc.')]
    assert [key for key, _ in Backbone(name).named_parameters()] == expected
