"""Damaged samples: what counts as damage, what is read in their place, how many a run tolerates, and their record."""

import errno
import hashlib
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

from utils import distributed
from utils.errors import UserError
from utils.files import read_json, write_json

Result = TypeVar('Result')

# Reasons, as tables and files group them.
MISSING, UNREADABLE, BAD_IMAGE, WRONG_SIZE, BAD_ANNOTATION, BAD_LABELS = (
    'missing file',
    'unreadable file',
    'damaged image',
    'wrong image size',
    'damaged annotation',
    'labels not finite or out of range',
)

# Errors of a disk or its network that often pass. ESTALE: the file was replaced on an NFS server.
PASSING_ERRORS = (
    errno.EIO,
    errno.ESTALE,
    errno.ETIMEDOUT,
    errno.EAGAIN,
    errno.ECONNRESET,
    errno.ENETDOWN,
    errno.ENETUNREACH,
    errno.EHOSTDOWN,
    errno.EHOSTUNREACH,
)
# Errors that are about this process and not about the file it opens.
OWN_ERRORS = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS)
PAUSES_S = (0.1, 0.5, 2.0)  # before each further attempt
MOST_REPLACEMENTS = 100  # tries, after which a set is useless

DAMAGED = 'damaged.json'  # in a run folder
FORMAT = 1  # of damaged.json


class DamageError(UserError):
    """A sample cannot be read. The message is one sentence; ``reason`` is one of the above."""

    def __init__(self, message: str, reason: str = BAD_ANNOTATION):  # loader processes pass on the message alone
        super().__init__(message)
        self.reason = reason


class TooMuchDamageError(UserError):
    """More samples are damaged than DATASET.TOLERATED_DAMAGE allows."""


class Damage(NamedTuple):
    """A damaged sample that was met. A batch lists those met while it was read."""

    sample: int  # its number
    file: str  # where it is stored
    reason: str
    detail: str  # one sentence


def read_patiently(read: Callable[[], Result], name: str) -> Result:
    """``read()``, again after a pause where a disk or network error often passes.

    Raises DamageError if it does not pass, and for any other OSError that is about the file.
    """
    for pause in (*PAUSES_S, None):
        try:
            return read()
        except OSError as error:
            if error.errno in OWN_ERRORS:
                raise
            if error.errno not in PASSING_ERRORS or pause is None:
                path = error.filename or name
                raise DamageError(f'{path} cannot be read ({error.strerror or error}).', UNREADABLE) from None
        time.sleep(pause)
    raise AssertionError('unreachable')


def replacement(among: range, *, seed: int, epoch: int, index: int, attempt: int) -> int:
    """The sample to read in place of damaged sample ``index``, one of ``among``.

    It follows from the arguments alone, so it depends neither on the workers nor on where a run was resumed.
    """
    digest = hashlib.sha256(f'{seed} {epoch} {index} {attempt}'.encode()).digest()
    return among[int.from_bytes(digest[:8], 'little') % len(among)]


def tolerated(share: float, samples: int) -> int:
    """How many of ``samples`` may be damaged: any share above 0 tolerates one at least."""
    return math.ceil(share * samples)


def refuse_damage(found: Sequence[Damage], *, most: int, samples: int, folder: Path) -> None:
    """Raises TooMuchDamageError, with the first sample, if more than ``most`` of ``samples`` are damaged."""
    if len(found) > most:
        at_least = 'At least ' if samples > len(found) else ''
        roots = set_folders_of(folder)
        own = (root for root in roots if Path(found[0].file).is_relative_to(Path(root) / folder.name))
        root = next(own, roots[0])
        raise TooMuchDamageError(
            f'{at_least}{len(found):,} of {samples:,} samples of {folder} are damaged, but DATASET.TOLERATED_DAMAGE '
            f'allows {most:,}. The first: {found[0].detail} Restore them or raise DATASET.TOLERATED_DAMAGE; python '
            f'dataset/verify.py --path {root} --split {folder.name} lists all{" of that set" * (len(roots) > 1)}.'
        )


def joint_folder(roots: Sequence[str], split: str) -> Path:
    """What stands for the folder of a split of several sets, {A,B}/SPLIT; not a place on the disk."""
    return Path(f'{{{",".join(roots)}}}') / split


def set_folders_of(folder: Path) -> list[str]:
    """Inverse of ``joint_folder``; of a split of a single set, the set's folder."""
    roots = str(folder.parent)
    return roots[1:-1].split(',') if roots.startswith('{') and roots.endswith('}') else [roots]


class Split(Protocol):
    """What the record needs of a data set."""

    folder: Path

    def __len__(self) -> int: ...

    def is_readable(self, index: int) -> bool: ...


class DamageRecord:
    """The damaged samples that a training run has met: counted over all processes, listed in damaged.json.

    Each process creates one and passes on the damage of every batch, at the same step. ``step``: finished steps of the
    run; the record of a resumed run goes on as it was then, without samples that have been repaired meanwhile.

    share: DATASET.TOLERATED_DAMAGE. log: writes a line of the run's log; None in processes that write nothing.
    """

    def __init__(self, dataset: Split, path: Path, *, step: int, share: float, log: Callable[..., None] | None):
        self.path, self.samples, self.folder, self.log = path, len(dataset), dataset.folder, log
        self.most = tolerated(share, self.samples)
        known = _read_entries(path, step) if distributed.is_main() else []
        still = [entry for entry in known if not dataset.is_readable(entry['sample'])]
        if log and len(still) < len(known):
            print(f'{len(known) - len(still)} of {len(known)} damaged samples in {path} can be read again.')
        # One process decides for all: a network disk may answer each of them differently.
        self.entries: list[dict[str, Any]] = distributed.gather_objects(still)[0]
        if log and (known or path.exists()):
            self._write()
        self._refuse()

    @property
    def found(self) -> list[Damage]:
        return [Damage(**{name: entry[name] for name in Damage._fields}) for entry in self.entries]

    def note(self, damage: Sequence[Damage], *, step: int, epoch: int) -> None:
        """Add what this process met in the batch of ``step``. Past the limit, all raise TooMuchDamageError."""
        if not distributed.any_process(bool(damage)):
            return
        known = {entry['sample'] for entry in self.entries}
        merged = {one.sample: one for part in distributed.gather_objects(list(damage)) for one in part}
        new = [merged[sample]._asdict() for sample in sorted(merged) if sample not in known]
        self.entries += [entry | {'step': step, 'epoch': epoch} for entry in new]
        if self.log and new:
            for number, entry in enumerate(new, len(self.entries) - len(new) + 1):
                text = {name: str(value) for name, value in entry.items()}  # a number would become a curve
                self.log('damage', step, epoch=epoch, **text, damaged_so_far=number)
            self._write()
        self._refuse()

    def _write(self) -> None:
        content = {'format': FORMAT, 'data': str(self.folder), 'samples': self.samples, 'tolerated': self.most}
        write_json(self.path, content | {'damaged': self.entries})

    def _refuse(self) -> None:
        refuse_damage(self.found, most=self.most, samples=self.samples, folder=self.folder)


def _read_entries(path: Path, step: int) -> list[dict[str, Any]]:
    """The entries of damaged.json up to ``step``. Raises UserError if it is damaged itself."""
    if not path.exists() or step == 0:
        return []
    content = read_json(path)
    try:
        entries = [{name: entry[name] for name in (*Damage._fields, 'step', 'epoch')} for entry in content['damaged']]
        return [entry for entry in entries if entry['step'] <= step]
    except (TypeError, KeyError):
        raise UserError(f'{path} is not a list of damaged samples. Remove it; it will be written again.') from None


# The quarantine: samples of a complete split that its readers leave out.

QUARANTINE = 'quarantine.json'  # in the split's folder


def read_quarantine(folder: Path) -> list[int]:
    """The numbers of the quarantined samples of a split, ascending. Raises UserError if its record is damaged."""
    path = folder / QUARANTINE
    if not path.exists():
        return []
    content = read_json(path)
    try:
        numbers = sorted({entry['sample'] for entry in content['damaged']})  # one entry for each damaged file
        if content['format'] == FORMAT and all(type(number) is int and number >= 0 for number in numbers):
            return numbers
    except (TypeError, KeyError):
        pass
    raise UserError(f'{path} is damaged. Restore it, or verify the data set again with --quarantine.')
