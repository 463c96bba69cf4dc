"""Find how a model treats lengths and calls, and what it computes without a layer.

A number in the configuration of its miniature is made small, and the effect shows its role. Nothing
changes: it does not matter here. Later tokens change: it is a window, a chunk, a floor. Earlier
tokens change when the text is longer: something is chosen by the length of the whole call.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from tracker.core.changes import INTACT, Ablation
from tracker.core.errors import CellError, ModelError, attempt
from tracker.engine.refusal import tried
from tracker.engine.scoring.model import NO_HABITS, PLAIN, logits_of
from tracker.engine.scoring.rows import Lengths
from tracker.engine.scoring.sweep import Engine
from tracker.engine.selfcheck.reference import Reference, Verdict
from tracker.models.hooks import all_of, returning
from tracker.models.miniature import NumberPath, build, numbers, with_numbers
from tracker.models.pruned import as_made, changed, lacking, reloaded, remember, shapes

SHORT, LONG, OTHER = 5, 24, 20
"""Lengths of text on both sides of a number that was made small."""
SMALL = 6
STEPS = (6, 9, 12, 16, 20, 24, 28, 32)
"""Small values for several numbers, which stay distinct and in order."""
SAME = {torch.float64: 1e-6, torch.float32: 1e-4}
"""Tolerance for equal logits; some models compute parts of them in float32."""
MOVED = 1e-3
"""Tolerance for logits of a long text: the sum of rounding errors is far below."""
MANY = 4
"""Number of lengths with a change from which every length counts as one."""


@dataclass(frozen=True)
class Findings:
    """Results of the experiments on an architecture.

    Attributes:
        matters: The numbers that change the logits of a text of `LONG` tokens.
        lengths: Those at which the logits depend on the length of the whole call; True if every
            length beyond differs from every other. The empty path if the logits always depend on
            the length.
        leftovers: Names of attributes that one call leaves changed for the next.
        first: Attributes that the first call changes for good; empty if no weight is among them.
        causal: Whether the logits of a token do not depend on later tokens.
    """

    matters: tuple[NumberPath, ...] = ()
    lengths: tuple[tuple[NumberPath, bool], ...] = ()
    leftovers: frozenset[str] = frozenset()
    first: frozenset[tuple[str, str]] = frozenset()
    causal: bool = True


def find_quirks(small: PreTrainedModel, paths: Collection[NumberPath]) -> Findings:
    """Experiment with numbers in the configuration of a miniature that no call has changed yet."""
    kind, config = type(small), small.config
    usual = _said(small, LONG)
    leftovers, first = _changed_by_calls(small)
    every_call = not _same(usual[:SHORT], _said(small, SHORT))
    causal = _same(usual[:-1], _said(small, LONG, last=1)[:-1])
    matters: list[NumberPath] = []
    lengths: list[tuple[NumberPath, bool]] = [((), True)] if every_call else []
    own = shapes(small)
    for path, value in numbers(config.get_text_config()):
        if path not in paths:
            continue
        little = SMALL if value != SMALL else SMALL + 2
        other = build(kind, with_numbers(config, {path: type(value)(little)}), own)
        if other is None:
            continue
        effect = attempt(partial(_effect, other, usual, every_call))
        if effect is None or isinstance(effect, Exception):  # the model rejects this number
            continue
        switches, also_longer, left, too = effect
        if switches:
            lengths.append((path, also_longer))
        matters.append(path)
        leftovers |= left
        first |= too
    return Findings(tuple(matters), tuple(lengths), frozenset(leftovers), frozenset(first), causal)


def _effect(
    model: PreTrainedModel, usual: Tensor, every_call: bool
) -> tuple[bool, bool, set[str], set[tuple[str, str]]] | None:
    """Find the effects of another number in the configuration; None if it changes no logits.

    Returns whether the length of a call matters, whether it also does beyond the short one, and the
    results of `_changed_by_calls`.
    """
    long = _said(model, LONG)
    if _same(long, usual):
        return None
    switches = not every_call and not _same(long[:SHORT], _said(model, SHORT))
    also_longer = switches and not _same(long[:OTHER], _said(model, OTHER))
    return (switches, also_longer, *_changed_by_calls(model))


def find_switches(small: PreTrainedModel, known: Lengths, lengths: Iterable[int]) -> Lengths:
    """Find lengths of a call at which a model begins to compute otherwise.

    The logits of a text's first tokens are the same in a call of any length, unless there is a
    threshold between two lengths. Its origin may be a product of numbers, a list, or code.
    Bisection finds it. Lengths beyond one that the model refuses are not searched.

    Args:
        small: A miniature that no call has changed yet.
        known: The lengths at which something is known to change.
        lengths: The lengths between which to search; the model runs at the first.

    Returns:
        All lengths known then.
    """

    @cache
    def ask(tokens: int) -> Tensor | None:
        return tried(lambda: _said(small, tokens))[0]

    def alike(one: int, other: int) -> bool:
        short, long = ask(one), ask(other)
        return short is not None and long is not None and _near(short, long[:one], MOVED)

    ends = sorted(lengths)
    around = {t + d for t in known.thresholds for d in (-1, 0, 1)}
    found: list[int] = []
    each = known.each
    for start, stop in pairwise(sorted({*ends, *(n for n in around if ends[0] < n < ends[-1])})):
        while known.side(start) == known.side(stop) and not each and not alike(start, stop):
            same, other = start, stop
            while other - same > 1:
                middle = (same + other) // 2
                same, other = (middle, other) if alike(start, middle) else (same, middle)
            if ask(other) is None:
                return Lengths((*known.thresholds, *found), each)
            found.append(start := other)
            each = len(found) == MANY or not alike(start, start + 1)
    return Lengths((*known.thresholds, *found), each)


def shortened(small: PreTrainedModel, paths: Collection[NumberPath]) -> list[Any]:
    """Build miniatures whose windows, chunks and thresholds are crossed by short texts.

    One miniature has all of the numbers small if it can be built; otherwise there is one for each.
    """
    config = small.config
    values: Mapping[NumberPath, float] = dict(numbers(config.get_text_config()))
    order = sorted((path for path in paths if path in values), key=lambda path: values[path])
    if not order:
        return []
    steps = {p: type(values[p])(STEPS[min(i, len(STEPS) - 1)]) for i, p in enumerate(order)}
    together = _running(type(small), with_numbers(config, steps))
    if together is not None:
        return [together]
    alone = [_running(type(small), with_numbers(config, {p: steps[p]})) for p in order]
    return [each for each in alone if each is not None]


def _running(kind: type, config: PreTrainedConfig) -> Any | None:
    model = build(kind, config)
    if model is not None and isinstance(attempt(lambda: _said(model, LONG)), Exception):
        return None  # numbers that contradict each other
    return model


@torch.inference_mode()
def _said(model: PreTrainedModel, tokens: int, last: int | None = None) -> Tensor:
    """Return the logits of a text on a fresh copy of a model [tokens, vocabulary]."""
    ids = torch.arange(tokens)[None] * 7 % 31 + 3
    if last is not None:
        ids[0, -1] = last
    return logits_of(copy.deepcopy(model), ids)[0]


def _same(one: Tensor, other: Tensor) -> bool:
    # With another number, a miniature may return float32 logits only.
    return _near(one, other, max(SAME[one.dtype], SAME[other.dtype]))


def _near(one: Tensor, other: Tensor, within: float) -> bool:
    return torch.allclose(one.double(), other.double(), rtol=within, atol=within, equal_nan=True)


@torch.inference_mode()
def _changed_by_calls(model: PreTrainedModel) -> tuple[set[str], set[tuple[str, str]]]:
    """Return attributes that differ after another call, and what the first changes for good."""
    model = copy.deepcopy(model)
    states = [remember(model)]
    for tokens in (SHORT, LONG):
        model(torch.arange(tokens)[None] % 31 + 3, use_cache=False)
        states.append(remember(model))
    first, later = (changed(before, after) for before, after in pairwise(states))
    parameters = {tuple(name.rpartition(".")[::2]) for name, _ in model.named_parameters()}
    return {name for _, name in later}, first if first & parameters else set()


log = logging.getLogger(__name__)
TEXT = tuple(5 * place % 29 + 2 for place in range(12))
"""Text that is read to compare models."""
SHOWN = 3
"""Maximum number of layers named that no checkpoint lacks."""
_ITSELF = "the model itself, saved and loaded, is another one"
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
        lacks: Whether the copy lacks some of what its class computes on loading.
        refusal: Reason why the copy does not run.
        unsaved: Reason why nothing is loaded.
    """

    copy: Tensor | None
    skip: Tensor | None
    saved: Tensor | None
    lacks: bool
    refusal: str | None
    unsaved: str

    @property
    def is_apart(self) -> bool:
        """True if the checkpoint differs from the model that skips the layers."""
        return self.saved is not None and not logits_alike(self.saved, self.skip)

    @property
    def is_anew(self) -> bool:
        """True if the checkpoint differs from the copy."""
        return self.saved is not None and (self.lacks or not logits_alike(self.saved, self.copy))

    @property
    def stays(self) -> bool:
        """True if the layers must stay in place."""
        return self.saved is None and not logits_alike(self.copy, self.skip)


def as_removed(truth: Reference, ablations: Sequence[Ablation], verdict: Verdict) -> Verdict:
    """Find which model a removed layer leaves; raise CellError if it does not run.

    The target is a checkpoint without the layer, as it is loaded. Nearly always that equals the
    model whose layer passes on its input, which is what streams that skip the layer compute. If
    it is another model (layers depend on their positions), nothing is shared over depth. If the
    class computes something from positions on loading, copies get that. If there is no such
    checkpoint, the layer stays in place and passes on its input, and the verdict says so.
    """
    engine = truth.engine
    name = engine.class_name
    still = engine.without(INTACT)
    loading = _loading(engine, still)
    seen: dict[Ablation, _Outputs] = {}
    for ablation in ablations:
        changed = Ablation.of(*ablation.repeated, removed=ablation.removed())
        if changed != INTACT and changed not in seen:
            seen[changed] = outputs = _see(truth, still, changed, loading)
            if outputs.copy is None and outputs.skip is None and outputs.saved is None:
                raise CellError(
                    f"{name} does not run {_named(changed)} ({outputs.refusal}); leave it "
                    "out of 'layer'"
                )
    for _ in range(2):
        stay = any(outputs.stays for outputs in seen.values())
        apart = any(outputs.is_apart for outputs in seen.values())
        loaded = any(outputs.is_anew for outputs in seen.values()) or (stay and apart)
        made = replace(engine, quirks=replace(engine.quirks, stay=stay, loaded=loaded))
        other = [of for of, outputs in seen.items() if loaded and _is_other(made, of, outputs)]
        if not other:
            break
        for ablation in other:
            seen[ablation] = replace(seen[ablation], saved=None, unsaved=_COMPUTED)
    else:
        why = seen[other[0]].refusal or seen[other[0]].unsaved
        raise CellError(
            f"{name} cannot be cut to be {_named(other[0])} ({why}); leave it out of 'layer'"
        )
    verdict = replace(verdict, stay=stay, loaded=loaded, which=_which(seen))
    if apart:
        lost = "a checkpoint without a layer is not the model that skips it, so nothing is shared"
        return replace(verdict, sharing=PLAIN, lost=lost)
    return verdict


@dataclass(frozen=True)
class _Loading:
    """Models built from configurations, to see how copies are loaded.

    Attributes:
        whole: The class's model of the whole model's configuration; None if it differs from the
            model.
        known: Models built from other configurations; None for a model whose calls change it.
    """

    whole: PreTrainedModel
    known: dict[str, Any] | None

    def of(self, engine: Engine, copied: Engine, ablation: Ablation) -> Engine:
        """Build an engine for a saved and loaded copy; raise ModelError if there is none."""
        again = reloaded(copied.loaded.model, engine.left(ablation), self.known)
        # The effects of the first call are known for the whole model's layers, not for these.
        return replace(copied, loaded=replace(copied.loaded, model=again), quirks=NO_HABITS)


def _loading(engine: Engine, still: Engine) -> _Loading:
    """Test whether the whole model, saved and loaded, is itself."""
    model, quirks = engine.loaded.model, engine.quirks
    loading = _Loading(None, None if quirks.first or quirks.leftovers else {})
    try:
        whole, again = as_made(model), loading.of(engine, still, INTACT)
    except ModelError as error:
        log.debug("%s is not loaded as it is: %s", engine.class_name, error)
        return loading
    logits, why = _text_of(again)
    if logits_alike(logits, _text_of(still)[0]):
        return replace(loading, whole=whole)
    log.debug("%s, saved and loaded, says: %s", engine.class_name, why)
    return loading


def _see(truth: Reference, still: Engine, ablation: Ablation, loading: _Loading) -> _Outputs:
    """Compute the logits of a text without some layers, in each way."""
    engine, saved, lacks = truth.engine, None, False
    unsaved = _ITSELF if loading.whole is None else _NOT
    copied, refusal = tried(lambda: truth.without(ablation))
    if copied is not None and loading.whole is not None:
        try:
            again = loading.of(engine, copied, ablation)
        except ModelError as error:
            unsaved = _OTHER
            log.debug("no checkpoint %s: %s", _named(ablation), error)
        else:
            model, twin, made = (e.loaded.model for e in (engine, copied, again))
            lacks = bool(lacking(model, loading.whole, twin, made, engine.left(ablation)))
            saved, why = _text_of(again)
            if saved is None:
                log.debug("loaded %s, it does not run: %s", _named(ablation), why)
    copy = None
    if copied is not None:
        copy, refusal = _text_of(copied)
    skip = copy
    if not ablation.repeated:
        with _handing_on(still, ablation):
            skip, _ = _text_of(still)
    return _Outputs(copy, skip, saved, lacks, refusal, unsaved)


def _is_other(engine: Engine, ablation: Ablation, seen: _Outputs) -> bool:
    """Check whether a copy differs from the model that it should be."""
    logits, _ = tried(lambda: engine.without(ablation).read(TEXT))
    return not logits_alike(logits, seen.skip if seen.saved is None else seen.saved)


def _which(seen: Mapping[Ablation, _Outputs]) -> str | None:
    """Describe which results are not of a checkpoint, and of which model they are instead."""
    without = [ablation for ablation, outputs in seen.items() if outputs.saved is None]
    clauses = []
    for repeats, every, model in (
        (False, "whatever is removed", "whose layer stays in its place and hands on its input"),
        (True, "whatever is passed again", "that passes these layers again in memory"),
    ):
        alike = [ablation for ablation in without if bool(ablation.repeated) == repeats]
        if not alike:
            continue
        names = [_named(ablation) for ablation in alike[:SHOWN]]
        names += [f"{len(alike) - SHOWN} more"] if len(alike) > SHOWN else []
        total = sum(bool(ablation.repeated) == repeats for ablation in seen)
        where = " or ".join(names) if len(alike) < total else every
        clauses.append(
            f"{where}, what is measured is the model {model}, not a saved checkpoint "
            f"({seen[alike[0]].unsaved})"
        )
    return "; ".join(clauses) or None


def _named(ablation: Ablation) -> str:
    layers = ablation.removed()
    plural = "s" if len(layers) > 1 else ""
    words = [f"without layer{plural} {', '.join(map(str, layers))}"] if layers else []
    again = [f"with {span.target} passed again" for span in ablation.repeated]
    return " and ".join(words + again)


def _text_of(engine: Engine) -> tuple[Tensor | None, str | None]:
    """Return the logits of a text [tokens, vocabulary], or the reason why there are none."""
    return tried(lambda: engine.read(TEXT))


def _handing_on(engine: Engine, ablation: Ablation) -> AbstractContextManager[None]:
    """Make the layers of an ablation stay in place and pass on their input."""
    layers = (engine.loaded.layers[layer] for layer in ablation.removed())
    return all_of(handle for layer in layers for handle in returning(layer, lambda state: state))


def logits_alike(logits: Tensor | None, other: Tensor | None) -> bool:
    """Return whether logits are equal up to rounding; missing ones equal nothing."""
    if logits is None or other is None:
        return False
    within = (
        1e-6 if logits.dtype == torch.float64 else 1e-3 if logits.dtype == torch.float32 else 0.5
    )
    return logits.shape == other.shape and torch.allclose(
        logits, other, rtol=within, atol=within, equal_nan=True
    )
