"""Made-up parameters, images and targets that any NumPy reproduces to the bit.

``uniform`` draws from a Philox stream keyed by a name, so values do not depend on the order of calls. Everything is
computed in float64 and rounded to float32 once.
"""

import zlib

import numpy as np

BATCH, SIZE = 2, 256


def uniform(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """float64 in [-1, 1), a stream of its own for every ``name``."""
    words = np.random.Philox(key=zlib.crc32(name.encode())).random_raw(int(np.prod(shape)))
    return ((words >> np.uint64(11)) * 2.0**-52 - 1.0).reshape(shape)


def parameter(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """One entry of the published checkpoint, scaled so that activations keep their size through the network."""
    if name.endswith('num_batches_tracked'):
        return np.zeros(shape, np.int64)
    draw = uniform(name, shape)
    if name.endswith('running_mean'):
        value = 0.1 * draw
    elif name.endswith('running_var'):
        value = 1 + 0.2 * draw
    elif name.endswith(('mano_left.bias', 'mano_right.bias')):
        value = _upright_hand('left' if 'left' in name else 'right') + 0.15 * draw
    elif name.endswith(('.e_0', '.e_1')):
        value = 1 + draw
    elif name.endswith('spatial_pos_embed'):
        value = 0.5 * draw
    elif name.endswith('.weight') and len(shape) == 1:  # of a normalisation
        value = (0.3 if name.startswith('backbone.') and name.endswith('.bn3.weight') else 1.0) * (1 + 0.2 * draw)
    elif name.endswith('bias'):
        value = 0.1 * draw
    else:
        fan_in = shape[2] if name.endswith('.gconv.W') else int(np.prod(shape[1:]))
        value = np.sqrt(3.0) * (_gain(name) / np.sqrt(float(fan_in))) * draw
    return value.astype(np.float32)


def _upright_hand(side: str) -> np.ndarray:
    """The 64 parameters of a hand without rotation, seen in its own half of the crop."""
    hand = np.zeros(64)
    hand[[0, 4, 61]] = 1, 1, 5
    hand[62:] = -0.2 if side == 'left' else 0.2, 0.05
    return hand


def _gain(name: str) -> float:
    if name.endswith(('mano_left.weight', 'mano_right.weight', 'offset.weight')):
        return 0.35
    if name.endswith('attn.qkv.weight'):
        return 1.5
    if name.endswith(('attn.proj.weight', 'mlp.fc2.weight')):
        return 0.5
    if name.endswith(('.skip_layer.conv.weight', '.head.1.weight', '.downsample.0.weight', '.gconv.W')):
        return 1.0
    return np.sqrt(2.0)


def image() -> np.ndarray:
    """(2, 3, 256, 256) normalised: coarse cells, fine noise and a colour of its own for each sample."""
    cells = uniform('input.base', (BATCH, 3, 8, 8)).repeat(SIZE // 8, 2).repeat(SIZE // 8, 3)
    fine, colour = uniform('input.fine', (BATCH, 3, SIZE, SIZE)), uniform('input.offset', (BATCH, 3, 1, 1))
    return (cells + 0.5 * fine + colour).astype(np.float32)


def targets() -> dict[str, np.ndarray]:
    """Random points and maps: joints and meshes are not consistent, which is enough to pin down every loss."""
    found = {}
    for side, sign in (('left', -1.0), ('right', 1.0)):
        for name, points in (('joint', 21), ('mesh', 778)):
            xyz = np.array([0.04 * sign, 0.01, 1.0]) + 0.09 * uniform(f'target.{name}.{side}', (BATCH, points, 3))
            found[f'{name}_3d_{side}'] = xyz.astype(np.float32)
            found[f'{name}_2d_{side}'] = (xyz[..., :2] * 5.0).astype(np.float32)
    cells = uniform('target.seg', (BATCH, 16, 16))
    classes = np.where(cells < 0, 0, np.where(cells < 0.5, 1, 2))
    found['seg'] = classes.repeat(SIZE // 16, 1).repeat(SIZE // 16, 2)
    found['dense'] = (0.5 + 0.5 * uniform('target.dense', (BATCH, 3, SIZE, SIZE))).astype(np.float32)
    return found
