"""What a record says that rounding decides, from outcomes made by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.ledger.conftest import LAYERS, cell_record
from tracker.core.config import CellRequest
from tracker.core.documents import Document, DocumentText, Response
from tracker.core.records import CellRecord
from tracker.ledger.blocks import Block
from tracker.ledger.cells import CellStore
from tracker.ledger.outcomes import AGAIN, outcome_row
from tracker.ledger.texts import text_row
from tracker.stats.rounding import movement, shift, turning, within

NAMES = ("baseline", "layer:0")
DOCUMENTS, TWICE = 30, 6
REQUEST = CellRequest(model="m", benchmark="b", layers=(0,), limit=DOCUMENTS)


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
                for metric in ("acc", "acc_norm")
            }
            for doc in range(DOCUMENTS):
                count = 3 if doc % 5 == 0 else 4
                first, second = (
                    [Response(float(ll), False, 0) for ll in each[number, doc, :count]]
                    for each in (self.first, self.second)
                )
                found.append(
                    outcome_row(
                        Document("arc_easy", doc, (), int(self.gold[doc]), count),
                        name,
                        first,
                        {metric: float(right[doc]) for metric, right in judged.items()},
                        (5, [[1.0] * LAYERS] * 3) if name == "baseline" else None,
                        again=second if doc < TWICE else None,
                    )
                )
        return found

    def texts(self) -> list[dict[str, Any]]:
        said = []
        for doc, words in enumerate(self.words):
            count = 3 if doc % 5 == 0 else 4
            document = Document("arc_easy", doc, (), int(self.gold[doc]), count)
            said.append(text_row(document, DocumentText("?", words[:count]), True))
        return said


@pytest.fixture(scope="module")
def answers() -> Answers:
    return Answers()


@pytest.fixture
def half(ledger, model_identity, benchmark_identity) -> CellStore:
    metrics = {"acc": "mean", "acc_norm": "mean"}
    identity = benchmark_identity({"arc_easy": DOCUMENTS}, metrics)
    return ledger.cell(model_identity(dtype="bfloat16"), identity, {})


def record_of(store: CellStore, rows: list[dict[str, Any]], metric: str = "acc") -> CellRecord:
    store.write(Block("arc_easy", 0), rows, {})
    return cell_record(store, REQUEST, metric, lambda how, values: float(np.mean(values)))


@pytest.mark.parametrize("metric", ["acc", "acc_norm"])
def test_each_run_is_held_against_what_moved_in_it(half, answers, metric) -> None:
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


def test_an_older_shard_says_that_nothing_was_computed_twice(half, answers) -> None:
    rows = [{k: v for k, v in row.items() if k != AGAIN} for row in answers.rows()]
    assert refused(record_of(half, rows)) == "none of these documents was computed twice"


def test_lengths_that_are_not_known(half, answers) -> None:
    assert "lengths of options, which are not known" in refused(
        record_of(half, answers.rows(), "acc_norm")
    )


def test_a_second_time_that_is_the_first_to_the_last_bit_shows_no_rounding(half, answers) -> None:
    rows = answers.rows()
    for row in rows:
        if AGAIN in row:
            row[AGAIN] = row["loglikelihoods"]
    assert "came out the same, to the last bit" in refused(record_of(half, rows))


def test_a_metric_that_is_not_the_best_option(half, answers) -> None:
    rows = answers.rows()
    for row in rows:
        row["metric/acc"] = 1 - row["metric/acc"]
    assert refused(record_of(half, rows)) == "acc is not whether the best option is the gold one"


def test_open_answers_have_no_margin(half, answers) -> None:
    rows = answers.rows()
    for row in rows:
        row["choices"] = 0
    assert "no options" in refused(record_of(half, rows))


def test_one_model_alone_may_lack_it(half, answers) -> None:
    """The drop needs both."""
    rows = [row for row in answers.rows() if row["ablation"] == "baseline" or AGAIN not in row]
    rows += [
        {k: v for k, v in row.items() if k != AGAIN}
        for row in answers.rows()
        if row["ablation"] != "baseline" and AGAIN in row
    ]
    record = record_of(half, rows)
    (run,) = record.runs
    assert record.baseline_rounded is not None
    assert (run.rounded, run.drop_rounding) == (None, None)
    assert {"rounded", "drop_rounding"} <= {*run.reasons}


def test_single_precision_says_nothing_of_it(
    ledger, model_identity, benchmark_identity, answers
) -> None:
    identity = benchmark_identity({"arc_easy": DOCUMENTS}, {"acc": "mean", "acc_norm": "mean"})
    record = record_of(ledger.cell(model_identity(), identity, {}), answers.rows())
    assert "round" not in record.model_dump_json()
