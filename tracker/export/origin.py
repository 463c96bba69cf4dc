"""Find out how layers were chosen, from the searches and runs of a results folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from tracker.core.changes import Ablation, Change
from tracker.core.extent import Extent
from tracker.core.formats import counted
from tracker.core.identities import ModelIdentity
from tracker.core.prune_records import Calibrated, PruneRecord, PruneStep
from tracker.core.records import CellRecord
from tracker.export.changes import removal
from tracker.export.facts import Accuracy, ModelChange
from tracker.ledger.cells import CellStore
from tracker.ledger.store import Contents, Ledger
from tracker.measuring.derive import all_records


def with_origin(change: ModelChange, ledger: Ledger, model: ModelIdentity) -> ModelChange:
    """Add what a results folder knows of how layers were chosen, unless that is known already."""
    if change.stretch is not None:
        return tried_repetition(ledger, model, change.stretch)
    if change.order and change.strategy is None:
        return searched_removal(ledger, model, change.order)
    return change


def searched_removal(ledger: Ledger, model: ModelIdentity, removed: tuple[int, ...]) -> ModelChange:
    """Find the searches that chose some layers of a model.

    Args:
        ledger: The results folder.
        model: The model.
        removed: The layers.

    Returns:
        What is known of the searches that ended there, or else came by; those that looked at
        documents, where there are any; the layers alone where none did.
    """
    contents = ledger.contents()
    choices = [
        (record, step)
        for record in contents.searches
        if record.unit == "layer" and record.model.key == model.key
        for step in record.steps
        if step.removed == tuple(sorted(removed))
    ]
    if not choices:
        return removal(removed)
    ranks = [(record.steps[-1] == step, bool(record.calibration)) for record, step in choices]
    best = [choice for choice, rank in zip(choices, ranks, strict=True) if rank == max(ranks)]
    return _removal(contents, best)


def tried_repetition(ledger: Ledger, model: ModelIdentity, stretch: Change) -> ModelChange:
    """Find the calibration documents on which a stretch was passed again: they may choose."""
    documents = []
    for store in ledger.cells():
        benchmark = store.identity.benchmark
        part = benchmark.settings.get("part")
        if store.identity.model.key != model.key or part != "calibration":
            continue
        frame = store.read(columns=["task", "doc", "ablation"])
        rows = frame[frame["ablation"] == str(stretch)]
        numbers = {str(task): tuple(map(int, docs)) for task, docs in rows.groupby("task")["doc"]}
        if numbers:
            calibrated = Calibrated(
                key=store.identity.key,
                benchmark=benchmark.name,
                metric=benchmark.primary_metric,
                n=len(rows),
                part=part,
                documents=numbers,
            )
            documents.append(calibrated)
    words = ", ".join(map(_documents, documents)) or None
    change = Ablation.of(stretch)
    return ModelChange(change, calibration=words, documents=tuple(documents))


def removal_of(
    ledger: Ledger, record: PruneRecord, decided_on: Calibrated | None = None
) -> ModelChange:
    """Return what a search removed, and what is known of the choice.

    `decided_on` are documents that decided between it and others; None where none did.
    """
    change = _removal(ledger.contents(), [(record, record.steps[-1])])
    more = () if decided_on is None else (decided_on,)
    return replace(change, documents=(*change.documents, *more))


def _removal(contents: Contents, choices: Sequence[tuple[PruneRecord, PruneStep]]) -> ModelChange:
    records = [record for record, _ in choices]
    record, step = choices[0]
    order = record.order[: len(step.removed)]
    calibration = [", ".join(map(_documents, record.calibration)) for record in records]
    return removal(
        order if sorted(order) == list(step.removed) else step.removed,
        strategy=", ".join(dict.fromkeys(_strategy(*choice) for choice in choices)),
        calibration="; ".join(dict.fromkeys(filter(None, calibration))) or None,
        tested=tuple(_accuracy(*choice) for choice in choices if choice[1].test is not None),
        chosen_by=_cells(contents, records),
        documents=tuple(documents for record in records for documents in record.calibration),
    )


def _accuracy(record: PruneRecord, step: PruneStep) -> Accuracy:
    benchmark, test = record.benchmark, step.test
    assert test is not None  # its callers see to it
    unit, before = "%" if record.higher_is_better else "", record.baseline.level
    title, shots, documents = benchmark.title, benchmark.num_fewshot, untouched(test.n)
    return Accuracy(title, shots, record.metric, documents, test.n, before, test.level, unit)


def _strategy(record: PruneRecord, step: PruneStep) -> str:
    number = record.steps.index(step) + 1
    whole = number == len(record.steps)
    return record.label if whole else f"{record.label}, step {number} of {len(record.steps)}"


def _cells(contents: Contents, records: Sequence[PruneRecord]) -> tuple[CellRecord, ...]:
    """Return the tracked cells of the searches' steps."""
    tracked = {cell for record in records for cell in record.rests_on}
    keys = {key for key, *_ in tracked}
    views = [view for view in contents.views if view[0].identity.key in keys]
    cells = all_records(replace(contents, views=views))
    return tuple(cell for cell in cells if cell.place in tracked)


def _documents(calibrated: Calibrated) -> str:
    part = f" ({calibrated.part})" if calibrated.part else ""
    return f"{counted(calibrated.n, 'document')} of {calibrated.benchmark}{part}"


def untouched(n: int) -> str:
    """Describe documents that chose nothing."""
    return f"{counted(n, 'document')} that chose nothing"


def count_choosing(ledger: Ledger, change: ModelChange, store: CellStore, extent: Extent) -> int:
    """Count the documents of an extent of a cell that chose the layers themselves."""
    cells = {cell.identity.key: cell for cell in ledger.cells()}
    chose = {
        key
        for calibrated in change.documents
        if calibrated.key in cells
        for key in _keys(cells[calibrated.key], calibrated.documents)
    }
    return len(chose & _keys(store, store.wanted(extent)))


def _keys(store: CellStore, documents: Mapping[str, Sequence[int]]) -> set[tuple[str, str, int]]:
    """Return task, split and number of documents: with the split they are the same in any cell."""
    splits = {task.name: task.split for task in store.identity.benchmark.tasks}
    return {(task, splits[task], n) for task, numbers in documents.items() for n in numbers}
