"""Four real InterHand2.6M frames, two of them interacting, where available: fit, prepare, train, evaluate."""

import json
import os
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest

import train
from apps import eval_interhand
from dataset import interhand
from dataset.prepare import fit_mano
from dataset.prepared import InterHandDataset
from utils.hand import MASK_THRESHOLD

SAMPLE = Path(os.environ.get('DIR_INTERHAND_SAMPLE', Path(__file__).resolve().parents[2] / 'shared/interhand_sample'))
pytestmark = pytest.mark.skipif(not SAMPLE.is_dir(), reason=f'no real frames at {SAMPLE} (DIR_INTERHAND_SAMPLE)')
STANDIN = ['MANO.SOURCE', 'standin']
REPEATS = 20


@pytest.fixture(scope='module')
def prepared(tmp_path_factory) -> Path:
    """The two interacting frames as a prepared data set; the training split repeats them to fill an epoch."""
    root = tmp_path_factory.mktemp('real')
    shutil.copytree(SAMPLE, root / 'raw')
    assert fit_mano.main(['--data_path', str(root / 'raw'), *STANDIN]) == 0
    assert (
        interhand.main(
            ['--data_path', str(root / 'raw'), '--save_path', str(root / 'data'), '--workers', '1', *STANDIN]
        )
        == 0
    )
    data = root / 'data'
    shutil.copytree(data / 'test', data / 'val')
    for kind in ('img', 'mask', 'dense', 'anno'):
        (data / 'train' / kind).mkdir(parents=True)
        for source in (data / 'test' / kind).iterdir():
            for copy in range(REPEATS):
                number = int(source.stem) + 2 * copy
                shutil.copy(source, data / 'train' / kind / f'{number}{source.suffix}')
    return data


def test_both_interacting_frames_are_kept(prepared):
    record = json.loads((prepared / 'test' / 'preparation.json').read_text())
    assert record['frames'] == 4 and record['kept'] == 2
    assert record['skipped'] == {'hands not interacting': 2}


def test_mask_lies_on_skin(prepared):
    """Skin is redder than this studio: nearly all of the mask is skin, and away from it only the forearms are."""
    for index in range(2):
        image = cv2.imread(str(prepared / 'test' / 'img' / f'{index}.jpg')).astype(np.float32)
        mask = cv2.imread(str(prepared / 'test' / 'mask' / f'{index}.jpg')).max(-1) > 50
        skin = image[..., 2] - image[..., 0] > 15
        away = ~cv2.dilate(mask.astype(np.uint8), np.ones((9, 9))).astype(bool)
        assert 0.1 < mask.mean() < 0.5
        assert skin[mask].mean() > 0.95
        assert skin[away].mean() < 0.4


def test_all_four_frames_are_kept_with_single_hands(prepared, tmp_path):
    arguments = ['--data_path', str(prepared.parent / 'raw'), '--save_path', str(tmp_path), '--workers', '1']
    assert interhand.main([*arguments, '--hands', 'all', *STANDIN]) == 0
    record = json.loads((tmp_path / 'test' / 'preparation.json').read_text())
    assert record['kept'] == 4 and not record['skipped']
    assert record['kept_by_hand_type'] == {'interacting': 2, 'left': 1, 'right': 1, 'none': 0}
    dataset = InterHandDataset(tmp_path, 'test')
    for index in range(4):
        image, mask = dataset.image('img', index), dataset.mask(index) > MASK_THRESHOLD
        present, hand = dataset[index].present.tolist(), mask.any(-1)
        assert present == mask.any((0, 1)).tolist()
        if not all(present):  # from cameras without colour: the hands are brighter than what is behind them
            assert image[hand].mean() > 1.3 * image[~hand].mean()


def test_a_short_training_overfits_them(prepared, tmp_path):
    still = [
        word
        for name in ('ROTATION', 'SCALE', 'SHIFT', 'FLIP', 'BLUR', 'GAIN', 'BRIGHTNESS', 'NOISE')
        for word in (f'AUGMENT.{name}', '0')
    ]
    small = [
        'MODEL.IMAGE_SIZE',
        '64',
        'MODEL.MAP_CHANNELS',
        '32',
        'MODEL.TOKEN_CHANNELS',
        '32',
        'MODEL.JOINT_FEATURES',
        '16',
        'MODEL.ATTENTION_CHANNELS',
        '32',
        'TRAIN.BATCH_SIZE',
        '4',
        'TRAIN.WORKERS',
        '0',
        'TRAIN.PICTURES',
        '0',
        'DEVICE',
        'cpu',
    ]
    schedule = ['TRAIN.EPOCHS', '5', 'TRAIN.LR', '1e-3', 'TRAIN.WARMUP_STEPS', '5', 'TRAIN.VALIDATE_EVERY', '5']
    out = tmp_path / 'run'
    assert (
        train.main(
            [
                '--cfg',
                'configs/demo.yaml',
                'DATASET.PATH',
                str(prepared),
                'OUTPUT_DIR',
                str(out),
                *small,
                *schedule,
                *still,
            ]
        )
        == 0
    )
    assert (
        eval_interhand.main(
            [
                '--data_path',
                str(prepared),
                '--model',
                str(out / 'latest.pth'),
                '--out',
                str(out / 'eval'),
                'TRAIN.WORKERS',
                '0',
            ]
        )
        == 0
    )
    figures = json.loads((out / 'eval' / 'metrics.json').read_text())
    assert figures['frames'] == 2
    assert figures['joint_mm']['all'] < 25
