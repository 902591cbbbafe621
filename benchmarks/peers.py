"""Other pruners on the same network, at the same budget, with the same samples: ResNet-56 on CIFAR-10 (JPEG).

    pip install -e '.[bench]'
    python benchmarks/peers.py --data DIR [--seeds 3] [--threads 2] [--only REGEX]

DIR holds cifar10_jpeg.npz and resnet56_cifar10_jpeg.safetensors. Every method removes channels until at most a share of
the multiply-accumulates is left, and nothing is trained afterwards. Torch-Pruning removes the same share of the inner
channels of every block, its best setting in resnet56_cifar.json; it has at least the share. Those that need samples get
the same 256 training images of a seed, without labels: where a loss is needed, the label is the dense network's own
answer. Merging and folding remove inner channels alone, and coreprune chooses their widths by the errors on the
samples: of five settings the best on training images. Accuracy is on the 10,000 test images. coreprune has its default
settings. Each row runs in a process of its own and is appended to a journal. Writes results/peers.json.
"""

from __future__ import annotations

import argparse
import copy
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import least_squares
from children import Row, measured
from cifar import ResNet, normalised, pictures, predictions, trained
from coreprune import Budget, prune
from coreprune.selectors import Folding
from resnet56_work import TRAIN, example, macs
from table import run

SHARES, SAMPLES, TEST = (0.5, 0.35), 256, 10_000
BETWEEN = ("conv1", "layer[23].0.conv2", "linear")  # what is not inside a block
Pruner = Callable[[ResNet, Tensor, float, int], nn.Module]  # (dense, samples, share of the MACs, seed) -> smaller


def ours(**asked: Any) -> Pruner:
    """coreprune. queries: "samples" for the samples. statistics: of batch norms, measured anew on the samples."""

    def pruner(dense: ResNet, samples: Tensor, share: float, seed: int) -> nn.Module:
        settings = dict(asked)
        anew = settings.pop("statistics", False)
        if settings.get("queries") == "samples":
            settings["queries"] = samples
        result = prune(dense, example(), Budget(macs=share), seed=seed, **settings)
        if anew:
            remeasured(result.model, samples)
        return result.model

    return pruner


@torch.no_grad()
def remeasured(model: nn.Module, samples: Tensor) -> None:
    """The running statistics of all batch norms, on the samples."""
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a plain mean over the batches
    model.train()
    for part in samples.split(64):
        model(part)
    model.eval()


def torch_pruning(importance: str, **options: Any) -> Pruner:
    """Torch-Pruning with the same share of inner channels in every block, and at least the MACs of the budget."""

    def pruner(dense: ResNet, samples: Tensor, share: float, seed: int) -> nn.Module:  # noqa: ARG001
        import torch_pruning as tp

        wanted = share * macs(dense)

        def at(ratio: float) -> nn.Module:
            model = copy.deepcopy(dense)
            scorer = getattr(tp.importance, importance)(**options)
            inner = {f"layer{i}.{j}.conv1" for i in (1, 2, 3) for j in range(9)}
            layers = ((name, m) for name, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear))
            given = {
                "global_pruning": False,
                "pruning_ratio": ratio,
                "ignored_layers": [m for n, m in layers if n not in inner],
            }
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                made = tp.pruner.BasePruner(model, example(), importance=scorer, **given)
                _gradients(model, scorer, samples)
                made.step()
            return model.eval()

        low, high = 0.0, 1.0
        for _ in range(8):
            middle = (low + high) / 2
            try:
                large = macs(at(middle)) > wanted
            except Exception:  # nothing may be left of a layer
                large = False
            low, high = (middle, high) if large else (low, middle)
        return at(low)

    return pruner


def _gradients(model: nn.Module, scorer: Any, samples: Tensor) -> None:
    """What an importance reads: gradients of the loss on the samples, of each sample for second-order ones."""
    kind = type(scorer).__name__
    if "Taylor" in kind or "Hessian" in kind:
        model.eval()
        with torch.no_grad():
            labels = model(samples).argmax(dim=1)
        if "Taylor" in kind:
            F.cross_entropy(model(samples), labels).backward()
            return
        scorer.zero_grad()
        for x, y in zip(samples, labels, strict=True):
            model.zero_grad()
            F.cross_entropy(model(x[None]), y[None]).backward()
            scorer.accumulate_grad(model)


def at_the_budget(dense: ResNet, samples: Tensor, share: float, seed: int) -> nn.Module:  # noqa: ARG001
    """Least squares with the largest share of inner channels, the same in every block, that the budget allows."""
    wanted = share * macs(dense)
    kept = next(k / 200 for k in range(200, 0, -1) if macs(least_squares.narrowed(dense, k / 200)) <= wanted)
    return least_squares.prune(dense, samples, kept)


METHODS: dict[str, tuple[Pruner, bool]] = {  # with whether chance plays a part
    "coreprune, 256 images": (ours(queries="samples"), True),
    "coreprune, no data": (ours(), True),
    "least squares with local search": (at_the_budget, True),
    "model folding, statistics anew": (
        ours(method=Folding(), queries="samples", repair=False, exclude=BETWEEN, statistics=True),
        True,
    ),
    "neuron merging": (ours(method="merging", queries="samples", repair=False, exclude=BETWEEN), True),
    "Torch-Pruning L2": (torch_pruning("MagnitudeImportance", p=2), False),
    "Torch-Pruning BN scale": (torch_pruning("BNScaleImportance"), False),
    "Torch-Pruning Taylor": (torch_pruning("TaylorImportance"), True),
    "Torch-Pruning OBD": (torch_pruning("HessianImportance"), True),
}


def work(job: Row) -> Row:
    """One row. job: method, share, seed, the folder and the threads."""
    torch.set_num_threads(job["threads"])
    folder = Path(job["data"])
    dense = trained(folder)
    generator = torch.Generator().manual_seed(job["seed"])
    rows = torch.randperm(TRAIN, generator=generator)[:SAMPLES].tolist()
    samples = normalised(pictures(folder, "train", rows)[0])
    images, labels = pictures(folder, "test", range(TEST))
    if job["method"] == "dense":
        return {"accuracy": _right(dense, images, labels)}
    pruner, _ = METHODS[job["method"]]
    small, cost = measured(lambda: pruner(dense, samples, job["share"], job["seed"]))
    return {"accuracy": _right(small, images, labels), "macs": round(macs(small) / macs(dense), 4), **cost}


def _right(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    return round(100 * float((predictions(model, images, 256) == labels).double().mean()), 2)


def jobs(options: argparse.Namespace) -> Iterator[tuple[str, Row]]:
    yield "dense", {"method": "dense", "share": 1.0, "seed": 0}
    for seed in range(options.seeds):
        for method, (_, random) in METHODS.items():
            if random or seed == 0:
                for share in SHARES:
                    yield f"{method}/{100 * share:g}/seed {seed}", {"method": method, "share": share, "seed": seed}


if __name__ == "__main__":
    about = {"samples": SAMPLES, "test_images": TEST}
    run(__file__, __doc__, jobs, work, packages=("torch-pruning",), about=about)
