"""Make smaller copies of a model with fewer heads, experts or neurons in each layer.

A configuration of transformers states one number of heads, experts or neurons for all layers.
Therefore, equally many parts must be removed from each layer.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from tracker.models.devices import take_entries
from tracker.models.layers import find_layers
from tracker.models.parts.anatomy import PART_CLASSES, LayerAnatomy, NumberedParts
from tracker.models.parts.heads import Heads
from tracker.models.parts.neurons import Neurons
from tracker.models.pruned import build_uninitialised, prune_model, reload_config
from tracker.schema.changes import Ablation
from tracker.schema.errors import CellError, ModelError, attempt, first_line
from tracker.schema.formats import join_words
from tracker.schema.grouping import group_by
from tracker.schema.kinds import KIND_STYLES, Component
from tracker.schema.model_parts import EXPERT_COUNT_KEYS, MLP_WIDTH_KEYS, mlp_width

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

PartNumbers = Mapping[Component, int]
"""Number of parts in each layer, by the kind of the parts, such as heads."""
_NUMBER_KEYS: Mapping[Component, Sequence[str]] = {
    "head": ("num_attention_heads",),
    "kv_head": ("num_key_value_heads", "num_kv_heads"),
    "expert": EXPERT_COUNT_KEYS,
    "neuron": MLP_WIDTH_KEYS,
}
"""Configuration keys that contain the number of parts."""


@dataclass
class Narrowing:
    """Plan for removing some heads, experts or neurons from each layer of a model.

    Attributes:
        old_numbers: Numbers of parts per layer in the original model.
        numbers: Numbers of parts per layer in the narrowed model.
        head_width: Width of a head; None if no heads are removed.
        group_size: Number of neurons in each group of neurons.
        entries: (Layer, path of a module) → length of a tensor's axis → indices that remain on this
            axis. An empty path stands for modules of the layer without an entry.
    """

    old_numbers: dict[Component, int] = field(default_factory=dict)
    numbers: dict[Component, int] = field(default_factory=dict)
    head_width: int | None = None
    group_size: int = 1
    entries: dict[tuple[int, str], dict[int, list[int]]] = field(
        default_factory=lambda: defaultdict(dict)
    )

    def resize(self, config: PreTrainedConfig, numbers: PartNumbers) -> None:
        """Write new numbers of heads, experts or neurons per layer into a configuration.

        If heads are removed and the configuration lacks their width, the method adds the width.
        """
        for component, number in numbers.items():
            size = self.group_size if component == "neuron" else 1
            for key in _NUMBER_KEYS[component]:
                value = getattr(config, key, None)
                if key == "n_inner" and hasattr(config, key):  # None means a multiple
                    value = mlp_width(config)
                if value == size * self.old_numbers[component]:
                    setattr(config, key, size * number)
        if self.head_width is not None and getattr(config, "head_dim", None) is None:
            config.head_dim = self.head_width

    def check_config(self, model: PreTrainedModel) -> None:
        """Raise ModelError if the configuration's class refuses the reduced numbers of parts.

        The message lists the numbers that the class accepts.
        """

        def find_problem(numbers: PartNumbers) -> str:
            shell = prune_model(model)
            self.resize(shell.config.get_text_config(), numbers)
            result = attempt(partial(reload_config, shell))
            return first_line(result) if isinstance(result, Exception) else ""

        if not (problem := find_problem(self.numbers)):
            return
        changed = {c: n for c, n in self.old_numbers.items() if n != self.numbers[c]}
        unit, old = min(changed.items(), key=lambda item: item[1])
        # Heads are removed from every group alike.
        step = self.numbers["kv_head"] if unit == "head" else 1
        scaled = (
            self.numbers | {c: n // old * k for c, n in changed.items()}
            for k in range(step, old, step)
        )
        accepted = [str(numbers[unit]) for numbers in scaled if not find_problem(numbers)]
        raise ModelError(
            f"{type(model.config).__name__} does not accept {self.numbers[unit]} instead of {old} "
            f"{KIND_STYLES[unit].plural} in each layer; it accepts "
            f"{join_words(accepted, 'or') or 'no smaller number'} ({problem})"
        )

    def build(self, model: PreTrainedModel) -> Any:
        """Build the narrowed model with uninitialised weights.

        Raises ModelError if the configuration or the model's class does not accept the reduced
        numbers of parts. The narrowed model is on the meta device if `model` is, else on the CPU.
        """
        self.check_config(model)
        shell = prune_model(model)
        self.resize(shell.config.get_text_config(), self.numbers)
        device = "meta" if model.device.type == "meta" else "cpu"
        narrow = attempt(partial(build_uninitialised, shell, device))
        if isinstance(narrow, Exception):
            plurals = [KIND_STYLES[unit].plural for unit in self.numbers]
            text = f"{type(model).__name__} cannot be built with fewer {join_words(plurals)}"
            raise ModelError(f"{text}: {first_line(narrow)}")
        return narrow


def plan_narrowing(
    ablation: Ablation,
    find_parts: Callable[[type[NumberedParts]], Mapping[int, NumberedParts]],
    owner: str,
) -> Narrowing:
    """Plan which heads, experts and neurons each layer of a smaller model keeps.

    Args:
        ablation: The parts to remove.
        find_parts: Function that takes a kind of parts, such as `Heads`, and returns the parts of
            each layer by the layer's index.
        owner: Name of the model in messages.

    Returns:
        The plan.

    Raises:
        ModelError: A part does not exist, or layers do not have and lose equally many parts.
    """
    plan = Narrowing()
    for kind, changes in group_by(ablation.parts, lambda c: PART_CLASSES[c.component]).items():
        assert issubclass(kind, NumberedParts)
        parts, by_layer = find_parts(kind), group_by(changes, lambda change: change.layer)
        if strange_layers := by_layer.keys() - parts.keys():
            raise ModelError(f"layer {min(strange_layers)} of {owner} has no {kind.KIND}")
        narrowed = dict(parts)
        for layer, removed in by_layer.items():
            try:
                narrowed[layer], entries = parts[layer].narrow(removed, f"layer {layer} of {owner}")
            except CellError as error:  # nothing has been measured yet
                raise ModelError(str(error)) from None
            part = parts[layer]
            for path in part.maps if isinstance(part, Neurons) else ("",):
                plan.entries[layer, path] |= entries
        numbers = {layer: (parts[layer].counts, part.counts) for layer, part in narrowed.items()}
        _refuse_uneven(numbers, changes[0].component)
        old, new = next(iter(numbers.values()))
        plan.old_numbers |= old
        plan.numbers |= new
        part = next(iter(parts.values()))
        if isinstance(part, Heads):
            plan.head_width = part.width
        elif isinstance(part, Neurons):
            plan.group_size = part.size
    return plan


def _refuse_uneven(numbers: Mapping[int, tuple[PartNumbers, PartNumbers]], unit: Component) -> None:
    """Raise ModelError unless all layers have equally many parts, and lose equally many parts.

    `numbers` contains the numbers of parts before and after the removal, by layer.
    """
    counts = {layer: (old[unit], new[unit]) for layer, (old, new) in numbers.items()}
    first, last = min(counts, key=counts.__getitem__), max(counts, key=counts.__getitem__)
    if counts[first] == counts[last]:
        return
    plural = KIND_STYLES[unit].plural
    raise ModelError(
        f"layer {first} keeps {counts[first][1]} of {counts[first][0]} {plural}, and layer {last} "
        f"keeps {counts[last][1]} of {counts[last][0]} {plural}, but plain transformers requires "
        "the same number in all layers. Remove equally many from each layer, as 'tracker prune' "
        "does with 'uniform: true'"
    )


def plan_removal(anatomy: LayerAnatomy, ablation: Ablation) -> Narrowing:
    """Plan the removal of heads, experts or neurons from a loaded model.

    `anatomy` finds the parts of the model, and `ablation` contains the parts to remove.
    """

    def find_parts(kind: type[NumberedParts]) -> dict[int, NumberedParts]:
        return {layer: part for layer, part in enumerate(anatomy.find(kind)) if part is not None}

    return plan_narrowing(ablation, find_parts, type(anatomy.model).__name__)


def narrowed_copies(model: PreTrainedModel, ablation: Ablation) -> tuple[Any, Any]:
    """Make two copies of a model without some parts: one to save, one to measure.

    Args:
        model: A causal language model of transformers.
        ablation: The heads, experts or neurons to remove, the same number in each layer.

    Returns:
        The copy to save, with smaller tensors, and the copy to measure. In the copy to measure,
        output projections ignore the removed heads and neurons.

    Raises:
        ModelError: Plain transformers could not load the copy; the message gives the reason.
    """
    anatomy, owner = LayerAnatomy.of(model), type(model).__name__
    if len({parameter.device for parameter in model.parameters()}) > 1:
        raise ModelError(
            f"{owner} is on several devices; to remove heads, experts or neurons, use --device cpu"
        )

    plan = plan_removal(anatomy, ablation)
    narrow = plan.build(model)
    measured = prune_model(model, changes=anatomy.part_changes(ablation))
    layers = enumerate(find_layers(narrow))
    keys = {m: (number, path) for number, layer in layers for path, m in layer.named_modules()}
    full_modules = dict(measured.named_modules())
    for path, module in narrow.named_modules():
        number, layer_path = keys.get(module, (-1, ""))
        default = plan.entries.get((number, ""), {})
        entries = plan.entries.get((number, layer_path), default)
        for table in ("_parameters", "_buffers"):
            values, full_values = vars(module)[table], vars(full_modules[path])[table]
            for name in values.keys() - module._non_persistent_buffers_set:
                full_name = f"{path}.{name} of {owner}"
                values[name] = _cut_tensor(full_values[name], values[name], entries, full_name)
    narrow.generation_config = getattr(model, "generation_config", None)
    return narrow.to(model.device), measured


def _cut_tensor(
    value: Tensor | None, expected: Tensor | None, entries: Mapping[int, Sequence[int]], name: str
) -> Tensor | None:
    """Shorten a tensor to the shape of the tensor `expected`.

    `entries` maps the length of an axis to the indices that remain on this axis. Raises ModelError
    if `entries` has no indices for an axis to shorten.
    """
    if value is None or expected is None or value.shape == expected.shape:
        return value
    cut = value.detach()
    for axis, (length, new_length) in enumerate(zip(value.shape, expected.shape, strict=True)):
        if length != new_length and len(entries.get(length, ())) != new_length:
            raise ModelError(
                f"parts cannot be removed from {name}, because it is not known which entries of "
                "this tensor belong to which part"
            )
        cut = take_entries(cut, entries[length], axis) if length != new_length else cut
    return nn.Parameter(cut.contiguous(), requires_grad=False)
