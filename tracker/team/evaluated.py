"""Which model lm-eval's result files are of, in lm-eval's words."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from tracker.core.ablations import INTACT, Ablation
from tracker.core.arguments import decoded
from tracker.core.distribution import __version__
from tracker.core.extent import DEFAULT_SEED, Extent
from tracker.core.identities import ModelIdentity
from tracker.core.provenance import united
from tracker.ledger.cells import CellStore
from tracker.ledger.outcomes import PROVENANCE

if TYPE_CHECKING:
    from tracker.benchmarks.results import Evaluated


def started(parts: Sequence[Part]) -> float | None:
    """Say when the first outcomes were written, in seconds since 1970; None where none says."""
    names = ["task", "doc"]
    shards = [part.store.shard(path, names) for part in parts for path in part.store.shards()]
    times = [shard.about.get("measured") for shard in shards if shard is not None]
    return min((datetime.fromisoformat(at).timestamp() for at in times if at), default=None)


def evaluated(
    parts: Sequence[Part],
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
    changed = changed_args(ablation)
    stack = united([json.loads(one) for one in sorted({row[PROVENANCE] for row in rows})])
    config: dict[str, Any] = {
        "model_num_parameters": model.parameters if ablation == INTACT else None,
        "model_dtype": f"torch.{model.dtype}",
        "model_revision": model.revision,
        "model_sha": model.revision,
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
    thinking = {n: v for n, v in said.items() if n in ("enable_thinking", "think_end_token")}
    return Evaluated(
        name=",".join((model.arguments.get("peft", model.source), *_typed(changed))),
        model_args=",".join(_typed(model_args(model) | thinking | changed)),
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


def changed_args(ablation: Ablation) -> dict[str, str]:
    """Say what an ablation does, in one word each: a comma ends an argument."""
    removed = {
        "removed_layers": ablation.layers,
        "removed_attention": ablation.attention,
        "removed_mlp": ablation.mlp,
    }
    args = {name: "+".join(map(str, layers)) for name, layers in removed.items() if layers}
    return args | {f"{done}_layers": str(layer) for done, layer in ablation.replaced}


def _typed(args: dict[str, str]) -> list[str]:
    return [f"{name}={value}" for name, value in args.items()]


@dataclass(frozen=True)
class Part:
    """A cell's outcomes on one set of documents, and the ablations that were asked of it."""

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
