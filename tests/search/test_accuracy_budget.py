"""Test budgets of accuracy: where a search ends, and what test documents recommend."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import NormalDist
from types import SimpleNamespace

import numpy as np
import pytest
import scipy

from tests.conftest import refused
from tests.helpers.truth import plain_answers, pruned_copy
from tests.tools import accuracy_budget as simulation
from tracker.analysis.paired import PairedOutcomes
from tracker.export.changes import find_removal, removal
from tracker.ledger.store import Ledger
from tracker.schema.estimates import Estimate
from tracker.schema.formats import round_count
from tracker.schema.identities import BenchmarkIdentity
from tracker.schema.prune_records import HeldOutResult, PruneStep
from tracker.search import report
from tracker.search.accuracy_budget import AccuracyBudget
from tracker.search.conduct import end_within_budget, recommend_within
from tracker.search.planning import plan_searches, possible_results
from tracker.search.search import find_budget, run_search

from .conftest import LAYERS, Truth, open_documents, stored_searches

STRATEGIES = ["accuracy", "last"]
SETTINGS = {"strategy": STRATEGIES, "seed": 0, "test_sample": 40}


def plain_outcomes(request, sets) -> dict[tuple[int, ...], np.ndarray]:
    """Answer each document by plain passes of really pruned models."""
    model, documents, max_length = open_documents(request)

    def outcomes(removed: tuple[int, ...]) -> np.ndarray:
        changed = pruned_copy(model, removed)
        answers = [plain_answers(changed, d.requests, max_length) for d in documents]
        chosen = [int(np.argmax([value for value, _ in answer])) for answer in answers]
        return np.array([c == d.gold for c, d in zip(chosen, documents, strict=True)], dtype=float)

    return {removed: outcomes(removed) for removed in dict.fromkeys([(), *sets])}


def naive_bound(lost: int, won: int, n: int, share: float = 1.0, family: int = 1) -> float:
    """Write the upper end of the loss out: two lost documents and a won one are added."""
    values = [share] * (lost + 2) + [-1.0] * (won + 1) + [0.0] * (n - lost - won)
    z = NormalDist().inv_cdf(0.975)
    if family > 1:  # by Student's distribution, as all intervals without a p-value
        t = scipy.stats.t(n - 1)
        z *= t.ppf(1 - 0.025 / family) / t.ppf(0.975)
    return float(np.mean(values) + z * np.std(values) / np.sqrt(n + 3))


@pytest.mark.usefixtures("one_thread", "in_process")
def test_the_lightest_set_within_the_budget_is_saved(write, prune, ask, tmp_path: Path) -> None:
    lighter, budget = tmp_path / "lighter", 0.30
    path = write(**SETTINGS, remove=3, max_drop="30pp")
    result = prune(path, "--output", lighter)
    assert result.exit_code == 0, result.output
    records = {record.strategy: record for record in stored_searches(tmp_path)}
    truth = Truth(ask(strategy="accuracy", seed=0).calibration()[0])
    for record in records.values():
        losses = [truth.lost("accuracy", step.removed) for step in record.steps]
        # It ends at the amount, or at the first loss above twice the budget.
        assert all(loss <= 2 * budget for loss in losses[:-1])
        assert losses[-1] > 2 * budget or len(record.removed) == 3
    request = ask(strategy="accuracy", seed=0, test_sample=40).test()
    steps = {name: [s.removed for s in record.steps] for name, record in records.items()}
    outcomes = plain_outcomes(request, [s for sets in steps.values() for s in sets])
    shown = []
    for name in ("accuracy", "last"):
        for removed in steps[name]:
            changes = outcomes[()] - outcomes[removed]
            lost, won = int((changes > 0).sum()), int((changes < 0).sum())
            if naive_bound(lost, won, 40, family=2) > budget:
                break
            shown.append((len(removed), -(lost - won), removed))
    facts = json.loads((lighter / "tracker.json").read_text())
    assert facts["removed"] == list(max(shown)[2])
    # One paragraph in the terminal, on the page and on the card.
    sentence = re.search(
        r"It is shown to lose at most 30pp, [^(]*", result.output.replace("\n", " ")
    )
    assert sentence is not None
    words = re.sub(r"\s+", " ", sentence[0]).strip()
    for file in (lighter / "README.md", tmp_path / "results" / "report.html"):
        text = re.sub(r"\s+", " ", file.read_text().replace("\\", ""))
        assert words in text, file
        assert not re.search("not used to choose|not influence|not inflate", text), file
    change = find_removal(Ledger(tmp_path / "results"), record.model, removal(facts["removed"]))
    assert "how much" in change.tested[0].documents

    # A smaller budget of the same searches: an estimate is not enough for --output.
    small = write(**SETTINGS, remove=3, max_drop="6pp")
    result = prune(small, "--output", tmp_path / "none")
    assert result.exit_code == 1
    assert not (tmp_path / "none").exists()
    assert re.search(
        r"not saved: .*is shown to lose at most 6pp; .* too few .*-drop", result.output
    )
    assert re.search(
        r"To save the model nevertheless, type: tracker export .* --remove [\d,]+ ", result.output
    )
    # The table shows how each search ends, and not the last step that it tried.
    columns, rows = Ledger(tmp_path / "results").contents().findings[0].tables[0].plain()
    table = [dict(zip(columns, row, strict=True)) for row in rows]
    assert [row["removed"] for row in table] == ["none"] * 3
    assert {row["test accuracy"] for row in table} == {table[0]["test accuracy"]}


def make_search(outcomes: list[tuple[int, int]], n: int, strategy: str = "accuracy"):
    """Make a tested search of which each step loses and wins some of `n` documents."""
    baseline = (np.arange(n) < n // 2).astype(float)
    columns = [
        np.where(np.arange(n) < lost, 0.0, np.where(np.arange(n) >= n - won, 1.0, baseline))
        for lost, won in outcomes
    ]
    paired = PairedOutcomes(baseline, np.stack(columns, axis=1), np.full(n, 1 / n))
    tests = [
        HeldOutResult(n=n, level=paired.level(k), lost=paired.drop(k)) for k in range(len(outcomes))
    ]
    steps = [PruneStep(removed=tuple(range(k + 1)), test=test) for k, test in enumerate(tests)]
    level = Estimate(float(np.mean(baseline)))
    intact = HeldOutResult(n=n, level=level, lost=Estimate(None))
    record = SimpleNamespace(steps=steps, baseline=intact)
    request = SimpleNamespace(strategy=strategy, accuracy_budget=None)
    return report.TestedSearch(request, record, paired, ())  # type: ignore[arg-type]


def test_steps_are_tested_up_to_the_first_that_is_not_shown() -> None:
    """A later step that looks better is not shown."""
    budget = AccuracyBudget.parse("5pp", None)
    outcomes = [(2, 2), (12, 4), (30, 14), (12, 4)]
    bounds = [naive_bound(*pair, 400) for pair in outcomes]
    assert [bound <= 0.05 for bound in bounds] == [True, True, False, True]
    result = recommend_within(budget, [make_search(outcomes, 400)])  # type: ignore[arg-type]
    assert (result.removed, result.estimated) == ((0, 1), (0, 1, 2, 3))
    # Steps that cannot be saved are left out, and so they do not end the sequence.
    for sizes, removed in (((1, 3, 4), (0,)), ((1, 4), (0, 1, 2, 3)), ((3,), ())):
        searches = [make_search(outcomes, 400)]
        saved = partial(lambda sizes, _, step: len(step.removed) in sizes, sizes)
        assert recommend_within(budget, searches, saved).removed == removed  # type: ignore[arg-type]
    # Draws at random are no candidates, and a second search costs width.
    random_search = make_search([(0, 0)] * 6, 400, "random")
    result = recommend_within(budget, [make_search(outcomes, 400), random_search])  # type: ignore[arg-type]
    assert (result.removed, result.n_sets) == ((0, 1), 1)
    close = (14, 5)
    assert naive_bound(*close, 400) <= 0.049 < naive_bound(*close, 400, family=2)
    narrow = AccuracyBudget.parse("4.9pp", None)
    searches = [make_search([close], 400), make_search([(90, 0)], 400, "last")]
    assert recommend_within(narrow, searches[:1]).removed == (0,)  # type: ignore[arg-type]
    assert recommend_within(narrow, searches).removed == ()  # type: ignore[arg-type]


def test_a_search_ends_at_the_last_step_that_is_shown() -> None:
    """Was: the last step, which is the first one that loses far too much."""
    search = make_search([(2, 2), (12, 4), (30, 14), (12, 4)], 400)
    search = replace(search, run_requests=tuple("abcd"))  # type: ignore[arg-type]
    assert (search.final_index, search.run_request) == (3, "d")
    search.request.accuracy_budget = AccuracyBudget.parse("5pp", None)  # type: ignore[misc]
    for sizes, expected in (((1, 2, 3, 4), 1), ((3, 4), -1), ((1, 4), 3)):
        is_savable = partial(lambda sizes, _, step: len(step.removed) in sizes, sizes)
        ended = end_within_budget(search, 1, is_savable)
        assert ended.final_index == expected
        assert ended.run_request == [*"abcd", None][expected]
        assert len(ended.final_step.removed) == expected + 1
        outcomes = [*(step.test for step in search.record.steps), search.record.baseline]
        assert report.test_outcome(ended.final_step) == outcomes[expected]


def test_a_loss_without_a_value_ends_a_search() -> None:
    outcomes = make_search([(0, 0)], 40).outcomes
    budget = AccuracyBudget.parse("5pp", None)
    assert not budget.is_clearly_exceeded(outcomes)
    outcomes.ablated[3] = np.nan
    assert budget.is_clearly_exceeded(outcomes)


def test_the_needed_documents_show_an_estimate() -> None:
    """With so many documents, and the same shares, about 80 % of samples show it."""
    budget = AccuracyBudget.parse("5pp", None)
    result = recommend_within(budget, [make_search([(5, 3)], 100)])  # type: ignore[arg-type]
    assert (result.removed, result.estimated) == ((), (0,))
    needed = result.n_needed or 0
    generator, n_shown = np.random.default_rng(0), 0
    for _ in range(400):
        lost, won, _ = generator.multinomial(needed, [0.05, 0.03, 0.92])
        n_shown += naive_bound(lost, won, needed) <= 0.05
    assert 0.75 < n_shown / 400 < 0.97


def test_a_sample_is_asked_for_per_task_where_there_are_documents() -> None:
    """Where no documents are left, the named budget is shown by the measured ones."""
    for texts in (("5pp", None), (None, "90%")):
        search = make_search([(5, 3)], 100)
        search.request.accuracy_budget = AccuracyBudget.parse(*texts)  # type: ignore[misc]
        result = recommend_within(search.request.accuracy_budget, [search])  # type: ignore[arg-type]
        tasks = [SimpleNamespace(documents=result.n_needed) for _ in range(4)]
        for n_tasks in (4, 1):
            benchmark = BenchmarkIdentity.model_construct(tasks=tasks[:n_tasks])  # type: ignore[arg-type]
            search.record.benchmark = benchmark  # type: ignore[misc]
            reason = report.GoalResult([search], result).unshown_reason
            needed = math.ceil(result.n_needed / n_tasks)
            assert f"'test_sample' to about {round_count(needed)} " in reason
        benchmark.tasks[0].documents -= 1  # type: ignore[misc]
        option = report.GoalResult([search], result).unshown_reason.split()[-1]
        shown = AccuracyBudget.parse(*(option if text else None for text in texts))
        assert recommend_within(shown, [search]).removed == (0,)  # type: ignore[arg-type]


def test_a_loss_at_the_budget_needs_no_number_of_documents() -> None:
    for n in (60, 140, 400):
        search = make_search([(n // 20, 0)], n)
        budget = search.request.accuracy_budget = AccuracyBudget.parse("5pp", None)  # type: ignore[misc]
        result = recommend_within(budget, [search])
        assert (result.estimated, result.n_needed) == ((0,), None)
        assert "equals the budget" in report.GoalResult([search], result).unshown_reason


def test_the_nearest_budget_is_named() -> None:
    searches = [make_search([(30, 2), (21, 3), (60, 0)], 400)]
    for texts, option in (
        (("2pp", None), "--max-drop 4.5pp"),
        ((None, "95%"), "--keep-accuracy 91%"),
    ):
        result = recommend_within(AccuracyBudget.parse(*texts), searches)  # type: ignore[arg-type]
        assert (result.removed, result.estimated, result.nearest) == ((), (), option)
        # What is named is reached.
        number = option.split()[1]
        reached = AccuracyBudget.parse(*(number if text else None for text in texts))
        assert recommend_within(reached, searches).estimated == (0, 1)  # type: ignore[arg-type]


def test_no_accuracy_has_no_nearest_budget() -> None:
    for texts in ((None, "95%"), ("2pp", None)):
        budget = AccuracyBudget.parse(*texts)
        wrong = make_search([(0, 0)], 40)
        wrong.outcomes.baseline[:] = wrong.outcomes.ablated[:] = 0
        assert recommend_within(budget, [wrong]).reason  # type: ignore[arg-type]
        wrong.outcomes.ablated[0] = np.nan
        assert recommend_within(budget, [wrong]).estimated == ()  # type: ignore[arg-type]
    result = recommend_within(AccuracyBudget.parse(None, "95%"), [make_search([(20, 0)], 40)])  # type: ignore[arg-type]
    assert result.nearest == ""


def test_a_share_of_the_accuracy_is_kept() -> None:
    """95 % of an accuracy of 50 % is a loss of 2.5 pp, whose base is measured too."""
    budget = AccuracyBudget.parse(None, "95%")
    for lost, is_shown in ((8, True), (20, False)):
        excess = budget.excess(make_search([(lost, 1)], 1000).outcomes, 0)
        assert excess.value == pytest.approx((lost - 1) / 1000 - 0.05 * 0.5)
        values = [0.95] * (lost + 2) + [-1.0] * 2 + [-0.05] * (500 - lost) + [0.0] * 499
        bound = np.mean(values) + NormalDist().inv_cdf(0.975) * np.std(values) / np.sqrt(1003)
        assert excess.high == pytest.approx(bound)
        assert (bound <= 0) == is_shown


def test_false_statements_are_rare() -> None:
    assert simulation.worst_error(simulation.usual_bound, [0.05]) > 0.05
    assert simulation.worst_error(simulation.budget_bound, [0.05]) < 0.035
    budget = AccuracyBudget.parse("5pp", None)
    results = np.sum([simulation.simulate(seed, budget, 300, 0.1) for seed in range(40)], axis=0)
    n_shown, n_over, n_over_by_estimate = results.tolist()
    assert n_shown > 30
    assert n_over <= 2 < n_over_by_estimate


def test_an_unreachable_budget_is_refused(write, prune, tmp_path: Path) -> None:
    settings = {"strategy": "last", "protect": "1-4", "seed": 1, "test_sample": 10, "sample": 8}
    result = prune(write(**settings, remove=None, keep_accuracy="99.9%"))
    assert result.exit_code == 2, result.output
    assert stored_searches(tmp_path)[0].removed == (0,)


@pytest.mark.parametrize("strategy", ["last", "cosine_oneshot", "accuracy", "gold_logprob"])
def test_a_whole_walk_costs_what_was_planned(ask, make_cache, one_thread, strategy) -> None:
    """With a budget that is never exceeded, the bound is reached."""
    calibrate = ("winogrande",) if strategy == "gold_logprob" else ()
    request = ask(strategy=strategy, remove=None, max_drop="99pp", calibrate=calibrate)
    cache = make_cache()
    ((planned,), _) = plan_searches([request], cache.ledger)
    (draw,) = run_search(request, find_budget(request, cache), cache)
    assert planned.at_most
    assert (planned.steps, len(draw.steps)) == (LAYERS - 1, LAYERS - 1)
    assert planned.evaluations == draw.cost.evaluations
    assert planned.passes == pytest.approx(draw.cost.passes, rel=0.4)


def test_losses_have_no_budget(write, prune, tmp_path: Path) -> None:
    texts = tmp_path / "texts.txt"
    texts.write_text("\n\n".join(f"This is text number {n} of the corpus." for n in range(8)))
    corpus = {"benchmark": f"corpus:{texts}", "data": None, "strategy": "last", "metric": "loss"}
    refused(prune(write(**corpus, max_drop="2pp")), "is not an accuracy; 'max_drop' and")
    assert not list((tmp_path / "results").rglob("shards/*"))


def test_all_layers_can_be_walked(ask, make_cache) -> None:
    """Without an amount, a search ends only where no other removal is possible."""
    for strategy in ("accuracy", "cosine_oneshot", "angular", "random"):
        for stays, n_stay in (({}, 1), ({"at_least": "odd=1"}, 1), ({"protect": "0,1"}, 2)):
            request = ask(strategy=strategy, remove=None, max_drop="2pp", **stays)
            if strategy == "angular" and stays == {"at_least": "odd=1"}:
                continue  # spans may stop before
            sets = possible_results(request, find_budget(request, make_cache()))
            assert max(map(len, sets)) == LAYERS - n_stay, (strategy, stays)
            assert {len(s) for s in sets} == set(range(1, LAYERS - n_stay + 1))
    request = ask(unit="head", strategy="last", remove=None, max_drop="2pp")
    heads = find_budget(request, make_cache())
    assert max(map(len, possible_results(request, heads))) == int(heads.largest_size) - 3
