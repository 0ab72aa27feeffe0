"""What the repository states about itself in more than one place agrees."""

import re
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / 'pyproject.toml').read_text())['project']


def requirements(name: str) -> list[str]:
    lines = (line.split('#')[0].strip() for line in (ROOT / name).read_text().splitlines())
    return sorted(line for line in lines if line and not line.startswith('-r '))


def test_requirements_are_the_dependencies():
    assert requirements('requirements.txt') == sorted(PROJECT['dependencies'])


@pytest.mark.parametrize('extra', PROJECT['optional-dependencies'])
def test_every_extra_is_a_requirements_file(extra):
    assert requirements(f'requirements-{extra}.txt') == sorted(PROJECT['optional-dependencies'][extra])


def test_every_requirements_file_is_an_extra():
    found = {path.stem.removeprefix('requirements-') for path in ROOT.glob('requirements-*.txt')}
    assert found == PROJECT['optional-dependencies'].keys()


def test_one_version_everywhere():
    newest = re.search(r'^## (\S+)', (ROOT / 'CHANGELOG.md').read_text(), re.M)[1]
    assert PROJECT['version'] == newest == yaml.safe_load((ROOT / 'CITATION.cff').read_text())['version']


def test_documents_point_to_files_that_a_clone_holds():
    missing = []
    for page in (*ROOT.glob('*.md'), *ROOT.glob('docs/*.md'), *ROOT.glob('*/README.md')):
        for target in re.findall(r'\]\(([^)#\s]+)', page.read_text()):
            if not target.startswith(('http', 'mailto:')) and not (page.parent / target).exists():
                missing.append(f'{page.relative_to(ROOT)}: {target}')
    assert missing == []
