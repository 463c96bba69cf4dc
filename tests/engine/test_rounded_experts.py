"""Experts' matrices in formats, against models whose experts are rounded one by one."""

from __future__ import annotations

import copy
import gc
from collections.abc import Iterator
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from tests.helpers.engines import (
    agree_with_changed,
    answers,
    asking,
    engine_of,
    gold_tokens,
    make_documents,
    rounded_rows,
    score_ways,
)
from tests.helpers.mixtures import mixture
from tests.helpers.registry import Variant, make_registered, tiny
from tracker.core.changes import INTACT, Ablation, Change
from tracker.engine.observers.rounding_error import rounding_errors, weight_errors
from tracker.engine.scoring.model import DEPTH_ONLY, FULL, PLAIN
from tracker.engine.selfcheck.check import check
from tracker.engine.selfcheck.reference import Reference
from tracker.models.layers import find_layers
from tracker.models.parts import linear_maps

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


def held_by(model, layer):
    """Name the module of a layer that holds its experts."""
    return next(
        path
        for path, m in find_layers(model)[layer].named_modules()
        if MATRICES[0] in m._parameters
    )


def changed(model, family, ablation):
    """Round by hand, in a copy: each expert's rows, and all linear maps but routers."""
    twin = copy.deepcopy(model)
    # What one expert has goes before what all have.
    for change in sorted(ablation.rounded, key=lambda change: change.path.count(".")):
        place, which, form = change.layer, change.path, change.intervention
        before, after = find_layers(model)[place], find_layers(twin)[place]
        half, of = HALF[form], which.replace("attention", "self_attn")
        if which == "mlp":
            of = held_by(model, place).partition(".")[0]

        def meant(*names, of=of):
            return any(f"{name}.".startswith(f"{of}." if of else "") for name in names)

        for path, module in before.named_modules():
            if isinstance(module, nn.Linear) and meant(path) and len(module.weight) != ROUTED:
                after.get_submodule(path).weight.data = rounded_rows(module.weight, half)
            for name in MATRICES if MATRICES[0] in module._parameters else ():
                weight = getattr(module, name).detach()
                other = getattr(after.get_submodule(path), name).data
                for number in range(len(weight)):
                    if meant(f"{path}.{name}", f"{path}.{number}.{name}"):
                        turned = (
                            each[number].T if family in INPUTS_FIRST else each[number]
                            for each in (weight, other)
                        )
                        rows, there = turned
                        there.copy_(rounded_rows(rows, half))
    return twin


def rounded(*each):
    texts = (f"{form}:{layer}.{'.'.join(path)}".rstrip(".") for form, layer, *path in each)
    return Ablation.of(*map(Change.parse, texts))


def asked_of(model):
    """List what is rounded of the second and the last layer."""
    held, last = held_by(model, 1), held_by(model, 3)
    return [
        INTACT,
        *(rounded(("int4_row", 1, f"{held}.{name}")) for name in MATRICES),
        rounded(("int8", 1, f"{held}.down_proj")),
        rounded(("int4_row", 3, f"{last}.3.down_proj")),
        rounded(("int4_row", 3, f"{last}.0.gate_up_proj"), ("int8", 3, f"{last}.4.gate_up_proj")),
        rounded(("int4_row", 3)),
        rounded(("int4_row", 1, "mlp"), ("int8", 1, f"{held}.1.down_proj")),
        rounded(("int4_row", 1, f"{held}.gate_up_proj"), ("int4_row", 3, f"{last}.down_proj")),
        Ablation.parse(f"layer:1+int4_row:3.{f'{last}.down_proj'}"),
    ]


@pytest.mark.parametrize("family", FAMILIES)
def test_experts_in_a_format_are_those_that_are_rounded_one_by_one(family):
    model = mixture(family)
    asked = asked_of(model)

    def change(ablation):
        twin = changed(model, family, ablation)
        return engine_of(twin).without(Ablation.of(removed=ablation.removed())).loaded.model

    ways = score_ways(model, (FULL, DEPTH_ONLY, PLAIN), asked)
    right = agree_with_changed(ways, asked, change)
    moved = [
        max(abs(r[0] - w[0]) for d in range(3) for r, w in zip(some[d], right[0][d], strict=True))
        for some in right[1:]
    ]
    assert sum(move > 1e-4 for move in moved) >= len(moved) - 1  # no token may go to an expert


def test_experts_that_are_not_told_their_tokens_are_rounded_one_model_at_a_time():
    kinds = ["chunked_attention", "full_attention"]
    settings = tiny("llama4_text") | {"num_hidden_layers": 2, "layer_types": kinds}
    model = Variant("llama4_text", "plain", settings).model()
    layer = next(
        n
        for n in range(2)
        if "experts" in dict(find_layers(model)[n].feed_forward.named_children())
    )
    held = "feed_forward.experts"
    asked = [
        INTACT,
        rounded(("int4_row", layer, f"{held}.down_proj")),
        rounded(("int4_row", layer, f"{held}.1.gate_up_proj")),
    ]
    documents = make_documents(3)
    found = check(engine_of(model), documents, asked)
    assert not found.engine.sharing.depth
    assert "experts" in found.lost
    scores = found.engine.score(documents, asked)
    agree_with_changed([scores], asked, partial(changed, model, "llama4_text"))


def outputs(model, family, document, layer):
    """Compute the output of each token's experts, [tokens × chosen, width], one by one."""
    held, found = find_layers(model)[layer].get_submodule(held_by(model, layer)), []

    def note(module, args, kwargs):
        state, choice, _ = (*args, *kwargs.values())
        for x, chosen in zip(state, choice.tolist(), strict=True):
            for number in chosen:
                into, out = module.gate_up_proj[number], module.down_proj[number]
                gate, up = (into @ x).chunk(2)
                found.append((number, out @ (module.act_fn(gate) * up)))

    with torch.inference_mode(), held.register_forward_pre_hook(note, with_kwargs=True):
        model(torch.tensor([gold_tokens(document)]), use_cache=False)
    return found


def test_errors_of_experts_are_those_of_what_they_make():
    model, document = mixture("olmoe"), make_documents(1)[0]
    paths = ("gate_up_proj", "down_proj", "2.down_proj")
    maps = [Change.parse(f"int4_row:1.mlp.experts.{path}") for path in paths]
    found = rounding_errors(engine_of(model), document, maps)
    errors = weight_errors(engine_of(model), maps)
    before = outputs(model, "olmoe", document, 1)
    held = find_layers(model)[1].mlp.experts
    for place, each in enumerate(maps):
        twin = changed(model, "olmoe", Ablation.of(each))
        after = outputs(twin, "olmoe", document, 1)
        some = [place != 2 or number == 2 for number, _ in before]
        pairs = [(b, a) for (_, b), (_, a), mine in zip(before, after, some, strict=True) if mine]
        apart = sum(float((a - b).square().sum()) for b, a in pairs)
        assert float(found["output_error"][place]) == pytest.approx(apart, rel=1e-3)
        size = sum(float(b.square().sum()) for b, _ in pairs)
        assert float(found["output_size"][place]) == pytest.approx(size, rel=1e-4)
        turned = sum(
            1 - float(torch.cosine_similarity(a.double(), b.double(), 0)) for b, a in pairs
        )
        assert float(found["output_angle"][place]) == pytest.approx(turned / 2, rel=1e-2)
        name = each.path.rpartition(".")[2]
        own, other = (getattr(h, name) for h in (held, find_layers(twin)[1].mlp.experts))
        own, other = (own, other) if place < 2 else (own[2], other[2])
        share = float((other - own).square().sum() / own.square().sum())
        assert float(errors[place]) == pytest.approx(share, rel=1e-4)


def beyond(model):
    """Count the bytes of weights that are alive beside those of a model."""
    gc.collect()
    layers = find_layers(model)
    own = {each.untyped_storage().data_ptr() for each in model.parameters()}
    shapes = {each.shape for layer in layers for each in layer.parameters() if each.ndim > 1}
    alive = [each for each in gc.get_objects() if type(each) in (Tensor, nn.Parameter)]
    other = {e.untyped_storage().data_ptr(): e.nbytes for e in alive if e.shape in shapes}
    return sum(size for place, size in other.items() if place not in own)


@pytest.fixture
def only_new_objects() -> Iterator[None]:
    """Exclude older objects, as of other tests, from counting."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.parametrize("family", ["llama", "mixtral"])
@pytest.mark.usefixtures("only_new_objects")
def test_what_all_layers_in_formats_are_held_against_has_one_layers_weights_at_a_time(
    family, monkeypatch
):
    """Was: the copy held all weights a second time."""
    model = make_registered(family)
    layers = find_layers(model)
    each = max(sum(p.nbytes for p in layer.parameters() if p.ndim > 1) for layer in layers)
    every = rounded(*(("int4_row", layer) for layer in range(4)))
    made = []
    in_format = linear_maps.in_format
    monkeypatch.setattr(
        linear_maps, "in_format", lambda *given, **more: made.append(1) or in_format(*given, **more)
    )
    texts = asking(((5, 6, 7), (8, 9)), ((5, 6, 7), (10, 11))).requests
    right = answers(changed(model, family, every), asking(((5, 6, 7), (8, 9))))[0][0]
    for memory, often in ((8, 2), (2**30, 1)):
        truth, held = Reference(engine_of(model, memory=memory)), []
        copied = truth.without(every)
        for layer in copied.loaded.layers:
            layer.mlp.register_forward_pre_hook(lambda *_, held=held: held.append(beyond(model)))
        assert truth.answer(every, texts[0]).loglikelihood == pytest.approx(right, abs=1e-3)
        first = len(made)
        truth.answer(every, texts[1])
        assert len(made) == often * first
        made.clear()
        if often == 2:
            assert min(held) > 0
            assert max(held) <= each
            assert beyond(model) < each / 2  # the last matrix
