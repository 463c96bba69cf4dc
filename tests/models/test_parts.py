"""Which layers have parts that a search may take out: known of configurations made by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import PretrainedConfig

from tests.conftest import golden
from tests.helpers.mixtures import EXTRA_SETTINGS, MIXTURES
from tests.helpers.registry import Variant, tiny_settings
from tracker.models.parts.anatomy import find_search_parts
from tracker.models.sources import find_model
from tracker.schema.errors import ModelError
from tracker.schema.search_parts import SearchParts


def save_tiny_model(folder: Path, family: str, **changes: Any) -> PretrainedConfig:
    """Save a tiny model of a family; its configuration."""
    settings = {**tiny_settings(family), **EXTRA_SETTINGS.get(family, {}), **changes}
    model = Variant(family, "plain", settings).model()
    model.save_pretrained(folder)
    return model.config


@pytest.mark.parametrize(
    ("family", "unit", "expected_layers", "per_layer", "n_staying"),
    [
        ("llama", "layer", None, 1, 0),
        ("llama", "mlp", None, 1, 0),
        ("llama", "head", "all", "num_attention_heads", 1),
        ("llama", "kv_head", "all", "num_key_value_heads", 1),
        ("gpt2", "head", "all", "num_attention_heads", 1),
        ("llama", "neuron", "all", 4, 1),
        ("mixtral", "expert", "all", 5, 2),
        ("olmoe", "expert", "all", 5, 2),
        ("gpt_oss", "expert", "all", 5, 2),
        ("jamba", "expert", (1, 3), 5, 2),
    ],
)
def test_parts_are_those_of_the_configuration_in_layers_that_have_them(
    tmp_path: Path, family: str, unit: Any, expected_layers: Any, per_layer: Any, n_staying: int
) -> None:
    changes = {MIXTURES[family]: 5} if unit == "expert" else {}
    config = save_tiny_model(tmp_path, family, **changes)
    count = getattr(config, per_layer) if isinstance(per_layer, str) else per_layer
    n_layers = config.num_hidden_layers
    part_layers = tuple(range(n_layers)) if expected_layers == "all" else expected_layers
    parts = find_search_parts(find_model(str(tmp_path)), unit)
    assert parts == SearchParts(unit, n_layers, count, part_layers, n_staying)


@pytest.mark.parametrize(("request_text", "message"), golden("refused_units"))
def test_a_model_without_such_parts_is_refused_by_name(tmp_path, request_text, message) -> None:
    model_text, unit = request_text.split(" | ")
    family, _, settings = model_text.partition(" ")
    save_tiny_model(tmp_path, family, **json.loads(settings or "{}"))
    with pytest.raises(ModelError) as caught:
        find_search_parts(find_model(str(tmp_path)), unit)  # type: ignore[arg-type]
    assert str(tmp_path) in str(caught.value)
    assert message in str(caught.value)
