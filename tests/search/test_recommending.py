"""Calibration documents decide the recommendation, never test documents or random draws."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean

import pytest

from tests.conftest import refused
from tracker.core import prune_records
from tracker.core.estimates import Estimate
from tracker.core.formats import level_text, points
from tracker.core.prune_records import PruneRecord, PruneStep
from tracker.ledger.store import listed
from tracker.search.report import end

from .conftest import Truth

pytestmark = pytest.mark.usefixtures("one_thread")


def test_calibration_documents_recommend(write, prune, ask, tmp_path: Path) -> None:
    """Was: the set that tested best."""
    done = prune(write(strategy=["accuracy", "cosine_oneshot", "last", "random"], seed=6))
    records = listed(tmp_path / "results" / "searches", PruneRecord, {})
    sets = {one.removed: end(one).lost.value for one in records if one.strategy != "random"}
    truth = Truth(ask(strategy="accuracy", seed=6).calibration()[0])
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
    levels = [end(one).level.value for one in records if one.strategy == "random"]
    assert max(levels) > end(chosen).level.value
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


def test_records_of_before_hold_figures_flat() -> None:
    """Their values lie beside the ends of their intervals."""
    flat = {"n": 4, "accuracy": 0.5, "low": 0.1, "high": 0.9, "drop": None}
    ends = dict.fromkeys(("drop_low", "drop_high"))
    step = {"removed": [1], "margin": 0.2, "margin_low": 0.1, "margin_high": 0.3}
    read = PruneStep.model_validate({**step, "test": {**flat, **ends}})
    tested = prune_records.Tested(n=4, level=Estimate(0.5, 0.1, 0.9))
    assert read == PruneStep(removed=(1,), margin=Estimate(0.2, 0.1, 0.3), test=tested)
    assert PruneStep.model_validate_json(read.model_dump_json()) == read
