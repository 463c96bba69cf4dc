"""Test the attention window of each layer, and the masks that rows derive from it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.helpers.engines import make_documents
from tests.helpers.families import MIXED_LAYERS, WINDOW, tiny_model
from tracker.engine.refusal import RefusalError
from tracker.engine.scoring.masks import (
    AttentionWindows,
    Masks,
    find_attention_windows,
    find_first_visible,
)
from tracker.engine.scoring.rows import pack_tree_rows, reading_row
from tracker.models.layers import find_base, find_layers

CPU = torch.device("cpu")
CAUSAL = torch.ones(5, 5, dtype=torch.bool).tril()


class First(nn.Module):
    def forward(self, attention_mask=None, **kwargs):
        return attention_mask


class Named(nn.Module):
    def forward(self, hidden_states, attention_mask=None, **kwargs):
        return hidden_states


class Without(nn.Module):
    def forward(self, hidden_states, **kwargs):
        return hidden_states


def make_additive(seen: torch.Tensor, hidden: float = float("-inf")) -> torch.Tensor:
    """Return a mask as models add it to their scores."""
    return torch.where(seen, 0.0, hidden)[None, None]


def test_windows_are_seen_layer_by_layer():
    model = tiny_model("gemma3_mixed")
    windows = find_attention_windows(find_base(model), find_layers(model), 12, CPU)
    window = [max(0, position - WINDOW + 1) for position in range(12)]
    assert windows.tokens == 12
    first_positions = [None if p is None else p.tolist() for p in windows.starts]
    assert first_positions == [window if k == "sliding_attention" else None for k in MIXED_LAYERS]


def test_a_mask_is_reduced_to_where_each_token_begins_to_see():
    window = CAUSAL & ~CAUSAL.tril(-2)
    for mask in (window[None, None], make_additive(window), make_additive(window, -3e4)):
        assert find_first_visible(mask, 5).tolist() == [0, 0, 1, 2, 3]
    assert find_first_visible(CAUSAL[None, None], 5) is None
    assert find_first_visible(make_additive(CAUSAL), 5) is None


@pytest.mark.parametrize("mask", [None, "no", CAUSAL, CAUSAL[None, None, :4], CAUSAL[:, :4][None]])
def test_what_is_no_mask_of_the_whole_text_says_nothing(mask):
    assert find_first_visible(mask, 5) is None


@pytest.mark.parametrize("slope", [-0.5, -9999.0, 0.5])
def test_a_mask_that_weighs_is_refused(slope):
    mask = make_additive(CAUSAL)
    mask[0, 0, 4, 1] = slope
    with pytest.raises(
        RefusalError, match=r"^the attention masks add a bias to the attention scores$"
    ):
        find_first_visible(mask, 5)


@pytest.mark.parametrize(("token", "other", "sees"), [(4, 2, False), (1, 3, True), (0, 0, False)])
def test_a_token_that_sees_no_unbroken_stretch_is_refused(token, other, sees):
    seen = CAUSAL.clone()
    seen[token, other] = sees
    with pytest.raises(
        RefusalError, match=r"^a token attends to several separate ranges of earlier tokens$"
    ):
        find_first_visible(seen[None, None], 5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("prefix", [0, 4])
def test_a_node_sees_its_ancestors_within_its_layers_window(dtype, prefix):
    (row,) = pack_tree_rows(make_documents(3), 96, 1000, prefix)
    window = (torch.arange(40) - 2).clamp(min=0)
    masks = Masks(row, AttentionWindows(40, (None, window, None, window)), dtype, CPU)
    for layer, reach in enumerate((40, 2, 40, 2)):
        (_, mask), _ = masks.replace_mask(layer, Named(), ("hidden", None), {})
        assert mask.dtype == dtype
        assert mask.shape == (1, 1, row.tokens, prefix + row.tokens)
        for node, depth in enumerate(row.positions[0].tolist()):
            prefix_positions = [position for position in range(prefix) if depth - position <= reach]
            visible_nodes = row.ancestors[node].nonzero().flatten().tolist()
            visible_nodes = [n for n in visible_nodes if depth - int(row.positions[0, n]) <= reach]
            visible = (mask[0, 0, node] == 0).nonzero().flatten().tolist()
            assert visible == prefix_positions + [prefix + n for n in visible_nodes]
        assert set(mask.unique().tolist()) == {0.0, torch.finfo(dtype).min}
    # Layers that see alike share a mask.
    layer_masks = [masks.replace_mask(layer, First(), ("its own",), {})[0][0] for layer in range(4)]
    assert layer_masks[0] is layer_masks[2]
    assert layer_masks[1] is layer_masks[3]


def test_a_mask_is_put_where_the_layer_takes_it():
    masks = Masks(reading_row((1, 2)), AttentionWindows(2, (None,)), torch.float32, CPU)
    ((mask,), _) = masks.replace_mask(0, First(), ("its own",), {})
    assert masks.replace_mask(0, Named(), ("a", "b", "c"), {"x": 1}) == (("a", mask, "c"), {"x": 1})
    assert masks.replace_mask(0, Named(), ("a",), {"x": 1}) == (
        ("a",),
        {"x": 1, "attention_mask": mask},
    )
    kwargs = {"attention_mask": "its own"}
    assert masks.replace_mask(0, Without(), ("a",), kwargs) == (("a",), {"attention_mask": mask})
    assert masks.replace_mask(0, Named(), ("a",), kwargs) == (("a",), {"attention_mask": mask})
    assert kwargs == {"attention_mask": "its own"}
    assert masks.replace_mask(0, Without(), ("a",), {"x": 1}) == (("a",), {"x": 1})
