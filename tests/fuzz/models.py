"""A tiny model in a folder, without pytest."""

from __future__ import annotations

from pathlib import Path

from tests.conftest import save_tokenizer


def tiny_model(folder: Path) -> Path:
    """Make a random Llama of four layers with a real tokenizer, as `save_pretrained` leaves it."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder.mkdir(parents=True)
    torch.manual_seed(0)
    shape = {
        "vocab_size": save_tokenizer(folder, False),
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "initializer_range": 0.3,
    }
    LlamaForCausalLM(LlamaConfig(**shape)).save_pretrained(folder)
    return folder
