"""Is what a removal costs only missing scale? Each layer removed, and replaced by what was fitted.

In the layer's place stands a factor of its input (if that helps, the layer was missed for the size
of the state alone), its mean update (a constant), or a linear map (all that a layer without
nonlinearity and without other tokens could do).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tracker.config import CellRequest, Intervention
from tracker.metrics.recovered import recovered
from tracker.metrics.resampling import RESAMPLES
from tracker.reporting.formats import counted, fixed, points
from tracker.studies.base import Asked, Said, Subject, grouped, removing_whole_layers
from tracker.studies.rescale.charts import drop_chart
from tracker.studies.rescale.figures import EVERY, NAMES, WAYS, Costs, costs
from tracker.studies.rescale.tables import NO_MAP, layer_table, significant, summary

_ASSUMED = (
    "Factors, mean updates and linear maps are fitted by least squares on other "
    "documents of the benchmark where there are enough (each cell says on which), over "
    "all tokens but each text's first; a linear map has a bias.",
    f"Intervals: percentile bootstrap over documents, {RESAMPLES:,} resamples, within "
    "tasks; documents are independent, layers are taken as they are.",
    "Significance: exact McNemar test of each stand-in against nothing in the layer's "
    "place, over the documents; Holm's adjustment over all layers and cells of a "
    "stand-in (S. Holm, Scand. J. Statist. 6, 1979).",
)


class Rescale:
    """See the module."""

    name = "rescale"
    question = "Is what a removal costs only missing scale?"

    def requests(self, asked: Asked) -> list[CellRequest]:
        """Ask for each cell twice: a linear map that cannot be fitted leaves the rest alone."""
        ways: tuple[tuple[Intervention, ...], ...] = (("remove", "scale", "mean"), ("linear",))
        return [
            removing_whole_layers(cell, interventions=some)
            for cell in asked.experiment.cells()
            for some in ways
        ]

    def say(self, asked: Asked, subjects: list[Subject]) -> Said:
        """Answer; see the module."""
        # The parts of each cell: without layers, and with linear maps.
        parts = grouped(subjects, lambda one: one.request.model_copy(update={"interventions": ()}))
        found = [cell for mine in parts if (cell := costs(mine)) is not None]
        if not found:
            return Said([], lacking=["no cell was measured with layers removed; run it again"])
        no_map = any(way not in cell.drops for cell in found for way in WAYS)
        return Said(
            answers=_answers(found),
            tables=[summary(found), significant(found), *map(layer_table, found)],
            charts=[drop_chart(cell) for cell in found],
            lacking=[NO_MAP] if no_map else [],
            assumptions=_ASSUMED,
        )


def _answers(cells: Sequence[Costs]) -> list[str]:
    """Say it over all cells, each weighing the same."""
    answers = []
    mean = {
        way: float(np.mean([cell.drops[way].mean() for cell in cells]))
        for way in EVERY
        if all(way in cell.drops for cell in cells)
    }
    said = ", ".join(f"{points(mean[way])} pp with {NAMES[way]}" for way in WAYS if way in mean)
    documents = sum(cell.n for cell in cells)
    where = f"over {counted(len(cells), 'cell')} ({counted(documents, 'document')})"
    answers.append(
        f"A layer costs {points(mean['remove'])} pp when it is removed, {said}; {where}."
    )
    for way in WAYS:
        if way not in mean:
            continue
        found = recovered(
            np.concatenate([c.drops["remove"] for c in cells]),
            np.concatenate([c.drops[way] for c in cells]),
            np.concatenate([c.drawn["remove"] for c in cells], axis=1),
            np.concatenate([c.drawn[way] for c in cells], axis=1),
        )
        if found.value is None or found.low is None or found.high is None:
            answers.append(f"What {NAMES[way]} wins back is undefined: {found.reason}.")
            continue
        share = (
            f"{fixed(100 * found.value, 0)} % (95 % interval {fixed(100 * found.low, 0)} to "
            f"{fixed(100 * found.high, 0)})"
        )
        verdict = ""
        if way == "scale":
            verdict = (
                "; so the drop is not only missing scale"
                if found.high < 0.5
                else "; so most of the drop is missing scale"
                if found.low > 0.5
                else "; whether most of the drop is missing scale is open"
            )
        subject = NAMES[way][0].upper() + NAMES[way][1:]
        answers.append(f"{subject} in the layer's place wins back {share} of the drop{verdict}.")
    return answers
