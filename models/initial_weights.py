"""Start a training from a checkpoint's weights (TRAIN.INIT_FROM): ours or the published one, whole or in parts."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from manopth import HandPair
from models import DIR, published
from models.checkpoint import checkpoint_file, read_checkpoint, read_content
from utils.errors import UserError
from utils.files import sha256_of_file

_NAMES_SHOWN = 20  # in an error message


class InitialWeights(NamedTuple):
    """Where a run's first weights come from, as its log records them."""

    path: str
    sha256: str
    hand_model: str  # that they were trained on
    loaded: int  # tensors
    left_out: list[str]  # parts, by TRAIN.INIT_WITHOUT

    def describe(self, hands: HandPair) -> str:
        """One line for the console."""
        without = f', without {", ".join(self.left_out)}' if self.left_out else ''
        other = ''
        if self.hand_model != hands.identity:
            other = f'; they were trained on the hand model {self.hand_model}, this run uses {hands.identity}'
        return f'Starting from the weights of {self.path}{without} ({self.loaded} tensors{other}).'


def needs_imagenet(without: Iterable[str]) -> bool:
    """Whether a part of the backbone is left out, so that it still has to come from ImageNet."""
    return any(part.split('.')[0] == 'backbone' for part in without)


def check_not_own_output(path: str, output_dir: str) -> None:
    """Raise UserError if the checkpoint lies in the folder that the new run is going to write."""
    source, own = Path(path).resolve(), Path(output_dir).resolve()
    if source == own or (source.parent == own and not source.is_dir()):
        raise UserError(
            f'TRAIN.INIT_FROM {path} lies in OUTPUT_DIR, the folder of this run itself. Continue that run with '
            '--resume, or choose another OUTPUT_DIR.'
        )


def load_initial_weights(model: DIR, path: str, *, without: Sequence[str] = (), hands: HandPair) -> InitialWeights:
    """Load a checkpoint's weights into ``model``: ours (of a folder, its best.pth) or the published one.

    Of a latest.pth, these are the weights themselves and not their moving average, which best.pth holds.
    without: prefixes of parameter names, at a dot, that keep the weights they have. The hand model may be another one;
    ``InitialWeights.hand_model`` records it. Raises UserError if the file cannot be read or holds no weights, if what
    is not left out does not fit, and if a prefix matches nothing.
    """
    state, hand_model = _read_weights(path, hands)
    own = model.state_dict()
    names = own.keys() | state.keys()
    if unknown := [part for part in without if not any(_within(name, part) for name in names)]:
        raise UserError(
            f'TRAIN.INIT_WITHOUT names {", ".join(unknown)}, but neither this network nor {path} has a part of that '
            f'name; their parts are {", ".join(sorted({_part(name) for name in names}))}.'
        )
    wanted = {name for name in names if not any(_within(name, part) for part in without)}
    _check_fit(own, state, wanted, path=path)
    loaded = {name: state[name] for name in sorted(wanted)}
    if broken := [name for name, value in loaded.items() if not bool(value.isfinite().all())]:
        raise UserError(f'{path} holds NaN or infinity in {broken[0]} and {len(broken) - 1} other tensors.')
    model.load_state_dict(own | loaded)
    return InitialWeights(str(path), sha256_of_file(checkpoint_file(path)), hand_model, len(loaded), list(without))


def _read_weights(path: str, hands: HandPair) -> tuple[dict[str, Tensor], str]:
    """-> state_dict with our names, identity of its hand model."""
    content = read_content(path)
    if published.is_published(content):
        weights = published.published_state(content, path=path)
        same = published.differing_array(content['net'], hands) is None
        return weights, hands.identity if same else 'of the published file'
    if isinstance(content, dict) and content.keys() >= {'state', 'param_groups'}:
        raise UserError(f'{path} holds the state of an optimizer and no weights. TRAIN.INIT_FROM needs a checkpoint.')
    content = read_checkpoint(path)
    if not content['model']:
        raise UserError(f'{path} holds no weights. TRAIN.INIT_FROM needs the best.pth or latest.pth of a run.')
    return content['model'], content['hand_model']


def _check_fit(own: dict[str, Tensor], state: dict[str, Any], wanted: set[str], *, path: str) -> None:
    odd = {name: f'{name} is missing' for name in wanted & (own.keys() - state.keys())}
    odd |= {name: f'{name} is not part of this network' for name in wanted & (state.keys() - own.keys())}
    odd |= {
        name: f'{name} is {tuple(state[name].shape)}, not {tuple(own[name].shape)}'
        for name in wanted & own.keys() & state.keys()
        if state[name].shape != own[name].shape
    }
    if odd:
        shown = '; '.join(odd[name] for name in sorted(odd)[:_NAMES_SHOWN])
        more = f'; and {len(odd) - _NAMES_SHOWN} more' if len(odd) > _NAMES_SHOWN else ''
        raise UserError(
            f'{path} does not fit this network: {shown}{more}. Set the MODEL keys that it was trained with, or start '
            f'these parts anew with TRAIN.INIT_WITHOUT "[{", ".join(sorted({_part(name) for name in odd}))}]".'
        )


def _within(name: str, part: str) -> bool:
    return name == part or name.startswith(f'{part}.')


def _part(name: str) -> str:
    """The part of the network that a parameter belongs to: 'backbone', 'stages.0' ..."""
    return '.'.join(name.split('.')[: 2 if name.startswith(('stages.', 'neck.')) else 1])
