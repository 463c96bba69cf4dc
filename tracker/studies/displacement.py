"""Study: test whether the KL divergence of a changed model's output predicts the lost accuracy.

The KL divergence compares the next-token distributions of the intact and the changed model, at the
tokens of the right answer. The study computes the rank correlation between divergence and drop over
all changes, such as removed layers. The study also correlates the smaller and the larger half of
the divergences separately.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from tracker.schema.config import CellRequest
from tracker.schema.errors import RequestError
from tracker.schema.estimates import Estimate
from tracker.schema.formats import metric_format
from tracker.schema.proxies import ANSWER_TOKENS, KL_COLUMN
from tracker.schema.tables import Table
from tracker.stats.arrays import safe_divide
from tracker.stats.correlation import correlation_difference, resampled_spearman
from tracker.studies.base import Study, StudyContext, StudyResult, Subject, study_texts
from tracker.studies.layout import figure_table, labelled
from tracker.studies.registry import DisplacementSettings

DISPLACEMENT_TEXTS = study_texts("displacement")
MIN_CHANGES = 8
"""Minimum number of changes, so that each half has four."""


@dataclass(frozen=True)
class KlAgreement:
    """Rank correlations of KL divergence and drops, over a group of changes of one model."""

    changes: str = labelled("changes")
    count: int = labelled("number", "count")
    kl: float | None = labelled("mean KL (nats per token)", "proxy", "no change has a finite KL")
    drop: Estimate = labelled("Spearman correlation with the {change}", "coefficient")
    choice: Estimate = labelled(
        "Spearman correlation with the choice probability drop", "coefficient"
    )
    gold: Estimate = labelled(
        "Spearman correlation with the drop of gold log-probability", "coefficient"
    )


class Displacement(Study[DisplacementSettings]):
    """Study that compares the KL divergence of each change of a model with the accuracy drop."""

    name = "displacement"
    question = "Does the KL divergence of a change predict the accuracy drop?"
    intact = True
    texts = DISPLACEMENT_TEXTS

    def expand(self, cell: CellRequest, context: StudyContext) -> Iterator[CellRequest]:
        """Yield the experiment file's request, and also request KL divergences.

        Raises RequestError if the experiment file has fewer than `MIN_CHANGES` changes.
        """
        if (count := len([*cell.changes.expand()])) < MIN_CHANGES:
            raise RequestError(DISPLACEMENT_TEXTS.render("few", cell, count, MIN_CHANGES))
        yield replace(cell, observe=("kl",))

    def answer(self, context: StudyContext, subjects: list[Subject]) -> StudyResult:
        """Correlate KL divergences with drops, for each model and benchmark."""
        result = StudyResult()
        for subject in subjects:
            result.add(*_correlate_divergences(subject))
        return result


def _correlate_divergences(subject: Subject) -> tuple[str, Table]:
    """Correlate KL divergences with drops over the ablations of a model on a benchmark.

    Returns the correlations as a sentence and a table.
    """
    outcomes = subject.outcomes()
    ablations = [outcomes.ablation(run) for run in outcomes.runs]
    sums, tokens = (outcomes.part_sums(n, outcomes.runs) for n in (KL_COLUMN, ANSWER_TOKENS))
    kl = safe_divide(sums.sum(axis=0), tokens.sum(axis=0))
    resampled_kl = safe_divide(outcomes.resample(sums), outcomes.resample(tokens))
    measures = (outcomes.metric_outcomes, outcomes.choice_outcomes, outcomes.gold_outcomes)
    costs = [outcomes.drop_series(measure(ablations)) for measure in measures]
    is_defined = np.isfinite(kl)
    # By rank, because divergences may be equal, such as 0 for experts that no token uses.
    ranks = np.argsort(np.argsort(kl, kind="stable"), kind="stable")
    is_small = ranks < is_defined.sum() // 2
    is_large = is_defined & ~is_small
    groups = {"all": is_defined, "smaller KL": is_small, "larger KL": is_large}

    def agreements(mask: NDArray[np.bool_]) -> list[Estimate]:
        x, xs = kl[mask], resampled_kl[:, mask]
        return [resampled_spearman(x, xs, cost[mask], drawn[:, mask]) for cost, drawn in costs]

    means = [float(kl[mask].mean()) if mask.any() else None for mask in groups.values()]
    rows = [
        KlAgreement(name, int(mask.sum()), mean, *agreements(mask))
        for (name, mask), mean in zip(groups.items(), means, strict=True)
    ]
    large, small = ((kl[mask], resampled_kl[:, mask]) for mask in (is_large, is_small))
    differences = [
        correlation_difference(
            *(large, small, (cost[is_large], drawn[:, is_large]), "spearman"),
            second_drop=(cost[is_small], drawn[:, is_small]),
        )
        for cost, drawn in costs[:2]
    ]
    measure, title = metric_format(subject.record), subject.record.title
    answer = DISPLACEMENT_TEXTS.render("answer", title, measure, rows, differences)
    heading = f"{title}: rank correlation of KL divergence and drops over {len(ablations)} changes."
    n_undefined = len(kl) - int(is_defined.sum())
    notes = DISPLACEMENT_TEXTS.render_all("notes", n_undefined)
    return answer, figure_table(KlAgreement, heading, rows, *notes, measure=measure)
