"""Test amounts to remove: their notation, their meaning, and when they are reached."""

from __future__ import annotations

import pytest
from transformers import AutoModelForCausalLM

from tests.conftest import golden
from tracker.schema.errors import ExperimentError
from tracker.search import search
from tracker.search.cells import OpenCell
from tracker.search.scores import Scores
from tracker.search.search import find_budget, run_search
from tracker.search.settings import Budget, build_budget, parse_amount
from tracker.search.strategies import STRATEGIES, Search

from .conftest import LAYER_PARTS, LAYERS


@pytest.mark.parametrize(("given", "value", "measure", "share"), golden("amounts"))
def test_an_amount_is_read(given: str, value: str, measure: str, share: str) -> None:
    parsed = parse_amount(given)
    assert parsed.value == pytest.approx(float(value))
    assert (parsed.measure, parsed.is_share) == (measure, share == "a share")
    assert parse_amount(parsed.text) == parsed
    assert parse_amount(8) == parse_amount("8")


@pytest.mark.parametrize(
    "given",
    [
        *("", "-8", "8.5", True, "8 layers", "25 % layers", "1e3 MB", "200 mb", "x 5"),
        *("0", "0 %", "100 %", "120 % bytes", "M parameters"),
    ],
)
def test_invalid_amounts_are_refused(given: object) -> None:
    with pytest.raises(ValueError, match="invalid amount"):
        parse_amount(given)  # type: ignore[arg-type]


def test_the_first_large_enough_set_meets_the_budget() -> None:
    sizes = (5.0, 1.0, 2.0, 4.0)
    removal = build_budget("remove", parse_amount("3 ms"), [e / 1000 for e in sizes], 0.02, "t")
    assert [removal.is_met(s) for s in ((1,), (2,), (1, 2), (3,))] == [False, False, True, True]
    keeping = build_budget("keep", parse_amount("70 % bytes"), sizes, 20.0, "t")  # 6 of 20 must go
    assert not keeping.is_met((0,))
    assert keeping.is_met((0, 1))
    quarter_budget = build_budget("remove", parse_amount("25 %"), [1.0] * 30, 30, "t")
    assert [quarter_budget.is_met(range(n)) for n in (7, 8)] == [False, True]
    # Eight tenths add up to a little less than 0.8 in floating point.
    assert build_budget("remove", parse_amount("80 % bytes"), [0.1] * 10, 1.0, "t").is_met(range(8))


def test_budgets_that_leave_nothing_are_refused() -> None:
    with pytest.raises(ExperimentError, match="The model has 4 parts; remove at most 3 parts"):
        build_budget("remove", parse_amount(4), [1.0] * 4, 4, "t")
    with pytest.raises(ExperimentError, match=r"The model has 20.0 MB; keep no less than 9.0 MB"):
        build_budget("keep", parse_amount("8 MB"), [5e6, 1e6, 2e6, 4e6], 20e6, "t")
    with pytest.raises(ExperimentError, match="removes nothing: the model has 4 parts; keep less"):
        build_budget("keep", parse_amount(4), [1.0] * 4, 4, "t")


def test_budgets_measure_the_model(ask, make_cache, model, monkeypatch) -> None:
    loaded_model = AutoModelForCausalLM.from_pretrained(model)
    sizes = [sum(p.numel() for p in layer.parameters()) for layer in loaded_model.model.layers]
    parameter_budget = find_budget(ask(strategy="last", remove="50 % parameters"), make_cache())
    assert parameter_budget.sizes == tuple(map(float, sizes))
    assert parameter_budget.min_removed == pytest.approx(loaded_model.num_parameters() / 2)
    request = ask(strategy="last", remove="50 % bytes", dtype="float16")
    assert find_budget(request, make_cache()).sizes == tuple(2.0 * size for size in sizes)
    latency_budget = find_budget(ask(strategy="last", remove="2 % latency"), make_cache())
    assert 0 < 0.02 * sum(latency_budget.sizes) < latency_budget.min_removed
    monkeypatch.setattr(search, "_time_layers", lambda *given: ([0.1] * LAYERS, 0.7))
    time_budget = find_budget(ask(strategy="last", remove="20 % seconds"), cache := make_cache())
    assert (time_budget.sizes, time_budget.min_removed) == ((0.1,) * LAYERS, pytest.approx(0.14))
    # Measured once: other searches and the next process have the same budget.
    monkeypatch.setattr(search, "_time_layers", lambda *given: pytest.fail("measured again"))
    assert find_budget(ask(strategy="random", remove="20 % seconds"), cache) == time_budget
    cache.keep_timings()
    assert find_budget(ask(strategy="last", remove="20 % seconds"), make_cache()) == time_budget
    (draw,) = run_search(ask(strategy="last", remove="20 % seconds"), time_budget, make_cache())
    assert [step.seconds for step in draw.steps] == pytest.approx([0.6, 0.5])


def test_another_budget_reuses_one_shot_scores(cell, monkeypatch) -> None:
    def steps(count: int, strategy: str) -> list[int | None]:
        budget = Budget((1.0,) * LAYERS, count, parts=LAYER_PARTS)
        search = Search(Scores([cell], LAYER_PARTS), budget)
        return [step.layer for step in STRATEGIES[strategy](search)]

    first_steps = {name: steps(1, name) for name in ("gold_logprob_oneshot", "cosine_oneshot")}
    monkeypatch.setattr(OpenCell, "open_meter", lambda *given: pytest.fail("measured"))
    for name, first_step in first_steps.items():
        more_steps = steps(4, name)
        assert more_steps[:1] == first_step
        assert len(more_steps) == 4
