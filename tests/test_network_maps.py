import pytest
import torch
from tiny import images, tiny_model

from evaluation.network_maps import forward_with_maps
from models.bone_projection import draw


def fail(*_):
    raise ZeroDivisionError


def hooked(model) -> list[str]:
    return [name for name, module in model.named_modules() if module._forward_hooks]


@torch.no_grad()
@pytest.mark.parametrize('projection', ['bones', 'joints'])
def test_maps_are_those_that_the_network_used(standin, projection):
    model, image = tiny_model(standin, PROJECTION=projection).eval(), images(2)
    output, maps = forward_with_maps(model, image)
    for with_maps, plain in zip(output.stages, model(image).stages):
        assert torch.equal(with_maps.vertices, plain.vertices)

    *skips, x = model.backbone(image)
    assert torch.equal(maps.attention, model.initial_regressor.attention(x))
    assert maps.attention.shape == (2, 2, 2, 2) and len(maps.bone_features) == 2
    for number, (stage, skip) in enumerate(zip(model.stages, reversed(skips))):
        before, after = output.stages[number : number + 2]
        x = stage.merge(x, skip)
        tokens = stage.interaction(stage.tokens(x, before), before)
        factors = stage.projection.factors(after.joints_uv, stage.projected(tokens), size=x.shape[-1])
        expected = draw(*factors).norm(dim=1)
        assert expected.max() > 0
        torch.testing.assert_close(maps.bone_features[number], expected, rtol=1e-4, atol=1e-4)
        x = stage.enhance(x, after, tokens)


@torch.no_grad()
def test_no_hook_is_left_even_if_the_network_fails(standin):
    model, during = tiny_model(standin, STAGES=1).eval(), []
    model.hand_head.register_forward_pre_hook(lambda *_: during.append(hooked(model)))
    forward_with_maps(model, images(1))
    assert during[0] == ['initial_regressor.attention', 'stages.0.projection'] and hooked(model) == []
    model.dense_heads.register_forward_pre_hook(fail)
    with pytest.raises(ZeroDivisionError):
        forward_with_maps(model, images(1))
    assert len(during) == 4 and hooked(model) == []


@torch.no_grad()
@pytest.mark.parametrize('changes', [{'PROJECTION': 'none'}, {'STAGES': 0}], ids=str)
def test_a_network_that_draws_nothing_has_no_bone_features(standin, changes):
    maps = forward_with_maps(tiny_model(standin, **changes).eval(), images(1))[1]
    assert maps.bone_features == [] and maps.attention.shape == (1, 2, 2, 2)
