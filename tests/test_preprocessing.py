import pytest
import torch

from models.preprocessing import Preprocessing


@pytest.fixture(scope='module')
def crops():
    return torch.randint(0, 256, (2, 256, 256, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_crops_are_normalised_with_imagenets_statistics_in_rgb(crops):
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    rgb = crops.flip(-1).permute(0, 3, 1, 2) / 255
    torch.testing.assert_close(Preprocessing()(crops), (rgb - mean) / std)


def test_normalise_maps_the_first_channel_of_the_file_to_the_last_of_the_network():
    image = torch.zeros(1, 3, 4, 4)
    image[:, 0] = 60
    assert Preprocessing().normalise(image)[0, 2, 0, 0].item() == pytest.approx((60 / 255 - 0.406) / 0.225)


def test_smaller_networks_get_averaged_pixels(crops):
    preprocess = Preprocessing(image_size=128)
    means = torch.nn.functional.avg_pool2d(crops.permute(0, 3, 1, 2).float(), 2)
    torch.testing.assert_close(preprocess(crops), preprocess.normalise(means), atol=1e-4, rtol=0)


def test_checkpoints_contain_nothing_of_it():
    assert not Preprocessing().state_dict()
