"""Every command bounds the spinning of OpenMP's threads before PyTorch reads the bound."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

import utils
from benchmarks import busy

ROOT = Path(__file__).resolve().parents[1]
COMMANDS = [
    path
    for folder in ('.', 'apps', 'dataset', 'benchmarks')
    for path in sorted((ROOT / folder).glob('*.py'))
    if "__name__ == '__main__'" in path.read_text()
]

# Runs each file until it imports torch, and prints GOMP_SPINCOUNT at that moment.
PROBE = """
import json, os, runpy, sys
import cv2, numpy, PIL.Image, tqdm, yacs.config, yaml  # they cannot be imported twice
class AtTorch(BaseException): pass
class Finder:
    def find_spec(self, name, path, target=None):
        if name == 'torch': raise AtTorch
sys.meta_path.insert(0, Finder())
foreign, path = set(sys.modules), list(sys.path)
for file in sys.argv[1:]:
    for name in set(sys.modules) - foreign: del sys.modules[name]
    os.environ.pop('GOMP_SPINCOUNT', None)
    sys.path[:] = [os.path.dirname(file), *path]
    try:
        runpy.run_path(file, run_name='probed')
    except AtTorch:
        pass
    print(json.dumps([file, os.environ.get('GOMP_SPINCOUNT')]))
"""


def test_every_command_bounds_it_before_pytorch_is_loaded():
    files = [*map(str, COMMANDS), str(ROOT / 'tests/conftest.py')]
    assert len(files) > 15
    environment = {name: value for name, value in os.environ.items() if not name.startswith(('GOMP', 'OMP_W', 'KMP'))}
    result = subprocess.run([sys.executable, '-c', PROBE, *files], capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    assert list(map(json.loads, result.stdout.splitlines())) == [[file, str(utils.SPIN_COUNT)] for file in files]


@pytest.mark.parametrize('name', ['GOMP_SPINCOUNT', 'OMP_WAIT_POLICY', 'KMP_BLOCKTIME', 'KMP_LIBRARY'])
def test_a_choice_of_the_user_is_kept(name):
    environment = {name: 'mine'}
    utils.bound_spinning(environment)
    assert environment == {name: 'mine'}


def test_other_settings_do_not_matter():
    environment = {'OMP_NUM_THREADS': '2', 'PATH': ''}
    utils.bound_spinning(environment)
    assert environment['GOMP_SPINCOUNT'] == str(utils.SPIN_COUNT)


@pytest.mark.slow  # trains beside a busy process
def test_benchmark_measures_steps_alone_and_busy(capsys):
    small = ['MODEL.IMAGE_SIZE', '32', 'MODEL.MAP_CHANNELS', '8', 'MODEL.STAGES', '0', 'TRAIN.BATCH_SIZE', '2']
    assert busy.main(['--measure', '--steps', '1', *small]) == 0
    times = json.loads(capsys.readouterr().out)
    assert times.keys() == {'alone', 'busy'} and min(times.values()) > 0


def test_benchmark_compares_all_settings(tmp_path, capsys, monkeypatch):
    seconds = {'GOMP_SPINCOUNT': (1.2, 2.0), 'OMP_WAIT_POLICY': (1.5, 1.6), 'OMP_NUM_THREADS': (1.6, 1.6)}
    times = lambda variables, *_: busy.Times(*seconds.get(next(iter(variables)), (1.0, 25.0)))  # noqa: E731
    monkeypatch.setattr(busy, 'measure_in_process', times)
    assert busy.main(['--spin', '1000', '--steps', '1', '--rounds', '2', '--out', str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert text == (tmp_path / 'busy.md').read_text()
    for row in ('| libgomp | 1.000 | 25.000 | 1.00 | 25.00 |', '| spin 1000 | 1.200 | 2.000 | 1.20 | 2.00 |'):
        assert row in text
    assert f'| spin {utils.SPIN_COUNT} (chosen) |' in text and '| passive |' in text and '| one thread |' in text
    assert busy.main(['--steps', '0']) == 2


def test_the_busy_process_ends_with_the_one_that_measures():
    spin = f'subprocess.Popen([sys.executable, "-c", {busy.BUSY!r}, str(os.getpid())])'
    code = f'import os, subprocess, sys\nprint({spin}.pid, flush=True)\ninput()'
    measuring = subprocess.Popen([sys.executable, '-c', code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    spinning = int(measuring.stdout.readline())
    measuring.kill()
    measuring.wait()
    deadline = time.monotonic() + 20
    while running(spinning) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not running(spinning)


def running(pid: int) -> bool:
    try:
        return 'State:\tZ' not in Path(f'/proc/{pid}/status').read_text()
    except OSError:
        return False
