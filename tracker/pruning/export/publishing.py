"""Hands a saved model to the tracking backends, beside the cells that say why it is as it is."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict, replace
from pathlib import Path

from tracker.core.errors import TrackerError
from tracker.core.records import CellRecord
from tracker.pruning.export.facts import Exported
from tracker.tracking import open_models, target
from tracker.tracking.base import SavedModel


def publish(
    model: Exported,
    made_of: Sequence[CellRecord],
    track: Sequence[str],
    project: str,
    results: Path,
    register: str | None = None,
) -> Exported:
    """Publish a model; what one backend refuses does not keep the others from it.

    Args:
        model: What was saved.
        made_of: The cells that chose it, or say what it costs.
        track: The backends, each as `BACKEND` or `BACKEND:PROJECT`.
        project: Where none is named.
        results: The results folder.
        register: The name under which MLflow's registry keeps it; None for none.

    Returns:
        The model, with where it is and what went wrong.
    """
    facts, folder = model.as_json(), model.folder.absolute()
    shown = SavedModel(folder, model.name, facts, _figures(model), tuple(made_of), register)
    locations, unpublished = {}, {}
    for text in track:
        to = target(text)
        with closing(open_models(to.backend, to.project or project, results, to.server)) as models:
            try:
                locations[to.backend] = models.add_model(shown)
            except TrackerError as error:
                unpublished[text] = str(error)
    return replace(model, locations=locations, unpublished=unpublished)


def _figures(model: Exported) -> dict[str, float]:
    """Numbers of a model, by names that every backend takes."""
    sizes = {"base": model.before, "pruned": model.after}
    found: dict[str, float] = {
        f"{name}/{what}": number
        for name, size in sizes.items()
        for what, number in asdict(size).items()
    }
    if model.faster is not None:
        found["pruned/times_as_fast"] = model.faster[0]
    for each in model.accuracy:
        metric = f"{each.benchmark}/{each.metric.replace(',', ' ')}"
        for name, level in (("base", each.before), ("pruned", each.after)):
            if level.value is not None:
                found[f"{name}/{metric}"] = level.value
    return found
