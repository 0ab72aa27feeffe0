import cv2
import numpy as np
import pytest
import torch

from manopth import TwoHandLayer
from models.hands import load_hands
from utils import drawing
from utils.errors import UserError
from utils.geometry import project

LEFT_BGR, RIGHT_BGR = (np.array(colour) for colour in drawing.HAND_COLOURS_BGR)
INTRINSICS = torch.tensor([[500.0, 0.0, 128.0], [0.0, 500.0, 128.0], [0.0, 0.0, 1.0]])


@pytest.fixture(scope='module')
def models():
    return load_hands('standin')


@pytest.fixture(scope='module')
def hands(models):
    """Vertices and joints of the mean pose, half a metre in front of the camera, the right hand 5 cm nearer."""
    flat = [torch.zeros(1, 2, size) for size in (3, 45, 10)]
    vertices, joints = TwoHandLayer(models)(*flat, root_joint=9)
    turn = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, 1.0], [0.0, -1.0, 0.0]])  # look at the back of the hands
    place = torch.tensor([[[0.0, 0.0, 0.55]], [[0.02, 0.0, 0.5]]])
    return vertices[0] @ turn.T + place, joints[0] @ turn.T + place


def row_inputs(models, hands, size=256):
    vertices, joints = hands
    pixels = project(joints, INTRINSICS) * size / 256
    labels = torch.zeros(32, 32, dtype=torch.long)
    labels[8:20, 4:16], labels[8:20, 16:28] = 1, 2
    image = np.full((size, size, 3), 90, np.uint8)
    intrinsics = torch.diag(torch.tensor([size / 256, size / 256, 1.0])) @ INTRINSICS
    meshes = drawing.mesh_overlay(image, vertices, intrinsics, models.mesh_faces, smooth_edges=1)
    return drawing.RowInputs(image, pixels, pixels, meshes, meshes, labels, labels)


def near(picture, colour, tolerance=12):
    return (np.abs(picture.astype(int) - colour) <= tolerance).all(-1)


def test_skeleton_marks_every_joint_in_the_colour_of_its_hand_on_a_copy():
    image = np.zeros((256, 256, 3), np.uint8)
    grid = torch.stack(torch.meshgrid(torch.arange(7), torch.arange(6), indexing='xy'), -1).reshape(2, 21, 2)
    pixels = 20.0 + 35.0 * grid
    picture = drawing.draw_skeletons(image, pixels)
    assert not image.any()
    for hand, colour in enumerate((LEFT_BGR, RIGHT_BGR)):
        for u, v in pixels[hand].int().tolist():
            assert near(picture[v, u], colour)


def test_bones_have_the_colour_of_their_finger():
    pixels = torch.full((2, 21, 2), torch.nan)
    pixels[1, 5], pixels[1, 6] = torch.tensor([30.0, 100.0]), torch.tensor([200.0, 100.0])
    picture = drawing.draw_skeletons(np.zeros((256, 256, 3), np.uint8), pixels)
    assert near(picture[100, 115], np.array(drawing.FINGER_COLOURS_BGR[1]))


def test_skeleton_skips_joints_that_cannot_be_drawn():
    image = np.full((64, 64, 3), 7, np.uint8)
    pixels = torch.full((2, 21, 2), torch.nan)
    pixels[0], pixels[1, 3] = 1e12, torch.inf
    assert (drawing.draw_skeletons(image, pixels) == image).all()


def test_nearer_mesh_hides_the_farther(models, hands):
    image = np.zeros((256, 256, 3), np.uint8)

    def is_orange(vertices):
        picture = drawing.mesh_overlay(image, vertices, INTRINSICS, models.mesh_faces, alpha=1.0).astype(int)
        return picture[..., 2] - picture[..., 0] > 20, picture[..., 0] - picture[..., 2] > 20

    vertices = hands[0].clone()
    right_in_front, left_behind = is_orange(vertices)
    vertices[:, :, 2] += torch.tensor([[-0.05], [0.05]])
    right_behind, left_in_front = is_orange(vertices)
    assert min(mask.sum() for mask in (right_in_front, left_behind, right_behind, left_in_front)) > 200
    swapped = right_in_front & left_in_front
    assert swapped.sum() > 500  # the overlap changes hands with the order
    assert left_in_front.sum() > left_behind.sum()


def test_mesh_overlay_draws_each_hand_in_its_colour_and_leaves_the_rest_unchanged(models):
    hands = TwoHandLayer(models)(torch.zeros(1, 2, 3), torch.zeros(1, 2, 45), torch.zeros(1, 2, 10), use_pca=False)
    vertices = hands.vertices[0] - hands.vertices[0].mean(1, keepdim=True)
    vertices = vertices + torch.tensor([[[-0.12, 0, 0.8]], [[0.12, 0, 0.8]]])
    camera = torch.tensor([[200.0, 0, 64], [0, 200.0, 48], [0, 0, 1]])
    grey = np.full((96, 128, 3), 100, np.uint8)
    picture = drawing.mesh_overlay(grey, vertices, camera, models.mesh_faces, alpha=1.0)
    assert picture.shape == grey.shape and picture.dtype == np.uint8 and (grey == 100).all()
    assert (picture[[0, -1]] == 100).all()
    drawn = (picture != 100).any(-1)
    for half, (blue, red) in ((slice(0, 64), (2, 0)), (slice(64, 128), (0, 2))):
        inside = picture[:, half][drawn[:, half]].astype(int)
        assert len(inside) > 200
        assert (inside[:, blue] <= inside[:, red]).mean() > 0.95  # left hand blue, right hand orange
    np.testing.assert_array_equal(drawing.mesh_overlay(grey, vertices, camera, models.mesh_faces, alpha=0.0), grey)


def test_mesh_overlay_accepts_arrays_and_tensors(models, hands):
    image = np.full((256, 256, 3), 50, np.uint8)
    a = drawing.mesh_overlay(image, hands[0], INTRINSICS, models.mesh_faces)
    b = drawing.mesh_overlay(image, hands[0].double().numpy(), INTRINSICS.numpy(), torch.from_numpy(models.mesh_faces))
    assert (a == b).all() and (a != image).any()


def test_segmentation_picture_has_one_colour_per_label():
    labels = np.array([[0, 1], [2, 1]])
    picture = drawing.segmentation_picture(torch.from_numpy(labels))
    assert (picture[labels == 1] == LEFT_BGR).all() and (picture[labels == 2] == RIGHT_BGR).all()
    assert (picture[labels == 0] == drawing.BACKGROUND_BGR).all()
    with pytest.raises(ValueError, match='Labels must be .* of 0, 1 and 2'):
        drawing.segmentation_picture(np.array([[255]]))


def test_heat_map_is_dark_at_the_minimum_and_bright_at_the_maximum():
    image = np.random.default_rng(0).integers(0, 256, (256, 256, 3), dtype=np.uint8)
    values = torch.tensor([[0.2, 0.3, 0.7], [0.21, 0.2, 0.25]])  # (down, right)
    before = image.copy()
    picture = drawing.heat_map(image, values)
    assert picture.shape == (256, 256, 3) and (image == before).all()
    # On any image: the darkest point of the maximum cell is brighter than the brightest of a minimum cell.
    light = picture.astype(int).sum(-1)
    greatest, least, other = light[:128, 171:], light[:128, :85], light[128:, 86:170]
    assert greatest.min() > least.max() and greatest.min() > other.max()
    assert drawing.range_text(values) == '0.2 to 0.7'


def test_heat_map_of_equal_values_is_dark():
    picture = drawing.heat_map(np.zeros((64, 64, 3), np.uint8), np.full((4, 4), 0.5, np.float32))
    assert picture.max() < 10


@pytest.mark.parametrize('size', [256, 128, 384])
def test_a_row_has_seven_panels_of_256_pixels_for_any_image_size(models, hands, size):
    row = drawing.prediction_row(row_inputs(models, hands, size))
    step = drawing.PANEL + drawing.GAP
    assert row.dtype == np.uint8
    assert row.shape == (drawing.PANEL + drawing.CAPTION_HEIGHT, 7 * step - drawing.GAP, 3)
    assert (row[drawing.CAPTION_HEIGHT :, : drawing.PANEL] == 90).all()  # the input, unchanged
    for number in range(7):
        caption = row[: drawing.CAPTION_HEIGHT, number * step : number * step + drawing.PANEL]
        assert (caption > 180).any()


def test_row_shows_prediction_and_truth_in_their_own_panels(models, hands):
    truth = row_inputs(models, hands)
    row = drawing.prediction_row(truth)
    step = drawing.PANEL + drawing.GAP
    empty = truth._replace(
        predicted_pixels=truth.true_pixels + 1000, predicted_meshes=truth.image, predicted_labels=torch.zeros(32, 32)
    )
    changed = (drawing.prediction_row(empty) != row).any((0, 2))
    changed_panels = {number for number in range(7) if changed[number * step : number * step + drawing.PANEL].any()}
    assert changed_panels == {1, 3, 5}


def test_sheet_stacks_rows_under_their_headers(models, hands):
    row = drawing.prediction_row(row_inputs(models, hands))
    sheet = drawing.picture_sheet([row, row // 2], ['first', 'a header too long for any sheet ' * 20])
    height = row.shape[0] + drawing.CAPTION_HEIGHT
    assert sheet.shape == (2 * height, row.shape[1], 3)
    assert (sheet[drawing.CAPTION_HEIGHT : height] == row).all() and (sheet[-len(row) :] == row // 2).all()
    for rows, headers in (([], []), ([row], ['a', 'b'])):
        with pytest.raises(ValueError, match='header'):
            drawing.picture_sheet(rows, headers)


def test_write_image_round_trip(tmp_path):
    image = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    path = tmp_path / 'new' / 'picture.png'
    drawing.write_image(path, image)
    drawing.write_image(path, image)
    assert (cv2.imread(str(path)) == image).all()
    assert [p.name for p in path.parent.iterdir()] == ['picture.png']
    with pytest.raises(UserError, match='xyz'):
        drawing.write_image(tmp_path / 'picture.xyz', image)
