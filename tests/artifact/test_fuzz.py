"""Damaged and forged files: load(), Plan.from_json(), Queries.load() and example_like() give an answer or a
CoreprunError, soon, and without much memory. 24,000 inputs from seeds (a tenth of them but in `make long`), and what
hypothesis thinks of.

Sizes and hashes in the manifest are made right again for most of them, so that what lies behind them is reached.
"""

from __future__ import annotations

import hashlib
import json
import random
import resource
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import header_of, seeded, with_header
from torch import nn

from coreprune import Budget, Plan, load, prune, save
from coreprune import _example as example_module
from coreprune._example import describe_example, example_like
from coreprune.artifact import read_plan
from coreprune.errors import CoreprunError
from coreprune.queries import Queries

pytestmark = pytest.mark.slow

SECONDS = 5.0  # of this process on a processor, for one input: they take milliseconds, and the clock plays no part
MEMORY = 512 << 20  # bytes beyond what the process has
SOURCES = {
    "manifest bytes": 3000,
    "manifest json": 5000,
    "plan bytes": 3000,
    "plan json": 5000,
    "weights bytes": 2500,
    "weights json": 2500,
    "queries bytes": 1000,
    "queries json": 1000,
    "example json": 1000,
}
assert sum(SOURCES.values()) >= 20_000
thin = pytest.mark.parametrize("share", [0.1, pytest.param(1.0, marks=pytest.mark.long)], ids=["thin", "whole"])


class Slow(BaseException):
    """One input took too long. Not an Exception, so that nothing under test catches it."""


@contextmanager
def limited() -> Iterator[None]:
    """An address space that grows by MEMORY at most."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def slow(signum: int, frame: Any) -> None:
    raise Slow


def run(call: Callable[[], Any], told: Callable[[], str]) -> bool:
    """Whether it gave an answer, and not a CoreprunError. Fails for everything else. told: how to make the input."""
    refusal = None
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        call()
    except CoreprunError as error:
        refusal = str(error)
    except (Exception, Slow) as error:
        raise AssertionError(f"{type(error).__name__}: {str(error)[:300]} for {told()}") from error
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    assert refusal is None or 10 < len(refusal) < 3000, told()
    return refusal is None


# --- mutations -----------------------------------------------------------------------------------------------------


def damaged(content: bytes, rng: random.Random) -> bytes:
    """A few bytes changed, cut off, put in or left out."""
    data = bytearray(content)
    for _ in range(rng.choice((1, 1, 1, 2, 5))):
        at, n = rng.randrange(len(data) + 1), rng.choice((1, 1, 2, 8, 64))
        match rng.randrange(6):
            case 0 if at < len(data):
                data[at] ^= 1 << rng.randrange(8)
            case 1 if at < len(data):
                data[at] = rng.choice(b'0123456789-.eE[]{},:"\\ntfNI\x00\xff')
            case 2:
                del data[at:]
            case 3:
                data[at:at] = rng.randbytes(n)
            case 4:
                data[at:at] = data[at : at + n] * rng.choice((1, 2, 50))
            case _:
                del data[at : at + n]
    return bytes(data)


# Written into the text afterwards, because json.dumps would not write them.
RAW = {
    "@deep": "[" * 3000 + "]" * 3000,
    "@deep-object": '{"a":' * 3000 + "1" + "}" * 3000,
    "@beyond-float": "1e999",
    "@many-digits": "9" * 5000,
    "@nan": "NaN",
    "@infinity": "-Infinity",
    "@surrogate": '"\\ud800"',
}
ODD = (
    None, True, False, 0, 1, -1, 2, 7, 1.0, 0.5, -0.5, 1e308, 2**31, 2**53, 2**62, 2**63, 10**18, 10**30, 10**320,
    "", "x", "0" * 64, "float32", "int64", "value", "tensor",
    "../x", "/etc/passwd", "a" * 5000, [], {}, [[]], [0], [1, 2],
    [0] * 3000, [1 << 61] * 2000, [None], {"": 0}, {"a": {"b": []}}, {"shape": [1], "dtype": "float32"},
    {"value": 1}, {"tuple": []}, *RAW,
)  # fmt: skip


def nodes(tree: Any) -> list[tuple[Any, Any]]:
    """(container, key) of everything inside."""
    found, stack = [], [tree]
    while stack:
        x = stack.pop()
        for key in x if isinstance(x, dict) else range(len(x)) if isinstance(x, list) else ():
            found.append((x, key))
            stack.append(x[key])
    return found


def mutated(text: str, rng: random.Random) -> str:
    """A few values of a JSON text exchanged, removed, repeated, renamed or swapped with others."""
    tree = {"root": json.loads(text)}
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        places = nodes(tree)
        (where, key), (other, name) = rng.choice(places), rng.choice(places)
        match rng.randrange(8):
            case 0 | 1 | 2:
                where[key] = json.loads(json.dumps(rng.choice(ODD)))
            case 3 if where is not tree:
                del where[key]
            case 4:
                where[key], other[name] = json.loads(json.dumps(other[name])), json.loads(json.dumps(where[key]))
            case 5 if isinstance(where, dict) and where is not tree:
                where[rng.choice((*map(str, ODD[:20]), str(name)))] = where.pop(key)
            case 6 if type(where[key]) in (int, float):
                where[key] = rng.choice(
                    (where[key] + 1, where[key] - 1, -where[key], where[key] * 2.0, str(where[key]))
                )
            case 7 if isinstance(where[key], list):
                where[key] = where[key] * 2
            case _:
                where[key] = [where[key]]
    made = json.dumps(tree["root"])
    for mark, raw in RAW.items():
        made = made.replace(json.dumps(mark), raw)
    return made


# --- targets -------------------------------------------------------------------------------------------------------


def dense() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))


class Artifact:
    """A folder, with what is right in it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        result = prune(seeded(dense), torch.zeros(1, 6), Budget(keep=0.5), "folding", queries=torch.randn(8, 6))
        # folding gives the plan all of its fields, and the queries come along.
        assert result.plan.groups["0"].mean
        save(result, folder)
        self.files = {f.name: f.read_bytes() for f in folder.iterdir()}
        self.manifest = json.loads(self.files["manifest.json"])
        self.dense = seeded(dense)

    def put(self, name: str, content: bytes) -> None:
        """Another content, and a manifest that agrees with it."""
        (self.folder / name).write_bytes(content)
        entry = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        manifest = {**self.manifest, "files": {**self.manifest["files"], name: entry}}
        (self.folder / "manifest.json").write_text(json.dumps(manifest))

    def restore(self) -> None:
        for name, content in self.files.items():
            (self.folder / name).write_bytes(content)

    def load(self) -> nn.Module:
        return load(self.folder, self.dense)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Artifact:
    return Artifact(tmp_path_factory.mktemp("fuzz") / "small")


@pytest.fixture
def artifact(whole) -> Iterator[Artifact]:
    before = signal.signal(signal.SIGPROF, slow)
    run(whole.load, lambda: "nothing at all")  # imports and caches
    with limited():
        yield whole
    whole.restore()
    signal.signal(signal.SIGPROF, before)


def over(
    name: str, share: float, check: Callable[[random.Random], bool], change: Callable[[random.Random], None]
) -> tuple[int, int]:
    """Run a share of the inputs of a source; how many of them gave an answer, and how many there were."""
    good, count = 0, round(share * SOURCES[name])
    for seed in range(count):
        rng = random.Random(f"{name} {seed}")
        change(rng)
        good += run(lambda rng=rng: check(rng), lambda seed=seed: f"random.Random('{name} {seed}')")
    return good, count


@thin
@pytest.mark.parametrize("kind", ["bytes", "json"])
def test_manifest(artifact, kind, share):
    text = artifact.files["manifest.json"]
    path = artifact.folder / "manifest.json"

    def change(rng):
        path.write_bytes(damaged(text, rng) if kind == "bytes" else mutated(text.decode(), rng).encode())

    good, count = over(f"manifest {kind}", share, lambda rng: artifact.load(), change)
    assert good < count
    path.write_bytes(text)
    artifact.load()


@thin
@pytest.mark.parametrize("kind", ["bytes", "json"])
def test_plan(artifact, kind, share):
    text = artifact.files["plan.json"]

    def change(rng):
        artifact.put("plan.json", damaged(text, rng) if kind == "bytes" else mutated(text.decode(), rng).encode())

    def check(rng):
        plan = read_plan(artifact.folder)
        again = Plan.from_json(plan.to_json())
        assert again.groups == plan.groups
        assert again.to_json() == plan.to_json()
        if plan.example is not None:
            small_example(plan.example)

    good, count = over(f"plan {kind}", share, check, change)
    assert 0 < good < count


@thin
@pytest.mark.parametrize("kind", ["bytes", "json"])
def test_weights(artifact, kind, share):
    content = artifact.files["model.safetensors"]
    header, data = header_of(content)

    def change(rng):
        if kind == "json":
            new = with_header(mutated(header.decode(), rng).encode(), data)
        elif rng.random() < 0.5:
            new = with_header(damaged(header, rng), data)
        else:
            new = damaged(content, rng)
        artifact.put("model.safetensors", new)

    good, count = over(f"weights {kind}", share, lambda rng: artifact.load(), change)
    assert good < count


@thin
@pytest.mark.parametrize("kind", ["bytes", "json"])
def test_queries(artifact, kind, share):
    content = artifact.files["queries.safetensors"]
    header, data = header_of(content)
    path = artifact.folder / "queries.safetensors"

    def change(rng):
        if kind == "bytes":
            path.write_bytes(damaged(content, rng))
            return
        fields = json.loads(header)
        about = fields["__metadata__"]
        about["coreprune.queries"] = mutated(about["coreprune.queries"], rng)
        path.write_bytes(with_header(json.dumps(fields).encode(), data))

    good, count = over(f"queries {kind}", share, lambda rng: Queries.load(path), change)
    assert good < count


def small_example(description):
    """example_like with a limit that fits into this test's memory."""
    before, example_module._MOST_ENTRIES = example_module._MOST_ENTRIES, 1 << 16
    try:
        return example_like(description)
    finally:
        example_module._MOST_ENTRIES = before


@thin
def test_example(artifact, share):
    args = (torch.randn(1, 3), [torch.arange(6).reshape(1, 6), None], ("text", 1.5, {"mask": torch.ones(1, 6) > 0}))
    text = json.dumps(describe_example(args, {}))
    made: list[Any] = []

    def change(rng):
        made[:] = [json.loads(loadable(mutated(text, rng)))]

    good, count = over("example json", share, lambda rng: small_example(made[0]), change)
    assert 0 < good < count


def loadable(text: str) -> str:
    """Without what json.loads itself refuses."""
    for mark in ("@deep", "@deep-object", "@many-digits"):
        text = text.replace(RAW[mark], "0")
    return text


@pytest.mark.parametrize("shapes", [[[1 << 14, 1 << 14]] * 2, [[0] + [1 << 40] * 60]], ids=["two", "empty"])
def test_the_largest_example_is_refused_before_it_is_made(shapes, monkeypatch):
    """Each of two tensors was below the limit; and the lengths of an empty one have no product."""
    tensors = [{"tensor": {"shape": shape, "dtype": "float32"}} for shape in shapes]
    monkeypatch.setattr(torch, "randn", lambda *args, **more: torch.zeros(()))
    with pytest.raises(CoreprunError, match="more than 268,435,456 entries"):
        example_like({"tuple": [{"tuple": tensors}, {"dict": {}}]})


def test_a_tensor_of_the_queries_is_read_once(artifact):
    """Two kilobytes that named one tensor a thousand times filled the memory."""
    content = artifact.files["queries.safetensors"]
    header, data = header_of(content)
    fields = json.loads(header)
    about = json.loads(fields["__metadata__"]["coreprune.queries"])
    about["tree"] = {"tuple": [{"tuple": [{"tensor": "t0"}] * 1000}, {"dict": {}}]}
    fields["__metadata__"]["coreprune.queries"] = json.dumps(about)
    path = artifact.folder / "queries.safetensors"
    path.write_bytes(with_header(json.dumps(fields).encode(), data))
    with pytest.raises(CoreprunError, match="cannot be read as queries"):
        Queries.load(path)


# --- hypothesis ----------------------------------------------------------------------------------------------------

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.just(10**400),
    lambda x: st.lists(x, max_size=4) | st.dictionaries(st.text(max_size=8), x, max_size=4),
    max_leaves=12,
)
GROUP_KEYS = ("size", "kept", "factors", "negative_factors", "targets", "scales", "mean", "gains")
INDICES = st.lists(st.integers(-2, 9), max_size=6)
GROUP = st.fixed_dictionaries(
    {
        "size": st.integers(-1, 9) | JSON,
        "kept": st.sets(st.integers(0, 8), max_size=5).map(sorted) | INDICES | JSON,
        "factors": st.none() | st.lists(st.floats(), max_size=5) | JSON,
        "negative_factors": st.none() | JSON,
    },
    optional={
        "targets": INDICES | JSON,
        "scales": st.lists(st.floats(0, 2), max_size=9) | JSON,
        "mean": st.booleans() | JSON,
        "gains": st.dictionaries(st.text(max_size=3), st.lists(st.floats(0, 2), max_size=9)) | JSON,
    },
)
PLAN = st.fixed_dictionaries(
    {
        "schema": st.just(1) | JSON,
        "groups": st.dictionaries(st.text(max_size=5), GROUP | JSON, max_size=3) | JSON,
        "fingerprint": st.text(max_size=16) | JSON,
        "method": st.text(max_size=8) | JSON,
        "seed": st.integers() | JSON,
        "budget": st.dictionaries(st.text(max_size=5), JSON, max_size=3) | JSON,
        "example": JSON,
    }
)


def no_plan_or_a_sound_one(raw):
    text = json.dumps(raw)
    try:
        plan = Plan.from_json(text)
    except CoreprunError:
        return
    assert Plan.from_json(plan.to_json()).to_json() == plan.to_json()
    for group in plan.groups.values():
        assert group.kept
        assert all(0 <= i < group.size for i in group.kept)


@given(PLAN | JSON)
@settings(max_examples=100)
def test_plans_that_hypothesis_makes(raw):
    no_plan_or_a_sound_one(raw)


@pytest.mark.long
@given(PLAN | JSON)
@settings(max_examples=1000)
def test_many_plans_that_hypothesis_makes(raw):
    no_plan_or_a_sound_one(raw)


VALID = st.fixed_dictionaries(
    {
        "size": st.just(6),
        "kept": st.sets(st.integers(0, 5), min_size=1).map(sorted).map(tuple),
        "seed": st.integers(),
        "factor": st.floats(-1e6, 1e6),
    }
)


@given(VALID)
@settings(max_examples=50)
def test_plans_come_back_equal(raw):
    from coreprune.pruning.plans.plan import GroupPlan

    factors = (raw["factor"],) * len(raw["kept"])
    plan = Plan({"a": GroupPlan(6, raw["kept"], factors)}, "f" * 16, "l2", raw["seed"], {"keep": 0.5}, None)
    assert Plan.from_json(plan.to_json()) == plan


TENSOR = st.fixed_dictionaries(
    {
        "shape": st.lists(st.integers(-1, 4), max_size=4) | JSON,
        "dtype": st.sampled_from(
            ("float32", "int64", "bool", "complex64", "uint16", "quint8", "float8_e4m3fn", "Tensor")
        )
        | JSON,
    },
    optional={"least": st.integers() | JSON, "most": st.integers() | JSON},
)
TREE = st.recursive(
    st.fixed_dictionaries({"tensor": TENSOR}) | st.fixed_dictionaries({"value": JSON}) | JSON,
    lambda x: (
        st.fixed_dictionaries({"tuple": st.lists(x, max_size=3)})
        | st.fixed_dictionaries({"list": st.lists(x, max_size=3)})
        | st.fixed_dictionaries({"dict": st.dictionaries(st.text(max_size=3), x, max_size=3)})
    ),
    max_leaves=6,
)


EXAMPLES = (
    st.fixed_dictionaries(
        {
            "tuple": st.tuples(st.fixed_dictionaries({"tuple": st.lists(TREE, max_size=3)}), st.just({"dict": {}})).map(
                list
            )
        }
    )
    | TREE
)


@given(EXAMPLES)
@settings(max_examples=100)
def test_examples_that_hypothesis_makes(description):
    no_example_or_a_small_one(description)


@pytest.mark.long
@given(EXAMPLES)
@settings(max_examples=1000)
def test_many_examples_that_hypothesis_makes(description):
    no_example_or_a_small_one(description)


def no_example_or_a_small_one(description):
    try:
        small_example(description)
    except CoreprunError:
        return
