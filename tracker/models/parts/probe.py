"""Find parts: a model reads a short text while the calls of its modules are recorded."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, Self, TypeVar

import torch
from torch import Tensor, nn

from tracker.core.changes import Change
from tracker.core.errors import CellError, ModelError, translate_errors
from tracker.models.layers import find_layers

if TYPE_CHECKING:
    from transformers import PreTrainedModel

T = TypeVar("T")
P = TypeVar("P", bound="LayerPart")


class LayerPart(Protocol):
    """Parts of one kind in one layer.

    Attributes:
        KIND: Plural name of the parts in messages.
        COMPONENTS: Values to leave out of `component` if no layer has such parts.
        NEEDS: Requirements for a layer's parts to be found.
    """

    KIND: ClassVar[str]
    COMPONENTS: ClassVar[str]
    NEEDS: ClassVar[str]

    @classmethod
    def find(cls, finder: PartFinder) -> Sequence[Any]:
        """Find the parts of every layer; None for a layer without such parts."""

    def remove(self, layer: nn.Module, parts: Sequence[Change], name: str) -> None:
        """Remove some of the parts from a copy of the layer, which messages call `name`.

        Raises CellError if the layer has no such part, or cannot work without it.
        """


@dataclass(frozen=True)
class Call:
    """One call of a module.

    Attributes:
        module: The module.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        output: Its return value.
    """

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any

    @property
    def arguments(self) -> tuple[Any, ...]:
        """All arguments, positional and by keyword."""
        return (*self.args, *self.kwargs.values())


@dataclass(frozen=True)
class PartFinder:
    """Finds the parts of a model's layers, each kind once.

    Attributes:
        model: A causal language model of transformers.
        layers: Its decoder layers.
        device: The device of its inputs.
        alone: Context in which the model may be called.
        parts: Parts found so far: kind → one entry per layer.
    """

    model: PreTrainedModel
    layers: nn.ModuleList
    device: torch.device
    alone: Callable[[], AbstractContextManager[Any]] = nullcontext
    parts: dict[Any, Any] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, model: PreTrainedModel) -> Self:
        """Return a finder for a model with weights on its inputs' device or the meta device."""
        return cls(model, find_layers(model), model.device)

    def find(self, kind: type[P]) -> Sequence[P | None]:
        """Find one kind of parts in every layer; the first call runs the model.

        Raises ModelError if the model does not run, or its layers have no such parts by
        construction.
        """
        if not self.parts.get(kind):
            with self.alone():
                self.parts[kind] = kind.find(self)
        parts: Sequence[P | None] = self.parts[kind]
        return parts

    def at(self, kind: type[P], layer: int) -> P:
        """Return the parts of one kind in a layer; raise CellError if it has none."""
        parts = self.find(kind)
        part = parts[layer]
        if part is not None:
            return part
        lacking = [str(index) for index, entry in enumerate(parts) if entry is None]
        needed = f" (needed: {kind.NEEDS})" if kind.NEEDS else ""
        why = f"no {kind.KIND} that could be taken out alone{needed}"
        if len(lacking) == len(parts):
            model = type(self.model).__name__
            raise CellError(f"{model} has {why}; leave {kind.COMPONENTS} out of 'component'")
        raise CellError(
            f"{self.name(layer)} has {why}; leave such layers out of 'layer': {', '.join(lacking)}"
        )

    def name(self, layer: int) -> str:
        """Return the name of a layer for messages."""
        return f"layer {layer} of {type(self.model).__name__}"

    @torch.inference_mode()
    def probe(
        self,
        kind: type[LayerPart],
        tokens: int,
        find: Callable[[nn.Module, Sequence[Call]], T | None],
    ) -> list[T | None]:
        """Find parts of each layer by the calls of its modules while the model reads a short text.

        Args:
            kind: The kind of parts.
            tokens: Length of the text.
            find: Called with a layer and the calls of its modules, itself among them, in the order
                in which they ended.

        Returns:
            The result for each layer.

        Raises:
            ModelError: The model does not take the text.
        """
        parts: dict[int, T] = {}
        calls: list[Call] = []

        def record(
            module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
        ) -> None:
            calls.append(Call(module, args, kwargs, output))

        def finish(index: int, layer: nn.Module, *_: object) -> None:
            if (part := find(layer, tuple(calls))) is not None:
                parts[index] = part

        with ExitStack() as stack:
            for module in dict.fromkeys(m for layer in self.layers for m in layer.modules()):
                stack.enter_context(module.register_forward_hook(record, with_kwargs=True))
            for index, layer in enumerate(self.layers):
                stack.enter_context(layer.register_forward_pre_hook(lambda *_: calls.clear()))
                stack.enter_context(layer.register_forward_hook(partial(finish, index)))
            with translate_errors(
                lambda error: ModelError(
                    f"{type(self.model).__name__}: its {kind.KIND} cannot be told apart ({error}); "
                    f"leave {kind.COMPONENTS} out of 'component'"
                )
            ):
                self.model(text(tokens, self.device), use_cache=False)
        return [parts.get(index) for index in range(len(self.layers))]


def text(tokens: int, device: torch.device) -> Tensor:
    """Build a short text [1, tokens] of different tokens."""
    return torch.arange(1, tokens + 1, device=device)[None]


def paths_in(layer: nn.Module) -> dict[nn.Module, str]:
    """Return the path of each module of a layer."""
    return {module: path for path, module in layer.named_modules()}


def integer_tables(values: Iterable[Any]) -> list[Tensor]:
    """Return the tables of integers [tokens, chosen] among some values."""
    tensors = [value for value in values if isinstance(value, Tensor) and value.ndim == 2]
    return [tensor for tensor in tensors if tensor.dtype in (torch.int64, torch.int32)]
