"""Record which hand model a data set was generated with, in a file beside the data."""

from pathlib import Path

from manopth import HandPair
from utils.errors import UserError
from utils.files import read_json, remove_stale_partials, write_json
from utils.ownership import owned

HAND_MODEL_RECORD = 'hand_model.json'
LONGEST_WAIT_S = 60.0  # for other processes that write into the same folder


def write_hand_model_record(root: str | Path, hands: HandPair) -> None:
    """Record the hand model of a data folder."""
    write_json(Path(root) / HAND_MODEL_RECORD, {'hand_model': hands.identity})


def claim_hand_model_record(root: str | Path, identity: str, *, replace: bool = False) -> None:
    """Record the identity of the hand model of a data folder into which several processes may write.

    Raises UserError if the folder records another one, unless ``replace``.
    """
    path = Path(root) / HAND_MODEL_RECORD
    with owned(path, wait_s=LONGEST_WAIT_S):
        recorded = recorded_hand_model(root)
        if recorded is not None and recorded != identity and not replace:
            raise UserError(
                f'{root} holds data of the hand model {recorded}, but this data is of {identity}. Use another folder.'
            )
        if recorded != identity:
            write_json(path, {'hand_model': identity})
        remove_stale_partials(path.parent, of=path.name)


def recorded_hand_model(root: str | Path) -> str | None:
    """The identity of the recorded hand model; None without a record (real data). Raises UserError if it is damaged."""
    path = Path(root) / HAND_MODEL_RECORD
    if not path.exists():
        return None
    content = read_json(path)
    return str(content.get('hand_model')) if isinstance(content, dict) else 'unknown'


def check_hand_model_record(root: str | Path, hands: HandPair) -> None:
    """Raise UserError if the folder records another hand model. Without a record (real data), any model is accepted."""
    recorded = recorded_hand_model(root)
    if recorded is not None and recorded != hands.identity:
        raise UserError(
            f'{root} was generated with the hand model {recorded}, but MANO.SOURCE and MANO.PATH select '
            f'{hands.identity}. Set them to the same model, or use another folder.'
        )
