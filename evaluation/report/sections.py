"""The sections of the page, each from all runs. A run has its colour throughout; what it lacks is said in a line."""

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from evaluation.report.charts import Axis, Series, axis_of, bar_chart, line_chart, sparkline
from evaluation.report.hands import hand_diagram, spoken
from evaluation.report.html import Html, joined, number, scrolling_table, tag
from evaluation.report.inputs import OPTIONAL_COLUMNS, Evaluated, PerSample, value_of
from evaluation.report.samples import Pictures
from evaluation.runs import FIGURES, differences, figure
from utils.hand import FINGERS, JOINT_NAMES, SIDES

WORST = 50  # rows of the table of worst samples
BINS = 40  # of a histogram
TAIL = 0.995  # the share of frames that a histogram's axis covers
CURVE_POINTS = 200  # of a learning curve, each the mean of its neighbours
QUANTILES = (0.5, 0.9, 0.99)
ERRORS: dict[str, Callable[[PerSample], np.ndarray]] = {
    'joint error': PerSample.joint_mm,
    'vert error': PerSample.vert_mm,
    'root error': PerSample.root_mm,
}
HEADLINE = {'joint error': ('joint_mm', 'all'), 'vert error': ('vert_mm', 'all'), 'root error': ('root_mm',)}
NOT_LOSSES = frozenset(('kind', 'step', 'epoch', 'lr', 'samples_per_second', 'waiting_for_data', 'total'))


def section(identity: str, title: str, *children: Any) -> Html:
    return tag(
        'section', tag('h2', title, id=f'{identity}-title'), *children, id=identity, aria_labelledby=f'{identity}-title'
    )


def charts(*drawn: Any) -> Html:
    return tag('div', *drawn, class_='charts')


def lacks(run: Evaluated, what: str, *, evaluation: bool = True) -> Html:
    """The line that stands for what is missing."""
    return tag(
        'p',
        f'{run.label}: {what} is missing. It is made by ',
        tag('code', run.command(evaluation=evaluation)),
        '.',
        class_='missing',
    )


def having(runs: list[Evaluated], key: str) -> tuple[list[Evaluated], Html]:
    """The runs whose metrics have ``key``, and lines about those that do not."""
    found = [run for run in runs if run.metrics.get(key)]
    return found, joined(
        tag('p', f'{run.label}: {key} was not measured.', class_='missing')
        if key in run.metrics
        else lacks(run, f'{key} in {run.run.path}')
        for run in runs
        if run not in found
    )


def named(what: str, run: Evaluated, runs: list[Evaluated]) -> str:
    """A row's name: with its run's where there are several."""
    return f'{what}, {run.label}' if len(runs) > 1 else what


# ---------------------------------------------------------------------------------------------------------------------
# Figures
# ---------------------------------------------------------------------------------------------------------------------


def headline(runs: list[Evaluated]) -> Html:
    groups = {run.group for run in runs}
    warning = (
        tag(
            'p',
            tag('strong', 'Not all columns can be compared. '),
            'Runs with different letters were measured '
            'in different protocols or on different frames; bold marks the best figure among runs of one letter.',
            class_='warning',
        )
        if len(groups) > 1
        else None
    )
    rows = [['group', *(run.group for run in runs)]] if warning else []
    rows += [
        ['protocol', *(f'{run.metrics["protocol"]["name"]}: {run.metrics["protocol"]["description"]}' for run in runs)],
        ['frames', *(_frames(run) for run in runs)],
    ]
    if len(runs) > 1:
        rows.append(
            [f'differs from {runs[0].run.name} in', *(differences(run.run, runs[0].run) or '–' for run in runs)]
        )
    rows += [[title, *(_figure_cell(run, runs, title) for run in runs)] for title in FIGURES]
    table = scrolling_table(
        'Figures of the last stage. In brackets the 95 % interval over frames, below it each hand.',
        ['', *(run.label for run in runs)],
        rows,
        class_='headline',
    )
    return section('figures', 'Figures', warning, table, joined(map(glance, runs)))


def _frames(run: Evaluated) -> Html:
    subset = run.metrics.get('subset')
    return joined(
        [
            f'{run.metrics["frames"]:,} of ',
            tag('span', run.metrics['data'], class_='file'),
            f', {subset["description"]}' if subset else None,
        ]
    )


def _figure_cell(run: Evaluated, runs: list[Evaluated], title: str) -> Html:
    keys, area = FIGURES[title], title == 'PCK area'
    value, digits = figure(run.metrics, keys), 4 if area else 2
    rivals = [figure(other.metrics, keys) for other in runs if other.group == run.group]
    rivals = [rival for rival in rivals if rival is not None]
    best = len(rivals) > 1 and value == (max if area else min)(rivals)
    interval = figure(run.metrics, ('interval_95', *keys))
    hands = figure(run.metrics, keys[:-1]) if keys[-1] == 'all' else None
    parts = [tag('strong' if best else 'span', number(value, digits), class_='best' if best else None)]
    if interval:
        parts.append(tag('span', f' [{number(interval[0], digits)}, {number(interval[1], digits)}]', class_='quiet'))
    if hands:
        parts.append(tag('span', ', '.join(f'{side} {number(hands[side], digits)}' for side in SIDES), class_='hands'))
    return joined(parts)


def glance(run: Evaluated) -> Html:
    """Where this run fails, in a few sentences of its own figures."""
    metrics, said = run.metrics, []
    if joints := metrics.get('per_joint_mm'):
        known = [
            (joints[name][side], f'{side} {spoken(name)}')
            for name in JOINT_NAMES
            for side in SIDES
            if joints[name][side] is not None
        ]
        if known:
            said.append(
                'Joints: worst are the '
                + ', the '.join(f'{name} ({number(value)} mm)' for value, name in sorted(known, reverse=True)[:3])
                + '.'
            )
    if run.per_sample:
        median, high, tail = quantiles(run.per_sample.joint_mm())
        said.append(
            f'Frames: half have a joint error above {number(median)} mm, one in ten above {number(high)} mm, '
            f'one in a hundred above {number(tail)} mm.'
        )
    for key, what in (
        ('by_distance_mm', 'Distance between the hands, mm'),
        ('by_box_iou', 'Box IoU'),
        ('by_visibility', 'Visible share of a hand'),
    ):
        counted = BINNED[key].counted
        rows = [
            (value, f'{span_of(row)} (joint error {number(value)} mm, {row[counted]:,} {counted})')
            for row in metrics.get(key) or []
            if (value := value_of(row, 'joint_mm')) is not None
        ]
        if len(rows) > 1:
            said.append(f'{what}: hardest is {max(rows)[1]}, easiest {min(rows)[1]}.')
    if not said:
        return Html()
    return tag('div', tag('h3', f'{run.label} at a glance'), tag('ul', *(tag('li', text) for text in said)))


# ---------------------------------------------------------------------------------------------------------------------
# Distributions and curves
# ---------------------------------------------------------------------------------------------------------------------


def distributions(runs: list[Evaluated]) -> Html:
    found = [run for run in runs if run.per_sample]
    missing = joined(lacks(run, 'per_sample.csv') for run in runs if not run.per_sample)
    if not found:
        return section('distribution', 'Distribution of errors', missing)
    errors = {title: {run.slot: _finite(pick(run.per_sample)) for run in found} for title, pick in ERRORS.items()}
    rows = [
        [
            named(title, run, runs),
            f'{len(errors[title][run.slot]):,}',
            *(number(value) for value in quantiles(errors[title][run.slot])),
            number(errors[title][run.slot].max(initial=0.0)),
        ]
        for title in ERRORS
        for run in found
    ]
    head = ['mm', 'frames', 'median', '90 %', '99 %', 'greatest']
    return section(
        'distribution',
        'Distribution of errors',
        missing,
        tag('p', 'Each frame counts with the mean of its two hands. At most the greatest 0.5 % lie beyond the charts.'),
        charts(*(chart for title in ERRORS for chart in _distribution(title, found, errors[title]))),
        scrolling_table('Quantiles over frames, mm', head, rows),
    )


def _finite(values: np.ndarray) -> np.ndarray:
    return values[np.isfinite(values)]


def quantiles(values: np.ndarray) -> list[float]:
    values = _finite(values)
    return np.quantile(values, QUANTILES).tolist() if len(values) else [float('nan')] * len(QUANTILES)


def _distribution(title: str, runs: list[Evaluated], errors: dict[int, np.ndarray]) -> list[Html]:
    top = max((float(np.quantile(values, TAIL)) for values in errors.values() if len(values)), default=0.0)
    x_axis = axis_of(f'{title}, mm', [Series('', 0, [], [top])])
    edges = np.linspace(0, x_axis.high, BINS + 1)
    shares, sums = [], []
    for run in runs:
        values = errors[run.slot]
        counts = np.histogram(values, edges)[0]
        within = np.searchsorted(np.sort(values), edges, side='right')
        shares.append(Series(run.label, run.slot, edges[:-1].tolist(), _percent(counts, len(values))))
        sums.append(Series(run.label, run.slot, edges.tolist(), _percent(within, len(values))))
    name = title.capitalize()
    return [
        line_chart(f'{name}: histogram', x_axis, axis_of('share of frames, %', shares), shares, steps=edges[1].item()),
        line_chart(f'{name}: cumulative', x_axis, Axis('frames with at most this error, %', 0, 100), sums),
    ]


def _percent(counts: np.ndarray, total: int) -> list[float]:
    return (100 * counts / max(total, 1)).tolist()


def pck(runs: list[Evaluated]) -> Html:
    found, missing = having(runs, 'pck')
    drawn = []
    for side in SIDES:
        series = [
            Series(
                run.label,
                run.slot,
                run.metrics['pck']['thresholds_mm'],
                [None if share is None else 100 * share for share in run.metrics['pck'][side]],
            )
            for run in found
        ]
        if series:
            x_axis = Axis('threshold, mm', 0, max((x for one in series for x in one.x), default=1))
            drawn.append(
                line_chart(f'PCK, {side} hand', x_axis, Axis('joints within the threshold, %', 0, 100), series)
            )
    rows = [[run.label, *(number(run.metrics['pck']['auc'][side], 4) for side in (*SIDES, 'all'))] for run in found]
    return section(
        'pck',
        'Share of correct joints',
        missing,
        charts(*drawn),
        scrolling_table('Area under the PCK curve', ['run', *SIDES, 'all'], rows) if rows else None,
    )


def hands(runs: list[Evaluated]) -> Html:
    found, missing = having(runs, 'per_joint_mm')
    values = [
        value[side]
        for run in found
        for value in run.metrics['per_joint_mm'].values()
        for side in SIDES
        if value[side] is not None
    ]
    span = (min(values, default=0.0), max(values, default=0.0))
    drawn = [
        hand_diagram(f'{run.label}: {side} hand', run.metrics['per_joint_mm'], hand, span)
        for run in found
        for hand, side in enumerate(SIDES)
    ]
    fingered, missing_fingers = having(runs, 'per_finger_mm')
    rows = [
        [named(finger, run, runs), *(number(run.metrics['per_finger_mm'][finger][side]) for side in (*SIDES, 'all'))]
        for finger in ('wrist', *FINGERS)
        for run in fingered
    ]
    return section(
        'joints',
        'Joints and fingers',
        missing,
        tag('p', 'Mean error of each joint in mm; hands are seen from their backs, and share one scale of colours.')
        if drawn
        else None,
        charts(*drawn),
        missing_fingers,
        scrolling_table('Mean error by finger, mm', ['mm', *SIDES, 'all'], rows) if fingered else None,
    )


def stages(runs: list[Evaluated]) -> Html:
    found, missing = having(runs, 'stages')
    last = max((len(run.metrics['stages']) - 1 for run in found), default=0)
    x_axis = Axis('stage (0 is the initial estimate)', -0.2, last + 0.2, whole=True)
    drawn = []
    for title, keys in HEADLINE.items() if found else ():
        series = [
            Series(
                run.label,
                run.slot,
                list(range(len(run.metrics['stages']))),
                [figure(stage, keys) for stage in run.metrics['stages']],
            )
            for run in found
        ]
        drawn.append(
            line_chart(f'{title.capitalize()} by stage', x_axis, axis_of('mm', series, digits=2), series, marks=True)
        )
    head = ['mm', *(cell for title in HEADLINE for cell in (title, 'gain'))]
    rows = [row for run in found for row in _stage_rows(run, runs)]
    return section(
        'stages',
        'Gain of each stage',
        missing,
        charts(*drawn),
        scrolling_table('Errors of each stage and what it gains over the one before, mm', head, rows) if rows else None,
    )


def _stage_rows(run: Evaluated, runs: list[Evaluated]) -> list[list[str]]:
    rows, before = [], [None] * len(HEADLINE)
    for count, stage in enumerate(run.metrics['stages']):
        figures = [figure(stage, keys) for keys in HEADLINE.values()]
        gains = [None if None in (old, new) else old - new for old, new in zip(before, figures)]
        rows.append(
            [named(f'stage {count}', run, runs), *(number(value) for pair in zip(figures, gains) for value in pair)]
        )
        before = figures
    return rows


# ---------------------------------------------------------------------------------------------------------------------
# Interaction and visibility
# ---------------------------------------------------------------------------------------------------------------------


class Binned(NamedTuple):
    """How one of the tables of metrics.json is shown."""

    title: str
    by: str  # the axis
    short: str  # in the charts' titles
    counted: str  # what a row counts: frames or hands
    errors: tuple[str, ...]


BINNED = {
    'by_box_iou': Binned('Overlap of the hands’ boxes in the picture', 'box IoU', 'overlap', 'frames', tuple(HEADLINE)),
    'by_distance_mm': Binned(
        'Distance between the hands', 'smallest distance, mm', 'distance', 'frames', tuple(HEADLINE)
    ),
    'by_visibility': Binned(
        'Visibility', 'share of a hand not hidden by the other', 'visibility', 'hands', ('joint error', 'vert error')
    ),
}


def span_of(row: dict[str, Any]) -> str:
    return f'{row["from"]:g} and more' if row['to'] is None else f'{row["from"]:g} to {row["to"]:g}'


def interaction(runs: list[Evaluated]) -> Html:
    return section('interaction', 'Interaction and visibility', *(_binned(runs, key) for key in BINNED))


def _binned(runs: list[Evaluated], key: str) -> Html:
    title, by, short, counted, errors = BINNED[key]
    found, missing = having(runs, key)
    tables = {run.slot: {span_of(row): row for row in run.metrics[key]} for run in found}
    spans = list(dict.fromkeys(span for table in tables.values() for span in table))
    drawn = []
    for error in errors if found else ():
        name = HEADLINE[error][0]
        series = [
            Series(
                run.label,
                run.slot,
                list(range(len(spans))),
                [value_of(tables[run.slot].get(span, {}), name) for span in spans],
            )
            for run in found
        ]
        categories = [
            (
                span.replace(' to ', '–').replace(' and more', '+'),
                ', '.join(f'{tables[run.slot].get(span, {}).get(counted, 0):,} {counted}' for run in found),
            )
            for span in spans
        ]
        drawn.append(
            bar_chart(f'{error.capitalize()} by {short}', by, categories, axis_of('mm', series, digits=2), series)
        )
    rows = [
        [named(span, run, runs), *_binned_cells(tables[run.slot].get(span, {}), counted, errors)]
        for span in spans
        for run in found
    ]
    return tag(
        'div',
        tag('h3', title),
        missing,
        charts(*drawn),
        scrolling_table(f'{title}: {counted} and mean errors, mm', [by, counted, *errors], rows) if rows else None,
    )


def _binned_cells(row: dict[str, Any], counted: str, errors: tuple[str, ...]) -> list[str]:
    return [f'{row.get(counted, 0):,}', *(number(value_of(row, HEADLINE[error][0])) for error in errors)]


# ---------------------------------------------------------------------------------------------------------------------
# Learning curves
# ---------------------------------------------------------------------------------------------------------------------


def learning(runs: list[Evaluated]) -> Html:
    found = [run for run in runs if run.log and (run.log.train or run.log.validation)]
    missing = joined(
        lacks(run, 'log.jsonl of its training', evaluation=False)
        if run.metrics.get('training')
        else tag('p', f'{run.label}: was not trained here.', class_='missing')
        for run in runs
        if run not in found
    )
    drawn = [
        chart
        for chart in (
            _curves('Training loss', 'loss', found, 'total', logarithmic=True),
            _curves('Learning rate', 'rate, 10⁻⁴', found, 'lr', factor=1e4),
            _curves('Throughput', 'samples per second', found, 'samples_per_second'),
            *(
                _validation(title, found, key)
                for title, key in (
                    ('joint error', 'joint_mm_all'),
                    ('vert error', 'vert_mm_all'),
                    ('root error', 'root_mm'),
                )
            ),
            *map(_validation_of_stages, found),
        )
        if chart
    ]
    return section(
        'learning',
        'Learning curves',
        missing,
        joined(
            tag('p', f'{run.label}: from ', tag('span', run.log.path, class_='file'), class_='quiet') for run in found
        ),
        charts(*drawn),
        *map(_loss_table, found),
    )


def curve(name: str, slot: int, records: list[dict[str, Any]], key: str, factor: float = 1.0) -> Series:
    """A thinned curve: means over neighbouring records."""
    points = [(record['step'], factor * value) for record in records if (value := value_of(record, key)) is not None]
    if not points:
        return Series(name, slot, [], [])
    parts = np.array_split(np.array(points, float), min(len(points), CURVE_POINTS))
    return Series(name, slot, *np.array([part.mean(0) for part in parts]).T.tolist())


def _chart_over_steps(
    title: str, y_title: str, series: list[Series], *, logarithmic: bool = False, digits: int = 2, marks: bool = False
) -> Html | None:
    series = [one for one in series if one.x]
    if not series:
        return None
    values = [y for one in series for y in one.y]
    if logarithmic and min(values) > 0:
        y_axis = Axis(f'{y_title} (logarithmic)', 0.9 * min(values), 1.1 * max(values), True, digits=3)
    else:
        y_axis = axis_of(y_title, series, digits=digits)
    x_axis = Axis('step', 0, max(1, *(one.x[-1] for one in series)))
    return line_chart(title, x_axis, y_axis, series, marks=marks)


def _curves(
    title: str, y_title: str, runs: list[Evaluated], key: str, *, factor: float = 1.0, **options
) -> Html | None:
    return _chart_over_steps(
        title, y_title, [curve(run.label, run.slot, run.log.train, key, factor) for run in runs], **options
    )


def _validation(title: str, runs: list[Evaluated], key: str) -> Html | None:
    return _chart_over_steps(
        f'Validation {title}, last stage',
        'mm',
        [
            curve(run.label, run.slot, run.log.validation[max(run.log.validation)], key)
            for run in runs
            if run.log.validation
        ],
        marks=True,
    )


def _validation_of_stages(run: Evaluated) -> Html | None:
    series = [
        curve(f'stage {stage}', stage, run.log.validation[stage], 'joint_mm_all')
        for stage in sorted(run.log.validation)
    ]
    if len(series) < 2:
        return None
    return _chart_over_steps(f'Validation joint error by stage, {run.label}', 'mm', series, marks=True)


def _loss_table(run: Evaluated) -> Html | None:
    """The terms of the loss, those of both hands and of all stages together."""
    terms: dict[str, np.ndarray] = {}
    records = run.log.train
    for name in dict.fromkeys(name for record in records for name in record if name not in NOT_LOSSES):
        values = np.array([value_of(record, name) or 0.0 for record in records])
        kind = re.sub(r'(_left|_right)?(_\d+)?$', '', name)
        terms[kind] = terms.get(kind, 0.0) + values
    if not terms:
        return None
    tenth = max(len(records) // 10, 1)
    end = sum(values[-tenth:].mean() for values in terms.values())
    rows = []
    for kind, values in sorted(terms.items(), key=lambda item: -item[1][-tenth:].mean()):
        first, last = values[:tenth].mean(), values[-tenth:].mean()
        line = [part.mean() for part in np.array_split(values, min(len(values), 60))]
        rows.append(
            [
                kind,
                sparkline(line, f'{kind} falls or rises from {first:.3g} to {last:.3g}'),
                f'{first:.4g}',
                f'{last:.4g}',
                f'{100 * last / (end or 1.0):.1f} %',
            ]
        )
    return scrolling_table(
        f'{run.label}: terms of the loss, means of the first and the last tenth of training',
        ['term', 'curve', 'first', 'last', 'share of the last'],
        rows,
    )


# ---------------------------------------------------------------------------------------------------------------------
# The rest
# ---------------------------------------------------------------------------------------------------------------------

OTHER_FIGURES = {  # title -> keys in metrics.json, factor, digits
    **{
        f'penetration, {who}: {what}': ((key, name), factor, digits)
        for who, key in (('predicted', 'penetration'), ('true', 'true_penetration'))
        for what, name, factor, digits in (
            ('share of frames, %', 'share', 100, 1),
            ('mean depth, mm', 'mean_mm', 1, 2),
            ('greatest depth, mm', 'worst_mm', 1, 2),
        )
    },
    **{f'segmentation IoU, {name}': (('segmentation_iou', name), 1, 4) for name in ('background', *SIDES, 'hands')},
    **{
        f'root placement in the camera, {name}, mm': (('placement_mm', name), 1, 2) for name in (*SIDES, 'all', 'depth')
    },
}


def other(runs: list[Evaluated]) -> Html:
    rows = []
    for title, (keys, factor, digits) in OTHER_FIGURES.items():
        values = [figure(run.metrics, keys) for run in runs]
        if any(value is not None for value in values):
            rows.append([title, *(number(None if value is None else factor * value, digits) for value in values)])
    missing = joined(having(runs, key)[1] for key in ('penetration', 'segmentation_iou', 'placement_mm'))
    return section(
        'other',
        'Penetration, segmentation, placement',
        missing,
        scrolling_table('Further figures', ['', *(run.label for run in runs)], rows) if rows else None,
    )


def samples(runs: list[Evaluated], pictures: dict[int, list[Pictures]]) -> Html:
    found = [run for run in runs if run.samples is not None]
    missing = joined(lacks(run, 'samples.npz') for run in runs if run not in found)
    if not found:
        return section('samples', 'Samples', missing)
    note = tag(
        'p',
        'Meshes are drawn as the network predicts them, without the protocol’s scale alignment. In the '
        'overlays each predicted hand stands at its true root; left hand blue, right hand orange.',
    )
    without = tag(
        'p',
        'The 3D view needs WebGL2 and JavaScript, which this browser does not offer here.',
        id='no-viewer',
        class_='missing',
    )
    return section(
        'samples',
        'Samples',
        missing,
        note,
        without,
        *(
            tag('div', tag('h3', run.label), tag('div', *_cards(run, pictures[run.slot]), class_='cards'))
            for run in found
        ),
    )


def _cards(run: Evaluated, pictures: list[Pictures]) -> list[Html]:
    counts: dict[str, int] = {}
    cards = []
    for place, kind in enumerate(run.samples['kind'].tolist()):
        counts[kind] = counts.get(kind, 0) + 1
        cards.append(_card(run, place, f'{kind} {counts[kind]}', pictures[place]))
    return cards


def _card(run: Evaluated, place: int, title: str, pictures: Pictures) -> Html:
    left, right = run.samples['joint_mm'][place].tolist()
    root, file = run.samples['root_mm'][place].item(), run.samples['name'][place].item()
    figures = f'joint {number(left)} left, {number(right)} right, root {number(root)} mm'
    images = [
        tag('figure', tag('img', src=address, alt=f'{title}: {what}', width=256, height=256), tag('figcaption', what))
        for what, address in zip(('input', 'prediction', 'truth'), pictures)
    ]
    return tag(
        'article',
        tag('h4', title.capitalize()),
        tag('p', figures),
        tag('p', f'sample {run.samples["index"][place]}, ', tag('span', file, class_='file'), class_='quiet'),
        tag('div', *images, class_='pictures'),
        tag(
            'button',
            '3D view',
            type='button',
            class_='open-viewer',
            hidden=True,
            data_run=run.slot,
            data_sample=place,
            data_title=f'{run.label}, {title}',
            data_figures=figures,
            aria_label=f'3D view of {title}, {run.label}',
        ),
        class_='card',
    )


def worst(runs: list[Evaluated]) -> Html:
    parts = [_worst_table(run) if run.per_sample else lacks(run, 'per_sample.csv') for run in runs]
    return section('worst', f'The {WORST} worst samples', *parts)


def _worst_table(run: Evaluated) -> Html:
    table, mean = run.per_sample, run.per_sample.joint_mm()
    order = np.argsort(-np.nan_to_num(mean, nan=-1.0), kind='stable')[:WORST].tolist()
    columns = {
        'joint mm': mean,
        'left': table.columns['joint_mm_left'],
        'right': table.columns['joint_mm_right'],
        'vert mm': table.vert_mm(),
        'root mm': table.root_mm(),
    }
    columns |= {title: table.columns[name] for name, title in OPTIONAL_COLUMNS.items() if name in table.columns}
    rows = [
        [
            table.index[i],
            *(number(column[i].item()) for column in columns.values()),
            tag('span', table.file[i], class_='file'),
        ]
        for i in order
    ]
    return scrolling_table(
        f'{run.label}: the {len(rows)} frames with the greatest mean joint error',
        ['sample', *columns, 'file'],
        rows,
        class_='sortable',
    )
