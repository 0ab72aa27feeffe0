"""The metrics that the report shows: titles, keys in metrics.json, units."""

from typing import NamedTuple

from utils.hand import SIDES

ERRORS = {'joint error': ('joint_mm', 'all'), 'vert error': ('vert_mm', 'all'), 'root error': ('root_mm',)}
OPTIONAL_COLUMNS = {'box_iou': 'box IoU', 'distance_mm': 'distance mm', 'penetration_mm': 'penetration mm'}


class Binned(NamedTuple):
    """How the report presents a breakdown of metrics.json."""

    title: str
    axis: str  # its title, with the unit
    by: str  # in chart titles
    counted: str  # key of the number of frames or hands
    errors: tuple[str, ...]


BINNED = {
    'by_box_iou': Binned('Overlap of the hands’ bounding boxes', 'box IoU', 'overlap', 'frames', tuple(ERRORS)),
    'by_distance_mm': Binned(
        'Distance between the hands', 'smallest distance, mm', 'distance', 'frames', tuple(ERRORS)
    ),
    'by_visibility': Binned(
        'Visibility', 'visible share of a hand', 'visibility', 'hands', ('joint error', 'vert error')
    ),
}
FURTHER: dict[str, tuple[tuple[str, str], int, int]] = {  # title -> keys, factor, digits
    **{
        f'penetration, {who}: {what}': ((key, name), factor, digits)
        for who, key in (('predicted', 'penetration'), ('true', 'true_penetration'))
        for what, name, factor, digits in (
            ('share of frames, %', 'share', 100, 1),
            ('mean depth, mm', 'mean_mm', 1, 2),
            ('maximum depth, mm', 'worst_mm', 1, 2),
        )
    },
    **{f'segmentation IoU, {name}': (('segmentation_iou', name), 1, 4) for name in ('background', *SIDES, 'hands')},
    **{
        f'root placement in camera space, {name}, mm': (('placement_mm', name), 1, 2)
        for name in (*SIDES, 'all', 'depth')
    },
}
PRESENCE_SHARES = {
    'handedness_accuracy': 'handedness accuracy, %',
    'side_accuracy': 'side of a single hand, %',
    'false_alarms': 'false alarms on empty frames, %',
}
