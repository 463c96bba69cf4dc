"""The study `snowball`: do later layers amplify what a layer's removal changes?"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np

from tracker.core.config import CellRequest
from tracker.core.documents import Document
from tracker.core.errors import RequestError
from tracker.core.formats import measure_of, p_value, three_digits, with_interval
from tracker.core.grouping import grouped
from tracker.engine.observers.perturbation_growth import perturbation_growth, verify_growth
from tracker.engine.refusal import refused
from tracker.engine.scoring.sweep import Engine
from tracker.ledger.shards import Arrays
from tracker.measuring.observing import Observe
from tracker.stats.growth import fewest_to_show, unequal_growth
from tracker.stats.support import holm
from tracker.studies.base import (
    SIGNIFICANT,
    Study,
    StudyContext,
    StudyResult,
    Subject,
    observe,
    refuse_removed,
    side,
)
from tracker.studies.registry import DRAWS
from tracker.studies.snowball.figures import COSINE, END, Figures, figures
from tracker.studies.snowball.layout import (
    beside_each_other,
    charts_of,
    layer_table,
    predictors,
    summary,
)

_FIRST = 3
"""A layer that is surely among so many whose removals grow most is named."""


class Snowball(Study):
    """Each layer removed, and perturbed as much at random, followed through all later layers.

    Args:
        draws: Random directions for each layer and token.
    """

    question = "Do later layers amplify what the removal of a layer changes?"

    def __init__(self, draws: int = DRAWS) -> None:
        if draws < 1:
            raise RequestError(f"draws must be 1 or more, not {draws}")
        self._draws = draws

    def requests(self, asked: StudyContext) -> list[CellRequest]:
        """List the cells of the file; RequestError where none removes whole single layers."""
        requests = asked.experiment.cells()
        for request in requests:
            refuse_removed(request, "snowball perturbs the layers of the intact model", asked)
            whole = "layer" in request.components and 1 in request.spans
            if not whole or "remove" not in request.interventions:
                raise RequestError(
                    f"{request.title}: snowball sets growth beside the drops of whole single "
                    f"layers; in {asked.asked.source}, let 'component' hold layer, 'span' 1 and "
                    "'intervention' remove, or leave them out"
                )
        return requests

    def say(self, asked: StudyContext, subjects: list[Subject]) -> StudyResult:
        """Answer; what a model refuses, or is not finite in it, is said under `lacking`."""
        cells: list[Figures] = []
        result = StudyResult(_assumptions(self._draws))
        for subject in subjects:
            title = subject.request.title
            try:
                observed = observe(subject, f"snowball-{self._draws}", asked, self._begin)
            except Exception as error:
                why = refused(error)
                if why is None:
                    raise
                result.lacking.append(
                    f"{title}: {why}; its perturbations cannot be followed, use another model"
                )
                continue
            cell = figures(subject, observed)
            result.lacking += [f"{title}: {why}" for why in _lacking(cell, asked)]
            cells += [cell] if cell is not None else []
        several = grouped(cells, lambda cell: cell.record.model.key).values()
        result.answers += [line for some in several for line in _answers(some, self._draws)]
        result.tables += [summary(cells)] if cells else []
        result.charts += [beside_each_other(some) for some in several if len(some) > 1]
        for cell in cells:
            result.tables += [layer_table(cell), predictors(cell)]
            result.charts += charts_of(cell)
        return result

    def _begin(self, engine: Engine) -> Observe:
        verified = False

        def watch(document: Document) -> Arrays:
            nonlocal verified
            if not verified:
                verify_growth(engine, document, self._draws)
                verified = True
            return perturbation_growth(engine, document, self._draws)

        return watch


def _lacking(cell: Figures | None, asked: StudyContext) -> Iterator[str]:
    """Say what of a cell could not be said, with what to do."""
    if cell is None:
        yield (
            "fewer than two documents have finite hidden states and two tokens; try dtype: "
            "{value: float32}, or more documents"
        )
        return
    if cell.left_out:
        yield (
            f"{cell.left_out} documents are left out, their hidden states are not finite or they "
            "have one token; try dtype: {value: float32}"
        )
    if too_few := _too_few(cell):
        yield too_few
    if absent := cell.layers - len(cell.explained.layers if cell.explained else []):
        yield (
            f"the {measure_of(cell.record).change} of {absent} of {cell.layers} layers; add them "
            f"to 'layer' in {asked.asked.source}"
        )


def _answers(cells: Sequence[Figures], draws: int) -> list[str]:
    """Say everything of one model: whether it happens, against chance, and what it explains."""
    answers = [_whether(cells)]
    for cell in cells:
        answers += [_most(cell), _against_chance(cell, draws), *_explains(cell)]
    return [*answers, *([_between(cells)] if len(cells) > 1 else []), _without_the_first(cells)]


def _whether(cells: Sequence[Figures]) -> str:
    model = cells[0].record.model.name
    signs = [cell.tokens.removed.signs for cell in cells]
    grow, shrink, undecided = (sum(each.count(sign) for each in signs) for sign in (1, -1, 0))
    of = grow + shrink + undecided
    if not of:
        return f"{model}: no layer's growth is defined."
    if grow == of:
        verdict = "every layer snowballs, as the paper has it"
    elif 2 * grow > of:
        verdict = "the snowball effect is there in most layers, as the paper has it"
    elif shrink > grow and 2 * (grow + shrink) > of:
        verdict = "the snowball effect is the exception and not the rule here, against the paper"
    else:
        verdict = "whether most layers snowball is open; raise 'sample' or 'limit'"
    handed_on = [factor for cell in cells for factor in cell.tokens.handed_on.defined]
    return (
        f"{model}: {verdict}. From right behind a removed layer to the last layer, the relative "
        f"difference to the intact residual stream grows in {grow} of {of} cases and shrinks in "
        f"{shrink}. It ends {three_digits(float(np.median(handed_on)))} times (median) as large as "
        "if later layers had handed it on as it was; but the stream grows too."
    )


def _too_few(cell: Figures) -> str:
    """Say where so few documents leave every layer undecided, whatever they show; else nothing."""
    tests = len(cell.tokens.removed.defined)
    fewest = fewest_to_show(tests, SIGNIFICANT)
    if cell.documents >= fewest:
        return ""
    return (
        f"so few documents ({cell.documents}) leave all {tests} layers undecided, whatever they "
        f"show; Wilcoxon's test, adjusted for so many, needs {fewest}; raise 'sample' or 'limit'"
    )


def _most(cell: Figures) -> str:
    grow = cell.tokens.removed
    factors = grow.factors
    defined = [layer for layer, factor in enumerate(factors) if factor.value is not None]
    if not defined:
        return f"{_where(cell)}: {factors[0].reason}."
    between = dict(zip(defined, grow.ranks(cell.documents), strict=True))
    first = max(1, min(_FIRST, len(defined) // 2))
    most = sorted(
        (layer for layer in defined if between[layer][1] <= first),
        key=lambda layer: -(factors[layer].value or 0),
    )

    def grown(layer: int) -> str:
        return f"layer {layer} ×{with_interval(factors[layer], three_digits)}"

    if len(defined) == 1:
        return f"{_where(cell)}: growth is defined for one removal, that of {grown(defined[0])}."
    sentence = f"{_where(cell)}: which removals grow most is open"
    if most:
        among = f"the {first} that grow most include" if first > 1 else "most grows"
        named = ", ".join(map(grown, most))
        sentence = f"{_where(cell)}: of all removals {among} that of {named}"
    for layer in defined:
        if between[layer][0] == len(defined):
            sentence += f"; least that of {grown(layer)}"
    return f"{sentence} (95 % confidence for all layers)."


def _against_chance(cell: Figures, draws: int) -> str:
    tokens = cell.tokens
    beside, signs = tokens.beside, tokens.beside.signs
    if not beside.defined:
        return f"{_where(cell)}: removal and random directions cannot be compared."
    return (
        f"{_where(cell)}: a removal grows more than random directions of the same norm in "
        f"{signs.count(1)} of {len(signs) - signs.count(None)} layers, less in {signs.count(-1)} "
        f"(median ratio {three_digits(beside.median)}). Random directions ({draws} a token) "
        f"snowball in {tokens.random.signs.count(1)}, other tokens' updates in "
        f"{tokens.shuffled.signs.count(1)}."
    )


def _explains(cell: Figures) -> list[str]:
    explained, where = cell.explained, _where(cell)
    if explained is None:
        return []
    cosine, end = explained.predictors[COSINE], explained.predictors[END]
    if cosine.value is None or end.value is None:
        return [f"{where}: no order of the layers can be judged: {end.reason or cosine.reason}."]
    better = explained.better[END]
    verdicts = {1: "a better", -1: "a worse", 0: "neither a surely better nor a surely worse"}
    predicts = (
        f"{where}: how far a removal moves the stream before the head is {verdicts[side(better)]} "
        f"predictor of the {measure_of(cell.record).change} than the cosine score. Spearman is "
        f"{with_interval(end)} against {with_interval(cosine)}, difference {with_interval(better)} "
        f"over {len(explained.layers)} layers."
    )
    growth = explained.partial["growth after removal"]
    depth = explained.partial["layers that follow"]
    if growth.value is None:
        return [predicts, f"{where}: what growth explains is undefined: {growth.reason}."]
    p = growth.p_value
    does = p is not None and p < SIGNIFICANT and growth.value > 0
    explains = (
        f"{where}: growth {'explains part of' if does else 'is not shown to explain'} what "
        f"the cosine score misjudges. With it held fixed, growth and drop correlate by "
        f"{with_interval(growth)}"
    )
    if p is not None:
        explains += f", p = {p_value(p)}"
    if depth.value is not None:
        explains += f"; for comparison, how many layers follow correlates by {with_interval(depth)}"
    return [predicts, f"{explains}."]


def _between(cells: Sequence[Figures]) -> str:
    stand = Counter(task.name for cell in cells for task in cell.record.benchmark.tasks)
    if twice := [name for name, times in stand.items() if times > 1]:
        return (
            f"Whether growth differs between benchmarks cannot be tested: {', '.join(twice)} "
            "stands in several, whose documents are not independent; ask for one of each."
        )
    layers = range(cells[0].layers - 1)
    tests = holm([unequal_growth([c.tokens.ratios[:, layer] for c in cells]) for layer in layers])
    adjusted = [p for p in tests if p is not None]
    names = ", ".join(cell.record.benchmark.title for cell in cells)
    if not adjusted:
        return (
            f"Whether growth differs between {names} cannot be tested: five documents of each are "
            "needed; raise 'sample' or 'limit'."
        )
    return (
        f"Growth is shown to depend on the benchmark in {sum(p < SIGNIFICANT for p in adjusted)} "
        f"of {len(adjusted)} layers ({names}; Kruskal–Wallis over documents, Holm over layers)."
    )


def _without_the_first(cells: Sequence[Figures]) -> str:
    changed = 0
    for cell in cells:
        pairs = zip(cell.tokens.removed.signs, cell.later.removed.signs, strict=True)
        changed += sum(first != later for first, later in pairs)
    medians = ", ".join(
        f"{cell.record.benchmark.title} ×{three_digits(cell.later.removed.median)}"
        for cell in cells
    )
    of = sum(cell.layers - 1 for cell in cells)
    return (
        f"Without the first token of each text, whose norm is often far beyond the others', "
        f"{changed} of these {of} verdicts change. Median growth is then {medians}."
    )


def _where(cell: Figures) -> str:
    record = cell.record
    return f"{record.model.name} on {record.benchmark.title} ({cell.documents} documents)"


def _assumptions(draws: int) -> list[str]:
    return [
        "Relative difference: ‖h′ − h‖ / ‖h‖ behind a layer, h the intact residual stream before "
        "any final norm; the mean over the tokens of context and gold continuation, then the "
        "geometric mean over documents. A removed layer's output is its input.",
        f"Random directions: uniform on the sphere, {draws} drawn for each token and layer by seed "
        "and document, as long as the layer's own update in that token, added to its output. "
        "Other tokens' updates: of another token of the text, scaled to the same norm.",
        "Growth: relative difference before the head over that right behind the layer; documents "
        "are independent. It snowballs where the factor is above 1 by Wilcoxon's signed rank test "
        "of the documents' log ratios (Wilcoxon 1945; symmetric where nothing grows), adjusted "
        "over the layers of a benchmark by Holm's method (1979) to 5 %, and its interval "
        "excludes 1. Intervals: expanded percentiles of resampled documents (Hesterberg 2015).",
        "Layers are a series and no independent sample: p-values of correlations are against "
        "surrogate series as smooth over depth. Intervals of correlations keep the layers and draw "
        "the documents anew; the partial coefficient is Spearman's, linear in ranks.",
    ]
