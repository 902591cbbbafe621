"""VGG-16 with batch norm on CIFAR-10. It is trained first, because no weights come along.

    python recipes/cifar_vgg.py --data DIR --train-epochs 30 [--methods loewner functional l2 …] [--rounds 1]

DIR holds cifar10_jpeg.npz. The dense network is kept in OUT/vgg16.safetensors. On a GPU it takes minutes, on two cores
a day.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from coreprune import Tuning, fine_tune_
from coreprune.finetune import Batches, accuracy
from experiment import Task, main, parser, start_process_group

METHODS = ("loewner", "mussay", "norm", "pfp", "uniform", "functional", "l2")
REPORTED = "VGG-16 and VGG-19 are among its experiments; its figures are not in public sources that we could read."
LAYERS = (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512, 0)  # 0: pooling


def vgg(layers: tuple[int, ...] = LAYERS, classes: int = 10) -> nn.Sequential:
    """The network of Simonyan and Zisserman (2015) with batch norms and one linear layer, as is usual for CIFAR."""
    parts: list[nn.Module] = []
    width = 3
    for out in layers:
        if not out:
            parts.append(nn.MaxPool2d(2))
            continue
        parts += [nn.Conv2d(width, out, 3, padding=1, bias=False), nn.BatchNorm2d(out), nn.ReLU()]
        width = out
    return nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, classes))


def recipe(options: argparse.Namespace) -> Task:
    """VGG-16, trained first if need be, or something small instead."""
    from cifar import Augmented, normalised, pictures, predictions

    torch.manual_seed(0)
    device = start_process_group()
    if options.toy:
        x, y = torch.randn(48, 3, 16, 16), torch.randint(0, 10, (48,))
        return Task(
            "VGG-4", vgg((8, 0, 16, 16, 0)).eval(), x[:1],
            lambda seed: Batches(x, y, 16, torch.Generator().manual_seed(seed)),
            lambda m: accuracy(m, x, y), Tuning(epochs=1), queries=x[:16], reported=REPORTED,
        )  # fmt: skip
    images, labels = pictures(options.data, "train", range(50_000))
    tests, answers = pictures(options.data, "test", range(10_000))
    model = vgg().to(device, memory_format=torch.channels_last)

    def batches(seed: int) -> Augmented:
        return Augmented(images, labels, 128, torch.Generator().manual_seed(seed))

    def test(m: nn.Module) -> float:
        return float((predictions(_there(m, device), tests, 500).cpu() == answers).double().mean())

    saved: Path = options.out / "vgg16.safetensors"
    if saved.exists():
        model.load_state_dict(load_file(saved))
    else:
        training = Tuning(
            epochs=options.train_epochs, lr=0.1, optimizer="sgd", weight_decay=5e-4, warm_up=0.1, average=0.999
        )
        options.out.mkdir(parents=True, exist_ok=True)
        fine_tune_(
            model, batches(0), training, validate=test, checkpoint=options.out / "dense.safetensors",
            log=options.out / "dense.jsonl",
        )  # fmt: skip
        save_file(model.state_dict(), saved)
    example = normalised(images[:1]).to(device)
    return Task("VGG-16", model.eval(), example, batches, test, Tuning(epochs=10, lr=1e-3), reported=REPORTED)


def _there(model: nn.Module, device: torch.device) -> nn.Module:
    """The model for inputs that lie on the CPU."""

    class There(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x.to(device))

    return model if device.type == "cpu" else There()


if __name__ == "__main__":
    made = parser(__doc__, METHODS, (0.5, 0.25))
    made.add_argument("--train-epochs", type=int, default=30)
    main(recipe, made.parse_args())
