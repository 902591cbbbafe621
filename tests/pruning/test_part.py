"""One part of a model that cannot be traced whole."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import features
from coreprune import Budget, InputError, ModelError, Plan, apply_plan, list_groups, load, make_plan, prune, save
from small_networks import bits


def normal(*shape: int) -> torch.Tensor:
    return features.normal(*shape).float()


def backbone() -> nn.Module:
    layers = [nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 12, 3, padding=1), nn.ReLU(), nn.Conv2d(12, 6, 1)]
    return nn.Sequential(*layers)


class Detector(nn.Module):
    """It scales a list of images to one size, and keeps the places with large scores: no trace can say how many."""

    def __init__(self, part: nn.Module | None = None) -> None:
        super().__init__()
        self.body = nn.ModuleDict({"backbone": part or backbone()})
        self.scores, self.boxes = nn.Conv2d(6, 1, 1), nn.Conv2d(6, 4, 1)

    def forward(self, images: list[torch.Tensor]) -> list[torch.Tensor]:
        x = torch.stack([nn.functional.interpolate(i[None], (8, 8), mode="bilinear")[0] for i in images])
        features = self.body["backbone"](x)
        scores, boxes = self.scores(features).flatten(1), self.boxes(features).flatten(2).transpose(1, 2)
        return [b[s > s.mean()] for s, b in zip(scores, boxes, strict=True)]


def photos(n: int = 1, size: int = 10) -> list[torch.Tensor]:
    return list(normal(n, 3, size, size))


def test_the_part_is_pruned_as_if_it_were_alone_and_put_back():
    model = Detector()
    before = bits(model)
    result = prune(model, (photos(),), Budget(macs=0.5), "magnitude", queries=None, part="body.backbone")
    seen = nn.functional.interpolate(photos()[0][None], (8, 8), mode="bilinear")
    alone = prune(model.body["backbone"], seen, Budget(macs=0.5), "magnitude", queries=None)
    assert bits(result.model.body["backbone"]) == bits(alone.model)
    assert result.plan.groups == alone.plan.groups
    assert result.plan.part == "body.backbone"
    assert result.report.macs == alone.report.macs
    assert bits(model) == before
    assert type(result.model) is Detector
    assert result.model.scores is not model.scores
    for image, size in ((3, 10), (2, 20)):
        assert [b.shape[1] for b in result.model(photos(image, size))] == [4] * image
    assert any("Only 'body.backbone' of Detector was pruned" in note for note in result.report.notes)
    assert 'part="body.backbone"' in result.report.settings.call()


def test_it_may_be_named_by_the_module_and_shrunk_in_place():
    model = Detector()
    module = model.body["backbone"]
    other = prune(model, (photos(),), Budget(keep=0.5), "magnitude", queries=None, part=module)
    same = prune(model, (photos(),), Budget(keep=0.5), "magnitude", queries=None, part=module, inplace=True)
    assert same.model is model
    assert model.body["backbone"] is module
    assert bits(model) == bits(other.model)
    assert module[0].out_channels == 4


class Stacked(nn.Module):
    """A part behind a pooling, called by keyword and by position."""

    def __init__(self) -> None:
        super().__init__()
        self.part = Scaled()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.part(nn.functional.avg_pool2d(x, 2)).mean((2, 3))


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = backbone()

    def forward(self, x: torch.Tensor, scale: float = 2.0) -> torch.Tensor:
        return scale * self.layers(x)


def test_samples_are_those_of_the_model_and_the_repair_sees_what_enters_the_part():
    model, samples = Stacked(), normal(40, 3, 10, 10)
    result = prune(model, samples[:1], Budget(keep=0.75), queries=samples, part="part")
    alone = prune(
        model.part,
        nn.functional.avg_pool2d(samples[:1], 2),
        Budget(keep=0.75),
        queries=nn.functional.avg_pool2d(samples, 2),
    )
    assert bits(result.model.part) == bits(alone.model)
    assert result.report.settings.queries == "samples"
    assert result.report.refits


class TimeFirst(nn.Module):
    """Tokens lie along the first axis of what the part gets, and samples along the second."""

    def __init__(self) -> None:
        super().__init__()
        self.part = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), MixedTokens(), nn.Linear(16, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.part(x.transpose(0, 1)).mean(0)


class MixedTokens(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + x.softmax(0)


def test_samples_lie_where_the_part_has_them():
    samples = normal(40, 6, 8)
    result = prune(TimeFirst(), samples[:1], Budget(keep=0.5), queries=samples, part="part")
    assert len(result.queries) == 40
    assert torch.equal(next(result.queries.batches(40))[0][0], samples.transpose(0, 1))


def test_a_part_called_with_both_kinds_of_arguments():
    class Both(Stacked):
        def forward(self, x):
            return self.part(x, scale=3.0)

    model, x = Both(), normal(1, 3, 8, 8)
    result = prune(model, x, Budget(keep=0.5), "magnitude", queries=None, part="part")
    assert result.model.part.layers[0].out_channels == 4
    assert result.model(x).shape == model(x).shape


def test_the_groups_of_the_part_are_listed():
    found = list_groups(Detector(), (photos(),), part="body.backbone")
    assert [g.name for g in found.groups] == [g.name for g in list_groups(backbone(), normal(1, 3, 8, 8)).groups]


def test_the_artifact_of_the_whole_is_saved_and_loaded(tmp_path):
    model = Detector()
    result = prune(model, (photos(),), Budget(keep=0.5), "magnitude", queries=None, part="body.backbone")
    again = load(save(result, tmp_path / "small"), Detector)
    assert bits(again) == bits(result.model)
    assert [b.tolist() for b in again(photos())] == [b.tolist() for b in result.model(photos())]


def test_a_plan_of_a_part_fits_the_whole_model():
    model = Detector()
    result = prune(model, (photos(),), Budget(keep=0.5), "magnitude", queries=None, part="body.backbone")
    plan = make_plan(model, (photos(),), Budget(keep=0.5), "magnitude", queries=None, part="body.backbone")
    assert plan == result.plan
    again = Plan.from_json(plan.to_json())
    assert bits(apply_plan(model, again)) == bits(result.model)
    assert bits(apply_plan(model, again, (photos(2),))) == bits(result.model)
    with pytest.raises(InputError, match="another architecture"):
        apply_plan(Detector(nn.Conv2d(3, 6, 1)), again)
    assert apply_plan(model, again, inplace=True) is model
    assert bits(model) == bits(result.model)


def test_a_part_with_weights_that_it_computes(tmp_path):
    def made() -> nn.Module:
        torch.manual_seed(0)
        layers = backbone()
        nn.utils.parametrizations.weight_norm(layers[0])
        return Detector(layers)

    result = prune(made(), (photos(),), Budget(keep=0.5), "magnitude", queries=None, part="body.backbone")
    again = load(save(result, tmp_path / "small"), made)
    assert bits(again) == bits(result.model)
    assert bits(apply_plan(made(), result.plan)) == bits(result.model)


class Peeks(Detector):
    """The rest of the model reads a layer inside of the part."""

    def forward(self, images):
        x = torch.stack(images)
        return self.body["backbone"](x).mean() + self.scores.weight.sum() + self.body["backbone"][0](x)[:, 7].mean()


class Shares(Detector):
    """The rest of the model has a weight of the part."""

    def __init__(self) -> None:
        super().__init__()
        self.scores.weight = self.body["backbone"][4].weight


class Skips(Detector):
    """The forward calls the layers of the part, but not the part."""

    def forward(self, images):
        return self.body["backbone"][0](torch.stack(images))


@pytest.mark.parametrize(
    ("model", "part", "error", "words"),
    [
        (Detector(), "backbone", InputError, "such as one of body, scores, boxes"),
        (Detector(), "", InputError, "a module inside of the Detector"),
        (Detector(), nn.Linear(2, 2), InputError, "it is 'Linear'"),
        (Peeks(), "body.backbone", ModelError, "does not run with the smaller 'body.backbone'"),
        (Shares(), "body.backbone", ModelError, "scores.weight is a weight of 'body.backbone', too"),
        (Skips(), "body.backbone", ModelError, "does not call 'body.backbone' itself"),
    ],
)
def test_what_cannot_be_a_part(model, part, error, words):
    before = bits(model)
    with pytest.raises(error, match=words):
        prune(model, (photos(),), Budget(keep=0.5), "magnitude", queries=None, part=part, inplace=True)
    assert bits(model) == before


def test_samples_of_other_sizes_are_refused():
    class Free(Stacked):
        def forward(self, x):
            return self.part(x)

    with pytest.raises(InputError, match=r"12, 12"):
        prune(Free(), normal(1, 3, 8, 8), Budget(keep=0.5), queries=normal(8, 3, 12, 12), part="part")
