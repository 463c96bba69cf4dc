"""What an embedding and a head give, with their own weights and with those of a format."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor, nn

from tracker.core.changes import Change
from tracker.engine.scoring.head import LOGITS_BYTES
from tracker.engine.scoring.sweep import Engine


def at_ends(
    engine: Engine, tokens: Sequence[int], measured: int, maps: Sequence[Change]
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Let the intact model read, and its embedding and head map what they are given again.

    Args:
        engine: The engine, whose model reads.
        tokens: What it reads.
        measured: From which token on it counts.
        maps: What has formats; only what is the embedding or the head is looked at.

    Yields:
        The place of a map among `maps`, and of some tokens [tokens, …] what the module gives, and
        what it gives in the format: of an embedding the rows that are looked up, of a head its
        logits, before anything else is done with them.
    """
    asked = [place for place, each in enumerate(maps) if each.is_end]
    if not asked:
        return
    ends = engine.ends
    seen: list[tuple[Any, Tensor]] = []

    def look(module: nn.Module, args: Any, output: Any) -> None:
        seen.append((args[0], output))

    def compared(which: str) -> Iterator[tuple[int, Tensor, Tensor]]:
        given, before = seen.pop()
        for place in asked:
            if maps[place].path == which:
                with ends.having(which, maps[place].intervention):
                    after = ends.matrices[which].module.forward(given)
                yield place, before.flatten(0, -2), after.flatten(0, -2)

    with ends.matrices.embedding.module.register_forward_hook(look):
        output = engine.run(tokens)
    for place, *both in compared("embedding"):
        before, after = (each[measured:] for each in both)
        yield place, before, after
    if all(maps[place].path != "lm_head" for place in asked):
        return
    size = max(1, LOGITS_BYTES // (8 * len(ends.matrices.lm_head.weight)))
    for states in output.last_hidden_state[:, measured:].split(size, dim=1):
        with ends.matrices.lm_head.module.register_forward_hook(look):
            engine.head.logits(output, states)
        yield from compared("lm_head")
