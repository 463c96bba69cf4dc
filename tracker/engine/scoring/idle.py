"""Experts to which no token of a row goes: without them the row is what it was.

Which those are one pass of the intact model says. The router is asked again without them, since
some weigh the chosen experts by the scores of all: there a token changes that never went to one.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tracker.core.changes import INTACT, Ablation, Change
from tracker.core.grouping import grouped
from tracker.engine.forward.streams import plan_streams
from tracker.engine.scoring.rows import Row
from tracker.engine.scoring.score import Parts, run_base
from tracker.models.hooks import state_of
from tracker.models.parts.experts import Experts, routed

WORTH = 8
"""Ablations of experts from which one more pass is worth it."""
_Gone = tuple[Change, ...]


def of_experts(ablations: Sequence[Ablation]) -> list[Ablation]:
    """List the ablations that take out experts and nothing else."""
    return [
        ablation
        for ablation in ablations
        if {change.component for change in ablation.changes} == {"expert"}
    ]


@torch.inference_mode()
def idle(parts: Parts, row: Row, ablations: Sequence[Ablation]) -> set[Ablation]:
    """Find out which ablations leave a row as the intact model reads it.

    Args:
        parts: The model, with its experts.
        row: The row, which continues nothing.
        ablations: Ablations of experts alone.

    Returns:
        Those of them that do, but for the rounding of weights.
    """
    gone_of = {
        ablation: [at.experts for at in ablation.by_layer.values()] for ablation in ablations
    }
    every = {gone for some in gone_of.values() for gone in some}
    asked = grouped(every, lambda gone: gone[0].layer)
    unread: dict[_Gone, bool] = {}

    def look(those: Experts, gone: Collection[_Gone], router: nn.Module, *call: Any) -> None:
        args, kwargs, whole = call
        chosen = torch.zeros(those.count, dtype=torch.bool, device=whole[0].device)
        for table in whole:
            if not table.is_floating_point():
                chosen[table.flatten()] = True
        # Read once for all: each time it is read an accelerator is waited for.
        numbers = {number for number, is_chosen in enumerate(chosen.tolist()) if is_chosen}
        for each in gone:
            kept = those.without(each, parts.anatomy.name(each[0].layer))
            # What finds out how far layers see calls them too, in the middle of the pass.
            unread[each] = (
                unread.get(each, True)
                and numbers.isdisjoint(part.number for part in each)
                and _same(router, those, kept, whole, (args, kwargs))
            )

    with ExitStack() as stack:
        for layer, each in asked.items():
            module = parts.layers[layer]
            those = parts.anatomy.at(Experts, layer)
            router = module.get_submodule(those.router)
            hook = partial(look, those, each)
            stack.enter_context(router.register_forward_hook(hook, with_kwargs=True))
        run_base(parts, plan_streams([INTACT], len(parts.layers)), row, None)
    return {each for each, some in gone_of.items() if all(unread.get(gone, False) for gone in some)}


def _same(
    router: nn.Module, experts: Experts, kept: Sequence[int], whole: Sequence[Any], given: Any
) -> bool:
    """Check whether a router sends all tokens where it sent them, with the same weights."""
    fewer = routed(router, experts, kept, whole, state_of(*given), given)
    return all(map(partial(_alike, experts.count), whole, fewer))


def _alike(count: int, one: Tensor, other: Tensor) -> bool:
    """Whether choices are equal, and weights but for rounding; scores of all experts are none."""
    if not one.is_floating_point():
        return torch.equal(one, other)
    few = 4 * torch.finfo(one.dtype).eps
    return one.shape[-1] == count or torch.allclose(one, other, rtol=few, atol=few)
