"""Pictures -> hands before the image's camera, with true parameters in the network's place and with networks."""

import json

import cv2
import numpy as np
import pytest
import torch
from raw_tree import annotation_file, make_raw_tree
from tiny import tiny_config, tiny_model

from dataset import interhand
from dataset.batch import build_batch_maker
from dataset.prepared import InterHandDataset
from dataset.targets import camera_hands, classify_mask
from inference.files import draw_overlay, reduced
from inference.reconstruct import Reconstructor, assumed_intrinsics, cut_crop, load_reconstructor
from manopth import TwoHandLayer
from models.checkpoint import save_checkpoint
from models.hand_head import HandHead
from models.placement import nearest_camera
from models.predictions import CAMERA, NUM_PARAMETERS, POSE, ROOT_ROTATION, SHAPE, DIROutput
from models.preprocessing import Preprocessing
from utils.errors import UserError
from utils.geometry import CROP_SIZE, project, to_uv
from utils.hand import HAND_SCALE, NUM_FACES
from utils.rasterizer import rasterize


@pytest.fixture(scope='module')
def reconstruct(standin):
    return Reconstructor(tiny_model(standin).eval())


@pytest.fixture(scope='module')
def prepared(tmp_path_factory):
    """(raw, prepared): six frames of the data set's own layout, and what the preparation makes of them."""
    raw, folder = tmp_path_factory.mktemp('raw'), tmp_path_factory.mktemp('prepared')
    make_raw_tree(raw, steps=3)
    assert (
        interhand.main(
            ['--data_path', str(raw), '--save_path', str(folder), '--workers', '1', 'MANO.SOURCE', 'standin']
        )
        == 0
    )
    return raw, InterHandDataset(folder, 'train')


class TrueNetwork(torch.nn.Module):
    """Says of the pictures of a data set, in their order, what is true of them in the words of a network."""

    def __init__(self, dataset, standin):
        super().__init__()
        self.head, self.preprocess = HandHead(TwoHandLayer(standin), root_joint=0), Preprocessing()
        samples = dataset.__getitems__(list(range(len(dataset))))
        self.hands = camera_hands(self.head.hand_layer, samples)
        joints = self.hands.joints
        self.parameters_ = torch.zeros(len(dataset), 2, NUM_PARAMETERS)
        rotation = samples.camera_rotation[:, None] @ samples.root
        self.parameters_[..., ROOT_ROTATION] = rotation[..., :2].transpose(-1, -2).flatten(2)
        self.parameters_[..., POSE], self.parameters_[..., SHAPE] = samples.pose, samples.shape
        uv = to_uv(project(joints, samples.intrinsics[:, None]))
        self.parameters_[..., CAMERA] = nearest_camera(joints - joints[:, :, :1], uv)
        self.offset = (joints[:, 1, 0] - joints[:, 0, 0]) / HAND_SCALE

    def forward(self, image):
        return DIROutput([self.head(self.parameters_, self.offset)], segmentation=None, dense=None)


def raw_cameras(raw, dataset):
    """(image, intrinsics) of each sample as downloaded."""
    data = json.loads(annotation_file(raw, 'data').read_text())['images']
    cameras = json.loads(annotation_file(raw, 'camera').read_text())['0']
    for image in data:
        (fx, fy), (cx, cy) = cameras['focal'][image['camera']], cameras['princpt'][image['camera']]
        yield (
            cv2.imread(str(raw / 'images/train' / image['file_name'])),
            np.array([[fx, 0, cx], [0, fy, cy], [0, 0, 1.0]]),
        )


def test_with_true_parameters_the_overlay_covers_the_datas_mask(standin, reconstruct, prepared, monkeypatch):
    raw, dataset = prepared
    truth = TrueNetwork(dataset, standin)
    monkeypatch.setattr(reconstruct, 'network', truth)
    pictures, intrinsics = zip(*raw_cameras(raw, dataset))
    boxes = []
    for vertices, matrix in zip(truth.hands.vertices, intrinsics):
        pixels = project(vertices.double(), torch.from_numpy(matrix)).flatten(0, 1)
        boxes.append((*pixels.amin(0).tolist(), *(pixels.amax(0) - pixels.amin(0)).tolist()))
    hands = reconstruct(pictures, boxes, intrinsics=intrinsics)

    assert (hands.vertices - truth.hands.vertices).norm(dim=-1).max() < 1e-5  # m
    stored = torch.from_numpy(np.stack([dataset.mask(i) for i in range(len(dataset))]))
    masks = classify_mask(stored.permute(0, 3, 1, 2))
    in_crop = (hands.to_crop @ hands.intrinsics).float()
    face = rasterize(
        hands.vertices.flatten(1, 2), torch.from_numpy(standin.mesh_faces), in_crop, (CROP_SIZE, CROP_SIZE)
    ).face
    drawn = torch.where(face < 0, 0, 1 + (face >= NUM_FACES).long())
    for label in (1, 2):
        both, either = ((drawn == label) & (masks == label)).sum(), ((drawn == label) | (masks == label)).sum()
        assert both / either >= 0.97

    for number, image in enumerate(pictures):  # and the overlay itself, on the whole image
        covered = draw_overlay(reduced(np.zeros_like(image)), hands.one(number), standin).any(-1)
        mask = (masks[number].numpy() > 0).astype(np.uint8) * 255
        back = np.linalg.inv(hands.to_crop[number].double().numpy())
        # The renderer samples at pixels' centres + 1/2, in the crop as in the image.
        half = np.array([[1, 0, 0.5], [0, 1, 0.5], [0, 0, 1]])
        whole = (
            cv2.warpAffine(mask, (np.linalg.inv(half) @ back @ half)[:2], image.shape[1::-1], flags=cv2.INTER_AREA)
            > 127
        )
        assert (covered & whole).sum() / (covered | whole).sum() >= 0.97


def test_a_prepared_crop_gives_what_the_evaluation_sees(standin, reconstruct, prepared):
    _, dataset = prepared
    model = tiny_model(standin).eval()
    samples = dataset.__getitems__([0, 1])
    with torch.no_grad():
        batch = build_batch_maker(tiny_config(), standin)(samples)
        expected = model(model.preprocess.normalise(batch.image)).stages[-1]
    hands = reconstruct(list(samples.image.numpy()), intrinsics=list(samples.intrinsics.numpy()))
    assert torch.equal(hands.to_crop, torch.eye(3).expand(2, 3, 3))
    relative = hands.vertices - hands.roots[:, :, None]
    assert (relative - expected.vertices).abs().max() < 1e-5  # m: folded batch norms round otherwise
    assert (hands.offset - HAND_SCALE * expected.offset).abs().max() < 1e-5
    assert (hands.joints_px - (expected.joints_uv + 1) * 128).abs().max() < 0.01


def test_every_field_is_one_row_a_picture_and_consistent(reconstruct):
    images = [np.full((90, 160, 3), 60, np.uint8), np.full((300, 200, 3), 60, np.uint8)] * 9  # more than a batch
    boxes = [(40, 20, 60, 50), None] * 9
    hands = reconstruct(images, boxes)
    assert {len(values) for values in hands if values is not None} == {18}
    numbers = [values for name, values in hands._asdict().items() if name != 'present' and values is not None]
    assert all(values.dtype == torch.float32 and values.isfinite().all() for values in numbers) and hands.present.all()
    assert torch.allclose(hands.roots[:, 1] - hands.roots[:, 0], hands.offset, atol=1e-5)
    assert torch.allclose(hands.joints[:, :, 0], hands.roots, atol=1e-5)
    assert torch.equal(hands.intrinsics[1], torch.from_numpy(assumed_intrinsics(200, 300)).float())
    assert torch.allclose(torch.linalg.det(hands.root_rotation), torch.ones(18, 2), atol=1e-4)


def test_a_picture_moved_with_its_box_gives_the_same_hands_moved(reconstruct):
    image = cv2.GaussianBlur(np.random.default_rng(0).integers(0, 255, (256, 256, 3), np.uint8), (0, 0), 5)
    larger = np.zeros((400, 500, 3), np.uint8)
    larger[100:356, 200:456] = image
    box = (25.6, 25.6, 204.8, 204.8)
    one = reconstruct([image], [box], intrinsics=assumed_intrinsics(256, 256))
    moved = reconstruct([larger], [(225.6, 125.6, 204.8, 204.8)])
    assert (moved.joints_px - one.joints_px - torch.tensor([200.0, 100.0])).abs().max() < 0.1


# Crops


@pytest.mark.parametrize('dtype', [np.uint8, np.int16, np.float32])
def test_a_box_may_be_an_array_of_any_numbers(dtype):
    image = np.zeros((256, 256, 3), np.uint8)
    expected = cut_crop(image, (156, 0, 100, 100)).matrix
    assert np.array_equal(cut_crop(image, np.array([156, 0, 100, 100], dtype)).matrix, expected)


def test_a_crop_shows_its_box_in_the_middle_and_black_outside():
    image = np.full((100, 200, 3), 200, np.uint8)
    crop = cut_crop(image, (150, 20, 100, 60))  # a quarter of it hangs over the right edge
    corners = crop.matrix @ np.array([[150, 20, 1], [250, 80, 1]]).T
    assert pytest.approx(np.array([[25.6, 66.56], [230.4, 189.44]]), abs=0.01) == corners[:2].T
    edge = (crop.matrix @ [200, 50, 1])[0]
    assert (crop.image[128, : int(edge) - 3] == 200).all() and not crop.image[128, int(edge) + 3 :].any()


@pytest.mark.parametrize('side', [400, 3000])
def test_a_dot_lands_where_the_matrix_says_however_large_the_picture(side):
    image = np.zeros((side, side + 77, 3), np.uint8)
    x, y = 0.61 * side, 0.37 * side
    cv2.circle(image, (round(x), round(y)), side // 60, (255, 255, 255), cv2.FILLED)
    crop = cut_crop(image, (0.2 * side, 0.1 * side, 0.6 * side, 0.7 * side))
    weight = crop.image[..., 0].astype(float)
    where = (crop.matrix @ [round(x), round(y), 1])[:2]
    grid = np.mgrid[:256, :256]
    centre = np.array([(weight * grid[1]).sum(), (weight * grid[0]).sum()]) / weight.sum()
    assert centre == pytest.approx(where, abs=0.1)


def test_shrinking_averages_pixels():
    stripes = np.zeros((2560, 2560, 3), np.uint8)
    stripes[:, ::2] = 200
    crop = cut_crop(stripes)
    assert np.abs(crop.image[5:-5, 5:-5].astype(int) - 100).max() <= 8  # without averaging it would be 100


@pytest.mark.parametrize(
    'image, box, words',
    [
        (np.zeros((1, 1, 3), np.uint8), None, '1 x 1 pixels'),
        (np.zeros((50, 60), np.uint8), None, 'uint8 (50, 60)'),
        (np.zeros((50, 60, 3), np.float32), None, 'float32'),
        ('image.jpg', None, 'str'),
        (np.zeros((50, 60, 3), np.uint8), (70, 0, 20, 20), 'outside of the image, which is 60 x 50'),
        (np.zeros((50, 60, 3), np.uint8), (-30, 0, 20, 20), 'outside'),
        (np.zeros((50, 60, 3), np.uint8), (0, 0, 20, -5), '20 x -5'),
        (np.zeros((50, 60, 3), np.uint8), (0, 0, 20), 'four numbers'),
        (np.zeros((50, 60, 3), np.uint8), (0, 0, float('nan'), 20), 'four numbers'),
        (np.zeros((50, 60, 3), np.uint8), 'here', 'four numbers'),
    ],
)
def test_what_cannot_be_used_is_one_sentence(image, box, words):
    with pytest.raises(UserError, match='(?s)^[^\n]*$') as caught:
        cut_crop(image, box)
    assert words in str(caught.value)


def test_each_image_needs_one_box(reconstruct):
    image = np.zeros((50, 60, 3), np.uint8)
    for arguments in (([image], [None, None]), ([image, image], None, [np.eye(3)])):
        with pytest.raises(UserError, match='each image needs one'):
            reconstruct(*arguments[:2], intrinsics=arguments[2] if len(arguments) > 2 else None)
    with pytest.raises(UserError, match='no images'):
        reconstruct([])


def test_a_diverged_network_is_one_sentence(standin):
    model = tiny_model(standin).eval()
    model.stages[-1].parameters_head.bias.data[0] = torch.nan
    with pytest.raises(UserError, match='NaN or infinity'):
        Reconstructor(model)([np.zeros((64, 64, 3), np.uint8)])


def test_a_checkpoint_becomes_a_reconstructor(standin, tmp_path):

    save_checkpoint(tmp_path / 'best.pth', model=tiny_model(standin), cfg=tiny_config(), hand_model=standin.identity)
    reconstruct = load_reconstructor(tmp_path, device='cpu')
    assert reconstruct.network.preprocess.image_size == 64 and reconstruct.device.type == 'cpu'
    assert reconstruct([np.zeros((64, 64, 3), np.uint8)]).vertices.shape == (1, 2, 778, 3)
    with pytest.raises(UserError, match='does not exist'):
        load_reconstructor(tmp_path / 'other.pth')
