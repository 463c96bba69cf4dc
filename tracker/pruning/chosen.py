"""What a results folder knows of a choice of layers: the search that made it, and its runs."""

from __future__ import annotations

from dataclasses import replace

from tracker.identities import ModelIdentity
from tracker.ledger.store import Ledger
from tracker.measuring.derive import all_records
from tracker.pruning.facts import Accuracy, Pruning
from tracker.searched import PruneRecord, Tested


def chosen(ledger: Ledger, model: ModelIdentity, removed: tuple[int, ...]) -> Pruning:
    """Say how some layers of a model were chosen.

    Args:
        ledger: The results folder.
        model: The model.
        removed: The layers.

    Returns:
        What the search knows that took them out, at its end or on its way, best one that looked at
        documents; the layers alone where none did.
    """
    contents = ledger.contents()
    steps = [
        (record, step)
        for record in contents.searches
        if record.unit == "layer" and record.model.key == model.key
        for step in record.steps
        if step.removed == tuple(sorted(removed))
    ]
    if not steps:
        return Pruning(removed)
    record, step = max(steps, key=lambda each: bool(each[0].calibration))
    order = record.order
    done = order[: len(removed)]
    keys, places = {key for key, *_ in record.rests_on}, set(record.rests_on)
    views = [each for each in contents.views if each[0].identity.key in keys]
    cells = all_records(replace(contents, views=views))
    return Pruning(
        removed=done if sorted(done) == sorted(removed) else tuple(sorted(removed)),
        strategy=record.label,
        calibration=_calibration(record),
        tested=() if step.test is None else (_accuracy(record, step.test),),
        chosen_by=tuple(cell for cell in cells if cell.place in places),
    )


def _calibration(record: PruneRecord) -> str | None:
    said = [
        f"{each.n:,} documents of {each.benchmark}" + (f" ({each.part})" if each.part else "")
        for each in record.calibration
    ]
    return ", ".join(said) or None


def _accuracy(record: PruneRecord, tested: Tested) -> Accuracy:
    base = record.baseline
    return Accuracy(
        benchmark=record.benchmark.title,
        num_fewshot=record.benchmark.num_fewshot,
        metric=record.metric,
        documents=f"{tested.n:,} documents that chose nothing",
        n=tested.n,
        before=(base.accuracy, base.low, base.high),
        after=(tested.accuracy, tested.low, tested.high),
        unit="%" if record.higher_is_better else "",
    )
