"""What a release has to pass: python .ci/try_wheel.py build/dist, with one wheel and one source distribution in there.

The wheel holds one package and nothing beside it, works in an empty environment with its four dependencies alone, and
runs the demo there with the extra that the demo needs.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = {"echarts.common.min.js", "page.css", "page.html.j2", "page.js"}


def main(dist: Path) -> None:
    """Ends with an error where something is missing."""
    (wheel,), (_,) = dist.glob("*.whl"), dist.glob("*.tar.gz")
    check_contents(wheel)
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        venv.create(place / "env", with_pip=True)
        programs = place / "env" / "bin"
        # torch by name first: with the pin satisfied, no other package pulls a different build.
        for package in ("torch", str(wheel)):
            install(programs, package)
        run([programs / "python", "-c", "import coreprune; from coreprune import *; print(coreprune.__name__)"], place)
        refused = subprocess.run([programs / "coreprune"], cwd=place, capture_output=True, text=True, check=False)
        assert refused.returncode == 2, refused
        assert "pip install 'coreprune[cli]'" in refused.stderr, refused
        install(programs, f"{wheel}[demo]")
        for command in ([programs / "coreprune", "--help"], [programs / "python", "-m", "coreprune", "demo"]):
            run(command, place)
        assert (place / "demo-report" / "report.json").exists()


def check_contents(wheel: Path) -> None:
    """One top-level package, the files of the report's page, and the mark of a typed package."""
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"coreprune"}, tops
    assert len(tops) == 2, tops
    wanted = {"coreprune/py.typed"} | {f"coreprune/report/assets/{name}" for name in PAGE}
    assert wanted <= set(names), wanted - set(names)


def install(programs: Path, package: str) -> None:
    """With the versions that CI uses."""
    options = ("--quiet", "--disable-pip-version-check", "-c", str(ROOT / "constraints.txt"))
    run([programs / "python", "-m", "pip", "install", *options, package], ROOT)


def run(command: list[str | Path], place: Path) -> None:
    """In a folder that is not the source tree's, so that the wheel is what is tried."""
    print("$", *(Path(command[0]).name, *command[1:]), flush=True)
    subprocess.run(command, cwd=place, check=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
