"""How other tools make the same model, and what they are told where plain transformers cannot."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from string import Template

import yaml

from tracker.core.identities import ModelIdentity
from tracker.core.kinds import Component
from tracker.models.sources import PACKAGE, ModelSource

WINDOWS = "llama.cpp, windows"
"""The recipe that writes down which layers see a window, where llama.cpp would guess wrong."""
CONVERTED = "llama.cpp, converted"
"""The recipe that converts the saved folder: llama-quantize removes layers, and repeats none."""
Windows = tuple[str, int, list[bool]]
"""What llama.cpp calls a model, after how many layers it expects one that sees everything, and of
each layer whether it sees a window."""
_PERIODS = {"gemma3_text": ("gemma3", 6)}
"""Models of which llama.cpp computes from a layer's place whether it sees a window, unless the file
says it, which neither its converter nor llama-quantize writes: its name of them, and the period,
whose last layer sees everything."""
_AS_FOLDER = "mergekit reads no GGUF file; this makes the folder that it reads:"
_WHY_CONVERTED = "llama.cpp (llama-quantize repeats no layers), in the folder that is saved:"
_WHY_WINDOWS = (
    "llama.cpp computes from a layer's place whether it sees a window, and the layers that are "
    "there do not follow the period of the base. So that file is another model, and so is whatever "
    "convert_hf_to_gguf.py makes of this folder, until the file says which layers see a window "
    "(read by b11739). This writes it:"
)
_AS_SAFETENSORS = Template("""\
from transformers import AutoModelForCausalLM, AutoTokenizer
$imports
folder, file = $folder, $file
model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype="$dtype")
model.hf_quantizer = None  # it is dequantised: only these marks are left
del model.config.quantization_config
model.save_pretrained($name)
AutoTokenizer.from_pretrained(folder, gguf_file=file).save_pretrained($name)
""")
_WITH_WINDOWS = Template("""\
import gguf

windows = $windows
read, write = gguf.GGUFReader("$file.gguf"), gguf.GGUFWriter("$file-windows.gguf", "$name")
for field in read.fields.values():
    if not field.name.startswith("GGUF.") and field.name != "general.architecture":
        write.add_key_value(field.name, field.contents(), field.types[0], field.types[-1])
write.add_array("$name.attention.sliding_window_pattern", windows)
for tensor in read.tensors:
    write.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
write.write_header_to_file()
write.write_kv_data_to_file()
write.write_tensors_to_file()
write.close()
""")


def recipes(
    source: ModelSource,
    base: ModelIdentity,
    kept: Sequence[int],
    removed: Sequence[int],
    resized: Sequence[str] = (),
    windows: Windows | None = None,
) -> dict[str, str]:
    """Say how mergekit and llama.cpp make a model: tool → what it is given.

    mergekit reads safetensors: of a GGUF file there is also what writes it as such. llama.cpp reads
    GGUF: a base in another form is called by its name. Where no layer goes, some come again: then
    it converts the folder that is saved. There is nothing where a configuration has entries that
    are `resized`, which neither does, but what llama.cpp finds out by itself, or is told: the
    `windows`.

    Args:
        source: The base.
        base: Which one it is.
        kept: The layers that the model has, in order; repeated ones several times.
        removed: The layers that go.
        resized: What the configuration says anew.
        windows: What `windows_of` says.

    Returns:
        What each tool is given; empty where none makes the model.
    """
    file = "pruned" if removed else "repeated"
    made = {CONVERTED: f"python llama.cpp/convert_hf_to_gguf.py . --outfile {file}.gguf"}
    if removed:
        made = {"llama.cpp": llama_quantize(_gguf(source), removed)}
    if resized:
        if windows is None or set(resized) != {"layer_types"}:
            return {}
        name, period, windowed = windows
        if windowed != [place % period != 0 for place in range(1, len(windowed) + 1)]:
            made[WINDOWS] = _WITH_WINDOWS.substitute(name=name, windows=windowed, file=file)
        return made
    found = {"mergekit": mergekit(_safetensors(source, base), base.dtype, kept)}
    if source.gguf_file:
        found = {"safetensors": as_safetensors(source, base.dtype), **found}
    return found | made


def why_none(resized: Sequence[str]) -> str:
    """Say why no tool is told how to make a model."""
    said = (
        "None: mergekit and llama.cpp change how many layers there are and nothing else, and this "
        f"configuration says more of each: {', '.join(resized)}."
    )
    if "layer_types" in resized:
        said += (
            " A program that computes a layer's kind from its place, as some converters do, makes "
            "another model of this folder: hold its logits against this one's."
        )
    return said


def by_other_tools(found: Mapping[str, str]) -> list[tuple[str, str, str]]:
    """Put recipes into the order in which they are followed: each in words, its language, itself.

    The last line of a recipe ends without a break.
    """
    return [
        (words, language, found[tool].rstrip())
        for tool, words, language in (
            ("safetensors", _AS_FOLDER, "python"),
            ("mergekit", "mergekit (`mergekit-yaml RECIPE.yaml OUTPUT`):", "yaml"),
            ("llama.cpp", "llama.cpp, on a GGUF file of the base:", "sh"),
            (CONVERTED, _WHY_CONVERTED, "sh"),
            (WINDOWS, _WHY_WINDOWS, "python"),
        )
        if tool in found
    ]


def windows_of(kind: str, layer_types: Sequence[str]) -> Windows | None:
    """Say of which layers llama.cpp must know that they see a window.

    None for a kind of model of which it is not known how llama.cpp finds that out.
    """
    if kind not in _PERIODS:
        return None
    return *_PERIODS[kind], [each == "sliding_attention" for each in layer_types]


def _gguf(source: ModelSource) -> str:
    """Where llama.cpp finds the base."""
    if source.gguf_file:
        return str(Path(source.location) / source.gguf_file)
    return f"{source.name}.gguf"


def _safetensors(source: ModelSource, base: ModelIdentity) -> str:
    """Where mergekit finds the base: a folder from wherever it is called, or the hub's commit."""
    if source.gguf_file:
        return f"./{source.name}"
    if source.is_local:
        return source.location
    # mergekit's own way to write a revision.
    return f"{base.source}@{base.revision}" if base.revision else base.source


def as_safetensors(source: ModelSource, dtype: str) -> str:
    """Write a program that saves a GGUF file as the folder that mergekit is given."""
    imports, folder = "", repr(source.location)
    if source.source.startswith(PACKAGE):  # wherever it is installed
        module = source.source.removeprefix(PACKAGE).replace("-", "_")
        imports = "from importlib.util import find_spec\n"
        folder = f"find_spec({module!r}).submodule_search_locations[0]"
    said = {"imports": imports, "folder": folder, "file": repr(source.gguf_file), "dtype": dtype}
    return _AS_SAFETENSORS.substitute(said, name=repr(source.name))


def mergekit(base: str, dtype: str, kept: Sequence[int]) -> str:
    """Write a passthrough configuration: ranges of kept layers, half-open; they may overlap."""
    slices = [
        {"sources": [{"model": base, "layer_range": [first, stop]}]} for first, stop in runs(kept)
    ]
    said = {"slices": slices, "merge_method": "passthrough", "dtype": dtype}
    return yaml.safe_dump(said, sort_keys=False, default_flow_style=None, width=1000)


def runs(kept: Sequence[int]) -> list[tuple[int, int]]:
    """Put layers into half-open ranges, each as long as it ascends by one."""
    breaks = [place for place, (one, next_) in enumerate(pairwise(kept), 1) if next_ != one + 1]
    bounds = [0, *breaks, len(kept)]
    return [(kept[start], kept[stop - 1] + 1) for start, stop in pairwise(bounds)]


def llama_quantize(file: str, removed: Sequence[int]) -> str:
    """Write the command of llama.cpp (b5740 and later); COPY quantises nothing."""
    layers = ",".join(map(str, sorted(removed)))
    return f"llama-quantize --prune-layers {layers} {shlex.quote(file)} pruned.gguf COPY"


def skip_lists(component: Component, layers: Sequence[int]) -> str:
    """Write what LLM-Drop's own model classes read from a configuration."""
    lists = {"drop_attn_list": "attention", "drop_mlp_list": "mlp"}
    return json.dumps({name: list(layers) if component == of else [] for name, of in lists.items()})
