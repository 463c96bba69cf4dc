"""Find parts of layers by recording the calls of modules while the model reads a short text."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, Self, TypeVar

import torch
from torch import Tensor, nn

from tracker.models.hooks import Args, Kwargs
from tracker.models.layers import find_layers
from tracker.schema.changes import Change
from tracker.schema.errors import CellError, ModelError, translate_errors

if TYPE_CHECKING:
    from transformers import PreTrainedModel

T = TypeVar("T")
P = TypeVar("P", bound="LayerPart")


class LayerPart(Protocol):
    """Interface for the parts of one kind (e.g. heads) in one layer.

    Attributes:
        KIND: Name of the parts in messages, in the plural.
        COMPONENTS: Values of the experiment key `component` that select parts of this kind.
        NEEDS: Sentences that state under which conditions parts can be removed; may be empty.
    """

    KIND: ClassVar[str]
    COMPONENTS: ClassVar[str]
    NEEDS: ClassVar[str]

    @classmethod
    def find(cls, finder: PartFinder) -> Sequence[Any]:
        """Find the parts of every layer.

        For a layer without such parts, the list contains None.
        """

    def remove(self, layer: nn.Module, parts: Sequence[Change], name: str) -> None:
        """Remove some of the parts from a copied layer.

        `name` is the name of the layer in error messages.

        Raises CellError if a part does not exist, or if the layer cannot run without the parts.
        """


@dataclass(frozen=True)
class ModuleCall:
    """Record of one call of a module.

    Attributes:
        module: The called module.
        args: Positional arguments of the call.
        kwargs: Keyword arguments of the call.
        output: Return value of the call.
    """

    module: nn.Module
    args: Args
    kwargs: Kwargs
    output: Any

    @property
    def arguments(self) -> tuple[Any, ...]:
        """All arguments of the call: positional arguments, then values of keyword arguments."""
        return (*self.args, *self.kwargs.values())


@dataclass(frozen=True)
class PartFinder:
    """Finder of the parts of a model's layers (e.g. heads), with a cache of the results.

    Attributes:
        model: A causal language model of transformers.
        layers: The model's decoder layers.
        device: The device on which the model expects its inputs.
        exclusive_use: Function that returns a context manager, e.g. a lock, for calling the model.
        parts: Parts found so far: kind → one entry per layer.
    """

    model: PreTrainedModel
    layers: nn.ModuleList
    device: torch.device
    exclusive_use: Callable[[], AbstractContextManager[Any]] = nullcontext
    parts: dict[Any, Any] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, model: PreTrainedModel) -> Self:
        """Return a finder for a model that is on a single device."""
        return cls(model, find_layers(model), model.device)

    def find(self, kind: type[P]) -> Sequence[P | None]:
        """Find the parts of one kind in every layer.

        The first call for a kind runs the model; the result is cached.

        Raises ModelError if the model does not run, or if a layer has no attention or MLP.
        """
        if not self.parts.get(kind):
            with self.exclusive_use():
                self.parts[kind] = kind.find(self)
        parts: Sequence[P | None] = self.parts[kind]
        return parts

    def get_part(self, kind: type[P], layer: int) -> P:
        """Return the parts of one kind in a layer; raise CellError if there are none."""
        parts = self.find(kind)
        part = parts[layer]
        if part is not None:
            return part
        layers = [str(index) for index, entry in enumerate(parts) if entry is None]
        owner, advice = self.layer_name(layer), f"layers {', '.join(layers)} out of 'layer'"
        if len(layers) == len(parts):
            owner, advice = type(self.model).__name__, f"{kind.COMPONENTS} out of 'component'"
        message = f"{owner} has no {kind.KIND} that can be removed one by one; leave {advice}"
        raise CellError(f"{message}. {kind.NEEDS}" if kind.NEEDS else message)

    def layer_name(self, layer: int) -> str:
        """Return the name of a layer for messages."""
        return f"layer {layer} of {type(self.model).__name__}"

    @torch.inference_mode()
    def probe(
        self,
        kind: type[LayerPart],
        n_tokens: int,
        find_part: Callable[[nn.Module, Sequence[ModuleCall]], T | None],
    ) -> list[T | None]:
        """Run the model on a short text, and find parts in the recorded calls.

        Args:
            kind: The kind of parts.
            n_tokens: Number of tokens of the text.
            find_part: Function that returns the parts of a layer, or None. The arguments of the
                function are the layer and the recorded calls of the layer's modules.

        Returns:
            The result of `find_part` for each layer.

        Raises:
            ModelError: The model fails on the text.
        """
        parts: dict[int, T] = {}
        calls: list[ModuleCall] = []

        def record(module: nn.Module, args: Args, kwargs: Kwargs, output: Any) -> None:
            calls.append(ModuleCall(module, args, kwargs, output))

        def finish(index: int, layer: nn.Module, *_: object) -> None:
            if (part := find_part(layer, tuple(calls))) is not None:
                parts[index] = part

        with ExitStack() as stack:
            for module in {m: None for layer in self.layers for m in layer.modules()}:
                stack.enter_context(module.register_forward_hook(record, with_kwargs=True))
            for index, layer in enumerate(self.layers):
                stack.enter_context(layer.register_forward_pre_hook(lambda *_: calls.clear()))
                stack.enter_context(layer.register_forward_hook(partial(finish, index)))
            with translate_errors(
                lambda error: ModelError(
                    f"the {kind.KIND} of {type(self.model).__name__} cannot be found, because the "
                    f"model fails on a test text ({error}); leave {kind.COMPONENTS} out of "
                    "'component'"
                )
            ):
                self.model(probe_text(n_tokens, self.device), use_cache=False)
        return [parts.get(index) for index in range(len(self.layers))]


def probe_text(n_tokens: int, device: torch.device) -> Tensor:
    """Build a short text [1, tokens] in which all tokens differ."""
    return torch.arange(1, n_tokens + 1, device=device)[None]


def module_paths(layer: nn.Module) -> dict[nn.Module, str]:
    """Return the path of each module of a layer, keyed by module."""
    return {module: path for path, module in layer.named_modules()}


def integer_tables(values: Iterable[Any]) -> list[Tensor]:
    """Return all two-dimensional tensors of integers among some values."""
    tensors = [value for value in values if isinstance(value, Tensor) and value.ndim == 2]
    return [tensor for tensor in tensors if tensor.dtype in (torch.int64, torch.int32)]
