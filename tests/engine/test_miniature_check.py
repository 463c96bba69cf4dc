"""The check on a miniature: how it is named, what follows from it, what is lost and why."""

from __future__ import annotations

import importlib
import math
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.modeling_outputs import CausalLMOutput
from transformers.models.llama import modeling_llama
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from tests.helpers.ablations import single_layers
from tests.helpers.engines import MAX_LENGTH, asking, changed, engine_of, loaded
from tests.helpers.families import SMALL, tiny_model
from tracker.core.changes import INTACT, Ablation, Change
from tracker.core.documents import Document, Request, Response
from tracker.core.errors import CellError
from tracker.engine.forward.layer import RandomReplacement
from tracker.engine.refusal import RefusalError
from tracker.engine.scoring.model import DEPTH_ONLY, FULL, NO_PREFIX, ONE_BY_ONE, PLAIN, Sharing
from tracker.engine.scoring.rows import Lengths
from tracker.engine.scoring.sweep import Engine
from tracker.engine.selfcheck import miniature_check, quirks
from tracker.engine.selfcheck.miniature_check import (
    FIRST,
    check_longer_texts,
    compare_both_ways,
    most_sharing,
    probe_calls,
    reachable,
)
from tracker.engine.selfcheck.quirks import STEPS, Findings, as_removed, logits_alike
from tracker.engine.selfcheck.reference import Comparison, Reference, Verdict
from tracker.models.miniature import NumberPath
from tracker.models.pruned import put_back

ABLATIONS = single_layers((0, 1, 2, 3))
WINDOW = (("max_position_embeddings",),)

pytestmark = pytest.mark.usefixtures("one_thread")


def verdict_on(
    model: Any,
    ablations: Sequence[Ablation] = ABLATIONS,
    paths: Sequence[NumberPath] = (),
    blank: bool = False,
) -> Verdict:
    """Check an engine's model, or one, with no number in reach and no token without embedding."""
    engine = model if isinstance(model, Engine) else engine_of(model)
    return miniature_check.check_miniature(engine, ablations, paths, blank)


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
    monkeypatch.setattr(miniature_check, "miniature", lambda model: None)


class TestKey:
    def test_the_weights_and_where_they_come_from_do_not_count(self) -> None:
        key = key_of(tiny_model("llama"))
        assert len(key) == 64
        other = tiny_model("llama").bfloat16()
        other.model.norm.weight.mul_(2)
        other.config._name_or_path = "elsewhere"
        other.config.dtype = torch.bfloat16
        other.config.quantization_config = {"bits": 4}
        assert key_of(other) == key

    def test_all_that_the_verdict_follows_from_counts(self) -> None:
        model = tiny_model("llama")
        other = tiny_model("llama")
        other.config.rms_norm_eps = 0.5
        keys = [
            key_of(model),
            key_of(model, ABLATIONS[:-1]),
            key_of(model, [*ABLATIONS[:-1], Ablation.parse("mlp:3")]),
            key_of(model, paths=()),
            key_of(model, rows=(256, 192, 256)),
            key_of(model, blank=True),
            key_of(other),
            key_of(tiny_model("qwen2")),
        ]
        # Two classes of one file, too.
        keys += [key_of(kind(model.config)) for kind in (Placed, NoTwo)]
        for kernels, name in (("_attn", "eager"), ("_experts", "grouped_mm")):
            other = tiny_model("llama")
            setattr(other.config, f"{kernels}_implementation", name)
            keys.append(key_of(other))
        assert len(set(keys)) == 12

    def test_the_code_and_what_runs_it_count(self, monkeypatch) -> None:
        model = tiny_model("llama")
        keys = [key_of(model)]
        read: set[str] = set()

        def file_hash(paths: Iterable[Path]) -> str:
            read.update(f"{path.parent.name}/{path.name}" for path in paths)
            return "another"

        another = {name: lambda: {"another": "1"} for name in ("package_versions", "machine")}
        for name, other in {"file_hash": file_hash, **another}.items():
            with monkeypatch.context() as patched:
                patched.setattr(miniature_check, name, other)
                keys.append(key_of(model))
        assert len(set(keys)) == 4
        tracker = Path(__file__).parents[2] / "tracker"
        ours = [path for room in ("engine", "models") for path in (tracker / room).rglob("*.py")]
        theirs = Path(modeling_llama.__file__).parent.glob("*.py")
        assert read == {f"{path.parent.name}/{path.name}" for path in (*ours, *theirs)}

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
    near, far, farthest = (set(reachable(tiny_model("mistral"), n)) for n in (5, 255, 256))
    assert near < farthest
    assert farthest - far >= set(WINDOW)
    assert ("sliding_window",) in near


class TestVerdict:
    def test_what_the_engine_must_know_is_looked_up_in_the_model_itself(self) -> None:
        """The miniature's numbers are others: the paths are what is kept."""
        model = tiny_model("mistral")
        lengths = (
            (("max_position_embeddings",), False),
            (("sliding_window",), False),
            (("no_such_number",), False),
        )
        verdict = Verdict(FULL, lengths=lengths, stay=True)
        quirks = verdict.quirks(model)
        assert quirks.lengths == Lengths((256, 5))
        assert quirks.stay
        assert quirks.leftovers == quirks.first == {}
        found = replace(verdict, switches=((1233, True),)).quirks(model)
        assert found.lengths == Lengths((256, 5, 1233), each=True)
        calm = Verdict(FULL, lengths=(((), True),)).quirks(model)
        assert calm.lengths == Lengths((), each=True)
        assert not calm.stay

    def test_what_calls_change_is_remembered_as_it_is_now(self) -> None:
        model = tiny_model("llama")
        place = ("model.rotary_emb", "inv_freq")
        verdict = Verdict(
            FULL, None, 0.0, 10, leftovers=("inv_freq",), first=(place, ("model.gone", "x"))
        )
        quirks = verdict.quirks(model)
        before = model.model.rotary_emb.inv_freq.clone()
        model.model.rotary_emb.inv_freq.zero_()
        assert set(quirks.first) == {place}
        assert place in quirks.leftovers
        assert {name for _, name in quirks.leftovers} == {"inv_freq"}
        for state in (quirks.first, quirks.leftovers):
            assert torch.equal(state[place], before)

    def test_what_only_a_call_makes_is_known_to_be_absent(self) -> None:
        """So that a copy of the model begins without it."""
        model = tiny_model("llama")
        place = ("model.norm", "made_by_a_call")
        first = Verdict(FULL, first=(place,)).quirks(model).first
        assert list(first) == [place]
        model.model.norm.made_by_a_call = 7
        put_back(model, first)
        assert not hasattr(model.model.norm, "made_by_a_call")


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


def llama(kind: type) -> Any:
    """Make a model of a class of ours."""
    return kind(tiny_model("llama").config).eval()


APART = "a checkpoint without a layer is not the model that skips it, so nothing is shared"


class TestCheck:
    def test_an_architecture_that_shares_all(self) -> None:
        threads = torch.get_num_threads()
        verdict = verdict_on("llama")
        assert (verdict.sharing, verdict.lost, verdict.unsteady) == (FULL, None, 0)
        assert 0 < verdict.difference < 2e-4
        assert (verdict.lengths, verdict.leftovers, verdict.first) == ((), (), ())
        assert (verdict.stay, verdict.tried_on) == (False, "a miniature")
        assert torch.get_num_threads() == threads

    def test_every_answer_of_the_baseline_and_a_few_of_each_ablation(self) -> None:
        """The fewer ablations there are, the more each is asked; a few in both orders."""
        engine = engine_of("llama")
        everything = verdict_on(engine, [INTACT]).compared
        assert everything > 50
        assert verdict_on(engine, ABLATIONS[:2]).compared == 2 * everything
        parts = [
            Ablation.of(Change(part, some))
            for part in ("layer", "mlp", "attention")
            for count in (1, 2, 3)
            for some in combinations(range(4), count)
        ]
        assert len(parts) == 42
        for count, each in ((8, 2 * 128 // 9), (42, 4)):
            found = verdict_on(engine, [INTACT, *parts[:count]]).compared
            assert found == everything + each * count

    def test_a_few_ablations_are_asked_in_both_orders_and_of_many_half_in_each(self, spy) -> None:
        seen = spy(Engine, "score", lambda engine, *asked: asked)
        model = LlamaForCausalLM(LlamaConfig(**{**SMALL, "num_hidden_layers": 22})).eval()
        engine = engine_of(model)
        calls = [[asking(((5, 6), (7,)))], [asking(((8, 9), (n,)), index=n) for n in (3, 4)]]
        for count in (16, 17, 22):
            seen.clear()
            ablations = single_layers(tuple(range(count)))
            compare_both_ways(engine, calls, ablations, [], Reference(engine))
            assert [d for d, _ in seen] == [*calls, *(call[::-1] for call in calls[::-1])]
            removed = [{a.removed()[0] for a in scored if a != INTACT} for _, scored in seen]
            assert all(INTACT in scored for _, scored in seen)
            forth, back = removed[0], removed[-1]
            assert removed == [forth] * len(calls) + [back] * len(calls)
            assert forth | back == set(range(count))
            if count == 16:
                assert forth == back
                continue
            assert not forth & back
            assert len(back) - len(forth) in (0, 1)
        # In many a model every second layer, up to every sixth, is of another kind.
        for every in (2, 3, 4, 5, 6):
            kinds = [{layer % every for layer in some} for some in (forth, back)]
            assert kinds == [set(range(every))] * 2

    def test_rows_have_all_threads_and_single_texts_one(self, spy, request) -> None:
        rows, texts = (
            spy(Engine, name, lambda *_: torch.get_num_threads()) for name in ("score", "read")
        )
        request.addfinalizer(lambda: torch.set_num_threads(1))
        torch.set_num_threads(2)
        engine = engine_of(tiny_model("llama", num_hidden_layers=2))
        verdict_on(engine, ABLATIONS[:2])
        check_longer_texts(engine, ABLATIONS, Verdict(FULL), (64, 64, 64), False)
        assert (set(rows), set(texts)) == ({2}, {1})
        assert torch.get_num_threads() == 2
        request.getfixturevalue("no_miniature")
        verdict_on(engine, ABLATIONS[:2])
        assert set(texts) == {1, 2}

    def test_one_copy_without_each_ablation_says_what_it_is_and_what_is_right(self, spy) -> None:
        made = spy(Engine, "without", lambda engine, ablation, **how: ablation)
        verdict_on("llama")
        # Two more of the whole are asked longer and shorter texts, in one layers stand still.
        assert Counter(made) == {INTACT: 4, **dict.fromkeys(ABLATIONS[1:], 1)}

    @pytest.mark.usefixtures("no_miniature")
    def test_a_model_without_a_miniature_is_checked_itself(self, spy) -> None:
        seen = spy(Engine, "score", lambda engine, documents, of: list(documents))
        engine = engine_of("llama")
        verdict = verdict_on(engine)
        # Always with the same texts, the first of those that miniatures are given.
        assert verdict_on(engine) == verdict
        assert seen[2:] == seen[:2] == [seen[0], seen[0][::-1]]
        assert seen[0] == probe_calls(97, MAX_LENGTH)[0][:4]
        assert verdict.sharing == DEPTH_ONLY
        assert verdict.tried_on == "the model"
        assert verdict.difference < 2e-4
        # Four documents of two requests, each other ablation one of them, in both orders.
        assert verdict.compared == 2 * (4 * 2 + 4)
        assert verdict.lengths == (((), True),)
        assert verdict.lost == (
            "no miniature of the model can be built on which sharing over tokens could be proven"
        )
        # No length is believed of it anyway.
        assert check_longer_texts(engine, ABLATIONS, verdict, (256, 192, 256), False) is verdict

    @pytest.mark.usefixtures("no_miniature")
    def test_what_stands_in_for_its_layers_is_made_up(self) -> None:
        """It is fitted later, on a model whose quirks are known."""
        fitted = [Ablation.parse(f"{done}:2") for done in ("mean", "scale", "linear")]
        verdict = verdict_on("llama", [INTACT, *fitted])
        assert (verdict.sharing, verdict.difference < 2e-4) == (DEPTH_ONLY, True)

    def test_a_checkpoint_whose_layers_moved_up_is_measured_and_shares_nothing(self) -> None:
        """It is what a pruned checkpoint is, and not the model with a layer that is skipped."""
        engine = engine_of(llama(Placed))
        verdict = verdict_on(engine)
        assert (verdict.sharing, verdict.lost, verdict.stay) == (PLAIN, APART, False)
        # Without the last layer, the others stay where they are.
        assert verdict_on(engine, [INTACT, Ablation.parse("layer:3")]).sharing == FULL

    @pytest.mark.parametrize(
        ("unsteady", "sharing", "lost"),
        [
            (20, FULL, None),
            (
                21,
                ONE_BY_ONE,
                "nothing is shared, and each request is asked alone, because a call of several "
                "texts changes a log-likelihood by 0.5 nats, mostly where the model is "
                "discontinuous (21 answers)",
            ),
        ],
    )
    def test_one_answer_in_fifty_may_be_at_a_discontinuity(
        self, watched, unsteady: int, sharing: Sharing, lost: str | None
    ) -> None:
        """A model that is so just as often cannot be made."""
        watched.found = (Comparison(1000, 0.5, unsteady),)
        assert verdict_on("llama") == Verdict(sharing, lost, 0.5, 1000, unsteady)

    def test_what_is_not_causal_is_refused(self) -> None:
        def looking(model: Any, forward: Any, *args: Any, **kwargs: Any) -> Any:
            output = forward(*args, **kwargs)
            output.logits = output.logits + output.logits[:, -1:]
            return output

        said = (
            r"^Changed is not causal: what it says of a token depends on later tokens of the same "
            r"call, so no two ways to ask it agree$"
        )
        with pytest.raises(CellError, match=said):
            verdict_on(changed(tiny_model("llama"), looking))


RIGHT = Comparison(100, 1e-6)
WRONG = Comparison(9, 0.123456, 0, "document 0")


class Watched:
    """Stands in for the comparison; remembers with which engine and what was compared."""

    def __init__(self) -> None:
        self.engines: list[Engine] = []
        self.asked: list[Sequence[tuple[Ablation, int, int, int]]] = []
        self.truths: list[Reference] = []
        self.found: tuple[Comparison, ...] = (RIGHT,)

    def __call__(self, engine: Engine, calls: Any, of: Any, asked: Any, truth: Any) -> Comparison:
        self.engines.append(engine)
        self.asked.append(asked)
        self.truths.append(truth)
        return self.found[min(len(self.engines), len(self.found)) - 1]


@pytest.fixture
def watched(monkeypatch) -> Watched:
    watched = Watched()
    monkeypatch.setattr(miniature_check, "compare_both_ways", watched)
    return watched


@pytest.fixture
def found(monkeypatch) -> Callable[..., Findings]:
    """Lets experiments find some things."""

    def found(**findings: Any) -> Findings:
        findings = Findings(**findings)
        monkeypatch.setattr(miniature_check, "find_quirks", lambda *_: findings)
        return findings

    return found


@pytest.fixture
def as_it_is(monkeypatch) -> None:
    """Leaves out the question what the model without a layer is."""
    monkeypatch.setattr(miniature_check, "as_removed", lambda truth, of, verdict: verdict)


class TestMiniatures:
    """What is found on one is believed of the next, and of the model."""

    def test_it_is_scored_as_a_model_that_reads_as_much(self, watched) -> None:
        for most, read in ((2048, 96), (50, 50)):
            elsewhere = replace(loaded(tiny_model("llama")), device=torch.device("meta"))
            verdict_on(Engine(elsewhere, most))
            engine = watched.engines.pop()
            assert (engine.max_length, engine.row_tokens) == (read, 40)
            assert engine.loaded.device == torch.device("cpu")
            assert engine.loaded.model.num_parameters() < 10**6
            assert list(engine.loaded.layers) == list(engine.loaded.model.model.layers)
            assert engine.replacements == {layer: RandomReplacement(layer) for layer in range(4)}
            # What is free on this machine is no matter.
            assert engine.memory == 2**30

    @pytest.mark.parametrize("blank", [True, False])
    def test_a_token_of_theirs_has_an_embedding_of_zeros_where_one_of_the_cell_has(
        self, watched, blank: bool
    ) -> None:
        engine = engine_of("mistral", max_length=2048)
        verdict = verdict_on(engine, paths=(("sliding_window",),), blank=blank)
        check_longer_texts(engine, ABLATIONS, verdict, (128, 77, 128), blank)
        assert len(watched.engines) == 3
        for made in watched.engines:
            zero = ~made.loaded.model.get_input_embeddings().weight.any(-1)
            assert zero.nonzero().flatten().tolist() == [FIRST] * blank
        texts = {
            token for call in probe_calls(97, 96) for d in call for token in d.requests[0].context
        }
        assert min(texts) == FIRST
        assert engine.loaded.model.get_input_embeddings().weight[FIRST].all()

    def test_longer_texts_come_in_rows_as_the_cell_has_them(self, watched) -> None:
        engine = engine_of("llama", max_length=2048)
        check_longer_texts(engine, ABLATIONS, Verdict(FULL), (300, 77, 300), False)
        (made,), (asked,) = watched.engines, watched.asked
        assert (made.max_length, made.row_tokens) == (300, 77)
        # The intact model answers all that is asked, one other a part: of each call one.
        answered = Counter(of for of, *_ in asked)
        other = ABLATIONS[len(ABLATIONS) // 2]
        assert set(answered) == {INTACT, other}
        assert answered[INTACT] > answered[other] == 4
        assert [call for of, call, *_ in asked if of == other] == [0, 1, 2, 3]

    @pytest.mark.usefixtures("as_it_is", "watched")
    def test_one_copy_is_asked_longer_and_longer_texts_and_another_shorter_ones(self, spy) -> None:
        asked = spy(Engine, "answer", lambda engine, request: (engine, request.length))
        verdict_on("llama")
        rising = [length for engine, length in asked if engine is asked[0][0]]
        falling = [length for engine, length in asked if engine is asked[-1][0]]
        assert len(asked) == 2 * len(rising)
        assert rising == sorted(rising) == falling[::-1]
        calls = probe_calls(97, MAX_LENGTH)
        assert rising[-1] == max(d.requests[-1].length for call in calls for d in call)
        assert 4 < len(rising) < 10

    @pytest.mark.usefixtures("as_it_is", "watched")
    def test_what_is_not_said_of_them_is_told_of_later_and_a_bug_of_ours_is_raised(
        self, monkeypatch
    ) -> None:
        engine = engine_of("llama")
        errors = iter([RefusalError("it takes no texts"), ZeroDivisionError("ours")])

        def answer(engine: Engine, request: Request) -> Response:
            raise next(errors)

        monkeypatch.setattr(Engine, "answer", answer)
        assert verdict_on(engine).sharing == FULL
        with pytest.raises(ZeroDivisionError, match="ours"):
            verdict_on(engine)

    @pytest.mark.usefixtures("as_it_is", "watched")
    @pytest.mark.parametrize(
        ("one", "other", "same"),
        [
            (math.nan, math.nan, True),
            (math.nan, 0.0, False),
            (-1.0, -1.0001, True),
            (-1.0, -1.001, False),
            (-1000.0, -1000.005, True),
        ],
    )
    def test_both_copies_say_the_same_but_for_rounding(
        self, monkeypatch, one: float, other: float, same: bool
    ) -> None:
        asked: list[Engine] = []

        def answer(engine: Engine, request: Request) -> Response:
            asked.append(engine)
            return Response(one if engine is asked[0] else other, False, 0)

        monkeypatch.setattr(Engine, "answer", answer)
        said = f"says {one:g} nats of a text after shorter ones, and {other:g} after longer ones"
        with nullcontext() if same else pytest.raises(CellError, match=said):
            assert verdict_on("llama").sharing == FULL

    def test_the_truth_of_a_miniature_is_told_from_that_of_a_model(self, watched, request) -> None:
        """NaN proves nothing of a miniature, and a real model may say it."""
        verdict_on("llama")
        request.getfixturevalue("no_miniature")
        verdict_on("llama")
        assert [truth.miniature for truth in watched.truths] == [True, False]

    def test_a_model_that_names_no_head_is_asked_what_it_reads(self, monkeypatch, watched) -> None:
        model = tiny_model("llama")
        monkeypatch.setattr(type(model), "get_output_embeddings", lambda self: None)
        assert verdict_on(model).sharing == FULL

    def test_habits_are_found_once_and_hold_for_all(self, spy, watched, found) -> None:
        window = ("sliding_window",)
        places = (("model.rotary_emb", "inv_freq"), ("model.rotary_emb", "original_inv_freq"))
        found(matters=(window,), lengths=((window, False),), first=frozenset(places))
        tried = spy(miniature_check, "find_quirks", lambda *given: given)
        watched.found = (RIGHT, Comparison(50, 1e-5, 1))
        verdict = verdict_on("mistral", paths=(window,))
        ((small, paths),) = tried
        assert paths == (window,)
        assert [each.loaded.model is small for each in watched.engines] == [True, False]
        # One with its window as it is, and one whose window is crossed by short texts.
        windows = [each.loaded.model.config.sliding_window for each in watched.engines]
        assert windows == [small.config.sliding_window, STEPS[0]]
        assert [e.quirks.lengths for e in watched.engines] == [Lengths((w,)) for w in windows]
        assert verdict == Verdict(
            FULL, None, 1e-5, 150, 1, ((window, False),), (), tuple(sorted(places))
        )

    def test_each_ablation_is_asked_in_every_call(self, watched) -> None:
        """Branches, both sides of a threshold, and two kept beginnings."""
        sets = [some for count in range(4) for some in combinations(range(4), count)]
        ablations = [Ablation.of(removed=some) for some in sets]
        verdict_on("llama", ablations)
        (asked,) = watched.asked
        assert asked == sorted(asked, key=lambda place: (ablations.index(place[0]), place[1:]))
        for ablation in ablations:
            calls = Counter(call for of, call, *_ in asked if of == ablation)
            if ablation == INTACT:
                continue
            assert set(calls) == {0, 1, 2, 3}
            assert max(calls.values()) - min(calls.values()) <= 1

    def test_the_same_is_asked_every_time(self, watched) -> None:
        """Also of the ablations of which only some requests are."""
        many = [
            *ABLATIONS,
            *(Ablation.parse(f"mlp:{n}") for n in range(4)),
            Ablation.parse("layers:1,2"),
        ]
        for _ in range(2):
            verdict_on("llama", [*many, *many[1:4]])
        one, other = watched.asked
        assert one == other
        assert len(one) < len(many) * len([of for of, *_ in one if of == INTACT])

    @pytest.mark.parametrize("every", [True, False])
    def test_a_model_to_which_every_length_is_another(self, watched, found, every: bool) -> None:
        lengths = (((), True),) if every else ()
        found(lengths=lengths, leftovers=frozenset({"inv_freq", "attention_scaling"}))
        verdict = verdict_on("llama")
        assert verdict.lengths == lengths
        assert verdict.leftovers == ("attention_scaling", "inv_freq")
        assert watched.engines[0].quirks.lengths.each == every
        assert watched.engines[0].quirks.leftovers

    def test_what_one_lost_the_next_is_not_asked(self, watched, found) -> None:
        wrong = Comparison(3, 0.25, 0, "document 0")
        watched.found = (wrong, Comparison(10, 1e-3), wrong, RIGHT)
        found(matters=(("sliding_window",),))
        verdict = verdict_on("mistral")
        tried = [engine.sharing for engine in watched.engines]
        assert tried == [FULL, NO_PREFIX, NO_PREFIX, DEPTH_ONLY]
        assert (verdict.sharing, verdict.difference, verdict.compared) == (DEPTH_ONLY, 1e-3, 110)
        assert verdict.lost == (
            "shared over depth alone, and not over tokens or documents, because sharing more "
            "changes a log-likelihood by 0.25 nats"
        )

    def test_what_differs_with_nothing_shared_is_asked_one_by_one(self, watched) -> None:
        wrong = Comparison(3, 0.25, 2, "-1 nats shared")
        watched.found = (*[wrong] * 4, Comparison(100, 0.5, 99))
        verdict = verdict_on("llama")
        # However often the model is discontinuous: nothing less is left to share.
        assert (verdict.sharing, verdict.unsteady) == (ONE_BY_ONE, 99)
        watched.found = (wrong,)
        watched.engines.clear()
        with pytest.raises(CellError, match=r"^LlamaForCausalLM contradicts itself: -1 nats sh"):
            verdict_on("llama")


def test_less_than_was_lost_before_is_not_tried() -> None:
    """Another sharing than these two would be a KeyError; and no copy is made to see why."""
    compare = {DEPTH_ONLY: WRONG, PLAIN: RIGHT}.__getitem__
    engine: Any = SimpleNamespace(class_name="Model")
    found = most_sharing(DEPTH_ONLY, engine, compare)
    assert found == (PLAIN, RIGHT, "sharing more changes a log-likelihood by 0.123 nats")


@pytest.mark.parametrize(
    ("lost", "said"),
    [
        ([WRONG, RefusalError("no such mask")], "no such mask"),
        ([RefusalError("no such mask"), WRONG], "sharing more changes a log-likelihood by 0.123"),
    ],
)
def test_what_was_lost_last_says_why(lost, said: str) -> None:
    """It is the least, so that its reason holds for all that was lost before."""
    given = dict(zip((FULL, NO_PREFIX, DEPTH_ONLY), [*lost, RIGHT], strict=True))

    def compare(sharing: Sharing) -> Comparison:
        if isinstance(found := given[sharing], RefusalError):
            raise found
        return found

    copied = SimpleNamespace(device="cpu")
    engine: Any = SimpleNamespace(class_name="Model", copy=lambda: copied)
    sharing, found, why = most_sharing(FULL, engine, compare)
    assert (sharing, found) == (DEPTH_ONLY, RIGHT)
    assert why.startswith(said)


def test_a_full_memory_is_no_loss(monkeypatch) -> None:
    def compared(*_: Any) -> Comparison:
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(miniature_check, "compare_both_ways", compared)
    with pytest.raises(torch.OutOfMemoryError):
        verdict_on("llama")


@pytest.mark.parametrize("reverse", [False, True])
def test_an_error_in_one_order_is_found(monkeypatch, reverse: bool) -> None:
    """The last answer of the last document, under the last ablation."""
    honest, seen = Engine.score, []

    def wrong(self: Engine, documents: Sequence[Document], *rest: Any) -> Any:
        seen.append(documents)
        scores = honest(self, documents, *rest)
        is_reverse = documents[0].index > documents[-1].index
        if self.sharing == FULL and len(documents) == 3 and is_reverse == reverse:
            answers = scores[-1].responses[-1]
            answers[-1] = Response(answers[-1].loglikelihood - 0.5, False, 0)
        return scores

    monkeypatch.setattr(Engine, "score", wrong)
    verdict = verdict_on("llama", ABLATIONS[:2])
    assert verdict.sharing == NO_PREFIX
    assert verdict.lost == (
        "shared over depth and tokens, and not what documents begin with, because sharing more "
        "changes a log-likelihood by 0.5 nats"
    )
    # What is wrong once is asked no further.
    assert len(seen) == (4 + 1 if reverse else 3) + 8


class TestCut:
    """What the model without a layer is, and what is said where it is nothing."""

    @pytest.fixture
    def refuse(self, monkeypatch) -> Callable[..., None]:
        """Let models without layer 2 not run: cut, or with the layer in its place."""

        def refuse(*stay: bool, error: Exception | None = None) -> None:
            honest, honest_handing_on = Engine.without, quirks._handing_on

            def without(self: Engine, ablation: Ablation, **how: bool) -> Engine:
                if 2 in ablation.removed() and self.quirks.stay in stay:
                    raise error or RefusalError(f"no such model {self.quirks.stay:d}")
                return honest(self, ablation, **how)

            def refusing(*_: Any) -> None:
                raise error or RefusalError("no such model 1")

            @contextmanager
            def handing_on(engine: Engine, ablation: Ablation) -> Iterator[None]:
                with honest_handing_on(engine, ablation):
                    if 2 not in ablation.removed() or True not in stay:
                        yield
                        return
                    handle = engine.loaded.layers[2].register_forward_pre_hook(refusing)
                    yield
                    handle.remove()

            monkeypatch.setattr(Engine, "without", without)
            monkeypatch.setattr(quirks, "_handing_on", handing_on)

        return refuse

    def checked(self, model: Any, *removed: tuple[int, ...]) -> Verdict:
        return verdict_on(model, [INTACT, *(Ablation.of(removed=layers) for layers in removed)])

    @pytest.mark.parametrize(("removed", "what"), [((2,), "layer 2"), ((1, 2), "layers 1, 2")])
    def test_it_runs_in_no_way(self, refuse, watched, removed, what) -> None:
        refuse(False, True)
        said = (
            f"^LlamaForCausalLM does not run without {what} \\(no such model 0\\); "
            "leave it out of 'layer'$"
        )
        with pytest.raises(CellError, match=said):
            self.checked("llama", (0,), removed)

    def test_it_cannot_be_cut(self, refuse, watched) -> None:
        refuse(False)
        verdict = self.checked("llama", (0,), (2,))
        assert (verdict.stay, verdict.sharing, verdict.lost) == (True, FULL, None)
        assert watched.engines[0].quirks.stay

    def test_it_can_only_be_cut(self, refuse, watched) -> None:
        """Then it is a checkpoint, of which nothing proves that it is the model that skips."""
        refuse(True)
        verdict = self.checked("llama", (0,), (2,))
        assert (verdict.stay, verdict.sharing, verdict.lost) == (False, PLAIN, APART)

    def test_some_layers_by_nature_and_others_not_at_all(self, watched) -> None:
        said = (
            r"^Fussy cannot be cut to be without layers 0, 1 \(two are too few to run\); "
            "leave it out of 'layer'$"
        )
        with pytest.raises(CellError, match=said):
            self.checked(llama(Fussy), (0, 1), (0,))

    def test_what_no_checkpoint_is_stays_in_its_place(self, watched) -> None:
        """The class cannot be made of two layers, so that it is nothing by its own nature."""
        model = llama(NoTwo)
        assert self.checked(model, (3,)).stay is False
        alone = self.checked(model, (0, 1))
        assert (alone.stay, alone.loaded, alone.sharing) == (True, False, FULL)
        said = (
            "what is measured is the model whose layer stays in its place and hands on its input, "
            "not a saved checkpoint (no configuration describes what is left)"
        )
        assert alone.which == f"whatever is removed, {said}"
        # Beside a layer without which there is one, each is what it can be.
        both = self.checked(model, (0,), (0, 1))
        assert (both.stay, both.loaded, both.sharing) == (True, True, PLAIN)
        assert both.which == f"without layers 0, 1, {said}"

    def test_a_layer_that_is_passed_again_does_not_hand_on_its_input(self, watched) -> None:
        """It was said to, as a removed one does."""
        again = Ablation.parse("repeat:1")
        for ablations in ([again], [Ablation.parse("layer:1"), again]):
            verdict = verdict_on("jamba_eager", [INTACT, *ablations])
            clauses = verdict.which.split("; ")
            assert clauses[-1] == (
                "whatever is passed again, what is measured is the model that passes these layers "
                "again in memory, not a saved checkpoint (no configuration describes what is left)"
            )
            assert len(clauses) == len(ablations)
            assert all("hands on its input" in clause for clause in clauses[:-1])

    def test_a_model_that_is_another_when_it_is_loaded_has_no_checkpoint(self, watched) -> None:
        """What a class makes of a configuration alone is no proof."""
        verdict = self.checked(llama(Hidden), (0,))
        assert "(the model itself, saved and loaded, is another one)" in verdict.which
        assert verdict.stay

    def test_a_checkpoint_begins_as_no_call_has_changed_it(self, watched, found) -> None:
        """What the first call changes is known by its place in the whole model."""
        found(first=frozenset({("model.layers.3.self_attn", "scaling")}))
        verdict = self.checked(llama(Placed), (0,))
        assert (verdict.sharing, verdict.stay) == (PLAIN, False)

    def test_all_of_it_happens_where_the_model_is(self) -> None:
        """The device without numbers stands for an accelerator."""
        device = torch.device("meta")
        model = llama(Elsewhere).to(device)
        engine = Engine(replace(loaded(model), device=device), MAX_LENGTH)
        verdict = as_removed(Reference(engine), ABLATIONS[:2], Verdict(FULL))
        assert (verdict.sharing, verdict.stay) == (PLAIN, False)

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
            one = torch.full((2, 3), logit, dtype=dtype)
            for far, expected in ((same, True), (other, False)):
                two = one.clone()
                two[1, 2] += far * unit
                # The tolerance is a share of the second.
                assert logits_alike(two, one) == expected
        assert not logits_alike(one, one[:1])

    @pytest.mark.usefixtures("no_miniature")
    def test_a_model_without_a_miniature_is_cut_itself(self, refuse, watched) -> None:
        model = tiny_model("llama")
        refuse(False)
        assert self.checked(model, (2,)).stay is True
        (engine,) = watched.engines
        assert engine.loaded.model is model
        assert engine.quirks.stay
        assert engine.quirks.lengths == Lengths((), each=True)
        refuse(True)
        with pytest.raises(CellError, match=r"^LlamaForCausalLM does not run without layer 2 "):
            self.checked(model, (2,))

    @pytest.mark.parametrize("small", [True, False])
    def test_a_model_may_not_run_at_all(self, monkeypatch, request, small: bool) -> None:
        def compared(*_: Any) -> Comparison:
            raise RefusalError("no such mask")

        if not small:
            request.getfixturevalue("no_miniature")
        monkeypatch.setattr(miniature_check, "compare_both_ways", compared)
        said = r"^LlamaForCausalLM cannot be asked one request at a time: no such mask$"
        with pytest.raises(CellError, match=said):
            self.checked("llama", (2,))

    def test_sublayers_ask_for_no_cut(self, refuse, watched) -> None:
        refuse(False, True)
        assert verdict_on("llama", [INTACT, Ablation.parse("mlp:2")]).sharing == FULL

    def test_an_error_of_ours_is_raised(self, refuse, watched) -> None:
        refuse(False, error=ZeroDivisionError("ours"))
        with pytest.raises(ZeroDivisionError, match="ours"):
            self.checked("llama", (2,))

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
    def test_rounding_is_no_nature(
        self, monkeypatch, request, watched, dtype, scale: float, sharing: Sharing
    ) -> None:
        """On a miniature, which computes in float64, and on models that have none."""
        monkeypatch.setattr(PlacedLayer, "scale", scale)
        model = llama(Placed)
        if dtype is not None:
            model = model.to(dtype)
            request.getfixturevalue("no_miniature")
        verdict = self.checked(model, (0,))
        assert (verdict.sharing, verdict.stay) == (sharing, False)

    @pytest.mark.usefixtures("no_miniature", "watched")
    def test_what_is_not_finite_either_way_is_the_same(self) -> None:
        model = tiny_model("llama")
        model.lm_head.weight[7] = torch.nan
        verdict = self.checked(model, (1,))
        assert (verdict.sharing, verdict.stay) == (DEPTH_ONLY, False)


class NoTwo(Placed):
    """No model of two layers can be made."""

    def __init__(self, config: Any) -> None:
        if config.num_hidden_layers == 2:
            raise ValueError("two are too few")
        super().__init__(config)


class Fussy(Placed):
    """A model of two layers can be made, and does not run."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.config.num_hidden_layers == 2:
            raise ValueError("two are too few to run")
        return super().forward(*args, **kwargs)


class Hidden(Placed):
    """Of what its layers multiply by, the weights say nothing."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        draw = torch.randn(1).item()
        for layer in self.model.layers:
            layer.scale = draw


class Elsewhere(LlamaForCausalLM):  # type: ignore[misc]
    """Its answers depend on how many layers it has; it reads what lies where it is itself."""

    def forward(self, input_ids: torch.Tensor, use_cache: bool | None = None) -> Any:
        if input_ids.device != self.device or use_cache is not False:
            raise RuntimeError(f"{input_ids.device}, not {self.device}, or not False: {use_cache}")
        layers = float(len(self.model.layers))
        return CausalLMOutput(logits=torch.full((*input_ids.shape, 97), layers))
