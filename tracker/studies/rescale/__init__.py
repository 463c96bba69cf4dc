"""Is what a removal costs only missing scale? Each layer removed, and replaced by what was fitted.

In the layer's place stands a factor of its input (if that helps, the layer was missed for the size
of the state alone), its mean update (a constant), or a linear map (all that a layer without
nonlinearity and without other tokens could do).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tracker.core.config import CellRequest
from tracker.core.estimates import Estimate
from tracker.core.formats import counted, fixed
from tracker.core.kinds import Intervention
from tracker.stats.recovered import recovered
from tracker.stats.resampling import RESAMPLES
from tracker.studies.base import (
    Study,
    StudyContext,
    StudyResult,
    Subject,
    grouped,
    refuse_removed,
    removing_whole_layers,
)
from tracker.studies.rescale.charts import drop_chart
from tracker.studies.rescale.figures import NAMES, WAYS, Costs, costs
from tracker.studies.rescale.tables import layer_table, significant, summary

_ASSUMED = (
    "Factors, mean updates and linear maps are fitted by least squares on other "
    "documents of the benchmark where there are enough (the table says on which), over "
    "all tokens but each text's first; a linear map has a bias.",
    f"Intervals: percentile bootstrap over documents, {RESAMPLES:,} resamples, within "
    "tasks; documents are independent, layers are taken as they are.",
    "Significance: exact McNemar test of each stand-in against nothing in the layer's "
    "place, over the documents, where these are right or wrong; Holm's adjustment over all "
    "layers and cells of a stand-in that are tested (S. Holm, Scand. J. Statist. 6, 1979).",
)


class Rescale(Study):
    """See the module."""

    name = "rescale"
    question = "Is what a removal costs only missing scale?"
    about = """
    Each layer in EXPERIMENT is removed, and replaced by a factor of its input, by its mean update
    and by a linear map of its input, all fitted on other documents. The study says how much of the
    drop each of these wins back, whatever 'intervention' the file names: if a factor does, the
    layer was missed for the size of the hidden state alone. About four times the work of removing
    the layers.

    \b
    Examples:
      tracker study rescale experiments/replaced.yaml
      tracker study rescale experiments/demo.yaml --results results --track none
    """
    settings = ()

    def requests(self, asked: StudyContext) -> list[CellRequest]:
        """Ask for each cell twice: a linear map that cannot be fitted leaves the rest alone.

        RequestError where layers are removed beneath: every term would hold what they cost.
        """
        ways: tuple[tuple[Intervention, ...], ...] = (("remove", "scale", "mean"), ("linear",))
        cells = asked.experiment.cells()
        for cell in cells:
            refuse_removed(cell, "rescale replaces the layers of the intact model", asked)
        return [removing_whole_layers(cell, interventions=some) for cell in cells for some in ways]

    def say(self, asked: StudyContext, subjects: list[Subject]) -> StudyResult:
        """Answer; see the module."""
        # The parts of each cell: without layers, and with linear maps.
        parts = grouped(subjects, lambda one: one.request.model_copy(update={"interventions": ()}))
        found = [cell for mine in parts if (cell := costs(mine)) is not None]
        if not found:
            return StudyResult(
                [], lacking=["no benchmark was measured with layers removed; run it again"]
            )
        # Bits and fractions have no sum.
        alike = grouped(found, lambda cell: cell.measure)
        return StudyResult(
            answers=[
                f"By {cells[0].measure.level} in {cells[0].measure.unit}: {line}"
                if len(alike) > 1
                else line
                for cells in alike
                for line in _answers(cells)
            ],
            tables=[*map(summary, alike), significant(found), *map(layer_table, found)],
            charts=[drop_chart(cell) for cell in found],
            assumptions=_ASSUMED,
        )


def _answers(cells: Sequence[Costs]) -> list[str]:
    """Say it over all cells of one measure, each weighing the same."""
    answers = []
    measure = cells[0].measure
    ways = [way for way in WAYS if all(way in cell.drops for cell in cells)]
    said = "".join(f", {_cost(cells, way)} with {NAMES[way]}" for way in ways)
    documents = sum(cell.n for cell in cells)
    where = f"over {counted(len(cells), 'benchmark')} ({counted(documents, 'document')})"
    answers.append(f"A layer costs {_cost(cells, 'remove')} when it is removed{said}; {where}.")
    shares = {
        what: {way: _won_back(cells, way, nats) for way in ways}
        for what, nats in (
            (f"the {measure.change}", False),
            ("the loss of gold log-probability", True),
        )
    }
    for what, by_way in shares.items():
        text = ", ".join(f"{NAMES[way]} {_share(found)}" for way, found in by_way.items())
        answers.append(f"Won back of {what}: {text}.")
    for what, by_way in shares.items():
        scale = by_way["scale"]
        if scale.low is not None and scale.high is not None:
            part = "not only" if scale.high < 0.5 else "mostly" if scale.low > 0.5 else "perhaps"
            answers.append(f"So {what} is {part} missing scale.")
    return answers


def _cost(cells: Sequence[Costs], way: Intervention) -> str:
    """The mean drop of a layer, or why there is none."""
    measure = cells[0].measure
    if bad := sum(int((~np.isfinite(cell.drops[way])).sum()) for cell in cells):
        of = sum(len(cell.layers) for cell in cells)
        return f"an undefined amount (not finite for {bad} of {of} layers)"
    mean = float(np.mean([cell.drops[way].mean() for cell in cells]))
    return f"{measure.write(mean)} {measure.unit}"


def _won_back(cells: Sequence[Costs], way: Intervention, nats: bool) -> Estimate:
    """Put the layers of all cells together, in nats or by accuracy."""
    drops = [cell.nats if nats else cell.drops for cell in cells]
    drawn = [cell.drawn_nats if nats else cell.drawn for cell in cells]
    return recovered(
        np.concatenate([each["remove"] for each in drops]),
        np.concatenate([each[way] for each in drops]),
        np.concatenate([each["remove"] for each in drawn], axis=1),
        np.concatenate([each[way] for each in drawn], axis=1),
    )


def _share(found: Estimate) -> str:
    if found.value is None or found.low is None or found.high is None:
        return f"undefined ({found.reason})"
    low, value, high = (fixed(100 * each, 0) for each in (found.low, found.value, found.high))
    return f"{value} % (95 % interval {low} to {high})"
