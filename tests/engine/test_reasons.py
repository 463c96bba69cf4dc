"""Why a model shares no more than it does: one sentence, in words that people know."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from tests.helpers.ablations import single_layers
from tests.helpers.cells import tiny
from tests.helpers.engines import Memory, engine_of, is_one_sentence, make_documents
from tests.helpers.families import FAMILIES
from tests.helpers.registry import variants
from tracker.engine.scoring.model import DEPTH_ONLY, NO_PREFIX, ONE_BY_ONE, PLAIN
from tracker.engine.selfcheck.check import check
from tracker.engine.selfcheck.reference import keeps_a_state, less

pytestmark = pytest.mark.usefixtures("one_thread")

STATE = "because it keeps a state of its own for each text"
BATCH = "nothing is shared, because its layers refuse the states of several ablations as one batch"
CACHE = "its cache cannot be rewound"
FAMILY = {"nemotron_h": STATE, "gpt_bigcode": BATCH, "xmod": BATCH, "dots3_note_text": CACHE}


def test_where_a_layer_stays_in_its_place_it_is_said() -> None:
    """Gemma 4, whose last layers take the keys of others."""
    sharing = (each for each in variants("gemma4_text") if each.name == "num_kv_shared_layers 2")
    engine = engine_of(next(sharing).model())
    found = check(engine, make_documents(2), single_layers((0, 1)), Memory())
    assert found.which == (
        "whatever is removed, what is measured is the model whose layer stays in its place and "
        "hands on its input, not a saved checkpoint (no configuration describes what is left)"
    )
    assert found.lost == BATCH


def xmod() -> Any:
    """X-MOD, whose layers part a batch by language."""
    return tiny("xmod", is_decoder=True, default_language="en_XX")


def dots3() -> Any:
    """Dots 3, whose cache holds what its indices were chosen from."""
    kinds = ["full_attention", "sliding_attention"]
    return tiny(
        "dots3_note_text", num_hidden_layers=2, layer_types=kinds, mlp_layer_types=["dense"] * 2
    )


MADE = {"xmod": xmod, "dots3_note_text": dots3}
"""Those that are other than the registry's."""


@pytest.mark.parametrize("family", FAMILY)
def test_it_is_one_sentence_without_what_the_model_s_code_raised(family: str) -> None:
    model = MADE[family]() if family in MADE else next(variants(family)).model()
    # A token whose embedding is zero would be a question of its own.
    model.get_input_embeddings().weight[0] = 1
    engine = engine_of(model)
    said = check(engine, make_documents(3), single_layers((1,)), Memory()).lost
    assert said is not None
    assert FAMILY[family] in said
    is_one_sentence(said)


@pytest.mark.parametrize(
    ("family", "state"),
    [
        ("llama", False),
        ("mistral", False),
        ("bloom", False),
        ("mamba", True),
        ("jamba_eager", True),
    ],
)
def test_a_state_does_not_grow_with_its_text(family: str, state: bool) -> None:
    model = AutoModelForCausalLM.from_config(FAMILIES[family].config()).eval()
    assert keeps_a_state(model) is state


def test_what_was_lost_last_says_it_all() -> None:
    first = less(None, NO_PREFIX, "it is so")
    assert (
        first == "shared over depth and tokens, and not what documents begin with, because it is so"
    )
    assert less(first, NO_PREFIX, None) == first
    second = less(first, DEPTH_ONLY, "it is worse")
    assert second == (
        "shared over depth alone, and not over tokens or documents, because it is worse"
    )
    assert less(second, ONE_BY_ONE, "so") == (
        "nothing is shared, and each request is asked alone, because so"
    )
    # What is no loss of sharing alone stands.
    assert less("it is another model", PLAIN, "so") == (
        "it is another model; nothing is shared, because so"
    )
    assert less(None, PLAIN, None) is None
