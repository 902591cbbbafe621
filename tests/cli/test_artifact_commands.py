"""coreprune certify, report, export and bench, on an artifact that coreprune prune wrote."""

from __future__ import annotations

import json
import re
import shutil
import sys

import numpy as np
import pytest
import torch
from cli_tools import everything, samples

import coreprune
from coreprune import Queries, save
from coreprune.artifact.manifest import read_manifest

COMMANDS = {
    "certify": ("--samples", "fresh.npz"),
    "report": (),
    "export": ("--to", "small.pt2"),
    "bench": ("--seconds", "0.05", "--batch", "1"),
}


@pytest.fixture
def small(place, prune):
    """An artifact of 400 samples, of which some were held back; 300 fresh samples beside it."""
    np.savez("many.npz", samples(400))
    np.savez("fresh.npz", samples(300, seed=9))
    done = prune("--queries", "many.npz", "--keep", "0.5", "--out", "small")
    assert done.exit_code == 0, done.stderr
    return place / "small"


def models():
    """The dense and the pruned model."""
    import net_for_cli

    return net_for_cli.net().eval(), coreprune.load("small", net_for_cli.net)


# --- certify -------------------------------------------------------------------------------------------------------


def test_certify_counts_agreement_on_fresh_samples(small, run):
    dense, pruned = models()
    x = torch.from_numpy(samples(300, seed=9))
    with torch.no_grad():
        differ = int((dense(x).argmax(1) != pruned(x).argmax(1)).sum())
    found = json.loads(run("certify", "small", "--samples", "fresh.npz", "--json").stdout)
    assert found["theorem"] == "T11"
    assert f"{differ} of 300 queries had one" in found["statement"]
    assert differ / 300 < found["bound"] < 1
    shown = run("certify", "small", "--samples", "fresh.npz").stdout
    said = re.match(r"the same answer for ≥ (\d+\.\d) % of such inputs, with confidence 99%", shown)
    assert 0 <= (1 - found["bound"]) - float(said[1]) / 100 < 0.001, "rounded down"
    looser = json.loads(run("certify", "small", "--samples", "fresh.npz", "--delta", "0.2", "--json").stdout)
    assert looser["bound"] < found["bound"]
    assert looser["delta"] == 0.2
    fewer = json.loads(run("certify", "small", "--samples", "fresh.npz", "--n", "50", "--json").stdout)
    assert "of 50 queries" in fewer["statement"]


def test_a_bound_that_says_nothing_is_called_vacuous(small, prune, run):
    """One sample proves next to nothing, and the sentence looked like any other."""
    prune("--queries", "many.npz", "--keep", "0.9", "--out", "good")
    shown = run("certify", "small", "--samples", "fresh.npz", "--n", "1").stdout
    assert "(vacuous: one answer for all would agree as often)" in shown
    assert "vacuous" not in run("certify", "good", "--samples", "fresh.npz").stdout


def test_certify_takes_other_inputs_of_a_source_than_pruning_saw(place, prune, run, monkeypatch):
    """Seeded like pruning, a source makes the very queries that pruning went by, and T11 would be wrong."""
    seen = []
    module = sys.modules["coreprune.pruning.reporting.certify"]
    real = module.agreement

    def spy(model, pruned, fresh, delta):
        seen.append(fresh.args[0])
        return real(model, pruned, fresh, delta)

    args = ("--queries", "white-noise", "--seed", "1", "--method", "l2", "--keep", "0.5", "--out", "small")
    assert prune(*args).exit_code == 0
    used = Queries.load(place / "small" / "queries.safetensors").args[0]
    monkeypatch.setattr(module, "agreement", spy)
    for seed in (("--seed", "0"), ("--seed", "1"), ("--seed", "1"), ()):
        assert run("certify", "small", "--samples", "white-noise", *seed).exit_code == 0
    assert not any(rows(x) & rows(used) for x in seen)
    assert not rows(seen[0]) & rows(seen[1])
    assert torch.equal(seen[1], seen[2]), "the same seed gives the same inputs"
    assert torch.equal(seen[0], seen[3])


def rows(x):
    return set(map(tuple, x.tolist()))


def test_the_artifacts_own_queries_certify_nothing(small, run):
    done = run("certify", "small", "--samples", "small/queries.safetensors")
    assert done.exit_code == 2
    assert "pruning has seen small/queries.safetensors" in done.stderr


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--samples", "absent.npz"), "--samples absent.npz: there is no such file"),
        (("--samples", "none"), "the agreement is measured on samples"),
        (("--samples", "wite-noise"), "Did you mean white-noise?"),
        (("--samples", "wide.npz"), "(N, 8) is needed"),
        (("--samples", "nan.npz"), "NaN or infinite numbers in row 0"),
        (("--samples", "fresh.npz", "--delta", "2"), "delta must lie between 0 and 1"),
        (("--samples", "fresh.npz", "--n", "0"), "Invalid value for '--n'"),
        ((), "Missing option '--samples'"),
    ],
)
def test_certify_refuses(small, run, options, said):
    np.savez("wide.npz", samples(20, width=9))
    np.savez("nan.npz", samples(20) * np.nan)
    done = run("certify", "small", *options)
    assert done.exit_code == 2
    assert said in done.stderr


# --- report --------------------------------------------------------------------------------------------------------


def test_report_prints_what_prune_printed(small, prune, run):
    shown = prune("--queries", "many.npz", "--keep", "0.5", "--out", "again").stdout
    again = run("report", "again").stdout
    assert "agreement the same answer" in again
    assert again.replace(" ", "") in shown.replace("artifact", "").replace(f"{small.parent}/again\n", "").replace(
        " ", ""
    )
    assert json.loads(run("report", "small", "--json").stdout) == json.loads((small / "report.json").read_text())


def test_report_makes_the_page_anew(small, run):
    before = everything(small)
    done = run("report", "small", "--html", "pages/page.html")
    assert done.exit_code == 0, done.stderr
    assert (small.parent / "pages" / "page.html").read_bytes() == before["report.html"]
    assert str(small.parent / "pages" / "page.html") in done.stdout
    assert everything(small) == before
    assert json.loads(run("report", "small", "--html", "page.html", "--json").stdout)["groups"]
    for html, said in (("small", "is not a file"), ("many.npz/page.html", "A file lies where")):
        refused = run("report", "small", "--html", html)
        assert refused.exit_code == 2
        assert said in refused.stderr


def test_a_report_that_is_none(small, run):
    """The hash says that it is what was written; not that it was coreprune who wrote it."""
    for content in ("[]", "{}", '{"macs": {"before": "many"}}'):
        (small / "report.json").write_text(content)
        reseal(small)
        for more in ((), ("--html", "page.html"), ("--json",)):
            done = run("report", "small", *more)
            assert done.exit_code == 2
            assert "small/report.json is not a report that coreprune wrote" in done.stderr
            assert not (small.parent / "page.html").exists()


def test_several_reports_are_compared(small, prune, run):
    prune("--queries", "many.npz", "--keep", "0.3", "--out", "smaller")
    done = run("report", "small", "smaller", "--html", "runs.html")
    assert done.exit_code == 0, done.stderr
    for text in ("2 runs", "small", "smaller", "same answers", "runs.html"):
        assert text in done.stdout
    assert "smaller" in (small.parent / "runs.html").read_text(encoding="utf-8")
    assert len(json.loads(run("report", "small", "smaller", "--json").stdout)) == 2
    missing = run("report", "small", "elsewhere")
    assert missing.exit_code == 2
    assert "elsewhere" in missing.stderr


def reseal(folder):
    """Make the manifest's hash of the report that of the file."""
    from coreprune.artifact.manifest import sha256

    manifest = json.loads((folder / "manifest.json").read_text())
    path = folder / "report.json"
    manifest["files"]["report.json"] = {"bytes": path.stat().st_size, "sha256": sha256(path)}
    (folder / "manifest.json").write_text(json.dumps(manifest))


# --- export --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_export_to_onnx(small, run):
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    done = run("export", "small", "--to", "deep/small.onnx", "--json")
    said = json.loads(done.stdout)
    assert said["path"] == str(small.parent / "deep" / "small.onnx")
    assert "any batch size" in said["summary"]
    x = samples(5)
    (found,) = runtime.InferenceSession(said["path"]).run(None, {"input": x})
    with torch.no_grad():
        assert np.allclose(found, models()[1](torch.from_numpy(x)).numpy(), atol=1e-5)


@pytest.mark.slow
def test_export_with_int8_weights(small, run):
    """With the artifact's own queries, with samples, and with made ones where the artifact holds none."""
    runtime = pytest.importorskip("onnxruntime")
    shown = run("export", "small", "--to", "small.onnx", "--int8").stdout.splitlines()
    assert shown[0].startswith("small.onnx: dynamic int8, any batch size, 0.0")
    assert shown[1].startswith("on 200 held-out queries (samples): the same answer for ")
    (found,) = runtime.InferenceSession("small.onnx").run(None, {"input": samples(5)})
    assert found.shape == (5, 3)
    given = ("--queries", "fresh.npz", "--mode", "static", "--tolerance", "0.5", "--json")
    said = json.loads(run("export", "small", "--to", "other.onnx", "--int8", *given).stdout)
    assert said["path"] == str(small.parent / "other.onnx")
    assert (said["mode"], said["calibrated"], said["held_out"]) == ("static", 150, 150)
    assert "static int8 (ranges from 150 queries)" in said["summary"]
    (small / "queries.safetensors").unlink()
    manifest = json.loads((small / "manifest.json").read_text())
    del manifest["files"]["queries.safetensors"]
    (small / "manifest.json").write_text(json.dumps(manifest))
    made = json.loads(run("export", "small", "--to", "made.onnx", "--int8", "--json").stdout)
    assert made["source"] not in ("", "samples")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--to", "small.pt2", "--int8"), "--int8 writes an ONNX file, so --to must end in .onnx, not 'small.pt2'"),
        (("--to", "small.onnx", "--mode", "static"), "--mode is for --int8. Add --int8."),
        (("--to", "a.pt2", "--queries", "fresh.npz", "--tolerance", "1"), "--queries and --tolerance are for --int8"),
        (("--to", "small.onnx", "--int8", "--queries", "none"), "int8 is measured on queries"),
        (("--to", "small.onnx", "--int8", "--queries", "absent.npz"), "--queries absent.npz: there is no such file"),
        (("--to", "small.onnx", "--int8", "--queries", "wite-noise"), "Did you mean white-noise?"),
        (
            ("--to", "small.onnx", "--int8", "--mode", "int4"),
            'mode must be "auto", "static" or "dynamic", not \'int4\'',
        ),
        (("--to", "small.onnx", "--int8", "--tolerance", "-1"), "tolerance must be a number of at least 0"),
    ],
)
def test_export_with_int8_weights_refuses(small, run, options, said):
    before = everything(small.parent)
    done = run("export", "small", *options)
    assert done.exit_code == 2
    assert said in done.stderr
    assert everything(small.parent) == before


@pytest.mark.slow
@pytest.mark.parametrize(("name", "said"), [("wide.npz", "(N, 8) is needed"), ("nan.npz", "NaN or infinite numbers")])
def test_export_with_int8_weights_refuses_samples(small, run, name, said):
    np.savez("wide.npz", samples(20, width=9))
    np.savez("nan.npz", samples(20) * np.nan)
    before = everything(small.parent)
    done = run("export", "small", "--to", "small.onnx", "--int8", "--queries", name)
    assert done.exit_code == 2
    assert said in done.stderr
    assert everything(small.parent) == before


@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")  # torch's own
def test_export_to_a_program(small, run):
    done = run("export", "small", "--to", "small.pt2")
    assert done.exit_code == 0, done.stderr
    assert done.stdout.startswith("small.pt2: any batch size, outputs within ")
    x = torch.from_numpy(samples(5))
    with torch.no_grad():
        found = torch.export.load("small.pt2").module()(x)
        assert torch.allclose(found, models()[1](x), atol=1e-6)


@pytest.mark.parametrize(
    ("to", "said"),
    [
        ("small.txt", "--to must end in .onnx or .pt2, not 'small.txt'"),
        ("small", "--to must end in .onnx or .pt2, not 'small'"),
        ("fresh.npz/small.pt2", "A file lies where one of its folders should be"),
        ("taken.pt2", "cannot write taken.pt2: Is a directory"),
    ],
)
def test_export_refuses(small, run, to, said):
    (small.parent / "taken.pt2").mkdir()
    before = everything(small.parent)
    done = run("export", "small", "--to", to)
    assert done.exit_code == 2
    assert said in done.stderr
    assert everything(small.parent) == before


# --- bench ---------------------------------------------------------------------------------------------------------


def test_bench(small, run):
    args = ("bench", "small", "--batch", "2", "--batch", "3", "--seconds", "0.05")
    found = json.loads(run(*args, "--json").stdout)
    assert [row["batch"] for row in found["rows"]] == [2, 3]
    assert all(row[name]["median"] > 0 for row in found["rows"] for name in ("before", "after"))
    shown = run(*args).stdout.splitlines()
    assert shown[1].split() == ["batch", "before", "after", "speed-up"]
    assert [line.split()[0] for line in shown[2:]] == ["2", "3"]
    for option in (("--batch", "0"), ("--seconds", "0")):
        assert run("bench", "small", *option).exit_code == 2


# --- the dense model -----------------------------------------------------------------------------------------------


def test_another_place_for_the_dense_model(small, run):
    """A folder that was moved to another machine: the source is said anew, and its example is that of the plan."""
    shutil.copy("net_for_cli.py", "moved_net.py")
    done = run("bench", "small", "--source", "moved_net:net", "--seconds", "0.05")
    assert done.exit_code == 0, done.stderr
    wrong = run("bench", "small", "--source", "net_for_cli:sequence")
    assert wrong.exit_code == 2
    assert "2.weight is float32 (3, 24) in this dense model and was float32 (24, 24)" in wrong.stderr
    wrong = run("bench", "small", "--shape", "1,9", "--seconds", "0.05")
    assert wrong.exit_code == 2
    assert "does not run on the example" in wrong.stderr


def test_an_artifact_of_the_library_does_not_say_where_its_model_is(place, run):
    import net_for_cli

    save(coreprune.prune(net_for_cli.net(), torch.zeros(1, 8), method="l2", queries=None), place / "mine")
    done = run("bench", "mine")
    assert done.exit_code == 2
    assert "mine does not say where its dense model is. Pass --source package.module:factory." in done.stderr
    assert run("bench", "mine", "--source", "net_for_cli:net", "--seconds", "0.05").exit_code == 0
    assert run("report", "mine").exit_code == 0


@pytest.mark.parametrize("source", ["os:getcwd", "small.evil:net", "small"])
def test_a_folder_of_data_runs_no_code_of_its_own(small, run, source):
    """Whoever sends an artifact could otherwise send a program with it."""
    (small / "evil.py").write_text("raise SystemExit('this ran')")
    manifest = json.loads((small / "manifest.json").read_text())
    manifest["source"]["source"] = source
    (small / "manifest.json").write_text(json.dumps(manifest))
    done = run("bench", "small")
    assert done.exit_code == 2
    assert f"names '{source}' as its dense model, which is code of Python or of that folder itself" in done.stderr


# --- damage --------------------------------------------------------------------------------------------------------


def cut_off(path):
    path.write_bytes(path.read_bytes()[:-1])


def flip(path):
    """Flip a bit in the middle; of the manifest, which nothing vouches for, in the first hash."""
    content = bytearray(path.read_bytes())
    at = content.index(b'"sha256": "') + 11 if path.name == "manifest.json" else len(content) // 2
    content[at] ^= 0x40 if path.name == "manifest.json" else 1
    path.write_bytes(content)


NEEDED = {
    "certify": ("manifest.json", "plan.json", "model.safetensors"),
    "export": ("manifest.json", "plan.json", "model.safetensors"),
    "bench": ("manifest.json", "plan.json", "model.safetensors"),
    "report": ("manifest.json", "report.json"),
}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("damage", [cut_off, flip, lambda path: path.unlink()], ids=["cut off", "flipped", "gone"])
def test_a_damaged_folder(small, run, command, damage):
    """Every file that the command reads, one after the other."""
    assert set(read_manifest(small).files) >= {n for names in NEEDED.values() for n in names} - {"manifest.json"}
    for name in NEEDED[command]:
        whole = (small / name).read_bytes()
        damage(small / name)
        before = everything(small.parent)
        done = run(command, "small", *COMMANDS[command])
        assert done.exit_code == 2, (name, done.output)
        assert f"small/{name}" in done.stderr
        assert re.search(
            r"incomplete|hash differs|cannot read|not JSON|not a manifest|no size|no shape|digits", done.stderr
        )
        assert done.stdout == ""
        assert everything(small.parent) == before, "nothing is left behind"
        (small / name).write_bytes(whole)
    assert run(command, "small", *COMMANDS[command]).exit_code == 0, "so it was the damage"


@pytest.mark.parametrize("command", COMMANDS)
def test_no_artifact(place, run, command):
    np.savez("fresh.npz", samples(20))
    (place / "empty").mkdir()
    for folder in ("absent", "empty", "samples.npz"):
        done = run(command, folder, *COMMANDS[command])
        assert done.exit_code == 2
        assert "An artifact is a folder that coreprune.save wrote" in done.stderr
