"""Test the decisions of runs against a second computation from the same hand-made outcomes."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import product

import numpy as np
import pytest

from tests.helpers.stored_cells import asks, row, write_all
from tracker.analysis.decisions import Decisions, decisions, decisions_record
from tracker.core.decision_records import DecisionsRecord
from tracker.core.documents import Document, DocumentText
from tracker.core.views import View
from tracker.ledger.blocks import Block
from tracker.ledger.cells import CellStore
from tracker.ledger.texts import text_row

LAYERS = 4
SIZES = {"geography": 40, "history": 9}
NAMES = ["baseline", *(f"layer:{layer}" for layer in range(LAYERS))]
METRICS = ("acc", "acc_norm")
DRAW = np.random.default_rng(11)


class Study:
    """Outcomes of two tasks under every layer, drawn once: what each document was answered."""

    def __init__(self, open_answers: bool = False) -> None:
        self.answers: dict[tuple[str, int, str], list[float]] = {}
        self.texts: dict[tuple[str, int], DocumentText] = {}
        self.gold: dict[tuple[str, int], int] = {}
        for task, size in SIZES.items():
            for doc in range(size):
                count = 1 if open_answers else int(DRAW.integers(2, 6))
                self.gold[task, doc] = int(DRAW.integers(count))
                words = tuple("x" * int(DRAW.integers(1, 9)) for _ in range(count))
                choices = () if open_answers else words
                answer = words[0] if open_answers else None
                self.texts[task, doc] = DocumentText(f"{task} {doc}?", choices, answer)
                for name in NAMES:
                    # As a shard holds them: 32 bits.
                    drawn = DRAW.normal(-5, 2, count).astype(np.float32)
                    self.answers[task, doc, name] = [float(one) for one in drawn]
        self.open = open_answers

    def score(self, place: tuple[str, int], name: str, metric: str) -> float:
        scores = self.scores(place, name, metric)
        if self.open:
            return float(scores[0] > -5)
        return float(int(np.argmax(scores)) == self.gold[place])

    def scores(self, place: tuple[str, int], name: str, metric: str) -> list[float]:
        found = self.answers[(*place, name)]
        if metric != "acc_norm" or self.open:
            return found
        return [x / len(c) for x, c in zip(found, self.texts[place].choices, strict=True)]

    def write(self, store: CellStore, texts: bool = True) -> None:
        rows = []
        for (task, doc), name in product(self.texts, NAMES):
            metrics = {m: self.score((task, doc), name, m) for m in METRICS}
            about = {"gold": self.gold[task, doc], "choices": 0 if self.open else None}
            said = self.answers[task, doc, name]
            rows.append(row(doc, name, task, metrics=metrics, said=said, **about))
        write_all(store, rows)
        for (task, doc), text in self.texts.items() if texts else ():
            document = Document(task, doc, (), None, 0)
            store.texts.add(Block(task, doc // 32).name, [text_row(document, text, True)])


@pytest.fixture
def two_tasks(cell_of) -> CellStore:
    return cell_of(SIZES, METRICS, name="subjects")


def view(store: CellStore, metric: str = "acc") -> View:
    return store.views.of(asks(metric=metric))


def changed(study: Study, metric: str, name: str) -> Mapping[str, set[tuple[str, int]]]:
    """Return the documents that are lost and won, by a plain loop."""
    found: dict[str, set[tuple[str, int]]] = {"lost": set(), "won": set()}
    for place in study.texts:
        before = study.score(place, "baseline", metric)
        after = study.score(place, name, metric)
        if before != after:
            found["lost" if after < before else "won"].add(place)
    return found


class TestDecisions:
    @pytest.mark.parametrize("metric", ["acc", "acc_norm"])
    def test_each_figure_is_that_of_a_plain_loop(self, two_tasks, metric):
        study = Study()
        study.write(two_tasks)
        found = decisions(two_tasks, view(two_tasks, metric))
        assert [text.text for text in found.texts] == [study.texts[p] for p in found.documents]
        assert set(found.documents) == set(study.texts)
        assert (found.binary, found.public, found.reasons) == (True, True, {})
        every = [("baseline", found.baseline), *((f"layer:{r.layer}", d) for r, d in found.runs)]
        assert [name for name, _ in every] == NAMES
        for name, decided in every:
            for number, place in enumerate(found.documents):
                scores = study.scores(place, name, metric)
                gold = study.gold[place]
                best = max(score for option, score in enumerate(scores) if option != gold)
                assert decided.margin[number] == pytest.approx(scores[gold] - best)
                assert decided.choice[number] == int(np.argmax(scores))
                assert decided.score[number] == study.score(place, name, metric)
            if name != "baseline":
                wanted = changed(study, metric, name)
                lost, won = found.lost(decided), found.won(decided)
                assert {found.documents[n] for n in np.nonzero(lost)[0]} == wanted["lost"]
                assert {found.documents[n] for n in np.nonzero(won)[0]} == wanted["won"]

    def test_without_texts_only_what_needs_lengths_is_lost(self, two_tasks):
        study = Study()
        assert decisions(two_tasks, view(two_tasks)) is None, "nothing is measured"
        study.write(two_tasks, texts=False)
        plain = decisions(two_tasks, view(two_tasks, "acc"))
        assert plain.reasons == {"texts": "what the documents say is not kept here"}
        assert not np.isnan(plain.baseline.margin).any()
        divided = decisions(two_tasks, view(two_tasks, "acc_norm"))
        assert np.isnan(divided.baseline.margin).all()
        assert divided.reasons["margin"] == (
            "acc_norm divides by the lengths of options, which are not known of 49 documents"
        )

    def test_open_answers_have_no_options(self, two_tasks):
        study = Study(open_answers=True)
        study.write(two_tasks)
        found = decisions(two_tasks, view(two_tasks))
        assert found.options == 0
        assert np.isnan(found.gold).all()
        assert "stands for it" in found.reasons["margin"]
        for number, place in enumerate(found.documents):
            assert found.baseline.margin[number] == study.answers[(*place, "baseline")][0]

    def test_a_loss_is_lost_where_it_grows(self, cell_of):
        store = cell_of(SIZES, METRICS, task={"higher_is_better": {"acc": False}})
        study = Study()
        study.write(store)
        found = decisions(store, view(store))
        (_, first), *_ = found.runs
        wanted = changed(study, "acc", "layer:0")
        assert {found.documents[n] for n in np.nonzero(found.lost(first))[0]} == wanted["won"]
        assert not found.binary
        assert decisions_record(found).both == ()


class TestRecord:
    @pytest.fixture
    def found(self, two_tasks) -> Decisions:
        self.study = Study()
        self.study.write(two_tasks)
        return decisions(two_tasks, view(two_tasks))

    def test_it_counts_all_and_names_those_whose_margin_changes_most(self, found):
        record = decisions_record(found, shown=3)
        assert record.n == 49
        right = [p for p in self.study.texts if self.study.score(p, "baseline", "acc")]
        assert record.right == len(right)
        for run, (_, decided) in zip(record.runs, found.runs, strict=True):
            wanted = changed(self.study, "acc", f"layer:{run.run.layer}")
            assert (run.lost, run.won) == (len(wanted["lost"]), len(wanted["won"]))
            place = {p: n for n, p in enumerate(found.documents)}
            change = decided.margin - found.baseline.margin
            lost, won = run.named[: run.named_lost], run.named[run.named_lost :]
            for named, kind, sign in ((lost, "lost", 1), (won, "won", -1)):
                shown = [record.documents[one.document] for one in named]
                truth = sorted(wanted[kind], key=lambda p: sign * change[place[p]])[:3]
                assert [(one.task, one.doc) for one in shown] == truth
                for one, doc in zip(named, shown, strict=True):
                    number = place[doc.task, doc.doc]
                    assert doc.question == self.study.texts[doc.task, doc.doc].question
                    assert doc.choices == self.study.texts[doc.task, doc.doc].choices
                    assert doc.gold == self.study.gold[doc.task, doc.doc]
                    assert one.choice == decided.choice[number]
                    assert one.margin == pytest.approx(decided.margin[number], rel=1e-3)
                    assert doc.margin == pytest.approx(found.baseline.margin[number], rel=1e-3)

    def test_options_margins_and_what_two_layers_lose_are_of_all_documents(self, found):
        record = decisions_record(found, shown=1)
        for shares, taken in (
            (record.options, found.baseline.choice.tolist()),
            (record.gold, list(self.study.gold.values())),
        ):
            assert shares == pytest.approx([taken.count(option) / 49 for option in range(5)])
        quartiles = np.quantile(found.baseline.margin, (0.25, 0.5, 0.75))
        assert record.margins == pytest.approx(quartiles)
        lost = [changed(self.study, "acc", f"layer:{layer}")["lost"] for layer in range(LAYERS)]
        assert record.compared == tuple(range(LAYERS))
        assert record.both == tuple(tuple(len(a & b) for b in lost) for a in lost)

    def test_long_questions_lack_their_middle(self, two_tasks):
        study = Study()
        study.texts = {
            place: DocumentText("a" * 999 + "b" * 999, text.choices)
            for place, text in study.texts.items()
        }
        study.write(two_tasks)
        record = decisions_record(decisions(two_tasks, view(two_tasks)))
        assert {one.question for one in record.documents} == {f"{'a' * 150} … {'b' * 150}"}

    def test_it_survives_its_json_and_without_texts_nobodys_words_are_left(self, found):
        record = decisions_record(found)
        assert DecisionsRecord.model_validate_json(record.model_dump_json()) == record
        quiet = record.without_texts()
        text = quiet.model_dump_json()
        assert "geography 1" not in text
        assert "xx" not in text
        assert "--publish-documents" in quiet.reasons["texts"]
        assert [run.lost for run in quiet.runs] == [run.lost for run in record.runs]
