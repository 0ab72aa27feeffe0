"""The configuration's door to the hand models: MANO.SOURCE and MANO.PATH -> both hands."""

from manopth import HandPair, ManoError, load_hand_pair
from manopth.standin import standin_pair
from utils.errors import UserError


def load_hands(source: str = 'files', path: str = 'misc/mano') -> HandPair:
    """Both hand models: ``source`` 'files' reads ``path``/MANO_{LEFT,RIGHT}.pkl, 'standin' generates hands by code.

    Raises UserError if the files are missing, swapped, damaged or hold foreign code.
    """
    if source == 'standin':
        return standin_pair()
    if source != 'files':
        raise UserError(f"MANO.SOURCE is '{source}'; it must be 'files' or 'standin'.")
    try:
        return load_hand_pair(path)
    except ManoError as error:
        raise UserError(f'{error} Or set MANO.SOURCE standin to run on stand-in hands (misc/README.md).') from None
