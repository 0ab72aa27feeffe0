"""Load the pair of hand models that the configuration selects with MANO.SOURCE and MANO.PATH."""

from manopth import HandPair, ManoError, load_hand_pair
from manopth.standin import standin_pair
from utils.errors import UserError


def load_hands(source: str = 'files', path: str = 'misc/mano') -> HandPair:
    """Load both hand models: 'files' reads MANO_LEFT.pkl and MANO_RIGHT.pkl in ``path``, 'standin' generates them.

    Raises UserError if the files are missing, swapped or damaged, or contain code.
    """
    if source == 'standin':
        return standin_pair()
    if source != 'files':
        raise UserError(f"MANO.SOURCE is '{source}'; it must be 'files' or 'standin'.")
    try:
        return load_hand_pair(path)
    except ManoError as error:
        raise UserError(f'{error} Or set MANO.SOURCE standin to run on stand-in hands (misc/README.md).') from None
