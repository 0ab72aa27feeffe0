import argparse
import csv
import json

import pytest
import torch
from tiny import TINY, tiny_model

from dataset.batch import build_batch_maker
from dataset.loader import evaluation_loader, evaluation_split
from evaluation.evaluate import evaluate
from evaluation.metrics import GRID, Protocol
from evaluation.registry import METRICS, Metric, TableColumn, compared
from evaluation.samples import per_sample_csv
from evaluation.session import add_evaluation_arguments
from evaluation.summary import format_breakdown, format_grid, format_summary
from utils.config import load_config

TOY = Metric(
    'span_mm',
    'hand span',
    'mm',
    measure=lambda comparison: (
        1000 * comparison.hands.joints[:, :, 4].sub(comparison.hands.joints[:, :, 20]).norm(dim=-1)
    ),
    per_hand=True,
    table=TableColumn('span mm', ('span_mm', 'all')),
)
TOY_HEADLINE = Metric(
    'index', 'sample number', measure=lambda comparison: comparison.batch.index.double(), headline=True
)


def evaluated(path, standin, **options):
    """An evaluation of the split val, and its data set."""
    cfg = load_config(None, [*TINY, 'DATASET.PATH', str(path)])
    dataset = evaluation_split(cfg, 'val')
    loader, batch_maker = evaluation_loader(dataset, cfg), build_batch_maker(cfg, standin)
    return evaluate(tiny_model(standin), loader, batch_maker, network_root=0, protocol=Protocol(), **options), dataset


@pytest.fixture(scope='module')
def evaluation(tiny_prepared, standin):
    """An evaluation with two more metrics, and its data set."""
    return evaluated(tiny_prepared, standin, grid=GRID[:2], details=True, metrics=(*METRICS, TOY, TOY_HEADLINE))


def test_one_entry_adds_a_metric_to_json_csv_console_and_table(evaluation):
    result, dataset = evaluation
    report = json.loads(json.dumps(result.report()))
    assert report['span_mm']['all'] == pytest.approx((report['span_mm']['left'] + report['span_mm']['right']) / 2)
    rows = list(csv.DictReader(per_sample_csv(result, dataset).splitlines()))
    mean = sum(float(row['span_mm_left']) for row in rows) / len(rows)
    assert mean == pytest.approx(report['span_mm']['left'], abs=1e-4)
    figures = ', '.join(f'{side} {report["span_mm"][side]:.3f} mm' for side in ('left', 'right', 'all'))
    assert f'hand span:              {figures}' in format_breakdown(report, result.metrics).splitlines()
    assert compared(result.metrics)[-1].title == 'span mm'


def test_a_headline_metric_is_measured_for_every_stage_and_protocol(evaluation):
    result, dataset = evaluation
    report, middle = result.report(), (len(dataset) - 1) / 2
    assert report['index'] == middle
    assert [stage['index'] for stage in report['stages']] == [middle] * len(result.stages)
    assert [summary['index'] for summary in report['protocols']] == [middle] * 2
    low, high = report['interval_95']['index']
    assert low <= middle <= high
    assert format_summary(report, result.metrics).splitlines()[-1].startswith(f'sample number: {middle:.6f}')
    assert format_grid(report['protocols'], result.metrics).splitlines()[-1].startswith('sample number')
    assert 'span_mm' not in report['stages'][0] and 'span_mm' not in result.stages[0]


def test_keys_and_columns_are_unique():
    assert len({metric.key for metric in METRICS}) == len({metric.name for metric in METRICS}) == len(METRICS)


def test_headline_evaluation_measures_no_details(evaluation, tiny_prepared, standin):
    result, _ = evaluated(tiny_prepared, standin)
    assert result.details is None and set(result.stages[0]) == {m.name for m in METRICS if m.headline}
    torch.testing.assert_close(result.stages[-1]['root_mm'], evaluation[0].stages[-1]['root_mm'])
    with pytest.raises(ValueError, match='details=True'):
        result.report()


def test_flags_have_hyphens_and_their_old_spelling_still_works():
    parser = argparse.ArgumentParser()
    add_evaluation_arguments(parser)
    for mark in '-_':
        args = parser.parse_args([f'--all{mark}protocols', f'--image{mark}ids', 'a', f'--annotation{mark}ids', 'b'])
        assert (args.all_protocols, args.image_ids, args.annotation_ids) == (True, 'a', 'b')
    args = parser.parse_args([])
    assert (args.all_protocols, args.image_ids, args.annotation_ids) == (False, None, None)
    printed = parser.format_help()
    assert '--all-protocols' in printed and '--all_protocols' not in printed and '--image_ids' not in printed
