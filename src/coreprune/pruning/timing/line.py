"""From the seconds of a table to those of a whole model: a line between two models that were measured."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Point:
    """One model. table: its seconds by the table. time: of the whole, in the unit of the line's limit."""

    table: float
    time: float


@dataclass(eq=False)
class Line:
    """What is known of whole models so far.

    What the table leaves out (Python, views, caches, operations that fuse) makes the line: at first through the dense
    model and the narrowest one, later through the closest models on both sides of the limit.
    """

    limit: float
    points: list[Point] = field(default_factory=list)

    def met(self, point: Point) -> bool:
        """Whether a model is within the limit."""
        return point.time <= self.limit

    def within(self, cost: float) -> Point | None:
        """The dearest of the models within the limit that cost at most this much by the table."""
        return max((p for p in self.points if p.table <= cost and self.met(p)), key=lambda p: p.table, default=None)

    def target(self, aim: float, least: float, most: float) -> float:
        """The seconds of the table at which a whole model takes `aim` of the limit, between `least` and `most`."""
        low, high = self._ends()
        if self.met(high):
            return most
        if high.time <= low.time:
            return max(least, low.table)
        share = (aim * self.limit - low.time) / (high.time - low.time)
        return max(least, low.table + share * (high.table - low.table))

    def predicted(self, cost: float) -> float:
        """The time of a whole model at this cost by the table."""
        low, high = self._ends()
        slope = (high.time - low.time) / (high.table - low.table) if high.table > low.table else 0.0
        return low.time + slope * (cost - low.table)

    def _ends(self) -> tuple[Point, Point]:
        """The models between which the limit lies: one that is within it and one that is not, if both are known."""
        inside = [p for p in self.points if self.met(p)]
        above = [p for p in self.points if not self.met(p)]
        low = max(inside, key=lambda p: p.table) if inside else min(self.points, key=lambda p: p.table)
        beyond = [p for p in above if p.table > low.table] or [p for p in self.points if p.table > low.table]
        return low, min(beyond, key=lambda p: p.table, default=low)
