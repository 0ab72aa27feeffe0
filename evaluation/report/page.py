"""The page put together: head, navigation, sections, the 3D view's dialog, style and scripts."""

import base64
import hashlib
from pathlib import Path

from evaluation.report import sections
from evaluation.report.html import Html, joined, json_script, raw_element, tag
from evaluation.report.inputs import Evaluated
from evaluation.report.samples import draw, meshes
from utils.drawing import HAND_COLOURS_BGR

FOLDER = Path(__file__).parent


def report_page(runs: list[Evaluated]) -> str:
    """The whole HTML document."""
    shown = [run for run in runs if run.samples is not None and len(run.samples['image'])]
    pictures = {run.slot: draw(run.samples) if run in shown else [] for run in runs}
    parts = [
        sections.headline(runs),
        sections.distributions(runs),
        sections.pck(runs),
        sections.hands(runs),
        sections.stages(runs),
        sections.interaction(runs),
        sections.learning(runs),
        sections.other(runs),
        sections.samples(runs, pictures),
        sections.worst(runs),
    ]
    title = f'Evaluation report: {", ".join(run.run.name for run in runs)}'
    script = '\n'.join((FOLDER / name).read_text() for name in ('viewer.js', 'page.js'))
    data = json_script(
        'meshes',
        {
            'runs': {run.slot: meshes(run.samples) for run in shown},
            'colours': [[channel / 255 for channel in reversed(colour)] for colour in HAND_COLOURS_BGR],
        },
    )
    body = tag(
        'body',
        header(title),
        tag('main', *parts, id='main'),
        viewer() if shown else None,
        data if shown else None,
        raw_element('script', script),
    )
    return f'<!doctype html>\n{tag("html", head(title, script), body, lang="en")}\n'


def head(title: str, script: str) -> Html:
    """No network, and no script but our own: the policy names its digest."""
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    return tag(
        'head',
        tag('meta', charset='utf-8'),
        tag('meta', http_equiv='Content-Security-Policy', content=policy),
        tag('meta', name='viewport', content='width=device-width, initial-scale=1'),
        tag('meta', name='color-scheme', content='light dark'),
        tag('title', title),
        raw_element('style', (FOLDER / 'page.css').read_text()),
    )


NAVIGATION = {
    'figures': 'Figures',
    'distribution': 'Distribution',
    'pck': 'PCK',
    'joints': 'Joints',
    'stages': 'Stages',
    'interaction': 'Interaction',
    'learning': 'Learning',
    'other': 'Further figures',
    'samples': 'Samples',
    'worst': 'Worst samples',
}


def header(title: str) -> Html:
    links = [tag('li', tag('a', text, href=f'#{identity}')) for identity, text in NAVIGATION.items()]
    return tag(
        'header',
        tag('a', 'Skip to the figures', href='#main', class_='skip'),
        tag('h1', title),
        tag('button', 'Dark mode', type='button', id='theme', hidden=True),
        tag(
            'p',
            'Errors are in mm. Charts show their values under the pointer, or with the arrow keys once focused.',
            class_='hint',
        ),
        tag('nav', tag('ul', *links), aria_label='Sections'),
    )


def viewer() -> Html:
    """The dialog of the 3D view: one canvas for all samples."""
    keys = 'Drag or arrow keys turn the hands; wheel, pinch, plus and minus zoom; digits choose the stage.'
    choices = [
        choice('stage', 'Stage', {}),
        choice('truth', 'Truth', {'on': 'on', 'off': 'off', 'only': 'only'}),
        choice('place', 'Hands', {'own': 'each at its own root', 'offset': 'right hand placed by the offset'}),
    ]
    buttons = [
        tag('button', text, type='button', id=identity, aria_label=label)
        for identity, text, label in (
            ('zoom-in', '+', 'Zoom in'),
            ('zoom-out', '−', 'Zoom out'),
            ('reset', 'Reset', 'Reset the view'),
            ('previous', '‹ Previous', 'Previous sample'),
            ('next', 'Next ›', 'Next sample'),
        )
    ]
    return tag(
        'dialog',
        tag(
            'div',
            tag('h2', '', id='viewer-title'),
            tag('button', 'Close', type='button', id='close'),
            class_='viewer-head',
        ),
        tag('p', '', id='viewer-figures'),
        tag(
            'canvas',
            id='canvas',
            tabindex='0',
            role='application',
            aria_label=f'3D view. {keys}',
            aria_describedby='viewer-state',
        ),
        tag('p', '', id='viewer-state', aria_live='polite', class_='quiet'),
        tag('div', *choices, tag('div', *buttons, class_='buttons'), class_='controls'),
        tag(
            'p',
            keys,
            ' Predicted: left hand ',
            tag('span', 'blue', class_='left-hand'),
            ', right hand ',
            tag('span', 'orange', class_='right-hand'),
            '; the truth is a grey veil.',
            class_='quiet',
        ),
        tag('div', '', id='viewer-pictures', class_='pictures'),
        id='viewer',
        aria_labelledby='viewer-title',
    )


def choice(name: str, title: str, options: dict[str, str]) -> Html:
    inputs = joined(
        tag('label', tag('input', type='radio', name=name, value=value, checked=number == 0), text)
        for number, (value, text) in enumerate(options.items())
    )
    return tag('fieldset', tag('legend', title), inputs, id=f'choice-{name}')
