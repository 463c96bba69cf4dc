"""Calibration and test documents: what each part holds, and that they never meet."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest

from tests.benchmarks.conftest import PACKAGE, ask, piqa
from tests.helpers.lm_eval import TASKS, write_rows
from tests.helpers.own_tasks import write_choices
from tests.helpers.stored_cells import model_identity
from tracker.benchmarks.benchmark import open_benchmark
from tracker.benchmarks.encoder import RequestEncoder
from tracker.ledger.views import cell_key
from tracker.schema.errors import BenchmarkError
from tracker.schema.extent import ALL_DOCUMENTS, Extent
from tracker.schema.identities import BenchmarkIdentity

PARTS = ("calibration", "test")


def part_request(
    benchmark: str, part: str | None = None, data: str = PACKAGE, **settings: Any
) -> Any:
    return ask(benchmark, part=part, data=data, **settings)


def identity_key(identity: BenchmarkIdentity) -> str:
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


def write_own_task(folder: Path, more: str) -> str:
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


def document_numbers(
    benchmark: Any, encoder: RequestEncoder, extent: Extent = ALL_DOCUMENTS
) -> list[int]:
    return [document.index for document in benchmark.documents(encoder, extent)]


def contexts(benchmark: Any, encoder: RequestEncoder) -> list[str]:
    return [
        encoder.tokenizer.decode([*document.requests[0].context])
        for document in benchmark.documents(encoder, ALL_DOCUMENTS)
    ]


class TestHalves:
    def test_they_are_all_documents_once(self, encoder) -> None:
        """copa has 100 documents, and the package holds no training split of it."""
        whole = open_benchmark(part_request("copa"))
        halves = [open_benchmark(part_request("copa", part)) for part in PARTS]
        order = naive_order("copa", 100)
        half_numbers = [document_numbers(half, encoder) for half in halves]
        assert half_numbers == [sorted(order[:50]), sorted(order[50:])]
        for half, part in zip(halves, PARTS, strict=True):
            (task,) = half.identity.tasks
            assert (task.documents, list(task.numbers)) == (50, half_numbers[PARTS.index(part)])
            assert half.identity.title == f"copa ({part} half)"
            assert half.identity.seed == 1234
            # A document is asked as in the whole benchmark, under the same number.
            documents = whole.documents(encoder, ALL_DOCUMENTS)
            half_documents = half.documents(encoder, ALL_DOCUMENTS)
            assert half_documents == [documents[number] for number in task.numbers]
            assert half.text(half_documents[0]) == whole.text(half_documents[0])

    def test_the_key_tells_them_apart_and_the_seed(self) -> None:
        seeds = ({}, {"seed": 7})
        requests = [part_request("copa", part, **seed) for seed in seeds for part in PARTS]
        requests = [part_request("copa"), *requests]
        identities = [open_benchmark(request).identity for request in requests]
        assert len(set(map(identity_key, identities))) == 5
        drawn_numbers = [set(identity.tasks[0].numbers) for identity in identities[1:]]
        assert drawn_numbers[0] != drawn_numbers[2]
        assert drawn_numbers[2] | drawn_numbers[3] == set(range(100))
        for identity in identities:
            assert BenchmarkIdentity.model_validate_json(identity.model_dump_json()) == identity
        assert "half" not in identities[0].model_dump()["tasks"][0], "as before there were parts"

    def test_few_shot_prompts_are_those_of_a_whole_run(self, encoder, tmp_path) -> None:
        """Examples that are drawn document by document."""
        data = write(tmp_path / "baber/piqa", dev=piqa("bolt", 9), validation=piqa("pump", 8))
        task = write_own_task(tmp_path, "training_split: null\nfewshot_split: dev\n")
        settings = {"data": data, "num_fewshot": 2}
        whole = open_benchmark(part_request(task, **settings))
        prompts = dict(zip(range(8), contexts(whole, encoder), strict=True))
        for part in PARTS:
            half = open_benchmark(part_request(task, part, **settings))
            half_numbers = list(half.identity.tasks[0].numbers)
            assert len(half_numbers) == 4
            assert contexts(half, encoder) == [prompts[number] for number in half_numbers]

    @pytest.mark.parametrize("split", [None, "validation"], ids=["by lm-eval's rule", "stated"])
    def test_test_documents_are_no_examples_of_calibration(self, encoder, tmp_path, split) -> None:
        """Without a split of their own, examples are any of the scored documents."""
        write_rows(tmp_path, rows=[{"q": f"Number {n}?", "a": n % 2} for n in range(8)])
        file = tmp_path / "rows.jsonl"
        of_splits = {"validation_split": "validation", "test_split": None, "fewshot_split": split}
        data = {"data_files": {"validation": str(file)}}
        task = str(write_choices(tmp_path, "own", file, "{{q}}", dataset_kwargs=data, **of_splits))
        with pytest.raises(
            BenchmarkError, match=r"own scores .* 'validation', and also draws .*num_fewshot 0"
        ):
            open_benchmark(part_request(task, "calibration", data="hub", num_fewshot=2))
        calibration = open_benchmark(part_request(task, "calibration", data="hub"))
        assert len(contexts(calibration, encoder)) == 4
        # What says what was lost chooses nothing, and keeps the prompts of a whole run.
        test = open_benchmark(part_request(task, "test", data="hub", num_fewshot=2))
        assert len(contexts(test, encoder)) == 4


class TestTrainingSplit:
    """Of a folder: `piqa` is scored on its validation split, arc_easy on its test split."""

    @pytest.fixture
    def data(self, tmp_path) -> str:
        folder = tmp_path / "allenai/ai2_arc/ARC-Easy"
        write(folder, train=arc("bolt", 6), test=arc("pump", 3))
        return write(tmp_path / "baber/piqa", train=piqa("bolt", 5), validation=piqa("pump", 4))

    @pytest.mark.parametrize("name", ["piqa", "arc_easy"])
    def test_it_is_the_calibration_part(self, data, encoder, name) -> None:
        whole, calibration, test = (
            open_benchmark(part_request(name, part, data=data)) for part in (None, *PARTS)
        )
        # The scored documents are the same cell, whether one says `test` or nothing.
        assert test.identity == whole.identity
        assert identity_key(calibration.identity) != identity_key(whole.identity)
        assert (calibration.identity.title, whole.identity.title) == (f"{name} (train)", name)
        (task,) = calibration.identity.tasks
        assert (task.split, task.half) == ("train", None)
        assert all("bolt" in text for text in contexts(calibration, encoder))
        assert all("pump" in text for text in contexts(test, encoder))
        documents = {"piqa": (5, 4), "arc_easy": (6, 3)}[name]
        assert (task.documents, test.identity.tasks[0].documents) == documents
        assert document_numbers(calibration, encoder) == list(range(documents[0]))

    @pytest.mark.parametrize("name", ["piqa", "arc_easy"])
    def test_no_document_is_its_own_example(self, data, encoder, name) -> None:
        """As many examples as there are others: each document stands there once."""
        n_others, pattern = {"piqa": (4, "mend bolt {}"), "arc_easy": (5, "number {}?")}[name]
        request = part_request(name, "calibration", data=data, num_fewshot=n_others)
        benchmark = open_benchmark(request)
        for text in contexts(benchmark, encoder):
            assert all(text.count(pattern.format(number)) == 1 for number in range(n_others + 1))

    def test_examples_from_the_scored_split_are_refused(self, data, tmp_path) -> None:
        """The training split calibrates, and the examples before its documents are tested."""
        task = write_own_task(tmp_path, "fewshot_split: validation\n")
        open_benchmark(part_request(task, "calibration", data=data, num_fewshot=0))
        open_benchmark(part_request(task, "test", data=data, num_fewshot=2))
        with pytest.raises(BenchmarkError, match=r"own scores .*'validation', and also draws"):
            open_benchmark(part_request(task, "calibration", data=data, num_fewshot=2))


def test_task_by_task() -> None:
    """ai2_arc is arc_easy and arc_challenge, which are drawn independently."""
    identities = [open_benchmark(part_request("ai2_arc", part)).identity for part in (None, *PARTS)]
    for task, *halves in zip(*(identity.tasks for identity in identities), strict=True):
        calibration, test = (half.numbers for half in halves)
        assert {half.name for half in halves} == {task.name}
        assert sorted((*calibration, *test)) == list(range(task.documents))
        order = naive_order(task.name, task.documents)
        assert list(calibration) == sorted(order[: task.documents // 2])
    assert identities[1].title == "ai2_arc (calibration half)"


def test_halves_of_the_texts(encoder, tmp_path) -> None:
    notes = tmp_path / "notes.txt"
    notes.write_text("\n\n".join(f"Animal {number} has a heart." for number in range(9)))
    name = f"corpus:{notes}"
    order = naive_order("corpus:notes.txt", 9)
    whole = open_benchmark(part_request(name, data="hub"))
    documents = whole.documents(encoder, ALL_DOCUMENTS)
    for part, half_numbers in zip(PARTS, (order[:4], order[4:]), strict=True):
        half = open_benchmark(part_request(name, part, data="hub"))
        half_documents = [documents[number] for number in sorted(half_numbers)]
        assert half.documents(encoder, ALL_DOCUMENTS) == half_documents
        assert document_numbers(half, encoder, Extent(sample=2)) == sorted(half_numbers[:2])
        number = half_numbers[0]
        assert half.text(documents[number]).question == f"Animal {number} has a heart."
        assert half.identity.title == f"corpus:notes.txt ({part} half)"
        assert identity_key(half.identity) != identity_key(whole.identity)
    copy = tmp_path / "copy.txt"
    copy.write_text(notes.read_text())
    copied = open_benchmark(part_request(f"corpus:{copy}", data="hub"))
    assert copied.rows_digest("corpus:copy.txt") == whole.rows_digest("corpus:notes.txt")
    notes.write_text("One paragraph.")
    with pytest.raises(BenchmarkError, match="has 1 document, which is too few for two halves"):
        open_benchmark(part_request(name, "calibration", data="hub"))
