"""Evaluation where frames lack a hand: present hands only; predicted presence, visible joints and deviations."""

import copy
import csv
import io
import json
import math
from functools import cache

import numpy as np
import pytest
import torch
from prepared_tree import write_prepared
from tiny import TINY, tiny_model

from apps import report as report_command
from dataset.batch import build_batch_maker
from dataset.damage import TooMuchDamageError
from dataset.loader import evaluation_loader, evaluation_split
from dataset.prepared import LABEL_SHAPES
from dataset.subsets import choose
from evaluation import evaluate as evaluation_of
from evaluation.aggregation import pck, penetration, segmentation_iou, sides
from evaluation.baseline import mean_prediction
from evaluation.confidence import (
    JOINT_KINDS,
    REMOVED,
    average_precision,
    coverage,
    hidden_joints,
    presence,
    sparsification,
    sparsified,
)
from evaluation.evaluate import Judge, evaluate
from evaluation.metrics import GRID, Protocol
from evaluation.pictures import draw_sheets, look, predicted_meshes, true_meshes
from evaluation.registry import METRICS
from evaluation.report import samples as report_samples
from evaluation.samples import chosen_samples_npz, per_sample_csv
from evaluation.session import Measured, report
from evaluation.summary import breakdown, format_breakdown, format_summary, summarise
from evaluation.validation import validate
from manopth import TwoHandLayer
from models.hands import load_hands
from models.placement import nearest_camera
from models.predictions import CAMERA, JointConfidence
from utils.config import load_config
from utils.errors import UserError
from utils.files import json_bytes
from utils.geometry import project, to_uv
from utils.hand import LEFT, RIGHT, SIDES
from utils.training import RunLog

# Frames 0 and 4 show both hands, 1 and 5 the right one, 2 the left one, 3 none.
ABSENT = {1: ('left',), 2: ('right',), 3: ('left', 'right'), 5: ('left',)}
PRESENT = torch.tensor([[1, 1], [0, 1], [1, 0], [0, 0], [1, 1], [0, 1]], dtype=torch.bool)
BOTH = PRESENT.all(1)
OF_PAIRS = ('root_mm', 'box_iou', 'distance_mm', 'penetration_mm', 'true_penetration_mm')
NOT_ERRORS = ('present', 'presence', 'residual_px', 'seg_intersection', 'seg_union', *OF_PAIRS)


@pytest.fixture(scope='module')
def some_absent(tmp_path_factory):
    root = tmp_path_factory.mktemp('absent')
    write_prepared(root, 'val', 6, absent=ABSENT)
    return root


@cache
def network_with(**model):
    return tiny_model(load_hands('standin'), STAGES=1, **model)


def setting(path, standin, **model):
    """Configuration, split val, batch maker and network; ``model``: keys of MODEL."""
    changes = [text for key, value in model.items() for text in (f'MODEL.{key}', str(value))]
    more = ['DATASET.PATH', str(path), 'EVAL.BATCH_SIZE', '2', 'EVAL.WORKERS', '0', 'DEVICE', 'cpu']
    cfg = load_config(None, [*TINY, *changes, *more])
    return cfg, evaluation_split(cfg, 'val'), build_batch_maker(cfg, standin), network_with(**model)


JUDGEMENT = {'network_root': 0, 'protocol': Protocol(), 'grid': GRID[:2], 'details': True}


def evaluated(path, standin, **model):
    cfg, dataset, batch_maker, network = setting(path, standin, **model)
    result = evaluate(network, evaluation_loader(dataset, cfg), batch_maker, **JUDGEMENT)
    return Measured(result, 'published', dataset, choose(dataset), network, batch_maker)


@pytest.fixture(scope='module')
def full(some_absent, standin):
    """An evaluation of a network with presence and confidence."""
    return evaluated(some_absent, standin, PRESENCE=True, CONFIDENCE=True)


@pytest.fixture(scope='module')
def plain(some_absent, standin):
    """An evaluation of a network without either."""
    return evaluated(some_absent, standin)


def equal(a, b, *, tolerance=0.0):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance, equal_nan=True)


def judged(standin, batch, output, *, root=0):
    maker = build_batch_maker(load_config(None, TINY), standin)
    return Judge(maker, **JUDGEMENT | {'network_root': root})(output, batch)


def rows_of(batch, output, rows):
    """The output and the batch of some samples."""
    stages = [type(hands)(*(x[rows] for x in hands)) for hands in output.stages]
    maps = {name: getattr(output, name)[rows] for name in ('segmentation', 'dense', 'presence')}
    confidence = JointConfidence(*(x[rows] for x in output.confidence))
    target = batch.target.map(lambda x: x[rows])
    few = type(batch)(batch.image[rows], target, batch.intrinsics[rows], batch.index[rows])
    return output._replace(stages=stages, confidence=confidence, **maps), few


@pytest.fixture(scope='module')
def pair(some_absent, standin):
    """A batch of all frames, and the output of a network with everything."""
    _, dataset, batch_maker, network = setting(some_absent, standin, PRESENCE=True, CONFIDENCE=True)
    with torch.inference_mode():
        batch = batch_maker(dataset.__getitems__(range(6)))
        output = network.eval()(network.preprocess.normalise(batch.image))
    assert torch.equal(batch.target.present, PRESENT)
    return batch, output


# Errors


def test_values_of_absent_hands_are_missing_and_no_others(full):
    samples = full.result.details
    assert {m.name for m in METRICS if m.measure} == set(samples)
    for name, values in samples.items():
        if name in OF_PAIRS:
            assert torch.equal(values.isfinite(), BOTH), name
        elif name not in NOT_ERRORS:
            values = values[:, :, 1:] if name in ('deviation_mm', 'coordinates_mm') else values  # without the root
            known = values.isfinite().reshape(*PRESENT.shape, -1)
            assert torch.equal(known.any(-1), PRESENT) and torch.equal(known.all(-1), PRESENT), name
    for samples in (*full.result.stages, *full.result.grid.values()):
        assert torch.equal(samples['joint_mm'].isfinite(), PRESENT)
        assert torch.equal(samples['root_mm'].isfinite(), BOTH)


def test_nothing_depends_on_the_labels_or_the_estimate_of_an_absent_hand(pair, standin):
    batch, output = pair
    off = ~PRESENT[:, :, None, None]

    def garbled(values):
        return torch.where(off.view(*off.shape[:2], *[1] * (values.ndim - 2)), 0.3 + torch.rand_like(values), values)

    target = batch.target._replace(
        **{name: garbled(getattr(batch.target, name)) for name in ('vertices', 'joints', 'vertices_uv', 'joints_uv')}
    )
    stages = []
    for hands in output.stages:
        offset = torch.where(BOTH[:, None], hands.offset, 5.0)
        stages.append(type(hands)(*(offset if x is hands.offset else garbled(x) for x in hands)))
    confidence = JointConfidence(*map(garbled, output.confidence))
    other = judged(standin, batch._replace(target=target), output._replace(stages=stages, confidence=confidence))
    ours = judged(standin, batch, output)
    for a, b in zip((*ours.stages, ours.details, *ours.grid), (*other.stages, other.details, *other.grid), strict=True):
        assert a.keys() == b.keys()
        for name, values in a.items():
            equal(values, b[name])


def test_errors_of_a_present_hand_do_not_depend_on_whether_the_other_is_present(pair, standin):
    batch, output = pair
    masked = judged(standin, batch, output).details
    whole = judged(standin, batch._replace(target=batch.target._replace(present=None)), output).details
    for name in (
        'joint_mm',
        'vert_mm',
        'joint_px',
        'vert_px',
        'joints_mm',
        'pa_joint_mm',
        'pa_vert_mm',
        'deviation_mm',
    ):
        equal(masked[name][PRESENT], whole[name][PRESENT])
    for name in OF_PAIRS:
        equal(masked[name][BOTH], whole[name][BOTH])
    single = PRESENT.sum(1) == 1
    assert torch.equal(masked['visible'][PRESENT & single[:, None]], torch.ones(3))  # nothing hides it


def test_a_single_hand_is_placed_by_itself(pair, standin):
    batch, output = pair
    joints = batch.target.joints
    centred = joints - joints[:, :, :1]
    uv = to_uv(project(joints, batch.intrinsics[:, None]))
    parameters = output.stages[-1].parameters.clone()
    parameters[..., CAMERA] = nearest_camera(centred, uv)
    last = output.stages[-1]._replace(joints=centred, parameters=parameters)  # the offset is wrong in every frame
    details = judged(standin, batch, output._replace(stages=[last])).details
    single = PRESENT.sum(1) == 1
    assert details['placement_mm'][PRESENT & single[:, None]].max() < 0.5
    assert details['placement_mm'][BOTH].min() > 1
    equal(details['coordinates_mm'][PRESENT][:, 1:], torch.zeros(7, 20, 3))


def test_a_split_with_both_hands_everywhere_is_evaluated_as_before(pair, standin, plain):
    batch, output = pair
    output = output._replace(presence=None, confidence=None)

    def files(present):
        told = batch._replace(target=batch.target._replace(present=present))
        judge = Judge(plain.batch_maker, **JUDGEMENT)
        result = evaluation_of._gather([judge(output, told)], judge)
        figures = result.report()
        text = format_summary(figures) + format_breakdown(figures)
        return json_bytes(figures), per_sample_csv(result, plain.dataset), text

    before = files(None)
    assert before == files(torch.ones(6, 2, dtype=torch.bool))
    header = before[1].splitlines()[0].split(',')
    assert header[-2:] == ['penetration_mm', 'true_penetration_mm'] and 'presence_left' not in header
    assert set(json.loads(before[0])) == {
        *('frames', 'protocol', 'protocols', 'stages', 'interval_95', 'joint_mm', 'vert_mm', 'joint_px', 'vert_px'),
        *('root_mm', 'pa_joint_mm', 'pa_vert_mm', 'pck', 'per_joint_mm', 'per_finger_mm', 'by_box_iou'),
        *('by_distance_mm', 'by_visibility', 'placement_mm', 'penetration', 'true_penetration', 'segmentation_iou'),
    }
    assert 'presence' not in before[2] and 'by hands' not in before[2]


def test_figures_do_not_depend_on_batches_or_processes(pair, standin, full):
    """Nor on whether the frames of a batch, or of a process, lack a hand."""
    judge = Judge(full.batch_maker, **JUDGEMENT)
    output, batch = rows_of(*pair, [4, 0])
    whole = output, batch._replace(target=batch.target._replace(present=None))
    parts = [judge(*rows_of(*pair, [5, 3, 2])), judge(*whole), judge(*rows_of(*pair, [1]))]
    merged = evaluation_of._gather(parts, judge)
    assert merged.indices.tolist() == [0, 1, 2, 3, 4, 5]
    once = evaluation_of._gather([judge(*reversed(pair))], judge)
    for name, values in once.details.items():
        equal(merged.details[name], values, tolerance=1e-5)
    for stage, other in zip(once.stages, merged.stages, strict=True):
        equal(stage['root_mm'], other['root_mm'], tolerance=1e-5)


# Figures


def test_frames_are_divided_by_the_hands_that_they_show(plain):
    figures, samples = plain.result.report(), plain.result.details
    rows = figures['by_hands']
    assert {name: row['frames'] for name, row in rows.items()} == {'single': 3, 'interacting': 2, 'all': 5, 'empty': 1}
    joint = samples['joint_mm'].double()
    for name, frames in (('single', [1, 2, 5]), ('interacting', [0, 4]), ('all', [0, 1, 2, 4, 5])):
        means = [joint[[i for i in frames if PRESENT[i, hand]], hand].mean().item() for hand in (LEFT, RIGHT)]
        assert rows[name]['joint_mm'] == pytest.approx(sum(means) / 2)
    assert math.isnan(rows['single']['root_mm']) and math.isnan(rows['empty']['joint_mm'])
    assert rows['all']['root_mm'] == rows['interacting']['root_mm'] == figures['root_mm']
    assert rows['all']['joint_mm'] == figures['joint_mm']['all']
    printed = format_breakdown(figures)
    assert 'presence:               not predicted (MODEL.PRESENCE is off)' in printed
    assert 'empty                  1 frames: -' in printed
    assert figures['presence'] is None and figures['frames'] == 6


def test_every_breakdown_counts_present_hands_only(plain):
    figures = plain.result.report()
    for key in ('by_box_iou', 'by_distance_mm'):
        assert sum(row['frames'] for row in figures[key]) == 2
    assert sum(row['hands'] for row in figures['by_visibility']) == PRESENT.sum()
    deep = plain.result.details['penetration_mm'][BOTH]
    assert figures['penetration']['share'] == (deep > 0).double().mean()
    errors = plain.result.details['joints_mm']
    within = (errors[PRESENT[:, LEFT], LEFT] <= 50).double().mean().item()
    assert figures['pck']['left'][-1] == pytest.approx(within)
    assert all(math.isfinite(x) for row in figures['per_joint_mm'].values() for x in row.values())
    low, high = figures['interval_95']['joint_mm']['all']
    assert low < figures['joint_mm']['all'] < high


@pytest.mark.parametrize('missing', [('left',), SIDES])
def test_a_split_that_never_shows_a_hand_has_no_figure_for_it(tmp_path, standin, missing):
    write_prepared(tmp_path, 'val', 3, absent=dict.fromkeys(range(3), missing))
    measured = evaluated(tmp_path, standin, PRESENCE=True, CONFIDENCE=True)
    figures = measured.result.report()
    left, right, everything = figures['joint_mm'].values()
    if missing == SIDES:
        assert math.isnan(everything)
        assert chosen_samples_npz(measured.model, measured.dataset, measured.batch_maker, measured.result) is None
    else:
        assert math.isnan(left) == ('left' in missing) and math.isnan(right) == ('right' in missing)
        assert everything == (right if math.isnan(left) else left)
        assert figures['pck']['auc']['all'] == figures['pck']['auc'][SIDES[1 - SIDES.index(missing[0])]]
    assert math.isnan(figures['root_mm']) and math.isnan(figures['penetration']['share'])
    out = tmp_path / 'eval'
    report(measured, title='x', out=str(out), more={})  # prints and writes
    stored = json.loads((out / 'metrics.json').read_text())
    assert stored['root_mm'] is None and stored['joint_mm']['all'] == (None if missing == SIDES else everything)
    assert report_command.main([str(out), '--out', str(tmp_path / 'page.html')]) == 0


def test_the_other_hand_stands_for_both_only_if_it_is_alone():
    nan = float('nan')
    assert sides(1.0, 3.0)['all'] == 2
    assert sides(nan, 3.0)['all'] == 3 and sides(1.0, nan)['all'] == 1 and math.isnan(sides(nan, nan)['all'])


def test_aggregates_of_nothing_are_missing_instead_of_zero():
    nan = torch.nan
    curve = pck(torch.full((2, 2, 21), 10.0).index_fill(1, torch.tensor([LEFT]), nan))
    assert math.isnan(curve['left'][20]) and curve['right'][20] == 1
    assert penetration(torch.tensor([nan, 0.0, 4.0]))['share'] == 0.5
    iou = segmentation_iou(torch.tensor([[9.0, 0, 3]]), torch.tensor([[9.0, 0, 4]]))
    assert math.isnan(iou['left']) and iou['hands'] == iou['right'] == 0.75


# Files


def test_files_name_presence_where_it_exists(full, plain):
    for measured, more in ((plain, False), (full, True)):
        rows = list(csv.DictReader(per_sample_csv(measured.result, measured.dataset).splitlines()))
        for index, row in enumerate(rows):
            for hand, side in enumerate(SIDES):
                assert row[f'present_{side}'] == str(int(PRESENT[index, hand]))
                assert (row[f'joint_mm_{side}'] != '') == (row[f'visible_{side}'] != '') == bool(PRESENT[index, hand])
                assert (f'presence_{side}' in row) == more
            assert (row['root_mm'] != '') == bool(BOTH[index])
        if more:
            assert float(rows[3]['presence_left']) == pytest.approx(full.result.details['presence'][3, 0].item())


def test_an_absent_hand_of_a_chosen_sample_is_a_point_that_is_not_drawn(plain):
    content = np.load(io.BytesIO(chosen_samples_npz(plain.model, plain.dataset, plain.batch_maker, plain.result)))
    place = content['index'].tolist().index(2)
    assert 3 not in content['index'] and np.isnan(content['joint_mm'][place, RIGHT])
    root = content['true_roots'][place, LEFT]
    assert (content['true_vertices'][place, RIGHT] == root).all() and (
        content['true_roots'][place, RIGHT] == root
    ).all()
    assert not content['vertices'][place, :, RIGHT].any()
    arrays = {name: content[name][place : place + 1] for name in content.files if name not in ('version', 'faces')}
    arrays['faces'] = content['faces']
    drawn = report_samples.draw(arrays)
    arrays['true_vertices'] = arrays['true_vertices'].copy()
    arrays['true_vertices'][:, RIGHT] = -1  # behind the camera
    assert report_samples.draw(arrays) == drawn


def test_pictures_omit_absent_hands(some_absent, standin):
    _, dataset, batch_maker, network = setting(some_absent, standin, PRESENCE=True)
    seen = look(network, dataset, [1, 3], batch_maker)
    crops = [dataset.image('img', index) for index in (1, 3)]
    assert np.array_equal(true_meshes(seen)[1], crops[1]) and np.array_equal(predicted_meshes(seen, -1)[1], crops[1])
    assert not np.array_equal(true_meshes(seen)[0], crops[0])
    assert 'validation' in draw_sheets(network, dataset, [1, 3], batch_maker)


def test_validation_logs_what_is_measured(tmp_path, standin):
    write_prepared(tmp_path, 'val', 3, absent=dict.fromkeys(range(3), ('left',)))
    cfg, dataset, batch_maker, network = setting(tmp_path, standin)
    cfg = load_config(
        None, [*TINY, 'DATASET.PATH', str(tmp_path), 'OUTPUT_DIR', str(tmp_path / 'run'), 'DEVICE', 'cpu']
    )
    log = RunLog(tmp_path / 'run', step=None)
    summary = validate(network, dataset, batch_maker, cfg, epoch=1, step=5, log=log, stopping=lambda: False)
    log.close()
    assert summary['joint_mm']['all'] == summary['joint_mm']['right'] > 0
    last = json.loads((tmp_path / 'run' / 'log.jsonl').read_text().splitlines()[-1], parse_constant=pytest.fail)
    assert last['joint_mm_all'] == summary['joint_mm']['all'] and not {'root_mm', 'joint_mm_left'} & last.keys()


def test_a_network_whose_presence_is_not_finite_is_refused(some_absent, standin):
    cfg, dataset, batch_maker, network = setting(some_absent, standin, PRESENCE=True)
    network = copy.deepcopy(network)
    for parameter in network.presence_head.parameters():
        torch.nn.init.constant_(parameter, torch.nan)
    with pytest.raises(UserError, match='NaN or infinity for 2 samples'):
        evaluate(network, evaluation_loader(dataset, cfg), batch_maker, network_root=0, protocol=Protocol())


# The best constant prediction


def test_the_mean_prediction_is_over_present_hands(some_absent, tmp_path, standin):
    _, dataset, _, _ = setting(some_absent, standin)
    layer = TwoHandLayer(standin)
    parameters, offset, _ = mean_prediction(dataset, layer, root_joint=0)
    assert parameters.isfinite().all() and offset.isfinite().all()
    labels = [dict(zip(LABEL_SHAPES, dataset.labels(index), strict=True)) for index in range(6)]
    for hand in (LEFT, RIGHT):
        poses = np.mean([labels[i]['pose'][hand] for i in range(6) if PRESENT[i, hand]], 0)
        np.testing.assert_allclose(parameters[hand, 6:51], poses, atol=1e-6)
    write_prepared(tmp_path / 'two', 'val', 6)
    whole = setting(tmp_path / 'two', standin)[1]
    few = [whole.labels(i) for i in (0, 4)]
    apart = []
    for root, pose, shape, translation, rotation, _, _ in few:
        joints = (
            layer(*(torch.from_numpy(x)[None] for x in (root, pose, shape))).joints[0].numpy() + translation[:, None]
        )
        apart.append(rotation @ (joints[RIGHT, 0] - joints[LEFT, 0]))
    np.testing.assert_allclose(offset * 0.15, np.mean(apart, 0), atol=1e-5)


def test_the_mean_of_a_hand_that_is_never_shown_is_finite(tmp_path, standin):
    write_prepared(tmp_path / 'right', 'val', 3, absent=dict.fromkeys(range(3), ('left',)))
    dataset = setting(tmp_path / 'right', standin)[1]
    parameters, offset, _ = mean_prediction(dataset, TwoHandLayer(standin), root_joint=0)
    assert torch.equal(parameters[LEFT, CAMERA], parameters[RIGHT, CAMERA]) and not offset.any()
    assert not parameters[LEFT, 6:61].any() and parameters[LEFT, :6].norm() == pytest.approx(2**0.5)
    write_prepared(tmp_path / 'none', 'val', 3, absent=dict.fromkeys(range(3), SIDES))
    with pytest.raises(UserError, match='No frame of .* shows a hand'):
        mean_prediction(setting(tmp_path / 'none', standin)[1], TwoHandLayer(standin), root_joint=0)


@pytest.mark.parametrize('workers', [0, 1])
def test_the_mean_leaves_damaged_annotations_out(tmp_path, standin, workers):
    write_prepared(tmp_path, 'val', 6)
    dataset, layer = setting(tmp_path, standin)[1], TwoHandLayer(standin)
    poses = np.mean([dataset.labels(index)[1] for index in (0, 1, 3, 4, 5)], 0)
    (tmp_path / 'val/anno/2.pkl').write_bytes(b'damaged')
    parameters, _, damage = mean_prediction(dataset, layer, root_joint=0, workers=workers, tolerated_damage=0.1)
    np.testing.assert_allclose(parameters[:, 6:51], poses, atol=1e-6)
    assert [one.sample for one in damage] == [2] and '2.pkl' in damage[0].detail
    with pytest.raises(TooMuchDamageError, match='At least 1 of 6 samples .* DATASET.TOLERATED_DAMAGE allows 0'):
        mean_prediction(dataset, layer, root_joint=0, workers=workers)


# Presence


def naive_average_precision(scores, positive):
    total, area, recalled = sum(positive), 0.0, 0.0
    for threshold in sorted(set(scores), reverse=True):
        chosen = [p for s, p in zip(scores, positive) if s >= threshold]
        recall = sum(chosen) / total
        area += (recall - recalled) * sum(chosen) / len(chosen)
        recalled = recall
    return area


@pytest.mark.parametrize('levels', [3, 1000])
def test_average_precision_equals_a_loop_over_thresholds(levels):
    g = torch.Generator().manual_seed(levels)
    for share in (0.1, 0.5, 0.9):
        positive = torch.rand(60, generator=g) < share
        scores = (torch.rand(60, generator=g) + 0.3 * positive).mul(levels).round()
        expected = naive_average_precision(scores.tolist(), positive.tolist())
        assert average_precision(scores, positive) == pytest.approx(expected, rel=1e-12)
    assert average_precision(torch.tensor([0.1, 0.9, 0.8]), torch.tensor([False, True, True])) == 1
    assert average_precision(torch.zeros(4), torch.tensor([True, False, False, False])) == 0.25
    for positive in (torch.ones(3, dtype=torch.bool), torch.zeros(3, dtype=torch.bool)):
        assert math.isnan(average_precision(torch.rand(3), positive))


def test_presence_figures_equal_a_count():
    present = torch.tensor([[1, 1], [1, 1], [0, 1], [1, 0], [1, 0], [0, 0], [0, 0], [0, 0]], dtype=torch.bool)
    probability = torch.tensor(
        [[0.9, 0.6], [0.9, 0.2], [0.1, 0.7], [0.4, 0.3], [0.6, 0.7], [0.1, 0.2], [0.6, 0.1], [0.8, 0.9]]
    )
    figures = presence(probability, present)
    assert figures['handedness_accuracy'] == 2 / 5  # the first and the third
    assert figures['side_accuracy'] == pytest.approx(2 / 3)  # the third and the fourth
    assert figures['false_alarms'] == pytest.approx(2 / 3)
    left = naive_average_precision(probability[:, 0].tolist(), present[:, 0].tolist())
    assert figures['average_precision']['left'] == pytest.approx(left)
    whole = presence(probability[:2], present[:2])
    assert math.isnan(whole['false_alarms']) and math.isnan(whole['average_precision']['all'])
    undecided = presence(torch.full((1, 2), 0.5), present[:1])
    assert undecided['handedness_accuracy'] == 0


# Confidence


def test_hidden_joints_are_judged_by_kind():
    assert sorted(sum((JOINT_KINDS[kind] for kind in JOINT_KINDS if kind != 'all'), [])) == JOINT_KINDS['all']
    g = torch.Generator().manual_seed(0)
    visible = (torch.rand(30, 2, 21, generator=g) < 0.7).float()
    logit = torch.randn(30, 2, 21, generator=g) + visible
    visible[:7, LEFT] = logit[:7, LEFT] = torch.nan
    figures = hidden_joints(logit, visible)
    known = ~visible[..., JOINT_KINDS['tip']].isnan()
    scores, hidden = -logit[..., JOINT_KINDS['tip']][known], visible[..., JOINT_KINDS['tip']][known] == 0
    assert figures['tip']['share'] == pytest.approx(hidden.double().mean().item())
    assert figures['tip']['accuracy'] == pytest.approx(((scores > 0) == hidden).double().mean().item())
    expected = naive_average_precision(scores.tolist(), hidden.tolist())
    assert figures['tip']['average_precision'] == pytest.approx(expected)


def naive_curve(errors, uncertainty):
    order = np.argsort(uncertainty, kind='stable')
    return [np.mean(errors[order][: len(errors) - int(len(errors) * step / 20 + 1e-9)]) for step in range(20)]


def test_a_sparsification_curve_equals_a_loop():
    random = np.random.default_rng(0)
    errors, uncertainty = random.gamma(2, 5, 237), random.random(237)
    curve = sparsified(torch.from_numpy(errors), torch.from_numpy(uncertainty))
    np.testing.assert_allclose(curve, naive_curve(errors, uncertainty))
    figures = sparsification(
        torch.from_numpy(errors), {'good': torch.from_numpy(errors**2), 'bad': -torch.from_numpy(errors)}
    )
    assert figures['ause']['good'] == 0 < figures['ause']['random'] < figures['ause']['bad']
    assert figures['good'] == figures['oracle'] and figures['count'] == 237
    area = np.trapezoid((errors.mean() - np.array(naive_curve(errors, errors))) / errors.mean(), REMOVED)
    assert figures['ause']['random'] == pytest.approx(area)


def test_equally_uncertain_errors_are_removed_as_if_at_random():
    errors = torch.tensor([1.0, 2, 3, 4] * 10)
    np.testing.assert_allclose(sparsified(errors, torch.zeros(40)), 2.5)
    half = sparsified(errors, torch.tensor([0.0, 0, 1, 1] * 10))
    assert half[10].item() == pytest.approx(1.5) and half[19].item() == pytest.approx(1.5)
    assert sparsified(errors[:0], errors[:0]).isnan().all()
    assert sparsified(errors[:1], errors[:1]).tolist() == [1.0] * 20


def test_coverage_of_a_normal_distribution_is_as_expected():
    g = torch.Generator().manual_seed(0)
    deviation = torch.rand(20_000, generator=g) * 10 + 1
    errors = deviation[:, None] * torch.randn(20_000, 3, generator=g)
    errors[:99], deviation[99:200] = torch.nan, torch.nan
    figures = coverage(errors, deviation)
    assert figures == pytest.approx({'within_1': 0.6827, 'within_2': 0.9545, 'calibration': 1}, abs=0.006)
    assert coverage(errors, deviation / 2)['calibration'] == pytest.approx(2, abs=0.01)


def test_deviations_are_judged_against_the_networks_own_joints(pair, standin):
    batch, output = pair
    truth = batch.target.joints
    for root in (0, 9):
        centred = truth - truth[:, :, root : root + 1]
        wrong = centred + 0.005 * torch.tensor([1.0, 0, 0])
        wrong[:, :, root] = 0
        last = output.stages[-1]._replace(joints=wrong)
        deviation = torch.full((6, 2, 21), 0.002)
        confidence = output.confidence._replace(deviation=deviation)
        details = judged(standin, batch, output._replace(stages=[last], confidence=confidence), root=root).details
        figures = breakdown(details)['deviation']
        assert figures['within_1'] == figures['within_2'] == pytest.approx(2 / 3)  # two coordinates of three are exact
        assert figures['calibration'] == pytest.approx((6.25 / 3) ** 0.5, rel=1e-4)
        assert figures['sparsification']['joints']['count'] == 7 * 20
        assert figures['sparsification']['frames']['count'] == 5
        np.testing.assert_allclose(figures['sparsification']['frames']['deviation'], 5, rtol=1e-4)


def test_an_evaluation_of_everything_is_written_printed_and_shown(full, plain, tmp_path, capsys):
    for measured, name in ((full, 'full'), (plain, 'plain')):
        report(measured, title=name, out=str(tmp_path / name), more={})
    printed = capsys.readouterr().out
    for part in ('presence, AP:', 'handedness', 'hidden joints:', 'visible joints:', 'sparsification, joints: AUSE'):
        assert part in printed
    figures = json.loads((tmp_path / 'full' / 'metrics.json').read_text())
    assert (
        figures['by_joint_visibility']['visible']['joints'] + figures['by_joint_visibility']['hidden']['joints'] == 140
    )
    assert set(figures['hidden_joints']) == set(JOINT_KINDS)
    curves = figures['deviation']['sparsification']
    assert curves['frames']['count'] == 5 and curves['joints']['count'] == 140
    assert curves['joints']['oracle'][-1] <= curves['joints']['deviation'][-1]
    page = tmp_path / 'page.html'
    assert report_command.main([str(tmp_path / 'full'), str(tmp_path / 'plain'), '--out', str(page)]) == 0
    text = page.read_text()
    for part in (
        'Hands in the frame',
        'Predicted presence',
        'Sparsification, joints, full',
        'Hidden joints by kind',
        'plain: presence is not predicted (MODEL.PRESENCE is off).',
        'plain: confidence is not predicted (MODEL.CONFIDENCE is off).',
    ):
        assert part in text, part


@pytest.mark.parametrize('key', ['by_hands', 'presence', 'hidden_joints', 'by_joint_visibility', 'deviation'])
def test_a_malformed_figure_is_one_sentence(full, tmp_path, capsys, key):
    report(full, title='full', out=str(tmp_path), more={})
    figures = json.loads((tmp_path / 'metrics.json').read_text())
    (tmp_path / 'metrics.json').write_text(json.dumps(figures | {key: {'all': 'x'}}))
    assert report_command.main([str(tmp_path), '--out', str(tmp_path / 'page.html')]) == 2
    error = capsys.readouterr().err
    assert f'{key} is missing or malformed' in error and 'Traceback' not in error


def test_the_headline_needs_no_presence(full):
    """Validation during training measures the headline only."""
    samples = full.result.stages[-1]
    assert set(samples) == {metric.name for metric in METRICS if metric.headline}
    assert math.isfinite(summarise(samples, Protocol())['joint_mm']['all'])
