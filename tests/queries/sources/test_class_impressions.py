"""Class impressions: soft labels of the right classes, inputs that move towards them and no further."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from coreprune import InputError
from coreprune.queries import ClassImpressions, WhiteNoise
from coreprune.queries.sources.class_impressions import classifier, is_classifier, similarities
from queries.small import Alone, convnet, gen, mlp, none, target

MODEL = mlp(12, 4)
TARGET = target(MODEL, torch.zeros(1, 12))


def test_similarities_are_cosines_scaled_row_by_row() -> None:
    weight = torch.tensor([[2.0, 0.0], [1.0, 1.0], [0.0, -3.0]])
    found = similarities(weight)
    cosine = torch.nn.functional.cosine_similarity(weight[:, None], weight[None], dim=-1)
    low, high = cosine.min(1, keepdim=True).values, cosine.max(1, keepdim=True).values
    assert torch.allclose(found, (cosine - low) / (high - low))
    assert torch.equal(found.diagonal(), torch.ones(3))


def test_the_classifier_is_the_layer_that_makes_the_logits() -> None:
    assert torch.equal(classifier(TARGET), MODEL[2].weight.double())
    assert classifier(target(convnet(), torch.zeros(1, 3, 8, 8))).shape == (4, 6)
    convolution = nn.Sequential(nn.Conv2d(3, 5, 1), nn.AdaptiveAvgPool2d(1), nn.Conv2d(5, 7, 1), nn.Flatten())
    assert torch.equal(
        classifier(target(convolution, torch.zeros(1, 3, 4, 4))), convolution[2].weight.flatten(1).double()
    )


def test_soft_labels_favour_their_class_and_its_likes() -> None:
    similar = torch.tensor([[1.0, 0.8, 0.0], [0.8, 1.0, 0.1], [0.0, 0.1, 1.0]], dtype=torch.float64)
    labels = ClassImpressions()._labels(similar, 9000, gen())
    assert torch.allclose(labels.sum(1), torch.ones(9000, dtype=torch.float64))
    for k in range(3):  # the mean of a Dirichlet is its parameters over their sum
        alpha = similar[k].clamp_min(1e-2)
        assert torch.allclose(labels[k::3].mean(0), alpha / alpha.sum(), atol=0.03)
    assert torch.equal(labels, ClassImpressions()._labels(similar, 9000, gen()))


def test_inputs_move_towards_their_labels() -> None:
    labels = ClassImpressions()._labels(similarities(classifier(TARGET)), 200, gen()).float()

    def cross_entropy(source: ClassImpressions) -> float:
        with torch.no_grad():
            scores = MODEL(source(TARGET, 200, gen(), none)) / source.temperature
            return float(-(labels * scores.log_softmax(1)).sum(1).mean())

    found = [cross_entropy(ClassImpressions(steps=steps, lr=0.2, temperature=0.2)) for steps in (1, 20)]
    best = float(-(labels * labels.clamp_min(1e-30).log()).sum(1).mean())
    assert best < found[1] < best + 0.6 * (found[0] - best)


def test_inputs_stay_within_the_range_of_their_start() -> None:
    start = WhiteNoise(mean=3.0, sd=0.5)
    x = ClassImpressions(start, steps=50, lr=1.0)(TARGET, 64, gen(), none)
    assert x.shape == (64, 12)
    assert 0.0 < float(x.min()) < float(x.max()) < 6.0


def test_a_model_of_one_input_at_a_time_gives_what_it_would_give_together() -> None:
    """It used to end in the model's own error, at the first step."""
    alone = target(Alone(MODEL), torch.zeros(1, 12))
    x, wanted = (ClassImpressions()(t, 8, gen(), none) for t in (alone, TARGET))
    assert torch.allclose(x, wanted, atol=1e-5)


def test_only_classifiers_have_classes() -> None:
    images = target(nn.Conv2d(3, 3, 3, padding=1), torch.zeros(1, 3, 8, 8))
    scalar = target(mlp(12, 1), torch.zeros(1, 12))
    softened = target(nn.Sequential(nn.Linear(12, 4), nn.Softmax(dim=1)), torch.zeros(1, 12))
    for other in (images, scalar, softened):
        assert not is_classifier(other)
        with pytest.raises(InputError, match="need a classifier"):
            ClassImpressions()(other, 2, gen(), none)
    with pytest.raises(InputError, match="real numbers"):
        ClassImpressions()(target(nn.Embedding(5, 4), torch.zeros(1, 3, dtype=torch.int64)), 2, gen(), none)
    with pytest.raises(InputError, match="have to be positive"):
        ClassImpressions(temperature=0.0)(TARGET, 2, gen(), none)
