"""The line from a table's seconds to those of whole models, against numbers by hand."""

import pytest

from coreprune.pruning.timing.line import Line, Point

# The whole takes 3 + 2 t where the table says t.
DENSE, NARROW = Point(10.0, 23.0), Point(2.0, 7.0)


def test_two_models_make_the_line():
    line = Line(13.0, [DENSE, NARROW])
    assert line.predicted(4.0) == 11.0
    assert line.target(1.0, least=2.0, most=10.0) == 5.0
    assert line.target(0.5, least=3.0, most=10.0) == 3.0  # 6.5 is below the narrowest model
    assert line.within(2.0) == NARROW
    assert line.within(1.0) is None


def test_the_closest_models_on_both_sides_count():
    bent = [Point(4.0, 12.0), Point(6.0, 16.0)]
    line = Line(13.0, [DENSE, NARROW, *bent])
    assert line.predicted(5.0) == 14.0
    assert line.target(1.0, 2.0, 10.0) == pytest.approx(4.5)
    assert line.within(10.0) == bent[0]


def test_a_limit_above_all_models_leaves_the_dense_one():
    line = Line(30.0, [DENSE, NARROW])
    assert line.target(0.98, 2.0, 10.0) == 10.0
    assert all(line.met(p) for p in line.points)


def test_noise_that_turns_the_line_round_asks_for_the_narrower_model():
    line = Line(6.0, [Point(10.0, 6.5), Point(2.0, 7.0)])
    assert line.target(0.98, 2.0, 10.0) == 2.0


def test_one_model_alone():
    line = Line(5.0, [Point(3.0, 4.0)])
    assert line.predicted(9.0) == 4.0
