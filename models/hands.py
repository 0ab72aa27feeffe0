"""Load the pair of hand models that the configuration selects with MANO.SOURCE and MANO.PATH."""

from pathlib import Path

from manopth import HandPair, ManoError, load_hand_pair
from manopth.standin import standin_pair
from utils.config import CHECKOUT, default_config
from utils.errors import UserError

DEFAULT_PATH = default_config().MANO.PATH


def load_hands(source: str = 'files', path: str = DEFAULT_PATH) -> HandPair:
    """Load both hand models: 'files' reads MANO_LEFT.pkl and MANO_RIGHT.pkl in ``path``, 'standin' generates them.

    The default path is that of the working folder if it exists, else that of the checkout.
    Raises UserError if the files are missing, swapped or damaged, or contain code.
    """
    if source == 'standin':
        return standin_pair()
    if source != 'files':
        raise UserError(f"MANO.SOURCE is '{source}'; it must be 'files' or 'standin'.")
    folder = Path.cwd() / path  # absolute, so that a message states where it looked
    if path == DEFAULT_PATH and not folder.exists():
        folder = CHECKOUT / path
    try:
        return load_hand_pair(folder)
    except ManoError as error:
        raise UserError(f'{error} Or set MANO.SOURCE standin to run on stand-in hands (misc/README.md).') from None
