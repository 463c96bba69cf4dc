"""Open the benchmark that a request names.

The module imports lm-eval only if the benchmark needs it.
"""

from __future__ import annotations

import re
from functools import cache

from tracker.benchmarks.base import Benchmark
from tracker.benchmarks.corpus import Corpus, corpus_stamp, locate_corpus
from tracker.benchmarks.own import check_own_tasks, own_tasks_stamp, reads_local_files
from tracker.benchmarks.sources import HUB, open_data_source
from tracker.schema.config import (
    BenchmarkSpec,
    CellRequest,
    generation_spec,
    names_corpus,
    names_traces,
)
from tracker.schema.distribution import package_folder
from tracker.schema.errors import BenchmarkError, did_you_mean
from tracker.schema.identities import BenchmarkIdentity
from tracker.stats.accuracy import RATIO_SCALES


def open_benchmark(request: CellRequest) -> Benchmark:
    """Open the benchmark that a request names.

    The benchmark is a text corpus, the texts (traces) that a model generates for a task, a task of
    lm-eval, or a group of tasks.

    Raises BenchmarkError if the benchmark or its data cannot be found or read.
    """
    if names_corpus(request.benchmark.benchmark):
        return Corpus(request)
    from tracker.benchmarks.tasks import LmEvalBenchmark
    from tracker.benchmarks.traces import Traces

    is_read = names_traces(request.benchmark.benchmark)
    return Traces(request) if is_read else LmEvalBenchmark(request)


def check_benchmark(spec: BenchmarkSpec) -> None:
    """Raise BenchmarkError if a data source, task or file does not exist."""
    open_data_source(spec.data)
    spec = generation_spec(spec)
    if names_corpus(spec.benchmark):
        locate_corpus(spec)
    elif not (check_own_tasks(spec) or _is_defined(spec.benchmark)):
        from tracker.benchmarks.factory import find_task

        find_task(spec)


def is_local(spec: BenchmarkSpec) -> bool:
    """Return whether all documents of a benchmark are on this machine."""
    if spec.data != HUB:
        return True
    spec = generation_spec(spec)
    if names_corpus(spec.benchmark):
        return locate_corpus(spec).file is not None
    return reads_local_files(spec)


@cache
def _is_defined(name: str) -> bool:
    """Return whether a YAML file of lm-eval defines a task, group or tag."""
    key, value = "[\"']?(task|group|tag)[\"']?", f"[\"']?{re.escape(name)}[\"']?"
    pattern = re.compile(f"^{key}: *{value} *$".encode(), re.M)
    folder = package_folder("lm_eval")
    paths = (folder / "tasks").rglob("*.yaml") if folder else ()
    likely_first = sorted(paths, key=lambda path: path.name != f"{name}.yaml")
    return any(pattern.search(path.read_bytes()) for path in likely_first)


def data_stamp(spec: BenchmarkSpec) -> object:
    """Return a value that changes if a benchmark's data changes.

    Returns None for data on the hub. Raises BenchmarkError if the data source is unknown.
    """
    spec = generation_spec(spec)
    if names_corpus(spec.benchmark):
        return corpus_stamp(spec)
    source_stamp, tasks_stamp = open_data_source(spec.data).stamp(), own_tasks_stamp(spec)
    return source_stamp if tasks_stamp is None else [source_stamp, tasks_stamp]


def choose_metric(benchmark: BenchmarkIdentity, requested: str | None) -> str:
    """Return the name of the metric that the results report as `accuracy`.

    Args:
        benchmark: Benchmark whose tasks must all define the metric.
        requested: Name of the metric; None for the benchmark's primary metric.

    Returns:
        The name of the metric.

    Raises:
        BenchmarkError: A task lacks the metric, or the metric cannot be used.
    """
    metric = requested or benchmark.primary_metric
    for task in benchmark.tasks:
        metrics = task.all_metrics
        if metric not in metrics:
            hint, names = did_you_mean(metric, metrics), ", ".join(metrics)
            raise BenchmarkError(f"{task.name} has no metric {metric!r}.{hint} It has: {names}.")
        usable = [name for name, kind in metrics.items() if kind in ("mean", *RATIO_SCALES)]
        if metric not in usable:
            advice = f"choose {' or '.join(usable)}" if usable else "choose another task"
            raise BenchmarkError(
                f"{metric!r} of {task.name} is computed over all documents at once "
                f"({metrics[metric]}), so no drop per document exists; {advice}"
            )
    return metric
