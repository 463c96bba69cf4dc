"""How many devices a worker needs, and which ones it gets."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress

from tracker.core.errors import RequestError, TrackerError
from tracker.measuring.job import Job, Options
from tracker.models.load import weight_bytes
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


def largest(jobs: Sequence[Job], options: Options) -> int:
    """Say how many bytes the weights of the largest model take, of those of which it is known."""
    found = 0
    for request in {job.requests[0].model_settings: job.requests[0] for job in jobs}.values():
        with suppress(TrackerError):  # the worker that loads it will say so
            source = find_model(request.model, request.revision, request.model_args)
            size = weight_bytes(source, request.dtype, options.trust_remote_code)
            found = max(found, size or 0)
    return found
