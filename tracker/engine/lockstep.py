"""Many passes of a model side by side, so that weights that come past come past once for all.

Each pass is the model's own forward pass, or several, in a greenlet of its own. Before a layer
whose weights rest elsewhere it stops. When all have stopped or ended, one layer is brought in, all
that wait for it pass it, and so on upwards: what a layer is brought in for is everybody who wants
it.
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
    """Run passes, so that each layer is brought in as rarely as can be.

    Where all weights are in place, each runs when its result is asked for. Passes may run others
    side by side themselves: these join those that run already.

    Args:
        weights: The weights that rest elsewhere; None where all are in place.
        model: The model that they call, or a copy of it; each may replace its modules' `forward`.
        passes: What to run. None may rest on what another one does.

    Yields:
        What each returns, in order; an exception of one ends all.
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
    """Report what passes find, each thing once, and not only at their end.

    Args:
        weights: The weights that rest elsewhere; with each layer of them that comes past, a share
            of what is due is reported ahead. None where all are in place.
        due: How much is found in all.
        progress: Called with how much more there is.

    Yields:
        What is called with how much a pass has found.
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
        # Each layer is passed by one stream more than the one below, so that time goes as a square.
        tell(int(due * min(1.0, came_past / len(weights.times)) ** 2))

    weights.heard.append(came)
    try:
        yield found
    finally:
        weights.heard.remove(came)


class _Hub:
    """Runs passes by turns: each runs until it needs a layer, or what others find."""

    def __init__(self, weights: OffloadedWeights) -> None:
        self._weights = weights
        self._home = getcurrent()
        self._ready: list[_Pass[Any]] = []
        self._waiting: dict[int, list[_Pass[Any]]] = {}
        self._joined: list[tuple[_Pass[Any], Sequence[_Pass[Any]]]] = []
        self._now: _Pass[Any] | None = None

    # What a guard of inference mode puts back is what was there when it was entered: on for all.
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
                    # Upwards, and from the bottom again for those that came later.
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
        """Run passes beside all others, and let the one that asks wait for what they find."""
        assert self._now is not None
        self._joined.append((self._now, passes))
        self._ready += passes
        self._home.switch()
        return [each.found() for each in passes]

    def wait(self, layer: int) -> None:
        """Let the pass that runs wait for a layer."""
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
    """A function that runs for a while, and the `forward`s that it puts into modules meanwhile."""

    def __init__(self, make: Callable[[], T], modules: Sequence[nn.Module]) -> None:
        self._make = make
        self._modules = modules
        self._forwards = self._usual = self._taken()
        self._run = greenlet(self._all)
        self._outcome: Future[T] = Future()

    @property
    def has_ended(self) -> bool:
        """Whether it has returned, or failed."""
        return bool(self._run.dead)

    def found(self) -> T:
        """What it returned; raises what it raised."""
        return self._outcome.result()

    def go_on(self) -> None:
        """Run from where it stopped to where it stops again."""
        self._put(self._forwards)
        if not self._run:  # it ends where it is begun, whoever made it
            self._run.parent = getcurrent()
        try:
            self._run.switch()
        finally:
            self._forwards = self._taken()
            self._put(self._usual)

    def end(self) -> None:
        """Let it leave whatever it is in."""
        self._put(self._forwards)
        self._run.throw()
        self._put(self._usual)

    def _all(self) -> None:
        try:
            self._outcome.set_result(self._make())
        except Exception as error:  # noqa: BLE001  raised where the outcome is asked for
            self._outcome.set_exception(error)

    def _taken(self) -> dict[nn.Module, Any]:
        return {m: vars(m)["forward"] for m in self._modules if "forward" in vars(m)}

    def _put(self, forwards: Mapping[nn.Module, Any]) -> None:
        for module in self._modules:
            if module in forwards:
                vars(module)["forward"] = forwards[module]
            else:
                vars(module).pop("forward", None)
