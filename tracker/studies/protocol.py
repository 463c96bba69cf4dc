"""Study: compare what the same changes of a model cost under several evaluation protocols.

A protocol is a method to score a model's answers to a benchmark's documents: by the likelihood of
given options, by reading the intact model's texts, or by generation. Two benchmarks are compared if
their documents are the same rows of a data set.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import combinations, islice
from operator import attrgetter
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from tracker.analysis.aligned import AlignedOutcomes
from tracker.analysis.paired import PairedOutcomes
from tracker.benchmarks.benchmark import open_benchmark
from tracker.schema.changes import WHOLE_LAYER
from tracker.schema.config import CellRequest, names_traces
from tracker.schema.errors import CellError, RequestError
from tracker.schema.estimates import Estimate
from tracker.schema.findings import LineChart, line_chart
from tracker.schema.formats import join_words, layer_list
from tracker.schema.grouping import group_by
from tracker.schema.identities import CHOICE_PROBABILITIES, BenchmarkIdentity
from tracker.schema.tables import Column, Table, build_table
from tracker.stats.arrays import Array
from tracker.stats.correlation import correlate, resampled_spearman
from tracker.stats.support import Verdict, decide_verdicts, holm, widen
from tracker.studies.base import SIGNIFICANT, Study, StudyContext, StudyResult, Subject, study_texts
from tracker.studies.layout import figure_table, labelled
from tracker.studies.registry import ProtocolSettings

SAMPLING, GENERATION, READING = "sampling", "generation", "reading"
LIKELIHOOD, CHOICE = "option likelihood", "choice probability"
KINDS = (SAMPLING, GENERATION, READING, LIKELIHOOD, CHOICE)
"""Kinds of protocols, in the order of columns."""
EARLY, LATE = "first third of the layers", "other layers"
CONTRAST = "other layers minus first third"
PROTOCOL_TEXTS = study_texts("protocol", early_name=EARLY, late_name=LATE, contrast=CONTRAST)


class ScoredDocuments(NamedTuple):
    """Documents of a request, and the protocols that score these documents.

    Attributes:
        digests: Hash of the documents of each task.
        tasks: Names of the tasks, which determine the random order of documents.
        kinds: Kinds of the protocols that the request measures.
    """

    digests: tuple[str, ...]
    tasks: tuple[str, ...]
    kinds: tuple[str, ...]


def find_scored_documents(request: CellRequest) -> ScoredDocuments:
    """Identify a request's documents by hashes, and list the protocols that score the documents.

    A protocol is a way to score an answer, such as by likelihood or by generated text.
    """
    benchmark = open_benchmark(request)
    names = tuple(task.name for task in benchmark.identity.tasks)
    digests = tuple(map(benchmark.rows_digest, names))
    return ScoredDocuments(digests, names, _protocol_kinds(benchmark.identity, request.metric))


def _protocol_kinds(benchmark: BenchmarkIdentity, metric: str | None) -> tuple[str, ...]:
    """List the ways to score a benchmark's documents, such as by likelihood.

    `metric` is the metric that the request names; None if the request names no metric.
    """
    if names_traces(benchmark.name):
        return (READING,)
    if not benchmark.tasks[0].offers_choices:
        return (SAMPLING if "samples" in benchmark.settings else GENERATION,)
    return (CHOICE,) if metric in CHOICE_PROBABILITIES else (LIKELIHOOD, CHOICE)


@dataclass(frozen=True)
class MeasuredProtocol:
    """Outcomes of the same documents and changes under one protocol.

    Attributes:
        kind: Kind of the protocol, such as `generation`.
        label: Name of the protocol, unique among the compared protocols.
        outcomes: Outcomes of the documents and changes that the compared protocols share.
        paired: Score of each document under the protocol, with the intact and the changed models.
        drops: Drop of the score by each change; the intervals hold simultaneously for all changes
            and protocols.
        verdicts: For each change: `costs`, `helps`, or `open` (not significant).
    """

    kind: str
    label: str
    outcomes: AlignedOutcomes
    paired: PairedOutcomes
    drops: tuple[Estimate, ...] = ()
    verdicts: tuple[Verdict, ...] = ()

    @property
    def intact(self) -> Estimate:
        """Mean score of the intact model under the protocol."""
        level = replace(self.paired, ablated=self.paired.baseline[:, None]).level(0)
        return level.clip(0.0, 1.0) if self.is_share else level

    @property
    def costly(self) -> str:
        """Text that names the changes with significant costs; "" if there are none."""
        pairs = zip(self.outcomes.runs, self.verdicts, strict=True)
        costly = [run for run, verdict in pairs if verdict == "costs"]
        if any(run.kind != WHOLE_LAYER for run in costly):
            return join_words([run.label() for run in costly])
        layers = [run.layer for run in costly]
        return layer_list(layers, self.outcomes.identity.model.layers) if layers else ""

    @property
    def is_binary(self) -> bool:
        """True if each document is either right or wrong."""
        return bool(np.isin(self._scores, (0, 1)).all())

    @property
    def is_share(self) -> bool:
        """True if each document's score is from 0 to 1."""
        return bool(((self._scores >= 0) & (self._scores <= 1)).all())

    @property
    def _scores(self) -> Array:
        return np.column_stack([self.paired.baseline, self.paired.ablated])


@dataclass(frozen=True)
class RankAgreement:
    """Agreement of two protocols on the order of the changes; the p-value is Holm-adjusted."""

    first: str = labelled("protocol")
    second: str = labelled("other protocol")
    spearman: Estimate = labelled("Spearman", "coefficient")
    p_value: float | None = labelled("p (Holm)", "p", "no correlation, or no layers")

    @property
    def is_supported(self) -> bool:
        """True if the orders of the changes by the two protocols agree significantly."""
        return (self.p_value or 1.0) < SIGNIFICANT and self.spearman.side() > 0


@dataclass(frozen=True)
class LostDocuments:
    """Comparison of the documents that are lost under two protocols.

    Only documents that the intact model answers correctly under both protocols are compared. A
    document is lost if a change of the model makes the answer wrong. `difference` is the share of
    lost documents under `first`, minus the share under `second`.
    """

    first: str = labelled("protocol")
    second: str = labelled("other protocol")
    changes: str = labelled("changes")
    n: int = labelled("right under both", "count")
    only_first: int | None = labelled("lost only by the protocol", "count", "see the rows above")
    only_second: int | None = labelled("lost only by the other", "count", "see the rows above")
    difference: Estimate = labelled("more lost by the protocol", "points")


class Protocols(Study[ProtocolSettings]):
    """Study that compares the drops of the same changes under several protocols."""

    name = "protocol"
    question = "Do the layers that matter depend on the evaluation protocol?"
    intact = True
    texts = PROTOCOL_TEXTS

    def __init__(self, settings: ProtocolSettings) -> None:
        super().__init__(settings)
        self._documents = cache(find_scored_documents)  # it reads benchmarks

    def requests(self, context: StudyContext) -> list[CellRequest]:
        """List the requests of the experiment file.

        Raises RequestError if no two protocols score the same documents.
        """
        requests = super().requests(context)
        groups = self._group(requests)
        for members in groups:
            orders = {self._documents(request).tasks for request in members}
            if len(orders) > 1 and members[0].documents.sample is not None:
                raise RequestError(PROTOCOL_TEXTS.render("sample", members))
        counts = [sum(len(self._documents(request).kinds) for request in group) for group in groups]
        if max(counts, default=2) < 2:
            raise RequestError(PROTOCOL_TEXTS.render("single", [m[0] for m in groups]))
        return requests

    def answer(self, context: StudyContext, subjects: list[Subject]) -> StudyResult:
        """Compare the protocols of each model and each set of documents."""
        result = StudyResult()
        by_request = {subject.request: subject for subject in subjects}
        for requests in self._group([*by_request]):
            members = [by_request[request] for request in requests]
            names = dict.fromkeys(subject.record.benchmark.title for subject in members)
            title = f"{members[0].record.model.name}, {', '.join(names)}"
            protocols = self._measure_protocols(members)
            if reason := _incomparable_reason(protocols):
                result.lack(title, reason)
            else:
                result.add(*_compare_protocols(title, _compute_drops(protocols)))
        if not result.answers:
            raise CellError("\n".join(result.lacking))
        return result

    def _group(self, requests: Sequence[CellRequest]) -> list[list[CellRequest]]:
        """Group requests of the same model and documents."""
        by_rows = group_by(requests, lambda r: (r.model, r.documents, self._documents(r).digests))
        return [*by_rows.values()]

    def _measure_protocols(self, subjects: Sequence[Subject]) -> list[MeasuredProtocol]:
        """Collect the scores of the documents under each protocol; sort protocols as in `KINDS`."""
        protocols = []
        counts = Counter(kind for s in subjects for kind in self._documents(s.request).kinds)
        for subject in subjects:
            outcomes, metric = subject.outcomes(), subject.record.metric
            ablations = [*map(outcomes.ablation, outcomes.runs)]
            for kind in self._documents(subject.request).kinds:
                is_derived = kind == CHOICE and metric not in CHOICE_PROBABILITIES
                pair = outcomes.choice_outcomes if is_derived else outcomes.metric_outcomes
                name = f"{kind} ({subject.record.benchmark.title}, key {subject.record.key[:8]})"
                label = kind if counts[kind] == 1 else name
                protocols.append(MeasuredProtocol(kind, label, outcomes, pair(ablations)))
        return sorted(protocols, key=lambda protocol: KINDS.index(protocol.kind))


def _incomparable_reason(protocols: Sequence[MeasuredProtocol]) -> str:
    """Return a text that says why protocols cannot be compared, or an empty text."""
    if len(protocols) < 2:
        return PROTOCOL_TEXTS.render("alone", protocols)
    losses = [p.label for p in protocols if not p.outcomes.higher_is_better]
    measured = [([n for _, n in p.outcomes.documents], p.outcomes.runs) for p in protocols]
    differ = any(other != measured[0] for other in measured)
    return PROTOCOL_TEXTS.render("incomparable", losses, differ)


def _compute_drops(protocols: Sequence[MeasuredProtocol]) -> list[MeasuredProtocol]:
    """Compute each protocol's drops, and decide which drops are significant.

    The intervals are adjusted for the number of drops, over all changes and protocols.
    """
    all_drops, units = list[Estimate](), list[float]()
    n_changes = len(protocols[0].outcomes.runs)
    for protocol in protocols:
        all_drops += map(protocol.paired.drop, range(n_changes))
        units += [protocol.outcomes.n_clusters or len(protocol.outcomes.tasks)] * n_changes
    wide = widen(all_drops, units, len(all_drops))
    decided, pairs = [], zip(wide, decide_verdicts(wide), strict=True)
    for protocol in protocols:
        drops, verdicts = zip(*islice(pairs, n_changes), strict=True)
        limit = 1.0 if protocol.is_share else math.inf
        drops = tuple(drop.clip(-limit, limit) for drop in drops)
        decided.append(replace(protocol, drops=drops, verdicts=verdicts))
    return decided


def _compare_protocols(
    title: str, protocols: Sequence[MeasuredProtocol]
) -> Iterator[str | Table | LineChart]:
    """Yield the sentences, tables and charts that compare protocols on the same documents."""
    outcomes = protocols[0].outcomes
    is_layers = len(outcomes.whole_layers) == len(outcomes.runs)
    agreements = _rank_agreements(protocols, is_layers)
    single = {run.label(): np.array([index]) for index, run in enumerate(outcomes.runs)}
    by_group = _compare_all_lost_documents(protocols, _group_changes(outcomes))
    by_change = _compare_all_lost_documents(protocols, single)
    kinds = {protocol.label: protocol.kind for protocol in protocols}
    claims = [
        {row.changes: row for row in rows}
        for (first, second), rows in group_by(by_group, attrgetter("first", "second")).items()
        if kinds[first] in (SAMPLING, GENERATION) and kinds[second] == LIKELIHOOD
    ]
    figures = title, len(outcomes.tasks), protocols, agreements, claims
    yield from PROTOCOL_TEXTS.render_all("answer", *figures)
    yield _drops_table(title, protocols)
    if is_layers:
        layers = [run.layer for run in outcomes.runs]
        lines = {protocol.label: protocol.drops for protocol in protocols}
        yield line_chart(f"{title}: drop by layer", ("layer", "drop"), "points", layers, lines)
    notes = PROTOCOL_TEXTS.render_all("agreement_notes")
    yield figure_table(RankAgreement, f"{title}: order of the changes", agreements, *notes)
    for heading, rows in (("documents lost", by_group), ("documents lost by change", by_change)):
        if rows:
            notes = PROTOCOL_TEXTS.render_all("lost_notes")
            yield figure_table(LostDocuments, f"{title}: {heading}", rows, *notes)


def _drops_table(title: str, protocols: Sequence[MeasuredProtocol]) -> Table:
    """Build the table with a row for each change and a column for each protocol."""
    runs = protocols[0].outcomes.runs
    columns: list[Column[int]] = [Column("change", "text", lambda index: runs[index].label())]
    for protocol in protocols:
        columns.append(Column(protocol.label, "points", protocol.drops.__getitem__))
    words = {"costs": "", "helps": " (better without)"}

    def shown_by(index: int) -> str:
        verdicts = ((p.label, p.verdicts[index]) for p in protocols)
        return ", ".join(label + words[v] for label, v in verdicts if v != "open") or "none"

    columns.append(Column("shown by", "text", shown_by))
    notes = PROTOCOL_TEXTS.render_all("drop_notes", protocols)
    return build_table(f"{title}: drop by change", columns, range(len(runs)), *notes)


def _rank_agreements(protocols: Sequence[MeasuredProtocol], is_layers: bool) -> list[RankAgreement]:
    """Correlate, over all changes, the drops by two protocols, for each pair of protocols.

    Args:
        protocols: The protocols.
        is_layers: True if each change removes one layer. If False, no p-values are computed.

    Returns:
        A row for each pair of protocols.
    """
    rows, series = [], [(p.label, *p.outcomes.drop_series(p.paired)) for p in protocols]
    for (first, x, xs), (second, y, ys) in combinations(series, 2):
        p_value = correlate(x, y, coefficient="spearman").p_value if is_layers else None
        rows.append(RankAgreement(first, second, resampled_spearman(x, xs, y, ys), p_value))
    adjusted = holm([row.p_value for row in rows])
    return [replace(row, p_value=p) for row, p in zip(rows, adjusted, strict=True)]


def _group_changes(outcomes: AlignedOutcomes) -> dict[str, NDArray[np.intp]]:
    """Group the changes: all changes, removals of early layers, and removals of other layers.

    Returns the indexes of the changes in each group, by group name. If some change is not the
    removal of one layer, only the group of all changes is returned.
    """
    groups = {"all": np.arange(len(outcomes.runs))}
    if len(outcomes.whole_layers) == len(outcomes.runs):
        layers = np.array([run.layer for run in outcomes.runs])
        is_early = 3 * layers < outcomes.identity.model.layers
        groups |= {EARLY: np.flatnonzero(is_early), LATE: np.flatnonzero(~is_early)}
    return {name: indexes for name, indexes in groups.items() if len(indexes)}


def _compare_all_lost_documents(
    protocols: Sequence[MeasuredProtocol], groups: dict[str, NDArray[np.intp]]
) -> list[LostDocuments]:
    """Compare the documents lost under each pair of protocols, for each group of changes.

    A document is lost if a change of the model makes the right answer wrong. `groups` maps the name
    of a group to the indexes of its changes. The intervals are adjusted for the number of returned
    rows.
    """
    pairs = combinations(filter(attrgetter("is_binary"), protocols), 2)
    rows = [row for pair in pairs for row in _compare_lost_documents(*pair, groups)]
    wide = widen([row.difference for row in rows], [row.n for row in rows], len(rows))
    # The contrast subtracts two differences, each from −1 to 1.
    limits = (2.0 if row.changes == CONTRAST else 1.0 for row in rows)
    return [
        replace(row, difference=figure.clip(-limit, limit))
        for row, figure, limit in zip(rows, wide, limits, strict=True)
    ]


def _compare_lost_documents(
    first: MeasuredProtocol, second: MeasuredProtocol, groups: dict[str, NDArray[np.intp]]
) -> Iterator[LostDocuments]:
    """Compare the documents lost under two protocols, with a row for each group of changes.

    A document is lost if a change of the model makes the right answer wrong. `groups` maps the name
    of a group to the indexes of its changes.
    """
    is_right = (first.paired.baseline == 1) & (second.paired.baseline == 1)
    tables = [protocol.paired.ablated[is_right] == 1 for protocol in (first, second)]
    n, clusters = int(is_right.sum()), first.outcomes.clusters
    clusters = None if clusters is None else clusters[is_right]
    # The difference of two shares of each document, and the counts of each row.
    figures: dict[str, tuple[Array, Array, int | None, int | None]] = {}
    for name, indexes in groups.items():
        right, other = (table[:, indexes] for table in tables)
        lost = int((other & ~right).sum()), int((right & ~other).sum())
        figures[name] = other.mean(axis=1), right.mean(axis=1), *lost
    if EARLY in figures and LATE in figures:
        late, early = (np.subtract(*figures[name][:2]) for name in (LATE, EARLY))
        figures[CONTRAST] = late, early, None, None
    for name, (minuend, subtrahend, only_first, only_second) in figures.items():
        difference = Estimate(None, reason=PROTOCOL_TEXTS.render("never_right"))
        if n:
            weights = np.full(n, 1 / n)
            pair = PairedOutcomes(minuend, subtrahend[:, None], weights, clusters=clusters)
            difference = pair.drop(0)
        counts = n, only_first, only_second
        yield LostDocuments(first.label, second.label, name, *counts, difference)
