"""Build leaderboards of a model's layers, of other parts of a model, and of several models."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, combinations
from statistics import NormalDist

from tracker.analysis import comparable
from tracker.analysis.claims import Claims, decide_claims, mean_drop, verdict_word
from tracker.schema.changes import WHOLE_LAYER, Change
from tracker.schema.estimates import Estimate
from tracker.schema.formats import is_finite
from tracker.schema.grouping import group_by
from tracker.schema.identities import ModelIdentity
from tracker.schema.records import CellRecord, RunRecord
from tracker.stats.accuracy import OutcomeVariance, documents_needed
from tracker.stats.rank_agreement import min_ranks
from tracker.stats.support import (
    Verdict,
    average,
    count_pairs,
    decide_verdicts,
    divide,
    possible_ranks,
    widen,
)


def layer_relevance(cell: CellRecord, layer: int) -> Estimate:
    """Return the accuracy relevance of a layer, with a confidence interval.

    The relevance is undefined if the removal of the layer is not measured.
    """
    run = cell.runs_of_kind().get(layer)
    relevance = relevance_estimate(cell, run) if run else Estimate(None)
    if is_finite(relevance.value):
        return relevance
    return Estimate(None, reason=undefined_reason(cell, layer, "accuracy_relevance"))


def undefined_reason(cell: CellRecord, layer: int, field: str) -> str:
    """Explain why a result of a layer's removal is undefined.

    `field` is the name of the result, such as `accuracy_relevance`.
    """
    run = cell.runs_of_kind().get(layer)
    return cell.reason_of(field, run) if run else cell.absence_reason(Change(layers=(layer,)))


def relative_depth(layer: int, layers: int) -> float:
    """Compute a layer's depth, from 0 (first layer) to 1 (last layer).

    In a model with one layer, the depth is 0.
    """
    return layer / (layers - 1) if layers > 1 else 0.0


def relevance_estimate(cell: CellRecord, run: RunRecord, n_tests: int = 1) -> Estimate:
    """Compute a run's accuracy drop as a share of the accuracy above chance (accuracy relevance).

    The confidence interval is corrected for `n_tests` compared runs. The relevance has no interval
    if the intact model is not significantly better than chance.
    """
    value, chance = run.accuracy_relevance, cell.chance_accuracy
    if value is None:
        return Estimate(None, reason=run.reasons.get("accuracy_relevance", "not recorded"))
    drop, baseline = widen([run.drop, cell.baseline], [run.units, run.clusters or cell.n], n_tests)
    if chance is None or baseline.value is None or baseline.bounds is None:
        return Estimate(value)
    low, high = baseline.bounds
    share = divide(drop, Estimate(baseline.value - chance, low - chance, high - chance))
    if share.low is None or share.high is None:
        return Estimate(value)
    return Estimate(value, min(share.low, 1.0), min(share.high, 1.0))


@dataclass(frozen=True)
class PartStanding:
    """Leaderboard entry of a layer or a smaller part of a model, e.g. an attention head.

    Attributes:
        runs: Runs that remove the part, one for each benchmark that measured the removal.
        relevance: Mean accuracy relevance over the benchmarks.
        benchmarks: Number of benchmarks on which the part's relevance is defined.
        deciding: Mean accuracy drop over the benchmarks, as a fraction. The confidence interval is
            corrected for comparing all parts of the leaderboard.
        rank: Rank by relevance, with a 95 % confidence interval; rank 1 has the largest relevance.
            The rank is undefined if the part is not measured on all benchmarks.
        verdict: `costs` if the removal of the part significantly reduces accuracy, `helps` if the
            removal significantly increases accuracy, else `open`.
        shown: Displayed text about the part, such as `matters` or `better without`.
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
        """Change that removes the layer or smaller part from the model."""
        return self.runs[0].change

    @property
    def layer(self) -> int:
        """The 0-based number of the layer that contains the part."""
        return self.change.layer

    @property
    def drop(self) -> Estimate:
        """Mean accuracy drop over the benchmarks, with an uncorrected confidence interval."""
        return average([run.drop for run in self.runs])

    @property
    def cosine_score(self) -> float | None:
        """Mean cosine score over the benchmarks; None if it is undefined on any benchmark."""
        scores = [run.cosine_score for run in self.runs if run.cosine_score is not None]
        return sum(scores) / len(scores) if len(scores) == len(self.runs) else None


@dataclass(frozen=True)
class PartBoard:
    """Leaderboard of a model's layers or smaller parts, sorted by the lower bound of the drop.

    Parts whose accuracy drop has no confidence interval come last.

    Attributes:
        kind: Kind of the parts, e.g. whole layers or attention heads.
        cells: Results that are averaged, one for each benchmark.
        parts: Entries of the leaderboard. Layers are always listed. A smaller part (e.g. a head) is
            listed only if its removal is measured on all benchmarks.
        left_out: Unused benchmark → reason.
    """

    model: ModelIdentity
    kind: Change
    cells: tuple[CellRecord, ...]
    parts: tuple[PartStanding, ...]
    left_out: dict[str, str]

    @property
    def ranked(self) -> list[PartStanding]:
        """List of the parts that have a rank, the most relevant part first."""
        standings = [standing for standing in self.parts if standing.rank.value is not None]
        return sorted(standings, key=lambda standing: (standing.rank.value, standing.layer))


@dataclass(frozen=True)
class LayerBoard(PartBoard):
    """Leaderboard of the layers of one model.

    Attributes:
        claims: Statistically supported statements about the layers.
    """

    claims: Claims

    @property
    def by_depth(self) -> list[PartStanding]:
        """Entries of all layers, ordered by layer number."""
        return sorted(self.parts, key=lambda standing: standing.layer)


def layer_board(cells: Sequence[CellRecord]) -> LayerBoard:
    """Build the leaderboard of a model's layers."""
    counted_cells, left_out = comparable.select_ranked_cells(cells)
    rows = _group_runs(counted_cells, lambda cell: cell.whole_layers)
    statements = decide_claims(cells)
    drops = {change: statements.drops.get(change.layer) for change in rows}
    open_: Verdict = "open"
    verdicts = {change: statements.verdicts.get(change.layer, open_) for change in rows}
    words = {change: statements.word(change.layer) for change in rows}
    standings = _build_standings(counted_cells, rows, drops, verdicts, words)
    model = cells[0].model
    return LayerBoard(model, WHOLE_LAYER, tuple(counted_cells), standings, left_out, statements)


def part_boards(cells: Sequence[CellRecord]) -> list[PartBoard]:
    """Build one leaderboard for each kind of part of a model, e.g. for its heads.

    A kind is left out if none of its parts is measured on all benchmarks.
    """
    families = dict.fromkeys(
        run.change.kind.family for cell in cells for run in cell.runs if run.change.kind.plural
    )
    boards = [_part_board(cells, kind) for kind in families]
    return [board for board in boards if board.parts]


def _part_board(cells: Sequence[CellRecord], kind: Change) -> PartBoard:
    """Build the leaderboard of all parts of one kind, e.g. of all attention heads."""

    def runs_of(cell: CellRecord) -> list[RunRecord]:
        return [run for run in cell.runs if run.change.kind.family == kind]

    counted_cells, left_out = comparable.select_ranked_cells(
        [cell for cell in cells if runs_of(cell)], runs_of
    )
    groups = _group_runs(counted_cells, runs_of).items()
    rows = {change: pairs for change, pairs in groups if len(pairs) == len(counted_cells)}
    means = [mean_drop([run for _, run in pairs], len(rows)) for pairs in rows.values()]
    drops = dict(zip(rows, means, strict=True))
    verdicts = dict(zip(rows, decide_verdicts(means), strict=True))
    words = {
        change: "undefined" if drop.value is None else verdict_word(verdicts[change], drop)
        for change, drop in drops.items()
    }
    standings = _build_standings(counted_cells, rows, drops, verdicts, words)
    return PartBoard(cells[0].model, kind, tuple(counted_cells), standings, left_out)


_RunsByChange = Mapping[Change, Sequence[tuple[CellRecord, RunRecord]]]


def _group_runs(cells: Sequence[CellRecord], select_runs: comparable.RunSelector) -> _RunsByChange:
    """Group the selected runs by their change, e.g. the removal of layer 3."""
    pairs = ((cell, run) for cell in cells for run in select_runs(cell))
    return group_by(pairs, lambda pair: pair[1].change)


def _build_standings(
    cells: Sequence[CellRecord],
    rows: _RunsByChange,
    drops: Mapping[Change, Estimate | None],
    verdicts: Mapping[Change, Verdict],
    words: Mapping[Change, str],
) -> tuple[PartStanding, ...]:
    """Build the leaderboard entries of all parts of one kind, e.g. of all layers.

    Args:
        cells: Cells of one model, one for each benchmark.
        rows: Part → pairs (cell, run of the part in this cell), one for each benchmark.
        drops: Part → mean accuracy drop; None if a benchmark lacks the part's run.
        verdicts: Part → `costs`, `helps` or `open`.
        words: Part → displayed text about the part, such as `matters`.

    Returns:
        One entry for each part. The part with the largest lower bound of the drop comes first.
    """
    relevances = {change: [relevance_estimate(*pair) for pair in rows[change]] for change in rows}
    counts = {c: sum(r.value is not None for r in relevances[c]) for c in rows}
    complete = [change for change in rows if counts[change] == len(cells)]
    rank_estimates = rank_parts(cells, [[run for _, run in rows[change]] for change in complete])
    ranks = dict(zip(complete, rank_estimates, strict=True))
    standings = []
    for change, pairs in rows.items():
        runs, relevance = tuple(run for _, run in pairs), average(relevances[change])
        if (drop := drops[change]) is None:  # it is not measured on all benchmarks
            own_drop = average([run.drop for run in runs])
            drop = Estimate(own_drop.value, reason=own_drop.reason)
        rank = ranks.get(change, Estimate(None, reason=relevance.reason))
        figures = relevance, counts[change], drop, rank, verdicts[change], words[change]
        standings.append(PartStanding(runs, *figures))
    return tuple(sorted(standings, key=lambda s: (*lower_end_key(s.deciding), s.change.order)))


def lower_end_key(drop: Estimate) -> tuple[bool, float]:
    """Return a sort key that puts the largest lower bound first and undefined bounds last."""
    return None in (drop.value, drop.low), -(drop.low or 0.0)


def rank_parts(cells: Sequence[CellRecord], parts: Sequence[Sequence[RunRecord]]) -> list[Estimate]:
    """Rank parts by their mean relevance over all benchmarks; rank 1 is the largest relevance.

    The rank intervals ignore the uncertainty of the intact model's accuracy.

    Args:
        cells: Cells of one model, one for each benchmark.
        parts: The runs of each part, one for each benchmark.

    Returns:
        The rank of each part, with a 95 % confidence interval.
    """
    ranks = min_ranks([mean_relevance(cells, runs, 1).value for runs in parts])
    levels = [cell.baseline.value for cell in cells]
    exact = [{"baseline": Estimate(level, low=level, high=level)} for level in levels]
    fixed_cells = [c.model_copy(update=level) for c, level in zip(cells, exact, strict=True)]
    relevances = [mean_relevance(fixed_cells, runs, count_pairs(len(parts))) for runs in parts]
    intervals = possible_ranks(relevances)
    return [Estimate(rank, *ends) for rank, ends in zip(ranks, intervals, strict=True)]


def mean_relevance(
    cells: Sequence[CellRecord], runs: Sequence[RunRecord], n_tests: int
) -> Estimate:
    """Average the accuracy relevance of one ablation over benchmarks.

    The confidence interval is corrected for the comparison of `n_tests` ablations.
    """
    pairs = zip(cells, runs, strict=True)
    return average([relevance_estimate(cell, run, n_tests) for cell, run in pairs])


MODEL_GAP = 0.1
"""Difference of two models' mean relevance for which the needed documents are reported."""
_Z = NormalDist().inv_cdf(0.975)
_NOTHING_SHARED = "there is no benchmark on which all layers of two models are measured"


@dataclass(frozen=True)
class ModelStanding:
    """Leaderboard entry of a model, with the mean effect of the removal of one layer.

    Attributes:
        model: Identity of the model.
        relevance: Mean accuracy relevance over layers and common benchmarks.
        drop: Mean accuracy drop over layers and common benchmarks, as a fraction.
        worst_layer: Layer that is significantly more relevant than all others; None if no layer is.
        costly: Number of layers whose removal significantly reduces accuracy; None without common
            benchmarks.
        layers: Number of layers over which relevance and drop are averaged.
        rank: Rank by relevance, with a 95 % confidence interval; rank 1 has the lowest relevance.
            The rank is undefined if the model is not measured on all common benchmarks, or if there
            is no other model.
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
    """Leaderboard of models, sorted by the mean accuracy relevance of their layers.

    The model with the lowest mean relevance comes first.

    Attributes:
        benchmarks: Benchmarks on which all ranked models are measured.
        left_out: Benchmark or model that is not ranked → reason.
        needed: Documents per benchmark that are needed to distinguish the models; None if unknown,
            or if enough documents are measured.
        available: Number of documents in the smallest benchmark.
    """

    models: tuple[ModelStanding, ...]
    benchmarks: tuple[str, ...]
    left_out: dict[str, str]
    needed: int | None = None
    available: int = 0

    @property
    def pairs(self) -> tuple[int, int]:
        """Number of model pairs without a significant difference, and number of all pairs."""
        standings = [model for model in self.models if model.rank.value is not None]
        n_pairs = len(standings) * (len(standings) - 1) // 2
        # The best possible rank is one more than the number of models surely before it.
        return n_pairs - sum(int(model.rank.low or 1) - 1 for model in standings), n_pairs


def model_board(cells: Sequence[CellRecord]) -> ModelBoard:
    """Rank models by the mean accuracy relevance of their layers.

    Models get no rank if no two models were measured on a common benchmark.
    """
    groups = comparable.named_models(cells)
    usable: dict[str, dict[str, CellRecord]] = {}
    unused: defaultdict[tuple[str, str], dict[str, str]] = defaultdict(dict)
    for name, group in groups.items():
        usable[name] = {}
        for cell, label in zip(group, comparable.benchmark_labels(group), strict=True):
            key = comparable.comparison_key(cell)
            if reason := comparable.unusable_reason(cell) or _missing_layers_reason(cell):
                unused[label, key][name] = reason
            else:
                usable[name].setdefault(key, cell)
    by_key = {key: cell for table in usable.values() for key, cell in table.items()}
    # Models are ranked on the benchmarks that most of them share; all others are explained.
    keys, ranked = _shared_settings(usable, by_key)
    labels = comparable.benchmark_labels([usable[ranked[0]][key] for key in keys]) if keys else []
    left_out: dict[str, str] = {}
    for key, label in zip(by_key, comparable.benchmark_labels([*by_key.values()]), strict=True):
        if key not in keys:
            groups_of_reasons = (names.items() for (_, k), names in unused.items() if k == key)
            reasons = dict(chain.from_iterable(groups_of_reasons))
            left_out[label] = _unused_settings_reason(key, usable, ranked, reasons)
    for (label, key), names in unused.items():
        if key in keys or key not in by_key:
            left_out |= {f"{label} of {name}": reason for name, reason in names.items()}
    standings: dict[str, ModelStanding] = {}
    for name, table in usable.items():
        counted, reason = [table[key] for key in keys if key in table], _NOTHING_SHARED
        if len(counted) < len(keys):
            missing = [label for key, label in zip(keys, labels, strict=True) if key not in table]
            left_out[name] = f"not all layers of the model are measured on {', '.join(missing)}"
            counted, reason = [], "the model is not measured on all benchmarks of the ranking"
        standings[name] = _model_standing(groups[name][0].model, counted, reason)
    needed, available = None, 0
    if len(ranked) > 1:
        compared = [[usable[name][key] for key in keys] for name in ranked]
        relevances = [standings[name].relevance for name in ranked]
        # Sort from the lowest relevance: the model that is hurt least comes first.
        ranks = min_ranks([relevance.value for relevance in relevances], lowest_first=True)
        wide = [-_mean_relevance(cells, count_pairs(len(ranked))) for cells in compared]
        for name, rank, ends in zip(ranked, ranks, possible_ranks(wide), strict=True):
            standings[name] = replace(standings[name], rank=Estimate(rank, *ends))
        needed = _needed_documents(compared, relevances)
        available = min(cell.benchmark.documents for cell in compared[0])
    models = sorted(standings.values(), key=lambda s: (s.rank.value is None, s.rank.value or 0))
    return ModelBoard(tuple(models), tuple(labels), left_out, needed, available)


def _shared_settings(
    usable: Mapping[str, Mapping[str, CellRecord]], by_key: Mapping[str, CellRecord]
) -> tuple[list[str], list[str]]:
    """Choose the benchmarks and settings on which most models were measured.

    Args:
        usable: Model name → benchmark key → cell. A key stands for a benchmark and its settings.
        by_key: Benchmark key → any cell with this key.

    Returns:
        The chosen benchmark keys, at most one for each benchmark, and the models that have cells
        for all chosen keys.
    """
    holders = {key: [name for name, table in usable.items() if key in table] for key in by_key}
    if len(usable) > 1:  # a single model is shown on all of its benchmarks
        holders = {key: names for key, names in holders.items() if len(names) > 1}

    def shared_keys(names: Sequence[str]) -> list[str]:
        best: dict[str, str] = {}
        table = usable[names[0]]
        shared = [key for key in holders if {*names} <= {*holders[key]}]
        outdated = comparable.find_outdated(table[key] for key in shared)
        for key in shared:
            if id(table[key]) not in outdated:
                name = by_key[key].benchmark.name
                best[name] = max(
                    best.get(name, key), key, key=lambda k: comparable.cell_preference(by_key[k])
                )
        return [key for key in holders if key in best.values()]

    def preference(key: str) -> tuple[int, int, tuple[int, ...], str]:
        names = holders[key]
        return len(names), len(shared_keys(names)), comparable.cell_preference(by_key[key]), key

    if not holders:
        return [], []
    names = holders[max(holders, key=preference)]
    return shared_keys(names), names


def _unused_settings_reason(
    key: str,
    usable: Mapping[str, Mapping[str, CellRecord]],
    ranked: Sequence[str],
    unused: Mapping[str, str],
) -> str:
    """Explain why the ranking of models does not use a benchmark with given settings.

    Args:
        key: Key of the benchmark and its settings.
        usable: Model name → benchmark key → cell that the ranking could use.
        ranked: Names of the ranked models; if empty, all models in `usable` are considered.
        unused: Model name → reason why the model's cell with `key` is not usable.

    Returns:
        The reason.
    """
    missing = [name for name in ranked or usable if key not in usable[name]]
    if missing:
        reasons = [f"{name}: {reason}" for name, reason in unused.items()]
        if names := [name for name in missing if name not in unused]:
            reasons.append(f"no such measurement of {', '.join(names)}")
        return "; ".join(reasons)
    cells = usable[ranked[0]]
    if id(cells[key]) in comparable.find_outdated(cells.values()):
        return "the task was edited after this measurement; only the latest measurement counts"
    return "another measurement of the benchmark has more documents; only the largest counts"


def _missing_layers_reason(cell: CellRecord) -> str | None:
    """Explain that some layers have no accuracy relevance; return None if all layers have one."""
    layers = {run.change.layer for run in cell.whole_layers if run.accuracy_relevance is not None}
    if layers.issuperset(range(cell.model.layers)):
        return None
    return (
        f"only {len(layers)} of {cell.model.layers} layers have a relevance value; a model is "
        "ranked only if all its layers have one"
    )


def _needed_documents(models: list[list[CellRecord]], relevances: list[Estimate]) -> int | None:
    """Estimate how many documents would distinguish models by their mean accuracy relevance.

    With the returned number, a difference of `MODEL_GAP` in relevance would be significant for half
    of the pairs of models. Returns None if enough documents are measured already.
    """
    half_widths = [(ends[1] - ends[0]) / 2 for estimate in relevances if (ends := estimate.bounds)]
    documents = max(cell.n for cells in models for cell in cells)
    variances = [
        OutcomeVariance(documents * (math.hypot(a, b) / _Z) ** 2, binary=False)
        for a, b in combinations(half_widths, 2)
    ]
    n_tests = count_pairs(len(models))
    needed = documents_needed(variances, n_tests, change=MODEL_GAP) if variances else 0
    return needed if needed > documents else None


def _mean_relevance(cells: Sequence[CellRecord], n_tests: int = 1) -> Estimate:
    """Average the accuracy relevance over all layers of a model.

    `cells` contains one cell of the model for each benchmark. The confidence interval is corrected
    for `n_tests` comparisons.
    """
    by_cell = [cell.runs_of_kind() for cell in cells]
    layers = [
        mean_relevance(cells, [runs[layer] for runs in by_cell], n_tests)
        for layer in range(cells[0].model.layers)
    ]
    return average(layers, independent=False)  # all are measured on the same documents


def _model_standing(model: ModelIdentity, cells: list[CellRecord], reason: str) -> ModelStanding:
    """Build the leaderboard entry of a model from its cells.

    If `cells` is empty, all estimates are undefined, and `reason` explains why.
    """
    if not cells:
        undefined = Estimate(None, reason=reason)
        return ModelStanding(model, undefined, undefined, None, None, 0, undefined)
    board = layer_board(cells)
    standings = board.ranked
    return ModelStanding(
        model=model,
        relevance=_mean_relevance(cells),
        drop=average([standing.drop for standing in standings], independent=False),
        worst_layer=next((item.layer for item in standings if item.rank.high == 1), None),
        costly=len(board.claims.costly),
        layers=len(standings),
        rank=Estimate(None),
    )
