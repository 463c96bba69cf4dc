"""The Python API: what the command line does, for notebooks and scripts.

import tracker
results = tracker.run("experiments/demo.yaml")
results.layers.sort_values("accuracy_drop")
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tracker.config import CellRequest, load_experiment
from tracker.errors import TrackingError
from tracker.ledger.store import Ledger
from tracker.records import CellRecord
from tracker.runner import publish
from tracker.runner.derive import all_records, write_report
from tracker.runner.executors import Options
from tracker.runner.prepare import all_layers
from tracker.runner.progress import Progress, Silent
from tracker.runner.publish import Publisher, Synced, Trial
from tracker.runner.run import Report, run_cells
from tracker.tracking import default_targets

if TYPE_CHECKING:
    import pandas as pd

RESULTS = Path("results")


@dataclass(frozen=True)
class Results:
    """What an experiment measured.

    Attributes:
        cells: One record a (model, benchmark), in the order of the experiment.
        report: The report page of the results folder.
        outcome: What failed, what was not published, and where the runs can be seen.
    """

    cells: tuple[CellRecord, ...]
    report: Path
    outcome: Report

    @property
    def layers(self) -> pd.DataFrame:
        """One row a (model, benchmark, run): fractions; `layer` is its first layer, 0-based."""
        from tracker.report.frames import layer_frame

        return layer_frame(self.cells)

    @property
    def correlations(self) -> pd.DataFrame:
        """One row a (model, benchmark, proxy, coefficient, subset of layers)."""
        from tracker.report.frames import correlation_frame

        return correlation_frame(self.cells)


def run(
    experiment: str | os.PathLike[str],
    *,
    results: str | os.PathLike[str] = RESULTS,
    track: Sequence[str] | None = None,
    device: str = "auto",
    trust_remote_code: bool = False,
    memory: int | None = None,
    executor: str = "local",
    slurm: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> Results:
    """Run an experiment file, continuing what the results folder already holds.

    Args:
        experiment: The YAML file.
        results: The results folder.
        track: Tracking backends, each as `BACKEND` or `BACKEND:PROJECT`; empty for none; None for
            W&B in the trial of a W&B sweep, else MLflow.
        device: `auto` (an accelerator if there is one), or a torch device.
        trust_remote_code: Whether code and pickles from a download may run.
        memory: Bytes that hidden states, keys and values may take; None = half of what is free.
        executor: Where cells are measured: `local` (this process), `ray` or `slurm`.
        slurm: What each SLURM job asks for, in submitit's words: `{"partition": "gpu"}`.
        progress: Listens to the run; None for silence.

    Returns:
        The records, the report page, and what failed.

    Raises:
        RequestError: The request was wrong; nothing was computed or written.
    """
    path = Path(experiment)
    asked, text = load_experiment(path)
    ledger = Ledger(Path(results))
    publisher = Publisher(
        default_targets() if track is None else track, asked.destination, ledger.root
    )
    try:
        outcome = run_cells(
            asked.cells(),
            ledger,
            publisher,
            Options(device, trust_remote_code, memory, executor, slurm or {}),
            progress or Silent(),
        )
    finally:
        publisher.close()
    ledger.keep_experiment(path.name, text)
    _, page = write_report(ledger)
    return Results(tuple(outcome.cells), page, outcome)


def evaluate(
    request: CellRequest,
    *,
    project: str = "tracker",
    results: str | os.PathLike[str] = RESULTS,
    track: Sequence[str] | None = None,
    device: str = "auto",
    trust_remote_code: bool = False,
    memory: int | None = None,
    progress: Progress | None = None,
) -> tuple[CellRecord | None, Report]:
    """Measure one cell over all layers of its model: what a sweep's trial calls.

    Args:
        request: The model, the benchmark, and a layer; all layers are measured together.
        project: The tracking backends' project.
        results: The results folder, which trials share.
        track: Tracking backends, each as `BACKEND` or `BACKEND:PROJECT`; empty for none; None for
            W&B in the trial of a W&B sweep, else MLflow.
        device: `auto` (an accelerator if there is one), or a torch device.
        trust_remote_code: Whether code and pickles from a download may run.
        memory: Bytes that hidden states, keys and values may take; None = half of what is free.
        progress: Listens to the run; None for silence.

    Returns:
        The cell's record, or None where it failed or where what was asked for is no run (its span
        reaches beyond the last layer, or holds a removed one); and what failed.

    Raises:
        RequestError: The request was wrong; nothing was computed or written.
    """
    ledger = Ledger(Path(results))
    progress = progress or Silent()
    track = default_targets() if track is None else track
    trial = Trial(track, ledger.root)
    asked = request
    try:
        request, no_run = all_layers(request, ledger, trust_remote_code)
        if no_run is not None:
            progress.say(f"nothing to measure: {no_run}")
            trial.end(no_run)
            return None, Report()
        publisher = Publisher(track, project, ledger.root)
        try:
            outcome = run_cells(
                [request], ledger, publisher, Options(device, trust_remote_code, memory), progress
            )
        finally:
            publisher.close()
    except BaseException as error:
        with suppress(TrackingError):
            trial.end(str(error) or type(error).__name__, failed=True)
        raise
    record = outcome.cells[0] if outcome.cells else None
    try:
        if record is None:
            trial.end(outcome.failed[request.title], failed=True)
        else:
            trial.log(record, asked)
    except TrackingError as error:
        outcome.unpublished[f"the trial of {asked.title}"] = str(error)
    return record, outcome


def report(results: str | os.PathLike[str] = RESULTS) -> Results:
    """Write the report page of a results folder again, from its ledger.

    Args:
        results: The results folder.

    Returns:
        The records and the page.

    Raises:
        ResultsError: There are no results.
    """
    cells, page = write_report(Ledger.existing(Path(results)))
    return Results(tuple(cells), page, Report(cells=cells))


def sync(to: Sequence[str] | None = None, *, results: str | os.PathLike[str] = RESULTS) -> Synced:
    """Publish from the ledger what the backends do not have yet, asking the backends themselves.

    Args:
        to: Tracking backends, each as `BACKEND` or `BACKEND:PROJECT`; None for MLflow. Where no
            project is named, each cell goes to the one that it was run for.
        results: The results folder.

    Returns:
        What was published and what was not.

    Raises:
        RequestError: There is no such backend.
        ResultsError: There are no results.
    """
    return publish.sync(Ledger.existing(Path(results)), default_targets() if to is None else to)


def ls(results: str | os.PathLike[str] = RESULTS) -> list[CellRecord]:
    """List what a results folder holds.

    Args:
        results: The results folder.

    Returns:
        One record a cell, for what was asked of it last.

    Raises:
        ResultsError: There are no results.
    """
    return all_records(Ledger.existing(Path(results)))
