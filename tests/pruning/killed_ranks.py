"""Kill one of two processes of prune(resume=...) at random points, and go on with one to three. test_resume.py runs it.

    python killed_ranks.py FOLDER KILLS SEED  ->  one JSON object on standard output

All processes are children of one that has everything imported. The victim dies by SIGKILL, before a random one of its
changes to the file system or at a random call of the progress function.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from killed_prunes import CHANGES, net

from coreprune import Budget, prune

Step = Callable[[], None]  # what happens at every change of a file and every call of the progress function


def work(rank: int, world: int, folder: Path, state: Path, step: Step) -> None:
    torch.set_num_threads(1)
    if world > 1:
        store, wait = f"file://{folder / 'store'}", timedelta(seconds=60)
        dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world, timeout=wait)
        dist.barrier()
    sys.addaudithook(lambda event, _: step() if event in CHANGES else None)
    torch.manual_seed(0)
    x = torch.randn(96, 8, generator=torch.Generator().manual_seed(1))
    made = {"queries": x, "resume": state, "memory": "1GiB", "progress": lambda *_: step()}
    try:
        result = prune(net(), x[:1], Budget(macs=0.4), **made)
        said: Any = result.plan.to_json(), dict(result.model.state_dict())
    except Exception as error:
        said = type(error).__name__, None
    torch.save(said, folder / f"{rank}.pt")


def together(world: int, folder: Path, state: Path, victim: int = -1, at: int = -1) -> tuple[list[Any], list[int]]:
    """What the processes said, None for who is dead; and how many steps each has taken."""
    folder.mkdir()
    children = []
    for rank in range(world):
        child = os.fork()
        if not child:
            count = 0

            def step(rank: int = rank) -> None:
                nonlocal count
                if rank == victim and count == at:
                    os.kill(os.getpid(), signal.SIGKILL)
                count += 1

            try:
                work(rank, world, folder, state, step)
                (folder / f"{rank}.count").write_text(str(count))
            finally:
                os._exit(0)
        children.append(child)
    for child in children:
        os.waitpid(child, 0)
    files = [folder / f"{rank}.pt" for rank in range(world)]
    counts = [folder / f"{rank}.count" for rank in range(world)]
    said = [torch.load(f) if f.exists() else None for f in files]
    return said, [int(f.read_text()) if f.exists() else 0 for f in counts]


def apart(a: Any, b: Any) -> float:
    """The largest difference between the weights of two ends; infinite where the plans differ or one is an error."""
    if a is None or b is None or a[0] != b[0] or a[1] is None:
        return float("inf")
    return max(float((a[1][name] - b[1][name]).abs().max()) for name in a[1])


def main(folder: Path, kills: int, seed: int) -> dict[str, Any]:
    straight, steps = together(2, folder / "straight", folder / "straight state")
    trials = []
    for i in range(kills):
        dice, state = random.Random(f"{seed} {i}"), folder / f"state {i}"
        victim, world = dice.randrange(2), dice.choice((1, 2, 3))
        at = dice.randrange(steps[victim])
        ends, _ = together(2, folder / f"killed {i}", state, victim, at)
        left = sorted(p.name for p in state.iterdir()) if state.exists() else []
        again, _ = together(world, folder / f"again {i}", state)
        trials.append(
            {
                "when": {"victim": victim, "at": at, "world": world},
                "killed": ends[victim] is None,
                "other": (ends[1 - victim] or [""])[0][:20],
                "left": left,
                "apart": max(apart(one, straight[0]) for one in again),
            }
        )
    return {"steps": steps, "straight": apart(*straight), "trials": trials}


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))))
