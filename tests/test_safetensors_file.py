import os
import random
import struct

import pytest
import torch

from utils.errors import UserError
from utils.safetensors_file import read_safetensors, write_safetensors

pytest.importorskip('safetensors')

TENSORS = {
    'weight': torch.randn(6, 5, generator=torch.Generator().manual_seed(0)),
    'transposed': torch.arange(12.0).view(3, 4).T,
    'half': torch.tensor([1.5, float('nan'), -0.0]).half(),
    'bfloat16': torch.tensor([1.5, float('inf')]).bfloat16(),
    'count': torch.tensor(7),
    'flags': torch.tensor([True, False]),
    'none': torch.empty(0, 3),
}
TENSORS['shared'] = TENSORS['weight'][:2]
METADATA = {'format': 'test', 'config': '{"a": "ä"}'}


@pytest.fixture
def path(tmp_path):
    return tmp_path / 'odd.safetensors'


@pytest.fixture
def whole(path) -> bytes:
    write_safetensors(path, TENSORS, METADATA)
    return path.read_bytes()


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def assert_refused(path, match=None):
    with pytest.raises(UserError, match=match) as refused:
        read_safetensors(path)
    assert path.name in str(refused.value) and '\n' not in str(refused.value)


def test_everything_comes_back_to_the_bit(path, whole):
    tensors, metadata = read_safetensors(path)
    assert metadata == METADATA and tensors.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert tensors[name].dtype == tensor.dtype and tensors[name].shape == tensor.shape
        assert bits(tensors[name]) == bits(tensor)


def test_what_was_read_does_not_change_with_the_file(path, whole):
    tensors, _ = read_safetensors(path)
    with open(path, 'r+b') as file:
        file.write(b'\0' * len(whole))
    assert bits(tensors['weight']) == bits(TENSORS['weight'])


def test_every_truncation_is_refused(path, whole):
    for end in [len(whole) * part // 20 for part in range(20)] + [len(whole) - 1]:
        path.write_bytes(whole[:end])
        assert_refused(path)
    path.write_bytes(whole + b'\0')
    assert_refused(path)


def test_a_flipped_bit_is_detected_or_without_effect(path, whole):
    silent = 0
    with open(path, 'r+b', buffering=0) as file:
        for place in random.Random(0).sample(range(8 * len(whole)), 1000):
            os.pwrite(file.fileno(), bytes([whole[place // 8] ^ 1 << place % 8]), place // 8)
            try:
                tensors, metadata = read_safetensors(path)
            except UserError as error:
                assert 'odd.safetensors' in str(error) and '\n' not in str(error)
            else:
                silent += 1  # e.g. in the checksum's own name, which leaves an entry more
                assert METADATA.items() <= metadata.items() and tensors.keys() == TENSORS.keys()
                assert all(bits(tensors[name]) == bits(tensor) for name, tensor in TENSORS.items())
            os.pwrite(file.fileno(), whole[place // 8 : place // 8 + 1], place // 8)
    assert silent < 20


def test_a_wrong_length_of_the_header_is_refused(path, whole):
    for length in (0, 1, len(whole), 1 << 31, 1 << 40, (1 << 64) - 1):
        path.write_bytes(struct.pack('<Q', length) + whole[8:])
        assert_refused(path)


@pytest.mark.parametrize(
    'header',
    [
        b'{"a": {"dtype": "F32", "shape": [1000000000000], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [4294967296, 4294967296], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4000000000000]}}',
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}}',
        b'{"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "code", "shape": [1], "data_offsets": [0, 4]}}',
        b'[' * 10_000,
        b'[]',
        b'\xff\xfe',
    ],
)
def test_hostile_headers_are_refused(path, header):
    path.write_bytes(struct.pack('<Q', len(header)) + header + b'\0' * 4)
    assert_refused(path)


def test_a_missing_file_is_named(path):
    assert_refused(path, 'does not exist')
