"""Find how a model reacts to text lengths and repeated calls, and how it runs without a layer.

A number in the configuration of the model's miniature is made small, and the effect shows the role
of this number. No logits change: the number does not matter here. Later tokens change: the number
is a window, a chunk or a minimum. Earlier tokens change when the text is longer: the model makes a
choice by the length of the whole call.
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

from tracker.core.changes import INTACT, Ablation
from tracker.core.errors import CellError, ModelError, attempt
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
    """Results of the experiments on an architecture.

    Attributes:
        relevant_numbers: The numbers that change the logits of a text of `LONG` tokens.
        lengths: Numbers at which the logits depend on the length of the whole call; True if every
            length beyond differs from every other. The empty path if the logits always depend on
            the length.
        leftovers: Names of attributes that a call changes and that affect the next call.
        first: Attributes that the first call changes permanently; empty if they include no weight.
        causal: Whether the logits of a token do not depend on later tokens.
    """

    relevant_numbers: tuple[NumberPath, ...] = ()
    lengths: tuple[tuple[NumberPath, bool], ...] = ()
    leftovers: frozenset[str] = frozenset()
    first: frozenset[tuple[str, str]] = frozenset()
    causal: bool = True


def find_quirks(mini: PreTrainedModel, paths: Collection[NumberPath]) -> QuirkFindings:
    """Experiment with numbers in the configuration of a miniature that no call has changed yet."""
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
    """Find the effects of changing a number in the configuration; None if no logits change.

    Returns whether the length of a call matters, whether it also does beyond the short one, and the
    results of `_find_call_effects`.
    """
    logits = _text_logits(model, LONG)
    if _is_equal(logits, usual_logits):
        return None
    switches = not any_length and not _is_equal(logits[:SHORT], _text_logits(model, SHORT))
    all_differ = switches and not _is_equal(logits[:MIDDLE], _text_logits(model, MIDDLE))
    return (switches, all_differ, *_find_call_effects(model))


def find_switches(mini: PreTrainedModel, old_lengths: Lengths, lengths: Iterable[int]) -> Lengths:
    """Find the lengths of a call at which a model's computation changes.

    The logits of a text's first tokens are the same in a call of any length, unless there is a
    threshold between two lengths. Its origin may be a product of numbers, a list, or code.
    Bisection finds it. Lengths beyond one that the model refuses are not searched.

    Args:
        mini: A miniature that no call has changed yet.
        old_lengths: The lengths at which a change is already known.
        lengths: The lengths between which to search; the model runs at the first length.

    Returns:
        All known lengths, old and new.
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
    """Build miniatures whose windows, chunks and thresholds are crossed by short texts.

    If possible, one miniature has all numbers small; otherwise there is a miniature for each
    number.
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
    """Return the logits of a text on a fresh copy of a model [tokens, vocabulary]."""
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
    """Return attributes that differ after another call, and those that the first call changes."""
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
_ITSELF = "the model itself computes other logits after it is saved and loaded"
_OTHER = "no configuration describes what is left"
_NOT = "what is left does not run"
_COMPUTED = "what its class computes when it is loaded cannot be given to a model in memory"


@dataclass(frozen=True)
class _Outputs:
    """Logits of a text without some layers, or the reasons why there are none.

    Attributes:
        copy: Logits of a copy in memory.
        skip: Logits of the model whose layers stay in place and pass on their input.
        saved: Logits of the copy after saving and loading.
        lacks: Whether the copy lacks values that its class computes on loading.
        refusal: Reason why the copy does not run.
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
        """True if the checkpoint differs from the model that skips the layers."""
        return self.saved is not None and not logits_alike(self.saved, self.skip)

    @property
    def needs_loading(self) -> bool:
        """True if the checkpoint differs from the copy."""
        return self.saved is not None and (self.lacks or not logits_alike(self.saved, self.copy))

    @property
    def must_stay(self) -> bool:
        """True if the layers must stay in place."""
        return self.saved is None and not logits_alike(self.copy, self.skip)


def find_removed_model(
    truth: Reference, ablations: Ablations, verdict: SharingVerdict
) -> SharingVerdict:
    """Find how a model without a layer must be computed; raise CellError if it does not run.

    The target is a checkpoint without the layer, as it is loaded. Nearly always the checkpoint
    equals the model whose layer returns its input, as in streams that skip the layer. If the
    checkpoint is another model (layers depend on their positions), nothing is shared over depth. If
    the class computes something from positions on loading, copies get that. If there is no such
    checkpoint, the layer stays in place and passes on its input, and the verdict says so.
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
                description = _describe_ablation(layer_ablation)
                reason = f"does not run {description} ({outputs.refusal})"
                raise CellError(f"{name} {reason}; leave it out of 'layer'")
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
        description, outputs = _describe_ablation(mismatches[0]), results[mismatches[0]]
        raise CellError(
            f"{name} cannot be cut to be {description} ({outputs.refusal or outputs.unsaved}); "
            "leave it out of 'layer'"
        )
    note = _describe_unsaved(results)
    verdict = replace(verdict, in_place=in_place, as_loaded=as_loaded, checkpoint_note=note)
    if differs:
        note = "a checkpoint without a layer is not the model that skips it, so nothing is shared"
        return replace(verdict, sharing=PLAIN, sharing_note=note)
    return verdict


@dataclass(frozen=True)
class _Loading:
    """Models built from configurations, to see how copies are loaded.

    Attributes:
        full_model: The class's model of the whole model's configuration; None if it differs from
            the model.
        cut_models: Models built from other configurations; None for a model whose calls change it.
    """

    full_model: PreTrainedModel | None
    cut_models: dict[str, Any] | None

    def reload_copy(self, engine: Engine, copied: Engine, ablation: Ablation) -> Engine:
        """Build an engine for a saved and loaded copy; raise ModelError if there is none."""
        layers = engine.layers_left(ablation)
        model = simulate_reload(copied.loaded.model, layers, self.cut_models)
        # The effects of the first call are known for the whole model's layers, not for these.
        return replace(copied, loaded=replace(copied.loaded, model=model), quirks=NO_QUIRKS)


def _test_loading(engine: Engine, original: Engine) -> _Loading:
    """Test whether the whole model stays the same when it is saved and loaded."""
    model, quirks = engine.loaded.model, engine.quirks
    loading = _Loading(None, None if quirks.first or quirks.leftovers else {})
    try:
        full_model = build_from_config(model)
        loaded_engine = loading.reload_copy(engine, original, INTACT)
    except ModelError as error:
        log.debug("%s cannot be loaded unchanged: %s", engine.class_name, error)
        return loading
    logits, reason = _probe_logits(loaded_engine)
    if logits_alike(logits, _probe_logits(original)[0]):
        return replace(loading, full_model=full_model)
    log.debug("%s, saved and loaded, differs or raises: %s", engine.class_name, reason)
    return loading


def _compute_outputs(
    truth: Reference, original: Engine, ablation: Ablation, loading: _Loading
) -> _Outputs:
    """Compute the logits of a text without some layers in each way of removing them."""
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
    """Check whether a copy differs from the model that it should be."""
    logits, _ = try_model(lambda: engine.ablate(ablation).read_logits(PROBE_TEXT))
    return not logits_alike(logits, outputs.skip if outputs.saved is None else outputs.saved)


def _describe_unsaved(results: Mapping[Ablation, _Outputs]) -> str | None:
    """Describe the results that belong to no checkpoint, and the model to which they belong."""
    clauses = []
    for repeats, all_phrase, model in (
        (False, "whatever is removed", "whose layer stays in its place and hands on its input"),
        (True, "whatever is passed again", "that passes these layers again in memory"),
    ):
        group = [ablation for ablation in results if bool(ablation.repetitions) == repeats]
        unsaved = [ablation for ablation in group if results[ablation].saved is None]
        if not unsaved:
            continue
        names = [_describe_ablation(ablation) for ablation in unsaved[:MAX_LAYERS_NAMED]]
        if len(unsaved) > MAX_LAYERS_NAMED:
            names.append(f"{len(unsaved) - MAX_LAYERS_NAMED} more")
        subject = " or ".join(names) if len(unsaved) < len(group) else all_phrase
        clauses.append(
            f"{subject}, what is measured is the model {model}, not a saved checkpoint "
            f"({results[unsaved[0]].unsaved})"
        )
    return "; ".join(clauses) or None


def _describe_ablation(ablation: Ablation) -> str:
    layers = ablation.removed()
    plural = "s" if len(layers) > 1 else ""
    words = [f"without layer{plural} {', '.join(map(str, layers))}"] if layers else []
    repeat_words = [f"with {span.target} passed again" for span in ablation.repetitions]
    return " and ".join(words + repeat_words)


def _probe_logits(engine: Engine) -> tuple[Tensor | None, str | None]:
    """Return the logits of a text [tokens, vocabulary], or the reason why there are none."""
    return try_model(lambda: engine.read_logits(PROBE_TEXT))


def _skip_layers(engine: Engine, ablation: Ablation) -> AbstractContextManager[None]:
    """Make the layers of an ablation stay in place and return their input."""
    layers = (engine.loaded.layers[layer] for layer in ablation.removed())
    handles = (replace_output(layer, lambda state: state) for layer in layers)
    return enter_all(chain.from_iterable(handles))


def logits_alike(x: Tensor | None, y: Tensor | None) -> bool:
    """Return whether logits are equal up to rounding; missing logits are never equal."""
    if x is None or y is None or x.shape != y.shape:
        return False
    return _is_close(x, y, MODEL_TOLERANCE.get(x.dtype, 0.5))
