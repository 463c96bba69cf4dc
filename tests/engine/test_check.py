"""The self-check and the watch: what they compare, what they keep, what stops a cell."""

from __future__ import annotations

import random
import re
from collections import Counter
from dataclasses import replace

import pytest
import torch

from tests.helpers.ablations import single_layers
from tests.helpers.engines import MAX_LENGTH, Memory, asking, engine_of, loaded, make_documents
from tests.helpers.families import tiny_model
from tracker.core.changes import INTACT, Ablation
from tracker.core.documents import Document
from tracker.core.errors import CellError
from tracker.engine.forward.layer import RandomReplacement
from tracker.engine.scoring.model import DEPTH_ONLY, FULL, ONE_BY_ONE, PLAIN
from tracker.engine.scoring.rows import common_beginning, tree_rows
from tracker.engine.scoring.score import SHORTEST
from tracker.engine.scoring.sweep import Engine
from tracker.engine.selfcheck import check as module
from tracker.engine.selfcheck import reference
from tracker.engine.selfcheck.check import (
    VERDICT,
    check,
    confirm,
    confirmation_rounds,
    draw_answers,
    holds_blank,
    plain_tokens,
    reach,
    shortest_documents,
    watch,
    watched_documents,
)
from tracker.engine.selfcheck.miniature_check import WAYS
from tracker.engine.selfcheck.reference import Reference, Verdict

ABLATIONS = single_layers((0, 1, 2, 3))


def test_one_document_in_two_hundred_is_watched_and_one_a_task_at_least():
    """And stays watched when more come."""
    documents = [
        Document(task, index, (), None, 0) for task in ("one", "other") for index in range(2000)
    ]
    every = watched_documents(documents)
    assert 12 <= len(every) <= 28
    assert every == watched_documents(documents[::-1])
    few = watched_documents([d for d in documents if d.index < 20])
    assert {task for task, _ in few} == {"one", "other"}
    drawn = {place for place in every if place[1] < 20}
    assert few >= drawn


def test_of_many_tasks_with_few_documents_some_are_watched():
    """Answering one document of each of 57 tasks twice would be all of a cell of 57."""

    def tasks(count):
        places = [(f"task {task}", index) for task in range(57) for index in range(count)]
        return {task for task, _ in watched_documents([Document(*d, (), None, 0) for d in places])}

    few, more, every = map(tasks, (1, 4, 16))
    assert len(few) <= 9
    assert 14 <= len(more) <= 20
    assert len(few - more) <= 1, "that of the longest text"
    assert len(every) == 57


def test_every_ablation_is_watched_in_turn_and_the_same_ones_under_the_same_seed():
    engine = engine_of("llama")
    scores = engine.score(make_documents(40), ABLATIONS)

    def watched(seed, first=0):
        return [number for _, number, _ in watch(Reference(engine), scores, ABLATIONS, seed, first)]

    found = list(watch(Reference(engine), scores, ABLATIONS, "seed"))
    assert {number for _, number, _ in found} == {0, 1, 2, 3, 4}
    assert set(watched("seed", first=2)) == {2, 3, 4}
    assert [number for _, number, _ in found] == watched("seed") != watched("other")
    assert [result.document for result, _, _ in found] == [s.document for s in scores]
    for result, _, comparison in found:
        assert comparison.compared == len(result.document.requests)
        assert comparison.wrong is None
        assert comparison.difference < 1e-4


def test_a_wrong_number_is_seen_and_named():
    engine = engine_of("llama")
    (score,) = engine.score(make_documents(1), ABLATIONS)
    ((_, drawn, right),) = watch(Reference(engine), [score], ABLATIONS, "seed")
    assert right.wrong is None
    score.responses[drawn][:] = [
        r._replace(loglikelihood=r.loglikelihood + 0.01) for r in score.responses[drawn]
    ]
    ((_, _, found),) = watch(Reference(engine), [score], ABLATIONS, "seed")
    assert "document 0 of task, request 0" in found.wrong
    assert "on the really pruned model" in found.wrong


def shallow():
    """A Llama of two layers."""
    return tiny_model("llama", num_hidden_layers=2)


def test_a_verdict_is_kept_and_a_damaged_one_is_made_again(spy):
    documents, kept, engine = make_documents(3), Memory(), engine_of(shallow())
    asked = single_layers((0, 1))
    first = check(engine, documents, asked, kept)
    assert first.engine.sharing == FULL
    # With short texts, with texts as long as these, and by the model itself.
    names = ("check_miniature", "check_longer_texts", "confirm")
    made = [spy(module, name, lambda *_: True) for name in names]
    assert check(engine, documents, asked, kept) == first
    assert made == [[], [], []]
    for place, (key, verdict) in enumerate(list(kept.items())):
        # One of another kind is damaged too: a verdict on the architecture confirms nothing.
        for damaged in ("{", list(kept.values())[2 * (place < 2)]):
            kept[key] = damaged
            assert check(engine, documents, asked, kept) == first
            assert kept[key] == verdict
        assert [len(calls) for calls in made] == [2 * (n <= place) for n in range(3)]
    check(engine, documents, [*asked, Ablation.parse("mlp:1")], kept)
    assert len(kept) == 6, "another ablation is another question"


@pytest.fixture
def times_asked(spy):
    """Check a cell; return how often its model itself was asked."""
    verdicts, calls = Memory(), spy(module, "confirm", lambda *_: True)

    def times_asked(engine, documents=(), ablations=ABLATIONS, **more):
        calls.clear()
        check(engine, documents or make_documents(3), ablations, verdicts, **more)
        return len(calls)

    return times_asked


def test_what_a_model_has_confirmed_holds_for_texts_that_are_no_longer(times_asked):
    """Of whatever benchmark."""
    engine = engine_of("llama", max_length=1024)
    long = asking(*((tuple(range(90)) * 2, (n,)) for n in (5, 6)))
    first, other = make_documents(3), make_documents(4, seed=1, shared=60)
    cells = (first, other, [long], [long, *make_documents(2)], first)
    assert [times_asked(engine, documents) for documents in cells] == [1, 0, 1, 0, 0]


def test_it_does_not_hold_of_other_weights_or_what_computes_them(times_asked, monkeypatch):
    def of(model="llama", fingerprint="one", **settings):
        engine = engine_of(model, **settings)
        identity = engine.loaded.identity.model_copy(update={"fingerprint": fingerprint})
        return replace(engine, loaded=replace(engine.loaded, identity=identity))

    half, eager = tiny_model("llama").bfloat16(), tiny_model("llama")
    eager.set_attn_implementation("eager")
    others = [of(fingerprint="other"), of(half), of(eager), of(row_tokens=50), of(max_length=90)]
    assert [times_asked(engine) for engine in (of(), of(), *others)] == [1, 0, *[1] * len(others)]
    assert times_asked(of(), ablations=ABLATIONS[:3])
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "medium")
    assert times_asked(of())
    monkeypatch.setattr(module, "hardware", lambda device: "another processor")
    assert times_asked(of())
    monkeypatch.setattr(module, "_verdict", lambda *_: Verdict(FULL, stay=True))
    assert times_asked(of())


def test_what_was_fitted_on_its_texts_is_confirmed_anew(times_asked):
    cell = {"ablations": [INTACT, Ablation.parse("mean:1")]}
    cell["fit"] = lambda engine: {1: RandomReplacement(1)}
    assert [times_asked(engine_of("llama"), **cell) for _ in range(2)] == [1, 1]


def test_a_model_that_shared_less_is_asked_again(times_asked):
    """It may have been lost to the moment; a clean verdict on the miniature stays."""
    model = tiny_model("llama")
    when_masked(model, fail)
    assert [times_asked(engine_of(model)) for _ in range(2)] == [3, 3]


class Recalled(Memory):
    """Recalls one verdict, whatever was checked: what follows from it is under test.

    `asked` are the keys that it was asked for.
    """

    def __init__(self, *verdict, **more):
        verdict = Verdict(*(verdict or (FULL,)), **{"compared": 100, **more})
        self.asked = []
        self.recall = lambda key: self.asked.append(key) or VERDICT.dump_json(verdict).decode()


def checked(model, verdict=None):
    verdict = Recalled() if verdict is None else verdict
    return check(engine_of(model), make_documents(3), ABLATIONS, verdict)


def when_masked(model, then):
    """Let something happen where the engine gives the first layer a mask of its own."""

    def hook(module, args, kwargs, output):
        return output if kwargs["attention_mask"] is None else then(output)

    model.model.layers[0].self_attn.register_forward_hook(hook, with_kwargs=True)


def fail(*_):
    raise ValueError("no such mask\nat all")


def test_no_more_is_shared_than_the_verdict_allows():
    verdict = Recalled(DEPTH_ONLY, "tokens were lost", 0.5, unsteady=3, stay=True)
    found = checked("llama", verdict)
    assert found.engine.sharing == DEPTH_ONLY
    assert found.engine.quirks.stay
    assert found.lost == "tokens were lost"
    assert found.difference == 0.5
    unsteady, compared = (int(word) for word in found.unsteady.split() if word.isdigit())
    assert unsteady == 3
    assert compared > 100
    nothing = checked("llama", Recalled(PLAIN, "all was lost"))
    assert nothing.engine.sharing == PLAIN
    assert (nothing.lost, nothing.unsteady) == ("all was lost", None)
    assert 0 <= nothing.difference < 1e-3


def test_what_the_model_refuses_is_lost_with_its_reason(caplog):
    """In words; what its code said is in the log."""
    caplog.set_level("DEBUG", logger="tracker")
    model = tiny_model("llama")
    when_masked(model, fail)
    found = checked(model)
    assert found.engine.sharing == DEPTH_ONLY
    assert found.lost == (
        "shared over depth alone, and not over tokens or documents, because it refuses a row of "
        "several texts with a mask of their own"
    )
    assert "no such mask" in caplog.text


def test_what_changes_an_answer_is_lost_with_how_far(monkeypatch):
    monkeypatch.setattr(reference, "DRAWS", 1)
    model = tiny_model("llama")
    when_masked(model, lambda output: (3 * output[0], *output[1:]))
    found = checked(model)
    assert found.engine.sharing == DEPTH_ONLY
    before, nats, after = found.lost.partition(found.lost.split()[-2])
    assert before == (
        "shared over depth alone, and not over tokens or documents, because sharing more changes a "
        "log-likelihood by "
    )
    assert 1e-3 < float(nats) < 100
    assert after == " nats"


def test_what_only_the_longest_text_shows_is_seen(monkeypatch):
    """Was: the shortest documents alone were asked."""
    monkeypatch.setattr(reference, "DRAWS", 1)
    model = tiny_model("llama")
    when_masked(
        model, lambda output: (output[0] * (3 if output[0].shape[1] > 150 else 1), *output[1:])
    )
    documents = make_documents(5)
    engine = engine_of(model, max_length=512, row_tokens=100)
    assert check(engine, documents, ABLATIONS, Recalled()).lost is None
    documents.append(asking(*((tuple(range(3, 93)) * 2, (n, 5)) for n in (5, 6)), index=5))
    assert check(engine, documents, ABLATIONS, Recalled()).engine.sharing == DEPTH_ONLY


def test_a_model_that_does_not_run_says_why():
    model = tiny_model("llama")
    model.model.layers[0].register_forward_hook(fail)
    with pytest.raises(
        CellError, match=r"^LlamaForCausalLM cannot be asked one request at a time: no such"
    ):
        checked(model)


@pytest.fixture
def off(monkeypatch):
    """Lets answers be wrong by a nat in some ways, which no model at hand does by itself."""

    def off(*ways):
        honest = Engine.score

        def wrong(self, *rest):
            scores = honest(self, *rest)
            for answers in (each for score in scores for each in score.responses):
                if self.sharing in ways:
                    answers[:] = [a._replace(loglikelihood=a.loglikelihood - 1) for a in answers]
            return scores

        monkeypatch.setattr(Engine, "score", wrong)
        monkeypatch.setattr(reference, "DRAWS", 1)

    return off


def test_a_model_that_contradicts_itself_is_not_measured(off):
    off(*WAYS, ONE_BY_ONE)
    said = r"^LlamaForCausalLM contradicts itself: document \d of task, request 0, .* nats shared"
    with pytest.raises(CellError, match=said):
        checked("llama")


def test_what_several_texts_in_a_call_change_is_asked_one_by_one(off):
    off(*WAYS)
    found = checked("llama")
    assert found.engine.sharing == ONE_BY_ONE
    assert found.lost == (
        "nothing is shared, and each request is asked alone, because a call of several texts "
        "changes a log-likelihood by 1 nats"
    )
    assert (found.difference, found.unsteady) == (0, None)


@pytest.mark.parametrize(("dtype", "router"), [(torch.float32, True), (torch.bfloat16, False)])
def test_what_half_precision_moves_is_not_said_of_a_router(dtype, router):
    found = checked(tiny_model("llama").to(dtype), Recalled(unsteady=4))
    assert re.search(r"\b4 of \d+ answers", found.unsteady)
    assert ("router" in found.unsteady, "in bfloat16" in found.unsteady) == (router, not router)


class RoundsByLength(torch.nn.SiLU):
    """Another kernel for rows of many tokens, in which some values are rounded another way."""

    def forward(self, hidden):
        return super().forward(hidden) * (1 + (hidden.shape[1] > 20) * 2**-9)


def test_half_precision_may_differ_by_more():
    """On some machines bfloat16 rounds alike in rows of every length: here it does not."""
    model = tiny_model("llama")
    model.model.layers[1].mlp.act_fn = RoundsByLength()
    assert checked(model).engine.sharing != FULL
    found = checked(model.bfloat16())
    assert found.engine.sharing == FULL
    assert found.unsteady is None
    assert found.difference > 1e-3


def test_a_token_whose_embedding_is_zero_is_looked_for_in_all_that_is_read(monkeypatch):
    model = tiny_model("llama")
    assert not model.get_input_embeddings().weight[0].any()
    with torch.no_grad():
        model.get_input_embeddings().weight[5, 0] = 0  # one number of it, not all

    def held(context: tuple[int, ...], said: tuple[int, ...]) -> bool:
        plain = asking(((5, 6), (7,)), ((5,), (8,)))
        return holds_blank(model, [plain, asking(((5,), (8,)), (context, said))])

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


def test_texts_that_hold_such_a_token_are_another_question():
    engine, kept = engine_of(shallow()), Memory()
    for last in (6, 0):
        asked = asking(((5, last), (7,)), ((5, last), (8,)))
        assert check(engine, [asked], single_layers((0,)), kept).engine.sharing == FULL
    assert len(kept) == 6


def keys_of(model, row_tokens):
    """Which verdicts on the architecture a cell recalls: on short texts, and on ones as long."""
    verdict = Recalled()
    check(engine_of(model, row_tokens=row_tokens), [asking(((1,), (2,)))], ABLATIONS, verdict)
    return verdict.asked[:2]


def test_a_verdict_holds_for_the_lengths_that_it_was_made_for():
    model = tiny_model("mistral")  # with a window, which short rows do not fill
    first, second, third = (keys_of(model, row_tokens) for row_tokens in (1, 200, 200))
    assert not {*first} & {*second}
    assert second == third


def test_rows_up_to_the_next_power_of_two_have_one_verdict_on_short_texts():
    """As the user's benchmarks have: each check costs a model of thirty layers seconds."""
    model = tiny_model("mistral", sliding_window=200, max_position_embeddings=256)
    below, beyond, reaching = (keys_of(model, row_tokens)[0] for row_tokens in (150, 240, 255))
    assert below == beyond != reaching


@pytest.mark.parametrize(("switches", "made"), [((), 1), (((200, False),), 3)])
def test_what_longer_texts_have_not_shown_holds_for_shorter_ones(monkeypatch, switches, made):
    """But where something was found, it may be beyond them."""
    calls, verdicts, verdict = [], Memory(), Verdict(FULL, compared=100, switches=switches)
    monkeypatch.setattr(module, "check_longer_texts", lambda *_: calls.append(1) or verdict)
    for tokens in (348, 180, 20):
        documents = [asking((tuple(n % 90 + 3 for n in range(tokens)), (2,)))]
        check(engine_of(shallow(), max_length=512), documents, ABLATIONS[:3], verdicts)
    assert len(calls) == made


def test_a_row_reaches_as_far_as_its_beginning_and_the_longest_document():
    documents = make_documents(3, shared=30)
    longest = max(row.tokens for each in documents for row in tree_rows([each], MAX_LENGTH, 1000))
    model = loaded(tiny_model("llama"))
    assert reach(Engine(model, MAX_LENGTH, row_tokens=50), documents).row == longest + 50
    assert reach(Engine(model, MAX_LENGTH, row_tokens=10), documents).row == longest + 30


def test_a_document_of_letters_is_as_wide_as_its_row():
    """The right one is read too, for the proxies."""
    letters = asking(*(((3,) * 128, (n,)) for n in (5, 6, 7)))
    (row,) = tree_rows([letters], 1024, 1)
    found = reach(engine_of("llama", max_length=1024), [letters])
    assert found.document == row.tokens == 129


def test_the_shortest_of_the_documents_with_most_answers_are_confirmed():
    def made(answers, context, longest=1):
        short = ((1,) * context, (2,))
        return asking(*[short] * (answers - 1), (short[0], (2,) * longest))

    documents = [made(1, 1), made(5, 9), made(4, 3, 16), made(2, 2), made(4, 5), made(4, 4)]
    few = shortest_documents(documents)
    assert [documents.index(each) for each in few] == [5, 4]


def test_of_long_documents_every_ablation_is_asked_both_ends_and_two_the_longest(spy):
    """Thirty plain passes over texts of a thousand tokens would be most of the check."""
    context = tuple(3 + n % 90 for n in range(330))
    documents = [
        asking(*((context + (9,) * index, (n,)) for n in (5, 6, 7)), index=index)
        for index in range(2)
    ]
    seen = spy(Engine, "score", lambda engine, *given: given)
    read = spy(Engine, "read", lambda engine, tokens: len(tokens))
    engine = engine_of("llama", max_length=1024)
    comparison = confirm(engine, Reference(engine), [*confirmation_rounds(documents, ABLATIONS)])
    assert (comparison.wrong, comparison.compared) == (None, 6 + 4 + 2 * 3)
    (short, everything), (whole, two) = seen
    assert (everything, len(two), two[0]) == (ABLATIONS, 2, INTACT)
    assert two[1] in ABLATIONS[1:]
    for long, cut in zip(documents, short, strict=True):
        for one, other in zip(long.requests, cut.requests, strict=True):
            assert other.context == one.context[:48] + one.context[-8:]
            assert other.continuation == one.continuation
    assert len(common_beginning(short, 1024)) >= SHORTEST, "it is read apart here too"
    assert [document.requests for document in whole] == [d.requests for d in documents[::-1]]
    assert sorted(read) == [56] * 6 + [331] * 2, "letters of one text are one call"
    assert plain_tokens(documents, ABLATIONS, 1024) == sum(read) + 330 + 331
    # What is short is asked once, as it is.
    assert len([*confirmation_rounds(make_documents(2), ABLATIONS)]) == 1


def test_of_a_long_document_of_many_texts_one_is_asked():
    """As those of a corpus; its continuations are cut where every ablation is asked."""
    draw = random.Random(0)
    windows = [tuple(draw.randrange(3, 90) for _ in range(n)) for n in (90, 95, 91, 93, 92)]
    long = asking(*(((1,), window) for window in windows), rolling=True)
    (short, _, _), (whole, _, answers) = confirmation_rounds([long], ABLATIONS)
    assert {len(request.continuation) for request in short[0].requests} == {48}
    assert [len(whole[0].requests), whole[0].requests[0]] == [4, long.requests[1]]
    assert answers == [(0, 0, 0), (1, 0, 0)]
    engine = engine_of("llama")
    assert check(engine, [long], ABLATIONS[:2], Recalled()).engine.sharing == FULL


def test_each_ablation_is_asked_one_request_and_the_baseline_six():
    """Of one text, one after the other."""
    documents = [asking(*(((1,) * 9, (n,)) for n in range(4)), index=index) for index in range(2)]
    asked = list(draw_answers(documents, ABLATIONS))
    assert asked == list(draw_answers(documents, ABLATIONS)) == sorted(asked)
    assert len(asked) == len(set(asked))
    many = Counter(number for number, _, _ in asked)
    assert many == {n: 6 if each == INTACT else 1 for n, each in enumerate(ABLATIONS)}


def test_what_is_read_plainly_is_what_was_planned(spy):
    documents = make_documents(3)
    read = spy(Engine, "read", lambda engine, tokens: len(tokens))
    engine = check(engine_of("llama"), documents, ABLATIONS, Recalled()).engine
    watched = watched_documents(documents)
    some = [d for d in documents if (d.task, d.index) in watched]
    list(watch(Reference(engine), engine.score(some, ABLATIONS), ABLATIONS, "seed"))
    assert sum(read) == plain_tokens(documents, ABLATIONS, MAX_LENGTH)


def test_a_second_cell_finds_the_model_as_the_first_one_did():
    """Dynamic rotary factors grow with a long text and stay: not from one cell to the next."""
    from transformers import AutoModelForCausalLM

    config = shallow().config
    config.max_position_embeddings = 20
    config.rope_parameters = {"rope_theta": 1e4, "rope_type": "dynamic", "factor": 4.0}
    model = AutoModelForCausalLM.from_config(config).eval()
    documents = make_documents(4, shared=20)
    before = model.model.rotary_emb.inv_freq.clone()
    first = check(engine_of(model), documents, single_layers((0,)))
    assert first.engine.quirks.leftovers
    first.engine.score(documents, single_layers((0,)))
    assert torch.equal(model.model.rotary_emb.inv_freq, before)
