"""Handing blocks to workers: one loop for whatever kind of place a worker is in.

And how many devices a worker needs, and which ones it gets.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from tracker.core.errors import RequestError, TrackerError
from tracker.executors.handout import Cell, Handout, Task
from tracker.measuring.fill import WAIT
from tracker.measuring.job import Job, Options
from tracker.measuring.progress import Progress
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


class LostError(Exception):
    """A worker is gone, or never came; says why."""


class Slot(Protocol):
    """A place for one worker, which is asked for one thing at a time.

    Attributes:
        name: What its worker is called in messages.
    """

    name: str

    def start(self) -> None:
        """Begin to start a worker; the one before is gone. Its first answer says it is ready."""

    def ask(self, method: str, *arguments: Any) -> None:
        """Ask the worker for what a method of `Worker` returns."""

    def answer(self) -> Any:
        """Take what came; raises what the method raised, or LostError for a worker that is gone."""

    def kill(self) -> None:
        """End the worker, if there is one."""


S = TypeVar("S", bound=Slot)
Wait = Callable[[Sequence[S], float], Iterable[S]]
"""Waits so many seconds at most until some of the slots have an answer; these."""


@dataclass(eq=False)
class _Place(Generic[S]):
    """A slot and what its worker does: first it starts, then it opens cells and measures blocks."""

    slot: S
    is_busy: bool = False
    task: Task | None = None
    opened: Cell | None = None

    def start(self) -> None:
        self.slot.start()
        self.is_busy, self.task, self.opened = True, None, None


class Pool(Generic[S]):
    """Workers that measure what a handout has; those that die are replaced.

    Args:
        slots: Where they are.
        wait: Waits for them.
        handout: What there is to do.
        progress: Told what happens.
    """

    def __init__(
        self, slots: Iterable[S], wait: Wait[S], handout: Handout, progress: Progress
    ) -> None:
        self._places = [_Place(slot) for slot in slots]
        self._wait, self._handout, self._progress = wait, handout, progress

    def run(self) -> None:
        """Measure until every cell is finished or has failed; no worker is left behind."""
        places = list(self._places)
        try:
            for place in places:
                place.start()
            while not self._handout.ended:
                self._hand_out()
                self._collect()
        finally:
            for place in places:
                place.slot.kill()
            self._handout.close()

    def _hand_out(self) -> None:
        """Give every idle worker something to do."""
        for place in self._places:
            if place.is_busy:
                continue
            others = [other.opened for other in self._places if other is not place]
            task = place.task = self._handout.next(place.opened, others)
            if task is None:
                continue
            place.opened, place.is_busy = task.cell, True
            if task.block is None:
                place.slot.ask("open", task.cell.job.requests)
            else:
                place.slot.ask("measure", task.block.task, task.missing, task.whole)

    def _collect(self) -> None:
        """Take what workers have finished, and replace those that died."""
        busy = {place.slot: place for place in self._places if place.is_busy}
        if not busy:  # another process is at all that is left
            time.sleep(WAIT)
            return
        for slot in self._wait(list(busy), WAIT):
            place = busy[slot]
            task, place.task, place.is_busy = place.task, None, False
            try:
                answer = slot.answer()
            except Exception as error:  # noqa: BLE001  whatever a worker's method raised
                self._failed(place, task, error)
            else:
                if task is not None:
                    take = self._handout.opened if task.block is None else self._handout.measured
                    take(task, *answer)

    def _failed(self, place: _Place[S], task: Task | None, error: Exception) -> None:
        slot = place.slot
        if task is None:  # its machine or device is gone, or is not made ready for tracker
            slot.kill()
            self._places.remove(place)
            self._progress.say(f"{slot.name} cannot start: {error}")
            if not self._places:
                self._handout.give_up(f"no worker is left: {error}")
        elif isinstance(error, LostError):
            slot.kill()
            place.start()
            self._handout.lost(task, slot.name, str(error), len(self._places))
        else:
            self._handout.failed(task, error)
