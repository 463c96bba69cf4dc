"""Changes of a model that can be saved: layers removed or passed again, weights in formats."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from tracker.core.changes import Ablation, Change
from tracker.core.errors import RequestError
from tracker.core.kinds import Component
from tracker.core.weight_formats import FORMATS, WeightFormat
from tracker.export.facts import ModelChange
from tracker.export.recipes import format_recipes, layer_recipes, skip_lists, windows_of

if TYPE_CHECKING:  # they need torch
    from tracker.models.load import LoadedModel
    from tracker.models.sources import ModelSource


def removal(layers: Sequence[int], **origin: Any) -> ModelChange:
    """Return the removal of layers, in the order in which they were chosen."""
    return ModelChange(Ablation.of(removed=layers), tuple(layers), **origin)


def rounding(formats: Mapping[str, str]) -> ModelChange:
    """Return a change of weights into the values of formats.

    Args:
        formats: `3.mlp.down_proj`, or `3` for a whole layer, or `embedding`, `lm_head` → format.

    Returns:
        The change.
    """
    units = [Change.parse(f"{form}:{name}") for name, form in formats.items()]
    return ModelChange(Ablation.of(*units))


def layer_change(
    remove: Sequence[int], repeat: Sequence[int], repeats: int | None, component: Component
) -> ModelChange:
    """Return which layers go, or are passed again; RequestError for what is no such change."""
    if repeats is not None and not repeat:
        raise RequestError("--repeats says how often layers are passed; name them: --repeat 8-11")
    if not repeat:
        if not remove:
            raise RequestError(
                "nothing is to be removed or repeated; name layers, as in --remove 3,17 or "
                "--repeat 8-11"
            )
        _refuse_sublayers(component, remove)
        return removal(remove)
    if remove:
        raise RequestError(
            "--remove and --repeat are saved one after the other: export with the one, and give "
            "the folder that it makes to 'tracker export FOLDER' with the other"
        )
    if component != "layer":
        raise RequestError("--repeat passes whole layers again; leave --component out")
    times = 2 if repeats is None else repeats
    if list(repeat) != list(range(repeat[0], repeat[-1] + 1)):
        raise RequestError("--repeat is one stretch of neighbours, as in --repeat 8-11")
    if times < 2:
        raise RequestError("--repeats counts all passes: 2 is twice")
    return ModelChange(Ablation.of(Change("layer", tuple(repeat), "repeat", repeats=times)))


def _refuse_sublayers(component: Component, layers: Sequence[int]) -> None:
    """Refuse to save a model without some attentions or MLPs: RequestError."""
    if component == "layer":
        return
    sublayers = "attentions" if component == "attention" else "MLPs"
    raise RequestError(
        f"a checkpoint without some {sublayers} is none that plain transformers can load: its "
        "classes give every layer both. Export whole layers (--remove), or give the base to code "
        "that leaves them out: the model classes of LLM-Drop "
        "(https://github.com/CASE-Lab-UMD/LLM-Drop) read this from config.json:\n"
        f"{skip_lists(component, layers)}\n"
        "vLLM loads the like as nemotron-nas, whose block_configs say no_op a layer."
    )


def refuse_units(units: Collection[Component]) -> None:
    """Refuse to save what searches for other parts than whole layers find: RequestError."""
    others = sorted(set(units) - {"layer"})
    if others:
        raise RequestError(
            f"--output saves models without whole layers, and 'unit' is {others[0]}; leave "
            "--output out"
        )


class ChangedModel(NamedTuple):
    """A changed copy of a model, and what only making it shows.

    Attributes:
        model: The copy.
        kept: The original layer of each layer, in order.
        bytes: The bytes of its weights, in a file of their formats.
        recipes: What makes the same model elsewhere, by tool.
        resized: Entries of its configuration that differ, besides the number of layers.
        formats: The format of each weight that is rounded, by its path.
    """

    model: Any
    kept: tuple[int, ...]
    bytes: int
    recipes: dict[str, str]
    resized: tuple[str, ...] = ()
    formats: Mapping[str, str] = {}


def changed_layers(source: ModelSource, loaded: LoadedModel, change: ModelChange) -> ChangedModel:
    """Make a copy of a loaded model without some layers, or with some again."""
    from tracker.models import checkpoint
    from tracker.models.placement import weight_bytes
    from tracker.models.pruned import left

    removed, repeated = change.ablation.removed(), change.ablation.repeated
    kept = tuple(left(len(loaded.layers), removed, repeated))
    model = checkpoint.without(loaded.model, removed, repeated)
    # Before it is saved, which names the class in a configuration that does not, as a GGUF file's.
    resized = checkpoint.resized(loaded.model, model)
    config = model.config.get_text_config()
    windows = windows_of(config.model_type, getattr(config, "layer_types", None) or ())
    recipes = layer_recipes(source, loaded.identity, kept, removed, resized, windows)
    return ChangedModel(model, kept, weight_bytes(model), recipes, resized)


def rounded_weights(source: ModelSource, loaded: LoadedModel, change: ModelChange) -> ChangedModel:
    """Make a copy of a loaded model whose weights have the values of formats.

    It keeps the model's own dtype: it states what the smaller file states, and is not smaller.
    """
    from tracker.models.parts.anatomy import LayerAnatomy
    from tracker.models.parts.embeddings import find_embeddings, round_embeddings
    from tracker.models.placement import weight_bytes
    from tracker.models.pruned import pruned

    ablation, anatomy = change.ablation, LayerAnatomy.of(loaded.model)
    names = {id(module): name for name, module in loaded.model.named_modules()}
    shapes: dict[str, tuple[int, int]] = {}
    formats, of_ends, tied = dict[str, str](), dict[str, str](), ""
    for number, changed in ablation.by_layer.items():
        for path, form in anatomy.formats(number, changed.rounded).items():
            whole = f"{names[id(loaded.layers[number])]}.{path}"
            formats[whole], shapes[whole] = form, anatomy.map_at(number, path).shape
    for end, form in ablation.ends.items():
        embeddings = find_embeddings(loaded.model)
        path = names[id(embeddings[end].module)]
        rows, inputs = embeddings[end].shape
        formats[path], shapes[path] = form, (rows, inputs)
        # llama.cpp is told the one that such rows get, and takes no other.
        of_ends[path] = _stored(form, inputs).name
        tied = path if embeddings.is_tied else ""
    model = pruned(loaded.model, changes=anatomy.changes(ablation))
    round_embeddings(model, ablation.ends)
    size, wide = float(weight_bytes(model)), model.dtype.itemsize
    for path, (rows, inputs) in shapes.items():
        narrow = _stored(formats[path], inputs).bits_of(inputs) / 8
        size += rows * inputs * (narrow - wide)
    layers, kind = len(loaded.layers), model.config.get_text_config().model_type
    file = source.gguf_file or f"{source.name}.gguf"
    recipes = format_recipes({**formats, **of_ends}, kind, layers, file, tied)
    return ChangedModel(model, tuple(range(layers)), round(size), recipes, formats=formats)


def _stored(form: str, inputs: int) -> WeightFormat:
    """Return the format in which a file keeps rows of so many inputs."""
    stored = FORMATS[form].for_rows(inputs)
    assert stored is not None  # it was measured
    return stored
