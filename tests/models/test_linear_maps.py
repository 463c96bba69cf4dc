"""Test which matrices of a layer are linear maps, and which of their axes is inputs."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import nn

from tests.helpers.mixtures import MIXTURES
from tests.helpers.registry import Variant, tiny_settings
from tracker.models.layers import find_layers
from tracker.models.parts.linear_maps import find_linear_maps, find_map
from tracker.schema.config import run_request
from tracker.schema.errors import TrackerError
from tracker.schema.model_parts import ModelParts, check_parts

ROUTERS = {
    "afmoe": "mlp.router.gate",
    "gpt_oss": "mlp.router",
    "granitemoe": "block_sparse_moe.router",
    "hunyuan_v1_moe": "mlp.gate.wg",
    "jamba": "feed_forward.router",
    "lfm2_moe": "feed_forward.gate",
    "llama4_text": "feed_forward.router",
    "phimoe": "mlp.router",
}
MORE = ("qwen2_moe", "glm4_moe", "afmoe", "hunyuan_v1_moe", "llama4_text", "dots1")
RECURRENT = ("jamba", "lfm2_moe")


def layers_with_experts(family):
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(
            Variant(family, "", tiny_settings(family)).config()
        )
    layers = find_layers(model)
    for layer in layers:
        for path, module in layer.named_modules():
            if "gate_up_proj" in module._parameters:
                yield layer, path, module


@pytest.mark.parametrize("family", [*MIXTURES, *MORE])
def test_experts_are_linear_maps_and_routers_are_not(family) -> None:
    expert_modules = [*layers_with_experts(family)]
    assert expert_modules
    for layer, path, module in expert_modules:
        if family in RECURRENT and any(isinstance(child, nn.Conv1d) for child in layer.modules()):
            continue
        maps = find_linear_maps(layer, "layer 1")
        # transformers has this attribute if its own kernels need it.
        is_transposed = getattr(module, "is_transposed", family == "llama4_text")
        for name in ("gate_up_proj", "down_proj"):
            linear, weight = maps[f"{path}.{name}"], getattr(module, name)
            assert linear.inputs_first == is_transposed
            assert linear.weight.shape == (weight.mT if is_transposed else weight).shape
        shape = layer.get_submodule(path).down_proj.shape
        assert maps[f"{path}.down_proj"].shape == (shape[0] * 32, shape[1] * shape[2] // 32)
        linear_paths = {p for p, m in layer.named_modules() if isinstance(m, nn.Linear)}
        router = ROUTERS.get(family, "mlp.gate")
        assert layer.get_submodule(router) is not None
        assert linear_paths - {*maps} <= {router, "mlp.shared_expert_gate"}
        assert router not in maps


def test_single_expert_is_found_by_its_number() -> None:
    layer, path, _ = next(layers_with_experts("gpt_oss"))
    maps = find_linear_maps(layer, "layer 0")
    expert_map = find_map(maps, f"{path}.3.down_proj", "layer 0")
    assert (expert_map.expert, expert_map.shape) == (3, maps[f"{path}.down_proj"].weight.shape[1:])
    request = {"model": "m", "benchmark": "b", "layer": 0, "component": "linear"}
    request |= {"intervention": "int8"}
    parts = ModelParts(1, maps=(tuple(maps),))
    check_parts(run_request({**request, "map": f"{path}.3.down_proj"}), parts)
    with pytest.raises(TrackerError, match=r"has no linear map 'mlp\.experts\.3\.down'"):
        check_parts(run_request({**request, "map": "mlp.experts.3.down"}), parts)
