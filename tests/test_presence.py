"""Hands that are absent, and joints that are hidden, in everything that the demo writes."""

import json

import numpy as np
import pytest
import torch
import trimesh
from blobs import BlobReconstructor, blob
from test_clip import clip, offline, states
from tiny import images, tiny_model

from inference.clip import FrameHands, smoothed_online
from inference.files import (
    JOINT_COLUMNS,
    VIEWS,
    as_numbers,
    draw_overlay,
    joint_row,
    present_faces,
    reduced,
    view,
    write_image_files,
)
from inference.job import frame_record
from inference.reconstruct import Reconstructor, assumed_intrinsics, cut_crop, placed_in_image, with_present
from inference.tracking import APPEARS, STAYS, Tracker, hands_box, look, look_again
from models.placement import place_hands
from models.predictions import DIROutput
from utils.geometry import to_uv
from utils.hand import LEFT, RIGHT, SIDES

IMAGE = np.random.default_rng(0).integers(0, 255, (120, 160, 3), np.uint8)


@pytest.fixture(scope='module')
def reconstruct(standin):
    return Reconstructor(tiny_model(standin, PRESENCE=True, CONFIDENCE=True).eval())


@pytest.fixture(scope='module')
def hands(reconstruct):
    """One reconstruction, 0.6 m away and with both hands present."""
    one = reconstruct([IMAGE]).one(0)
    place = torch.tensor([[-0.05, 0, 0.6], [0.05, 0, 0.6]])
    moved = {name: getattr(one, name) - one.roots[:, None] + place[:, None] for name in ('vertices', 'joints')}
    return one._replace(**moved, roots=place, present=torch.tensor([True, True]))


def only(hands, *sides):
    return hands._replace(present=torch.tensor([side in sides for side in (LEFT, RIGHT)]))


# From the network


def output_of(standin, logits) -> DIROutput:
    output = tiny_model(standin, CONFIDENCE=True).eval()(images(len(logits)))
    return output._replace(presence=torch.tensor(logits))


def test_presence_becomes_a_probability_and_a_decision(standin):
    crops = [cut_crop(IMAGE)] * 4
    hands = placed_in_image(output_of(standin, [[3.0, -2.0], [-1.0, 0.1], [5.0, 5.0], [-4.0, -3.0]]), crops)
    assert hands.present.tolist() == [[True, False], [False, True], [True, True], [False, False]]
    assert hands.presence[0, LEFT] == torch.tensor(3.0).sigmoid()
    assert hands.visible.shape == hands.deviation.shape == (4, 2, 21)
    without = placed_in_image(output_of(standin, [[0.0, 0.0]])._replace(presence=None, confidence=None), crops[:1])
    assert without.present.all() and without.presence is without.visible is without.deviation is None


def test_an_absent_hand_moves_neither_the_other_nor_its_box(standin):
    output = output_of(standin, [[5.0, -5.0]])
    crops = [cut_crop(IMAGE)]
    one = placed_in_image(output, crops).one(0)
    last = output.stages[-1]
    parameters = last.parameters.clone()
    parameters[:, RIGHT, 61:] = torch.tensor([3.0, 0.9, -0.9])
    other = last._replace(parameters=parameters, offset=last.offset + 3, joints_uv=last.joints_uv.clone())
    other.joints_uv[:, RIGHT] += 5
    changed = placed_in_image(output._replace(stages=[other]), crops).one(0)
    for name in ('vertices', 'joints', 'roots'):
        torch.testing.assert_close(getattr(one, name)[LEFT], getattr(changed, name)[LEFT])
    assert one.size_in_crop == changed.size_in_crop and one.residual_px == pytest.approx(float(changed.residual_px))
    assert hands_box(one) == pytest.approx(hands_box(changed))


def test_hands_that_come_to_be_present_are_placed_like_those_that_were(standin):
    crops = [cut_crop(IMAGE)]
    left, both = (placed_in_image(output_of(standin, [logits]), crops) for logits in ([5.0, -0.5], [5.0, 5.0]))
    assert (left.roots - both.roots).abs().max() > 0.01  # m
    for before, after in ((left, both), (both, left)):
        again = with_present(before, after.present)
        for name in ('vertices', 'joints', 'roots', 'present', 'residual_px', 'size_in_crop'):
            torch.testing.assert_close(getattr(again, name), getattr(after, name), rtol=1e-4, atol=1e-5)


def test_placing_all_hands_is_placing_without_saying_which():
    generator = torch.Generator().manual_seed(0)
    joints = 0.05 * torch.randn(3, 2, 21, 3, generator=generator)
    camera = torch.tensor([5.0, 0.1, -0.1]).expand(3, 2, 3)
    intrinsics = torch.tensor([[700.0, 0, 128], [0, 700, 128], [0, 0, 1]]).expand(3, 3, 3)
    offset = torch.tensor([[0.5, 0.1, 0.0]]).expand(3, 3)
    all_hands = place_hands(joints, camera, offset, intrinsics, counted=torch.ones(3, 2, dtype=torch.bool))
    for a, b in zip(all_hands, place_hands(joints, camera, offset, intrinsics), strict=True):
        assert torch.equal(a, b)


# Files


def test_an_absent_hand_is_null_empty_and_not_drawn(standin, tmp_path, hands):
    shown = reduced(IMAGE)
    both, right = hands._replace(visible=None), only(hands._replace(visible=None), RIGHT)
    assert len(present_faces(right, standin)) == len(present_faces(both, standin)) / 2
    drawn = draw_overlay(shown, right, standin)
    moved = right.vertices.clone()
    moved[LEFT] += 0.1
    assert np.array_equal(drawn, draw_overlay(shown, right._replace(vertices=moved), standin))
    assert not np.array_equal(drawn, draw_overlay(shown, both, standin))
    write_image_files(tmp_path, shown, cut_crop(IMAGE).image, right, standin)
    assert {path.name for path in tmp_path.iterdir()} == {
        'overlay.jpg', 'crop.jpg', 'side.jpg', 'above.jpg', 'right.obj', 'hands.glb', 'hands.json'
    }  # fmt: skip
    assert list(trimesh.load(tmp_path / 'hands.glb').geometry) == ['right']
    content = json.loads((tmp_path / 'hands.json').read_text())
    assert content['left'] is None and content['offset_m'] is None and content['format'] == 'dir-hands-2'
    assert set(content['presence']) == set(SIDES) and len(content['right']['joints_m']) == 21
    row = dict(zip(JOINT_COLUMNS, joint_row(right), strict=True))
    assert all((value == '') == name.startswith('left_') for name, value in row.items())


def test_an_image_without_hands_has_files_without_hands(standin, tmp_path, hands):
    none = only(hands)
    assert np.array_equal(draw_overlay(reduced(IMAGE), none, standin), IMAGE)
    assert len(np.unique(view(none.vertices, VIEWS['side'], present_faces(none, standin)))) == 1
    write_image_files(tmp_path, reduced(IMAGE), cut_crop(IMAGE).image, none, standin)
    assert not {'left.obj', 'right.obj', 'hands.glb'} & {path.name for path in tmp_path.iterdir()}
    content = json.loads((tmp_path / 'hands.json').read_text())
    assert content['left'] is content['right'] is None


def test_hidden_joints_are_hollow(standin, hands):
    shown = reduced(IMAGE)
    visible, hidden = (
        draw_overlay(shown, hands._replace(visible=torch.full((2, 21), value)), standin) for value in (0.9, 0.1)
    )
    plain = draw_overlay(shown, hands._replace(visible=None), standin)
    filled, hollow = ((each != plain).any(-1).sum() for each in (visible, hidden))
    assert filled > 0 and not np.array_equal(visible, hidden) and hollow > 0


def test_confidence_is_in_the_numbers_where_there_is_any(hands):
    numbers = as_numbers(hands)
    assert len(numbers['left']['visible']) == len(numbers['left']['deviation_m']) == 21
    filled = frame_record(FrameHands(IMAGE, 0.0, None, hands, filled=True), 0)
    assert filled['presence'] is filled['left']['visible'] is filled['left']['deviation_m'] is None
    without = as_numbers(hands._replace(presence=None, visible=None, deviation=None))
    assert 'presence' not in without and 'visible' not in without['left']


# Videos


class SomeHands(BlobReconstructor):
    """Both hands with a presence that is set from outside."""

    presence = torch.tensor([1.0, 1.0])

    def from_crops(self, crops):
        presence = self.presence.expand(len(crops), 2)
        return super().from_crops(crops)._replace(presence=presence, present=presence > 0.5)


def test_a_tracked_hand_comes_and_goes_only_beyond_doubt():
    reconstruct, frame, intrinsics = SomeHands(), blob((120, 80, 80, 50)), assumed_intrinsics(320, 240)
    tracker = Tracker(reconstruct, lambda image: [(120, 80, 80, 50)])
    course = [(0.9, 0.1), (0.9, 0.6), (0.9, APPEARS + 0.05), (0.9, 0.45), (0.9, STAYS - 0.05), (0.1, 0.2), (0.2, 0.9)]
    seen = []
    for presence in course:
        reconstruct.presence = torch.tensor(presence)
        found = tracker(frame, intrinsics).look
        seen.append(None if found is None else found.hands.present.tolist())
    alone, both = [True, False], [True, True]
    assert seen == [alone, alone, both, both, alone, None, [False, True]]


def test_a_tracked_hand_that_stays_is_placed_beside_the_other(standin):
    class Doubtful(SomeHands):
        def from_crops(self, crops):
            hands = placed_in_image(output_of(standin, [self.presence.logit().tolist()]), crops)
            return hands._replace(vertices=hands.roots[:, :, None] + super().from_crops(crops).vertices, camera=CAMERA)

    CAMERA = torch.tensor([1.0, 0.0, 0.0]).expand(1, 2, 3)
    reconstruct, box = Doubtful(), (120, 80, 80, 50)
    tracker, apart = Tracker(reconstruct, lambda image: [box]), []
    for presence in (0.9, 0.45):
        reconstruct.presence = torch.tensor([0.9, presence])
        hands = tracker(blob(box), assumed_intrinsics(320, 240)).look.hands
        assert hands.present.all()
        apart.append(hands.roots[RIGHT] - hands.roots[LEFT])
        torch.testing.assert_close(apart[-1], hands.offset)


@pytest.fixture(scope='module')
def several(reconstruct):
    random = np.random.default_rng(0)
    found = reconstruct([random.integers(0, 255, (48, 64, 3), np.uint8) for _ in range(8)])
    both = found._replace(present=torch.ones(8, 2, dtype=torch.bool))
    return [both.one(number) for number in range(8)]


def test_a_hand_that_is_not_there_does_not_blur_the_one_that_comes(reconstruct, several):
    frames = clip(several, 'xxxxxx')
    frames = [
        frame if number >= 3 else frame._replace(hands=only(frame.hands, RIGHT)) for number, frame in enumerate(frames)
    ]
    garbage = [
        frame
        if number >= 3
        else frame._replace(hands=frame.hands._replace(pose=frame.hands.pose * torch.tensor([[50.0], [1.0]])))
        for number, frame in enumerate(frames)
    ]
    for smoothed in (
        lambda clip: list(smoothed_online(clip, reconstruct)),
        lambda clip: offline(reconstruct, clip, smooth=True, fill=False),
    ):
        for a, b in zip(smoothed(frames), smoothed(garbage), strict=True):
            present = a.hands.present
            assert torch.equal(present, b.hands.present)
            assert torch.equal(a.hands.joints[present], b.hands.joints[present])
            assert a.hands.presence is not None and torch.equal(a.hands.visible, b.hands.visible)


def test_a_gap_is_not_filled_between_other_hands(reconstruct, several):
    frames = clip(several, 'xx..xx')
    assert states(offline(reconstruct, frames, smooth=False, fill=True)) == 'xxffxx'
    frames = [f._replace(hands=only(f.hands, LEFT)) if n > 3 and f.hands else f for n, f in enumerate(frames)]
    assert states(offline(reconstruct, frames, smooth=False, fill=True)) == 'xx..xx'


# Hands that are far apart


class Dots(BlobReconstructor):
    """Finds a left hand in blue and a right hand in red, each up to four crop pixels off: closer looks see better."""

    def from_crops(self, crops):
        self.crops += len(crops)
        one = BlobReconstructor().from_crops(crops)
        present, vertices = torch.zeros(len(crops), 2, dtype=torch.bool), torch.zeros(len(crops), 2, 2, 3)
        for number, crop in enumerate(crops):
            for hand, channel in ((LEFT, 0), (RIGHT, 2)):
                rows, columns = np.nonzero(crop.image[..., channel] > 128)
                if len(rows):
                    present[number, hand] = True
                    corners = [[columns.min(), rows.min()], [columns.max() + 1.0, rows.max() + 1.0]]
                    vertices[number, hand, :, :2] = to_uv(torch.tensor(corners) + 4)
        pixels = ((vertices[..., :2] + 1) * 128 - one.to_crop[:, None, None, :2, 2]) / one.to_crop[:, None, None, :1, 0]
        joints_px = pixels.mean(2, keepdim=True).expand(len(crops), 2, 21, 2)
        presence = present.float()
        return one._replace(vertices=vertices, present=present, presence=presence, joints_px=joints_px)


def two_dots(apart: int, size: int = 40) -> tuple[np.ndarray, torch.Tensor]:
    """Image, and the middles (2, 2) of its hands in pixels."""
    image = np.full((240, 640, 3), 40, np.uint8)
    image[100 : 100 + size, 60 : 60 + size, 0] = 255
    image[100 : 100 + size, 60 + apart : 60 + apart + size, 2] = 255
    middle = 60 + size / 2
    return image, torch.tensor([[middle, 100 + size / 2], [middle + apart, 100 + size / 2]])


@pytest.mark.parametrize('apart, looks', [(300, 2), (60, 1)])
def test_hands_that_are_far_apart_get_a_crop_each(apart, looks):
    image, middles = two_dots(apart)
    reconstruct, intrinsics = Dots(), assumed_intrinsics(640, 240)
    box = (50, 60, apart + 60, 120)
    first = seen_by(reconstruct, image, box, intrinsics)
    second = look_again(reconstruct, [first])[0]
    assert reconstruct.crops == 1 + looks
    errors = [(each.hands.joints_px[:, 0] - middles).norm(dim=-1).max() for each in (first, second)]
    assert errors[1] < (0.4 if looks == 2 else 1.0) * errors[0]
    if looks == 2:  # both are in the frame of the first look
        assert torch.equal(second.hands.to_crop, first.hands.to_crop)
        left, top, width, height = hands_box(second.hands)
        assert (left, left + width) == pytest.approx((60, 60 + apart + 40), abs=5)
        assert (top, top + height) == pytest.approx((100, 140), abs=5)
        assert second.hands.presence.tolist() == [1.0, 1.0]


def test_hands_share_a_crop_where_nothing_tells_which_hand_a_crop_shows():
    class Unsure(Dots):
        def from_crops(self, crops):
            return super().from_crops(crops)._replace(presence=None)

    image, _ = two_dots(300)
    reconstruct = Unsure()
    first = seen_by(reconstruct, image, (50, 60, 360, 120), assumed_intrinsics(640, 240))
    look_again(reconstruct, [first])
    assert reconstruct.crops == 2


def seen_by(reconstruct, image, box, intrinsics):
    return look(reconstruct, [image], [cut_crop(image, box, intrinsics)], [box])[0]
