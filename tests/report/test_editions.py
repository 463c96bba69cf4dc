"""A task that was edited is several under one name: all say which, and the latest counts."""

from __future__ import annotations

import pytest
from click.testing import CliRunner

from tracker.analysis.labels import benchmark_labels, row_labels
from tracker.analysis.ranks.layers import layer_board
from tracker.analysis.ranks.models import model_board
from tracker.cli import main
from tracker.ledger.cells import measured_last
from tracker.report.export import boards

from .cells import ONE, THREE, TWO, edition
from .conftest import digest

LATEST = f"measured 2026-11-28 09:30:00 UTC ({TWO.key[:8]})"


def test_the_list_tells_them_apart(monkeypatch):
    """By more than the key."""
    monkeypatch.setattr("tracker.api.ls", lambda *args: [ONE, TWO, THREE])
    done = CliRunner().invoke(main, ["ls"])
    assert done.exit_code == 0
    for (_, says), row in zip(
        row_labels([ONE, TWO, THREE]), done.output.splitlines()[1:], strict=True
    ):
        assert f"our_sums (acc) · {says}" in row


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"benchmark": {"data": "hub"}}, "hub"),
        ({"benchmark": {"seed": 7}}, "seed 7"),
        ({"benchmark": {"apply_chat_template": True}}, "chat"),
        ({"benchmark": {"settings": {"system_instruction": "Add."}}}, "system_instruction=Add."),
    ],
)
def test_what_else_tells_rows_apart_is_shown(changes, says):
    other = edition("one", "2026-11-28T00:00:00+00:00", key=digest("other"), **changes)
    assert row_labels([ONE, other])[1][1] == says
    assert says in benchmark_labels([ONE, other])[1]


@pytest.mark.parametrize("cells", [[ONE, TWO, THREE], [TWO, THREE, ONE], [THREE, ONE, TWO]])
def test_the_board_takes_the_latest_and_names_the_others(cells):
    """Was: the first in order, which may be outdated."""
    board = layer_board(cells)
    assert board.cells == (TWO,)
    others = [label for label in benchmark_labels(cells) if LATEST not in label]
    why = "its task was edited since: what was measured last counts, our_sums · 0-shot · " + LATEST
    assert board.left_out == dict.fromkeys(others, why)
    _, notes = boards(cells)
    assert [note for note in notes if "edited" in note] == [
        f"SmolLM2: {label} does not count: {why}." for label in others
    ]


def test_a_larger_edition_that_is_outdated_does_not_count():
    small = TWO.model_copy(update={"n": 16})
    assert layer_board([ONE, small]).cells == (small,)
    # Other documents of one edition are no edit: the larger counts, as ever.
    assert layer_board([small, TWO]).cells == (TWO,)
    # Nor are other data or settings.
    hub = edition("hub", "2026-11-29T00:00:00+00:00", benchmark={"data": "hub"}, n=16)
    assert layer_board([TWO, hub]).cells == (TWO,)


def test_models_are_compared_on_the_latest_that_they_share():
    other = [edition(name, ONE.measured, model="Other") for name in ("one", "two")]
    found = model_board([ONE, TWO, *other])
    assert len(found.benchmarks) == 1
    assert "its task was edited since: what was measured last counts" in found.left_out.values()
    # Where they do not share it, they are compared on what they share.
    found = model_board([ONE, TWO, other[0]])
    assert [model.rank.value for model in found.models] == [1, 1]


@pytest.mark.parametrize(
    ("said", "date"),
    [
        ("<b>now</b>", ""),
        ("9999-99-99", ""),
        ("0001-01-01T00:00:00+14:00", ""),
        ("2026-11-28T09:30:00.5+01:00", "2026-11-28T08:30:00+00:00"),
    ],
)
def test_what_is_no_date_says_nothing(said, date):
    assert measured_last([{"measured": said}]) == date
