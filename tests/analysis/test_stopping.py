"""The race that a ledger decides, against one over the outcomes themselves."""

from __future__ import annotations

import numpy as np
import pytest

from tests.helpers.races import RUNS, SEED, begun, outcomes, raced
from tests.helpers.stored_cells import asks, fill, measure, row
from tracker.analysis.stopping import WITHIN, CandidateRace, CellRace
from tracker.core.answers import took
from tracker.core.errors import ExperimentError, WorkError
from tracker.core.extent import ALL, random_order, shuffled
from tracker.core.search_parts import SearchParts
from tracker.ledger.blocks import Block, turns
from tracker.ledger.cells import CellStore
from tracker.stats.stopping import SmallestMean


def race_of(store: CellStore, text: str, metric: str = "acc") -> CellRace:
    return CellRace(store, store.views.of(asks(metric=metric, until=text, seed=SEED)))


def test_a_single_task_is_the_race_over_its_outcomes(cell_of):
    sizes = {"arc_easy": 500}
    every, store = outcomes(sizes), cell_of(sizes)
    found = race_of(store, "top 1")
    assert found.lacking == (
        Block("arc_easy", 0, SEED),
        ("baseline", "layer:0", "layer:1", "layer:2", "layer:3"),
    )
    measured = measure(store, found, every)
    plain = raced(every, shuffled(SEED, {"arc_easy": range(500)}))
    assert found.race.bounds.low.tolist() == plain.bounds.low.tolist()
    assert found.race.bounds.high.tolist() == plain.bounds.high.tolist()
    assert found.race.standing.chosen.tolist() == [True, False, False, False]
    assert found.looked == plain.bounds.seen.max() < 500
    assert found.record().measured == found.record().looked == found.looked
    assert "looked at were" not in took(found.record())
    # Whoever was settled was measured no longer.
    assert measured == plain.bounds.seen.sum() + found.looked
    assert plain.bounds.seen.min() < found.looked


def test_candidates_leave_by_their_log_probability(cell_of):
    """As in the race over the same figures; a block lacks only those who are left."""
    store, names = cell_of({"arc_easy": 500}), ["baseline", *(f"head:1.{n}" for n in range(6))]
    heads = SearchParts("head", 4, per_layer=6)
    candidates = [heads.without([heads.of_layers([1])[n]]) for n in range(6)]
    draw = np.random.default_rng(2)
    lost = draw.normal([0.0, 0.4, 0.0, 0.3, 0.03, 0.5], 0.2, (500, 6)).clip(-1, 1)
    gold = np.float32(-2 - np.column_stack([np.zeros(500), lost]))
    view = store.views.of(asks())
    race, measured = CandidateRace(store, view, "gold_logprob", SEED, candidates, []), 0
    while race.lacking:
        block, lacking = race.lacking
        rows = [
            row(doc, name, said=(-1.5, float(gold[doc, names.index(name)])))
            for doc in store.documents(block, race.extent)
            for name in lacking
        ]
        store.write(block, rows, {"device": "cpu"})
        measured += len(rows)
        race.advance()
    plain = SmallestMean(500, 6, within=WITHIN)
    order = random_order(SEED, "arc_easy", range(500))
    drops = gold[order, :1].astype(float) - gold[order, 1:]
    while plain.open.any():
        plain.look(drops[plain.looked :][:32])
    assert race.deciding.seen.tolist() == plain.seen.tolist()
    assert plain.seen.min() == 128 < plain.seen.max()
    assert race.winners == np.flatnonzero(plain.chosen).tolist()
    assert drops.mean(axis=0)[race.winners[0]] <= drops.mean(axis=0).min() + WITHIN
    assert measured == plain.seen.sum() + race.looked
    assert CandidateRace(store, view, "gold_logprob", SEED, candidates, []).winners == race.winners


def test_a_document_without_a_right_answer_decides_no_race(cell_of):
    store = cell_of({"arc_easy": 70})
    head = SearchParts("head", 4, per_layer=6).without([6])
    for block in store.blocks(ALL):
        rows = [
            row(doc, name, gold=None)
            for doc in store.documents(block, ALL)
            for name in ("baseline", head.name)
        ]
        store.write(block, rows, {"device": "cpu"})
    with pytest.raises(WorkError, match=r"of arc_easy has no finite .* write rescoring: \{value"):
        CandidateRace(store, store.views.of(asks()), "gold_logprob", SEED, [head], [])


def test_a_block_is_taken_by_its_first_document():
    """And one can look up to the first document of the next one."""
    order = ["b", *33 * "a", "b", "a", "b"]
    taken = [(Block("b", 0, 7), 3, 1), (Block("a", 0, 7), 32, 33), (Block("a", 1, 7), 32, 37)]
    assert turns(order, {"a": 70, "b": 3}, 7) == taken


def test_killed_and_continued_it_is_the_same_race(cell_of):
    sizes = {"arc_easy": 500}
    every, store = outcomes(sizes), cell_of(sizes)
    measure(store, race_of(store, "top 1"), every, at_most=2)
    again = race_of(store, "top 1")
    assert again.looked == 64
    assert again.lacking[0].number == 2
    measure(store, again, every)
    third = race_of(store, "top 1")
    assert third.lacking is None
    assert third.race.bounds.low.tolist() == again.race.bounds.low.tolist()
    assert third.looked == again.looked


def test_two_that_take_turns_run_one_race(cell_of):
    sizes = {"arc_easy": 500}
    every, store, alone = outcomes(sizes), cell_of(sizes), cell_of(sizes, name="other")
    one, other = race_of(store, "prune 2"), race_of(store, "prune 2")
    measured = 0
    while one.lacking:
        measured += measure(store, one, every, at_most=1)
        other.advance()
        assert other.lacking == one.lacking
        measured += measure(store, other, every, at_most=1)
        one.advance()
    assert other.race.bounds.low.tolist() == one.race.bounds.low.tolist()
    single = race_of(alone, "prune 2")
    assert measure(alone, single, every) == measured
    assert single.race.bounds.high.tolist() == one.race.bounds.high.tolist()


def test_a_block_counts_only_when_all_before_it_are_there(cell_of):
    store = cell_of({"arc_easy": 500})
    later = Block("arc_easy", 3, SEED)
    found = race_of(store, "top 1")
    names = ["baseline", *(f"layer:{number}" for number in range(RUNS))]
    fill(store, later, store.documents(later, found.extent), names)
    found.advance()
    assert found.looked == 0
    assert found.lacking[0].number == 0


@pytest.mark.parametrize("by_size", [True, False])
def test_tasks_come_in_proportion_and_the_end_is_the_benchmarks_drop(by_size, cell_of):
    sizes = {"art": 300, "law": 100}
    every, store = outcomes(sizes), cell_of(sizes, weight_by_size=by_size)
    found = race_of(store, "drop within 0.01 pp")
    asked = []
    while found.lacking:
        asked.append(found.lacking[0].task)
        measure(store, found, every, at_most=1)
    assert asked.count("art") == 10
    assert 1 <= asked[:7].count("law") <= 3
    assert found.looked == found.population == 400
    drops = {
        task: np.mean([v[0] - v[1:] for (name, _), v in every.items() if name == task], axis=0)
        for task in sizes
    }
    share = 0.75 if by_size else 0.5
    exact = share * drops["art"] + (1 - share) * drops["law"]
    assert found.race.bounds.low == pytest.approx(exact, abs=1e-9)
    assert found.race.bounds.high == pytest.approx(exact, abs=1e-9)


def test_of_a_group_blocks_of_each_task_are_measured_and_less_is_looked_at(cell_of):
    sizes = {f"task{number}": 40 + number for number in range(6)}
    total, store = sum(sizes.values()), cell_of(sizes)
    found = race_of(store, "top 1")
    measure(store, found, outcomes(sizes))
    order = shuffled(SEED, {task: range(size) for task, size in sizes.items()})
    assert found.order == order
    answer = found.record()
    rows = store.read()["ablation"].value_counts()
    assert (
        answer.looked < answer.measured == rows["baseline"] == begun(order[: answer.looked], sizes)
    )
    # A stream without layer l leaves the intact one at l, and passes the 3 - l layers above.
    assert answer.passes == 4 * rows["baseline"] + sum(
        rows[f"layer:{number}"] * (3 - number) for number in range(RUNS)
    )
    assert answer.passes_of == total * (4 + 3 + 2 + 1 + 0)
    assert took(answer) == (
        f"{answer.measured} of {total} documents, {100 * answer.passes / answer.passes_of:.0f} % "
        f"of the layer passes; looked at were {answer.looked}, each task in proportion"
    )
    looks = np.array([0, 1, 2, 30, answer.looked, answer.looked + 1, total])
    assert found.measured_for(looks).tolist() == [begun(order[:n], sizes) for n in looks]


def test_what_no_outcomes_can_answer_is_refused(cell_of):
    store = cell_of({"arc_easy": 40})
    with pytest.raises(ExperimentError, match="'until': top 4 of 4 runs chooses nothing"):
        race_of(store, "top 4")
    with pytest.raises(ExperimentError, match="such as acc; word of arc_easy is none"):
        race_of(cell_of(metrics={"acc": "mean", "word": "ratio"}), "top 1", "word")
    every = {place: found * 2 for place, found in outcomes({"arc_easy": 40}).items()}
    with pytest.raises(WorkError, match="acc is 2 for a document of arc_easy"):
        measure(store, race_of(store, "top 1"), every)
