"""Embeddings and heads in formats, shared every way, against models changed by hand."""

from __future__ import annotations

import copy

import pytest
import torch
from scipy.stats import entropy
from torch import nn

from tests.helpers.engines import (
    PROMPT,
    agree_with_changed,
    engine_of,
    generate,
    gold_tokens,
    make_documents,
    rounded_rows,
    score_ways,
)
from tests.helpers.families import tiny_model
from tests.helpers.truth import logits
from tracker.analysis.stopping import passes
from tracker.core.changes import INTACT, Ablation, Change
from tracker.core.errors import ExperimentError
from tracker.engine.forward.streams import plan_streams
from tracker.engine.observers.layer_proxies import divergences
from tracker.engine.observers.rounding_error import rounding_errors, weight_errors
from tracker.engine.plan import cost
from tracker.engine.scoring import sweep
from tracker.engine.scoring.generation import decoding
from tracker.engine.scoring.model import DEPTH_ONLY, FULL, PLAIN
from tracker.engine.scoring.score import cache_argument
from tracker.engine.selfcheck.miniature_check import check_miniature
from tracker.models.parts.anatomy import LayerAnatomy
from tracker.models.parts.linear_maps import find_embeddings

HALF = {"int8": 127.5, "int4_row": 7.5}
"""Steps from 0 to the largest weight of a row."""
EMBEDDING = [Change.parse(f"{form}:embedding") for form in HALF]
HEAD = [Change.parse(f"{form}:lm_head") for form in HALF]
TIED = ["gpt2", "gemma3", "opt"]
"""Learned positions; a factor behind the embedding."""
UNTIED = ["llama", "granite", "mixtral"]
"""And, of granite, factors of embeddings and logits."""


def _ablations(tied: bool) -> list[Ablation]:
    first, second = EMBEDDING
    found = [
        *(Ablation.of(each) for each in EMBEDDING),
        Ablation.of(second, removed=(2,)),
        Ablation.of(Change("mlp", (0,)), second),
        Ablation.parse("layer:1"),
        Ablation.of(first, removed=(0,)),
        Ablation.of(second, Change.parse("repeat:1")),
    ]
    if not tied:
        found += [
            *(Ablation.of(each) for each in HEAD),
            *(Ablation.of(one, other) for one in EMBEDDING for other in HEAD),
            Ablation.of(HEAD[1], removed=(2,)),
            Ablation.of(Change("attention", (3,)), HEAD[1]),
        ]
    return [INTACT, *found]


def _model(family: str):
    """Build a tiny model whose embeddings are tied or not, as in its family's files."""
    model = tiny_model(family)
    if (family in TIED) != find_embeddings(model).is_tied:
        head = model.get_output_embeddings()
        head.weight = nn.Parameter(
            model.get_input_embeddings().weight.data
            if family in TIED
            else head.weight.data.flip(0).clone(),
            requires_grad=False,
        )
    return model


def _changed(model, ablation):
    """Round by hand, row for row, and let layers hand on their input."""
    twin = copy.deepcopy(model)
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    for change in ablation.rounded:
        form, which = change.intervention, change.path
        modules = [twin.get_input_embeddings(), twin.get_output_embeddings()]
        weight = rounded_rows(modules[which == "lm_head"].weight, HALF[form])
        for module in modules if tied else [modules[which == "lm_head"]]:
            module.weight = nn.Parameter(weight, requires_grad=False)
    return twin


def _agree(model, ablations, *ways):
    """Compare with changed models; what else than rounding they do has its truths elsewhere."""
    engine = engine_of(model)

    def change(ablation):
        rest = Ablation(ablation.changes - {*ablation.rounded})
        return _changed(engine.without(rest).loaded.model, ablation)

    agree_with_changed(ways, ablations, change)


@pytest.mark.parametrize("family", [*TIED, *UNTIED])
def test_every_stream_is_the_changed_model_however_much_is_shared(family):
    model, ablations = _model(family), _ablations(family in TIED)
    own = {name: each.clone() for name, each in model.state_dict().items()}
    ways = score_ways(model, (FULL, DEPTH_ONLY, PLAIN), ablations)
    for name, each in model.state_dict().items():
        torch.testing.assert_close(each, own[name], rtol=0, atol=0)
    assert find_embeddings(model).is_tied == (family in TIED)
    _agree(model, ablations, *ways)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
def test_a_kept_beginning_serves_them(family, spy):
    model = _model(family)
    ablations = [each for each in _ablations(family in TIED) if not each.repeated]
    read = spy(sweep, "read_prefix", lambda parts, plan, tokens: plan.streams)
    engine = engine_of(model, FULL, row_tokens=40)
    _agree(model, ablations, engine.score(make_documents(3, shared=60), ablations))
    assert len(read) == 1


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
@pytest.mark.parametrize("blocks", [True, False], ids=["blocks", "whole"])
def test_a_vocabulary_in_blocks_has_the_head_that_is_asked_for(family, blocks, monkeypatch):
    monkeypatch.setattr("tracker.engine.scoring.head.BLOCK", 40 if blocks else 1000)
    model, ablations = _model(family), _ablations(family in TIED)
    engine = engine_of(model)
    assert engine.head.in_blocks == blocks
    _agree(model, ablations, engine.score(make_documents(2), ablations))


@pytest.mark.parametrize("family", ["llama", "gemma3", "bloom"])
def test_the_check_on_a_miniature_finds_them_exact(family):
    model = tiny_model(family)
    ablations = [a for a in _ablations(find_embeddings(model).is_tied) if not a.has_sublayers]
    verdict = check_miniature(engine_of(model), ablations, (), blank=False)
    assert verdict.sharing.depth, verdict.lost


def test_embeddings_that_reach_layers_another_way_are_found_out():
    """Zamba 2 gives its layers the embedding beside the hidden state."""
    kinds = ["linear_attention", "hybrid"]
    engine = engine_of(tiny_model("zamba2", num_hidden_layers=2, layers_block_type=kinds))
    for ablation in (Ablation.parse("layer:0"), Ablation.of(EMBEDDING[1])):
        verdict = check_miniature(engine, [INTACT, ablation], (), blank=False)
        assert verdict.sharing.depth == (not ablation.rounded)


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
@pytest.mark.parametrize("begun", [0, 6])
def test_every_text_is_generated_by_the_changed_model(family, begun):
    model = _model(family)
    tied = family in TIED
    ablations = [a for a in _ablations(tied) if not a.repeated]
    engine = engine_of(model, max_length=64)
    plan, ids = engine.plan(ablations), PROMPT[0].tolist()
    assert plan == plan_streams(ablations, 4, tied)
    prefix = sweep.read_prefix(engine, plan, tuple(ids[:begun])) if begun else None
    with torch.inference_mode(), decoding(engine, ablations, ids, prefix) as cache:
        rows = generate(model, PROMPT.repeat(len(ablations), 1), **{cache_argument(model): cache})
    for ablation, row in zip(ablations, rows, strict=True):
        assert [row] == generate(engine.without(ablation).loaded.model, PROMPT), ablation
    # The tiny Gemma says its last token again, whatever is done to it.
    assert len({*map(tuple, rows)}) > 3 or family == "gemma3"


def test_what_they_cost_is_all_layers_or_none():
    embedding, head = Ablation.of(EMBEDDING[0]), Ablation.of(HEAD[0])
    for ablations, tied, layers, heads in (
        ([embedding], False, 8, 2),
        ([embedding], True, 8, 2),
        ([head], False, 4, 2),
        ([head, Ablation.of(HEAD[1])], False, 4, 3),
        ([embedding, head], False, 8, 3),
        # Behind the embedding it shares with that alone.
        ([embedding, Ablation.of(EMBEDDING[0], removed=(2,))], False, 4 + 4 + 1, 3),
    ):
        plan = plan_streams([INTACT, *ablations], 4, tied)
        assert (plan.layer_passes, plan.answers) == (layers, heads)
    assert (passes(embedding, 4), passes(head, 4)) == (4, 0)
    model, documents = _model("llama"), make_documents(2)
    intact, rounded = (cost(model, documents, each, 96) for each in ([INTACT], [INTACT, head]))
    assert rounded.layer_passes == intact.layer_passes
    assert rounded.flops > intact.flops


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("sharing", [FULL, PLAIN], ids=["full", "plain"])
def test_divergences_are_those_of_the_changed_model(family, sharing):
    model = _model(family)
    ablations = _ablations(family in TIED)[1:]
    (document,) = make_documents(1)
    tokens = gold_tokens(document)
    found = divergences(engine_of(model, sharing), document, ablations)["kl"]
    p = logits(model, tokens).softmax(-1).numpy()
    for ablation, ours in zip(ablations, found.tolist(), strict=True):
        if ablation.rounded and ablation == Ablation.of(*ablation.rounded):
            q = logits(_changed(model, ablation), tokens).softmax(-1).numpy()
            assert ours == pytest.approx(entropy(p, q, axis=-1).sum(), rel=1e-3), ablation.name


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@torch.inference_mode()
def test_errors_are_those_of_plain_passes(family):
    model, (document,) = _model(family), make_documents(1)
    maps = [*EMBEDDING, *([] if family in TIED else HEAD), Change.parse("int8:1.mlp.down_proj")]
    engine = engine_of(model)
    found, weights = rounding_errors(engine, document, maps), weight_errors(engine, maps)
    ids = torch.tensor([gold_tokens(document)])
    for place, each in enumerate(maps[:-1]):
        ask = "get_input_embeddings" if each.path == "embedding" else "get_output_embeddings"
        twin = _changed(model, Ablation.of(each))
        old, new = (getattr(m, ask)() for m in (model, twin))
        given = ids[0]
        if each.path == "lm_head":
            given = model.model(ids).last_hidden_state[0]
        before, after = old(given), new(given)
        apart = float(((after - before) ** 2).sum())
        assert found["output_error"][place] == pytest.approx(apart, rel=1e-3)
        assert found["output_size"][place] == pytest.approx(float((before**2).sum()), rel=1e-4)
        angle = float((1 - torch.cosine_similarity(after, before, dim=-1).double()).sum())
        assert found["output_angle"][place] == pytest.approx(angle, abs=1e-4)
        own = ((new.weight - old.weight) ** 2).sum() / (old.weight**2).sum()
        assert weights[place] == pytest.approx(float(own), rel=1e-3)
    assert found["tokens"] == ids.shape[1]


def test_what_a_model_has_not_and_what_does_not_fit_is_refused():
    def refused(model, which, form, said):
        with pytest.raises(ExperimentError, match=said):
            LayerAnatomy.of(model).refuse_formats([INTACT, Ablation.parse(f"{form}:{which}")])

    refused(_model("gpt2"), "lm_head", "int8", r"one tensor for both; name it by 'map' as embed")
    refused(_model("llama"), "embedding", "int4_g128", r"128 inputs together, and embedding .* 32")
    without = _model("llama")
    without.get_output_embeddings = lambda: None
    refused(without, "lm_head", "int8", r"LlamaForCausalLM has no lm_head that is one matrix")
    packed = _model("llama")
    packed.lm_head.weight = nn.Parameter(torch.zeros(97, 32, dtype=torch.int8), requires_grad=False)
    refused(packed, "lm_head", "int8", "is quantised already")
    LayerAnatomy.of(_model("gpt2")).refuse_formats([INTACT, Ablation.of(EMBEDDING[0])])
    with torch.device("meta"):
        tied = type(_model("gpt2"))(_model("gpt2").config)
    refused(tied, "lm_head", "int8", "one tensor for both")
