"""Test amounts to remove: their notation, their meaning, and when they are reached."""

from __future__ import annotations

import pytest
from transformers import AutoModelForCausalLM

from tests.conftest import golden
from tracker.core.errors import ExperimentError
from tracker.search import search
from tracker.search.cells import OpenCell
from tracker.search.scores import Scores
from tracker.search.search import budget_of
from tracker.search.settings import Budget, amount, budget
from tracker.search.strategies import STRATEGIES, Search

from .conftest import LAYERS, WHOLE


@pytest.mark.parametrize(("given", "value", "measure", "share"), golden("amounts"))
def test_an_amount_is_read(given: str, value: str, measure: str, share: str) -> None:
    found = amount(given)
    assert (found.value, found.measure, found.share) == (
        pytest.approx(float(value)),
        measure,
        share == "a share",
    )
    assert amount(found.text) == found
    assert amount(8) == amount("8")


@pytest.mark.parametrize(
    "given",
    [
        *("", "-8", "8.5", True, "8 layers", "25 % layers", "1e3 MB", "200 mb", "x 5"),
        *("0", "0 %", "100 %", "120 % bytes", "M parameters"),
    ],
)
def test_what_is_no_amount_is_refused(given: object) -> None:
    with pytest.raises(ValueError, match=r"is no amount; write one of|is nothing, or everything"):
        amount(given)  # type: ignore[arg-type]


def test_enough_is_the_first_set_that_saves_as_much() -> None:
    each = (5.0, 1.0, 2.0, 4.0)
    at_least = budget("remove", amount("3 ms"), [e / 1000 for e in each], 0.02, "t")
    assert [at_least.enough(s) for s in ((1,), (2,), (1, 2), (3,))] == [False, False, True, True]
    at_most = budget("keep", amount("70 % bytes"), each, 20.0, "t")  # 6 of 20 must go
    assert not at_most.enough((0,))
    assert at_most.enough((0, 1))
    quarter = budget("remove", amount("25 %"), [1.0] * 30, 30, "t")
    assert [quarter.enough(range(n)) for n in (7, 8)] == [False, True]
    # Eight tenths add up to a little less than 0.8 in floating point.
    assert budget("remove", amount("80 % bytes"), [0.1] * 10, 1.0, "t").enough(range(8))


def test_what_leaves_nothing_is_refused() -> None:
    with pytest.raises(ExperimentError, match="of 4 parts, remove at most 3 parts"):
        budget("remove", amount(4), [1.0] * 4, 4, "t")
    with pytest.raises(ExperimentError, match=r"of 20.0 MB, keep no less than 9.0 MB"):
        budget("keep", amount("8 MB"), [5e6, 1e6, 2e6, 4e6], 20e6, "t")
    with pytest.raises(ExperimentError, match="removes nothing: the model has 4 parts; keep less"):
        budget("keep", amount(4), [1.0] * 4, 4, "t")


def test_parameters_bytes_and_seconds_are_those_of_the_model(ask, lend, model, monkeypatch) -> None:
    real = AutoModelForCausalLM.from_pretrained(model)
    sizes = [sum(p.numel() for p in layer.parameters()) for layer in real.model.layers]
    half = budget_of(ask(strategy="last", remove="50 % parameters"), lend())
    assert half.each == tuple(map(float, sizes))
    assert half.needed == pytest.approx(real.num_parameters() / 2)
    in_bytes = budget_of(ask(strategy="last", remove="50 % bytes", dtype="float16"), lend())
    assert in_bytes.each == tuple(2.0 * size for size in sizes)
    monkeypatch.setattr(search, "_measured", lambda loaded: ([0.1] * LAYERS, 0.7))
    seconds = budget_of(ask(strategy="last", remove="20 % seconds"), lender := lend())
    assert (seconds.each, seconds.needed) == ((0.1,) * LAYERS, pytest.approx(0.14))
    # Measured once: other searches and the next process have the same budget.
    monkeypatch.setattr(search, "_measured", lambda loaded: pytest.fail("measured again"))
    assert budget_of(ask(strategy="random", remove="20 % seconds"), lender) == seconds
    lender.keep_timings()
    assert budget_of(ask(strategy="last", remove="20 % seconds"), lend()) == seconds


def test_another_budget_of_one_shot_scores_measures_nothing(cell, monkeypatch) -> None:
    def steps(count: int, strategy: str) -> list[int | None]:
        within = Budget((1.0,) * LAYERS, count)
        search = Search(Scores([cell], WHOLE), within)
        return [step.layer for step in STRATEGIES[strategy](search)]

    one = {name: steps(1, name) for name in ("gold_logprob_oneshot", "cosine_oneshot")}
    monkeypatch.setattr(OpenCell, "opened", lambda *given: pytest.fail("measured"))
    for name, first in one.items():
        more = steps(4, name)
        assert more[:1] == first
        assert len(more) == 4
