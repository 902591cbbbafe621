"""ResNet-56 on CIFAR-10.

    python recipes/cifar_resnet56.py --data DIR [--methods loewner functional l2 …] [--shares 0.5 0.25] [--seeds 3]

DIR holds cifar10_jpeg.npz and resnet56_cifar10_jpeg.safetensors. The queries of what reads some are made without data.
--train limits the training images (15,000 by default, a few minutes per row on two cores), --test those for the test.
"""

from __future__ import annotations

import argparse

import torch

from coreprune import Tuning
from coreprune.finetune import Batches, accuracy
from experiment import Task, main, parser

METHODS = ("loewner", "mussay", "norm", "pfp", "uniform", "functional", "l2")
REPORTED = "ResNet-56 is among its experiments; its figures are not in public sources that we could read."


def recipe(options: argparse.Namespace) -> Task:
    """ResNet-56 and CIFAR-10, or something small instead."""
    from cifar import Augmented, ResNet, normalised, pictures, predictions, trained

    if options.toy:
        torch.manual_seed(0)
        x, y = torch.randn(48, 3, 32, 32), torch.randint(0, 10, (48,))
        model = ResNet(1).eval()
        return Task(
            "ResNet-8", model, x[:1], lambda seed: Batches(x, y, 16, torch.Generator().manual_seed(seed)),
            lambda m: accuracy(m, x, y), Tuning(epochs=1), queries=x[:16], reported=REPORTED,
        )  # fmt: skip
    images, labels = pictures(options.data, "train", range(options.train))
    tests, answers = pictures(options.data, "test", range(options.test))
    return Task(
        name="ResNet-56",
        dense=trained(options.data).to(memory_format=torch.channels_last),  # trains in two thirds of the time on CPUs
        example=normalised(images[:1]),
        batches=lambda seed: Augmented(images, labels, 128, torch.Generator().manual_seed(seed)),
        test=lambda m: float((predictions(m, tests, 128) == answers).double().mean()),
        tuning=Tuning(epochs=1, lr=1e-3),
        reported=REPORTED,
    )


if __name__ == "__main__":
    made = parser(__doc__, METHODS, (0.5, 0.25))
    made.add_argument("--train", type=int, default=15_000)
    made.add_argument("--test", type=int, default=10_000)
    main(recipe, made.parse_args())
