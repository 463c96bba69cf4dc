"""What a worker in another process keeps: a loaded model, and the cell that it was given last."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import wraps
from itertools import islice
from typing import ParamSpec, TypeVar

from tracker.benchmarks.benchmark import open_benchmark
from tracker.core.config import CellRequest
from tracker.core.errors import ModelError, first_line
from tracker.ledger.cache import Checks
from tracker.measuring.job import Options
from tracker.measuring.meter import Facts, Measured, Meter, Model, open_model

P = ParamSpec("P")
T = TypeVar("T")
_ENVIRONMENT = ("HF_", "TRANSFORMERS_", "TOKENIZERS_", "TQDM_")


def environment() -> dict[str, str]:
    """What this process is told of models and data, so that workers are told the same."""
    return {name: value for name, value in os.environ.items() if name.startswith(_ENVIRONMENT)}


def _ends_without_device(method: Callable[P, T]) -> Callable[P, T]:
    """Let this process end where its device is lost, so that another one does what it did."""

    @wraps(method)
    def ends(*arguments: P.args, **named: P.kwargs) -> T:
        try:
            return method(*arguments, **named)
        except Exception as error:
            from tracker.engine.refusal import device_is_lost

            if device_is_lost(error):
                raise SystemExit(first_line(error)) from None
            raise

    return ends


def _refuse_lack(device: str) -> None:
    """Refuse to work without the accelerators that are meant (ModelError)."""
    from tracker.models.devices import accelerators, visible_variable
    from tracker.models.load import SPREAD, find_device

    find_device(device)
    names, count = os.environ.get(visible_variable()), len(accelerators())
    if device == SPREAD and names and count < len(names.split(",")):
        raise ModelError(f"{count} of the accelerators {names} are there, and all are needed")


class Worker:
    """Measures blocks of documents; writes none.

    Args:
        options: How to run.
        folder: Where the driver runs, so that relative paths mean the same.
        variables: The driver's `environment()`.
        beside: How many workers there are on this machine, which share its memory.
        checks: Where verdicts on architectures are kept, if they can be from here.
    """

    def __init__(
        self,
        options: Options,
        folder: str,
        variables: Mapping[str, str],
        beside: int = 1,
        checks: Checks | None = None,
    ) -> None:
        # Before the libraries are imported, which read them then.
        os.environ.update(variables)
        with suppress(OSError):  # not there: absolute paths still work
            os.chdir(folder)
        _refuse_lack(options.device)
        self._options = options
        self._beside = beside
        self._checks = checks
        self._model: Model | None = None
        self._meter: Meter | None = None
        self._checked = False

    @_ends_without_device
    def open(self, requests: Sequence[CellRequest]) -> tuple[Facts, bool, list[str]]:
        """Make a cell ready to be measured.

        RequestError if the model or the data is not where this worker is.

        Args:
            requests: The cell's, which differ in their runs alone.

        Returns:
            The cell's facts, whether its model had to be loaded, and what is to be said of that.
        """
        from tracker.models.devices import share_memory

        share_memory(self._beside)
        self._meter, request = None, requests[0]
        fresh = self._model is None or self._model.settings != request.model_settings
        if fresh:
            self._model = None  # frees the previous model before the next one comes
            self._model = open_model(request, self._options)
        assert self._model is not None
        self._meter = Meter(requests, open_benchmark(request), self._model, self._options)
        self._checked = False
        offloaded = self._model.loaded.offloaded
        said = [] if offloaded is None else [f"{self._model.loaded.identity.name}: {offloaded}"]
        return self._meter.facts, fresh, said

    @_ends_without_device
    def measure(
        self, task: str, missing: Mapping[tuple[str, ...], list[int]], whole: bool
    ) -> tuple[list[Measured], list[str]]:
        """Measure what one block of the opened cell lacks, or a portion of it.

        Args:
            task: The block's task.
            missing: Names of ablations → the documents that lack just these.
            whole: Whether all of it is measured.

        Returns:
            The outcomes; and what is to be said: what the self-check said where this is the cell's
            first block here, and what was said while it was measured.
        """
        assert self._meter is not None, "open() comes first"
        said = [] if self._checked else self._meter.check(self._checks)
        self._checked = True
        some = missing.items() if whole else islice(self._meter.portions(missing), 1)
        measured = [self._meter.measure(task, *each) for each in some]
        return measured, [*said, *self._meter.notes()]
