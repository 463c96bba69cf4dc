"""Run several forward passes in lockstep, so that each offloaded layer is loaded once.

Each pass is a function that calls the model, in its own greenlet. A pass pauses before a layer
whose weights are offloaded. When all passes have paused, one layer is loaded, and all passes that
wait for the layer continue.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from itertools import chain
from typing import Any, Generic, TypeVar

import torch
from greenlet import getcurrent, greenlet
from torch import nn

from tracker.models.offloaded import OffloadedWeights

T = TypeVar("T")


def run_lockstep(
    weights: OffloadedWeights | None, model: nn.Module, functions: Iterable[Callable[[], T]]
) -> Iterator[T]:
    """Run functions that call a model, loading each offloaded layer once for all functions.

    The functions wait for each other at offloaded layers. Without offloaded weights, one function
    runs after the other.

    Args:
        weights: The offloaded weights; None if no weights are offloaded.
        model: The model that the functions call, or a copy of the model.
        functions: The functions to run, which must not depend on each other's results.

    Yields:
        The result of each function, in order. An exception in one function stops all other
        functions.
    """
    if weights is None:
        for function in functions:
            yield function()
        return
    modules = [*model.modules()]
    new_passes = [_Pass(function, modules) for function in functions]
    scheduler = getattr(weights.wait, "__self__", None)
    if isinstance(scheduler, _Scheduler):
        yield from scheduler.join(new_passes)
    else:
        yield from _Scheduler(weights).run(new_passes)


@contextmanager
def report_progress(
    weights: OffloadedWeights | None, n_due: int, progress: Callable[[int], None]
) -> Iterator[Callable[[int], None]]:
    """Count finished work and loaded layers as progress in a `with` block.

    Args:
        weights: The offloaded weights, whose loading counts as work; None if no weights are
            offloaded.
        n_due: The total amount of work.
        progress: Function that is called with the amount of work done since the last call.

    Yields:
        A function to call with each amount of finished work.
    """
    n_reported = n_done = n_loaded = 0

    def report_total(n_finished: int) -> None:
        nonlocal n_reported
        if n_finished > n_reported:
            progress(n_finished - n_reported)
            n_reported = n_finished

    def add_finished(n_added: int) -> None:
        nonlocal n_done
        n_done += n_added
        report_total(n_done)

    if weights is None:
        yield add_finished
        return

    def count_layer() -> None:
        nonlocal n_loaded
        n_loaded += 1
        # Each layer is used by one stream more than the one below, so time grows quadratically.
        report_total(int(n_due * min(1.0, n_loaded / len(weights.load_counts)) ** 2))

    weights.load_callbacks.append(count_layer)
    try:
        yield add_finished
    finally:
        weights.load_callbacks.remove(count_layer)


class _Scheduler:
    """Scheduler that switches between functions (passes) which wait for offloaded layers."""

    def __init__(self, weights: OffloadedWeights) -> None:
        self._weights = weights
        self._main_greenlet = getcurrent()
        self._ready: list[_Pass[Any]] = []
        self._waiting: dict[int, list[_Pass[Any]]] = {}
        self._joins: list[tuple[_Pass[Any], Sequence[_Pass[Any]]]] = []
        self._current: _Pass[Any] | None = None

    # On exit, inference mode restores the mode at entry, so it must be on for all passes.
    @torch.inference_mode()
    def run(self, passes: Sequence[_Pass[T]]) -> list[T]:
        """Run functions that call the model, and return their results in order.

        A layer is loaded once for all functions that wait for the layer.
        """
        previous_wait, self._weights.wait = self._weights.wait, self.wait
        self._ready, layer = [*passes], -1
        try:
            while self._ready or self._waiting:
                while self._ready:
                    self._resume(self._ready.pop(0))
                if self._waiting:
                    # Upwards, then from the bottom again for passes that joined later.
                    layer = min(self._waiting, key=lambda number: (number < layer, number))
                    self._weights.load_layer(layer)
                    self._ready = self._waiting.pop(layer)
        finally:
            self._weights.wait = previous_wait
            joining = (task for task, _ in self._joins)
            for task in [*self._ready, *chain.from_iterable(self._waiting.values()), *joining]:
                task.abort()
        return [task.result() for task in passes]

    def join(self, passes: Sequence[_Pass[T]]) -> list[T]:
        """Pause the current function until `passes` have ended; return their results in order."""
        assert self._current is not None
        self._joins.append((self._current, passes))
        self._ready += passes
        self._main_greenlet.switch()
        return [task.result() for task in passes]

    def wait(self, layer: int) -> None:
        """Pause the current function until the layer `layer` is loaded."""
        assert self._current is not None
        self._waiting.setdefault(layer, []).append(self._current)
        self._main_greenlet.switch()

    def _resume(self, task: _Pass[Any]) -> None:
        self._current = task
        task.resume()
        finished_joins = [join for join in self._joins if all(task.has_ended for task in join[1])]
        self._ready += [waiting for waiting, _ in finished_joins]
        self._joins = [join for join in self._joins if join not in finished_joins]


class _Pass(Generic[T]):
    """A function that runs in its own greenlet and can be paused and resumed."""

    def __init__(self, function: Callable[[], T], modules: Sequence[nn.Module]) -> None:
        self._function = function
        self._modules = modules
        self._forwards = self._original_forwards = self._installed_forwards()
        self._greenlet = greenlet(self._run)
        self._outcome: Future[T] = Future()

    @property
    def has_ended(self) -> bool:
        """True if the function has returned or raised an exception."""
        return bool(self._greenlet.dead)

    def result(self) -> T:
        """Return the function's result, or raise the exception that the function raised."""
        return self._outcome.result()

    def resume(self) -> None:
        """Continue the paused function until the function waits for a layer or ends."""
        self._install_forwards(self._forwards)
        if not self._greenlet:  # the pass ends in the greenlet that first resumes it
            self._greenlet.parent = getcurrent()
        try:
            self._greenlet.switch()
        finally:
            self._forwards = self._installed_forwards()
            self._install_forwards(self._original_forwards)

    def abort(self) -> None:
        """Raise an exception in the paused function."""
        self._install_forwards(self._forwards)
        self._greenlet.throw()
        self._install_forwards(self._original_forwards)

    def _run(self) -> None:
        try:
            self._outcome.set_result(self._function())
        except Exception as error:  # noqa: BLE001  raised again where the result is read
            self._outcome.set_exception(error)

    def _installed_forwards(self) -> dict[nn.Module, Any]:
        return {m: vars(m)["forward"] for m in self._modules if "forward" in vars(m)}

    def _install_forwards(self, forwards: Mapping[nn.Module, Any]) -> None:
        for module in self._modules:
            if module in forwards:
                vars(module)["forward"] = forwards[module]
            else:
                vars(module).pop("forward", None)
