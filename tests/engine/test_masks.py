"""Test the attention window of each layer, and the masks that rows derive from it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.helpers.engines import make_documents
from tests.helpers.families import MIXED, WINDOW, tiny_model
from tracker.engine.refusal import RefusalError
from tracker.engine.scoring.masks import AttentionWindows, Masks, attention_windows, first_seen
from tracker.engine.scoring.rows import reading_row, tree_rows
from tracker.models.layers import find_base, find_layers

CPU = torch.device("cpu")
CAUSAL = torch.ones(5, 5, dtype=torch.bool).tril()


class First(nn.Module):
    def forward(self, attention_mask=None, **kwargs):
        return attention_mask


class Named(nn.Module):
    def forward(self, hidden_states, attention_mask=None, **kwargs):
        return hidden_states


class Later(nn.Module):
    def forward(self, hidden_states, position_ids=None, attention_mask=None):
        return hidden_states


class Without(nn.Module):
    def forward(self, hidden_states, **kwargs):
        return hidden_states


def as_added(seen: torch.Tensor, hidden: float = float("-inf")) -> torch.Tensor:
    """Return a mask as models add it to their scores."""
    return torch.where(seen, 0.0, hidden)[None, None]


def test_windows_are_seen_layer_by_layer():
    model = tiny_model("gemma3_mixed")
    windows = attention_windows(find_base(model), find_layers(model), 12, CPU)
    window = [max(0, place - WINDOW + 1) for place in range(12)]
    assert windows.tokens == 12
    found = [None if first is None else first.tolist() for first in windows.first]
    assert found == [window if kind == "sliding_attention" else None for kind in MIXED]


def test_a_mask_is_reduced_to_where_each_token_begins_to_see():
    window = CAUSAL & ~CAUSAL.tril(-2)
    for mask in (window[None, None], as_added(window), as_added(window, -3e4)):
        assert first_seen(mask, 5).tolist() == [0, 0, 1, 2, 3]
    assert first_seen(CAUSAL[None, None], 5) is None
    assert first_seen(as_added(CAUSAL), 5) is None


@pytest.mark.parametrize("mask", [None, "no", CAUSAL, CAUSAL[None, None, :4], CAUSAL[:, :4][None]])
def test_what_is_no_mask_of_the_whole_text_says_nothing(mask):
    assert first_seen(mask, 5) is None


@pytest.mark.parametrize("slope", [-0.5, -9999.0, 0.5])
def test_a_mask_that_weighs_is_refused(slope):
    mask = as_added(CAUSAL)
    mask[0, 0, 4, 1] = slope
    with pytest.raises(
        RefusalError, match=r"^its attention masks say more than which token is seen$"
    ):
        first_seen(mask, 5)


@pytest.mark.parametrize(("token", "other", "sees"), [(4, 2, False), (1, 3, True), (0, 0, False)])
def test_a_token_that_sees_no_unbroken_stretch_is_refused(token, other, sees):
    seen = CAUSAL.clone()
    seen[token, other] = sees
    with pytest.raises(
        RefusalError, match=r"^a token sees others than an unbroken stretch before it$"
    ):
        first_seen(seen[None, None], 5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("prefix", [0, 4])
def test_a_node_sees_its_ancestors_within_its_layers_window(dtype, prefix):
    (row,) = tree_rows(make_documents(3), 96, 1000, prefix)
    window = (torch.arange(40) - 2).clamp(min=0)
    masks = Masks(row, AttentionWindows(40, (None, window, None, window)), dtype, CPU)
    for layer, reach in enumerate((40, 2, 40, 2)):
        (_, mask), _ = masks.put(layer, Named(), ("hidden", None), {})
        assert mask.dtype == dtype
        assert mask.shape == (1, 1, row.tokens, prefix + row.tokens)
        for node, depth in enumerate(row.positions[0].tolist()):
            above = [place for place in range(prefix) if depth - place <= reach]
            beside = row.ancestors[node].nonzero().flatten().tolist()
            beside = [n for n in beside if depth - int(row.positions[0, n]) <= reach]
            shown = (mask[0, 0, node] == 0).nonzero().flatten().tolist()
            assert shown == above + [prefix + n for n in beside]
        assert set(mask.unique().tolist()) == {0.0, torch.finfo(dtype).min}
    # Layers that see alike share a mask.
    same = [masks.put(layer, First(), ("its own",), {})[0][0] for layer in range(4)]
    assert same[0] is same[2]
    assert same[1] is same[3]


def test_a_mask_is_put_where_the_layer_takes_it():
    masks = Masks(reading_row((1, 2)), AttentionWindows(2, (None,)), torch.float32, CPU)
    ((made,), _) = masks.put(0, First(), ("its own",), {})
    assert masks.put(0, Named(), ("a", "b", "c"), {"x": 1}) == (("a", made, "c"), {"x": 1})
    assert masks.put(0, Named(), ("a",), {"x": 1}) == (("a",), {"x": 1, "attention_mask": made})
    named = {"attention_mask": "its own"}
    assert masks.put(0, Without(), ("a",), named) == (("a",), {"attention_mask": made})
    assert masks.put(0, Named(), ("a",), named) == (("a",), {"attention_mask": made})
    assert named == {"attention_mask": "its own"}
    assert masks.put(0, Without(), ("a",), {"x": 1}) == (("a",), {"x": 1})
