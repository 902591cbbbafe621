"""make_queries(): what is drawn, what is kept, what is chosen, what is remembered."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from coreprune import InputError, ModelError
from coreprune.queries import (
    QUERIES,
    BatchNormInversion,
    ClassImpressions,
    Leaves,
    Mixture,
    PinkNoise,
    PropagatedMoments,
    Queries,
    Source,
    WhiteNoise,
    make_queries,
)
from queries.small import Alone, assert_same, convnet, gen, mlp, none, seeded, state, target

EXAMPLE = torch.zeros(1, 12)
IMAGE = torch.zeros(2, 3, 16, 16)
FAST = BatchNormInversion(steps=2, batch=4)


def grey(flat: bool = False) -> nn.Module:
    first = nn.Unflatten(1, (1, 12, 12)) if flat else nn.Identity()
    return seeded(2, lambda: nn.Sequential(first, nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(400, 3)))


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(30, 8)
        self.out = nn.Linear(8, 2)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        scale: float = 1.0,
        key_mask: Tensor | None = None,
    ) -> Tensor:
        x = self.table(input_ids)
        for mask in (attention_mask, key_mask):
            if mask is not None:
                x = x * mask[..., None]
        return self.out(x.mean(1)) * scale


@pytest.mark.parametrize(
    ("model", "example", "source", "why"),
    [
        (convnet(), IMAGE, "batch-norm-inversion", "running statistics"),
        (mlp(), EXAMPLE, "propagated-moments", "linear layer reads"),
        (grey(), torch.zeros(1, 1, 12, 12), "class-impressions", "images of 1×12×12"),
        (nn.Conv2d(1, 2, 3), torch.zeros(1, 1, 12, 12), "mixture", "images of 1×12×12"),
        (nn.Conv2d(3, 2, 3), IMAGE, "mixture", "images of 3×16×16"),
        (nn.Conv1d(2, 2, 3), torch.zeros(1, 2, 20), "pink-noise", "convolutions"),
        (Alone(convnet()), IMAGE[:1], "mixture", "cannot be inverted one input at a time, and the inputs are images"),
        (nn.LayerNorm(12), EXAMPLE, "white-noise", "but their shape"),
        (Tokens(), torch.zeros(1, 5, dtype=torch.int64), "token-mixture", "no tokenizer is known"),
    ],
)
def test_auto(model: nn.Module, example: Tensor, source: str, why: str) -> None:
    queries = make_queries(model, example, n=2, seed=0)
    assert queries.source == source
    assert why in queries.note
    assert len(queries) == 2
    for block in queries.batches(1):
        model(*block[0], **block[1])


@pytest.mark.parametrize("name", sorted(QUERIES))
def test_every_name_is_a_source_with_defaults(name: str) -> None:
    source = QUERIES[name]()
    assert isinstance(source, Source)
    assert source.name == name
    with pytest.raises(AttributeError):
        source.name = "other"  # type: ignore[misc]
    works = {"white-noise", "propagated-moments", "class-impressions"}
    if name in works:
        queries = make_queries(mlp(), EXAMPLE, name, n=3, seed=0)
        assert queries.args[0].shape == (3, 12)
        assert queries.note.startswith("3 inputs without data")
    else:
        with pytest.raises(InputError):  # needs images, tokens or batch norms, and says so
            make_queries(mlp(), EXAMPLE, name, n=3, seed=0)


def test_the_model_is_left_as_it_was() -> None:
    class Odd(nn.Module):
        """Counts its calls in a buffer and draws from the global generator."""

        def __init__(self) -> None:
            super().__init__()
            self.inner = convnet()
            self.register_buffer("calls", torch.zeros(()))
            self.register_buffer("last", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            self.last = x.mean()  # another tensor in the buffer's place
            return self.inner(x) + 0 * torch.rand(())

    model = Odd().train()
    before = state(model)
    for spec in (FAST, ClassImpressions(steps=1), "leaves"):
        make_queries(model, IMAGE, spec, n=4, seed=0)
        assert_same(before, state(model))
    with pytest.raises(InputError):
        make_queries(model, IMAGE, "zipf-tokens", seed=0)
    assert_same(before, state(model))


def test_only_inputs_are_drawn() -> None:
    mask = torch.tensor([[0.0, 0.0, 1.0, 1.0, 1.0]]).expand(2, 5)
    example = {"input_ids": torch.zeros(2, 5, dtype=torch.int64), "key_mask": mask, "scale": 0.5}
    queries = make_queries(Tokens(), example, n=6, seed=0)
    assert queries.kwargs["input_ids"].float().std() > 1
    assert torch.equal(queries.kwargs["key_mask"], mask[:1].expand(6, 5))
    assert queries.kwargs["scale"] == 0.5
    assert Tokens()(**queries.kwargs).shape == (6, 2)


def test_two_images_are_drawn_apart_and_what_has_no_batch_axis_stays() -> None:
    class Pair(nn.Module):
        def forward(self, a: Tensor, b: Tensor, table: Tensor) -> Tensor:
            return a.mean((2, 3)) + b.mean((2, 3)) + table.sum()

    table = torch.arange(3.0)
    queries = make_queries(Pair(), (IMAGE, IMAGE, table), PinkNoise(), n=5, seed=0)
    assert not torch.equal(queries.args[0], queries.args[1])
    assert torch.equal(queries.args[2], table)
    assert queries.shared == {2}
    assert queries.take(3).args[2].shape == (3,)


@pytest.mark.usefixtures("unchecked")
def test_how_many() -> None:
    assert len(make_queries(mlp(), EXAMPLE, seed=0)) == 4096
    assert len(make_queries(grey(), torch.zeros(1, 1, 12, 12), seed=0)) == 256
    costly = seeded(0, lambda: nn.Sequential(*[nn.Conv2d(1 if i == 0 else 256, 256, 7) for i in range(3)]))
    assert len(make_queries(costly, torch.zeros(1, 1, 64, 64), "white-noise", seed=0)) == 128
    signals = seeded(0, lambda: nn.Sequential(nn.Unflatten(1, (1, 2000)), nn.Conv1d(1, 256, 101)))
    assert len(make_queries(signals, torch.zeros(1, 2000), "white-noise", seed=0)) == 256
    for n in (0, -1, 2.5, True):
        with pytest.raises(InputError, match="at least one"):
            make_queries(mlp(), EXAMPLE, n=n, seed=0)  # type: ignore[arg-type]


@pytest.mark.usefixtures("unchecked")
def test_a_source_is_for_the_inputs_of_its_kind() -> None:
    """An image and tokens: naming a source for one leaves the other to auto."""
    example = {"image": IMAGE, "input_ids": torch.zeros(2, 5, dtype=torch.int64)}
    assert make_queries(PixelsAndTokens(), example, "leaves", n=2, seed=0).source == "leaves + token-mixture"
    assert make_queries(PixelsAndTokens(), example, "zipf-tokens", n=2, seed=0).source == "mixture + zipf-tokens"


class MyTokens:
    """A source of tokens that is not one of ours."""

    name, kind = "mine", "tokens"

    def at_once(self, target: Any) -> None:
        return None

    def __call__(self, target: Any, n: int, generator: torch.Generator, tell: Any) -> Tensor:
        return torch.randint(30, (n, *target.shape), generator=generator)


class Talking(MyTokens):
    """A source that has something to say."""

    def remark(self, target: Any, inputs: Tensor) -> str:
        return f"all {len(inputs)} below {30} for {target.title}"


def test_a_source_may_remark_on_its_inputs() -> None:
    example = {"input_ids": torch.zeros(1, 5, dtype=torch.int64)}
    assert make_queries(Tokens(), example, Talking(), n=3).note.endswith("; all 3 below 30 for input 'input_ids'")
    assert make_queries(Tokens(), example, MyTokens(), n=3).note.count(";") == 1


class PixelsAndTokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.images = Tokens(), nn.Conv2d(3, 2, 16)

    def forward(self, image: Tensor, input_ids: Tensor) -> Tensor:
        return self.images(image).flatten(1) + self.tokens(input_ids)


def test_a_token_source_of_ones_own_does_not_fill_the_pixels() -> None:
    """Only sources of our own were known to make tokens, so others filled the pixels with whole numbers."""
    example = {"image": IMAGE, "input_ids": torch.zeros(2, 5, dtype=torch.int64)}
    queries = make_queries(PixelsAndTokens(), example, MyTokens(), n=4)
    assert queries.source == "mixture + mine"
    assert not torch.equal(queries.kwargs["image"], queries.kwargs["image"].round())
    mixed = make_queries(PixelsAndTokens(), example, Mixture((MyTokens(), MyTokens())), n=4)
    assert not torch.equal(mixed.kwargs["image"], mixed.kwargs["image"].round())


def test_a_source_of_images_leaves_the_vector_beside_them_to_auto() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.images, self.vectors = nn.Conv2d(3, 2, 16), nn.Linear(12, 2)

        def forward(self, image: Tensor, vector: Tensor) -> Tensor:
            return self.images(image).flatten(1) + self.vectors(vector)

    example = (IMAGE, torch.zeros(2, 12))
    assert make_queries(Two(), example, "leaves", n=2).source == "leaves + propagated-moments"
    assert make_queries(Two(), example, "propagated-moments", n=2).source == "mixture + propagated-moments"
    assert make_queries(Two(), example, "white-noise", n=2).source == "white-noise"


@pytest.mark.usefixtures("unchecked")
def test_an_unknown_kind_is_refused() -> None:
    source = MyTokens()
    source.kind = "words"  # type: ignore[misc]
    with pytest.raises(InputError, match="must be one of tokens, pixels, vectors, reals, but it is 'words'"):
        make_queries(mlp(), EXAMPLE, source)


@pytest.mark.parametrize(
    ("sources", "kind"),
    [
        ((PinkNoise(), PinkNoise()), "pixels"),
        ((PinkNoise(), WhiteNoise()), "pixels"),
        ((PinkNoise(), PropagatedMoments()), "reals"),
        ((WhiteNoise(), WhiteNoise()), "reals"),
        ((MyTokens(), WhiteNoise()), "tokens"),
    ],
)
def test_the_kind_of_a_mixture(sources: tuple[Source, ...], kind: str) -> None:
    assert Mixture(sources).kind == kind


CODE = """
import torch
from coreprune.queries import WhiteNoise
def draw(n, generator):
    return 5 + torch.randn(n, 12, generator=generator)
class Loud(WhiteNoise):
    name = "loud"
quiet = WhiteNoise(sd=0.0)
class Needs:
    def __init__(self, size):
        pass
"""
POINTS = (
    "[coreprune.queries]\nplain = mysources:draw\nloud = mysources:Loud\nquiet = mysources:quiet\n"
    "odd = mysources:CODE\nbroken = nosuchmodule:x\nleaves = mysources:draw\n"
)


def test_registered_sources_are_known_by_name(install_package: Any) -> None:
    install_package("mysources", POINTS, CODE + "CODE = 7")
    assert {"plain", "loud", "quiet", "broken"} <= set(QUERIES)
    assert QUERIES["leaves"] is Leaves
    plain = make_queries(mlp(), EXAMPLE, "plain", n=50)
    assert plain.source == "plain"
    assert float(plain.args[0].mean()) == pytest.approx(5, abs=0.2)
    assert make_queries(mlp(), EXAMPLE, "loud", n=2).source == "loud"
    assert not make_queries(mlp(), EXAMPLE, "quiet", n=2).args[0].any()
    with pytest.raises(InputError, match="'broken' is registered by the package mysources"):
        make_queries(mlp(), EXAMPLE, "broken")
    with pytest.raises(InputError, match="7 is no source of queries"):
        make_queries(mlp(), EXAMPLE, "odd")
    with pytest.raises(InputError, match=r"known: auto, batch-norm-inversion, .*plain"):
        make_queries(mlp(), EXAMPLE, "plane")


def test_a_function_is_found_by_module_and_name(install_package: Any) -> None:
    install_package("mysources", "", CODE)
    assert make_queries(mlp(), EXAMPLE, "mysources:draw", n=2).source == "draw"
    assert make_queries(mlp(), EXAMPLE, "mysources:Loud", n=2).source == "loud"
    with pytest.raises(InputError, match="mysources:Needs cannot be made without arguments"):
        make_queries(mlp(), EXAMPLE, "mysources:Needs", n=2)
    with pytest.raises(InputError, match="module 'mysources' has no 'other'"):
        make_queries(mlp(), EXAMPLE, "mysources:other", n=2)


def test_the_same_seed_the_same_queries() -> None:
    runs = [make_queries(convnet(), IMAGE, FAST, n=6, seed=gen(s)).args[0] for s in (0, 0, 1)]
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])


def test_progress_counts_up_to_the_end() -> None:
    calls: list[tuple[str, int, int]] = []
    spec = Mixture((WhiteNoise(), BatchNormInversion(steps=2, batch=2)))
    make_queries(convnet(), IMAGE, spec, n=8, seed=0, progress=lambda *call: calls.append(call))
    assert {phase for phase, _, _ in calls} == {"queries"}
    shares = [done / total for _, done, total in calls]
    assert shares == sorted(shares)
    assert shares[-1] == 1


class Counted:
    """A source that counts its calls and can be interrupted."""

    name, kind = "counted", "vectors"

    def __init__(self, stop_after: int | None = None) -> None:
        self.calls, self.stop_after = 0, stop_after

    def __repr__(self) -> str:
        return "Counted()"

    def at_once(self, target: Any) -> int:
        return 4

    def __call__(self, target: Any, n: int, generator: torch.Generator, tell: Any) -> Tensor:
        if self.calls == self.stop_after:
            raise KeyboardInterrupt
        self.calls += 1
        return WhiteNoise()(target, n, generator, tell)


def test_an_interrupted_run_goes_on_and_a_finished_one_is_reused(tmp_path: Path) -> None:
    path = tmp_path / "cache"

    def run(source: Counted, **more: Any) -> Tensor:
        return make_queries(mlp(), EXAMPLE, source, **{"n": 12, "seed": 0, "cache": path, **more}).args[0]

    whole = run(Counted(), cache=None)
    with pytest.raises(KeyboardInterrupt):
        run(Counted(stop_after=2))
    rest = Counted()
    assert torch.equal(run(rest), whole)
    assert rest.calls == 1
    again = Counted()
    assert torch.equal(run(again), whole)
    assert again.calls == 0


@pytest.mark.parametrize("change", ["weights", "buffer", "names", "n", "seed", "spec", "example"])
def test_a_cache_of_another_run_is_not_used(tmp_path: Path, change: str) -> None:
    path = tmp_path / "cache"

    def run(model: nn.Module, **more: Any) -> Tensor:
        given = {"example_inputs": EXAMPLE, "spec": WhiteNoise(), "n": 8, "seed": 0, "cache": path, **more}
        return make_queries(model, **given).args[0]

    model: nn.Module = nn.Sequential(nn.BatchNorm1d(12), mlp())
    run(model)
    more: dict[str, Any] = {}
    if change == "weights":
        with torch.no_grad():
            model[1][0].bias[0] += 1e-6  # type: ignore[index]
    elif change == "buffer":
        model[0].running_mean[0] += 1e-6  # type: ignore[index]
    elif change == "names":
        model = nn.Sequential(model)
    else:
        more = {
            "n": {"n": 9},
            "seed": {"seed": 1},
            "spec": {"spec": WhiteNoise(sd=2.0)},
            "example": {"example_inputs": torch.ones(1, 12)},
        }[change]
    fresh = run(model, **{**more, "seed": 1 if change == "seed" else 0, "cache": None})
    assert torch.equal(run(model, **more), fresh)
    stored = path.read_bytes()
    run(model, **{**more, "seed": 1 if change == "seed" else 0})
    assert path.read_bytes() == stored  # and the new run took its place


def test_saved_queries_are_never_overwritten_by_a_cache(tmp_path: Path) -> None:
    path = tmp_path / "mine"
    queries = make_queries(mlp(), EXAMPLE, n=3, seed=0)
    queries.save(path)
    with pytest.raises(InputError, match="not a cache"):
        make_queries(mlp(), EXAMPLE, n=3, seed=0, cache=path)
    assert torch.equal(Queries.load(path).args[0], queries.args[0])
    make_queries(mlp(), EXAMPLE, n=3, seed=0, cache=tmp_path / "cache")
    with pytest.raises(InputError, match="cache of unfinished"):
        Queries.load(tmp_path / "cache")


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("example", "spec", "match"),
    [
        (EXAMPLE, "strokse", "known: auto, batch-norm-inversion, blobs"),
        (EXAMPLE, WhiteNoise, r"WhiteNoise\(\)"),
        (EXAMPLE, 7, "unknown queries 7"),
        (EXAMPLE, None, "unknown queries None"),
        (EXAMPLE, "leaves", "do not look like images"),
        ("text", "auto", "example_inputs is a str"),
        ((), "auto", "no tensor"),
        (torch.zeros(0, 12), "auto", "at least one row"),
        ({"attention_mask": torch.ones(1, 12)}, "auto", "no input can be drawn"),
        (torch.zeros(1, 12, dtype=torch.bool), "auto", "no input can be drawn"),
        (torch.zeros(1, 12, device="meta"), "auto", "not on the model's device"),
    ],
)
def test_bad_arguments(example: Any, spec: Any, match: str) -> None:
    with pytest.raises(InputError, match=match):
        make_queries(mlp(), example, spec, seed=0)


def test_an_example_that_does_not_run() -> None:
    with pytest.raises(ModelError, match="does not run on the example inputs"):
        make_queries(mlp(), torch.zeros(1, 11), seed=0)


def test_targets_repeat_the_other_inputs() -> None:
    seen = []

    class Watch(nn.Module):
        def forward(self, x: Tensor, other: Tensor) -> Tensor:
            seen.append((len(x), len(other)))
            return x

    from coreprune.queries import Target

    Target(Watch(), (EXAMPLE, torch.ones(1, 2)), {}, 0).call(torch.zeros(7, 12))
    assert seen == [(7, 7)]
    assert WhiteNoise()(target(mlp(), EXAMPLE), 2, gen(), none).shape == (2, 12)


def test_real_numbers_are_no_tokens():
    model = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 2))
    with pytest.raises(InputError, match="random-tokens"):
        make_queries(model, torch.zeros(1, 5, dtype=torch.int64), "white-noise", seed=torch.Generator())
