"""What a model without a layer is, and whether it can be cut to be that."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from tracker.ablations import INTACT, Ablation
from tracker.engine.refusal import refused
from tracker.engine.sharing import NO_HABITS, PLAIN
from tracker.engine.single import logits_of
from tracker.engine.sweep import Engine
from tracker.engine.verdict import Verdict
from tracker.errors import CellError

LARGEST = 10**8
"""Parameters up to which a second model of the same class is made, to see what it says."""


def as_cut(engine: Engine, ablations: Sequence[Ablation], verdict: Verdict, name: str) -> Verdict:
    """Find out what the model without a layer is; raises CellError where it does not run.

    It is what a checkpoint without the layer would be. Nearly always that is the model whose layer
    hands on its input, and streams that skip the layer compute it. Where it is another model (what
    layers do depends on their places), nothing is shared over depth; it must then be what its own
    configuration and weights make of it. Where no checkpoint can be cut, the layer stays in its
    place and hands on its input.
    """
    still = replace(engine, habits=replace(engine.habits, stay=True))
    wrong: list[tuple[Ablation, str]] = []
    by_nature = False
    for ablation in dict.fromkeys(Ablation(a.layers) for a in ablations if a.layers):
        one, why = _text_under(engine, ablation)
        other, _ = _text_under(still, ablation)
        if one is not None and other is not None and _alike(one, other):
            continue
        if one is not None and _is_its_own_checkpoint(engine, ablation, one):
            by_nature = True
            continue
        if other is None and one is None:
            raise CellError(
                f"{name} does not run without {_named(ablation)} ({why}); leave it out of 'layer'"
            )
        wrong.append((ablation, why or "it is not the model that it was without the layer"))
    if wrong and by_nature:
        ablation, why = wrong[0]
        raise CellError(
            f"{name} cannot be cut to be without {_named(ablation)} ({why}); leave it out of "
            "'layer'"
        )
    if by_nature:
        lost = "a checkpoint without a layer is not the model that skips it, so nothing is shared"
        return replace(verdict, sharing=PLAIN, lost=lost)
    return replace(verdict, stay=bool(wrong))


def _named(ablation: Ablation) -> str:
    plural = "s" if len(ablation.layers) > 1 else ""
    return f"layer{plural} {', '.join(map(str, ablation.layers))}"


def _text_under(engine: Engine, ablation: Ablation) -> tuple[torch.Tensor | None, str | None]:
    """What a changed model says of a text [tokens, vocabulary], or why it says nothing."""
    ids = torch.arange(12, device=engine.loaded.device)[None] * 5 % 29 + 2
    try:
        with torch.inference_mode():
            return logits_of(engine.without(ablation).loaded.model, ids)[0], None
    except Exception as error:
        why = refused(error)
        if why is None:
            raise
        return None, why


def _alike(one: torch.Tensor, other: torch.Tensor) -> bool:
    within = 1e-6 if one.dtype == torch.float64 else 1e-3 if one.dtype == torch.float32 else 0.5
    return one.shape == other.shape and torch.allclose(
        one, other, rtol=within, atol=within, equal_nan=True
    )


def _is_its_own_checkpoint(engine: Engine, ablation: Ablation, said: torch.Tensor) -> bool:
    """Whether a model made of the cut configuration, given the cut weights, says the same."""
    model = engine.without(ablation).loaded.model
    if sum(p.numel() for p in model.parameters()) > LARGEST:
        return False
    try:
        again = type(model)(model.config).to(engine.loaded.device, model.dtype).eval()
        again.load_state_dict(model.state_dict())
    except Exception:  # noqa: BLE001 - a class that cannot be made of this configuration
        return False
    # What the first call changes is known of the whole model's layers, not of these.
    fresh = replace(engine, loaded=replace(engine.loaded, model=again), habits=NO_HABITS)
    found, _ = _text_under(fresh, INTACT)
    return found is not None and _alike(found, said)
