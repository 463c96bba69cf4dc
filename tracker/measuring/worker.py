"""Load models and measure their ablations on benchmarks.

A worker runs in this process or in a separate process.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace

from tracker.benchmarks.base import Benchmark
from tracker.benchmarks.benchmark import open_benchmark
from tracker.ledger.cache import Checks
from tracker.measuring.job import Options
from tracker.measuring.meter import Advance, CellFacts, Measurement, Meter, Model, open_model
from tracker.schema.config import CellRequest, ModelSpec
from tracker.schema.errors import CellError, ModelError, first_line, translate_errors


class DeviceLostError(CellError):
    """Error for an accelerator that this process can no longer use."""


def _device_lost_error(error: Exception) -> DeviceLostError | None:
    from tracker.engine.refusal import is_device_lost

    return DeviceLostError(first_line(error)) if is_device_lost(error) else None


class Worker:
    """Worker that measures one model on one benchmark at a time, and reuses a loaded model.

    Args:
        options: The options of the run.

    Attributes:
        models_loaded: Number of times that a model was loaded.
    """

    def __init__(self, options: Options) -> None:
        self.models_loaded = 0
        self._options = options
        self._model: Model | None = None
        self._meter: Meter | None = None

    def has_loaded(self, spec: ModelSpec) -> bool:
        """Return whether the model of a specification is loaded."""
        return self._model is not None and self._model.spec == spec

    @translate_errors(_device_lost_error)
    def open(
        self, requests: Sequence[CellRequest], benchmark: Benchmark | None = None
    ) -> CellFacts:
        """Load the model and the benchmark that the requests name.

        Args:
            requests: Requests that differ only in their ablations.
            benchmark: The opened benchmark; None if the benchmark is not open yet.

        Returns:
            Facts about the model, the benchmark and the ablations.

        Raises:
            RequestError: The model or the data is missing, or the model lacks a requested layer.
        """
        self._meter, request = None, requests[0]
        if is_fresh := not self.has_loaded(request.model):
            self._model = None  # frees the previous model before the next model is loaded
            self._model = open_model(request.model, self._options)
            self.models_loaded += 1
        assert self._model is not None
        benchmark = benchmark or open_benchmark(request)
        self._meter = Meter(requests, benchmark, self._model, self._options)
        return replace(self._meter.facts, is_fresh=is_fresh)

    @translate_errors(_device_lost_error)
    def check(self, checks: Checks | None) -> list[str]:
        """Compare the opened cell's results with pruned models; return notes for the user."""
        assert self._meter is not None, "open() comes first"
        return self._meter.check(checks)

    @translate_errors(_device_lost_error)
    def measure(
        self,
        task: str,
        names: Sequence[str],
        documents: Sequence[int],
        traces: Mapping[int, Sequence[str]],
        advance: Advance = lambda responses: None,
    ) -> Measurement:
        """Measure documents of one task of the opened benchmark.

        Args:
            task: Name of the task.
            names: Names of the ablations under which the documents are measured.
            documents: Positions of the documents in the task's split.
            traces: Position of a document → stored texts of the intact model.
            advance: Function that is called with the number of new responses.

        Returns:
            The outcomes of the documents.
        """
        assert self._meter is not None, "open() comes first"
        return self._meter.measure(task, names, documents, traces, advance)


_VARIABLE_PREFIXES = ("HF_", "TRANSFORMERS_", "TOKENIZERS_", "TQDM_")


def environment() -> dict[str, str]:
    """Return the environment variables of this process that affect models and data."""
    return {
        name: value for name, value in os.environ.items() if name.startswith(_VARIABLE_PREFIXES)
    }


class RemoteWorker(Worker):
    """Worker that runs in a separate process.

    Args:
        options: The options of the run.
        folder: Working folder of the driver process; relative paths refer to it.
        variables: Environment variables of the driver process.
        workers: Number of workers that share the memory of this machine.

    Raises:
        ModelError: Some of the worker's accelerators are missing.
    """

    def __init__(
        self, options: Options, folder: str, variables: Mapping[str, str], workers: int
    ) -> None:
        # The variables are set first, because libraries read them when they are imported.
        os.environ.update(variables)
        with suppress(OSError):  # without this folder, absolute paths still work
            os.chdir(folder)
        from tracker.models.devices import share_memory

        super().__init__(options)
        _refuse_missing_devices(options.device)
        share_memory(workers)

    def ready(self) -> None:
        """Do nothing.

        When a call of this method from another process returns, the worker process is ready.
        """


def _refuse_missing_devices(device: str) -> None:
    """Raise ModelError if some of the worker's accelerators are missing."""
    from tracker.models.devices import accelerators, visible_variable
    from tracker.models.load import SPREAD, find_device

    find_device(device)
    names, count = os.environ.get(visible_variable()), len(accelerators())
    if device == SPREAD and names and count < len(names.split(",")):
        raise ModelError(
            f"--device spread needs all of the accelerators {names}; only {count} are available"
        )
