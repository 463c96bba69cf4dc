"""Scoring one row: the model's own forward pass, its own head, lm-eval's log-likelihoods."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tracker.core.changes import INTACT
from tracker.core.proxies import OBSERVED, observed
from tracker.engine.forward.forking import forking
from tracker.engine.forward.replacements import Replacement
from tracker.engine.forward.streams import StreamPlan, plan_streams
from tracker.engine.refusal import RefusalError
from tracker.engine.scoring.head import Head
from tracker.engine.scoring.masks import ARGUMENT, AttentionWindows, Masks
from tracker.engine.scoring.prefix import Prefix, cache_argument, new_cache
from tracker.engine.scoring.rounded_embeddings import RoundedEmbeddings, first_states
from tracker.engine.scoring.rows import Row, reading_row
from tracker.models.devices import fetch
from tracker.models.parts.anatomy import LayerAnatomy
from tracker.models.slices import split, take

OBSERVED_SIZE = 2**22
"""Numbers in the states of layers that are observed together on an accelerator: it takes as many
launches for several layers as for one."""


@dataclass(frozen=True)
class RowScores:
    """What one row says.

    Attributes:
        loglikelihoods: Summed log-probability of each continuation [answers, requests], nats: of
            each stream, or of each head that it passes (`StreamPlan.passing`).
        hits: How many of its tokens are the most likely ones [answers, requests].
        proxies: What is observed of the layers, summed over the measured tokens of each of the
            row's gold paths [gold paths, `OBSERVED`, layers].
    """

    loglikelihoods: Tensor
    hits: Tensor
    proxies: Tensor


@dataclass(frozen=True)
class Parts:
    """A model, taken apart.

    Attributes:
        model: A causal language model of transformers, in evaluation mode.
        layers: The decoder layers that are there.
        anatomy: Their parts; those that a plan needs are found.
        head: What is behind its base.
        device: Where its inputs go.
        windows: Returns the attention windows for texts of some length.
        replacements: Replacements of layers, where that is asked for.
        ends: Its embedding and head, where a plan has them in formats.
        at_once: How many tokens pass a layer at once, all streams together; None for all.
        row_multiple: A multiple of so many nodes is scored; see `Row.padded`.
    """

    model: Any
    layers: nn.ModuleList
    anatomy: LayerAnatomy
    head: Head
    device: torch.device
    windows: Callable[[int], AttentionWindows]
    replacements: Mapping[int, Replacement] | None = None
    ends: RoundedEmbeddings | None = None
    at_once: int | None = None
    row_multiple: int = 1

    @property
    def base(self) -> Any:
        """The submodule that returns `last_hidden_state`."""
        return self.head.base

    def having_head(self, form: str | None) -> AbstractContextManager[None]:
        """Let the head have weights in a format until exit; None for its own."""
        return self.ends.having("lm_head", form) if self.ends else nullcontext()


@torch.inference_mode()
def launch_row(
    parts: Parts, plan: StreamPlan, row: Row, prefix: Prefix | None = None
) -> Callable[[], RowScores]:
    """Begin to score a row for every stream of a plan; return what waits for the scores.

    On an accelerator the next row may be launched before that. Scores come to the CPU in one copy.

    The base leaves [streams × rows, tokens, hidden]. Rows and tokens become one axis, [streams, N,
    hidden], of which only the `kept` places predict something and pass the heads. Of each place the
    log-probability of each token that is predicted there is taken, [streams, predicted], and added
    up by the request that it belongs to, [streams, requests]: in a tree one place may predict for
    many requests, and is computed once.

    `prefix` is the beginning that the row continues, read for the same streams.
    """
    host = row.padded(parts.row_multiple)
    row, before = host.on(parts.device), prefix.proxies.sum(1) if prefix else 0
    output, seen = run_base(parts, plan, row, prefix and prefix.cache)
    none = seen.new_zeros(plan.answers, 0)
    predictions = _predictions(parts, plan, row, output) if row.requests else (none, none)
    dtype = predictions[0].dtype
    figures = [figure.to(seen.device) for figure in (*predictions, seen)]
    fetched = fetch(torch.cat([figure.flatten() for figure in figures]))
    shapes = [figure.shape for figure in figures]

    def read() -> RowScores:
        logprobs, greedy, seen = split(fetched(), shapes)
        none, owner = torch.zeros(plan.answers, len(row.requests)), host.owner[: logprobs.shape[1]]
        # Summed in float32 and rounded once, as the sum of a half-precision tensor is in lm-eval;
        # on the host, since an accelerator adds in any order.
        totals = none.index_add(1, owner, logprobs.float()).to(dtype)
        hits = none.index_add(1, owner, greedy.float())
        sums = [seen[:, path].double().sum(1) + before for _, path in row.gold]
        proxies = torch.stack(sums) if sums else torch.zeros(0, len(OBSERVED), len(parts.layers))
        return RowScores(totals.float(), hits.int(), proxies)

    return read


def _predictions(parts: Parts, plan: StreamPlan, row: Row, output: Any) -> tuple[Tensor, Tensor]:
    """Compute log-probability and greedy flag of each predicted token [answers, predicted]."""
    states = output.last_hidden_state
    kept, predictor, predicted = (
        index.to(states.device) for index in (row.keep, row.predictor, row.predicted)
    )
    hidden = states.unflatten(0, (plan.streams, -1)).flatten(1, 2)[:, kept]
    found = []
    for form, streams in plan.passing.items():
        mine = hidden if len(streams) == len(hidden) else take(hidden, streams)
        with parts.having_head(form):
            found.append(parts.head.predictions(output, mine, predictor, predicted))
    logprobs, greedy = (torch.cat(each) for each in zip(*found, strict=True))
    return logprobs, greedy


@torch.inference_mode()
def read_prefix(parts: Parts, plan: StreamPlan, tokens: tuple[int, ...]) -> Prefix:
    """Read the common beginning of some documents once for every stream; rows continue it."""
    cache = new_cache()
    _, seen = run_base(parts, plan, reading_row(tokens), cache)
    return Prefix(plan, tokens, cache, seen.cpu().double())


def run_base(parts: Parts, plan: StreamPlan, row: Row, cache: Any) -> tuple[Any, Tensor]:
    """Run a model's base over a row for every stream.

    Args:
        parts: The model.
        plan: Which streams there are.
        row: What to read.
        cache: Keys and values that the row continues and is added to; None for none.

    Returns:
        What the base returned, with the states of all streams [streams × rows, tokens, hidden],
        and what is observed of each of the N tokens [`OBSERVED`, N, layers]; both on the device.
    """
    row = row.on(parts.device)
    figures: list[Tensor] = []
    waiting: list[tuple[Tensor, Tensor]] = []

    def observe(layer: int, before: Tensor, after: Tensor) -> None:
        if before.shape[:2] != row.input_ids.shape:
            raise RefusalError(
                f"its layers pass on {tuple(before.shape)}, and not [texts, tokens, width]"
            )
        # Some models carry several residual streams side by side: together they are the state.
        before, after = (state.flatten(0, 1).flatten(1) for state in (before, after))
        if waiting and waiting[0][0].device != before.device:
            compute()
        is_last = parts.device.type == "cpu" or (len(waiting) + 2) * before.numel() > OBSERVED_SIZE
        # Views would keep the states of all streams.
        waiting.append((before, after) if is_last else (before.clone(), after.clone()))
        if is_last:
            compute()

    def compute() -> None:
        if len(waiting) == 1:
            figures.append(torch.stack(observed(*waiting[0])))
        elif waiting:
            befores, afters = map(torch.stack, zip(*waiting, strict=True))
            figures.extend(torch.stack(observed(befores, afters)).unbind(1))
        waiting.clear()

    name = None if cache is None else cache_argument(parts.base)
    cached = {} if name is None else {name: cache}
    masks = None
    if row.spans is not None:
        taken = inspect.signature(parts.base.forward).parameters
        if "position_ids" not in taken:
            raise RefusalError("it takes no positions")
        cached["position_ids"] = row.positions
        masks = Masks(row, parts.windows(row.length), parts.model.dtype, parts.device)
        if cache is None and ARGUMENT in taken:
            # Without one transformers looks for texts in the positions, and waits for the device.
            cached[ARGUMENT] = masks.of_layer[0]
    inputs = {"input_ids": row.input_ids, "use_cache": name is not None, **cached}
    begun: list[Tensor] = []
    if parts.ends is not None:
        others = [form for form in plan.starts if form is not None]
        begun = first_states(parts.base, parts.layers[0], parts.ends, others, inputs)
    at_once = None
    if parts.at_once is not None and cache is None:
        at_once = max(1, parts.at_once // row.input_ids.numel())
    with forking(
        parts.layers, plan, parts.anatomy, observe, masks, parts.replacements, begun, at_once
    ):
        output = parts.base(**inputs)
    compute()
    if len(figures) != len(parts.layers):
        raise RefusalError(f"its {len(parts.layers)} layers run {len(figures)} times in a pass")
    return output, torch.stack([figure.to(figures[0].device) for figure in figures], dim=-1)


@torch.inference_mode()
def kept_bytes(parts: Parts) -> int:
    """Measure what the keys and values of one token take in one attention, on average, in bytes."""
    cache = new_cache()
    run_base(parts, plan_streams([INTACT], len(parts.layers)), reading_row((0, 0)), cache)
    kept = [layer for layer in cache.layers if layer.is_initialized]
    size = sum(t.numel() * t.itemsize for layer in kept for t in (layer.keys, layer.values))
    return max(1, int(size) // (2 * max(1, len(kept))))
