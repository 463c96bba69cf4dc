"""What the study `rescale` computes of one cell: drops with something in each layer's place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tracker.core.ablations import ablation_of
from tracker.core.formats import Measure, measure_of
from tracker.core.kinds import Intervention
from tracker.core.records import RunIdentity
from tracker.ledger.aligned import AlignedOutcomes
from tracker.ledger.paired import Array
from tracker.stats.accuracy import accuracy_drop
from tracker.studies.base import Subject

WAYS: tuple[Intervention, ...] = ("scale", "mean", "linear")
"""What stands in for a layer, from the least to the most that it can do."""
NAMES = {
    "remove": "nothing",
    "scale": "a factor",
    "mean": "its mean update",
    "linear": "a linear map",
}
EVERY: tuple[Intervention, ...] = ("remove", *WAYS)


@dataclass(frozen=True)
class Costs:
    """What one cell's layers cost, removed and replaced.

    Attributes:
        name: The cell's title.
        n: Documents.
        layers: The layers that are removed, ascending.
        drops: Way → mean drop of each layer.
        drawn: The same in each resample of the documents.
        nats: Way → what each layer takes of the gold answer's log-probability.
        drawn_nats: The same in each resample.
        better: Way → for each layer, the p-value of doing otherwise than without the layer; None
            where no test could be made.
        measure: What a drop is, and its unit.
        fitted_on: On what the stand-ins were fitted; empty where that is not known.
    """

    name: str
    n: int
    layers: tuple[int, ...]
    drops: dict[Intervention, Array]
    drawn: dict[Intervention, Array]
    nats: dict[Intervention, Array]
    drawn_nats: dict[Intervention, Array]
    better: dict[Intervention, list[float | None]]
    measure: Measure
    fitted_on: str


def costs(subjects: Sequence[Subject]) -> Costs | None:
    """Compute it from the parts of a cell; None where no layer is measured without a stand-in."""
    first, *rest = subjects
    view = first.store.views.of(first.request)
    view = view.joined(*(one.store.views.of(one.request) for one in rest))
    outcomes = AlignedOutcomes(first.store, view)
    layers = tuple(sorted({run.layer for run in outcomes.runs if run.intervention == "remove"}))
    if not layers:
        return None
    drops: dict[Intervention, Array] = {}
    drawn: dict[Intervention, Array] = {}
    nats: dict[Intervention, Array] = {}
    drawn_nats: dict[Intervention, Array] = {}
    better: dict[Intervention, list[float | None]] = {}
    removed: list[Array] = []
    for way in EVERY:
        runs = [RunIdentity(layer=layer, intervention=way) for layer in layers]
        ablations = [ablation_of(run, view.removed) for run in runs]
        if not all(map(outcomes.has, ablations)):
            continue
        paired, gold = outcomes.by_metric(ablations), outcomes.by_gold_logprob(ablations)
        weights = paired.weights
        drops[way] = paired.mean_drops
        drawn[way] = outcomes.resampled(paired.drops, weights)
        nats[way] = gold.mean_drops
        drawn_nats[way] = outcomes.resampled(gold.drops, gold.weights)
        after = list(paired.ablated.T)
        if way == "remove":
            removed = after
        else:
            pairs = zip(after, removed, strict=True)
            better[way] = [accuracy_drop(mine, theirs, weights).p_value for mine, theirs in pairs]
    if "remove" not in drops:
        return None
    return Costs(
        name=first.record.title,
        n=len(outcomes.tasks),
        layers=layers,
        drops=drops,
        drawn=drawn,
        nats=nats,
        drawn_nats=drawn_nats,
        better=better,
        measure=measure_of(first.record),
        fitted_on="; ".join(
            dict.fromkeys(filter(None, (one.record.fitted_on for one in subjects)))
        ),
    )
