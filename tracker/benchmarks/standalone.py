"""Write a benchmark as files that plain lm-eval reads, for a process without tracker.

The files include lm-eval's own tasks. They add only the location of the documents, and the existing
splits if the data comes from a folder or a package.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from lm_eval.api.samplers import FirstNSampler

from tracker.benchmarks.corpus import is_corpus
from tracker.benchmarks.factory import SourcedFactory, entries, find_task, shots
from tracker.benchmarks.own import folders
from tracker.benchmarks.parts import choose_part
from tracker.benchmarks.sources import find_data
from tracker.core.config import BenchmarkSpec, CellRequest
from tracker.core.errors import BenchmarkError
from tracker.core.fields import decoded

if TYPE_CHECKING:
    from tracker.benchmarks.private import Entry

_SPLITS = ("test_split", "validation_split", "training_split", "fewshot_split")
BATCH = 8
"""Number of requests that lm-eval scores at a time."""


class _Recording(SourcedFactory):
    """Factory that records the files and overrides from which its tasks are built."""

    def __init__(self, *told: Any) -> None:
        super().__init__(*told)
        self.built: dict[str, tuple[Any, Mapping[str, Any], Any]] = {}

    def _build_task(self, entry: Entry, overrides: dict[str, Any] | None) -> Any:
        task = super()._build_task(entry, overrides)
        self.built[task.config.task] = (entry, overrides or {}, task)
        return task


def refuse_alone(spec: BenchmarkSpec) -> None:
    """Raise BenchmarkError for a benchmark that is not lm-eval's."""
    if is_corpus(spec.benchmark):
        raise BenchmarkError(
            f"{spec.benchmark} is text of yours and no task of lm-eval, by which an export is "
            "proved; name a task, or leave --benchmark out"
        )


def write_tasks(
    request: CellRequest, documents: Mapping[str, Sequence[int]], folder: Path
) -> dict[str, Any]:
    """Write the tasks of a benchmark into a folder, and return the request that scores them.

    Args:
        request: The benchmark with its settings.
        documents: Task → documents to score.
        folder: Folder to create.

    Returns:
        The input of `reference_process.py`.

    Raises:
        BenchmarkError: A task has no file of its own that plain lm-eval could read.
    """
    spec = request.benchmark
    refuse_alone(spec)
    own = folders(spec)
    entry = find_task(spec.benchmark, own)
    metadata = {"pretrained": request.model.model, **decoded(spec.metadata)}
    factory = _Recording(find_data(spec.data), spec.num_fewshot, metadata)
    factory.build(entry, overrides=None, registry=entries(own))
    folder.mkdir(parents=True)
    tasks = {name: built[2] for name, built in factory.built.items() if name in documents}
    for task in tasks.values():
        choose_part(task, request.documents, shots(task.config.num_fewshot, spec.num_fewshot))
    for number, name in enumerate(documents):
        if name not in factory.built or factory.built[name][0].yaml_path is None:
            raise BenchmarkError(
                f"{name} has no YAML file of its own, so plain lm-eval cannot be given its "
                "documents; name another benchmark, or leave --benchmark out"
            )
        stated = _stated(factory, name, folder / f"{number}", request.documents.part is not None)
        text = yaml.safe_dump(stated, sort_keys=False, allow_unicode=True)
        (folder / f"{number}.yaml").write_text(text, encoding="utf-8")
    of_model = {
        "chat_template_args": decoded(spec.chat_template_args) or None,
        "enable_thinking": spec.enable_thinking,
        "think_end_token": spec.think_end_token,
    }
    return {
        "tasks_in": str(folder),
        "metadata": metadata,
        "model": {"batch_size": BATCH, **{n: v for n, v in of_model.items() if v is not None}},
        "evaluate": {"tasks": list(tasks), **_settings(request)},
        **_which(spec, documents, tasks),
    }


def _stated(factory: _Recording, name: str, folder: Path, parted: bool) -> dict[str, Any]:
    """Return the content of a task's file: lm-eval's own, and the location of the documents."""
    entry, overrides, task = factory.built[name]
    stated = {"include": str(Path(entry.yaml_path).absolute()), **overrides, "task": name}
    named = {key: getattr(task.config, key) for key in _SPLITS}
    if parted and task.fewshot_cfg.split is not None:
        named["fewshot_split"] = task.fewshot_cfg.split
    splits = factory.given.get(name)
    if splits is None:
        stated["dataset_kwargs"] = task.config.dataset_kwargs
        return {**stated, **named} if parted else stated
    folder.mkdir()
    files = {s: str(folder / f"{s}.parquet") for s in set(named.values()) if s in splits}
    for split, file in files.items():
        splits[split].to_parquet(file)
    stated |= {"dataset_path": "parquet", "dataset_name": None}
    return {**stated, "dataset_kwargs": {"data_files": files}, **named}


def _settings(request: CellRequest) -> dict[str, Any]:
    """Return lm-eval's settings of the prompts."""
    spec = request.benchmark
    chat = bool(spec.apply_chat_template)
    multiturn = spec.fewshot_as_multiturn
    return {
        "num_fewshot": spec.num_fewshot,
        "fewshot_random_seed": request.documents.seed,
        "system_instruction": spec.system_instruction,
        "apply_chat_template": chat,
        "fewshot_as_multiturn": chat if multiturn is None else multiturn,
        "gen_kwargs": decoded(spec.gen_kwargs) or None,
    }


def _which(
    spec: BenchmarkSpec, documents: Mapping[str, Sequence[int]], tasks: Mapping[str, Any]
) -> dict[str, Any]:
    """Return which documents are scored: the first ones, or each by its number.

    If few-shot examples are drawn document by document (see `LmEvalBenchmark.prompts`), requests of
    all documents before the last wanted one are built, but only the wanted ones are scored.
    """
    wanted = {name: sorted(numbers) for name, numbers in documents.items()}
    first = max(map(len, wanted.values()))
    if all(numbers == list(range(len(numbers))) for numbers in wanted.values()):
        return {"limit": first, "samples": None, "only": None}
    in_turn = any(
        shots(task.config.num_fewshot, spec.num_fewshot)
        and not isinstance(task.sampler, FirstNSampler)
        for task in tasks.values()
    )
    if in_turn:
        last = max(numbers[-1] for numbers in wanted.values())
        return {"limit": last + 1, "samples": None, "only": wanted}
    return {"limit": None, "samples": wanted, "only": None}
