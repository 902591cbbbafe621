"""Line charts: every name can be read, and more lines than can be told apart are refused."""

from __future__ import annotations

from itertools import combinations

import pytest
from matplotlib.text import Text

from coreprune.demo.lines import COLOURS, Line, draw


@pytest.fixture
def axis():
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots()
    yield axis
    plt.close(figure)


def test_names_do_not_overlap_where_the_lines_meet(axis):
    lines = [Line(f"line {i}\nin two rows" if i % 2 else f"line {i}", [50, 25], [90 - i, 10]) for i in range(6)]
    draw(axis, lines, ticks=[50, 25])
    axis.figure.canvas.draw()
    names = [text for text in axis.texts if text.get_text().startswith("line")]
    assert len(names) == 6
    boxes = [Text.get_window_extent(name) for name in names]  # without the line to the point
    assert not any(first.overlaps(second) for first, second in combinations(boxes, 2))


def test_the_deepest_cut_is_on_the_right(axis):
    draw(axis, [Line("one", [25, 50], [10, 90])], ticks=[50, 25], dense=95.0)
    assert axis.xaxis_inverted()
    assert axis.texts[-1].xy == (25, 10)


def test_more_lines_than_a_reader_can_tell_apart_are_refused(axis):
    with pytest.raises(AssertionError, match="tell apart"):
        draw(axis, [Line(str(i), [1], [1]) for i in range(len(COLOURS) + 1)], ticks=[1])
