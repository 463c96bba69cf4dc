"""Measure proxies of layers and experts on the tokens of one document.

Divergences, losses, logit lenses and Taylor terms are computed from the model's output. Angles
compare the residual stream before and after one or several layers. The load of an expert is its
number of tokens, and the sum of the expert's weighted output norms.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tracker.engine.forward.layer import ForwardPass
from tracker.engine.forward.streams import Ablations
from tracker.engine.observers.taylor import gate_gradient
from tracker.engine.refusal import RefusalError, try_model
from tracker.engine.scoring.head import LOGITS_BYTES
from tracker.engine.scoring.rows import measured_texts, reading_row
from tracker.engine.scoring.score import run_base
from tracker.engine.scoring.sweep import Engine
from tracker.models.devices import copy_to_device, take_entries
from tracker.models.hooks import replaced_forward
from tracker.models.parts.experts import Experts, weighted_expert_outputs
from tracker.schema.changes import INTACT, Ablation, Change
from tracker.schema.documents import Document
from tracker.schema.proxies import EXPERT_PROXIES, OBSERVED, angular_distance, to_double

MASKED_LOGPROB = -1e4
"""Log-probability of a masked token, so small that its probability rounds to 0."""


def output_proxies(
    engine: Engine, document: Document, only: str | None = None
) -> dict[str, Tensor]:
    """Measure the effect of each layer on the model's output in one document.

    Args:
        engine: The engine of the model.
        document: The document that the model reads.
        only: `loss_increase` or `gate_gradient`, to measure only this proxy and `predicted`; None
            to measure all proxies.

    Returns:
        Sums over the document's tokens, float64. `tokens` []: the number of tokens on which the
        proxies are measured. `predicted` []: the number of tokens without the first token of the
        text. The following proxies have one value per layer. `kl` and `js`: divergence between the
        next-token distributions of the intact model and the model without the layer, in nats.
        `loss_increase`: decrease of the log-likelihood of the predicted tokens if the layer is
        removed, in nats. `lens_changes`: number of tokens at which the layer changes the most
        likely next token of the logit lens. `gate_gradient`: derivative of the negative
        log-likelihood with respect to a factor on the layer's update; NaN if the model cannot be
        differentiated.

    References:
        S. Kullback, R. A. Leibler, Annals of Mathematical Statistics 22 (1951) 79-86. J. Lin, IEEE
        Transactions on Information Theory 37 (1991) 145-151 (Jensen-Shannon). nostalgebraist,
        interpreting GPT: the logit lens (2020): the model's own final norm and head on the residual
        stream between layers, which is the model without all later layers; N. Belrose et al.,
        arXiv 2303.08112, for where it misleads. P. Molchanov et al., arXiv 1906.10771, and
        P. Michel et al., arXiv 1905.10650: the first-order Taylor term of a gate.
    """
    proxy_sums: dict[str, Tensor] = {}
    n_layers = len(engine.loaded.layers)
    layer_ablations = [Ablation.from_changes(removed=[layer]) for layer in range(n_layers)]
    for tokens, start in measured_texts(document, engine.max_length):
        sums = {"predicted": torch.tensor(float(len(tokens) - max(start, 1))).double()}
        if only != "gate_gradient":
            sums |= _divergences(engine, tokens, start, only, layer_ablations)
        if only is None:
            sums["tokens"] = torch.tensor(float(len(tokens) - start)).double()
            sums["lens_changes"] = _lens_changes(engine, tokens, start)
        if only != "loss_increase":
            gradient, _ = try_model(partial(gate_gradient, engine, tokens, start))
            if gradient is None:
                gradient = torch.full((n_layers,), torch.nan, dtype=torch.float64)
            sums["gate_gradient"] = gradient
        proxy_sums = {name: value + proxy_sums.get(name, 0) for name, value in sums.items()}
    return proxy_sums


def divergences(engine: Engine, document: Document, ablations: Ablations) -> dict[str, Tensor]:
    """Measure how far each ablated model's predictions diverge from the intact model's.

    Args:
        engine: The engine of the model.
        document: The document that the model reads.
        ablations: The ablations to measure, without the baseline.

    Returns:
        Sums over the document's tokens, float64. `tokens` []: the number of tokens. `kl`, `js` and
        `loss_increase` [ablations]: as in `output_proxies`.
    """
    totals: dict[str, Tensor] = {}
    for tokens, start in measured_texts(document, engine.max_length):
        sums = {"tokens": torch.tensor(float(len(tokens) - start)).double()}
        sums |= _divergences(engine, tokens, start, None, ablations)
        totals = {name: value + totals.get(name, 0) for name, value in sums.items()}
    return totals


def answer_divergences(
    engine: Engine, document: Document, ablations: Ablations
) -> dict[str, Tensor]:
    """Measure how much each ablation changes the predictions while reading the right answer.

    See `divergences` for the result. Without a right answer, all tokens are measured.
    """
    if document.gold is None:
        return divergences(engine, document, ablations)
    request = document.requests[document.gold]
    # The position of the last answer token predicts what follows the answer.
    tokens = (*request.context, *request.continuation)[:-1][-engine.max_length :]
    start = max(len(tokens) - len(request.continuation), 0)
    sums = _divergences(engine, tokens, start, None, ablations)
    return {"tokens": torch.tensor(float(len(tokens) - start)).double(), **sums}


@torch.inference_mode()
def _divergences(
    engine: Engine,
    tokens: Sequence[int],
    start: int,
    single_proxy: str | None,
    ablations: Ablations,
) -> dict[str, Tensor]:
    """Compare each ablated model's next-token predictions with the intact model's.

    Returns `kl`, `js` and `loss_increase` [ablations], or only `single_proxy`, as sums over the
    text's tokens from the index `start` on.
    """
    names = ("kl", "js", "loss_increase") if single_proxy is None else (single_proxy,)
    sums = {name: torch.zeros(len(ablations), dtype=torch.float64) for name in names}
    index_of = {ablation: index for index, ablation in enumerate(ablations)}
    targets = torch.tensor(tokens)
    # A token is predicted at the one before it, including the first measured token.
    first_position = max(start - 1, 0)
    for group, positions, logits in _logits(engine, [INTACT, *ablations], tokens, first_position):
        n_skipped = max(0, start - positions.start)
        next_ids = targets[positions.start + 1 : positions.stop + 1]
        next_ids = copy_to_device(next_ids, logits.device)[:, None]
        log_p = _logprobs(logits[0])
        intact_sum = to_double(log_p[: len(next_ids)].gather(1, next_ids)).sum()
        rows = []
        # One at a time, so that intermediate results stay in the cache.
        for changed_logits in logits[1:]:
            log_q = _logprobs(changed_logits)
            pair = _kl_and_js(log_p, log_q) if single_proxy is None else ()
            loss = intact_sum - to_double(log_q[: len(next_ids)].gather(1, next_ids)).sum()
            rows.append(torch.stack([*(values[n_skipped:].sum() for values in pair), loss]))
        # Copied at once: each copy waits for the accelerator.
        columns = torch.stack(rows).cpu().double().unbind(1) if rows else ()
        for name, column in zip(names, columns, strict=False):
            sums[name][[index_of[ablation] for ablation in group[1:]]] += column
    return sums


def _logprobs(logits: Tensor) -> Tensor:
    """Return log-probabilities, which are finite even for masked tokens."""
    return logits.float().log_softmax(-1).clamp_(min=MASKED_LOGPROB)


def _kl_and_js(log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
    """Return the KL divergence KL(p ‖ q) and the Jensen-Shannon divergence at each position.

    The inputs are log-probabilities [positions, vocabulary] of the intact model (p) and of the
    changed model (q).
    """
    p, mixture = log_p.exp(), log_q.exp()
    sum_p, sum_q = torch.linalg.vecdot(p, log_p), torch.linalg.vecdot(mixture, log_q)
    kl = sum_p - torch.linalg.vecdot(p, log_q)
    mixture.add_(p).div_(2)
    sum_mixture = torch.linalg.vecdot(mixture, mixture.clamp(min=torch.finfo(p.dtype).tiny).log())
    return to_double(kl), to_double((sum_p + sum_q) / 2 - sum_mixture)


@torch.inference_mode()
def _lens_changes(engine: Engine, tokens: Sequence[int], start: int) -> Tensor:
    """Count for each layer the positions at which the logit lens changes its top token.

    Positions before `start` are not counted. Returns the counts [layers].
    """
    n_layers = len(engine.loaded.layers)
    # The lens at a layer's input is the model without that layer and all above it.
    lenses = [Ablation.from_changes(removed=range(layer, n_layers)) for layer in range(n_layers)]
    top_tokens = torch.zeros(n_layers + 1, len(tokens) - start, dtype=torch.long)
    for group, positions, logits in _logits(engine, [INTACT, *lenses], tokens, start):
        lens_indices = torch.tensor([n_layers - len(ablation.removed()) for ablation in group])
        columns = slice(positions.start - start, positions.stop - start)
        top_tokens[lens_indices, columns] = logits.argmax(-1).cpu()
    return (top_tokens[1:] != top_tokens[:-1]).sum(1).double()


def _logits(
    engine: Engine, ablations: Ablations, tokens: Sequence[int], first_position: int
) -> Iterator[tuple[list[Ablation], range, Tensor]]:
    """Compute a text's logits under all ablations, in chunks that fit into memory.

    Yields a list of ablations that begins with the baseline, a range of positions from
    `first_position` on, and the logits [ablations, positions, vocabulary].
    """
    for group, output, states in _compute_states(engine, ablations, tokens):
        plan = engine.plan(group)
        vocabulary = engine.loaded.model.get_output_embeddings().weight.shape[0]
        size = max(1, LOGITS_BYTES // (4 * vocabulary * len(group)))
        for start in range(first_position, len(tokens), size):
            positions = range(start, min(start + size, len(tokens)))
            kept_states = take_entries(states, positions, axis=1)
            yield group, positions, engine.logits(plan, output, kept_states)


def _compute_states(
    engine: Engine, ablations: Ablations, tokens: Sequence[int]
) -> Iterator[tuple[list[Ablation], Any, Tensor]]:
    """Compute the last hidden states of a text under all ablations.

    For each group of ablations that fits into memory, the function yields the ablations, the
    model's output, and the hidden states [ablations, tokens, hidden].
    """
    # One sequence, whose mask the model builds itself.
    row = replace(reading_row(tokens), spans=None)

    def run(engine: Engine, group: Ablations) -> tuple[Any, Tensor]:
        plan = engine.plan(group)
        engine.restore_state()
        output, _ = run_base(engine, plan, row, None)
        return output, take_entries(output.last_hidden_state, plan.final_streams)

    if engine.sharing.depth:
        for group in engine.group_ablations(ablations, len(tokens)):
            yield group, *run(engine, group)
        return
    output, intact_states = run(engine, [INTACT])
    for ablation in ablations:
        if ablation != INTACT:
            # A model cannot be cut to have no layers: all of them stay in place.
            is_empty = len(ablation.removed()) == len(engine.loaded.layers)
            quirks = replace(engine.quirks, in_place=engine.quirks.in_place or is_empty)
            _, changed_states = run(replace(engine, quirks=quirks).ablate(ablation), [INTACT])
            yield [INTACT, ablation], output, torch.cat([intact_states, changed_states])


@torch.inference_mode()
def measure_state_changes(engine: Engine, document: Document) -> dict[str, Tensor]:
    """Measure how much each layer, and each range of layers, changes the residual stream.

    Args:
        engine: The engine, whose model reads the document.
        document: The document that is read: context and gold continuation, or the windows of a
            rolling text.

    Returns:
        Sums over the document's tokens, float64. `tokens` []: the number of tokens. Proxies of
        single layers, e.g. `cosine_score` [layers]: one value per layer. `angular_distance`
        [layers, layers]: the angle between the input of layer i and the output of layer j; 0 for j
        < i.

    Raises:
        RefusalError: The model's layers do not return one hidden state per token.
    """
    n_layers = len(engine.loaded.layers)
    observed = {proxy.name: proxy for proxy in OBSERVED if proxy.strategy}
    sums = {
        "tokens": torch.zeros((), dtype=torch.float64),
        **{name: torch.zeros(n_layers, dtype=torch.float64) for name in observed},
        "angular_distance": torch.zeros(n_layers, n_layers, dtype=torch.float64),
    }
    layer_states: list[list[Tensor]] = []

    def observe(layer: int, *states: Tensor) -> None:
        # Several parallel residual streams are one state.
        layer_states.append([state.flatten(0, 1).flatten(1) for state in states])

    forward_pass = ForwardPass(engine.loaded.layers, engine.plan([INTACT]), observe=observe)
    for tokens, start in measured_texts(document, engine.max_length):
        layer_states.clear()
        with forward_pass.install():
            engine.run_text(tokens)
        if [len(state) for pair in layer_states for state in pair] != [len(tokens)] * 2 * n_layers:
            raise RefusalError(
                "this measurement needs layers that run once per forward pass and return one "
                "hidden state per token"
            )
        states = [[state[start:] for state in pair] for pair in layer_states]
        sums["tokens"] += len(tokens) - start
        for layer, (inputs, outputs) in enumerate(states):
            for name, proxy in observed.items():
                sums[name][layer] += to_double(proxy.observe_tokens(inputs, outputs)).sum().cpu()
            for last in range(layer, n_layers):
                angle = to_double(angular_distance(inputs, states[last][1])).sum().cpu()
                sums["angular_distance"][layer, last] += angle
    return sums


@torch.inference_mode()
def measure_expert_load(
    engine: Engine, document: Document, parts: Collection[Change]
) -> dict[Change, tuple[float, ...]]:
    """Measure how often and how strongly the intact model uses experts in a document.

    Args:
        engine: The engine, whose model reads the document.
        document: The document that is read: context and gold continuation, or the windows of a
            rolling text.
        parts: The experts to measure, each given as the change that removes the expert.

    Returns:
        For each expert, two numbers: the sum of routing weight × ‖output‖ over the expert's tokens,
        and the number of these tokens. The sum is NaN if the outputs of single experts cannot be
        computed.
    """
    layers, anatomy = engine.loaded.layers, engine.anatomy
    experts = {layer: anatomy.get_part(Experts, layer) for layer in {part.layer for part in parts}}
    sums = {
        layer: torch.zeros(len(EXPERT_PROXIES), layer_experts.count, dtype=torch.float64)
        for layer, layer_experts in experts.items()
    }
    holders = {layer: layers[layer].get_submodule(e.holder) for layer, e in experts.items()}
    for tokens, start in measured_texts(document, engine.max_length):
        with ExitStack() as stack:
            for layer, holder in holders.items():
                record = partial(_record_load, holder.forward, sums[layer], start)
                stack.enter_context(replaced_forward(holder, record))
            engine.run_text(tokens)
    return {part: tuple(sums[part.layer][:, part.number].tolist()) for part in parts}


def _record_load(
    forward: Callable[..., Tensor], sums: Tensor, start: int, *args: Any, **kwargs: Any
) -> Tensor:
    """Call the experts' `forward`, and add their load from token `start` on to `sums`."""
    output = forward(*args, **kwargs)
    expert_outputs, is_separable = weighted_expert_outputs(forward, args, kwargs, output)
    for numbers, gates, expert_output in expert_outputs:
        loads = to_double(gates) * to_double(expert_output.float().norm(dim=-1))
        # A number beyond the last belongs to no expert of this module, but to one elsewhere.
        is_counted = (numbers < sums.shape[1]).cpu() & (torch.arange(len(numbers)) >= start)
        experts, values = numbers.cpu()[is_counted].long(), loads.cpu().double()[is_counted]
        values = values if is_separable else torch.full_like(values, torch.nan)
        sums[0].index_add_(0, experts, values)
        sums[1].index_add_(0, experts, torch.ones_like(values))
    return output
