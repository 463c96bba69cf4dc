"""Make changed copies of a model for export, and find the searches that chose a change.

A change removes layers, repeats layers, or rounds weights to quantised formats.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from tracker.export import card
from tracker.export.facts import Accuracy, ModelChange
from tracker.ledger.cells import CellStore
from tracker.ledger.store import Contents, Ledger
from tracker.measuring.derive import list_records
from tracker.schema.changes import Ablation, Change
from tracker.schema.errors import RequestError, attempt
from tracker.schema.extent import Extent
from tracker.schema.formats import count_text
from tracker.schema.identities import ModelIdentity
from tracker.schema.kinds import NUMBERED_COMPONENTS, Component
from tracker.schema.prune_records import CalibrationSet, PruneRecord, PruneStep
from tracker.schema.records import CellRecord
from tracker.schema.weight_formats import FORMATS, WeightFormat

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from tracker.models.load import LoadedModel
    from tracker.models.sources import ModelSource


def removal(layers: Sequence[int], **origin: Any) -> ModelChange:
    """Return the change that removes `layers`, given in the order in which they were chosen."""
    return ModelChange(Ablation.from_changes(removed=layers), tuple(layers), **origin)


def part_removal(texts: Sequence[str]) -> ModelChange:
    """Return the change that removes parts such as `kv_head:3.1`, and layers such as `3-7`."""
    removed, parts = list[int](), list[Change]()
    for text in texts:
        change = attempt(partial(Change.parse, text if ":" in text else f"layers:{text}"))
        if isinstance(change, Exception) or change.word not in ("layer", *NUMBERED_COMPONENTS):
            raise RequestError(
                f"--remove: invalid part {text!r}; expected layers, as in 3,17, or heads, experts "
                "and neurons, as in kv_head:3.1,neuron:2.7"
            )
        removed += change.layers if change.number is None else ()
        parts += [change] if change.number is not None else []
    return ModelChange(Ablation.from_changes(*parts, removed=removed))


def rounding(formats: Mapping[str, str]) -> ModelChange:
    """Return the change that rounds weights to quantised formats.

    Args:
        formats: Name → format. A name is a matrix (`3.mlp.down_proj`), a whole layer (`3`),
            `embedding` or `lm_head`.

    Returns:
        The change.
    """
    units = [Change.parse(f"{form}:{name}") for name, form in formats.items()]
    return ModelChange(Ablation.from_changes(*units))


def layer_change(
    remove: Sequence[int | str], repeat: Sequence[int], repeats: int | None, component: Component
) -> ModelChange:
    """Check the options of `tracker export`, and return the change that they describe.

    Args:
        remove: Value of `--remove`: layers, or names of smaller parts.
        repeat: Value of `--repeat`: consecutive layers.
        repeats: Value of `--repeats`: how often the layers run in total; None if not set.
        component: Value of `--component`.

    Returns:
        The change.

    Raises:
        RequestError: The values are invalid, or contradict each other.
    """
    if repeats is not None and not repeat:
        raise RequestError("--repeats needs the layers that are repeated: add --repeat 8-11")
    if not repeat:
        if not remove:
            raise RequestError("nothing to remove or repeat; use --remove 3,17 or --repeat 8-11")
        layers = [int(layer) for layer in remove if not isinstance(layer, str)]
        if len(layers) < len(remove) and component == "layer":
            return part_removal([*map(str, remove)])
        _refuse_sublayers(component, layers)
        return removal(layers)
    if remove:
        raise RequestError(
            "--remove and --repeat cannot be saved in one step: export with one of the options, "
            "then give the new folder to 'tracker export FOLDER' with the other option"
        )
    if component != "layer":
        raise RequestError("--repeat runs whole layers a second time; leave --component out")
    n_passes = 2 if repeats is None else repeats
    if list(repeat) != list(range(repeat[0], repeat[-1] + 1)):
        raise RequestError("--repeat takes one span of consecutive layers, as in --repeat 8-11")
    if n_passes < 2:
        raise RequestError(
            "--repeats is the total number of times that the layers run, so the smallest value is 2"
        )
    repetition = Change("layer", tuple(repeat), "repeat", repeats=n_passes)
    return ModelChange(Ablation.from_changes(repetition))


def _refuse_sublayers(component: Component, layers: Sequence[int]) -> None:
    """Raise RequestError if attentions or MLPs are removed; saved models need both."""
    if component == "layer":
        return
    sublayers = "attentions" if component == "attention" else "MLPs"
    lines = card.skip_lists(component, layers)
    raise RequestError(
        f"plain transformers cannot load a checkpoint without some {sublayers}. Export whole "
        "layers (--remove), or use the model classes of LLM-Drop "
        "(https://github.com/CASE-Lab-UMD/LLM-Drop). LLM-Drop reads these lines from config.json:"
        f"\n{lines}\nvLLM loads a model without some {sublayers} as nemotron-nas, with no_op in a "
        "layer's block_configs."
    )


def refuse_unsavable_units(units: Collection[str]) -> None:
    """Raise RequestError unless all units are layers, heads, experts or neurons.

    A unit is a kind of model part. A model that lacks other parts, e.g. an attention, cannot be
    saved.
    """
    other_units = sorted(set(units) - {"layer", *NUMBERED_COMPONENTS})
    if other_units:
        raise RequestError(
            f"--output cannot save a model if 'unit' is {other_units[0]}; leave --output out, or "
            "set 'unit' to layer, head, kv_head, expert or neuron"
        )


class ChangedModel(NamedTuple):
    """A changed copy of a model, and facts about the copy.

    Attributes:
        model: The changed copy of the model.
        measured: The copy that the engine measures, which must compute the same logits.
        kept_layers: For each layer of the copy, the number of the original layer.
        bytes: Size in bytes of a file with the quantised weights.
        recipes: Tool → recipe to make the same model with this tool.
        problems: Tool → reason why this tool cannot make the model.
        resized: Names of changed configuration entries, except for the number of layers.
        formats: Path of each quantised weight → the weight's format.
    """

    model: PreTrainedModel
    measured: PreTrainedModel
    kept_layers: tuple[int, ...]
    bytes: int
    recipes: dict[str, str]
    resized: tuple[str, ...] = ()
    formats: Mapping[str, str] = {}
    problems: Mapping[str, str] = {}


def build_changed_model(
    source: ModelSource, loaded: LoadedModel, change: ModelChange
) -> ChangedModel:
    """Make a copy of a loaded model, and remove or repeat parts of the copy.

    The removed parts are layers, heads, experts or neurons. Only layers can be repeated.
    """
    from tracker.models import checkpoint
    from tracker.models.offloaded import weight_bytes
    from tracker.models.pruned import remaining_layers

    removed, repeated = change.ablation.removed(), change.ablation.repetitions
    kept_layers = tuple(remaining_layers(len(loaded.layers), removed, repeated))
    model, measured = checkpoint.savable_copies(loaded.model, change.ablation)
    # Computed before saving, which adds the class to configurations without it, such as of GGUF.
    resized = checkpoint.config_changes(loaded.model, model)
    config = model.config.get_text_config()
    windows = card.find_windows(config.model_type, getattr(config, "layer_types", None) or ())
    recipes = card.layer_recipes(source, loaded.identity, kept_layers, removed, resized, windows)
    return ChangedModel(model, measured, kept_layers, weight_bytes(model), recipes, resized)


def build_rounded_model(
    source: ModelSource, loaded: LoadedModel, change: ModelChange
) -> ChangedModel:
    """Make a copy of a loaded model, and round weights of the copy to formats.

    The copy stores the rounded values in the model's dtype.
    """
    from tracker.models.offloaded import weight_bytes
    from tracker.models.parts.anatomy import LayerAnatomy
    from tracker.models.parts.linear_maps import find_embeddings, round_embeddings
    from tracker.models.pruned import prune_model

    ablation, anatomy = change.ablation, LayerAnatomy.of(loaded.model)
    names = {id(module): name for name, module in loaded.model.named_modules()}
    shapes: dict[str, tuple[int, int]] = {}
    formats, embedding_formats, tied_path = dict[str, str](), dict[str, str](), ""
    for number, changed_layer in ablation.by_layer.items():
        for path, form in anatomy.expand_formats(number, changed_layer.roundings).items():
            full_path = f"{names[id(loaded.layers[number])]}.{path}"
            formats[full_path], shapes[full_path] = form, anatomy.get_map(number, path).shape
    for embedding, form in ablation.outer_formats.items():
        embeddings = find_embeddings(loaded.model)
        path = names[id(embeddings[embedding].module)]
        rows, inputs = embeddings[embedding].shape
        formats[path], shapes[path] = form, (rows, inputs)
        # llama.cpp gets the format that such rows have, and accepts no other.
        embedding_formats[path] = _stored_format(form, inputs).name
        tied_path = path if embeddings.is_tied else ""
    model = prune_model(loaded.model, changes=anatomy.part_changes(ablation))
    round_embeddings(model, ablation.outer_formats)
    size, full_bytes = float(weight_bytes(model)), model.dtype.itemsize
    for path, (rows, inputs) in shapes.items():
        stored_bytes = _stored_format(formats[path], inputs).bits_per_weight(inputs) / 8
        size += rows * inputs * (stored_bytes - full_bytes)
    layers, kind = len(loaded.layers), model.config.get_text_config().model_type
    file = source.gguf_file or f"{source.name}.gguf"
    stored_formats = {**formats, **embedding_formats}
    recipes = card.format_recipes(stored_formats, kind, layers, file, tied_path)
    problems = card.recipe_problems(stored_formats, kind, layers)
    kept_layers = tuple(range(layers))
    return ChangedModel(model, model, kept_layers, round(size), recipes, (), formats, problems)


def _stored_format(form: str, inputs: int) -> WeightFormat:
    """Return the format in which rows of `inputs` weights are stored.

    The format is `form`, or another format if the block size of `form` does not divide `inputs`.
    """
    stored_format = FORMATS[form].for_rows(inputs)
    assert stored_format is not None  # it has been measured
    return stored_format


def add_origin(change: ModelChange, ledger: Ledger, model: ModelIdentity) -> ModelChange:
    """Find the stored searches or calibration documents by which a change was chosen.

    The result is the change with these facts: the searches of a removal, or the calibration
    documents on which a repetition was measured. Other changes are returned unchanged.
    """
    if change.stretch is not None:
        return find_repetition(ledger, model, change.stretch)
    if change.kind == "pruned" and change.strategy is None:
        return find_removal(ledger, model, change)
    return change


def find_removal(ledger: Ledger, model: ModelIdentity, change: ModelChange) -> ModelChange:
    """Find the searches in the results folder that chose a given removal.

    Args:
        ledger: The results folder.
        model: The identity of the original model.
        change: The removal.

    Returns:
        The removal, with facts about the searches that removed exactly the same parts. Searches
        that ended with these parts are preferred. Among these, searches with calibration documents
        are preferred.
    """
    contents = ledger.contents()
    choices = [
        (record, step)
        for record in contents.searches
        if record.model.key == model.key
        for step in record.steps
        if record.parts.removal(step.removed) == change.ablation
    ]
    if not choices:
        return change
    ranks = [(record.steps[-1] == step, bool(record.calibration)) for record, step in choices]
    best = [choice for choice, rank in zip(choices, ranks, strict=True) if rank == max(ranks)]
    return _build_removal(contents, best)


def find_repetition(ledger: Ledger, model: ModelIdentity, repetition: Change) -> ModelChange:
    """Find the stored calibration documents on which a repetition of layers was measured.

    Returns the repetition with facts about these documents.
    """
    calibration = []
    for store in ledger.cells():
        benchmark = store.identity.benchmark
        part = benchmark.settings.get("part")
        if store.identity.model.key != model.key or part != "calibration":
            continue
        frame = store.read(columns=["task", "doc", "ablation"])
        rows = frame[frame["ablation"] == str(repetition)]
        groups = rows.groupby("task")["doc"]
        documents = {str(task): tuple(map(int, numbers)) for task, numbers in groups}
        if documents:
            calibration.append(
                CalibrationSet(
                    key=store.identity.key,
                    benchmark=benchmark.name,
                    metric=benchmark.primary_metric,
                    n=len(rows),
                    part=part,
                    documents=documents,
                )
            )
    words = ", ".join(map(_documents_text, calibration)) or None
    change = Ablation.from_changes(repetition)
    return ModelChange(change, calibration=words, documents=tuple(calibration))


def removal_by_search(
    ledger: Ledger,
    record: PruneRecord,
    step: PruneStep,
    compared_on: CalibrationSet | None = None,
    recommendation: str = "",
) -> ModelChange:
    """Return all parts that a search has removed after a step, with facts about the search.

    Args:
        ledger: The results folder.
        record: The stored record of the search.
        step: The step.
        compared_on: The documents on which several searches were compared; None for a single
            search.
        recommendation: The paragraph that recommends the removal; empty if there is none.

    Returns:
        The removed parts, with the documents and results on which they were chosen.
    """
    change = _build_removal(ledger.contents(), [(record, step)])
    documents = (*change.documents, *filter(None, [compared_on]))
    return replace(change, documents=documents, recommendation=recommendation)


def _build_removal(
    contents: Contents, choices: Sequence[tuple[PruneRecord, PruneStep]]
) -> ModelChange:
    """Build a removal from the search steps (of one or several searches) that chose the removal."""
    records = [record for record, _ in choices]
    record, step = choices[0]
    order = record.order[: len(step.removed)]
    calibration = [", ".join(map(_documents_text, record.calibration)) for record in records]
    order = order if sorted(order) == list(step.removed) else step.removed
    return ModelChange(
        record.parts.removal(step.removed),
        order if record.unit == "layer" else (),
        strategy=", ".join(dict.fromkeys(_strategy_text(*choice) for choice in choices)),
        calibration="; ".join(dict.fromkeys(filter(None, calibration))) or None,
        tested=tuple(_accuracy(*choice) for choice in choices if choice[1].test is not None),
        chosen_by=_find_run_records(contents, records),
        documents=tuple(documents for record in records for documents in record.calibration),
    )


def _accuracy(record: PruneRecord, step: PruneStep) -> Accuracy:
    """Return the metric on a search's test documents, before and after the removal."""
    benchmark, test = record.benchmark, step.test
    assert test is not None  # guaranteed by the callers
    unit, baseline = "%" if record.higher_is_better else "", record.baseline.level
    title, shots, documents = benchmark.title, benchmark.num_fewshot, unused_documents(test.n)
    if record.budget is not None:
        count = count_text(test.n, "document")
        documents = f"{count} that were also used to decide how much to remove"
    return Accuracy(title, shots, record.metric, documents, test.n, baseline, test.level, unit)


def _strategy_text(record: PruneRecord, step: PruneStep) -> str:
    """Return the name of a search's strategy, and the step's number unless the step is the last."""
    number = record.steps.index(step) + 1
    is_complete = number == len(record.steps)
    return record.label if is_complete else f"{record.label}, step {number} of {len(record.steps)}"


def _find_run_records(contents: Contents, records: Sequence[PruneRecord]) -> tuple[CellRecord, ...]:
    """Return the records of the ablation runs that measured the steps of the searches."""
    tracked = {cell for record in records for cell in record.rests_on}
    keys = {key for key, *_ in tracked}
    views = [view for view in contents.views if view[0].identity.key in keys]
    cells = list_records(replace(contents, views=views))
    return tuple(cell for cell in cells if cell.record_key in tracked)


def _documents_text(documents: CalibrationSet) -> str:
    """Describe calibration documents, e.g. `500 documents of arc_easy (calibration)`."""
    part = f" ({documents.part})" if documents.part else ""
    return f"{count_text(documents.n, 'document')} of {documents.benchmark}{part}"


def unused_documents(n: int) -> str:
    """Describe the `n` documents that were not used to choose the change."""
    return f"{count_text(n, 'document')} that were not used to choose the change"


def count_reused(ledger: Ledger, change: ModelChange, store: CellStore, extent: Extent) -> int:
    """Count the documents of an evaluation that were also used to choose the change.

    Args:
        ledger: The results folder.
        change: The change, with the documents that were used to choose it.
        store: The results of the evaluation on a benchmark.
        extent: The evaluated documents of this benchmark.

    Returns:
        The number of documents.
    """
    cells = {cell.identity.key: cell for cell in ledger.cells()}
    keys: set[tuple[str, str, int]] = set()
    for calibration in change.documents:
        if calibration.key in cells:
            keys |= _doc_keys(cells[calibration.key], calibration.documents)
    return len(keys & _doc_keys(store, store.task_documents(extent)))


def _doc_keys(store: CellStore, docs: Mapping[str, Sequence[int]]) -> set[tuple[str, str, int]]:
    """Return a set with (task, split, number) of each document."""
    splits = {task.name: task.split for task in store.identity.benchmark.tasks}
    return {(task, splits[task], n) for task, numbers in docs.items() for n in numbers}
