"""Test the angles by which layers turn the residual stream, also of layers that write into it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from tests.helpers.engines import engine_of, make_documents
from tests.helpers.families import tiny_model
from tracker.engine.observers.layer_proxies import measure_state_changes
from tracker.models.parts.anatomy import LayerAnatomy
from tracker.models.parts.sublayers import Sublayers
from tracker.schema.errors import ModelError

pytestmark = pytest.mark.usefixtures("one_thread")


class InPlace(LlamaDecoderLayer):
    """Adds to the residual stream in place, as much remote code does."""

    def forward(self, hidden_states: Any, **kwargs: Any) -> Any:
        normed = self.input_layernorm(hidden_states)
        hidden_states += self.self_attn(hidden_states=normed, **kwargs)[0]
        hidden_states += self.mlp(self.post_attention_layernorm(hidden_states))
        return hidden_states


class Growing(InPlace):
    """Adds, besides what its two parts say, one."""

    def forward(self, hidden_states: Any, **kwargs: Any) -> Any:
        hidden_states += 1
        return super().forward(hidden_states, **kwargs)


@pytest.mark.parametrize(("kind", "refused"), [(InPlace, False), (Growing, True)])
def test_that_a_layer_adds_what_its_parts_say_is_seen(kind, refused: bool) -> None:
    model = tiny_model("llama")
    for layer in model.model.layers:
        layer.__class__ = kind
    if refused:
        with pytest.raises(
            ModelError, match="changes its input even if attention and MLP are removed"
        ):
            LayerAnatomy.of(model).find(Sublayers)
    else:
        assert len(LayerAnatomy.of(model).find(Sublayers)) == 4


def test_layers_that_write_into_the_stream_turn_it_as_others_do() -> None:
    model, (document, *_) = tiny_model("llama"), make_documents(1)
    expected = measure_state_changes(engine_of(model), document)
    assert (expected["cosine_score"] > 0.01).all()
    model = copy.deepcopy(model)
    for layer in model.model.layers:
        layer.__class__ = InPlace
    engine = engine_of(model)
    for _ in range(2):
        similarity = measure_state_changes(engine, document)
        for name, value in expected.items():
            torch.testing.assert_close(similarity[name], value, atol=1e-5, rtol=1e-5)
