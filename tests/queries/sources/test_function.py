"""A plain function as a source: what it returns is checked, and fills the input that it is for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from coreprune import Budget, InputError, apply_plan, certify, prune
from coreprune.queries import ClassImpressions, Mixture, Queries, WhiteNoise, make_queries
from queries.small import mlp, seeded

EXAMPLE = torch.zeros(1, 12)
BOTH = {"image": torch.zeros(2, 3, 16, 16), "input_ids": torch.zeros(2, 5, dtype=torch.int64)}


class Both(nn.Module):
    """Pixels and tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.images = nn.Embedding(30, 2), nn.Conv2d(3, 2, 16)

    def forward(self, image: Tensor, input_ids: Tensor) -> Tensor:
        return self.images(image).flatten(1) + self.table(input_ids).mean(1)


class Pair(nn.Module):
    """Two inputs of one form, and a mask, by position."""

    def forward(self, a: Tensor, b: Tensor, mask: Tensor | None = None) -> Tensor:
        return a + b


def rows(n: int, generator: torch.Generator) -> Tensor:
    return torch.randn(n, 12, generator=generator)


def ids(n: int, generator: torch.Generator) -> Tensor:
    return torch.randint(30, (n, 5), generator=generator)


def pixels(n: int, generator: torch.Generator) -> Tensor:
    return 7 + torch.randn(n, 3, 16, 16, generator=generator)


def make(
    source: Any, example: Any = EXAMPLE, model: nn.Module | None = None, n: int | None = 6, **more: Any
) -> Queries:
    return make_queries(mlp() if model is None else model, example, source, n=n, **more)


def test_a_function_of_the_only_input() -> None:
    queries = make(rows)
    assert queries.args[0].shape == (6, 12)
    assert queries.source == "rows"
    assert queries.note == f"6 inputs; {__name__}:rows"
    assert torch.equal(queries.args[0], make(rows).args[0])
    assert not torch.equal(queries.args[0], make(rows, seed=1).args[0])
    assert len(make(rows, n=None).args[0]) == 4096
    assert make(lambda n, generator: rows(n, generator).double().numpy()).args[0].dtype == torch.float32


def test_a_callable_object_and_a_tuple_of_one_are_as_good() -> None:
    class Draws:
        def __call__(self, n: int, generator: torch.Generator) -> tuple[Tensor]:
            return (rows(n, generator),)

    assert torch.equal(make(Draws()).args[0], make(rows).args[0])
    assert make(Draws()).source == "Draws"


def test_what_it_returns_decides_which_input_it_fills() -> None:
    """A token source of the user's own filled the pixels with whole numbers."""
    queries = make(ids, BOTH, Both())
    assert queries.kwargs["input_ids"].float().std() > 1
    assert not torch.equal(queries.kwargs["image"], queries.kwargs["image"].round())
    assert queries.source == "ids + mixture"
    assert float(make(pixels, BOTH, Both()).kwargs["image"].mean()) == pytest.approx(7, abs=0.1)
    assert make(pixels, BOTH, Both()).source == "pixels + token-mixture"
    assert make(lambda n, g: ids(n, g).numpy(), BOTH, Both()).source == "<lambda> + mixture"


def test_the_rest_is_made_as_auto_makes_it() -> None:
    with_function, alone = (make(source, BOTH, seeded(0, Both)) for source in (ids, "auto"))
    assert torch.equal(with_function.kwargs["image"], alone.kwargs["image"])


def test_several_inputs_come_as_a_dict_or_a_tuple() -> None:
    def named(n: int, generator: torch.Generator) -> dict[str, Tensor]:
        image = pixels(n, generator)
        return {"input_ids": image[:, 0, 0, :5].round().long().clamp(0, 29), "image": image}

    queries = make(named, BOTH, Both())
    assert torch.equal(queries.kwargs["image"][:, 0, 0, :5].round().long(), queries.kwargs["input_ids"])
    assert queries.source == "named"
    assert list(queries.kwargs) == ["image", "input_ids"]

    def listed(n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        return tuple(named(n, generator)[name] for name in BOTH)  # type: ignore[return-value]

    assert torch.equal(make(listed, BOTH, Both()).kwargs["image"], queries.kwargs["image"])
    some = make(lambda n, generator: {"input_ids": ids(n, generator)}, BOTH, Both())
    assert some.source == "<lambda> + mixture"


def test_a_tuple_may_hold_what_is_never_drawn() -> None:
    example = (EXAMPLE, EXAMPLE, torch.ones(1, 12, dtype=torch.bool))
    mask = torch.arange(12) > 5

    def three(n: int, generator: torch.Generator) -> list[Tensor]:
        return [rows(n, generator), rows(n, generator), mask.expand(n, 12)]

    queries = make(three, example, Pair())
    assert torch.equal(queries.args[2], mask.expand(6, 12))
    assert make(lambda n, g: three(n, g)[:2], example, Pair()).args[2].all()


def test_a_declared_kind_counts() -> None:
    def mine(n: int, generator: torch.Generator) -> Tensor:
        return ids(n, generator)

    mine.kind = "pixels"  # type: ignore[attr-defined]
    with pytest.raises(
        InputError, match=r"'mine', input 'image': shape \(6, 5\), but one input has shape \(3, 16, 16\)"
    ):
        make(mine, BOTH, Both())
    mine.kind = "tokens"  # type: ignore[attr-defined]
    assert make(mine, BOTH, Both()).source == "mine + mixture"
    mine.kind = "words"  # type: ignore[attr-defined]
    with pytest.raises(InputError, match="must be one of tokens, pixels, vectors, reals, but it is 'words'"):
        make(mine, BOTH, Both())


def nan(n: int, generator: torch.Generator) -> Tensor:
    return rows(n, generator).index_fill_(0, torch.tensor(4), float("nan"))


@pytest.mark.parametrize(
    ("source", "match"),
    [
        (lambda n, g: rows(n, g)[:, :5], r"source '<lambda>', input 0: shape \(6, 5\), .* so \(6, 12\) is needed. Pad"),
        (lambda n, g: rows(n + 1, g), r"shape \(7, 12\), but one input has shape \(12,\), so \(6, 12\) is needed"),
        (lambda n, g: rows(n, g)[0], r"shape \(12,\), .* so \(6, 12\) is needed"),
        (lambda n, g: rows(n, g).round().long(), r"torch.int64, but the example input is torch.float32. Prepare"),
        (nan, "source 'nan', input 0: NaN or infinite numbers in row 4. Remove"),
        (lambda n, g: None, "input 0: a NoneType where a tensor is needed"),
        (lambda n, g: (rows(n, g),) * 3, "returned 3 tensors, but these inputs are to be drawn: input 0 of shape"),
        (
            lambda n, g: {"x": rows(n, g)},
            "inputs named x, but the example inputs are positional, so it must return a t",
        ),
        (lambda n: rows(n, torch.Generator()), r"cannot be called with \(n, generator\) \(too many positional"),
        (lambda n, g, size: rows(n, g), "missing a required argument: 'size'"),
        (lambda n, g: 1 / 0, r"source '<lambda>' failed \(ZeroDivisionError: division by zero\). Call it by itself"),
    ],
)
def test_what_is_wrong_with_it_is_said(source: Any, match: str) -> None:
    with pytest.raises(InputError, match=match):
        make(source)


@pytest.mark.parametrize(
    ("source", "match"),
    [
        (
            rows,
            r"one tensor \(shape \(6, 12\), torch.float32\), which is none of the inputs of the model: ",
        ),
        (lambda n, g: {"imag": pixels(n, g)}, "inputs named imag, but the example inputs are named image, input_ids"),
        (lambda n, g: {}, "inputs named nothing"),
        (lambda n, g: {"image": pixels(n, g), "input_ids": pixels(n, g)}, r"input 'input_ids': shape \(6, 3, 16, 16\)"),
        (lambda n, g: (ids(n, g), pixels(n, g)), r"input 'image': shape \(6, 5\)"),
        (lambda n, g: None, r"one tensor \(a NoneType\)"),
    ],
)
def test_what_is_wrong_with_several_is_said(source: Any, match: str) -> None:
    with pytest.raises(InputError, match=match):
        make(source, BOTH, Both())


def test_one_tensor_for_two_inputs_of_one_form_is_ambiguous() -> None:
    with pytest.raises(InputError, match="could be any of several inputs of the model: input 0 of shape"):
        make(rows, (EXAMPLE, EXAMPLE), Pair())


@pytest.mark.usefixtures("unchecked")
def test_classes_and_half_a_source_are_refused_with_the_reason() -> None:
    class Half:
        name = "half"

        def at_once(self, target: Any) -> None:
            return None

        def __call__(self, target: Any, n: int, generator: Any, tell: Any) -> None:
            return None

    with pytest.raises(InputError, match=r"source Half lacks kind\. See"):
        make(Half())
    with pytest.raises(InputError, match=r"pass an object of it: Half\(\)"):
        make(Half)


def test_a_full_source_is_checked_too() -> None:
    class Wrong:
        name, kind = "wrong", "vectors"

        def at_once(self, target: Any) -> int:
            return 4

        def __call__(self, target: Any, n: int, generator: Any, tell: Any) -> Tensor:
            return torch.zeros(n, 3)

    with pytest.raises(InputError, match=r"the source 'wrong', input 0: shape \(3, 3\), .* so \(3, 12\) is needed"):
        make(Wrong())


def test_functions_go_into_mixtures_and_start_class_impressions() -> None:
    mixed = Mixture((rows, WhiteNoise(mean=50.0)))
    x = make(mixed).args[0].mean(dim=1)
    assert int((x > 40).sum()) == 3
    assert make(mixed).note.endswith("; Mixture")  # its repr holds an address
    assert make(ClassImpressions(start=rows, steps=1)).source == "class-impressions"


def test_prune_apply_and_certify_take_one() -> None:
    model = seeded(0, lambda: nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 4)))
    result = prune(model, EXAMPLE, Budget(keep=0.5), queries=rows)
    assert result.queries is not None
    assert result.queries.source == "rows"
    assert result.report.agreement is not None  # other inputs were drawn for it
    assert " at 0x" not in str(result.report.as_dict())
    again = apply_plan(model, result.plan, EXAMPLE, queries=rows)
    x = torch.randn(5, 12)
    torch.testing.assert_close(again(x), result.model(x))
    assert certify(model, result.model, EXAMPLE, rows, n=100).bound <= 1


def test_the_cache_knows_a_function_by_its_code(tmp_path: Path) -> None:
    calls = []

    def drawing(scale: float) -> Any:
        def draw(n: int, generator: torch.Generator) -> Tensor:
            print_nothing(n)
            return scale * torch.randn(n, 12, generator=generator)

        return draw

    def print_nothing(n: int) -> None:
        calls.append(n)

    # `calls` is part of what they close over, so that it has to be the same each time.
    first = make(drawing(2.0), cache=tmp_path / "c")
    calls.clear()
    assert torch.equal(make(drawing(2.0), cache=tmp_path / "c").args[0], first.args[0])
    assert calls == []
    assert not torch.equal(make(drawing(3.0), cache=tmp_path / "c").args[0], first.args[0])
    assert calls == [6]


def test_the_cache_keeps_what_auto_made_beside_a_function(tmp_path: Path) -> None:
    first, second = (make(ids, BOTH, seeded(0, Both), cache=tmp_path / "c") for _ in range(2))
    for name in BOTH:
        assert torch.equal(first.kwargs[name], second.kwargs[name])
    assert torch.equal(first.kwargs["input_ids"], make(ids, BOTH, seeded(0, Both)).kwargs["input_ids"])


def test_what_cannot_be_recognised_is_not_cached(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    state = object()

    def odd(n: int, generator: torch.Generator) -> Tensor:
        assert state is not None
        return rows(n, generator)

    make(odd, cache=tmp_path / "c")
    assert "the queries are not cached" in caplog.text
    assert not (tmp_path / "c").exists()
