"""View models: the page as plain data for page.html.j2."""

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from evaluation.report.charts import Chart, Sparkline
from evaluation.report.hands import HandDiagram


class Span(NamedTuple):
    """Text with a class in page.css, or with the element 'code' or 'strong'."""

    text: str
    kind: str


Text = str | Sequence[str | Span]


class Table(NamedTuple):
    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[Text | Sparkline]]
    kind: str | None = None  # class in page.css


class Card(NamedTuple):
    """A sample: images as data: URLs; ``slot`` and ``place`` locate its meshes."""

    run: str
    slot: int
    place: int
    title: str
    figures: str
    sample: int  # index in the split
    file: str
    images: dict[str, str]


class Block(NamedTuple):
    """Content of a section, in page order."""

    heading: str | None = None
    warning: Text | None = None
    missing: Iterable[Text] = ()
    notes: Iterable[Text] = ()
    sources: Iterable[Text] = ()
    items: Iterable[str] = ()
    charts: Iterable[Chart] = ()
    hands: Iterable[HandDiagram] = ()
    tables: Iterable[Table] = ()
    cards: Iterable[Card] = ()


class Section(NamedTuple):
    identity: str
    link: str  # navigation text
    title: str
    blocks: Sequence[Block]


def number(value: float | None, digits: int = 2) -> str:
    """Format a metric: '1,234.56', or '–' for None and NaN."""
    return '–' if value is None or not math.isfinite(value) else f'{value:,.{digits}f}'
