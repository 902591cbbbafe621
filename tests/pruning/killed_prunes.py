"""Kill prune(resume=...) at random points, and write down what the run that goes on gives. test_resume.py runs it.

    python killed_prunes.py FOLDER KILLS SEED  ->  one JSON object on standard output

A run is a child of one process that has torch imported. It dies by SIGKILL, before a random one of its changes to the
file system, or by SIGPROF after a random time on the processor; it can answer neither.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from coreprune import Budget, open_model, prune
from coreprune import _mapped as mapping

CHANGES = ("os.rename", "os.mkdir", "os.remove", "os.chmod", "tempfile.mkstemp")


def net() -> nn.Module:
    sizes = (8, 32, 24, 20, 16, 4)
    layers: list[nn.Module] = []
    for a, b in pairwise(sizes):
        layers += [nn.Linear(a, b), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def run(folder: Path, state: Path | None) -> str:
    model = open_model(folder / "net.safetensors", net).bfloat16()
    x = torch.randn(64, 8, generator=torch.Generator().manual_seed(1)).bfloat16()
    result = prune(model, x[:1], Budget(macs=0.4), queries=x, resume=state, memory="1GiB")
    total = hashlib.sha256(result.plan.to_json().encode())
    for name, t in result.model.state_dict().items():
        total.update(name.encode() + t.contiguous().view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def child(folder: Path, state: Path, at: int | None = None, after: float = 0.0) -> tuple[bool, str, int, float]:
    """(killed, what it gave, its changes to files, its seconds)."""
    said = folder / "said.txt"
    said.unlink(missing_ok=True)
    pid = os.fork()
    if not pid:
        count = 0

        def watch(event: str, args: tuple[Any, ...]) -> None:
            nonlocal count
            if event in CHANGES:
                if count == at:
                    os.kill(os.getpid(), signal.SIGKILL)
                count += 1

        sys.addaudithook(watch)
        signal.setitimer(signal.ITIMER_PROF, after)
        try:
            said.write_text(f"{run(folder, state)} {count}")
        except BaseException as error:
            said.write_text(f"{error!r} 0")
        finally:
            os._exit(0)
    _, status, used = os.wait4(pid, 0)
    text, _, count = (said.read_text() if said.exists() else " 0").rpartition(" ")
    return os.WIFSIGNALED(status), text, int(count), used.ru_utime


def main(folder: Path, wanted: int, seed: int) -> dict[str, Any]:
    torch.set_num_threads(1)
    mapping._SMALL = 1  # small tensors go into files, too
    torch.manual_seed(0)
    save_file(net().state_dict(), folder / "net.safetensors")
    straight = run(folder, None)
    _, reference, steps, seconds = child(folder, folder / "reference")
    trials: list[dict[str, Any]] = []
    hits = 0
    while hits < wanted:
        dice, state = random.Random(f"{seed} {len(trials)}"), folder / f"state{len(trials)}"
        by_step = len(trials) % 3 < 2
        when: dict[str, Any] = {"at": dice.randrange(steps)} if by_step else {"after": dice.uniform(0.01, seconds)}
        killed, *_ = child(folder, state, **when)
        hits += killed
        left = sorted(p.name for p in state.iterdir()) if state.exists() else []
        _, end, _, _ = child(folder, state)
        trials.append({"when": when, "killed": killed, "left": left, "end": end})
    return {"straight": straight, "reference": reference, "trials": trials}


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))))
