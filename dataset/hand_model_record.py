"""Record which hand model a data set was generated with, in a file beside the data."""

from pathlib import Path

from manopth import HandPair
from utils.errors import UserError
from utils.files import read_json, write_json

HAND_MODEL_RECORD = 'hand_model.json'


def write_hand_model_record(root: str | Path, hands: HandPair) -> None:
    """Record the hand model of a data folder."""
    write_json(Path(root) / HAND_MODEL_RECORD, {'hand_model': hands.identity})


def check_hand_model_record(root: str | Path, hands: HandPair) -> None:
    """Raise UserError if the folder records another hand model. Without a record (real data), any model is accepted."""
    path = Path(root) / HAND_MODEL_RECORD
    if not path.exists():
        return
    content = read_json(path)
    recorded = content.get('hand_model') if isinstance(content, dict) else None
    if recorded != hands.identity:
        raise UserError(
            f'{root} was generated with the hand model {recorded}, but MANO.SOURCE and MANO.PATH select '
            f'{hands.identity}. Set them to the same model, or use another folder.'
        )
