"""Save a model with removed or repeated layers, or fewer parts in each layer, as a checkpoint.

Plain transformers can load the checkpoint. A copy is saved only if transformers can rebuild the
same model from its configuration.

A model object from a notebook is saved once, in a folder named by a hash of the model.
"""

from __future__ import annotations

import copy
import gc
import hashlib
import re
import shutil
from collections.abc import Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from numpy.typing import NDArray

from tracker.ledger.files import make_folder, new_folder, write_bytes
from tracker.models import pruned
from tracker.models.devices import empty_cache
from tracker.models.hooks import TRANSFORMERS_LOCK
from tracker.models.layers import find_layers
from tracker.models.load import LoadedModel, build_hollow, load_model
from tracker.models.miniature import MINIATURE_HEADS, build_miniature
from tracker.models.narrowed import PartNumbers, narrowed_copies, plan_narrowing, plan_removal
from tracker.models.parts.anatomy import (
    PART_CLASSES,
    LayerAnatomy,
    NumberedParts,
    find_configured_parts,
    find_search_parts,
)
from tracker.models.sources import BITSANDBYTES_ARGUMENTS, ModelSource, find_model, read_config
from tracker.schema.changes import Ablation, Change
from tracker.schema.errors import ModelError, WorkError, attempt, first_line, translate_errors
from tracker.schema.formats import join_words
from tracker.schema.kinds import Component
from tracker.schema.provenance import content_hash, file_hash

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Logits = NDArray[np.float32]
RELOAD_TOKENS = 48
"""Number of tokens that a miniature reads, larger than its attention windows."""
RELOAD_TOLERANCE = 1e-4
"""Tolerance between two ways of computing a miniature's experts, relative to the largest logit."""
_IGNORED_ATTRIBUTES = ("name_or_path", "training")
"""Attributes of a module that do not affect its results here."""
_TRANSFORMERS_PREFIX = "transformers."
"""Prefix of the Python modules of transformers' own classes, as opposed to downloaded code."""


def savable_copy(
    model: PreTrainedModel, removed: Collection[int], repeated: Sequence[Change] = ()
) -> Any:
    """Copy a model with layers removed or repeated, and adapt the configuration.

    Args:
        model: A causal language model of transformers.
        removed: The layers to remove, 0-based.
        repeated: Ranges of layers that the copy runs several times, e.g. layers 3 to 6.

    Returns:
        The copy, which shares the model's weights. Only repeated layers get new tensors, because
        safetensors saves shared tensors only once.

    Raises:
        ModelError: The configuration cannot describe the copy; the message gives the reason.
    """
    indices = pruned.remaining_layers(len(find_layers(model)), removed, repeated)
    clone = pruned.prune_model(model, removed, repeated=repeated)
    layers = find_layers(clone)
    for position, index in enumerate(indices):
        if index in indices[:position]:
            layers[position] = copy.deepcopy(layers[position])
    with suppress(ModelError):  # the check below reports the reason
        pruned.reload_values(model, clone, indices)
    _refuse_other_shapes(model, clone, f"that {_describe_changes(removed, repeated)}")
    return clone


def savable_copies(model: PreTrainedModel, ablation: Ablation) -> tuple[Any, Any]:
    """Copy a model for saving, with layers removed or repeated, or with fewer parts in layers.

    Args:
        model: A causal language model of transformers.
        ablation: Removed or repeated layers, and removed parts such as heads.

    Returns:
        The copy to save, and the copy that the engine measures. Both are the same object unless
        parts are removed.

    Raises:
        ModelError: The configuration cannot describe the copy; the message gives the reason.
    """
    clone = measured = model
    if ablation.removed() or not ablation.parts:
        clone = measured = savable_copy(model, ablation.removed(), ablation.repetitions)
    if ablation.parts:
        clone, measured = narrowed_copies(clone, ablation.renumbered_parts)
        _refuse_other_shapes(model, clone, f"the numbers of {_plurals(ablation)}")
    return clone, measured


def _plurals(ablation: Ablation) -> str:
    """List the kinds of parts that `ablation` removes, for messages."""
    kinds = dict.fromkeys(PART_CLASSES[change.component] for change in ablation.parts)
    return join_words([kind.KIND for kind in kinds])


def _refuse_other_shapes(model: PreTrainedModel, clone: PreTrainedModel, subject: str) -> None:
    """Raise ModelError if a copy's configuration describes other tensor shapes than the copy has.

    If the model's class is part of transformers, references to downloaded code are first deleted
    from the copy's configuration. In the message, `subject` describes the change that the
    configuration cannot express.
    """
    model_class = type(model) if _has_remote_code(model) else None
    if model_class is None:
        # It points to code that was not used, and that a user would have to trust.
        for part in (clone.config, clone.config.get_text_config()):
            vars(part).pop("auto_map", None)
    if problem := _config_mismatch(clone, model_class):
        owner = type(model).__name__
        raise ModelError(f"the configuration of {owner} cannot describe {subject}: {problem}")


def config_changes(model: PreTrainedModel, clone: PreTrainedModel) -> tuple[str, ...]:
    """List the configuration keys that a copy changes, except for the number of layers."""
    old, new = (m.config.get_text_config().to_dict() for m in (model, clone))
    ignored_keys = ("num_hidden_layers", "auto_map", "_name_or_path")
    return tuple(sorted(n for n in new if n not in ignored_keys and new[n] != old.get(n)))


def _has_remote_code(model: PreTrainedModel) -> bool:
    """Return whether the model's class comes from downloaded code instead of transformers."""
    modules = type(model).__module__, type(model.config).__module__
    return not all(module.startswith(_TRANSFORMERS_PREFIX) for module in modules)


def _config_mismatch(model: PreTrainedModel, model_class: type | None) -> str | None:
    """Describe the first tensor whose shape changes if a model is rebuilt from its configuration.

    Returns None if no shape changes. If `model_class` is None, transformers chooses the class.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    def read_back() -> pruned.TensorShapes:
        with TemporaryDirectory() as folder, torch.device("meta"):
            model.config.save_pretrained(folder)
            config = AutoConfig.from_pretrained(folder, trust_remote_code=model_class is not None)
            with TRANSFORMERS_LOCK:
                build = model_class or AutoModelForCausalLM.from_config
                return pruned.tensor_shapes(build(config))

    shapes = attempt(read_back)  # a class may refuse lists of another length
    if isinstance(shapes, Exception):
        return first_line(shapes)
    return pruned.shape_mismatch(shapes, pruned.tensor_shapes(model))


def check_layer_changes(
    source: ModelSource, removed: Collection[int] | None = None, repeated: Sequence[Change] = ()
) -> None:
    """Raise ModelError if plain transformers could not load the model with the changed layers.

    The function tests a small random model with the same architecture, in about one second.

    Args:
        source: The model.
        removed: The layers to remove. If None, two removals are tested: the first layer, and the
            middle layer.
        repeated: Ranges of layers that the changed model runs several times, e.g. layers 3 to 6.

    Raises:
        ModelError: The configuration cannot describe the changed model, or the loaded model differs
            from the saved model.
    """
    check_plain_weights(source)
    model, small_model = _hollow_and_miniature(source, content_hash(source.stamp()))
    n_layers = len(find_layers(model))
    for layers in [[0], [n_layers // 2]] if removed is None else [removed]:
        changed_layers = [*layers, *(layer for span in repeated for layer in span.layers)]
        _refuse_missing_layers(source, n_layers, layers, changed_layers)
        if small_model is None:
            savable_copy(model, layers, repeated)
        else:
            ablation = Ablation.from_changes(*repeated, removed=layers)
            _check_reload(copy.deepcopy(small_model), ablation)


def _refuse_missing_layers(
    source: ModelSource, n_layers: int, removed: Collection[int], changed: Collection[int]
) -> None:
    """Raise ModelError if a layer in `changed` does not exist, or if all layers are removed."""
    invalid = [layer for layer in changed if not 0 <= layer < n_layers]
    if invalid:
        name, last = source.source, n_layers - 1
        raise ModelError(f"layer {invalid[0]} is out of range: {name} has layers 0 to {last}")
    if len(set(removed)) >= n_layers:
        raise ModelError(f"no layer would be left: {source.source} has only {n_layers} layers")


def check_part_removal(source: ModelSource, ablation: Ablation) -> None:
    """Raise ModelError if plain transformers could not load the model without some parts.

    `ablation` removes parts such as heads, and possibly also layers. The function tests a small
    random model with the same architecture.
    """
    if not ablation.parts:
        check_layer_changes(source, ablation.removed())
        return
    check_plain_weights(source)
    model, small_model = _hollow_and_miniature(source, content_hash(source.stamp()))
    n_layers, removed = len(find_layers(model)), ablation.removed()
    _refuse_missing_layers(source, n_layers, removed, removed)

    def find_parts(kind: type[NumberedParts]) -> dict[int, NumberedParts]:
        units = (c.component for c in ablation.parts if PART_CLASSES[c.component] is kind)
        parts = find_configured_parts(source, next(units))
        kept_layers = enumerate(pruned.remaining_layers(n_layers, removed))
        return {new: parts[old] for new, old in kept_layers if old in parts}

    plan_narrowing(ablation.renumbered_parts, find_parts, type(model).__name__).build(model)
    if small_model is not None:
        small_copy = copy.deepcopy(small_model)
        small_ablation = _smallest_removal(small_copy, ablation)
        _check_reload(small_copy, Ablation.from_changes(*small_ablation.changes, removed=removed))


def find_removable_counts(
    source: ModelSource, unit: str, block: int
) -> tuple[tuple[int, ...], float]:
    """Find how many parts of a layer (e.g. neurons) can be removed, and the size of one part.

    Plain transformers must be able to load the model without these parts.

    Args:
        source: The model; no weights are read.
        unit: Kind of the parts, such as `neuron`.
        block: Number of parts in a block. A block contains all parts of a layer, or the
            heads of one group; all blocks of a layer lose equally many parts.

    Returns:
        The numbers of parts that a block can lose, in ascending order, and the number of parameters
        (weights) of one part.

    Raises:
        ModelError: The model's class accepts no smaller number of parts.
    """
    model, _ = _hollow_and_miniature(source, content_hash(source.stamp()))
    component = cast("Component", unit)
    search_parts = find_search_parts(source, component)
    parts = find_configured_parts(source, component)
    (layer, part), *_ = parts.items()
    counts, size, problem = list[int](), 0.0, ""
    first_parts = range(0, search_parts.per_layer, block)
    n_kept = search_parts.min_kept if block == search_parts.per_layer else 1
    for count in range(1, block - n_kept + 1):
        numbers = [first + n for first in first_parts for n in range(count)]
        changes = [Change(component, (layer,), part=n) for n in numbers]
        plan = plan_narrowing(
            Ablation.from_changes(*changes), lambda _: {layer: part}, type(model).__name__
        )
        try:
            plan.check_config(model)
            if not counts:
                old, new = map(_count_layer_parameters, (model, plan.build(model)))
                size = (old - new) / (len(parts) * len(numbers))
            counts.append(count)
        except ModelError as error:
            problem = problem or str(error)
    if not counts:
        raise ModelError(problem)
    return tuple(counts), size


def _count_layer_parameters(model: PreTrainedModel) -> int:
    """Count the parameters of all layers."""
    return sum(parameter.numel() for parameter in find_layers(model).parameters())


def _choose_test_parts(counts: PartNumbers) -> tuple[Component, int]:
    """Choose the kind of parts for a test removal; return the kind and its number in the layer.

    Groups of heads are preferred to single heads if the layer has more than one group.
    """
    *single, (unit, count) = counts.items()
    return single[0] if single and count == 1 else (unit, count)


def _smallest_removal(model: PreTrainedModel, ablation: Ablation) -> Ablation:
    """Return an ablation that removes as few parts as possible from each layer.

    The removed parts have the same kinds as those in `ablation`. Raises ModelError if the model's
    class cannot be built with fewer parts.
    """
    anatomy = LayerAnatomy.of(model)
    kinds = dict.fromkeys(PART_CLASSES[change.component] for change in ablation.parts)
    parts = [(n, part) for kind in kinds for n, part in enumerate(anatomy.find(kind))]
    counts = [(n, *_choose_test_parts(p.counts)) for n, p in parts if isinstance(p, NumberedParts)]
    for n_removed in range(1, MINIATURE_HEADS):
        numbers = [
            (n, unit, (n + k) % m) for n, unit, m in counts for k in range(min(n_removed, m))
        ]
        removal = Ablation.from_changes(*(Change(u, (n,), part=part) for n, u, part in numbers))
        with suppress(ModelError):  # 4 heads may become 2 or 1, but not 3
            plan_removal(anatomy, removal).build(model)
            return removal
    raise ModelError(f"{type(model).__name__} cannot be built with fewer {_plurals(ablation)}")


@lru_cache(maxsize=1)
def _hollow_and_miniature(source: ModelSource, stamp: str) -> tuple[Any, Any | None]:
    """Build a model without weights, and a small model with random weights.

    The function caches the models of its last call. `stamp` changes if the model's files change.
    """
    model = build_hollow(source, "auto")
    return model, build_miniature(model)


def check_plain_weights(source: ModelSource) -> None:
    """Raise ModelError if an adapter or quantised weights prevent the export of a model."""
    if source.adapter is not None:
        raise ModelError(
            f"model_args: {source.source} loads an adapter, so it is not a single checkpoint; "
            "merge the adapter first: PeftModel.merge_and_unload(), then save_pretrained()"
        )
    config = read_config(source)
    bits = [name for name in source.arguments if name.startswith(BITSANDBYTES_ARGUMENTS)]
    is_quantised = bits or getattr(config, "quantization_config", None)
    if is_quantised and not source.gguf_file:
        raise ModelError(
            f"{source.source} is quantised, and export cannot pack its weights again. Export the "
            "model in float32 or bfloat16, then quantise the exported model"
        )


def _check_reload(small_model: PreTrainedModel, ablation: Ablation) -> None:
    """Change, save and load a small model; raise ModelError if loading changes the logits."""
    from transformers import AutoModelForCausalLM

    name, removed = type(small_model).__name__, ablation.removed()
    small_model.float()
    clone, measured = savable_copies(small_model, ablation)
    config = clone.config.get_text_config()
    # On loading, a class sets the row of the padding token to its own value.
    padding = getattr(config, "pad_token_id", None)
    tokens = [token for token in range(config.vocab_size) if token != padding]
    ids = torch.tensor([(tokens * RELOAD_TOKENS)[:RELOAD_TOKENS]])
    changes_text = f"without {_layers_text(removed)}"
    if ablation.repetitions:
        changes_text = f"where {_describe_changes(removed, ablation.repetitions)}"
    elif ablation.parts:
        changes_text = f"with fewer {_plurals(ablation)}"

    # Errors of a miniature with fewer parts state numbers that the user's model does not have.
    reason = "the remaining parts compute other outputs after loading"
    reason *= bool(ablation.parts)

    def problem(text: str) -> AbstractContextManager[None]:
        return translate_errors(lambda e: ModelError(f"{text}: {reason or first_line(e)}"))

    with problem(f"{name} does not run {changes_text}"):
        logits = _compute_logits(measured, ids)
    reloading = problem(f"{name} {changes_text} cannot be saved and loaded")
    with TemporaryDirectory() as folder, _hidden_progress_bars(), reloading:
        clone.save_pretrained(folder)
        trust = {"trust_remote_code": _has_remote_code(small_model)}
        with TRANSFORMERS_LOCK:
            loaded_model, loading = AutoModelForCausalLM.from_pretrained(
                folder, dtype=torch.float32, output_loading_info=True, **trust
            )
        stray_keys = [*loading["missing_keys"], *loading["unexpected_keys"]]
        loaded_logits = _compute_logits(loaded_model.eval(), ids)
    distance = float((logits - loaded_logits)[..., tokens].abs().max())
    if stray_keys or not distance <= RELOAD_TOLERANCE * max(1.0, float(logits.abs().max())):
        reason = reason or _describe_difference(clone, loaded_model)
        raise ModelError(
            f"{name} {changes_text} cannot be saved, because the logits differ by up to "
            f"{distance:.3g} after the checkpoint is loaded: {reason}"
        )


@contextmanager
def _hidden_progress_bars() -> Iterator[None]:
    """Hide the progress bars of transformers until the context exits."""
    from transformers.utils import logging

    were_shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if were_shown:
            logging.enable_progress_bar()


@torch.inference_mode()
def _compute_logits(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    logits: torch.Tensor = model(input_ids=ids, use_cache=False).logits
    return logits


def _describe_difference(saved_model: PreTrainedModel, loaded_model: PreTrainedModel) -> str:
    """Describe the first module attribute whose value changes when a model is saved and loaded."""
    loaded_modules = dict(loaded_model.named_modules())
    for path, module in saved_model.named_modules():
        loaded_values = vars(loaded_modules[path]) if path in loaded_modules else {}
        for name, value in vars(module).items():
            computed = loaded_values.get(name)
            is_plain = isinstance(value, (bool, int, float, str))
            if is_plain and computed != value and name not in _IGNORED_ATTRIBUTES:
                return f"the attribute {path}.{name} changes on loading, from {value} to {computed}"
    return "a value in the model depends on the index of a layer"


def _describe_changes(removed: Collection[int], repeated: Sequence[Change]) -> str:
    """Return a clause for messages, such as `layers 3, 17 are removed`."""
    removal_text = f"{_layers_text(removed)} {'is' if len(removed) == 1 else 'are'} removed"
    return " and ".join([removal_text] * bool(removed) + [span.clause for span in repeated])


def _layers_text(removed: Collection[int]) -> str:
    numbers = ", ".join(map(str, sorted(removed)))
    return f"layer{'s' if len(removed) > 1 else ''} {numbers}"


def save_copy(loaded: LoadedModel, clone: PreTrainedModel, folder: Path) -> None:
    """Save a copy of a loaded model: weights, configurations, tokenizer and chat template.

    Args:
        loaded: The model from which the copy was made.
        clone: The copy to save.
        folder: The folder to create.

    Raises:
        OSError: The folder cannot be written.
    """
    if getattr(clone, "hf_quantizer", None) is not None:
        # Weights of a GGUF file are dequantised, and only their markers are left.
        clone.hf_quantizer = None
        clone.is_quantized = False
    for config in (clone.config, clone.config.get_text_config()):
        vars(config).pop("quantization_config", None)
    if type(loaded.tokenizer).__module__.startswith(_TRANSFORMERS_PREFIX):
        loaded.tokenizer.init_kwargs.pop("auto_map", None)
    clone.save_pretrained(folder)
    loaded.tokenizer.save_pretrained(folder)


def release_memory() -> None:
    """Release unused accelerator memory, so that other processes can use it."""
    gc.collect()
    empty_cache()


_RESTORED_HOOKS = ("transformers.", "accelerate.", "torch.")
"""Packages whose module hooks are installed again when a model is loaded."""
_SAMPLE_TEXTS = (
    "The heart pumps blood",
    "Question: What is the capital of France?\nAnswer: Paris",
    "In 1969 two people walked on the Moon for the first time; a third one stayed in orbit, and "
    "all of them returned to Earth four days later. What they brought along were stones and dust.",
)
_LOGITS_FILE = "logits.f32"
"""File beside a saved copy, with the copy's logits of the last tokens of `_SAMPLE_TEXTS`."""
_FLOAT32_TOLERANCE, _ROUNDED_TOLERANCE = 1e-3, 0.05
"""Rounding tolerances of logits, relative to the largest logit: in float32 and in fewer bits."""


def save_once(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    trust_remote_code: bool = False,
) -> Path:
    """Save a model object and its tokenizer, unless the same model is saved already.

    Args:
        model: A `PreTrainedModel` of transformers, which is not changed.
        tokenizer: The model's tokenizer.
        folder: Folder that holds one subfolder for each saved model.
        trust_remote_code: Whether Python code that is saved with the model may run.

    Returns:
        The model's folder, named by a fingerprint of its weights, configuration and tokenizer.

    Raises:
        ModelError: `model` is not a model of transformers, or the saved copy computes different
            logits.
        WorkError: The folder cannot be written.
    """
    _check_savable(model, tokenizer)
    source_name = Path(str(getattr(model, "name_or_path", "") or type(model).__name__)).name
    name = re.sub(r"[^\w.-]+", "-", source_name).strip("-.") or "model"
    try:
        make_folder(folder)
        with TemporaryDirectory() as description_folder:
            tokenizer.save_pretrained(description_folder)
            model.config.save_pretrained(description_folder)
            saved_folder = folder / f"{name}-{_fingerprint(model, Path(description_folder))[:12]}"
        # A folder with this fingerprint holds the same model: only its logits are compared.
        is_new = not saved_folder.is_dir()
        if is_new:
            with new_folder(saved_folder) as temporary_folder:
                tokenizer.save_pretrained(temporary_folder)
                model.save_pretrained(temporary_folder)
    except OSError as error:
        raise WorkError(
            f"the model cannot be saved in {folder}: {error.strerror or first_line(error)}"
        ) from None
    try:
        _check_saved_logits(model, tokenizer, saved_folder, trust_remote_code)
    except ModelError:
        if is_new:
            shutil.rmtree(saved_folder, ignore_errors=True)
        raise
    return saved_folder


def _check_saved_logits(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, trusted: bool
) -> None:
    """Raise ModelError if a model and its saved copy compute different logits.

    An earlier check can have stored the copy's logits in the folder. The copy is loaded and run
    only if these logits are missing, or differ from the model's logits.
    """
    # On a CPU, bitsandbytes 0.50 changes the weights of a model that has read a text and is saved.
    if getattr(model, "is_loaded_in_4bit", False) and model.device.type == "cpu":
        return
    with translate_errors(
        lambda e: ModelError(f"the model fails on a short test text: {first_line(e)}")
    ):
        logits = _last_logits(model, tokenizer)
    with suppress(OSError, ValueError):
        stored_logits = np.fromfile(folder / _LOGITS_FILE, np.float32).reshape(logits.shape)
        if not _logit_difference(logits, stored_logits, model):
            return
    loaded_copy = load_model(find_model(str(folder), trusted), "auto", str(model.device))
    tokens, loaded_tokens = (
        [read(text)["input_ids"] for text in _SAMPLE_TEXTS]
        for read in (tokenizer, loaded_copy.tokenizer)
    )
    if tokens != loaded_tokens:
        raise ModelError("the saved copy of the tokenizer splits texts into different tokens")
    copy_logits = _last_logits(loaded_copy.model, loaded_copy.tokenizer)
    del loaded_copy
    gc.collect()
    if difference := _logit_difference(logits, copy_logits, model):
        raise ModelError(
            f"{difference}. A changed forward method or activation is not saved; use a model that "
            "its configuration describes fully"
        )
    write_bytes(folder / _LOGITS_FILE, copy_logits.tobytes())


def _last_logits(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Logits:
    """Compute a model's logits at the last token of each text in `_SAMPLE_TEXTS`."""
    modes = [(module, module.training) for module in model.modules()]
    texts = [tokenizer(text, return_tensors="pt")["input_ids"] for text in _SAMPLE_TEXTS]
    try:
        model.eval()
        with torch.no_grad():
            logits = [model(input_ids=ids.to(model.device)).logits[0, -1] for ids in texts]
    finally:
        for module, mode in modes:
            module.training = mode
    return np.asarray(torch.stack(logits).float().cpu().numpy())


def _logit_difference(logits: Logits, copy_logits: Logits, model: PreTrainedModel) -> str:
    """Describe the largest difference between a model's logits and those of its saved copy.

    Returns an empty string if the difference is within rounding errors.
    """
    is_quantised = getattr(model, "hf_quantizer", None) is not None
    is_exact = model.dtype in (torch.float32, torch.float64) and not is_quantised
    largest = np.abs(copy_logits[np.isfinite(copy_logits)]).max(initial=0)
    tolerance = largest * (_FLOAT32_TOLERANCE if is_exact else _ROUNDED_TOLERANCE)
    if np.allclose(logits, copy_logits, rtol=0, atol=tolerance, equal_nan=True):
        return ""
    distance = np.abs(logits - copy_logits).max()
    return f"the saved copy's logits differ by up to {distance:.3g} (largest logit: {largest:.3g})"


def _fingerprint(model: PreTrainedModel, files_folder: Path) -> str:
    """Hash a model's weights, configuration and tokenizer."""
    digest = hashlib.sha256(file_hash(sorted(files_folder.iterdir())).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _check_savable(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    if not isinstance(model, PreTrainedModel):
        raise ModelError(
            f"model is a {type(model).__name__}; expected a transformers model, or the name or "
            "folder of a model. For a peft model, pass model.merge_and_unload()"
        )
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise ModelError("a model object needs its tokenizer: tokenizer=AutoTokenizer.from_…")
    if any(tensor.is_meta for tensor in model.state_dict().values()):
        raise ModelError(
            "some weights of the model are not in memory; load them, or pass the model's folder"
        )
    quantiser = getattr(model, "hf_quantizer", None)
    if quantiser is not None and not quantiser.is_serializable():
        method = quantiser.quantization_config.quant_method
        raise ModelError(
            f"the model's weights are quantised by {getattr(method, 'value', method)}, and "
            "transformers cannot save them; pass the original file or folder, not the loaded model"
        )
    if changed_module := next(_changed_modules(model), None):
        raise ModelError(
            f"{changed_module} of the model has a hook or a replaced forward method, which a "
            "saved copy would lack; remove the hook, or restore the method"
        )


def _changed_modules(model: PreTrainedModel) -> Iterator[str]:
    """Yield the names of modules with a change that cannot be saved: a hook or a new `forward`."""
    for name, module in model.named_modules():
        hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
        packages = [f"{getattr(hook, '__module__', '')}." for hook in hooks]
        is_replaced = "forward" in vars(module) and not hasattr(module, "_hf_hook")
        if is_replaced or not all(package.startswith(_RESTORED_HOOKS) for package in packages):
            yield name or "the whole"
