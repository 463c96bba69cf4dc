"""Study: test whether later layers amplify the change that a removed layer causes."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from tracker.analysis.aligned import AlignedOutcomes, TaskNames
from tracker.analysis.claims import cell_ranks
from tracker.engine.observers.perturbation_growth import perturbation_growth, verify_batching
from tracker.engine.refusal import try_model
from tracker.engine.scoring.sweep import Engine
from tracker.ledger.shards import DocumentArrays
from tracker.measuring.observing import Observations, ObserveDocument
from tracker.schema.documents import Document
from tracker.schema.estimates import Estimate
from tracker.schema.findings import LineChart, MapChart, StudyChart, chart_values, line_chart
from tracker.schema.formats import interval_text, metric_format
from tracker.schema.grouping import group_by
from tracker.schema.proxies import PROXIES
from tracker.schema.records import CellRecord
from tracker.schema.tables import Column, Table, build_table
from tracker.stats.arrays import Array, proxy_means, token_means
from tracker.stats.correlation import correlate, correlation_difference, partial_correlate
from tracker.stats.effects import growth_difference_p, growths, min_growth_documents
from tracker.stats.rank_agreement import min_ranks
from tracker.stats.resampling import SEED
from tracker.stats.support import count_pairs, holm, possible_ranks, widen
from tracker.studies.base import (
    SIGNIFICANT,
    Study,
    StudyContext,
    StudyResult,
    Subject,
    observe_subject,
    study_texts,
)
from tracker.studies.layout import figure_table, labelled
from tracker.studies.registry import SnowballSettings

ALL_TOKENS, LATER_TOKENS = 0, 1
"""Indices of the means over all tokens, and over all tokens except the first of each text."""
_LAST_LAYER = "no layer follows it"
UNMEASURED = "removal of this layer is not measured; add it to 'layer' in the experiment file"
COSINE_SCORE, END_DIFFERENCE = "cosine score", "difference before the head"
REMOVAL_GROWTH, LAYERS_FOLLOWING = "growth after removal", "layers that follow"
MAX_PATHS = 6
"""Number of layers whose paths are drawn: half are underrated by cosine, half are overrated."""
MAX_NAMED = 3
"""Layers are named if they are surely among this many layers with the largest growth."""
_VERDICT_WORDS = {1: "grows", -1: "shrinks", 0: "undecided", None: None}
SNOWBALL_TEXTS = study_texts("snowball")


class Growth:
    """Factors by which changes of the residual stream grow, from each layer to the output head.

    Args:
        start: `[documents, layers]`, hidden states' relative difference after the changed layer.
        end: `[documents, layers]`, hidden states' relative difference before the output head.
        strata: `[documents]`, each document's task.

    Attributes:
        factors: Growth factor of each layer: the relative difference before the output head,
            divided by that right after the layer. Undefined for the last layer.
    """

    def __init__(self, start: Array, end: Array, strata: TaskNames) -> None:
        self.factors = growths(start[:, :-1], end[:, :-1], strata, SEED)
        self.factors.append(Estimate(None, reason=_LAST_LAYER))

    @property
    def signs(self) -> list[int | None]:
        """Direction of growth after each layer: 1 for growth, −1 for shrinkage, 0 if undecided.

        A direction is decided if the growth factor's interval excludes 1, and its Holm-adjusted
        p-value is below 0.05. None stands for an undefined growth factor.
        """
        p_values = holm([factor.p_value for factor in self.factors])
        return [
            None if p is None or factor.low is None else factor.side(1) * (p < SIGNIFICANT)
            for factor, p in zip(self.factors, p_values, strict=True)
        ]

    @property
    def values(self) -> list[float | None]:
        """Growth factors without intervals, one for each layer; None if a factor is undefined."""
        return [factor.value for factor in self.factors]

    @property
    def defined(self) -> list[float]:
        """The defined growth factors, without intervals."""
        return [value for value in self.values if value is not None]

    @property
    def median(self) -> float:
        """The median growth factor over layers; NaN if no factor is defined."""
        return float(np.median(self.defined)) if self.defined else np.nan

    def extremes(self, documents: int) -> tuple[int, list[int], list[int]]:
        """Find the layers with the largest and the smallest growth factors.

        Args:
            documents: Number of documents with which the factors were computed.

        Returns:
            A number n, and two lists of layers, which can be empty. The factors of the first list
            are significantly among the n largest, in descending order. The factor of the second
            list is significantly the smallest.
        """
        layers = [layer for layer, value in enumerate(self.values) if value is not None]
        n = len(layers)
        logs = [_log_factor(self.factors[layer]) for layer in layers]
        ranges = possible_ranks(widen(logs, [documents] * n, count_pairs(n)))
        ranks = dict(zip(layers, ranges, strict=True))
        n_largest = max(1, min(MAX_NAMED, n // 2))
        largest = [layer for layer, (_, worst) in ranks.items() if worst <= n_largest]
        smallest = [layer for layer, (best, _) in ranks.items() if best == n]
        return n_largest, sorted(largest, key=lambda n: -(self.values[n] or 0)), smallest


def _log_factor(factor: Estimate) -> Estimate:
    """Return the logarithm of a growth factor and of its interval."""
    figures = (factor.value, factor.low, factor.high)
    value, low, high = (math.log(figure) if figure else None for figure in figures)
    return Estimate(value, low, high)


class TokenGrowth:
    """Growth factors of several kinds of changes of the residual stream.

    Args:
        arrays: Kind of change → relative differences of hidden states, as `[documents, tokens,
            changed layer, observed layer]`.
        strata: `[documents]`, each document's task.
        tokens: Tokens to average over: `ALL_TOKENS` or `LATER_TOKENS`.

    Attributes:
        removed: Growth of the change that the removal of the layer causes.
        random: Growth of a change in a random direction, with the norm of the removal's change.
        shuffled: Growth of a change with the same norm in the direction of the layer's update of
            another token.
        relative: Growth of the removal's change divided by the growth of the random change.
        handed_on: Relative difference before the output head, divided by its value if later layers
            did not alter the change.
        paths: `[layers, layers]`, relative difference of the residual stream that each removed
            layer (row) causes after each later layer (column). Geometric mean over documents; NaN
            before the removed layer.
        ratios: `[documents, layers]`, growth factor after each layer's removal, for each document.
    """

    def __init__(self, arrays: Mapping[str, Array], strata: TaskNames, tokens: int) -> None:
        starts, ends = _split(arrays, tokens)
        with np.errstate(divide="ignore", invalid="ignore"):
            self.ratios, by_chance = (ends[name] / starts[name] for name in ("removed", "random"))
            self.paths = np.exp(np.log(arrays["removed"][:, tokens]).mean(axis=0))
        self.removed, self.random, self.shuffled = (
            Growth(starts[name], ends[name], strata) for name in ("removed", "random", "shuffled")
        )
        self.relative = Growth(by_chance, self.ratios, strata)
        self.handed_on = Growth(ends["carried"], ends["removed"], strata)

    @property
    def factors_per_layer(self) -> list[float | None]:
        """For each removed layer, growth of the change per later layer (geometric mean)."""
        last = len(self.paths) - 1
        return [
            None if value is None else float(value ** (1 / (last - layer)))
            for layer, value in enumerate(self.removed.values)
        ]

    @property
    def amplifying_layers(self) -> list[str | None]:
        """Share of later layers that amplify each removal's change, as text such as `2 of 3`."""
        steps = [np.diff(np.log(path[layer:])) > 0 for layer, path in enumerate(self.paths)]
        return [
            None if value is None else f"{int(grows.sum())} of {len(grows)}"
            for value, grows in zip(self.removed.values, steps, strict=True)
        ]


@dataclass(frozen=True)
class Predictor:
    """Table row: how well a quantity predicts the drops, compared with the cosine score."""

    name: str = labelled("of each layer")
    target: str = labelled("predicted")
    spearman: Estimate = labelled("Spearman", "coefficient")
    p_value: Estimate = labelled("p", "p")
    better: Estimate = labelled("better than cosine by", "coefficient")
    layers: int = labelled("layers", "count")


class DropExplanation:
    """Rank correlations, over layers, of several quantities with the accuracy drop.

    Args:
        cell: Outcomes of a model with at least one removed layer.
        arrays: Kind of change, such as `removed` → relative differences of hidden states.

    Attributes:
        layers: Layers with a measured drop.
        drops: Accuracy drop of each layer in `layers`.
        cosine: Cosine score of each layer in `layers`.
        predictors: Name of a quantity → rank correlation of the quantity with the drops. For growth
            factors, the correlation is partial (given the cosine score) and leaves out the last
            layer.
    """

    def __init__(self, cell: AlignedOutcomes, arrays: Mapping[str, Array]) -> None:
        layers = self.layers = [run.layer for run in cell.whole_layers]
        paired = cell.metric_outcomes([cell.ablation(run) for run in cell.whole_layers])
        proxy = PROXIES["cosine_score"]
        sums = cell.proxy_sums(proxy)[:, layers]
        # Each figure of the layers, with its values in each resample of the documents.
        cosine = (
            proxy.from_observed(proxy_means(sums, cell.tokens)),
            proxy.from_observed(cell.resample(token_means(sums, cell.tokens), cell.tokens)),
        )
        drop = cell.drop_series(paired)

        def series(values: Array) -> tuple[Array, Array]:
            return values.mean(axis=0), cell.resample(values)

        starts, ends = _split(arrays, ALL_TOKENS)
        with np.errstate(divide="ignore", invalid="ignore"):
            figures = (starts["removed"], ends["removed"], ends["random"])
            start, end, random = (np.log(array)[:, layers] for array in figures)
        following = float(arrays["removed"].shape[-1] - 1) - np.array(layers)
        self.drops, self.cosine = drop[0], cosine[0]
        self.predictors: dict[str, Predictor] = {}

        def add(name: str, target: str, spearman: Estimate, better: Estimate, n: int) -> None:
            p_value = Estimate(spearman.p_value, reason=spearman.reason)
            self.predictors[name] = Predictor(name, target, spearman, p_value, better, n)

        for name, (values, resamples) in {
            COSINE_SCORE: cosine,
            "difference behind the layer": series(start),
            END_DIFFERENCE: series(end),
            f"{END_DIFFERENCE}, random directions": series(random),
        }.items():
            pair = (resamples, drop[1])
            spearman = correlate(values, drop[0], coefficient="spearman", resamples=pair)
            better = Estimate(
                None, reason="this row is the cosine score, with which all other rows are compared"
            )
            if name != COSINE_SCORE:
                better = correlation_difference((values, resamples), cosine, drop, "spearman")
            add(name, "drop", spearman, better, len(layers))
        inner = following > 0
        reason = "partial correlations are not compared with the cosine score"
        none = Estimate(None, reason=reason)
        for name, figure in {
            REMOVAL_GROWTH: series(end - start),
            "growth of random directions": series(random - start),
            LAYERS_FOLLOWING: (following, following[None]),
        }.items():
            pairs = [(v[inner], drawn[:, inner]) for v, drawn in (figure, drop, cosine)]
            inner_values, inner_resamples = zip(*pairs, strict=True)
            spearman = partial_correlate(*inner_values, resamples=inner_resamples)
            add(name, "drop, cosine score held fixed", spearman, none, int(inner.sum()))

    @property
    def is_ordered(self) -> bool:
        """True if the two main rank correlations with the drops are defined.

        The main correlations are that of the cosine score, and that of the difference before the
        output head.
        """
        names = (COSINE_SCORE, END_DIFFERENCE)
        return all(self.predictors[name].spearman.value is not None for name in names)

    @property
    def by_cosine(self) -> dict[int, int]:
        """Rank of each layer by cosine score; the largest score has rank 1.

        Layers with equal scores share the best rank.
        """
        return dict(zip(self.layers, min_ranks(self.cosine), strict=True))

    @property
    def by_drop(self) -> dict[int, int]:
        """Rank of each layer by accuracy drop; the largest drop has rank 1.

        Layers with equal drops share the best rank.
        """
        return dict(zip(self.layers, min_ranks(self.drops), strict=True))

    def misjudged(self, n: int) -> list[int]:
        """List up to `n` layers whose ranks by cosine score and by drop differ most.

        The list begins with the layer that the cosine score underrates most, and ends with the
        layer that the cosine score overrates most.
        """
        by_cosine, by_drop = self.by_cosine, self.by_drop
        order = sorted(self.layers, key=lambda layer: by_drop[layer] - by_cosine[layer])
        return order if len(order) <= n else order[: n - n // 2] + order[len(order) - n // 2 :]


@dataclass(frozen=True)
class SnowballFigures:
    """Growth factors on one benchmark, for removed layers and random directions.

    Attributes:
        record: Record of the model and benchmark.
        documents: Number of documents for which growth is computed.
        left_out: Number of documents that are left out, because a hidden state is not finite or the
            text has too few tokens.
        tokens: Growth averaged over all tokens.
        later: Growth averaged over all tokens except the first token of each text.
        explained: Correlations with the accuracy drops; None if no drop of a single removed layer
            is measured.
    """

    record: CellRecord
    documents: int
    left_out: int
    tokens: TokenGrowth
    later: TokenGrowth
    explained: DropExplanation | None

    @property
    def layers(self) -> int:
        """Number of the model's layers."""
        return self.record.model.layers

    @property
    def drop_ranks(self) -> dict[int, Estimate]:
        """Rank of each layer by drop, with an interval of possible ranks; 1 = largest drop."""
        if self.explained is None:
            return {}
        layers, runs = self.explained.layers, self.record.runs_of_kind()
        ranges = cell_ranks(self.record, [runs[layer] for layer in layers])
        by_drop = self.explained.by_drop
        return {n: Estimate(by_drop[n], *ends) for n, ends in zip(layers, ranges, strict=True)}


def compute_figures(subject: Subject, observations: Observations) -> SnowballFigures | None:
    """Compute growth factors, and the correlations of growth factors with drops.

    Returns None if fewer than two documents have finite hidden states.
    """
    outcomes = subject.outcomes()
    arrays = observations.select(outcomes.documents)
    is_later = np.triu(np.ones(arrays["removed"].shape[-2:], dtype=bool))
    count = len(outcomes.tasks)
    finite = [np.isfinite(array[..., is_later]).reshape(count, -1) for array in arrays.values()]
    usable = np.asarray(np.concatenate(finite, axis=1).all(axis=1))
    if usable.sum() < 2:
        return None
    arrays = {name: array[usable] for name, array in arrays.items()}
    arrays["random"] = arrays["random"].mean(axis=2)
    strata = np.array(outcomes.tasks)[usable]
    counts = int(usable.sum()), int((~usable).sum())
    tokens, later = (TokenGrowth(arrays, strata, index) for index in (ALL_TOKENS, LATER_TOKENS))
    selected = outcomes.select(usable)
    explained = DropExplanation(selected, arrays) if selected.whole_layers else None
    return SnowballFigures(subject.record, *counts, tokens, later, explained)


def _split(arrays: Mapping[str, Array], tokens: int) -> tuple[dict[str, Array], dict[str, Array]]:
    """Separate the differences right after the changed layer from those before the output head.

    Args:
        arrays: Kind of change, such as `removed` → differences after every layer.
        tokens: `ALL_TOKENS`, or `LATER_TOKENS` to leave out the first token of each text.

    Returns:
        Two dicts: differences right after the changed layer, and before the output head. Each dict
        maps the kind of change to an array `[documents, layers]`.
    """
    means = {name: array[:, tokens] for name, array in arrays.items()}
    starts = {name: np.diagonal(array, axis1=1, axis2=2) for name, array in means.items()}
    return starts, {name: array[:, :, -1] for name, array in means.items()}


class Snowball(Study[SnowballSettings]):
    """Study that tests whether later layers amplify removals and random perturbations."""

    name = "snowball"
    question = "Do later layers amplify the change that the removal of a layer causes?"
    intact = True
    layers = 1
    texts = SNOWBALL_TEXTS

    def answer(self, context: StudyContext, subjects: list[Subject]) -> StudyResult:
        """Report how later layers amplify the change that each removal causes.

        The result also contains a reason for each missing figure.
        """
        result, cells = StudyResult(), []
        kind = f"snowball-{self.settings.draws}"
        for subject in subjects:
            observe = partial(observe_subject, subject, kind, context, self._begin_observing)
            observations, refusal = try_model(observe)
            if observations is None:
                result.lack(subject.request.title, SNOWBALL_TEXTS.render("refused", refusal))
                continue
            cell = compute_figures(subject, observations)
            result.lack(
                subject.request.title, *_describe_missing_results(cell, context.input.source)
            )
            cells += [cell] if cell is not None else []
        for model_cells in group_by(cells, lambda cell: cell.record.model.key).values():
            result.add(*_write_answers(model_cells, self.settings.draws))
            if len(model_cells) > 1:
                name = model_cells[0].record.model.name
                title = f"{name}: growth of hidden-state changes after each removal, by benchmark"
                growths = {cell.record.benchmark.title: cell.tokens.removed for cell in model_cells}
                result.add(_growth_chart(title, "removed", growths))
        if cells:
            result.add(_summary_table(cells))
        for cell in cells:
            result.add(_layer_table(cell), _predictor_table(cell), *_build_charts(cell))
        return result

    def _begin_observing(self, engine: Engine) -> ObserveDocument:
        is_verified = False

        def observe_document(document: Document) -> DocumentArrays:
            nonlocal is_verified
            if not is_verified:
                verify_batching(engine, document, self.settings.draws)
                is_verified = True
            return perturbation_growth(engine, document, self.settings.draws)

        return observe_document


# Sentences


def _describe_missing_results(cell: SnowballFigures | None, file: str) -> list[str]:
    """Return sentences about the missing results of a benchmark, with advice.

    Args:
        cell: The results on the benchmark; None if the benchmark was not measured.
        file: Name of the experiment file.

    Returns:
        One sentence for each missing result, with the command or setting that gives the result.
    """
    if cell is None:
        return SNOWBALL_TEXTS.render_all("lacking", None, 0, 0, file)
    needed = min_growth_documents(len(cell.tokens.removed.defined), SIGNIFICANT)
    absent = cell.layers - (len(cell.explained.layers) if cell.explained else 0)
    return SNOWBALL_TEXTS.render_all("lacking", cell, needed, absent, file)


def _write_answers(cells: Sequence[SnowballFigures], draws: int) -> Iterator[str]:
    """Yield sentences about the growth factors of one model.

    The sentences state the growth on each benchmark, and how well growth predicts the drops.
    """
    yield _write_verdict(cells)
    for cell in cells:
        yield from SNOWBALL_TEXTS.render_all("cell", cell, draws)
    if len(cells) > 1:
        yield _write_benchmark_test(cells)
    signs = [(cell.tokens.removed.signs, cell.later.removed.signs) for cell in cells]
    changed = sum(a != b for pair in signs for a, b in zip(*pair, strict=True))
    verdicts = sum(cell.layers - 1 for cell in cells)
    yield SNOWBALL_TEXTS.render("without_the_first", cells, changed, verdicts)


def _write_verdict(cells: Sequence[SnowballFigures]) -> str:
    signs = Counter(sign for cell in cells for sign in cell.tokens.removed.signs)
    handed_on = [factor for cell in cells for factor in cell.tokens.handed_on.defined]
    median = float(np.median(handed_on)) if handed_on else np.nan
    name, layers = cells[0].record.model.name, signs.total() - signs[None]
    return SNOWBALL_TEXTS.render("verdict", name, signs[1], signs[-1], layers, median)


def _write_benchmark_test(cells: Sequence[SnowballFigures]) -> str:
    """Write for how many layers the growth factor differs significantly between benchmarks."""
    benchmarks = [cell.record.benchmark for cell in cells]
    tasks = Counter(task.name for benchmark in benchmarks for task in benchmark.tasks)
    repeated = [name for name, count in tasks.items() if count > 1]
    layers = range(0 if repeated else cells[0].layers - 1)
    tests = [growth_difference_p([c.tokens.ratios[:, layer] for c in cells]) for layer in layers]
    adjusted = [p for p in holm(tests) if p is not None]
    titles = [benchmark.title for benchmark in benchmarks]
    return SNOWBALL_TEXTS.render("between", titles, repeated, adjusted)


# Tables and charts


def _layer_table(cell: SnowballFigures) -> Table:
    """Build the table of hidden-state differences, growth factors and drops, one row per layer."""
    tokens, growth, runs = cell.tokens, cell.tokens.removed, cell.record.runs_of_kind()
    by_cosine = cell.explained.by_cosine if cell.explained else {}
    verdicts = [_VERDICT_WORDS[sign] for sign in growth.signs]

    def reason(layer: int) -> str:
        return growth.factors[layer].reason or _LAST_LAYER

    def drop(layer: int) -> Estimate | None:
        return runs[layer].drop if layer in runs else None

    return build_table(
        f"{cell.record.heading}: relative difference of hidden states after each layer's removal",
        [
            Column("layer", "count", lambda layer: layer),
            Column("behind it", "percent", lambda i: tokens.paths[i, i], "not finite"),
            Column("before the head", "percent", lambda i: tokens.paths[i, -1], "not finite"),
            Column("growth", "times", growth.factors.__getitem__),
            Column("a layer", "times", tokens.factors_per_layer.__getitem__, reason),
            Column("growing steps", "text", tokens.amplifying_layers.__getitem__, reason),
            Column("verdict", "text", verdicts.__getitem__, reason),
            Column("random", "times", tokens.random.values.__getitem__, reason),
            Column("other tokens'", "times", tokens.shuffled.values.__getitem__, reason),
            Column("size if passed on = 1", "times", tokens.handed_on.values.__getitem__, reason),
            Column("drop", metric_format(cell.record).form, drop, UNMEASURED),
            Column("cosine rank", "count", by_cosine.get, UNMEASURED),
            Column("drop rank", "count", cell.drop_ranks.get, UNMEASURED, interval=True),
        ],
        range(cell.layers),
        *SNOWBALL_TEXTS.render_all("layer_notes", cell.documents),
    )


def _predictor_table(cell: SnowballFigures) -> Table:
    """Build the table of the rank correlations and partial correlations with the drops."""
    rows = cell.explained.predictors.values() if cell.explained else []
    title = f"{cell.record.heading}: rank correlation of several quantities with the drops"
    return figure_table(Predictor, title, rows, *SNOWBALL_TEXTS.render_all("predictor_notes"))


def _summary_table(cells: Sequence[SnowballFigures]) -> Table:
    """Build the summary table with one row for each model and benchmark."""

    def spearman(label: str, name: str) -> Column[SnowballFigures]:
        def value(cell: SnowballFigures) -> Estimate | None:
            return cell.explained.predictors[name].spearman if cell.explained else None

        return Column(label, "coefficient", value, UNMEASURED)

    def count(label: str, growth: str, sign: int) -> Column[SnowballFigures]:
        return Column(label, "count", lambda cell: getattr(cell.tokens, growth).signs.count(sign))

    none = "no layer's growth is defined"
    return build_table(
        "Growth, over later layers, of the difference that the removal of a layer causes",
        [
            Column("model", "text", lambda cell: cell.record.model.name),
            Column("benchmark", "text", lambda cell: cell.record.benchmark.title),
            Column("documents", "count", lambda cell: cell.documents),
            count("layers that grow", "removed", 1),
            count("shrink", "removed", -1),
            count("undecided", "removed", 0),
            Column("median growth", "times", lambda cell: cell.tokens.removed.median, none),
            Column("of random directions", "times", lambda cell: cell.tokens.random.median, none),
            count("removal grows more", "relative", 1),
            count("less", "relative", -1),
            spearman("cosine ~ drop", COSINE_SCORE),
            spearman("before the head ~ drop", END_DIFFERENCE),
            spearman("growth ~ drop given cosine", REMOVAL_GROWTH),
        ],
        cells,
        "The sign ~ means Spearman's rank correlation over layers. Its 95 % intervals reflect the "
        "sampling of documents.",
    )


def _growth_chart(title: str, layer: str, growths: Mapping[str, Growth]) -> LineChart:
    """Build a chart of growth factors by layer, with one line per entry of `growths`.

    The last layer has no growth factor and is left out. The axis title is `layer` + " layer".
    """
    lines = {name: growth.factors[:-1] for name, growth in growths.items()}
    count = len(next(iter(lines.values())))
    axes = (
        f"{layer} layer (0-based)",
        "growth factor: hidden-state change before the output head / just after the layer",
    )
    return line_chart(title, axes, "times", range(count), lines, log_y=True)


def _build_charts(cell: SnowballFigures) -> Iterator[StudyChart]:
    """Yield charts of growth factors, and of the hidden-state differences that removals cause."""
    tokens, paths, layers = cell.tokens, cell.tokens.paths, range(cell.layers)
    growths = {"removed": tokens.removed, "random directions": tokens.random}
    growths |= {"other tokens' updates": tokens.shuffled}
    title = (
        f"{cell.record.heading}: growth factors of hidden-state changes after removals and "
        "after random perturbations"
    )
    yield _growth_chart(title, "perturbed", growths)
    title = f"{cell.record.heading}: layers whose ranks by cosine and by drop differ most"
    axes = ("behind layer (0-based)", "relative difference from the intact model's hidden state")
    lines = {name: paths[layer] for layer, name in _choose_drawn_layers(cell)}
    yield line_chart(title, axes, "percent", layers, lines, log_y=True)
    with np.errstate(divide="ignore", invalid="ignore"):
        doublings = np.log2(paths / np.diagonal(paths)[:, None])
    yield MapChart(
        title=f"{cell.record.heading}: number of doublings of the hidden-state change",
        x="behind layer (0-based)",
        y="removed layer (0-based)",
        name="doublings",
        unit="coefficient",
        columns=tuple(layers),
        rows=tuple(map(str, layers)),
        values=tuple(map(chart_values, doublings)),
    )


def _choose_drawn_layers(cell: SnowballFigures) -> Iterator[tuple[int, str]]:
    """Choose the removed layers to draw in the chart of hidden-state differences.

    The layers are those that the cosine score misjudges most, or evenly spaced layers without
    accuracy drops. Yields pairs (layer, text for the legend).
    """
    if cell.explained is None:
        layers = np.unique(np.linspace(0, cell.layers - 1, MAX_PATHS).round()).astype(int)
        yield from ((layer, f"layer {layer}") for layer in layers.tolist())
        return
    by_cosine, by_drop = cell.explained.by_cosine, cell.drop_ranks
    for layer in cell.explained.misjudged(MAX_PATHS):
        drop_rank = interval_text(by_drop[layer].low, by_drop[layer].high, "{:.0f}".format)
        yield layer, f"layer {layer}: rank {by_cosine[layer]} by cosine, rank {drop_rank} by drop"
