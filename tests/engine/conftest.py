from __future__ import annotations

import pytest
import torch
import transformers

SMALL = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
CONFIGS = {
    "llama": lambda: transformers.LlamaConfig(**SMALL),
    "mistral": lambda: transformers.MistralConfig(**SMALL, sliding_window=5),
    "qwen2": lambda: transformers.Qwen2Config(**SMALL),
    "gemma3": lambda: transformers.Gemma3TextConfig(**SMALL, head_dim=8, sliding_window=5),
    "gpt_neox": lambda: transformers.GPTNeoXConfig(
        **{k: v for k, v in SMALL.items() if k != "num_key_value_heads"}
    ),
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=97, n_embd=32, n_layer=4, n_head=4, n_positions=256
    ),
    "bloom": lambda: transformers.BloomConfig(vocab_size=97, hidden_size=32, n_layer=4, n_head=4),
    "mamba": lambda: transformers.MambaConfig(
        vocab_size=97, hidden_size=32, num_hidden_layers=4, state_size=4
    ),
}


@pytest.fixture
def tiny_model():
    """Makes a random model of a family, with weights large enough that layers matter."""

    def make(family: str) -> torch.nn.Module:
        torch.manual_seed(0)
        config = CONFIGS[family]()
        config.initializer_range = 0.3
        model = transformers.AutoModelForCausalLM.from_config(config)
        return model.float().eval().requires_grad_(False)

    return make
