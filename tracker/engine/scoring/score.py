"""Score one row with the model's own forward pass and head: lm-eval's log-likelihoods.

The common beginning of many documents (few-shot examples) is read once by every stream. Its keys
and values are kept, layer by layer, for just the streams that pass the layer's attention; each row
then attends to them. Experts that get no token of a row do not affect it, so ablations of them are
not computed for it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer

from tracker.core.changes import INTACT, Ablation, Change
from tracker.core.grouping import grouped
from tracker.core.proxies import OBSERVED, observed
from tracker.engine.forward.layer import ForwardPass
from tracker.engine.forward.streams import StreamPlan
from tracker.engine.refusal import RefusalError
from tracker.engine.scoring.head import first_states
from tracker.engine.scoring.masks import ARGUMENT, Masks
from tracker.engine.scoring.model import EngineModel
from tracker.engine.scoring.rows import Lengths, Row, alike, reading_row
from tracker.models.devices import fetch, split, take
from tracker.models.hooks import state_of
from tracker.models.parts.experts import Experts, routed

SHORTEST = 48
"""Tokens from which a common beginning is read separately; repeating a shorter one is cheap."""
MARGIN = 64
"""Number of spare tokens in a new buffer."""
REUSED_SHARE = 0.9
"""Share of a new beginning from which a beginning that was already read serves it."""


class GrowingLayer(DynamicLayer):  # type: ignore[misc]
    """Keys and values [streams, heads, tokens, size] in a buffer with room to grow.

    A buffer that is too short is replaced by one with `MARGIN` spare tokens. So a token that is
    appended while a text is generated is written in place and nothing else is copied. `update`
    returns the front of the buffer, `[:, :, :tokens]`, a view.

    With `kept`, the beginning stays and the tokens of a row are overwritten by the next row. A
    row's `update` writes its keys [streams, heads, row, size] behind the beginning's and returns
    both. No row sees another one, because the returned view ends with the row's own last token.
    No row copies the beginning, unless it needs a longer buffer.
    """

    kept = False

    def __init__(self) -> None:
        super().__init__()
        self.tokens = 0

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append keys and values, and return all."""
        if not self.tokens:
            self.keys, self.values = key_states, value_states
            self.is_initialized = True
        stop = self.tokens + key_states.shape[-2]
        if self.keys.shape[-2] < stop:
            self.keys, self.values = (self._wider(x, stop) for x in (self.keys, self.values))
        if self.tokens:
            self.keys[:, :, self.tokens : stop] = key_states
            self.values[:, :, self.tokens : stop] = value_states
        if not self.kept:
            self.tokens = stop
        return self.keys[:, :, :stop], self.values[:, :, :stop]

    def get_seq_length(self) -> int:
        """Return the number of tokens in the buffer."""
        return self.tokens

    def _wider(self, held: Tensor, tokens: int) -> Tensor:
        wide = held.new_empty(*held.shape[:2], tokens + MARGIN, held.shape[-1])
        wide[:, :, : self.tokens] = held[:, :, : self.tokens]
        return wide


@dataclass
class Prefix:
    """A common beginning that was read.

    Attributes:
        plan: The plan of the streams that read it.
        tokens: Its token ids: all that were read, or the first of them.
        cache: Its keys and values, as the model's base takes them. A layer holds [computed
            attentions, heads, tokens, size]: only streams that pass its attention, in the plan's
            order, so that a row under the same plan finds its own.
        proxies: Observed figures of each of its tokens [`OBSERVED`, tokens, layers].
    """

    plan: StreamPlan
    tokens: tuple[int, ...]
    cache: Cache
    proxies: Tensor

    def __post_init__(self) -> None:
        self._read = len(self.tokens)
        self._keep(self._read)

    def cut_to(self, beginning: tuple[int, ...], lengths: Lengths) -> bool:
        """Shorten the prefix to what it shares with another beginning; return whether it serves it.

        It does if nearly all of the other beginning is shared; otherwise nothing is changed. Keys
        and values of the remaining tokens do not depend on those cut off, since the model is
        causal. They depend on the number of tokens only where `lengths` says so.
        """
        shared = alike(self.tokens, beginning)
        if shared < max(SHORTEST, REUSED_SHARE * len(beginning)):
            return False
        if lengths.side(shared) != lengths.side(self._read):
            return False
        self._keep(shared)
        return True

    def begins(self, prompt: Sequence[int]) -> bool:
        """Check whether a prompt begins with the prefix and is longer."""
        length = len(self.tokens)
        return length < len(prompt) and tuple(prompt[:length]) == self.tokens

    def _keep(self, tokens: int) -> None:
        self.tokens = self.tokens[:tokens]
        self.proxies = self.proxies[:, :tokens]
        for layer in self.cache.layers:
            layer.kept, layer.tokens = True, tokens


def new_cache() -> Cache:
    """Create an empty cache that holds whole texts, also for layers with a sliding window.

    The masks limit how far a layer sees. A cache that drops tokens before the window of the last
    token would drop tokens that nodes on other branches of the tree still see.
    """
    return Cache(layer_class_to_replicate=GrowingLayer)


def cache_argument(base: PreTrainedModel) -> str | None:
    """Return the name of the argument of a model's base for keys and values; None without one."""
    names = inspect.signature(base.forward).parameters
    return next((name for name in ("cache", "past_key_values") if name in names), None)


OBSERVED_SIZE = 2**22
"""Size of the states of layers that are observed together on an accelerator: several layers take
as many launches as one."""


@dataclass(frozen=True)
class RowScores:
    """The scores of one row.

    Attributes:
        loglikelihoods: Summed log-probability of each continuation in nats [answers, requests].
            There is one answer for each stream, or for each head that it passes
            (`StreamPlan.passing`).
        hits: Number of its tokens that are the most likely ones [answers, requests].
        proxies: Observed figures of the layers, summed over the measured tokens of each of the
            row's gold paths [gold paths, `OBSERVED`, layers].
    """

    loglikelihoods: Tensor
    hits: Tensor
    proxies: Tensor


@torch.inference_mode()
def launch_row(
    model: EngineModel, plan: StreamPlan, row: Row, prefix: Prefix | None = None
) -> Callable[[], RowScores]:
    """Launch the scoring of a row for every stream; return a function that waits for the scores.

    On an accelerator the next row may be launched before the call. Scores come to the CPU in one
    copy.

    The base returns [streams × rows, tokens, hidden]. Rows and tokens become one axis, [streams, N,
    hidden], of which only the `kept` positions predict something and pass the heads. The
    log-probabilities of the predicted tokens, [streams, predicted], are summed by request,
    [streams, requests]. In a tree one position may predict for many requests, and is computed once.

    `prefix` is the beginning that the row continues, read for the same streams.
    """
    host = row.padded(model.row_size_multiple)
    row, before = host.on(model.loaded.device), prefix.proxies.sum(1) if prefix else 0
    output, seen = run_base(model, plan, row, prefix and prefix.cache)
    none = seen.new_zeros(plan.answers, 0)
    predictions = _predictions(model, plan, row, output) if row.requests else (none, none)
    dtype = predictions[0].dtype
    figures = [figure.to(seen.device) for figure in (*predictions, seen)]
    fetched = fetch(torch.cat([figure.flatten() for figure in figures]))
    shapes = [figure.shape for figure in figures]

    def read() -> RowScores:
        logprobs, greedy, seen = split(fetched(), shapes)
        none, owner = torch.zeros(plan.answers, len(row.requests)), host.owner[: logprobs.shape[1]]
        # Summed in float32 and rounded once, like the sum of a half-precision tensor in lm-eval;
        # on the host, since the order of summation on an accelerator varies.
        totals = none.index_add(1, owner, logprobs.float()).to(dtype)
        hits = none.index_add(1, owner, greedy.float())
        sums = [seen[:, path].double().sum(1) + before for _, path in row.gold]
        proxies = (
            torch.stack(sums) if sums else torch.zeros(0, len(OBSERVED), len(model.loaded.layers))
        )
        return RowScores(totals.float(), hits.int(), proxies)

    return read


def _predictions(
    model: EngineModel, plan: StreamPlan, row: Row, output: Any
) -> tuple[Tensor, Tensor]:
    """Compute log-probability and greedy flag of each predicted token [answers, predicted]."""
    states = output.last_hidden_state
    kept, predictor, predicted = (
        index.to(states.device) for index in (row.keep, row.predictor, row.predicted)
    )
    hidden = states.unflatten(0, (plan.streams, -1)).flatten(1, 2)[:, kept]
    found = []
    for form, streams in plan.passing.items():
        mine = hidden if len(streams) == len(hidden) else take(hidden, streams)
        with model.having_head(form):
            found.append(model.head.predictions(output, mine, predictor, predicted))
    logprobs, greedy = (torch.cat(each) for each in zip(*found, strict=True))
    return logprobs, greedy


@torch.inference_mode()
def read_prefix(model: EngineModel, plan: StreamPlan, tokens: tuple[int, ...]) -> Prefix:
    """Read the common beginning of some documents once for every stream; rows continue it."""
    cache = new_cache()
    _, seen = run_base(model, plan, reading_row(tokens), cache)
    return Prefix(plan, tokens, cache, seen.cpu().double())


def run_base(model: EngineModel, plan: StreamPlan, row: Row, cache: Any) -> tuple[Any, Tensor]:
    """Run a model's base over a row for every stream.

    Args:
        model: The model.
        plan: The plan of the streams.
        row: The row to read.
        cache: Keys and values that the row continues and is added to; None for no cache.

    Returns:
        The output of the base, with the states of all streams [streams × rows, tokens, hidden], and
        the observed figures of each of the N tokens [`OBSERVED`, N, layers]; both on the device.
    """
    layers, device, base = model.loaded.layers, model.loaded.device, model.head.base
    row, anatomy = row.on(device), model.anatomy_for(plan)
    figures: list[Tensor] = []
    waiting: list[tuple[Tensor, Tensor]] = []

    def observe(layer: int, before: Tensor, after: Tensor) -> None:
        if before.shape[:2] != row.input_ids.shape:
            raise RefusalError(
                f"its layers pass on {tuple(before.shape)}, and not [texts, tokens, width]"
            )
        # Some models have several parallel residual streams: together they are the state.
        before, after = (state.flatten(0, 1).flatten(1) for state in (before, after))
        if waiting and waiting[0][0].device != before.device:
            compute()
        is_last = device.type == "cpu" or (len(waiting) + 2) * before.numel() > OBSERVED_SIZE
        # Views would keep the states of all streams in memory.
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

    name = None if cache is None else cache_argument(base)
    cached = {} if name is None else {name: cache}
    masks = None
    if row.spans is not None:
        taken = inspect.signature(base.forward).parameters
        if "position_ids" not in taken:
            raise RefusalError("it takes no positions")
        cached["position_ids"] = row.positions
        masks = Masks(row, model.windows(row.length), model.loaded.model.dtype, device)
        if cache is None and ARGUMENT in taken:
            # Without it, transformers looks for texts in the positions, and waits for the device.
            cached[ARGUMENT] = masks.of_layer[0]
    inputs = {"input_ids": row.input_ids, "use_cache": name is not None, **cached}
    others = [form for form in plan.starts if form is not None]
    embedded = first_states(base, layers[0], model.ends, others, inputs) if others else []
    at_once = None
    if cache is None and (most := model.tokens_at_once) is not None:
        at_once = max(1, most // row.input_ids.numel())
    with ForwardPass(
        layers, plan, anatomy, observe, masks, model.placed_replacements, embedded, at_once
    ).installed():
        output = base(**inputs)
    compute()
    if len(figures) != len(layers):
        raise RefusalError(f"its {len(layers)} layers run {len(figures)} times in a pass")
    return output, torch.stack([figure.to(figures[0].device) for figure in figures], dim=-1)


@torch.inference_mode()
def kept_bytes(model: EngineModel) -> int:
    """Return the bytes of the keys and values of one token in one attention, on average."""
    facts = model.facts
    if facts.kept_bytes is None:
        cache = new_cache()
        model.put_back()
        run_base(model, model.plan([INTACT]), reading_row((0, 0)), cache)
        layers = [layer for layer in cache.layers if layer.is_initialized]
        size = sum(t.numel() * t.itemsize for layer in layers for t in (layer.keys, layer.values))
        facts.kept_bytes = max(1, int(size) // (2 * max(1, len(layers))))
    return facts.kept_bytes


MIN_EXPERT_ABLATIONS = 8
"""Number of ablations of experts from which one more pass is worthwhile."""
_Gone = tuple[Change, ...]


def of_experts(ablations: Sequence[Ablation]) -> list[Ablation]:
    """List the ablations that remove experts and nothing else."""
    return [
        ablation
        for ablation in ablations
        if {change.component for change in ablation.changes} == {"expert"}
    ]


@torch.inference_mode()
def idle(model: EngineModel, row: Row, ablations: Sequence[Ablation]) -> set[Ablation]:
    """Find the ablations that do not change the result of a row.

    Args:
        model: The model.
        row: The row, which continues no beginning.
        ablations: Ablations of experts alone.

    Returns:
        The ablations under which the row is read as by the intact model, up to rounding of weights.
    """
    gone_of = {
        ablation: [at.experts for at in ablation.by_layer.values()] for ablation in ablations
    }
    every = {gone for removals in gone_of.values() for gone in removals}
    by_layer = grouped(every, lambda gone: gone[0].layer)
    anatomy, unread = model.anatomy, dict[_Gone, bool]()

    def look(those: Experts, gone: Collection[_Gone], router: nn.Module, *call: Any) -> None:
        args, kwargs, whole = call
        chosen = torch.zeros(those.count, dtype=torch.bool, device=whole[0].device)
        for table in whole:
            if not table.is_floating_point():
                chosen[table.flatten()] = True
        # Converted once: each conversion waits for the accelerator.
        numbers = {number for number, is_chosen in enumerate(chosen.tolist()) if is_chosen}
        for removed in gone:
            remaining = those.without(removed, anatomy.name(removed[0].layer))
            # The search for attention windows also calls routers, in the middle of the pass.
            unread[removed] = (
                unread.get(removed, True)
                and numbers.isdisjoint(part.number for part in removed)
                and _same(router, those, remaining, whole, (args, kwargs))
            )

    with ExitStack() as stack:
        for layer, gone in by_layer.items():
            those = anatomy.at(Experts, layer)
            router = anatomy.layers[layer].get_submodule(those.router)
            hook = partial(look, those, gone)
            stack.enter_context(router.register_forward_hook(hook, with_kwargs=True))
        run_base(model, model.plan([INTACT]), row, None)
    return {
        ablation
        for ablation, removals in gone_of.items()
        if all(unread.get(gone, False) for gone in removals)
    }


def _same(
    router: nn.Module, experts: Experts, remaining: Sequence[int], whole: Sequence[Any], given: Any
) -> bool:
    """Check whether a router's choices and weights stay the same with fewer experts."""
    fewer = routed(router, experts, remaining, whole, state_of(*given), given)
    return all(map(partial(_alike, experts.count), whole, fewer))


def _alike(count: int, values: Tensor, other: Tensor) -> bool:
    """Check whether choices are equal, and weights up to rounding; ignore full score tables."""
    if not values.is_floating_point():
        return torch.equal(values, other)
    few = 4 * torch.finfo(values.dtype).eps
    return values.shape[-1] == count or torch.allclose(values, other, rtol=few, atol=few)
