"""Test how text lengths and earlier calls change logits, and choose how to remove layers.

A miniature is a tiny model with random weights. An experiment replaces one number in the
miniature's configuration by a small number. If the logits stay the same, the model does not use
this number.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Collection, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import chain, pairwise, repeat
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tracker.engine.forward.streams import Ablations
from tracker.engine.refusal import try_model
from tracker.engine.scoring.model import NO_QUIRKS, PLAIN, compute_logits
from tracker.engine.scoring.rows import Lengths
from tracker.engine.scoring.sweep import Engine
from tracker.engine.selfcheck.reference import Reference, SharingVerdict
from tracker.models.hooks import enter_all, replace_output
from tracker.models.miniature import NumberPath, build_random_model, find_numbers, replace_numbers
from tracker.models.pruned import (
    build_from_config,
    changed_keys,
    find_stale_attributes,
    record_state,
    simulate_reload,
    tensor_shapes,
)
from tracker.schema.changes import INTACT, Ablation
from tracker.schema.errors import CellError, ModelError, attempt

SHORT, LONG, MIDDLE = 5, 24, 20
"""Lengths of text on both sides of a number that was made small."""
SMALL_NUMBER = 6
SMALL_NUMBERS = (6, 9, 12, 16, 20, 24, 28, 32)
"""Small values that replace several numbers, keeping them distinct and in order."""
EQUAL_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4}
"""Tolerance for equal logits; some models compute parts of them in float32."""
LONG_TOLERANCE = 1e-3
"""Tolerance for logits of a long text, far above the sum of rounding errors."""
MODEL_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3}
"""Tolerance for logits of two models without the same layers; 0.5 in half precision."""
MAX_SWITCHES = 4
"""Number of switch lengths from which every length counts as a switch length."""


@dataclass(frozen=True)
class QuirkFindings:
    """Effects of text lengths and repeated calls on a model's logits, found by experiment.

    Attributes:
        relevant_numbers: Paths of the numbers in the configuration that affect the logits.
        lengths: Pairs (path, flag). The path locates a number in the configuration, e.g. an
            attention window. Texts with fewer and with more tokens than this number are computed
            differently. If the flag is True, every longer text length has its own computation. The
            path is empty if the logits always depend on the text length.
        leftovers: Names of model attributes that a call changes and that affect the next call.
        first: Module and name of each attribute that the first call changes permanently.
        causal: True if the logits of a token do not depend on later tokens.
    """

    relevant_numbers: tuple[NumberPath, ...] = ()
    lengths: tuple[tuple[NumberPath, bool], ...] = ()
    leftovers: frozenset[str] = frozenset()
    first: frozenset[tuple[str, str]] = frozenset()
    causal: bool = True


def find_quirks(mini: PreTrainedModel, paths: Collection[NumberPath]) -> QuirkFindings:
    """Test whether a miniature's logits depend on text length, earlier calls or later tokens.

    `paths` locates the numbers in the configuration that the experiments replace.
    """
    logits = _text_logits(mini, LONG)
    leftovers, first = _find_call_effects(mini)
    any_length = not _is_equal(logits[:SHORT], _text_logits(mini, SHORT))
    causal = _is_equal(logits[:-1], _text_logits(mini, LONG, last_token=1)[:-1])
    numbers: list[NumberPath] = []
    lengths: list[tuple[NumberPath, bool]] = [((), True)] if any_length else []
    shapes = tensor_shapes(mini)
    for path, value in find_numbers(mini.config.get_text_config()):
        if path not in paths:
            continue
        small_number = SMALL_NUMBER if value != SMALL_NUMBER else SMALL_NUMBER + 2
        config = replace_numbers(mini.config, {path: type(value)(small_number)})
        model = build_random_model(type(mini), config, shapes)
        effect = model and attempt(partial(_find_effect, model, logits, any_length))
        if effect is None or isinstance(effect, Exception):  # the model rejects this number
            continue
        switches, all_differ, new_leftovers, new_first = effect
        lengths += [(path, all_differ)] if switches else []
        numbers.append(path)
        leftovers |= new_leftovers
        first |= new_first
    attributes = frozenset(leftovers), frozenset(first)
    return QuirkFindings(tuple(numbers), tuple(lengths), *attributes, causal)


def _find_effect(
    model: PreTrainedModel, usual_logits: Tensor, any_length: bool
) -> tuple[bool, bool, set[str], set[tuple[str, str]]] | None:
    """Test how a changed number in a model's configuration affects the logits.

    Args:
        model: The model that is built from the changed configuration.
        usual_logits: Logits of the model with the original configuration.
        any_length: True if the logits depend on the text length even with the original
            configuration.

    Returns:
        None if the number has no effect. Otherwise two flags, and the two sets from
        `_find_call_effects`. The first flag is True if, because of the number, the first tokens
        have other logits in a long text than in a short text. The second flag is True if these
        logits also differ between long texts of different lengths.
    """
    logits = _text_logits(model, LONG)
    if _is_equal(logits, usual_logits):
        return None
    switches = not any_length and not _is_equal(logits[:SHORT], _text_logits(model, SHORT))
    all_differ = switches and not _is_equal(logits[:MIDDLE], _text_logits(model, MIDDLE))
    return (switches, all_differ, *_find_call_effects(model))


def find_switches(mini: PreTrainedModel, old_lengths: Lengths, lengths: Iterable[int]) -> Lengths:
    """Find by bisection the text lengths at which a model's computation changes.

    The function compares the logits of texts with the same first tokens but different lengths. The
    search ends if the model raises an error at a length.

    Args:
        mini: A miniature that was never called, since calls can change it.
        old_lengths: Known lengths at which the computation changes.
        lengths: Bounds of the intervals in which to search; the model must run at the smallest
            length.

    Returns:
        `old_lengths` and the new lengths.
    """

    @cache
    def logits_at(tokens: int) -> Tensor | None:
        return try_model(lambda: _text_logits(mini, tokens))[0]

    def has_switch(short: int, long: int) -> bool:
        logits, long_logits = logits_at(short), logits_at(long)
        if logits is None or long_logits is None:
            return True
        return not _is_close(logits.double(), long_logits[:short].double(), LONG_TOLERANCE)

    bounds = sorted(lengths)
    extras = {t + d for t in old_lengths.thresholds for d in (-1, 0, 1)}
    searched = sorted({*bounds, *(n for n in extras if bounds[0] < n < bounds[-1])})
    thresholds, all_differ = old_lengths.thresholds, old_lengths.all_differ
    for start, stop in pairwise(searched):
        if old_lengths.side(start) != old_lengths.side(stop):
            continue
        while not all_differ and has_switch(start, stop):
            low, high = start, stop
            while high - low > 1:
                middle = (low + high) // 2
                low, high = (low, middle) if has_switch(start, middle) else (middle, high)
            if logits_at(high) is None:
                return Lengths(thresholds, all_differ)
            thresholds, start = (*thresholds, high), high
            is_last = len(thresholds) == len(old_lengths.thresholds) + MAX_SWITCHES
            all_differ = is_last or has_switch(start, start + 1)
    return Lengths(thresholds, all_differ)


def build_shortened(mini: PreTrainedModel, paths: Collection[NumberPath]) -> list[Any]:
    """Build copies of a miniature with very small attention windows and other length limits.

    `paths` locates the limits in the configuration. The function builds one copy in which all
    limits are small. If this copy cannot run, the function builds one copy per limit instead.
    """
    values: Mapping[NumberPath, float] = dict(find_numbers(mini.config.get_text_config()))
    order = sorted((path for path in paths if path in values), key=lambda path: values[path])
    steps = chain(SMALL_NUMBERS, repeat(SMALL_NUMBERS[-1]))
    numbers = {path: type(values[path])(step) for path, step in zip(order, steps, strict=False)}

    def build(numbers: dict[NumberPath, float]) -> Any | None:
        model = build_random_model(type(mini), replace_numbers(mini.config, numbers))
        if model is not None and isinstance(attempt(lambda: _text_logits(model, LONG)), Exception):
            return None  # numbers that contradict each other
        return model

    if not numbers:
        return []
    models = [build(numbers)]
    if models[0] is None:
        models = [build({path: number}) for path, number in numbers.items()]
    return [model for model in models if model is not None]


@torch.inference_mode()
def _text_logits(model: PreTrainedModel, tokens: int, last_token: int | None = None) -> Tensor:
    """Compute logits [tokens, vocabulary] of a fixed text, with a new copy of a model.

    The text has `tokens` tokens. `last_token` replaces the last token if given.
    """
    ids = torch.arange(tokens)[None] * 7 % 31 + 3
    if last_token is not None:
        ids[0, -1] = last_token
    return compute_logits(copy.deepcopy(model), ids)[0]


def _is_equal(x: Tensor, y: Tensor) -> bool:
    # With another number, a miniature may return float32 logits only.
    return _is_close(x.double(), y.double(), max(EQUAL_TOLERANCE[t.dtype] for t in (x, y)))


def _is_close(x: Tensor, y: Tensor, tolerance: float) -> bool:
    return torch.allclose(x, y, rtol=tolerance, atol=tolerance, equal_nan=True)


@torch.inference_mode()
def _find_call_effects(model: PreTrainedModel) -> tuple[set[str], set[tuple[str, str]]]:
    """Call a model twice, and find which attributes of its modules change.

    Returns two sets: the names of attributes that the second call changes, and the (module, name)
    pairs that the first call changes. The second set is empty if the first call changes no
    parameters.
    """
    model = copy.deepcopy(model)
    states = [record_state(model)]
    for tokens in (SHORT, LONG):
        model(torch.arange(tokens)[None] % 31 + 3, use_cache=False)
        states.append(record_state(model))
    first, later_changes = (changed_keys(old, new) for old, new in pairwise(states))
    parameters = {tuple(name.rpartition(".")[::2]) for name, _ in model.named_parameters()}
    return {name for _, name in later_changes}, first if first & parameters else set()


log = logging.getLogger(__name__)
PROBE_TEXT = tuple(5 * index % 29 + 2 for index in range(12))
"""Text that is read to compare models."""
MAX_LAYERS_NAMED = 3
"""Maximum number of layers that a note lists as impossible to remove in a checkpoint."""
_ITSELF = "the intact model computes different logits after it is saved and loaded"
_OTHER = "the changed model cannot be described by a configuration"
_NOT = "the model does not run without these layers"
_COMPUTED = "the model computes some values during loading, and a copy in memory lacks the values"


@dataclass(frozen=True)
class _Outputs:
    """Logits of a model without some layers, for three ways of removing the layers.

    Attributes:
        copy: Logits of a copy in memory without the layers.
        skip: Logits of the model if the removed layers stay in the model and return their input.
        saved: Logits of the copy after saving and loading; None if the copy cannot be saved and
            loaded.
        lacks: True if the model computes attribute values during loading that the copy in memory
            lacks.
        refusal: Reason why the copy in memory does not run; None if the copy runs.
        unsaved: Reason why the copy cannot be saved and loaded.
    """

    copy: Tensor | None
    skip: Tensor | None
    saved: Tensor | None
    lacks: bool
    refusal: str | None
    unsaved: str

    @property
    def differs_from_skip(self) -> bool:
        """True if skipping layers gives other logits than a saved copy without these layers."""
        return self.saved is not None and not logits_alike(self.saved, self.skip)

    @property
    def needs_loading(self) -> bool:
        """True if the copy computes different logits after saving and loading."""
        return self.saved is not None and (self.lacks or not logits_alike(self.saved, self.copy))

    @property
    def must_stay(self) -> bool:
        """True if removed layers must stay in the model and return their input."""
        return self.saved is None and not logits_alike(self.copy, self.skip)


def find_removed_model(
    truth: Reference, ablations: Ablations, verdict: SharingVerdict
) -> SharingVerdict:
    """Find how to remove layers so that the model acts like a saved checkpoint.

    In most models, skipping a layer gives the same logits as a checkpoint without the layer. If the
    logits differ, each ablation is computed separately. If no checkpoint can be made, and a copy in
    memory gives other logits, the layer stays in the model and returns its input. Returns
    `verdict`, the self-check's result so far, with these findings. Raises CellError if the model
    does not run without a layer.
    """
    engine = truth.engine
    name = engine.class_name
    original = engine.ablate(INTACT)
    loading = _test_loading(engine, original)
    results: dict[Ablation, _Outputs] = {}
    for ablation in ablations:
        layer_ablation = Ablation.from_changes(*ablation.repetitions, removed=ablation.removed())
        if layer_ablation != INTACT and layer_ablation not in results:
            outputs = _compute_outputs(truth, original, layer_ablation, loading)
            results[layer_ablation] = outputs
            if outputs.copy is None and outputs.skip is None and outputs.saved is None:
                ablation_name = _describe_ablation(layer_ablation)
                raise CellError(
                    f"{name} does not run {ablation_name} ({outputs.refusal}); remove the layer "
                    "from the setting 'layer'"
                )
    for _ in range(2):
        in_place = any(outputs.must_stay for outputs in results.values())
        differs = any(outputs.differs_from_skip for outputs in results.values())
        needs_loading = any(outputs.needs_loading for outputs in results.values())
        as_loaded = needs_loading or (in_place and differs)
        quirks = replace(engine.quirks, in_place=in_place, as_loaded=as_loaded)
        copies = results.items() if as_loaded else ()
        candidate = replace(engine, quirks=quirks)
        mismatches = [ablation for ablation, o in copies if _is_mismatch(candidate, ablation, o)]
        if not mismatches:
            break
        # Copies in memory cannot be made like these checkpoints: try again without them.
        for ablation in mismatches:
            results[ablation] = replace(results[ablation], saved=None, unsaved=_COMPUTED)
    else:
        ablation_name, outputs = _describe_ablation(mismatches[0]), results[mismatches[0]]
        reason = outputs.refusal or outputs.unsaved
        raise CellError(
            f"the change '{ablation_name}' of the model {name} cannot be measured ({reason}); "
            "remove the layer from the setting 'layer'"
        )
    note = _describe_unsaved(results)
    verdict = replace(verdict, in_place=in_place, as_loaded=as_loaded, checkpoint_note=note)
    if differs:
        note = (
            "a saved checkpoint without the layer gives different logits than skipping the layer, "
            "so each ablation is computed separately"
        )
        return replace(verdict, sharing=PLAIN, sharing_note=note)
    return verdict


@dataclass(frozen=True)
class _Loading:
    """Models that help to simulate saving a changed copy and loading the checkpoint.

    Attributes:
        full_model: Model that the class builds from the intact model's configuration; None if
            saving and loading changes the logits of the intact model.
        cut_models: Cache of models that are built from configurations with fewer layers; None if
            models cannot be cached, because calls change their attributes.
    """

    full_model: PreTrainedModel | None
    cut_models: dict[str, Any] | None

    def reload_copy(self, engine: Engine, copied: Engine, ablation: Ablation) -> Engine:
        """Build the model that loading a saved checkpoint of `copied` would give.

        `engine` has the intact model, and `copied` has a copy that `ablation` changed. Returns an
        engine of the loaded model.
        """
        layers = engine.layers_left(ablation)
        model = simulate_reload(copied.loaded.model, layers, self.cut_models)
        # The effects of the first call are known for the whole model's layers, not for these.
        return replace(copied, loaded=replace(copied.loaded, model=model), quirks=NO_QUIRKS)


def _test_loading(engine: Engine, original: Engine) -> _Loading:
    """Test whether the intact model has the same logits after saving and loading.

    `original` is the engine of an unchanged copy of the model. If the logits change or loading
    fails, the result's `full_model` is None.
    """
    model, quirks = engine.loaded.model, engine.quirks
    loading = _Loading(None, None if quirks.first or quirks.leftovers else {})
    try:
        full_model = build_from_config(model)
        loaded_engine = loading.reload_copy(engine, original, INTACT)
    except ModelError as error:
        log.debug("a saved copy of %s cannot be loaded: %s", engine.class_name, error)
        return loading
    logits, reason = _probe_logits(loaded_engine)
    if logits_alike(logits, _probe_logits(original)[0]):
        return replace(loading, full_model=full_model)
    log.debug("when reloaded, %s fails or gives other logits: %s", engine.class_name, reason)
    return loading


def _compute_outputs(
    truth: Reference, original: Engine, ablation: Ablation, loading: _Loading
) -> _Outputs:
    """Compute the logits of a model without some layers, for three ways of removing layers.

    The ways are: a copy in memory, skipped layers, and a saved copy. `original` is the engine of an
    unchanged copy of the model.
    """
    engine, saved, lacks = truth.engine, None, False
    unsaved = _ITSELF if loading.full_model is None else _NOT
    cut_engine, refusal = try_model(lambda: truth.ablate(ablation))
    if cut_engine is not None and loading.full_model is not None:
        try:
            reloaded = loading.reload_copy(engine, cut_engine, ablation)
        except ModelError as error:
            unsaved = _OTHER
            log.debug("no checkpoint %s: %s", _describe_ablation(ablation), error)
        else:
            models = (engine.loaded.model, loading.full_model, cut_engine.loaded.model)
            layers = engine.layers_left(ablation)
            lacks = bool(find_stale_attributes(*models, reloaded.loaded.model, layers))
            saved, reason = _probe_logits(reloaded)
            if saved is None:
                log.debug(
                    "the model loads %s but does not run: %s", _describe_ablation(ablation), reason
                )
    logits, refusal = (None, refusal) if cut_engine is None else _probe_logits(cut_engine)
    skip_logits = logits
    if not ablation.repetitions:
        with _skip_layers(original, ablation):
            skip_logits, _ = _probe_logits(original)
    return _Outputs(logits, skip_logits, saved, lacks, refusal, unsaved)


def _is_mismatch(engine: Engine, ablation: Ablation, outputs: _Outputs) -> bool:
    """Return whether a copy that `ablation` changes has unexpected logits.

    The expected logits are `outputs.saved`, or `outputs.skip` if `outputs.saved` is None.
    """
    logits, _ = try_model(lambda: engine.ablate(ablation).read_logits(PROBE_TEXT))
    return not logits_alike(logits, outputs.skip if outputs.saved is None else outputs.saved)


def _describe_unsaved(results: Mapping[Ablation, _Outputs]) -> str | None:
    """Describe for users which ablations cannot be saved as a checkpoint; None if all can."""
    clauses = []
    for repeats, all_phrase, measured_model in (
        (False, "with removed layers", "the model with skipped layers"),
        (True, "with repeated layers", "the model changed in memory"),
    ):
        group = [ablation for ablation in results if bool(ablation.repetitions) == repeats]
        unsaved = [ablation for ablation in group if results[ablation].saved is None]
        if not unsaved:
            continue
        names = [_describe_ablation(ablation) for ablation in unsaved[:MAX_LAYERS_NAMED]]
        if len(unsaved) > MAX_LAYERS_NAMED:
            names.append(f"{len(unsaved) - MAX_LAYERS_NAMED} more")
        description = " or ".join(names) if len(unsaved) < len(group) else all_phrase
        reason = results[unsaved[0]].unsaved
        clauses.append(
            f"a model {description} cannot be saved as a usable checkpoint ({reason}), so tracker "
            f"measures {measured_model} instead of a checkpoint"
        )
    return "; ".join(clauses) or None


def _describe_ablation(ablation: Ablation) -> str:
    layers = ablation.removed()
    plural = "s" if len(layers) > 1 else ""
    words = [f"without layer{plural} {', '.join(map(str, layers))}"] if layers else []
    repeat_words = [f"with {span.target} repeated" for span in ablation.repetitions]
    return " and ".join(words + repeat_words)


def _probe_logits(engine: Engine) -> tuple[Tensor | None, str | None]:
    """Compute the logits [tokens, vocabulary] of `PROBE_TEXT`.

    Returns the pair (logits, None), or (None, reason) if the model fails.
    """
    return try_model(lambda: engine.read_logits(PROBE_TEXT))


def _skip_layers(engine: Engine, ablation: Ablation) -> AbstractContextManager[None]:
    """Make the removed layers of an ablation return their input until the context exits."""
    layers = (engine.loaded.layers[layer] for layer in ablation.removed())
    handles = (replace_output(layer, lambda state: state) for layer in layers)
    return enter_all(chain.from_iterable(handles))


def logits_alike(x: Tensor | None, y: Tensor | None) -> bool:
    """Return whether logits are equal up to rounding; missing logits are never equal."""
    if x is None or y is None or x.shape != y.shape:
        return False
    return _is_close(x, y, MODEL_TOLERANCE.get(x.dtype, 0.5))
