"""The sections on growth and on a decoder of 7 billion of docs/benchmarks.md."""

from __future__ import annotations

from typing import Any

from page_parts import missing, ran_on, table, threads

SHAPES = {"llama": "Llama", "vit": "ViT", "resnet": "ResNet"}
PHASES = ("statistics", "select", "repair")
# width, MLP units, heads' width of keys and values, blocks, vocabulary
MODELS = {
    "7 B": (4096, 11_008, 4096, 32, 32_000),
    "70 B": (8192, 28_672, 1024, 80, 128_256),
    "405 B": (16_384, 53_248, 1024, 126, 128_256),
}
ROWS = 32 * 128  # of all queries


def scale(record: dict[str, Any]) -> str:
    rows = [row for row in record["rows"] if "cpu_by_phase" in row]
    lines = []
    for row in rows:
        spent = row["cpu_by_phase"]
        size = [f"{row[axis]:,}" for axis in ("layers", "hidden", "queries", "tokens")]
        lines.append(
            [
                SHAPES[row["shape"]],
                *size,
                row["memory"] or "default",
                f"{row['model_mib']:.0f}",
                *(f"{spent.get(phase, 0):.1f}" for phase in PHASES),
                f"{row['cpu_s']:.0f}",
                f"{row['peak_memory_mib']:,}",
                f"{row['peak_own_mib']:,}" if "peak_own_mib" in row else "–",
            ]
        )
    head = ["shape", "layers", "width", "queries", "tokens", "memory=", "weights (MiB)", "statistics (s)", "select (s)"]
    return f"""## How time and memory grow

Random weights in float32, 75 % of the multiply-accumulates kept, without block descent and without the comparison at the end. Queries are those that decide; as many again are held back. Of a ResNet, *tokens* are the positions of
its first feature map, and *width* is that of its last stage. Seconds are those of the processor. The peak is that of the process's resident memory, above what it held when the model was made; *own* is the part that no file
backs, looked at 20 times a second. With a limit, glibc gives freed memory back at once (as with `MALLOC_TRIM_THRESHOLD_` and `MALLOC_MMAP_THRESHOLD_` of 128 KiB): that takes time, and the growth is not that of its pools.

{table([*head, "repair (s)", "all (s)", "peak (MiB)", "own (MiB)"], lines)}
{missing(len(record["rows"]) - len(rows), "rows")}
Measured with {threads(rows[0]["threads"])} on {ran_on(record["environment"])}

{cost_model()}
"""


def cost_model() -> str:
    """What a block of a decoder costs, from its widths alone."""
    lines = []
    for name, (d, m, kv, blocks, vocabulary) in MODELS.items():
        weights = 2 * d * d + 2 * d * kv + 3 * d * m
        kept = 3 * m // 4
        run = 2 * weights * ROWS
        lines.append(
            [
                name,
                f"{weights * blocks / 1e9 + 2 * d * vocabulary / 1e9:.0f}",
                _gib(2 * weights),
                _gib(4 * d * ROWS),
                _gib(8 * m * m),
                _tera(4 * run + 2 * ROWS * (m * m + d * d)),
                _tera(m**3),
                _tera(2 * run + 2 * ROWS * (kept**2 + 5 * d * d)),
                _tera(10 * (kept**3 + 6 * d**3)),
            ]
        )
    head = ["parameters (10⁹)", "weights, bfloat16", "between blocks", "moments of the MLP"]
    more = ["statistics", "search, MLP", "repair: runs and moments", "repair: solutions"]
    return f"""### What a block of a large decoder costs

From the widths alone, for {ROWS:,} tokens in all and three quarters of the MLP units kept. *Between blocks* is what one model computes for all tokens, in float32; the repair keeps it for two. *Moments* are one float64 matrix; a search or a
solution holds about five. Operations are multiplications and additions, in 10¹², per block. *Statistics*: a run forward, again, and backward, and the moments. *Search*: the cube of the units, which leaves out a factor that depends on the
selector. *Solutions*: about 10 n³ for the eigendecomposition of the moments of each of seven maps.

{table(["model", *head, *more], lines)}
"""


def seven_billion(record: dict[str, Any]) -> str:
    runs, spent = record["runs"], record["seconds_by_phase"]
    lines = []
    for i, run in enumerate(runs):
        end = run.get("note") or ("killed on purpose" if run["status"] else "finished")
        lines.append(
            [str(i + 1), end, f"{run['seconds'] / 60:.0f}", f"{run['anonymous_gib']:.1f}", f"{run['resident_gib']:.1f}"]
        )
    wide = ", ".join(f"{n:,}" for n in dict.fromkeys(record["widths"].values()))
    told = ", ".join(f"{name} {seconds / 60:.0f}" for name, seconds in spent.items() if seconds >= 30)
    head = ["run", "end", "minutes", "peak not backed by files (GiB)", "peak resident in all (GiB)"]
    return f"""## A decoder of 7 billion's shape

`coreprune prune` on a folder of Hugging Face with random weights in bfloat16: width 4,096, 11,008 units, 32 heads, {record["layers"]} of {record["layers_of_the_whole"]} blocks ({record["weights_gib"]:.1f} GiB).
Three quarters of the MLP units of each block stay ({wide} units), 32 sequences of 128 tokens, `--memory 4GiB`. The first run was killed with signal 9, and the next went on with `--resume`.

{table(head, lines)}

Minutes by phase, where there are any: {told}. What is backed by files is weights that the system may drop and read again. Blocks follow each other, so {record["layers_of_the_whole"]} of them take {record["layers_of_the_whole"] // record["layers"]} times as
long; what lies between blocks, and the matrices of one layer, stay as they are. The machine had other work to do meanwhile, so the minutes are upper ends. {" ".join(record.get("remarks", ()))}

Measured with {record["threads"]} threads on {ran_on(record["environment"])}
"""


def _gib(n: float) -> str:
    return f"{n / 2**30:.2f} GiB"


def _tera(n: float) -> str:
    return f"{n / 1e12:.1f}"
