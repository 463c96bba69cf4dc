"""Open the benchmark of a request; each kind is imported only when it is used."""

from __future__ import annotations

import os
import re
from functools import cache
from pathlib import Path

from tracker.benchmarks.base import Benchmark
from tracker.benchmarks.corpus import Corpus, corpus_stamp, is_corpus, locate
from tracker.benchmarks.own import check_own, folders, own_stamp, reads_files
from tracker.benchmarks.sources import HUB, find_data
from tracker.core.config import BenchmarkSpec, CellRequest
from tracker.core.distribution import package_folder
from tracker.core.errors import BenchmarkError, did_you_mean
from tracker.core.identities import BenchmarkIdentity
from tracker.stats.accuracy import SCALES


def open_benchmark(request: CellRequest) -> Benchmark:
    """Open the corpus, or lm-eval's task or group, of a request.

    Raises BenchmarkError if the benchmark or its data cannot be found or read.
    """
    if is_corpus(request.benchmark.benchmark):
        return Corpus(request)
    from tracker.benchmarks.tasks import LmEvalBenchmark

    return LmEvalBenchmark(request)


def check_benchmark(spec: BenchmarkSpec) -> None:
    """Raise BenchmarkError for a source, task or file that does not exist; read no documents."""
    find_data(spec.data)
    if is_corpus(spec.benchmark):
        locate(spec)
        return
    if check_own(spec) or _is_stated(spec.benchmark):
        return
    from tracker.benchmarks.factory import find_task

    find_task(spec.benchmark, folders(spec))


def is_local(spec: BenchmarkSpec) -> bool:
    """Return whether a benchmark's documents are on this machine, so that opening it is offline."""
    if spec.data != HUB:
        return True
    if is_corpus(spec.benchmark):
        return locate(spec).file is not None
    return reads_files(spec)


@cache
def _is_stated(name: str) -> bool:
    """Return whether one of lm-eval's files names a task, without loading the index (4 s).

    A file with this name is searched first, of thousands.
    """
    key, value = "[\"']?(task|group|tag)[\"']?", f"[\"']?{re.escape(name)}[\"']?"
    stated = re.compile(f"^{key}: *{value} *$".encode(), re.M)
    folder = package_folder("lm_eval")
    places = os.walk(folder / "tasks") if folder else ()
    files = [(place, each) for place, _, names in places for each in names]
    files.sort(key=lambda file: file[1] != f"{name}.yaml")
    some = (Path(*file) for file in files if file[1].endswith(".yaml"))
    return any(stated.search(path.read_bytes()) for path in some)


def data_stamp(spec: BenchmarkSpec) -> object:
    """Return a cheap stamp of a benchmark's data: equal stamps mean equal data.

    None for the hub, whose data is not on this machine. BenchmarkError for an unknown source.
    """
    if is_corpus(spec.benchmark):
        return corpus_stamp(spec)
    data, own = find_data(spec.data).stamp(), own_stamp(spec)
    return data if own is None else [data, own]


def chosen_metric(benchmark: BenchmarkIdentity, asked: str | None) -> str:
    """Choose the metric behind every `accuracy` of a cell.

    Args:
        benchmark: Benchmark that must have the metric in every task.
        asked: Metric of the experiment file; None = the benchmark's primary metric.

    Returns:
        The metric's name.

    Raises:
        BenchmarkError: A task of the benchmark lacks the metric, or the metric is neither a mean
            over documents nor a ratio of sums over them.
    """
    metric = asked or benchmark.primary_metric
    for task in benchmark.tasks:
        if metric not in task.metrics:
            near, known = did_you_mean(metric, task.metrics), ", ".join(task.metrics)
            raise BenchmarkError(f"{task.name} has no metric {metric!r}.{near} It has: {known}.")
        fit = [name for name, how in task.metrics.items() if how == "mean" or how in SCALES]
        if metric not in fit:
            instead = f"choose {' or '.join(fit)}" if fit else "it has no metric that gives one"
            raise BenchmarkError(
                f"{metric!r} of {task.name} is computed over all documents at once "
                f"({task.metrics[metric]}), so no paired drop can be given; {instead}"
            )
    return metric
