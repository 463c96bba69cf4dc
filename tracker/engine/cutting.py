"""What a model without a layer is, and whether it can be cut to be that."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from tracker.ablations import INTACT, Ablation
from tracker.engine.refusal import refused
from tracker.engine.sharing import NO_HABITS, PLAIN
from tracker.engine.sweep import Engine
from tracker.engine.truth import Truth
from tracker.engine.verdict import Verdict
from tracker.errors import CellError
from tracker.models.sublayers import returning

TEXT = tuple(5 * place % 29 + 2 for place in range(12))
"""What is read to see what a model is."""
LARGEST = 10**8
"""Parameters up to which a second model of the same class is made, to see what it says."""


def as_cut(truth: Truth, ablations: Sequence[Ablation], verdict: Verdict, name: str) -> Verdict:
    """Find out what the model without a layer is; raises CellError where it does not run.

    It is what a checkpoint without the layer would be. Nearly always that is the model whose layer
    hands on its input, and streams that skip the layer compute it. Where it is another model (what
    layers do depends on their places), nothing is shared over depth; it must then be what its own
    configuration and weights make of it. Where no checkpoint can be cut, the layer stays in its
    place and hands on its input.
    """
    engine = truth.engine
    still = engine.without(INTACT)
    wrong: list[tuple[Ablation, str]] = []
    by_nature = False
    for ablation in dict.fromkeys(Ablation(a.layers) for a in ablations if a.layers):
        one, why = _text_of(partial(truth.without, ablation))
        with _handing_on(still, ablation):
            other, _ = _text_of(lambda: still)
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


def _text_of(make: Callable[[], Engine]) -> tuple[Tensor | None, str | None]:
    """What a changed model says of a text [tokens, vocabulary], or why it says nothing."""
    try:
        return make().read(TEXT), None
    except Exception as error:
        why = refused(error)
        if why is None:
            raise
        return None, why


@contextmanager
def _handing_on(engine: Engine, ablation: Ablation) -> Iterator[None]:
    """Let the layers of an ablation stay in their places and hand on their input."""
    with ExitStack() as stack:
        for layer in ablation.layers:
            for handle in returning(engine.loaded.layers[layer], lambda state: state):
                stack.enter_context(handle)
        yield


def _alike(one: Tensor, other: Tensor) -> bool:
    within = 1e-6 if one.dtype == torch.float64 else 1e-3 if one.dtype == torch.float32 else 0.5
    return one.shape == other.shape and torch.allclose(
        one, other, rtol=within, atol=within, equal_nan=True
    )


def _is_its_own_checkpoint(engine: Engine, ablation: Ablation, said: Tensor) -> bool:
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
    found, _ = _text_of(lambda: fresh)
    return found is not None and _alike(found, said)
