"""Define the proxies: cheap estimates of the cost of removing a layer or an expert.

A proxy with an `observe` function is measured during the intact model's forward pass. `observe`
computes a value for each token from the residual stream before and after a layer. The relative
update is computed in float32. The cosine is computed in float64 if the device supports it.

The values are then averaged over the tokens of each document, without padding tokens. The value is
NaN if the hidden state of a token is all zeros.

The proxies of an expert are computed only from the tokens that the router sends to the expert.
`engine/observers/layer_proxies.py` measures these proxies.

Importing this module does not import torch.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any, Literal

from tracker.schema.errors import attempt
from tracker.schema.extensions import load_extensions

Tensor = Any
"""A tensor of torch."""
Array = Any
"""An array, a tensor or a number."""
log = logging.getLogger(__name__)


def cosine_similarity(before: Tensor, after: Tensor) -> Tensor:
    """Return the cosine similarity of each token's state before and after a layer.

    The cosine is computed as 1 - ‖u - v‖² / 2 from the unit vectors u and v, which is more exact
    than the dot product if the cosine is close to 1.

    Args:
        before: The layer's input, of shape `[..., tokens, hidden]`.
        after: The layer's output in the residual stream, before any final norm, of shape `[...,
            tokens, hidden]`.

    Returns:
        Cosines of shape `[..., tokens]`, float64; NaN where the input or the output is all zeros.

    Examples:
        >>> cosine_similarity(torch.tensor([[3.0, 4.0]]), torch.tensor([[4.0, 3.0]]))
        tensor([0.9600], dtype=torch.float64)
    """
    difference = _unit_vectors(to_double(before)).sub_(_unit_vectors(to_double(after)))
    return 1 - difference.square_().sum(-1) / 2


def angle(cosine: Tensor) -> Tensor:
    """Convert cosine similarities to angles, as a fraction of a half turn (180 degrees).

    Args:
        cosine: Cosine similarities of any shape, which are clamped to [-1, 1].

    Returns:
        arccos(cosine) / π, in the shape of `cosine`: 0 = same direction, 0.5 = orthogonal, 1 =
        opposite.

    Examples:
        >>> angle(torch.tensor([1.0, 0.0, -1.0]))
        tensor([0.0000, 0.5000, 1.0000])
    """
    return cosine.clamp(-1, 1).arccos() / math.pi


def to_double(states: Tensor) -> Tensor:
    """Convert a tensor to float64, or to float32 on devices without float64, such as Apple's."""
    try:
        return states.double()
    except (TypeError, RuntimeError) as error:
        if "float64" not in str(error) and "fp64" not in str(error):
            raise
        return states.float()


def angular_distance(before: Tensor, after: Tensor) -> Tensor:
    """Return the angle between the layer's input and output for each token.

    The angle is a fraction of a half turn (180 degrees).
    """
    return angle(cosine_similarity(before, after))


def relative_update(before: Tensor, after: Tensor) -> Tensor:
    """Return the relative change ‖after - before‖ / ‖before‖ of each token's state.

    Args:
        before: The layer's input, of shape `[..., tokens, hidden]`.
        after: The layer's output in the residual stream, of shape `[..., tokens, hidden]`.

    Returns:
        Ratios of shape `[..., tokens]`, float32; 0 means an unchanged state. NaN where the input is
        all zeros.

    Examples:
        >>> relative_update(torch.tensor([[3.0, 4.0]]), torch.tensor([[6.0, 8.0]]))
        tensor([1.])
    """
    wide_input, wide_output = before.float(), after.float()
    size = wide_input.norm(2, dim=-1)
    update = (wide_output - wide_input).norm(2, dim=-1) / size
    return update.where(size > 0, math.nan)


def _unit_vectors(states: Tensor) -> Tensor:
    """Scale the hidden state of each token to length 1; a state of all zeros becomes NaN."""
    length = states.norm(2, dim=-1, keepdim=True)
    return states / length.where(length > 0, math.nan)


@dataclass(frozen=True)
class Proxy:
    """A cheap estimate of the importance of a layer or expert; larger means more important.

    Attributes:
        name: The name of the proxy in code, and of its fields, columns and tracked metrics.
        label: The proxy's display name.
        unit: The unit of the proxy's values, or a short description of the unit.
        formula: The formula of the proxy, with a layer's input x_in and output x_out.
        source: The publication that proposed the proxy; empty if there is none.
        passes: Cost for all layers together, in forward passes per document; None if each layer
            needs a separate forward pass.
        observe: Function that computes a value per token `[..., tokens]` from a layer's input and
            output `[..., tokens, hidden]`; None for other proxies.
        per_token: Function that is applied to each token's value before averaging; None for no
            function.
        complement_of: Name of the averaged value v if the proxy is 1 − v, such as
            `cosine_similarity`; empty for other proxies.
        strategy: The search strategy that prunes by the proxy; empty if no strategy uses the proxy.
        component: The measured components: whole layers, all parts of a layer, or routed experts.
        over: The tokens over which the proxy is averaged. An empty text means all tokens, and
            `ANSWER_TOKENS` means the tokens of answers. `routed_share`, the proxy that counts an
            expert's tokens, means the tokens of the expert.
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
    component: Literal["layer", "part", "expert"] = "layer"
    over: str = ""

    @property
    def heading(self) -> str:
        """The display name of the proxy with its unit."""
        return f"{self.label} ({self.unit})"

    @property
    def headings(self) -> dict[str, str]:
        """A dict from the name of the proxy to its display name.

        For a proxy of the form 1 − v, the dict also contains v, such as the cosine similarity.
        """
        before = {self.complement_of: self.complement_of.replace("_", " ")}
        return (before if self.complement_of else {}) | {self.name: self.heading}

    @property
    def column(self) -> str:
        """Name of the stored column with a document's sum of the observed values over tokens."""
        return f"{self.complement_of or self.name}_sum"

    def from_observed(self, observed: Array) -> Array:
        """Convert a value v to the proxy: 1 − v if `complement_of` is set, else v."""
        return 1 - observed if self.complement_of else observed

    def token_figure(self, observed: Tensor) -> Tensor:
        """Apply `per_token` (e.g. arccos) to the values that `observe` returned for tokens."""
        return observed if self.per_token is None else self.per_token(observed)

    def observe_tokens(self, before: Tensor, after: Tensor) -> Tensor:
        """Compute the proxy of each token from a layer's input and output."""
        assert self.observe is not None
        return self.from_observed(self.token_figure(self.observe(before, after)))


ANSWER_TOKENS = "answer_tokens"
"""Name of the number of tokens over which a document's `kl_divergence` is summed."""
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
            "taylor",
            "first-order Taylor",
            "nats per token",
            formula="|sum over a document's tokens of gradient × change of the output| / tokens",
            source="Molchanov et al., arXiv 1906.10771",
            passes=3.0,
            component="part",
        ),
        Proxy(
            "kl_gradient",
            "gradient of KL",
            "nats per token",
            formula="gradient of KL(intact, all maps rounded) × (rounded − exact weight) / tokens",
            source="estimate_sensitivities of mlx-lm",
            passes=4.0,
            component="part",
        ),
        Proxy(
            "kl_divergence",
            "KL divergence at the answers",
            "nats per token",
            formula="mean over the tokens of right answers of KL(intact model ‖ changed model)",
            passes=None,
            component="part",
            over=ANSWER_TOKENS,
        ),
        Proxy(
            "expert_saliency",
            "expert saliency",
            "gate × norm",
            formula="mean of gate g(x) × output norm ‖f(x)‖ over the tokens routed to the expert",
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
"""Pattern of names that other columns of runs have, so that a proxy must not have them."""


def _check_proxy(extension: object) -> Proxy:
    """Check a proxy of another package, and return a copy that catches its exceptions.

    TypeError or ValueError is raised if the proxy is invalid.
    """
    if not isinstance(extension, Proxy):
        raise TypeError(f"expected a tracker.schema.proxies.Proxy, not {extension!r}")
    if _RESERVED_NAMES.fullmatch(extension.name):
        raise ValueError(f"the name {extension.name!r} is taken")
    if not callable(extension.observe) or extension.component != "layer":
        raise ValueError("a proxy needs component 'layer' and a function observe(input, output)")
    if extension.complement_of or extension.strategy or extension.per_token or extension.over:
        raise ValueError(
            "an added proxy must leave out 'complement_of', 'strategy', 'per_token' and 'over'"
        )
    return replace(extension, observe=_guard(extension.name, extension.observe))


def _guard(
    name: str, observe: Callable[[Tensor, Tensor], Tensor]
) -> Callable[[Tensor, Tensor], Tensor]:
    """Wrap the `observe` function of another package so that its exceptions are caught.

    After an exception, the wrapped function returns NaN and logs a warning.
    """

    def guarded(before: Tensor, after: Tensor) -> Tensor:
        undefined = before[..., 0].float() * math.nan
        observed = attempt(partial(observe, before, after))
        shape = getattr(observed, "shape", ())
        if isinstance(observed, Exception):
            problem = f"{type(observed).__name__}: {observed}"
        elif shape != undefined.shape:
            expected = tuple(undefined.shape)
            problem = f"ValueError: `observe` returned the shape {tuple(shape)}, not {expected}"
        else:
            return to_double(observed)
        _warn(f"the proxy {name!r} is undefined: {problem}")
        return undefined

    return guarded


@cache
def _warn(message: str) -> None:
    """Log the first line of a message as a warning, only once for each message."""
    log.warning("%s", message.splitlines()[0])


_ADDED_PROXIES = load_extensions("proxies", _check_proxy, _OWN_PROXIES)
PROXIES: Mapping[str, Proxy] = {**_OWN_PROXIES, **_ADDED_PROXIES}
"""Name → proxy: tracker's own proxies, and the entry points of other packages."""
LAYER_PROXIES = {name: proxy for name, proxy in PROXIES.items() if proxy.component == "layer"}
"""The proxies of whole layers."""
PART_PROXIES = tuple(proxy for proxy in PROXIES.values() if proxy.component != "layer")
"""The proxies of changes, such as the removal of a part of a layer. `kl_divergence` is measured on
the changed model, for all changes. All other proxies are measured on the intact model."""
EXPERT_PROXIES = tuple(proxy for proxy in PART_PROXIES if proxy.component == "expert")
"""The proxies of routed experts."""
KL_COLUMN = PROXIES["kl_divergence"].column
"""Column with the KL divergence of a document, summed over the tokens of its answer."""
KL_KIND = "kl-divergence"
"""First part of the names under which KL divergences are stored; a hash of the ablations
follows."""
OBSERVED = tuple(proxy for proxy in PROXIES.values() if proxy.observe)
"""The proxies of a layer's input and output, measured on the intact model of every cell."""


def observed(before: Tensor, after: Tensor) -> list[Tensor]:
    """Compute the values per token of all `OBSERVED` proxies from a layer's input and output."""
    observers = dict.fromkeys(proxy.observe for proxy in OBSERVED if proxy.observe)
    figures: dict[Any, Tensor] = {observe: observe(before, after) for observe in observers}
    return [proxy.token_figure(figures[proxy.observe]) for proxy in OBSERVED]


PROXY_FIGURES = tuple(name for proxy in (*OBSERVED, *PART_PROXIES) for name in proxy.headings)
"""Names of the figures that a run shows for observed proxies and for proxies of parts."""


def proxy_cost(proxy: str, layers: int, is_shared: bool) -> float:
    """Return the cost of computing a proxy for all layers, in forward passes per document.

    The accuracy drop costs one forward pass for each removed layer, or about half if `is_shared` is
    true. The output head is not counted.

    Args:
        proxy: The name of one of `PROXIES`; any other name means the accuracy drop.
        layers: The number of layers.
        is_shared: True if the layers below the removed layer are computed once for all ablations.

    Returns:
        The cost in forward passes of the whole model.
    """
    n_passes = PROXIES[proxy].passes if proxy in PROXIES else None
    if n_passes is not None:
        return n_passes
    return (layers + 1) / 2 if is_shared else float(layers)
