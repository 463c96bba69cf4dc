"""Run several passes of a model in lockstep, so that offloaded weights are loaded once for all.

Each pass is one or several forward passes of the model, in a greenlet of its own. It pauses before
a layer whose weights are offloaded. When all passes have paused or ended, one layer is loaded and
all passes that wait for it use it, then the next layer upwards.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

import torch
from greenlet import getcurrent, greenlet
from torch import nn

from tracker.models.offloaded import OffloadedWeights

T = TypeVar("T")


def side_by_side(
    weights: OffloadedWeights | None, model: nn.Module, passes: Iterable[Callable[[], T]]
) -> Iterator[T]:
    """Run passes and load each offloaded layer as rarely as possible.

    Without offloaded weights, each pass runs when its result is requested. A pass may call this
    function itself: its passes then join those that are already running.

    Args:
        weights: The offloaded weights; None if all weights are in place.
        model: The model that the passes call, or a copy of it; a pass may replace modules'
            `forward`.
        passes: The functions to run. None may depend on the result of another one.

    Yields:
        The result of each pass, in order; an exception in one of them ends all.
    """
    if weights is None:
        for each in passes:
            yield each()
        return
    modules = [*model.modules()]
    started = [_Pass(each, modules) for each in passes]
    hub = getattr(weights.wait, "__self__", None)
    if isinstance(hub, _Hub):
        yield from hub.join(started)
    else:
        yield from _Hub(weights).run(started)


@contextmanager
def reporting(
    weights: OffloadedWeights | None, due: int, progress: Callable[[int], None]
) -> Iterator[Callable[[int], None]]:
    """Report the progress of passes without counting anything twice.

    Args:
        weights: The offloaded weights; each loaded layer reports a share of the total ahead. None
            if all weights are in place.
        due: The total to report.
        progress: Called with each increment of progress.

    Yields:
        The function to call with the amount that a pass has finished.
    """
    told = done = came_past = 0

    def tell(total: int) -> None:
        nonlocal told
        if total > told:
            progress(total - told)
            told = total

    def found(more: int) -> None:
        nonlocal done
        done += more
        tell(done)

    if weights is None:
        yield found
        return

    def came() -> None:
        nonlocal came_past
        came_past += 1
        # Each layer is used by one stream more than the one below, so time grows quadratically.
        tell(int(due * min(1.0, came_past / len(weights.times)) ** 2))

    weights.heard.append(came)
    try:
        yield found
    finally:
        weights.heard.remove(came)


class _Hub:
    """Scheduler of passes: each runs until it needs a layer or the results of other passes."""

    def __init__(self, weights: OffloadedWeights) -> None:
        self._weights = weights
        self._home = getcurrent()
        self._ready: list[_Pass[Any]] = []
        self._waiting: dict[int, list[_Pass[Any]]] = {}
        self._joined: list[tuple[_Pass[Any], Sequence[_Pass[Any]]]] = []
        self._now: _Pass[Any] | None = None

    # On exit, inference mode restores the mode at entry, so it must be on for all passes.
    @torch.inference_mode()
    def run(self, passes: Sequence[_Pass[T]]) -> list[T]:
        """Run passes until all have ended."""
        before, self._weights.wait = self._weights.wait, self.wait
        self._ready, layer = [*passes], -1
        try:
            while self._ready or self._waiting:
                while self._ready:
                    self._go_on(self._ready.pop(0))
                if self._waiting:
                    # Upwards, then from the bottom again for passes that joined later.
                    layer = min(self._waiting, key=lambda each: (each < layer, each))
                    self._weights.bring(layer)
                    self._ready = self._waiting.pop(layer)
        finally:
            self._weights.wait = before
            left = [*self._ready, *(each for some in self._waiting.values() for each in some)]
            for each in [*left, *(waiting for waiting, _ in self._joined)]:
                each.end()
        return [each.found() for each in passes]

    def join(self, passes: Sequence[_Pass[T]]) -> list[T]:
        """Run passes beside all others and return their results to the pass that calls."""
        assert self._now is not None
        self._joined.append((self._now, passes))
        self._ready += passes
        self._home.switch()
        return [each.found() for each in passes]

    def wait(self, layer: int) -> None:
        """Pause the running pass until a layer is loaded."""
        assert self._now is not None
        self._waiting.setdefault(layer, []).append(self._now)
        self._home.switch()

    def _go_on(self, task: _Pass[Any]) -> None:
        self._now = task
        task.go_on()
        done = [each for each in self._joined if all(other.has_ended for other in each[1])]
        self._ready += [waiting for waiting, _ in done]
        self._joined = [each for each in self._joined if each not in done]


class _Pass(Generic[T]):
    """A pausable function, with the `forward` methods that it has put into modules."""

    def __init__(self, make: Callable[[], T], modules: Sequence[nn.Module]) -> None:
        self._make = make
        self._modules = modules
        self._forwards = self._usual = self._taken()
        self._run = greenlet(self._all)
        self._outcome: Future[T] = Future()

    @property
    def has_ended(self) -> bool:
        """True if the pass has returned or failed."""
        return bool(self._run.dead)

    def found(self) -> T:
        """Return the result of the pass, or raise its exception."""
        return self._outcome.result()

    def go_on(self) -> None:
        """Resume the pass until it pauses again."""
        self._put(self._forwards)
        if not self._run:  # the pass ends in the greenlet that first resumes it
            self._run.parent = getcurrent()
        try:
            self._run.switch()
        finally:
            self._forwards = self._taken()
            self._put(self._usual)

    def end(self) -> None:
        """Abort the pass, so that it leaves its context managers."""
        self._put(self._forwards)
        self._run.throw()
        self._put(self._usual)

    def _all(self) -> None:
        try:
            self._outcome.set_result(self._make())
        except Exception as error:  # noqa: BLE001  raised again where the result is read
            self._outcome.set_exception(error)

    def _taken(self) -> dict[nn.Module, Any]:
        return {m: vars(m)["forward"] for m in self._modules if "forward" in vars(m)}

    def _put(self, forwards: Mapping[nn.Module, Any]) -> None:
        for module in self._modules:
            if module in forwards:
                vars(module)["forward"] = forwards[module]
            else:
                vars(module).pop("forward", None)
