"""Image preprocessing: stored crops or augmented images -> the normalised RGB input of the network."""

import torch
from torch import Tensor, nn

from utils.geometry import CROP_SIZE, warp

IMAGENET_MEAN = (0.485, 0.456, 0.406)  # RGB, for values in [0, 1]
IMAGENET_STD = (0.229, 0.224, 0.225)


class Preprocessing(nn.Module):
    """Resize crops to the network's input size and normalise them with ImageNet's mean and standard deviation.

    The buffers are non-persistent: checkpoints do not contain them. ``image_size`` is the side of the input in pixels.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, image_size: int = CROP_SIZE):
        super().__init__()
        self.image_size = image_size
        self.register_buffer('mean', torch.tensor(IMAGENET_MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer('std', torch.tensor(IMAGENET_STD).view(3, 1, 1), persistent=False)

    def forward(self, crops: Tensor) -> Tensor:
        """Stored crops (B, 256, 256, 3) uint8 BGR, on any device -> (B, 3, s, s) network input."""
        image = crops.to(self.mean.device).permute(0, 3, 1, 2).float()
        if self.image_size != CROP_SIZE:
            identity = torch.eye(3, device=image.device).expand(len(image), 3, 3)
            image = warp(image, identity, size=self.image_size)
        return self.normalise(image)

    def normalise(self, image: Tensor) -> Tensor:
        """(B, 3, s, s) BGR in [0, 255] -> RGB, (value / 255 - mean) / std."""
        return torch.addcmul(-self.mean / self.std, image.flip(1), 1 / (255 * self.std))
