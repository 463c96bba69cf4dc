"""A weight in a format is what the file of its makers gives back."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8
from compressed_tensors.quantization import (
    dequantize,
    initialize_module_for_quantization,
    preset_name_to_scheme,
)
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

from tests.helpers import llama_cpp
from tests.helpers.llama_cpp import write_gguf
from tracker.models.parts.linear_maps import RoundedWeights, map_of_module
from tracker.models.rounding import round_weight
from tracker.schema.errors import CellError
from tracker.schema.weight_formats import FORMATS

GGUF = [form for form in FORMATS.values() if "GGUF" in form.source]


def random_weight(outputs: int = 24, inputs: int = 256) -> torch.Tensor:
    return 0.05 * torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(inputs))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, gguf.GGUFReader]:
    """Write a llama of one layer with llama.cpp's own program in each of its types."""
    pytest.importorskip("llama_cpp_py_sync", reason="pip install -e '.[dev]' brings it")
    folder = tmp_path_factory.mktemp("gguf")
    shapes = {"attn_q": (256, 256), "attn_k": (128, 256), "attn_v": (128, 256)}
    shapes |= {"attn_output": (256, 256), "ffn_gate": (288, 256), "ffn_up": (288, 256)}
    shapes |= {"ffn_down": (256, 288)}
    tensors = {"token_embd": random_weight(64), "output_norm": np.ones(256)}
    tensors |= {f"blk.0.{name}": np.ones(256) for name in ("attn_norm", "ffn_norm")}
    tensors |= {f"blk.0.{name}": random_weight(*shape) for name, shape in shapes.items()}
    write_gguf(
        folder / "float32.gguf", "llama", tensors, [f"t{n}" for n in range(64)], block_count=1,
        embedding_length=256, feed_forward_length=288, head_count_kv=2, file_type=0,
    )  # fmt: skip
    readers = {}
    for form in GGUF:
        path = folder / f"{form.name}.gguf"
        kind = int(gguf.LlamaFileType[_FILE_TYPES.get(form.name, f"MOSTLY_{form.label}")])
        llama_cpp.quantize(folder / "float32.gguf", path, file_type=kind, pure=True)
        readers[form.name] = gguf.GGUFReader(path)
    return readers


_FILE_TYPES = {f"q{bits}_k": f"MOSTLY_Q{bits}_K_M" for bits in (3, 4, 5)}
_FILE_TYPES["mxfp4"] = "MOSTLY_MXFP4_MOE"


@pytest.mark.parametrize("name", [form.name for form in GGUF])
def test_weights_equal_those_in_a_file_of_llama_cpp(files, name) -> None:
    """Also if rows have no whole blocks, and llama.cpp takes another type instead."""
    tensors = {tensor.name: tensor for tensor in files[name].tensors}
    for part, shape in (("attn_k", (128, 256)), ("ffn_down", (256, 288))):
        tensor = tensors[f"blk.0.{part}.weight"]
        form = FORMATS[name].for_rows(shape[1])
        assert form is not None
        assert tensor.tensor_type.name == form.label
        stored = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        rounded = round_weight(random_weight(*shape), name)
        np.testing.assert_array_equal(rounded.numpy(), stored)
        assert 8 * tensor.n_bytes / tensor.n_elements == form.bits_per_weight(shape[1])


@pytest.mark.parametrize(
    ("name", "size", "n_steps"),
    [("int4_g128", 128, 7.5), ("int8_g32", 32, 127.5), ("int4", 32, 7.5)],
)
def test_integers_are_steps_of_the_largest_of_their_group(name, size, n_steps) -> None:
    original = random_weight(3, 256)
    rounded = round_weight(original, name).reshape(-1, size)
    for old, new in zip(original.reshape(-1, size), rounded, strict=True):
        step = old.abs().max() / n_steps
        torch.testing.assert_close((new / step).round() * step, new)
        assert (new - old).abs().max() <= step * 0.51


def test_fp8_has_three_mantissa_bits() -> None:
    original = random_weight(2, 64)
    for old, new in zip(original, round_weight(original, "fp8"), strict=True):
        scale = old.abs().max() / 448
        for old_value, new_value in zip(old / scale, new / scale, strict=True):
            spacing = 2.0 ** (max(old_value.abs().log2().floor().item(), -6) - 3)
            assert abs(float(new_value - old_value)) <= spacing / 2 * 1.001


@pytest.mark.parametrize("name", FORMATS)
def test_experts_are_rounded_one_by_one(name) -> None:
    experts = torch.stack([random_weight() * factor for factor in (1, 3, 0.1)])
    expected = [round_weight(expert, name) for expert in experts]
    assert all(map(torch.equal, round_weight(experts, name), expected))


@pytest.mark.parametrize(
    ("name", "size", "inputs"), [("int4_g128", 128, 576), ("nvfp4", 16, 72), ("mxfp8", 32, 48)]
)
def test_rows_without_whole_blocks_are_refused(name: str, size: int, inputs: int) -> None:
    with pytest.raises(CellError, match=rf"{name} rounds blocks of {size} weights.* has {inputs}"):
        round_weight(random_weight(2, inputs), name)


def make_outliers() -> torch.Tensor:
    """Make a weight of many magnitudes, with a row and a block of zeros."""
    weight = random_weight(48, 256) * 10 ** torch.linspace(-6, 3, 48)[:, None]
    weight[5], weight[7, :64], weight[9, 3] = 0, 0, 1e4
    return weight


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make_weight", [random_weight, make_outliers, lambda: torch.zeros(2, 64)])
@pytest.mark.parametrize("name", ["nvfp4", "mxfp8"])
def test_weights_equal_those_in_a_file_of_compressed_tensors(name, make_weight, dtype) -> None:
    """The maker packs the codes of its own module into a file, and unpacks them."""
    weight = make_weight().to(dtype)
    scheme = preset_name_to_scheme(f"{name}a16", ["Linear"])
    module = torch.nn.Linear(*reversed(weight.shape), bias=False)
    module.weight.data = weight.float()
    initialize_module_for_quantization(module, scheme)
    blocks = module.weight.data.unflatten(1, (-1, scheme.weights.group_size))
    whole = generate_gparam(*module.weight.data.aminmax()) if name == "nvfp4" else None
    if whole is not None:
        module.weight_global_scale.data = whole
    scales, _ = calculate_qparams(blocks.amin(-1), blocks.amax(-1), scheme.weights, whole)
    module.weight_scale.data = scales
    form = {"nvfp4": "nvfp4-pack-quantized", "mxfp8": "mxfp8-quantized"}[name]
    compressor = BaseCompressor.get_value_from_registry(form)
    stored = compressor.compress(dict(module.state_dict()), scheme)
    unpacked = compressor.decompress(stored, scheme)["weight"].to(dtype)
    if (name, dtype) == ("nvfp4", torch.float32):  # `decompress` gives bfloat16
        codes = unpack_fp4_from_uint8(stored["weight_packed"], *weight.shape, dtype=dtype)
        settings = {"args": scheme.weights, "global_scale": whole}
        unpacked = dequantize(codes, stored["weight_scale"].to(dtype), **settings)
    assert torch.equal(round_weight(weight, name), unpacked)
    # Of the file, the blocks and their scales; NVFP4's scale of the matrix is one number.
    n_bytes = sum(tensor.nbytes for key, tensor in stored.items() if key != "weight_global_scale")
    assert 8 * n_bytes == weight.numel() * FORMATS[name].bits_per_weight(weight.shape[1])


def test_nvfp4_is_the_nearest_of_eight_values() -> None:
    original, levels = random_weight(4, 64), torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    matrix_scale = 448 * 6 / original.abs().max()
    rounded = round_weight(original, "nvfp4").reshape(-1, 16)
    for old, new in zip(original.reshape(-1, 16), rounded, strict=True):
        scale = (old.abs().max() / 6 * matrix_scale).to(torch.float8_e4m3fn).float() / matrix_scale
        distances = (old[:, None].abs() - levels * scale).abs()
        torch.testing.assert_close((new - old).abs(), distances.amin(1), rtol=0, atol=1e-6)


def test_recently_used_weights_are_cached_up_to_a_size() -> None:
    linear = map_of_module(torch.nn.Linear(64, 8, bias=False))
    cache = RoundedWeights(max_bytes=2 * 64 * 8 * 4)
    first_weight = cache.get_weight(0, "a", linear, "int8")
    assert cache.get_weight(0, "a", linear, "int8") is first_weight
    cache.get_weight(0, "b", linear, "int8")
    assert cache.get_weight(0, "a", linear, "int8") is first_weight
    cache.get_weight(1, "a", linear, "int8")
    assert cache.get_weight(0, "a", linear, "int8") is first_weight
    assert cache.get_weight(1, "a", linear, "int8") is cache.get_weight(1, "a", linear, "int8")
