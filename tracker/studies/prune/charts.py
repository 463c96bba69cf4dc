"""The charts of the study `prune`."""

from __future__ import annotations

from tracker.core.estimates import Estimate
from tracker.core.findings import LineChart
from tracker.pruning.search.report import frontier
from tracker.studies.prune.figures import OWN, Compared, Way


def charts_of(group: Compared) -> list[LineChart]:
    """Draw what is left of the accuracy, the more layers go, a line a strategy."""
    if not group.counted:
        return []
    most = max(count for amount in group.amounts for count in group.removed(amount))
    names = dict.fromkeys(way.strategy for way in group.ways if way.calibration == OWN)
    levels = {name: [_at(group, name, removed) for removed in range(most + 1)] for name in names}
    return [
        frontier(f"{group.title}: what is left, the more goes, {group.over}", "layer", True, levels)
    ]


def _at(group: Compared, strategy: str, removed: int) -> Estimate:
    """The mean accuracy at a place, from the first amount that has it."""
    each = [group.at_mean(Way(strategy, amount), removed) for amount in group.amounts]
    return next((one for one in each if one.value is not None), each[0])
