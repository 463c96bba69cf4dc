"""Write W&B Reports and the saved workspace of a project, with W&B's own panels.

This is the only module that imports wandb_workspaces (extra `reports`).
"""

from __future__ import annotations

import wandb_workspaces.reports.v2 as reports
import wandb_workspaces.workspaces as workspaces
from wandb_workspaces.workspaces.internal import get_view_dict

from tracker.schema.proxies import OBSERVED, PROXIES

REPORT_TITLE = "Which layers matter"
VIEW_TITLE = "Layers by benchmark"
_VIEW_ID = "trackercells"
"""The saved view's name in addresses; W&B accepts letters and digits only."""

_LAYER_AXIS = "layer (0-based)"
_CELLS_FILTER = "Metric('jobType') == 'cell'"
_RUNS_FILTER = "Metric('jobType') == 'layer'"


def save_report(entity: str, project: str, text: str, report_id: str | None) -> str:
    """Save the W&B Report of the project; a previous report is replaced.

    Args:
        entity: The entity.
        project: The project.
        text: Text of the report, which is shown above the panels.
        report_id: Id of the report to replace; None to create a report.

    Returns:
        The address of the report.
    """
    report = reports.Report(
        entity=entity,
        project=project,
        title=REPORT_TITLE,
        description="Report by tracker; each publication replaces this report.",
        width="fluid",
    )
    source = {"entity": entity, "project": project}
    cells = reports.Runset(**source, name="cells", filters=_CELLS_FILTER)
    runs = reports.Runset(**source, name="layers", filters=_RUNS_FILTER, groupby=["group"])
    report.blocks = [
        reports.TableOfContents(),
        *(reports.P(text=paragraph) for paragraph in text.split("\n\n")),
        reports.H2(text="Over depth"),
        reports.PanelGrid(runsets=[cells], panels=_curves()),
        reports.H2(text="Proxy against truth"),
        reports.PanelGrid(runsets=[runs], panels=_scatters()),
    ]
    report.id = report_id or ""
    report.save()
    return str(report.url)


def save_view(entity: str, project: str) -> None:
    """Save a workspace that groups the project's runs by benchmark, or replace the saved one."""
    try:
        view_id = get_view_dict(entity, project, _VIEW_ID)["id"]
    except ValueError:  # there is none yet
        view_id = ""
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
    view._internal_name = f"nw-{_VIEW_ID}-v"
    view._internal_id = view_id
    view.save()


def _curves() -> list[reports.LinePlot]:
    """Return the report's panels with curves over the layers."""
    return [
        reports.LinePlot(title=title, x="layer", y=[name], title_x=_LAYER_AXIS, title_y=unit)
        for title, name, unit in (
            ("Accuracy drop when a layer is removed", "accuracy_drop", "accuracy drop (fraction)"),
            (
                "Accuracy relevance: lost share of the accuracy above chance",
                *("accuracy_relevance", "accuracy relevance"),
            ),
            ("Cheap proxy: cosine score", "cosine_score", PROXIES["cosine_score"].heading),
        )
    ]


def _scatters() -> list[reports.ScatterPlot]:
    """Return the report's panels that plot the accuracy drop against each proxy."""
    return [
        reports.ScatterPlot(
            title=f"Accuracy drop against {proxy.label}",
            x=reports.SummaryMetric(proxy.name),
            y=reports.SummaryMetric("accuracy_drop"),
            regression=False,
        )
        for proxy in OBSERVED
    ]
