import errno
import os
import pickle
import signal
from collections.abc import Callable

import pytest
import torch
from tiny import TINY

from manopth import HandPair
from models import build_model, checkpoint
from models.checkpoint import (
    FORMAT,
    check_hand_model,
    load_model,
    load_state,
    read_checkpoint,
    read_newest_sound,
    save_checkpoint,
    save_rotating,
    to_plain,
    write_checkpoint,
)
from utils.config import flatten, load_config
from utils.errors import UserError
from utils.files import remove_stale_partials

NO_STAGES = [*TINY, 'MODEL.STAGES', '0']


@pytest.fixture(scope='module')
def trained(standin):
    """(network, its configuration)."""
    torch.manual_seed(3)
    cfg = load_config(None, NO_STAGES)
    return build_model(cfg, standin).eval(), cfg


@pytest.fixture(scope='module')
def saved(trained, standin, tmp_path_factory):
    """A checkpoint, for reading only."""
    path = tmp_path_factory.mktemp('run') / 'best.pth'
    save_checkpoint(path, model=trained[0], cfg=trained[1], hand_model=standin.identity, epoch=7, best=1.5)
    return path


@pytest.fixture
def small(standin):
    """Arguments of ``save_checkpoint`` around a layer, for tests that write."""
    return {'model': torch.nn.Linear(2, 3), 'cfg': load_config(None, NO_STAGES), 'hand_model': standin.identity}


def test_a_network_comes_back_with_its_configuration(trained, saved):
    model, cfg = trained
    loaded, its_cfg, more = load_model(saved)
    assert more['epoch'] == 7 and 'model' not in more
    assert flatten(its_cfg) == flatten(cfg) and not loaded.training
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(value, loaded.state_dict()[key]) for key, value in model.state_dict().items())
    image = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(loaded(image).stages[-1].vertices, model(image).stages[-1].vertices)


def test_overrides_go_over_the_checkpoints_configuration(saved):
    assert load_model(saved, ['EVAL.BATCH_SIZE', '3']).cfg.EVAL.BATCH_SIZE == 3


def test_the_file_holds_tensors_numbers_and_strings_only(saved):
    content = torch.load(saved, weights_only=True)
    assert content['format'] == FORMAT and content['epoch'] == 7 and content['best'] == 1.5
    assert load_config(base=content['config']) == load_config(None, NO_STAGES)
    assert not any({778, 1538} & set(value.shape) for value in content['model'].values())


def test_optimizer_state_comes_back(small, tmp_path):
    model = small['model']
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    save_checkpoint(tmp_path / 'latest.pth', **small, optimizer=optimizer.state_dict())
    other = torch.optim.AdamW(model.parameters())
    other.load_state_dict(read_checkpoint(tmp_path / 'latest.pth')['optimizer'])
    assert torch.equal(other.state[model.weight]['exp_avg'], optimizer.state[model.weight]['exp_avg'])


def test_a_folder_stands_for_its_best(saved, tmp_path):
    assert read_checkpoint(saved.parent)['epoch'] == 7
    with pytest.raises(UserError, match=r'best.pth does not exist'):
        read_checkpoint(tmp_path)


class Foreign:
    def __reduce__(self):
        return os.mkdir, ('must_not_be_made',)


def cut_short(path, saved):
    path.write_bytes(saved.read_bytes()[:20_000])


def cut_at_the_end(path, saved):
    path.write_bytes(saved.read_bytes()[:-100])


def foreign_code(path, saved):
    path.write_bytes(pickle.dumps(Foreign(), protocol=2))


def foreign_code_in_torchs_own_format(path, saved):
    torch.save({'format': FORMAT, 'model': Foreign()}, path)


def text(path, saved):
    path.write_text('not a checkpoint\n' * 10)


def empty(path, saved):
    path.write_bytes(b'')


def another_projects(path, saved):
    torch.save({'net': {'weight': torch.zeros(2)}}, path)


def a_list(path, saved):
    torch.save([1, 2], path)


def missing(path, saved):
    assert not path.exists()


def changed_content(**changes):
    def make(path, saved):
        torch.save({**torch.load(saved, weights_only=True), **changes}, path)

    return make


nested: dict = {}
for _ in range(50):
    nested = {'MODEL': nested}


@pytest.mark.parametrize(
    'make',
    [
        cut_short,
        cut_at_the_end,
        foreign_code,
        foreign_code_in_torchs_own_format,
        text,
        empty,
        another_projects,
        a_list,
        missing,
        changed_content(model=3),
        changed_content(model={'a': 'b'}),
        changed_content(published_rest={'a': 'b'}),
        changed_content(published_rest=[torch.zeros(1)]),
        changed_content(model={3: torch.zeros(1)}),
        changed_content(average=[torch.zeros(1)]),
        changed_content(config='text'),
        changed_content(config={'MODEL': {'STAGES': torch.zeros(3, 3)}}),
        changed_content(config={3: 4}),
        changed_content(config=nested),
        changed_content(config={'NO_SUCH_KEY': 4}),
        changed_content(hand_model=None),
        changed_content(record=[]),
        changed_content(progress={'epoch': torch.zeros(1)}),
    ],
)
def test_other_files_are_refused_by_path(make, saved, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / 'odd.pth'
    make(path, saved)
    with pytest.raises(UserError, match=r'odd\.pth') as refused:
        load_model(path)
    assert '\n' not in str(refused.value)
    assert not (tmp_path / 'must_not_be_made').exists()


def test_another_networks_weights_are_refused(trained, saved):
    for key, value in (('MODEL.MAP_CHANNELS', 32), ('MODEL.STAGES', 1), ('ROOT_JOINT', 9)):
        with pytest.raises(UserError, match=rf'best.pth was trained with {key} '):
            load_model(saved, [key, str(value)])
    model, _ = trained
    state = model.state_dict()
    key = next(iter(state))
    with pytest.raises(UserError, match=rf'a.pth does not fit this network: {key} is \(2,\), not \('):
        load_state(model, state | {key: torch.zeros(2)}, path='a.pth')
    for kind in (torch.int64, torch.complex64):
        with pytest.raises(UserError, match=rf'a.pth does not fit this network: {key} is {kind}, not torch.float32'):
            load_state(model, state | {key: state[key].to(kind)}, path='a.pth')
    load_state(model, state | {key: state[key].double()}, path='a.pth')
    with pytest.raises(UserError, match=r'is missing.* and \d+ more'):
        load_state(model, {}, path='a.pth')
    with pytest.raises(UserError, match='a.pth does not fit this network: more is not part of this network'):
        load_state(model, state | {'more': torch.zeros(1)}, path='a.pth')


def test_a_huge_network_is_refused_before_its_memory_is_allocated(saved, tmp_path, monkeypatch):
    def only_shapes(*arguments, **options):
        assert torch.empty(0).device.type == 'meta'
        return build_model(*arguments, **options)

    monkeypatch.setattr(checkpoint, 'build_model', only_shapes)
    for key, value in (('MAP_CHANNELS', 65536), ('TOKEN_CHANNELS', 65536), ('GRAPH_LAYERS', 100)):
        content = torch.load(saved, weights_only=True)
        content['config']['MODEL'] |= {'STAGES': 2, key: value}
        torch.save(content | {'model': {}}, tmp_path / 'a.pth')
        with pytest.raises(UserError, match='a.pth does not fit this network: .* is missing'):
            load_model(tmp_path / 'a.pth')


def test_another_hand_model_is_refused(trained, standin, tmp_path):
    model, cfg = trained
    other = 'mano:0123456789ab:0123456789ab'
    save_checkpoint(tmp_path / 'a.pth', model=model, cfg=cfg, hand_model=other)
    with pytest.raises(UserError, match=rf'a.pth was trained on the hand model {other}'):
        load_model(tmp_path / 'a.pth')
    check_hand_model({'hand_model': standin.identity}, standin, path='a.pth')
    with pytest.raises(UserError, match='MANO.SOURCE'):
        check_hand_model({'hand_model': standin.identity}, HandPair(*standin[::-1]), path='a.pth')


@pytest.mark.parametrize(
    'error, seen',
    [
        (RuntimeError('[enforce fail at inline_container.cc:603] . unexpected pos 64 vs 0\nmore'), UserError),
        (OSError(28, 'No space left on device'), OSError),
    ],
)
def test_a_full_disk_leaves_the_old_checkpoint_and_nothing_else(small, tmp_path, monkeypatch, error, seen):
    path = tmp_path / 'latest.pth'
    save_checkpoint(path, **small)
    before = path.read_bytes()

    def full(content, file):
        file.write(b'half of it')
        raise error

    monkeypatch.setattr(torch, 'save', full)
    with pytest.raises(seen) as refused:
        save_checkpoint(path, **small)
    assert path.read_bytes() == before and os.listdir(tmp_path) == ['latest.pth']
    if seen is UserError:
        said = str(refused.value)
        assert 'latest.pth' in said and 'disk full' in said and '\n' not in said


def test_folders_are_made(small, tmp_path):
    save_checkpoint(tmp_path / 'a' / 'b' / 'latest.pth', **small)
    assert read_checkpoint(tmp_path / 'a' / 'b' / 'latest.pth')['model'].keys() == {'weight', 'bias'}


def test_plain_configuration_holds_no_special_types():
    plain = to_plain(load_config())

    def leaves(value):
        assert type(value) in (dict, list, str, int, float, bool)
        if isinstance(value, dict):
            for child in value.values():
                leaves(child)

    leaves(plain)
    assert plain['TRAIN']['LR'] == 5e-4


# ---------------------------------------------------------------------------------------------------------------------
# latest.pth and previous.pth
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def run(small, tmp_path):
    """A run folder with epochs 0 and 1 saved."""
    for epoch in range(2):
        save_rotating(tmp_path / 'latest.pth', **small, epoch=epoch)
    return tmp_path


def epochs(folder) -> dict[str, int]:
    """Epoch of each checkpoint; -1 for a damaged one."""
    found = {}
    for path in folder.glob('*.pth'):
        try:
            found[path.stem] = read_checkpoint(path)['epoch']
        except UserError:
            found[path.stem] = -1
    return found


def damage(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_the_last_two_are_kept(run, small):
    assert epochs(run) == {'latest': 1, 'previous': 0}
    save_rotating(run / 'latest.pth', **small, epoch=2)
    assert epochs(run) == {'latest': 2, 'previous': 1} and len(os.listdir(run)) == 2


def test_the_newest_sound_one_is_read(run, small, capsys):
    content, path = read_newest_sound(run)
    assert (content['epoch'], path) == (1, run / 'latest.pth') and capsys.readouterr().out == ''
    damage(run / 'latest.pth')
    content, path = read_newest_sound(run)
    assert (content['epoch'], path) == (0, run / 'previous.pth')
    printed = capsys.readouterr().out
    assert printed.count('\n') == 1 and 'latest.pth cannot be read' in printed and 'SHA-256' in printed
    (run / 'latest.pth').unlink()
    assert read_newest_sound(run)[0]['epoch'] == 0 and 'latest.pth does not exist' in capsys.readouterr().out
    damage(run / 'previous.pth')
    with pytest.raises(UserError, match=r'holds no checkpoint.*latest.pth does not exist.*previous.pth cannot be read'):
        read_newest_sound(run)


def test_a_damaged_file_never_replaces_the_sound_one_before_it(run, small):
    damage(run / 'latest.pth')
    save_rotating(run / 'latest.pth', **small, epoch=2)
    assert epochs(run) == {'latest': 2, 'previous': 0}


def test_the_file_of_an_earlier_version_is_kept_too(small, tmp_path):
    content = {'format': FORMAT, 'model': small['model'].state_dict(), 'config': to_plain(small['cfg'])}
    torch.save({**content, 'hand_model': small['hand_model'], 'epoch': 0}, tmp_path / 'latest.pth')
    save_rotating(tmp_path / 'latest.pth', **small, epoch=1)
    assert epochs(tmp_path) == {'latest': 1, 'previous': 0}


def test_without_hard_links_the_file_is_copied(run, small, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EPERM, 'Operation not permitted')

    monkeypatch.setattr(os, 'link', refuse)
    save_rotating(run / 'latest.pth', **small, epoch=2)
    assert epochs(run) == {'latest': 2, 'previous': 1} and len(os.listdir(run)) == 2


def test_a_save_that_fails_changes_nothing(run, small, monkeypatch):
    def full(_):
        raise OSError(errno.ENOSPC, 'No space left on device')

    monkeypatch.setattr(os, 'fsync', full)
    with pytest.raises(OSError, match='No space left'):
        save_rotating(run / 'latest.pth', **small, epoch=2)
    assert epochs(run) == {'latest': 1, 'previous': 0} and len(os.listdir(run)) == 2


CALLS = ('link', 'fsync', 'replace', 'unlink')


def killed_at(number: int, save: Callable[[], None], *, links: bool) -> bool:
    """Run ``save`` in a process that is killed, as by SIGKILL, just before its ``number``-th call of ``CALLS``.

    Returns False if it ends before.
    """
    child = os.fork()
    if child == 0:
        count = 0

        def counting(call):
            def counted(*args, **kwargs):
                nonlocal count
                if count == number:
                    os.kill(os.getpid(), signal.SIGKILL)
                count += 1
                if call is os_link and not links:
                    raise OSError(errno.EPERM, 'Operation not permitted')
                return call(*args, **kwargs)

            return counted

        try:
            os_link = os.link
            for name in CALLS:
                setattr(os, name, counting(getattr(os, name)))
            save()
            os._exit(0)
        finally:
            os._exit(3)
    status = os.waitpid(child, 0)[1]
    assert status in (0, signal.SIGKILL)
    return status == signal.SIGKILL


@pytest.mark.parametrize(
    'torn, links', [(None, True), (None, False), ('latest', True), ('latest', False), ('previous', True)]
)
def test_a_kill_between_any_two_steps_leaves_as_many_sound_ones_as_there_were(run, small, torn, links):
    """The state after a kill is also where the next save starts, so states of repeated kills are covered as well."""
    if torn:
        damage(run / f'{torn}.pth')
    number, latest, least = 0, read_newest_sound(run)[0]['epoch'], 1 if torn else 2

    def save():
        save_rotating(run / 'latest.pth', **small, epoch=latest + 1)

    while killed_at(number, save, links=links):
        found = epochs(run)
        assert sum(epoch >= 0 for epoch in found.values()) >= least
        assert read_newest_sound(run)[0]['epoch'] in (latest, latest + 1)
        latest = read_newest_sound(run)[0]['epoch']
        number += 1
    assert number >= (2 if torn == 'latest' else 4)  # write, rename; with a sound latest.pth also its link and rename
    assert epochs(run) == {'latest': latest + 1, 'previous': latest}
    remove_stale_partials(run)
    assert sorted(os.listdir(run)) == ['latest.pth', 'previous.pth']


# ---------------------------------------------------------------------------------------------------------------------
# safetensors
# ---------------------------------------------------------------------------------------------------------------------


def test_safetensors_hold_the_same_network(trained, saved, standin, tmp_path):
    pytest.importorskip('safetensors')
    model, cfg = trained
    path = tmp_path / 'a.safetensors'
    save_checkpoint(path, model=model, cfg=cfg, hand_model=standin.identity, progress={'epoch': 7, 'best': 1.5})
    loaded, its_cfg, more = load_model(path)
    assert flatten(its_cfg) == flatten(cfg) and more['progress'] == {'epoch': 7, 'best': 1.5}
    assert all(torch.equal(value, loaded.state_dict()[key]) for key, value in model.state_dict().items())
    assert read_checkpoint(path)['config'] == read_checkpoint(saved)['config']
    with pytest.raises(UserError, match=r'b.safetensors: a safetensors file cannot hold optimizer'):
        write_checkpoint(tmp_path / 'b.safetensors', read_checkpoint(saved) | {'optimizer': {0: torch.zeros(2)}})


def test_foreign_safetensors_are_refused(tmp_path, saved):
    safetensors = pytest.importorskip('safetensors.torch')
    path = tmp_path / 'odd.safetensors'
    tensors = {'a': torch.zeros(2)}
    for metadata in (None, {'format': 'pt'}, {'format': FORMAT}, {'format': FORMAT, 'config': '['}):
        safetensors.save_file(tensors, path, metadata)
        with pytest.raises(UserError, match=r'odd\.safetensors') as refused:
            load_model(path)
        assert '\n' not in str(refused.value)
