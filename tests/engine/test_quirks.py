"""What changing one number of a configuration shows of a model, and of what calling it does."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tracker.engine.refusal import RefusalError
from tracker.engine.scoring.rows import ANY_LENGTH, Lengths
from tracker.engine.selfcheck.quirks import Findings, find_quirks, find_switches, shortened
from tracker.models.miniature import miniature
from tracker.models.shrinking import numbers

pytestmark = pytest.mark.usefixtures("one_thread")

POSITIONS = ("max_position_embeddings",)
WINDOW = ("sliding_window",)
FACTORS = ("rope_parameters", "original_max_position_embeddings")
LONGROPE = {
    "rope_type": "longrope", "original_max_position_embeddings": 64, "factor": 4.0,
    "short_factor": [1.0] * 4, "long_factor": [3.0, 5.0, 7.0, 9.0],
}  # fmt: skip
DYNAMIC = {"rope_type": "dynamic", "factor": 4.0}


def turning(config: Any, **settings: Any) -> Any:
    """Make a miniature whose rotary factors are others."""
    config.rope_parameters = {"rope_theta": 1e4, "rope_type": "default", **settings}
    return miniature(AutoModelForCausalLM.from_config(config).eval())


def every(model: Any) -> list[tuple[str, ...]]:
    return [path for path, _ in numbers(model.config)]


class TestFindings:
    def test_a_model_that_counts_nothing(self, tiny_model) -> None:
        model = miniature(tiny_model("llama"))
        before = {name: value.clone() for name, value in model.state_dict().items()}
        assert find_quirks(model, [POSITIONS]) == Findings()
        assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())

    def test_a_window_matters_and_is_no_matter_of_the_call(self, tiny_model) -> None:
        """Numbers that decide the shape of weights are not tried: it would be another model."""
        model = miniature(tiny_model("mistral"))
        found = find_quirks(model, every(model))
        assert set(found.matters) == {WINDOW, ("rope_parameters", "rope_theta")}
        assert found.by_call == ()
        assert (found.causal, found.every_call) == (True, False)

    def test_only_the_numbers_that_were_asked_for_are_tried(self, tiny_model) -> None:
        assert find_quirks(miniature(tiny_model("mistral")), [POSITIONS]) == Findings()

    def test_a_number_on_whose_sides_all_lengths_are_alike(self, tiny_model) -> None:
        found = find_quirks(turning(tiny_model("llama").config, **LONGROPE), [FACTORS, POSITIONS])
        assert found.by_call == ((FACTORS, False),)
        assert FACTORS in found.matters

    def test_a_number_beyond_which_every_length_is_another(self, tiny_model) -> None:
        """And which leaves something behind: factors grow with a long text, and stay."""
        found = find_quirks(turning(tiny_model("llama").config, **DYNAMIC), [POSITIONS])
        assert found.by_call == ((POSITIONS, True),)
        assert found.matters == (POSITIONS,)
        assert "inv_freq" in {name.rpartition(".")[2] for name in found.leftovers}
        assert found.first == frozenset()

    def test_a_model_that_looks_at_the_whole_call(self, tiny_model) -> None:
        model = tiny_model("llama")

        class Counting(type(model)):  # type: ignore[misc]
            def forward(self, input_ids: Any, **kwargs: Any) -> Any:
                output = super().forward(input_ids, **kwargs)
                output.logits = output.logits * input_ids.shape[1]
                return output

        model.__class__ = Counting
        found = find_quirks(model, [POSITIONS])
        assert (found.every_call, found.causal) == (True, True)
        assert found.by_call == ()

    def test_a_model_that_looks_ahead(self, tiny_model) -> None:
        """At what follows, and not at how much does."""
        model = tiny_model("llama")

        class Ahead(type(model)):  # type: ignore[misc]
            def forward(self, input_ids: Any, **kwargs: Any) -> Any:
                output = super().forward(input_ids, **kwargs)
                later = input_ids.roll(-1, 1)[..., None]
                later[:, -1] = 0
                output.logits = output.logits + later
                return output

        model.__class__ = Ahead
        assert not find_quirks(model, []).causal

    @pytest.mark.parametrize(("weight", "once"), [(True, True), (True, False), (False, True)])
    def test_what_calls_change(self, tiny_model, weight: bool, once: bool) -> None:
        """The first call alone, or each; a weight, or something beside the weights."""
        model = tiny_model("llama")

        class Changing(type(model)):  # type: ignore[misc]
            calls = 0

            def forward(self, *args: Any, **kwargs: Any) -> Any:
                place = self.lm_head if weight else self.model.rotary_emb
                if not once or not getattr(self, "called", False):
                    value = place.weight if weight else place.inv_freq
                    value.data = value.data * 1.5
                    self.called = True
                return super().forward(*args, **kwargs)

        model.__class__ = Changing
        found = find_quirks(model, [])
        name = "weight" if weight else "inv_freq"
        assert found.leftovers == (frozenset() if once else {name})
        changed = {each for _, each in found.first}
        assert (name in changed) == weight
        assert bool(changed) == weight

    @pytest.mark.parametrize("window", [5, 6])
    def test_what_calls_change_on_either_side_of_a_number(self, tiny_model, window: int) -> None:
        """Found with the number as it is, or when it is made small: both hold for the model."""
        kind = type(tiny_model("mistral"))

        class Changing(kind):  # type: ignore[misc,valid-type]
            def forward(self, *args: Any, **kwargs: Any) -> Any:
                if self.config.sliding_window == window:
                    rotary = self.model.rotary_emb
                    rotary.attention_scaling = rotary.attention_scaling * 1.5
                    if not hasattr(self, "called"):
                        self.lm_head.weight.data = self.lm_head.weight.data * 1.5
                    self.called = True
                return super().forward(*args, **kwargs)

        small = miniature(tiny_model("mistral"))
        small.__class__ = Changing
        found = find_quirks(small, [WINDOW])
        assert found.matters == (WINDOW,)
        assert ("lm_head", "weight") in found.first
        assert found.leftovers == {"attention_scaling"}

    def test_a_number_that_is_small_already_is_made_another(self, tiny_model) -> None:
        model = tiny_model("mistral")
        model.config.sliding_window = 6
        assert find_quirks(miniature(model), [WINDOW]).matters == (WINDOW,)

    @pytest.mark.parametrize("refused", [POSITIONS, WINDOW, ("rope_parameters", "rope_theta")])
    def test_a_number_that_the_model_does_not_take_is_passed_over(
        self, tiny_model, refused: tuple[str, ...]
    ) -> None:
        """In a longer text than it is built with; and the others are tried none the less."""
        small = miniature(tiny_model("mistral"))
        before = dict(numbers(small.config))

        class Choosy(type(small)):  # type: ignore[misc]
            def forward(self, input_ids: Any, **kwargs: Any) -> Any:
                changed = dict(numbers(self.config))[refused] != before[refused]
                if changed and input_ids.shape[1] > 10:
                    raise ValueError("no such number")
                return super().forward(input_ids, **kwargs)

        small.__class__ = Choosy
        found = find_quirks(small, [POSITIONS, WINDOW, ("rope_parameters", "rope_theta")])
        assert set(found.matters) == {WINDOW, ("rope_parameters", "rope_theta")} - {refused}

    def test_a_number_with_which_only_narrower_numbers_do(self, tiny_model) -> None:
        """Float32 is held against float64."""
        small = miniature(tiny_model("mistral"))

        class Narrow(type(small)):  # type: ignore[misc]
            def forward(self, *args: Any, **kwargs: Any) -> Any:
                if self.config.sliding_window == 6 and self.dtype == torch.float64:
                    raise ValueError("too wide")
                return super().forward(*args, **kwargs)

        small.__class__ = Narrow
        assert find_quirks(small, [WINDOW]).matters == (WINDOW,)

    def test_what_is_not_a_number_twice_is_the_same(self, tiny_model) -> None:
        model = tiny_model("llama")

        class Dividing(type(model)):  # type: ignore[misc]
            def forward(self, *args: Any, **kwargs: Any) -> Any:
                output = super().forward(*args, **kwargs)
                output.logits[..., 5] = math.nan
                return output

        model.__class__ = Dividing
        assert find_quirks(model, []) == Findings()


class TestShortened:
    def test_nothing_that_matters_is_nothing_to_make_small(self, tiny_model) -> None:
        assert shortened(tiny_model("mistral"), []) == []
        assert shortened(tiny_model("mistral"), [("no_such_number",)]) == []

    def test_all_numbers_are_made_small_in_their_order(self, tiny_model) -> None:
        model = tiny_model("mistral")
        model.config.sliding_window = 200
        (small,) = shortened(model, [POSITIONS, WINDOW])
        assert (small.config.sliding_window, small.config.max_position_embeddings) == (6, 9)
        assert (model.config.sliding_window, model.config.max_position_embeddings) == (200, 256)

    def test_no_more_numbers_are_told_apart_than_texts_are_long(self, tiny_model) -> None:
        model = tiny_model("mistral")
        names = [f"number_{place}" for place in range(10)]
        for place, name in enumerate(names):
            setattr(model.config, name, 100 - place)
        (small,) = shortened(model, [(name,) for name in names])
        given = [getattr(small.config, name) for name in names]
        assert given == [32, 32, 32, 28, 24, 20, 16, 12, 9, 6]

    def test_numbers_that_contradict_each_other_are_made_small_one_by_one(self, tiny_model) -> None:
        """As a vocabulary of six would be, in which the texts have no tokens."""
        model = tiny_model("mistral")
        model.config.sliding_window = 300
        (small,) = shortened(model, [WINDOW, ("vocab_size",)])
        assert small.config.vocab_size == model.config.vocab_size
        assert small.config.sliding_window == 9

    def test_a_model_that_does_not_run_is_none(self, tiny_model) -> None:
        """Here with both numbers small, and with the first alone, in a text that is not short."""
        model = tiny_model("mistral")
        model.config.sliding_window = 200

        class Choosy(type(model)):  # type: ignore[misc]
            def forward(self, input_ids: Any, **kwargs: Any) -> Any:
                if self.config.sliding_window < 200 and input_ids.shape[1] > 10:
                    raise ValueError("no such window")
                return super().forward(input_ids, **kwargs)

        model.__class__ = Choosy
        (small,) = shortened(model, [WINDOW, POSITIONS])
        assert (small.config.sliding_window, small.config.max_position_embeddings) == (200, 9)


class TestSwitches:
    """Lengths of a call at which a model computes otherwise, found by asking for two."""

    def found(
        self, tiny_model, lengths: tuple[int, ...], known: Lengths = ANY_LENGTH, **settings: Any
    ) -> Lengths:
        return find_switches(turning(tiny_model("llama").config, **settings), known, lengths)

    def turning_at(self, *places: int, each: bool = False, longest: int = 10**6) -> Any:
        """What a model says of a text is how many places the call has reached."""

        def said(model: Any, tokens: int) -> torch.Tensor:
            if tokens > longest:
                raise RefusalError("no such place")
            asked.append(tokens)
            reached = sum(tokens >= place for place in places)
            return torch.full((tokens, 3), reached + each * reached * tokens * 1.0)

        asked: list[int] = []
        return said, asked

    @pytest.mark.parametrize("place", [65, 100, 127, 128, 129, 200, 256])
    def test_its_place_is_found_wherever_it_is(self, monkeypatch, place: int) -> None:
        said, asked = self.turning_at(place)
        monkeypatch.setattr("tracker.engine.selfcheck.quirks._said", said)
        assert find_switches(None, Lengths(), (256, 64, 128)) == Lengths((place,))
        assert len(asked) == len(set(asked)) < 14

    def test_where_there_is_none_each_length_is_asked_once(self, monkeypatch) -> None:
        said, asked = self.turning_at(64, 257)
        monkeypatch.setattr("tracker.engine.selfcheck.quirks._said", said)
        assert find_switches(None, Lengths(), (64, 128, 256)) == Lengths()
        assert asked == [64, 128, 256]

    def test_several_and_all(self, monkeypatch) -> None:
        monkeypatch.setattr(
            "tracker.engine.selfcheck.quirks._said", self.turning_at(70, 90, 200)[0]
        )
        assert find_switches(None, Lengths(), (64, 256)) == Lengths((70, 90, 200))
        many = self.turning_at(70, 90, 110, 130, 150, 170)[0]
        monkeypatch.setattr("tracker.engine.selfcheck.quirks._said", many)
        assert find_switches(None, Lengths(), (64, 256)) == Lengths((70, 90, 110, 130), each=True)
        every = self.turning_at(70, each=True)[0]
        monkeypatch.setattr("tracker.engine.selfcheck.quirks._said", every)
        assert find_switches(None, Lengths(), (64, 256)) == Lengths((70,), each=True)

    def test_what_is_known_is_not_looked_for(self, monkeypatch) -> None:
        said, asked = self.turning_at(100, 200)
        monkeypatch.setattr("tracker.engine.selfcheck.quirks._said", said)
        assert find_switches(None, Lengths((100,)), (64, 256)) == Lengths((100, 200))
        for known in (Lengths((100, 200)), Lengths((60,), each=True)):
            asked.clear()
            assert find_switches(None, known, (64, 256)) == known
            assert len(asked) <= 6

    def test_up_to_what_is_refused(self, monkeypatch) -> None:
        monkeypatch.setattr(
            "tracker.engine.selfcheck.quirks._said", self.turning_at(100, longest=180)[0]
        )
        assert find_switches(None, Lengths(), (64, 128, 256)) == Lengths((100,))
        monkeypatch.setattr(
            "tracker.engine.selfcheck.quirks._said", self.turning_at(200, longest=180)[0]
        )
        assert find_switches(None, Lengths(), (64, 128, 256)) == Lengths()

        def broken(model: Any, tokens: int) -> torch.Tensor:
            raise KeyError("ours")

        monkeypatch.setattr("tracker.engine.selfcheck.quirks._said", broken)
        with pytest.raises(KeyError):
            find_switches(None, Lengths(), (64, 128))

    def test_of_a_model(self, tiny_model) -> None:
        """Rotary factors that are chosen by the length of the call."""
        assert self.found(tiny_model, (32, 96), **LONGROPE) == Lengths((65,))
        assert self.found(tiny_model, (32, 96), Lengths((64,)), **LONGROPE) == Lengths((64,))
        assert self.found(tiny_model, (32, 96)) == Lengths()
