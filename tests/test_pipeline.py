"""The whole pipeline on tiny synthetic data, as in ``make demo``, and its failures."""

import csv
import io
import json
import math
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from tiny import TRAINING

import train
from apps import eval_baseline, eval_interhand, report, run_demo
from dataset import interhand, synthesize
from dataset.prepare import command as preparation_command
from dataset.synthetic import synthesize as synthetic_command
from evaluation.runs import METRICS_VERSION

ROOT = Path(__file__).resolve().parents[1]
# fmt: off
SMALL = [
    *TRAINING[2:], 'MODEL.BACKBONE', 'resnet18', 'TRAIN.BATCH_SIZE', '8', 'TRAIN.EPOCHS', '1', 'TRAIN.WORKERS', '0',
]
# fmt: on
FIGURES = ('joint_mm', 'vert_mm', 'joint_px', 'vert_px')


SCRIPTS = {
    'dataset/synthesize.py': synthesize,
    'dataset/interhand.py': interhand,
    'train.py': train,
    'apps/eval_interhand.py': eval_interhand,
    'apps/report.py': report,
}


def run_here(command: list[str], *, cwd: Path) -> int:
    """Run a step of the demo in this process where it can: importing PyTorch takes longer than most of them."""
    script, *arguments = command[1:]
    if script in SCRIPTS:
        return SCRIPTS[script].main(arguments)
    with subprocess.Popen(command, cwd=cwd, stdout=subprocess.PIPE, text=True) as process:
        print(process.stdout.read())
    return process.returncode


@pytest.fixture(scope='module')
def demo(tmp_path_factory) -> Path:
    """output/demo of a very small ``python apps/run_demo.py``."""
    out = tmp_path_factory.mktemp('road') / 'demo'
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(printed):
        patch.setattr(run_demo, 'run_passing_stops', run_here)
        for module in (synthetic_command, preparation_command):
            patch.setattr(module, 'usable_cores', lambda: 1)
        assert run_demo.main(['--out', str(out), '--frames', '24', '8', '9', *SMALL]) == 0
    (out / 'printed.txt').write_text(printed.getvalue())
    return out


def test_demo_ends_with_a_table_of_three_predictions(demo):
    summary = json.loads((demo / 'summary.json').read_text())
    for name in ('shipped', 'trained', 'baseline'):
        assert summary[name] == json.loads((demo / name / 'metrics.json').read_text())
        for figure in FIGURES:
            value = summary[name][figure]
            assert value['all'] == pytest.approx((value['left'] + value['right']) / 2)
            assert 0 < value['all'] < 1000
        assert summary[name]['root_mm'] > 0
        assert summary[name]['protocol']['root_joint'] == 0 and summary[name]['protocol']['scale'] is True
    samples = len(list((demo / 'data' / 'test' / 'img').iterdir()))
    assert summary['shipped']['frames'] == summary['trained']['frames'] == summary['baseline']['frames'] == samples
    assert summary['shipped']['joint_mm']['all'] < 0.6 * summary['baseline']['joint_mm']['all']
    assert summary['shipped']['pa_joint_mm']['all'] < summary['baseline']['pa_joint_mm']['all']
    printed = (demo / 'printed.txt').read_text()
    for command in ('dataset/synthesize.py', 'dataset/interhand.py', 'train.py', 'apps/eval_interhand.py'):
        assert f'$ python {command}' in printed
    table = printed.splitlines()[-8:-4]
    assert ' '.join(table[0].split()) == 'joint mm vert mm joint px vert px root mm PA joint mm'
    for row, name in zip(table[1:], ('baseline', 'trained', 'shipped')):
        assert row.split()[-6] == f'{summary[name]["joint_mm"]["all"]:.2f}'
        assert row.split()[-1] == f'{summary[name]["pa_joint_mm"]["all"]:.2f}'
    assert str(demo / 'report.html') in printed.splitlines()[-1]


def test_figures_record_their_origin(demo):
    for name in ('trained', 'baseline'):
        metrics = json.loads((demo / name / 'metrics.json').read_text())
        assert metrics['evaluated']['data']['test']['samples'] == metrics['frames']
        assert metrics['evaluated']['sessions'][0]['packages']['torch'] == torch.__version__
    printed = (demo / 'printed.txt').read_text()
    assert 'trained:\n' in printed and f'torch {torch.__version__}' in printed


def test_demo_draws_pictures(demo):
    page = (demo / 'report.html').read_text()
    for name in run_demo.ROWS:
        assert f'{json.loads((demo / name / "metrics.json").read_text())["joint_mm"]["all"]:.2f}' in page
    assert page.count('class="open-viewer"') == sum(
        len(np.load(demo / name / 'samples.npz')['index']) for name in run_demo.ROWS
    )
    sheet = cv2.imread(str(demo / 'pictures.jpg'))
    assert sheet.shape[0] > 256 and sheet.shape[1] > 7 * 256
    assert sheet.std() > 20


@pytest.mark.parametrize(
    'pair, said',
    [
        (('OUTPUT_DIR', 'old'), '--out sets it'),
        (('DATASET.PATH', 'data'), '--out sets it'),
        (('MANO.SOURCE', 'files'), 'stand-in hands, sets it'),
        (('MANO.PATH', 'misc'), 'stand-in hands, sets it'),
        (('TRAIN.EPOCH', '1'), 'is not a configuration key'),
    ],
)
def test_keys_of_the_demo_are_checked_before_it_begins(tmp_path, capsys, pair, said):
    assert run_demo.main(['--out', str(tmp_path / 'demo'), 'DEVICE', 'cpu', *pair]) == 2
    error = capsys.readouterr().err
    assert pair[0] in error and said in error and error.count('\n') == 1 and not list(tmp_path.iterdir())


@pytest.mark.parametrize('command, more', [(eval_interhand, ['--model', 'none.pth']), (eval_baseline, [])])
def test_the_data_of_an_evaluation_is_named_once(capsys, command, more):
    assert command.main(['--data_path', 'a', *more, 'DATASET.PATH', 'b']) == 2
    assert 'DATASET.PATH cannot be set by a KEY VALUE pair here: --data_path sets it' in capsys.readouterr().err


def test_rerunning_the_demo_trains_no_further(demo, monkeypatch):
    monkeypatch.setattr(run_demo, 'run_passing_stops', run_here)
    before = (demo / 'run' / 'latest.pth').read_bytes()
    images = {path: path.stat().st_mtime_ns for path in (demo / 'data').rglob('*.jpg')}
    assert run_demo.main(['--out', str(demo), '--frames', '24', '8', '9', *SMALL]) == 0
    assert (demo / 'run' / 'latest.pth').read_bytes() == before
    assert {path: path.stat().st_mtime_ns for path in (demo / 'data').rglob('*.jpg')} == images


def test_per_sample_rows_average_to_the_headline(demo):
    metrics = json.loads((demo / 'trained' / 'metrics.json').read_text())
    with open(demo / 'trained' / 'per_sample.csv') as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == metrics['frames']
    assert [int(row['index']) for row in rows] == list(range(len(rows)))
    assert all(Path(row['file']).is_file() for row in rows)
    for figure in FIGURES:
        for side in ('left', 'right'):
            mean = math.fsum(float(row[f'{figure}_{side}']) for row in rows) / len(rows)
            assert mean == pytest.approx(metrics[figure][side], abs=1e-5)


def test_chosen_samples_agree_with_the_measured_errors(demo):
    metrics = json.loads((demo / 'trained' / 'metrics.json').read_text())
    with open(demo / 'trained' / 'per_sample.csv') as file:
        rows = list(csv.DictReader(file))
    with np.load(demo / 'trained' / 'samples.npz') as samples:
        chosen = dict(samples)
    count = len(chosen['index'])
    assert 3 <= count <= metrics['frames'] and set(chosen['kind']) == {'worst', 'median', 'best'}
    errors = sorted((float(row['joint_mm_left']) + float(row['joint_mm_right'])) / 2 for row in rows)
    assert chosen['joint_mm'].mean(1).max() == pytest.approx(errors[-1], abs=1e-4)
    assert chosen['joint_mm'].mean(1).min() == pytest.approx(errors[0], abs=1e-4)
    assert chosen['vertices'].shape == (count, 3, 2, 778, 3) and chosen['image'].shape == (count, 256, 256, 3)
    for number, index in enumerate(chosen['index']):
        row = rows[index]
        assert chosen['name'][number] == row['file'] and Path(row['file']).is_file()
        assert chosen['root_mm'][number] == pytest.approx(float(row['root_mm']), abs=1e-4)
        true = chosen['true_roots'][number]
        vector = 1000 * np.linalg.norm(chosen['offset'][number, -1] - (true[1] - true[0]))
        assert vector == pytest.approx(chosen['root_mm'][number], abs=1)  # chain joint here, regressed joint there


def evaluate(demo: Path, *more: str) -> int:
    return eval_interhand.main(
        ['--data_path', str(demo / 'data'), '--model', str(demo / 'run'), 'TRAIN.WORKERS', '0', *more]
    )


def test_printed_lines_are_the_established_ones(demo, capsys):
    assert evaluate(demo, '--root_joint', '9', '--no-scale', '--split', 'val') == 0
    lines = capsys.readouterr().out.splitlines()
    assert 'root joint 9' in lines[1] and 'scale alignment off' in lines[1] and 'frames' in lines[1]
    assert lines[2:14:3] == [
        'joint mean error:',
        'vert mean error:',
        'pixel joint mean error:',
        'pixel vert mean error:',
    ]
    assert lines[14].startswith('root error: ') and lines[14].endswith(' mm')
    assert all(line.endswith(' mm') for line in lines[3:8] if line.startswith(' '))
    assert all(line.endswith(' px') for line in lines[9:14] if line.startswith(' '))


def test_every_metric_is_reported_with_its_number_of_frames(demo):
    metrics = json.loads((demo / 'trained' / 'metrics.json').read_text())
    frames = metrics['frames']
    assert metrics['version'] == METRICS_VERSION and metrics['subset'] is None
    assert metrics['protocol']['name'] == 'published' and metrics['protocol']['split'] == 'test'
    for name in FIGURES:
        low, high = metrics['interval_95'][name]['all']
        assert low <= metrics[name]['all'] <= high
        assert [stage[name] for stage in metrics['stages']][-1] == metrics[name]
    assert len(metrics['stages']) == 3 and 'protocols' not in metrics
    for side in ('left', 'right', 'all'):
        assert 0 < metrics['pa_joint_mm'][side] < metrics['joint_mm'][side]
        assert 0 < metrics['pck']['auc'][side] < 1
    assert sum(row['frames'] for row in metrics['by_box_iou']) == frames
    assert sum(row['frames'] for row in metrics['by_distance_mm']) == frames
    assert 0 <= metrics['penetration']['share'] <= 1 and 0 <= metrics['true_penetration']['share'] <= 1
    assert sum(row['hands'] for row in metrics['by_visibility']) == 2 * frames
    assert 0 < metrics['placement_mm']['depth'] <= metrics['placement_mm']['all']
    assert 0 < metrics['segmentation_iou']['background'] < 1
    assert metrics['config']['MODEL.IMAGE_SIZE'] == 64 and metrics['training']['seconds'] > 0
    baseline = json.loads((demo / 'baseline' / 'metrics.json').read_text())
    assert baseline['segmentation_iou'] is None and len(baseline['stages']) == 1


def test_all_protocols_at_once_equal_each_alone(demo, tmp_path, capsys):
    assert evaluate(demo, '--all-protocols', '--out', str(tmp_path / 'grid')) == 0
    assert 'scale off' in capsys.readouterr().out
    grid = json.loads((tmp_path / 'grid' / 'metrics.json').read_text())['protocols']
    assert [(s['protocol']['root_joint'], s['protocol']['scale']) for s in grid] == [
        (0, True),
        (0, False),
        (9, True),
        (9, False),
    ]
    for number, arguments in enumerate([(), ('--no-scale',), ('--protocol', 'intaghand'), ('--protocol', 'acr')]):
        out = tmp_path / str(number)
        assert evaluate(demo, *arguments, '--out', str(out)) == 0
        alone = json.loads((out / 'metrics.json').read_text())
        assert {name: alone[name] for name in (*FIGURES, 'root_mm', 'frames')} == {
            name: grid[number][name] for name in (*FIGURES, 'root_mm', 'frames')
        }
    assert alone['protocol']['name'] == 'acr'
    assert evaluate(demo, '--root_joint', '9', '--no-scale') == 0
    assert 'protocol acr: root joint 9' in capsys.readouterr().out  # the name of the requested combination


def test_two_processes_measure_the_same_as_one(demo, tmp_path):
    odd = ['--first', '5']  # one process has one sample more
    assert evaluate(demo, *odd, '--out', str(tmp_path / 'one')) == 0
    command = [
        sys.executable,
        '-m',
        'torch.distributed.run',
        '--standalone',
        '--nproc_per_node',
        '2',
        'apps/eval_interhand.py',
        '--data_path',
        str(demo / 'data'),
        '--model',
        str(demo / 'run'),
        *odd,
        '--out',
        str(tmp_path / 'two'),
        'TRAIN.WORKERS',
        '0',
        'EVAL.BATCH_SIZE',
        '2',
        'DEVICE',
        'cpu',
    ]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr[-2000:]
    assert len([line for line in result.stdout.splitlines() if line.startswith('root error: ')]) == 1
    one, two = (json.loads((tmp_path / name / 'metrics.json').read_text()) for name in ('one', 'two'))
    assert two['frames'] == one['frames'] == 5
    for name in FIGURES:
        assert two[name] == pytest.approx(one[name], rel=1e-5)
    assert two['penetration'] == pytest.approx(one['penetration'], rel=1e-4)
    assert two['pck']['auc'] == pytest.approx(one['pck']['auc'], rel=1e-4)


def test_annotated_joints_protocol(demo, tmp_path, capsys):
    assert evaluate(demo, '--protocol', 'internet') == 2
    assert '--annotations INTERHAND' in capsys.readouterr().err
    assert evaluate(demo, '--protocol', 'internet', '--annotations', str(demo / 'raw'), '--out', str(tmp_path)) == 0
    metrics = json.loads((tmp_path / 'metrics.json').read_text())
    assert metrics['protocol']['name'] == 'internet' and metrics['protocol']['joints'] == 'annotated'
    fits = json.loads((demo / 'trained' / 'metrics.json').read_text())
    assert 0 < metrics['joint_mm']['all'] < 2 * fits['joint_mm']['all']


def test_a_subset_is_recorded_with_its_number_of_frames(demo, tmp_path, capsys):
    with open(demo / 'trained' / 'per_sample.csv') as file:
        rows = list(csv.DictReader(file))
    assert evaluate(demo, '--first', '3', '--out', str(tmp_path / 'first')) == 0
    assert '3 frames of' in capsys.readouterr().out
    metrics = json.loads((tmp_path / 'first' / 'metrics.json').read_text())
    assert metrics['frames'] == 3
    assert metrics['subset'] == {'description': 'first 3', 'frames': 3, 'of': len(rows)}
    mean = sum(float(row['root_mm']) for row in rows[:3]) / 3
    assert metrics['root_mm'] == pytest.approx(mean, rel=1e-4)

    ids = tmp_path / 'ids.txt'
    ids.write_text('-1')
    for arguments in (['--image-ids', str(ids)], ['--capture', 'none'], ['--first', '0']):
        assert evaluate(demo, *arguments) == 2
        assert capsys.readouterr().err.count('\n') == 1
    assert evaluate(demo, '--protocol', 'interwild') == 2
    assert '--annotation-ids' in capsys.readouterr().err


def test_batch_size_does_not_change_the_figures(demo, tmp_path):
    for size in ('2', '64'):
        assert evaluate(demo, '--out', str(tmp_path / size), 'EVAL.BATCH_SIZE', size) == 0
    a, b = (json.loads((tmp_path / size / 'metrics.json').read_text()) for size in ('2', '64'))
    for figure in FIGURES:
        assert a[figure]['all'] == pytest.approx(b[figure]['all'], rel=1e-5)
    assert a['root_mm'] == pytest.approx(b['root_mm'], rel=1e-5)


def test_checkpoint_holds_no_hand_array(demo):
    content = torch.load(demo / 'run' / 'best.pth', weights_only=True)
    assert content['hand_model'].startswith('standin')
    assert [key for key, value in content['model'].items() if {778, 1538} & set(value.shape)] == []


def test_another_hand_model_is_refused(demo, capsys, monkeypatch):
    content = torch.load(demo / 'run' / 'best.pth', weights_only=True)
    other = demo / 'other.pth'
    torch.save(content | {'hand_model': 'mano:000000000000:111111111111'}, other)
    assert eval_interhand.main(['--data_path', str(demo / 'data'), '--model', str(other)]) == 2
    error = capsys.readouterr().err
    assert 'mano:000000000000' in error and 'standin' in error and error.count('\n') == 1


def test_keys_of_the_network_cannot_be_changed_afterwards(demo, capsys):
    assert evaluate(demo, 'ROOT_JOINT', '9') == 2
    assert 'ROOT_JOINT 0' in capsys.readouterr().err


@pytest.mark.parametrize('spoil', ['truncated', 'foreign', 'missing'])
def test_a_bad_checkpoint_is_one_sentence(demo, tmp_path, capsys, spoil):
    path = tmp_path / 'bad.pth'
    if spoil == 'truncated':
        path.write_bytes((demo / 'run' / 'best.pth').read_bytes()[:10000])
    elif spoil == 'foreign':
        torch.save({'net': {'a': torch.zeros(1)}}, path)
    assert eval_interhand.main(['--data_path', str(demo / 'data'), '--model', str(path)]) == 2
    error = capsys.readouterr().err
    assert str(path) in error and error.count('\n') == 1


def test_the_constant_baseline_fits_its_own_training_split_best(demo, capsys):
    """It consists of that split's means."""
    arguments = ['--data_path', str(demo / 'data'), '--cfg', 'configs/demo.yaml', 'TRAIN.WORKERS', '0']
    assert eval_baseline.main([*arguments, '--split', 'train', '--out', str(demo / 'b_train')]) == 0
    train, test = (json.loads((demo / name / 'metrics.json').read_text()) for name in ('b_train', 'baseline'))
    assert train['root_mm'] < 1.2 * test['root_mm']
    assert train['joint_mm']['all'] > 10  # the hands do move
