"""Plant every fault in a copy of the tree, run the tests that must notice it, and write down which did.

    PYTHONPATH=tests:benchmarks python -m mutants.run [--only NAME …] [--new] [--jobs 2]

The copies lie in a temporary folder; the tree is never changed. The tests that noticed a fault are run without any in
the end: a test that fails anyway kills nothing. Every run is a fork of this process, which has torch and the rest
imported, and nothing of coreprune. With --only or --new, the other entries of results.json stay as they are.
"""

from __future__ import annotations

import argparse
import fnmatch
import itertools
import json
import os
import re
import resource
import shutil
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import hypothesis
import jaxtyping
import pytest
import scipy.optimize
import scipy.stats
import torch
import transformers

from environment import environment
from mutants import MUTANTS, Mutant
from mutants.mutant import PACKAGE, ROOT

RESULTS = Path(__file__).with_name("results.json")
COPIED = ("src", "tests", "pyproject.toml", "README.md")
LONGEST = 600  # seconds of processor time: a fault may make a loop endless
_IMPORTED = (hypothesis, jaxtyping, scipy.optimize, scipy.stats, torch, transformers)  # the children have these then
_FAILED = re.compile(r"^(?:FAILED|ERROR) tests/(.+?)(?: - .*)?$", re.MULTILINE)
_TIMES = itertools.count(1_000_000_000)  # of the files that change, so that no compiled file passes for another's


def main(only: list[str], new: bool, jobs: int) -> int:
    """Run them, write results.json, and return how many survived without an explanation or no longer apply."""
    chosen = [m for m in MUTANTS if not only or any(fnmatch.fnmatchcase(m.name, pattern) for pattern in only)]
    if new:
        done = {e["name"] for e in recorded() if e["outcome"] in ("killed", "equivalent")}
        chosen = [m for m in chosen if m.name not in done]
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        sound = copy_to(Path(folder) / "sound")  # what is done to the tree meanwhile does not matter
        places = [Path(shutil.copytree(sound, Path(folder) / str(i))) for i in range(jobs)]
        entries: dict[str, dict[str, Any]] = {}
        running: dict[int, tuple[Mutant, Path]] = {}
        waiting = list(chosen)
        while waiting or running:
            if waiting and places:
                mutant, place = waiting.pop(0), places.pop()
                try:
                    put(place / PACKAGE / mutant.file, mutant.applied(sound))
                except (ValueError, OSError) as error:
                    entries[mutant.name] = entry(mutant, "no longer applies", str(error))
                    places.append(place)
                    continue
                running[start(place, list(mutant.tests), "-x")] = mutant, place
                continue
            pid, code = finished()
            mutant, place = running.pop(pid)
            entries[mutant.name] = entry(mutant, *outcome(code, log_of(place), mutant))
            put(place / PACKAGE / mutant.file, (sound / PACKAGE / mutant.file).read_text(encoding="utf-8"))
            places.append(place)
            write(list(entries.values()))
        for name in void(places[0], entries):
            entries[name] |= {"outcome": "broken", "by": f"{entries[name]['by']} fails without any fault"}
        write(list(entries.values()))
    print(summary(list(entries.values())))
    return sum(e["outcome"] not in ("killed", "equivalent") for e in entries.values())


def void(place: Path, entries: dict[str, dict[str, Any]]) -> list[str]:
    """The mutants that were killed by a test that fails on the sound library too."""
    by = {name: e["by"] for name, e in entries.items() if e["outcome"] == "killed" and "::" in e["by"]}
    if not by or finished(start(place, sorted(set(by.values())), "--maxfail=1000"))[1] == 0:
        return []
    failed = set(re.findall(_FAILED, log_of(place)))
    return [name for name, test in by.items() if test in failed or not failed]


def copy_to(place: Path) -> Path:
    """A copy of what the tests need."""
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, place / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, place / name)
    return place


def put(path: Path, text: str) -> None:
    """Write a file of a copy."""
    path.write_text(text, encoding="utf-8")
    os.utime(path, (stamp := next(_TIMES), stamp))


def start(place: Path, tests: list[str], stop: str) -> int:
    """pytest in a copy, on its own source: the id of the process. What it says lies in log.txt."""
    if pid := os.fork():
        return pid
    code: int = 70
    try:
        resource.setrlimit(resource.RLIMIT_CPU, (LONGEST, LONGEST + 10))
        os.chdir(place)
        os.environ |= {"PYTHONPATH": str(place / "src"), "OMP_NUM_THREADS": "1"}
        log = os.open("log.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1)
        os.dup2(log, 2)
        call = ["-q", "-rfE", "--tb=line", "--no-showlocals", "--show-capture=no", "-p", "no:cacheprovider", stop]
        ours = [os.path.realpath(ROOT / name) for name in ("", "src", "tests", "benchmarks")]
        sys.path[:] = [p for p in sys.path if os.path.realpath(p) not in ours]
        code = int(pytest.main([*call, *(f"tests/{test}" for test in tests)]))
    finally:
        sys.stdout.flush()
        os._exit(code)


def finished(pid: int = -1) -> tuple[int, int]:
    """Wait for a process: its id and its exit code, or minus the signal that ended it."""
    pid, status = os.waitpid(pid, 0)
    return pid, os.waitstatus_to_exitcode(status)


def log_of(place: Path) -> str:
    """What pytest said."""
    return (place / "log.txt").read_text(encoding="utf-8", errors="replace")


def outcome(code: int, log: str, mutant: Mutant) -> tuple[str, str]:
    """What became of a planted fault, and which test noticed it."""
    if code == 0:
        return ("equivalent", mutant.equivalent) if mutant.equivalent else ("survived", "")
    failed = re.findall(_FAILED, log)
    if code == 1 and failed:
        return "killed", failed[0]
    if code in (-signal.SIGXCPU, -signal.SIGKILL):
        return "killed", f"no test ended within {LONGEST} seconds of processor time"
    return "broken", log[-600:]  # not even imported: a fault of the mutant


def entry(mutant: Mutant, outcome: str, by: str) -> dict[str, Any]:
    """What results.json says of a mutant."""
    print(f"{outcome:10} {mutant.name:45} {by}", flush=True)
    return {"name": mutant.name, "file": mutant.file, "fault": mutant.fault, "outcome": outcome, "by": by}


def recorded() -> list[dict[str, Any]]:
    """What results.json says."""
    return json.loads(RESULTS.read_text(encoding="utf-8"))["mutants"] if RESULTS.exists() else []


def write(entries: list[dict[str, Any]]) -> None:
    """results.json, in the order of the list; mutants that are no longer in the list go."""
    before = {e["name"]: e for e in recorded()}
    found = {**before, **{e["name"]: e for e in entries}}
    kept = [found[m.name] for m in MUTANTS if m.name in found]
    outcomes = sorted({e["outcome"] for e in kept})
    counts = {outcome: sum(e["outcome"] == outcome for e in kept) for outcome in outcomes}
    data = {"environment": environment("pytest", "hypothesis"), "counts": counts, "mutants": kept}
    RESULTS.write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def summary(entries: list[dict[str, Any]]) -> str:
    """One line, and one for each that was not killed."""
    killed = sum(e["outcome"] == "killed" for e in entries)
    rest = [f"{e['outcome']}: {e['name']} ({e['fault']})" for e in entries if e["outcome"] != "killed"]
    return "\n".join([f"{killed} of {len(entries)} killed", *rest])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=[], help="names, or patterns of them")
    parser.add_argument("--new", action="store_true", help="only those that no run has killed yet")
    parser.add_argument("--jobs", type=int, default=1, help="how many copies at once")
    asked = parser.parse_args()
    sys.exit(min(main(asked.only, asked.new, asked.jobs), 1))
