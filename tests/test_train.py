"""Real training on tiny data: exact resume, determinism, stopping, refusals."""

import json
import multiprocessing
import os
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import kills
import pytest
import torch
from prepared_tree import write_prepared
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny import TRAINING

import train
from dataset.loader import evaluation_split
from evaluation import validation
from evaluation.pictures import draw_samples
from models import build_model, trainer
from models.checkpoint import load_model
from utils.ownership import lock_path

ROOT = Path(__file__).resolve().parents[1]
# fmt: off
DEMO = [
    *TRAINING, 'MODEL.STAGES', '1', 'TRAIN.BATCH_SIZE', '4', 'TRAIN.EPOCHS', '2', 'TRAIN.WORKERS', '0',
    'TRAIN.PICTURES', '2', 'TRAIN.LOG_EVERY', '1', 'TRAIN.VALIDATE_EVERY', '1',
]
# fmt: on
RESNET = ['MODEL.BACKBONE', 'resnet18']  # fewer layers: fewer to trace, and less rounding

TWICE = pytest.mark.slow  # trains at least once, and again after the resume


def arguments(data: Path, out: Path, *more: str) -> list[str]:
    return [*DEMO, 'DATASET.PATH', str(data), 'OUTPUT_DIR', str(out), *more]


def run(data: Path, out: Path, *more: str) -> int:
    return train.main(arguments(data, out, *more))


@pytest.fixture(scope='module')
def finished(tiny_prepared, tmp_path_factory) -> Path:
    """The folder of an uninterrupted run."""
    out = tmp_path_factory.mktemp('run') / 'whole'
    assert run(tiny_prepared, out) == 0
    return out


def content(path: Path) -> dict:
    return torch.load(path, weights_only=True)


def assert_same_weights(a: Path, b: Path) -> None:
    first, second = content(a)['model'], content(b)['model']
    assert first.keys() == second.keys()
    assert [key for key in first if not torch.equal(first[key], second[key])] == []


def lines(out: Path, kind: str) -> list[dict]:
    return [line for line in map(json.loads, (out / 'log.jsonl').read_text().splitlines()) if line['kind'] == kind]


def test_a_run_folder_holds_logs_figures_and_pictures(finished):
    assert [line['step'] for line in lines(finished, 'train')] == [1, 2, 3, 4]
    first = lines(finished, 'train')[0]
    assert {'lr', 'samples_per_second', 'total', 'joint_xyz_left_0', 'offset_1', 'segmentation'} <= first.keys()
    assert len([name for name in first if name[-2:] in ('_0', '_1')]) == 26
    for stage in range(2):
        assert [line['epoch'] for line in lines(finished, f'val_stage{stage}')] == [1, 2]
    assert sorted(path.name for path in (finished / 'pictures').iterdir()) == [f'epoch_00{n}.jpg' for n in (1, 2)]


def test_tensorboard_holds_sheets_and_histograms_of_sample_errors(finished):
    board = EventAccumulator(str(finished), size_guidance={'images': 0, 'histograms': 0}).Reload()
    pictures = {tag: board.Images(tag) for tag in board.Tags()['images']}
    assert pictures.keys() == {'validation', 'stages', 'attention', 'bone_features', 'segmentation'}
    assert all([picture.step for picture in of_tag] == [2, 4] for of_tag in pictures.values())
    in_folder = [(finished / 'pictures' / f'epoch_00{n}.jpg').read_bytes() for n in (1, 2)]
    assert [picture.encoded_image_string for picture in pictures['validation']] == in_folder
    errors = ('joint_mm_left', 'joint_mm_right', 'vert_mm_left', 'vert_mm_right', 'root_mm')
    names = {f'val_stage{stage}/{name}': (stage, name) for stage in range(2) for name in errors}
    assert set(board.Tags()['histograms']) == {f'{tag}_samples' for tag in names}
    assert names.keys() <= set(board.Tags()['scalars'])
    for tag, (stage, name) in names.items():
        for event, line in zip(board.Histograms(f'{tag}_samples'), lines(finished, f'val_stage{stage}'), strict=True):
            histogram = event.histogram_value
            assert event.step == line['step'] and histogram.num == 3  # every sample of the split
            assert histogram.sum / histogram.num == pytest.approx(line[name], rel=1e-5)


def test_training_changes_every_weight(finished, standin):
    torch.manual_seed(0)  # as train.py does before it builds the network
    fresh = build_model(train.load_config('configs/demo.yaml', DEMO[2:]), standin)
    after = content(finished / 'latest.pth')['model']
    assert [name for name, value in fresh.named_parameters() if torch.equal(after[name], value)] == []


def test_one_seed_is_bit_identical_for_any_number_of_workers(finished, tiny_prepared, tmp_path):
    assert run(tiny_prepared, tmp_path / 'again', 'TRAIN.WORKERS', '1') == 0
    assert_same_weights(finished / 'latest.pth', tmp_path / 'again' / 'latest.pth')


def test_another_seed_is_another_run(finished, tiny_prepared, tmp_path):
    assert run(tiny_prepared, tmp_path / 'other', 'SEED', '1', 'TRAIN.EPOCHS', '1') == 0
    assert lines(tmp_path / 'other', 'train')[0]['total'] != lines(finished, 'train')[0]['total']


def test_killed_run_resumes_to_the_same_bits(finished, tiny_prepared, tmp_path):
    out = tmp_path / 'killed'
    command = [sys.executable, 'train.py', *arguments(tiny_prepared, out, 'TRAIN.SAVE_EVERY', '1')]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.time() + 120
    while not (out / 'latest.pth').exists() and process.poll() is None and time.time() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    saved = content(out / 'latest.pth')
    assert (saved['progress']['epoch'], saved['progress']['step']) < (2, 0)  # it was killed before the end
    assert run(tiny_prepared, out, '--resume') == 0
    assert_same_weights(finished / 'latest.pth', out / 'latest.pth')
    assert [line['step'] for line in lines(out, 'train')] == [1, 2, 3, 4]


def run_until(monkeypatch, happens, *arguments) -> int:
    """``run``; ``happens`` is called before its third step."""
    real_step, calls = train.train_step, []

    def step(*args, **options):
        calls.append(1)
        if len(calls) == 3:
            happens()
        return real_step(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(train, 'train_step', step)
        return run(*arguments)


def run_until_ctrl_c(monkeypatch, *arguments) -> int:
    return run_until(monkeypatch, lambda: os.kill(os.getpid(), signal.SIGINT), *arguments)


def progress(out: Path, name: str = 'latest.pth') -> tuple[int, int]:
    saved = content(out / name)['progress']
    return saved['epoch'], saved['step']


def assert_same_run(a: Path, b: Path) -> None:
    """Weights, optimizer state and figures are equal to the bit, and every step is in the log once."""
    assert kills.differences(a, b, steps=4) == []


@TWICE
def test_interrupt_finishes_the_step_and_resumes_exactly(finished, tiny_prepared, tmp_path, monkeypatch, capsys):
    out = tmp_path / 'stopped'
    assert run_until_ctrl_c(monkeypatch, tiny_prepared, out) == 130
    stopped = 'Stopped by SIGINT. The run is saved after step 1 of epoch 2; continue with --resume.'
    assert capsys.readouterr().out.splitlines()[-1] == stopped
    assert progress(out) == (1, 1)
    assert run(tiny_prepared, out, '--resume', 'auto') == 0
    assert_same_run(finished, out)


@TWICE
def test_a_stop_during_validation_validates_after_the_resume(finished, tiny_prepared, tmp_path, monkeypatch, capsys):
    out, real_draw = tmp_path / 'stopped', validation.draw_sheets

    def draw(*args):
        os.kill(os.getpid(), signal.SIGTERM)
        return real_draw(*args)

    with monkeypatch.context() as patch:
        patch.setattr(validation, 'draw_sheets', draw)
        assert run(tiny_prepared, out) == 143
    assert 'saved after epoch 1, before its validation' in capsys.readouterr().out
    assert progress(out) == (1, 0) and content(out / 'latest.pth')['progress']['validation_due']
    assert not (out / 'best.pth').exists() and lines(out, 'val_stage0') == []
    assert run(tiny_prepared, out, '--resume') == 0
    assert_same_run(finished, out)


@TWICE
def test_a_stop_before_the_first_step(tiny_prepared, tmp_path, monkeypatch, capsys):
    real_log = train.RunLog

    def log(*args, **options):
        os.kill(os.getpid(), signal.SIGUSR1)
        return real_log(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(train, 'RunLog', log)
        assert run(tiny_prepared, tmp_path / 'out') == 138
    assert 'saved before its first step' in capsys.readouterr().out
    assert progress(tmp_path / 'out') == (0, 0)


def test_a_stop_while_the_network_is_built_leaves_nothing(tiny_prepared, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train, 'Trainer', lambda *args, **options: os.kill(os.getpid(), signal.SIGHUP))
    assert run(tiny_prepared, tmp_path / 'out') == 129
    assert 'Stopped by SIGHUP' in capsys.readouterr().err
    assert not any(path.is_file() for path in tmp_path.rglob('*'))


# Resuming


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1000])


@TWICE
def test_resume_auto_starts_falls_back_and_refuses(finished, tiny_prepared, tmp_path, monkeypatch, capsys):
    out = tmp_path / 'auto'
    words = (tiny_prepared, out, 'TRAIN.SAVE_EVERY', '1', '--resume', 'auto')
    assert run_until_ctrl_c(monkeypatch, *words) == 130  # there was no run yet
    assert progress(out) == (1, 1) and progress(out, 'previous.pth') == (1, 0)
    cut(out / 'latest.pth')
    stale = out / '.latest.pth.0123456789abcdef.partial'
    stale.write_bytes(b'left by a killed process')
    assert run(*words) == 0
    assert f'Continuing from {out / "previous.pth"}' in capsys.readouterr().out
    assert_same_run(finished, out)
    assert not stale.exists()
    cut(out / 'latest.pth')
    cut(out / 'previous.pth')
    assert run(*words) == 2  # a run with damaged checkpoints is not silently started anew
    error = capsys.readouterr().err
    assert 'latest.pth' in error and 'previous.pth' in error and 'Traceback' not in error


def test_a_run_is_not_resumed_on_other_data(finished, tiny_prepared, tmp_path, capsys):
    out = tmp_path / 'copy'
    shutil.copytree(finished, out)
    before = (out / 'latest.pth').read_bytes()
    for split, count, seed in (('train', 8, 5), ('val', 2, 1)):  # other frames, fewer of them
        data = tmp_path / split
        shutil.copytree(tiny_prepared, data)
        shutil.rmtree(data / split)
        write_prepared(data, split, count, seed=seed)
        assert run(data, out, '--resume') == 2
        error = capsys.readouterr().err
        assert 'trained on other data' in error and error.count('\n') == 1
    shutil.rmtree(data / 'val')
    assert run(data, out, '--resume') == 2
    assert f'was trained with a split val, which {data} lacks' in capsys.readouterr().err
    assert (out / 'latest.pth').read_bytes() == before


@pytest.mark.parametrize('resume', [[], ['--resume'], ['--resume', 'auto']])
def test_a_run_folder_has_one_owner(finished, tiny_prepared, tmp_path, monkeypatch, capsys, resume):
    out = tmp_path / 'run'
    if resume:
        shutil.copytree(finished, out)
    monkeypatch.setattr(train, 'PATIENCE_S', 0.3)
    owner = subprocess.Popen(  # what utils/ownership.py does, without the import of torch
        [
            sys.executable,
            '-c',
            'import fcntl, sys; f = open(sys.argv[1], "w"); fcntl.lockf(f, fcntl.LOCK_EX); print(); input()',
            str(lock_path(out)),
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    owner.stdout.readline()
    try:
        assert run(tiny_prepared, out, *resume) == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith(f'error: {out} is in use by another process.')
        assert out.exists() == bool(resume)
    finally:
        owner.communicate()


@TWICE
def test_minutes_between_saves(tiny_prepared, tmp_path, monkeypatch):
    saved, real_save = [], train.save_rotating

    def save(path, **content):
        saved.append((content['progress']['epoch'], content['progress']['step']))
        real_save(path, **content)

    monkeypatch.setattr(train, 'save_rotating', save)
    assert run(tiny_prepared, tmp_path / 'out', 'TRAIN.SAVE_MINUTES', '1e-9') == 0
    assert saved == [(0, 1), (1, 0), (1, 0), (1, 1), (2, 0), (2, 0)]  # before and after each validation


# Memory and loader processes


def out_of_memory(kind: type[Exception], monkeypatch) -> None:
    """Fail in the third step, after the forward pass has changed the statistics of the batch norms."""
    real_build = trainer.build_criterion

    def build(cfg, models):
        criterion, calls = real_build(cfg, models), []
        judge = criterion.forward

        def forward(output, target):
            calls.append(1)
            if len(calls) == 3:
                raise kind('CUDA out of memory. Tried to allocate 2.00 GiB.')
            return judge(output, target)

        criterion.forward = forward
        return criterion

    monkeypatch.setattr(trainer, 'build_criterion', build)


@TWICE
@pytest.mark.parametrize('kind', [torch.OutOfMemoryError, MemoryError])
def test_out_of_memory_saves_the_last_whole_step(finished, tiny_prepared, tmp_path, monkeypatch, capsys, kind):
    out = tmp_path / 'memory'
    with monkeypatch.context() as patch:
        out_of_memory(kind, patch)
        assert run(tiny_prepared, out) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert 'Out of memory (CUDA out of memory. Tried to allocate 2.00 GiB.)' in error
    assert 'TRAIN.CHECKPOINT true' in error and 'The run is saved after epoch 1' in error
    assert run(tiny_prepared, out, '--resume', 'TRAIN.CHECKPOINT', 'true') == 0  # as advised
    assert_same_run(finished, out)


@TWICE
def test_where_checkpointing_is_not_enough_parts_of_a_batch_are_advised(tiny_prepared, tmp_path, monkeypatch, capsys):
    out = tmp_path / 'memory'
    with monkeypatch.context() as patch:
        out_of_memory(torch.OutOfMemoryError, patch)
        assert run(tiny_prepared, out, 'TRAIN.CHECKPOINT', 'true') == 2
    assert 'TRAIN.ACCUMULATE 2' in capsys.readouterr().err.splitlines()[-1]
    assert run(tiny_prepared, out, '--resume', 'TRAIN.ACCUMULATE', '2') == 0
    assert 'Warning: TRAIN.ACCUMULATE was 1, is 2' in capsys.readouterr().err


@TWICE
def test_half_an_update_is_not_saved(tiny_prepared, tmp_path, monkeypatch, capsys):
    real_step, calls = torch.optim.AdamW.step, []

    def step(self, *args, **options):
        calls.append(1)
        if len(calls) == 4:
            raise torch.OutOfMemoryError('no memory for the moments')
        return real_step(self, *args, **options)

    monkeypatch.setattr(torch.optim.AdamW, 'step', step)
    assert run(tiny_prepared, tmp_path / 'out') == 2
    assert 'in the middle of an update; --resume continues from the last checkpoint' in capsys.readouterr().err
    assert progress(tmp_path / 'out') == (1, 0)


@TWICE
def test_a_killed_loader_process_costs_nothing(finished, tiny_prepared, tmp_path, monkeypatch, capsys):
    out = tmp_path / 'killed'

    def kill():
        for process in multiprocessing.active_children():
            process.kill()
            process.join()

    words = (tiny_prepared, out, 'TRAIN.WORKERS', '1')
    assert run_until(monkeypatch, kill, *words) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert 'A loader process ended' in error and 'fewer loader processes than 1' in error
    assert 'The run is saved after' in error and multiprocessing.active_children() == []
    assert run(*words, '--resume') == 0
    assert_same_run(finished, out)


def test_resuming_a_finished_run_does_nothing(finished, tiny_prepared, tmp_path):
    out = tmp_path / 'copy'
    shutil.copytree(finished, out)
    before = (out / 'latest.pth').read_bytes()
    assert run(tiny_prepared, out, '--resume') == 0
    assert (out / 'latest.pth').read_bytes() == before


def test_non_finite_loss_stops_and_keeps_the_last_checkpoint(tiny_prepared, tmp_path, monkeypatch, capsys):
    out, real_build = tmp_path / 'nan', trainer.build_criterion

    def spoiled(cfg, models):
        criterion = real_build(cfg, models)
        judge, calls = criterion.forward, []

        def forward(output, target):
            calls.append(1)
            terms = judge(output, target)
            return terms | {'offset_1': terms['offset_1'] * float('nan')} if len(calls) == 3 else terms

        criterion.forward = forward
        return criterion

    monkeypatch.setattr(trainer, 'build_criterion', spoiled)
    assert run(tiny_prepared, out) == 2
    message = capsys.readouterr().err
    assert 'offset_1 nan' in message and 'joint_xyz_left_0' in message
    assert message.count(str(tiny_prepared / 'train' / 'img')) == 4  # the batch's samples by name
    saved = content(out / 'latest.pth')
    assert saved['progress']['epoch'] == 1
    assert all(torch.isfinite(value).all() for value in saved['model'].values())


def test_full_disk_leaves_the_old_checkpoint(finished, tiny_prepared, tmp_path, monkeypatch, capsys):
    out = tmp_path / 'full'
    shutil.copytree(finished, out)
    before = content(out / 'latest.pth')
    torch.save(before | {'progress': before['progress'] | {'epoch': 1, 'step': 0}}, out / 'latest.pth')
    old = (out / 'latest.pth').read_bytes()

    def no_space(*args, **kwargs):
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(torch, 'save', no_space)
    assert run(tiny_prepared, out, '--resume') == 2
    assert 'No space left on device' in capsys.readouterr().err
    assert (out / 'latest.pth').read_bytes() == old
    assert not list(out.glob('.*partial'))


@TWICE
def test_a_disk_that_fills_up_keeps_the_checkpoints(finished, tiny_prepared, tmp_path, monkeypatch, capsys):
    out, limits = tmp_path / 'full', resource.getrlimit(resource.RLIMIT_FSIZE)
    words = (tiny_prepared, out, 'TRAIN.SAVE_EVERY', '1')
    try:
        assert (
            run_until(monkeypatch, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20 * 2**20, limits[1])), *words)
            == 2
        )
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    error = capsys.readouterr().err.splitlines()[-1]
    assert str(out / 'latest.pth') in error and 'disk full' in error
    assert progress(out) == (1, 0) and progress(out, 'previous.pth') == (1, 0)
    assert sorted(path.name for path in out.glob('.*')) == []
    assert run(*words, '--resume') == 0
    assert_same_run(finished, out)


@pytest.mark.slow  # PyTorch is imported in a process of its own
@pytest.mark.skipif(not shutil.which('unshare') or os.geteuid() != 0, reason='needs root to mount a file system')
def test_a_read_only_folder_is_reported_before_training(tiny_prepared, tmp_path):
    (tmp_path / 'disk').mkdir()
    mount = f'mount -t tmpfs none {tmp_path}/disk && mkdir {tmp_path}/disk/run && mount -o remount,ro {tmp_path}/disk'
    command = [sys.executable, 'train.py', *arguments(tiny_prepared, tmp_path / 'disk' / 'run')]
    done = subprocess.run(
        ['unshare', '-m', 'sh', '-c', f'{mount} && exec {shlex.join(command)}'],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if 'mount' in done.stderr or 'unshare' in done.stderr:
        pytest.skip(done.stderr)
    assert done.returncode == 2 and 'Traceback' not in done.stderr
    assert done.stderr.splitlines()[-1].startswith('error: Read-only file system')


@pytest.mark.parametrize(
    ('more', 'says'),
    [
        ([], '--resume'),
        (['--resume', 'TRAIN.LR', '0.5'], 'TRAIN.LR'),
        (['--resume', 'MODEL.MAP_CHANNELS', '32'], 'MODEL.MAP_CHANNELS'),
    ],
)
def test_an_existing_run_is_never_overwritten(finished, tiny_prepared, capsys, more, says):
    before = (finished / 'latest.pth').read_bytes()
    assert run(tiny_prepared, finished, *more) == 2
    error = capsys.readouterr().err
    assert says in error and error.count('\n') == 1
    assert (finished / 'latest.pth').read_bytes() == before


@pytest.mark.parametrize(
    ('more', 'says'),
    [
        (['TRAIN.BATCH_SIZE', '50'], 'TRAIN.BATCH_SIZE'),
        (['TRAIN.BATCHSIZE', '4'], "nearest is 'TRAIN.BATCH_SIZE'"),
        (['DATASET.PATH', 'nowhere'], 'nowhere'),
        (['MANO.SOURCE', 'files', 'MANO.PATH', 'nowhere'], 'MANO_LEFT.pkl is missing'),
        (['MODEL.PRETRAINED', 'true', 'MODEL.BACKBONE_WEIGHTS', 'nowhere.pth'], 'MODEL.PRETRAINED false'),
        (['DEVICE', 'cuda'] if not torch.cuda.is_available() else ['DEVICE', 'gpu'], 'DEVICE'),
        (['--resume'], 'latest.pth'),
    ],
)
def test_a_mistake_is_one_sentence_and_exit_code_2(tiny_prepared, tmp_path, capsys, more, says):
    assert run(tiny_prepared, tmp_path / 'out', *more) == 2
    error = capsys.readouterr().err
    assert says in error and 'Traceback' not in error
    assert not (tmp_path / 'out' / 'latest.pth').exists()


def test_without_a_validation_split_the_last_epoch_is_kept(tiny_prepared, tmp_path, capsys):
    shutil.copytree(tiny_prepared / 'train', tmp_path / 'data' / 'train')
    assert run(tmp_path / 'data', tmp_path / 'out', 'TRAIN.EPOCHS', '1') == 0
    assert 'has no split val' in capsys.readouterr().out
    assert_same_weights(tmp_path / 'out' / 'best.pth', tmp_path / 'out' / 'latest.pth')


@pytest.mark.slow  # trains an epoch
def test_a_validation_split_without_hands_keeps_the_last_epoch(tiny_prepared, tmp_path, capsys):
    shutil.copytree(tiny_prepared / 'train', tmp_path / 'data' / 'train')
    write_prepared(tmp_path / 'data', 'val', 2, absent=dict.fromkeys(range(2), ('left', 'right')))
    assert run(tmp_path / 'data', tmp_path / 'out', 'TRAIN.EPOCHS', '1') == 0
    printed = capsys.readouterr().out
    assert 'No frame of the split val shows a hand' in printed and 'inf mm' not in printed
    assert_same_weights(tmp_path / 'out' / 'best.pth', tmp_path / 'out' / 'latest.pth')


def test_a_broken_validation_split_is_reported_before_training(tiny_prepared, tmp_path, capsys):
    shutil.copytree(tiny_prepared, tmp_path / 'data')
    (tmp_path / 'data' / 'val' / 'img' / '1.jpg').unlink()
    assert run(tmp_path / 'data', tmp_path / 'out') == 2
    assert 'has gaps' in capsys.readouterr().err
    assert not (tmp_path / 'out').exists()


def children(pid: int) -> list[int]:
    """Ids of the child processes of ``pid`` that run train.py."""
    found = []
    for folder in Path('/proc').glob('[0-9]*'):
        try:
            parent = int((folder / 'stat').read_text().rpartition(')')[2].split()[1])
            if parent == pid and b'train.py' in (folder / 'cmdline').read_bytes():
                found.append(int(folder.name))
        except OSError:
            continue
    return found


def test_two_processes_survive_the_loss_of_one_and_match_a_single_process(tiny_prepared, tmp_path):
    """1 x 4 and 2 x 2 samples per step yield the same loss up to rounding, although batch norms and some losses mix
    samples and although one process is killed after the first step and torchrun restarts both."""
    out, whole = tmp_path / 'two', tmp_path / 'one'
    command = [
        sys.executable,
        '-m',
        'torch.distributed.run',
        '--standalone',
        '--nproc_per_node',
        '2',
        '--max-restarts',
        '1',
        'train.py',
        *arguments(tiny_prepared, out, *RESNET, 'TRAIN.SAVE_EVERY', '1', 'TRAIN.PICTURES', '0'),
    ]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    deadline = time.time() + 120
    while not (out / 'latest.pth').exists() and process.poll() is None and time.time() < deadline:
        time.sleep(0.02)
    workers = children(process.pid)
    assert len(workers) == 2
    os.kill(workers[1], signal.SIGKILL)
    output = process.communicate(timeout=600)[0]
    assert process.returncode == 0, output[-2000:]
    assert content(out / 'latest.pth')['progress']['epoch'] == 2
    assert len(lines(out, 'val_stage1')) == 2
    assert run(tiny_prepared, whole, *RESNET, 'TRAIN.PICTURES', '0') == 0
    ours, alone = lines(out, 'train'), lines(whole, 'train')
    assert [line['step'] for line in ours] == [1, 2, 3, 4]
    for one, other in zip(ours, alone):
        for name in one.keys() - {'kind', 'samples_per_second', 'waiting_for_data'}:
            assert one[name] == pytest.approx(other[name], rel=2e-3, abs=1e-4), (one['step'], name)
    # Rounding grows from step to step through the optimizer; the first step is free of it.
    assert ours[0]['total'] == pytest.approx(alone[0]['total'], rel=1e-5)
    assert ours[1]['total'] == pytest.approx(alone[1]['total'], rel=1e-4)


AVERAGED = ['TRAIN.EMA', '0.5', 'TRAIN.ACCUMULATE', '2', 'TRAIN.PICTURES', '1', 'TRAIN.VALIDATE_EVERY', '2']


def test_moving_average_is_the_best_and_resumes_exactly(tiny_prepared, tmp_path, monkeypatch):
    """Combined with accumulation; the test tracks the average step by step."""
    real_step, weights = train.train_step, []

    def step(run, *args, **options):
        terms = real_step(run, *args, **options)
        weights.append({name: value.detach().clone() for name, value in run.trainer.model.named_parameters()})
        return terms

    with monkeypatch.context() as patch:
        patch.setattr(train, 'train_step', step)
        assert run(tiny_prepared, tmp_path / 'whole', *AVERAGED) == 0
    best, latest = (content(tmp_path / 'whole' / name) for name in ('best.pth', 'latest.pth'))
    assert not torch.equal(latest['model']['dense_heads.dense.3.weight'], best['model']['dense_heads.dense.3.weight'])
    for name in weights[0]:
        average = weights[0][name]
        for later in weights[1:]:
            average = 0.5 * average + 0.5 * later[name]
        torch.testing.assert_close(best['model'][name], average, atol=1e-6, rtol=1e-5)

    model, cfg, _ = load_model(tmp_path / 'whole', [])  # pictures show the average, too
    batch_maker = train.build_batch_maker(cfg, model.hands)
    draw_samples(model, evaluation_split(cfg, 'val'), [0], batch_maker, path=tmp_path / 'again.jpg')
    drawn = (tmp_path / 'whole' / 'pictures' / 'epoch_002.jpg').read_bytes()
    assert drawn == (tmp_path / 'again.jpg').read_bytes()

    assert run_until_ctrl_c(monkeypatch, tiny_prepared, tmp_path / 'stopped', *AVERAGED) == 130
    assert run(tiny_prepared, tmp_path / 'stopped', *AVERAGED, '--resume') == 0
    again = content(tmp_path / 'stopped' / 'latest.pth')
    for kind in ('model', 'average'):
        assert all(torch.equal(latest[kind][key], again[kind][key]) for key in latest[kind])


def one_step(data: Path, *words: str, evaluation_mode: bool = False) -> tuple[dict, dict]:
    """Loss terms and gradients of a step with learning rate 0."""
    words = [*DEMO[2:], 'DATASET.PATH', str(data), 'TRAIN.WEIGHT_DECAY', '0', *words]
    training = train.build_training(train.load_config('configs/demo.yaml', words), torch.device('cpu'))
    training.trainer.model.train(not evaluation_mode)
    terms = train.train_step(training, next(iter(training.loader)), number=0, rate=0.0).terms
    return terms, {
        name: value.grad for name, value in training.trainer.model.named_parameters() if value.grad is not None
    }


def test_accumulated_parts_give_the_gradients_of_the_whole(tiny_prepared):
    """With batch norms in evaluation mode and no loss over all pixels, nothing mixes samples."""
    apart = ['LOSS.WEIGHT.SEGMENTATION', '0', 'LOSS.WEIGHT.LOVASZ', '0', 'TRAIN.CLIP_NORM', '0']
    terms, grads = one_step(tiny_prepared, *apart, evaluation_mode=True)
    of_parts, grads_of_parts = one_step(tiny_prepared, *apart, 'TRAIN.ACCUMULATE', '2', evaluation_mode=True)
    assert terms == pytest.approx(of_parts, rel=1e-4)
    for name, whole in grads.items():
        torch.testing.assert_close(grads_of_parts[name], whole, rtol=1e-3, atol=1e-5)


def test_training_without_dense_loss_keeps_the_other_terms(tiny_prepared):
    terms, _ = one_step(tiny_prepared, 'LOSS.WEIGHT.DENSE', '0')
    assert 'dense' not in terms and {'segmentation', 'lovasz'} <= terms.keys()


def test_bfloat16_changes_the_loss_by_little(tiny_prepared):
    terms, grads = one_step(tiny_prepared)
    low, low_grads = one_step(tiny_prepared, 'TRAIN.PRECISION', 'bfloat16')
    assert low != terms and sum(low.values()) == pytest.approx(sum(terms.values()), rel=0.03)
    assert low_grads.keys() == grads.keys()
    assert all(grad.dtype == torch.float32 and grad.isfinite().all() for grad in low_grads.values())


def test_compiled_training_takes_the_same_step(tiny_prepared, monkeypatch):
    """Tracing only: code generation would take minutes."""
    real, asked = torch.compile, []

    def traced(module):
        asked.append(module)
        return real(module, backend='eager')

    monkeypatch.setattr(torch, 'compile', traced)
    terms, grads = one_step(tiny_prepared, *RESNET, 'TRAIN.COMPILE', 'true')
    plain, plain_grads = one_step(tiny_prepared, *RESNET)
    assert len(asked) == 1 and terms == pytest.approx(plain, rel=1e-4)
    for name, grad in grads.items():
        torch.testing.assert_close(grad, plain_grads[name], rtol=1e-2, atol=1e-4)


def test_a_missing_compiler_is_named(tiny_prepared, tmp_path, monkeypatch, capsys):
    """Only g++ is tried, so another compiler does not help unless CXX names it."""
    other = tmp_path / 'clang++'
    other.write_text('')
    other.chmod(0o755)
    monkeypatch.setenv('PATH', str(tmp_path))
    monkeypatch.delenv('CXX', raising=False)
    assert run(tiny_prepared, tmp_path / 'out', 'TRAIN.COMPILE', 'true') == 2
    assert 'g++ was not found' in capsys.readouterr().err
    monkeypatch.setenv('CXX', 'nowhere -O3')
    assert run(tiny_prepared, tmp_path / 'other', 'TRAIN.COMPILE', 'true') == 2
    assert 'nowhere -O3 was not found' in capsys.readouterr().err


@pytest.mark.parametrize('resume', [[], ['--resume'], ['--resume', 'auto']])
def test_the_result_of_a_finished_run_is_never_overwritten(tiny_prepared, tmp_path, capsys, resume):
    """latest.pth, with the optimizer's state, is large: people delete it."""
    out = tmp_path / 'out'
    out.mkdir()
    for name in ('best.pth', 'log.jsonl'):
        (out / name).write_text('kept')
    assert run(tiny_prepared, out, *resume) == 2
    message = capsys.readouterr().err
    assert f'{out} holds the best.pth of a run, but no latest.pth' in message and 'Traceback' not in message
    assert {path.name: path.read_text() for path in out.iterdir() if path.name in ('best.pth', 'log.jsonl')} == {
        'best.pth': 'kept',
        'log.jsonl': 'kept',
    }
