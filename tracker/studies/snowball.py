"""The study `snowball`: do later layers amplify what a layer's removal changes?"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from tracker.config import CellRequest
from tracker.documents import Document
from tracker.engine.follow import follow, verify_following
from tracker.engine.refusal import refused
from tracker.engine.sweep import Engine
from tracker.errors import RequestError
from tracker.findings import (
    Entry,
    FoundChart,
    FoundTable,
    Heading,
    Line,
    LineChart,
    MapChart,
    Unit,
)
from tracker.ledger.observations import Arrays
from tracker.metrics.accuracy import Estimate
from tracker.metrics.correlation import Correlation
from tracker.metrics.growth import unequal_growth
from tracker.metrics.multiple import holm
from tracker.reporting.formats import interval, p_value, points, two_digits
from tracker.studies.base import Asked, Said, Subject
from tracker.studies.observing import Observe, observe
from tracker.studies.snowballing import (
    ALL,
    ALPHA,
    COSINE,
    END,
    LAST,
    LATER,
    Figures,
    Tokens,
    figures,
    underrated,
)

DRAWS = 2
SHOWN = 6
"""Layers whose paths are drawn, half of them underrated by cosine, half overrated."""
NOT_MEASURED = "its removal is not measured; add the layer to 'layer' in the file"


class Snowball:
    """Each layer removed, and perturbed as much at random, followed through all later layers.

    Args:
        draws: Random directions for each layer and token.
    """

    name = "snowball"
    question = "Do later layers amplify what the removal of a layer changes?"

    def __init__(self, draws: int = DRAWS) -> None:
        if draws < 1:
            raise RequestError(f"draws must be 1 or more, not {draws}")
        self._draws = draws

    def requests(self, asked: Asked) -> list[CellRequest]:
        """List the cells of the file; RequestError where none removes whole single layers."""
        requests = asked.experiment.cells()
        for request in requests:
            if request.removed:
                raise RequestError(
                    f"{request.title}: snowball perturbs the layers of the intact model; leave "
                    f"'removed' out of {asked.file}"
                )
            whole = "layer" in request.components and 1 in request.spans
            if not whole or "remove" not in request.interventions:
                raise RequestError(
                    f"{request.title}: snowball sets growth beside the drops of whole single "
                    f"layers; in {asked.file}, let 'component' hold layer, 'span' 1 and "
                    "'intervention' remove, or leave them out"
                )
        return requests

    def say(self, asked: Asked, subjects: list[Subject]) -> Said:
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
            absent = _layers(each) - len(each.explained.layers if each.explained else [])
            if absent:
                lacking.append(
                    f"{title}: the accuracy drop of {absent} of {_layers(each)} layers; add them "
                    f"to 'layer' in {asked.file}"
                )
        several = _of_a_model(found)
        return Said(
            answers=[line for cells in several for line in _answers(cells, self._draws)],
            tables=[
                *([_summary(found)] if found else []),
                *(table for each in found for table in (_layer_table(each), _predictors(each))),
            ],
            charts=[
                *(_beside_each_other(cells) for cells in several if len(cells) > 1),
                *(chart for each in found for chart in _charts(each)),
            ],
            lacking=lacking,
            assumptions=_assumptions(self._draws),
        )

    def _begin(self, engine: Engine) -> Observe:
        verified = False

        def watch(document: Document) -> Arrays:
            nonlocal verified
            if not verified:
                verify_following(engine, document, self._draws)
                verified = True
            return follow(engine, document, self._draws)

        return watch


def _layers(each: Figures) -> int:
    return each.cell.model.layers


def _of_a_model(found: Sequence[Figures]) -> list[list[Figures]]:
    """Put the cells of each model together, in order."""
    models: dict[tuple[str, str, str], list[Figures]] = {}
    for each in found:
        models.setdefault(each.cell.model.key, []).append(each)
    return list(models.values())


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
    verdict = (
        "the snowball effect is the exception and not the rule here, against the paper"
        if 2 * grow < of
        else "the snowball effect is there in most layers, as the paper has it"
        if grow < of
        else "every layer snowballs, as the paper has it"
    )
    parts = [
        f"{each.cell.benchmark.name} {count[1]} grow, {count[-1]} shrink, {count[0]} undecided; "
        f"median ×{_times(each.tokens[ALL].removed.median)} (n = {each.documents})"
        for each, count in zip(cells, counts, strict=True)
    ]
    handed = [
        one.value for each in cells for one in each.tokens[ALL].handed_on if one.value is not None
    ]
    return (
        f"{model}: {verdict}. From right behind a removed layer to the last layer, the relative "
        f"difference to the intact residual stream grows in {grow} of {of} cases and shrinks in "
        f"{shrink} ({'; '.join(parts)}). Later layers do add to it: it ends "
        f"{_times(float(np.median(handed)))} times (median) as large as if they had handed it on "
        "as it was; but the stream grows too."
    )


def _most(each: Figures) -> str:
    removed = each.tokens[ALL].removed
    defined = [i for i, one in enumerate(removed.total) if one.value is not None]
    if not defined:
        return f"{_where(each)}: {removed.total[0].reason}."
    order = sorted(defined, key=lambda i: -(removed.total[i].value or 0))
    parts = [
        f"layer {i} ×{_estimate(removed.total[i])}, from {points(removed.paths[i, i])} % to "
        f"{points(removed.paths[i, -1])} % of the stream's norm, larger behind "
        f"{removed.growing_steps(i)} of {len(removed.total) - 1 - i} later layers"
        for i in order[:3]
    ]
    least = order[-1]
    return (
        f"{_where(each)}: most after the removal of {'; '.join(parts)}; least of layer {least} "
        f"×{_estimate(removed.total[least])}."
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
        f"{_times(float(np.median(defined)))}); random directions ({draws} a token) snowball in "
        f"{snowballs}, other tokens' updates in {Counter(tokens.shuffled.signs)[1]}."
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
        f"predictor of the accuracy drop than the cosine score: Spearman {_coefficient(end)} "
        f"against {_coefficient(cosine)}, difference {two_digits(better.value or 0)}"
        f"{_ends(better.low, better.high)} over {end.n} layers."
    )
    growth = explained.partial["growth after removal"]
    depth = explained.partial["layers that follow"]
    if growth.value is None:
        yield f"{_where(each)}: what growth explains is undefined: {growth.reason}."
        return
    p = growth.p_value
    does = p is not None and p < ALPHA and growth.value > 0
    yield (
        f"{_where(each)}: growth {'explains part of' if does else 'is not shown to explain'} what "
        f"the cosine score misjudges: with it held fixed, growth and drop correlate by "
        f"{_coefficient(growth)}"
        + (f", p = {p_value(p)}" if p is not None else "")
        + (
            f"; for comparison, how many layers follow correlates by {_coefficient(depth)}."
            if depth.value is not None
            else "."
        )
    )


def _between(cells: Sequence[Figures]) -> str:
    layers = range(_layers(cells[0]) - 1)
    adjusted = holm([unequal_growth([e.tokens[ALL].ratios[:, i] for e in cells]) for i in layers])
    defined = [p for p in adjusted if p is not None]
    names = ", ".join(each.cell.benchmark.name for each in cells)
    if not defined:
        return (
            f"Whether growth differs between {names} cannot be tested: five documents of each are "
            "needed; raise 'sample' or 'limit'."
        )
    differ = [i for i, p in enumerate(adjusted) if p is not None and p < ALPHA]
    ratios = []
    for i in layers:
        values = [v for e in cells if (v := e.tokens[ALL].removed.total[i].value) is not None]
        ratios.append(max(values) / min(values) if len(values) > 1 else 0.0)
    far = int(np.argmax(ratios))
    return (
        f"Growth depends on the benchmark in {len(differ)} of {len(defined)} layers ({names}; "
        f"Kruskal–Wallis over documents, Holm over layers); furthest apart is layer {far}, where "
        f"the largest factor is {_times(ratios[far])} times the smallest."
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
        f"{each.cell.benchmark.name} ×{_times(each.tokens[LATER].removed.median)}" for each in cells
    )
    of = sum(_layers(each) - 1 for each in cells)
    return (
        f"Without the first token of each text (its norm is often far beyond the others'), "
        f"{changed} of these {of} verdicts change; median growth {medians}."
    )


def _where(each: Figures) -> str:
    several = f"{each.cell.model.name} on {each.cell.benchmark.name}"
    return f"{several} ({each.documents} documents)"


def _times(value: float) -> str:
    return f"{value:.3g}"


def _ends(low: float | None, high: float | None, write: Callable[[float], str] = two_digits) -> str:
    ends = interval(low, high, write)
    return f" ({ends})" if ends else ""


def _estimate(one: Estimate) -> str:
    return f"{_times(one.value or 0)}{_ends(one.low, one.high, _times)}"


def _coefficient(one: Correlation) -> str:
    return f"{two_digits(one.value or 0)}{_ends(one.low, one.high)}"


# Tables


def _entry(one: Estimate | Correlation | None, reason: str = NOT_MEASURED) -> Entry:
    if one is None or one.value is None:
        return Entry(reason=(one.reason if one else None) or reason)
    return Entry(value=one.value, low=one.low, high=one.high)


def _figure(value: float | None, reason: str) -> Entry:
    return Entry(reason=reason) if value is None or not np.isfinite(value) else Entry(value=value)


def _headings(*headings: tuple[str, Unit]) -> tuple[Heading, ...]:
    return tuple(Heading(label=label, unit=unit) for label, unit in headings)


_VERDICTS = {1: "grows", -1: "shrinks", 0: "undecided"}


def _layer_table(each: Figures) -> FoundTable:
    """One row a layer: where the difference begins and ends, and what its removal costs."""
    tokens, explained, runs = each.tokens[ALL], each.explained, each.cell.runs_of()
    removed = tokens.removed
    by_cosine = explained.ranks(explained.cosine) if explained else {}
    by_drop = explained.ranks(explained.drops) if explained else {}
    rows = []
    for layer, (total, sign) in enumerate(zip(removed.total, removed.signs, strict=True)):
        run, why = runs.get(layer), total.reason or LAST
        steps = len(removed.total) - 1 - layer
        rows.append(
            (
                Entry(value=layer),
                _figure(removed.paths[layer, layer], "not finite"),
                _figure(removed.paths[layer, -1], "not finite"),
                _entry(total),
                _figure(removed.a_layer(layer), why),
                Entry(value=f"{removed.growing_steps(layer)} of {steps}")
                if total.value is not None
                else Entry(reason=why),
                Entry(value=_VERDICTS[sign]) if sign is not None else Entry(reason=why),
                _figure(tokens.random.total[layer].value, why),
                _figure(tokens.shuffled.total[layer].value, why),
                _figure(tokens.handed_on[layer].value, why),
                Entry(
                    value=run.accuracy_drop, low=run.accuracy_drop_low, high=run.accuracy_drop_high
                )
                if run and run.accuracy_drop is not None
                else Entry(
                    reason=each.cell.reason_of("accuracy_drop", run) if run else NOT_MEASURED
                ),
                _figure(by_cosine.get(layer), NOT_MEASURED),
                _figure(by_drop.get(layer), NOT_MEASURED),
            )
        )
    return FoundTable(
        title=f"{each.cell.heading}: the relative difference after each layer's removal",
        headings=_headings(
            ("layer", "count"),
            ("behind it", "percent"),
            ("before the head", "percent"),
            ("growth", "times"),
            ("a layer", "times"),
            ("growing steps", "text"),
            ("verdict", "text"),
            ("random", "times"),
            ("other tokens'", "times"),
            ("as handed on", "times"),
            ("drop", _drop_unit(each)),
            ("cosine rank", "count"),
            ("drop rank", "count"),
        ),
        rows=tuple(rows),
        notes=(
            f"{each.documents} documents; geometric means over them, growth with 95 % intervals "
            "from resampling them. Verdict: Wilcoxon's signed rank test, Holm over layers, 5 %, "
            "and an interval without 1.",
            "random, other tokens': growth of random directions and of other tokens' updates of "
            "the same norm. As handed on: how many times as large as if all later layers had "
            "handed the difference on as it was. Rank 1: the largest cosine score or drop; equal "
            "ones share a rank.",
        ),
    )


def _drop_unit(each: Figures) -> Unit:
    return "points" if each.cell.higher_is_better else "score"


def _predictors(each: Figures) -> FoundTable:
    """What orders the layers as their drops do, and what cosine leaves over."""
    explained = each.explained
    rows: list[tuple[Entry, ...]] = []
    if explained is not None:
        for name, found in explained.predictors.items():
            better = explained.better.get(name)
            rows.append(
                (
                    Entry(value=name),
                    Entry(value="drop"),
                    _entry(found),
                    _figure(found.p_value, found.reason or "undefined"),
                    _entry(better, "it is the one compared with"),
                    Entry(value=found.n),
                )
            )
        for name, found in explained.partial.items():
            rows.append(
                (
                    Entry(value=name),
                    Entry(value="drop, cosine score held fixed"),
                    _entry(found),
                    _figure(found.p_value, found.reason or "undefined"),
                    Entry(reason="a partial correlation is compared with none"),
                    Entry(value=found.n),
                )
            )
    return FoundTable(
        title=f"{each.cell.heading}: what orders the layers as their drops do",
        headings=_headings(
            ("of each layer", "text"),
            ("beside", "text"),
            ("Spearman", "coefficient"),
            ("p", "p"),
            ("better than cosine by", "coefficient"),
            ("layers", "count"),
        ),
        rows=tuple(rows),
        notes=(
            "Intervals: documents drawn anew. p: against series as smooth over depth that are "
            "unrelated; not adjusted for the number of rows.",
        ),
    )


def _summary(found: Sequence[Figures]) -> FoundTable:
    """One row a cell."""
    rows = []
    for each in found:
        tokens = each.tokens[ALL]
        signs, beside = Counter(tokens.removed.signs), Counter(tokens.beside_signs)
        explained = each.explained
        rows.append(
            (
                Entry(value=each.cell.model.name),
                Entry(value=each.cell.benchmark.name),
                Entry(value=each.documents),
                *(Entry(value=signs[sign]) for sign in (1, -1, 0)),
                _figure(tokens.removed.median, "no layer's growth is defined"),
                _figure(tokens.random.median, "no layer's growth is defined"),
                *(Entry(value=beside[sign]) for sign in (1, -1)),
                _entry(explained.predictors[COSINE] if explained else None),
                _entry(explained.predictors[END] if explained else None),
                _entry(explained.partial["growth after removal"] if explained else None),
            )
        )
    return FoundTable(
        title="Does it snowball?",
        headings=_headings(
            ("model", "text"),
            ("benchmark", "text"),
            ("documents", "count"),
            ("layers that grow", "count"),
            ("shrink", "count"),
            ("undecided", "count"),
            ("median growth", "times"),
            ("of random directions", "times"),
            ("removal grows more", "count"),
            ("less", "count"),
            ("cosine ~ drop", "coefficient"),
            ("before the head ~ drop", "coefficient"),
            ("growth ~ drop given cosine", "coefficient"),
        ),
        rows=tuple(rows),
        notes=("~: Spearman's coefficient over layers, with 95 % intervals over documents.",),
    )


# Charts


def _line(name: str, totals: Sequence[Estimate], bands: bool = True) -> Line:
    # The last layer has none, and no place on these charts.
    some = totals[:-1]
    return Line(
        name=name,
        values=tuple(one.value for one in some),
        low=tuple(one.low for one in some) if bands else (),
        high=tuple(one.high for one in some) if bands else (),
    )


def _beside_each_other(cells: Sequence[Figures]) -> LineChart:
    return LineChart(
        title=f"{cells[0].cell.model.name}: growth after each layer's removal, by benchmark",
        x="removed layer (0-based)",
        y="before the head ÷ behind the layer",
        unit="times",
        places=tuple(range(_layers(cells[0]) - 1)),
        lines=tuple(
            _line(each.cell.benchmark.name, each.tokens[ALL].removed.total) for each in cells
        ),
        log_y=True,
    )


def _charts(each: Figures) -> Iterator[FoundChart]:
    tokens: Tokens = each.tokens[ALL]
    total = _layers(each)
    yield LineChart(
        title=f"{each.cell.heading}: growth of a removal and of random directions",
        x="perturbed layer (0-based)",
        y="before the head ÷ behind the layer",
        unit="times",
        places=tuple(range(total - 1)),
        lines=(
            _line("removed", tokens.removed.total),
            _line("random directions", tokens.random.total),
            _line("other tokens' updates", tokens.shuffled.total),
        ),
        log_y=True,
    )
    paths = tokens.removed.paths
    yield LineChart(
        title=f"{each.cell.heading}: paths of the layers that cosine misjudges most",
        x="behind layer (0-based)",
        y="relative difference to the intact stream",
        unit="percent",
        places=tuple(range(total)),
        lines=tuple(
            Line(name=name, values=tuple(_seen(value) for value in paths[layer]))
            for layer, name in _drawn(each)
        ),
        log_y=True,
    )
    with np.errstate(divide="ignore", invalid="ignore"):
        doublings = np.log2(paths / np.diagonal(paths)[:, None])
    yield MapChart(
        title=f"{each.cell.heading}: how often the relative difference has doubled",
        x="behind layer (0-based)",
        y="removed layer (0-based)",
        name="doublings",
        unit="coefficient",
        columns=tuple(range(total)),
        rows=tuple(map(str, range(total))),
        values=tuple(tuple(_seen(value) for value in row) for row in doublings),
    )


def _drawn(each: Figures) -> Iterator[tuple[int, str]]:
    """Choose layers, each with its name in the legend."""
    explained = each.explained
    if explained is None:
        yield from (
            (int(i), f"layer {int(i)}")
            for i in np.unique(np.linspace(0, _layers(each) - 1, SHOWN).round())
        )
        return
    by_cosine, by_drop = explained.ranks(explained.cosine), explained.ranks(explained.drops)
    for layer in underrated(explained, SHOWN):
        yield layer, f"layer {layer}: rank {by_cosine[layer]} by cosine, {by_drop[layer]} by drop"


def _seen(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


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
        "over the layers of a cell by Holm's method (1979) to 5 %, and its interval excludes 1. "
        "Intervals: expanded percentiles of resampled documents (Hesterberg 2015).",
        "Layers are a series and no independent sample: p-values of correlations are against "
        "surrogate series as smooth over depth. Intervals of correlations keep the layers and draw "
        "the documents anew; the partial coefficient is Spearman's, linear in ranks.",
    ]
