"""Write W&B Reports and the saved workspace of a project, with W&B's own panels.

This is the only module that imports wandb_workspaces (extra `reports`).
"""

from __future__ import annotations

import wandb_workspaces.reports.v2 as reports
import wandb_workspaces.workspaces as workspaces
from wandb_workspaces.workspaces.internal import get_view_dict

from tracker.core.proxies import OBSERVED, PROXIES

TITLE = "Which layers matter"
VIEW_TITLE = "Layers by benchmark"
_VIEW = "trackercells"
"""The view's name in addresses; W&B accepts letters and digits only."""

_LAYER_AXIS = "layer (0-based)"
_CELLS = "Metric('jobType') == 'cell'"
_RUNS = "Metric('jobType') == 'layer'"


def save_report(entity: str, project: str, text: str, known: str | None) -> str:
    """Save the project's report, replacing the former one.

    Args:
        entity: The entity.
        project: The project.
        text: The text above the panels.
        known: The id of the former report; None for a new one.

    Returns:
        Its address.
    """
    report = reports.Report(
        entity=entity,
        project=project,
        title=TITLE,
        description="Written by tracker; publishing again replaces it.",
        width="fluid",
    )
    cells = reports.Runset(entity=entity, project=project, name="cells", filters=_CELLS)
    runs = reports.Runset(
        entity=entity, project=project, name="layers", filters=_RUNS, groupby=["group"]
    )
    report.blocks = [
        reports.TableOfContents(),
        *(reports.P(text=paragraph) for paragraph in text.split("\n\n")),
        reports.H2(text="Over depth"),
        reports.PanelGrid(runsets=[cells], panels=_curves()),
        reports.H2(text="Proxy against truth"),
        reports.PanelGrid(runsets=[runs], panels=_scatters()),
    ]
    report.id = known or ""
    report.save()
    return str(report.url)


def save_view(entity: str, project: str) -> None:
    """Save a workspace that groups the project's runs by cell, replacing the former one."""
    try:
        known = get_view_dict(entity, project, _VIEW)["id"]
    except ValueError:  # there is none yet
        known = ""
    view = workspaces.Workspace(
        entity=entity,
        project=project,
        name=VIEW_TITLE,
        sections=[
            workspaces.Section(name="Over depth", panels=_curves(), is_open=True),
            workspaces.Section(name="Proxy against truth", panels=_scatters(), is_open=True),
        ],
        runset_settings=workspaces.RunsetSettings(groupby=[workspaces.Metric("group")]),
    )
    view._internal_name = f"nw-{_VIEW}-v"
    view._internal_id = known
    view.save()


def _curves() -> list[reports.LinePlot]:
    return [
        reports.LinePlot(title=title, x="layer", y=[name], title_x=_LAYER_AXIS, title_y=unit)
        for title, name, unit in (
            ("Accuracy that a layer's removal costs", "accuracy_drop", "accuracy drop (fraction)"),
            ("Share above chance that it costs", "accuracy_relevance", "accuracy relevance"),
            ("What the cheap proxy says instead", "cosine_score", PROXIES["cosine_score"].heading),
        )
    ]


def _scatters() -> list[reports.ScatterPlot]:
    return [
        reports.ScatterPlot(
            title=f"Accuracy drop against {proxy.label}",
            x=reports.SummaryMetric(proxy.name),
            y=reports.SummaryMetric("accuracy_drop"),
            regression=False,
        )
        for proxy in OBSERVED
    ]
