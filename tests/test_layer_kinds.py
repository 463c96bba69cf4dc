"""Kinds of layers, against what each configuration's own documentation says."""

from __future__ import annotations

import pytest
from transformers import (
    Gemma3TextConfig,
    GPTNeoConfig,
    JambaConfig,
    LlamaConfig,
    NemotronHConfig,
    Qwen3NextConfig,
    Zamba2Config,
)

from tracker.schema.errors import ModelError
from tracker.schema.model_parts import layer_kinds, layers_of_kind

EIGHT = {"num_hidden_layers": 8}


@pytest.mark.parametrize(
    ("config", "words", "layers"),
    [
        (Gemma3TextConfig(num_hidden_layers=12), ["full_attention"], (5, 11)),
        (Qwen3NextConfig(**EIGHT), ["full_attention"], (3, 7)),
        (Qwen3NextConfig(**EIGHT, full_attention_interval=2), ["linear_attention"], (0, 2, 4, 6)),
        (JambaConfig(**EIGHT), ["attention"], (4,)),
        (JambaConfig(**EIGHT), ["mamba"], (0, 1, 2, 3, 5, 6, 7)),
        (JambaConfig(**EIGHT), ["linear_attention"], (0, 1, 2, 3, 5, 6, 7)),
        (
            Zamba2Config(num_hidden_layers=3, layers_block_type=["mamba", "hybrid", "mamba"]),
            ["hybrid"],
            (1,),
        ),
        (NemotronHConfig(hybrid_override_pattern="ME*-M"), ["moe", "mlp"], (1, 3)),
        (GPTNeoConfig(num_layers=4, attention_types=[[["global", "local"], 2]]), ["local"], (1, 3)),
        (LlamaConfig(num_hidden_layers=5), ["even"], (0, 2, 4)),
        (LlamaConfig(num_hidden_layers=5), ["odd", "even"], (0, 1, 2, 3, 4)),
        (LlamaConfig(num_hidden_layers=5), [], ()),
    ],
)
def test_layers_are_found_by_their_kind(config, words, layers):
    assert layers_of_kind(config, words) == layers


def test_unknown_kinds_are_refused_with_the_known_ones():
    assert layer_kinds(LlamaConfig()) == {}
    with pytest.raises(
        ModelError, match=r"'mamba'. Its configuration lists no kinds. The kinds odd and even"
    ):
        layers_of_kind(LlamaConfig(), ["mamba"])
    message = (
        r"lists kinds linear_attention \(6\), full_attention \(2\)\. .* Did you mean 'full_att"
    )
    with pytest.raises(ModelError, match=message):
        layers_of_kind(Qwen3NextConfig(**EIGHT), ["ful_attention"])
