"""The parts of a page as plain data, which page.html.j2 lays out."""

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from evaluation.report.charts import Chart, Sparkline
from evaluation.report.hands import HandDiagram


class Span(NamedTuple):
    """A run of text with a class of page.css; 'code' and 'strong' name elements instead."""

    text: str
    kind: str


Text = str | Sequence[str | Span]


class Table(NamedTuple):
    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[Text | Sparkline]]
    kind: str | None = None  # class in page.css


class Card(NamedTuple):
    """A sample: its images as data: addresses, and where the 3D view finds its meshes."""

    run: str
    slot: int
    place: int
    title: str
    figures: str
    sample: int  # its index in the evaluated split
    file: str
    images: dict[str, str]


class Block(NamedTuple):
    """Content in the order in which the page shows it."""

    heading: str | None = None
    warning: Text | None = None
    missing: Iterable[Text] = ()
    notes: Iterable[Text] = ()
    items: Iterable[str] = ()
    charts: Iterable[Chart] = ()
    hands: Iterable[HandDiagram] = ()
    tables: Iterable[Table] = ()
    cards: Iterable[Card] = ()


class Section(NamedTuple):
    identity: str
    link: str  # in the navigation
    title: str
    blocks: Sequence[Block]


def number(value: float | None, digits: int = 2) -> str:
    """Format a figure: '1,234.56', or '–' for None and NaN."""
    return '–' if value is None or not math.isfinite(value) else f'{value:,.{digits}f}'
