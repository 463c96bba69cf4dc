"""What is recommended: calibration documents say so, no test document does, no draw is."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean

import pytest

from tests.conftest import refused
from tracker.core.estimates import Estimate
from tracker.core.formats import points
from tracker.core.prune_records import PruneRecord
from tracker.ledger.store import listed
from tracker.search.figures import end, level_text

from .conftest import Truth

pytestmark = pytest.mark.usefixtures("one_thread")


def test_calibration_documents_recommend(write, prune, ask, tmp_path: Path) -> None:
    """Was: the set that tested best."""
    done = prune(write(strategy=["accuracy", "cosine_oneshot", "last", "random"], seed=6))
    records = listed(tmp_path / "results" / "searches", PruneRecord, {})
    sets = {one.removed: end(one).drop for one in records if one.strategy != "random"}
    truth = Truth(ask(strategy="accuracy", seed=6).calibration()[0], [(), *sets])
    best = min(sets, key=lambda removed: truth.key("accuracy", removed))
    assert sets[best] > min(sets.values())
    gone = ",".join(map(str, best))
    assert "to save the recommended one: tracker export" in done.output
    assert f" --remove {gone} --output" in done.output
    assert f"goes without layers {gone.replace(',', ', ')} (2 of 5)" in done.output
    assert "Of 3 sets none loses less on 8 calibration documents" in done.output


def test_a_lucky_draw_is_neither_recommended_nor_left_out(write, prune, tmp_path: Path) -> None:
    """Was: the best draw was recommended, and the mean was that of the others."""
    done = prune(write(strategy=["accuracy", "random"], seed=2))
    records = listed(tmp_path / "results" / "searches", PruneRecord, {})
    (chosen,) = (one for one in records if one.strategy == "accuracy")
    levels = [end(one).accuracy for one in records if one.strategy == "random"]
    assert max(levels) > end(chosen).accuracy
    assert f" --remove {','.join(map(str, chosen.removed))} --output" in done.output
    assert f"By random it is {points(fmean(levels))} %, the mean of 3 draws" in done.output


def test_draws_alone_recommend_nothing(write, prune, tmp_path: Path) -> None:
    path = write(strategy="random")
    refused(prune(path, "--output", tmp_path / "lighter"), "random draws are never recommended")
    done = prune(path)
    assert "nothing is recommended" in done.output
    assert "By random it is" in done.output
    assert "tracker export" not in done.output


def test_an_undefined_level_says_why() -> None:
    """Was: a dash."""
    assert level_text(Estimate(None), "%") == "undefined (a document has no finite score)"
    assert level_text(Estimate(None, reason="no step"), "") == "undefined (no step)"
