"""Helpers of the engine's tests: documents, and a second, naive implementation of scores."""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from tests.conftest import save_tokenizer
from tests.helpers import truth as plain
from tests.helpers.families import tiny_model
from tests.helpers.stored_cells import model_identity
from tests.helpers.truth import pruned_copy, skip_layer
from tracker.engine.scoring.model import FULL, Sharing
from tracker.engine.scoring.sweep import Engine
from tracker.engine.selfcheck.check import VERDICT
from tracker.engine.selfcheck.reference import SharingVerdict
from tracker.models.layers import find_layers
from tracker.models.load import LoadedModel
from tracker.models.sources import ModelSource, find_model
from tracker.schema.documents import Document, Request

MAX_LENGTH = 96


def wrap_model(model: Any) -> LoadedModel:
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
    return Engine(wrap_model(model), **{"max_length": MAX_LENGTH, "sharing": sharing, **settings})


def make_document(
    *pairs: tuple[Sequence[int], Sequence[int]], index: int = 0, **fields: Any
) -> Document:
    """Return a document of requests, each a context and a continuation."""
    requests = tuple(Request(tuple(context), tuple(answer)) for context, answer in pairs)
    return Document("task", index, requests, **{"gold": 0, "choices": len(requests), **fields})


def with_forward(model: Any, forward: Callable[..., Any]) -> Any:
    """Make a model one of a subclass of its class, with another forward pass.

    `forward` gets the model, its own forward pass, and what the model is called with.
    """

    class Changed(type(model)):  # type: ignore[misc]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return forward(self, super().forward, *args, **kwargs)

    model.__class__ = Changed
    return model


class LayerOutput(NamedTuple):
    """Output of some layers, with named values besides the state."""

    state: Tensor
    weights: str


class VerdictMemory(dict[str, str]):
    """Keeps the verdicts of checks for as long as a test wants."""

    recall = dict.get
    keep = dict.__setitem__


class StoredVerdict(VerdictMemory):
    """Recalls one verdict on every architecture, so that only the model itself is checked."""

    def __init__(self, *verdict: Any, **more: Any) -> None:
        verdict = SharingVerdict(*(verdict or (FULL,)), **{"compared": 100, **more})
        self.recall = lambda key: VERDICT.dump_json(verdict).decode()


def assert_same_scores(scores, other_scores):
    """Assert that two sweeps say the same."""
    for a, b in zip(scores, other_scores, strict=True):
        assert a.proxy_tokens == b.proxy_tokens
        sums = a.proxy_sums, b.proxy_sums
        torch.testing.assert_close(*sums, atol=1e-4, rtol=1e-4, equal_nan=True)
        for rows in zip(a.responses, b.responses, strict=True):
            assert_same_responses(*rows)


def assert_same_responses(responses, other_responses):
    """Assert that responses to a document's requests are the same."""
    assert [r[2:] for r in responses] == [r[2:] for r in other_responses]
    lls = [r.loglikelihood for r in other_responses]
    assert [r.loglikelihood for r in responses] == pytest.approx(lls, abs=1e-4)


def make_documents(count=5, seed=0, shared=6):
    """Documents with a common beginning, choices of several lengths, one of them one token long."""
    generator = random.Random(seed)
    common = tuple(generator.randrange(97) for _ in range(shared))
    documents = []
    for index in range(count):
        context = common + tuple(generator.randrange(97) for _ in range(generator.randint(3, 12)))
        lengths = [1, 1, 3, 5][: generator.randint(2, 4)]
        answers = [tuple(generator.randrange(97) for _ in range(n)) for n in lengths]
        gold = generator.randrange(len(answers))
        pairs = ((context, answer) for answer in answers)
        documents.append(make_document(*pairs, index=index, gold=gold))
    return documents


def naive_answers(model: Any, document: Document) -> list[tuple[float, bool]]:
    """Ask a model one request of a document at a time, by its own forward pass."""
    return plain.plain_answers(model, document.requests, MAX_LENGTH)


def gold_tokens(document: Document) -> tuple[int, ...]:
    """Return the context and the gold continuation that proxies are measured on."""
    request = document.requests[document.gold or 0]
    return request.context + request.continuation


def assert_one_sentence(text: str) -> None:
    """See that it is in words that people know, without what a model's code raised."""
    assert not re.search(r"tensor|[Ss]ize|dimension|torch|\w_\w|_\w|['`\n]", text)
    assert "; " not in text
    assert text.count("because") == 1
    clauses = [clause.strip() for clause in re.split(r"[,:]", text)]
    assert len(clauses) == len(set(clauses))


def rounded_rows(weight: Tensor, half: float) -> Tensor:
    """Round each row of a weight to whole steps: the largest one is so many from 0."""
    rounded = weight.detach().clone()
    for row in rounded:
        step = (row.abs().max() / half).clamp_min(1e-7)  # padding is zeros
        row[:] = (row * (1 / step)).round().clamp(-(half + 0.5), half - 0.5) * step
    return rounded


def trace_layers(model: Any, tokens: Sequence[int]) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
    """Read a text plainly: each layer's input and output [tokens, …], and the logits."""
    states = []

    def watch(module: Any, args: Any, kwargs: Any, output: Any) -> None:
        given = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        output = output[0] if isinstance(output, (tuple, list)) else output
        states.append((given[0], output[0]))

    with ExitStack() as stack, torch.inference_mode():
        for layer in find_layers(model):
            stack.enter_context(layer.register_forward_hook(watch, with_kwargs=True))
        return states, model(torch.tensor([tokens]), use_cache=False).logits[0]


@contextmanager
def pruned_model(model: Any, removed: Collection[int]) -> Iterator[Any]:
    """Return a model that really lacks the layers."""
    yield pruned_copy(model, removed)


@contextmanager
def skipping_layers(model: Any, removed: Collection[int]) -> Iterator[Any]:
    """Replace the layers' outputs by their inputs, which is right for every architecture."""
    layers = find_layers(model)
    with ExitStack() as stack:
        for index in removed:
            stack.enter_context(layers[index].register_forward_hook(skip_layer, with_kwargs=True))
        yield model


Ablate = Callable[[Any, Collection[int]], Any]


def assert_naive_scores(scores, model, ablations, ablate: Ablate = pruned_model) -> None:
    """Compare every response of every ablation with the naive one, a document's asked once."""
    for column, ablation in enumerate(ablations):
        truth: dict[Document, list[tuple[float, bool]]] = {}
        with ablate(model, ablation.removed()) as ablated:
            for score in scores:
                if score.document not in truth:
                    truth[score.document] = naive_answers(ablated, score.document)
                pairs = zip(score.responses[column], truth[score.document], strict=True)
                for response, (value, greedy) in pairs:
                    expected = pytest.approx(value, abs=2e-4)
                    assert response.loglikelihood == expected, ablation
                    assert response.greedy == greedy, ablation


PROMPT = torch.tensor([[5, 9, 23, 7, 80, 41, 3, 11, 2, 66]])


def generate_tokens(model, ids, **cache):
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    return model.generate(ids, **settings, **cache).tolist()


def score_sharings(model, sharings, ablations):
    """Score documents with each kind of sharing."""
    documents = make_documents(3)
    engines = (engine_of(model, sharing, row_tokens=40) for sharing in sharings)
    return [engine.score(documents, ablations) for engine in engines]


def assert_changed_scores(ways, ablations, change, tolerance=2e-3):
    """Compare the scores of several ways with models that are really changed.

    `change` makes the model of an ablation. Returns the answers of these models: for each ablation
    those to each document.
    """
    truths = []
    for column, ablation in enumerate(ablations):
        model = change(ablation)
        truths.append([naive_answers(model, score.document) for score in ways[0]])
        for score, truth in chain(*(zip(scores, truths[-1], strict=True) for scores in ways)):
            lls = [response.loglikelihood for response in score.responses[column]]
            expected = [value for value, _ in truth]
            assert lls == pytest.approx(expected, abs=tolerance), ablation.name
    return truths
