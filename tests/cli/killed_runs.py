"""Kill `coreprune prune` in every phase, again and again, and write down what is left. test_interruptions.py runs it.

    python killed_runs.py FOLDER KILLS SEED  ->  one JSON object on standard output

A run is a child of one process that has torch imported and everything warm, so that a run takes a fraction of a second.
It dies by a signal that it cannot answer: SIGPROF after a random time on the processor, as the kernel counts it and
whatever else the machine does, or SIGKILL at a random step among those that change the file system (they are few, and
time alone would seldom hit between them).
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import random
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from typer.testing import CliRunner

import coreprune
from coreprune._telling import Told
from coreprune.cli.commands import app

OPTIONS = ("--weights", "net.safetensors", "--queries", "white-noise", "--keep", "0.5", "--no-latency")
DISTILL = ("--distill", "60")
CHANGES = ("os.rename", "os.mkdir", "os.rmdir", "os.remove", "os.chmod", "tempfile.mkstemp", "tempfile.mkdtemp")
PHASES = mmap.mmap(-1, 32)  # shared with the children: the phase that a run is in


def say(phase: str) -> None:
    PHASES[:] = phase.encode()[:32].ljust(32)


@contextmanager
def told(*_: Any) -> Iterator[Told]:
    """In the place of the progress bars: where a run is."""
    yield Told(lambda phase, done, total: say(phase))


def saying(phase: str, function: Any) -> Any:
    def call(*args: Any, **kwargs: Any) -> Any:
        say(phase)
        return function(*args, **kwargs)

    return call


def changes_a_file(event: str, args: tuple[Any, ...]) -> bool:
    writes = event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
    return bool(writes) or event in CHANGES


def child(out: Path, *more: str, die_at: int | None = None, die_after: float = 0.0) -> int:
    """Start a run. die_at: kill it before that change of a file. die_after: kill it after so many seconds of processor
    time. The number of its changes is written to last.txt."""
    pid = os.fork()
    if pid:
        return pid
    count = 0

    def watch(event: str, args: tuple[Any, ...]) -> None:
        nonlocal count
        if changes_a_file(event, args):
            if count == die_at:
                os.kill(os.getpid(), signal.SIGKILL)
            count += 1

    sys.addaudithook(watch)
    signal.setitimer(signal.ITIMER_PROF, die_after)  # 0: never. What SIGPROF does by default is to end the process
    code = 70
    try:
        say("start")
        call = ["prune", "net_for_cli:net", "--shape", "1,8", *OPTIONS, "--out", str(out), *more]
        result = CliRunner().invoke(app, call)
        code = result.exit_code
        text = f"{count}\n{code}\n{result.output}\n{result.exception!r}"
        Path("last.txt").write_text(text)
    finally:
        os._exit(code)


def ended(pid: int) -> tuple[int | None, float]:
    """The exit code of a child, None if it was killed, and its processor time."""
    _, status, used = os.wait4(pid, 0)
    killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) in (signal.SIGKILL, signal.SIGPROF)
    return None if killed else os.waitstatus_to_exitcode(status), used.ru_utime + used.ru_stime


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def state(out: Path) -> dict[str, Any]:
    """What lies at OUT: nothing, or an artifact that loads; anything else is an error."""
    import net_for_cli

    if not os.path.lexists(out):
        return {"out": "absent"}
    try:
        coreprune.load(out, net_for_cli.net)
        json.loads((out / "report.json").read_text())
        assert "</html>" in (out / "report.html").read_text()
    except Exception as error:  # written down for the test, which says what is allowed
        return {"out": f"broken: {error!r}"}
    return {"out": "whole", "weights": digest(out / "model.safetensors"), "plan": digest(out / "plan.json")}


def trial(out: Path, dice: random.Random, seconds: float, steps: int) -> dict[str, Any]:
    """Kill a run, kill the one that resumes it, let the next one finish."""
    kills = []
    for attempt in range(2):
        by_time = dice.random() < 0.5
        more = (*DISTILL, *(("--resume",) if attempt else ()))
        when = {"die_after": dice.uniform(0.001, seconds)} if by_time else {"die_at": dice.randrange(steps)}
        code, _ = ended(child(out, *more, **when))
        phase = PHASES[:].decode().strip()
        kills.append({"by": "time" if by_time else "step", "hit": code is None, "phase": phase, **state(out)})
        if kills[-1]["out"] != "absent":
            break
    code, _ = ended(child(out, *DISTILL, "--resume"))
    left = sorted(p.name for p in out.parent.iterdir())
    return {"kills": kills, "code": code, "said": Path("last.txt").read_text(), "left": left, "end": state(out)}


def main(folder: Path, wanted: int, seed: int) -> dict[str, Any]:
    os.chdir(folder)
    sys.path.insert(0, str(folder))
    torch.set_num_threads(1)
    sys.modules["coreprune.cli.prune"].telling = told
    # Children inherit what is imported and compiled. No distillation here: the threads of autograd cannot be forked.
    warm = CliRunner().invoke(app, ["prune", "net_for_cli:net", "--shape", "1,8", *OPTIONS, "--out", "warm"])
    assert warm.exit_code == 0, warm.output
    save, done = sys.modules["coreprune.artifact"].save, sys.modules["coreprune.cli.prune"].Unfinished.done
    sys.modules["coreprune.artifact"].save = saying("save", save)
    sys.modules["coreprune.cli.prune"].Unfinished.done = saying("tidy", done)
    code, seconds = ended(child(folder / "reference" / "small", *DISTILL))
    said = Path("last.txt").read_text()
    assert code == 0, said
    steps = int(said.partition("\n")[0])
    trials: list[dict[str, Any]] = []
    while sum(kill["hit"] for t in trials for kill in t["kills"]) < wanted:
        dice = random.Random(f"{seed} {len(trials)}")  # what a trial does depends on no other one's speed
        trials.append(trial(folder / f"trial{len(trials)}" / "small", dice, seconds, steps))
    return {"reference": state(folder / "reference" / "small"), "seconds": seconds, "steps": steps, "trials": trials}


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))))
