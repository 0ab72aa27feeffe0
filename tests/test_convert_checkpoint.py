"""The published form, there and back, on a network of the published size with weights and hands made by code."""

import pytest
import torch

from apps import convert_checkpoint
from models import build_model, published
from models.checkpoint import load_model, read_checkpoint, save_checkpoint, write_checkpoint
from utils.config import load_config
from utils.errors import UserError

HANDS = ['MANO.SOURCE', 'standin']


@pytest.fixture(scope='module')
def net(standin) -> dict[str, torch.Tensor]:
    """All 963 published entries; nothing in them is zero or as a fresh network has it."""
    cfg = load_config(None, [*published.CONFIGURATION, *HANDS])
    torch.manual_seed(0)
    net = published.whole_published(build_model(cfg, standin).state_dict(), cfg)
    hands = published.hand_arrays(standin)
    return {
        key: value
        if key in hands
        else torch.full_like(value, 5)
        if value.dtype == torch.int64
        else torch.rand_like(value) + 0.1
        for key, value in net.items()
    }


@pytest.fixture(scope='module')
def converted(net, tmp_path_factory):
    """(published file, ours, published again)."""
    folder = tmp_path_factory.mktemp('convert')
    paths = [folder / name for name in ('DIR.pth', 'ours.pth', 'back.pth')]
    torch.save({'net': net}, paths[0])
    assert convert_checkpoint.main(['--src', str(paths[0]), '--dst', str(paths[1]), *HANDS]) == 0
    assert convert_checkpoint.main(['--src', str(paths[1]), '--dst', str(paths[2]), '--reverse']) == 0
    return paths


@pytest.fixture(scope='module')
def ours(converted):
    """The network of the converted file, in evaluation mode; tests leave it as it is."""
    return load_model(converted[1]).model


def test_there_and_back_is_exact_to_the_bit(net, converted):
    back = torch.load(converted[2], weights_only=True)['net']
    assert back.keys() == net.keys() and len(net) == 963
    assert [key for key in net if back[key].dtype != net[key].dtype or not torch.equal(back[key], net[key])] == []


def test_no_hand_array_is_in_ours_and_the_fingertip_is_recorded(converted, ours, standin):
    content = read_checkpoint(converted[1])
    tensors = content['model'] | content['published_rest']
    assert [key for key, value in tensors.items() if {778, 1538} & set(value.shape)] == []
    assert content['config']['MODEL']['LEFT_MIDDLE_TIP'] == 445
    assert content['hand_model'].startswith('standin')
    assert ours.hand_head.hand_layer.tip_vertices[:, 2].tolist() == [445, 444]


def test_the_published_file_loads_directly_as_the_same_network(converted, ours):
    direct, expected = load_model(converted[0], HANDS).model.state_dict(), ours.state_dict()
    assert direct.keys() == expected.keys()
    assert all(torch.equal(direct[key], expected[key]) for key in expected)


def test_wrong_ways_round_are_one_sentence(converted, tmp_path, capsys):
    assert convert_checkpoint.main(['--src', str(converted[1]), '--dst', str(tmp_path / 'a.pth'), *HANDS]) == 2
    assert '--reverse' in capsys.readouterr().err
    assert convert_checkpoint.main(['--src', str(tmp_path / 'no.pth'), '--dst', str(tmp_path / 'a.pth')]) == 2
    assert 'no.pth does not exist' in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
    with pytest.raises(UserError, match='has the published form: apps/convert_checkpoint.py'):
        read_checkpoint(converted[0])


def test_two_norms_that_the_published_code_counts_apart_come_back_apart(net, standin):
    """One counter here stands for two there; should they differ, the source's own are kept."""
    key = next(key for key in net if 'img2joint_right' in key and key.endswith('num_batches_tracked'))
    model, cfg, rest = published.load_published({'net': net | {key: torch.tensor(7)}}, path='DIR.pth', overrides=HANDS)
    assert published.whole_published(model.state_dict(), cfg, rest)[key] == 7


@pytest.mark.parametrize(
    'key, value', [('MODEL.PRESENCE', 'true'), ('MODEL.BONE_RADIUS', '[1, 1, 1]'), ('ROOT_JOINT', '9')]
)
def test_what_is_part_of_the_published_network_cannot_be_changed(net, key, value):
    with pytest.raises(UserError, match=rf'DIR\.pth was trained with {key} .* cannot be changed afterwards'):
        published.load_published({'net': net}, path='DIR.pth', overrides=[*HANDS, key, value])


def test_published_weights_of_another_type_are_listed(net):
    key = next(key for key in net if key.endswith('num_batches_tracked'))
    changed = net | {'decoder.seg.3.bias': net['decoder.seg.3.bias'].half(), key: net[key].float()}
    with pytest.raises(UserError, match=r'2 of another type: .*decoder.seg.3.bias is torch.float16') as refused:
        published.load_published({'net': changed}, path='DIR.pth', overrides=HANDS)
    assert f'{key} is torch.float32' in str(refused.value)
    with pytest.raises(UserError, match='963 missing: .*; 1 unknown: 3'):
        published.load_published({'net': {3: torch.zeros(1)}}, path='DIR.pth', overrides=HANDS)


@pytest.mark.parametrize(
    'key, value',
    [
        ('ROOT_JOINT', '9'),
        ('MODEL.PRESENCE', 'true'),
        ('MODEL.CONFIDENCE', 'true'),
        ('MODEL.STAGES', '1'),
        ('MODEL.BACKBONE', 'resnet18'),
        ('MODEL.DENSE_HEADS', 'false'),
        ('MODEL.DENSE_CHANNELS', '32'),
        ('MODEL.ATTENTION_CHANNELS', '64'),
        ('MODEL.FIRST_STRIDE', '8'),
        ('MODEL.TOKEN_CHANNELS', '64'),
        ('MODEL.JOINT_FEATURES', '32'),
        ('MODEL.GRAPH_LAYERS', '2'),
        ('MODEL.GRAPH_SKIP', 'true'),
        ('MODEL.ENHANCE_LAST', 'false'),
    ],
)
def test_a_network_that_the_published_code_lacks_is_refused(key, value):
    with pytest.raises(UserError, match=f'cannot run this network: {key} is '):
        published.whole_published({}, load_config(None, [*HANDS, key, value]))


def test_a_tensor_without_a_place_in_the_published_form_is_refused(ours):
    state, cfg = ours.state_dict(), load_config(None, HANDS)
    with pytest.raises(UserError, match='cannot run this network: it lacks presence_head.0.weight'):
        published.whole_published(state | {'presence_head.0.weight': torch.zeros(1)}, cfg)


def test_dropped_entries_never_replace_the_networks_own(net, ours):
    state, cfg = ours.state_dict(), load_config(None, HANDS)
    idle = {'backbone.fc.bias': net['backbone.fc.bias'].half()}
    whole = published.whole_published(state, cfg, idle | {'decoder.seg.3.bias': torch.zeros(3)})
    assert torch.equal(whole['decoder.seg.3.bias'], net['decoder.seg.3.bias'])
    assert torch.equal(whole['backbone.fc.bias'], idle['backbone.fc.bias'].float())
    for odd in ({'backbone.fc.bias': torch.zeros(3)}, {'encoder.weight': torch.zeros(1)}):
        with pytest.raises(UserError, match=f'has no {next(iter(odd))} of this shape'):
            published.whole_published(state, cfg, odd)


def test_foreign_content_under_the_same_key_is_refused(tmp_path, capsys):
    torch.save({'net': {'encoder.weight': torch.zeros(2), 'epoch': 3}}, tmp_path / 'odd.pth')
    assert convert_checkpoint.main(['--src', str(tmp_path / 'odd.pth'), '--dst', str(tmp_path / 'a.pth')]) == 2
    error = capsys.readouterr().err
    assert 'odd.pth is not the published DIR checkpoint' in error and '2 unknown: encoder.weight, epoch' in error
    assert error.count('\n') == 1 and [path.name for path in tmp_path.iterdir()] == ['odd.pth']


@pytest.mark.slow  # builds the published network
def test_published_to_safetensors_and_ours_is_exact_to_the_bit(converted, tmp_path):
    pytest.importorskip('safetensors')
    middle, path = tmp_path / 'a.safetensors', tmp_path / 'ours.pth'
    assert convert_checkpoint.main([str(converted[0]), str(middle), *HANDS]) == 0
    assert convert_checkpoint.main([str(middle), str(path)]) == 0
    expected, other = read_checkpoint(converted[1]), read_checkpoint(path)
    assert expected.keys() == other.keys()
    assert expected['config'] == other['config'] and expected['hand_model'] == other['hand_model']
    for part in ('model', 'published_rest'):
        assert expected[part].keys() == other[part].keys()
        assert all(torch.equal(value, other[part][key]) for key, value in expected[part].items())


def test_safetensors_hold_no_training_state(standin, tmp_path, capsys):
    pytest.importorskip('safetensors')
    layer = torch.nn.Linear(2, 3)
    parts = {'model': layer, 'cfg': load_config(None, HANDS), 'hand_model': standin.identity, 'progress': {'epoch': 2}}
    average = {f'module.{key}': value for key, value in layer.state_dict().items()}
    save_checkpoint(tmp_path / 'latest.pth', **parts, optimizer={'state': {0: torch.ones(2)}}, average=average)
    source, middle, back = (str(tmp_path / name) for name in ('latest.pth', 'a.safetensors', 'back.pth'))
    assert convert_checkpoint.main(['--src', source, '--dst', middle]) == 0
    assert 'without its training state (optimizer, average)' in capsys.readouterr().out
    assert convert_checkpoint.main([middle, back]) == 0
    content = read_checkpoint(back)
    assert content['progress'] == {'epoch': 2} and 'optimizer' not in content and 'average' not in content
    assert all(torch.equal(value, content['model'][key]) for key, value in layer.state_dict().items())

    assert convert_checkpoint.main([source, middle, 'EVAL.BATCH_SIZE', '3']) == 2
    assert 'latest.pth has its own configuration' in capsys.readouterr().err
    assert convert_checkpoint.main([source, middle, '--reverse']) == 2
    assert 'a.safetensors: the published form is a .pth file' in capsys.readouterr().err
    assert convert_checkpoint.main([source]) == 2
    assert 'Pass the checkpoint to convert and the file to write' in capsys.readouterr().err


def test_half_precision_halves_the_file_and_loads_in_full(converted, ours, tmp_path, capsys):
    original = ours.state_dict()
    for name in ('half.safetensors', 'half.pth'):
        path = tmp_path / name
        assert convert_checkpoint.main([str(converted[1]), str(path), '--half']) == 0
        assert path.stat().st_size < 0.51 * converted[1].stat().st_size
        loaded = load_model(path).model.state_dict()
        for key, value in loaded.items():
            assert value.dtype == original[key].dtype
            assert torch.equal(value, original[key].half().to(value.dtype) if value.is_floating_point() else value)
    back = tmp_path / 'back.pth'
    assert convert_checkpoint.main([str(path), str(back), '--reverse']) == 0
    published.published_state(torch.load(back, weights_only=True), path=back)  # its types are those of the form


def test_what_half_precision_cannot_hold_stays_as_it_is(converted, tmp_path):
    content = read_checkpoint(converted[1])
    first, second = list(content['model'])[:2]
    content['model'][first].view(-1)[0] = 1e6
    content['model'][second].view(-1)[0] = torch.nan
    write_checkpoint(tmp_path / 'large.pth', content)
    assert convert_checkpoint.main([str(tmp_path / 'large.pth'), str(tmp_path / 'a.safetensors'), '--half']) == 0
    halved = read_checkpoint(tmp_path / 'a.safetensors')['model']
    assert torch.equal(halved[first], content['model'][first])
    assert halved[second].dtype == torch.half and halved[second].view(-1)[0].isnan()


def test_half_precision_of_the_published_form_is_refused(converted, tmp_path, capsys):
    assert convert_checkpoint.main([str(converted[1]), str(tmp_path / 'a.pth'), '--half', '--reverse']) == 2
    assert 'leave --half or --reverse out' in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
