"""Weights in a format: rounded and dequantised.

Integers are symmetric and rounded to nearest, like torchao's weight-only configurations, by torch's
own `fake_quantize_per_channel_affine`; in float32 the weights equal those of torchao 0.18's
`IntxWeightOnlyConfig` to the bit. GGUF formats are rounded by the package gguf or by llama.cpp's
own library, and read back by gguf. Activations are not changed.
"""

from __future__ import annotations

import ctypes
import importlib.util
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tracker.core.distribution import install_extra
from tracker.core.errors import CellError, ExperimentError, first_line, translate_errors
from tracker.core.weight_formats import FORMATS, WeightFormat

_INTEGERS = {"int8": (-128, 127), "int4": (-8, 7)}
_LARGEST_FP8 = torch.finfo(torch.float8_e4m3fn).max
_PACKAGES = ("llama_cpp_py_sync", "bitsandbytes")
_TINY = torch.finfo(torch.float32).eps


def in_format(weight: Tensor, name: str) -> Tensor:
    """Round a weight to a format and dequantise it.

    Args:
        weight: [outputs, inputs], or for experts [experts, outputs, inputs].
        name: One of `FORMATS`.

    Returns:
        The weight, in its own dtype.

    Raises:
        CellError: Its rows have no whole blocks of the format.
    """
    inputs = weight.shape[-1]
    form = FORMATS[name].for_rows(inputs)
    if form is None:
        raise CellError(
            f"{name} keeps {FORMATS[name].block} inputs together, and a weight has rows of "
            f"{inputs}; take another format, or leave such maps out"
        )
    if weight.ndim == 3:  # one after the other: all at once would take several times the memory
        rounded = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)
        for target, matrix in zip(rounded, weight, strict=True):
            target.copy_(in_format(matrix, name))
        return rounded
    return _maker(form)(weight.detach().float()).reshape(weight.shape).to(weight.dtype)


def _maker(form: WeightFormat) -> Callable[[Tensor], Tensor]:
    if form.round is not None:
        return partial(_by_extension, form=form)
    word, _, _ = form.name.partition("_")
    if word in _INTEGERS:
        return partial(_integers, group=form.block, levels=_INTEGERS[word])
    if form.name == "fp8":
        return _fp8
    return _nf4 if form.name == "nf4" else partial(_gguf, form=form)


def _by_extension(rows: Tensor, form: WeightFormat) -> Tensor:
    """Round rows by another package's code; raise CellError if it fails or changes their shape."""
    assert form.round is not None
    problem = f"{form.name} cannot round weights"
    with translate_errors(lambda error: CellError(f"{problem}: {first_line(error)}")):
        rounded: Tensor = form.round(rows).reshape(rows.shape).to(rows)
    return rounded


def _integers(rows: Tensor, group: int, levels: tuple[int, int]) -> Tensor:
    parts = rows.reshape(-1, group or rows.shape[1])
    low, high = levels
    # As in torchao, the largest weight of a group is half of the levels away from 0.
    scale = (parts.abs().amax(1) / ((high - low) / 2)).clamp_min(_TINY)
    zero = torch.zeros_like(scale, dtype=torch.int32)
    return torch.fake_quantize_per_channel_affine(parts, scale, zero, 0, low, high)


def _fp8(rows: Tensor) -> Tensor:
    scale = (rows.abs().amax(1, keepdim=True) / _LARGEST_FP8).clamp_min(_TINY)
    return (rows / scale).to(torch.float8_e4m3fn).float() * scale


def _nf4(rows: Tensor) -> Tensor:
    from bitsandbytes import functional

    packed, state = functional.quantize_4bit(rows.contiguous(), blocksize=64, quant_type="nf4")
    rounded: Tensor = functional.dequantize_4bit(packed, state)
    return rounded


def _gguf(rows: Tensor, form: WeightFormat) -> Tensor:
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, quants

    kind = GGMLQuantizationType[form.label]
    values = np.ascontiguousarray(rows.cpu().numpy())
    if not form.extra:
        packed = quants.quantize(values, kind)
    else:
        block, size = GGML_QUANT_SIZES[kind]
        packed = np.empty((len(values), values.shape[1] // block * size), np.uint8)
        pointers = values.ctypes.data, packed.ctypes.data
        written = _llama_cpp()(int(kind), *pointers, 0, *values.shape, None)
        assert written == packed.size
    return torch.from_numpy(quants.dequantize(packed, kind)).to(rows.device)


@cache
def _llama_cpp() -> Any:
    """Load the function of llama.cpp that rounds rows (ggml.h, `ggml_quantize_chunk`)."""
    import llama_cpp_py_sync

    library = next(Path(llama_cpp_py_sync.__file__).parent.glob("*ggml-base*"))
    quantise = ctypes.CDLL(str(library)).ggml_quantize_chunk
    quantise.restype = ctypes.c_size_t
    quantise.argtypes = [ctypes.c_int, *[ctypes.c_void_p] * 2, *[ctypes.c_int64] * 3]
    quantise.argtypes += [ctypes.c_void_p]
    return quantise


def refuse_uninstalled(form: WeightFormat) -> None:
    """Raise ExperimentError for a format whose package is not installed."""
    if form.extra and importlib.util.find_spec(_PACKAGES[form.name == "nf4"]) is None:
        raise ExperimentError(
            f"{form.name} is rounded by its makers' code, which is not installed. Type: "
            f"{install_extra('quantise')}"
        )
