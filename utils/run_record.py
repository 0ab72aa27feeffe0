"""Record how a result came about: code, packages, machine, seed, data, hand model and command line.

Everything in it is a string, a number or a container of them, so it fits into checkpoints, JSON and reports.
"""

import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch

from utils import distributed
from utils.files import write_json

RUN_RECORD = 'run.json'  # in a run folder
UNKNOWN = 'unknown'
_CHECKOUT = Path(__file__).resolve().parents[1]
_GIT_SECONDS = 20


class Row(NamedTuple):
    """One line of a record."""

    title: str
    text: str


def run_record(
    *,
    hand_model: str,
    data: dict[str, Any],
    device: torch.device | str,
    seed: int | None = None,
    command: Sequence[str] | None = None,
    previous: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """The record of a run that starts or, with ``previous`` from its checkpoint, continues now.

    data: name of a split -> its identity or identities (``dataset.identity``). command: by default ``sys.argv``. A run
    that continues keeps its sessions; one that differs from the last in nothing but its start only counts there.
    """
    now = datetime.now(UTC).isoformat(timespec='seconds')
    session = {
        'command': command_line(sys.argv if command is None else command),
        'code': code_version(),
        'packages': package_versions(),
        'machine': machine(device),
    }
    sessions: list[dict[str, Any]] = []
    if previous is not None and isinstance(previous.get('sessions'), list):
        sessions = [dict(each) for each in previous['sessions'] if isinstance(each, dict)]
    if sessions and all(sessions[-1].get(key) == value for key, value in session.items()):
        sessions[-1] |= {'latest_start': now, 'starts': sessions[-1].get('starts', 1) + 1}
    else:
        sessions.append({'started': now, 'latest_start': now, 'starts': 1, **session})
    own = {} if seed is None else {'seed': seed}
    return own | {'hand_model': hand_model, 'data': data, 'sessions': sessions}


def write_run_record(folder: str | Path, record: dict[str, Any], *, config: dict[str, Any]) -> None:
    """Write run.json: the record and the configuration."""
    write_json(Path(folder) / RUN_RECORD, record | {'config': config})


def command_line(arguments: Sequence[str]) -> str:
    """Arguments as a shell reads them; bytes that are not UTF-8 become question marks."""
    return os.fsencode(shlex.join(arguments)).decode(errors='replace')


def code_version() -> dict[str, Any]:
    """The commit of the checkout that holds this file, and whether its tracked files were changed since.

    The commit is 'unknown' without git, or where the code does not lie at the top of its own repository.
    """
    top = _git('rev-parse', '--show-toplevel')
    if top is None or Path(top).resolve() != _CHECKOUT:
        return {'commit': UNKNOWN, 'changed': UNKNOWN}
    commit, changes = _git('rev-parse', 'HEAD'), _git('status', '--porcelain', '--untracked-files=no')
    changed = UNKNOWN if changes is None else bool(changes)
    return {'commit': commit or UNKNOWN, 'changed': changed}


def _git(*arguments: str) -> str | None:
    # Within a git hook, these variables point to the repository that the hook belongs to.
    environment = {key: value for key, value in os.environ.items() if not key.startswith('GIT_')}
    try:
        done = subprocess.run(
            ['git', '--no-optional-locks', '-C', str(_CHECKOUT), *arguments],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=_GIT_SECONDS,
            env=environment,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return os.fsdecode(done.stdout).rstrip('\n')


def package_versions() -> dict[str, str]:
    """Versions of Python and of the packages that computed results depend on."""
    try:
        torchvision = version('torchvision')
    except PackageNotFoundError:
        torchvision = UNKNOWN
    return {
        'python': platform.python_version(),
        'torch': str(torch.__version__),
        'torchvision': torchvision,
        'numpy': np.__version__,
        'opencv': cv2.__version__,
    }


def machine(device: torch.device | str) -> dict[str, Any]:
    """Operating system, device and number of processes."""
    device = torch.device(device)
    name = torch.cuda.get_device_name(device) if device.type == 'cuda' else platform.processor() or platform.machine()
    return {
        'system': platform.platform(),
        'device': f'{device.type}: {name}',
        'cores': distributed.usable_cores(),
        'processes': distributed.rank_and_world()[1],
    }


def record_rows(record: Any) -> list[Row]:
    """The record as text for consoles and reports; of several sessions, the last, and the number of starts.

    Without a record, as in checkpoints of earlier versions, one row says so. Malformed entries are left out.
    """
    record = _mapping(record)
    sessions = record.get('sessions')
    sessions = [_mapping(each) for each in sessions] if isinstance(sessions, list) else []
    session = sessions[-1] if sessions else {}
    code, packages, where = (_mapping(session.get(key)) for key in ('code', 'packages', 'machine'))
    changed = code.get('changed')
    suffix = ' with uncommitted changes' if changed is True else '' if changed is False else ' (changes unknown)'
    first, starts = _mapping(sessions[0] if sessions else None), sum(_starts(each) for each in sessions)
    rows = [
        ('started', f'{first["started"]}{f", {starts} starts" if starts > 1 else ""}' if 'started' in first else ''),
        ('command', session.get('command', '')),
        ('code', f'{code["commit"]}{suffix}' if 'commit' in code else ''),
        ('packages', ', '.join(f'{name} {value}' for name, value in packages.items())),
        ('machine', ', '.join(f'{name} {value}' for name, value in where.items())),
        ('seed', record.get('seed', '')),
        ('hand model', record.get('hand_model', '')),
        *((f'data, {split}', _describe_data(identity)) for split, identity in _mapping(record.get('data')).items()),
    ]
    found = [Row(title, str(text)) for title, text in rows if text != '']
    return found or [Row('record', 'none')]


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _starts(session: dict[str, Any]) -> int:
    starts = session.get('starts', 1)
    return starts if isinstance(starts, int) else 1


def _describe_data(identity: Any) -> str:
    identities = identity if isinstance(identity, list) else [identity]
    return '; '.join(
        f'{each.get("samples")} samples, digest {str(each.get("digest"))[:12]}' for each in map(_mapping, identities)
    )
