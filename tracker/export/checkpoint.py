"""Save a changed model as a checkpoint that plain transformers can load.

A fresh process checks that the saved files give the measured results. After this check, the model
is published to the tracking backends.
"""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from safetensors import SafetensorError

from tracker.benchmarks.benchmark import check_benchmark
from tracker.benchmarks.standalone import refuse_corpus
from tracker.export.card import ordered_recipes, write_card, write_eval_results
from tracker.export.changes import (
    add_origin,
    build_changed_model,
    build_rounded_model,
    count_reused,
    unused_documents,
)
from tracker.export.facts import Accuracy, ExportedModel, ModelChange, Size
from tracker.export.proof import ExpectedAnswers, MeasuredCell, expected_answers, prove
from tracker.export.serving import measure_llama_cpp, measure_serving
from tracker.ledger.files import new_folder
from tracker.ledger.store import Ledger
from tracker.measuring.job import Options
from tracker.measuring.prepare import find_cell
from tracker.measuring.progress import Progress
from tracker.models.sources import ModelSource, find_model
from tracker.runner import run_cells
from tracker.schema.changes import Ablation
from tracker.schema.config import CellRequest, cell_request
from tracker.schema.distribution import __version__
from tracker.schema.errors import BenchmarkError, CellError, RequestError, TrackerError, WorkError
from tracker.schema.formats import count_text, metric_format
from tracker.schema.provenance import describe_machine
from tracker.schema.records import CellRecord
from tracker.team.publish import Publisher
from tracker.tracking import open_models, service, target
from tracker.tracking.base import SavedModel

FORMATS_FILE = "formats.json"
"""Name of the file with the format of each rounded weight."""
_BENCHMARK_SETTINGS = ("part", "limit", "sample", "num_fewshot", "metric")
_RESERVED_BYTES = 64 * 2**20
"""Bytes reserved on disk for a tokenizer, configurations and a card."""
_DISK_FULL_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True)
class ExportRequest:
    """A request to save a changed model.

    Attributes:
        change: The change of the model.
        request: The model, and the benchmark on which the saved files are checked.
        has_benchmark: False if the request's benchmark is only a placeholder.
        output: The folder to create.
        gguf: The GGUF file to create; None for none.
        ledger: The results folder.
        options: Options such as the device, and whether code from a download is trusted.
        track: The tracking backends to which the model is published.
        project: The project for entries of `track` that name no project.
        register: The name under which MLflow's registry gets the model; None to register no model.
        measure: Function that measures a removal of heads or experts on the benchmark's documents.
    """

    change: ModelChange
    request: CellRequest
    has_benchmark: bool
    output: Path
    ledger: Ledger
    options: Options
    track: tuple[str, ...] = ()
    project: str = "tracker"
    register: str | None = None
    measure: Callable[[CellRequest, Ablation], object] = lambda *_: None
    gguf: Path | None = None


def model_request(model: str, benchmark: str | None, **settings: Any) -> CellRequest:
    """Build a request for a model and an optional benchmark; raise RequestError if invalid."""
    extra = [f"--{name}" for name in _BENCHMARK_SETTINGS if settings.get(name) is not None]
    if benchmark is None and extra:
        raise RequestError(f"{extra[0]} needs a benchmark; name one, as in --benchmark arc_easy")
    return cell_request(model=model, benchmark=benchmark or "none", layers=(), **settings)


def refuse_output(output: Path) -> None:
    """Raise RequestError unless the output folder is empty or can be created."""
    if output.is_dir() and not any(output.iterdir()):
        return
    if output.exists() or output.is_symlink():
        problem = "is a folder that is not empty" if output.is_dir() else "is a file"
        raise RequestError(f"--output: {output} {problem}; name a new folder")
    if not output.absolute().parent.is_dir():
        raise RequestError(f"--output: there is no folder {output.absolute().parent}")


def export(request: ExportRequest, progress: Progress) -> ExportedModel:
    """Save a changed model as a checkpoint, check the saved files, and publish the model.

    Args:
        request: The model, the change, the output folder and the options.
        progress: Receives messages about the progress.

    Returns:
        The saved model, with facts about it.

    Raises:
        RequestError: The request is invalid; nothing was computed or written.
        WorkError: The saved model differs from the measured model, or cannot be written. No file is
            left.
    """
    from tracker.models import checkpoint

    change, trust_remote_code = request.change, request.options.trust_remote_code
    backends = [service(target(text, "lighter models").backend) for text in request.track]
    refuse_output(request.output)
    if request.register and not any("registered models" in backend.can for backend in backends):
        raise RequestError("--register needs MLflow's model registry; add --track mlflow")
    source = find_model(request.request.model, trust_remote_code)
    is_rounded = change.kind == "quantised"
    if request.has_benchmark and not is_rounded:
        refuse_corpus(request.request.benchmark)
        check_benchmark(request.request.benchmark)
    progress.say("checking that the changed model can be saved")
    ablation = change.ablation
    if is_rounded:
        checkpoint.check_plain_weights(source)
    elif ablation.parts:
        checkpoint.check_part_removal(source, ablation)
    else:
        checkpoint.check_layer_changes(source, ablation.removed(), ablation.repetitions)
    record, cell = _measure_change(request, progress) if request.has_benchmark else (None, None)
    gguf = request.gguf
    workplace = None if gguf is None else gguf.absolute().parent
    with TemporaryDirectory(dir=workplace) as name:
        base_folder = Path(name)
        with draft_folder(request.output) as folder:
            model, answers = _write_checkpoint(request, source, folder, base_folder, progress)
            progress.say("loading the model in a fresh process" + (", for lm-eval" if cell else ""))
            checkpoint.release_memory()
            try:
                proof = prove(folder, answers, cell, trust_remote_code)
            except BenchmarkError as error:
                if not is_rounded:
                    raise
                progress.say(f"lm-eval cannot score the saved model: {error}")
                proof = prove(folder, answers, None, trust_remote_code)
            if gguf is not None:
                progress.say("writing the GGUF file with llama.cpp")
                model = _add_gguf(model, source, folder, answers, base_folder / gguf.name)
            change = add_origin(change, request.ledger, model.base)
            rows = [] if cell is None else [_accuracy(record, cell, change, request.ledger)]
            # A measurement on exactly these documents is not repeated in the list.
            keys = {(row.benchmark, row.n, row.before) for row in rows}
            rows += [row for row in change.tested if (row.benchmark, row.n, row.before) not in keys]
            model = replace(model, change=change, accuracy=tuple(rows), proof=proof)
            if gguf is not None and model.gguf is not None:
                model = replace(model, gguf=replace(model.gguf, path=gguf))
            write_card(model, folder)
            write_eval_results(model, folder)
            if gguf is not None:
                (base_folder / gguf.name).rename(gguf)
        # The files have their final names, so an interrupt loses only the speed.
        progress.say("measuring speed and memory (a few minutes for a large model)")
        model = _add_speed(model, base_folder, request.output, answers, source)
        write_card(model, request.output)
    cells = (*change.chosen_by, *filter(None, [record]))
    results, project = request.ledger.root, request.project
    return publish(model, cells, request.track, project, results, request.register)


def publish(
    model: ExportedModel,
    source_cells: Sequence[CellRecord],
    track: Sequence[str],
    project: str,
    results: Path,
    register: str | None = None,
) -> ExportedModel:
    """Publish a model to all tracking backends; after an error in one, go on with the next.

    Args:
        model: The saved model.
        source_cells: Results that chose the change, or that measured the changed model.
        track: The tracking backends, each as `BACKEND` or `BACKEND:PROJECT`.
        project: The project for entries of `track` that name no project.
        results: The results folder.
        register: The name under which MLflow's registry gets the model; None to register no model.

    Returns:
        `model` with new values of `locations` (by backend) and `unpublished` (error by failed
        backend).
    """
    folder, facts, figures = model.folder.absolute(), model.as_json(), model.figures()
    saved = SavedModel(folder, model.name, facts, figures, tuple(source_cells), register)
    locations, failures = {}, {}
    for text in track:
        address = target(text)
        destination = (address.project or project, results, address.server)
        with closing(open_models(address.backend, *destination)) as models:
            try:
                locations[address.backend] = models.add_model(saved)
            except TrackerError as error:
                failures[text] = str(error)
    return replace(model, locations=locations, unpublished=failures)


def _measure_change(
    request: ExportRequest, progress: Progress
) -> tuple[CellRecord | None, MeasuredCell | None]:
    """Measure the changed model on the benchmark, or read the stored results.

    Returns the record of the published run, and the results of the changed model. If the change
    removes parts of layers or rounds weights, this function publishes no run, and the record is
    None.
    """
    cell, record, ledger = request.request, None, request.ledger
    ablation = request.change.ablation
    if ablation.parts:
        request.measure(cell, ablation)
    elif request.change.kind != "quantised":  # the choice of formats was measured as a whole
        cell = replace(cell, removed=ablation.removed()).with_changes(ablation.repetitions)
        with closing(Publisher(request.track, request.project, ledger.root)) as publisher:
            outcome = run_cells([cell], ledger, publisher, request.options, progress)
        if outcome.failed:
            raise CellError(next(iter(outcome.failed.values())))
        record = outcome.cells[0]
    store = find_cell(cell, ledger).store
    assert store is not None  # it has been measured
    return record, MeasuredCell(cell, store, ablation)


def _write_checkpoint(
    request: ExportRequest, source: ModelSource, folder: Path, base_folder: Path, progress: Progress
) -> tuple[ExportedModel, ExpectedAnswers]:
    """Make the changed copy of the model, and write it as a checkpoint to `folder`.

    The base model's configuration is written to `base_folder`. No model stays in memory after the
    call. The function returns facts about the saved model, and the tokens and logits for checking
    the saved files.
    """
    from tracker.models import checkpoint
    from tracker.models.load import load_model
    from tracker.models.offloaded import weight_bytes

    options = request.options
    progress.say(f"loading {source.name}")
    loaded = load_model(source, request.request.model.dtype, options.device)
    change_model = (
        build_rounded_model if request.change.kind == "quantised" else build_changed_model
    )
    changed_model = change_model(source, loaded, request.change)
    base, model = loaded.model, changed_model.model
    _refuse_small_disk(folder, weight_bytes(model))
    progress.say("writing the checkpoint")
    checkpoint.save_copy(loaded, model, folder)
    answers = expected_answers(loaded, changed_model.measured, options.device)
    answers = replace(answers, n_parameters=model.num_parameters())
    exported = ExportedModel(
        folder=request.output,
        base=loaded.identity,
        change=request.change,
        kept_layers=changed_model.kept_layers,
        before=Size(len(loaded.layers), base.num_parameters(), weight_bytes(base)),
        after=Size(len(changed_model.kept_layers), model.num_parameters(), changed_model.bytes),
        recipes=changed_model.recipes,
        resized=changed_model.resized,
        formats=changed_model.formats,
        problems=changed_model.problems,
    )
    if exported.formats:
        _write_formats(exported, folder)
    base.config.save_pretrained(base_folder)
    return exported, answers


def _write_formats(model: ExportedModel, folder: Path) -> None:
    """Write a JSON file with the format of each weight, and one file per recipe.

    A recipe makes the same quantised model with another tool, such as llama.cpp.
    """
    facts = {"tracker": __version__, "base": model.base.source, "formats": model.formats}
    (folder / FORMATS_FILE).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    for recipe in ordered_recipes(model.recipes):
        (folder / recipe.file).write_text(recipe.text + "\n", encoding="utf-8")


def _add_gguf(
    model: ExportedModel, source: ModelSource, folder: Path, answers: ExpectedAnswers, file: Path
) -> ExportedModel:
    """Write a saved model as a GGUF file too, and add the file to the facts about the model."""
    from tracker.export.gguf_model import write_gguf

    # Beside the file, there is a copy with float32 weights for a while.
    _refuse_small_disk(file.parent, 4 * model.before.parameters + model.after.bytes)
    return replace(model, gguf=write_gguf(file, source.files()[0], model, folder, answers))


def _add_speed(
    model: ExportedModel, base: Path, folder: Path, answers: ExpectedAnswers, source: ModelSource
) -> ExportedModel:
    """Measure speed and memory of a saved model and its base model; add both to the model's facts.

    If the saved model has a GGUF file, only the speed of the GGUF file is measured. Rounded weights
    without a GGUF file are not timed, because `folder` stores them at full size.

    Args:
        model: Facts about the saved model.
        base: Folder with the base model's configuration.
        folder: Folder with the saved model.
        answers: Device, number of threads and text length of the measurement.
        source: Files of the base model.

    Returns:
        The facts, with speed and memory.
    """
    machine, threads, dtype = describe_machine(), answers.n_threads, model.base.dtype
    cores = f"{count_text(threads, 'thread')} of {count_text(int(machine['cores']), 'core')}"
    hardware = f"{cores}, {machine['platform']}; medians and quartiles"
    try:
        if model.gguf is not None:
            tool = f"llama.cpp (llama-cpp-py-sync {version('llama-cpp-py-sync')}) on cpu"
            figures = measure_llama_cpp(source.files()[0], model.gguf.path, threads)
        elif model.formats or answers.device == "spread":
            return model
        else:
            tool, trust = f"{dtype} on {answers.device}", source.trust_remote_code
            settings = (answers.device, dtype, threads, trust, answers.max_length)
            figures = measure_serving(base, folder, *settings)
    except (WorkError, OSError) as error:  # a proven model is saved nevertheless
        return replace(model, speed_on=str(error))
    return replace(model, serving=tuple(figures), speed_on=f"{tool}, {hardware}")


def _accuracy(
    record: CellRecord | None, cell: MeasuredCell, change: ModelChange, ledger: Ledger
) -> Accuracy:
    """Build the row of the model card with the benchmark's metric before and after the change."""
    benchmark, metric = cell.store.identity.benchmark, cell.metric
    title, n = benchmark.title, cell.n
    n_choosing = count_reused(ledger, change, cell.store, cell.request.extent)
    if record is not None:
        documents = record.documents_text + (f" of {title}" if title != benchmark.name else "")
    elif n_choosing or (change.ablation.parts and change.strategy is None):
        documents = count_text(n, "document")
    else:
        tested = {(row.benchmark, row.n): row.documents for row in change.tested}
        documents = tested.get((title, n), unused_documents(n))
    if n_choosing:
        were_used = "may have been used" if change.kind == "repeated" else "were used"
        parts = "layers" if record is not None else "parts"
        documents = f"{documents}, {n_choosing:,} of which {were_used} to choose the {parts}"
    unit = cell.unit if record is None else metric_format(record).level_unit
    levels = cell.baseline, cell.level
    return Accuracy(title, benchmark.num_fewshot, metric, documents, n, *levels, unit)


def _refuse_small_disk(folder: Path, size: int) -> None:
    """Raise WorkError if the disk has too little space for a checkpoint."""
    free_bytes = shutil.disk_usage(folder.parent).free
    if free_bytes < size + _RESERVED_BYTES:
        raise WorkError(
            f"{folder.parent} has {free_bytes:,} bytes of free space, but the checkpoint needs "
            f"more than {size:,} bytes; nothing was written"
        )


@contextmanager
def draft_folder(output: Path) -> Iterator[Path]:
    """Yield a temporary folder; rename it to `output` on success, or delete it on failure."""
    try:
        with new_folder(output) as folder:
            yield folder
    except TrackerError as error:
        raise type(error)(f"{output} is not written: {error}") from None
    except OSError as error:
        reason = error.strerror or str(error)
        if error.errno in _DISK_FULL_ERRORS:
            reason = "the disk is full"
        raise WorkError(f"{output} is not written: {reason}. Partial files are deleted.") from None
    except SafetensorError as error:
        if "os error" not in str(error).lower():
            raise
        # The message of safetensors for it: "I/O error: No space left on device (os error 28)"
        raise WorkError(f"{output} is not written: {error}. Partial files are deleted.") from None
