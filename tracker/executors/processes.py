"""Measuring cells in several processes of this machine: one a device, or parts of its cores."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from tracker.core.errors import RequestError
from tracker.executors.child import Child, answered
from tracker.executors.handout import Handout
from tracker.executors.pool import Pool, grouped, needed
from tracker.executors.worker import environment
from tracker.ledger.cache import Checks
from tracker.measuring.job import Job, Options, Reporting
from tracker.measuring.progress import telling
from tracker.models.devices import default_device, visible_accelerators, visible_variable
from tracker.models.load import ALL, SPREAD, find_device

_FREE = "from tracker.models import devices as d; print(min(map(d.free_memory, d.accelerators())))"


@dataclass(frozen=True)
class _Place:
    """Where a worker works.

    Attributes:
        name: What it is called in messages; empty for a part of the cores.
        device: The device that its model is loaded on.
        sees: The accelerators that it sees, as `visible_variable` names them; None = all.
    """

    name: str
    device: str
    sees: str | None = None


class ProcessesExecutor:
    """Measures cells with worker processes, each with the model, which share the cells' blocks.

    With accelerators there is one for each, or for each group of as many as the model needs;
    without, as many as were asked for. RequestError for what this machine has not.
    """

    def __init__(self, options: Options) -> None:
        self.models_loaded = 0
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
            grouped(self._devices, options.devices_per_worker or 1, options.workers)

    def measure(self, jobs: Sequence[Job], to: Reporting) -> None:
        """Measure cells, handing their blocks to the workers."""
        places = self._places(jobs)
        # Say how many threads each of some workers has: those of one process, where that was said.
        own = os.environ.get("OMP_NUM_THREADS", "")
        threads = int(own) if own.isdecimal() else max(1, torch.get_num_threads() // len(places))
        children = []
        for number, place in enumerate(places, 1):
            variables = {name: str(threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
            if place.sees is not None:
                variables[visible_variable()] = place.sees
            name = f"worker {number}" + (f" on {place.name}" if place.name else "")
            options = replace(
                self._options, device=place.device, workers=None, devices_per_worker=None
            )
            arguments = options, str(Path.cwd()), environment(), len(places), Checks(to.ledger.root)
            children.append(Child(name, variables, *arguments))
        to.progress.say(_about(places, threads))
        handout = Handout(jobs, to)
        try:
            with telling(to.progress, f"workers: {len(children)}", 0):
                Pool(children, answered, handout, to.progress).run()
        finally:
            self.models_loaded = handout.models_loaded

    def _places(self, jobs: Sequence[Job]) -> list[_Place]:
        options = self._options
        if not self._devices:
            return [_Place("", options.device)] * (options.workers or 1)
        accelerator = default_device().type
        asked = options.devices_per_worker
        each = asked or needed(jobs, options, len(self._devices), _least_free)
        return [
            _Place(
                " and ".join(f"{accelerator}:{n}" for n in group),
                SPREAD if len(group) > 1 else accelerator,
                ",".join(self._devices[n] for n in group),
            )
            for group in grouped(self._devices, each, options.workers, asked is None)
        ]


def _least_free() -> int:
    """Say how many bytes are free on the fullest accelerator.

    Who asks takes some of each; so a process asks that ends.
    """
    asked = subprocess.run([sys.executable, "-c", _FREE], capture_output=True, text=True)
    if asked.returncode:
        said = asked.stderr.strip().splitlines() or ["no reason"]
        raise RequestError(f"the accelerators do not say what is free on them: {said[-1]}")
    return int(asked.stdout)


def _about(places: Sequence[_Place], threads: int) -> str:
    """Say who measures."""
    what = f"{len(places)} worker{'s' * (len(places) > 1)}"
    each = f"{threads} thread{'s' * (threads > 1)}{' each' * (len(places) > 1)}"
    return f"{what}: {'; '.join(p.name for p in places)}" if places[0].name else f"{what}, {each}"
