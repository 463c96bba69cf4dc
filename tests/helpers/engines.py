"""Helpers of the engine's tests: documents, and a second, naive implementation of scores."""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from tests.conftest import save_tokenizer
from tests.helpers import truth as plain
from tests.helpers.families import tiny_model
from tests.helpers.stored_cells import model_identity
from tests.helpers.truth import exported, skip
from tracker.core.documents import Document, Request
from tracker.engine.scoring.model import FULL, Sharing
from tracker.engine.scoring.sweep import Engine
from tracker.models.layers import find_layers
from tracker.models.load import LoadedModel
from tracker.models.sources import ModelSource, find_model

MAX_LENGTH = 96


def loaded(model: Any) -> LoadedModel:
    """Wrap a model that was made here as one that was loaded."""
    weights = hashlib.sha256()
    for weight in model.state_dict().values():
        weights.update(weight.float().cpu().numpy().tobytes() if not weight.is_meta else b"")
    identity = model_identity(source="tiny", name="tiny", fingerprint=weights.hexdigest())
    return LoadedModel(model, None, find_layers(model), identity, torch.device("cpu"))


def save_model(model: Any, folder: Path) -> ModelSource:
    """Save a model that was made here, with a tokenizer, and find it."""
    model.save_pretrained(folder)
    save_tokenizer(folder, False)
    return find_model(str(folder))


def engine_of(model: Any, sharing: Sharing = FULL, **settings: Any) -> Engine:
    """Build an engine for a given model, or for that of a family by its name."""
    model = tiny_model(model) if isinstance(model, str) else model
    return Engine(loaded(model), **{"max_length": MAX_LENGTH, "sharing": sharing, **settings})


def asking(*asked: tuple[Sequence[int], Sequence[int]], index: int = 0, **more: Any) -> Document:
    """Return a document of requests, each a context and a continuation."""
    requests = tuple(Request(tuple(context), tuple(answer)) for context, answer in asked)
    return Document("task", index, requests, **{"gold": 0, "choices": len(requests), **more})


def changed(model: Any, forward: Callable[..., Any]) -> Any:
    """Make a model one of a subclass of its class, with another forward pass.

    `forward` gets the model, its own forward pass, and what the model is called with.
    """

    class Changed(type(model)):  # type: ignore[misc]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return forward(self, super().forward, *args, **kwargs)

    model.__class__ = Changed
    return model


class Output(NamedTuple):
    """Output of some layers, with named values besides the state."""

    state: Tensor
    weights: str


class Memory(dict[str, str]):
    """Keeps the verdicts of checks for as long as a test wants."""

    recall = dict.get
    keep = dict.__setitem__


def same(scores, others):
    """Assert that two sweeps say the same."""
    for ours, theirs in zip(scores, others, strict=True):
        assert ours.proxy_tokens == theirs.proxy_tokens
        sums = ours.proxy_sums, theirs.proxy_sums
        torch.testing.assert_close(*sums, atol=1e-4, rtol=1e-4, equal_nan=True)
        for mine, other in zip(ours.responses, theirs.responses, strict=True):
            agrees(mine, other)


def agrees(responses, others):
    """Assert that responses to a document's requests are the same."""
    assert [r.hits for r in responses] == [r.hits for r in others]
    loglikelihoods = [r.loglikelihood for r in others]
    assert [r.loglikelihood for r in responses] == pytest.approx(loglikelihoods, abs=1e-4)


def make_documents(count=5, seed=0, shared=6):
    """Documents with a common beginning, choices of several lengths, one of them one token long."""
    draw = random.Random(seed)
    common = tuple(draw.randrange(97) for _ in range(shared))
    documents = []
    for index in range(count):
        context = common + tuple(draw.randrange(97) for _ in range(draw.randint(3, 12)))
        lengths = [1, 1, 3, 5][: draw.randint(2, 4)]
        requests = tuple(
            Request(context, tuple(draw.randrange(97) for _ in range(n))) for n in lengths
        )
        documents.append(
            Document("task", index, requests, draw.randrange(len(requests)), len(requests))
        )
    return documents


def answers(model: Any, document: Document) -> list[tuple[float, bool]]:
    """Ask a model one request of a document at a time, by its own forward pass."""
    return plain.answers(model, document.requests, MAX_LENGTH)


def gold_tokens(document: Document) -> tuple[int, ...]:
    """Return the context and the gold continuation that proxies are measured on."""
    request = document.requests[document.gold or 0]
    return request.context + request.continuation


def is_one_sentence(said: str) -> None:
    """See that it is in words that people know, without what a model's code raised."""
    assert not re.search(r"tensor|[Ss]ize|dimension|torch|\w_\w|_\w|['`\n]", said)
    assert "; " not in said
    assert said.count("because") == 1
    clauses = [clause.strip() for clause in re.split(r"[,:]", said)]
    assert len(clauses) == len(set(clauses))


def rounded_rows(weight: Tensor, half: float) -> Tensor:
    """Round each row of a weight to whole steps: the largest one is so many from 0."""
    found = weight.detach().clone()
    for row in found:
        step = (row.abs().max() / half).clamp_min(1e-7)  # padding is zeros
        row[:] = (row * (1 / step)).round().clamp(-(half + 0.5), half - 0.5) * step
    return found


def passed(model: Any, tokens: Sequence[int]) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
    """Read a text plainly: each layer's input and output [tokens, …], and the logits."""
    seen = []

    def watch(module: Any, args: Any, kwargs: Any, output: Any) -> None:
        before = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        seen.append((before[0], output[0][0] if isinstance(output, (tuple, list)) else output[0]))

    with ExitStack() as stack, torch.inference_mode():
        for layer in find_layers(model):
            stack.enter_context(layer.register_forward_hook(watch, with_kwargs=True))
        return seen, model(torch.tensor([tokens]), use_cache=False).logits[0]


@contextmanager
def pruned(model: Any, removed: Collection[int]) -> Iterator[Any]:
    """Return a model that really lacks the layers."""
    yield exported(model, removed)


@contextmanager
def skipped(model: Any, removed: Collection[int]) -> Iterator[Any]:
    """Replace the layers' outputs by their inputs, which is right for every architecture."""
    layers = find_layers(model)
    with ExitStack() as stack:
        for index in removed:
            stack.enter_context(layers[index].register_forward_hook(skip, with_kwargs=True))
        yield model


Ablate = Callable[[Any, Collection[int]], Any]


def agree(
    scores, model, ablations, ablate: Ablate = pruned, atol: float = 2e-4, rtol: float = 0.0
) -> None:
    """Compare every response of every ablation with the naive one, a document's asked once."""
    for column, ablation in enumerate(ablations):
        truth: dict[Document, list[tuple[float, bool]]] = {}
        with ablate(model, ablation.removed()) as ablated:
            for score in scores:
                if score.document not in truth:
                    truth[score.document] = answers(ablated, score.document)
                for ours, (loglikelihood, greedy) in zip(
                    score.responses[column], truth[score.document], strict=True
                ):
                    allowed = atol + rtol * abs(loglikelihood)
                    assert ours.loglikelihood == pytest.approx(loglikelihood, abs=allowed), ablation
                    assert ours.greedy == greedy, ablation


PROMPT = torch.tensor([[5, 9, 23, 7, 80, 41, 3, 11, 2, 66]])


def generate(model, ids, **cached):
    return model.generate(
        ids, max_new_tokens=6, do_sample=False, pad_token_id=0, eos_token_id=None, **cached
    ).tolist()


def score_ways(model, sharings, ablations, documents=None):
    """Score documents with each kind of sharing."""
    documents = documents or make_documents(3)
    return [
        engine_of(model, sharing, row_tokens=40).score(documents, ablations) for sharing in sharings
    ]


def agree_with_changed(ways, ablations, change, within=2e-3):
    """Compare the scores of several ways with models that are really changed.

    `change` makes the model of an ablation. Returns the answers of these models: for each ablation
    those to each document.
    """
    truths = []
    for column, ablation in enumerate(ablations):
        model = change(ablation)
        truths.append([answers(model, score.document) for score in ways[0]])
        for score, truth in ((s, t) for way in ways for s, t in zip(way, truths[-1], strict=True)):
            for ours, (expected, _) in zip(score.responses[column], truth, strict=True):
                assert ours.loglikelihood == pytest.approx(expected, abs=within), ablation.name
    return truths
