"""Networks of the sizes that people deploy, with random weights: for benchmarks of time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from resnet50_cost import ResNet50, noise


class Inverted(nn.Module):
    """1×1 to more channels, 3×3 of each channel alone, 1×1 to fewer, and a shortcut where the shapes allow it."""

    def __init__(self, width_in: int, width: int, stride: int, ratio: int) -> None:
        super().__init__()
        inner = ratio * width_in
        layers: list[nn.Module] = []
        if ratio > 1:
            layers += [nn.Conv2d(width_in, inner, 1, bias=False), nn.BatchNorm2d(inner), nn.ReLU6()]
        layers += [nn.Conv2d(inner, inner, 3, stride, 1, groups=inner, bias=False), nn.BatchNorm2d(inner), nn.ReLU6()]
        layers += [nn.Conv2d(inner, width, 1, bias=False), nn.BatchNorm2d(width)]
        self.body, self.shortcut = nn.Sequential(*layers), stride == 1 and width_in == width

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x) if self.shortcut else self.body(x)


class MobileNetV2(nn.Module):
    """Sandler et al., CVPR 2018, table 2."""

    def __init__(self, classes: int = 1000) -> None:
        super().__init__()
        stages = (
            (1, 16, 1, 1),
            (6, 24, 2, 2),
            (6, 32, 3, 2),
            (6, 64, 4, 2),
            (6, 96, 3, 1),
            (6, 160, 3, 2),
            (6, 320, 1, 1),
        )
        layers: list[nn.Module] = [nn.Conv2d(3, 32, 3, 2, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU6()]
        width = 32
        for ratio, wide, blocks, stride in stages:
            for block in range(blocks):
                layers.append(Inverted(width, wide, stride if block == 0 else 1, ratio))
                width = wide
        layers += [nn.Conv2d(width, 1280, 1, bias=False), nn.BatchNorm2d(1280), nn.ReLU6()]
        self.features, self.head = nn.Sequential(*layers), nn.Linear(1280, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x).mean(dim=(2, 3)))


class ViTBlock(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.qkv, self.out = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.norm2, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        q, k, v = self.qkv(self.norm1(x)).reshape(b, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, t, -1))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class ViT(nn.Module):
    """Touvron et al., ICML 2021: DeiT-Ti by default, with the mean over the tokens in place of a class token."""

    def __init__(self, size: int = 224, patch: int = 16, width: int = 192, depth: int = 12, heads: int = 3) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, patch, patch)
        self.place = nn.Parameter(0.02 * torch.randn(1, (size // patch) ** 2, width))
        self.blocks = nn.Sequential(*(ViTBlock(width, heads) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 1000)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2) + self.place
        return self.head(self.norm(self.blocks(x)).mean(dim=1))


def mlp(*sizes: int) -> nn.Module:
    layers = [layer for a, b in pairwise(sizes) for layer in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


@dataclass(frozen=True)
class Case:
    """build: the network. inputs: (n, generator) -> that many inputs. queries: how many of them a pruner gets."""

    build: Callable[[], nn.Module]
    inputs: Callable[[int, torch.Generator], Tensor]
    queries: int = 32

    def trained(self) -> nn.Module:
        """Random weights, with unequal channels as after training. Batch norms have their statistics on the inputs."""
        model, generator = self.build().train(), torch.Generator().manual_seed(0)
        for module in model.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu", generator=generator)
            elif isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.weight, 0.2, 1.2, generator=generator)
                nn.init.normal_(module.bias, 0.0, 0.2, generator=generator)
                module.momentum = 1.0
        with torch.no_grad():
            model(self.inputs(32, generator))
        return model.eval()


def cases(quick: bool) -> dict[str, Case]:
    """By name. quick: one small network."""

    def vectors(size: int) -> Callable[[int, torch.Generator], Tensor]:
        return lambda n, generator: torch.randn(n, size, generator=generator)

    def images(n: int, generator: torch.Generator) -> Tensor:
        return noise(n, 224, generator)

    if quick:
        return {"mlp 256-1024-1024-10": Case(lambda: mlp(256, 1024, 1024, 10), vectors(256), 512)}
    return {
        "mlp 1024-4096-4096-1000": Case(lambda: mlp(1024, 4096, 4096, 1000), vectors(1024), 512),
        "mobilenet_v2": Case(MobileNetV2, images),
        "vit tiny": Case(ViT, images),
        "resnet50": Case(ResNet50, images),
    }
