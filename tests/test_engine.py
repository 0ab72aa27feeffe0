"""The demo's engine: ONNX Runtime where a network has been exported and the package is installed, else PyTorch."""

import hashlib

import numpy as np
import pytest
import torch
from tiny import TINY

from inference import engine as module
from inference import load_reconstructor
from inference.engine import EXPORT_RECORD, choose_engine, export_folder, exported_from, files_of_earlier_export
from inference.export import EXPORT_VERSION, LastEstimate, description, output_of, values_of
from models import build_model
from models.checkpoint import save_checkpoint
from utils.config import load_config
from utils.errors import UserError
from utils.files import read_json, sha256_of_file, write_json

GRAPH = b'a graph'
CPU = torch.device('cpu')


@pytest.fixture(scope='module')
def trained(standin):
    torch.manual_seed(0)
    cfg = load_config(None, [*TINY, 'MODEL.INIT', 'identity', 'MODEL.PRESENCE', 'true', 'MODEL.CONFIDENCE', 'true'])
    return build_model(cfg, standin).eval(), cfg


@pytest.fixture
def checkpoint(trained, standin, tmp_path):
    model, cfg = trained
    save_checkpoint(tmp_path / 'best.pth', model=model, cfg=cfg, hand_model=standin.identity)
    return tmp_path / 'best.pth'


@pytest.fixture
def exported(trained, standin, checkpoint, monkeypatch):
    """As apps/export.py leaves it, and a runtime that loads the file: the network itself, counting its images."""
    model, cfg = trained
    folder = export_folder(checkpoint)
    folder.mkdir()
    (folder / 'dir.onnx').write_bytes(GRAPH)
    record = {
        'version': EXPORT_VERSION,
        'weights_sha256': sha256_of_file(checkpoint),
        'hand_model': standin.identity,
        **description(cfg),
        'files': {'dir.onnx': {'sha256': hashlib.sha256(GRAPH).hexdigest()}},
    }
    write_json(folder / EXPORT_RECORD, record)
    seen = []

    def load(path):
        assert path.read_bytes() == GRAPH
        return lambda images: (seen.append(len(images)), LastEstimate(model)(images))[1]

    monkeypatch.setattr(module, '_ONNX', module._ONNX._replace(load=load))
    monkeypatch.setattr(module.importlib.util, 'find_spec', lambda name: name)
    return folder, seen


def chosen(name, checkpoint, trained, standin, device=CPU):
    return choose_engine(name, checkpoint, cfg=trained[1], hand_model=standin.identity, device=device)


def test_an_exported_network_runs_through_onnx_runtime_with_the_same_hands(checkpoint, exported):
    image = np.random.default_rng(0).integers(0, 256, (90, 120, 3), np.uint8)
    reconstruct = load_reconstructor(checkpoint, device='cpu')
    assert reconstruct.engine.description == f'ONNX Runtime ({exported[0] / "dir.onnx"})'
    got, expected = reconstruct([image] * 3), load_reconstructor(checkpoint, device='cpu', engine='torch')([image] * 3)
    assert exported[1] == [3]
    for name in got._fields:
        torch.testing.assert_close(getattr(got, name), getattr(expected, name), rtol=1e-4, atol=1e-4)


def test_outputs_of_a_file_become_the_output_again(trained):
    values = values_of(trained[0](torch.randn(2, 3, 64, 64)))
    for names in (list(values), [name for name in values if name != 'presence'], list(values)[:7], list(values)[:6]):
        again = values_of(output_of([values[name] for name in names]))
        assert list(again) == names
        for name in names:
            torch.testing.assert_close(again[name], values[name])


def test_without_an_export_pytorch_computes_and_the_command_is_named(checkpoint, trained, standin):
    engine = chosen('auto', checkpoint, trained, standin)
    assert engine.run is None
    assert f'python apps/export.py --model {checkpoint} --format onnx' in engine.description
    with pytest.raises(UserError, match=r'ONNX Runtime cannot be used: .*apps/export\.py'):
        chosen('onnx', checkpoint, trained, standin)


def test_pytorch_computes_where_it_is_asked_for_or_a_graph_would_not_run(checkpoint, exported, trained, standin):
    assert chosen('torch', checkpoint, trained, standin).description == 'PyTorch'
    assert chosen('auto', checkpoint, trained, standin, torch.device('cuda')).description == 'PyTorch'
    model, cfg = trained
    bfloat16 = load_config(None, ['EVAL.PRECISION', 'bfloat16'], base=cfg)
    assert 'bfloat16' in chosen('auto', checkpoint, (model, bfloat16), standin).description
    with pytest.raises(UserError, match='cuda'):
        chosen('onnx', checkpoint, trained, standin, torch.device('cuda'))
    with pytest.raises(UserError, match='auto, torch, onnx, not tensorrt'):
        chosen('tensorrt', checkpoint, trained, standin)


def test_a_missing_package_is_named(checkpoint, exported, trained, standin, monkeypatch):
    monkeypatch.setattr(module.importlib.util, 'find_spec', lambda name: None)
    assert 'pip install -r requirements-export.txt' in chosen('auto', checkpoint, trained, standin).description


def test_another_export_of_the_same_network_keeps_the_first_ones_graph(checkpoint, exported, trained, standin):
    folder, (_, cfg) = exported[0], trained
    about = exported_from(sha256_of_file(checkpoint), cfg, standin.identity)
    kept = files_of_earlier_export(folder / EXPORT_RECORD, about)
    assert list(kept) == ['dir.onnx']
    write_json(folder / EXPORT_RECORD, {**about, 'files': kept | {'dir.pt2': {}}})
    assert chosen('onnx', checkpoint, trained, standin).run is not None
    for other in (about | {'weights_sha256': '0' * 64}, about | {'hand_model': 'mano'}):
        assert files_of_earlier_export(folder / EXPORT_RECORD, other) == {}
    (folder / EXPORT_RECORD).write_text('{"files": ')
    assert files_of_earlier_export(folder / EXPORT_RECORD, about) == {}
    assert files_of_earlier_export(folder / 'none.json', about) == {}
    write_json(folder / EXPORT_RECORD, {**about, 'files': kept})
    (folder / 'dir.onnx').unlink()
    assert files_of_earlier_export(folder / EXPORT_RECORD, about) == {}


@pytest.mark.parametrize(
    'change', ['other weights', 'other hands', 'old', 'damaged graph', 'damaged record', 'no file']
)
def test_an_export_that_does_not_fit_is_never_used(change, checkpoint, exported, trained, standin):
    folder, record = exported[0], read_json(exported[0] / EXPORT_RECORD)
    if change == 'other weights':  # as after more training
        record['weights_sha256'] = '0' * 64
    elif change == 'other hands':
        record['hand_model'] = 'mano'
    elif change == 'old':
        del record['weights_sha256']
    elif change == 'no file':
        record['files'] = {}
    elif change == 'damaged graph':
        (folder / 'dir.onnx').write_bytes(GRAPH[:-1])
    write_json(folder / EXPORT_RECORD, record)
    if change == 'damaged record':
        (folder / EXPORT_RECORD).write_text('{')
    engine = chosen('auto', checkpoint, trained, standin)
    assert engine.run is None and str(folder) in engine.description and 'xport again' in engine.description
