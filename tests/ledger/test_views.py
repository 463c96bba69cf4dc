"""What identities and views refuse to read, and the names of views' files."""

from __future__ import annotations

import pytest

from tests.helpers.stored_cells import asks
from tracker.core.changes import Change
from tracker.core.provenance import content_hash
from tracker.core.views import View
from tracker.ledger.files import sealed
from tracker.ledger.views import CellIdentity, RequestedView, view_file


@pytest.mark.parametrize(
    ("name", "stem"),
    [
        ("intact--exact_match,a/b", "intact--exact_match,a%2Fb"),
        ("a" * 100, "a" * 100),
        ("a" * 101, f"{'a' * 80}--{content_hash('a' * 101)[:12]}"),
    ],
)
def test_a_view_is_found_in_the_file_that_any_tracker_gave_it(name, stem):
    assert view_file(name) == stem


def test_an_identity_under_the_key_of_another_is_refused(cell):
    other = cell.identity.model_copy(update={"key": "0" * 64})
    assert CellIdentity.read(cell.identity.sealed()) == cell.identity
    with pytest.raises(ValueError, match=r"^its key is not that of what it describes$"):
        CellIdentity.read(other.sealed())


@pytest.mark.parametrize(
    ("removed", "run", "metric", "why"),
    [
        ((), {"layer": 2, "span": 2}, "acc", ""),
        ((), {"layer": 3, "span": 2}, "acc", "the model has no layer 4"),
        ((), {"layer": 4}, "acc", "the model has no layer 4"),
        ((2, 4), {"layer": 0}, "acc", "the model has no layer 4"),
        ((), {"layer": 0}, "f1", "the benchmark has no metric 'f1'"),
    ],
)
def test_a_view_shows_layers_of_the_model_and_a_metric_of_the_benchmark(
    cell, removed, run, metric, why
):
    view = View(metric=metric, removed=removed, runs=(Change.of_fields(**run),))
    asked = RequestedView(project="p", view=view)
    text = sealed(asked.model_dump(mode="json"))
    if not why:
        assert cell.views.read(text) == asked
        return
    with pytest.raises(ValueError, match=f"^{why}$"):
        cell.views.read(text)


def test_a_copy_in_place_of_another_view_is_named(cell):
    """Was: one of two views was gone, and nothing was said."""
    for layer, removed in ((0, ()), (1, (3,))):
        cell.views.ask(asks(layer, removed=removed), "project")
    intact, without = (cell.views.path(name) for name in ("intact", "without-3"))
    without.write_bytes(intact.read_bytes())
    damaged: dict[str, str] = {}
    assert [stored.view.removed for stored in cell.views.asked(damaged)] == [()]
    assert "it is a copy of intact.json" in damaged[str(without)]


def test_requested_layers_are_no_control_that_was_drawn_at_random(cell: CellStore) -> None:
    """Was: two runs of the same layers, in one view, had the same key in trackers."""
    requested, drawn = Change(layers=(0, 2)), Change(layers=(0, 2), drawn=True)
    other = Change(layers=(1, 3), drawn=True)
    first = View(metric="acc", runs=(requested, other), limit=8)
    second = View(metric="acc", runs=(drawn, other), limit=4)
    assert first.joined(second).runs == second.joined(first).runs == (requested, other)
    assert first.shows(second)
    assert not second.model_copy(update={"limit": 9}).shows(first)
