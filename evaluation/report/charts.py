"""Charts as SVG: drawn 360 units wide for a phone, coloured by the page's style sheet, read by hover or arrow keys.

Every chart is a <figure> with a title, axes with units, a legend if it has several series, and a sentence that says in
words what it shows. ``data-stops`` holds the places on the x axis at which page.js can read values off.
"""

import json
import math
from bisect import bisect_left
from typing import Any, NamedTuple

from evaluation.report.html import Html, number, tag

WIDTH, HEIGHT = 360, 230
LEFT, RIGHT, TOP, BOTTOM = 44, 346, 26, 188  # of the plotted area
COLOURS = 6  # --series-0 ... in page.css
MOST_STOPS = 150
Y_TICKS, X_TICKS = 5, 5


class Axis(NamedTuple):
    """A title with its unit, and the range that is drawn."""

    title: str
    low: float
    high: float
    logarithmic: bool = False
    digits: int = 1  # of values that are read off
    whole: bool = False  # ticks at whole numbers only

    def share(self, value: float) -> float:
        """Where a value lies between the ends, 0 to 1."""
        low, high = self.low, self.high
        if self.logarithmic:
            low, high, value = math.log(low), math.log(high), math.log(max(value, low))
        return (value - low) / (high - low)

    def ticks(self, count: int) -> list[float]:
        if self.logarithmic:
            decades = range(math.ceil(math.log10(self.low) - 1e-9), math.floor(math.log10(self.high) + 1e-9) + 1)
            marks = [
                factor * 10.0**power
                for power in (decades.start - 1, *decades)
                for factor in ((1,) if len(decades) > 2 else (1, 2, 5))
            ]
        else:
            step = max(nice_step((self.high - self.low) / count), self.whole)
            first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
            marks = [step * i for i in range(first, last + 1)]
        return [mark for mark in marks if self.low * (1 - 1e-9) <= mark <= self.high * (1 + 1e-9)]


class Series(NamedTuple):
    """One line or one set of bars; ``slot`` picks colour and dashes. A value of None is a gap."""

    name: str
    slot: int
    x: list[float]
    y: list[float | None]


def nice_step(least: float) -> float:
    """1, 2, 2.5 or 5 times a power of ten, not below ``least``."""
    power = 10.0 ** math.floor(math.log10(least))
    return next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= least * (1 - 1e-9))


def axis_to(title: str, highest: float, *, digits: int = 1) -> Axis:
    """From zero to a round number not below ``highest``."""
    highest = highest if highest > 0 else 1.0
    step = nice_step(highest / Y_TICKS)
    return Axis(title, 0.0, step * math.ceil(highest / step - 1e-9), digits=digits)


def axis_of(title: str, series: list[Series], *, digits: int = 1) -> Axis:
    return axis_to(title, max((y for one in series for y in one.y if y is not None), default=1.0), digits=digits)


def line_chart(
    title: str, x_axis: Axis, y_axis: Axis, series: list[Series], *, marks: bool = False, steps: float | None = None
) -> Html:
    """Lines; ``marks``: a dot on every value; ``steps``: width of a histogram's bins, whose left edges are x."""
    drawn = []
    for one in series:
        points = [(x, y) for x, y in zip(one.x, one.y) if y is not None]
        if steps:
            points = [corner for x, y in points for corner in ((x, y), (x + steps, y))]
        places = [(_x(x_axis, x), _y(y_axis, y)) for x, y in points]
        if steps and places:
            drawn.append(
                tag(
                    'path',
                    d=_path([(places[0][0], BOTTOM), *places, (places[-1][0], BOTTOM)]),
                    class_=f'area s{one.slot % COLOURS}',
                )
            )
        drawn.append(tag('path', d=_path(places), class_=_style(one.slot)))
        if marks:
            drawn += [
                tag('circle', cx=f'{x:.1f}', cy=f'{y:.1f}', r=4, class_=f'dot s{one.slot % COLOURS}') for x, y in places
            ]
    summary = ' '.join(_in_words(one, y_axis) for one in series)
    x_ticks = [(tick, _x(x_axis, tick)) for tick in x_axis.ticks(X_TICKS)]
    return _figure(
        title,
        [*_grid(y_axis), *_x_labels([(f'{tick:,g}', place) for tick, place in x_ticks]), *drawn],
        x_axis.title,
        y_axis.title,
        legend(series),
        _line_stops(series, x_axis, y_axis, steps),
        summary,
    )


def bar_chart(title: str, x_title: str, categories: list[tuple[str, str]], y_axis: Axis, series: list[Series]) -> Html:
    """Bars side by side; a category is its label and a second line of it. ``Series.x`` holds numbers of categories."""
    room = (RIGHT - LEFT) / max(len(categories), 1)
    width = min(0.76 * room / max(len(series), 1), 30)
    drawn, stops = [], [[f'{label}{", " if more else ""}{more}'] for label, more in categories]
    for place, one in enumerate(series):
        for x, y in zip(one.x, one.y):
            stops[x].append(f'{one.name}: {number(y, y_axis.digits)}')
            if y is not None:
                left, top = LEFT + (x + 0.5) * room + (place - len(series) / 2) * width, _y(y_axis, y)
                drawn.append(
                    tag(
                        'rect',
                        x=f'{left:.1f}',
                        y=f'{top:.1f}',
                        width=f'{max(width - 1, 1):.1f}',
                        height=f'{BOTTOM - top:.1f}',
                        class_=f'bar s{one.slot % COLOURS}',
                    )
                )
    centres = [LEFT + (i + 0.5) * room for i in range(len(categories))]
    summary = '. '.join(', '.join(lines) for lines in stops) + '.'
    return _figure(
        title,
        [*_grid(y_axis), *drawn, *_x_labels([(c[0], x) for c, x in zip(categories, centres)])],
        x_title,
        y_axis.title,
        legend(series, bars=True),
        [[round(x, 1), '\n'.join(lines)] for x, lines in zip(centres, stops)],
        summary,
    )


def sparkline(values: list[float], words: str) -> Html:
    """A line without axes, from 0, inside a table."""
    top, last = max(*values, 1e-12), max(len(values) - 1, 1)
    return tag(
        'svg',
        tag('path', d=_path([(2 + 96 * i / last, 24 - 22 * v / top) for i, v in enumerate(values)]), class_='line s0'),
        viewBox='0 0 100 26',
        class_='spark',
        role='img',
        aria_label=words,
    )


# ---------------------------------------------------------------------------------------------------------------------


def _x(axis: Axis, value: float) -> float:
    return LEFT + (RIGHT - LEFT) * axis.share(value)


def _y(axis: Axis, value: float) -> float:
    return BOTTOM - (BOTTOM - TOP) * axis.share(value)


def _path(places: list[tuple[float, float]]) -> str:
    return 'M' + 'L'.join(f'{x:.1f} {y:.1f}' for x, y in places) if places else ''


def _style(slot: int) -> str:
    """Colours come with dashes, so that lines differ without colour too."""
    return f'line s{slot % COLOURS} d{slot // COLOURS if slot >= COLOURS else slot % 4}'


def _grid(axis: Axis) -> list[Html]:
    parts = []
    for tick in axis.ticks(Y_TICKS):
        y = f'{_y(axis, tick):.1f}'
        parts.append(tag('line', x1=LEFT, x2=RIGHT, y1=y, y2=y, class_='grid'))
        parts.append(tag('text', f'{tick:,g}', x=LEFT - 5, y=y, dy='.32em', text_anchor='end'))
    return parts


def _x_labels(labels: list[tuple[str, float]]) -> list[Html]:
    return [
        tag('line', x1=LEFT, x2=RIGHT, y1=BOTTOM, y2=BOTTOM, class_='axis'),
        *(
            tag(
                'text',
                label,
                y=BOTTOM + 16,
                **(
                    {'x': f'{x:.1f}', 'text_anchor': 'middle'}
                    if x < RIGHT - 8
                    else {'x': WIDTH - 1, 'text_anchor': 'end'}
                ),
            )
            for label, x in labels
        ),
    ]


def _figure(
    title: str, drawn: list[Any], x_title: str, y_title: str, key: Html | None, stops: list, summary: str
) -> Html:
    axes = [
        tag('text', y_title, x=2, y=12, class_='title'),
        tag('text', x_title, x=(LEFT + RIGHT) / 2, y=HEIGHT - 8, class_='title', text_anchor='middle'),
    ]
    svg = tag(
        'svg',
        *drawn,
        *axes,
        viewBox=f'0 0 {WIDTH} {HEIGHT}',
        role='img',
        aria_label=f'{title}. {x_title} across, {y_title} upwards. {summary}',
    )
    return tag(
        'figure',
        tag('figcaption', title),
        key,
        tag(
            'div',
            svg,
            class_='plot',
            data_stops=json.dumps(stops, separators=(',', ':')),
            data_title=title,
            data_area=f'{TOP},{BOTTOM},{WIDTH}',
        ),
        class_='chart',
    )


def legend(series: list[Series], *, bars: bool = False) -> Html | None:
    def swatch(slot: int) -> Html:
        shape = (
            tag('rect', x=8, width=12, height=10, class_=f'bar s{slot % COLOURS}')
            if bars
            else tag('path', d='M1 5H27', class_=_style(slot))
        )
        return tag('svg', shape, viewBox='0 0 28 10', aria_hidden='true')

    if len(series) < 2:
        return None
    return tag('ul', *(tag('li', swatch(one.slot), one.name) for one in series), class_='legend')


def _line_stops(series: list[Series], x_axis: Axis, y_axis: Axis, steps: float | None) -> list:
    """[place, what to read there]: every series at the values of x, at most ``MOST_STOPS`` of them."""
    xs = sorted({x for one in series for x in one.x})
    xs = xs[:: math.ceil(len(xs) / MOST_STOPS)] if xs else []
    stops = []
    for x in xs:
        lines = [f'{x:,g} to {x + steps:,g}' if steps else f'{x_axis.title.split(",")[0]} {x:,g}']
        for one in series:
            if one.x and one.x[0] <= x <= one.x[-1]:
                lines.append(f'{one.name}: {number(one.y[bisect_left(one.x, x)], y_axis.digits)}')
        stops.append([round(_x(x_axis, x + (steps or 0) / 2), 1), '\n'.join(lines)])
    return stops


def _in_words(one: Series, y_axis: Axis) -> str:
    points = [(y, x) for x, y in zip(one.x, one.y) if y is not None]
    if not points:
        return f'{one.name}: no values.'
    (highest, at), (lowest, there) = max(points), min(points)
    places = ((*points[0], ''), (*points[-1], ''), (highest, at, 'highest '), (lowest, there, 'lowest '))
    return f'{one.name}: ' + ', '.join(f'{what}{number(y, y_axis.digits)} at {x:,g}' for y, x, what in places) + '.'
