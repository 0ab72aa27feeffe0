"""TRAIN.INIT_FROM: weights of a checkpoint, a new optimizer and schedule, and what is refused."""

import json
import shutil

import pytest
import torch
from tiny import TINY, TRAINING, tiny_config, tiny_model

import train
from manopth import HandPair
from models import build_model, published
from models.checkpoint import save_checkpoint
from models.initial_weights import check_not_own_output, load_initial_weights, needs_imagenet
from models.trainer import Trainer
from utils.config import load_config
from utils.errors import UserError

SMALL = {'STAGES': 1}


@pytest.fixture(scope='module')
def source(standin, tmp_path_factory):
    """The best.pth of a network whose every weight differs from a new one's."""
    model = tiny_model(standin, **SMALL)
    with torch.no_grad():
        for value in model.state_dict().values():
            value.add_(1)
    path = tmp_path_factory.mktemp('source') / 'best.pth'
    save_checkpoint(path, model=model, cfg=tiny_config(**SMALL), hand_model=standin.identity)
    return path


@pytest.fixture(scope='module')
def state(source):
    return torch.load(source, weights_only=True)['model']


def test_all_weights_are_loaded_and_described(source, state, standin):
    model = tiny_model(standin, **SMALL)
    for path in (source, source.parent):
        weights = load_initial_weights(model, str(path), hands=standin)
        assert weights.loaded == len(model.state_dict()) and weights.left_out == [] and len(weights.sha256) == 64
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert str(source.parent) in weights.describe(standin) and 'hand model' not in weights.describe(standin)


def test_parts_that_are_left_out_keep_their_new_weights(source, state, standin):
    model, new = tiny_model(standin, **SMALL), tiny_model(standin, **SMALL).state_dict()
    without = ['dense_heads', 'stages.0.interaction.graph.1']
    weights = load_initial_weights(model, str(source), without=without, hands=standin)
    assert weights.left_out == without and 'without dense_heads' in weights.describe(standin)
    for key, value in model.state_dict().items():
        kept = key.startswith(('dense_heads.', 'stages.0.interaction.graph.1.'))
        assert torch.equal(value, (new if kept else state)[key]), key


def test_what_does_not_fit_is_listed_with_the_parts_to_leave_out(source, standin):
    other = tiny_model(standin, STAGES=2, DENSE_CHANNELS=8)
    before = {key: value.clone() for key, value in other.state_dict().items()}
    with pytest.raises(UserError) as refused:
        load_initial_weights(other, str(source), hands=standin)
    said = str(refused.value)
    assert 'dense_heads.dense.0.weight is (8, 16, 3, 3), not (4, 8, 3, 3)' in said and '\n' not in said
    assert 'and ' in said and 'TRAIN.INIT_WITHOUT "[dense_heads, stages.1]"' in said
    assert all(torch.equal(value, before[key]) for key, value in other.state_dict().items())
    load_initial_weights(other, str(source), without=['dense_heads', 'stages.1'], hands=standin)
    none = tiny_model(standin, STAGES=0)
    with pytest.raises(UserError, match=r'stages\.0\.\S+ is not part of this network'):
        load_initial_weights(none, str(source), hands=standin)
    load_initial_weights(none, str(source), without=['stages', 'dense_heads'], hands=standin)


@pytest.mark.parametrize('part', ['dense_head', 'stages.7', 'stage', '.'])
def test_a_part_that_matches_nothing_is_refused(source, standin, part):
    with pytest.raises(UserError, match=r'INIT_WITHOUT names .*; their parts are backbone, dense_heads, initial_reg'):
        load_initial_weights(tiny_model(standin, **SMALL), str(source), without=['backbone', part], hands=standin)


def test_another_hand_model_is_allowed_and_printed(source, standin):
    mirrored = HandPair(*standin[::-1])
    weights = load_initial_weights(tiny_model(standin, **SMALL), str(source), hands=mirrored)
    assert standin.identity in weights.describe(mirrored) and mirrored.identity in weights.describe(mirrored)


def optimizer_state(path, source):
    torch.save(torch.optim.AdamW([torch.zeros(1)]).state_dict(), path)


def no_network(path, source):
    torch.save({key: value for key, value in torch.load(source, weights_only=True).items() if key != 'model'}, path)


def empty_network(path, source):
    torch.save(torch.load(source, weights_only=True) | {'model': {}}, path)


def truncated(path, source):
    path.write_bytes(source.read_bytes()[:-1000])


def not_finite(path, source):
    content = torch.load(source, weights_only=True)
    content['model']['backbone.bn1.weight'][3] = float('nan')
    torch.save(content, path)


def missing(path, source):
    assert not path.exists()


@pytest.mark.parametrize(
    'make, message',
    [
        (optimizer_state, 'holds the state of an optimizer and no weights'),
        (no_network, "its entry 'model' is missing"),
        (empty_network, 'holds no weights'),
        (truncated, 'truncated'),
        (not_finite, 'NaN or infinity in backbone.bn1.weight'),
        (missing, 'does not exist'),
    ],
)
def test_files_without_usable_weights_are_refused_in_one_sentence(make, message, source, standin, tmp_path):
    path = tmp_path / 'odd.pth'
    make(path, source)
    with pytest.raises(UserError, match=message) as refused:
        load_initial_weights(tiny_model(standin, **SMALL), str(path), hands=standin)
    assert 'odd.pth' in str(refused.value) and '\n' not in str(refused.value)


@pytest.mark.slow
def test_the_published_checkpoint_is_a_source_too(standin, tmp_path):
    """Slow: networks of the published size."""
    cfg = load_config(None, [*published.CONFIGURATION, 'MANO.SOURCE', 'standin'])
    torch.manual_seed(5)
    model = build_model(cfg, standin)
    torch.save({'net': published.whole_published(model.state_dict(), cfg)}, tmp_path / 'DIR.pth')
    new = build_model(load_config(None, ['MODEL.PRETRAINED', 'false', 'MODEL.DENSE_CHANNELS', '8']), standin)
    path = str(tmp_path / 'DIR.pth')
    with pytest.raises(UserError, match=r'"\[dense_heads\]"'):
        load_initial_weights(new, path, hands=standin)
    weights = load_initial_weights(new, path, without=['dense_heads'], hands=standin)
    assert weights.hand_model == standin.identity
    for key, value in new.state_dict().items():
        assert key.startswith('dense_heads') or torch.equal(value, model.state_dict()[key]), key
    other = load_initial_weights(new, path, without=['dense_heads'], hands=HandPair(*standin[::-1]))
    assert 'of the published file' in other.describe(standin)


def test_the_runs_own_output_is_no_source(tmp_path):
    (tmp_path / 'run').mkdir()
    (tmp_path / 'alias').symlink_to(tmp_path / 'run')
    for path in ('run', 'run/best.pth', 'alias/latest.pth', 'run/../run', 'new'):
        with pytest.raises(UserError, match='the folder of this run itself'):
            check_not_own_output(str(tmp_path / path), str(tmp_path / ('new' if path == 'new' else 'run')))
    check_not_own_output(str(tmp_path / 'run'), str(tmp_path))  # a run beside the new one's files
    check_not_own_output(str(tmp_path / 'other/best.pth'), str(tmp_path / 'run'))


def test_imagenet_weights_are_needed_only_for_parts_of_the_backbone():
    assert not needs_imagenet([]) and not needs_imagenet(['stages', 'backbones'])
    assert needs_imagenet(['backbone']) and needs_imagenet(['dense_heads', 'backbone.layer4'])


def test_the_trainer_starts_from_them_with_its_average_and_resuming_does_not_read_them(source, state, standin):
    words = [*TINY, 'MODEL.STAGES', '1', 'MODEL.INIT', 'identity', 'TRAIN.EMA', '0.9', 'TRAIN.INIT_FROM']
    # The backbone's ImageNet weights are not read: there is no such file.
    file = ['MODEL.PRETRAINED', 'true', 'MODEL.BACKBONE_WEIGHTS', 'nowhere.pth']
    trainer = Trainer(load_config(None, [*words, str(source), *file]), standin, torch.device('cpu'))
    for network in (trainer.model, trainer.result):
        assert all(torch.equal(value, state[key]) for key, value in network.state_dict().items())
    assert trainer.initial_weights.path == str(source) and not trainer.optimizer.state
    cfg = load_config(None, [*words, 'nowhere.pth'])
    assert Trainer(cfg, standin, torch.device('cpu'), pretrained=False).initial_weights is None
    with pytest.raises(UserError, match='nowhere.pth'):
        Trainer(cfg, standin, torch.device('cpu'))


@pytest.mark.slow
def test_training_records_its_source_and_resumes_without_it(tiny_prepared, tmp_path, capsys):
    """Slow: three trainings."""
    # fmt: off
    words = [
        *TRAINING, 'MODEL.STAGES', '0', 'TRAIN.BATCH_SIZE', '4', 'TRAIN.EPOCHS', '1', 'TRAIN.PICTURES', '0',
        'DATASET.PATH', str(tiny_prepared), 'TRAIN.EMA', '0.5',
    ]
    # fmt: on
    first, second, copy = tmp_path / 'first', tmp_path / 'second', tmp_path / 'source.pth'
    assert train.main([*words, 'OUTPUT_DIR', str(first)]) == 0
    shutil.copyfile(first / 'best.pth', copy)
    again = [*words, 'TRAIN.EPOCHS', '2', 'OUTPUT_DIR', str(second), 'TRAIN.INIT_FROM', str(copy)]
    assert train.main(again) == 0
    assert f'Starting from the weights of {copy}' in capsys.readouterr().out
    record = json.loads((second / 'log.jsonl').read_text().splitlines()[0])
    assert (record['kind'], record['step'], record['path']) == ('init_from', 0, str(copy))
    assert torch.load(second / 'best.pth', weights_only=True)['config']['TRAIN']['INIT_FROM'] == str(copy)
    copy.unlink()
    assert train.main([*again, '--resume']) == 0
    assert train.main([*words, 'OUTPUT_DIR', str(first / 'more'), 'TRAIN.INIT_FROM', str(first / 'more')]) == 2
    assert 'the folder of this run itself' in capsys.readouterr().err
