"""ResNet-50 on ImageNet, with torchvision's weights.

    torchrun --nproc-per-node 8 recipes/imagenet_resnet50.py --data IMAGENET --weights resnet50.pth \\
        [--methods functional loewner l2] [--shares 0.38] [--epochs 30] [--batch 128]

IMAGENET has the usual folders train/CLASS/*.JPEG and val/CLASS/*.JPEG. resnet50.pth is a state dict, such as
torchvision's resnet50-11ad3fa6.pth. Needs torchvision. Mixed precision and channels_last on GPUs, averaged weights; an
interrupted run goes on at the last epoch. We had neither ImageNet nor GPUs for it: it is tested at toy size alone.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, DistributedSampler, TensorDataset

from coreprune import Tuning
from experiment import Task, main, parser, start_process_group

METHODS = ("functional", "loewner", "l2")
REPORTED = "62 % smaller with 1.09 points lost, after fine-tuning (from its abstract)."
Labelled = Dataset[tuple[Tensor, int]]
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def recipe(options: argparse.Namespace) -> Task:
    """ResNet-50 and ImageNet, or something small instead."""
    device = start_process_group()
    model, train, test = _toy() if options.toy else _imagenet(options)
    model = model.to(device, memory_format=torch.channels_last).eval()
    example = train[0][0][None].to(device)

    def batches(seed: int) -> DataLoader[tuple[Tensor, Tensor]]:
        spread = DistributedSampler(train, seed=seed) if torch.distributed.is_initialized() else None
        return DataLoader(
            train, options.batch, shuffle=spread is None, sampler=spread, num_workers=options.workers,
            pin_memory=device.type == "cuda", drop_last=True, generator=torch.Generator().manual_seed(seed),
        )  # fmt: skip

    @torch.no_grad()
    def accuracy(small: nn.Module) -> float:
        training, right = small.training, torch.zeros(2, dtype=torch.int64, device=device)
        small.eval()
        spread = DistributedSampler(test, shuffle=False) if torch.distributed.is_initialized() else None
        for x, y in DataLoader(test, 2 * options.batch, sampler=spread, num_workers=options.workers):
            found = small(x.to(device, memory_format=torch.channels_last)).argmax(dim=1)
            right += torch.tensor([int((found == y.to(device)).sum()), len(y)], device=device)
        small.train(training)
        if torch.distributed.is_initialized():
            torch.distributed.all_reduce(right)
        return float(right[0] / right[1])

    tuning = Tuning(
        epochs=30, lr=0.05, optimizer="sgd", weight_decay=5e-5, smoothing=0.1, average=0.9999, warm_up=0.02, soft=0.5
    )
    queries = torch.stack([train[i][0] for i in _some(len(train), options.queries)]).to(device)
    return Task("ResNet-50", model, example, batches, accuracy, tuning, queries=queries, reported=REPORTED)


def _some(n: int, count: int) -> list[int]:
    return torch.randperm(n, generator=torch.Generator().manual_seed(0))[:count].tolist()


def _imagenet(
    options: argparse.Namespace,
) -> tuple[nn.Module, Dataset[tuple[Tensor, int]], Dataset[tuple[Tensor, int]]]:
    from torchvision import datasets, models
    from torchvision import transforms as t

    end = [t.ToTensor(), t.Normalize(MEAN, DEVIATION)]
    train = t.Compose([t.RandomResizedCrop(224), t.RandomHorizontalFlip(), *end])
    test = t.Compose([t.Resize(256), t.CenterCrop(224), *end])
    model = models.resnet50()
    model.load_state_dict(torch.load(options.weights, weights_only=True))
    folders = (options.data / "train", options.data / "val")
    return model, datasets.ImageFolder(folders[0], train), datasets.ImageFolder(folders[1], test)


def _toy() -> tuple[nn.Module, Labelled, Labelled]:
    from cifar import ResNet

    torch.manual_seed(0)
    data = TensorDataset(torch.randn(64, 3, 32, 32), torch.randint(0, 10, (64,)))
    return ResNet(1), data, data  # type: ignore[return-value]


if __name__ == "__main__":
    made = parser(__doc__, METHODS, (0.38,))
    made.add_argument("--weights", help="a state dict of torchvision's resnet50")
    made.add_argument("--batch", type=int, default=128, help="of every process")
    made.add_argument("--workers", type=int, default=8)
    made.add_argument("--queries", type=int, default=512, help="training images, without labels, for what reads some")
    main(recipe, made.parse_args())
