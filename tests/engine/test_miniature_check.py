"""The attack's own parts: by what it is named, what follows from it, what is lost and why."""

from __future__ import annotations

import importlib
import itertools
import math
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from itertools import combinations
from pathlib import Path as FilePath
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.modeling_outputs import CausalLMOutput
from transformers.models.llama import modeling_llama
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from tests.ablations import single_layers
from tests.engine.families import SMALL
from tests.engine.plain import MAX_LENGTH, loaded
from tracker.core.ablations import INTACT, Ablation, ablate
from tracker.core.documents import Document, Request, Response
from tracker.core.errors import CellError
from tracker.engine.refusal import RefusalError
from tracker.engine.scoring.prefix import SHORTEST
from tracker.engine.scoring.rows import Lengths, common_beginning
from tracker.engine.scoring.sharing import DEPTH_ONLY, FULL, NO_PREFIX, ONE_BY_ONE, PLAIN, Sharing
from tracker.engine.scoring.stand_in import MadeUp
from tracker.engine.scoring.sweep import Engine
from tracker.engine.selfcheck import miniature_check
from tracker.engine.selfcheck.miniature_check import check_longer_texts, most_sharing, reachable
from tracker.engine.selfcheck.probe_texts import FIRST, probe_calls
from tracker.engine.selfcheck.quirks import STEPS, Findings, Path
from tracker.engine.selfcheck.reference import Comparison, Reference
from tracker.engine.selfcheck.removability import _alike, _handing_on, as_removed
from tracker.engine.selfcheck.verdict import Verdict
from tracker.models.pruned import put_back

ABLATIONS = single_layers((0, 1, 2, 3))
WINDOW = (("max_position_embeddings",),)

pytestmark = pytest.mark.usefixtures("one_thread")


def attack(
    engine: Engine, ablations: Sequence[Ablation], paths: Sequence[Path] = (), blank: bool = False
) -> Verdict:
    """Attack with no number in reach, and no token without an embedding."""
    return miniature_check.check_miniature(engine, ablations, paths, blank)


def attack_key(
    model: Any,
    ablations: Sequence[Ablation],
    paths: Sequence[Path],
    rows: tuple[int, int] | None = None,
    blank: bool = False,
) -> str:
    return miniature_check.miniature_key(model, ablations, paths, rows, blank)


class TestKey:
    def test_the_weights_and_where_they_come_from_do_not_count(self, tiny_model) -> None:
        key = attack_key(tiny_model("llama"), ABLATIONS, WINDOW)
        assert len(key) == 64
        other = tiny_model("llama").bfloat16()
        other.model.norm.weight.mul_(2)
        other.config._name_or_path = "elsewhere"
        other.config.dtype = torch.bfloat16
        other.config.quantization_config = {"bits": 4}
        assert attack_key(other, ABLATIONS, WINDOW) == key

    def test_all_that_the_verdict_follows_from_counts(self, tiny_model) -> None:
        model = tiny_model("llama")
        other = tiny_model("llama")
        other.config.rms_norm_eps = 0.5
        keys = [
            attack_key(model, ABLATIONS, WINDOW),
            attack_key(model, ABLATIONS[:-1], WINDOW),
            attack_key(model, [*ABLATIONS[:-1], ablate("mlp", [3])], WINDOW),
            attack_key(model, ABLATIONS, ()),
            attack_key(model, ABLATIONS, WINDOW, (256, 192)),
            attack_key(model, ABLATIONS, WINDOW, blank=True),
            attack_key(other, ABLATIONS, WINDOW),
            attack_key(tiny_model("qwen2"), ABLATIONS, WINDOW),
        ]
        # Two classes of one file, too.
        keys += [attack_key(kind(model.config), ABLATIONS, WINDOW) for kind in (Placed, NoTwo)]
        for kernels, name in (("_attn", "eager"), ("_experts", "grouped_mm")):
            other = tiny_model("llama")
            setattr(other.config, f"{kernels}_implementation", name)
            keys.append(attack_key(other, ABLATIONS, WINDOW))
        assert len(set(keys)) == 12

    def test_a_configuration_may_name_no_kernels(self) -> None:
        class Bare:
            config = SimpleNamespace(to_dict=dict)

        assert attack_key(Bare(), ABLATIONS, ()) != attack_key(Bare(), ABLATIONS, WINDOW)

    def test_the_code_and_what_runs_it_count(self, tiny_model, monkeypatch) -> None:
        model = tiny_model("llama")
        keys = [attack_key(model, ABLATIONS, ())]
        read: set[str] = set()
        with monkeypatch.context() as patched:
            patched.setattr(
                "tracker.engine.selfcheck.miniature_check.file_hash",
                lambda paths: read.update(f"{p.parent.name}/{p.name}" for p in paths) or "another",
            )
            keys.append(attack_key(model, ABLATIONS, ()))
        for name in ("package_versions", "machine"):
            with monkeypatch.context() as patched:
                patched.setattr(
                    f"tracker.engine.selfcheck.miniature_check.{name}", lambda: {"another": "1"}
                )
                keys.append(attack_key(model, ABLATIONS, ()))
        assert len(set(keys)) == 4
        tracker = FilePath(__file__).parents[2] / "tracker"
        ours = [path for room in ("engine", "models") for path in (tracker / room).rglob("*.py")]
        theirs = FilePath(modeling_llama.__file__).parent.glob("*.py")
        assert read == {f"{path.parent.name}/{path.name}" for path in (*ours, *theirs)}

    def test_code_that_a_checkpoint_brings_counts(self, tiny_model, tmp_path, monkeypatch) -> None:
        """Its authors change it without changing a name: what was proven no longer holds."""
        code = tmp_path / "modeling_of_a_checkpoint.py"
        code.write_text("import transformers\nclass Own(transformers.LlamaForCausalLM): pass\n")
        monkeypatch.syspath_prepend(tmp_path)
        sys.modules.pop(code.stem, None)  # of a run before, as mutmut makes several in a process
        model = importlib.import_module(code.stem).Own(tiny_model("llama").config)
        key = attack_key(model, ABLATIONS, WINDOW)
        assert attack_key(model, ABLATIONS, WINDOW) == key
        code.write_text(code.read_text() + "    scale = 2\n")
        assert attack_key(model, ABLATIONS, WINDOW) != key


def test_a_number_that_no_row_reaches_is_not_experimented_with(tiny_model) -> None:
    model = tiny_model("mistral")
    path = ("max_position_embeddings",)
    assert path in reachable(model, 256)
    assert path not in reachable(model, 255)
    assert set(reachable(model, 5)) < set(reachable(model, 256))
    assert ("sliding_window",) in reachable(model, 5)


class TestVerdict:
    def test_what_the_engine_must_know_is_looked_up_in_the_model_itself(self, tiny_model) -> None:
        """The miniature's numbers are others: the paths are what is kept."""
        model = tiny_model("mistral")
        lengths = (
            (("max_position_embeddings",), False),
            (("sliding_window",), False),
            (("no_such_number",), False),
        )
        verdict = Verdict(FULL, None, 0.0, 10, lengths=lengths, stay=True)
        quirks = verdict.quirks(model)
        assert quirks.lengths == Lengths((256, 5))
        assert quirks.stay
        assert quirks.leftovers == quirks.first == {}
        found = replace(verdict, switches=((1233, True),)).quirks(model)
        assert found.lengths == Lengths((256, 5, 1233), each=True)
        calm = Verdict(FULL, None, 0.0, 10, lengths=(((), True),)).quirks(model)
        assert calm.lengths == Lengths((), each=True)
        assert not calm.stay

    def test_what_calls_change_is_remembered_as_it_is_now(self, tiny_model) -> None:
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

    def test_what_only_a_call_makes_is_known_to_be_absent(self, tiny_model) -> None:
        """So that a copy of the model begins without it."""
        model = tiny_model("llama")
        place = ("model.norm", "made_by_a_call")
        first = Verdict(FULL, None, 0.0, 10, first=(place,)).quirks(model).first
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


def answers(given: dict[Sharing, Comparison | Exception]) -> Callable[[Sharing], Comparison]:
    """Compare as given, and fail where something else is asked."""

    def compare(sharing: Sharing) -> Comparison:
        found = given[sharing]
        if isinstance(found, Exception):
            raise found
        return found

    return compare


class Model:
    """It is only named, and does not run."""

    device = torch.device("cpu")


MODEL = Model()


def copy() -> None:
    """What tells no reason is not copied to look for one."""
    pytest.fail("a copy was made")


WRONG = Comparison(9, 0.123456, 0, "document 0")
UNSTEADY = Comparison(9, 7.0, 3, "document 0")


class TestMostSharing:
    RIGHT = Comparison(9, 1e-6)

    def test_what_is_exact_is_taken_at_once(self) -> None:
        for start in (FULL, NO_PREFIX, DEPTH_ONLY, PLAIN, ONE_BY_ONE):
            found = most_sharing(start, MODEL, answers({start: self.RIGHT}), copy)
            assert found == (start, self.RIGHT, None)

    @pytest.mark.parametrize(
        ("lost", "said"),
        [
            ([WRONG], "sharing more changes a log-likelihood by 0.123 nats"),
            ([WRONG, RefusalError("no such mask")], "no such mask"),
            (
                [RefusalError("no such mask"), WRONG, UNSTEADY],
                "sharing more changes a log-likelihood by 7 nats, mostly where the model is "
                "discontinuous "
                "(3 answers)",
            ),
            ([UNSTEADY] * 3 + [WRONG], "a call of several texts changes a log-likelihood by 0.123"),
        ],
    )
    def test_what_was_lost_last_says_why(self, lost, said: str) -> None:
        """It is the least, so that its reason holds for all that was lost before."""
        given = dict(zip((FULL, NO_PREFIX, DEPTH_ONLY, PLAIN), lost, strict=False))
        left = (FULL, NO_PREFIX, DEPTH_ONLY, PLAIN, ONE_BY_ONE)[len(lost)]
        sharing, found, why = most_sharing(
            FULL, MODEL, answers({**given, left: self.RIGHT}), lambda: MODEL
        )
        assert (sharing, found) == (left, self.RIGHT)
        assert why.startswith(said)

    def test_less_than_was_lost_before_is_not_tried(self) -> None:
        given = answers({DEPTH_ONLY: WRONG, PLAIN: self.RIGHT})
        found = most_sharing(DEPTH_ONLY, MODEL, given, copy)
        assert found == (PLAIN, self.RIGHT, "sharing more changes a log-likelihood by 0.123 nats")

    def test_a_model_that_does_not_run_at_all_is_no_loss(self) -> None:
        no = RefusalError("no such mask")
        given = answers({PLAIN: no, ONE_BY_ONE: no})
        with pytest.raises(
            CellError, match=r"^Model cannot be asked one request at a time: no such mask$"
        ):
            most_sharing(PLAIN, MODEL, given, copy)

    @pytest.mark.parametrize("where", [FULL, PLAIN])
    def test_a_full_memory_is_no_loss_either(self, where: Sharing) -> None:
        with pytest.raises(torch.OutOfMemoryError):
            most_sharing(where, MODEL, answers({where: torch.OutOfMemoryError("full")}), copy)


class TestAttack:
    def test_an_architecture_that_shares_all(self, tiny_model) -> None:
        threads = torch.get_num_threads()
        engine = Engine(loaded(tiny_model("llama")), MAX_LENGTH)
        verdict = attack(engine, ABLATIONS)
        assert (verdict.sharing, verdict.lost, verdict.unsteady) == (FULL, None, 0)
        assert 0 < verdict.difference < 2e-4
        assert (verdict.lengths, verdict.leftovers, verdict.first) == ((), (), ())
        assert (verdict.stay, verdict.tried_on) == (False, "a miniature")
        assert torch.get_num_threads() == threads

    def test_every_answer_of_the_baseline_and_a_few_of_each_ablation(self, tiny_model) -> None:
        """The fewer ablations there are, the more each is asked; a few in both orders."""
        engine = Engine(loaded(tiny_model("llama")), MAX_LENGTH)
        everything = attack(engine, [INTACT]).compared
        assert everything > 50
        assert attack(engine, ABLATIONS[:2]).compared == 2 * everything
        parts = [
            ablate(part, some)
            for part in ("layer", "mlp", "attention")
            for count in (1, 2, 3)
            for some in combinations(range(4), count)
        ]
        assert len(parts) == 42
        for ablations, each in (
            (parts[:8], 2 * 128 // 9),
            (parts[:15], 2 * 128 // 16),
            (parts, 4),
        ):
            found = attack(engine, [INTACT, *ablations]).compared
            assert found == everything + each * len(ablations)

    def test_a_few_ablations_are_asked_in_both_orders_and_of_many_half_in_each(
        self, monkeypatch
    ) -> None:
        honest, seen = Engine.score, []
        monkeypatch.setattr(
            Engine, "score", lambda *given: seen.append(given[1:3]) or honest(*given)
        )
        model = LlamaForCausalLM(LlamaConfig(**{**SMALL, "num_hidden_layers": 22})).eval()
        engine = Engine(loaded(model), MAX_LENGTH)
        calls = probe_calls(97, 96)
        for count in (16, 17, 22):
            seen.clear()
            attack(engine, single_layers(tuple(range(count))))
            assert [d for d, _ in seen] == [*calls, *(call[::-1] for call in calls[::-1])]
            removed = [{a.layers[0] for a in scored if a != INTACT} for _, scored in seen]
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

    def test_rows_have_all_threads_and_single_texts_one(self, tiny_model, monkeypatch) -> None:
        threads: dict[str, set[int]] = {"score": set(), "read": set()}
        for name, seen in threads.items():
            honest = getattr(Engine, name)

            def noted(*given, honest=honest, seen=seen):
                seen.add(torch.get_num_threads())
                return honest(*given)

            monkeypatch.setattr(Engine, name, noted)
        torch.set_num_threads(2)
        engine = Engine(loaded(tiny_model("llama")), MAX_LENGTH)
        attack(engine, ABLATIONS)
        check_longer_texts(engine, ABLATIONS, Verdict(FULL, None, 0.0, 0), (64, 64, 64), False)
        assert threads == {"score": {2}, "read": {1}}
        assert torch.get_num_threads() == 2
        monkeypatch.setattr(
            "tracker.engine.selfcheck.miniature_check.miniature", lambda model: None
        )
        attack(engine, ABLATIONS[:2])
        assert threads["read"] == {1, 2}

    def test_one_copy_without_each_ablation_says_what_it_is_and_what_is_right(
        self, tiny_model, monkeypatch
    ) -> None:
        made = []
        honest = Engine.without
        monkeypatch.setattr(
            Engine, "without", lambda engine, of: made.append(of) or honest(engine, of)
        )
        ablations = [INTACT, *(ablate("layer", [n]) for n in range(4))]
        attack(Engine(loaded(tiny_model("llama")), MAX_LENGTH), ablations)
        # Two more of the whole are asked longer and shorter texts, in one layers stand still.
        assert Counter(made) == {INTACT: 4, **dict.fromkeys(ablations[1:], 1)}

    def test_a_model_without_a_miniature_is_attacked_itself(self, tiny_model, monkeypatch) -> None:
        monkeypatch.setattr(
            "tracker.engine.selfcheck.miniature_check.miniature", lambda model: None
        )
        seen = disturbed(monkeypatch, lambda documents: False)
        engine = Engine(loaded(tiny_model("llama")), MAX_LENGTH)
        verdict = attack(engine, ABLATIONS)
        # Always with the same texts, the first of those that miniatures are given.
        assert attack(engine, ABLATIONS) == verdict
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

    def test_what_stands_in_for_its_layers_is_made_up(self, tiny_model, monkeypatch) -> None:
        """It is fitted later, on a model whose quirks are known."""
        monkeypatch.setattr(
            "tracker.engine.selfcheck.miniature_check.miniature", lambda model: None
        )
        fitted = [Ablation(replaced=((done, 2),)) for done in ("mean", "scale", "linear")]
        verdict = attack(Engine(loaded(tiny_model("llama")), MAX_LENGTH), [INTACT, *fitted])
        assert (verdict.sharing, verdict.difference < 2e-4) == (DEPTH_ONLY, True)

    def test_a_checkpoint_whose_layers_moved_up_is_measured_and_shares_nothing(
        self, tiny_model
    ) -> None:
        """It is what a pruned checkpoint is, and not the model with a layer that is skipped."""
        engine = Engine(loaded(Placed(tiny_model("llama").config).eval()), MAX_LENGTH)
        verdict = attack(engine, ABLATIONS)
        assert verdict.sharing == PLAIN
        assert verdict.lost == (
            "a checkpoint without a layer is not the model that skips it, so nothing is shared"
        )
        assert not verdict.stay
        # Without the last layer, the others stay where they are.
        assert attack(engine, [INTACT, ablate("layer", [3])]).sharing == FULL

    @pytest.mark.parametrize("unsteady", [20, 21])
    def test_one_answer_in_fifty_may_be_at_a_discontinuity(
        self, tiny_model, monkeypatch, unsteady: int
    ) -> None:
        """A model that is so just as often cannot be made."""
        found = Comparison(1000, 0.5, unsteady)
        monkeypatch.setattr("tracker.engine.selfcheck.miniature_check._compared", lambda *_: found)
        engine = Engine(loaded(tiny_model("llama")), MAX_LENGTH)
        verdict = attack(engine, ABLATIONS)
        assert (verdict.compared, verdict.unsteady) == (1000, unsteady)
        if unsteady == 20:
            assert (verdict.sharing, verdict.lost) == (FULL, None)
            return
        assert verdict.sharing == ONE_BY_ONE
        assert verdict.lost == (
            "nothing is shared, and each request is asked alone, because a call of several texts "
            "changes a log-likelihood by 0.5 nats, mostly where the model is discontinuous "
            "(21 answers)"
        )

    def test_what_is_not_causal_is_refused(self, tiny_model) -> None:
        model: Any = AutoModelForCausalLM.from_config(tiny_model("llama").config)
        kind = type(model)

        class Looking(kind):  # type: ignore[misc,valid-type]
            def forward(self, *args: Any, **kwargs: Any) -> Any:
                output = super().forward(*args, **kwargs)
                output.logits = output.logits + output.logits[:, -1:]
                return output

        model.__class__ = Looking
        said = (
            r"^Looking is not causal: what it says of a token depends on later tokens of the same "
            r"call, so no two ways to ask it agree$"
        )
        with pytest.raises(CellError, match=said):
            attack(Engine(loaded(model.eval()), MAX_LENGTH), ABLATIONS)


class TestTexts:
    def test_they_cross_what_an_architecture_counts_tokens_by(self) -> None:
        """Of random tokens, since a repeated one looks alike from every place."""
        calls = probe_calls(97, MAX_LENGTH)
        assert calls == probe_calls(97, MAX_LENGTH)
        for documents in calls:
            requests = [request for document in documents for request in document.requests]
            tokens = [t for r in requests for t in (*r.context, *r.continuation)]
            assert 2 <= min(tokens) < max(tokens) < 97
            assert len(set(tokens)) > 20
        # The first ones are special in many a vocabulary.
        small = probe_calls(4, MAX_LENGTH)
        few = {token for documents in small for d in documents for token in context(d)}
        assert few == {2, 3}
        first, steps, *beginnings = calls
        lengths = [len(document.requests[0].context) for document in first]
        assert lengths != sorted(lengths) != lengths[::-1]
        for document, length in zip(steps, STEPS[1::2], strict=True):
            texts = [len(r.context) + len(r.continuation) for r in document.requests]
            assert len(document.requests[0].context) < length <= max(texts)
        shared = [len(common_beginning(documents, MAX_LENGTH)) for documents in beginnings]
        assert shared == [SHORTEST + 4, SHORTEST + 1]
        for documents in calls:
            assert [document.index for document in documents] == list(range(len(documents)))
            assert {document.task for document in documents} == {"attack"}
            assert all(d.choices == len(set(d.requests)) > d.gold >= 0 for d in documents)
            assert len({document.gold for document in documents}) > 1

    def test_the_first_call_has_every_kind_of_row(self) -> None:
        """Two short texts in one row, long ones alone, branches, and answers that are long."""
        first = probe_calls(97, MAX_LENGTH)[0]
        tokens = [len(context(d)) + sum(len(r.continuation) for r in d.requests) for d in first]
        assert any(one + other <= 40 for one, other in itertools.pairwise(tokens))
        assert any(one <= 40 < one + other for one, other in itertools.pairwise(tokens))
        assert max(tokens) > 40
        answers = [[len(r.continuation) for r in document.requests] for document in first]
        assert [1, 1] in answers
        assert any(lengths[:2] == [1, 1] and max(lengths) > 3 for lengths in answers)
        assert any(min(lengths) > max(STEPS) - 6 for lengths in answers)

    def test_they_fit_a_model_that_reads_little(self) -> None:
        calls = probe_calls(97, 20)
        lengths = [len(r.context) for documents in calls for d in documents for r in d.requests]
        assert max(lengths) == 19


RIGHT = Comparison(100, 1e-6)


class Watched:
    """Stands in for the comparison; remembers with which engine and what was compared."""

    def __init__(self, *found: Comparison) -> None:
        self.engines: list[Engine] = []
        self.asked: list[Sequence[tuple[int, int, int, int]]] = []
        self.truths: list[Reference] = []
        self.found = found

    def __call__(self, engine: Engine, *rest: Any) -> Comparison:
        self.engines.append(engine)
        self.asked.append(rest[2])
        self.truths.append(rest[3])
        return self.found[min(len(self.engines), len(self.found)) - 1]


@pytest.fixture
def watched(monkeypatch) -> Watched:
    watched = Watched(RIGHT)
    monkeypatch.setattr("tracker.engine.selfcheck.miniature_check._compared", watched)
    return watched


class TestMiniatures:
    """What is found on one is believed of the next, and of the model."""

    def test_it_is_scored_as_a_model_that_reads_as_much(self, tiny_model, watched) -> None:
        for most, read in ((2048, 96), (50, 50)):
            elsewhere = replace(loaded(tiny_model("llama")), device=torch.device("meta"))
            attack(Engine(elsewhere, most), ABLATIONS)
            engine = watched.engines.pop()
            assert (engine.max_length, engine.row_tokens) == (read, 40)
            assert engine.loaded.device == torch.device("cpu")
            assert engine.loaded.model.num_parameters() < 10**6
            assert list(engine.loaded.layers) == list(engine.loaded.model.model.layers)
            assert engine.stand_ins == {layer: MadeUp(layer) for layer in range(4)}
            # What is free on this machine is no matter.
            assert engine.memory == 2**30

    @pytest.mark.parametrize("blank", [True, False])
    def test_a_token_of_theirs_has_an_embedding_of_zeros_where_one_of_the_cell_has(
        self, tiny_model, watched, blank: bool
    ) -> None:
        engine = Engine(loaded(tiny_model("mistral")), 2048)
        verdict = attack(engine, ABLATIONS, (("sliding_window",),), blank)
        check_longer_texts(engine, ABLATIONS, verdict, (128, 77, 128), blank)
        assert len(watched.engines) == 3
        for made in watched.engines:
            zero = ~made.loaded.model.get_input_embeddings().weight.any(-1)
            assert zero.nonzero().flatten().tolist() == [FIRST] * blank
        texts = {token for call in probe_calls(97, 96) for d in call for token in context(d)}
        assert min(texts) == FIRST
        assert engine.loaded.model.get_input_embeddings().weight[FIRST].all()

    def test_longer_texts_come_in_rows_as_the_cell_has_them(self, tiny_model, watched) -> None:
        engine = Engine(loaded(tiny_model("llama")), 2048)
        check_longer_texts(engine, ABLATIONS, Verdict(FULL, None, 0.0, 0), (300, 77, 300), False)
        (made,), (asked,) = watched.engines, watched.asked
        assert (made.max_length, made.row_tokens) == (300, 77)
        # The intact model answers all that is asked, one other a part: of each call one.
        answered = Counter(of for of, *_ in asked)
        other = ABLATIONS[len(ABLATIONS) // 2]
        assert set(answered) == {INTACT, other}
        assert answered[INTACT] > answered[other] == 4
        assert [call for of, call, *_ in asked if of == other] == [0, 1, 2, 3]

    def test_one_copy_is_asked_longer_and_longer_texts_and_another_shorter_ones(
        self, tiny_model, monkeypatch, watched
    ) -> None:
        asked: list[tuple[Engine, int]] = []

        def answer(engine: Engine, request: Request) -> Response:
            asked.append((engine, request.length))
            return Response(0.0, False, 0)

        monkeypatch.setattr(Engine, "answer", answer)
        monkeypatch.setattr(
            "tracker.engine.selfcheck.miniature_check.as_removed", lambda *given: given[2]
        )
        attack(Engine(loaded(tiny_model("llama")), MAX_LENGTH), ABLATIONS)
        rising = [length for engine, length in asked if engine is asked[0][0]]
        falling = [length for engine, length in asked if engine is asked[-1][0]]
        assert len(asked) == 2 * len(rising)
        assert rising == sorted(rising) == falling[::-1]
        calls = probe_calls(97, MAX_LENGTH)
        assert rising[-1] == max(d.requests[-1].length for call in calls for d in call)
        assert 4 < len(rising) < 10

    def test_what_is_not_said_of_them_is_told_of_later_and_a_bug_of_ours_is_raised(
        self, tiny_model, monkeypatch, watched
    ) -> None:
        engine = Engine(loaded(tiny_model("llama")), MAX_LENGTH)
        monkeypatch.setattr(
            "tracker.engine.selfcheck.miniature_check.as_removed", lambda *given: given[2]
        )
        errors = iter([RefusalError("it takes no texts"), ZeroDivisionError("ours")])

        def answer(engine: Engine, request: Request) -> Response:
            raise next(errors)

        monkeypatch.setattr(Engine, "answer", answer)
        assert attack(engine, ABLATIONS).sharing == FULL
        with pytest.raises(ZeroDivisionError, match="ours"):
            attack(engine, ABLATIONS)

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
        self, tiny_model, monkeypatch, watched, one: float, other: float, same: bool
    ) -> None:
        engine = Engine(loaded(tiny_model("llama")), MAX_LENGTH)
        monkeypatch.setattr(
            "tracker.engine.selfcheck.miniature_check.as_removed", lambda *given: given[2]
        )
        asked: list[Engine] = []

        def answer(engine: Engine, request: Request) -> Response:
            asked.append(engine)
            return Response(one if engine is asked[0] else other, False, 0)

        monkeypatch.setattr(Engine, "answer", answer)
        said = f"says {one:g} nats of a text after shorter ones, and {other:g} after longer ones"
        with nullcontext() if same else pytest.raises(CellError, match=said):
            assert attack(engine, ABLATIONS).sharing == FULL

    @pytest.mark.parametrize("itself", [False, True])
    def test_no_number_proves_nothing_of_a_miniature(
        self, tiny_model, monkeypatch, watched, itself: bool
    ) -> None:
        """A real model may say it."""
        if itself:
            monkeypatch.setattr(
                "tracker.engine.selfcheck.miniature_check.miniature", lambda model: None
            )
        attack(Engine(loaded(tiny_model("llama")), MAX_LENGTH), ABLATIONS)
        (truth,) = watched.truths
        monkeypatch.setattr(truth, "answer", lambda *asked: Response(math.nan, False, 0))
        monkeypatch.setattr(truth, "moves", lambda *asked: False)
        found = truth.compare(math.nan, INTACT, Request((1,), (2,)), 1.0, 1.0)
        assert (found.wrong is None) == itself

    def test_a_model_that_names_no_head_is_asked_what_it_reads(
        self, tiny_model, monkeypatch, watched
    ) -> None:
        model = tiny_model("llama")
        monkeypatch.setattr(type(model), "get_output_embeddings", lambda self: None)
        assert attack(Engine(loaded(model), MAX_LENGTH), ABLATIONS).sharing == FULL

    def test_habits_are_found_once_and_hold_for_all(self, tiny_model, monkeypatch, watched) -> None:
        window = ("sliding_window",)
        places = (("model.rotary_emb", "inv_freq"), ("model.rotary_emb", "original_inv_freq"))
        found = Findings((window,), ((window, False),), False, frozenset(), frozenset(places))
        tried: list[Any] = []
        monkeypatch.setattr(
            "tracker.engine.selfcheck.miniature_check.find_quirks",
            lambda *given: tried.append(given) or found,
        )
        watched.found = (RIGHT, Comparison(50, 1e-5, 1))
        engine = Engine(loaded(tiny_model("mistral")), MAX_LENGTH)
        verdict = attack(engine, ABLATIONS, (window,))
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

    def test_each_ablation_is_asked_in_every_call(self, tiny_model, watched) -> None:
        """Branches, both sides of a threshold, and two kept beginnings."""
        parts = [
            ablate("layer", some) for count in (1, 2, 3) for some in combinations(range(4), count)
        ]
        attack(Engine(loaded(tiny_model("llama")), MAX_LENGTH), [INTACT, *parts])
        (asked,) = watched.asked
        assert asked == sorted(
            asked, key=lambda place: ([INTACT, *parts].index(place[0]), place[1:])
        )
        for part in parts:
            calls = Counter(call for of, call, *_ in asked if of == part)
            assert set(calls) == {0, 1, 2, 3}
            assert max(calls.values()) - min(calls.values()) <= 1

    def test_the_same_is_asked_every_time(self, tiny_model, watched) -> None:
        """Also of the ablations of which only some requests are."""
        many = [*ABLATIONS, *(ablate("mlp", [n]) for n in range(4)), ablate("layer", [1, 2])]
        for _ in range(2):
            attack(Engine(loaded(tiny_model("llama")), MAX_LENGTH), [*many, *many[1:4]])
        one, other = watched.asked
        assert one == other
        assert len(one) < len(many) * len([of for of, *_ in one if of == INTACT])

    @pytest.mark.parametrize("every", [True, False])
    def test_a_model_to_which_every_length_is_another(
        self, tiny_model, monkeypatch, watched, every: bool
    ) -> None:
        left = frozenset({"inv_freq", "attention_scaling"})
        found = Findings(every_call=every, leftovers=left)
        monkeypatch.setattr(
            "tracker.engine.selfcheck.miniature_check.find_quirks", lambda *_: found
        )
        verdict = attack(Engine(loaded(tiny_model("llama")), MAX_LENGTH), ABLATIONS)
        assert verdict.lengths == ((((), True),) if every else ())
        assert verdict.leftovers == ("attention_scaling", "inv_freq")
        assert watched.engines[0].quirks.lengths.each == every
        assert watched.engines[0].quirks.leftovers

    def test_what_one_lost_the_next_is_not_asked(self, tiny_model, monkeypatch) -> None:
        wrong = Comparison(3, 0.25, 0, "document 0")
        watched = Watched(wrong, Comparison(10, 1e-3), wrong, RIGHT)
        monkeypatch.setattr("tracker.engine.selfcheck.miniature_check._compared", watched)
        found = Findings(matters=(("sliding_window",),))
        monkeypatch.setattr(
            "tracker.engine.selfcheck.miniature_check.find_quirks", lambda *_: found
        )
        verdict = attack(Engine(loaded(tiny_model("mistral")), MAX_LENGTH), ABLATIONS)
        assert [engine.sharing for engine in watched.engines] == [
            FULL, NO_PREFIX, NO_PREFIX, DEPTH_ONLY,
        ]  # fmt: skip
        assert (verdict.sharing, verdict.difference, verdict.compared) == (DEPTH_ONLY, 1e-3, 110)
        assert verdict.lost == (
            "shared over depth alone, and not over tokens or documents, because sharing more "
            "changes a log-likelihood by 0.25 nats"
        )

    def test_what_differs_with_nothing_shared_is_asked_one_by_one(
        self, tiny_model, monkeypatch
    ) -> None:
        wrong = Comparison(3, 0.25, 2, "-1 nats shared")
        watched = Watched(wrong, wrong, wrong, wrong, Comparison(100, 0.5, 99))
        monkeypatch.setattr("tracker.engine.selfcheck.miniature_check._compared", watched)
        verdict = attack(Engine(loaded(tiny_model("llama")), MAX_LENGTH), ABLATIONS)
        # However often the model is discontinuous: nothing less is left to share.
        assert (verdict.sharing, verdict.unsteady) == (ONE_BY_ONE, 99)
        watched.found = (wrong,)
        watched.engines.clear()
        with pytest.raises(CellError, match=r"^LlamaForCausalLM contradicts itself: -1 nats sh"):
            attack(Engine(loaded(tiny_model("llama")), MAX_LENGTH), ABLATIONS)


def disturbed(monkeypatch, when: Callable[[Sequence[Document]], bool]) -> list[list[Document]]:
    """Let the engine be wrong by half a nat in some calls; remembers what it was asked."""
    honest, seen = Engine.score, []

    def score(self: Engine, documents: Sequence[Document], *rest: Any) -> Any:
        seen.append(list(documents))
        scores = honest(self, documents, *rest)
        if self.sharing == FULL and when(documents):
            response = scores[-1].responses[-1][-1]
            worse = type(response)(response.loglikelihood - 0.5, False, 0)
            scores[-1].responses[-1][-1] = worse
        return scores

    monkeypatch.setattr(Engine, "score", score)
    return seen


class TestOrder:
    def test_every_call_in_one_order_and_its_reverse(self, tiny_model, monkeypatch) -> None:
        seen = disturbed(monkeypatch, lambda documents: False)
        verdict = attack(Engine(loaded(tiny_model("llama")), MAX_LENGTH), ABLATIONS[:1])
        assert (verdict.sharing, verdict.compared) == (FULL, 2 * sum(map(count, seen[:4])))
        assert seen[4:] == [documents[::-1] for documents in seen[3::-1]]
        vocabulary = max(
            token
            for documents in seen
            for document in documents
            for request in document.requests
            for token in request.context
        )
        assert 90 < vocabulary < 97

    @pytest.mark.parametrize("reverse", [False, True])
    def test_an_error_in_one_of_them_is_found(self, tiny_model, monkeypatch, reverse: bool) -> None:
        """The last answer of the last document, under the last ablation."""
        seen = disturbed(
            monkeypatch,
            lambda documents: (
                (documents[0].index > documents[-1].index) == reverse and len(documents) == 3
            ),
        )
        engine = Engine(loaded(tiny_model("llama")), MAX_LENGTH)
        verdict = attack(engine, ABLATIONS[:2])
        assert verdict.sharing == NO_PREFIX
        assert verdict.lost == (
            "shared over depth and tokens, and not what documents begin with, because sharing more "
            "changes a log-likelihood by 0.5 nats"
        )
        # What is wrong once is asked no further.
        assert len(seen) == (8 if reverse else 4) + 8


def context(document: Document) -> tuple[int, ...]:
    return document.requests[0].context


def count(documents: Sequence[Document]) -> int:
    return sum(len(document.requests) for document in documents)


class TestCut:
    """What the model without a layer is, and what is said where it is nothing."""

    @pytest.fixture
    def refuse(self, monkeypatch) -> Callable[..., None]:
        """Let models without layer 2 not run: cut, or with the layer in its place."""

        def refuse(*stay: bool, error: Exception | None = None) -> None:
            honest = Engine.without

            def without(self: Engine, ablation: Ablation) -> Engine:
                if 2 in ablation.layers and self.quirks.stay in stay:
                    raise error or RefusalError(f"no such model {self.quirks.stay:d}")
                return honest(self, ablation)

            def refusing(*_: Any) -> None:
                raise error or RefusalError("no such model 1")

            @contextmanager
            def handing_on(engine: Engine, ablation: Ablation) -> Iterator[None]:
                with _handing_on(engine, ablation):
                    if 2 not in ablation.layers or True not in stay:
                        yield
                        return
                    handle = engine.loaded.layers[2].register_forward_pre_hook(refusing)
                    yield
                    handle.remove()

            monkeypatch.setattr(Engine, "without", without)
            monkeypatch.setattr("tracker.engine.selfcheck.removability._handing_on", handing_on)

        return refuse

    def checked(self, model: Any, *removed: tuple[int, ...]) -> Verdict:
        ablations = [INTACT, *(ablate("layer", layers) for layers in removed)]
        return attack(Engine(loaded(model), MAX_LENGTH), ablations)

    @pytest.mark.parametrize(("removed", "what"), [((2,), "layer 2"), ((1, 2), "layers 1, 2")])
    def test_it_runs_in_no_way(self, tiny_model, refuse, watched, removed, what) -> None:
        refuse(False, True)
        said = (
            f"^LlamaForCausalLM does not run without {what} \\(no such model 0\\); "
            "leave it out of 'layer'$"
        )
        with pytest.raises(CellError, match=said):
            self.checked(tiny_model("llama"), (0,), removed)

    def test_it_cannot_be_cut(self, tiny_model, refuse, watched) -> None:
        refuse(False)
        verdict = self.checked(tiny_model("llama"), (0,), (2,))
        assert (verdict.stay, verdict.sharing, verdict.lost) == (True, FULL, None)
        assert watched.engines[0].quirks.stay

    def test_it_can_only_be_cut(self, tiny_model, refuse, watched) -> None:
        """Then it is a checkpoint, of which nothing proves that it is the model that skips."""
        refuse(True)
        verdict = self.checked(tiny_model("llama"), (0,), (2,))
        assert (verdict.stay, verdict.sharing) == (False, PLAIN)
        assert verdict.lost == (
            "a checkpoint without a layer is not the model that skips it, so nothing is shared"
        )

    def test_some_layers_by_nature_and_others_not_at_all(self, tiny_model, watched) -> None:
        said = (
            r"^Fussy cannot be cut to be without layers 0, 1 \(two are too few to run\); "
            "leave it out of 'layer'$"
        )
        with pytest.raises(CellError, match=said):
            self.checked(Fussy(tiny_model("llama").config).eval(), (0, 1), (0,))

    def test_what_no_checkpoint_is_stays_in_its_place(self, tiny_model, watched) -> None:
        """The class cannot be made of two layers, so that it is nothing by its own nature."""
        model = NoTwo(tiny_model("llama").config).eval()
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

    def test_a_model_that_is_another_when_it_is_loaded_has_no_checkpoint(
        self, tiny_model, watched
    ) -> None:
        verdict = self.checked(Hidden(tiny_model("llama").config).eval(), (0,))
        assert "(the model itself, saved and loaded, is another one)" in verdict.which

    def test_other_weights_are_another_model(self, tiny_model, watched) -> None:
        """What a class makes of a configuration alone is no proof."""
        model = Hidden(tiny_model("llama").config).eval()
        assert self.checked(model, (0,)).stay is True

    def test_a_checkpoint_begins_as_no_call_has_changed_it(
        self, tiny_model, monkeypatch, watched
    ) -> None:
        """What the first call changes is known by its place in the whole model."""
        found = Findings(first=frozenset({("model.layers.3.self_attn", "scaling")}))
        monkeypatch.setattr(
            "tracker.engine.selfcheck.miniature_check.find_quirks", lambda *_: found
        )
        verdict = self.checked(Placed(tiny_model("llama").config).eval(), (0,))
        assert (verdict.sharing, verdict.stay) == (PLAIN, False)

    def test_all_of_it_happens_where_the_model_is(self, tiny_model) -> None:
        """The device without numbers stands for an accelerator."""
        device = torch.device("meta")
        model = Elsewhere(tiny_model("llama").config).to(device).eval()
        engine = Engine(replace(loaded(model), device=device), MAX_LENGTH)
        ablations = [INTACT, ablate("layer", [0])]
        verdict = as_removed(Reference(engine), ablations, Verdict(FULL, None, 0.0, 0), "Elsewhere")
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
                assert _alike(two, one) == expected
        assert not _alike(one, one[:1])

    def test_a_model_without_a_miniature_is_cut_itself(
        self, tiny_model, monkeypatch, refuse, watched
    ) -> None:
        monkeypatch.setattr(
            "tracker.engine.selfcheck.miniature_check.miniature", lambda model: None
        )
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
    def test_a_model_may_not_run_at_all(self, tiny_model, monkeypatch, small: bool) -> None:
        def compared(*_: Any) -> Comparison:
            raise RefusalError("no such mask")

        if not small:
            monkeypatch.setattr(
                "tracker.engine.selfcheck.miniature_check.miniature", lambda model: None
            )
        monkeypatch.setattr("tracker.engine.selfcheck.miniature_check._compared", compared)
        said = r"^LlamaForCausalLM cannot be asked one request at a time: no such mask$"
        with pytest.raises(CellError, match=said):
            self.checked(tiny_model("llama"), (2,))

    def test_sublayers_ask_for_no_cut(self, tiny_model, refuse, watched) -> None:
        refuse(False, True)
        engine = Engine(loaded(tiny_model("llama")), MAX_LENGTH)
        assert attack(engine, [INTACT, ablate("mlp", [2])]).sharing == FULL

    def test_an_error_of_ours_is_raised(self, tiny_model, refuse, watched) -> None:
        refuse(False, error=ZeroDivisionError("ours"))
        with pytest.raises(ZeroDivisionError, match="ours"):
            self.checked(tiny_model("llama"), (2,))

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
        self, tiny_model, monkeypatch, watched, dtype, scale: float, sharing: Sharing
    ) -> None:
        """On a miniature, which computes in float64, and on models that have none."""
        monkeypatch.setattr(PlacedLayer, "scale", scale)
        model = Placed(tiny_model("llama").config).eval()
        if dtype is not None:
            model = model.to(dtype)
            monkeypatch.setattr(
                "tracker.engine.selfcheck.miniature_check.miniature", lambda model: None
            )
        verdict = self.checked(model, (0,))
        assert (verdict.sharing, verdict.stay) == (sharing, False)

    def test_what_is_not_finite_either_way_is_the_same(
        self, tiny_model, monkeypatch, watched
    ) -> None:
        monkeypatch.setattr(
            "tracker.engine.selfcheck.miniature_check.miniature", lambda model: None
        )
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
