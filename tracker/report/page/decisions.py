"""What runs decide document by document, as a page shows it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tracker.analysis.decisions import SHOWN
from tracker.core.decision_records import DecisionsRecord, RunDecisions
from tracker.core.formats import DASH, counted, points
from tracker.core.records import CellRecord
from tracker.core.run_table import CellRun, pick, run_columns, telling_apart
from tracker.core.tables import Column, Table, Value, table
from tracker.report.charts.decisions import margin_name
from tracker.report.frames import packed_json

BUDGET = 2_000_000
"""Characters that the documents of all cells may take of a page."""
Row = DecisionsRecord | RunDecisions
"""A row: the intact model, or what a run decides."""
_OPTIONS = 6
"""With more options than this, the others share a column."""


def letter(option: int) -> str:
    """Name an option as examinations do: A, B, and so on; by its number beyond Z."""
    return chr(ord("A") + option) if option < 26 else str(option + 1)


def decision_table(cell: CellRecord, decided: DecisionsRecord) -> Table:
    """Set one row a run: documents lost and won, its margin, and how often each option is taken."""
    options = len(decided.options)
    several = min(options, _OPTIONS)
    why = decided.reasons.get("margin", "no margin is defined")

    def name(column: Column[CellRun]) -> Column[Row]:
        def value(row: Row) -> Value:
            if isinstance(row, RunDecisions):
                return column.value(CellRun(cell, row.run))
            return "none" if column.name == "layer" else ""

        return Column(column.label, column.unit, value)

    def changed(change: str) -> Column[Row]:
        return Column(f"documents {change}", "count", lambda row: getattr(row, change, DASH))

    def taken(label: str, first: int, last: int) -> Column[Row]:
        def share(row: Row) -> float | None:
            return sum(row.options[first:last]) if row.options else None

        return Column(label, "percent", share, why)

    margin = f"median {margin_name(cell, decided)}"
    columns: list[Column[Row]] = [
        *map(name, pick(run_columns(cell), *telling_apart(cell))),
        changed("lost"),
        changed("won"),
        Column(margin, "coefficient", lambda row: row.margins[1] if row.margins else None, why),
        *(taken(f"{letter(option)} taken", option, option + 1) for option in range(several)),
    ]
    if options > _OPTIONS:
        columns.append(taken("later ones", several, options))
    rows: list[Row] = [decided, *decided.runs]
    notes = []
    if options:
        gold = ", ".join(f"{letter(n)} {points(share)} %" for n, share in enumerate(decided.gold))
        notes.append(f"How often each option is the right one: {gold}.")
    if "margin" in decided.reasons:
        notes.append(f"Margins: {why}.")
    return table(
        f"{cell.title}: what the model decides without each layer, and in its first row intact. "
        f"{counted(decided.n, 'document')}; lost: worse than intact, won: better.",
        columns,
        rows,
        *notes,
    )


def packed_documents(decided: Mapping[str, tuple[CellRecord, DecisionsRecord]]) -> dict[str, str]:
    """Pack the documents that runs lose and win, for a page to unpack when they are asked for.

    Args:
        decided: Name → cell, and what its runs decide.

    Returns:
        Name → packed JSON. Of each run as many documents are named as leave the page small.
    """
    budget = BUDGET // max(1, len(decided))
    found = {}
    for name, (cell, record) in decided.items():
        few = SHOWN
        found[name] = packed_json(_content(cell, record, few))
        while len(found[name]) > budget and few > 1:
            few = max(1, int(0.9 * few * budget / len(found[name])))
            found[name] = packed_json(_content(cell, record, few))
    return found


def _content(cell: CellRecord, decided: DecisionsRecord, few: int) -> dict[str, Any]:
    numbers: dict[int, int] = {}

    def named(run: RunDecisions) -> list[list[Any]]:
        halves = run.named[: run.named_lost][:few], run.named[run.named_lost :][:few]
        return [
            [numbers.setdefault(d.document, len(numbers)), won, d.choice, d.margin, d.text]
            for won, half in enumerate(halves)
            for d in half
        ]

    runs = [[run.run.label(), run.lost, run.won, named(run)] for run in decided.runs]
    documents = [decided.documents[number] for number in numbers]
    return {
        "runs": runs,
        "documents": [
            [d.task, d.doc, d.question, d.choices, d.answer, d.gold, d.choice, d.margin, d.text]
            for d in documents
        ],
        "margin": margin_name(cell, decided),
        "why": decided.reasons.get("texts", ""),
    }
