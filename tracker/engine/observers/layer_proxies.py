"""Proxies of layers and experts, measured on the tokens of one document.

Divergences, loss, logit lens and first-order Taylor are computed from the model's output, angles
from how far the residual stream turns over any span of layers. Loads count how often experts are
chosen, and how much they add.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tracker.core.changes import INTACT, Ablation, Change
from tracker.core.documents import Document
from tracker.core.proxies import OBSERVED, OF_EXPERTS, angular_distance, widened
from tracker.engine.refusal import RefusalError, tried
from tracker.engine.scoring.head import LOGITS_BYTES
from tracker.engine.scoring.model import logits_of
from tracker.engine.scoring.rows import measured_texts, reading_row
from tracker.engine.scoring.score import run_base
from tracker.engine.scoring.sweep import Engine
from tracker.models.devices import send, take
from tracker.models.hooks import all_of, call_protected, first_of, replaced_forward, with_first
from tracker.models.parts.experts import Experts, single_outputs

IMPOSSIBLE = -1e4
"""Log-probability of a masked token: small enough to be 0 as a probability."""


def output_proxies(
    engine: Engine, document: Document, only: str | None = None
) -> dict[str, Tensor]:
    """Measure the effect of each layer of the intact model on its output for a document.

    The model without a layer shares its lower layers with the intact one as far as the engine's
    sharing allows, and otherwise is a really pruned copy.

    Args:
        engine: The engine, with as much sharing as is exact.
        document: The document.
        only: `loss_increase` or `gate_gradient`, for this one alone with `predicted`; None = all.

    Returns:
        Sums over the document's tokens, float64. `tokens` and `predicted` []: the tokens on which
        the proxies are measured, and those of them that have a token before them. Others are per
        layer [layers]. `kl` and `js`: divergence of the next token's distribution without the layer
        from that of the intact model, in nats. `loss_increase`: fall of the log-likelihood of the
        predicted tokens without the layer, in nats. `lens_changes`: number of tokens at which the
        most likely next token differs between the logit lens at the layer's output and that at its
        input. `gate_gradient`: derivative of the predicted tokens' negative log-likelihood by a
        gate on the layer's update, at 1; NaN if the model cannot be differentiated.

    References:
        S. Kullback, R. A. Leibler, Annals of Mathematical Statistics 22 (1951) 79-86. J. Lin, IEEE
        Transactions on Information Theory 37 (1991) 145-151 (Jensen-Shannon). nostalgebraist,
        interpreting GPT: the logit lens (2020): the model's own final norm and head on the residual
        stream between layers, which is the model without all later layers; N. Belrose et al.,
        arXiv 2303.08112, for where it misleads. P. Molchanov et al., arXiv 1906.10771, and
        P. Michel et al., arXiv 1905.10650: the first-order Taylor term of a gate.
    """
    found: dict[str, Tensor] = {}
    for tokens, measured in measured_texts(document, engine.max_length):
        sums = {"predicted": torch.tensor(float(len(tokens) - max(measured, 1))).double()}
        if only != "gate_gradient":
            singles = [Ablation.of(removed=[layer]) for layer in range(_layers(engine))]
            sums |= _divergences(engine, tokens, measured, only, singles)
        if only is None:
            sums["tokens"] = torch.tensor(float(len(tokens) - measured)).double()
            sums["lens_changes"] = _lens_changes(engine, tokens, measured)
        if only != "loss_increase":
            gradient, _ = tried(partial(_gate_gradient, engine, tokens, measured))
            unknown = torch.full((_layers(engine),), torch.nan, dtype=torch.float64)
            sums["gate_gradient"] = unknown if gradient is None else gradient
        found = {name: value + found.get(name, 0) for name, value in sums.items()}
    return found


def divergences(
    engine: Engine, document: Document, ablations: Sequence[Ablation]
) -> dict[str, Tensor]:
    """Measure how far changes of the model move its output distribution for a document.

    Args:
        engine: The engine, with as much sharing as is exact.
        document: The document.
        ablations: The changes of the model; not the baseline.

    Returns:
        Sums over the document's tokens, float64: `tokens` [], and `kl`, `js` and `loss_increase` of
        each ablation [ablations], as `output_proxies` has them for layers.
    """
    found: dict[str, Tensor] = {}
    for tokens, measured in measured_texts(document, engine.max_length):
        sums = {"tokens": torch.tensor(float(len(tokens) - measured)).double()}
        sums |= _divergences(engine, tokens, measured, None, ablations)
        found = {name: value + found.get(name, 0) for name, value in sums.items()}
    return found


def _layers(engine: Engine) -> int:
    return len(engine.loaded.layers)


@torch.inference_mode()
def _divergences(
    engine: Engine,
    tokens: Sequence[int],
    measured: int,
    only: str | None,
    ablations: Sequence[Ablation],
) -> dict[str, Tensor]:
    """Sum `kl`, `js` and `loss_increase` over a text, or only the one named by `only`."""
    names = ("kl", "js", "loss_increase") if only is None else (only,)
    sums = {name: torch.zeros(len(ablations), dtype=torch.float64) for name in names}
    place_of = {ablation: place for place, ablation in enumerate(ablations)}
    targets = torch.tensor(tokens)
    # A token is predicted at the one before it, including the first measured token.
    first = max(measured - 1, 0)
    for group, positions, logits in _logits(engine, [INTACT, *ablations], tokens, first):
        uncounted = max(0, measured - positions.start)
        following = send(targets[positions.start + 1 : positions.stop + 1], logits.device)[:, None]
        intact = _logprobs(logits[0])
        baseline = widened(intact[: len(following)].gather(1, following)).sum()
        rows = []
        # One at a time, so that intermediate results stay in the cache.
        for other in logits[1:]:
            without = _logprobs(other)
            both = _kl_and_js(intact, without) if only is None else ()
            lost = baseline - widened(without[: len(following)].gather(1, following)).sum()
            rows.append(torch.stack([*(kind[uncounted:].sum() for kind in both), lost]))
        # Copied at once: each copy waits for the accelerator.
        columns = torch.stack(rows).cpu().double().unbind(1) if rows else ()
        for name, column in zip(names, columns, strict=False):
            sums[name][[place_of[ablation] for ablation in group[1:]]] += column
    return sums


def _logprobs(logits: Tensor) -> Tensor:
    """Return log-probabilities, finite for masked tokens too, so that 0 times them is 0."""
    return logits.float().log_softmax(-1).clamp_(min=IMPOSSIBLE)


def _kl_and_js(intact: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """Compute KL(intact ‖ other) and Jensen-Shannon at each position, widened [positions].

    The inputs are log-probabilities [positions, vocabulary]. Jensen-Shannon is the entropy of the
    mixture minus the mean entropy, which rounding leaves about 1e-6 off.
    """
    p, mixture = intact.exp(), other.exp()
    of_p, of_q = torch.linalg.vecdot(p, intact), torch.linalg.vecdot(mixture, other)
    kl = of_p - torch.linalg.vecdot(p, other)
    mixture.add_(p).div_(2)
    of_both = torch.linalg.vecdot(mixture, mixture.clamp(min=torch.finfo(p.dtype).tiny).log())
    return widened(kl), widened((of_p + of_q) / 2 - of_both)


@torch.inference_mode()
def _lens_changes(engine: Engine, tokens: Sequence[int], measured: int) -> Tensor:
    """Count, layer by layer, the tokens whose logit-lens prediction the layer changes."""
    layers = _layers(engine)
    # The lens at a layer's input is the model without that layer and all above it.
    lenses = [Ablation.of(removed=range(layer, layers)) for layer in range(layers)]
    top = torch.zeros(layers + 1, len(tokens) - measured, dtype=torch.long)
    for group, places, logits in _logits(engine, [INTACT, *lenses], tokens, measured):
        which = [layers - len(ablation.removed()) for ablation in group]
        for place, tops in zip(places, logits.argmax(-1).cpu().unbind(1), strict=True):
            top[which, place - measured] = tops
    return (top[1:] != top[:-1]).sum(1).double()


def _logits(
    engine: Engine, ablations: Sequence[Ablation], tokens: Sequence[int], first: int
) -> Iterator[tuple[list[Ablation], range, Tensor]]:
    """Compute logits under ablations from a token on, as many at a time as memory allows.

    Yields some ablations with the baseline first, a range of positions, and logits [ablations,
    positions, vocabulary].
    """
    for group, output, states in _states(engine, ablations, tokens):
        plan = engine.plan(group)
        vocabulary = engine.loaded.model.get_output_embeddings().weight.shape[0]
        size = max(1, LOGITS_BYTES // (4 * vocabulary * len(group)))
        for start in range(first, len(tokens), size):
            positions = range(start, min(start + size, len(tokens)))
            yield group, positions, engine.logits(plan, output, take(states, positions, axis=1))


def _states(
    engine: Engine, ablations: Sequence[Ablation], tokens: Sequence[int]
) -> Iterator[tuple[list[Ablation], Any, Tensor]]:
    """Run the base under ablations; yield groups, their outputs, [ablations, tokens, hidden]."""
    # One sequence, whose mask the model builds itself.
    row = replace(reading_row(tokens), spans=None)

    def run(engine: Engine, group: Sequence[Ablation]) -> tuple[Any, Tensor]:
        plan = engine.plan(group)
        engine.put_back()
        output, _ = run_base(engine, plan, row, None)
        return output, take(output.last_hidden_state, plan.stream_of)

    if engine.sharing.depth:
        for group in engine.groups(ablations, len(tokens)):
            yield group, *run(engine, group)
        return
    output, intact = run(engine, [INTACT])
    for ablation in ablations:
        if ablation != INTACT:
            _, other = run(_apart(engine, ablation), [INTACT])
            yield [INTACT, ablation], output, torch.cat([intact, other])


def _apart(engine: Engine, ablation: Ablation) -> Engine:
    """Return the engine of a copy without some layers; without any layer it cannot be cut."""
    if len(ablation.removed()) == _layers(engine):
        engine = replace(engine, quirks=replace(engine.quirks, stay=True))
    return engine.without(ablation)


def _gate_gradient(engine: Engine, tokens: Sequence[int], measured: int) -> Tensor:
    """Differentiate a text's negative log-likelihood by gates on the updates of the layers."""
    model, layers = engine.loaded.model, engine.loaded.layers
    engine.put_back()
    start = max(measured, 1)
    with torch.inference_mode(False), torch.enable_grad(), ExitStack() as stack:
        gates = torch.ones(len(layers), device=engine.loaded.device, requires_grad=True)
        for gate, layer in zip(gates, layers, strict=True):
            gated = partial(_gated, layer, layer.forward, gate)
            stack.enter_context(replaced_forward(layer, gated))
        ids = torch.tensor([tokens], device=engine.loaded.device)
        logits = logits_of(model, ids)[0, start - 1 : len(tokens) - 1]
        wanted = ids[0, start:, None].to(logits.device)
        loss = -logits.float().log_softmax(-1).gather(1, wanted).sum()
        try:
            (gradient,) = torch.autograd.grad(loss, gates)
        except RuntimeError as error:
            raise RefusalError(f"it cannot be differentiated: {error}") from None
    return gradient.cpu().double()


def _gated(
    layer: nn.Module, forward: Callable[..., Any], gate: Tensor, *args: Any, **kwargs: Any
) -> Any:
    """Multiply a layer's update by a gate of 1: same values, and a derivative by the gate."""
    before, output = call_protected(layer, forward, args, kwargs)
    after = first_of(output)
    update = (after - before.to(after.device)).detach()
    return with_first(output, after + (gate.to(after) - 1) * update)


@torch.inference_mode()
def span_similarity(engine: Engine, document: Document) -> dict[str, Tensor]:
    """Measure how far layers, and spans of layers, turn the residual stream in a document.

    Args:
        engine: The engine, whose model reads the document.
        document: The document: context and gold continuation, or the windows of a rolling text.

    Returns:
        Sums over the document's tokens, float64. `tokens` []: the number of tokens. Per layer
        [layers]: every proxy of its input and output that a strategy uses for pruning. Per span
        [layers, layers]: `angular_distance` between the input of the first layer and the output of
        the last one, which is the second index; 0 if it comes before the first.

    Raises:
        RefusalError: The model's layers do not pass on one state per token.
    """
    layers = len(engine.loaded.layers)
    observed = {proxy.name: proxy for proxy in OBSERVED if proxy.strategy}
    sums = {
        "tokens": torch.zeros((), dtype=torch.float64),
        **{name: torch.zeros(layers, dtype=torch.float64) for name in observed},
        "angular_distance": torch.zeros(layers, layers, dtype=torch.float64),
    }
    for tokens, measured in measured_texts(document, engine.max_length):
        with _watched(engine.loaded.layers) as seen:
            engine.run(tokens)
        if len(seen) != layers or any(len(state) != len(tokens) for pair in seen for state in pair):
            raise RefusalError("its layers do not run once each, on one state a token")
        states = [[state[measured:] for state in pair] for pair in seen]
        sums["tokens"] += len(tokens) - measured
        for first, (before, after) in enumerate(states):
            for name, proxy in observed.items():
                sums[name][first] += widened(proxy.of_token(before, after)).sum().cpu()
            for last in range(first, layers):
                angle = widened(angular_distance(before, states[last][1])).sum().cpu()
                sums["angular_distance"][first, last] += angle
    return sums


@contextmanager
def _watched(layers: nn.ModuleList) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Record the inputs and outputs of each layer, [tokens, width], until exit."""
    seen: list[tuple[Tensor, Tensor]] = []

    def call(layer: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        before, output = call_protected(layer, forward, args, kwargs)
        after = first_of(output)
        # Several parallel residual streams are one state.
        seen.append((before.flatten(0, 1).flatten(1), after.flatten(0, 1).flatten(1)))
        return output

    with all_of(replaced_forward(layer, partial(call, layer, layer.forward)) for layer in layers):
        yield seen


_ROUNDING = 0.05
"""Share of the experts' total output by which two orders of summation may differ."""


@torch.inference_mode()
def expert_load(
    engine: Engine, document: Document, parts: Collection[Change]
) -> dict[Change, tuple[float, ...]]:
    """Measure the load of some experts while the intact model reads a document.

    The document is read once more, and each token passes its experts a second time, one by one. So
    the norm of an expert's output is known before it is weighted.

    Args:
        engine: The engine, whose model reads the document.
        document: The document: context and gold continuation, or the windows of a rolling text.
        parts: The experts.

    Returns:
        For each expert, in the order of `OF_EXPERTS`, sums over the tokens that are routed to it:
        gate × ‖output‖, and the number of tokens. The first is NaN if the expert's output cannot be
        separated from those of others.
    """
    layers, anatomy = engine.loaded.layers, engine.anatomy
    experts = {layer: anatomy.at(Experts, layer) for layer in {part.layer for part in parts}}
    sums = {
        layer: torch.zeros(len(OF_EXPERTS), held_experts.count, dtype=torch.float64)
        for layer, held_experts in experts.items()
    }
    for tokens, measured in measured_texts(document, engine.max_length):
        with ExitStack() as stack:
            for layer, held_experts in experts.items():
                held = layers[layer].get_submodule(held_experts.held)
                noting = partial(_noting, held.forward, sums[layer], measured)
                stack.enter_context(replaced_forward(held, noting))
            engine.run(tokens)
    return {part: tuple(sums[part.layer][:, part.number].tolist()) for part in parts}


def _noting(
    forward: Callable[..., Tensor], sums: Tensor, measured: int, *args: Any, **kwargs: Any
) -> Tensor:
    """Call the module that holds a layer's experts, and add their loads on a text to the sums."""
    output = forward(*args, **kwargs)
    total = torch.zeros_like(output, dtype=torch.float32).flatten(0, -2)
    seen = []
    for numbers, gates, alone in single_outputs(forward, args, kwargs):
        total += gates[:, None].float() * alone.float()
        seen.append((numbers, widened(gates) * widened(alone.float().norm(dim=-1))))
    whole = output.float().flatten(0, -2)
    told_apart = (total - whole).norm() <= _ROUNDING * whole.norm()
    for numbers, figures in seen:
        # A number beyond the last belongs to no expert of this module, but to one elsewhere.
        is_counted = (numbers < sums.shape[1]).cpu() & (torch.arange(len(numbers)) >= measured)
        experts, values = numbers.cpu()[is_counted].long(), figures.cpu().double()[is_counted]
        sums[0].index_add_(0, experts, values if told_apart else torch.full_like(values, torch.nan))
        sums[1].index_add_(0, experts, torch.ones_like(values))
    return output
