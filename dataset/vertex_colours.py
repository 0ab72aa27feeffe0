"""Colours of the hand's vertices, from which dense targets are drawn."""

from pathlib import Path

import numpy as np

from manopth import HandPair, safe_pickle
from utils.errors import UserError
from utils.files import read_pickle
from utils.hand import NUM_VERTICES


def canonical_colours(models: HandPair) -> np.ndarray:
    """(778, 3) in [0, 1], for both hands: where a vertex lies in the box of the right hand at rest."""
    template = models[1].template
    low, high = template.min(0), template.max(0)
    return ((template - low) / (high - low)).astype(np.float32)


def load_colours(path: str | Path) -> np.ndarray:
    """``v_color.pkl`` -> (778, 3) float32 in [0, 1], columns in the order of the dense pictures' BGR channels."""
    colours = safe_pickle.as_array(read_pickle(path))
    if not isinstance(colours, np.ndarray) or colours.shape != (NUM_VERTICES, 3) or colours.dtype.kind != 'f':
        found = f'{colours.dtype} {colours.shape}' if isinstance(colours, np.ndarray) else type(colours).__name__
        raise UserError(f'{path} holds {found}; vertex colours are a float array of shape ({NUM_VERTICES}, 3).')
    if not (np.isfinite(colours).all() and colours.min() >= 0 and colours.max() <= 1):
        raise UserError(f'{path}: vertex colours must lie in [0, 1]; get the file again or leave --colours out.')
    return colours.astype(np.float32)
