"""Align the outcomes of a view on the documents that all its runs share."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Sequence
from copy import copy
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from tracker.analysis.paired import PairedOutcomes
from tracker.core.changes import INTACT, WHOLE_LAYER, Ablation, Change
from tracker.core.provenance import differences
from tracker.core.proxies import Proxy
from tracker.core.views import View
from tracker.ledger.cells import CellStore
from tracker.ledger.outcomes import METRIC, PROVENANCE
from tracker.ledger.views import CellIdentity
from tracker.stats.accuracy import SCALES, document_ratios, weights_by_task
from tracker.stats.arrays import Array
from tracker.stats.resampling import RESAMPLES, SEED, resampled_means

Strata = NDArray[np.str_]
SAME = 1e-6, 1e-4
"""Relative and absolute (nats) difference of log-probabilities that float32 rounding explains."""


class AlignedOutcomes:
    """Outcomes of a cell for a view: the same documents in the same order for every run.

    `columns` are the columns to read; None = all, and the stack that measured each document.
    `besides` are further ablations to align, which need not contain the view's removed layers.
    """

    def __init__(
        self,
        store: CellStore,
        view: View,
        columns: list[str] | None = None,
        besides: Sequence[Ablation] = (),
    ) -> None:
        self.identity: CellIdentity = store.identity
        self.metric = view.metric
        self._removed = view.removed
        counts = store.counts(view.extent)
        self.wanted = sum(counts.values())
        frame = store.read_documents(view.extent, columns)
        order = pd.Categorical(frame["task"], categories=list(counts))
        self._frame = frame.assign(order=order).sort_values(["order", "doc"])
        self._places = self._frame.groupby("ablation").indices
        self._with_stacks = columns is None
        self._line_up(None, view.runs, besides)

    def of_documents(
        self, documents: Collection[tuple[str, int]] | None, runs: Sequence[Change]
    ) -> AlignedOutcomes:
        """Return the same for some runs of the view and some documents; None = all they share."""
        alone = copy(self)
        alone._line_up(documents, runs)
        return alone

    def _line_up(
        self,
        documents: Collection[tuple[str, int]] | None,
        runs: Sequence[Change],
        besides: Sequence[Ablation] = (),
    ) -> None:
        """Keep the documents that all ablations share, or those of `documents` among them."""
        shown = [INTACT, Ablation.of(removed=self._removed), *map(self.ablation, runs), *besides]
        names = {ablation.name for ablation in shown}
        places = [self._places.get(name, np.empty(0, dtype=np.intp)) for name in names]
        frame = self._frame.iloc[np.sort(np.concatenate(places))]
        if documents is not None:
            held = zip(frame["task"], frame["doc"], strict=True)
            frame = frame.loc[[place in documents for place in held]]
        # A document counts only if all shown runs have it.
        measured = set(frame["ablation"].unique())
        present = frame.groupby(["task", "doc"])["ablation"].transform("size")
        frame = frame[(present == len(measured)) & (INTACT.name in measured)]
        self._rows = {str(name): rows for name, rows in frame.groupby("ablation")}
        stacks: list[str] = list(frame[PROVENANCE].unique()) if self._with_stacks else []
        self.stacks: list[dict[str, str]] = [json.loads(stack) for stack in stacks]
        self.runs = [run for run in runs if self.has(self.ablation(run))]
        self.missing = [run for run in runs if not self.has(self.ablation(run))]
        self.tasks = [str(task) for task in self.of(INTACT)["task"]] if self._rows else []
        self._read: dict[str, Array] = {}

    def only(self, kept: NDArray[np.bool_]) -> AlignedOutcomes:
        """Return the same outcomes for the documents selected by a mask."""
        fewer = copy(self)
        fewer._rows = {name: rows[kept] for name, rows in self._rows.items()}
        fewer.tasks = [task for task, keep in zip(self.tasks, kept, strict=True) if keep]
        fewer._read = {}
        return fewer

    @property
    def documents(self) -> list[tuple[str, int]]:
        """(task, number in its split) of each document."""
        return list(zip(self.tasks, map(int, self.of(INTACT)["doc"]), strict=True))

    @property
    def whole_layers(self) -> list[Change]:
        """The runs that remove one whole layer."""
        return [run for run in self.runs if run.kind == WHOLE_LAYER]

    @property
    def strata(self) -> Strata | None:
        """The strata of resampling: the tasks of a group; None for a single task."""
        return np.array(self.tasks) if len(set(self.tasks)) > 1 else None

    @property
    def higher_is_better(self) -> bool:
        """True if the metric is an accuracy or similar; False if it is a loss."""
        return self.identity.benchmark.tasks[0].higher_is_better.get(self.metric, True)

    @property
    def weights(self) -> Array:
        """The weight of each document in the benchmark's metric, summing to 1."""
        if self._how not in SCALES:
            return self.plain_weights
        units = pairs(self.of(INTACT)[METRIC + self.metric])[:, 1]
        return self._once("weights", lambda: self._weights(units))

    @property
    def plain_weights(self) -> Array:
        """The weights of documents for figures that are plain means, not ratios of sums."""
        return self._once("plain weights", lambda: self._weights(None))

    def by_metric(self, ablations: Sequence[Ablation]) -> PairedOutcomes:
        """Return each document's value of the view's metric, intact and under ablations."""
        before, after = self._beside(self.values, ablations)
        return PairedOutcomes(before, after, self.weights, self.higher_is_better)

    def by_gold_logprob(self, ablations: Sequence[Ablation]) -> PairedOutcomes:
        """Return the log-probability of each document's gold answer, intact and under ablations."""
        return PairedOutcomes(*self._beside(self.gold, ablations), self.plain_weights)

    def by_options(self, ablations: Sequence[Ablation]) -> PairedOutcomes:
        """Return the log-probability of all options of a document together, in nats."""
        return PairedOutcomes(*self._beside(self.options, ablations), self.plain_weights)

    def _beside(
        self, figure: Callable[[Ablation], Array], ablations: Sequence[Ablation]
    ) -> tuple[Array, Array]:
        after = [figure(ablation) for ablation in ablations]
        return figure(INTACT), np.stack(after, axis=1) if after else np.empty((len(self.tasks), 0))

    @property
    def tokens(self) -> Array:
        """The number of tokens behind each document's proxies."""
        return self.of(INTACT)["proxy_tokens"].to_numpy(dtype=np.float64)

    def resampled(self, values: Array, weights: Array | None = None) -> Array:
        """Return the means of columns in each resample of the documents, the same in every call."""
        return resampled_means(values, RESAMPLES, SEED, self.strata, weights)

    def comparisons(self) -> dict[str, Any]:
        """Summarise the outcomes that were recomputed on a really pruned model."""
        if not self._rows:
            return {}
        rows = pd.concat(self._rows.values())
        counted = rows["compared"].dropna()
        if not len(counted):
            return {}
        return {
            "compared": int(counted.sum()),
            "compared_difference": float(rows["difference"].max()),
            "compared_unsteady": int(rows["unsteady"].sum()),
        }

    def ablation(self, run: Change) -> Ablation:
        """Return the ablation of a run, including the layers that the view removes."""
        return Ablation.of(run, removed=self._removed)

    def has(self, ablation: Ablation) -> bool:
        """Return whether an ablation is measured."""
        return ablation.name in self._rows

    def of(self, ablation: Ablation) -> pd.DataFrame:
        """Return the rows of one ablation."""
        return self._rows[ablation.name]

    def mismatch(self, ablation: Ablation) -> str | None:
        """Describe different versions or devices of a baseline and its ablation, if any."""
        pairs = list(zip(self.of(INTACT)[PROVENANCE], self.of(ablation)[PROVENANCE], strict=True))
        how = {pair: differences([*map(json.loads, pair)]) for pair in set(pairs)}
        count = sum(bool(how[pair]) for pair in pairs)
        if not count:
            return None
        every = differences([json.loads(one) for pair in how if how[pair] for one in pair])
        return (
            f"baseline and ablation of {count} of {len(pairs)} documents were measured by "
            f"different versions or devices: {every}"
        )

    def values(self, ablation: Ablation) -> Array:
        """Return the view's metric of every document under an ablation."""

        def read() -> Array:
            column = self.of(ablation)[METRIC + self.metric]
            if self._how not in SCALES:
                return column.to_numpy(dtype=np.float64)
            both = pairs(column)
            return document_ratios(self._how, both[:, 0], both[:, 1])

        return self._once(f"metric {ablation.name}", read)

    def gold(self, ablation: Ablation) -> Array:
        """Return the log-probability of every document's gold answer under an ablation."""
        return self._once(f"gold {ablation.name}", lambda: gold_logprobs(self.of(ablation)))

    def options(self, ablation: Ablation) -> Array:
        """Return the log-probability of each document's options together; NaN without options."""
        return self._once(f"options {ablation.name}", lambda: options_logprobs(self.of(ablation)))

    def moves_nothing(self, ablation: Ablation) -> bool:
        """Return whether an ablation changes no text, and no log-probability beyond rounding."""
        before, after = self.of(INTACT), self.of(ablation)
        if "text" in before and list(before["text"]) != list(after["text"]):
            return False
        one, other = (
            np.concatenate([*rows["loglikelihoods"], []]).astype(np.float64)
            for rows in (before, after)
        )
        return bool(len(one) and np.isfinite(one).all() and np.allclose(one, other, *SAME))

    def proxy_sums(self, proxy: Proxy) -> Array:
        """Return a proxy's sums over each document's tokens [documents, layers].

        NaN where the proxy was not observed when a document was measured.
        """
        nothing = np.full(self.identity.model.layers, np.nan)
        return np.stack([nothing if each is None else each for each in self._sums(proxy)])

    def part_sums(self, proxy: Proxy, runs: Sequence[Change]) -> Array:
        """Return a proxy's sums over each document's tokens for the part that each run removes.

        `[documents, runs]`; NaN where the proxy was not observed when a document was measured.
        """
        nothing = np.full(len(self.tasks), np.nan)
        rows = (self.of(self.ablation(run)) for run in runs)
        found = [
            each[proxy.column].to_numpy(dtype=np.float64) if proxy.column in each else nothing
            for each in rows
        ]
        return np.stack(found, axis=1) if found else np.empty((len(self.tasks), 0))

    def not_observed(self, proxy: Proxy) -> str:
        """Count the documents that were measured without a proxy; return "" if there are none."""
        sums = self._sums(proxy)
        lacking = sum(each is None for each in sums)
        return f"not observed when {lacking} of {len(sums)} documents were measured" * bool(lacking)

    def _sums(self, proxy: Proxy) -> list[Array | None]:
        rows = self.of(INTACT)
        kept = rows[proxy.column] if proxy.column in rows else [None] * len(rows)
        return [each if isinstance(each, np.ndarray) else None for each in kept]

    def _weights(self, units: Array | None) -> Array:
        return weights_by_task(self.tasks, self.identity.benchmark.weight_by_size, units)

    @property
    def _how(self) -> str:
        return self.identity.benchmark.tasks[0].metrics.get(self.metric, "mean")

    def _once(self, name: str, read: Callable[[], Array]) -> Array:
        if name not in self._read:
            self._read[name] = read()
        return self._read[name]


def pairs(column: pd.Series[Any]) -> Array:
    """Read a metric that is stored as JSON pairs [documents, 2]; NaN where a document has none."""
    missing = (math.nan, math.nan)
    return np.array(
        [json.loads(value) if isinstance(value, str) else missing for value in column],
        dtype=np.float64,
    )


def options_logprobs(rows: pd.DataFrame) -> Array:
    """Return the log of the summed probability of each document's options; NaN without options."""
    both = zip(rows["loglikelihoods"], rows["choices"], strict=True)
    scores = [lls[: int(count)] if count else [math.nan] for lls, count in both]
    begins = np.cumsum([0, *map(len, scores)])[:-1]
    if not scores:
        return np.empty(0)
    with np.errstate(invalid="ignore"):  # a score may be NaN
        return np.asarray(np.logaddexp.reduceat(np.concatenate(scores), begins), dtype=np.float64)


def gold_logprobs(rows: pd.DataFrame) -> Array:
    """Return the log-probability of each document's gold answer; NaN where lm-eval names none.

    A rolling document has no gold answer: the sum of its windows is used instead.
    """
    return np.array(
        [
            math.fsum(lls)
            if whole is True
            else (lls[int(gold)] if gold == gold and gold is not None else math.nan)
            for lls, gold, whole in zip(
                rows["loglikelihoods"], rows["gold"], rows["rolling"], strict=True
            )
        ],
        dtype=np.float64,
    )
