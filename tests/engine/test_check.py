"""The self-check and the watch: what they compare, what they keep, what stops a cell."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace

import pytest
import torch

from tests.ablations import single_layers
from tests.engine.plain import MAX_LENGTH, Memory, loaded, make_documents
from tracker.core.ablations import INTACT, ablate
from tracker.core.documents import Document, Request
from tracker.core.errors import CellError
from tracker.engine.scoring.rows import Lengths, common_beginning, tree_rows
from tracker.engine.scoring.sharing import DEPTH_ONLY, FULL, ONE_BY_ONE, PLAIN
from tracker.engine.scoring.sweep import Engine
from tracker.engine.selfcheck import reference
from tracker.engine.selfcheck.check import (
    VERDICT,
    _asked,
    _confirm,
    _few,
    check,
    holds_blank,
    plain_tokens,
    reach,
    watch,
    watched_documents,
)
from tracker.engine.selfcheck.miniature_check import check_longer_texts, check_miniature, reachable
from tracker.engine.selfcheck.quirks import find_quirks
from tracker.engine.selfcheck.verdict import Verdict
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
    some = watch(engine, scores, ABLATIONS, "seed", first=2)
    assert {number for _, number, _ in some} == {2, 3, 4}
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
    keys = list(kept)
    made = []
    for name, honest in (
        ("check_miniature", check_miniature),
        ("check_longer_texts", check_longer_texts),
    ):

        def counted(*args, name=name, honest=honest):
            made.append(name)
            return honest(*args)

        monkeypatch.setattr(f"tracker.engine.selfcheck.check.{name}", counted)
    assert check(engine, documents, ABLATIONS, kept).engine.sharing == first.engine.sharing
    assert not made
    # With short texts, and with texts as long as these.
    for key, name in zip(keys, ("check_miniature", "check_longer_texts"), strict=True):
        kept[key] = "{"
        assert check(engine, documents, ABLATIONS, kept).engine.sharing == first.engine.sharing
        assert made.pop() == name
        assert not made
        assert json.loads(kept[key])["sharing"]["depth"] is True
    check(engine, documents, [*ABLATIONS, ablate("mlp", [1])], kept)
    assert len(kept) == 4, "another ablation is another question"


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
    assert plain_tokens(documents, single_layers(range(30)), MAX_LENGTH) < 0.5 * tokens


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
    found = find_quirks(miniature(model), reachable(model, 300))
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
    assert not checked.engine.quirks.leftovers
    assert not checked.engine.quirks.first
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


class Attacked(Memory):
    """Recalls one verdict, whatever was attacked: what follows from it is under test."""

    def __init__(self, sharing=FULL, lost=None, difference=0.0, compared=100, **more):
        verdict = Verdict(sharing, lost, difference, compared, **more)
        self.recall = lambda key: VERDICT.dump_json(verdict).decode()


def checked(model, verdict):
    return check(Engine(loaded(model), MAX_LENGTH), make_documents(3), ABLATIONS, verdict)


def when_masked(model, then):
    """Let something happen where the engine gives the first layer a mask of its own."""

    def hook(module, args, kwargs, output):
        return output if kwargs["attention_mask"] is None else then(output)

    model.model.layers[0].self_attn.register_forward_hook(hook, with_kwargs=True)


def fail(*_):
    raise ValueError("no such mask\nat all")


def test_no_more_is_shared_than_the_attack_allows(tiny_model):
    verdict = Attacked(DEPTH_ONLY, "tokens were lost", 0.5, unsteady=3, stay=True)
    found = checked(tiny_model("llama"), verdict)
    assert found.engine.sharing == DEPTH_ONLY
    assert found.engine.quirks.stay
    assert found.lost == "tokens were lost"
    assert found.difference == 0.5
    unsteady, compared = (int(word) for word in found.unsteady.split() if word.isdigit())
    assert unsteady == 3
    assert compared > 100
    nothing = checked(tiny_model("llama"), Attacked(PLAIN, "all was lost"))
    assert nothing.engine.sharing == PLAIN
    assert (nothing.lost, nothing.unsteady) == ("all was lost", None)
    assert 0 <= nothing.difference < 1e-3


def test_what_the_model_refuses_is_lost_with_its_reason(tiny_model, caplog):
    """In words; what its code said is in the log."""
    caplog.set_level("DEBUG", logger="tracker")
    model = tiny_model("llama")
    when_masked(model, fail)
    found = checked(model, Attacked())
    assert found.engine.sharing == DEPTH_ONLY
    assert found.lost == (
        "shared over depth alone, and not over tokens or documents, because it refuses a row of "
        "several texts with a mask of their own"
    )
    assert "no such mask" in caplog.text


def test_what_changes_an_answer_is_lost_with_how_far(tiny_model, monkeypatch):
    monkeypatch.setattr(reference, "DRAWS", 1)
    model = tiny_model("llama")
    when_masked(model, lambda output: (3 * output[0], *output[1:]))
    found = checked(model, Attacked())
    assert found.engine.sharing == DEPTH_ONLY
    before, nats, after = found.lost.partition(found.lost.split()[-2])
    assert before == (
        "shared over depth alone, and not over tokens or documents, because sharing more changes a "
        "log-likelihood by "
    )
    assert 1e-3 < float(nats) < 100
    assert after == " nats"


def test_a_model_that_does_not_run_says_why(tiny_model):
    model = tiny_model("llama")
    model.model.layers[0].register_forward_hook(fail)
    with pytest.raises(
        CellError, match=r"^LlamaForCausalLM cannot be asked one request at a time: no such"
    ):
        checked(model, Attacked())


@pytest.fixture
def one_answer_off(monkeypatch):
    """Whatever is shared, the first answer is wrong, which no model at hand does by itself."""
    honest = Engine.score

    def off(*arguments):
        first, *others = honest(*arguments)
        wrong = [list(each) for each in first.responses]
        wrong[0][0] = wrong[0][0]._replace(loglikelihood=wrong[0][0].loglikelihood - 1)
        return [replace(first, responses=wrong), *others]

    monkeypatch.setattr(Engine, "score", off)
    monkeypatch.setattr(reference, "DRAWS", 1)


@pytest.mark.usefixtures("one_answer_off")
def test_a_model_that_contradicts_itself_is_not_measured(tiny_model):
    said = r"^LlamaForCausalLM contradicts itself: document \d of task, request 0, .* nats shared"
    with pytest.raises(CellError, match=said):
        checked(tiny_model("llama"), Attacked())


def test_what_several_texts_in_a_call_change_is_asked_one_by_one(tiny_model, monkeypatch):
    honest = Engine.score

    def off(self, *rest):
        monkeypatch.setattr(Engine, "score", honest)
        wrong_by = 1.0 if self.sharing.calls else 0.0
        scores = [
            replace(
                score,
                responses=[
                    [one._replace(loglikelihood=one.loglikelihood - wrong_by) for one in each]
                    for each in score.responses
                ],
            )
            for score in self.score(*rest)
        ]
        monkeypatch.setattr(Engine, "score", off)
        return scores

    monkeypatch.setattr(Engine, "score", off)
    monkeypatch.setattr(reference, "DRAWS", 1)
    found = checked(tiny_model("llama"), Attacked())
    assert found.engine.sharing == ONE_BY_ONE
    assert found.lost == (
        "nothing is shared, and each request is asked alone, because a call of several texts "
        "changes a log-likelihood by 1 nats"
    )
    assert (found.difference, found.unsteady) == (0, None)


def test_a_discontinuous_model_is_said_to_be_one(tiny_model):
    found = checked(tiny_model("llama"), Attacked(unsteady=4))
    assert found.unsteady.startswith("the model is discontinuous: 4 of ")
    assert found.unsteady.endswith(
        " answers move by more than rounding (a router or a top-k near a tie), in lm-eval too"
    )


def test_what_half_precision_moves_is_not_said_of_a_router(tiny_model):
    found = checked(tiny_model("llama").bfloat16(), Attacked(unsteady=3))
    assert found.unsteady.startswith("rounding alone moves 3 of ")
    assert found.unsteady.endswith(
        " answers by more than 0.1 nats and 2 % in half precision, in lm-eval too"
    )


class RoundsByLength(torch.nn.SiLU):
    """Another kernel for rows of many tokens, in which some values are rounded another way."""

    def forward(self, hidden):
        return super().forward(hidden) * (1 + (hidden.shape[1] > 20) * 2**-9)


def test_half_precision_may_differ_by_more(tiny_model):
    """On some machines bfloat16 rounds alike in rows of every length: here it does not."""
    model = tiny_model("llama")
    model.model.layers[1].mlp.act_fn = RoundsByLength()
    assert checked(model, Attacked()).engine.sharing != FULL
    found = checked(model.bfloat16(), Attacked())
    assert found.engine.sharing == FULL
    assert found.unsteady is None
    assert found.difference > 1e-3


def test_a_token_whose_embedding_is_zero_is_looked_for_in_all_that_is_read(tiny_model, monkeypatch):
    model = tiny_model("llama")
    assert not model.get_input_embeddings().weight[0].any()
    with torch.no_grad():
        model.get_input_embeddings().weight[5, 0] = 0  # one number of it, not all

    def held(context: tuple[int, ...], said: tuple[int, ...]) -> bool:
        plain = Document("task", 0, (Request((5, 6), (7,)), Request((5,), (8,))), 0, 2)
        other = Document("task", 1, (Request((5,), (8,)), Request(context, said)), 0, 2)
        return holds_blank(model, [plain, other])

    assert held((5, 0), (7,))
    assert held((5,), (7, 0))
    assert not held((5,), (7,))
    # What a tokenizer says beyond the table is no matter of this.
    assert not held((5, 10**6), (97,))
    model.set_input_embeddings(torch.nn.Embedding(97, 32, device="meta"))
    assert not held((5, 0), (7,))
    model.set_input_embeddings(torch.nn.Identity())
    assert not held((5, 0), (7,))

    def untold(self):
        raise NotImplementedError

    monkeypatch.setattr(type(model), "get_input_embeddings", untold)
    assert not held((5, 0), (7,))


def test_texts_that_hold_such_a_token_are_another_question(tiny_model):
    engine, kept = Engine(loaded(tiny_model("llama")), MAX_LENGTH), Memory()
    for last in (6, 0):
        document = Document("task", 0, (Request((5, last), (7,)), Request((5, last), (8,))), 0, 2)
        assert check(engine, [document], ABLATIONS, kept).engine.sharing == FULL
    assert len(kept) == 4


def test_a_verdict_holds_for_the_lengths_that_it_was_made_for(tiny_model):
    asked, verdict = [], Attacked()
    recall = verdict.recall
    verdict.recall = lambda key: asked.append(key) or recall(key)
    model = tiny_model("mistral")  # with a window, which short rows do not fill
    few = [Document("task", 0, (Request((1,), (2,)),), 0, 1)]
    for row_tokens in (1, 200, 200):
        check(Engine(loaded(model), MAX_LENGTH, row_tokens=row_tokens), few, ABLATIONS, verdict)
    # With short texts, and with texts as long as these.
    first, second, third = asked[:2], asked[2:4], asked[4:]
    assert not {*first} & {*second}
    assert second == third


def test_a_row_reaches_as_far_as_its_beginning_and_the_longest_document(tiny_model):
    documents = make_documents(3, shared=30)
    longest = max(row.tokens for each in documents for row in tree_rows([each], MAX_LENGTH, 1000))
    model = loaded(tiny_model("llama"))
    assert reach(Engine(model, MAX_LENGTH, row_tokens=50), documents).row == longest + 50
    assert reach(Engine(model, MAX_LENGTH, row_tokens=10), documents).row == longest + 30


def test_a_document_of_letters_is_as_wide_as_its_row(tiny_model):
    """The right one is read too, for the proxies."""
    letters = tuple(Request((3,) * 128, (n,)) for n in (5, 6, 7))
    document = Document("task", 0, letters, 0, 3)
    (row,) = tree_rows([document], 1024, 1)
    found = reach(Engine(loaded(tiny_model("llama")), 1024), [document])
    assert found.document == row.tokens == 129


def test_the_shortest_of_the_documents_with_most_answers_are_confirmed():
    def document(index, answers, context, longest=1):
        requests = [Request((1,) * context, (2,))] * (answers - 1)
        last = Request((1,) * context, (2,) * longest)
        return Document("task", index, (*requests, last), 0, answers)

    documents = [
        document(0, 1, 1), document(1, 5, 9), document(2, 4, 3, 16), document(3, 2, 2),
        document(4, 4, 5), document(5, 4, 4),
    ]  # fmt: skip
    assert [each.index for each in _few(documents)] == [5, 4]


def test_what_the_baseline_is_asked_of_one_text_stands_together():
    letters = tuple(Request((1,) * 9, (n,)) for n in range(4))
    documents = [Document("task", index, letters, 0, 4) for index in range(2)]
    places = [place for number, *place in _asked(documents, ABLATIONS) if number == 0]
    assert ABLATIONS[0] == INTACT
    assert places == sorted(places)


def test_of_long_documents_every_ablation_is_asked_both_ends_and_the_baseline_all(
    tiny_model, monkeypatch
):
    """Thirty plain passes over texts of a thousand tokens would be most of the check."""
    common, seen = tuple(3 + n % 90 for n in range(130)), []

    def document(index):
        own = tuple(3 + (index + n) % 90 for n in range(200))
        letters = tuple(Request(common + own, (n,)) for n in (5, 6, 7))
        return Document("task", index, letters, 0, 3)

    honest = Engine.score
    monkeypatch.setattr(Engine, "score", lambda *given: seen.append(given[1:3]) or honest(*given))
    documents, engine = [document(n) for n in range(2)], Engine(loaded(tiny_model("llama")), 1024)
    found = _confirm(engine, documents, ABLATIONS)
    assert (found.wrong, found.compared) == (None, 6 + 6 + 4)
    (whole, alone), (short, everything) = seen
    assert (whole, alone, everything) == (documents, [INTACT], ABLATIONS)
    for long, cut in zip(whole, short, strict=True):
        for one, other in zip(long.requests, cut.requests, strict=True):
            assert other.context == one.context[:128] + one.context[-128:]
            assert other.continuation == one.continuation
    assert len(common_beginning(short, 1024)) >= 128
    assert plain_tokens(documents, ABLATIONS, 1024) == 2 * 330 + (2 + 4) * 256 + 330
    # What is short is asked once, as it is.
    seen.clear()
    _confirm(engine, make_documents(2), ABLATIONS)
    assert [(len(some), removed) for some, removed in seen] == [(2, ABLATIONS)]


def test_each_ablation_is_asked_one_request_and_the_baseline_six():
    requests = tuple(Request((1,) * 9, (n,)) for n in range(4))
    documents = [Document("task", index, requests, 0, 4) for index in range(2)]
    asked = list(_asked(documents, ABLATIONS))
    assert asked == list(_asked(documents, ABLATIONS))
    assert len(asked) == len(set(asked))
    many = Counter(number for number, _, _ in asked)
    assert many == {n: 6 if each == INTACT else 1 for n, each in enumerate(ABLATIONS)}


def test_the_same_ablations_are_watched_again_under_the_same_seed(tiny_model):
    engine = Engine(loaded(tiny_model("llama")), MAX_LENGTH)
    scores = engine.score(make_documents(12), ABLATIONS)
    first, again, other = (
        [number for _, number, _ in watch(engine, scores, ABLATIONS, seed)]
        for seed in ("seed", "seed", "other")
    )
    assert first == again != other


def test_one_document_in_two_hundred_is_watched():
    documents = [Document("task", index, (), None, 0) for index in range(4000)]
    assert 12 <= len(watched_documents(documents)) <= 28


def test_what_is_read_plainly_is_what_was_planned(tiny_model, monkeypatch):
    read, documents = [], make_documents(3)
    honest = Engine.read

    def counted(engine, tokens):
        read.append(len(tokens))
        return honest(engine, tokens)

    monkeypatch.setattr(Engine, "read", counted)
    engine = check(
        Engine(loaded(tiny_model("llama")), MAX_LENGTH), documents, ABLATIONS, Attacked()
    ).engine
    watched = watched_documents(documents)
    some = [d for d in documents if (d.task, d.index) in watched]
    list(watch(engine, engine.score(some, ABLATIONS), ABLATIONS, "seed"))
    assert sum(read) == plain_tokens(documents, ABLATIONS, MAX_LENGTH)


def test_a_second_cell_finds_the_model_as_the_first_one_did(tiny_model):
    """Dynamic rotary factors grow with a long text and stay: not from one cell to the next."""
    from transformers import AutoModelForCausalLM

    config = tiny_model("llama").config
    config.max_position_embeddings = 20
    config.rope_parameters = {"rope_theta": 1e4, "rope_type": "dynamic", "factor": 4.0}
    model = AutoModelForCausalLM.from_config(config).eval()
    documents = make_documents(4, shared=20)
    before = model.model.rotary_emb.inv_freq.clone()
    first = check(Engine(loaded(model), MAX_LENGTH), documents, ABLATIONS)
    assert first.engine.quirks.leftovers
    first.engine.score(documents, ABLATIONS)
    assert torch.equal(model.model.rotary_emb.inv_freq, before)
