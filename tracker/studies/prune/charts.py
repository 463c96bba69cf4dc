"""The chart of the study `prune`."""

from __future__ import annotations

from tracker.findings import LineChart
from tracker.metrics.accuracy import Estimate
from tracker.studies.layout import line
from tracker.studies.prune.figures import OWN, Compared, Way


def frontier(group: Compared) -> LineChart:
    """Draw what is left of the accuracy, the more layers go, a line a strategy."""
    most = max(count for amount in group.amounts for count in group.removed(amount))
    names = dict.fromkeys(way.strategy for way in group.ways if way.calibration == OWN)
    return LineChart(
        title=f"{group.title}: what is left, the more goes, {group.over}",
        x="layers removed",
        y="test accuracy",
        unit="percent",
        places=tuple(range(most + 1)),
        lines=tuple(
            line(name, [_at(group, name, removed) for removed in range(most + 1)]) for name in names
        ),
    )


def _at(group: Compared, strategy: str, removed: int) -> Estimate:
    """The mean accuracy at a place, from the first amount that has it."""
    each = [group.at_mean(Way(strategy, amount), removed) for amount in group.amounts]
    return next((one for one in each if one.value is not None), each[0])
