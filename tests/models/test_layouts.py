"""Trained weights in four layouts: the same numbers, and the engine's are those of plain ablation.

SmolLM2 is a Llama. Mistral names its parts alike, Qwen2 adds biases to queries, keys and values,
and Phi-3 fuses projections; with these weights all four say the same.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers

from tests.ablations import single_layers
from tests.engine.plain import MAX_LENGTH, agree, skipped
from tracker.core.ablations import Ablation
from tracker.core.documents import Document, Request
from tracker.engine.scoring.sharing import FULL
from tracker.engine.scoring.sweep import Engine
from tracker.models.layers import find_layers

SENTENCE = "The capital of France is Paris, and the heart pumps the blood through the body."
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
    for name in list(weights):
        if layout == "qwen2" and name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight")):
            weights[name.replace(".weight", ".bias")] = torch.zeros(len(weights[name]))
    if layout == "phi3":
        for index in range(model.config.num_hidden_layers):
            for part, fused, names in (
                ("self_attn", "qkv_proj", ("q_proj", "k_proj", "v_proj")),
                ("mlp", "gate_up_proj", ("gate_proj", "up_proj")),
            ):
                place = f"model.layers.{index}.{part}"
                each = [weights.pop(f"{place}.{name}.weight") for name in names]
                weights[f"{place}.{fused}.weight"] = torch.cat(each)
    other.load_state_dict(weights, assign=True)
    # Buffers are in no state dict; made on the meta device they would hold nothing.
    other.model.rotary_emb = type(other.model.rotary_emb)(config)
    other.tie_weights()
    return other.float().eval().requires_grad_(False)


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def documents(smollm2) -> list[Document]:
    """Questions with choices, behind an example."""
    encode = smollm2.tokenizer.encode
    return [
        Document(
            "task", number,
            tuple(Request(tuple(encode(EXAMPLE + question)), tuple(encode(c))) for c in choices),
            0, len(choices),
        )
        for number, (question, choices) in enumerate(QUESTIONS.items())
    ]  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_shared_scores_are_those_of_plain_ablation(smollm2, documents, layout) -> None:
    model = in_layout(smollm2.model, layout)
    tokens = torch.tensor([smollm2.tokenizer.encode(SENTENCE)])
    with torch.inference_mode():
        expected, found = (each(tokens).logits for each in (smollm2.model, model))
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=1e-4)
    ablations = [*single_layers((0, 29)), Ablation((11, 17))]
    engine = Engine(replace(smollm2, model=model, layers=find_layers(model)), MAX_LENGTH, FULL)
    scores = engine.score(documents, ablations)
    agree(scores, model, ablations, skipped, atol=1e-3, rtol=1e-4)
