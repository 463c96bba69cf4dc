"""How other tools give a model the same formats.

llama.cpp is told by options, llm-compressor by a recipe, mlx-lm by what its `config.json` says of
each module, GPTQModel by rules.
"""

from __future__ import annotations

import json
import re
import shlex
from collections import Counter
from collections.abc import Mapping
from typing import Any

import yaml

from tracker.core.grouping import grouped
from tracker.core.weight_formats import FORMATS

Formats = Mapping[str, str]
"""Path of a linear map in the model, as the checkpoint names it → format."""
_GGUF_ENDS = ("token_embd.weight", "output.weight")
"""What its files call the embedding and the head."""
_ARCHITECTURES = {"mixtral": "llama", "deepseek_v2": "deepseek2", "deepseek_v3": "deepseek2"}
"""What llama.cpp calls kinds that it writes otherwise than with other dashes."""
_EXPERTS = re.compile(r"\.experts\.\w+$")
_IN_A_LAYER = re.compile(r"\.\d+\.")
_BLOCK = re.compile(r"blk\.(\d+)\.(\w+)\.weight")


def recipes(
    formats: Formats, architecture: str, layers: int, file: str, tied: str = ""
) -> dict[str, str]:
    """Say how other tools make a model with these formats: tool → what it is given.

    Args:
        formats: Which map has which format.
        architecture: What transformers calls the model's kind (`model_type`).
        layers: How many layers it has.
        file: The GGUF file of the base, or what to call it.
        tied: The path of the embedding, where it has a format and is the head too.

    Returns:
        For llama.cpp where all formats are GGUF's and it has names for the maps; for
        llm-compressor, mlx-lm and GPTQModel where each has all of them, and no expert's matrix is
        among the maps; for the last where all are maps of layers.
    """
    found = {}
    of_gguf = all(FORMATS[form].is_ggufs for form in formats.values())
    if of_gguf and (names := _gguf_names(formats, architecture, layers)):
        tensors = {name: form for path, form in formats.items() for name in names[path]}
        found["llama.cpp"] = llama_quantize(tensors, file, bool(tied))
    if any(_EXPERTS.search(path) for path in formats):
        return found  # the others look for modules, and experts' matrices are none
    if all(form in _SCHEMES for form in formats.values()):
        found["llm-compressor"] = llm_compressor(formats, tied)
    if all(form in _MLX for form in formats.values()):
        found["mlx-lm"] = mlx_lm(formats)
    in_layers = all(_IN_A_LAYER.search(path) for path in formats)
    if in_layers and all(form in _GPTQ for form in formats.values()):
        found["GPTQModel"] = gptqmodel(formats)
    return found


def _gguf_names(formats: Formats, architecture: str, layers: int) -> dict[str, list[str]]:
    """Find llama.cpp's names of maps; empty where it has none for one of them."""
    import gguf

    wanted = _plain(_ARCHITECTURES.get(architecture, architecture))
    known = next((a for a, name in gguf.MODEL_ARCH_NAMES.items() if _plain(name) == wanted), None)
    if known is None:
        return {}
    names = gguf.get_tensor_name_map(known, layers)
    found = {path: [names.get_name(part) for part in _parted(path)] for path in formats}
    # Its files hold the last one as two others, one of them turned.
    if any(name is None or name.endswith(".attn_kv_b") for each in found.values() for name in each):
        return {}
    return {path: [f"{name}.weight" for name in each] for path, each in found.items()}


def _parted(path: str) -> list[str]:
    """Part experts' gates from what they open, as llama.cpp's converter does."""
    if not _EXPERTS.search(path) or "gate_up_proj" not in path:
        return [path]
    return [path.replace("gate_up_proj", half) for half in ("gate_proj", "up_proj")]


def _plain(architecture: str) -> str:
    return re.sub(r"[^a-z0-9]", "", architecture.lower())


def tensor_types(formats: Mapping[str, str]) -> list[tuple[str, str]]:
    """Write which tensors have which type: a regular expression and a type, in llama.cpp's words.

    Args:
        formats: Name of a tensor in a GGUF file (`blk.3.ffn_down.weight`) → format.

    Returns:
        One a format and name of a map: its layers stand in one expression.
    """
    said = []
    by_name: dict[tuple[str, str], list[int]] = {}
    for tensor, form in formats.items():
        found = _BLOCK.fullmatch(tensor)
        if found is None:
            said.append((f"^{re.escape(tensor)}$", FORMATS[form].label.lower()))
            continue
        by_name.setdefault((found[2], form), []).append(int(found[1]))
    for (name, form), layers in sorted(by_name.items()):
        which = "|".join(map(str, sorted(layers)))
        said.append((rf"^blk\.({which})\.{name}\.weight$", FORMATS[form].label.lower()))
    return said


def llama_quantize(formats: Mapping[str, str], file: str, tied: bool = False) -> str:
    """Write the command of llama.cpp; all that is not named keeps sixteen bits.

    Where the head is `tied` it has the embedding's format.
    """
    ends = {end: FORMATS[formats[end]].label.lower() for end in _GGUF_ENDS if end in formats}
    embedding, head = (ends.get(end, "f16") for end in _GGUF_ENDS)
    of_layers = {name: form for name, form in formats.items() if name not in _GGUF_ENDS}
    types = [*tensor_types(of_layers), (r"^blk\..*\.weight$", "f16")]
    lines = [
        f"llama-quantize --allow-requantize --token-embedding-type {embedding} "
        f"--output-tensor-type {embedding if tied else head}"
    ]
    lines += [f"  --tensor-type {shlex.quote(f'{which}={kind}')}" for which, kind in types]
    return " \\\n".join([*lines, f"  {shlex.quote(file)} quantised.gguf Q8_0"])


_SCHEMES: dict[str, dict[str, object]] = {
    "int8": {"num_bits": 8, "type": "int", "strategy": "channel"},
    "int8_g32": {"num_bits": 8, "type": "int", "strategy": "group", "group_size": 32},
    "int8_g128": {"num_bits": 8, "type": "int", "strategy": "group", "group_size": 128},
    "int4": {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32},
    "int4_g128": {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 128},
    "int4_row": {"num_bits": 4, "type": "int", "strategy": "channel"},
    "fp8": {"num_bits": 8, "type": "float", "strategy": "channel"},
}
"""Formats as compressed-tensors writes them."""


def llm_compressor(formats: Formats, tied: str = "") -> str:
    """Write a recipe of llm-compressor: a group for each format, with the maps that are in it.

    An embedding that is `tied` to the head is left as it is: the recipe would round it once only.
    """
    groups = {}
    by_format = grouped((path for path in formats if path != tied), lambda path: formats[path])
    for number, (form, paths) in enumerate(sorted(by_format.items())):
        weights = {**_SCHEMES[form], "symmetric": True, "dynamic": False}
        targets = [f"re:^{re.escape(path)}$" for path in paths]
        groups[f"group_{number}"] = {"targets": targets, "weights": weights}
    ignored = [] if "lm_head" in formats else ["lm_head"]
    modifier = {"ignore": ignored, "config_groups": groups}
    said = {"default_stage": {"default_modifiers": {"QuantizationModifier": modifier}}}
    why = f"# {tied} is left as it is: it is the head too.\n" if tied else ""
    return why + yaml.safe_dump(said, sort_keys=False, width=1000)


_MLX: dict[str, dict[str, Any]] = {
    "int8_g32": {"group_size": 32, "bits": 8, "mode": "affine"},
    "int8_g128": {"group_size": 128, "bits": 8, "mode": "affine"},
    "int4": {"group_size": 32, "bits": 4, "mode": "affine"},
    "int4_g128": {"group_size": 128, "bits": 4, "mode": "affine"},
    "mxfp4": {"group_size": 32, "bits": 4, "mode": "mxfp4"},
}
"""Formats as mlx-lm names them. Its integers are affine, with a zero point, and ours symmetric:
told is how many bits each module has."""


def mlx_lm(formats: Formats) -> str:
    """Write what mlx-lm keeps of each module under `quantization` in a model's `config.json`.

    Its `convert` is given the same by `quant_predicate`, which says False of all that is not named.
    A module is left out there if its rows have no whole groups of the size that stands for all,
    which is therefore the smallest.

    References:
        mlx_lm/utils.py (`quantize_model`, `load_model`) of github.com/ml-explore/mlx-lm at d78bf58.
    """
    told = {path: _MLX[form] for path, form in formats.items()}
    smallest = min(told.values(), key=lambda each: (each["group_size"], each["mode"]))
    return json.dumps({**smallest, **told}, indent=2)


_GPTQ: dict[str, dict[str, Any]] = {
    form: {"bits": scheme["num_bits"], "group_size": scheme.get("group_size", -1)}
    for form, scheme in _SCHEMES.items()
    if scheme["type"] == "int"
}
"""Formats as GPTQModel names them: symmetric, as ours. It calibrates what it rounds on text."""


def gptqmodel(formats: Formats) -> str:
    """Write the arguments of GPTQModel's `QuantizeConfig`, a rule for each map.

    A rule is a regular expression that is matched from the beginning of a module's path; the first
    one counts, and those that begin with `-:` leave a module as it is.

    References:
        gptqmodel/quantization/config.py (`_resolve_dynamic_override`) of
        github.com/ModelCloud/GPTQModel at f4c327a.
    """
    (usual, _), *_ = Counter(formats.values()).most_common(1)
    named = "|".join(map(re.escape, formats))
    rules: dict[str, dict[str, Any]] = {f"-:^(?!(?:{named})$)": {}}
    rules |= {f"+:^{re.escape(path)}$": _GPTQ[form] for path, form in formats.items()}
    return json.dumps({**_GPTQ[usual], "sym": True, "dynamic": rules}, indent=2)
