"""Embeddings and heads in formats, shared every way, against models changed by hand."""

from __future__ import annotations

import copy

import pytest
import torch
from scipy.stats import entropy
from torch import nn

from tests.helpers.ablations import parse_ablations
from tests.helpers.engines import (
    PROMPT,
    assert_changed_scores,
    engine_of,
    generate_tokens,
    gold_tokens,
    make_documents,
    rounded_rows,
    score_sharings,
)
from tests.helpers.families import tiny_model
from tests.helpers.truth import model_logits
from tracker.analysis.stopping import count_computed_layers
from tracker.engine.forward.streams import plan_streams
from tracker.engine.observers.layer_proxies import divergences
from tracker.engine.observers.rounding_error import rounding_errors, weight_errors
from tracker.engine.plan import estimate_cost
from tracker.engine.scoring import sweep
from tracker.engine.scoring.generation import fork_decoding
from tracker.engine.scoring.model import DEPTH_ONLY, FULL, PLAIN
from tracker.engine.scoring.score import find_cache_argument
from tracker.engine.selfcheck.miniature_check import check_miniature
from tracker.models.parts.anatomy import LayerAnatomy
from tracker.models.parts.linear_maps import find_embeddings
from tracker.schema.changes import INTACT, Ablation, Change
from tracker.schema.errors import ExperimentError

HALF = {"int8": 127.5, "int4_row": 7.5}
"""Steps from 0 to the largest weight of a row."""
EMBEDDING = [Change.parse(f"{form}:embedding") for form in HALF]
HEAD = [Change.parse(f"{form}:lm_head") for form in HALF]
TIED = ["gpt2", "gemma3", "opt"]
"""Learned positions; a factor behind the embedding."""
UNTIED = ["llama", "granite", "mixtral"]
"""And, of granite, factors of embeddings and logits."""


def _ablations(is_tied: bool) -> list[Ablation]:
    ablations = parse_ablations(
        "baseline int8:embedding int4_row:embedding layer:2+int4_row:embedding "
        "mlp:0+int4_row:embedding layer:1 layer:0+int8:embedding int4_row:embedding+repeat:1"
    )
    if not is_tied:
        ablations += [
            *(Ablation.from_changes(change) for change in HEAD),
            *(Ablation.from_changes(embedding, head) for embedding in EMBEDDING for head in HEAD),
            *parse_ablations("layer:2+int4_row:lm_head attention:3+int4_row:lm_head"),
        ]
    return ablations


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


def _change_by_hand(model, ablation):
    """Round by hand, row for row, and let layers hand on their input."""
    twin = copy.deepcopy(model)
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    for change in ablation.roundings:
        form, path = change.intervention, change.path
        modules = [twin.get_input_embeddings(), twin.get_output_embeddings()]
        weight = rounded_rows(modules[path == "lm_head"].weight, HALF[form])
        for module in modules if tied else [modules[path == "lm_head"]]:
            module.weight = nn.Parameter(weight, requires_grad=False)
    return twin


def _check_ways(model, ablations, *ways):
    """Compare with changed models; what else than rounding they do has its truths elsewhere."""
    engine = engine_of(model)

    def change(ablation):
        other_changes = Ablation(ablation.changes - {*ablation.roundings})
        return _change_by_hand(engine.ablate(other_changes).loaded.model, ablation)

    assert_changed_scores(ways, ablations, change)


@pytest.mark.parametrize("family", [*TIED, *UNTIED])
def test_every_stream_is_the_changed_model_however_much_is_shared(family):
    model, ablations = _model(family), _ablations(family in TIED)
    old_weights = {name: weight.clone() for name, weight in model.state_dict().items()}
    ways = score_sharings(model, (FULL, DEPTH_ONLY, PLAIN), ablations)
    for name, weight in model.state_dict().items():
        torch.testing.assert_close(weight, old_weights[name], rtol=0, atol=0)
    assert find_embeddings(model).is_tied == (family in TIED)
    _check_ways(model, ablations, *ways)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_a_kept_beginning_serves_them(family, spy):
    model = _model(family)
    ablations = [ablation for ablation in _ablations(family in TIED) if not ablation.repetitions]
    read_plans = spy(sweep, "read_prefix", lambda parts, plan, tokens: plan.n_streams)
    engine = engine_of(model, FULL, row_tokens=40)
    _check_ways(model, ablations, engine.score(make_documents(3, shared=60), ablations))
    assert len(read_plans) == 1


@pytest.mark.parametrize(
    ("family", "blocks"), [("llama", True), ("llama", False), ("gpt2", True), ("gemma3", False)]
)
def test_a_vocabulary_in_blocks_has_the_head_that_is_asked_for(family, blocks, monkeypatch):
    monkeypatch.setattr("tracker.engine.scoring.head.VOCABULARY_BLOCK", 40 if blocks else 1000)
    model, ablations = _model(family), _ablations(family in TIED)
    engine = engine_of(model)
    assert engine.head.has_blocks == blocks
    _check_ways(model, ablations, engine.score(make_documents(2), ablations))


@pytest.mark.parametrize("family", ["llama", "bloom"])
def test_the_check_on_a_miniature_finds_them_exact(family):
    model = tiny_model(family)
    ablations = [a for a in _ablations(find_embeddings(model).is_tied) if not a.has_sublayers]
    verdict = check_miniature(engine_of(model), ablations, (), blank=False)
    assert verdict.sharing.depth, verdict.sharing_note


def test_embeddings_that_reach_layers_another_way_are_found_out():
    """Zamba 2 gives its layers the embedding beside the hidden state."""
    kinds = ["linear_attention", "hybrid"]
    engine = engine_of(tiny_model("zamba2", num_hidden_layers=2, layers_block_type=kinds))
    for ablation in (Ablation.parse("layer:0"), Ablation.from_changes(EMBEDDING[1])):
        verdict = check_miniature(engine, [INTACT, ablation], (), blank=False)
        assert verdict.sharing.depth == (not ablation.roundings)


@pytest.mark.parametrize(
    ("family", "n_prefix"), [("llama", 0), ("llama", 6), ("gemma3", 6), ("gpt2", 0)]
)
def test_every_text_is_generated_by_the_changed_model(family, n_prefix):
    model = _model(family)
    tied = family in TIED
    ablations = [a for a in _ablations(tied) if not a.repetitions]
    engine = engine_of(model, max_length=64)
    plan, ids = engine.plan(ablations), PROMPT[0].tolist()
    assert plan == plan_streams(ablations, 4, tied)
    prefix = sweep.read_prefix(engine, plan, tuple(ids[:n_prefix])) if n_prefix else None
    with torch.inference_mode(), fork_decoding(engine, ablations, ids, prefix) as cache:
        rows = generate_tokens(
            model, PROMPT.repeat(len(ablations), 1), **{find_cache_argument(model): cache}
        )
    for ablation, row in zip(ablations, rows, strict=True):
        assert [row] == generate_tokens(engine.ablate(ablation).loaded.model, PROMPT), ablation
    # The tiny Gemma says its last token again, whatever is done to it.
    assert len({*map(tuple, rows)}) > 3 or family == "gemma3"


def test_what_they_cost_is_all_layers_or_none():
    embedding, head = Ablation.from_changes(EMBEDDING[0]), Ablation.from_changes(HEAD[0])
    for ablations, tied, layers, heads in (
        ([embedding], False, 8, 2),
        ([embedding], True, 8, 2),
        ([head], False, 4, 2),
        ([head, Ablation.from_changes(HEAD[1])], False, 4, 3),
        ([embedding, head], False, 8, 3),
        # Behind the embedding it shares with that alone.
        ([embedding, Ablation.from_changes(EMBEDDING[0], removed=(2,))], False, 4 + 4 + 1, 3),
    ):
        plan = plan_streams([INTACT, *ablations], 4, tied)
        assert (plan.layer_passes, plan.n_answers) == (layers, heads)
    assert (count_computed_layers(embedding, 4), count_computed_layers(head, 4)) == (4, 0)
    model, documents = _model("llama"), make_documents(2)
    intact, rounded = (estimate_cost(model, documents, c, 96) for c in ([INTACT], [INTACT, head]))
    assert rounded.layer_passes == intact.layer_passes
    assert rounded.flops > intact.flops


@pytest.mark.parametrize(("family", "sharing"), [("llama", FULL), ("gpt2", PLAIN)])
def test_divergences_are_those_of_the_changed_model(family, sharing):
    model = _model(family)
    ablations = _ablations(family in TIED)[1:]
    (document,) = make_documents(1)
    tokens = gold_tokens(document)
    divergence_sums = divergences(engine_of(model, sharing), document, ablations)["kl"]
    p = model_logits(model, tokens).softmax(-1).numpy()
    for ablation, divergence in zip(ablations, divergence_sums.tolist(), strict=True):
        if ablation.roundings and ablation == Ablation.from_changes(*ablation.roundings):
            q = model_logits(_change_by_hand(model, ablation), tokens).softmax(-1).numpy()
            expected = entropy(p, q, axis=-1).sum()
            assert divergence == pytest.approx(expected, rel=1e-3), ablation.name


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@torch.inference_mode()
def test_errors_are_those_of_plain_passes(family):
    model, (document,) = _model(family), make_documents(1)
    maps = [*EMBEDDING, *([] if family in TIED else HEAD), Change.parse("int8:1.mlp.down_proj")]
    engine = engine_of(model)
    errors, weights = rounding_errors(engine, document, maps), weight_errors(engine, maps)
    ids = torch.tensor([gold_tokens(document)])
    for index, change in enumerate(maps[:-1]):
        getter = "get_input_embeddings" if change.path == "embedding" else "get_output_embeddings"
        twin = _change_by_hand(model, Ablation.from_changes(change))
        old_module, new_module = (getattr(m, getter)() for m in (model, twin))
        module_input = ids[0]
        if change.path == "lm_head":
            module_input = model.model(ids).last_hidden_state[0]
        old_output, new_output = old_module(module_input), new_module(module_input)
        squared_error = float(((new_output - old_output) ** 2).sum())
        assert errors["output_error"][index] == pytest.approx(squared_error, rel=1e-3)
        assert errors["output_size"][index] == pytest.approx(float((old_output**2).sum()), rel=1e-4)
        angle = float((1 - torch.cosine_similarity(new_output, old_output, dim=-1).double()).sum())
        assert errors["output_angle"][index] == pytest.approx(angle, abs=1e-4)
        error = ((new_module.weight - old_module.weight) ** 2).sum() / (old_module.weight**2).sum()
        assert weights[index] == pytest.approx(float(error), rel=1e-3)
    assert errors["tokens"] == ids.shape[1]


def test_what_a_model_has_not_and_what_does_not_fit_is_refused():
    def check_refusal(model, path, format_name, message):
        with pytest.raises(ExperimentError, match=message):
            LayerAnatomy.of(model).check_formats([INTACT, Ablation.parse(f"{format_name}:{path}")])

    check_refusal(_model("gpt2"), "lm_head", "int8", "share one weight; write embedding in 'map'")
    check_refusal(_model("llama"), "embedding", "int4_g128", "128 weights, .* row of emb.* 32")
    headless_model = _model("llama")
    headless_model.get_output_embeddings = lambda: None
    check_refusal(
        headless_model, "lm_head", "int8", "^LlamaForCausalLM has no lm_head with a single"
    )
    quantised_model = _model("llama")
    weight = torch.zeros(97, 32, dtype=torch.int8)
    quantised_model.lm_head.weight = nn.Parameter(weight, requires_grad=False)
    check_refusal(quantised_model, "lm_head", "int8", "is quantised already")
    LayerAnatomy.of(_model("gpt2")).check_formats([INTACT, Ablation.from_changes(EMBEDDING[0])])
    with torch.device("meta"):
        tied = type(_model("gpt2"))(_model("gpt2").config)
    check_refusal(tied, "lm_head", "int8", "share one weight")
