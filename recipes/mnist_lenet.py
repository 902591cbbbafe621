"""LeNet-300-100 on MNIST.

    python recipes/mnist_lenet.py --data DIR [--methods loewner functional l2 …] [--shares 0.5 0.1] [--seeds 3]

DIR holds mnist.npz and lenet300_mnist.safetensors.
"""

from __future__ import annotations

import argparse

import torch
from torch import nn

from coreprune import Tuning
from coreprune.finetune import Batches, accuracy
from experiment import Task, main, parser

METHODS = ("loewner", "mussay", "norm", "pfp", "uniform", "functional", "l2")
REPORTED = "LeNet-300-100 is among its experiments; its figures are not in public sources that we could read."


def recipe(options: argparse.Namespace) -> Task:
    """LeNet-300-100 and MNIST, or something small instead."""
    if options.toy:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 12), nn.ReLU(), nn.Linear(12, 4)).eval()
        x = torch.randn(200, 16)
        train = test = (x, x[:, :4].argmax(dim=1))
    else:
        from lenet_mnist import lenet, mnist

        model, train, test = lenet(options.data).eval(), mnist(options.data, "train"), mnist(options.data, "test")
    return Task(
        name="a small MLP" if options.toy else "LeNet-300-100",
        dense=model,
        example=train[0][:1],
        batches=lambda seed: Batches(*train, 64, torch.Generator().manual_seed(seed)),
        test=lambda m: accuracy(m, *test),
        tuning=Tuning(epochs=3, lr=1e-3),
        reported=REPORTED,
    )


if __name__ == "__main__":
    main(recipe, parser(__doc__, METHODS, (0.5, 0.25, 0.1)).parse_args())
