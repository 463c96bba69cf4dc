"""Flatten records into metrics, curves and tables for all backends."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from tracker.core import run_table
from tracker.core.answers import interval_name, statement
from tracker.core.changes import Change
from tracker.core.decision_records import DecisionsRecord
from tracker.core.formats import is_finite
from tracker.core.kinds import KIND_STYLES
from tracker.core.proxies import PROXY_FIGURES
from tracker.core.records import AnswerRecord, CellRecord, RunRecord
from tracker.core.tables import Table, build_table

CURVES = (
    "accuracy",
    "accuracy_drop",
    "accuracy_drop_low",
    "accuracy_drop_high",
    "accuracy_relevance",
    *PROXY_FIGURES,
    "gold_logprob_drop",
)
"""Figures of a `RunRecord` that a cell's run shows as curves over the layers."""
_KINDS = "|".join(f"{word}/" for word in KIND_STYLES if word != "layer")
_PARTS = r"\d+/|[A-Za-z_][\w.]*/"
_CURVE_PATTERN = re.compile(rf"(({_KINDS})({_PARTS})?)?(x\d+/)?(span\d+/)?({'|'.join(CURVES)})")
_RUN_FIGURES = (*CURVES, "mcnemar_p", "rounded", "drop_rounding")
TableValue = str | int | float | None


@dataclass(frozen=True)
class LoggedTable:
    """Table that a backend shows, as rows of values; undefined values are None."""

    columns: tuple[str, ...]
    rows: tuple[tuple[TableValue, ...], ...]


def tracked_name(name: str) -> str:
    """Convert a metric's name to a form that every backend accepts.

    The comma before the filter in lm-eval's names becomes `/`. Characters that MLflow refuses
    become `_`.
    """
    folders = "/".join(part for part in name.split(",") if part)
    return re.sub(r"[^\w./ -]", "_", folders, flags=re.ASCII)


def curve_name(run: Change, figure: str) -> str:
    """Return the name of the curve to which a run's figure belongs; the figure is in `CURVES`.

    For whole single layers this is the figure's name. Other names are `attention/accuracy_drop`,
    `span4/accuracy_drop`, `head/3/accuracy_drop`, `int4/mlp.down_proj/accuracy_drop` or
    `repeat/x3/span4/accuracy_drop`.
    """
    component = "" if run.kind.word == "layer" else f"{run.kind.word}/"
    number = "" if run.kind.part is None else f"{run.kind.part}/"
    repeats = "" if run.repeats == 2 else f"x{run.repeats}/"
    span = "" if run.span == 1 else f"span{run.span}/"
    return f"{component}{number}{repeats}{span}{figure}"


def is_curve(name: str) -> bool:
    """Check whether a metric's name has the form of `curve_name`."""
    return _CURVE_PATTERN.fullmatch(name) is not None


def defined_figures(values: Mapping[str, float | None]) -> dict[str, float]:
    """Return the figures whose values are defined and finite."""
    return {name: float(value) for name, value in values.items() if is_finite(value)}


def run_metrics(layer: RunRecord) -> dict[str, float]:
    """Return the defined figures of a run by name; metrics of the benchmark are `metric/NAME`.

    Values are fractions, or a loss and its increase in the metric's own unit; `gold_logprob_drop`
    is in nats.
    """
    values = {name: layer.figure(name) for name in _RUN_FIGURES}
    values |= {f"metric/{name}": value for name, value in layer.metrics.items()}
    return {"n": float(layer.n), **defined_figures(values)}


def intact_metrics(cell: CellRecord) -> dict[str, float]:
    """Return the figures of a cell's starting model, with the same names as figures of runs.

    The drop of the intact model is 0 by definition. Undefined figures are left out.
    """
    baseline, chance = cell.baseline.value, cell.chance_accuracy
    values: dict[str, float | None] = {"n": float(cell.n)}
    if cell.removed:
        remaining = cell.remaining.value
        values["accuracy"] = remaining
        if baseline is not None and remaining is not None:
            sign = 1 if cell.higher_is_better else -1
            values["accuracy_drop"] = sign * (baseline - remaining)
        return defined_figures(values)
    values["accuracy"] = baseline
    if baseline is not None:
        values["accuracy_drop"] = 0.0
        if chance is not None and baseline > chance:
            values["accuracy_relevance"] = 0.0
    metrics = {f"metric/{name}": value for name, value in cell.baseline_metrics.items()}
    return defined_figures(values | metrics)


def cell_figures(cell: CellRecord) -> dict[str, float | None]:
    """Return the figures of the cell itself by name; undefined figures are None.

    Values are fractions, or a loss in the metric's own unit. Correlations are named
    `spearman/cosine_score/all`.
    """
    names = [
        *("n", "tokens", "seconds", "peak_bytes", "compared", "compared_difference"),
        *("removed_accuracy", "removed_low", "removed_high", "chance_accuracy"),
        *(f"baseline_{word}" for word in ("accuracy", "low", "high", "rounded", "rounding")),
    ]
    return {
        **{name: cell.figure(name) for name in names},
        **(answer_figures(cell.answer) if cell.answer else {}),
        **{f"baseline_metric/{name}": value for name, value in cell.baseline_metrics.items()},
        **{f"{c.coefficient}/{c.proxy}/{c.subset}": c.estimate.value for c in cell.correlations},
    }


def answer_figures(answer: AnswerRecord) -> dict[str, float | None]:
    """Return the figures about the cost of an answer, by name."""
    return {
        "answer/answered": float(answer.answered),
        "answer/documents": answer.measured,
        "answer/documents_of": answer.population,
        "answer/layer_passes": answer.passes,
        "answer/layer_passes_of": answer.passes_of,
    }


def question_tags(cell: CellRecord, run: Change | None = None) -> dict[str, str]:
    """Return the tags of a cell with a question, or of one of its runs.

    Args:
        cell: The cell.
        run: The run; None for the cell or its intact model.

    Returns:
        Names and values in the terms of the experiment file; empty without a question.
    """
    answer = cell.answer
    if answer is None:
        return {}
    tags = {
        "until": answer.question,
        "answered": _format_boolean(answer.answered),
        "stopped": _format_boolean(cell.is_stopped),
        "looked": f"{answer.looked} of {answer.population}",
        "interval": interval_name(cell),
    }
    if run is None:
        return tags | {"answer": statement(answer)}
    for decision in answer.runs:
        if decision.change == run:
            tags["open"] = _format_boolean(decision.open)
            tags["chosen"] = _format_boolean(decision.chosen)
    return tags


def _format_boolean(value: bool) -> str:
    """Format a boolean for tags."""
    return "true" if value else "false"


def logged_table(table: Table) -> LoggedTable:
    """Convert a table to the form that backends take."""
    names, rows = table.plain()
    return LoggedTable(names, tuple(rows))


def logged_layers(cell: CellRecord) -> LoggedTable:
    """Build the table of a cell's runs: one row per run.

    `layer` is a run's first layer, 0-based, and `reasons` explains undefined values.
    """
    run_columns = run_table.run_columns(cell)
    names = ("layer", "component", "span", "intervention", "ablation", "n", *_RUN_FIGURES)
    metrics = run_table.metric_columns([cell], "metric/")
    picked = run_table.pick_columns(run_columns, *names)
    columns = [*picked, *metrics, run_columns["reasons"]]
    return logged_table(build_table(cell.title, columns, run_table.measured_runs([cell])))


def logged_correlations(cell: CellRecord) -> LoggedTable:
    """Build the table of correlations: one row per proxy, coefficient and subset of layers."""
    names = ("proxy", "coefficient", "subset", "value", "low", "high", "p_value")
    columns = run_table.correlation_columns()
    picked = run_table.pick_columns(columns, *names, "n", "documents", "reason")
    rows = [(cell, record) for record in cell.correlations]
    return logged_table(build_table(cell.title, picked, rows))


def logged_documents(decisions: DecisionsRecord) -> LoggedTable:
    """Build the table of lost and won documents whose margins change most: one row per document.

    `choice` and `gold` are options, 0-based; `margin` is in nats, as in `DecisionsRecord`.
    """
    question_columns = ("task", "document", "question", "choices", "gold", "answer")
    change_columns = ("layer", "component", "span", "intervention")
    answer_columns = ("choice_intact", "choice", "text_intact", "text", "margin_intact", "margin")
    rows: list[tuple[TableValue, ...]] = []
    for run in decisions.runs:
        change = tuple(getattr(run.run, name) for name in change_columns)
        for rank, answer in enumerate(run.named):
            document = decisions.documents[answer.document]
            outcome = "lost" if rank < run.named_lost else "won"
            choices = "\n".join(document.choices) or None
            question = (document.task, document.doc, document.question, choices, document.gold)
            choice, text = (document.choice, answer.choice), (document.text, answer.text)
            answers = (*choice, *text, document.margin, answer.margin)
            rows.append((*question, document.answer, *change, outcome, *answers))
    return LoggedTable((*question_columns, *change_columns, "change", *answer_columns), tuple(rows))
