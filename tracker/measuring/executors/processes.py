"""Measure cells in several processes of this machine."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from typing_extensions import override

from tracker.ledger.cache import Checks
from tracker.measuring.executors.pool import WorkerPool, count_devices, group_devices
from tracker.measuring.job import Job, Options, Reporting
from tracker.models.devices import default_device, visible_accelerators, visible_variable
from tracker.models.load import ALL_DEVICES, SPREAD, find_device
from tracker.schema.errors import RequestError
from tracker.schema.remote import RemoteObject

_WORKER_TARGET = "tracker.measuring.worker:RemoteWorker"
_FREE_MEMORY_CODE = (
    "from tracker.models import devices as d; print(min(map(d.free_memory, d.accelerators())))"
)


class WorkerProcess(RemoteObject):
    """Worker in a separate process of this machine.

    Args:
        name: Name of the worker in messages.
        output: The file that receives the error output of the process.
        variables: Environment variables that set the devices and number of threads of the process.
        *arguments: Arguments for the `RemoteWorker` that the process runs.
    """

    def __init__(
        self, name: str, output: Path, variables: Mapping[str, str], *arguments: object
    ) -> None:
        super().__init__(
            name, _WORKER_TARGET, *arguments, added_variables=variables, finishes_calls=False
        )
        self._output = output

    @override
    def _popen(
        self, command: Sequence[str], environment: Mapping[str, str]
    ) -> subprocess.Popen[bytes]:
        pipe = subprocess.PIPE
        with self._output.open("wb") as output:
            return subprocess.Popen(
                command, env=environment, stdin=pipe, stdout=pipe, stderr=output
            )

    @override
    def _why_ended(self, code: int | None) -> str:
        if code is None:
            return "the worker process no longer responds"
        if code == -signal.SIGKILL:
            return "the worker was killed, probably because memory ran out; use fewer workers"
        cause = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        lines = self._output.read_text(errors="replace").strip().splitlines()
        return f"{cause}: {lines[-1][:300]}" if lines else cause


class ProcessesExecutor:
    """Executor that measures cells with several worker processes.

    With accelerators, each worker gets one accelerator, or several if the model needs them. Without
    accelerators, `options.workers` sets the number of workers. RequestError is raised if this
    machine has too few devices.
    """

    def __init__(self, options: Options) -> None:
        self._options = options
        on_accelerators = options.device in (ALL_DEVICES, "auto", default_device().type)
        self._devices = visible_accelerators() if on_accelerators else []
        if not self._devices:
            device = find_device(options.device)
            if options.devices_per_worker:
                raise RequestError("--devices-per-worker: there are no accelerators to choose from")
            if device.type != "cpu" and (options.workers or 1) > 1:
                raise RequestError(
                    f"--workers {options.workers}: only one worker can use {device}; use --device "
                    "all, or --device cpu, where the workers share the cores"
                )
        elif options.devices_per_worker or options.workers:
            group_devices(self._devices, options.devices_per_worker or 1, options.workers)

    def measure(self, jobs: Sequence[Job], reporting: Reporting) -> int:
        """Measure cells with worker processes; return the number of times a model was loaded."""
        groups = self._worker_groups(jobs)
        # OMP_NUM_THREADS is the number of threads of each worker, if it is set.
        setting, n_workers = os.environ.get("OMP_NUM_THREADS", ""), len(groups)
        is_set = setting.isdecimal()
        threads = int(setting) if is_set else max(1, torch.get_num_threads() // n_workers)
        text = f", {threads} thread{'s' * (threads > 1)}{' each' * (n_workers > 1)}"
        if groups[0]:
            text = f": {'; '.join(map(_name_devices, groups))}"
        reporting.progress.say(f"{n_workers} worker{'s' * (n_workers > 1)}{text}")
        with TemporaryDirectory() as folder:
            workers = [
                self._make_worker(number, group, n_workers, threads, Path(folder, str(number)))
                for number, group in enumerate(groups, 1)
            ]
            pool = WorkerPool(workers, jobs, reporting, Checks(reporting.ledger.root))
            return pool.run(f"workers: {len(workers)}")

    def _worker_groups(self, jobs: Sequence[Job]) -> list[range]:
        """Return the range of accelerator numbers of each worker.

        If the run uses no accelerators, the range of each worker is empty.
        """
        options = self._options
        if not self._devices:
            return [range(0)] * (options.workers or 1)
        n_devices, can_grow = options.devices_per_worker, options.devices_per_worker is None
        if n_devices is None:
            n_devices = count_devices(jobs, options, len(self._devices), _least_free_memory)
        return group_devices(self._devices, n_devices, options.workers, can_grow)

    def _make_worker(
        self, number: int, group: range, n_workers: int, n_threads: int, output: Path
    ) -> WorkerProcess:
        """Create a worker without starting its process.

        Args:
            number: Number of the worker, for its name.
            group: Numbers of the worker's accelerators; empty if the worker uses the CPU.
            n_workers: Number of workers of the run.
            n_threads: Number of CPU threads of the worker.
            output: File that receives the error output of the process.

        Returns:
            The worker.
        """
        variables = {name: str(n_threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
        name, device = f"worker {number}", self._options.device
        if group:
            name += f" on {_name_devices(group)}"
            device = SPREAD if len(group) > 1 else default_device().type
            variables[visible_variable()] = ",".join(self._devices[n] for n in group)
        options = replace(self._options, device=device, workers=None, devices_per_worker=None)
        return WorkerProcess(name, output, variables, options, str(Path.cwd()), {}, n_workers)


def _name_devices(group: range) -> str:
    return " and ".join(f"{default_device().type}:{n}" for n in group)


def _least_free_memory() -> int:
    """Return the lowest free memory of any accelerator, in bytes.

    A separate process reads the free memory, because reading it allocates memory.
    """
    command = [sys.executable, "-c", _FREE_MEMORY_CODE]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        lines = result.stderr.strip().splitlines() or ["no reason is given"]
        raise RequestError(f"the free memory of the accelerators cannot be read: {lines[-1]}")
    return int(result.stdout)
