"""Build the sections of the page as view models. A run keeps its colour; missing data becomes a line of text."""

import re
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from evaluation.confidence import JOINT_KINDS, WITHIN
from evaluation.figures import BINNED, ERRORS, FURTHER, OPTIONAL_COLUMNS, PRESENCE_SHARES
from evaluation.registry import TableColumn, compared
from evaluation.report.charts import Axis, Chart, Series, axis_of, bar_chart, line_chart, sparkline
from evaluation.report.hands import hand_diagram, spoken
from evaluation.report.inputs import Evaluated, Log, PerSample, value_of
from evaluation.report.views import Block, Card, Section, Span, Table, Text, number
from evaluation.runs import differences, figure
from utils.hand import FINGERS, SIDES
from utils.run_record import record_rows

WORST = 50  # rows in the table of worst samples
BINS = 40  # per histogram
TAIL = 0.995  # share of frames within a histogram's axis
CURVE_POINTS = 200  # per learning curve, each a mean over neighbouring records
QUANTILES = (0.5, 0.9, 0.99)
NOT_LOSSES = frozenset(('kind', 'step', 'epoch', 'lr', 'samples_per_second', 'waiting_for_data', 'total'))
Runs = Sequence[Evaluated]


def all_sections(runs: Runs, images: dict[int, list[dict[str, str]]]) -> list[Section]:
    """All sections in page order. ``images``: slot -> result of ``samples.draw``."""
    first = [part(runs) for part in (headline, distributions, pck, joints, stages, interaction)]
    optional = [section for part in (presence, confidence) if (section := part(runs))]
    return [*first, *optional, learning(runs), further(runs), samples(runs, images), worst(runs)]


def lacks(run: Evaluated, what: str, *, evaluation: bool = True) -> Text:
    command = Span(run.command(evaluation=evaluation), 'code')
    return [f'{run.label}: {what} is missing. Create it with ', command, '.']


def having(runs: Runs, key: str) -> tuple[list[Evaluated], list[Text]]:
    """Split runs into those whose metrics have ``key``, and notices about the others."""
    return [run for run in runs if run.metrics.get(key)], [
        f'{run.label}: {key} was not measured.' if key in run.metrics else lacks(run, f'{key} in {run.run.path}')
        for run in runs
        if not run.metrics.get(key)
    ]


def named(what: str, run: Evaluated, runs: Runs) -> str:
    """Row header, followed by the run's label if there are several runs."""
    return f'{what}, {run.label}' if len(runs) > 1 else what


def tables(caption: str, head: Sequence[str], rows: Sequence, kind: str | None = None) -> list[Table]:
    """A list of one table, or none if it has no rows."""
    return [Table(caption, head, rows, kind)] if rows else []


def headline(runs: Runs) -> Section:
    rows: list[list[Text]] = [
        ['protocol', *(f'{run.metrics["protocol"]["name"]}: {run.metrics["protocol"]["description"]}' for run in runs)],
        ['frames', *map(_frames, runs)],
    ]
    warning: Text | None = None
    if len({run.group for run in runs}) > 1:
        rows.insert(0, ['group', *(run.group for run in runs)])
        warning = [
            Span('Not all columns are comparable. ', 'strong'),
            'Runs with different letters were evaluated under different protocols or on different frames; bold marks '
            'the best value within a letter.',
        ]
    if len(runs) > 1:
        first = runs[0].run
        rows.append([f'differs from {first.name} in', *(differences(run.run, first) or '–' for run in runs)])
    rows += [[column.title, *(_compared(run, runs, column) for run in runs)] for column in compared()]
    caption = 'Metrics of the last stage, with 95 % bootstrap intervals in brackets and each hand below'
    table = Table(caption, ['', *(run.label for run in runs)], rows, 'headline')
    glances = [Block(heading=f'{run.label} at a glance', items=items) for run in runs if (items := glance(run))]
    blocks = [Block(warning=warning, tables=[table]), *glances, *_records(runs)]
    return Section('metrics', 'Metrics', 'Metrics', blocks)


def _records(runs: Runs) -> list[Block]:
    """How each network was trained and evaluated: code, packages, machine, data."""
    tables = []
    for what, caption in (('trained', 'Training'), ('evaluated', 'Evaluation')):
        records = [{row.title: row.text for row in record_rows(run.metrics.get(what))} for run in runs]
        titles = list(dict.fromkeys(title for record in records for title in record))
        rows = [[title, *(record.get(title, '–') for record in records)] for title in titles]
        tables.append(Table(f'{caption}: code, packages, machine and data', ['', *(run.label for run in runs)], rows))
    return [Block(heading='Origin of these figures', tables=tables)]


def _frames(run: Evaluated) -> Text:
    subset = run.metrics.get('subset')
    data = Span(run.metrics['data'], 'file')
    return [f'{run.metrics["frames"]:,} of ', data, f', {subset["description"]}' if subset else '']


def _compared(run: Evaluated, runs: Runs, column: TableColumn) -> Text:
    """A metric with its interval and per-hand values; marked if it is the best of its group."""
    keys, digits = column.keys, column.digits
    value = figure(run.metrics, keys)
    rivals = [figure(other.metrics, keys) for other in runs if other.group == run.group]
    rivals = [rival for rival in rivals if rival is not None]
    best = len(rivals) > 1 and value == column.best(rivals)
    parts: list[str | Span] = [Span(number(value, digits), 'best') if best else number(value, digits)]
    if interval := figure(run.metrics, ('interval_95', *keys)):
        parts.append(Span(f' [{number(interval[0], digits)}, {number(interval[1], digits)}]', 'quiet'))
    if keys[-1] == 'all' and (sides := figure(run.metrics, keys[:-1])):
        parts.append(Span(', '.join(f'{side} {number(sides[side], digits)}' for side in SIDES), 'hands'))
    return parts


def glance(run: Evaluated) -> list[str]:
    """Summarise in a few sentences where this run fails."""
    metrics, items = run.metrics, []
    errors = [
        (sides[side], f'{side} {spoken(name)} ({number(sides[side])} mm)')
        for name, sides in (metrics.get('per_joint_mm') or {}).items()
        for side in SIDES
        if sides[side] is not None
    ]
    if errors:
        items.append('Worst joints: ' + ', '.join(text for _, text in sorted(errors, reverse=True)[:3]) + '.')
    if run.per_sample:
        median, high, tail = map(number, quantiles(run.per_sample.error('joint_mm')))
        items.append(
            f'Frames: half have a joint error above {median} mm, one in ten above {high} mm, one in a hundred above '
            f'{tail} mm.'
        )
    for key in ('by_distance_mm', 'by_box_iou', 'by_visibility'):
        counted, axis = BINNED[key].counted, BINNED[key].axis
        rows = [
            (value, f'{span_of(row)} (joint error {number(value)} mm, {row[counted]:,} {counted})')
            for row in metrics.get(key) or []
            if (value := value_of(row, 'joint_mm')) is not None
        ]
        if len(rows) > 1:
            items.append(f'{axis[0].upper()}{axis[1:]}: hardest is {max(rows)[1]}, easiest {min(rows)[1]}.')
    return items


def distributions(runs: Runs) -> Section:
    found = [(run, run.per_sample) for run in runs if run.per_sample]
    charts, rows = [], []
    for title, (name, *_) in ERRORS.items() if found else ():
        errors = [(run, _finite(table.error(name))) for run, table in found]
        charts += _distribution(title, errors)
        rows += [
            [named(title, run, runs), f'{len(values):,}', *map(number, (*quantiles(values), values.max(initial=0.0)))]
            for run, values in errors
        ]
    missing = [lacks(run, 'per_sample.csv') for run in runs if not run.per_sample]
    note = 'Errors are means over the hands of a frame. The charts cut off at most the largest 0.5 %.'
    quantiled = tables('Quantiles over frames, mm', ['mm', 'frames', 'median', '90 %', '99 %', 'max'], rows)
    block = Block(missing=missing, notes=[note] if found else [], charts=charts, tables=quantiled)
    return Section('distribution', 'Distribution', 'Error distribution', [block])


def _finite(values: np.ndarray) -> np.ndarray:
    return values[np.isfinite(values)]


def quantiles(values: np.ndarray) -> list[float]:
    values = _finite(values)
    return np.quantile(values, QUANTILES).tolist() if len(values) else [float('nan')] * len(QUANTILES)


def _distribution(title: str, errors: list[tuple[Evaluated, np.ndarray]]) -> list[Chart]:
    top = max((float(np.quantile(values, TAIL)) for _, values in errors if len(values)), default=0.0)
    x_axis = axis_of(f'{title}, mm', [Series('', 0, [], [top])])
    edges = np.linspace(0, x_axis.high, BINS + 1)
    shares, sums = [], []
    for run, values in errors:
        percent = 100 / max(len(values), 1)
        within = np.searchsorted(np.sort(values), edges, side='right')
        counts = np.histogram(values, edges)[0]
        shares.append(Series(run.label, run.slot, edges[:-1].tolist(), (percent * counts).tolist()))
        sums.append(Series(run.label, run.slot, edges.tolist(), (percent * within).tolist()))
    share_axis, sum_axis = axis_of('share of frames, %', shares), Axis('frames with at most this error, %', 0, 100)
    return [
        line_chart(f'{title.capitalize()}: histogram', x_axis, share_axis, shares, bin_width=edges[1].item()),
        line_chart(f'{title.capitalize()}: cumulative', x_axis, sum_axis, sums),
    ]


def pck(runs: Runs) -> Section:
    found, missing = having(runs, 'pck')
    charts = []
    for side in SIDES if found else ():
        series = [
            Series(run.label, run.slot, curves['thresholds_mm'], [_scaled(share, 100) for share in curves[side]])
            for run in found
            for curves in [run.metrics['pck']]
        ]
        x_axis = Axis('threshold, mm', 0, max((x for one in series for x in one.x), default=1))
        charts.append(line_chart(f'PCK, {side} hand', x_axis, Axis('joints within the threshold, %', 0, 100), series))
    rows = [[run.label, *(number(run.metrics['pck']['auc'][side], 4) for side in (*SIDES, 'all'))] for run in found]
    areas = tables('Area under the PCK curve', ['run', *SIDES, 'all'], rows)
    return Section(
        'pck', 'PCK', 'Percentage of correct keypoints', [Block(missing=missing, charts=charts, tables=areas)]
    )


def joints(runs: Runs) -> Section:
    found, missing = having(runs, 'per_joint_mm')
    errors = [
        value
        for run in found
        for sides in run.metrics['per_joint_mm'].values()
        for side in SIDES
        if (value := sides[side]) is not None
    ]
    span = (min(errors, default=0.0), max(errors, default=0.0))
    hands = [
        hand_diagram(f'{run.label}: {side} hand', run.metrics['per_joint_mm'], hand, span)
        for run in found
        for hand, side in enumerate(SIDES)
    ]
    note = 'Mean error of each joint in mm. Hands are seen from the back and share one colour scale.'
    fingered, missing_fingers = having(runs, 'per_finger_mm')
    rows = [
        [named(finger, run, runs), *(number(run.metrics['per_finger_mm'][finger][side]) for side in (*SIDES, 'all'))]
        for finger in ('wrist', *FINGERS)
        for run in fingered
    ]
    fingers = tables('Mean error by finger, mm', ['mm', *SIDES, 'all'], rows)
    diagrams = Block(missing=missing, notes=[note] if hands else [], hands=hands)
    return Section('joints', 'Joints', 'Joints and fingers', [diagrams, Block(missing=missing_fingers, tables=fingers)])


def stages(runs: Runs) -> Section:
    found, missing = having(runs, 'stages')
    last = max((len(run.metrics['stages']) - 1 for run in found), default=0)
    x_axis = Axis('stage (0 is the initial estimate)', -0.2, last + 0.2, whole=True)
    charts = []
    for title, keys in ERRORS.items() if found else ():
        series = [
            Series(run.label, run.slot, range(len(values)), [figure(stage, keys) for stage in values])
            for run in found
            for values in [run.metrics['stages']]
        ]
        y_axis = axis_of('mm', series, digits=2)
        charts.append(line_chart(f'{title.capitalize()} by stage', x_axis, y_axis, series, dots=True))
    rows = []
    for run in found:
        before: list[float | None] = [None] * len(ERRORS)
        for count, stage in enumerate(run.metrics['stages']):
            now = [figure(stage, keys) for keys in ERRORS.values()]
            gains = [None if old is None or new is None else old - new for old, new in zip(before, now)]
            rows.append([named(f'stage {count}', run, runs), *(number(x) for pair in zip(now, gains) for x in pair)])
            before = now
    head = ['mm', *(cell for title in ERRORS for cell in (title, 'gain'))]
    gained = tables('Errors of each stage and gains over the previous one, mm', head, rows)
    return Section('stages', 'Stages', 'Gain by stage', [Block(missing=missing, charts=charts, tables=gained)])


def span_of(row: dict[str, Any]) -> str:
    return f'{row["from"]:g} and more' if row['to'] is None else f'{row["from"]:g} to {row["to"]:g}'


def interaction(runs: Runs) -> Section:
    return Section('interaction', 'Interaction', 'Interaction and visibility', [_binned(runs, key) for key in BINNED])


def _binned(runs: Runs, key: str) -> Block:
    title, axis, by, counted, errors = BINNED[key]
    found, missing = having(runs, key)
    bins = [(run, {span_of(row): row for row in run.metrics[key]}) for run in found]
    spans = list(dict.fromkeys(span for _, table in bins for span in table))
    counts = {span: [f'{table.get(span, {}).get(counted, 0):,}' for _, table in bins] for span in spans}
    categories = [
        (span.replace(' to ', '–').replace(' and more', '+'), ', '.join(f'{count} {counted}' for count in counts[span]))
        for span in spans
    ]
    charts = []
    for error in errors if found else ():
        series = [
            Series(run.label, run.slot, range(len(spans)), [_error(table.get(span, {}), error) for span in spans])
            for run, table in bins
        ]
        y_axis = axis_of('mm', series, digits=2)
        charts.append(bar_chart(f'{error.capitalize()} by {by}', axis, categories, y_axis, series))
    rows = [
        [named(span, run, runs), count, *(number(_error(table.get(span, {}), error)) for error in errors)]
        for span in spans
        for (run, table), count in zip(bins, counts[span])
    ]
    caption = f'{title}: {counted} and mean errors, mm'
    return Block(title, missing=missing, charts=charts, tables=tables(caption, [axis, counted, *errors], rows))


def _scaled(value: float | None, factor: float) -> float | None:
    return None if value is None else factor * value


def _error(row: dict[str, Any], title: str) -> float | None:
    """Error of a bin, which stores the mean over both hands."""
    return value_of(row, ERRORS[title][0])


def presence(runs: Runs) -> Section | None:
    """Errors by the hands in a frame, and predicted presence; None if no run has either."""
    divided = [run for run in runs if run.metrics.get('by_hands')]
    found = [run for run in runs if run.metrics.get('presence')]
    if not (divided or found):
        return None
    missing = [
        f'{run.label}: presence is not predicted (MODEL.PRESENCE is off).'
        for run in divided
        if not run.metrics.get('presence')
    ]
    rows = [
        [named(name, run, runs), f'{row["frames"]:,}', *(number(_error(row, error)) for error in ERRORS)]
        for name in ('single', 'interacting', 'all', 'empty')
        for run in divided
        for row in [run.metrics['by_hands'][name]]
    ]
    frames = tables('Frames by the hands that they show, and mean errors, mm', ['hands', 'frames', *ERRORS], rows)
    rows = [
        [
            run.label,
            *(number(run.metrics['presence']['average_precision'][side], 4) for side in (*SIDES, 'all')),
            *(number(_scaled(run.metrics['presence'][key], 100), 1) for key in PRESENCE_SHARES),
        ]
        for run in found
    ]
    head = ['run', *(f'AP {side}' for side in (*SIDES, 'all')), *PRESENCE_SHARES.values()]
    block = Block(missing=missing, tables=[*frames, *tables('Predicted presence', head, rows)])
    return Section('presence', 'Presence', 'Hands in the frame', [block])


def confidence(runs: Runs) -> Section | None:
    """Hidden joints, and predicted deviations of joints; None if no run predicts them."""
    found = [run for run in runs if run.metrics.get('deviation')]
    if not found:
        return None
    missing = [
        f'{run.label}: confidence is not predicted (MODEL.CONFIDENCE is off).'
        for run in runs
        if not run.metrics.get('deviation')
    ]
    note = (
        'Sparsification: mean error of what remains after the least certain were removed. Errors and deviations are '
        'those of the network’s own joints, relative to its root joint and without scale alignment.'
    )
    charts = [_sparsification_chart(run, what, runs) for run in found for what in ('joints', 'frames')]
    rows = [
        [named(what, run, runs), f'{part["count"]:,}', *(number(area, 4) for area in part['ause'].values())]
        for run in found
        for what in ('joints', 'frames')
        for part in [run.metrics['deviation']['sparsification'][what]]
    ]
    head = ['ordered', 'number', 'by deviation', 'by residual_px', 'at random']
    areas = tables('Area between the sparsification curve and the oracle’s, relative to the mean error', head, rows)
    rows = [
        [
            run.label,
            *(number(_scaled(run.metrics['deviation'][key], 100), 1) for key in WITHIN),
            number(run.metrics['deviation']['calibration'], 3),
        ]
        for run in found
    ]
    expected = [f'{100 * share:.1f} expected' for share in WITHIN.values()]
    head = ['run', *(f'within {times}, % ({share})' for times, share in enumerate(expected, 1)), 'calibration factor']
    covered = tables('Coordinates within their predicted deviations', head, rows)
    return Section(
        'confidence',
        'Confidence',
        'Confidence of joints',
        [Block(missing=missing, notes=[note], charts=charts, tables=[*areas, *covered]), _hidden_joints(found, runs)],
    )


def _sparsification_chart(run: Evaluated, what: str, runs: Runs) -> Chart:
    curves = run.metrics['deviation']['sparsification']
    removed = [100 * share for share in curves['removed']]
    series = [
        Series(title, run.slot + place, removed, curves[what][key])
        for place, (title, key) in enumerate(
            (('by deviation', 'deviation'), ('by residual_px', 'residual_px'), ('oracle', 'oracle'))
        )
    ]
    title, x_axis = f'Sparsification, {what}', Axis('least certain removed, %', 0, 100)
    return line_chart(named(title, run, runs), x_axis, axis_of('mean error, mm', series, digits=2), series)


def _hidden_joints(found: Runs, runs: Runs) -> Block:
    found = [run for run in found if run.metrics.get('hidden_joints') and run.metrics.get('by_joint_visibility')]
    rows = [
        [
            named(spoken(kind), run, runs),
            number(_scaled(row['share'], 100), 1),
            number(row['average_precision'], 4),
            number(_scaled(row['accuracy'], 100), 1),
        ]
        for kind in JOINT_KINDS
        for run in found
        for row in [run.metrics['hidden_joints'][kind]]
    ]
    hidden = tables('Hidden joints by kind', ['joints', 'hidden, %', 'AP of hidden', 'accuracy, %'], rows)
    rows = [
        [named(name, run, runs), f'{row["joints"]:,}', number(row['error_mm']), number(row['deviation_mm'])]
        for name in ('visible', 'hidden')
        for run in found
        for row in [run.metrics['by_joint_visibility'][name]]
    ]
    head = ['joints', 'number', 'mean error', 'mean deviation']
    errors = tables('Errors and predicted deviations of visible and hidden joints, mm', head, rows)
    return Block(tables=[*hidden, *errors])


def learning(runs: Runs) -> Section:
    found = [(run, run.log) for run in runs if run.log]
    missing = [
        lacks(run, 'log.jsonl of its training', evaluation=False)
        if run.metrics.get('training')
        else f'{run.label}: not a trained model, so it has no learning curves.'
        for run in runs
        if not run.log
    ]

    def over_steps(key: str, factor: float = 1.0) -> list[Series]:
        return [curve(run.label, run.slot, log.train, key, factor) for run, log in found]

    def validation(key: str) -> list[Series]:
        return [
            curve(run.label, run.slot, log.validation[max(log.validation)], key) for run, log in found if log.validation
        ]

    charts = [
        _steps_chart('Training loss', 'loss', over_steps('total'), logarithmic=True),
        _steps_chart('Learning rate', 'rate, 10⁻⁴', over_steps('lr', 1e4)),
        _steps_chart('Throughput', 'samples per second', over_steps('samples_per_second')),
    ]
    for title, keys in ERRORS.items():
        charts.append(_steps_chart(f'Validation {title}, last stage', 'mm', validation('_'.join(keys)), dots=True))
    for run, log in found:
        by_stage = [
            curve(f'stage {stage}', stage, log.validation[stage], 'joint_mm_all') for stage in sorted(log.validation)
        ]
        if len(by_stage) > 1:
            charts.append(_steps_chart(f'Validation joint error by stage, {run.label}', 'mm', by_stage, dots=True))
    block = Block(
        missing=missing,
        sources=[[f'{run.label}: from ', Span(str(log.path), 'file')] for run, log in found],
        charts=[chart for chart in charts if chart],
        tables=[table for run, log in found for table in _loss_table(run, log)],
    )
    return Section('learning', 'Learning', 'Learning curves', [block])


def curve(name: str, slot: int, records: Iterable[dict[str, Any]], key: str, factor: float = 1.0) -> Series:
    """Learning curve, averaged over neighbouring records down to ``CURVE_POINTS``."""
    points = [(record['step'], factor * value) for record in records if (value := value_of(record, key)) is not None]
    if not points:
        return Series(name, slot, [], [])
    parts = np.array_split(np.array(points, float), min(len(points), CURVE_POINTS))
    return Series(name, slot, *np.array([part.mean(0) for part in parts]).T.tolist())


def _steps_chart(
    title: str, y_title: str, series: Iterable[Series], *, logarithmic: bool = False, dots: bool = False
) -> Chart | None:
    """Chart over training steps, or None if all series are empty."""
    series = [one for one in series if one.x]
    if not series:
        return None
    values = [y for one in series for y in one.y if y is not None]
    if logarithmic and min(values) > 0:
        y_axis = Axis(f'{y_title} (logarithmic)', 0.9 * min(values), 1.1 * max(values), True, digits=3)
    else:
        y_axis = axis_of(y_title, series, digits=2)
    return line_chart(title, Axis('step', 0, max(1, *(one.x[-1] for one in series))), y_axis, series, dots=dots)


def _loss_table(run: Evaluated, log: Log) -> list[Table]:
    """Loss terms, each summed over hands and stages."""
    terms: dict[str, np.ndarray] = {}
    for name in dict.fromkeys(name for record in log.train for name in record if name not in NOT_LOSSES):
        kind = re.sub(r'(_left|_right)?(_\d+)?$', '', name)
        terms[kind] = terms.get(kind, 0.0) + np.array([value_of(record, name) or 0.0 for record in log.train])
    tenth = max(len(log.train) // 10, 1)
    ends = {kind: (values[:tenth].mean(), values[-tenth:].mean()) for kind, values in terms.items()}
    total = sum(last for _, last in ends.values()) or 1.0
    rows = []
    for kind, (first, last) in sorted(ends.items(), key=lambda item: -item[1][1]):
        line = [part.mean() for part in np.array_split(terms[kind], min(len(log.train), 60))]
        words = f'{kind} from {first:.3g} to {last:.3g}'
        rows.append([kind, sparkline(line, words), f'{first:.4g}', f'{last:.4g}', f'{100 * last / total:.1f} %'])
    caption = f'{run.label}: loss terms, averaged over the first and the last tenth of training'
    return tables(caption, ['term', 'curve', 'first', 'last', 'share of last'], rows)


def further(runs: Runs) -> Section:
    rows = []
    for title, (keys, factor, digits) in FURTHER.items():
        values = [figure(run.metrics, keys) for run in runs]
        if any(value is not None for value in values):
            rows.append([title, *(number(_scaled(value, factor), digits) for value in values)])
    missing = [line for key in ('penetration', 'segmentation_iou', 'placement_mm') for line in having(runs, key)[1]]
    block = Block(missing=missing, tables=tables('Further figures', ['', *(run.label for run in runs)], rows))
    return Section('other', 'Further figures', 'Penetration, segmentation, placement', [block])


def samples(runs: Runs, images: dict[int, list[dict[str, str]]]) -> Section:
    note = (
        'Meshes are shown as predicted, without the protocol’s scale alignment. Overlays place each predicted hand at '
        'its ground-truth root; the left hand is blue, the right hand orange.'
    )
    missing = [lacks(run, 'samples.npz') for run in runs if run.samples is None]
    cards = [
        Block(run.label, cards=_cards(run, run.samples, images[run.slot])) for run in runs if run.samples is not None
    ]
    return Section('samples', 'Samples', 'Samples', [Block(missing=missing, notes=[note] if cards else []), *cards])


def _cards(run: Evaluated, arrays: dict[str, np.ndarray], images: list[dict[str, str]]) -> list[Card]:
    kinds, cards = arrays['kind'].tolist(), []
    for place, kind in enumerate(kinds):
        left, right = map(number, arrays['joint_mm'][place].tolist())
        cards.append(
            Card(
                run.label,
                run.slot,
                place,
                f'{kind} {kinds[: place + 1].count(kind)}',
                f'joint {left} left, {right} right, root {number(arrays["root_mm"][place].item())} mm',
                arrays['index'][place].item(),
                arrays['name'][place].item(),
                images[place],
            )
        )
    return cards


def worst(runs: Runs) -> Section:
    blocks = [
        Block(tables=[_worst_table(run, run.per_sample)])
        if run.per_sample
        else Block(missing=[lacks(run, 'per_sample.csv')])
        for run in runs
    ]
    return Section('worst', 'Worst samples', f'The {WORST} worst samples', blocks)


def _worst_table(run: Evaluated, table: PerSample) -> Table:
    errors = table.error('joint_mm')
    order = [i for i in np.argsort(-np.nan_to_num(errors, nan=-1.0), kind='stable')[:WORST].tolist() if errors[i] >= 0]
    columns = {
        'joint mm': errors,
        'left': table.columns['joint_mm_left'],
        'right': table.columns['joint_mm_right'],
        'vert mm': table.error('vert_mm'),
        'root mm': table.error('root_mm'),
    }
    columns |= {title: table.columns[name] for name, title in OPTIONAL_COLUMNS.items() if name in table.columns}
    rows = [
        [table.sample[i], *(number(column[i].item()) for column in columns.values()), [Span(table.file[i], 'file')]]
        for i in order
    ]
    caption = f'{run.label}: the {len(rows)} frames with the largest mean joint error'
    return Table(caption, ['sample', *columns, 'file'], rows, 'sortable')
