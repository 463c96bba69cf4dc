"""How many devices a worker needs, and which ones it gets."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress

from tracker.core.errors import RequestError, TrackerError
from tracker.measuring.job import Job, Options
from tracker.models.load import bytes_to_load
from tracker.models.placement import devices_for
from tracker.models.sources import find_model


def grouped(
    devices: Sequence[str], each: int, most: int | None = None, more: bool = False
) -> list[range]:
    """Part devices into groups of neighbours.

    Args:
        devices: The devices.
        each: How many make a group.
        most: How many groups there are to be; None = as many as can be.
        more: Whether groups of several may have more, so that no device is left.

    Returns:
        The groups, as numbers of devices.

    Raises:
        RequestError: There are fewer devices.
    """
    groups = most or len(devices) // each
    if not groups or groups * each > len(devices):
        raise RequestError(
            f"{max(groups, 1)} workers of {each} accelerators each: this machine has "
            f"{len(devices)}; give less to --workers or --devices-per-worker"
        )
    if more and each > 1:
        each = len(devices) // groups
    return [range(group * each, (group + 1) * each) for group in range(groups)]


def needed(
    jobs: Sequence[Job], options: Options, devices: int, least_free: Callable[[], int]
) -> int:
    """Say how many devices a worker needs.

    Args:
        jobs: The cells.
        options: How they are measured.
        devices: How many devices there are for a worker at most.
        least_free: Says how many bytes are free on the fullest device; it may take seconds.

    Returns:
        As many as the weights of the largest model ask for; one where layers are to rest elsewhere.
    """
    if devices == 1 or options.weights is not None or options.offload != "device":
        return 1
    return devices_for(largest(jobs, options), least_free(), devices)


def largest(jobs: Sequence[Job], options: Options) -> int:
    """Say how many bytes the weights of the largest model take, of those of which it is known."""
    found = 0
    for request in {job.requests[0].model_settings: job.requests[0] for job in jobs}.values():
        with suppress(TrackerError):  # the worker that loads it will say so
            source = find_model(request.model, request.revision, request.model_args)
            size = bytes_to_load(source, request.dtype, options.trust_remote_code)
            found = max(found, size or 0)
    return found
