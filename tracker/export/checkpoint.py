"""Save a changed model as a checkpoint that anybody can load.

First it is proved to be the model that was measured. Then the tracking backends get it, with the
cells that chose the change.
"""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from tracker.benchmarks.benchmark import check_benchmark
from tracker.benchmarks.standalone import refuse_alone
from tracker.core.config import CellRequest, cell_request
from tracker.core.distribution import __version__
from tracker.core.errors import BenchmarkError, CellError, RequestError, TrackerError, WorkError
from tracker.core.formats import counted, measure_of
from tracker.core.provenance import machine
from tracker.core.records import CellRecord
from tracker.export.card import by_other_tools, write_card
from tracker.export.changes import (
    changed_layers,
    count_choosing,
    rounded_weights,
    untouched,
    with_origin,
)
from tracker.export.facts import Accuracy, Exported, ModelChange, Size
from tracker.export.proof import ExpectedAnswers, MeasuredCell, expected, prove
from tracker.ledger.files import new_folder
from tracker.ledger.store import Ledger
from tracker.measuring.job import Options
from tracker.measuring.prepare import look_up
from tracker.measuring.progress import Progress
from tracker.models.sources import ModelSource, find_model
from tracker.runner import run_cells
from tracker.team.publish import Publisher
from tracker.tracking import open_models, service, target
from tracker.tracking.base import SavedModel

BATCH, LENGTH = 1, 256
"""Texts and tokens that the models read while they are timed."""
FORMATS_FILE = "formats.json"
"""Name of the file with the format of each rounded weight."""
_OF_BENCHMARKS = ("part", "limit", "sample", "num_fewshot", "metric")
_SPARE = 64 * 2**20
"""Bytes reserved on disk for a tokenizer, configurations and a card."""
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True)
class ExportRequest:
    """A request to save a changed model.

    Attributes:
        change: The change of the model.
        request: The model; with a benchmark, on which the export is proved and measured.
        on_benchmark: Whether the request's benchmark counts.
        output: The folder to create.
        ledger: The results folder.
        options: The device, and whether a download's code may run.
        track: The tracking backends that get the model.
        project: Their project, if they name none.
        register: The name of the model in MLflow's registry; None for none.
    """

    change: ModelChange
    request: CellRequest
    on_benchmark: bool
    output: Path
    ledger: Ledger
    options: Options
    track: tuple[str, ...] = ()
    project: str = "tracker"
    register: str | None = None


def model_request(model: str, benchmark: str | None, **settings: Any) -> CellRequest:
    """Build a request for a model, and a benchmark if given; raise RequestError on misfits."""
    idle = [name for name in _OF_BENCHMARKS if settings.get(name) is not None]
    if benchmark is None and idle:
        raise RequestError(
            f"--{idle[0]} is about a benchmark; name one, as in --benchmark arc_easy"
        )
    return cell_request(model=model, benchmark=benchmark or "none", layers=(), **settings)


def refuse_output(output: Path) -> None:
    """Raise RequestError for a path that is not empty, or cannot be a folder."""
    if output.is_dir() and not any(output.iterdir()):
        return
    if output.exists() or output.is_symlink():
        problem = "is a folder that holds something" if output.is_dir() else "is a file"
        raise RequestError(f"--output: {output} {problem}; name a new folder")
    if not output.absolute().parent.is_dir():
        raise RequestError(f"--output: there is no folder {output.absolute().parent}")


def export(request: ExportRequest, progress: Progress) -> Exported:
    """Save a changed model.

    Args:
        request: The model, the change, and the output.
        progress: The progress listener.

    Returns:
        The saved model, with facts about it.

    Raises:
        RequestError: The request was wrong; nothing was computed or written.
        WorkError: The saved model differs from the measured one, or cannot be written; nothing of
            it is left.
    """
    from tracker.models.checkpoint import refuse_packed, refuse_unsizable, release

    cell_of, change, trust = request.request, request.change, request.options.trust_remote_code
    targets = [target(text, "lighter models") for text in request.track]
    refuse_output(request.output)
    registries = [to for to in targets if "registered models" in service(to.backend).can]
    if request.register and not registries:
        raise RequestError("--register is a name in MLflow's registry; add --track mlflow")
    source = find_model(cell_of.model, trust)
    rounds = change.kind == "quantised"
    if request.on_benchmark and not rounds:
        refuse_alone(cell_of.benchmark)
        check_benchmark(cell_of.benchmark)
    progress.say("checking that the configuration can say what is left")
    if rounds:
        refuse_packed(source)
    else:
        refuse_unsizable(source, change.ablation.removed(), change.ablation.repeated)
    cell, measured = _measure(request, progress) if request.on_benchmark else (None, None)
    with folder_beside(request.output) as folder:
        model, answers = _save(request, source, folder, progress)
        progress.say("loading it in a fresh process" + (", for lm-eval" if measured else ""))
        release()
        try:
            proof = prove(folder, answers, measured, trust)
        except BenchmarkError as error:
            if not rounds:
                raise
            progress.say(f"not scored by lm-eval: {error}")
            proof = prove(folder, answers, None, trust)
        change = with_origin(change, request.ledger, model.base)
        rows = [] if measured is None else [_accuracy(cell, measured, change, request.ledger)]
        # A measurement on exactly these documents is not repeated in the list.
        measured_on = {(row.benchmark, row.n, row.before) for row in rows}
        rows += [r for r in change.tested if (r.benchmark, r.n, r.before) not in measured_on]
        model = replace(model, change=change, accuracy=tuple(rows), proof=proof)
        write_card(model, folder)
    made_of = (*change.chosen_by, *(() if cell is None else (cell,)))
    results, project = request.ledger.root, request.project
    return publish(model, made_of, request.track, project, results, request.register)


def publish(
    model: Exported,
    made_of: Sequence[CellRecord],
    track: Sequence[str],
    project: str,
    results: Path,
    register: str | None = None,
) -> Exported:
    """Publish a model to all backends, even if one of them fails.

    Args:
        model: The saved model.
        made_of: The cells that chose it, or measured its cost.
        track: The backends, each as `BACKEND` or `BACKEND:PROJECT`.
        project: The project if a backend names none.
        results: The results folder.
        register: The name of the model in MLflow's registry; None for none.

    Returns:
        The model, with its locations and the errors of backends.
    """
    folder, facts, figures = model.folder.absolute(), model.as_json(), model.figures()
    saved = SavedModel(folder, model.name, facts, figures, tuple(made_of), register)
    locations, unpublished = {}, {}
    for text in track:
        to = target(text)
        place = (to.project or project, results, to.server)
        with closing(open_models(to.backend, *place)) as models:
            try:
                locations[to.backend] = models.add_model(saved)
            except TrackerError as error:
                unpublished[text] = str(error)
    return replace(model, locations=locations, unpublished=unpublished)


def _measure(
    request: ExportRequest, progress: Progress
) -> tuple[CellRecord | None, MeasuredCell | None]:
    """Measure the cost of the change on the benchmark, or read it from the ledger."""
    change, cell, ledger = request.change, None, request.ledger
    cell_of, ablation = request.request, change.ablation
    if change.kind != "quantised":  # the choice of formats was measured as a whole
        cell_of = replace(cell_of, removed=ablation.removed()).with_changes(ablation.repeated)
        publisher = Publisher(request.track, request.project, ledger.root)
        with closing(publisher):
            done = run_cells([cell_of], ledger, publisher, request.options, progress)
        if done.failed:
            raise CellError(next(iter(done.failed.values())))
        cell = done.cells[0]
    store = look_up(cell_of, ledger).store
    assert store is not None  # it has been measured
    return cell, MeasuredCell(cell_of, store, ablation)


def _save(
    request: ExportRequest, source: ModelSource, folder: Path, progress: Progress
) -> tuple[Exported, ExpectedAnswers]:
    """Write the checkpoint; it is not proved yet, and its cost is not measured.

    On return no model is in memory any more: the fresh process may need the space.
    """
    from tracker.models import checkpoint
    from tracker.models.load import load_model
    from tracker.models.offloaded import weight_bytes

    options = request.options
    progress.say(f"loading {source.name}")
    loaded = load_model(source, request.request.model.dtype, options.device)
    make = rounded_weights if request.change.kind == "quantised" else changed_layers
    changed = make(source, loaded, request.change)
    base, model = loaded.model, changed.model
    _refuse_small_disk(folder, weight_bytes(model))
    progress.say("writing the checkpoint")
    checkpoint.save(loaded, model, folder)
    answers = expected(loaded, model, options.device)
    faster, speed_on = None, ""
    if not changed.formats:
        progress.say("measuring how fast both read")
        longest = getattr(base.config.get_text_config(), "max_position_embeddings", None)
        length = min(LENGTH, longest or LENGTH)
        faster = checkpoint.times_as_fast(model, base, BATCH, length)
        speed_on = _speed_on(answers, loaded.identity.dtype, length)
    saved = Exported(
        folder=request.output,
        base=loaded.identity,
        change=request.change,
        kept=changed.kept,
        before=Size(len(loaded.layers), base.num_parameters(), weight_bytes(base)),
        after=Size(len(changed.kept), model.num_parameters(), changed.bytes),
        faster=faster,
        speed_on=speed_on,
        recipes=changed.recipes,
        resized=changed.resized,
        formats=changed.formats,
    )
    if saved.formats:
        _write_formats(saved, folder)
    return saved, answers


def _write_formats(model: Exported, folder: Path) -> None:
    """Write the format of each weight, and each tool's recipe, as separate files."""
    facts = {"tracker": __version__, "base": model.base.source, "formats": model.formats}
    (folder / FORMATS_FILE).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    for recipe in by_other_tools(model.recipes):
        (folder / recipe.file).write_text(recipe.text + "\n", encoding="utf-8")


def _speed_on(answers: ExpectedAnswers, dtype: str, length: int) -> str:
    """Describe the hardware and the texts on which the speed was measured."""
    facts = machine()
    threads = f", {counted(answers.threads, 'thread')}" if answers.device == "cpu" else ""
    cores = counted(int(facts["cores"]), "core")
    return (
        f"both by turns in one process, batch {BATCH}, {length} tokens, {dtype}, on "
        f"{answers.device}{threads} ({facts['platform']}, {cores})"
    )


def _accuracy(
    cell: CellRecord | None, measured: MeasuredCell, change: ModelChange, ledger: Ledger
) -> Accuracy:
    """Return the cost of the change on a cell, and how many of its documents chose the layers."""
    benchmark, metric = measured.store.identity.benchmark, measured.metric
    if cell is None:
        unit = "%" if benchmark.tasks[0].higher_is_better.get(metric, True) else ""
        documents, n, before = untouched(measured.n), measured.n, measured.baseline
    else:
        chose = count_choosing(ledger, change, measured.store, measured.request.extent)
        verb = "may have chosen" if change.kind == "repeated" else "chose"
        among = f", {chose:,} of which {verb} the layers" if chose else ""
        part = "" if benchmark.title == benchmark.name else f" of {benchmark.title}"
        unit = measure_of(cell).level_unit
        documents, n, before = f"{cell.documents}{part}{among}", cell.n, cell.baseline
    title, shots = benchmark.title, benchmark.num_fewshot
    return Accuracy(title, shots, metric, documents, n, before, measured.level, unit)


def _refuse_small_disk(folder: Path, size: int) -> None:
    free = shutil.disk_usage(folder.parent).free
    if free < size + _SPARE:
        raise WorkError(
            f"{folder.parent} has room for {free:,} bytes, and the checkpoint takes {size:,} and "
            "some more; nothing was written"
        )


@contextmanager
def folder_beside(output: Path) -> Iterator[Path]:
    """Yield a folder beside another, which replaces it on success and is deleted on failure."""
    try:
        with new_folder(output) as folder:
            yield folder
    except TrackerError as error:
        raise type(error)(f"{output} is not written: {error}") from None
    except OSError as error:
        why = "the disk is full" if error.errno in _FULL else error.strerror or str(error)
        raise WorkError(f"{output} is not written: {why}. Nothing of it is left.") from None
    except SafetensorError as error:
        if "os error" not in str(error).lower():
            raise
        # The message of safetensors for it: "I/O error: No space left on device (os error 28)"
        raise WorkError(f"{output} is not written: {error}. Nothing of it is left.") from None
