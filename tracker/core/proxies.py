"""Define the proxies: cheap estimates of the cost of removing a layer or an expert.

A proxy with `observe` is measured during the intact model's forward pass: from the residual stream
before and after a layer, it computes a figure per token. The model's dtype does not matter: the
update is in float32, the cosine in float64 (float32 on devices without float64, such as Apple's). A
layer that turns a token by 1e-4 has a cosine of 1 - 5e-9, which float32 rounds to 1.

The caller selects the averaged tokens: each document's context plus gold continuation, once, never
padding. A token whose hidden state is all zeros has no direction, so its figures are NaN, and so is
every mean that includes it. torch's own cosine would be 0, a right angle.

Those of experts are sums over the tokens that a router sends to them, which
`engine/observers/layer_proxies.py` observes of the experts that are taken out.

The functions call nothing but methods of the tensors that they are given, so the list is read
without torch.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any, Literal

from tracker.core.errors import attempt
from tracker.core.extensions import load_extensions

Tensor = Any
"""A tensor of torch."""
Array = Any
"""An array, a tensor or a number."""
log = logging.getLogger(__name__)


def cosine_similarity(before: Tensor, after: Tensor) -> Tensor:
    """Return the cosine of the angle between each token's layer input and output.

    It is taken from the distance between both directions, 1 - ‖u - v‖² / 2: the sum of products
    u · v would lose 1 - cosine to rounding where a layer hardly turns its input. Two inputs of
    float32 give 1 - cosine to about 1e-7 of itself, 1e-16 apart. Rounding may carry it below -1 by
    1e-15.

    Args:
        before: `[..., tokens, hidden]`, the layer's input.
        after: `[..., tokens, hidden]`, the layer's output in the residual stream, before any final
            norm.

    Returns:
        `[..., tokens]`, float64; NaN where either is all zeros.

    Examples:
        >>> cosine_similarity(torch.tensor([[3.0, 4.0]]), torch.tensor([[4.0, 3.0]]))
        tensor([0.9600], dtype=torch.float64)
    """
    difference = _unit_vectors(to_double(before)).sub_(_unit_vectors(to_double(after)))
    return 1 - difference.square_().sum(-1) / 2


def angle(cosine: Tensor) -> Tensor:
    """Return the angle between layer input and output as a fraction of a half turn.

    arccos is steep at 1: a cosine that rounding leaves 1e-16 short of 1 reads as 5e-9.

    Args:
        cosine: Cosine similarities of any shape; clamped to [-1, 1].

    Returns:
        arccos(cosine) / π, of the same shape: 0 = same direction, 0.5 = orthogonal, 1 = opposite.

    Examples:
        >>> angle(torch.tensor([1.0, 0.0, -1.0]))
        tensor([0.0000, 0.5000, 1.0000])
    """
    return cosine.clamp(-1, 1).arccos() / math.pi


def to_double(states: Tensor) -> Tensor:
    """Convert to float64, or to float32 on a device without it, such as Apple's."""
    try:
        return states.double()
    except (TypeError, RuntimeError) as error:
        if "float64" not in str(error) and "fp64" not in str(error):
            raise
        return states.float()


def angular_distance(before: Tensor, after: Tensor) -> Tensor:
    """Return the angle between each token's layer input and output, as `angle` of their cosine."""
    return angle(cosine_similarity(before, after))


def relative_update(before: Tensor, after: Tensor) -> Tensor:
    """Return the layer's update relative to the layer's input: ‖after - before‖ / ‖before‖.

    Unlike the cosine, it includes a change of magnitude along the input's own direction.

    Args:
        before: `[..., tokens, hidden]`, the layer's input.
        after: `[..., tokens, hidden]`, the layer's output in the residual stream.

    Returns:
        `[..., tokens]`, float32; 0 = unchanged; NaN where the input is all zeros.

    Examples:
        >>> relative_update(torch.tensor([[3.0, 4.0]]), torch.tensor([[6.0, 8.0]]))
        tensor([1.])
    """
    wide_input, wide_output = before.float(), after.float()
    size = wide_input.norm(2, dim=-1)
    update = (wide_output - wide_input).norm(2, dim=-1) / size
    return update.where(size > 0, math.nan)


def _unit_vectors(states: Tensor) -> Tensor:
    """Scale each token's state to length 1; a state of zeros becomes NaN."""
    length = states.norm(2, dim=-1, keepdim=True)
    return states / length.where(length > 0, math.nan)


@dataclass(frozen=True)
class Proxy:
    """A cheap estimate of the importance of a layer or an expert; larger = more important.

    Attributes:
        name: The proxy's name in code: of the field, the column, the metric.
        label: The proxy's name for display.
        unit: The unit of its values, or a short description of the unit.
        formula: The formula in a layer's input x_in and output x_out.
        source: The publication of the proxy; empty if there is none.
        passes: Forward passes through the whole model per document, for all layers together; None
            if the proxy removes every layer in turn, as the drop itself does.
        observe: Function of a layer's input and output `[..., tokens, hidden]` that returns each
            token's figure `[..., tokens]`; None if the proxy needs more than these.
        per_token: Function applied to each token's figure before averaging; None for no function.
        complement_of: The name of the figure of `observe`, where the proxy is 1 minus its mean.
        strategy: The search strategy that prunes by the proxy; empty if there is none.
        component: The part of the model that the proxy describes.
        over: For an expert's proxy, the name of the proxy that counts the tokens of its mean; empty
            for all tokens.
    """

    name: str
    label: str
    unit: str
    formula: str = ""
    source: str = ""
    passes: float | None = 1.0
    observe: Callable[[Tensor, Tensor], Tensor] | None = None
    per_token: Callable[[Tensor], Tensor] | None = None
    complement_of: str = ""
    strategy: str = ""
    component: Literal["layer", "expert"] = "layer"
    over: str = ""

    @property
    def heading(self) -> str:
        """The label with the unit."""
        return f"{self.label} ({self.unit})"

    @property
    def headings(self) -> dict[str, str]:
        """Name → heading, of the figure whose complement the proxy is, if any, and of the proxy."""
        before = {self.complement_of: self.complement_of.replace("_", " ")}
        return (before if self.complement_of else {}) | {self.name: self.heading}

    @property
    def column(self) -> str:
        """The ledger's column of observed figures, summed over a document's tokens."""
        return f"{self.complement_of or self.name}_sum"

    def from_observed(self, observed: Array) -> Array:
        """Compute the proxy from observed figures or their means."""
        return 1 - observed if self.complement_of else observed

    def token_figure(self, observed: Tensor) -> Tensor:
        """Compute each token's figure for averaging from the result of `observe`."""
        return observed if self.per_token is None else self.per_token(observed)

    def observe_tokens(self, before: Tensor, after: Tensor) -> Tensor:
        """Compute the proxy of each token from a layer's input and output."""
        assert self.observe is not None
        return self.from_observed(self.token_figure(self.observe(before, after)))


_OWN_PROXIES: Mapping[str, Proxy] = {
    proxy.name: proxy
    for proxy in (
        Proxy(
            "cosine_score",
            "cosine score",
            "1 − cos",
            formula="1 − mean over tokens of cos(x_in, x_out)",
            source="Block Influence of ShortGPT, arXiv 2403.03853",
            observe=cosine_similarity,
            complement_of="cosine_similarity",
            strategy="cosine",
        ),
        Proxy(
            "angular_distance",
            "angular distance",
            "÷ π",
            formula="mean over tokens of arccos(cos(x_in, x_out)) / π",
            source="Gromov et al., arXiv 2403.17887",
            observe=cosine_similarity,
            per_token=angle,
        ),
        Proxy(
            "relative_update",
            "relative update",
            "ratio of norms",
            formula="mean over tokens of ‖x_out − x_in‖ / ‖x_in‖",
            observe=relative_update,
            strategy="relative_update",
        ),
        Proxy(
            "gate_gradient",
            "first-order Taylor",
            "nats",
            source="Molchanov et al., arXiv 1906.10771",
            # A forward and a backward pass: the latter multiplies twice as much.
            passes=3.0,
            strategy="taylor",
        ),
        Proxy("lens_changes", "logit-lens change", "share of tokens", source="nostalgebraist 2020"),
        Proxy(
            "loss_increase", "log-perplexity increase", "nats", passes=None, strategy="perplexity"
        ),
        Proxy("kl", "KL divergence", "nats", passes=None),
        Proxy("js", "Jensen–Shannon divergence", "nats", passes=None),
        Proxy("gold_logprob_drop", "gold log-prob drop", "nats", passes=None),
        Proxy(
            "expert_saliency",
            "expert saliency",
            "gate × norm",
            formula="mean of g(x) ‖f(x)‖ over the tokens routed to the expert",
            source="REAP, arXiv 2510.13999",
            # Each token passes its experts twice.
            passes=2.0,
            component="expert",
            over="routed_share",
        ),
        Proxy(
            "routed_share",
            "routed share",
            "share of tokens",
            formula="tokens routed to the expert / all tokens",
            passes=1.0,
            component="expert",
        ),
    )
}
_RESERVED_NAMES = re.compile(
    r"layer|component|span|intervention|number|repeats|members|drawn|map|part|change|ablation|n"
    r"|key|model|benchmark|num_fewshot|removed|sample_seed|reasons|until|interval|figure|options"
    r"|gold|drop|drop_.*|accuracy.*|baseline.*|chance.*|metrics?.*|mcnemar_p|rounded|gold_.*"
    r"|options_.*|cosine_similarity|model_.*|proxy.*|copy|json|dict|schema.*|construct|validate"
)
"""Names that a proxy must not have, since other figures and columns of runs have them."""


def _check_proxy(extension: object) -> Proxy:
    """Check a proxy of another package; raise TypeError or ValueError with the reason."""
    if not isinstance(extension, Proxy):
        raise TypeError(f"{extension!r} is not a tracker.core.proxies.Proxy")
    if _RESERVED_NAMES.fullmatch(extension.name):
        raise ValueError(f"the name {extension.name!r} is taken")
    if not callable(extension.observe) or extension.component != "layer":
        raise ValueError("the proxy has no function `observe` of a layer's input and output")
    if extension.complement_of or extension.strategy or extension.per_token or extension.over:
        raise ValueError(
            "complement_of, strategy, per_token and over are only for tracker's own proxies"
        )
    return replace(extension, observe=_guard(extension.name, extension.observe))


def _guard(
    name: str, observe: Callable[[Tensor, Tensor], Tensor]
) -> Callable[[Tensor, Tensor], Tensor]:
    """Wrap another package's function so that its figures are undefined if it fails."""

    def guarded(before: Tensor, after: Tensor) -> Tensor:
        undefined = before[..., 0].float() * math.nan
        observed = attempt(partial(observe, before, after))
        shape = getattr(observed, "shape", ())
        if isinstance(observed, Exception):
            problem = f"{type(observed).__name__}: {observed}"
        elif shape != undefined.shape:
            shapes = f"{tuple(shape)}, and not {tuple(undefined.shape)}"
            problem = f"ValueError: its figures have the shape {shapes}"
        else:
            return to_double(observed)
        _warn(f"the proxy {name!r} is undefined: {problem}")
        return undefined

    return guarded


@cache
def _warn(message: str) -> None:
    """Log a warning of one line, once for each text."""
    log.warning("%s", message.splitlines()[0])


_ADDED_PROXIES = load_extensions("proxies", _check_proxy, _OWN_PROXIES)
PROXIES: Mapping[str, Proxy] = {**_OWN_PROXIES, **_ADDED_PROXIES}
"""Name → proxy: tracker's own proxies, and the entry points of other packages."""
LAYER_PROXIES = {name: proxy for name, proxy in PROXIES.items() if proxy.component == "layer"}
"""The proxies of whole layers."""
EXPERT_PROXIES = tuple(proxy for proxy in PROXIES.values() if proxy.component == "expert")
"""The proxies of routed experts, measured on the intact model for runs that remove an expert."""
OBSERVED = tuple(proxy for proxy in PROXIES.values() if proxy.observe)
"""The proxies of a layer's input and output, measured on the intact model of every cell."""


def observed(before: Tensor, after: Tensor) -> list[Tensor]:
    """Compute each token's figure of all `OBSERVED` proxies from a layer's input and output.

    Figures that several proxies share, such as the cosine in float64, are computed once.
    """
    observers = dict.fromkeys(proxy.observe for proxy in OBSERVED if proxy.observe)
    figures: dict[Any, Tensor] = {observe: observe(before, after) for observe in observers}
    return [proxy.token_figure(figures[proxy.observe]) for proxy in OBSERVED]


PROXY_FIGURES = tuple(name for proxy in (*OBSERVED, *EXPERT_PROXIES) for name in proxy.headings)
"""Names of the figures that a run shows for observed proxies and for proxies of experts."""


def proxy_cost(proxy: str, layers: int, is_shared: bool) -> float:
    """Return the cost of a proxy for all layers, in forward passes of the model per document.

    A model without one of L layers passes L - 1, so intact and ablated ones together pass L²: L
    passes one by one, and (L + 1) / 2 where each ablation shares the layers below with the intact
    model (`StreamPlan.layer_passes`). The head is not counted.

    Args:
        proxy: One of `PROXIES`; any other name means the drop.
        layers: The number of layers L.
        is_shared: True if layers below a removed one are computed once.

    Returns:
        The cost.
    """
    n_passes = PROXIES[proxy].passes if proxy in PROXIES else None
    if n_passes is not None:
        return n_passes
    return (layers + 1) / 2 if is_shared else float(layers)
