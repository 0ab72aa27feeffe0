"""Vertex colours of the hand, from which dense maps are rendered."""

from pathlib import Path

import numpy as np

from manopth import HandPair, safe_pickle
from utils.errors import UserError
from utils.files import read_pickle
from utils.hand import NUM_VERTICES


def canonical_colours(hands: HandPair) -> np.ndarray:
    """Colours (778, 3) in [0, 1] of both hands: position of each vertex in the bounding box of the right rest mesh."""
    template = hands.right.template
    low, high = template.min(0), template.max(0)
    return ((template - low) / (high - low)).astype(np.float32)


def load_colours(path: str | Path) -> np.ndarray:
    """Read ``v_color.pkl`` -> (778, 3) float32 in [0, 1], BGR as in the dense maps; raises UserError."""
    colours = safe_pickle.as_array(read_pickle(path))
    if not isinstance(colours, np.ndarray) or colours.shape != (NUM_VERTICES, 3) or colours.dtype.kind != 'f':
        found = f'{colours.dtype} {colours.shape}' if isinstance(colours, np.ndarray) else type(colours).__name__
        raise UserError(f'{path} holds {found}, but vertex colours are a float array of shape ({NUM_VERTICES}, 3).')
    if not (np.isfinite(colours).all() and colours.min() >= 0 and colours.max() <= 1):
        raise UserError(f'{path}: vertex colours must lie in [0, 1]. Copy the file again, or omit --colours.')
    return colours.astype(np.float32)
