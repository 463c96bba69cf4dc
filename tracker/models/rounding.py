"""Quantise weights to a format and dequantise them.

For integer formats, weights are rounded by torch. In float32, the results equal those of torchao
0.18's `IntxWeightOnlyConfig`. For GGUF formats, weights are rounded by the package gguf or by
llama.cpp's own library. Activations are not changed.
"""

from __future__ import annotations

import ctypes
import importlib.util
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tracker.schema.distribution import extra_command, package_folder
from tracker.schema.errors import CellError, ExperimentError, first_line, translate_errors
from tracker.schema.weight_formats import FORMATS, WeightFormat

_INTEGER_LEVELS = {"int8": (-128, 127), "int4": (-8, 7)}
_LARGEST_FP8 = torch.finfo(torch.float8_e4m3fn).max
_PACKAGES = {"nf4": "bitsandbytes"} | dict.fromkeys(("nvfp4", "mxfp8"), "compressed_tensors")
"""Package that rounds to a format of the extra `quantise`; by default llama.cpp's library."""
_MIN_SCALE = torch.finfo(torch.float32).eps


def round_weight(weight: Tensor, name: str) -> Tensor:
    """Quantise a weight to a format and dequantise it.

    Args:
        weight: The weight [outputs, inputs] or [experts, outputs, inputs].
        name: Name of the format, a key of `FORMATS`.

    Returns:
        The rounded weight, in the dtype of the original weight.

    Raises:
        CellError: The row length is not a multiple of the format's block size.
    """
    inputs = weight.shape[-1]
    form = FORMATS[name].for_rows(inputs)
    if form is None:
        raise CellError(
            f"{name} rounds blocks of {FORMATS[name].block} weights, but each row of a matrix has "
            f"{inputs} weights; use another format, or leave this linear map out"
        )
    if weight.ndim == 3:  # one after the other: all at once would take several times the memory
        rounded = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)
        for target, matrix in zip(rounded, weight, strict=True):
            target.copy_(round_weight(matrix, name))
        return rounded
    return _round_rows(weight.detach().float(), form).reshape(weight.shape).to(weight.dtype)


def _round_rows(rows: Tensor, form: WeightFormat) -> Tensor:
    if form.round is not None:
        return _round_by_extension(rows, form)
    word, _, _ = form.name.partition("_")
    if word in _INTEGER_LEVELS:
        return _round_to_integers(rows, form.block, *_INTEGER_LEVELS[word])
    if form.name == "fp8":
        scale = (rows.abs().amax(1, keepdim=True) / _LARGEST_FP8).clamp_min(_MIN_SCALE)
        return (rows / scale).to(torch.float8_e4m3fn).float() * scale
    if form.name in ("nvfp4", "mxfp8"):
        return _round_to_micro_blocks(rows, form)
    return _round_to_nf4(rows) if form.name == "nf4" else _round_to_gguf(rows, form)


def _round_by_extension(rows: Tensor, form: WeightFormat) -> Tensor:
    """Round rows with a function that another package defines."""
    assert form.round is not None
    message = f"{form.name} cannot round weights"
    with translate_errors(lambda error: CellError(f"{message}: {first_line(error)}")):
        rounded: Tensor = form.round(rows).reshape(rows.shape).to(rows)
    return rounded


def _round_to_integers(rows: Tensor, group: int, low: int, high: int) -> Tensor:
    groups = rows.reshape(-1, group or rows.shape[1])
    # As in torchao, the largest weight of a group is half of the levels away from 0.
    scale = (groups.abs().amax(1) / ((high - low) / 2)).clamp_min(_MIN_SCALE)
    zero_points = torch.zeros_like(scale, dtype=torch.int32)
    return torch.fake_quantize_per_channel_affine(groups, scale, zero_points, 0, low, high)


def _round_to_nf4(rows: Tensor) -> Tensor:
    from bitsandbytes import functional

    packed, state = functional.quantize_4bit(rows.contiguous(), blocksize=64, quant_type="nf4")
    rounded: Tensor = functional.dequantize_4bit(packed, state)
    return rounded


def _round_to_micro_blocks(rows: Tensor, form: WeightFormat) -> Tensor:
    from compressed_tensors.quantization import fake_quantize, preset_name_to_scheme
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

    settings = preset_name_to_scheme(f"{form.name}a16", ["Linear"]).weights
    low, high = rows.reshape(len(rows), -1, form.block).aminmax(dim=-1)
    # Only NVFP4 has a scale of the whole matrix, besides the scales of its blocks.
    matrix_scale = generate_gparam(low.min(), high.max()) if form.name == "nvfp4" else None
    scales = calculate_qparams(low, high, settings, global_scale=matrix_scale)
    rounded: Tensor = fake_quantize(rows, *scales, settings, global_scale=matrix_scale)
    return rounded


def _round_to_gguf(rows: Tensor, form: WeightFormat) -> Tensor:
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, quants

    ggml_type = GGMLQuantizationType[form.label]
    values = np.ascontiguousarray(rows.cpu().numpy())
    if not form.extra:
        packed = quants.quantize(values, ggml_type)
    else:
        block, size = GGML_QUANT_SIZES[ggml_type]
        packed = np.empty((len(values), values.shape[1] // block * size), np.uint8)
        pointers = values.ctypes.data, packed.ctypes.data
        n_written = _load_llama_cpp()(int(ggml_type), *pointers, 0, *values.shape, None)
        assert n_written == packed.size
    return torch.from_numpy(quants.dequantize(packed, ggml_type)).to(rows.device)


@cache
def _load_llama_cpp() -> Any:
    """Load the function of llama.cpp that quantises rows (ggml.h, `ggml_quantize_chunk`)."""
    folder = package_folder("llama_cpp_py_sync")
    assert folder is not None  # checked by check_installed
    library = next(folder.glob("*ggml-base*"))
    quantise = ctypes.CDLL(str(library)).ggml_quantize_chunk
    quantise.restype = ctypes.c_size_t
    pointer, integer = ctypes.c_void_p, ctypes.c_int64
    quantise.argtypes = [ctypes.c_int, pointer, pointer, integer, integer, integer, pointer]
    return quantise


def check_installed(form: WeightFormat) -> None:
    """Raise ExperimentError if the package that quantises to a format is not installed."""
    package = _PACKAGES.get(form.name, "llama_cpp_py_sync")
    if form.extra and importlib.util.find_spec(package) is None:
        raise ExperimentError(
            f"rounding to {form.name} needs the original implementation of this format, which is "
            f"not installed. Type: {extra_command('quantise')}"
        )
