"""The benchmark scripts on tiny networks and data; their figures are not judged here."""

import json

import pytest
from tiny import TINY

from benchmarks import run, scaling

SMALL = [*TINY, 'MODEL.STAGES', '1', 'TRAIN.BATCH_SIZE', '4', 'DEVICE', 'cpu']


def test_measurements_are_written_with_the_machine_and_ratios(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(run, 'SYNTHETIC_FRAMES', 10)
    monkeypatch.setattr(run, 'PACKED_SAMPLES', 1000)
    monkeypatch.setattr(run, 'inference_forms', lambda model, *_: {'DIR, eager': model})  # exports are tested elsewhere
    names = ['forward', 'projection', 'throughput', 'loader', 'opening', 'augmentation', 'waiting', 'preparation']
    assert run.main(['--only', *names, '--batch', '2', '--repeats', '1', '--out', str(tmp_path), *SMALL]) == 0
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
    assert {'training, batch 2, float32', 'packed, targets drawn: one JPEG', 'targets drawn'} <= rows
    assert scaling.measured_rate(tmp_path / 'benchmark.json') > 0


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [(['--only', 'nothing'], "'nothing' is not a measurement"), (['--repeats', '0'], '--repeats is 0')],
)
def test_benchmark_mistakes(capsys, arguments, message):
    assert run.main(arguments) == 2
    assert message in capsys.readouterr().err


def test_one_device_only_computes_and_several_share_the_work():
    base = scaling.Run(samples=1000, epochs=3, batch=64, samples_per_second=100.0)
    alone = scaling.cost(base, 1)
    assert alone.hours == pytest.approx(3000 / 100 / 3600) and alone.efficiency == 1
    fast = base._replace(bandwidth=1e15, latency=0.0)
    assert scaling.cost(fast, 8).hours == pytest.approx(alone.hours / 8)
    # A slow link shows: 2 * 7/8 of the parameters' bytes, less what two thirds of a step hide.
    slow = scaling.cost(base._replace(bandwidth=1e8, latency=0.0), 8)
    assert slow.step_ms == pytest.approx(1e3 * (0.08 + 2 * 7 / 8 * 4 * 90.4e6 / 1e8 - 0.08 * 2 / 3))
    assert scaling.cost(base, 8).device_hours > alone.device_hours


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        ([], 'Pass either --samples-per-second or --benchmark'),
        (['--samples-per-second', '9', '--benchmark', 'x'], 'Pass either'),
        (['--samples_per_second', '9', '--batch', '4', '--devices', '8'], 'cannot be distributed over 8'),
        (['--samples_per_second', '9', '--devices', '0'], 'must be above 0'),
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
