"""Which hand model the meshes of a data folder were generated with: a file beside the data."""

from pathlib import Path

from manopth import HandPair
from utils.errors import UserError
from utils.files import read_json, write_json

# m
HAND_MODEL_RECORD = 'hand_model.json'


def write_hand_model_record(root: str | Path, models: HandPair) -> None:
    """Note in a data folder which hand its meshes are made of."""
    write_json(Path(root) / HAND_MODEL_RECORD, {'hand_model': models.identity})


def check_hand_model_record(root: str | Path, models: HandPair) -> None:
    """Raises UserError if the folder's record names another hand. Without a record (real data) any hand will do."""
    path = Path(root) / HAND_MODEL_RECORD
    if not path.exists():
        return
    content = read_json(path)
    recorded = content.get('hand_model') if isinstance(content, dict) else None
    if recorded != models.identity:
        raise UserError(
            f'{root} was made with the hand model {recorded}, but {models.identity} is set; set '
            'MANO.SOURCE and MANO.PATH to the same hand, or use another folder.'
        )
