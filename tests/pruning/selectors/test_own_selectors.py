"""Selectors that users write: what is enough, what is refused in which words, and what records and remakes them."""

from __future__ import annotations

import dataclasses
import functools
import re

import pytest
import torch

from coreprune import Budget, InputError, make_plan, prune
from coreprune.coreset import Coreset, DrawStream, Merge, draw_stream
from coreprune.pruning.selectors import ranking_of, resolve
from coreprune.pruning.selectors.own import own
from coreprune.selectors import L2, SELECTORS, Functional, Lewis, Ranking, ranked, sampled
from layers_by_hand import layer, normal, seeded
from small_networks import EXAMPLE, bits, mlp

N = 12
LAYER = layer(N, name="body.0")
SHAPES = r"group 'body.0' \(12 units; incoming \(12, 6\), outgoing \(4, 12\)\)"


def mine(layer):
    return layer.weights.norm(dim=1)


@dataclasses.dataclass(frozen=True)
class Power:
    """A selector with an option."""

    p: float = 1.0
    name = "power"

    def __call__(self, layer):
        return layer.weights.abs().pow(self.p).sum(dim=1)


def ranking(found, layer=LAYER, **more):
    """The ranking of a selector that returns `found`."""
    return ranking_of(own(functools.update_wrapper(lambda layer: found, mine, ["__name__"], [])), layer, seeded())


# What is enough


def test_scores_alone_rank_as_our_selector_with_the_same_scores():
    by_ours, by_function = (prune(mlp(), EXAMPLE, Budget(macs=0.5), m, queries=None) for m in ("l2", mine))
    assert bits(by_ours.model) == bits(by_function.model)
    assert by_function.plan.method == by_function.rankings["0"].method == "mine"
    assert by_function.rankings["0"].scores.dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_scores_of_any_float_dtype_and_with_gradients(dtype):
    scores = torch.arange(N, dtype=dtype).requires_grad_()
    found = ranking(scores)
    assert found.order.tolist() == list(range(N))[::-1]
    assert (found.scores.dtype, found.scores.requires_grad) == (torch.float64, False)


def test_the_first_of_equals_stays():
    assert ranking(torch.zeros(N)).order.tolist() == list(range(N))


def test_a_full_ranking_keeps_its_order_and_note_and_gets_the_selectors_name(unchecked):
    order = torch.randperm(N, generator=seeded())
    found = ranking(Ranking("other", torch.zeros(N), order, "why"))
    assert (found.method, found.note, found.order.tolist()) == ("mine", "why", order.tolist())


def test_a_sampled_ranking_re_weights():
    def drawn(layer, generator):
        return sampled("drawn", layer.outgoing_sizes, generator)

    result = prune(mlp(), EXAMPLE, Budget(keep=0.5), drawn, queries=None)
    assert result.plan.groups["0"].factors is not None
    assert {c.theorem for c in result.report.groups[0].certificates} >= {"T6"}


@pytest.mark.parametrize(
    "function",
    [
        lambda layer, generator: torch.rand(N, generator=generator),
        lambda layer, rng: torch.rand(N, generator=rng),
        lambda layer, *, generator: torch.rand(N, generator=generator),
        lambda layer, p=2, generator=None: torch.rand(N, generator=generator) ** p,
    ],
)
def test_the_generator_is_passed_to_whoever_takes_it(function):
    found = [ranking_of(own(function), LAYER, seeded(s)).scores for s in (3, 3, 4)]
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_an_option_with_a_default_is_not_taken_for_the_generator():
    found = ranking_of(own(lambda layer, p=2.0: torch.full((N,), p)), LAYER, seeded())
    assert found.scores.tolist() == [2.0] * N


def test_the_layer_knows_the_name_of_its_group():
    saved = {"0": torch.arange(24.0), "2": torch.arange(12.0)}
    result = prune(
        mlp(), EXAMPLE, Budget(keep=0.5), functools.update_wrapper(lambda x: saved[x.name], mine), queries=None
    )
    assert result.plan.groups["0"].kept == tuple(range(12, 24))
    assert result.plan.groups["2"].kept == tuple(range(6, 12))


# What it returns is checked

given = functools.partial  # objects that the shape checks would refuse: made once those are off


def made(found):
    return found() if isinstance(found, functools.partial) else found


@pytest.mark.parametrize(
    ("found", "says"),
    [
        (None, "returned None"),
        ([1.0] * N, "returned an object of type list"),
        ((torch.ones(N), torch.ones(N)), "returned an object of type tuple"),
        (normal(N).numpy(), "returned an object of type ndarray"),
        (torch.ones(N - 1), r"scores of shape \(11,\)"),
        (torch.ones(N, 1), r"scores of shape \(12, 1\)"),
        (torch.tensor(1.0), r"scores of shape \(\)"),
        (torch.arange(N), r"dtype torch\.int64.* If these are the units in order, return a Ranking"),
        (torch.ones(N, dtype=torch.bool), r"dtype torch\.bool"),
        (torch.ones(N, dtype=torch.complex64), r"dtype torch\.complex64"),
        (torch.ones(N, device="meta"), "without values"),
        (torch.ones(N).to_sparse(), "without values"),
        (torch.ones(N).index_fill(0, torch.tensor(5), torch.nan), "the score nan for unit 5"),
        (torch.ones(N).index_fill(0, torch.tensor(7), -torch.inf), "the score -inf for unit 7"),
        (given(Ranking, "", [1.0] * N, torch.arange(N)), "scores of type list"),
        (given(Ranking, "", torch.ones(N), None), "order of type NoneType"),
        (given(Ranking, "", torch.ones(N), torch.arange(N).float()), r"order of type torch\.float32"),
        (given(Ranking, "", torch.ones(N), torch.arange(N - 1)), r"order of shape \(11,\) that is no permutation"),
        (given(Ranking, "", torch.ones(N), torch.zeros(N, dtype=torch.int64)), "no permutation"),
        (given(Ranking, "", torch.ones(N), torch.arange(1, N + 1)), "no permutation"),
        (given(Ranking, "", torch.ones(N), torch.arange(N)[None]), "no permutation"),
        (given(Ranking, "", torch.ones(N), torch.arange(N), rule=3), "a rule of type int"),
        (given(Ranking, "", torch.ones(N), torch.arange(N), stream=3), "a stream that does not fit"),
        (
            given(Ranking, "", torch.ones(N), torch.arange(N), stream=draw_stream(torch.ones(N - 1), seeded())),
            "a stream that does not fit",
        ),
        (
            given(Ranking, "", torch.ones(N), torch.arange(N), stream=DrawStream(torch.arange(N), torch.ones(N), 0)),
            "a stream that does not fit",
        ),
    ],
)  # fmt: skip
def test_what_a_selector_must_not_return(found, says, unchecked):
    with pytest.raises(InputError, match=f"^the selector 'mine' returned.* for {SHAPES}") as caught:
        ranking(made(found))
    assert re.search(says, str(caught.value))


EVEN = torch.arange(0, N, 2)
ONES = torch.ones(N // 2, dtype=torch.float64)
HOME = torch.arange(N) // 2 * 2


@pytest.mark.parametrize(
    ("found", "says"),
    [
        (EVEN, "an object of type Tensor"),
        (given(Coreset, EVEN[:3], ONES[:3]), "6 different units from 0 to 11"),
        (given(Coreset, EVEN.flip(0), ONES), "ascending"),
        (given(Coreset, EVEN + 2, ONES), "6 different units"),
        (given(Coreset, EVEN, ONES[:3]), "weights that are not 6 finite"),
        (given(Coreset, EVEN, ONES * torch.nan), "weights that are not 6 finite"),
        (given(Coreset, EVEN, ONES, merge=Merge(HOME + 1, torch.ones(N))), "a merge into units that it does not keep"),
        (given(Coreset, EVEN, ONES, merge=Merge(HOME, torch.ones(N) * torch.inf)), "scales that are not 12 finite"),
    ],
)
def test_what_a_rule_must_not_return(found, says, unchecked):
    checked = ranking(Ranking("", torch.ones(N), torch.arange(N), rule=lambda k: made(found)))
    with pytest.raises(InputError, match=f"'mine' has a rule that returned, at width 6.*{says}"):
        checked.coreset(6)


def test_a_sound_rule_goes_through(unchecked):
    wanted = Coreset(EVEN, ONES, merge=Merge(HOME, torch.ones(N, dtype=torch.float64)))
    assert ranking(Ranking("", torch.ones(N), torch.arange(N), rule=lambda k: wanted)).coreset(6) is wanted


def test_an_error_inside_says_where_it_happened_and_keeps_its_cause():
    def broken(layer):
        return layer.readers[0].mean

    with pytest.raises(
        InputError, match=r"'broken' failed with IndexError: .*\(test_own_selectors\.py, line \d+\)"
    ) as at:
        ranking_of(own(broken), LAYER, seeded())
    assert isinstance(at.value.__cause__, IndexError)


def test_an_error_of_ours_gets_a_note_that_names_the_group():
    bad = dataclasses.replace(LAYER, incoming=LAYER.incoming.clone().fill_(torch.nan))
    with pytest.raises(InputError, match=r"not finite.*Check the layer's weights"):
        ranking_of(L2(), bad, seeded())

    def refuses(layer):
        raise InputError("no.")

    with pytest.raises(InputError, match=r"^no\.") as caught:
        ranking_of(own(refuses), LAYER, seeded())
    assert "'body.0'" in caught.value.__notes__[0]


def test_a_failing_selector_leaves_the_model_as_it_was():
    model, before = mlp(), bits(mlp())
    with pytest.raises(InputError, match="group '0'"):
        prune(model, EXAMPLE, method=lambda layer: None, queries=None, inplace=True)
    assert bits(model) == before


# What is a selector


class Nameless:
    def __call__(self, layer):
        return mine(layer)


def with_(function, **attributes):
    """A copy of a function with attributes."""
    copy = functools.update_wrapper(lambda layer: function(layer), function)
    del copy.__wrapped__
    vars(copy).update(attributes)
    return copy


@pytest.mark.parametrize(
    ("method", "says"),
    [
        (Nameless(), "needs a name"),
        (functools.partial(mine), "needs a name"),
        (with_(mine, name=""), "needs a name"),
        (with_(mine, name="  "), "needs a name"),
        (with_(mine, name=3), "needs a name"),
        (with_(mine, name="a:b"), "without a colon"),
        (with_(mine, name="a\nb"), "needs a name"),
        (with_(mine, reads="yes"), "`reads` of the selector 'mine' must be True"),
        (with_(mine, name="lewis"), "'lewis' is the name of one of coreprune's own"),
        (with_(mine, name="auto"), "'auto' is the name of one of coreprune's own"),
        (lambda: torch.ones(N), r"must take \(layer\) or \(layer, generator\), but its signature is \(\)"),
        (lambda layer, generator, more: torch.ones(N), "must take"),
        (Power, r"pass an object of it: Power\(\)"),
        (L2, r"pass an object of it: L2\(\)"),
        (3, "unknown selector 3"),
        (None, "unknown selector None"),
        ("no_such_module:f", "cannot import 'no_such_module'"),
        ("os.path:no_such", "has no 'no_such'"),
        ("os:sep", "must be callable, but '/' is of type str"),
    ],
)
def test_what_is_no_selector_is_refused_before_any_work(method, says, unchecked):
    with pytest.raises(InputError, match=says):
        prune(mlp(), EXAMPLE, method=method, queries=None)


def test_a_selector_that_reads_is_refused_without_queries():
    reads = with_(mine, reads=True)
    for method in (reads, Functional(), "functional", "pfp", "d-optimal"):
        for call in (prune, make_plan):
            with pytest.raises(InputError, match=r"needs queries, but there are none.*Pass queries"):
                call(mlp(), EXAMPLE, method=method, queries=None)


def test_readers_are_there_with_queries_and_make_plan_makes_them_for_who_reads():
    seen = []

    def counts(layer):
        seen.append(len(layer.readers))
        return mine(layer)

    queries = normal(64, 8).float()
    make_plan(mlp(), EXAMPLE, Budget(keep=0.5), counts, queries=queries)
    assert seen == [0, 0]  # nothing needs queries, so none are made
    counts.reads = True
    make_plan(mlp(), EXAMPLE, Budget(keep=0.5), counts, queries=queries)
    assert seen[2:] == [1] * 6  # for each of two groups, on all queries and on each half of them


# What makes it again


def again(settings, **names):
    known = {"model": mlp(), "example_inputs": EXAMPLE, **names}
    exec(settings.call(), known)
    return known["result"]


@pytest.mark.parametrize("method", [mine, Power(), Power(3.0), f"{__name__}:mine", f"{__name__}:Power"])
def test_the_call_in_the_report_imports_the_selector_and_makes_the_same_plan(method):
    first = prune(mlp(), EXAMPLE, Budget(keep=0.5), method, queries=None)
    assert f"from {__name__} import " in first.report.settings.call()
    second = again(first.report.settings)
    assert second.plan == first.plan
    assert second.report.settings == first.report.settings


def test_what_resolve_returns_is_left_as_it_is():
    """The command line resolves early; a second wrapping hid the function from the call in the report."""
    selector = resolve(f"{__name__}:mine")
    assert resolve(selector) is selector
    assert resolve("l2") == L2()


def test_a_selector_that_cannot_be_imported_is_left_as_a_name():
    first = prune(mlp(), EXAMPLE, Budget(keep=0.5), lambda layer: mine(layer), queries=None)
    assert "method=your__lambda_," in first.report.settings.call()
    assert again(first.report.settings, your__lambda_=lambda layer: mine(layer)).plan == first.plan


def test_the_report_has_the_name_and_the_options():
    report = prune(mlp(), EXAMPLE, method=Power(3.0), queries=None).report
    assert report.settings.as_dict()["method"] == {"name": "power", "p": 3.0}
    report = prune(mlp(), EXAMPLE, method=with_(mine, name="taylor"), queries=None).report
    assert report.settings.as_dict()["method"] == {"name": "taylor"}


def test_a_plan_by_a_users_selector_survives_json():
    made = make_plan(mlp(), EXAMPLE, method=mine, queries=None)
    assert type(made).from_json(made.to_json()) == made


# By name


@pytest.fixture
def package(install_package):
    """An installed package that registers selectors."""
    install_package(
        "selector_plugin",
        "[coreprune.selectors]\nfrom-afar = selector_plugin:f\nby-class = selector_plugin:Mine\n"
        "broken = selector_plugin:nothing\nnever = selector_plugin:Needs\nlewis = selector_plugin:f\n",
        "def f(layer):\n    return -layer.weights.norm(dim=1)\n"
        "class Mine:\n    name = 'else'\n    def __call__(self, layer):\n        return f(layer)\n"
        "class Needs:\n    def __init__(self, x):\n        pass\n",
    )


def test_registered_selectors_go_by_the_name_they_are_registered_under(package):
    assert {"from-afar", "by-class"} < set(SELECTORS)
    assert SELECTORS["lewis"] is Lewis
    for name in ("from-afar", "by-class"):
        result = prune(mlp(), EXAMPLE, Budget(keep=0.5), name, queries=None)
        assert result.plan.method == result.report.settings.as_dict()["method"]["name"] == name
        assert f'method="{name}"' in result.report.settings.call()
        worst = set(torch.argsort(mlp()[0].weight.detach().norm(dim=1))[:12].tolist())
        assert set(result.plan.groups["0"].kept) == worst


def test_a_broken_registered_selector_says_whose_it_is(package):
    with pytest.raises(InputError, match="'broken' is registered by the package selector_plugin"):
        prune(mlp(), EXAMPLE, method="broken", queries=None)
    with pytest.raises(InputError, match="'never' cannot be made without arguments"):
        prune(mlp(), EXAMPLE, method="never", queries=None)


def test_ranked_is_what_our_selectors_use():
    assert ranked("mine", torch.tensor([1.0, 3.0, 2.0])).order.tolist() == [1, 2, 0]
