import csv
import json
from pathlib import Path

import pytest

from apps import compare_runs
from evaluation.runs import METRICS_VERSION
from utils.config import flatten, load_config


def write_metrics(
    folder: Path, *, joint: float, seconds: float | None = None, overrides=(), inside='eval', **more
) -> Path:
    """A run folder as apps/eval_interhand.py leaves it."""

    def sides(value):
        return {'left': value - 1, 'right': value + 1, 'all': value}

    metrics = {
        'version': METRICS_VERSION,
        'data': 'data/test',
        'frames': 190,
        'subset': None,
        'protocol': {'name': 'published', 'description': 'root joint 0 (wrist)'},
        'joint_mm': sides(joint),
        'vert_mm': sides(joint - 0.5),
        'joint_px': sides(5.0),
        'vert_px': sides(4.0),
        'root_mm': 30.0,
        'pa_joint_mm': sides(4.0),
        'pa_vert_mm': sides(3.5),
        'pck': {'thresholds_mm': [], 'left': [], 'right': [], 'auc': sides(joint / 100)},
        'config': flatten(load_config(None, list(overrides))),
        'training': None if seconds is None else {'epoch': 3, 'seconds': seconds},
        **more,
    }
    path = folder / inside / 'metrics.json'
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(metrics))
    return folder


@pytest.fixture
def runs(tmp_path):
    return [
        write_metrics(tmp_path / 'main', joint=11.0, seconds=100.4),
        write_metrics(
            tmp_path / 'one_stage',
            joint=10.5,
            seconds=80.0,
            overrides=['MODEL.STAGES', '1', 'OUTPUT_DIR', 'elsewhere', 'DEVICE', 'cpu'],
        ),
    ]


def table_rows(markdown: str) -> list[list[str]]:
    return [
        [cell.strip() for cell in line.strip('|').split('|')] for line in markdown.splitlines() if line.startswith('| ')
    ]


def test_a_row_a_run_with_what_differs_and_the_best_in_bold(runs, capsys):
    assert compare_runs.main(list(map(str, runs))) == 0
    printed = capsys.readouterr().out
    head, first, second = table_rows(printed)
    assert head[:3] == ['run', 'differs in', 'joint mm'] and head[-1] == 'seconds'
    assert first[:3] == ['main', '–', '11.00'] and first[-1] == '100'
    assert second[:3] == ['one_stage', 'MODEL.STAGES 1', '**10.50**'] and second[-1] == '80'
    assert first[head.index('PCK area')] == '**0.1100**'  # here more is better
    assert '190 frames of data/test' in printed and 'protocol published' in printed


def test_files_are_written_with_full_precision(runs, tmp_path, capsys):
    assert compare_runs.main([*map(str, runs), '--out', str(tmp_path / 'tables' / 'ablations.md')]) == 0
    assert (tmp_path / 'tables' / 'ablations.md').read_text().strip() in capsys.readouterr().out
    with open(tmp_path / 'tables' / 'ablations.csv') as file:
        rows = list(csv.DictReader(file))
    assert [row['run'] for row in rows] == ['main', 'one_stage']
    assert float(rows[0]['seconds']) == 100.4 and rows[1]['frames'] == '190'


@pytest.mark.parametrize('out', ['.', '..', '/', 'tables/..'])
def test_a_table_without_a_name_is_refused(runs, capsys, out):
    assert compare_runs.main([*map(str, runs), '--out', out]) == 2
    said = capsys.readouterr()
    assert f'--out {out} is a folder' in said.err and said.err.count('\n') == 1 and not said.out


def test_other_protocols_and_frames_get_tables_of_their_own(runs, tmp_path, capsys):
    other = write_metrics(tmp_path / 'mcp', joint=7.0, protocol={'name': 'acr', 'description': 'root joint 9'})
    part = write_metrics(tmp_path / 'part', joint=6.0, frames=10, subset={'description': 'first 10'})
    assert compare_runs.main([*map(str, runs), str(other), str(part)]) == 0
    tables = capsys.readouterr().out.strip().split('\n\n')
    assert len(tables) == 6  # a line of what was measured, then the table, three times
    assert 'protocol acr' in tables[2] and 'first 10' in tables[4] and '10 frames' in tables[4]
    assert table_rows(tables[3])[1][2] == '7.00'  # alone: nothing is best


def identity(digest: str, split: str = 'test') -> dict:
    """A record of one data set, or of two: 'a b'."""
    sets = [{'samples': 95, 'digest': each} for each in digest.split()]
    return {'data': {split: sets[0] if len(sets) == 1 else sets}}


def test_data_is_compared_by_its_digest_and_not_by_its_path(tmp_path, capsys):
    runs = [
        write_metrics(tmp_path / name, joint=9.0, data=data, evaluated=digest and identity(digest))
        for name, data, digest in (
            ('a', 'data/test', 'one'),
            ('b', './data/test', 'one'),
            ('c', 'data/test', 'other'),
            ('d', '{x,y}/test', 'one other'),
            ('e', '{y,x}/test', 'other one'),
            ('f', 'data/test', None),
        )
    ]
    assert compare_runs.main(list(map(str, runs))) == 0
    tables = capsys.readouterr().out.strip().split('\n\n')
    assert [[row[0] for row in table_rows(table)[1:]] for table in tables[1::2]] == [
        ['a', 'b'],
        ['c'],
        ['d', 'e'],
        ['f'],
    ]
    assert '(digest one)' in tables[0] and '(digest other)' in tables[2] and 'digest' not in tables[6]


def test_other_training_data_and_missing_keys_are_differences(tmp_path, capsys):
    config = flatten(load_config(None))
    short = {key: value for key, value in config.items() if key != 'MODEL.STAGES'}
    runs = [
        write_metrics(tmp_path / 'a', joint=9.0, trained=identity('one', 'train')),
        write_metrics(tmp_path / 'b', joint=9.0, trained=identity('one', 'train')),
        write_metrics(tmp_path / 'c', joint=9.0, trained=identity('other one', 'train'), config=short),
        write_metrics(tmp_path / 'd', joint=9.0, trained={'data': 3}),
        write_metrics(tmp_path / 'e', joint=9.0, config=None),
    ]
    assert compare_runs.main(list(map(str, runs))) == 0
    assert [row[1] for row in table_rows(capsys.readouterr().out)[1:]] == [
        '–',
        '–',
        'MODEL.STAGES not recorded, training data (digest other, one)',
        '–',
        '–',
    ]


def test_a_run_is_found_by_file_evaluation_or_run_folder(tmp_path, capsys):
    run = write_metrics(tmp_path / 'a', joint=9.0)
    beside = write_metrics(tmp_path / 'b', joint=8.0, inside='.')
    assert compare_runs.main([str(run / 'eval' / 'metrics.json'), str(run / 'eval'), str(run), str(beside)]) == 0
    names = [row[0] for row in table_rows(capsys.readouterr().out)[1:]]
    assert names == [str(run / 'eval' / 'metrics.json'), str(run / 'eval'), str(run), str(beside)]


def test_missing_figures_show_as_a_dash(tmp_path, capsys):
    run = write_metrics(tmp_path / 'a', joint=9.0, pck=None, config=None)
    assert compare_runs.main([str(run)]) == 0
    head, row = table_rows(capsys.readouterr().out)
    assert row[head.index('PCK area')] == row[head.index('seconds')] == '–'


@pytest.mark.parametrize(
    'content, said',
    [
        (None, 'There is no metrics.json in'),
        ('{"version": 0}', 'not a metrics.json of version'),
        ('[1]', 'not a metrics.json'),
        ('{"version": 1}', 'joint_mm is missing or malformed'),
        ('{"version"', 'not valid JSON'),
    ],
)
def test_what_is_no_run_is_one_sentence(tmp_path, capsys, content, said):
    (tmp_path / 'a').mkdir()
    if content is not None:
        (tmp_path / 'a' / 'metrics.json').write_text(content)
    assert compare_runs.main([str(tmp_path / 'a')]) == 2
    error = capsys.readouterr().err
    assert said in error and str(tmp_path / 'a') in error and error.count('\n') == 1
