"""Scoring one row: the model's own forward pass, its own head, lm-eval's log-likelihoods."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from tracker.engine.rows import Row
from tracker.engine.streams import StreamPlan, forking
from tracker.metrics.influence import angular_distance, cosine_similarity, relative_update

HEAD_BYTES = 64 * 2**20
"""Logits that exist at a time; more would only wait for memory."""


@dataclass(frozen=True)
class RowScores:
    """What one row says.

    Attributes:
        loglikelihoods: Summed log-probability of each continuation [streams, requests], nats.
        greedy: Whether each continuation is the greedy one [streams, requests].
        proxies: Sums over the tokens of each of the row's gold paths
            [gold paths, 3, layers]: cosine similarity, angular distance, relative update.
    """

    loglikelihoods: Tensor
    greedy: Tensor
    proxies: Tensor


@torch.inference_mode()
def score_row(model: Any, layers: nn.ModuleList, plan: StreamPlan, row: Row) -> RowScores:
    """Score a row for every stream of a plan.

    Args:
        model: A causal language model of transformers, in evaluation mode.
        layers: Its decoder layers.
        plan: Which streams there are.
        row: The requests.

    Returns:
        Scores on the CPU.
    """
    device = model.get_input_embeddings().weight.device
    observed: list[Tensor] = []

    def observe(layer: int, before: Tensor, after: Tensor) -> None:
        before, after = before.flatten(0, 1), after.flatten(0, 1)
        cosine = cosine_similarity(before, after)
        observed.append(
            torch.stack([cosine, angular_distance(cosine), relative_update(before, after)]).cpu()
        )

    base = base_model(model)
    with forking(layers, plan, observe):
        output = base(
            input_ids=row.input_ids.to(device),
            position_ids=row.positions.to(device),
            attention_mask=attention_mask(model, row),
            use_cache=False,
        )
    logprobs, greedy = _head(model, output, plan.streams, row)
    owner = row.owner.to(logprobs.device)
    requests = len(row.requests)
    none = torch.zeros(len(logprobs), requests, device=logprobs.device)
    # Summed in float32 and rounded once, as the sum of a half-precision tensor is in lm-eval.
    totals = none.index_add(1, owner, logprobs.float()).to(logprobs.dtype)
    misses = none.index_add(1, owner, (~greedy).float())
    per_token = torch.stack(observed, dim=-1)  # [3, N, layers]
    sums = [per_token[:, path].double().sum(1) for _, path in row.gold]
    return RowScores(
        loglikelihoods=totals.float().cpu(),
        greedy=(misses == 0).cpu(),
        proxies=torch.stack(sums) if sums else torch.zeros(0, 3, len(layers)),
    )


def base_model(model: Any) -> Any:
    """Find the part of a causal language model below its head.

    Args:
        model: A causal language model of transformers.

    Returns:
        The submodule that returns `last_hidden_state`.
    """
    return getattr(model, model.base_model_prefix)


def attention_mask(model: Any, row: Row) -> Any:
    """Build the additive mask that a model needs for a row.

    Args:
        model: A causal language model of transformers.
        row: The row; without `ancestors` it needs none.

    Returns:
        None, a mask [1, 1, tokens, tokens], or for models whose layers differ a dict of masks by
        layer type, as transformers takes it.
    """
    if row.ancestors is None:
        return None
    config = model.config.get_text_config()
    window = getattr(config, "sliding_window", None)
    if getattr(config, "use_sliding_window", True) is False:
        window = None

    def additive(seen: Tensor) -> Tensor:
        mask = torch.zeros(seen.shape, dtype=model.dtype)
        mask.masked_fill_(~seen, torch.finfo(model.dtype).min)
        return mask[None, None].to(model.device)

    full = row.ancestors
    if window is None:
        return additive(full)
    depth = row.positions[0]
    near = full & (depth[:, None] - depth[None, :] < window)
    types = set(getattr(config, "layer_types", None) or ["sliding_attention"])
    if types == {"sliding_attention"} and not _takes_mask_by_type(model):
        return additive(near)
    return {"full_attention": additive(full), "sliding_attention": additive(near)}


def _takes_mask_by_type(model: Any) -> bool:
    """Whether the model looks its mask up by the layer's type."""
    import inspect

    return "causal_mask_mapping" in inspect.getsource(type(base_model(model)).forward)


def _head(model: Any, output: Any, streams: int, row: Row) -> tuple[Tensor, Tensor]:
    """Log-probability and greedy match of every predicted token, in chunks of bounded size.

    Takes what the base returned, with a last hidden state [streams × rows, tokens, hidden], and
    returns two [streams, predicted]. The log-softmax runs in the logits' own dtype, as lm-eval's
    does by default.
    """
    states = output.last_hidden_state
    keep, predictor, predicted = (
        index.to(states.device) for index in (row.keep, row.predictor, row.predicted)
    )
    hidden = states.unflatten(0, (streams, -1)).flatten(1, 2)[:, keep]
    kept = len(keep)
    vocabulary = model.get_output_embeddings().weight.shape[0]
    size = max(1, HEAD_BYTES // (vocabulary * hidden.element_size() * kept))
    logprobs, greedy = [], []
    with _base_returns(model) as give:
        for chunk in hidden.split(size):
            give(replace(output, last_hidden_state=chunk))
            logits = model(input_ids=torch.zeros(1, 1, dtype=torch.long)).logits
            if logits.shape[:2] != chunk.shape[:2]:
                raise RuntimeError("the head does not keep the shape of its input")
            log_softmax = functional.log_softmax(logits, dim=-1)
            best = log_softmax.argmax(-1)
            logprobs.append(log_softmax[:, predictor, predicted])
            greedy.append(best[:, predictor] == predicted)
    return torch.cat(logprobs), torch.cat(greedy)


@contextmanager
def _base_returns(model: Any) -> Iterator[Callable[[Any], None]]:
    """Let the model's head run alone: its base returns an output that it is given.

    Soft-capping, logit scaling and whatever else a model does behind its base stay the model's.
    """
    base = base_model(model)
    current: list[Any] = []

    def give(output: Any) -> None:
        current[:] = [output]

    base.forward = lambda *args, **kwargs: current[0]
    try:
        yield give
    finally:
        del base.forward
