"""Löwner ellipsoids: `coreprune.geometry.mvee` against accbpg's Wolfe-Atwood (WATY) and cvxpy + Clarabel.

    python benchmarks/mvee.py [--data DIR] [--limit 120] [--rounds 3] [--threads 1] [--out benchmarks/results/mvee.json]

Every run is a process of its own: contenders take turns, none sees the other's memory, and one that takes more than
`--limit` seconds did not finish. A process imports, warms up on a small cloud, and then times the solution of one cloud
(best of several repeats where a repeat is short). Everybody's weights are certified in the parent by the same code, a
QR decomposition of the weighted points, and `gap` in the table is that number.

- coreprune: `mvee(points, tol=tol)`, including validation, rank decision and its own certificate.
- WATY: accbpg 0.2 has it as `D_opt_FW_away`. Run from the uniform start and from its Kumar-Yildirim start (timed with
  the start). It only stops when the away gap is small too; what counts here is its own clock at the first iterate with
  max ω/r − 1 ≤ tol, which is generous, because a caller cannot stop there (`to_its_stop` is the time that callers
  see). The table shows the faster start.
- cvxpy: the dual, max log det Σ u_i p_i p_iᵀ over the simplex, with Clarabel's tolerances set to tol; canonicalisation
  included, as every user pays it. The time counts even where its certified gap is larger than tol. (The primal, max
  log det A with ‖A p_i‖ ≤ 1, was slower wherever it finished: 33 s instead of 3.6 s at 5000x20, 1e-2.) Gaussian clouds
  only.

Threads are one by default: with more, the small shapes measure the thread pools and whatever else the machine does.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from environment import environment

ROOT = Path(__file__).resolve().parents[1]
SHAPES = [(256, 128), (512, 64), (1500, 32), (1600, 400), (5000, 20), (4096, 512)]
HEAVY = [(256, 128), (512, 64), (1500, 32), (5000, 20)]
TOLS = (1e-2, 1e-7)
CONTENDERS = ("coreprune", "waty-uniform", "waty-ky", "cvxpy")
SHORT = 1.0  # a repeat that takes less is repeated until this many seconds are spent
MEMORY_GIB = 12


def cloud(kind: str, n: int, r: int, seed: int, data: str | None) -> np.ndarray:
    """The points of one experiment: (n, r) float64."""
    rng = np.random.default_rng(seed)
    if kind == "gaussian":
        return rng.standard_normal((n, r))
    if kind == "student-t":  # three degrees of freedom: a few long rows and columns, as trained layers have
        return rng.standard_t(3, (n, r))
    from safetensors.numpy import load_file

    file, key = kind.split(":")
    assert data is not None
    weight = load_file(Path(data) / f"{file}.safetensors")[key].astype(np.float64)
    # Points are what one output channel multiplies: for a convolution one (input, position) pair per point.
    return np.ascontiguousarray(weight.reshape(weight.shape[0], -1).T)


def layers(data: str | None) -> list[tuple[str, int, int]]:
    """Trained layers with more points than dimensions."""
    if data is None:
        return []
    names = (
        "lenet300_mnist:2.weight",
        "resnet56_cifar10_jpeg:layer2.3.conv1.weight",
        "resnet56_cifar10_jpeg:layer3.4.conv1.weight",
    )
    return [(name, *cloud(name, 0, 0, 0, data).shape) for name in names]


def certified_gap(points: np.ndarray, weights: np.ndarray) -> float:
    """max ω / r − 1 on all points, the same for everyone."""
    from scipy.linalg import solve_triangular

    weights = np.clip(weights, 0, None)
    triangle = np.linalg.qr(np.sqrt(weights / weights.sum())[:, None] * points, mode="r")
    omega = (solve_triangular(triangle, points.T, trans=1) ** 2).sum(axis=0)
    return float(omega.max() / points.shape[1] - 1)


def run_coreprune(points: np.ndarray, tol: float) -> Callable[[], dict]:
    """Ours."""
    import torch

    from coreprune.geometry import mvee

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    tensor = torch.from_numpy(points)

    def run() -> dict:
        start = time.perf_counter()
        e = mvee(tensor, tol=tol)
        return {"seconds": time.perf_counter() - start, "iterations": e.iterations, "weights": e.weights.numpy()}

    return run


def run_waty(points: np.ndarray, tol: float, start: str) -> Callable[[], dict]:
    """accbpg, to the first iterate within the tolerance."""
    from accbpg import D_opt_FW_away, D_opt_KYinit

    columns = np.ascontiguousarray(points.T)

    def run() -> dict:
        np.random.seed(0)  # noqa: NPY002 - accbpg's start draws from the global state
        begin = time.perf_counter()
        x0 = D_opt_KYinit(columns) if start == "ky" else np.full(len(points), 1 / len(points))
        prepared = time.perf_counter() - begin
        x, _, gaps, _, clock = D_opt_FW_away(columns, x0, tol, 400_000, verbose=False)
        first = int(np.argmax(gaps <= tol)) if (gaps <= tol).any() else len(gaps) - 1
        whole = time.perf_counter() - begin
        return {"seconds": prepared + float(clock[first]), "to_its_stop": whole, "iterations": first, "weights": x}

    return run


def run_cvxpy(points: np.ndarray, tol: float) -> Callable[[], dict]:
    """Clarabel through cvxpy."""
    import cvxpy as cp

    n, r = points.shape

    def run() -> dict:
        start = time.perf_counter()
        u = cp.Variable(n, nonneg=True)
        outer = np.einsum("ni,nj->ijn", points, points).reshape(r * r, n)
        moment = cp.reshape(outer @ u, (r, r), order="C")
        problem = cp.Problem(cp.Maximize(cp.log_det(moment)), [cp.sum(u) == 1])
        problem.solve(solver=cp.CLARABEL, tol_gap_abs=tol, tol_gap_rel=tol, tol_feas=tol)
        seconds = time.perf_counter() - start
        return {"seconds": seconds, "iterations": problem.solver_stats.num_iters, "weights": u.value}

    return run


def contender(name: str, points: np.ndarray, tol: float) -> Callable[[], dict]:
    """The timed function of a contender, with its imports done."""
    if name == "coreprune":
        return run_coreprune(points, tol)
    if name == "cvxpy":
        return run_cvxpy(points, tol)
    return run_waty(points, tol, name.removeprefix("waty-"))


def child(task: dict) -> None:
    """One run in this process; the result goes to files next to the task."""
    limit = MEMORY_GIB << 30
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    points = cloud(task["kind"], task["n"], task["r"], task["seed"], task["data"])
    contender(task["contender"], np.random.default_rng(1).standard_normal((40, 4)), 1e-2)()
    run = contender(task["contender"], points, task["tol"])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    result = run()
    peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    times, spent = [result["seconds"]], result["seconds"]
    while spent < SHORT and len(times) < 50:
        times.append(run()["seconds"])
        spent += times[-1]
    np.save(task["out"] + ".npy", result.pop("weights"))
    Path(task["out"]).write_text(json.dumps({**result, "seconds": min(times), "repeats": len(times), "peak_mib": peak}))


def launch(task: dict, limit: float, threads: int) -> dict:
    """Run a child with a time limit; {"failed": why} where there is no result."""
    with tempfile.TemporaryDirectory() as folder:
        task = {**task, "out": str(Path(folder) / "result.json")}
        env = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
        env.update({f"{x}_NUM_THREADS": str(threads) for x in ("OMP", "OPENBLAS", "MKL")})
        command = [sys.executable, __file__, "--child", json.dumps(task)]
        try:
            done = subprocess.run(command, env=env, timeout=limit, capture_output=True, text=True, check=False)
        except subprocess.TimeoutExpired:
            return {"failed": f"did not finish in {limit:g} s"}
        if done.returncode:
            lines = done.stderr.strip().splitlines() or [f"exit {done.returncode}"]
            return {"failed": lines[-1][:200]}
        result = json.loads(Path(task["out"]).read_text())
        points = cloud(task["kind"], task["n"], task["r"], task["seed"], task["data"])
        return {**result, "gap": certified_gap(points, np.load(task["out"] + ".npy"))}


def experiment(base: dict, args: argparse.Namespace, hopeless: set) -> list[dict]:
    """All contenders on one cloud to one tolerance, taking turns."""
    names = CONTENDERS if base["kind"] == "gaussian" else CONTENDERS[:-1]
    rows = {name: {**base, "contender": name} for name in names}
    for turn in range(args.rounds):
        for name, row in rows.items():
            key = (name, base["kind"], base["n"], base["r"])
            if "failed" in row or (turn and row["seconds"] > 10):
                continue
            if key in hopeless:
                row["failed"] = "did not finish at the looser tolerance"
                continue
            task = {**base, "contender": name, "seed": args.seed, "data": args.data}
            result = launch(task, args.limit, args.threads)
            if "failed" in result:
                row.update(result)
                hopeless.add(key)
            elif "seconds" not in row or result["seconds"] < row["seconds"]:
                row.update(result)
            print(
                f"{base['kind']} {base['n']}x{base['r']} {base['tol']:g} {name}: {result}", file=sys.stderr, flush=True
            )
    return list(rows.values())


def best(rows: list[dict], solver: str) -> dict | None:
    """The fastest finished variant of a solver."""
    done = [row for row in rows if row["contender"].startswith(solver) and "failed" not in row]
    return min(done, key=lambda row: row["seconds"], default=None)


def summarise(rows: list[dict]) -> list[dict]:
    """Per cloud and tolerance: the best of every solver and the speed-ups."""
    keys = dict.fromkeys((row["kind"], row["n"], row["r"], row["tol"]) for row in rows)
    summary = []
    for key in keys:
        group = [row for row in rows if (row["kind"], row["n"], row["r"], row["tol"]) == key]
        found = {solver: best(group, solver) for solver in ("coreprune", "waty", "cvxpy")}
        ours = found["coreprune"]
        entry = dict(zip(("kind", "n", "r", "tol"), key, strict=True))
        for solver, row in found.items():
            entry[solver] = row
            tried = any(other["contender"].startswith(solver) for other in group)
            entry.setdefault("missing", {})[solver] = "did not finish" if tried else "not run"
            if solver != "coreprune" and row and ours:
                entry[f"times_faster_than_{solver}"] = row["seconds"] / ours["seconds"]
        summary.append(entry)
    return summary


def show(summary: list[dict]) -> None:
    """The table."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title="Löwner ellipsoid: best time (certified gap, iterations, peak memory)")
    for title in ("points", "tol", "coreprune", "WATY", "cvxpy + Clarabel", "× WATY", "× cvxpy"):
        table.add_column(title, justify="left" if title == "points" else "right")
    for entry in summary:
        cells = []
        for solver in ("coreprune", "waty", "cvxpy"):
            row = entry[solver]
            cells.append(
                f"{row['seconds'] * 1e3:.1f} ms ({row['gap']:.0e}, {row['iterations']}, {row['peak_mib']:.0f} MiB)"
                if row
                else entry["missing"][solver]
            )
        ratios = [entry.get(f"times_faster_than_{solver}") for solver in ("waty", "cvxpy")]
        table.add_row(
            f"{entry['kind'].split(':')[-1]} {entry['n']}x{entry['r']}",
            f"{entry['tol']:.0e}",
            *cells,
            *(f"{ratio:.1f}" if ratio else "-" for ratio in ratios),
        )
    Console(width=180).print(table)


def main() -> None:
    """Run everything, write one JSON, print one table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--child", type=json.loads, help=argparse.SUPPRESS)
    parser.add_argument("--data", help="folder with the trained layers; without it only random clouds")
    parser.add_argument("--limit", type=float, default=120, help="seconds per process")
    parser.add_argument("--rounds", type=int, default=3, help="turns per contender; the fastest counts")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", help="run shapes whose name, such as 512x64, contains this")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "mvee.json")
    args = parser.parse_args()
    if args.child:
        child(args.child)
        return
    clouds = [("gaussian", *s) for s in SHAPES] + [("student-t", *s) for s in HEAVY] + layers(args.data)
    rows, hopeless, begin = [], set(), time.time()
    for kind, n, r in clouds:
        if args.only and args.only not in f"{kind} {n}x{r}":
            continue
        for tol in TOLS:
            rows += experiment({"kind": kind, "n": n, "r": r, "tol": tol}, args, hopeless)
    summary = summarise(rows)
    report = {
        "benchmark": "mvee",
        "environment": environment("accbpg", "cvxpy", "clarabel"),
        "config": {key: getattr(args, key) for key in ("limit", "rounds", "threads", "seed", "only")},
        "layers": bool(args.data),
        "seconds": time.time() - begin,
        "rows": rows,
        "summary": summary,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(report, indent=1) + "\n")
    show(summary)


if __name__ == "__main__":
    main()
