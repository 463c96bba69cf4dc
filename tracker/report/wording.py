"""Write sentences about results: verdicts, explanations and warnings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median

from tracker.analysis.agreement import Agreement, find_correlation
from tracker.analysis.boards import MODEL_GAP, ModelBoard, PartBoard
from tracker.analysis.claims import (
    SMALL_DROP_TEXT,
    Claims,
    decide_claims,
    error_share,
    name_benchmarks,
    run_verdicts,
)
from tracker.analysis.paired import variance_summary
from tracker.schema.answers import interval_name, statement
from tracker.schema.changes import WHOLE_LAYER, Change
from tracker.schema.estimates import Estimate
from tracker.schema.formats import (
    DASH,
    figure_text,
    interval_text,
    is_finite,
    join_words,
    layer_list,
    metric_format,
    points,
    write_figure,
)
from tracker.schema.grouping import group_by
from tracker.schema.kinds import REPLACEMENT_WORDS
from tracker.schema.provenance import WEIGHTS_KEY
from tracker.schema.proxies import OBSERVED, PROXIES, Proxy
from tracker.schema.records import (
    NO_REASON,
    RUN_NOT_MEASURED,
    CellRecord,
    CorrelationRecord,
    RunRecord,
    first_layers,
)
from tracker.schema.text import capitalise
from tracker.schema.text_templates import TextTemplate
from tracker.schema.weight_formats import FORMATS
from tracker.stats.accuracy import ALPHA, TEST_POWER
from tracker.stats.support import Verdict, holm

_MAX_NAMED_PARTS = 5
"""Maximum number of heads, experts or spans that a sentence names."""
_MAX_NAMED_LAYERS = 10
"""Maximum number of cheap layers that a sentence names; more layers are only counted."""


def rule(name: str) -> str:
    """Return the text that explains a ranking, the intervals or a correlation.

    `name` is `layers`, `models`, `intervals`, `layer_correlation` or `part_correlation`.
    """
    return WORDS.render(f"{name}_rule")


def kind_words(kind: Change) -> str:
    """Return the name of a kind of ablation for use in a sentence.

    Args:
        kind: The kind of ablation, such as the removal of one attention sublayer.

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
    """Return a text that lists the names of runs, for use in a sentence.

    Args:
        runs: The ablations to name.
        cell: Results of one model on one benchmark, with these ablations.

    Returns:
        For example `layers 3, 5`, or `layer 3; attention: layers 3, 5` for several kinds of runs.
    """
    parts = []
    for kind in dict.fromkeys(run.kind for run in runs):
        words = "" if kind == WHOLE_LAYER else kind_words(kind)
        if not kind.members and not kind.is_outer:
            kind_layers = [run.layer for run in runs if run.kind == kind]
            layers = layer_list(kind_layers, len(first_layers(kind, cell)))
            words = f"{words}: {layers}" if words else layers
        parts.append(words)
    return "; ".join(parts)


def measured(cells: Sequence[CellRecord]) -> str:
    """State when and where results were measured; "" if no date is recorded.

    Args:
        cells: Results of each model and benchmark.

    Returns:
        For example `Measured on 2026-11-28 (Linux x86_64, 2 cores, cpu).`
    """
    dates = sorted(cell.measured[:10] for cell in cells if cell.measured)
    machines = filter(None, dict.fromkeys(map(_machine_name, cells)))
    return WORDS.render("measured", dates, "; ".join(machines))


def _machine_name(cell: CellRecord) -> str:
    provenance = cell.provenance
    cores = provenance.get("cores")
    device = provenance.get("accelerator") or provenance.get("device")
    return ", ".join(filter(None, (provenance.get("platform"), cores and f"{cores} cores", device)))


_SAMPLE_NOUNS = {"linear": "linear map", "attention": "attention sublayer", "mlp": "MLP sublayer"}


def sample_noun(record: CorrelationRecord) -> str:
    """Return the noun for one observation of a correlation, such as `int4 linear map`."""
    *intervention, component = record.sample.split()
    return " ".join([*intervention, _SAMPLE_NOUNS.get(component, component.replace("_", " "))])


def p_value_name(record: CorrelationRecord) -> str:
    """Return the name of a correlation's p-value in tables and texts."""
    return "p within layers" if record.within_layers else "p over layers"


def correlation_text(record: CorrelationRecord | None) -> str:
    """Write a correlation with its interval, its sample sizes and its p-value.

    Args:
        record: The correlation; None if it was not computed.

    Returns:
        For example `0.66 (95 % interval over documents 0.41 to 0.80; p over layers < 0.001; 30
        layers, 100 documents)`, or the reason why the correlation is undefined.
    """
    return "not computed" if record is None else WORDS.render("correlation_details", record)


def short_correlation(record: CorrelationRecord) -> str:
    """Write a correlation with its interval, without sample sizes and p-value.

    Args:
        record: The correlation.

    Returns:
        For example `0.48 (0.30 to 0.60)`, or `undefined`.
    """
    return figure_text(record.estimate) if is_finite(record.estimate.value) else "undefined"


def correlation_sentences(cell: CellRecord) -> str:
    """Describe how strongly the cosine score and other proxies correlate with the drops.

    Args:
        cell: Results of one model on one benchmark.

    Returns:
        Sentences about the Spearman correlation of each proxy (e.g. the cosine score) with the
        drops. If some layers are removed in all runs, the text begins with the remaining accuracy.
    """

    def named_records(proxies: Sequence[Proxy]) -> dict[str, CorrelationRecord]:
        records = ((proxy.label, find_correlation(cell, proxy=proxy.name)) for proxy in proxies)
        return {name: record for name, record in records if record}

    parts = [
        (PROXIES[record.proxy].label, record)
        for record in cell.correlations
        if record.sample != "layer" and (record.coefficient, record.subset) == ("spearman", "all")
    ]
    text = WORDS.render("correlations", cell, parts, named_records(OBSERVED[1:]))
    return f"{beneath(cell)}{text}"


def beneath(cell: CellRecord) -> str:
    """Describe the accuracy without the layers that every run removes.

    Args:
        cell: Results of one model on one benchmark.

    Returns:
        Sentences that end in a space; empty if no layer is removed in all runs.
    """
    if not cell.removed:
        return ""
    return WORDS.render("beneath", cell, metric_format(cell)) + " "


def power_sentence(cell: CellRecord, runs: Sequence[RunRecord]) -> str:
    """State the smallest drop that can be detected with these documents.

    Args:
        cell: Results of one model on one benchmark.
        runs: The runs whose drops are tested together, with a correction for multiple tests.

    Returns:
        A sentence; empty without runs, or if a stopping rule (`until`) determines the number of
        documents.
    """
    if not runs or cell.is_raced:  # the power assumes a fixed number of documents
        return ""
    spreads = variance_summary(runs)
    if spreads is None:
        reason = next((r.reasons["drop_sd"] for r in runs if "drop_sd" in r.reasons), "")
        return f"Power is undefined: {reason or 'no ablation changes an outcome'}."
    alpha, family = error_share(cell, runs)
    changes = [spread.detectable_change(cell.n, family) for spread in spreads[: len(runs)]]
    return WORDS.render("power", cell, metric_format(cell), len(runs), changes, TEST_POWER, alpha)


def summary(cells: Sequence[CellRecord]) -> str:
    """Summarise the results of a page in a few sentences.

    Args:
        cells: Results of each model and benchmark on the page.

    Returns:
        A paragraph of plain text.
    """
    if not cells:
        return "No benchmark is measured yet, so there is nothing to show."
    records = [record for cell in cells if (record := find_correlation(cell))]
    values = sorted(value for record in records if is_finite(value := record.estimate.value))
    adjusted_ps = holm([record.estimate.p_value for record in records])
    n_related = sum(
        p is not None and p < ALPHA and (record.estimate.value or 0) > 0
        for record, p in zip(records, adjusted_ps, strict=True)
    )
    n_models, first = len({cell.model.key for cell in cells}), next(iter(records), None)
    changes = _changes_text(cells)
    return WORDS.render("summary", cells, n_models, changes, values, first, n_related)


def _changes_text(cells: Sequence[CellRecord]) -> str:
    """List what was changed in the models, e.g. `each layer was removed, one at a time`."""
    kinds = {kind for cell in cells for kind in cell.kinds} or {WHOLE_LAYER}
    removed_kinds = {kind for kind in kinds if kind.intervention == "remove"}
    span_components = {kind.component for kind in removed_kinds if kind.span > 1}
    components = {kind.component for kind in removed_kinds}
    phrases = {
        "each layer": WHOLE_LAYER in kinds,
        "each layer’s attention": Change("attention") in kinds,
        "each layer’s MLP": Change("mlp") in kinds,
        "each attention head": "head" in components,
        "each group of heads": "kv_head" in components,
        "each routed expert": "expert" in components,
        "each group of neurons": "neuron" in components,
        "each layer’s shared expert": "shared_expert" in components,
        "each span of layers": "layer" in span_components,
        "each span of attentions or MLPs": bool(span_components - {"layer"}),
    }
    removed_text = join_words([words for words, is_present in phrases.items() if is_present])
    replacements = join_words(
        [name for word, name in REPLACEMENT_WORDS.items() if Change(intervention=word) in kinds]
    )
    clauses = [f"{removed_text} was removed, one at a time"] if removed_text else []
    if replacements:
        clauses.append(f"each layer was replaced by {replacements}, one layer at a time")
    rounded = {kind for kind in kinds if kind.component == "linear"}
    matrices = {kind for kind in rounded if kind.is_outer}
    names = join_words(sorted({str(kind.map) for kind in matrices}))
    for name, group in (("each linear map", rounded - matrices), (names, matrices)):
        formats = join_words(sorted({kind.intervention for kind in group}))
        if group:
            clauses.append(f"the weights of {name} were rounded to {formats}, one matrix at a time")
    if any(kind.intervention == "repeat" and kind.span > 1 for kind in kinds):
        clauses.append("each span of layers was repeated, one span at a time")
    return "; ".join(clauses)


def second_rounding_text(model: str, stored: str) -> str:
    """Warn that the weights of a checkpoint are already quantised.

    Args:
        model: Label of the model.
        stored: Quantisation format of the weights in the model's checkpoint.

    Returns:
        A sentence.
    """
    return WORDS.render("second_rounding", model, stored)


def provenance_notes(cells: Sequence[CellRecord]) -> list[str]:
    """Name the benchmarks that were measured with several package versions or devices.

    Args:
        cells: Results of each model and benchmark to check.

    Returns:
        One note for each benchmark with several versions or devices.
    """
    return [WORDS.render("provenance", cell) for cell in cells if cell.mismatch]


def looks_note(cell: CellRecord) -> str:
    """Explain how early stopping (`until`) affects the results of a measurement.

    Args:
        cell: Results of one model on one benchmark.

    Returns:
        Some sentences; empty if the measurement did not stop early.
    """
    return WORDS.render("looks", cell) if cell.is_raced and cell.unfinished else ""


def rounding_note(cell: CellRecord) -> str:
    """State how many scores depend on rounding in half precision.

    Args:
        cell: Results of one model on one benchmark.

    Returns:
        Some sentences; empty in single precision.
    """
    if cell.baseline_rounded is None or cell.baseline_rounding is None:
        reason = cell.reasons.get("baseline_rounded") if cell.higher_is_better else None
        return WORDS.render("unknown_rounding", cell, reason)
    runs = [run for run in cell.runs if run.rounded is not None]
    counts = {run.rounded for run in runs if run.rounded is not None}
    # The difference is no larger than the effect of rounding.
    small_runs = [
        run.change
        for run in runs
        if run.drop.side() and abs(run.drop.value or 0.0) <= (run.drop_rounding or 0.0)
    ]
    count_range = sorted({min(counts), max(counts)}) if counts else []
    return WORDS.render("rounding", cell, metric_format(cell), count_range, small_runs)


def second_rounding_note(cell: CellRecord) -> str:
    """Warn if runs quantise weights that are already quantised in the checkpoint.

    Args:
        cell: Results of one model on one benchmark.

    Returns:
        A sentence; empty if there is no such run.
    """
    stored = cell.provenance.get(WEIGHTS_KEY)
    if stored is None or not any(run.change.intervention in FORMATS for run in cell.runs):
        return ""
    return second_rounding_text(cell.model.name, stored)


def warnings(cell: CellRecord) -> tuple[str, ...]:
    """List warnings about a benchmark's results, such as missing runs or a weak baseline.

    Args:
        cell: Results of one model on one benchmark.

    Returns:
        One text for each warning. Warnings concern missing runs, several versions or devices,
        undefined values, rounding, and a baseline near chance.
    """
    # `baseline_low` is explained with the documents, `baseline_rounded` with rounding.
    explained_figures = {"baseline_low", "baseline_rounded", *cell.NOTES}
    if not cell.higher_is_better:
        explained_figures.add("chance_accuracy")  # a loss has no chance level; no warning needed
    reasons = {name: why for name, why in cell.all_reasons.items() if name not in explained_figures}
    notes = rounding_note(cell), second_rounding_note(cell)
    return tuple(WORDS.render_all("warnings", cell, reasons, notes))


def layers_answer(claims: Claims, with_steps: bool = True) -> str:
    """Write which layers of a model significantly change the accuracy when removed.

    Args:
        claims: Statistically supported statements about the layers.
        with_steps: Whether to suggest larger samples that could show effects of more layers.

    Returns:
        For example `Accuracy on arc_easy and piqa falls without layer 0, 1 or 11. …`. If no
        benchmark is suitable for verdicts, the text gives the reason.
    """
    next_steps = claims.next_steps() if with_steps else ()
    steps = [(step, claims.lacking(step.documents)) for step in next_steps]
    more = {layer: -drop for layer, drop in claims.more_probable.items()}
    drops = _drops_text(claims.less_probable), _drops_text(more)
    return WORDS.render("answer", claims, *drops, steps)


def _drops_text(drops: Mapping[int, Estimate]) -> str:
    """List layers with their drops, such as `0 (8.0 pp, 3.1 to 12.9) or 1 (…)`."""
    texts = [
        f"{layer} ({points(drop.value or 0.0)} pp, {interval_text(drop.low, drop.high, points)})"
        for layer, drop in drops.items()
    ]
    n_more = len(texts) - _MAX_NAMED_LAYERS
    if n_more > 0:
        texts[_MAX_NAMED_LAYERS:] = [f"one of {n_more} more"]
    return join_words(texts, "or")


def verdict_sentence(
    noun: str, verdicts: Mapping[str, Verdict], quantity: str, higher_is_better: bool = True
) -> str:
    """Write a sentence that names the ablations of one kind with significant effects.

    Args:
        noun: Plural noun for the ablations, such as heads.
        verdicts: Name of each ablation → verdict such as `costs`; the largest drop comes first.
        quantity: Name of the measured quantity, such as accuracy.
        higher_is_better: Whether higher values of the quantity are better.

    Returns:
        A sentence without a final full stop.
    """
    verbs = ("cost", "raise") if higher_is_better else ("raise", "lower")
    signs: tuple[Verdict, ...] = ("costs", "helps")
    labels = [[label for label in verdicts if verdicts[label] == verdict] for verdict in signs]
    clauses = list(zip(verbs, (labels[0], labels[1][::-1]), strict=True))
    return WORDS.render("shown", noun, list(verdicts), quantity, clauses)


def parts_answer(cell: CellRecord) -> str:
    """Write which heads, experts and ranges of layers have significant effects.

    Args:
        cell: Results of one model on one benchmark.

    Returns:
        For example `Of 270 heads 2 are shown to cost accuracy: layer 3 head 5, layer 0 head 1.`;
        empty if no heads, experts or spans were measured.
    """
    sentences = []
    for family, runs in group_by(cell.runs, lambda run: run.change.kind.family).items():
        if family.plural:
            verdict_by_change = run_verdicts(cell, runs)
            largest_first = sorted(runs, key=lambda run: -(run.drop.value or 0.0))
            verdicts = {run.change.label(): verdict_by_change[run.change] for run in largest_first}
            level = metric_format(cell).level
            sentence = verdict_sentence(family.plural, verdicts, level, cell.higher_is_better)
            sentences.append(f"{sentence}.")
    return " ".join(sentences)


def board_answer(board: PartBoard) -> str:
    """Write a sentence that names the parts of a leaderboard with significant effects."""
    ordered_parts = sorted(board.parts, key=lambda part: -(part.deciding.value or 0.0))
    verdicts = {part.change.label(): part.verdict for part in ordered_parts}
    noun, where = board.kind.plural, name_benchmarks(board.cells)
    measure = metric_format(board.cells[0]).level
    level = f"{measure} {'on average over' if len(board.cells) > 1 else 'on'} {where}"
    sentence = verdict_sentence(noun, verdicts, level)
    return f"{sentence} ({WORDS.render('basis', board.cells, noun)})."


def insignificant_sentence(cell: CellRecord, has_average: bool) -> str:
    """State how many runs lack a significant effect on one benchmark.

    If `has_average` is true, the sentence adds that effects may be significant on average over
    several benchmarks.
    """
    verdicts = run_verdicts(cell, cell.runs)
    defined_runs = [run for run in cell.runs if run.drop.value is not None]
    n_open = sum(verdicts[run.change] == "open" for run in defined_runs)
    noun = "layer" if all(run.change.kind == WHOLE_LAYER for run in cell.runs) else "run"
    return capitalise(WORDS.render("alone", n_open, len(cell.runs), noun, has_average))


def random_sets_answer(cell: CellRecord) -> str:
    """Compare the drop of a chosen set of layers with the drops of random sets of equal size.

    The text contains a two-sided p-value (null hypothesis: the chosen set is a random set). The
    p-value is left out if several chosen sets of equal size were measured.

    Args:
        cell: Results of one model on one benchmark.

    Returns:
        One sentence for each size of the sets; empty if no random sets were measured.
    """
    layers = [run for run in cell.runs if run.change.kind.word == "layer"]
    sentences = []
    for size, runs in group_by(layers, lambda run: run.change.span).items():
        drops = [(run.change.drawn, run.drop.value) for run in runs if run.drop.value is not None]
        sets = [drop for is_drawn, drop in drops if not is_drawn]
        drawn = [drop for is_drawn, drop in drops if is_drawn]
        if sets and drawn:
            n_low, n_high = sum(d <= sets[0] for d in drawn), sum(d >= sets[0] for d in drawn)
            p = min(1.0, 2 * (min(n_low, n_high) + 1) / (len(drawn) + 1))
            p_value = p if len(sets) == 1 else None
            measure = metric_format(cell)
            sentences.append(WORDS.render("controls", size, measure, sets, drawn, p_value, ALPHA))
    return " ".join(sentences)


def model_answer(claims: Claims, boards: Sequence[PartBoard], cells: Sequence[CellRecord]) -> str:
    """Write sentences on the significant effects of a model's layers and other parts.

    If the benchmarks have no common average, e.g. for losses, the text describes each benchmark.
    """
    answers = [*map(board_answer, boards)]
    if not claims.layers and not answers:
        titled = ((cell.benchmark.title, parts_answer(cell)) for cell in cells)
        answers = [f"{title}: {text}" for title, text in titled if text]
    if claims.layers or not answers:
        answers.insert(0, layers_answer(claims))
    return " ".join(answers)


def cell_answer(cell: CellRecord, with_steps: bool = True) -> str:
    """Describe the significant effects on one benchmark; "" if no verdict is possible."""
    claims = decide_claims([cell])
    layers = layers_answer(claims, with_steps) if claims.layers else ""
    return " ".join(filter(None, (layers, parts_answer(cell), random_sets_answer(cell))))


def profile_sentence(cell: CellRecord) -> str:
    """State which layers of a model matter on one benchmark, and the date of measurement."""
    measured_on = f"measured {cell.measured[:10]}" if cell.measured else "date unknown"
    answer = cell_answer(cell, with_steps=False)
    if not answer:
        verdict = statement(cell.answer) if cell.answer else "no verdict"
        answer = f"{verdict} ({cell.documents_text})"
    return f"{cell.heading} ({measured_on}): {answer}"


def agreement_sentence(agreement: Agreement) -> str:
    """Describe how well a proxy orders the layers, compared with a random order.

    Args:
        agreement: Agreement of the proxy with the accuracy drop.

    Returns:
        A sentence with the median and range of Spearman correlations, and the share of layers that
        proxy and drop rank differently.
    """
    label, values = PROXIES[agreement.proxy].label, agreement.spearman
    median_value = median(values) if values else None
    is_defined = is_finite(agreement.differ) and is_finite(agreement.chance)
    return WORDS.render("agreement", label, values, median_value, agreement if is_defined else None)


def compared_sentence(cells: Sequence[CellRecord]) -> str:
    """State how many answers were compared with the answers of pruned copies of the models.

    Args:
        cells: Results of each model and benchmark on the page.

    Returns:
        A sentence.
    """
    n_compared = sum(cell.compared for cell in cells)
    largest = max((cell.compared_difference or 0.0 for cell in cells), default=0.0)
    n_unsteady = sum(cell.compared_unsteady for cell in cells)
    is_half = any(cell.compared_unsteady and cell.model.is_half for cell in cells)
    n_without = sum(not cell.compared for cell in cells)
    return WORDS.render("compared", n_compared, largest, n_unsteady, is_half, n_without)


def open_models_sentence(board: ModelBoard) -> str:
    """State how many pairs of models do not differ significantly; "" if all pairs differ."""
    return WORDS.render("models_open", board, *board.pairs, MODEL_GAP)


WORDS = TextTemplate(
    "tracker.report",
    "words",
    correlation=find_correlation,
    correlation_text=correlation_text,
    dash=DASH,
    interval_name=interval_name,
    is_finite=is_finite,
    layer_list=layer_list,
    name_benchmarks=name_benchmarks,
    small_in_words=SMALL_DROP_TEXT,
    most_named=_MAX_NAMED_LAYERS,
    most_parts=_MAX_NAMED_PARTS,
    no_reason=NO_REASON,
    not_measured=RUN_NOT_MEASURED,
    p_value_name=p_value_name,
    run_list=run_list,
    sample_noun=sample_noun,
    write_figure=write_figure,
    short_correlation=short_correlation,
)
