"""Convert results to metrics, curves and tables, in a form that all backends accept."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from tracker.schema import run_table
from tracker.schema.answers import interval_name, statement
from tracker.schema.changes import Change
from tracker.schema.formats import is_finite
from tracker.schema.kinds import KIND_STYLES
from tracker.schema.proxies import PROXY_FIGURES
from tracker.schema.records import (
    AnswerRecord,
    CellRecord,
    CorrelationRecord,
    DecisionsRecord,
    RunRecord,
)
from tracker.schema.tables import Table, build_table

CURVES = (
    "accuracy",
    "accuracy_drop",
    "accuracy_drop_low",
    "accuracy_drop_high",
    "accuracy_relevance",
    *PROXY_FIGURES,
    *("choice_probability_drop", "gold_logprob_drop"),
)
"""Figures of a `RunRecord` that a cell's run shows as curves over the layers."""
_KINDS = "|".join(f"{word}/" for word in KIND_STYLES if word != "layer")
_PARTS = r"\d+/|[A-Za-z_][\w.]*/"
_CURVE_PATTERN = re.compile(rf"(({_KINDS})({_PARTS})?)?(x\d+/)?(span\d+/)?({'|'.join(CURVES)})")
_RUN_FIGURES = (*CURVES, "mcnemar_p", "rounded", "drop_rounding")
TableValue = str | int | float | None


@dataclass(frozen=True)
class LoggedTable:
    """Table with column names and rows of plain values, which every backend accepts."""

    columns: tuple[str, ...]
    rows: tuple[tuple[TableValue, ...], ...]


def tracked_name(name: str) -> str:
    """Convert a metric's name to a form that every backend accepts.

    In metric names of lm-eval (`acc,none`), the comma before the filter becomes `/`. Characters
    that MLflow does not accept become `_`.
    """
    folders = "/".join(part for part in name.split(",") if part)
    return re.sub(r"[^\w./ -]", "_", folders, flags=re.ASCII)


def curve_name(run: Change, figure: str) -> str:
    """Return the name of the curve that shows a metric of an ablation.

    A curve shows a metric against the layer. For removals of whole layers, the curve has the name
    of the metric, such as `accuracy_drop`. For other ablations, the name has a prefix, as in
    `head/3/accuracy_drop` (head 3) or `span4/accuracy_drop` (four layers).
    """
    component = "" if run.kind.word == "layer" else f"{run.kind.word}/"
    number = "" if run.kind.part is None else f"{run.kind.part}/"
    repeats = "" if run.repeats == 2 else f"x{run.repeats}/"
    span = "" if run.span == 1 else f"span{run.span}/"
    return f"{component}{number}{repeats}{span}{figure}"


def is_curve(name: str) -> bool:
    """Return whether a metric has the name of a curve, as `curve_name` returns it."""
    return _CURVE_PATTERN.fullmatch(name) is not None


def defined_figures(values: Mapping[str, float | None]) -> dict[str, float]:
    """Return only the finite values, without None, NaN and infinite values."""
    return {name: float(value) for name, value in values.items() if is_finite(value)}


def run_metrics(layer: RunRecord) -> dict[str, float]:
    """Return the defined metrics of an ablation by name.

    The metrics of lm-eval have names with a prefix: `metric/NAME`. Accuracies and drops are
    fractions. If the metric is a loss, `accuracy` and `accuracy_drop` are the loss and its
    increase. `gold_logprob_drop` is in nats.
    """
    values = {name: layer.figure(name) for name in _RUN_FIGURES}
    values |= {f"metric/{name}": value for name, value in layer.metrics.items()}
    return {"n": float(layer.n), **defined_figures(values)}


def intact_metrics(cell: CellRecord) -> dict[str, float]:
    """Return the metrics of the unablated model, under the names that `run_metrics` uses.

    The layers in `cell.removed` are removed even from the unablated model. If `cell.removed` is
    empty, the accuracy drop is 0. Undefined metrics are left out.
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
    """Return the summary metrics of a model and benchmark; undefined metrics are None.

    Accuracies are fractions.
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
        **{correlation_name(c): c.estimate.value for c in cell.correlations},
    }


def correlation_name(record: CorrelationRecord) -> str:
    """Return the name under which backends show a correlation.

    An example is `spearman/cosine_score/all`.
    """
    sample = [record.sample.replace(" ", "_")] * (record.sample not in ("layer", "expert"))
    return "/".join([record.coefficient, record.proxy, *sample, record.subset])


def answer_figures(answer: AnswerRecord) -> dict[str, float | None]:
    """Return metrics about the progress of a measurement with the stopping rule `until`.

    The metrics are: whether the question is answered; numbers of used and of available documents;
    numbers of computed and of all layer passes.
    """
    return {
        "answer/answered": float(answer.answered),
        "answer/documents": answer.measured,
        "answer/documents_of": answer.population,
        "answer/layer_passes": answer.passes,
        "answer/layer_passes_of": answer.passes_of,
    }


def question_tags(cell: CellRecord, run: Change | None = None) -> dict[str, str]:
    """Describe the stopping rule `until` and its answer as tags.

    Args:
        cell: The record of the cell.
        run: The ablation; None for the summary run and for the intact model.

    Returns:
        Name → value of each tag; empty if the setting `until` is not set.
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
    """Format a boolean as `true` or `false`, as backends expect in tags."""
    return "true" if value else "false"


def logged_table(table: Table) -> LoggedTable:
    """Convert a table of a report to column names and rows of plain values."""
    names, rows = table.plain()
    return LoggedTable(names, tuple(rows))


def logged_layers(cell: CellRecord) -> LoggedTable:
    """Build the table of the ablations of a model and benchmark, one row per ablation.

    The column `layer` is the first changed layer (0-based); the column `reasons` gives the reason
    for each undefined value.
    """
    run_columns = run_table.run_columns(cell)
    names = ("layer", "component", "span", "intervention", "ablation", "n", *_RUN_FIGURES)
    metrics = run_table.metric_columns([cell], "metric/")
    left_out = run_table.unobserved_columns([cell])
    picked = run_table.pick_columns(run_columns, *(n for n in names if n not in left_out))
    columns = [*picked, *metrics, run_columns["reasons"]]
    return logged_table(build_table(cell.title, columns, run_table.measured_runs([cell])))


def logged_correlations(cell: CellRecord) -> LoggedTable:
    """Build the table of correlations between proxies (such as the cosine score) and drops."""
    names = ("proxy", "sample", "coefficient", "subset", "value", "low", "high", "p_value")
    columns = run_table.correlation_columns()
    picked = run_table.pick_columns(columns, *names, "n", "documents", "reason")
    rows = [(cell, record) for record in cell.correlations]
    return logged_table(build_table(cell.title, picked, rows))


def logged_documents(decisions: DecisionsRecord) -> LoggedTable:
    """Build the table of documents whose answer an ablation makes wrong or right.

    Only the documents with the largest change of the margin are included. `choice` and `gold` are
    numbers of answer options (0-based); `margin` is in nats.
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
