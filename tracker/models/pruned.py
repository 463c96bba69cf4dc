"""Make copies of a model, in which layers are removed or repeated.

A copy shares the weights with the original model, but has its own modules, so both models can be
called.

Some model classes compute scaling factors from the position of a layer. In a copy without some
layers, the remaining layers keep their scaling factors. After the copy is saved and loaded, the
scaling factors depend on the new positions of the layers.
"""

from __future__ import annotations

import copy
import warnings
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from enum import Enum
from functools import partial
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tracker.models import hooks
from tracker.models.layers import find_layers, find_layers_parent
from tracker.schema.changes import Change
from tracker.schema.errors import ModelError, attempt, first_line

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

ModuleState = dict[tuple[str, str], Any]
"""Values of module attributes; the keys are pairs of a module's path and an attribute's name."""
_NO_ATTRIBUTE = "no such attribute"
"""Marker for an attribute that a module does not have before it is called."""
FIRST_LAYERS_KEY = "max_window_layers"
"""Key of Qwen's number of first layers with full attention, on which no shape depends."""
_ORIGINAL_CLASS = "_cut_from"
"""Name of the attribute of a cut configuration's class that holds the original class."""
_LABELS_KEY = "id2label"
"""Key of a configuration's table of class labels, whose integer keys are not layer indices."""
MAX_COPIED_BUFFER = 4096
"""Maximum number of elements of a buffer that is copied: rotary frequencies, which some models
change in a call. Larger buffers, such as masks, are shared by copies."""


def prune_model(
    model: PreTrainedModel,
    removed: Collection[int] = (),
    new_values: ModuleState | None = None,
    in_place: bool = False,
    changes: Iterable[tuple[int, Callable[[nn.Module], object]]] = (),
    repeated: Sequence[Change] = (),
) -> Any:
    """Copy a model with some layers removed or repeated, and renumber the remaining layers.

    The function also adapts attributes that refer to layers, e.g. lists with one entry per layer.

    Args:
        model: A causal language model of transformers.
        removed: The layers to remove, 0-based.
        new_values: New values of attributes and parameters of the copy, by module path and name.
        in_place: Whether removed layers stay in the copy and return their input.
        changes: Pairs of a layer's index and a function that changes this layer in the copy.
        repeated: Ranges of layers that the copy runs several times, e.g. layers 3 to 6.

    Returns:
        The changed copy.
    """
    layers = find_layers(model)
    memo = _sharing_memo(model)
    new_values = new_values or {}
    for (path, name), value in new_values.items():
        parameter = model.get_submodule(path)._parameters.get(name)
        if parameter is not None:
            memo[id(parameter)] = nn.Parameter(value.clone(), requires_grad=False)
    # Objects in the memo are shared; new parameters replace those of the model.
    clone = copy.deepcopy(model, memo)
    restore_state(clone, new_values)
    clone_layers = find_layers(clone)
    for index, change in changes:
        change(clone_layers[index])
    indices = remaining_layers(len(layers), removed, repeated)
    if in_place:
        for index in removed:
            hooks.replace_output(clone_layers[index], lambda state: state)
        for span in repeated:
            if len(span.layers) > 1:
                raise ModelError(
                    f"{type(model).__name__} runs only with its original number of layers, so its "
                    f"layers {span.layer} to {span.stop - 1} cannot be repeated as a group"
                )
            hook = partial(_repeat_layer, span.repeats)
            clone_layers[span.layer].register_forward_hook(hook, with_kwargs=True)
    elif indices != list(range(len(layers))):
        _keep_layers(clone, clone_layers, indices)
    return clone


def remaining_layers(
    n_layers: int, removed: Collection[int] = (), repeated: Sequence[Change] = ()
) -> list[int]:
    """List the layers that a copy with removed and repeated layers runs, in order.

    The indices are those of the original model.
    """
    indices: list[int] = []
    for index in range(n_layers):
        indices += [index] if index not in removed else []
        for span in repeated:
            if span.stop == index + 1:
                indices += [*span.layers] * (span.repeats - 1)
    return indices


def _sharing_memo(model: nn.Module) -> dict[int, Any]:
    """Build a `memo` for `deepcopy`, so that a copy shares weights and large buffers."""
    shared_objects: list[Any] = []
    for module in model.modules():
        buffers = (buffer for buffer in module._buffers.values() if buffer is not None)
        shared_objects += module._parameters.values()
        shared_objects += (buffer for buffer in buffers if buffer.numel() > MAX_COPIED_BUFFER)
        # Attributes of accelerate, for a model that is spread over devices.
        hook = getattr(module, "_hf_hook", None)
        shared_objects += (getattr(hook, name, None) for name in ("weights_map", "tied_params_map"))
    return {id(value): value for value in shared_objects if value is not None}


def _keep_layers(clone: PreTrainedModel, layers: nn.ModuleList, indices: Sequence[int]) -> None:
    """Remove all layers from a copied model except the layers `indices`."""
    total = len(layers)
    parent, name = find_layers_parent(clone, layers)
    index_attributes = _find_index_attributes(layers)
    new_layers = [layers[index] for index in indices]
    for position, (index, layer) in enumerate(zip(indices, new_layers, strict=True)):
        if index in indices[:position]:
            layer = new_layers[position] = copy.deepcopy(layer, _sharing_memo(layer))
        for (path, attribute), holders in index_attributes.items():
            if index in holders:
                setattr(layer.get_submodule(path), attribute, position)
    # Modules around the layers may have lists with an entry per layer, and tables by index.
    setattr(parent, name, nn.ModuleList())
    for module in clone.modules():
        if parent not in module.modules():
            continue
        for attribute, value in _own_attributes(module, (list, tuple, dict, int)):
            is_count = type(value) is int and value == total and "layer" in attribute
            new_value = len(indices) if is_count else _cut_value(value, indices, total)
            setattr(module, attribute, new_value)
    new_list = nn.ModuleList(new_layers)
    setattr(parent, name, new_list)
    for module in new_list.modules():
        for attribute, value in _own_attributes(module, (dict,)):
            setattr(module, attribute, _cut_value(value, indices, total))
    cut_config(clone.config.get_text_config(), indices)


def _own_attributes(module: nn.Module, types: tuple[type, ...]) -> list[tuple[str, Any]]:
    """List the public attributes of a module that have one of the given types, with values."""
    public = [(name, value) for name, value in vars(module).items() if not name.startswith("_")]
    return [(name, value) for name, value in public if isinstance(value, types)]


def _find_index_attributes(layers: nn.ModuleList) -> dict[tuple[str, str], set[int]]:
    """Find the module attributes that hold the index of their layer, such as `layer_idx`.

    Returns (path of a module in its layer, name of the attribute) → layers with the attribute.
    """
    values: defaultdict[tuple[str, str], dict[int, int]] = defaultdict(dict)
    for index, layer in enumerate(layers):
        for path, module in layer.named_modules():
            for attribute, value in vars(module).items():
                if type(value) is int:
                    values[path, attribute][index] = value
    return {
        (path, attribute): {*by_layer}
        for (path, attribute), by_layer in values.items()
        if all(index == value for index, value in by_layer.items())
        and (len(by_layer) > 1 or "layer" in attribute or "idx" in attribute)
    }


def _cut_value(value: Any, indices: Sequence[int], n_layers: int) -> Any:
    """Select the layers `indices` from a list with one entry per layer, or a dictionary by layer.

    A value that is no such list or dictionary is returned unchanged.
    """
    if isinstance(value, (list, tuple)) and len(value) == n_layers:
        return type(value)(value[index] for index in indices)
    if isinstance(value, dict) and value and all(key in range(n_layers) for key in value):
        return type(value)((n, value[index]) for n, index in enumerate(indices) if index in value)
    return value


def cut_config(config: PreTrainedConfig, indices: Sequence[int]) -> None:
    """Change a configuration so that it describes only the layers `indices`."""
    total = config.num_hidden_layers
    computed_values = {
        name: _cut_value(value, indices, total)
        for name, value in _config_properties(config)
        if isinstance(value, (list, tuple)) and len(value) == total
    }
    for name, value in list(vars(config).items()):
        if name.startswith("_") or name == _LABELS_KEY:
            continue
        new_value = _cut_nested_value(value, indices, total)
        if name == FIRST_LAYERS_KEY and type(value) is int:
            new_value = sum(layer < value for layer in indices)
        elif "layer" in name and isinstance(value, list) and _are_layer_indices(value, total):
            new_value = [n for n, index in enumerate(indices) if index in value]
        setattr(config, name, new_value)
    config.num_hidden_layers = len(indices)
    if computed_values:
        # The class computes it from the number of layers, as if the last ones were removed.
        base_class, computed_values[_ORIGINAL_CLASS] = type(config), original_class(config)
        config.__class__ = type(base_class.__name__, (base_class,), computed_values)


def original_class(config: PreTrainedConfig) -> type[Any]:
    """Return the transformers class of a configuration.

    If `cut_config` has given the configuration a class of its own, the original class is returned.
    """
    return getattr(type(config), _ORIGINAL_CLASS, type(config))


def _cut_nested_value(value: Any, indices: Sequence[int], n_layers: int) -> Any:
    """Apply `_cut_value` to a configuration value, or to each value of nested dictionaries."""
    if isinstance(value, dict) and not any(type(key) is int for key in value):
        if "rope_type" in value:
            return value
        return {name: _cut_nested_value(item, indices, n_layers) for name, item in value.items()}
    return _cut_value(value, indices, n_layers)


def _are_layer_indices(value: Sequence[Any], n_layers: int) -> bool:
    """Return whether a list consists of distinct layer indices in ascending order."""
    return (
        0 < len(value) <= n_layers
        and all(type(index) is int and 0 <= index < n_layers for index in value)
        and list(value) == sorted(set(value))
    )


def _config_properties(config: PreTrainedConfig) -> Iterator[tuple[str, Any]]:
    """Yield the name and value of each public property of a configuration."""
    for base_class in type(config).__mro__:
        for name, member in vars(base_class).items():
            if isinstance(member, property) and not name.startswith("_"):
                value = attempt(partial(getattr, config, name))
                if not isinstance(value, Exception):  # some do not apply to this kind of model
                    yield name, value


def _repeat_layer(
    n_passes: int, module: nn.Module, args: hooks.Args, kwargs: hooks.Kwargs, output: Any
) -> Any:
    """Run a layer on its own output, so that it runs `n_passes` times; a forward hook."""
    for _ in range(n_passes - 1):
        output = hooks.call_with(module.forward, hooks.first_output(output), args, kwargs)
    return output


@torch.no_grad()
def record_state(model: nn.Module, attributes: Collection[str] | None = None) -> ModuleState:
    """Record the attributes of a model's modules: tensors, numbers and strings.

    If `attributes` is given, only attributes with these names are recorded.
    """
    state: ModuleState = {}
    for path, module in model.named_modules():
        for name, value in {**vars(module), **module._parameters, **module._buffers}.items():
            if attributes is not None and name not in attributes:
                continue
            if isinstance(value, Tensor):
                state[path, name] = value.clone()
            elif isinstance(value, (bool, int, float, str)) or value is None:
                state[path, name] = value
        for name in attributes or ():
            if not hasattr(module, name):
                state[path, name] = _NO_ATTRIBUTE
    return state


def changed_keys(old_state: ModuleState, new_state: ModuleState) -> set[tuple[str, str]]:
    """Return the keys of attributes with different values in two results of `record_state`."""
    common = old_state.keys() & new_state.keys()
    equal = {key for key in common if are_equal(old_state[key], new_state[key])}
    return (old_state.keys() | new_state.keys()) - equal


def are_equal(value: object, other: object) -> bool:
    """Return whether two values of module attributes are equal.

    For tensors on the meta device, the function compares only the shapes.
    """
    if isinstance(value, Tensor) and isinstance(other, Tensor):
        is_meta = value.is_meta or other.is_meta
        return value.shape == other.shape if is_meta else torch.equal(value, other)
    try:
        return type(value) is type(other) and bool(value == other)
    except RuntimeError:  # a list of tensors
        return False


@torch.no_grad()
def restore_state(model: nn.Module, state: ModuleState) -> None:
    """Set a model's module attributes and buffers to the values that `record_state` recorded."""
    modules = dict(model.named_modules())
    for (path, name), value in state.items():
        module = modules[path]
        if name in module._parameters:
            continue
        if value is _NO_ATTRIBUTE:
            if hasattr(module, name):
                delattr(module, name)
            continue
        own_value = value.clone() if isinstance(value, Tensor) else value
        if name in module._buffers:
            module._buffers[name] = own_value
        else:
            object.__setattr__(module, name, own_value)


TensorShapes = Mapping[str, tuple[int, ...]]
"""Shape of each tensor of a checkpoint, by its name."""
_COUNT_WORDS = ("layer", "dense", "block")
"""Words in configuration keys that may give the number of first layers of a kind."""
_TORCH_ATTRIBUTES = frozenset(vars(nn.Module())) | {"config"}
"""Attributes that every module has, and that no class computes."""
_KERNEL_ATTRIBUTES = ("_attn_implementation_internal", "_experts_implementation_internal")
"""Attributes that select kernels; they are chosen on loading and stored in no file."""


StaleAttribute = tuple[nn.Module, str, Any]
"""A module of a copy, with the name and value of an attribute it would have after loading."""


def build_from_config(model: PreTrainedModel) -> Any:
    """Build a model with the class and the configuration of `model`, with uninitialised weights.

    Raises ModelError if the model's class cannot be built from the configuration.
    """
    return _build_matching(model, range(len(find_layers(model))), tensor_shapes(model))


def simulate_reload(
    clone: PreTrainedModel, indices: Sequence[int], cache: dict[str, Any] | None = None
) -> Any:
    """Build the model that results from saving and loading a copy without some layers.

    Args:
        clone: The copy, as `prune_model` returns it. The function can change the configuration.
        indices: The indices of the copy's layers in the original model.
        cache: Cache of built models, which forward passes must not change.

    Returns:
        The model that the class builds from the saved configuration, with the weights of `clone`.

    Raises:
        ModelError: The class cannot build the model; the message gives the reason.
    """
    loaded_model = _build_matching(clone, indices, tensor_shapes(clone), cache)
    modules, clone_modules = dict(loaded_model.named_modules()), dict(clone.named_modules())
    if not modules.keys() <= clone_modules.keys():
        # Added by a call, as in BigBird.
        raise ModelError(
            "a new model with the same configuration has modules that this model lacks"
        )
    for path, module in modules.items():
        for table in ("_parameters", "_buffers"):
            values, clone_values = vars(module)[table], vars(clone_modules[path])[table]
            for name in values.keys() - module._non_persistent_buffers_set:
                value = clone_values[name]
                values[name] = value if value is None or cache is not None else value.clone()
    return loaded_model.to(clone.device)


def reload_values(model: PreTrainedModel, clone: PreTrainedModel, indices: Sequence[int]) -> None:
    """Give a pruned copy the attribute values that it would have after saving and loading.

    The function also adapts counts of layers in the configuration, e.g. `first_k_dense_replace`.

    Args:
        model: The original model.
        clone: The copy, as `prune_model` returns it; it is changed in place.
        indices: The indices of the copy's layers in the original model.

    Raises:
        ModelError: The class cannot build the copy from its configuration; the message gives the
            reason. The function has not changed the copy.
    """
    if list(indices) == list(range(len(find_layers(model)))):
        return
    # For a quantised model the class builds one that is not; both must only be built alike.
    full_model = _build_matching(model, indices, None)
    shapes = _renumber(tensor_shapes(full_model), _layers_prefix(model), indices)
    cut_model = _build_matching(clone, indices, shapes)
    for module, name, value in find_stale_attributes(model, full_model, clone, cut_model, indices):
        setattr(module, name, value)
    for config in (clone.config, clone.config.get_text_config()):
        config.__class__ = original_class(config)


def find_stale_attributes(
    model: PreTrainedModel,
    full_model: PreTrainedModel,
    clone: PreTrainedModel,
    cut_model: PreTrainedModel,
    indices: Sequence[int],
) -> list[StaleAttribute]:
    """List the attributes of a copy's modules that would change if the copy was saved and loaded.

    Args:
        model: The original model.
        full_model: New model, built from the configuration of `model`.
        clone: The copy without some layers.
        cut_model: New model, built from the configuration of `clone`.
        indices: The indices of the copy's layers in the original model.

    Returns:
        The attributes (including non-persistent buffers), with their values after loading.
    """
    prefix, clone_modules = _layers_prefix(model), dict(clone.named_modules())
    old_modules = _renumber(dict(model.named_modules()), prefix, indices)
    full_modules = _renumber(dict(full_model.named_modules()), prefix, indices)
    stale: list[StaleAttribute] = []
    # Lists of another length (Granite's rotary tables, one per theta) are not read by index.
    other_lists = tuple(
        f"{path}."
        for path, module in cut_model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) != len(clone_modules.get(path, module))
    )
    for path, module in cut_model.named_modules():
        if isinstance(module, nn.Linear) or path.startswith(other_lists):
            continue  # a linear map has only its shape
        # Another class means a packed weight, or one with an adapter.
        clone_module = clone_modules.get(path)
        if path in old_modules and clone_module is not None and type(clone_module) is type(module):
            stale += _stale_attributes(clone_module, old_modules[path], full_modules[path], module)
    return stale


def _layers_prefix(model: PreTrainedModel) -> str:
    """Return the prefix of all names of tensors and modules in layers, such as `model.layers.`."""
    parent, name = find_layers_parent(model, find_layers(model))
    path = next(path for path, module in model.named_modules() if module is parent)
    return f"{path}.{name}." if path else f"{name}."


def _renumber(items: Mapping[str, Any], prefix: str, indices: Sequence[int]) -> dict[str, Any]:
    """Replace the layer numbers in names of modules or tensors by the numbers in a copy.

    The copy contains the layers `indices`; entries of all other layers are left out.
    """
    new_items: dict[str, Any] = {}
    for name, value in items.items():
        names = [name]
        if name.startswith(prefix):
            number, dot, path = name.removeprefix(prefix).partition(".")
            positions = (n for n, index in enumerate(indices) if index == int(number))
            names = [f"{prefix}{n}{dot}{path}" for n in positions]
        new_items |= dict.fromkeys(names, value)
    return new_items


def _stale_attributes(
    clone: nn.Module, old_module: nn.Module, full_module: nn.Module, cut_module: nn.Module
) -> Iterator[StaleAttribute]:
    """Yield the attributes of a copied module that would change if the copy was saved and loaded.

    The arguments are one module in four models of `find_stale_attributes`: `clone`, `model`
    (`old_module`), `full_model` and `cut_model`.
    """
    for name, value in vars(cut_module).items():
        if name in _TORCH_ATTRIBUTES or not _is_plain(value):
            continue
        old, full, current = (vars(m).get(name) for m in (old_module, full_module, clone))
        is_unchanged = are_equal(value, full) and are_equal(current, old)
        if not is_unchanged and not are_equal(current, value):
            yield clone, name, copy.deepcopy(value)
    for name in cut_module._non_persistent_buffers_set:
        value, full, current = (m._buffers.get(name) for m in (cut_module, full_module, clone))
        if value is not None and current is not None and not are_equal(value, full):
            value = value.to(current.device, current.dtype)
            if not are_equal(current, value):
                yield clone, name, value


def _is_plain(value: object) -> bool:
    if isinstance(value, dict):
        return all(map(_is_plain, value.values()))
    if isinstance(value, (list, tuple, set)):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (bool, int, float, str, Enum, torch.dtype, Tensor))


def _build_matching(
    model: PreTrainedModel,
    indices: Sequence[int],
    shapes: TensorShapes | None,
    cache: dict[str, Any] | None = None,
) -> Any:
    """Build a model with the class and configuration of `model`, and with given tensor shapes.

    If the built model has other tensor shapes than `shapes`, the function tries the configuration
    values of `propose_layer_counts`. If `shapes` is None, any shapes are accepted. `cache` contains
    models built earlier. ModelError is raised if no model has the given shapes.
    """
    config = model.config.get_text_config()
    first_problem = None
    for new_counts in chain([{}], propose_layer_counts(config, indices)):
        old_counts = {name: getattr(config, name) for name in new_counts}
        vars(config).update(new_counts)
        built_model = attempt(partial(_build_cached, model, cache))
        if isinstance(built_model, Exception):  # a class may refuse a number of layers
            problem: str | None = first_line(built_model)
        else:
            problem = None if shapes is None else shape_mismatch(tensor_shapes(built_model), shapes)
        if problem is None:
            return built_model
        vars(config).update(old_counts)
        first_problem = first_problem or problem
    raise ModelError(first_problem or "")


def _build_cached(model: PreTrainedModel, cache: dict[str, Any] | None) -> Any:
    """Return the result of `build_uninitialised`, from `cache` if possible."""
    if cache is None:
        return build_uninitialised(model)
    key = model.config.to_json_string()
    if key not in cache:
        cache[key] = build_uninitialised(model)
    return cache[key]


def propose_layer_counts(
    config: PreTrainedConfig, indices: Sequence[int]
) -> Iterator[dict[str, int]]:
    """Yield new values for configuration keys such as `first_k_dense_replace`.

    Such a key states how many layers at the start are of some kind, e.g. without experts. The new
    value counts only those in `indices`. The function yields one dictionary for each changed key,
    then one with all changed keys.
    """
    counts = {
        name: value
        for name, value in vars(config).items()
        if any(word in name for word in _COUNT_WORDS)
        and "hidden_layers" not in name
        and name != FIRST_LAYERS_KEY  # set for the kept layers already
        and type(value) is int
        and 0 < value != len(indices)
    }
    new_counts = {name: sum(n < value for n in indices) for name, value in counts.items()}
    changed_counts = {name: n for name, n in new_counts.items() if n != counts[name]}
    yield from ({name: n} for name, n in changed_counts.items())
    if len(changed_counts) > 1:
        yield changed_counts


def build_uninitialised(model: PreTrainedModel, device: str = "cpu") -> Any:
    """Build a model with the class and configuration of `model`, and uninitialised weights."""
    from transformers.initialization import no_init_weights
    from transformers.modeling_utils import local_torch_dtype

    config = reload_config(model)
    _copy_kernel_choice(model.config, config)
    is_double = model.dtype == torch.float64
    with (
        # Two threads would leave weights uninitialised in the whole process.
        hooks.TRANSFORMERS_LOCK,
        warnings.catch_warnings(),
        torch.random.fork_rng(devices=[]),
        no_init_weights(),
    ):
        warnings.simplefilter("ignore")
        # Tables wider than those that a file's loader computes would differ.
        loading_dtype = torch.float32 if is_double else model.dtype
        with local_torch_dtype(loading_dtype), torch.device(device):
            built_model = type(model)(config).eval()
    return built_model.double() if is_double else built_model


def reload_config(model: PreTrainedModel) -> Any:
    """Save a model's configuration to a temporary file, and load the file."""
    with TemporaryDirectory() as folder:
        model.config.to_json_file(Path(folder) / "config.json")
        return original_class(model.config).from_pretrained(folder)


def _copy_kernel_choice(config: PreTrainedConfig, loaded_config: PreTrainedConfig) -> None:
    for name, value in vars(config).items():
        if name in _KERNEL_ATTRIBUTES:
            vars(loaded_config)[name] = value
        elif hasattr(value, "to_json_file") and name in vars(loaded_config):
            _copy_kernel_choice(value, vars(loaded_config)[name])


def tensor_shapes(model: PreTrainedModel) -> TensorShapes:
    """Return the shapes of the tensors in a checkpoint of a model."""
    return {name: tuple(value.shape) for name, value in model.state_dict().items()}


def shape_mismatch(shapes: TensorShapes, expected: TensorShapes) -> str | None:
    """Describe the first tensor whose shape differs from the shape in `expected`.

    Returns None if all shapes are equal.
    """
    for name in sorted(shapes.keys() | expected.keys()):
        if name not in expected:
            return f"a model with this configuration needs {name}, which is removed"
        if name not in shapes:
            return f"a model with this configuration has no tensor {name}"
        if shapes[name] != expected[name]:
            expected_shape, shape = list(expected[name]), list(shapes[name])
            return f"{name} has the shape {expected_shape}, but {shape} with this configuration"
    return None
