"""The study `snowball`: do later layers amplify what a layer's removal changes?"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np

from tracker.core.config import CellRequest
from tracker.core.documents import Document
from tracker.core.errors import RequestError
from tracker.core.formats import (
    ends,
    measure_of,
    p_value,
    points,
    three_digits,
    two_digits,
    with_interval,
)
from tracker.engine.observers.perturbation_growth import perturbation_growth, verify_growth
from tracker.engine.refusal import refused
from tracker.engine.scoring.sweep import Engine
from tracker.ledger.observations import Arrays
from tracker.measuring.observing import Observe
from tracker.stats.growth import fewest_to_show, unequal_growth
from tracker.stats.multiple import holm
from tracker.studies.base import (
    SIGNIFICANT,
    Study,
    StudyContext,
    StudyResult,
    StudySetting,
    Subject,
    grouped,
    refuse_removed,
)
from tracker.studies.observing import observe
from tracker.studies.snowball.charts import beside_each_other, charts_of
from tracker.studies.snowball.figures import ALL, COSINE, END, LATER, Figures, figures
from tracker.studies.snowball.tables import layer_table, predictors, summary

DRAWS = 2


class Snowball(Study):
    """Each layer removed, and perturbed as much at random, followed through all later layers.

    Args:
        draws: Random directions for each layer and token.
    """

    name = "snowball"
    question = "Do later layers amplify what the removal of a layer changes?"
    about = """
    Each layer is removed, and perturbed by as much in random directions. The difference to the
    intact residual stream, relative to it, is followed behind every later layer: where it is larger
    at the end than right behind the layer, it snowballs. The study says in which layers it does, by
    what factor, and whether that explains what the cosine score misjudges. Let 'layer' in
    EXPERIMENT hold every layer: the accuracy that each removal costs is set beside the growth.

    \b
    Examples:
      tracker study snowball experiments/demo.yaml
      tracker study snowball experiments/demo.yaml --draws 8
    """
    settings = (
        StudySetting(
            "draws",
            int,
            "Random directions for each layer and token; each costs as much as all removals.",
            default=2,
            least=1,
            most=1000,
        ),
    )

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
                    f"layers; in {asked.file}, let 'component' hold layer, 'span' 1 and "
                    "'intervention' remove, or leave them out"
                )
        return requests

    def say(self, asked: StudyContext, subjects: list[Subject]) -> StudyResult:
        """Answer; what a model refuses, or is not finite in it, is said under `lacking`."""
        found, lacking = [], []
        for subject in subjects:
            title = subject.request.title
            try:
                observed = observe(subject, f"snowball-{self._draws}", asked, self._begin)
            except Exception as error:
                why = refused(error)
                if why is None:
                    raise
                lacking.append(
                    f"{title}: {why}; its perturbations cannot be followed, use another model"
                )
                continue
            each = figures(subject, observed)
            if each is None:
                lacking.append(
                    f"{title}: fewer than two documents have finite hidden states and two tokens; "
                    "try dtype: {value: float32}, or more documents"
                )
                continue
            found.append(each)
            if each.left_out:
                lacking.append(
                    f"{title}: {each.left_out} documents are left out, their hidden states are not "
                    "finite or they have one token; try dtype: {value: float32}"
                )
            if too_few := _too_few(each):
                lacking.append(f"{title}: {too_few}")
            absent = each.layers - len(each.explained.layers if each.explained else [])
            if absent:
                lacking.append(
                    f"{title}: the {measure_of(each.cell).change} of {absent} of {each.layers} "
                    f"layers; add them to 'layer' in {asked.file}"
                )
        several = grouped(found, lambda each: each.cell.model.key)
        return StudyResult(
            answers=[line for cells in several for line in _answers(cells, self._draws)],
            tables=[
                *([summary(found)] if found else []),
                *(table for each in found for table in (layer_table(each), predictors(each))),
            ],
            charts=[
                *(beside_each_other(cells) for cells in several if len(cells) > 1),
                *(chart for each in found for chart in charts_of(each)),
            ],
            lacking=lacking,
            assumptions=_assumptions(self._draws),
        )

    def _begin(self, engine: Engine) -> Observe:
        verified = False

        def watch(document: Document) -> Arrays:
            nonlocal verified
            if not verified:
                verify_growth(engine, document, self._draws)
                verified = True
            return perturbation_growth(engine, document, self._draws)

        return watch


# Answers


def _answers(cells: Sequence[Figures], draws: int) -> Iterator[str]:
    """Say everything of one model: whether it happens, against chance, and what it explains."""
    model = cells[0].cell.model.name
    yield _whether(model, cells)
    for each in cells:
        yield _most(each)
        yield _against_chance(each, draws)
        yield from _explains(each)
    if len(cells) > 1:
        yield _between(cells)
    yield _without_the_first(cells)


def _whether(model: str, cells: Sequence[Figures]) -> str:
    counts = [Counter(each.tokens[ALL].removed.signs) for each in cells]
    grow, shrink = (sum(count[sign] for count in counts) for sign in (1, -1))
    of = sum(count[1] + count[0] + count[-1] for count in counts)
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
    parts = [
        f"{each.cell.benchmark.title} {count[1]} grow, {count[-1]} shrink, {count[0]} undecided; "
        f"median ×{three_digits(each.tokens[ALL].removed.median)} (n = {each.documents})"
        for each, count in zip(cells, counts, strict=True)
    ]
    handed = [
        one.value for each in cells for one in each.tokens[ALL].handed_on if one.value is not None
    ]
    return (
        f"{model}: {verdict}. From right behind a removed layer to the last layer, the relative "
        f"difference to the intact residual stream grows in {grow} of {of} cases and shrinks in "
        f"{shrink} ({'; '.join(parts)}). Later layers do add to it: it ends "
        f"{three_digits(float(np.median(handed)))} times (median) as large as if they had handed "
        "it on as it was; but the stream grows too."
    )


def _too_few(each: Figures) -> str:
    """Say where so few documents leave every layer undecided, whatever they show; else nothing."""
    tests = sum(one.value is not None for one in each.tokens[ALL].removed.total)
    fewest = fewest_to_show(tests, SIGNIFICANT)
    if each.documents >= fewest:
        return ""
    return (
        f"so few documents ({each.documents}) leave all {tests} layers undecided, whatever they "
        f"show; Wilcoxon's test, adjusted for so many, needs {fewest}; raise 'sample' or 'limit'"
    )


def _most(each: Figures) -> str:
    removed = each.tokens[ALL].removed
    defined = [i for i, one in enumerate(removed.total) if one.value is not None]
    if not defined:
        return f"{_where(each)}: {removed.total[0].reason}."
    order = sorted(defined, key=lambda i: -(removed.total[i].value or 0))
    parts = [
        f"layer {i} ×{with_interval(removed.total[i], three_digits)}, "
        f"from {points(removed.paths[i, i])} "
        f"% to {points(removed.paths[i, -1])} % of the stream's norm, larger behind "
        f"{removed.growing_steps(i)} of {len(removed.total) - 1 - i} later layers"
        for i in order[:3]
    ]
    least = order[-1]
    return (
        f"{_where(each)}: most after the removal of {'; '.join(parts)}; least of layer {least} "
        f"×{with_interval(removed.total[least], three_digits)}."
    )


def _against_chance(each: Figures, draws: int) -> str:
    tokens = each.tokens[ALL]
    signs = Counter(tokens.beside_signs)
    of = signs[1] + signs[0] + signs[-1]
    snowballs = Counter(tokens.random.signs)[1]
    defined = [one.value for one in tokens.beside if one.value is not None]
    if not defined:
        return f"{_where(each)}: removal and random directions cannot be compared."
    return (
        f"{_where(each)}: a removal grows more than random directions of the same norm in "
        f"{signs[1]} of {of} layers, less in {signs[-1]} (median ratio "
        f"{three_digits(float(np.median(defined)))}); random directions ({draws} a token) snowball "
        f"in {snowballs}, other tokens' updates in {Counter(tokens.shuffled.signs)[1]}."
    )


def _explains(each: Figures) -> Iterator[str]:
    explained = each.explained
    if explained is None:
        return
    cosine, end = explained.predictors[COSINE], explained.predictors[END]
    better = explained.better[END]
    if cosine.value is None or end.value is None:
        why = end.reason or cosine.reason
        yield f"{_where(each)}: no order of the layers can be judged: {why}."
        return
    verdict = "neither a surely better nor a surely worse"
    if better.low is not None and better.high is not None and not better.low <= 0 <= better.high:
        verdict = "a better" if better.low > 0 else "a worse"
    yield (
        f"{_where(each)}: how far a removal has moved the stream before the head is {verdict} "
        f"predictor of the {measure_of(each.cell).change} than the cosine score: Spearman "
        f"{with_interval(end)} against {with_interval(cosine)}, "
        f"difference {two_digits(better.value or 0)}"
        f"{ends(better.low, better.high)} over {len(explained.layers)} layers."
    )
    growth = explained.partial["growth after removal"]
    depth = explained.partial["layers that follow"]
    if growth.value is None:
        yield f"{_where(each)}: what growth explains is undefined: {growth.reason}."
        return
    p = growth.p_value
    does = p is not None and p < SIGNIFICANT and growth.value > 0
    yield (
        f"{_where(each)}: growth {'explains part of' if does else 'is not shown to explain'} what "
        f"the cosine score misjudges: with it held fixed, growth and drop correlate by "
        f"{with_interval(growth)}"
        + (f", p = {p_value(p)}" if p is not None else "")
        + (
            f"; for comparison, how many layers follow correlates by {with_interval(depth)}."
            if depth.value is not None
            else "."
        )
    )


def _between(cells: Sequence[Figures]) -> str:
    stand = Counter(task.name for each in cells for task in each.cell.benchmark.tasks)
    if twice := [name for name, times in stand.items() if times > 1]:
        return (
            f"Whether growth differs between benchmarks cannot be tested: {', '.join(twice)} "
            "stands in several, whose documents are not independent; ask for one of each."
        )
    layers = range(cells[0].layers - 1)
    adjusted = holm([unequal_growth([e.tokens[ALL].ratios[:, i] for e in cells]) for i in layers])
    defined = [p for p in adjusted if p is not None]
    names = ", ".join(each.cell.benchmark.title for each in cells)
    if not defined:
        return (
            f"Whether growth differs between {names} cannot be tested: five documents of each are "
            "needed; raise 'sample' or 'limit'."
        )
    differ = [i for i, p in enumerate(adjusted) if p is not None and p < SIGNIFICANT]
    ratios = []
    for i in layers:
        values = [v for e in cells if (v := e.tokens[ALL].removed.total[i].value) is not None]
        ratios.append(max(values) / min(values) if len(values) > 1 else 0.0)
    far = int(np.argmax(ratios))
    return (
        f"Growth depends on the benchmark in {len(differ)} of {len(defined)} layers ({names}; "
        f"Kruskal–Wallis over documents, Holm over layers); furthest apart is layer {far}, where "
        f"the largest factor is {three_digits(ratios[far])} times the smallest."
    )


def _without_the_first(cells: Sequence[Figures]) -> str:
    changed = sum(
        one != other
        for each in cells
        for one, other in zip(
            each.tokens[ALL].removed.signs, each.tokens[LATER].removed.signs, strict=True
        )
    )
    medians = ", ".join(
        f"{each.cell.benchmark.title} ×{three_digits(each.tokens[LATER].removed.median)}"
        for each in cells
    )
    of = sum(each.layers - 1 for each in cells)
    return (
        f"Without the first token of each text (its norm is often far beyond the others'), "
        f"{changed} of these {of} verdicts change; median growth {medians}."
    )


def _where(each: Figures) -> str:
    several = f"{each.cell.model.name} on {each.cell.benchmark.title}"
    return f"{several} ({each.documents} documents)"


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
