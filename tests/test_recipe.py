"""The comparison of training recipes: its configurations, its statistics, and a run on tiny data."""

import json
import math
import shutil

import pytest
from prepared_tree import write_prepared

from benchmarks import recipe
from utils.config import default_config, flatten, load_config
from utils.errors import UserError

# fmt: off
TINY = [
    'MODEL.IMAGE_SIZE', '32', 'MODEL.MAP_CHANNELS', '8', 'MODEL.STAGES', '1', 'MODEL.GRAPH_LAYERS', '1',
    'MODEL.TOKEN_CHANNELS', '16', 'MODEL.JOINT_FEATURES', '8', 'MODEL.ATTENTION_CHANNELS', '16',
    'TRAIN.BATCH_SIZE', '4', 'TRAIN.EPOCHS', '2', 'TRAIN.LOG_EVERY', '1', 'DEVICE', 'cpu',
]
# fmt: on


def test_every_recipe_changes_training_alone():
    small = flatten(load_config(recipe.SMALL))
    for name, files in recipe.recipes().items():
        changed = {key for key, value in flatten(load_config(files)).items() if small[key] != value} - {'OUTPUT_DIR'}
        assert bool(changed) == (name != recipe.PUBLISHED)
        assert {key for key in changed if key.startswith('MODEL.')} <= {'MODEL.INIT'}  # no other architecture


def test_the_small_recipe_is_the_published_one_but_for_the_size():
    default, small = flatten(default_config()), flatten(load_config(recipe.SMALL))
    changed = {key for key in default if default[key] != small[key]}
    assert not [key for key in changed if key.startswith(('LOSS.', 'AUGMENT.'))]
    assert {key for key in changed if key.startswith('TRAIN.')} == {
        f'TRAIN.{name}' for name in ('BATCH_SIZE', 'EPOCHS', 'WORKERS', 'PICTURES')
    }


def test_an_effect_is_the_mean_ratio_with_students_interval():
    effect = recipe.effect([90.0, 45.0, 18.4], [100.0, 50.0, 20.0])
    ratios = [-0.1, -0.1, -0.08]
    mean = sum(ratios) / 3
    deviation = math.sqrt(sum((ratio - mean) ** 2 for ratio in ratios) / 2)
    assert effect.mean == pytest.approx(mean)
    assert effect.half_width == pytest.approx(4.303 * deviation / math.sqrt(3), rel=1e-4)
    assert effect.clear
    assert not recipe.effect([90.0, 110.0], [100.0, 100.0]).clear
    assert not recipe.effect([90.0], [100.0]).clear  # one seed proves nothing


def test_a_run_shorter_than_its_log_has_no_rate(tmp_path):
    record = {'kind': 'val_stage0', 'step': 3, 'joint_mm_all': 50.0, 'joint_px_all': 9.0, 'root_mm': 80.0}
    (tmp_path / recipe.LOG_NAME).write_text(json.dumps(record) + '\n')
    result = recipe.result(tmp_path)
    assert result['samples_per_second'] is None and result['curve'][0]['joint_mm_all'] == [50.0]
    row = recipe.table({'published': {0: result}}, batch=16).splitlines()[2]
    assert row.split('|')[3].strip() == '50.00' and row.endswith('| 80.0 |  |')


@pytest.mark.slow
def test_recipes_are_trained_compared_and_not_trained_twice(tmp_path, capsys):
    for split, samples, seed in (('train', 8, 1), ('val', 2, 2)):
        write_prepared(tmp_path / 'data', split, samples, seed=seed)
    command = ['--data', str(tmp_path / 'data'), '--out', str(tmp_path / 'out'), '--seeds', '0', '1']
    command += ['--only', 'lovasz', '--jobs', '2', *TINY]
    assert recipe.main(command) == 0
    printed = capsys.readouterr().out
    rows = {line.split(' | ')[0]: line.split(' | ') for line in printed.splitlines()}
    assert rows['| lovasz'][1] == '2' and rows['| lovasz'][3].strip('*').endswith('%')
    assert '| samples |' in printed and '| 16 |' in printed
    assert (tmp_path / 'out' / 'recipe.md').read_text() in printed
    finished = {path: path.stat().st_mtime_ns for path in (tmp_path / 'out').glob('*/latest.pth')}
    assert len(finished) == 4
    assert recipe.main(command) == 0
    assert {path: path.stat().st_mtime_ns for path in finished} == finished
    assert recipe.main([*command, 'TRAIN.LR', '1e-4']) == 2
    assert 'belongs to another configuration (TRAIN.LR was' in capsys.readouterr().err
    shutil.rmtree(tmp_path / 'data')
    for split, samples, seed in (('train', 8, 3), ('val', 2, 2)):
        write_prepared(tmp_path / 'data', split, samples, seed=seed)
    assert recipe.main(command) == 2
    message = capsys.readouterr().err
    assert 'was trained on other data' in message and f'remove {tmp_path / "out"}' in message


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['--only', 'magic'], "'magic' is not a recipe; choose from published,"),
        (['--jobs', '0'], '--jobs is 0; it must be at least 1'),
        (['TRAIN.LRR', '1'], 'TRAIN.LRR'),
        (['SEED', '5'], 'SEED cannot be set by a KEY VALUE pair here: --seeds sets it'),
        (['--only', 'clip', 'OUTPUT_DIR', 'x'], '--out sets it'),
        (['--seeds', '0', 'DATASET.PATH', 'x'], '--data sets it'),
        (['--seeds', 'one'], "--seeds takes whole numbers, not 'one'"),
        (['--seeds', '-1'], '--seeds needs numbers from 0 on'),
        ([], 'nowhere'),
    ],
)
def test_mistakes_are_one_sentence(tmp_path, capsys, arguments, message):
    assert recipe.main(['--data', 'nowhere', '--out', str(tmp_path / 'out'), *arguments]) == 2
    assert message in capsys.readouterr().err


def test_data_without_a_split_val_are_refused_before_the_training(tmp_path, capsys):
    write_prepared(tmp_path / 'data', 'train', 8, seed=1)
    assert recipe.main(['--data', str(tmp_path / 'data'), '--out', str(tmp_path / 'out')]) == 2
    assert 'val' in capsys.readouterr().err and not (tmp_path / 'out').exists()


@pytest.mark.slow
def test_a_failed_run_is_named_with_its_console(tmp_path, capsys):
    for split, samples in (('train', 8), ('val', 2)):
        write_prepared(tmp_path / 'data', split, samples, seed=1)
    mano = ['MANO.SOURCE', 'files', 'MANO.PATH', str(tmp_path / 'nowhere')]
    out, failing = tmp_path / 'out', ['TRAIN.BATCH_SIZE', '4', *mano]
    command = ['--data', str(tmp_path / 'data'), '--out', str(out), '--seeds', '0', '0', '--only', 'clip', *failing]
    assert recipe.main(command) == 2
    assert 'console.txt' in capsys.readouterr().err
    assert 'nowhere' in (out / 'published-0' / 'console.txt').read_text()


def test_a_validation_without_both_hands_leaves_cells_empty_and_one_without_hands_is_named(tmp_path):
    record = {'kind': 'val_stage0', 'step': 3, 'joint_mm_all': 50.0, 'joint_px_all': 9.0}
    (tmp_path / recipe.LOG_NAME).write_text(json.dumps(record) + '\n')
    row = recipe.table({'published': {0: recipe.result(tmp_path)}}, batch=16).splitlines()[2]
    assert row.endswith('| 9.0 |  |  |')
    (tmp_path / recipe.LOG_NAME).write_text(json.dumps({'kind': 'val_stage0', 'step': 3}) + '\n')
    with pytest.raises(UserError, match='no frame of the split val shows a hand'):
        recipe.result(tmp_path)


def test_students_quantile_continues_its_table():
    assert recipe.student(9) == 2.262
    assert [recipe.student(freedom) for freedom in (10, 30)] == pytest.approx([2.228, 2.042], abs=0.003)
