"""What several processes do for `test_distributed.py`: python rank_runs.py CASE WORLD FOLDER writes FOLDER/RANK.pt.

The parent imports everything, and forks before any thread is there, so the imports are paid once.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from coreprune import Budget, CoreprunError, Descent, InputError, Merging, Repair, apply_plan, make_plan, prune
from coreprune._progress import silent
from coreprune._ranks import together
from coreprune.graph import elements
from coreprune.pruning.calibration.calibration import Asked, gather
from coreprune.pruning.calibration.element_losses import ElementLosses
from coreprune.pruning.calibration.sites import Collect
from coreprune.pruning.calibration.statistics import collect_readers
from coreprune.pruning.tracing import trace

ROW = torch.zeros(1, 6)
QUICK = {"repair": Repair(descent=False), "compare": False}


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def mlp(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 20), nn.ReLU(), nn.Linear(20, 16), nn.ReLU(), nn.Linear(16, 4)).eval()


def cnn() -> nn.Module:
    torch.manual_seed(0)
    convolutions = (nn.Conv2d(3, 12, 3), nn.BatchNorm2d(12), nn.ReLU(), nn.Conv2d(12, 16, 3), nn.ReLU())
    return nn.Sequential(*convolutions, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5)).eval()


class Block(nn.Module):
    def __init__(self, does: float) -> None:
        super().__init__()
        self.up, self.down, self.does = nn.Linear(12, 24), nn.Linear(24, 12), does

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.does * self.down(torch.relu(self.up(x)))


def blocks() -> nn.Module:
    """Of its four blocks, the second and the third do little."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 12), *map(Block, (1.0, 0.003, 0.002, 1.0)), nn.Linear(12, 4)).eval()


def llama() -> nn.Module:
    import transformers as hf

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 4}
    more = {"num_key_value_heads": 2, "vocab_size": 32, "use_cache": False, "max_position_embeddings": 16}
    return hf.LlamaForCausalLM(hf.LlamaConfig(**sizes, **more)).eval()


def losses(n: int) -> dict[str, torch.Tensor]:
    """What the outputs lose without each block, on n queries."""
    model = blocks()
    traced = trace(model, ROW, silent)
    with together():
        calibration = gather(traced, Asked(ROW, normal(n, 6)), 0, silent)
        lost = ElementLosses(elements(calibration.captured, traced.model)[0].values())
        list(collect_readers(traced, calibration, Collect(), torch.Generator().manual_seed(0), silent, lost))
        return {name: torch.tensor(loss) for name, loss in lost.found().items()}


def same() -> dict[str, tuple[str, dict[str, torch.Tensor], list[tuple[str, float]]]]:
    """Plans, weights and comparisons. Batches: 3 of the mlp, 2 of "few", so that one of three processes has none."""
    half = Budget(macs=0.5)
    texts = torch.randint(32, (60, 8), generator=torch.Generator().manual_seed(1))
    words = {"input_ids": texts[:1]}, half, "auto"
    runs = {
        "mlp": prune(mlp(), ROW, half, queries=normal(200, 6), repair=Repair(descent=Descent(steps=10))),
        "few": prune(mlp(), ROW, Budget(keep=0.5), queries=normal(4, 6), **QUICK),
        "made": prune(mlp(), ROW, half, n_queries=64, repair=Repair(descent=False, ridge=0.01)),
        "folded": prune(mlp(), ROW, half, "folding", queries=normal(40, 6), repair=False, compare=False),
        "merged": prune(mlp(), ROW, half, Merging(), queries=normal(40, 6), **QUICK),
        "cnn": prune(cnn(), torch.zeros(1, 3, 9, 9), half, queries=normal(96, 3, 9, 9), **QUICK),
        "shallow": prune(blocks(), ROW, Budget(params=0.53), queries=normal(200, 6), depth=True, **QUICK),
        "llama": prune(llama(), *words, queries={"input_ids": texts}, tokenizer=False, **QUICK),
    }
    asked = {"queries": normal(400, 6), "delta": 0.1, **QUICK}
    runs["tested"] = prune(mlp(), ROW, Budget(agreement=0.8), **asked)
    found = {
        name: (r.plan.to_json(), dict(r.model.state_dict()), [(c.name, c.error) for c in r.report.compared])
        for name, r in runs.items()
    }
    plan = make_plan(mlp(), ROW, half, queries=normal(200, 6))
    small = apply_plan(mlp(), plan, queries=normal(200, 6), repair=QUICK["repair"])
    found |= {f"losses on {n}": ("", losses(n), []) for n in (200, 4)}
    return {**found, "two steps": (plan.to_json(), dict(small.state_dict()), [])}


def trouble() -> dict[str, tuple[str, str]]:
    """How calls end that fail in one process, or that differ between the two: the type of the error, and its text."""
    mine, x, half = dist.get_rank() == 1, normal(60, 6), Budget(macs=0.5)

    def stop(phase: str, done: int, total: int) -> None:
        if mine and phase == "repair":
            raise ValueError("no room on the disk\nand more")

    def bad(n: int, generator: torch.Generator) -> torch.Tensor:
        raise InputError("these samples are broken")

    calls = {
        "an error": lambda: prune(mlp(), ROW, half, queries=x, progress=stop, **QUICK),
        "models": lambda: prune(mlp(seed=int(mine)), ROW, half, queries=x),
        "kinds of models": lambda: prune(cnn() if mine else mlp(), ROW, half, queries=x),
        "arguments": lambda: prune(mlp(), ROW, Budget(macs=0.6) if mine else half, queries=x),
        "seeds": lambda: make_plan(mlp(), ROW, half, queries=x, seed=int(mine)),
        "everywhere": lambda: prune(mlp(), ROW, Budget(macs=1e-9), queries=x),
        "queries": lambda: prune(mlp(), ROW, half, queries=bad),
        "distill": lambda: prune(mlp(), ROW, half, queries=x, distill=3),
        "resume": lambda: prune(mlp(), ROW, half, queries=x, resume=None if mine else __file__),
        "a file": lambda: prune(mlp(), ROW, half, queries=x, resume=__file__),
        "nothing": lambda: prune(mlp(), ROW, half, queries=x, **QUICK),
    }
    ends = {name: _end(call) for name, call in calls.items()}
    total = torch.ones(())
    dist.all_reduce(total)  # the caller's own group has not suffered
    return {**ends, "afterwards": (str(int(total)), "")}


def killed() -> tuple[str, str]:
    """One process is killed in the middle."""

    def kill(phase: str, done: int, total: int) -> None:
        if phase == "statistics" and dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)

    return _end(lambda: prune(mlp(), ROW, Budget(macs=0.5), queries=normal(200, 6), progress=kill, **QUICK))


def asleep() -> tuple[str, str]:
    """One process falls asleep for longer than the timeout of the group."""

    def sleep(phase: str, done: int, total: int) -> None:
        if phase == "statistics" and done == 0 < total and dist.get_rank() == 1:
            time.sleep(22)

    return _end(lambda: prune(mlp(), ROW, Budget(macs=0.5), queries=normal(200, 6), progress=sleep, **QUICK))


def absent() -> tuple[str, str]:
    """One process does not call prune()."""
    return _end(lambda: dist.get_rank() or prune(mlp(), ROW, Budget(macs=0.5), queries=normal(200, 6), **QUICK))


CASES = {"same": same, "trouble": trouble, "killed": killed, "asleep": asleep, "absent": absent}
SHORT = ("asleep", "absent")


def _end(call) -> tuple[str, str]:
    try:
        call()
    except Exception as error:
        return type(error).__name__ + (" (ours)" if isinstance(error, CoreprunError) else ""), str(error)
    return "", ""


def _work(case: str, world: int, folder: Path, rank: int) -> None:
    torch.set_num_threads(1)
    wait = timedelta(seconds=10 if case in SHORT else 120)
    store = f"file://{folder / 'store'}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world, timeout=wait)
    dist.barrier()  # one that ends at once would be gone before the others have found it
    torch.save(CASES[case](), folder / f"{rank}.pt")


def main() -> None:
    case, world, folder = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
    children = []
    for rank in range(world):
        child = os.fork()
        if not child:
            code = 1
            try:
                _work(case, world, folder, rank)
                code = 0
            except BaseException:
                sys.excepthook(*sys.exc_info())
            finally:
                sys.stderr.flush()
                os._exit(code)
        children.append(child)
    for child in children:
        os.waitpid(child, 0)


if __name__ == "__main__":
    main()
