"""Test the facts that changing one number of a configuration, or calling a model, reveals."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.helpers.engines import changed
from tests.helpers.families import tiny_model
from tracker.engine.refusal import RefusalError
from tracker.engine.scoring.rows import Lengths
from tracker.engine.selfcheck import quirks
from tracker.engine.selfcheck.quirks import Findings, find_quirks, find_switches, shortened
from tracker.models.miniature import NumberPath, miniature, numbers

pytestmark = pytest.mark.usefixtures("one_thread")

POSITIONS = ("max_position_embeddings",)
WINDOW = ("sliding_window",)
THETA = ("rope_parameters", "rope_theta")
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
    def test_a_model_that_counts_nothing(self) -> None:
        model = miniature(tiny_model("llama"))
        before = {name: value.clone() for name, value in model.state_dict().items()}
        assert find_quirks(model, [POSITIONS]) == Findings()
        assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())

    def test_a_window_matters_and_is_no_matter_of_the_call(self) -> None:
        """Numbers that decide the shape of weights are not tried: it would be another model."""
        model = miniature(tiny_model("mistral"))
        found = find_quirks(model, every(model))
        assert set(found.matters) == {WINDOW, THETA}
        assert (found.lengths, found.causal) == ((), True)

    def test_a_number_on_whose_sides_all_lengths_are_alike(self) -> None:
        found = find_quirks(turning(tiny_model("llama").config, **LONGROPE), [FACTORS, POSITIONS])
        assert found.lengths == ((FACTORS, False),)
        assert FACTORS in found.matters

    def test_a_number_beyond_which_every_length_is_another(self) -> None:
        """And which leaves something behind: factors grow with a long text, and stay."""
        found = find_quirks(turning(tiny_model("llama").config, **DYNAMIC), [POSITIONS])
        assert found.lengths == ((POSITIONS, True),)
        assert found.matters == (POSITIONS,)
        assert "inv_freq" in {name.rpartition(".")[2] for name in found.leftovers}
        assert found.first == frozenset()

    def test_a_model_that_looks_at_the_whole_call(self) -> None:
        def counting(model: Any, forward: Any, input_ids: Any, **kwargs: Any) -> Any:
            output = forward(input_ids, **kwargs)
            output.logits = output.logits * input_ids.shape[1]
            return output

        found = find_quirks(changed(tiny_model("llama"), counting), [POSITIONS])
        assert (found.lengths, found.causal) == ((((), True),), True)

    @pytest.mark.parametrize(("weight", "once"), [(True, True), (True, False), (False, True)])
    def test_what_calls_change(self, weight: bool, once: bool) -> None:
        """The first call alone, or each; a weight, or something beside the weights."""

        def changing(model: Any, forward: Any, *args: Any, **kwargs: Any) -> Any:
            if not once or not hasattr(model, "called"):
                value = model.lm_head.weight if weight else model.model.rotary_emb.inv_freq
                value.data = value.data * 1.5
                model.called = True
            return forward(*args, **kwargs)

        found = find_quirks(changed(tiny_model("llama"), changing), [])
        name = "weight" if weight else "inv_freq"
        assert found.leftovers == (frozenset() if once else {name})
        names = {attribute for _, attribute in found.first}
        assert (name in names) == bool(names) == weight

    @pytest.mark.parametrize("refused", [POSITIONS, WINDOW, THETA])
    def test_a_number_that_the_model_does_not_take_is_passed_over(
        self, refused: NumberPath
    ) -> None:
        """In a longer text than it is built with; and the others are tried none the less."""
        small = miniature(tiny_model("mistral"))
        before = dict(numbers(small.config))

        def choosy(model: Any, forward: Any, input_ids: Any, **kwargs: Any) -> Any:
            is_other = dict(numbers(model.config))[refused] != before[refused]
            if is_other and input_ids.shape[1] > 10:
                raise ValueError("no such number")
            return forward(input_ids, **kwargs)

        found = find_quirks(changed(small, choosy), [POSITIONS, WINDOW, THETA])
        assert set(found.matters) == {WINDOW, THETA} - {refused}


class TestShortened:
    def test_all_numbers_are_made_small_in_their_order(self) -> None:
        model = tiny_model("mistral")
        model.config.sliding_window = 200
        (small,) = shortened(model, [POSITIONS, WINDOW])
        assert (small.config.sliding_window, small.config.max_position_embeddings) == (6, 9)
        assert (model.config.sliding_window, model.config.max_position_embeddings) == (200, 256)

    def test_no_more_numbers_are_told_apart_than_texts_are_long(self) -> None:
        model = tiny_model("mistral")
        names = [f"number_{place}" for place in range(10)]
        for place, name in enumerate(names):
            setattr(model.config, name, 100 - place)
        (small,) = shortened(model, [(name,) for name in names])
        given = [getattr(small.config, name) for name in names]
        assert given == [32, 32, 32, 28, 24, 20, 16, 12, 9, 6]


class TestSwitches:
    """Lengths of a call at which a model computes otherwise, found by asking for two."""

    @pytest.fixture
    def turning_at(self, monkeypatch) -> Callable[..., list[int]]:
        """Lets what a model says of a text be how many places the call has reached."""

        def turning_at(*places: int, each: bool = False, longest: int = 10**6) -> list[int]:
            asked: list[int] = []

            def said(model: Any, tokens: int) -> torch.Tensor:
                if tokens > longest:
                    raise RefusalError("no such place")
                asked.append(tokens)
                reached = sum(tokens >= place for place in places)
                return torch.full((tokens, 3), reached + each * reached * tokens * 1.0)

            monkeypatch.setattr(quirks, "_said", said)
            return asked

        return turning_at

    @pytest.mark.parametrize("place", [65, 100, 127, 128, 129, 200, 256])
    def test_its_place_is_found_wherever_it_is(self, turning_at, place: int) -> None:
        asked = turning_at(place)
        assert find_switches(None, Lengths(), (256, 64, 128)) == Lengths((place,))
        assert len(asked) == len(set(asked)) < 14

    @pytest.mark.parametrize(
        ("places", "how", "found"),
        [
            ((70, 90, 200), {}, Lengths((70, 90, 200))),
            ((70, 90, 110, 130, 150, 170), {}, Lengths((70, 90, 110, 130), each=True)),
            ((70,), {"each": True}, Lengths((70,), each=True)),
            # Up to what is refused.
            ((100,), {"longest": 180}, Lengths((100,))),
            ((200,), {"longest": 180}, Lengths()),
        ],
    )
    def test_several_and_all(self, turning_at, places, how, found: Lengths) -> None:
        turning_at(*places, **how)
        assert find_switches(None, Lengths(), (64, 128, 256)) == found

    @pytest.mark.parametrize(
        ("known", "settings", "found"),
        [((), LONGROPE, (65,)), ((64,), LONGROPE, (64,)), ((), {}, ())],
    )
    def test_of_a_model(self, known, settings, found) -> None:
        """Rotary factors that are chosen by the length of the call."""
        model = turning(tiny_model("llama").config, **settings)
        assert find_switches(model, Lengths(known), (32, 96)) == Lengths(found)
