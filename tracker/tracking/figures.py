"""Flatten records into metrics, curves and tables for all backends."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from tracker.core.answers import interval_name, statement
from tracker.core.changes import Change
from tracker.core.decision_records import DecisionsRecord
from tracker.core.formats import defined
from tracker.core.kinds import KINDS
from tracker.core.proxies import FIGURES
from tracker.core.records import AnswerRecord, CellRecord, RunRecord
from tracker.core.run_table import correlation_columns, metric_columns, pick, run_columns, runs_of
from tracker.core.tables import Table, table

CURVES = (
    "accuracy",
    "accuracy_drop",
    "accuracy_drop_low",
    "accuracy_drop_high",
    "accuracy_relevance",
    *FIGURES,
    "gold_logprob_drop",
)
"""Figures of a `RunRecord` that a cell's run shows as curves over the layers."""
_KINDS = "|".join(f"{word}/" for word in KINDS if word != "layer")
_PART = r"\d+/|[A-Za-z_][\w.]*/"
_CURVE = re.compile(rf"(({_KINDS})({_PART})?)?(x\d+/)?(span\d+/)?({'|'.join(CURVES)})")
_LAYER_VALUES = (*CURVES, "mcnemar_p", "rounded", "drop_rounding")
Scalar = str | int | float | None


@dataclass(frozen=True)
class LoggedTable:
    """Rows that a backend shows as a table; undefined values are None."""

    columns: tuple[str, ...]
    rows: tuple[tuple[Scalar, ...], ...]


def metric_name(name: str) -> str:
    """Return a metric's name in a form that every backend accepts.

    The comma before the filter in lm-eval's names becomes `/`. Characters that MLflow refuses
    become `_`.
    """
    folders = "/".join(part for part in name.split(",") if part)
    return re.sub(r"[^\w./ -]", "_", folders, flags=re.ASCII)


def curve_name(run: Change, figure: str) -> str:
    """Return the name of the curve of a run's figure, which is one of `CURVES`.

    For whole single layers it is the figure's name. Others are `attention/accuracy_drop`,
    `span4/accuracy_drop`, `head/3/accuracy_drop`, `int4/mlp.down_proj/accuracy_drop` or
    `repeat/x3/span4/accuracy_drop`.
    """
    component = "" if run.kind.word == "layer" else f"{run.kind.word}/"
    number = "" if run.kind.part is None else f"{run.kind.part}/"
    times = "" if run.repeats == 2 else f"x{run.repeats}/"
    span = "" if run.span == 1 else f"span{run.span}/"
    return f"{component}{number}{times}{span}{figure}"


def is_curve(name: str) -> bool:
    """Check whether a metric's name has the form of `curve_name`."""
    return _CURVE.fullmatch(name) is not None


def only_defined(values: Mapping[str, float | None]) -> dict[str, float]:
    """Return the values that are defined and finite."""
    return {name: float(value) for name, value in values.items() if defined(value)}


def flat_metrics(layer: RunRecord) -> dict[str, float]:
    """Return a run's defined figures by name; the benchmark's metrics are `metric/NAME`.

    Values are fractions, or a loss and its increase in the metric's own unit; `gold_logprob_drop`
    is in nats.
    """
    values = {name: layer.figure(name) for name in _LAYER_VALUES}
    values |= {f"metric/{name}": value for name, value in layer.metrics.items()}
    return {"n": float(layer.n), **only_defined(values)}


def intact_metrics(cell: CellRecord) -> dict[str, float]:
    """Return the figures of the model that a cell's runs start from, in the form of a run.

    The drop of the intact model is 0 by definition. Undefined figures are left out.
    """
    base, chance = cell.baseline.value, cell.chance_accuracy
    if cell.removed:
        left = cell.remaining.value
        sign = 1 if cell.higher_is_better else -1
        drop = None if base is None or left is None else sign * (base - left)
        return {"n": float(cell.n), **only_defined({"accuracy": left, "accuracy_drop": drop})}
    values = {
        "accuracy": base,
        "accuracy_drop": None if base is None else 0.0,
        "accuracy_relevance": None if base is None or chance is None or base <= chance else 0.0,
        **{f"metric/{name}": value for name, value in cell.baseline_metrics.items()},
    }
    return {"n": float(cell.n), **only_defined(values)}


def cell_figures(cell: CellRecord) -> dict[str, float | None]:
    """Return the figures of the cell itself by name; undefined ones are None.

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
    """Return an answer's cost as figures by name."""
    return {
        "answer/answered": float(answer.answered),
        "answer/documents": answer.measured,
        "answer/documents_of": answer.population,
        "answer/layer_passes": answer.passes,
        "answer/layer_passes_of": answer.passes_of,
    }


def until_marks(cell: CellRecord, run: Change | None = None) -> dict[str, str]:
    """Return the tags of a cell with a question, or of one of its runs.

    Args:
        cell: The cell.
        run: The run; None for the cell, or its intact model.

    Returns:
        Names and values in the terms of the experiment file; empty without a question.
    """
    answer = cell.answer
    if answer is None:
        return {}
    marks = {
        "until": answer.question,
        "answered": _yes(answer.answered),
        "stopped": _yes(cell.is_stopped),
        "looked": f"{answer.looked} of {answer.population}",
        "interval": interval_name(cell),
    }
    if run is None:
        return marks | {"answer": statement(answer)}
    for decided in answer.runs:
        if decided.change == run:
            marks |= {"open": _yes(decided.open), "chosen": _yes(decided.chosen)}
    return marks


def _yes(value: bool) -> str:
    return "true" if value else "false"


def logged(made: Table) -> LoggedTable:
    """Convert a table for backends."""
    names, rows = made.plain()
    return LoggedTable(names, tuple(rows))


def logged_layers(cell: CellRecord) -> LoggedTable:
    """Build the table of the runs, one per row.

    `layer` is a run's first layer, 0-based, and `reasons` explains undefined values.
    """
    columns = run_columns(cell)
    which = ("layer", "component", "span", "intervention", "ablation", "n")
    metrics = metric_columns([cell], "metric/")
    picked = [*pick(columns, *which, *_LAYER_VALUES), *metrics, columns["reasons"]]
    return logged(table(cell.title, picked, runs_of([cell])))


def logged_correlations(cell: CellRecord) -> LoggedTable:
    """Build the table of correlations: one row per proxy, coefficient and subset of layers."""
    names = ("proxy", "coefficient", "subset", "value", "low", "high", "p_value")
    columns = pick(correlation_columns(), *names, "n", "documents", "reason")
    return logged(table(cell.title, columns, [(cell, record) for record in cell.correlations]))


def logged_documents(decided: DecisionsRecord) -> LoggedTable:
    """Build the table of lost and won documents whose margin changes most, one per row.

    `choice` and `gold` are options, 0-based; `margin` is in nats, as in `DecisionsRecord`.
    """
    question_columns = ("task", "document", "question", "choices", "gold", "answer")
    which = ("layer", "component", "span", "intervention")
    answer_columns = ("choice_intact", "choice", "text_intact", "text", "margin_intact", "margin")
    columns = (*question_columns, *which, "change", *answer_columns)
    rows: list[tuple[Scalar, ...]] = []
    for run in decided.runs:
        place = tuple(getattr(run.run, name) for name in which)
        for number, after in enumerate(run.named):
            doc = decided.documents[after.document]
            change = "lost" if number < run.named_lost else "won"
            question = (doc.task, doc.doc, doc.question, "\n".join(doc.choices) or None)
            answers = (doc.choice, after.choice, doc.text, after.text, doc.margin, after.margin)
            rows.append((*question, doc.gold, doc.answer, *place, change, *answers))
    return LoggedTable(columns, tuple(rows))
