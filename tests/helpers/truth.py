"""The independent truth: one plain forward pass a text, on a copy that nothing ran before.

Nothing here knows the engine. A layer is taken out in one of two ways: its forward returns its
input (`without`), or a model with a cut configuration is made and given the remaining weights
(`exported`), which is what a pruned checkpoint holds.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

import torch

from tracker.schema.changes import Ablation
from tracker.schema.documents import Document, Request

LayerRemover = Callable[[Any, Collection[int]], Any]
"""Makes a copy of a model that lacks some layers."""


def find_layer_list(model: Any) -> torch.nn.ModuleList:
    """Find the one list of modules that is as long as the configuration says."""
    n_layers = model.config.get_text_config().num_hidden_layers
    module_lists = [m for m in model.modules() if isinstance(m, torch.nn.ModuleList)]
    return next(modules for modules in module_lists if len(modules) == n_layers)


def skip_layer(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    """Replace a layer's output by its input, as a hook."""
    hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
    return type(output)((hidden, *output[1:])) if isinstance(output, tuple | list) else hidden


def without_layers(model: Any, removed: Collection[int]) -> Any:
    """Return a copy in which the layers return their input, whatever else they return."""
    ablated = copy.deepcopy(model)
    for index in removed:
        find_layer_list(ablated)[index].register_forward_hook(skip_layer, with_kwargs=True)
    return ablated


def pruned_copy(model: Any, removed: Collection[int]) -> Any:
    """Build the pruned model: lists with an entry for each layer are cut, layers renumbered."""
    config = copy.deepcopy(model.config)
    text = config.get_text_config()
    count = text.num_hidden_layers
    remaining = [index for index in range(count) if index not in removed]
    for name, value in list(vars(text).items()):
        if isinstance(value, list | tuple) and len(value) == count:
            setattr(text, name, [value[index] for index in remaining])
    text.num_hidden_layers = len(remaining)
    smaller = type(model)(config).eval().requires_grad_(False)
    layers = find_layer_list(model)
    name = next(name for name, module in model.named_modules() if module is layers)
    weights = {}
    for key, value in model.state_dict().items():
        if match := re.match(rf"{re.escape(name)}\.(\d+)\.(.*)", key):
            if int(match[1]) in removed:
                continue
            key = f"{name}.{remaining.index(int(match[1]))}.{match[2]}"
        weights[key] = value
    smaller.load_state_dict(weights)
    return smaller


def model_logits(model: Any, tokens: Sequence[int]) -> torch.Tensor:
    """Return a model's logits of each token of a text, from one pass, in double precision."""
    with torch.inference_mode():
        return model(torch.tensor([tokens]), use_cache=False).logits[0].double()


def plain_answers(
    model: Any, requests: Iterable[Request], max_length: int, remembers: bool = False
) -> list[tuple[float, bool]]:
    """Read what lm-eval reads, one pass a text: log-likelihoods, and whether each is greedy.

    Each text is read by a copy if the model remembers calls. Requests that differ in their last
    token alone have the model read the same: it does so once.
    """
    results = []
    logits_by_text: dict[tuple[int, ...], torch.Tensor] = {}
    for request in requests:
        tokens = (request.context + request.continuation)[-(max_length + 1) :][:-1]
        if tokens not in logits_by_text:
            reader = copy.deepcopy(model) if remembers else model
            logits_by_text[tokens] = model_logits(reader, tokens)
        logprobs = logits_by_text[tokens][-len(request.continuation) :].log_softmax(-1)
        targets = torch.tensor(request.continuation)
        total = float(logprobs.gather(1, targets[:, None]).sum())
        results.append((total, bool((logprobs.argmax(-1) == targets).all())))
    return results


def plain_loglikelihoods(
    model: Any,
    documents: Iterable[Document],
    removed: Sequence[Collection[int]],
    max_length: int,
    ablate: LayerRemover = without_layers,
    remembers: bool = True,
) -> list[list[list[float]]]:
    """For each document, each set of removed layers and each request, its log-likelihood."""
    ablated = [ablate(model, layers) for layers in removed]

    def read(model: Any, document: Document) -> list[float]:
        answers = plain_answers(model, document.requests, max_length, remembers)
        return [value for value, _ in answers]

    return [[read(model, document) for model in ablated] for document in documents]


def deeper_copy(model: Any, ablation: Ablation) -> Any:
    """Make a model of a configuration with more layers, and give it the weights by their names."""
    config = copy.deepcopy(model.config)
    order = [i for i in range(config.num_hidden_layers) if i not in ablation.removed()]
    for span in ablation.repetitions:
        position = order.index(span.stop - 1) + 1
        order[position:position] = [*span.layers] * (span.repeats - 1)
    config.num_hidden_layers = len(order)
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[i] for i in order]
    deeper = type(model)(config).float().eval().requires_grad_(False)
    weights = {}
    for name, value in model.state_dict().items():
        if ".layers." not in name:
            weights[name] = value
            continue
        prefix, _, rest = name.partition(".layers.")
        layer, _, path = rest.partition(".")
        for new, old in enumerate(order):
            if old == int(layer):
                weights[f"{prefix}.layers.{new}.{path}"] = value
    deeper.load_state_dict(weights)
    return deeper


def without_heads(model: Any, ablation: Ablation, path: str = "self_attn.o_proj") -> Any:
    """Zero the columns of heads in a copy's weights, by the configuration's numbers."""
    twin = copy.deepcopy(model)
    config = twin.config.get_text_config()
    for part in ablation.parts:
        projection = find_layer_list(twin)[part.layer].get_submodule(path)
        # Zamba 2's layers share it.
        projection.weight = torch.nn.Parameter(projection.weight.clone(), requires_grad=False)
        weight = projection.weight.T if path == "attn.c_proj" else projection.weight
        width = weight.shape[1] // config.num_attention_heads
        groups = getattr(config, "num_key_value_heads", config.num_attention_heads)
        group_size = config.num_attention_heads // groups if part.component == "kv_head" else 1
        first_column = part.number * group_size * width
        weight.data[:, first_column : first_column + group_size * width] = 0
    return twin


NEURON_MAPS = {
    **dict.fromkeys(("llama", "gemma3", "qwen2"), "mlp.down_proj mlp.up_proj mlp.gate_proj"),
    **{"phi3": "mlp.down_proj mlp.gate_up_proj", "gpt2": "mlp.c_proj mlp.c_fc"},
    **{"gpt_neox": "mlp.dense_4h_to_h mlp.dense_h_to_4h", "opt": "fc2 fc1"},
}
"""Of some families: the output projection of the MLP, and the maps before it."""


def neurons_of(model: Any, family: str, layer: int, *groups: int) -> list[int]:
    """List the neurons of groups by a loop over the neurons; four groups make an MLP."""
    module = find_layer_list(model)[layer]
    maps = [module.get_submodule(path) for path in NEURON_MAPS[family].split()]
    is_transposed = family == "gpt2"
    down, *others = (m.weight.double().T if is_transposed else m.weight.double() for m in maps)
    width = down.shape[1]

    def norm(neuron: int) -> float:
        rows = [row for weight in others for row in weight[neuron::width]]
        assert len(rows) == (1 if family in ("gpt2", "gpt_neox", "opt") else 2)
        vectors = [down[:, neuron], *rows]
        return math.prod(math.sqrt(sum(x * x for x in vector.tolist())) for vector in vectors)

    ranked = sorted(range(width), key=norm, reverse=True)
    size = width // 4
    return [neuron for group in groups for neuron in ranked[group * size : (group + 1) * size]]


def without_neurons(model: Any, ablation: Ablation, family: str) -> Any:
    """Zero the columns of neurons in a copy's weights."""
    twin = copy.deepcopy(model)
    for part in ablation.parts:
        path = NEURON_MAPS[family].split()[0]
        weight = find_layer_list(twin)[part.layer].get_submodule(path).weight
        neurons = neurons_of(model, family, part.layer, part.number)
        (weight.T if family == "gpt2" else weight)[:, neurons] = 0
    return twin
