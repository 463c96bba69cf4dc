"""Compute one metric per document: a metric of lm-eval, or the probability of the right option."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from tracker.ledger.cells import CellStore
from tracker.ledger.outcomes import METRIC_PREFIX
from tracker.ledger.texts import StoredText
from tracker.schema.identities import CHOICE_PROBABILITIES
from tracker.stats.accuracy import RATIO_SCALES, document_ratios
from tracker.stats.arrays import Array
from tracker.stats.decisions import gold_probabilities

TextReader = Callable[[], Mapping[tuple[str, int], StoredText]]
"""Function that reads the texts of a cell's documents."""
OPTION_COLUMNS = ("choices", "gold", "loglikelihoods")
"""Columns of a document's options and of their log-likelihoods."""


def _byte_length(choice: str) -> int:
    return len(choice.encode())


_LENGTH_FUNCTIONS: dict[str, Callable[[str], float]] = {
    "acc_norm": len,
    "acc_bytes": _byte_length,
    "choice_probability_norm": lambda choice: _byte_length(choice) * math.log(2),
}
"""Metric → function that returns lm-eval's divisor of an option's log-likelihood."""


class OptionScores:
    """Answer options of each document, and the metric's rule to score them.

    Args:
        rows: Outcomes of the documents under any one ablation.
        metric: Name of the metric, e.g. `acc_norm`.
        texts: Function that reads the documents' texts.

    Attributes:
        counts: Number of answer options of each document.
        max_options: Largest number of options of a document; 0 if no document has options.
        gold: Index of each document's gold option; NaN if the document has no gold option.
        lengths: Divisor of each option's log-likelihood, as `[documents, options]`; NaN if unknown.
        reason: Reason why the divisor of an option is unknown; "" if all divisors are known.
    """

    def __init__(self, rows: pd.DataFrame, metric: str, texts: TextReader) -> None:
        name = metric.partition(",")[0]
        self.counts = rows["choices"].to_numpy(dtype=int)
        self.max_options = int(self.counts.max(initial=0))
        gold = rows["gold"].to_numpy(dtype=np.float64)
        self.gold = np.where(gold < self.counts, gold, np.nan)  # also where there are no options
        self.lengths, self.reason = np.ones((len(rows), self.max_options)), ""
        if name == "acc_mutual_info":
            self.lengths[:] = np.nan
            self.reason = f"{metric} also uses log-likelihoods other than those of the options"
        if length := _LENGTH_FUNCTIONS.get(name):
            self.lengths[:] = np.nan
            known_texts, unknown = texts(), set()
            for row, key in enumerate(zip(rows["task"], rows["doc"], strict=True)):
                options = known_texts[key].text.choices if key in known_texts else ()
                if options and len(options) == self.counts[row]:
                    self.lengths[row, : len(options)] = list(map(length, options))
                else:
                    unknown.add(key)
            if unknown:
                self.reason = (
                    f"{metric} divides by the lengths of options, which are unknown for "
                    f"{len(unknown)} documents"
                )

    def scores(self, loglikelihoods: Iterable[Sequence[float]]) -> Array:
        """Compute scores `[documents, options]` from the log-likelihoods of answer options.

        If a document has fewer options than others, its missing scores are NaN.
        """
        table = np.full(self.lengths.shape, np.nan)
        documents = zip(loglikelihoods, self.counts, strict=True)
        values = np.concatenate([[], *(row[:count] for row, count in documents)])
        table[np.arange(table.shape[1]) < self.counts[:, None]] = values
        return table / self.lengths


class DocumentMetric:
    """Metric of each document of a cell, computed from the stored outcomes.

    Args:
        store: Stored outcomes of one model on one benchmark.
        name: Name of the metric.

    Attributes:
        columns: Columns of the outcomes from which the metric is computed.
        aggregation: Name of lm-eval's aggregation.
        higher_is_better: True for an accuracy or similar; False for a loss.
    """

    def __init__(self, store: CellStore, name: str) -> None:
        task = store.identity.benchmark.tasks[0]
        self.name, self._read_texts = name, store.texts.read
        self._texts: Mapping[tuple[str, int], StoredText] = {}
        self.columns = OPTION_COLUMNS if name in CHOICE_PROBABILITIES else (METRIC_PREFIX + name,)
        self.aggregation = task.all_metrics.get(name, "mean")
        self.higher_is_better = task.higher_is_better.get(name, True)
        self._options: dict[tuple[tuple[str, int], ...], OptionScores] = {}

    @property
    def reason(self) -> str:
        """Reason why the last call of `values` gave NaN; "" if there is none."""
        return next((options.reason for options in self._options.values()), "")

    def values(self, rows: pd.DataFrame) -> Array:
        """Return the metric of each row; NaN where it is undefined."""
        if self.name in CHOICE_PROBABILITIES:
            options = self._read_options(rows)
            scores = options.scores(rows["loglikelihoods"])
            is_scored = (~np.isnan(scores)).sum(axis=1) == options.counts
            return gold_probabilities(scores, np.where(is_scored, options.gold, np.nan))
        column = rows[self.columns[0]]
        if self.aggregation not in RATIO_SCALES:
            return column.to_numpy(dtype=np.float64)
        return document_ratios(self.aggregation, *read_pairs(column).T)

    def _read_options(self, rows: pd.DataFrame) -> OptionScores:
        """Return the answer options of the documents in `rows`, from a cache if possible."""
        documents = tuple(zip(rows["task"], rows["doc"], strict=True))
        if documents not in self._options:
            if self.name in _LENGTH_FUNCTIONS and not self._texts.keys() >= {*documents}:
                self._texts = self._read_texts()  # blocks may have been measured meanwhile
            options = OptionScores(rows, self.name, lambda: self._texts)
            self._options = {documents: options}
        return self._options[documents]

    def units(self, rows: pd.DataFrame) -> Array | None:
        """Return the denominators of a metric that is a ratio of sums, else None."""
        is_ratio = self.aggregation in RATIO_SCALES
        return read_pairs(rows[self.columns[0]])[:, 1] if is_ratio else None


def read_pairs(column: pd.Series[Any]) -> Array:
    """Parse a column of JSON pairs into an array `[documents, 2]`.

    A pair contains a sum and the number of summed units (e.g. tokens). The row of a document
    without a pair is NaN.
    """
    missing = (math.nan, math.nan)
    pairs = [json.loads(value) if isinstance(value, str) else missing for value in column]
    return np.array(pairs, dtype=np.float64).reshape(-1, 2)
