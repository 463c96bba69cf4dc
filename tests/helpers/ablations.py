"""The sweep that most tests compute."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from typing import Any, TypeVar

from tracker.schema.changes import CHANGE_COLUMNS, INTACT, Ablation, Change
from tracker.schema.estimates import Estimate
from tracker.schema.records import EstimatesRecord, RunRecord

Recorded = TypeVar("Recorded", bound=EstimatesRecord)


def single_layers(layers: Iterable[int]) -> list[Ablation]:
    """Return the baseline, then the ablation of each layer alone."""
    return [INTACT, *(Ablation.parse(f"layer:{layer}") for layer in layers)]


def parse_ablations(names: str) -> list[Ablation]:
    """Return the ablations of names that are separated by spaces."""
    return [Ablation.parse(name) for name in names.split()]


def with_change(run: RunRecord, **fields: Any) -> RunRecord:
    """Give a record another change, by the columns of data frames, and other figures."""
    columns = {name: getattr(run.change, name) for name in CHANGE_COLUMNS}
    columns |= {name: fields.pop(name) for name in CHANGE_COLUMNS if name in fields}
    change = Change.from_columns(**columns)
    fields = {"change": change, "ablation": Ablation.from_changes(change).name, **fields}
    return with_figures(run, **fields)


def with_figures(record: Recorded, **fields: Any) -> Recorded:
    """Give a record other figures, those of estimates by the columns of data frames."""
    old = {n: asdict(v) if isinstance(v, Estimate) else v for n, v in record}
    return type(record)(**old | fields)
