"""Why a model shares no more than it does: one sentence, in words that people know."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from tests.helpers.ablations import single_layers
from tests.helpers.cells import tiny_model_of
from tests.helpers.engines import VerdictMemory, assert_one_sentence, engine_of, make_documents
from tests.helpers.families import FAMILIES
from tests.helpers.registry import make_registered
from tracker.engine.selfcheck.check import check_sharing
from tracker.engine.selfcheck.reference import keeps_state

pytestmark = pytest.mark.usefixtures("one_thread")

STATE = "because the model keeps a recurrent state for each text"
BATCH = (
    "each ablation is computed separately, because the layers refuse a batch of hidden states of "
    "several ablations"
)
CACHE = "the key-value cache of the model cannot be reset to an earlier token"
FAMILY = {"nemotron_h": STATE, "gpt_bigcode": BATCH, "xmod": BATCH, "dots3_note_text": CACHE}


def xmod() -> Any:
    """X-MOD, whose layers part a batch by language."""
    return tiny_model_of("xmod", is_decoder=True, default_language="en_XX")


def dots3() -> Any:
    """Dots 3, whose cache holds what its indices were chosen from."""
    kinds = ["full_attention", "sliding_attention"]
    return tiny_model_of(
        "dots3_note_text", num_hidden_layers=2, layer_types=kinds, mlp_layer_types=["dense"] * 2
    )


MADE = {"xmod": xmod, "dots3_note_text": dots3}
"""Those that are other than the registry's."""


@pytest.mark.parametrize("family", FAMILY)
def test_it_is_one_sentence_without_what_the_model_s_code_raised(family: str) -> None:
    model = MADE[family]() if family in MADE else make_registered(family)
    # A token whose embedding is zero would be a question of its own.
    model.get_input_embeddings().weight[0] = 1
    engine = engine_of(model)
    note = check_sharing(
        engine, make_documents(3), single_layers((1,)), VerdictMemory()
    ).sharing_note
    assert note is not None
    assert FAMILY[family] in note
    assert_one_sentence(note)


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
    assert keeps_state(model) is state
