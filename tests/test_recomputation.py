"""Activation checkpointing: the same bits in results, gradients and statistics, from fewer tensors."""

import pytest
import torch
from tiny import TINY, made_target
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from benchmarks.run import kept_bytes
from models import build_model
from models.recomputation import recomputed
from models.trainer import Trainer, recompute_as_configured
from utils.config import load_config

OPTIONS = [*TINY, 'DEVICE', 'cpu', 'TRAIN.BATCH_SIZE', '3']


def forward_and_backward(standin, *options: str):
    """Bytes kept for the backward pass, then loss, gradients and buffers of one pass over a fixed batch."""
    cfg = load_config(None, [*OPTIONS, *options])
    torch.manual_seed(0)
    model = build_model(cfg, standin, pretrained=False).train()
    recompute_as_configured(model, cfg)
    size = cfg.MODEL.IMAGE_SIZE
    image = torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(1))
    losses = []

    def forward():
        output = model(image)
        last = output.stages[-1]
        losses.append(last.vertices.square().sum() + last.joints_uv.sum() + output.segmentation.square().mean())
        return losses[-1]

    kept = kept_bytes(forward)
    losses[0].backward()
    return kept, losses[0].detach(), {name: p.grad for name, p in model.named_parameters()}, dict(model.named_buffers())


@pytest.mark.parametrize(
    'options',
    [(), ('MODEL.BACKBONE', 'swin_t'), ('MODEL.BACKBONE', 'efficientnet_lite0', 'MODEL.FIRST_STRIDE', '8')],
    ids=['resnet', 'stochastic depth', 'neck'],
)
def test_nothing_changes_but_the_memory(standin, options):
    kept, *plain = forward_and_backward(standin, *options)
    for key, share in (('TRAIN.RECOMPUTE_NORMS', 0.95), ('TRAIN.CHECKPOINT', 0.6)):
        less, *results = forward_and_backward(standin, *options, key, 'true')
        assert less < share * kept
        assert torch.equal(results[0], plain[0])
        for ours, theirs in zip(results[1:], plain[1:]):
            assert ours.keys() == theirs.keys()
            for name, value in theirs.items():
                assert (value is None and ours[name] is None) or torch.equal(ours[name], value), name


def test_a_step_with_it_ends_in_the_same_bits(standin):
    states = []
    for on in ((), ('TRAIN.CHECKPOINT', 'true'), ('TRAIN.RECOMPUTE_NORMS', 'true')):
        cfg = load_config(None, [*OPTIONS, *on, 'TRAIN.EMA', '0.9', 'MODEL.PRETRAINED', 'false'])
        trainer = Trainer(cfg, standin, torch.device('cpu'))
        trainer.train()
        image = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(3)) * 255
        for _ in range(2):
            trainer.step([(image, made_target(3))], number=0, count=1, rate=1e-3)
        blocks = (trainer.model.backbone, *trainer.model.stages)
        assert {block.recomputes for block in blocks} == {'TRAIN.CHECKPOINT' in on}
        assert trainer.model.backbone.recomputes_norms == ('TRAIN.RECOMPUTE_NORMS' in on)
        states.append(trainer.model.state_dict() | {f'average.{k}': v for k, v in trainer.result.state_dict().items()})
    for state in states[1:]:
        assert states[0].keys() == state.keys()
        assert [key for key, value in states[0].items() if not torch.equal(state[key], value)] == []


def test_evaluation_and_inference_recompute_nothing():
    calls = []
    module = nn.Linear(2, 2).eval()
    module.register_forward_pre_hook(lambda *_: calls.append(1))
    recomputed(module, module, torch.ones(1, 2, requires_grad=True)).sum().backward()
    module.train()
    with torch.no_grad():
        recomputed(module, module, torch.ones(1, 2))
    assert len(calls) == 2
    recomputed(module, module, torch.ones(1, 2, requires_grad=True)).sum().backward()
    assert len(calls) == 4


def test_statistics_survive_a_failure_in_the_backward_pass():
    """Momentum and counters are restored where the recomputation does not come to its end."""
    block = nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 2)).train()
    norms = [each for each in block.modules() if isinstance(each, _BatchNorm)]
    output = recomputed(block, block, torch.randn(4, 2))
    block[1].forward = lambda x: (_ for _ in ()).throw(RuntimeError('no memory'))
    with pytest.raises(RuntimeError, match='no memory'):
        output.sum().backward()
    assert [(norm.momentum, int(norm.num_batches_tracked)) for norm in norms] == [(0.1, 1)]
