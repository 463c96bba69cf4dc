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
from tests.helpers.engines import MAX_LENGTH, engine_of, make_document, make_documents
from tests.helpers.families import tiny_model
from tests.helpers.registry import make_registered
from tracker.engine import plan
from tracker.engine.observers.layer_proxies import measure_expert_load
from tracker.engine.observers.taylor import measure_kl_gradients, measure_taylor
from tracker.engine.plan import estimate_cost, measure_matrix_rate
from tracker.engine.scoring.head import LOGITS_BYTES
from tracker.engine.scoring.model import stream_bytes
from tracker.engine.scoring.rows import common_beginning, measured_texts
from tracker.engine.scoring.score import MIN_PREFIX
from tracker.engine.selfcheck.check import count_unshared_tokens
from tracker.schema.changes import INTACT, Ablation
from tracker.schema.documents import Document

ABLATIONS = [*single_layers((0, 1, 2, 3)), Ablation.parse("attention:1"), Ablation.parse("mlp:2")]


def tiny_mixture(experts: int) -> Any:
    """Build a mixture that sends each token to two experts of a layer."""
    return make_registered("mixtral", **{"num_local_experts": experts})


def two_tasks(shared: int) -> list[Document]:
    """Documents of two tasks, one after the other: each task has a common beginning of its own."""
    documents_a, documents_b = make_documents(6, 1, shared), make_documents(5, 2, shared)
    documents = [*documents_a, *(replace(document, task="other") for document in documents_b)]
    return sorted(documents, key=lambda document: document.index)


@contextmanager
def count_operations(model: Any) -> Iterator[Counter[str]]:
    """Count the tokens that a model reads, and that pass its attentions and MLPs."""
    counts: Counter[str] = Counter()

    def count(name: str) -> Callable[..., None]:
        def hook(module: Any, args: tuple[Any, ...], output: Any) -> None:
            counts[name] += output.shape[:-1].numel()

        return hook

    layers = model.model.layers
    sublayers = [p for layer in layers for p in (layer.self_attn.o_proj, layer.mlp.down_proj)]
    with FlopCounterMode(display=False) as flops, ExitStack() as stack:
        stack.enter_context(model.model.embed_tokens.register_forward_hook(count("tokens")))
        for part in sublayers:
            stack.enter_context(part.register_forward_hook(count("sublayers")))
        yield counts
    counts["flops"] = flops.get_total_flops()


@pytest.mark.parametrize("shared", [6, MIN_PREFIX])
def test_the_sweep_costs_what_was_said(shared: int) -> None:
    """Rotary positions alone are operations that nobody counts, and half a per cent."""
    model, documents = tiny_model("llama_eager"), two_tasks(shared)
    engine = engine_of(model)
    for task in ("task", "other"):
        beginning = common_beginning([d for d in documents if d.task == task], MAX_LENGTH)
        assert len(beginning) == shared
    planned = estimate_cost(model, documents, ABLATIONS, MAX_LENGTH)
    # The first cell of a model finds out how far its layers see, and what their keys take.
    engine.score(make_documents(2, 3, shared), ABLATIONS)
    with count_operations(model) as counts:
        for task in ("task", "other"):
            engine.score([d for d in documents if d.task == task], ABLATIONS)
    assert planned.documents == 11
    assert planned.requests == sum(len(document.requests) for document in documents)
    assert planned.tokens == counts["tokens"]
    assert planned.layer_passes == counts["sublayers"] / 2
    assert planned.flops == pytest.approx(counts["flops"], rel=0.005)
    assert planned.check_layer_passes == 4 * count_unshared_tokens(documents, ABLATIONS, MAX_LENGTH)
    assert counts["flops"] > 0


@pytest.mark.parametrize(
    "changes", [("attention:1", "mlp:2"), ("int8:1", "int8:2"), ("expert:0.0", "expert:1.1")]
)
def test_statistics_of_parts_cost_what_was_planned(changes: tuple[str, ...]) -> None:
    is_mixture, documents = "expert" in changes[0], make_documents(4)
    model = tiny_mixture(4) if is_mixture else tiny_model("llama_eager")
    n_layers, engine = model.config.num_hidden_layers, engine_of(model)
    ablations = [Ablation.parse(change) for change in changes]
    parts = [part for ablation in ablations if (part := ablation.part)]
    rounded = [part for part in parts if part.intervention != "remove"]

    def measure() -> None:
        for document in documents:
            if is_mixture:
                measure_expert_load(engine, document, parts)
            measure_taylor(engine, document, parts)
        measure_kl_gradients(engine, documents, rounded)

    measure()  # finds the modules of the parts
    with FlopCounterMode(display=False) as counted:
        measure()
    with FlopCounterMode(display=False) as plain:
        for document in documents:
            for tokens, _ in measured_texts(document, MAX_LENGTH):
                model(torch.tensor([tokens]), use_cache=False)
    planned = estimate_cost(model, documents, [INTACT, *ablations], MAX_LENGTH)
    lengths = [len(t) for d in documents for t, _ in measured_texts(d, MAX_LENGTH)]
    passes = planned.statistics_layer_passes / (n_layers * sum(lengths))
    assert counted.get_total_flops() == pytest.approx(passes * plain.get_total_flops(), rel=0.15)
    args = model, documents, [INTACT, *ablations], MAX_LENGTH
    offloaded = estimate_cost(*args, has_gradients=False)
    assert offloaded.statistics_layer_passes == is_mixture * n_layers * sum(lengths)


def test_other_programs_cost_what_was_said() -> None:
    """Each ablation by itself: lm-eval reads choices of one token after one context once.

    vLLM reads each request with its last token, as long as a token more could be generated.
    """
    model = tiny_model("llama_eager")
    documents = [*make_documents(3), make_document((range(90), range(60, 75)), index=3)]
    ablations = single_layers((0, 1, 2, 3))
    planned = estimate_cost(model, documents, ablations, MAX_LENGTH)
    texts = [(*r.context, *r.continuation) for d in documents for r in d.requests]
    sequences = {text[:-1][-MAX_LENGTH:] for text in texts}
    assert planned.naive_tokens == sum(map(len, sequences)) < planned.requests * MAX_LENGTH
    assert MAX_LENGTH in map(len, sequences)
    totals = []
    for read_texts in (sequences, [text[-(MAX_LENGTH - 1) :] for text in texts]):
        totals.append(Counter[str]())
        for ablation in ablations:
            pruned_model = engine_of(model).ablate(ablation).loaded.model
            with count_operations(pruned_model) as counts:
                for tokens in read_texts:
                    pruned_model(torch.tensor([tokens]), use_cache=False)
            totals[-1].update(counts)
    assert planned.plain_layer_passes["lm-eval"] == totals[0]["sublayers"] / 2
    assert planned.naive_flops == pytest.approx(totals[0]["flops"], rel=0.005)
    assert planned.plain_layer_passes["vllm"] == totals[1]["sublayers"] / 2
    assert planned.plain_layer_passes["vllm"] > planned.plain_layer_passes["lm-eval"]


def test_the_peak_is_weights_and_the_widest_row_and_logits() -> None:
    model = tiny_model("llama").bfloat16()
    documents = [make_document(((1, 2, 3), (4, 5)))]
    planned = estimate_cost(model, documents, single_layers((0, 1, 2, 3)), MAX_LENGTH)
    weights = sum(2 * parameter.numel() for parameter in model.parameters())
    # Five streams of five tokens, the last one of which is measured and predicts nothing.
    assert planned.peak_bytes == weights + 5 * 5 * stream_bytes(model) + 2 * LOGITS_BYTES
    baseline_cost = estimate_cost(model, documents, [INTACT], MAX_LENGTH)
    assert planned.peak_bytes - baseline_cost.peak_bytes == 4 * 5 * stream_bytes(model)


def test_weights_need_not_be_there() -> None:
    """`tracker plan` says what a model of any size costs without loading it."""
    model, documents = tiny_model("llama"), make_documents()
    expected = estimate_cost(model, documents, ABLATIONS, MAX_LENGTH)
    assert estimate_cost(model.to("meta"), documents, ABLATIONS, MAX_LENGTH) == expected


def test_the_rate_is_operations_in_the_time_they_took(monkeypatch) -> None:
    """On a clock that counts: the first product, which wakes the machine up, is not timed."""
    ticks = itertools.count(70)
    monkeypatch.setattr(plan.time, "perf_counter", lambda: next(ticks) / 10)
    with FlopCounterMode(display=False) as flops:
        rate = measure_matrix_rate()
    # Asked at 7, 7.1, … 7.5 and, to divide by it, at 7.6.
    assert rate == pytest.approx(flops.get_total_flops() * 4 / 5 / 0.6)


def test_a_token_passes_the_experts_that_it_is_sent_to():
    small_mixture, large_mixture = (tiny_mixture(count) for count in (2, 8))
    small_work, large_work = (
        plan.count_work(model, make_documents(3), MAX_LENGTH)
        for model in (small_mixture, large_mixture)
    )
    routers = 2 * small_work.tokens * (8 - 2) * small_mixture.config.hidden_size
    assert large_work.engine_operations[1] - small_work.engine_operations[1] == routers
