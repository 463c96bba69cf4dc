"""Write the card of a changed model, with recipes to make the model with other tools.

For removed and repeated layers, there are recipes for mergekit and llama.cpp. For weights rounded
to quantised formats, there are recipes for llama.cpp, llm-compressor, mlx-lm and GPTQModel.
"""

from __future__ import annotations

import json
import re
import shlex
import string
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import cache, partial
from itertools import chain, groupby
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from jinja2 import Template

from tracker.export.facts import FACT_TEXTS, ExportedModel
from tracker.ledger.files import write_text
from tracker.models.sources import MODEL_PACKAGE, ModelSource
from tracker.schema.formats import join_words, level_text
from tracker.schema.grouping import group_by
from tracker.schema.identities import ModelIdentity
from tracker.schema.kinds import Component
from tracker.schema.model_parts import fused_map
from tracker.schema.text import escape_markdown, markdown_code
from tracker.schema.text_templates import open_templates
from tracker.schema.weight_formats import FORMATS

WINDOWS_RECIPE = "llama.cpp, windows"
"""Recipe that states which layers have an attention window, since llama.cpp would guess wrong."""
CONVERTER_RECIPE = "llama.cpp, converted"
"""Recipe that converts the saved folder: llama-quantize can remove layers, but not repeat them."""


class Recipe(NamedTuple):
    """Recipe to make a model with another tool.

    Attributes:
        words: Instructions.
        language: Language of the code or settings, such as `yaml`.
        text: The code or settings.
        file: Name of the file for the code or settings.
    """

    words: str
    language: str
    text: str = ""
    file: str = ""


RECIPES: dict[str, Recipe] = {
    "safetensors": Recipe(
        "mergekit cannot read GGUF files; this program writes a folder that mergekit can read:",
        "python",
    ),
    "mergekit": Recipe("mergekit (`mergekit-yaml RECIPE.yaml OUTPUT`):", "yaml"),
    "llama.cpp": Recipe("llama.cpp (run this command on a GGUF file of the base model):", "sh"),
    CONVERTER_RECIPE: Recipe(
        "llama.cpp (run this command in the saved folder, because llama-quantize cannot repeat "
        "layers):",
        "sh",
    ),
    WINDOWS_RECIPE: Recipe(
        "llama.cpp infers from a layer's index whether the layer has a sliding window, and infers "
        "wrongly for this model. Do not use a GGUF file of this model that llama-quantize or "
        "convert_hf_to_gguf.py wrote. A right GGUF file lists the layers with a window, and "
        "llama.cpp b11739 reads the list. This program adds the list to a GGUF file:",
        "python",
    ),
    "llm-compressor": Recipe("llm-compressor, as its recipe:", "yaml"),
    "mlx-lm": Recipe("mlx-lm, as `quantization` of `config.json`:", "json"),
    "GPTQModel": Recipe("GPTQModel, as arguments of `QuantizeConfig`:", "json"),
}
"""Recipes of all tools, without their texts, in the order of use."""


def ordered_recipes(texts: Mapping[str, str]) -> list[Recipe]:
    """Return one recipe for each tool, in the order of `RECIPES`.

    Args:
        texts: Tool → code or settings of the recipe.

    Returns:
        The recipes. The code or settings do not end with a line break.
    """
    return [
        recipe._replace(text=texts[tool].rstrip(), file=f"{tool.lower()}.{recipe.language}")
        for tool, recipe in RECIPES.items()
        if tool in texts
    ]


def no_recipe_reason(model: ExportedModel) -> str:
    """Explain why there is no recipe for a model with changed configuration entries."""
    return FACT_TEXTS.render("no_recipe", model)


# Removed and repeated layers

LayerWindows = tuple[str, int, list[bool]]
"""llama.cpp's name of an architecture, the period of layers without an attention window, and
whether each layer has a window."""
_WINDOW_PERIODS = {"gemma3_text": ("gemma3", 6)}
"""Model types whose attention windows llama.cpp derives from a layer's position, unless the file
states them. llama.cpp's converter and llama-quantize do not write windows. Values: llama.cpp's name
of the architecture, and the period of layers; the last layer of each period has no window."""


def layer_recipes(
    source: ModelSource,
    base: ModelIdentity,
    layers: Sequence[int],
    removed: Sequence[int],
    resized: Sequence[str] = (),
    windows: LayerWindows | None = None,
) -> dict[str, str]:
    """Write recipes for mergekit and llama.cpp to make a model with removed or repeated layers.

    For a GGUF base model, there is also a program that converts the file for mergekit. For other
    base models, the recipe for llama.cpp has a placeholder file name. If other configuration
    entries than attention windows are changed (`resized`), there are no recipes.

    Args:
        source: The base model's source.
        base: The base model's identity.
        layers: For each layer of the changed model, the number of the original layer.
        removed: The numbers of the removed layers.
        resized: Names of the changed configuration entries, apart from the number of layers.
        windows: The layers with an attention window, from `find_windows`; None if unknown.

    Returns:
        Tool → recipe; empty if no tool can make the model.
    """
    file = "pruned" if removed else "repeated"
    recipes = {CONVERTER_RECIPE: f"python llama.cpp/convert_hf_to_gguf.py . --outfile {file}.gguf"}
    if removed:
        recipes = {"llama.cpp": prune_command(_gguf_path(source), removed)}
    if resized:
        if windows is None or set(resized) != {"layer_types"}:
            return {}
        name, period, has_window = windows
        if has_window != [number % period != 0 for number in range(1, len(has_window) + 1)]:
            values = {"name": name, "windows": has_window, "file": file}
            recipes[WINDOWS_RECIPE] = _fill_template("with_windows", values)
        return recipes
    if source.gguf_file:
        recipes["safetensors"] = safetensors_program(source, base.dtype)
    return {"mergekit": mergekit(_safetensors_path(source, base), base.dtype, layers), **recipes}


def _fill_template(name: str, values: Mapping[str, object]) -> str:
    """Fill a template to make the text of a Python program.

    Args:
        name: Name of the template.
        values: Placeholder in the template → value.

    Returns:
        The text.
    """
    path = Path(__file__).parent / "templates" / f"{name}.py.txt"
    return string.Template(path.read_text(encoding="utf-8")).substitute(values)


def find_windows(kind: str, layer_types: Sequence[str]) -> LayerWindows | None:
    """Describe the attention windows of a model's layers, for recipes of llama.cpp.

    `kind` is the model type. Returns None if it is unknown how llama.cpp handles the windows of
    this type.
    """
    if kind not in _WINDOW_PERIODS:
        return None
    return *_WINDOW_PERIODS[kind], [layer == "sliding_attention" for layer in layer_types]


def _gguf_path(source: ModelSource) -> str:
    """Return the path of the base's GGUF file, or a placeholder name if there is no file."""
    file = source.gguf_file
    return str(Path(source.location) / file) if file else f"{source.name}.gguf"


def _safetensors_path(source: ModelSource, base: ModelIdentity) -> str:
    """Return the base model's safetensors checkpoint in mergekit's notation.

    The notation is the path of a folder, or the name of a hub model with its commit.
    """
    if source.gguf_file:
        return f"./{source.name}"
    if source.is_local:
        return source.location
    # mergekit's own notation of a revision.
    return f"{base.source}@{base.revision}" if base.revision else base.source


def safetensors_program(source: ModelSource, dtype: str) -> str:
    """Return a Python program that converts a GGUF file for mergekit.

    The program writes a folder with weights in the safetensors format.
    """
    values = {"imports": "", "folder": repr(source.location), "dtype": dtype}
    if source.source.startswith(MODEL_PACKAGE):  # wherever it is installed
        module = source.source.removeprefix(MODEL_PACKAGE).replace("-", "_")
        values["imports"] = "from importlib.util import find_spec\n"
        values["folder"] = f"find_spec({module!r}).submodule_search_locations[0]"
    values |= {"file": repr(source.gguf_file), "name": repr(source.name)}
    return _fill_template("as_safetensors", values)


def mergekit(base: str, dtype: str, layers: Sequence[int]) -> str:
    """Return a mergekit configuration for a model that consists of the given layers."""
    slices = []
    # In a run of neighbours, the difference between layer and index stays the same.
    for _, group in groupby(enumerate(layers), lambda item: item[1] - item[0]):
        run = [layer for _, layer in group]
        slices.append({"sources": [{"model": base, "layer_range": [run[0], run[-1] + 1]}]})
    recipe = {"slices": slices, "merge_method": "passthrough", "dtype": dtype}
    return yaml.safe_dump(recipe, sort_keys=False, default_flow_style=None, width=1000)


def prune_command(file: str, removed: Sequence[int]) -> str:
    """Write the llama-quantize command (b5740 and later) that removes layers."""
    layers = ",".join(map(str, sorted(removed)))
    return f"llama-quantize --prune-layers {layers} {shlex.quote(file)} pruned.gguf COPY"


def skip_lists(component: Component, layers: Sequence[int]) -> str:
    """Return the removed attentions or MLPs as JSON in the format of LLM-Drop."""
    lists = {"drop_attn_list": "attention", "drop_mlp_list": "mlp"}
    skipped = {name: [*layers] if part == component else [] for name, part in lists.items()}
    return json.dumps(skipped)


# Weights in formats

FormatsByPath = Mapping[str, str]
"""Format of each linear map by its path in the model, as the checkpoint names it."""
_INTEGER_FORMATS = ("int8", "int8_g32", "int8_g128", "int4", "int4_g128", "int4_row")
"""Symmetric integers, which compressed-tensors and GPTQModel support."""
_MICRO_FORMATS = {"nvfp4": "float8_e4m3fn", "mxfp8": "uint8"}
"""Formats with small blocks of floating-point numbers, and torch's dtype of the blocks' scales."""
_MLX_MODES = ("mxfp4", *_MICRO_FORMATS)
"""Formats that are quantisation modes of mlx-lm."""
_TOOL_FORMATS: Mapping[str, Collection[str]] = {
    "llama.cpp": [name for name, form in FORMATS.items() if form.is_gguf],
    "llm-compressor": (*_INTEGER_FORMATS, "fp8", *_MICRO_FORMATS),
    "mlx-lm": ("int8_g32", "int8_g128", "int4", "int4_g128", *_MLX_MODES),
    "GPTQModel": _INTEGER_FORMATS,
}
"""Tool → formats that the tool supports. mlx-lm's integers are affine, with a zero point; tracker's
are symmetric. So its recipe states only the bits of each module."""
_GGUF_EMBEDDINGS = ("token_embd.weight", "output.weight")
"""Names of the embedding and the head in GGUF files."""
_ARCHITECTURES = {"mixtral": "llama", "deepseek_v2": "deepseek2", "deepseek_v3": "deepseek2"}
"""llama.cpp's names of model types that differ from transformers' names by more than dashes."""
_EXPERTS_PATH = re.compile(r"\.experts\.\w+$")
_LAYER_PATH = re.compile(r"\.\d+\.")
_BLOCK_TENSOR = re.compile(r"blk\.(\d+)\.(\w+)\.weight")


def format_recipes(
    formats: FormatsByPath, architecture: str, layers: int, file: str, tied_path: str = ""
) -> dict[str, str]:
    """Return recipes by which other tools make a model with quantised weights.

    Args:
        formats: The weight format of each linear map, by its path in the model.
        architecture: The model type in transformers (`model_type`).
        layers: The number of layers.
        file: The GGUF file of the base, or a placeholder name.
        tied_path: The path of the embedding if it is quantised and tied to the output head.

    Returns:
        Tool → text of its recipe, without the tools that cannot make the model (`recipe_problems`).
    """

    def write_command(formats: FormatsByPath) -> str:
        return quantise_command(gguf_tensors(formats, architecture, layers), file, bool(tied_path))

    writers: dict[str, Callable[[FormatsByPath], str]] = {
        "llama.cpp": write_command,
        "llm-compressor": partial(llm_compressor, tied=tied_path),
        "mlx-lm": mlx_lm,
        "GPTQModel": gptqmodel,
    }
    problems = recipe_problems(formats, architecture, layers)
    return {tool: write(formats) for tool, write in writers.items() if tool not in problems}


def recipe_problems(formats: FormatsByPath, architecture: str, layers: int) -> dict[str, str]:
    """Find the tools that cannot make a model with weights in these formats.

    The arguments are those of `format_recipes`. Returns tool → reason why the tool cannot make the
    model.
    """
    problems = {}
    if not _gguf_names(formats, architecture, layers):
        problems["llama.cpp"] = (
            "GGUF files of this architecture do not have a tensor for some of the weights"
        )
    if split := _split_fused_maps(formats):
        problems["llm-compressor"] = (
            f"vLLM fuses {join_words(split)}, which therefore need equal formats; use --tie fused"
        )
    if not all(_LAYER_PATH.search(path) for path in formats):
        problems["GPTQModel"] = "GPTQModel does not quantise the embedding or the output head"
    if any(_EXPERTS_PATH.search(path) for path in formats):
        reason = "this tool quantises whole modules, but all experts of a layer are one module"
        problems |= dict.fromkeys(_TOOL_FORMATS.keys() - {"llama.cpp"}, reason)
    for tool, supported in _TOOL_FORMATS.items():
        if others := sorted({*formats.values()} - {*supported}):
            problems[tool] = f"{tool} does not support {join_words(others)} weights"
    return {tool: problems[tool] for tool in _TOOL_FORMATS if tool in problems}


def _split_fused_maps(formats: FormatsByPath) -> list[str]:
    """Find linear maps that inference engines fuse into one map, but whose formats differ.

    Returns the paths of the first such maps; the list is empty if there are none.
    """
    groups = group_by(formats, fused_map).values()
    return next((paths for paths in groups if len({formats[path] for path in paths}) > 1), [])


def gguf_tensors(formats: FormatsByPath, architecture: str, layers: int) -> dict[str, str]:
    """Return a dict from the name of each tensor in a GGUF file to its format.

    The dict is empty if the name of any tensor is unknown. The arguments are those of
    `format_recipes`.
    """
    names = _gguf_names(formats, architecture, layers)
    return {name: formats[path] for path in names for name in names[path]}


def _gguf_names(formats: FormatsByPath, architecture: str, layers: int) -> dict[str, list[str]]:
    """Return a dict from the path of each weight to the names of its tensors in llama.cpp.

    The dict is empty if llama.cpp's name of any weight is unknown.
    """
    import gguf

    plain_name = _plain_name(_ARCHITECTURES.get(architecture, architecture))
    kinds = {_plain_name(name): kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
    if plain_name not in kinds:
        return {}
    gguf_names = gguf.get_tensor_name_map(kinds[plain_name], layers)
    names = {path: [gguf_names.get_name(part) for part in _split_gate_up(path)] for path in formats}
    # Its files store the last one as two tensors, one of them transposed.
    if any(name is None or name.endswith(".attn_kv_b") for name in chain(*names.values())):
        return {}
    return {path: [f"{name}.weight" for name in parts] for path, parts in names.items()}


def _split_gate_up(path: str) -> list[str]:
    """Split the path of a fused gate-and-up weight into the paths of its two halves."""
    if not _EXPERTS_PATH.search(path) or "gate_up_proj" not in path:
        return [path]
    return [path.replace("gate_up_proj", half) for half in ("gate_proj", "up_proj")]


def _plain_name(architecture: str) -> str:
    """Return an architecture's name in lower case without punctuation, for comparison."""
    return re.sub(r"[^a-z0-9]", "", architecture.lower())


def tensor_types(formats: Mapping[str, str]) -> list[tuple[str, str]]:
    """List llama.cpp's `--tensor-type` entries: pairs of regular expression and type.

    Args:
        formats: Weight format of each tensor, by the tensor's name in a GGUF file, e.g.
            `blk.3.ffn_down.weight`.

    Returns:
        One pair for each format and kind of tensor (e.g. `ffn_down`). The regular expression
        matches the tensors of all layers with this format.
    """
    types, blocks = [], dict[tuple[str, str], list[int]]()
    for tensor, form in formats.items():
        if block := _BLOCK_TENSOR.fullmatch(tensor):
            blocks.setdefault((block[2], form), []).append(int(block[1]))
        else:
            types.append((f"^{re.escape(tensor)}$", _gguf_type(form)))
    for (name, form), layers in sorted(blocks.items()):
        numbers = "|".join(map(str, sorted(layers)))
        types.append((rf"^blk\.({numbers})\.{name}\.weight$", _gguf_type(form)))
    return types


def _gguf_type(form: str) -> str:
    """Return llama.cpp's name of a format."""
    return FORMATS[form].label.lower()


def quantise_command(formats: Mapping[str, str], file: str, is_tied: bool = False) -> str:
    """Write the llama-quantize command that stores tensors in given formats.

    Tensors that are not in `formats` are stored as f16. If `is_tied` is true, the output head is
    stored in the embedding's format.
    """
    names = [name for name in _GGUF_EMBEDDINGS if name in formats]
    types = {name: _gguf_type(formats[name]) for name in names}
    embedding, head = (types.get(name, "f16") for name in _GGUF_EMBEDDINGS)
    layers = {name: form for name, form in formats.items() if name not in names}
    lines = [
        f"llama-quantize --allow-requantize --token-embedding-type {embedding} "
        f"--output-tensor-type {embedding if is_tied else head}"
    ]
    for pattern, kind in [*tensor_types(layers), (r"^blk\..*\.weight$", "f16")]:
        lines.append(f"  --tensor-type {shlex.quote(f'{pattern}={kind}')}")
    return " \\\n".join([*lines, f"  {shlex.quote(file)} quantised.gguf Q8_0"])


def llm_compressor(formats: FormatsByPath, tied: str = "") -> str:
    """Write a recipe for llm-compressor, with one configuration group per weight format.

    The embedding at the path `tied`, which is tied to the output head, is not quantised.
    """
    groups = {}
    by_format = group_by((path for path in formats if path != tied), lambda path: formats[path])
    for number, (name, paths) in enumerate(sorted(by_format.items())):
        form = FORMATS[name]
        kind = "int" if name in _INTEGER_FORMATS else "float"
        strategy = "tensor_group" if name == "nvfp4" else "group" if form.block else "channel"
        weights: dict[str, object] = {"num_bits": int(form.bits), "type": kind}
        weights |= {"strategy": strategy, "symmetric": True, "dynamic": False}
        weights |= {"group_size": form.block} if form.block else {}
        if name in _MICRO_FORMATS:
            weights |= dict.fromkeys(("scale_dtype", "zp_dtype"), f"torch.{_MICRO_FORMATS[name]}")
        targets = [f"re:^{re.escape(path)}$" for path in paths]
        groups[f"group_{number}"] = {"targets": targets, "weights": weights}
    ignored = [] if "lm_head" in formats else ["lm_head"]
    modifier = {"ignore": ignored, "config_groups": groups}
    recipe = {"default_stage": {"default_modifiers": {"QuantizationModifier": modifier}}}
    comment = f"# {tied} is not quantised, because it is also the output head.\n" if tied else ""
    return comment + yaml.safe_dump(recipe, sort_keys=False, width=1000)


def mlx_lm(formats: FormatsByPath) -> str:
    """Write the entry `quantization` of `config.json` for mlx-lm, with settings per module.

    The entry also has a default group size: the smallest group size of all modules.

    References:
        mlx_lm/utils.py (`quantize_model`, `load_model`) of github.com/ml-explore/mlx-lm at d78bf58.
    """
    modules: dict[str, dict[str, Any]] = {}
    for path, name in formats.items():
        form, mode = FORMATS[name], name if name in _MLX_MODES else "affine"
        modules[path] = {"group_size": form.block, "bits": int(form.bits), "mode": mode}
    smallest = min(modules.values(), key=lambda module: (module["group_size"], module["mode"]))
    return json.dumps({**smallest, **modules}, indent=2)


def gptqmodel(formats: FormatsByPath) -> str:
    """Write the arguments of GPTQModel's `QuantizeConfig`, with one rule per linear map.

    Each rule has a regular expression for the path of a linear map. The prefix `-:` means that the
    linear map stays unchanged.

    References:
        gptqmodel/quantization/config.py (`_resolve_dynamic_override`) of
        github.com/ModelCloud/GPTQModel at f4c327a.
    """
    settings = {
        name: {"bits": int(FORMATS[name].bits), "group_size": FORMATS[name].block or -1}
        for name in formats.values()
    }
    ((usual_format, _),) = Counter(formats.values()).most_common(1)
    names_pattern = "|".join(map(re.escape, formats))
    rules: dict[str, dict[str, Any]] = {f"-:^(?!(?:{names_pattern})$)": {}}
    rules |= {f"+:^{re.escape(path)}$": settings[name] for path, name in formats.items()}
    return json.dumps({**settings[usual_format], "sym": True, "dynamic": rules}, indent=2)


FACTS_FILE = "tracker.json"


def write_card(model: ExportedModel, folder: Path) -> None:
    """Write the model card to `README.md`, and the facts on the card to `tracker.json`."""
    from huggingface_hub import ModelCard

    front_matter = _front_matter(model).to_yaml(line_break="\n")
    card = ModelCard(f"---\n{front_matter}\n---\n\n{card_text(model)}")
    write_text(folder / "README.md", str(card))
    facts = json.dumps(model.as_json(), indent=2, ensure_ascii=False)
    write_text(folder / FACTS_FILE, facts + "\n")


def write_eval_results(model: ExportedModel, folder: Path) -> None:
    """Write the metric that lm-eval computed for the saved model to the folder `.eval_results`.

    The Hugging Face hub shows the metric on the model's page. No file is written if the benchmark's
    data set is not on the hub, or if the installed huggingface_hub does not support such files.
    """
    import huggingface_hub as hub

    proof = model.proof
    is_on_hub = re.fullmatch(r"[\w.-]+/[\w.-]+", proof.data_set)
    if not (is_on_hub and proof.figure and hasattr(hub, "EvalResultEntry")):
        return
    basis = f"{proof.documents} documents, lm-eval {proof.versions['lm-eval']}"
    entries = [
        hub.EvalResultEntry(proof.data_set, proof.tasks[0], value, notes=f"{metric}, {basis}")
        for metric, value in proof.figure.items()
    ]
    file = folder / ".eval_results" / f"{Path(proof.tasks[0]).name}.yaml"
    file.parent.mkdir()
    file.write_text(yaml.safe_dump(hub.eval_result_entries_to_yaml(entries), sort_keys=False))


def card_text(model: ExportedModel) -> str:
    """Render the text of a model card, without the front matter."""
    recipes, reason = ordered_recipes(model.recipes), no_recipe_reason(model)
    return _template().render(model=model, recipes=recipes, why_none=reason)


@cache
def _template() -> Template:
    """Load the template of the model card."""
    environment = open_templates("tracker.export", keep_trailing_newline=True)
    environment.filters |= {"markdown": escape_markdown, "code": markdown_code, "level": level_text}
    return environment.get_template("card.md.j2")


def _front_matter(model: ExportedModel) -> Any:
    """Build the metadata at the top of a model card, which the Hugging Face hub reads."""
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
        base_model=model.base.source if model.base.is_on_hub else None,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=[*model.change.tags, "layer-tracker"],
        model_name=model.name if results else None,
        eval_results=results or None,
    )
