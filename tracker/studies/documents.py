"""A measured cell document by document: what each loses by an ablation, and its proxies."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy

import numpy as np
from numpy.typing import NDArray

from tracker.core.ablations import INTACT, Ablation
from tracker.core.proxies import Proxy
from tracker.core.records import WHOLE_LAYER, RunIdentity
from tracker.core.views import View
from tracker.ledger.aligned import AlignedOutcomes, Array, gold_logprobs
from tracker.stats.accuracy import weights_by_task
from tracker.stats.resampling import RESAMPLES, SEED, resampled_means
from tracker.studies.base import Subject

Strata = NDArray[np.str_]


class ByDocument:
    """The outcomes of a cell, lined up: everything here has the same documents in one order.

    `view` is what is read, the subject's own unless it is given; `besides` are ablations that are
    lined up with its runs.
    """

    def __init__(
        self, subject: Subject, view: View | None = None, besides: Sequence[Ablation] = ()
    ) -> None:
        view = view or subject.store.views.of(subject.request)
        self.outcomes = AlignedOutcomes(subject.store, view, besides=besides)
        self.metric = view.metric
        self.tasks = self.outcomes.tasks
        self.whole_layers: list[RunIdentity] = [
            run for run in self.outcomes.runs if run.kind == WHOLE_LAYER
        ]
        self._kept: NDArray[np.bool_] = np.ones(len(self.tasks), dtype=bool)
        self._sign = 1.0 if self.outcomes.higher_is_better(view.metric) else -1.0

    def only(self, kept: NDArray[np.bool_]) -> ByDocument:
        """The same without some of all documents."""
        fewer = copy(self)
        fewer._kept = kept
        fewer.tasks = [task for task, keep in zip(self.tasks, kept, strict=True) if keep]
        return fewer

    @property
    def documents(self) -> list[tuple[str, int]]:
        """(task, number in its split) of each document."""
        numbers = map(int, self.outcomes.of(INTACT)["doc"][self._kept])
        return list(zip(self.tasks, numbers, strict=True))

    @property
    def strata(self) -> Strata | None:
        """What resamples keep at its size: the tasks of a group; None where there is one."""
        return np.array(self.tasks) if len(set(self.tasks)) > 1 else None

    @property
    def weights(self) -> Array:
        """How much each document counts in the benchmark's metric, summing to 1."""
        units = self.outcomes.units(self.metric)
        return self._weights(None if units is None else units[self._kept])

    @property
    def plain_weights(self) -> Array:
        """The same where each document has one figure, and no units that it is a ratio of."""
        return self._weights(None)

    def _weights(self, units: Array | None) -> Array:
        by_size = self.outcomes.identity.benchmark.weight_by_size
        return weights_by_task(self.tasks, by_size, units)

    def drops(self, ablations: Sequence[Ablation]) -> Array:
        """How much worse each ablation makes the metric [documents, ablations]."""
        before = self.outcomes.metric(INTACT, self.metric)
        after = [self.outcomes.metric(each, self.metric) for each in ablations]
        return self._sign * np.stack([before - each for each in after], axis=1)[self._kept]

    def gold_drops(self, ablations: Sequence[Ablation]) -> Array:
        """How much of the gold answer's log-probability each takes [documents, ablations]."""
        before = gold_logprobs(self.outcomes.of(INTACT))
        after = [gold_logprobs(self.outcomes.of(each)) for each in ablations]
        return np.stack([before - each for each in after], axis=1)[self._kept]

    @property
    def tokens(self) -> Array:
        """Tokens behind each document's proxies."""
        tokens = self.outcomes.of(INTACT)["proxy_tokens"].to_numpy(dtype=np.float64)
        return np.asarray(tokens[self._kept])

    def proxy_sums(self, proxy: Proxy) -> Array:
        """What is observed of a proxy, summed over each document's tokens [documents, layers]."""
        return np.asarray(self.outcomes.proxy_sums(proxy)[self._kept])

    def resampled(self, values: Array, weights: Array | None = None) -> Array:
        """The means of columns in each resample of the documents, the same ones in every call."""
        return resampled_means(values, RESAMPLES, SEED, self.strata, weights)


def a_token(sums: Array, tokens: Array) -> Array:
    """Each document's mean over its tokens [documents, layers]; 0 without any."""
    return sums / np.maximum(tokens, 1)[:, None]
