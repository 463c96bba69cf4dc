"""Test prefixes that are read separately: growing, cutting, and reuse for other texts."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.helpers.ablations import single_layers
from tests.helpers.engines import engine_of
from tests.helpers.families import tiny_model
from tracker.engine.forward.streams import plan_streams
from tracker.engine.scoring.rows import ANY_LENGTH, Lengths
from tracker.engine.scoring.score import (
    CACHE_MARGIN,
    GrowingLayer,
    Prefix,
    measure_cache_bytes,
    new_cache,
    read_prefix,
)

TOKENS = tuple(range(3, 83))


def make_states(tokens: int, start: int = 0) -> torch.Tensor:
    """Keys of two streams, three heads and a size of four, each with a value of its own."""
    return torch.arange(2 * 3 * tokens * 4.0).reshape(2, 3, tokens, 4) + 1000 * start


@pytest.fixture
def prefix() -> Prefix:
    engine = engine_of("llama")
    plan = plan_streams(single_layers((0, 1, 2, 3)), 4)
    return read_prefix(engine, plan, TOKENS)


class TestGrowing:
    def test_a_buffer_has_room(self) -> None:
        """While a text is generated, not every token copies all before it."""
        layer = GrowingLayer()
        layer.update(make_states(5), make_states(5))
        addresses = [
            layer.update(make_states(1), make_states(1))[0].data_ptr()
            for _ in range(CACHE_MARGIN + 2)
        ]
        assert len(set(addresses)) == 2
        assert len(set(addresses[: CACHE_MARGIN + 1])) == 1

    def test_what_a_row_adds_to_a_kept_beginning_is_forgotten_with_the_next(self) -> None:
        (layer,) = (new_cache().layer_class_to_replicate(),)
        beginning = make_states(5)
        layer.update(beginning, -beginning)
        layer.is_kept = True
        for number in (1, 2):
            row = make_states(3, number)
            keys, values = layer.update(row, -row)
            assert torch.equal(keys, torch.cat([beginning, row], 2))
            assert torch.equal(values, -keys)
            assert layer.get_seq_length() == 5


class TestPrefix:
    @pytest.mark.parametrize(
        ("shared", "beginning", "size"),
        [
            (80, 80, 80),
            (80, 88, 80),  # nine tenths of what others begin with
            (80, 89, None),
            (72, 80, 72),
            (71, 80, None),
            (80, 200, None),
            (48, 48, 48),  # the shortest that is read apart
            (47, 47, None),
            (60, 60, 60),
            (0, 60, None),
        ],
    )
    def test_it_is_cut_to_what_others_share_where_that_is_nearly_all(
        self, prefix: Prefix, shared: int, beginning: int, size: int | None
    ) -> None:
        other = TOKENS[:shared] + (90,) * (beginning - shared)
        before = prefix.proxies
        assert prefix.shorten(other, ANY_LENGTH) is (size is not None)
        length = 80 if size is None else size
        assert prefix.tokens == TOKENS[:length]
        assert torch.equal(prefix.proxies, before[:, :length])
        for layer in prefix.cache.layers:
            assert (layer.is_kept, layer.get_seq_length()) == (True, length)

    @pytest.mark.parametrize(("threshold", "size"), [(64, 72), (75, 80), (80, 80), (81, 72)])
    def test_it_is_not_cut_over_a_length_at_which_the_model_changes(self, prefix, threshold, size):
        """It stands for the call in which it was read, however much of it was cut off since."""
        assert prefix.shorten(TOKENS[:78], Lengths((79,))) is False
        assert prefix.shorten(TOKENS[:72], Lengths((threshold,))) is (size == 72)
        assert len(prefix.tokens) == size
        assert prefix.shorten(TOKENS[:66], Lengths((70,))) is False

    def test_a_prompt_begins_with_it_and_goes_on(self, prefix: Prefix) -> None:
        """All of it would leave no token to predict the next from."""
        assert prefix.is_prefix_of((*TOKENS, 5))
        assert prefix.is_prefix_of([*TOKENS, 5, 6])
        assert not prefix.is_prefix_of(TOKENS)
        assert not prefix.is_prefix_of((*TOKENS[:-1], 5, 6))
        assert not prefix.is_prefix_of(TOKENS[:9])


@pytest.mark.parametrize(("family", "heads"), [("llama", 2), ("gpt2", 4)])
def test_what_one_token_takes_in_one_attention(family: str, heads: int) -> None:
    """A key and a value of eight numbers in each head, of four bytes, and in half of two."""
    model: Any = tiny_model(family)
    for variant in (model, model.bfloat16()):
        assert measure_cache_bytes(engine_of(variant)) == 2 * heads * 8 * variant.dtype.itemsize
