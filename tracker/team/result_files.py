"""Write lm-eval result files for the intact model and for each ablated model."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from tracker.ledger.cells import CellStore
from tracker.ledger.outcomes import METRIC_PREFIX, PROVENANCE_COLUMN, stored_texts
from tracker.ledger.store import Ledger
from tracker.ledger.views import cell_key
from tracker.measuring.progress import Progress, report_work
from tracker.models.sources import find_model
from tracker.schema.changes import INTACT, Ablation
from tracker.schema.config import CellRequest, ModelSpec, cell_request, names_corpus, names_traces
from tracker.schema.distribution import __version__
from tracker.schema.errors import BenchmarkError, RequestError, TrackerError, did_you_mean
from tracker.schema.extent import DEFAULT_SEED, Extent
from tracker.schema.fields import decode_arguments
from tracker.schema.grouping import group_by
from tracker.schema.identities import ModelIdentity
from tracker.schema.provenance import merge_provenances
from tracker.schema.views import View

if TYPE_CHECKING:
    from tracker.benchmarks.encoder import RequestEncoder
    from tracker.benchmarks.results import EvaluatedModel, JudgedAnswers
    from tracker.benchmarks.tasks import LmEvalBenchmark


def first_outcome_time(parts: Sequence[CellPart]) -> float | None:
    """Return the time of the earliest outcomes, in seconds since 1970; None if unknown."""
    names = ["task", "doc"]
    shards = [part.store.load_shard(path, names) for part in parts for path in part.store.shards()]
    times = [shard.metadata.get("measured") for shard in shards if shard is not None]
    return min((datetime.fromisoformat(text).timestamp() for text in times if text), default=None)


def describe_model(
    parts: Sequence[CellPart],
    ablation: Ablation,
    rows: Sequence[Mapping[Any, Any]],
    start_time: float | None,
) -> EvaluatedModel:
    """Build the metadata about an ablated model that lm-eval's result files contain."""
    from tracker.benchmarks.results import BOOTSTRAP_ITERS, EvaluatedModel

    identities = [part.store.identity for part in parts]
    model = identities[0].model
    extent = parts[0].extent
    settings = identities[0].benchmark.settings
    thinking_args = {
        n: v for n, v in settings.items() if n in ("enable_thinking", "think_end_token")
    }
    change_args = ablation_args(ablation)
    args = model_args(model) | thinking_args
    if change_args:  # readers take `pretrained` for the model's id; without it they take the name
        args = {"base": args.pop("pretrained"), **args, **change_args}
    provenance = merge_provenances(
        [json.loads(text) for text in sorted({row[PROVENANCE_COLUMN] for row in rows})]
    )
    config: dict[str, Any] = {
        "model_num_parameters": model.parameters if ablation == INTACT else None,
        "model_dtype": f"torch.{model.dtype}",
        "model_revision": None if change_args else model.revision,
        "model_sha": None if change_args else model.revision,
        **dict.fromkeys(("batch_size", "use_cache", "random_seed", "numpy_seed", "torch_seed")),
        "batch_sizes": [],
        "device": provenance.get("device"),
        "limit": extent.limit,
        "bootstrap_iters": BOOTSTRAP_ITERS,
        "gen_kwargs": decode_arguments(settings.get("gen_kwargs")) or None,
        "fewshot_seed": next((i.benchmark.seed for i in identities if i.benchmark.seed), None),
        "tracker": {
            "version": __version__,
            "ablation": ablation.name,
            "cells": {identity.benchmark.name: identity.key for identity in identities},
            "settings": settings,
            "sample": extent.sample,
            "sample_seed": None if extent.sample is None else extent.seed,
            "provenance": provenance,
        },
    }
    versions = {
        **dict.fromkeys(("git_hash", "pretty_env_info", "upper_git_hash")),
        "date": start_time,
        "transformers_version": provenance.get("transformers"),
        "lm_eval_version": provenance.get("lm-eval"),
    }
    return EvaluatedModel(
        name=",".join((model.arguments.get("peft", model.source), *_format_args(change_args))),
        model_args=",".join(_format_args(args)),
        system_instruction=settings.get("system_instruction"),
        fewshot_as_multiturn=settings.get("fewshot_as_multiturn") != "false",
        config=config,
        versions=versions,
    )


def model_args(model: ModelIdentity) -> dict[str, str]:
    """Return the `--model_args` that make lm-eval load the measured weights."""
    args = {"pretrained": model.source}
    if model.source.endswith(".gguf"):
        path = Path(model.source)
        args = {"pretrained": str(path.parent), "gguf_file": path.name}
    if model.revision is not None:
        args["revision"] = model.revision
    return {**args, "dtype": model.dtype, **model.arguments}


def ablation_args(ablation: Ablation) -> dict[str, str]:
    """Encode an ablation as model arguments, such as `removed_layers=3+17`, for lm-eval's files.

    The arguments contain no comma, and identify the ablation.
    """
    changes: list[tuple[str, object]] = [
        *(("removed_layers", layer) for layer in ablation.removed()),
        *(
            (f"removed_{component}", layer)
            for component in ("attention", "mlp", "shared_expert")
            for layer in ablation.removed(component)
        ),
        *((f"{change.intervention}_layers", change.layer) for change in ablation.replacements),
        *((f"removed_{change.component}", change.target) for change in ablation.parts),
        *((f"{change.intervention}_weights", change.target) for change in ablation.roundings),
    ]
    for span in ablation.repetitions:
        suffix = "" if span.repeats == 2 else f"x{span.repeats}"
        changes.append(("repeated_layers", span.target + suffix))
    values = group_by(changes, lambda change: change[0])
    return {name: "+".join(str(value) for _, value in pairs) for name, pairs in values.items()}


def _format_args(args: dict[str, str]) -> list[str]:
    return [f"{name}={value}" for name, value in args.items()]


@dataclass(frozen=True)
class CellPart:
    """Outcomes of one model and benchmark on one set of documents, for requested ablations."""

    store: CellStore
    extent: Extent
    ablations: tuple[Ablation, ...]

    @property
    def title(self) -> str:
        """Title for messages: model, benchmark and number of few-shot examples."""
        identity = self.store.identity
        model, benchmark = identity.model.name, identity.benchmark
        return f"{model} · {benchmark.title} · {benchmark.num_fewshot}-shot"

    @property
    def call_key(self) -> str:
        """Key of an lm-eval call: model, settings and documents of the outcomes, as JSON text."""
        identity = self.store.identity
        own_fields = {
            "name",
            "tasks",
            "num_fewshot",
            "primary_metric",
            "weight_by_size",
            "found_by",
        }
        settings = identity.benchmark.model_dump(mode="json", exclude=own_fields)
        settings["seed"] = settings["seed"] or DEFAULT_SEED  # any seed, if nothing is drawn
        model = identity.model.model_dump(mode="json")
        return json.dumps([model, settings, self.extent.model_dump()], sort_keys=True)

    @property
    def tasks(self) -> set[str]:
        """Names of the tasks of the benchmark."""
        return {task.name for task in self.store.identity.benchmark.tasks}

    def read_outcomes(self) -> dict[Ablation, pd.DataFrame]:
        """Read the outcomes of each requested ablation, as a data frame with a row per document."""
        frame = self.store.read_documents(self.extent)
        frames = dict(iter(frame.groupby("ablation"))) if len(frame) else {}
        return {
            ablation: frames[ablation.name]
            for ablation in self.ablations
            if ablation.name in frames
        }

    def missing_notes(self, outcomes: Mapping[Ablation, pd.DataFrame]) -> Iterator[str]:
        """Yield a message for each group of ablations that were not measured on all documents.

        A group contains the ablations with equally many measured documents.
        """
        n_documents = sum(self.store.counts(self.extent).values())
        names_by_count: dict[int, list[str]] = {}
        for ablation in self.ablations:
            if (n_measured := len(outcomes.get(ablation, ()))) < n_documents:
                names_by_count.setdefault(n_measured, []).append(ablation.name)
        for n_measured, names in names_by_count.items():
            names_text = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if names[3:] else "")
            remark = "they have no files"
            if n_measured:
                remark = "the written files contain only the measured documents"
            measured = f"{n_measured} of {n_documents} documents are measured for {names_text}"
            yield f"{self.title}: {measured}; {remark}"


@dataclass(frozen=True)
class ResultFiles:
    """Result of writing files in lm-eval's format: paths, remarks and errors.

    Attributes:
        files: Paths of the written files. For each model, the results file comes first, then the
            samples file of each task.
        notes: Remarks, for example on missing outcomes.
        failed: Title of a model and benchmark (or path of a folder) → error message.
    """

    files: list[Path] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)


def write_result_files(
    ledger: Ledger,
    output: Path,
    models: Collection[str],
    benchmarks: Collection[str],
    layers: Collection[int],
    trust_remote_code: bool,
    progress: Progress,
) -> ResultFiles:
    """Write the results of a results folder as result files in lm-eval's format.

    Args:
        ledger: The results folder.
        output: The output folder. Each model gets its own subfolder, as with `lm_eval
            --output_path`.
        models: Models to include, by short name or as typed in the experiment file; empty for all.
        benchmarks: Names of the benchmarks to include; empty for all benchmarks.
        layers: Layers to include: an ablation is written if its first changed layer is listed.
            Empty for all ablations.
        trust_remote_code: True if code from a model's repository may run to load its chat template.
        progress: Receives the number of models whose files are written.

    Returns:
        The paths of the written files, with remarks and errors. An error in one file does not
        affect other files.

    Raises:
        RequestError: No cell matches, or `output` is a file.
    """
    if output.exists() and not output.is_dir():
        raise RequestError(f"--output: {output} is a file; name a folder")
    result = ResultFiles()
    parts: list[CellPart] = []
    first_layers: set[int] = set()
    for store in _select_stores(ledger.cells(result.failed), models, benchmarks):
        views = [view_request.view for view_request in store.views.read_requested(result.failed)]
        first_layers.update(run.layer for view in views for run in view.runs if not run.is_outer)
        cell_parts = list(_cell_parts(store, views, layers))
        name = store.identity.benchmark.name
        if cell_parts and (names_corpus(name) or names_traces(name)):
            kind = "corpus" if names_corpus(name) else "text that another model wrote"
            result.notes.append(
                f"{cell_parts[0].title}: no files are written, because lm-eval has no task for a "
                f"{kind}"
            )
        else:
            parts += cell_parts
    if not parts and not result.notes:
        raise RequestError("no such run is measured yet; type: tracker run EXPERIMENT.yaml")
    if absent_layers := set(layers) - first_layers:
        raise RequestError(
            f"--layer: no requested ablation starts at layer {min(absent_layers)}; choose from "
            f"{', '.join(map(str, sorted(first_layers)))}"
        )
    calls = _group_calls(parts)
    output.mkdir(parents=True, exist_ok=True)
    with report_work(
        progress, "writing", sum(len(_call_ablations(call)) for call in calls), "models"
    ):
        for call in calls:
            _write_call(call, output, trust_remote_code, progress, result)
    return result


def _select_stores(
    stores: Sequence[CellStore], models: Collection[str], benchmarks: Collection[str]
) -> list[CellStore]:
    """Return the stored results of the given models and benchmarks.

    RequestError is raised for an unknown name, and if no results match.
    """
    if not stores:
        raise RequestError("there is no finished benchmark yet; type: tracker run EXPERIMENT.yaml")
    model_names = {name for store in stores for name in _model_names(store)}
    benchmark_names = {store.identity.benchmark.name for store in stores}
    for option, names, known_names in (
        ("model", models, model_names),
        ("benchmark", benchmarks, benchmark_names),
    ):
        for name in names:
            if name not in known_names:
                raise RequestError(
                    f"--{option}: there are no results of {name!r}."
                    f"{did_you_mean(name, known_names)} Known: {', '.join(sorted(known_names))}"
                )
    selected_stores = [
        store
        for store in stores
        if _model_names(store) & set(models or model_names)
        and store.identity.benchmark.name in (benchmarks or benchmark_names)
    ]
    if not selected_stores:
        raise RequestError(
            "this benchmark has not been measured for these models; type tracker ls to list all "
            "measurements"
        )
    return selected_stores


def _model_names(store: CellStore) -> set[str]:
    """Return the names by which users can select a model: short name, and name as typed."""
    return {store.identity.model.name, store.identity.model.source}


def _cell_parts(
    store: CellStore, views: Sequence[View], layers: Collection[int]
) -> Iterator[CellPart]:
    """Yield a `CellPart` for each set of documents in `views`, with the requested ablations.

    A view is a requested selection of runs and documents. If `layers` is not empty, only ablations
    that first change one of these layers are included.
    """
    for extent in dict.fromkeys(view.extent for view in views):
        ablations = [INTACT]
        for view in [view for view in views if view.extent == extent]:
            view_runs = [run for run in view.runs if not layers or run.first_layer in layers]
            ablations.append(Ablation.from_changes(removed=view.removed))
            ablations += [Ablation.from_changes(run, removed=view.removed) for run in view_runs]
        yield CellPart(store, extent, tuple(dict.fromkeys(ablations)))


def _group_calls(parts: Sequence[CellPart]) -> list[list[CellPart]]:
    """Group outcomes that one lm-eval call could compute.

    The outcomes of a group have equal models, settings and documents, and different tasks.
    """
    calls: dict[str, list[list[CellPart]]] = {}
    for part in parts:
        same_calls = calls.setdefault(part.call_key, [])
        free_calls = (
            call
            for call in same_calls
            if not any(part.tasks & other_part.tasks for other_part in call)
        )
        if (call := next(free_calls, None)) is None:
            same_calls.append(call := [])
        call.append(part)
    return [call for same_calls in calls.values() for call in same_calls]


def _call_ablations(call: Sequence[CellPart]) -> list[Ablation]:
    return list(dict.fromkeys(ablation for part in call for ablation in part.ablations))


def _write_call(
    call: Sequence[CellPart],
    output: Path,
    trust_remote_code: bool,
    progress: Progress,
    result: ResultFiles,
) -> None:
    """Write the result files that one lm-eval call would write for the outcomes in `call`."""
    from tracker.benchmarks.results import ResultFileWriter

    parts: dict[CellPart, LmEvalBenchmark] = {}
    for part in call:
        try:
            parts[part] = _open_benchmark(part.store)
        except TrackerError as error:
            result.failed[part.title] = str(error)
    ablations = _call_ablations(call)
    n_left = len(ablations)
    try:
        if not parts:
            return
        first = next(iter(parts))
        writer = ResultFileWriter(
            [*parts.values()], first.extent, _build_encoder(first.store, trust_remote_code)
        )
        outcomes = {part: part.read_outcomes() for part in parts}
        result.notes.extend(note for part in parts for note in part.missing_notes(outcomes[part]))
        start_time = first_outcome_time([*parts])
        for ablation in ablations:
            frames = [
                part_frames[ablation]
                for part_frames in outcomes.values()
                if ablation in part_frames
            ]
            rows = [row for frame in frames for row in frame.to_dict("records")]
            if rows:
                model = describe_model([*parts], ablation, rows, start_time)
                result.files.extend(writer.write(model, _judged_responses(rows), output))
            n_left -= 1
            progress.advance(1)
    except TrackerError as error:
        result.failed[", ".join(part.title for part in parts)] = str(error)
    finally:
        progress.advance(n_left)


def _open_benchmark(store: CellStore) -> LmEvalBenchmark:
    """Open the benchmark with which stored results were measured.

    BenchmarkError is raised if the benchmark has changed since the measurement.
    """
    from tracker.benchmarks.tasks import LmEvalBenchmark

    identity = store.identity
    benchmark = LmEvalBenchmark(rebuild_request(store))
    if cell_key(identity.model, benchmark.identity) != identity.key:
        raise BenchmarkError(
            f"{identity.benchmark.name} has changed since it was measured. The change is in its "
            f"documents in {identity.benchmark.data}, or in its task in the installed lm-eval. "
            "Restore the former version, or measure the benchmark again"
        )
    return benchmark


def rebuild_request(store: CellStore) -> CellRequest:
    """Build a request without ablations from the metadata of stored results."""
    identity = store.identity
    benchmark = identity.benchmark
    samples = benchmark.settings.get("samples")
    settings: dict[str, Any] = {
        "model": identity.model.source,
        "benchmark": benchmark.name,
        "layers": (),
        "seed": DEFAULT_SEED if benchmark.seed is None else benchmark.seed,
        "num_fewshot": benchmark.num_fewshot,
        "apply_chat_template": benchmark.apply_chat_template,
        "data": benchmark.data,
        **{name: _BOOLEANS.get(value, value) for name, value in benchmark.settings.items()},
        **benchmark.found_by,
        "samples": samples and int(samples),
        "noise": None,
    }
    return cell_request(**settings)


_BOOLEANS = {"true": True, "false": False}


def _build_encoder(store: CellStore, trust_remote_code: bool) -> RequestEncoder | None:
    """Build the encoder that applies the model's chat template to prompts.

    Returns None if the results were measured without a chat template.
    """
    if not store.identity.benchmark.apply_chat_template:
        return None
    from tracker.benchmarks.encoder import RequestEncoder
    from tracker.models.load import build_for_planning

    model = store.identity.model
    # Of the loading arguments, only the subfolder affects the tokenizer.
    tokenizer_args = {n: v for n, v in model.arguments.items() if n == "subfolder"}
    arguments_text = json.dumps(tokenizer_args) if tokenizer_args else None
    spec = ModelSpec(model=model.source, revision=model.revision, model_args=arguments_text)
    model_and_tokenizer = build_for_planning(find_model(spec, trust_remote_code), "auto")
    return RequestEncoder(*model_and_tokenizer, rebuild_request(store).benchmark)


def _judged_responses(rows: Sequence[Mapping[Any, Any]]) -> dict[tuple[str, int], JudgedAnswers]:
    """Convert stored outcomes to the format of `ResultFileWriter`.

    Returns a dict: (task, index of the document) → the model's responses and their scores.
    """
    from tracker.benchmarks.results import JudgedAnswers

    judged_documents = {}
    for row in rows:
        metrics = {
            name.removeprefix(METRIC_PREFIX): None if pd.isna(value) else value
            for name, value in row.items()
            if name.startswith(METRIC_PREFIX)
        }
        judged = JudgedAnswers(row["loglikelihoods"], row["greedy"], stored_texts(row), metrics)
        judged_documents[row["task"], int(row["doc"])] = judged
    return judged_documents
