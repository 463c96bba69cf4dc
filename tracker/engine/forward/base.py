"""The base of what computes a module of a layer for all streams, and operations by stream."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor, nn

from tracker.engine.forward.streams import LayerStep
from tracker.engine.refusal import RefusalError
from tracker.models.hooks import replaced_forward
from tracker.models.parts.anatomy import LayerAnatomy
from tracker.models.parts.heads import Heads
from tracker.models.parts.sublayers import Sublayers
from tracker.models.slices import take


@dataclass(frozen=True)
class LayerSite:
    """One layer with the streams for which its modules are computed apart.

    Attributes:
        index: The number of the layer.
        layer: The layer.
        step: The changes of these streams at the layer.
        anatomy: The parts of the layers.
        batched: Whether each stream has a row of its own in all inputs of the layer.
    """

    index: int
    layer: nn.Module
    step: LayerStep
    anatomy: LayerAnatomy
    batched: bool

    @property
    def name(self) -> str:
        """The name of the layer in messages."""
        return self.anatomy.name(self.index)

    def streams_of(self, module: nn.Module) -> Sequence[int]:
        """List the entering streams, by their places, that a module of the layer computes."""
        step = self.step
        if "heads" in step.changes:
            heads = self.anatomy.at(Heads, self.index)
            if module in {*self.layer.get_submodule(heads.projection).modules()}:
                return [source for source, _ in step.heads]
        if step.has_sublayers:
            parts = self.anatomy.at(Sublayers, self.index)
            for sublayer, streams in ((parts.attention, step.computed), (parts.mlp, step.mlps)):
                if module in {*sublayer.modules()}:
                    return streams
        return range(len(step.entering))


class LayerState(Protocol):
    """Progress of the pass through one layer.

    Attributes:
        is_whole: Whether streams pass the layer for which no module is computed apart.
    """

    is_whole: bool


@dataclass
class ModuleFork(ABC):
    """The forward pass of one module of a layer, in which some streams differ.

    Each intervention within a layer is a subclass. A module may have several forks: the later one
    calls the earlier one as its `original`.

    Attributes:
        module: The module.
        original: Its forward pass without this fork, set on installation.
    """

    module: nn.Module
    original: Callable[..., Any] = field(init=False, repr=False)

    @classmethod
    @abstractmethod
    def of_layer(cls, site: LayerSite) -> Iterator[ModuleFork]:
        """Yield the forks that a layer needs; none where no stream has the intervention."""

    @abstractmethod
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the module's output for all streams, stream by stream."""

    def installed(self, layer: LayerState) -> AbstractContextManager[None]:
        """Replace the module's forward pass until exit, except while its layer is passed whole."""
        self.original = self.module.forward

        def call(*args: Any, **kwargs: Any) -> Any:
            forward = self.original if layer.is_whole else self.forward
            return forward(*args, **kwargs)

        return replaced_forward(self.module, call)


def by_stream(batch: Tensor, streams: int, owner: str = "a batch has") -> Tensor:
    """View a batch stream by stream: [streams × n, …] as [streams, n, …].

    RefusalError that its `owner` has no row a stream, where the rows cannot be divided so.
    """
    if len(batch) % streams:
        raise RefusalError(f"{owner} no row a stream")
    return batch.reshape(streams, -1, *batch.shape[1:])


def cut(value: Any, streams: int, entering: list[int]) -> Any:
    """Cut all tensors that have a row a stream to the streams that enter."""
    if isinstance(value, Tensor):
        return take(value, entering) if value.ndim and len(value) == streams else value
    if isinstance(value, tuple):
        return tuple(cut(item, streams, entering) for item in value)
    if isinstance(value, dict):
        return {name: cut(item, streams, entering) for name, item in value.items()}
    return value
