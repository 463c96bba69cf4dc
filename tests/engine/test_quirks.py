"""Test the facts that changing one number of a configuration, or calling a model, reveals."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.helpers.engines import with_forward
from tests.helpers.families import tiny_model
from tracker.engine.refusal import RefusalError
from tracker.engine.scoring.rows import Lengths
from tracker.engine.selfcheck import quirks
from tracker.engine.selfcheck.quirks import (
    QuirkFindings,
    build_shortened,
    find_quirks,
    find_switches,
)
from tracker.models.miniature import NumberPath, build_miniature, find_numbers

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


def make_rotary_miniature(config: Any, **settings: Any) -> Any:
    """Make a miniature whose rotary factors are others."""
    config.rope_parameters = {"rope_theta": 1e4, "rope_type": "default", **settings}
    return build_miniature(AutoModelForCausalLM.from_config(config).eval())


def all_paths(model: Any) -> list[tuple[str, ...]]:
    return [path for path, _ in find_numbers(model.config)]


class TestFindings:
    def test_a_model_that_counts_nothing(self) -> None:
        model = build_miniature(tiny_model("llama"))
        old_weights = {name: value.clone() for name, value in model.state_dict().items()}
        assert find_quirks(model, [POSITIONS]) == QuirkFindings()
        assert all(torch.equal(old_weights[name], v) for name, v in model.state_dict().items())

    def test_a_window_matters_and_is_no_matter_of_the_call(self) -> None:
        """Numbers that decide the shape of weights are not tried: it would be another model."""
        model = build_miniature(tiny_model("mistral"))
        findings = find_quirks(model, all_paths(model))
        assert set(findings.relevant_numbers) == {WINDOW, THETA}
        assert (findings.lengths, findings.causal) == ((), True)

    def test_a_number_on_whose_sides_all_lengths_are_alike(self) -> None:
        model = make_rotary_miniature(tiny_model("llama").config, **LONGROPE)
        findings = find_quirks(model, [FACTORS, POSITIONS])
        assert findings.lengths == ((FACTORS, False),)
        assert FACTORS in findings.relevant_numbers

    def test_a_number_beyond_which_every_length_is_another(self) -> None:
        """And which leaves something behind: factors grow with a long text, and stay."""
        model = make_rotary_miniature(tiny_model("llama").config, **DYNAMIC)
        findings = find_quirks(model, [POSITIONS])
        assert findings.lengths == ((POSITIONS, True),)
        assert findings.relevant_numbers == (POSITIONS,)
        assert "inv_freq" in {name.rpartition(".")[2] for name in findings.leftovers}
        assert findings.first == frozenset()

    def test_a_model_that_looks_at_the_whole_call(self) -> None:
        def scale_by_length(model: Any, forward: Any, input_ids: Any, **kwargs: Any) -> Any:
            output = forward(input_ids, **kwargs)
            output.logits = output.logits * input_ids.shape[1]
            return output

        findings = find_quirks(with_forward(tiny_model("llama"), scale_by_length), [POSITIONS])
        assert (findings.lengths, findings.causal) == ((((), True),), True)

    @pytest.mark.parametrize(("weight", "once"), [(True, True), (True, False), (False, True)])
    def test_what_calls_change(self, weight: bool, once: bool) -> None:
        """The first call alone, or each; a weight, or something beside the weights."""

        def change_on_call(model: Any, forward: Any, *args: Any, **kwargs: Any) -> Any:
            if not once or not hasattr(model, "called"):
                value = model.lm_head.weight if weight else model.model.rotary_emb.inv_freq
                value.data = value.data * 1.5
                model.called = True
            return forward(*args, **kwargs)

        findings = find_quirks(with_forward(tiny_model("llama"), change_on_call), [])
        name = "weight" if weight else "inv_freq"
        assert findings.leftovers == (frozenset() if once else {name})
        names = {attribute for _, attribute in findings.first}
        assert (name in names) == bool(names) == weight

    @pytest.mark.parametrize("refused", [POSITIONS, WINDOW, THETA])
    def test_a_number_that_the_model_does_not_take_is_passed_over(
        self, refused: NumberPath
    ) -> None:
        """In a longer text than it is built with; and the others are tried none the less."""
        small_model = build_miniature(tiny_model("mistral"))
        old_numbers = dict(find_numbers(small_model.config))

        def refuse_number(model: Any, forward: Any, input_ids: Any, **kwargs: Any) -> Any:
            is_other = dict(find_numbers(model.config))[refused] != old_numbers[refused]
            if is_other and input_ids.shape[1] > 10:
                raise ValueError("no such number")
            return forward(input_ids, **kwargs)

        findings = find_quirks(with_forward(small_model, refuse_number), [POSITIONS, WINDOW, THETA])
        assert set(findings.relevant_numbers) == {WINDOW, THETA} - {refused}


class TestShortened:
    def test_all_numbers_are_made_small_in_their_order(self) -> None:
        model = tiny_model("mistral")
        model.config.sliding_window = 200
        (small,) = build_shortened(model, [POSITIONS, WINDOW])
        assert (small.config.sliding_window, small.config.max_position_embeddings) == (6, 9)
        assert (model.config.sliding_window, model.config.max_position_embeddings) == (200, 256)

    def test_no_more_numbers_are_told_apart_than_texts_are_long(self) -> None:
        model = tiny_model("mistral")
        names = [f"number_{index}" for index in range(10)]
        for index, name in enumerate(names):
            setattr(model.config, name, 100 - index)
        (small,) = build_shortened(model, [(name,) for name in names])
        values = [getattr(small.config, name) for name in names]
        assert values == [32, 32, 32, 28, 24, 20, 16, 12, 9, 6]


class TestSwitches:
    """Lengths of a call at which a model computes otherwise, found by bisection."""

    @pytest.fixture
    def turning_at(self, monkeypatch) -> Callable[..., list[int]]:
        """Make the logits of a text the number of thresholds that the call has reached."""

        def turning_at(
            *thresholds: int, all_differ: bool = False, longest: int = 10**6
        ) -> list[int]:
            asked_lengths: list[int] = []

            def text_logits(model: Any, tokens: int) -> torch.Tensor:
                if tokens > longest:
                    raise RefusalError("no such threshold")
                asked_lengths.append(tokens)
                reached = sum(tokens >= threshold for threshold in thresholds)
                return torch.full((tokens, 3), reached + all_differ * reached * tokens * 1.0)

            monkeypatch.setattr(quirks, "_text_logits", text_logits)
            return asked_lengths

        return turning_at

    @pytest.mark.parametrize("threshold", [65, 100, 127, 128, 129, 200, 256])
    def test_its_place_is_found_wherever_it_is(self, turning_at, threshold: int) -> None:
        asked_lengths = turning_at(threshold)
        assert find_switches(None, Lengths(), (256, 64, 128)) == Lengths((threshold,))
        assert len(asked_lengths) == len(set(asked_lengths)) < 14

    @pytest.mark.parametrize(
        ("thresholds", "options", "expected"),
        [
            ((70, 90, 200), {}, Lengths((70, 90, 200))),
            ((70, 90, 110, 130, 150, 170), {}, Lengths((70, 90, 110, 130), all_differ=True)),
            ((70,), {"all_differ": True}, Lengths((70,), all_differ=True)),
            # Up to what is refused.
            ((100,), {"longest": 180}, Lengths((100,))),
            ((200,), {"longest": 180}, Lengths()),
        ],
    )
    def test_several_and_all(self, turning_at, thresholds, options, expected: Lengths) -> None:
        turning_at(*thresholds, **options)
        assert find_switches(None, Lengths(), (64, 128, 256)) == expected

    @pytest.mark.parametrize(
        ("thresholds", "settings", "expected"),
        [((), LONGROPE, (65,)), ((64,), LONGROPE, (64,)), ((), {}, ())],
    )
    def test_of_a_model(self, thresholds, settings, expected) -> None:
        """Rotary factors that are chosen by the length of the call."""
        model = make_rotary_miniature(tiny_model("llama").config, **settings)
        assert find_switches(model, Lengths(thresholds), (32, 96)) == Lengths(expected)
