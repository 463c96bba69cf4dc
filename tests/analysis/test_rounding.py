"""Test a record's figures of rounding on hand-made outcomes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.helpers.stored_cells import Row, asks, cell_record, row
from tracker.core.documents import Document, DocumentText
from tracker.core.records import CellRecord
from tracker.ledger.blocks import Block
from tracker.ledger.cells import CellStore
from tracker.ledger.outcomes import AGAIN
from tracker.ledger.texts import text_row
from tracker.stats.decisions import movement, shift, turning, within

NAMES = ("baseline", "layer:0")
DOCUMENTS, TWICE = 30, 6
METRICS = ("acc", "acc_norm")


def count(doc: int) -> int:
    """Return the number of options of a document."""
    return 3 if doc % 5 == 0 else 4


class Answers:
    """Log-likelihoods of three or four options, twice; one run moves more than the other."""

    def __init__(self) -> None:
        draw = np.random.default_rng(3)
        shape = (len(NAMES), DOCUMENTS, 4)
        self.first = draw.normal(-8, 1, shape).astype(np.float32).astype(float)
        far = np.array([0.01, 0.05])[:, None, None]
        self.second = (self.first * (1 + far * draw.normal(size=shape))).astype(np.float32)
        self.first[:, ::5, 3] = self.second[:, ::5, 3] = np.nan
        self.gold = draw.integers(3, size=DOCUMENTS)
        self.words = [tuple("x" * n for n in draw.integers(1, 9, 4)) for _ in range(DOCUMENTS)]

    def scores(self, number: int, divided: bool, second: bool = False) -> np.ndarray:
        found = (self.second if second else self.first)[number].astype(float)
        lengths = np.array([[len(word) for word in words] for words in self.words])
        return found / lengths if divided else found

    def rows(self) -> list[dict[str, Any]]:
        found = []
        for number, name in enumerate(NAMES):
            judged = {
                metric: np.nanargmax(self.scores(number, metric == "acc_norm"), axis=1) == self.gold
                for metric in METRICS
            }
            for doc in range(DOCUMENTS):
                first, second = (x[number, doc, : count(doc)] for x in (self.first, self.second))
                metrics = {metric: float(right[doc]) for metric, right in judged.items()}
                again = second if doc < TWICE else None
                gold = int(self.gold[doc])
                found.append(row(doc, name, metrics=metrics, said=first, gold=gold, again=again))
        return found

    def texts(self) -> list[dict[str, Any]]:
        said = []
        for doc, words in enumerate(self.words):
            document = Document("arc_easy", doc, (), None, 0)
            said.append(text_row(document, DocumentText("?", words[: count(doc)]), True))
        return said


@pytest.fixture(scope="module")
def answers() -> Answers:
    return Answers()


@pytest.fixture
def half(cell_of) -> CellStore:
    return cell_of({"arc_easy": DOCUMENTS}, METRICS, {"dtype": "bfloat16"})


def record_of(store: CellStore, rows: list[dict[str, Any]], metric: str = "acc") -> CellRecord:
    store.write(Block("arc_easy", 0), rows, {})
    return cell_record(store, asks(0, limit=DOCUMENTS), metric)


@pytest.mark.parametrize("metric", ["acc", "acc_norm"])
def test_each_run_is_held_against_what_moved_in_it(half, answers, metric):
    half.texts.add("arc_easy.0", answers.texts())
    record = record_of(half, answers.rows(), metric)
    weights, chances = np.full(DOCUMENTS, 1 / DOCUMENTS), []
    for number in range(len(NAMES)):
        one, other = (answers.scores(number, metric == "acc_norm", second) for second in (0, 1))
        moved = movement(one[:TWICE], other[:TWICE])
        chances.append(turning(one, answers.gold.astype(float), moved))
    (run,) = record.runs
    base, mine = chances
    assert record.baseline_rounded == within(base)
    assert record.baseline_rounding == pytest.approx(shift(base, weights), rel=1e-5)
    assert run.rounded == within(mine)
    assert 0 < record.baseline_rounded < run.rounded < DOCUMENTS
    both = np.hypot(shift(base, weights), shift(mine, weights))
    assert run.drop_rounding == pytest.approx(both, rel=1e-5)
    assert not {"rounded", "drop_rounding"} & {*run.reasons, *record.reasons}


def refused(record: CellRecord) -> str:
    """Why nothing is said, which is the same for the cell and its run."""
    (run,) = record.runs
    figures = (record.baseline_rounded, record.baseline_rounding, run.rounded, run.drop_rounding)
    assert figures == (None,) * 4
    reasons = (record.reasons["baseline_rounded"], run.reasons["rounded"])
    (why,) = {*reasons, run.reasons["drop_rounding"]}
    return why


def test_lengths_that_are_not_known(half, answers):
    assert "lengths of options, which are not known" in refused(
        record_of(half, answers.rows(), "acc_norm")
    )


def the_same(row: Row) -> Row:
    return row | ({AGAIN: row["loglikelihoods"]} if AGAIN in row else {})


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (
            lambda row: {name: value for name, value in row.items() if name != AGAIN},
            "none of these documents was computed twice",
        ),
        (the_same, "what was computed twice came out the same, to the last bit"),
        (
            lambda row: row | {"metric/acc": 1 - row["metric/acc"]},
            "acc is not whether the best option is the gold one",
        ),
        (lambda row: row | {"choices": 0}, "there are no options that a margin could lie between"),
    ],
    ids=["of an older shard", "to the last bit", "another metric", "open answers"],
)
def test_what_shows_no_rounding_says_why(half, answers, change, why):
    assert refused(record_of(half, [change(each) for each in answers.rows()])) == why


def test_single_precision_says_nothing_of_it(cell_of, answers):
    record = record_of(cell_of({"arc_easy": DOCUMENTS}, METRICS), answers.rows())
    assert "round" not in record.model_dump_json()
