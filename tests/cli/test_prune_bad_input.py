"""Whatever is wrong with what a user passes to coreprune prune: exit code 2, a sentence that helps, and no trace."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from cli_tools import everything, samples
from safetensors.torch import save_file

NET = ("net_for_cli:net", "--shape", "1,8")


@pytest.fixture
def refuses(place, run):
    """refuses(["part of", "the message"], "argument", …): the command says so, and leaves the folder as it was."""

    def call(said, *arguments):
        before = everything(place)
        result = run("prune", *arguments, *(() if "--out" in arguments else ("--out", "new/small")))
        assert result.exit_code == 2, result.output
        shown = " ".join(result.stderr.replace("│", " ").split())
        for part in [said] if isinstance(said, str) else said:
            assert part in shown
        assert "Traceback" not in shown
        assert result.stdout == ""
        assert everything(place) == before, "nothing is left behind"

    return call


# --- the model -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("nothing_like_it:net", ["cannot import 'nothing_like_it'", "Run from the folder it lies in, or install it"]),
        ("needs_more:net", "cannot import 'needs_more' (ModuleNotFoundError: No module named 'nothing_like_it')"),
        ("net_for_cli:resnet", "module 'net_for_cli' has no 'resnet'"),
        ("net_for_cli:FACTORY", "no 'FACTORY'"),
        ("net_for_cli:torch", "net_for_cli:torch is a module, neither a model nor a function that makes one"),
        ("net_for_cli:number", "gave a int, not a torch.nn.Module"),
        ("net_for_cli", ["package.module:factory", "'net_for_cli' is none of these"]),
        ("./absent", "'./absent' is none of these"),
        ("absent.pt2", "there is no file absent.pt2"),
        ("broken.pt2", "broken.pt2 cannot be read as an exported program"),
        ("empty", ["empty is not a Hugging Face model", "config.json"]),
        ("strange", "names the architecture 'os', which transformers does not have"),
    ],
)
def test_a_model_that_is_not_there(place, refuses, source, said):
    (place / "needs_more.py").write_text("import nothing_like_it\n")
    with (place / "net_for_cli.py").open("a") as file:
        file.write("\n\ndef number():\n    return 3\n")
    (place / "broken.pt2").write_bytes(b"no program")
    for name in ("empty", "strange"):
        (place / name).mkdir()
    (place / "strange" / "config.json").write_text('{"architectures": ["os"]}')
    if source == "strange":
        pytest.importorskip("transformers")
    refuses(said, source, "--shape", "1,8", "--queries", "none")


def test_the_fault_of_a_factory_is_the_users_to_see(place, refuses):
    """Nobody else can find the line."""
    (place / "net_for_cli.py").write_text("def net():\n    raise KeyError('my own fault')\n")
    refuses(["KeyError: 'my own fault'", "net_for_cli.py", "line 2, in net"], *NET)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ((), ["no example input", "--shape 1,3,224,224", "--example FILE.npz"]),
        (("--shape", "1,x"), "--shape '1,x' is not a shape. Write 1,3,224,224 or input_ids=1,16:int"),
        (("--shape", "1,9"), ["1, 9", "check that the example inputs are what the model's forward expects"]),
        (("--shape", "1,8", "--shape", "1,8"), "the example inputs are what the model's forward expects"),
        (("--shape", "1,8:int"), "does not run on the example inputs (RuntimeError: mat1 and mat2 must have the same"),
        (("--shape", "1,8", "--example", "samples.npz"), "Give one of them"),
        (("--example", "absent.npz"), "there is no file absent.npz"),
        (("--example", "net_for_cli.py"), "no .npz file of plain arrays: it holds Python objects, or it is damaged."),
    ],
)
def test_an_example_that_does_not_fit(refuses, options, said):
    refuses(said, "net_for_cli:net", "--queries", "none", *options)


def test_weights_that_do_not_fit(place, refuses):
    state = {f"{i}.{kind}": torch.zeros(1) for i in (0, 2, 4) for kind in ("weight", "bias")}
    save_file(state, "shapes.safetensors")
    save_file({"other": torch.zeros(1)}, "names.safetensors")
    Path("junk.safetensors").write_bytes(b"junk")
    for name, said in (
        ("absent", "cannot read absent.safetensors"),
        ("junk", "cannot read junk.safetensors as safetensors"),
        ("names", ["names.safetensors does not fit Sequential", "it lacks", "'other'"]),
        ("shapes", ["shapes.safetensors does not fit Sequential", "0.weight has shape (1,)"]),
    ):
        refuses(said, *NET, "--queries", "none", "--weights", f"{name}.safetensors")


@pytest.mark.slow
def test_torch_adds_no_traceback_of_its_own(place):
    """It logs the errors that become messages here; a user saw forty lines in front of the one that counts."""
    (place / "broken.pt2").write_bytes(b"no program")
    code = (
        "from coreprune.cli.commands import app\n"
        "for source, shape in (('net_for_cli:net', '1,9'), ('broken.pt2', '1,8')):\n"
        "    try: app(['prune', source, '--shape', shape, '--out', 'small'])\n"
        "    except SystemExit as end: print(end.code)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment(), check=False)
    assert done.stdout == "2\n2\n"
    assert done.stderr.count("error ") == 2
    assert "Traceback" not in done.stderr


def environment() -> dict[str, str]:
    """For a fresh interpreter: the library that is tested here, and one thread."""
    import coreprune

    root = str(Path(coreprune.__file__).parents[1])
    own = {k: v for k, v in os.environ.items() if not k.startswith(("COREPRUNE", "TORCH_LOGS"))}
    return {**own, "PYTHONPATH": root, "OMP_NUM_THREADS": "1"}


# --- budgets, selectors, options -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--macs", "0.5", "--params", "0.5"), "--error, --agreement, --latency, not 2 of them"),
        # 8·1 + 1·1 + 1·3 multiplications are left with one neuron in every hidden layer
        (("--macs", "0.001"), ["macs=0.001", "least width 12 are left (1.4%)", "Raise the budget"]),
        (("--macs", "11"), "11 MACs of 840: did you mean 0.11?"),
        (("--params", "0.01", "--min-width", "4"), ["params=0.01", "least width 71 are left", "min_width"]),
        (("--macs", "0"), "would remove every channel"),
        (("--macs", "-1"), "would remove every channel"),
        (("--macs", "nan"), "macs must be a number"),
        (("--macs", "half"), ["Invalid value for '--macs'", "valid number"]),
        (("--keep", "3"), "keep=3 is more than everything"),
        (("--keep", "half"), "give one share, e.g. --keep 0.5"),
        (("--keep", "0.5", "--keep", "0.4"), "one share for each pattern"),
        (("--keep", "0=0.5", "--keep", "0=0.4"), "one share for each pattern"),
        (("--macs", "50"), "did you mean 0.5?"),
        (("--error", "0.1", "--uniform"), "so it does not go with uniform widths"),
        (("--error", "2"), "must lie below 1"),
        (("--error", "0.1", "--queries", "none"), "goes by what the queries show, and there are none"),
        (("--min-width", "99"), "fewer than min_width=99"),
        (("--min-width", "0"), "Invalid value for '--min-width'"),
        (("--round-to", "0"), "Invalid value for '--round-to'"),
        (("--seed", "-1"), "Invalid value for '--seed'"),
        (("--seed", "99999999999999999999999"), "Invalid value for '--seed'"),
        (("--distill", "-1"), "Invalid value for '--distill'"),
        (("--distill", "5", "--queries", "none"), "distill needs queries"),
        (("--exclude", "layer1.*"), ["exclude='layer1.*' matches no group", "0, 2, 4"]),
        (("--exclude", "*"), ["no group of channels is free to leave", "excluded by the caller (pattern '*')"]),
        (
            ("--method", "functionl"),
            ["there is no such selector. Did you mean functional?", "bn-scale, cone, d-optimal"],
        ),
        (("--method", "xyz"), "There are auto, bn-scale"),
        (("--no-such-option",), "No such option: --no-such-option"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, tuple) else "",
)
def test_options_that_make_no_sense(refuses, options, said):
    own = () if "--queries" in options else ("--queries", "samples.npz")
    refuses(said, *NET, *own, *options)


# --- queries and labels --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("specs", "said"),
    [
        (("white_noise",), ["there is no such source of inputs. Did you mean white-noise?", "strokes", ".npz"]),
        (("absent.npz",), "--queries absent.npz: there is no such file"),
        (("absent.safetensors",), "--queries absent.safetensors: there is no such file"),
        (("none", "samples.npz"), "--queries none goes alone"),
        (("wide.npz",), ["wide.npz: shape (48, 9)", "(N, 8) is needed"]),
        (("nan.npz",), ["nan.npz: NaN or infinite numbers in row 7", "Remove them"]),
        (("empty.npz",), "empty.npz: empty"),
        (("whole.npz",), "whole.npz: torch.int64, but the example input is torch.float32"),
        (("junk.npz",), "junk.npz is no .npz file of plain arrays: it holds Python objects, or it is damaged."),
        (("objects.npz",), "objects.npz is no .npz file of plain arrays"),
        (("weights.safetensors",), "holds tensors, but no queries"),
        (("random-tokens",), "tokens are integers; these inputs are torch.float32"),
        (("white-noise", "absent.npz"), "--queries absent.npz: there is no such file"),
        (("white-noise", "nan.npz"), "nan.npz: NaN or infinite numbers in row 7"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, tuple) else "",
)
def test_queries_that_do_not_fit(place, refuses, specs, said):
    """Of several, files are read first: nothing is made in vain, or left behind."""
    broken = samples(48)
    broken[7, 3] = np.nan
    np.savez("nan.npz", broken)
    np.savez("wide.npz", samples(48, width=9))
    np.savez("empty.npz", samples(0))
    np.savez("whole.npz", np.zeros((48, 8), np.int64))
    np.savez("objects.npz", np.array([{"a": 1}], dtype=object))
    Path("junk.npz").write_bytes(b"junk")
    save_file({"0.weight": torch.zeros(2)}, "weights.safetensors")
    refuses(said, *NET, *(part for spec in specs for part in ("--queries", spec)))


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("absent", "there is no file absent.npz"),
        ("samples", "needs an array called labels beside the inputs: numpy.savez(path, inputs=…, labels=…)"),
        ("junk", ["junk.npz is no .npz file of plain arrays", "numpy.savez"]),
        ("real", "labels in real.npz must be (N,) whole numbers, not (40,) torch.float64"),
        ("few", "few.npz has 3 labels for 40 inputs. Every input needs one label"),
        ("wide", ["wide.npz: the samples: shape (40, 9)", "(N, 8) is needed"]),
        ("nan", "nan.npz: the samples: NaN or infinite numbers in row 0"),
        ("many", "the labels go from 1 to 40, but the model has 3 classes, which count from 0"),
        ("negative", "the labels go from -1 to -1, but the model has 3 classes"),
    ],
)
def test_labels_that_do_not_fit(refuses, name, said):
    """Before anything is pruned. Labels of other classes used to count as wrong answers: an accuracy of 0 %."""
    x, labels = samples(40), np.arange(40) % 3
    Path("junk.npz").write_bytes(b"junk")
    np.savez("real.npz", inputs=x, labels=labels / 2)
    np.savez("few.npz", inputs=x, labels=labels[:3])
    np.savez("wide.npz", inputs=samples(40, width=9), labels=labels)
    np.savez("nan.npz", inputs=x * np.nan, labels=labels)
    np.savez("many.npz", inputs=x, labels=np.arange(1, 41))
    np.savez("negative.npz", inputs=x, labels=-np.ones(40, np.int64))
    refuses(said, *NET, "--queries", "white-noise", "--labelled", f"{name}.npz")


def test_labels_of_a_model_without_classes(refuses):
    said = "accuracy needs a model that returns scores of shape (samples, classes)"
    refuses(said, "net_for_cli:sequence", "--shape", "1,8", "--queries", "white-noise", "--labelled", "labelled.npz")


def test_a_late_failure_keeps_the_queries_and_says_so(place, run, monkeypatch):
    """Hours of making them are not to be lost to a full disk; the next run has to be told."""
    args = ("prune", *NET, "--queries", "white-noise", "--no-latency", "--out", "small")

    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(sys.modules["coreprune.artifact.saving"], "save_file", full)
        failed = run(*args)
    assert failed.exit_code == 2
    assert "No space left on device. Free some space, or choose another disk." in failed.stderr
    assert f"What was made so far is in {place / '.small.unfinished'}; --resume goes on." in failed.stderr
    assert not (place / "small").exists()
    assert run(*args).exit_code == 2, "an unfinished run is not thrown away"
    assert run(*args, "--resume").exit_code == 0
    assert not list(place.glob(".*"))
