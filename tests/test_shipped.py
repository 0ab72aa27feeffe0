"""The network that is shipped with the code: its file, and how other programs get it."""

import numpy as np
import torch

from inference import load_reconstructor
from models.checkpoint import SHIPPED, read_checkpoint
from utils.safetensors_file import read_safetensors

SIZE_MB = 15


def test_the_file_is_small_half_precision_and_holds_no_path_of_a_machine():
    assert SHIPPED.stat().st_size <= SIZE_MB * 1e6
    tensors, metadata = read_safetensors(SHIPPED)
    halves = sum(tensor.numel() for tensor in tensors.values() if tensor.dtype == torch.half)
    assert halves > 0.999 * sum(tensor.numel() for tensor in tensors.values())
    text = ' '.join(metadata.values())
    assert not [folder for folder in ('/root', '/home', '/tmp', '/w/') if folder in text]


def test_it_holds_no_array_of_a_hand_model():
    content = read_checkpoint(SHIPPED)
    assert content['hand_model'].startswith('standin')
    assert [key for key, value in content['model'].items() if {778, 1538} & set(value.shape)] == []


def test_it_is_what_a_reconstructor_loads_by_default_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    hands = load_reconstructor(device='cpu')([np.full((200, 300, 3), 127, np.uint8)])
    assert hands.vertices.shape == (1, 2, 778, 3) and hands.vertices.isfinite().all()
