"""The self-check and the watch: what they compare, what they keep, what stops a cell."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.helpers.ablations import single_layers
from tests.helpers.engines import (
    MAX_LENGTH,
    StoredVerdict,
    VerdictMemory,
    engine_of,
    make_document,
    make_documents,
    wrap_model,
)
from tests.helpers.families import tiny_model
from tracker.engine.scoring.model import DEPTH_ONLY, FULL, ONE_BY_ONE, PLAIN
from tracker.engine.scoring.rows import common_beginning, pack_tree_rows
from tracker.engine.scoring.score import MIN_PREFIX
from tracker.engine.scoring.sweep import Engine
from tracker.engine.selfcheck import check as module
from tracker.engine.selfcheck import reference
from tracker.engine.selfcheck.check import (
    check_sharing,
    compare_rounds,
    compare_watched_documents,
    confirmation_rounds,
    count_unshared_tokens,
    draw_watched_documents,
    has_blank_token,
    measure_reach,
)
from tracker.engine.selfcheck.miniature_check import SHARING_LEVELS
from tracker.engine.selfcheck.reference import Reference, SharingVerdict
from tracker.schema.changes import INTACT, Ablation
from tracker.schema.documents import Document
from tracker.schema.errors import CellError

ABLATIONS = single_layers((0, 1, 2, 3))


def test_one_document_in_two_hundred_is_watched_and_one_a_task_at_least():
    """And stays watched when more come."""
    documents = [Document(task, i, (), None, 0) for task in ("one", "other") for i in range(2000)]
    watched = draw_watched_documents(documents)
    assert 12 <= len(watched) <= 28
    assert watched == draw_watched_documents(documents[::-1])
    few_watched = draw_watched_documents([d for d in documents if d.index < 20])
    assert {task for task, _ in few_watched} == {"one", "other"}
    drawn_keys = {key for key in watched if key[1] < 20}
    assert few_watched >= drawn_keys


def test_every_ablation_is_watched_in_turn_and_the_same_ones_under_the_same_seed():
    engine = engine_of("llama")
    scores = engine.score(make_documents(40), ABLATIONS)

    def watched_numbers(seed, first=0):
        return [
            number
            for _, number, _ in compare_watched_documents(
                Reference(engine), scores, ABLATIONS, seed, first
            )
        ]

    results = list(compare_watched_documents(Reference(engine), scores, ABLATIONS, "seed"))
    assert {number for _, number, _ in results} == {0, 1, 2, 3, 4}
    assert set(watched_numbers("seed", first=2)) == {2, 3, 4}
    assert [n for _, n, _ in results] == watched_numbers("seed") != watched_numbers("other")
    assert [result.document for result, _, _ in results] == [s.document for s in scores]
    for result, _, comparison in results:
        assert comparison.compared == len(result.document.requests)
        assert comparison.wrong is None
        assert comparison.difference < 1e-4


def shallow():
    """Return a Llama of two layers."""
    return tiny_model("llama", num_hidden_layers=2)


@pytest.fixture
def known_architecture(monkeypatch):
    """Take every architecture as checked; its check is the matter of `test_miniature_check`."""
    verdict = SharingVerdict(FULL, None, 1e-6, 100, lengths=((("sliding_window",), True),))
    monkeypatch.setattr(module, "check_miniature", lambda *_: verdict)
    monkeypatch.setattr(module, "check_longer_texts", lambda *_: verdict)


def test_a_verdict_is_kept_and_a_damaged_one_is_made_again(known_architecture, spy):
    documents, store, engine = make_documents(3), VerdictMemory(), engine_of(shallow())
    ablations = single_layers((0, 1))
    first_result = check_sharing(engine, documents, ablations, store)
    assert first_result.engine.sharing == FULL
    # With short texts, with texts as long as these, and by the model itself.
    names = ("check_miniature", "check_longer_texts", "compare_rounds")
    calls_by_name = [spy(module, name, lambda *_: True) for name in names]
    assert check_sharing(engine, documents, ablations, store) == first_result
    assert calls_by_name == [[], [], []]
    for index, (key, verdict) in enumerate(list(store.items())):
        # One of another kind is damaged too: a verdict on the architecture confirms nothing.
        for damaged in ("{", list(store.values())[2 * (index < 2)]):
            store[key] = damaged
            assert check_sharing(engine, documents, ablations, store) == first_result
            assert store[key] == verdict
        assert [len(calls) for calls in calls_by_name] == [2 * (n <= index) for n in range(3)]
    check_sharing(engine, documents, [*ablations, Ablation.parse("mlp:1")], store)
    assert len(store) == 6, "another ablation is another question"


@pytest.fixture
def times_asked(known_architecture, spy):
    """Check a cell; return how often its model itself was asked."""
    verdicts, calls = VerdictMemory(), spy(module, "compare_rounds", lambda *_: True)

    def count_confirmations(engine, documents=(), ablations=ABLATIONS, **more):
        calls.clear()
        check_sharing(engine, documents or make_documents(3), ablations, verdicts, **more)
        return len(calls)

    return count_confirmations


def test_what_a_model_has_confirmed_holds_for_texts_that_are_no_longer(times_asked):
    """Of whatever benchmark."""
    engine = engine_of("llama", max_length=1024)
    document = make_document(*((tuple(range(90)) * 2, (n,)) for n in (5, 6)))
    documents_a, documents_b = make_documents(3), make_documents(4, seed=1, shared=60)
    cells = (documents_a, documents_b, [document], [document, *make_documents(2)], documents_a)
    assert [times_asked(engine, documents) for documents in cells] == [1, 0, 1, 0, 0]


def test_it_does_not_hold_of_other_weights_or_what_computes_them(times_asked, monkeypatch):
    def make_engine(model="llama", fingerprint="one", **settings):
        engine = engine_of(model, **settings)
        identity = engine.loaded.identity.model_copy(update={"fingerprint": fingerprint})
        return replace(engine, loaded=replace(engine.loaded, identity=identity))

    half_model, eager_model = tiny_model("llama").bfloat16(), tiny_model("llama")
    eager_model.set_attn_implementation("eager")
    other_engines = [
        make_engine(fingerprint="other"),
        make_engine(half_model),
        make_engine(eager_model),
        make_engine(row_tokens=50),
        make_engine(max_length=90),
    ]
    counts = [times_asked(engine) for engine in (make_engine(), make_engine(), *other_engines)]
    assert counts == [1, 0, *[1] * len(other_engines)]
    assert times_asked(make_engine(), ablations=ABLATIONS[:3])
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "medium")
    assert times_asked(make_engine())
    monkeypatch.setattr(module, "hardware_name", lambda device: "another processor")
    assert times_asked(make_engine())
    verdict = SharingVerdict(FULL, in_place=True)
    monkeypatch.setattr(module, "_check_architecture", lambda *_: verdict)
    assert times_asked(make_engine())


def test_a_model_that_shared_less_is_asked_again(times_asked):
    """It may have been lost to the moment; a clean verdict on the miniature stays."""
    model = tiny_model("llama")
    when_masked(model, fail)
    assert [times_asked(engine_of(model)) for _ in range(2)] == [3, 3]


def checked(model, verdict=None):
    verdict = StoredVerdict() if verdict is None else verdict
    return check_sharing(engine_of(model), make_documents(3), ABLATIONS, verdict)


def when_masked(model, change_output):
    """Change the output wherever the engine gives the first layer a mask of its own."""

    def hook(module, args, kwargs, output):
        return output if kwargs["attention_mask"] is None else change_output(output)

    model.model.layers[0].self_attn.register_forward_hook(hook, with_kwargs=True)


def fail(*_):
    raise ValueError("no such mask\nat all")


def test_no_more_is_shared_than_the_verdict_allows():
    verdict = StoredVerdict(DEPTH_ONLY, "tokens were lost", 0.5, unsteady=3, in_place=True)
    result = checked("llama", verdict)
    assert result.engine.sharing == DEPTH_ONLY
    assert result.engine.quirks.in_place
    assert result.sharing_note == "tokens were lost"
    assert result.difference == 0.5
    unsteady, compared = (int(word) for word in result.unsteady_note.split() if word.isdigit())
    assert unsteady == 3
    assert compared > 100
    plain_result = checked("llama", StoredVerdict(PLAIN, "all was lost"))
    assert plain_result.engine.sharing == PLAIN
    assert (plain_result.sharing_note, plain_result.unsteady_note) == ("all was lost", None)
    assert 0 <= plain_result.difference < 1e-3


def test_what_only_the_longest_text_shows_is_seen(monkeypatch):
    """Was: the shortest documents alone were asked."""
    monkeypatch.setattr(reference, "NOISE_DRAWS", 1)
    model = tiny_model("llama")
    when_masked(model, lambda out: (out[0] * (3 if out[0].shape[1] > 150 else 1), *out[1:]))
    documents = make_documents(5)
    engine = engine_of(model, max_length=512, row_tokens=100)
    assert check_sharing(engine, documents, ABLATIONS, StoredVerdict()).sharing_note is None
    documents.append(make_document(*((tuple(range(3, 93)) * 2, (n, 5)) for n in (5, 6)), index=5))
    assert check_sharing(engine, documents, ABLATIONS, StoredVerdict()).engine.sharing == DEPTH_ONLY


def test_a_model_that_does_not_run_says_why():
    model = tiny_model("llama")
    model.model.layers[0].register_forward_hook(fail)
    message = "^LlamaForCausalLM fails even if each batch has only one request: no such"
    with pytest.raises(CellError, match=message):
        checked(model)


@pytest.fixture
def off(monkeypatch):
    """Lets answers be wrong by a nat in some ways, which no model at hand does by itself."""

    def off(*ways):
        honest = Engine.score

        def wrong(self, *rest):
            scores = honest(self, *rest)
            for answers in (result for score in scores for result in score.responses):
                if self.sharing in ways:
                    answers[:] = [a._replace(loglikelihood=a.loglikelihood - 1) for a in answers]
            return scores

        monkeypatch.setattr(Engine, "score", wrong)
        monkeypatch.setattr(reference, "NOISE_DRAWS", 1)

    return off


def test_a_model_that_contradicts_itself_is_not_measured(off):
    off(*SHARING_LEVELS, ONE_BY_ONE)
    message = r"^LlamaForCausalLM contradicts itself: document \d of task, request 0, .* nats, but"
    with pytest.raises(CellError, match=message):
        checked("llama")


def test_what_several_texts_in_a_call_change_is_asked_one_by_one(off):
    off(*SHARING_LEVELS)
    result = checked("llama")
    assert result.engine.sharing == ONE_BY_ONE
    assert result.sharing_note == (
        "each request and each ablation is computed separately, because a "
        "call of several texts changes a log-likelihood by 1 nats"
    )
    assert (result.difference, result.unsteady_note) == (0, None)


class RoundsByLength(torch.nn.SiLU):
    """Another kernel for rows of many tokens, in which some values are rounded another way."""

    def forward(self, hidden):
        return super().forward(hidden) * (1 + (hidden.shape[1] > 20) * 2**-9)


def test_half_precision_may_differ_by_more():
    """On some machines bfloat16 rounds alike in rows of every length: here it does not."""
    model = tiny_model("llama")
    model.model.layers[1].mlp.act_fn = RoundsByLength()
    assert checked(model).engine.sharing != FULL
    result = checked(model.bfloat16())
    assert result.engine.sharing == FULL
    assert result.unsteady_note is None
    assert result.difference > 1e-3


def test_a_token_whose_embedding_is_zero_is_looked_for_in_all_that_is_read():
    model = tiny_model("llama")
    assert not model.get_input_embeddings().weight[0].any()
    with torch.no_grad():
        model.get_input_embeddings().weight[5, 0] = 0  # one number of it, not all

    def holds_blank_token(context: tuple[int, ...], continuation: tuple[int, ...]) -> bool:
        plain_document = make_document(((5, 6), (7,)), ((5,), (8,)))
        other_document = make_document(((5,), (8,)), (context, continuation))
        return has_blank_token(model, [plain_document, other_document])

    assert holds_blank_token((5, 0), (7,))
    assert holds_blank_token((5,), (7, 0))
    assert not holds_blank_token((5,), (7,))
    # What a tokenizer says beyond the table is no matter of this.
    assert not holds_blank_token((5, 10**6), (97,))


def test_a_row_reaches_as_far_as_its_beginning_and_the_longest_document():
    documents = make_documents(3, shared=30)
    longest = max(row.tokens for d in documents for row in pack_tree_rows([d], MAX_LENGTH, 1000))
    model = wrap_model(tiny_model("llama"))
    assert measure_reach(Engine(model, MAX_LENGTH, row_tokens=50), documents).row == longest + 50
    assert measure_reach(Engine(model, MAX_LENGTH, row_tokens=10), documents).row == longest + 30


def test_of_long_documents_every_ablation_is_asked_both_ends_and_two_the_longest(spy):
    """Thirty plain passes over texts of a thousand tokens would be most of the check."""
    context = tuple(3 + n % 90 for n in range(330))
    contexts = enumerate([context, (*context, 9)])
    documents = [make_document(*((c, (n,)) for n in (5, 6, 7)), index=i) for i, c in contexts]
    score_calls = spy(Engine, "score", lambda engine, *arguments: arguments)
    read_lengths = spy(Engine, "read_logits", lambda engine, tokens: len(tokens))
    engine = engine_of("llama", max_length=1024)
    comparison = compare_rounds(
        engine, Reference(engine), [*confirmation_rounds(documents, ABLATIONS)]
    )
    assert (comparison.wrong, comparison.compared) == (None, 6 + 4 + 2 * 3)
    (short_documents, all_ablations), (whole_documents, two_ablations) = score_calls
    assert (all_ablations, len(two_ablations), two_ablations[0]) == (ABLATIONS, 2, INTACT)
    assert two_ablations[1] in ABLATIONS[1:]
    for long_document, short_document in zip(documents, short_documents, strict=True):
        for long_request, short_request in zip(
            long_document.requests, short_document.requests, strict=True
        ):
            assert short_request.context == long_request.context[:48] + long_request.context[-8:]
            assert short_request.continuation == long_request.continuation
    assert len(common_beginning(short_documents, 1024)) >= MIN_PREFIX, "it is read apart here too"
    assert [o.requests for o in whole_documents] == [d.requests for d in documents[::-1]]
    assert sorted(read_lengths) == [56] * 6 + [331] * 2, "letters of one text are one call"
    assert count_unshared_tokens(documents, ABLATIONS, 1024) == sum(read_lengths) + 330 + 331
    # What is short is asked once, as it is.
    assert len([*confirmation_rounds(make_documents(2), ABLATIONS)]) == 1


def test_what_is_read_plainly_is_what_was_planned(spy):
    documents = make_documents(3)
    read_lengths = spy(Engine, "read_logits", lambda engine, tokens: len(tokens))
    engine = check_sharing(engine_of("llama"), documents, ABLATIONS, StoredVerdict()).engine
    watched_keys = draw_watched_documents(documents)
    watched_documents_list = [d for d in documents if (d.task, d.index) in watched_keys]
    scores = engine.score(watched_documents_list, ABLATIONS)
    list(compare_watched_documents(Reference(engine), scores, ABLATIONS, "seed"))
    assert sum(read_lengths) == count_unshared_tokens(documents, ABLATIONS, MAX_LENGTH)


def test_a_second_cell_finds_the_model_as_the_first_one_did():
    """Dynamic rotary factors grow with a long text and stay: not from one cell to the next."""
    from transformers import AutoModelForCausalLM

    config = shallow().config
    config.max_position_embeddings = 20
    config.rope_parameters = {"rope_theta": 1e4, "rope_type": "dynamic", "factor": 4.0}
    model = AutoModelForCausalLM.from_config(config).eval()
    documents = make_documents(4, shared=20)
    frequencies = model.model.rotary_emb.inv_freq.clone()
    result = check_sharing(engine_of(model), documents, single_layers((0,)))
    assert result.engine.quirks.leftovers
    result.engine.score(documents, single_layers((0,)))
    assert torch.equal(model.model.rotary_emb.inv_freq, frequencies)
