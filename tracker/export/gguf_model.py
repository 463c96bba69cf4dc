"""Write a model with quantised weights as a GGUF file with llama.cpp, and check the file."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import gguf
import numpy as np
import torch

from tracker.export.card import gguf_tensors
from tracker.export.facts import ExportedModel, GgufFile
from tracker.export.llama_cpp import FLOAT32, Q8_0, type_number
from tracker.export.proof import ExpectedAnswers, compare_logits
from tracker.export.serving import LLAMA_CPP_PROGRAM, run_program
from tracker.ledger.files import write_problem
from tracker.models.gguf_file import Reader, cached_gguf_parsing
from tracker.models.sources import find_model
from tracker.schema.config import ModelSpec
from tracker.schema.distribution import extra_command, package_folder
from tracker.schema.errors import RequestError, WorkError
from tracker.schema.formats import join_words
from tracker.schema.weight_formats import FORMATS

_UNROUNDED_TYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
"""GGUF's type for all values of a dtype."""


def refuse_gguf(file: Path, formats: Collection[str], models: Iterable[ModelSpec]) -> None:
    """Raise RequestError if a GGUF file with these formats cannot be written.

    Args:
        file: The file to create.
        formats: Formats from which the search chooses.
        models: The base models.
    """
    if file.exists() or file.is_symlink():
        raise RequestError(f"--gguf: {file} exists; name a new file")
    if not file.absolute().parent.is_dir():
        raise RequestError(f"--gguf: there is no folder {file.absolute().parent}")
    if not os.access(file.absolute().parent, os.W_OK):
        raise RequestError(f"--gguf: {write_problem(file.absolute().parent)}")
    if package_folder("llama_cpp_py_sync") is None:
        install = extra_command("quantise")
        raise RequestError(f"--gguf needs llama.cpp, which is not installed. Type: {install}")
    supported = [name for name, form in FORMATS.items() if form.is_gguf]
    if others := sorted({*formats} & FORMATS.keys() - {*supported}):
        raise RequestError(
            f"--gguf: GGUF files have no {join_words(others)}; choose --format from "
            f"{', '.join(supported)}"
        )
    for source in map(find_model, models):
        if source.gguf_file is None:
            raise RequestError(
                f"--gguf needs a model that is loaded from a GGUF file, but {source.source} is not "
                "a GGUF file. Type --output FOLDER instead. Then convert the model with "
                "llama.cpp's convert_hf_to_gguf.py, and run FOLDER/llama.cpp.sh on the converted "
                "file"
            )


def write_gguf(
    target: Path, base: Path, model: ExportedModel, checkpoint: Path, expected: ExpectedAnswers
) -> GgufFile:
    """Write a GGUF file with llama.cpp, and compare it with a checkpoint.

    Weights and logits are compared. If a weight is not in `model.formats`, the weight has the same
    type as in the base model's file.

    Args:
        target: The file to write, in a folder for temporary files.
        base: The base model's GGUF file.
        model: The saved model.
        checkpoint: The folder of the saved model.
        expected: Logits of the changed model in memory.

    Returns:
        The path and size of the file, and the results of the comparison.

    Raises:
        WorkError: llama.cpp cannot write or read the file, or weights or logits differ from the
            checkpoint.
    """
    reader = Reader(base)
    architecture = reader.get_field(gguf.Keys.General.ARCHITECTURE).contents()
    names = gguf_tensors(model.formats, architecture, model.before.layers)
    types = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    if not names or not names.keys() <= types.keys():
        raise WorkError(f"the file {base} lacks tensors for rounded weights of the saved model")
    rows = {tensor.name: int(tensor.shape[0]) for tensor in reader.tensors}
    for name, form in names.items():
        types[name] = getattr(FORMATS[form].for_rows(rows[name]), "label", form)
    unrounded = target.with_name("unrounded.gguf")
    _copy_with_unrounded(reader, unrounded, architecture, names, _UNROUNDED_TYPES[model.base.dtype])
    _quantize(unrounded, target, types)
    unrounded.unlink()
    _compare_weights(target, checkpoint, model.base.dtype)
    # llama.cpp multiplies quantised weights by activations of 8 bits, and others by unrounded ones.
    _quantize(target, unrounded, {})
    logits = _read_logits(unrounded, expected, exact=True)
    difference = compare_logits(logits, expected, "llama.cpp")
    usual = torch.cat(_read_logits(target, expected, exact=False)).argmax(1)
    n_equal = int((usual == torch.cat(expected.logits).argmax(1)).sum())
    return GgufFile(target, target.stat().st_size, difference, n_equal, len(usual))


def _copy_with_unrounded(
    reader: Reader, target: Path, architecture: str, names: Collection[str], kind: str
) -> None:
    """Write a copy of a GGUF file in which some tensors are converted to an unrounded type.

    Args:
        reader: Reader of the original file.
        target: The file to write.
        architecture: llama.cpp's name of the architecture.
        names: Names of the tensors to store in the unrounded type.
        kind: The unrounded type, such as `BF16`.
    """
    writer = gguf.GGUFWriter(target, architecture, endianess=reader.endianess)
    writer.data_alignment = reader.alignment
    for field in reader.fields.values():
        if field.name != gguf.Keys.General.ARCHITECTURE and not field.name.startswith("GGUF."):
            writer.add_key_value(field.name, field.contents(), field.types[0], field.types[-1])
    number = gguf.GGMLQuantizationType[kind]
    for tensor in reader.tensors:
        data, tensor_type = tensor.data, tensor.tensor_type
        if tensor.name in names:
            values = gguf.quants.dequantize(data, tensor_type)
            data, tensor_type = gguf.quants.quantize(values, number), number
        writer.add_tensor(tensor.name, data, raw_dtype=tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _quantize(source: Path, target: Path, types: Mapping[str, str]) -> None:
    """Write a copy of a GGUF file with other types of tensors.

    Args:
        source: The file to read.
        target: The file to write.
        types: Name of a tensor → type; empty to store all tensors in float32.
    """
    settings: dict[str, Any] = {"ftype": Q8_0 if types else FLOAT32}
    if types:
        embedding = types["token_embd.weight"]
        settings["token_embedding_type"] = type_number(embedding)
        settings["output_tensor_type"] = type_number(types.get("output.weight", embedding))
    patterns = {f"^{re.escape(name)}$": kind for name, kind in types.items()}
    request = {"source": str(source), "target": str(target), "types": patterns, **settings}
    run_program({"function": "quantize", **request}, LLAMA_CPP_PROGRAM)


def _compare_weights(file: Path, checkpoint: Path, dtype: str) -> None:
    """Raise WorkError unless plain transformers reads the same weights from a file and a folder."""
    from transformers import AutoModelForCausalLM

    load = AutoModelForCausalLM.from_pretrained
    with cached_gguf_parsing():
        # With a relative name, transformers prefers such a file in the current folder.
        path = str(file.absolute())
        written = load(file.parent, gguf_file=path, dtype=dtype).state_dict()
    for name, weight in load(checkpoint, dtype=dtype).state_dict().items():
        if name not in written or not weight.equal(written[name]):
            raise WorkError(f"the GGUF file and the checkpoint differ in the weight {name}")


def _read_logits(file: Path, expected: ExpectedAnswers, exact: bool) -> list[torch.Tensor]:
    """Return llama.cpp's logits of `PROOF_TEXTS`; if `exact`, with attention in float32."""
    with TemporaryDirectory() as folder:
        output = f"{folder}/logits.npz"
        request = {"function": "save_logits", "output": output, "file": str(file), "exact": exact}
        run_program({**request, "texts": expected.tokens}, LLAMA_CPP_PROGRAM)
        with np.load(output) as arrays:
            return [torch.from_numpy(arrays[name]) for name in arrays.files]
