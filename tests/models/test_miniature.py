from __future__ import annotations

import pytest
import torch
import transformers
from torch import nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from tracker.models.layers import find_layers
from tracker.models.miniature import (
    _module_pattern,
    build_miniature,
    build_random_model,
    find_numbers,
    replace_numbers,
)

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
    """A model with positive gains, of which it takes the square root."""

    def __init__(self, config):
        super().__init__(config)
        self.gain = nn.Parameter(torch.ones(1, config.hidden_size))

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = output.logits * self.gain.sqrt().mean()
        return output


def meta_model(config, kind=None) -> nn.Module:
    """Return a model with shapes and no weights."""
    with torch.device("meta"):
        return (kind or transformers.AutoModelForCausalLM.from_config)(config)


def compute_logits(model) -> torch.Tensor:
    with torch.inference_mode():
        return model(TEXT, use_cache=False).logits[0]


def logits_without(model, layer: nn.Module) -> torch.Tensor:
    """Return a model's logits if one layer returns its input."""
    with layer.register_forward_hook(return_input, with_kwargs=True):
        return compute_logits(model)


def return_input(layer, args, kwargs, output):
    state = args[0] if args else kwargs["hidden_states"]
    return (state, *output[1:]) if isinstance(output, tuple) else state


def outer_layers_by_kind(model) -> list[nn.Module]:
    """List the first and the last layer of each kind; all weights are drawn alike."""
    layers = find_layers(model)
    layer_types = getattr(model.config.get_text_config(), "layer_types", None) or [""] * len(layers)
    kinds = [*enumerate(zip(layer_types, map(tuple, _module_pattern(model)), strict=True))]
    first, last = ({kind: index for index, kind in order} for order in (kinds[::-1], kinds))
    return [layers[index] for index in sorted({*first.values(), *last.values()})]


@pytest.mark.parametrize(
    ("kind", "settings"), [*((kind, {}) for kind in KINDS), ("Gemma4Text", LARGE_GEMMA_4)]
)
def test_miniature_has_the_class_and_modules_of_the_model(kind, settings):
    model = meta_model(getattr(transformers, f"{kind}Config")(**settings))
    small = build_miniature(model)
    assert type(small) is type(model)
    assert _module_pattern(small) == _module_pattern(model)
    assert len(find_layers(small)) == model.config.get_text_config().num_hidden_layers
    assert small.num_parameters() < 1_500_000
    assert small.dtype == torch.float64
    logits = compute_logits(small)
    assert logits.isfinite().all()
    for layer in outer_layers_by_kind(small):
        assert (logits_without(small, layer) - logits).abs().max() > 1e-3


def small_model(name: str, kind=None, **settings):
    """Build the miniature of an architecture, of two layers by default."""
    config = getattr(transformers, f"{name}Config")(**{"num_hidden_layers": 2, **settings})
    return build_miniature(meta_model(config, kind))


def test_lengths_and_positions_stay():
    config = transformers.Gemma3TextConfig(num_hidden_layers=6)
    small = build_miniature(meta_model(config)).config
    for name in ("sliding_window", "max_position_embeddings", "layer_types", "rope_parameters"):
        assert getattr(small, name) == getattr(config, name)


def test_experts_are_still_chosen():
    config = small_model("DeepseekV3", num_hidden_layers=4).config
    assert config.n_routed_experts > config.num_experts_per_tok == 2
    assert (config.n_group, config.topk_group) == (2, 1)


def test_batched_experts_equal_eager_ones():
    small = small_model("Mixtral")
    implementation = small.config._experts_implementation
    assert implementation in ALL_EXPERTS_FUNCTIONS
    batched_logits = compute_logits(small)
    small.set_experts_implementation("eager")
    assert torch.allclose(compute_logits(small), batched_logits, atol=1e-9, rtol=0)


def test_model_that_refuses_small_sizes_has_no_miniature():
    class Stubborn(transformers.LlamaForCausalLM):
        def __init__(self, config):
            if config.hidden_size < 4096:
                raise ValueError("too small for me")
            super().__init__(config)

    assert small_model("Llama", Stubborn) is None


def test_matrix_of_gains_stays_positive():
    """Its square root would make all logits NaN if it were negative."""
    small = small_model("Llama", Rooted)
    assert small.dtype == torch.float64
    assert compute_logits(small).isfinite().all()
    assert (small.gain > 0).all()
    assert small.gain.std() > 0.01


def test_float32_is_used_if_float64_gives_nan():
    """A window of no token: float64's lowest number is minus infinity in a softmax of float32."""
    layer_types = ["full_attention", "sliding_attention"]
    small = small_model("Qwen2Moe", layer_types=layer_types, attn_implementation="eager")
    assert small.dtype == torch.float32
    assert compute_logits(small).isfinite().all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_model_with_infinite_logits_is_refused(value):
    class Lost(transformers.LlamaForCausalLM):
        def forward(self, *args, **kwargs):
            output = super().forward(*args, **kwargs)
            output.logits[:, 4:] = value
            return output

    assert build_random_model(Lost, small_model("Llama").config) is None


def test_nested_numbers_are_found_and_replaced():
    length = {"original_max_position_embeddings": 4096}
    rope = {
        "full_attention": {"rope_type": "default", "rope_theta": 10000.0},
        "sliding_attention": {"rope_type": "yarn", "rope_theta": 500.0, "factor": 8.0} | length,
    }
    config = transformers.Gemma3Config(text_config={"rope_parameters": rope})
    old_numbers = dict(find_numbers(config.get_text_config()))
    nested_path = ("rope_parameters", "sliding_attention", "original_max_position_embeddings")
    assert old_numbers[nested_path] == 4096
    assert old_numbers["sliding_window",] == 4096
    assert ("tie_word_embeddings",) not in old_numbers
    changed_config = replace_numbers(config, {nested_path: 9, ("sliding_window",): 6})
    new_numbers = dict(find_numbers(changed_config.get_text_config()))
    assert new_numbers == old_numbers | {nested_path: 9, ("sliding_window",): 6}
    assert dict(find_numbers(config.get_text_config())) == old_numbers
