"""What a model without a layer is, and whether it can be cut to be that."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from tracker.core.changes import INTACT, Ablation
from tracker.core.errors import CellError, ModelError
from tracker.engine.refusal import tried
from tracker.engine.scoring.sharing import NO_HABITS, PLAIN
from tracker.engine.scoring.sweep import Engine
from tracker.engine.selfcheck.reasons import Verdict
from tracker.engine.selfcheck.reference import Reference
from tracker.models.hooks import all_of, returning
from tracker.models.reloaded import as_made, lacking, reloaded

log = logging.getLogger(__name__)
TEXT = tuple(5 * place % 29 + 2 for place in range(12))
"""What is read to see what a model is."""
SHOWN = 3
"""How many of the layers that no checkpoint lacks are named."""
_ITSELF = "the model itself, saved and loaded, is another one"
_OTHER = "no configuration describes what is left"
_NOT = "what is left does not run"
_COMPUTED = "what its class computes when it is loaded cannot be given to a model in memory"


@dataclass(frozen=True)
class _Seen:
    """What a model says of a text without some layers, and why where it says nothing.

    Attributes:
        copy: A copy in memory.
        skip: The model whose layers stay in their places and hand on their input.
        saved: What is loaded of the copy once it is saved.
        lacks: Whether the copy has not all that its class computes when it is loaded.
        refusal: Why the copy says nothing.
        unsaved: Why nothing is loaded.
    """

    copy: Tensor | None
    skip: Tensor | None
    saved: Tensor | None
    lacks: bool
    refusal: str | None
    unsaved: str

    @property
    def is_apart(self) -> bool:
        """Whether the checkpoint is another model than the one that skips the layers."""
        return self.saved is not None and not logits_alike(self.saved, self.skip)

    @property
    def is_anew(self) -> bool:
        """Whether the checkpoint is another model than the copy."""
        return self.saved is not None and (self.lacks or not logits_alike(self.saved, self.copy))

    @property
    def stays(self) -> bool:
        """Whether the layers must stay in their places."""
        return self.saved is None and not logits_alike(self.copy, self.skip)


def as_removed(truth: Reference, ablations: Sequence[Ablation], verdict: Verdict) -> Verdict:
    """Find out what the model without a layer is; raises CellError where it does not run.

    It is what a checkpoint without the layer is when it is loaded. Nearly always that is the model
    whose layer hands on its input, and streams that skip the layer compute it. Where it is another
    model (what layers do depends on their places), nothing is shared over depth; where the class
    computes something from their places when it is loaded, copies get that. Where there is no such
    checkpoint, the layer stays in its place and hands on its input, and that is said.
    """
    engine = truth.engine
    name = engine.class_name
    still = engine.without(INTACT)
    loading = _loading(engine, still)
    seen: dict[Ablation, _Seen] = {}
    for ablation in ablations:
        changed = Ablation.of(*ablation.repeated, removed=ablation.removed())
        if changed != INTACT and changed not in seen:
            seen[changed] = found = _see(truth, still, changed, loading)
            if found.copy is None and found.skip is None and found.saved is None:
                raise CellError(
                    f"{name} does not run {_named(changed)} ({found.refusal}); leave it "
                    "out of 'layer'"
                )
    for _ in range(2):
        stay = any(found.stays for found in seen.values())
        apart = any(found.is_apart for found in seen.values())
        loaded = any(found.is_anew for found in seen.values()) or (stay and apart)
        made = replace(engine, quirks=replace(engine.quirks, stay=stay, loaded=loaded))
        other = [of for of, found in seen.items() if loaded and _is_other(made, of, found)]
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
    """What is needed to see what is loaded of copies.

    Attributes:
        whole: What the class makes of the whole model's configuration; None where that is another
            model.
        known: What it made of other configurations; None for a model whose calls change it.
    """

    whole: Any
    known: dict[str, Any] | None

    def of(self, engine: Engine, copied: Engine, ablation: Ablation) -> Engine:
        """Make an engine for what is loaded of a copy once it is saved; ModelError for nothing."""
        again = reloaded(copied.loaded.model, engine.left(ablation), self.known)
        # What the first call changes is known of the whole model's layers, not of these.
        return replace(copied, loaded=replace(copied.loaded, model=again), quirks=NO_HABITS)


def _loading(engine: Engine, still: Engine) -> _Loading:
    """See whether the whole model, saved and loaded, is itself."""
    model, quirks = engine.loaded.model, engine.quirks
    found = _Loading(None, None if quirks.first or quirks.leftovers else {})
    try:
        whole, again = as_made(model), found.of(engine, still, INTACT)
    except ModelError as error:
        log.debug("%s is not loaded as it is: %s", engine.class_name, error)
        return found
    said, why = _text_of(again)
    if logits_alike(said, _text_of(still)[0]):
        return replace(found, whole=whole)
    log.debug("%s, saved and loaded, says: %s", engine.class_name, why)
    return found


def _see(truth: Reference, still: Engine, ablation: Ablation, loading: _Loading) -> _Seen:
    """Ask a model for a text without some layers, in each way."""
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
            model, twin, made = (each.loaded.model for each in (engine, copied, again))
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
    return _Seen(copy, skip, saved, lacks, refusal, unsaved)


def _is_other(engine: Engine, ablation: Ablation, seen: _Seen) -> bool:
    """Whether a copy is not the model that it is to be."""
    said, _ = tried(lambda: engine.without(ablation).read(TEXT))
    return not logits_alike(said, seen.skip if seen.saved is None else seen.saved)


def _which(seen: Mapping[Ablation, _Seen]) -> str | None:
    """Return where a number is not that of a checkpoint, and what it is of instead."""
    without = [ablation for ablation, found in seen.items() if found.saved is None]
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
    """What a model says of a text [tokens, vocabulary], or why it says nothing."""
    return tried(lambda: engine.read(TEXT))


def _handing_on(engine: Engine, ablation: Ablation) -> AbstractContextManager[None]:
    """Let the layers of an ablation stay in their places and hand on their input."""
    layers = (engine.loaded.layers[layer] for layer in ablation.removed())
    return all_of(handle for layer in layers for handle in returning(layer, lambda state: state))


def logits_alike(one: Tensor | None, other: Tensor | None) -> bool:
    """Compare logits up to rounding; what is missing is like nothing."""
    if one is None or other is None:
        return False
    within = 1e-6 if one.dtype == torch.float64 else 1e-3 if one.dtype == torch.float32 else 0.5
    return one.shape == other.shape and torch.allclose(
        one, other, rtol=within, atol=within, equal_nan=True
    )
