"""The race that a ledger decides, against one over the outcomes themselves."""

from __future__ import annotations

import numpy as np
import pytest

from tests.helpers.races import N_RUNS, SEED, count_started, draw_outcomes, run_race
from tests.helpers.stored_cells import fill_block, layer_request, make_row, measure_race
from tracker.analysis.stopping import LOGPROB_TOLERANCE, CandidateRace, CellRace
from tracker.ledger.blocks import Block, schedule_blocks
from tracker.ledger.cells import CellStore
from tracker.schema.answers import answer_cost
from tracker.schema.errors import ExperimentError, WorkError
from tracker.schema.extent import ALL_DOCUMENTS, random_order, shuffle_documents
from tracker.schema.search_parts import SearchParts
from tracker.stats.stopping import SmallestMean


def race_of(store: CellStore, text: str, metric: str = "acc") -> CellRace:
    return CellRace(store, store.views.view_of(layer_request(metric=metric, until=text, seed=SEED)))


def test_a_single_task_is_the_race_over_its_outcomes(cell_of):
    sizes = {"arc_easy": 500}
    answers, store = draw_outcomes(sizes), cell_of(sizes)
    stored = race_of(store, "top 1")
    assert stored.next_block == (
        Block("arc_easy", 0, SEED),
        ("baseline", "layer:0", "layer:1", "layer:2", "layer:3"),
    )
    n_measured = measure_race(store, stored, answers)
    naive = run_race(answers, shuffle_documents(SEED, {"arc_easy": range(500)}))
    assert stored.race.bounds.low.tolist() == naive.bounds.low.tolist()
    assert stored.race.bounds.high.tolist() == naive.bounds.high.tolist()
    assert stored.race.chosen.tolist() == [True, False, False, False]
    assert stored.looked == naive.bounds.seen.max() < 500
    assert stored.record().measured == stored.record().looked == stored.looked
    assert "were evaluated" not in answer_cost(stored.record())
    # Whoever was settled was measured no longer.
    assert n_measured == naive.bounds.seen.sum() + stored.looked
    assert naive.bounds.seen.min() < stored.looked


def test_candidates_leave_by_their_log_probability(cell_of):
    """As in the race over the same figures; a block lacks only those who are left."""
    store, names = cell_of({"arc_easy": 500}), ["baseline", *(f"head:1.{n}" for n in range(6))]
    heads = SearchParts("head", 4, per_layer=6)
    candidates = [heads.removal([heads.parts_of_layers([1])[n]]) for n in range(6)]
    rng = np.random.default_rng(2)
    losses = rng.normal([0.0, 0.4, 0.0, 0.3, 0.03, 0.5], 0.2, (500, 6)).clip(-1, 1)
    gold = np.float32(-2 - np.column_stack([np.zeros(500), losses]))
    view = store.views.view_of(layer_request())
    race, n_measured = CandidateRace(store, view, "gold_logprob", SEED, candidates, []), 0
    while race.next_block:
        block, missing_names = race.next_block
        rows = [
            make_row(doc, name, loglikelihoods=(-1.5, float(gold[doc, names.index(name)])))
            for doc in store.documents(block, race.extent)
            for name in missing_names
        ]
        store.write(block, rows, {"device": "cpu"})
        n_measured += len(rows)
        race.advance()
    naive = SmallestMean(500, 6, tolerance=LOGPROB_TOLERANCE)
    order = random_order(SEED, "arc_easy", range(500))
    drops = gold[order, :1].astype(float) - gold[order, 1:]
    while naive.open.any():
        naive.update(drops[naive.looked :][:32])
    assert race.rule.seen.tolist() == naive.seen.tolist()
    assert naive.seen.min() == 128 < naive.seen.max()
    assert race.winners == np.flatnonzero(naive.chosen).tolist()
    assert drops.mean(axis=0)[race.winners[0]] <= drops.mean(axis=0).min() + LOGPROB_TOLERANCE
    assert n_measured == naive.seen.sum() + race.looked
    assert CandidateRace(store, view, "gold_logprob", SEED, candidates, []).winners == race.winners


def test_a_document_without_a_right_answer_decides_no_race(cell_of):
    store = cell_of({"arc_easy": 70})
    head = SearchParts("head", 4, per_layer=6).removal([6])
    for block in store.blocks(ALL_DOCUMENTS):
        rows = [
            make_row(doc, name, gold=None)
            for doc in store.documents(block, ALL_DOCUMENTS)
            for name in ("baseline", head.name)
        ]
        store.write(block, rows, {"device": "cpu"})
    with pytest.raises(WorkError, match=r"of arc_easy has no finite .* write rescoring: \{value"):
        CandidateRace(store, store.views.view_of(layer_request()), "gold_logprob", SEED, [head], [])


def test_a_block_is_taken_by_its_first_document():
    """And one can look up to the first document of the next one."""
    order = ["b", *33 * "a", "b", "a", "b"]
    expected = [(Block("b", 0, 7), 3, 1), (Block("a", 0, 7), 32, 33), (Block("a", 1, 7), 32, 37)]
    assert schedule_blocks(order, {"a": 70, "b": 3}, 7) == expected


def test_killed_and_continued_it_is_the_same_race(cell_of):
    sizes = {"arc_easy": 500}
    answers, store = draw_outcomes(sizes), cell_of(sizes)
    measure_race(store, race_of(store, "top 1"), answers, max_blocks=2)
    second_race = race_of(store, "top 1")
    assert second_race.looked == 64
    assert second_race.next_block[0].number == 2
    measure_race(store, second_race, answers)
    third_race = race_of(store, "top 1")
    assert third_race.next_block is None
    assert third_race.race.bounds.low.tolist() == second_race.race.bounds.low.tolist()
    assert third_race.looked == second_race.looked


def test_two_that_take_turns_run_one_race(cell_of):
    sizes = {"arc_easy": 500}
    answers, store, other_store = draw_outcomes(sizes), cell_of(sizes), cell_of(sizes, name="other")
    first_race, second_race = race_of(store, "prune 2"), race_of(store, "prune 2")
    n_measured = 0
    while first_race.next_block:
        n_measured += measure_race(store, first_race, answers, max_blocks=1)
        second_race.advance()
        assert second_race.next_block == first_race.next_block
        n_measured += measure_race(store, second_race, answers, max_blocks=1)
        first_race.advance()
    assert second_race.race.bounds.low.tolist() == first_race.race.bounds.low.tolist()
    single = race_of(other_store, "prune 2")
    assert measure_race(other_store, single, answers) == n_measured
    assert single.race.bounds.high.tolist() == first_race.race.bounds.high.tolist()


def test_a_block_counts_only_when_all_before_it_are_there(cell_of):
    store = cell_of({"arc_easy": 500})
    block = Block("arc_easy", 3, SEED)
    race = race_of(store, "top 1")
    names = ["baseline", *(f"layer:{number}" for number in range(N_RUNS))]
    fill_block(store, block, store.documents(block, race.extent), names)
    race.advance()
    assert race.looked == 0
    assert race.next_block[0].number == 0


@pytest.mark.parametrize("by_size", [True, False])
def test_tasks_come_in_proportion_and_the_end_is_the_benchmarks_drop(by_size, cell_of):
    sizes = {"art": 300, "law": 100}
    answers, store = draw_outcomes(sizes), cell_of(sizes, weight_by_size=by_size)
    race = race_of(store, "drop within 0.01 pp")
    tasks = []
    while race.next_block:
        tasks.append(race.next_block[0].task)
        measure_race(store, race, answers, max_blocks=1)
    assert tasks.count("art") == 10
    assert 1 <= tasks[:7].count("law") <= 3
    assert race.looked == race.population == 400
    drops = {
        task: np.mean([v[0] - v[1:] for (name, _), v in answers.items() if name == task], axis=0)
        for task in sizes
    }
    share = 0.75 if by_size else 0.5
    exact = share * drops["art"] + (1 - share) * drops["law"]
    assert race.race.bounds.low == pytest.approx(exact, abs=1e-9)
    assert race.race.bounds.high == pytest.approx(exact, abs=1e-9)


def test_of_a_group_blocks_of_each_task_are_measured_and_less_is_looked_at(cell_of):
    sizes = {f"task{number}": 40 + number for number in range(6)}
    total, store = sum(sizes.values()), cell_of(sizes)
    race = race_of(store, "top 1")
    measure_race(store, race, draw_outcomes(sizes))
    order = shuffle_documents(SEED, {task: range(size) for task, size in sizes.items()})
    assert race.order == order
    answer = race.record()
    rows = store.read()["ablation"].value_counts()
    assert answer.looked < answer.measured == rows["baseline"]
    assert answer.measured == count_started(order[: answer.looked], sizes)
    # A stream without layer l leaves the intact one at l, and passes the 3 - l layers above.
    assert answer.passes == 4 * rows["baseline"] + sum(
        rows[f"layer:{number}"] * (3 - number) for number in range(N_RUNS)
    )
    assert answer.passes_of == total * (4 + 3 + 2 + 1 + 0)
    assert answer_cost(answer) == (
        f"{answer.measured} of {total} documents, {100 * answer.passes / answer.passes_of:.0f} % "
        f"of the layer passes; the stopping rule used {answer.looked} of these documents, with "
        "each task in proportion to its size"
    )
    counts = np.array([0, 1, 2, 30, answer.looked, answer.looked + 1, total])
    expected = [count_started(order[:n], sizes) for n in counts]
    assert race.measured_documents(counts).tolist() == expected


def test_what_no_outcomes_can_answer_is_refused(cell_of):
    store = cell_of({"arc_easy": 40})
    with pytest.raises(ExperimentError, match="the question 'top 4' needs at least 5 runs"):
        race_of(store, "top 4")
    with pytest.raises(ExperimentError, match="such as acc; word of arc_easy is not such a metric"):
        race_of(cell_of(metrics={"acc": "mean", "word": "ratio"}), "top 1", "word")
    doubled = {document: values * 2 for document, values in draw_outcomes({"arc_easy": 40}).items()}
    with pytest.raises(WorkError, match="acc is 2 for a document of arc_easy"):
        measure_race(store, race_of(store, "top 1"), doubled)
