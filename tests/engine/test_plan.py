"""Test the predicted cost of a cell against the operations that are then carried out."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tests.helpers.ablations import single_layers
from tests.helpers.engines import MAX_LENGTH, asking, engine_of, make_documents
from tests.helpers.families import tiny_model
from tests.helpers.registry import make_registered
from tracker.core.changes import INTACT, Ablation
from tracker.core.documents import Document
from tracker.engine import plan
from tracker.engine.plan import cost, matrix_rate
from tracker.engine.scoring.head import LOGITS_BYTES
from tracker.engine.scoring.model import stream_bytes
from tracker.engine.scoring.rows import common_beginning
from tracker.engine.scoring.score import SHORTEST
from tracker.engine.selfcheck.check import plain_tokens

ABLATIONS = [*single_layers((0, 1, 2, 3)), Ablation.parse("attention:1"), Ablation.parse("mlp:2")]


def tiny_mixture(experts: int) -> Any:
    """Build a mixture that sends each token to two experts of a layer."""
    return make_registered("mixtral", **{"num_local_experts": experts})


def two_tasks(shared: int) -> list[Document]:
    """Documents of two tasks, one after the other: each task has a common beginning of its own."""
    one, other = make_documents(6, 1, shared), make_documents(5, 2, shared)
    mixed = [*one, *(replace(document, task="other") for document in other)]
    return sorted(mixed, key=lambda document: document.index)


@contextmanager
def counted(model: Any) -> Iterator[Counter[str]]:
    """Count the tokens that a model reads, and that pass its attentions and MLPs."""
    found: Counter[str] = Counter()

    def count(name: str) -> Callable[..., None]:
        def hook(module: Any, args: tuple[Any, ...], output: Any) -> None:
            found[name] += output.shape[:-1].numel()

        return hook

    layers = model.model.layers
    sublayers = [p for each in layers for p in (each.self_attn.o_proj, each.mlp.down_proj)]
    with FlopCounterMode(display=False) as flops, ExitStack() as stack:
        stack.enter_context(model.model.embed_tokens.register_forward_hook(count("tokens")))
        for part in sublayers:
            stack.enter_context(part.register_forward_hook(count("sublayers")))
        yield found
    found["flops"] = flops.get_total_flops()


@pytest.mark.parametrize("shared", [6, SHORTEST])
def test_the_sweep_costs_what_was_said(shared: int) -> None:
    """Rotary positions alone are operations that nobody counts, and half a per cent."""
    model, documents = tiny_model("llama_eager"), two_tasks(shared)
    engine = engine_of(model)
    for task in ("task", "other"):
        beginning = common_beginning([d for d in documents if d.task == task], MAX_LENGTH)
        assert len(beginning) == shared
    said = cost(model, documents, ABLATIONS, MAX_LENGTH)
    # The first cell of a model finds out how far its layers see, and what their keys take.
    engine.score(make_documents(2, 3, shared), ABLATIONS)
    with counted(model) as found:
        for task in ("task", "other"):
            engine.score([d for d in documents if d.task == task], ABLATIONS)
    assert said.documents == 11
    assert said.requests == sum(len(document.requests) for document in documents)
    assert said.tokens == found["tokens"]
    assert said.layer_passes == found["sublayers"] / 2
    assert said.flops == pytest.approx(found["flops"], rel=0.005)
    assert said.check_layer_passes == 4 * plain_tokens(documents, ABLATIONS, MAX_LENGTH)
    assert found["flops"] > 0


def test_other_programs_cost_what_was_said() -> None:
    """Each ablation by itself: lm-eval reads choices of one token after one context once.

    vLLM reads each request with its last token, as long as a token more could be generated.
    """
    model = tiny_model("llama_eager")
    documents = [*make_documents(3), asking((range(90), range(60, 75)), index=3)]
    whole = single_layers((0, 1, 2, 3))
    said = cost(model, documents, whole, MAX_LENGTH)
    texts = [(*r.context, *r.continuation) for d in documents for r in d.requests]
    sequences = {text[:-1][-MAX_LENGTH:] for text in texts}
    assert said.naive_tokens == sum(map(len, sequences)) < said.requests * MAX_LENGTH
    assert MAX_LENGTH in map(len, sequences)
    totals = []
    for read in (sequences, [text[-(MAX_LENGTH - 1) :] for text in texts]):
        totals.append(Counter[str]())
        for ablation in whole:
            without = engine_of(model).without(ablation).loaded.model
            with counted(without) as operations:
                for tokens in read:
                    without(torch.tensor([tokens]), use_cache=False)
            totals[-1].update(operations)
    assert said.plain_layer_passes["lm-eval"] == totals[0]["sublayers"] / 2
    assert said.naive_flops == pytest.approx(totals[0]["flops"], rel=0.005)
    assert said.plain_layer_passes["vllm"] == totals[1]["sublayers"] / 2
    assert said.plain_layer_passes["vllm"] > said.plain_layer_passes["lm-eval"]


def test_the_peak_is_weights_and_the_widest_row_and_logits() -> None:
    model = tiny_model("llama").bfloat16()
    documents = [asking(((1, 2, 3), (4, 5)))]
    said = cost(model, documents, single_layers((0, 1, 2, 3)), MAX_LENGTH)
    weights = sum(2 * parameter.numel() for parameter in model.parameters())
    # Five streams of five tokens, the last one of which is measured and predicts nothing.
    assert said.peak_bytes == weights + 5 * 5 * stream_bytes(model) + 2 * LOGITS_BYTES
    alone = cost(model, documents, [INTACT], MAX_LENGTH)
    assert said.peak_bytes - alone.peak_bytes == 4 * 5 * stream_bytes(model)


def test_weights_need_not_be_there() -> None:
    """`tracker plan` says what a model of any size costs without loading it."""
    model, documents = tiny_model("llama"), make_documents()
    here = cost(model, documents, ABLATIONS, MAX_LENGTH)
    assert cost(model.to("meta"), documents, ABLATIONS, MAX_LENGTH) == here


def test_the_rate_is_operations_in_the_time_they_took(monkeypatch) -> None:
    """On a clock that counts: the first product, which wakes the machine up, is not timed."""
    ticks = itertools.count(70)
    monkeypatch.setattr(plan.time, "perf_counter", lambda: next(ticks) / 10)
    with FlopCounterMode(display=False) as flops:
        rate = matrix_rate()
    # Asked at 7, 7.1, … 7.5 and, to divide by it, at 7.6.
    assert rate == pytest.approx(flops.get_total_flops() * 4 / 5 / 0.6)


def test_a_token_passes_the_experts_that_it_is_sent_to():
    few, many = (tiny_mixture(count) for count in (2, 8))
    two, eight = (plan.reading(model, make_documents(3), MAX_LENGTH) for model in (few, many))
    routers = 2 * two.tokens * (8 - 2) * few.config.hidden_size
    assert eight.engine[1] - two.engine[1] == routers
