"""Replayed races against real ones, and what is said of them."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from tracker.core.changes import INTACT, Ablation, Change
from tracker.core.estimates import Estimate
from tracker.core.questions import question
from tracker.engine.forward.streams import plan_streams
from tracker.stats.stopping import Race
from tracker.studies.savings import (
    MeasuredDocuments,
    bound_of,
    orders_of,
    passes_of,
    replay,
    savings_table,
)

from .conftest import Small, column, row_of, small, stores

LAYERS = 6
N = 44
SPLIT = 570
"""Documents of arc_easy's split that the package brings."""
DROP = "drop within 30 pp at 60 %"
SHARES = [0.4, 0.25, 0.22, 0.1, 0.02, 0.0]


def cell_of(values: np.ndarray, ablations: list[Ablation] | None = None) -> MeasuredDocuments:
    """Build a cell of given drops, by default of whole layers."""
    passes = passes_of(ablations or [Ablation.parse(f"layer:{n}") for n in range(LAYERS)], LAYERS)
    runs = tuple(Change(layers=(n,)) for n in range(values.shape[1]))
    everything = passes(np.ones(len(runs), dtype=bool))
    tasks, counts = ("t",) * len(values), {"t": len(values)}
    return MeasuredDocuments("a cell", runs, values, tasks, counts, 1.0, passes, everything, 36.0)


@pytest.fixture(scope="module")
def cell() -> MeasuredDocuments:
    """400 documents, 240 of them right, under six layers, from harmless to ruinous."""
    generator, values = np.random.default_rng(2), np.zeros((400, LAYERS))
    for layer, share in enumerate(SHARES):
        values[generator.permutation(240)[: int(400 * share) + 12], layer] = 1
        values[240 + generator.permutation(160)[:12], layer] = -1
    return cell_of(generator.permutation(values))


def by_races(cell: MeasuredDocuments, text: str, orders: np.ndarray) -> dict[str, np.ndarray]:
    """Compute the same by whole races, planning one document's streams at a time."""
    asked, found = question(text), []
    for order in orders:
        race = Race(asked, cell.population, LAYERS)
        looked, measured, passes = 0, 0, 0.0
        seen: Counter[str] = Counter()
        block_of, there = [], set()
        for task in (cell.tasks[number] for number in order):
            block_of.append((task, seen[task] // 32))
            seen[task] += 1
        while not race.standing.answered and looked < len(order):
            open_then = np.flatnonzero(race.standing.open)
            plan = plan_streams(
                [INTACT, *(Ablation.parse(f"layer:{int(n)}") for n in open_then)], LAYERS
            )
            task, number = block_of[looked]
            there.add((task, number))
            size = min(32, cell.counts[task] - 32 * number)
            passes += size * plan.layer_passes
            measured += size
            lacking = [n for n, block in enumerate(block_of) if block not in there]
            end = min(lacking, default=len(order))
            race.look(cell.drops[order[looked:end]])
            looked = end
        answered = race.standing.answered
        share = np.inf if looked < cell.population and not answered else 1 / cell.population
        found.append((measured * share, passes * share / 21, answered))
    return dict(zip(("documents", "passes", "answered"), np.transpose(found), strict=True))


@pytest.mark.parametrize("others", [0, 600])
@pytest.mark.parametrize("group", [False, True])
@pytest.mark.parametrize(
    "text",
    ["top 2", "top 2 within 4 pp", "prune 2", "prune 3 within 1 pp", "drop within 6 pp", "sign"],
)
def test_a_replay_is_a_race(cell, text, group, others):
    """Of all documents or a sample; of a group whole blocks of each task are measured."""
    assert cell.everything == 21  # 6 for the baseline, and 5 + 4 + 3 + 2 + 1 + 0
    cell, orders = replace(cell, counts={"t": 400 + others}), orders_of(400)[:4]
    if group:
        tasks = tuple("ab"[number % 5 == 0] for number in range(400))
        cell = replace(cell, tasks=tasks, counts={"a": 320 + others, "b": 80})
    found, raced = replay(cell, question(text), orders), by_races(cell, text, orders)
    for name, figures in raced.items():
        assert getattr(found, name) == pytest.approx(figures)
    assert not found.wrong.any(), "none of these is; those that hide something are, see below"
    assert (found.passes < 1).any() or others or group


def test_what_is_open_when_the_measured_documents_end_took_nobody_knows_how_much(cell):
    sampled, asked = replace(cell, counts={"t": 1000}), question("top 2")
    found = replay(sampled, asked, orders_of(400)[:8])
    assert not found.answered.any()
    row = row_of(savings_table(sampled, [found]), str(asked))
    for name in ("documents", "layer passes", "fewer than lm-eval"):
        assert row[name] == Estimate(None, reason="open after all 400 that are measured")
    # All of a split answer whatever is no tie.
    assert replay(cell, asked, orders_of(400)[:8]).answered.all()


def test_an_answer_that_contradicts_all_documents_is_wrong(cell):
    # Orders that hide what layer 4 costs until it is settled, which is no random order.
    first = np.argsort(cell.drops[:, 1] - cell.drops[:, 5], kind="stable")[None]
    for text in ("top 2", "prune 3", "drop within 10 pp", "sign"):
        found = replay(cell, question(text), first)
        assert found.answered.all()
        assert found.wrong.all()


def test_streams_that_share_are_planned_together():
    both = [Ablation.parse("layer:1"), Ablation.parse("layers:1,3"), Ablation.parse("layer:2")]
    passes = passes_of(both, LAYERS)
    for some in ([True, True, False], [False, True, True], [True, True, True]):
        chosen = [one for one, is_open in zip(both, some, strict=True) if is_open]
        assert passes(np.array(some)) == plan_streams([INTACT, *chosen], LAYERS).layer_passes


def test_what_bounds_a_question(cell):
    means, sds = cell.drops.mean(axis=0), cell.drops.std(axis=0)
    found = bound_of(cell, question("top 2 within 1 pp"))
    assert found.distance == pytest.approx(means[1] - means[2] + 0.01)
    difference = cell.drops[:, 1] - cell.drops[:, 2]
    assert found.sd == pytest.approx(difference.std())
    wide = bound_of(cell, question("drop within 5 pp"))
    assert wide.sd == sds.max()
    # One-sided at 5 % / (2 · 4), 80 % power: 2.498 + 0.842; two-sided at 5 % / 6.
    for bound, reach in ((found, 3.339), (wide, 2.638)):
        endless = (reach * bound.sd / bound.distance) ** 2
        assert bound.documents.value == pytest.approx(1 / (1 / endless + 1 / 400), abs=1)
    found = bound_of(cell, question("sign"))
    assert found.documents.reason == "the drop is 0, which only all documents show"
    tied = cell_of(cell.drops[:, [0, 1, 1, 3, 4, 5]])
    assert "two runs tie" in (bound_of(tied, question("top 2")).documents.reason or "")


# -- a real cell -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def study(tmp_path_factory) -> Small:
    """Build a study of a tiny model."""
    folder = tmp_path_factory.mktemp("savings")
    return small("savings", folder, ["arc_easy"], N, questions=["top 1 within 5 pp", DROP])


def test_what_a_cell_saves(study):
    finding, (store,) = study.finding, stores(study.path, study.results)
    savings, bounds = finding.tables
    assert column(savings, "question") == ["top 1 within 5 pp", DROP]
    acc = store.read().pivot(index="doc", columns="ablation", values="metric/acc")
    values = acc["baseline"].to_numpy()[:, None] - acc.drop(columns="baseline").to_numpy()
    assert values.shape == (N, 4)
    row = row_of(savings, DROP)
    assert row["promised"].value == pytest.approx(0.4)
    # The baseline's 4 passes and 3 + 2 + 1 + 0, beside 4 + 4 · 3.
    passes = row["layer passes"].value
    assert row["fewer than lm-eval"].value == pytest.approx(16 / 10 / passes)
    seen = []
    for order in orders_of(N):
        race = Race(question(DROP), SPLIT, 4)
        while not race.standing.answered:
            start = int(race.bounds.seen.max())
            race.look(values[order[start : start + 32]])
        seen.append(-(-race.bounds.seen.max() // 32) * 32 / SPLIT)  # whole blocks are measured
    assert row["documents"].value == np.median(seen)
    sd = row_of(bounds, DROP)["standard deviation of a document"].value
    assert sd == pytest.approx(values.std(axis=0).max())
    (chart,) = finding.charts
    assert chart.lines[1].values[-1] == 1
    said = rf"{N} of {SPLIT} documents, 4 runs: 'drop within 30 pp at 60 %' takes the least, \d+"
    assert re.search(said, finding.answers[0]) is not None
    assert "Of 400 races" in finding.answers[-1]
    # Which runs are at the edge is chance: was 'bounded by layer 2 and layer 0'.
    texts = [*finding.answers, *map(str, column(bounds, "the hardest to know"))]
    assert not [text for text in texts if re.search(r"layers? \d", text)]
