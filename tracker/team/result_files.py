"""Write lm-eval's result files of a results folder: for the intact and every ablated model."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from tracker.benchmarks.corpus import is_corpus
from tracker.core.changes import INTACT, Ablation
from tracker.core.config import CellRequest, ModelSpec, cell_request
from tracker.core.distribution import __version__
from tracker.core.errors import BenchmarkError, RequestError, TrackerError, did_you_mean
from tracker.core.extent import DEFAULT_SEED, Extent
from tracker.core.fields import decoded
from tracker.core.grouping import grouped
from tracker.core.identities import ModelIdentity
from tracker.core.provenance import united
from tracker.core.views import View
from tracker.ledger.cells import CellStore
from tracker.ledger.outcomes import METRIC, PROVENANCE
from tracker.ledger.store import Ledger
from tracker.ledger.views import cell_key
from tracker.measuring.progress import Progress, telling
from tracker.models.sources import find_model

if TYPE_CHECKING:
    from tracker.benchmarks.encoder import RequestEncoder
    from tracker.benchmarks.results import Evaluated, Judged
    from tracker.benchmarks.tasks import LmEvalBenchmark


def started(parts: Sequence[CellPart]) -> float | None:
    """Return the time of the first outcomes, in seconds since 1970; None if unknown."""
    names = ["task", "doc"]
    shards = [part.store.shard(path, names) for part in parts for path in part.store.shards()]
    times = [shard.about.get("measured") for shard in shards if shard is not None]
    return min((datetime.fromisoformat(at).timestamp() for at in times if at), default=None)


def evaluated(
    parts: Sequence[CellPart],
    ablation: Ablation,
    rows: Sequence[Mapping[Any, Any]],
    started: float | None,
) -> Evaluated:
    """Build lm-eval's description of an ablated model; unknown values are None."""
    from tracker.benchmarks.results import BOOTSTRAP_ITERS, Evaluated

    identities = [part.store.identity for part in parts]
    model = identities[0].model
    extent = parts[0].extent
    said = identities[0].benchmark.settings
    thinking = {n: v for n, v in said.items() if n in ("enable_thinking", "think_end_token")}
    changed = changed_args(ablation)
    args = model_args(model) | thinking
    if changed:  # readers take `pretrained` for the model's id; without it they take the name
        args = {"base": args.pop("pretrained"), **args, **changed}
    stack = united([json.loads(one) for one in sorted({row[PROVENANCE] for row in rows})])
    config: dict[str, Any] = {
        "model_num_parameters": model.parameters if ablation == INTACT else None,
        "model_dtype": f"torch.{model.dtype}",
        "model_revision": None if changed else model.revision,
        "model_sha": None if changed else model.revision,
        **dict.fromkeys(("batch_size", "use_cache", "random_seed", "numpy_seed", "torch_seed")),
        "batch_sizes": [],
        "device": stack.get("device"),
        "limit": extent.limit,
        "bootstrap_iters": BOOTSTRAP_ITERS,
        "gen_kwargs": decoded(said.get("gen_kwargs")) or None,
        "fewshot_seed": next((i.benchmark.seed for i in identities if i.benchmark.seed), None),
        "tracker": {
            "version": __version__,
            "ablation": ablation.name,
            "cells": {identity.benchmark.name: identity.key for identity in identities},
            "settings": said,
            "sample": extent.sample,
            "sample_seed": None if extent.sample is None else extent.seed,
            "provenance": stack,
        },
    }
    versions = {
        **dict.fromkeys(("git_hash", "pretty_env_info", "upper_git_hash")),
        "date": started,
        "transformers_version": stack.get("transformers"),
        "lm_eval_version": stack.get("lm-eval"),
    }
    return Evaluated(
        name=",".join((model.arguments.get("peft", model.source), *_typed(changed))),
        model_args=",".join(_typed(args)),
        system_instruction=said.get("system_instruction"),
        fewshot_as_multiturn=said.get("fewshot_as_multiturn") != "false",
        config=config,
        versions=versions,
    )


def model_args(model: ModelIdentity) -> dict[str, str]:
    """Return the arguments of `lm_eval --model_args` for the measured weights."""
    args = {"pretrained": model.source}
    if model.source.endswith(".gguf"):
        path = Path(model.source)
        args = {"pretrained": str(path.parent), "gguf_file": path.name}
    if model.revision is not None:
        args["revision"] = model.revision
    return {**args, "dtype": model.dtype, **model.arguments}


def changed_args(ablation: Ablation) -> dict[str, str]:
    """Return the arguments that describe an ablation, one per kind of change, without commas.

    Different ablations have different arguments.
    """
    changes: list[tuple[str, object]] = [
        *(("removed_layers", layer) for layer in ablation.removed()),
        *(
            (f"removed_{component}", layer)
            for component in ("attention", "mlp", "shared_expert")
            for layer in ablation.removed(component)
        ),
        *((f"{change.intervention}_layers", change.layer) for change in ablation.replaced),
        *((f"removed_{change.component}", change.target) for change in ablation.parts),
        *((f"{change.intervention}_weights", change.target) for change in ablation.rounded),
    ]
    for span in ablation.repeated:
        times = "" if span.repeats == 2 else f"x{span.repeats}"
        changes.append(("repeated_layers", span.target + times))
    values = grouped(changes, lambda change: change[0])
    return {name: "+".join(str(value) for _, value in pairs) for name, pairs in values.items()}


def _typed(args: dict[str, str]) -> list[str]:
    return [f"{name}={value}" for name, value in args.items()]


@dataclass(frozen=True)
class CellPart:
    """A cell's outcomes on one set of documents, and its requested ablations."""

    store: CellStore
    extent: Extent
    ablations: tuple[Ablation, ...]

    @property
    def title(self) -> str:
        """The cell's name in messages."""
        identity = self.store.identity
        model, benchmark = identity.model.name, identity.benchmark
        return f"{model} · {benchmark.title} · {benchmark.num_fewshot}-shot"

    @property
    def together(self) -> str:
        """The key of parts that one lm-eval call can evaluate: model, settings and documents."""
        identity = self.store.identity
        own = {"name", "tasks", "num_fewshot", "primary_metric", "weight_by_size", "found_by"}
        settings = identity.benchmark.model_dump(mode="json", exclude=own)
        settings["seed"] = settings["seed"] or DEFAULT_SEED  # any seed, if nothing is drawn
        model = identity.model.model_dump(mode="json")
        return json.dumps([model, settings, self.extent.model_dump()], sort_keys=True)

    @property
    def tasks(self) -> set[str]:
        """The tasks of its benchmark."""
        return {task.name for task in self.store.identity.benchmark.tasks}

    def outcomes(self) -> dict[Ablation, pd.DataFrame]:
        """Read the measured outcomes of the requested ablations: ablation → rows of documents."""
        frame = self.store.read_documents(self.extent)
        found = dict(iter(frame.groupby("ablation"))) if len(frame) else {}
        return {each: found[each.name] for each in self.ablations if each.name in found}

    def lacks(self, outcomes: Mapping[Ablation, pd.DataFrame]) -> Iterator[str]:
        """Yield a line about ablations with missing documents, for each number of documents."""
        wanted = sum(self.store.counts(self.extent).values())
        short: dict[int, list[str]] = {}
        for ablation in self.ablations:
            if (measured := len(outcomes.get(ablation, ()))) < wanted:
                short.setdefault(measured, []).append(ablation.name)
        for measured, names in short.items():
            shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if names[3:] else "")
            kept = "their files hold these" if measured else "they have no files"
            yield f"{self.title}: {measured} of {wanted} documents are measured of {shown}; {kept}"


@dataclass(frozen=True)
class Written:
    """lm-eval's result files.

    Attributes:
        files: The written files: for each model its results, then the samples of each task.
        notes: Remarks on missing outcomes, and on corpora, which are no lm-eval tasks.
        failed: Cell or folder → error.
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
) -> Written:
    """Write lm-eval's result files of a results folder; failures do not affect other files.

    Args:
        ledger: The results folder.
        output: The output folder, which gets one folder per model, as `lm_eval --output_path`.
        models: The models, by typed or short names; empty for all.
        benchmarks: The benchmarks; empty for all.
        layers: The first layers of the removals; empty for all.
        trust_remote_code: True if code from a model's download may run for its chat template.
        progress: Receives the number of written models.

    Returns:
        The written files.

    Raises:
        RequestError: No cell matches, or `output` is a file.
    """
    if output.exists() and not output.is_dir():
        raise RequestError(f"--output: {output} is a file; name a folder")
    done = Written()
    parts: list[CellPart] = []
    begun: set[int] = set()
    for store in _chosen(ledger.cells(done.failed), models, benchmarks):
        views = [asked.view for asked in store.views.asked(done.failed)]
        begun.update(run.layer for view in views for run in view.runs if not run.is_end)
        found = list(_parts(store, views, layers))
        if found and is_corpus(store.identity.benchmark.name):
            done.notes.append(f"{found[0].title}: a corpus is no task of lm-eval's; it is left out")
        else:
            parts += found
    if not parts and not done.notes:
        raise RequestError("nothing of it is measured yet; tracker run EXPERIMENT.yaml")
    if absent := set(layers) - begun:
        raise RequestError(
            f"--layer: no removal begins at layer {min(absent)}; there is: "
            f"{', '.join(map(str, sorted(begun)))}"
        )
    calls = _calls(parts)
    output.mkdir(parents=True, exist_ok=True)
    with telling(progress, "writing", sum(len(_ablations(call)) for call in calls), "models"):
        for call in calls:
            _write_call(call, output, trust_remote_code, progress, done)
    return done


def _chosen(
    stores: Sequence[CellStore], models: Collection[str], benchmarks: Collection[str]
) -> list[CellStore]:
    """Select the cells of some models and benchmarks; raise RequestError for unknown names."""
    if not stores:
        raise RequestError(
            "there is no finished benchmark yet; tracker run EXPERIMENT.yaml begins one, or goes "
            "on with it"
        )
    typed = {name for store in stores for name in _names(store)}
    known = {store.identity.benchmark.name for store in stores}
    for what, asked, there in (("model", models, typed), ("benchmark", benchmarks, known)):
        for name in asked:
            if name not in there:
                raise RequestError(
                    f"--{what}: nothing of {name!r} is measured.{did_you_mean(name, there)} "
                    f"There is: {', '.join(sorted(there))}"
                )
    chosen = [
        store
        for store in stores
        if _names(store) & set(models or typed)
        and store.identity.benchmark.name in (benchmarks or known)
    ]
    if not chosen:
        raise RequestError("none of these benchmarks is measured for these models; tracker ls")
    return chosen


def _names(store: CellStore) -> set[str]:
    """Return the names of a cell's model: its short name, and the typed one."""
    return {store.identity.model.name, store.identity.model.source}


def _parts(store: CellStore, views: Sequence[View], layers: Collection[int]) -> Iterator[CellPart]:
    """Yield a cell's parts: its views grouped by their documents."""
    for extent in dict.fromkeys(view.extent for view in views):
        ablations = [INTACT]
        for view in [view for view in views if view.extent == extent]:
            wanted = [run for run in view.runs if not layers or run.first in layers]
            ablations.append(Ablation.of(removed=view.removed))
            ablations += [Ablation.of(run, removed=view.removed) for run in wanted]
        yield CellPart(store, extent, tuple(dict.fromkeys(ablations)))


def _calls(parts: Sequence[CellPart]) -> list[list[CellPart]]:
    """Group parts that one lm-eval call could evaluate; no group has a task twice."""
    calls: dict[str, list[list[CellPart]]] = {}
    for part in parts:
        alike = calls.setdefault(part.together, [])
        free = (call for call in alike if not any(part.tasks & other.tasks for other in call))
        if (call := next(free, None)) is None:
            alike.append(call := [])
        call.append(part)
    return [call for alike in calls.values() for call in alike]


def _ablations(call: Sequence[CellPart]) -> list[Ablation]:
    return list(dict.fromkeys(ablation for part in call for ablation in part.ablations))


def _write_call(
    call: Sequence[CellPart], output: Path, trust: bool, progress: Progress, done: Written
) -> None:
    """Write the files of every model of one call."""
    from tracker.benchmarks.results import Questions

    parts: dict[CellPart, LmEvalBenchmark] = {}
    for part in call:
        try:
            parts[part] = _open(part.store)
        except TrackerError as error:
            done.failed[part.title] = str(error)
    ablations = _ablations(call)
    left = len(ablations)
    try:
        if not parts:
            return
        first = next(iter(parts))
        questions = Questions([*parts.values()], first.extent, _encoder(first.store, trust))
        outcomes = {part: part.outcomes() for part in parts}
        done.notes.extend(note for part in parts for note in part.lacks(outcomes[part]))
        since = started([*parts])
        for ablation in ablations:
            frames = [each[ablation] for each in outcomes.values() if ablation in each]
            rows = [row for frame in frames for row in frame.to_dict("records")]
            if rows:
                model = evaluated([*parts], ablation, rows, since)
                done.files.extend(questions.write(model, _known(rows), output))
            left -= 1
            progress.advance(1)
    except TrackerError as error:
        done.failed[", ".join(part.title for part in parts)] = str(error)
    finally:
        progress.advance(left)


def _open(store: CellStore) -> LmEvalBenchmark:
    """Open the benchmark of a cell; raise BenchmarkError if it has changed since measuring."""
    from tracker.benchmarks.tasks import LmEvalBenchmark

    identity = store.identity
    found = LmEvalBenchmark(_request(store))
    if cell_key(identity.model, found.identity) != identity.key:
        raise BenchmarkError(
            f"{identity.benchmark.name} is not what was measured: its documents in "
            f"{identity.benchmark.data}, or the task in the installed lm-eval, have changed. Go "
            "back to those, or measure it again"
        )
    return found


def _request(store: CellStore) -> CellRequest:
    """Rebuild the request of a measured cell, without layers."""
    identity = store.identity
    asked = identity.benchmark
    settings: dict[str, Any] = {
        "model": identity.model.source,
        "benchmark": asked.name,
        "layers": (),
        "seed": DEFAULT_SEED if asked.seed is None else asked.seed,
        "num_fewshot": asked.num_fewshot,
        "apply_chat_template": asked.apply_chat_template,
        "data": asked.data,
        **{name: _SAID.get(value, value) for name, value in asked.settings.items()},
        **asked.found_by,
    }
    return cell_request(**settings)


_SAID = {"true": True, "false": False}


def _encoder(store: CellStore, trust: bool) -> RequestEncoder | None:
    """Build the encoder that applies the chat template, without weights; None if not needed."""
    if not store.identity.benchmark.apply_chat_template:
        return None
    from tracker.benchmarks.encoder import RequestEncoder
    from tracker.models.load import weightless

    model = store.identity.model
    # Of the loading arguments, only the subfolder affects the tokenizer.
    inside = {n: v for n, v in model.arguments.items() if n == "subfolder"}
    arguments = json.dumps(inside) if inside else None
    spec = ModelSpec(model=model.source, revision=model.revision, model_args=arguments)
    model_and_tokenizer = weightless(find_model(spec, trust), "auto")
    return RequestEncoder(*model_and_tokenizer, _request(store).benchmark)


def _known(rows: Sequence[Mapping[Any, Any]]) -> dict[tuple[str, int], Judged]:
    """Convert outcomes of one model to lm-eval's form: document → judged responses."""
    from tracker.benchmarks.results import Judged

    known = {}
    for row in rows:
        metrics = {
            name.removeprefix(METRIC): None if pd.isna(value) else value
            for name, value in row.items()
            if name.startswith(METRIC)
        }
        judged = Judged(row["loglikelihoods"], row["greedy"], row.get("text"), metrics)
        known[row["task"], int(row["doc"])] = judged
    return known
