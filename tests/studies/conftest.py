"""What the tests of studies share: what a study is asked, its cells, and reading its tables."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from click.testing import CliRunner

from tracker.cli import main
from tracker.core.experiment import load_experiment
from tracker.core.tables import Entry, Table
from tracker.ledger.cells import CellStore
from tracker.ledger.store import Ledger
from tracker.measuring.job import Options
from tracker.measuring.prepare import look_up
from tracker.measuring.progress import Silent
from tracker.studies.base import StudyContext
from tracker.team.publish import Publisher


def asked_for(path: Path, results: Path) -> StudyContext:
    """What a study is asked over an experiment file."""
    experiment, _ = load_experiment(path)
    publisher = Publisher([], experiment.destination, results)
    return StudyContext(path, experiment, Ledger(results), Options("cpu"), Silent(), publisher)


def stores(path: Path, results: Path) -> list[CellStore]:
    """Where the outcomes of each of a file's cells are."""
    asked = asked_for(path, results)
    found = [look_up(cell, asked.ledger).store for cell in asked.experiment.cells()]
    assert all(found)
    return [store for store in found if store is not None]


def column(table: Table, label: str) -> list[Entry]:
    """A column by its heading."""
    place = [heading.label for heading in table.headings].index(label)
    return [row[place] for row in table.rows]


def plain(entries: Sequence[Entry]) -> list[object]:
    """The figures and texts of entries."""
    return [entry if isinstance(entry, str) else entry.value for entry in entries]


def row_of(table: Table, *first: object) -> dict[str, Entry]:
    """The row that begins with these values: heading → entry."""
    heads = [heading.label for heading in table.headings]
    (row,) = (r for r in table.rows if plain(r[: len(first)]) == [*first])
    return dict(zip(heads, row, strict=True))


@pytest.fixture
def refused(tmp_path: Path):
    """Ask the command for what it must refuse before it measures, and return what it says."""

    def ask(study: str, path: Path, *more: str) -> str:
        results = tmp_path / "results"
        typed = ["study", study, str(path), "--results", str(results), *more]
        done = CliRunner().invoke(main, typed)
        assert done.exit_code == 2
        assert not results.exists()
        return done.output

    return ask
