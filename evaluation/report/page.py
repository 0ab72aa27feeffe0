"""Render the report as one HTML document from page.html.j2, page.css, viewer.js and page.js."""

import base64
import hashlib
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from evaluation.report import charts, hands, sections
from evaluation.report.inputs import Evaluated
from evaluation.report.samples import draw, meshes
from evaluation.report.views import number
from utils.drawing import HAND_COLOURS_BGR
from utils.hand import BONES

FOLDER = Path(__file__).parent


def environment() -> Environment:
    """Jinja environment with autoescape; pass data to scripts through ``tojson``, which escapes '<'."""
    templates = Environment(
        loader=FileSystemLoader(FOLDER),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    templates.policies['json.dumps_kwargs'] = {'separators': (',', ':'), 'allow_nan': False}
    templates.filters['number'] = number
    templates.globals |= {'plot': charts, 'diagram': hands, 'bones': BONES}
    return templates


def report_page(runs: list[Evaluated]) -> str:
    """Render the evaluation report of one or more runs as a self-contained HTML document."""
    sampled = {run.slot: run.samples for run in runs if run.samples is not None}
    images = {slot: draw(samples) for slot, samples in sampled.items()}
    script = '\n'.join((FOLDER / name).read_text() for name in ('viewer.js', 'page.js'))
    return (
        environment()
        .get_template('page.html.j2')
        .render(
            title=f'Evaluation report: {", ".join(run.run.name for run in runs)}',
            style=(FOLDER / 'page.css').read_text(),
            script=script,
            script_digest=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
            sections=sections.all_sections(runs, images),
            meshes={
                'runs': {slot: meshes(samples) for slot, samples in sampled.items()},
                'colours': [[channel / 255 for channel in reversed(colour)] for colour in HAND_COLOURS_BGR],
            },
        )
    )
