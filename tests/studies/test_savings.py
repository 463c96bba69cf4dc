"""Replayed races against real ones, and what is said of them."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace
from itertools import compress

import numpy as np
import pytest

from tests.helpers.ablations import single_layers
from tracker.engine.forward.streams import plan_streams
from tracker.schema.changes import INTACT, Ablation, Change
from tracker.schema.estimates import Estimate
from tracker.schema.questions import parse_question
from tracker.stats.stopping import Race
from tracker.studies.savings import (
    MeasuredDocuments,
    draw_orders,
    layers_counter,
    question_bound,
    replay_question,
    savings_table,
)

from .conftest import SmallStudy, cell_stores, conduct_small, find_row, table_column

LAYERS = 6
N = 44
SPLIT = 570
"""Documents of arc_easy's split that the package brings."""
DROP = "drop within 30 pp at 60 %"
SHARES = [0.4, 0.25, 0.22, 0.1, 0.02, 0.0]


def make_cell(values: np.ndarray) -> MeasuredDocuments:
    """Build a cell of given drops of whole layers."""
    passes = layers_counter(single_layers(range(LAYERS))[1:], LAYERS)
    runs = tuple(Change(layers=(n,)) for n in range(values.shape[1]))
    all_passes = passes(np.ones(len(runs), dtype=bool))
    tasks, counts = ("t",) * len(values), {"t": len(values)}
    return MeasuredDocuments("a cell", runs, values, tasks, counts, 1.0, passes, all_passes, 36.0)


@pytest.fixture(scope="module")
def cell() -> MeasuredDocuments:
    """400 documents, 240 of them right, under six layers, from harmless to ruinous."""
    generator, values = np.random.default_rng(2), np.zeros((400, LAYERS))
    for layer, share in enumerate(SHARES):
        values[generator.permutation(240)[: int(400 * share) + 12], layer] = 1
        values[240 + generator.permutation(160)[:12], layer] = -1
    return make_cell(generator.permutation(values))


def replay_races(cell: MeasuredDocuments, text: str, orders: np.ndarray) -> dict[str, np.ndarray]:
    """Compute the same by whole races, planning one document's streams at a time."""
    question, rows = parse_question(text), []
    for order in orders:
        race = Race(question, cell.population, LAYERS)
        seen, measured, passes = 0, 0, 0.0
        counts: Counter[str] = Counter()
        blocks, started = [], set()
        for task in (cell.tasks[index] for index in order):
            blocks.append((task, counts[task] // 32))
            counts[task] += 1
        while not race.is_answered and seen < len(order):
            plan = plan_streams(single_layers(np.flatnonzero(race.open)), LAYERS)
            task, index = blocks[seen]
            started.add((task, index))
            size = min(32, cell.counts[task] - 32 * index)
            passes += size * plan.layer_passes
            measured += size
            lacking = [n for n, block in enumerate(blocks) if block not in started]
            end = min(lacking, default=len(order))
            race.update(cell.drops[order[seen:end]])
            seen = end
        answered = race.is_answered
        share = np.inf if seen < cell.population and not answered else 1 / cell.population
        rows.append((measured * share, passes * share / 21, answered))
    return dict(zip(("documents", "passes", "answered"), np.transpose(rows), strict=True))


@pytest.mark.parametrize("others", [0, 600])
@pytest.mark.parametrize("group", [False, True])
@pytest.mark.parametrize(
    "text",
    ["top 2", "top 2 within 4 pp", "prune 2", "prune 3 within 1 pp", "drop within 6 pp", "sign"],
)
def test_a_replay_is_a_race(cell, text, group, others):
    """Of all documents or a sample; of a group whole blocks of each task are measured."""
    assert cell.everything == 21  # 6 for the baseline, and 5 + 4 + 3 + 2 + 1 + 0
    cell, orders = replace(cell, counts={"t": 400 + others}), draw_orders(400)[:4]
    if group:
        tasks = tuple("ab"[index % 5 == 0] for index in range(400))
        cell = replace(cell, tasks=tasks, counts={"a": 320 + others, "b": 80})
    replayed = replay_question(cell, parse_question(text), orders)
    for name, figures in replay_races(cell, text, orders).items():
        assert getattr(replayed, name) == pytest.approx(figures)
    assert not replayed.wrong.any(), "none of these is; those that hide something are, see below"
    assert (replayed.passes < 1).any() or others or group


def test_what_is_open_when_the_measured_documents_end_took_nobody_knows_how_much(cell):
    sampled, question = replace(cell, counts={"t": 1000}), parse_question("top 2")
    replayed = replay_question(sampled, question, draw_orders(400)[:8])
    assert not replayed.answered.any()
    row = find_row(savings_table(sampled, [replayed]), str(question))
    for name in ("documents", "layer passes", "fewer than lm-eval"):
        assert row[name] == Estimate(None, reason="undecided after all 400 measured documents")
    # All of a split answer whatever is no tie.
    assert replay_question(cell, question, draw_orders(400)[:8]).answered.all()


def test_an_answer_that_contradicts_all_documents_is_wrong(cell):
    # Orders that hide what layer 4 costs until it is settled, which is no random order.
    orders = np.argsort(cell.drops[:, 1] - cell.drops[:, 5], kind="stable")[None]
    for text in ("top 2", "prune 3", "drop within 10 pp", "sign"):
        replayed = replay_question(cell, parse_question(text), orders)
        assert replayed.answered.all()
        assert replayed.wrong.all()


def test_streams_that_share_are_planned_together():
    ablations = [Ablation.parse("layer:1"), Ablation.parse("layers:1,3"), Ablation.parse("layer:2")]
    passes = layers_counter(ablations, LAYERS)
    for mask in ([True, True, False], [False, True, True], [True, True, True]):
        plan = plan_streams([INTACT, *compress(ablations, mask)], LAYERS)
        assert passes(np.array(mask)) == plan.layer_passes


def test_what_bounds_a_question(cell):
    means, sds = cell.drops.mean(axis=0), cell.drops.std(axis=0)
    set_bound = question_bound(cell, parse_question("top 2 within 1 pp"))
    assert set_bound.distance == pytest.approx(means[1] - means[2] + 0.01)
    difference = cell.drops[:, 1] - cell.drops[:, 2]
    assert set_bound.sd == pytest.approx(difference.std())
    drop_bound = question_bound(cell, parse_question("drop within 5 pp"))
    assert drop_bound.sd == sds.max()
    # One-sided at 5 % / (2 · 4), 80 % power: 2.498 + 0.842; two-sided at 5 % / 6.
    for bound, reach in ((set_bound, 3.339), (drop_bound, 2.638)):
        n = (reach * bound.sd / bound.distance) ** 2
        assert bound.documents.value == pytest.approx(1 / (1 / n + 1 / 400), abs=1)
    set_bound = question_bound(cell, parse_question("sign"))
    assert (
        set_bound.documents.reason
        == "only a measurement of all documents can show that the drop is 0"
    )
    tied = make_cell(cell.drops[:, [0, 1, 1, 3, 4, 5]])
    assert "two drops are equal" in question_bound(tied, parse_question("top 2")).documents.reason


# -- a real cell -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def study(tmp_path_factory) -> SmallStudy:
    """Build a study of a tiny model."""
    folder = tmp_path_factory.mktemp("savings")
    return conduct_small("savings", folder, ["arc_easy"], N, questions=["top 1 within 5 pp", DROP])


def test_what_a_cell_saves(study):
    finding, (store,) = study.finding, cell_stores(study.path, study.results)
    savings, bounds = finding.tables
    assert table_column(savings, "question") == ["top 1 within 5 pp", DROP]
    acc = store.read().pivot(index="doc", columns="ablation", values="metric/acc")
    values = acc["baseline"].to_numpy()[:, None] - acc.drop(columns="baseline").to_numpy()
    assert values.shape == (N, 4)
    row = find_row(savings, DROP)
    assert row["promised"].value == pytest.approx(0.4)
    # The baseline's 4 passes and 3 + 2 + 1 + 0, beside 4 + 4 · 3.
    passes = row["layer passes"].value
    assert row["fewer than lm-eval"].value == pytest.approx(16 / 10 / passes)
    shares = []
    for order in draw_orders(N):
        race = Race(parse_question(DROP), SPLIT, 4)
        while not race.is_answered:
            start = int(race.bounds.seen.max())
            race.update(values[order[start : start + 32]])
        shares.append(-(-race.bounds.seen.max() // 32) * 32 / SPLIT)  # whole blocks are measured
    assert row["documents"].value == np.median(shares)
    sd = find_row(bounds, DROP)["standard deviation of a document"].value
    assert sd == pytest.approx(values.std(axis=0).max())
    (chart,) = finding.charts
    assert chart.lines[1].values[-1] == 1
    pattern = rf"{N} of {SPLIT} documents, 4 runs: 'drop within 30 pp at 60 %' needs the fewest"
    assert re.search(rf"{pattern} layer passes: \d+", finding.answers[0]) is not None
    assert "Of 400 replays, " in finding.answers[-1]
    # Which runs are at the edge is chance: was 'bounded by layer 2 and layer 0'.
    texts = [*finding.answers, *map(str, table_column(bounds, "the hardest to know"))]
    assert not [text for text in texts if re.search(r"layers? \d", text)]
