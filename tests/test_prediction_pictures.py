import cv2
import numpy as np
import pytest
import torch
from tiny import TINY, tiny_model

from dataset.batch import build_batch_maker
from dataset.loader import evaluation_split
from evaluation.pictures import (
    attention_sheet,
    bone_feature_sheet,
    draw_samples,
    draw_sheets,
    look,
    predicted_meshes,
    spread_over,
    stage_sheet,
    true_meshes,
)
from utils.config import load_config
from utils.drawing import CAPTION_HEIGHT, GAP, PANEL, heat_map

ROW = PANEL + 2 * CAPTION_HEIGHT


@pytest.fixture(scope='module')
def validation(tiny_prepared, standin):
    """Data set, samples, and what makes batches of them."""
    cfg = load_config(None, [*TINY, 'DATASET.PATH', str(tiny_prepared)])
    return evaluation_split(cfg, 'val'), [0, 2], build_batch_maker(cfg, standin)


@pytest.fixture(scope='module')
def model(standin):
    return tiny_model(standin)


@pytest.fixture(scope='module')
def seen(model, validation):
    return look(model, *validation)


def panel(sheet: np.ndarray, row: int, column: int) -> np.ndarray:
    top, left = row * ROW + 2 * CAPTION_HEIGHT, column * (PANEL + GAP)
    return sheet[top : top + PANEL, left : left + PANEL]


def columns(sheet: np.ndarray) -> int:
    return (sheet.shape[1] + GAP) // (PANEL + GAP)


@pytest.mark.parametrize(
    'changes, expected',
    [
        ({'STAGES': 1}, {'validation': 7, 'stages': 4, 'attention': 3, 'bone_features': 2, 'segmentation': 3}),
        ({'PROJECTION': 'none', 'DENSE_HEADS': 'false'}, {'validation': 7, 'stages': 5, 'attention': 3}),
        ({'STAGES': 0}, {'validation': 7, 'stages': 3, 'attention': 3, 'segmentation': 3}),
    ],
    ids=['one stage', 'no projection, no dense heads', 'no stages'],
)
def test_sheets_of_what_a_model_has(validation, standin, changes, expected):
    sheets = draw_sheets(tiny_model(standin, **changes), *validation)
    assert {name: columns(sheet) for name, sheet in sheets.items()} == expected
    assert all(sheet.dtype == np.uint8 and len(sheet) == 2 * ROW for sheet in sheets.values())


def test_draw_samples_writes_the_validation_sheet_and_leaves_everything_else_alone(model, validation, tmp_path):
    model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    draw_samples(model, *validation, path=tmp_path / 'sheet.png')
    assert all(module.training for module in model.modules())
    assert [name for name, value in model.state_dict().items() if not torch.equal(value, before[name])] == []
    assert torch.equal(torch.get_rng_state(), state) and (np.random.get_state()[1] == numpy_state).all()
    assert (cv2.imread(str(tmp_path / 'sheet.png')) == draw_sheets(model, *validation)['validation']).all()


def test_heat_maps_stand_beside_their_sample(seen):
    attention, drawn = attention_sheet(seen), bone_feature_sheet(seen)
    for row, crop in enumerate(seen.crops):
        for column in range(2):
            assert (panel(attention, row, 1 + column) == heat_map(crop, seen.maps.attention[row, column])).all()
            assert (panel(drawn, row, 1 + column) == heat_map(crop, seen.maps.bone_features[column][row])).all()
    assert (panel(attention, 0, 1) != panel(attention, 0, 2)).any()


def test_stages_are_put_at_the_true_roots_and_stand_in_order(seen):
    true = seen.batch.target.vertices - seen.batch.target.joints[:, :, seen.root_joint, None]
    perfect = seen.output.stages[1]._replace(vertices=true)
    seen = seen._replace(output=seen.output._replace(stages=[seen.output.stages[0], perfect, seen.output.stages[2]]))
    meshes, truth = [predicted_meshes(seen, stage) for stage in range(3)], true_meshes(seen)
    sheet = stage_sheet(seen, meshes, truth)
    for row in range(2):
        shown = [panel(sheet, row, column) for column in range(5)]
        differ = [np.abs(picture.astype(int) - truth[row]).mean() > 0.2 for picture in shown]
        assert differ == [True, True, False, True, False]  # input, stage 0, the perfect one, stage 2, truth
        # Small as it is, the network's picture shows the same as the file's.
        small, crop = (
            cv2.resize(picture, (32, 32), interpolation=cv2.INTER_AREA).astype(int)
            for picture in (shown[0], seen.crops[row])
        )
        assert np.abs(small - crop).mean() < 5


def test_samples_are_spread_over_the_split():
    assert spread_over(100, 4) == [0, 25, 50, 75] and spread_over(3, 8) == [0, 1, 2]
