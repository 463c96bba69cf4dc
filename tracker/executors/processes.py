"""Measure cells in several processes of this machine, by device or with a part of its cores."""

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

from tracker.core.errors import RequestError
from tracker.core.remote import RemoteObject
from tracker.executors.pool import WorkerPool, count_devices, group_devices
from tracker.ledger.cache import Checks
from tracker.measuring.job import Job, Options, Reporting
from tracker.models.devices import default_device, visible_accelerators, visible_variable
from tracker.models.load import ALL, SPREAD, find_device

_KIND = "tracker.measuring.worker:RemoteWorker"
_FREE = "from tracker.models import devices as d; print(min(map(d.free_memory, d.accelerators())))"


class WorkerProcess(RemoteObject):
    """A worker in a process of this machine.

    Args:
        name: Its name in messages.
        output: The file for its output.
        variables: Environment variables that set its devices and its number of threads.
        *arguments: The arguments of `RemoteWorker`.
    """

    def __init__(
        self, name: str, output: Path, variables: Mapping[str, str], *arguments: object
    ) -> None:
        super().__init__(name, _KIND, *arguments, also=variables, finishes=False)
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
            return "it does not answer any more"
        if code == -signal.SIGKILL:
            return "killed, as the system does when memory runs out; fewer workers need less"
        how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        lines = self._output.read_text(errors="replace").strip().splitlines()
        return f"{how}: {lines[-1][:300]}" if lines else how


class ProcessesExecutor:
    """Measures cells with worker processes, each with the model, which share the cells' blocks.

    With accelerators there is one worker for each, or for each group that the model needs. Without,
    there are as many as requested. RequestError is raised if this machine has too few devices.
    """

    def __init__(self, options: Options) -> None:
        self._options = options
        on_accelerators = options.device in (ALL, "auto", default_device().type)
        self._devices = visible_accelerators() if on_accelerators else []
        if not self._devices:
            place = find_device(options.device)
            if options.devices_per_worker:
                raise RequestError("--devices-per-worker: there are no accelerators to choose from")
            if place.type != "cpu" and (options.workers or 1) > 1:
                raise RequestError(
                    f"--workers {options.workers}: on {place} is place for one; use --device all, "
                    "or --device cpu, which parts the cores"
                )
        elif options.devices_per_worker or options.workers:
            group_devices(self._devices, options.devices_per_worker or 1, options.workers)

    def measure(self, jobs: Sequence[Job], to: Reporting) -> int:
        """Measure cells with the workers; return the number of loaded models."""
        groups = self._groups(jobs)
        # OMP_NUM_THREADS is the number of threads of each worker, if it is set.
        own = os.environ.get("OMP_NUM_THREADS", "")
        threads = int(own) if own.isdecimal() else max(1, torch.get_num_threads() // len(groups))
        title = f"{len(groups)} worker{'s' * (len(groups) > 1)}"
        threads_each = f"{threads} thread{'s' * (threads > 1)}{' each' * (len(groups) > 1)}"
        devices = "; ".join(map(_name_devices, groups))
        to.progress.say(f"{title}: {devices}" if groups[0] else f"{title}, {threads_each}")
        with TemporaryDirectory() as folder:
            workers = [
                self._worker(number, group, len(groups), threads, Path(folder, str(number)))
                for number, group in enumerate(groups, 1)
            ]
            pool = WorkerPool(workers, jobs, to, Checks(to.ledger.root))
            return pool.run(f"workers: {len(workers)}")

    def _groups(self, jobs: Sequence[Job]) -> list[range]:
        """Divide the accelerators among workers; without any, each group is empty."""
        options = self._options
        if not self._devices:
            return [range(0)] * (options.workers or 1)
        asked = options.devices_per_worker
        count = asked or count_devices(jobs, options, len(self._devices), _least_free)
        return group_devices(self._devices, count, options.workers, asked is None)

    def _worker(
        self, number: int, group: range, workers: int, threads: int, output: Path
    ) -> WorkerProcess:
        """Create a worker, not started yet, for some accelerators or a part of the cores."""
        variables = {name: str(threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
        name, device = f"worker {number}", self._options.device
        if group:
            name += f" on {_name_devices(group)}"
            device = SPREAD if len(group) > 1 else default_device().type
            variables[visible_variable()] = ",".join(self._devices[n] for n in group)
        options = replace(self._options, device=device, workers=None, devices_per_worker=None)
        return WorkerProcess(name, output, variables, options, str(Path.cwd()), {}, workers)


def _name_devices(group: range) -> str:
    return " and ".join(f"{default_device().type}:{n}" for n in group)


def _least_free() -> int:
    """Return the free bytes of the fullest accelerator.

    Reading them uses some memory of each accelerator, so a process of its own does it and ends.
    """
    asked = subprocess.run([sys.executable, "-c", _FREE], capture_output=True, text=True)
    if asked.returncode:
        said = asked.stderr.strip().splitlines() or ["no reason"]
        raise RequestError(f"the accelerators do not say what is free on them: {said[-1]}")
    return int(asked.stdout)
