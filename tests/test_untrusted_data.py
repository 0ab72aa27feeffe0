"""Data sets from elsewhere: names and links that lead out of the tree, pipes, sizes that no file has."""

import io
import json
import os
import shutil
import zipfile
import zlib

import numpy as np
import pytest
from raw_tree import make_raw_tree, write_kind
from test_preparation import prepare

from dataset import open_split
from dataset.packed import LABELS, SAMPLES, record_type, unpack_bits
from dataset.prepare import pack
from dataset.prepare.raw import RawSplit
from utils.arrays import load_npz
from utils.errors import UserError


@pytest.fixture
def raw(tmp_path):
    return tmp_path / 'raw', make_raw_tree(tmp_path / 'raw', steps=2)


@pytest.mark.parametrize(
    'name', ['../val/x.jpg', 'Capture0/../../../x.jpg', '/etc/passwd', '..', '', '/', 'a/..', 'x\0.jpg', 'a//../x.jpg']
)
def test_file_names_that_leave_the_images_are_refused(raw, tmp_path, capsys, name):
    root, content = raw
    content['data']['images'][1]['file_name'] = name
    write_kind(root, 'data', content)
    assert prepare(root, tmp_path / 'out') == 2
    error = capsys.readouterr().err
    assert 'data.json: image number 1 has the file name' in error and 'get it again' in error
    assert 'Traceback' not in error and not (tmp_path / 'out' / 'train').exists()


@pytest.mark.parametrize('name', ['Capture0/a..b/..c/image.jpg', './Capture0/x.jpg', 'a b/ü:%\\.jpg'])
def test_other_odd_file_names_are_names(raw, name):
    root, content = raw
    content['data']['images'][1]['file_name'] = name
    write_kind(root, 'data', content)
    split = RawSplit(root, 'train')
    path = split.image_path(split.frames[1])
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b'')
    assert split.missing_images(split.frames) == []


def test_links_out_of_the_data_set_are_refused_and_links_within_are_not(raw, tmp_path):
    root, _ = raw
    split = RawSplit(root, 'train')
    image = split.image_path(split.frames[0])
    outside = image.rename(tmp_path / 'private.jpg')
    image.symlink_to(outside)
    with pytest.raises(UserError, match=r'image100\.jpg links to .*private\.jpg, outside of .*raw\. Copy the files'):
        split.missing_images(split.frames)
    image.unlink()
    outside.rename(root / 'within.jpg')
    image.symlink_to(root / 'within.jpg')
    assert split.missing_images(split.frames) == []
    folder = image.parent.rename(tmp_path / 'camera')
    image.parent.symlink_to(folder)
    with pytest.raises(UserError, match=r'cam400262 links to .*camera, outside of'):
        split.missing_images(split.frames)


def test_the_images_as_a_whole_may_be_a_link_to_another_disk(raw, tmp_path):
    root, _ = raw
    (root / 'images' / 'train').rename(tmp_path / 'disk')
    (root / 'images' / 'train').symlink_to(tmp_path / 'disk')
    split = RawSplit(root, 'train')
    assert split.missing_images(split.frames) == []


def test_pipes_and_devices_are_no_images(raw, tmp_path, tiny_prepared):
    root, _ = raw
    split = RawSplit(root, 'train')
    pipe = split.image_path(split.frames[0])
    pipe.unlink()
    os.mkfifo(pipe)
    assert split.missing_images(split.frames) == split.frames[:1]
    shutil.copytree(tiny_prepared / 'val', tmp_path / 'data' / 'val')
    (tmp_path / 'data/val/img/1.jpg').unlink()
    os.mkfifo(tmp_path / 'data/val/img/1.jpg')
    with pytest.raises(UserError, match='img has gaps: 1 of its files are missing, the first is number 1'):
        open_split(tmp_path / 'data', 'val')


def test_a_file_with_a_giant_number_takes_no_memory(tmp_path, tiny_prepared):
    shutil.copytree(tiny_prepared / 'val', tmp_path / 'val')
    (tmp_path / 'val' / 'img' / f'{10**15}.jpg').write_bytes(b'')
    with pytest.raises(UserError, match='has gaps: 999999999999997 of its files are missing'):
        open_split(tmp_path, 'val')


@pytest.fixture
def packed(tiny_prepared, tmp_path):
    arguments = ['--data_path', str(tiny_prepared), '--save_path', str(tmp_path), '--splits', 'val', '--workers', '1']
    assert pack.main(arguments) == 0
    return tmp_path / 'val'


def change_manifest(folder, change) -> None:
    content = json.loads((folder / 'manifest.json').read_text())
    change(content)
    (folder / 'manifest.json').write_text(json.dumps(content))


def change_record(folder, index: int, **fields: int) -> None:
    content = (folder / LABELS).read_bytes()
    header = len(content) - 3 * record_type().itemsize
    records = np.frombuffer(content[header:], record_type()).copy()
    for name, value in fields.items():
        records[name][index] = value
    (folder / LABELS).write_bytes(content[:header] + records.tobytes())


def announce(folder, shape: tuple[int, ...], kind: str | None = None) -> None:
    """Rewrite the header of labels.npy, without changing its length."""
    content, header = (folder / LABELS).read_bytes(), io.BytesIO()
    description = {'descr': kind or np.lib.format.dtype_to_descr(record_type()), 'fortran_order': False, 'shape': shape}
    np.lib.format.write_array_header_1_0(header, description)
    size = len(content) - 3 * record_type().itemsize
    text = header.getvalue()
    if len(text) < size:  # padded with spaces before its newline
        text = text[:8] + (size - 10).to_bytes(2, 'little') + text[10:-1] + b' ' * (size - len(text)) + b'\n'
    (folder / LABELS).write_bytes(text + content[size:])


@pytest.mark.parametrize(
    'spoil',
    [
        lambda f: change_record(f, 1, begin=2**63),
        lambda f: change_record(f, 1, img_bytes=2**32 - 1),
        lambda f: change_record(f, 1, entries_bytes=0),
        lambda f: change_record(f, 1, entries_bytes=2**31),
        lambda f: announce(f, (10**15,)),
        lambda f: announce(f, (3,), '|O'),
        lambda f: change_manifest(f, lambda m: m.update(samples=10**15)),
        lambda f: change_manifest(f, lambda m: m.update(samples=-1)),
        lambda f: change_manifest(f, lambda m: m.update(samples='3')),
        lambda f: change_manifest(f, lambda m: m['files'][SAMPLES].update(bytes='many')),
        lambda f: change_manifest(f, lambda m: m['files'][SAMPLES].update(bytes=0)),
        lambda f: change_manifest(f, lambda m: m.update(files=[])),
    ],
)
def test_announced_sizes_of_a_packed_set_are_compared_with_its_files(packed, spoil):
    spoil(packed)
    with pytest.raises(UserError) as error:
        split = open_split(packed.parent, 'val')
        _ = [(split[index], split.entries(index)) for index in range(3)]
    assert str(packed) in str(error.value) and '\n' not in str(error.value)


def test_a_manifest_does_not_lead_the_verification_to_other_files(packed, tmp_path, capsys):
    change_manifest(packed, lambda m: m['files'].update({'/etc/hostname': {'bytes': 1, 'sha256': 'x'}}))
    assert pack.main(['--verify', str(packed.parent)]) == 0
    assert 'hostname' not in capsys.readouterr().err


def test_verification_refuses_a_set_that_is_still_being_packed(packed, capsys):
    packed.rename(packed.with_name('val.partial'))
    assert pack.main(['--verify', str(packed.parent)]) == 2
    assert 'val is only partly packed' in capsys.readouterr().err


def test_a_mask_that_expands_to_gigabytes_is_damaged(monkeypatch):
    bomb = zlib.compress(bytes(50_000_000), 9)
    assert len(bomb) < 60_000
    with pytest.raises(ValueError, match='not the bits of one mask'):
        unpack_bits(bomb)


def npz(path, **members: bytes) -> None:
    with zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(f'{name}.npy', content)


def npy(shape, kind: str, content: bytes) -> bytes:
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {'descr': kind, 'fortran_order': False, 'shape': shape})
    return header.getvalue() + content


def test_archives_are_sized_before_they_are_read(tmp_path):
    path = tmp_path / 'x.npz'
    np.savez_compressed(path, a=np.arange(6).reshape(2, 3), b=np.array('word'), c=np.zeros((0, 4)))
    arrays = load_npz(path, most_bytes=10_000)
    assert set(arrays) == {'a', 'b', 'c'} and arrays['a'].tolist() == [[0, 1, 2], [3, 4, 5]] and arrays['b'] == 'word'
    with pytest.raises(ValueError, match='exceed 100 bytes'):
        load_npz(path, most_bytes=100)
    for member in (
        npy((10**15,), '<f8', bytes(80)),
        npy((-10,), '<f8', bytes(80)),
        npy((10,), '|O', bytes(80)),
        npy((10,), '<f8', bytes(88)),
        npy((10,), '<f8', b''),
        b'no array',
        b'',
    ):
        npz(path, x=member)
        with pytest.raises(ValueError):
            load_npz(path, most_bytes=10_000)
