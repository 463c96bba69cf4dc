"""Changes of a model that can be saved, and how a results folder's searches and runs chose them.

Layers are removed or repeated, or weights get formats.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

from tracker.core.changes import Ablation, Change
from tracker.core.errors import RequestError
from tracker.core.extent import Extent
from tracker.core.formats import counted
from tracker.core.identities import ModelIdentity
from tracker.core.kinds import Component
from tracker.core.prune_records import Calibrated, PruneRecord, PruneStep
from tracker.core.records import CellRecord
from tracker.core.weight_formats import FORMATS, WeightFormat
from tracker.export.card import format_recipes, layer_recipes, skip_lists, windows_of
from tracker.export.facts import Accuracy, ModelChange
from tracker.ledger.cells import CellStore
from tracker.ledger.store import Contents, Ledger
from tracker.measuring.derive import all_records

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from tracker.models.load import LoadedModel
    from tracker.models.sources import ModelSource


def removal(layers: Sequence[int], **origin: Any) -> ModelChange:
    """Return the removal of layers, in the order in which they were chosen."""
    return ModelChange(Ablation.of(removed=layers), tuple(layers), **origin)


def rounding(formats: Mapping[str, str]) -> ModelChange:
    """Return a change that rounds weights to formats.

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
    """Return the removal or repetition of layers; raise RequestError for any other change."""
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
    """Raise RequestError for saving a model without some attentions or MLPs."""
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
    """Raise RequestError for saving results of searches for parts other than whole layers."""
    others = sorted(set(units) - {"layer"})
    if others:
        raise RequestError(
            f"--output saves models without whole layers, and 'unit' is {others[0]}; leave "
            "--output out"
        )


class ChangedModel(NamedTuple):
    """A changed copy of a model, and facts that only making it reveals.

    Attributes:
        model: The copy.
        kept: The original layer of each layer, in order.
        bytes: The bytes of its weights, in a file of their formats.
        recipes: Recipes for the same model by tool.
        resized: Entries of its configuration that differ, besides the number of layers.
        formats: The format of each weight that is rounded, by its path.
    """

    model: PreTrainedModel
    kept: tuple[int, ...]
    bytes: int
    recipes: dict[str, str]
    resized: tuple[str, ...] = ()
    formats: Mapping[str, str] = {}


def changed_layers(source: ModelSource, loaded: LoadedModel, change: ModelChange) -> ChangedModel:
    """Make a copy of a loaded model without some layers, or with some repeated."""
    from tracker.models import checkpoint
    from tracker.models.offloaded import weight_bytes
    from tracker.models.pruned import left

    removed, repeated = change.ablation.removed(), change.ablation.repeated
    kept = tuple(left(len(loaded.layers), removed, repeated))
    model = checkpoint.without(loaded.model, removed, repeated)
    # Computed before saving, which adds the class to configurations without it, such as of GGUF.
    resized = checkpoint.resized(loaded.model, model)
    config = model.config.get_text_config()
    windows = windows_of(config.model_type, getattr(config, "layer_types", None) or ())
    recipes = layer_recipes(source, loaded.identity, kept, removed, resized, windows)
    return ChangedModel(model, kept, weight_bytes(model), recipes, resized)


def rounded_weights(source: ModelSource, loaded: LoadedModel, change: ModelChange) -> ChangedModel:
    """Make a copy of a loaded model whose weights have the values of formats.

    It keeps the model's own dtype: its values are those of the smaller file, but not its size.
    """
    from tracker.models.offloaded import weight_bytes
    from tracker.models.parts.anatomy import LayerAnatomy
    from tracker.models.parts.linear_maps import find_embeddings, round_embeddings
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
        # llama.cpp gets the format that such rows have, and accepts no other.
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
    """Return the format in which a file stores rows of so many inputs."""
    stored = FORMATS[form].for_rows(inputs)
    assert stored is not None  # it has been measured
    return stored


def with_origin(change: ModelChange, ledger: Ledger, model: ModelIdentity) -> ModelChange:
    """Add how a results folder's searches and runs chose layers, unless it is known already."""
    if change.stretch is not None:
        return tried_repetition(ledger, model, change.stretch)
    if change.order and change.strategy is None:
        return searched_removal(ledger, model, change.order)
    return change


def searched_removal(ledger: Ledger, model: ModelIdentity, removed: tuple[int, ...]) -> ModelChange:
    """Find the searches that chose some layers of a model.

    Args:
        ledger: The results folder.
        model: The model.
        removed: The layers.

    Returns:
        The change with the searches that ended with these layers, or else passed through them. If
        some used documents, only those; the layers alone if no search chose them.
    """
    contents = ledger.contents()
    choices = [
        (record, step)
        for record in contents.searches
        if record.unit == "layer" and record.model.key == model.key
        for step in record.steps
        if step.removed == tuple(sorted(removed))
    ]
    if not choices:
        return removal(removed)
    ranks = [(record.steps[-1] == step, bool(record.calibration)) for record, step in choices]
    best = [choice for choice, rank in zip(choices, ranks, strict=True) if rank == max(ranks)]
    return _removal(contents, best)


def tried_repetition(ledger: Ledger, model: ModelIdentity, stretch: Change) -> ModelChange:
    """Find the calibration documents on which a span was repeated, which may have chosen it."""
    documents = []
    for store in ledger.cells():
        benchmark = store.identity.benchmark
        part = benchmark.settings.get("part")
        if store.identity.model.key != model.key or part != "calibration":
            continue
        frame = store.read(columns=["task", "doc", "ablation"])
        rows = frame[frame["ablation"] == str(stretch)]
        numbers = {str(task): tuple(map(int, docs)) for task, docs in rows.groupby("task")["doc"]}
        if numbers:
            calibrated = Calibrated(
                key=store.identity.key,
                benchmark=benchmark.name,
                metric=benchmark.primary_metric,
                n=len(rows),
                part=part,
                documents=numbers,
            )
            documents.append(calibrated)
    words = ", ".join(map(_documents, documents)) or None
    change = Ablation.of(stretch)
    return ModelChange(change, calibration=words, documents=tuple(documents))


def removal_of(
    ledger: Ledger, record: PruneRecord, decided_on: Calibrated | None = None
) -> ModelChange:
    """Return the removal by a search, with what is known of its choice.

    `decided_on` are documents that decided between it and others; None if none did.
    """
    change = _removal(ledger.contents(), [(record, record.steps[-1])])
    more = () if decided_on is None else (decided_on,)
    return replace(change, documents=(*change.documents, *more))


def _removal(contents: Contents, choices: Sequence[tuple[PruneRecord, PruneStep]]) -> ModelChange:
    records = [record for record, _ in choices]
    record, step = choices[0]
    order = record.order[: len(step.removed)]
    calibration = [", ".join(map(_documents, record.calibration)) for record in records]
    return removal(
        order if sorted(order) == list(step.removed) else step.removed,
        strategy=", ".join(dict.fromkeys(_strategy(*choice) for choice in choices)),
        calibration="; ".join(dict.fromkeys(filter(None, calibration))) or None,
        tested=tuple(_accuracy(*choice) for choice in choices if choice[1].test is not None),
        chosen_by=_cells(contents, records),
        documents=tuple(documents for record in records for documents in record.calibration),
    )


def _accuracy(record: PruneRecord, step: PruneStep) -> Accuracy:
    benchmark, test = record.benchmark, step.test
    assert test is not None  # guaranteed by the callers
    unit, before = "%" if record.higher_is_better else "", record.baseline.level
    title, shots, documents = benchmark.title, benchmark.num_fewshot, untouched(test.n)
    return Accuracy(title, shots, record.metric, documents, test.n, before, test.level, unit)


def _strategy(record: PruneRecord, step: PruneStep) -> str:
    number = record.steps.index(step) + 1
    whole = number == len(record.steps)
    return record.label if whole else f"{record.label}, step {number} of {len(record.steps)}"


def _cells(contents: Contents, records: Sequence[PruneRecord]) -> tuple[CellRecord, ...]:
    """Return the tracked cells of the searches' steps."""
    tracked = {cell for record in records for cell in record.rests_on}
    keys = {key for key, *_ in tracked}
    views = [view for view in contents.views if view[0].identity.key in keys]
    cells = all_records(replace(contents, views=views))
    return tuple(cell for cell in cells if cell.place in tracked)


def _documents(calibrated: Calibrated) -> str:
    part = f" ({calibrated.part})" if calibrated.part else ""
    return f"{counted(calibrated.n, 'document')} of {calibrated.benchmark}{part}"


def untouched(n: int) -> str:
    """Describe documents that chose nothing."""
    return f"{counted(n, 'document')} that chose nothing"


def count_choosing(ledger: Ledger, change: ModelChange, store: CellStore, extent: Extent) -> int:
    """Count the documents of an extent of a cell that also chose the layers."""
    cells = {cell.identity.key: cell for cell in ledger.cells()}
    chose = {
        key
        for calibrated in change.documents
        if calibrated.key in cells
        for key in _keys(cells[calibrated.key], calibrated.documents)
    }
    return len(chose & _keys(store, store.wanted(extent)))


def _keys(store: CellStore, documents: Mapping[str, Sequence[int]]) -> set[tuple[str, str, int]]:
    """Return documents as task, split and number, which identifies them across cells."""
    splits = {task.name: task.split for task in store.identity.benchmark.tasks}
    return {(task, splits[task], n) for task, numbers in documents.items() for n in numbers}
