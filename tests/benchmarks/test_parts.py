"""Calibration and test documents: what each part holds, and that they never meet."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest

from tests.benchmarks.conftest import PACKAGE
from tests.benchmarks.conftest import ask as asked
from tests.helpers.lm_eval import TASKS, write_rows
from tests.helpers.own_tasks import write_choices
from tests.helpers.stored_cells import model_identity
from tracker.benchmarks.benchmark import open_benchmark
from tracker.benchmarks.encoder import RequestEncoder
from tracker.core.errors import BenchmarkError
from tracker.core.extent import ALL, Extent
from tracker.core.identities import BenchmarkIdentity
from tracker.ledger.views import cell_key

PARTS = ("calibration", "test")


def ask(benchmark: str, part: str | None = None, data: str = PACKAGE, **settings: Any) -> Any:
    return asked(benchmark, part=part, data=data, **settings)


def key(identity: BenchmarkIdentity) -> str:
    return cell_key(model_identity(), identity)


def naive_order(task: str, documents: int, seed: int = 1234) -> list[int]:
    """Return the random order as docs/statistics.md describes it."""
    digests = {
        hashlib.sha256(f"{seed}/{task}/{number}".encode()).hexdigest(): number
        for number in range(documents)
    }
    return [digests[digest] for digest in sorted(digests)]


def write(folder: Path, **splits: list[dict[str, Any]]) -> str:
    """Write a data set's splits; returns the folder that holds it, for `data`."""
    return str(write_rows(folder, **splits).parents[1])


def own(folder: Path, more: str) -> str:
    """Write a task of one's own: piqa, with something changed; returns its file."""
    task = folder / "own.yaml"
    task.write_text(f"include: {TASKS / 'piqa/piqa.yaml'}\ntask: own\n{more}")
    return str(task)


def arc(word: str, count: int) -> list[dict[str, Any]]:
    return [
        {
            "question": f"Which {word} is number {number}?",
            "choices": {"text": [f"{word} {number}", "none"], "label": ["A", "B"]},
            "answerKey": "AB"[number % 2],
        }
        for number in range(count)
    ]


def piqa(word: str, count: int) -> list[dict[str, Any]]:
    return [
        {"goal": f"To mend {word} {n}", "sol1": f"use {n}", "sol2": "wait", "label": n % 2}
        for n in range(count)
    ]


def numbers(benchmark: Any, encoder: RequestEncoder, extent: Extent = ALL) -> list[int]:
    return [document.index for document in benchmark.documents(encoder, extent)]


def contexts(benchmark: Any, encoder: RequestEncoder, extent: Extent = ALL) -> list[str]:
    return [
        encoder.tokenizer.decode([*document.requests[0].context])
        for document in benchmark.documents(encoder, extent)
    ]


class TestHalves:
    def test_they_are_all_documents_once(self, encoder) -> None:
        """copa has 100 documents, and the package holds no training split of it."""
        whole = open_benchmark(ask("copa"))
        halves = [open_benchmark(ask("copa", part)) for part in PARTS]
        order = naive_order("copa", 100)
        found = [numbers(half, encoder) for half in halves]
        assert found == [sorted(order[:50]), sorted(order[50:])]
        for half, part in zip(halves, PARTS, strict=True):
            (task,) = half.identity.tasks
            assert (task.documents, list(task.numbers)) == (50, found[PARTS.index(part)])
            assert half.identity.title == f"copa ({part} half)"
            assert half.identity.seed == 1234
            # A document is asked as in the whole benchmark, under the same number.
            every = {each.index: each for each in whole.documents(encoder, ALL)}
            assert all(each == every[each.index] for each in half.documents(encoder, ALL))
            text = half.text(every[task.numbers[0]])
            assert text == whole.text(every[task.numbers[0]])

    def test_an_odd_document_is_for_the_test(self, encoder, tmp_path) -> None:
        data = write(tmp_path / "baber/piqa", validation=piqa("pump", 7))
        halves = [open_benchmark(ask("piqa", part, data=data)) for part in PARTS]
        order = naive_order("piqa", 7)
        assert [numbers(half, encoder) for half in halves] == [sorted(order[:3]), sorted(order[3:])]

    def test_the_key_tells_them_apart_and_the_seed(self) -> None:
        seeds = ({}, {"seed": 7})
        asked = [ask("copa"), *(ask("copa", part, **seed) for seed in seeds for part in PARTS)]
        identities = [open_benchmark(request).identity for request in asked]
        assert len(set(map(key, identities))) == 5
        drawn = [set(identity.tasks[0].numbers) for identity in identities[1:]]
        assert drawn[0] != drawn[2]
        assert drawn[2] | drawn[3] == set(range(100))
        for identity in identities:
            assert BenchmarkIdentity.model_validate_json(identity.model_dump_json()) == identity
        assert "half" not in identities[0].model_dump()["tasks"][0], "as before there were parts"

    def test_few_shot_prompts_are_those_of_a_whole_run(self, encoder, tmp_path) -> None:
        """Examples that are drawn document by document."""
        data = write(tmp_path / "baber/piqa", dev=piqa("bolt", 9), validation=piqa("pump", 8))
        task = own(tmp_path, "training_split: null\nfewshot_split: dev\n")
        settings = {"data": data, "num_fewshot": 2}
        whole = open_benchmark(ask(task, **settings))
        every = dict(zip(range(8), contexts(whole, encoder), strict=True))
        for part in PARTS:
            half = open_benchmark(ask(task, part, **settings))
            mine = list(half.identity.tasks[0].numbers)
            assert len(mine) == 4
            assert contexts(half, encoder) == [every[number] for number in mine]

    @pytest.mark.parametrize("split", [None, "validation"], ids=["by lm-eval's rule", "stated"])
    def test_test_documents_are_no_examples_of_calibration(self, encoder, tmp_path, split) -> None:
        """Without a split of their own, examples are any of the scored documents."""
        write_rows(tmp_path, rows=[{"q": f"Number {n}?", "a": n % 2} for n in range(8)])
        file = tmp_path / "rows.jsonl"
        of_splits = {"validation_split": "validation", "test_split": None, "fewshot_split": split}
        data = {"data_files": {"validation": str(file)}}
        task = str(write_choices(tmp_path, "own", file, "{{q}}", dataset_kwargs=data, **of_splits))
        with pytest.raises(
            BenchmarkError, match=r"own draws .* 'validation', which .*num_fewshot 0"
        ):
            open_benchmark(ask(task, "calibration", data="hub", num_fewshot=2))
        calibration = open_benchmark(ask(task, "calibration", data="hub"))
        assert len(contexts(calibration, encoder)) == 4
        # What says what was lost chooses nothing, and keeps the prompts of a whole run.
        test = open_benchmark(ask(task, "test", data="hub", num_fewshot=2))
        assert len(contexts(test, encoder)) == 4

    def test_one_document_makes_no_halves(self, tmp_path) -> None:
        data = write(tmp_path / "baber/piqa", validation=piqa("pump", 1))
        with pytest.raises(BenchmarkError, match="piqa has 1 document, which makes no two halves"):
            open_benchmark(ask("piqa", "test", data=data))


class TestTrainingSplit:
    """Of a folder: `piqa` is scored on its validation split, arc_easy on its test split."""

    @pytest.fixture
    def data(self, tmp_path) -> str:
        place = tmp_path / "allenai/ai2_arc/ARC-Easy"
        write(place, train=arc("bolt", 6), test=arc("pump", 3))
        return write(tmp_path / "baber/piqa", train=piqa("bolt", 5), validation=piqa("pump", 4))

    @pytest.mark.parametrize("name", ["piqa", "arc_easy"])
    def test_it_is_the_calibration_part(self, data, encoder, name) -> None:
        whole, calibration, test = (
            open_benchmark(ask(name, part, data=data)) for part in (None, *PARTS)
        )
        # The scored documents are the same cell, whether one says `test` or nothing.
        assert test.identity == whole.identity
        assert key(calibration.identity) != key(whole.identity)
        assert (calibration.identity.title, whole.identity.title) == (f"{name} (train)", name)
        (task,) = calibration.identity.tasks
        assert (task.split, task.half) == ("train", None)
        assert all("bolt" in text for text in contexts(calibration, encoder))
        assert all("pump" in text for text in contexts(test, encoder))
        documents = {"piqa": (5, 4), "arc_easy": (6, 3)}[name]
        assert (task.documents, test.identity.tasks[0].documents) == documents
        assert numbers(calibration, encoder) == list(range(documents[0]))

    @pytest.mark.parametrize("name", ["piqa", "arc_easy"])
    def test_no_document_is_its_own_example(self, data, encoder, name) -> None:
        """As many examples as there are others: each document stands there once."""
        others, said = {"piqa": (4, "mend bolt {}"), "arc_easy": (5, "number {}?")}[name]
        benchmark = open_benchmark(ask(name, "calibration", data=data, num_fewshot=others))
        for text in contexts(benchmark, encoder):
            assert all(text.count(said.format(number)) == 1 for number in range(others + 1))

    def test_examples_from_the_scored_split_are_refused(self, data, tmp_path) -> None:
        """The training split calibrates, and the examples before its documents are tested."""
        task = own(tmp_path, "fewshot_split: validation\n")
        open_benchmark(ask(task, "calibration", data=data, num_fewshot=0))
        open_benchmark(ask(task, "test", data=data, num_fewshot=2))
        with pytest.raises(BenchmarkError, match=r"own draws .*'validation', which is scored"):
            open_benchmark(ask(task, "calibration", data=data, num_fewshot=2))


def test_task_by_task() -> None:
    """ai2_arc is arc_easy and arc_challenge, which are drawn independently."""
    found = [open_benchmark(ask("ai2_arc", part)).identity for part in (None, *PARTS)]
    whole, calibration, test = ({task.name: task for task in each.tasks} for each in found)
    for name, task in whole.items():
        mine, theirs = calibration[name].numbers, test[name].numbers
        assert not set(mine) & set(theirs)
        assert sorted((*mine, *theirs)) == list(range(task.documents))
        assert list(mine) == sorted(naive_order(name, task.documents)[: task.documents // 2])
    assert found[1].title == "ai2_arc (calibration half)"


def test_halves_of_the_texts(encoder, tmp_path) -> None:
    notes = tmp_path / "notes.txt"
    notes.write_text("\n\n".join(f"Animal {number} has a heart." for number in range(9)))
    name = f"corpus:{notes}"
    order = naive_order("corpus:notes.txt", 9)
    whole = open_benchmark(ask(name, data="hub"))
    every = whole.documents(encoder, ALL)
    for part, mine in zip(PARTS, (order[:4], order[4:]), strict=True):
        half = open_benchmark(ask(name, part, data="hub"))
        assert half.documents(encoder, ALL) == [every[number] for number in sorted(mine)]
        assert numbers(half, encoder, Extent(sample=2)) == sorted(mine[:2])
        assert half.text(every[mine[0]]).question == f"Animal {mine[0]} has a heart."
        assert half.identity.title == f"corpus:notes.txt ({part} half)"
        assert key(half.identity) != key(whole.identity)
    copy = tmp_path / "copy.txt"
    copy.write_text(notes.read_text())
    other = open_benchmark(ask(f"corpus:{copy}", data="hub"))
    assert other.rows("corpus:copy.txt") == whole.rows("corpus:notes.txt")
    notes.write_text("One paragraph.")
    with pytest.raises(BenchmarkError, match="has 1 document, which makes no two halves"):
        open_benchmark(ask(name, "calibration", data="hub"))
