"""Measuring cells on a Ray cluster: each worker keeps a model loaded and is handed blocks."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
from ray._private.services import canonicalize_bootstrap_address
from ray.exceptions import RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from tracker.core.errors import RequestError
from tracker.executors.base import last_line
from tracker.executors.handout import Handout
from tracker.executors.pool import LostError, Pool, needed
from tracker.executors.worker import Worker, environment
from tracker.measuring.job import Job, Options, Reporting
from tracker.measuring.progress import telling
from tracker.models.load import SPREAD

_PATIENCE = 60.0
"""Seconds that nodes may take to say what is free on a GPU."""


class RayExecutor:
    """Measures cells on the cluster of RAY_ADDRESS, or the one that `ray start` made here.

    Where there is neither, a local one lives as long as the run. Every GPU has a worker, or as many
    GPUs of a node as the model needs; in a cluster without GPUs, every node has one with all of its
    CPUs. RequestError for a cluster that cannot be reached, or has no room for a worker.
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
        asked = options.devices_per_worker
        if not list(_slots(options, asked or 1)):
            self._disconnect()
            what = (
                f"{asked} GPUs, as --devices-per-worker asks" if asked else "a GPU or a CPU to give"
            )
            raise RequestError(f"the Ray cluster has no node with {what}")

    def measure(self, jobs: Sequence[Job], to: Reporting) -> None:
        """Measure cells, handing their blocks to the workers of the cluster."""
        handout = Handout(jobs, to)
        try:
            slots = list(_slots(self._options, self._each(jobs)))
            with telling(to.progress, f"Ray, workers: {len(slots)}", 0):
                Pool(slots, _answered, handout, to.progress).run()
        except RayError as error:
            handout.give_up(f"the Ray cluster was lost: {last_line(error)}")
        finally:
            self.models_loaded = handout.models_loaded
            self._disconnect()

    def _each(self, jobs: Sequence[Job]) -> int:
        """Say how many GPUs a worker has."""
        options, gpus = self._options, _gpus(self._options)
        if options.devices_per_worker is not None:
            return options.devices_per_worker
        with suppress(RayError):  # a node that does not say what is free
            return needed(jobs, options, max(gpus.values(), default=1), lambda: _least_free(gpus))
        return 1

    def _disconnect(self) -> None:
        if self._ours:
            ray.shutdown()


class _Slot:
    """A place at a GPU, at several, or at a node."""

    def __init__(
        self, name: str, node: str, resources: Mapping[str, float], options: Options, beside: int
    ) -> None:
        self.name = name
        self.answers: Any = None
        self._beside = beside
        self._where = NodeAffinitySchedulingStrategy(node, soft=False)
        self._resources, self._options = resources, options
        self._actor: Any = None

    def start(self) -> None:
        """Begin to start an actor."""
        actor = ray.remote(Worker).options(scheduling_strategy=self._where, **self._resources)
        self._actor = actor.remote(self._options, str(Path.cwd()), environment(), self._beside)
        self.answers = self._actor.__ray_ready__.remote()

    def ask(self, method: str, *arguments: Any) -> None:
        """Call a method of the actor."""
        self.answers = getattr(self._actor, method).remote(*arguments)

    def answer(self) -> Any:
        """Take what came."""
        try:
            return ray.get(self.answers)
        except RayTaskError as error:
            raise error.cause from None
        except RayError as error:
            raise LostError(last_line(error)) from None

    def kill(self) -> None:
        """End the actor."""
        if self._actor is not None:
            with suppress(RayError):
                ray.kill(self._actor)


def _answered(slots: Sequence[_Slot], seconds: float) -> list[_Slot]:
    """Wait until some have answered."""
    found = {slot.answers: slot for slot in slots}
    return [found[each] for each in ray.wait(list(found), timeout=seconds)[0]]


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


def _slots(options: Options, each: int) -> Iterator[_Slot]:
    """Find a place for a worker at every so many GPUs of a node, or else at every node."""
    nodes = [(node, node["Resources"]) for node in ray.nodes() if node["Alive"]]
    gpus = _gpus(options)
    on = replace(options, device=SPREAD if each > 1 else options.device, devices_per_worker=None)
    number = 0
    for node, has in nodes:
        cpus = int(has.get("CPU", 0))
        places, wants = min(1, cpus), {"num_cpus": cpus}
        if gpus or each > 1:
            places = gpus.get(node["NodeID"], 0) // each
            wants = {"num_gpus": each, "num_cpus": min(1, cpus)}
        for _ in range(places):
            number += 1
            name = f"worker {number} on {node['NodeManagerHostname']}"
            yield _Slot(name, node["NodeID"], wants, on, places)


def _gpus(options: Options) -> dict[str, int]:
    """Count the GPUs of each node that has some."""
    if options.device == "cpu":
        return {}
    found = {n["NodeID"]: int(n["Resources"].get("GPU", 0)) for n in ray.nodes() if n["Alive"]}
    return {node: gpus for node, gpus in found.items() if gpus}


def _least_free(nodes: Iterable[str]) -> int:
    """Say how many bytes are free on the fullest of some GPUs, one of each node."""
    there = [NodeAffinitySchedulingStrategy(node, soft=False) for node in nodes]
    ask = ray.remote(num_gpus=1, num_cpus=0)(_free)
    asked = [ask.options(scheduling_strategy=each).remote() for each in there]
    return int(min(ray.get(asked, timeout=_PATIENCE)))


def _free() -> int:
    """Say how many bytes are free on a GPU."""
    from tracker.models.devices import default_device, free_memory

    return free_memory(default_device())
