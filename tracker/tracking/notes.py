"""What a run says of itself in a few words of Markdown, alike in every backend."""

from __future__ import annotations

from tracker.core.answers import interval_name, statement
from tracker.core.formats import counted, interval, measure_of
from tracker.core.kinds import REPLACED_BY
from tracker.core.records import WHOLE_LAYER, CellRecord, RunRecord
from tracker.core.text import as_markdown
from tracker.stats.support import together, verdicts
from tracker.tracking.identity import intact_name, run_name


def cell_note(cell: CellRecord) -> str:
    """Say what the run of a cell shows.

    Args:
        cell: The cell.

    Returns:
        A paragraph.
    """
    measured, values = "accuracy loses", "Values are fractions"
    if not cell.higher_is_better:
        measured = "loss gains"
        values = "`accuracy` is the loss and `accuracy_drop` its increase, in the metric's own unit"
    return (
        f"**{as_markdown(cell.heading)}**: what the benchmark's {measured} (`{cell.metric}`, "
        f"{cell.documents}) when {_what_is_removed(cell)}, beside the cheap proxies. The step "
        f"of every curve is the 0-based layer. {values}; `gold_logprob_drop` is in nats."
        + (f"\n\n{statement(cell.answer)}." if cell.answer else "")
    )


def intact_note(cell: CellRecord) -> str:
    """Say what the run of the intact model shows.

    Args:
        cell: The cell.

    Returns:
        A paragraph.
    """
    on = cell.documents_of(f"{cell.n:,}")
    if cell.removed:
        return (
            f"**{as_markdown(intact_name(cell))}**: `{cell.metric}` on {on} of the model that "
            "every run of the benchmark takes more of; its drop, as theirs, is from the intact "
            "model."
        )
    return (
        f"**{as_markdown(intact_name(cell))}**: `{cell.metric}` of the whole model on {on}: what "
        "the runs without some of its layers are compared with."
        + _rounding(cell, cell.baseline_rounded, cell.n, cell.baseline_rounding, "it")
    )


def layer_note(cell: CellRecord, run: RunRecord) -> str:
    """Say what the run of an ablation shows.

    Args:
        cell: The cell.
        run: One of its runs.

    Returns:
        A paragraph.
    """
    done = REPLACED_BY.get(run.intervention)
    how = f"with the layer replaced by {done}" if done else "without it"
    on = cell.documents_of(f"{run.n:,}")
    what = f"**{as_markdown(run_name(cell, run))}**: `{cell.metric}` on {on} {how}"
    if run.accuracy_drop is None:
        return f"{what}; its drop is not defined: {run.reasons.get('accuracy_drop', 'no reason')}."
    measure, falls = measure_of(cell), (run.accuracy_drop >= 0) == cell.higher_is_better
    low, high = run.accuracy_drop_low, run.accuracy_drop_high
    if run.accuracy_drop < 0:
        low, high = (None if end is None else -end for end in (high, low))
    by = f"{measure.write(abs(run.accuracy_drop))} {measure.unit}"
    between = interval(low, high, measure.write)
    between = f" ({interval_name(cell)} {between})" if between else ""
    chance = f", which may be chance among {counted(len(cell.runs), 'run')}"
    text = f"{what}; it {'falls' if falls else 'rises'} by {by}{between}"
    text += f"{'' if _is_shown(cell, run) else chance}."
    if not cell.higher_is_better:
        return text
    return text + _rounding(cell, run.rounded, run.n, run.drop_rounding, "the fall")


def _is_shown(cell: CellRecord, run: RunRecord) -> bool:
    """Whether it is shown that a run changes anything, among all runs of its cell at once."""
    drops = [one.drop for one in cell.runs]
    if not cell.is_raced:
        drops = together(drops, [one.n for one in cell.runs])
    return verdicts(drops)[cell.runs.index(run)] != "open"


def _rounding(
    cell: CellRecord, count: int | None, documents: int, moved: float | None, what: str
) -> str:
    """Say how many documents half precision decides by rounding; begins with a space."""
    if count is None or moved is None:
        return ""
    return (
        f" {cell.model.dtype} decides up to {count:,} of these {documents:,} documents by "
        f"rounding: another batch size moves {what} by ± {100 * moved:.1f} percentage points."
    )


def _what_is_removed(cell: CellRecord) -> str:
    """Say it in the words of the note, with the names of the curves where there are several."""
    kinds = dict.fromkeys(run.kind for run in cell.runs)
    if all(kind == WHOLE_LAYER for kind in kinds):
        text = "one layer is removed"
    else:
        text = (
            "one layer is removed, or its attention or MLP alone (curves `attention/…`, `mlp/…`), "
            "or several layers from a first one on (curves `span4/…` for 4 of them)"
        )
    done = [word for word in REPLACED_BY if any(kind.intervention == word for kind in kinds)]
    if done:
        text += f", or replaced (curves {', '.join(f'`{word}/…`' for word in done)})"
    if cell.removed:
        layers = ", ".join(map(str, cell.removed))
        text += f", from a model that lacks {layers} already (drops are from the intact model)"
    return text
