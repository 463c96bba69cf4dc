"""Restrict stored outcomes to the documents on which all requested runs are measured."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from copy import copy
from itertools import compress
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from tracker.analysis.metrics import DocumentMetric
from tracker.analysis.paired import PairedOutcomes
from tracker.ledger.cells import CellStore
from tracker.ledger.outcomes import METRIC_PREFIX, PROVENANCE_COLUMN
from tracker.ledger.shards import read_divergences
from tracker.ledger.views import CellIdentity
from tracker.schema.changes import INTACT, WHOLE_LAYER, Ablation, Change
from tracker.schema.estimates import Estimate
from tracker.schema.identities import CHOICE_PROBABILITIES, CHOICE_PROBABILITY
from tracker.schema.provenance import list_differences
from tracker.schema.proxies import Proxy
from tracker.schema.views import View
from tracker.stats.accuracy import cluster_means, effective_number, weights_by_task
from tracker.stats.arrays import Array, IntArray
from tracker.stats.resampling import RESAMPLES, SEED, resampled_means

TaskNames = NDArray[np.str_]
LOGPROB_TOLERANCES = 1e-6, 1e-4
"""Largest relative and absolute (nats) differences of log-probabilities by float32 rounding."""


class AlignedOutcomes:
    """Outcomes of one model on one benchmark, for the documents on which all runs are measured.

    `columns` lists the columns to read from the stored outcomes; None reads all columns. Documents
    must also be measured under all `extra_ablations`.
    """

    def __init__(
        self,
        store: CellStore,
        view: View,
        columns: list[str] | None = None,
        extra_ablations: Sequence[Ablation] = (),
    ) -> None:
        self.identity: CellIdentity = store.identity
        self.metric = view.metric
        names = dict.fromkeys((view.metric, *CHOICE_PROBABILITIES))
        self._measures = {name: DocumentMetric(store, name) for name in names}
        self._measure = self._measures[view.metric]
        self._removed = view.removed
        numbers = store.identity.benchmark.numbers
        self._clusters = None if view.clusters is None else view.clusters.by_document(numbers)
        counts = store.counts(view.extent)
        self.n_requested = sum(counts.values())
        frame = store.read_documents(view.extent, columns)
        if columns is None and len(divergences := read_divergences(store.folder)):
            frame = frame.merge(divergences, "left", ["task", "doc", "ablation"])
        order = pd.Categorical(frame["task"], categories=list(counts))
        self._frame = frame.assign(order=order).sort_values(["order", "doc"])
        self._row_indexes = self._frame.groupby("ablation").indices
        self._with_stacks = columns is None
        self._align(None, view.runs, extra_ablations)

    def restrict(
        self, documents: Collection[tuple[str, int]] | None, runs: Sequence[Change]
    ) -> AlignedOutcomes:
        """Return a copy that contains only the given documents and runs.

        If `documents` is None, the copy contains all documents on which every given run is
        measured.
        """
        restricted = copy(self)
        restricted._align(documents, runs)
        return restricted

    def _align(
        self,
        documents: Collection[tuple[str, int]] | None,
        runs: Sequence[Change],
        extra_ablations: Sequence[Ablation] = (),
    ) -> None:
        """Select runs, and the documents on which all these runs are measured.

        The intact model and the `extra_ablations` must be measured on the documents too. If
        `documents` is given, other documents are excluded. Runs without any outcome are listed in
        `missing`.
        """
        removed = Ablation.from_changes(removed=self._removed)
        ablations = [INTACT, removed, *map(self.ablation, runs), *extra_ablations]
        names = {ablation.name for ablation in ablations}
        indexes = [self._row_indexes.get(name, np.empty(0, dtype=np.intp)) for name in names]
        frame = self._frame.iloc[np.sort(np.concatenate(indexes))]
        if documents is not None:
            keys = zip(frame["task"], frame["doc"], strict=True)
            frame = frame.loc[[key in documents for key in keys]]
        # A document counts only if all shown runs have it.
        names_left = set(frame["ablation"].unique())
        counts = frame.groupby(["task", "doc"])["ablation"].transform("size")
        frame = frame[(counts == len(names_left)) & (INTACT.name in names_left)]
        self._rows = {str(name): rows for name, rows in frame.groupby("ablation")}
        stacks: list[str] = list(frame[PROVENANCE_COLUMN].unique()) if self._with_stacks else []
        self.stacks: list[dict[str, str]] = [json.loads(stack) for stack in stacks]
        self.runs = [run for run in runs if self.is_measured(self.ablation(run))]
        measured = {*self.runs}
        self.missing = [run for run in runs if run not in measured]
        self.tasks = [str(task) for task in self.rows(INTACT)["task"]] if self._rows else []
        self._cache: dict[tuple[Callable[..., Array], str], Array] = {}

    def select(self, mask: NDArray[np.bool_]) -> AlignedOutcomes:
        """Return a copy that contains only the documents that a boolean mask selects."""
        selected = copy(self)
        selected._rows = {name: rows[mask] for name, rows in self._rows.items()}
        selected.tasks = list(compress(self.tasks, mask))
        selected._cache = {}
        return selected

    @property
    def documents(self) -> list[tuple[str, int]]:
        """List of documents, each as (task, document's number in the task's split)."""
        return list(zip(self.tasks, map(int, self.rows(INTACT)["doc"]), strict=True))

    @property
    def whole_layers(self) -> list[Change]:
        """List of the runs that remove exactly one whole layer."""
        return [run for run in self.runs if run.kind == WHOLE_LAYER]

    @property
    def strata(self) -> TaskNames | None:
        """The task name of each document; None if there is only one task."""
        return np.array(self.tasks) if len(set(self.tasks)) > 1 else None

    @property
    def clusters(self) -> IntArray | None:
        """The number of each document's cluster; None if all documents are independent."""
        if self._clusters is None:
            return None
        return self._cached(self._cluster_numbers).astype(np.int64)

    @property
    def n_clusters(self) -> float | None:
        """Effective number of clusters; None if all documents are independent.

        Clusters with unequal weights count as fewer clusters.
        """
        return None if self._clusters is None else effective_number(self.weights, self.clusters)

    @property
    def higher_is_better(self) -> bool:
        """True if higher values of the metric are better (e.g. accuracy); False for a loss."""
        return self._measure.higher_is_better

    @property
    def weights(self) -> Array:
        """The weight of each document in the benchmark's metric; the weights sum to 1."""
        return self._cached(self._metric_weights)

    @property
    def plain_weights(self) -> Array:
        """Weight of each document in means that ignore the documents' lengths."""
        return self._cached(self._document_weights)

    def metric_outcomes(self, ablations: Sequence[Ablation]) -> PairedOutcomes:
        """Return the metric of each document for the intact and ablated models."""
        return self._pair(self.values, ablations, self.weights, self.higher_is_better)

    def level(self, ablation: Ablation) -> Estimate:
        """Estimate the metric of the intact or an ablated model."""
        return self.metric_outcomes([ablation]).level(0)

    def gold_outcomes(self, ablations: Sequence[Ablation]) -> PairedOutcomes:
        """Return the log-probability of each gold answer for the intact and ablated models."""
        return self._pair(self.gold_logprobs, ablations, self.plain_weights)

    def choice_outcomes(self, ablations: Sequence[Ablation]) -> PairedOutcomes:
        """Return the gold option's probability among the options, for intact and ablated models."""
        return self._pair(self.choice_probabilities, ablations, self.plain_weights)

    def options_outcomes(self, ablations: Sequence[Ablation]) -> PairedOutcomes:
        """Return the log of the options' total probability, for intact and ablated models."""
        return self._pair(self.options_logprobs, ablations, self.plain_weights)

    def _pair(
        self,
        read: Callable[[Ablation], Array],
        ablations: Sequence[Ablation],
        weights: Array,
        higher_is_better: bool = True,
    ) -> PairedOutcomes:
        """Pair the values of the intact model with the values under each ablation.

        Args:
            read: Function that takes an ablation and returns one value for each document.
            ablations: The ablations, one for each column of the result.
            weights: Weight of each document in means.
            higher_is_better: Whether larger values are better; False for a loss.

        Returns:
            The values of the intact model, and the values under the ablations.
        """
        columns = self._stack(map(read, ablations))
        return PairedOutcomes(read(INTACT), columns, weights, higher_is_better, self.clusters)

    def _stack(self, columns: Iterable[Array]) -> Array:
        """Stack arrays of length `[documents]` as the columns of one array."""
        arrays = list(columns)
        return np.stack(arrays, axis=1) if arrays else np.empty((len(self.tasks), 0))

    @property
    def tokens(self) -> Array:
        """Array with the number of tokens over which proxies were summed in each document."""
        return self.rows(INTACT)["proxy_tokens"].to_numpy(dtype=np.float64)

    def resample(self, values: Array, weights: Array | None = None) -> Array:
        """Draw bootstrap samples of the mean of each column of `values`.

        Args:
            values: Array `[documents, columns]`.
            weights: Weight of each document in the mean; None for equal weights.

        Returns:
            Array `[samples, columns]` of means.
        """
        strata, clusters = self.strata, self.clusters
        if clusters is not None:
            shares = np.ones(len(values)) if weights is None else weights
            values, weights = cluster_means(values, shares, clusters)
            strata = None
        return resampled_means(values, RESAMPLES, SEED, strata, weights)

    def drop_series(self, paired: PairedOutcomes) -> tuple[Array, Array]:
        """Return the mean drop under each ablation, and bootstrap samples of these means."""
        return paired.mean_drops, self.resample(paired.drops, paired.weights)

    def comparison_summary(self) -> dict[str, Any]:
        """Summarise how the engine's responses differ from responses of really pruned models.

        The dict contains the number of compared responses (`compared`), the largest difference
        (`compared_difference`) and the number of large differences that rounding explains
        (`compared_unsteady`). The dict is empty if no responses were compared.
        """
        if not self._rows:
            return {}
        rows = pd.concat(self._rows.values())
        counts = rows["compared"].dropna()
        if not len(counts):
            return {}
        return {
            "compared": int(counts.sum()),
            "compared_difference": float(rows["difference"].max()),
            "compared_unsteady": int(rows["unsteady"].sum()),
        }

    def ablation(self, run: Change) -> Ablation:
        """Return a run's ablation: the run's change, plus the layers that all runs remove."""
        return Ablation.from_changes(run, removed=self._removed)

    def is_measured(self, ablation: Ablation) -> bool:
        """Return whether the ablation is measured on the aligned documents."""
        return ablation.name in self._rows

    def rows(self, ablation: Ablation) -> pd.DataFrame:
        """Return the outcomes under one ablation, with one row per document."""
        return self._rows[ablation.name]

    def metric_rows(self, ablation: Ablation) -> pd.DataFrame:
        """Return the outcomes under an ablation, with columns for choice probabilities added."""
        rows = self.rows(ablation)
        if not rows["choices"].any():
            return rows
        names = self.identity.benchmark.tasks[0].all_metrics.keys() & CHOICE_PROBABILITIES
        values = {name: self._cached(self._measures[name].values, ablation) for name in names}
        return rows.assign(**{METRIC_PREFIX + name: values[name] for name in names})

    @property
    def undefined_reason(self) -> str:
        """Reason why the metric is undefined; "" if it is defined."""
        return self._measure.reason

    def describe_mismatch(self, ablation: Ablation) -> str | None:
        """Describe how software or devices differed between measuring the baseline and an ablation.

        Returns None if software and devices were equal.
        """
        columns = (self.rows(side)[PROVENANCE_COLUMN] for side in (INTACT, ablation))
        counts = {
            pair: count
            for pair, count in Counter(zip(*columns, strict=True)).items()
            if list_differences([*map(json.loads, pair)])
        }
        if not counts:
            return None
        versions = list_differences([json.loads(stack) for pair in counts for stack in pair])
        return (
            f"for {sum(counts.values())} of {len(self.tasks)} documents, the baseline and the "
            f"ablation were measured with different software versions or devices: {versions}"
        )

    def values(self, ablation: Ablation) -> Array:
        """Return the metric of every document under an ablation."""
        return self._cached(self._measure.values, ablation)

    def gold_logprobs(self, ablation: Ablation) -> Array:
        """Return each gold answer's log-probability under an ablation."""
        return self._cached(gold_logprobs, ablation)

    def choice_probabilities(self, ablation: Ablation) -> Array:
        """Return each gold option's probability among its document's options."""
        return self._cached(self._measures[CHOICE_PROBABILITY].values, ablation)

    def options_logprobs(self, ablation: Ablation) -> Array:
        """Return the log of the answer options' total probability; NaN if there are no options."""
        return self._cached(_options_logprobs, ablation)

    def has_no_effect(self, ablation: Ablation) -> bool:
        """Return whether an ablation leaves all generated texts and scores unchanged.

        Score changes within the rounding tolerance are ignored.
        """
        tables = self.rows(INTACT), self.rows(ablation)
        texts, changed_texts = ([*rows.get("text", ())] for rows in tables)
        is_written = any(isinstance(text, str) for text in changed_texts)
        if is_written and texts != changed_texts:
            return False
        columns = ([*rows["loglikelihoods"], []] for rows in tables)
        intact, ablated = (np.concatenate(column).astype(np.float64) for column in columns)
        is_comparable = len(intact) and np.isfinite(intact).all()
        return bool(is_comparable and np.allclose(intact, ablated, *LOGPROB_TOLERANCES))

    def proxy_sums(self, proxy: Proxy) -> Array:
        """Return a proxy's sums over each document's tokens, as `[documents, layers]`.

        A sum is NaN if the proxy was not observed on the document.
        """
        unobserved = np.full(self.identity.model.layers, np.nan)
        return np.stack([unobserved if sums is None else sums for sums in self._stored_sums(proxy)])

    def part_sums(self, column: str, runs: Sequence[Change]) -> Array:
        """Return a proxy column, such as `taylor_sum`, as an array `[documents, runs]`.

        Each value is the proxy of the part that a run changes, summed over a document's tokens. The
        value is NaN if the proxy was not observed on the document.
        """
        unobserved = np.full(len(self.tasks), np.nan)
        tables = (self.rows(self.ablation(run)) for run in runs)
        columns = (rows.get(column, unobserved) for rows in tables)
        return self._stack(np.asarray(values, dtype=np.float64) for values in columns)

    def unobserved_reason(self, proxy: Proxy) -> str:
        """Describe how many documents lack a proxy; return "" if no document does."""
        return count_unobserved([sums is None for sums in self._stored_sums(proxy)])

    def _stored_sums(self, proxy: Proxy) -> list[Array | None]:
        """List a proxy's stored sums for each document, as arrays `[layers]`.

        The list contains None for each document on which the proxy was not observed.
        """
        rows = self.rows(INTACT)
        column = rows.get(proxy.column, [None] * len(rows))
        return [value if isinstance(value, np.ndarray) else None for value in column]

    def _metric_weights(self, rows: pd.DataFrame) -> Array:
        """Compute the weight of each document in the benchmark's metric."""
        units = self._measure.units(rows)
        return weights_by_task(self.tasks, self.identity.benchmark.weight_by_size, units)

    def _document_weights(self, _: pd.DataFrame) -> Array:
        """Compute the weight of each document in means that ignore the documents' lengths."""
        return weights_by_task(self.tasks, self.identity.benchmark.weight_by_size)

    def _cluster_numbers(self, _: pd.DataFrame) -> Array:
        """Look up the number of each document's cluster."""
        clusters = self._clusters or {}
        return np.array([clusters[key] for key in self.documents], dtype=np.float64)

    def _cached(self, read: Callable[[pd.DataFrame], Array], ablation: Ablation = INTACT) -> Array:
        """Apply `read` to the outcome rows of an ablation, and cache the result."""
        key = read, ablation.name
        if key not in self._cache:
            self._cache[key] = read(self.rows(ablation))
        return self._cache[key]


def count_unobserved(is_unobserved: Sequence[bool] | NDArray[np.bool_]) -> str:
    """Describe how many documents lack a proxy; return "" if no document does."""
    count = f"{sum(is_unobserved)} of {len(is_unobserved)}"
    return f"the proxy was not computed for {count} documents" if any(is_unobserved) else ""


def _options_logprobs(rows: pd.DataFrame) -> Array:
    """Return the log of each document's total option probability; NaN without options."""
    documents = zip(rows["loglikelihoods"], rows["choices"], strict=True)
    scores = [logprobs[: int(count)] if count else [math.nan] for logprobs, count in documents]
    starts = np.cumsum([0, *map(len, scores)])[:-1]
    if not scores:
        return np.empty(0)
    with np.errstate(invalid="ignore"):  # a score may be NaN
        return np.asarray(np.logaddexp.reduceat(np.concatenate(scores), starts), dtype=np.float64)


def gold_logprobs(rows: pd.DataFrame) -> Array:
    """Return the log-probability of each document's gold answer.

    If a document's whole text is scored, the log-probability of the text is returned.
    """

    def gold_logprob(logprobs: Sequence[float], gold: float | None, rolling: object) -> float:
        if rolling is True:
            return math.fsum(logprobs)
        return math.nan if gold is None or math.isnan(gold) else logprobs[int(gold)]

    columns = zip(rows["loglikelihoods"], rows["gold"], rows["rolling"], strict=True)
    return np.array([gold_logprob(*row) for row in columns], dtype=np.float64)
