"""Count the devices that workers get, and choose which ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress

from tracker.core.errors import RequestError, TrackerError
from tracker.measuring.job import Job, Options
from tracker.models.load import bytes_to_load
from tracker.models.offloaded import devices_for
from tracker.models.sources import find_model


def group_devices(
    devices: Sequence[str], size: int, most: int | None = None, more: bool = False
) -> list[range]:
    """Divide devices into groups of neighbours.

    Args:
        devices: The devices.
        size: How many make a group.
        most: How many groups there are to be; None = as many as can be.
        more: Whether groups of several may have more, so that no device is left.

    Returns:
        The groups, as numbers of devices.

    Raises:
        RequestError: There are fewer devices.
    """
    groups = most or len(devices) // size
    if not groups or groups * size > len(devices):
        raise RequestError(
            f"{max(groups, 1)} workers of {size} accelerators each: this machine has "
            f"{len(devices)}; give less to --workers or --devices-per-worker"
        )
    if more and size > 1:
        size = len(devices) // groups
    return [range(group * size, (group + 1) * size) for group in range(groups)]


def count_devices(
    jobs: Sequence[Job], options: Options, devices: int, least_free: Callable[[], int]
) -> int:
    """Count the devices that a worker needs.

    Args:
        jobs: The cells.
        options: How they are measured.
        devices: How many devices there are for a worker at most.
        least_free: Returns how many bytes are free on the fullest device; it may take seconds.

    Returns:
        As many as the weights of the largest model ask for; one where layers are to rest elsewhere.
    """
    if devices == 1 or options.weights is not None or options.offload != "device":
        return 1
    return devices_for(largest_weights(jobs, options), least_free(), devices)


def largest_weights(jobs: Sequence[Job], options: Options) -> int:
    """Return the bytes that the weights of the largest model take, where it is known."""
    largest = 0
    for request in {job.requests[0].model_settings: job.requests[0] for job in jobs}.values():
        with suppress(TrackerError):  # the worker that loads it will say so
            source = find_model(request.model, request.revision, request.model_args)
            size = bytes_to_load(source, request.dtype, options.trust_remote_code)
            largest = max(largest, size or 0)
    return largest
