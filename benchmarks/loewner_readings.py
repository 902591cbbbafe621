"""What the paper may have meant: `loewner` with one part read otherwise at a time, on LeNet-300-100 and ResNet-56.

    python benchmarks/loewner_readings.py [--data ../shared/data] [--seeds 10] [--threads 2] [--only REGEX]

DIR holds MNIST, CIFAR-10 and the two trained networks. Nothing is repaired. Each row has the test accuracies of all
seeds right after pruning, and those of the first three seeds after three epochs of training (the recipe's), at once
and in three rounds of pruning and training (one epoch each). In the last row every 3×3 kernel of ResNet-56 is a point;
it is trained as in `recipes/cifar_resnet56.py --train 8000`, whose table has the other readings. No setting was chosen
by them. Writes results/loewner_readings.json.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from children import Row, measured
from cifar import Augmented, normalised, pictures, predictions, trained
from coreprune import Budget, Tuning, fine_tune_, prune
from coreprune.coreset.sensitivity import peel
from coreprune.finetune import Batches, accuracy
from coreprune.pruning.layer.weights import LayerWeights
from coreprune.pruning.selectors.base import Ranking
from coreprune.pruning.selectors.sampling import sampled
from coreprune.selectors import Loewner, Uniform
from lenet_mnist import lenet, mnist
from table import run

SHARES, TRAINED, KERNELS = (0.25, 0.1), 3, "kernels as points, ResNet-56"


def without_biases(layer: LayerWeights, generator: torch.Generator) -> Ranking:
    """Points are the weights alone."""
    points = layer.effective.clone()
    points[:, points.shape[1] - layer.bias_columns :] = 0
    return Loewner()(replace(layer, incoming=points, norms=()), generator)


def without_outgoing(layer: LayerWeights, generator: torch.Generator) -> Ranking:
    """What the next layer does with a neuron does not count."""
    return Loewner()(replace(layer, outgoing=torch.ones_like(layer.outgoing[:1])), generator)


def not_weighted(layer: LayerWeights, generator: torch.Generator) -> Ranking:
    """Those drawn keep their outgoing weights."""
    found = Loewner()(layer, generator)
    return Ranking("not weighted", found.scores, found.order)


def largest(layer: LayerWeights, generator: torch.Generator) -> Ranking:
    """The most important neurons stay, and nothing is drawn."""
    scores = Loewner()(layer, generator).scores
    return Ranking("largest", scores, scores.argsort(descending=True, stable=True))


def kernels(layer: LayerWeights, generator: torch.Generator) -> Ranking:
    """Every 3×3 kernel is a point, and a filter is worth the sum of its kernels' bounds."""
    weights = layer.effective[:, : layer.weights.shape[1]]
    points = (layer.outgoing_sizes[:, None] * weights).reshape(-1, 9)
    bound = peel(points, variant="axes")
    note = f"{len(points)} kernels, {bound.rounds} rounds"
    return sampled("kernels", bound.importance.reshape(len(weights), -1).sum(dim=1), generator, note)


READINGS: dict[str, Callable[[LayerWeights, torch.Generator], Ranking]] = {
    "loewner": Loewner(),
    "bound α/l": Loewner(tight=False),
    "no ridge": Loewner(ridge=None),
    "contact points": Loewner(variant="contact"),
    "first author's code": Loewner(preset="authors"),
    "without biases": without_biases,
    "without outgoing weights": without_outgoing,
    "drawn, not re-weighted": not_weighted,
    "the largest, not drawn": largest,
    "uniform": Uniform(),
}


def work(job: Row) -> Row:
    """One row. job: the reading, the share and the number of seeds."""
    torch.set_num_threads(job["threads"])
    return convolutional(job) if job["reading"] == KERNELS else connected(job)


def convolutional(job: Row) -> Row:
    """ResNet-56 with kernels as points, and one epoch of training."""
    data, rows = Path(job["data"]), []
    dense = trained(data).to(memory_format=torch.channels_last)
    (images, labels), (tests, answers) = pictures(data, "train", range(8_000)), pictures(data, "test", range(10_000))
    example = normalised(images[:1])

    def percent(model: nn.Module) -> float:
        return round(100 * float((predictions(model, tests, 128) == answers).double().mean()), 2)

    for seed in range(job["seeds"]):
        asked = {"queries": None, "repair": False, "seed": seed, "progress": False}
        model = prune(dense, example, Budget(macs=job["share"]), kernels, **asked).model
        pruned = percent(model)
        batches = Augmented(images, labels, 128, torch.Generator().manual_seed(seed))
        fine_tune_(model, batches, Tuning(epochs=1, lr=1e-3), teacher=dense, progress=False)
        rows.append((pruned, percent(model)))
    return {"pruned": [first for first, _ in rows], "tuned": [last for _, last in rows]}


def connected(job: Row) -> Row:
    """LeNet-300-100."""
    data = Path(job["data"])
    dense, test, train = lenet(data), mnist(data, "test"), mnist(data, "train")
    method, share = READINGS[job["reading"]], job["share"]

    def cut(model: nn.Module, part: float, seed: int) -> nn.Module:
        asked = {"queries": None, "repair": False, "seed": seed, "progress": False}
        return prune(model, train[0][:1], Budget(macs=part), method, **asked).model

    def taught(model: nn.Module, epochs: int, seed: int) -> nn.Module:
        batches = Batches(*train, 64, torch.Generator().manual_seed(seed))
        fine_tune_(model, batches, Tuning(epochs=epochs, lr=1e-3), teacher=dense, progress=False)
        return model

    def percent(model: nn.Module) -> float:
        return round(100 * accuracy(model, *test), 2)

    small, cost = measured(lambda: [cut(dense, share, seed) for seed in range(job["seeds"])])
    pruned = [percent(model) for model in small]
    once = [percent(taught(small[seed], 3, seed)) for seed in range(min(TRAINED, job["seeds"]))]
    rounds = []
    for seed in range(min(TRAINED, job["seeds"])):
        torch.manual_seed(seed)
        model = dense
        for i in range(3):
            model = taught(cut(model, share ** (1 / 3), seed + i), 1, seed + i)
        rounds.append(percent(model))
    return {"pruned": pruned, "tuned": once, "in_rounds": rounds, **cost}


def jobs(options: argparse.Namespace) -> Iterator[tuple[str, Row]]:
    for share in SHARES:
        for reading in READINGS:
            yield f"{reading}/{100 * share:g}", {"reading": reading, "share": share, "seeds": options.seeds}
    yield f"{KERNELS}/50", {"reading": KERNELS, "share": 0.5, "seeds": min(TRAINED, options.seeds)}


if __name__ == "__main__":
    run(__file__, __doc__, jobs, work, seeds=10)
