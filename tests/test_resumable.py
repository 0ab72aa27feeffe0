"""Folders that grow: one owner, a journal that shows what is missing, nothing lost at stops, kills and full disks."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import pytest
import writer_kills
from owners import on_a_full_disk, owned_elsewhere
from raw_tree import make_raw_tree
from writer_kills import contents

from apps import report, run_demo
from dataset.hand_model_record import claim_hand_model_record, recorded_hand_model
from dataset.prepare import resumable
from dataset.prepare.resumable import Journal, growing
from dataset.prepare.skips import Skipped, finish
from dataset.prepare.workers import ordered_map, worker_pool
from dataset.prepared import FOLDERS
from evaluation.session import owned_output, write_evaluation
from utils.errors import UserError
from utils.ownership import owned
from utils.stopping import Stopped, obey_stop_signals

ROOT = Path(__file__).resolve().parents[1]


# ---------------------------------------------------------------------------------------------------------------------
# Journal
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def journal(tmp_path) -> Path:
    """A journal of four chunks."""
    path = tmp_path / 'x.partial' / 'journal.jsonl'
    with Journal(path) as journal:
        journal.begin({'seed': 3})
        for number in range(4):
            journal.note({'next': 10 * number})
    return path


CHUNKS = [{'next': 10 * number} for number in range(4)]


def test_a_journal_reads_back(journal):
    found = Journal(journal)
    assert found.header == {'seed': 3} and found.chunks == CHUNKS
    with found:
        found.note({'next': 40})
    assert Journal(journal).chunks == [*CHUNKS, {'next': 40}]


def test_repeated_lines_are_harmless_and_others_are_seen(journal):
    header, *lines = journal.read_bytes().splitlines(keepends=True)
    other = json.loads(lines[1]) | {'next': 11}
    del other['crc']
    for found, problem in (
        ([*lines, lines[3], lines[1]], None),
        ([lines[0], lines[0], *lines[1:]], None),
        ([lines[0], lines[2], lines[3]], 'line 3 records chunk 2, but chunk 1 comes next'),
        ([lines[1], lines[0]], 'line 2 records chunk 1, but chunk 0 comes next'),
        ([*lines, resumable._encode(other)], 'line 6 records chunk 1 again, with other content'),
        ([lines[0], b'{"chunk": 1, "next": 10}\n', lines[2]], 'line 3 is damaged'),
    ):
        journal.write_bytes(b''.join([header, *found]))
        if problem is None:
            assert Journal(journal).chunks == CHUNKS
        else:
            with pytest.raises(UserError, match=f'journal.jsonl: {problem}. Remove .*x.partial and rerun'):
                Journal(journal)


def test_a_truncated_journal_is_the_beginning_of_itself(journal):
    content = journal.read_bytes()
    for length in range(len(content)):
        journal.write_bytes(content[:length])
        found = Journal(journal)
        assert found.chunks == CHUNKS[: len(found.chunks)] and journal.stat().st_size == length
        if found.header is not None:
            with found:
                found.note(CHUNKS[len(found.chunks)])
            assert Journal(journal).chunks == found.chunks


def test_no_flipped_bit_changes_the_content_of_a_journal(journal):
    content = journal.read_bytes()
    for place in range(len(content)):
        for bit in (0, 3, 6):
            journal.write_bytes(content[:place] + bytes([content[place] ^ 1 << bit]) + content[place + 1 :])
            try:
                found = Journal(journal)
            except UserError:
                continue
            assert found.header in (None, {'seed': 3}) and found.chunks == CHUNKS[: len(found.chunks)]


@pytest.mark.parametrize('line', ['{"format": 1, "chunk": 32}', '{"journal": 1, "header": {}}', '[]'])
def test_a_journal_of_another_version_is_refused(journal, line):
    journal.write_text(f'{line}\n{{"next": 3, "skipped": []}}\n')
    with pytest.raises(UserError, match='another version|line 1 is damaged'):
        Journal(journal)


def test_a_chunk_is_recorded_only_once_it_is_on_the_disk(journal, monkeypatch):
    before = journal.read_bytes()

    def fail(folder):
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(resumable, 'sync_file_system', fail)
    message = r'/x could not be completed: No space left on device\. Finished work is kept'
    with pytest.raises(UserError, match=message), growing(journal.parent.with_name('x')), Journal(journal) as found:
        found.note({'next': 40})
    assert journal.read_bytes() == before


def test_waiting_for_the_disk_takes_a_small_share_of_the_time(journal, monkeypatch):
    now = waited = 0.0

    def wait_for_the_disk(folder):
        nonlocal now, waited
        now, waited = now + 0.5, waited + 0.5

    monkeypatch.setattr(resumable, 'sync_file_system', wait_for_the_disk)
    monkeypatch.setattr(resumable, 'time', SimpleNamespace(monotonic=lambda: now))
    with Journal(journal) as found:
        sizes = set()
        for number in range(1000):  # of 0.1 s each
            found.note({'next': number})
            sizes.add(journal.stat().st_size)
            now += 0.1
        assert 0.5 * resumable.SYNC_SHARE < waited / now <= 1.1 * resumable.SYNC_SHARE
        assert len(sizes) == waited / 0.5
    assert journal.stat().st_size > max(sizes)  # the last chunks are there, too
    assert len(Journal(journal).chunks) == len(CHUNKS) + 1000


# ---------------------------------------------------------------------------------------------------------------------
# Nothing incomplete is published
# ---------------------------------------------------------------------------------------------------------------------


def test_a_split_is_published_only_if_every_frame_is_accounted_for(tmp_path):
    partial = tmp_path / 'train.partial'
    for name, suffix in FOLDERS.items():
        (partial / name).mkdir(parents=True)
        for number in range(4):
            (partial / name / f'{number}.{suffix}').write_bytes(b'')
    with pytest.raises(UserError, match='3 frames kept and 0 skipped are not the 4 that were selected. Nothing was'):
        finish(tmp_path / 'train', {}, 3, 4, Skipped())
    (partial / 'dense' / '2.jpg').unlink()
    with pytest.raises(UserError, match=r'dense lacks 1 of 3 files, such as 2\.jpg\. Nothing was published'):
        finish(tmp_path / 'train', {}, 3, 3, Skipped())
    assert not (tmp_path / 'train').exists()
    (partial / '.preparation.json.0123456789abcdef.partial').write_bytes(b'of a killed run')
    finish(tmp_path / 'train', {}, 2, 2, Skipped())
    assert {path.name for path in (tmp_path / 'train').iterdir()} == {*FOLDERS, 'preparation.json'}
    assert all(len(os.listdir(tmp_path / 'train' / name)) == 2 for name in FOLDERS)


def test_files_of_two_evaluations_never_stand_beside_each_other(tmp_path, monkeypatch):
    old = {'metrics.json': b'old', 'per_sample.csv': b'old', 'samples.npz': b'old'}
    write_evaluation(tmp_path, old)
    assert {name: (tmp_path / name).read_bytes() for name in old} == old
    replace, left = os.replace, []

    def interrupted(source, target):
        if not left:
            raise KeyboardInterrupt
        replace(left.pop() and source, target)

    monkeypatch.setattr(os, 'replace', interrupted)
    for moves in (0, 1):
        left[:] = [True] * moves
        with pytest.raises(KeyboardInterrupt):
            write_evaluation(tmp_path, dict.fromkeys(old, b'new'))
        assert not (tmp_path / 'metrics.json').exists() and not list(tmp_path.glob('.*'))
    monkeypatch.undo()
    write_evaluation(tmp_path, {'metrics.json': b'new', 'per_sample.csv': b'new', 'samples.npz': None})
    assert {path.name for path in tmp_path.iterdir()} == {'metrics.json', 'per_sample.csv'}


# ---------------------------------------------------------------------------------------------------------------------
# Owners
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope='module')
def root(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp('writers')


@pytest.fixture(scope='module')
def writers(root):
    with pytest.MonkeyPatch.context() as patch:
        for module in (writer_kills.split, writer_kills.pack):
            patch.setattr(module, 'CHUNK', 2)
        patch.setitem(writer_kills.recordings.BATCH_TIME_STEPS, 'cpu', 2)
        yield writer_kills.writers(root)


FIT = 'annotations/train/InterHand2.6M_train_MANO_NeuralAnnot.json'
OWNED = {
    'prepare': 'out/train',
    'shard': 'out/train.shard-2-of-3',
    'merge': 'out/train',
    'pack': 'out/train',
    'synthesize': 'out',
    'fit': FIT,
}


@pytest.mark.parametrize('name', OWNED)
def test_a_second_writer_is_refused_with_the_first_ones_host_and_process(writers, root, tmp_path, name, capsys):
    writer = writers[name]
    trial = shutil.copytree(root / (writer.given or 'empty'), tmp_path / 'trial')
    before = contents(trial)
    with owned_elsewhere(trial / OWNED[name]) as pid:
        assert writer.main([word.format(trial) for word in writer.arguments]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith('error: ')]
    assert len(errors) == 1 and f'{OWNED[name]} is in use by process {pid} on {socket.gethostname()} since' in errors[0]
    after = contents(trial)
    assert {key: after[key] for key in before} == before
    assert set(after) - set(before) <= {'out/hand_model.json'}


def test_a_merge_is_refused_while_a_shard_is_written(writers, root, tmp_path, capsys):
    trial = shutil.copytree(root / 'shards', tmp_path / 'trial')
    shard = trial / 'out' / 'train.shard-2-of-3'
    shard.rename(shard.with_name(f'{shard.name}.partial'))
    with owned_elsewhere(shard) as pid:
        assert writers['merge'].main([word.format(trial) for word in writers['merge'].arguments]) == 2
    assert f'train.shard-2-of-3 is in use by process {pid} on' in capsys.readouterr().err


def test_shards_of_one_split_are_written_at_the_same_time(writers, root, tmp_path):
    with owned_elsewhere(tmp_path / 'out' / 'train.shard-1-of-3'), owned_elsewhere(tmp_path / 'out' / 'val'):
        assert writers['shard'].main([word.format(tmp_path) for word in writers['shard'].arguments]) == 0


def test_evaluation_report_and_demo_own_their_output(tmp_path, capsys):
    with owned_elsewhere(tmp_path / 'eval') as pid, pytest.raises(UserError, match=f'process {pid} on'):
        owned_output(str(tmp_path / 'eval')).__enter__()
    for main, out in ((report.main, 'page.html'), (run_demo.main, 'demo')):
        with owned_elsewhere(tmp_path / out) as pid:
            assert main([*(['run'] if main is report.main else []), '--out', str(tmp_path / out)]) == 2
        assert f'{out} is in use by process {pid} on' in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


def test_packing_names_splits_that_are_not_finished(writers, root, tmp_path, capsys):
    shutil.copytree(root / 'prepared', tmp_path / 'data')
    (tmp_path / 'data' / 'val.partial').mkdir()
    arguments = ['--data_path', str(tmp_path / 'data'), '--save_path', str(tmp_path / 'out')]
    assert writers['pack'].main(arguments) == 2
    assert 'val is only partly prepared' in capsys.readouterr().err
    (tmp_path / 'data' / 'val.partial').rename(tmp_path / 'data' / 'val.shard-1-of-2')
    assert writers['pack'].main(arguments) == 2
    assert 'val is prepared in shards' in capsys.readouterr().err and not (tmp_path / 'out').exists()


def test_packing_refuses_a_source_that_lost_samples_or_changed_meanwhile(writers, root, tmp_path, monkeypatch, capsys):
    data = shutil.copytree(root / 'prepared', tmp_path / 'data')
    record = data / 'train' / 'preparation.json'
    record.write_text('{"kept": 13}')
    arguments = ['--data_path', str(data), '--save_path', str(tmp_path / 'out'), '--workers', '1']
    assert writers['pack'].main(arguments) == 2
    assert 'holds 12 samples, but preparation.json records 13' in capsys.readouterr().err
    record.write_text('{"kept": 12}')
    with monkeypatch.context() as patch:
        patch.setattr(writer_kills.pack, '_finish', lambda *_: None)
        assert writers['pack'].main(arguments) == 0
    record.write_text('{"kept": 12, "settings": {}}')  # prepared again
    assert writers['pack'].main(arguments) == 2
    assert 'train.partial was created with other settings (source was' in capsys.readouterr().err


def test_processes_that_begin_together_agree_on_the_hand_model(tmp_path):
    claim_hand_model_record(tmp_path, 'standin:1:2')
    (tmp_path / '.hand_model.json.0123456789abcdef.partial').write_bytes(b'of a killed process')
    claim_hand_model_record(tmp_path, 'standin:1:2')
    with pytest.raises(UserError, match='holds data of the hand model standin:1:2, but this data is of mano:3:4'):
        claim_hand_model_record(tmp_path, 'mano:3:4')
    claim_hand_model_record(tmp_path, 'mano:3:4', replace=True)
    assert [path.name for path in tmp_path.iterdir()] == ['hand_model.json']
    assert recorded_hand_model(tmp_path) == 'mano:3:4'


# ---------------------------------------------------------------------------------------------------------------------
# Full disks, kills and stops
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope='module')
def whole(writers, root):
    """Name of a writer -> the files of an uninterrupted run."""
    known: dict[str, dict[str, bytes]] = {}

    def run(name: str) -> dict[str, bytes]:
        if name not in known:
            writer_kills.kill(writers[name], root, root / f'{name}-whole', [])
            known[name] = contents(root / f'{name}-whole')
        return known[name]

    return run


LARGEST = {'prepare': 6000, 'shard': 6000, 'merge': 1200, 'pack': 60_000, 'fit': 3000}  # bytes: below a file's size


@pytest.mark.parametrize(
    'name', [pytest.param(name, marks=pytest.mark.slow if name == 'fit' else ()) for name in LARGEST]
)
def test_a_full_disk_is_one_sentence_and_the_same_command_continues(writers, root, whole, tmp_path, name):
    writer = writers[name]
    trial = shutil.copytree(root / (writer.given or 'empty'), tmp_path / name)
    arguments = [word.format(trial) for word in writer.arguments]
    code, text = on_a_full_disk(writer.main, arguments, largest=LARGEST[name])
    errors = [line for line in text.splitlines() if 'it/s' not in line and line.startswith('error: ')]
    assert code == 2 and len(errors) == 1 and 'File too large' in errors[0] and 'Traceback' not in text
    assert writer.main(arguments) == 0
    assert contents(trial) == whole(name)


@pytest.mark.slow  # starts a process per trial
@pytest.mark.parametrize('name', [name for name in OWNED if name != 'synthesize'])
def test_killed_writers_finish_with_the_bytes_of_an_uninterrupted_run(writers, root, whole, tmp_path, name):
    begin = time.monotonic()
    expected = whole(name)
    seconds = time.monotonic() - begin
    writer_kills.kill(writers[name], root, tmp_path / 'trial', [0.4 * seconds, 0.7 * seconds])
    assert contents(tmp_path / 'trial') == expected


COMMANDS = {
    'prepare': ['dataset/interhand.py', '--data_path', '{root}/raw', '--save_path', '{out}'],
    'synthesize': ['dataset/synthesize.py', '--save_path', '{out}/raw', '--frames', '60', '0', '0'],
}


def start(name: str, root: Path, out: Path) -> subprocess.Popen:
    """Start a command with two workers, the leader of its own process group."""
    words = [word.format(root=root, out=out) for word in COMMANDS[name]]
    return subprocess.Popen(
        [sys.executable, *words, '--workers', '2', 'MANO.SOURCE', 'standin'],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def wait_until(condition: Callable[[], bool], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.05)
    return condition()


@pytest.mark.slow  # starts processes that import torch
@pytest.mark.parametrize('name, number', [('prepare', signal.SIGTERM), ('synthesize', signal.SIGHUP)])
def test_a_signal_to_the_whole_group_stops_at_the_next_chunk(root, tmp_path, name, number):
    if name == 'prepare':
        make_raw_tree(tmp_path / 'raw', steps=160)
    out = tmp_path / 'out'
    process = start(name, tmp_path, out)
    assert wait_until(lambda: any(path.read_bytes().count(b'\n') > 1 for path in out.glob('*/journal.jsonl')), 120)
    os.killpg(process.pid, number)
    text = process.communicate(timeout=60)[1]
    assert process.returncode == 128 + number and 'Traceback' not in text and 'warn' not in text
    assert f'Stopped by {number.name}. Finished work is kept; rerun the same command to continue.' in text
    assert wait_until(lambda: not lives(process.pid), 60)
    assert list(out.glob('*.partial/journal.jsonl')) and not list(out.glob('.*.lock'))


@pytest.mark.slow  # starts processes that import torch
def test_a_killed_worker_is_one_sentence():
    message = 'A worker process was killed.*Use fewer than --workers 2.*rerun the same'
    with pytest.raises(UserError, match=message), worker_pool(2) as pool:
        list(ordered_map(pool, os._exit, [1, 1], 4))


def test_the_demo_passes_a_stop_signal_on_to_its_step():
    begin = time.monotonic()
    with obey_stop_signals(), pytest.raises(Stopped, match='Stopped by SIGUSR1'):
        threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGUSR1)).start()
        run_demo.run_command('sleep', ['-c', 'import time; time.sleep(60)'])
    assert time.monotonic() - begin < 50


@pytest.mark.slow  # starts processes that import torch
def test_workers_end_with_a_parent_that_is_killed(root, writers, tmp_path):
    process = start('synthesize', root, tmp_path)
    assert wait_until(lambda: lives(process.pid) == 4, 60)  # two workers, and multiprocessing's resource tracker
    process.kill()
    process.wait()
    assert wait_until(lambda: not lives(process.pid), 60)  # they are importing torch, and notice at the end of that


def lives(group: int) -> int:
    """Number of running processes of a group, without zombies, which nobody may collect in a container."""
    found = 0
    for stat in Path('/proc').glob('[0-9]*/stat'):
        with suppress(OSError):
            state, _, number = stat.read_text().rpartition(')')[2].split()[:3]
            found += int(number) == group and state != 'Z'
    return found


def test_ownership_ends_with_its_process(tmp_path):
    with owned_elsewhere(tmp_path / 'x') as pid:
        os.kill(pid, signal.SIGKILL)
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            try:
                with owned(tmp_path / 'x'):
                    return
            except UserError:
                time.sleep(0.01)
        raise AssertionError
