"""A worker in a process of its own, on this machine or another one."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress

from tracker.core.errors import ModelError
from tracker.measuring.job import Options
from tracker.measuring.worker import Worker

_ENVIRONMENT = ("HF_", "TRANSFORMERS_", "TOKENIZERS_", "TQDM_")


def environment() -> dict[str, str]:
    """Return the variables of this process that decide which models and data are read."""
    return {name: value for name, value in os.environ.items() if name.startswith(_ENVIRONMENT)}


class RemoteWorker(Worker):
    """A worker in a process of its own.

    Args:
        options: How to measure.
        folder: Where the driver runs, so that relative paths mean the same.
        variables: The driver's `environment()`.
        workers: How many workers share the memory of this machine.

    Raises:
        ModelError: The accelerators that the worker should have are not all there.
    """

    def __init__(
        self, options: Options, folder: str, variables: Mapping[str, str], workers: int
    ) -> None:
        # Before the libraries are imported, which read them then.
        os.environ.update(variables)
        with suppress(OSError):  # not there: absolute paths still work
            os.chdir(folder)
        from tracker.models.devices import share_memory

        super().__init__(options)
        _refuse_lack(options.device)
        share_memory(workers)

    def ready(self) -> None:
        """Return once there is a worker."""


def _refuse_lack(device: str) -> None:
    """Raise ModelError where accelerators that the worker should have are not there."""
    from tracker.models.devices import accelerators, visible_variable
    from tracker.models.load import SPREAD, find_device

    find_device(device)
    names, count = os.environ.get(visible_variable()), len(accelerators())
    if device == SPREAD and names and count < len(names.split(",")):
        raise ModelError(f"{count} of the accelerators {names} are there, and all are needed")
