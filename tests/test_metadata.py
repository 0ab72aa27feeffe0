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


def test_the_oldest_torch_reads_crafted_checkpoints_safely():
    # CVE-2026-24747. The two are released together.
    assert {'torch>=2.10', 'torchvision>=0.25'} <= set(PROJECT['dependencies'])


def test_no_requirement_names_one_build():
    """Neither an exact version, which a local +cpu wheel satisfies before one with CUDA, nor another index."""
    lines = [line for path in ROOT.glob('requirements*.txt') for line in path.read_text().splitlines()]
    assert [line for line in lines if re.match(r'[^#]*(==|\+c(pu|u)|--(extra-)?index-url|--find-links)', line)] == []


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
