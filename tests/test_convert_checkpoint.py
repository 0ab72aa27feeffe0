"""The published form, there and back, on a network of the published size with weights and hands made by code."""

import pytest
import torch

from apps import convert_checkpoint
from models import build_model, published
from models.checkpoint import load_model, read_checkpoint
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


def test_there_and_back_is_exact_to_the_bit(net, converted):
    back = torch.load(converted[2], weights_only=True)['net']
    assert back.keys() == net.keys() and len(net) == 963
    assert [key for key in net if back[key].dtype != net[key].dtype or not torch.equal(back[key], net[key])] == []


def test_no_hand_array_is_in_ours_and_the_fingertip_is_recorded(converted, standin):
    content = read_checkpoint(converted[1])
    tensors = content['model'] | content['published_rest']
    assert [key for key, value in tensors.items() if {778, 1538} & set(value.shape)] == []
    assert content['config']['MODEL']['LEFT_MIDDLE_TIP'] == 445
    assert content['hand_model'].startswith('standin')
    layer = load_model(converted[1]).model.hand_head.hand_layer
    assert layer.tip_vertices[:, 2].tolist() == [445, 444]


def test_the_published_file_loads_directly_as_the_same_network(converted):
    direct, ours = (load_model(path, HANDS).model.state_dict() for path in converted[:2])
    assert direct.keys() == ours.keys()
    assert all(torch.equal(direct[key], ours[key]) for key in ours)


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
    'key, value',
    [
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


def test_foreign_content_under_the_same_key_is_refused(tmp_path, capsys):
    torch.save({'net': {'encoder.weight': torch.zeros(2), 'epoch': 3}}, tmp_path / 'odd.pth')
    assert convert_checkpoint.main(['--src', str(tmp_path / 'odd.pth'), '--dst', str(tmp_path / 'a.pth')]) == 2
    error = capsys.readouterr().err
    assert 'odd.pth is not the published DIR checkpoint' in error and '2 unknown: encoder.weight, epoch' in error
    assert error.count('\n') == 1 and [path.name for path in tmp_path.iterdir()] == ['odd.pth']
