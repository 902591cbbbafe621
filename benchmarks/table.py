"""A benchmark that is a table of rows: its command line, its journal, its file. One process per row."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from children import Journal, Row, answer, in_child
from coreprune import Result
from environment import environment, made_by

HERE = Path(__file__).parent
Jobs = Callable[[argparse.Namespace], Iterator[tuple[str, Row]]]  # a key and what the child gets, for every row


@dataclass(frozen=True)
class Cell:
    """One row. method: ours, a peer, or dense. source: of the queries. share: of what the budget counts. seed: of all
    chance in it, the split of the data too."""

    method: str
    source: str
    share: float
    seed: int

    @property
    def key(self) -> str:
        return "/".join((self.method, self.source or "-", f"{100 * self.share:g}", f"seed {self.seed}"))


def told(result: Result) -> Row:
    """What a row says of a run from its report."""
    report = result.report.as_dict()
    share = report["parameters"]["after"] / report["parameters"]["before"]
    return {"parameters": round(share, 4), **{name: report[name] for name in ("queries", "compared", "seconds")}}


def run(
    script: str,
    doc: str | None,
    jobs: Jobs,
    work: Callable[[Row], Row],
    *,
    packages: tuple[str, ...] = (),
    limit: float = 3600,
    seeds: int = 3,
    about: Row | None = None,
    paths: Mapping[str, str] | None = None,
) -> None:
    """Make the rows that are not there yet, and write results/NAME.json with all of them.

    Rows are there if the journal has them, or, where there is no journal, the file of results. Each says which version
    of coreprune, and which processor, has made it.

    script: the file of the benchmark, which is run again for every row. limit: seconds that a row may take. about: what
    else the file says. paths: further options that name files or folders, with their help; the children get them.
    """
    name = Path(script).stem
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder with the images")
    parser.add_argument("--seeds", type=int, default=seeds)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu", help="where the network lies, for example cuda")
    parser.add_argument("--only", default="", help="a regular expression for the keys of the rows")
    parser.add_argument("--limit", type=float, default=limit, help="seconds that a row may take")
    parser.add_argument("--fresh", action="store_true", help="forget the rows of an earlier run")
    parser.add_argument("--out", type=Path, default=HERE / f"results/{name}.json")
    for option, told in (paths or {}).items():
        parser.add_argument(f"--{option}", type=Path, help=told)
    parser.add_argument("--job", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.job:
        answer(work, options.job)
        return
    console, journal = Console(highlight=False, soft_wrap=True), Journal(Path(f"build/{name}.jsonl"))
    if options.fresh:
        journal.path.unlink(missing_ok=True)
    elif not journal.path.exists():
        for row in earlier(options.out):
            journal.add(row)
    maker = made_by(options.device)
    for key, job in jobs(options):
        done = journal.rows().get(key, {"error": "not run"})
        if "error" in done and re.search(options.only, key):
            given = {option: str(getattr(options, option)) for option in ("data", *(paths or {}))}
            asked = {**job, **given, "threads": options.threads, "device": options.device}
            with console.status(key):
                row = {
                    "key": key,
                    "threads": options.threads,
                    **maker,
                    **job,
                    **in_child(script, asked, options.limit, options.threads),
                }
            journal.add(row)
            console.print(json.dumps({k: v for k, v in row.items() if k not in ("compared", "seconds")}))
    record: dict[str, Any] = {
        "benchmark": name,
        "environment": environment(*packages),
        **(about or {}),
        "rows": list(journal.rows().values()),
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(record, indent=1) + "\n")


def earlier(results: Path) -> Iterator[Row]:
    """The rows of a file of results, with the version and the processor that made them."""
    record: Row = json.loads(results.read_text()) if results.exists() else {"rows": []}
    for row in record["rows"]:
        then = record["environment"]
        yield {"version": then["versions"]["coreprune"], "cpu": then["cpu"], **row}
