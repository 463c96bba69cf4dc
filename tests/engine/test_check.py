"""The self-check and the watch: what they compare, what they keep, what stops a cell."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.helpers.ablations import single_layers
from tests.helpers.engines import MAX_LENGTH, Memory, asking, engine_of, loaded, make_documents
from tests.helpers.families import tiny_model
from tracker.core.changes import INTACT, Ablation
from tracker.core.documents import Document
from tracker.core.errors import CellError
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
    holds_blank,
    plain_tokens,
    reach,
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


def shallow():
    """Return a Llama of two layers."""
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


def test_a_model_that_shared_less_is_asked_again(times_asked):
    """It may have been lost to the moment; a clean verdict on the miniature stays."""
    model = tiny_model("llama")
    when_masked(model, fail)
    assert [times_asked(engine_of(model)) for _ in range(2)] == [3, 3]


class Recalled(Memory):
    """Recalls one verdict, whatever was checked: what follows from it is under test."""

    def __init__(self, *verdict, **more):
        verdict = Verdict(*(verdict or (FULL,)), **{"compared": 100, **more})
        self.recall = lambda key: VERDICT.dump_json(verdict).decode()


def checked(model, verdict=None):
    verdict = Recalled() if verdict is None else verdict
    return check(engine_of(model), make_documents(3), ABLATIONS, verdict)


def when_masked(model, then):
    """Change the output wherever the engine gives the first layer a mask of its own."""

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


def test_a_token_whose_embedding_is_zero_is_looked_for_in_all_that_is_read():
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


def test_a_row_reaches_as_far_as_its_beginning_and_the_longest_document():
    documents = make_documents(3, shared=30)
    longest = max(row.tokens for each in documents for row in tree_rows([each], MAX_LENGTH, 1000))
    model = loaded(tiny_model("llama"))
    assert reach(Engine(model, MAX_LENGTH, row_tokens=50), documents).row == longest + 50
    assert reach(Engine(model, MAX_LENGTH, row_tokens=10), documents).row == longest + 30


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
