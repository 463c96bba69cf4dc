"""Plain text as a benchmark: what is read, and the figures against a loop over single tokens."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.benchmarks import conftest
from tests.conftest import golden
from tests.helpers.lm_eval import load_model_parts as load
from tests.helpers.lm_eval import predict_tokens, write_rows
from tracker.benchmarks.benchmark import data_stamp, open_benchmark
from tracker.benchmarks.corpus import Corpus
from tracker.benchmarks.encoder import RequestEncoder
from tracker.schema.config import CellRequest
from tracker.schema.documents import Document, Response
from tracker.schema.extent import ALL_DOCUMENTS
from tracker.schema.provenance import content_hash

LENGTH = 16
"""Tokens that the model reads."""
TEXT = (
    "The heart pumps the blood.\nIt is a muscle.\n\n  \nParis\n\n\n\n"
    + "The capital of France. " * 3
)


def corpus_request(location: str | Path, data: str | Path = "hub", **settings: Any) -> CellRequest:
    return conftest.ask(f"corpus:{location}", data=str(data), **settings)


def read_texts(location: str | Path, data: str | Path = "hub") -> list[str]:
    return Corpus(corpus_request(location, data))._texts


def refusal(location: str | Path, data: str | Path = "hub", **settings: Any) -> str:
    return conftest.refusal(open_benchmark, corpus_request(location, data, **settings))


def write(path: Path, rows: Sequence[object]) -> Path:
    return write_rows(path.parent, **{path.stem: rows}) / path.name


@pytest.fixture
def notes(tmp_path: Path) -> Path:
    path = tmp_path / "notes.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture
def parts(tiny_llama: Callable[..., Path]) -> tuple[Any, Any]:
    return load(tiny_llama(max_position_embeddings=LENGTH))


@torch.no_grad()
def respond(model: Any, document: Document) -> list[Response]:
    """Score the windows, each in one plain forward pass."""
    responses = []
    for request in document.requests:
        ids = torch.tensor([request.context + request.continuation])
        n_tokens = len(request.continuation)
        logprobs = model(ids[:, :-1]).logits[0, -n_tokens:].log_softmax(-1)
        target = ids[0, -n_tokens:]
        hits = logprobs.argmax(-1) == target
        total = logprobs.gather(1, target[:, None]).sum()
        responses.append(Response(float(total), bool(hits.all()), int(hits.sum())))
    return responses


class TestFigures:
    @pytest.mark.parametrize("longest", [1, LENGTH, LENGTH + 3, 1000, None])
    def test_the_first_tokens_of_each_text(self, notes, parts, longest: int | None) -> None:
        """As lm-eval scores what is left of the tokens, one by one."""
        model, tokenizer = parts
        # The model's own favourites, so that some predictions are right.
        start = tokenizer("The heart", return_tensors="pt").input_ids
        favourites = model.generate(start, max_new_tokens=LENGTH - 6, do_sample=False)[0]
        notes.write_text(TEXT + "\n\n" + tokenizer.decode(favourites).replace("\n", " "))
        encoder = RequestEncoder(model, tokenizer)
        corpus = open_benchmark(corpus_request(f"{notes}:{longest}" if longest else notes))
        total = 0
        documents = corpus.documents(encoder, ALL_DOCUMENTS)
        for document, text in zip(documents, read_texts(notes), strict=True):
            ids = encoder.tok_encode(text)[:longest]
            hits, loss = predict_tokens(model, ids, encoder.prefix_token_id, LENGTH)
            metrics = corpus.outcomes(document, respond(model, document))
            assert metrics["acc"] == json.dumps([hits, len(ids)])
            assert json.loads(metrics["loss"]) == pytest.approx([loss, len(ids)], rel=1e-5)
            total += hits
        assert total or longest == 1
        documents = open_benchmark(corpus_request(notes)).documents(encoder, ALL_DOCUMENTS)
        assert max(len(document.requests) for document in documents) > 2
        assert max(len(encoder.tok_encode(text)) for text in read_texts(notes)) > LENGTH + 3

    @pytest.mark.parametrize("bad", [float("nan"), float("-inf")])
    def test_a_window_that_is_not_finite(self, notes, parts, bad: float) -> None:
        corpus = open_benchmark(corpus_request(notes))
        document = corpus.documents(RequestEncoder(*parts), ALL_DOCUMENTS)[0]
        responses = [Response(-1.0, False, 0) for _ in document.requests]
        responses[-1] = Response(bad, False, 1)
        assert corpus.outcomes(document, responses) == {"acc": None, "loss": None}


class TestTexts:
    def test_paragraphs(self, notes) -> None:
        assert [text.rstrip() for text in read_texts(notes)] == [
            "The heart pumps the blood.\nIt is a muscle.",
            "Paris",
            ("The capital of France. " * 3).rstrip(),
        ]

    def test_windows_line_ends_and_a_byte_order_mark(self, tmp_path) -> None:
        path = tmp_path / "notes.txt"
        path.write_bytes(b"\xef\xbb\xbfone\r\ntwo\r\n\r\nthree\r\n")
        assert [text.rstrip() for text in read_texts(path)] == ["one\ntwo", "three"]

    @pytest.mark.parametrize(
        ("row", "text"),
        [
            ({"content": "no", "text": "yes", "instruction": "no", "output": "no"}, "yes"),
            ({"id": "7", "content": "yes"}, "yes"),
            # CodeAlpaca, MathInstruct, LIMA, and copies of LIMA
            ({"output": "c", "instruction": "a", "input": "b"}, "a\nb\nc"),
            ({"output": "c", "instruction": "a", "input": ""}, "a\nc"),
            ({"source": "x", "output": "c", "instruction": "a"}, "a\nc"),
            ({"conversations": ["a", "b"], "source": "x"}, "a\nb"),
            ({"conversations": [{"from": "human", "value": "a"}, {"value": "b"}]}, "a\nb"),
            ({"conversations": [{"role": "user", "content": "a"}]}, "a"),
        ],
    )
    def test_columns(self, tmp_path, row: dict[str, object], text: str) -> None:
        assert read_texts(write(tmp_path / "rows.jsonl", [row])) == [text]

    def test_a_named_column(self, tmp_path) -> None:
        path = write(tmp_path / "rows.jsonl", [{"text": "no", "body": "yes"}])
        corpus = Corpus(corpus_request(f"{path}#body"))
        assert corpus._texts == ["yes"]
        assert corpus.identity.name == "corpus:rows.jsonl#body"
        assert "no column 'bdy'. Did you mean 'body'? It has: text, body" in refusal(f"{path}#bdy")

    def test_a_data_set_of_a_folder(self, tmp_path) -> None:
        for split in ("train", "test"):
            write(tmp_path / f"DATA/GAIR/lima/{split}.jsonl", [{"conversations": [split, "b"]}])
        write(tmp_path / "DATA/TIGER-Lab/MathInstruct/train.jsonl", [{"content": "x"}])
        for data_set, split, expected in (
            ("GAIR/lima", "test", "test\nb"),
            ("TIGER-Lab/MathInstruct", "train", "x"),
        ):
            corpus = Corpus(corpus_request(data_set, tmp_path / "DATA"))
            assert (corpus.identity.tasks[0].split, corpus._texts) == (split, [expected])
            assert corpus.identity.name == f"corpus:{data_set}"
            assert corpus.identity.data == str(tmp_path / "DATA")

    def test_of_the_hub_only_the_split_is_read(self, tmp_path, monkeypatch) -> None:
        """A folder with a card like those of the hub; its training files hold nothing readable."""
        monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
        folder = tmp_path / "some" / "c4"
        write(folder / "en" / "part.jsonl", [{"text": "kept"}])
        (folder / "en" / "train.jsonl").write_text("{")
        (folder / "README.md").write_text(
            "---\nconfigs:\n- config_name: en\n  data_files:\n"
            "  - {split: train, path: en/train.jsonl}\n"
            "  - {split: validation, path: en/part.jsonl}\n---\n"
        )
        monkeypatch.chdir(tmp_path)
        assert read_texts("some/c4/en@validation") == ["kept"]
        assert "has no split 'test'" in refusal("some/c4/en@test")
        assert "cannot be read from the hub" in refusal("some/c4/en")


class TestIdentity:
    def test_what_is_read_of_it_is_part_of_the_key(self, notes, tmp_path) -> None:
        """Other first tokens are other outcomes of the same texts."""
        whole, short, longer = (
            open_benchmark(corpus_request(f"{notes}{end}")).identity for end in ("", ":8", ":16")
        )
        assert whole.tasks[0].fingerprint == short.tasks[0].fingerprint
        assert len({content_hash(i.model_dump(mode="json")) for i in (whole, short, longer)}) == 3
        assert (short.name, short.data) == ("corpus:notes.txt:8", str(notes))
        rows_path = write(tmp_path / "me@home" / "rows.jsonl", [{"text": "a"}])
        benchmark = open_benchmark(corpus_request(f"{rows_path}:3#text"))
        assert benchmark.identity.name == "corpus:rows.jsonl:3#text"

    def test_the_fingerprint_is_that_of_the_texts(self, notes, tmp_path) -> None:
        identity = open_benchmark(corpus_request(notes)).identity
        new_path = tmp_path / "elsewhere" / "notes.txt"
        new_path.parent.mkdir()
        new_path.write_text(TEXT)
        new_identity = open_benchmark(corpus_request(new_path)).identity
        assert (identity.name, identity.tasks) == (new_identity.name, new_identity.tasks)
        notes.write_text(TEXT + "!")
        assert open_benchmark(corpus_request(notes)).identity.tasks != identity.tasks

    def test_a_changed_file_has_another_stamp(self, notes) -> None:
        stamp = data_stamp(corpus_request(notes).benchmark)
        assert data_stamp(corpus_request(notes).benchmark) == stamp
        os.utime(notes, ns=(1, 1))
        assert data_stamp(corpus_request(notes).benchmark) != stamp
        assert data_stamp(corpus_request("GAIR/lima").benchmark) is None
        assert data_stamp(corpus_request("GAIR/lima", notes.parent).benchmark) is not None


class TestRefusals:
    @pytest.mark.parametrize(("argument", "message"), golden("corpora"))
    def test_what_cannot_be_read(self, notes, argument: str, message: str) -> None:
        location, _, options = argument.removeprefix("NOTHING").partition(" | ")
        settings = json.loads(options or "{}")
        folder = notes.parent
        (folder / "notes.pdf").write_text("x")
        (folder / "bytes.txt").write_bytes(b"\xff\xfe\x00")
        write(folder / "other.jsonl", [{"prompt": "a", "completion": "b"}])
        write(folder / "some/dev/dev.jsonl", [{"text": "a"}])
        data = str(settings.pop("data", "{}")).format(folder)
        assert message.format(folder) in refusal(location.format(folder), data, **settings)

    @pytest.mark.parametrize("name", ["notes.txt", "rows.jsonl"])
    @pytest.mark.parametrize("content", ["", "\n  \n\n"])
    def test_an_empty_corpus(self, tmp_path, name: str, content: str) -> None:
        (tmp_path / name).write_text(content)
        assert "contains no text" in refusal(tmp_path / name)

    @pytest.mark.parametrize("value", [7, [7], {"a": "b"}, {"value": "x"}, [{"said": "x"}]])
    def test_a_column_without_text(self, tmp_path, value: object) -> None:
        path = write(tmp_path / "rows.jsonl", [{"text": "a"}, {"text": value}])
        assert "document 2: the column 'text' does not contain text" in refusal(path)

    @pytest.mark.parametrize(
        ("line", "why"), [("{", "not valid JSON"), ("[1]", "expected a JSON object")]
    )
    def test_a_broken_line(self, tmp_path, line: str, why: str) -> None:
        path = tmp_path / "rows.jsonl"
        path.write_text('{"text": "a"}\n\n' + line + "\n")
        assert f"line 3: {why}" in refusal(path)
