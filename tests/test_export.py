"""A network leaves as a file and computes the same there. The ONNX half needs requirements-export.txt."""

import importlib.util
import json
import os
import re
import shutil
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from tiny import TINY

from apps import export as command
from inference import export
from inference.folding import for_inference
from models import build_model
from models.checkpoint import load_model, save_checkpoint
from utils.config import load_config
from utils.errors import UserError
from utils.hand import NUM_JOINTS, NUM_VERTICES

SIZE = 64  # of TINY
IDENTITY = [*TINY, 'MODEL.INIT', 'identity']
MISSING = [name for name in export.FORMATS['onnx'].packages if importlib.util.find_spec(name) is None]
# Tracing two stages takes the better part of a minute: those who have the optional packages take the time.
STAGES = ['MODEL.STAGES', '0' if MISSING else '2']
needs_onnx = pytest.mark.skipif(bool(MISSING), reason=f'optional, requirements-export.txt: no {", ".join(MISSING)}')
UNSEEN = 5  # images of a batch: neither traced nor checked by the script


def images(batch: int) -> torch.Tensor:
    return torch.randn(batch, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(7))


@pytest.fixture(scope='module')
def checkpoint(standin, tmp_path_factory) -> Path:
    """A network whose hands lie in the picture and depend on it."""
    torch.manual_seed(0)
    cfg = load_config(None, IDENTITY + STAGES)
    model = build_model(cfg, standin)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith('_head.weight'):
                weight += 0.003 * torch.randn_like(weight)
    path = tmp_path_factory.mktemp('trained') / 'best.pth'
    save_checkpoint(path, model=model, cfg=cfg, hand_model=standin.identity)
    return path


@pytest.fixture(scope='module')
def network(checkpoint):
    return load_model(checkpoint).model


class Exported(NamedTuple):
    folder: Path  # in it is what the script wrote, in every format that can be written here
    runs: dict  # by format: what it made of the written file to check it
    program: torch.export.ExportedProgram


@pytest.fixture(scope='module')
def exported(checkpoint, tmp_path_factory) -> Exported:
    """The script run for real, once: it takes a while."""
    folder, kept = tmp_path_factory.mktemp('exported'), {}

    def keep(name, function):
        return lambda *args: kept.setdefault(name, function(*args))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export, 'trace', keep('program', export.trace))
        for name, kind in export.FORMATS.items():
            patch.setitem(export.FORMATS, name, kind._replace(load=keep(name, kind.load)))
        formats = ['torch_export'] if MISSING else ['onnx', 'torch_export']
        arguments = ['--model', str(checkpoint), '--out', str(folder), '--format', *formats, 'MANO.SOURCE', 'standin']
        assert command.main(arguments) == 0
    return Exported(folder, kept, kept.pop('program'))


@pytest.fixture
def quick(monkeypatch, exported):
    """Give the script a format that takes no time: ``quick(run)`` with what the written file computes."""

    def install(run, convert=lambda program, names: b'content'):
        monkeypatch.setattr(export, 'trace', lambda model, size: exported.program)
        monkeypatch.setitem(export.FORMATS, 'torch_export', export.Format('dir.pt2', (), convert, lambda path: run))

    return install


def same_as_the_network(run, network):
    with torch.no_grad():
        expected = network(images(UNSEEN)).stages[-1]._asdict()
        got = dict(zip(export.OUTPUTS, run(images(UNSEEN))))
    assert expected['joints_uv'].abs().median() < 1 and expected['vertices'].std(0).max() > 1e-3
    assert got['vertices'].shape == (UNSEEN, 2, NUM_VERTICES, 3)
    assert got['joints_uv'].shape == (UNSEEN, 2, NUM_JOINTS, 2)
    assert (got['vertices'] - expected['vertices']).abs().max() < 1e-6  # m
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=1e-4, atol=1e-4 * value.abs().max().item())


def test_torch_export_computes_the_same_for_a_batch_size_not_seen(exported, network):
    same_as_the_network(exported.runs['torch_export'], network)


@needs_onnx
def test_onnx_computes_the_same_for_a_batch_size_not_seen(exported, network):
    same_as_the_network(exported.runs['onnx'], network)


@needs_onnx
def test_onnx_has_the_opset_names_and_axes_that_are_promised(exported):
    import onnx

    model = onnx.load(exported.folder / 'dir.onnx')
    onnx.checker.check_model(model)
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [('', 18)]
    shapes = {
        value.name: [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in (*model.graph.input, *model.graph.output)
    }
    assert shapes == {'image': ['batch', 3, SIZE, SIZE]} | {
        name: ['batch', *output.shape[1:]] for name, output in export.OUTPUTS.items()
    }
    modes = [
        attribute.s
        for node in model.graph.node
        if node.op_type == 'GridSample'
        for attribute in node.attribute
        if attribute.name == 'mode'
    ]
    assert modes == [b'bilinear'] * 2


def test_what_was_written_is_described_and_nothing_else_is_there(exported, standin):
    said = json.loads((exported.folder / 'export.json').read_bytes())
    names = ['dir.pt2'] if MISSING else ['dir.onnx', 'dir.pt2']
    assert sorted(os.listdir(exported.folder)) == [*names, 'export.json'] and list(said['files']) == names
    differences = [file['largest_differences']['vertices'] for file in said['files'].values()]
    assert all(one['value'] < export.LIMITS['mm'] and one['unit'] == 'mm' for one in differences)
    assert said['input']['shape'] == ['B', 3, SIZE, SIZE] and said['root_joint'] == 0
    assert [output['name'] for output in said['outputs']] == list(export.OUTPUTS)
    assert said['hand_model'] == standin.identity and 'may not be passed on' in said['licence']
    for name, output in (export.OUTPUTS | export.OPTIONAL_OUTPUTS).items():  # the head of the script says the same
        assert re.search(rf'^    {name} +\({", ".join(map(str, output.shape))}\) ', command.__doc__, re.M), name
    here = str(Path(export.__file__).parents[1]).encode()
    assert [name for name in names if here in (exported.folder / name).read_bytes()] == []


@torch.no_grad()
def test_what_only_training_needs_stays_behind(standin):
    model = build_model(load_config(None, IDENTITY), standin).eval()
    lean = for_inference(model)
    kept = list(lean.state_dict())
    assert not any('dense_heads' in name or 'stages.1.projection' in name for name in kept)
    assert any('stages.0.projection' in name for name in kept)
    for before, after in zip(model(images(2)).stages[-1], lean(images(2)).stages[-1]):
        torch.testing.assert_close(before, after, rtol=1e-3, atol=1e-5)  # norms are folded: other rounding


def test_a_missing_package_is_one_sentence(checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, 'onnxscript', None)
    assert command.main(['--model', str(checkpoint), '--out', str(tmp_path / 'out'), '--format', 'onnx']) == 2
    error = capsys.readouterr().err
    assert error.count('\n') == 1 and 'onnxscript' in error and 'pip install -r requirements-export.txt' in error
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('batch, wrong', [(1, 1.5e-6), (3, float('nan'))])  # images, m
def test_a_file_that_differs_is_removed(batch, wrong, checkpoint, network, quick, tmp_path, capsys):
    def run(image):
        hands = network(image).stages[-1]
        if len(image) == batch:
            hands.vertices[-1, 1, 700, 2] += wrong
        return tuple(hands)

    quick(run)
    assert command.main(['--model', str(checkpoint), '--out', str(tmp_path), '--format', 'torch_export']) == 2
    error = capsys.readouterr().err
    assert error.count('\n') == 1 and 'dir.pt2 was removed: its vertices differ' in error and '0.001 mm' in error
    assert not list(tmp_path.iterdir())


def test_what_an_earlier_run_wrote_outlives_a_run_that_fails(checkpoint, network, quick, tmp_path, monkeypatch, capsys):
    quick(lambda image: tuple(network(image).stages[-1]))
    monkeypatch.setitem(export.LIMITS, 'mm', 0)
    (tmp_path / 'dir.pt2').write_bytes(b'of an earlier run')
    assert command.main(['--model', str(checkpoint), '--out', str(tmp_path), '--format', 'torch_export']) == 2
    assert 'was removed' in capsys.readouterr().err
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b'of an earlier run']


def test_a_checkpoint_that_is_replaced_while_it_is_read_is_refused(
    checkpoint, network, quick, tmp_path, monkeypatch, capsys
):
    path = shutil.copy(checkpoint, tmp_path / 'best.pth')

    def load(*arguments):
        loaded = load_model(*arguments)
        save_checkpoint(path, model=loaded.model, cfg=loaded.cfg, hand_model=network.hands.identity, epoch=2)
        return loaded

    quick(lambda image: tuple(network(image).stages[-1]))
    monkeypatch.setattr(command, 'load_model', load)
    assert command.main(['--model', str(path), '--out', str(tmp_path / 'out'), '--format', 'torch_export']) == 2
    assert 'best.pth was replaced while it was read' in capsys.readouterr().err and not (tmp_path / 'out').exists()


def test_outputs_of_another_shape_or_order_are_noticed(network, tmp_path):
    def swapped(image):
        hands = network(image).stages[-1]
        return tuple(hands._replace(vertices=hands.vertices.flip(1), joints_uv=hands.joints_uv[:1]))

    differences = export.largest_differences(swapped, network, SIZE)
    assert differences['offset'] == 0 and differences['vertices'] > 1 and differences['joints_uv'] == float('inf')
    with pytest.raises(UserError, match='its vertices differ'):
        export.check(differences, tmp_path / 'dir.onnx')


def test_a_failing_exporter_is_heard_and_leaves_no_half_file(checkpoint, quick, tmp_path, capsys):
    def convert(program, names):
        print('chatter')
        raise ValueError('no such operator')

    quick(None, convert)
    assert command.main(['--model', str(checkpoint), '--out', str(tmp_path), '--format', 'torch_export']) == 2
    said = capsys.readouterr()
    assert 'chatter' in said.err and 'no such operator' in said.err and 'chatter' not in said.out
    assert said.err.splitlines()[-1].startswith('error: torch_export of torch ')
    assert not list(tmp_path.iterdir())


def test_an_exporter_that_succeeds_is_not_heard(capfd):
    with export.exporter('onnx'):
        print('chatter')
        print('chatter', file=sys.stderr)
    assert capfd.readouterr() == ('', '')


def test_wrong_arguments_are_one_sentence(checkpoint, tmp_path, capsys):
    (tmp_path / 'text.pth').write_text('not a checkpoint')
    for arguments, part in (
        (['--model', str(tmp_path / 'text.pth'), '--format', 'torch_export'], 'text.pth cannot be read'),
        (['--model', str(tmp_path / 'no.pth'), '--format', 'torch_export'], 'no.pth does not exist'),
        (['--model', str(checkpoint), '--format', 'tensorrt'], 'not tensorrt'),
        (['--model', str(checkpoint), '--format', 'ROOT_JOINT', '9'], 'not none'),
        (['--model', str(checkpoint), '--format', 'torch_export', 'ROOT_JOINT', '9'], 'trained with ROOT_JOINT 0'),
    ):
        assert command.main([*arguments, '--out', str(tmp_path / 'out')]) == 2
        error = capsys.readouterr().err
        assert error.count('\n') == 1 and part in error
    assert not (tmp_path / 'out').exists()


def test_presence_and_confidence_are_outputs_of_networks_that_predict_them(standin, tmp_path):
    heads = ['MODEL.PRESENCE', 'true', 'MODEL.CONFIDENCE', 'true']
    cfg = load_config(None, [*IDENTITY, *heads, 'MODEL.STAGES', '0'])  # test_compact traces stages
    torch.manual_seed(0)
    model = build_model(cfg, standin, pretrained=False).eval()
    torch.nn.init.normal_(model.presence_head.evidence[-1].weight, std=0.1)
    names = list(export.outputs_of(cfg))
    assert names == [*export.OUTPUTS, *export.OPTIONAL_OUTPUTS] == list(export.values_of(model(images(2))))
    files = export.write_files(model, cfg, tmp_path, {'torch_export': export.FORMATS['torch_export']})
    assert list(files['dir.pt2']['largest_differences']) == names
    got = dict(zip(names, export.load_torch_export(tmp_path / 'dir.pt2')(images(UNSEEN)), strict=True))
    expected = model(images(UNSEEN))
    torch.testing.assert_close(got['presence'], expected.presence.sigmoid(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(got['deviation'], expected.confidence.deviation, rtol=1e-3, atol=1e-6)
    assert [one['name'] for one in export.description(cfg)['outputs']] == names
