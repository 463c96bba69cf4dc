"""Measuring cells on a Ray cluster: each worker keeps a model loaded and is handed blocks."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray._private.services import canonicalize_bootstrap_address
from ray.exceptions import RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from tracker.core.errors import RequestError
from tracker.executors.base import last_line
from tracker.executors.handout import Cell, Handout, Task
from tracker.executors.worker import Worker, environment
from tracker.ledger.store import Ledger
from tracker.measuring.fill import WAIT
from tracker.measuring.job import Begun, Done, Job, Options
from tracker.measuring.progress import Progress


class RayExecutor:
    """Measures cells on the cluster of RAY_ADDRESS, or the one that `ray start` made here.

    Where there is neither, a local one lives as long as the run. Every GPU has a worker; in a
    cluster without GPUs, every node has one with all of its CPUs. RequestError for a cluster that
    cannot be reached, or has no room for a worker.
    """

    def __init__(self, options: Options) -> None:
        self.models_loaded = 0
        self._options = options
        self._ours = not ray.is_initialized()
        if self._ours:
            try:
                _look_for_cluster()
                ray.init(include_dashboard=False, log_to_driver=False, logging_level="ERROR")
            except (OSError, ValueError, RuntimeError, RayError) as error:
                raise RequestError(
                    f"the Ray cluster cannot be reached: {last_line(error)}. It is looked for at "
                    "RAY_ADDRESS, then where 'ray start' made one here; to do without, unset "
                    "RAY_ADDRESS and type: ray stop"
                ) from None
        self._slots = list(_slots(options.device))
        if not self._slots:
            self._disconnect()
            raise RequestError("the Ray cluster has no node with a GPU or a CPU to give")

    def measure(
        self, jobs: Sequence[Job], ledger: Ledger, progress: Progress, begun: Begun, done: Done
    ) -> None:
        """Measure cells, handing their blocks to the workers of the cluster."""
        handout = Handout(jobs, ledger, progress, begun, done)
        progress.start(f"Ray, workers: {len(self._slots)}", 0)
        try:
            for slot in self._slots:
                self._start(slot)
            while not handout.ended:
                self._hand_out(handout)
                self._collect(handout, progress)
        except RayError as error:
            handout.give_up(f"the Ray cluster was lost: {last_line(error)}")
        finally:
            progress.finish()
            handout.close()
            self.models_loaded = handout.models_loaded
            for slot in self._slots:
                _kill(slot.actor)
            self._disconnect()

    def _start(self, slot: _Slot) -> None:
        where = NodeAffinitySchedulingStrategy(slot.node, soft=False)
        actor = ray.remote(Worker).options(scheduling_strategy=where, **slot.resources)
        slot.actor = actor.remote(self._options, str(Path.cwd()), environment())
        slot.waits_for, slot.task, slot.opened = slot.actor.__ray_ready__.remote(), None, None

    def _hand_out(self, handout: Handout) -> None:
        """Give every idle worker something to do."""
        for slot in self._slots:
            if slot.waits_for is not None:
                continue
            others = [other.opened for other in self._slots if other is not slot]
            task = slot.task = handout.next(slot.opened, others)
            if task is None:
                continue
            slot.opened = task.cell
            if task.block is None:
                slot.waits_for = slot.actor.open.remote(task.cell.job.requests)
            else:
                slot.waits_for = slot.actor.measure.remote(task.block.task, task.missing)

    def _collect(self, handout: Handout, progress: Progress) -> None:
        """Take what workers have finished, and replace those that died."""
        busy = {slot.waits_for: slot for slot in self._slots if slot.waits_for is not None}
        if not busy:  # another process is at all that is left
            time.sleep(WAIT)
            return
        for found in ray.wait(list(busy), timeout=WAIT)[0]:
            slot = busy[found]
            task, slot.task, slot.waits_for = slot.task, None, None
            try:
                result = ray.get(found)
            except RayError as error:
                if task is not None and isinstance(error, RayTaskError):
                    handout.failed(task, error.cause)
                else:
                    self._replace(slot, task, last_line(error), handout, progress)
            else:
                if task is not None:
                    (handout.opened if task.block is None else handout.measured)(task, *result)

    def _replace(
        self, slot: _Slot, task: Task | None, why: str, handout: Handout, progress: Progress
    ) -> None:
        if task is not None:
            _kill(slot.actor)
            self._start(slot)
            handout.lost(task, why, len(self._slots))
            return
        # It never started: its machine is gone, or is not made ready for tracker.
        self._slots.remove(slot)
        progress.say(f"a worker cannot start: {why}")
        if not self._slots:
            handout.give_up(f"no worker is left on the Ray cluster: {why}")

    def _disconnect(self) -> None:
        if self._ours:
            ray.shutdown()


@dataclass(eq=False)
class _Slot:
    """A place for one worker: first it starts, then it opens cells and measures blocks of them."""

    node: str
    resources: dict[str, float]
    actor: Any = None
    waits_for: Any = None
    task: Task | None = None
    opened: Cell | None = None


def _look_for_cluster() -> None:
    """Raise an OSError if nobody answers where Ray will look: it would try for over ten minutes."""
    if "://" in os.environ.get("RAY_ADDRESS", ""):
        return
    address = canonicalize_bootstrap_address(None)
    if address is None:
        return
    host, port = address.rsplit(":", 1)
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
    except OSError as error:
        raise OSError(f"nobody answers at {address}: {error.strerror or error}") from None


def _slots(device: str) -> Iterator[_Slot]:
    """Find a place for a worker at every GPU, or else at every node."""
    nodes = [(node["NodeID"], node["Resources"]) for node in ray.nodes() if node["Alive"]]
    gpus = {node: int(has.get("GPU", 0)) if device != "cpu" else 0 for node, has in nodes}
    for node, has in nodes:
        cpus = int(has.get("CPU", 0))
        if any(gpus.values()):
            for _ in range(gpus[node]):
                yield _Slot(node, {"num_gpus": 1, "num_cpus": min(1, cpus)})
        elif cpus:
            yield _Slot(node, {"num_cpus": cpus})


def _kill(actor: Any) -> None:
    if actor is not None:
        with suppress(RayError):
            ray.kill(actor)
