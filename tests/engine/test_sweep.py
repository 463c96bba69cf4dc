"""The sweep on tiny random models, shared every way, against the really pruned model."""

from __future__ import annotations

import contextlib
import gc
import math
import random
from dataclasses import replace

import accelerate
import pytest
import torch
from torch.nn.modules.module import register_module_forward_pre_hook

from tests.helpers.ablations import parse_ablations, single_layers
from tests.helpers.engines import (
    MAX_LENGTH,
    assert_naive_scores,
    assert_same_responses,
    assert_same_scores,
    engine_of,
    gold_tokens,
    make_document,
    make_documents,
    trace_layers,
    wrap_model,
)
from tests.helpers.families import tiny_model
from tracker.engine.refusal import RefusalError
from tracker.engine.scoring import generation, sweep
from tracker.engine.scoring import model as model_module
from tracker.engine.scoring.generation import generation_groups, prepare_generation
from tracker.engine.scoring.model import (
    DEPTH_ONLY,
    FULL,
    NO_PREFIX,
    ONE_BY_ONE,
    PLAIN,
    Quirks,
    stream_bytes,
)
from tracker.engine.scoring.rows import ANY_LENGTH, Lengths, pack_tree_rows
from tracker.engine.scoring.score import MIN_PREFIX
from tracker.engine.scoring.sweep import Engine
from tracker.engine.selfcheck.check import check_sharing
from tracker.models.pruned import record_state
from tracker.schema.changes import INTACT, Ablation
from tracker.schema.errors import CellError

SINGLE = single_layers((0, 1, 2, 3))
SIX = [*SINGLE, Ablation.parse("layers:1,2"), Ablation.parse("layers:0,3")]
FULL_MEMORY = torch.OutOfMemoryError("CUDA out of memory")


def run_out_of_memory(*args):
    raise FULL_MEMORY


@pytest.fixture
def read(spy):
    """Record the number of tokens of common prefixes that are read."""
    return spy(sweep, "read_prefix", lambda parts, plan, tokens: len(tokens))


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "gemma3", "gpt_neox", "gpt2"])
def test_every_stream_is_the_pruned_model_however_much_is_shared(family):
    model = tiny_model(family)
    scores = [
        score
        for sharing in (FULL, DEPTH_ONLY, PLAIN, ONE_BY_ONE)
        for score in engine_of(model, sharing, row_tokens=40).score(make_documents(), SIX)
    ]
    assert_naive_scores(scores, model, SIX)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_wrong_sharing_is_found(monkeypatch, dtype):
    """A mask that lets a choice see its sibling is wrong without an error: it must be noticed."""
    model = tiny_model("llama", num_hidden_layers=2).to(dtype)
    original_rows, leaked_rows = pack_tree_rows, []

    def leak_siblings(*args, **kwargs):
        for row in original_rows(*args, **kwargs):
            row.spans[:] = torch.arange(row.tokens)
            row.spans[1] = row.tokens
            leaked_rows.append(row)
            yield row

    monkeypatch.setattr(sweep, "pack_tree_rows", leak_siblings)
    result = check_sharing(engine_of(model), make_documents(), single_layers((0,)))
    assert leaked_rows
    assert result.engine.sharing == DEPTH_ONLY
    assert "because sharing more computation changes a log-likelihood by" in result.sharing_note


def test_nothing_of_a_row_waits_for_the_garbage_collector():
    """A mask and the figures of each row would stay on an accelerator."""
    engine = engine_of("llama", row_tokens=40)
    counts = []
    gc.collect()
    gc.disable()
    try:
        for _ in range(2):
            engine.score(make_documents(), SIX)
            counts.append(sum(type(item) is torch.Tensor for item in gc.get_objects()))
    finally:
        gc.enable()
    assert counts[0] == counts[1]


@pytest.mark.parametrize("family", ["llama", "llama_eager", "gemma3_mixed", "qwen2_moe"])
@pytest.mark.parametrize("shared", [6, 60])
def test_rows_of_a_multiple_say_the_same(family, shared):
    documents = make_documents(shared=shared)
    expected, scores = (
        engine_of(family, row_tokens=40, row_multiple=multiple).score(documents, SIX)
        for multiple in (1, 8)
    )
    assert_same_scores(expected, scores)


def test_long_contexts_lose_their_beginning_as_in_lm_eval():
    model = tiny_model("llama")
    generator = random.Random(3)
    contexts = [[generator.randrange(97) for _ in range(MAX_LENGTH + 20)] for _ in range(3)]
    long_document = make_document(*((c, (n, 5, 7)[:n]) for n, c in enumerate(contexts, 1)), gold=1)
    ablations = single_layers((0, 3))
    for sharing in (FULL, DEPTH_ONLY):
        scores = engine_of(model, sharing).score([long_document], ablations)
        assert_naive_scores(scores, model, ablations)
        assert scores[0].proxy_tokens == MAX_LENGTH


def test_a_model_that_takes_no_positions_is_refused():
    """Else each token of a tree would stand where it stands in the row."""
    engine = engine_of("mpt")
    with pytest.raises(RefusalError, match=r"^it takes no positions$"):
        engine.score(make_documents(2), [INTACT])


def test_a_stream_that_is_not_finite_spoils_only_itself():
    model = tiny_model("llama")
    documents = make_documents(2)
    clean_scores = engine_of(model).score(documents, SINGLE)
    model.model.layers[1].mlp.down_proj.weight[:] = float("nan")
    spoilt_scores = engine_of(model).score(documents, SINGLE)
    for clean_score, spoilt_score in zip(clean_scores, spoilt_scores, strict=True):
        for ablation, responses, clean_responses in zip(
            SINGLE, spoilt_score.responses, clean_score.responses, strict=True
        ):
            if ablation.removed() == (1,):
                assert_same_responses(responses, clean_responses)
            else:
                assert all(math.isnan(response.loglikelihood) for response in responses)


def test_a_long_common_beginning_is_read_once_for_all_rows(read):
    """Also for later documents that share a little less of it, and anew when they share little."""
    model = tiny_model("llama")
    engine = engine_of(model, row_tokens=20)
    ablations = [*SINGLE, Ablation.parse("attention:1"), Ablation.parse("mlp:2")]
    documents = make_documents(9, shared=60)
    first_documents = [
        replace(d, requests=tuple(_insert_tokens(d, 60, (7, 7)))) for d in documents[:3]
    ]
    for read_documents in (first_documents, documents[3:]):
        scores = engine.score(read_documents, ablations)
        assert_naive_scores(scores, model, ablations[:5])
        tokens = [len(gold_tokens(document)) for document in read_documents]
        assert [score.proxy_tokens for score in scores] == tokens
    assert read == [62]
    engine.score(make_documents(2, seed=5, shared=60), ablations)
    assert read == [62, 60]


def _insert_tokens(document, index, tokens):
    for request in document.requests:
        context = request.context
        yield replace(request, context=(*context[:index], *tokens, *context[index:]))


def test_a_small_budget_means_smaller_rows_and_fewer_ablations_at_a_time(spy):
    sizes = spy(sweep, "launch_row", lambda parts, plan, row, _: (plan.n_streams, row.tokens))
    model = tiny_model("llama")
    documents = make_documents(6)
    expected = engine_of(model).score(documents, SIX)
    assert max(sizes)[0] == 7
    sizes.clear()
    scores = engine_of(model, memory=3 * 40 * stream_bytes(model)).score(documents, SIX)
    assert all(streams * tokens <= 3 * 40 for streams, tokens in sizes)
    assert_same_scores(scores, expected)


@pytest.mark.parametrize(
    ("lengths", "message"),
    [
        (ANY_LENGTH, "with a single document and a single ablation: .* a larger device"),
        # Requests of a document may stand in several rows there, which cannot be halved.
        (Lengths((10,)), r": CUDA out of memory. Lower --memory \(.*\), or use a smaller dtype"),
    ],
)
def test_out_of_memory_with_nothing_left_to_halve_names_the_way_out(monkeypatch, lengths, message):
    monkeypatch.setattr(sweep, "launch_row", run_out_of_memory)
    engine = engine_of("llama", quirks=Quirks(lengths=lengths))
    with pytest.raises(CellError, match=f"^out of memory ?{message}$"):
        engine.score(make_documents(2), single_layers((0, 1)))


@pytest.mark.parametrize(("fits", "sizes"), [(2, [1] * 6), (4, [3, 3]), (5, [4, 2]), (99, [6])])
def test_texts_are_generated_for_as_many_ablations_as_fit(fits, sizes):
    """Half of the budget holds the keys and values of so many texts, the baseline's among them."""
    model = wrap_model(tiny_model("llama"))
    ablations = parse_ablations("layer:3 baseline mlp:0 mlp:1 mlp:2 mlp:3 layers:1,2")
    # A key and a value for each of two heads of eight numbers, of ten tokens in four layers.
    text_bytes = 2 * 2 * 8 * 4 * 10 * 4
    engine = Engine(model, MAX_LENGTH, memory=2 * fits * text_bytes)
    groups = [group for group, _ in generation_groups(engine, ablations, 10)]
    assert [len(group) - 1 for group in groups] == sizes
    assert all(group[0] == INTACT for group in groups)
    assert [a for group in groups for a in group[1:]] == [a for a in ablations if a != INTACT]
    for tested_engine in (Engine(model, MAX_LENGTH), engine):
        assert list(generation_groups(tested_engine, [INTACT], 10)) == [([INTACT], range(1))]


def test_texts_and_their_samples_are_generated_as_fits():
    """Was new with samples: a row is a text, so samples take the place of changes."""
    ablations = parse_ablations("baseline mlp:0 mlp:1 mlp:2")
    text_bytes = 2 * 2 * 8 * 4 * 10 * 4
    for fits, expected in (
        (8, [("mlp:0 mlp:1 mlp:2", range(2))]),
        (7, [("mlp:0 mlp:1", range(2)), ("mlp:2", range(2))]),
        (2, [(name, range(n, n + 1)) for n in range(2) for name in ("mlp:0", "mlp:1", "mlp:2")]),
    ):
        engine = Engine(wrap_model(tiny_model("llama")), MAX_LENGTH, memory=2 * fits * text_bytes)
        groups = generation_groups(engine, ablations, 10, n_samples=2)
        names = [(" ".join(a.name for a in group[1:]), samples) for group, samples in groups]
        assert names == expected


def test_the_proxies_of_a_long_text_are_those_of_all_its_windows():
    generator = random.Random(1)
    windows = [((1,), [generator.randrange(3, 97) for _ in range(n)]) for n in (30, 30, 9)]
    document = make_document(*windows, gold=None, rolling=True)
    window_documents = [make_document(window, gold=None, rolling=True) for window in windows]
    for row_tokens in (1, 1000):
        engine = engine_of("llama", row_tokens=row_tokens)
        (score,) = engine.score([document], [INTACT])
        window_scores = [engine.score([window], [INTACT])[0] for window in window_documents]
        assert score.proxy_tokens == sum(w.proxy_tokens for w in window_scores) > 60
        proxy_sums = sum(window_score.proxy_sums for window_score in window_scores)
        torch.testing.assert_close(score.proxy_sums, proxy_sums, atol=1e-3, rtol=1e-4)


def test_weights_that_accelerate_brings_in_when_they_are_needed(tmp_path):
    """A model that is spread over devices: here its weights lie on disk until a module runs."""
    documents = make_documents(3, shared=50)
    ablations = [*SINGLE, Ablation.parse("attention:1"), Ablation.parse("mlp:2")]
    expected = engine_of("llama").score(documents, ablations)
    model = tiny_model("llama")
    accelerate.disk_offload(model, tmp_path / "weights", execution_device=torch.device("cpu"))
    assert model.model.layers[2].mlp.up_proj.weight.device.type == "meta"
    for sharing in (FULL, PLAIN):
        assert_same_scores(engine_of(model, sharing).score(documents, ablations), expected)


@pytest.mark.parametrize("sharing", [FULL, PLAIN], ids=["full", "plain"])
def test_the_sums_are_those_of_the_layers_own_inputs_and_outputs(sharing):
    """By hooks on the model as it is; and the hits are the continuation's likeliest tokens."""
    model = tiny_model("llama")
    for read in make_documents(3, seed=2):
        gold = read.requests[read.gold]
        layer_states, logits = trace_layers(model, gold.context + gold.continuation)
        cosines = [torch.cosine_similarity(a, b, dim=-1).sum() for a, b in layer_states]
        updates = [((b - a).norm(dim=-1) / a.norm(dim=-1)).sum() for a, b in layer_states]
        (score,) = engine_of(model, sharing).score([read], [INTACT])
        assert score.proxy_tokens == len(gold.context) + len(gold.continuation)
        proxy_sums = score.proxy_sums.float()
        torch.testing.assert_close(proxy_sums[0], torch.stack(cosines), atol=1e-3, rtol=1e-4)
        torch.testing.assert_close(proxy_sums[2], torch.stack(updates), atol=1e-3, rtol=1e-4)
        likeliest = logits[len(gold.context) - 1 : -1].argmax(-1).tolist()
        n_right = sum(map(int.__eq__, likeliest, gold.continuation))
        assert score.responses[0][read.gold].hits == n_right


def test_what_is_shared_is_named():
    """As it stands in every shard: whoever reads an old one finds the same words."""
    names = {FULL: "depth, tokens, prefix", NO_PREFIX: "depth, tokens", DEPTH_ONLY: "depth"}
    names |= {PLAIN: "nothing", ONE_BY_ONE: "nothing"}
    assert {sharing: str(sharing) for sharing in names} == names


class TestKeptBeginning:
    """A prefix of all documents is read separately if it fits, with the same results."""

    DOCUMENTS = make_documents(3, seed=2, shared=60)
    # Keys and values of two heads of eight numbers, in four layers.
    BYTES = 60 * 4 * (2 * 2 * 8 * 4)

    @pytest.mark.parametrize(("spare", "times"), [(0, 1), (-2, 0)])
    def test_in_half_of_the_budget(self, read, spare, times):
        """Of which the beginning may take half again, beside the rows."""
        expected = engine_of("llama", NO_PREFIX).score(self.DOCUMENTS, [INTACT])
        engine = engine_of("llama", memory=2 * self.BYTES + spare)
        assert_same_scores(engine.score(self.DOCUMENTS, [INTACT]), expected)
        assert read == [60] * times

    def test_it_is_long_enough(self, read):
        engine = engine_of("llama")
        for shared in (MIN_PREFIX, MIN_PREFIX - 1):
            documents = make_documents(3, seed=2, shared=shared)
            assert engine.has_shared_prefix(documents) == (shared == MIN_PREFIX)
            engine.score(documents, [INTACT])
        assert read == [MIN_PREFIX]

    def test_when_memory_runs_out_the_rows_hold_it(self, monkeypatch):
        expected = engine_of("llama", NO_PREFIX).score(self.DOCUMENTS, [INTACT])
        monkeypatch.setattr(sweep, "read_prefix", run_out_of_memory)
        assert_same_scores(engine_of("llama").score(self.DOCUMENTS, [INTACT]), expected)


def test_masks_are_looked_at_in_steps_and_never_beyond_what_is_read(spy):
    lengths = spy(
        model_module, "find_attention_windows", lambda base, layers, tokens, device: tokens
    )
    for max_length, row_lengths, expected in (
        (1000, (2, 256, 257, 3, 990, 1000), [256, 512, 1000]),
        (96, (2, 96), [96]),
        # A row may be longer than any of its texts.
        (96, (2, 130, 40), [96, 130]),
    ):
        engine = engine_of("mistral", max_length=max_length)
        find_windows = engine.find_windows
        assert all(find_windows(tokens).tokens >= tokens for tokens in row_lengths)
        assert lengths == expected
        lengths.clear()


def test_a_model_without_a_cache_continues_no_prompt(monkeypatch):
    for module in (sweep, generation):
        monkeypatch.setattr(module, "find_cache_argument", lambda base: None)
    engine = engine_of("llama")
    assert not engine.has_shared_prefix(make_documents(3, shared=60))
    with pytest.raises(RefusalError, match=r"^the model accepts no key-value cache$"):
        list(generation_groups(engine, [INTACT], 10))
    with prepare_generation(engine, [INTACT], [1, 2, 3]) as arguments:
        assert arguments == {}


def add_mood(model):
    """Add a state to a model that each call changes, which spoils the next call."""
    embeddings = model.get_input_embeddings()
    embeddings.mood = 0.0

    def spoil(module, args, output):
        module.mood += 1
        return output * module.mood

    embeddings.register_forward_hook(spoil)
    return Quirks(leftovers=record_state(model, ("mood",)))


def test_one_by_one_only_the_intact_model_reads_rows_besides():
    """Was: each pruned model did too, for proxies that nobody kept."""
    model = tiny_model("llama")
    documents = make_documents(3, seed=2)
    requests = sum(len(document.requests) for document in documents)
    calls = []

    def count_layers(module, args):
        if isinstance(module, type(model.model)):
            calls.append(len(module.layers))

    hook = register_module_forward_pre_hook(count_layers)
    engine = engine_of(model, ONE_BY_ONE, row_tokens=20)
    try:
        engine.score(documents, single_layers((1, 3)))
    finally:
        hook.remove()
    n_layers = len(model.model.layers)
    assert calls.count(n_layers - 1) == 2 * requests
    assert calls.count(n_layers) > requests


class TestLeftovers:
    """With what calls leave behind put back, a model answers as if it left nothing."""

    @pytest.fixture
    def truth(self):
        return engine_of("llama", row_tokens=20)

    @pytest.fixture
    def engine(self):
        model = tiny_model("llama")
        return engine_of(model, row_tokens=20, quirks=add_mood(model))

    @pytest.mark.parametrize("sharing", [FULL, NO_PREFIX, DEPTH_ONLY, PLAIN, ONE_BY_ONE])
    def test_no_call_depends_on_the_one_before(self, engine, truth, sharing):
        """Was: the look at the masks left its own behind for the row that was scored next."""
        documents = make_documents(3, seed=2, shared=60)
        engine, ablations = engine.with_sharing(sharing), single_layers((1, 3))
        expected = truth.score(documents, ablations)
        for _ in range(2):
            assert_same_scores(engine.score(documents, ablations), expected)
            assert engine.loaded.model.get_input_embeddings().mood == 0
        # A copy without a layer begins as the model did.
        scores = engine.ablate(ablations[1]).score(documents, [INTACT])
        for score, expected_score in zip(scores, expected, strict=True):
            assert_same_responses(score.responses[0], expected_score.responses[1])

    def test_no_text_is_continued_by_what_was_asked_before(self, engine, truth):
        """Was: what a key takes was measured by a call, and the prompt was read after it."""
        prompt = list(range(3, 13))
        for tested_engine in (truth, engine):
            assert (
                len(list(generation_groups(tested_engine, [INTACT, Ablation.parse("layer:1")], 20)))
                == 1
            )
        with (
            prepare_generation(truth, [INTACT], prompt) as expected,
            prepare_generation(engine, [INTACT], prompt) as cached,
        ):
            layer_pairs = zip(expected["cache"].layers, cached["cache"].layers, strict=True)
            assert all(torch.equal(e.keys, layer.keys) for e, layer in layer_pairs)
        assert engine.loaded.model.get_input_embeddings().mood == 0
        with contextlib.suppress(InterruptedError), prepare_generation(engine, [INTACT], prompt):
            raise InterruptedError
        assert engine.loaded.model.get_input_embeddings().mood == 0
