"""The sweep that most tests compute."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from typing import Any, TypeVar

from tracker.core.changes import COLUMNS, INTACT, Ablation, Change
from tracker.core.estimates import Estimate
from tracker.core.records import EstimatesRecord, RunRecord

Recorded = TypeVar("Recorded", bound=EstimatesRecord)


def single_layers(layers: Iterable[int]) -> list[Ablation]:
    """Return the baseline, then the ablation of each layer alone."""
    return [INTACT, *(Ablation.parse(f"layer:{layer}") for layer in layers)]


def with_change(run: RunRecord, **fields: Any) -> RunRecord:
    """Give a record another change, by the columns of data frames, and other figures."""
    columns = {name: getattr(run.change, name) for name in COLUMNS}
    change = Change.of_fields(**columns | {n: fields.pop(n) for n in COLUMNS if n in fields})
    return with_figures(run, **{"change": change, "ablation": Ablation.of(change).name, **fields})


def with_figures(record: Recorded, **fields: Any) -> Recorded:
    """Give a record other figures, those of estimates by the columns of data frames."""
    before = {n: asdict(v) if isinstance(v, Estimate) else v for n, v in record}
    return type(record)(**before | fields)
