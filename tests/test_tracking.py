"""Second looks, and boxes that follow the hands through a video."""

import numpy as np
import pytest
import torch
from blobs import BlobReconstructor, blob
from tiny import tiny_model

from inference.reconstruct import Reconstructor, assumed_intrinsics, cut_crop
from inference.tracking import SceneCuts, Tracker, hands_box, look, look_again, overlap

INTRINSICS = assumed_intrinsics(320, 240)


def test_overlap_is_intersection_over_union():
    assert overlap((0, 0, 10, 10), (0, 0, 10, 10)) == 1
    assert overlap((0, 0, 10, 10), (5, 0, 10, 10)) == pytest.approx(1 / 3)
    assert overlap((0, 0, 10, 10), (20, 0, 10, 10)) == overlap((0, 0, 0, 0), (0, 0, 0, 0)) == 0


def test_the_box_of_the_hands_encloses_their_joints(standin):
    image = np.random.default_rng(0).integers(0, 255, (120, 160, 3), np.uint8)
    hands = Reconstructor(tiny_model(standin).eval())([image], [(30, 20, 80, 60)]).one(0)
    left, top, width, height = hands_box(hands)
    joints = hands.joints_px.flatten(0, 1)
    assert (joints >= torch.tensor([left, top]) - 2).all()
    assert (joints <= torch.tensor([left + width, top + height]) + 2).all()


def seen(image: np.ndarray, box):
    return look(BlobReconstructor(), [image], [cut_crop(image, box, INTRINSICS)], [box])


@pytest.mark.parametrize('box', [(110, 85, 90, 60), (95, 60, 110, 90), (80, 50, 160, 120), None])
def test_a_second_look_crops_around_the_predicted_hands(box):
    true = (120, 80, 80, 50)
    first = seen(blob(true), box)
    second = look_again(BlobReconstructor(), first)[0]
    assert second.box == hands_box(first[0].hands)
    assert overlap(hands_box(second.hands), true) > 0.93
    assert second.agreement > 0.9 and not np.array_equal(second.crop.image, first[0].crop.image)
    assert (second.crop.intrinsics == INTRINSICS).all()


def test_hands_that_leave_the_image_or_vanish_keep_the_first_look():
    outside = seen(blob((0, 0, 30, 30)), (-60, -60, 80, 80))  # in the crop's corner
    moved = outside[0].hands._replace(camera=outside[0].hands.camera + torch.tensor([0.0, -1.0, -1.0]))
    outside[0] = outside[0]._replace(hands=moved)
    tiny = seen(blob((100, 100, 6, 6)), (60, 60, 80, 80))
    reconstruct = BlobReconstructor()
    assert look_again(reconstruct, outside) == outside and look_again(reconstruct, tiny) == tiny
    assert reconstruct.crops == 0
    inside = seen(blob((100, 100, 60, 60)), (90, 90, 80, 80))
    both = look_again(reconstruct, [*tiny, *inside])
    assert both[0] is tiny[0] and both[1] is not inside[0] and reconstruct.crops == 1


class Starts:
    """Counts how often a tracker asks where to look."""

    def __init__(self, *boxes):
        self.boxes, self.calls = boxes, 0

    def __call__(self, image):
        self.calls += 1
        return self.boxes


def test_the_box_follows_the_hands():
    start = Starts((10, 80, 80, 60))
    tracker = Tracker(BlobReconstructor(), start)
    for step in range(0, 200, 8):
        sight = tracker(blob((10 + step, 80 + step // 8, 80, 60)), INTRINSICS)
        assert sight.look is not None and not sight.cut
        assert overlap(tracker.box, (10 + step, 80 + step // 8, 80, 60)) > 0.95
    assert start.calls == 1


def test_fast_hands_are_caught_by_another_look():
    reconstruct = BlobReconstructor()
    tracker = Tracker(reconstruct, Starts((10, 80, 80, 60)))
    for step in (0, 25, 50):
        sight = tracker(blob((10 + step, 80, 80, 60)), INTRINSICS)
        assert sight.look is not None and overlap(hands_box(sight.look.hands), (10 + step, 80, 80, 60)) > 0.75
    assert reconstruct.crops > 3 + 1


def test_hands_that_vanish_are_a_gap_and_are_found_again_elsewhere():
    start = Starts((10, 80, 80, 60), None)
    tracker = Tracker(BlobReconstructor(), start)
    places = [(10, 80, 80, 60)] * 3 + [None] * 4 + [(180, 60, 120, 100)] * 3
    sights = [tracker(blob(place), INTRINSICS) for place in places]
    assert [sight.look is None for sight in sights] == [place is None for place in places]
    assert overlap(tracker.box, places[-1]) > 0.95
    assert start.calls == 1 + 4 + 1


def test_hands_that_jump_are_not_those_of_the_frame_before():
    tracker = Tracker(BlobReconstructor(), Starts(None))
    sights = [tracker(blob((x, 80, 80, 60)), INTRINSICS) for x in (10, 12, 200, 202)]
    assert all(sight.look is not None for sight in sights)
    assert [sight.cut for sight in sights] == [False, False, True, False]


def test_hands_that_leave_the_image_are_lost():
    tracker = Tracker(BlobReconstructor(), Starts((10, 80, 80, 60)))
    found = [tracker(blob((10 - step, 80, 80, 60)), INTRINSICS).look is not None for step in range(0, 130, 5)]
    assert found[0] and not found[-1] and found == sorted(found, reverse=True)


def test_a_cut_does_not_drag_the_box_along():
    detected = [(10, 80, 80, 60), (200, 20, 90, 90)]
    calls = []

    def detect(image):
        calls.append(int(image[-1, -1, 0] > 50))
        return [detected[calls[-1]]]

    tracker = Tracker(BlobReconstructor(), detect)
    for _ in range(2):
        assert tracker(blob((10, 80, 80, 60)), INTRINSICS).look.box is not None
    both = blob((10, 80, 80, 60), background=90)
    both[20:110, 200:290] = 255
    both[80:140, 10:90] = 255  # the old box still shows something bright
    sight = tracker(both, INTRINSICS)
    assert sight.cut and calls == [0, 1] and overlap(tracker.box, detected[1]) > 0.9


def test_without_a_box_to_look_in_the_network_is_not_asked():
    reconstruct = BlobReconstructor()
    tracker = Tracker(reconstruct, lambda image: [])
    assert tracker(blob((10, 80, 80, 60)), INTRINSICS).look is None and reconstruct.crops == 0


def test_refining_looks_twice_at_every_frame():
    once, twice = BlobReconstructor(), BlobReconstructor()
    trackers = [Tracker(once, Starts((10, 80, 80, 60))), Tracker(twice, Starts((10, 80, 80, 60)), refine=True)]
    for tracker in trackers:
        for _ in range(4):
            tracker(blob((10, 80, 80, 60)), INTRINSICS)
    assert twice.crops - once.crops == 3


def test_motion_and_noise_are_no_cut_but_another_scene_is():
    random, is_cut = np.random.default_rng(0), SceneCuts()
    scene, other = (random.integers(0, 255, (12, 16, 3), np.uint8).repeat(20, 0).repeat(20, 1) for _ in range(2))
    frames = [np.roll(scene, 7 * step, 1) for step in range(5)]
    frames.append((frames[-1] + random.normal(0, 4, scene.shape)).clip(0, 255).astype(np.uint8))
    assert not any(is_cut(frame) for frame in frames)
    assert is_cut(other // 3) and not is_cut(other // 3)
