"""An open hand with the error of each of its 21 joints written on it."""

from evaluation.report.html import Html, number, tag
from utils.hand import BONES, JOINT_NAMES, LEFT, SIDES

WIDTH, HEIGHT = 360, 350
# The right hand from its back, fingers up: wrist, then thumb to little from base to tip.
PLACES = (
    (190, 320),
    (134, 284),
    (94, 250),
    (60, 216),
    (30, 180),
    (128, 184),
    (116, 136),
    (108, 91),
    (101, 46),
    (176, 172),
    (174, 121),
    (172, 74),
    (171, 28),
    (222, 180),
    (230, 133),
    (236, 88),
    (241, 44),
    (264, 204),
    (285, 163),
    (302, 124),
    (317, 86),
)
PALM = (0, 1, 5, 9, 13, 17)
RADII = (14.0, 18.0)  # of the least and of the greatest error
RAMP = ((255, 243, 196), (253, 200, 112), (240, 142, 62), (204, 74, 34), (122, 28, 20))  # ever darker, also in grey


def hand_diagram(title: str, per_joint: dict[str, dict], side: int, span: tuple[float, float]) -> Html:
    """One hand of ``metrics['per_joint_mm']``; colours and sizes go from the least to the greatest error, ``span``."""
    places = [(WIDTH - x if side == LEFT else x, y) for x, y in PLACES]
    values = [per_joint[name][SIDES[side]] for name in JOINT_NAMES]
    shape = [
        tag('polygon', points=' '.join('{},{}'.format(*places[joint]) for joint in PALM)),
        *(tag('line', x1=places[a][0], y1=places[a][1], x2=places[b][0], y2=places[b][1]) for a, b in BONES),
    ]
    joints = [_joint(name, place, value, span) for name, place, value in zip(JOINT_NAMES, places, values)]
    words = ', '.join(f'{spoken(name)} {number(value, 1)}' for name, value in zip(JOINT_NAMES, values))
    svg = tag(
        'svg',
        tag('g', *shape, class_='flesh'),
        *joints,
        *_scale(span, 8 if side != LEFT else WIDTH - 118),
        viewBox=f'0 0 {WIDTH} {HEIGHT}',
        role='img',
        aria_label=f'{title}, mean error in mm: {words}.',
    )
    return tag('figure', tag('figcaption', title), svg, class_='chart hand')


def spoken(joint: str) -> str:
    """'index_2' -> 'index 2'."""
    return joint.replace('_', ' ')


def _joint(name: str, place: tuple[int, int], value: float | None, span: tuple[float, float]) -> Html:
    share = 0.0 if value is None else _share(value, span)
    colour = ramp(share)
    text = '–' if value is None else f'{value:.1f}' if value < 99.95 else f'{value:.0f}'
    return tag(
        'g',
        tag('title', f'{spoken(name)}: {number(value)} mm'),
        tag(
            'circle',
            cx=place[0],
            cy=place[1],
            r=f'{RADII[0] + share * (RADII[1] - RADII[0]):.1f}',
            fill='rgb({},{},{})'.format(*colour),
            class_='joint',
        ),
        tag(
            'text', text, x=place[0], y=place[1], dy='.35em', text_anchor='middle', class_='on-joint', fill=ink(colour)
        ),
    )


def _scale(span: tuple[float, float], left: int) -> list[Html]:
    cells = [
        tag('rect', x=left + 5 * i, y=HEIGHT - 34, width=5.2, height=9, fill='rgb({},{},{})'.format(*ramp(i / 21)))
        for i in range(22)
    ]
    return [
        *cells,
        tag('text', f'{span[0]:.1f}', x=left, y=HEIGHT - 10),
        tag('text', f'{span[1]:.1f} mm', x=left + 110, y=HEIGHT - 10, text_anchor='end'),
    ]


def _share(value: float, span: tuple[float, float]) -> float:
    return min(max((value - span[0]) / max(span[1] - span[0], 1e-9), 0.0), 1.0)


def ramp(share: float) -> tuple[int, int, int]:
    """0 to 1 -> RGB."""
    number_of, part = divmod(share * (len(RAMP) - 1), 1)
    low = int(number_of)
    high = min(low + 1, len(RAMP) - 1)
    return tuple(round(a + part * (b - a)) for a, b in zip(RAMP[low], RAMP[high]))


def ink(colour: tuple[int, int, int]) -> str:
    """Black or white, whichever stands out more (WCAG's contrast; the better one is never below 4.5)."""
    linear = [(c / 255 / 12.92 if c <= 10 else ((c / 255 + 0.055) / 1.055) ** 2.4) for c in colour]
    luminance = sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear))
    return '#000' if (luminance + 0.05) ** 2 > 0.05 * 1.05 else '#fff'
