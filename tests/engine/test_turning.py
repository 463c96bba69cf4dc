"""How far layers turn the residual stream, also of layers that write into it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from tests.engine.plain import MAX_LENGTH, loaded, make_documents
from tracker.engine.sweep import Engine
from tracker.engine.turning import turning

pytestmark = pytest.mark.usefixtures("one_thread")


class InPlace(LlamaDecoderLayer):
    """Adds to the residual stream in place, as much remote code does."""

    def forward(self, hidden_states: Any, **kwargs: Any) -> Any:
        normed = self.input_layernorm(hidden_states)
        hidden_states += self.self_attn(hidden_states=normed, **kwargs)[0]
        hidden_states += self.mlp(self.post_attention_layernorm(hidden_states))
        return hidden_states


def test_layers_that_write_into_the_stream_turn_it_as_others_do(tiny_model) -> None:
    model, (document, *_) = tiny_model("llama"), make_documents(1)
    expected = turning(Engine(loaded(model), MAX_LENGTH), document)
    assert (expected["cosine_score"] > 0.01).all()
    model = copy.deepcopy(model)
    for layer in model.model.layers:
        layer.__class__ = InPlace
    engine = Engine(loaded(model), MAX_LENGTH)
    for _ in range(2):
        found = turning(engine, document)
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, atol=1e-5, rtol=1e-5)
