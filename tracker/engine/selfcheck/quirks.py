"""What a model does with lengths and calls, found out on its miniature by changing one thing.

A number of the configuration is made small, and what moves tells what it is: nothing (it does not
matter here), later tokens (a window, a chunk, a floor), or earlier ones when the text goes on
(something is chosen by the length of the whole call).
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from tracker.engine.refusal import tried
from tracker.engine.scoring.plain_call import logits_of
from tracker.engine.scoring.rows import Lengths
from tracker.models.miniature import build, numbers, with_numbers
from tracker.models.pruned import changed, remember
from tracker.models.reloaded import shapes

Path = tuple[str, ...]
"""Where a number stands in a text model's configuration."""
SHORT, LONG, OTHER = 5, 24, 20
"""Lengths of text on both sides of a number that was made small."""
SMALL = 6
STEPS = (6, 9, 12, 16, 20, 24, 28, 32)
"""What several numbers become, so that they stay apart and in order."""
SAME = {torch.float64: 1e-6, torch.float32: 1e-4}
"""Up to which logits are the same; some models compute parts of them in float32."""
MOVED = 1e-3
"""From which on logits of a long text are others: what rounding adds up to is far below."""
MANY = 4
"""So many lengths at which something changes are taken for a change at every length."""


@dataclass(frozen=True)
class Findings:
    """What the experiments say about an architecture.

    Attributes:
        matters: The numbers that change what is said of a text of `LONG` tokens.
        lengths: Those at which the answer depends on how long the whole call is; True where beyond
            it every length differs from every other. The empty path for a model whose answers do
            in any case.
        leftovers: Names of attributes that one call leaves changed for the next.
        first: What the first call changes for good; nothing where no weight is among it.
        causal: Whether what is said of a token is the same whatever comes after it.
    """

    matters: tuple[Path, ...] = ()
    lengths: tuple[tuple[Path, bool], ...] = ()
    leftovers: frozenset[str] = frozenset()
    first: frozenset[tuple[str, str]] = frozenset()
    causal: bool = True


def find_quirks(small: Any, paths: Collection[Path]) -> Findings:
    """Experiment with a miniature that no call has changed yet, on numbers of its configuration."""
    kind, config = type(small), small.config
    usual = _said(small, LONG)
    leftovers, first = _changed_by_calls(small)
    every_call = not _same(usual[:SHORT], _said(small, SHORT))
    causal = _same(usual[:-1], _said(small, LONG, last=1)[:-1])
    matters: list[Path] = []
    lengths: list[tuple[Path, bool]] = [((), True)] if every_call else []
    own = shapes(small)
    for path, value in numbers(config.get_text_config()):
        if path not in paths:
            continue
        little = SMALL if value != SMALL else SMALL + 2
        other = build(kind, with_numbers(config, {path: type(value)(little)}), own)
        if other is None:
            continue
        try:
            long = _said(other, LONG)
            if _same(long, usual):
                continue
            if not every_call and not _same(long[:SHORT], _said(other, SHORT)):
                lengths.append((path, not _same(long[:OTHER], _said(other, OTHER))))
            left, too = _changed_by_calls(other)
        except Exception:  # noqa: BLE001 - the model does not take this number
            continue
        matters.append(path)
        leftovers |= left
        first |= too
    return Findings(tuple(matters), tuple(lengths), frozenset(leftovers), frozenset(first), causal)


def find_switches(small: Any, known: Lengths, lengths: Iterable[int]) -> Lengths:
    """Find where between some lengths of a call a model begins to compute otherwise.

    Of its first tokens a text says the same in a call of any length; where it does not, there is a
    threshold between, wherever it comes from (a product of numbers, a list, code), and halving the
    distance finds its place. Beyond a length that the model refuses is nothing to find.

    Args:
        small: A miniature that no call has changed yet.
        known: The lengths at which something changes, as far as they are known.
        lengths: Between which ones to look; the model runs at the first.

    Returns:
        What is known then.
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


def shortened(small: Any, paths: Collection[Path]) -> list[Any]:
    """Make miniatures whose windows, chunks and thresholds are crossed by short texts.

    One with all of the numbers made small where that can be built, else one for each.
    """
    config = small.config
    values: Mapping[Path, float] = dict(numbers(config.get_text_config()))
    order = sorted((path for path in paths if path in values), key=lambda path: values[path])
    if not order:
        return []
    steps = {p: type(values[p])(STEPS[min(i, len(STEPS) - 1)]) for i, p in enumerate(order)}
    together = _running(type(small), with_numbers(config, steps))
    if together is not None:
        return [together]
    alone = [_running(type(small), with_numbers(config, {p: steps[p]})) for p in order]
    return [each for each in alone if each is not None]


def _running(kind: type, config: Any) -> Any | None:
    model = build(kind, config)
    try:
        if model is not None:
            _said(model, LONG)
    except Exception:  # noqa: BLE001 - numbers that contradict each other
        return None
    return model


@torch.inference_mode()
def _said(model: Any, tokens: int, last: int | None = None) -> Tensor:
    """Logits of a text on a fresh copy of a model [tokens, vocabulary]."""
    ids = torch.arange(tokens)[None] * 7 % 31 + 3
    if last is not None:
        ids[0, -1] = last
    return logits_of(copy.deepcopy(model), ids)[0]


def _same(one: Tensor, other: Tensor) -> bool:
    # With another number a miniature may say something in float32 only.
    return _near(one, other, max(SAME[one.dtype], SAME[other.dtype]))


def _near(one: Tensor, other: Tensor, within: float) -> bool:
    return torch.allclose(one.double(), other.double(), rtol=within, atol=within, equal_nan=True)


@torch.inference_mode()
def _changed_by_calls(model: Any) -> tuple[set[str], set[tuple[str, str]]]:
    """Attributes that differ after another call, and what differs for good after the first."""
    model = copy.deepcopy(model)
    states = [remember(model)]
    for tokens in (SHORT, LONG):
        model(torch.arange(tokens)[None] % 31 + 3, use_cache=False)
        states.append(remember(model))
    first, later = (changed(before, after) for before, after in pairwise(states))
    parameters = {tuple(name.rpartition(".")[::2]) for name, _ in model.named_parameters()}
    return {name for _, name in later}, first if first & parameters else set()
