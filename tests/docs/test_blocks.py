"""Every block of code in README.md and docs/ runs as it is printed, page by page, in a folder of its own.

A Python block whose first line names a file (`# mymodels.py`) is written to that file. The others run on their own. A
shell block runs in the same folder, in a shell that stops at the first error. A text block is what the block before it
prints; a line with nothing but … stands for any lines.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^```(\S*)\n(.*?)^```$", re.M | re.S)
FILE = re.compile(r"# (\w+\.py)\n")
# They make what the tests run in, or need several machines.
NOT_RUN = ("make ", "pip install ", "git clone ", "torchrun --nnodes=4 ")

BLOCKS = {str(page.relative_to(ROOT)): BLOCK.findall(page.read_text(encoding="utf-8")) for page in PAGES}
SLOW = [name for name, blocks in BLOCKS.items() if any(language == "sh" for language, _ in blocks)]


def commands(block: str) -> str:
    """A shell block without the lines that are not run."""
    return "\n".join(line for line in block.splitlines() if not line.startswith(NOT_RUN))


def run(page: str, folder: Path) -> None:
    """All blocks of a page, in their order."""
    printed = ""
    for number, (language, code) in enumerate(BLOCKS[page]):
        name = f"block {number} of {page}"
        if language == "text":
            assert shows(code, printed), f"{name} is not what is printed:\n{printed}"
        elif language == "python" and (file := FILE.match(code)):
            (folder / file[1]).write_text(code, encoding="utf-8")
        elif language == "python":
            with contextlib.redirect_stdout(io.StringIO()) as out:
                exec(compile(code, name, "exec"), {"__name__": "__main__"})
            printed = out.getvalue()
        elif text := commands(code).strip():
            printed = shell(text, name, folder)


def shows(text: str, printed: str) -> bool:
    """Whether the page shows what was printed, line by line, apart from the lines that … stands for."""
    lines = [r"(?:.*\n)*" if line == "…" else re.escape(line.rstrip()) + r" *\n" for line in text.splitlines()]
    return re.fullmatch("".join(lines), printed) is not None


def shell(text: str, name: str, folder: Path) -> str:
    """In bash, with this environment's programs and this checkout's package first. Returns what it printed."""
    env = {
        **os.environ,
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
        "PYTHONPATH": str(ROOT / "src"),
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
    }
    done = subprocess.run(["bash", "-euc", text], cwd=folder, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{name}\n{text}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.mark.parametrize(
    "page",
    [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name, blocks in BLOCKS.items() if blocks],
)
def test_every_block_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    known = set(sys.modules)
    try:
        with torch.random.fork_rng(devices=[]):
            run(page, tmp_path)
    finally:
        for name in set(sys.modules) - known:  # the pages' own modules, which share their names
            if Path(getattr(sys.modules[name], "__file__", None) or "/").is_relative_to(tmp_path):
                del sys.modules[name]


def test_every_block_says_what_it_is():
    for page, blocks in BLOCKS.items():
        fences = re.findall(r"^\s*(?:```|~~~)", (ROOT / page).read_text(encoding="utf-8"), re.M)
        assert {language for language, _ in blocks} <= {"python", "sh", "text"}, page
        assert len(fences) == 2 * len(blocks), page


def test_only_installing_and_several_machines_are_not_run():
    lines = [
        line for blocks in BLOCKS.values() for language, code in blocks if language == "sh" for line in code.split("\n")
    ]
    left_out = {line.split("#")[0].strip() for line in lines if line.startswith(NOT_RUN)}
    assert left_out == {
        "make demo",
        "make test",
        "pip install coreprune",
        "pip install 'coreprune[cli,report]'",
        "pip install '.[demo,onnx]'",
        "torchrun --nnodes=4 --nproc-per-node=8 --rdzv-backend=c10d --rdzv-endpoint=first:29500 --rdzv-id=1 "
        "-m coreprune prune mydecoder:net --macs 0.7 --timeout 7200 --out small",
    }


def test_what_is_shown_must_be_what_is_printed():
    assert shows("a\n…\nd\n", "a\nb\nc\nd\n")
    assert shows("a\n", "a  \n")
    assert not shows("a\nb\n", "a\nc\n")
    assert not shows("a\n", "a\nb\n")
    assert not shows("…\nb\n", "a\nab\n")


def test_output_stands_behind_the_block_that_prints_it():
    for page, blocks in BLOCKS.items():
        languages = [language for language, _ in blocks]
        for before, language in zip([None, *languages], languages, strict=False):
            assert language != "text" or before in ("python", "sh"), page
