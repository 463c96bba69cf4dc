from __future__ import annotations

import pytest
import torch
import transformers
from torch import nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from tracker.models.layers import find_layers
from tracker.models.miniature import _pattern, build, miniature, numbers, with_numbers

TEXT = torch.arange(12)[None] * 7 % 31 + 3
KINDS = [
    "Llama",  # the plain one
    "Gemma2",  # heads wider than the hidden size is
    "Gemma3",  # with a part that sees pictures
    "Gemma4Text",  # sizes that single layers have for themselves
    "Phi3",  # heads that are no power of two
    "StableLm",  # a part of each head turned
    "Falcon",  # 71 heads
    "CodeGen",  # a number of heads that the class itself divides by four
    "Mixtral",
    "DeepseekV3",  # heads in parts, ranks, experts in groups
    "GptOss",
    "Mamba2",  # no attention
    "FalconH1",  # two mixers side by side
    "Zamba2",  # one block shared between layers
    "Qwen3Next",  # linear attention
    "RecurrentGemma",
]
# Its large models have no inputs of their own for each layer, and no values besides keys.
LARGE_GEMMA_4 = {"hidden_size_per_layer_input": 0, "attention_k_eq_v": True}


pytestmark = pytest.mark.usefixtures("one_thread")


class Rooted(transformers.LlamaForCausalLM):
    """With a positive gain a dimension, of which the root is taken."""

    def __init__(self, config):
        super().__init__(config)
        self.gain = nn.Parameter(torch.ones(1, config.hidden_size))

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = output.logits * self.gain.sqrt().mean()
        return output


def at_real_size(config, kind=None) -> nn.Module:
    """Return a model with shapes and no weights."""
    with torch.device("meta"):
        return (kind or transformers.AutoModelForCausalLM.from_config)(config)


def said(model) -> torch.Tensor:
    with torch.inference_mode():
        return model(TEXT, use_cache=False).logits[0]


def without(model, layer: nn.Module) -> torch.Tensor:
    """Return a model's logits where one layer passes on its input."""
    handle = layer.register_forward_hook(hand_on, with_kwargs=True)
    try:
        return said(model)
    finally:
        handle.remove()


def hand_on(layer, arguments, named, output):
    hidden = arguments[0] if arguments else named["hidden_states"]
    return (hidden, *output[1:]) if isinstance(output, tuple) else hidden


def first_and_last_of_each_kind(model) -> list[nn.Module]:
    """All layers' weights are drawn alike, so that those between say nothing new."""
    layers = find_layers(model)
    types = getattr(model.config.get_text_config(), "layer_types", None) or [""] * len(layers)
    kinds = [(kind, *modules) for kind, modules in zip(types, _pattern(model), strict=True)]
    last = {kind: index for index, kind in enumerate(kinds)}
    first = {kind: index for index, kind in reversed(list(enumerate(kinds)))}
    return [layers[index] for index in sorted({*first.values(), *last.values()})]


@pytest.mark.parametrize(
    ("kind", "settings"), [*((kind, {}) for kind in KINDS), ("Gemma4Text", LARGE_GEMMA_4)]
)
def test_a_miniature_is_the_same_model_made_small(kind, settings):
    model = at_real_size(getattr(transformers, f"{kind}Config")(**settings))
    small = miniature(model)
    assert type(small) is type(model)
    assert _pattern(small) == _pattern(model)
    assert len(find_layers(small)) == model.config.get_text_config().num_hidden_layers
    assert small.num_parameters() < 1_500_000
    assert small.dtype == torch.float64
    intact = said(small)
    assert intact.isfinite().all()
    for layer in first_and_last_of_each_kind(small):
        assert (without(small, layer) - intact).abs().max() > 1e-3


def small_of(name: str, kind=None, **settings):
    """Build the miniature of an architecture, of two layers by default."""
    config = getattr(transformers, f"{name}Config")(**{"num_hidden_layers": 2, **settings})
    return miniature(at_real_size(config, kind))


def test_lengths_and_positions_stay_as_they_are():
    config = transformers.Gemma3TextConfig(num_hidden_layers=6)
    small = miniature(at_real_size(config)).config
    for name in ("sliding_window", "max_position_embeddings", "layer_types", "rope_parameters"):
        assert getattr(small, name) == getattr(config, name)


def test_experts_are_chosen_still():
    small = small_of("DeepseekV3", num_hidden_layers=4).config
    assert small.n_routed_experts > small.num_experts_per_tok == 2
    assert (small.n_group, small.topk_group) == (2, 1)


def test_experts_in_one_call_are_those_of_the_usual_way():
    small = small_of("Mixtral")
    used = small.config._experts_implementation
    assert used in ALL_EXPERTS_FUNCTIONS
    in_calls = said(small)
    small.set_experts_implementation("eager")
    assert torch.allclose(said(small), in_calls, atol=1e-9, rtol=0)


def test_what_cannot_be_built_small_is_none():
    class Stubborn(transformers.LlamaForCausalLM):
        def __init__(self, config):
            if config.hidden_size < 4096:
                raise ValueError("too small for me")
            super().__init__(config)

    assert small_of("Llama", Stubborn) is None


def test_a_gain_of_two_dimensions_stays_positive():
    """Its root is taken: of a negative one all logits would be NaN, and agree with anything."""
    small = small_of("Llama", Rooted)
    assert small.dtype == torch.float64
    assert said(small).isfinite().all()
    assert (small.gain > 0).all()
    assert small.gain.std() > 0.01


def test_where_wider_numbers_give_none_they_are_narrower():
    """A window of no token: float64's lowest number is minus infinity in a softmax of float32."""
    kinds = ["full_attention", "sliding_attention"]
    small = small_of("Qwen2Moe", layer_types=kinds, attn_implementation="eager")
    assert small.dtype == torch.float32
    assert said(small).isfinite().all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_one_that_says_no_numbers_is_none(value):
    class Lost(transformers.LlamaForCausalLM):
        def forward(self, *args, **kwargs):
            output = super().forward(*args, **kwargs)
            output.logits[:, 4:] = value
            return output

    assert build(Lost, small_of("Llama").config) is None


def test_numbers_are_found_and_set_nested_ones_too():
    rope = {
        "full_attention": {"rope_type": "default", "rope_theta": 10000.0},
        "sliding_attention": {
            "rope_type": "yarn",
            "rope_theta": 500.0,
            "factor": 8.0,
            "original_max_position_embeddings": 4096,
        },
    }
    config = transformers.Gemma3Config(text_config={"rope_parameters": rope})
    found = dict(numbers(config.get_text_config()))
    nested = ("rope_parameters", "sliding_attention", "original_max_position_embeddings")
    assert found[nested] == 4096
    assert found["sliding_window",] == 4096
    assert ("tie_word_embeddings",) not in found
    changed = with_numbers(config, {nested: 9, ("sliding_window",): 6})
    after = dict(numbers(changed.get_text_config()))
    assert after == found | {nested: 9, ("sliding_window",): 6}
    assert dict(numbers(config.get_text_config())) == found
