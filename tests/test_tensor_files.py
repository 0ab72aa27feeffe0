"""Files of tensors: what is written comes back, and what is damaged or hostile is refused in one sentence."""

import errno
import io
import os
import pickle
import random
import tracemalloc
import zipfile

import pytest
import torch

from utils.errors import UserError
from utils.tensor_files import check_archive, read_tensors, write_tensors

CONTENT = {'weights': {'a': torch.arange(300.0).view(20, 15), 'b': torch.tensor(7)}, 'epoch': 3, 'name': 'ä'}


@pytest.fixture
def path(tmp_path):
    return tmp_path / 'odd.pth'


@pytest.fixture(scope='module')
def sealed(tmp_path_factory) -> bytes:
    path = tmp_path_factory.mktemp('sealed') / 'a.pth'
    write_tensors(path, CONTENT)
    return path.read_bytes()


@pytest.fixture(scope='module')
def unsealed() -> bytes:
    """As earlier versions wrote it."""
    file = io.BytesIO()
    torch.save(CONTENT, file)
    return file.getvalue()


def assert_content(content):
    assert content.keys() == CONTENT.keys() and content['epoch'] == 3 and content['name'] == 'ä'
    for key, value in CONTENT['weights'].items():
        assert torch.equal(content['weights'][key], value)


def assert_refused(path, match=None):
    with pytest.raises(UserError, match=match) as refused:
        read_tensors(path)
    assert path.name in str(refused.value) and '\n' not in str(refused.value)


def test_a_sealed_file_is_read_here_and_by_plain_pytorch(path, sealed, unsealed):
    path.write_bytes(sealed)
    assert_content(read_tensors(path))
    assert_content(torch.load(path, weights_only=True))
    assert_content(torch.load(path, weights_only=True, mmap=True))
    assert zipfile.ZipFile(path).testzip() is None
    assert len(sealed) == len(unsealed) + 71


def test_a_file_without_a_seal_is_still_read(path, unsealed):
    path.write_bytes(unsealed)
    check_archive(path)
    assert_content(read_tensors(path))


@pytest.mark.parametrize('form', ['sealed', 'unsealed'])
def test_every_truncation_is_refused(form, path, request):
    whole = request.getfixturevalue(form)
    ends = {len(whole) * part // 20 for part in range(20)} | set(range(len(whole) - 200, len(whole)))
    for end in sorted(ends):
        path.write_bytes(whole[:end])
        assert_refused(path)
        with pytest.raises(UserError, match='odd.pth is truncated or damaged'):
            check_archive(path)


def test_every_flipped_bit_is_detected(path, sealed):
    places = random.Random(0).sample(range(8 * len(sealed)), 1000)
    places += range(8 * (len(sealed) - 100), 8 * len(sealed), 3)  # the end and the seal itself
    path.write_bytes(sealed)
    with open(path, 'r+b', buffering=0) as file:
        for place in places:
            os.pwrite(file.fileno(), bytes([sealed[place // 8] ^ 1 << place % 8]), place // 8)
            assert_refused(path)
            os.pwrite(file.fileno(), sealed[place // 8 : place // 8 + 1], place // 8)
    assert_content(read_tensors(path))


def test_a_file_that_goes_on_after_its_end_is_refused(path, sealed, unsealed):
    for whole in (sealed, unsealed):
        path.write_bytes(whole + b'\0')
        assert_refused(path)
        path.write_bytes(b'\0' + whole)
        assert_refused(path)


def test_the_format_before_pytorch_1_6_is_named(path):
    torch.save(CONTENT, path, _use_new_zipfile_serialization=False)
    assert_refused(path, 'format of PyTorch before 1.6')


def test_a_file_that_may_not_be_read_is_not_called_damaged(path, sealed, monkeypatch):
    path.write_bytes(sealed)
    monkeypatch.setattr(torch, 'load', raising(OSError(errno.EIO, 'Input/output error')))
    assert_refused(path, r'odd.pth cannot be read: Input/output error\.')
    for error in (MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")):
        monkeypatch.setattr(torch, 'load', raising(error))
        with pytest.raises(type(error)):
            read_tensors(path)


def raising(error):
    def load(*_, **__):
        raise error

    return load


# ---------------------------------------------------------------------------------------------------------------------
# Hostile files
# ---------------------------------------------------------------------------------------------------------------------


class Foreign:
    def __reduce__(self):
        return os.mkdir, ('must_not_be_made',)


def changed(archive: bytes, change, *, compression=zipfile.ZIP_STORED, rename=lambda name: name) -> bytes:
    """The archive with ``change`` applied to the pickle in it."""
    out, source = io.BytesIO(), zipfile.ZipFile(io.BytesIO(archive))
    with zipfile.ZipFile(out, 'w', compression) as target:
        for entry in source.infolist():
            content = source.read(entry)
            target.writestr(rename(entry.filename), change(content) if entry.filename.endswith('.pkl') else content)
    return out.getvalue()


TERA = b'\x8a\x06' + (10**12).to_bytes(6, 'little')  # LONG1
SHAPE, STRIDE, ELEMENTS = b'K\x14K\x0f\x86', b'K\x0fK\x01\x86', b'M,\x01t'


def replaced(*pairs):
    def change(content: bytes) -> bytes:
        for old, new in pairs:
            assert old in content
            content = content.replace(old, new, 1)
        return content

    return change


PICKLES = {
    'giant shape': replaced((SHAPE, TERA + b'K\x0f\x86')),
    'one element repeated by its stride': replaced((SHAPE, TERA + b'K\x01\x86'), (STRIDE, b'K\x00K\x00\x86')),
    'giant storage': replaced((ELEMENTS, TERA + b't')),
    'giant storage and shape': replaced((ELEMENTS, TERA + b't'), (SHAPE, TERA + b'K\x01\x86')),
    'negative shape': replaced((SHAPE, b'J\xff\xff\xff\xffK\x0f\x86')),
    'bytearray': lambda _: b'\x80\x02cbuiltins\nbytearray\n' + TERA + b'\x85R.',
    'small bytearray': lambda _: b'\x80\x02cbuiltins\nbytearray\nJ\x00\x00\x00\x10\x85R.',
    'code': lambda _: pickle.dumps(Foreign(), protocol=2),
    'code under the names of protocol 4': lambda _: pickle.dumps(Foreign(), protocol=4),
    'another function of torch': lambda _: b'\x80\x02ctorch\nzeros\n' + TERA + b'\x85R.',
    'sparse tensor': lambda _: b'\x80\x02ctorch._utils\n_rebuild_sparse_tensor\n)R.',
    'many marks': lambda _: b'\x80\x02' + b'(' * 5_000 + b'.',
    'unknown memo': lambda _: b'\x80\x02h\x05.',
    'empty': lambda _: b'',
    'no end': lambda _: b'\x80\x02K\x01',
    'unknown opcode': lambda _: b'\x80\x02\xff.',
}


@pytest.mark.parametrize('pickled', PICKLES)
def test_hostile_pickles_are_refused_before_memory_is_allocated(pickled, path, unsealed, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path.write_bytes(changed(unsealed, PICKLES[pickled]))
    tracemalloc.start()
    assert_refused(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 50e6 and os.listdir(tmp_path) == ['odd.pth']


def same(content):
    return content


def test_hostile_archives_are_refused(path, unsealed):
    path.write_bytes(changed(unsealed, same))
    assert_content(read_tensors(path))  # so what follows is refused for its change

    path.write_bytes(changed(unsealed, same, compression=zipfile.ZIP_DEFLATED))
    assert_refused(path, 'is compressed')
    for prefix in ('../', '../../tmp/', '/tmp/', 'archive/../../'):
        path.write_bytes(changed(unsealed, same, rename=lambda name, prefix=prefix: prefix + name))
        assert_refused(path, 'the name of a file elsewhere')
    path.write_bytes(changed(unsealed, same, rename=lambda name: name.replace('version', 'DATA.PKL')))
    assert_refused(path)


@pytest.mark.parametrize('size', [1 << 31, 1 << 40, (1 << 63) - 1])
def test_an_archive_that_announces_more_than_it_holds_is_refused(path, unsealed, size):
    out, source = io.BytesIO(), zipfile.ZipFile(io.BytesIO(unsealed))
    with zipfile.ZipFile(out, 'w') as target:
        for entry in source.infolist():
            target.writestr(entry.filename, source.read(entry))
        for entry in target.infolist():
            if entry.filename.endswith('data/0'):
                entry.file_size = entry.compress_size = size
    path.write_bytes(out.getvalue())
    assert_refused(path, 'announces')


def test_two_entries_that_pytorch_cannot_tell_apart_are_refused(path, unsealed):
    out, source = io.BytesIO(), zipfile.ZipFile(io.BytesIO(unsealed))
    with zipfile.ZipFile(out, 'w') as target:
        for entry in source.infolist():
            target.writestr(entry.filename, source.read(entry))
        target.writestr('archive/DATA.pkl', b'\x80\x02K\x01.')
    path.write_bytes(out.getvalue())
    assert_refused(path, 'two of its entries')


def test_deeply_nested_and_endless_containers_are_read(path, unsealed):
    path.write_bytes(changed(unsealed, lambda _: b'\x80\x02' + b']' * 5_000 + b'a' * 4_999 + b'.'))
    read_tensors(path)
    path.write_bytes(changed(unsealed, lambda _: b'\x80\x02]q\x00h\x00a.'))  # a list that contains itself
    content = read_tensors(path)
    assert content[0] is content
