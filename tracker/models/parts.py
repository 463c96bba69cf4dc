"""Which layers of a model have heads or experts that a search may take out, and how many."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

from tracker.core.errors import ModelError
from tracker.core.kinds import KINDS, NUMBERED, Component
from tracker.core.model_parts import experts_of_a_token
from tracker.core.search_parts import SearchParts
from tracker.models import experts, heads
from tracker.models.layers import find_layers
from tracker.models.load import hollow
from tracker.models.miniature import miniature
from tracker.models.sources import ModelSource, count_parts, parts_of, read_config

_CPU = torch.device("cpu")


@cache
def find_parts(
    source: ModelSource, unit: Component, trust_remote_code: bool = False
) -> SearchParts:
    """Find the parts of a model that a search may remove; once in a process.

    How many there are is in the configuration. Which layers have them is seen in a miniature of the
    same class, whose layers hold the same modules: no weights are read.

    Args:
        source: The model.
        unit: What parts.
        trust_remote_code: Whether code from a download may run.

    Returns:
        The parts. One head of each layer stays, or as many experts as its router chooses.

    Raises:
        ModelError: It has no such parts, or does not say how many.
    """
    counts = count_parts(source, trust_remote_code)
    if unit not in NUMBERED:
        return SearchParts(unit, counts.layers)
    each, many = counts.numbered(unit), KINDS[unit].many
    if each is None:
        raise ModelError(
            f"{source.source} has no {many} that its configuration counts; take another 'unit'"
        )
    stay = 1
    if unit == "expert":
        stay = experts_of_a_token(read_config(source, trust_remote_code))
    small = miniature(hollow(source, "auto", trust_remote_code))
    # Without a miniature the engine finds out, before it measures.
    there = tuple(range(counts.layers)) if small is None else _there(small, unit)
    if not there or stay >= each:
        why = f": of {each} in a layer {stay} must stay"
        if not there:
            router = f"{experts.NEEDS}, in no groups and by no fixed table"
            why = f" (needed: {router if unit == 'expert' else heads.NEEDS})"
        raise ModelError(
            f"{source.source} has no {many} that could be taken out alone{why}; take another 'unit'"
        )
    return SearchParts(unit, counts.layers, each, there, stay)


def _there(small: Any, unit: Component) -> tuple[int, ...]:
    """The layers of a miniature that have parts, as many as its configuration says."""
    layers, config = find_layers(small), small.config.get_text_config()
    count = parts_of(config).numbered(unit)
    if unit == "expert":
        chosen = experts_of_a_token(config)
        own = experts.find_experts(small, layers, _CPU)
        fit = [
            e is not None and e.removable and (e.count, e.chosen) == (count, chosen) for e in own
        ]
    else:
        found = heads.find_heads(small, layers, _CPU)
        fit = [h is not None and (h.count if unit == "head" else h.groups) == count for h in found]
    return tuple(layer for layer, fits in enumerate(fit) if fits)
