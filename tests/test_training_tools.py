import json
import time
from contextlib import contextmanager

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny import TINY
from torch import nn

from models import build_model
from utils.config import load_config
from utils.errors import UserError
from utils.training import LOG_NAME, RunLog, Waits, build_optimizer, learning_rate, set_learning_rate

# Learning rate


def test_cosine_goes_from_the_base_rate_to_zero():
    rates = [learning_rate(step, total=100, base=5e-4) for step in range(101)]
    assert rates[0] == 5e-4 and rates[100] == pytest.approx(0, abs=1e-15) and rates[50] == pytest.approx(2.5e-4)
    assert all(a > b for a, b in zip(rates, rates[1:]))


def test_warm_up_climbs_linearly_and_the_cosine_follows():
    rates = [learning_rate(step, total=100, base=1.0, warmup=4) for step in range(101)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0]) and max(rates) == rates[4]
    assert rates[52] == pytest.approx(0.5) and rates[100] == pytest.approx(0, abs=1e-15)


def test_the_flat_part_keeps_the_full_rate_and_the_cosine_takes_the_rest():
    rates = [learning_rate(step, total=104, base=1.0, warmup=4, flat=0.6) for step in range(105)]
    assert rates[4:65] == [1.0] * 61 and rates[84] == pytest.approx(0.5) and rates[104] == pytest.approx(0, abs=1e-15)
    assert all(a > b for a, b in zip(rates[64:], rates[65:]))
    assert [learning_rate(step, total=9, base=1.0, flat=1.0) for step in range(9)] == [1.0] * 9


@pytest.mark.parametrize('total, warmup', [(1, 0), (3, 3), (3, 10)])
def test_short_runs_have_positive_rates(total, warmup):
    rates = [learning_rate(step, total=total, base=1.0, warmup=warmup) for step in range(total)]
    assert all(0 < rate <= 1 for rate in rates)


# Parameter groups


@pytest.fixture(scope='module')
def network(standin):
    return build_model(load_config(None, TINY), standin)


@pytest.mark.parametrize('decay_all', ['true', 'false'])
def test_every_parameter_is_optimised_once(network, decay_all):
    optimizer = build_optimizer(network, load_config(None, [*TINY, 'TRAIN.DECAY_ALL', decay_all]))
    held = [id(p) for group in optimizer.param_groups for p in group['params']]
    assert sorted(held) == sorted(id(p) for p in network.parameters())
    decays = [group['weight_decay'] for group in optimizer.param_groups]
    assert decays == ([0.01] if decay_all == 'true' else [0.01, 0.0])
    assert all(group['lr'] == 5e-4 for group in optimizer.param_groups)


def test_norms_biases_and_positions_are_not_decayed_without_decay_all(network):
    decayed, free = build_optimizer(network, load_config(None, [*TINY, 'TRAIN.DECAY_ALL', 'false'])).param_groups
    free, decayed = ({id(p) for p in group['params']} for group in (free, decayed))
    norms = (nn.BatchNorm1d, nn.BatchNorm2d, nn.LayerNorm)
    spared = 0
    for module_name, module in network.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            plain = isinstance(module, norms) or name in ('bias', 'position', 'neighbour_logits')
            assert id(parameter) in (free if plain else decayed), f'{module_name}.{name}'
            spared += plain
    assert spared > 50 and len(decayed) > 50


def test_backbone_and_regressors_have_rates_and_decay_of_their_own(network):
    words = ['TRAIN.BACKBONE_RATE', '0.3', 'TRAIN.REGRESSOR_RATE', '0.5', 'TRAIN.DECAY_REGRESSORS', 'false']
    optimizer = build_optimizer(network, load_config(None, [*TINY, *words]))
    set_learning_rate(optimizer, 0.1)
    groups = {id(p): group for group in optimizer.param_groups for p in group['params']}
    for name, parameter in network.named_parameters():
        regressor = '_head.' in name and 'interaction' not in name
        rate = 0.03 if name.startswith('backbone.') else 0.05 if regressor else 0.1
        assert groups[id(parameter)]['lr'] == pytest.approx(rate), name
        assert groups[id(parameter)]['weight_decay'] == (0 if regressor else 0.01), name


def test_frozen_parameters_are_not_optimised_and_old_optimizer_states_have_one_rate(standin):
    network = build_model(load_config(None, TINY), standin)
    network.backbone.freeze(1)
    optimizer = build_optimizer(network, load_config(None, TINY))
    held = {id(p) for group in optimizer.param_groups for p in group['params']}
    assert {id(p) for p in network.parameters() if p.requires_grad} == held
    state = optimizer.state_dict()
    for group in state['param_groups']:
        del group['rate_factor']
    optimizer.load_state_dict(state)
    set_learning_rate(optimizer, 0.2)
    assert {group['lr'] for group in optimizer.param_groups} == {0.2}


def test_weight_decay_shrinks_what_has_no_gradient_of_its_own():
    layer = nn.Linear(2, 2)
    optimizer = build_optimizer(
        layer, load_config(None, ['TRAIN.DECAY_ALL', 'false', 'TRAIN.LR', '0.1', 'TRAIN.WEIGHT_DECAY', '0.5'])
    )
    before = [p.detach().clone() for p in layer.parameters()]
    for parameter in layer.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    torch.testing.assert_close(layer.weight.detach(), 0.95 * before[0])
    assert torch.equal(layer.bias.detach(), before[1])


# Log


def lines(folder):
    return [json.loads(line) for line in (folder / LOG_NAME).read_text().splitlines()]


def run(folder, steps, *, step=None):
    log = RunLog(folder, step=step)
    for number in steps:
        log.write('train', number, loss=number / 2)
    log.close()


def test_log_and_tensorboard_hold_the_same_numbers(tmp_path):
    log = RunLog(tmp_path / 'new' / 'run', step=None)
    scalars = []
    log.board.add_scalar = lambda *args: scalars.append(args)
    log.write('val', 3, epoch=1, joint_mm=2.5, note='fine')
    log.close()
    assert lines(tmp_path / 'new' / 'run') == [{'kind': 'val', 'step': 3, 'epoch': 1, 'joint_mm': 2.5, 'note': 'fine'}]
    assert scalars == [('val/epoch', 1, 3), ('val/joint_mm', 2.5, 3)]
    assert list((tmp_path / 'new' / 'run').glob('events.out.tfevents.*'))


def test_resuming_drops_records_after_the_checkpoint(tmp_path):
    run(tmp_path, range(1, 7))
    run(tmp_path, [5, 6], step=4)
    assert [line['step'] for line in lines(tmp_path)] == [1, 2, 3, 4, 5, 6]
    run(tmp_path, [], step=2)
    assert [line['step'] for line in lines(tmp_path)] == [1, 2]


def test_a_truncated_line_is_dropped(tmp_path):
    run(tmp_path, [1, 2])
    with open(tmp_path / LOG_NAME, 'a') as file:
        file.write('{"kind": "train", "step": 3, "lo')
    run(tmp_path, [3], step=2)
    assert [line['step'] for line in lines(tmp_path)] == [1, 2, 3]


@pytest.mark.parametrize('line', ['{"kind": "train", "step": 1}{"kind": "train"}', '{"step": 1}', '{}'])
def test_a_damaged_line_is_named_and_the_log_is_left_as_it_was(tmp_path, line):
    run(tmp_path, [1, 2])
    path = tmp_path / LOG_NAME
    path.write_text(f'{line}\n{path.read_text()}')
    before = path.read_bytes()
    with pytest.raises(UserError, match=f'{path} has a line that is not a training record'):
        RunLog(tmp_path, step=2)
    assert path.read_bytes() == before


def test_a_fresh_run_starts_an_empty_log(tmp_path):
    run(tmp_path, [0, 1, 2])
    time.sleep(1.01)  # TensorBoard orders its files by the second
    run(tmp_path, [1])
    assert [line['step'] for line in lines(tmp_path)] == [1]
    shown = EventAccumulator(str(tmp_path)).Reload()
    assert [event.step for event in shown.Scalars('train/loss')] == [1]


def test_a_run_resumed_before_its_first_step_keeps_what_it_began_with(tmp_path):
    run(tmp_path, [0])
    run(tmp_path, [1], step=0)
    assert [line['step'] for line in lines(tmp_path)] == [0, 1]


def test_a_validation_that_is_due_again_leaves_no_records_twice(tmp_path):
    """A kill between the figures of a validation and the checkpoint that follows."""
    log = RunLog(tmp_path, step=None)
    for step in (1, 2):
        log.write('train', step, loss=step / 2)
        log.write('val_stage0', step, joint_mm=9.0)
    log.close()
    log = RunLog(tmp_path, step=2, validation_due=True)
    assert [(line['kind'], line['step']) for line in lines(tmp_path)] == [('train', 1), ('val_stage0', 1), ('train', 2)]
    log.write('val_stage0', 2, joint_mm=9.0)
    log.close()
    shown = EventAccumulator(str(tmp_path)).Reload()
    assert [event.step for event in shown.Scalars('val_stage0/joint_mm')] == [1, 2]
    assert [(event.step, event.value) for event in shown.Scalars('train/loss')] == [(1, 0.5), (2, 1.0)]


# Waiting for data


def test_waits_are_measured_and_may_be_left():
    def items():
        time.sleep(0.05)
        yield 1
        yield 2

    inside = []

    @contextmanager
    def waiting():
        inside.append(True)
        yield
        inside.append(False)

    waits = Waits(items(), waiting)
    for _ in waits:
        assert inside[-1] is False  # the loop's own work is outside
    assert inside == [True, False] * 3
    assert 0.04 < waits.since_last_asked() < 5 and waits.since_last_asked() == 0
