"""lm-eval's result files of what a results folder holds: the intact model, every ablated one."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from tracker.ablations import INTACT, Ablation, ablate, ablation_of
from tracker.arguments import decoded
from tracker.benchmarks.corpus import is_corpus
from tracker.config import CellRequest, cell_request
from tracker.distribution import __version__
from tracker.errors import BenchmarkError, RequestError, TrackerError, did_you_mean
from tracker.extent import DEFAULT_SEED, Extent
from tracker.ledger.cells import CellStore
from tracker.ledger.keys import cell_key
from tracker.ledger.outcomes import METRIC, PROVENANCE
from tracker.ledger.store import Ledger
from tracker.measuring.progress import Progress
from tracker.models.sources import ModelSource, find_model
from tracker.provenance import united
from tracker.records import ModelIdentity, View

if TYPE_CHECKING:
    from tracker.benchmarks.encoder import RequestEncoder
    from tracker.benchmarks.results import Evaluated, Known
    from tracker.benchmarks.tasks import LmEvalBenchmark


@dataclass(frozen=True)
class Written:
    """lm-eval's result files.

    Attributes:
        files: What was written: for each model its results, then the samples of each task.
        notes: What is not measured yet, or is no task of lm-eval's.
        failed: Cell or folder → what went wrong.
    """

    files: list[Path] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class _Part:
    """A cell's outcomes on one set of documents, and the ablations that were asked of it."""

    store: CellStore
    extent: Extent
    ablations: tuple[Ablation, ...]

    @property
    def title(self) -> str:
        """The cell's name in messages."""
        identity = self.store.identity
        model, benchmark = identity.model.name, identity.benchmark
        return f"{model} · {benchmark.name} · {benchmark.num_fewshot}-shot"

    @property
    def together(self) -> str:
        """Tell what one call of lm-eval can evaluate together: model, settings and documents."""
        identity = self.store.identity
        own = {"name", "tasks", "num_fewshot", "primary_metric", "weight_by_size", "found_by"}
        settings = identity.benchmark.model_dump(mode="json", exclude=own)
        settings["seed"] = settings["seed"] or DEFAULT_SEED  # where none is drawn, any will do
        model = identity.model.model_dump(mode="json")
        return json.dumps([model, settings, self.extent.model_dump()], sort_keys=True)

    @property
    def tasks(self) -> set[str]:
        """The tasks of its benchmark."""
        return {task.name for task in self.store.identity.benchmark.tasks}

    def outcomes(self) -> dict[Ablation, pd.DataFrame]:
        """Read what was measured of what was asked: ablation → one row a document."""
        frame = self.store.read_documents(self.extent)
        found = dict(iter(frame.groupby("ablation"))) if len(frame) else {}
        return {each: found[each.name] for each in self.ablations if each.name in found}

    def lacks(self, outcomes: Mapping[Ablation, pd.DataFrame]) -> Iterator[str]:
        """Say under which ablations documents are missing, a line for each number of them."""
        wanted = sum(self.store.counts(self.extent).values())
        short: dict[int, list[str]] = {}
        for ablation in self.ablations:
            if (measured := len(outcomes.get(ablation, ()))) < wanted:
                short.setdefault(measured, []).append(ablation.name)
        for measured, names in short.items():
            shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if names[3:] else "")
            kept = "their files hold these" if measured else "they have no files"
            yield f"{self.title}: {measured} of {wanted} documents are measured of {shown}; {kept}"


def write_result_files(
    ledger: Ledger,
    output: Path,
    models: Collection[str],
    benchmarks: Collection[str],
    layers: Collection[int],
    trust_remote_code: bool,
    progress: Progress,
) -> Written:
    """Write lm-eval's result files of a results folder; what fails leaves the others alone.

    Args:
        ledger: The results folder.
        output: Gets a folder a model, as `lm_eval --output_path`.
        models: Only these models, by what was typed or by their short names; none for all.
        benchmarks: Only these benchmarks; none for all.
        layers: Only removals that begin at these layers; none for all.
        trust_remote_code: Whether code from a model's download may run, to apply its chat template.
        progress: Told how far it is.

    Returns:
        What was written.

    Raises:
        RequestError: No cell is meant, or `output` is a file.
    """
    if output.exists() and not output.is_dir():
        raise RequestError(f"--output: {output} is a file; name a folder")
    done = Written()
    parts: list[_Part] = []
    begun: set[int] = set()
    for store in _chosen(ledger.cells(done.failed), models, benchmarks):
        views = [asked.view for asked in store.views.asked(done.failed)]
        begun.update(run.layer for view in views for run in view.runs)
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
    progress.start("writing", sum(len(_ablations(call)) for call in calls), "models")
    try:
        for call in calls:
            _write_call(call, output, trust_remote_code, progress, done)
    finally:
        progress.finish()
    return done


def _chosen(
    stores: Sequence[CellStore], models: Collection[str], benchmarks: Collection[str]
) -> list[CellStore]:
    """Find the cells of some models and benchmarks; RequestError for a name that is none's."""
    if not stores:
        raise RequestError("there is no measured cell yet; tracker run EXPERIMENT.yaml")
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
        if (not models or _names(store) & set(models))
        and (not benchmarks or store.identity.benchmark.name in benchmarks)
    ]
    if not chosen:
        raise RequestError("none of these benchmarks is measured for these models; tracker ls")
    return chosen


def _names(store: CellStore) -> set[str]:
    """What a cell's model may be called: its short name, and what was typed."""
    return {store.identity.model.name, store.identity.model.source}


def _parts(store: CellStore, views: Sequence[View], layers: Collection[int]) -> Iterator[_Part]:
    """Gather the views of a cell that show the same documents."""
    for extent in dict.fromkeys(view.extent for view in views):
        ablations = [INTACT]
        for view in views:
            if view.extent == extent:
                ablations.append(ablate("layer", view.removed))
                ablations += [
                    ablation_of(run, view.removed)
                    for run in view.runs
                    if not layers or run.layer in layers
                ]
        yield _Part(store, extent, tuple(dict.fromkeys(ablations)))


def _calls(parts: Sequence[_Part]) -> list[list[_Part]]:
    """Put together what one call of lm-eval could have evaluated; no task stands in one twice."""
    calls: dict[str, list[list[_Part]]] = {}
    for part in parts:
        alike = calls.setdefault(part.together, [])
        fitting = (call for call in alike if not any(part.tasks & each.tasks for each in call))
        call = next(fitting, None)
        if call is None:
            alike.append([part])
        else:
            call.append(part)
    return [call for alike in calls.values() for call in alike]


def _ablations(call: Sequence[_Part]) -> list[Ablation]:
    return list(dict.fromkeys(ablation for part in call for ablation in part.ablations))


def _write_call(
    call: Sequence[_Part], output: Path, trust: bool, progress: Progress, done: Written
) -> None:
    """Write the files of every model of one call."""
    from tracker.benchmarks.results import Questions

    parts: dict[_Part, LmEvalBenchmark] = {}
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
        started = _started([*parts])
        for ablation in ablations:
            frames = [each[ablation] for each in outcomes.values() if ablation in each]
            rows = [row for frame in frames for row in frame.to_dict("records")]
            if rows:
                model = _evaluated([*parts], ablation, rows, started)
                done.files.extend(questions.write(model, _known(rows), output))
            left -= 1
            progress.advance(1)
    except TrackerError as error:
        done.failed[", ".join(part.title for part in parts)] = str(error)
    finally:
        progress.advance(left)


def _open(store: CellStore) -> LmEvalBenchmark:
    """Open the benchmark of a cell; BenchmarkError where it is not the one that was measured."""
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
    """Ask again for what was measured."""
    identity = store.identity
    asked = identity.benchmark
    settings: dict[str, Any] = {
        "model": identity.model.source,
        "benchmark": asked.name,
        "layers": (),
        "num_fewshot": asked.num_fewshot,
        "seed": DEFAULT_SEED if asked.seed is None else asked.seed,
        "apply_chat_template": asked.apply_chat_template,
        "data": asked.data,
        **{name: _SAID.get(value, value) for name, value in asked.settings.items()},
        **asked.found_by,
    }
    return cell_request(**settings)


_SAID = {"true": True, "false": False}


def _encoder(store: CellStore, trust: bool) -> RequestEncoder | None:
    """Make what applies the chat template, with the tokenizer alone; None where there is none."""
    if not store.identity.benchmark.apply_chat_template:
        return None
    from tracker.benchmarks.encoder import RequestEncoder
    from tracker.models.load import weightless

    source = _source(store.identity.model)
    return RequestEncoder(*weightless(source, "auto", trust), _request(store))


def _source(model: ModelIdentity) -> ModelSource:
    """Find a measured model's folder; of how it was loaded only that decides the tokenizer."""
    inside = {n: v for n, v in model.arguments.items() if n == "subfolder"}
    return find_model(model.source, model.revision, json.dumps(inside) if inside else None)


def _known(rows: Sequence[Mapping[Any, Any]]) -> dict[tuple[str, int], Known]:
    """Turn outcomes of one model into what lm-eval asks for: document → answers."""
    from tracker.benchmarks.results import Known

    metrics = {name for row in rows for name in row if name.startswith(METRIC)}
    return {
        (row["task"], int(row["doc"])): Known(
            row["loglikelihoods"],
            row["greedy"],
            row.get("text"),
            {
                name.removeprefix(METRIC): None if pd.isna(row[name]) else row[name]
                for name in metrics & row.keys()
            },
        )
        for row in rows
    }


def _started(parts: Sequence[_Part]) -> float | None:
    """Say when the first outcomes were written, in seconds since 1970; None where none says."""
    about = [
        shard.about.get("measured")
        for part in parts
        for path in part.store.shards()
        if (shard := part.store.shard(path, ["task", "doc"])) is not None
    ]
    return min((datetime.fromisoformat(said).timestamp() for said in about if said), default=None)


def _evaluated(
    parts: Sequence[_Part],
    ablation: Ablation,
    rows: Sequence[Mapping[Any, Any]],
    started: float | None,
) -> Evaluated:
    """Say in lm-eval's words which model it was; what is not known is None."""
    from tracker.benchmarks.results import BOOTSTRAP_ITERS, Evaluated

    identities = [part.store.identity for part in parts]
    model = identities[0].model
    extent = parts[0].extent
    said = identities[0].benchmark.settings
    removed = removed_args(ablation)
    stack = united([json.loads(one) for one in sorted({row[PROVENANCE] for row in rows})])
    config: dict[str, Any] = {
        "model_num_parameters": model.parameters if ablation == INTACT else None,
        "model_dtype": f"torch.{model.dtype}",
        "model_revision": model.revision,
        "model_sha": model.revision,
        "batch_size": None,
        "batch_sizes": [],
        "device": stack.get("device"),
        "use_cache": None,
        "limit": extent.limit,
        "bootstrap_iters": BOOTSTRAP_ITERS,
        "gen_kwargs": decoded(said.get("gen_kwargs")) or None,
        "random_seed": None,
        "numpy_seed": None,
        "torch_seed": None,
        "fewshot_seed": next((i.benchmark.seed for i in identities if i.benchmark.seed), None),
        "tracker": {
            "version": __version__,
            "ablation": ablation.name,
            "cells": {
                part.store.identity.benchmark.name: part.store.identity.key for part in parts
            },
            "settings": said,
            "sample": extent.sample,
            "sample_seed": None if extent.sample is None else extent.seed,
            "provenance": stack,
        },
    }
    versions = {
        "git_hash": None,
        "date": started,
        "pretty_env_info": None,
        "transformers_version": stack.get("transformers"),
        "lm_eval_version": stack.get("lm-eval"),
        "upper_git_hash": None,
    }
    thinking = {n: v for n, v in said.items() if n in ("enable_thinking", "think_end_token")}
    return Evaluated(
        name=",".join((model.arguments.get("peft", model.source), *_typed(removed))),
        model_args=",".join(_typed(model_args(model) | thinking | removed)),
        system_instruction=said.get("system_instruction"),
        fewshot_as_multiturn=said.get("fewshot_as_multiturn") != "false",
        config=config,
        versions=versions,
    )


def model_args(model: ModelIdentity) -> dict[str, str]:
    """Say which weights were measured, as `lm_eval --model_args` takes it."""
    args = {"pretrained": model.source}
    if model.source.endswith(".gguf"):
        path = Path(model.source)
        args = {"pretrained": str(path.parent), "gguf_file": path.name}
    if model.revision is not None:
        args["revision"] = model.revision
    return {**args, "dtype": model.dtype, **model.arguments}


def removed_args(ablation: Ablation) -> dict[str, str]:
    """Say what an ablation removes, in one word each: a comma ends an argument."""
    removed = {
        "removed_layers": ablation.layers,
        "removed_attention": ablation.attention,
        "removed_mlp": ablation.mlp,
    }
    return {name: "+".join(map(str, layers)) for name, layers in removed.items() if layers}


def _typed(args: dict[str, str]) -> list[str]:
    return [f"{name}={value}" for name, value in args.items()]
