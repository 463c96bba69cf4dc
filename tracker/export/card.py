"""Write the model card of a changed model, the same facts as JSON, and recipes of other tools.

Removed and repeated layers have recipes of mergekit and llama.cpp. Weights in formats have options
of llama.cpp, a recipe of llm-compressor, the module settings in mlx-lm's `config.json`, and rules
of GPTQModel.
"""

from __future__ import annotations

import json
import re
import shlex
import string
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from jinja2 import Template

from tracker.core.formats import level_text
from tracker.core.grouping import grouped
from tracker.core.hub import check_name
from tracker.core.identities import ModelIdentity
from tracker.core.kinds import Component
from tracker.core.text import as_code, as_markdown
from tracker.core.weight_formats import FORMATS
from tracker.export.facts import Exported
from tracker.models.sources import PACKAGE, ModelSource
from tracker.report.texts import templates_of

WINDOWS = "llama.cpp, windows"
"""The recipe that states which layers have a window, where llama.cpp would guess wrong."""
CONVERTED = "llama.cpp, converted"
"""The recipe that converts the saved folder: llama-quantize removes layers, but repeats none."""


class Recipe(NamedTuple):
    """One tool's recipe: instructions, its language, and the recipe itself."""

    words: str
    language: str
    text: str = ""
    file: str = ""


RECIPES: dict[str, Recipe] = {
    "safetensors": Recipe(
        "mergekit reads no GGUF file; this makes the folder that it reads:", "python"
    ),
    "mergekit": Recipe("mergekit (`mergekit-yaml RECIPE.yaml OUTPUT`):", "yaml"),
    "llama.cpp": Recipe("llama.cpp, on a GGUF file of the base:", "sh"),
    CONVERTED: Recipe(
        "llama.cpp (llama-quantize repeats no layers), in the folder that is saved:", "sh"
    ),
    WINDOWS: Recipe(
        "llama.cpp computes from a layer's place whether it sees a window, and the layers that are "
        "there do not follow the period of the base. So that file is another model, and so is "
        "whatever convert_hf_to_gguf.py makes of this folder, until the file says which layers see "
        "a window (read by b11739). This writes it:",
        "python",
    ),
    "llm-compressor": Recipe("llm-compressor, as its recipe:", "yaml"),
    "mlx-lm": Recipe("mlx-lm, as `quantization` of `config.json`:", "json"),
    "GPTQModel": Recipe("GPTQModel, as arguments of `QuantizeConfig`:", "json"),
}
"""Recipes of all tools, in the order of their use."""


def by_other_tools(texts: Mapping[str, str]) -> list[Recipe]:
    """Return recipes, tool → text, in the order of their use.

    The last line of a recipe ends without a break.
    """
    return [
        recipe._replace(text=texts[tool].rstrip(), file=f"{tool.lower()}.{recipe.language}")
        for tool, recipe in RECIPES.items()
        if tool in texts
    ]


def why_none(resized: Sequence[str]) -> str:
    """Return why no tool has a recipe; `resized` are changed configuration entries, if any."""
    if not resized:
        return "None: no tool has names for all of these formats and weights."
    reason = (
        "None: mergekit and llama.cpp change how many layers there are and nothing else, and this "
        f"configuration says more of each: {', '.join(resized)}."
    )
    if "layer_types" in resized:
        reason += (
            " A program that computes a layer's kind from its place, as some converters do, makes "
            "another model of this folder: hold its logits against this one's."
        )
    return reason


# Removed and repeated layers

Windows = tuple[str, int, list[bool]]
"""llama.cpp's name of a model, the period of its layers without a window, and whether each layer
has a window."""
_PERIODS = {"gemma3_text": ("gemma3", 6)}
"""Models whose windows llama.cpp computes from a layer's position, unless the file states them.
Neither its converter nor llama-quantize writes them. Values: its name of the model, and the period,
whose last layer has no window."""


def layer_recipes(
    source: ModelSource,
    base: ModelIdentity,
    kept: Sequence[int],
    removed: Sequence[int],
    resized: Sequence[str] = (),
    windows: Windows | None = None,
) -> dict[str, str]:
    """Write how mergekit and llama.cpp make a model: tool → recipe.

    mergekit reads safetensors, so for a GGUF file there is also a program that converts it.
    llama.cpp reads GGUF; a base in another form is called by its name. If layers are repeated and
    none removed, it converts the saved folder. A configuration with other `resized` entries has no
    recipes, since neither tool changes them. Exceptions are entries that llama.cpp derives by
    itself, or that the recipe states: the `windows`.

    Args:
        source: The base.
        base: The base's identity.
        kept: The layers that the model has, in order; repeated ones several times.
        removed: The removed layers.
        resized: The changed entries of the configuration besides the number of layers.
        windows: The result of `windows_of`.

    Returns:
        The recipes; empty if no tool makes the model.
    """
    file = "pruned" if removed else "repeated"
    recipes = {CONVERTED: f"python llama.cpp/convert_hf_to_gguf.py . --outfile {file}.gguf"}
    if removed:
        recipes = {"llama.cpp": prune_command(_gguf_path(source), removed)}
    if resized:
        if windows is None or set(resized) != {"layer_types"}:
            return {}
        name, period, windowed = windows
        if windowed != [number % period != 0 for number in range(1, len(windowed) + 1)]:
            recipes[WINDOWS] = _program("with_windows", name=name, windows=windowed, file=file)
        return recipes
    if source.gguf_file:
        recipes["safetensors"] = as_safetensors(source, base.dtype)
    return {"mergekit": mergekit(_safetensors_path(source, base), base.dtype, kept), **recipes}


def _program(template: str, **values: object) -> str:
    text = (Path(__file__).parent / "templates" / f"{template}.py.txt").read_text(encoding="utf-8")
    return string.Template(text).substitute(values)


def windows_of(kind: str, layer_types: Sequence[str]) -> Windows | None:
    """Return which layers have a window, in the form that llama.cpp needs.

    None for a kind of model for which llama.cpp's rule is unknown.
    """
    if kind not in _PERIODS:
        return None
    return *_PERIODS[kind], [layer == "sliding_attention" for layer in layer_types]


def _gguf_path(source: ModelSource) -> str:
    if source.gguf_file:
        return str(Path(source.location) / source.gguf_file)
    return f"{source.name}.gguf"


def _safetensors_path(source: ModelSource, base: ModelIdentity) -> str:
    """Return a folder that is valid wherever mergekit runs, or the hub's commit."""
    if source.gguf_file:
        return f"./{source.name}"
    if source.is_local:
        return source.location
    # mergekit's own notation of a revision.
    return f"{base.source}@{base.revision}" if base.revision else base.source


def as_safetensors(source: ModelSource, dtype: str) -> str:
    """Write a program that saves a GGUF file as a folder for mergekit."""
    imports, folder = "", repr(source.location)
    if source.source.startswith(PACKAGE):  # wherever it is installed
        module = source.source.removeprefix(PACKAGE).replace("-", "_")
        imports = "from importlib.util import find_spec\n"
        folder = f"find_spec({module!r}).submodule_search_locations[0]"
    file, name = repr(source.gguf_file), repr(source.name)
    return _program(
        "as_safetensors", imports=imports, folder=folder, file=file, dtype=dtype, name=name
    )


def mergekit(base: str, dtype: str, kept: Sequence[int]) -> str:
    """Write a passthrough configuration: ranges of kept layers, half-open; they may overlap."""
    breaks = [n for n, (layer, after) in enumerate(pairwise(kept), 1) if after != layer + 1]
    ranges = [
        [kept[start], kept[stop - 1] + 1] for start, stop in pairwise([0, *breaks, len(kept)])
    ]
    slices = [{"sources": [{"model": base, "layer_range": layers}]} for layers in ranges]
    recipe = {"slices": slices, "merge_method": "passthrough", "dtype": dtype}
    return yaml.safe_dump(recipe, sort_keys=False, default_flow_style=None, width=1000)


def prune_command(file: str, removed: Sequence[int]) -> str:
    """Write the command of llama.cpp (b5740 and later); COPY quantises nothing."""
    layers = ",".join(map(str, sorted(removed)))
    return f"llama-quantize --prune-layers {layers} {shlex.quote(file)} pruned.gguf COPY"


def skip_lists(component: Component, layers: Sequence[int]) -> str:
    """Write the lists that LLM-Drop's own model classes read from a configuration."""
    lists = {"drop_attn_list": "attention", "drop_mlp_list": "mlp"}
    return json.dumps({name: list(layers) if component == of else [] for name, of in lists.items()})


# Weights in formats

Formats = Mapping[str, str]
"""Path of a linear map in the model, as the checkpoint names it → format."""
_INTEGERS = ("int8", "int8_g32", "int8_g128", "int4", "int4_g128", "int4_row")
"""Formats that compressed-tensors and GPTQModel support: symmetric."""
_MLX = ("int8_g32", "int8_g128", "int4", "int4_g128", "mxfp4")
"""Formats that mlx-lm supports. Its integers are affine, with a zero point, tracker's symmetric:
the recipe states only the bits of each module."""
_GGUF_ENDS = ("token_embd.weight", "output.weight")
"""Names of the embedding and the head in GGUF files."""
_ARCHITECTURES = {"mixtral": "llama", "deepseek_v2": "deepseek2", "deepseek_v3": "deepseek2"}
"""llama.cpp's names of kinds of models that differ by more than dashes."""
_EXPERTS = re.compile(r"\.experts\.\w+$")
_IN_A_LAYER = re.compile(r"\.\d+\.")
_BLOCK = re.compile(r"blk\.(\d+)\.(\w+)\.weight")


def format_recipes(
    formats: Formats, architecture: str, layers: int, file: str, tied: str = ""
) -> dict[str, str]:
    """Write how other tools make a model with these formats: tool → recipe.

    Args:
        formats: The format of each map.
        architecture: The model's kind as transformers calls it (`model_type`).
        layers: The number of layers.
        file: The GGUF file of the base, or a name for it.
        tied: The path of the embedding, if it has a format and is the head too.

    Returns:
        Recipes of llama.cpp if all formats are GGUF's and it has names for the maps. Recipes of
        llm-compressor, mlx-lm and GPTQModel if they support all formats and no map is an expert's
        matrix; for the last, all maps must belong to layers.
    """
    recipes = {}
    of_gguf = all(FORMATS[form].is_ggufs for form in formats.values())
    if of_gguf and (names := _gguf_names(formats, architecture, layers)):
        tensors = {name: form for path, form in formats.items() for name in names[path]}
        recipes["llama.cpp"] = quantise_command(tensors, file, bool(tied))
    if any(_EXPERTS.search(path) for path in formats):
        return recipes  # the others look for modules, and experts' matrices are none
    in_layers = all(_IN_A_LAYER.search(path) for path in formats)
    writers: dict[str, tuple[Sequence[str], Callable[[Formats], str]]] = {
        "llm-compressor": ((*_INTEGERS, "fp8"), partial(llm_compressor, tied=tied)),
        "mlx-lm": (_MLX, mlx_lm),
        "GPTQModel": (_INTEGERS if in_layers else (), gptqmodel),
    }
    for tool, (words, write) in writers.items():
        if set(formats.values()) <= {*words}:
            recipes[tool] = write(formats)
    return recipes


def _gguf_names(formats: Formats, architecture: str, layers: int) -> dict[str, list[str]]:
    """Return llama.cpp's names of maps; empty if it has none for one of them."""
    import gguf

    plain_name = _plain(_ARCHITECTURES.get(architecture, architecture))
    kinds = gguf.MODEL_ARCH_NAMES.items()
    kind = next((kind for kind, name in kinds if _plain(name) == plain_name), None)
    if kind is None:
        return {}
    names = gguf.get_tensor_name_map(kind, layers)
    tensors = {path: [names.get_name(part) for part in _halves(path)] for path in formats}
    # Its files store the last one as two tensors, one of them transposed.
    every = [name for parts in tensors.values() for name in parts]
    if any(name is None or name.endswith(".attn_kv_b") for name in every):
        return {}
    return {path: [f"{name}.weight" for name in parts] for path, parts in tensors.items()}


def _halves(path: str) -> list[str]:
    """Return the two maps of a fused expert map, which llama.cpp's converter splits."""
    if not _EXPERTS.search(path) or "gate_up_proj" not in path:
        return [path]
    return [path.replace("gate_up_proj", half) for half in ("gate_proj", "up_proj")]


def _plain(architecture: str) -> str:
    return re.sub(r"[^a-z0-9]", "", architecture.lower())


def tensor_types(formats: Mapping[str, str]) -> list[tuple[str, str]]:
    """List the types of tensors as llama.cpp takes them: regular expressions and types.

    Args:
        formats: Name of a tensor in a GGUF file (`blk.3.ffn_down.weight`) → format.

    Returns:
        One entry for each format and name of a map, with all its layers in one expression.
    """
    types = []
    layers_of: dict[tuple[str, str], list[int]] = {}
    for tensor, form in formats.items():
        block = _BLOCK.fullmatch(tensor)
        if block is None:
            types.append((f"^{re.escape(tensor)}$", FORMATS[form].label.lower()))
        else:
            layers_of.setdefault((block[2], form), []).append(int(block[1]))
    for (name, form), layers in sorted(layers_of.items()):
        numbers = "|".join(map(str, sorted(layers)))
        types.append((rf"^blk\.({numbers})\.{name}\.weight$", FORMATS[form].label.lower()))
    return types


def quantise_command(formats: Mapping[str, str], file: str, tied: bool = False) -> str:
    """Write the command of llama.cpp; all tensors without a format keep sixteen bits.

    If the head is `tied`, it has the embedding's format.
    """
    ends = {end: FORMATS[formats[end]].label.lower() for end in _GGUF_ENDS if end in formats}
    embedding, head = (ends.get(end, "f16") for end in _GGUF_ENDS)
    of_layers = {name: form for name, form in formats.items() if name not in _GGUF_ENDS}
    types = [*tensor_types(of_layers), (r"^blk\..*\.weight$", "f16")]
    lines = [
        f"llama-quantize --allow-requantize --token-embedding-type {embedding} "
        f"--output-tensor-type {embedding if tied else head}"
    ]
    lines += [f"  --tensor-type {shlex.quote(f'{tensors}={kind}')}" for tensors, kind in types]
    return " \\\n".join([*lines, f"  {shlex.quote(file)} quantised.gguf Q8_0"])


def llm_compressor(formats: Formats, tied: str = "") -> str:
    """Write a recipe of llm-compressor, with a group of maps for each format.

    An embedding that is `tied` to the head is left out: the recipe would round it at one end only.
    """
    groups = {}
    by_format = grouped((path for path in formats if path != tied), lambda path: formats[path])
    for number, (name, paths) in enumerate(sorted(by_format.items())):
        form = FORMATS[name]
        weights: dict[str, object] = {
            "num_bits": int(form.bits),
            "type": "float" if name == "fp8" else "int",
            "strategy": "group" if form.block else "channel",
        }
        weights |= {"group_size": form.block} if form.block else {}
        weights |= {"symmetric": True, "dynamic": False}
        targets = [f"re:^{re.escape(path)}$" for path in paths]
        groups[f"group_{number}"] = {"targets": targets, "weights": weights}
    ignored = [] if "lm_head" in formats else ["lm_head"]
    modifier = {"ignore": ignored, "config_groups": groups}
    recipe = {"default_stage": {"default_modifiers": {"QuantizationModifier": modifier}}}
    why = f"# {tied} is left as it is: it is the head too.\n" if tied else ""
    return why + yaml.safe_dump(recipe, sort_keys=False, width=1000)


def mlx_lm(formats: Formats) -> str:
    """Write mlx-lm's entry `quantization` for the modules in a model's `config.json`.

    Its `convert` gets the same from `quant_predicate`, which returns False for all other modules.
    `convert` leaves out a module if its rows have no whole groups of the global size, which is
    therefore the smallest.

    References:
        mlx_lm/utils.py (`quantize_model`, `load_model`) of github.com/ml-explore/mlx-lm at d78bf58.
    """
    modules: dict[str, dict[str, Any]] = {}
    for path, name in formats.items():
        form, mode = FORMATS[name], name if name == "mxfp4" else "affine"
        modules[path] = {"group_size": form.block, "bits": int(form.bits), "mode": mode}
    smallest = min(modules.values(), key=lambda module: (module["group_size"], module["mode"]))
    return json.dumps({**smallest, **modules}, indent=2)


def gptqmodel(formats: Formats) -> str:
    """Write the arguments of GPTQModel's `QuantizeConfig`, a rule for each map.

    A rule is a regular expression that is matched from the beginning of a module's path. The first
    match counts, and rules that begin with `-:` leave a module unchanged. GPTQModel calibrates on
    text.

    References:
        gptqmodel/quantization/config.py (`_resolve_dynamic_override`) of
        github.com/ModelCloud/GPTQModel at f4c327a.
    """
    settings = {
        name: {"bits": int(FORMATS[name].bits), "group_size": FORMATS[name].block or -1}
        for name in formats.values()
    }
    ((usual, _),) = Counter(formats.values()).most_common(1)
    named = "|".join(map(re.escape, formats))
    rules: dict[str, dict[str, Any]] = {f"-:^(?!(?:{named})$)": {}}
    rules |= {f"+:^{re.escape(path)}$": settings[name] for path, name in formats.items()}
    return json.dumps({**settings[usual], "sym": True, "dynamic": rules}, indent=2)


FACTS = "tracker.json"


def write_card(model: Exported, folder: Path) -> None:
    """Write `README.md`, as the hub shows it, and `tracker.json`."""
    from huggingface_hub import ModelCard

    front = _front_matter(model).to_yaml(line_break="\n")
    card = ModelCard(f"---\n{front}\n---\n\n{card_text(model)}")
    card.save(folder / "README.md")
    facts = json.dumps(model.as_json(), indent=2, ensure_ascii=False)
    (folder / FACTS).write_text(facts + "\n", encoding="utf-8")


def card_text(model: Exported) -> str:
    """Write the card below its front matter."""
    recipes, none = by_other_tools(model.recipes), why_none(model.resized)
    return _template().render(model=model, recipes=recipes, why_none=none)


@cache
def _template() -> Template:
    environment = templates_of("tracker.export", keep_trailing_newline=True)
    environment.filters |= {"markdown": as_markdown, "code": as_code, "level": level_text}
    return environment.get_template("card.md.j2")


def _front_matter(model: Exported) -> Any:
    from huggingface_hub import EvalResult, ModelCardData

    results = [
        EvalResult(
            task_type="text-generation",
            dataset_type=row.benchmark,
            dataset_name=f"{row.benchmark}, {row.num_fewshot}-shot, {row.documents}",
            metric_type=row.metric,
            metric_value=row.after.value,
        )
        for row in model.accuracy
        if row.after.value is not None
    ]
    return ModelCardData(
        base_model=model.base.source if _is_on_the_hub(model) else None,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=[*model.change.tags, "layer-tracker"],
        model_name=model.name if results else None,
        eval_results=results or None,
    )


def _is_on_the_hub(model: Exported) -> bool:
    try:
        check_name(model.base.source)
    except ValueError:
        return False
    return model.base.revision is not None
