"""llama.cpp's quantiser with the options of llama-quantize, and small files for it."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFWriter

from tracker.export.llama_cpp import FLOAT32, type_number
from tracker.export.llama_cpp import quantize as quantize_file

COPY = "COPY"
"""What llama-quantize calls changing nothing."""


def write_gguf(
    file: Path, architecture: str, tensors: Mapping[str, Any], tokens: Sequence[str], **fields: Any
) -> Path:
    """Write a file as llama.cpp does, in float32: `fields` by the names of the writer's methods."""
    writer = GGUFWriter(file, architecture)
    sizes = {"context_length": 64, "head_count": 4, "head_count_kv": 4, "layer_norm_rms_eps": 1e-5}
    for name, value in (sizes | {"tokenizer_model": "gpt2", "token_list": tokens} | fields).items():
        getattr(writer, f"add_{name}")(value)
    for name, tensor in tensors.items():
        writer.add_tensor(f"{name}.weight", np.ascontiguousarray(tensor, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def quantize(
    source: Path,
    target: Path,
    layers: Sequence[int] = (),
    file_type: int | str = COPY,
    pure: bool = False,
    types: Sequence[tuple[str, str]] = (),
    embedding: str = "f16",
    output: str = "f16",
) -> None:
    """Do what llama-quantize does (tools/quantize/quantize.cpp).

    With its --prune-layers, --pure, and --tensor-type, with which --token-embedding-type and
    --output-tensor-type are told too.
    """
    settings: dict[str, Any] = {"pure": pure, "only_copy": file_type == COPY}
    settings["ftype"] = FLOAT32 if file_type == COPY else file_type
    if types:
        settings["token_embedding_type"] = type_number(embedding)
        settings["output_tensor_type"] = type_number(output)
    if layers:
        from llama_cpp_py_sync import _cffi_bindings

        settings["prune_layers"] = _cffi_bindings.ffi.new("int32_t[]", [*layers, -1])
    quantize_file(source, target, dict(types), **settings)


def run_quantize_line(line: str, folder: Path) -> Path:
    """Obey a line that calls llama-quantize in a folder; says what it made."""
    program, option, layers, source, target, quantisation = shlex.split(line)
    assert (program, option, quantisation) == ("llama-quantize", "--prune-layers", COPY)
    quantize(folder / source, folder / target, [int(layer) for layer in layers.split(",")])
    return folder / target
