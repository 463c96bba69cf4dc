"""Compute lm-eval's log-likelihoods of one row with the model's own forward pass and head.

If all documents begin with the same tokens (e.g. few-shot examples), this prefix is read once and
cached. An ablation that removes only unused experts gets the intact model's result.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer

from tracker.engine.forward.layer import ForwardPass
from tracker.engine.forward.streams import Ablations, StreamPlan
from tracker.engine.refusal import RefusalError
from tracker.engine.scoring.head import compute_first_states
from tracker.engine.scoring.masks import MASK_ARGUMENT, Masks
from tracker.engine.scoring.model import EngineModel
from tracker.engine.scoring.rows import Lengths, Row, count_common_tokens, reading_row
from tracker.models.devices import split_packed, start_host_copy, take_entries
from tracker.models.hooks import input_state
from tracker.models.parts.experts import Experts, call_reduced_router
from tracker.schema.changes import INTACT, Ablation, Change
from tracker.schema.grouping import group_by
from tracker.schema.proxies import observed

MIN_PREFIX = 48
"""Minimum number of tokens of a common beginning to be read separately; shorter ones are cheap."""
CACHE_MARGIN = 64
"""Number of spare tokens in a new buffer."""
MIN_REUSED_SHARE = 0.9
"""Minimum share of a new beginning that an earlier beginning must hold to be reused."""


class GrowingLayer(DynamicLayer):  # type: ignore[misc]
    """Key-value cache of one layer [streams, heads, tokens, size], with spare space for tokens.

    A buffer that is too short is replaced by a longer buffer with `CACHE_MARGIN` spare tokens.

    If `is_kept` is true, the buffer begins with the common prefix of all documents. Then `update`
    writes a row's keys and values after the prefix, over those of the previous row.
    """

    is_kept = False

    def __init__(self) -> None:
        super().__init__()
        self.tokens = 0

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append keys and values; return all cached keys and values, including the new ones."""
        if not self.tokens:
            self.keys, self.values = key_states, value_states
            self.is_initialized = True
        stop = self.tokens + key_states.shape[-2]
        if self.keys.shape[-2] < stop:
            buffers = self.keys, self.values
            self.keys, self.values = (self._extend_buffer(buffer, stop) for buffer in buffers)
        if self.tokens:
            self.keys[:, :, self.tokens : stop] = key_states
            self.values[:, :, self.tokens : stop] = value_states
        if not self.is_kept:
            self.tokens = stop
        return self.keys[:, :, :stop], self.values[:, :, :stop]

    def get_seq_length(self) -> int:
        """Return the number of cached tokens."""
        return self.tokens

    def _extend_buffer(self, buffer: Tensor, tokens: int) -> Tensor:
        new_buffer = buffer.new_empty(*buffer.shape[:2], tokens + CACHE_MARGIN, buffer.shape[-1])
        new_buffer[:, :, : self.tokens] = buffer[:, :, : self.tokens]
        return new_buffer


@dataclass
class Prefix:
    """Common beginning of documents, with its cached keys and values.

    Attributes:
        plan: The plan of the streams (ablations) for which the prefix is cached.
        tokens: Token ids of the prefix.
        cache: Keys and values of the prefix, in each layer [streams, heads, tokens, size]. Only
            streams whose attention is computed are included.
        proxies: Statistics of the intact model's layers for each token of the prefix [`OBSERVED`,
            tokens, layers].
    """

    plan: StreamPlan
    tokens: tuple[int, ...]
    cache: Cache
    proxies: Tensor

    def __post_init__(self) -> None:
        self._n_read = len(self.tokens)
        self._truncate(self._n_read)

    def shorten(self, beginning: tuple[int, ...], lengths: Lengths) -> bool:
        """Try to reuse this cached prefix for documents that begin with `beginning`.

        If the prefix contains nearly all tokens of `beginning`, the prefix is shortened in place to
        the common tokens, and True is returned. False is returned if the model computes the
        shorter text differently (`lengths`).
        """
        n_shared = count_common_tokens(self.tokens, beginning)
        if n_shared < max(MIN_PREFIX, MIN_REUSED_SHARE * len(beginning)):
            return False
        if lengths.side(n_shared) != lengths.side(self._n_read):
            return False
        self._truncate(n_shared)
        return True

    def is_prefix_of(self, prompt: Sequence[int]) -> bool:
        """Return whether a prompt begins with the prefix and is longer than the prefix."""
        length = len(self.tokens)
        return length < len(prompt) and tuple(prompt[:length]) == self.tokens

    def _truncate(self, tokens: int) -> None:
        self.tokens = self.tokens[:tokens]
        self.proxies = self.proxies[:, :tokens]
        for layer in self.cache.layers:
            layer.is_kept, layer.tokens = True, tokens


def new_cache() -> Cache:
    """Create an empty cache that keeps all tokens, also in layers with a sliding window."""
    return Cache(layer_class_to_replicate=GrowingLayer)


def find_cache_argument(base: PreTrainedModel) -> str | None:
    """Return the name of the model's cache argument; None if the model accepts no cache."""
    parameters = inspect.signature(base.forward).parameters
    return next((name for name in ("cache", "past_key_values") if name in parameters), None)


OBSERVED_SIZE = 2**22
"""Maximum size of the states of layers that are observed together on an accelerator. Several layers
take as many kernel launches as one layer."""


@dataclass(frozen=True)
class RowScores:
    """The scores of all requests in one row, for all ablations.

    Attributes:
        loglikelihoods: Log-likelihood of each continuation in nats [answers, requests]. An answer
            belongs to a stream and a weight format of the output head.
        hits: Two numbers for each continuation [answers, requests, 2]: the number of tokens that
            the model ranks first, and the number of tokens before the first token that the model
            does not rank first.
        proxies: Statistics of the intact model's layers, summed for each entry of `Row.gold`
            [entries, `OBSERVED`, layers].
    """

    loglikelihoods: Tensor
    hits: Tensor
    proxies: Tensor


@torch.inference_mode()
def launch_row(
    model: EngineModel, plan: StreamPlan, row: Row, prefix: Prefix | None = None
) -> Callable[[], RowScores]:
    """Start a forward pass for a row, and return a function that waits for the scores.

    On an accelerator, callers can launch the next row before they call the returned function.

    The row is scored for all streams of `plan`. `prefix` is the cached prefix that the row
    continues, computed with the same `plan`.
    """
    host = row.pad_nodes(model.row_size_multiple)
    row, prefix_sums = host.to_device(model.loaded.device), prefix.proxies.sum(1) if prefix else 0
    output, figures = run_base(model, plan, row, prefix and prefix.cache)
    empty = figures.new_zeros(plan.n_answers, 0)
    predictions = _score_tokens(model, plan, row, output) if row.requests else (empty, empty)
    # In one copy to the host: each waits for the accelerator.
    tensors = [tensor.to(figures.device) for tensor in (*predictions, figures)]
    fetch_all = start_host_copy(torch.cat([tensor.flatten() for tensor in tensors]))
    dtype, shapes = predictions[0].dtype, [tensor.shape for tensor in tensors]

    def read() -> RowScores:
        logprobs, greedy, figures = split_packed(fetch_all(), shapes)
        zeros = torch.zeros(plan.n_answers, len(row.requests))
        owner = host.owner[: logprobs.shape[1]]
        # Summed in float32 and rounded once, like the sum of a half-precision tensor in lm-eval;
        # on the host, since the order of summation on an accelerator varies.
        totals = zeros.index_add(1, owner, logprobs.float()).to(dtype)
        hits = torch.stack(
            [zeros.index_add(1, owner, greedy.float()), _count_leading(owner, greedy)]
        )
        proxies = torch.zeros(len(row.gold), *figures[:, 0].shape, dtype=torch.float64)
        for index, (_, path) in enumerate(row.gold):
            proxies[index] = figures[:, path].double().sum(1) + prefix_sums
        return RowScores(totals.float(), hits.permute(1, 2, 0).int(), proxies)

    return read


def _count_leading(owner: Tensor, greedy: Tensor) -> Tensor:
    """Count for each request the correctly predicted tokens before the first wrong one.

    Args:
        owner: Index of the request of each predicted token, in ascending order.
        greedy: Flag of each token of a continuation, 1 if the model ranks the token first [answers,
            tokens].

    Returns:
        The counts [answers, requests].
    """
    lengths = owner.bincount()  # no continuation is empty
    positions = torch.arange(len(owner)) - (lengths.cumsum(0) - lengths)[owner]
    misses = torch.where(greedy > 0, lengths[owner], positions)
    counts = lengths.expand(len(greedy), -1)
    return counts.scatter_reduce(1, owner.expand_as(misses), misses, "amin").float()


def _score_tokens(
    model: EngineModel, plan: StreamPlan, row: Row, output: Any
) -> tuple[Tensor, Tensor]:
    """Compute the log-probability of each predicted token of a row.

    `output` is the output of the model without the head. Returns two tensors [answers, predicted
    tokens]: the log-probabilities, and flags that are True for tokens with the highest logit.
    """
    states = output.last_hidden_state
    indices = (row.predicting_nodes, row.predictor, row.predicted)
    nodes, *predicted = (index.to(states.device) for index in indices)
    hidden = states.unflatten(0, (plan.n_streams, -1)).flatten(1, 2)[:, nodes]
    predictions = []
    for form, streams in plan.head_streams.items():
        stream_states = hidden if len(streams) == len(hidden) else take_entries(hidden, streams)
        with model.use_head_format(form):
            predictions.append(model.head.predictions(output, stream_states, *predicted))
    logprobs, greedy = map(torch.cat, zip(*predictions, strict=True))
    return logprobs, greedy


@torch.inference_mode()
def read_prefix(model: EngineModel, plan: StreamPlan, tokens: tuple[int, ...]) -> Prefix:
    """Read a common prefix under all ablations, and cache its keys and values."""
    cache = new_cache()
    _, figures = run_base(model, plan, reading_row(tokens), cache)
    return Prefix(plan, tokens, cache, figures.cpu().double())


def run_base(model: EngineModel, plan: StreamPlan, row: Row, cache: Any) -> tuple[Any, Tensor]:
    """Run the model without its output head on a row, for every stream (ablation).

    Args:
        model: The model.
        plan: The plan of the streams.
        row: The row to read.
        cache: Cache of keys and values that the row continues and extends; None for no cache.

    Returns:
        The output of the model without its head, with hidden states [streams × rows, tokens,
        hidden], and statistics of the intact model's layers [`OBSERVED`, tokens of the row,
        layers].
    """
    layers, device, base = model.loaded.layers, model.loaded.device, model.head.base
    row, anatomy = row.to_device(device), model.find_anatomy(plan)
    figures: list[Tensor] = []
    pending: list[tuple[Tensor, Tensor]] = []

    def observe(layer: int, inputs: Tensor, outputs: Tensor) -> None:
        if inputs.shape[:2] != row.input_ids.shape:
            shape = tuple(inputs.shape)
            raise RefusalError(f"the layers return shape {shape}, not [texts, tokens, width]")
        # Some models have several parallel residual streams: together they are the state.
        inputs, outputs = (state.flatten(0, 1).flatten(1) for state in (inputs, outputs))
        if pending and pending[0][0].device != inputs.device:
            compute_figures()
        is_last = device.type == "cpu" or (len(pending) + 2) * inputs.numel() > OBSERVED_SIZE
        # Views would keep the states of all streams in memory.
        pending.append((inputs, outputs) if is_last else (inputs.clone(), outputs.clone()))
        if is_last:
            compute_figures()

    def compute_figures() -> None:
        if len(pending) == 1:
            figures.append(torch.stack(observed(*pending[0])))
        elif pending:
            inputs, outputs = map(torch.stack, zip(*pending, strict=True))
            figures.extend(torch.stack(observed(inputs, outputs)).unbind(1))
        pending.clear()

    cache_name = None if cache is None else find_cache_argument(base)
    extra_inputs = {} if cache_name is None else {cache_name: cache}
    replace_mask = None
    if row.spans is not None:
        parameters = inspect.signature(base.forward).parameters
        if "position_ids" not in parameters:
            raise RefusalError("it takes no positions")
        extra_inputs["position_ids"] = row.positions
        masks = Masks(row, model.find_windows(row.length), model.loaded.model.dtype, device)
        replace_mask = masks.replace_mask
        if cache is None and MASK_ARGUMENT in parameters:
            # Without it, transformers looks for texts in the positions, and waits for the device.
            extra_inputs[MASK_ARGUMENT] = masks.layer_masks[0]
    inputs = {"input_ids": row.input_ids, "use_cache": cache_name is not None, **extra_inputs}
    embeddings, max_streams = [], None
    if formats := [form for form in plan.embedding_formats if form is not None]:
        embeddings = compute_first_states(base, layers[0], model.embeddings, formats, inputs)
    if cache is None and (max_tokens := model.max_pass_tokens) is not None:
        max_streams = max(1, max_tokens // row.input_ids.numel())
    changes = (replace_mask, model.device_replacements, embeddings, max_streams)
    with ForwardPass(layers, plan, anatomy, observe, *changes).install():
        output = base(**inputs)
    compute_figures()
    if len(figures) != len(layers):
        raise RefusalError(f"the {len(layers)} layers run {len(figures)} times in one forward pass")
    return output, torch.stack([figure.to(figures[0].device) for figure in figures], dim=-1)


@torch.inference_mode()
def measure_cache_bytes(model: EngineModel) -> int:
    """Measure the mean bytes of one token's cached keys and values in one layer."""
    facts = model.facts
    if facts.cache_bytes is None:
        cache = new_cache()
        model.restore_state()
        run_base(model, model.plan([INTACT]), reading_row((0, 0)), cache)
        layers = [layer for layer in cache.layers if layer.is_initialized]
        size = sum(t.numel() * t.itemsize for layer in layers for t in (layer.keys, layer.values))
        facts.cache_bytes = max(1, int(size) // (2 * max(1, len(layers))))
    return facts.cache_bytes


MIN_EXPERT_ABLATIONS = 8
"""Minimum number of expert ablations for which an extra pass to find idle ones is worthwhile."""
_Removal = tuple[Change, ...]


def find_expert_ablations(ablations: Ablations) -> list[Ablation]:
    """List the ablations that remove experts and change nothing else."""
    return [a for a in ablations if {change.component for change in a.changes} == {"expert"}]


@torch.inference_mode()
def find_idle_ablations(model: EngineModel, row: Row, ablations: Ablations) -> set[Ablation]:
    """Find the ablations that remove only experts that no token of a row uses.

    Args:
        model: The model.
        row: The row, which must not continue a cached prefix.
        ablations: Ablations that remove experts and change nothing else.

    Returns:
        The ablations that do not change the result of the row, up to rounding.
    """
    removals_of = {a: [change.experts for change in a.by_layer.values()] for a in ablations}
    removals = {removal for group in removals_of.values() for removal in group}
    anatomy, is_idle = model.anatomy, dict[_Removal, bool]()

    def check(experts: Experts, group: Sequence[_Removal], router: nn.Module, *call: Any) -> None:
        args, kwargs, tables = call
        is_chosen = torch.zeros(experts.count, dtype=torch.bool, device=tables[0].device)
        for table in tables:
            if not table.is_floating_point():
                is_chosen[table.flatten()] = True
        # Converted once: each conversion waits for the accelerator.
        chosen_experts = {number for number, flag in enumerate(is_chosen.tolist()) if flag}
        for removal in group:
            remaining = experts.remaining_experts(removal, anatomy.layer_name(removal[0].layer))
            # The search for attention windows also calls routers, in the middle of the pass.
            is_idle[removal] = (
                is_idle.get(removal, True)
                and chosen_experts.isdisjoint(part.number for part in removal)
                and _routes_alike(router, experts, remaining, tables, (args, kwargs))
            )

    with ExitStack() as stack:
        for layer, group in group_by(removals, lambda removal: removal[0].layer).items():
            experts = anatomy.get_part(Experts, layer)
            router = anatomy.layers[layer].get_submodule(experts.router)
            hook = partial(check, experts, group)
            stack.enter_context(router.register_forward_hook(hook, with_kwargs=True))
        run_base(model, model.plan([INTACT]), row, None)
    return {a for a, group in removals_of.items() if all(is_idle.get(r, False) for r in group)}


def _routes_alike(
    router: nn.Module, experts: Experts, remaining: Sequence[int], tables: Sequence[Any], call: Any
) -> bool:
    """Return whether a router chooses the same experts and weights if only some experts remain.

    Rounding errors in the weights are ignored. `remaining` contains the numbers of the experts that
    remain. `tables` contains the router's outputs with all experts, and `call` the router's
    positional and keyword arguments.
    """
    new_tables = call_reduced_router(router, experts, remaining, tables, input_state(*call), call)
    for old_table, new_table in zip(tables, new_tables, strict=True):
        if not old_table.is_floating_point():
            if not torch.equal(old_table, new_table):
                return False
        elif old_table.shape[-1] != experts.count:
            tolerance = 4 * torch.finfo(old_table.dtype).eps
            if not torch.allclose(old_table, new_table, rtol=tolerance, atol=tolerance):
                return False
    return True
