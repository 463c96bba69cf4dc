"""The attack's own parts: by what it is named, what follows from it, what is lost and why."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from tests.ablations import single_layers
from tests.engine.plain import MAX_LENGTH, loaded
from tracker.ablations import INTACT, ablate
from tracker.engine.attack import attack, attack_key, most_sharing, reachable
from tracker.engine.crossing import crossing_calls
from tracker.engine.habits import STEPS
from tracker.engine.prefix import SHORTEST
from tracker.engine.refusal import RefusalError
from tracker.engine.rows import Lengths, common_beginning
from tracker.engine.sharing import DEPTH_ONLY, FULL, NO_PREFIX, PLAIN, Sharing
from tracker.engine.sweep import Engine
from tracker.engine.truth import Comparison
from tracker.engine.verdict import Verdict
from tracker.errors import CellError

ABLATIONS = single_layers((0, 1, 2, 3))
WINDOW = (("max_position_embeddings",),)

pytestmark = pytest.mark.usefixtures("one_thread")


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
            attack_key(other, ABLATIONS, WINDOW),
            attack_key(tiny_model("qwen2"), ABLATIONS, WINDOW),
        ]
        assert len(set(keys)) == 6


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
        verdict = Verdict(FULL, None, 0.0, 10, lengths=lengths, unsteady=2, stay=True)
        habits = verdict.habits(model)
        assert habits.lengths == Lengths((256, 5))
        assert (habits.unsteady, habits.stay) == (True, True)
        assert habits.leftovers == habits.first == {}
        calm = Verdict(FULL, None, 0.0, 10, lengths=(((), True),)).habits(model)
        assert calm.lengths == Lengths((), each=True)
        assert (calm.unsteady, calm.stay) == (False, False)

    def test_what_calls_change_is_remembered_as_it_is_now(self, tiny_model) -> None:
        model = tiny_model("llama")
        place = ("model.rotary_emb", "inv_freq")
        verdict = Verdict(
            FULL, None, 0.0, 10, leftovers=("inv_freq",), first=(place, ("model.gone", "x"))
        )
        habits = verdict.habits(model)
        before = model.model.rotary_emb.inv_freq.clone()
        model.model.rotary_emb.inv_freq.zero_()
        assert set(habits.first) == {place}
        assert place in habits.leftovers
        for state in (habits.first, habits.leftovers):
            assert torch.equal(state[place], before)


class PlacedLayer(LlamaDecoderLayer):  # type: ignore[misc]
    """A layer that does more the later it stands."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return super().forward(*args, **kwargs) * (1 + self.self_attn.layer_idx)


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


class TestMostSharing:
    WRONG = Comparison(9, 0.123456, 0, "document 0")
    RIGHT = Comparison(9, 1e-6)

    def test_what_is_exact_is_taken_at_once(self) -> None:
        for start in (FULL, NO_PREFIX, DEPTH_ONLY, PLAIN):
            found = most_sharing(start, "Model", answers({start: self.RIGHT}))
            assert found == (start, self.RIGHT, [])

    def test_each_loss_has_its_reason(self) -> None:
        unsteady = Comparison(9, 7.0, 3, "document 0")
        found = most_sharing(
            FULL,
            "Model",
            answers(
                {
                    FULL: RefusalError("no such mask\nat all"),
                    NO_PREFIX: self.WRONG,
                    DEPTH_ONLY: unsteady,
                    PLAIN: self.RIGHT,
                }
            ),
        )
        assert found == (
            PLAIN,
            self.RIGHT,
            [
                "sharing over documents is refused by the model (no such mask)",
                "sharing over tokens changes a log-likelihood by 0.123 nats",
                "sharing over depth changes a log-likelihood by 7 nats, mostly where the model "
                "is discontinuous (3 answers)",
            ],
        )

    def test_less_than_was_lost_before_is_not_tried(self) -> None:
        found = most_sharing(
            DEPTH_ONLY, "Model", answers({DEPTH_ONLY: self.WRONG, PLAIN: self.RIGHT})
        )
        assert found[0] == PLAIN
        assert len(found[2]) == 1

    def test_a_model_that_does_not_run_at_all_is_no_loss(self) -> None:
        given = answers({PLAIN: RefusalError("no such mask")})
        with pytest.raises(
            CellError, match=r"^Model cannot be asked one request at a time: no such mask$"
        ):
            most_sharing(PLAIN, "Model", given)

    @pytest.mark.parametrize("where", [FULL, PLAIN])
    def test_a_full_memory_is_no_loss_either(self, where: Sharing) -> None:
        with pytest.raises(torch.OutOfMemoryError):
            most_sharing(where, "Model", answers({where: torch.OutOfMemoryError("full")}))


class TestAttack:
    def test_an_architecture_that_shares_all(self, tiny_model) -> None:
        threads = torch.get_num_threads()
        engine = Engine(loaded(tiny_model("llama")), MAX_LENGTH)
        verdict = attack(engine, ABLATIONS, ())
        assert (verdict.sharing, verdict.lost, verdict.unsteady) == (FULL, None, 0)
        assert 0 < verdict.difference < 2e-4
        assert (verdict.lengths, verdict.leftovers, verdict.first) == ((), (), ())
        assert (verdict.stay, verdict.attacked) == (False, "a miniature")
        assert torch.get_num_threads() == threads

    def test_every_request_of_some_ablations_and_a_few_of_the_others(self, tiny_model) -> None:
        """Both ways round; two ablations are all that there is, and are asked everything."""
        engine = Engine(loaded(tiny_model("llama")), MAX_LENGTH)
        everything = attack(engine, [INTACT], ()).compared
        assert everything > 50
        assert attack(engine, ABLATIONS[:2], ()).compared == 2 * everything
        many = [*ABLATIONS, *(ablate(part, [n]) for part in ("mlp", "attention") for n in range(4))]
        # Of thirteen, each second one is asked everything, and the others four requests.
        assert attack(engine, many, ()).compared == 7 * everything + 6 * 2 * 4

    def test_a_model_without_a_miniature_is_attacked_itself(self, tiny_model, monkeypatch) -> None:
        monkeypatch.setattr("tracker.engine.attack.miniature", lambda model: None)
        engine = Engine(loaded(tiny_model("llama")), MAX_LENGTH)
        verdict = attack(engine, ABLATIONS, ())
        assert verdict.sharing == DEPTH_ONLY
        assert verdict.attacked == "the model"
        # Four documents of two requests, each other ablation one of them, in both orders.
        assert verdict.compared == 2 * (4 * 2 + 4)
        assert verdict.lengths == (((), True),)
        assert verdict.lost == (
            "no miniature of the model can be built on which sharing over tokens could be proven"
        )

    def test_a_checkpoint_whose_layers_moved_up_is_measured_and_shares_nothing(
        self, tiny_model
    ) -> None:
        """It is what a pruned checkpoint is, and not the model with a layer that is skipped."""
        engine = Engine(loaded(Placed(tiny_model("llama").config).eval()), MAX_LENGTH)
        verdict = attack(engine, ABLATIONS, ())
        assert verdict.sharing == PLAIN
        assert verdict.lost == (
            "a checkpoint without a layer is not the model that skips it, so nothing is shared"
        )
        assert not verdict.stay
        # Without the last layer, the others stay where they are.
        assert attack(engine, [INTACT, ablate("layer", [3])], ()).sharing == FULL

    @pytest.mark.parametrize("unsteady", [20, 21])
    def test_one_answer_in_fifty_may_be_at_a_discontinuity(
        self, tiny_model, monkeypatch, unsteady: int
    ) -> None:
        """A model that is so just as often cannot be made."""
        found = Comparison(1000, 0.5, unsteady)
        monkeypatch.setattr("tracker.engine.attack._compared", lambda *_: found)
        engine = Engine(loaded(tiny_model("llama")), MAX_LENGTH)
        verdict = attack(engine, ABLATIONS, ())
        assert (verdict.compared, verdict.unsteady) == (1000, unsteady)
        if unsteady == 20:
            assert (verdict.sharing, verdict.lost) == (FULL, None)
            return
        assert verdict.sharing == PLAIN
        assert verdict.lost == "; ".join(
            f"sharing over {what} changes a log-likelihood by 0.5 nats, mostly where the model is "
            "discontinuous (21 answers)"
            for what in ("documents", "tokens", "depth")
        )

    def test_the_texts_cross_what_an_architecture_counts_tokens_by(self) -> None:
        """Of random tokens, since a repeated one looks alike from every place."""
        calls = crossing_calls(97, MAX_LENGTH)
        assert calls == crossing_calls(97, MAX_LENGTH)
        for documents in calls:
            requests = [request for document in documents for request in document.requests]
            tokens = [t for r in requests for t in (*r.context, *r.continuation)]
            assert 2 <= min(tokens) < max(tokens) < 97
            assert len(set(tokens)) > 20
        first, steps, *beginnings = calls
        lengths = [len(document.requests[0].context) for document in first]
        assert lengths != sorted(lengths) != lengths[::-1]
        for document, length in zip(steps, STEPS[1::2], strict=True):
            texts = [len(r.context) + len(r.continuation) for r in document.requests]
            assert len(document.requests[0].context) < length <= max(texts)
        shared = [len(common_beginning(documents, MAX_LENGTH)) for documents in beginnings]
        assert shared == [SHORTEST + 4, SHORTEST + 1]

    def test_texts_fit_a_model_that_reads_little(self) -> None:
        for documents in crossing_calls(97, 20):
            assert all(len(r.context) < 20 for d in documents for r in d.requests)

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
            attack(Engine(loaded(model.eval()), MAX_LENGTH), ABLATIONS, ())
