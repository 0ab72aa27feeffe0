"""The benchmark scripts on tiny networks and data; their figures are not judged here."""

import json
import shutil
import signal

import numpy as np
import pytest
import torch
from raw_tree import make_raw_tree
from tiny import TINY, tiny_config, tiny_model

from benchmarks import boxes, detection, run, scaling, video
from dataset.synthetic.synthesize import Settings, synthesize
from inference import Reconstructor, tracking
from manopth import TwoHandLayer
from models.checkpoint import save_checkpoint
from utils.errors import UserError
from utils.geometry import project
from utils.stopping import Stopped

SMALL = [*TINY, 'MODEL.STAGES', '1', 'TRAIN.BATCH_SIZE', '4', 'DEVICE', 'cpu']


def test_measurements_are_written_with_the_machine_and_ratios(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(run, 'SYNTHETIC_FRAMES', 10)
    monkeypatch.setattr(run, 'PACKED_SAMPLES', 1000)
    monkeypatch.setattr(run, 'WITH_BOTH_ALLOCATORS', ())
    monkeypatch.setattr(run, 'inference_forms', lambda model, *_: {'DIR, eager': model})  # exports are tested elsewhere
    names = ['forward', 'projection', 'throughput', 'loader', 'opening', 'augmentation', 'waiting', 'preparation']
    (tmp_path / 'small.yaml').write_text('MODEL:\n  STAGES: 1\nTRAIN:\n  BATCH_SIZE: 4\n')
    options = [
        '--cfg',
        str(tmp_path / 'small.yaml'),
        '--batch',
        '2',
        '--repeats',
        '1',
        '--busy',
        '--out',
        str(tmp_path),
    ]
    assert run.main(['--only', *names, *options, *TINY, 'DEVICE', 'cpu']) == 0
    content = json.loads((tmp_path / 'benchmark.json').read_text())
    assert content['machine']['torch'] and content['machine']['cores'] >= 1
    assert len(content['tables']) == len(names)
    for table in content['tables']:
        for row in table['rows']:
            assert row['value'] >= 0 and (row['ratio'] is None) == (table['yardstick'] is None)
            assert row['low'] is None or row['low'] <= row['value'] <= row['high']
    forward = content['tables'][0]
    assert forward['rows'][0]['what'] == forward['yardstick'] == 'ResNet-50' and forward['rows'][0]['ratio'] == 1
    text = (tmp_path / 'benchmark.md').read_text()
    assert all(table['title'] in text for table in content['tables'])
    rows = {row['what'] for table in content['tables'] for row in table['rows']}
    assert {
        'training, batch 2, float32',
        'packed, targets drawn: one JPEG',
        "targets drawn, of the image's size",
    } <= rows
    (speed,) = scaling.measured_speeds(tmp_path / 'benchmark.json')
    assert speed.name == 'float32' and list(speed.seconds) == [2] and speed.step(2) > 0


def counters(proc, *, busy: float, own: float, other: float) -> None:
    """Write Linux's counters, in seconds: of all cores, of a process of this group, and of one of another."""
    ticks, group = run.os.sysconf('SC_CLK_TCK'), run.os.getpgrp()
    (proc / 'stat').write_text(f'cpu  {round(busy * ticks)} 0 0 99999 5 0 0 0 0 0\ncpu0 1 1 1 1 1 1 1\n')
    for pid, owner, seconds in ((7, group, own), (8, group + 1, other)):
        (proc / str(pid)).mkdir(exist_ok=True)
        times = f'{round(seconds * ticks)} 0 0 0'
        (proc / str(pid) / 'stat').write_text(f'{pid} (a (b) c) R 1 {owner} 1 0 -1 0 0 0 0 0 {times} 20 0 1\n')


def test_other_processes_are_those_outside_this_group(tmp_path, monkeypatch):
    now = 100.0
    monkeypatch.setattr(run.time, 'monotonic', lambda: now)
    counters(tmp_path, busy=50, own=20, other=30)
    others = run.OtherProcesses(str(tmp_path))
    counters(tmp_path, busy=57, own=24, other=33)
    now = 104.0
    assert others.cores() == pytest.approx(3 / 4)
    assert others.cores() == 0  # nothing since
    assert run.OtherProcesses(str(tmp_path / 'nowhere')).cores() is None


@pytest.mark.slow  # starts a process that imports torch
def test_a_table_is_measured_again_with_the_default_allocator(tmp_path):
    setting = run.Setting(torch.device('cpu'), [], SMALL, 1, 1, False, tmp_path)
    table = run.projection(setting)
    again = run.with_default_allocator(table, 'projection', setting)
    assert [row.what for row in again.rows] == [row.what for row in table.rows]
    assert all(row.default > 0 and row.default_ratio > 0 and row.value > 0 for row in again.rows)


def test_processes_of_a_measurement_share_its_allocator(tmp_path):
    setting = run.Setting(torch.device('cpu'), [], SMALL, 1, 1, False, tmp_path)
    assert '--default-allocator' not in setting.words()
    assert '--default-allocator' in setting._replace(default_allocator=True).words()


def test_a_measurement_in_a_process_fails_in_one_sentence(tmp_path):
    with pytest.raises(UserError, match=r'failed \(exit code 2: nowhere\S* does not exist'):
        run.measured_apart(['--benchmark', 'nowhere.json'], script=run.ROOT / 'benchmarks/scaling.py')


def test_tables_are_written_one_by_one(tmp_path, monkeypatch, capsys):
    """What was measured before a mistake or a stop signal is kept."""

    def stop(setting):
        raise Stopped(signal.SIGTERM)

    monkeypatch.setattr(run, 'MEASUREMENTS', {'first': run.projection, 'second': stop})
    words = ['--only', 'first', 'second', '--busy', '--default-allocator', '--repeats', '1', '--batch', '1']
    assert run.main([*words, '--out', str(tmp_path), *SMALL]) == 143
    assert f'The tables printed above are in {tmp_path}.' in capsys.readouterr().err
    assert len(json.loads((tmp_path / 'benchmark.json').read_text())['tables']) == 1


@pytest.mark.parametrize('cores', [None, 0.05, 0.7])
def test_a_busy_machine_is_refused(monkeypatch, cores):
    class Others:
        def cores(self):
            return cores

    monkeypatch.setattr(run, 'QUIET_S', 0.0)
    if cores != 0.7:
        run.refuse_busy_machine(Others())
    else:
        with pytest.raises(UserError, match=r'Other processes use 0\.7 of .* pass --busy'):
            run.refuse_busy_machine(Others())


def test_both_allocators_and_a_busy_machine_show_in_the_table():
    rows = [run.Row('a', 2.0, 'ms', 1.0, 3.0, 1.0, 4.0, 1.0), run.Row('peak', 5.0, 'GB')]
    text = run.as_markdown({}, [run.Table('T', 'a', rows, '**Busy**')])
    assert '| what | median | quartiles | unit | ratio to a | median, default allocator | ratio |' in text
    assert '| a | 2 | 1 – 3 | ms | 1.00 | 4 | 1.00 |' in text and '| peak | 5 |  | GB |  |  |  |' in text
    assert text.rstrip().endswith('**Busy**')


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['--only', 'nothing'], "'nothing' is not a measurement"),
        (['--repeats', '0'], '--repeats is 0'),
        (['--threads', '-1'], '--threads is -1'),
        (['--threads', '0'], '--threads is 0'),
    ],
)
def test_benchmark_mistakes(capsys, arguments, message):
    assert run.main(arguments) == 2
    assert message in capsys.readouterr().err


def test_one_device_only_computes_and_several_share_the_work():
    base = scaling.Run(scaling.Speed('', {1: 0.01}), samples=1000, epochs=3, batch=64)
    alone = scaling.cost(base, 1)
    assert alone.hours == pytest.approx(3000 / 100 / 3600) and alone.efficiency == 1
    fast = base._replace(bandwidth=1e15, latency=0.0)
    assert scaling.cost(fast, 8).hours == pytest.approx(alone.hours / 8)
    # A slow link shows: 2 * 7/8 of the parameters' bytes, less what two thirds of a step hide.
    slow = scaling.cost(base._replace(bandwidth=1e8, latency=0.0), 8)
    assert slow.step_ms == pytest.approx(1e3 * (0.08 + 2 * 7 / 8 * 4 * 90.4e6 / 1e8 - 0.08 * 2 / 3))
    assert scaling.cost(base, 8).device_hours > alone.device_hours


def test_a_small_share_takes_as_long_as_was_measured():
    speed = scaling.Speed('tf32', {8: 0.1, 64: 0.2, 128: 0.4})
    assert [speed.step(share) for share in (1, 8, 36, 64, 256)] == pytest.approx([0.1, 0.1, 0.15, 0.2, 0.8])
    free = scaling.Run(speed, bandwidth=1e15, latency=0.0)
    one, eight = (scaling.cost(free, devices) for devices in (1, 8))
    assert one.efficiency == 1 and eight.step_ms == pytest.approx(100) and eight.efficiency == pytest.approx(0.25)


def test_scaling_reads_the_fastest_precision_of_a_benchmark(tmp_path, capsys):
    rates = {
        'batch 64, float32': 300,
        'batch 64, tf32': 640,
        'batch 64, tf32, compiled': 500,
        'batch 128, float32': 800,
    }
    rows = [{'what': f'training, {name}', 'value': rate, 'unit': 'samples/s'} for name, rate in rates.items()]
    rows.append({'what': 'inference, batch 64, tf32', 'value': 9000, 'unit': 'samples/s'})
    (tmp_path / 'benchmark.json').write_text(json.dumps({'tables': [{'title': 'Throughput', 'rows': rows}]}))
    assert scaling.main(['--benchmark', str(tmp_path / 'benchmark.json'), '--devices', '1']) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == 'tf32, measured at batches of 64:' and '| 1 | 64 | 100 | 640 | 100% |' in lines[-1]


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        ([], 'Pass either --samples-per-second or --benchmark'),
        (['--samples-per-second', '9', '--benchmark', 'x'], 'Pass either'),
        (['--samples_per_second', '9', '--batch', '4', '--devices', '8'], 'cannot be distributed over 8'),
        (['--samples_per_second', '9', '--devices', '0'], 'must be above 0'),
        (['--samples_per_second', 'inf'], 'must be above 0 and finite'),
        (['--samples_per_second', '9', '--bandwidth', 'nan'], 'must be above 0 and finite'),
        (['--benchmark', 'nowhere.json'], 'nowhere.json does not exist'),
        (['--benchmark', '{empty}'], 'holds no training throughput'),
    ],
)
def test_scaling_mistakes(tmp_path, capsys, arguments, message):
    (tmp_path / 'empty.json').write_text('{"tables": []}')
    assert scaling.main([text.format(empty=tmp_path / 'empty.json') for text in arguments]) == 2
    assert message in capsys.readouterr().err


def test_scaling_table(capsys):
    assert scaling.main(['--samples_per_second', '1000', '--devices', '1', '8', '--batch', '512']) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 and lines[2].startswith('| 1 | 512 | 512 | 1,000 | 100% | 5.14 |')


# Boxes


@pytest.fixture(scope='module')
def checkpoint(standin, tmp_path_factory):
    path = tmp_path_factory.mktemp('model') / 'best.pth'
    save_checkpoint(path, model=tiny_model(standin), cfg=tiny_config(), hand_model=standin.identity)
    return path


def test_boxes_are_displaced_by_a_share_of_their_longer_side_and_scaled_about_their_centre():
    before = np.array([[10.0, 20, 40, 80], [0, 0, 30, 10]])
    after = np.array(boxes.changed(before, displacement=0.25, size=0.5, seed=1))
    assert after[:, 2:] == pytest.approx(before[:, 2:] / 2)
    moved = after[:, :2] + after[:, 2:] / 2 - before[:, :2] - before[:, 2:] / 2
    assert np.linalg.norm(moved, axis=1) == pytest.approx([20, 7.5])
    assert np.array(boxes.changed(before, displacement=0, size=1, seed=1)) == pytest.approx(before)


def test_true_hands_have_no_error_whatever_the_box(standin, tiny_prepared):
    truth = boxes.read_truth(str(tiny_prepared), 'test', 3, TwoHandLayer(standin))
    one, two = boxes.two_looks(
        Reconstructor(tiny_model(standin).eval()), truth, [tuple(b) for b in truth.boxes.tolist()]
    )
    for hands in (one, two):
        assert all(error.shape == (3,) and (error > 1).all() for error in boxes.errors(hands, truth))
        perfect = hands._replace(joints=truth.joints + 0.1, joints_px=truth.joints_px)  # elsewhere, but the same hands
        assert all(error.abs().max() < 1e-3 for error in boxes.errors(perfect, truth))


def test_the_table_of_boxes_has_a_row_for_each_displacement_and_size(tiny_prepared, checkpoint, capsys, monkeypatch):
    monkeypatch.setattr(boxes, 'DISPLACEMENTS', (0.0,))
    monkeypatch.setattr(boxes, 'SIZES', (0.7, 1.0))
    arguments = ['--data', str(tiny_prepared), '--model', str(checkpoint), '--device', 'cpu', '--samples']
    assert boxes.main([*arguments, '2']) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + 2 and len({line.count('|') for line in lines}) == 1
    assert (
        boxes.main([*arguments, '9']) == 2
        and 'has 5 samples of both hands; pass --samples 5' in capsys.readouterr().err
    )
    assert boxes.main([*arguments, '0']) == 2 and '--samples is 0' in capsys.readouterr().err
    assert boxes.main([*arguments, '2', '--seed', '-1']) == 2 and '--seed is -1' in capsys.readouterr().err


def test_boxes_of_other_hand_models_are_refused(tiny_prepared, checkpoint, tmp_path, capsys):
    """The true hands would be posed with the network's."""
    shutil.copytree(tiny_prepared, tmp_path / 'data')
    (tmp_path / 'data' / 'hand_model.json').write_text(json.dumps({'hand_model': 'another'}))
    assert boxes.main(['--data', str(tmp_path / 'data'), '--model', str(checkpoint), '--device', 'cpu']) == 2
    assert 'was generated with the hand model another' in capsys.readouterr().err


# Detection


class OneTwoNone:
    """In place of a detector: finds one hand in its first image, two in the second, none in the third, and so on."""

    def __init__(self, model):
        self.calls = 0

    def hands(self, image):
        self.calls += 1
        return [np.array([[20.0, 30], [90, 80]])] * (self.calls % 3)

    def close(self):
        pass


def test_samples_of_detection_are_the_interacting_frames_with_their_joints(tmp_path):
    make_raw_tree(tmp_path, steps=1)
    for sample in detection.read_samples(str(tmp_path), 'train', 2):
        assert sample.joints_px.shape == (2, 21, 2) and np.isfinite(sample.joints_px).all()
        larger = sample.enlarged(2, seed=1)
        left, top = (larger.intrinsics - sample.intrinsics)[:2, 2].astype(int)
        height, width = sample.image.shape[:2]
        assert larger.image.shape == (2 * height, 2 * width, 3)
        assert np.array_equal(larger.image[top : top + height, left : left + width], sample.image)
        assert np.allclose(larger.joints_px - sample.joints_px, (left, top))


@pytest.mark.slow  # loads a network and predicts a dozen times
def test_the_table_of_detection_has_a_row_for_each_number_of_hands(tmp_path, checkpoint, capsys, monkeypatch):
    make_raw_tree(tmp_path, steps=2)
    monkeypatch.setattr(detection, 'HandDetector', OneTwoNone)
    arguments = ['--raw', str(tmp_path), '--split', 'train', '--model', str(checkpoint), '--device', 'cpu', '--samples']
    assert detection.main([*arguments, '3', '--enlarge', '1.5']) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + 3 and len({line.count('|') for line in lines}) == 1
    counts = [line.split('|')[1:4] for line in lines[2:]]
    assert counts == [[' 1.5 ', f' {hands} ', ' 1 '] for hands in range(3)]
    assert detection.main([*arguments, '9']) == 2 and 'has 4 images of two hands' in capsys.readouterr().err
    assert detection.main([*arguments, '0']) == 2 and '--samples is 0' in capsys.readouterr().err
    assert detection.main([*arguments, '1', '--enlarge', '0.5']) == 2
    assert '--enlarge must be between 1 and 16' in capsys.readouterr().err


# Video


def test_steady_motion_has_no_jitter_and_noise_has_its_own_size():
    times = torch.arange(60, dtype=torch.float64) / 30
    line = times[:, None, None] * torch.ones(60, 21, 3)
    assert video.jitter(line, times) < 1e-6
    noise = 0.01 * torch.randn(60, 21, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    weights = np.exp(-0.5 * (np.arange(-30, 31) / (30 * video.AVERAGED)) ** 2)
    weights /= weights.sum()
    kept = (1 - 2 * weights.max() + np.square(weights).sum()) ** 0.5  # of white noise, less its average over time
    assert float(video.jitter(line + noise, times)) == pytest.approx(kept * 0.01 * 3**0.5, rel=0.05)


def test_acceleration_is_that_of_a_parabola_at_uneven_times():
    times = torch.tensor([0, 0.03, 0.1, 0.12, 0.2], dtype=torch.float64)
    found = video.acceleration((times.square() * 4 + times)[:, None], times)
    assert torch.allclose(found, torch.full((3, 1), 8.0, dtype=torch.float64))


@pytest.mark.slow  # renders a clip and runs a network over it several times
def test_a_clip_is_read_predicted_and_measured(tmp_path, standin, monkeypatch, capsys, checkpoint):
    settings = Settings((0, 0, 17), 3, 60.0, 'standin', 'misc/mano', clip=17)
    synthesize(tmp_path / 'clips', settings, workers=1)
    (clip,) = video.read_clips(str(tmp_path / 'clips'), 'test', 1)
    assert len(clip.frames) == 17 and clip.frames[3].time_s == pytest.approx(0.1)
    pixels = project(clip.joints, torch.from_numpy(clip.intrinsics))
    assert (pixels > -200).all() and (pixels < 700).all()
    hands = video.predict(Reconstructor(tiny_model(standin).eval()), clip, track=False)
    true = [each._replace(hands=each.hands._replace(joints=clip.joints[number])) for number, each in enumerate(hands)]
    figures = video.measure(clip, true)
    assert figures.joint_mm == (0, 0) and figures.acceleration == (0, 0) and figures.frames_without_hands == 0
    assert video.measure(clip, hands).joint_mm[0] > 1
    with pytest.raises(UserError, match='found in 0 of 17 frames only'):
        video.measure(clip, [each._replace(hands=None) for each in hands])
    monkeypatch.setattr(tracking, 'KEPT', 0.0)  # an untrained network's boxes agree with nothing
    monkeypatch.setattr(tracking, 'NEAR', 0.0)
    arguments = ['--data', str(tmp_path / 'clips'), '--model', str(checkpoint), '--device', 'cpu']
    assert video.main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + 5 and len({line.count('|') for line in lines}) == 1
    assert video.main([*arguments, '--every', '9']) == 2 and 'is not a clip' in capsys.readouterr().err
    assert video.main([*arguments, '--every', '0']) == 2 and '--every is 0' in capsys.readouterr().err
