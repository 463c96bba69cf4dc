"""Which layers have parts that a search may take out: known of configurations made by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import PretrainedConfig

from tests.conftest import golden
from tests.helpers.mixtures import MIXTURES, MORE
from tests.helpers.registry import Variant, tiny
from tracker.core.errors import ModelError
from tracker.core.search_parts import SearchParts
from tracker.models.parts.anatomy import search_parts
from tracker.models.sources import find_model


def saved(folder: Path, family: str, **more: Any) -> PretrainedConfig:
    """Save a tiny model of a family; its configuration."""
    settings = {**tiny(family), **MORE.get(family, {}), **more}
    model = Variant(family, "plain", settings).model()
    model.save_pretrained(folder)
    return model.config


@pytest.mark.parametrize(
    ("family", "unit", "there", "per_layer", "stay"),
    [
        ("llama", "layer", None, 1, 0),
        ("llama", "mlp", None, 1, 0),
        ("llama", "head", "all", "num_attention_heads", 1),
        ("llama", "kv_head", "all", "num_key_value_heads", 1),
        ("gpt2", "head", "all", "num_attention_heads", 1),
        ("mixtral", "expert", "all", 5, 2),
        ("olmoe", "expert", "all", 5, 2),
        ("gpt_oss", "expert", "all", 5, 2),
        ("jamba", "expert", (1, 3), 5, 2),
    ],
)
def test_parts_are_those_of_the_configuration_in_layers_that_have_them(
    tmp_path: Path, family: str, unit: Any, there: Any, per_layer: Any, stay: int
) -> None:
    more = {MIXTURES[family]: 5} if unit == "expert" else {}
    config = saved(tmp_path, family, **more)
    count = getattr(config, per_layer) if isinstance(per_layer, str) else per_layer
    layers = config.num_hidden_layers
    where = tuple(range(layers)) if there == "all" else there
    found = search_parts(find_model(str(tmp_path)), unit)
    assert found == SearchParts(unit, layers, count, where, stay)


@pytest.mark.parametrize(("asked", "words"), golden("refused_units"))
def test_a_model_without_such_parts_is_refused_by_name(tmp_path, asked, words) -> None:
    model, unit = asked.split(" | ")
    family, _, settings = model.partition(" ")
    saved(tmp_path, family, **json.loads(settings or "{}"))
    with pytest.raises(ModelError) as refusal:
        search_parts(find_model(str(tmp_path)), unit)  # type: ignore[arg-type]
    assert str(tmp_path) in str(refusal.value)
    assert words in str(refusal.value)
