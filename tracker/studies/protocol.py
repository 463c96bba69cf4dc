"""Study: compare what the same changes of a model cost under several evaluation protocols.

A protocol is a way to ask a benchmark's documents: by the likelihood of given options, by reading
the intact model's texts, or by generation. Benchmarks are compared if they score the same rows.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import combinations
from operator import attrgetter
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from tracker.analysis.aligned import AlignedOutcomes
from tracker.analysis.paired import PairedOutcomes
from tracker.benchmarks.benchmark import names_traces, open_benchmark
from tracker.schema.changes import WHOLE_LAYER
from tracker.schema.config import CellRequest
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


class Rows(NamedTuple):
    """Documents of a request, and the protocols that score them.

    Attributes:
        digests: Hash of the rows of each task.
        tasks: Names of the tasks, which determine the random order of documents.
        kinds: Kinds of the protocols that the request measures.
    """

    digests: tuple[str, ...]
    tasks: tuple[str, ...]
    kinds: tuple[str, ...]


def read_rows(request: CellRequest) -> Rows:
    """Open the benchmark of a request, and return its rows."""
    benchmark = open_benchmark(request)
    names = tuple(task.name for task in benchmark.identity.tasks)
    digests = tuple(map(benchmark.rows_digest, names))
    return Rows(digests, names, _protocol_kinds(benchmark.identity, request.metric))


def _protocol_kinds(benchmark: BenchmarkIdentity, metric: str | None) -> tuple[str, ...]:
    """List the kinds of protocols by which a benchmark's documents are scored."""
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
        outcomes: Outcomes of the common documents under the common changes.
        paired: The protocol's score of each document.
        drops: Drop under each change; the intervals hold for all changes and protocols together.
        verdicts: Verdict on each change.
    """

    kind: str
    label: str
    outcomes: AlignedOutcomes
    paired: PairedOutcomes
    drops: tuple[Estimate, ...] = ()
    verdicts: tuple[Verdict, ...] = ()

    @property
    def intact(self) -> Estimate:
        """The intact model's mean score."""
        level = replace(self.paired, ablated=self.paired.baseline[:, None]).level(0)
        return level.clip(0.0, 1.0) if self.is_share else level

    @property
    def costly(self) -> str:
        """The changes that are shown to cost something, in words; "" if there are none."""
        pairs = zip(self.outcomes.runs, self.verdicts, strict=True)
        costly = [run for run, verdict in pairs if verdict == "costs"]
        if any(run.kind != WHOLE_LAYER for run in costly):
            return join_words([run.label() for run in costly])
        layers = [run.layer for run in costly]
        return layer_list(layers, self.outcomes.identity.model.layers) if layers else ""

    @property
    def resampled_drops(self) -> Array:
        """Mean drops for resampled documents `[resamples, changes]`."""
        return self.outcomes.resample(self.paired.drops, self.paired.weights)

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
        """True if the two protocols are shown to order the changes alike."""
        return (self.p_value or 1.0) < SIGNIFICANT and self.spearman.side() > 0


@dataclass(frozen=True)
class LostDocuments:
    """Documents that two protocols answer right, and of which changes make one protocol wrong.

    `difference` is the share that `first` loses minus the share that `second` loses.
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
    question = "Does the way of asking decide which layers matter?"
    intact = True
    texts = PROTOCOL_TEXTS

    def __init__(self, settings: ProtocolSettings) -> None:
        super().__init__(settings)
        self._rows = cache(read_rows)  # it reads benchmarks

    def requests(self, context: StudyContext) -> list[CellRequest]:
        """List the file's requests.

        Raises RequestError if no two protocols score the same documents.
        """
        requests = super().requests(context)
        groups = self._group(requests)
        for members in groups:
            orders = {self._rows(request).tasks for request in members}
            if len(orders) > 1 and members[0].documents.sample is not None:
                raise RequestError(PROTOCOL_TEXTS.render("sample", members))
        if max(map(self._count_protocols, groups), default=2) < 2:
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
                result.add(*_compare_protocols(title, _decide_drops(protocols)))
        if not result.answers:
            raise CellError("\n".join(result.lacking))
        return result

    def _group(self, requests: Sequence[CellRequest]) -> list[list[CellRequest]]:
        """Group requests of the same model and documents."""

        def key(request: CellRequest) -> tuple[object, ...]:
            return request.model, request.documents, self._rows(request).digests

        return [*group_by(requests, key).values()]

    def _count_protocols(self, requests: Iterable[CellRequest]) -> int:
        return sum(len(self._rows(request).kinds) for request in requests)

    def _measure_protocols(self, subjects: Sequence[Subject]) -> list[MeasuredProtocol]:
        """Return the protocols of subjects with the same documents, in the order of `KINDS`."""
        protocols = []
        for subject in subjects:
            outcomes, metric = subject.outcomes(), subject.record.metric
            ablations = [*map(outcomes.ablation, outcomes.runs)]
            for kind in self._rows(subject.request).kinds:
                is_derived = kind == CHOICE and metric not in CHOICE_PROBABILITIES
                pair = outcomes.choice_outcomes if is_derived else outcomes.metric_outcomes
                label = f"{kind} ({subject.record.benchmark.title}, key {subject.record.key[:8]})"
                protocols.append(MeasuredProtocol(kind, label, outcomes, pair(ablations)))
        counts = Counter(protocol.kind for protocol in protocols)
        short = [replace(p, label=p.kind) if counts[p.kind] == 1 else p for p in protocols]
        return sorted(short, key=lambda protocol: KINDS.index(protocol.kind))


def _incomparable_reason(protocols: Sequence[MeasuredProtocol]) -> str:
    """Return why protocols cannot be compared; "" if they can."""
    if len(protocols) < 2:
        return PROTOCOL_TEXTS.render("alone", protocols)
    losses = [p.label for p in protocols if not p.outcomes.higher_is_better]
    numbers = ([number for _, number in p.outcomes.documents] for p in protocols)
    measured = [*zip(numbers, (p.outcomes.runs for p in protocols), strict=True)]
    differ = any(other != measured[0] for other in measured)
    return PROTOCOL_TEXTS.render("incomparable", losses, differ)


def _decide_drops(protocols: Sequence[MeasuredProtocol]) -> list[MeasuredProtocol]:
    """Estimate all drops, with intervals and verdicts that hold for all of them together."""
    drops, units = [], []
    n_changes = len(protocols[0].outcomes.runs)
    for protocol in protocols:
        drops += [protocol.paired.drop(index) for index in range(n_changes)]
        units += [protocol.outcomes.n_clusters or len(protocol.outcomes.tasks)] * n_changes
    wide = widen(drops, units, len(drops))
    verdicts = decide_verdicts(wide)
    parts = [slice(n * n_changes, (n + 1) * n_changes) for n in range(len(protocols))]
    limits = (1.0 if protocol.is_share else math.inf for protocol in protocols)
    return [
        replace(
            protocol,
            drops=tuple(drop.clip(-limit, limit) for drop in wide[part]),
            verdicts=tuple(verdicts[part]),
        )
        for protocol, part, limit in zip(protocols, parts, limits, strict=True)
    ]


def _compare_protocols(
    title: str, protocols: Sequence[MeasuredProtocol]
) -> Iterator[str | Table | LineChart]:
    """Yield the sentences, tables and charts that compare protocols on the same documents."""
    outcomes = protocols[0].outcomes
    is_layers = len(outcomes.whole_layers) == len(outcomes.runs)
    agreements = _rank_agreements(protocols, is_layers)
    by_group, by_change = _lost_documents(protocols, is_layers)
    kinds = {protocol.label: protocol.kind for protocol in protocols}
    claims = [
        {row.changes: row for row in rows}
        for (first, second), rows in group_by(by_group, attrgetter("first", "second")).items()
        if kinds[first] in (SAMPLING, GENERATION) and kinds[second] == LIKELIHOOD and is_layers
    ]
    figures = (title, len(outcomes.tasks), protocols, agreements, claims)
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
    """Correlate the drops of each pair of protocols over the changes."""
    rows = []
    for first, second in combinations(protocols, 2):
        series = [(p.paired.mean_drops, p.resampled_drops) for p in (first, second)]
        p_value = None
        if is_layers:
            means = (means for means, _ in series)
            p_value = correlate(*means, coefficient="spearman").p_value
        spearman = resampled_spearman(*series[0], *series[1])
        rows.append(RankAgreement(first.label, second.label, spearman, p_value))
    adjusted = holm([row.p_value for row in rows])
    return [replace(row, p_value=p) for row, p in zip(rows, adjusted, strict=True)]


def _lost_documents(
    protocols: Sequence[MeasuredProtocol], is_layers: bool
) -> tuple[list[LostDocuments], list[LostDocuments]]:
    """Compare the documents that each pair of protocols loses, by group and by single change."""
    pairs = [*combinations(filter(attrgetter("is_binary"), protocols), 2)]
    runs = protocols[0].outcomes.runs
    groups = {"all": np.arange(len(runs))}
    if is_layers:
        layers = np.array([run.layer for run in runs])
        is_early = 3 * layers < protocols[0].outcomes.identity.model.layers
        groups |= {EARLY: np.flatnonzero(is_early), LATE: np.flatnonzero(~is_early)}
    groups = {name: indexes for name, indexes in groups.items() if len(indexes)}
    single = {run.label(): np.array([index]) for index, run in enumerate(runs)}
    by_group = [row for pair in pairs for row in _compare_losses(*pair, groups)]
    by_change = [row for pair in pairs for row in _compare_losses(*pair, single)]
    return _widen_rows(by_group), _widen_rows(by_change)


def _compare_losses(
    first: MeasuredProtocol, second: MeasuredProtocol, groups: dict[str, NDArray[np.intp]]
) -> Iterator[LostDocuments]:
    """Yield the documents that one of two protocols loses under each group of changes."""
    is_right = (first.paired.baseline == 1) & (second.paired.baseline == 1)
    answers = [protocol.paired.ablated[is_right] == 1 for protocol in (first, second)]
    n, clusters = int(is_right.sum()), first.outcomes.clusters
    clusters = None if clusters is None else clusters[is_right]
    means: dict[str, list[Array]] = {}

    def difference(minuend: Array, subtrahend: Array) -> Estimate:
        if not n:
            return Estimate(None, reason=PROTOCOL_TEXTS.render("never_right"))
        weights = np.full(n, 1 / n)
        pair = PairedOutcomes(minuend, subtrahend[:, None], weights, clusters=clusters)
        return pair.drop(0)

    for name, indexes in groups.items():
        means[name] = [table[:, indexes].mean(axis=1) for table in answers]
        lost, other = (~table[:, indexes] for table in answers)
        counts = int((lost & ~other).sum()), int((other & ~lost).sum())
        figure = difference(means[name][1], means[name][0])
        yield LostDocuments(first.label, second.label, name, n, *counts, figure)
    if EARLY in means and LATE in means:
        late, early = (means[name][1] - means[name][0] for name in (LATE, EARLY))
        figure = difference(late, early)
        yield LostDocuments(first.label, second.label, CONTRAST, n, None, None, figure)


def _widen_rows(rows: Sequence[LostDocuments]) -> list[LostDocuments]:
    """Widen the intervals of differences so that they hold for all rows together."""
    wide = widen([row.difference for row in rows], [row.n for row in rows], len(rows))
    # The contrast subtracts two differences, each from −1 to 1.
    limits = (2.0 if row.changes == CONTRAST else 1.0 for row in rows)
    return [
        replace(row, difference=figure.clip(-limit, limit))
        for row, figure, limit in zip(rows, wide, limits, strict=True)
    ]
