"""HTML out of Python in which text is escaped unless it was made here: what is read from files can never be markup."""

import html
import json
import math
from collections.abc import Iterable
from typing import Any

VOID = frozenset(('meta', 'img', 'input', 'line', 'rect', 'circle', 'path', 'polyline', 'polygon'))


class Html(str):
    """Text that is markup already. Only this module makes it."""


def tag(name: str, /, *children: Any, **attributes: Any) -> Html:
    """``<name attributes>children</name>``; children that are not Html are escaped, None and '' left out.

    Attributes: 'class_' is class, other underscores become dashes; None and False are left out, True stands alone.
    """
    head = name
    for key, value in attributes.items():
        if value is None or value is False:
            continue
        key = key.rstrip('_').replace('_', '-')
        head += f' {key}' if value is True else f' {key}="{html.escape(str(value))}"'
    if name in VOID:
        return Html(f'<{head}>' if name in ('meta', 'img', 'input') else f'<{head}/>')
    return Html(f'<{head}>{joined(children)}</{name}>')


def joined(children: Iterable[Any]) -> Html:
    return Html(
        ''.join(
            child if isinstance(child, Html) else html.escape(str(child)) for child in children if child is not None
        )
    )


def json_script(identity: str, value: Any) -> Html:
    """Data for a script of the page. A '<' in it could end the element: it is written as its number."""
    text = json.dumps(value, separators=(',', ':'), allow_nan=False).replace('<', '\\u003c')
    return Html(f'<script type="application/json" id="{html.escape(identity)}">{text}</script>')


def raw_element(name: str, content: str) -> Html:
    """A <style> or <script> of our own files, in which nothing is escaped."""
    return Html(f'<{name}>{content}</{name}>')


def number(value: float | None, digits: int = 2) -> str:
    """'12.34'; '–' for what was not measured."""
    return '–' if value is None or not math.isfinite(value) else f'{value:,.{digits}f}'


def scrolling_table(caption: str, head: list[Any], rows: list[list[Any]], *, class_: str = '') -> Html:
    """A table that scrolls inside its own box; the first cell of each row is its header."""
    body = [tag('tr', tag('th', row[0], scope='row'), *(tag('td', cell) for cell in row[1:])) for row in rows]
    columns = tag('tr', *(tag('th', cell, scope='col') for cell in head))
    table = tag('table', tag('thead', columns), tag('tbody', *body), class_=class_ or None, aria_label=caption)
    # A <caption> would be as wide as the table, and cut off with it.
    return joined(
        [
            tag('p', caption, class_='caption'),
            tag('div', table, class_='scroll', tabindex='0', role='region', aria_label=caption),
        ]
    )
