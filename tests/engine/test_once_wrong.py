"""Models, documents and orders that once gave a wrong number without a word.

Each is scored as a cell is: the check on its first documents, then every document with as much
sharing as the check left, in one order and its reverse. What comes out must be the truth of
`tests.helpers.truth`, or the check must refuse the model and say what is really the matter.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch

from tests.helpers.ablations import single_layers
from tests.helpers.cells import (
    LETTER_ANSWERS,
    LONGROPE,
    MAX_LENGTH,
    TRAINED_LENGTH,
    DocumentGenerator,
    long_documents,
    measure_cell,
    tiny_model_of,
)
from tests.helpers.engines import wrap_model
from tests.helpers.families import FAMILIES
from tests.helpers.truth import plain_loglikelihoods, pruned_copy, without_layers
from tests.tools.survey import reload_without
from tracker.engine.scoring.rows import pack_tree_rows
from tracker.engine.scoring.sweep import Engine
from tracker.engine.selfcheck.check import check_sharing
from tracker.schema.documents import Document

pytestmark = pytest.mark.usefixtures("one_thread")


BY_ROW = {
    "mamba2": {},
    "recurrent_gemma": {},
    "mpt": {},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
}


@pytest.mark.parametrize("family", BY_ROW)
class TestTheCheckSeesWhatItVouchesFor:
    """The first two documents fill a row each, so that no row that is checked has a branch."""

    def test_later_documents_share_rows(self, family):
        documents = DocumentGenerator().letter_documents((120, 100, 40, 60, 30, 50), shared=8)
        model = tiny_model_of(family, num_hidden_layers=2, **BY_ROW[family])
        assert measure_cell(model, documents, (0,)) == {FAMILIES[family].sharing}

    def test_later_documents_branch(self, family):
        draw = DocumentGenerator()
        documents = [*draw.letter_documents((120, 100)), *draw.long_documents((30, 40), (2, 3))]
        measure_cell(tiny_model_of(family, num_hidden_layers=2, **BY_ROW[family]), documents, (0,))


def gpt_neo() -> Any:
    """GPT-Neo with the window that its configuration has by default."""
    sizes = {"window_size": 256, "max_position_embeddings": 512, "num_hidden_layers": 2}
    return tiny_model_of("gpt_neo", **BY_ROW["gpt_neo"], **sizes)


class TestWindowsCountPositions:
    """GPT-Neo counts them in places of the row."""

    def test_one_later_document_is_wider_than_the_window(self):
        draw = DocumentGenerator(1)
        documents = draw.long_documents((30, 30), (2, 3))
        documents += draw.long_documents((40,), (170, 170))
        measure_cell(gpt_neo(), documents, (0,), atol=1e-3)

    def test_later_documents_fill_a_row_that_is_wider_than_the_window(self):
        documents = DocumentGenerator(2).letter_documents((60,) * 8, shared=12)
        measure_cell(gpt_neo(), documents, (0,), row_tokens=1024)


DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
ROTARY = {
    "phi3": lambda: tiny_model_of(
        "phi3", sliding_window=None, rope_parameters=LONGROPE, num_hidden_layers=2,
        original_max_position_embeddings=TRAINED_LENGTH,
    ),
    "llama": lambda: tiny_model_of("llama", rope_parameters=LONGROPE, num_hidden_layers=2),
    "minicpm3": lambda: tiny_model_of("minicpm3", rope_parameters=LONGROPE, num_hidden_layers=2),
    "dynamic": lambda: tiny_model_of(
        "llama", max_position_embeddings=TRAINED_LENGTH, rope_parameters=DYNAMIC,
        num_hidden_layers=2,
    ),
}  # fmt: skip
BY_LENGTH = {
    "short_beside_long": lambda draw: draw.long_documents((20, 20, 30, 90), (2, 3)),
    "prefix_below": lambda draw: draw.long_documents((58, 58, 60, 65, 68), (2, 2), shared=56),
    # What is read is as long as the short factors reach; a gold request's last token is beyond.
    "at_the_boundary": lambda draw: draw.long_documents((63, 63), (2, 2)),
    "letters_at_the_boundary": lambda draw: draw.letter_documents((64, 64)),
    "one_after_another": lambda draw: draw.letter_documents((64, 120, 80)),
}  # fmt: skip


def truth_options(family: str) -> dict[str, Any]:
    """Return how a family is compared with the truth; MiniCPM3 scales by the number of layers."""
    return {
        "refusal": "length" if family == "dynamic" else None,
        "atol": 1e-3 if family == "minicpm3" else 2e-4,
        "ablate": pruned_copy if family == "minicpm3" else without_layers,
    }


class TestRotaryFactorsThatDependOnTheCall:
    """They are chosen by the largest position of the call, so that sharing mixes two of them."""

    @pytest.mark.parametrize(
        ("family", "case"),
        [
            *product(["phi3"], BY_LENGTH),
            *product(["dynamic"], ["short_beside_long", "one_after_another"]),
            ("llama", "prefix_below"),
            ("minicpm3", "at_the_boundary"),
        ],
    )
    def test_whatever_stands_beside_a_request(self, family, case):
        documents = BY_LENGTH[case](DocumentGenerator(1))
        measure_cell(ROTARY[family](), documents, (1,), **truth_options(family))

    @pytest.mark.parametrize("family", ["phi3", "dynamic"])
    def test_in_blocks_that_share_a_beginning(self, family):
        """The kept beginning is short, and a later block is long."""
        documents = BY_LENGTH["prefix_below"](DocumentGenerator(1))
        measure_cell(ROTARY[family](), documents, (1,), block=2, **truth_options(family))

    @pytest.mark.parametrize("family", ["phi3", "dynamic"])
    def test_in_blocks_that_share_less_and_less(self, family):
        """The kept beginning was read beyond the threshold, and a later block needs less of it."""
        draw = DocumentGenerator(1)
        common = draw.draw_tokens(70)
        documents = [
            draw.make_document(common[:shared] + draw.draw_tokens(more), LETTER_ANSWERS)
            for shared, more in ((70, 5), (70, 8), (70, 6), (58, 3), (58, 4), (58, 3))
        ]
        measure_cell(ROTARY[family](), documents, (1,), block=3, **truth_options(family))


class TestThePlainPathIsThePrunedCheckpoint:
    """Also where more than `layer_types` has one entry a layer, or a call changes the weights."""

    @pytest.mark.parametrize("ablate", [pruned_copy, without_layers])
    def test_other_lists_with_one_entry_a_layer(self, ablate):
        model = tiny_model_of(
            "granite_swa", num_hidden_layers=3, layer_rope_theta=[10000.0, 0, 500.0],
            layer_types=["full_attention", "sliding_attention", "full_attention"],
        )  # fmt: skip
        measure_cell(model, long_documents((20, 20, 14), (1, 3)), (0, 1), ablate=ablate)

    def test_weights_that_the_first_call_rescales(self):
        """Layer 0 holds a norm of its own, without which no checkpoint can be loaded.

        The checkpoint rescales at other places than the model that skips a layer, and its norms
        are not blind to that: the two differ by 2e-3 nats, in float64 too.
        """
        model = tiny_model_of("rwkv", rescale_every=2, num_hidden_layers=3)
        documents = long_documents((9, 9, 7), (1, 3))
        measure_cell(model, documents, (1, 2), ablate=pruned_copy, refusal="weights|rescale")


@pytest.mark.parametrize(
    ("kind", "changes"),
    [("minicpm3", {}), ("gpt2", {"scale_attn_by_inverse_layer_idx": True})],
    ids=["minicpm3", "gpt2"],
)
def test_a_factor_that_no_file_holds(kind, changes):
    """Their classes compute factors from a layer's place, or from how many layers there are."""
    model = tiny_model_of(kind, num_hidden_layers=2, **changes)
    documents = long_documents((9, 9, 7), (1, 3))
    # The two kinds of truth are apart, or this would say nothing.
    (reloaded,), (skipped,) = (
        plain_loglikelihoods(model, documents[:1], [(0,)], MAX_LENGTH, ablate)
        for ablate in (reload_without, without_layers)
    )
    assert max(abs(a - b) for a, b in zip(reloaded[0], skipped[0], strict=True)) > 0.05
    measure_cell(model, documents, (0,), ablate=reload_without)


def test_indices_that_later_layers_share():
    """Layer 1, before one that shares, is neither the first, the middle one nor the last."""
    model = tiny_model_of(
        "glm_moe_dsa", index_topk=4, n_group=1, mlp_layer_types=["dense"] * 4,
        indexer_types=["full", "full", "shared", "full"],
    )  # fmt: skip
    message, documents = "top-k|indices|besides|second output", long_documents((14, 9), (1, 3))
    measure_cell(model, documents, (1, 2), ablate=pruned_copy, refusal=message)


class TestMasksAreWhatTheModelAsksFor:
    """Documents beyond the window come last, after those that are checked."""

    def test_a_mask_a_type_under_another_name(self):
        model = tiny_model_of(
            "dots3_note_text", use_dsa=False, sliding_window=30, mlp_layer_types=["dense"] * 2,
            num_hidden_layers=2, layer_types=["sliding_attention", "full_attention"],
        )  # fmt: skip
        measure_cell(model, long_documents((8, 8, 50, 60), (1, 3)), (0, 1))

    def test_a_window_that_the_model_does_not_use(self):
        model = tiny_model_of("llama", sliding_window=30, num_hidden_layers=2)
        measure_cell(model, long_documents((8, 8, 50, 60), (1, 3)), (0, 1))


def llama4(floor: int) -> Any:
    """Llama 4, whose layers without rotary positions scale queries from `floor` tokens on."""
    return tiny_model_of(
        "llama4_text", attention_chunk_size=1000, floor_scale=floor, attn_scale=0.5,
        num_hidden_layers=2, layer_types=["chunked_attention", "full_attention"],
    )  # fmt: skip


class TestTemperatureCountsPositions:
    def test_a_row_is_longer_than_the_floor(self):
        measure_cell(llama4(60), long_documents((15, 15, 30, 30, 40, 40), (2, 2)), (0,))

    def test_a_row_after_a_kept_beginning(self):
        """Requests end below the floor, the row with its beginning above it."""
        documents = long_documents((62, 61, 62, 61, 62, 60), (2, 2), shared=58)
        measure_cell(llama4(80), documents, (0,))


def gemma4(per_layer: int = 0) -> Any:
    """Gemma 4; its global layers have heads of another size."""
    return tiny_model_of(
        "gemma4_text", global_head_dim=16, sliding_window=20, num_hidden_layers=2,
        layer_types=["sliding_attention", "full_attention"], hidden_size_per_layer_input=per_layer,
    )  # fmt: skip


def test_heads_of_several_sizes():
    """The first documents share too little for a prefix, so that none was ever checked."""
    draw = DocumentGenerator()
    documents = draw.long_documents((20, 20), (1, 3))
    documents += draw.long_documents((64, 64), (1, 3), shared=60)
    measure_cell(gemma4(), documents, (0, 1), block=2)


STREAMS = "residual|streams|shape|dimension"
"""Several of them: what passes between layers is [batch, tokens, streams, hidden]."""
ENCODER = "encoder|input_ids|embeddings"
BUT_THE_EXPORT_RUNS = {
    "deepseek_v4": (STREAMS, {"layer_types": ["sliding_attention"] * 2, "num_hidden_layers": 2}),
    "openai-gpt": ("list", {"num_hidden_layers": 2}),
    "roberta": (ENCODER, {"is_decoder": True, "num_hidden_layers": 2}),
}


def gemma3n() -> Any:
    """Gemma 3n, whose layers may differ in width; a table holds embeddings for all layers."""
    return tiny_model_of("gemma3n_text", altup_num_inputs=2, sliding_window=16)


class TestRefusalsSayWhatHappened:
    """No layer here depends on another by its number."""

    @pytest.mark.parametrize("family", BUT_THE_EXPORT_RUNS)
    def test_a_pruned_copy_runs(self, family):
        message, changes = BUT_THE_EXPORT_RUNS[family]
        model, documents = tiny_model_of(family, **changes), long_documents((12, 9), (1, 3))
        measure_cell(model, documents, (0, 1), ablate=pruned_copy, refusal=message)

    @pytest.mark.parametrize("model", [gemma3n, lambda: gemma4(8)], ids=["gemma3n", "gemma4"])
    def test_one_table_holds_embeddings_for_every_layer(self, model):
        """Gemma 3n is refused before that, for a list as `intermediate_size`."""
        measure_cell(model(), long_documents((12, 9), (1, 3)), (0, 1), refusal="the layers return")


def undecided(family: str) -> Any:
    """Build a mixture of experts whose router scores differ by less than float32's rounding."""
    model = tiny_model_of(family, num_hidden_layers=2)
    draw = torch.Generator().manual_seed(1)
    for name, weight in model.named_parameters():
        if name.endswith(("router.weight", "gate.weight")) and len(weight) == 4:
            weight[1:] = weight[0] + 1e-6 * torch.randn(weight[1:].shape, generator=draw)
    return model


DISCONTINUOUS = {
    "phimoe": lambda: undecided("phimoe"),
    "mixtral": lambda: undecided("mixtral"),
    # Its keys begin with equal scores, of which it keeps eight.
    "doge": lambda: tiny_model_of("doge", keep_window_size=8, num_hidden_layers=2),
}


class TestAModelThatIsDiscontinuous:
    """It gives several numbers itself, by the shape of the call; not the sharing's fault."""

    @pytest.mark.parametrize("family", DISCONTINUOUS)
    def test_it_is_said(self, family):
        documents = long_documents((20, 14, 30), (2, 3), seed=1)
        message = "discontinu"
        measure_cell(DISCONTINUOUS[family](), documents, (0, 1), refusal=message, notes=message)

    def test_routing_that_mixes_the_tokens_of_a_call(self):
        """Doge's experts are chosen from the router's values of other tokens, later ones too."""
        model = tiny_model_of("doge", is_moe=True, num_experts=16, num_experts_per_tok=4)
        documents = long_documents((20, 14, 30), (2, 3), seed=1)
        measure_cell(model, documents, (0, 1), refusal="causal|later tokens")


@pytest.mark.parametrize(
    ("family", "changes"),
    [("deepseek_v32", {"mlp_layer_types": ["dense", "sparse"]}), ("llama", {})],
    ids=["deepseek_v32", "llama"],
)
def test_a_token_whose_embedding_is_zero_ties_what_it_chooses_from(family, changes):
    """Padding scores all before it alike, and an index keeps some of them, by their places.

    The short documents, which the model itself is confirmed on, hold none.
    """
    model = tiny_model_of(family, num_hidden_layers=2, **changes)
    assert not model.get_input_embeddings().weight[0].any()
    draw = DocumentGenerator()
    documents = draw.long_documents((9, 8, 7), (1, 3))
    for length in (20, 31, 24):
        padded = (80 + length % 7, *draw.draw_tokens(length), 0, 0, *draw.draw_tokens(9))
        documents.append(draw.make_document(padded, [draw.draw_tokens(1), draw.draw_tokens(3)]))
    assert not any(0 in request.context for d in documents[:3] for request in d.requests)
    measure_cell(model, documents, (0,))


OURS = {
    "a mask": "tracker.engine.scoring.score.Masks",
    "packing": "tracker.engine.scoring.sweep.pack_tree_rows",
    "a fork, inside the model's forward": "tracker.engine.forward.layer.view_streams",
}


class TestErrorsOfOurOwn:
    @pytest.mark.parametrize("error", [AttributeError, KeyError, TypeError])
    @pytest.mark.parametrize("step", OURS)
    def test_they_are_raised_and_no_refusal_of_the_model(self, monkeypatch, step, error):
        def fail(*args: Any) -> Any:
            raise error("a bug of ours")

        monkeypatch.setattr(OURS[step], fail)
        engine = Engine(wrap_model(FAMILIES["llama"].model()), MAX_LENGTH)
        with pytest.raises(error, match="a bug of ours"):
            check_sharing(engine, long_documents((9, 9), (1, 3)), single_layers((0, 1)))

    def test_a_score_that_never_arrived_is_not_zero(self, monkeypatch):
        """The packing loses the last answer of the last document."""
        documents = long_documents((9, 9), (1, 3))

        def pack_all_but_last(documents: Sequence[Document], *args: Any) -> Any:
            last = replace(documents[-1], requests=documents[-1].requests[:-1])
            return pack_tree_rows([*documents[:-1], last], *args)

        monkeypatch.setattr("tracker.engine.scoring.sweep.pack_tree_rows", pack_all_but_last)
        engine = Engine(wrap_model(FAMILIES["llama"].model()), MAX_LENGTH)
        scores = engine.score(documents, single_layers((0, 1)))
        for responses in scores[-1].responses:
            assert math.isfinite(responses[0].loglikelihood)
            assert math.isnan(responses[-1].loglikelihood)
