"""Ranks models by how much the removal of one layer hurts.

Models are ranked on all their layers and on the same benchmarks, documents and settings alike: on
those that most models share. A model that lacks one has no rank, and the others keep theirs.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from statistics import NormalDist

from tracker.analysis.comparable import named_models, setting, unusable, worth
from tracker.analysis.editions import outdated
from tracker.analysis.labels import benchmark_labels
from tracker.analysis.ranks.layers import layer_board, mean_relevance
from tracker.core.estimates import Estimate
from tracker.core.formats import about
from tracker.core.identities import ModelIdentity
from tracker.core.records import CellRecord
from tracker.stats.combined import mean
from tracker.stats.power import OutcomeVariance, documents_needed
from tracker.stats.rank_agreement import places
from tracker.stats.support import pairs, ranks

APART = 0.1
"""A difference of two models' mean relevance for which is said how many documents show it."""
_Z = NormalDist().inv_cdf(0.975)
_NOTHING_SHARED = "no two models share a benchmark on all their layers"


@dataclass(frozen=True)
class ModelStanding:
    """How much the removal of one layer hurts a model.

    Attributes:
        model: The model.
        relevance: Mean accuracy relevance over layers and common benchmarks.
        drop: Mean accuracy drop over the same, a fraction.
        worst_layer: The layer that is shown to have the largest mean relevance; None if that is
            open.
        costly: Layers that are shown to matter, on average over the common benchmarks; None without
            any benchmark.
        layers: Layers behind these figures.
        rank: 1 = hurt least; undefined where it lacks what counts, or there is nobody to compare
            with. From the best to the worst that it may be: all ranks of a board lie between theirs
            with 95 % confidence.
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
    """The models, by their mean relevance, the lowest first.

    Attributes:
        benchmarks: The benchmarks that count: all ranked models share them.
        left_out: Benchmark → why it does not count; model → why it has no rank.
        needed: How many documents of each benchmark tell two models apart that differ by `APART`;
            None where that is not known, or as many are measured.
        available: How many documents the smallest of the benchmarks has.
    """

    models: tuple[ModelStanding, ...]
    benchmarks: tuple[str, ...]
    left_out: dict[str, str]
    needed: int | None = None
    available: int = 0

    @property
    def open(self) -> str:
        """Say which orders of two models are not shown; empty where all are."""
        ranked = [model for model in self.models if model.rank.value is not None]
        total = len(ranked) * (len(ranked) - 1) // 2
        # A rank's best is one more than how many are surely before it.
        undecided = total - sum(int(model.rank.low or 1) - 1 for model in ranked)
        if not undecided:
            return ""
        text = "Which of the two models is hurt less is open"
        if total > 1:
            text = f"Which of two models is hurt less is open in {undecided} of {total} pairs"
        if self.needed is None:
            return f"{text}."
        documents = f"about {about(self.needed)} documents of each benchmark"
        if self.needed > self.available:
            return (
                f"{text}: a difference of {APART:g} in mean relevance would take {documents}, but "
                f"one has only {self.available:,}."
            )
        return f"{text}: {documents} would show a difference of {APART:g} in mean relevance."


def model_board(cells: Sequence[CellRecord]) -> ModelBoard:
    """Rank models by how much the removal of one layer hurts.

    Nobody has a rank where no two models share a benchmark, or there is one model.
    """
    groups = named_models(cells)
    names = [*groups]
    left_out: dict[str, str] = {}
    known: list[dict[str, CellRecord]] = []
    unused: defaultdict[tuple[str, str], dict[str, str]] = defaultdict(dict)
    for name, group in groups.items():
        labels = benchmark_labels(group)
        known.append({})
        for cell, label in zip(group, labels, strict=True):
            if why := unusable(cell) or _lacking_layers(cell):
                unused[label, setting(cell)][name] = why
            else:
                known[-1].setdefault(setting(cell), cell)
    shared, ranked = _shared(known)
    labels = benchmark_labels([known[ranked[0]][key] for key in shared]) if shared else []
    every = {key: cell for mine in known for key, cell in mine.items()}
    for key, label in zip(every, benchmark_labels([*every.values()]), strict=True):
        if key not in shared:
            whys = dict(w for (_, one), each in unused.items() if one == key for w in each.items())
            left_out[label] = _not_shared(key, known, names, ranked, whys)
    for (label, key), each in unused.items():
        if key in shared or key not in every:
            left_out |= {f"{label} of {name}": why for name, why in each.items()}
    standings = []
    for place, (group, mine) in enumerate(zip(groups.values(), known, strict=True)):
        lacking = [label for key, label in zip(shared, labels, strict=True) if key not in mine]
        if shared and lacking:
            left_out[names[place]] = f"not all its layers are measured on {', '.join(lacking)}"
        counted = [] if lacking else [mine[key] for key in shared]
        why = "it lacks what the others are ranked on" if lacking else _NOTHING_SHARED
        standings.append(_model_standing(group[0].model, counted, why))
    needed, available = None, 0
    if len(ranked) > 1:
        rivals = [[known[place][key] for key in shared] for place in ranked]
        # From the lowest relevance: what is hurt least comes first.
        values = [standings[place].relevance.value for place in ranked]
        by_value = places(values, lowest_first=True)
        between = ranks([-_mean_relevance(cells, pairs(len(rivals))) for cells in rivals])
        for place, rank, ends in zip(ranked, by_value, between, strict=True):
            standings[place] = replace(standings[place], rank=Estimate(rank, *ends))
        needed = _needed(rivals, [standings[place].relevance for place in ranked])
        available = min(cell.benchmark.documents for cell in rivals[0])
    standings.sort(key=lambda s: (s.rank.value is None, s.rank.value or 0))
    return ModelBoard(tuple(standings), tuple(labels), left_out, needed, available)


def _shared(known: Sequence[Mapping[str, CellRecord]]) -> tuple[list[str], list[int]]:
    """Choose the settings that most models share, one a benchmark; and say who has them all."""
    every = {key: cell for mine in known for key, cell in mine.items()}
    holders = {key: [place for place, mine in enumerate(known) if key in mine] for key in every}
    if len(known) > 1:  # a model alone is shown on all that it has
        holders = {key: places for key, places in holders.items() if len(places) > 1}

    def common(places: Sequence[int]) -> list[str]:
        best: dict[str, str] = {}
        mine = known[places[0]]
        shared = [key for key in holders if set(places) <= set(holders[key])]
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
    known: Sequence[Mapping[str, CellRecord]],
    names: Sequence[str],
    ranked: Sequence[int],
    unused: Mapping[str, str],
) -> str:
    lacking = [place for place in ranked or range(len(known)) if key not in known[place]]
    if not lacking and id(known[ranked[0]][key]) in outdated(known[ranked[0]].values()):
        return "its task was edited since: what was measured last counts"
    if not lacking:
        return "the benchmark counts once, by its larger sample"
    without = [names[place] for place in lacking if names[place] not in unused]
    said = [f"{name}: {why}" for name, why in unused.items()]
    if without:
        said.append(f"no such measurement of {', '.join(without)}")
    return "; ".join(said)


def _lacking_layers(cell: CellRecord) -> str | None:
    """Say which layers of the model have no relevance: the mean of the others is not its own."""
    known = {run.change.layer for run in cell.whole_layers if run.accuracy_relevance is not None}
    if known.issuperset(range(cell.model.layers)):
        return None
    return f"{len(known)} of {cell.model.layers} layers have a relevance, and a model counts whole"


def _needed(models: Sequence[Sequence[CellRecord]], relevances: Sequence[Estimate]) -> int | None:
    """Count the documents of each benchmark that show a difference of `APART` in half of the pairs.

    As of figures whose squared errors shrink with the number of documents. None where as many are
    measured.
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
    """Average the relevance of a model's layers; a family of such intervals holds at once."""
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
