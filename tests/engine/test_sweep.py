"""The sweep on tiny random models, shared every way, against the really pruned model."""

from __future__ import annotations

import copy
import random

import pytest
import torch

from tracker.ablations import INTACT, Ablation, single_layers
from tracker.documents import Document, Request
from tracker.engine.check import check
from tracker.engine.rows import flat_rows, tree_rows
from tracker.engine.sweep import DEPTH_ONLY, FULL, PLAIN, Engine
from tracker.errors import CellError
from tracker.models.layers import find_layers
from tracker.models.load import LoadedModel
from tracker.records import ModelIdentity

MAX_LENGTH = 64


def loaded(model):
    identity = ModelIdentity(
        source="tiny", name="tiny", revision=None, fingerprint="0", architecture="", layers=4,
        parameters=1, dtype="float32",
    )  # fmt: skip
    return LoadedModel(model, None, find_layers(model), identity, torch.device("cpu"))


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


def naive(model, document, removed):
    """A second implementation: one request at a time through a copy without the layer."""
    pruned = copy.deepcopy(model)
    layers = find_layers(pruned)
    for index in sorted(removed, reverse=True):
        del layers[index]
    config = pruned.config
    types = vars(config).get("layer_types")
    config.num_hidden_layers = len(layers)
    if types:
        config.layer_types = [t for i, t in enumerate(types) if i not in removed]
    answers = []
    for request in document.requests:
        tokens = (request.context + request.continuation)[-(MAX_LENGTH + 1) :]
        logits = pruned(torch.tensor([tokens[:-1]]), use_cache=False).logits[0]
        logits = logits[-len(request.continuation) :].log_softmax(-1)
        target = torch.tensor(request.continuation)
        answers.append(
            (
                float(logits.gather(1, target[:, None]).sum()),
                bool((logits.argmax(-1) == target).all()),
            )
        )
    return answers


def agree(scores, model, ablations):
    for score in scores:
        for ablation, responses in zip(ablations, score.responses, strict=True):
            truth = naive(model, score.document, ablation.layers)
            for ours, (loglikelihood, greedy) in zip(responses, truth, strict=True):
                assert ours.loglikelihood == pytest.approx(loglikelihood, abs=2e-4), ablation
                assert ours.greedy == greedy


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "gemma3", "gpt_neox", "gpt2"])
@pytest.mark.parametrize("sharing", [FULL, DEPTH_ONLY, PLAIN], ids=["full", "depth", "plain"])
def test_every_stream_is_the_pruned_model(tiny_model, family, sharing):
    model = tiny_model(family)
    ablations = [*single_layers((0, 1, 2, 3)), Ablation((1, 2)), Ablation((0, 3))]
    engine = Engine(loaded(model), MAX_LENGTH, sharing, row_tokens=40)
    agree(engine.score(make_documents(), ablations), model, ablations)


@pytest.mark.parametrize(
    ("family", "sharing"),
    [("llama", FULL), ("gemma3", FULL), ("mamba", DEPTH_ONLY), ("bloom", PLAIN)],
)
def test_the_self_check_keeps_as_much_sharing_as_is_exact(tiny_model, family, sharing):
    model = tiny_model(family)
    documents = make_documents()
    checked = check(Engine(loaded(model), MAX_LENGTH), documents, (0, 1, 2, 3))
    assert checked.engine.sharing == sharing
    assert (checked.lost is None) == (sharing == FULL)
    ablations = single_layers((0, 1, 2, 3))
    agree(checked.engine.score(documents, ablations), model, ablations)


def test_half_precision_keeps_its_sharing(tiny_model):
    """Rounding alone moves a bfloat16 log-likelihood by far more than 1e-3 nats."""
    model = tiny_model("llama").bfloat16()
    checked = check(Engine(loaded(model), MAX_LENGTH), make_documents(), (0, 1, 2, 3))
    assert checked.engine.sharing == FULL
    assert checked.difference > 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_wrong_sharing_is_found(tiny_model, monkeypatch, dtype):
    """A mask that lets a choice see its sibling is wrong without an error: it must be noticed."""
    model = tiny_model("llama").to(dtype)
    honest = tree_rows

    def leaky(documents, max_length, row_tokens):
        for row in honest(documents, max_length, row_tokens):
            row.ancestors[:] = torch.ones_like(row.ancestors).tril()
            yield row

    monkeypatch.setattr("tracker.engine.sweep.tree_rows", leaky)
    checked = check(Engine(loaded(model), MAX_LENGTH), make_documents(), (0, 1, 2, 3))
    assert checked.engine.sharing == DEPTH_ONLY
    assert "tokens" in checked.lost


def test_proxies_are_the_same_however_the_tokens_are_shared(tiny_model):
    model = tiny_model("llama")
    documents = make_documents()
    full = Engine(loaded(model), MAX_LENGTH, FULL, row_tokens=40).score(documents, [INTACT])
    plain = Engine(loaded(model), MAX_LENGTH, PLAIN).score(documents, [INTACT])
    for one, other, document in zip(full, plain, documents, strict=True):
        gold = document.requests[document.gold]
        assert one.proxy_tokens == len(gold.context) + len(gold.continuation)
        assert one.proxy_tokens == other.proxy_tokens
        torch.testing.assert_close(one.proxy_sums, other.proxy_sums, atol=1e-3, rtol=1e-4)


def test_long_contexts_lose_their_beginning_as_in_lm_eval(tiny_model):
    model = tiny_model("llama")
    draw = random.Random(3)
    documents = [
        Document(
            "task", 0,
            tuple(
                Request(tuple(draw.randrange(97) for _ in range(MAX_LENGTH + 20)), (n, 5, 7)[:n])
                for n in (1, 2, 3)
            ),
            1, 3,
        )
    ]  # fmt: skip
    ablations = single_layers((0, 3))
    for sharing in (FULL, DEPTH_ONLY):
        engine = Engine(loaded(model), MAX_LENGTH, sharing)
        scores = engine.score(documents, ablations)
        agree(scores, model, ablations)
        assert scores[0].proxy_tokens == MAX_LENGTH


def test_a_continuation_that_cannot_be_scored_is_refused(tiny_model):
    engine = Engine(loaded(tiny_model("llama")), MAX_LENGTH)
    for continuation in ((), tuple(range(MAX_LENGTH + 1))):
        document = Document("task", 0, (Request((1, 2), continuation),), 0, 1)
        with pytest.raises(CellError, match="continuation"):
            engine.score([document], [INTACT])


def test_a_stream_that_is_not_finite_spoils_only_itself(tiny_model):
    model = tiny_model("llama")
    documents = make_documents(2)
    ablations = single_layers((0, 1, 2, 3))
    clean = Engine(loaded(model), MAX_LENGTH).score(documents, ablations)
    model.model.layers[1].mlp.down_proj.weight[:] = float("nan")
    spoilt = Engine(loaded(model), MAX_LENGTH).score(documents, ablations)
    for one, other in zip(clean, spoilt, strict=True):
        for ablation, ours, theirs in zip(ablations, other.responses, one.responses, strict=True):
            healthy = ablation.layers == (1,)
            for response, truth in zip(ours, theirs, strict=True):
                assert (response.loglikelihood == response.loglikelihood) == healthy
                if healthy:
                    assert response.loglikelihood == pytest.approx(truth.loglikelihood, abs=1e-4)


@pytest.mark.parametrize("pack", [tree_rows, flat_rows])
@pytest.mark.parametrize("row_tokens", [1, 25, 1000])
def test_rows_hold_every_request_once(pack, row_tokens):
    documents = make_documents(7)
    rows = list(pack(documents, MAX_LENGTH, row_tokens))
    requests = [request for row in rows for request in row.requests]
    assert sorted(requests) == [
        (d, r) for d, document in enumerate(documents) for r in range(len(document.requests))
    ]
    assert sorted(d for row in rows for d, _ in row.gold) == list(range(7))
    if pack is tree_rows and row_tokens == 1000:
        together = {
            (request.context + request.continuation)[:end]
            for document in documents
            for request in document.requests
            for end in range(1, len(request.context) + len(request.continuation))
        } | {
            document.requests[document.gold].context + document.requests[document.gold].continuation
            for document in documents
        }
        assert sum(row.tokens for row in rows) == len(together)


def test_a_long_common_beginning_is_paid_for_by_many_documents(tiny_model):
    model = tiny_model("llama")
    documents = make_documents(9, shared=40)
    rows = list(tree_rows(documents, MAX_LENGTH, row_tokens=20))
    assert len(rows) < len(list(tree_rows(make_documents(9, shared=0), MAX_LENGTH, 20)))
    assert all(row.tokens <= 3 * 40 for row in rows)
    ablations = single_layers((0, 1, 2, 3))
    engine = Engine(loaded(model), MAX_LENGTH, row_tokens=20)
    agree(engine.score(documents, ablations), model, ablations)
