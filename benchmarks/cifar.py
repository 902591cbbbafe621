"""CIFAR-10 recompressed as JPEG, and the ResNet-56 that was trained on it, from the folder that `--data` names.

cifar10_jpeg.npz holds {train,test}_jpeg (the bytes of all files, joined), _offsets (n+1) and _labels;
resnet56_cifar10_jpeg.safetensors the weights, which reach 89.42 % on the 10,000 test images.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

FILES = ("cifar10_jpeg.npz", "resnet56_cifar10_jpeg.safetensors")
SIDE, CLASSES = 32, 10
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, which the network was trained with


def pictures(folder: Path, split: str, rows: Sequence[int]) -> tuple[Tensor, Tensor]:
    """The images `rows` of the split "train" or "test", (N, 3, 32, 32) uint8, and their labels, (N,) int64."""
    with np.load(folder / FILES[0]) as raw:
        data, offsets, labels = (raw[f"{split}_{part}"] for part in ("jpeg", "offsets", "labels"))
    decoded = np.empty((len(rows), SIDE, SIDE, 3), dtype=np.uint8)
    for place, row in enumerate(rows):
        with Image.open(io.BytesIO(data[offsets[row] : offsets[row + 1]].tobytes())) as image:
            decoded[place] = np.asarray(image.convert("RGB"))
    return torch.from_numpy(decoded).permute(0, 3, 1, 2).contiguous(), torch.from_numpy(labels[list(rows)]).long()


def normalised(images: Tensor) -> Tensor:
    """(N, 3, 32, 32) uint8 to what the network reads, float32."""
    mean, deviation = (torch.tensor(x, device=images.device).view(3, 1, 1) for x in (MEAN, DEVIATION))
    return (images.float() / 255 - mean) / deviation


@torch.no_grad()
def predictions(model: nn.Module, images: Tensor, batch_size: int = 32) -> Tensor:
    """The class that the model gives every image, (N,) int64. images: uint8."""
    model.eval()
    return torch.cat([model(normalised(part)).argmax(dim=1) for part in images.split(batch_size)])


@dataclass(frozen=True)
class Augmented:
    """A re-iterable over (inputs, labels): a new order, crops out of a border of four pixels, and flips every pass.

    images: (N, 3, 32, 32) uint8. labels: (N,) int64.
    """

    images: Tensor
    labels: Tensor
    batch_size: int
    generator: torch.Generator
    border: int = 4

    def __len__(self) -> int:
        return math.ceil(len(self.images) / self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for rows in torch.randperm(len(self.images), generator=self.generator).split(self.batch_size):
            yield self._moved(F.pad(normalised(self.images[rows]), (self.border,) * 4)), self.labels[rows]

    def _moved(self, padded: Tensor) -> Tensor:
        n, along = len(padded), torch.arange(SIDE)
        down, right = torch.randint(2 * self.border + 1, (2, n, 1), generator=self.generator)
        flip = torch.rand(n, 1, generator=self.generator) < 0.5
        across = torch.where(flip, along.flip(0), along) + right
        item, channel = torch.arange(n).view(n, 1, 1, 1), torch.arange(3).view(1, 3, 1, 1)
        return padded[item, channel, (along + down).view(n, 1, SIDE, 1), across.view(n, 1, 1, SIDE)]


class Block(nn.Module):
    """Two convolutions and a shortcut without weights (option A): every second pixel, new channels are zero."""

    def __init__(self, width_in: int, width: int) -> None:
        super().__init__()
        self.stride = 1 if width_in == width else 2
        self.conv1 = nn.Conv2d(width_in, width, 3, self.stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.border = width // 4

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.stride > 1:
            x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.border, self.border))
        return F.relu(y + x)  # in this order: Torch-Pruning 1.6.1 fails on x + y, where x is padded with zeros


class ResNet(nn.Module):
    """The classic CIFAR ResNet of depth 6·blocks + 2 (He et al., CVPR 2016)."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1, self.layer2, self.layer3 = (
            nn.Sequential(Block(first, width), *(Block(width, width) for _ in range(blocks - 1)))
            for first, width in ((16, 16), (16, 32), (32, 64))
        )
        self.linear = nn.Linear(64, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(x.mean(dim=(2, 3)))


def resnet56() -> ResNet:
    return ResNet(9)


def trained(folder: Path) -> ResNet:
    """ResNet-56 with the weights of the folder, in evaluation mode."""
    model = resnet56()
    missing, unexpected = model.load_state_dict(load_file(folder / FILES[1]), strict=False)
    missing = [name for name in missing if not name.endswith("num_batches_tracked")]  # counters, which nothing reads
    if missing or unexpected:
        raise RuntimeError(f"{FILES[1]} does not fit: {missing} are missing, {unexpected} have no place.")
    return model.eval()
