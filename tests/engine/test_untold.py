"""What no number of a configuration tells of: thresholds in code, and heads of their own kind.

Such a class would be wrong without a word if only the configuration's numbers were crossed. It is
attacked with texts and rows as long as the cell's, and where nothing else is exact, asked one
request at a time, which is what everything is held against.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

from tests.ablations import single_layers
from tests.engine.families import SMALL, VOCABULARY
from tests.engine.plain import Memory, loaded
from tests.engine.test_probe_texts import LONGROPE, Draw, attack, tiny
from tracker.core.ablations import INTACT
from tracker.core.errors import CellError
from tracker.engine.scoring.rows import common_beginning, tree_rows
from tracker.engine.scoring.sharing import DEPTH_ONLY, FULL, NO_PREFIX, ONE_BY_ONE
from tracker.engine.scoring.sweep import Engine
from tracker.engine.selfcheck.check import check, watch, watched_documents
from tracker.engine.selfcheck.miniature_check import LONGEST_REACH
from tracker.engine.selfcheck.probe_texts import reaching_calls

pytestmark = pytest.mark.usefixtures("one_thread")


class Turned(LlamaForCausalLM):
    """Positions are taken as its configuration says of the length of a whole call."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        self.model.rotary_emb = Rotary(config)


class Rotary(LlamaRotaryEmbedding):
    def forward(self, x: Tensor, position_ids: Tensor) -> Any:
        length = int(position_ids.max()) + 1
        return super().forward(x, position_ids * self.config.turn(self.config, length))


def stages(config: Any, length: int) -> float:
    return 0.5 ** sum(length > stage for stage in config.stages)


def product(config: Any, length: int) -> float:
    return 0.25 if length > config.trained * config.factor else 1


def written(config: Any, length: int) -> float:
    return 0.25 if length > 67 else 1


def doubling(config: Any, length: int) -> float:
    """Qwen-1's own steps, of powers of two of the length that it was trained with."""
    return 1 / max(1, 2 ** math.ceil(math.log2(length / 32) + 1) - 1)


class NeighbourHead(LlamaForCausalLM):
    """Mixes each state with the one before it, behind the base."""

    def forward(self, input_ids: Tensor, **more: Any) -> CausalLMOutputWithPast:
        more.pop("logits_to_keep", None)
        states = self.model(input_ids=input_ids, **more).last_hidden_state
        before = torch.nn.functional.pad(states, (0, 0, 1, 0))[:, :-1]
        return CausalLMOutputWithPast(logits=self.lm_head(states + 0.5 * before))


class PlaceHead(LlamaForCausalLM):
    """Is less sure the later a token stands in a call."""

    def forward(self, input_ids: Tensor, **more: Any) -> CausalLMOutputWithPast:
        more.pop("logits_to_keep", None)
        logits = self.lm_head(self.model(input_ids=input_ids, **more).last_hidden_state)
        heat = 1 + 0.05 * torch.arange(logits.shape[1], dtype=logits.dtype)
        return CausalLMOutputWithPast(logits=logits / heat[:, None])


class FadingLayer(LlamaDecoderLayer):
    """Halves the tokens from the 150th place of a call on, whatever their positions are."""

    place = 150

    def forward(self, hidden_states: Tensor, **more: Any) -> Tensor:
        out: Tensor = super().forward(hidden_states, **more).clone()
        out[:, self.place :] *= 0.5
        return out


class Fading(LlamaForCausalLM):
    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        for number in range(config.num_hidden_layers):
            self.model.layers[number] = FadingLayer(config, number)


def made(kind: type, **settings: Any) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(**SMALL, initializer_range=0.3)
    for name, value in settings.items():
        setattr(config, name, value)
    return kind(config).float().eval().requires_grad_(False)


@pytest.mark.parametrize(
    ("turn", "settings"),
    [
        (stages, {"stages": [48, 100]}),
        (product, {"trained": 8, "factor": 8.0}),
        (product, {"trained": 1024, "factor": 0.0625}),
        (written, {}),
        (doubling, {}),
    ],
    ids=["list", "multiple", "share", "code", "doubling"],
)
def test_a_threshold_that_no_number_is(monkeypatch, turn: Any, settings: dict[str, Any]) -> None:
    # Of the class: a function would be no part of a configuration that is written down.
    monkeypatch.setattr(LlamaConfig, "turn", staticmethod(turn), raising=False)
    draw = Draw()
    more = draw.tokens(30)
    documents = [
        *draw.spoken((20, 22, 24), (1, 2)),
        draw.document(draw.tokens(62), [more[:1], more]),
        *draw.spoken((72, 54, 84, 40, 110), (2, 3)),
    ]
    attack(made(Turned, **settings), documents, (1, 2))


LATE = [
    (product, {"trained": 16, "factor": 75.0}),
    (lambda config, length: 1 - length / 10**5 if length > 1200 else 1, {}),
]


@pytest.mark.parametrize(("turn", "settings"), LATE, ids=["multiple", "every length"])
def test_a_threshold_beyond_the_lengths_that_are_all_asked(
    monkeypatch, turn: Any, settings: dict[str, Any]
) -> None:
    monkeypatch.setattr(LlamaConfig, "turn", staticmethod(turn), raising=False)
    draw = Draw()
    more = draw.tokens(30)
    documents = [
        draw.document(draw.tokens(1190), [more[:1], more]),
        *draw.spoken((1208, 20, 22), (2, 1)),
    ]
    attack(made(Turned, **{"num_hidden_layers": 2, **settings}), documents, (1,), max_length=1400)


def test_a_threshold_that_only_one_wide_document_reaches() -> None:
    """Its nodes are many and its texts are short: the call is longer than any of them."""
    draw = Draw()
    answers = [draw.tokens(400), draw.tokens(390)]
    documents = [draw.document(draw.tokens(600), answers), *draw.spoken((20, 22), (2, 1))]
    # Of an answer of 400 tokens a thousandth of a nat is rounding.
    attack(made(Counting, num_hidden_layers=2), documents, (1,), max_length=1400, atol=5e-3)


class Counting(LlamaForCausalLM):
    """Turns positions by how many tokens a call has, whatever their positions are."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        self.model.rotary_emb = CountingRotary(config)


class CountingRotary(LlamaRotaryEmbedding):
    def forward(self, x: Tensor, position_ids: Tensor) -> Any:
        return super().forward(x, position_ids * (0.25 if x.shape[1] > 1200 else 1))


class LateFadingLayer(FadingLayer):
    place = 1400


class LateFading(LlamaForCausalLM):
    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        for number in range(config.num_hidden_layers):
            self.model.layers[number] = LateFadingLayer(config, number)


def test_what_only_code_counts_so_late_is_seen_in_the_longest_document() -> None:
    """A place in the call that is no position, which no miniature's row has: the watch is asked."""
    model = made(LateFading, num_hidden_layers=3)
    draw = Draw()
    documents = [
        *draw.spoken([20] * 50, (1, 2)),
        draw.document(draw.tokens(700), [draw.tokens(400), draw.tokens(390)]),
    ]
    ablations = single_layers((1,))
    found = check(Engine(loaded(model), 1400), documents, ablations)
    assert found.engine.sharing == FULL
    watched = watched_documents(documents)
    some = [document for document in documents if (document.task, document.index) in watched]
    scores = found.engine.score(some, ablations)
    wrong = [compared.wrong for *_, compared in watch(found.engine, scores, ablations, "seed")]
    (said,) = filter(None, wrong)
    assert "document 50 of task" in said


def test_a_threshold_below_the_smallest_that_is_tried() -> None:
    rope = {**LONGROPE, "original_max_position_embeddings": 3}
    documents = [*Draw().spoken((20, 12), (2, 3)), *Draw(1).spoken((1, 2, 1, 3, 2), (1, 2))]
    attack(tiny("LlamaConfig", **SMALL, rope_parameters=rope), documents, (1, 2))


@pytest.mark.parametrize("kind", [NeighbourHead, PlaceHead])
def test_a_head_that_sees_more_than_one_state(kind: type) -> None:
    model = made(kind)
    documents = Draw().spoken((12, 9, 20), (1, 3))
    attack(model, documents, (1, 2))
    found = check(Engine(loaded(model), 256), documents, single_layers((1, 2)))
    assert found.engine.sharing == ONE_BY_ONE
    assert str(found.engine.sharing) == "nothing"
    assert found.lost is not None
    assert found.lost.count("changes a log-likelihood by") == 1
    assert "because a call of several texts changes a log-likelihood by " in found.lost
    # It is no discontinuity of the model.
    assert found.unsteady is None


def test_places_beyond_all_positions() -> None:
    documents = [*Draw().letters((40, 40, 45, 30, 60, 30, 40)), *Draw(1).spoken((12, 9), (1, 3))]
    attack(made(Fading), documents, (1, 2))


def test_what_has_no_such_thing_shares_all() -> None:
    model = made(LlamaForCausalLM)
    documents = Draw().spoken((12, 9, 20), (1, 3))
    assert check(Engine(loaded(model), 256), documents, [INTACT]).engine.sharing == FULL


def test_texts_are_asked_on_both_sides_of_every_length() -> None:
    for longest in (96, 100, 256, 1024):
        lengths, rows, wide, behind = reaching_calls(97, longest, 192, 2 * longest, FULL)
        # Asked alone, a request takes a call as long as all of it but its last token.
        sides = [
            (len(d.requests[0].context), len(d.requests[1].context + d.requests[1].continuation))
            for d in lengths
        ]
        assert max(whole for _, whole in sides) <= longest
        crossed = {n for alone, whole in sides for n in range(alone, whole)}
        assert crossed >= set(range(2, max(crossed)))
        assert max(crossed) >= longest - 3
        row = next(tree_rows(rows, longest, 192))
        assert row.tokens > 192 - 16
        assert int(row.positions.max()) < 24
        (alone,) = tree_rows(wide, longest, 192)
        assert alone.tokens > 1.5 * longest
        for document in (*wide, *behind):
            assert all(len(r.context + r.continuation) <= longest for r in document.requests)


def test_a_row_of_one_document_is_as_wide_as_a_cell_s() -> None:
    for widest in (64, 300, 1000):
        *_, wide, behind = reaching_calls(97, 128, 192, widest, FULL)
        (alone,) = tree_rows(wide, 128, 192)
        assert alone.tokens >= widest
        assert alone.tokens > 128  # more than any text has, however narrow the cell's are
        assert int(alone.positions.max()) < 128
        # Behind a kept beginning, rows are as full as without one.
        rows = list(tree_rows(behind, 128, 192, 64))
        assert max(row.tokens for row in rows) > 192 - 16


def test_longer_texts_are_the_same_ones_every_time() -> None:
    calls = reaching_calls(97, 256, 192, 256, FULL)
    assert calls == reaching_calls(97, 256, 192, 256, FULL)
    # The first two tokens are special in many a vocabulary.
    tokens = {t for call in calls for d in call for r in d.requests for t in r.context}
    assert (min(tokens), max(tokens)) == (2, 96)


def test_no_text_is_asked_for_what_nothing_shares() -> None:
    lengths, rows, wide, behind = reaching_calls(97, 256, 192, 256, FULL)
    assert reaching_calls(97, 256, 192, 256, NO_PREFIX) == [lengths, rows, wide]
    assert reaching_calls(97, 256, 192, 256, DEPTH_ONLY) == [lengths, rows]
    assert len(common_beginning(behind, 256)) >= 128
    assert [len(d.requests[0].context) - 128 for d in behind] == [63, 7, *[13] * 12]
    assert max(len(r.context + r.continuation) for d in behind for r in d.requests) == 256


def test_no_block_is_without_a_document() -> None:
    for longest, nodes in ((4, 1), (8, 7), (9, 300)):
        assert all(reaching_calls(97, longest, nodes, longest, FULL))


def test_one_text_of_more_nodes_than_the_model_has_places() -> None:
    """GPT-Neo's own mask is as wide as its places: it refuses such a row, in the attack already."""
    model = tiny(
        "GPTNeoConfig", vocab_size=VOCABULARY, hidden_size=32, num_layers=4, num_heads=4,
        attention_types=[[["global"], 4]], max_position_embeddings=128,
    )  # fmt: skip
    documents = [*Draw().spoken((12, 9, 14), (1, 3, 1, 2)), *Draw(1).spoken((70,), (50, 50))]
    attack(model, documents, (1, 2), row_tokens=100, max_length=128)


def test_a_text_is_no_longer_than_the_cell_can_make_it() -> None:
    """Of one order of length there is one verdict, and of short texts one for all."""
    kept = Memory()
    model = made(LlamaForCausalLM, max_position_embeddings=4096)
    # A token whose embedding is zero would be a question of its own.
    model.get_input_embeddings().weight[0] = 1
    for contexts, verdicts in (((12, 20), 2), ((9, 30), 2), ((400,), 3)):
        documents = Draw().spoken(contexts, (1, 3))
        check(Engine(loaded(copy.deepcopy(model)), 1024), documents, single_layers((1,)), kept)
        assert len(kept) == verdicts
    assert LONGEST_REACH == 1024


class Reader(LlamaForCausalLM):
    """Reads twice as many tokens as it says; Moshi reads one more."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        self.model.embed_tokens = torch.nn.Embedding(2 * config.vocab_size, config.hidden_size)


def test_it_is_asked_only_for_what_it_can_say() -> None:
    attack(made(Reader), Draw().spoken((12, 9, 20), (1, 3)), (1, 2))


class Listing(LlamaForCausalLM):
    """Returns a tuple, whatever it is asked for."""

    def forward(self, *args: Any, **more: Any) -> Any:
        return super().forward(*args, **more).to_tuple()


class Last(LlamaForCausalLM):
    """Returns what it says of the last token alone, as models made for generating may do."""

    def forward(self, *args: Any, **more: Any) -> Any:
        return super().forward(*args, **{**more, "logits_to_keep": 1})


class ForGood(LlamaForCausalLM):
    """A call of a few tokens turns positions for good, as BigBird drops its sparse attention."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        self.switch: dict[str, float] = {}

    def forward(self, input_ids: Tensor, **more: Any) -> Any:
        self.count(input_ids.shape[1])
        places = more.pop("position_ids", None)
        if places is None:
            places = torch.arange(input_ids.shape[1])[None]
        turned = (places * self.switch.get("turn", 1.0)).long()
        return super().forward(input_ids, position_ids=turned, **more)

    def count(self, tokens: int) -> None:
        if tokens < 100:
            self.switch["turn"] = 0.5


class Tiring(ForGood):
    """Counts its calls where nobody looks, and turns positions by how many there were."""

    def count(self, tokens: int) -> None:
        self.switch["turn"] = self.switch.get("turn", 1.0) * 0.99


@pytest.mark.parametrize("kind", [ForGood, Tiring])
def test_what_the_texts_before_one_matter_to_is_refused(kind: type) -> None:
    engine = Engine(loaded(made(kind)), 256)
    said = rf"^{kind.__name__} contradicts itself: it says \S+ nats of a text after shorter ones, "
    with pytest.raises(CellError, match=said):
        check(engine, Draw().spoken((110, 120), (1, 3)), single_layers((1, 2)))


def test_an_attention_that_a_short_text_switches_off_is_refused() -> None:
    """BigBird's as a decoder, whose answers hang on whether a short text came before."""
    model = tiny(
        "BigBirdConfig", vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48,
        num_hidden_layers=4, num_attention_heads=4, max_position_embeddings=300, is_decoder=True,
        attention_type="block_sparse", block_size=4, num_random_blocks=1,
    )  # fmt: skip
    engine = Engine(loaded(model), 200)
    with pytest.raises(CellError, match="BigBirdForCausalLM contradicts itself: it says "):
        check(engine, Draw().spoken((40, 45, 60), (1, 3)), single_layers((1, 2)))


@pytest.mark.parametrize("contexts", [(1200, 1240), (1240,)])
def test_also_where_that_is_a_product_beyond_the_lengths_that_are_all_asked(contexts) -> None:
    """(5 + 2 · 3) · 112 = 1,232 tokens; from its 2,017th on this one cannot be asked at all."""
    model = tiny(
        "BigBirdConfig", vocab_size=VOCABULARY, hidden_size=16, intermediate_size=16,
        num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=2048, is_decoder=True,
        attention_type="block_sparse", block_size=112, num_random_blocks=3,
    )  # fmt: skip
    engine = Engine(loaded(model), 2048)
    with pytest.raises(CellError, match="BigBirdForCausalLM contradicts itself: it says "):
        check(engine, Draw().spoken(contexts, (1, 3)), single_layers((1,)))


@pytest.mark.parametrize("kind", [Listing, Last])
def test_what_returns_something_else_is_refused_in_words(kind: type) -> None:
    said = rf"^{kind.__name__} .*it does not return 'logits' of every token"
    engine = Engine(loaded(made(kind)), 256)
    with pytest.raises(CellError, match=said):
        check(engine, Draw().spoken((12, 9), (1, 3)), single_layers((1, 2)))
