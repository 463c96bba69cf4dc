"""One row: what is summed, what is refused, and what a row without requests says."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.helpers.ablations import single_layers
from tests.helpers.engines import MAX_LENGTH, answers, engine_of, make_documents
from tests.helpers.families import tiny_model
from tracker.core.changes import INTACT
from tracker.engine.forward.streams import plan_streams
from tracker.engine.refusal import RefusalError
from tracker.engine.scoring.model import EngineModel
from tracker.engine.scoring.rows import flat_rows, reading_row, tree_rows
from tracker.engine.scoring.score import RowScores, launch_row, read_prefix, run_base
from tracker.engine.scoring.sweep import Engine

PLAN = plan_streams(single_layers((1, 3)), 4)
TOKENS = tuple(range(3, 9))


def score_row(*args: Any) -> RowScores:
    return launch_row(*args)()


@pytest.fixture
def engine() -> Engine:
    return engine_of("llama")


def test_a_row_without_requests_has_proxies_alone(engine: Engine) -> None:
    (row,) = tree_rows(make_documents(2), MAX_LENGTH, 1000)
    whole = score_row(engine, PLAN, row)
    found = score_row(engine, PLAN, replace(row, requests=[]))
    assert found.loglikelihoods.shape == found.hits.shape == (3, 0)
    assert found.hits.dtype == whole.hits.dtype
    torch.testing.assert_close(found.proxies, whole.proxies)
    assert whole.proxies.shape == (2, 3, 4)
    assert score_row(engine, PLAN, replace(row, gold=[])).proxies.shape == (0, 3, 4)


def test_the_proxies_of_a_path_count_its_beginning(engine: Engine) -> None:
    """In float64, as sums over many tokens are kept."""
    documents = make_documents(2, seed=2, shared=20)
    (row,) = tree_rows(documents, MAX_LENGTH, 1000)
    whole = score_row(engine, PLAN, row)
    shared = documents[0].requests[0].context[:20]
    (rest,) = tree_rows(documents, MAX_LENGTH, 1000, 20)
    prefix = read_prefix(engine, PLAN, shared)
    assert prefix.proxies.shape == (3, 20, 4)
    assert prefix.tokens == shared
    found = score_row(engine, PLAN, rest, prefix)
    assert found.proxies.dtype == torch.float64
    torch.testing.assert_close(found.proxies, whole.proxies, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(found.loglikelihoods, whole.loglikelihoods, atol=1e-4, rtol=0)
    assert torch.equal(found.hits, whole.hits)


def test_half_precision_is_summed_in_float32_and_rounded_once() -> None:
    model = tiny_model("llama").bfloat16()
    plan, engine = plan_streams([INTACT], 4), engine_of(model)
    for document in make_documents(3):
        (row,) = tree_rows([document], MAX_LENGTH, 1000)
        found = score_row(engine, plan, row)
        assert found.loglikelihoods.dtype == torch.float32
        assert torch.equal(found.loglikelihoods, found.loglikelihoods.bfloat16().float())
        truth = dict(enumerate(answers(model, document)))
        said = [truth[request][0] for _, request in row.requests]
        # Two units in the last of eight bits.
        torch.testing.assert_close(
            found.loglikelihoods[0], torch.tensor(said), rtol=2**-6, atol=0.0
        )


def test_texts_in_rows_of_their_own_need_no_masks(engine: Engine, monkeypatch) -> None:
    (document,) = make_documents(1)
    (tree,) = tree_rows([document], MAX_LENGTH, 1000)
    whole = score_row(engine, PLAN, tree).loglikelihoods
    monkeypatch.delattr(EngineModel, "windows")
    for row in flat_rows([document], MAX_LENGTH, 1):
        found = score_row(engine, PLAN, row).loglikelihoods
        for number, request in enumerate(row.requests):
            expected = whole[:, tree.requests.index(request)]
            torch.testing.assert_close(found[:, number], expected, atol=1e-4, rtol=0)


class TestRefusals:
    def test_layers_that_run_twice(self, engine: Engine) -> None:
        honest = engine.head.base.forward

        @functools.wraps(honest)
        def twice(**given: Any) -> Any:
            honest(**given)
            return honest(**given)

        engine.head.base.forward = twice
        with pytest.raises(RefusalError, match=r"^its 4 layers run 8 times in a pass$"):
            run_base(engine, plan_streams([INTACT], 4), reading_row(TOKENS), None)

    def test_a_batch_that_is_not_the_texts(self, engine: Engine) -> None:
        def twice(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
            return output.repeat(2, 1, 1)

        engine.head.base.embed_tokens.register_forward_hook(twice)
        said = r"^its layers pass on \(2, 6, 32\), and not \[texts, tokens, width\]$"
        with pytest.raises(RefusalError, match=said):
            run_base(engine, plan_streams([INTACT], 4), reading_row(TOKENS), None)
