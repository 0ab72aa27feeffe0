"""Every script starts from any folder, and those that prepare data import no compiler."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# Those that prepare data first: what is imported stays.
SCRIPTS = [
    str(path.relative_to(ROOT))
    for path in [*sorted(ROOT.glob('dataset/*.py')), ROOT / 'train.py', *sorted(ROOT.glob('[ab]*/*.py'))]
    if "__name__ == '__main__'" in path.read_text()
]
# One process for all of them, since importing PyTorch takes seconds. Each has to find the repository's modules itself.
PROGRAM = """
import json, runpy, sys
from pathlib import Path
root, path, found = Path(sys.argv[1]), sys.path[1:], {}
ours = f'{root}/'  # less what is installed in an environment there: NumPy cannot be loaded twice
for script in sys.argv[2:]:
    for name, module in list(sys.modules.items()):
        if str(getattr(module, '__file__', None)).startswith(ours) and not module.__file__.startswith(sys.prefix):
            del sys.modules[name]
    sys.path[:] = [str((root / script).parent), *path]
    sys.argv[:] = [script, '--help']
    try:
        runpy.run_path(str(root / script), run_name='__main__')
    except BaseException as end:
        found[script] = repr(end), 'torch._dynamo' in sys.modules
print(json.dumps(found))
"""


@pytest.mark.slow  # imports PyTorch in a process of its own
def test_every_script_starts_from_any_folder_and_preparing_data_imports_no_compiler(tmp_path):
    assert len(SCRIPTS) > 20 and {'dataset/interhand.py', 'train.py', 'apps/run_demo.py'} <= set(SCRIPTS)
    command = [sys.executable, '-c', PROGRAM, str(ROOT), *SCRIPTS]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert {script: end for script, (end, _) in found.items()} == dict.fromkeys(SCRIPTS, 'SystemExit(0)')
    assert not [script for script, (_, compiler) in found.items() if compiler and script.startswith('dataset/')]
