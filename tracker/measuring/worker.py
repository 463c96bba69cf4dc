"""Hold a loaded model and its cell, in this process or in one of its own."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import wraps
from typing import ParamSpec, TypeVar

from tracker.benchmarks.base import Benchmark
from tracker.benchmarks.benchmark import open_benchmark
from tracker.core.config import CellRequest, ModelSpec
from tracker.core.errors import CellError, ModelError, first_line, translate_errors
from tracker.ledger.cache import Checks
from tracker.measuring.job import Options
from tracker.measuring.meter import Advance, Facts, Measured, Meter, Model, open_model

P = ParamSpec("P")
T = TypeVar("T")


class DeviceLostError(CellError):
    """The device cannot be used by this process any more."""


def _raises_device_lost(method: Callable[P, T]) -> Callable[P, T]:
    """Wrap a method so that it raises DeviceLostError if its device is lost."""

    @wraps(method)
    def call(*arguments: P.args, **named: P.kwargs) -> T:
        with translate_errors(_lost_device):
            return method(*arguments, **named)

    return call


def _lost_device(error: Exception) -> DeviceLostError | None:
    from tracker.engine.refusal import device_is_lost

    return DeviceLostError(first_line(error)) if device_is_lost(error) else None


class Worker:
    """Measures documents of one cell at a time, and loads a model only if it is another one.

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
        """Check whether a model is the loaded one."""
        return self._model is not None and self._model.spec == spec

    @_raises_device_lost
    def open(self, requests: Sequence[CellRequest], benchmark: Benchmark | None = None) -> Facts:
        """Prepare a cell for measuring.

        Args:
            requests: The cell's requests, which differ only in their runs.
            benchmark: The cell's benchmark, if it is open already.

        Returns:
            The facts of the cell.

        Raises:
            RequestError: The model or the data is missing, or layers do not fit the model.
        """
        self._meter, request = None, requests[0]
        if is_fresh := not self.has_loaded(request.model):
            self._model = None  # frees the previous model before the next one comes
            self._model = open_model(request.model, self._options)
            self.models_loaded += 1
        assert self._model is not None
        benchmark = benchmark or open_benchmark(request)
        self._meter = Meter(requests, benchmark, self._model, self._options)
        return replace(self._meter.facts, is_fresh=is_fresh)

    @_raises_device_lost
    def check(self, checks: Checks | None) -> list[str]:
        """Check which computation the model can share exactly; return lines about the rest."""
        assert self._meter is not None, "open() comes first"
        return self._meter.check(checks)

    @_raises_device_lost
    def measure(
        self,
        task: str,
        names: Sequence[str],
        documents: Sequence[int],
        advance: Advance = lambda responses: None,
    ) -> Measured:
        """Measure documents of the opened cell, as `Meter.measure`."""
        assert self._meter is not None, "open() comes first"
        return self._meter.measure(task, names, documents, advance)


_ENVIRONMENT = ("HF_", "TRANSFORMERS_", "TOKENIZERS_", "TQDM_")


def environment() -> dict[str, str]:
    """Return this process's environment variables that affect the models and data read."""
    return {name: value for name, value in os.environ.items() if name.startswith(_ENVIRONMENT)}


class RemoteWorker(Worker):
    """A worker in a process of its own.

    Args:
        options: The options of the run.
        folder: The driver's working folder, so that relative paths mean the same.
        variables: The driver's `environment()`.
        workers: Number of workers that share the memory of this machine.

    Raises:
        ModelError: Some of the worker's accelerators are missing.
    """

    def __init__(
        self, options: Options, folder: str, variables: Mapping[str, str], workers: int
    ) -> None:
        # Set before the libraries are imported, which read them then.
        os.environ.update(variables)
        with suppress(OSError):  # not there: absolute paths still work
            os.chdir(folder)
        from tracker.models.devices import share_memory

        super().__init__(options)
        _refuse_lack(options.device)
        share_memory(workers)

    def ready(self) -> None:
        """Return once the worker is ready."""


def _refuse_lack(device: str) -> None:
    """Raise ModelError if some of the worker's accelerators are missing."""
    from tracker.models.devices import accelerators, visible_variable
    from tracker.models.load import SPREAD, find_device

    find_device(device)
    names, count = os.environ.get(visible_variable()), len(accelerators())
    if device == SPREAD and names and count < len(names.split(",")):
        raise ModelError(f"{count} of the accelerators {names} are there, and all are needed")
