"""Sentences about cell records."""

from __future__ import annotations

from collections.abc import Sequence

from tracker.analysis.paired import spreads_of
from tracker.analysis.ranks.proxies import correlation
from tracker.core.changes import WHOLE_LAYER, Change
from tracker.core.estimates import Estimate
from tracker.core.formats import (
    counted,
    defined,
    interval,
    layer_list,
    listed,
    measure_of,
    named_interval,
    two_digits,
    with_interval,
)
from tracker.core.kinds import REPLACED_BY
from tracker.core.proxies import OBSERVED, OF_EXPERTS, PROXIES
from tracker.core.records import NO_REASON, CellRecord, CorrelationRecord, RunRecord, layers_of
from tracker.stats.power import ALPHA, POWER
from tracker.stats.support import holm


def kind_words(kind: Change) -> str:
    """Name a kind of runs.

    Args:
        kind: Component, span and intervention.

    Returns:
        For example `layer`, `attention`, `mlp, 4 at a time`, `head 3` or `mean`.
    """
    if kind.members:
        return f"layers {', '.join(map(str, kind.members))}"
    word = kind.word if kind.part is None else f"{kind.word} {kind.part}"
    if kind.repeats != 2:
        word += f" {kind.repeats} times"
    return word if kind.span == 1 else f"{word}, {kind.span} at a time"


def run_list(runs: Sequence[Change], cell: CellRecord) -> str:
    """Name runs in a sentence.

    Args:
        runs: The runs.
        cell: The cell that they belong to.

    Returns:
        For example `layers 3, 5`, or `layer 3; attention: layers 3, 5` where there are several
        kinds.
    """
    parts = []
    for kind in dict.fromkeys(run.kind for run in runs):
        words = "" if kind == WHOLE_LAYER else kind_words(kind)
        if not kind.members and not kind.is_end:
            mine = [run.layer for run in runs if run.kind == kind]
            layers = layer_list(mine, len(layers_of(kind, cell)))
            words = f"{words}: {layers}" if words else layers
        parts.append(words)
    return "; ".join(parts)


def measured(cells: Sequence[CellRecord]) -> str:
    """Say when some cells were measured, and on what; empty where no cell says.

    Args:
        cells: The cells.

    Returns:
        For example `Measured on 2026-11-28 (Linux x86_64, 2 cores, cpu).`
    """
    dates = sorted(cell.measured[:10] for cell in cells if cell.measured)
    where = dict.fromkeys(_machine(cell) for cell in cells)
    if not dates:
        return ""
    when = f"on {dates[0]}" if dates[0] == dates[-1] else f"from {dates[0]} to {dates[-1]}"
    said = "; ".join(filter(None, where))
    return f"Measured {when}{f' ({said})' if said else ''}."


def _machine(cell: CellRecord) -> str:
    stack = cell.provenance
    cores = stack.get("cores")
    device = stack.get("accelerator") or stack.get("device")
    return ", ".join(filter(None, (stack.get("platform"), cores and f"{cores} cores", device)))


P_OVER = {"layer": "p over layers", "expert": "p within layers"}
"""What the p-value of a correlation is called, by what the sample is."""


def sample_of(record: CorrelationRecord) -> str:
    """Say what a correlation is over: layers or experts, one of them as it is called."""
    return PROXIES[record.proxy].component if record.proxy in PROXIES else "layer"


def correlation_text(record: CorrelationRecord | None) -> str:
    """Write one correlation with its interval, its samples and its p-value.

    Args:
        record: The correlation, or None when the cell does not hold it.

    Returns:
        For example `0.66 (95 % interval over documents 0.41 to 0.80; p over layers < 0.001; 30
        layers, 100 documents)`, or why it is undefined.
    """
    if record is None:
        return "not computed"
    what = sample_of(record)
    samples = f"{counted(record.n, what)}, {counted(record.documents, 'document')}"
    found = record.estimate
    if not defined(found.value):
        return f"undefined ({found.reason or NO_REASON}; {samples})"
    between = interval(found.low, found.high, two_digits)
    parts = [f"95 % interval over documents {between}"]
    if not between:
        parts = [f"no interval: {found.reason or NO_REASON}"]
    if defined(found.p_value):
        p = "< 0.001" if found.p_value < 0.001 else f"= {found.p_value:.3f}"
        parts.append(f"{P_OVER[what]} {p}")
    return f"{two_digits(found.value)} ({'; '.join([*parts, samples])})"


def short_correlation(record: CorrelationRecord) -> str:
    """Write one correlation with its interval alone.

    Args:
        record: The correlation.

    Returns:
        For example `0.48 (0.30 to 0.60)`, or `undefined`.
    """
    return with_interval(record.estimate) if defined(record.estimate.value) else "undefined"


def sentence(cell: CellRecord) -> str:
    """Say in one line how well the proxies rank the layers, the cosine score first.

    Args:
        cell: The cell.

    Returns:
        What the layers that every run lacks cost alone; and the Spearman correlation of cosine
        score and accuracy drop (or loss increase) over all layers and over the inner ones, or why
        it is undefined; and that of every other proxy over all layers, or of experts.
    """
    by_expert = ((p.label, correlation(cell, proxy=p.name)) for p in OF_EXPERTS)
    experts = " ".join(
        f"Spearman of {name} and {measure_of(cell).change}: {correlation_text(record)}."
        for name, record in by_expert
        if record
    )
    if cell.runs and not cell.whole_layers:
        nothing = "No whole single layer was removed, so nothing is correlated."
        return f"{beneath(cell)}{experts or nothing}"
    found = ((p.label, correlation(cell, proxy=p.name)) for p in OBSERVED[1:])
    others = ", ".join(f"{name} {short_correlation(record)}" for name, record in found if record)
    others = f" Of other proxies: {others}." if others else ""
    return (
        f"{beneath(cell)}Spearman of cosine score and {measure_of(cell).change}: "
        f"{correlation_text(correlation(cell))}; without the two outer layers at each end "
        f"{correlation_text(correlation(cell, 'inner'))}.{others}{' ' * bool(experts)}{experts}"
    )


def beneath(cell: CellRecord) -> str:
    """Say what the layers cost that every run lacks.

    Args:
        cell: The cell.

    Returns:
        Sentences that end in a space; empty where no layer is gone from the start.
    """
    if not cell.removed:
        return ""
    measure = measure_of(cell)

    def level(figure: Estimate) -> str:
        if not defined(figure.value):
            return f"undefined ({figure.reason or NO_REASON})"
        text = f"{measure.write(figure.value)} {measure.level_unit}"
        return text + named_interval(figure, measure.write)

    alone, intact = level(cell.remaining), level(cell.baseline)
    plural = len(cell.removed) > 1
    return (
        f"Every run here lacks {layer_list(cell.removed, 0)} as well. Without "
        f"{'these' if plural else 'this one'} alone, {measure.level} is {alone}; intact, it is "
        f"{intact}. Every {measure.change} is relative to the intact model, so it holds what "
        f"{'these layers cost' if plural else 'this layer costs'} too. "
    )


def power_sentence(cell: CellRecord, runs: Sequence[RunRecord]) -> str:
    """Write how small a drop the documents of a cell reveal, all its runs tested together.

    Args:
        cell: The cell.
        runs: Some of its runs.

    Returns:
        A sentence, or why it is undefined; empty without any run, and where an answer decides how
        many documents there are.
    """
    if not runs or cell.is_raced:  # the power of one look
        return ""
    measure = measure_of(cell)
    found = spreads_of(runs)
    if found is None:
        why = next((r.reasons["drop_sd"] for r in runs if "drop_sd" in r.reasons), "")
        return f"Power is undefined: {why or 'no outcome of a document has changed'}."
    under = (" under the median removal", " under the one that changes most")
    named = [(found[0], "")] if len(runs) == 1 else [*zip(found, under, strict=True)]
    changes = [(spread.change(cell.n, len(runs)), which) for spread, which in named]
    together = f", {len(runs)} runs together" if len(runs) > 1 else ""
    smallest = ", ".join(
        f"{'none' if change is None else f'{measure.write(change)} {measure.unit}'}{which}"
        for change, which in changes
    )
    return (
        f"The smallest {measure.change} that {counted(cell.n, 'document')} reveal, with "
        f"{100 * POWER:.0f} % power (two-sided {100 * ALPHA:.0f} %, paired{together}): {smallest}."
    )


def summary(cells: Sequence[CellRecord]) -> str:
    """Say in a few sentences what these cells show.

    Args:
        cells: The cells of one page.

    Returns:
        A paragraph of plain text.
    """
    if not cells:
        return "No benchmark is measured yet, so there is nothing to show."
    models = len({cell.model.key for cell in cells})
    text = f"{counted(models, 'model')}, {counted(len(cells), 'measurement')}; {_turns(cells)}. "
    records = [record for cell in cells if (record := correlation(cell))]
    values = sorted(value for record in records if defined(value := record.estimate.value))
    if not values:
        return (
            f"{text}No rank correlation of cost and cosine score is defined here; each benchmark "
            "says why."
        )
    if len(cells) == 1:
        return (
            f"{text}The Spearman correlation of cost and cosine score over the layers is "
            f"{correlation_text(records[0])}; 1 would be the same order."
        )
    adjusted = holm([record.estimate.p_value for record in records])
    related = sum(
        p is not None and p < ALPHA and (record.estimate.value or 0) > 0
        for record, p in zip(records, adjusted, strict=True)
    )
    span = (
        f"is {two_digits(values[0])}"
        if len(values) == 1
        else f"runs from {two_digits(values[0])} to {two_digits(values[-1])}"
    )
    text += (
        f"The Spearman correlation of cost and cosine score over the layers {span} (1 = the same "
        f"order); significant in {related} of {counted(len(cells), 'measurement')} (5 %, "
        "Holm-corrected)"
    )
    without = len(cells) - len(values)
    return f"{text}, in {without} it is undefined." if without else f"{text}."


def _turns(cells: Sequence[CellRecord]) -> str:
    """Say what was changed in turn."""
    found = {kind for cell in cells for kind in cell.kinds} or {WHOLE_LAYER}
    removing = {kind for kind in found if kind.intervention == "remove"}
    spans = {kind.component for kind in removing if kind.span > 1}
    parts = {kind.component for kind in removing}
    shown = {
        "each layer": WHOLE_LAYER in found,
        "each layer’s attention": Change("attention") in found,
        "each layer’s MLP": Change("mlp") in found,
        "each attention head": "head" in parts,
        "each group of heads": "kv_head" in parts,
        "each routed expert": "expert" in parts,
        "each layer’s shared expert": "shared_expert" in parts,
        "each span of layers": "layer" in spans,
        "the attention or MLP of each span": bool(spans - {"layer"}),
    }
    removed = listed([words for words, there in shown.items() if there])
    stretches = any(kind.intervention == "repeat" and kind.span > 1 for kind in found)
    replaced = listed([w for done, w in REPLACED_BY.items() if Change(intervention=done) in found])
    clauses = [f"{removed} was removed in turn"] if removed else []
    clauses += [f"each layer was replaced by {replaced} in turn"] if replaced else []
    rounded = {kind for kind in found if kind.component == "linear"}
    ends = {kind for kind in rounded if kind.is_end}
    clauses += [
        f"{what} had weights in {listed(sorted({kind.intervention for kind in some}))} in turn"
        for what, some in (
            ("each linear map", rounded - ends),
            (listed(sorted({str(kind.map) for kind in ends})), ends),
        )
        if some
    ]
    clauses += ["each stretch of layers was passed again in turn"] if stretches else []
    return "; ".join(clauses)


def second_rounding(model: str, kept: str) -> str:
    """Say which error is measured where weights are rounded that were rounded before.

    Args:
        model: What people call the model.
        kept: The format that its checkpoint keeps them in.

    Returns:
        A sentence.
    """
    return (
        f"{model}: its checkpoint keeps weights in {kept}, so they were rounded once before; what "
        "a format costs here is what the second rounding does."
    )
