"""llama.cpp's own library, from the wheel llama-cpp-py-sync: its quantiser and its logits."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter

FLOAT32, COPY = 0, "COPY"
"""Of `llama_ftype`: all in float32; and what llama-quantize calls changing nothing."""


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


@cache
def _library() -> tuple[Any, Any, Any]:
    from llama_cpp_py_sync import _cffi_bindings as bindings

    signature = "void(enum ggml_log_level, const char *, void *)"
    silent = bindings.ffi.callback(signature, lambda *_: None)
    library = bindings.get_lib()
    library.llama_log_set(silent, bindings.ffi.NULL)
    return bindings.ffi, library, silent  # which must live as long as the library


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
    ffi, library, _ = _library()
    defaults = library.llama_model_quantize_default_params()
    parameters = ffi.new("llama_model_quantize_params *", defaults)
    parameters.nthread, parameters.pure = 1, pure
    parameters.only_copy, parameters.allow_requantize = file_type == COPY, file_type != COPY
    if types:
        parameters.token_embedding_type = int(GGMLQuantizationType[embedding.upper()])
        parameters.output_tensor_type = int(GGMLQuantizationType[output.upper()])
        patterns = [ffi.new("char[]", pattern.encode()) for pattern, _ in types]
        overrides = ffi.new("struct llama_model_tensor_override[]", len(types) + 1)
        for index, (pattern, (_, kind)) in enumerate(zip(patterns, types, strict=True)):
            overrides[index].pattern = pattern
            overrides[index].type = int(GGMLQuantizationType[kind.upper()])
        overrides[len(types)].pattern = ffi.NULL
        parameters.tt_overrides = overrides
    parameters.ftype = FLOAT32 if file_type == COPY else file_type
    removed = ffi.new("int32_t[]", [*layers, -1])
    parameters.prune_layers = removed if layers else ffi.NULL
    assert library.llama_model_quantize(str(source).encode(), str(target).encode(), parameters) == 0


def run_quantize_line(line: str, folder: Path) -> Path:
    """Obey a line that calls llama-quantize in a folder; says what it made."""
    program, option, layers, source, target, quantisation = shlex.split(line)
    assert (program, option, quantisation) == ("llama-quantize", "--prune-layers", COPY)
    quantize(folder / source, folder / target, [int(layer) for layer in layers.split(",")])
    return folder / target


def read_logits(file: Path, tokens: Sequence[int]) -> np.ndarray:
    """Read tokens in one go: the logits after each."""
    ffi, library, _ = _library()
    parameters = library.llama_model_default_params()
    model = library.llama_model_load_from_file(str(file).encode(), parameters)
    assert model != ffi.NULL
    parameters, count = library.llama_context_default_params(), len(tokens)
    parameters.n_ctx = parameters.n_batch = parameters.n_ubatch = max(64, count)
    parameters.n_threads = parameters.n_threads_batch = 1
    context = library.llama_init_from_model(model, parameters)
    batch = library.llama_batch_init(count, 0, 1)
    batch.n_tokens = count
    for index, token in enumerate(tokens):
        batch.token[index], batch.pos[index], batch.logits[index] = token, index, 1
        batch.n_seq_id[index], batch.seq_id[index][0] = 1, 0
    assert library.llama_decode(context, batch) == 0
    width = library.llama_vocab_n_tokens(library.llama_model_get_vocab(model))
    buffer = ffi.buffer(library.llama_get_logits(context), 4 * count * width)
    logits = np.frombuffer(buffer, dtype=np.float32).reshape(count, width).copy()
    library.llama_batch_free(batch)
    library.llama_free(context)
    library.llama_model_free(model)
    return logits
