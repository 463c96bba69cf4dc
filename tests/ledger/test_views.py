"""What identities and views refuse to read, and the names of views' files."""

from __future__ import annotations

import pytest

from tracker.core.provenance import content_hash
from tracker.core.records import RunIdentity
from tracker.core.views import View
from tracker.ledger.cells import CellStore
from tracker.ledger.notes import sealed
from tracker.ledger.views import AskedView, CellIdentity, view_file


@pytest.mark.parametrize(
    ("name", "stem"),
    [
        ("intact--exact_match,a/b", "intact--exact_match,a%2Fb"),
        ("a" * 100, "a" * 100),
        ("a" * 101, f"{'a' * 80}--{content_hash('a' * 101)[:12]}"),
    ],
)
def test_a_view_is_found_in_the_file_that_any_tracker_gave_it(name: str, stem: str) -> None:
    assert view_file(name) == stem


def test_an_identity_under_the_key_of_another_is_refused(cell: CellStore) -> None:
    other = cell.identity.model_copy(update={"key": "0" * 64})
    assert CellIdentity.read(cell.identity.sealed()) == cell.identity
    with pytest.raises(ValueError, match=r"^its key is not that of what it describes$"):
        CellIdentity.read(other.sealed())


@pytest.mark.parametrize(
    ("removed", "run", "why"),
    [
        ((), RunIdentity(layer=2, span=2), ""),
        ((), RunIdentity(layer=3, span=2), "the model has no layer 4"),
        ((), RunIdentity(layer=4), "the model has no layer 4"),
        ((2, 4), RunIdentity(layer=0), "the model has no layer 4"),
    ],
)
def test_a_view_shows_layers_of_the_model(
    cell: CellStore, removed: tuple[int, ...], run: RunIdentity, why: str
) -> None:
    asked = AskedView(project="p", view=View(metric="acc", removed=removed, runs=(run,)))
    text = sealed(asked.model_dump(mode="json"))
    if not why:
        assert cell.views.read(text) == asked
        return
    with pytest.raises(ValueError, match=f"^{why}$"):
        cell.views.read(text)


def test_a_view_shows_a_metric_of_the_benchmark(cell: CellStore) -> None:
    asked = AskedView(project="p", view=View(metric="f1", runs=(RunIdentity(layer=0),)))
    with pytest.raises(ValueError, match=r"^the benchmark has no metric 'f1'$"):
        cell.views.read(sealed(asked.model_dump(mode="json")))
