"""Saves a model without some of its layers, or with some again.

It is proved first to be the one that was measured, and is handed to the tracking backends beside
the cells that say why it is as it is.
"""

from __future__ import annotations

import errno
import shutil
from collections.abc import Collection, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from tracker.benchmarks.benchmark import check_benchmark
from tracker.benchmarks.standalone import refuse_alone
from tracker.core.ablations import ablations_of
from tracker.core.changes import Change
from tracker.core.config import CellRequest, cell_request
from tracker.core.errors import CellError, RequestError, TrackerError, WorkError
from tracker.core.formats import counted, measure_of
from tracker.core.kinds import Component
from tracker.core.provenance import machine
from tracker.core.records import CellRecord
from tracker.ledger.files import new_folder
from tracker.ledger.store import Ledger
from tracker.measuring.job import Options
from tracker.measuring.prepare import look_up
from tracker.measuring.progress import Progress
from tracker.models.sources import ModelSource, find_model
from tracker.pruning.export.chosen import chosen, that_chose, tried
from tracker.pruning.export.facts import Accuracy, Exported, Pruning, Size, write_card
from tracker.pruning.export.proof import ExpectedAnswers, MeasuredCell, expected, prove
from tracker.pruning.export.recipes import recipes, skip_lists, windows_of
from tracker.runner import run_cells
from tracker.team.publish import Publisher
from tracker.tracking import open_models, service, target
from tracker.tracking.base import SavedModel


def publish(
    model: Exported,
    made_of: Sequence[CellRecord],
    track: Sequence[str],
    project: str,
    results: Path,
    register: str | None = None,
) -> Exported:
    """Publish a model; what one backend refuses does not keep the others from it.

    Args:
        model: What was saved.
        made_of: The cells that chose it, or say what it costs.
        track: The backends, each as `BACKEND` or `BACKEND:PROJECT`.
        project: Where none is named.
        results: The results folder.
        register: The name under which MLflow's registry keeps it; None for none.

    Returns:
        The model, with where it is and what went wrong.
    """
    facts, folder = model.as_json(), model.folder.absolute()
    shown = SavedModel(folder, model.name, facts, _figures(model), tuple(made_of), register)
    locations, unpublished = {}, {}
    for text in track:
        to = target(text)
        place = (to.project or project, results, to.server)
        with closing(open_models(to.backend, *place)) as models:
            try:
                locations[to.backend] = models.add_model(shown)
            except TrackerError as error:
                unpublished[text] = str(error)
    return replace(model, locations=locations, unpublished=unpublished)


def _figures(model: Exported) -> dict[str, float]:
    """Numbers of a model, by names that every backend takes."""
    own = "repeated" if model.pruning.repeated else "pruned"
    sizes = {"base": model.before, own: model.after}
    found: dict[str, float] = {
        f"{name}/{what}": number
        for name, size in sizes.items()
        for what, number in asdict(size).items()
    }
    if model.faster is not None:
        found[f"{own}/times_as_fast"] = model.faster[0]
    for each in model.accuracy:
        metric = f"{each.benchmark}/{each.metric.replace(',', ' ')}"
        for name, level in (("base", each.before), (own, each.after)):
            if level.value is not None:
                found[f"{name}/{metric}"] = level.value
    return found


BATCH, LENGTH = 1, 256
"""What the models read while they are timed."""
_OF_BENCHMARKS = ("part", "limit", "sample", "num_fewshot", "metric")
_SPARE = 64 * 2**20
"""Bytes of a disk that a tokenizer, configurations and a card may take."""
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True)
class ExportRequest:
    """What is to be exported, and how.

    Attributes:
        pruning: The layers, and what is known of the choice.
        request: The model; with a benchmark, on which the export is proved and measured.
        on_benchmark: Whether the request's benchmark counts.
        output: The folder that is made.
        ledger: The results folder.
        options: On what device, and whether a download's code may run.
        track: The tracking backends that get it.
        project: Their project, where they name none.
        register: The name under which MLflow's registry keeps it; None for none.
    """

    pruning: Pruning
    request: CellRequest
    on_benchmark: bool
    output: Path
    ledger: Ledger
    options: Options
    track: tuple[str, ...] = ()
    project: str = "tracker"
    register: str | None = None


def request(model: str, benchmark: str | None, **settings: Any) -> CellRequest:
    """Make a request for a model and, perhaps, a benchmark; RequestError for what does not fit."""
    idle = [name for name in _OF_BENCHMARKS if settings.get(name) is not None]
    if benchmark is None and idle:
        raise RequestError(
            f"--{idle[0]} is about a benchmark; name one, as in --benchmark arc_easy"
        )
    return cell_request(model=model, benchmark=benchmark or "none", layers=(), **settings)


def change(
    remove: Sequence[int], repeat: Sequence[int], repeats: int | None, component: Component
) -> Pruning:
    """Say which layers go, or are passed again; RequestError for what is no such change."""
    if repeats is not None and not repeat:
        raise RequestError("--repeats says how often layers are passed; name them: --repeat 8-11")
    if not repeat:
        if not remove:
            raise RequestError(
                "nothing is to be removed or repeated; name layers, as in --remove 3,17 or "
                "--repeat 8-11"
            )
        refuse_parts(component, tuple(remove))
        return Pruning(tuple(remove))
    if remove:
        raise RequestError(
            "--remove and --repeat are saved one after the other: export with the one, and give "
            "the folder that it makes to 'tracker export FOLDER' with the other"
        )
    if component != "layer":
        raise RequestError("--repeat passes whole layers again; leave --component out")
    times = 2 if repeats is None else repeats
    span = Change(layers=tuple(repeat), intervention="repeat", repeats=times)
    if list(repeat) != list(range(repeat[0], repeat[-1] + 1)):
        raise RequestError("--repeat is one stretch of neighbours, as in --repeat 8-11")
    if times < 2:
        raise RequestError("--repeats counts all passes: 2 is twice")
    return Pruning((), repeated=span)


def refuse_parts(component: Component, layers: tuple[int, ...]) -> None:
    """Refuse to save a model without some attentions or MLPs: RequestError."""
    if component == "layer":
        return
    what = "attentions" if component == "attention" else "MLPs"
    raise RequestError(
        f"a checkpoint without some {what} is none that plain transformers can load: its classes "
        "give every layer both. Export whole layers (--remove), or give the base to code that "
        "leaves them out: the model classes of LLM-Drop "
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


def refuse_output(output: Path) -> None:
    """Refuse a place that holds something, or cannot hold a folder: RequestError."""
    if output.is_dir() and not any(output.iterdir()):
        return
    if output.exists() or output.is_symlink():
        what = "is a folder that holds something" if output.is_dir() else "is a file"
        raise RequestError(f"--output: {output} {what}; name a new folder")
    if not output.absolute().parent.is_dir():
        raise RequestError(f"--output: there is no folder {output.absolute().parent}")


def export(asked: ExportRequest, progress: Progress) -> Exported:
    """Save a model without some of its layers, or with some again.

    Args:
        asked: What, and how.
        progress: Told what happens.

    Returns:
        What was saved, and what is known of it.

    Raises:
        RequestError: The request was wrong; nothing was computed or written.
        WorkError: What was saved is not what was measured, or cannot be written; nothing of it is
            left.
    """
    from tracker.models.checkpoint import refuse_unsizable, release

    request, removed = asked.request, tuple(sorted(asked.pruning.removed))
    opened = [target(text, "lighter models") for text in asked.track]
    refuse_output(asked.output)
    if asked.register and not any("registered models" in service(to.backend).can for to in opened):
        raise RequestError("--register is a name in MLflow's registry; add --track mlflow")
    source = find_model(request.model, request.revision, request.model_args)
    if asked.on_benchmark:
        refuse_alone(request)
        check_benchmark(request)
    progress.say("checking that the configuration can say what is left")
    trust, stretches = asked.options.trust_remote_code, asked.pruning.stretches
    refuse_unsizable(source, removed, trust, stretches)
    cell, measured = None, None
    if asked.on_benchmark:
        cell, measured = _measure(asked, removed, progress)
    with beside(asked.output) as folder:
        model, wanted = _save(asked, source, folder, progress)
        progress.say("loading it in a fresh process" + (", for lm-eval" if measured else ""))
        release()
        proof = prove(folder, wanted, measured, trust)
        pruning = asked.pruning
        if pruning.repeated is not None:
            pruning = tried(asked.ledger, model.base, pruning.repeated)
        elif pruning.strategy is None:
            pruning = chosen(asked.ledger, model.base, pruning.removed)
        own: tuple[Accuracy, ...] = ()
        if cell is not None and measured is not None:
            own = (_accuracy(cell, measured, pruning, asked.ledger),)
        # What was measured on just these documents is not said again.
        known = {(each.benchmark, each.n, each.before) for each in own}
        more = [a for a in pruning.tested if (a.benchmark, a.n, a.before) not in known]
        model = replace(model, pruning=pruning, accuracy=(*own, *more), proof=proof)
        write_card(model, folder)
    made_of = (*pruning.chosen_by, *(() if cell is None else (cell,)))
    return publish(model, made_of, asked.track, asked.project, asked.ledger.root, asked.register)


def _measure(
    asked: ExportRequest, removed: tuple[int, ...], progress: Progress
) -> tuple[CellRecord, MeasuredCell]:
    """Measure what the change costs on the benchmark, or recall it."""
    changes = {"removed": removed, "changes": asked.pruning.stretches}
    request = asked.request.model_copy(update=changes)
    publisher = Publisher(asked.track, asked.project, asked.ledger.root)
    with closing(publisher):
        done = run_cells([request], asked.ledger, publisher, asked.options, progress)
    if done.failed:
        raise CellError(next(iter(done.failed.values())))
    store = look_up(request, asked.ledger).store
    assert store is not None  # it has just been measured
    # The change is the cell's one run, or what the whole cell lacks.
    cell = done.cells[0]
    return cell, MeasuredCell(request, store, ablations_of(request, cell.model.layers)[-1])


def _save(
    asked: ExportRequest, source: ModelSource, folder: Path, progress: Progress
) -> tuple[Exported, ExpectedAnswers]:
    """Write the checkpoint; nothing is proved of it yet, nor said of what it costs.

    When this returns, no model is in memory any more: the fresh process may need the room.
    """
    from tracker.models import checkpoint
    from tracker.models.load import load_model
    from tracker.models.placement import weight_bytes
    from tracker.models.pruned import left

    options, removed, stretches = asked.options, asked.pruning.removed, asked.pruning.stretches
    progress.say(f"loading {source.name}")
    loaded = load_model(source, asked.request.dtype, options.device, options.trust_remote_code)
    kept = tuple(left(len(loaded.layers), removed, stretches))
    twin = checkpoint.without(loaded.model, removed, stretches)
    # Before it is saved, which names the class in a configuration that does not, as a GGUF file's.
    resized = checkpoint.resized(loaded.model, twin)
    _refuse_small_disk(folder, weight_bytes(twin))
    progress.say("writing the checkpoint")
    checkpoint.save(loaded, twin, folder)
    progress.say("measuring how fast both read")
    longest = getattr(loaded.model.config.get_text_config(), "max_position_embeddings", None)
    length = min(LENGTH, longest or LENGTH)
    faster = checkpoint.times_as_fast(twin, loaded.model, BATCH, length)
    before, after = (
        Size(layers, model.num_parameters(), weight_bytes(model))
        for model, layers in ((loaded.model, len(loaded.layers)), (twin, len(kept)))
    )
    wanted = expected(loaded, twin, options.device)
    said = twin.config.get_text_config()
    windows = windows_of(said.model_type, getattr(said, "layer_types", None) or ())
    base = loaded.identity
    saved = Exported(
        folder=asked.output,
        base=base,
        pruning=asked.pruning,
        kept=kept,
        before=before,
        after=after,
        faster=faster,
        speed_on=_speed_on(wanted, base.dtype, length),
        recipes=recipes(source, base, kept, removed, resized, windows),
        resized=resized,
    )
    return saved, wanted


def _speed_on(on: ExpectedAnswers, dtype: str, length: int) -> str:
    """Say on what the speed was measured."""
    here = machine()
    threads = f", {counted(on.threads, 'thread')}" if on.device == "cpu" else ""
    cores = counted(int(here["cores"]), "core")
    return (
        f"both by turns in one process, batch {BATCH}, {length} tokens, {dtype}, on {on.device}"
        f"{threads} ({here['platform']}, {cores})"
    )


def _accuracy(
    cell: CellRecord, measured: MeasuredCell, pruning: Pruning, ledger: Ledger
) -> Accuracy:
    """Say what the change costs on a cell, and how many of its documents chose the layers."""
    chose = that_chose(ledger, pruning, measured.store, measured.request.extent)
    verb = "may have chosen" if pruning.repeated else "chose"
    among = f", {chose:,} of which {verb} the layers" if chose else ""
    measure, title = measure_of(cell), cell.benchmark.title
    part = "" if title == cell.benchmark.name else f" of {title}"
    return Accuracy(
        benchmark=cell.benchmark.title,
        num_fewshot=cell.benchmark.num_fewshot,
        metric=cell.metric,
        documents=f"{cell.documents}{part}{among}",
        n=cell.n,
        before=cell.baseline,
        after=measured.level,
        unit=measure.level_unit,
    )


def _refuse_small_disk(folder: Path, size: int) -> None:
    free = shutil.disk_usage(folder.parent).free
    if free < size + _SPARE:
        raise WorkError(
            f"{folder.parent} has room for {free:,} bytes, and the checkpoint takes {size:,} and "
            "some more; nothing was written"
        )


@contextmanager
def beside(output: Path) -> Iterator[Path]:
    """Give a folder beside another, which takes its place at the end, or is gone."""
    try:
        with new_folder(output) as folder:
            yield folder
    except TrackerError as error:
        raise type(error)(f"{output} is not written: {error}") from None
    except OSError as error:
        why = "the disk is full" if error.errno in _FULL else error.strerror or str(error)
        raise WorkError(f"{output} is not written: {why}. Nothing of it is left.") from None
    except Exception as error:
        if "os error" not in str(error).lower():
            raise
        # safetensors says so of a disk: "I/O error: No space left on device (os error 28)"
        raise WorkError(f"{output} is not written: {error}. Nothing of it is left.") from None
