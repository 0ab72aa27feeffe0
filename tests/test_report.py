"""The report as a file: its content, missing and damaged inputs, escaping."""

import base64
import csv
import hashlib
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from report_tree import STAGES, write_run

from apps import report
from evaluation.report import charts, hands, inputs, sections
from evaluation.report.charts import Axis, Series, axis_to, line_chart
from evaluation.report.page import environment
from evaluation.runs import read_runs
from utils.hand import FINGERS, JOINT_NAMES, SIDES
from utils.run_record import run_record

VOID = {'meta', 'img', 'input'}
VIEW_BOXLESS = {'path', 'line', 'rect', 'circle', 'polygon'}
SECTIONS = [
    'metrics',
    'distribution',
    'pck',
    'joints',
    'stages',
    'interaction',
    'learning',
    'other',
    'samples',
    'worst',
]
HOSTILE = '"\'></script><script>alert(1)</script><img src=x onerror=alert(2)>&amp;'


class Page(HTMLParser):
    """Parsed page: elements as [name, attributes, text including children], and tables by label."""

    def __init__(self, text: str):
        super().__init__()
        self.text, self.elements, self.open = text, [], []
        self.feed(text)
        self.close()
        assert not self.open, f'unclosed elements: {self.open}'

    def handle_starttag(self, name, attributes):
        self.elements.append([name, dict(attributes), ''])
        if name not in VOID:
            self.open.append(self.elements[-1])

    def handle_startendtag(self, name, attributes):
        assert name in VIEW_BOXLESS
        self.elements.append([name, dict(attributes), ''])

    def handle_endtag(self, name):
        assert self.open.pop()[0] == name

    def handle_data(self, data):
        for element in self.open:
            element[2] += data

    def all(self, *names: str) -> list:
        return [element for element in self.elements if element[0] in names]

    def of_class(self, name: str) -> list[str]:
        """Texts of the elements whose class attribute is ``name``."""
        return [text for _, attributes, text in self.elements if attributes.get('class') == name]

    def table(self, label: str) -> dict[str, list[str]]:
        """Row header -> cells; the column headers are under ''."""
        rows, inside = [], False
        for name, attributes, text in self.elements:
            if name == 'table':
                inside = attributes['aria-label'].startswith(label)
            elif inside and name == 'tr':
                rows.append([])
            elif inside and name in ('th', 'td'):
                rows[-1].append(text)
        assert rows, f'no table {label}'
        return {'' if number == 0 else row[0]: row[1:] for number, row in enumerate(rows)}


def make(*runs: Path, out: Path) -> Page:
    assert report.main([*map(str, runs), '--out', str(out)]) == 0
    return Page(out.read_text())


def edit(run: Path, **changes) -> Path:
    """Change entries of a run's metrics.json; ... removes an entry."""
    path = run / 'eval' / 'metrics.json'
    metrics = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in metrics.items() if value is not ...}))
    return run


@pytest.fixture(scope='module')
def folder(tmp_path_factory) -> Path:
    """Evaluated runs; do not modify."""
    root = tmp_path_factory.mktemp('runs')
    write_run(root / 'main', frames=120, samples=3)
    write_run(root / 'other', frames=120, error=12.0, seed=1, overrides=['MODEL.STAGES', '1'])
    write_run(root / 'middle', frames=60, error=5.0, seed=2, name='intaghand')
    for name in ('other', 'middle'):
        (root / name / 'eval' / 'samples.npz').unlink()  # drawing dominates the run time
    return root


@pytest.fixture(scope='module')
def page(folder) -> Page:
    return make(folder / 'main', out=folder / 'main.html')


@pytest.fixture(scope='module')
def metrics(folder) -> dict:
    return json.loads((folder / 'main' / 'eval' / 'metrics.json').read_text())


@pytest.fixture
def sampled(folder, tmp_path) -> Path:
    """A copy of a run to modify."""
    return Path(shutil.copytree(folder / 'main', tmp_path / 'main'))


@pytest.fixture
def run(sampled) -> Path:
    """A copy of a run to modify, without samples."""
    (sampled / 'eval' / 'samples.npz').unlink()
    return sampled


# ---------------------------------------------------------------------------------------------------------------------
# Content
# ---------------------------------------------------------------------------------------------------------------------


def test_page_has_all_sections_and_ordered_headings(page):
    assert [element[1]['id'] for element in page.all('section')] == SECTIONS
    assert {f'#{identity}' for identity in SECTIONS} < {element[1]['href'] for element in page.all('a')}
    levels = [int(element[0][1]) for element in page.all('h1', 'h2', 'h3', 'h4')]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after <= before + 1 for before, after in zip(levels, levels[1:]))
    assert len(page.all('main')) == len(page.all('header')) == len(page.all('nav')) == 1
    identities = [attributes['id'] for _, attributes, _ in page.elements if 'id' in attributes]
    assert len(identities) == len(set(identities))
    assert not [line for line in page.of_class('missing') if 'WebGL2' not in line]


def test_page_is_self_contained_and_its_policy_allows_only_its_script(page):
    assert not re.search(r'https?:|url\(|@import', page.text)
    assert not page.all('link', 'iframe', 'object') and len(page.all('img')) == 3 * 3
    assert all(element[1]['src'].startswith('data:image/jpeg;base64,') for element in page.all('img'))
    running = [element for element in page.all('script') if element[1].get('type') != 'application/json']
    digest = base64.b64encode(hashlib.sha256(running[0][2].encode()).digest()).decode()
    policy = next(element[1]['content'] for element in page.all('meta') if 'http-equiv' in element[1])
    assert len(running) == 1 and f"script-src 'sha256-{digest}'" in policy and "default-src 'none'" in policy
    assert not any(name.startswith('on') for element in page.elements for name in element[1])


def test_headline_table_matches_metrics_json(page, metrics):
    table = page.table('Metrics of the last stage')
    for title, key in (('joint mm', 'joint_mm'), ('vert px', 'vert_px'), ('PA joint mm', 'pa_joint_mm')):
        cell = table[title][0]
        assert cell.startswith(f'{metrics[key]["all"]:.2f}')
        assert f'left {metrics[key]["left"]:.2f}, right {metrics[key]["right"]:.2f}' in cell
    low, high = metrics['interval_95']['root_mm']
    assert table['root mm'][0] == f'{metrics["root_mm"]:.2f} [{low:.2f}, {high:.2f}]'
    assert table['PCK area'][0].startswith(f'{metrics["pck"]["auc"]["all"]:.4f}')
    assert metrics['protocol']['description'] in table['protocol'][0] and table['frames'][0].startswith('120 of data/')


def test_joints_fingers_stages_and_further_figures_match_metrics_json(page, metrics):
    fingers = page.table('Mean error by finger')
    assert list(fingers)[1:] == ['wrist', *FINGERS]
    for finger in FINGERS:
        assert fingers[finger] == [f'{metrics["per_finger_mm"][finger][side]:.2f}' for side in (*SIDES, 'all')]
    titles = [element[2] for element in page.all('title')]
    for name in JOINT_NAMES:
        for side in SIDES:
            assert f'{name.replace("_", " ")}: {metrics["per_joint_mm"][name][side]:.2f} mm' in titles
    stages = page.table('Errors of each stage')
    first, last = (metrics['stages'][stage]['joint_mm']['all'] for stage in (0, 1))
    assert len(stages) == 1 + STAGES
    assert stages['stage 1'][:2] == [f'{last:.2f}', f'{first - last:.2f}'] and stages['stage 0'][1] == '–'
    further = page.table('Further figures')
    assert further['segmentation IoU, left'] == ['0.8710']
    assert further['root placement in camera space, depth, mm'] == ['36.70']
    assert further['penetration, predicted: share of frames, %'] == [f'{100 * metrics["penetration"]["share"]:.1f}']


def test_interaction_tables_contain_every_bin_and_its_count(page, metrics):
    distance = page.table('Distance between the hands')
    for row in metrics['by_distance_mm']:
        cells = distance['50 and more' if row['to'] is None else f'{row["from"]:g} to {row["to"]:g}']
        assert cells[0] == str(row['frames'])
        assert cells[1] == (f'{row["joint_mm"]:.2f}' if row['frames'] else '–')
    visibility = page.table('Visibility')
    assert visibility[''] == ['hands', 'joint error', 'vert error'] and visibility['0 to 0.25'] == ['0', '–', '–']
    assert sum(int(cells[0]) for name, cells in page.table('Overlap').items() if name) == metrics['frames']


def test_glance_names_worst_joint_and_hardest_bin(page, metrics):
    items = [element[2] for element in page.all('li')]
    error, joint, side = max(
        (value[side], name, side) for name, value in metrics['per_joint_mm'].items() for side in SIDES
    )
    assert any(f'Worst joints: {side} {joint.replace("_", " ")} ({error:.2f} mm)' in line for line in items)
    row = max((row for row in metrics['by_box_iou'] if row['frames']), key=lambda row: row['joint_mm'])
    hardest = f'{row["from"]:g} to {row["to"]:g} (joint error {row["joint_mm"]:.2f} mm, {row["frames"]} frames)'
    assert any(line.startswith(f'Box IoU: hardest is {hardest}, easiest ') for line in items)


def test_quantiles_and_worst_samples_match_per_sample_csv(page, folder):
    with open(folder / 'main' / 'eval' / 'per_sample.csv') as file:
        rows = list(csv.DictReader(file))
    joint = np.array([(float(row['joint_mm_left']) + float(row['joint_mm_right'])) / 2 for row in rows])
    cells = page.table('Quantiles over frames')['joint error']
    assert cells == ['120', *(f'{value:.2f}' for value in (*np.quantile(joint, (0.5, 0.9, 0.99)), joint.max()))]
    worst = page.table('main: the 50 frames')
    assert list(worst)[1:] == [str(index) for index in np.argsort(-joint)[:50]]
    top = int(joint.argmax())
    assert worst[str(top)][0] == f'{joint[top]:.2f}' and worst[str(top)][-1] == rows[top]['file']


def test_missing_annotations_are_ignored(run, tmp_path):
    path = run / 'eval' / 'per_sample.csv'
    with open(path) as file:
        rows = list(csv.DictReader(file))
    for index, gone in ((0, ('joint_mm_left',)), (1, ('joint_mm_left', 'joint_mm_right')), (2, ('root_mm',))):
        rows[index] |= dict.fromkeys(gone, '')
    with open(path, 'w', newline='') as file:
        table = csv.DictWriter(file, rows[0])
        table.writeheader()
        table.writerows(rows)
    read = inputs.read_per_sample(path)
    assert read.error('joint_mm')[0] == float(rows[0]['joint_mm_right']) and np.isnan(read.error('joint_mm')[1])
    page = make(run, out=tmp_path / 'page.html')
    quantiles = page.table('Quantiles over frames')
    assert [quantiles[name][0] for name in ('joint error', 'vert error', 'root error')] == ['119', '120', '119']
    assert '1' not in page.table('main: the 50 frames')


def test_charts_have_titles_axes_and_descriptions(page):
    figures = [element for element in page.all('figure') if element[1].get('class') == 'chart']
    drawn = [element for element in page.all('svg') if element[1].get('role') == 'img']
    plots = [element for element in page.all('div') if element[1].get('class') == 'plot']
    assert len(figures) == len(plots) > 20
    assert all(len(element[1]['aria-label']) > 20 for element in drawn)
    assert len([element for element in page.all('text') if element[1].get('class') == 'title']) == 2 * len(plots)
    for _, attributes, _ in plots:
        places = [place for place, _ in json.loads(attributes['data-stops'])]
        assert places == sorted(places) and places[0] >= 0 and places[-1] <= charts.WIDTH


def test_single_validation_is_drawn_as_one_dot_per_stage(run, tmp_path):
    log = run / 'log.jsonl'
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    last = max(line['step'] for line in lines if line['kind'] == 'val_stage0')
    kept = [line for line in lines if line['kind'] == 'train' or line['step'] == last]
    log.write_text(''.join(json.dumps(line) + '\n' for line in kept))
    page = make(edit(run, model=str(run)), out=tmp_path / 'page.html')
    chart = page.text.partition('Validation joint error by stage')[2].partition('</figure>')[0]
    assert chart.count('class="dot') == STAGES


def test_cards_show_input_prediction_and_ground_truth(page, folder):
    with np.load(folder / 'main' / 'eval' / 'samples.npz') as samples:
        crop = samples['image'][0].astype(int)
    images = [
        cv2.imdecode(
            np.frombuffer(base64.b64decode(element[1]['src'].partition(',')[2]), np.uint8), cv2.IMREAD_COLOR
        ).astype(int)
        for element in page.all('img')[:3]
    ]
    assert [image.shape for image in images] == [(256, 256, 3)] * 3
    distance = [np.abs(image - crop).mean() for image in images]
    assert distance[0] < 3 < min(distance[1:]) and np.abs(images[1] - images[2]).mean() > 1
    assert [element[1]['alt'] for element in page.all('img')[:3]] == [
        f'worst 1: {what}' for what in ('input', 'prediction', 'ground truth')
    ]


def test_embedded_meshes_are_accurate_to_a_hundredth_of_a_millimetre(page, folder):
    meshes = json.loads(next(element[2] for element in page.all('script') if element[1].get('id') == 'meshes'))
    with np.load(folder / 'main' / 'eval' / 'samples.npz') as samples:
        vertices, truth, roots = (samples[name] for name in ('vertices', 'true_vertices', 'true_roots'))
        offset, faces = samples['offset'], samples['faces']
    shown = meshes['runs']['0']
    assert [base64.b64decode(text) for text in shown['faces']] == [side.astype('<u2').tobytes() for side in faces]
    for number, sample in enumerate(shown['samples']):
        for text, mesh in zip(
            (*sample['stages'], sample['truth']), (*vertices[number], truth[number] - roots[number, :, None])
        ):
            values = np.frombuffer(base64.b64decode(text), '<i2').reshape(2, 778, 3) * sample['step']
            np.testing.assert_allclose(values, 1000 * mesh, atol=0.01)
        np.testing.assert_allclose(sample['offsets'], 1000 * offset[number], atol=0.001)
        np.testing.assert_allclose(sample['true_offset'], 1000 * (roots[number, 1] - roots[number, 0]), atol=0.001)


# ---------------------------------------------------------------------------------------------------------------------
# Several runs
# ---------------------------------------------------------------------------------------------------------------------


def test_comparable_runs_show_config_differences_and_best_values(folder, tmp_path):
    page = make(folder / 'main', folder / 'other', out=tmp_path / 'two.html')
    table = page.table('Metrics of the last stage')
    assert table[''] == ['main', 'other'] and table['differs from main in'] == ['–', 'MODEL.STAGES 1']
    best = page.of_class('best')
    assert len(best) == 8 and table['joint mm'][0].startswith(best[0])  # one per metric
    assert 'Not all columns' not in page.text
    assert page.table('Mean error by finger')['thumb, other']


def test_incomparable_runs_are_marked_and_not_ranked_together(folder, tmp_path):
    page = make(folder / 'main', folder / 'middle', folder / 'other', out=tmp_path / 'three.html')
    table = page.table('Metrics of the last stage')
    assert table[''] == ['main [A]', 'middle [B]', 'other [A]'] and table['group'] == ['A', 'B', 'A']
    assert 'Not all columns are comparable' in page.text
    best = page.of_class('best')
    assert len(best) == 8 and not any(
        table[title][1].startswith(figure) for figure in best for title in ('joint mm', 'vert mm', 'root mm')
    )  # middle has lower errors, but under another protocol
    assert any('middle [B]' in element[2] for element in page.all('li'))  # in the legends too


# ---------------------------------------------------------------------------------------------------------------------
# Missing and damaged files
# ---------------------------------------------------------------------------------------------------------------------


def test_the_command_that_creates_a_file_repeats_the_evaluation(run, tmp_path):
    (run / 'eval/per_sample.csv').unlink()
    protocol = json.loads((run / 'eval/metrics.json').read_text())['protocol'] | {'name': 'acr', 'split': 'val'}
    page = make(edit(run, data='{data/a,data/b}/val', protocol=protocol), out=tmp_path / 'page.html')
    assert f"--data_path '[data/a, data/b]' --protocol acr --split val --out {run}/eval" in page.of_class('missing')[0]
    for more in ({'subset': {'description': 'capture 3'}}, {'protocol': protocol | {'name': 'internet'}}):
        page = make(edit(run, **more), out=tmp_path / 'page.html')
        assert f'--out {run}/eval …' in page.of_class('missing')[0]


@pytest.mark.parametrize(
    'file, sections_without', [('eval/per_sample.csv', 2), ('eval/samples.npz', 1), ('log.jsonl', 1)]
)
def test_missing_file_is_reported_with_the_command_that_creates_it(run, tmp_path, file, sections_without):
    (run / file).unlink(missing_ok=True)
    page = make(edit(run, model='somewhere/model.pth'), out=tmp_path / 'page.html')
    command = (
        'python train.py'
        if file == 'log.jsonl'
        else (
            f'python apps/eval_interhand.py --model somewhere/model.pth --data_path data/interhand2.6m --out {run}/eval'
        )
    )
    lines = [line for line in page.of_class('missing') if Path(file).name in line]
    assert len(lines) == sections_without and all(command in line for line in lines)
    assert [element[1]['id'] for element in page.all('section')] == SECTIONS


def test_missing_metrics_are_reported(run, tmp_path):
    gone = (
        'by_visibility',
        'placement_mm',
        'stages',
        'pck',
        'per_joint_mm',
        'per_finger_mm',
        'by_box_iou',
        'by_distance_mm',
        'penetration',
        'interval_95',
        'pa_joint_mm',
    )
    page = make(edit(run, **dict.fromkeys(gone, ...), segmentation_iou=None), out=tmp_path / 'page.html')
    lines = page.of_class('missing')
    for key in gone[:-2]:
        assert any(f'{key} in ' in line and 'eval_interhand.py' in line for line in lines), key
    assert 'main: segmentation_iou was not measured.' in lines
    assert page.table('Metrics of the last stage')['PA joint mm'] == ['–']


def test_metrics_json_alone_is_enough(folder, tmp_path):
    (tmp_path / 'eval').mkdir()
    shutil.copy(folder / 'main' / 'eval' / 'metrics.json', tmp_path / 'eval')
    page = make(edit(tmp_path, model='best constant prediction', training=...), out=tmp_path / 'page.html')
    assert not page.all('dialog', 'img') and page.table('Mean error by finger')
    assert any('python apps/eval_baseline.py --cfg CFG --data_path' in line for line in page.of_class('missing'))


def test_log_is_read_from_the_evaluated_models_folder(folder, run, tmp_path, monkeypatch):
    monkeypatch.chdir(folder)
    (run / 'log.jsonl').unlink()
    for model in ('other', 'other/best.pth'):
        page = make(edit(run, model=model), out=tmp_path / 'page.html')
        assert 'main: from other/log.jsonl' in [element[2] for element in page.all('p')]


def test_the_log_of_another_run_is_not_shown(run, tmp_path):
    record, other = ({'sessions': [{'started': time, 'command': 'train.py'}]} for time in ('Monday', 'Tuesday'))
    (run / 'run.json').write_text(json.dumps(record))
    for changes, found in (
        ({'model': 'best constant prediction', 'training': ..., 'trained': None}, False),
        ({'model': str(tmp_path / 'other/best.pth'), 'training': {}, 'trained': other}, False),
        ({'model': str(run / 'best.pth'), 'trained': other}, False),  # the folder was trained in again
        ({'model': str(run), 'trained': record}, True),
        ({'model': 'elsewhere/best.pth', 'trained': record}, True),  # moved
        ({'model': 'elsewhere/best.pth', 'trained': None}, False),
        ({'model': 'elsewhere/main/best.pth', 'trained': None}, True),
    ):
        log = inputs.find_log(read_runs([str(edit(run, **changes))])[0])
        assert log == (run / 'log.jsonl' if found else None), changes


def test_log_with_a_truncated_last_line_is_read(run, tmp_path):
    with open(run / 'log.jsonl', 'a') as file:
        file.write('{"kind": "train", "st')
    page = make(run, out=tmp_path / 'page.html')
    assert 'Training loss' in [element[2] for element in page.all('figcaption')]


@pytest.mark.parametrize(
    'changes, message',
    [
        ({'version': 99}, 'version'),
        ({'joint_mm': 3}, 'joint_mm'),
        ({'frames': None}, 'frames'),
        ({'data': ...}, 'data'),
        ({'pck': {'auc': 1}}, 'pck'),
        ({'stages': [{}]}, 'stages'),
        ({'by_distance_mm': [{'from': '0'}]}, 'by_distance_mm'),
        ({'interval_95': {'joint_mm': {'all': [1]}}}, 'interval_95'),
        ({'protocol': {}}, 'protocol'),
        ({'by_box_iou': [{'from': None, 'to': 1, 'frames': 0}]}, 'by_box_iou'),
        ({'config': 'x'}, 'config'),
        ({'per_joint_mm': {'wrist': 1}}, 'per_joint_mm'),
    ],
)
def test_malformed_metrics_give_a_one_line_error(run, tmp_path, capsys, changes, message):
    edit(run, **changes)
    check_error(run, tmp_path, capsys, message, run / 'eval' / 'metrics.json')


@pytest.mark.parametrize(
    'damage',
    [
        lambda text: '',
        lambda text: text[:-30],
        lambda text: text.replace('root_mm', 'else'),
        lambda text: re.sub(r',\d+\.', ',x.', text, count=1),
        lambda text: text.splitlines()[0],
        lambda text: '\x00' + text,
    ],
)
def test_damaged_per_sample_table_gives_a_one_line_error(run, tmp_path, capsys, damage):
    path = run / 'eval' / 'per_sample.csv'
    path.write_text(damage(path.read_text()))
    check_error(run, tmp_path, capsys, 'per-sample errors', path)


def changed(name, change):
    return lambda arrays: arrays | {name: change(arrays[name])}


@pytest.mark.parametrize(
    'damage, message',
    [
        (lambda arrays: {name: values for name, values in arrays.items() if name != 'faces'}, 'damaged'),
        (changed('version', lambda a: np.array(2)), 'version 2'),
        (changed('version', lambda a: np.array([1, 1])), 'damaged'),
        (changed('image', lambda a: a[:, :100]), 'image'),
        (changed('image', lambda a: a.astype(np.uint16)), 'image'),
        (lambda arrays: {name: a[:0] if a.ndim and name != 'faces' else a for name, a in arrays.items()}, 'index'),
        (changed('vertices', lambda a: a * np.nan), 'vertices'),
        (changed('vertices', lambda a: a[:, :0]), 'vertices'),
        (changed('faces', lambda a: a + 700), 'faces'),
        (changed('kind', lambda a: np.full(len(a), 'odd')), 'kind'),
        (changed('offset', lambda a: a[1:]), 'offset'),
        (changed('root_mm', lambda a: np.array('x')), 'root_mm'),
    ],
)
def test_malformed_samples_give_a_one_line_error(sampled, tmp_path, capsys, damage, message):
    path = sampled / 'eval' / 'samples.npz'
    with np.load(path) as archive:
        arrays = dict(archive)
    np.savez_compressed(path, **damage(arrays))
    check_error(sampled, tmp_path, capsys, message, path)


@pytest.mark.parametrize(
    'damage',
    [
        lambda content: content[:-1000],
        lambda content: b'',
        lambda content: b'nonsense',
        lambda content: content[:5000] + bytes(2000) + content[7000:],
    ],
)
def test_damaged_samples_file_gives_a_one_line_error(sampled, tmp_path, capsys, damage):
    path = sampled / 'eval' / 'samples.npz'
    path.write_bytes(damage(path.read_bytes()))
    check_error(sampled, tmp_path, capsys, 'damaged', path)


@pytest.mark.parametrize('line', ['{"kind": "train"}', '{nonsense}', '{"kind": 3, "step": 4}'])
def test_damaged_log_gives_a_one_line_error(run, tmp_path, capsys, line):
    path = run / 'log.jsonl'
    path.write_text(f'{line}\n{path.read_text()}')
    check_error(edit(run, model=str(run)), tmp_path, capsys, 'not a training record', path)


def check_error(run: Path, tmp_path: Path, capsys, message: str, path: Path) -> None:
    out = tmp_path / 'page.html'
    assert report.main([str(run), '--out', str(out)]) == 2
    error = capsys.readouterr().err
    assert message in error and str(path) in error and error.count('\n') == 1 and not out.exists()


def test_the_origin_of_the_figures_is_shown(folder, run, tmp_path):
    record = run_record(seed=3, hand_model='standin', data={'train': {'samples': 40, 'digest': 'abc'}}, device='cpu')
    edit(run, trained=record, evaluated=record | {'data': {'test': {'samples': 120, 'digest': 'def'}}})
    page = make(run, folder / 'other', out=tmp_path / 'page.html')
    training, evaluation = page.table('Training: code'), page.table('Evaluation: code')
    assert training[''] == ['main [A]', 'other [B]'] and training['seed'] == ['3', '–']
    assert training['data, train'] == ['40 samples, digest abc', '–'] and training['record'] == ['–', 'none']
    assert f'torch {torch.__version__}' in training['packages'][0]
    assert evaluation['data, test'] == ['120 samples, digest def', '–']


@pytest.mark.parametrize(
    'record', [3, [], {'sessions': [7]}, {'sessions': [{'code': 'x', 'machine': [], 'starts': []}]}]
)
def test_a_foreign_record_is_none(run, tmp_path, record):
    page = make(edit(run, trained=record, evaluated=record), out=tmp_path / 'page.html')
    assert page.table('Training: code')['record'] == ['none']


# ---------------------------------------------------------------------------------------------------------------------
# Escaping
# ---------------------------------------------------------------------------------------------------------------------


def test_markup_in_input_files_is_escaped(folder, sampled, tmp_path):
    path = sampled / 'eval' / 'per_sample.csv'
    with open(path) as file:
        rows = list(csv.reader(file))
    with open(path, 'w', newline='') as file:
        csv.writer(file).writerows([rows[0], *([index, HOSTILE, *more] for index, _, *more in rows[1:])])
    samples = sampled / 'eval' / 'samples.npz'
    with np.load(samples) as archive:
        arrays = dict(archive)
    np.savez_compressed(samples, **arrays | {'name': np.full(len(arrays['name']), HOSTILE)})
    log = (sampled / 'log.jsonl').read_text().replace('lovasz', json.dumps(HOSTILE)[1:-1])
    (sampled / 'log.jsonl').write_text(log)
    metrics = json.loads((sampled / 'eval' / 'metrics.json').read_text())
    edit(
        sampled,
        data=f'{HOSTILE}/test',
        model=HOSTILE,
        subset={'description': HOSTILE},
        protocol=metrics['protocol'] | {'name': HOSTILE},
        config=metrics['config'] | {HOSTILE: HOSTILE},
        by_visibility=...,
        trained={'seed': HOSTILE, 'data': {HOSTILE: {'samples': HOSTILE}}, 'sessions': [{'command': HOSTILE}]},
    )
    hostile = tmp_path / '<img src=x onerror=alert(3)>'
    sampled.rename(hostile)
    page = make(hostile, folder / 'other', out=tmp_path / 'page.html')
    assert len(page.all('script')) == 2 and all('onerror' not in element[1] for element in page.elements)
    assert all(element[1]['src'].startswith('data:') for element in page.all('img'))
    assert page.of_class('file').count(HOSTILE) == 50 + 3 and hostile.name in page.all('h1')[0][2]
    assert HOSTILE in page.table('Metrics of')['protocol'][0]
    assert page.table('Training: code')['command'][0] == HOSTILE


def test_templates_escape_text_and_data_of_scripts():
    template = environment().from_string(
        '<p title="{{ text }}">{{ text }}</p><script>{{ {"a": text} | tojson }}</script>'
    )
    text = '<b>"&\'</script><!--'
    page = Page(template.render(text=text))
    assert [(name, attributes.get('title'), content) for name, attributes, content in page.elements] == [
        ('p', text, text),
        ('script', None, page.elements[1][2]),
    ]
    assert json.loads(page.elements[1][2]) == {'a': text} and '<' not in page.elements[1][2]


def test_lone_surrogates_are_replaced(run, tmp_path):
    page = make(edit(run, data='lone \ud800 surrogate/test'), out=tmp_path / 'page.html')
    assert 'lone ? surrogate' in page.text


# ---------------------------------------------------------------------------------------------------------------------
# Charts and colours
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('highest', [0.0, 1e-6, 0.3, 1.0, 7.3, 99.0, 12345.6])
def test_axes_end_at_round_numbers_above_the_values(highest):
    axis = axis_to('mm', highest)
    ticks = axis.ticks()
    assert axis.high >= highest and 2 <= len(ticks) <= charts.TICKS + 2
    assert ticks[0] == 0 and ticks[-1] == pytest.approx(axis.high)


@pytest.mark.parametrize('low, high', [(0.4, 6.0), (0.001, 900.0), (2.2, 2.9)])
def test_logarithmic_ticks_lie_within_the_axis(low, high):
    axis = Axis('loss', low, high, logarithmic=True)
    assert all(low <= tick <= high for tick in axis.ticks())
    assert (
        axis.share(low) == 0
        and axis.share(high) == pytest.approx(1)
        and axis.share((low * high) ** 0.5) == (pytest.approx(0.5))
    )


def test_line_chart_skips_gaps_and_provides_values():
    chart = line_chart('t', Axis('x, mm', 0, 10), Axis('y', 0, 4), [Series('a', 0, [0, 5, 10], [1.0, None, 4.0])])
    assert [text for _, text in chart.stops] == ['x 0\na: 1.0', 'x 5\na: –', 'x 10\na: 4.0']
    path = chart.shapes[0].line
    assert path.count('L') == 1 and path.endswith(f'{charts.RIGHT:.1f} {charts.TOP:.1f}')


def test_learning_curves_are_averaged_down():
    records = [{'step': step, 'total': float(step)} for step in range(10000)]
    thinned = sections.curve('a', 0, records, 'total')
    assert len(thinned.x) == sections.CURVE_POINTS and thinned.x == pytest.approx(thinned.y)
    assert np.mean(thinned.y) == pytest.approx(np.mean(range(10000)))


def test_joints_of_the_diagram_do_not_overlap_and_lie_inside():
    places = np.array(hands.PLACES)
    apart = np.linalg.norm(places[:, None] - places[None], axis=-1) + 1e3 * np.eye(len(places))
    assert len(places) == len(JOINT_NAMES) and apart.min() >= 2 * hands.RADII[1]
    assert (places >= hands.RADII[1]).all() and (places + hands.RADII[1] <= (hands.WIDTH, hands.HEIGHT)).all()
    lightness = [sum(hands.ramp(share / 20)) for share in range(21)]
    assert lightness == sorted(lightness, reverse=True)  # distinguishable in greyscale


def contrast(a, b) -> float:
    """WCAG 2 contrast ratio of two RGB colours."""
    lights = sorted(
        sum(
            weight * (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4)
            for weight, c in zip((0.2126, 0.7152, 0.0722), np.array(colour) / 255)
        )
        for colour in (a, b)
    )
    return (lights[1] + 0.05) / (lights[0] + 0.05)


def test_colours_have_enough_contrast_in_light_and_dark_themes():
    style = (Path(sections.__file__).parent / 'page.css').read_text()
    colours = {
        name: [tuple(bytes.fromhex(value)) for value in pair]
        for name, *pair in re.findall(r'--([\w-]+): light-dark\(#(\w{6}), #(\w{6})\)', style)
    }
    assert {'page', 'surface', 'ink', 'quiet', 'accent', 'note', 'series-5'} <= set(colours)
    for mode in (0, 1):
        for text in ('ink', 'quiet', 'accent'):
            assert all(contrast(colours[text][mode], colours[ground][mode]) >= 4.5 for ground in ('page', 'surface'))
        assert contrast(colours['ink'][mode], colours['note'][mode]) >= 4.5
        for slot in range(charts.COLOURS):
            assert contrast(colours[f'series-{slot}'][mode], colours['surface'][mode]) >= 3
    for share in range(101):
        colour = hands.ramp(share / 100)
        assert contrast(colour, (0, 0, 0) if hands.ink(colour) == '#000' else (255, 255, 255)) >= 4.5


def test_group_letters_are_unique():
    names = [inputs.letters(position) for position in range(60)]
    assert names[:3] == ['A', 'B', 'C'] and len(set(names)) == 60
