"""What runs decide document by document, as a page shows it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tracker.core.decision_records import DecisionsRecord, RunDecisions
from tracker.core.records import CellRecord
from tracker.ledger.decisions import SHOWN
from tracker.report.charts.decisions import margin_name
from tracker.report.formats import DASH, counted, points, two_digits
from tracker.report.page.downloads import packed_json
from tracker.report.table import Table, Value, numbers, shown
from tracker.report.tables import run_columns

BUDGET = 2_000_000
"""Characters that the documents of all cells may take of a page."""
_OPTIONS = 6
"""With more options than this, the others share a column."""


def letter(option: int) -> str:
    """Name an option as examinations do: A, B, and so on; by its number beyond Z."""
    return chr(ord("A") + option) if option < 26 else str(option + 1)


def decision_table(cell: CellRecord, decided: DecisionsRecord) -> Table:
    """Set one row a run: documents lost and won, its margin, and how often each option is taken."""
    names = run_columns(cell)
    options = len(decided.options)
    several = min(options, _OPTIONS)
    heads = [f"{letter(number)} taken (%)" for number in range(several)]
    if options > _OPTIONS:
        heads.append("later ones (%)")
    columns = (
        *numbers(*names.labels),
        *numbers("documents lost", "documents won", f"median {margin_name(cell, decided)}"),
        *numbers(*heads),
    )
    why = decided.reasons.get("margin", "no margin is defined")

    def figures(lost: str, won: str, run: Any, taken: Sequence[float]) -> tuple[Value, ...]:
        median = shown(run[1] if run else None, two_digits, why)
        shares = [*taken[:several], *([sum(taken[several:])] if options > _OPTIONS else [])]
        known = [shown(share, points, "", 100) for share in shares] or [Value(DASH, why)] * len(
            heads
        )
        return (Value(lost), Value(won), median, *known)

    def name(*parts: str) -> tuple[Value, ...]:
        return tuple(Value(part) for part in (*parts, *[""] * (len(names.labels) - len(parts))))

    rows = [(*name("none"), *figures(DASH, DASH, decided.margins, decided.options))]
    rows += [
        (
            *name(*names.of(one.run)),
            *figures(f"{one.lost:,}", f"{one.won:,}", one.margins, one.options),
        )
        for one in decided.runs
    ]
    caption = (
        f"{cell.title}: what the model decides without each layer, and in its first row intact. "
        f"{counted(decided.n, 'document')}; lost: worse than intact, won: better."
    )
    notes = []
    if options:
        gold = ", ".join(f"{letter(n)} {points(share)} %" for n, share in enumerate(decided.gold))
        notes.append(f"How often each option is the right one: {gold}.")
    if "margin" in decided.reasons:
        notes.append(f"Margins: {why}.")
    return Table(caption, columns, tuple(rows), tuple(notes))


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
            [
                numbers.setdefault(one.document, len(numbers)),
                int(won),
                one.choice,
                one.margin,
                one.text,
            ]
            for won, half in enumerate(halves)
            for one in half
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
