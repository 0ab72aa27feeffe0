"""Figures of an evaluation as metrics.json holds them, and as the console prints them."""

import math
from collections.abc import Sequence
from typing import Any

from dataset.damage import Damage
from evaluation.aggregation import Samples, intervals
from evaluation.metrics import Protocol
from evaluation.registry import METRICS, Metric, headline
from utils.hand import SIDES


def summarise(samples: Samples, protocol: Protocol, metrics: tuple[Metric, ...] = METRICS) -> dict[str, Any]:
    """The headline figures, left / right / all (their plain mean), with the number of frames and the protocol."""
    figures = {metric.key: metric.figure(samples) for metric in headline(metrics)}
    frames = len(next(iter(samples.values())))
    return figures | {'frames': frames, 'protocol': protocol._asdict() | {'description': protocol.describe()}}


def breakdown(samples: Samples, metrics: tuple[Metric, ...] = METRICS) -> dict[str, Any]:
    """Everything else in metrics.json, from all columns of the last stage."""
    figures = {
        metric.key: metric.figure(samples)
        for metric in metrics
        if metric.in_json and not metric.headline and metric.applies(samples)
    }
    return {'interval_95': intervals(samples, [metric.key for metric in headline(metrics)])} | figures


def format_summary(summary: dict[str, Any], metrics: tuple[Metric, ...] = METRICS) -> str:
    """The headline as published evaluations print it."""
    lines = []
    for metric in headline(metrics):
        value, unit = summary[metric.key], metric.unit
        if metric.per_hand:
            lines += [
                f'{metric.title}:',
                '    ' + ', '.join(f'{side}: {value[side]:.6f} {unit}' for side in SIDES),
                f'    all: {value["all"]:.6f} {unit}',
            ]
        else:
            lines.append(f'{metric.title}: {value:.6f} {unit}')
    return '\n'.join(lines)


def format_damage(damage: Sequence[Damage]) -> str:
    """The samples that were left out, one line each; empty without any."""
    if not damage:
        return ''
    what = 'sample was' if len(damage) == 1 else 'samples were'
    return f'{len(damage)} damaged {what} left out:\n' + ''.join(f'    {one.detail}\n' for one in damage)


def format_breakdown(summary: dict[str, Any], metrics: tuple[Metric, ...] = METRICS) -> str:
    """Intervals, then every metric below the headline."""
    lines = [f'95 % intervals (bootstrap over {summary["frames"]} frames):']
    for metric in headline(metrics):
        interval = summary['interval_95'][metric.key]
        low, high = interval['all'] if metric.per_hand else interval
        if math.isnan(low):
            continue
        lines.append(f'    {metric.title + ":":24}{low:9.3f} to {high:9.3f} {metric.unit}')
    for metric in metrics:
        if not metric.headline:
            lines += metric.console_lines(summary)
    return '\n'.join(lines)


def format_grid(grid: list[dict[str, Any]], metrics: tuple[Metric, ...] = METRICS) -> str:
    """Several protocols side by side: one column for each summary."""
    protocols = [summary['protocol'] for summary in grid]
    lines = [
        f'{"every protocol":36}' + ''.join(f'{"root " + str(p["root_joint"]):>12}' for p in protocols),
        ' ' * 36 + ''.join(f'{"scale on" if p["scale"] else "scale off":>12}' for p in protocols),
    ]
    for metric in headline(metrics):
        if metric.per_hand:
            for side in (*SIDES, 'all'):
                values = ''.join(f'{summary[metric.key][side]:12.3f}' for summary in grid)
                lines.append(f'{f"{metric.title}, {side}":32}{metric.unit:4}{values}')
        else:
            values = ''.join(f'{summary[metric.key]:12.3f}' for summary in grid)
            lines.append(f'{metric.title:32}{metric.unit:4}{values}')
    return '\n'.join(lines)
