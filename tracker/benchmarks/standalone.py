"""Write a benchmark as task files that plain lm-eval reads without tracker.

A written file includes lm-eval's own task file and adds the location of the documents. If the data
comes from a folder or a package, the written file also states the names of the splits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from tracker.benchmarks.factory import (
    SourcedFactory,
    draws_in_turn,
    find_task,
    resolve_num_fewshot,
    task_entries,
)
from tracker.benchmarks.parts import choose_part
from tracker.benchmarks.sources import open_data_source
from tracker.schema.config import (
    BenchmarkSpec,
    CellRequest,
    generation_spec,
    names_corpus,
    names_traces,
)
from tracker.schema.documents import samples_texts
from tracker.schema.errors import BenchmarkError
from tracker.schema.fields import decode_arguments

if TYPE_CHECKING:
    from tracker.benchmarks.private import Entry

_SPLITS = ("test_split", "validation_split", "training_split", "fewshot_split")
REFERENCE_BATCH_SIZE = 8
"""Batch size: the number of requests that lm-eval scores at a time."""


class _RecordingFactory(SourcedFactory):
    """Task factory that records the entry and the settings of each built task."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.built: dict[str, tuple[Any, Mapping[str, Any], Any]] = {}

    def _build_task(self, entry: Entry, overrides: dict[str, Any] | None) -> Any:
        task = super()._build_task(entry, overrides)
        self.built[task.config.task] = (entry, overrides or {}, task)
        return task


def refuse_corpus(spec: BenchmarkSpec) -> None:
    """Raise BenchmarkError for a text corpus or traces, which plain lm-eval cannot read."""
    if names_traces(spec.benchmark):
        task = generation_spec(spec)
        raise BenchmarkError(
            f"{spec.benchmark} reads texts that the intact model wrote, but an export is verified "
            f"with a task of lm-eval; write --benchmark {task}, or leave --benchmark out"
        )
    if names_corpus(spec.benchmark):
        raise BenchmarkError(
            f"{spec.benchmark} is your own text, but an export is verified with a task of lm-eval; "
            "name a task, or leave --benchmark out"
        )


def write_tasks(
    request: CellRequest, documents: Mapping[str, Sequence[int]], folder: Path
) -> dict[str, Any]:
    """Write a benchmark as task files, and return a request to score them with lm-eval.

    Args:
        request: Request with the benchmark and its settings.
        documents: Numbers of the documents to score, by task.
        folder: Folder to create.

    Returns:
        The request that `reference_process.py` reads.

    Raises:
        BenchmarkError: A task has no task file that plain lm-eval could read.
    """
    spec = request.benchmark
    refuse_corpus(spec)
    metadata = {"pretrained": request.model.model, **decode_arguments(spec.metadata)}
    factory = _RecordingFactory(open_data_source(spec.data), spec.num_fewshot, metadata)
    factory.build(find_task(spec), overrides=None, registry=task_entries(spec))
    folder.mkdir(parents=True)
    built_tasks = {name: task for name, task in factory.built.items() if name in documents}
    from_first = False
    for _, _, task in built_tasks.values():
        num_fewshot = resolve_num_fewshot(task.config.num_fewshot, spec.num_fewshot)
        choose_part(task, request.documents, num_fewshot)
        from_first = from_first or draws_in_turn(task, num_fewshot)
    for number, name in enumerate(documents):
        if name not in built_tasks or built_tasks[name][0].yaml_path is None:
            raise BenchmarkError(
                f"{name} has no YAML file of its own, so plain lm-eval cannot run it on the same "
                "documents; name another benchmark, or leave --benchmark out"
            )
        own_settings = built_tasks[name][2].config.generation_kwargs or {}
        if samples_texts({**own_settings, **decode_arguments(spec.gen_kwargs)}):
            raise BenchmarkError(
                f"{name} samples its texts, and plain lm-eval would sample different texts; name a "
                "benchmark with greedy decoding, or leave --benchmark out"
            )
        has_part = request.documents.part is not None
        content = _build_task_content(factory, name, folder / f"{number}", has_part)
        text = yaml.safe_dump(content, sort_keys=False, allow_unicode=True)
        (folder / f"{number}.yaml").write_text(text, encoding="utf-8")
    model_settings = {
        "batch_size": REFERENCE_BATCH_SIZE,
        "chat_template_args": decode_arguments(spec.chat_template_args) or None,
        "enable_thinking": spec.enable_thinking,
        "think_end_token": spec.think_end_token,
    }
    return {
        "tasks_in": str(folder),
        "metadata": metadata,
        "model": {name: value for name, value in model_settings.items() if value is not None},
        "data_sets": [task.config.dataset_path for _, _, task in built_tasks.values()],
        "evaluate": {"tasks": list(built_tasks), **_prompt_settings(request)},
        **_selection_settings(documents, from_first),
    }


def _build_task_content(
    factory: _RecordingFactory, name: str, folder: Path, has_part: bool
) -> dict[str, Any]:
    """Build the content of a task file, and write the task's documents to `folder`.

    Documents from the hub are not written. `has_part` is true if only calibration documents or only
    test documents are scored.
    """
    entry, overrides, task = factory.built[name]
    content = {"include": str(Path(entry.yaml_path).absolute()), **overrides, "task": name}
    split_names = {key: getattr(task.config, key) for key in _SPLITS}
    if has_part and task.fewshot_cfg.split is not None:
        split_names["fewshot_split"] = task.fewshot_cfg.split
    splits = factory.given_splits.get(name)
    if splits is None:
        content["dataset_kwargs"] = task.config.dataset_kwargs
        return {**content, **split_names} if has_part else content
    folder.mkdir()
    files = {s: str(folder / f"{s}.parquet") for s in set(split_names.values()) if s in splits}
    for split, file in files.items():
        splits[split].to_parquet(file)
    content |= {"dataset_path": "parquet", "dataset_name": None}
    return {**content, "dataset_kwargs": {"data_files": files}, **split_names}


def _prompt_settings(request: CellRequest) -> dict[str, Any]:
    """Return lm-eval's settings that determine the prompts."""
    spec, chat = request.benchmark, bool(request.benchmark.apply_chat_template)
    return {
        "num_fewshot": spec.num_fewshot,
        "fewshot_random_seed": request.documents.seed,
        "system_instruction": spec.system_instruction,
        "apply_chat_template": chat,
        "fewshot_as_multiturn": (
            chat if spec.fewshot_as_multiturn is None else spec.fewshot_as_multiturn
        ),
        "gen_kwargs": decode_arguments(spec.gen_kwargs) or None,
    }


def _selection_settings(documents: Mapping[str, Sequence[int]], from_first: bool) -> dict[str, Any]:
    """Return settings with which lm-eval scores only the given documents.

    If `from_first` is true, lm-eval also builds the requests of all earlier documents, without
    scoring them. Random few-shot examples can depend on earlier documents.
    """
    numbers_by_task = {name: sorted(numbers) for name, numbers in documents.items()}
    limit = max(map(len, numbers_by_task.values()))
    if all(numbers == list(range(len(numbers))) for numbers in numbers_by_task.values()):
        return {"limit": limit, "samples": None, "only": None}
    if from_first:
        limit = max(numbers[-1] for numbers in numbers_by_task.values()) + 1
        return {"limit": limit, "samples": None, "only": numbers_by_task}
    return {"limit": None, "samples": numbers_by_task, "only": None}
