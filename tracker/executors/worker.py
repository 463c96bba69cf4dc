"""What a worker on another machine keeps: a loaded model, and the cell that it was given last."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import suppress

from tracker.benchmarks.benchmark import open_benchmark
from tracker.core.config import CellRequest
from tracker.measuring.job import Options
from tracker.measuring.meter import Facts, Measured, Meter, Model, open_model

_ENVIRONMENT = ("HF_", "TRANSFORMERS_", "TOKENIZERS_", "TQDM_")


def environment() -> dict[str, str]:
    """What this process is told of models and data, so that workers are told the same."""
    return {name: value for name, value in os.environ.items() if name.startswith(_ENVIRONMENT)}


class Worker:
    """Measures blocks of documents; writes nothing.

    `folder` is where the driver runs, so that relative paths mean the same; `variables` are the
    driver's `environment()`.
    """

    def __init__(self, options: Options, folder: str, variables: Mapping[str, str]) -> None:
        # Before the libraries are imported, which read them then.
        os.environ.update(variables)
        with suppress(OSError):  # not there: absolute paths still work
            os.chdir(folder)
        self._options = options
        self._model: Model | None = None
        self._meter: Meter | None = None
        self._checked = False

    def open(self, requests: Sequence[CellRequest]) -> tuple[Facts, bool]:
        """Make a cell ready to be measured; its facts, and whether its model had to be loaded.

        RequestError if the model or the data is not where this worker is.
        """
        self._meter, request = None, requests[0]
        fresh = self._model is None or self._model.settings != request.model_settings
        if fresh:
            self._model = None  # frees the previous model before the next one comes
            self._model = open_model(request, self._options)
        assert self._model is not None
        self._meter = Meter(requests, open_benchmark(request), self._model, self._options)
        self._checked = False
        return self._meter.facts, fresh

    def measure(
        self, task: str, missing: Mapping[tuple[str, ...], list[int]]
    ) -> tuple[list[Measured], list[str]]:
        """Measure what one block of the opened cell lacks.

        Args:
            task: The block's task.
            missing: Names of ablations → the documents that lack just these.

        Returns:
            The outcomes, and what the self-check said where this is the cell's first block here.
        """
        assert self._meter is not None, "open() comes first"
        lost = [] if self._checked else self._meter.check()
        self._checked = True
        return [self._meter.measure(task, *each) for each in missing.items()], lost
