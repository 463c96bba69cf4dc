"""Define the keyword arguments of the Python API for type checkers and editors.

Many keyword arguments have the same names as the keys of experiment files.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal, TypeAlias, TypedDict, TypeVar

from tracker.measuring.progress import Progress
from tracker.schema.extent import DocumentPart
from tracker.schema.fields import Dtype
from tracker.schema.kinds import Component, Intervention
from tracker.schema.prune_records import Rescoring
from tracker.tracking.runs import RunSelection

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Where: TypeAlias = str | os.PathLike[str]
"""A file or a folder."""
T = TypeVar("T")
Values: TypeAlias = T | Sequence[T] | Mapping[str, object]
"""A value, a list of values, or a range or list as in files: `{"min": 0, "max": 9}`."""
Arguments: TypeAlias = str | Mapping[str, object]
"""Settings of a library, as a mapping or as lm-eval writes them: `peft=ADAPTER,dtype=float32`."""
Constraint: TypeAlias = str | Sequence[int | str] | Mapping[str, object]
"""Layers, or kinds of layers: `0,1,last`."""


class WorkKeywords(TypedDict, total=False):
    """Keyword arguments of all functions that load a model.

    Attributes:
        results: The results folder; default: `results`.
        device: `auto` (an accelerator if there is one, otherwise the CPU; the default), a torch
            device, `spread` (one model over all accelerators), or `all` (one worker process on each
            accelerator).
        trust_remote_code: True to run code and pickles from downloaded models and data; default:
            False.
        memory: Maximum number of bytes for hidden states, keys and values; None = half of the free
            memory.
        weights: Maximum number of bytes for a model's weights on the device; None = as many as fit.
        progress: Object that receives progress counts and messages; None for no output. By default,
            a progress bar is shown in notebooks only.
    """

    results: Where
    device: str
    trust_remote_code: bool
    memory: int | None
    weights: int | None
    progress: Progress | None


class RunKeywords(WorkKeywords, total=False):
    """Keyword arguments for measuring models and publishing runs to tracking backends.

    Attributes:
        track: One tracking backend or a list of them, each as `BACKEND` or `BACKEND:PROJECT`;
            `none` for no backend. The default None means W&B in a trial of a W&B sweep, and MLflow
            otherwise.
        publish_documents: True to publish also the texts of documents from a local folder or
            corpus. By default (False), only texts from the Hugging Face hub or a package are
            published.
        runs: Selection of the published runs. `cells` publishes one run per model and benchmark,
            with a table of all ablations. `all` adds one run per ablation. `auto` (the default) is
            like `all`, but kinds of ablations (e.g. heads) with more than 200 ablations get no
            separate runs.
        workers: Number of parallel processes; None = only the calling process.
        devices_per_worker: Number of accelerators of each worker process; None = as many as the
            weights need.
    """

    track: str | Sequence[str] | None
    publish_documents: bool
    runs: RunSelection
    workers: int | None
    devices_per_worker: int | None


class BenchmarkKeywords(TypedDict, total=False):
    """Keys of an experiment file that select a model's weights and a benchmark's documents."""

    revision: Values[str | None]
    dtype: Values[Dtype]
    num_fewshot: Values[int | None]
    part: Values[DocumentPart | None]
    limit: Values[int | None]
    sample: Values[int | None]
    until: Values[str | None]
    metric: Values[str | None]
    seed: Values[int]
    data: Values[Where]
    model_args: Values[Arguments | None]
    include_path: Values[Where]
    system_instruction: Values[str | None]
    apply_chat_template: Values[bool | str]
    fewshot_as_multiturn: Values[bool | None]
    chat_template_args: Values[Arguments | None]
    enable_thinking: Values[bool | None]
    think_end_token: Values[int | str | None]
    gen_kwargs: Values[Arguments | None]
    samples: Values[int | None]
    budgets: Values[str | int | Sequence[int]]
    metadata: Values[Arguments | None]


class FileKeywords(BenchmarkKeywords, total=False):
    """All keys of an experiment file; most keys accept a value or a list of values."""

    model: Values[Where] | PreTrainedModel
    benchmark: Values[str]
    layer: Values[int | Literal["all"]]
    component: Values[Component]
    span: Values[int]
    intervention: Values[Intervention]
    head: Values[int]
    expert: Values[int]
    neuron: Values[int]
    map: Values[str]
    repeats: Values[int]
    control: Values[Literal["random"] | None]
    removed: Values[Sequence[int]] | Sequence[int]
    cluster: Values[str | None]
    observe: Values[Literal["kl"] | None]
    method: Literal["grid"]
    command: list[str]
    program: str | None
    name: str | None
    description: str | None
    project: str
    entity: str | None
    run_cap: int | None


class SearchKeywords(FileKeywords, total=False):
    """Keys of an experiment file for `prune`, which searches for layers to remove."""

    strategy: Values[str]
    remove: Values[int | str]
    keep: Values[int | str]
    max_drop: Values[str | None]
    keep_accuracy: Values[str | None]
    unit: Values[str]
    protect: Constraint
    among: Constraint
    at_least: Arguments | None
    uniform: bool
    calibrate: Values[str]
    test_sample: Values[int | None]
    rescoring: Values[Rescoring]
    draws: Values[int]


class ExperimentKeywords(RunKeywords, FileKeywords, total=False):
    """Keyword arguments of the functions `run` and `quantise`."""


class PruneKeywords(RunKeywords, SearchKeywords, total=False):
    """Keyword arguments of the function `prune`, which searches for layers to remove."""


class StudyKeywords(ExperimentKeywords, total=False):
    """Keyword arguments of the function `study`: those of `run`, and settings of studies."""

    reliability: float
    remove: Sequence[str]
    strategy: Sequence[str]
    text: Where | None
    test_sample: int | None
    budget: str | None
    max_drop: str | None
    keep_accuracy: str | None
    format: str | Sequence[str]
    by: Literal["map", "layer"]
    tie: Literal["fused", "none"]
    embeddings: bool
    refine: int
    pairs: int
    questions: Sequence[str]
    draws: int
    epsilon: Sequence[float]


class ExportKeywords(WorkKeywords, BenchmarkKeywords, total=False):
    """Keyword arguments of the function `export`, which saves a changed model."""
