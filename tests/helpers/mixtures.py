"""Tiny mixtures of experts, and models with fewer experts."""

from __future__ import annotations

import copy
from contextlib import ExitStack
from functools import partial

import torch

from tests.conftest import save_tokenizer
from tests.helpers.registry import Variant, make_registered, tiny_settings
from tracker.models.layers import find_layers
from tracker.schema.changes import Ablation, Change

MIXTURES = {
    "mixtral": "num_local_experts",
    "qwen3_moe": "num_experts",
    "olmoe": "num_experts",
    "deepseek_v3": "n_routed_experts",
    "gpt_oss": "num_local_experts",
    "granitemoe": "num_local_experts",
    "phimoe": "num_local_experts",
    "jamba": "num_experts",
    # A correction of the scores lies beside the router, in a row, or in the block around it.
    "ernie4_5_moe": "moe_num_experts",
    "minimax_m2": "num_local_experts",
    "lfm2_moe": "num_experts",
}
"""Families, and what their configurations call how many experts a layer has."""


UNDIVIDED_MIXTURES = {
    "gemma4_text": "num_experts",
    "granitemoehybrid": "num_local_experts",
    "nemotron_h": "n_routed_experts",
    "minimax": "num_local_experts",
    "deepseek_v4": "num_local_experts",
}
"""Those whose layers are no attention and MLP that add to one stream; the same."""


ONE_GROUP = {"n_group": 1, "topk_group": 1}


EXTRA_SETTINGS = {
    "deepseek_v3": ONE_GROUP,
    "nemotron_h": {
        **ONE_GROUP,
        "layers_block_type": ["moe", "full_attention", "moe", "linear_attention"],
    },
    "jamba": {"expert_layer_offset": 1},
    "gemma4_text": {"enable_moe_block": True},
    "deepseek_v4": {"mlp_layer_types": ["moe"] * 4},
}


def tiny_mixture(family, experts=5, **settings):
    """Make a tiny mixture, a token of which goes to two experts of a layer."""
    count = {(MIXTURES | UNDIVIDED_MIXTURES)[family]: experts}
    settings = tiny_settings(family) | EXTRA_SETTINGS.get(family, {}) | count | settings
    return Variant(family, "plain", settings).model()


def expert_ablation(layer, *numbers):
    """Take some experts of a layer out."""
    return Ablation.from_changes(*(Change.parse(f"expert:{layer}.{number}") for number in numbers))


def expert_outputs(model, tokens):
    """List, for each layer, what each expert of each token makes: [(expert, gate, output)]."""
    outputs = {}

    def note(layer, module, args, kwargs):
        state, choice, weights = (*args, *kwargs.values())
        for x, numbers, gates in zip(state, choice.tolist(), weights.tolist(), strict=True):
            outputs.setdefault(layer, []).extend(
                (number, gate, compute_output(module, number, x))
                for number, gate in zip(numbers, gates, strict=True)
            )

    def compute_output(module, number, x):
        up_weight, down_weight = module.gate_up_proj[number], module.down_proj[number]
        if hasattr(module, "alpha"):  # GPT-OSS
            gate_and_up = x @ up_weight + module.gate_up_proj_bias[number]
            gate, up = gate_and_up[::2].clamp(max=module.limit), gate_and_up[1::2]
            hidden = (up.clamp(-module.limit, module.limit) + 1) * gate
            hidden = hidden * torch.sigmoid(module.alpha * gate)
            return hidden @ down_weight + module.down_proj_bias[number]
        gate, up = (up_weight @ x).chunk(2)
        return down_weight @ (module.act_fn(gate) * up)

    with ExitStack() as stack, torch.inference_mode():
        for layer_number, layer in enumerate(find_layers(model)):
            for module in layer.modules():
                if any(p.ndim == 3 and len(p) == 5 for p in module.parameters(recurse=False)):
                    hook = partial(note, layer_number)
                    stack.enter_context(module.register_forward_pre_hook(hook, with_kwargs=True))
        model(torch.tensor([tokens]), use_cache=False)
    return outputs


def without_experts(model, family, ablation):
    """Make a model of a configuration with fewer experts, and put its layers in a copy."""
    by_layer = {}
    for part in ablation.parts:
        by_layer.setdefault(part.layer, []).append(part.number)
    twin = copy.deepcopy(model)
    for layer, removed in by_layer.items():
        config, name = copy.deepcopy(model.config), (MIXTURES | UNDIVIDED_MIXTURES)[family]
        count = getattr(config, name)
        setattr(config, name, count - len(removed))
        smaller = type(model)(config).float().eval().requires_grad_(False)
        experts = torch.tensor([number for number in range(count) if number not in removed])
        weights = model.state_dict()
        for name, value in smaller.state_dict().items():
            if weights[name].shape != value.shape:
                weights[name] = weights[name].index_select(int(len(weights[name]) == 1), experts)
        smaller.load_state_dict(weights)
        find_layers(twin)[layer] = find_layers(smaller)[layer]
    return twin


def save_mixture(folder, family):
    """Make a folder with a tiny mixture whose rows fill blocks of 32, and a real tokenizer."""
    sizes = {"hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 96}
    shape = {name: size for name, size in sizes.items() if name in tiny_settings(family)}
    shape |= {"vocab_size": save_tokenizer(folder, False), "num_hidden_layers": 2}
    model = make_registered(family, **shape)
    model.save_pretrained(folder)
    return model
