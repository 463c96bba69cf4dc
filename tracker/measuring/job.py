"""What there is to measure, and how."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from numbers import Integral
from typing import Any

from tracker.benchmarks.base import Benchmark
from tracker.core.config import EXECUTORS, RESTS, CellRequest
from tracker.core.errors import RequestError, did_you_mean
from tracker.ledger.cells import CellStore
from tracker.measuring.prepare import CellLookup

_LEAST = 2**20


@dataclass(frozen=True)
class Options:
    """How to run, as opposed to what.

    Attributes:
        device: `auto`, or a torch device.
        trust_remote_code: Whether code and pickles from a download may run.
        memory: Bytes that hidden states, keys and values may take; None = half of what is free.
        weights: Bytes that a model's weights may take where they are computed with; None = as many
            as fit. The layers beyond rest in the host's memory or on disk.
        offload: Where layers rest until they are needed: one of `RESTS`. `device` is where the
            model runs, as far as they fit.
        executor: Where: one of `EXECUTORS`.
        slurm: What each SLURM job asks for, in submitit's words.

    Raises:
        RequestError: There is no such executor, SLURM is told what it is not asked to do, or the
            memory was not meant.
    """

    device: str = "auto"
    trust_remote_code: bool = False
    memory: int | None = None
    weights: int | None = None
    offload: str = "device"
    executor: str = "local"
    slurm: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.executor not in EXECUTORS:
            raise RequestError(
                f"there is no executor {self.executor!r}; use one of: {', '.join(EXECUTORS)}."
                + did_you_mean(self.executor, EXECUTORS)
            )
        if self.offload not in RESTS:
            raise RequestError(
                f"layers cannot be offloaded to {self.offload!r}; use one of: {', '.join(RESTS)}."
                + did_you_mean(self.offload, RESTS)
            )
        if self.slurm and self.executor != "slurm":
            raise RequestError("--slurm says what SLURM jobs ask for; add --executor slurm")
        _refuse_no_size("memory", self.memory)
        _refuse_no_size("weights", self.weights)


def _refuse_no_size(name: str, size: Any) -> None:
    """Refuse what is no number of bytes; a notebook's is of any type."""
    if size is not None and not isinstance(size, Integral):
        raise RequestError(
            f"{name} is {size!r}, which is no whole number of bytes; write 4 * 2**30 for 4GiB"
        )
    if size is not None and size < _LEAST:
        raise RequestError(
            f"{name} is {size} bytes, and no model runs in less than 1MiB; write 4GiB or 500MB "
            "(4 * 2**30 in Python)"
        )


@dataclass(frozen=True)
class Job:
    """Cells that lack something, and their documents.

    They differ in their runs alone, so that they are one cell of the ledger, measured and checked
    once; a cell that stops at an answer is by itself.
    """

    cells: tuple[CellLookup, ...]
    benchmark: Benchmark

    @property
    def requests(self) -> tuple[CellRequest, ...]:
        """What was asked for."""
        return tuple(cell.request for cell in self.cells)

    @property
    def title(self) -> str:
        """Its name in messages."""
        others = len(self.cells) - 1
        more = f" and {others} more of its views" if others else ""
        return f"{self.cells[0].request.title}{more}"


Begun = Callable[[CellLookup, CellStore], None]
"""Told of each cell that lacks something, when it is about to be measured."""
Done = Callable[[CellLookup, CellStore | Exception], None]
"""Told of each cell once: that nothing of it is missing any more, or what went wrong."""
