"""Test requests of rolling tasks; `tests/runner/test_texts.py` compares figures with lm-eval's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.benchmarks.conftest import make
from tests.helpers.lm_eval import AGGREGATIONS, CORPUS_PATHS, write_rows
from tests.helpers.lm_eval import load_model_parts as load_parts
from tracker.benchmarks.encoder import RequestEncoder
from tracker.schema.documents import Response
from tracker.schema.errors import BenchmarkError
from tracker.schema.extent import ALL_DOCUMENTS, Extent

LENGTH = 64
"""Tokens that the model reads."""


TEXTS = [" ".join(["Paris heart"] * count) for count in (1, 4, 60, 9, 200)]
"""Nothing that the task's own clean-up of texts would change."""


@pytest.fixture
def data(tmp_path: Path) -> Path:
    for folder, column, split in CORPUS_PATHS.values():
        rows = [{column: text} for text in TEXTS]
        write_rows(tmp_path / "DATA" / folder, train=rows, **{split: rows})
    return tmp_path / "DATA"


@pytest.fixture
def parts(tiny_llama: Callable[..., Path]) -> Callable[..., tuple[Any, Any]]:
    def load(**settings: Any) -> tuple[Any, Any]:
        return load_parts(tiny_llama(max_position_embeddings=LENGTH, **settings))

    return load


@pytest.mark.parametrize("bos", [False, True])
def test_windows_predict_every_token_once(data, parts, bos: bool) -> None:
    model, tokenizer = parts(bos=bos)
    encoder = RequestEncoder(model, tokenizer)
    documents = make("c4", data).documents(encoder, ALL_DOCUMENTS)
    assert [len(document.requests) for document in documents][:2] == [1, 1]
    assert len(documents[-1].requests) > 3
    for document, text in zip(documents, TEXTS, strict=True):
        assert (document.rolling, document.gold, document.choices) == (True, None, 0)
        predicted = [token for window in document.requests for token in window.continuation]
        assert predicted == encoder.tok_encode(text)
        assert document.requests[0].context == (encoder.prefix_token_id,)
        assert all(len(w.context + w.continuation) <= LENGTH + 1 for w in document.requests)
    assert make("c4", data).documents(encoder, Extent(limit=2)) == documents[:2]


def test_a_text_without_tokens_is_a_document_without_requests(data, parts) -> None:
    write_rows(data / CORPUS_PATHS["c4"][0], validation=[{"text": ""}, {"text": "Paris"}])
    benchmark = make("c4", data)
    first, second = benchmark.documents(RequestEncoder(*parts()), ALL_DOCUMENTS)
    assert (first.requests, len(second.requests)) == ((), 1)
    assert benchmark.outcomes(first, [])["bits_per_byte"] == "[0, 0]"


@pytest.mark.parametrize("setting", [{"num_fewshot": 2}, {"apply_chat_template": True}])
def test_settings_that_lm_eval_ignores_are_refused(data, setting: dict[str, Any]) -> None:
    with pytest.raises(BenchmarkError, match=f"wikitext .* leave {next(iter(setting))} out"):
        make("wikitext", data, **setting)
    assert make("wikitext", data, num_fewshot=0).identity.num_fewshot == 0


@pytest.mark.parametrize("bad", [float("nan"), float("-inf")])
def test_a_window_that_is_not_finite_leaves_the_document_without_outcome(data, parts, bad) -> None:
    benchmark = make("wikitext", data)
    document = benchmark.documents(RequestEncoder(*parts()), ALL_DOCUMENTS)[-1]
    responses = [Response(-1.0, False, 0) for _ in document.requests]
    responses[1] = Response(bad, False, 0)
    assert benchmark.outcomes(document, responses) == dict.fromkeys(AGGREGATIONS)
