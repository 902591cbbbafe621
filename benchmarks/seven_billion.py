"""A decoder of a 7 billion model's shape, pruned from its files, killed on the way and resumed: seconds and memory.

    pip install -e '.[bench]' transformers
    python benchmarks/seven_billion.py --folder DIR [--layers 4] [--kill-after 2] [--threads 2]

Writes a folder of Hugging Face with random weights in bfloat16 (width 4,096, 11,008 units, 32 heads, 32,000 tokens),
one file for each block. Then runs `coreprune prune` on it: three quarters of the MLP units of every block, 32 sequences
of 128 random tokens, `--memory 4GiB`. When so many blocks are refitted, the process is killed with signal 9, and the
same command goes on with `--resume`. The memory of the process is looked at twice a second: what is not backed by files
(the peak that counts, because the system may drop the rest), and all that is resident. DIR needs room for about twelve
times the weights; the folder of the model stays there, everything else is deleted. Writes seven_billion.json.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from environment import environment

HERE = Path(__file__).parent
WIDTH, UNITS, HEADS, VOCABULARY = 4096, 11_008, 32, 32_000
TEXTS, TOKENS, KEPT, MEMORY = 32, 128, 0.75, "4GiB"
LAYERS = 32  # of the whole model
REFITTED = "layer-*.safetensors"


def write_model(folder: Path, layers: int, small: int) -> None:
    """The model, shard by shard. small: divides all widths, to try the script."""
    width, units, vocabulary = WIDTH // small, UNITS // small, VOCABULARY // small
    folder.mkdir(parents=True)
    random = torch.Generator().manual_seed(0)
    where: dict[str, str] = {}

    def shard(name: str, shapes: dict[str, tuple[int, ...]]) -> None:
        made = {
            key: torch.ones(shape, dtype=torch.bfloat16)
            if len(shape) == 1
            else (torch.randn(shape, generator=random) / shape[1] ** 0.5).bfloat16()
            for key, shape in shapes.items()
        }
        save_file(made, folder / name, {"format": "pt"})
        where.update(dict.fromkeys(made, name))

    for at in range(layers):
        block = f"model.layers.{at}"
        heads = {f"{block}.self_attn.{n}_proj.weight": (width, width) for n in "qkvo"}
        mlp = {f"{block}.mlp.{n}_proj.weight": (units, width) for n in ("gate", "up")}
        norms = {f"{block}.{n}_layernorm.weight": (width,) for n in ("input", "post_attention")}
        shard(f"block-{at}.safetensors", {**heads, **mlp, f"{block}.mlp.down_proj.weight": (width, units), **norms})
    ends = {"model.embed_tokens.weight": (vocabulary, width), "lm_head.weight": (vocabulary, width)}
    shard("ends.safetensors", {**ends, "model.norm.weight": (width,)})
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": width,
        "intermediate_size": units,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS // small,
        "vocab_size": vocabulary,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config))
    index = {"metadata": {}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def watched(command: list[str], threads: int, log: Path, unfinished: Path, kill_after: int | None) -> dict[str, Any]:
    """Run a command, and look at its memory. kill_after: how many layers may be refitted before it is killed."""
    env = {**os.environ, "OMP_NUM_THREADS": str(threads), "TMPDIR": str(log.parent), "HF_HUB_OFFLINE": "1"}
    start, anonymous, resident = time.perf_counter(), 0, 0
    with log.open("w") as out:
        child = subprocess.Popen(command, env=env, stdout=out, stderr=out)
        while child.poll() is None:
            time.sleep(0.5)
            try:
                lines = Path(f"/proc/{child.pid}/status").read_text().splitlines()
            except OSError:
                break
            seen = {name: int(rest.split()[0]) for name, _, rest in (x.partition(":") for x in lines) if "kB" in rest}
            anonymous = max(anonymous, seen.get("RssAnon", 0) + seen.get("RssShmem", 0))
            resident = max(resident, seen.get("VmRSS", 0))
            if kill_after is not None and refits(unfinished) >= kill_after:
                child.send_signal(signal.SIGKILL)
                break
    return {
        "status": child.wait(),
        "seconds": round(time.perf_counter() - start, 1),
        "anonymous_gib": round(anonymous / 2**20, 2),
        "resident_gib": round(resident / 2**20, 2),
    }


def refits(unfinished: Path) -> int:
    return len(list(unfinished.glob(REFITTED))) if unfinished.is_dir() else 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="where the model and all temporary files lie")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--kill-after", type=int, default=2, help="layers that are refitted before the kill")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--small", type=int, default=1, help="divide all widths by this, to try the script")
    parser.add_argument("--out", type=Path, default=HERE / "results/seven_billion.json")
    options = parser.parse_args()
    base: Path = options.folder.resolve()
    source, out, files = base / f"model-{options.layers}-{options.small}", base / "small", base / "temporary"
    unfinished = out.with_name(f".{out.name}.unfinished")
    for old in (out, files, unfinished):
        shutil.rmtree(old, ignore_errors=True)
    files.mkdir(parents=True)
    if not source.exists():
        write_model(source, options.layers, options.small)
    ids = np.random.default_rng(0).integers(0, VOCABULARY // options.small, (TEXTS, TOKENS))
    np.savez(files / "ids.npz", input_ids=ids)
    command = [sys.executable, "-m", "coreprune", "prune", str(source), "--queries", str(files / "ids.npz")]
    command += ["--keep", f"*mlp*={KEPT}", "--memory", MEMORY, "--no-latency", "--out", str(out), "--json"]
    command += ["--log", str(files / "rows.jsonl"), "--shape", f"input_ids=1,{TOKENS}:int"]
    runs = [watched(command, options.threads, files / "first.log", unfinished, options.kill_after)]
    if runs[0]["status"]:
        runs.append(watched([*command, "--resume"], options.threads, files / "second.log", unfinished, None))
    if runs[-1]["status"]:
        sys.exit((files / "second.log").read_text()[-2000:])
    report = json.loads((out / "report.json").read_text())
    with safe_open(out / "model.safetensors", framework="pt") as file:
        widths = {n: file.get_slice(n).get_shape()[0] for n in sorted(file.keys()) if n.endswith("up_proj.weight")}
    record = {
        "benchmark": "seven_billion",
        "environment": environment("transformers"),
        "layers": options.layers,
        "layers_of_the_whole": LAYERS,
        "threads": options.threads,
        "weights_gib": round(sum(f.stat().st_size for f in source.glob("*.safetensors")) / 2**30, 2),
        "runs": runs,
        "seconds_by_phase": report["seconds"],  # of the run that ended
        "memory": report["memory"],
        "compared": report["compared"],
        "widths": widths,
        "artifact_gib": round((out / "model.safetensors").stat().st_size / 2**30, 2),
    }
    options.out.write_text(json.dumps(record, indent=1) + "\n")
    for path in (out, files, unfinished):
        shutil.rmtree(path, ignore_errors=True)


if __name__ == "__main__":
    main()
