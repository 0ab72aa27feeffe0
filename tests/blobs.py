"""In place of a network: finds the bright pixels of a crop, so that tests know where the "hands" are."""

import numpy as np
import torch

from inference.reconstruct import Crop, Reconstruction
from utils.geometry import CROP_SIZE, to_uv

SHRUNK = 0.4  # share of a crop without bright pixels that the hands are predicted in, as trained networks do


class BlobReconstructor:
    """``from_crops`` of a Reconstructor; the vertices of both hands are the corners of the bright pixels' box."""

    def __init__(self) -> None:
        self.crops = 0

    def from_crops(self, crops: list[Crop]) -> Reconstruction:
        self.crops += len(crops)
        corners = torch.stack([self.corners(crop.image) for crop in crops])  # (N, 2, 2)
        count = len(crops)
        relative = torch.cat([to_uv(corners), torch.zeros(count, 2, 1)], -1)[:, None].expand(count, 2, 2, 3)
        camera = torch.tensor([1.0, 0.0, 0.0]).expand(count, 2, 3)
        zeros = torch.zeros
        return Reconstruction(
            vertices=relative,
            joints=zeros(count, 2, 21, 3),
            roots=zeros(count, 2, 3),
            joints_px=zeros(count, 2, 21, 2),
            root_rotation=torch.eye(3).expand(count, 2, 3, 3),
            pose=zeros(count, 2, 45),
            shape=zeros(count, 2, 10),
            camera=camera,
            offset=zeros(count, 3),
            intrinsics=torch.from_numpy(np.stack([crop.intrinsics for crop in crops])).float(),
            to_crop=torch.from_numpy(np.stack([crop.matrix for crop in crops])).float(),
            residual_px=zeros(count),
            size_in_crop=torch.full((count,), 0.8),
            present=torch.ones(count, 2, dtype=torch.bool),
        )

    @staticmethod
    def corners(image: np.ndarray) -> torch.Tensor:
        rows, columns = np.nonzero(image[..., 0] > 128)
        if not len(rows):
            half = SHRUNK * CROP_SIZE / 2
            return torch.tensor([[CROP_SIZE / 2 - half] * 2, [CROP_SIZE / 2 + half] * 2])
        return torch.tensor([[columns.min(), rows.min()], [columns.max() + 1.0, rows.max() + 1.0]]).float()


def blob(box: tuple[int, int, int, int] | None, *, background: int = 40, size: tuple[int, int] = (240, 320)):
    """An image with one bright rectangle (x, y, width, height)."""
    image = np.full((*size, 3), background, np.uint8)
    if box is not None:
        left, top, width, height = box
        image[max(top, 0) : max(top + height, 0), max(left, 0) : max(left + width, 0)] = 255
    return image
