"""The independent truth: one plain forward pass a text, on a copy that nothing ran before.

Nothing here knows the engine. A layer is taken out in one of two ways: its forward returns its
input (`without`), or a model with a cut configuration is made and given the remaining weights
(`exported`), which is what a pruned checkpoint holds.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

import torch

from tests.helpers.families import FAMILIES
from tracker.core.changes import Ablation
from tracker.core.documents import Document, Request

Without = Callable[[Any, Collection[int]], Any]
"""Makes a copy of a model that lacks some layers."""


def layers_of(model: Any) -> torch.nn.ModuleList:
    """Find the one list of modules that is as long as the configuration says."""
    wanted = model.config.get_text_config().num_hidden_layers
    lists = [m for m in model.modules() if isinstance(m, torch.nn.ModuleList)]
    return next(modules for modules in lists if len(modules) == wanted)


def skip(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    """Replace a layer's output by its input, as a hook."""
    hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
    return type(output)((hidden, *output[1:])) if isinstance(output, tuple | list) else hidden


def without(model: Any, removed: Collection[int]) -> Any:
    """Return a copy in which the layers return their input, whatever else they return."""
    ablated = copy.deepcopy(model)
    for index in removed:
        layers_of(ablated)[index].register_forward_hook(skip, with_kwargs=True)
    return ablated


def exported(model: Any, removed: Collection[int]) -> Any:
    """Build the pruned model: lists with an entry for each layer are cut, layers renumbered."""
    config = copy.deepcopy(model.config)
    text = config.get_text_config()
    count = text.num_hidden_layers
    kept = [index for index in range(count) if index not in removed]
    for name, value in list(vars(text).items()):
        if isinstance(value, list | tuple) and len(value) == count:
            setattr(text, name, [value[index] for index in kept])
    text.num_hidden_layers = len(kept)
    smaller = type(model)(config).eval().requires_grad_(False)
    layers = layers_of(model)
    name = next(name for name, module in model.named_modules() if module is layers)
    weights = {}
    for key, value in model.state_dict().items():
        if found := re.match(rf"{re.escape(name)}\.(\d+)\.(.*)", key):
            if int(found[1]) in removed:
                continue
            key = f"{name}.{kept.index(int(found[1]))}.{found[2]}"
        weights[key] = value
    smaller.load_state_dict(weights)
    return smaller


def logits(model: Any, tokens: Sequence[int]) -> torch.Tensor:
    """Return a model's logits of each token of a text, from one pass, in double precision."""
    with torch.inference_mode():
        return model(torch.tensor([tokens]), use_cache=False).logits[0].double()


def answers(
    model: Any, requests: Iterable[Request], max_length: int, remembers: bool = False
) -> list[tuple[float, bool]]:
    """Read what lm-eval reads, one pass a text: log-likelihoods, and whether each is greedy.

    Each text is read by a copy if the model remembers calls. Requests that differ in their last
    token alone have the model read the same: it does so once.
    """
    found = []
    said: dict[tuple[int, ...], torch.Tensor] = {}
    for request in requests:
        text = (request.context + request.continuation)[-(max_length + 1) :][:-1]
        if text not in said:
            said[text] = logits(copy.deepcopy(model) if remembers else model, text)
        logprobs = said[text][-len(request.continuation) :].log_softmax(-1)
        wanted = torch.tensor(request.continuation)
        total = float(logprobs.gather(1, wanted[:, None]).sum())
        found.append((total, bool((logprobs.argmax(-1) == wanted).all())))
    return found


def truths(
    model: Any,
    documents: Iterable[Document],
    removed: Sequence[Collection[int]],
    max_length: int,
    ablate: Without = without,
    remembers: bool = True,
) -> list[list[list[float]]]:
    """For each document, each set of removed layers and each request, its log-likelihood."""
    ablated = [ablate(model, layers) for layers in removed]
    return [
        [[value for value, _ in answers(one, d.requests, max_length, remembers)] for one in ablated]
        for d in documents
    ]


def deeper(family, model, ablation):
    """Make a model of a configuration with more layers, and give it the weights by their names."""
    order = [i for i in range(4) if i not in ablation.removed()]
    for stretch in ablation.repeated:
        at = order.index(stretch.stop - 1) + 1
        order[at:at] = [*stretch.layers] * (stretch.repeats - 1)
    config = FAMILIES[family].config()
    config.num_hidden_layers = len(order)
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[i] for i in order]
    made = type(model)(config).float().eval().requires_grad_(False)
    weights = {}
    for name, value in model.state_dict().items():
        if ".layers." not in name:
            weights[name] = value
            continue
        before, _, rest = name.partition(".layers.")
        number, _, path = rest.partition(".")
        for place, index in enumerate(order):
            if index == int(number):
                weights[f"{before}.layers.{place}.{path}"] = value
    made.load_state_dict(weights)
    return made


def without_heads(model: Any, ablation: Ablation, path: str = "self_attn.o_proj") -> Any:
    """Zero the columns of heads in a copy's weights, by the configuration's numbers."""
    twin = copy.deepcopy(model)
    config = twin.config.get_text_config()
    for part in ablation.parts:
        projection = layers_of(twin)[part.layer].get_submodule(path)
        # Zamba 2's layers share it.
        projection.weight = torch.nn.Parameter(projection.weight.clone(), requires_grad=False)
        weight = projection.weight.T if path == "attn.c_proj" else projection.weight
        width = weight.shape[1] // config.num_attention_heads
        groups = getattr(config, "num_key_value_heads", config.num_attention_heads)
        each = config.num_attention_heads // groups if part.component == "kv_head" else 1
        first = part.number * each * width
        weight.data[:, first : first + each * width] = 0
    return twin
