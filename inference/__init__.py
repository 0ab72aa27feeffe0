"""Hands from images and videos with a trained network.

from inference import load_reconstructor

reconstruct = load_reconstructor()              # the network that is shipped with the code, or a checkpoint's path
hands = reconstruct(images_bgr, boxes)          # lists: (H, W, 3) uint8 and (x, y, width, height) in pixels
hands.vertices                                  # (N, 2, 778, 3) m: left hand, right hand; camera axes
"""

import utils  # noqa: F401  # before PyTorch, see there
from inference.reconstruct import Reconstruction, Reconstructor, load_reconstructor

__all__ = ['Reconstruction', 'Reconstructor', 'load_reconstructor']
