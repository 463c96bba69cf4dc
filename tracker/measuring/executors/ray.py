"""Measure cells on a Ray cluster; each worker is a Ray actor that keeps a model loaded."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import ray
from ray._private.services import canonicalize_bootstrap_address
from ray.exceptions import RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from typing_extensions import override

from tracker.measuring.executors.base import last_line
from tracker.measuring.executors.pool import WorkerPool, count_devices
from tracker.measuring.job import Job, Options, Reporting
from tracker.measuring.worker import RemoteWorker, environment
from tracker.models.load import SPREAD
from tracker.schema.errors import RequestError
from tracker.schema.remote import ProcessEndedError, Remote

_MEMORY_TIMEOUT = 60.0
"""Maximum number of seconds to wait for nodes to report the free memory of a GPU."""


class RayExecutor:
    """Executor that measures cells on a Ray cluster.

    The executor uses the cluster at the address in the environment variable RAY_ADDRESS. Without
    this variable, it uses the cluster that `ray start` has started on this machine. If there is no
    such cluster, a local cluster is started for the run.

    Each worker gets one GPU, or several GPUs if the model needs them. In a cluster without GPUs,
    every node has one worker. RequestError is raised if the cluster cannot be reached, or has too
    few resources.
    """

    def __init__(self, options: Options) -> None:
        self._options = options
        self._is_own_cluster = not ray.is_initialized()
        if self._is_own_cluster:
            try:
                _check_cluster()
                ray.init(include_dashboard=False, log_to_driver=False, logging_level="ERROR")
            except (OSError, ValueError, RuntimeError, RayError) as error:
                raise RequestError(
                    f"the Ray cluster cannot be reached: {last_line(error)}. tracker uses the "
                    "cluster at RAY_ADDRESS, else the one that 'ray start' made on this machine. "
                    "To run without a cluster, unset RAY_ADDRESS and type: ray stop"
                ) from None
        size = options.devices_per_worker
        if not list(_make_actors(options, size or 1)):
            self._disconnect()
            resource = f"{size} GPUs (--devices-per-worker)" if size else "a free GPU or CPU"
            raise RequestError(f"the Ray cluster has no node with {resource}")

    def measure(self, jobs: Sequence[Job], reporting: Reporting) -> int:
        """Measure cells with workers on the cluster, and write the outcomes in this process."""
        try:
            workers = list(_make_actors(self._options, self._gpus_per_worker(jobs)))
            return WorkerPool(workers, jobs, reporting, None).run(f"Ray, workers: {len(workers)}")
        finally:
            self._disconnect()

    def _gpus_per_worker(self, jobs: Sequence[Job]) -> int:
        """Return the number of GPUs of each worker."""
        options, gpus = self._options, _count_gpus(self._options)
        if options.devices_per_worker is not None:
            return options.devices_per_worker
        max_gpus = max(gpus.values(), default=1)
        with suppress(RayError):  # a node failed to report its free memory
            return count_devices(jobs, options, max_gpus, lambda: _least_free_memory(gpus))
        return 1

    def _disconnect(self) -> None:
        if self._is_own_cluster:
            ray.shutdown()


class _Actor(Remote):
    """Ray actor that runs a worker on GPUs of a node, or on all CPUs of a node without GPUs."""

    def __init__(
        self, name: str, node: str, resources: Mapping[str, float], options: Options, n_workers: int
    ) -> None:
        super().__init__(name)
        self._options, self._n_workers, self._actor = options, n_workers, None
        self._placement = {"scheduling_strategy": _on_node(node), **resources}

    @override
    def _call(self, method: str, *arguments: object) -> Any:
        try:
            if self._actor is None:
                worker_arguments = self._options, str(Path.cwd()), environment(), self._n_workers
                actor_class = ray.remote(RemoteWorker).options(**self._placement)
                self._actor = actor_class.remote(*worker_arguments)
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


def _check_cluster() -> None:
    """Raise OSError if the cluster does not respond."""
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


def _on_node(node: str) -> NodeAffinitySchedulingStrategy:
    return NodeAffinitySchedulingStrategy(node, soft=False)


def _make_actors(options: Options, size: int) -> Iterator[_Actor]:
    """Yield the Ray actors that run the workers.

    Each actor gets `size` GPUs. If the run uses no GPUs and `size` is 1, each node with a CPU gets
    one actor.
    """
    gpus, numbers = _count_gpus(options), count(1)
    device = SPREAD if size > 1 else options.device
    options = replace(options, device=device, devices_per_worker=None)
    for node in (node for node in ray.nodes() if node["Alive"]):
        cpus = int(node["Resources"].get("CPU", 0))
        n_actors, resources = min(1, cpus), {"num_cpus": cpus}
        if gpus or size > 1:
            n_actors = gpus.get(node["NodeID"], 0) // size
            resources = {"num_gpus": size, "num_cpus": min(1, cpus)}
        for _ in range(n_actors):
            name = f"worker {next(numbers)} on {node['NodeManagerHostname']}"
            yield _Actor(name, node["NodeID"], resources, options, n_actors)


def _count_gpus(options: Options) -> dict[str, int]:
    """Count the GPUs of each node; return node ID → number of GPUs."""
    if options.device == "cpu":
        return {}
    counts = {n["NodeID"]: int(n["Resources"].get("GPU", 0)) for n in ray.nodes() if n["Alive"]}
    return {node: gpus for node, gpus in counts.items() if gpus}


def _least_free_memory(nodes: Iterable[str]) -> int:
    """Read the free memory of one GPU per node; return the minimum over the nodes, in bytes."""
    read_memory = ray.remote(num_gpus=1, num_cpus=0)(_free_gpu_memory)
    futures = [read_memory.options(scheduling_strategy=_on_node(n)).remote() for n in nodes]
    return int(min(ray.get(futures, timeout=_MEMORY_TIMEOUT)))


def _free_gpu_memory() -> int:
    """Return the free memory of this process's GPU, in bytes."""
    from tracker.models.devices import default_device, free_memory

    return free_memory(default_device())
