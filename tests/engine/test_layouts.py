"""Trained weights of a few layers in other layouts: the same numbers, as of plain ablation.

SmolLM2 is a Llama. Mistral names its parts alike, Qwen2 adds biases to queries, keys and values,
and Phi-3 fuses projections; with these weights all four say the same.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers

from tests.helpers.ablations import single_layers
from tests.helpers.engines import MAX_LENGTH, agree, asking, skipped
from tests.helpers.truth import exported
from tracker.core.changes import Ablation
from tracker.engine.scoring.sweep import Engine
from tracker.models.layers import find_layers

EXAMPLE = "Question: Which organ pumps the blood through the body?\nAnswer: the heart\n\n"
QUESTIONS = {
    "Question: Which gas do plants take from the air?\nAnswer:": [" carbon dioxide", " oxygen"],
    "Question: What is frozen water called?\nAnswer:": [" ice", " water vapour"],
}
LAYOUTS = {
    "mistral": ("MistralConfig", {"sliding_window": None}),
    "qwen2": ("Qwen2Config", {}),
    "phi3": ("Phi3Config", {"pad_token_id": 0, "sliding_window": None}),
}
FUSED = {
    "self_attn.qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "mlp.gate_up_proj": ("gate_proj", "up_proj"),
}
SHARED = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "hidden_act", "max_position_embeddings", "rms_norm_eps",
    "tie_word_embeddings", "rope_parameters",
)  # fmt: skip


def in_layout(model: Any, layout: str) -> Any:
    """Make a model of another architecture that shares a Llama's weights."""
    kind, more = LAYOUTS[layout]
    settings = {name: getattr(model.config, name) for name in SHARED}
    config = getattr(transformers, kind)(**settings, **more)
    with torch.device("meta"):
        other = transformers.AutoModelForCausalLM.from_config(config)
    weights = dict(model.state_dict())
    for name in list(weights) if layout == "qwen2" else ():
        if name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight")):
            weights[name.replace(".weight", ".bias")] = torch.zeros(len(weights[name]))
    for index in range(model.config.num_hidden_layers) if layout == "phi3" else ():
        for fused, names in FUSED.items():
            place = f"model.layers.{index}.{fused}"
            parts = [f"{place.rpartition('.')[0]}.{name}.weight" for name in names]
            weights[f"{place}.weight"] = torch.cat([weights.pop(part) for part in parts])
    other.load_state_dict(weights, assign=True)
    # Buffers are in no state dict; made on the meta device they would hold nothing.
    other.model.rotary_emb = type(other.model.rotary_emb)(config)
    other.tie_weights()
    return other.float().eval().requires_grad_(False)


@pytest.fixture(scope="module")
def shallow(smollm2) -> Any:
    """Its first eight layers."""
    return exported(smollm2.model, range(8, 30))


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_shared_scores_are_those_of_plain_ablation(smollm2, shallow, layout: str) -> None:
    model, encode = in_layout(shallow, layout), smollm2.tokenizer.encode
    documents = [
        asking(*((encode(EXAMPLE + question), encode(each)) for each in choices), index=number)
        for number, (question, choices) in enumerate(QUESTIONS.items())
    ]
    tokens = torch.tensor([encode(EXAMPLE)])
    with torch.inference_mode():
        expected, found = (each(tokens).logits for each in (shallow, model))
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=1e-4)
    ablations = [*single_layers((0, 7)), Ablation.parse("layers:3,5")]
    engine = Engine(replace(smollm2, model=model, layers=find_layers(model)), MAX_LENGTH)
    agree(engine.score(documents, ablations), model, ablations, skipped, atol=1e-3, rtol=1e-4)
