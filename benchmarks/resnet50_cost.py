"""What it costs to prune a network of the size of ResNet-50: seconds of every phase and peak memory.

    python benchmarks/resnet50_cost.py [--threads 2] [--only REGEX] [--quick]

ResNet-50 with random weights and batch-norm statistics measured on noise, 224×224 pixels, 64 given queries (noise with
the spectrum of photographs), half of the multiply-accumulates. Each row runs in a process of its own. Wanted on two
cores: at most 5 minutes and 6 GiB. Writes resnet50_cost.json.
"""

from __future__ import annotations

import argparse
import json
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from children import Row, answer, in_child, measured
from coreprune import Budget, prune
from environment import environment

RESULT = Path(__file__).parent / "results/resnet50_cost.json"
WANTED = {"seconds": 300, "peak_memory_mib": 6 * 1024, "cores": 2}
ROWS = (("functional", True), ("functional", False), ("magnitude", True), ("magnitude", False))


class Bottleneck(nn.Module):
    """1×1, 3×3 (which has the stride), 1×1, each with batch norm, and a shortcut."""

    def __init__(self, width_in: int, inner: int, stride: int) -> None:
        super().__init__()
        width = 4 * inner
        self.conv1, self.bn1 = nn.Conv2d(width_in, inner, 1, bias=False), nn.BatchNorm2d(inner)
        self.conv2, self.bn2 = nn.Conv2d(inner, inner, 3, stride, 1, bias=False), nn.BatchNorm2d(inner)
        self.conv3, self.bn3 = nn.Conv2d(inner, width, 1, bias=False), nn.BatchNorm2d(width)
        self.downsample = nn.Identity()
        if stride > 1 or width_in != width:
            self.downsample = nn.Sequential(nn.Conv2d(width_in, width, 1, stride, bias=False), nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = F.relu(self.bn2(self.conv2(y)))
        return F.relu(self.bn3(self.conv3(y)) + self.downsample(x))


class ResNet50(nn.Module):
    """He et al., CVPR 2016, with the stride in the 3×3 convolution, as it is used today."""

    def __init__(self, classes: int = 1000) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64)
        stages, width = [], 64
        for inner, blocks, stride in ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2)):
            first, width = Bottleneck(width, inner, stride), 4 * inner
            stages.append(nn.Sequential(first, *(Bottleneck(width, inner, 1) for _ in range(blocks - 1))))
        self.layer1, self.layer2, self.layer3, self.layer4 = stages
        self.fc = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(x))), 3, 2, 1)
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(x.mean(dim=(2, 3)))


@dataclass(frozen=True)
class Setup:
    """queries: how many. calibration: noise images behind the batch-norm statistics. macs: share that stays."""

    size: int = 224
    queries: int = 64
    calibration: int = 32
    macs: float = 0.5
    threads: int = 2
    seed: int = 0


def noise(n: int, size: int, generator: torch.Generator) -> Tensor:
    """(n, 3, size, size): amplitude 1/f, colour channels that go together, mean 0 and deviation 1."""
    along = torch.fft.fftfreq(size)
    frequency = (along[:, None] ** 2 + torch.fft.rfftfreq(size)[None] ** 2).sqrt().clamp(min=1 / size)
    images = torch.fft.irfft2(torch.fft.rfft2(torch.randn(n, 3, size, size, generator=generator)) / frequency)
    images = images + 1.5 * images.mean(dim=1, keepdim=True)
    centred = images - images.mean(dim=(1, 2, 3), keepdim=True)
    return centred / centred.std(dim=(1, 2, 3), keepdim=True)


def weights(setup: Setup) -> dict[str, Tensor]:
    """Random weights (He et al. 2015); the means and variances of the norms are those on noise."""
    generator = torch.Generator().manual_seed(setup.seed)
    model = ResNet50().train()
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu", generator=generator)
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.2, 1.2, generator=generator)  # unequal, as after training
            nn.init.normal_(module.bias, 0.0, 0.2, generator=generator)
            module.momentum = 1.0
    nn.init.normal_(model.fc.weight, 0.0, 0.03, generator=generator)
    nn.init.zeros_(model.fc.bias)
    with torch.no_grad():
        model(noise(setup.calibration, setup.size, generator))
    return model.state_dict()


def work(job: Row) -> Row:
    """One row, or the weights for all rows. job: {"setup", "weights": a file, "method", "repair"}."""
    setup, file = Setup(**job["setup"]), Path(job["weights"])
    torch.set_num_threads(setup.threads)
    if "method" not in job:
        save_file(weights(setup), file)
        return {}
    model = ResNet50().eval()
    model.load_state_dict(load_file(file))
    generator = torch.Generator().manual_seed(setup.seed + 1)
    given, fresh = noise(setup.queries, setup.size, generator), noise(8, setup.size, generator)
    result, cost = measured(
        lambda: prune(
            model,
            given[:1],
            Budget(macs=setup.macs),
            method=job["method"],
            queries=given,
            repair=job["repair"],
            seed=setup.seed,
        )
    )
    with torch.no_grad():
        wanted, found = model(fresh), result.model.eval()(fresh)
    before, after = result.report.macs
    return {
        "seconds": dict(result.report.seconds) or {"total": cost["wall_s"]},
        **cost,
        "macs": round(after / before, 5),
        "relative_error_of_fresh_outputs": round(float((found - wanted).norm() / (wanted - wanted.mean(0)).norm()), 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", default="", help="a regular expression, e.g. functional/repair")
    parser.add_argument("--limit", type=float, default=1800, help="seconds that a row may take")
    parser.add_argument("--quick", action="store_true", help="64×64 pixels, 8 queries, into build/quick")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--job", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.job:
        answer(work, options.job)
        return
    smaller = {"size": 64, "queries": 8, "calibration": 8} if options.quick else {}
    setup = Setup(threads=options.threads, **smaller)
    target = options.out or (Path("build/quick/resnet50_cost.json") if options.quick else RESULT)
    console, rows = Console(highlight=False, soft_wrap=True), {}
    if target.exists() and options.only:
        rows = {row["key"]: row for row in json.loads(target.read_text())["rows"]}
    with tempfile.TemporaryDirectory() as folder:
        job = {"setup": vars(setup), "weights": str(Path(folder) / "weights.safetensors")}
        failed = in_child(__file__, job, options.limit, options.threads)
        if failed:
            raise SystemExit(failed["error"])
        for method, repair in ROWS:
            key = f"{method}/{'repair' if repair else 'none'}"
            if re.search(options.only, key):
                with console.status(key):
                    found = in_child(
                        __file__, job | {"method": method, "repair": repair}, options.limit, options.threads
                    )
                rows[key] = {"key": key, "method": method, "repair": repair, **found}
                console.print(json.dumps(rows[key]))
    record = {
        "benchmark": "resnet50_cost",
        "environment": environment("safetensors"),
        "setup": vars(setup),
        "parameters": sum(p.numel() for p in ResNet50().parameters()),
        "wanted": WANTED,
        "rows": list(rows.values()),
    }
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
