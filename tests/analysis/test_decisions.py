"""Test the decisions of runs against a second computation from the same hand-made outcomes."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from tests.helpers.stored_cells import layer_request, make_row, write_rows_to_blocks
from tracker.analysis.decisions import Decisions, decisions_record, derive_decisions
from tracker.ledger.blocks import Block
from tracker.ledger.cells import CellStore
from tracker.ledger.texts import text_row
from tracker.schema.documents import Document, DocumentText
from tracker.schema.records import DecisionsRecord
from tracker.schema.views import View

LAYERS = 4
SIZES = {"geography": 40, "history": 9}
NAMES = ["baseline", *(f"layer:{layer}" for layer in range(LAYERS))]
METRICS = ("acc", "acc_norm")
RNG = np.random.default_rng(11)


Key = tuple[str, int]


class Study:
    """Outcomes of two tasks under every layer, drawn once: what each document was answered."""

    def __init__(self, open_answers: bool = False) -> None:
        self.answers: dict[tuple[str, int, str], list[float]] = {}
        self.texts: dict[Key, DocumentText] = {}
        self.gold: dict[Key, int] = {}
        for task, doc in ((task, doc) for task, size in SIZES.items() for doc in range(size)):
            count = 1 if open_answers else int(RNG.integers(2, 6))
            self.gold[task, doc] = int(RNG.integers(count))
            words = tuple("x" * int(RNG.integers(1, 9)) for _ in range(count))
            texts = ((), words[0]) if open_answers else (words, None)
            self.texts[task, doc] = DocumentText(f"{task} {doc}?", *texts)
            for name in NAMES:
                # As a shard holds them: 32 bits.
                scores = RNG.normal(-5, 2, count).astype(np.float32)
                self.answers[task, doc, name] = [float(score) for score in scores]
        self.has_open_answers = open_answers

    def score(self, document: Key, name: str, metric: str) -> float:
        scores = self.scores(document, name, metric)
        if self.has_open_answers:
            return float(scores[0] > -5)
        return float(int(np.argmax(scores)) == self.gold[document])

    def scores(self, document: Key, name: str, metric: str) -> list[float]:
        values, choices = self.answers[(*document, name)], self.texts[document].choices
        if metric != "acc_norm" or self.has_open_answers:
            return values
        return [value / len(choice) for value, choice in zip(values, choices, strict=True)]

    def changed(self, name: str, metric: str = "acc") -> tuple[set[Key], set[Key]]:
        """Return the documents that are lost, and those that are won, by a plain loop."""
        lost, won = set(), set()
        for key in self.texts:
            intact, score = self.score(key, "baseline", metric), self.score(key, name, metric)
            if intact != score:
                (lost if score < intact else won).add(key)
        return lost, won

    def write(self, store: CellStore, texts: bool = True) -> None:
        rows = []
        for (task, doc), name in product(self.texts, NAMES):
            metrics = {m: self.score((task, doc), name, m) for m in METRICS}
            fields = {"gold": self.gold[task, doc], "choices": 0 if self.has_open_answers else None}
            scores = self.answers[task, doc, name]
            rows.append(make_row(doc, name, task, metrics=metrics, loglikelihoods=scores, **fields))
        write_rows_to_blocks(store, rows)
        for (task, doc), text in self.texts.items() if texts else ():
            document = Document(task, doc, (), None, 0)
            store.texts.add(Block(task, doc // 32).name, [text_row(document, text, True)])


@pytest.fixture
def two_tasks(cell_of) -> CellStore:
    return cell_of(SIZES, METRICS, name="subjects")


def view(store: CellStore, metric: str = "acc") -> View:
    return store.views.view_of(layer_request(metric=metric))


def selected(decisions: Decisions, mask: np.ndarray) -> set[Key]:
    return {decisions.documents[index] for index in np.flatnonzero(mask)}


class TestDecisions:
    @pytest.mark.parametrize("metric", ["acc", "acc_norm"])
    def test_each_figure_is_that_of_a_plain_loop(self, two_tasks, metric):
        study = Study()
        study.write(two_tasks)
        derived = derive_decisions(two_tasks, view(two_tasks, metric))
        assert [text.text for text in derived.texts] == [study.texts[p] for p in derived.documents]
        assert set(derived.documents) == set(study.texts)
        assert (derived.binary, derived.public, derived.reasons) == (True, True, {})
        assert [f"layer:{run.layer}" for run, _ in derived.runs] == NAMES[1:]
        models = [derived.baseline, *(model for _, model in derived.runs)]
        for name, model in zip(NAMES, models, strict=True):
            for index, document in enumerate(derived.documents):
                scores = study.scores(document, name, metric)
                gold = study.gold[document]
                best = max(score for option, score in enumerate(scores) if option != gold)
                assert model.margin[index] == pytest.approx(scores[gold] - best)
                assert model.choice[index] == int(np.argmax(scores))
                assert model.score[index] == study.score(document, name, metric)
            masks = derived.lost_documents(model), derived.won_documents(model)
            assert tuple(selected(derived, mask) for mask in masks) == study.changed(name, metric)

    def test_without_texts_only_what_needs_lengths_is_lost(self, two_tasks):
        study = Study()
        assert derive_decisions(two_tasks, view(two_tasks)) is None, "nothing is measured"
        study.write(two_tasks, texts=False)
        undivided = derive_decisions(two_tasks, view(two_tasks, "acc"))
        assert undivided.reasons == {"texts": "the texts of the documents are not stored"}
        assert not np.isnan(undivided.baseline.margin).any()
        divided = derive_decisions(two_tasks, view(two_tasks, "acc_norm"))
        assert np.isnan(divided.baseline.margin).all()
        assert divided.reasons["margin"] == (
            "acc_norm divides by the lengths of options, which are unknown for 49 documents"
        )

    def test_open_answers_have_no_options(self, two_tasks):
        study = Study(open_answers=True)
        study.write(two_tasks)
        derived = derive_decisions(two_tasks, view(two_tasks))
        assert derived.options == 0
        assert np.isnan(derived.gold).all()
        assert "is shown instead" in derived.reasons["margin"]
        for index, document in enumerate(derived.documents):
            assert derived.baseline.margin[index] == study.answers[(*document, "baseline")][0]

    def test_a_loss_is_lost_where_it_grows(self, cell_of):
        store = cell_of(SIZES, METRICS, task={"higher_is_better": {"acc": False}})
        study = Study()
        study.write(store)
        derived = derive_decisions(store, view(store))
        (_, model), *_ = derived.runs
        _, won = study.changed("layer:0")
        assert selected(derived, derived.lost_documents(model)) == won
        assert not derived.binary
        assert decisions_record(derived).both == ()


class TestRecord:
    @pytest.fixture
    def decisions(self, two_tasks) -> Decisions:
        self.study = Study()
        self.study.write(two_tasks)
        return derive_decisions(two_tasks, view(two_tasks))

    def test_it_counts_all_and_names_those_whose_margin_changes_most(self, decisions):
        record, study = decisions_record(decisions, max_shown=3), self.study
        assert record.n == 49
        assert record.right == sum(study.score(key, "baseline", "acc") for key in study.texts)
        indexes = {key: index for index, key in enumerate(decisions.documents)}
        for run, (_, model) in zip(record.runs, decisions.runs, strict=True):
            lost, won = study.changed(f"layer:{run.run.layer}")
            assert (run.lost, run.won) == (len(lost), len(won))
            change = model.margin - decisions.baseline.margin
            halves = (lost, 1, run.named[: run.named_lost]), (won, -1, run.named[run.named_lost :])
            for keys, sign, entries in halves:
                documents = [record.documents[entry.document] for entry in entries]
                largest = sorted(keys, key=lambda key: sign * change[indexes[key]])[:3]
                assert [(entry.task, entry.doc) for entry in documents] == largest
                for entry, document, key in zip(entries, documents, largest, strict=True):
                    index, text = indexes[key], study.texts[key]
                    assert (document.question, document.choices) == (text.question, text.choices)
                    assert document.gold == study.gold[key]
                    assert entry.choice == model.choice[index]
                    assert entry.margin == pytest.approx(model.margin[index], rel=1e-3)
                    margin = decisions.baseline.margin[index]
                    assert document.margin == pytest.approx(margin, rel=1e-3)

    def test_options_margins_and_what_two_layers_lose_are_of_all_documents(self, decisions):
        record = decisions_record(decisions, max_shown=1)
        for shares, options in (
            (record.options, decisions.baseline.choice.tolist()),
            (record.gold, list(self.study.gold.values())),
        ):
            assert shares == pytest.approx([options.count(option) / 49 for option in range(5)])
        quartiles = np.quantile(decisions.baseline.margin, (0.25, 0.5, 0.75))
        assert record.margins == pytest.approx(quartiles)
        lost_sets = [self.study.changed(name)[0] for name in NAMES[1:]]
        assert record.compared == tuple(range(LAYERS))
        assert record.both == tuple(tuple(len(a & b) for b in lost_sets) for a in lost_sets)

    def test_long_questions_lack_their_middle(self, two_tasks):
        study = Study()
        for key, text in study.texts.items():
            study.texts[key] = DocumentText("a" * 999 + "b" * 999, text.choices)
        study.write(two_tasks)
        record = decisions_record(derive_decisions(two_tasks, view(two_tasks)))
        shortened = f"{'a' * 150} … {'b' * 150}"
        assert {document.question for document in record.documents} == {shortened}

    def test_it_survives_its_json_and_without_texts_nobodys_words_are_left(self, decisions):
        record = decisions_record(decisions)
        assert DecisionsRecord.model_validate_json(record.model_dump_json()) == record
        redacted = record.without_texts()
        text = redacted.model_dump_json()
        assert "geography 1" not in text
        assert "xx" not in text
        assert "--publish-documents" in redacted.reasons["texts"]
        assert [run.lost for run in redacted.runs] == [run.lost for run in record.runs]
