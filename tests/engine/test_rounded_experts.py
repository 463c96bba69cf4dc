"""Experts' matrices in formats, against models whose experts are rounded one by one."""

from __future__ import annotations

import copy
import gc
from collections.abc import Iterator
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from tests.helpers.ablations import parse_ablations
from tests.helpers.engines import (
    assert_changed_scores,
    engine_of,
    gold_tokens,
    make_document,
    make_documents,
    naive_answers,
    rounded_rows,
    score_sharings,
)
from tests.helpers.mixtures import expert_outputs, tiny_mixture
from tests.helpers.registry import Variant, make_registered, tiny_settings
from tracker.engine.observers.rounding_error import rounding_errors, weight_errors
from tracker.engine.scoring.model import DEPTH_ONLY, FULL, PLAIN
from tracker.engine.selfcheck.check import check_sharing
from tracker.engine.selfcheck.reference import Reference
from tracker.models.layers import find_layers
from tracker.models.parts import linear_maps
from tracker.schema.changes import Ablation, Change

FAMILIES = (
    "mixtral", "qwen3_moe", "olmoe", "deepseek_v3", "gpt_oss", "granitemoe", "phimoe",
    "ernie4_5_moe", "minimax_m2",
)  # fmt: skip
INPUTS_FIRST = ("gpt_oss", "llama4_text")
"""Families whose experts map x to x @ weight."""
MATRICES = ("gate_up_proj", "down_proj")
ROUTED = 5
"""Experts of a layer, and so rows of its router, which stays as it is."""
HALF = {"int8": 127.5, "int4_row": 7.5}


def find_experts(model, layer):
    """Name the module of a layer that holds its experts."""
    modules = find_layers(model)[layer].named_modules()
    return next(path for path, module in modules if MATRICES[0] in module._parameters)


def round_by_hand(model, family, ablation):
    """Round by hand, in a copy: each expert's rows, and all linear maps but routers."""
    twin = copy.deepcopy(model)
    # What one expert has goes before what all have.
    for change in sorted(ablation.roundings, key=lambda change: change.path.count(".")):
        layer_number, map_path, format_name = change.layer, change.path, change.intervention
        old_layer, new_layer = find_layers(model)[layer_number], find_layers(twin)[layer_number]
        steps, module_path = HALF[format_name], map_path.replace("attention", "self_attn")
        if map_path == "mlp":
            module_path = find_experts(model, layer_number).partition(".")[0]

        def is_meant(*names, of=module_path):
            return any(f"{name}.".startswith(f"{of}." if of else "") for name in names)

        for path, module in old_layer.named_modules():
            if isinstance(module, nn.Linear) and is_meant(path) and len(module.weight) != ROUTED:
                new_layer.get_submodule(path).weight.data = rounded_rows(module.weight, steps)
            for name in MATRICES if MATRICES[0] in module._parameters else ():
                weight = getattr(module, name).detach()
                new_weight = getattr(new_layer.get_submodule(path), name).data
                for expert in range(len(weight)):
                    if is_meant(f"{path}.{name}", f"{path}.{expert}.{name}"):
                        matrices = (
                            tensor[expert].T if family in INPUTS_FIRST else tensor[expert]
                            for tensor in (weight, new_weight)
                        )
                        rows, target = matrices
                        target.copy_(rounded_rows(rows, steps))
    return twin


def make_ablations(model):
    """List what is rounded of the second and the last layer."""
    a, b = find_experts(model, 1), find_experts(model, 3)
    return parse_ablations(
        f"baseline int4_row:1.{a}.gate_up_proj int4_row:1.{a}.down_proj int8:1.{a}.down_proj "
        f"int4_row:3.{b}.3.down_proj int4_row:3.{b}.0.gate_up_proj+int8:3.{b}.4.gate_up_proj "
        f"int4_row:3 int4_row:1.mlp+int8:1.{a}.1.down_proj "
        f"int4_row:1.{a}.gate_up_proj+int4_row:3.{b}.down_proj layer:1+int4_row:3.{b}.down_proj"
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_experts_in_a_format_are_those_that_are_rounded_one_by_one(family):
    model = tiny_mixture(family)
    ablations = make_ablations(model)

    def change(ablation):
        twin = round_by_hand(model, family, ablation)
        removal = Ablation.from_changes(removed=ablation.removed())
        return engine_of(twin).ablate(removal).loaded.model

    ways = score_sharings(model, (FULL, DEPTH_ONLY, PLAIN), ablations)
    expected = assert_changed_scores(ways, ablations, change)
    moves = [
        max(
            abs(r[0] - w[0])
            for d in range(3)
            for r, w in zip(column[d], expected[0][d], strict=True)
        )
        for column in expected[1:]
    ]
    assert sum(move > 1e-4 for move in moves) >= len(moves) - 1  # no token may go to an expert


def test_experts_that_are_not_told_their_tokens_are_rounded_one_model_at_a_time():
    kinds = ["chunked_attention", "full_attention"]
    settings = tiny_settings("llama4_text") | {"num_hidden_layers": 2, "layer_types": kinds}
    model = Variant("llama4_text", "plain", settings).model()
    modules = [layer.feed_forward for layer in find_layers(model)]
    layer = next(n for n in range(2) if "experts" in dict(modules[n].named_children()))
    path = "feed_forward.experts"
    ablations = parse_ablations(
        f"baseline int4_row:{layer}.{path}.down_proj int4_row:{layer}.{path}.1.gate_up_proj"
    )
    documents = make_documents(3)
    result = check_sharing(engine_of(model), documents, ablations)
    assert not result.engine.sharing.depth
    assert "experts" in result.sharing_note
    scores = result.engine.score(documents, ablations)
    assert_changed_scores([scores], ablations, partial(round_by_hand, model, "llama4_text"))


def test_errors_of_experts_are_those_of_what_they_make():
    model, document = tiny_mixture("olmoe"), make_documents(1)[0]
    paths = ("gate_up_proj", "down_proj", "2.down_proj")
    maps = [Change.parse(f"int4_row:1.mlp.experts.{path}") for path in paths]
    error_sums = rounding_errors(engine_of(model), document, maps)
    errors = weight_errors(engine_of(model), maps)
    exact_outputs = expert_outputs(model, gold_tokens(document))[1]
    experts_module = find_layers(model)[1].mlp.experts
    for index, change in enumerate(maps):
        twin = round_by_hand(model, "olmoe", Ablation.from_changes(change))
        rounded_outputs = expert_outputs(twin, gold_tokens(document))[1]
        is_counted = [index != 2 or number == 2 for number, *_ in exact_outputs]
        pairs = [
            (b, a)
            for (*_, b), (*_, a), counted in zip(
                exact_outputs, rounded_outputs, is_counted, strict=True
            )
            if counted
        ]
        squared_error = sum(float((a - b).square().sum()) for b, a in pairs)
        assert float(error_sums["output_error"][index]) == pytest.approx(squared_error, rel=1e-3)
        size = sum(float(b.square().sum()) for b, _ in pairs)
        assert float(error_sums["output_size"][index]) == pytest.approx(size, rel=1e-4)
        angle = sum(1 - float(torch.cosine_similarity(a.double(), b.double(), 0)) for b, a in pairs)
        assert float(error_sums["output_angle"][index]) == pytest.approx(angle / 2, rel=1e-2)
        name = change.path.rpartition(".")[2]
        exact_weight, rounded_weight = (
            getattr(h, name) for h in (experts_module, find_layers(twin)[1].mlp.experts)
        )
        if index == 2:
            exact_weight, rounded_weight = exact_weight[2], rounded_weight[2]
        share = float((rounded_weight - exact_weight).square().sum() / exact_weight.square().sum())
        assert float(errors[index]) == pytest.approx(share, rel=1e-4)


def count_extra_bytes(model):
    """Count the bytes of weights that are alive beside those of a model."""
    gc.collect()
    layers = find_layers(model)
    own_pointers = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    shapes = {p.shape for layer in layers for p in layer.parameters() if p.ndim > 1}
    tensors = [p for p in gc.get_objects() if type(p) in (Tensor, nn.Parameter)]
    extra_sizes = {e.untyped_storage().data_ptr(): e.nbytes for e in tensors if e.shape in shapes}
    return sum(size for pointer, size in extra_sizes.items() if pointer not in own_pointers)


@pytest.fixture
def only_new_objects() -> Iterator[None]:
    """Exclude older objects, as of other tests, from counting."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.parametrize("family", ["llama", "mixtral"])
@pytest.mark.usefixtures("only_new_objects")
def test_a_copy_with_all_layers_in_formats_holds_the_weights_of_one_at_a_time(family, spy):
    """Was: the copy held all weights a second time."""
    model = make_registered(family)
    layers = find_layers(model)
    layer_bytes = max(sum(p.nbytes for p in layer.parameters() if p.ndim > 1) for layer in layers)
    ablation = Ablation.parse("int4_row:0+int4_row:1+int4_row:2+int4_row:3")
    format_calls = spy(linear_maps, "round_weight", lambda *_: True)
    texts = make_document(((5, 6, 7), (8, 9)), ((5, 6, 7), (10, 11))).requests
    document = make_document(((5, 6, 7), (8, 9)))
    expected = naive_answers(round_by_hand(model, family, ablation), document)[0][0]
    for memory, n_times in ((8, 2), (2**30, 1)):
        truth, extra_bytes = Reference(engine_of(model, memory=memory)), []
        copied = truth.ablate(ablation)
        for layer in copied.loaded.layers:
            layer.mlp.register_forward_pre_hook(
                lambda *_, held=extra_bytes: held.append(count_extra_bytes(model))
            )
        assert truth.answer(ablation, texts[0]).loglikelihood == pytest.approx(expected, abs=1e-3)
        n_first = len(format_calls)
        truth.answer(ablation, texts[1])
        assert len(format_calls) == n_times * n_first
        format_calls.clear()
        if n_times == 2:
            assert min(extra_bytes) > 0
            assert max(extra_bytes) <= layer_bytes
            assert count_extra_bytes(model) < layer_bytes / 2  # the last matrix
