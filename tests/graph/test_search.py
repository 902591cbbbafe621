"""Which cuts work together is found in few attempts, also where many do not."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coreprune.graph.search import working


class Attempts:
    """Cuts work together if none of them is bad, and no pair of them is."""

    def __init__(self, bad: set[str], pairs: set[frozenset[str]] = frozenset(), hard: set[str] = frozenset()) -> None:  # type: ignore[assignment]
        self.bad, self.pairs, self.hard, self.count = bad, pairs, hard, 0

    def __call__(self, names: list[str], hard: bool) -> str:
        assert len(set(names)) == len(names)
        self.count += 1
        wrong = [n for n in names if n in self.bad] + [n for n in names if n in self.hard and not hard]
        wrong += [f"{sorted(p)}" for p in self.pairs if p <= set(names)]
        return f"{wrong[0]} is wrong" if wrong else ""


def nothing(names: list[str]) -> dict[str, str]:
    return {}


def blocks(n: int, *layers: str) -> list[str]:
    return [f"{i}.{layer}" for i in range(n) for layer in layers]


def kinds(names: list[str]) -> dict[str, str]:
    return {name: name.split(".")[1] for name in names}


def test_one_attempt_if_all_work() -> None:
    names, attempts, good = blocks(20, "a", "b"), Attempts(set()), []
    assert working(names, kinds(names), good, attempts, nothing) == {}
    assert good == names
    assert attempts.count == 1


@pytest.mark.parametrize("n", [2, 3, 24, 200])
def test_a_kind_that_never_works_costs_a_few_attempts_however_many_there_are(n: int) -> None:
    names, good = blocks(n, "a", "b", "c", "d"), []
    attempts = Attempts({name for name in names if name.endswith("c")})
    reasons = working(names, kinds(names), good, attempts, nothing)
    assert set(reasons) == attempts.bad
    assert set(good) == set(names) - attempts.bad
    assert attempts.count <= 9
    assert all("is wrong" in reason for reason in reasons.values())


def test_doubtful_cuts_come_after_the_others() -> None:
    names, good = [*blocks(40, "a", "b"), "0.heads"], []
    attempts = Attempts({"0.heads"})
    reasons = working(names, kinds(names), good, attempts, nothing, doubtful=["0.heads"])
    assert set(reasons) == {"0.heads"}
    assert sorted(good) == sorted(names[:-1])
    assert attempts.count == 3


@pytest.mark.parametrize("bad", [{"7.a"}, {"heads", "7.a"}, {"8.a", "8.b"}])
def test_doubt_changes_no_result(bad: set[str]) -> None:
    names = [*blocks(9, "a", "b"), "heads"]
    kind = {n: n.rpartition(".")[2] for n in names}
    for doubtful in ([], ["heads"], names[::2], names):
        assert set(working(names, kind, [], Attempts(bad), nothing, doubtful=doubtful)) == bad


def test_nothing_else_is_tried_where_that_is_hopeless() -> None:
    names, good = blocks(9, "a", "b"), ["first"]
    attempts = Attempts({"3.a"})
    reasons = working(names, kinds(names), good, attempts, nothing, "3.a is")
    assert reasons == dict.fromkeys(names, "3.a is wrong")
    assert good == ["first"]
    assert attempts.count == 1
    assert set(working(names, kinds(names), good, Attempts({"3.a"}), nothing, "3.b is")) == {"3.a"}


@pytest.mark.parametrize("odd", ["0.a", "7.a", "15.a"])
def test_a_single_one_of_a_kind_is_found(odd: str) -> None:
    names, good = blocks(16, "a", "b"), []
    attempts = Attempts({odd})
    assert set(working(names, kinds(names), good, attempts, nothing)) == {odd}
    assert set(good) == set(names) - {odd}
    assert attempts.count <= 14


def test_one_that_works_between_two_that_do_not_is_kept_if_the_middle_works() -> None:
    names, good = blocks(5, "a"), []
    assert set(working(names, kinds(names), good, Attempts({"0.a", "4.a"}), nothing)) == {"0.a", "4.a"}
    assert good == ["1.a", "2.a", "3.a"]


def test_what_works_only_if_one_tries_hard_is_tried_alone() -> None:
    names, good = blocks(2, "a", "b"), []
    attempts = Attempts({"0.b"}, hard={"1.b"})
    assert set(working(names, kinds(names), good, attempts, nothing)) == {"0.b"}
    assert "1.b" in good


@given(st.sets(st.integers(0, 11)), st.lists(st.sampled_from("ab"), min_size=12, max_size=12), st.integers(0, 11))
def test_nothing_that_does_not_work_is_ever_kept(bad: set[int], sorts: list[str], other: int) -> None:
    names = [f"{i}.{kind}" for i, kind in enumerate(sorts)]
    pairs = {frozenset((names[other], names[(other + 5) % 12]))}
    attempts, good = Attempts({names[i] for i in bad}, pairs), ["before"]
    reasons = working(names, kinds(names), good, attempts, nothing)
    assert good[0] == "before"
    assert sorted([*good[1:], *reasons]) == sorted(names)
    assert not attempts(good, True)


@given(st.sets(st.integers(0, 11)))
def test_of_kinds_of_their_own_everything_that_works_is_kept(bad: set[int]) -> None:
    names, good = [f"{i}.x" for i in range(12)], []
    attempts = Attempts({names[i] for i in bad})
    assert set(working(names, {n: n for n in names}, good, attempts, nothing)) == attempts.bad
    assert set(good) == set(names) - attempts.bad


@given(st.sets(st.integers(0, 11)), st.sets(st.integers(0, 11)), st.integers(0, 11))
def test_those_that_are_to_blame_are_left_out_at_once(bad: set[int], unseen: set[int], odd: int) -> None:
    names, good = [f"{i}.x" for i in range(12)], []
    attempts = Attempts({names[i] for i in bad | unseen}, {frozenset((names[odd], names[(odd + 5) % 12]))})

    def blame(tried: list[str]) -> dict[str, str]:
        return {names[i]: "fails" for i in bad if names[i] in tried}

    reasons = working(names, {n: n for n in names}, good, attempts, blame)
    assert sorted([*good, *reasons]) == sorted(names)
    assert {names[i] for i in bad} <= set(reasons)
    assert not attempts(good, True)
    if not unseen - bad and len(attempts.pairs) == 1 and any(p & {names[i] for i in bad} for p in attempts.pairs):
        assert attempts.count <= 3


def test_what_is_to_blame_only_beside_others_is_kept() -> None:
    names, good = ["a", "b", "c"], []

    def blame(tried: list[str]) -> dict[str, str]:
        return {"b": "fails"} if {"a", "b"} <= set(tried) else {}

    attempts = Attempts({"a"})
    assert working(names, {n: n for n in names}, good, attempts, blame) == {"a": "a is wrong"}
    assert set(good) == {"b", "c"}
