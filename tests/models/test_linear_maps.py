"""Which matrices of a layer are linear maps, and which of their axes is inputs."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import nn

from tests.helpers.mixtures import MIXTURES
from tests.helpers.registry import Variant, tiny
from tracker.core.config import run_request
from tracker.core.errors import TrackerError
from tracker.core.model_parts import ModelParts, check_parts
from tracker.models.layers import find_layers
from tracker.models.parts.linear_maps import linear_maps, map_at

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
            Variant(family, "", tiny(family)).config()
        )
    layers = find_layers(model)
    for layer in layers:
        for path, module in layer.named_modules():
            if "gate_up_proj" in module._parameters:
                yield layer, path, module


@pytest.mark.parametrize("family", [*MIXTURES, *MORE])
def test_experts_are_maps_and_what_chooses_among_them_is_none(family) -> None:
    found = [*layers_with_experts(family)]
    assert found
    for layer, path, module in found:
        if family in RECURRENT and any(isinstance(each, nn.Conv1d) for each in layer.modules()):
            continue
        maps = linear_maps(layer, "layer 1")
        width = layer.get_submodule(path).down_proj.shape
        for name in ("gate_up_proj", "down_proj"):
            each = maps[f"{path}.{name}"]
            # transformers says it itself where its own kernels need it.
            turned = getattr(module, "is_transposed", family == "llama4_text")
            assert each.inputs_first == turned
            assert (
                each.weight.shape
                == (getattr(module, name).mT if turned else getattr(module, name)).shape
            )
        assert maps[f"{path}.down_proj"].shape == (width[0] * 32, width[1] * width[2] // 32)
        linear = {p for p, m in layer.named_modules() if isinstance(m, nn.Linear)}
        router = ROUTERS.get(family, "mlp.gate")
        assert layer.get_submodule(router) is not None
        left_out = linear - {*maps}
        assert left_out <= {router, "mlp.shared_expert_gate"}
        assert router not in maps


def test_one_expert_is_a_map_by_its_number() -> None:
    layer, path, _ = next(layers_with_experts("gpt_oss"))
    maps = linear_maps(layer, "layer 0")
    one = map_at(maps, f"{path}.3.down_proj", "layer 0")
    assert (one.expert, one.shape) == (3, maps[f"{path}.down_proj"].weight.shape[1:])
    asked = {"model": "m", "benchmark": "b", "layer": 0, "component": "linear"}
    asked |= {"intervention": "int8"}
    parts = ModelParts(1, maps=(tuple(maps),))
    check_parts(run_request({**asked, "map": f"{path}.3.down_proj"}), parts)
    with pytest.raises(TrackerError, match=r"has no linear map 'mlp\.experts\.3\.down'"):
        check_parts(run_request({**asked, "map": "mlp.experts.3.down"}), parts)
