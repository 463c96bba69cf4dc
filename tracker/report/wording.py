"""Write sentences about cell records: results, how to read them, and warnings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median

from tracker.analysis.agreement import Agreement, correlation
from tracker.analysis.boards import APART, ModelBoard, PartBoard, sure
from tracker.analysis.claims import (
    FIRST,
    SMALL_IN_WORDS,
    Claims,
    claims,
    name_benchmarks,
    shown_runs,
)
from tracker.analysis.paired import spreads_of
from tracker.core.answers import interval_name
from tracker.core.changes import WHOLE_LAYER, Change
from tracker.core.estimates import Estimate
from tracker.core.formats import (
    about,
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
from tracker.core.grouping import grouped
from tracker.core.kinds import REPLACED_BY
from tracker.core.provenance import WEIGHTS
from tracker.core.proxies import OBSERVED, OF_EXPERTS, PROXIES, Proxy
from tracker.core.records import (
    NO_REASON,
    NOT_MEASURED,
    CellRecord,
    CorrelationRecord,
    RunRecord,
    layers_of,
)
from tracker.core.text import capital
from tracker.core.weight_formats import FORMATS
from tracker.report.texts import TextTemplate
from tracker.stats.accuracy import ALPHA, POWER
from tracker.stats.support import Verdict, holm

_MOST_NAMED = 10
"""Maximum number of cheap layers that are named; if there are more, they are counted."""


def rule(name: str) -> str:
    """Return how something is read: `layers`, `models`, `intervals`, `layer_correlation`, …"""
    return WORDS.one(f"{name}_rule")


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
    """Describe the dates and the machines of cells; return "" if no cell records a date.

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
"""Name of a correlation's p-value, by the kind of its sample."""


def sample_of(record: CorrelationRecord) -> str:
    """Return the kind of a correlation's sample: `layer` or `expert`."""
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
    """Describe how well the proxies rank the layers, the cosine score first.

    Args:
        cell: The cell.

    Returns:
        The cost of the layers that every run lacks. The Spearman correlation of cosine score and
        accuracy drop (or loss increase) over all layers and over the inner ones, or the reason why
        it is undefined. The correlation of every other proxy over all layers, or over experts.
    """

    def named(proxies: Sequence[Proxy]) -> dict[str, CorrelationRecord]:
        records = ((proxy.label, correlation(cell, proxy=proxy.name)) for proxy in proxies)
        return {name: record for name, record in records if record}

    text = WORDS.one("correlations", cell, named(OF_EXPERTS), named(OBSERVED[1:]))
    return f"{beneath(cell)}{text}"


def beneath(cell: CellRecord) -> str:
    """Describe the cost of the layers that every run lacks.

    Args:
        cell: The cell.

    Returns:
        Sentences that end in a space; empty if no layer is removed from all runs.
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
    return WORDS.one("beneath", cell, measure, alone, intact) + " "


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
    found = spreads_of(runs)
    if found is None:
        why = next((r.reasons["drop_sd"] for r in runs if "drop_sd" in r.reasons), "")
        return f"Power is undefined: {why or 'no outcome of a document has changed'}."
    changes = [spread.change(cell.n, len(runs)) for spread in found[: len(runs)]]
    return WORDS.one("power", cell, measure_of(cell), len(runs), changes, POWER, ALPHA)


def summary(cells: Sequence[CellRecord]) -> str:
    """Summarise cells in a few sentences.

    Args:
        cells: The cells of one page.

    Returns:
        A paragraph of plain text.
    """
    if not cells:
        return "No benchmark is measured yet, so there is nothing to show."
    records = [record for cell in cells if (record := correlation(cell))]
    values = sorted(value for record in records if defined(value := record.estimate.value))
    adjusted = holm([record.estimate.p_value for record in records])
    related = sum(
        p is not None and p < ALPHA and (record.estimate.value or 0) > 0
        for record, p in zip(records, adjusted, strict=True)
    )
    models, first = len({cell.model.key for cell in cells}), next(iter(records), None)
    return WORDS.one("summary", cells, models, _turns(cells), values, first, related)


def _turns(cells: Sequence[CellRecord]) -> str:
    """Name the parts that were changed in turn."""
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


def second_rounding(model: str, stored: str) -> str:
    """Warn that weights were rounded before, so that only the additional error is measured.

    Args:
        model: Label of the model.
        stored: Format of the weights in its checkpoint.

    Returns:
        A sentence.
    """
    return WORDS.one("second_rounding", model, stored)


def provenance_notes(cells: Sequence[CellRecord]) -> list[str]:
    """Name the cells that were not measured by the same versions and devices throughout.

    Args:
        cells: The cells.

    Returns:
        One sentence for each.
    """
    pairs = ((cell, cell.mismatch) for cell in cells)
    return [f"{cell.title}: {why}.{_mismatched(cell)}" for cell, why in pairs if why]


def _mismatched(cell: CellRecord) -> str:
    """Name the runs measured unlike their baseline; begins with a space."""
    changes = [run.change for run in cell.runs if run.mismatch]
    if not changes:
        return f" Each {measure_of(cell).change} compares what was measured alike."
    return f" Baseline and ablation differ in this for {run_list(changes, cell)}."


def looks_note(cell: CellRecord) -> str:
    """Explain the figures of a cell that a question stopped early.

    Args:
        cell: The cell.

    Returns:
        Some sentences; empty if all requested documents are measured.
    """
    return WORDS.one("looks", cell) if cell.is_raced and cell.unfinished else ""


def rounding_note(cell: CellRecord) -> str:
    """Describe the documents that half precision decides by rounding, and the effect on accuracy.

    Args:
        cell: The cell.

    Returns:
        Some sentences; empty in single precision.
    """
    if cell.baseline_rounded is None or cell.baseline_rounding is None:
        why = cell.reasons.get("baseline_rounded") if cell.higher_is_better else None
        return WORDS.one("unknown_rounding", cell, why)
    runs = [run for run in cell.runs if run.rounded is not None]
    counts = {run.rounded for run in runs if run.rounded is not None}
    # The difference is no larger than the effect of rounding.
    small = [
        run.change
        for run in runs
        if sure(run.drop) and abs(run.drop.value or 0.0) <= (run.drop_rounding or 0.0)
    ]
    span = sorted({min(counts), max(counts)}) if counts else []
    return WORDS.one("rounding", cell, measure_of(cell), span, small)


def second_rounding_note(cell: CellRecord) -> str:
    """Name the error that is measured in a cell whose weights were rounded before.

    Args:
        cell: The cell.

    Returns:
        A sentence; empty where no weights are rounded, or none were before.
    """
    stored = cell.provenance.get(WEIGHTS)
    if stored is None or not any(run.change.intervention in FORMATS for run in cell.runs):
        return ""
    return second_rounding(cell.model.name, stored)


def warnings(cell: CellRecord) -> tuple[str, ...]:
    """List warnings that a reader needs before trusting a cell's numbers.

    Args:
        cell: The cell.

    Returns:
        One sentence for each: missing runs, several versions or devices, undefined values of the
        cell, a weak baseline.
    """
    notes = []
    if cell.missing:
        notes.append(f"Incomplete: {run_list(cell.missing, cell)}: {NOT_MEASURED}.")
    if cell.unfinished:
        notes.append(looks_note(cell) or f"Incomplete: {cell.unfinished}.")
    # `baseline_low` is explained with the documents, `baseline_rounded` with rounding.
    elsewhere = {"baseline_low", "baseline_rounded", *cell.NOTES}
    if not cell.higher_is_better:
        elsewhere.add("chance_accuracy")  # a loss has none, and nothing is wrong
    notes += [
        f"{capital(figure).replace('_', ' ')} is undefined: {reason}."
        for figure, reason in cell.all_reasons.items()
        if figure not in elsewhere
    ]
    if cell.mismatch:
        notes.append(f"{capital(cell.mismatch)}.{_mismatched(cell)}")
    if cell.unsaved:
        notes.append(f"{capital(cell.unsaved)}.")
    notes += filter(None, (rounding_note(cell), second_rounding_note(cell)))
    chance = cell.chance_accuracy
    if chance is None:
        return tuple(notes)
    if defined(cell.baseline.value) and cell.baseline.value <= chance:
        notes.append("The intact model is at or below chance: its layers have little to lose.")
    elif defined(cell.baseline.low) and cell.baseline.low <= chance:
        notes.append(
            "The 95 % interval of the baseline reaches down to chance: the drops say little."
        )
    return tuple(notes)


def answer(claims: Claims) -> str:
    """Summarise the verdicts on a model's layers in a few short sentences.

    Args:
        claims: Supported statements.

    Returns:
        For example `Accuracy on arc_easy and piqa falls without layer 0, 1 or 11. Only layer 17 is
        shown to cost less than 5 pp …`; the reason if no benchmark counts.
    """
    falling = {} if claims.costly else claims.falling
    groups = grouped(falling, lambda layer: tuple(map(id, falling[layer])))
    by_count = sorted(groups.items(), key=lambda item: (-len(item[0]), item[1]))
    named = [(falling[layers[0]], sorted(layers)) for _, layers in by_count]
    broken = [layer for layer in claims.broken if layer in {*claims.costly, *falling}]
    settled = claims.settled_by() if claims.open else None
    lacking = claims.lacking(settled[1]) if settled else []
    return WORDS.one("answer", claims, named, broken, settled, lacking)


def shown_sentence(
    noun: str, shown: Mapping[str, Verdict], level: str, higher_is_better: bool = True
) -> str:
    """Write the verdicts on changes of one kind.

    Args:
        noun: Plural noun of the changes.
        shown: Label of each change, from the largest drop to the smallest → verdict.
        level: Name of the measured level.
        higher_is_better: Whether the level is an accuracy or similar.

    Returns:
        A sentence without its final full stop.
    """
    words = ("cost", "raise") if higher_is_better else ("raise", "lower")
    verdicts: tuple[Verdict, ...] = ("costs", "helps")
    labels = [[label for label in shown if shown[label] == verdict] for verdict in verdicts]
    clauses = list(zip(words, (labels[0], labels[1][::-1]), strict=True))
    return WORDS.one("shown", noun, list(shown), level, clauses)


def parts_answer(cell: CellRecord) -> str:
    """Write the verdicts on a cell's heads, experts and spans, simultaneous for each kind.

    Args:
        cell: The cell.

    Returns:
        For example `Of 270 heads 2 are shown to cost accuracy: layer 3 head 5, layer 0 head 1.`;
        empty if it has no such runs.
    """
    sentences = []
    for family, runs in grouped(cell.runs, lambda run: run.change.kind.family).items():
        if family.many:
            by_change = shown_runs(cell, runs)
            largest_first = sorted(runs, key=lambda run: -(run.drop.value or 0.0))
            shown = {run.change.label(): by_change[run.change] for run in largest_first}
            level = measure_of(cell).level
            sentence = shown_sentence(family.many, shown, level, cell.higher_is_better)
            sentences.append(f"{sentence}.")
    return " ".join(sentences)


def board_answer(board: PartBoard) -> str:
    """Write the verdicts on the parts of a board."""
    order = sorted(board.parts, key=lambda part: -(part.deciding.value or 0.0))
    shown = {part.change.label(): part.verdict for part in order}
    over = "on average over" if len(board.cells) > 1 else "on"
    level, many = f"accuracy {over} {name_benchmarks(board.cells)}", board.kind.many
    return f"{shown_sentence(many, shown, level)} ({WORDS.one('basis', board.cells, many)})."


def alone_sentence(cell: CellRecord, average: bool) -> str:
    """Return how many runs of a benchmark are open; `average` says that a mean is shown above."""
    verdict = shown_runs(cell, cell.runs)
    defined = [run for run in cell.runs if run.drop.value is not None]
    count = sum(verdict[run.change] == "open" for run in defined)
    noun = "layer" if all(run.change.kind == WHOLE_LAYER for run in cell.runs) else "run"
    return capital(WORDS.one("alone", count, len(cell.runs), noun, average))


def controls_answer(cell: CellRecord) -> str:
    """Compare the joint cost of layers with that of random sets of equally many layers.

    For a single set, p is twice the smaller share of random sets (including itself) that cost as
    little, or as much. It assumes that the set is exchangeable with random ones if its layers are
    ordinary. Several sets that share layers have no such p.

    Args:
        cell: The cell.

    Returns:
        A sentence for each size; empty if no random sets were measured.
    """
    defined_runs = [
        run for run in cell.runs if run.change.kind.word == "layer" and run.drop.value is not None
    ]
    sentences = []
    for size, runs in grouped(defined_runs, lambda run: run.change.span).items():
        mine = [run.drop.value or 0.0 for run in runs if not run.change.drawn]
        drawn = [run.drop.value or 0.0 for run in runs if run.change.drawn]
        if mine and drawn:
            less, more = (
                sum(drop <= mine[0] for drop in drawn),
                sum(drop >= mine[0] for drop in drawn),
            )
            p = min(1.0, 2 * (min(less, more) + 1) / (len(drawn) + 1)) if len(mine) == 1 else None
            sentences.append(WORDS.one("controls", size, measure_of(cell), mine, drawn, p, ALPHA))
    return " ".join(sentences)


def model_answer(
    statements: Claims, boards: Sequence[PartBoard], cells: Sequence[CellRecord]
) -> str:
    """Write the verdicts on a model's layers, if any were removed, and on its parts.

    Parts without a benchmark that counts (e.g. for losses) are described benchmark by benchmark.
    """
    parts = [*map(board_answer, boards)]
    if not statements.layers and not parts:
        answers = ((cell.benchmark.title, parts_answer(cell)) for cell in cells)
        parts = [f"{title}: {text}" for title, text in answers if text]
    return " ".join([answer(statements), *parts] if statements.layers or not parts else parts)


def cell_answer(cell: CellRecord) -> str:
    """Write the verdicts of one benchmark; "" if nothing counts."""
    layers = claims([cell])
    texts = (answer(layers) if layers.layers else "", parts_answer(cell), controls_answer(cell))
    return " ".join(filter(None, texts))


def agreement_sentence(agreement: Agreement) -> str:
    """Describe how well one proxy orders the layers, with chance for comparison.

    Args:
        agreement: Agreement of the proxy.

    Returns:
        The median Spearman correlation and its range, the share of ranks that differ, and the share
        that two random orders would give.
    """
    label, values = PROXIES[agreement.proxy].label, agreement.spearman
    middle = median(values) if values else None
    is_defined = defined(agreement.differ) and defined(agreement.chance)
    return WORDS.one("agreement", label, values, middle, agreement if is_defined else None)


def compared_sentence(cells: Sequence[CellRecord]) -> str:
    """Describe the answers that were computed both ways while measuring, and their differences.

    Args:
        cells: The cells of a page.

    Returns:
        A sentence.
    """
    compared = sum(cell.compared for cell in cells)
    largest = max((cell.compared_difference or 0.0 for cell in cells), default=0.0)
    unsteady = sum(cell.compared_unsteady for cell in cells)
    is_half = any(cell.compared_unsteady and cell.model.is_half for cell in cells)
    without = sum(not cell.compared for cell in cells)
    return WORDS.one("compared", compared, largest, unsteady, is_half, without)


def models_open(board: ModelBoard) -> str:
    """Write which orders of two models are not shown; empty where all are."""
    return WORDS.one("models_open", board, *board.pairs, APART)


WORDS = TextTemplate(
    "tracker.report",
    "words",
    correlation=correlation,
    correlation_text=correlation_text,
    interval_name=interval_name,
    layer_list=layer_list,
    measure_of=measure_of,
    name_benchmarks=name_benchmarks,
    named_interval=named_interval,
    about=about,
    first=FIRST,
    small_in_words=SMALL_IN_WORDS,
    most_named=_MOST_NAMED,
    run_list=run_list,
    short_correlation=short_correlation,
)
