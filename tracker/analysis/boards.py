"""Leaderboards of the layers and parts of a model, and of models."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from statistics import NormalDist

from tracker.analysis.claims import Claims, claims, mean_drop, shown_word
from tracker.analysis.comparable import (
    Pick,
    benchmark_labels,
    countable,
    named_models,
    outdated,
    setting,
    unusable,
    worth,
)
from tracker.core.changes import WHOLE_LAYER, Change
from tracker.core.estimates import Estimate
from tracker.core.formats import defined
from tracker.core.grouping import grouped
from tracker.core.identities import ModelIdentity
from tracker.core.records import CellRecord, RunRecord
from tracker.stats.accuracy import OutcomeVariance, documents_needed
from tracker.stats.rank_agreement import places
from tracker.stats.support import Verdict, mean, pairs, ratio, together, verdicts
from tracker.stats.support import ranks as rank_intervals


def layer_relevance(cell: CellRecord, layer: int) -> Estimate:
    """Find the accuracy relevance of one whole layer with its interval, or why it is undefined."""
    record = cell.runs_of().get(layer)
    relevance = relevance_estimate(cell, record) if record else Estimate(None)
    if defined(relevance.value):
        return relevance
    return Estimate(None, reason=why_undefined(cell, layer, "accuracy_relevance"))


def why_undefined(cell: CellRecord, layer: int, field: str) -> str:
    """Return why a field of one whole layer, measured or not, is undefined."""
    record = cell.runs_of().get(layer)
    return cell.reason_of(field, record) if record else cell.absence(Change(layers=(layer,)))


def sure(figure: Estimate) -> bool:
    """Check that a figure's interval does not hold zero."""
    low, high = figure.low, figure.high
    return low is not None and high is not None and not low <= 0 <= high


def relative_depth(layer: int, layers: int) -> float:
    """Place a layer between the first (0) and the last (1); 0 in a model of one layer."""
    return layer / (layers - 1) if layers > 1 else 0.0


def relevance_estimate(cell: CellRecord, record: RunRecord, family: int = 1) -> Estimate:
    """Compute the interval of a run's accuracy relevance, simultaneous over a family of runs.

    The drop's interval is divided by that of the baseline above chance, as independent figures.
    They share their documents, so the interval is rather too wide than too narrow. There is no
    interval if the baseline's interval reaches chance.
    """
    value, chance = record.accuracy_relevance, cell.chance_accuracy
    if value is None:
        return Estimate(None, reason=record.reasons.get("accuracy_relevance", "not recorded"))
    drop, intact = together([record.drop, cell.baseline], [record.n, cell.n], family)
    if chance is None or intact.value is None or intact.low is None or intact.high is None:
        return Estimate(value)
    share = ratio(drop, Estimate(intact.value - chance, intact.low - chance, intact.high - chance))
    if share.low is None or share.high is None:
        return Estimate(value)
    return Estimate(value, min(share.low, 1.0), min(share.high, 1.0))


@dataclass(frozen=True)
class PartStanding:
    """Standing of a layer, or of another part of a model, on a leaderboard.

    Attributes:
        runs: Its run on each benchmark that measured it.
        relevance: Mean accuracy relevance over the benchmarks.
        benchmarks: Number of benchmarks where its relevance is defined.
        deciding: Mean accuracy drop over the benchmarks, as a fraction. Its interval holds
            simultaneously for all parts of the board and decides the verdict.
        rank: Rank, 1 = matters most, with the best and the worst rank that it may have; undefined
            if a benchmark is missing. All intervals of a board hold together with 95 % confidence.
        verdict: Supported statement about it, simultaneous over the board.
        shown: The verdict in a word or two.
    """

    runs: tuple[RunRecord, ...]
    relevance: Estimate
    benchmarks: int
    deciding: Estimate
    rank: Estimate
    verdict: Verdict
    shown: str

    @property
    def change(self) -> Change:
        """The change of the model."""
        return self.runs[0].change

    @property
    def layer(self) -> int:
        """The layer, 0-based."""
        return self.change.layer

    @property
    def drop(self) -> Estimate:
        """Mean accuracy drop over the benchmarks, with an interval for itself."""
        return mean([run.drop for run in self.runs])

    @property
    def cosine_score(self) -> float | None:
        """Mean cosine score over the benchmarks; None where one is undefined."""
        scores = [run.cosine_score for run in self.runs if run.cosine_score is not None]
        return sum(scores) / len(scores) if len(scores) == len(self.runs) else None


@dataclass(frozen=True)
class PartBoard:
    """Parts of one kind of one model, sorted by the lower bound of their drop; others come last.

    Attributes:
        kind: Kind of the parts.
        cells: Cells that count, one for each benchmark, in the order of the page.
        parts: Parts. Except for layers, only parts that all benchmarks measured.
        left_out: Benchmark → reason why it does not count.
    """

    model: ModelIdentity
    kind: Change
    cells: tuple[CellRecord, ...]
    parts: tuple[PartStanding, ...]
    left_out: dict[str, str]

    @property
    def ranked(self) -> list[PartStanding]:
        """Those that have a rank, the most relevant first."""
        ranked = [standing for standing in self.parts if standing.rank.value is not None]
        return sorted(ranked, key=lambda standing: (standing.rank.value, standing.layer))


@dataclass(frozen=True)
class LayerBoard(PartBoard):
    """The layers of one model.

    Attributes:
        claims: Supported statements about the layers.
    """

    claims: Claims

    @property
    def by_depth(self) -> list[PartStanding]:
        """All of them, the first layer first."""
        return sorted(self.parts, key=lambda standing: standing.layer)


def layer_board(cells: Sequence[CellRecord]) -> LayerBoard:
    """Rank the layers of one model; none where no benchmark counts."""
    counted, left_out = countable(cells)
    rows = _rows(counted, lambda cell: cell.whole_layers)
    statements = claims(cells)
    drops = {change: statements.drops.get(change.layer) for change in rows}
    open_: Verdict = "open"
    verdicts = {change: statements.verdicts.get(change.layer, open_) for change in rows}
    words = {change: statements.word(change.layer) for change in rows}
    standings = _standings(counted, rows, drops, verdicts, words)
    model = cells[0].model
    return LayerBoard(model, WHOLE_LAYER, tuple(counted), standings, left_out, statements)


def part_boards(cells: Sequence[CellRecord]) -> list[PartBoard]:
    """Rank the parts of one model, kind by kind; none where a kind's benchmarks do not count."""
    kinds = dict.fromkeys(
        run.change.kind.family for cell in cells for run in cell.runs if run.change.kind.many
    )
    boards = [_part_board(cells, kind) for kind in kinds]
    return [board for board in boards if board.parts]


def _part_board(cells: Sequence[CellRecord], kind: Change) -> PartBoard:
    def runs_of(cell: CellRecord) -> list[RunRecord]:
        return [run for run in cell.runs if run.change.kind.family == kind]

    counted, left_out = countable([cell for cell in cells if runs_of(cell)], runs_of)
    rows = {c: row for c, row in _rows(counted, runs_of).items() if len(row) == len(counted)}
    means = [mean_drop([run for _, run in row], len(rows)) for row in rows.values()]
    drops = dict(zip(rows, means, strict=True))
    shown = dict(zip(rows, verdicts(means), strict=True))
    words = {
        change: "undefined" if drop.value is None else shown_word(shown[change], drop)
        for change, drop in drops.items()
    }
    standings = _standings(counted, rows, drops, shown, words)
    return PartBoard(cells[0].model, kind, tuple(counted), standings, left_out)


_Rows = Mapping[Change, Sequence[tuple[CellRecord, RunRecord]]]


def _rows(cells: Sequence[CellRecord], runs_of: Pick) -> _Rows:
    every = ((cell, run) for cell in cells for run in runs_of(cell))
    return grouped(every, lambda of_cell: of_cell[1].change)


def _standings(
    cells: Sequence[CellRecord],
    rows: _Rows,
    drops: Mapping[Change, Estimate | None],
    verdicts: Mapping[Change, Verdict],
    words: Mapping[Change, str],
) -> tuple[PartStanding, ...]:
    """Rank the parts whose relevance is defined on every benchmark, and sort all by their drops."""
    relevances = {change: [relevance_estimate(*pair) for pair in rows[change]] for change in rows}
    benchmarks = {c: sum(r.value is not None for r in mine) for c, mine in relevances.items()}
    full = [change for change in rows if benchmarks[change] == len(cells)]
    placed = ranked(cells, [[run for _, run in rows[change]] for change in full])
    ranks = dict(zip(full, placed, strict=True))
    standings = []
    for change, row in rows.items():
        runs, relevance = tuple(run for _, run in row), mean(relevances[change])
        if (drop := drops[change]) is None:  # it is not measured on all benchmarks
            alone = mean([run.drop for run in runs])
            drop = Estimate(alone.value, reason=alone.reason)
        rank = ranks.get(change, Estimate(None, reason=relevance.reason))
        figures = relevance, benchmarks[change], drop, rank, verdicts[change], words[change]
        standings.append(PartStanding(runs, *figures))
    return tuple(sorted(standings, key=lambda s: (*by_lower_end(s.deciding), s.change.order)))


def by_lower_end(drop: Estimate) -> tuple[bool, float]:
    """Return a sort key: drops that are surely largest come first, those without interval last."""
    return None in (drop.value, drop.low), -(drop.low or 0.0)


def ranked(cells: Sequence[CellRecord], rows: Sequence[Sequence[RunRecord]]) -> list[Estimate]:
    """Rank parts by their mean relevance over all benchmarks, 1 = the largest.

    The baseline's accuracy above chance scales all runs of a benchmark alike, so it changes no
    order. The intervals therefore treat it as fixed.

    Args:
        cells: The benchmarks.
        rows: For each part, its run on each benchmark.

    Returns:
        The ranks, each with the best and the worst rank that it may have; all intervals hold
        together with 95 % confidence.
    """
    by_mean = places([mean_relevance(cells, runs).value for runs in rows])
    levels = [cell.baseline.value for cell in cells]
    exact = [Estimate(level, low=level, high=level) for level in levels]
    fixed = [c.model_copy(update={"baseline": e}) for c, e in zip(cells, exact, strict=True)]
    wide = [mean_relevance(fixed, runs, pairs(len(rows))) for runs in rows]
    return [
        Estimate(place, *between)
        for place, between in zip(by_mean, rank_intervals(wide), strict=True)
    ]


def mean_relevance(
    cells: Sequence[CellRecord], runs: Sequence[RunRecord], family: int = 1
) -> Estimate:
    """Average the relevance of one change over benchmarks, with its run on each.

    The intervals hold simultaneously for `family` changes.
    """
    each = zip(cells, runs, strict=True)
    return mean([relevance_estimate(cell, run, family) for cell, run in each])


APART = 0.1
"""Difference of two models' mean relevance for which the needed documents are reported."""
_Z = NormalDist().inv_cdf(0.975)
_NOTHING_SHARED = "no two models share a benchmark on all their layers"


@dataclass(frozen=True)
class ModelStanding:
    """Standing of a model: how much the removal of one layer hurts it.

    Attributes:
        model: The model.
        relevance: Mean accuracy relevance over layers and common benchmarks.
        drop: Mean accuracy drop over the same, a fraction.
        worst_layer: Layer that is shown to have the largest mean relevance; None if open.
        costly: Layers that are shown to matter, on average over the common benchmarks; None without
            a benchmark.
        layers: Number of layers behind these figures.
        rank: Rank, 1 = hurt least, with the best and the worst rank that it may have. Undefined if
            a benchmark that counts is missing, or if there is no other model. All intervals of a
            board hold together with 95 % confidence.
    """

    model: ModelIdentity
    relevance: Estimate
    drop: Estimate
    worst_layer: int | None
    costly: int | None
    layers: int
    rank: Estimate


@dataclass(frozen=True)
class ModelBoard:
    """Models sorted by their mean relevance, the lowest first.

    Attributes:
        benchmarks: Benchmarks that count: all ranked models share them.
        left_out: Benchmark → reason why it does not count; model → reason why it has no rank.
        needed: Number of documents of each benchmark that distinguishes two models that differ by
            `APART`; None if unknown, or if as many are measured.
        available: Number of documents of the smallest benchmark.
    """

    models: tuple[ModelStanding, ...]
    benchmarks: tuple[str, ...]
    left_out: dict[str, str]
    needed: int | None = None
    available: int = 0

    @property
    def pairs(self) -> tuple[int, int]:
        """Number of pairs of ranked models whose order is open, and of all pairs."""
        ranked = [model for model in self.models if model.rank.value is not None]
        total = len(ranked) * (len(ranked) - 1) // 2
        # A rank's best is one more than how many are surely before it.
        return total - sum(int(model.rank.low or 1) - 1 for model in ranked), total


def model_board(cells: Sequence[CellRecord]) -> ModelBoard:
    """Rank models by how much the removal of one layer hurts.

    No model has a rank if no two models share a benchmark, or there is only one.
    """
    groups = named_models(cells)
    names = [*groups]
    left_out: dict[str, str] = {}
    usable: list[dict[str, CellRecord]] = []
    unused: defaultdict[tuple[str, str], dict[str, str]] = defaultdict(dict)
    for name, group in groups.items():
        labels = benchmark_labels(group)
        usable.append({})
        for cell, label in zip(group, labels, strict=True):
            if why := unusable(cell) or _lacking_layers(cell):
                unused[label, setting(cell)][name] = why
            else:
                usable[-1].setdefault(setting(cell), cell)
    shared, ranked = _shared(usable)
    labels = benchmark_labels([usable[ranked[0]][key] for key in shared]) if shared else []
    every = {key: cell for mine in usable for key, cell in mine.items()}
    for key, label in zip(every, benchmark_labels([*every.values()]), strict=True):
        if key not in shared:
            whys = dict(w for (_, one), each in unused.items() if one == key for w in each.items())
            left_out[label] = _not_shared(key, usable, names, ranked, whys)
    for (label, key), each in unused.items():
        if key in shared or key not in every:
            left_out |= {f"{label} of {name}": why for name, why in each.items()}
    standings = []
    for index, (group, mine) in enumerate(zip(groups.values(), usable, strict=True)):
        lacking = [label for key, label in zip(shared, labels, strict=True) if key not in mine]
        if shared and lacking:
            left_out[names[index]] = f"not all its layers are measured on {', '.join(lacking)}"
        counted = [] if lacking else [mine[key] for key in shared]
        why = "it lacks what the others are ranked on" if lacking else _NOTHING_SHARED
        standings.append(_model_standing(group[0].model, counted, why))
    needed, available = None, 0
    if len(ranked) > 1:
        rivals = [[usable[index][key] for key in shared] for index in ranked]
        # Sort from the lowest relevance: the model that is hurt least comes first.
        values = [standings[index].relevance.value for index in ranked]
        by_value = places(values, lowest_first=True)
        between = rank_intervals([-_mean_relevance(cells, pairs(len(rivals))) for cells in rivals])
        for index, rank, ends in zip(ranked, by_value, between, strict=True):
            standings[index] = replace(standings[index], rank=Estimate(rank, *ends))
        needed = _needed(rivals, [standings[index].relevance for index in ranked])
        available = min(cell.benchmark.documents for cell in rivals[0])
    standings.sort(key=lambda s: (s.rank.value is None, s.rank.value or 0))
    return ModelBoard(tuple(standings), tuple(labels), left_out, needed, available)


def _shared(usable: Sequence[Mapping[str, CellRecord]]) -> tuple[list[str], list[int]]:
    """Choose the settings that most models share, one for each benchmark, and their holders."""
    every = {key: cell for mine in usable for key, cell in mine.items()}
    holders = {key: [index for index, mine in enumerate(usable) if key in mine] for key in every}
    if len(usable) > 1:  # a model alone is shown on all that it has
        holders = {key: indexes for key, indexes in holders.items() if len(indexes) > 1}

    def common(indexes: Sequence[int]) -> list[str]:
        best: dict[str, str] = {}
        mine = usable[indexes[0]]
        shared = [key for key in holders if set(indexes) <= set(holders[key])]
        later = outdated(mine[key] for key in shared)
        for key in shared:
            if id(mine[key]) not in later:
                name = every[key].benchmark.name
                best[name] = max(best.get(name, key), key, key=lambda key: worth(every[key]))
        return [key for key in holders if key in best.values()]

    def preference(key: str) -> tuple[int, int, tuple[int, int, bool, bool], str]:
        return len(holders[key]), len(common(holders[key])), worth(every[key]), key

    if not holders:
        return [], []
    ranked = holders[max(holders, key=preference)]
    return common(ranked), ranked


def _not_shared(
    key: str,
    usable: Sequence[Mapping[str, CellRecord]],
    names: Sequence[str],
    ranked: Sequence[int],
    unused: Mapping[str, str],
) -> str:
    lacking = [index for index in ranked or range(len(usable)) if key not in usable[index]]
    if not lacking and id(usable[ranked[0]][key]) in outdated(usable[ranked[0]].values()):
        return "its task was edited since: what was measured last counts"
    if not lacking:
        return "the benchmark counts once, by its larger sample"
    without = [names[index] for index in lacking if names[index] not in unused]
    reasons = [f"{name}: {why}" for name, why in unused.items()]
    if without:
        reasons.append(f"no such measurement of {', '.join(without)}")
    return "; ".join(reasons)


def _lacking_layers(cell: CellRecord) -> str | None:
    """Return how many layers have a relevance; None where all have one."""
    layers = {run.change.layer for run in cell.whole_layers if run.accuracy_relevance is not None}
    if layers.issuperset(range(cell.model.layers)):
        return None
    return f"{len(layers)} of {cell.model.layers} layers have a relevance, and a model counts whole"


def _needed(models: Sequence[Sequence[CellRecord]], relevances: Sequence[Estimate]) -> int | None:
    """Count the documents of each benchmark that show a difference of `APART` in half of the pairs.

    It assumes that squared errors are inversely proportional to the number of documents. None if as
    many are measured.
    """
    halves = [(ends[1] - ends[0]) / 2 for found in relevances if (ends := found.between)]
    documents = max(cell.n for cells in models for cell in cells)
    tests = pairs(len(models))
    found = [
        OutcomeVariance(documents * (math.hypot(one, other) / _Z) ** 2, binary=False)
        for one, other in combinations(halves, 2)
    ]
    needed = documents_needed(found, tests, change=APART) if found else 0
    return needed if needed > documents else None


def _mean_relevance(cells: Sequence[CellRecord], family: int = 1) -> Estimate:
    """Average the relevance of a model's layers, with an interval for a family of models."""
    by_cell = [cell.runs_of() for cell in cells]
    layers = [
        mean_relevance(cells, [runs[layer] for runs in by_cell], family)
        for layer in range(cells[0].model.layers)
    ]
    return mean(layers, independent=False)  # all are measured on the same documents


def _model_standing(model: ModelIdentity, cells: Sequence[CellRecord], why: str) -> ModelStanding:
    if not cells:
        nothing = Estimate(None, reason=why)
        return ModelStanding(model, nothing, nothing, None, None, 0, nothing)
    board = layer_board(cells)
    layers = board.ranked
    return ModelStanding(
        model=model,
        relevance=_mean_relevance(cells),
        drop=mean([standing.drop for standing in layers], independent=False),
        worst_layer=next((layer.layer for layer in layers if layer.rank.high == 1), None),
        costly=len(board.claims.costly),
        layers=len(layers),
        rank=Estimate(None),
    )
