"""Measure cells on a Ray cluster; each worker is an actor that keeps a model loaded."""

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
from typing_extensions import override

from tracker.core.errors import RequestError
from tracker.core.remote import ProcessEndedError, Remote
from tracker.executors.base import last_line
from tracker.executors.pool import WorkerPool, count_devices
from tracker.measuring.job import Job, Options, Reporting
from tracker.measuring.worker import RemoteWorker, environment
from tracker.models.load import SPREAD

_PATIENCE = 60.0
"""Timeout of nodes to report the free memory of a GPU."""


class RayExecutor:
    """Measures cells on the cluster of RAY_ADDRESS, or that of `ray start` on this machine.

    Without either, a local cluster is used for the run. Every GPU has a worker, or every group of
    GPUs of a node that the model needs. In a cluster without GPUs, every node has a worker with all
    of its CPUs. RequestError is raised if the cluster cannot be reached, or has too few resources.
    """

    def __init__(self, options: Options) -> None:
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
        if not list(_actors(options, asked or 1)):
            self._disconnect()
            what = (
                f"{asked} GPUs, as --devices-per-worker asks" if asked else "a GPU or a CPU to give"
            )
            raise RequestError(f"the Ray cluster has no node with {what}")

    def measure(self, jobs: Sequence[Job], to: Reporting) -> int:
        """Measure cells with the workers of the cluster, which return outcomes to this process."""
        try:
            workers = list(_actors(self._options, self._each(jobs)))
            return WorkerPool(workers, jobs, to, None).run(f"Ray, workers: {len(workers)}")
        finally:
            self._disconnect()

    def _each(self, jobs: Sequence[Job]) -> int:
        """Return the number of GPUs of each worker."""
        options, gpus = self._options, _gpus(self._options)
        if options.devices_per_worker is not None:
            return options.devices_per_worker
        with suppress(RayError):  # a node does not report its free memory
            return count_devices(
                jobs, options, max(gpus.values(), default=1), lambda: _least_free(gpus)
            )
        return 1

    def _disconnect(self) -> None:
        if self._ours:
            ray.shutdown()


class _Actor(Remote):
    """A worker on one or several GPUs, or on a node."""

    def __init__(
        self, name: str, node: str, resources: Mapping[str, float], options: Options, beside: int
    ) -> None:
        super().__init__(name)
        self._options, self._beside, self._actor = options, beside, None
        self._where = {
            "scheduling_strategy": NodeAffinitySchedulingStrategy(node, soft=False),
            **resources,
        }

    @override
    def _call(self, method: str, *arguments: object) -> Any:
        try:
            if self._actor is None:
                made_of = self._options, str(Path.cwd()), environment(), self._beside
                self._actor = ray.remote(RemoteWorker).options(**self._where).remote(*made_of)
            return ray.get(getattr(self._actor, method).remote(*arguments))
        except RayTaskError as error:
            raise error.cause from None
        except RayError as error:
            self.close()
            raise ProcessEndedError(last_line(error)) from None

    @override
    def close(self) -> None:
        actor, self._actor = self._actor, None
        if actor is not None:
            with suppress(RayError):
                ray.kill(actor)


def _look_for_cluster() -> None:
    """Raise OSError if no cluster answers; Ray itself would try for over ten minutes."""
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


def _actors(options: Options, size: int) -> Iterator[_Actor]:
    """Yield a worker for every `size` GPUs of a node, or for every node without GPUs."""
    nodes = [(node, node["Resources"]) for node in ray.nodes() if node["Alive"]]
    gpus = _gpus(options)
    on = replace(options, device=SPREAD if size > 1 else options.device, devices_per_worker=None)
    number = 0
    for node, has in nodes:
        cpus = int(has.get("CPU", 0))
        count, wants = min(1, cpus), {"num_cpus": cpus}
        if gpus or size > 1:
            count = gpus.get(node["NodeID"], 0) // size
            wants = {"num_gpus": size, "num_cpus": min(1, cpus)}
        for _ in range(count):
            number += 1
            name = f"worker {number} on {node['NodeManagerHostname']}"
            yield _Actor(name, node["NodeID"], wants, on, count)


def _gpus(options: Options) -> dict[str, int]:
    """Return the number of GPUs of each node that has some."""
    if options.device == "cpu":
        return {}
    found = {n["NodeID"]: int(n["Resources"].get("GPU", 0)) for n in ray.nodes() if n["Alive"]}
    return {node: gpus for node, gpus in found.items() if gpus}


def _least_free(nodes: Iterable[str]) -> int:
    """Return the smallest number of free bytes among one GPU of each node."""
    there = [NodeAffinitySchedulingStrategy(node, soft=False) for node in nodes]
    ask = ray.remote(num_gpus=1, num_cpus=0)(_free)
    asked = [ask.options(scheduling_strategy=each).remote() for each in there]
    return int(min(ray.get(asked, timeout=_PATIENCE)))


def _free() -> int:
    """Return the free bytes of this process's GPU."""
    from tracker.models.devices import default_device, free_memory

    return free_memory(default_device())
