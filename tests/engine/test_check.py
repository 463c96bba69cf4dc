"""The self-check and the watch: what they compare, what they keep, what stops a cell."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from tests.engine.plain import MAX_LENGTH, Memory, loaded, make_documents
from tracker.ablations import ablate, single_layers
from tracker.engine.attack import attack, reachable
from tracker.engine.check import check, plain_tokens, watch, watched_documents
from tracker.engine.habits import find_habits
from tracker.engine.rows import Lengths, tree_rows
from tracker.engine.sweep import FULL, Engine
from tracker.models.miniature import miniature

ABLATIONS = single_layers((0, 1, 2, 3))


def test_documents_are_drawn_once_a_task_at_least_and_stay_drawn_when_more_come():
    documents = [
        replace(d, task=task) for task in ("one", "other") for d in make_documents(600, shared=0)
    ]
    few = [d for d in documents if d.index < 20]
    first = watched_documents(few)
    assert {task for task, _ in first} == {"one", "other"}
    every = watched_documents(documents)
    assert every >= {place for place in first if place in every}
    assert 2 <= len(every) <= 20
    assert every == watched_documents(documents[::-1])


def test_every_ablation_is_watched_in_turn(tiny_model):
    engine = Engine(loaded(tiny_model("llama")), MAX_LENGTH)
    scores = engine.score(make_documents(40), ABLATIONS)
    found = list(watch(engine, scores, ABLATIONS, "seed"))
    assert {number for _, number, _ in found} == {0, 1, 2, 3, 4}
    assert [result.document for result, _, _ in found] == [s.document for s in scores]
    for result, _, comparison in found:
        assert comparison.compared == len(result.document.requests)
        assert comparison.wrong is None
        assert comparison.difference < 1e-4


def test_a_wrong_number_is_seen_and_named(tiny_model):
    engine = Engine(loaded(tiny_model("llama")), MAX_LENGTH)
    (score,) = engine.score(make_documents(1), ABLATIONS)
    for number in range(len(ABLATIONS)):
        responses = [list(each) for each in score.responses]
        responses[number] = [
            r._replace(loglikelihood=r.loglikelihood + 0.01) for r in responses[number]
        ]
        wrong = replace(score, responses=responses)
        (_, drawn, found), *_ = watch(engine, [wrong], ABLATIONS, "seed")
        if drawn == number:
            assert "document 0 of task, request 0" in found.wrong
            assert "on the really pruned model" in found.wrong
            return
    pytest.fail("no ablation was drawn")


def test_a_verdict_is_kept_and_a_damaged_one_is_made_again(tiny_model, monkeypatch):
    model, documents, kept = tiny_model("llama"), make_documents(3), Memory()
    engine = Engine(loaded(model), MAX_LENGTH)
    first = check(engine, documents, ABLATIONS, kept)
    (key,) = kept
    made = []

    def counted(*args):
        made.append(1)
        return attack(*args)

    monkeypatch.setattr("tracker.engine.check.attack", counted)
    assert check(engine, documents, ABLATIONS, kept).engine.sharing == first.engine.sharing
    assert not made
    kept[key] = "{"
    assert check(engine, documents, ABLATIONS, kept).engine.sharing == first.engine.sharing
    assert made == [1]
    assert json.loads(kept[key])["sharing"]["depth"] is True
    check(engine, documents, [*ABLATIONS, ablate("mlp", [1])], kept)
    assert len(kept) == 2, "another ablation is another question"


def test_every_ablation_is_attacked_and_confirmed(tiny_model, monkeypatch):
    asked = set()
    honest = Engine.without

    def noted(self, ablation):
        asked.add(ablation)
        return honest(self, ablation)

    monkeypatch.setattr(Engine, "without", noted)
    ablations = [*single_layers((0, 1, 2, 3)), *(ablate("attention", [i]) for i in range(4))]
    check(Engine(loaded(tiny_model("llama")), MAX_LENGTH), make_documents(3), ablations)
    assert asked >= set(ablations)


def test_what_the_model_reads_plainly_is_a_small_part():
    documents = make_documents(500)
    tokens = sum(
        len(request.context) + len(request.continuation)
        for document in documents
        for request in document.requests
    )
    assert plain_tokens(documents, single_layers(range(30))) < 0.5 * tokens


@pytest.mark.parametrize(
    ("settings", "lengths"),
    [
        ({}, ()),
        (
            {"rope_type": "longrope", "original_max_position_embeddings": 64, "factor": 4.0,
             "short_factor": [1.0] * 4, "long_factor": [3.0, 5.0, 7.0, 9.0]},
            ((("rope_parameters", "original_max_position_embeddings"), False),),
        ),
        ({"rope_type": "dynamic", "factor": 4.0}, ((("max_position_embeddings",), True),)),
    ],
    ids=["default", "longrope", "dynamic"],
)  # fmt: skip
def test_what_the_length_of_a_call_decides_is_found(tiny_model, settings, lengths):
    from transformers import AutoModelForCausalLM

    config = tiny_model("llama").config
    config.rope_parameters = {"rope_theta": 1e4, "rope_type": "default", **settings}
    model = AutoModelForCausalLM.from_config(config).eval()
    found = find_habits(miniature(model), reachable(model, 300))
    assert found.by_call == lengths
    assert found.causal
    assert not found.every_call


def test_requests_of_different_sides_share_no_row_and_each_comes_once():
    documents = make_documents(12, shared=50)
    lengths = Lengths((60,))
    rows = list(tree_rows(documents, MAX_LENGTH, 1000, 50, lengths))
    assert len(rows) > 1
    for row in rows:
        reached = {
            lengths.side(int(row.positions.max()) + 1),
            *(
                lengths.side(len(r.context + r.continuation) - 1)
                for r in (documents[d].requests[i] for d, i in row.requests)
            ),
        }
        assert len(reached) == 1
        assert row.prefix in (0, 50)
    requests = sorted(request for row in rows for request in row.requests)
    assert requests == [
        (d, i) for d, each in enumerate(documents) for i in range(len(each.requests))
    ]
    assert sorted(d for row in rows for d, _ in row.gold) == list(range(12))


def test_a_model_that_no_call_changes_has_no_habits(tiny_model):
    model = tiny_model("llama")
    engine = Engine(loaded(model), MAX_LENGTH)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    checked = check(engine, make_documents(3), ABLATIONS)
    assert checked.engine.sharing == FULL
    assert not checked.engine.habits.leftovers
    assert not checked.engine.habits.first
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
