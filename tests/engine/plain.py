"""What the engine's tests share: documents, and a second, naive implementation of its scores."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from tracker.core.documents import Document, Request
from tracker.core.identities import ModelIdentity
from tracker.models.layers import find_layers
from tracker.models.load import LoadedModel

MAX_LENGTH = 96


def loaded(model: Any) -> LoadedModel:
    """Wrap a model that was made here as one that was loaded."""
    identity = ModelIdentity(
        source="tiny", name="tiny", revision=None, fingerprint="0", architecture="", layers=4,
        parameters=1, dtype="float32",
    )  # fmt: skip
    return LoadedModel(model, None, find_layers(model), identity, torch.device("cpu"))


class Memory(dict[str, str]):
    """Keeps the verdicts of attacks for as long as a test wants."""

    recall = dict.get
    keep = dict.__setitem__


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


def answers(
    model: Any, document: Document, max_length: int = MAX_LENGTH
) -> list[tuple[float, bool]]:
    """Ask a model one request at a time, by its own forward pass from tokens to logits.

    Requests that differ in their last token alone put the same to the model: it is asked once.
    """
    found = []
    said: dict[tuple[int, ...], torch.Tensor] = {}
    for request in document.requests:
        tokens = (request.context + request.continuation)[-(MAX_LENGTH + 1) :][:-1]
        if tokens not in said:
            with torch.inference_mode():
                said[tokens] = model(torch.tensor([tokens]), use_cache=False).logits[0]
        logits = said[tokens][-len(request.continuation) :].log_softmax(-1)
        target = torch.tensor(request.continuation)
        loglikelihood = float(logits.gather(1, target[:, None]).sum())
        found.append((loglikelihood, bool((logits.argmax(-1) == target).all())))
    return found


@contextmanager
def pruned(model: Any, removed: Collection[int]) -> Iterator[Any]:
    """A copy that really lacks the layers."""
    smaller = copy.deepcopy(model)
    layers = find_layers(smaller)
    for index in sorted(removed, reverse=True):
        del layers[index]
    config = smaller.config
    types = vars(config).get("layer_types")
    config.num_hidden_layers = len(layers)
    if types:
        config.layer_types = [t for i, t in enumerate(types) if i not in removed]
    yield smaller


@contextmanager
def skipped(model: Any, removed: Collection[int]) -> Iterator[Any]:
    """The model with the layers' outputs replaced by their inputs: right for every architecture."""

    def skip(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        # The first GPT's blocks return lists.
        return (hidden, *output[1:]) if isinstance(output, (tuple, list)) else hidden

    layers = find_layers(model)
    hooks = [layers[i].register_forward_hook(skip, with_kwargs=True) for i in removed]
    try:
        yield model
    finally:
        for hook in hooks:
            hook.remove()


Ablate = Callable[[Any, Collection[int]], Any]


def agree(
    scores, model, ablations, ablate: Ablate = pruned, atol: float = 2e-4, rtol: float = 0.0
) -> None:
    """Compare every response of every ablation with the naive one."""
    for column, ablation in enumerate(ablations):
        with ablate(model, ablation.layers) as ablated:
            for score in scores:
                truth = answers(ablated, score.document)
                for ours, (loglikelihood, greedy) in zip(
                    score.responses[column], truth, strict=True
                ):
                    allowed = atol + rtol * abs(loglikelihood)
                    assert ours.loglikelihood == pytest.approx(loglikelihood, abs=allowed), ablation
                    assert ours.greedy == greedy, ablation
