"""Compute the geometry of line and bar charts, in the units of an SVG; charts.html.j2 draws them.

Each chart includes a description for screen readers, and ``stops``: the x coordinates at which page.js shows values on
hover or with the arrow keys.
"""

import math
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from typing import NamedTuple

WIDTH, HEIGHT = 360, 230
LEFT, RIGHT, TOP, BOTTOM = 44, 346, 26, 188  # of the plot area
COLOURS = 6  # --series-0 ... in page.css
MAX_STOPS = 150
TICKS = 5  # approximate number per axis


class Axis(NamedTuple):
    """Title with unit, range, and number format."""

    title: str
    low: float
    high: float
    logarithmic: bool = False
    digits: int = 1  # of the values in stops and words
    whole: bool = False  # ticks at whole numbers only

    def share(self, value: float) -> float:
        """Position of a value on the axis, 0 to 1."""
        low, high = self.low, self.high
        if self.logarithmic:
            low, high, value = math.log(low), math.log(high), math.log(max(value, low))
        return (value - low) / (high - low)

    def across(self, value: float) -> float:
        return LEFT + (RIGHT - LEFT) * self.share(value)

    def up(self, value: float) -> float:
        return BOTTOM - (BOTTOM - TOP) * self.share(value)

    def ticks(self) -> list[float]:
        if self.logarithmic:
            first, last = math.ceil(math.log10(self.low) - 1e-9), math.floor(math.log10(self.high) + 1e-9)
            factors = (1,) if last - first > 1 else (1, 2, 5)
            marks = [factor * 10.0**power for power in range(first - 1, last + 1) for factor in factors]
        else:
            step = max(nice_step((self.high - self.low) / TICKS), self.whole)
            marks = [
                step * i for i in range(math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9) + 1)
            ]
        return [mark for mark in marks if self.low * (1 - 1e-9) <= mark <= self.high * (1 + 1e-9)]


class Series(NamedTuple):
    """One line or one set of bars. None in ``y`` is a gap."""

    name: str
    slot: int  # selects colour and dashes
    x: Sequence[float]
    y: Sequence[float | None]


class Shape(NamedTuple):
    """A series as SVG paths, dots (x, y), and bars (x, y, width, height)."""

    name: str
    colour: str  # class in page.css
    dashes: str  # class in page.css
    line: str = ''
    area: str = ''
    dots: Sequence[tuple[float, float]] = ()
    bars: Sequence[tuple[float, float, float, float]] = ()


class Chart(NamedTuple):
    title: str
    x_title: str
    y_title: str
    x_labels: Sequence[tuple[str, float]]  # text, coordinate
    y_labels: Sequence[tuple[str, float]]
    shapes: Sequence[Shape]
    stops: Sequence[tuple[float, str]]  # x coordinate, text
    words: str  # description of the series


class Sparkline(NamedTuple):
    """A line without axes inside a table; SVG of 100 x 26."""

    path: str
    words: str


def nice_step(least: float) -> float:
    """The smallest 1, 2, 2.5 or 5 times a power of ten that is at least ``least``."""
    power = 10.0 ** math.floor(math.log10(least))
    return next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= least * (1 - 1e-9))


def axis_to(title: str, highest: float, *, digits: int = 1) -> Axis:
    """Axis from zero to a round number that is at least ``highest``."""
    highest = highest if highest > 0 else 1.0
    step = nice_step(highest / TICKS)
    return Axis(title, 0.0, step * math.ceil(highest / step - 1e-9), digits=digits)


def axis_of(title: str, series: Iterable[Series], *, digits: int = 1) -> Axis:
    """Axis from zero that covers all values of ``series``."""
    return axis_to(title, max((y for one in series for y in one.y if y is not None), default=1.0), digits=digits)


def line_chart(
    title: str,
    x_axis: Axis,
    y_axis: Axis,
    series: Sequence[Series],
    *,
    dots: bool = False,
    bin_width: float | None = None,
) -> Chart:
    """Line chart, optionally with dots; with ``bin_width``, a histogram whose left bin edges are ``Series.x``."""
    shapes = []
    for one in series:
        points = [(x, y) for x, y in zip(one.x, one.y) if y is not None]
        if bin_width:
            points = [corner for x, y in points for corner in ((x, y), (x + bin_width, y))]
        places = [(round(x_axis.across(x), 1), round(y_axis.up(y), 1)) for x, y in points]
        filled = [(places[0][0], BOTTOM), *places, (places[-1][0], BOTTOM)] if bin_width and places else []
        shapes.append(_shape(one)._replace(line=_path(places), area=_path(filled), dots=places if dots else ()))
    return Chart(
        title,
        x_axis.title,
        y_axis.title,
        [(f'{tick:,g}', round(x_axis.across(tick), 1)) for tick in x_axis.ticks()],
        _y_labels(y_axis),
        shapes,
        _line_stops(series, x_axis, y_axis, bin_width),
        ' '.join(_in_words(one, y_axis) for one in series),
    )


def bar_chart(
    title: str, x_title: str, categories: Sequence[tuple[str, str]], y_axis: Axis, series: Sequence[Series]
) -> Chart:
    """Grouped bar chart. A category is (label, details shown with its values); ``Series.y`` has a value for each."""
    room = (RIGHT - LEFT) / max(len(categories), 1)
    width = min(0.76 * room / max(len(series), 1), 30)
    centres = [LEFT + (i + 0.5) * room for i in range(len(categories))]
    stops = [[', '.join(filter(None, category))] for category in categories]
    shapes = []
    for place, one in enumerate(series):
        bars = []
        for lines, centre, y in zip(stops, centres, one.y):
            lines.append(f'{one.name}: {_read(y, y_axis)}')
            if y is not None:
                left, top = centre + (place - len(series) / 2) * width, y_axis.up(y)
                bars.append((round(left, 1), round(top, 1), round(max(width - 1, 1), 1), round(BOTTOM - top, 1)))
        shapes.append(_shape(one)._replace(bars=bars))
    return Chart(
        title,
        x_title,
        y_axis.title,
        [(label, round(x, 1)) for (label, _), x in zip(categories, centres)],
        _y_labels(y_axis),
        shapes,
        [(round(x, 1), '\n'.join(lines)) for x, lines in zip(centres, stops)],
        '. '.join(', '.join(lines) for lines in stops) + '.',
    )


def sparkline(values: Sequence[float], words: str) -> Sparkline:
    top, last = max(*values, 1e-12), max(len(values) - 1, 1)
    return Sparkline(_path([(2 + 96 * i / last, 24 - 22 * value / top) for i, value in enumerate(values)]), words)


def _shape(series: Series) -> Shape:
    """Series differ in dashes as well as in colour."""
    dashes = series.slot // COLOURS if series.slot >= COLOURS else series.slot % 4
    return Shape(series.name, f's{series.slot % COLOURS}', f'd{dashes}')


def _path(places: Sequence[tuple[float, float]]) -> str:
    return 'M' + 'L'.join(f'{x:.1f} {y:.1f}' for x, y in places) if places else ''


def _y_labels(axis: Axis) -> list[tuple[str, float]]:
    return [(f'{tick:,g}', round(axis.up(tick), 1)) for tick in axis.ticks()]


def _read(value: float | None, axis: Axis) -> str:
    return '–' if value is None else f'{value:,.{axis.digits}f}'


def _line_stops(
    series: Sequence[Series], x_axis: Axis, y_axis: Axis, bin_width: float | None
) -> list[tuple[float, str]]:
    """Values of all series at each x, subsampled to at most ``MAX_STOPS``."""
    xs = sorted({x for one in series for x in one.x})
    stops = []
    for x in xs[:: math.ceil(len(xs) / MAX_STOPS) or 1]:
        lines = [f'{x:,g} to {x + bin_width:,g}' if bin_width else f'{x_axis.title.split(",")[0]} {x:,g}']
        lines += [
            f'{one.name}: {_read(one.y[bisect_left(one.x, x)], y_axis)}'
            for one in series
            if one.x and one.x[0] <= x <= one.x[-1]
        ]
        stops.append((round(x_axis.across(x + (bin_width or 0) / 2), 1), '\n'.join(lines)))
    return stops


def _in_words(one: Series, y_axis: Axis) -> str:
    points = [(y, x) for x, y in zip(one.x, one.y) if y is not None]
    if not points:
        return f'{one.name}: no values.'
    places = (('', points[0]), ('', points[-1]), ('highest ', max(points)), ('lowest ', min(points)))
    return f'{one.name}: ' + ', '.join(f'{what}{_read(y, y_axis)} at {x:,g}' for what, (y, x) in places) + '.'
