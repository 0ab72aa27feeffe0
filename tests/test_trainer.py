"""Single steps of the trainer."""

import io

import pytest
import torch
from tiny import TINY, made_target
from torch import nn

from models.trainer import NonFiniteLossError, Trainer
from utils import distributed
from utils.config import load_config

IMAGES = 255 * torch.rand(2, 2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def make(standin, *words: str) -> Trainer:
    trainer = Trainer(load_config(None, [*TINY, 'DEVICE', 'cpu', *words]), standin, torch.device('cpu'))
    trainer.train()
    return trainer


def take(trainer: Trainer, number: int, **options) -> None:
    trainer.step([(IMAGES[number], made_target(2))], number=number, count=1, rate=1e-3, **options)


def test_a_network_that_draws_continues_exactly(standin):
    words = ['MODEL.BACKBONE', 'efficientnet_b0']  # stochastic depth
    whole = make(standin, *words)
    take(whole, 0)
    file = io.BytesIO()
    torch.save({'model': whole.model.state_dict(), **whole.state()}, file)
    take(whole, 1)
    resumed = make(standin, *words)
    file.seek(0)
    resumed.load(torch.load(file, weights_only=True), path='latest.pth')
    take(resumed, 1)
    state = resumed.model.state_dict()
    assert [key for key, value in whole.model.state_dict().items() if not torch.equal(state[key], value)] == []


@pytest.mark.parametrize('words', [(), ('TRAIN.CLIP_NORM', '1')])
def test_a_gradient_that_is_not_finite_changes_nothing(standin, words):
    trainer = make(standin, *words)
    before = {key: value.clone() for key, value in trainer.model.state_dict().items()}
    trainer.model.initial_regressor.offset_head.bias.register_hook(lambda gradient: gradient / 0)
    with pytest.raises(NonFiniteLossError) as raised:
        take(trainer, 0)
    assert raised.value.what == 'gradient' and raised.value.here and trainer.whole
    after = trainer.model.state_dict()
    assert [key for key, value in before.items() if not torch.equal(after[key], value)] == []


def test_synchronised_norms_on_a_cpu_compute_bfloat16_in_float32(monkeypatch):
    monkeypatch.setattr(distributed, 'rank_and_world', lambda: (0, 2))
    monkeypatch.setattr(distributed._Sum, 'apply', lambda values: 2 * values)  # the other process has the same samples
    norm, plain = nn.Sequential(nn.BatchNorm2d(4)).train(), nn.BatchNorm2d(4).train()
    x = (3 + torch.randn(2, 4, 5, 5)).bfloat16()
    with torch.autocast('cpu', torch.bfloat16):
        out = distributed.synchronise_batch_norm(norm, torch.device('cpu'))(x)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), plain(x.float()), rtol=0.01, atol=0.01)
    torch.testing.assert_close(norm[0].running_mean, plain.running_mean)
