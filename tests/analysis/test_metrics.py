"""Test choice probabilities of stored outcomes, against a softmax of one document at a time."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import product

import numpy as np
import pytest

from tests.helpers.stored_cells import (
    LAYERS,
    cell_record,
    layer_request,
    make_row,
    write_rows_to_blocks,
)
from tracker.analysis.comparable import comparison_key
from tracker.analysis.metrics import DocumentMetric
from tracker.analysis.stopping import CellRace
from tracker.benchmarks.benchmark import choose_metric
from tracker.ledger.cells import CellStore
from tracker.ledger.texts import text_row
from tracker.schema.documents import Document, DocumentText
from tracker.schema.errors import BenchmarkError, ExperimentError, WorkError
from tracker.schema.records import AnswerRecord

SIZE = 20
NAMES = ("baseline", *(f"layer:{layer}" for layer in range(LAYERS)))


def softmax(scores: Sequence[float], gold: int) -> float:
    weights = [math.exp(score) for score in scores]
    return weights[gold] / sum(weights)


def write_choices(
    store: CellStore, documents: int = SIZE, options: Sequence[int] = (4,), task: str = "arc_easy"
) -> dict[str, list[tuple[list[float], int]]]:
    """Write random scores of options; return them and the number of the right one by ablation."""
    generator = np.random.default_rng(5)
    written: dict[str, list[tuple[list[float], int]]] = {name: [] for name in NAMES}
    rows = []
    for doc in range(documents):
        count = options[doc % len(options)]
        gold = int(generator.integers(count))
        for name in NAMES:
            scores = generator.normal(-5, 2, count).astype(np.float32).tolist()
            written[name].append((scores, gold))
            acc = float(np.argmax(scores) == gold)
            row = make_row(doc, name, task, acc, loglikelihoods=scores, gold=gold)
            rows.append(row)
    write_rows_to_blocks(store, rows)
    return written


def request(**settings: object):
    return layer_request(limit=SIZE, **settings)


def mean_probability(outcomes: Sequence[tuple[Sequence[float], int]]) -> float:
    return sum(softmax(*outcome) for outcome in outcomes) / len(outcomes)


@pytest.mark.parametrize("options", [(4,), (2, 5, 3)])
def test_every_figure_is_the_softmax_of_single_documents(cell, options):
    written = write_choices(cell, options=options)
    record = cell_record(cell, request())
    by_choice = cell_record(cell, request(), metric="choice_probability")
    intact = mean_probability(written["baseline"])
    assert by_choice.baseline.value == pytest.approx(intact)
    assert record.baseline_metrics["choice_probability"] == pytest.approx(intact)
    for run, chosen in zip(record.runs, by_choice.runs, strict=True):
        level = mean_probability(written[run.ablation])
        assert run.metrics["choice_probability"] == pytest.approx(level)
        assert chosen.accuracy == pytest.approx(level)
        assert run.choice_drop.value == pytest.approx(intact - level)
        assert chosen.choice_drop == run.choice_drop
        assert chosen.drop.bounds == pytest.approx(run.choice_drop.bounds)
        pairs = zip(written["baseline"], written[run.ablation], strict=True)
        drops = [softmax(*a) - softmax(*b) for a, b in pairs]
        half_width = 2.093024 * np.std(drops, ddof=1) / math.sqrt(SIZE)  # t of 19, 97.5 %
        assert run.choice_drop.high - run.choice_drop.value == pytest.approx(half_width, rel=1e-5)


def test_a_group_weights_its_tasks_as_its_accuracy(cell_of):
    store = cell_of({"law": 20, "art": 10}, weight_by_size=False)
    law, art = (write_choices(store, n, task=t) for t, n in (("law", 20), ("art", 10)))
    record = cell_record(store, request(), metric="choice_probability")
    intact = (mean_probability(law["baseline"]) + mean_probability(art["baseline"])) / 2
    assert record.baseline.value == pytest.approx(intact)


def test_the_normalised_one_divides_by_bytes_like_lm_evals(cell_of):
    """As `choice_prob_norm` of lm-eval 0.5: exp(ll / (bytes · ln 2)), as a share of all options."""
    store = cell_of(metrics=("acc", "acc_norm"))
    written = write_choices(store)
    choices = ("no", "maybe", "Ω is not ASCII", "a longer answer")
    text = DocumentText("?", choices)
    documents = (Document("arc_easy", doc, (), 0, len(choices)) for doc in range(SIZE))
    store.texts.add("all", [text_row(document, text, True) for document in documents])
    lengths = [len(choice.encode()) * math.log(2) for choice in choices]
    record = cell_record(store, request(), metric="choice_probability_norm")
    expected = [
        softmax([ll / length for ll, length in zip(scores, lengths, strict=True)], gold)
        for scores, gold in written["baseline"]
    ]
    assert record.baseline.value == pytest.approx(sum(expected) / SIZE)
    assert {*record.baseline_metrics} == {
        *("acc", "acc_norm", "choice_probability", "choice_probability_norm")
    }


def test_unknown_lengths_are_a_reason(cell_of):
    store = cell_of(metrics=("acc", "acc_norm"))
    write_choices(store)
    record = cell_record(store, request(), metric="choice_probability_norm")
    assert record.baseline.value is None
    lengths = f"the lengths of options, which are unknown for {SIZE} documents"
    assert record.baseline.reason == f"choice_probability_norm divides by {lengths}"
    assert record.runs[0].drop.reason == record.baseline.reason
    assert record.runs[0].metrics["choice_probability_norm"] is None
    assert "metrics.choice_probability_norm" in record.runs[0].reasons


UNDEFINED: dict[str, Mapping[str, object]] = {
    "one option": {"loglikelihoods": (-1.0,), "gold": 0},
    "no option": {"loglikelihoods": (-1.0,), "gold": 0, "choices": 0},
    "no gold option": {"gold": None},
    "not a number": {"loglikelihoods": (-1.0, math.nan), "gold": 0},
    "all impossible": {"loglikelihoods": (-math.inf, -math.inf), "gold": 0},
}


@pytest.mark.parametrize("case", UNDEFINED)
def test_what_has_no_choice_is_undefined_with_a_reason(cell, case):
    rows = [make_row(doc, name) for doc in range(1, SIZE) for name in NAMES]
    rows += [make_row(0, name, **UNDEFINED[case]) for name in NAMES]  # type: ignore[arg-type]
    write_rows_to_blocks(cell, rows)
    record = cell_record(cell, request(), metric="choice_probability")
    assert record.baseline.value is None
    assert record.baseline.reason == f"1 of {SIZE} documents has no finite score"
    for run in record.runs:
        assert (run.drop.value, run.choice_drop.value) == (None, None)
        assert run.choice_drop.reason == f"1 of {SIZE} documents has no choice of finite scores"


def test_an_impossible_option_has_the_probability_0(cell):
    rows = [make_row(0, loglikelihoods=(-math.inf, -1.0), gold=0), make_row(1)]
    write_rows_to_blocks(cell, rows)
    values = DocumentMetric(cell, "choice_probability").values(cell.read())
    assert sorted(values) == pytest.approx([0, softmax((-1.5, -0.25), 1)])


def test_options_of_equal_text_share_the_probability(cell):
    write_rows_to_blocks(cell, [make_row(0, loglikelihoods=(-2.0, -2.0), gold=1)])
    assert DocumentMetric(cell, "choice_probability").values(cell.read()).tolist() == [0.5]


@pytest.mark.parametrize(
    "task",
    [
        {"has_options": False},
        {"metrics": {"exact_match": "mean"}},
        {"metrics": {"acc": "mean", "perplexity": "perplexity"}},
        {"metrics": {"acc": "ratio", "loss": "ratio"}},
    ],
)
def test_it_is_no_metric_where_nothing_is_chosen(cell_of, task):
    benchmark = cell_of(task=task).identity.benchmark
    with pytest.raises(BenchmarkError, match="has no metric 'choice_probability'"):
        choose_metric(benchmark, "choice_probability")


def test_a_task_of_options_without_an_accuracy_has_it(cell_of):
    task = {"metrics": {"mcc": "matthews_corrcoef"}, "has_options": True}
    benchmark = cell_of(task=task).identity.benchmark
    assert choose_metric(benchmark, "choice_probability") == "choice_probability"
    with pytest.raises(BenchmarkError, match="choose choice_probability"):
        choose_metric(benchmark, "mcc")


def test_a_question_is_answered_by_it_sooner(cell_of):
    """Layers cost the right option some of its probability, and seldom the right answer."""
    costs = {"baseline": 0.0, "layer:0": 3.0, "layer:1": 1.0, "layer:2": 0.5, "layer:3": 0.0}
    generator = np.random.default_rng(3)
    truth = generator.normal(0, 2, (1280, 4)) + np.array([1.5, 0, 0, 0])

    def answer(metric: str) -> AnswerRecord:
        store = cell_of({f"by_{metric}": 1280}, name=f"by_{metric}")
        until = layer_request(until="top 1 within 5 pp", metric=metric, seed=7)
        race = CellRace(store, store.views.view_of(until))
        while race.next_block:
            block, names = race.next_block
            missing = store.missing_outcomes(block, race.extent, list(names))
            rows = []
            for absent_names, documents in missing.items():
                for doc, name in product(documents, absent_names):
                    scores = truth[doc] - np.array([costs[name], 0, 0, 0])
                    acc = float(scores.argmax() == 0)
                    rows.append(make_row(doc, name, block.task, acc, loglikelihoods=scores, gold=0))
            store.write(block, rows, {})
            race.advance()
        return race.record()

    by_accuracy, by_choice = answer("acc"), answer("choice_probability")
    for record in (by_accuracy, by_choice):
        assert record.answered
        assert [run.chosen for run in record.runs] == [True, False, False, False]
    assert by_choice.passes < by_accuracy.passes


def test_a_question_reads_the_texts_of_blocks_that_come_later(cell_of):
    """A block's texts are stored when it is measured, so the first ones are not all."""
    store = cell_of({"arc_easy": 96}, metrics=("acc", "acc_norm"))
    until = layer_request(until="drop within 1 pp", metric="choice_probability_norm", seed=7)
    race = CellRace(store, store.views.view_of(until))
    generator = np.random.default_rng(3)
    while race.next_block:
        block, names = race.next_block
        missing = store.missing_outcomes(block, race.extent, list(names))
        documents = sorted({doc for docs in missing.values() for doc in docs})
        rows = [
            make_row(doc, name, loglikelihoods=generator.normal(-5, 2, 2).tolist())
            for doc, name in product(documents, names)
        ]
        texts = (Document("arc_easy", doc, (), 0, 2) for doc in documents)
        text = DocumentText("?", ("yes", "perhaps"))
        store.texts.add(block.name, [text_row(document, text, True) for document in texts])
        store.write(block, rows, {})
        race.advance()
    assert race.looked == 96


def test_a_question_needs_known_lengths(cell_of):
    store = cell_of({"arc_easy": 20}, metrics=("acc", "acc_norm"))
    write_choices(store)
    until = layer_request(until="top 1", metric="choice_probability_norm", seed=7)
    with pytest.raises(WorkError, match="lengths of options, which are unknown for 20 documents"):
        CellRace(store, store.views.view_of(until))


def test_a_question_needs_a_bounded_metric(cell_of):
    store = cell_of(metrics={"words": "perplexity", "acc": "mean"})
    view = store.views.view_of(layer_request(until="top 1", metric="words"))
    with pytest.raises(ExperimentError, match="'until' needs a metric"):
        CellRace(store, view)


def test_a_former_identity_is_compared_with_a_new_one(cell):
    """Cells of former versions do not record whether a task has options."""
    write_choices(cell)
    record = cell_record(cell, request())
    task = record.benchmark.tasks[0].model_copy(update={"has_options": True})
    other = record.model_copy(
        update={"benchmark": record.benchmark.model_copy(update={"tasks": (task,)})}
    )
    assert comparison_key(record) == comparison_key(other)
