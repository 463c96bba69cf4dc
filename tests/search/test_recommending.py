"""Calibration documents decide the recommendation, never test documents or random draws."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean

import pytest

from tests.conftest import refused
from tracker.schema import prune_records
from tracker.schema.estimates import Estimate
from tracker.schema.formats import level_text, points
from tracker.schema.prune_records import PruneStep
from tracker.search.report import final_outcome

from .conftest import Truth, stored_searches

pytestmark = pytest.mark.usefixtures("one_thread")


def test_calibration_documents_recommend(write, prune, ask, tmp_path: Path) -> None:
    """Was: the set that tested best."""
    result = prune(write(strategy=["accuracy", "cosine_oneshot", "last", "random"], seed=6))
    records = stored_searches(tmp_path)
    losses = {r.removed: final_outcome(r).lost.value for r in records if r.strategy != "random"}
    truth = Truth(ask(strategy="accuracy", seed=6).calibration()[0])
    best_set = min(losses, key=lambda removed: truth.key("accuracy", removed))
    assert losses[best_set] > min(losses.values())
    layers = ",".join(map(str, best_set))
    assert "to save the recommended model: tracker export" in result.output
    assert f" --remove {layers} --output" in result.output
    assert f"removes layers {layers.replace(',', ', ')} (2 of 5)" in result.output
    assert "Of 3 compared sets, none has a smaller loss on 8 calibration documents" in result.output


def test_a_lucky_draw_is_not_recommended(write, prune, tmp_path: Path) -> None:
    """Was: the best draw was recommended, and the mean was that of the others."""
    result = prune(write(strategy=["accuracy", "random"], seed=2))
    records = stored_searches(tmp_path)
    (record,) = (r for r in records if r.strategy == "accuracy")
    levels = [final_outcome(r).level.value for r in records if r.strategy == "random"]
    assert max(levels) > final_outcome(record).level.value
    assert f" --remove {','.join(map(str, record.removed))} --output" in result.output
    text = f"By random, the test accuracy is {points(fmean(levels))} %, the mean of 3 draws"
    assert text in result.output


def test_draws_alone_recommend_nothing(write, prune, tmp_path: Path) -> None:
    path = write(strategy="random")
    refused(prune(path, "--output", tmp_path / "lighter"), "random draws are never recommended")
    result = prune(path)
    assert "no set is recommended" in result.output
    assert "By random, the test accuracy is" in result.output
    assert "tracker export" not in result.output


def test_undefined_levels_have_a_reason() -> None:
    """Was: a dash."""
    assert level_text(Estimate(None), "%") == "undefined (a document has no finite score)"
    assert level_text(Estimate(None, reason="no step"), "") == "undefined (no step)"


def test_old_records_with_flat_figures_are_read() -> None:
    """Their values lie beside the ends of their intervals."""
    flat_fields = {"n": 4, "accuracy": 0.5, "low": 0.1, "high": 0.9, "drop": None}
    drop_interval = dict.fromkeys(("drop_low", "drop_high"))
    step = {"removed": [1], "margin": 0.2, "margin_low": 0.1, "margin_high": 0.3}
    parsed = PruneStep.model_validate({**step, "test": {**flat_fields, **drop_interval}})
    outcome = prune_records.HeldOutResult(n=4, level=Estimate(0.5, 0.1, 0.9))
    assert parsed == PruneStep(removed=(1,), margin=Estimate(0.2, 0.1, 0.3), test=outcome)
    assert PruneStep.model_validate_json(parsed.model_dump_json()) == parsed
