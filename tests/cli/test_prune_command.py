"""coreprune prune, as its user meets it: what it leaves, what it prints, and that its options reach the library."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
import torch
from cli_tools import everything, samples
from safetensors.torch import load_file, save_file

import coreprune
from coreprune import Budget, Queries
from coreprune.artifact import read_manifest, read_plan
from coreprune.cli.source import load

ARTIFACT = {"manifest.json", "model.safetensors", "plan.json", "queries.safetensors", "report.html", "report.json"}


def assert_same(a, b, **inputs):
    """The same weights to the bit. Outputs are close alone: the last bits depend on where a weight lies in memory."""
    assert a.state_dict().keys() == b.state_dict().keys()
    assert all(torch.equal(t, b.state_dict()[name]) for name, t in a.state_dict().items())
    with torch.no_grad():
        one, two = (getattr(y, "logits", y) for y in (a(**inputs), b(**inputs)))
    assert torch.allclose(one, two, atol=1e-6)


# --- what it leaves ------------------------------------------------------------------------------------------------


def test_the_folder_holds_what_the_library_makes(place, prune):
    """The command adds nothing to and takes nothing from what `prune` computes in Python."""
    import net_for_cli

    own = everything(place)
    done = prune("--macs", "0.5", "--out", "small")
    assert done.exit_code == 0, done.stderr
    assert {f.name for f in (place / "small").iterdir()} == ARTIFACT
    assert {k: v for k, v in everything(place).items() if not k.startswith("small")} == own, "nothing else is left"

    model = net_for_cli.net()
    wanted = coreprune.prune(model, torch.zeros(1, 8), Budget(macs=0.5), queries=torch.from_numpy(samples(48)))
    small = coreprune.load("small", net_for_cli.net)
    assert_same(small, wanted.model, input=torch.from_numpy(samples(32, seed=5)))
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in model.parameters())
    assert read_plan(place / "small").groups == wanted.plan.groups
    assert read_manifest(place / "small").source == {"source": "net_for_cli:net", "shape": ["1,8"]}
    assert "<html" in (place / "small" / "report.html").read_text()[:200]


def test_half_of_the_multiplications_is_the_default(place, prune):
    assert prune("--out", "small").exit_code == 0
    assert json.loads((place / "small" / "report.json").read_text())["settings"]["budget"]["macs"] == 0.5


def test_a_budget_of_agreement(place, prune):
    np.savez(place / "many.npz", samples(600))
    done = prune("--agreement", "0.9", "--queries", "many.npz", "--no-latency", "--out", "small")
    assert done.exit_code == 0, done.stderr
    report = json.loads((place / "small" / "report.json").read_text())
    assert report["path"]["steps"][0]["passed"] is True
    assert report["settings"]["budget"]["agreement"] == 0.9
    assert "another answer has a probability of at most 0.1" in done.stdout
    done = prune("--agreement", "0.999", "--queries", "many.npz", "--out", "none")
    assert done.exit_code == 2
    assert "needs at least 4,603" in done.stderr.replace("\n", " ")
    assert "one of" in prune("--agreement", "0.9", "--macs", "0.5", "--out", "none").stderr


def test_a_budget_that_removes_nothing_says_so(place, prune):
    done = prune("--keep", "0.999", "--queries", "none", "--out", "small")
    assert done.exit_code == 0
    assert "Almost nothing was removed: 100.0% of the MACs are left" in done.stdout
    assert "Almost nothing was removed" in (place / "small" / "report.html").read_text()


def test_folders_above_out_are_made(place, prune):
    assert prune("--out", "new/deep/small").exit_code == 0
    assert sorted(p.name for p in (place / "new" / "deep").iterdir()) == ["small"]


def test_the_same_seed_gives_the_same_bits(place, prune):
    for name, seed in (("one", 3), ("two", 3), ("other", 4)):
        args = ("--queries", "white-noise", "--method", "norm", "--keep", "0.5", "--seed", seed, "--out", name)
        assert prune(*map(str, args)).exit_code == 0
    one, two, other = (everything(place / name) for name in ("one", "two", "other"))
    for file in ("plan.json", "model.safetensors", "queries.safetensors"):
        assert one[file] == two[file], file
        assert one[file] != other[file], f"{file} does not depend on the seed, so the comparison says nothing"
    reports = [json.loads(x["report.json"]) for x in (one, two)]
    for report in reports:
        assert report.pop("seconds")
        assert report.pop("memory")["limit"]
    assert reports[0] == reports[1]


@pytest.mark.slow
def test_a_hugging_face_folder(place, run):
    hf = pytest.importorskip("transformers")
    config = hf.BertConfig(
        vocab_size=30, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, intermediate_size=24,
        max_position_embeddings=32, num_labels=3,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        hf.BertForSequenceClassification(config).save_pretrained(place / "bert")
    own = everything(place / "bert")
    done = run(
        "prune", "./bert", "--params", "0.8", "--uniform", "--exclude", "*attention*", "--exclude", "*pooler*",
        "--queries", "random-tokens", "--no-latency", "--out", "small",
    )  # fmt: skip
    assert done.exit_code == 0, done.stderr
    assert everything(place / "bert") == own, "the user's model is as it was"
    small = coreprune.load("small")
    assert {layer.intermediate.dense.out_features for layer in small.bert.encoder.layer} != {24}
    assert all(layer.attention.self.query.out_features == 16 for layer in small.bert.encoder.layer)
    assert read_manifest(place / "small").loads_with == "transformers"
    stock = hf.BertForSequenceClassification.from_pretrained(place / "small")
    ids = torch.randint(0, 30, (3, 9), generator=torch.Generator().manual_seed(0))
    assert_same(small, stock, input_ids=ids)
    wanted = coreprune.prune(
        hf.BertForSequenceClassification.from_pretrained(place / "bert"),
        {"input_ids": torch.zeros(1, 16, dtype=torch.int64)},
        Budget(params=0.8, uniform=True),
        queries="random-tokens",
        exclude=("*attention*", "*pooler*"),
    )
    assert_same(small, wanted.model, input_ids=ids)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")  # torch's own
@pytest.mark.parametrize("dynamic", [True, False], ids=["any batch", "one sample"])
def test_an_exported_program(place, run, dynamic):
    """A .pt2 file may take one sample only; that used to end the accuracy with a traceback."""
    import net_for_cli

    axes = ({0: torch.export.Dim("batch", min=1)},) if dynamic else None
    program = torch.export.export(net_for_cli.net().eval(), (torch.zeros(2 if dynamic else 1, 8),), dynamic_shapes=axes)
    torch.export.save(program, place / "net.pt2")
    done = run("prune", "net.pt2", "--queries", "samples.npz", "--labelled", "labelled.npz", "--out", "small")
    assert done.exit_code == 0, done.stderr
    small = coreprune.load("small", torch.export.load(place / "net.pt2").module())
    model, example = load("net.pt2", None, [])
    wanted = coreprune.prune(model, example, Budget(macs=0.5), queries=torch.from_numpy(samples(48)))
    assert_same(small, wanted.model, input=torch.from_numpy(samples(1)))


# --- what it prints ------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_table_names_everything_that_was_measured(place, prune, run):
    np.savez("many.npz", samples(600))
    done = run(
        "prune", "net_for_cli:with_example", "--queries", "many.npz", "--labelled", "labelled.npz", "--out", "small"
    )  # fmt: skip
    assert done.exit_code == 0, done.stderr
    data = json.loads((place / "small" / "report.json").read_text())
    rows = {
        "accuracy on 40 samples": [f"{data['accuracy'][when]:.2%}" for when in ("before", "after")],
        "MACs a sample": [f"{data['macs'][when]:,}" for when in ("before", "after")],
        "parameters": [f"{data['parameters'][when]:,}" for when in ("before", "after")],
        "bytes": [f"{data['bytes'][when]:,}" for when in ("before", "after")],
        "ms for a batch of 1 ": ["× as fast"],
        "ms for a batch of 32 ": ["× as fast"],
    }
    for name, values in rows.items():
        (line,) = (line for line in done.stdout.splitlines() if name in line)
        assert all(value in line for value in values), line
    assert data["macs"]["after"] <= data["macs"]["before"] / 2
    assert "600 samples of the user" in done.stdout
    assert re.search(r"agreement the same answer for ≥ \d+\.\d % of such inputs, with confidence 99%", done.stdout)
    for place_ in ("small", "small/report.html"):
        assert str(place / place_) in done.stdout
    again = run("report", "small")
    table = done.stdout.partition("artifact ")[0]
    assert again.stdout.startswith(table), "the report says later what it said when it was made"


def test_accuracy_is_that_of_the_labels(place, prune):
    """Labels that are the network's own answers: 100 % before; wrong ones: 0 %."""
    import net_for_cli

    x = samples(40, seed=1)
    with torch.no_grad():
        answers = net_for_cli.net()(torch.from_numpy(x)).argmax(dim=1).numpy()
    for name, labels, before in (("right", answers, 1.0), ("wrong", (answers + 1) % 3, 0.0)):
        np.savez(f"{name}.npz", x=x, labels=labels)
        done = prune("--labelled", f"{name}.npz", "--out", name, "--json")
        found = json.loads(done.stdout)["accuracy"]
        assert found["before"] == before
        assert found["samples"] == 40
        with torch.no_grad():
            kept = coreprune.load(name, net_for_cli.net)(torch.from_numpy(x)).argmax(dim=1).numpy() == labels
        assert found["after"] == pytest.approx(kept.mean())


def test_json_is_alone_on_standard_output(place, run):
    """The user's factory used to print into the JSON."""
    done = run(
        "prune", "net_for_cli:talkative", "--shape", "1,8", "--no-latency", "--queries", "samples.npz",
        "--out", "small", "--json",
    )  # fmt: skip
    assert json.loads(done.stdout) == json.loads((place / "small" / "report.json").read_text())
    assert "says hello" in done.stderr
    assert json.loads(run("inspect", "net_for_cli:talkative", "--shape", "1,8", "--json").stdout)["groups"]


def test_what_stayed_whole_is_said(place, prune):
    done = prune("--exclude", "2", "--out", "small")
    assert "whole     2: excluded by the caller (pattern '2')" in done.stdout
    assert "model output" not in done.stdout, "that the outputs stay is no news"


# --- options -------------------------------------------------------------------------------------------------------


def widths(folder):
    return {name: len(entry.kept) for name, entry in read_plan(folder).groups.items()}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (("--keep", "0.5"), {"0": 12, "2": 12}),
        (("--keep", "0.5", "--round-to", "8"), {"0": 16, "2": 16}),
        (("--macs", "0.6", "--uniform"), {"0": 17, "2": 17}),
        (("--keep", "0.1", "--min-width", "5"), {"0": 5, "2": 5}),
        (("--keep", "0.25", "--exclude", "0"), {"2": 6}),
        (("--keep", "0=0.5", "--keep", "*=0.25"), {"0": 12, "2": 6}),
        (("--keep", "0.5", "--method", "magnitude", "--queries", "none"), {"0": 12, "2": 12}),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, tuple) else "",
)
def test_widths(place, prune, options, expected):
    done = prune(*options, "--out", "small")
    assert done.exit_code == 0, done.stderr
    assert widths(place / "small") == expected


@pytest.mark.parametrize("kind", ["macs", "params", "bytes"])
def test_budgets_are_met(place, prune, kind):
    assert prune(f"--{kind}", "0.4", "--out", "share").exit_code == 0
    found = json.loads((place / "share" / "report.json").read_text())
    sizes = found[{"params": "parameters"}.get(kind, kind)]
    assert 0.3 * sizes["before"] < sizes["after"] <= 0.4 * sizes["before"]
    assert prune(f"--{kind}", str(sizes["after"]), "--out", "number").exit_code == 0
    assert json.loads((place / "number" / "report.json").read_text())["settings"]["budget"][kind] == sizes["after"]
    assert widths(place / "number") == widths(place / "share")


def test_a_budget_for_the_error(place, prune):
    cost = []
    for error in ("0.3", "0.01"):
        assert prune("--error", error, "--out", error).exit_code == 0
        cost.append(json.loads((place / error / "report.json").read_text())["macs"]["after"])
    assert cost[0] < cost[1]


SOURCE = """
import torch

print("the user's source says hello")


def draw(n, generator):
    return 3 + torch.randn(n, 8, generator=generator)
"""


@pytest.mark.parametrize("spec", ["source_for_cli:draw", "mine"])
def test_a_source_of_ones_own(place, run, install_package, monkeypatch, spec):
    """By its module, which lies in the current folder, or by the name that an installed package registers."""
    install_package("source_for_cli", "[coreprune.queries]\nmine = source_for_cli:draw\n", SOURCE)
    done = run(
        "prune", "net_for_cli:net", "--shape", "1,8", "--no-latency", "--queries", spec, "--out", "small", "--json"
    )  # fmt: skip
    report = json.loads(done.stdout)
    assert report["settings"]["queries"] == spec
    assert Queries.load(place / "small" / "queries.safetensors").args[0].mean() == pytest.approx(3, abs=0.1)
    done = run("certify", "small", "--samples", spec, "--n", "50", "--json")
    assert json.loads(done.stdout)["theorem"] == "T11"


SELECTOR = """
print("the user's selector says hello")


def last(layer):
    return layer.weights.new_tensor(range(len(layer.weights)))
"""


@pytest.mark.parametrize("method", ["selector_for_cli:last", "mine"])
def test_a_selector_of_ones_own(place, run, install_package, method):
    """By its module, which lies in the current folder, or by the name that an installed package registers."""
    install_package("selector_for_cli", "[coreprune.selectors]\nmine = selector_for_cli:last\n", SELECTOR)
    done = run(
        "prune", "net_for_cli:net", "--shape", "1,8", "--no-latency", "--queries", "none", "--keep", "0.5",
        "--method", method, "--out", "small", "--json",
    )  # fmt: skip
    report = json.loads(done.stdout)
    name = method.rpartition(":")[2]
    assert report["settings"]["method"] == {"name": name}
    assert ("method=last" if name == "last" else 'method="mine"') in report["call"]
    plan = read_plan(place / "small")
    assert plan.method == name
    assert plan.groups["0"].kept == tuple(range(12, 24))
    assert run("report", "small").exit_code == 0


def test_a_selector_that_is_not_there(place, run):
    done = run("prune", "net_for_cli:net", "--shape", "1,8", "--method", "net_for_cli:best", "--out", "small")
    assert done.exit_code == 2
    assert "module 'net_for_cli' has no 'best'" in done.stderr


def test_a_source_that_is_not_there(place, run):
    done = run("prune", "net_for_cli:net", "--shape", "1,8", "--queries", "net_for_cli:draw", "--out", "small")
    assert done.exit_code != 0
    assert "module 'net_for_cli' has no 'draw'" in done.stderr


def test_several_queries_lie_one_behind_the_other(place, prune):
    """In the order of the command line, although files are read before anything is made."""
    mine = torch.from_numpy(samples(48))
    orders = {"one": ("samples.npz", "white-noise"), "two": ("white-noise", "samples.npz")}
    for out, pair in orders.items():
        done = prune(*(part for spec in pair for part in ("--queries", spec)), "--out", out)
        assert done.exit_code == 0, done.stderr
        (x,) = Queries.load(place / out / "queries.safetensors").args
        assert len(x) == 48 + 4096
        assert torch.equal(x[:48] if out == "one" else x[-48:], mine)
        assert pair[0] in done.stdout or "48 samples of the user" in done.stdout
    assert not list(place.glob(".*")), "the queries that were made are cleared away"
    done = prune("--queries", "one/queries.safetensors", "--out", "again")
    assert done.exit_code == 0, done.stderr
    assert (place / "again" / "model.safetensors").read_bytes() == (place / "one" / "model.safetensors").read_bytes()


def test_repair_and_distillation_change_the_weights_alone(place, prune):
    weights = {}
    for name, options in (("raw", ("--no-repair",)), ("repaired", ()), ("distilled", ("--distill", "5"))):
        done = prune("--keep", "0.5", *options, "--out", name)
        assert done.exit_code == 0, done.stderr
        weights[name] = load_file(place / name / "model.safetensors")["4.weight"]
    assert widths(place / "raw") == widths(place / "repaired") == widths(place / "distilled")
    assert not torch.equal(weights["raw"], weights["repaired"])
    assert not torch.equal(weights["repaired"], weights["distilled"])
    assert json.loads((place / "distilled" / "report.json").read_text())["settings"]["distill"]["steps"] == 5
    assert not list(place.glob(".*"))


def test_weights_and_example_come_from_files(place, run):
    import net_for_cli

    state = {name: 2 * tensor for name, tensor in net_for_cli.net().state_dict().items()}
    save_file(state, "net.safetensors")
    np.savez("example.npz", np.zeros((1, 8), np.float32))
    done = run(
        "prune", "net_for_cli:net", "--weights", "net.safetensors", "--example", "example.npz", "--queries", "none",
        "--method", "l2", "--keep", "0.5", "--no-latency", "--out", "small",
    )  # fmt: skip
    assert done.exit_code == 0, done.stderr
    kept = list(read_plan(place / "small").groups["0"].kept)
    assert torch.equal(load_file(place / "small" / "model.safetensors")["0.weight"], state["0.weight"][kept])
    assert run("export", "small", "--to", "small.pt2").exit_code == 0, "the artifact knows where its files are"


def test_overwriting_is_asked_for(place, prune):
    assert prune("--keep", "0.5", "--out", "small").exit_code == 0
    before = everything(place / "small")
    refused = prune("--keep", "0.25", "--out", "small")
    assert refused.exit_code == 2
    assert "not empty" in refused.stderr
    assert "overwrite" in refused.stderr
    assert everything(place / "small") == before
    assert prune("--keep", "0.25", "--out", "small", "--overwrite").exit_code == 0
    assert widths(place / "small") == {"0": 6, "2": 6}
    assert sorted(p.name for p in place.iterdir() if p.is_dir() and p.name != "__pycache__") == ["small"]


def test_resume_with_nothing_to_resume(place, prune):
    """A job that a scheduler restarts passes --resume from the start."""
    assert prune("--out", "small", "--resume").exit_code == 0


# --- a budget of time ----------------------------------------------------------------------------------------------


def test_a_time_as_the_budget(place, prune, monkeypatch):
    """The clock counts the numbers that come out, so that the test is about the options and not about this machine."""
    from coreprune.pruning.timing import pace

    def clock(device, seconds, repeats):
        def size(run):
            with torch.no_grad():
                return 1e-6 * run().numel()

        if (seconds, repeats) == pace._PIECE:
            return lambda runs: [size(run) for run in runs]
        return lambda runs: [1e-3 * (1 + 0.1 * i) if i == 0 else 4e-4 for i in range(len(runs))]

    monkeypatch.setattr(pace, "_clock", clock)
    done = prune(
        "--latency", "0.5", "--batch", "3", "--latency-table", "times.json", "--queries", "none", "--method", "l2",
        "--out", "small",
    )  # fmt: skip
    assert done.exit_code == 0, done.stderr
    assert "ms for a batch of 3, eager" in done.stdout
    report = json.loads((place / "small" / "report.json").read_text())
    assert report["settings"]["budget"]["latency"] == 0.5
    assert report["latency_budget"]["after"] == 4e-4
    assert "latency" not in report, "--no-latency is about the measurement at the end"
    assert (place / "times.json").exists()
    assert read_plan(place / "small").budget["batch"] == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--latency", "8 parsecs"), "'8 parsecs' is not a time"),
        (("--latency", "2.0"), "not below the dense model's own time"),
        (("--latency", "nan"), "must be a number"),
        (("--latency", "0.5", "--macs", "0.5"), "--macs"),
        (("--batch", "2"), "say how a latency is measured"),
        (("--latency", "0.5", "--runtime", "tensorrt"), "runtime must be one of eager, compile, onnx"),
    ],
)
def test_wrong_budgets_of_time_are_refused_before_the_model_is_loaded(place, prune, options, message):
    done = prune(*options, "--out", "small")
    assert done.exit_code == 2
    assert message in " ".join(done.stderr.split())
    assert not (place / "small").exists()
