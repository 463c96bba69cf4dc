"""Ranks layers within a model by what their removal costs, and models by how much it hurts.

Only what is comparable is averaged: a benchmark counts once in a model's mean, and models are
ranked on all their layers and on the same benchmarks, documents and settings alike: on those that
most models share. A model that lacks one of them has no rank, and the others keep theirs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from scipy import stats

from tracker.metrics.accuracy import Estimate
from tracker.metrics.combined import difference, mean, ratio
from tracker.metrics.correlation import rank_disagreement
from tracker.metrics.proxies import PROXIES
from tracker.provenance import content_hash
from tracker.records import CellRecord, ModelIdentity, RunRecord
from tracker.reporting.wording import benchmark_labels, model_labels

LAYER_RULE = (
    "Layers are ranked by their mean accuracy relevance over the benchmarks (1 = removing the "
    "layer takes the model down to chance, 0 = no change, negative = removal helps). Each "
    "benchmark counts alike and once; only layers measured on all of them have a rank."
)
MODEL_RULE = (
    "Models are ranked by their mean accuracy relevance over all layers, the lowest first: the "
    "less the removal of one layer hurts, the more robust the model. They are compared on the "
    "benchmarks, documents and settings that most models share; a model that lacks one of these, "
    "or one of its own layers there, has no rank."
)
INTERVAL_RULE = (
    "Intervals (95 %) say what other documents of the same benchmarks would give, not what other "
    "benchmarks would."
)


_NOTHING_SHARED = "no two models share a benchmark on all their layers"


@dataclass(frozen=True)
class LayerStanding:
    """Where one layer of a model stands.

    Attributes:
        layer: 0-based.
        relevance: Mean accuracy relevance over the benchmarks.
        drop: Mean accuracy drop over the benchmarks, a fraction.
        cosine_score: Mean cosine score over the benchmarks; None where one is undefined.
        benchmarks: How many benchmarks define its relevance.
        rank: 1 = matters most; None where a benchmark is lacking.
        best_rank: Its best rank on a single benchmark.
        worst_rank: Its worst.
    """

    layer: int
    relevance: Estimate
    drop: Estimate
    cosine_score: float | None
    benchmarks: int
    rank: int | None = None
    best_rank: int | None = None
    worst_rank: int | None = None


@dataclass(frozen=True)
class LayerBoard:
    """The layers of one model, the most relevant first.

    Attributes:
        model: The model.
        cells: The cells that count, in the order of the page.
        layers: One standing a layer: by rank, then those without one.
        left_out: Benchmark → why it does not count.
    """

    model: ModelIdentity
    cells: tuple[CellRecord, ...]
    layers: tuple[LayerStanding, ...]
    left_out: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class ModelStanding:
    """How much the removal of one layer hurts a model.

    Attributes:
        model: The model.
        relevance: Mean accuracy relevance over layers and common benchmarks.
        drop: Mean accuracy drop over the same, a fraction.
        worst_layer: The layer of the largest mean relevance; None without any.
        costly: Layers whose drop is surely positive (interval above 0) on some common benchmark;
            None without any benchmark.
        layers: Layers behind these figures.
        rank: 1 = hurt least; None where it lacks what counts, or there is nobody to compare with.
    """

    model: ModelIdentity
    relevance: Estimate
    drop: Estimate
    worst_layer: int | None
    costly: int | None
    layers: int
    rank: int | None = None


@dataclass(frozen=True)
class ModelBoard:
    """The models, the most robust first.

    Attributes:
        models: One standing a model.
        benchmarks: The benchmarks that count: all ranked models share them.
        left_out: Benchmark → why it does not count; model → why it has no rank.
    """

    models: tuple[ModelStanding, ...]
    benchmarks: tuple[str, ...]
    left_out: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Agreement:
    """How well one proxy orders the layers of some cells.

    Attributes:
        proxy: Its field's name.
        spearman: Spearman with the accuracy drop in every cell where it is defined.
        differ: Mean share of layers whose exact rank differs between proxy and drop.
        chance: The share that two random orders would give.
        cells: Cells behind `differ`.
    """

    proxy: str
    spearman: tuple[float, ...]
    differ: float | None
    chance: float | None
    cells: int


def relevance_estimate(cell: CellRecord, record: RunRecord) -> Estimate:
    """Give a run's accuracy relevance its interval.

    The drop's interval is divided by that of the baseline above chance, as independent figures:
    they share their documents, so the interval is rather too wide than too narrow.

    Args:
        cell: The cell.
        record: One of its runs.

    Returns:
        The relevance; no interval where the baseline's reaches down to chance.
    """
    value, chance = record.accuracy_relevance, cell.chance_accuracy
    if value is None:
        return Estimate(None, reason=record.reasons.get("accuracy_relevance", "not recorded"))
    if (
        chance is None
        or cell.baseline_accuracy is None
        or cell.baseline_low is None
        or cell.baseline_high is None
    ):
        return Estimate(value)
    baseline = (cell.baseline_accuracy, cell.baseline_low, cell.baseline_high)
    value_above, low_above, high_above = (figure - chance for figure in baseline)
    found = ratio(drop_estimate(record), Estimate(value_above, low_above, high_above))
    if found.low is None or found.high is None:
        return Estimate(value)
    return Estimate(value, min(found.low, 1.0), min(found.high, 1.0))


def drop_estimate(record: RunRecord) -> Estimate:
    """Take a run's accuracy drop and its interval together."""
    return Estimate(
        record.accuracy_drop,
        record.accuracy_drop_low,
        record.accuracy_drop_high,
        reason=record.reasons.get("accuracy_drop"),
    )


def models_of(cells: Iterable[CellRecord]) -> list[list[CellRecord]]:
    """Group cells by model: name, weights and dtype."""
    groups: dict[tuple[str, str, str], list[CellRecord]] = {}
    for cell in cells:
        groups.setdefault(cell.model.key, []).append(cell)
    return list(groups.values())


def layer_board(cells: Sequence[CellRecord]) -> LayerBoard:
    """Rank the layers of one model.

    Args:
        cells: Its cells.

    Returns:
        The board; without layers where no benchmark counts.
    """
    counted, left_out = _counted(cells)
    layers = sorted({run.layer for cell in counted for run in cell.whole_layers})
    by_cell = [{run.layer: run for run in cell.whole_layers} for cell in counted]
    relevances = {
        layer: [
            relevance_estimate(cell, runs[layer])
            for cell, runs in zip(counted, by_cell, strict=True)
            if layer in runs
        ]
        for layer in layers
    }
    full = [
        layer
        for layer in layers
        if sum(found.value is not None for found in relevances[layer]) == len(counted)
    ]
    means = {layer: mean(relevances[layer]) for layer in layers}
    rank = dict(zip(full, _ranks([means[layer].value for layer in full]), strict=True))
    single = [
        _ranks([relevances[layer][place].value for layer in full]) for place in range(len(counted))
    ]
    standings = []
    for layer in layers:
        runs = [found[layer] for found in by_cell if layer in found]
        scores = [run.cosine_score for run in runs if run.cosine_score is not None]
        mine = [ranks[full.index(layer)] for ranks in single] if layer in rank else []
        standings.append(
            LayerStanding(
                layer=layer,
                relevance=means[layer],
                drop=mean([drop_estimate(run) for run in runs]),
                cosine_score=sum(scores) / len(scores) if len(scores) == len(runs) else None,
                benchmarks=sum(found.value is not None for found in relevances[layer]),
                rank=rank.get(layer),
                best_rank=min(mine, default=None),
                worst_rank=max(mine, default=None),
            )
        )
    standings.sort(key=lambda s: (s.rank is None, s.rank, s.layer))
    return LayerBoard(cells[0].model, tuple(counted), tuple(standings), left_out)


def model_board(cells: Sequence[CellRecord]) -> ModelBoard:
    """Rank models by how much the removal of one layer hurts.

    Args:
        cells: The cells of all models.

    Returns:
        The board; nobody has a rank where no two models share a benchmark, or there is one model.
    """
    groups = models_of(cells)
    names = model_labels([group[0].model for group in groups])
    left_out: dict[str, str] = {}
    known: list[dict[str, CellRecord]] = []
    for name, group in zip(names, groups, strict=True):
        labels = benchmark_labels(group)
        known.append({})
        for cell, label in zip(group, labels, strict=True):
            if why := _unusable(cell) or _lacking_layers(cell):
                left_out[f"{label} of {name}"] = why
            else:
                known[-1].setdefault(setting(cell), cell)
    shared, ranked = _shared(known)
    labels = benchmark_labels([known[ranked[0]][key] for key in shared]) if shared else []
    every = {key: cell for mine in known for key, cell in mine.items()}
    for key, label in zip(every, benchmark_labels([*every.values()]), strict=True):
        if key not in shared:
            left_out[label] = _not_shared(key, known, names, ranked)
    standings = []
    for place, (group, mine) in enumerate(zip(groups, known, strict=True)):
        lacking = [label for key, label in zip(shared, labels, strict=True) if key not in mine]
        if shared and lacking:
            left_out[names[place]] = f"not all its layers are measured on {', '.join(lacking)}"
        counted = [] if lacking else [mine[key] for key in shared]
        why = "it lacks what the others are ranked on" if lacking else _NOTHING_SHARED
        standings.append(_model_standing(group[0].model, counted, why))
    if len(ranked) > 1:
        # From the lowest relevance: what is hurt least comes first.
        values = [standings[place].relevance.value for place in ranked]
        for place, rank in zip(ranked, _ranks(values, lowest_first=True), strict=True):
            standings[place] = replace(standings[place], rank=rank)
    standings.sort(key=lambda s: (s.rank is None, s.rank or 0))
    return ModelBoard(tuple(standings), tuple(labels), left_out)


def _shared(known: Sequence[Mapping[str, CellRecord]]) -> tuple[list[str], list[int]]:
    """Choose the settings that most models share, one a benchmark; and say who has them all."""
    holders: dict[str, list[int]] = {}
    for place, mine in enumerate(known):
        for key in mine:
            holders.setdefault(key, []).append(place)
    every = {key: cell for mine in known for key, cell in mine.items()}
    if len(known) > 1:  # a model alone is shown on all that it has
        holders = {key: places for key, places in holders.items() if len(places) > 1}

    def common(places: Sequence[int]) -> list[str]:
        best: dict[str, str] = {}
        for key in holders:
            name = every[key].benchmark.name
            if set(places) <= set(holders[key]) and (
                name not in best or _worth(every[best[name]]) < _worth(every[key])
            ):
                best[name] = key
        return [key for key in holders if key in best.values()]

    def preference(key: str) -> tuple[int, int, tuple[int, int, bool], str]:
        return len(holders[key]), len(common(holders[key])), _worth(every[key]), key

    if not holders:
        return [], []
    ranked = holders[max(holders, key=preference)]
    return common(ranked), ranked


def _not_shared(
    key: str, known: Sequence[Mapping[str, CellRecord]], names: Sequence[str], ranked: Sequence[int]
) -> str:
    lacking = [place for place in ranked or range(len(known)) if key not in known[place]]
    if not lacking:
        return "the benchmark counts once, by its larger cells"
    return f"not measured, or otherwise, for {', '.join(names[place] for place in lacking)}"


def compare(one: CellRecord, other: CellRecord) -> list[tuple[int, Estimate]]:
    """Subtract the accuracy drops of one model from those of another, layer by layer.

    Args:
        one: A cell.
        other: The cell of another model with as many layers, or of another precision.

    Returns:
        Layer → drop in `one` minus drop in `other`, for the whole layers that both measured.
    """
    theirs = {run.layer: run for run in other.whole_layers}
    return [
        (run.layer, difference(drop_estimate(run), drop_estimate(theirs[run.layer])))
        for run in one.whole_layers
        if run.layer in theirs
    ]


def agreements(cells: Sequence[CellRecord]) -> list[Agreement]:
    """Say how well each proxy orders the layers, with chance beside it.

    Args:
        cells: Cells of any models.

    Returns:
        One entry a proxy.
    """
    return [_agreement(proxy, cells) for proxy in PROXIES]


def setting(cell: CellRecord) -> str:
    """Name all that must be equal before two models' figures on a benchmark may be compared.

    Args:
        cell: A cell.

    Returns:
        A key: the documents and how they were put to the model, the metric and how many documents.
    """
    benchmark = cell.benchmark.model_dump(mode="json", exclude={"data", "primary_metric"})
    # As many documents as others have are not theirs while they are not all that was asked for.
    growing = cell.key if "n" in cell.reasons else ""
    return content_hash([benchmark, cell.metric, cell.n, cell.removed, growing])


def _counted(cells: Sequence[CellRecord]) -> tuple[list[CellRecord], dict[str, str]]:
    """Choose the cells that count, and say why others do not."""
    labels = dict(zip(map(id, cells), benchmark_labels(cells), strict=True))
    left_out: dict[str, str] = {}
    best: dict[str, CellRecord] = {}
    for cell in cells:
        if why := _unusable(cell):
            left_out[labels[id(cell)]] = why
        elif (known := best.get(cell.benchmark.name)) is None or _worth(known) < _worth(cell):
            best[cell.benchmark.name] = cell
    for cell in cells:
        counts = best.get(cell.benchmark.name)
        if counts is not None and counts is not cell and labels[id(cell)] not in left_out:
            left_out[labels[id(cell)]] = f"the benchmark counts once, as {labels[id(counts)]}"
    return [cell for cell in cells if best.get(cell.benchmark.name) is cell], left_out


def _worth(cell: CellRecord) -> tuple[int, int, bool]:
    """Of two cells on one benchmark the larger counts: layers, documents, its own metric."""
    return len(cell.whole_layers), cell.n, not cell.other_metric


def _lacking_layers(cell: CellRecord) -> str | None:
    """Say which layers of the model have no relevance: the mean of the others is not its own."""
    known = {run.layer for run in cell.whole_layers if run.accuracy_relevance is not None}
    lacking = [layer for layer in range(cell.model.layers) if layer not in known]
    if not lacking:
        return None
    return f"{len(known)} of {cell.model.layers} layers have a relevance, and a model counts whole"


def _unusable(cell: CellRecord) -> str | None:
    if cell.removed:
        return f"measured {cell.beneath}"
    if not cell.whole_layers:
        return "no whole single layer was removed"
    if all(run.accuracy_relevance is None for run in cell.whole_layers):
        return cell.reason_of("accuracy_relevance", cell.whole_layers[0])
    return None


def _ranks(values: Sequence[float | None], lowest_first: bool = False) -> list[int]:
    """Rank figures, 1 for the largest (or lowest); equal ones share the better rank."""
    numbers = np.round(np.array(values, dtype=np.float64), 12)
    ranks = stats.rankdata(numbers if lowest_first else -numbers, method="min")
    return [int(rank) for rank in ranks]


def _model_standing(model: ModelIdentity, cells: Sequence[CellRecord], why: str) -> ModelStanding:
    if not cells:
        nothing = Estimate(None, reason=why)
        return ModelStanding(model, nothing, nothing, None, None, 0)
    board = layer_board(cells)
    layers = [standing for standing in board.layers if standing.rank is not None]
    costly = {
        run.layer
        for cell in cells
        for run in cell.whole_layers
        if run.accuracy_drop_low is not None and run.accuracy_drop_low > 0
    }
    return ModelStanding(
        model=model,
        # All layers are measured on the same documents.
        relevance=mean([standing.relevance for standing in layers], independent=False),
        drop=mean([standing.drop for standing in layers], independent=False),
        worst_layer=layers[0].layer if layers else None,
        costly=len(costly),
        layers=len(layers),
    )


def _agreement(proxy: str, cells: Sequence[CellRecord]) -> Agreement:
    spearman = [
        found.value
        for cell in cells
        for found in cell.correlations
        if (found.proxy, found.coefficient, found.subset) == (proxy, "spearman", "all")
        and found.value is not None
    ]
    shares = []
    for cell in cells:
        pairs = [
            (getattr(run, proxy), run.accuracy_drop)
            for run in cell.whole_layers
            if getattr(run, proxy) is not None and run.accuracy_drop is not None
        ]
        if len(pairs) > 2:
            table = np.array(pairs, dtype=np.float64)
            shares.append(rank_disagreement(table[:, 0], table[:, 1]))
    differ, chance = np.mean(shares, axis=0).tolist() if shares else (None, None)
    return Agreement(proxy, tuple(spearman), differ, chance, len(shares))
