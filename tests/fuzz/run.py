"""Fuzz the readers of files from outside with atheris (pip install -r requirements-fuzz.txt; Linux).

    python tests/fuzz/run.py --runs 1000000                 # every reader in turn, then a table
    python tests/fuzz/run.py config boxes --seconds 600     # some of them, ten minutes each

The corpus grows in output/fuzz/READER; an input that finds a fault is written to output/fuzz/faults/READER. Fix the
reader, move the input to tests/fuzz/found/READER, and tests/test_fuzz.py keeps it. Exits with 1 if there was a fault.
"""

import argparse
import re
import resource
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / 'manopth/tests'), str(ROOT / 'tests')]

NAMES = ('annotation', 'boxes', 'checkpoint', 'config', 'image', 'joints', 'mano', 'packed', 'raw', 'record', 'wheel')
MEMORY = 2 << 30  # bytes that a reader may take beyond those of the libraries
LONGEST_SECONDS = 10  # of one input


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('readers', nargs='*', metavar='READER', help=f'of {", ".join(NAMES)} (default: all)')
    parser.add_argument('--runs', type=int, default=1_000_000, help='executions of each (default: %(default)s)')
    parser.add_argument('--seconds', type=int, default=0, help='stop each after this time; 0: no limit')
    parser.add_argument('--out', type=Path, default=ROOT / 'output/fuzz', metavar='DIR', help='default: output/fuzz')
    parser.add_argument('--in-this-process', action='store_true', help=argparse.SUPPRESS)
    args = parser.parse_args()
    if unknown := set(args.readers) - set(NAMES):
        parser.error(f'{", ".join(sorted(unknown))} is not a reader; choose from {", ".join(NAMES)}.')
    names = args.readers or list(NAMES)
    if args.in_this_process:
        fuzz(names[0], args)
    print(f'{"reader":<12}{"executions":>12}{"seconds":>9}{"faults":>8}', flush=True)
    return max(fuzz_in_child(name, args) for name in names)


def fuzz_in_child(name: str, args: argparse.Namespace) -> int:
    """atheris ends its process, so each reader has its own -> 0, or 1 for a fault."""
    options = ['--runs', str(args.runs), '--seconds', str(args.seconds), '--out', str(args.out), '--in-this-process']
    began = time.monotonic()
    child = subprocess.run([sys.executable, __file__, name, *options], capture_output=True, check=False)
    text = child.stderr.decode(errors='replace') + child.stdout.decode(errors='replace')
    executed = re.findall(r'stat::number_of_executed_units:\s*(\d+)', text) or re.findall(r'^#(\d+)\s', text, re.M)
    executed = int(executed[-1]) if executed else 0
    print(f'{name:<12}{executed:>12,}{time.monotonic() - began:>9.0f}{int(child.returncode != 0):>8}', flush=True)
    if child.returncode:
        print('\n'.join(text.splitlines()[-40:]), flush=True)
    return int(child.returncode != 0)


def fuzz(name: str, args: argparse.Namespace) -> None:
    import atheris

    with atheris.instrument_imports(include=instrumented(name), enable_loader_override=False):
        from tests.fuzz import readers
    reader = readers.READERS[name]
    corpus, faults = (args.out / part for part in (name, f'faults/{name}'))
    for folder in (corpus, faults):
        folder.mkdir(parents=True, exist_ok=True)
    for number, content in enumerate([*reader.seeds(), *readers.found(name)]):
        (corpus / f'seed{number}').write_bytes(content)
    limit_memory()

    def one_input(content: bytes) -> None:
        readers.run(reader, content)

    options = [
        f'-runs={args.runs}',
        f'-max_total_time={args.seconds}',
        f'-timeout={LONGEST_SECONDS}',
        '-rss_limit_mb=4096',
    ]
    options += [f'-artifact_prefix={faults}/', '-print_final_stats=1', '-max_len=16384', '-verbosity=1']
    atheris.Setup([sys.argv[0], *options, str(corpus)], one_input)
    atheris.Fuzz()


def instrumented(name: str) -> list[str]:
    """The modules to instrument, from the text of the table: importing it would import them."""
    source = (Path(__file__).parent / 'readers.py').read_text()
    entry = re.search(rf"'{name}': Reader\([^()]*\(([^()]*)\)", source)
    assert entry, f'tests/fuzz/readers.py has no reader {name}'
    return re.findall(r"'([^']+)'", entry[1])


def limit_memory() -> None:
    pages = int(Path('/proc/self/statm').read_text().split()[0])
    limit = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


if __name__ == '__main__':
    sys.exit(main())
