"""One row: what is summed, what is refused, and what a row without requests says."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.helpers.ablations import single_layers
from tests.helpers.engines import MAX_LENGTH, engine_of, make_documents, naive_answers
from tests.helpers.families import tiny_model
from tracker.engine.forward.streams import plan_streams
from tracker.engine.refusal import RefusalError
from tracker.engine.scoring.model import EngineModel
from tracker.engine.scoring.rows import pack_flat_rows, pack_tree_rows, reading_row
from tracker.engine.scoring.score import RowScores, launch_row, read_prefix, run_base
from tracker.engine.scoring.sweep import Engine
from tracker.schema.changes import INTACT

PLAN = plan_streams(single_layers((1, 3)), 4)
TOKENS = tuple(range(3, 9))


def score_row(*args: Any) -> RowScores:
    return launch_row(*args)()


@pytest.fixture
def engine() -> Engine:
    return engine_of("llama")


def test_a_row_without_requests_has_proxies_alone(engine: Engine) -> None:
    (row,) = pack_tree_rows(make_documents(2), MAX_LENGTH, 1000)
    expected = score_row(engine, PLAN, row)
    scores = score_row(engine, PLAN, replace(row, requests=[]))
    assert (scores.loglikelihoods.shape, scores.hits.shape) == ((3, 0), (3, 0, 2))
    assert scores.hits.dtype == expected.hits.dtype
    torch.testing.assert_close(scores.proxies, expected.proxies)
    assert expected.proxies.shape == (2, 3, 4)
    assert score_row(engine, PLAN, replace(row, gold=[])).proxies.shape == (0, 3, 4)


def test_the_proxies_of_a_path_count_its_beginning(engine: Engine) -> None:
    """In float64, as sums over many tokens are kept."""
    documents = make_documents(2, seed=2, shared=20)
    (row,) = pack_tree_rows(documents, MAX_LENGTH, 1000)
    expected = score_row(engine, PLAN, row)
    beginning = documents[0].requests[0].context[:20]
    (rest_row,) = pack_tree_rows(documents, MAX_LENGTH, 1000, 20)
    prefix = read_prefix(engine, PLAN, beginning)
    assert prefix.proxies.shape == (3, 20, 4)
    assert prefix.tokens == beginning
    scores = score_row(engine, PLAN, rest_row, prefix)
    assert scores.proxies.dtype == torch.float64
    torch.testing.assert_close(scores.proxies, expected.proxies, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(scores.loglikelihoods, expected.loglikelihoods, atol=1e-4, rtol=0)
    assert torch.equal(scores.hits, expected.hits)


def test_half_precision_is_summed_in_float32_and_rounded_once() -> None:
    model = tiny_model("llama").bfloat16()
    plan, engine = plan_streams([INTACT], 4), engine_of(model)
    for document in make_documents(3):
        (row,) = pack_tree_rows([document], MAX_LENGTH, 1000)
        scores = score_row(engine, plan, row)
        assert scores.loglikelihoods.dtype == torch.float32
        assert torch.equal(scores.loglikelihoods, scores.loglikelihoods.bfloat16().float())
        expected = dict(enumerate(naive_answers(model, document)))
        loglikelihoods = [expected[request][0] for _, request in row.requests]
        # Two units in the last of eight bits.
        torch.testing.assert_close(
            scores.loglikelihoods[0], torch.tensor(loglikelihoods), rtol=2**-6, atol=0.0
        )


def test_texts_in_rows_of_their_own_need_no_masks(engine: Engine, monkeypatch) -> None:
    (document,) = make_documents(1)
    (tree_row,) = pack_tree_rows([document], MAX_LENGTH, 1000)
    tree_loglikelihoods = score_row(engine, PLAN, tree_row).loglikelihoods
    monkeypatch.delattr(EngineModel, "find_windows")
    for row in pack_flat_rows([document], MAX_LENGTH, 1):
        loglikelihoods = score_row(engine, PLAN, row).loglikelihoods
        for number, request in enumerate(row.requests):
            expected = tree_loglikelihoods[:, tree_row.requests.index(request)]
            torch.testing.assert_close(loglikelihoods[:, number], expected, atol=1e-4, rtol=0)


class TestRefusals:
    def test_layers_that_run_twice(self, engine: Engine) -> None:
        original_forward = engine.head.base.forward

        @functools.wraps(original_forward)
        def forward_twice(**inputs: Any) -> Any:
            original_forward(**inputs)
            return original_forward(**inputs)

        engine.head.base.forward = forward_twice
        with pytest.raises(RefusalError, match=r"^the 4 layers run 8 times in one forward pass$"):
            run_base(engine, plan_streams([INTACT], 4), reading_row(TOKENS), None)

    def test_a_batch_that_is_not_the_texts(self, engine: Engine) -> None:
        def repeat_output(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
            return output.repeat(2, 1, 1)

        engine.head.base.embed_tokens.register_forward_hook(repeat_output)
        message = r"^the layers return shape \(2, 6, 32\), not \[texts, tokens, width\]$"
        with pytest.raises(RefusalError, match=message):
            run_base(engine, plan_streams([INTACT], 4), reading_row(TOKENS), None)
