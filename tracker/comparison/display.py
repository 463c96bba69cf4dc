"""Write a comparison as text, Markdown, JSON or a page."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from functools import partial
from operator import itemgetter
from pathlib import Path

from tracker.comparison.verdicts import OPEN_CODE, WORSE_CODE, Comparison, Difference
from tracker.ledger.files import write_text
from tracker.report.export import markdown_table
from tracker.report.page.comparison import render_comparison
from tracker.schema.estimates import Estimate
from tracker.schema.formats import join_words, points, three_digits
from tracker.schema.grouping import group_by
from tracker.schema.tables import Column, Table, build_table
from tracker.schema.text import escape_markdown
from tracker.tracking.base import Page
from tracker.tracking.figures import logged_table

MAX_LOST = 30
"""Maximum number of lost documents of a model and metric on a page."""
_TEXTS = ("document", "question", "right answer")
COLUMN_NOTE = (
    "Differences are those of the other model from {first} on the same documents; positive = "
    "the other model is better. With 95 % confidence, all {count} intervals hold together "
    "(Bonferroni). p is the exact McNemar test of one row."
)


def _is_fraction(row: Difference) -> bool:
    """Return whether a metric is shown as a percentage."""
    values = [level.value for level in (row.first, row.second) if level.value is not None]
    return row.higher_is_better and all(0 <= value <= 1 for value in values)


def _level(row: Difference, name: str) -> Estimate:
    level: Estimate = getattr(row, name)
    return _in_unit(row, Estimate(level.value, reason=level.reason))


def _change(row: Difference) -> Estimate:
    return _in_unit(row, replace(row.difference, p_value=None))


def _in_unit(row: Difference, figure: Estimate) -> Estimate:
    """Return a figure that is not shown as a percentage with the unit of its metric."""
    return figure if _is_fraction(row) else replace(figure, unit="metric")


def _needed(row: Difference) -> Estimate:
    reason = "the models do not differ, and there is no margin"
    return Estimate(row.needed, reason=reason if row.verdict == "open" else "nothing is open")


def verdict_text(row: Difference) -> str:
    """Return the verdict, with the margin if it depends on one."""
    if row.margin is None or "equivalent" not in row.verdict:
        return row.verdict
    margin = f"{points(row.margin)} pp" if _is_fraction(row) else three_digits(row.margin)
    return f"{row.verdict} (within {margin})"


def comparison_table(comparison: Comparison) -> Table:
    """Build the table of all differences."""
    is_single = len({row.model for row in comparison.differences}) == 1
    second = comparison.differences[0].model if is_single else "other model"
    columns: tuple[Column[Difference], ...] = (
        Column("model", "text", lambda row: row.model),
        Column("benchmark", "text", lambda row: row.benchmark),
        Column("metric", "text", lambda row: row.metric),
        Column("documents", "count", lambda row: row.n),
        Column(comparison.models[0].name, "percent", partial(_level, name="first"), name="first"),
        Column(second, "percent", partial(_level, name="second"), name="second"),
        Column("won", "count", lambda row: row.won),
        Column("lost", "count", lambda row: row.lost),
        Column("difference", "points", _change),
        Column("p", "p", lambda row: row.difference.p_value, "not 0 or 1 for every document"),
        Column("choice probability", "points", lambda row: row.choice),
        Column("verdict", "text", verdict_text),
        Column("documents to settle", "count", _needed),
    )
    rows = comparison.differences
    note = COLUMN_NOTE.format(first=comparison.models[0].name, count=len(rows))
    notes = (note, *comparison.notes)
    return build_table("", columns[is_single:], rows, *notes, header=0 if is_single else 1)


def sentences(comparison: Comparison) -> list[str]:
    """Return one sentence for each model, and one about the gate."""
    lines = []
    for model, rows in group_by(comparison.differences, lambda row: row.model).items():
        has_metrics = len({row.metric for row in rows}) > 1
        names = {
            verdict: join_words(
                [
                    f"{row.benchmark} ({row.metric})" if has_metrics else row.benchmark
                    for row in group
                ]
            )
            for verdict, group in group_by(rows, verdict_text).items()
        }
        texts = [f"{verdict} on {benchmarks}" for verdict, benchmarks in names.items()]
        lines.append(f"{model} compared with {comparison.models[0].name}: {'; '.join(texts)}.")
    if comparison.is_gate:
        lines.append(_GATE[comparison.exit_code].format(_needed_text(comparison)))
    return lines


_GATE = {
    0: "Gate passed.",
    WORSE_CODE: "Gate not passed: a model is worse.",
    OPEN_CODE: "Gate open: the documents are too few to decide{}.",
}
"""Exit code → sentence about the gate."""


def _needed_text(comparison: Comparison) -> str:
    counts = [row.needed for row in comparison.differences if row.needed]
    return f"; about {max(counts):,} documents of a benchmark would" if counts else ""


def write_json(comparison: Comparison) -> str:
    """Write all figures as JSON, as fractions and without texts of documents."""
    names = [model.name for model in comparison.models]
    rows = [asdict(row) for row in comparison.differences]
    content = {"models": names, "differences": rows, "notes": comparison.notes}
    content |= {"unmatched": comparison.unmatched, "exit_code": comparison.exit_code}
    return json.dumps(content, indent=2, ensure_ascii=False, default=int) + "\n"


def write_markdown(comparison: Comparison) -> str:
    """Write sentences and table as Markdown, e.g. for a comment on a pull request."""
    lines = map(escape_markdown, sentences(comparison))
    return "\n\n".join([*lines, markdown_table(comparison_table(comparison)).strip()]) + "\n"


def write_html(comparison: Comparison) -> str:
    """Write sentences, table and lost documents as a page that needs no network."""
    models = {model.name: model for model in comparison.models}
    first = comparison.models[0]
    tables = [
        build_table(
            f"{row.model} loses {row.lost} documents of {row.benchmark} ({row.metric})",
            [
                Column(name, "text", itemgetter(i))
                for i, name in enumerate((*_TEXTS, first.name, row.model))
            ],
            [
                (f"{task} {doc}", text.question, text.target, text.answer, other.answer)
                for task, doc, other_doc in row.lost_documents[:MAX_LOST]
                for text in [first.benchmarks[row.benchmark].read_text(task, doc)]
                for other in [
                    models[row.model].benchmarks[row.benchmark].read_text(task, other_doc)
                ]
            ],
        )
        for row in comparison.differences
        if row.lost
    ]
    return render_comparison(sentences(comparison), comparison_table(comparison), tables)


def build_page(comparison: Comparison, folder: Path) -> Page:
    """Write the page into a folder; return it with the table, for a tracking backend."""
    path = folder / "comparison.html"
    write_text(path, write_html(comparison))
    table = comparison_table(comparison)
    text = "\n\n".join(map(escape_markdown, (*sentences(comparison), *table.notes)))
    return Page([path], {"differences": logged_table(table)}, [], text, name="comparison")


WRITERS: Mapping[str, Callable[[Comparison], str]] = {
    "text": write_markdown,
    "md": write_markdown,
    "json": write_json,
    "html": write_html,
}
"""Format → function that writes it."""
