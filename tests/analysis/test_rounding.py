"""Test a record's figures of rounding on hand-made outcomes."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import pytest

from tests.helpers.stored_cells import Row, cell_record, layer_request, make_row
from tracker.ledger.blocks import Block
from tracker.ledger.cells import CellStore
from tracker.ledger.outcomes import REPEATED_COLUMN
from tracker.ledger.texts import text_row
from tracker.schema.documents import Document, DocumentText
from tracker.schema.records import CellRecord
from tracker.stats.decisions import (
    count_undecided,
    flip_probabilities,
    relative_rounding_error,
    rounding_shift,
)

NAMES = ("baseline", "layer:0")
DOCUMENTS, TWICE = 30, 6
METRICS = ("acc", "acc_norm")


def count_options(doc: int) -> int:
    """Return the number of options of a document."""
    return 3 if doc % 5 == 0 else 4


class Answers:
    """Log-likelihoods of three or four options, twice; one run moves more than the other."""

    def __init__(self) -> None:
        rng = np.random.default_rng(3)
        shape = (len(NAMES), DOCUMENTS, 4)
        self.first = rng.normal(-8, 1, shape).astype(np.float32).astype(float)
        noise = np.array([0.01, 0.05])[:, None, None]
        self.second = (self.first * (1 + noise * rng.normal(size=shape))).astype(np.float32)
        self.first[:, ::5, 3] = self.second[:, ::5, 3] = np.nan
        self.tables = self.first, self.second
        self.gold = rng.integers(3, size=DOCUMENTS)
        self.words = [tuple("x" * n for n in rng.integers(1, 9, 4)) for _ in range(DOCUMENTS)]

    def scores(self, model: int, metric: str, is_second: bool = False) -> np.ndarray:
        table = (self.second if is_second else self.first)[model].astype(float)
        lengths = np.array([[len(word) for word in words] for words in self.words])
        return table / lengths if metric == "acc_norm" else table

    def rows(self) -> list[dict[str, Any]]:
        rows = []
        for (model, name), doc in product(enumerate(NAMES), range(DOCUMENTS)):
            first, second = (table[model, doc, : count_options(doc)] for table in self.tables)
            metrics = {
                metric: float(np.nanargmax(self.scores(model, metric)[doc]) == self.gold[doc])
                for metric in METRICS
            }
            fields = {"gold": int(self.gold[doc]), "second_lls": second if doc < TWICE else None}
            rows.append(make_row(doc, name, metrics=metrics, loglikelihoods=first, **fields))
        return rows

    def texts(self) -> list[dict[str, Any]]:
        rows = []
        for doc, words in enumerate(self.words):
            document = Document("arc_easy", doc, (), None, 0)
            rows.append(text_row(document, DocumentText("?", words[: count_options(doc)]), True))
        return rows


@pytest.fixture(scope="module")
def answers() -> Answers:
    return Answers()


@pytest.fixture
def half(cell_of) -> CellStore:
    return cell_of({"arc_easy": DOCUMENTS}, METRICS, {"dtype": "bfloat16"})


def record_of(store: CellStore, rows: list[dict[str, Any]], metric: str = "acc") -> CellRecord:
    store.write(Block("arc_easy", 0), rows, {})
    return cell_record(store, layer_request(0, limit=DOCUMENTS), metric)


@pytest.mark.parametrize("metric", ["acc", "acc_norm"])
def test_each_run_is_held_against_what_moved_in_it(half, answers, metric):
    half.texts.add("arc_easy.0", answers.texts())
    record = record_of(half, answers.rows(), metric)
    weights, chances = np.full(DOCUMENTS, 1 / DOCUMENTS), []
    for model in range(len(NAMES)):
        scores, repeated = (answers.scores(model, metric, second) for second in (False, True))
        movement = relative_rounding_error(scores[:TWICE], repeated[:TWICE])
        chances.append(flip_probabilities(scores, answers.gold.astype(float), movement))
    (run,) = record.runs
    baseline, ablated = chances
    assert record.baseline_rounded == count_undecided(baseline)
    assert record.baseline_rounding == pytest.approx(rounding_shift(baseline, weights), rel=1e-5)
    assert run.rounded == count_undecided(ablated)
    assert 0 < record.baseline_rounded < run.rounded < DOCUMENTS
    expected = np.hypot(rounding_shift(baseline, weights), rounding_shift(ablated, weights))
    assert run.drop_rounding == pytest.approx(expected, rel=1e-5)
    assert not {"rounded", "drop_rounding"} & {*run.reasons, *record.reasons}


def missing_reason(record: CellRecord) -> str:
    """Return why no rounding is known, which is the same for the cell and its run."""
    (run,) = record.runs
    figures = (record.baseline_rounded, record.baseline_rounding, run.rounded, run.drop_rounding)
    assert figures == (None,) * 4
    reasons = record.reasons["baseline_rounded"], run.reasons["rounded"]
    (reason,) = {*reasons, run.reasons["drop_rounding"]}
    return reason


def test_lengths_that_are_not_known(half, answers):
    record = record_of(half, answers.rows(), "acc_norm")
    assert "lengths of options, which are unknown" in missing_reason(record)


def repeat_exactly(row: Row) -> Row:
    return row | ({REPEATED_COLUMN: row["loglikelihoods"]} if REPEATED_COLUMN in row else {})


def drop_repeats(row: Row) -> Row:
    return {name: value for name, value in row.items() if name != REPEATED_COLUMN}


def invert_accuracy(row: Row) -> Row:
    return row | {"metric/acc": 1 - row["metric/acc"]}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (drop_repeats, "rounding errors are unknown, because no document was evaluated twice"),
        (repeat_exactly, "repeated computations gave exactly the same values"),
        (invert_accuracy, "acc is not the accuracy of the option with the highest score"),
        (lambda row: row | {"choices": 0}, "the documents have no answer options"),
    ],
)
def test_what_shows_no_rounding_says_why(half, answers, change, reason):
    assert missing_reason(record_of(half, [change(row) for row in answers.rows()])) == reason


def test_single_precision_says_nothing_of_it(cell_of, answers):
    record = record_of(cell_of({"arc_easy": DOCUMENTS}, METRICS), answers.rows())
    assert "round" not in record.model_dump_json()
