"""Which architectures can be pruned, how much of them, and how long it takes to find out; beside Torch-Pruning.

    python benchmarks/zoo.py                    # every architecture of the test zoo -> benchmarks/results/zoo.json
    python benchmarks/zoo.py --torchvision      # adds torchvision's and timm's classifiers, where they are installed
    python benchmarks/zoo.py --table            # docs/architectures.md from the JSON

For every model: groups, how many are free, why the others are locked, the share of multiply-accumulates that can go,
the time to trace and to group; then half of the units of every free group is removed and the result compared, in
float64, with the original in which consumers read zeros. Torch-Pruning is called as its README does (MagnitudePruner,
half of the channels, layers that make the output ignored, at most 30 s) on the same models in float32, and counts as ok
if the pruned model runs at two batch sizes, returns outputs of the same shapes and has fewer parameters.
"""

from __future__ import annotations

import argparse
import collections
import gc
import importlib.metadata
import json
import os
import platform
import re
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from coreprune.graph import CostModel, Traced, capture, find_groups, probe, remove

ROOT = Path(__file__).resolve().parents[1]
RESULT, PAGE = ROOT / "benchmarks/results/zoo.json", ROOT / "docs/architectures.md"
REAL = ("resnet-50", "vit-b-16")
TIMM = ("vit_tiny_patch16_224", "deit3_small_patch16_224", "mixer_s32_224", "resnetv2_50", "hrnet_w18_small")
sys.path.insert(0, str(ROOT / "tests"))

Inputs = dict[str, Tensor]


@contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    """Raise TimeoutError when the body takes longer."""

    def stop(*_: Any) -> None:
        raise TimeoutError(f"no result after {seconds} s")

    signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)


@contextmanager
def peak_memory() -> Iterator[list[int]]:
    """By how many bytes the resident memory grows at most inside the body, sampled every 2 ms (Linux)."""

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

    gc.collect()
    before, grown, done = resident(), [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.002):
            grown[0] = max(grown[0], resident() - before)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield grown
    finally:
        done.set()
        watcher.join()


def call(model: nn.Module, inputs: Inputs) -> list[Tensor]:
    """All floating-point outputs."""
    with torch.no_grad():
        result = model(inputs["x"]) if set(inputs) == {"x"} else model(**inputs)
    return [t for t in pytree.tree_leaves(result) if isinstance(t, Tensor) and t.is_floating_point()]


def first_line(error: BaseException) -> str:
    """The error as one short line."""
    lines = [x for x in str(error).splitlines() if x.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:160]


def ours(model: nn.Module, inputs: Callable[[int], Inputs]) -> dict[str, Any]:
    """What coreprune finds in one model, and whether half of it leaves without a trace."""
    from graph.oracle import assert_same, outputs, random_halves, zeroed_original

    example = inputs(2)
    captured = capture(model, (example["x"],)) if set(example) == {"x"} else capture(model, kwargs=example)
    start = time.perf_counter()
    groups = find_groups(captured)
    seconds = time.perf_counter() - start
    groups = probe(Traced(model, captured, groups)).groups
    costs = CostModel(captured, groups)
    reasons = collections.Counter(
        re.sub(r" \([a-z_0-9]+\)", "", g.locked_because).split(":")[0] for g in groups if g.locked_because
    )
    keep = random_halves(groups, torch.Generator().manual_seed(0))
    result = remove(Traced(model, captured, groups), keep)
    zeros = zeroed_original(model, groups, result.kept)
    equal = True
    try:
        for batch in (1, 3):
            assert_same(outputs(result.model, inputs(batch)), outputs(zeros, inputs(batch)))
    except AssertionError:
        equal = False
    return {
        "groups": len(groups),
        "free": sum(g.locked_because is None for g in groups),
        "free_share_macs": round(costs.free_share(), 4),
        "locked": dict(reasons),
        "trace_s": round(captured.seconds, 3),
        "groups_s": round(seconds, 3),
        "equal_to_zeroed": equal,
        "params_removed": round(1 - costs({n: len(k) for n, k in keep.items()}).params / costs().params, 4),
    }


def output_layers(model: nn.Module, inputs: Callable[[int], Inputs]) -> list[nn.Module]:
    """The layers that make the model's output; both tools have to leave those alone."""
    example = inputs(2)
    captured = capture(model, (example["x"],)) if set(example) == {"x"} else capture(model, kwargs=example)
    made = {
        s.param
        for g in find_groups(captured)
        if g.locked_because and ("model output" in g.locked_because or "looked up" in g.locked_because)
        for s in g.producers
    }
    modules = dict(model.named_modules(remove_duplicate=False))
    return [modules[alias.rpartition(".")[0]] for alias, name in captured.aliases.items() if name in made]


def torch_pruning(model: nn.Module, inputs: Callable[[int], Inputs]) -> dict[str, Any]:
    """Torch-Pruning out of the box on the same model."""
    try:
        import torch_pruning as tp
    except ImportError:
        return {"status": "not installed"}
    example = inputs(1)
    ignored = output_layers(model, inputs)
    want = [t.shape for t in call(model, inputs(3))]
    before = sum(p.numel() for p in model.parameters())
    try:
        with time_limit(30):
            pruner = tp.pruner.MagnitudePruner(
                model,
                example["x"] if set(example) == {"x"} else example,
                importance=tp.importance.MagnitudeImportance(),
                pruning_ratio=0.5,
                ignored_layers=ignored,
            )
            pruner.step()
    except Exception as error:
        return {"status": "error", "detail": first_line(error)}
    try:
        call(model, inputs(1))
        got = [t.shape for t in call(model, inputs(3))]
    except Exception as error:
        return {"status": "broken model", "detail": first_line(error)}
    after = sum(p.numel() for p in model.parameters())
    if got != want:
        return {
            "status": "wrong output",
            "detail": f"{[tuple(s) for s in want]} became {[tuple(s) for s in got]}"[:160],
        }
    if after == before:
        return {"status": "nothing removed"}
    return {"status": "ok", "params_removed": round(1 - after / before, 4)}


def single(tree: Inputs) -> Inputs:
    """The same inputs in float32."""
    return {k: v.float() if v.is_floating_point() else v for k, v in tree.items()}


def measure(name: str, build: Callable[[], nn.Module], inputs: Callable[[int], Inputs]) -> dict[str, Any]:
    """One row of the result."""
    from graph.zoo import randomise

    row: dict[str, Any] = {"architecture": name}
    torch.manual_seed(0)
    try:
        row["coreprune"] = ours(randomise(build()), inputs)
    except Exception as error:
        row["coreprune"] = {"error": first_line(error)}
    try:
        other = randomise(build()).float()
        for m in other.modules():
            config = getattr(m, "config", None)
            if getattr(config, "use_cache", None):
                config.use_cache = False
        row["torch_pruning"] = torch_pruning(other, lambda b: single(inputs(b)))
    except Exception as error:
        row["torch_pruning"] = {"status": "error", "detail": first_line(error)}
    return row


def real_size(name: str) -> dict[str, Any]:
    """Time and memory of tracing a full-size model; run in a process of its own, for the memory."""
    import transformers as hf

    build = {
        "resnet-50": lambda: hf.ResNetForImageClassification(hf.ResNetConfig(num_labels=1000)),
        "vit-b-16": lambda: hf.ViTForImageClassification(hf.ViTConfig(num_labels=1000)),
    }[name]
    model = build().eval()
    x = {"pixel_values": torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))}
    capture(nn.Linear(2, 2), torch.zeros(1, 2))  # what torch loads once does not count
    with peak_memory() as grown:
        captured = capture(model, kwargs=x)
        start = time.perf_counter()
        groups = find_groups(captured)
        seconds = time.perf_counter() - start
    total = 0

    def count(_m: nn.Module, _i: Any, out: Any) -> None:
        nonlocal total
        total += sum(t.numel() * t.element_size() for t in pytree.tree_leaves(out) if isinstance(t, Tensor))

    handles = [m.register_forward_hook(count) for m in model.modules() if not list(m.children())]
    call(model, x)
    for h in handles:
        h.remove()
    start = time.perf_counter()
    probe(Traced(model, captured, groups))
    return {
        "architecture": name,
        "groups": len(groups),
        "trace_s": round(captured.seconds, 2),
        "groups_s": round(seconds, 2),
        "probe_s": round(time.perf_counter() - start, 2),
        "peak_memory_mb": round(grown[0] / 2**20, 1),
        "activations_mb": round(total / 2**20, 1),
    }


def vision_models() -> Iterator[tuple[str, Callable[[], nn.Module], Callable[[int], Inputs]]]:
    """torchvision's and timm's classifiers, random weights, where the packages are installed."""

    def pictures(size: int) -> Callable[[int], Inputs]:
        return lambda b: {
            "x": torch.randn(b, 3, size, size, generator=torch.Generator().manual_seed(b), dtype=torch.float64)
        }

    try:
        import torchvision

        names = """
            alexnet vgg11_bn resnet18 resnet50 resnext50_32x4d wide_resnet50_2 densenet121 googlenet squeezenet1_1
            mobilenet_v2 mobilenet_v3_small shufflenet_v2_x1_0 mnasnet0_5 efficientnet_b0 regnet_y_400mf convnext_tiny
            vit_b_16 swin_t inception_v3
        """
        for name in names.split():
            more = {"aux_logits": False, "init_weights": False} if name in ("googlenet", "inception_v3") else {}
            size = 299 if name == "inception_v3" else 224 if name.startswith("vit") else 96
            yield f"torchvision {name}", lambda n=name, m=more: torchvision.models.get_model(n, **m), pictures(size)
    except ImportError:
        print("torchvision is not installed", file=sys.stderr)
    try:
        import timm

        for name in TIMM:
            yield f"timm {name}", lambda n=name: timm.create_model(n), pictures(224)
    except ImportError:
        print("timm is not installed", file=sys.stderr)


def environment() -> dict[str, Any]:
    """Versions and hardware."""
    cpu = platform.processor()
    if Path("/proc/cpuinfo").exists():
        found = re.search(r"model name\s*:\s*(.*)", Path("/proc/cpuinfo").read_text())
        cpu = found.group(1) if found else cpu
    versions = {}
    for package in ("torch", "transformers", "torch-pruning", "torchvision", "timm"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    return {
        "python": platform.python_version(),
        "versions": versions,
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "seed": 0,
    }


def table(data: dict[str, Any]) -> str:
    """The page, from the JSON alone."""
    env = data["environment"]
    rows = data["architectures"]
    tp = [r["torch_pruning"]["status"] == "ok" for r in rows]
    fine = [r["coreprune"].get("equal_to_zeroed", False) for r in rows]
    lines = [
        "# Architectures",
        "",
        "coreprune works on any architecture that torch.export can trace: convolutions, residual and dense",
        "connections, attention heads, gated units, experts.",
        "",
        f"This page tests whether coreprune cuts {len(rows)} architectures correctly. The networks are small and have",
        "random weights; they are built from their configurations. The test removes half of the units of every group",
        "that can shrink. The result must equal, in float64 and at two batch sizes, the original in which the removed",
        "channels are read as zero.",
        "",
        f"With coreprune, {sum(fine)} of {len(rows)} are equal. With Torch-Pruning "
        f"{env['versions'].get('torch-pruning') or '(not installed)'}, called as its README does,",
        f"{sum(tp)} of {len(rows)} run with the same output shapes and fewer parameters. Whether their outputs are",
        "right was not checked. Torch-Pruning also narrows channels inside LayerNorm, which coreprune does only when",
        "asked to.",
        "",
        "*Free MACs*: the share of multiply-accumulates that disappears when every free group shrinks to one unit. A",
        "group is *locked* when its channels cannot be removed, or when removing them breaks the model's own forward.",
        "",
        "| architecture | groups | free | free MACs | trace, group (s) | equal | locked because | Torch-Pruning |",
        "|---|---:|---:|---:|---:|---|---|---|",
    ]
    for r in rows:
        c, t = r["coreprune"], r["torch_pruning"]
        other = t["status"] + (f": `{t['detail']}`" if t.get("detail") else "")
        other = other.replace("|", "\\|").replace("\n", " ")
        if "error" in c:
            lines.append(f"| {r['architecture']} | – | – | – | – | – | {c['error']} | {other} |")
            continue
        why = "; ".join(f"{k} ({n})" for k, n in sorted(c["locked"].items()))
        lines.append(
            f"| {r['architecture']} | {c['groups']} | {c['free']} | {c['free_share_macs']:.0%} | "
            f"{c['trace_s'] + c['groups_s']:.2f} | {'yes' if c['equal_to_zeroed'] else '**no**'} | {why} | {other} |"
        )
    lines += [
        "",
        "## Full-size models",
        "",
        "These models have random weights and read one picture of 224 x 224. *Memory* is how much the peak of the",
        "resident memory grows while tracing and grouping; *activations* is the size of all layer outputs for one",
        "sample.",
        "",
        "| architecture | groups | trace (s) | group (s) | probe (s) | memory (MB) | activations (MB) |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    lines += [
        f"| {r['architecture']} | {r['groups']} | {r['trace_s']} | {r['groups_s']} | {r['probe_s']} | "
        f"{r['peak_memory_mb']} | {r['activations_mb']} |"
        for r in data["full_size"]
    ]
    versions = ", ".join(f"{k} {v}" for k, v in env["versions"].items() if v)
    lines += [
        "",
        f"Measured with Python {env['python']}, {versions} on {env['cpu']}, {env['cores']} cores. The page is made by",
        "`benchmarks/zoo.py --table` from `benchmarks/results/zoo.json`.",
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    """Run, or make the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true", help="only write docs/architectures.md from the JSON")
    parser.add_argument("--torchvision", action="store_true", help="add torchvision's and timm's models")
    parser.add_argument("--full-size", action="store_true", help="only measure the full-size models again")
    parser.add_argument("--only", nargs="*", help="names of architectures")
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--real", choices=REAL, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.real:
        print(json.dumps(real_size(options.real)))
        return
    if not options.table:
        from graph.zoo import ZOO

        models = [(e.name, e.build, e.inputs) for e in ZOO.values()]
        models += list(vision_models()) if options.torchvision else []
        rows = json.loads(options.out.read_text())["architectures"] if options.full_size else []
        for name, build, inputs in models:
            if options.full_size or (options.only and name not in options.only):
                continue
            rows.append(measure(name, build, inputs))
            print(json.dumps(rows[-1]), flush=True)
        full = []
        for name in () if options.only else REAL:
            done = subprocess.run(
                [sys.executable, __file__, "--real", name], capture_output=True, text=True, check=True
            )
            full.append(json.loads(done.stdout.splitlines()[-1]))
            print(json.dumps(full[-1]), flush=True)
        data = {"environment": environment(), "architectures": rows, "full_size": full}
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n")
    PAGE.parent.mkdir(exist_ok=True)
    if options.table or options.out == RESULT:
        PAGE.write_text(table(json.loads(options.out.read_text())))


if __name__ == "__main__":
    main()
