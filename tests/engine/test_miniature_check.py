"""The check on a miniature: how it is named, what follows from it, what is lost and why."""

from __future__ import annotations

import importlib
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM
from transformers.models.llama import modeling_llama
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from tests.helpers.ablations import single_layers
from tests.helpers.engines import MAX_LENGTH, engine_of, with_forward
from tests.helpers.families import tiny_model
from tests.helpers.mixtures import tiny_mixture
from tracker.engine.refusal import RefusalError
from tracker.engine.scoring.model import DEPTH_ONLY, FULL, NO_PREFIX, ONE_BY_ONE, PLAIN
from tracker.engine.scoring.rows import Lengths
from tracker.engine.scoring.sweep import Engine
from tracker.engine.selfcheck import miniature_check, quirks
from tracker.engine.selfcheck.miniature_check import (
    check_longer_texts,
    draw_short_documents,
    reachable_numbers,
)
from tracker.engine.selfcheck.quirks import QuirkFindings, logits_alike
from tracker.engine.selfcheck.reference import Comparison, SharingVerdict
from tracker.models.miniature import NumberPath
from tracker.schema.changes import INTACT, Ablation
from tracker.schema.documents import Document, Request, Response
from tracker.schema.errors import CellError

ABLATIONS = single_layers((0, 1, 2, 3))
WINDOW = (("max_position_embeddings",),)

pytestmark = pytest.mark.usefixtures("one_thread")


def verdict_on(model: Any, ablations: Sequence[Ablation] = ABLATIONS) -> SharingVerdict:
    """Check an engine's model, or one, with no number in reach and no token without embedding."""
    engine = model if isinstance(model, Engine) else engine_of(model)
    return miniature_check.check_miniature(engine, ablations, (), blank=False)


def key_of(
    model: Any,
    ablations: Sequence[Ablation] = ABLATIONS,
    paths: Sequence[NumberPath] = WINDOW,
    rows: tuple[int, int, int] | None = None,
    blank: bool = False,
) -> str:
    return miniature_check.miniature_key(model, ablations, paths, rows, blank)


@pytest.fixture
def no_miniature(monkeypatch) -> None:
    monkeypatch.setattr(miniature_check, "build_miniature", lambda model: None)


class TestKey:
    def test_the_weights_and_where_they_come_from_do_not_count(self) -> None:
        key = key_of(tiny_model("llama"))
        assert len(key) == 64
        other_model = tiny_model("llama").bfloat16()
        other_model.model.norm.weight.mul_(2)
        other_model.config._name_or_path = "elsewhere"
        other_model.config.dtype = torch.bfloat16
        other_model.config.quantization_config = {"bits": 4}
        assert key_of(other_model) == key

    def test_all_that_the_verdict_follows_from_counts(self) -> None:
        model = tiny_model("llama")
        other_model = tiny_model("llama")
        other_model.config.rms_norm_eps = 0.5
        keys = [
            key_of(model),
            key_of(model, ABLATIONS[:-1]),
            key_of(model, [*ABLATIONS[:-1], Ablation.parse("mlp:3")]),
            key_of(model, paths=()),
            key_of(model, rows=(256, 192, 256)),
            key_of(model, blank=True),
            key_of(other_model),
            key_of(tiny_model("qwen2")),
        ]
        # Two classes of one file, too.
        keys += [key_of(kind(model.config)) for kind in (Placed, NoTwo)]
        for kernels, name in (("_attn", "eager"), ("_experts", "grouped_mm")):
            other_model = tiny_model("llama")
            setattr(other_model.config, f"{kernels}_implementation", name)
            keys.append(key_of(other_model))
        assert len(set(keys)) == 12

    def test_the_code_and_what_runs_it_count(self, monkeypatch) -> None:
        model = tiny_model("llama")
        keys = [key_of(model)]
        read_paths: set[str] = set()

        def file_hash(paths: Iterable[Path]) -> str:
            read_paths.update(f"{path.parent.name}/{path.name}" for path in paths)
            return "another"

        replacements = {
            name: lambda: {"another": "1"} for name in ("package_versions", "describe_machine")
        }
        for name, replacement in {"file_hash": file_hash, **replacements}.items():
            with monkeypatch.context() as patched:
                patched.setattr(miniature_check, name, replacement)
                keys.append(key_of(model))
        assert len(set(keys)) == 4
        tracker = Path(__file__).parents[2] / "tracker"
        engine_paths = [path for f in ("engine", "models") for path in (tracker / f).rglob("*.py")]
        model_paths = Path(modeling_llama.__file__).parent.glob("*.py")
        assert read_paths == {f"{p.parent.name}/{p.name}" for p in (*engine_paths, *model_paths)}

    def test_code_that_a_checkpoint_brings_counts(self, tmp_path, monkeypatch) -> None:
        """Its authors change it without changing a name: what was proven no longer holds."""
        code = tmp_path / "modeling_of_a_checkpoint.py"
        code.write_text("import transformers\nclass Own(transformers.LlamaForCausalLM): pass\n")
        monkeypatch.syspath_prepend(tmp_path)
        sys.modules.pop(code.stem, None)  # of a run before, as mutmut makes several in a process
        model = importlib.import_module(code.stem).Own(tiny_model("llama").config)
        key = key_of(model)
        assert key_of(model) == key
        code.write_text(code.read_text() + "    scale = 2\n")
        assert key_of(model) != key


def test_a_number_that_no_row_reaches_is_not_experimented_with() -> None:
    near_numbers, far_numbers, farthest_numbers = (
        set(reachable_numbers(tiny_model("mistral"), n)) for n in (5, 255, 256)
    )
    assert near_numbers < farthest_numbers
    assert farthest_numbers - far_numbers >= set(WINDOW)
    assert ("sliding_window",) in near_numbers


def test_what_the_engine_must_know_is_looked_up_in_the_model_itself() -> None:
    """The miniature's numbers are others: the paths are what is kept."""
    model = tiny_model("mistral")
    lengths = (
        (("max_position_embeddings",), False),
        (("sliding_window",), False),
        (("no_such_number",), False),
    )
    verdict = SharingVerdict(FULL, lengths=lengths, in_place=True)
    quirks = verdict.make_quirks(model)
    assert quirks.lengths == Lengths((256, 5))
    assert quirks.in_place
    assert quirks.leftovers == quirks.first == {}
    switch_quirks = replace(verdict, switches=((1233, True),)).make_quirks(model)
    assert switch_quirks.lengths == Lengths((256, 5, 1233), all_differ=True)
    plain_quirks = SharingVerdict(FULL, lengths=(((), True),)).make_quirks(model)
    assert plain_quirks.lengths == Lengths((), all_differ=True)
    assert not plain_quirks.in_place


class PlacedLayer(LlamaDecoderLayer):  # type: ignore[misc]
    """A layer that does more the later it stands."""

    scale = 1.0

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return super().forward(*args, **kwargs) * (1 + self.scale * self.self_attn.layer_idx)


class Placed(LlamaForCausalLM):  # type: ignore[misc]
    """A model in which what a layer does depends on its place."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        for layer in self.model.layers:
            layer.__class__ = PlacedLayer


def make_llama(kind: type) -> Any:
    """Make a model of a class of ours."""
    return kind(tiny_model("llama").config).eval()


APART = (
    "a saved checkpoint without the layer gives different logits than skipping the layer, so "
    "each ablation is computed separately"
)


class TestCheck:
    def test_an_architecture_that_shares_all(self) -> None:
        threads = torch.get_num_threads()
        verdict = verdict_on("llama")
        assert (verdict.sharing, verdict.sharing_note, verdict.unsteady) == (FULL, None, 0)
        assert 0 < verdict.difference < 2e-4
        assert (verdict.lengths, verdict.leftovers, verdict.first) == ((), (), ())
        assert (verdict.in_place, verdict.tested_on) == (False, "a miniature")
        assert torch.get_num_threads() == threads

    @pytest.mark.usefixtures("no_miniature")
    def test_a_model_without_a_miniature_is_checked_itself(self, spy) -> None:
        score_calls = spy(Engine, "score", lambda engine, documents, ablations: list(documents))
        engine = engine_of("llama")
        verdict = verdict_on(engine)
        # Always with the same texts, the first of those that miniatures are given.
        assert verdict_on(engine) == verdict
        assert score_calls[2:] == score_calls[:2] == [score_calls[0], score_calls[0][::-1]]
        assert score_calls[0] == draw_short_documents(97, MAX_LENGTH)[0][:4]
        assert verdict.sharing == DEPTH_ONLY
        assert verdict.tested_on == "the model"
        assert verdict.difference < 2e-4
        # Four documents of two requests, each other ablation one of them, in both orders.
        assert verdict.compared == 2 * (4 * 2 + 4)
        assert verdict.lengths == (((), True),)
        assert verdict.sharing_note == (
            "no tiny copy of the model can be built for the self-check, so common beginnings of "
            "requests are computed separately"
        )
        # No length is believed of it anyway.
        assert check_longer_texts(engine, ABLATIONS, verdict, (256, 192, 256), False) is verdict

    def test_a_checkpoint_whose_layers_moved_up_is_measured_and_shares_nothing(self) -> None:
        """It is what a pruned checkpoint is, and not the model with a layer that is skipped."""
        engine = engine_of(make_llama(Placed))
        verdict = verdict_on(engine)
        assert (verdict.sharing, verdict.sharing_note, verdict.in_place) == (PLAIN, APART, False)
        # Without the last layer, the others stay where they are.
        assert verdict_on(engine, [INTACT, Ablation.parse("layer:3")]).sharing == FULL

    @pytest.mark.parametrize(("unsteady", "sharing"), [(20, FULL), (21, ONE_BY_ONE)])
    def test_one_answer_in_fifty_may_be_at_a_discontinuity(self, watched, unsteady, sharing):
        """A model that is so just as often cannot be made."""
        watched.comparisons = (Comparison(1000, 0.5, unsteady),)
        verdict = verdict_on("llama")
        assert replace(verdict, sharing_note=None) == SharingVerdict(
            sharing, None, 0.5, 1000, unsteady
        )

    def test_what_is_not_causal_is_refused(self) -> None:
        def add_last_logits(model: Any, forward: Any, *args: Any, **kwargs: Any) -> Any:
            output = forward(*args, **kwargs)
            output.logits = output.logits + output.logits[:, -1:]
            return output

        message = (
            r"^Changed is not causal: its logits of a token depend on later tokens of the same "
            r"call, so no log-likelihood is well-defined$"
        )
        with pytest.raises(CellError, match=message):
            verdict_on(with_forward(tiny_model("llama"), add_last_logits))


EXACT = [
    ("llama", "head:0.0 head:3.3 head:2.1+head:2.3 kv_head:0.1 layer:1+head:2.0 attention:2 mlp:2"),
    ("llama", "repeat:0 repeat:1-2 repeat:0-3 repeat3:1-2 layer:0+repeat:2-3 layer:3"),
    ("llama", "mean:0 scale:2 linear:3 int8:0 int4_row:1.self_attn.k_proj layer:1+int4_row:2"),
    ("llama", "int4_row:2.attention+int8:2.mlp.up_proj layer:1+repeat:2 layer:1"),
    # Experts that a miniature, which has few, takes its own for.
    ("mixtral", "expert:1.0 expert:1.3 expert:3.6 q4_0:1.mlp.experts.6.down_proj q3_k:3"),
    ("deepseek_v3", "expert:1.0 expert:3.6 shared_expert:3"),
    ("gemma4_text", "expert:1.0 expert:3.3"),
]


@pytest.mark.parametrize(("family", "names"), EXACT)
def test_parts_and_interventions_are_exact_on_a_miniature(family: str, names: str) -> None:
    model = tiny_model("llama") if family == "llama" else tiny_mixture(family, 8)
    verdict = verdict_on(model, [INTACT, *map(Ablation.parse, names.split())])
    assert (verdict.sharing, verdict.sharing_note) == (FULL, None)


RIGHT = Comparison(100, 1e-6)


class FakeComparison:
    """Stands in for the comparison; remembers with which engine it was made."""

    def __init__(self) -> None:
        self.engines: list[Engine] = []
        self.comparisons: tuple[Comparison, ...] = (RIGHT,)

    def __call__(self, engine: Engine, *_: Any) -> Comparison:
        self.engines.append(engine)
        return self.comparisons[min(len(self.engines), len(self.comparisons)) - 1]


@pytest.fixture
def watched(monkeypatch) -> FakeComparison:
    watched = FakeComparison()
    monkeypatch.setattr(miniature_check, "compare_orders", watched)
    return watched


class TestMiniatures:
    """Results for one miniature hold for the next one, and for the model."""

    @pytest.mark.usefixtures("watched")
    @pytest.mark.parametrize(
        ("x", "y", "agree"),
        [
            (math.nan, math.nan, True),
            (math.nan, 0.0, False),
            (-1.0, -1.0001, True),
            (-1.0, -1.001, False),
            (-1000.0, -1000.005, True),
        ],
    )
    def test_both_copies_say_the_same_but_for_rounding(self, monkeypatch, x, y, agree) -> None:
        asked_engines: list[Engine] = []

        def answer(engine: Engine, request: Request) -> Response:
            asked_engines.append(engine)
            return Response(x if engine is asked_engines[0] else y, False, 0)

        monkeypatch.setattr(Engine, "answer", answer)
        monkeypatch.setattr(
            miniature_check, "find_removed_model", lambda truth, of, verdict: verdict
        )
        message = (
            f"a text's log-likelihood is {x:g} nats after shorter texts, but {y:g} nats after "
            "longer texts"
        )
        with nullcontext() if agree else pytest.raises(CellError, match=message):
            assert verdict_on("llama").sharing == FULL

    def test_what_one_lost_the_next_is_not_asked(self, watched, monkeypatch) -> None:
        wrong_comparison = Comparison(3, 0.25, 0, "document 0")
        watched.comparisons = (wrong_comparison, Comparison(10, 1e-3), wrong_comparison, RIGHT)
        findings = QuirkFindings(relevant_numbers=(("sliding_window",),))
        monkeypatch.setattr(miniature_check, "find_quirks", lambda *_: findings)
        verdict = verdict_on("mistral")
        tested_sharing = [engine.sharing for engine in watched.engines]
        assert tested_sharing == [FULL, NO_PREFIX, NO_PREFIX, DEPTH_ONLY]
        assert (verdict.sharing, verdict.difference, verdict.compared) == (DEPTH_ONLY, 1e-3, 110)

    def test_what_differs_with_nothing_shared_is_asked_one_by_one(self, watched) -> None:
        wrong_comparison = Comparison(3, 0.25, 2, "-1 nats with sharing")
        watched.comparisons = (*[wrong_comparison] * 4, Comparison(100, 0.5, 99))
        verdict = verdict_on("llama")
        # However often the model is discontinuous: nothing less is left to share.
        assert (verdict.sharing, verdict.unsteady) == (ONE_BY_ONE, 99)
        watched.comparisons = (wrong_comparison,)
        watched.engines.clear()
        with pytest.raises(CellError, match=r"^LlamaForCausalLM contradicts itself: -1 nats wi"):
            verdict_on("llama")


@pytest.mark.parametrize("reverse", [False, True])
def test_an_error_in_one_order_is_found(monkeypatch, reverse: bool) -> None:
    """The last answer of the last document, under the last ablation."""
    original_score, score_calls = Engine.score, []

    def score_wrongly(self: Engine, documents: Sequence[Document], *rest: Any) -> Any:
        score_calls.append(documents)
        scores = original_score(self, documents, *rest)
        is_reverse = documents[0].index > documents[-1].index
        if self.sharing == FULL and len(documents) == 3 and is_reverse == reverse:
            answers = scores[-1].responses[-1]
            answers[-1] = Response(answers[-1].loglikelihood - 0.5, False, 0)
        return scores

    monkeypatch.setattr(Engine, "score", score_wrongly)
    verdict = verdict_on("llama", ABLATIONS[:2])
    assert verdict.sharing == NO_PREFIX
    # What is wrong once is asked no further.
    assert len(score_calls) == (4 + 1 if reverse else 3) + 8


class TestCut:
    """Test the model without a layer, and the message where there is no such model."""

    @pytest.fixture
    def refuse(self, monkeypatch) -> Callable[..., None]:
        """Refuse models without layer 2: cut, or with the layer in its position."""

        def refuse(*stay: bool) -> None:
            honest, honest_handing_on = Engine.ablate, quirks._skip_layers

            def ablate(self: Engine, ablation: Ablation, **how: bool) -> Engine:
                if 2 in ablation.removed() and self.quirks.in_place in stay:
                    raise RefusalError(f"no such model {self.quirks.in_place:d}")
                return honest(self, ablation, **how)

            def refusing(*_: Any) -> None:
                raise RefusalError("no such model 1")

            @contextmanager
            def handing_on(engine: Engine, ablation: Ablation) -> Iterator[None]:
                with honest_handing_on(engine, ablation):
                    if 2 not in ablation.removed() or True not in stay:
                        yield
                        return
                    handle = engine.loaded.layers[2].register_forward_pre_hook(refusing)
                    yield
                    handle.remove()

            monkeypatch.setattr(Engine, "ablate", ablate)
            monkeypatch.setattr(quirks, "_skip_layers", handing_on)

        return refuse

    def checked(self, model: Any, *removed: tuple[int, ...]) -> SharingVerdict:
        return verdict_on(model, [INTACT, *(Ablation.from_changes(removed=r) for r in removed)])

    @pytest.mark.parametrize(("removed", "layers"), [((2,), "layer 2"), ((1, 2), "layers 1, 2")])
    def test_it_runs_in_no_way(self, refuse, watched, removed, layers) -> None:
        refuse(False, True)
        message = (
            f"^LlamaForCausalLM does not run without {layers} \\(no such model 0\\); "
            "remove the layer from the setting 'layer'$"
        )
        with pytest.raises(CellError, match=message):
            self.checked("llama", (0,), removed)

    @pytest.mark.parametrize(
        ("stay", "expected"), [(False, (True, FULL, None)), (True, (False, PLAIN, APART))]
    )
    def test_it_runs_in_one_way(self, refuse, watched, stay, expected) -> None:
        """If it can only be cut, nothing proves that the checkpoint is the model that skips."""
        refuse(stay)
        verdict = self.checked("llama", (0,), (2,))
        assert (verdict.in_place, verdict.sharing, verdict.sharing_note) == expected
        assert watched.engines[0].quirks.in_place is not stay

    def test_what_no_checkpoint_is_stays_in_its_place(self, watched) -> None:
        """The class cannot be made of two layers, so that it is nothing by its own nature."""
        model = make_llama(NoTwo)
        assert self.checked(model, (3,)).in_place is False
        pair = self.checked(model, (0, 1))
        assert (pair.in_place, pair.as_loaded, pair.sharing) == (True, False, FULL)
        message = (
            "(the changed model cannot be described by a configuration), so tracker measures "
            "the model with skipped layers instead of a checkpoint"
        )
        note = f"a model with removed layers cannot be saved as a usable checkpoint {message}"
        assert pair.checkpoint_note == note
        # Beside a layer without which there is one, each is what it can be.
        verdict = self.checked(model, (0,), (0, 1))
        assert (verdict.in_place, verdict.as_loaded, verdict.sharing) == (True, True, PLAIN)
        note = f"a model without layers 0, 1 cannot be saved as a usable checkpoint {message}"
        assert verdict.checkpoint_note == note

    def test_a_layer_that_is_passed_again_does_not_hand_on_its_input(self, watched) -> None:
        """It was said to, as a removed one does."""
        repeat = Ablation.parse("repeat:1")
        for ablations in ([repeat], [Ablation.parse("layer:1"), repeat]):
            verdict = verdict_on("jamba_eager", [INTACT, *ablations])
            clauses = verdict.checkpoint_note.split("; ")
            assert clauses[-1] == (
                "a model with repeated layers cannot be saved as a usable checkpoint (the changed "
                "model cannot be described by a configuration), so tracker measures the model "
                "changed in memory instead of a checkpoint"
            )
            assert len(clauses) == len(ablations)
            assert all("with skipped layers" in clause for clause in clauses[:-1])

    def test_a_model_that_is_another_when_it_is_loaded_has_no_checkpoint(self, watched) -> None:
        """A model built from a configuration alone is no proof."""
        verdict = self.checked(make_llama(Hidden), (0,))
        assert (
            "(the intact model computes different logits after it is saved and loaded)"
            in verdict.checkpoint_note
        )
        assert verdict.in_place

    @pytest.mark.parametrize(
        ("dtype", "same", "other"),
        [
            (torch.float64, 9e-7, 1.1e-6),
            (torch.float32, 9e-4, 1.1e-3),
            (torch.bfloat16, 0.45, 0.55),
            (torch.float16, 0.45, 0.55),
        ],
    )
    def test_logits_are_alike_up_to_rounding(self, dtype, same: float, other: float) -> None:
        """Small ones by so much, and large ones by so much of themselves."""
        for logit, unit in ((0.0, 1.0), (1000.0, 1001.0)):
            logits = torch.full((2, 3), logit, dtype=dtype)
            for shift, expected in ((same, True), (other, False)):
                other_logits = logits.clone()
                other_logits[1, 2] += shift * unit
                # The tolerance is a share of the second.
                assert logits_alike(other_logits, logits) == expected
        assert not logits_alike(logits, logits[:1])

    def test_sublayers_ask_for_no_cut(self, refuse, watched) -> None:
        refuse(False, True)
        assert verdict_on("llama", [INTACT, Ablation.parse("mlp:2")]).sharing == FULL

    @pytest.mark.parametrize(
        ("dtype", "scale", "sharing"),
        [
            (None, 1e-9, FULL),
            (None, 1e-4, PLAIN),
            (torch.float32, 1e-5, DEPTH_ONLY),
            (torch.float32, 0.05, PLAIN),
            (torch.bfloat16, 0.01, DEPTH_ONLY),
            (torch.bfloat16, 1.0, PLAIN),
        ],
    )
    def test_rounding_is_no_nature(self, monkeypatch, request, watched, dtype, scale, sharing):
        """On a miniature, which computes in float64, and on models that have none."""
        monkeypatch.setattr(PlacedLayer, "scale", scale)
        model = make_llama(Placed)
        if dtype is not None:
            model = model.to(dtype)
            request.getfixturevalue("no_miniature")
        verdict = self.checked(model, (0,))
        assert (verdict.sharing, verdict.in_place) == (sharing, False)


class NoTwo(Placed):
    """No model of two layers can be made."""

    def __init__(self, config: Any) -> None:
        if config.num_hidden_layers == 2:
            raise ValueError("two are too few")
        super().__init__(config)


class Hidden(Placed):
    """Of what its layers multiply by, the weights say nothing."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        draw = torch.randn(1).item()
        for layer in self.model.layers:
            layer.scale = draw


def test_a_full_memory_is_no_verdict(monkeypatch) -> None:
    def compared(*_: Any) -> Comparison:
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(miniature_check, "compare_orders", compared)
    with pytest.raises(torch.OutOfMemoryError):
        verdict_on("llama")
