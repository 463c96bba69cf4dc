"""Test facts that no number of a configuration reveals: thresholds in code, and custom heads.

Such a class would silently be wrong if the check crossed only the configuration's numbers. It is
checked with texts and rows as long as the cell's. If nothing else is exact, it is computed one
request at a time, which is the reference.
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

from tests.helpers.ablations import single_layers
from tests.helpers.cells import (
    LONGROPE,
    VERDICTS,
    DocumentGenerator,
    long_documents,
    measure_cell,
    tiny_model_of,
)
from tests.helpers.engines import VerdictMemory, wrap_model
from tests.helpers.families import SMALL_CONFIG
from tracker.engine.scoring.model import FULL, ONE_BY_ONE
from tracker.engine.scoring.sweep import Engine
from tracker.engine.selfcheck import miniature_check
from tracker.engine.selfcheck.check import (
    check_sharing,
    compare_watched_documents,
    draw_watched_documents,
)
from tracker.engine.selfcheck.reference import Reference
from tracker.schema.changes import INTACT
from tracker.schema.errors import CellError

pytestmark = pytest.mark.usefixtures("one_thread")


class Rotary(LlamaRotaryEmbedding):
    def forward(self, x: Tensor, position_ids: Tensor) -> Any:
        factor = TURNS[self.config.turned](self.config, int(position_ids.max()) + 1)
        return super().forward(x, position_ids * factor)


class CountingRotary(LlamaRotaryEmbedding):
    def forward(self, x: Tensor, position_ids: Tensor) -> Any:
        return super().forward(x, position_ids * (0.25 if x.shape[1] > 1200 else 1))


class Turned(LlamaForCausalLM):
    """Positions are taken as its configuration says of the length of a whole call."""

    rotary = Rotary

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        self.model.rotary_emb = self.rotary(config)


class Counting(Turned):
    """Turns positions by how many tokens a call has, whatever their positions are."""

    rotary = CountingRotary


def stages(config: Any, length: int) -> float:
    return 0.5 ** sum(length > stage for stage in config.stages)


def product(config: Any, length: int) -> float:
    return 0.25 if length > config.trained * config.factor else 1


def written(config: Any, length: int) -> float:
    return 0.25 if length > 67 else 1


def doubling(config: Any, length: int) -> float:
    """Qwen-1's own steps, of powers of two of the length that it was trained with."""
    return 1 / max(1, 2 ** math.ceil(math.log2(length / 32) + 1) - 1)


def sinking(config: Any, length: int) -> float:
    return 1 - length / 10**4 if length > 150 else 1


TURNS = {turn.__name__: turn for turn in (stages, product, written, doubling, sinking)}
"""By what is written in a configuration."""


class OwnHead(LlamaForCausalLM):
    """A custom head that computes logits from the states of the base model."""

    def forward(self, input_ids: Tensor, **extra: Any) -> CausalLMOutputWithPast:
        extra.pop("logits_to_keep", None)
        states = self.model(input_ids=input_ids, **extra).last_hidden_state
        return CausalLMOutputWithPast(logits=self.compute_logits(states))


class NeighbourHead(OwnHead):
    """Mixes each state with the one before it."""

    def compute_logits(self, states: Tensor) -> Tensor:
        previous_states = torch.nn.functional.pad(states, (0, 0, 1, 0))[:, :-1]
        return self.lm_head(states + 0.5 * previous_states)


class PlaceHead(OwnHead):
    """Is less sure the later a token stands in a call."""

    def compute_logits(self, states: Tensor) -> Tensor:
        heat = 1 + 0.05 * torch.arange(states.shape[1], dtype=states.dtype)
        return self.lm_head(states) / heat[:, None]


class FadingLayer(LlamaDecoderLayer):
    """Halves the tokens from a position of a call on, whatever their positions are."""

    def forward(self, hidden_states: Tensor, **extra: Any) -> Tensor:
        output: Tensor = super().forward(hidden_states, **extra).clone()
        output[:, self.position :] *= 0.5
        return output


class Fading(LlamaForCausalLM):
    position = 150

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        for layer in self.model.layers:
            layer.__class__, layer.position = FadingLayer, self.position


class LateFading(Fading):
    position = 1400


def make_model(kind: type, **settings: Any) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(**SMALL_CONFIG | {"num_hidden_layers": 2}, initializer_range=0.3)
    for name, value in settings.items():
        setattr(config, name, value)
    return kind(config).float().eval().requires_grad_(False)


@pytest.mark.parametrize(
    "settings",
    [
        {"turned": "stages", "stages": [48, 70, 100]},
        {"turned": "product", "trained": 8, "factor": 8.0},
        {"turned": "written"},
        {"turned": "doubling"},
    ],
    ids=["list", "multiple", "code", "doubling"],
)
def test_a_threshold_that_no_number_is(settings: dict[str, Any]) -> None:
    draw = DocumentGenerator()
    answer = draw.draw_tokens(30)
    documents = [
        *draw.long_documents((20, 22, 24), (1, 2)),
        draw.make_document(draw.draw_tokens(62), [answer[:1], answer]),
        *draw.long_documents((72, 54, 84, 40, 110), (2, 3)),
    ]
    measure_cell(make_model(Turned, **settings), documents, (1,))


def test_a_threshold_beyond_the_lengths_that_are_all_asked() -> None:
    draw = DocumentGenerator()
    answer = draw.draw_tokens(30)
    documents = [draw.make_document(draw.draw_tokens(1190), [answer[:1], answer])]
    documents += draw.long_documents((1208, 20, 22), (2, 1))
    model = make_model(Turned, turned="product", trained=16, factor=75.0)
    measure_cell(model, documents, (1,), max_length=1400)


def test_beyond_them_every_length_may_be_another(monkeypatch) -> None:
    """Fewer lengths are all asked here, so that those beyond them are short."""
    monkeypatch.setattr(miniature_check, "LONGEST_REACH", 128)
    draw = DocumentGenerator()
    answer = draw.draw_tokens(30)
    documents = [draw.make_document(draw.draw_tokens(140), [answer[:1], answer])]
    documents += draw.long_documents((158, 20, 22), (2, 1))
    measure_cell(make_model(Turned, turned="sinking"), documents, (1,))


def test_a_threshold_that_only_one_wide_document_reaches() -> None:
    """Its nodes are many and its texts are short: the call is longer than any of them."""
    draw = DocumentGenerator()
    answers = [draw.draw_tokens(400), draw.draw_tokens(390)]
    documents = [draw.make_document(draw.draw_tokens(600), answers)]
    documents += draw.long_documents((20, 22), (2, 1))
    # Of an answer of 400 tokens a thousandth of a nat is rounding.
    measure_cell(make_model(Counting), documents, (1,), max_length=1400, atol=5e-3)


def test_what_only_code_counts_so_late_is_seen_in_the_longest_document() -> None:
    """An index in the call that no row of a miniature reaches: the watch finds it."""
    model = make_model(LateFading, num_hidden_layers=3)
    draw = DocumentGenerator()
    documents = [
        *draw.long_documents([20] * 50, (1, 2)),
        draw.make_document(draw.draw_tokens(700), [draw.draw_tokens(400), draw.draw_tokens(390)]),
    ]
    ablations = single_layers((1,))
    result = check_sharing(Engine(wrap_model(model), 1400), documents, ablations)
    assert result.engine.sharing == FULL
    watched_keys = draw_watched_documents(documents)
    recheck_documents = [d for d in documents if (d.task, d.index) in watched_keys]
    scores = result.engine.score(recheck_documents, ablations)
    messages = [
        c.wrong
        for *_, c in compare_watched_documents(Reference(result.engine), scores, ablations, "seed")
    ]
    (message,) = filter(None, messages)
    assert "document 50 of task" in message


def test_a_threshold_below_the_smallest_that_is_tried() -> None:
    rope = {**LONGROPE, "original_max_position_embeddings": 3}
    documents = long_documents((20, 12), (2, 3))
    documents += long_documents((1, 2, 1, 3, 2), (1, 2), seed=1)
    measure_cell(tiny_model_of("llama", rope_parameters=rope, num_hidden_layers=2), documents, (1,))


@pytest.mark.parametrize("kind", [NeighbourHead, PlaceHead])
def test_a_head_that_sees_more_than_one_state(kind: type) -> None:
    model = make_model(kind)
    documents = long_documents((12, 9, 20), (1, 3))
    measure_cell(model, documents, (1,))
    result = check_sharing(Engine(wrap_model(model), 256), documents, single_layers((1,)), VERDICTS)
    assert result.engine.sharing == ONE_BY_ONE
    assert str(result.engine.sharing) == "nothing"
    assert result.sharing_note is not None
    assert result.sharing_note.count("changes a log-likelihood by") == 1
    assert "because a call of several texts changes a log-likelihood by " in result.sharing_note
    # It is no discontinuity of the model.
    assert result.unsteady_note is None


def test_places_beyond_all_positions() -> None:
    documents = DocumentGenerator().letter_documents((40, 40, 45, 30, 60, 30, 40))
    documents += long_documents((12, 9), (1, 3), seed=1)
    measure_cell(make_model(Fading), documents, (1,))


def test_what_has_no_such_thing_shares_all() -> None:
    model = make_model(LlamaForCausalLM)
    documents = long_documents((12, 9, 20), (1, 3))
    assert check_sharing(Engine(wrap_model(model), 256), documents, [INTACT]).engine.sharing == FULL


def test_one_text_of_more_nodes_than_the_model_has_places() -> None:
    """GPT-Neo's own mask is as wide as its places: it refuses such a row, in the check already."""
    model = tiny_model_of(
        "gpt_neo", attention_types=[[["global"], 2]], num_hidden_layers=2,
        max_position_embeddings=128,
    )  # fmt: skip
    documents = long_documents((12, 9, 14), (1, 3, 1, 2))
    documents += long_documents((70,), (50, 50), seed=1)
    measure_cell(model, documents, (1,), row_tokens=100, max_length=128)


def test_a_text_is_no_longer_than_the_cell_can_make_it() -> None:
    """Of an order of length there is one verdict of each kind, and of short texts one for all."""
    store = VerdictMemory()
    model = make_model(LlamaForCausalLM, max_position_embeddings=4096)
    # A token whose embedding is zero would be a question of its own.
    model.get_input_embeddings().weight[0] = 1
    for contexts, verdicts in (((12, 20), 3), ((9, 30), 3), ((400,), 5)):
        documents = long_documents(contexts, (1, 3))
        engine = Engine(wrap_model(copy.deepcopy(model)), 1024)
        check_sharing(engine, documents, single_layers((1,)), store)
        assert len(store) == verdicts
    assert miniature_check.LONGEST_REACH == 1024


class Reader(LlamaForCausalLM):
    """Reads twice as many tokens as it says; Moshi reads one more."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        self.model.embed_tokens = torch.nn.Embedding(2 * config.vocab_size, config.hidden_size)


def test_it_is_asked_only_for_what_it_can_say() -> None:
    measure_cell(make_model(Reader), long_documents((12, 9, 20), (1, 3)), (1,))


class Listing(LlamaForCausalLM):
    """Returns a tuple, whatever it is asked for."""

    def forward(self, *args: Any, **extra: Any) -> Any:
        return super().forward(*args, **extra).to_tuple()


class Last(LlamaForCausalLM):
    """Returns what it says of the last token alone, as models made for generating may do."""

    def forward(self, *args: Any, **extra: Any) -> Any:
        return super().forward(*args, **{**extra, "logits_to_keep": 1})


class ForGood(LlamaForCausalLM):
    """A call of a few tokens turns positions for good, as BigBird drops its sparse attention."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        self.switch: dict[str, float] = {}

    def forward(self, input_ids: Tensor, **extra: Any) -> Any:
        self.count(input_ids.shape[1])
        positions = extra.pop("position_ids", None)
        if positions is None:
            positions = torch.arange(input_ids.shape[1])[None]
        turned_positions = (positions * self.switch.get("turn", 1.0)).long()
        return super().forward(input_ids, position_ids=turned_positions, **extra)

    def count(self, tokens: int) -> None:
        if tokens < 100:
            self.switch["turn"] = 0.5


class Tiring(ForGood):
    """Counts its calls where nobody looks, and turns positions by how many there were."""

    def count(self, tokens: int) -> None:
        self.switch["turn"] = self.switch.get("turn", 1.0) * 0.99


UNSTEADY = r"contradicts itself: a text's log-likelihood is \S+ nats after short"
NO_LOGITS = ".*the model does not return 'logits' for every token"


@pytest.mark.parametrize(
    ("kind", "contexts", "message"),
    [
        *((kind, (110, 120), UNSTEADY) for kind in (ForGood, Tiring)),
        *((kind, (12, 9), NO_LOGITS) for kind in (Listing, Last)),
    ],
)
def test_what_no_truth_can_be_had_of_is_refused_in_words(
    kind: type, contexts, message: str
) -> None:
    engine = Engine(wrap_model(make_model(kind)), 256)
    with pytest.raises(CellError, match=f"^{kind.__name__} {message}"):
        check_sharing(engine, long_documents(contexts, (1, 3)), single_layers((1,)))


@pytest.mark.parametrize(
    ("contexts", "positions", "block", "drawn"),
    [
        ((40, 45, 60), 300, 4, 1),
        # Also where that is a product beyond the lengths that are all asked: (5 + 2 · 3) · 112 =
        # 1,232 tokens; from its 2,017th on this one cannot be asked at all.
        ((1240,), 2048, 112, 3),
    ],
)
def test_an_attention_that_a_short_text_switches_off_is_refused(contexts, positions, block, drawn):
    """BigBird's as a decoder, whose answers hang on whether a short text came before."""
    model = tiny_model_of(
        "big_bird", hidden_size=16, intermediate_size=16,
        num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=positions,
        is_decoder=True, attention_type="block_sparse", block_size=block, num_random_blocks=drawn,
    )  # fmt: skip
    engine, documents = Engine(wrap_model(model), positions), long_documents(contexts, (1, 3))
    with pytest.raises(
        CellError,
        match="BigBirdForCausalLM contradicts itself: a text's log-likelihood is ",
    ):
        check_sharing(engine, documents, single_layers((1,)))
