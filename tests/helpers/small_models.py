"""Tiny models of the families whose layers are found."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import transformers
from torch import nn

SMALL = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4}


WIDE = {**SMALL, "intermediate_size": 48}


FAMILIES = {
    "llama": lambda: transformers.LlamaConfig(**WIDE),
    "gpt2": lambda: transformers.GPT2Config(vocab_size=61, n_embd=32, n_layer=4, n_head=4),
    "gpt_neox": lambda: transformers.GPTNeoXConfig(**WIDE),
    "gemma3": lambda: transformers.Gemma3TextConfig(
        **WIDE,
        num_key_value_heads=2,
        head_dim=8,
        sliding_window=3,
        layer_types=["sliding_attention", "full_attention"] * 2,
    ),
}


TOKENS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])


def make(family: str, kept: Sequence[int] = range(4), seed: int = 0) -> nn.Module:
    """A random model, or one of the kinds of some of its layers, with other weights."""
    torch.manual_seed(seed)
    config = FAMILIES[family]()
    config.initializer_range = 0.3
    if family == "gemma3":
        config.layer_types = [config.layer_types[layer] for layer in kept]
    config.num_hidden_layers = len(kept)
    return transformers.AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)


def logits(model: nn.Module, **arguments) -> torch.Tensor:
    with torch.inference_mode():
        return model(TOKENS, **arguments).logits
