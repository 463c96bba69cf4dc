"""Write a comparison as text, Markdown, JSON or a page."""

from __future__ import annotations

import json
from collections.abc import Callable, Hashable, Mapping
from dataclasses import asdict, replace
from operator import itemgetter
from pathlib import Path
from typing import Any

import pandas as pd

from tracker.comparison.verdicts import OPEN_CODE, WORSE_CODE, Difference, ModelComparison
from tracker.ledger.files import write_text
from tracker.report.export import markdown_table
from tracker.report.page.html import render_comparison
from tracker.schema.formats import join_words, points, three_digits
from tracker.schema.grouping import group_by
from tracker.schema.tables import Column, Table, build_table
from tracker.schema.text import escape_markdown
from tracker.tracking.base import Page
from tracker.tracking.figures import logged_table

MAX_LOST = 30
"""Maximum number of lost documents of a model and metric on a page."""
COLUMN_NOTE = (
    "Each row compares another model with {first} on the same documents. A positive difference "
    "means that the other model is better than {first}. All {count} intervals are simultaneous "
    "(95 %, Bonferroni). p is from McNemar's exact test, not corrected for several tests."
)


def verdict_text(row: Difference) -> str:
    """Return the verdict as text; a verdict of equivalence includes the margin."""
    if row.margin is None or "equivalent" not in row.verdict:
        return row.verdict
    margin = three_digits(row.margin) if row.first.unit else f"{points(row.margin)} pp"
    return f"{row.verdict} (within {margin})"


def comparison_table(comparison: ModelComparison) -> Table:
    """Build the table of all differences between models, with verdicts."""
    rows, first = comparison.differences, comparison.models[0].name
    has_models = len(comparison.models) > 2
    second = "other model" if has_models else comparison.models[1].name
    columns: tuple[Column[Difference], ...] = (
        Column("model", "text", lambda row: row.model),
        Column("benchmark", "text", lambda row: row.benchmark),
        Column("metric", "text", lambda row: row.metric),
        Column("verdict", "text", verdict_text),
        Column("documents", "count", lambda row: row.n),
        Column(first, "percent", lambda row: replace(row.first, low=None), name="first"),
        Column(second, "percent", lambda row: replace(row.second, low=None), name="second"),
        Column("won", "count", lambda row: row.won),
        Column("lost", "count", lambda row: row.lost),
        Column("difference", "points", lambda row: row.difference),
        Column("p", "p", lambda row: row.difference.p_value, "not 0 or 1 for every document"),
        Column("choice probability", "points", lambda row: row.choice),
        Column("documents to settle", "count", lambda row: row.needed, "settled, or no margin"),
    )
    notes = (COLUMN_NOTE.format(first=first, count=len(rows)), *comparison.notes)
    return build_table("", columns[not has_models :], rows, *notes, header=int(has_models))


def sentences(comparison: ModelComparison) -> list[str]:
    """Return a sentence for each compared model, with the verdicts on the model.

    If the user gave a margin, a last sentence states whether all models are within the margins.
    """
    lines = []
    for model, rows in group_by(comparison.differences, lambda row: row.model).items():
        texts = [
            f"{verdict} on {join_words([f'{row.benchmark} ({row.metric})' for row in group])}"
            for verdict, group in group_by(rows, verdict_text).items()
        ]
        lines.append(f"{model} compared with {comparison.models[0].name}: {'; '.join(texts)}.")
    return lines + ([_GATE[comparison.exit_code]] if comparison.is_gate else [])


_GATE = {
    0: "Gate passed.",
    WORSE_CODE: "Gate not passed: a model is worse.",
    OPEN_CODE: "Gate undecided: the results do not show whether a model is worse.",
}
"""Exit code → sentence about the gate."""


def write_json(comparison: ModelComparison) -> str:
    """Write all figures as JSON; metrics are fractions, and document texts are left out."""
    names = [model.name for model in comparison.models]
    rows = [asdict(row) for row in comparison.differences]
    content = {"models": names, "differences": rows, "notes": comparison.notes}
    content |= {"unmatched": comparison.unmatched, "exit_code": comparison.exit_code}
    return json.dumps(content, indent=2, ensure_ascii=False, default=int) + "\n"


def write_markdown(comparison: ModelComparison) -> str:
    """Write sentences and table as Markdown, e.g. for a comment on a pull request."""
    lines = map(escape_markdown, sentences(comparison))
    return "\n\n".join([*lines, markdown_table(comparison_table(comparison)).strip()]) + "\n"


def write_html(comparison: ModelComparison) -> str:
    """Write sentences, table and lost documents as a page that needs no network."""
    tables = [_lost_table(comparison, row) for row in comparison.differences if row.lost]
    return render_comparison(sentences(comparison), comparison_table(comparison), tables)


def _lost_table(comparison: ModelComparison, row: Difference) -> Table:
    """Build the table of documents on which the first model is better than another model.

    The table has the answers of both models, and at most `MAX_LOST` documents.
    """
    models = {model.name: model for model in comparison.models}
    names = (comparison.models[0].name, row.model)
    tables = (models[name].benchmarks[row.benchmark].table for name in names)
    first, second = ({(d["task"], d["doc"]): d for d in t.to_dict("records")} for t in tables)
    lines = []
    for task, doc, second_doc in row.lost_documents[:MAX_LOST]:
        document, other = first[task, doc], second[task, second_doc]
        target = _option_text(document, "gold", "answer")
        answers = [_option_text(model, "choice", "text") for model in (document, other)]
        lines.append((f"{task} {doc}", document["question"], target, *answers))
    title = f"{row.model} is worse on {row.lost} documents of {row.benchmark} ({row.metric})"
    labels = enumerate(("document", "question", "right answer", *names))
    return build_table(title, [Column(n, "text", itemgetter(i)) for i, n in labels], lines)


def _option_text(document: Mapping[Hashable, Any], number: str, text: str) -> str:
    """Return the text of the right or the chosen answer option of a document.

    Args:
        document: The document's row in a model's table of answers.
        number: Name of the column with the number of the option.
        text: Name of the column with the answer, for documents without options.

    Returns:
        The text.
    """
    options, index = document["choices"], document[number]
    if 0 <= index < len(options):
        return str(options[int(index)]).strip()
    return "" if pd.isna(document[text]) else str(document[text])


def build_page(comparison: ModelComparison, folder: Path) -> Page:
    """Write the comparison's page into a folder.

    Returns what a tracking backend uploads: the page and the table of differences.
    """
    path = folder / "comparison.html"
    write_text(path, write_html(comparison))
    table = comparison_table(comparison)
    text = "\n\n".join(map(escape_markdown, (*sentences(comparison), *table.notes)))
    return Page([path], {"differences": logged_table(table)}, [], text, name="comparison")


WRITERS: Mapping[str, Callable[[ModelComparison], str]] = {
    "text": write_markdown,
    "md": write_markdown,
    "json": write_json,
    "html": write_html,
}
"""Format → function that writes it."""
